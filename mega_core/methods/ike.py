"""IKE: In-Context Knowledge Editing (Zheng et al., EMNLP 2023, arXiv 2305.12740).

Nothing in the model changes. In front of every prompt x stands the new fact f = "{prompt} {o*}", and in front of that
up to k demonstrations of how a new fact is to be used:

1. A demonstration is a new fact f_d with a prompt and its answer, of one of three kinds: copy (f_d's own prompt, the
   new object), update (f_d's prompt in other words, the new object), retain (a prompt about something else, its true
   object).
2. The demonstrations nearest to the question "New Fact: f / Prompt: x" by the cosine of sentence embeddings are
   taken, copy, update and retain as 1 : 3 : 4.
3. The model reads: demonstrations, f, x. With k = 0 this is f and x alone, as EasyEdit and RippleEdits ("Imagine that
   ...") use it.

Choices that the paper leaves open, and ours: demonstrations are made of known facts with made-up new objects, in
prompt forms that were trained, about subjects and objects that no request names; embeddings come from the model
itself (the residual stream in the middle of its depth, as a mean over tokens or at the last one, less the pool's
mean, which all of them share) unless a sentence model is asked for; retrieval is made anew for each prompt, and the
nearest demonstration stands last; when not all fit, the farthest go first. Several new facts stand in front together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mega_core.embedded import facts
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Note, Reporter, stage
from mega_core.methods import knobs
from mega_core.methods.base import Method, knob
from mega_core.records import EditRequest

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.arch import ArchSpec

KINDS = ("copy", "update", "retain")
ROOM = 32
"""Tokens left free behind a prompt for its answer when demonstrations are fitted in."""
AT_ONCE = 32
SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The published choice; the only one, so that no name typed into a form is ever loaded."""


class Wrapper(NamedTuple):
    """How a new fact is said: `before` + fact + `after`, several joined by `between`; then `gap` and the prompt."""

    before: str
    after: str
    between: str
    gap: str
    end: str
    """Behind a demonstration's answer."""

    def front(self, sentences: Sequence[str]) -> str:
        """The text from the first new fact up to the prompt."""
        return self.between.join(self.before + sentence + self.after for sentence in sentences) + self.gap


WRAPPERS: Mapping[str, Wrapper] = {
    "new fact, prompt": Wrapper("New Fact: ", "", "\n", "\nPrompt: ", "\n\n"),
    "imagine that": Wrapper("Imagine that ", ".", " ", " ", ". "),
    "new fact": Wrapper("New fact: ", ".", " ", " ", ". "),
    "suppose that": Wrapper("Suppose that ", ".", " ", " ", ". "),
    "pretend that": Wrapper("Pretend that ", ".", " ", " ", ". "),
    "from now on": Wrapper("From now on, ", ".", " ", " ", ". "),
    "repeat": Wrapper("Repeat this sentence: '", "'.", " ", " ", ". "),
}
"""The first is IKE's and EasyEdit's, the second RippleEdits'. The embedded models were trained on all but the first."""


