"""An edit stack: edits of one model, made one after the other, any of which can be taken out again.

1. add      prepares a new edit on the model with the earlier edits of its WEIGHTS applied, so that it sees the model it
            will change, and AlphaEdit finds the earlier keys in `lm.changes`. Steering, memories and texts before the
            prompt are fitted without each other: they meet only when all are applied, where those of one kind share a
            gate, a codebook or a router.
2. without  takes one edit out. The others keep the change that was prepared for them, so the result equals a stack in
            which that change was never applied; it does not equal one in which the later edits had never seen it.
3. applied  makes all of them true, first added first, and undoes them bit for bit.
4. save     writes one JSON file (what was asked, how, on which model) and one safetensors file. load reads them as
            data: nothing in them is run, kinds of changes come from the table KINDS, and a stack of another model is
            refused.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib import import_module
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
import transformers
from torch import Tensor

from mega_core import __version__
from mega_core.changes import Chain, Change, MatrixDelta, Plain, Tensors, WeightDelta
from mega_core.errors import ActionableError, BadInput, StoreError, UnknownName, UnsupportedMethod
from mega_core.events import Reporter, silent
from mega_core.folders import new_folder, sync, write_file
from mega_core.methods import METHODS
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest, MethodRef, ModelRef, as_plain

FORMAT = "edit-anatomy stack"
SCHEMA_VERSION = 1
HEADER = "stack.json"
MAX_HEADER_BYTES = 64 * 2**20
MAX_TENSOR_BYTES = 16 * 2**30
MAX_EDITS = 10_000

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "weights": "mega_core.changes:WeightDelta",
        "prefix": "mega_core.changes:PromptPrefix",
        "steering": "mega_core.methods.steering:Steering",
        "in-context": "mega_core.methods.ike:InContext",
        "codebook": "mega_core.methods.memory:GraceMemory",
        "side-memory": "mega_core.methods.memory:WiseMemory",
    }
)
"""Kind of change, as files name it -> its class. The only classes a file can lead to."""

_TENSOR_FILE = re.compile(r"tensors-[0-9a-f]{16}\.safetensors")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WRONG = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError, RuntimeError)
"""What reading foreign values may raise."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit of a stack."""

    name: str
    """The method and a running number, as in "rome-1"; never given twice in a stack."""
    method: MethodRef
    """With every parameter spelled out."""
    requests: tuple[EditRequest, ...]
    seed: int
    change: Change
    on: tuple[str, ...] = ()
    """The edits whose weights were applied while this one was prepared."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries and the device that prepared it."""


