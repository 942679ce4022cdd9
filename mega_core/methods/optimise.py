"""The value search of the locate-then-edit family: which vector, added at the subject's last token, makes the model say
the new object? It is where an edit spends its time, so it is written for speed; its numbers are a full forward's.

A vector delta joins the residual stream after block l at position s, the subject's last token. Nothing before s and
nothing up to block l ever sees it. Therefore

1. one pass without gradients keeps, per row: the stream after block l at positions >= s, and for every block above the
   keys and values of positions < s (with the MLP's key and value at s, which the closed form needs);
2. every step runs only the blocks above l, only on positions >= s, with those keys and values in front;
3. the head is applied only where a target token, or the distribution to be kept, is read.

Adding to the stream is adding to the MLP's output: in all supported architectures it joins the stream as it is.
Rows are independent, so several requests are searched for at once, each with its own delta and its own Adam state; a
request that has reached its probability leaves the batch. Delta and loss are float32 whatever the weights are.

Loss of a request with target o, rows x_j and kept prompts p_j (arXiv 2202.05262, eq. 4, with its code's weight decay):

    mean_j -1/|o| sum_t log p(o_t | x_j, o_<t, delta) + kl_weight mean_j KL(p_0(. | p_j) || p_delta(. | p_j))
        + weight_decay |delta| / r^2,        and after each step |delta| is cut to clamp * r

with r the norm of the MLP's output at s in the first row (published) or of the residual stream there (ours).

`find_pairs` searches two deltas together (PMET, arXiv 2308.08742): delta_attn joins what attention writes at s in block
l, delta_mlp what the MLP writes there. Both have their own r and clamp, and the loss has both decays. Only position s
of block l changes, so its stream follows from the stream `mid` between attention and MLP that step 1 keeps:

    out = mid + delta_attn + MLP(norm(mid + delta_attn)) + delta_mlp

where attention and MLP run one after the other; where they run side by side (GPT-J, NeoX) the MLP does not see
delta_attn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mega_core.errors import BadInput
from mega_core.events import Reporter, silent, stage
from mega_core.methods.solve import check_finite
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, untuple
from mega_core.models.suffix import KeptPast, block_arguments, run_keeping, suffix_mask
from mega_core.records import EditRequest

REQUESTS_AT_ONCE = 16
BETAS, EPSILON = (0.9, 0.999), 1e-8
HALF_SCALE = 256.0
"""float16 gradients are multiplied by this on their way back, so that small ones don't vanish."""
WHEN_SAID, KL_ENOUGH = 0.1, 0.01
"""PMET's adaptive loss: the share of the likelihood once the target is said, and the KL at which that is enough."""


@dataclass(frozen=True, slots=True)
class Row:
    """One text that the search reads."""

    request: int
    """Index of the request it belongs to."""
    ids: tuple[int, ...]
    """Input ids; of a target all but the last token, which nothing is predicted from."""
    subject: int
    """Position s of the subject's last token."""
    target: tuple[int, ...]
    """Ids to be said at the end of `ids`; empty in a row whose next-token distribution is to be kept."""
    bare: bool = False
    """Whether it is the request's prompt itself."""


@dataclass(frozen=True, slots=True)
class Search:
    """How to search. `steps` counts updates: the published loop computes one loss more than it makes updates."""

    steps: int = 20
    learning_rate: float = 0.5
    clamp: float = 4.0
    reference: Literal["value", "residual"] = "value"
    kl_weight: float = 0.0625
    weight_decay: float = 0.5
    stop_probability: float = 1.0
    """A request is done when the whole target has at least this probability in each of its rows (ours)."""
    stop_loss: float = 0.0
    """A request is done when its loss is below this."""
    adaptive: bool = False
    """While every target token is the likeliest one in all rows, the likelihood counts a tenth, and a request is done
    once the kept distributions have moved by at most KL_ENOUGH (PMET)."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where a request stood before an update. Losses in nats."""

    loss: float
    nll: float
    kl: float
    probability: float
    """Lowest probability of the whole target over the request's rows."""


@dataclass(frozen=True)
class Found:
    """What the search found, one entry per request; tensors are float32 on the CPU."""

    delta: Float[Tensor, "n d_model"]
    v0: Float[Tensor, "n d_model"]
    """The MLP's output at s in the bare prompt."""
    residual: Float[Tensor, "n d_model"]
    """The residual stream after the block at s in the bare prompt."""
    key: Float[Tensor, "n d_mlp"]
    """The MLP's key at s in the bare prompt."""
    mean_key: Float[Tensor, "n d_mlp"]
    """The same, averaged over all rows with a target."""
    history: tuple[tuple[Step, ...], ...]


