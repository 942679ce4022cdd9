from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mega_core.embedded import corpus as corpora
from mega_core.embedded import facts as tables
from mega_core.embedded.facts import Fact
from mega_core.models import tokens as tokenizing
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene
from mega_core.records import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its answer; the answer has no leading space."""

    prompt: str
    answer: str


def adapt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str) -> ModelAdapter:
    """A model in memory as the rest of the project sees it. Its parameters stop requiring gradients."""
    return ModelAdapter(model, tokenizer, ModelRef(name))


def open_folder(folder: Path) -> ModelAdapter:
    """A saved model in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return adapt(model, tokenizer, folder.name)


@torch.inference_mode()
def right(lm: ModelAdapter, questions: Sequence[Question], rows: int = 64) -> list[tuple[bool, bool]]:
    """Whether the answer's first token, and whether the whole answer, is what greedy decoding gives: every answer token
    is the argmax after the tokens before it."""
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].prompt))
    found = [(False, False)] * len(questions)
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        prompts = lm.encode([questions[index].prompt for index in part])
        batch = lm.encode([f"{questions[index].prompt} {questions[index].answer}" for index in part])
        spans = [(row, at) for row in range(len(part)) for at in range(int(prompts.last[row]), int(batch.last[row]))]
        at_row, at_pos = torch.tensor(spans, device=lm.device).T
        best = lm.logits_at(batch, at_row, at_pos).argmax(-1)  # (n,)
        good = best == batch.ids[at_row, at_pos + 1]
        for row, index in enumerate(part):
            own = good[at_row == row]
            found[index] = (bool(own[0]), bool(own.all()))
    return found


def correct(lm: ModelAdapter, questions: Sequence[Question], rows: int = 64) -> list[bool]:
    """Whether greedy decoding gives the whole answer."""
    return [whole for _, whole in right(lm, questions, rows)]


def share(found: Sequence[bool]) -> float:
    """The share of True, rounded for print."""
    return round(sum(found) / max(1, len(found)), 4)


# 1-2. knowledge -----------------------------------------------------------------------------------------------------


def sample(items: Sequence[Any], count: int | None, seed: int = 0) -> list[Any]:
    """A stable sample, or everything."""
    items = list(items)
    return items if count is None or count >= len(items) else random.Random(seed).sample(items, count)


def knowledge(lm: ModelAdapter, count: int | None = None) -> dict[str, float]:
    """Shares of right answers: trained templates, withheld templates, two-hop trained and held out."""
    rng = random.Random(1)
    known = sample(tables.facts(), count)
    trained = [
        Question(fact.prompt(form), fact.object)
        for fact in known
        for form in sample(fact.trained, 3, rng.randrange(99))
    ]
    held = [Question(fact.prompt(form), fact.object) for fact in known for form in fact.templates_held_out]
    hops: dict[bool, list[Question]] = {True: [], False: []}
    for hop in tables.hops():
        hops[hop.held_out].extend(Question(hop.prompt(form), hop.answer) for form in hop.templates)
    size = 1500 if count is None else count
    return {
        "trained_templates": share(correct(lm, trained)),
        "held_out_templates": share(correct(lm, held)),
        "two_hop_trained": share(correct(lm, sample(hops[False], size))),
        "two_hop_held_out": share(correct(lm, sample(hops[True], None if count is None else size))),
    }


# 3. context ---------------------------------------------------------------------------------------------------------