@dataclass(frozen=True, eq=False)
class EditStack:
    """Edits of one model, first added first; a value: add and without give new ones."""

    model: ModelRef
    model_digest: str
    """Of the model's files; where those are unknown, of its parameters."""
    edits: tuple[Edit, ...] = ()
    made: int = 0
    """How many edits were ever added: names are not used twice."""

    @classmethod
    def empty(cls, lm: ModelAdapter) -> EditStack:
        """A stack for this model."""
        return cls(lm.ref, digest_of(lm))

    def __len__(self) -> int:
        return len(self.edits)

    def __getitem__(self, name: str) -> Edit:
        """Raises UnknownName with the closest known name."""
        for edit in self.edits:
            if edit.name == name:
                return edit
        raise UnknownName("edit", name, [edit.name for edit in self.edits])

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """What all the edits asked for."""
        return tuple(request for edit in self.edits for request in edit.requests)

    # 1.
    def add(
        self,
        lm: ModelAdapter,
        method: MethodRef,
        requests: Sequence[EditRequest],
        seed: int = 0,
        report: Reporter = silent,
    ) -> EditStack:
        """A stack with one more edit. The model is left as it was found, also when this raises.

        Raises BadInput on another model, or one on which something is applied, and whatever the method raises.
        """
        self.check_model(lm)
        if lm.changes:
            raise BadInput("stack", "an edit is prepared on the unedited model.", "Leave the other change's block.")
        if not requests:
            raise BadInput("requests", "there is no edit.", "Give at least one edit request.")
        entry = METHODS[method.name]
        if method.version != entry.version:
            raise BadInput("method", f"{entry.title} has version {entry.version}, not {method.version}.", "Ask again.")
        if reason := entry.needs(lm.spec):
            raise UnsupportedMethod(f"{entry.title} can't edit {lm.name}: {reason}.", "Choose another method or model.")
        params = entry.read(method)
        below = tuple(edit for edit in self.edits if isinstance(edit.change, WeightDelta))
        with Chain(tuple(edit.change for edit in below)).applied(lm):
            change = entry.prepare(lm, requests, params, seed, report)
        kind_of(change)  # one that can't be saved is refused before anything rests on it
        number = self.made + 1
        edit = Edit(
            name=f"{method.name}-{number}",
            method=entry.ref(dict(method.params)),
            requests=tuple(requests),
            seed=seed,
            change=change,
            on=tuple(edit.name for edit in below),
            environment=environment(lm),
        )
        return replace(self, edits=(*self.edits, edit), made=number)

    # 2.
    def without(self, name: str) -> EditStack:
        """A stack in which this edit's change is never applied. Raises UnknownName."""
        gone = self[name]
        return replace(self, edits=tuple(edit for edit in self.edits if edit is not gone))

    # 3.
    def chain(self) -> Chain:
        """All changes as one."""
        return Chain(tuple(edit.change for edit in self.edits))

    def parts(self) -> tuple[Change, ...]:
        """The changes as they act: those of one mergeable kind are one."""
        return self.chain().parts()

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        """Every edit true inside the block, bit-exactly undone after it. Raises BadInput on another model."""
        self.check_model(lm)
        with self.chain().applied(lm):
            yield

    def summary(self) -> pd.DataFrame:
        """The frame `weight_change` of all the changes together."""
        return self.chain().summary()

    def check_model(self, lm: ModelAdapter) -> None:
        """Raises BadInput unless the stack was made for this model's files, at its dtype."""
        if lm.ref.dtype != self.model.dtype:
            raise BadInput(
                "stack",
                f"was made for {self.model.name} at {self.model.dtype}, and {lm.name} is loaded at {lm.ref.dtype}.",
                f"Load it at {self.model.dtype}.",
            )
        if not lm.changes or lm.file_digest:  # under changes the parameters have another digest
            _check_digest(self.model, self.model_digest, lm.name, digest_of(lm))

    # 4.
    def save(self, folder: Path) -> None:
        """Write the stack: a new folder whole or not at all, or in the place of the stack that is in the folder.

        Raises BadInput when something else is there, StoreError when the disk refuses.
        """
        header, tensors = self._packed()
        data = _safetensors(tensors)
        name = f"tensors-{sha256(data).hexdigest()[:16]}.safetensors"
        header["tensors"] = {"file": name, "sha256": sha256(data).hexdigest(), "bytes": len(data)}
        header["checksum"] = _checksum(header)
        try:
            text = json.dumps(header, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        except ValueError as error:
            raise StoreError("The stack holds a number that is infinite or missing.", "Undo that edit.") from error
        if not (folder / HEADER).is_file():
            with new_folder(folder, "stack") as making:
                (making / name).write_bytes(data)
                (making / HEADER).write_text(text, encoding="utf-8")
            return
        headline(folder)  # raises when it isn't a stack: somebody else's file is not overwritten
        try:
            # The header names its tensors, so that the moment it is replaced is the moment the stack is another one.
            if not (folder / name).is_file():
                write_file(folder / name, data)
            write_file(folder / HEADER, text.encode())
            for old in folder.iterdir():
                if _TENSOR_FILE.fullmatch(old.name) and old.name != name:
                    old.unlink()
            sync(folder)
        except OSError as error:
            raise StoreError(
                f"The stack could not be written ({error.strerror or type(error).__name__}); the old one is kept.",
                "Free some space, then try again.",
            ) from error

    @classmethod
    def load(cls, folder: Path, model: ModelAdapter | str) -> EditStack:
        """Read what save() wrote, for this model or for the one of this digest.

        Raises BadInput when the folder holds no stack, one of another model, or one that is damaged or foreign. With
        a model, every edit is also applied once and undone, so that one that doesn't fit is refused here.
        """
        header = headline(folder)
        with _foreign("its header is not one"):
            made_for = ModelRef(**_texts(header["model"], ("name", "revision", "dtype")))
            wanted = _matching(_DIGEST, header["model_digest"])
            made = int(header["made"])
            listed = list(header["edits"])
        name, digest = (model, model) if isinstance(model, str) else (model.name, digest_of(model))
        _check_digest(made_for, wanted, name, digest)
        if len(listed) > MAX_EDITS:
            raise _bad(f"it lists {len(listed):,} edits, the limit is {MAX_EDITS:,}")
        tensors = _read_tensors(folder, header["tensors"])
        edits = []
        for i, row in enumerate(listed):
            own = {key.partition("/")[2]: tensors.pop(key) for key in list(tensors) if key.startswith(f"{i}/")}
            edits.append(_edit(row, own))
        if tensors:
            raise _bad(f"it has a tensor {min(tensors)[:40]!r} that belongs to no edit")
        if len({edit.name for edit in edits}) < len(edits):
            raise _bad("two of its edits have one name")
        stack = cls(made_for, wanted, tuple(edits), max(made, len(edits)))
        if not isinstance(model, str):
            stack.check_model(model)
            stack._try_on(model)
        return stack

    def _packed(self) -> tuple[Plain, Tensors]:
        rows = []
        tensors: Tensors = {}
        for i, edit in enumerate(self.edits):
            plain, own = edit.change.pack()
            tensors |= {f"{i}/{name}": tensor for name, tensor in own.items()}
            rows.append(
                {
                    "name": edit.name,
                    "kind": kind_of(edit.change),
                    "method": {"name": edit.method.name, "version": edit.method.version,
                               "params": dict(edit.method.params)},
                    "requests": as_plain(edit.requests),
                    "seed": edit.seed,
                    "on": list(edit.on),
                    "environment": dict(edit.environment),
                    "change": plain,
                }
            )  # fmt: skip
        header: Plain = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "model": as_plain(self.model),
            "model_digest": self.model_digest,
            "made": self.made,
            "edits": rows,
        }
        return header, tensors

    def _try_on(self, lm: ModelAdapter) -> None:
        """Apply each edit alone and read three tokens; a tensor of a wrong size shows here, before anything runs."""
        biggest = sum(p.numel() for p in lm.model.parameters())
        ids = [i % lm.vocab_size for i in (1, 2, 3)]
        for edit in self.edits:
            if isinstance(edit.change, WeightDelta):
                _check_shapes(edit.name, edit.change, lm)
            elif any(tensor.numel() > biggest for tensor in edit.change.pack()[1].values()):
                raise _bad(f"{edit.name} has a tensor larger than the model")
            try:
                with torch.no_grad(), edit.change.applied(lm):
                    lm.last_logits(tokens.pack(lm.tokenizer, [ids], lm.device))
                edit.change.summary()
            except torch.OutOfMemoryError:
                raise
            except (*_WRONG, BadInput) as error:
                raise _bad(f"{edit.name} does not fit {lm.name}") from error


