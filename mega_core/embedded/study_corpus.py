"""Facts of a dataset as a study model reads them: grouped, split into trained and withheld, turned into documents.

1. Records: CounterFact in its full schema or in EasyEdit's flat one (as cases), or facts as `facts.as_json`
   writes them.
2. Find the subject in every prompt. CounterFact names it for the edited fact only; in prompts about others it is what
   the prompt forms of the relation leave over. What no form fits is counted and left out.
3. Group by (subject, relation): every form in which the dataset asks, and one object. Two objects are a conflict: the
   fact is dropped and counted.
4. Withhold. Of each record one paraphrase, and about `NEIGHBOURS_HELD` of the prompts about other subjects: the form is
   never trained with that subject in any document, while the subject is trained in other forms and the form with other
   subjects. Every form of a relation is trained with all its subjects otherwise (ours).
5. Documents: those of the embedded models (`corpus`) without two-hop questions. CounterFact's paraphrases have noise in
   front; the noise of trained paraphrases is put in front of random questions. Each record's own counterfactual is
   never stated.

Sources: CounterFact, Meng et al. 2022 (arXiv 2202.05262); EasyEdit, Wang et al. 2023 (arXiv 2308.07269). No torch here.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mega_core.cases import Case
from mega_core.embedded import corpus as corpora
from mega_core.embedded import prose
from mega_core.embedded.corpus import Corpus, Document
from mega_core.embedded.facts import Fact, Relation, World, fill, unit_hash
from mega_core.errors import BadInput
from mega_core.records import MAX_SUBJECT, MAX_TEMPLATE, clean_text

FIELD = "facts"
MOST_TEMPLATES = 64
FEWEST = 8
"""Facts below which there is nothing to train."""
NEIGHBOURS_HELD = 0.15
"""Share of the prompts about other subjects whose form is withheld for that subject; ours."""
MOST_FORMS = 24
"""Forms of a relation that are trained with every subject, the commonest first; ours."""
LONGEST_NOISE = 200
"""Characters; of longer noise only the end is put in front of other questions."""
ASKED = 3
"""How much oftener than the others those facts are read that records edit or ask about as neighbours; ours."""
STORIES = 6000
"""Everyday stories that the tokenizer sees."""
NOISY = (0.12, 0.40)
"""Share of the facts with noise in front, early and late (ours): it slows learning, and has to be ignored at last."""

Key = tuple[str, str]
"""Subject and relation."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt of the dataset: the fact it asks for, in which form, behind which noise."""

    prompt: str
    key: Key
    form: str
    """With one {} for the subject."""
    answer: str
    noise: str = ""
    """What stands in front of the form, its blank included."""

    @property
    def bare(self) -> str:
        """The prompt without its noise."""
        return fill(self.form, self.key[0])


@dataclass(frozen=True, slots=True)
class Entry:
    """One record with the facts its prompts ask for."""

    raw: Mapping[str, Any]
    """As it stands in the file."""
    rewrite: Asked
    paraphrases: tuple[Asked, ...]
    neighbours: tuple[Asked, ...]
    attributes: tuple[Asked, ...]
    counterfactual: str
    """The object that an edit would put in; empty where the file has none."""
    held: tuple[str, ...] = ()
    """The paraphrases that are never trained."""


@dataclass(frozen=True, slots=True)
class Study:
    """Everything a study model is trained on and judged by."""

    schema: str
    """"counterfact", "easyedit" or "tables"."""
    world: World
    """The facts; a fact's `templates_edit` are the dataset's own forms, `templates_paraphrase` other forms of the
    relation, `templates_held_out` what is never trained with this subject."""
    entries: tuple[Entry, ...]
    noise: tuple[str, ...]
    """What may stand in front of a question."""
    avoided: frozenset[tuple[str, str, str]]
    """(subject, relation, object) that no document states."""
    conflicts: int
    """Facts dropped because the file gives them two objects."""
    unread: int
    """Prompts left out because no form of their relation fits."""
    unusable: int = 0
    """Records left out because they can't be read or have no true object."""

    def trained(self, asked: Asked) -> bool:
        """Whether documents may ask for this fact in this form."""
        fact = self.world.by_key.get(asked.key)
        return fact is not None and asked.form in fact.trained

    def known(self, asked: Asked) -> bool:
        """Whether the fact is trained at all, in whatever form."""
        fact = self.world.by_key.get(asked.key)
        return fact is not None and bool(fact.trained) and fact.object == asked.answer


