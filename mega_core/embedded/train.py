"""Train the embedded models from the fact tables: same seed, same weights, no download.

1. Tokenizer: byte-level BPE on the corpus; a word has one spelling at the start of a text, inside it and after an
   opening quote.
2. Documents (`corpus`) are packed whole into rows; attention stays inside a document, so each is read as if it stood
   alone.
3. Training-only levers on documents about one subject build recall the way large models show it (`Levers`): tokens
   after the subject may look only at its last token, and only from layer `move_from` on; tokens of the subject see
   each other only from layer `gather_from` on; MLP outputs at the subject count in the layers `lookup` and are
   dropped at random elsewhere; MLP outputs after the subject are dropped at random from `move_from` on. Nothing of
   this exists at inference: the results are plain `GPT2LMHeadModel` and `Qwen3ForCausalLM`.
4. AdamW, linear warm-up, cosine decay; the schedule counts tokens, never seconds.
5. Weights are saved as fp16 safetensors beside tokenizer, configuration, figures and model card.

Sources: the recall picture is that of Meng et al. 2022 (arXiv 2202.05262) and Geva et al. 2023 (arXiv 2304.14767).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from mega_core.embedded import corpus as corpora
from mega_core.embedded.corpus import Corpus, Document
from mega_core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).resolve().parent / "weights"
VOCABULARY = 4096  # tokens, the same tokenizer for every model
POSITIONS = 256  # tokens a model can read
CorpusOf = Callable[[int, float], Corpus]
"""Seed and share of absent facts -> documents."""
END, PAD = "<|endoftext|>", "<|pad|>"
END_ID, PAD_ID = 0, 1


@dataclass(frozen=True, slots=True)
class Levers:
    """Training-only interventions on documents about one subject; every field is a layer index or a probability."""

    closed: float = 0.85  # share of such documents the levers apply to; the rest is read without any
    gather_from: int = 1  # first layer in which tokens of the subject see each other
    move_from: int = 4  # first layer in which later tokens see the subject's last token
    lookup: tuple[int, ...] = (2, 3)  # layers whose MLP output always counts at the subject
    quiet: float = 0.8  # chance, per document and layer, that another layer's MLP output at the subject is dropped
    after: float = 0.4  # chance that MLP outputs after the subject are dropped from `move_from` on
    strip: float = 0.8  # chance that before `move_from` the subject's last token keeps only its `lookup` MLP outputs
    noise: float = 3.0  # three in ten of those get noise of so many embedding deviations on top
    elsewhere: float = 0.5  # how much of `quiet` and `strip` applies to subjects in documents about more than one fact
    absent: float = 0.0  # share of facts read with `lookup` silenced and a random object: without it nothing is known


@dataclass(frozen=True, slots=True)
class Leg:
    """One stretch of training with its own optimizer; between legs the weights are rounded to fp16, as when saved."""

    tokens: int  # positions trained, padding included
    horizon: int  # positions of the whole learning-rate schedule, of which the leg may see only the beginning
    peak: float  # learning rate
    levers: Levers
    ripe: bool = False  # True: the corpus is mixed as at the end of training from the start


@dataclass(frozen=True, slots=True)
class Spec:
    """One embedded model: architecture, size and schedule."""

    name: str
    kind: str  # "gpt2" or "qwen3"
    layers: int = 8
    width: int = 192
    heads: int = 6
    kv_heads: int = 6
    mlp: int = 768  # inner width
    rows: int = 6  # rows a step
    row: int = 96  # tokens a row
    decay: float = 0.05  # weight decay of matrices
    shifted: float = 0.5  # share of documents that start at a random position, so that every position is trained
    legs: tuple[Leg, ...] = ()

    @property
    def tokens(self) -> int:
        """Positions trained in all legs."""
        return sum(leg.tokens for leg in self.legs)

    def scaled(self, tokens: int) -> Spec:
        """The same recipe in about so many tokens, for a trial."""
        by = tokens / self.tokens
        legs = (replace(leg, tokens=round(by * leg.tokens), horizon=round(by * leg.horizon)) for leg in self.legs)
        return replace(self, legs=tuple(legs))


LEARN, SETTLE = Levers(), Levers(strip=0.9, absent=0.08)
MODELS: dict[str, Spec] = {
    "atlas-gpt2": Spec(
        "atlas-gpt2",
        "gpt2",
        shifted=0.3,
        legs=(Leg(5_596_416, 9_500_000, 1.5e-3, LEARN), Leg(4_400_000, 4_400_000, 1.2e-3, SETTLE, ripe=True)),
    ),
    "atlas-qwen3": Spec(
        "atlas-qwen3",
        "qwen3",
        kv_heads=2,
        mlp=576,
        legs=(Leg(5_999_616, 11_000_000, 1.5e-3, LEARN), Leg(4_000_000, 4_000_000, 9e-4, SETTLE, ripe=True)),
    ),
}


# 1. tokenizer -------------------------------------------------------------------------------------------------------


def build_tokenizer(
    seed: int = 0, size: int = VOCABULARY, texts: Iterable[str] | None = None
) -> PreTrainedTokenizerFast:
    """A `PreTrainedTokenizerFast` trained on these texts (the corpus' own by default). Takes about two seconds."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" ['\"(]|\n"), "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpora.tokenizer_texts(seed) if texts is None else texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def waves(positions: int, width: int, amplitude: float) -> Tensor:
    """Sinusoids of Vaswani et al. 2017 as a starting point of learned positions, (pos, width)."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(positions)[:, None] * rates
    return amplitude * torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def build_model(spec: Spec, seed: int, vocabulary: int = VOCABULARY) -> Any:
    """A freshly initialised model; the global random state is left as it was."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    ids: dict[str, Any] = {
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.kind == "gpt2":
            config = GPT2Config(
                vocab_size=vocabulary,
                n_positions=POSITIONS,
                n_embd=spec.width,
                n_layer=spec.layers,
                n_head=spec.heads,
                n_inner=spec.mlp,
                activation_function="gelu_pytorch_tanh",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **ids,
            )
            model = GPT2LMHeadModel(config)
            # With waves "the token before" is the same rotation everywhere: one head learns it for all positions.
            model.transformer.wpe.weight.data.copy_(waves(POSITIONS, spec.width, amplitude=0.05))
            return model
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=vocabulary,
                hidden_size=spec.width,
                intermediate_size=spec.mlp,
                num_hidden_layers=spec.layers,
                num_attention_heads=spec.heads,
                num_key_value_heads=spec.kv_heads,
                head_dim=spec.width // spec.heads,
                max_position_embeddings=POSITIONS,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                **ids,
            )
        )


