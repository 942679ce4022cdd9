"""Reading and replacing activations. These are the only hooks of the project, and none outlives its `with` block.

    with capture(lm, [Site(5, "mlp_down_in")]) as got:     # the forward ends at the deepest site asked for
        lm.forward(batch)
    keys = got[Site(5, "mlp_down_in")]                     # (batch, pos, d_mlp), detached

    with intervene(lm, {Site(5, "mlp"): lambda mlp: mlp + delta}):
        logits = lm.last_logits(batch)

A `capture` inside an `intervene` sees the replaced values; the other way round it sees them as they were before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mega_core.errors import BadInput

if TYPE_CHECKING:
    from mega_core.models.adapter import ModelAdapter

PARTS = (  # in the order in which a block computes them
    "block_in",  # residual stream before the block                 (batch, pos, d_model)
    "value",  # the values, before the pattern mixes them           (batch, pos, n_kv_heads * head_dim)
    "attn_out_in",  # the heads' outputs side by side, before W_O   (batch, pos, n_heads * head_dim)
    "attn",  # what attention writes                                (batch, pos, d_model)
    "pattern",  # attention weights; read only                      (batch, head, pos, pos)
    "resid_mid",  # block_in + attn                                 (batch, pos, d_model)
    "mlp_down_in",  # the MLP's neurons                             (batch, pos, d_mlp)
    "mlp",  # what the MLP writes                                   (batch, pos, d_model)
    "block_out",  # residual stream after the block                 (batch, pos, d_model)
)
FINAL = "final"  # after the final norm, which belongs to no block; at the last layer only   (batch, pos, d_model)


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the model: a layer and one of PARTS, or the last layer and FINAL."""

    layer: int
    part: str

    def __post_init__(self) -> None:
        if self.part not in (*PARTS, FINAL):
            raise ValueError(f"There is no part {self.part!r} in a block. Known: {', '.join((*PARTS, FINAL))}.")

    @property
    def depth(self) -> tuple[int, int]:
        """Sorts sites in the order of computation."""
        return self.layer, (*PARTS, FINAL).index(self.part)


class ForwardStopped(Exception):
    """Ends a forward pass once everything asked for is captured. ModelAdapter.forward catches it."""


class Captured(dict[Site, Tensor]):
    """Site -> value of the latest forward."""

    def __missing__(self, site: Site) -> Tensor:
        raise KeyError(
            f"Nothing was captured at {site}: ask for it in capture(), then run the model inside the block. "
            f"Captured: {', '.join(map(str, self)) or 'nothing yet'}."
        )


Fn = Callable[[Tensor], Tensor]
_See = Callable[[Tensor], "Tensor | None"]


@contextmanager
def capture(lm: ModelAdapter, sites: Iterable[Site], stop: bool = True) -> Iterator[Captured]:
    """Values at `sites`, detached. With stop=True use lm.forward: it ends at the deepest site of all open captures."""
    wanted = tuple(dict.fromkeys(sites))
    if not wanted:
        raise ValueError("capture() needs at least one site.")
    got = Captured()
    deepest = max(site.depth for site in wanted)
    limit = deepest if stop else None

    def see(site: Site) -> _See:
        def look(value: Tensor) -> None:
            got[site] = value.detach()
            # A shallower capture around or inside a deeper one must not end the forward before that has its values.
            if site.depth == deepest and all(depth is not None and depth <= deepest for depth in lm.capture_limits):
                raise ForwardStopped

        return look

    with ExitStack() as stack:
        for site in sorted(wanted, key=lambda s: s.depth):
            _place(stack, lm, site, see(site))
        lm.capture_limits.append(limit)
        stack.callback(lm.capture_limits.remove, limit)
        yield got


@contextmanager
def intervene(lm: ModelAdapter, changes: Mapping[Site, Fn]) -> Iterator[None]:
    """Replace the value at each site by fn(value), which must keep the shape; fn must not write into its argument.

    At resid_mid the difference is added to what attention writes, so in a parallel block the MLP does not see it.
    """

    def see(site: Site, fn: Fn) -> _See:
        def replace(value: Tensor) -> Tensor:
            new = fn(value)
            if not isinstance(new, Tensor) or new.shape != value.shape:
                found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(f"The intervention at {site} returned {found} instead of shape {tuple(value.shape)}.")
            return new.to(device=value.device, dtype=value.dtype)

        return replace

    with ExitStack() as stack:
        for site, fn in changes.items():
            if site.part == "pattern":
                raise ValueError("Attention weights can be captured, not replaced. Intervene at 'attn' instead.")
            _place(stack, lm, site, see(site, fn))
        yield


