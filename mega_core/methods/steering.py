"""Steering: an edit as maps that act on activations while the model reads, without touching a weight.

At each steered site, in each row whose gate is open,

    x <- x + alpha * (T_j(x) - x)    at position start - 1 + j,   j = 0, 1, ...

where `start` is where the row's prompt ends and j counts the tokens of the new object o* that already stand behind it:
the position that predicts token j of o*. Once something else than o* stands there the row is left alone. A row of a
teacher-forced batch and the same row while it is generated are therefore steered alike.

The gate is asked once per prompt, when a forward begins (its own look at the prompt runs beside, with these hooks off).
At most one edit acts in a row: the one whose own prompts are nearest. With alpha 0, every gate shut, or no edit at all,
hooks hand back the very tensor they got, so that logits stay bit-identical.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from mega_core import frames
from mega_core.changes import Plain, Tensors, standing
from mega_core.methods.gate import Gate, states_of
from mega_core.methods.transport import AffineMap
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, intervene
from mega_core.models.tokens import TokenBatch

KEPT_DECISIONS = 4096


@dataclass(frozen=True, eq=False)
class SteeredEdit:
    """One fact as it is steered."""

    name: str
    """By which a registry knows it; editing the same fact again replaces it."""
    subject: str
    aliases: tuple[str, ...]
    maps: Mapping[tuple[Site, int], AffineMap]
    """(site, tokens of o* that already stand there) -> map."""
    alpha: float
    gate: Gate
    target: tuple[int, ...]
    """Ids of o* as they follow the prompt."""
    norms: Mapping[Site, float] = field(default_factory=dict)
    """Mean norm of the source activations at each site, to judge the size of the shift by."""

    def __post_init__(self) -> None:
        if not self.target:
            raise ValueError("A steered edit needs the ids of its new object.")

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it acts, from the bottom up."""
        return tuple(sorted({site for site, _ in self.maps}, key=lambda site: site.depth))

    @property
    def prefixes(self) -> int:
        """For how many tokens of o* there are maps."""
        return 1 + max((j for _, j in self.maps), default=-1)

    def with_alpha(self, alpha: float) -> SteeredEdit:
        """The same maps at another strength."""
        return replace(self, alpha=float(alpha))


class Registry:
    """Steered edits by name; adding and removing one touches no other."""

    def __init__(self, edits: Sequence[SteeredEdit] = ()) -> None:
        self._edits: dict[str, SteeredEdit] = {}
        for edit in edits:
            self.add(edit)

    def add(self, edit: SteeredEdit) -> None:
        """Put an edit in; one of the same name goes."""
        self._edits.pop(edit.name, None)
        self._edits[edit.name] = edit

    def remove(self, name: str) -> SteeredEdit:
        """Take an edit out. Raises KeyError when it is not there."""
        return self._edits.pop(name)

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[SteeredEdit]:
        return iter(self._edits.values())

    def __contains__(self, name: object) -> bool:
        return name in self._edits

    def change(self) -> Steering:
        """The edits as they are now, as a change."""
        return Steering(tuple(self))


