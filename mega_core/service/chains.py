"""Multi-hop questions: a chain of facts, each step and the whole asked before and after an edit by several methods.

1. A chain goes through an edited fact: one that the tables know for it (`of`), or one that is put together from two or
   three known facts (`build`).
2. `start` queues the work: the unedited model is asked every step and every form of the whole question; then each
   method edits, the same is asked again, and the edit is undone. How an answer is judged: evaluation/protocols/mquake.
3. Beside it, at the edit prompt and at the whole question: the neurons that promote the answer (values) and what
   switches them on (queries), before and after.
4. What was found is kept in the folder cache/chains/<id> as JSON: chain.json, and path.json with the neurons.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pandas as pd

from mega_core import frames
from mega_core.cases import Case, Chain, Hop
from mega_core.embedded import facts as known
from mega_core.embedded import related
from mega_core.errors import ActionableError, BadInput, FrameError, StoreError, TimedOut
from mega_core.evaluation import multihop
from mega_core.events import Cancelled, Note, Reporter, stage
from mega_core.folders import new_folder
from mega_core.keys import digest as digest_of
from mega_core.methods.base import METHODS
from mega_core.records import EditRequest, Inspection, as_plain, request_from_plain

if TYPE_CHECKING:
    from mega_core.evaluation.asking import Told
    from mega_core.evaluation.protocols.mquake import Sheet
    from mega_core.models.adapter import ModelAdapter
    from mega_core.service.core import Core

SCHEMA_VERSION = 1
MAX_BYTES = 8 * 2**20
MOST_METHODS = 4
VIEWS = ("neurons?read=0&tail=0&top=30", "query?top=20")
PLACES = ("edit", "question")
"""Where neurons are looked at, by case: at the edit prompt, and at the first form of the whole question."""
PATH = ("neuron_scores", "query_layers", "query_neurons")
"""The frames of step 3, each with a column `method` in front."""
ID = re.compile(r"[0-9a-f]{32}")
WORDS, NEURONS = "chain.json", "path.json"
UNEDITED = ""


@dataclass(frozen=True, slots=True)
class Start:
    """A relation that chains of known facts begin with."""

    relation: str
    phrase: str
    subjects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a chain of known facts."""

    subject: str
    relation: str
    phrase: str
    object: str


@dataclass(frozen=True, slots=True)
class Route:
    """An edit, and a chain that goes through it."""

    request: EditRequest
    chain: Chain


@dataclass(frozen=True, slots=True)
class Said:
    """A prompt and what a model said."""

    prompt: str
    expected: str
    said: str
    right: bool


@dataclass(frozen=True, slots=True)
class Went:
    """How the chain went with one method, or with the unedited model (method "")."""

    method: str
    hops: tuple[Said, ...]
    """The steps after the edit; of the unedited model those before it."""
    questions: tuple[Said, ...]
    """The forms of the whole question; right: the new answer, of the unedited model the old one."""
    old: tuple[bool, ...]
    """For each form: whether it gives the old answer."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    refused: str = ""
    """Why the method made no edit; then nothing was asked."""

    @property
    def recalled(self) -> int:
        """Steps that are recalled."""
        return sum(hop.right for hop in self.hops)

    @property
    def answered(self) -> bool:
        """Whether one form of the whole question is answered."""
        return any(one.right for one in self.questions)

    @property
    def broke_at(self) -> str:
        """ "hop 2", "composition", or "" where it held."""
        where = multihop.broke_at([hop.right for hop in self.hops], self.answered)
        return "" if where is None else where if isinstance(where, str) else f"hop {where + 1}"


@dataclass(frozen=True)
class Traced:
    """What became of one chain."""

    id: str
    model: str
    request: EditRequest
    chain: Chain
    edited: int
    """The step that is edited, from 0."""
    before: Went
    knew: tuple[bool, ...]
    """For each step after the edit: whether the unedited model recalls it."""
    after: tuple[Went, ...]
    path: Mapping[str, pd.DataFrame]
    """PATH: method, then the frame's columns; `state` before or after, `case` the number of a place in PLACES."""
    made: str


