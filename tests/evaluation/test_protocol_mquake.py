from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mega_core.cases import Case, Chain, Hop
from mega_core.changes import PromptPrefix
from mega_core.datasets import builtin, mquake
from mega_core.embedded import examples
from mega_core.evaluation import asking, multihop, suite
from mega_core.evaluation.asking import Row, Told
from mega_core.evaluation.multihop import broke_at, framed, gives
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.evaluation.protocols.base import summarise
from mega_core.evaluation.protocols.mquake import Sheet
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest
from tests.evaluation.scripted import contexts_of, told_by, wanted_by

MQUAKE = PROTOCOLS["mquake"]
EDIT = EditRequest("Ada", "{} works for", "Orrin Works", "Bray")
WORKS = Hop("Whom does Ada work for?", "Ada works for", ("Bray",))
WORKS_NOW = Hop("Whom does Ada work for?", "Ada works for", ("Orrin Works", "Orrin"))
BRAY = Hop("Where is Bray?", "Bray is in", ("Velm",))
ORRIN = Hop("Where is Orrin Works?", "Orrin Works is in", ("Tarn", "Tarn-on-Sea"))
COUNTRY = Hop("Where is Tarn?", "Tarn is a town of", ("Lund",))
FORMS = ("The town of Ada's employer is", "Ada's firm has its office in", "Ada goes to work in")
CHAIN = Chain(FORMS, (WORKS, BRAY), (WORKS_NOW, ORRIN), ("Velm",), ("Tarn", "Tarn-on-Sea"))
CASE = Case("3", (EDIT,), chains=(CHAIN,))
KNOWS = {"Ada works for": "Bray", "Bray is in": "Velm"}
HELD = {"Ada works for": "Orrin Works", "Orrin Works is in": "Tarn"}
ALL_NEW = dict.fromkeys(FORMS, " Tarn.")


def judge(
    lm: ModelAdapter,
    says: dict[str, str],
    texts: dict[str, str],
    base: dict[str, str] | None = None,
    case: Case = CASE,
) -> suite.Judged:
    sheet = Sheet(lm, case)
    before = told_by(lm, sheet, KNOWS if base is None else base)
    (judged,) = suite.Questions((("mquake", sheet),)).judge(told_by(lm, sheet, says, texts, before), before)
    return judged


def scores(judged: suite.Judged) -> dict[str, tuple[float, int]]:
    return {one.metric: (one.value, one.n) for one in judged.scores}


@pytest.fixture
def small(tiny_lm: Callable[[str], ModelAdapter]) -> ModelAdapter:
    return tiny_lm("gpt2")


# What is given -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names", "others", "expected"),
    [
        (" Tarn.", ("Tarn",), (), True),
        (" the town of tarn", ("Tarn",), (), True),
        (" Tarnow", ("Tarn",), (), False),
        (" Velm\nQ: Tarn?", ("Tarn",), (), False),
        ("\n\n Tarn", ("Tarn",), (), True),
        (" TOS", ("Tarn", "TOS"), (), True),
        (" association football", ("football",), ("association football",), False),
        (" football", ("football",), ("association football",), True),
        (" association football", ("association football",), ("football",), True),
        (" football", ("football",), ("Football", "soccer"), True),
        ("", ("Tarn",), (), False),
    ],
)
def test_gives(text: str, names: tuple[str, ...], others: tuple[str, ...], expected: bool) -> None:
    assert gives(text, names, others) is expected


def test_questions_stand_behind_demonstrations_and_beginnings_as_they_are() -> None:
    assert framed(FORMS[0]) == FORMS[0]
    asked = framed("Where does Ada work? ")
    assert asked == framed("Where does Ada work? ", "few_shot")
    assert asked.endswith("\nQ: Where does Ada work? \nA:")
    assert asked.count("Q: ") == asked.count("A:") == len(multihop.DEMONSTRATIONS) + 1
    assert framed("Where does Ada work?", "plain") == "Where does Ada work?"
    assert framed(FORMS[0], "few_shot").endswith(f"Q: {FORMS[0]}\nA:")


@pytest.mark.parametrize(
    ("recalled", "answered", "expected"),
    [
        ((True, True, True), True, None),
        ((True, True, True), False, "composition"),
        ((False, True, True), False, 0),
        ((True, False, True), False, 1),
        ((True, True, False), False, 2),
        ((False, False, False), False, 0),
        ((True, False, False), True, 1),
    ],
)
def test_broke_at(recalled: tuple[bool, ...], answered: bool, expected: object) -> None:
    assert broke_at(recalled, answered) == expected