@dataclass(frozen=True, eq=False)
class Steering:
    """Steered edits that share one gatekeeper, so that at most one acts in a row."""

    edits: tuple[SteeredEdit, ...] = ()

    @classmethod
    def merged(cls, changes: Sequence[Steering]) -> Steering:
        """All edits of several changes as one; of two with one name the later stays."""
        return Registry([edit for change in changes for edit in change.edits]).change()

    def with_alpha(self, alpha: float) -> Steering:
        """The same edits at another strength; nothing is fitted again."""
        return Steering(tuple(edit.with_alpha(alpha) for edit in self.edits))

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        """Steer every forward inside the block."""
        keeper = _Keeper(lm, self.edits)
        sites = sorted({site for edit in self.edits for site in edit.sites}, key=lambda site: site.depth)
        steps = {site: partial(keeper.steer, site) for site in sites}
        with lm.reading(keeper), intervene(lm, steps), standing(lm, self):
            yield

    def summary(self) -> pd.DataFrame:
        """One row per site: mean length of the shift, alone and against what is there; the weights stay as they are."""
        found: dict[tuple[int, str], list[tuple[float, float, int]]] = {}
        for edit in self.edits:
            for (site, _), step in edit.maps.items():
                norm = abs(edit.alpha) * float(step.shift.norm())
                base = edit.norms.get(site) or float(step.mean.norm())
                found.setdefault((site.layer, site.part), []).append((norm, norm / base if base else 0.0, step.rank()))
        rows: list[dict[str, object]] = [
            {
                "layer": layer,
                "site": part,
                "kind": "steering",
                "norm": sum(norm for norm, _, _ in seen) / len(seen),
                "relative_norm": sum(share for _, share, _ in seen) / len(seen),
                "rank": max(rank for _, _, rank in seen),
                "parameters": 0,
            }
            for (layer, part), seen in sorted(found.items())
        ]
        return frames.from_rows(rows, "weight_change") if rows else frames.empty("weight_change")

    def pack(self) -> tuple[Plain, Tensors]:
        """Every edit: plain values by position in the list, tensors by "edit.map.name" and "edit.gate.name"."""
        listed: list[Plain] = []
        tensors: Tensors = {}
        for i, edit in enumerate(self.edits):
            gate, centroids = edit.gate.pack()
            tensors |= {f"{i}.gate.{name}": tensor for name, tensor in centroids.items()}
            maps = []
            for m, ((site, j), step) in enumerate(edit.maps.items()):
                maps.append({"layer": site.layer, "part": site.part, "prefix": j})
                tensors |= {f"{i}.{m}.{name}": tensor for name, tensor in step.tensors().items()}
            norms = [{"layer": site.layer, "part": site.part, "norm": norm} for site, norm in edit.norms.items()]
            listed.append(
                {
                    "name": edit.name,
                    "subject": edit.subject,
                    "aliases": list(edit.aliases),
                    "alpha": edit.alpha,
                    "target": list(edit.target),
                    "gate": gate,
                    "maps": maps,
                    "norms": norms,
                }
            )
        return {"edits": listed}, tensors

    @classmethod
    def unpack(cls, plain: Plain, tensors: Tensors) -> Steering:
        """What pack() wrote. Raises KeyError, TypeError or ValueError on anything else."""
        edits = []
        for i, row in enumerate(plain["edits"]):
            maps = {}
            for m, where in enumerate(row["maps"]):
                site = Site(int(where["layer"]), str(where["part"]))
                maps[site, int(where["prefix"])] = AffineMap.from_tensors(_under(tensors, f"{i}.{m}."))
            norms = {Site(int(n["layer"]), str(n["part"])): float(n["norm"]) for n in row["norms"]}
            edits.append(
                SteeredEdit(
                    name=str(row["name"]),
                    subject=str(row["subject"]),
                    aliases=tuple(map(str, row["aliases"])),
                    maps=maps,
                    alpha=float(row["alpha"]),
                    gate=Gate.unpack(row["gate"], _under(tensors, f"{i}.gate.")),
                    target=tuple(map(int, row["target"])),
                    norms=norms,
                )
            )
        return cls(tuple(edits))


def _under(tensors: Tensors, start: str) -> Tensors:
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


# While the model reads -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spot:
    """Positions where one edit's maps of one prefix length act."""

    edit: SteeredEdit
    j: int
    rows: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]


_Look = tuple[Gate, str] | None
"""Which gate decides by which text; None where an edit stays out."""


