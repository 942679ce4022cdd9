"""EasyEdit's token accuracies by hand, partial credit included."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mega_core.cases import Case, Query
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.evaluation.protocols.base import score
from mega_core.evaluation.suite import Questions
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest
from tests.evaluation.script import Script, by_metric

EASYEDIT = PROTOCOLS["easyedit"]
THREE = "Mount Kenya Rome"  # three tokens
REQUEST = EditRequest(
    "France",
    "The capital of {} is",
    THREE,
    "Marie Curie",  # two tokens
    paraphrases=("The city of France is", "France has the capital"),
    neighbours=("The capital of Italy is",),
)
CASE = Case(
    "1",
    (REQUEST,),
    locality=(Query("Japan is in", (("Africa", "Tokyo"),), "nq"), Query("Who is", ())),
    portability=(Query("France speaks", (("Madrid",), ("Berlin", "Rome"))),),
)


def test_by_hand(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    sheet = EASYEDIT.sheet(lm, CASE)
    before, after = Script(lm), Script(lm)
    before.says("The capital of Italy is", "Marie Curie", [True, False])
    before.says("Japan is in", "Africa", [False])
    before.says("France speaks", "Madrid", [True])
    base = before.told(sheet)
    after.says("The capital of France is", THREE, [False, True, False])
    after.says("The city of France is", THREE, [True, True, False])
    after.says("France has the capital", THREE, [True, True, True])
    after.says("The capital of Italy is", "Marie Curie", [True, True])  # right now, but not what it was
    after.says("Japan is in", "Africa", [True])  # right now, and not what it was
    after.says("France speaks", "Berlin", [True])
    told = after.told(sheet, base)

    rows = sheet.rows(told, base)
    found = {one.metric: (one.value, one.n) for one in score(rows, EASYEDIT.metrics)}
    assert found == {
        "rewrite_acc": (pytest.approx(1 / 3), 1),  # the .33 case
        "rephrase_acc": (pytest.approx((2 / 3 + 1) / 2), 2),
        "locality_acc": (pytest.approx((1 / 2 + 0) / 2), 2),
        "portability_acc": (pytest.approx(1 / 2), 2),  # Madrid is not said any more, Berlin is
    }
    local = by_metric(rows)["locality_acc"]
    assert [row.prompt for row in local] == ["neighborhood: The capital of Italy is", "nq: Japan is in"]
    assert local[0].said == " Marie Curie"
    assert local[0].expected.endswith("(asked: Marie Curie)")
    assert [row.expected for row in by_metric(rows)["portability_acc"]] == ["Madrid", "Berlin"]

    of_base = {one.metric: one.value for one in score(sheet.rows(base, base), EASYEDIT.metrics)}
    assert of_base["locality_acc"] == 1.0  # whatever it said
    assert of_base["rewrite_acc"] == 0.0


def test_neighbours_need_the_original_object(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    request = EditRequest("France", "{} is", "Rome", neighbours=("Italy is",))
    sheet = EASYEDIT.sheet(tiny_lm("gpt2"), Case("1", (request,)))
    told = Script(tiny_lm("gpt2")).told(sheet)
    assert set(by_metric(sheet.rows(told, told))) == {"rewrite_acc"}


def test_on_a_model_the_share_is_of_its_argmax(lm: ModelAdapter) -> None:
    greedy = lm.generate([REQUEST.prompt], 3)[0]
    case = Case("1", (EditRequest("France", "The capital of {} is", greedy.strip() or "x"),))
    questions = Questions.of(lm, case, ("easyedit",))
    told = questions.ask(lm)
    (judged,) = questions.judge(told, told)
    row = tokens.with_target(lm.tokenizer, REQUEST.prompt, case.request.target_new)
    logits = lm.logits(tokens.pack(lm.tokenizer, [row.ids]))[0].argmax(-1).tolist()
    hits = [logits[place - 1] == row.ids[place] for place in range(row.target_start, len(row.ids))]
    assert judged.scores[0].value == pytest.approx(sum(hits) / len(hits))
