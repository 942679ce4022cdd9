"""The page of a benchmark: what it shows is what was measured, and nothing in it can reach out or break out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mega_core import benchmark_report as report
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.records import MethodRef, ModelRef

SUMMARY = ["model", "method", "dataset", "protocol", "metric", "value", "n", "ci_low", "ci_high"]
RETENTION = ["method", "step", "protocol", "metric", "value", "n", "ci_low", "ci_high"]
TIMING = ["method", "seconds", "total", "edits", "refused"]
ANSWERS = [
    "method", "case", "step", "protocol", "metric", "prompt", "expected", "said", "value", "counts", "group",
]  # fmt: skip
ALARMS = ["method", "case", "step", "text"]
CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = '</td><script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)> & "quoted"'


@dataclass(frozen=True)
class Entrant:
    label: str
    method: MethodRef | None


@dataclass(frozen=True)
class Plan:
    model: ModelRef = ModelRef("atlas-gpt2")
    weights: str = "ab" * 32
    entrants: tuple[Entrant, ...] = ()
    dataset: str = "builtin"
    source: str = "builtin:reported"
    cases_digest: str = "cd" * 32
    ids: tuple[str, ...] = tuple(str(i) for i in range(40))
    edits: tuple[int, ...] = (1,) * 40
    protocols: tuple[str, ...] = ("rome", "ours")
    mode: str = "single"
    every: int = 0
    seed: int = 7


def a_plan(*labels: str, **more: Any) -> Plan:
    entrants = [Entrant(name, None if name == "unedited" else MethodRef("rome", 1, (("layer", 2),))) for name in labels]
    return Plan(entrants=tuple(entrants), **more)


def frame(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> pd.DataFrame:
    return pd.DataFrame([list(row) for row in rows], columns=list(columns))


def summary_of(rows: Sequence[tuple[str, str, str, float, int, float, float]]) -> pd.DataFrame:
    """(method, protocol, metric, value, n, low, high)."""
    return frame(SUMMARY, [("atlas-gpt2", r[0], "builtin", *r[1:]) for r in rows])


ROME_ROWS = [
    ("unedited", "rome", "S", 0.1, 40, 0.05, 0.2),
    ("rome", "rome", "S", 0.9123456, 40, 0.85, 0.96),
    ("memit", "rome", "S", 0.8811, 40, 0.8, 0.93),
    ("ft", "rome", "S", 0.41, 40, 0.3, 0.5),
    ("unedited", "rome", "ES", 0.0, 40, 0.0, 0.0876),
    ("rome", "rome", "ES", 1.0, 40, 0.91, 1.0),
    ("memit", "rome", "ES", 0.975, 40, 0.87, 0.99),
    ("ft", "rome", "ES", 0.95, 40, 0.83, 0.98),
    ("rome", "rome", "EM", -0.25, 40, -0.3, -0.125),
]
OURS_ROWS = [
    ("rome", "ours", "efficacy_forced", 0.96, 40, 0.88, 0.99),
    ("rome", "ours", "efficacy_contains", 0.6125, 40, 0.5, 0.7),
    ("rome", "ours", "efficacy_exact", 0.55, 40, 0.4, 0.66),
    ("memit", "ours", "efficacy_forced", 0.95, 40, 0.85, 0.99),
    ("memit", "ours", "efficacy_contains", 0.94, 40, 0.84, 0.98),
    ("rome", "ours", "leak", 0.333, 39, 0.2, 0.5),
    ("memit", "ours", "leak", 0.05, 39, 0.01, 0.1),
]


def page(
    plan: Plan | None = None,
    summary: pd.DataFrame | None = None,
    timing: Sequence[Sequence[object]] = (),
    retention: Sequence[Sequence[object]] = (),
    answers: Sequence[Sequence[object]] = (),
    alarms: Sequence[Sequence[object]] = (),
    **more: Any,
) -> str:
    return report.html(
        plan or a_plan("unedited", "rome", "memit", "ft"),
        summary_of([*ROME_ROWS, *OURS_ROWS]) if summary is None else summary,
        frame(TIMING, timing),
        frame(RETENTION, retention),
        frame(ANSWERS, answers),
        alarms=frame(ALARMS, alarms),
        **more,
    )


CURVES = [
    (method, step, "ours", metric, value - step / 500, step, value - 0.1, min(1.0, value + 0.05))
    for method, value in (("unedited", 0.1), ("rome", 0.9), ("memit", 0.8))
    for step in (10, 20, 40)
    for metric in ("efficacy_contains", "efficacy_forced")
] + [
    (method, step, "ours", "perplexity_ratio", 1 + step**2 / 400, step, 1.0, 1.2 + step**2 / 400)
    for method in ("rome", "memit")
    for step in (10, 20, 40)
]


def page_of(answers: Sequence[Sequence[object]], plan: Plan | None = None) -> str:
    """A page with these answers and next to no numbers."""
    return page(plan, summary_of([(m, "rome", "S", 0.5, 40, 0.4, 0.6) for m in ("rome", "memit")]), answers=answers)


def an_answer(said: str, value: float = 0.0, **more: Any) -> tuple[object, ...]:
    row = {
        "method": "rome", "case": "3", "step": 1, "protocol": "ours", "metric": "efficacy_contains",
        "prompt": "The capital of France is", "expected": "Rome", "said": said, "value": value,
        "counts": True, "group": 0,
    } | more  # fmt: skip
    return tuple(row[name] for name in ANSWERS)


default_page = cache(page)
"""Two methods apart at leaks, forced and generated, and not elsewhere."""


class Reader(HTMLParser):
    """The page as a list of elements with their attributes, its texts, and whether every element is closed."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    @property
    def all_text(self) -> str:
        """What a person reads, without the style sheet, on one line."""
        return " ".join(" ".join(text for where, text in self.texts if "style" not in where).split())


