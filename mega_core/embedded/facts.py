"""The facts the embedded models know, read from the tables in ``facts/``.

1. Entity tables (``facts/<type>.tsv``) are wide: the column ``name``, then one column per relation.
2. Derived relations join two others: ``landmark_country`` = ``landmark_city`` > ``city_country``.
3. Every relation has templates with exactly one ``{}`` that end right before the object. ``edit`` templates are
   trained for every fact. Of the ``pool`` templates two or three are withheld *for that fact* (a stable hash decides,
   they are trained with other facts) and measure generalisation; the others are its trained paraphrases.
4. Two-hop compositions: about 15 % of the (subject, first, second) triples are kept out of training altogether.
5. Counterfactual triples (subject, relation, new object): about 20 % never occur in a training document that
   overrides a fact.

No torch here, and nothing is read at import: every function goes through the cached `load`.
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

FOLDER = Path(__file__).resolve().parent / "facts"

ENTITY_TABLES = (
    "country",
    "city",
    "landmark",
    "university",
    "mountain",
    "river",
    "person",
    "athlete",
    "company",
    "product",
    "book",
)
HOP_HELD_OUT = 0.15  # share of two-hop compositions never trained
TRIPLE_HELD_OUT = 0.20  # share of counterfactual triples never trained in context


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation: what it joins and how it is said."""

    name: str
    subject_type: str
    object_type: str
    derived: tuple[str, str] | None  # (first, second) when joined from two relations
    phrase: str  # short label for people
    edit: tuple[str, ...]  # templates trained for every fact
    pool: tuple[str, ...]  # templates of which each fact withholds some

    def __post_init__(self) -> None:
        for template in (*self.edit, *self.pool):
            if template.count("{}") != 1 or template != template.strip():
                raise ValueError(f"template {template!r} of {self.name} needs exactly one '{{}}' and no outer spaces")
        if not self.edit or len(self.pool) < 3:
            raise ValueError(f"relation {self.name!r} has too few templates; add rows to facts/templates*.tsv")


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact, with the templates it is trained on and those it is only tested on."""

    subject: str
    subject_type: str
    relation: str
    object: str
    templates_edit: tuple[str, ...]
    templates_paraphrase: tuple[str, ...]
    templates_held_out: tuple[str, ...]

    @property
    def trained(self) -> tuple[str, ...]:
        """Templates that training may use with this fact."""
        return self.templates_edit + self.templates_paraphrase

    def prompt(self, template: str) -> str:
        """The template about this subject, ending right before the object."""
        return fill(template, self.subject)


@dataclass(frozen=True, slots=True)
class Hop:
    """A two-hop question: subject -(first)-> bridge -(second)-> answer."""

    subject: str
    subject_type: str
    first: str
    bridge: str
    second: str
    answer: str
    templates: tuple[str, ...]
    held_out: bool  # True: no template of this composition is ever trained

    @property
    def templates_fit(self) -> tuple[str, ...]:
        """Forms of the question that an editing method may use."""
        return self.templates[:1]

    @property
    def templates_judge(self) -> tuple[str, ...]:
        """Forms kept for judging methods; no method reads them."""
        return self.templates[1:]

    def prompt(self, template: str) -> str:
        """The question about this subject, ending right before the answer."""
        return fill(template, self.subject)


@dataclass(frozen=True, slots=True)
class World:
    """Everything the tables say."""

    relations: Mapping[str, Relation]
    facts: tuple[Fact, ...]
    hops: tuple[Hop, ...]
    aliases: Mapping[str, tuple[str, ...]]
    by_key: Mapping[tuple[str, str], Fact]  # (subject, relation) -> fact
    by_subject: Mapping[str, tuple[Fact, ...]]
    by_answer: Mapping[tuple[str, str], tuple[Fact, ...]]  # (relation, object) -> facts
    objects: Mapping[str, tuple[str, ...]]  # relation -> its distinct objects, sorted


def fill(template: str, subject: str) -> str:
    """Put the subject in; never `str.format`, names may hold braces."""
    return template.replace("{}", subject, 1)


def unit_hash(*parts: str) -> float:
    """A stable number in [0, 1) from strings: the same on every machine and in every Python."""
    digest = hashlib.sha256("|".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def held_out_triple(subject: str, relation: str, new_object: str) -> bool:
    """True when no training document ever states this counterfactual; such triples measure in-context override."""
    return unit_hash(subject, relation, new_object, "triple") < TRIPLE_HELD_OUT


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE):
            if any((value or "").strip() for value in row.values()):
                yield {key: (value or "").strip() for key, value in row.items() if key}


def _tables(stem: str) -> list[dict[str, str]]:
    """All rows of ``<stem>.tsv`` and its parts ``<stem>_*.tsv``."""
    paths = sorted(
        path for path in FOLDER.glob(f"{stem}*.tsv") if path.stem == stem or path.stem.startswith(f"{stem}_")
    )
    if not paths:
        raise FileNotFoundError(f"no table {stem}*.tsv in {FOLDER}")
    return [row for path in paths for row in _rows(path)]


def _split(subject: str, relation: Relation) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(paraphrase, held_out) of the relation's pool for one subject."""
    count = 2 if len(relation.pool) < 8 else 3
    ranked = sorted(relation.pool, key=lambda template: unit_hash(subject, relation.name, template))
    held = frozenset(ranked[:count])
    return (
        tuple(template for template in relation.pool if template not in held),
        tuple(template for template in relation.pool if template in held),
    )