class Chains:
    """Multi-hop questions."""

    def __init__(self, core: Core) -> None:
        self._core = core

    # 1. --------------------------------------------------------------------------------------------------------------

    def of(self, request: EditRequest) -> tuple[Route, ...]:
        """The two-hop questions that go through an edited fact, as far as the tables know it."""
        return tuple(Route(request, chain) for chain in related.chains_of(request))

    def starts(self) -> tuple[Start, ...]:
        """Where chains of known facts can begin, by relation."""
        subjects: dict[str, dict[str, None]] = {}
        for hop in known.hops():
            subjects.setdefault(hop.first, {})[hop.subject] = None
        relations = known.load().relations
        return tuple(Start(name, relations[name].phrase, tuple(sorted(them))) for name, them in subjects.items())

    def links(self, subject: str, relations: Sequence[str]) -> tuple[Link, ...]:
        """The steps of a chain that begins with this subject. Raises BadInput where the tables know no such fact."""
        found: list[Link] = []
        for relation in relations:
            fact = known.load().by_key.get((subject, relation))
            if fact is None:
                raise BadInput("chain", f"there is no fact {relation} of {subject[:60]!r}.", "Choose another one.")
            found.append(Link(subject, relation, known.load().relations[relation].phrase, fact.object))
            subject = fact.object
        return tuple(found)

    def onward(self, link: Link) -> tuple[Link, ...]:
        """The steps that can follow one, so that there is a wording for both together."""
        return tuple(
            self.links(hop.bridge, (hop.second,))[0]
            for hop in known.hops()
            if (hop.subject, hop.first) == (link.subject, link.relation)
        )

    def objects(self, links: Sequence[Link], edited: int) -> tuple[str, ...]:
        """New objects of the edited step that lead to another answer at the end of the chain."""
        old = links[-1].object
        fact = known.load().by_key[links[edited].subject, links[edited].relation]
        return tuple(
            new
            for new in known.counterfactuals(fact)
            if (end := _end(new, [link.relation for link in links[edited + 1 :]])) is not None and end != old
        )

    def build(self, links: Sequence[Link], edited: int, new: str, question: str = "") -> Route:
        """The edit of one step to a new object, and the chain through it; with a wording of one's own if one is given.

        Raises BadInput where the chain leads nowhere else.
        """
        if not 2 <= len(links) <= 3 or not 0 <= edited < len(links):
            raise BadInput("chain", f"has {len(links)} steps.", "Give two or three, and edit one of them.")
        facts = [known.load().by_key[link.subject, link.relation] for link in links]
        request = EditRequest(facts[edited].subject, facts[edited].templates_edit[0], new, facts[edited].object)
        hops = [Hop(p, p, related.names(fact.object)) for fact in facts for p in (fact.prompt(fact.templates_edit[0]),)]
        new_hops = [*hops[:edited], replace(hops[edited], answers=related.names(new))]
        subject = new
        for link in links[edited + 1 :]:
            fact = known.load().by_key.get((subject, link.relation))
            if fact is None:
                raise BadInput("chain", f"the tables know no {link.phrase} of {subject}.", "Choose another object.")
            prompt = fact.prompt(fact.templates_edit[0])
            new_hops.append(Hop(prompt, prompt, related.names(fact.object)))
            subject = fact.object
        if new_hops[-1].answers[0] == links[-1].object:
            raise BadInput("chain", "leads to the same answer as before.", "Choose another object.")
        forms = (question.strip(),) if question.strip() else self.forms(links)
        return Route(request, Chain(forms, tuple(hops), tuple(new_hops), hops[-1].answers, new_hops[-1].answers))

    def forms(self, links: Sequence[Link]) -> tuple[str, ...]:
        """The whole question in the wordings kept for judging; of three steps the first is put in as a noun."""
        first, second = links[-2:]
        hop = next(
            (hop for hop in known.hops()
             if (hop.subject, hop.first, hop.second) == (first.subject, first.relation, second.relation)), None
        )  # fmt: skip
        if hop is None:
            raise BadInput("chain", "there is no wording for these two steps together.", "Choose another step.")
        subject = first.subject if len(links) == 2 else _noun(links[0])
        return tuple(known.fill(form, subject) for form in hop.templates_judge)

    # 2. --------------------------------------------------------------------------------------------------------------

    def start(
        self, model: str, route: Route, methods: Sequence[str], owner: str, *, seed: int = 0
    ) -> tuple[str, str | None]:
        """Queue the work: the id of what it will find, for traced(), and its job; None when that is there already.

        Raises BadInput on a chain that the edit is no part of, and as Service.plan and submit do.
        """
        if not 1 <= len(methods) <= MOST_METHODS or len(set(methods)) < len(methods):
            raise BadInput("methods", f"{len(methods)} chosen.", f"Choose 1 to {MOST_METHODS} different ones.")
        request, chain = route.request, route.chain
        edited = _edited(request, chain)
        plans = []
        for name in methods:
            entry, chosen = self._core.asked(model, name, VIEWS, seed)
            plans.append(self._core.planned(entry, chosen, (request,), None, VIEWS, seed))
        weights = self._core.weights(self._core.settings.model(model))
        name = digest_of({"chain": plans, "asked": as_plain(chain), "weights": weights, "schema": SCHEMA_VERSION})[:32]
        if self.traced(name) is not None:
            return name, None

        def work(report: Reporter) -> str:
            with self._core.held(plans[0].model, report) as lm:
                found = _trace(lm, name, plans, chain, edited, report)
            _keep(found, self._folder, owner)
            return name

        job = self._core.start(
            work,
            owner=owner,
            key=f"chain:{name}",
            lane=model,
            method=f"chain by {','.join(methods)}",
            kind="chain",
            timeout_seconds=(len(methods) + 1) * self._core.settings.job_seconds,
        )
        return name, job

    def traced(self, name: str) -> Traced | None:
        """What became of a chain, by its id; None when it isn't here. Never computes; safe with any text.

        Raises StoreError on a damaged one.
        """
        folder = self._folder / name if ID.fullmatch(name) else None
        if folder is None or not folder.is_dir():
            return None
        return _load(folder)

    def listed(self, owner: str, limit: int = 12) -> tuple[Traced, ...]:
        """The last ones that this person asked for, newest first, without their paths; damaged ones are passed over."""
        folders = [one for one in self._folder.iterdir() if ID.fullmatch(one.name)] if self._folder.is_dir() else []
        newest = sorted(folders, key=lambda one: one.stat().st_mtime, reverse=True)
        return tuple(islice(_passing(newest, _shadow(owner)), limit))

    @property
    def _folder(self) -> Path:
        return self._core.settings.cache_dir / "chains"


