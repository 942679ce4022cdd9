"""Runs: everything you asked or brought along, to find, open, judge, compare, export or delete."""

import streamlit as st

from pages.components import frame, runs_actions, runs_import, runs_list
from pages.components.session import owner, service

frame.enter()
desk = service()

st.title("Runs", anchor=False)
st.caption("Each edit you run, open or import is listed here, for you alone.")
if desk.count_runs(session=owner()) == 0:
    runs_list.nothing_yet()
    runs_import.draw()
    st.stop()

listed = runs_list.find()
picked = runs_list.table(listed) if listed else []
if listed:
    runs_actions.draw(picked)
runs_import.draw()
