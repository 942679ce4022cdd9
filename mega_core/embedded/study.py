"""Train a study model on the true facts of a dataset, so that its real records can be edited offline.

1. The facts, split into trained and withheld (`study_corpus`).
2. A small GPT-2 with a tokenizer of its own, trained by `train` with the levers of the embedded models: gathering at
   the subject's last token, lookup in layers 2-3, move from layer 4.
3. What it knows: greedy answers to trained prompts, withheld paraphrases, withheld prompts about other subjects;
   statements read in context; perplexity; where recall sits (`evaluate`).
4. The folder: model, figures, card, the trained facts (`facts.json`), the records it knows in the dataset's own schema
   (`known.json`), and a `models.toml` for MEGA_MODELS.

The numbers of such a model say nothing about large models: it was made to have facts that can be edited.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mega_core import datasets
from mega_core.datasets import counterfact, easyedit, files
from mega_core.embedded import evaluate
from mega_core.embedded import train as training
from mega_core.embedded.evaluate import Question, share
from mega_core.embedded.facts import Fact, as_json
from mega_core.embedded.study_corpus import (
    ASKED,
    FIELD,
    Asked,
    Entry,
    Study,
    StudyCorpus,
    of_cases,
    of_tables,
    tokenizer_texts,
)
from mega_core.embedded.train import LEARN, POSITIONS, SETTLE, Leg, Spec
from mega_core.errors import ActionableError, BadInput
from mega_core.folders import write_file
from mega_core.settings import CATALOGUE, read_catalogue

if TYPE_CHECKING:
    from mega_core.models.adapter import ModelAdapter

log = logging.getLogger(__name__)

VOCABULARY = 8192
"""Tokens; names are many. Fewer when the texts are few."""
TOKENS_PER_FACT = 1400
"""Positions trained per fact: some 50 documents about each (ours)."""
FEWEST_TOKENS = 600_000
"""Below that not even copying is learned (ours)."""
MOST_TOKENS = 2_000_000_000
LIKE = "atlas-gpt2"
"""The embedded model whose method defaults a study model starts from: it is built in the same way."""
DEFAULTS: Mapping[str, Mapping[str, str | int | float | bool]] = {
    "rome": {"layer": 3, "contexts": 21, "kl_weight": 0.25},
    "memit": {"contexts": 12, "kl_weight": 0.25, "mom2_weight": 20.0},
    "mega": {"target": "contexts"},
    "mean_shift": {"target": "contexts"},
    "sake": {"target": "contexts"},
}
"""Method -> parameters that measured better here than those of LIKE, on 20 records. The subject's state depends on the
noise before it, so keys are averaged over more contexts. In steering, where the model does not follow a statement in
context, "auto" asks the fact tables, which know none of these subjects, and refuses the edit."""
CARD_NOTE = "A study model: its numbers say nothing about large models."


# 1. the file ---------------------------------------------------------------------------------------------------------

READERS = {"counterfact": counterfact.case, "easyedit": easyedit.case}


def read(path: Path) -> Study:
    """The facts of a file, split. Records that can't be used are counted and left out.

    Raises BadInput when the file is missing, of another format, or has too few facts.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(FIELD, f"{path} can't be read ({error.strerror}).", "Name a file of facts or edits.") from error
    rows = list(files.rows(files.text_of(data)))
    records = [row.value for row in rows if not row.fault and isinstance(row.value, dict)]
    lost = len(rows) - len(records)
    if records and {"subject", "relation", "object", "templates"} <= set(records[0]):
        return of_tables(records, lost)
    format = datasets.sniff(data)
    if format not in READERS:
        keys = ", ".join(str(key)[:40] for key in list(records[0])[:6]) if records else "no records"
        raise BadInput(
            FIELD,
            f"{path.name} is {f'in the format {format}' if format else 'in no known format'} ({keys}).",
            "Give CounterFact (requested_rewrite ...), EasyEdit's form of it (prompt, subject, target_new, "
            "ground_truth ...) or facts (subject, relation, object, templates).",
        )
    pairs, first = [], None
    for number, record in enumerate(records, start=1):
        try:
            pairs.append((record, READERS[format](record, number)))
        except (ActionableError, RecursionError) as error:
            first, lost = first or f"record {number}: {error}", lost + 1
    if not pairs:
        raise BadInput(FIELD, f"{path.name} has no record that can be used ({first}).", "Correct the file.")
    return of_cases(format, pairs, lost)


# 2. training ---------------------------------------------------------------------------------------------------------