def _end(subject: str, relations: Sequence[str]) -> str | None:
    """Where these relations lead from a subject, or None."""
    for relation in relations:
        fact = known.load().by_key.get((subject, relation))
        if fact is None:
            return None
        subject = fact.object
    return subject


def _noun(link: Link) -> str:
    """A step as a noun: "the author of the work Alchemist", "the city of birth of Ada Lovelace"."""
    own = re.search(r"\bthe \w+$", link.phrase) is not None
    return f"the {link.phrase} {link.subject}" if own else f"the {link.phrase} of {link.subject}"


def _edited(request: EditRequest, chain: Chain) -> int:
    """The step of a chain that the request edits."""
    for number, hop in enumerate(chain.new_hops):
        if hop.cloze == request.prompt and request.target_new in hop.answers:
            return number
    raise BadInput("chain", "does not go through the edited fact.", "Choose a chain of this edit.")


# 2. and 3. -----------------------------------------------------------------------------------------------------------


def _trace(
    lm: ModelAdapter, name: str, plans: Sequence[Inspection], chain: Chain, edited: int, report: Reporter
) -> Traced:
    from mega_core.attribution import look_at, read_view
    from mega_core.evaluation import asking
    from mega_core.evaluation.protocols.mquake import Sheet

    request = plans[0].requests[0]
    sheet = Sheet(lm, Case("chain", (request,), chains=(chain,)))
    wanted = asking.Wanted()
    sheet.want(wanted, None)
    for hop in (*chain.hops, *chain.new_hops):
        wanted.text(hop.cloze)
    views = tuple(read_view(text) for text in VIEWS)
    places = (replace(request, paraphrases=(), neighbours=()), _whole(request, chain))
    digest = lm.live_digest()

    def look(state: str, method: str) -> dict[str, pd.DataFrame]:
        found: dict[str, pd.DataFrame] = {}
        for part in look_at(lm, views, places, state, report).values():
            found |= part
        return {frame: found[frame].assign(method=method) for frame in PATH}

    with stage(report, "before", 2) as step:
        base = asking.ask(lm, wanted, report)
        step()
        looks = [look("before", UNEDITED)]
        step()
    before = _went(sheet, chain, UNEDITED, base, old=True)
    after: list[Went] = []
    with stage(report, "methods", len(plans)) as step:
        for plan in plans:
            method, began = METHODS[plan.method.name], perf_counter()
            notes: list[str] = []

            def tell(event: Any, notes: list[str] = notes) -> None:
                if isinstance(event, Note):
                    notes.append(event.text)
                report(event)

            try:
                change = method.prepare(lm, plan.requests, method.read(plan.method), plan.seed, tell)
                with change.applied(lm):
                    went = _went(sheet, chain, plan.method.name, asking.ask(lm, wanted, tell))
                    looks.append(look("after", plan.method.name))
                after.append(replace(went, seconds=perf_counter() - began, notes=tuple(dict.fromkeys(notes))[:8]))
            except (TimedOut, Cancelled):
                raise
            except ActionableError as error:
                report(Note(f"{method.title}: {error.what} {error.next_step}"))
                after.append(Went(plan.method.name, (), (), (), refused=f"{error.what} {error.next_step}"))
            if lm.live_digest() != digest or lm.hook_count():
                raise StoreError(f"{method.title} did not give {lm.name} back as it was.", "Ask again.")
            step()
    path = {frame: pd.concat([one[frame] for one in looks], ignore_index=True) for frame in PATH}
    made = datetime.now(UTC).isoformat(timespec="seconds")
    knew = tuple(hop.right for hop in _went(sheet, chain, UNEDITED, base).hops)
    return Traced(name, lm.name, request, chain, edited, before, knew, tuple(after), path, made)


