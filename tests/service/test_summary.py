from dataclasses import replace

import pytest

from mega_core.summary import Count, outcome, percent, verdict
from tests.service.reports import REQUEST, make_report


def test_an_edit_that_works():
    found = outcome(make_report())
    assert found.kind == "works"
    assert (found.paraphrases, found.neighbours) == (Count(2, 2), Count(4, 4))
    assert found.prob_before == pytest.approx(0.01)
    assert found.prob_after == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({"says_new": False}, "fails"),
        ({"says_new": False, "neighbours_kept": 0}, "fails"),
        ({"neighbours_kept": 2}, "leaks"),
        ({"neighbours_kept": 3}, "works"),
        ({"paraphrases": 1}, "narrow"),
        ({"paraphrases": 0, "neighbours_kept": 0}, "leaks"),
    ],
)
def test_the_kind_follows_from_the_counts(facts, kind):
    assert outcome(make_report(**facts)).kind == kind


def test_the_sentence_can_be_checked_against_the_table():
    assert verdict(make_report(neighbours_kept=1, paraphrases=1)) == (
        "Rome is now the most likely answer (1.0 % → 90 %). "
        "1 of 2 paraphrases say so. 3 of 4 neighbour prompts changed."
    )
    assert verdict(make_report(says_new=False)).startswith("The edit did not take: Rome is not the most likely answer")


def test_neighbours_that_said_the_new_object_before_do_not_count_as_changed():
    report = make_report(neighbours_kept=4)
    answers = report.frames["answers"].copy()
    first = (answers["prompt"] == REQUEST.neighbours[0]) & (answers["candidate"] == "new")
    answers.loc[first, "mean_logprob"] = 0.0  # says the new object, before and after
    changed = replace(report, frames={**report.frames, "answers": answers})
    assert outcome(changed).neighbours == Count(3, 3)


def test_without_an_original_object_the_top_answer_decides():
    request = replace(REQUEST, target_true=None)
    found = outcome(make_report(request=request, paraphrases=2, neighbours_kept=3))
    assert (found.knew, outcome(make_report()).knew) == (None, True)
    assert (found.kind, found.neighbours) == ("works", Count(3, 4))


def test_without_other_prompts_nothing_is_said_about_them():
    request = replace(REQUEST, paraphrases=(), neighbours=())
    report = make_report(request=request)
    assert outcome(report).kind == "works"
    assert verdict(report) == "Rome is now the most likely answer (1.0 % → 90 %)."


def test_a_report_without_answers_is_refused():
    report = make_report()
    with pytest.raises(ValueError, match="no answers for case 7"):
        outcome(report, case=7)
    with pytest.raises(ValueError, match="no answers"):
        outcome(replace(report, frames={}))


@pytest.mark.parametrize(
    ("probability", "text"),
    [
        (1.0, "100 %"),
        (0.914, "91 %"),
        (0.052, "5.2 %"),
        (0.002, "0.2 %"),
        (1e-4, "0.01 %"),
        (1e-9, "< 0.01 %"),
        (0.0, "0 %"),
    ],
)
def test_percent(probability, text):
    assert percent(probability) == text
