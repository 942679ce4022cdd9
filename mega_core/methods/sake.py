"""SAKE: Steering Activations for Knowledge Editing (Scialanga, Laugel, Grari, Detyniecki, ACL 2025,
arXiv 2503.01751).

No weight changes. While the model reads a prompt that asks for the edited fact (s, r, o -> o*), the last hidden state
is moved to where it would be behind a context that states the new fact:

1. Source: the state behind the final norm, at the last token, of prompts p (S) and of p behind the old fact (S',
   "Repeat this sentence: 'p o'. p"). Target: of p behind the new fact (T, "Do not mention 'o'. Repeat this sentence:
   'p o*'. p"). See fitting.
2. Map: linear optimal transport between the two samples taken as Gaussians, with `regularisation` on the diagonal of
   both covariances (published: 0.01; 0.5 for LLaMA2-7B). See transport.
3. Use: h <- h + alpha (T(h) - h) at the last position of the prompt, if the gate lets the prompt through; then the
   unembedding as always.

Ours: prompts are the edit template, templates known for the relation, and neutral texts before them (the paper has a
language model write 100 paraphrases); of the target contexts only those count behind which the model says o*; `alpha`
(the paper's is 1); a new object of several tokens has a map for each of its first four; the gate (see there; `paper` is
the published one, a distance between prompt embeddings). Logical implications among the contexts are left out: what
follows from an edit is written by a person in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mega_core.events import Note, Reporter
from mega_core.methods import knobs
from mega_core.methods.base import Method, knob
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from mega_core.methods.steering import Steering
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.arch import ArchSpec


@dataclass(frozen=True, slots=True)
class SakeParams:
    """What can be set."""

    alpha: float = knob(1.0, "Strength: 0 leaves the state alone, 1 moves it by the whole map.", low=0.0, high=10.0)
    regularisation: float = knob(
        0.01, "Added to both covariances; larger values bring the map nearer to a plain shift.", low=1e-6, high=1e6
    )
    target: str = knobs.target("auto")
    contexts: str = knobs.stating("sake", ("sake", "new", "pool"))
    source: str = knobs.source("both")
    prompts: int = knobs.prompts(20, "Texts of each kind (published: 100 paraphrases).")
    gate: str = knobs.gate("centroid")
    gate_layer: int | None = knobs.gate_layer()
    implications: bool = knobs.implications(True)


def needs(spec: ArchSpec) -> str | None:
    """Every architecture in the table has a final norm before its head."""
    return None


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: SakeParams, seed: int, report: Reporter
) -> Steering:
    """The maps and gates of the edits, one each. Leaves the model as it found it."""
    from torch import Tensor

    from mega_core.methods import fitting
    from mega_core.methods.transport import AffineMap, fit_map
    from mega_core.models.hooks import FINAL, Site

    def transport(source: Tensor, target: Tensor) -> AffineMap:
        return fit_map(source, target, "ot-full", shrinkage=params.regularisation, absolute=True)

    report(Note("SAKE acts behind the last norm, so the contributions of layers and modules don't show what it does."))
    # 1. and 2.; 3. is the change itself
    return fitting.steered(lm, requests, [Site(lm.n_layers - 1, FINAL)], params, transport, seed, report)


SAKE = Method(
    name="sake",
    title="SAKE",
    summary="Moves the last hidden state by an optimal transport map where a prompt asks for the edited fact.",
    family="steering",
    paper="arXiv 2503.01751",
    params=SakeParams,
    prepare=prepare,
    needs=needs,
)