@dataclass(frozen=True)
class FoundPair:
    """What the joint search found, one entry per request; tensors are float32 on the CPU."""

    attn: Float[Tensor, "n d_model"]
    """delta_attn."""
    mlp: Float[Tensor, "n d_model"]
    """delta_mlp."""
    out: Float[Tensor, "n d_model"]
    """How both together change the stream after the block at s in the bare prompt."""
    v0: Float[Tensor, "n d_model"]
    """The MLP's output at s in the bare prompt."""
    a0: Float[Tensor, "n d_model"]
    """What attention writes at s in the bare prompt."""
    residual: Float[Tensor, "n d_model"]
    """The residual stream after the block at s in the bare prompt."""
    history: tuple[tuple[Step, ...], ...]


def rows_for(
    lm: ModelAdapter, index: int, request: EditRequest, contexts: Sequence[str], keep: Sequence[str]
) -> list[Row]:
    """The rows of one request: its prompt in every context ("In fact, {}"), then the prompts to keep ("{} is a").

    The first context must be the bare "{}". Raises BadInput when a row is longer than the model reads.
    """
    rows = []
    for context in contexts:
        template = context.replace("{}", request.template)
        row = tokens.with_target(lm.tokenizer, template.replace("{}", request.subject), request.target_new)
        at = tokens.subject_last(lm.tokenizer, template, request.subject)
        rows.append(Row(index, row.ids[:-1], at, row.target, bare=context == "{}"))
    for template in keep:
        ids = tokens.prompt_ids(lm.tokenizer, template.replace("{}", request.subject))
        rows.append(Row(index, ids, tokens.subject_last(lm.tokenizer, template, request.subject), ()))
    longest = max(len(row.ids) for row in rows)
    if longest > lm.max_positions:
        raise BadInput("template", f"{longest} tokens, but {lm.name} reads at most {lm.max_positions}.", "Shorten it.")
    return rows


def find_values(lm: ModelAdapter, layer: int, rows: Sequence[Row], search: Search, report: Reporter = silent) -> Found:
    """Search a delta for every request among `rows`, in groups that bound the memory. Leaves the model as it was."""
    parts = []
    groups = _groups(rows)
    with stage(report, "new value", search.steps * len(groups)) as step:
        for group in groups:
            reading = read(lm, layer, group)
            bare = _first_rows(reading)
            v0, residual = reading.value[bare], reading.suffix[bare, 0].float()
            radius = (v0 if search.reference == "value" else residual).norm(dim=-1)
            delta, history = _search(lm, reading, search, Upper, radius[:, None], step)
            key, mean_key = reading.key[bare], _mean_keys(reading)
            parts.append(Found(delta[:, 0].cpu(), v0.cpu(), residual.cpu(), key.cpu(), mean_key.cpu(), history))
    return _joined(Found, parts)


def find_pairs(
    lm: ModelAdapter, layer: int, rows: Sequence[Row], search: Search, report: Reporter = silent
) -> FoundPair:
    """Search delta_attn and delta_mlp together for every request among `rows`. Leaves the model as it was."""
    parts = []
    groups = _groups(rows)
    with stage(report, "new value", search.steps * len(groups)) as step:
        for group in groups:
            reading = read(lm, layer, group, between=True)
            assert reading.attn is not None  # between=True
            bare = _first_rows(reading)
            v0, a0, residual = reading.value[bare], reading.attn[bare], reading.suffix[bare, 0].float()
            own = torch.stack((a0, v0) if search.reference == "value" else (residual, residual), dim=1)
            delta, history = _search(lm, reading, search, PairUpper, own.norm(dim=-1), step)
            with torch.no_grad():
                upper = PairUpper(lm, reading, reading.requests)
                out = upper.first(delta)[bare] - upper.first(torch.zeros_like(delta))[bare]
            attn, mlp = delta.cpu().unbind(1)
            parts.append(FoundPair(attn, mlp, out.cpu(), v0.cpu(), a0.cpu(), residual.cpu(), history))
    return _joined(FoundPair, parts)


