"""The value search written plainly: full forwards, logits at every position, one request. Slow, and easy to check.

`compare_steps` measures it against mega_core.methods.optimise; the benchmarks call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.methods.optimise import Row, Search, Upper, read
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene


def plain_base(lm: ModelAdapter, layer: int, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """(v0 and stream at s in the first row, log-probabilities to keep (keep, vocab))."""
    batch = tokens.pack(lm.tokenizer, [row.ids for row in rows], lm.device)
    sites = [Site(layer, "mlp"), Site(layer, "block_out")]
    with torch.no_grad(), capture(lm, sites, stop=False) as got:
        logs = lm.logits(batch).float().log_softmax(-1)
    kept = [logs[i, len(row.ids) - 1] for i, row in enumerate(rows) if not row.target]
    first = rows[0].subject
    return (
        got[sites[0]][0, first].float(),
        got[sites[1]][0, first].float(),
        torch.stack(kept) if kept else logs[:0, 0],
    )


def plain_loss(
    lm: ModelAdapter,
    layer: int,
    rows: Sequence[Row],
    delta: Float[Tensor, " d_model"],
    kept: Float[Tensor, "keep vocab"],
    search: Search,
    radius: float,
) -> Tensor:
    """The loss as the paper states it, delta added to the MLP's output at the subject's last token of every row."""
    batch = tokens.pack(lm.tokenizer, [row.ids for row in rows], lm.device)
    each = torch.arange(len(rows))
    at = torch.tensor([row.subject for row in rows])

    def add(mlp: Tensor) -> Tensor:
        new = mlp.clone()
        new[each, at] = (mlp[each, at].float() + delta).to(mlp.dtype)
        return new

    with intervene(lm, {Site(layer, "mlp"): add}):
        logs = lm.logits(batch).float().log_softmax(-1)  # (row, pos, vocab)
    nlls, kls = [], []
    for i, row in enumerate(rows):
        if row.target:
            start = len(row.ids) - len(row.target)
            nlls.append(-torch.stack([logs[i, start + t, token] for t, token in enumerate(row.target)]).mean())
        else:
            before = kept[len(kls)]
            kls.append((before.exp() * (before - logs[i, len(row.ids) - 1])).sum())
    kl = torch.stack(kls).mean() if kls else torch.zeros(())
    return torch.stack(nlls).mean() + search.kl_weight * kl + search.weight_decay * delta.norm() / radius**2


def plain_search(lm: ModelAdapter, layer: int, rows: Sequence[Row], search: Search) -> Tensor:
    """delta after all steps, by torch's own Adam."""
    v0, residual, kept = plain_base(lm, layer, rows)
    radius = float((v0 if search.reference == "value" else residual).norm())
    delta = torch.zeros_like(v0, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=search.learning_rate)
    for _ in range(search.steps):
        adam.zero_grad()
        plain_loss(lm, layer, rows, delta, kept, search, radius).backward()
        adam.step()
        with torch.no_grad():
            delta.mul_(min(1.0, search.clamp * radius / float(delta.norm().clamp_min(1e-30))))
    return delta.detach()


def fast_gradient(
    lm: ModelAdapter, layer: int, rows: Sequence[Row], delta: Float[Tensor, " d_model"], search: Search
) -> tuple[Tensor, Tensor]:
    """(loss without decay, its gradient) by the restructured search, for one request."""
    upper = Upper(lm, read(lm, layer, rows), [0])
    kept = upper.losses(torch.zeros_like(delta)[None, None], None).now.detach()
    trial = delta[None, None].clone().requires_grad_()
    nll, kl, *_ = upper.losses(trial, kept)
    loss = (nll + search.kl_weight * kl)[0]
    return loss.detach(), torch.autograd.grad(loss, trial)[0][0, 0]


def plain_gradient(
    lm: ModelAdapter, layer: int, rows: Sequence[Row], delta: Float[Tensor, " d_model"], search: Search
) -> tuple[Tensor, Tensor]:
    """The same by full forwards."""
    v0, _, kept = plain_base(lm, layer, rows)
    trial = delta.clone().requires_grad_()
    loss = plain_loss(lm, layer, rows, trial, kept, search, float(v0.norm()))
    (gradient,) = torch.autograd.grad(loss, trial)
    return loss.detach(), gradient


def compare_steps(
    lm: ModelAdapter, rows: int = 22, length: int = 20, subject: int = 12, layer: int = 4, repeats: int = 5
) -> dict[str, float]:
    """Milliseconds of one forward and backward, plain and restructured, on random ids; and how far gradients differ."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, lm.vocab_size, (rows, length + 1), generator=generator).tolist()
    suffix = ids[0][subject:]
    texts = [
        Row(0, tuple([*row[:subject], *suffix][:-1]), subject, (suffix[-1],) if i < rows - 1 else (), bare=i == 0)
        for i, row in enumerate(ids)
    ]
    search = Search(weight_decay=0.0)
    delta = 0.1 * torch.randn(lm.d_model, generator=generator).to(lm.device)
    _, _, kept = plain_base(lm, layer, texts)
    reading = read(lm, layer, texts)
    upper = Upper(lm, reading, [0])
    gradients: dict[str, Tensor] = {}

    def plain() -> None:
        trial = delta.clone().requires_grad_()
        loss = plain_loss(lm, layer, texts, trial, kept, search, 1.0)
        (gradients["plain"],) = torch.autograd.grad(loss, trial)

    def fast() -> None:
        trial = delta[None, None].clone().requires_grad_()
        nll, kl, *_ = upper.losses(trial, kept)
        (gradients["fast"],) = torch.autograd.grad((nll + search.kl_weight * kl).sum(), trial)

    found: dict[str, float] = {}
    for name, run in (("plain", plain), ("fast", fast)):
        run()
        seconds = []
        for _ in range(repeats):
            start = perf_counter()
            run()
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(perf_counter() - start)
        found[f"{name}_ms"] = 1000 * median(seconds)
        found[f"{name}_best_ms"] = 1000 * min(seconds)
    start = perf_counter()
    read(lm, layer, texts)
    found["read_ms"] = 1000 * (perf_counter() - start)
    found["speedup"] = found["plain_ms"] / found["fast_ms"]
    found["gradient_error"] = float((gradients["plain"] - gradients["fast"][0, 0]).norm() / gradients["plain"].norm())
    return found


def gpt2_small_shape() -> ModelAdapter:
    """GPT-2 small with random weights: 124 M parameters, no download."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from mega_core.records import ModelRef
    from tests.tiny import tiny_tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config())
    return ModelAdapter(model, tiny_tokenizer(), ModelRef("gpt2-shape"))