def _whole(request: EditRequest, chain: Chain) -> EditRequest:
    """The whole question as a prompt with its old and its new answer, so that views can look at it."""
    question, subject = multihop.framed(chain.questions[0]), request.subject
    if subject not in question:  # views only need some word of the prompt as its subject
        words = [word for word in re.findall(r"\w+", chain.questions[0]) if question.count(word) == 1]
        subject = max(words, key=len, default=question.split()[-1])
    return EditRequest(subject, question.replace(subject, "{}", 1), chain.new_answers[0], chain.answers[0])


def _went(sheet: Sheet, chain: Chain, method: str, told: Told, *, old: bool = False) -> Went:
    """Every step and form as judged; of the unedited model (`old`) against what was so before the edit."""
    (one,) = sheet.chains
    right, wrong = (chain.answers, chain.new_answers) if old else (chain.new_answers, chain.answers)
    hops = [
        Said(recall.prompt, recall.expected, _short(told.texts[recall.prompt]), sheet.recalled(recall, told)[0] > 0)
        for recall in (one.before if old else one.hops)
    ]
    texts = [(question, told.texts[prompt]) for question, prompt in one.questions]
    return Went(
        method,
        tuple(hops),
        tuple(Said(q, right[0], _short(text), multihop.gives(text, right, wrong)) for q, text in texts),
        tuple(multihop.gives(text, chain.answers, chain.new_answers) for _, text in texts),
    )


def _short(text: str) -> str:
    """The first line of a continuation up to where its sentence ends."""
    line = multihop.answer_in(text)
    return (re.split(r"(?<=\w\w)[.!?](?:\s|$)", line, maxsplit=1)[0] or line)[:80]


# 4. ------------------------------------------------------------------------------------------------------------------


