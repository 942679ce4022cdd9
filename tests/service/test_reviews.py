"""Failure review without a model: queues, labels, files, and agreement against tables computed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from mega_core.errors import BadInput, UnknownName
from mega_core.notebook import Notebook, Opinion, ReviewLabel, Run
from mega_core.service.reviews import (
    MAX_IMPORT_BYTES,
    ME,
    Case,
    Reviews,
    agreement,
    cohen_kappa,
    lines,
    matching,
    progress,
    read_lines,
    reviewers,
    rows,
)

NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)


def digest(i: int) -> str:
    return f"{i:064x}"


def a_run(i: int, session: str = "ann") -> Run:
    return Run(
        digest(i), session, "atlas-gpt2", "rome" if i % 2 else "emmet", f"Tower {i}", "{} is in", "Rome", "Paris",
        verdict="fails" if i == 3 else "works", created=NOON - timedelta(minutes=i),
    )  # fmt: skip


def case(i: int, **said: Opinion) -> Case:
    return Case(a_run(i), {name: ReviewLabel(digest(i), name, one, NOON) for name, one in said.items()})


@pytest.fixture
def desk() -> Iterator[Reviews]:
    """Three runs of ann's."""
    book = Notebook.open(":memory:")
    for i in (1, 2, 3):
        book.add_run(a_run(i))
    yield Reviews(SimpleNamespace(notebook=book))  # type: ignore[arg-type]
    book.close()


def test_the_own_queue_needs_no_setting_up_and_is_the_history(desk: Reviews) -> None:
    assert [c.run.digest for c in desk.cases("", "ann")] == [digest(1), digest(2), digest(3)]
    assert desk.cases("", "bob") == ()
    said = Opinion("fails", "other", 2, ("b", "a"), "look here")
    assert desk.label("", "ann", digest(2), ME, said) == Opinion()
    assert desk.cases("", "ann")[1].said(ME) == replace(said, tags=("a", "b"))
    entry = desk._core.notebook.get(digest(2))
    assert entry is not None
    assert [(v.author, v.verdict, v.failure, v.severity) for v in entry.verdicts] == [("ann", "fails", "other", 2)]
    assert [(n.author, n.text) for n in entry.notes] == [("ann", "look here")]
    before = desk.label("", "ann", digest(2), ME, Opinion(failure="partial"))
    assert before == replace(said, tags=("a", "b"))
    assert desk.said("", "ann", digest(2), ME) == Opinion(failure="partial")
    desk.label("", "ann", digest(2), ME, before)  # undo
    assert desk.said("", "ann", digest(2), ME) == before
    desk._core.notebook.add_run(a_run(2, "bob"))
    assert desk.cases("", "bob")[0].labels == {}  # who has asked the same question sees nothing of it
    assert desk.said("", "bob", digest(2), ME) == Opinion()
    desk.label("", "ann", digest(2), ME, Opinion())
    assert desk.cases("", "ann")[1].labels == {}


def test_a_shared_queue_keeps_reviewers_apart(desk: Reviews) -> None:
    queue = desk.create("March", "ann", [digest(3), digest(1)])
    assert len(queue.token) >= 22
    assert desk.create("March", "ann", [digest(1)]).token != queue.token
    desk.label(queue.token, "bob", digest(1), "Bob", Opinion("fails"))
    desk.label(queue.token, "cat", digest(1), "Cat", Opinion("works", note="fine"))
    first, second = desk.cases(queue.token, "anybody")
    assert (first.run.digest, first.labels) == (digest(3), {})
    assert (second.said("Bob"), second.said("Cat")) == (Opinion("fails"), Opinion("works", note="fine"))
    assert reviewers((first, second)) == ("Bob", "Cat")
    assert desk.said("", "ann", digest(1), ME) == Opinion()  # the owner's own history is untouched
    with pytest.raises(UnknownName):
        desk.label(queue.token, "bob", digest(2), "Bob", Opinion("fails"))
    assert not desk.delete(queue.token, "bob")
    assert desk.delete(queue.token, "ann")
    for call in (
        lambda: desk.cases(queue.token, "ann"),
        lambda: desk.label(queue.token, "ann", digest(1), "A", Opinion("works")),
        lambda: desk.take_in(queue.token, b""),
        lambda: desk.queue("' OR 1=1 --"),
    ):
        with pytest.raises(BadInput, match="none at this link"):
            call()


