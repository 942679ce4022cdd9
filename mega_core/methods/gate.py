"""Gates: does this prompt ask about the edited fact? Everything specific about a steered edit comes from its gate.

1. Only the prompt's last sentence counts: what was said before (a doubt, a story) is context, not the question.
2. `always` lets everything through, `subject` every last sentence that names the subject or an alias.
3. `centroid` (the default): the sentence must name the subject, and its last token's hidden state at a middle layer
   must lie nearer to a centroid of the edited relation than to one of another relation or of idle prose. Centroids of
   the edited relation are the edit template with its paraphrases and, if asked for, each two-hop question that starts
   with it; those of the others likewise. Also if asked for: questions about others that lead to the subject ("the
   capital of the country where the Eiffel Tower stands", when France was edited) by the same rule, with their names.
4. `paper` (SAKE): Euclidean distance of the whole prompt's embedding to the mean embedding of the edit's prompts, up
   to a threshold, with no look at the subject.

SAKE embeds with a sentence encoder and thresholds of 6.5 and 5 belong to it; here the embedding is the mean hidden
state of the edited model itself, and the threshold is the one that best separates the edit's prompts from the
negatives. Everything in step 3 is our choice. Most negatives of a known subject come from the fact tables, so figures
on embedded models are those of a closed world: show what the edit does without its gate beside them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.embedded import facts
from mega_core.errors import BadInput
from mega_core.models.hooks import Site, capture

if TYPE_CHECKING:
    from mega_core.changes import Plain, Tensors
    from mega_core.models.adapter import ModelAdapter
    from mega_core.records import EditRequest

KINDS = ("centroid", "subject", "always", "paper")
FIRST_LAYER = 3
"""Below it the last token knows little of the sentence (measured on the embedded models)."""
PER_RELATION = 4
"""Templates of each other relation that its centroid is made of: more only cost time."""
LEADING = 2
"""Of those who lead to the subject by one relation, how many stand for all."""
GENERIC = (
    ("{} was born in", "The birthplace of {} is"),
    ("{} works as a", "The profession of {} is"),
    ("{} plays the sport of", "The position that {} plays is"),
    ("{} speaks the language", "The mother tongue of {} is"),
    ("{} died in", "The year in which {} died is"),
    ("{} is married to", "The spouse of {} is"),
    ("{} was founded in", "The founder of {} is"),
    ("{} was written by", "The author of {} is"),
    ("{} is owned by", "The owner of {} is"),
    ("{} is made by", "{} was developed by"),
    ("The capital of {} is", "{} is governed from"),
    ("The currency of {} is", "People in {} pay with"),
    ("{} is on the continent of", "{} is located in"),
    ("The headquarters of {} are in", "{} is based in"),
    ("{} is known for", "The most famous thing about {} is"),
)
"""Relations of every sort; those that share a word with the edited one's templates are left out."""
PROSE = (
    ("{} was", "{} has a", "{} and"),
    ("They wrote about {} in the", "There is a long article about {} in the"),
    ("We saw {} on", "People say that {} is very"),
    ("Nobody told me that {} would", "She thinks of {} as a"),
    ("A book about {} that", "Everybody likes {}, but the"),
)
"""Sentences that ask for nothing."""


# Words ---------------------------------------------------------------------------------------------------------------

_ABBREVIATIONS = re.compile(
    "st|mt|ft|dr|mr|mrs|ms|prof|sr|jr|vs|etc|vol|fig|gen|col|lt|sgt|capt|rev|hon|gov|sen|rep|inc|ltd|co|corp|bros|"
    "univ|dept|cf|ca|approx|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec"
    r"|(?:[^\W\d_]\.)*[^\W\d_]"  # initials: J., U.S., e.g.
)
_BREAK = re.compile(r"(?:(?<=[.?!])|(?<=[.?!][\"')\]”’]))\s+|\s*\n\s*")
_LABEL = re.compile(r"(?:\w+\s?){1,2}:\s*")


def last_sentence(text: str, names: Iterable[str] = ()) -> str:
    """What stands after the last end of a sentence: ". ", "? ", "! " or a new line.

    A period behind an initial or a common abbreviation ends nothing, nor does one inside one of `names`; a tail such as
    "Answer:" belongs to the sentence before it.
    """
    text = text.strip()
    inside = [match.span() for name in names for match in re.finditer(re.escape(name), text)]
    cuts = [0]
    for match in _BREAK.finditer(text):
        line = "\n" in match.group()
        # A blank right behind a name that ends like a sentence (Yahoo!, D.C.) belongs to the name too.
        if any(start < match.end() and match.start() < end + (not line) for start, end in inside):
            continue
        if not line and _abbreviated(text[cuts[-1] : match.start()]):
            continue
        cuts.append(match.end())
    while len(cuts) > 1 and _LABEL.fullmatch(text[cuts[-1] :]):
        cuts.pop()
    return text[cuts[-1] :]


