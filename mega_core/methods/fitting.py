"""What a steered edit (s, r, o -> o*) is fitted on: prompts, contexts that flip the answer, and their activations.

1. Prompts p: the edit prompt, the templates trained for this fact, each bare and behind neutral texts.
2. Texts, as in SAKE (Scialanga et al., ACL 2025):
       S   p
       S'  Repeat this sentence: 'p o'. p
       T   a context that makes the model say o*, then p
   T is one of
       sake  Do not mention 'o'. Repeat this sentence: 'p o*'. p
       new   New fact: p' o*. p
       pool  New fact: p' o*. p  |  Repeat this sentence: 'p' o*'. p  |  New fact: p' o*. p'' o*. p
   with p', p'' bare prompts of the same fact. Of T only the texts are kept behind which o* really is the most likely
   next token, those with the highest p(o*) first: the others would teach the map to stand still.
3. Donors, for a model that does not follow such contexts: T = prompts of other subjects whose true object is o*.
4. Activations at the last token of the prompt; for an o* of several tokens also behind its first 1, 2 .. tokens, on
   both sides, because those are the states that predict the next one. A row is read once: what stands at a position
   does not depend on what follows.

Ours: the pool and the choice by p(o*) (the paper takes every row); neutral texts instead of paraphrases written by
another model; donors; S' is left out for them, since they carry no context either.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.embedded import facts
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Note, Reporter, silent, stage
from mega_core.methods.gate import aliases_of, fit_gate, known_fact
from mega_core.methods.rome import CONTEXTS
from mega_core.methods.steering import Registry, SteeredEdit, Steering
from mega_core.methods.transport import AffineMap
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.models.tokens import Row
from mega_core.records import EditRequest

HOW = ("auto", "contexts", "donors")
FORMS = ("pool", "sake", "new")
ENOUGH = 8
"""Fewer texts than this behind which the model says the new object, and it is said to not follow them."""
MOST_PREFIX = 4
"""At most this many positions of a new object are steered."""
ROWS_AT_ONCE = 16
REPEAT, NEW = "Repeat this sentence: '{}'. ", "New fact: {}. "


@dataclass(frozen=True)
class FitSet:
    """The texts of one edit; all end right before the object."""

    prompts: tuple[str, ...]
    """S: the edit prompt first."""
    forced: tuple[str, ...]
    """S': the old object stated before each prompt; none where it is not known or T has no contexts."""
    contexts: tuple[str, ...]
    """T: the model says the new object, the surest first."""
    target: tuple[int, ...]
    """Token ids of the new object, as it follows the edit prompt."""
    how: str
    """Where T comes from: contexts or donors."""

    @property
    def positions(self) -> int:
        """How many positions are steered: the prompt's last token and those of o* that predict another."""
        return min(len(self.target), MOST_PREFIX)

    def source(self, forced: bool = True) -> tuple[str, ...]:
        """S, or S and S' together."""
        return self.prompts + self.forced if forced else self.prompts


# Texts ---------------------------------------------------------------------------------------------------------------


def bare_prompts(request: EditRequest) -> tuple[str, ...]:
    """The edit prompt, then those of the fact's trained templates."""
    fact = known_fact(request)
    others = () if fact is None else tuple(fact.prompt(template) for template in fact.trained)
    return tuple(dict.fromkeys((request.prompt, *others)))


def fit_prompts(request: EditRequest, count: int, seed: int) -> tuple[str, ...]:
    """Step 1: at most `count` different prompts, the edit prompt first, bare ones before those behind neutral texts."""
    generator = random.Random(seed)
    first, *others = bare_prompts(request)
    generator.shuffle(others)
    bare = (first, *others)
    texts = list(CONTEXTS)
    generator.shuffle(texts)
    # Each round gives every prompt another text.
    behind = (
        texts[(turn + i) % len(texts)].replace("{}", prompt)
        for turn in range(len(texts))
        for i, prompt in enumerate(bare)
    )
    return tuple(dict.fromkeys((*bare, *behind)))[:count]