@dataclass(frozen=True, slots=True)
class IkeParams:
    """What can be set."""

    k: int = knob(
        0, "How many demonstrations stand before the new fact; 0 is the new fact alone.", low=0, high=64, ours=True
    )
    wrapper: str = knob(
        "new fact, prompt",
        'How the new fact is put: IKE\'s "New Fact: ... Prompt:", RippleEdits\' "Imagine that ...", or others.',
        choices=tuple(WRAPPERS),
    )
    ratio: str = knob("1:3:4", "Shares of copy, update and retain among the demonstrations.")
    pool: int = knob(64, "From how many known facts demonstrations are made.", low=8, high=1000, ours=True)
    embedder: str = knob(
        "hidden",
        "What tells which demonstrations are near: the model's own states (hidden), or a sentence model.",
        choices=("hidden", "sentence-transformers"),
        ours=True,
    )
    layer: int | None = knobs.layer("Layer whose states are compared. Empty: the middle of the model.", ours=True)
    pooling: str = knob(
        "mean", "States of all tokens (their mean), or of the last one.", choices=("mean", "last"), ours=True
    )


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One example of a new fact in use."""

    kind: str
    """One of KINDS."""
    question: str
    """The new fact and the prompt, as the model reads them."""
    answer: str


@dataclass(frozen=True, eq=False)
class InContext:
    """New facts, and demonstrations to choose from, that stand in front of every prompt."""

    sentences: tuple[str, ...]
    """The new facts."""
    params: IkeParams
    demonstrations: tuple[Demonstration, ...] = ()
    vectors: Float[Tensor, "n d"] | None = None
    """One embedding per demonstration, float32 on the CPU; None without demonstrations."""

    @classmethod
    def merged(cls, changes: Sequence[InContext]) -> InContext:
        """All new facts in one front, with the settings and demonstrations of the first that has any."""
        lead = next((change for change in changes if change.demonstrations), changes[0])
        sentences = tuple(dict.fromkeys(sentence for change in changes for sentence in change.sentences))
        return cls(sentences, lead.params, lead.demonstrations, lead.vectors)

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        """Read every prompt behind its text. The same prompt has the same text as long as the block lasts."""
        from mega_core.changes import standing

        known: dict[str, str] = {}
        embed = _embedder(lm, self.params) if self.demonstrations else None

        def front(prompt: str) -> str:
            if prompt not in known:
                known[prompt] = self.front(lm, prompt, embed)
            return known[prompt]

        with lm.behind(front), standing(lm, self):
            yield

    def front(self, lm: ModelAdapter, prompt: str, embed: Embedder | None = None) -> str:
        """Step 3: what stands in front of this prompt."""
        wrapper = WRAPPERS[self.params.wrapper]
        shown = self.chosen(lm, prompt, embed) if embed is not None else []
        return "".join(_whole(one, wrapper) for one in shown) + wrapper.front(self.sentences)

    def chosen(self, lm: ModelAdapter, prompt: str, embed: Embedder) -> list[Demonstration]:
        """Step 2: the demonstrations for this prompt, nearest last, as many as fit."""
        from torch.nn.functional import cosine_similarity

        wrapper = WRAPPERS[self.params.wrapper]
        asked = wrapper.front(self.sentences) + prompt
        if self.vectors is None:
            return []
        mean = self.vectors.mean(0)
        near = cosine_similarity(self.vectors - mean, embed([asked]) - mean, dim=-1).tolist()
        ranked = sorted(range(len(near)), key=lambda i: (-near[i], i))
        best: list[int] = []
        for kind, count in zip(KINDS, slots(self.params.k, self.params.ratio), strict=True):
            best += [i for i in ranked if self.demonstrations[i].kind == kind][:count]
        shown = [self.demonstrations[i] for i in sorted(best, key=lambda i: (near[i], -i))]
        while shown and _length(lm, "".join(_whole(one, wrapper) for one in shown) + asked) + ROOM > lm.max_positions:
            shown = shown[1:]
        return shown

    def summary(self) -> pd.DataFrame:
        """One row: nothing in the model is changed."""
        from mega_core.changes import prompt_summary

        return prompt_summary()

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Texts as plain values, embeddings as a tensor."""
        plain = {
            "sentences": list(self.sentences),
            "params": asdict(self.params),
            "demonstrations": [asdict(one) for one in self.demonstrations],
        }
        return plain, {} if self.vectors is None else {"vectors": self.vectors.contiguous()}

    @classmethod
    def unpack(cls, plain: dict[str, Any], tensors: dict[str, Tensor]) -> InContext:
        """What pack() wrote. Raises KeyError, TypeError or BadInput on anything else."""
        return cls(
            tuple(str(sentence) for sentence in plain["sentences"]),
            IKE.read(IKE.ref(plain["params"])),
            tuple(Demonstration(**one) for one in plain["demonstrations"]),
            tensors.get("vectors"),
        )


Embedder = Callable[[Sequence[str]], "Tensor"]


def needs(spec: ArchSpec) -> str | None:
    """Every model reads text."""
    return None


def slots(k: int, ratio: str) -> tuple[int, int, int]:
    """How many demonstrations of each kind: k by the shares, what is left over to the largest remainders.

    Raises BadInput unless there are three shares of at least 0, not all of them 0.
    """
    try:
        shares = [float(part) for part in ratio.split(":")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share < float("inf") for share in shares) or not sum(shares):
        raise BadInput("ike.ratio", f"{ratio[:40]!r} is not three shares.", "Write for example 1:3:4.")
    exact = [k * share / sum(shares) for share in shares]
    counts = [int(one) for one in exact]
    for i in sorted(range(3), key=lambda i: (counts[i] - exact[i], i))[: k - sum(counts)]:
        counts[i] += 1
    return counts[0], counts[1], counts[2]