_F = TypeVar("_F", Found, FoundPair)


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of at most REQUESTS_AT_ONCE requests each."""
    count = 1 + max(row.request for row in rows)
    starts = range(0, count, REQUESTS_AT_ONCE)
    return [[row for row in rows if start <= row.request < start + REQUESTS_AT_ONCE] for start in starts]


def _joined(kind: type[_F], parts: Sequence[_F]) -> _F:
    names = [field.name for field in fields(kind) if field.name != "history"]
    tensors: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return kind(**tensors, history=tuple(history for part in parts for history in part.history))


# 1. what does not change ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """One pass over the rows: what the steps need, and what the closed form needs. Rows are in the order given."""

    layer: int
    rows: tuple[Row, ...]
    requests: tuple[int, ...]
    """The requests present, ascending; row tensors below refer to rows, not to requests."""
    suffix: Float[Tensor, "row window d_model"]
    """The stream after the block from position s on, padded on the right."""
    past: tuple[tuple[Tensor, Tensor], ...]
    """Per block above: keys and values (row, kv_head, before, head_dim) of positions < s, padded on the right."""
    key: Float[Tensor, "row d_mlp"]
    value: Float[Tensor, "row d_model"]
    """The MLP's output at s."""
    attn: Float[Tensor, "row d_model"] | None = None
    """What attention writes at s; None unless asked for."""
    mid: Float[Tensor, "row d_model"] | None = None
    """The stream between attention and MLP at s; None unless asked for."""


def read(lm: ModelAdapter, layer: int, rows: Sequence[Row], between: bool = False) -> Reading:
    """Step 1. `between` keeps `attn` and `mid` too.

    Raises BadInput while something stands in front of the model or watches it: what the model reads then is not what
    an edit of its weights would change.
    """
    if lm.prefix is not None or lm.readers:
        raise BadInput(
            "requests",
            "an edit of weights can't be prepared while a steering method or a text in front of the prompt is active.",
            "Prepare the edit of weights first, then steer.",
        )
    batch = tokens.pack(lm.tokenizer, [row.ids for row in rows], lm.device)
    window = max(len(row.ids) - row.subject for row in rows)
    before = max(row.subject for row in rows)
    at = torch.tensor([row.subject for row in rows])
    parts = ("attn", "resid_mid", "mlp_down_in", "mlp", "block_out")
    sites = {part: Site(layer, part) for part in (parts if between else parts[2:])}
    with torch.no_grad(), capture(lm, sites.values(), stop=False) as got:
        past = run_keeping(lm, batch.ids)
    stream = got[sites["block_out"]]
    index = (at[:, None] + torch.arange(window)).clamp_max(stream.shape[1] - 1)  # (row, window)
    each = torch.arange(len(rows))
    return Reading(
        layer=layer,
        rows=tuple(rows),
        requests=tuple(sorted({row.request for row in rows})),
        suffix=stream[each[:, None], index],
        past=tuple((keys[:, :, :before], values[:, :, :before]) for keys, values in past[layer + 1 :]),
        key=got[sites["mlp_down_in"]][each, at].float(),
        value=got[sites["mlp"]][each, at].float(),
        attn=got[sites["attn"]][each, at].float() if between else None,
        mid=got[sites["resid_mid"]][each, at] if between else None,
    )


def loss_scale(lm: ModelAdapter) -> float:
    """What a loss is multiplied by before its gradient is taken, and the gradient divided by after."""
    return HALF_SCALE if lm.dtype == torch.float16 else 1.0


# 2. the blocks above the edit ----------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """Per request, in nats; and the log-probabilities of the distributions to be kept."""

    nll: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]
    lowest: Float[Tensor, " n"]
    """Lowest probability of the whole target over the rows."""
    now: Float[Tensor, "keep vocab"]
    said: Bool[Tensor, " n"]
    """Whether every target token is the likeliest one in all rows."""


