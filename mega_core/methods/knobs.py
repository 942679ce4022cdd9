"""The parameters that several methods share: name for name the same help and range, the default each method's own.

    steps: int = knobs.steps(20)

makes one field of a params dataclass. A parameter of one method only stands in that method's file; so does one that
shares its name with others and means something else. No torch here: forms are drawn from this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mega_core.methods.base import knob

VALUE = "the new value"


# Where ---------------------------------------------------------------------------------------------------------------


def layer(help: str, *, ours: bool = False) -> Any:
    """One layer by its number; None when the method or the model's own defaults choose it."""
    return knob(None, help, low=0, high=200, ours=ours)


def edited_layers() -> Any:
    """Layers whose MLPs an edit is spread over, as text."""
    return knob(
        None,
        "Layers whose MLPs are edited, such as 3-8 or 2,4. Empty: the model's own, or a few up to a third of its "
        "depth.",
    )


# The search for a new value (optimise) -------------------------------------------------------------------------------


def steps(default: int, what: str = VALUE, *, high: int = 200) -> Any:
    """Most updates of `what`."""
    return knob(default, f"Most updates of {what}.", low=1, high=high)


def learning_rate(default: float, what: str = VALUE, *, low: float = 1e-4, high: float = 10.0) -> Any:
    """Size of an update of `what`."""
    return knob(default, f"Size of an update of {what}.", low=low, high=high)


def clamp(default: float, norm: str) -> Any:
    """How far the new value may go, in units of `norm`."""
    return knob(default, f"The value may change by this multiple of {norm}.", low=0.01, high=100.0)


def weight_decay(default: float, what: str = "the change of the value") -> Any:
    """The search's own penalty, not Adam's."""
    return knob(default, f"Penalty on the size of {what}.", low=0.0, high=100.0)


def stop_probability(default: float, when: str = "the new object is at least this likely in every context") -> Any:
    """Where a search ends before its last step: no paper has it."""
    return knob(default, f"Stop when {when}; 1 never stops for that.", low=0.0, high=1.0, ours=True)


def clamp_each(default: float) -> Any:
    """clamp() of the joint search, which has two values."""
    return knob(default, "Either value may change by this multiple of its reference norm.", low=0.01, high=100.0)


def clamp_references(default: str) -> Any:
    """What the two values of the joint search are measured by."""
    return knob(
        default,
        "Reference norms: of attention's and the MLP's own outputs (value, as published), or of the residual stream.",
        choices=("value", "residual"),
    )


def adaptive(default: bool) -> Any:
    """PMET's way to end the joint search."""
    return knob(
        default, "Once the new object is said everywhere, press less, and stop when the kept prompts have hardly moved."
    )


def stop_loss(default: float) -> Any:
    """The other way to end the joint search."""
    return knob(default, "Stop when the loss is below this.", low=0.0, high=10.0)


def written(default: str) -> Any:
    """Which part of what the joint search found goes into the matrices."""
    return knob(
        default,
        "What is written: the MLP's own change (mlp, as published), or all that both changes do to the block (all).",
        choices=("mlp", "all"),
    )


# What a method reads -------------------------------------------------------------------------------------------------


def contexts(default: int, *, ours: bool = False) -> Any:
    """How many texts the edit prompt is read in."""
    return knob(default, "In how many contexts the prompt is put, the bare prompt included.", low=1, high=21, ours=ours)


def context_source(default: str) -> Any:
    """Where those texts come from."""
    return knob(
        default,
        "Texts of the contexts: fixed ones, or sampled from the model.",
        choices=("fixed", "sampled"),
        ours=True,
    )


def kl_weight(default: float) -> Any:
    """0 keeps no prompts."""
    return knob(default, "How strongly the kept prompts hold their answers.", low=0.0, high=100.0)


def kl_prompts(default: str) -> Any:
    """As rome.kept_prompts reads them."""
    return knob(
        default,
        "Prompts whose next word should stay, with {} for the subject and | between several; auto: the subject's "
        "other relations, where they are known.",
    )


# The closed form (solve) and its statistics (covariance) -------------------------------------------------------------


def covariance(default: str) -> Any:
    """Which statistics of ordinary keys the closed form uses."""
    return knob(
        default,
        "Statistics of ordinary keys: quick (a small text), full (ten times as much), identity (none).",
        choices=("quick", "identity", "full"),
        ours=True,
    )


def shrinkage() -> Any:
    """How they are mixed with a plain average; None lets the size of the text say it."""
    return knob(
        None,
        "Share of a plain average mixed into the statistics. Empty: 1 to 5 %, by text size.",
        low=0.0,
        high=1.0,
        ours=True,
    )


def mom2_weight(default: float) -> Any:
    """The published code's name for lambda."""
    return knob(
        default,
        "How many ordinary keys an edit is weighed against (lambda); less edits more surely.",
        low=1e-6,
        high=1e9,
    )


def bare_weight(default: float) -> Any:
    """How keys of one fact are averaged."""
    return knob(default, "Share of the prompt without context in a key.", low=0.0, high=1.0)


# Training by Adam (finetune) -----------------------------------------------------------------------------------------


def updates(default: int) -> Any:
    """Most steps of a training, named `steps`."""
    return knob(default, "Most updates.", low=1, high=500)


def adam_rate(default: float, *, low: float) -> Any:
    """Its learning rate."""
    return knob(default, "Step size of Adam.", low=low, high=10.0)


def mean_stop_loss(default: float, *, ours: bool = False) -> Any:
    """The loss at which it ends, named `stop_loss`."""
    return knob(default, "Stop once the loss is below this, in nats per token.", low=0.0, high=10.0, ours=ours)


# Steering (fitting, gate) --------------------------------------------------------------------------------------------


def target(default: str) -> Any:
    """As fitting.target_sets reads it."""
    return knob(
        default,
        "Target rows: contexts that state the new fact, prompts of other subjects that have it (donors), or auto.",
        choices=("auto", "contexts", "donors"),
        ours=True,
    )


def stating(default: str, choices: Sequence[str], *, ours: bool = False) -> Any:
    """The wording of those contexts, named `contexts`; `choices` are pool, sake and new, the likeliest first."""
    return knob(
        default,
        "How contexts state the new fact: as SAKE does (sake), as a new fact (new), or several ways (pool).",
        choices=choices,
        ours=ours,
    )


def source(default: str) -> Any:
    """What the map starts from."""
    return knob(
        default,
        "Source rows: bare prompts, or also those behind the old fact (both).",
        choices=("both", "bare"),
    )


def prompts(default: int, help: str = "Texts of each kind.", *, low: int = 1, high: int = 200) -> Any:
    """How much a map is fitted on."""
    return knob(default, help, low=low, high=high, ours=True)


def gate(default: str) -> Any:
    """As gate.fit_gate reads it."""
    return knob(
        default,
        "Which prompts are steered: by subject and relation (centroid), by subject, by SAKE's distance (paper), or "
        "always.",
        choices=("centroid", "subject", "paper", "always"),
        ours=True,
    )


def gate_layer() -> Any:
    """Where it compares them."""
    return layer("Layer at which the gate compares prompts. Empty: the middle.", ours=True)


def implications(default: bool) -> Any:
    """Whether it knows what follows from an edit."""
    return knob(default, "Let two-hop questions about the edited fact through the gate.", ours=True)