class _Keeper:
    """Knows, for the forward that is about to run, which edit acts in which row and where. A Reader."""

    def __init__(self, lm: ModelAdapter, edits: Sequence[SteeredEdit]) -> None:
        self._lm = lm
        self._edits = [edit for edit in edits if edit.alpha != 0 and edit.maps]
        self._decided: dict[tuple[int, ...], SteeredEdit | None] = {}
        self._acting: list[tuple[SteeredEdit, int] | None] = []
        """Per row while generating: the edit and how many tokens of its o* stand behind the prompt."""
        self._spots: dict[Site, list[_Spot]] = {}
        self._shape = (0, 0)

    def begin(self, batch: TokenBatch) -> None:
        """A forward over whole rows: decide each row's edit and find the positions from where o* is predicted."""
        rows, starts = batch.rows(), batch.start.tolist()
        edits = self._decide([ids[:start] for ids, start in zip(rows, starts, strict=True)])
        where: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._acting = []
        for i, (edit, ids, start) in enumerate(zip(edits, rows, starts, strict=True)):
            behind = 0
            if edit is not None:
                number = self._number(edit)
                tail = ids[start:]
                while behind < edit.prefixes:
                    where.setdefault((number, behind), []).append((i, start - 1 + behind))
                    if behind >= len(tail) or behind >= len(edit.target) or tail[behind] != edit.target[behind]:
                        break
                    behind += 1
            # A row generates on from its prompt, so that nothing of o* stands behind it yet.
            self._acting.append((edit, 0) if edit is not None else None)
        self._arm(where, (len(rows), batch.ids.shape[1]))

    def advance(self, ids: Int[Tensor, " batch"]) -> None:
        """One more token behind each row: follow o*, or let the row go."""
        where: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, token in enumerate(ids.tolist()):
            acting = self._acting[i]
            if acting is None:
                continue
            edit, j = acting
            follows = j < len(edit.target) and edit.target[j] == token and j + 1 < edit.prefixes
            self._acting[i] = (edit, j + 1) if follows else None
            if follows:
                where.setdefault((self._number(edit), j + 1), []).append((i, 0))
        self._arm(where, (len(self._acting), 1))

    def steer(self, site: Site, value: Tensor) -> Tensor:
        """The value with every open row moved; the same tensor when there is none."""
        if not any(reader is self for reader in self._lm.readers):  # somebody looks aside
            return value
        # Taken out at the first use: code that runs single blocks on its own must not meet what was meant for another.
        spots = self._spots.pop(site, None)
        if not spots or tuple(value.shape[:2]) != self._shape:
            return value
        changed = value.clone()
        for spot in spots:
            rows, positions = spot.rows.to(value.device), spot.positions.to(value.device)
            x = value[rows, positions]  # (n, d_model)
            changed[rows, positions] = x + spot.edit.alpha * spot.edit.maps[site, spot.j].move(x)
        return changed

    def _number(self, edit: SteeredEdit) -> int:
        return next(i for i, other in enumerate(self._edits) if other is edit)

    def _arm(self, where: Mapping[tuple[int, int], list[tuple[int, int]]], shape: tuple[int, int]) -> None:
        self._shape = shape
        self._spots = {}
        for (number, j), places in where.items():
            edit = self._edits[number]
            rows, positions = torch.tensor(places).unbind(1)
            for site in edit.sites:
                if (site, j) in edit.maps:
                    self._spots.setdefault(site, []).append(_Spot(edit, j, rows, positions))

    def _decide(self, prompts: Sequence[tuple[int, ...]]) -> list[SteeredEdit | None]:
        """The edit that acts in each prompt, by the ids of the prompt; asked once for each."""
        if not self._edits:
            return [None] * len(prompts)
        fresh = [ids for ids in dict.fromkeys(prompts) if ids not in self._decided]
        if fresh:
            if len(self._decided) > KEPT_DECISIONS:
                self._decided = {}
                fresh = list(dict.fromkeys(prompts))
            texts = [tokens.text_of(self._lm.tokenizer, ids) for ids in fresh]
            looks = [[edit.gate.asks(text) for edit in self._edits] for text in texts]
            states = self._states(looks)
            for ids, row in zip(fresh, looks, strict=True):
                self._decided[ids] = self._nearest(row, states)
        return [self._decided[ids] for ids in prompts]

    def _states(self, looks: Sequence[Sequence[_Look]]) -> dict[tuple[int, bool, str], Tensor]:
        """(layer, pooled, text) -> embedding, one forward per layer and kind of embedding."""
        wanted: dict[tuple[int, bool], dict[str, None]] = {}
        for row in looks:
            for gate, text in filter(None, row):
                if gate.measures:
                    wanted.setdefault((gate.layer, gate.pooled), {})[text] = None
        found = {}
        for (layer, pooled), texts in wanted.items():
            states = states_of(self._lm, list(texts), layer, pooled)
            found.update({(layer, pooled, text): state for text, state in zip(texts, states, strict=True)})
        return found

    def _nearest(self, looks: Sequence[_Look], states: Mapping[tuple[int, bool, str], Tensor]) -> SteeredEdit | None:
        best: tuple[tuple[int, float, int], SteeredEdit] | None = None
        for i, (edit, look) in enumerate(zip(self._edits, looks, strict=True)):
            if look is None:
                continue
            gate, text = look
            distance = gate.distance(states[gate.layer, gate.pooled, text] if gate.measures else None)
            if distance is None:
                continue
            # A measured distance goes before a name, a name before "always"; among equals the latest edit speaks.
            order = (0 if gate.measures else 2 if gate.kind == "always" else 1, distance, -i)
            if best is None or order < best[0]:
                best = order, edit
        return None if best is None else best[1]
