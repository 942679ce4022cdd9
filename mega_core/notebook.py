"""What people write and want to find again: the history of runs, notes, tags and verdicts.

Unlike the store this is nobody's cache: nothing here is ever evicted, and a damaged file is set aside, never deleted.
SQLite in one file by default (WAL, synchronous=FULL, checked at every start), PostgreSQL when a URL says so. The tables
are made and changed by the migrations in mega_core/migrations, run at open.

A run is one answered question, named by the digest of that question. A visit is one session having asked it, so two
people who ask the same question share the run and each finds it in their own history.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sqlite3
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import QueuePool

from mega_core.errors import BadInput, StoreError, UnknownName

log = logging.getLogger(__name__)

MAX_NOTE, MAX_NAME, MAX_TAG, MAX_TAGS, MAX_PAGE = 10_000, 200, 40, 20, 500
MAX_METRICS_BYTES = 64 * 2**10
MAX_REVIEWER, MAX_QUEUE = 60, 500

VERDICTS = ("works", "partial", "fails", "unsure")
FAILURES = (
    "not applied",
    "partial",
    "over-generalised",
    "neighbour bleed",
    "subject over-attention",
    "fluency collapse",
    "tokenisation",
    "other",
)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,64}")
_MIGRATION_LOCK = 0x6D656761  # any number, the same in every process of this app


# Records ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """One answered question, in the words a history list needs. The full report lies in the store under `digest`."""

    digest: str
    """The key of the question, 64 hex characters."""
    session: str
    """Who asked (an opaque id); in lists the asker of that list's visit."""
    model: str
    method: str
    subject: str
    template: str
    target_new: str
    target_true: str | None = None
    edits: int = 1
    """How many edit requests the question held; the texts above are those of the first."""
    verdict: str = ""
    """What the numbers say, in one word; people's verdicts are kept apart."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metric -> value, finite."""
    seconds: float = 0.0
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    """When it was last asked, with its time zone."""


@dataclass(frozen=True, slots=True)
class Note:
    """One author's note on a run."""

    digest: str
    author: str
    text: str
    created: datetime
    updated: datetime


@dataclass(frozen=True, slots=True)
class Verdict:
    """One author's judgement of a run."""

    digest: str
    author: str
    verdict: str
    """One of VERDICTS."""
    failure: str
    """One of FAILURES, or empty."""
    severity: int
    """0 (not given) to 3 (worst)."""
    updated: datetime