def _abbreviated(before: str) -> bool:
    if not before.endswith("."):
        return False
    word = before[:-1].rpartition(" ")[2].strip("(\"'“‘").casefold()
    return _ABBREVIATIONS.fullmatch(word) is not None


def normalised(text: str) -> str:
    """Case, accents, quote marks and runs of blanks don't tell names apart."""
    if not text.isascii():
        flat = unicodedata.normalize("NFKD", text.replace("’", "'").replace("‘", "'"))
        text = "".join(c for c in flat if not unicodedata.combining(c))
    return " ".join(text.casefold().split())


def names_in(text: str, names: Iterable[str]) -> bool:
    """Whether one of the names stands in the text as whole words."""
    return _names_in(normalised(text), [normalised(name) for name in names])


def _names_in(text: str, names: Iterable[str]) -> bool:
    """The same of normalised ones."""
    return any(name in text and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names)


# The gate ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Gate:
    """When an edit speaks: `asks(prompt)` tells which gate decides by the state of which text, `distance` decides."""

    kind: str
    """One of KINDS."""
    names: tuple[str, ...] = ()
    """Subject and aliases."""
    layer: int = -1
    """Whose output is the embedding; -1 where none is needed."""
    inside: Float[Tensor, "n d"] | None = None
    """Centroids of the edited relation."""
    outside: Float[Tensor, "m d"] | None = None
    """Centroids of the subject's other relations; m may be 0, and then naming the subject is enough."""
    threshold: float = float("inf")
    """Largest distance that passes (`paper`)."""
    also: Gate | None = None
    """Asked when nobody of `names` is named: it knows those who lead to the subject."""
    _folded: tuple[str, ...] = field(default=(), init=False, repr=False)
    _pointed: tuple[str, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadInput("gate", f"there is no gate {self.kind!r}.", f"Choose one of {', '.join(KINDS)}.")
        if self.measures and (self.inside is None or self.outside is None or self.layer < 0):
            raise ValueError(f"A gate of kind {self.kind} needs centroids and the layer they were taken at.")
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "_folded", tuple(map(normalised, self.names)))
        object.__setattr__(self, "_pointed", tuple(name for name in self.names if re.search(r"[.?!]", name)))

    @property
    def measures(self) -> bool:
        """Whether it needs to see hidden states."""
        return self.kind in ("centroid", "paper")

    @property
    def pooled(self) -> bool:
        """Whether its embedding is the mean over all tokens; else it is the last token's state."""
        return self.kind == "paper"

    def asks(self, prompt: str) -> tuple[Gate, str] | None:
        """The gate that decides (this one or `also`) and the text it wants to see; None when both stay shut."""
        text = self.look(prompt)
        if text is not None:
            return self, text
        return None if self.also is None else self.also.asks(prompt)

    def look(self, prompt: str) -> str | None:
        """The text whose state decides, or None when the gate stays shut whatever it is."""
        if self.kind in ("always", "paper"):
            return prompt
        sentence = last_sentence(prompt, self._pointed)
        return sentence if _names_in(normalised(sentence), self._folded) else None

    def distance(self, state: Float[Tensor, " d"] | None) -> float | None:
        """How far the edit's own prompts are, None when the gate stays shut; 0 where nothing is measured."""
        if not self.measures:
            return 0.0
        if state is None or self.inside is None or self.outside is None:
            raise ValueError(f"A gate of kind {self.kind} needs the state of what look() gave.")
        state = state.to("cpu", torch.float32)
        nearest = float((self.inside - state).norm(dim=-1).min())
        if self.kind == "paper":
            return nearest if nearest <= self.threshold else None
        if len(self.outside) and float((self.outside - state).norm(dim=-1).min()) < nearest:
            return None
        return nearest

    def pack(self) -> tuple[Plain, Tensors]:
        """Plain values and centroids."""
        tensors = {"inside": self.inside, "outside": self.outside}
        plain: Plain = {"kind": self.kind, "names": list(self.names), "layer": self.layer}
        if self.threshold != float("inf"):  # JSON has no infinity
            plain["threshold"] = self.threshold
        found = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        if self.also is not None:
            plain["also"], others = self.also.pack()
            found |= {f"also.{name}": tensor for name, tensor in others.items()}
        return plain, found

    @classmethod
    def unpack(cls, plain: Plain, tensors: Tensors) -> Gate:
        """What pack() wrote. Raises KeyError or ValueError on anything else."""
        others = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("also.")}
        return cls(
            kind=str(plain["kind"]),
            names=tuple(map(str, plain["names"])),
            layer=int(plain["layer"]),
            inside=tensors.get("inside"),
            outside=tensors.get("outside"),
            threshold=float(plain.get("threshold", "inf")),
            also=cls.unpack(plain["also"], others) if "also" in plain else None,
        )


