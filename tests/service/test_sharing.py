"""Runs that leave and come back: nothing is lost on the way, and nothing hostile gets in."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mega_core import frames
from mega_core.embedded import examples
from mega_core.errors import ActionableError, BadInput, StoreError
from mega_core.records import MAX_FILE_BYTES, SCHEMA_VERSION, ModelRef, Report
from mega_core.service import Service
from mega_core.service.sharing import Imports
from tests.service import generated
from tests.service.reports import make_report


def same(one: Report, other: Report) -> bool:
    """Whether both say the same, frame by frame; an id is not compared."""
    return (
        set(one.frames) == set(other.frames)
        and all(frame.equals(other.frames[name]) for name, frame in one.frames.items())
        and all((frame.dtypes == other.frames[name].dtypes).all() for name, frame in one.frames.items())
        and one.header() == other.header()
    )


def seeds(count: int, quick: int) -> list[Any]:
    """So many seeds; those after the first few are for the slow tests."""
    return [pytest.param(seed, marks=[] if seed < quick else [pytest.mark.slow]) for seed in range(count)]


class TestRoundTrip:
    @pytest.mark.parametrize("seed", seeds(100, quick=34))
    def test_a_run_comes_back_as_it_left(self, seed):
        report = generated.report(seed)
        assert same(Report.from_json(report.to_file({"verdict": "<b>"})), report)

    @pytest.mark.slow
    def test_the_generated_runs_have_every_table(self):
        rows = dict.fromkeys(frames.CONTRACTS, 0)
        for seed in range(3 * len(rows)):
            for name, frame in generated.report(seed).frames.items():
                rows[name] += len(frame)
        assert all(rows.values())

    @pytest.mark.parametrize("example", examples.load(), ids=lambda e: e.name)
    def test_shipped_runs_come_back(self, example):
        report = example.report()
        assert same(Report.from_json(report.to_file()), report)

    def test_what_the_command_line_writes_can_be_read_too(self):
        for seed in range(5):
            report = generated.report(seed)
            assert same(Report.from_json(json.dumps(report.to_json(), allow_nan=False).encode()), report)

    def test_the_file_is_strict_json_that_says_what_it_is(self):
        report = generated.report(3)
        plain = json.loads(report.to_file({"verdict": "so"}), parse_constant=pytest.fail)
        assert plain["kind"] == "edit-anatomy run"
        assert plain["schema_version"] == SCHEMA_VERSION
        assert plain["labels"] == {"verdict": "so"}

    def test_a_run_that_was_imported_leaves_as_it_came(self, tmp_path):
        report = make_report()
        held = Imports(tmp_path).put(report)
        assert held.digest != report.digest
        assert held.to_file() == report.to_file()
        assert Imports(tmp_path).put(Report.from_json(held.to_file())).digest == held.digest


class TestImports:
    def test_an_import_is_listed_opened_and_marked(self, service: Service):
        report = make_report()
        held = service.sharing.take(report.to_file(), "somebody")
        assert (held.origin, len(held.digest)) == (report.digest, 64)
        assert held.digest != report.digest
        found = service.cached(held.digest)
        assert found is not None
        assert found.origin == report.digest
        assert same(found, report)
        (entry,) = service.runs(session="somebody")
        assert (entry.run.digest, entry.run.verdict) == (held.digest, "works")
        assert service.runs(session="another") == []
        assert service.sharing.imported() == {held.digest}

    def test_a_forged_run_is_never_the_answer_to_its_question(self, service: Service):
        """A file that claims to answer a question asked here must not be found under that question."""
        plan = service.plan("little", "toy", "Eiffel Tower", "{} is in", "Rome", "Paris")
        digest = service.digest(plan)
        forged = replace(make_report(request=plan.requests[0]), question=plan, digest=digest)
        held = service.sharing.take(forged.to_file(), "mallory")
        assert service.cached(digest) is None
        kept = service.core.store.keys()
        assert not [key for key in kept if digest in key or held.digest in key]
        honest = service.run(plan)
        assert (honest.digest, honest.origin) == (digest, "")
        assert not same(honest, forged)

    def test_an_imported_id_answers_no_question_either(self, service: Service, monkeypatch):
        """Even if some question had the id of an import, it would be computed."""
        plan = service.plan("little", "toy", "Eiffel Tower", "{} is in", "Rome", "Paris")
        held = service.sharing.take(make_report(request=plan.requests[0]).to_file(), "mallory")
        with pytest.raises(StoreError):  # computed, and then not what was asked for
            service.core.answer(plan, held.digest, lambda _: None)

    def test_it_can_be_looked_at_without_its_model(self, service: Service):
        made = make_report()
        report = replace(made, question=replace(made.question, model=ModelRef("unheard-of")))
        held = service.sharing.take(report.to_file(), "somebody")
        assert service.report(held.digest).question == report.question

    @pytest.mark.parametrize("name", ["", "x", "../../etc/passwd", "0" * 64, "A" * 64, "0" * 63 + "/", None, 3])
    def test_any_text_may_be_asked_for(self, service: Service, name):
        assert service.core.imports.get(name) is None
        assert name not in service.core.imports
        assert service.core.imports.drop(str(name)) is False

    def test_a_file_changed_on_the_disk_is_none(self, tmp_path):
        imports = Imports(tmp_path)
        held = imports.put(make_report())
        path = tmp_path / f"{held.digest}.zip"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        assert imports.get(held.digest) is None

    def test_a_link_in_the_folder_is_not_followed(self, tmp_path):
        imports = Imports(tmp_path / "kept")
        held = imports.put(make_report())
        path = tmp_path / "kept" / f"{held.digest}.zip"
        path.rename(tmp_path / "elsewhere.zip")
        path.symlink_to(tmp_path / "elsewhere.zip")
        assert imports.get(held.digest) is None

    def test_the_oldest_go_first_and_the_newest_stays(self, tmp_path):
        size = len(make_report().to_bytes())
        imports = Imports(tmp_path, limit=3 * size + size // 2)
        kept = []
        for seed in range(5):
            kept.append(imports.put(make_report(seed=seed)).digest)
            os.utime(tmp_path / f"{kept[-1]}.zip", (seed, seed))
        assert [digest in imports for digest in kept] == [False, False, True, True, True]
        tight = Imports(tmp_path, limit=1)
        last = tight.put(make_report(seed=9)).digest
        assert tight.ids() == {last}

    def test_a_disk_that_refuses_is_told(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="could not be kept"):
            Imports(tmp_path / "file" / "imports").put(make_report())

    def test_an_import_that_nobody_lists_is_forgotten(self, service: Service):
        data = make_report().to_file()
        digest = service.sharing.take(data, "one").digest
        service.sharing.take(data, "two")
        service.delete_run(digest, "one")
        assert service.sharing.forget(digest) is False
        assert service.cached(digest) is not None
        service.delete_run(digest, "two")
        assert service.sharing.forget(digest) is True
        assert service.cached(digest) is None


# Damaged and hostile files -------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]
BASE = make_report()


def change(path: str, value: Any) -> Change:
    """Set a value deep in the file: "frames.answers.rows.0.1"."""

    def apply(plain: dict[str, Any]) -> None:
        *way, last = path.split(".")
        at: Any = plain
        for step in way:
            at = at[int(step)] if isinstance(at, list) else at[step]
        if value is drop:
            del at[int(last) if isinstance(at, list) else last]
        else:
            at[int(last) if isinstance(at, list) else last] = value

    return apply


def drop() -> None:
    """Stands for taking the field away."""


def cell(column: str, value: Any, row: int = 0) -> Change:
    """Set one cell of the answers."""
    index = list(BASE.frames["answers"].columns).index(column)
    return change(f"frames.answers.rows.{row}.{index}", value)


HOSTILE: dict[str, Change] = {
    "an unknown field": change("pickle", "gASV"),
    "another schema": change("schema_version", 2),
    "a schema that is true": change("schema_version", True),
    "no schema": change("schema_version", drop),
    "no question": change("question", drop),
    "a digest that is a path": change("digest", "../../etc/passwd"),
    "a digest in capitals": change("digest", "A" * 64),
    "no digest": change("digest", drop),
    "a model that is a path": change("question.model.name", "../../models/x y"),
    "an unknown field of the model": change("question.model.path", "/etc"),
    "a method that is markup": change("question.method.name", "<script>"),
    "a version that is text": change("question.method.version", "1"),
    "a parameter twice": change("question.method.params", [["a", 1], ["a", 2]]),
    "a parameter of three": change("question.method.params", [["a", 1, 2]]),
    "a parameter that is a list": change("question.method.params", [["a", [1]]]),
    "no request": change("question.requests", []),
    "a request without a template": change("question.requests.0.template", drop),
    "a template without a place": change("question.requests.0.template", "no place"),
    "a subject with a control character": change("question.requests.0.subject", "a\x07b"),
    "a subject that turns direction": change("question.requests.0.subject", "a\u202eb"),
    "a subject too long": change("question.requests.0.subject", "a" * 200),
    "a subject that is a number": change("question.requests.0.subject", 7),
    "paraphrases that are one text": change("question.requests.0.paraphrases", "abc"),
    "too many neighbours": change("question.requests.0.neighbours", [str(i) for i in range(40)]),
    "a view that is a number": change("question.views", [1]),
    "a seed below zero": change("question.seed", -1),
    "a seed that is a number with a point": change("question.seed", 1.5),
    "a receipt that is a list": change("receipt", []),
    "a receipt restored by a word": change("receipt.restored", "yes"),
    "hooks below zero": change("receipt.hooks_left", -1),
    "a time that is text": change("timing.before", "1"),
    "a time below zero": change("timing.before", -1),
    "notes that are a text": change("notes", "abc"),
    "a note that is a list": change("notes", [["a"]]),
    "an environment that is a list": change("environment", []),
    "an environment with a number": change("environment", {"torch": 2}),
    "frames that are a list": change("frames", []),
    "an unknown table": change("frames.evil", {"columns": [], "rows": []}),
    "a table that is a text": change("frames.answers", "rows"),
    "no answers": change("frames.answers", drop),
    "answers without rows": change("frames.answers.rows", []),
    "a column less": change("frames.answers.columns.0", drop),
    "a column twice": change("frames.answers.columns.0", "case"),
    "a row too short": change("frames.answers.rows.0", ["before"]),
    "a row that is a mapping": change("frames.answers.rows.0", {}),
    "an answer missing": change("frames.answers.rows.0", drop),
    "a third state": cell("state", "during"),
    "a third object": cell("candidate", "other"),
    "another kind of prompt": cell("prompt_kind", "question"),
    "a case that isn't there": cell("case", 1),
    "a case below zero": cell("case", -1),
    "a probability that is a text": cell("prob", "0.5"),
    "a probability that is true": cell("prob", True),
    "a probability that is none": cell("prob", None),
    "a rank beyond 64 bits": cell("rank", 2**63),
    "a rank with a point": cell("rank", 1.0),
    "a truth that is 1": cell("is_top", 1),
    "a token that is a list": cell("token", ["a"]),
    "a token with half a character": cell("token", "\ud800"),
    "a token of a million letters": cell("token", "a" * 1_000_000),
    "a prompt that was not asked": cell("prompt", "another prompt"),
}  # fmt: skip

RAW: dict[str, bytes] = {
    "nothing": b"",
    "not text": b"\xff\xfe\x00",
    "a zip": b"PK\x03\x04" + b"\0" * 40,
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00",
    "a list": b"[]",
    "a number": b"7",
    "an object": b"{}",
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "deep in a field": b'{"schema_version": 1, "question": ' + b"[" * 100_000 + b"]" * 100_000 + b', "frames": {}}',
    "a number of a million digits": b'{"schema_version": ' + b"9" * 1_000_000 + b"}",
    "not a number": BASE.to_file().replace(b'"before":0.5', b'"before":NaN'),
    "endless": BASE.to_file().replace(b'"before":0.5', b'"before":1e999'),
    "a field twice": BASE.to_file().replace(b'"notes":', b'"notes":[],"notes":'),
    "two files": BASE.to_file() * 2,
    "too large": b" " * (MAX_FILE_BYTES + 1),
}


def plain_file() -> dict[str, Any]:
    return json.loads(BASE.to_file())


class TestHostileFiles:
    @pytest.mark.parametrize("apply", HOSTILE.values(), ids=HOSTILE.keys())
    def test_is_refused_with_its_place(self, apply):
        plain = plain_file()
        apply(plain)
        with pytest.raises(BadInput) as told:
            Report.from_json(json.dumps(plain).encode())
        assert told.value.what
        assert told.value.next_step
        assert len(str(told.value)) < 700

    @pytest.mark.parametrize("data", RAW.values(), ids=RAW.keys())
    def test_what_is_no_such_file_is_refused(self, data):
        with pytest.raises(BadInput) as told:
            Report.from_json(data)
        assert len(str(told.value)) < 700

    def test_nothing_of_a_refused_file_is_kept(self, service: Service):
        for data in RAW.values():
            with pytest.raises(BadInput):
                service.sharing.take(data, "mallory")
        assert service.sharing.imported() == frozenset()
        assert service.runs(session="mallory") == []

    def test_a_run_that_nobody_could_draw_is_refused(self):
        """The objects of a prompt must be the same before and after: every picture counts on it."""
        plain = plain_file()
        columns = plain["frames"]["answers"]["columns"]
        state, candidate = columns.index("state"), columns.index("candidate")
        rows = plain["frames"]["answers"]["rows"]
        plain["frames"]["answers"]["rows"] = [r for r in rows if (r[state], r[candidate]) != ("after", "true")]
        with pytest.raises(BadInput, match="every object before and after"):
            Report.from_json(json.dumps(plain).encode())

    @pytest.mark.parametrize("seed", seeds(40, quick=6))
    def test_any_damage_is_an_error_that_helps_or_does_no_harm(self, seed):
        """Ten damaged variants a seed, of the text and of the tree: a clear error, or a whole report again."""
        rng = random.Random(seed)
        whole = generated.report(seed).to_file()
        for _ in range(5):
            judge(damaged_text(whole, rng))
            judge(json.dumps(damaged_tree(json.loads(whole), rng)).encode("utf-8", "surrogatepass"))


def judge(data: bytes) -> None:
    """A hostile file: a clear error, or a report that comes back equal."""
    try:
        found = Report.from_json(data)
    except ActionableError as error:
        words = str(error)
    else:
        assert same(Report.from_json(found.to_file()), found)
        words = "read"
    assert 0 < len(words) < 2000


def damaged_text(data: bytes, rng: random.Random) -> bytes:
    """The bytes with something cut out, turned, doubled or put in."""
    at, width = rng.randrange(len(data)), rng.choice((1, 1, 3, 40))
    kind = rng.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + width :]
    if kind == 2:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 3:
        return data[:at] + data[at : at + width] + data[at:]
    return data[:at] + rng.choice((b"null", b"[", b"}", b"NaN", b"-", b"\\ud800", b"e999", b'"')) + data[at:]


JUNK = (
    None, True, -1, 0, 2**63, 10**30, 1.5, -0.0, "", "a", "\ud800", "\x00", "a" * 30_000, [], [[]], {}, {"a": 1},
    "Infinity", "before",
)  # fmt: skip


def damaged_tree(plain: Any, rng: random.Random) -> Any:
    """The tree with something at a chance place replaced, taken away, doubled or renamed."""
    ways: list[tuple[Any, Any]] = []

    def walk(at: Any) -> None:
        items = at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ()
        for key, inner in items:
            ways.append((at, key))
            walk(inner)

    walk(plain)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, key = rng.choice(ways)
        kind = rng.randrange(4)
        try:
            if kind == 0:
                del at[key]
            elif kind == 1 and isinstance(at, list):
                at.append(copy.deepcopy(at[key]))
            elif kind == 1:
                at[rng.choice(("a", "\ud800", "state", ""))] = at[key]
            else:
                at[key] = copy.deepcopy(rng.choice(JUNK))
        except (KeyError, IndexError):
            continue
    return plain
