"""What all views share: names with parameters, one forward for all of them, frames that keep their contracts."""

from __future__ import annotations

import pandas as pd
import pytest

from mega_core import frames
from mega_core.attribution import VIEWS, look_at, read_view
from mega_core.errors import BadInput, UnknownName
from mega_core.events import silent
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, intervene
from mega_core.records import EditRequest

REQUESTS = (
    EditRequest("France", "The capital of {} is", "Rome", "Paris", neighbours=("The capital of Italy is",)),
    EditRequest("Eiffel Tower", "{} is in the city of", "London"),
)
WITHOUT_PARAMETERS = [view.name for view in VIEWS if not view.knobs()]
WITH_PARAMETERS = [view for view in VIEWS if view.knobs()]


def test_a_view_without_parameters_is_its_name() -> None:
    assert read_view(" module_scores ").text == "module_scores"
    with pytest.raises(BadInput, match="no such parameter"):
        read_view("module_scores?top=3")


@pytest.mark.parametrize("view", WITH_PARAMETERS, ids=lambda view: view.name)
def test_one_question_has_one_text(view) -> None:
    spelled = {knob.name: knob.default for knob in view.knobs()}
    written = "&".join(f"{name}={'none' if value is None else value}" for name, value in reversed(spelled.items()))
    assert read_view(f"{view.name}?{written}").text == view.name == read_view(view.name).text


@pytest.mark.parametrize("text", ["module_score", "", "neuron", "module_scores\x00"])
def test_unknown_views_are_refused(text: str) -> None:
    with pytest.raises(UnknownName):
        read_view(text)


@pytest.mark.parametrize("rest", ["top", "=3", "top=3&top=4", "top=many"])
def test_parameters_that_cannot_be_read_are_refused(rest: str) -> None:
    with pytest.raises(BadInput):
        read_view(f"neurons?{rest}")


@pytest.mark.parametrize("view", list(VIEWS), ids=lambda view: view.name)
def test_every_view_fills_its_frames_on_every_architecture(lm: ModelAdapter, view) -> None:
    (found,) = look_at(lm, [read_view(view.name)], REQUESTS, "before", silent).values()
    assert set(found) == set(view.frames)
    for name, frame in found.items():
        frames.check(frame, name)
        assert set(frame["state"]) <= {"before"}
        assert set(frame["case"]) <= {0, 1}


def test_views_of_one_state_share_one_forward_of_the_prompts(tiny_lm) -> None:
    lm, ran = tiny_lm("gpt2"), []

    def count(value):
        ran.append(len(value))
        return value

    views = [
        read_view(name) for name in ("module_scores", "heads", "neurons", "attention_neurons", "query", "residual")
    ]
    with intervene(lm, {Site(0, "block_in"): count}):
        alone = {}
        for view in views:
            alone |= look_at(lm, [view], REQUESTS, "before", silent)
        assert ran == [2] * len(views)
        ran.clear()
        together = look_at(lm, views, REQUESTS, "before", silent)
    assert ran == [2]
    for text, tables in alone.items():
        for name, frame in tables.items():
            # Reading patterns takes another attention kernel, which rounds otherwise.
            pd.testing.assert_frame_equal(frame, together[text][name], atol=1e-4)