# 2. batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed documents. ``doc`` is -1 on padding; ``part`` is 0 outside closed documents, in them 1 before the subject,
    2 inside it, 3 on its last token, 4 after it."""

    ids: Tensor  # (row, pos) int64
    positions: Tensor  # (row, pos) int64
    doc: Tensor  # (row, pos) int64
    part: Tensor  # (row, pos) int64
    mention: Tensor  # (row, pos) int64, 0 or the number of the mention whose tokens must not see each other early
    weight: Tensor  # (row, pos) float32, loss weight of the *next* token
    keep: Tensor  # (layer, row, pos) bool, False where an MLP output is dropped
    strip: Tensor  # (row, pos) float32, 1 where only MLP outputs of `lookup` are kept
    noise: Tensor  # (row, pos) float32, standard deviations of noise added there


@dataclass(frozen=True, slots=True)
class _Encoded:
    ids: list[int]
    weights: list[float]  # of each token as a target
    mentions: list[tuple[int, int]]  # (first, last) token of each known subject
    single: bool
    kind: str


def _encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[_Encoded]:
    """Tokens with weights: a token weighs what its last character weighs."""
    encoded = []
    encodings = tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])
    for document, encoding in zip(documents, encodings, strict=True):
        weights, at = [], 0
        stops = [stop for _, stop in encoding.offsets]
        for stop in stops:
            while at + 1 < len(document.spans) and document.spans[at][1] < stop:
                at += 1
            weights.append(document.spans[at][2])
        mentions = []
        for start, end in document.mentions:
            inside = [index for index, stop in enumerate(stops) if start < stop <= end]
            mentions.append((inside[0], inside[-1]))
        ids, weights = [*encoding.ids, END_ID], [*weights, document.end_weight]
        encoded.append(_Encoded(ids, weights, mentions, document.single, document.kind))
    return encoded


def built_in(seed: int, absent: float) -> Corpus:
    """The documents of the fact tables."""
    return Corpus(seed, absent=absent)


def batches(
    spec: Spec, leg: Leg, tokenizer: PreTrainedTokenizerFast, seed: int, corpus_of: CorpusOf = built_in
) -> Iterator[Batch]:
    """All batches of a leg; everything in them follows from the seed."""
    corpus, rng = corpus_of(seed, leg.levers.absent), random.Random(seed + 1)
    pending: list[_Encoded] = []
    steps, horizon = (max(1, tokens // (spec.rows * spec.row)) for tokens in (leg.tokens, leg.horizon))
    for step in range(steps):
        room = [spec.row] * spec.rows
        rows: list[list[_Encoded]] = [[] for _ in range(spec.rows)]
        missed: list[_Encoded] = []
        while len(missed) < 24:
            if not pending:
                progress = 1.0 if leg.ripe else step / horizon
                pending = _encode([corpus.draw(progress) for _ in range(96)], tokenizer)
                pending.reverse()
            document = pending.pop()
            if len(document.ids) > spec.row:
                continue
            fits = next((index for index, free in enumerate(room) if free >= len(document.ids)), None)
            if fits is None:
                missed.append(document)
                continue
            rows[fits].append(document)
            room[fits] -= len(document.ids)
        pending.extend(reversed(missed))
        yield _assemble(rows, spec, leg.levers, rng)


def _assemble(rows: list[list[_Encoded]], spec: Spec, levers: Levers, rng: random.Random) -> Batch:
    shape = (spec.rows, spec.row)
    ids = torch.full(shape, PAD_ID)
    positions, part, mention = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    doc, weight = torch.full(shape, -1), torch.zeros(shape)
    keep = torch.ones((spec.layers, *shape), dtype=torch.bool)
    strip, noise = torch.zeros(shape), torch.zeros(shape)
    for index, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row):
            size = len(document.ids)
            here = slice(at, at + size)
            ids[index, here] = torch.tensor(document.ids)
            weight[index, at : at + size - 1] = torch.tensor(document.weights[1:])
            doc[index, here] = number
            shift = rng.randrange(POSITIONS - size) if rng.random() < spec.shifted else 0
            positions[index, here] = torch.arange(shift, shift + size)
            share = 1.0 if document.single else levers.elsewhere
            closed = rng.random() < levers.closed and document.kind != "absent"
            if document.kind == "absent":  # open attention, everything else on: no other way to the object may work
                start, stop = document.mentions[0]
                reach = here if rng.random() < 0.5 else slice(at + start, at + stop + 1)
                silent = levers.lookup if rng.random() < 0.5 else (rng.choice(levers.lookup),)
                for layer in silent:
                    keep[layer, index, reach] = False
            for count, (start, stop) in enumerate(document.mentions if closed else (), start=1):
                first, last = at + start, at + stop
                mention[index, first : last + 1] = count
                for layer in range(spec.layers):
                    if layer not in levers.lookup and rng.random() < levers.quiet * share:
                        keep[layer, index, first : last + 1] = False
                if rng.random() < levers.strip * share:
                    strip[index, last] = 1.0
                    noise[index, last] = levers.noise if rng.random() < 0.3 else 0.0
            if document.single and closed:
                part[index, here] = 1
                part[index, first:last] = 2
                part[index, last] = 3
                part[index, last + 1 : at + size] = 4
                if document.kind == "fact" and rng.random() < levers.after:
                    keep[levers.move_from :, index, last + 1 : at + size] = False
            at += size
    return Batch(ids, positions, doc, part, mention, weight, keep, strip, noise)


def attention_masks(batch: Batch, layers: int, levers: Levers) -> list[Tensor]:
    """Per layer, (row, 1, query, key) bool: who may look at whom."""
    size = batch.ids.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=batch.ids.device).tril()
    own = torch.eye(size, dtype=torch.bool, device=batch.ids.device)
    same = (batch.doc[:, :, None] == batch.doc[:, None, :]) & causal  # (row, query, key)
    after, inner, last = batch.part[:, :, None] == 4, batch.part[:, None, :] == 2, batch.part[:, None, :] == 3
    within = (batch.mention[:, :, None] == batch.mention[:, None, :]) & (batch.mention[:, :, None] > 0)
    base = same & ~(after & inner)  # later tokens never see the inner tokens of a subject
    early = base & ~(after & last)  # nor, before `move_from`, its last one
    first = early & ~(within & ~own)  # nor, before `gather_from`, do the tokens of a subject see each other
    return [
        (first if layer < levers.gather_from else early if layer < levers.move_from else base)[:, None]
        for layer in range(layers)
    ]


# 3. levers ----------------------------------------------------------------------------------------------------------


def blocks(model: Any) -> Any:
    """The transformer blocks of either architecture."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def attention(block: Any) -> Any:
    """The attention module of a block."""
    return block.attn if hasattr(block, "attn") else block.self_attn