# Scores --------------------------------------------------------------------------------------------------------------


def test_a_chain_that_holds(small: ModelAdapter) -> None:
    assert scores(judge(small, HELD, ALL_NEW)) == {
        "edit": (1, 1), "edit_first": (1, 1), "hop": (1, 2), "hop_first": (1, 2), "instance": (1, 1),
        "instance_first": (1, 1), "multihop": (1, 1), "multihop_strict": (1, 1), "multihop_known": (1, 1),
        "composition": (1, 1), "old_answer": (0, 1),
    }  # fmt: skip


def test_nothing_said_is_nothing_recalled(small: ModelAdapter) -> None:
    assert scores(judge(small, {}, {}, base={})) == {
        "edit": (0, 1), "edit_first": (0, 1), "hop": (0, 2), "hop_first": (0, 2), "instance": (0, 1),
        "instance_first": (0, 1), "multihop": (0, 1), "multihop_strict": (0, 1), "composition": (0, 0),
        "old_answer": (0, 1),
    }  # fmt: skip


@pytest.mark.parametrize("form", range(3))
def test_any_of_three_and_all_of_three(small: ModelAdapter, form: int) -> None:
    texts = dict.fromkeys(FORMS, " Velm") | {FORMS[form]: " it is Tarn-on-Sea"}
    found = scores(judge(small, HELD, texts))
    assert (found["multihop"], found["multihop_strict"], found["old_answer"]) == ((1, 1), (0, 1), (1, 1))
    none = scores(judge(small, HELD, dict.fromkeys(FORMS, " Velm")))
    assert (none["multihop"], none["composition"], none["old_answer"]) == ((0, 1), (0, 1), (1, 1))


def test_a_hop_is_recalled_whole_or_begun_by_any_of_its_names(small: ModelAdapter) -> None:
    alias = scores(judge(small, HELD | {"Ada works for": "Orrin", "Orrin Works is in": "Tarn-on-Sea"}, ALL_NEW))
    assert (alias["edit"], alias["hop"], alias["instance"]) == ((1, 1), (1, 2), (1, 1))
    long = replace(CASE, chains=(replace(CHAIN, new_hops=(replace(WORKS_NOW, answers=("Orrin Works",)), ORRIN)),))
    begun = judge(small, HELD | {"Ada works for": "Orrin Tarn"}, ALL_NEW, case=long)
    found = scores(begun)
    assert (found["edit"], found["edit_first"]) == ((0, 1), (1, 1))
    assert (found["hop"], found["hop_first"]) == ((0.5, 2), (1, 2))
    assert (found["instance"], found["instance_first"]) == ((0, 1), (1, 1))
    assert found["composition"] == (0, 0)
    said = next(row.said for row in begun.rows if row.metric == "hop")
    assert said.startswith("Orrin")
    assert said != "Orrin Works"


def test_known_chains_are_those_whose_old_hops_the_unedited_model_recalls(small: ModelAdapter) -> None:
    assert scores(judge(small, HELD, {}))["multihop_known"] == (0, 1)
    assert "multihop_known" not in scores(judge(small, HELD, ALL_NEW, base=KNOWS | {"Bray is in": "Tarn"}))
    # Of the edited model the old hops are not asked.
    sheet = Sheet(small, CASE)
    before, after = wanted_by(sheet), wanted_by(sheet, told_by(small, sheet, KNOWS))
    assert contexts_of(small, "Bray is in") <= set(before.tokens) - set(after.tokens)
    assert contexts_of(small, "Ada works for", "Orrin Works is in") <= set(after.tokens)
    assert not contexts_of(small, "Bray is in") & set(after.tokens)
    assert set(before.texts) == set(after.texts) == set(FORMS)
    unknown = scores(judge(small, HELD, ALL_NEW, case=replace(CASE, chains=(replace(CHAIN, hops=()),))))
    assert "multihop_known" not in unknown


def test_means_over_chains_then_over_cases(small: ModelAdapter) -> None:
    other = replace(CHAIN, questions=("Ada's boss sits in",))
    two = judge(small, HELD, ALL_NEW, case=replace(CASE, chains=(CHAIN, other, other)))
    assert scores(two)["multihop"] == (pytest.approx(1 / 3), 3)
    means = {one.metric: (one.value, one.n) for one in summarise(MQUAKE, [two.scores, judge(small, {}, {}).scores], 10)}
    assert means["multihop"] == (pytest.approx(1 / 6), 2)
    assert means["composition"] == (pytest.approx(1 / 3), 1)  # only where every hop is recalled
    assert means["instance"] == (0.5, 2)