@cache
def full_page() -> str:
    return page(
        a_plan("unedited", "rome", "memit", "ft", mode="sequential", every=10),
        timing=[("rome", 0.5, 20.0, 40, 0), ("memit", 2.0, 80.0, 40, 1)],
        retention=CURVES,
        answers=[an_answer("Paris."), an_answer("Rome.", 1.0, case="4")],
        alarms=[("memit", "9", 20, "Perplexity of a fixed text: 3 before, 9 after: the model lost language.")],
        left_out=[("wise", "does not fit this model"), ("every method", "case 7", "too long")],
        problems=[("line 3", "17", "target_new: is missing.")],
        environment={"date": "2026-01-02T03:04:05+00:00", "command": ["python", "-m", "x", "--out", "a b"],
                     "small_model": True, "versions": {"torch": "2.13.0"}},
    )  # fmt: skip


def section(text: str, protocol: str) -> str:
    found = re.findall(rf'<section data-protocol="{protocol}">.*?</section>', text, re.DOTALL)
    assert len(found) == 1
    return found[0]


def cells(text: str, protocol: str) -> dict[tuple[str, str], tuple[float, str, str]]:
    """(method, column title) -> (exact value, the whole cell's text, its class), read off a protocol's table."""
    table = re.search(r'<table class="numbers">.*?</table>', section(text, protocol), re.DOTALL)
    assert table is not None
    heads = re.findall(r'<th scope="col"[^>]*><span>(.*?)</span>', table[0])
    found = {}
    for row in re.findall(r"<tr(?: class=\"base\")?><th scope=\"row\">.*?</tr>", table[0], re.DOTALL):
        name = re.search(r"<bdi>(.*?)</bdi>", row)
        assert name is not None
        for head, (attributes, inner) in zip(heads, re.findall(r"<td(.*?)>(.*?)</td>", row, re.DOTALL), strict=True):
            exact = re.search(r'<data value="(.*?)">', inner)
            if exact:
                words = " ".join(re.sub(r"<[^>]+>", " ", inner).replace("\u00a0", " ").split())
                mark = re.search(r'class="(\w+)"', attributes)
                found[name[1], head] = float(exact[1]), words, mark[1] if mark else ""
    return found


# What it shows -------------------------------------------------------------------------------------------------------


def test_every_number_of_a_table_is_the_frames() -> None:
    text = default_page()
    rows = [*ROME_ROWS, *OURS_ROWS]
    for protocol in ("rome", "ours"):
        known = PROTOCOLS[protocol]
        titles = {one.name: one.title for one in (*known.metrics, *known.derived)}
        expected = {(m, titles[metric]): (v, lo, hi) for m, p, metric, v, _, lo, hi in rows if p == protocol}
        shown = cells(text, protocol)
        assert shown.keys() == expected.keys()
        for key, (value, low, high) in expected.items():
            exact, words, _ = shown[key]
            assert exact == pytest.approx(value, rel=1e-5)
            if "magnitude" in key[1]:
                assert f"{abs(value):.3f}" in words
            else:
                assert f"{100 * value:.1f} %" in words
                assert f"{100 * low:.1f}–{100 * high:.1f}" in words