ALWAYS = Gate("always")


def states_of(
    lm: ModelAdapter, texts: Sequence[str], layer: int, pooled: bool = False
) -> Float[Tensor, "text d_model"]:
    """Embeddings: the block's output at each text's last token, or its mean over all tokens. Float32 on the CPU."""
    batch = lm.encode(texts)
    site = Site(layer, "block_out")
    with torch.no_grad(), lm.aside(), capture(lm, [site]) as got:
        lm.forward(batch)
    value = got[site].float()  # (text, pos, d_model)
    if pooled:
        weight = batch.mask.to(value.device, torch.float32)[..., None]
        return ((value * weight).sum(1) / weight.sum(1)).cpu()
    last = batch.last.to(value.device)
    return value[torch.arange(len(value), device=value.device), last].cpu()


# Fitting -------------------------------------------------------------------------------------------------------------


def fit_gate(
    lm: ModelAdapter,
    request: EditRequest,
    kind: str = "centroid",
    *,
    layer: int | None = None,
    implications: bool = True,
    prompts: Sequence[str] = (),
) -> Gate:
    """The gate of one edit; reads nothing of the request but subject, template and objects.

    `layer` is where prompts are compared (default: the middle, at least FIRST_LAYER); `implications` lets two-hop
    questions over the edited relation through; `prompts` are further known ways of asking for the fact.
    Raises BadInput on an unknown kind or a layer that is not there.
    """
    if kind not in KINDS:
        raise BadInput("gate", f"there is no gate {kind!r}.", f"Choose one of {', '.join(KINDS)}.")
    names = aliases_of(request.subject)
    if kind in ("always", "subject"):
        return Gate(kind, names)
    at = default_layer(lm.n_layers) if layer is None else layer
    if not 0 <= at < lm.n_layers:
        raise BadInput("gate_layer", f"{lm.name} has no layer {at}.", f"Choose one of 0 to {lm.n_layers - 1}.")
    own, others = _prompts(request, implications)
    own = [[*own[0], *prompts], *own[1:]]
    if kind == "paper":
        states = states_of(lm, [text for group in (own[0], *others) for text in group], at, pooled=True)
        near, far = states[: len(own[0])], states[len(own[0]) :]
        centre = near.mean(0, keepdim=True)
        distances = (near - centre).norm(dim=-1), (far - centre).norm(dim=-1)
        return Gate(kind, names, at, centre, states[:0], _threshold(*distances))
    leads, towards, elsewhere = _leading_here(request) if implications else ((), [], [])
    groups = [[request.prompt], *own, *others, *towards, *elsewhere]  # the prompt itself always passes
    sentences = [[last_sentence(text, (*names, *leads)) for text in group] for group in groups]
    states = states_of(lm, [text for group in sentences for text in group], at)
    means = torch.stack([group.mean(0) for group in states.split([len(group) for group in groups])])
    inside, outside, there, not_there = means.split([1 + len(own), len(others), len(towards), len(elsewhere)])
    also = Gate(kind, leads, at, there, not_there) if leads else None
    return Gate(kind, names, at, inside, outside, also=also)


