"""The eight steps of "Anatomy of an edit": their words, and their questions, answered from a run's numbers.

A question never knows its answer beforehand: `right` is computed from the tables of the run that is followed. None
says that a run is needed first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mega_core.records import Report
from mega_core.summary import HOLDS, Count, outcome, percent
from pages.components import tables
from pages.components.text import cell_name, signed


@dataclass(frozen=True, slots=True)
class Step:
    """What one step is called, says first, explains after, and which words of the glossary it uses."""

    short: str
    title: str
    intro: str
    explained: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A prediction to make. Plain text, escaped by whoever shows it."""

    text: str
    options: tuple[str, ...]
    right: int | None
    """The option that the numbers bear out; None while they aren't there."""
    why: str
    """The numbers behind it."""


STEPS = (
    Step(
        "Next word",
        "What does a model say next?",
        "A language model reads a text and gives every word piece (*token*) of its vocabulary a probability of coming "
        "next. That is all it ever does: longer answers are made one token at a time.",
        "The bars are the model's whole opinion about the next token; what is not drawn shares the rest. When one bar "
        "is near 100 %, the model is sure. Being sure is not the same as being right: a model repeats what its "
        "training text said most.",
        ("Subject", "Prompt template"),
    ),
    Step(
        "A fact",
        "A fact, and what we want instead",
        "For a model, a fact is a *subject* and a sentence that asks for its *object*. To edit the fact we name the "
        "**original object**, which the model says now, and a **new object**, which it should say instead.",
        "Probabilities of unlikely words are tiny, so they are drawn on a scale where each line is ten times the one "
        "before. Moving a word from far left to far right is what an edit must do. Distances on such a scale are "
        "counted in *nats*.",
        ("Original object", "New object", "Nat"),
    ),
    Step(
        "Edit",
        "Edit it",
        "An editing method computes a small change that makes the model say the new object. ROME, the usual one here, "
        "changes one matrix of the network: a table of numbers in the middle of one layer. The rest stays as it is, "
        "and after the run the change is taken out again.",
        "Hollow bars are the base model, filled bars the edited one. The change was computed from the edit prompt "
        "alone: it has never seen the other ways to ask, nor the other subjects, which the next step looks at.",
        ("Base model, edited model", "Run"),
    ),
    Step(
        "Did it take?",
        "Did it take, and did anything else move?",
        "A good edit passes three tests. *Efficacy*: the edit prompt itself says the new object. *Paraphrases*: other "
        "ways to ask say it too. *Neighbours*: other subjects, asked the same, keep their own answer.",
        "Each line is one prompt: hollow is before, filled is after. Right of the dashed line the new object is "
        "preferred, left of it the original. The edit prompt and its paraphrases should cross to the right; neighbours "
        "should stay left. A tick and a cross say which do as they should.",
        ("Paraphrase", "Neighbour", "Margin"),
    ),
    Step(
        "Where",
        "Where in the network does it happen?",
        "Think of the network as a corridor: a list of numbers, the *residual stream*, walks from the first layer to "
        "the last. In each layer two modules add to it. *Attention* fetches from other words of the prompt; the *MLP* "
        "adds what it has stored. For each we can measure how much it pushes toward an object: its *contribution*.",
        "Blue pushes toward the new object, orange away from it; the last two rows are the change by the edit. The "
        "triangle marks where the matrix was changed. What is written there is often read out only later, when "
        "attention fetches it to the end of the prompt: the push then shows far from the change. The map tells where "
        "the push appears; it does not prove what caused it.",
        ("Contribution", "Nat"),
    ),
    Step(
        "Layer by layer",
        "Watch the answer form",
        "What would the model say if it stopped after layer 1, 2, 3 ...? Reading the stream early like this is called "
        "the *logit lens*. It shows where along the corridor the new object overtakes the original one.",
        "Each line is an object: dashed in the base model, solid in the edited one. The upright rule marks where the "
        "new object is ahead for good. Reading middle layers like this is approximate: the network did not learn to "
        "stop there, so trust the end of the lines more than their beginning.",
        ("Nat",),
    ),
    Step(
        "Two ways",
        "The same fact, without touching a weight",
        "ROME changes *weights*, the stored numbers. MEGA leaves them alone and *steers*: while the model reads the "
        "prompt, it moves the activations, the numbers on their way. The same fact, in two ways.",
        "Both make the new object likely. What differs is the price: changed weights act on every text that comes by, "
        "steering acts only where it is switched on. Which is better depends on the fact, so look at the neighbours "
        "and don't go by the name. One fact proves nothing about a method.",
        ("Base model, edited model", "Neighbour"),
    ),
    Step(
        "When it fails",
        "When it goes wrong",
        "An edit can *leak*: the new object shows up for other subjects too. It can stay *narrow*: only the exact "
        "prompt changes. Or it can *fail*: the model goes on as before, and nothing tells you unless you look.",
        "Before you trust an edit, check:\n\n"
        "1. Does the edit prompt say the whole new object, not only its beginning?\n"
        "2. Do paraphrases, which were never used to compute the edit, follow?\n"
        "3. Do neighbours keep their answers? Look for the worst one, not at the average.\n"
        "4. Does the text still read well, a sentence later?\n"
        "5. Was the model given back as it was? The receipt of each run says so.",
        ("Works, leaks, narrow, fails",),
    ),
)


