"""What can be set on the views: a dataclass each, made with knob(). No torch: forms and help are drawn from this."""

from __future__ import annotations

from dataclasses import dataclass

from mega_core.params import knob


@dataclass(frozen=True, slots=True)
class HeadsParams:
    """Of the view `heads`."""

    heads: int = knob(16, "how many of the strongest heads are split by source position", low=1, high=200, ours=True)


@dataclass(frozen=True, slots=True)
class QueryParams:
    """Of the view `query`."""

    values: int = knob(30, "value neurons of each kind whose activation is traced back", low=1, high=300)
    key: str = knob(
        "linearised",
        "what an MLP neuron looks for: its activation's derivative, a row of its first matrix (up, gate), or, as the "
        "authors' code has it for gated MLPs, its column of the last one (repo)",
        choices=("linearised", "up", "gate", "repo"),
        ours=True,
    )
    centre: bool = knob(True, "take a LayerNorm's centring into account, which the authors' code leaves out", ours=True)
    top: int = knob(300, "query neurons listed", low=1, high=2000)
    value_top: int = knob(300, "value neurons among which query neurons are looked up", low=1, high=2000)


@dataclass(frozen=True, slots=True)
class TraceParams:
    """Of the view `trace`."""

    noise: float = knob(
        3.0, "standard deviation of the noise, in standard deviations of subjects' embeddings", low=0.0, high=100.0
    )
    samples: int = knob(10, "noise draws that are averaged", low=1, high=100)
    window: int | None = knob(
        None,
        "layers whose attention or MLP outputs are restored together; none: 10 of 48, as in the paper, at least 1",
        low=1,
        high=200,
        ours=True,
    )
    sites: str = knob(
        "all",
        "what is restored: the stream after a block, attention outputs, MLP outputs, or each of them",
        choices=("all", "block_out", "attn", "mlp"),
        ours=True,
    )
    seed: int = knob(0, "seed of the noise", low=0, high=2**31 - 1, ours=True)


@dataclass(frozen=True, slots=True)
class SuperficialityParams:
    """Of the view `superficiality`."""

    heads: bool = knob(True, "also read every head's output at the last token", ours=True)


@dataclass(frozen=True, slots=True)
class LensParams:
    """Of the view `lens`."""

    positions: str = knob(
        "last subject",
        "at which tokens the stream is read: the prompt's last, the subject's last, both, or all",
        choices=("last subject", "last", "subject", "all"),
        ours=True,
    )
    norm: str = knob(
        "own",
        "the final norm of each state: the model's own, or with its scale frozen at the last state",
        choices=("own", "frozen"),
    )


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """Of the view `attention`."""

    neighbours: int = knob(4, "how many neighbour prompts are looked at too", low=0, high=32, ours=True)


@dataclass(frozen=True, slots=True)
class NeuronsParams:
    """Of the views `neurons` and `attention_neurons`."""

    top: int = knob(100, "most promoting neurons listed per candidate", low=1, high=2000)
    tail: int = knob(20, "most suppressing neurons listed per candidate", low=0, high=500, ours=True)
    read: int = knob(20, "of each of these, how many are read as tokens", low=0, high=500, ours=True)