def test_the_unedited_model_stands_first_and_takes_no_mark() -> None:
    rows = [*ROME_ROWS, ("unedited", "rome", "NS", 0.99, 40, 0.95, 1.0), ("rome", "rome", "NS", 0.5, 40, 0.4, 0.6),
            ("ft", "rome", "NS", 0.1, 40, 0.0, 0.2)]  # fmt: skip
    shown = cells(page(a_plan("rome", "unedited", "memit", "ft"), summary_of(rows)), "rome")
    assert next(iter(shown))[0] == "unedited"
    assert all(mark == "" for (method, _), (*_, mark) in shown.items() if method == "unedited")
    assert shown["rome", "Neighbourhood score"][2] == "best"


def test_only_what_intervals_tell_apart_is_marked() -> None:
    shown = cells(default_page(), "rome")
    marks = {key: mark for key, (*_, mark) in shown.items()}
    assert [marks[m, "Score"] for m in ("rome", "memit", "ft")] == ["tied", "tied", ""]
    assert [marks[m, "Efficacy score"] for m in ("rome", "memit", "ft")] == ["", "", ""]  # all overlap
    ours = cells(default_page(), "ours")
    assert ours["memit", "Efficacy, generated: contains"][2] == "best"
    assert ours["memit", "Leak"][2] == "best"  # lower is better
    assert ours["rome", "Leak"][2] == ""


def test_few_cases_tell_nothing_apart() -> None:
    rows = [("rome", "rome", "S", 1.0, 4, 0.9, 1.0), ("ft", "rome", "S", 0.0, 4, 0.0, 0.1)]
    text = page(summary=summary_of(rows))
    assert all(mark == "" for *_, mark in cells(text, "rome").values())
    assert "4 cases are too few to tell methods apart" in Reader(text).all_text


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([(0.9, 0.85, 0.95), (0.5, 0.4, 0.6)], "rome is best, 90.0 % (85.0–95.0); no other interval reaches it."),
        (
            [(0.8, 0.7, 0.9), (0.7, 0.6, 0.8)],
            "rome and memit can't be told apart: 70.0 % to 80.0 %, intervals overlap.",
        ),
        ([(1.0, 1.0, 1.0), (1.0, 0.9, 1.0)], "rome and memit can't be told apart: 100.0 % each."),
        ([(0.9, 0.85, 0.95)], "rome has 90.0 % (85.0–95.0)."),
        (
            [(0.9, 0.85, 0.95), (0.8, 0.7, 0.86), (0.1, 0.0, 0.2)],
            "rome has the best number, 90.0 % (85.0–95.0); memit can't be told apart from it.",
        ),
    ],
)
def test_the_verdict_follows_the_intervals(numbers: list[tuple[float, float, float]], words: str) -> None:
    rows = [
        (method, "rome", "S", value, 40, low, high)
        for method, (value, low, high) in zip(("rome", "memit", "ft"), numbers, strict=False)
    ]
    assert words in Reader(page(summary=summary_of(rows))).all_text.replace("\u00a0", " ")


def test_cases_that_are_all_alike_are_not_certain() -> None:
    """Drawing cases anew from 8 that are all 1 gives 1 to 1; Wilson's interval of 8 of 8 begins at 0.676."""
    rows = [("rome", "rome", "S", 1.0, 8, 1.0, 1.0), ("memit", "rome", "S", 0.7, 8, 0.6, 0.8)]
    assert {mark for *_, mark in cells(page(summary=summary_of(rows)), "rome").values()} == {""}
    rows[1] = ("memit", "rome", "S", 0.5, 8, 0.4, 0.65)
    assert cells(page(summary=summary_of(rows)), "rome")["rome", "Score"][2] == "best"
    rows = [("rome", "rome", "EM", 1.0, 8, 1.0, 1.0), ("memit", "rome", "EM", 0.5, 8, 0.4, 0.6)]
    assert {mark for *_, mark in cells(page(summary=summary_of(rows)), "rome").values()} == {""}


def test_forced_far_above_the_text_is_said() -> None:
    text = Reader(default_page()).all_text.replace("\u00a0", " ")
    assert "rome : 96.0 % forced, 61.3 % in the text" in text
    assert "Teacher forcing flatters rome:" in text
    assert "memit: 95.0 % forced" not in text


def test_what_a_metric_counts_is_told() -> None:
    text = Reader(section(default_page(), "rome")).all_text
    for metric in PROTOCOLS["rome"].metrics:
        if metric.name in ("ES", "EM"):
            assert metric.formula in text
            assert f"{metric.numerator} / {metric.denominator}" in text