def next_token(report: Report) -> Question | None:
    """Step 1: which token leads in the base model."""
    table = tables.next_tokens(report)
    table = table[table["state"] == "before"].sort_values("prob", ascending=False)
    if len(table) < 2:
        return None
    top, second = table.iloc[0], table.iloc[1]
    offered = list(table["token"].head(3)) + list(table[table["role"] == "new"]["token"])
    options = tuple(sorted({str(token).strip() or "a blank" for token in offered}))
    leader = str(top["token"]).strip() or "a blank"
    if len(options) < 2:
        return None
    return Question(
        f"“{report.question.requests[0].prompt} …”: which word does the unedited model hold most likely?",
        options,
        options.index(leader),
        f"“{leader}” has {percent(top['prob'])}; the next one, “{str(second['token']).strip()}”, has "
        f"{percent(second['prob'])}.",
    )


def before_edit(report: Report) -> Question | None:
    """Step 2: how far apart the two objects are before the edit."""
    rows = _edit_rows(report)
    if rows is None or "p_true_before" not in rows:
        return None
    new, true = float(rows["p_new_before"]), float(rows["p_true_before"])
    request = report.question.requests[0]
    ratio = true / new if new > 0 else float("inf")
    options = (
        f"“{request.target_new}” is at least as likely",
        "Up to 10 times as likely",
        "10 to 100 times as likely",
        "More than 100 times as likely",
    )
    right = 0 if ratio <= 1 else 1 if ratio <= 10 else 2 if ratio <= 100 else 3
    times = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"
    return Question(
        f"Before any edit, how much likelier is “{request.target_true}” than “{request.target_new}”?",
        options,
        right,
        f"“{request.target_true}” has {percent(true)} and “{request.target_new}” {percent(new)}: {times} times.",
    )


def how_much_changes(report: Report, parameters: int) -> Question | None:
    """Step 3: which share of the weights the edit touches; `parameters` are the model's."""
    change = report.frames.get("weight_change")
    if change is None or parameters <= 0:
        return None
    mine = change[change["kind"] == "weights"]
    touched = int(mine["parameters"].sum())
    share = touched / parameters
    method = report.question.method.name.upper()
    options = ("None of them", "Less than 1 %", "1 % to 10 %", "More than 10 %")
    right = 0 if touched == 0 else 1 if share < 0.01 else 2 if share <= 0.1 else 3
    layers = ", ".join(str(layer) for layer in sorted(set(mine["layer"])))
    where = f" All of them are in layer {layers}." if mine["layer"].nunique() == 1 else f" They are in layers {layers}."
    return Question(
        f"The model is {parameters:,} numbers. How many of them may {method} change for this one fact?",
        options,
        right,
        f"{touched:,} of {parameters:,}: {percent(share)}.{where if touched else ''}",
    )