def spec_of(name: str, facts: int, tokens: int | None = None) -> Spec:
    """Architecture and schedule for so many facts."""
    total = max(FEWEST_TOKENS, TOKENS_PER_FACT * facts) if tokens is None else tokens
    first, second = round(0.55 * total), round(0.45 * total)
    legs = (Leg(first, round(0.95 * total), 1.5e-3, LEARN), Leg(second, second, 1.2e-3, SETTLE, ripe=True))
    return Spec(name, "gpt2", shifted=0.3, legs=legs)


def corpus_of(study: Study, seed: int, absent: float) -> StudyCorpus:
    """The documents of this study."""
    return StudyCorpus(seed, study, absent)


def fit(study: Study, folder: Path, *, device: str = "cpu", seed: int = 0, tokens: int | None = None) -> Path:
    """Train a model on the study's documents and save it in `folder`. The same seed gives the same weights on a CPU."""
    spec = spec_of(folder.name, len(study.world.facts), tokens)
    tokenizer = training.build_tokenizer(seed, VOCABULARY, tokenizer_texts(study, seed))
    return training.train_one(
        spec,
        folder.parent,
        device=device,
        seed=seed,
        tokenizer=tokenizer,
        corpus_of=partial(corpus_of, study),
    )


# 3. knowledge --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judged:
    """One prompt and the model's answer."""

    asked: Asked
    first: bool
    """The answer's first token is right."""
    whole: bool
    """The whole answer is."""


def judge(lm: ModelAdapter, study: Study) -> dict[str, Judged]:
    """Prompt -> greedy answer, for every prompt of the records whose fact was trained. Too long ones count as wrong."""
    listed = {
        asked.prompt: asked
        for entry in study.entries
        for asked in (entry.rewrite, *entry.paraphrases, *entry.neighbours, *entry.attributes)
        if study.known(asked)
    }
    texts = [f"{asked.prompt} {asked.answer}" for asked in listed.values()]
    sizes = [len(ids) for ids in lm.tokenizer(texts)["input_ids"]] if texts else []
    fits = [asked for asked, size in zip(listed.values(), sizes, strict=True) if size <= POSITIONS]
    answers = evaluate.right(lm, [Question(asked.prompt, asked.answer) for asked in fits])
    found = {prompt: Judged(asked, False, False) for prompt, asked in listed.items()}
    for asked, (first, whole) in zip(fits, answers, strict=True):
        found[asked.prompt] = Judged(asked, first, whole)
    return found


