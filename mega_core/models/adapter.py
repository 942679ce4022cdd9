"""One language model with its parts by name, whatever its architecture: everything above this file is free of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mega_core.errors import BadInput, UnsupportedModel
from mega_core.models import tokens
from mega_core.models.arch import spec_of
from mega_core.models.hooks import ForwardStopped, Site, capture
from mega_core.models.tokens import TokenBatch
from mega_core.records import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Memo(Protocol):
    """Arrays by key; the store is one."""

    def get_arrays(self, key: str) -> dict[str, Any] | None:
        """The arrays of this key, or None."""
        ...

    def put_arrays(self, key: str, arrays: dict[str, Any]) -> object:
        """Keep them, if there is room."""
        ...


Prefix = Callable[[str], str]
"""From a prompt to the text that is put in front of it; "" leaves it alone."""


class Reader(Protocol):
    """Wants to know what the model reads, because activations alone don't tell."""

    def begin(self, batch: TokenBatch) -> None:
        """The model is about to read these rows, each a prompt (up to `start`) and maybe the beginning of a target."""
        ...

    def advance(self, ids: Int[Tensor, " batch"]) -> None:
        """Behind each row comes one more token (in generate, after the prompt)."""
        ...


Chooser = Callable[[Float[Tensor, " vocab"]], int | None]
"""From the logits after a text to the id of its next token; None ends the text."""


class _Block(NamedTuple):
    block: nn.Module
    attn: nn.Module
    attn_out: nn.Module
    value: nn.Module
    mlp: nn.Module
    mlp_up: nn.Module
    mlp_gate: nn.Module | None
    mlp_down: nn.Module
    attn_norm: nn.Module
    mlp_norm: nn.Module