def kind_of(change: Change) -> str:
    """How files name this kind of change. Raises StoreError for a class that is not in KINDS: a defect of ours."""
    own = f"{type(change).__module__}:{type(change).__qualname__}"
    for kind, place in KINDS.items():
        if place == own:
            return kind
    raise StoreError(f"A change of the class {own} can't be kept in a stack.", "Give it a line in stack.KINDS.")


def class_of(kind: str) -> Any:
    """The class of a kind. Raises BadInput naming the known ones."""
    if kind not in KINDS:
        raise BadInput(
            "stack", f"it has a change of the unknown kind {str(kind)[:40]!r}.", f"Known: {', '.join(KINDS)}."
        )
    module, _, name = KINDS[kind].partition(":")
    return getattr(import_module(module), name)


def digest_of(lm: ModelAdapter) -> str:
    """Which model it is: the digest of its files, or of its parameters where it has none."""
    return lm.file_digest or lm.live_digest()


def environment(lm: ModelAdapter) -> dict[str, str]:
    """Versions and device, as an edit remembers them."""
    return {
        "edit-anatomy": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": lm.device.type,
    }


def headline(folder: Path) -> dict[str, Any]:
    """What the JSON file of a saved stack says, as plain values: model, edits and how they were made.

    Raises BadInput when there is none, or it is damaged or of another version.
    """
    path = folder / HEADER
    if not path.is_file():
        raise BadInput("stack", f"there is no stack in {folder}.", "Name the folder of a saved stack.")
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise _bad(f"its {HEADER} has more than {MAX_HEADER_BYTES // 2**20} MB")
    try:
        header = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(f"its {HEADER} can't be read") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _bad(f"its {HEADER} is something else")
    version = header.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BadInput(
            "stack", f"has schema {str(version)[:20]}, and this program reads {SCHEMA_VERSION}.", "Use its own version."
        )
    if header.get("checksum") != _checksum(header):
        raise _bad("its checksum is wrong")
    if not isinstance(header.get("edits"), list) or not all(isinstance(row, dict) for row in header["edits"]):
        raise _bad("its edits are not a list")
    return header


# Inside --------------------------------------------------------------------------------------------------------------


def _bad(what: str) -> BadInput:
    return BadInput("stack", f"this is not a whole stack: {what}.", "Take a whole copy, or make it again.")


@contextmanager
def _foreign(what: str) -> Iterator[None]:
    """Whatever reading a value from a file raises, said as BadInput."""
    try:
        yield
    except ActionableError as error:
        if isinstance(error, BadInput) and error.field == "stack":
            raise
        raise _bad(f"{what} ({error.what.rstrip('.')})") from error
    except _WRONG as error:
        raise _bad(what) from error