def knowledge(study: Study, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Shares of right answers, first token and whole object, and how many prompts each share is of."""
    groups: dict[str, dict[str, Judged]] = {
        name: {} for name in ("edited_prompts", "trained_prompts", "held_out_paraphrases", "held_out_neighbours")
    }
    for entry in study.entries:
        for asked in (entry.rewrite, *entry.paraphrases, *entry.neighbours, *entry.attributes):
            one = judged.get(asked.prompt)
            if one is None:
                continue
            if asked is entry.rewrite:
                groups["edited_prompts"][asked.prompt] = one
            if asked.prompt in entry.held:
                groups["held_out_paraphrases"][asked.prompt] = one
            elif study.trained(asked):
                groups["trained_prompts"][asked.prompt] = one
            elif asked in entry.neighbours or asked in entry.attributes:
                groups["held_out_neighbours"][asked.prompt] = one
    return {
        name: {
            "prompts": len(found),
            "first_token": share([one.first for one in found.values()]),
            "whole_object": share([one.whole for one in found.values()]),
        }
        for name, found in groups.items()
    }


def context(lm: ModelAdapter, study: Study, records: Sequence[Entry], count: int = 200) -> dict[str, float]:
    """What a statement does that is read in front: whole answers, on counterfactuals never stated in training.

    For records with a counterfactual: the stated object in the same words and in a withheld paraphrase; the true object
    of a prompt about another subject.
    """
    some = [entry for entry in evaluate.sample(records, None) if entry.counterfactual]
    random.Random(2).shuffle(some)
    sets: dict[str, list[Question]] = {"same_template": [], "held_out_template": [], "other_subject": []}
    for entry in some[:count]:
        new = f"New fact: {entry.rewrite.prompt} {entry.counterfactual}. "
        sets["same_template"].append(Question(new + entry.rewrite.prompt, entry.counterfactual))
        held = [asked for asked in entry.paraphrases if asked.prompt in entry.held]
        sets["held_out_template"] += [Question(new + asked.bare, entry.counterfactual) for asked in held]
        near = [asked for asked in entry.neighbours if study.known(asked)]
        sets["other_subject"] += [Question(new + asked.prompt, asked.answer) for asked in near[:1]]
    fitting = {
        name: [one for one in questions if len(lm.tokenizer(f"{one.prompt} {one.answer}")["input_ids"]) <= POSITIONS]
        for name, questions in sets.items()
    }
    return {name: share(evaluate.correct(lm, questions)) for name, questions in fitting.items() if questions}


def measure(lm: ModelAdapter, study: Study, judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Every figure of a study model as plain JSON."""
    facts = traceable(study)
    kept = [entry for entry in study.entries if keeps(entry, judged)]
    figures: dict[str, Any] = {
        "model": lm.name,
        "parameters": sum(weight.numel() for weight in lm.model.parameters()),
        "records": len(study.entries),
        "records_known": len(kept),
        "facts": len(study.world.facts),
        "relations": len(study.world.relations),
        "conflicts_dropped": study.conflicts,
        "prompts_unread": study.unread,
        "records_unusable": study.unusable,
        "knowledge": knowledge(study, judged),
        "context": context(lm, study, kept),
        "perplexity_held_out_prose": evaluate.perplexity(lm),
    }
    traced = evaluate.trace(lm, facts=facts)
    zeroed = evaluate.without_mlp(lm, facts=facts)
    figures["trace"] = traced
    figures["recall_without_mlp_of_layer"] = zeroed
    if lm.n_layers > 3:
        figures["recall"] = evaluate.site(traced, zeroed, base=evaluate.share_of_first(lm, facts=facts))
    return figures


def traceable(study: Study) -> list[Fact]:
    """The facts of the records themselves, or all of them where the file has no edits."""
    keys = dict.fromkeys(entry.rewrite.key for entry in study.entries)
    return [study.world.by_key[key] for key in keys if key in study.world.by_key]


# 4. the folder -------------------------------------------------------------------------------------------------------


def keeps(entry: Entry, judged: Mapping[str, Judged]) -> bool:
    """Whether the model knows the record: its prompt's whole answer, and the first token under what was withheld."""
    rewrite = judged.get(entry.rewrite.prompt)
    held = [judged[prompt] for prompt in entry.held if prompt in judged]
    return rewrite is not None and rewrite.whole and len(held) == len(entry.held) and all(one.first for one in held)


def known_records(study: Study, judged: Mapping[str, Judged]) -> list[dict[str, Any]]:
    """The records that the model knows, in the dataset's own schema.

    Paraphrases are the withheld ones; prompts about other subjects those that the model answers wholly.
    """

    def right(prompts: Sequence[str], entries: Sequence[Asked]) -> list[str]:
        good = {asked.prompt for asked in entries if (one := judged.get(asked.prompt)) is not None and one.whole}
        return [prompt for prompt in prompts if unicodedata.normalize("NFC", prompt).strip() in good]

    found = []
    for entry in study.entries:
        if not keeps(entry, judged):
            continue
        raw = dict(entry.raw)
        if study.schema == "counterfact":
            raw["paraphrase_prompts"] = list(entry.held)
            for name, asked in (("neighborhood_prompts", entry.neighbours), ("attribute_prompts", entry.attributes)):
                if name in raw:
                    raw[name] = right(raw[name] or [], asked)
        elif study.schema == "easyedit":
            raw["rephrase_prompt"] = list(entry.held)
            if "locality_prompt" in raw:
                near = {asked.prompt: asked.answer for asked in entry.neighbours}
                kept = right(list(near), entry.neighbours)
                raw["locality_prompt"] = kept
                raw["locality_ground_truth"] = [near[prompt] for prompt in kept]
        found.append(raw)
    return found


def model_name(folder: Path) -> str:
    """The name under which the folder's models.toml lists it."""
    return ("study-" + re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name))[:64]