def how_many_follow(report: Report) -> Question | None:
    """Step 4: how many paraphrases say the new object, or, without paraphrases, how many neighbours keep theirs."""
    found = outcome(report)
    if found.paraphrases.total:
        counted, what = found.paraphrases, f"paraphrases now say “{report.question.requests[0].target_new}”"
    elif found.neighbours.total:
        counted, what = found.neighbours, "neighbours keep their answer"
    else:
        return None
    total = counted.total
    options = tuple(str(n) for n in sorted({0, total // 2, total, counted.n}))
    kept = f" Of the neighbours, {found.neighbours} kept their answer." if found.neighbours.total else ""
    return Question(
        f"The edit was computed from one sentence alone. How many of the {total} {what}?",
        options,
        options.index(str(counted.n)),
        f"{counted} do.{kept}",
    )


def where_it_grows(report: Report) -> Question | None:
    """Step 5: where the push toward the new object grows most, seen from the place of the edit."""
    cells = tables.module_cells(report)
    change = cells[(cells["candidate"] == "new") & (cells["state"] == "change")]
    if change.empty:
        return None
    best = change.loc[change["value"].idxmax()]
    layer, name = int(best["layer"]), cell_name(int(best["layer"]), str(best["module"]))
    places = tables.edited_places(report)
    new = report.question.requests[0].target_new
    why = f"{name} gains most: {signed(float(best['value']))} nats toward “{new}”."
    if places.empty:
        half = (int(change["layer"].max()) + 1) // 2
        return Question(
            f"No layer was changed. Where does the push toward “{new}” grow most?",
            (f"In layers 0 to {half - 1}", f"In layers {half} and up"),
            int(layer >= half),
            why,
        )
    first, last = int(places["layer"].min()), int(places["layer"].max())
    acts = f"layer {first}" if first == last else f"layers {first} to {last}"
    options = (f"Before {acts}", f"In {acts}, where it acts", f"After {acts}")
    return Question(
        f"The edit acts in {acts}. Where does the push toward “{new}” grow most?",
        options,
        0 if layer < first else 2 if layer > last else 1,
        why,
    )


def where_it_overtakes(report: Report, looked: Report | None) -> Question | None:
    """Step 6: where the new object overtakes the original for good; `looked` is the run with the lens."""
    scores = report.frames.get("module_scores")
    if scores is None or scores.empty or report.question.requests[0].target_true is None:
        return None
    layers = int(scores["layer"].max()) + 1
    third = max(1, layers // 3)
    options = (
        f"Early: layers 0 to {third - 1}",
        f"In the middle: layers {third} to {layers - third - 1}",
        f"Late: layers {layers - third} to {layers - 1}",
        "Never",
    )
    right, why = None, ""
    crossing = None if looked is None else looked.frames.get("lens_crossing")
    if crossing is not None:
        after = crossing[(crossing["state"] == "after") & (crossing["case"] == 0)]
        at = int(after["lasting_layer"].iloc[0]) if len(after) else -1
        right = 3 if at < 0 else 0 if at < third else 2 if at >= layers - third else 1
        why = (
            "In the edited model the new object never gets ahead for good."
            if at < 0
            else f"In the edited model the new object is ahead for good from layer {at} on (layers count from 0)."
        )
    new = report.question.requests[0].target_new
    return Question(f"In the edited model, where does “{new}” overtake for good?", options, right, why)


def which_spares_more(report: Report, other: Report | None, other_name: str) -> Question | None:
    """Step 7: which of two methods keeps more neighbours; `other` is the run by the other method."""
    mine = outcome(report).neighbours
    if not mine.total:
        return None
    name = report.question.method.name.upper()
    options = (name, other_name, "Both keep the same number")
    right, why = None, ""
    if other is not None:
        theirs = outcome(other).neighbours
        right = 2 if mine.n == theirs.n else 0 if mine.n > theirs.n else 1
        why = f"{name} keeps {mine} neighbours, {other_name} {theirs}."
    return Question("Which of the two leaves more neighbours as they were?", options, right, why)


def does_it_leak(leaking: Report | None) -> Question | None:
    """Step 8: whether the neighbours of an edit that took are safe."""
    if leaking is None:
        return None
    found = outcome(leaking)
    kept = found.neighbours
    if not kept.total:
        return None
    request = leaking.question.requests[0]
    right = 0 if kept.n == kept.total else 1 if (kept.share or 0.0) >= HOLDS else 2
    lost = Count(kept.total - kept.n, kept.total)
    return Question(
        f"“{request.prompt} …” now says “{request.target_new}” with {percent(found.prob_after)}. How many of its "
        f"{kept.total} neighbours still have their own answer?",
        ("All of them", "At least three quarters", "Fewer than three quarters"),
        right,
        f"{lost} neighbours changed. The probability of the edit itself says nothing about them.",
    )


def _edit_rows(report: Report) -> dict[str, float] | None:
    """The evidence of the edit prompt."""
    table = tables.evidence(report)
    mine = table[table["prompt_kind"] == "edit"]
    return None if mine.empty else dict(mine.iloc[0])


def answered(answers: Sequence[tuple[int, int | None]]) -> str:
    """How many of the checked answers, as (chosen, right), were right, in words."""
    checked = [(chosen, right) for chosen, right in answers if right is not None]
    hits = sum(chosen == right for chosen, right in checked)
    return f"{hits} of {len(checked)} predictions were right" if checked else "No prediction checked yet"