def test_filters_and_progress() -> None:
    cases = (
        case(1, ann=Opinion("works", tags=("odd",))),
        case(2, ann=Opinion(note="later"), bob=Opinion("fails")),
        case(3, ann=Opinion(failure="other")),
    )

    def found(**filters: object) -> list[int]:
        return [int(c.run.digest, 16) for c in matching(cases, "ann", **filters)]  # type: ignore[arg-type]

    assert found() == [1, 2, 3]
    assert found(text="TOWER 2") == [2]
    assert found(text="paris nowhere") == []
    assert found(method="rome") == [1, 3]
    assert found(model="other") == []
    assert found(measured="fails") == [3]
    assert found(verdict="works") == [1]
    assert found(verdict="fails") == []  # bob's
    assert found(tag="odd") == [1]
    assert found(unreviewed=True) == [2]
    assert str(progress(cases, "ann")) == "2 of 3"
    assert str(progress(cases, "bob")) == "1 of 3"


def test_kappa_of_tables_computed_by_hand() -> None:
    # Fifty applications, Wikipedia's example: p_o = 35 / 50, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa = 0.4.
    assert cohen_kappa({("y", "y"): 20, ("y", "n"): 5, ("n", "y"): 10, ("n", "n"): 15}) == (pytest.approx(0.4), "")
    # Three answers: p_o = 5 / 8; first 4, 3, 1, second 3, 3, 2: p_e = (12 + 9 + 2) / 64; kappa = (40 - 23) / (64 - 23).
    three = {("a", "a"): 2, ("a", "b"): 1, ("a", "c"): 1, ("b", "b"): 2, ("b", "a"): 1, ("c", "c"): 1}
    assert cohen_kappa(three) == (pytest.approx(17 / 41), "")
    assert cohen_kappa({("a", "b"): 5, ("b", "a"): 5}) == (-1.0, "")  # always the opposite
    assert cohen_kappa({("a", "a"): 1, ("b", "b"): 9}) == (1.0, "")
    assert cohen_kappa({("a", "b"): 7}) == (0.0, "")  # p_o = p_e = 0
    for undefined, why in (({}, "no case"), ({("a", "a"): 7}, "same answer every time")):
        kappa, reason = cohen_kappa(undefined)
        assert kappa is None
        assert why in reason


def test_agreement_counts_what_both_judged() -> None:
    cases = (
        case(1, ann=Opinion("works"), bob=Opinion("works")),
        case(2, ann=Opinion("fails", "partial"), bob=Opinion("partial", "partial")),
        case(3, ann=Opinion("fails", "other"), bob=Opinion("fails")),
        case(4, ann=Opinion("fails")),  # bob has not judged it
        case(5, ann=Opinion(failure="other"), bob=Opinion("fails", "other")),  # ann gave no verdict
        case(6, ann=Opinion(note="?"), bob=Opinion("works")),
    )
    verdicts = agreement(cases, "ann", "bob", "verdict")
    assert (verdicts.n, verdicts.agreed, verdicts.share) == (3, 2, pytest.approx(2 / 3))
    # first: works 1, fails 2; second: works, partial, fails 1 each; p_e = (1 + 2) / 9; kappa = (6 - 3) / (9 - 3).
    assert verdicts.kappa == pytest.approx(0.5)
    assert verdicts.table == {("works", "works"): 1, ("fails", "partial"): 1, ("fails", "fails"): 1}
    assert verdicts.differ == (digest(2),)
    types = agreement(cases, "ann", "bob", "failure")
    assert types.table == {("none", "none"): 1, ("partial", "partial"): 1, ("other", "none"): 1, ("other", "other"): 1}
    assert (types.n, types.agreed, types.differ) == (4, 3, (digest(3),))
    assert types.kappa == pytest.approx((12 - 5) / (16 - 5))
    nobody = agreement(cases, "ann", "zoe", "verdict")
    assert (nobody.n, nobody.share, nobody.kappa, nobody.differ) == (0, None, None, ())