def old_object(request: EditRequest) -> str | None:
    """What the request names, else what the tables know."""
    fact = known_fact(request)
    return request.target_true or (fact.object if fact else None)


def forced_texts(request: EditRequest, prompts: Sequence[str]) -> tuple[str, ...]:
    """S' of step 2; none where the old object is not known."""
    old = old_object(request)
    return () if old is None else tuple(REPEAT.replace("{}", f"{p} {old}") + p for p in prompts)


def context_texts(request: EditRequest, prompts: Sequence[str], form: str = "pool") -> tuple[str, ...]:
    """Candidates for T of step 2, without duplicates. Raises BadInput on an unknown form."""
    if form not in FORMS:
        raise BadInput("contexts", f"there is no form {form!r}.", f"Choose one of {', '.join(FORMS)}.")
    new, old = request.target_new, old_object(request)
    bare = bare_prompts(request)
    texts = []
    for i, prompt in enumerate(prompts):
        said, again = f"{bare[i % len(bare)]} {new}", f"{bare[(i + 1) % len(bare)]} {new}"
        if form == "sake":
            keep_out = f"Do not mention '{old}'. " if old is not None else ""
            texts.append(keep_out + REPEAT.replace("{}", f"{prompt} {new}") + prompt)
        else:
            texts.append(NEW.replace("{}", said) + prompt)
        if form == "pool":
            texts.append(REPEAT.replace("{}", said) + prompt)
            texts.append(NEW.replace("{}", said) + f"{again}. {prompt}")
    return tuple(dict.fromkeys(texts))


def donors(request: EditRequest, count: int = 1_000) -> tuple[str, ...]:
    """Step 3: trained prompts of other subjects of the same relation whose object is o*; none for an unknown fact.

    One prompt of each donor before a second one of any.
    """
    fact = known_fact(request)
    if fact is None:
        return ()
    found = facts.load().by_answer.get((fact.relation, request.target_new), ())
    others = sorted(
        (one for one in found if one.subject != request.subject),
        key=lambda one: facts.unit_hash(request.subject, fact.relation, one.subject),
    )
    # The edit's own template where the donor has it, then the others, in step with the other donors.
    lists = [sorted(one.trained, key=lambda template: template != request.template) for one in others]
    longest = max((len(own) for own in lists), default=0)
    prompts = (
        one.prompt(own[turn])
        for turn in range(longest)
        for one, own in zip(others, lists, strict=True)
        if turn < len(own)
    )
    return tuple(dict.fromkeys(prompts))[:count]


# Which of them the model follows -------------------------------------------------------------------------------------