class Upper:
    """The model above the edit, on positions >= s of some requests' rows: delta in, logits where they are read.

    Deltas are (n, part, d_model): one part here, the addition to the stream after the block.
    """

    def __init__(self, lm: ModelAdapter, reading: Reading, requests: Sequence[int]) -> None:
        rows = [i for i, row in enumerate(reading.rows) if row.request in requests]
        kept = [reading.rows[i] for i in rows]
        device = reading.suffix.device
        self.lm = lm
        self.layer = reading.layer
        self.requests = tuple(requests)
        self.rows = rows
        """Indices into reading.rows."""
        self.owner = torch.tensor([requests.index(row.request) for row in kept], device=device)  # (row,)
        pick = (
            slice(None) if len(rows) == len(reading.rows) else torch.tensor(rows)
        )  # blocks may lie on several devices
        self.pick = pick
        self.suffix = reading.suffix[pick]
        window = self.suffix.shape[1]
        before = reading.past[0][0].shape[2] if reading.past else 0
        past = {reading.layer + 1 + i: (keys[pick], values[pick]) for i, (keys, values) in enumerate(reading.past)}
        at = torch.tensor([row.subject for row in kept], device=device)
        positions = (at[:, None] + torch.arange(window, device=device)).clamp_max(lm.max_positions - 1)
        self.arguments = block_arguments(lm, self.suffix, positions, suffix_mask(at, window, before), KeptPast(past))

        # 3. where logits are read, as (row, position after s): targets row by row, then the kept distributions
        reads = [
            (i, len(row.ids) - len(row.target) + t - row.subject, token)
            for i, row in enumerate(kept)
            for t, token in enumerate(row.target)
        ]
        keeps = [(i, len(row.ids) - 1 - row.subject) for i, row in enumerate(kept) if not row.target]
        self.target = torch.tensor([token for *_, token in reads], device=device)  # (target,)
        self.target_row = torch.tensor([i for i, *_ in reads], device=device)
        self.keep_row = torch.tensor([i for i, _ in keeps], dtype=torch.long, device=device)
        self.at = torch.tensor([place[:2] for place in (*reads, *keeps)], device=device)  # (read, 2)
        self.is_target = torch.tensor([bool(row.target) for row in kept], device=device)
        self.lengths = torch.tensor([max(1, len(row.target)) for row in kept], device=device)

    def first(self, delta: Float[Tensor, "n part d_model"]) -> Float[Tensor, "row d_model"]:
        """The stream after the block at s, in float32."""
        return self.suffix[:, 0].float() + delta[self.owner].sum(1)

    def logits(self, delta: Float[Tensor, "n part d_model"]) -> Float[Tensor, "read vocab"]:
        """float32 logits at every place that is read."""
        first = self.first(delta)[:, None].to(self.suffix.dtype)
        hidden = torch.cat((first, self.suffix[:, 1:]), dim=1)  # (row, window, d_model)
        for layer in range(self.layer + 1, self.lm.n_layers):
            output = self.lm.block(layer)(hidden, **self.arguments)
            hidden = output if isinstance(output, Tensor) else output[0]
        at = self.at.to(hidden.device)
        return self.lm.unembed(hidden[at[:, 0], at[:, 1]]).float()

    def losses(self, delta: Float[Tensor, "n part d_model"], kept: Float[Tensor, "keep vocab"] | None) -> Losses:
        """The parts of the loss; `kept` None means that the distributions are to be kept as they are now."""
        logs = self.logits(delta).log_softmax(-1).to(delta.device)
        reads = len(self.target)
        said = logs[:reads].gather(-1, self.target[:, None])[:, 0]  # (target,)
        rows = said.new_zeros(len(self.owner)).index_add(0, self.target_row, said)  # log p of a row's whole target
        n = len(self.requests)
        nll = _mean_by(self.owner[self.is_target], (-rows / self.lengths)[self.is_target], n)
        now = logs[reads:]
        before = now.detach() if kept is None else kept
        rise = (before.exp() * (before - now)).sum(-1)  # (keep,)
        kl = _mean_by(self.owner[self.keep_row], rise, n)
        lowest = said.new_full((n,), 1.0).scatter_reduce(
            0, self.owner[self.is_target], rows.detach()[self.is_target].exp(), "amin"
        )
        first = (logs[:reads].detach().argmax(-1) == self.target).to(said.dtype)
        top = said.new_ones(n).scatter_reduce(0, self.owner[self.target_row], first, "amin").bool()
        return Losses(nll, kl, lowest, now, top)


class PairUpper(Upper):
    """The same for two parts: what joins attention's output, and what joins the MLP's, in the block itself."""

    def __init__(self, lm: ModelAdapter, reading: Reading, requests: Sequence[int]) -> None:
        super().__init__(lm, reading, requests)
        assert reading.mid is not None  # read(between=True)
        self.mid = reading.mid[self.pick]

    def first(self, delta: Float[Tensor, "n part d_model"]) -> Float[Tensor, "row d_model"]:
        """The stream after the block at s: beside the two parts, the MLP's answer to the first where it sees it."""
        attn, mlp = delta[self.owner].unbind(1)
        if self.lm.spec.parallel:
            return self.suffix[:, 0].float() + attn + mlp
        mid = self.mid.float() + attn
        norm, module = self.lm.mlp_norm(self.layer), self.lm.mlp(self.layer)
        written = untuple(module(norm(mid.to(self.mid.dtype))[:, None]))[:, 0]
        return mid + written.float() + mlp