@dataclass(frozen=True, slots=True)
class Entry:
    """A run with everything people attached to it."""

    run: Run
    tags: tuple[str, ...]
    """Of everybody; in the list of a session its own, and those without an author."""
    notes: tuple[Note, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class ReviewQueue:
    """Runs that several people review. Whoever knows the token may."""

    token: str
    title: str
    owner: str
    """The session that made it; only that one may delete it."""
    created: datetime
    size: int
    """How many runs are in it."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one person says of one run. Every part may be left out."""

    verdict: str = ""
    """One of VERDICTS, or empty."""
    failure: str = ""
    """One of FAILURES, or empty."""
    severity: int = 0
    """0 (not given) to 3 (worst)."""
    tags: tuple[str, ...] = ()
    note: str = ""

    @property
    def judged(self) -> bool:
        """Whether it has a verdict or a failure type: then the run counts as reviewed."""
        return bool(self.verdict or self.failure)


@dataclass(frozen=True, slots=True)
class ReviewLabel:
    """One reviewer's opinion of one run of a queue."""

    digest: str
    reviewer: str
    said: Opinion
    updated: datetime


@dataclass(frozen=True, slots=True)
class NotebookHealth:
    """How the notebook is doing, for the status page."""

    backend: str
    """"sqlite", "postgresql", or "memory" when the file can't be used."""
    notice: str
    """One sentence for the person; empty when all is well."""
    revision: str
    """The newest migration applied."""
    runs: int


# Tables (the migrations make them; a test holds the two together) -----------------------------------------------------


class _Utc(sa.types.TypeDecorator[datetime]):
    """Times in UTC with their zone on both databases; SQLite by itself forgets the zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _of_run() -> sa.Column[str]:
    return sa.Column("digest", sa.String(64), sa.ForeignKey("runs.digest", ondelete="CASCADE"), primary_key=True)


METADATA = sa.MetaData()
RUNS = sa.Table(
    "runs",
    METADATA,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("session", sa.Text, nullable=False),
    sa.Column("created", _Utc, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("template", sa.Text, nullable=False),
    sa.Column("target_new", sa.Text, nullable=False),
    sa.Column("target_true", sa.Text),
    sa.Column("edits", sa.Integer, nullable=False),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    # The texts a person may look for, case-folded: the two databases fold case differently, Python always the same.
    sa.Column("search", sa.Text, nullable=False),
    sa.Index("runs_created", "created"),
    sa.Index("runs_method", "method", "model"),
)
VISITS = sa.Table(
    "visits",
    METADATA,
    _of_run(),
    sa.Column("session", sa.Text, primary_key=True),
    sa.Column("created", _Utc, nullable=False),
    sa.Index("visits_session", "session", "created"),
)
NOTES = sa.Table(
    "notes",
    METADATA,
    _of_run(),
    sa.Column("author", sa.Text, primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("created", _Utc, nullable=False),
    sa.Column("updated", _Utc, nullable=False),
)
TAGS = sa.Table(
    "tags",
    METADATA,
    _of_run(),
    sa.Column("author", sa.Text, primary_key=True),
    sa.Column("tag", sa.Text, primary_key=True),
    sa.Index("tags_tag", "tag"),
)
VERDICT_ROWS = sa.Table(
    "verdicts",
    METADATA,
    _of_run(),
    sa.Column("author", sa.Text, primary_key=True),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("failure", sa.Text, nullable=False),
    sa.Column("severity", sa.Integer, nullable=False),
    sa.Column("updated", _Utc, nullable=False),
)
REVIEW_QUEUES = sa.Table(
    "review_queues",
    METADATA,
    sa.Column("token", sa.String(64), primary_key=True),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("created", _Utc, nullable=False),
    sa.Index("review_queues_owner", "owner", "created"),
)
REVIEW_ITEMS = sa.Table(
    "review_items",
    METADATA,
    sa.Column("queue", sa.String(64), sa.ForeignKey("review_queues.token", ondelete="CASCADE"), primary_key=True),
    _of_run(),
    sa.Column("place", sa.Integer, nullable=False),
    sa.Index("review_items_digest", "digest"),
)
REVIEW_LABELS = sa.Table(
    "review_labels",
    METADATA,
    sa.Column("queue", sa.String(64), primary_key=True),
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("reviewer", sa.Text, primary_key=True),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("failure", sa.Text, nullable=False),
    sa.Column("severity", sa.Integer, nullable=False),
    sa.Column("tags", sa.Text, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("updated", _Utc, nullable=False),
    sa.ForeignKeyConstraint(["queue", "digest"], ["review_items.queue", "review_items.digest"], ondelete="CASCADE"),
)


# The notebook ----------------------------------------------------------------------------------------------------


class Notebook:
    """The history, notes, tags and verdicts. Safe to use from many threads; every call is one transaction."""

    def __init__(self, engine: Engine, backend: str, notice: str) -> None:
        self._engine = engine
        self._backend = backend
        self._notice = notice

    @classmethod
    def open(cls, place: str | Path) -> Notebook:
        """Open or create the notebook: a file path, or a sqlite: or postgresql: URL.

        A damaged SQLite file is set aside and a fresh one begun; a file that can't be written gives way to one in
        memory. Both are told in health(). Raises StoreError when a PostgreSQL server can't be used, or when the tables
        were made by a newer version, since going on would lose what people wrote there.
        """
        url = _url(place)
        if url.get_backend_name() == "postgresql":
            with _storing("open the notebook"):
                return cls(_migrated(_engine(url)), "postgresql", "")
        if not url.database or url.database == ":memory:":
            return cls(_migrated(_engine(url)), "memory", _IN_MEMORY.format(reason="no file was asked for"))
        path = Path(url.database)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            notice = _set_damaged_aside(path)
            _backup_before_migrating(path)
            engine = _migrated(_engine(url))
            with suppress(OSError):
                path.chmod(0o600)
            return cls(engine, "sqlite", notice)
        except (OSError, sqlite3.Error, SQLAlchemyError) as error:
            log.warning("The notebook can't use %s (%s: %s).", path, type(error).__name__, error)
            reason = "its file can't be written"
            return cls(_migrated(_engine(make_url("sqlite://"))), "memory", _IN_MEMORY.format(reason=reason))

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def health(self) -> NotebookHealth:
        """Backend, notice, migration and number of runs."""
        with self._reading() as connection:
            revision = MigrationContext.configure(connection).get_current_revision() or ""
            runs = connection.scalar(sa.select(sa.func.count()).select_from(RUNS)) or 0
        return NotebookHealth(self._backend, self._notice, revision, runs)

    # Writing

    def add_run(self, run: Run) -> None:
        """Record that a session asked a question and got its answer. Asking again moves it to the history's top."""
        texts = {
            "session": _text("session", run.session, MAX_NAME),
            "model": _text("model", run.model, MAX_NAME),
            "method": _text("method", run.method, MAX_NAME),
            "subject": _text("subject", run.subject, 4 * MAX_NAME),
            "template": _text("template", run.template, 8 * MAX_NAME),
            "target_new": _text("target_new", run.target_new, 4 * MAX_NAME),
            "target_true": None
            if run.target_true is None
            else _text("target_true", run.target_true, 4 * MAX_NAME, empty=True),
            "verdict": _text("verdict", run.verdict, MAX_NAME, empty=True),
        }
        prompt = str(texts["template"]).replace("{}", str(texts["subject"]))
        searched = (
            prompt,
            texts["target_new"],
            texts["target_true"] or "",
            texts["model"],
            texts["method"],
            run.digest,
        )
        row = {
            **texts,
            "digest": _digest(run.digest),
            "created": _time(run.created),
            "edits": _whole("edits", run.edits, 1, 100_000),
            "metrics": _metrics(run.metrics),
            "seconds": float(run.seconds),
            "search": _folded("\n".join(map(str, searched))),
        }
        visit = {"digest": row["digest"], "session": row["session"], "created": row["created"]}
        with self._writing("record the run") as connection:
            _upsert(connection, RUNS, ("digest",), row)
            _upsert(connection, VISITS, ("digest", "session"), visit)

    def set_note(self, digest: str, text: str, author: str = "") -> Note | None:
        """Write an author's note on a run; an empty text removes it. Raises UnknownName for a run that isn't there."""
        text = _text("note", text, MAX_NOTE, empty=True, lines=True)
        author = _text("author", author, MAX_NAME, empty=True)
        now = datetime.now(UTC)
        with self._writing("save the note") as connection:
            _must_exist(connection, digest)
            mine = sa.and_(NOTES.c.digest == digest, NOTES.c.author == author)
            if not text:
                connection.execute(sa.delete(NOTES).where(mine))
                return None
            row = {"digest": digest, "author": author, "text": text, "created": now, "updated": now}
            _upsert(connection, NOTES, ("digest", "author"), row, keep=("created",))
            return Note(**connection.execute(sa.select(NOTES).where(mine)).one()._mapping)

    def set_tags(self, digest: str, tags: Iterable[str], author: str = "") -> tuple[str, ...]:
        """Replace an author's tags of a run; they are case-folded, deduplicated and sorted."""
        wanted = _tags(tags)
        author = _text("author", author, MAX_NAME, empty=True)
        with self._writing("save the tags") as connection:
            _must_exist(connection, digest)
            connection.execute(sa.delete(TAGS).where(TAGS.c.digest == digest, TAGS.c.author == author))
            if wanted:
                rows = [{"digest": digest, "author": author, "tag": tag} for tag in wanted]
                connection.execute(sa.insert(TAGS), rows)
        return tuple(wanted)

    def set_verdict(
        self, digest: str, verdict: str, failure: str = "", severity: int = 0, author: str = ""
    ) -> Verdict | None:
        """Write an author's verdict on a run; one that says nothing removes it."""
        author = _text("author", author, MAX_NAME, empty=True)
        _judgement(verdict, failure, severity)
        made = Verdict(digest, author, verdict, failure, severity, datetime.now(UTC))
        with self._writing("save the verdict") as connection:
            _must_exist(connection, digest)
            if not (verdict or failure or severity):
                mine = sa.and_(VERDICT_ROWS.c.digest == digest, VERDICT_ROWS.c.author == author)
                connection.execute(sa.delete(VERDICT_ROWS).where(mine))
                return None
            _upsert(connection, VERDICT_ROWS, ("digest", "author"), asdict(made))
        return made

    def delete_run(self, digest: str, session: str | None = None) -> bool:
        """Delete a run with its notes, tags and verdicts; given a session only its visit, while others remain.

        A run that a review queue holds stays there, without what was written outside the queue, until the queue goes.
        True when there was something to delete.
        """
        if not _DIGEST.fullmatch(str(digest)):
            return False
        with self._writing("delete the run") as connection:
            if session is not None:
                mine = sa.and_(VISITS.c.digest == digest, VISITS.c.session == session)
                if not connection.execute(sa.delete(VISITS).where(mine)).rowcount:
                    return False
                others = sa.select(VISITS).where(VISITS.c.digest == digest).order_by(VISITS.c.created.desc()).limit(1)
                latest = connection.execute(others).one_or_none()
                if latest is not None:  # the run now belongs to whoever asked last among those who remain
                    values = {"session": latest.session, "created": latest.created}
                    connection.execute(sa.update(RUNS).where(RUNS.c.digest == digest).values(**values))
                    return True
                if connection.scalar(sa.select(REVIEW_ITEMS.c.queue).where(REVIEW_ITEMS.c.digest == digest).limit(1)):
                    for table in (NOTES, TAGS, VERDICT_ROWS):
                        connection.execute(sa.delete(table).where(table.c.digest == digest))
                    return True
            return bool(connection.execute(sa.delete(RUNS).where(RUNS.c.digest == digest)).rowcount)

    # Reading

    def runs(
        self,
        *,
        text: str = "",
        model: str = "",
        method: str = "",
        tag: str = "",
        verdict: str = "",
        session: str = "",
        unreviewed: bool = False,
        limit: int = 50,
        offset: int = 0,
    ) -> list[Entry]:
        """Runs with all that was asked for, newest first.

        Every word of `text` must occur in the filled prompt, the objects, the model, the method or the digest, without
        regard to case; `verdict` is the numbers' or a person's; `session` restricts to what that session asked, and
        to its own verdicts; `unreviewed` to runs without a person's verdict.
        """
        limit, offset = _whole("limit", limit, 1, MAX_PAGE), _whole("offset", offset, 0, 2**31)
        chosen = self._select(text, model, method, tag, verdict, session, unreviewed)
        created = VISITS.c.created if session else RUNS.c.created
        chosen = chosen.order_by(created.desc(), RUNS.c.digest).limit(limit).offset(offset)
        with self._reading() as connection:
            return _entries(connection, connection.execute(chosen).all(), session)

    def count(
        self,
        *,
        text: str = "",
        model: str = "",
        method: str = "",
        tag: str = "",
        verdict: str = "",
        session: str = "",
        unreviewed: bool = False,
    ) -> int:
        """How many runs the same filters give."""
        chosen = self._select(text, model, method, tag, verdict, session, unreviewed).subquery()
        with self._reading() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(chosen)) or 0

    def get(self, digest: str, session: str = "") -> Entry | None:
        """One run by its digest, or None; with a session as in its list."""
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            return None
        with self._reading() as connection:
            chosen = sa.select(RUNS).where(RUNS.c.digest == digest)
            entries = _entries(connection, connection.execute(chosen).all(), session)
        return entries[0] if entries else None

    def choices(self, session: str) -> dict[str, tuple[str, ...]]:
        """The models, methods and tags that occur in a session's history, for filter menus."""
        mine = sa.select(VISITS.c.digest).where(VISITS.c.session == session)
        wanted = {
            "model": sa.select(RUNS.c.model).where(RUNS.c.digest.in_(mine)),
            "method": sa.select(RUNS.c.method).where(RUNS.c.digest.in_(mine)),
            "tag": sa.select(TAGS.c.tag).where(TAGS.c.digest.in_(mine), TAGS.c.author.in_(("", session))),
        }
        with self._reading() as connection:
            return {name: tuple(sorted(connection.scalars(of.distinct()).all())) for name, of in wanted.items()}

    def export(self, session: str = "") -> list[dict[str, Any]]:
        """Everything, oldest first, as plain JSON values (times in ISO 8601)."""
        chosen = self._select("", "", "", "", "", session, False).order_by(RUNS.c.created, RUNS.c.digest)
        with self._reading() as connection:
            return [_plain(entry) for entry in _entries(connection, connection.execute(chosen).all(), session)]

    def _select(
        self, text: str, model: str, method: str, tag: str, verdict: str, session: str, unreviewed: bool
    ) -> sa.Select[Any]:
        chosen = sa.select(RUNS)
        if session:
            columns = [c for c in RUNS.c if c.name not in ("session", "created")]
            chosen = (
                sa.select(*columns, VISITS.c.session, VISITS.c.created).join(VISITS).where(VISITS.c.session == session)
            )
        for word in _folded(text[:1000]).split():
            chosen = chosen.where(RUNS.c.search.contains(_searchable(word), autoescape=True))
        if model:
            chosen = chosen.where(RUNS.c.model == _searchable(model))
        if method:
            chosen = chosen.where(RUNS.c.method == _searchable(method))
        if tag:
            tagged = sa.select(TAGS.c.digest).where(TAGS.c.tag == _folded(_searchable(tag)))
            tagged = tagged.where(TAGS.c.author.in_(("", session))) if session else tagged
            chosen = chosen.where(RUNS.c.digest.in_(tagged))
        mine = VERDICT_ROWS.c.author.in_(("", session)) if session else sa.true()
        if verdict:
            judged = sa.select(VERDICT_ROWS.c.digest).where(mine, VERDICT_ROWS.c.verdict == _searchable(verdict))
            chosen = chosen.where(sa.or_(RUNS.c.verdict == _searchable(verdict), RUNS.c.digest.in_(judged)))
        if unreviewed:
            chosen = chosen.where(RUNS.c.digest.not_in(sa.select(VERDICT_ROWS.c.digest).where(mine)))
        return chosen

    # Review queues

    def add_queue(self, token: str, title: str, owner: str, digests: Sequence[str]) -> ReviewQueue:
        """Make a queue of runs of this owner, in this order. Raises BadInput on none, too many, or a run that is not
        in the owner's history.
        """
        if not _TOKEN.fullmatch(token):
            raise BadInput("token", "is not 16 to 64 letters and digits.", "Use secrets.token_urlsafe.")
        wanted = list(dict.fromkeys(_digest(digest) for digest in _several("runs", digests)))
        if not 1 <= len(wanted) <= MAX_QUEUE:
            raise BadInput("runs", f"{len(wanted):,} chosen.", f"Choose 1 to {MAX_QUEUE}.")
        made = ReviewQueue(
            token, _text("title", title, MAX_NAME), _text("owner", owner, MAX_NAME), datetime.now(UTC), len(wanted)
        )
        with self._writing("make the queue") as connection:
            mine = sa.select(VISITS.c.digest).where(VISITS.c.session == made.owner, VISITS.c.digest.in_(wanted))
            if missing := set(wanted) - set(connection.scalars(mine)):
                raise BadInput(
                    "runs", f"{len(missing)} are not in your history.", "Open them first, or leave them out."
                )
            values = {"token": token, "title": made.title, "owner": made.owner, "created": made.created}
            connection.execute(sa.insert(REVIEW_QUEUES), values)
            items = [{"queue": token, "digest": digest, "place": place} for place, digest in enumerate(wanted)]
            connection.execute(sa.insert(REVIEW_ITEMS), items)
        return made

    def queue(self, token: str) -> ReviewQueue | None:
        """One queue by its token, or None; safe with any text."""
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            return None
        with self._reading() as connection:
            found = connection.execute(_queues().where(REVIEW_QUEUES.c.token == token)).one_or_none()
        return None if found is None else ReviewQueue(**found._mapping)

    def queues(self, owner: str) -> list[ReviewQueue]:
        """The queues that this session made, newest first."""
        chosen = _queues().where(REVIEW_QUEUES.c.owner == owner)
        with self._reading() as connection:
            rows = connection.execute(chosen.order_by(REVIEW_QUEUES.c.created.desc(), REVIEW_QUEUES.c.token)).all()
        return [ReviewQueue(**row._mapping) for row in rows]

    def delete_queue(self, token: str, owner: str) -> bool:
        """Delete a queue of this owner with every label in it, and the runs that only it still held."""
        with self._writing("delete the queue") as connection:
            held = list(connection.scalars(sa.select(REVIEW_ITEMS.c.digest).where(REVIEW_ITEMS.c.queue == token)))
            mine = sa.and_(REVIEW_QUEUES.c.token == token, REVIEW_QUEUES.c.owner == owner)
            if not connection.execute(sa.delete(REVIEW_QUEUES).where(mine)).rowcount:
                return False
            wanted = [sa.select(table.c.digest).where(table.c.digest.in_(held)) for table in (VISITS, REVIEW_ITEMS)]
            kept = {digest for one in wanted for digest in connection.scalars(one)}
            connection.execute(sa.delete(RUNS).where(RUNS.c.digest.in_([d for d in held if d not in kept])))
        return True

    def queue_runs(self, token: str) -> list[Run]:
        """The runs of a queue in its order. What people wrote on them elsewhere is not part of it."""
        chosen = sa.select(RUNS).join(REVIEW_ITEMS).where(REVIEW_ITEMS.c.queue == token).order_by(REVIEW_ITEMS.c.place)
        with self._reading() as connection:
            return [_run(row._mapping) for row in connection.execute(chosen)]

    def labels(self, token: str, digest: str = "") -> list[ReviewLabel]:
        """What has been said in a queue, of every run or of one, by run and reviewer."""
        chosen = sa.select(REVIEW_LABELS).where(REVIEW_LABELS.c.queue == token)
        if digest:
            chosen = chosen.where(REVIEW_LABELS.c.digest == digest)
        with self._reading() as connection:
            rows = connection.execute(chosen.order_by(REVIEW_LABELS.c.digest, REVIEW_LABELS.c.reviewer)).all()
        return [_label(row._mapping) for row in rows]

    def set_labels(self, token: str, labels: Iterable[ReviewLabel], *, newer: bool = False) -> int:
        """Write opinions of runs of a queue; an empty one removes its label. All of them or none.

        With `newer` a label gives way only to one that was written later. How many were written. Raises BadInput on an
        opinion that breaks a limit, UnknownName on a run that is not in the queue.
        """
        checked = [_checked(label) for label in labels]
        keys = ("queue", "digest", "reviewer")
        done = 0
        with self._writing("save the review") as connection:
            held = set(connection.scalars(sa.select(REVIEW_ITEMS.c.digest).where(REVIEW_ITEMS.c.queue == token)))
            for label in checked:
                if label.digest not in held:
                    raise UnknownName("run in this queue", label.digest, sorted(held)[:3])
                mine = sa.and_(
                    REVIEW_LABELS.c.queue == token,
                    REVIEW_LABELS.c.digest == label.digest,
                    REVIEW_LABELS.c.reviewer == label.reviewer,
                )
                if newer:
                    before = connection.scalar(sa.select(REVIEW_LABELS.c.updated).where(mine))
                    if before is not None and before >= label.updated:
                        continue
                done += 1
                if label.said == Opinion():
                    connection.execute(sa.delete(REVIEW_LABELS).where(mine))
                    continue
                said = {**asdict(label.said), "tags": json.dumps(label.said.tags, ensure_ascii=False)}
                row = {
                    "queue": token, "digest": label.digest, "reviewer": label.reviewer, "updated": label.updated, **said
                }  # fmt: skip
                _upsert(connection, REVIEW_LABELS, keys, row)
        return done

    # Connections

    @contextmanager
    def _writing(self, what: str) -> Iterator[Connection]:
        with _storing(what), self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with _storing("read the notebook"), self._engine.connect() as connection, connection.begin():
            yield connection