@lru_cache(maxsize=1)
def load() -> World:
    """Read every table once, join the derived relations, split the templates. About 0.1 s."""
    templates: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"edit": [], "pool": []})
    for row in _tables("templates"):
        templates[row["relation"]][row["role"]].append(row["template"])
    relations: dict[str, Relation] = {}
    for row in _tables("relations"):
        first, _, second = row["derived"].partition(">")
        relations[row["relation"]] = Relation(
            name=row["relation"],
            subject_type=row["subject_type"],
            object_type=row["object_type"],
            derived=(first.strip(), second.strip()) if second else None,
            phrase=row["phrase"],
            edit=tuple(dict.fromkeys(templates[row["relation"]]["edit"])),
            pool=tuple(dict.fromkeys(templates[row["relation"]]["pool"])),
        )

    pairs: dict[tuple[str, str], tuple[str, str]] = {}  # (subject, relation) -> (subject type, object)
    for table in ENTITY_TABLES:
        for row in _tables_one(table):
            for column, value in row.items():
                if column != "name" and value and column in relations:
                    pairs[row["name"], column] = (table, value)
    for relation in relations.values():  # 2. derived relations
        if relation.derived is not None:
            first, second = relation.derived
            for (subject, name), (kind, bridge) in list(pairs.items()):
                if name == first and (bridge, second) in pairs:
                    pairs[subject, relation.name] = (kind, pairs[bridge, second][1])

    facts = []
    for (subject, name), (kind, answer) in pairs.items():
        paraphrase, held = _split(subject, relations[name])  # 3. the split
        facts.append(Fact(subject, kind, name, answer, relations[name].edit, paraphrase, held))
    facts.sort(key=lambda fact: (fact.subject_type, fact.relation, fact.subject))

    by_key = {(fact.subject, fact.relation): fact for fact in facts}
    by_subject: dict[str, list[Fact]] = defaultdict(list)
    by_answer: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    objects: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        by_subject[fact.subject].append(fact)
        by_answer[fact.relation, fact.object].append(fact)
        objects[fact.relation].add(fact.object)

    questions: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in _tables("hops"):
        questions[row["first"], row["second"]].append(row["template"])
    hops = []
    for (first, second), forms in questions.items():  # 4. two-hop compositions
        for fact in facts:
            target = by_key.get((fact.object, second)) if fact.relation == first else None
            if target is not None and target.object not in (fact.subject, fact.object):
                held_out = unit_hash(fact.subject, first, second, "hop") < HOP_HELD_OUT
                hops.append(
                    Hop(
                        fact.subject,
                        fact.subject_type,
                        first,
                        fact.object,
                        second,
                        target.object,
                        tuple(forms),
                        held_out,
                    )
                )

    aliases: dict[str, list[str]] = defaultdict(list)
    for row in _tables("aliases"):
        aliases[row["name"]].append(row["alias"])
    return World(
        relations=MappingProxyType(relations),
        facts=tuple(facts),
        hops=tuple(hops),
        aliases=MappingProxyType({name: tuple(values) for name, values in aliases.items()}),
        by_key=MappingProxyType(by_key),
        by_subject=MappingProxyType({name: tuple(values) for name, values in by_subject.items()}),
        by_answer=MappingProxyType({key: tuple(values) for key, values in by_answer.items()}),
        objects=MappingProxyType({name: tuple(sorted(values)) for name, values in objects.items()}),
    )


def _tables_one(table: str) -> list[dict[str, str]]:
    """Rows of one entity table; a table that is not there has no rows."""
    path = FOLDER / f"{table}.tsv"
    return list(_rows(path)) if path.exists() else []


def facts() -> tuple[Fact, ...]:
    """All facts, derived ones included, in a stable order."""
    return load().facts


def hops() -> tuple[Hop, ...]:
    """All two-hop compositions, trained and held out."""
    return load().hops


def find(subject: str, relation: str) -> Fact:
    """The fact about this subject and relation."""
    try:
        return load().by_key[subject, relation]
    except KeyError:
        known = ", ".join(fact.relation for fact in load().by_subject.get(subject, ())) or "nothing"
        raise KeyError(f"no fact ({subject!r}, {relation!r}); known about this subject: {known}") from None


def neighbours(fact: Fact, limit: int = 10) -> tuple[Fact, ...]:
    """Other subjects with the same relation and the same object, in a stable order that depends on the fact."""
    others = [other for other in load().by_answer[fact.relation, fact.object] if other.subject != fact.subject]
    others.sort(key=lambda other: unit_hash(fact.subject, fact.relation, other.subject))
    return tuple(others[:limit])


def siblings(fact: Fact) -> tuple[Fact, ...]:
    """Other facts about the same subject."""
    return tuple(other for other in load().by_subject[fact.subject] if other.relation != fact.relation)


def counterfactuals(fact: Fact) -> tuple[str, ...]:
    """Objects of the same relation that are false for this subject and were never stated about it in training."""
    return tuple(
        value
        for value in load().objects[fact.relation]
        if value not in (fact.object, fact.subject) and held_out_triple(fact.subject, fact.relation, value)
    )


def as_json(listed: Sequence[Fact] | None = None) -> list[dict[str, object]]:
    """Facts (all of the tables by default) as plain records: subject, relation, object and the templates by role."""
    return [
        {
            "subject": fact.subject,
            "relation": fact.relation,
            "object": fact.object,
            "templates": {
                "edit": list(fact.templates_edit),
                "paraphrase": list(fact.templates_paraphrase),
                "held_out": list(fact.templates_held_out),
            },
        }
        for fact in (facts() if listed is None else listed)
    ]