def _own_positions(lm: ModelAdapter, site: Site, see: _See) -> _See:
    """Behind a prefix, show `see` only the positions of the rows themselves, and put back what it changes there."""

    def look(value: Tensor) -> Tensor | None:
        if lm.places is None:
            return see(value)
        places = lm.places.to(value.device)  # (batch, pos), 0 at padding
        rows = torch.arange(len(places), device=value.device)[:, None]
        if site.part == "pattern":  # (batch, head, pos, pos): what goes to the prefix is left out
            queries = value.transpose(1, 2)[rows, places]  # (batch, pos, head, all)
            return see(queries.permute(0, 3, 1, 2)[rows, places].permute(0, 3, 2, 1))
        new = see(value[rows, places])
        if new is None:
            return None
        changed = value.clone()
        real = places > 0
        real[:, 0] = True
        changed[rows.expand_as(places)[real], places[real]] = new[real]
        return changed

    return look


def untuple(output: Any) -> Tensor:
    """The tensor in a module's output: bare in some modules, first of a tuple in others, and it varies by version."""
    return output[0] if isinstance(output, tuple | list) else output


def _retuple(output: Any, new: Tensor) -> Any:
    return (new, *output[1:]) if isinstance(output, tuple | list) else new


def _place(stack: ExitStack, lm: ModelAdapter, site: Site, see: _See) -> None:
    """Register what is needed so that `see` gets the value at `site`; a tensor it returns replaces the value."""
    layer = site.layer
    see = _own_positions(lm, site, see)
    if site.part == "block_in":
        _on_input(stack, lm.block(layer), see)
    elif site.part == "value":
        _on_value(stack, lm, layer, see)
    elif site.part == "attn_out_in":
        _on_input(stack, lm.attn_out(layer), see)
    elif site.part == "mlp_down_in":
        _on_input(stack, lm.mlp_down(layer), see)
    elif site.part == "resid_mid":
        _on_resid_mid(stack, lm, layer, see)
    elif site.part == "pattern":
        _on_pattern(stack, lm, layer, see)
    elif site.part == FINAL:
        _on_final(stack, lm, layer, see)
    else:
        module = {"attn": lm.attn, "mlp": lm.mlp, "block_out": lm.block}[site.part](layer)
        _on_output(stack, module, see)


def _on_input(stack: ExitStack, module: nn.Module, see: _See) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = see(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = see(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _on_output(stack: ExitStack, module: nn.Module, see: _See) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = see(untuple(output))
        return None if new is None else _retuple(output, new)

    stack.callback(module.register_forward_hook(hook).remove)


def _on_resid_mid(stack: ExitStack, lm: ModelAdapter, layer: int, see: _See) -> None:
    block_in: list[Tensor] = []

    def remember(value: Tensor) -> None:
        block_in[:] = [value]

    def at_attention(attn: Tensor) -> Tensor | None:
        mid = block_in.pop().to(attn.device) + attn
        new = see(mid)
        # attn + (new - mid), not new - block_in: the identity must stay bit-exact.
        return None if new is None else attn + (new - mid)

    _on_input(stack, lm.block(layer), remember)
    _on_output(stack, lm.attn(layer), at_attention)


def _on_value(stack: ExitStack, lm: ModelAdapter, layer: int, see: _See) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        new = see(lm.values_in(output).flatten(-2))
        if new is None:
            return None
        changed = output.clone()
        lm.values_in(changed).copy_(new.unflatten(-1, (lm.n_kv_heads, lm.head_dim)))
        return changed

    stack.callback(lm.value_module(layer).register_forward_hook(hook).remove)


def _on_final(stack: ExitStack, lm: ModelAdapter, layer: int, see: _See) -> None:
    if layer != lm.n_layers - 1:
        raise BadInput("layer", f"{FINAL!r} is behind layer {lm.n_layers - 1}, not {layer}.", "Use the last layer.")

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = see(output[0])
        if new is None:
            return None
        output.last_hidden_state = new
        return output

    # At the trunk's end, not at the norm itself: lm.unembed runs the norm too, on states that are no forward's.
    stack.callback(lm.model.base_model.register_forward_hook(hook).remove)


def _on_pattern(stack: ExitStack, lm: ModelAdapter, layer: int, see: _See) -> None:
    config = lm.model.config
    if config._attn_implementation != "eager":  # only the eager kernel makes the weights; it is looked up at each call
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = "eager"

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        see(output[1])

    stack.callback(lm.attn(layer).register_forward_hook(hook).remove)