_IN_MEMORY = "History and notes aren't being saved: {reason}. They are kept in memory until the app stops."


# Opening ---------------------------------------------------------------------------------------------------------


def _url(place: str | Path) -> URL:
    """The database address of a path or URL. Raises BadInput for any other kind of database."""
    if isinstance(place, Path) or "://" not in place:
        return URL.create("sqlite", database=str(place))
    try:
        url = make_url(re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", place))
    except SQLAlchemyError as error:
        raise BadInput("database", "is not a database URL.", _URL_HELP) from error
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise BadInput("database", f"{url.drivername!r:.40} is not supported.", _URL_HELP)
    return url


_URL_HELP = "Use a file path, sqlite:///FILE, or postgresql://USER:PASSWORD@HOST/NAME."


def _engine(url: URL) -> Engine:
    try:
        if url.get_backend_name() == "postgresql":
            return sa.create_engine(
                url, hide_parameters=True, pool_pre_ping=True, pool_size=4, connect_args={"connect_timeout": 10}
            )
        in_memory = not url.database or url.database == ":memory:"
        # One connection for a database in memory: it lives and dies with it.
        pool = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0} if in_memory else {}
        engine = sa.create_engine(
            url, hide_parameters=True, connect_args={"timeout": 10, "check_same_thread": False}, **pool
        )
    except ImportError as error:
        raise StoreError(
            "The driver for PostgreSQL isn't installed.", "Install it with: pip install 'psycopg[binary]'."
        ) from error
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # transactions are begun by _begin_sqlite, so that DDL is inside them too
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA trusted_schema = OFF")


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the lock at once: one that first reads and then upgrades fails when another came in between.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrated(engine: Engine) -> Engine:
    """Bring the tables up to date, one process at a time. Raises StoreError when they are newer than this version."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    try:
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            if engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            current = MigrationContext.configure(connection).get_current_revision()
            if current is not None and current not in known:
                raise StoreError(
                    f"The notebook was made by a newer version of this app (its tables are at {current!r}).",
                    "Update the app, or choose another place with MEGA_DATABASE_URL.",
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except BaseException:
        engine.dispose()
        raise
    return engine


def _set_damaged_aside(path: Path) -> str:
    """Check a SQLite file and rename it when damaged. Returns the notice for the person, empty when all is well."""
    if not path.exists():
        return ""
    connection = sqlite3.connect(path, timeout=10)
    try:
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()
        reason = "" if found == ("ok",) else str(found)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        reason = str(error)
    finally:
        connection.close()
    if not reason:
        return ""
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**9:09d}")
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    log.error("The notebook was damaged and is set aside as %s: %s.", aside.name, reason)
    return f"The notebook's file was damaged and is kept as {aside.name}; a new one was begun."


def _backup_before_migrating(path: Path) -> None:
    """Copy a SQLite notebook whose tables are about to change."""
    if not path.exists():
        return
    engine = _engine(URL.create("sqlite", database=str(path)))
    try:
        with engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()
    script = ScriptDirectory(str(Path(__file__).parent / "migrations"))
    head = script.get_current_head()
    known = {step.revision for step in script.walk_revisions()}
    if current is None or current == head or current not in known:
        return
    copy = path.with_name(f"{path.name}.before-{head}")
    partial = copy.with_name(f"{copy.name}.partial")
    with suppress(FileNotFoundError):
        partial.unlink()
    source, target = sqlite3.connect(path), sqlite3.connect(partial)
    try:
        source.backup(target)
    finally:
        source.close()
        target.close()
    shutil.move(partial, copy)


# Rows ------------------------------------------------------------------------------------------------------------


@contextmanager
def _storing(what: str) -> Iterator[None]:
    """Turn the database's errors into one a person can act on; details, which name hosts and paths, go to the log."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        log.exception("Could not %s.", what)
        if "full" in str(cause) or "No space" in str(cause):
            raise StoreError(f"Could not {what}: the disk is full.", "Make room and try again.") from error
        if "readonly" in str(cause):
            raise StoreError(f"Could not {what}: the file is read-only.", "Allow writing and try again.") from error
        raise StoreError(
            f"Could not {what}: the database did not answer as it should ({type(cause).__name__}).",
            "Try again; if it stays, check that the database runs and MEGA_DATABASE_URL is right.",
        ) from error


