"""Where the parts of a language model are, per `config.model_type`: the only place that spells module paths.

A new architecture is one row here, if its blocks add attention and MLP straight onto the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mega_core.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class ArchSpec:
    """Module paths of one family. `blocks` and `final_norm` start at the model, all others at a block."""

    model_type: str
    blocks: str
    attn: str
    attn_out: str
    """The matrix after the heads (W_O)."""
    value: str
    """The matrix that makes the values (W_V), alone or with queries and keys."""
    value_rows: Literal["own", "last_third", "per_head"]
    """Which rows of it: all, the last third, or the last third of every head's."""
    mlp: str
    mlp_up: str
    """The MLP's first matrix; its rows are what the neurons look for."""
    mlp_gate: str
    """The matrix of its gate, "" without one."""
    mlp_down: str
    """The MLP's last matrix, the one that ROME and its family edit."""
    attn_norm: str
    mlp_norm: str
    final_norm: str
    parallel: bool
    """Attention and MLP both read the block's input, so there is no residual stream between them."""
    gated: bool
    """The MLP is down(act(gate) * up) instead of down(act(up))."""
    norm: Literal["layernorm", "rmsnorm"]


def _llama_like(model_type: str) -> ArchSpec:
    return ArchSpec(
        model_type=model_type,
        blocks="model.layers",
        attn="self_attn",
        attn_out="self_attn.o_proj",
        value="self_attn.v_proj",
        value_rows="own",
        mlp="mlp",
        mlp_up="mlp.up_proj",
        mlp_gate="mlp.gate_proj",
        mlp_down="mlp.down_proj",
        attn_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        final_norm="model.norm",
        parallel=False,
        gated=True,
        norm="rmsnorm",
    )


ARCHS: dict[str, ArchSpec] = {
    "gpt2": ArchSpec(
        model_type="gpt2",
        blocks="transformer.h",
        attn="attn",
        attn_out="attn.c_proj",
        value="attn.c_attn",
        value_rows="last_third",
        mlp="mlp",
        mlp_up="mlp.c_fc",
        mlp_gate="",
        mlp_down="mlp.c_proj",
        attn_norm="ln_1",
        mlp_norm="ln_2",
        final_norm="transformer.ln_f",
        parallel=False,
        gated=False,
        norm="layernorm",
    ),
    "gptj": ArchSpec(
        model_type="gptj",
        blocks="transformer.h",
        attn="attn",
        attn_out="attn.out_proj",
        value="attn.v_proj",
        value_rows="own",
        mlp="mlp",
        mlp_up="mlp.fc_in",
        mlp_gate="",
        mlp_down="mlp.fc_out",
        attn_norm="ln_1",
        mlp_norm="ln_1",
        final_norm="transformer.ln_f",
        parallel=True,
        gated=False,
        norm="layernorm",
    ),
    "gpt_neox": ArchSpec(
        model_type="gpt_neox",
        blocks="gpt_neox.layers",
        attn="attention",
        attn_out="attention.dense",
        value="attention.query_key_value",
        value_rows="per_head",
        mlp="mlp",
        mlp_up="mlp.dense_h_to_4h",
        mlp_gate="",
        mlp_down="mlp.dense_4h_to_h",
        attn_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        final_norm="gpt_neox.final_layer_norm",
        parallel=True,  # the published models; the adapter reads config.use_parallel_residual
        gated=False,
        norm="layernorm",
    ),
    **{name: _llama_like(name) for name in ("llama", "mistral", "qwen2", "qwen3")},
}

_POST_NORM = (
    "it also normalises after attention and after the MLP, so what those write is not what the residual stream receives"
)
REFUSED: dict[str, str] = {
    "gemma2": _POST_NORM,
    "gemma3": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "mixtral": "its MLP is a set of experts, so there is no single down-projection to edit",
    "qwen2_moe": "its MLP is a set of experts, so there is no single down-projection to edit",
    "qwen3_moe": "its MLP is a set of experts, so there is no single down-projection to edit",
}


def spec_of(model_type: str) -> ArchSpec:
    """The row of the table. Raises UnsupportedModel with the reason, or with the list of known architectures."""
    if model_type in ARCHS:
        return ARCHS[model_type]
    known = f"Choose a model of one of these architectures: {', '.join(ARCHS)}."
    if model_type in REFUSED:
        raise UnsupportedModel(f"The architecture {model_type!r} can't be opened: {REFUSED[model_type]}.", known)
    raise UnsupportedModel(f"The architecture {str(model_type)[:80]!r} is not in the table of architectures.", known)