def test_labels_travel_between_machines(desk: Reviews) -> None:
    here = desk.create("here", "ann", [digest(1), digest(2), digest(3)])
    there = desk.create("there", "ann", [digest(1), digest(2)])
    note = 'line one\nline "two" \u2028 =cmd()'
    desk.label(here.token, "", digest(1), "Ann", Opinion("fails", "other", 3, ("a",), note))
    desk.label(here.token, "", digest(3), "Ann", Opinion("works"))
    desk.label(there.token, "", digest(2), "Bob", Opinion("unsure"))
    data = lines(desk.cases(here.token, ""), "here")
    table = [json.loads(line) for line in data.decode().splitlines()]
    assert [row["reviewer"] for row in table] == ["Ann", "", "Ann"]
    assert table[0]["prompt"] == "Tower 1 is in"
    assert table[0]["schema_version"] == 1
    assert table[0]["run"] == digest(1)
    assert desk.take_in(there.token, data) == (1, 1)
    assert desk.take_in(there.token, data) == (0, 1)  # no newer
    first, second = desk.cases(there.token, "")
    assert first.labels["Ann"] == desk.cases(here.token, "")[0].labels["Ann"]
    assert second.said("Bob") == Opinion("unsure")
    assert all(row["queue"] == "there" for row in rows((first, second), "there"))


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[]",
        b'{"schema_version": 1}',
        b"[" * 100_000,
        b'{"schema_version": 2, "reviewer": "x"}',
        b"x" * (MAX_IMPORT_BYTES + 1),
        b"1\n" * 20_001,
    ],
    ids=["bytes", "list", "empty", "deep", "version", "large", "long"],
)
def test_files_that_are_refused(desk: Reviews, line: bytes) -> None:
    token = desk.create("q", "ann", [digest(1)]).token
    with pytest.raises(BadInput, match="file"):
        desk.take_in(token, line)


@pytest.mark.parametrize(
    "wrong",
    [
        {"updated": "yesterday"},
        {"updated": 5},
        {"severity": 9},
        {"severity": "3"},
        {"verdict": "fine"},
        {"verdict": None},
        {"tags": "a"},
        {"tags": [1]},
        {"note": None},
        {"note": "x" * 10_001},
        {"reviewer": "x" * 61},
        {"reviewer": ["x"]},
        {"reviewer": "a\u0000b"},
    ],
    ids=str,
)
def test_labels_of_a_file_that_are_refused_write_nothing(desk: Reviews, wrong: dict[str, object]) -> None:
    token = desk.create("q", "ann", [digest(1)]).token
    row = {
        "schema_version": 1, "run": digest(1), "reviewer": "Ann", "verdict": "works", "failure": "", "severity": 0,
        "tags": [], "note": "", "updated": NOON.isoformat(),
    }  # fmt: skip
    good, bad = json.dumps(row), json.dumps({**row, **wrong})
    with pytest.raises((BadInput, UnknownName)):
        desk.take_in(token, f"{good}\n{bad}\n".encode())
    assert desk.cases(token, "ann")[0].labels == {}
    assert desk.take_in(token, good.encode()) == (1, 0)


def test_a_time_in_the_future_does_not_win_for_ever() -> None:
    row = {
        "schema_version": 1, "run": digest(1), "reviewer": "Ann", "verdict": "works", "failure": "", "severity": 0,
        "tags": [], "note": "", "updated": "2999-01-01T00:00:00+00:00",
    }  # fmt: skip
    (label,) = read_lines(json.dumps(row).encode())
    assert label.updated <= datetime.now(UTC)