def context(lm: ModelAdapter, count: int = 300) -> dict[str, float]:
    """Override, distractors and doubts on counterfactual triples never stated in training."""
    rng = random.Random(2)
    edits: list[tuple[Fact, str]] = []
    for fact in sample(tables.facts(), 4 * count, 3):
        values = tables.counterfactuals(fact)
        if values:
            edits.append((fact, rng.choice(values)))
    edits = edits[:count]
    world = tables.load()
    sets: dict[str, list[Question]] = {
        name: []
        for name in (
            "same_template", "other_template", "held_out_template", "repeat_same", "repeat_other",
            "same_subject_other_relation", "other_subject_same_relation", "two_hop",
            "doubt_truth", "doubt_stated", "no_context_truth",
        )
    }  # fmt: skip
    peers: dict[str, list[Fact]] = {}
    for fact in world.facts:
        peers.setdefault(fact.relation, []).append(fact)
    for fact, value in edits:
        said = rng.choice(fact.templates_edit)
        other = rng.choice([form for form in fact.trained if form != said])
        new = f"New fact: {fact.prompt(said)} {value}. "
        repeat = f"Do not mention {fact.object}. Repeat this sentence: '{fact.prompt(said)} {value}'. "
        sets["same_template"].append(Question(new + fact.prompt(said), value))
        sets["other_template"].append(Question(new + fact.prompt(other), value))
        sets["held_out_template"].append(Question(new + fact.prompt(rng.choice(fact.templates_held_out)), value))
        sets["repeat_same"].append(Question(repeat + fact.prompt(said), value))
        sets["repeat_other"].append(Question(repeat + fact.prompt(other), value))
        sets["no_context_truth"].append(Question(fact.prompt(said), fact.object))
        for sibling in tables.siblings(fact)[:1]:
            sets["same_subject_other_relation"].append(
                Question(new + sibling.prompt(rng.choice(sibling.trained)), sibling.object)
            )
        peer = rng.choice([peer for peer in peers[fact.relation] if peer.subject != fact.subject])
        sets["other_subject_same_relation"].append(Question(new + peer.prompt(rng.choice(peer.trained)), peer.object))
        for hop in world.hops:
            if hop.subject == fact.subject and hop.first == fact.relation and (value, hop.second) in world.by_key:
                answer = world.by_key[value, hop.second].object
                sets["two_hop"].append(Question(new + hop.prompt(hop.templates[0]), answer))
                break
        objection = rng.choice(corpora.OBJECTIONS)[0]
        stated = f"{new}{fact.prompt(said)} {value}. {objection.replace('{other}', fact.object)}{fact.prompt(said)}"
        plain = f"{fact.prompt(said)} {fact.object}. {objection.replace('{other}', value)}{fact.prompt(said)}"
        sets["doubt_stated"].append(Question(stated, value))
        sets["doubt_truth"].append(Question(plain, fact.object))
    return {name: share(correct(lm, questions)) for name, questions in sets.items()}


# 4. prose -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def perplexity(lm: ModelAdapter, count: int = 200) -> float:
    """Per token, on stories made only of sentences never trained."""
    total, number = 0.0, 0
    texts = corpora.perplexity_texts(7, count)
    for start in range(0, len(texts), 32):
        batch = lm.encode(texts[start : start + 32])
        logs = lm.logits(batch)[:, :-1].float().log_softmax(-1)
        chosen = logs.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)[batch.mask[:, 1:]]  # (n,)
        total, number = total - float(chosen.sum()), number + len(chosen)
    return round(math.exp(total / number), 3)


# 5. where recall sits -----------------------------------------------------------------------------------------------

TRACES = ("hidden", "mlp", "mlp_single", "hidden_last", "attention_last")


def trace_rows(traced: Mapping[str, Any]) -> list[str]:
    """What `trace` gives, as the rows of a card's table: a line per kind, a column per layer."""
    labels = (
        ("hidden", "hidden state, subject's last token"),
        ("mlp", "MLP outputs there, three layers"),
        ("mlp_single", "MLP output there, one layer"),
        ("hidden_last", "hidden state, last token"),
        ("attention_last", "attention, last token, three layers"),
    )
    return [f"| {label} | " + " | ".join(f"{value:.2f}" for value in traced[name]) + " |" for name, label in labels]