def _check_digest(made_for: ModelRef, wanted: str, name: str, found: str) -> None:
    if found != wanted:
        raise BadInput(
            "stack",
            f"was made for {made_for.name} ({wanted[:12]}); {name[:64]} has other weights ({found[:12]}).",
            f"Load {made_for.name} as it was then.",
        )


def _checksum(header: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in header.items() if key != "checksum"}
    return sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _texts(plain: Any, names: Sequence[str]) -> dict[str, str]:
    if set(plain) != set(names) or not all(isinstance(plain[name], str) and len(plain[name]) < 200 for name in names):
        raise ValueError("not the texts it should have")
    return dict(plain)


def _matching(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{str(value)[:40]!r} is not what it should be")
    return value


def _edit(row: Any, tensors: Tensors) -> Edit:
    with _foreign("one of its edits can't be read"):
        name, kind = _matching(_NAME, row["name"]), str(row["kind"])
        made_by = row["method"]
        params = tuple((str(key), value) for key, value in made_by["params"].items())
        if not all(value is None or isinstance(value, str | int | float) for _, value in params):
            raise TypeError("a parameter is not a plain value")
        method = MethodRef(_matching(_NAME, made_by["name"]), int(made_by["version"]), params)
        requests = tuple(
            EditRequest(**{**r, "paraphrases": tuple(r["paraphrases"]), "neighbours": tuple(r["neighbours"])})
            for r in row["requests"]
        )
        seed = int(row["seed"])
        on = tuple(_matching(_NAME, other) for other in row["on"])
        made_with = {str(key)[:64]: str(value)[:200] for key, value in row["environment"].items()}
        plain = row["change"]
    changes = class_of(kind)
    with _foreign(f"the change of {name} can't be read"):
        change = changes.unpack(plain, tensors)
        rest = set(tensors) - set(change.pack()[1])
        if rest:
            raise ValueError(f"{min(rest)} belongs to nothing")
    return Edit(name, method, requests, seed, change, on, made_with)


def _check_shapes(name: str, change: WeightDelta, lm: ModelAdapter) -> None:
    with _foreign(f"{name} does not fit {lm.name}"):
        for matrix in change.matrices:
            out, into = lm.read_weight(matrix.layer, matrix.site).shape
            ends = {"left": (out, None), "right": (into, None), "difference": (out, into)}
            for part, (rows, columns) in ends.items():
                tensor: Tensor | None = getattr(matrix, part, None)
                if tensor is None:
                    continue
                if tensor.ndim != 2 or tensor.shape[0] != rows or (columns and tensor.shape[1] != columns):
                    raise _bad(f"{name} has a {part} of the shape {tuple(tensor.shape)} for a matrix of {(out, into)}")
            if matrix.rank() > 4 * (out + into):
                raise _bad(f"{name} has rank {matrix.rank()} for a matrix of {(out, into)}")
            if isinstance(matrix, MatrixDelta) and matrix.left.shape[1] != matrix.right.shape[1]:
                raise _bad(f"{name} has factors of different rank")
            if not isfinite(matrix.base_norm):
                raise _bad(f"{name} has a norm that is not a number")
        for layer, keys in change.keys.items():
            if not 0 <= layer < lm.n_layers or keys.ndim != 2 or keys.shape[1] != lm.d_mlp:
                raise _bad(f"{name} has keys of the shape {tuple(keys.shape)} at layer {layer}")


def _safetensors(tensors: Tensors) -> bytes:
    from safetensors.torch import save

    wrong = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise StoreError(f"The tensor {wrong[0]!r} has infinite or missing numbers.", "Undo that edit.")
    # Cloned: the format refuses tensors that share memory, as two edits of one method may.
    return bytes(save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}))


def _read_tensors(folder: Path, listed: Any) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load

    with _foreign("its tensors are not listed"):
        path = folder / _matching(_TENSOR_FILE, listed["file"])  # a plain name: it leads nowhere else
        wanted, size = _matching(_DIGEST, listed["sha256"]), int(listed["bytes"])
    if not path.is_file():
        raise _bad(f"{path.name} is missing")
    if path.stat().st_size != size:
        raise _bad(f"{path.name} has {path.stat().st_size:,} bytes instead of {size:,}")
    if size > MAX_TENSOR_BYTES:
        raise _bad(f"{path.name} has more than {MAX_TENSOR_BYTES // 2**30} GB")
    try:
        data = path.read_bytes()
        if sha256(data).hexdigest() != wanted:
            raise _bad(f"{path.name} is damaged")
        found = load(data)
    except (OSError, SafetensorError, *_WRONG) as error:
        raise _bad(f"{path.name} can't be read") from error
    for name, tensor in found.items():
        if not bool(torch.isfinite(tensor).all()):
            raise _bad(f"the tensor {name[:40]!r} has infinite or missing numbers")
    return found