class ModelAdapter:
    """A decoder-only model: sizes, parts by name, logits, text. Never changed by what runs here.

    Gradients are the caller's business: parameters don't require them, so a graph exists only where an intervention
    brings one.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ref: ModelRef, file_digest: str = ""
    ) -> None:
        """Finds every part of every block. Raises UnsupportedModel naming a missing one."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.ref = ref
        self.name = ref.name
        self.file_digest = file_digest
        """Digest of the files the model was loaded from; part of every key."""
        self.memo: Memo | None = None
        """Where methods keep statistics of the unedited model between runs; whoever holds the lease sets it."""
        self.past = 0
        """Positions already read: 0, except in generate() after the prompt, where hooks see one new one at a time."""
        self.prefix: Prefix | None = None
        """What is put in front of every prompt; see behind(). Positions, here and in hooks, never count it."""
        self.readers: list[Reader] = []
        """Told of every batch before the model reads it; see reading()."""
        self.changes: list[Any] = []
        """The changes that are true at the moment, first applied first."""
        self.places: Int[Tensor, "batch pos"] | None = None
        """During a forward behind a prefix: where the rows' own positions lie in what the model runs on."""
        self.capture_limits: list[tuple[int, int] | None] = []
        """How deep each open capture() must see; kept here so that nested captures know of each other."""

        config: Any = model.config
        spec = spec_of(config.model_type)
        if config.model_type == "gpt_neox":
            spec = replace(spec, parallel=bool(config.use_parallel_residual))
        self.spec = spec
        blocks = _find(model, spec.blocks)
        if not isinstance(blocks, nn.ModuleList) or not len(blocks):
            raise UnsupportedModel(f"{ref.name}: {spec.blocks!r} is not a list of blocks.", "Choose another model.")
        paths = (
            spec.attn, spec.attn_out, spec.value, spec.mlp, spec.mlp_up, spec.mlp_gate, spec.mlp_down,
            spec.attn_norm, spec.mlp_norm,
        )  # fmt: skip
        found = [[_find(block, path) if path else None for path in paths] for block in blocks]
        self._blocks = [_Block(block, *cast(Any, parts)) for block, parts in zip(blocks, found, strict=True)]
        self.final_norm = _find(model, spec.final_norm)
        head = model.get_output_embeddings()
        if head is None:
            raise UnsupportedModel(f"{ref.name} has no output head.", "Choose a model for text generation.")
        self.head: nn.Module = head

        self.n_layers = len(self._blocks)
        self.n_heads = int(config.num_attention_heads)
        self.n_kv_heads = int(getattr(config, "num_key_value_heads", None) or self.n_heads)
        self.d_model, attn_width = self.read_weight(0, "attn_out").shape
        self.d_mlp = self.read_weight(0, "mlp_down").shape[1]
        self.head_dim = attn_width // self.n_heads
        self.vocab_size = self.head_weight.shape[0]
        self.max_positions = int(config.max_position_embeddings)
        self._hooks_at_load = frozenset(key for key, _ in self._hooks())

    def __repr__(self) -> str:
        return f"ModelAdapter({self.name}, {self.spec.model_type}, {self.n_layers} layers, d_model {self.d_model})"

    # Parts by name ---------------------------------------------------------------------------------------------------

    def block(self, layer: int) -> nn.Module:
        """The whole block."""
        return self._at(layer).block

    def attn(self, layer: int) -> nn.Module:
        """The attention module; its output is what attention writes to the residual stream."""
        return self._at(layer).attn

    def attn_out(self, layer: int) -> nn.Module:
        """The matrix after the heads, W_O."""
        return self._at(layer).attn_out

    def mlp(self, layer: int) -> nn.Module:
        """The MLP module; its output is what the MLP writes to the residual stream."""
        return self._at(layer).mlp

    def mlp_down(self, layer: int) -> nn.Module:
        """The MLP's last matrix; its input are the neurons."""
        return self._at(layer).mlp_down

    def attn_norm(self, layer: int) -> nn.Module:
        """The norm before attention."""
        return self._at(layer).attn_norm

    def mlp_norm(self, layer: int) -> nn.Module:
        """The norm before the MLP (in GPT-J the same module as attn_norm)."""
        return self._at(layer).mlp_norm

    def weight(self, layer: int, site: str) -> nn.Parameter:
        """The stored matrix of "mlp_down" or "attn_out", in whatever orientation the model keeps it (see conv1d)."""
        weight = self._matrix(layer, site).weight
        if not isinstance(weight, nn.Parameter):
            raise UnsupportedModel(f"{self.name}: {site} of layer {layer} is not a plain matrix.", "Load it in full.")
        return weight

    def conv1d(self, layer: int, site: str) -> bool:
        """Whether the matrix is stored (in, out). Decided by module type: a square matrix looks the same both ways."""
        return type(self._matrix(layer, site)).__name__ == "Conv1D"

    def read_weight(self, layer: int, site: str) -> Float[Tensor, "out in"]:
        """The matrix as (out, in): a view, so writing into it changes the model."""
        weight = self.weight(layer, site).detach()
        return weight.T if self.conv1d(layer, site) else weight

    def bias(self, layer: int, site: str) -> Float[Tensor, " out"] | None:
        """What "mlp_down" or "attn_out" adds besides its matrix, or None."""
        bias = getattr(self._matrix(layer, site), "bias", None)
        return None if bias is None else bias.detach()

    def head_out(self, layer: int) -> Float[Tensor, "head head_dim d_model"]:
        """W_O, cut into heads: row j of a head is what its j-th number writes to the residual stream."""
        return self.read_weight(layer, "attn_out").T.unflatten(0, (self.n_heads, self.head_dim))

    def value_module(self, layer: int) -> nn.Module:
        """The module whose output holds the values, alone or with queries and keys (see values_in)."""
        return self._at(layer).value

    def value_weight(self, layer: int) -> Float[Tensor, "kv_head head_dim d_model"]:
        """W_V by key/value head, a view: row j makes the head's j-th number from the normalised stream."""
        return self.values_in(_as_rows(self.value_module(layer)).T).movedim(0, -1)

    def value_bias(self, layer: int) -> Float[Tensor, "kv_head head_dim"] | None:
        """What is added to the values, or None."""
        bias = getattr(self.value_module(layer), "bias", None)
        return None if bias is None else self.values_in(bias.detach())

    def values_in(self, output: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch kv_head head_dim"]:
        """The values in an output of value_module: a view of it."""
        if self.spec.value_rows == "per_head":  # every head: its query, its key, its value
            return output.unflatten(-1, (self.n_heads, 3 * self.head_dim))[..., 2 * self.head_dim :]
        width = self.n_kv_heads * self.head_dim
        return output[..., -width:].unflatten(-1, (self.n_kv_heads, self.head_dim))

    def kv_head(self, head: int) -> int:
        """Which key/value head serves a query head."""
        return head // (self.n_heads // self.n_kv_heads)

    def mlp_in(self, layer: int, which: str = "up") -> Float[Tensor, "d_mlp d_model"]:
        """What the neurons look for: rows of the MLP's first matrix ("up"), or of its gate ("gate")."""
        module = self._at(layer).mlp_up if which == "up" else self._at(layer).mlp_gate
        if module is None or which not in ("up", "gate"):
            raise BadInput("matrix", f"{self.name} has no MLP matrix {which!r}.", "Choose up.")
        return _as_rows(module)

    @property
    def head_weight(self) -> Float[Tensor, "vocab d_model"]:
        """The unembedding matrix."""
        return self.head.weight.detach()  # type: ignore[union-attr,operator,return-value]

    @property
    def head_bias(self) -> Float[Tensor, " vocab"] | None:
        """The unembedding bias (GPT-J has one)."""
        bias = getattr(self.head, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.weight(0, "mlp_down").dtype

    # Running ---------------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> TokenBatch:
        """Prompts as a right-padded batch on the model's device."""
        return tokens.encode(self.tokenizer, prompts, self.device)

    def unembed(self, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of a residual stream: the final norm, then the head."""
        weight = self.head_weight
        normed = self.final_norm(h.to(_device_of(self.final_norm), weight.dtype))
        return self.head(normed.to(weight.device))

    def forward(self, batch: TokenBatch) -> None:
        """Run the trunk for its hooks. Ends early inside capture(..., stop=True)."""
        try:
            self._trunk(batch)
        except ForwardStopped:
            return

    def logits(self, batch: TokenBatch) -> Float[Tensor, "batch pos vocab"]:
        """Logits at every position: batch * pos * vocab numbers; prefer last_logits or logits_at."""
        return self._to_head(self._whole_trunk(batch))

    def last_logits(self, batch: TokenBatch) -> Float[Tensor, "batch vocab"]:
        """Logits at each row's last real token."""
        rows = torch.arange(len(batch), device=batch.ids.device)
        return self.logits_at(batch, rows, batch.last)

    def logits_at(
        self, batch: TokenBatch, rows: Int[Tensor, " n"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n vocab"]:
        """Logits at chosen (row, position) pairs: the trunk once, the head on those only."""
        hidden = self._whole_trunk(batch)  # (batch, pos, d_model)
        return self._to_head(hidden[rows.to(hidden.device), positions.to(hidden.device)])

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 24, choosers: Sequence[Chooser] | None = None
    ) -> list[str]:
        """Greedy continuations without their prompts, until end of text or `max_new_tokens`; hooks apply at every step.

        `choosers`, one per prompt, choose the next tokens instead; each is asked until its own text has ended.

        Rows are padded on the right and new tokens get the positions that follow their own row, so a hook that counts
        positions finds them where forward() has them. `past` tells a hook whether it sees the prompt (0) or a new one.
        """
        batch = self.encode(prompts)
        window = getattr(self.model.config, "sliding_window", None)
        if len(batch) > 1 and window and batch.ids.shape[1] + max_new_tokens > window:
            # A sliding window counts the padding between a short prompt and its new tokens; alone there is none.
            alone = [None] * len(prompts) if choosers is None else [[chooser] for chooser in choosers]
            pairs = zip(prompts, alone, strict=True)
            return [text for prompt, own in pairs for text in self.generate([prompt], max_new_tokens, own)]
        with torch.no_grad():
            new = self._greedy(batch, max_new_tokens, choosers)
        return [tokens.continuation(self.tokenizer, row, ids) for row, ids in zip(batch.rows(), new, strict=True)]

    @contextmanager
    def behind(self, prefix: Prefix) -> Iterator[None]:
        """Put a text in front of every prompt inside the block. Inside another one, it stands nearer to the prompt."""
        outer = self.prefix
        self.prefix = prefix if outer is None else lambda prompt: outer(prompt) + prefix(prompt)
        try:
            yield
        finally:
            self.prefix = outer

    @contextmanager
    def reading(self, reader: Reader) -> Iterator[None]:
        """Tell `reader` of every batch inside the block."""
        self.readers.append(reader)
        try:
            yield
        finally:
            self.readers.remove(reader)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside the block the model reads without prefix and tells no reader: for a reader's own look at a prompt."""
        kept = self.prefix, self.readers, self.places
        self.prefix, self.readers, self.places = None, [], None
        try:
            yield
        finally:
            self.prefix, self.readers, self.places = kept

    # Being left as it was --------------------------------------------------------------------------------------------

    def live_digest(self) -> str:
        """Digest of parameters and buffers as they are now: equal digests mean bit-equal tensors."""
        total = hashlib.sha256()
        sums: list[tuple[str, Tensor]] = []
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            label = f"{name} {tuple(tensor.shape)} {tensor.dtype}"
            if tensor.device.type == "cuda":
                sums.append((label, bit_sums(tensor.detach())))
            else:
                total.update(label.encode())
                total.update(_bytes_of(tensor.detach()))
        for label, pair in sums:  # after all kernels are queued: reading each sum at once would wait for it
            total.update(f"{label} {pair.tolist()}".encode())
        return total.hexdigest()

    def hook_count(self) -> int:
        """Whatever still watches or turns a forward pass and was not there at load: hooks, readers, a prefix."""
        hooks = sum(1 for key, _ in self._hooks() if key not in self._hooks_at_load)
        return hooks + len(self.readers) + (self.prefix is not None)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _at(self, layer: int) -> _Block:
        if not 0 <= layer < self.n_layers:
            raise BadInput("layer", f"{self.name} has no layer {layer}.", f"Choose one of 0 to {self.n_layers - 1}.")
        return self._blocks[layer]

    def _matrix(self, layer: int, site: str) -> nn.Module:
        if site not in ("mlp_down", "attn_out"):
            raise BadInput("site", f"there is no matrix {site!r}.", "Choose mlp_down or attn_out.")
        return self._at(layer).mlp_down if site == "mlp_down" else self._at(layer).attn_out

    def _check_length(self, batch: TokenBatch) -> None:
        if batch.ids.shape[1] > self.max_positions:
            raise BadInput(
                "prompt",
                f"{batch.ids.shape[1]} tokens, but {self.name} reads at most {self.max_positions}.",
                "Shorten it.",
            )

    def _trunk(self, batch: TokenBatch) -> Float[Tensor, "batch pos d_model"]:
        """Final-normalised states. All-ones mask: padding is on the right, so causality keeps it out of real tokens."""
        for reader in self.readers:
            reader.begin(batch)
        full, places = self._with_prefix(batch)
        self._check_length(full)
        everything = torch.ones_like(full.ids)  # without any mask the library warns about padding
        with self._placed(places):
            hidden = self.model.base_model(
                input_ids=full.ids, attention_mask=everything, use_cache=False
            ).last_hidden_state
        return hidden if places is None else hidden[_rows_of(places, hidden), places.to(hidden.device)]

    def _with_prefix(self, batch: TokenBatch) -> tuple[TokenBatch, Int[Tensor, "batch pos"] | None]:
        """What the model runs on, and where the batch's own positions lie in it (None: just there)."""
        if self.prefix is None:
            return batch, None
        own = batch.rows()
        texts = [
            self.prefix(tokens.text_of(self.tokenizer, ids[:start]))
            for ids, start in zip(own, batch.start.tolist(), strict=True)
        ]
        if not any(texts):
            return batch, None
        found = [
            tokens.behind(self.tokenizer, text, ids) if text else (ids, tuple(range(len(ids))))
            for text, ids in zip(texts, own, strict=True)
        ]
        width, device = batch.ids.shape[1], batch.ids.device
        places = torch.tensor([[*where, *[0] * (width - len(where))] for _, where in found], device=device)
        starts = [where[start - 1] + 1 for (_, where), start in zip(found, batch.start.tolist(), strict=True)]
        return tokens.pack(self.tokenizer, [full for full, _ in found], device, starts), places

    @contextmanager
    def _placed(self, places: Int[Tensor, "batch pos"] | None) -> Iterator[None]:
        outer, self.places = self.places, places
        try:
            yield
        finally:
            self.places = outer

    def _whole_trunk(self, batch: TokenBatch) -> Float[Tensor, "batch pos d_model"]:
        try:
            return self._trunk(batch)
        except ForwardStopped:
            raise RuntimeError(
                "A capture() ended the forward before the logits: use capture(..., stop=False)."
            ) from None

    def _to_head(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        return self.head(hidden.to(self.head_weight.device))

    def _greedy(self, batch: TokenBatch, steps: int, choosers: Sequence[Chooser] | None = None) -> list[list[int]]:
        from transformers import DynamicCache

        for reader in self.readers:
            reader.begin(batch)
        batch, places = self._with_prefix(batch)
        self._check_length(batch)
        steps = min(steps, self.max_positions - batch.ids.shape[1])
        ends = self._end_ids()
        cache = DynamicCache(config=self.model.config)
        rows = torch.arange(len(batch), device=batch.ids.device)
        ids, mask = batch.ids, batch.mask
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        at = batch.last
        new: list[list[int]] = [[] for _ in rows]
        going = [True] * len(new)
        try:
            for step in range(steps):
                self.past = 0 if step == 0 else batch.ids.shape[1] + step - 1
                with self._placed(places if step == 0 else None):
                    hidden = self.model.base_model(
                        input_ids=ids,
                        attention_mask=mask,
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=True,
                    ).last_hidden_state
                logits = self._to_head(hidden[rows, at])  # (batch, vocab)
                best = logits.argmax(-1).tolist()
                for row in range(len(best)):
                    chosen: int | None = best[row]
                    if choosers is not None and going[row]:
                        chosen = choosers[row](logits[row])
                    going[row] = going[row] and chosen is not None and chosen not in ends
                    if going[row] and chosen is not None:
                        new[row].append(chosen)
                        best[row] = chosen
                if not any(going):
                    break
                ids = torch.tensor(best, device=batch.ids.device)[:, None]
                for reader in self.readers:
                    reader.advance(ids[:, 0])
                positions = (batch.last + 1 + step)[:, None]
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
                at = torch.zeros_like(batch.last)
        except ForwardStopped:
            raise RuntimeError(
                "A capture() ended the forward: use capture(..., stop=False) around generate()."
            ) from None
        finally:
            self.past = 0
        return new

    def _end_ids(self) -> frozenset[int]:
        listed = getattr(self.model.generation_config, "eos_token_id", None)
        ends = listed if isinstance(listed, list) else [listed]
        return frozenset(int(i) for i in (*ends, self.tokenizer.eos_token_id) if i is not None)

    def _hooks(self) -> Iterator[tuple[tuple[int, int], Any]]:
        """((module, hook id), function) of every hook; those transformers keeps for its own outputs don't count."""
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        for owner in (*self.model.modules(), *self.model.parameters()):
            for kind in kinds:
                for key, function in (getattr(owner, kind, None) or {}).items():
                    if not str(getattr(function, "__module__", "")).startswith("transformers."):
                        yield (id(owner), key), function


def check_parts(lm: ModelAdapter) -> None:
    """Run three tokens and check that the parts add up as the table says. Raises UnsupportedModel naming the part."""
    batch = tokens.pack(lm.tokenizer, [[i % lm.vocab_size for i in (1, 2, 3)]], lm.device)
    first = {part: Site(0, part) for part in ("block_in", "attn", "mlp_down_in", "attn_out_in", "mlp", "block_out")}
    last = Site(lm.n_layers - 1, "block_out")
    with torch.no_grad(), capture(lm, [*first.values(), last], stop=False) as got:
        logits = lm.logits(batch).float()
    missing = [site.part for site in (*first.values(), last) if site not in got]
    if missing:
        raise UnsupportedModel(f"{lm.name}: nothing passes through {', '.join(missing)}.", "Choose another model.")
    if not torch.isfinite(logits).all():
        raise UnsupportedModel(f"{lm.name} gives logits that are not finite.", f"Load it as float32, not {lm.dtype}.")
    part = {name: got[site].float().cpu() for name, site in first.items()}
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2}.get(lm.dtype, 5e-2)
    written, parts = part["block_out"] - part["block_in"], part["attn"] + part["mlp"]
    # Relative to the stream, not to the update: that is where low precision rounds.
    if (written - parts).abs().max() > tolerance * part["block_out"].abs().max().clamp_min(1):
        raise UnsupportedModel(
            f"{lm.name}: the block's update is not attention plus MLP.", "Its architecture needs a row of its own."
        )
    if part["mlp_down_in"].shape[-1] != lm.d_mlp or part["attn_out_in"].shape[-1] != lm.n_heads * lm.head_dim:
        raise UnsupportedModel(f"{lm.name}: a matrix and its input differ in width.", "Choose another model.")
    with torch.no_grad():
        again = lm.unembed(got[last]).float()
    if (again.cpu() - logits.cpu()).abs().max() > tolerance * logits.abs().max().cpu().clamp_min(1):
        raise UnsupportedModel(
            f"{lm.name}: its logits are not head(final norm(last block)).", "Its architecture needs a row of its own."
        )


def bit_sums(tensor: Tensor) -> Int[Tensor, " 2"]:
    """Two 64-bit sums over the bits of a tensor, computed where it lies; one weighs by position with odd numbers.

    An odd weight is invertible modulo 2**64, so one changed word is always seen; swapped words change the second sum.
    """
    flat = tensor.contiguous().view(torch.uint8).flatten() if tensor.ndim else tensor.reshape(1).view(torch.uint8)
    flat = nn.functional.pad(flat, (0, -flat.numel() % 8)) if flat.numel() % 8 else flat
    words = flat.view(torch.int64)
    plain = torch.zeros((), dtype=torch.int64, device=tensor.device)
    weighted = torch.zeros_like(plain)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        weights = torch.arange(start, start + part.numel(), device=part.device) * _MULTIPLIER | 1
        plain += part.sum()
        weighted += (part * weights).sum()
    return torch.stack((plain, weighted))


_CHUNK = 2**24
_MULTIPLIER = 0x1E3779B97F4A7C15  # spreads the positions over all 64 bits


def _as_rows(module: nn.Module) -> Float[Tensor, "out in"]:
    weight: Any = module.weight
    return weight.detach().T if type(module).__name__ == "Conv1D" else weight.detach()


def _rows_of(places: Int[Tensor, "batch pos"], value: Tensor) -> Int[Tensor, "batch 1"]:
    """The row numbers that go with `places` when both index `value`."""
    return torch.arange(len(places), device=value.device)[:, None]


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).cpu()
    return flat.numpy().data


def _find(root: nn.Module, path: str) -> Any:
    try:
        return attrgetter(path)(root)
    except AttributeError:
        raise UnsupportedModel(
            f"{type(root).__name__} has no part {path!r}.", "Its architecture differs from the table's row."
        ) from None


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
