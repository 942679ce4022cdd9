"""Tiny random models of every architecture with a small byte-level tokenizer, made in memory.

The sizes differ from each other wherever an architecture lets them (heads * head_dim != d_model, d_mlp no multiple of
d_model, fewer key/value heads), so that a transposed or mixed-up axis fails; biases and norm gains are random, since
zeros and ones hide mistakes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from mega_core.models.adapter import ModelAdapter
from mega_core.models.arch import ARCHS
from mega_core.records import ModelRef

ARCH_NAMES = tuple(ARCHS)
LAYERS = 3
MAX_PARAMETERS = 200_000
BOS_ARCHS = ("llama", "mistral")  # their tokenizers put a BOS in front, as the real ones do

_ROPE = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
_ENDS = {"eos_token_id": 0, "bos_token_id": 1}
_LLAMA_LIKE: dict[str, Any] = {
    **_ENDS,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **_ROPE,
}


def _config(arch: str, vocab: int) -> Any:
    if arch == "gpt2":
        # The attention matrix after the heads is square here: only the module type tells its orientation.
        return GPT2Config(
            vocab_size=vocab, n_positions=256, n_embd=32, n_inner=56, n_layer=LAYERS, n_head=4,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, **_ENDS,
        )  # fmt: skip
    if arch == "gptj":
        return GPTJConfig(
            vocab_size=vocab, n_positions=256, n_embd=32, n_inner=56, n_layer=LAYERS, n_head=4, rotary_dim=4,
            tie_word_embeddings=False, **_ENDS,
        )  # fmt: skip
    if arch == "gpt_neox":
        return GPTNeoXConfig(
            vocab_size=vocab, max_position_embeddings=256, hidden_size=32, intermediate_size=56,
            num_hidden_layers=LAYERS, num_attention_heads=4, **_ENDS,
        )  # fmt: skip
    if arch == "llama":
        return LlamaConfig(vocab_size=vocab, head_dim=12, attention_bias=True, mlp_bias=True, **_LLAMA_LIKE)
    if arch == "mistral":
        return MistralConfig(vocab_size=vocab, head_dim=12, sliding_window=None, **_LLAMA_LIKE)
    if arch == "qwen2":
        return Qwen2Config(vocab_size=vocab, tie_word_embeddings=True, **_LLAMA_LIKE)
    if arch == "qwen3":
        return Qwen3Config(vocab_size=vocab, head_dim=12, **_LLAMA_LIKE)
    raise KeyError(f"no tiny model of {arch!r}; there are {', '.join(ARCH_NAMES)}")


def tiny(arch: str, seed: int = 0) -> ModelAdapter:
    """A new random model; the same seed gives the same weights."""
    tokenizer = tiny_tokenizer(bos=arch in BOS_ARCHS)
    config = _config(arch, len(tokenizer) + 3)  # wider than the vocabulary, as in many real models
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    _randomise(model, torch.Generator().manual_seed(seed))
    count = sum(p.numel() for p in model.parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"the tiny {arch} has {count:,} parameters: a size in its config was not read")
    return ModelAdapter(
        model, tokenizer, ModelRef(f"tiny-{arch}"), file_digest=f"{ARCH_NAMES.index(arch):x}{seed:063x}"
    )


def _randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights large enough that answers differ and every part matters; nothing left at a value that hides a mistake."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                gain = 1.0 if "norm" in name or "ln_" in name else 0.0
                is_gain = gain and name.endswith("weight")
                parameter.copy_(1 + 0.1 * noise if is_gain else 0.1 * noise)
            elif "emb" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def save_tiny(arch: str, folder: Path, seed: int = 0) -> Path:
    """A folder as from_pretrained reads it: config, tokenizer and one safetensors file."""
    lm = tiny(arch, seed)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens; any text can be encoded. With `bos`, "<s>" comes first."""
    backend = Tokenizer.from_str(_trained())
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


@cache
def _trained() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend.to_str()


# Names are seen with and without a blank in front, and often enough to become one or two tokens.
TEXT = [
    f"{name} is here. The {noun} of {name} is {other}. {other} is in the country of {name}; {name} speaks {other}."
    for name, other, noun in [
        ("France", "Paris", "capital"),
        ("Italy", "Rome", "capital"),
        ("Spain", "Madrid", "language"),
        ("Germany", "Berlin", "city"),
        ("Japan", "Tokyo", "continent"),
        ("The Eiffel Tower", "London", "city"),
        ("Mount Kenya", "Africa", "continent"),
        ("Marie Curie", "Poland", "citizen"),
    ]
    for _ in range(4)
]
