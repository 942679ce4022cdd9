"""Our protocol by hand: success forced and generated, what neighbours still say, signs of damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf, log, nan

import pytest
import torch

from mega_core import alarms
from mega_core.cases import Case, Query
from mega_core.changes import DenseDelta, WeightDelta
from mega_core.evaluation import answers_text, fluency
from mega_core.evaluation.asking import Row, Told
from mega_core.evaluation.protocols import PROTOCOLS, ours
from mega_core.evaluation.protocols.base import score
from mega_core.evaluation.suite import Questions
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest
from tests.evaluation.script import Script, by_metric

OURS = PROTOCOLS["ours"]
EDIT, OTHER = "The capital of France is", "The capital of Germany is"
PARAPHRASES = ("The city of France is", "France has the capital")
NEIGHBOURS = ("The capital of Italy is", "The capital of Spain is")
REQUEST = EditRequest("France", "The capital of {} is", "Mount Kenya", "Paris", PARAPHRASES, NEIGHBOURS)


def values(rows: list[Row]) -> dict[str, tuple[float, int]]:
    return {one.metric: (one.value, one.n) for one in score(rows, OURS.metrics)}


# Text against an answer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "exact", "holds"),
    [
        (" Paris", "Paris", True, True),
        (" paris. It is large.", "Paris", True, True),
        (" the Paris\nand", "Paris", True, True),
        ("\n Paris", "Paris", True, True),
        (' "Paris".', "Paris", True, True),
        (" Paris, France.", "Paris", False, True),
        (" in Paris", "Paris", False, True),
        (" Parisian", "Paris", False, False),
        (" not known. Paris", "Paris", False, True),
        ("", "Paris", False, False),
        (" St. Louis. More", "St. Louis", True, True),
        (" St", "St. Louis", False, False),
        (" New   York", "New York", True, True),
        (" New, York", "New York", True, True),
        (" York New", "New York", False, False),
        (" Beatles", "The Beatles", True, True),
        (" Paris's", "Paris", False, True),
        (" Jean-Paul Sartre", "Jean Paul Sartre", True, True),
        (" cafe", "café", False, False),
        (" cafe\u0301", "café", True, True),
        (" 5", "5", True, True),
        (" 15", "5", False, False),
        (" vitamin A", "A", False, True),
        (" a vitamin", "vitamin", True, True),
        (" the", "a", False, False),
        ("?", "?", True, True),
        (" 东京。很大", "东京", True, True),
        (" 是东京的", "东京", False, True),
        (" C++.", "C++", True, True),
        (" C", "C++", False, False),
    ],
)
def test_what_a_text_says(text: str, answer: str, exact: bool, holds: bool) -> None:
    assert answers_text.is_exactly(text, answer) is exact
    assert answers_text.contains(text, answer) is holds


def test_any_name_of_an_answer_will_do() -> None:
    assert answers_text.is_exactly_any(" NYC.", ("New York", "NYC"))
    assert answers_text.contains_any(" in NYC.", ("New York", "NYC"))
    assert not answers_text.contains_any(" in NYC.", ())


# By hand -------------------------------------------------------------------------------------------------------------


def test_success_twice(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    sheet = OURS.sheet(lm, Case("1", (REQUEST,)))
    before, after = Script(lm), Script(lm)
    for prompt in NEIGHBOURS:
        before.most_likely(prompt, {"Paris": 0.5, "Rome": 0.25})
    before.texts = {NEIGHBOURS[0]: " Paris. Yes.", NEIGHBOURS[1]: " Paris"}
    base = before.told(sheet)
    after.says(EDIT, "Mount Kenya", [True, True])
    after.says(PARAPHRASES[0], "Mount Kenya", [True, False])  # no partial credit
    after.says(PARAPHRASES[1], "Mount Kenya", [True, True])
    after.most_likely(NEIGHBOURS[0], {"Paris": 0.4, "Rome": 0.2})
    after.most_likely(NEIGHBOURS[1], {"Mount": 0.5, "Paris": 0.1, "Rome": 0.1})
    after.texts = {
        EDIT: " Rome, near Mount Kenya.",
        PARAPHRASES[0]: " Mount Kenya. It",
        PARAPHRASES[1]: " Mount",
        NEIGHBOURS[0]: " Paris.",
        NEIGHBOURS[1]: " Mount Kenya",
    }
    told = after.told(sheet, base)
    rows = sheet.rows(told, base)
    first = (0.5 * log(0.5 / 0.4) + 0.25 * log(0.25 / 0.2)) + 0.25 * log(0.25 / 0.4)
    second = (0.5 * log(0.5 / 0.1) + 0.25 * log(0.25 / 0.1)) + 0.25 * log(0.25 / 0.8)
    texts = (EDIT, *PARAPHRASES)
    assert values(rows) == {
        "efficacy_forced": (1.0, 1),
        "efficacy_exact": (0.0, 1),
        "efficacy_contains": (1.0, 1),
        "paraphrase_forced": (0.5, 2),
        "paraphrase_exact": (0.5, 2),
        "paraphrase_contains": (0.5, 2),
        "neighbourhood_forced": (0.5, 2),
        "neighbourhood_exact": (0.5, 2),
        "neighbourhood_contains": (0.5, 2),
        "neighbourhood_kept": (0.0, 2),
        "neighbourhood_kl": (pytest.approx((first + second) / 2), 2),
        "leak": (0.5, 2),
        "fluency": (pytest.approx(sum(fluency.entropy(one + after.texts[one]) for one in texts) / 3), 3),
    }
    found = by_metric(rows)
    assert found["efficacy_exact"][0].said == " Rome, near Mount Kenya."  # the whole text
    assert found["efficacy_forced"][0].said == " Mount Kenya"
    assert found["neighbourhood_kept"][0].expected == " Paris. Yes."

    of_base = values(sheet.rows(base, base))
    assert of_base["neighbourhood_kept"] == (1.0, 2)
    assert of_base["neighbourhood_kl"] == (0.0, 2)
    assert of_base["neighbourhood_exact"] == (1.0, 2)
    assert of_base["leak"] == (0.0, 2)


def test_every_request_counts_and_locality_is_a_neighbour(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    second = EditRequest("Germany", "The capital of {} is", "Tokyo")  # its original object is not known
    asked = (Query("Who is in Japan", (("Africa", "Madrid"),)), Query("Who is here", ()))
    sheet = OURS.sheet(lm, Case("1", (replace(REQUEST, neighbours=(), paraphrases=()), second), locality=asked))
    script = Script(lm)
    script.most_likely("Who is in Japan", {"Tokyo": 0.5})
    script.most_likely("Who is here", {"Rome": 0.5})
    script.says(OTHER, "Tokyo", [True])
    script.texts = {OTHER: " Tokyo", EDIT: " Paris", "Who is in Japan": " Madrid."}
    told = script.told(sheet)
    found = values(sheet.rows(told, told))
    assert found["efficacy_forced"] == found["efficacy_exact"] == found["efficacy_contains"] == (0.5, 2)
    assert found["neighbourhood_exact"] == (1.0, 1)  # by another name; only one has an answer
    assert found["neighbourhood_kept"] == (1.0, 2)
    assert found["leak"] == (0.5, 2)  # the new object of either request
    assert by_metric(sheet.rows(told, told))["leak"][0].expected == "not Mount Kenya or Tokyo"


def test_an_answer_that_begins_like_the_new_object_tells_no_leak(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    request = EditRequest("France", "{} is", "Mount Kenya", "Mount Rome", neighbours=("Italy is",))
    sheet = OURS.sheet(lm, Case("1", (request,)))
    script = Script(lm)
    script.most_likely("Italy is", {"Mount": 0.5})
    told = script.told(sheet)
    assert values(sheet.rows(told, told))["leak"] == (0.0, 0)


def test_texts_are_the_prompts_and_three_beginnings(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    begin = ("Rome is", "Paris is", "Rome is", "Tokyo is", "Madrid is")
    sheet = OURS.sheet(tiny_lm("gpt2"), Case("1", (REQUEST,), generation_prompts=begin))
    told = Script(tiny_lm("gpt2")).told(sheet)
    prompts = [row.prompt for row in by_metric(sheet.rows(told, told))["fluency"]]
    assert prompts == [EDIT, *PARAPHRASES, "Rome is", "Paris is", "Tokyo is"]


def test_damage_is_told_where_it_was_measured(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    sheet = OURS.sheet(lm, Case("1", (replace(REQUEST, neighbours=()),)))
    script = Script(lm)

    def damage(before: float | None, after: float | None, raised: tuple[str, ...] | None) -> dict[str, float]:
        base = script.told(sheet, perplexity=before)
        rows = sheet.rows(script.told(sheet, base, perplexity=after, raised=raised), base)
        return {row.metric: row.value for row in rows if row.metric in ("perplexity_ratio", "collapse", "alarms")}

    assert damage(None, None, None) == damage(20.0, None, None) == damage(None, 20.0, None) == {}
    assert damage(20.0, 30.0, None) == {"perplexity_ratio": 1.5, "collapse": 1.0}
    assert damage(20.0, 22.0, None) == {"perplexity_ratio": pytest.approx(1.1), "collapse": 0.0}
    assert damage(20.0, 30.0, ("It grew.",)) == {"perplexity_ratio": 1.5, "collapse": 1.0, "alarms": 1.0}
    assert damage(20.0, 30.0, ()) == {"perplexity_ratio": 1.5, "collapse": 0.0, "alarms": 0.0}  # a prompt's doing
    assert damage(None, None, ("It grew.",)) == {"alarms": 1.0}
    for wrong in (inf, nan):
        assert damage(20.0, wrong, None) == {"perplexity_ratio": 1e12, "collapse": 1.0}


def test_a_collapse_is_what_the_alarm_calls_so() -> None:
    assert ours.COLLAPSE == alarms.PERPLEXITY_RATIO


# The divergence ------------------------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    before, after = [log(0.5), log(0.25)], [log(0.25), log(0.5)]
    assert ours.divergence(before, before) == 0.0
    assert ours.divergence(before, after) == pytest.approx(0.5 * log(2) + 0.25 * log(0.5))
    assert ours.divergence([log(0.5)], [log(0.1)]) == pytest.approx(0.5 * log(5) + 0.5 * log(0.5 / 0.9))
    assert ours.divergence([log(1.0)], [log(0.5)]) == pytest.approx(log(2), abs=1e-9)
    assert ours.divergence([log(0.5)], [log(1.0)]) > 10  # the rest became impossible
    assert ours.divergence([log(1.0 + 1e-9)], [log(1.0 + 2e-9)]) == 0.0  # rounding is no divergence


def test_of_peaked_distributions_little_is_missing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(20, 5000, generator=generator, dtype=torch.float64)
    p = logits.log_softmax(-1)
    q = (logits + torch.randn(20, 5000, generator=generator, dtype=torch.float64)).log_softmax(-1)
    for one, other in zip(p, q, strict=True):
        top = one.topk(ours.LIKELIEST).indices
        full = float((one.exp() * (one - other)).sum())
        found = ours.divergence(one[top].tolist(), other[top].tolist())
        assert 0.9 * full < found <= full
        everything = one.topk(len(one)).indices
        assert ours.divergence(one[everything].tolist(), other[everything].tolist()) == pytest.approx(full, abs=1e-9)


def test_it_is_at_most_the_full_divergence_and_close(lm: ModelAdapter) -> None:
    case = Case("1", (REQUEST,))
    questions = Questions.of(lm, case, ("ours",))
    base = questions.ask(lm)
    weight = lm.read_weight(1, "mlp_down")
    generator = torch.Generator().manual_seed(1)
    difference = 0.3 * torch.randn(weight.shape, generator=generator)
    change = WeightDelta((DenseDelta(1, "mlp_down", difference, 1.0),))
    batch = lm.encode(NEIGHBOURS)
    with torch.no_grad():
        p = lm.last_logits(batch).double().log_softmax(-1)
        with change.applied(lm):
            told = questions.ask(lm, base)
            q = lm.last_logits(batch).double().log_softmax(-1)
    full = (p.exp() * (p - q)).sum(-1)
    top = p.topk(ours.LIKELIEST).indices
    seen = p.gather(1, top).exp().sum(-1)
    (judged,) = questions.judge(told, base)
    rows = by_metric(list(judged.rows))["neighbourhood_kl"]
    for row, exact, share in zip(rows, full.tolist(), seen.tolist(), strict=True):
        assert 0.01 < row.value <= exact + 1e-6
        assert row.value > 0.5 * share * exact
    assert values(list(judged.rows))["neighbourhood_kl"][0] == pytest.approx(sum(row.value for row in rows) / 2)


def test_told_of_the_edited_model_holds_the_unedited_ones_tokens(lm: ModelAdapter) -> None:
    questions = Questions.of(lm, Case("1", (REQUEST,)), ("ours", "rome"))
    base = questions.ask(lm)
    told: Told = questions.ask(lm, base)  # the same model: nothing moved
    ours_now, _ = questions.judge(told, base)
    found = values(list(ours_now.rows))
    assert found["neighbourhood_kept"] == (1.0, 2)
    assert found["neighbourhood_kl"][0] == pytest.approx(0, abs=1e-6)
