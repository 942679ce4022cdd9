"""The status page over the frozen service."""

from __future__ import annotations

import re
from dataclasses import replace

from mega_core.errors import Busy
from pages.components import status_check
from pages.components.words import GLOSSARY
from tests.ui.conftest import words
from tests.ui.fake import failed, running
from tests.ui.fakes.checks import FOUND


def numbers(at) -> dict[str, str]:
    frame = next(one.value for one in at.dataframe if "value" in one.value.columns)
    return dict(zip(frame["what"], frame["value"], strict=True))


def test_promises_words_and_limits(visit):
    text = words(visit("status"))
    assert "bit-identical" in text
    assert "Paraphrase" in text
    assert "does not prove cause" in text
    assert "Everything works." in text


def test_notices_are_shown(desk, visit, monkeypatch):
    whole = desk.status()
    monkeypatch.setattr(desk, "status", lambda: replace(whole, notices=("Results aren't being saved.",)))
    text = words(visit("status"))
    assert "Results aren't being saved." in text
    assert "Everything works." not in text


def test_memory_queue_and_cache_in_numbers(visit):
    found = numbers(visit("status"))
    assert found["Memory of this process"] == "512.0 MB"
    assert found["GPU memory, Some GPU"] == "1.00 GB of 80.00 GB"
    assert (found["Running now"], found["Waiting"]) == ("1", "0 of 8")
    assert found["Questions per person at a time"] == "2"
    assert found["Cache"] == "3.3 MB of 1.00 GB"
    assert found["Cache entries"] == "12, on disk"
    assert found["Cache hits since the start"] == "30 of 40 (75%)"
    assert found["Cache entries found damaged"] == "1"


def test_memory_that_is_not_known_is_not_zero(desk, visit, monkeypatch):
    whole = desk.status()
    monkeypatch.setattr(desk, "status", lambda: replace(whole, memory_bytes=0, gpus=()))
    at = visit("status")
    assert numbers(at)["Memory of this process"] == "not known"
    assert not [name for name in numbers(at) if name.startswith("GPU")]


def test_the_words_can_be_searched(visit):
    at = visit("status")
    assert f"{len(GLOSSARY)} of {len(GLOSSARY)} words." in words(at)
    at.text_input(key="status_words").set_value("LEVERAGE").run()
    text = words(at)
    assert "attention has most leverage" in text  # of a meaning, not of a word
    assert text.index("**Leverage**") < text.index("**Region**")
    assert "**Paraphrase**" not in text
    at.text_input(key="status_words").set_value("[x](y) no such word").run()
    assert "No word matches" in words(at)


def test_the_words_of_all_pages_are_there():
    known = "\n".join((*GLOSSARY, *GLOSSARY.values())).casefold()
    for word in (
        "leverage", "region", "over-attention", "stack", "receipt", "protocol", "efficacy", "paraphrase", "neighbour",
        "portability", "key", "value", "query neuron", "value neuron", "mask", "rsr", "gate", "alpha", "transport map",
        "c, d, k",
    ):  # fmt: skip
        assert re.search(rf"\b{word}", known), word


class TestSelfCheck:
    def test_it_starts_and_is_watched(self, desk, visit):
        at = visit("status")
        desk.view = replace(running("e" * 64), kind="check")
        at.button(key="check_start").click().run()
        assert desk.checks.started == [("Draw a picture",)]
        assert "Running for" in words(at)
        assert at.button(key="check_cancel")

    def test_what_it_found_is_told_with_marks(self, desk, visit, monkeypatch):
        at = visit("status")
        desk.view = replace(running("e" * 64), kind="check", state="done")
        monkeypatch.setattr(desk, "result", lambda job_id, owner=None: FOUND)
        at.button(key="check_start").click().run()
        at.run()
        text = words(at)
        assert "✓ Load a model and undo an edit" in text
        assert "✗ Keep a result and read it again" in text
        assert "What was kept did not come back." in text
        assert "1 of 2 failed." in text

    def test_a_full_queue_is_told(self, desk, visit):
        at = visit("status")
        desk.checks.broken = Busy("The queue is full.", "Try again in a minute.")
        at.button(key="check_start").click().run()
        assert "The queue is full." in words(at)

    def test_a_failure_is_told(self, desk, visit):
        at = visit("status")
        desk.view = replace(failed("e" * 64), kind="check")
        at.button(key="check_start").click().run()
        assert "Choose a smaller model." in words(at)

    def test_the_picture_is_really_drawn(self):
        assert re.fullmatch(r"PNG and SVG were drawn, [1-9]\d* KB\.", status_check._picture())