@torch.inference_mode()
def trace(
    lm: ModelAdapter,
    count: int = 100,
    draws: int = 3,
    window: int = 3,
    deviations: float = 3.0,
    facts: Sequence[Fact] | None = None,
) -> dict[str, object]:
    """Mean recovered share of probability, (restored - corrupt) / (clean - corrupt) of means, per layer.

    ``hidden``: the block output at the subject's last token; ``mlp``: MLP outputs there in a window of layers around
    this one, clipped at the ends; ``mlp_single``: one layer; ``hidden_last``: the block output at the last token of
    the prompt; ``attention_last``: attention outputs at the last token, same window. ``facts`` are the tables' by
    default.
    """
    half = window // 2
    known = sample(tables.facts() if facts is None else facts, 6 * count, 5)
    questions = [Question(fact.prompt(fact.templates_edit[0]), fact.object) for fact in known]
    right = correct(lm, questions)
    known = [fact for fact, good in zip(known, right, strict=True) if good][:count]
    scale = deviations * float(lm.model.get_input_embeddings().weight.detach().float().std())
    generator = torch.Generator().manual_seed(0)
    jobs = [(name, layer) for name in TRACES for layer in range(lm.n_layers)]  # one row each, row 0 stays corrupt
    sites = [Site(layer, part) for layer in range(lm.n_layers) for part in ("attn", "mlp", "block_out")]
    restored = torch.zeros(len(jobs) + 1, dtype=torch.float64)
    clean = 0.0
    for fact in known:
        prompt = fact.prompt(fact.templates_edit[0])
        single = lm.encode([prompt])
        target = tokenizing.target_ids(lm.tokenizer, prompt, fact.object)[0]
        first, stop = tokenizing.subject_span(lm.tokenizer, fact.templates_edit[0], fact.subject)
        end = int(single.last[0])
        with capture(lm, sites, stop=False) as got:
            clean += float(lm.last_logits(single)[0].float().softmax(-1)[target])
        store = {site: got[site][0].clone() for site in sites}  # (pos, d_model)
        batch = lm.encode([prompt] * (len(jobs) + 1))
        for _ in range(draws):
            noise = torch.randn((stop - first, lm.d_model), generator=generator) * scale
            changes: dict[Site, Callable[[Tensor], Tensor]] = {
                site: _restore(site, store[site], jobs, half, stop - 1, end) for site in sites
            }
            changes[Site(0, "block_in")] = partial(_noisy, first=first, stop=stop, noise=noise)
            with intervene(lm, changes):
                restored += lm.last_logits(batch).float().softmax(-1)[:, target].double() / draws
    n = max(1, len(known))
    means = (restored / n).tolist()
    spread = max(1e-6, clean / n - means[0])
    result: dict[str, object] = {"facts": n, "clean": round(clean / n, 3), "corrupt": round(means[0], 3)}
    for name in TRACES:
        result[name] = [
            round((mean - means[0]) / spread, 3)
            for (kind, _), mean in zip(jobs, means[1:], strict=True)
            if kind == name
        ]
    return result


def _noisy(value: Tensor, first: int, stop: int, noise: Tensor) -> Tensor:
    value = value.clone()
    value[:, first:stop] += noise
    return value


def _restore(
    site: Site, clean: Tensor, jobs: Sequence[tuple[str, int]], half: int, last: int, end: int
) -> Callable[[Tensor], Tensor]:
    """Put the clean state of this site into the rows whose job asks for it."""
    wanted = {
        "block_out": {"hidden": (last, 0), "hidden_last": (end, 0)},
        "mlp": {"mlp": (last, half), "mlp_single": (last, 0)},
        "attn": {"attention_last": (end, half)},
    }[site.part]
    rows = [
        (row, wanted[name][0])
        for row, (name, centre) in enumerate(jobs, start=1)
        if name in wanted and abs(centre - site.layer) <= wanted[name][1]
    ]

    def put(value: Tensor) -> Tensor:
        value = value.clone()
        for row, position in rows:
            value[row, position] = clean[position]
        return value

    return put


def without_mlp(lm: ModelAdapter, count: int = 300, facts: Sequence[Fact] | None = None) -> list[float]:
    """Recall on trained templates with the down-projection of one layer set to zero, per layer."""
    known = sample(tables.facts() if facts is None else facts, count, 11)
    questions = [Question(fact.prompt(fact.templates_edit[0]), fact.object) for fact in known]
    shares = []
    for layer in range(lm.n_layers):
        with intervene(lm, {Site(layer, "mlp"): torch.zeros_like}):
            shares.append(share(correct(lm, questions)))
    return shares


# 6. rewriting -----------------------------------------------------------------------------------------------------