def _upsert(
    connection: Connection, table: sa.Table, keys: Sequence[str], row: Mapping[str, Any], keep: Sequence[str] = ()
) -> None:
    """Insert, or replace every column but the keys and `keep`."""
    make = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = make(table).values(**row)
    changed = {name: statement.excluded[name] for name in row if name not in (*keys, *keep)}
    connection.execute(statement.on_conflict_do_update(index_elements=list(keys), set_=changed))


def _must_exist(connection: Connection, digest: str) -> None:
    known = isinstance(digest, str) and _DIGEST.fullmatch(digest)
    if not known or connection.scalar(sa.select(RUNS.c.digest).where(RUNS.c.digest == digest)) is None:
        recent = connection.scalars(sa.select(RUNS.c.digest).order_by(RUNS.c.created.desc()).limit(3)).all()
        raise UnknownName("run", str(digest), recent)


def _entries(connection: Connection, rows: Sequence[sa.Row[Any]], reader: str = "") -> list[Entry]:
    """The runs of these rows, in their order, with what is attached to them: three queries whatever their number.

    With a reader, tags are those of this session and of nobody in particular.
    """
    digests = [row.digest for row in rows]

    def attached(table: sa.Table, *order: sa.Column[Any]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for start in range(0, len(digests), 500):  # databases bound the number of parameters
            wanted = sa.select(table).where(table.c.digest.in_(digests[start : start + 500])).order_by(*order)
            for row in connection.execute(wanted):
                found.setdefault(row.digest, []).append(row._mapping)
        return found

    tags = attached(TAGS, TAGS.c.tag)
    notes = attached(NOTES, NOTES.c.author)
    verdicts = attached(VERDICT_ROWS, VERDICT_ROWS.c.author)
    return [
        Entry(
            run=_run(row._mapping),
            tags=tuple(
                sorted({t["tag"] for t in tags.get(row.digest, ()) if not reader or t["author"] in ("", reader)})
            ),
            notes=tuple(Note(**note) for note in notes.get(row.digest, ())),
            verdicts=tuple(Verdict(**verdict) for verdict in verdicts.get(row.digest, ())),
        )
        for row in rows
    ]


def _run(row: Mapping[Any, Any]) -> Run:
    values = {name: value for name, value in row.items() if name != "search"}
    return Run(**{**values, "metrics": json.loads(values["metrics"])})


def _queues() -> sa.Select[Any]:
    """Queues with the number of their runs."""
    size = sa.select(sa.func.count()).where(REVIEW_ITEMS.c.queue == REVIEW_QUEUES.c.token).scalar_subquery()
    return sa.select(REVIEW_QUEUES, size.label("size"))


def _label(row: Mapping[Any, Any]) -> ReviewLabel:
    said = Opinion(row["verdict"], row["failure"], row["severity"], tuple(json.loads(row["tags"])), row["note"])
    return ReviewLabel(row["digest"], row["reviewer"], said, row["updated"])


def _plain(entry: Entry) -> dict[str, Any]:
    def value(item: Any) -> Any:
        if isinstance(item, datetime):
            return item.isoformat()
        if isinstance(item, Mapping):
            return {key: value(inner) for key, inner in item.items()}
        return [value(inner) for inner in item] if isinstance(item, list | tuple) else item

    whole = asdict(entry)
    return value({**whole.pop("run"), **whole})


# Checking what comes in -----------------------------------------------------------------------------------------------


def _text(name: str, text: str, limit: int, *, empty: bool = False, lines: bool = False) -> str:
    """NFC text within its limit; text is data, so nothing is escaped. Raises BadInput naming the field."""
    if not isinstance(text, str):
        raise BadInput(name, f"expected text, got {type(text).__name__}.", "Type it as text.")
    if len(text) > 4 * limit:  # before normalising: normal forms of huge strings are slow
        raise BadInput(name, f"{len(text):,} characters, the limit is {limit:,}.", "Shorten it.")
    allowed = "\n\t" if lines else ""
    text = text.replace("\r\n", "\n") if lines else text
    bad = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in allowed), None)
    if bad is not None:
        raise BadInput(name, f"contains the control character U+{ord(bad):04X}.", "Remove it.")
    clean = unicodedata.normalize("NFC", text).strip()
    if not clean and not empty:
        raise BadInput(name, "is empty.", "Fill it in.")
    if len(clean) > limit:
        raise BadInput(name, f"{len(clean):,} characters, the limit is {limit:,}.", "Shorten it.")
    return clean


