"""Edits of the tiny models, made by hand: what a row needs to say something else."""

from __future__ import annotations

import torch

from mega_core.changes import MatrixDelta, WeightDelta
from mega_core.masking.edits import Edit
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest

LAYER = 1
NAMES = (("The Eiffel Tower", "Madrid", "Paris"), ("Mount Kenya", "Berlin", "Rome"), ("Marie Curie", "Paris", "Spain"))
FORMS = ("Here we see {}", "Look at {}", "{}")


def random_change(lm: ModelAdapter, layers: tuple[int, ...] = (LAYER,), rank: int = 2, seed: int = 0) -> WeightDelta:
    """Factors drawn at random, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    matrices = []
    for layer in layers:
        out, into = lm.read_weight(layer, "mlp_down").shape
        left = torch.randn(out, rank, generator=generator) * 0.3
        right = torch.randn(into, rank, generator=generator) * 0.3
        matrices.append(MatrixDelta(layer, "mlp_down", left, right, 1.0))
    return WeightDelta(tuple(matrices))


def random_edits(lm: ModelAdapter, layers: tuple[int, ...] = (LAYER,), rank: int = 2) -> list[Edit]:
    """One edit per name, each with prompts of several lengths."""
    return [
        Edit(
            EditRequest(subject, FORMS[0], new, old, paraphrases=(FORMS[1].replace("{}", subject),)),
            random_change(lm, layers, rank, seed),
            tuple(form.replace("{}", subject) for form in FORMS),
        )
        for seed, (subject, new, old) in enumerate(NAMES)
    ]


WORDS = ("Madrid", "Berlin", "Paris", "Rome", "Spain", "Japan", "city", "is", "France")


def obvious_edit(lm: ModelAdapter, subject: str, layer: int = LAYER, strength: float = 8.0) -> Edit:
    """One neuron is enough: the most active input of the matrix is made to write an unlikely word's direction."""
    prompt = FORMS[0].replace("{}", subject)
    site = Site(layer, "mlp_down_in")
    with torch.no_grad(), capture(lm, [site]) as got:
        lm.forward(lm.encode([prompt]))
    key = got[site][0, -1]
    said = {}
    for word in WORDS:
        row = tokens.with_target(lm.tokenizer, prompt, word)
        with torch.no_grad():
            logs = lm.logits(tokens.pack(lm.tokenizer, [row.ids]))[0].log_softmax(-1)
        said[word] = sum(float(logs[at - 1, row.ids[at]]) for at in range(row.target_start, len(row.ids)))
    old, new = max(said, key=lambda word: said[word]), min(said, key=lambda word: said[word])
    direction = lm.head_weight[tokens.target_ids(lm.tokenizer, prompt, new)[0]]
    right = torch.zeros(lm.d_mlp)
    at = int(key.abs().argmax())
    right[at] = 1 / key[at]
    left = strength * direction / direction.norm()
    change = WeightDelta((MatrixDelta(layer, "mlp_down", left[:, None].clone(), right[:, None], 1.0),))
    return Edit(EditRequest(subject, FORMS[0], new, old), change, (prompt,))
