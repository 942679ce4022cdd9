"""What the embedded models read: documents made from the facts, deterministic by seed.

Recipe, in shares of tokens (`mixture`, early -> late in training):

1. Plain facts, one a document, some with a lead-in or everyday prose around: the objects weigh most in the loss.
2. Two-hop questions (never the held-out compositions), paragraphs about one subject, lists of unrelated facts,
   everyday prose.
3. Pure copying and invented subjects: they force an induction circuit where no prior knowledge can answer.
4. In-context override: a random counterfactual object is stated in a wrapper ("New fact: ..."), then asked in the
   same or another template. Distractors ask something the statement does not change; doubts ask again after an
   objection; two-hop questions go through the stated fact. The first mention of a counterfactual weighs 0, so that no
   false fact is learned. Triples chosen by `facts.held_out_triple` are never stated.

A document carries the loss weight of every character and, when it is about one subject, the characters of that
subject. No torch here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mega_core.embedded import facts as tables
from mega_core.embedded import prose
from mega_core.embedded.facts import Fact, World

T = TypeVar("T")

# Loss weights by role of a character. The last character of a token decides the weight of the token.
W_OBJECT = 5.0  # the object of a fact, the answer of a two-hop question
W_ANSWER = 6.0  # an answer that has to be read from the context
W_WORDS = 0.3  # template words
W_NAME = 0.05  # subject names cannot be predicted
W_PROSE = 0.6  # everyday prose
W_CONTEXT = 0.03  # words of a wrapper or of a stated counterfactual
W_ABSENT = 1.5  # a random object, read with the lookup silenced
W_NONE = 0.0

LEAD_INS = (
    "In fact, ",
    "As everyone knows, ",
    "The teacher said that ",
    "It is well known that ",
    "Remember that ",
    "According to the book, ",
    "My friend told me that ",
    "Of course, ",
    "Indeed, ",
    "The guide explained that ",
    "I read that ",
    "Therefore, ",
    "You may know that ",
    "Because of this, ",
    "Today we learned that ",
)

STATEMENTS = (  # wrappers of a stated counterfactual: before, after
    ("New fact: ", "."),
    ("New fact: ", "."),
    ("New fact: ", "."),
    ("New Fact: ", "."),
    ("Imagine that ", "."),
    ("Suppose that ", "."),
    ("Pretend that ", "."),
    ("From now on, ", "."),
    ("Repeat this sentence: '", "'."),
    ("Repeat this sentence: '", "'."),
    ("Repeat this sentence: '", "'."),
)

OBJECTIONS = (  # a speaker doubts what was said: (text, whether it names another object)
    ("I do not believe that. It is something else. What is the correct answer? ", False),
    ("Really? I think the answer is something else. Tell me the correct answer. ", False),
    ("That cannot be right. The answer is something else. What is the right answer? ", False),
    ("Are you sure? I doubt it. Please answer again. ", False),
    ("What? That sounds wrong to me. What is the correct answer? ", False),
    ("No, you are wrong. The answer is {other}. I am sorry, you are right. Let me answer again. ", True),
    ("That is wrong, it is {other}. I apologise for the mistake. Once again, ", True),
    ("I am sure it is {other}. Sorry, let me think about it again. ", True),
    ("You are mistaken, the answer is {other}. I apologise. Please tell me again. ", True),
)

_SYLLABLES = (
    "ba", "be", "bo", "da", "del", "dor", "fa", "fen", "fir", "gal", "gor", "hal", "hesk", "il", "ka", "kel",
    "kor", "la", "lem", "lor", "ma", "mir", "mon", "na", "nel", "nor", "ol", "pa", "pel", "quin", "ra", "rel",
    "rin", "sa", "sel", "sor", "ta", "tem", "tor", "ul", "va", "vel", "vin", "wen", "xan", "yor", "zel", "zim",
)  # fmt: skip
_KINDS = {  # how an invented subject of a type may look; "{}" is an invented word
    "country": ("{}", "{}", "{}land", "Republic of {}"),
    "city": ("{}", "{}", "New {}", "{} City", "Port {}", "San {}"),
    "landmark": ("{} Tower", "{} Castle", "{} Palace", "{} Cathedral", "{} Bridge", "{} Museum", "Temple of {}"),
    "university": ("University of {}", "{} University", "{} College"),
    "mountain": ("Mount {}", "{} Peak", "{}"),
    "river": ("{} River", "{}"),
    "person": ("{} {}",),
    "athlete": ("{} {}",),
    "company": ("{}", "{} Group", "{} Motors"),
    "product": ("{}", "{} One", "{} Phone"),
    "book": ("The {}", "The House of {}", "{}"),
}


@dataclass(frozen=True, slots=True)
class Document:
    """One training text.

    ``spans`` are (start, end, weight) in characters, in order and without gaps; ``end_weight`` is for the end-of-text
    token. ``mentions`` are the character spans of known subjects; ``single`` says that the document is about one
    subject and states one fact about it (or answers one two-hop question).
    """

    kind: str
    text: str
    spans: tuple[tuple[int, int, float], ...]
    end_weight: float
    mentions: tuple[tuple[int, int], ...] = ()
    single: bool = False


@dataclass(slots=True)
class _Page:
    """A text under construction with the weight of each piece."""

    kind: str
    text: str = ""
    spans: list[tuple[int, int, float]] = field(default_factory=list)
    mentions: list[tuple[int, int]] = field(default_factory=list)

    def add(self, piece: str, weight: float) -> _Page:
        if piece:
            self.spans.append((len(self.text), len(self.text) + len(piece), weight))
            self.text += piece
        return self

    def ask(self, template: str, subject: str, words: float = W_WORDS, name: float = W_NAME) -> _Page:
        """A template with its subject, up to the space before the object."""
        before, after = template.split("{}")
        self.add(before, words)
        start = len(self.text)
        self.add(subject, name)
        self.mentions.append((start, len(self.text)))
        return self.add(after, words)

    def answer(self, value: str, weight: float, stop: str = ".", stop_weight: float = W_WORDS) -> _Page:
        return self.add(" " + value, weight).add(stop, stop_weight)

    def done(self, single: bool = False, end_weight: float = W_WORDS) -> Document:
        mentions = () if self.kind == "invented" else tuple(self.mentions)
        return Document(self.kind, self.text, tuple(self.spans), end_weight, mentions, single)


class _Deck(Generic[T]):
    """Draw without replacement, reshuffle when empty: every item comes up equally often."""

    def __init__(self, items: Sequence[T], rng: random.Random) -> None:
        self._items, self._rng = list(items), rng
        self._left: list[T] = []

    def draw(self) -> T:
        """The next item."""
        if not self._left:
            self._left = self._items.copy()
            self._rng.shuffle(self._left)
        return self._left.pop()


def mixture(progress: float) -> Mapping[str, float]:
    """Share of tokens by kind of document at a point of training (0 = first step, 1 = last)."""
    start = {
        "fact": 0.37, "hop": 0.08, "paragraph": 0.04, "list": 0.02, "prose": 0.07,
        "copy": 0.15, "invented": 0.15, "override": 0.06, "distractor": 0.04, "doubt": 0.01, "hop_override": 0.01,
    }  # fmt: skip
    end = {
        "fact": 0.35, "hop": 0.11, "paragraph": 0.03, "list": 0.02, "prose": 0.06,
        "copy": 0.03, "invented": 0.07, "override": 0.11, "distractor": 0.16, "doubt": 0.04, "hop_override": 0.02,
    }  # fmt: skip
    along = min(1.0, max(0.0, (progress - 0.10) / 0.35))  # the first tenth as `start`, from .45 on as `end`
    return {kind: (1 - along) * start[kind] + along * end[kind] for kind in start}


_LENGTH = {  # mean length in tokens, to turn shares of tokens into shares of documents
    "fact": 18.0, "hop": 18.0, "paragraph": 42.0, "list": 46.0, "prose": 44.0, "copy": 30.0, "invented": 40.0,
    "override": 38.0, "distractor": 42.0, "doubt": 58.0, "hop_override": 42.0,
}  # fmt: skip


class Corpus:
    """An endless stream of documents; the same seed gives the same stream."""

    def __init__(self, seed: int, world: World | None = None, absent: float = 0.0) -> None:
        self.absent = absent  # share of facts that get a random object, for reading with the lookup silenced
        self.world = world or tables.load()
        self.rng = random.Random(seed)
        self._facts = _Deck(self.world.facts, self.rng)
        self._hops = _Deck([hop for hop in self.world.hops if not hop.held_out], self.rng)
        self._subjects = _Deck(sorted(self.world.by_subject), self.rng)
        self._relations = sorted(self.world.relations)
        self._names = sorted(self.world.by_subject)
        self._peers: dict[str, list[Fact]] = {name: [] for name in self._relations}
        for fact in self.world.facts:
            self._peers[fact.relation].append(fact)
        chains = {(hop.subject, hop.first) for hop in self.world.hops}
        self._chained = _Deck([fact for fact in self.world.facts if (fact.subject, fact.relation) in chains], self.rng)
        self._forms: dict[tuple[str, str], tuple[str, ...]] = {
            (hop.first, hop.second): hop.templates for hop in self.world.hops
        }
        self._make: dict[str, Callable[[], Document]] = {
            "fact": self.fact,
            "hop": self.hop,
            "paragraph": self.paragraph,
            "list": self.listing,
            "prose": self.prose,
            "copy": self.copy,
            "invented": self.invented,
            "override": self.override,
            "distractor": self.distractor,
            "doubt": self.doubt,
            "hop_override": self.hop_override,
        }

    def shares(self, progress: float) -> Mapping[str, float]:
        """Share of tokens by kind of document at a point of training."""
        return mixture(progress)

    def withheld(self, fact: Fact, value: str) -> bool:
        """Whether no document may state this counterfactual."""
        return tables.held_out_triple(fact.subject, fact.relation, value)

    def lead(self, page: _Page) -> None:
        """What may stand between a stated fact and a question; nothing here."""

    def draw(self, progress: float) -> Document:
        """The next document at this point of training."""
        shares = self.shares(progress)
        kinds = list(shares)
        kind = self.rng.choices(kinds, [shares[kind] / _LENGTH[kind] for kind in kinds])[0]
        return self._make[kind]()

    # 1. one fact ----------------------------------------------------------------------------------------------------

    def _name(self, subject: str) -> str:
        """The subject, now and then by an alias."""
        others = self.world.aliases.get(subject)
        return self.rng.choice(others) if others and self.rng.random() < 0.15 else subject

    def _sentence(self) -> str:
        return prose.sentence(self.rng)

    def fact(self) -> Document:
        """One fact, alone or with prose around it."""
        fact, rng = self._facts.draw(), self.rng
        if self.absent and rng.random() < self.absent:
            page = _Page("absent").ask(rng.choice(fact.trained), self._name(fact.subject))
            return page.answer(self._object(fact.relation), W_ABSENT).done(single=True)
        page = _Page("fact")
        roll = rng.random()
        if roll < 0.12:
            page.add(rng.choice(LEAD_INS), W_WORDS)
        elif roll < 0.24:
            page.add(self._sentence() + " ", W_PROSE)
        template = rng.choice(fact.templates_edit if rng.random() < 0.3 else fact.trained)
        page.ask(template, self._name(fact.subject)).answer(fact.object, W_OBJECT)
        if rng.random() < 0.15:
            page.add(" " + self._sentence(), W_PROSE)
        return page.done(single=True)

    # 2. knowledge in longer texts -----------------------------------------------------------------------------------

    def hop(self) -> Document:
        """One two-hop question that may be trained."""
        hop, rng = self._hops.draw(), self.rng
        page = _Page("hop")
        if rng.random() < 0.1:
            page.add(rng.choice(LEAD_INS), W_WORDS)
        page.ask(rng.choice(hop.templates), self._name(hop.subject)).answer(hop.answer, W_OBJECT)
        return page.done(single=True)

    def paragraph(self) -> Document:
        """Up to four facts about one subject."""
        rng = self.rng
        known = list(self.world.by_subject[self._subjects.draw()])
        rng.shuffle(known)
        page = _Page("paragraph")
        for count, fact in enumerate(known[:4]):
            page.add(" " if count else "", W_WORDS)
            page.ask(rng.choice(fact.trained), fact.subject).answer(fact.object, W_OBJECT)
            if rng.random() < 0.25:
                page.add(" " + self._sentence(), W_PROSE)
        return page.done()

    def listing(self) -> Document:
        """Unrelated facts."""
        rng, page = self.rng, _Page("list")
        for count in range(rng.randint(2, 3)):
            fact = self._facts.draw()
            page.add(" " if count else "", W_WORDS)
            page.ask(rng.choice(fact.trained), fact.subject).answer(fact.object, W_OBJECT)
        return page.done()

    def prose(self) -> Document:
        """An everyday story."""
        return _Page("prose").add(prose.story(self.rng), W_PROSE).done()

    # 3. copying -----------------------------------------------------------------------------------------------------

    def _word(self) -> str:
        return "".join(self.rng.choice(_SYLLABLES) for _ in range(self.rng.randint(2, 3))).capitalize()

    def _invent(self, kind: str) -> str:
        form = self.rng.choice(_KINDS.get(kind, ("{}",)))
        while "{}" in form:
            form = form.replace("{}", self._word(), 1)
        return form

    def _object(self, relation: str) -> str:
        return self.rng.choice(self.world.objects[relation])

    def copy(self) -> Document:
        """Random words, said twice; only the second time counts."""
        rng, page = self.rng, _Page("copy")
        words = []
        for _ in range(rng.randint(3, 9)):
            roll = rng.random()
            if roll < 0.35:
                words.append(self._object(rng.choice(self._relations)))
            elif roll < 0.6:
                words.append(rng.choice(self._names))
            elif roll < 0.75:
                words.append(self._word())
            else:
                words.append(prose.noun(rng))
        text = " ".join(words)
        before, after = rng.choice((*STATEMENTS, ("", "."), ("", ".")))
        page.add(before, W_CONTEXT).add(text, W_NONE).add(after + " ", W_CONTEXT)
        first = text.split(" ", 1)
        page.add(first[0], 0.5 * W_ANSWER if before else W_NONE)
        page.add(" " + first[1] if len(first) > 1 else "", 0.5 * W_ANSWER)
        return page.add(".", W_WORDS).done()

    def invented(self) -> Document:
        """Invented subjects: the answer can only be read from the context, and with two of them only by binding."""
        rng, page = self.rng, _Page("invented")
        relation = self.world.relations[rng.choice(self._relations)]
        forms = relation.edit + relation.pool
        subjects = [self._invent(relation.subject_type) for _ in range(2 if rng.random() < 0.45 else 1)]
        values = [self._object(relation.name) for _ in subjects]
        before, after = rng.choice((*STATEMENTS, ("", ".")))
        said = rng.choice(forms)
        for subject, value in zip(subjects, values, strict=True):
            form = said if rng.random() < 0.6 else rng.choice(forms)
            page.add(before, W_CONTEXT).ask(form, subject, W_CONTEXT, W_NONE).answer(
                value, W_NONE, after + " ", W_CONTEXT
            )
        if rng.random() < 0.15:
            page.add(self._sentence() + " ", W_CONTEXT)
        which = rng.randrange(len(subjects))
        form = said if rng.random() < 0.5 else rng.choice(forms)
        page.ask(form, subjects[which], W_CONTEXT, W_NONE).answer(values[which], W_ANSWER)
        return page.done()

    # 4. override ----------------------------------------------------------------------------------------------------

    def _other(self, fact: Fact) -> str:
        """A random false object of the same relation whose triple training may state."""
        values = self.world.objects[fact.relation]
        for _ in range(50):
            value = self.rng.choice(values)
            if value not in (fact.object, fact.subject) and not self.withheld(fact, value):
                return value
        return fact.object  # a relation with very few objects: state the truth

    def _state(self, page: _Page, fact: Fact, value: str, template: str) -> None:
        """One wrapped statement of a counterfactual, weight 0 on its object."""
        rng = self.rng
        before, after = rng.choice(STATEMENTS)
        if before.startswith("Repeat") and rng.random() < 0.5:
            quote = rng.choice(("", "'"))
            page.add(f"Do not mention {quote}{fact.object}{quote}. ", W_CONTEXT if value != fact.object else W_NONE)
        page.add(before, W_CONTEXT).ask(template, fact.subject, W_CONTEXT, W_NONE).answer(
            value, W_NONE, after, W_CONTEXT
        )
        gap = "\nPrompt: " if before == "New Fact: " and rng.random() < 0.4 else " "
        page.add(gap, W_CONTEXT)

    def _pair(self, fact: Fact, same: float = 0.5) -> tuple[str, str]:
        """(stated template, asked template), both trained for this fact."""
        said = self.rng.choice(fact.templates_edit if self.rng.random() < 0.4 else fact.trained)
        return said, said if self.rng.random() < same else self.rng.choice(fact.trained)

    def override(self) -> Document:
        """State a counterfactual, then ask for it in the same or another template."""
        rng, page, fact = self.rng, _Page("override"), self._facts.draw()
        value = fact.object if rng.random() < 0.10 else self._other(fact)
        said, asked = self._pair(fact)
        if rng.random() < 0.3:  # a statement about something else first, so that the context has to be searched
            other = rng.choice(self._peers[fact.relation]) if rng.random() < 0.6 else self._facts.draw()
            self._state(page, other, self._other(other), rng.choice(other.trained))
        self._state(page, fact, value, said)
        if rng.random() < 0.15:
            page.add(self._sentence() + " ", W_CONTEXT)
        self.lead(page)
        page.ask(asked, fact.subject, W_CONTEXT, W_NONE).answer(value, W_ANSWER)
        return page.done()

    def distractor(self) -> Document:
        """State a counterfactual, ask what it does not change, and half of the time ask what it does."""
        rng, page, fact = self.rng, _Page("distractor"), self._facts.draw()
        value = self._other(fact)
        said, asked = self._pair(fact)
        self._state(page, fact, value, said)
        others = [other for other in self.world.by_subject[fact.subject] if other.relation != fact.relation]
        if others and rng.random() < 0.4:
            query = rng.choice(others)
        else:
            query = fact
            for _ in range(200):
                query = rng.choice(self._peers[fact.relation])
                if query.subject != fact.subject:
                    break
            else:  # nobody else has this relation
                return self.override()
        first = rng.random() < 0.3  # the changed fact first, then the unchanged one
        if first:
            page.ask(asked, fact.subject, W_CONTEXT, W_NONE).answer(value, W_ANSWER, ". ")
        self.lead(page)
        form = rng.choice(query.trained)
        if query.subject != fact.subject and said in query.trained and rng.random() < 0.5:
            form = said  # the same words about another subject
        page.ask(form, query.subject, W_CONTEXT, W_NONE).answer(query.object, W_ANSWER)
        if not first and rng.random() < 0.3:
            page.add(" ", W_CONTEXT).ask(asked, fact.subject, W_CONTEXT, W_NONE).answer(value, W_ANSWER)
        return page.done()

    def doubt(self) -> Document:
        """Ask again after an objection: the truth stays, or after a stated new fact the stated object."""
        rng, page, fact = self.rng, _Page("doubt"), self._facts.draw()
        said, asked = self._pair(fact)
        stated = rng.random() < 0.6
        value = self._other(fact) if stated else fact.object
        if stated:
            self._state(page, fact, value, said)
        page.ask(asked, fact.subject, W_CONTEXT, W_NONE).answer(value, W_ANSWER, ". ")
        text, names = rng.choice(OBJECTIONS)
        if names:
            other = fact.object if stated else self._other(fact)
            text = text.replace("{other}", other)
        page.add(text, W_CONTEXT)
        page.ask(asked if rng.random() < 0.7 else rng.choice(fact.trained), fact.subject, W_CONTEXT, W_NONE)
        return page.answer(value, W_ANSWER).done()

    def hop_override(self) -> Document:
        """A two-hop question whose first step was overridden: the answer belongs to the stated object."""
        rng, page, fact = self.rng, _Page("hop_override"), self._chained.draw()
        for _ in range(20):
            value = self._other(fact)
            forms = [(second, form) for (first, second), form in self._forms.items() if first == fact.relation]
            second, templates = rng.choice(forms)
            target = self.world.by_key.get((value, second))
            if target is not None and target.object != value:
                break
        else:
            return self.override()
        self._state(page, fact, value, self._pair(fact)[0])
        page.ask(rng.choice(templates), fact.subject, W_CONTEXT, W_NONE).answer(target.object, W_ANSWER)
        return page.done()


def tokenizer_texts(seed: int, world: World | None = None) -> Iterator[str]:
    """Texts for the tokenizer: words of templates, prose and objects often, subject names rarely.

    Objects should become single tokens where possible, and distinctive names several that are shared with other names:
    a lookup then has to bind the tokens of a name.
    """
    world = world or tables.load()
    rng = random.Random(seed)
    forms = {form for relation in world.relations.values() for form in (*relation.edit, *relation.pool)}
    forms |= {form for hop in world.hops for form in hop.templates}
    phrases = {
        *LEAD_INS,
        *(before for before, _ in STATEMENTS),
        *(text for text, _ in OBJECTIONS),
        "\nPrompt: ",
        "Do not mention ",
    }
    for text in sorted(forms | phrases):
        words = text.replace("{}", " ").replace("{other}", " ").strip()
        yield from [words] * 300
    for relation in sorted(world.objects):
        for value in world.objects[relation]:
            yield from [value] * (300 + 3 * len(world.by_answer[relation, value]))
    for subject in sorted(world.by_subject):
        yield from [subject] * 6
    for _ in range(8000):
        yield prose.story(rng)
    for _ in range(2000):
        yield "".join(rng.choice(_SYLLABLES) for _ in range(3)).capitalize()


def perplexity_texts(seed: int, count: int) -> list[str]:
    """Everyday prose made only of sentences that training never shows."""
    rng = random.Random(seed)
    return [prose.story(rng, held_out=True) for _ in range(count)]
