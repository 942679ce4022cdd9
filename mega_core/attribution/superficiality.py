"""Superficial editing: does a text that suggests the original object bring it back, and through which heads (Xie et al.
2025, arXiv 2505.12636).

1. Stress prompts: the edit prompt as it is ("none"), and behind a text like an encyclopedia's about the original
   object ("wiki"), the original object said again and again ("repeat"), a question whether the original fact is true
   ("question"). The words are ours, and so plain that the small models that ship know them; the paper takes
   Wikipedia's own summaries.
2. At the last token, by the first token of each object: says_true (the paper's OM), the likeliest next token is the
   original object's; prefers_true (OP), p(true) > p(new).
3. A head's output is what its numbers write to the residual stream at the last token, v = W_O[head] a. Two readings:
   lens_prob, p(true) if v alone were the last state, read as the model reads that one: final norm of v itself, then the
   unembedding (LOPH; the paper's heads of interest pass 0.1, which under the prompt's frozen norm no head comes near);
   contribution, log p(true | h + v) - log p(true | h) in nats with h the stream before the block's attention and the
   norm frozen at the prompt's last state (as everywhere here).
4. Head -1 is what attention writes besides its heads: its bias, and what steering adds.

Heads that are large in both re-inject the original object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from mega_core import frames
from mega_core.attribution.frozen import FrozenLens
from mega_core.attribution.heads import REST, head_scores, head_vectors
from mega_core.attribution.recording import Recording, groups, record
from mega_core.attribution.settings import SuperficialityParams
from mega_core.errors import BadInput
from mega_core.events import Note, Reporter, stage
from mega_core.models.adapter import ModelAdapter
from mega_core.models.suffix import as_read
from mega_core.records import EditRequest

PREFIXES: Mapping[str, str] = {
    "none": "",
    "wiki": "According to the book, {true} is famous. Many people know {true}, and it is well known. ",
    "repeat": "{true}. {true}. {true}. {true}. {true}. ",
    "question": "Is it correct that {prompt} {true}? ",
}
"""Kind -> text in front of the prompt (ours)."""
READS = ("attn_out_in",)


def look(
    recording: Recording, params: SuperficialityParams, state: str, report: Reporter
) -> Mapping[str, pd.DataFrame]:
    """The frames `stress` and `stress_heads`; empty, with a note, where no original object is known."""
    lm = recording.lm
    known = [(case, one) for case, one in zip(recording.cases, recording.requests, strict=True) if one.target_true]
    if len(known) < len(recording.requests):
        report(Note("Prompts that suggest the original object need one: edits without it are left out."))
    stressed = [(case, kind, one) for case, request in known for kind, one in stress(lm, request, report)]
    prompts = [one for _, _, one in stressed]
    rows: list[dict[str, object]] = []
    tables: list[pd.DataFrame] = []
    reads = READS if params.heads else ()
    together = list(groups(lm, prompts, reads))
    with stage(report, "stress prompts", total=len(together)) as step:
        for numbers in together:
            seen = record(lm, [prompts[k] for k in numbers], reads)
            p, likeliest = answers(seen)
            for i, k in enumerate(numbers):
                case, kind, one = stressed[k]
                rows.append(
                    {
                        "state": state,
                        "case": case,
                        "kind": kind,
                        "prompt": one.prompt,
                        "p_new": float(p[i, 0]),
                        "p_true": float(p[i, 1]),
                        "says_true": int(likeliest[i]) == seen.candidates[i]["true"],
                        "prefers_true": bool(p[i, 1] > p[i, 0]),
                    }
                )
            if params.heads:
                tables.append(_head_rows(seen, [stressed[k][:2] for k in numbers], state))
            step()
    heads = pd.concat(tables, ignore_index=True) if tables else frames.empty("stress_heads")
    return {"stress": frames.from_rows(rows, "stress"), "stress_heads": frames.check(heads, "stress_heads")}


def stress(lm: ModelAdapter, request: EditRequest, report: Reporter) -> Iterator[tuple[str, EditRequest]]:
    """1. Every kind with the request whose prompt is the stressed one; a note on each that is too long."""
    for kind, text in PREFIXES.items():
        prefix = text.replace("{prompt}", request.prompt.rstrip()).replace("{true}", request.target_true or "")
        try:
            stressed = replace(request, template=prefix + request.template, paraphrases=(), neighbours=())
            full, _ = as_read(lm, lm.encode([stressed.prompt]))
            if full.ids.shape[1] > lm.max_positions:
                raise BadInput("prompt", f"{full.ids.shape[1]} tokens, but {lm.name} reads at most {lm.max_positions}.")
        except BadInput as why:
            report(Note(f"The stress prompt {kind!r} of {request.subject} is left out: {why}"))
        else:
            yield kind, stressed


def answers(seen: Recording) -> tuple[Float[Tensor, "batch 2"], Int[Tensor, " batch"]]:
    """2. p of "new" and "true" at the last token, and the likeliest token; by the model's own norm and head."""
    logits = seen.lm.unembed(seen.states[-1]).float()  # (batch, vocab)
    logs = logits.gather(-1, seen.ids().to(logits.device)) - logits.logsumexp(-1, keepdim=True)
    return logs.double().exp().cpu(), logits.argmax(-1).cpu()


def lens_probs(seen: Recording) -> Float[Tensor, "layer head_and_rest batch"]:
    """3.: p(true) read off what each head writes, and off what else attention writes (4.)."""
    vectors = head_vectors(seen)
    flat = vectors.flatten(0, -2)  # (layer * head_and_rest * batch, d_model)
    ids = seen.ids()[:, 1:].repeat(len(flat) // len(seen.cases), 1)
    return FrozenLens.of(seen.lm, flat).log_probs(flat[None], ids).double().exp().reshape(vectors.shape[:-1])


def _head_rows(seen: Recording, keys: Sequence[tuple[int, str]], state: str) -> pd.DataFrame:
    lm = seen.lm
    names = [*range(lm.n_heads), REST]
    frame = pd.DataFrame(
        [(case, kind, layer, head) for layer in range(lm.n_layers) for head in names for case, kind in keys],
        columns=["case", "kind", "layer", "head"],
    )
    frame["state"] = state
    frame["lens_prob"] = lens_probs(seen).flatten().cpu().numpy()
    frame["contribution"] = head_scores(seen)[..., 1].flatten().cpu().numpy()
    return frame