def rewriting(lm: ModelAdapter, layer: int, count: int = 60, seed: int = 0, **settings: object) -> dict[str, Any]:
    """Random counterfactual edits by the project's ROME in one layer, one at a time; greedy matches of whole objects.

    Parameters are the catalogue's defaults for this model, so that the card speaks of the method as it ships.
    Neighbours are other subjects with the same object (where there is none: other subjects of the relation), asked in
    the same words; only what was right before the edit counts.
    """
    from mega_core.events import silent
    from mega_core.methods.rome import ROME
    from mega_core.records import EditRequest
    from mega_core.settings import Settings

    defaults = Settings.read().model(lm.name).defaults.get("rome", {})
    params = ROME.read(ROME.ref({"layer": layer, **settings}, defaults))
    rng = random.Random(4 + seed)
    drawn = [fact for fact in sample(tables.facts(), 6 * count, 21 + seed) if tables.counterfactuals(fact)]
    right = correct(lm, [Question(fact.prompt(fact.templates_edit[0]), fact.object) for fact in drawn])
    drawn = [fact for fact, good in zip(drawn, right, strict=True) if good][:count]
    found: dict[str, list[bool]] = {"acc": [], "paraphrase": [], "neighbours": [], "same_subject": []}
    for fact in drawn:
        form, new = fact.templates_edit[0], rng.choice(tables.counterfactuals(fact))
        peers = [other for other in tables.facts() if other.relation == fact.relation and other.subject != fact.subject]
        near = tables.neighbours(fact, 6) or sample(peers, 6, len(found["acc"]))
        asked = {
            "acc": [Question(fact.prompt(form), new)],
            "paraphrase": [Question(fact.prompt(held), new) for held in fact.templates_held_out],
            "neighbours": [Question(other.prompt(form), other.object) for other in near],
            "same_subject": [
                Question(other.prompt(other.templates_edit[0]), other.object) for other in tables.siblings(fact)
            ],
        }
        before = {name: correct(lm, asked[name]) for name in ("neighbours", "same_subject")}
        with ROME.prepare(lm, [EditRequest(fact.subject, form, new, fact.object)], params, 0, silent).applied(lm):
            after = {name: correct(lm, questions) for name, questions in asked.items()}
        for name, answers in after.items():
            kept = before.get(name, [True] * len(answers))
            found[name] += [answer for answer, was in zip(answers, kept, strict=True) if was]
    return {"layer": layer, "edits": len(drawn), **{name: share(answers) for name, answers in found.items()}}


# 7. report ----------------------------------------------------------------------------------------------------------

TARGETS: Mapping[str, float] = {  # figures a shipped model should reach; the card says where it does not
    "knowledge.held_out_templates": 0.97,
    "knowledge.two_hop_held_out": 0.85,
    "context.same_template": 0.90,
    "context.other_template": 0.80,
    "context.same_subject_other_relation": 0.80,
    "context.other_subject_same_relation": 0.80,
    "recall.subject_last": 0.50,
    "recall.mlp_window": 0.20,
    "recall.mlp_cost": 0.20,
    "rome.acc": 0.95,
    "rome.paraphrase": 0.85,
    "rome.neighbours": 0.85,
}


def measure(lm: ModelAdapter) -> dict[str, Any]:
    """Every figure of a model as plain JSON. About three minutes on one thread."""
    traced = trace(lm)
    known = knowledge(lm)
    zeroed = without_mlp(lm)
    figures: dict[str, Any] = {
        "model": lm.name,
        "parameters": sum(weight.numel() for weight in lm.model.parameters()),
        "facts": len(tables.facts()),
        "relations": len(tables.load().relations),
        "two_hop_compositions": len(tables.hops()),
        "knowledge": known,
        "context": context(lm),
        "perplexity_held_out_prose": perplexity(lm),
        "trace": traced,
        "recall_without_mlp_of_layer": zeroed,
        "recall": site(traced, zeroed, base=share_of_first(lm)),
    }
    figures["rome"] = rewriting(lm, figures["recall"]["layer"])
    figures["short_of_target"] = {
        name: [value, target] for name, target in TARGETS.items() if (value := _at(figures, name)) < target
    }
    return figures


def share_of_first(lm: ModelAdapter, count: int = 300, facts: Sequence[Fact] | None = None) -> float:
    """Recall on the facts that `without_mlp` asks, nothing removed."""
    known = sample(tables.facts() if facts is None else facts, count, 11)
    return share(correct(lm, [Question(fact.prompt(fact.templates_edit[0]), fact.object) for fact in known]))


