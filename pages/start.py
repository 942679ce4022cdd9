"""Start: what this is, three finished examples, the models here, and where you left off."""

import streamlit as st

from pages.components import frame

frame.enter()
st.title("Edit Anatomy", anchor=False)
st.markdown(
    "Rewrite a single fact inside a language model, then look at what it says now, what else changed, and which "
    "layers did it. "
    "The model is given back bit for bit after every run."
)

# Only now: reading the modules of the service takes a second after a server's start, and the heading is there first.
from pages.components import start_view  # noqa: E402

start_view.draw()
