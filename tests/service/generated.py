"""Reports made by chance: every contract of frames.py, texts that are hostile, numbers at the edges."""

from __future__ import annotations

import random
from typing import Any

from mega_core import frames
from mega_core.records import EditRequest, Inspection, MethodRef, ModelRef, Receipt, Report

HOSTILE = (
    "Paris", " Rome", "", "=HYPERLINK(\"http://evil.example\")", "<script>alert(1)</script>", "]]>--><img src=x>",
    "Zürich 東京 🙂 e\u0301", "\u202eright to left", "line\nbreak\ttab\r", "\x00\x07", "NaN", "null", "1e999", "'\"\\/",
    "{{ 7 * 7 }}{% raw %}", "a" * 600, "\ufeff", "\ud83d\ude42".encode("utf-16", "surrogatepass").decode("utf-16"),
    "Infinity", "@SUM(A1)", "\u2028", "+1", "-1",
)  # fmt: skip
NUMBERS = (0.0, -0.0, 1.0, -1.5, 1e-308, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, 1 / 3, float("inf"), float("-inf"))
WORDS = {"state": ("before", "after"), "candidate": ("new", "true"), "prompt_kind": ("paraphrase", "neighbourhood")}
RANGES = {"case": (0, 0), "layer": (-1, 60), "head": (-1, 30), "position": (-1, 200)}


def report(seed: int) -> Report:
    """A report of chance; its first edit is answered, as every report's is."""
    rng = random.Random(seed)
    request = EditRequest(
        rng.choice(("Eiffel Tower", "Zürich 🙂", "<b>x</b>", "=1+1", "東京")),
        rng.choice(("{} is in", "In {} they say", "{} $\\frac{1}{2}$ :red[x]")),
        "Rome",
        rng.choice(("Paris", None, "![x](http://evil.example/a.png)")),
        tuple(f"paraphrase {i} {rng.random()}" for i in range(rng.randrange(3))),
        tuple(f"line\nneighbour {i}" for i in range(rng.randrange(3))),
    )
    params = (("text", rng.choice(HOSTILE)), ("none", None), ("flag", rng.random() < 0.5), ("number", rng.random()),
              ("whole", rng.randrange(-5, 5)))  # fmt: skip
    question = Inspection(
        ModelRef("atlas-gpt2", rng.choice(("", "main")), "float32"),
        MethodRef("rome", rng.randrange(9), params),
        (request,),
        tuple(rng.sample(("module_scores", "lens?top=3", "heads"), rng.randrange(4))),
        rng.randrange(2**31),
    )
    names = sorted(frames.CONTRACTS)
    chosen = {*rng.sample(names, rng.randrange(4)), names[seed % len(names)]}
    made = {name: _frame(name, rng) for name in chosen}
    made["answers"] = _answers(request, rng)
    digest = f"{rng.getrandbits(256):064x}"
    return Report(
        question, digest, f"{rng.getrandbits(256):064x}", made,
        Receipt(rng.random() < 0.5, "a" * 64, "b" * 64, rng.randrange(3)),
        {stage: rng.random() for stage in ("before", "edit", rng.choice(("after", "Zürich")))},
        tuple(rng.choice(HOSTILE) for _ in range(rng.randrange(3))),
        {"torch": "2.13", "device": rng.choice(HOSTILE[:10])},
    )  # fmt: skip


def _answers(request: EditRequest, rng: random.Random) -> Any:
    prompts = [("edit", request.prompt)]
    prompts += [("paraphrase", p) for p in request.paraphrases] + [("neighbourhood", p) for p in request.neighbours]
    rows = [
        {
            "state": state, "case": 0, "prompt_kind": kind, "prompt": prompt, "candidate": candidate,
            **_values("answers", rng),
        }
        for kind, prompt in prompts
        for state in ("before", "after")
        for candidate in (("new", "true") if request.target_true else ("new",))
    ]  # fmt: skip
    return frames.from_rows(rows, "answers")


def _values(name: str, rng: random.Random) -> dict[str, Any]:
    return {column: _cell(column, kind, rng) for column, kind in frames.CONTRACTS[name].values.items()}


def _frame(name: str, rng: random.Random) -> Any:
    contract = frames.CONTRACTS[name]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for _ in range(rng.choice((0, 1, 5, 12))):
        row = {column: _cell(column, kind, rng) for column, kind in contract.columns.items()}
        rows[tuple(row[column] for column in contract.keys)] = row
    return frames.from_rows(list(rows.values()), name)


def _cell(column: str, kind: str, rng: random.Random) -> Any:
    if kind == "text":
        return rng.choice(WORDS.get(column, HOSTILE))
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "float":
        return rng.choice((*NUMBERS, rng.random(), rng.gauss(0, 5)))
    low, high = RANGES.get(column, (-(2**63), 2**63 - 1))
    return rng.randint(low, high)