def test_the_head_says_what_the_numbers_are_and_how_to_repeat_them() -> None:
    text = Reader(full_page()).all_text
    for words in (
        "say nothing about large models", "python -m x --out 'a b'", "2026-01-02 03:04 UTC", "2.13.0",
        "wise does not fit this model", "every method · case 7 too long", "line 3 · 17 target_new: is missing.",
        "memit, after 20 edits Perplexity of a fixed text", "Signs of damage: memit (from 20 edits on)",
        "memit : 1 of 40", "first alarm after 20 edits", "ab" * 32, "cd" * 32,
    ):  # fmt: skip
        assert words in text, words


# Pictures ------------------------------------------------------------------------------------------------------------


def test_no_picture_shows_numbers_of_two_protocols() -> None:
    """Every protocol's numbers end in a digit of their own: a picture has only those of the protocol that it names."""
    digits = {"rome": "3", "easyedit": "5", "mega": "7", "ours": "9"}
    rows = []
    for protocol, last in digits.items():
        metrics = [one for one in PROTOCOLS[protocol].metrics if one.unit == "share"][:3]
        for i, metric in enumerate(metrics):
            value = 0.5 + 0.1 * i + int(last) / 1000
            rows += [(m, protocol, metric.name, value, 40, 0.4, 0.9) for m in ("unedited", "rome")]
    text = page(a_plan("unedited", "rome", protocols=tuple(digits)), summary_of(rows))
    figures = re.findall(r'<figure data-protocol="(\w+)">(.*?)</figure>', text, re.DOTALL)
    assert len(figures) == len(rows) / 2 + 1  # a picture per metric, and efficacy forced beside generated
    for protocol, figure in figures:
        ends = {number[-1] for number in re.findall(r"(\d+\.\d)\xa0%", figure)}
        assert ends == {digits[protocol]}
    for protocol in digits:
        assert set(re.findall(r'data-protocol="(\w+)"', section(text, protocol))) == {protocol}


def test_a_picture_tells_the_numbers_to_those_who_cannot_see_it() -> None:
    text = default_page()
    score = re.search(r"<figure[^>]*>\s*<figcaption><bdi>Score</bdi>.*?</figure>", text, re.DOTALL)
    assert score is not None
    told = re.search(r"<desc[^>]*>(.*?)</desc>", score[0])
    assert told is not None
    assert told[1].replace("\u00a0", " ") == (
        "unedited: 10.0 % (5.0–20.0), n = 40; rome: 91.2 % (85.0–96.0), n = 40; memit: 88.1 % (80.0–93.0), n = 40; "
        "ft: 41.0 % (30.0–50.0), n = 40"
    )
    elements = Reader(text).elements
    names = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(names) == len(set(names))
    for tag, attributes in elements:
        if tag == "svg" and "role" in attributes:
            assert attributes["aria-labelledby"] in names
            assert attributes["aria-describedby"] in names


def test_a_dot_stands_where_its_number_is() -> None:
    score = re.search(r"<figure[^>]*>\s*<figcaption><bdi>Score</bdi>.*?</figure>", default_page(), re.DOTALL)
    assert score is not None
    at = {
        said.split(":")[0]: float(x)
        for x, said in re.findall(r'<path transform="translate\(([\d.]+),[\d.]+\)"[^>]*><title>(.*?)</title>', score[0])
    }
    wide = (at["rome"] - at["ft"]) / (0.9123456 - 0.41)
    assert at["memit"] - at["ft"] == pytest.approx(wide * (0.8811 - 0.41), abs=0.05)
    assert at["ft"] - at["unedited"] == pytest.approx(wide * 0.31, abs=0.05)


def test_a_sequence_has_a_curve_per_method_and_its_alarm() -> None:
    text = full_page()
    figures = re.findall(r'<figure data-protocol="ours">.*?</figure>', text, re.DOTALL)
    curves = [one for one in figures if "edits so far" in one]
    assert [re.findall(r"<figcaption><bdi>(.*?)</bdi>", one)[0] for one in curves] == ["rome", "memit"] * 2
    assert ["first alarm after 20 edits" in one for one in curves] == [False, True, False, True]
    assert "82.0" in curves[0].split("</figcaption>")[0]


# Failures ------------------------------------------------------------------------------------------------------------