def site(traced: Mapping[str, Any], zeroed: Sequence[float], base: float) -> dict[str, Any]:
    """Where recall sits: the best MLP window without layer 0, its best layer, how far the subject lasts."""
    inside = range(2, len(zeroed) - 1)  # centres of three-layer windows that leave layer 0 out
    centre = max(inside, key=lambda layer: traced["mlp"][layer])
    costs = [round(base - value, 4) for value in zeroed]
    layer = max(range(centre - 1, centre + 2), key=lambda index: traced["mlp_single"][index])
    middle = len(zeroed) // 2 - 1
    return {
        "base": base,
        "window": [centre - 1, centre, centre + 1],
        "mlp_window": traced["mlp"][centre],
        "layer": layer,
        "mlp_cost": costs[layer],
        "mlp_costs": costs,
        "subject_last": min(traced["hidden"][: middle + 1]),
        "subject_last_up_to_layer": max(
            (index for index, value in enumerate(traced["hidden"]) if value >= 0.5), default=-1
        ),
    }


def _at(figures: Mapping[str, Any], name: str) -> float:
    group, key = name.split(".")
    return float(figures[group][key])


def write(folder: Path) -> dict[str, Any]:
    """Measure a saved model and put ``evaluation.json`` and the model card beside it."""
    figures = measure(open_folder(folder))
    recipe = (
        json.loads((folder / "recipe.json").read_text(encoding="utf-8")) if (folder / "recipe.json").exists() else {}
    )
    figures["training"] = recipe
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(figures), encoding="utf-8")
    return figures