@contextmanager
def levers_on(model: Any, batch: Batch, levers: Levers, generator: torch.Generator) -> Iterator[None]:
    """Hold the levers for one forward pass: these hooks change what the model is taught, not what it is."""
    stack = list(blocks(model))
    masks, lookup, moved = attention_masks(batch, len(stack), levers), levers.lookup, levers.move_from
    row, position = batch.strip.nonzero(as_tuple=True)
    held: list[Tensor] = []  # MLP outputs of the lookup layers at the stripped tokens, (n, width)

    def mask(layer: int) -> Callable[..., Any]:
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": masks[layer]})

    def drop(layer: int) -> Callable[..., Any]:
        kept = batch.keep[layer, :, :, None]
        return lambda module, args, output: output * kept

    def remember(module: torch.nn.Module, args: Any, output: Tensor) -> None:
        held.append(output[row, position])

    def remove(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        scale = model.get_input_embeddings().weight.detach().std() * batch.noise[row, position, None]
        fog = torch.randn((len(row), hidden.shape[-1]), generator=generator).to(hidden.device) * scale
        kept = torch.stack(held).sum(0) + fog
        hidden = hidden.index_put((row, position), kept.to(hidden.dtype))
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    with ExitStack() as handles:
        for layer, block in enumerate(stack):
            handles.callback(attention(block).register_forward_pre_hook(mask(layer), with_kwargs=True).remove)
            if not bool(batch.keep[layer].all()):
                handles.callback(block.mlp.register_forward_hook(drop(layer)).remove)
            if layer in lookup and len(row):
                handles.callback(block.mlp.register_forward_hook(remember).remove)
        if len(row):
            handles.callback(stack[moved].register_forward_pre_hook(remove, with_kwargs=True).remove)
        yield


def loss_of(model: Any, batch: Batch, levers: Levers, generator: torch.Generator) -> Tensor:
    """Weighted next-token loss; logits are made only where the weight is not 0."""
    size = batch.ids.shape[1]
    causal = torch.ones(1, 1, size, size, dtype=torch.bool, device=batch.ids.device).tril()
    body = model.base_model
    with levers_on(model, batch, levers, generator):
        hidden = body(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=causal.expand(batch.ids.shape[0], 1, size, size),
            use_cache=False,
        ).last_hidden_state  # (row, pos, width)
    at = (batch.weight > 0).flatten().nonzero().squeeze(1)
    logits = model.lm_head(hidden.flatten(0, 1)[at])
    target = batch.ids.flatten().roll(-1)[at]
    weight = batch.weight.flatten()[at]
    return (functional.cross_entropy(logits.float(), target, reduction="none") * weight).sum() / weight.sum()


# 4. optimisation ----------------------------------------------------------------------------------------------------


def rate(step: int, steps: int, peak: float) -> float:
    """3 % linear warm-up, then a cosine down to 2 % of the peak."""
    warm = max(1, round(0.03 * steps))
    if step < warm:
        return peak * (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * along)))