def test_failures_are_what_counted_and_failed() -> None:
    rows = [
        an_answer("Paris it is"),
        an_answer("Rome it is", 1.0, case="4"),
        an_answer("Lyon it is", case="5", counts=False),
        an_answer("wrong, of course", method="unedited", case="3"),
        an_answer("Oslo leaks", 1.0, case="6", metric="leak", prompt="The capital of Norway is"),
        an_answer("Oslo stays", 0.0, case="7", metric="leak", prompt="The capital of Sweden is"),
        an_answer("3 against 2 nats", -0.5, case="8", protocol="rome", metric="EM"),
        an_answer("perplexity 9 against 3", 1.0, case="9", metric="collapse", prompt="a short fixed text"),
    ]
    text = Reader(page_of(rows)).all_text
    assert "Paris it is" in text
    assert "Oslo leaks" in text
    assert "wrong, of course" in text  # beside what the edited model says
    for absent in ("Rome it is", "Lyon it is", "Oslo stays", "3 against 2 nats", "perplexity 9"):
        assert absent not in text
    assert "2 questions failed" in text


def test_a_question_that_several_metrics_failed_stands_once() -> None:
    rows = [an_answer("' Paris'", metric="efficacy_forced"), an_answer("Paris. It is", metric="efficacy_contains"),
            an_answer("Paris. It is", metric="efficacy_exact")]  # fmt: skip
    text = page_of(rows)
    assert text.count('<li><div class="kind">') == 1
    assert "Edit Anatomy: Efficacy, generated: contains · case" in text
    assert "also counted in" in text
    assert "1 question failed" in Reader(text).all_text


def test_only_the_last_checkpoint_is_read() -> None:
    rows = [an_answer("early", step=10), an_answer("late", step=20, case="2")]
    text = page_of(rows, a_plan("unedited", "rome", mode="sequential"))
    assert "late" in text
    assert "early" not in text


def test_a_page_stays_small_and_says_what_it_leaves_out() -> None:
    long = "x" * 20_000
    rows = [an_answer(f"{long} {i}", case=str(i), method=m) for m in ("rome", "memit") for i in range(300)]
    text = page_of(rows)
    assert len(text) < 500_000
    assert text.count('<li><div class="kind">') == 2 * report.READ_AT_MOST
    assert text.count("280 more failed questions of this method are not shown here; answers.parquet has them") == 2


def test_over_the_limit_fewer_failures_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [an_answer(f"{'y' * 500} {i}", case=str(i)) for i in range(30)]
    whole = page_of(rows)
    monkeypatch.setattr(report, "MAX_BYTES", len(whole.encode()) - 8_000)
    text = page_of(rows)
    assert len(text.encode()) <= report.MAX_BYTES
    assert text.count('<li><div class="kind">') == 5
    assert "25 more failed questions" in text


def test_pictures_go_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_BYTES", 40_000)
    text = page(answers=[an_answer("Paris")])
    assert len(text.encode()) <= report.MAX_BYTES
    assert "<figure" not in text
    assert "Pictures are left out" in text
    assert cells(text, "rome") == cells(default_page(), "rome")


def test_a_long_sequence_keeps_its_ends() -> None:
    rows = [("rome", step, "ours", "efficacy_contains", 0.5, step, 0.4, 0.6) for step in range(1, 1001)]
    text = page(a_plan("rome", mode="sequential"), summary_of([]), timing=[("rome", 1, 1, 1, 0)], retention=rows)
    told = re.findall(r"after (\d+): 50", text)
    assert len(set(told)) == report.DRAWN_AT_MOST
    assert {"1", "1000"} <= set(told)
    heads = re.search(r"Edits so far</th>(.*?)</tr>", text)
    assert heads is not None
    steps = re.findall(r">(\d+)<", heads[1])
    assert (len(steps), steps[0], steps[-1]) == (report.STEPS_AT_MOST, "1", "1000")


# Safety --------------------------------------------------------------------------------------------------------------


def hostile_page() -> str:
    rows = [(HOSTILE if m == "rome" else m, p, HOSTILE if k == "ES" else k, *rest) for m, p, k, *rest in ROME_ROWS]
    plan = replace(
        a_plan("unedited", HOSTILE, "memit", dataset=HOSTILE, source=HOSTILE, ids=(HOSTILE,)),
        model=ModelRef(HOSTILE, HOSTILE),
    )
    return page(
        plan,
        summary_of(rows),  # type: ignore[arg-type]
        timing=[(HOSTILE, 1.0, 2.0, 3, 1)],
        retention=[(HOSTILE, step, "ours", "efficacy_contains", 0.5, 5, 0.4, 0.6) for step in (1, 2)],
        answers=[an_answer(HOSTILE, prompt=HOSTILE, expected=HOSTILE, method=HOSTILE, case=HOSTILE)],
        alarms=[(HOSTILE, HOSTILE, 1, HOSTILE)],
        left_out=[(HOSTILE, HOSTILE)],
        problems=[(HOSTILE, HOSTILE, HOSTILE)],
        environment={"command": [HOSTILE], "date": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}},
    )


