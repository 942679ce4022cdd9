"""A mask in a file and over a model: nothing is lost, nothing is believed unchecked, all is undone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mega_core.changes import Chain
from mega_core.errors import BadInput, StoreError
from mega_core.masking.masks import MAGIC, Mask, Masked
from mega_core.models.adapter import ModelAdapter
from tests.masking.cases import LAYER, random_change

TinyLm = Callable[[str], ModelAdapter]


def _mask(lm: ModelAdapter, pruned: float = 0.3) -> Mask:
    keep = torch.rand(lm.read_weight(LAYER, "mlp_down").shape, generator=torch.Generator().manual_seed(0)) >= pruned
    return Mask(keep, LAYER, lm.name, lm.file_digest, 0.9, {"edits": 3, "loss": 0.25})


def test_k_of_ones_is_the_edited_model_bit_for_bit(lm: ModelAdapter) -> None:
    ones = replace(_mask(lm), keep=torch.ones(lm.read_weight(LAYER, "mlp_down").shape, dtype=torch.bool))
    batch = lm.encode(["Here we see The Eiffel Tower"])
    with torch.no_grad(), random_change(lm).applied(lm):
        edited, digest = lm.last_logits(batch), lm.live_digest()
        with Masked(ones).applied(lm):
            assert torch.equal(lm.last_logits(batch), edited)
            assert lm.live_digest() == digest


def test_k_of_zeros_leaves_the_bias_only(lm: ModelAdapter) -> None:
    none = replace(_mask(lm), keep=torch.zeros(lm.read_weight(LAYER, "mlp_down").shape, dtype=torch.bool))
    module = lm.mlp_down(LAYER)
    with torch.no_grad(), Masked(none).applied(lm):
        said = module(torch.randn(1, 2, lm.d_mlp))
    bias = getattr(module, "bias", None)
    wanted = torch.zeros(lm.d_model) if bias is None else bias
    assert torch.equal(said, wanted.expand_as(said))


@pytest.mark.parametrize("fill", ["zero", "original"])
def test_a_mask_is_undone_bit_for_bit_also_after_an_error(lm: ModelAdapter, fill: str) -> None:
    mask = _mask(lm)
    change = Masked(mask) if fill == "zero" else Masked.restoring(lm, mask)
    base = lm.read_weight(LAYER, "mlp_down").clone()
    before = lm.live_digest()

    def break_off() -> None:
        live = lm.read_weight(LAYER, "mlp_down")
        removed = live[~mask.keep]
        assert torch.equal(removed, torch.zeros_like(removed) if fill == "zero" else base[~mask.keep])
        assert not torch.equal(live[mask.keep], base[mask.keep])
        assert lm.changes[-1] is change
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Chain((random_change(lm), change)).applied(lm):
        break_off()
    assert lm.live_digest() == before
    assert not lm.changes


def test_a_file_gives_the_mask_back(tiny_lm: TinyLm, tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    mask = _mask(lm)
    path = mask.save(tmp_path / "one.mask")
    again = Mask.load(path)
    assert torch.equal(again.keep, mask.keep)
    assert (again.layer, again.model, again.weights, again.threshold) == (LAYER, lm.name, lm.file_digest, 0.9)
    assert again.trained == mask.trained
    assert path.stat().st_size < mask.keep.numel() // 8 + 600
    assert [file.name for file in tmp_path.iterdir()] == ["one.mask"]
    again.check(lm)
    with pytest.raises(BadInput, match="not for this"):
        again.check(tiny_lm("gptj"))
    with pytest.raises(StoreError, match="could not be written"):
        mask.save(tmp_path / "nowhere" / "one.mask")


def _header(path: Path) -> tuple[dict[str, object], bytes]:
    data = path.read_bytes()
    length = int(data[len(MAGIC) : len(MAGIC) + 8])
    start = len(MAGIC) + 9
    return json.loads(data[start : start + length]), data[start + length :]


def _with(path: Path, header: object, bits: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(MAGIC + b"%08d\n" % len(text) + text + bits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [32, 57]}, "bits are not"),
        ({"shape": [2**20, 2**20]}, "values that are none"),
        ({"shape": [0, 56]}, "values that are none"),
        ({"shape": "all"}, "values that are none"),
        ({"layer": -1}, "values that are none"),
        ({"layer": True}, "values that are none"),
        ({"site": "../mlp"}, "values that are none"),
        ({"weights": "0"}, "values that are none"),
        ({"threshold": 2}, "values that are none"),
        ({"version": 99}, "version 99"),
        ({"bits": "0" * 64}, "bits are not"),
    ],
)
def test_wrong_values_in_a_head_are_refused(
    tiny_lm: TinyLm, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    path = _mask(tiny_lm("gpt2")).save(tmp_path / "one.mask")
    header, bits = _header(path)
    _with(path, header | change, bits)
    with pytest.raises(BadInput, match=words):
        Mask.load(path)


def test_foreign_cut_and_damaged_files_are_refused(tiny_lm: TinyLm, tmp_path: Path) -> None:
    path = _mask(tiny_lm("gpt2")).save(tmp_path / "one.mask")
    whole = path.read_bytes()
    header, bits = _header(path)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    wrong = {
        "is not a mask": b"PK\x03\x04 something else",
        "bits are not": whole[:-1],
        "bits are not those": bytes(flipped),
        "not those that were written": whole + b"\0",
        "head is damaged": MAGIC + b"00000009\n" + b"{not json" + bits,
        "its head is damaged": MAGIC + b"99999999\n",
        "not complete": MAGIC + b"00000002\n{}" + bits,
    }
    for words, data in wrong.items():
        path.write_bytes(data)
        with pytest.raises(BadInput, match=words):
            Mask.load(path)
    with pytest.raises(BadInput, match="can't be read"):
        Mask.load(tmp_path / "none.mask")
    del header


def test_packing_keeps_every_bit(tiny_lm: TinyLm) -> None:
    lm = tiny_lm("qwen3")
    for change in (Masked(_mask(lm)), Masked.restoring(lm, _mask(lm))):
        plain, tensors = change.pack()
        again = Masked.unpack(json.loads(json.dumps(plain)), tensors)
        with change.applied(lm):
            digest = lm.live_digest()
        with again.applied(lm):
            assert lm.live_digest() == digest
        row = again.summary().iloc[0]
        assert (row["layer"], row["kind"]) == (LAYER, "mask")
        assert row["parameters"] == int((~change.mask.keep).sum())


def test_a_fill_without_its_matrix_is_refused(tiny_lm: TinyLm) -> None:
    mask = _mask(tiny_lm("gpt2"))
    with pytest.raises(BadInput, match="fill"):
        Masked(mask, "mean")
    with pytest.raises(BadInput, match="original"):
        Masked(mask, "original")