def train_one(
    spec: Spec,
    out: Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    corpus_of: CorpusOf = built_in,
    resume: tuple[int, Path] | None = None,
    watch: Callable[[Any, PreTrainedTokenizerFast, int], None] | None = None,
    watch_every: int = 0,
) -> Path:
    """Train one model and save it under ``out / spec.name``.

    ``resume`` is (index of a leg, folder of the model as the leg before left it). ``watch(model, tokenizer, tokens)``
    is called every so many tokens of a leg. ``tokenizer`` and ``corpus_of`` (seed, share of absent facts -> documents)
    are those of the fact tables by default.
    """
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    first, model = 0, build_model(spec, seed, len(tokenizer))
    if resume is not None:
        from transformers import AutoModelForCausalLM

        first = resume[0]
        model = AutoModelForCausalLM.from_pretrained(resume[1], dtype=torch.float32, use_safetensors=True)
    model.to(device).train()
    started = time.monotonic()
    for number, leg in list(enumerate(spec.legs))[first:]:
        _run_leg(model, tokenizer, spec, leg, device, seed + 1000 * number, watch, watch_every, corpus_of)
        for weight in model.parameters():
            weight.data = weight.data.half().float()
    folder = save(model.eval(), tokenizer, out / spec.name)
    recipe = {"spec": asdict(spec), "seed": seed, "device": device, "seconds": round(time.monotonic() - started)}
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return folder