def _keep(found: Traced, root: Path, owner: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if (root / found.id).exists():
        return
    plain = {
        "schema_version": SCHEMA_VERSION,
        "kind": "chain",
        "owner": _shadow(owner),
        "model": found.model,
        "request": as_plain(found.request),
        "chain": as_plain(found.chain),
        "edited": found.edited,
        "before": asdict(found.before),
        "knew": list(found.knew),
        "after": [asdict(one) for one in found.after],
        "made": found.made,
    }
    path = {
        name: [
            {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
            for row in frame.to_dict(orient="records")
        ]
        for name, frame in found.path.items()
    }
    with new_folder(root / found.id, "chain") as folder:
        for file, content in ((WORDS, plain), (NEURONS, path)):
            (folder / file).write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def _shadow(owner: str) -> str:
    """What a file says of a person: their name can't be read from it."""
    return digest_of({"owner": owner})[:16]


def _load(folder: Path) -> Traced:
    try:
        path = _json(folder / NEURONS)
        return _read(folder.name, _plain(folder), {frame: _frame(path[frame], frame) for frame in PATH})
    except _DAMAGE as error:
        raise StoreError(
            f"The stored chain {folder.name[:8]} is damaged ({str(error)[:80]}).", "Ask it again."
        ) from error


def _passing(folders: Sequence[Path], owner: str) -> Iterator[Traced]:
    for folder in folders:
        try:
            plain = _plain(folder)
            if plain["owner"] == owner:
                yield _read(folder.name, plain, {})
        except _DAMAGE:
            continue


_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, FrameError, BadInput)


def _plain(folder: Path) -> Mapping[str, Any]:
    plain = _json(folder / WORDS)
    if plain["schema_version"] != SCHEMA_VERSION or plain["kind"] != "chain":
        raise ValueError("another version")
    return plain


def _json(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as stream:
        plain = json.loads(stream.read(MAX_BYTES + 1))
    if not isinstance(plain, dict):
        raise TypeError("no object")
    return plain


def _read(name: str, plain: Mapping[str, Any], path: Mapping[str, pd.DataFrame]) -> Traced:
    chain = plain["chain"]
    edited, hops = int(plain["edited"]), _hops(chain["new_hops"])
    if not 0 <= edited < len(hops):
        raise ValueError("no such step")
    return Traced(
        name,
        str(plain["model"]),
        request_from_plain(plain["request"]),
        Chain(
            tuple(chain["questions"]),
            _hops(chain["hops"]),
            hops,
            tuple(chain["answers"]),
            tuple(chain["new_answers"]),
        ),
        edited,
        _went_of(plain["before"]),
        tuple(map(bool, plain["knew"])),
        tuple(_went_of(one) for one in plain["after"]),
        path,
        str(plain["made"]),
    )


def _hops(plain: Sequence[Mapping[str, Any]]) -> tuple[Hop, ...]:
    return tuple(Hop(hop["question"], hop["cloze"], tuple(hop["answers"])) for hop in plain)


def _went_of(plain: Mapping[str, Any]) -> Went:
    def said(rows: Sequence[Mapping[str, Any]]) -> tuple[Said, ...]:
        return tuple(Said(str(r["prompt"]), str(r["expected"]), str(r["said"]), bool(r["right"])) for r in rows)

    return Went(
        str(plain["method"]), said(plain["hops"]), said(plain["questions"]), tuple(map(bool, plain["old"])),
        float(plain["seconds"]), tuple(map(str, plain["notes"])), str(plain["refused"]),
    )  # fmt: skip


def _frame(rows: Sequence[Mapping[str, Any]], name: str) -> pd.DataFrame:
    """A frame of its contract, with the column `method` in front; each method by itself, as keys don't name it."""
    parts = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        mine = [{k: v for k, v in row.items() if k != "method"} for row in rows if str(row["method"]) == method]
        part = frames.from_rows(mine, name)
        part.insert(0, "method", method)
        parts.append(part)
    return pd.concat(parts, ignore_index=True) if parts else frames.empty(name).assign(method=pd.Series(dtype=str))
