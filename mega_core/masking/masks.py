"""A binary mask as a value and as a file, and the change that puts it over a model's matrix.

A mask file, whole or not there at all:
1. the line "edit-anatomy mask\n" and the header's length in bytes, as eight decimal digits and a newline;
2. the header, JSON: version, model, digest of the model's files, layer, site, shape, threshold, how it was trained, and
   the sha256 of the bits;
3. the bits, row by row, eight to a byte (np.packbits): 1 keeps the weight, 0 removes it.
Reading it runs no code, and nothing is believed before it is checked.

`Masked` multiplies the live matrix by the mask inside its block (fill "zero", the paper's) or puts the weights that the
matrix had at load back at the masked places (fill "original", a control), and copies the saved matrix back afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mega_core import frames
from mega_core.changes import Plain, Tensors, standing
from mega_core.errors import BadInput, StoreError
from mega_core.folders import write_file
from mega_core.masking.edits import SITE
from mega_core.models.adapter import ModelAdapter

MAGIC = b"edit-anatomy mask\n"
VERSION = 1
MOST_HEADER = 2**20
MOST_WEIGHTS = 2**31
FILLS = ("zero", "original")
_SITES = (SITE,)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KEYS = ("version", "model", "weights", "layer", "site", "shape", "threshold", "trained", "bits")


@dataclass(frozen=True, eq=False)
class Mask:
    """One binary mask over one matrix of one model."""

    keep: Bool[Tensor, "out in"]
    """False removes the weight. Kept on the CPU."""
    layer: int
    model: str
    weights: str
    """Digest of the model's files."""
    threshold: float = 0.5
    """gamma: K at or above it is kept."""
    trained: Mapping[str, Any] = field(default_factory=dict)
    """How it came about: plain values for the header."""
    site: str = SITE

    @property
    def pruned(self) -> float:
        """Share of the weights that it removes."""
        return 1 - float(self.keep.double().mean())

    def matrix(self) -> Float[Tensor, "out in"]:
        """Ones and zeros."""
        return self.keep.float()

    def check(self, lm: ModelAdapter) -> None:
        """Raises BadInput unless it was made for this model."""
        if not lm.file_digest or self.weights != lm.file_digest:
            raise BadInput(
                "mask",
                f"it was made for {self.model} ({self.weights[:8]}), not for this {lm.name} ({lm.file_digest[:8]}).",
                "Train one for this model.",
            )
        if not 0 <= self.layer < lm.n_layers or tuple(self.keep.shape) != tuple(
            lm.read_weight(self.layer, self.site).shape
        ):
            raise BadInput("mask", f"its shape does not fit layer {self.layer} of {lm.name}.", "Train a new one.")

    def save(self, path: Path) -> Path:
        """Write the file. Raises StoreError when the disk refuses; then nothing is there."""
        bits = np.packbits(self.keep.numpy().astype(np.uint8).reshape(-1)).tobytes()
        plain = {
            "version": VERSION,
            "model": self.model,
            "weights": self.weights,
            "layer": self.layer,
            "site": self.site,
            "shape": list(self.keep.shape),
            "threshold": self.threshold,
            "trained": dict(self.trained),
            "bits": sha256(bits).hexdigest(),
        }
        header = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        try:
            write_file(path, MAGIC + b"%08d\n" % len(header) + header + bits)
        except OSError as error:
            raise StoreError(f"{path} could not be written ({error.strerror}).", "Choose another place.") from error
        return path

    @classmethod
    def load(cls, path: Path) -> Mask:
        """Read a file. Raises BadInput on one that is not there, foreign, cut or damaged."""
        try:
            with path.open("rb") as stream:
                if stream.read(len(MAGIC)) != MAGIC:
                    raise _refused(path, "it is not a mask")
                length = stream.read(9)
                if not re.fullmatch(rb"[0-9]{8}\n", length) or int(length) > MOST_HEADER:
                    raise _refused(path, "its head is damaged")
                header = stream.read(int(length))
                plain = _plain(path, header)
                size = -(-prod(plain["shape"]) // 8)
                bits = stream.read(size + 1)
        except OSError as error:
            raise BadInput("mask", f"{path} can't be read ({error.strerror}).", "Name a mask file.") from error
        if len(bits) != size or sha256(bits).hexdigest() != plain["bits"]:
            raise _refused(path, "its bits are not those that were written")
        flat = np.unpackbits(np.frombuffer(bits, np.uint8), count=prod(plain["shape"]))
        keep = torch.from_numpy(flat.astype(bool)).view(*plain["shape"])
        return cls(
            keep,
            plain["layer"],
            plain["model"],
            plain["weights"],
            float(plain["threshold"]),
            plain["trained"],
            plain["site"],
        )


def _plain(path: Path, header: bytes) -> dict[str, Any]:
    try:
        plain = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _refused(path, "its head is damaged") from error
    if not isinstance(plain, dict) or any(key not in plain for key in _KEYS):
        raise _refused(path, "its head is not complete")
    if plain["version"] != VERSION:
        raise _refused(path, f"it is of version {str(plain['version'])[:20]}, this program reads {VERSION}")
    shape = plain["shape"]
    whole = [isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape] if isinstance(shape, list) else []
    number = plain["threshold"]
    good = (
        len(whole) == 2
        and all(whole)
        and prod(shape) <= MOST_WEIGHTS
        and isinstance(plain["layer"], int)
        and not isinstance(plain["layer"], bool)
        and plain["layer"] >= 0
        and plain["site"] in _SITES
        and isinstance(plain["model"], str)
        and isinstance(plain["weights"], str)
        and _DIGEST.fullmatch(plain["weights"]) is not None
        and isinstance(number, int | float)
        and not isinstance(number, bool)
        and 0 <= number <= 1
        and isinstance(plain["trained"], dict)
        and isinstance(plain["bits"], str)
    )
    if not good:
        raise _refused(path, "its head holds values that are none")
    return plain


def _refused(path: Path, why: str) -> BadInput:
    return BadInput("mask", f"{path.name} can't be used: {why}.", "Train it again: python -m mega_core mask train.")


@dataclass(frozen=True, eq=False)
class Masked:
    """The mask over whatever stands in the matrix: the unedited weights, an edit's, those of several."""

    mask: Mask
    fill: str = "zero"
    """"zero" removes a masked weight; "original" gives it the value that it has in `original`."""
    original: Float[Tensor, "out in"] | None = None
    """The unedited matrix, for fill "original"; on the CPU."""

    def __post_init__(self) -> None:
        """Raises BadInput on an unknown fill, or without the matrix that it needs."""
        if self.fill not in FILLS:
            raise BadInput("fill", f"{self.fill[:40]!r} is not one of its choices.", f"Choose {' or '.join(FILLS)}.")
        if (self.fill == "original") is (self.original is None):
            raise BadInput("original", 'goes with the fill "original", and only with it.', "See Masked.restoring.")

    @classmethod
    def restoring(cls, lm: ModelAdapter, mask: Mask) -> Masked:
        """A control: masked weights get the values they have now, so call it on the unedited model."""
        return cls(mask, "original", lm.read_weight(mask.layer, mask.site).clone().cpu().contiguous())

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        """Mask the live matrix inside the block. Kept weights stay what they are, bit for bit."""
        weight = lm.weight(self.mask.layer, self.mask.site)
        live = lm.read_weight(self.mask.layer, self.mask.site)
        if live.shape != self.mask.keep.shape:
            raise BadInput("mask", f"its shape does not fit layer {self.mask.layer} of {lm.name}.", "Train a new one.")
        saved = weight.detach().clone()
        try:
            with torch.no_grad():
                removed = ~self.mask.keep.to(live.device)
                if self.original is None:
                    live.masked_fill_(removed, 0.0)
                else:
                    live.copy_(torch.where(removed, self.original.to(live.device, live.dtype), live))
            with standing(lm, self):
                yield
        finally:
            with torch.no_grad():
                weight.copy_(saved)

    def summary(self) -> pd.DataFrame:
        """One row. The norm depends on what is masked, so it is that of the masked part of the unedited matrix,
        where that is known, and otherwise missing (0)."""
        norm = whole = 0.0
        if self.original is not None:
            norm = float((self.original.double() * ~self.mask.keep).norm())
            whole = float(self.original.double().norm())
        row: dict[str, object] = {
            "layer": self.mask.layer,
            "site": self.mask.site,
            "kind": "mask",
            "norm": norm,
            "relative_norm": norm / whole if whole else 0.0,
            "rank": min(self.mask.keep.shape),
            "parameters": int((~self.mask.keep).sum()),
        }
        return frames.from_rows([row], "weight_change")

    def pack(self) -> tuple[Plain, Tensors]:
        """The mask's place and bits; with fill "original" the matrix too."""
        tensors: Tensors = {"keep": self.mask.keep.to(torch.uint8).contiguous()}
        if self.original is not None:
            tensors["original"] = self.original.contiguous()
        plain = {
            "layer": self.mask.layer,
            "site": self.mask.site,
            "model": self.mask.model,
            "weights": self.mask.weights,
            "threshold": self.mask.threshold,
            "trained": dict(self.mask.trained),
            "fill": self.fill,
        }
        return plain, tensors

    @classmethod
    def unpack(cls, plain: Plain, tensors: Tensors) -> Masked:
        """What pack() wrote. Raises KeyError or TypeError on anything else."""
        mask = Mask(
            tensors["keep"].bool(),
            int(plain["layer"]),
            str(plain["model"]),
            str(plain["weights"]),
            float(plain["threshold"]),
            dict(plain["trained"]),
            str(plain["site"]),
        )
        return cls(mask, str(plain["fill"]), tensors.get("original"))