def test_questions_are_asked_in_the_frame_that_suits_them(small: ModelAdapter) -> None:
    asked = replace(CASE, chains=(replace(CHAIN, questions=("Where does Ada work?", FORMS[0])),))
    assert set(wanted_by(Sheet(small, asked)).texts) == {framed("Where does Ada work?", "few_shot"), FORMS[0]}
    assert set(wanted_by(Sheet(small, asked, "plain")).texts) == {"Where does Ada work?", FORMS[0]}
    judged = judge(small, HELD, {framed("Where does Ada work?"): " Tarn\nQ: more"}, case=asked)
    row = next(row for row in judged.rows if row.metric == "multihop")
    assert (row.prompt, row.said, row.value) == ("Where does Ada work?", "Tarn", 1)
    assert MQUAKE.needs(CASE) is None
    assert MQUAKE.needs(Case("1", (EDIT,))) is not None


# Tables --------------------------------------------------------------------------------------------------------------

LONG = Chain(FORMS, (WORKS, BRAY), (WORKS_NOW, ORRIN, COUNTRY), ("Velm",), ("Lund",))
LONG_CASE = Case("4", (EDIT, EditRequest("Bo", "{} lives in", "Tarn", "Velm")), chains=(LONG,))


@pytest.mark.parametrize(
    ("gone", "texts", "expected"),
    [
        ("Ada works for", {}, "hop 1"),
        ("Orrin Works is in", {}, "hop 2"),
        ("Tarn is a town of", {}, "hop 3"),
        ("Tarn is a town of", {FORMS[1]: " Lund"}, "hop 3"),
        ("", {}, "composition"),
        ("", {FORMS[1]: " Lund"}, ""),
    ],
)
def test_where_a_chain_broke(small: ModelAdapter, gone: str, texts: dict[str, str], expected: str) -> None:
    says = {prompt: text for prompt, text in (HELD | {"Tarn is a town of": "Lund"}).items() if prompt != gone}
    judged = judge(small, says, texts, case=LONG_CASE)
    (chain,) = multihop.chains({"4": judged.rows}).to_dict("records")
    assert chain == {
        "case": "4", "chain": 1, "hops": 3, "edits": 2, "recalled": len(says), "answered": bool(texts),
        "strict": False, "old_answer": False, "known": True, "broke_at": expected,
    }  # fmt: skip
    hops = multihop.broken({"4": judged.rows})
    assert list(hops["recalled"]) == [prompt != gone for prompt in hops["prompt"]]
    assert list(hops["prompt"]) == ["Ada works for", "Orrin Works is in", "Tarn is a town of"]
    assert list(hops["expected"]) == ["Orrin Works", "Tarn", "Lund"]
    assert list(hops["hop"]) == [1, 2, 3]
    assert all(hops["said"][hops["recalled"]] == hops["expected"][hops["recalled"]])


def test_by_the_number_of_hops_and_of_edits(small: ModelAdapter) -> None:
    rows = {
        "1": judge(small, HELD, ALL_NEW).rows,
        "2": judge(small, HELD, dict.fromkeys(FORMS, " Velm")).rows,
        "3": judge(small, HELD, {FORMS[0]: " Lund"}, case=LONG_CASE).rows,
    }
    table = multihop.by_size(rows)
    found = {(row.hops, row.edits, row.metric): (row.value, row.n) for row in table.itertuples()}
    assert found[2, 1, "multihop"] == (0.5, 2)
    assert found[2, 1, "composition"] == (0.5, 2)
    assert found[2, 0, "instance"] == (1, 2)
    assert found[3, 2, "hop"] == (pytest.approx(2 / 3), 1)
    assert found[3, 2, "instance"] == (0, 1)
    assert (3, 2, "composition") not in found
    assert found[0, 0, "multihop"] == (pytest.approx(2 / 3), 3)
    assert found[0, 0, "multihop_strict"] == (pytest.approx(1 / 3), 3)
    assert found[0, 1, "old_answer"] == (0.5, 2)
    assert not {(hops, edits) for hops, edits, _ in found} - {(h, e) for h in (0, 2, 3) for e in (0, 1, 2)}
    assert (2, 2, "multihop") not in found
    assert multihop.by_size({}).empty


