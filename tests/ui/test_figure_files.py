"""The files under every picture: CSV, PNG and SVG are what they say they are."""

from __future__ import annotations

import re

import altair as alt
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from pages.components import pictures
from pages.components.text import csv_bytes

TABLE = pd.DataFrame({"word": ["=1+1", "<b>&", "日本"], "value": [1.0, -2.5, 3.0]})


@pytest.fixture(scope="module")
def spec():
    chart = alt.Chart(TABLE).mark_bar().encode(x="value:Q", y="word:N")
    return chart.to_dict(validate=False)


def test_svg_is_a_picture_with_its_title_that_loads_nothing(spec):
    text = pictures.svg(spec, "A <title> & more")
    assert text.startswith("<svg")
    assert "A &lt;title&gt; &amp; more" in text
    links = set(re.findall(r"https?://[^\"'\s)]+", text))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<image" not in text
    assert "<script" not in text


def test_svg_does_not_fetch_what_a_specification_names(spec):
    hostile = {**spec, "data": {"url": "http://evil.example/data.json"}}
    with pytest.raises(ValueError):
        pictures.svg(hostile)


def test_png_has_so_many_pixels(spec):
    data = pictures.png({**spec, "width": 300, "height": 100}, scale=2.0)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width = int.from_bytes(data[16:20], "big")
    assert width > 600


def test_a_width_left_to_the_page_is_set(spec):
    text = pictures.svg({**spec, "width": "container"})
    width = float(re.search(r'width="([\d.]+)"', text)[1])
    assert width > pictures.WIDTH


def test_csv_has_every_row_and_no_formula():
    text = csv_bytes(TABLE).decode("utf-8-sig")
    assert text.splitlines() == ['"word","value"', '"\'=1+1",1.0', '"<b>&",-2.5', '"日本",3.0']


def test_the_files_are_offered_once_they_are_asked_for():
    def page():
        import altair as alt
        import pandas as pd

        from pages.components.figure import figure

        table = pd.DataFrame({"word": ["a"], "value": [1.0]})
        figure(
            "one", alt.Chart(table).mark_bar().encode(x="value:Q"), title="One", reading="So.", table=table, file="one"
        )

    at = AppTest.from_function(page, default_timeout=60).run()
    assert not at.exception
    assert len(at.get("download_button")) == 0
    at.session_state["one_files"] = True
    at.run()
    assert not at.exception
    assert [button.label for button in at.get("download_button")] == ["CSV", "PNG", "SVG"]
