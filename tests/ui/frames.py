"""A report with every frame a run can hold, made from the contracts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pandas as pd

from mega_core import frames
from mega_core.attribution import VIEWS
from mega_core.records import Report
from tests.ui.fake import WORKS

NEIGHBOUR = WORKS.question.requests[0].neighbours[0]
CHOICES = {
    "state": ["before", "after"],
    "candidate": ["new", "true"],
    "case": [0],
    "layer": [0, 1, 2],
    "head": [0, 1],
    "position": [0, 3],
    "neuron": [5, 9],
    "dim": [1],
    "module": ["attn", "ffn"],
    "values": ["ffn", "attn"],
    "site": ["resid_mid", "block_out"],
    "prompt_kind": ["edit", "neighbourhood"],
    "prompt": ["The tower is in"],
    "segment": ["first", "subject", "last"],
    "kind": ["none", "wiki"],
    "index": [0, 1, 2],
}
HOSTILE = '\\x08<script>"&![x](http://evil.example/t.png)'


def table(name: str, **choices: list[object]) -> pd.DataFrame:
    """Rows for every combination of keys, with numbers that differ; `choices` replace those of the keys."""
    contract = frames.CONTRACTS[name]
    keys = list(contract.keys)
    rows = []
    for number, values in enumerate(product(*({**CHOICES, **choices}[key] for key in keys))):
        row = dict(zip(keys, values, strict=True))
        for column, kind in contract.values.items():
            row[column] = {"float": (-1) ** number * (number + 1) / 100, "int": number, "bool": True, "text": HOSTILE}[
                kind
            ]
        rows.append(row)
    return frames.from_rows(rows, name)


@cache
def inside() -> Report:
    """WORKS with every view measured: what the frozen service has, and every other frame."""
    request = WORKS.question.requests[0]
    attention = pd.concat(
        [table("attention", prompt_kind=[kind], prompt=[prompt])
         for kind, prompt in (("edit", request.prompt), ("neighbourhood", NEIGHBOUR))]
    )  # fmt: skip
    words = table("neuron_tokens", kind=["ffn", "attn"], neuron=["5", "0.1.3"], direction=["promoted", "suppressed"],
                  rank=[1, 2])  # fmt: skip
    made = {
        name: table(name)
        for name in (
            "attention_neurons", "head_scores", "head_sources", "lens", "neuron_scores", "query_layers",
            "query_neurons", "residual", "stress", "stress_heads",
        )
    }  # fmt: skip
    made["lens_crossing"] = table("lens_crossing").assign(lasting_layer=2, lasting_site="block_out")
    made["neuron_tokens"] = words
    made["tokens"] = table("tokens")
    made["trace"] = table("trace", site=["block_out", "attn", "mlp"])
    made["weight_spectrum"] = table("weight_spectrum", layer=[3], site=["mlp_down"]).assign(
        singular=[3.0, 1.0, 0.0], base_singular=[9.0, 5.0, 2.0]
    )
    made["weight_change"] = WORKS.frames["weight_change"].assign(kind="weights")
    question = replace(WORKS.question, views=tuple(view.name for view in VIEWS))
    return replace(
        WORKS,
        question=question,
        digest=question.key("0" * 64),
        frames={**WORKS.frames, **made, "attention": frames.check(attention.reset_index(drop=True), "attention")},
    )
