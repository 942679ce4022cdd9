"""Text from people and models: nothing but text reaches the page and the spreadsheet."""

from __future__ import annotations

import re
import tomllib
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from streamlit import config

from mega_core.summary import percent
from pages.components import session
from pages.components.request_form import first_object
from pages.components.text import clip, csv_bytes, marked, md, seconds, word_diff
from tests.ui.fake import EVIL, HOSTILE

ROOT = Path(__file__).resolve().parents[2]
HOSTILES = [
    "![x](http://evil.example/a.png)",
    "[click](javascript:alert(1))",
    "<img src=x onerror=alert(1)>",
    "<script>window.__x=1</script>",
    "$\\frac{1}{2}$ and $$x$$",
    ":red[directive] :material/delete: :smile:",
    "# heading",
    "- list\n- list",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "`code` **bold** ~~struck~~ _em_",
    "http://evil.example www.evil.example a@evil.example",
    "&lt;b&gt; &copy;",
    "> quote\n\n    code block",
    "<!-- comment --> -> <- --",
]


@pytest.mark.parametrize("text", HOSTILES)
def test_every_mark_is_escaped(text):
    shown = md(text)
    assert "\n" not in shown
    plain = shown.replace("\u2060", "")
    position = 0
    while position < len(plain):  # walk: a mark may only follow its backslash
        if plain[position] == "\\":
            position += 2
            continue
        assert plain[position].isalnum() or plain[position] == " " or not plain[position].isascii()
        position += 1
    assert plain.replace("\\\\", "\0").replace("\\", "").replace("\0", "\\") == " ".join(text.split())


@pytest.mark.parametrize("text", [":smile:", ":material/delete:", "a -> b", "a <- b", "a -- b"])
def test_what_is_rewritten_after_parsing_is_broken_up(text):
    shown = md(text).replace("\\", "")
    assert text not in shown
    assert shown.replace("\u2060", "") == text


@pytest.mark.parametrize("page", ["start", "edit", "runs"])
def test_hostile_texts_reach_no_page_unescaped(desk, visit, page):
    desk.visited(EVIL, "o" * 32)
    at = visit(page, **({"run": EVIL.digest} if page == "edit" else {}))
    assert not at.exception
    elements = [
        e
        for kind in ("title", "header", "subheader", "markdown", "caption", "error", "info")
        for e in getattr(at, kind)
    ]
    labels = [button.label for button in at.button] + [metric.label for metric in at.metric]
    shown = [str(element.value) for element in elements] + labels
    shown += [proto.proto.label for proto in at.get("page_link")]
    assert any("evil" in text for text in shown) or page == "runs"
    for text in shown:
        for raw in ("![x](", "](http", "<b>", "<img", "<script", "$\\frac", ":red[is]", "**Paris**", ":smile:"):
            assert not re.search(r"(?<!\\)" + re.escape(raw), text)
    assert not any(getattr(element, "allow_html", False) for element in at.markdown)


def test_hostile_template_in_the_form(desk, visit):
    at = visit("edit")
    at.text_input(key="edit_subject").set_value(HOSTILE.subject)
    at.text_input(key="edit_template").set_value(HOSTILE.template)
    at.text_input(key="edit_new").set_value("![n](http://evil.example/n.png)").run()
    assert not at.exception
    for element in at.markdown:
        assert "](http" not in element.value


def test_a_spreadsheet_finds_no_formula():
    frame = pd.DataFrame({"=cmd": ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "plain"], "n": [-1.5, 2, 3, 4, 5, 6, 7]})
    back = pd.read_csv(BytesIO(csv_bytes(frame)), encoding="utf-8-sig", keep_default_na=False)
    assert back.columns.tolist() == ["'=cmd", "n"]
    assert all(cell.startswith("'") for cell in back["'=cmd"][:6])
    assert back["n"].iloc[0] == -1.5


def test_word_diff_marks_what_differs():
    base, edited = word_diff("in Paris near the Seine", "in Rome near the Tiber")
    assert [word for word, differs in base if differs] == ["Paris", "Seine"]
    assert marked(edited, "green") == "in :green-background[Rome] near the :green-background[Tiber]"


def test_numbers_read_well():
    assert [percent(p) for p in (0.913, 0.031, 0.002, 0.00001, 0.0)] == ["91 %", "3.1 %", "0.2 %", "< 0.01 %", "0 %"]
    assert [seconds(s) for s in (0.01, 0.4, 4.26, 31.2, 200, None)] == [
        "< 0.1 s", "0.4 s", "4.3 s", "31 s", "3 min", "not measured yet"
    ]  # fmt: skip
    assert len(clip("a" * 200, 40)) == 40


@pytest.mark.parametrize(
    ("said", "object_"),
    [
        (" Paris. It is", "Paris"),
        ("New York City, which", "New York City"),
        ("the old town of a place in", "the old town of"),
        ("", ""),
    ],
)
def test_the_object_of_an_answer(said, object_):
    assert first_object(said) == object_


def test_a_person_is_recognised_by_their_browser():
    token = (
        "2|01020304|" + bytes(b ^ (1, 2, 3, 4)[i % 4] for i, b in enumerate(b"sixteen bytes ok")).hex() + "|1700000000"
    )
    assert session._browser_token(token) == b"sixteen bytes ok"
    for bad in ("", "2|x", "2|zz|zz|1", "1|01020304|" + "00" * 16 + "|1", "2|01020304|00|1"):
        assert session._browser_token(bad) is None


class TestConfig:
    PLAIN = tomllib.loads((ROOT / ".streamlit/config.toml").read_text(encoding="utf-8"))

    def test_every_option_is_known(self):
        def walk(table, path):
            for name, value in table.items():
                if isinstance(value, dict):
                    yield from walk(value, [*path, name])
                else:
                    yield ".".join([*path, name])

        known = set(config._config_options_template)
        assert [option for option in walk(self.PLAIN, []) if option not in known] == []

    def test_it_is_closed_by_default(self):
        assert self.PLAIN["server"]["address"] == "127.0.0.1"
        assert self.PLAIN["server"]["allowedHosts"] == ["localhost", "127.0.0.1"]
        assert self.PLAIN["client"]["showErrorDetails"] == "none"
        assert self.PLAIN["browser"]["gatherUsageStats"] is False

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_the_middle_of_the_diverging_scale_is_the_page(self, theme):
        colors = self.PLAIN["theme"][theme]["chartDivergingColors"]
        assert len(colors) == 10
        page = self.PLAIN["theme"][theme]["backgroundColor"]
        for i in (1, 3, 5):
            middle = (int(colors[4][i : i + 2], 16) + int(colors[5][i : i + 2], 16)) / 2
            assert abs(middle - int(page[i : i + 2], 16)) < 13

    def test_no_font_comes_from_elsewhere(self):
        assert "http" not in (ROOT / ".streamlit/config.toml").read_text(encoding="utf-8")

    def test_the_style_sheet_has_the_colours_of_the_theme(self):
        style = (ROOT / "pages/components/frame.css").read_text(encoding="utf-8")
        for name in ("primaryColor", "backgroundColor"):
            both = ", ".join(self.PLAIN["theme"][theme][name] for theme in ("light", "dark"))
            assert f"light-dark({both})" in style