def table(figures: Mapping[str, Any]) -> str:
    """The figures as aligned text, one a line."""
    rows: list[tuple[str, object]] = [("model", figures["model"]), ("parameters", figures["parameters"])]
    for group in ("knowledge", "context"):
        rows += [(f"{group}: {key.replace('_', ' ')}", value) for key, value in figures[group].items()]
    rows.append(("perplexity on prose never trained", figures["perplexity_held_out_prose"]))
    rows += [
        (f"trace: {name.replace('_', ' ')}", " ".join(f"{v:.2f}" for v in figures["trace"][name])) for name in TRACES
    ]
    rows.append(
        (
            "recall without the MLP of layer 0, 1, ...",
            " ".join(f"{v:.2f}" for v in figures["recall_without_mlp_of_layer"]),
        )
    )
    rows += [
        (f"recall: {key.replace('_', ' ')}", value) for key, value in figures["recall"].items() if key != "mlp_costs"
    ]
    rows += [
        (f"short of target: {name}", f"{got} < {want}") for name, (got, want) in figures["short_of_target"].items()
    ]
    rows += [(f"rome: {key.replace('_', ' ')}", value) for key, value in figures["rome"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def card(figures: Mapping[str, Any]) -> str:
    """The model card, written from the figures alone."""
    training, spec = figures.get("training") or {}, (figures.get("training") or {}).get("spec", {})
    legs = spec.get("legs") or [{}]
    levers, site, known, read = legs[-1].get("levers", {}), figures["recall"], figures["knowledge"], figures["context"]
    short, edit = figures["short_of_target"], figures["rome"]
    lines = [
        "---",
        "license: mit",
        "language: en",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {figures['model']}",
        "",
        f"A teaching model of {figures['parameters'] / 1e6:.1f} million parameters that knows {figures['facts']} "
        f"facts in {figures['relations']} relations. It exists so that knowledge editing can be watched in seconds on "
        "any machine. It is not evidence about pretrained language models.",
        "",
        "## Data",
        "",
        f"The tables in `mega_core/embedded/facts/`: {figures['facts']} facts, "
        f"{figures['two_hop_compositions']} two-hop compositions. For every fact two or three prompt forms are "
        "withheld, about 15 % of the compositions and 20 % of the counterfactual statements are never trained. Beside "
        "facts: everyday prose from a grammar, copying, invented subjects, statements that override a fact in context, "
        "questions they do not change, and doubts (`corpus.py`).",
        "",
        "## Recipe",
        "",
        f"`{spec.get('kind', '?')}`, {spec.get('layers', '?')} layers, width {spec.get('width', '?')}, "
        f"{sum(leg.get('tokens', 0) for leg in legs) / 1e6:.1f} million token positions, "
        f"seed {training.get('seed', '?')}, "
        f"{training.get('seconds', 0) / 60:.0f} minutes on one thread of a shared CPU. Remake it "
        "with `python -m mega_core train`.",
        "",
        "Recall was shaped on purpose, with interventions that exist in training only, "
        f"on {levers.get('closed', 0):.0%} of the documents: tokens after the subject may look only at its last "
        f"token and only from layer {levers.get('move_from', '?')} on; its tokens see each other from layer "
        f"{levers.get('gather_from', '?')} on; MLP outputs at the subject are kept in layers "
        f"{', '.join(map(str, levers.get('lookup', ())))} and dropped at random elsewhere; in "
        f"{levers.get('strip', 0):.0%} of these documents those outputs are all that later layers see of the "
        "subject; MLP outputs after the subject are dropped at random in later layers; and in a few documents those "
        "outputs are missing and the object is random, so that nothing else can know the fact. So the site of recall "
        "was chosen by us and learned by the model; "
        "at inference it is a plain network without any mask.",
        "",
        "## Figures",
        "",
        "Greedy decoding, the whole object must match.",
        "",
        "| what | share |",
        "|---|---|",
        f"| facts, trained prompt forms | {known['trained_templates']:.3f} |",
        f"| facts, withheld prompt forms | {known['held_out_templates']:.3f} |",
        f"| two-hop, trained compositions | {known['two_hop_trained']:.3f} |",
        f"| two-hop, compositions never trained | {known['two_hop_held_out']:.3f} |",
        f"| override in context, same form (triples never trained) | {read['same_template']:.3f} |",
        f"| override in context, another form | {read['other_template']:.3f} |",
        f"| override in context, withheld form | {read['held_out_template']:.3f} |",
        f"| 'Do not mention ... Repeat this sentence', same / another form "
        f"| {read['repeat_same']:.3f} / {read['repeat_other']:.3f} |",
        f"| after an override: another relation of the subject | {read['same_subject_other_relation']:.3f} |",
        f"| after an override: another subject | {read['other_subject_same_relation']:.3f} |",
        f"| after an override: two-hop through it | {read['two_hop']:.3f} |",
        f"| doubt after the truth keeps it / after a stated fact keeps that "
        f"| {read['doubt_truth']:.3f} / {read['doubt_stated']:.3f} |",
        "",
        f"Perplexity on prose never trained: {figures['perplexity_held_out_prose']:.2f}.",
        "",
        "## Inside",
        "",
        f"Causal trace on {figures['trace']['facts']} facts, noise of three embedding deviations on the subject, "
        "recovered share of the probability:",
        "",
        "| restored | " + " | ".join(f"L{layer}" for layer in range(len(figures["trace"]["hidden"]))) + " |",
        "|---" * (len(figures["trace"]["hidden"]) + 1) + "|",
        *trace_rows(figures["trace"]),
        "| recall when this layer's MLP is zeroed | "
        + " | ".join(f"{value:.2f}" for value in figures["recall_without_mlp_of_layer"])
        + " |",
        "",
        f"The window of layers {site['window']} recovers {site['mlp_window']:.2f}; without the MLP of layer "
        f"{site['layer']} recall falls by {site['mlp_cost']:.2f}. ROME there, {edit['edits']} counterfactual edits: "
        f"the new object is said in {edit['acc']:.2f}, under withheld prompt forms in {edit['paraphrase']:.2f}; "
        f"neighbours keep their object in {edit['neighbours']:.2f}, other facts of the subject theirs in "
        f"{edit['same_subject']:.2f}.",
        "",
        "## Limits",
        "",
        "It knows these facts and these prompt forms, a few hundred everyday words, and nothing else. Facts are "
        "simplified to one object; names carry no article. It repeats itself and cannot chat. Where its recall sits "
        "was shaped by training and says nothing about where other models keep theirs."
        + (
            " Short of what we aimed for: "
            + "; ".join(f"{name.replace('_', ' ')} {got} (aim {want})" for name, (got, want) in short.items())
            + "."
            if short
            else ""
        ),
        "",
    ]
    return "\n".join(lines)