def _mean_by(owner: Int[Tensor, " k"], values: Float[Tensor, " k"], n: int) -> Float[Tensor, " n"]:
    """Mean of the values of each owner; 0 for one without any."""
    sums = values.new_zeros(n).index_add(0, owner, values)
    return sums / torch.bincount(owner, minlength=n).clamp_min(1)


# the search ----------------------------------------------------------------------------------------------------------


def _search(
    lm: ModelAdapter,
    reading: Reading,
    search: Search,
    kind: type[Upper],
    radius: Float[Tensor, "n part"],
    step: Callable[[], None],
) -> tuple[Float[Tensor, "n part d_model"], tuple[tuple[Step, ...], ...]]:
    """Deltas of all requests of a reading, and how they came about; `radius` is what clamp and decay refer to."""
    n = len(reading.requests)
    device = reading.suffix.device
    delta = torch.zeros(*radius.shape, lm.d_model, device=device)
    momentum, square = torch.zeros_like(delta), torch.zeros_like(delta)
    history: list[list[Step]] = [[] for _ in range(n)]
    scale = loss_scale(lm)

    active = list(range(n))  # positions in reading.requests
    upper = kind(lm, reading, [reading.requests[i] for i in active])
    kept: Tensor | None = None
    for number in range(1, search.steps + 1):
        here = torch.tensor(active, device=device)
        with torch.enable_grad():
            trial = delta[here].requires_grad_()
            nll, kl, lowest, now, said = upper.losses(trial, kept)
            decay = search.weight_decay * (trial.norm(dim=-1) / radius[here] ** 2).sum(-1)
            share = torch.where(said, WHEN_SAID, 1.0) if search.adaptive else 1.0
            loss = share * nll + search.kl_weight * kl + decay
            (gradient,) = torch.autograd.grad(loss.sum() * scale, trial)
        gradient = gradient / scale
        kept = now.detach() if kept is None else kept
        enough = said & (kl.detach() <= KL_ENOUGH) if search.adaptive else torch.zeros_like(said)
        slopes = gradient.flatten(1).norm(dim=-1)
        values = torch.stack((loss, nll, kl, lowest, slopes, enough.to(nll.dtype)), dim=-1).detach()
        check_finite("The search for the new value", values)
        done = []
        for i, (row_loss, row_nll, row_kl, probability, slope, over) in zip(active, values.tolist(), strict=True):
            history[i].append(Step(row_loss, row_nll, row_kl, probability))
            done.append(probability >= search.stop_probability or row_loss < search.stop_loss or bool(over))
            if number == 1 and slope == 0:
                raise BadInput(
                    "layer",
                    f"nothing after block {reading.layer} carries the subject to the end of the prompt.",
                    "Choose a lower layer.",
                )
        step()
        if all(done):
            break
        if any(done):
            going = [i for i, over in enumerate(done) if not over]
            gone = {active[i] for i, over in enumerate(done) if over}
            keep_going = ~torch.tensor([active[i] in gone for i in upper.owner[upper.keep_row].tolist()], device=device)
            kept = kept[keep_going.to(kept.device)]
            gradient = gradient[going]
            active = [active[i] for i in going]
            here = torch.tensor(active, device=device)
            upper = kind(lm, reading, [reading.requests[i] for i in active])
        # Adam, written out because each request has its own state and they stop one by one
        momentum[here] = BETAS[0] * momentum[here] + (1 - BETAS[0]) * gradient
        square[here] = BETAS[1] * square[here] + (1 - BETAS[1]) * gradient**2
        mean = momentum[here] / (1 - BETAS[0] ** number)
        spread = (square[here] / (1 - BETAS[1] ** number)).sqrt()
        moved = delta[here] - search.learning_rate * mean / (spread + EPSILON)
        limit = search.clamp * radius[here, :, None]
        delta[here] = moved * (limit / moved.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
    check_finite("The new value", delta)
    return delta, tuple(map(tuple, history))


def _first_rows(reading: Reading) -> Int[Tensor, " n"]:
    """Index of each request's bare prompt."""
    found = {row.request: i for i, row in reversed(list(enumerate(reading.rows))) if row.bare}
    return torch.tensor([found[request] for request in reading.requests], device=reading.suffix.device)


def _mean_keys(reading: Reading) -> Float[Tensor, "n d_mlp"]:
    picks = [[i for i, row in enumerate(reading.rows) if row.request == r and row.target] for r in reading.requests]
    return torch.stack([reading.key[pick].mean(0) for pick in picks])
