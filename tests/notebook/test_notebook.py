"""History, notes, tags and verdicts on both databases."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from mega_core.errors import BadInput, StoreError, UnknownName
from mega_core.notebook import FAILURES, METADATA, VERDICTS, Notebook, Opinion, ReviewLabel, Run, _engine, _url

ROOT = Path(__file__).parents[2]
NOON = datetime(2025, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


def digest(i: int) -> str:
    return f"{i:064x}"


def a_run(i: int = 1, **changes: object) -> Run:
    run = Run(
        digest=digest(i),
        session="ann",
        model="facts-small",
        method="rome",
        subject="The Eiffel Tower",
        template="{} is in the city of",
        target_new="Rome",
        target_true="Paris",
        verdict="works",
        metrics={"efficacy": 1.0, "paraphrase": 0.75},
        seconds=1.25,
        created=NOON + timedelta(minutes=i),
    )
    return replace(run, **changes)  # type: ignore[arg-type]


TOKEN = "a-token-nobody-guesses"


def said(i: int, reviewer: str = "ann", minutes: int = 0, **opinion: object) -> ReviewLabel:
    return ReviewLabel(digest(i), reviewer, Opinion(**opinion), NOON + timedelta(minutes=minutes))  # type: ignore[arg-type]


@pytest.fixture
def book(place: str) -> Iterator[Notebook]:
    opened = Notebook.open(place)
    yield opened
    opened.close()


def found(book: Notebook, **filters: object) -> list[int]:
    numbers = [int(entry.run.digest, 16) for entry in book.runs(**filters)]  # type: ignore[arg-type]
    assert len(numbers) == book.count(**{k: v for k, v in filters.items() if k not in ("limit", "offset")})  # type: ignore[arg-type]
    return numbers


def test_a_run_comes_back_as_it_was(book: Notebook, place: str) -> None:
    run = a_run()
    book.add_run(run)
    entry = book.get(run.digest)
    assert entry is not None
    assert entry.run == run
    assert (entry.tags, entry.notes, entry.verdicts) == ((), (), ())
    again = Notebook.open(place)  # opening again changes nothing
    assert again.runs() == [entry]
    assert again.health().revision == "0003"
    assert again.health().runs == 1
    assert again.health().notice == ""
    again.close()


def test_times_keep_their_instant_across_zones(book: Notebook) -> None:
    tokyo = timezone(timedelta(hours=9))
    book.add_run(a_run(created=NOON.astimezone(tokyo)))
    entry = book.get(digest(1))
    assert entry is not None
    assert entry.run.created == NOON
    assert entry.run.created.tzinfo == UTC


def test_newest_first_and_page_by_page(book: Notebook) -> None:
    for i in (3, 1, 5, 2, 4):
        book.add_run(a_run(i))
    assert found(book) == [5, 4, 3, 2, 1]
    assert [int(e.run.digest, 16) for e in book.runs(limit=2, offset=1)] == [4, 3]
    assert book.runs(offset=10) == []
    for wrong in ({"limit": 0}, {"limit": 501}, {"offset": -1}, {"limit": "5"}, {"limit": True}):
        with pytest.raises(BadInput):
            book.runs(**wrong)  # type: ignore[arg-type]


def test_asking_again_moves_a_run_up_and_keeps_what_people_wrote(book: Notebook) -> None:
    book.add_run(a_run(1))
    book.add_run(a_run(2))
    book.set_note(digest(1), "look here")
    book.set_tags(digest(1), ["odd"])
    book.add_run(a_run(1, created=NOON + timedelta(hours=1), seconds=9.0))
    assert found(book) == [1, 2]
    entry = book.get(digest(1))
    assert entry is not None
    assert entry.run.seconds == 9.0
    assert entry.notes[0].text == "look here"
    assert entry.tags == ("odd",)


def test_each_session_has_its_own_history(book: Notebook) -> None:
    book.add_run(a_run(1))
    book.add_run(a_run(2))
    book.add_run(a_run(1, session="bob", created=NOON + timedelta(hours=2)))
    assert found(book) == [1, 2]
    assert found(book, session="ann") == [2, 1]
    assert found(book, session="bob") == [1]
    assert found(book, session="eve") == []
    assert book.runs(session="ann")[1].run.session == "ann"
    assert book.delete_run(digest(1), session="bob")
    assert not book.delete_run(digest(1), session="bob")
    assert found(book, session="ann") == [2, 1]
    assert book.runs()[1].run.session == "ann"
    assert book.delete_run(digest(1), session="ann")
    assert found(book) == [2]


def test_filters(book: Notebook) -> None:
    book.add_run(a_run(1))
    book.add_run(a_run(2, method="memit", subject="Élan Vital 100%", target_new="Straße", target_true=None))
    book.add_run(a_run(3, model="other_model", verdict="fails", template="The boss of {} is"))
    book.set_tags(digest(2), ["Hard", "später"])
    book.set_verdict(digest(2), "fails", "not applied", 2, author="ann")
    assert found(book, text="eiffel tower") == [3, 1]
    assert found(book, text="boss of the eiffel") == [3]
    assert found(book, text="ÉLAN") == [2]
    assert found(book, text="strasse") == [2]
    assert found(book, text="STRASSE elan") == []
    assert found(book, text="100%") == [2]
    assert found(book, text="%") == [2]
    assert found(book, text="_") == [3]
    assert found(book, text="other_model") == [3]
    assert found(book, text=digest(3)) == [3]
    assert found(book, text="\\") == []
    assert found(book, text="a\0b") == []
    assert found(book, text="\ud800") == []
    assert found(book, text="' OR 1=1 --") == []
    assert found(book, model="facts-small") == [2, 1]
    assert found(book, method="memit", model="facts-small") == [2]
    assert found(book, tag="HARD") == [2]
    assert found(book, tag="har") == []
    assert found(book, verdict="fails") == [3, 2]
    assert found(book, verdict="works") == [2, 1]
    assert found(book, unreviewed=True) == [3, 1]


def test_notes_belong_to_their_authors(book: Notebook) -> None:
    book.add_run(a_run())
    first = book.set_note(digest(1), "  mine \n second line ", author="ann")
    assert first is not None
    assert first.text == "mine \n second line"
    book.set_note(digest(1), "his", author="bob")
    second = book.set_note(digest(1), "mine, changed", author="ann")
    assert second is not None
    assert second.created == first.created
    assert second.updated >= first.updated
    entry = book.get(digest(1))
    assert entry is not None
    assert [(note.author, note.text) for note in entry.notes] == [("ann", "mine, changed"), ("bob", "his")]
    assert book.set_note(digest(1), "", author="ann") is None
    entry = book.get(digest(1))
    assert entry is not None
    assert [note.author for note in entry.notes] == ["bob"]


def test_text_is_data(book: Notebook) -> None:
    book.add_run(a_run())
    for text in ("<script>alert(1)</script>", "'; DROP TABLE runs; --", "{} %s %(x)s \\", "🗼 e\u0301té", "=1+1"):
        note = book.set_note(digest(1), text)
        entry = book.get(digest(1))
        assert entry is not None
        assert note is not None
        assert entry.notes[0].text == note.text
    assert book.set_note(digest(1), "e\u0301").text == "\u00e9"  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["a\0b", "\x1b[31m", "\ud800", "x" * 10_001, "x" * 1_000_000, 5, None, b"x"])
def test_notes_that_are_refused(book: Notebook, text: object) -> None:
    book.add_run(a_run())
    with pytest.raises(BadInput, match="note"):
        book.set_note(digest(1), text)  # type: ignore[arg-type]


def test_tags_are_folded_sorted_and_limited(book: Notebook) -> None:
    book.add_run(a_run())
    assert book.set_tags(digest(1), [" Leak", "leak", "Ärger", "a b"]) == ("a b", "leak", "ärger")
    assert book.set_tags(digest(1), ("one",)) == ("one",)
    assert book.get(digest(1)).tags == ("one",)  # type: ignore[union-attr]
    assert book.set_tags(digest(1), []) == ()
    for wrong in ([""], ["x" * 41], [f"t{i}" for i in range(21)], "tag", ["a\nb"], [5]):
        with pytest.raises(BadInput, match="tag"):
            book.set_tags(digest(1), wrong)  # type: ignore[arg-type]


def test_verdicts(book: Notebook) -> None:
    book.add_run(a_run())
    book.set_verdict(digest(1), VERDICTS[0], author="ann")
    book.set_verdict(digest(1), "fails", FAILURES[3], 3, author="ann")
    book.set_verdict(digest(1), "partial", author="bob")
    entry = book.get(digest(1))
    assert entry is not None
    assert [(v.author, v.verdict, v.failure, v.severity) for v in entry.verdicts] == [
        ("ann", "fails", "neighbour bleed", 3),
        ("bob", "partial", "", 0),
    ]
    assert book.set_verdict(digest(1), "", author="ann") is None
    assert found(book, verdict="fails") == []
    book.set_verdict(digest(1), "", "other", author="ann")  # a failure type may come first
    assert [(v.author, v.failure) for v in book.get(digest(1)).verdicts] == [("ann", "other"), ("bob", "")]  # type: ignore[union-attr]
    with pytest.raises(UnknownName, match="works"):
        book.set_verdict(digest(1), "work")
    with pytest.raises(UnknownName, match="not applied"):
        book.set_verdict(digest(1), "fails", "not aplied")
    for severity in (-1, 4, 1.0, True):
        with pytest.raises(BadInput, match="severity"):
            book.set_verdict(digest(1), "fails", "other", severity)  # type: ignore[arg-type]


def test_a_run_that_is_not_there(book: Notebook) -> None:
    book.add_run(a_run())
    for unknown in (digest(9), "", "../x", "ab", None, digest(1).upper() + "x", "%"):
        assert book.get(unknown) is None  # type: ignore[arg-type]
        assert not book.delete_run(unknown)  # type: ignore[arg-type]
        for call in (
            lambda d: book.set_note(d, "x"),
            lambda d: book.set_tags(d, ["x"]),
            lambda d: book.set_verdict(d, "works"),
        ):
            with pytest.raises(UnknownName, match="run"):
                call(unknown)


def test_deleting_takes_everything_attached(book: Notebook) -> None:
    for i in (1, 2):
        book.add_run(a_run(i))
        book.set_note(digest(i), "n")
        book.set_tags(digest(i), ["t"])
        book.set_verdict(digest(i), "fails")
    book.add_queue(TOKEN, "ours", "ann", [digest(1), digest(2)])
    book.set_labels(TOKEN, [said(i, "bob", note="x") for i in (1, 2)])
    assert book.delete_run(digest(1))
    assert not book.delete_run(digest(1))
    assert found(book) == [2]
    with book._reading() as connection:
        for table in METADATA.tables.values():
            assert connection.scalar(sa.select(sa.func.count()).select_from(table)) == 1, table.name
    book.add_run(a_run(1))
    assert book.get(digest(1)).notes == ()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "wrong",
    [
        {"digest": "12"},
        {"digest": digest(1).replace("0", "G")},
        {"session": ""},
        {"model": "x" * 201},
        {"subject": "a\0b"},
        {"metrics": {"x": float("nan")}},
        {"metrics": {"x": "1"}},
        {"metrics": {f"m{i:05}": 1.0 for i in range(10_000)}},
        {"created": datetime(2025, 1, 1)},
        {"created": "yesterday"},
        {"edits": 0},
    ],
)
def test_runs_that_are_refused(book: Notebook, wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        book.add_run(a_run(**wrong))
    assert book.count() == 0


def test_export_is_plain_json(book: Notebook) -> None:
    for i in range(1, 4):
        book.add_run(a_run(i))
    book.set_note(digest(2), "n", author="ann")
    book.set_tags(digest(2), ["t"])
    book.set_verdict(digest(2), "fails", "other", 1, author="ann")
    rows = json.loads(json.dumps(book.export()))
    assert [int(row["digest"], 16) for row in rows] == [1, 2, 3]
    assert rows[1]["metrics"] == {"efficacy": 1.0, "paraphrase": 0.75}
    assert rows[1]["tags"] == ["t"]
    assert rows[1]["notes"][0]["text"] == "n"
    assert rows[1]["verdicts"][0]["failure"] == "other"
    assert datetime.fromisoformat(rows[1]["created"]) == NOON + timedelta(minutes=2)
    assert book.export(session="nobody") == []


def test_many_runs_come_in_few_queries(book: Notebook) -> None:
    for i in range(1, 41):
        book.add_run(a_run(i))
        book.set_tags(digest(i), ["t"])
    asked: list[str] = []
    sa.event.listen(book._engine, "before_cursor_execute", lambda *a: asked.append(a[2]))
    assert len(book.runs(limit=40)) == 40
    assert len([text for text in asked if text.startswith("SELECT")]) == 4


def test_threads_write_together(book: Notebook) -> None:
    book.add_run(a_run(999))
    wrong: list[BaseException] = []

    def work(me: int) -> None:
        try:
            for i in range(10):
                book.add_run(a_run(me * 100 + i, session=f"s{me}"))
                book.set_tags(digest(999), [f"t{me}"])
                book.set_note(digest(999), f"{me} {i}", author=f"a{me % 2}")
                book.runs(text="eiffel", limit=5)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert book.count() == 51
    entry = book.get(digest(999))
    assert entry is not None
    assert len(entry.notes) == 2
    assert entry.tags


def test_processes_that_open_a_new_notebook_together_make_its_tables_once(place: str) -> None:
    script = "import sys; from mega_core.notebook import Notebook; print(Notebook.open(sys.argv[1]).health().backend)"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, place], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
        assert out.decode().strip() in ("sqlite", "postgresql")


def test_the_migrations_make_the_tables_the_code_describes(book: Notebook) -> None:
    with book._reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), METADATA) == []


def test_tables_of_a_newer_version_are_left_alone(book: Notebook, place: str) -> None:
    book.add_run(a_run())
    engine = _engine(_url(place))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StoreError, match="newer version"):
        Notebook.open(place)
    assert book.count() == 1


def test_a_queue_holds_its_runs_in_order(book: Notebook) -> None:
    for i in (1, 2, 3):
        book.add_run(a_run(i))
    made = book.add_queue(TOKEN, "  Failures of March ", "ann", [digest(3), digest(1), digest(3)])
    assert (made.title, made.owner, made.size) == ("Failures of March", "ann", 2)
    assert book.queue(TOKEN) == made
    assert [int(run.digest, 16) for run in book.queue_runs(TOKEN)] == [3, 1]
    assert book.queues("ann") == [made]
    assert book.queues("bob") == []
    for nobody in ("", "x" * 22, "../etc/passwd", "\x00" * 20, None):
        assert book.queue(nobody) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"digests": []}, "runs"),
        ({"digests": [digest(2)]}, "history"),  # of another session
        ({"digests": ["x"]}, "digest"),
        ({"title": " "}, "title"),
        ({"token": "short"}, "token"),
    ],
)
def test_queues_that_are_refused(book: Notebook, wrong: dict[str, object], field: str) -> None:
    book.add_run(a_run(1))
    book.add_run(a_run(2, session="bob"))
    asked = {"token": TOKEN, "title": "t", "owner": "ann", "digests": [digest(1)], **wrong}
    with pytest.raises(BadInput, match=field):
        book.add_queue(**asked)  # type: ignore[arg-type]
    assert book.queues("ann") == []


def test_labels_belong_to_their_queue_run_and_reviewer(book: Notebook) -> None:
    for i in (1, 2):
        book.add_run(a_run(i))
    book.add_queue(TOKEN, "one", "ann", [digest(1), digest(2)])
    book.add_queue(f"{TOKEN}-2", "two", "ann", [digest(1)])
    hostile = "'); DROP TABLE runs;-- <b>=1+1</b>\nsecond line"
    first = said(1, "ann", verdict="fails", failure="partial", severity=2, tags=("B", "a", "b"), note=hostile)
    assert book.set_labels(TOKEN, [first, said(2, "ann", verdict="works"), said(1, "bob", failure="other")]) == 3
    assert book.set_labels(f"{TOKEN}-2", [said(1, "ann", verdict="unsure")]) == 1
    kept = {(label.digest[-1], label.reviewer): label.said for label in book.labels(TOKEN)}
    assert kept == {
        ("1", "ann"): Opinion("fails", "partial", 2, ("a", "b"), hostile),
        ("1", "bob"): Opinion(failure="other"),
        ("2", "ann"): Opinion("works"),
    }
    assert [label.updated for label in book.labels(TOKEN, digest(2))] == [NOON]
    book.set_labels(TOKEN, [said(1, "ann")])  # nothing said: the label goes
    assert [label.reviewer for label in book.labels(TOKEN, digest(1))] == ["bob"]
    entry = book.get(digest(1))
    assert entry is not None
    assert (entry.notes, entry.tags, entry.verdicts) == ((), (), ())  # nothing of it reaches the run


def test_labels_are_written_all_or_none_and_newer_ones_win(book: Notebook) -> None:
    book.add_run(a_run(1))
    book.add_queue(TOKEN, "one", "ann", [digest(1)])
    book.set_labels(TOKEN, [said(1, minutes=5, verdict="fails")])
    older, newer = said(1, minutes=4, verdict="works"), said(1, minutes=6, verdict="partial")
    assert book.set_labels(TOKEN, [older], newer=True) == 0
    assert book.labels(TOKEN)[0].said.verdict == "fails"
    assert book.set_labels(TOKEN, [newer], newer=True) == 1
    assert book.labels(TOKEN)[0].said.verdict == "partial"
    for wrong, error in (
        (said(2, verdict="works"), UnknownName),
        (said(1, verdict="wrong"), UnknownName),
        (said(1, failure="wrong"), UnknownName),
        (said(1, severity=4), BadInput),
        (said(1, note="x" * 10_001), BadInput),
        (said(1, tags=("x" * 41,)), BadInput),
        (said(1, " "), BadInput),
        (said(1, "x" * 61), BadInput),
    ):
        with pytest.raises(error):
            book.set_labels(TOKEN, [said(1, minutes=9, verdict="unsure"), wrong])
    assert book.labels(TOKEN)[0].said.verdict == "partial"


def test_a_queue_keeps_a_run_that_its_asker_deletes(book: Notebook) -> None:
    for i in (1, 2):
        book.add_run(a_run(i))
        book.set_note(digest(i), "mine", "ann")
    book.add_run(a_run(2, session="bob"))
    book.add_queue(TOKEN, "one", "ann", [digest(1), digest(2)])
    book.set_labels(TOKEN, [said(1, "bob", verdict="fails")])
    assert book.delete_run(digest(1), "ann")
    assert found(book, session="ann") == [2]
    assert [int(run.digest, 16) for run in book.queue_runs(TOKEN)] == [1, 2]
    assert book.labels(TOKEN)[0].reviewer == "bob"
    assert book.get(digest(1)).notes == ()  # type: ignore[union-attr]
    assert not book.delete_queue(TOKEN, "bob")
    assert book.delete_queue(TOKEN, "ann")
    assert not book.delete_queue(TOKEN, "ann")
    assert (book.queue(TOKEN), book.labels(TOKEN), book.get(digest(1))) == (None, [], None)
    assert book.get(digest(2)) is not None


def test_tags_belong_to_their_authors(book: Notebook) -> None:
    for session in ("ann", "bob"):
        book.add_run(a_run(1, session=session))
    assert book.set_tags(digest(1), ["odd", "Both"], "ann") == ("both", "odd")
    book.set_tags(digest(1), ["both"], "bob")
    book.set_tags(digest(1), ["shared"])
    assert [entry.tags for entry in book.runs(session="ann")] == [("both", "odd", "shared")]
    assert [entry.tags for entry in book.runs(session="bob")] == [("both", "shared")]
    assert book.get(digest(1), "bob").tags == ("both", "shared")  # type: ignore[union-attr]
    assert book.get(digest(1)).tags == ("both", "odd", "shared")  # type: ignore[union-attr]
    assert found(book, session="bob", tag="odd") == []
    assert found(book, session="ann", tag="ODD") == found(book, tag="odd") == [1]
    book.set_tags(digest(1), [], "bob")
    assert book.get(digest(1), "ann").tags == ("both", "odd", "shared")  # type: ignore[union-attr]


def test_tags_of_an_older_notebook_go_to_the_last_asker(place: str) -> None:
    engine = _engine(_url(place))
    config = Config()
    config.set_main_option("script_location", str(ROOT / "mega_core" / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        values = {c.name: "x" for c in METADATA.tables["runs"].c} | {"edits": 1, "seconds": 1.0, "metrics": "{}"}
        values |= {"digest": digest(1), "session": "ann", "created": NOON.replace(tzinfo=None)}
        names = ", ".join(values)
        connection.execute(
            sa.text(f"INSERT INTO runs ({names}) VALUES ({', '.join(':' + name for name in values)})"), values
        )
        connection.execute(sa.text(f"INSERT INTO tags (digest, tag) VALUES ('{digest(1)}', 'odd')"))
    engine.dispose()
    book = Notebook.open(place)
    assert book.get(digest(1), "ann").tags == ("odd",)  # type: ignore[union-attr]
    assert book.get(digest(1), "bob").tags == ()  # type: ignore[union-attr]
    book.close()


def test_a_filter_by_verdict_counts_only_the_readers_own(book: Notebook) -> None:
    book.add_run(a_run())
    book.set_verdict(digest(1), "unsure", author="someone else")
    session = a_run().session
    assert book.runs(session=session, verdict="unsure") == []
    assert [entry.run.digest for entry in book.runs(session=session, unreviewed=True)] == [digest(1)]
    book.set_verdict(digest(1), "unsure", author=session)
    assert [entry.run.digest for entry in book.runs(session=session, verdict="unsure")] == [digest(1)]
    assert book.runs(session=session, unreviewed=True) == []