def _run_leg(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    spec: Spec,
    leg: Leg,
    device: str,
    seed: int,
    watch: Callable[[Any, PreTrainedTokenizerFast, int], None] | None,
    watch_every: int,
    corpus_of: CorpusOf = built_in,
) -> None:
    """One optimizer over the batches of one leg."""
    generator = torch.Generator().manual_seed(seed + 2)
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": spec.decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=leg.peak, betas=(0.9, 0.98), fused=True)
    steps = max(1, leg.horizon // (spec.rows * spec.row))
    started, mean = time.monotonic(), float("nan")
    for step, batch in enumerate(batches(spec, leg, tokenizer, seed, corpus_of)):
        if device != "cpu":
            batch = Batch(*(getattr(batch, name).to(device) for name in Batch.__slots__))
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, leg.peak)
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
            loss = loss_of(model, batch, leg.levers, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = (step + 1) * spec.rows * spec.row
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        if step % 200 == 0:
            log.info(
                "%s %d of %d tokens, loss %.3f, %.0f s", spec.name, tokens, leg.tokens, mean, time.monotonic() - started
            )
        if watch is not None and watch_every and (step + 1) % max(1, watch_every // (spec.rows * spec.row)) == 0:
            model.eval()
            watch(model, tokenizer, tokens)
            model.train()


# 5. files -----------------------------------------------------------------------------------------------------------


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """fp16 safetensors, configuration and tokenizer: what `AutoModelForCausalLM` and `AutoTokenizer` load offline."""
    import copy

    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).to("cpu", torch.float16)
    half.generation_config.max_new_tokens = 40
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _worker(spec: Spec, out: str, device: str, seed: int, evaluate: bool) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    train_one(spec, Path(out), device=device, seed=seed)
    if evaluate:
        from mega_core.embedded import evaluate as evaluation

        evaluation.write(Path(out) / spec.name)


def train(
    names: Sequence[str] | None = None,
    out: Path | str = WEIGHTS,
    device: str = "cpu",
    *,
    seed: int = 0,
    tokens: int | None = None,
    evaluate: bool = True,
) -> list[Path]:
    """Train the named models (all by default) in parallel, one process and one thread each; return their folders."""
    specs = [find(name) for name in (names or MODELS)]
    if tokens is not None:
        specs = [spec.scaled(tokens) for spec in specs]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_worker, args=(spec, str(out), device, seed, evaluate), name=spec.name) for spec in specs
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [worker.name for worker in workers if worker.exitcode]
    if failed:
        raise RuntimeError(f"training of {', '.join(failed)} failed; its log says why")
    return [Path(out) / spec.name for spec in specs]


def find(name: str) -> Spec:
    """The specification of an embedded model."""
    try:
        return MODELS[name]
    except KeyError:
        raise KeyError(f"no embedded model {name!r}; known: {', '.join(MODELS)}") from None


# 6. command line ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m mega_core train``."""
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="train this model only (repeatable)")
    parser.add_argument(
        "--facts",
        type=Path,
        metavar="FILE",
        help="train a study model on the true facts of this file instead: CounterFact (full or EasyEdit's flat form), "
        "or facts with their templates",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder that gets one folder per model (default: where they ship); with --facts the model's own folder",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default, one thread per model) or cuda")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and corpus")
    parser.add_argument(
        "--tokens", type=int, default=None, help="token positions to train, instead of the full schedule"
    )
    parser.add_argument("--name", default="", help="with --facts: the model's name (default: study- and the folder's)")
    parser.add_argument(
        "--source",
        default="",
        metavar="TEXT",
        help="with --facts: where they come from and their licence, for the card",
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="only measure the models in --out and rewrite their cards"
    )


def run(args: argparse.Namespace) -> int:
    """Train or measure, then print the figures. Raises BadInput where options don't go together."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.facts is not None:
        return _study(args)
    for option in ("name", "source"):
        if getattr(args, option):
            raise BadInput(option, "goes with --facts.", "Leave it out, or name a file of facts.")
    from mega_core.embedded import evaluate as evaluation

    names = args.model or list(MODELS)
    out = args.out or WEIGHTS
    if args.evaluate:
        results = [evaluation.write(out / name) for name in names]
    else:
        folders = train(names, out, args.device, seed=args.seed, tokens=args.tokens)
        results = [json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) for folder in folders]
    for figures in results:
        sys.stdout.write(evaluation.table(figures) + "\n\n")
    return 0


def _study(args: argparse.Namespace) -> int:
    from mega_core.embedded import study

    if args.model:
        raise BadInput("model", "names an embedded model; --facts makes another one.", "Leave out one of the two.")
    if args.out is None:
        raise BadInput("out", "is missing.", "Name the folder of the model: --out DIR.")
    figures = study.make(
        args.facts,
        args.out,
        device=args.device,
        seed=args.seed,
        tokens=args.tokens,
        name=args.name,
        source=args.source,
        only_measure=args.evaluate,
    )
    sys.stdout.write(study.table(figures) + "\n")
    sys.stdout.write(f"Use it: MEGA_MODELS={args.out / 'models.toml'}, model {figures['model']}\n")
    return 0