def demonstrations(requests: Sequence[EditRequest], wrapper: Wrapper, pool: int, seed: int) -> list[Demonstration]:
    """Step 1: one of each kind for each of `pool` known facts that no request names, drawn by the seed."""
    draw = random.Random(seed)
    named = {name for r in requests for name in (r.subject, r.target_new, r.target_true)}
    known = [fact for fact in facts.facts() if fact.subject not in named and fact.object not in named]
    found = []
    for fact in draw.sample(known, min(pool, len(known))):
        objects = [value for value in facts.counterfactuals(fact) if value not in named]
        if not objects:
            continue
        new, form = draw.choice(objects), draw.choice(fact.templates_edit)
        stated = wrapper.front([f"{fact.prompt(form)} {new}"])
        found.append(Demonstration("copy", stated + fact.prompt(form), new))
        others = [other for other in fact.trained if other != form]
        if others:
            found.append(Demonstration("update", stated + fact.prompt(draw.choice(others)), new))
        another = draw.choice(known)
        if another.subject != fact.subject:
            question = stated + another.prompt(draw.choice(another.trained))
            found.append(Demonstration("retain", question, another.object))
    return found


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: IkeParams, seed: int, report: Reporter
) -> InContext:
    """The text in front of every prompt, or what it will be chosen from. Never touches the model."""
    import torch

    slots(params.k, params.ratio)  # raises on shares that aren't any
    if params.layer is not None:
        lm.block(params.layer)  # raises on a layer that isn't there
    change = InContext(tuple(dict.fromkeys(request.sentence for request in requests)), params)
    for request in requests:
        length = _length(lm, f"{change.front(lm, request.prompt)}{request.sentence}")
        if length > lm.max_positions:
            raise BadInput(
                "requests",
                f"with the new facts in front a prompt has {length} tokens, but {lm.name} reads at most "
                f"{lm.max_positions}.",
                "Edit fewer facts at once, or shorten the prompt.",
            )
    if not params.k:
        with stage(report, "demonstrations", 1) as step:
            step()
        return change

    # 1.
    found = demonstrations(requests, WRAPPERS[params.wrapper], params.pool, seed)
    embed = _embedder(lm, params)
    starts = range(0, len(found), AT_ONCE)
    parts: list[Tensor] = []
    with stage(report, "demonstrations", len(starts)) as step:
        for start in starts:
            parts.append(embed([one.question for one in found[start : start + AT_ONCE]]))
            step()
    change = InContext(change.sentences, params, tuple(found), torch.cat(parts))
    fit = min(len(change.chosen(lm, request.prompt, embed)) for request in requests)
    if fit < params.k:
        report(Note(f"Only {fit} of {params.k} demonstrations stand in front of the prompt: no more fit, or exist."))
    return change


def _whole(one: Demonstration, wrapper: Wrapper) -> str:
    return f"{one.question} {one.answer}{wrapper.end}"


def _length(lm: ModelAdapter, text: str) -> int:
    from mega_core.models import tokens

    return len(tokens.prompt_ids(lm.tokenizer, text))


# Embeddings ----------------------------------------------------------------------------------------------------------


def _embedder(lm: ModelAdapter, params: IkeParams) -> Embedder:
    """From texts to float32 vectors on the CPU, one row each."""
    if params.embedder == "hidden":
        return lambda texts: hidden_vectors(lm, texts, params.layer, params.pooling)
    return _sentence_model()


def hidden_vectors(
    lm: ModelAdapter, texts: Sequence[str], layer: int | None = None, pooling: str = "mean"
) -> Float[Tensor, "n d_model"]:
    """The residual stream after one block (the middle one), as a mean over each text's tokens or at its last one.

    A look aside: without what stands in front of prompts, and unseen by readers.
    """
    import torch

    from mega_core.models.hooks import Site, capture

    site = Site(lm.n_layers // 2 if layer is None else layer, "block_out")
    batch = lm.encode(texts)
    with lm.aside(), torch.no_grad(), capture(lm, [site]) as got:
        lm.forward(batch)
    states = got[site].float().cpu()  # (n, pos, d_model)
    if pooling == "last":
        return states[torch.arange(len(texts)), batch.last.cpu()]
    mask = batch.mask.cpu()[..., None]
    return (states * mask).sum(1) / mask.sum(1)


def _sentence_model() -> Embedder:
    """The sentence model, from this machine's files. Raises ActionableError when it or its package isn't there."""
    import importlib

    import torch

    try:
        package = importlib.import_module("sentence_transformers")
    except ImportError:
        raise ActionableError(
            f"The sentence model {SENTENCE_MODEL} needs the package sentence-transformers.",
            "Install it: pip install -r requirements-ike.txt. Or choose the embedder hidden.",
        ) from None
    try:
        model = package.SentenceTransformer(
            SENTENCE_MODEL, device="cpu", local_files_only=True, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError):
        raise ActionableError(
            f"The sentence model {SENTENCE_MODEL} is not on this machine.",
            f"Fetch it once: hf download {SENTENCE_MODEL}. Or choose the embedder hidden.",
        ) from None
    return lambda texts: torch.as_tensor(model.encode(list(texts), convert_to_numpy=True)).float()


IKE = Method(
    name="ike",
    title="IKE",
    summary="Puts the new fact in front of every prompt, with examples of how to use it.",
    family="prompt",
    paper="arXiv 2305.12740",
    params=IkeParams,
    prepare=prepare,
    needs=needs,
)