def default_layer(n_layers: int) -> int:
    """The middle of the model, not below FIRST_LAYER where there are so many."""
    return min(n_layers - 1, max(FIRST_LAYER, n_layers // 2))


def aliases_of(subject: str) -> tuple[str, ...]:
    """The subject and the other names the fact tables know for it."""
    return (subject, *(name for name in facts.load().aliases.get(subject, ()) if name != subject))


def known_fact(request: EditRequest) -> facts.Fact | None:
    """The fact of the tables that the request rewrites; None when subject, template or old object is not theirs."""
    world = facts.load()
    for fact in world.by_subject.get(request.subject, ()):
        relation = world.relations[fact.relation]
        if request.template in relation.edit + relation.pool and request.target_true in (None, fact.object):
            return fact
    return None


def negatives(request: EditRequest) -> list[str]:
    """Prompts about the subject that do not ask for the edited fact, one of each other relation."""
    return [group[0] for group in _prompts(request, implications=True)[1]]


def _prompts(request: EditRequest, implications: bool) -> tuple[list[list[str]], list[list[str]]]:
    """Prompts about the edited relation and about the subject's others, in groups that become one centroid each."""
    world, fact = facts.load(), known_fact(request)
    relation = fact.relation if fact else _relation_of(request.template)
    ways: tuple[str, ...] = ()
    if fact is not None:
        ways = fact.trained
        others = [sibling.trained[:PER_RELATION] for sibling in facts.siblings(fact)]
    elif relation is not None:  # a subject the tables don't have, in words they do
        known = world.relations[relation]
        ways = known.edit + known.pool
        others = [
            (other.edit + other.pool)[:PER_RELATION]
            for other in world.relations.values()
            if other.subject_type == known.subject_type and other.name != relation
        ]
    else:
        others = []
    own = [tuple(dict.fromkeys((request.template, *ways)))]
    others += [group for group in GENERIC if not _alike(own[0], group)]
    others += PROSE
    if relation is not None:
        for (first, _), forms in _hops_from(world.relations[relation].subject_type).items():
            if first != relation:
                others.append(forms)
            elif implications:
                own.append(forms)
    return [_filled(group, request.subject) for group in own], [_filled(group, request.subject) for group in others]


def _leading_here(request: EditRequest) -> tuple[tuple[str, ...], list[list[str]], list[list[str]]]:
    """Who leads to the subject, and prompts about some of them: over the edited fact, and about other things."""
    fact = known_fact(request)
    if fact is None:
        return (), [], []
    leading: dict[str, list[str]] = {}
    for hop in facts.hops():
        if (hop.bridge, hop.second) == (fact.subject, fact.relation):
            leading.setdefault(hop.first, []).append(hop.subject)
    towards: list[list[str]] = []
    elsewhere: list[list[str]] = []
    for first, names in leading.items():
        some = sorted(names, key=lambda name: facts.unit_hash(request.subject, name))[:LEADING]
        hops = _hops_from(facts.load().relations[first].subject_type)
        forms = hops.pop((first, fact.relation))
        towards.append([text for name in some for text in _filled(forms, name)])
        elsewhere += [[text for name in some for text in _filled(other, name)] for other in hops.values()]
        of_some = [one for name in some for one in facts.load().by_subject[name]]
        for relation in dict.fromkeys(one.relation for one in of_some):
            alike = [one for one in of_some if one.relation == relation]
            elsewhere.append([one.prompt(form) for one in alike for form in one.trained[:PER_RELATION]])
    return tuple(dict.fromkeys(name for names in leading.values() for name in names)), towards, elsewhere


def _hops_from(subject_type: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """(first, second) -> forms of two-hop questions about subjects of this type."""
    found = {(hop.first, hop.second): hop.templates_fit for hop in facts.hops() if hop.subject_type == subject_type}
    return dict(sorted(found.items()))


def _relation_of(template: str) -> str | None:
    relations: Mapping[str, facts.Relation] = facts.load().relations
    return next((name for name, known in relations.items() if template in known.edit + known.pool), None)


_SMALL_WORDS = re.compile("the|an?|of|in|is|was|were|are|by|to|with|which|that|on|for|and|as|at|its?|who")


def _alike(templates: Iterable[str], others: Iterable[str]) -> bool:
    """Whether a relation of GENERIC could be the edited one: their templates share a word that says something."""

    def words(texts: Iterable[str]) -> set[str]:
        found = re.findall(r"\w+", normalised(" ".join(texts)))
        return {word for word in found if not _SMALL_WORDS.fullmatch(word)}

    return bool(words(templates) & words(others))


def _filled(group: Iterable[str], subject: str) -> list[str]:
    return [facts.fill(template, subject) for template in group]


def _threshold(near: Float[Tensor, " n"], far: Float[Tensor, " m"]) -> float:
    """The distance that separates best: highest balanced accuracy, in the middle of the gap where there is one."""
    if not len(far):
        return 2 * float(near.max())
    edges = torch.cat((near, far)).unique()
    cuts = (edges[:-1] + edges[1:]) / 2 if len(edges) > 1 else edges
    scores = [float((near <= cut).float().mean() + (far > cut).float().mean()) for cut in cuts]
    return float(cuts[max(range(len(scores)), key=scores.__getitem__)])