def _searchable(word: str) -> str:
    """A filter as a database takes it: PostgreSQL refuses NUL and lone surrogates, which match nothing anyway."""
    return "".join("\ufffd" if c == "\0" or unicodedata.category(c) == "Cs" else c for c in word)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _several(name: str, values: Iterable[str]) -> list[str]:
    if isinstance(values, str):
        raise BadInput(name, "expected a list, got one text.", "Give a list of texts.")
    return list(values)


def _tags(tags: Iterable[str]) -> list[str]:
    """Case-folded, deduplicated, sorted."""
    wanted = sorted({_folded(_text("tag", tag, MAX_TAG)) for tag in _several("tags", tags)})
    if len(wanted) > MAX_TAGS:
        raise BadInput("tags", f"{len(wanted)} tags, the limit is {MAX_TAGS}.", "Leave some out.")
    return wanted


def _judgement(verdict: str, failure: str, severity: int) -> None:
    if verdict and verdict not in VERDICTS:
        raise UnknownName("verdict", str(verdict), VERDICTS)
    if failure and failure not in FAILURES:
        raise UnknownName("failure type", str(failure), FAILURES)
    _whole("severity", severity, 0, 3)


def _checked(label: ReviewLabel) -> ReviewLabel:
    said = label.said
    _judgement(said.verdict, said.failure, said.severity)
    note = _text("note", said.note, MAX_NOTE, empty=True, lines=True)
    return ReviewLabel(
        _digest(label.digest),
        _text("reviewer name", label.reviewer, MAX_REVIEWER),
        replace(said, tags=tuple(_tags(said.tags)), note=note),
        _time(label.updated),
    )


def _digest(digest: str) -> str:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise BadInput("digest", "is not 64 hex characters.", "Use the digest of the question.")
    return digest


def _whole(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(name, f"{value!r:.40} is not a whole number from {low} to {high}.", "Give one in that range.")
    return value


def _time(value: datetime) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise BadInput("created", "is not a time with its time zone.", "Use datetime.now(UTC).")
    return value


def _metrics(metrics: Mapping[str, float]) -> str:
    bad = [name for name, value in metrics.items() if not isinstance(value, int | float) or not isfinite(value)]
    if bad:
        raise BadInput("metrics", f"{', '.join(map(str, bad))} is not a finite number.", "Leave it out.")
    text = json.dumps({str(name): float(value) for name, value in metrics.items()}, sort_keys=True)
    if len(text) > MAX_METRICS_BYTES:
        raise BadInput("metrics", f"{len(text):,} bytes, the limit is {MAX_METRICS_BYTES:,}.", "Keep a summary only.")
    return text