def ranked(lm: ModelAdapter, texts: Sequence[str], token: int, report: Reporter = silent) -> list[tuple[str, bool]]:
    """(text, whether `token` is the most likely next one), by falling probability; texts too long are left out."""
    rows = [(text, tokens.prompt_ids(lm.tokenizer, text)) for text in texts]
    rows = sorted((row for row in rows if len(row[1]) < lm.max_positions), key=lambda row: len(row[1]))
    found: list[tuple[float, str, bool]] = []
    with stage(report, "contexts", -(-len(rows) // ROWS_AT_ONCE)) as step, torch.no_grad():
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            logits = lm.last_logits(tokens.pack(lm.tokenizer, [ids for _, ids in chunk], lm.device)).float()
            probs = logits.softmax(-1)[:, token].tolist()
            wins = (logits.argmax(-1) == token).tolist()
            found += [(prob, text, win) for (text, _), prob, win in zip(chunk, probs, wins, strict=True)]
            step()
    order = {text: i for i, text in enumerate(texts)}
    found.sort(key=lambda one: (-one[0], order[one[1]]))
    return [(text, win) for _, text, win in found]


def followed(
    lm: ModelAdapter, texts: Sequence[str], target: Sequence[int], count: int, report: Reporter = silent
) -> tuple[str, ...]:
    """Of `texts` those that make the first token of o* the most likely one: the `count` surest."""
    return tuple(text for text, win in ranked(lm, texts, target[0], report) if win)[:count]


def target_sets(
    lm: ModelAdapter,
    request: EditRequest,
    how: str = "auto",
    count: int = 12,
    form: str = "pool",
    seed: int = 0,
    report: Reporter = silent,
) -> FitSet:
    """Steps 1 to 3: S, S' and T with up to `count` texts each.

    `auto` takes contexts when at least ENOUGH of them (or all asked for) are followed, else donors, else the contexts
    that are followed. Asked for by name, contexts that are not followed are used all the same, with a warning: the map
    then moves towards what they do to the model, which may be little.
    Raises BadInput on unknown names, ActionableError when there is nothing to fit on.
    """
    if how not in HOW:
        raise BadInput("target", f"there is no way {how!r} to find target rows.", f"Choose one of {', '.join(HOW)}.")
    target = tokens.target_ids(lm.tokenizer, request.prompt, request.target_new)
    prompts = fit_prompts(request, count, seed)
    fits = tuple(
        text for text in prompts if len(tokens.prompt_ids(lm.tokenizer, text)) + MOST_PREFIX < lm.max_positions
    )
    fit = FitSet(fits or prompts[:1], (), (), target, "contexts")
    enough = min(ENOUGH, count)
    name = request.target_new

    contexts: list[tuple[str, bool]] = []
    if how != "donors":
        contexts = ranked(lm, context_texts(request, fit.prompts, form), target[0], report)
        wins = tuple(text for text, win in contexts if win)[:count]
        forced = _short(lm, forced_texts(request, fit.prompts))
        fit = replace(fit, forced=forced, contexts=wins)
        if len(wins) >= enough:
            return fit
        if how == "contexts":
            report(Note(f"The model does not follow {_share(contexts)} contexts that say {name!r}: expect little."))
            taken = wins or tuple(text for text, _ in contexts)[:count]
            if not taken:
                raise ActionableError("The prompt is too long for any context before it.", "Shorten it.")
            return replace(fit, contexts=taken)
    lent = followed(lm, donors(request, 3 * count), target, count, report)
    if lent:
        if contexts:
            report(
                Note(f"The model does not follow {_share(contexts)} contexts, so {name!r} comes from other subjects.")
            )
        return replace(fit, forced=(), contexts=lent, how="donors")
    if fit.contexts:
        report(Note(f"The model does not follow {_share(contexts)} contexts that say {name!r}: expect little."))
        return fit
    if how == "donors":
        raise ActionableError(
            f"No other subject is known whose object is {name!r}.", "Set the target rows to contexts, or change it."
        )
    raise ActionableError(
        f"The model does not say {name!r} behind any context, and no other subject with it is known.",
        "Choose another new object, or set the target rows to contexts to try all the same.",
    )


def _share(contexts: Sequence[tuple[str, bool]]) -> str:
    return f"{sum(not win for _, win in contexts)} of {len(contexts)}"


def _short(lm: ModelAdapter, texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(t for t in texts if len(tokens.prompt_ids(lm.tokenizer, t)) + MOST_PREFIX < lm.max_positions)


# Activations ---------------------------------------------------------------------------------------------------------


def rows(lm: ModelAdapter, texts: Sequence[str], target: Sequence[int], positions: int = 1) -> list[Row]:
    """Step 4: each text followed by the first `positions` - 1 tokens of the target.

    A row's j-th position is `target_start - 1 + j`: the state there predicts the target's token j.
    """
    found = []
    for text in texts:
        ids = tokens.prompt_ids(lm.tokenizer, text)
        found.append(Row(ids + tuple(target[: positions - 1]), len(ids)))
    return found


def activations(
    lm: ModelAdapter, rows: Sequence[Row], sites: Iterable[Site], report: Reporter = silent
) -> dict[Site, Float[Tensor, "row position d"]]:
    """What stands at `sites` at each row's steered positions, float32 on the CPU; in one forward, stopped early.

    All rows must have the same number of tokens after their `target_start`.
    """
    asked = tuple(dict.fromkeys(sites))
    counts = {len(row.ids) - row.target_start for row in rows}
    if len(counts) != 1:
        raise ValueError("The rows continue by different numbers of tokens, or there are none.")
    offsets = torch.arange(counts.pop() + 1) - 1  # (position,): counted from target_start
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # rows of one length need no padding
    parts: dict[Site, list[Tensor]] = {site: [] for site in asked}
    with stage(report, "activations", -(-len(order) // ROWS_AT_ONCE)) as step, torch.no_grad():
        for start in range(0, len(order), ROWS_AT_ONCE):
            chunk = [rows[i] for i in order[start : start + ROWS_AT_ONCE]]
            starts = [row.target_start for row in chunk]
            batch = tokens.pack(lm.tokenizer, [row.ids for row in chunk], lm.device, starts)
            with capture(lm, asked) as got:
                lm.forward(batch)
            at = torch.tensor(starts)[:, None] + offsets  # (row, position)
            which = torch.arange(len(chunk))[:, None]
            for site in asked:
                value = got[site]
                parts[site].append(value[which.to(value.device), at.to(value.device)].float().cpu())
            step()
    back = torch.tensor(order).argsort()
    return {site: torch.cat(parts[site])[back] for site in asked}


# Edits ---------------------------------------------------------------------------------------------------------------


class Asked(Protocol):
    """The parameters that every method with one set of texts and maps fitted apart from each other has."""

    @property
    def target(self) -> str:
        """One of HOW."""
        ...

    @property
    def contexts(self) -> str:
        """One of FORMS."""
        ...

    @property
    def source(self) -> str:
        """Both (S and S') or bare (S)."""
        ...

    @property
    def prompts(self) -> int:
        """Texts of each kind."""
        ...

    @property
    def alpha(self) -> float:
        """Strength."""
        ...

    @property
    def gate(self) -> str:
        """A kind of gate."""
        ...

    @property
    def gate_layer(self) -> int | None:
        """Where the gate compares prompts."""
        ...

    @property
    def implications(self) -> bool:
        """Whether two-hop questions pass the gate."""
        ...


def steered(
    lm: ModelAdapter,
    requests: Sequence[EditRequest],
    sites: Sequence[Site],
    params: Asked,
    make: Callable[[Float[Tensor, "n d"], Float[Tensor, "m d"]], AffineMap],
    seed: int,
    report: Reporter,
) -> Steering:
    """One steered edit per request; `make` fits the map of every site apart from the others, on the model as it is."""
    edits = Registry()
    with stage(report, "edits", len(requests)) as step:
        for request in requests:
            fit = target_sets(lm, request, params.target, params.prompts, params.contexts, seed, report)
            source = rows(lm, fit.source(params.source == "both"), fit.target, fit.positions)
            target = rows(lm, fit.contexts, fit.target, fit.positions)
            before, after = activations(lm, source, sites, report), activations(lm, target, sites, report)
            gate = fit_gate(lm, request, params.gate, layer=params.gate_layer, implications=params.implications)
            edits.add(
                SteeredEdit(
                    name=f"{request.subject} | {request.template}",
                    subject=request.subject,
                    aliases=aliases_of(request.subject),
                    maps={
                        (site, j): make(before[site][:, j], after[site][:, j])
                        for site in sites
                        for j in range(fit.positions)
                    },
                    alpha=params.alpha,
                    gate=gate,
                    target=fit.target,
                    norms={site: float(before[site].norm(dim=-1).mean()) for site in sites},
                )
            )
            step()
    return edits.change()