def test_several_chains_of_a_case_are_told_apart(small: ModelAdapter) -> None:
    case = replace(CASE, chains=(CHAIN, replace(LONG, questions=("Ada's country is",))))
    rows = {"9": judge(small, HELD, {FORMS[2]: " Tarn", "Ada's country is": " Velm"}, case=case).rows}
    table = multihop.chains(rows)
    assert list(table["chain"]) == [1, 2]
    assert list(table["hops"]) == [2, 3]
    assert list(table["broke_at"]) == ["", "hop 3"]
    assert list(table["old_answer"]) == [False, True]
    assert list(multihop.broken(rows)["chain"]) == [1, 1, 2, 2, 2]


def test_only_known_chains_count_as_known(small: ModelAdapter) -> None:
    rows = {
        "1": judge(small, HELD, ALL_NEW, base={}).rows,
        "2": judge(small, HELD, dict.fromkeys(FORMS, " Velm")).rows,
    }
    table = multihop.by_size(rows)
    found = {row.metric: (row.value, row.n) for row in table[(table["hops"] == 2) & (table["edits"] == 1)].itertuples()}
    assert (found["multihop"], found["multihop_known"]) == ((0.5, 2), (0, 1))
    assert list(multihop.chains(rows)["known"]) == [False, True]


def test_rows_without_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="chain 0 of case 7"):
        multihop.broken({"7": [Row("hop", "a", "b", "c", 1.0)]})


# With a model --------------------------------------------------------------------------------------------------------


def same(one: Told, other: Told) -> None:
    assert one.texts == other.texts
    assert set(one.next) == set(other.next)
    for context, found in one.next.items():
        assert found.logprob == pytest.approx(other.next[context].logprob, abs=1e-4)


def test_batches_and_padding_do_not_matter(lm: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    from mega_core.evaluation import looks

    monkeypatch.setattr(asking, "NEW_TOKENS", 4)
    cases = [CASE, LONG_CASE, builtin.case_of(next(iter(examples.reported(1))), 1)]
    for case in cases:
        questions = suite.Questions.of(lm, case, ["mquake"])
        together = questions.ask(lm)
        with monkeypatch.context() as patch:
            patch.setattr(looks, "TOKENS_AT_ONCE", 1)
            patch.setattr(looks, "ROWS_GENERATED_AT_ONCE", 1)
            same(questions.ask(lm), together)


def test_the_sample_runs_end_to_end(
    tiny_lm: Callable[[str], ModelAdapter], shared_data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "NEW_TOKENS", 4)
    monkeypatch.setattr(multihop, "DEMONSTRATIONS", multihop.DEMONSTRATIONS[:1])  # the tiny models read 256 tokens
    lm = tiny_lm("llama")
    records = json.loads(shared_data("mquake_sample.json").read_text(encoding="utf-8"))
    rows = {}
    for number, record in enumerate(records[:4], 1):
        case = mquake.case(record, number)
        questions = suite.Questions.of(lm, case, ["mquake"])
        base = questions.ask(lm)
        with PromptPrefix("Tarn. ").applied(lm):
            told = questions.ask(lm, base)
        (judged,) = questions.judge(told, base)
        rows[case.id] = judged.rows
        assert {row.metric for row in judged.rows} == {metric.name for metric in MQUAKE.metrics}
    sizes = multihop.by_size(rows)
    assert set(zip(sizes["hops"], sizes["edits"], strict=True)) == {(0, 0), (0, 4), (4, 0), (4, 4)}
    assert len(multihop.chains(rows)) == 4
    assert len(multihop.broken(rows)) == 16


def test_every_sample_edit_is_a_hop_of_its_new_chain(shared_data: Callable[[str], Path], small: ModelAdapter) -> None:
    """So that edit-wise success knows the other names of what is edited in."""
    records = json.loads(shared_data("mquake_sample.json").read_text(encoding="utf-8"))
    case = mquake.case(records[0], 1)
    sheet = Sheet(small, case, "plain")
    named = {hop.cloze: hop.answers for hop in case.chains[0].new_hops}
    assert [len(edit.read.accept) for edit in sheet.edits] == [len(named[edit.prompt]) for edit in sheet.edits]
    assert all(len(tokens.prompt_ids(small.tokenizer, edit.prompt)) for edit in sheet.edits)