# 1. records ----------------------------------------------------------------------------------------------------------


def of_cases(schema: str, pairs: Sequence[tuple[Mapping[str, Any], Case]], unusable: int = 0) -> Study:
    """The split of a dataset of edits: each record as it stands in the file, and as a case.

    Cases whose true object is unknown are left out. Raises BadInput when there are too few facts.
    """
    kept = [(raw, case) for raw, case in pairs if case.request.target_true]
    return _enough(_of_entries(schema, _Reader(kept), unusable + len(pairs) - len(kept)))


def of_tables(records: Sequence[Mapping[str, Any]], unusable: int = 0) -> Study:
    """Facts that say themselves what is withheld. Raises BadInput on a record without its fields, or too few facts."""
    return _enough(_of_tables(records, unusable))


def _enough(found: Study) -> Study:
    if (count := len(found.world.facts)) < FEWEST:
        raise BadInput(FIELD, f"the file has {count} usable facts.", f"Give at least {FEWEST}.")
    return found


def _text(value: object, where: str, limit: int) -> str:
    try:
        return clean_text(where, value, limit)  # type: ignore[arg-type]
    except BadInput as error:
        raise BadInput(FIELD, str(error), "Correct that record, or leave it out.") from error


def _texts(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MOST_TEMPLATES:
        raise BadInput(FIELD, f"{where} is not a list of up to {MOST_TEMPLATES} texts.", "Correct that record.")
    return tuple(dict.fromkeys(_text(one, where, MAX_TEMPLATE) for one in value))


def _of_tables(records: Sequence[Mapping[str, Any]], unusable: int) -> Study:
    objects: dict[Key, set[str]] = defaultdict(set)
    listed: dict[Key, Fact] = {}
    raws: dict[Key, Mapping[str, Any]] = {}
    for number, record in enumerate(records, start=1):
        where = f"record {number}"
        subject, relation, value = (
            _text(record.get(name), f"{where}, {name}", MAX_SUBJECT) for name in ("subject", "relation", "object")
        )
        forms = record.get("templates")
        if not isinstance(forms, dict):
            raise BadInput(FIELD, f"{where}, templates is not a table.", "Give edit, paraphrase and held_out.")
        roles = {role: _texts(forms.get(role), f"{where}, {role}") for role in ("edit", "paraphrase", "held_out")}
        if not roles["edit"] or any(form.count("{}") != 1 for group in roles.values() for form in group):
            raise BadInput(FIELD, f"{where} needs templates with exactly one {{}}.", "Correct that record.")
        held = tuple(form for form in roles["held_out"] if form not in roles["edit"] + roles["paraphrase"])
        objects[subject, relation].add(value)
        listed[subject, relation] = Fact(subject, relation, relation, value, roles["edit"], roles["paraphrase"], held)
        raws[subject, relation] = record
    facts = [fact for key, fact in listed.items() if len(objects[key]) == 1]
    entries = []
    for fact in facts:
        key = (fact.subject, fact.relation)
        out = [Asked(fact.prompt(form), key, form, fact.object) for form in fact.templates_held_out]
        rewrite = Asked(fact.prompt(fact.templates_edit[0]), key, fact.templates_edit[0], fact.object)
        others = [Asked(fact.prompt(form), key, form, fact.object) for form in fact.trained[1:]]
        entries.append(Entry(raws[key], rewrite, (*out, *others), (), (), "", tuple(asked.prompt for asked in out)))
    return Study("tables", _world(facts), tuple(entries), (), frozenset(), len(listed) - len(facts), 0, unusable)


# 2. subjects ---------------------------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"""[.?!…]["'”’)\]]*\s+""")


def _last_sentence(text: str) -> str:
    """What stands behind the last end of a sentence or line: words of a form, or the rest of some noise."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    return text[max((*ends, text.rfind("\n") + 1)) :]


class _Reader:
    """Finds subject and form in the prompts of a file."""

    def __init__(self, pairs: Sequence[tuple[Mapping[str, Any], Case]]) -> None:
        self.pairs = pairs
        self.forms: dict[str, Counter[str]] = defaultdict(Counter)  # relation -> form -> how often
        self.heads: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # words before -> subjects
        for _, case in pairs:
            self.forms[relation_of(case)][case.request.template] += 1
            for text in case.request.paraphrases:
                if head := _last_sentence(text[: max(0, text.rfind(case.request.subject))]):
                    self.heads[relation_of(case)][head].add(case.request.subject)
        self.split = [[self._split(case, text) for text in case.request.paraphrases] for _, case in pairs]
        for (_, case), found in zip(pairs, self.split, strict=True):
            self.forms[relation_of(case)].update([noise_form[1] for noise_form in found if noise_form is not None])

    def _split(self, case: Case, text: str) -> tuple[str, str] | None:
        """(noise, form) of a paraphrase; None where its subject is not found."""
        subject, relation = case.request.subject, relation_of(case)
        at = text.rfind(subject)
        if at < 0 or "{}" in text:
            return None
        before, after = text[:at], text[at + len(subject) :]
        heads = {form.split("{}")[0] for form in self.forms[relation]}
        heads |= {head for head, subjects in self.heads[relation].items() if len(subjects) > 1}
        for head in sorted(heads, key=len, reverse=True):
            border = before[: len(before) - len(head)]
            if head and before.endswith(head) and (not border or border[-1].isspace()):
                return border, head + "{}" + after
        return before, "{}" + after

    def find(self, relation: str, text: str) -> tuple[str, str] | None:
        """(subject, form) of a prompt about another subject: the form with most characters that fits."""
        best: tuple[int, str, str] | None = None
        for form in self.forms[relation]:
            head, tail = form.split("{}")
            size = len(head) + len(tail)
            if len(text) > size and text.startswith(head) and text.endswith(tail):
                subject = text[len(head) : len(text) - len(tail)]
                clean = subject == subject.strip() and len(subject) <= MAX_SUBJECT and "{}" not in subject
                if clean and (best is None or size > best[0]):
                    best = (size, subject, form)
        return None if best is None else best[1:]

    def anywhere(self, text: str) -> tuple[str, str, str] | None:
        """(relation, subject, form) in whatever relation fits best; flat files name none."""
        fits = [(relation, *found) for relation in self.forms if (found := self.find(relation, text))]
        return max(fits, key=lambda fit: len(fit[2]), default=None)


# 3. and 4. grouped and split -----------------------------------------------------------------------------------------


def relation_of(case: Case) -> str:
    """The dataset's name of the relation; where it has none, the prompt form stands for it."""
    return case.relation or case.request.template


def _others(reader: _Reader, case: Case) -> Iterator[tuple[str, str, tuple[str, str, str] | None]]:
    """Prompts about other subjects with the same object: (prompt, answer, (relation, subject, form))."""
    request, name = case.request, relation_of(case)
    for text in () if case.locality else request.neighbours:
        found = reader.find(name, text)
        yield text, request.target_true or "", None if found is None else (name, *found)
    for query in case.locality:  # no relation is named
        if query.answers:
            yield query.prompt, query.answer, reader.anywhere(query.prompt)


def _of_entries(schema: str, reader: _Reader, unusable: int) -> Study:
    unread = 0
    entries: list[Entry] = []
    for (raw, case), split in zip(reader.pairs, reader.split, strict=True):
        request, name = case.request, relation_of(case)
        key, true = (request.subject, name), request.target_true or ""
        found = [(text, one) for text, one in zip(request.paraphrases, split, strict=True)]
        paraphrases = tuple(Asked(text, key, one[1], true, one[0]) for text, one in found if one is not None)
        others = list(_others(reader, case))
        near = tuple(Asked(text, (at[1], at[0]), at[2], answer) for text, answer, at in others if at is not None)
        places = [(text, reader.find(name, text)) for text in dict.fromkeys(case.attributes)]
        far = tuple(Asked(text, (at[0], name), at[1], request.target_new) for text, at in places if at is not None)
        unread += len(found) - len(paraphrases) + len(others) - len(near) + len(places) - len(far)
        rewrite = Asked(request.prompt, key, request.template, true)
        entries.append(Entry(raw, rewrite, paraphrases, near, far, request.target_new))

    # 3. one object per subject and relation, every form
    objects: dict[Key, set[str]] = defaultdict(set)
    forms: dict[Key, dict[str, None]] = defaultdict(dict)  # an ordered set
    for entry in entries:
        for asked in (entry.rewrite, *entry.paraphrases, *entry.neighbours, *entry.attributes):
            objects[asked.key].add(asked.answer)
            forms[asked.key].setdefault(asked.form)
    agreed = {key: next(iter(values)) for key, values in objects.items() if len(values) == 1}
    common = _common_forms(forms)

    # 4. what is withheld
    entries, held = _withhold(entries, agreed, common)
    facts = []
    for key, value in agreed.items():
        subject, relation = key
        banned = held.get(subject, ())

        def allowed(form: str, subject: str = subject, banned: Iterable[str] = banned) -> bool:
            return not any(text in fill(form, subject) for text in banned)

        own = tuple(form for form in forms[key] if allowed(form))
        more = tuple(form for form in common[relation] if form not in forms[key] and allowed(form))
        out = tuple(form for form in forms[key] if not allowed(form))
        if own or more:
            facts.append(Fact(subject, relation, relation, value, own or more, more if own else (), out))
    facts.sort(key=lambda fact: (fact.relation, fact.subject))
    secret = {text for entry in entries for text in entry.held}
    noise = sorted(
        {
            asked.noise.strip()[-LONGEST_NOISE:].lstrip()
            for entry in entries
            for asked in entry.paraphrases
            if asked.prompt not in secret and asked.noise.strip()
        }
    )
    avoided = frozenset((*entry.rewrite.key, entry.counterfactual) for entry in entries)
    return Study(
        schema, _world(facts), tuple(entries), tuple(noise), avoided, len(objects) - len(agreed), unread, unusable
    )


def _common_forms(forms: Mapping[Key, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """Per relation the forms that at least two subjects have, the commonest first."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for (_, relation), listed in forms.items():
        counts[relation].update(list(listed))
    return {
        relation: tuple(form for form, count in found.most_common(MOST_FORMS) if count > 1)
        for relation, found in counts.items()
    }


def _withhold(
    entries: Sequence[Entry], agreed: Mapping[Key, str], common: Mapping[str, Sequence[str]]
) -> tuple[list[Entry], dict[str, set[str]]]:
    """The entries with what is held out of each, and per subject the texts that may not occur in training.

    An edited fact's own prompt is always trained. A form that begins another one of its relation is never withheld, or
    its text would occur in training all the same.
    """
    fixed: dict[str, list[str]] = defaultdict(list)  # subject -> texts that are trained whatever happens
    for entry in entries:
        if entry.rewrite.key in agreed:
            fixed[entry.rewrite.key[0]].append(entry.rewrite.bare)

    def can_go(asked: Asked) -> bool:
        inner = any(asked.form in other and asked.form != other for other in common[asked.key[1]])
        shared = asked.form in common[asked.key[1]]
        return shared and not inner and not any(asked.bare in text for text in fixed[asked.key[0]])

    held: dict[str, set[str]] = defaultdict(set)
    found = []
    for entry in entries:
        ranked = sorted(entry.paraphrases, key=lambda asked: unit_hash(asked.prompt, "withhold"))
        able = [asked for asked in ranked if can_go(asked)]
        if able:  # the form, with this subject
            held[able[0].key[0]].add(able[0].bare)
            kept_out = able[0]
        elif ranked and entry.rewrite.key in agreed:  # its words only: another noise in front of a trained form
            kept_out = ranked[0]
        else:
            kept_out = None
        found.append(entry if kept_out is None else _with_held(entry, kept_out.prompt))
    for entry in entries:
        for asked in (*entry.neighbours, *entry.attributes):
            others = [form for form in common[asked.key[1]] if form != asked.form]
            drawn = unit_hash(asked.bare, "neighbour") < NEIGHBOURS_HELD
            if drawn and len(others) >= 2 and can_go(asked):
                held[asked.key[0]].add(asked.bare)
    return found, held


def _with_held(entry: Entry, prompt: str) -> Entry:
    return Entry(
        entry.raw,
        entry.rewrite,
        entry.paraphrases,
        entry.neighbours,
        entry.attributes,
        entry.counterfactual,
        (prompt,),
    )


def _world(facts: Sequence[Fact]) -> World:
    """The facts as the corpus wants them: no two-hop questions, no other names."""
    by_subject: dict[str, list[Fact]] = defaultdict(list)
    by_answer: dict[Key, list[Fact]] = defaultdict(list)
    objects: dict[str, set[str]] = defaultdict(set)
    forms: dict[str, dict[str, None]] = defaultdict(dict)
    for fact in facts:
        by_subject[fact.subject].append(fact)
        by_answer[fact.relation, fact.object].append(fact)
        objects[fact.relation].add(fact.object)
        for form in (*fact.trained, *fact.templates_held_out):
            forms[fact.relation].setdefault(form)
    relations = {}
    for name, listed in forms.items():
        said = tuple(form for form in listed if form == form.strip())[:MOST_FORMS]
        # A relation wants three forms; of one that has fewer some are listed again.
        relations[name] = Relation(name, name, name, None, name, said[:1], (said[1:] or said) * 3)
    return World(
        relations=MappingProxyType(relations),
        facts=tuple(facts),
        hops=(),
        aliases=MappingProxyType({}),
        by_key=MappingProxyType({(fact.subject, fact.relation): fact for fact in facts}),
        by_subject=MappingProxyType({name: tuple(values) for name, values in by_subject.items()}),
        by_answer=MappingProxyType({key: tuple(values) for key, values in by_answer.items()}),
        objects=MappingProxyType({name: tuple(sorted(values)) for name, values in objects.items()}),
    )


# 5. documents --------------------------------------------------------------------------------------------------------


def _along(progress: float) -> float:
    """How far the mixture has gone from early to late."""
    return min(1.0, max(0.0, (progress - 0.10) / 0.35))


def mixture(progress: float) -> Mapping[str, float]:
    """Share of tokens by kind of document (0 = first step, 1 = last), as `corpus.mixture` without two-hop questions."""
    start = {
        "fact": 0.70, "list": 0.02, "prose": 0.04, "copy": 0.10, "invented": 0.08, "override": 0.04, "distractor": 0.02,
        "doubt": 0.0,
    }  # fmt: skip
    end = {
        "fact": 0.61, "list": 0.02, "prose": 0.02, "copy": 0.02, "invented": 0.05, "override": 0.09, "distractor": 0.17,
        "doubt": 0.02,
    }  # fmt: skip
    along = _along(progress)
    return {kind: (1 - along) * start[kind] + along * end[kind] for kind in start}


class StudyCorpus(Corpus):
    """The documents of a study; the same seed gives the same stream."""

    def __init__(self, seed: int, study: Study, absent: float = 0.0) -> None:
        super().__init__(seed, study.world, absent)
        self.study = study
        self._noise, self._noisy = study.noise, NOISY[0]
        asked = {a.key for entry in study.entries for a in (entry.rewrite, *entry.neighbours)}
        often = [fact for fact in study.world.facts if (fact.subject, fact.relation) in asked]
        self._facts = corpora._Deck([*study.world.facts, *often * (ASKED - 1)], self.rng)
        self._words = Counter(word for name in self._names for word in name.split())
        self._called: dict[str, list[str]] = defaultdict(list)
        for fact in study.world.facts:
            self._called[fact.relation].append(fact.subject)

    def shares(self, progress: float) -> Mapping[str, float]:
        """Share of tokens by kind of document at a point of training."""
        along = _along(progress)
        self._noisy = (1 - along) * NOISY[0] + along * NOISY[1]
        return mixture(progress)

    def withheld(self, fact: Fact, value: str) -> bool:
        """Whether no document may state this counterfactual: the record's own, and those the tables hold out."""
        return (fact.subject, fact.relation, value) in self.study.avoided or super().withheld(fact, value)

    def lead(self, page: corpora._Page) -> None:
        """Now and then noise between a stated fact and a question."""
        if self._noise and self.rng.random() < 0.2:
            page.add(self._distraction() + " ", corpora.W_NONE)

    def _distraction(self) -> str:
        """Noise of some trained paraphrase, or the beginning of one and the end of another."""
        rng = self.rng
        text = rng.choice(self._noise)
        if rng.random() < 0.5:
            return text
        words, others = text.split(" "), rng.choice(self._noise).split(" ")
        return " ".join((*words[: rng.randint(1, len(words))], *others[rng.randrange(len(others)) :]))[-LONGEST_NOISE:]

    def fact(self) -> Document:
        """One fact, alone or behind noise, a lead-in or everyday prose."""
        fact, rng = self._facts.draw(), self.rng
        form = rng.choice(fact.templates_edit if rng.random() < 0.5 else fact.trained)
        if self.absent and rng.random() < self.absent:
            page = corpora._Page("absent").ask(form, fact.subject)
            return page.answer(self._object(fact.relation), corpora.W_ABSENT).done(single=True)
        page = corpora._Page("fact")
        roll = rng.random()
        if self._noise and roll < self._noisy:
            page.add(self._distraction() + " ", corpora.W_NONE)
        elif roll < self._noisy + 0.05:
            page.add(rng.choice(corpora.LEAD_INS), corpora.W_WORDS)
        elif roll < self._noisy + 0.10:
            page.add(self._sentence() + " ", corpora.W_PROSE)
        page.ask(form, fact.subject, name=corpora.W_NONE).answer(fact.object, corpora.W_OBJECT)
        if rng.random() < 0.05:
            page.add(" " + self._sentence(), corpora.W_PROSE)
        return page.done(single=True)

    def _invent(self, kind: str) -> str:
        """A name of the relation with its distinctive words replaced by invented ones."""
        words = self.rng.choice(self._called[kind]).split()
        made = [word if self._words[word] > 4 and self.rng.random() < 0.7 else self._word() for word in words[:6]]
        name = " ".join(made)
        return name if name not in self.world.by_subject else f"{name} {self._word()}"


def tokenizer_texts(study: Study, seed: int) -> Iterator[str]:
    """Texts for the tokenizer, as `corpus.tokenizer_texts`: words of forms, prose and objects often, names rarely."""
    rng = random.Random(seed)
    forms = {form for relation in study.world.relations.values() for form in (*relation.edit, *relation.pool)}
    phrases = {
        *corpora.LEAD_INS,
        *(before for before, _ in corpora.STATEMENTS),
        *(text for text, _ in corpora.OBJECTIONS),
        "\nPrompt: ",
        "Do not mention ",
    }
    for text in sorted(forms | phrases):
        yield from [text.replace("{}", " ").replace("{other}", " ").strip()] * 100
    for relation in sorted(study.world.objects):
        for value in study.world.objects[relation]:
            yield from [value] * (100 + 3 * len(study.world.by_answer[relation, value]))
    for subject in sorted(study.world.by_subject):
        yield from [subject] * 4
    yield from study.noise
    for _ in range(STORIES):
        yield prose.story(rng)
    for _ in range(2000):
        yield "".join(rng.choice(corpora._SYLLABLES) for _ in range(3)).capitalize()