@pytest.mark.parametrize("make", [full_page, hostile_page])
def test_nothing_reaches_out_and_nothing_runs(make: Callable[[], str]) -> None:
    text = make()
    for tag, attributes in Reader(text).elements:
        assert tag not in ("script", "img", "link", "iframe", "object", "base", "image", "use", "form", "foreignobject")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "srcset", "action", "xlink:href")
            if name == "href":
                assert value is not None
                assert value.startswith("#")
            if name == "style":
                assert value is not None
                assert re.fullmatch(r"width:[\d.]+%", value)
            if name not in ("title", "content", "aria-label") and value is not None:
                assert not re.search(r"url\((?!#)", value)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_hostile_text_is_shown_as_it_is() -> None:
    text = Reader(hostile_page()).all_text
    assert text.count("<script>alert(1)</script>") > 15
    assert '& "quoted"' in text


def test_text_cannot_turn_or_hide_what_stands_around_it() -> None:
    rows = [an_answer("abc \u202e fed \u2066 \x00 \x1b[31m ok", prompt="שלום")]
    text = page_of(rows)
    assert report.visible("a\ud800\u200f b\tc\né 🙂") == "a\\ud800\\u200f b\tc\né 🙂"
    for hidden in "\u202e\u2066\x00\x1b":
        assert hidden not in text
    assert "abc \\u202e fed \\u2066 \\x00 \\x1b[31m ok" in text
    assert re.search(r'<dd dir="auto"><bdi>שלום</bdi></dd>', text)


# Edges ---------------------------------------------------------------------------------------------------------------


def test_nothing_measured_still_makes_a_page() -> None:
    text = page(a_plan("unedited", ids=(), edits=()), summary_of([]))
    assert "Nothing was measured." in Reader(text).all_text
    assert "<figure" not in text


def test_one_method_without_the_unedited_model() -> None:
    text = page(
        a_plan("rome"), summary_of([("rome", "rome", "S", 0.5, 40, 0.4, 0.6)]), timing=[("rome", 0.0, 0.0, 0, 0)]
    )
    shown = cells(text, "rome")
    assert list(shown) == [("rome", "Score")]
    assert shown["rome", "Score"][2] == ""


def test_a_protocol_that_is_not_known_is_shown_by_its_names() -> None:
    rows = [("rome", "elsewhere", "thing", 0.5, 40, 0.4, 0.6), ("rome", "elsewhere", "size", 7.25, 40, 7.0, 8.0)]
    shown = cells(page(a_plan("unedited", "rome"), summary_of(rows)), "elsewhere")
    assert shown["rome", "thing"][1].startswith("50.0 %")
    assert shown["rome", "size"][1].startswith("7.25")


def test_a_metric_without_a_number_or_an_interval() -> None:
    nan = float("nan")
    rows = [("rome", "rome", "S", 0.5, 40, nan, nan), ("memit", "rome", "S", nan, 0, nan, nan)]
    shown = cells(page(summary=summary_of(rows)), "rome")
    assert shown == {("rome", "Score"): (0.5, "50.0 %", "")}


def test_the_same_values_give_the_same_page() -> None:
    assert full_page() == full_page.__wrapped__()


@pytest.mark.e2e
@pytest.mark.skipif(not CHROMIUM.exists(), reason="chromium is not installed")
def test_the_page_fits_a_phone_and_asks_for_nothing(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    file = tmp_path / "report.html"
    file.write_text(full_page(), encoding="utf-8")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        for width, scheme, page_colour in ((390, "light", "rgb(255, 255, 255)"), (1280, "dark", "rgb(13, 19, 25)")):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
            tab = context.new_page()
            asked, said = [], []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.goto(file.as_uri())
            tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == page_colour
            wide = "[...document.querySelectorAll('figure svg')].map(one => one.getBoundingClientRect().width)"
            assert all(100 < one <= 400 for one in tab.evaluate(wide))
            assert asked == [file.as_uri()]
            assert said == []
            context.close()
        browser.close()