def models_file(name: str, folder: Path, parameters: int, source: str) -> str:
    """The text of models.toml: an entry for MEGA_MODELS, with the method defaults of LIKE and what measured better."""
    merged: dict[str, dict[str, object]] = {
        method: dict(values) for method, values in read_catalogue(CATALOGUE)[LIKE].defaults.items()
    }
    for method, better in DEFAULTS.items():
        merged[method] = {**merged.get(method, {}), **better}
    lines = [
        f"# {CARD_NOTE} Use it with MEGA_MODELS=<this file>.",
        "",
        "[[model]]",
        f"name = {_toml(name)}",
        f"title = {_toml(f'Study model, {folder.name}')}",
        'path = "."',
        'dtype = "float32"',
        f"params = {parameters}",
        "memory_gb = 0.5",
        f"licence = {_toml(_line(f'facts: {source}', 120))}",
        'architecture = "gpt2"',
        f"note = {_toml(CARD_NOTE)}",
        "",
    ]
    for method, values in sorted(merged.items()):
        lines.append(f"[model.defaults.{method}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _toml(value: object) -> str:
    """A TOML value. JSON's text, numbers and true/false are TOML's too."""
    return json.dumps(value, ensure_ascii=False)


def _line(text: str, most: int) -> str:
    """One line without control characters."""
    return "".join(char if char.isprintable() else " " for char in text)[:most].strip()


def write(folder: Path, study: Study, *, name: str, source: str) -> dict[str, Any]:
    """Measure a saved study model and put everything else into its folder."""
    lm = evaluate.open_folder(folder)
    started = time.monotonic()
    judged = judge(lm, study)
    log.info("%d prompts answered, %.0f s", len(judged), time.monotonic() - started)
    figures = measure(lm, study, judged)
    figures["model"] = name
    recipe = folder / "recipe.json"
    figures["training"] = json.loads(recipe.read_text(encoding="utf-8")) if recipe.exists() else {}
    known = known_records(study, judged)
    _json(folder / "known.json", known)
    _json(folder / "facts.json", as_json(study.world.facts))
    _json(folder / "evaluation.json", figures)
    write_file(folder / "README.md", card(figures, study, source).encode())
    write_file(folder / "models.toml", models_file(name, folder, figures["parameters"], source).encode())
    log.info("measured in %.0f s", time.monotonic() - started)
    return figures


def _json(path: Path, value: object) -> None:
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def make(
    facts: Path,
    folder: Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    tokens: int | None = None,
    name: str = "",
    source: str = "",
    only_measure: bool = False,
) -> dict[str, Any]:
    """Train (or, with `only_measure`, take the model that is there) and write the folder; return the figures.

    Raises BadInput on a file that is missing, of another format or too small, and on a folder that can't be used.
    """
    import torch

    if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
        raise BadInput("tokens", f"{tokens} is out of range.", f"Give 1 to {MOST_TOKENS:,}.")
    name = name or model_name(folder)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise BadInput("name", f"{name[:64]!r} is not a name.", "Use letters, digits, '.', '_' and '-'.")
    folder = folder.absolute()
    ready = (folder / "config.json").is_file()
    if only_measure and not ready:
        raise BadInput("out", f"there is no model in {folder}.", "Train one first, without --evaluate.")
    if folder.exists() and not only_measure and not folder.is_dir():
        raise BadInput("out", f"{folder} is not a folder.", "Name a folder.")
    study = read(facts)
    log.info(
        "%d facts of %d subjects in %d relations, %d records; left out: %d conflicts, %d prompts, %d records",
        len(study.world.facts),
        len(study.world.by_subject),
        len(study.world.relations),
        len(study.entries),
        study.conflicts,
        study.unread,
        study.unusable,
    )
    if device == "cpu":
        torch.set_num_threads(1)  # small matrices: more threads wait for each other
    if not only_measure:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fit(study, folder, device=device, seed=seed, tokens=tokens)
        recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        recipe["facts"] = {"file": facts.name, "sha256": hashlib.sha256(facts.read_bytes()).hexdigest()}
        _json(folder / "recipe.json", recipe)
    return write(folder, study, name=name, source=source or f"{facts.name}, source and licence not given")


# 5. words ------------------------------------------------------------------------------------------------------------

_GROUPS = {
    "edited_prompts": "prompts of the records' own facts (trained)",
    "trained_prompts": "all trained prompts",
    "held_out_paraphrases": "paraphrases never trained, behind noise never trained",
    "held_out_neighbours": "prompts about other trained subjects, in a form never trained with them",
}


def table(figures: Mapping[str, Any]) -> str:
    """The figures as aligned text, one a line."""
    rows: list[tuple[str, object]] = [
        (key.replace("_", " "), figures[key])
        for key in (
            "model", "parameters", "records", "records_known", "facts", "relations", "conflicts_dropped",
            "prompts_unread",
        )
    ]  # fmt: skip
    for key, words in _GROUPS.items():
        one = figures["knowledge"][key]
        rows.append(
            (words, f"{one['first_token']:.3f} first token, {one['whole_object']:.3f} whole, n {one['prompts']}")
        )
    rows += [(f"read in context: {key.replace('_', ' ')}", value) for key, value in figures["context"].items()]
    rows.append(("perplexity on prose never trained", figures["perplexity_held_out_prose"]))
    rows += [
        (f"trace: {key.replace('_', ' ')}", " ".join(f"{value:.2f}" for value in figures["trace"][key]))
        for key in evaluate.TRACES
    ]
    rows.append(
        (
            "recall without the MLP of layer 0, 1, ...",
            " ".join(f"{value:.2f}" for value in figures["recall_without_mlp_of_layer"]),
        )
    )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def card(figures: Mapping[str, Any], study: Study, source: str) -> str:
    """The model card, written from the figures alone."""
    training_ = figures.get("training") or {}
    spec = training_.get("spec", {})
    note = f" ({training_['note']})" if training_.get("note") else ""
    known = figures["knowledge"]
    traced = figures["trace"]
    layers = range(len(traced["hidden"]))
    kept = {
        "counterfact": "`paraphrase_prompts` holds the withheld paraphrase only; `neighborhood_prompts` and "
        "`attribute_prompts` hold the prompts that the model answers.",
        "easyedit": "`rephrase_prompt` holds the withheld paraphrase only; locality prompts are those that the model "
        "answers.",
        "tables": "The facts are as they were given.",
    }[study.schema]
    lines = [
        "---",
        "language: en",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {figures['model']}",
        "",
        f"**{CARD_NOTE}** It has {figures['parameters'] / 1e6:.1f} million parameters and was trained from scratch to "
        f"know {figures['facts']} facts in {figures['relations']} relations, so that records of a benchmark can be "
        "edited on any machine.",
        "",
        "## Data",
        "",
        f"Facts: {_line(source, 500)}. {figures['records']} records; {figures['conflicts_dropped']} facts dropped "
        f"because the file gives them two objects, {figures['prompts_unread']} prompts left out because their subject "
        "was not found. Of each record one paraphrase is never trained, nor are some forms of prompts about other "
        "subjects; each record's own counterfactual is never stated. Facts that only attribute prompts ask for are "
        f"read {ASKED} times less often. Beside facts: everyday prose from a grammar, copying, invented subjects, "
        "statements that override a fact in context, questions they do not change, doubts.",
        "",
        f"`known.json`: the {figures['records_known']} records that the model knows (greedy decoding gives the whole "
        f"true object, and its first token under the withheld paraphrase), in the dataset's own schema. {kept}",
        "",
        "`facts.json`: what was trained. `models.toml`: name it in MEGA_MODELS to use the model.",
        "",
        "## Recipe",
        "",
        f"`{spec.get('kind', 'gpt2')}`, {spec.get('layers', '?')} layers, width {spec.get('width', '?')}, "
        f"{sum(leg['tokens'] for leg in spec.get('legs', ())) / 1e6:.1f} million token positions, seed "
        f"{training_.get('seed', '?')}, {training_.get('seconds', 0) / 60:.0f} minutes on "
        f"{training_.get('device', '?')}{note}. Where recall sits was shaped on purpose, with interventions "
        "that exist in training only: tokens after the subject may look only at its last token and only from layer "
        "4 on, and MLP outputs at the subject count in layers 2 and 3.",
        "",
        "## Figures",
        "",
        "Greedy decoding.",
        "",
        "| what | prompts | first token | whole object |",
        "|---|---:|---:|---:|",
        *(
            f"| {words} | {one['prompts']} | {one['first_token']:.3f} | {one['whole_object']:.3f} |"
            for words, one in ((words, known[key]) for key, words in _GROUPS.items())
        ),
        "",
        *(
            f"A statement read in front ('New fact: ...'), {key.replace('_', ' ')}: {value:.3f}.  "
            for key, value in figures["context"].items()
        ),
        f"Perplexity on prose never trained: {figures['perplexity_held_out_prose']:.2f}.",
        "",
        f"Causal trace on {traced['facts']} facts, recovered share of the probability:",
        "",
        "| restored | " + " | ".join(f"L{layer}" for layer in layers) + " |",
        "|---" * (len(layers) + 1) + "|",
        *evaluate.trace_rows(traced),
        "| recall when this layer's MLP is zeroed | "
        + " | ".join(f"{value:.2f}" for value in figures["recall_without_mlp_of_layer"])
        + " |",
        "",
        "## Limits",
        "",
        "It knows these facts and these prompt forms, a few hundred everyday words, and nothing else; the facts are as "
        "the dataset has them. It cannot chat. Methods were set for it as for the embedded models.",
        "",
    ]
    return "\n".join(lines)
