from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mega_core import frames
from mega_core.attribution import attention_drift, look_at, read_view
from mega_core.attribution.attention_drift import failures, link, over_attention, segments, subject_in
from mega_core.changes import PromptPrefix
from mega_core.evaluation import looks
from mega_core.events import silent
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene
from mega_core.records import EditRequest

FRANCE = EditRequest(
    "France", "The capital of {} is", "Rome", "Paris",
    neighbours=("The capital of Italy is", "Here they speak", "Germany and its city", "The capital of Japan is"),
)  # fmt: skip
TOWER = EditRequest(
    "Eiffel Tower", "{} is in the city of", "London", "Paris", neighbours=("Big Ben is in the city of",)
)
SHORT = EditRequest("Italy", "{}", "Tokyo")
REQUESTS = (FRANCE, TOWER, SHORT)
KEYS = ["case", "prompt_kind", "prompt", "layer", "head"]


def look(lm: ModelAdapter, requests=REQUESTS, view: str = "attention", state: str = "before") -> pd.DataFrame:
    (found,) = look_at(lm, [read_view(view)], requests, state, silent).values()
    return found["attention"]


@pytest.mark.parametrize(
    ("length", "span", "labels"),
    [
        (5, (1, 3), "first subject subject between last"),
        (5, (0, 3), "first subject subject between last"),
        (4, (0, 1), "subject between between last"),
        (4, (2, 4), "first between subject last"),
        (4, None, "first between between last"),
        (1, (0, 1), "last"),
        (2, (0, 2), "first last"),
    ],
)
def test_every_token_has_one_segment(length: int, span, labels: str) -> None:
    assert segments(length, span) == labels.split()


def test_masses_are_sums_of_the_models_weights(lm: ModelAdapter) -> None:
    found = look(lm)
    kinds = {request.prompt: (request.template, request.subject) for request in REQUESTS}
    kinds |= {"The capital of Italy is": ("The capital of {} is", "Italy"), "Here they speak": None}
    kinds |= {"Germany and its city": ("{} and its city", "Germany"), "Big Ben is in the city of": (
        "{} is in the city of", "Big Ben")}  # fmt: skip
    kinds |= {"The capital of Japan is": ("The capital of {} is", "Japan")}
    assert set(found["prompt"]) == set(kinds)
    for (_, _, prompt), rows in found.groupby(["case", "prompt_kind", "prompt"]):
        sites = [Site(layer, "pattern") for layer in range(lm.n_layers)]
        with torch.no_grad(), capture(lm, sites) as got:
            lm.forward(lm.encode([prompt]))
        about = kinds[prompt]
        span = tokens.subject_span(lm.tokenizer, *about) if about else None
        names = [name for name in attention_drift.SEGMENTS if about or name != "subject"]
        assert list(rows["segment"]) == names * (lm.n_layers * lm.n_heads)
        expected = []
        for site in sites:
            weights = got[site][0, :, -1].tolist()  # [head][pos]
            labels = segments(len(weights[0]), span)
            for row in weights:
                expected += [sum(w for w, label in zip(row, labels, strict=True) if label == name) for name in names]
        np.testing.assert_allclose(rows["mass"], expected, atol=1e-5)
    assert (found.loc[found["segment"] == "context", "mass"] == 0).all()
    np.testing.assert_allclose(found.groupby(KEYS)["mass"].sum(), 1, atol=1e-9)


def test_behind_a_text_the_rest_is_context(lm: ModelAdapter) -> None:
    plain, front = look(lm), "Tokyo is in the country of Japan. "
    with PromptPrefix(front).applied(lm):
        found = look(lm)
    assert found[[*KEYS, "segment"]].equals(plain[[*KEYS, "segment"]])
    np.testing.assert_allclose(found.groupby(KEYS)["mass"].sum(), 1, atol=1e-9)
    shared = 0
    for prompt, rows in found[found["segment"] == "context"].groupby("prompt", sort=False):
        ids, places = tokens.behind(lm.tokenizer, front, tokens.prompt_ids(lm.tokenizer, prompt))
        sites = [Site(layer, "pattern") for layer in range(lm.n_layers)]
        with torch.no_grad(), capture(lm, sites) as got:
            lm.forward(tokens.pack(lm.tokenizer, [ids]))
        own = torch.zeros(len(ids))
        own[list(places)] = 1  # a place that two tokens share counts once
        expected = torch.cat([1 - got[site][0, :, -1] @ own for site in sites])
        np.testing.assert_allclose(rows["mass"], expected, atol=2e-5)
        shared += len(set(places)) < len(places)
    assert shared  # "Ei", "ffel" are one token there


def test_batches_are_their_prompts_one_by_one(lm: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = look(lm)
    alone = pd.concat([look(lm, [request]) for request in REQUESTS])
    ran: list[int] = []
    monkeypatch.setattr(attention_drift, "CAPTURE_BYTES", 1)
    with intervene(lm, {Site(0, "block_in"): lambda value: ran.append(len(value)) or value}):
        split = look(lm)
    assert ran == [3, 1, 1, 1, 1, 1]
    by_prompt = whole.sort_values([*KEYS[1:], "segment"])["mass"]
    np.testing.assert_allclose(alone.sort_values([*KEYS[1:], "segment"])["mass"], by_prompt, atol=1e-5)
    np.testing.assert_allclose(split["mass"], whole["mass"], atol=1e-5)


def test_how_many_neighbours(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    for count in (0, 2, 32):
        found = look(lm, [FRANCE], f"attention?neighbours={count}")
        prompts = list(found.loc[found["prompt_kind"] == "neighbourhood", "prompt"].unique())
        assert prompts == list(FRANCE.neighbours[:count])


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("The capital of Italy is", "Italy"),
        ("The capital of the old Italy is", "the old Italy"),
        ("The people of Germany speak", "Germany"),  # known to the fact tables
        ("The peopleofGermanyspeak", None),
        ("The capital of is", None),
        ("Nobody knows it", None),
        ("What {} says of Germany", None),
    ],
)
def test_the_subject_of_a_neighbour(tiny_lm, prompt: str, name: str | None) -> None:
    lm = tiny_lm("llama")
    span = subject_in(lm, FRANCE, prompt)
    if name is None:
        assert span is None
    else:
        assert span == tokens.subject_span(lm.tokenizer, prompt.replace(name, "{}"), name)


def test_low_precision_rounding_is_no_context() -> None:
    row = torch.tensor([[0.25, 0.5, 0.245]])
    rounded = attention_drift.masses(row, ["first", "subject", "last"], exact=False)[0]
    assert rounded[-1] == 0
    assert float(rounded.sum()) == pytest.approx(1)
    meant = attention_drift.masses(row, ["first", "subject", "last"])[0]
    assert float(meant[-1]) == pytest.approx(0.005)


# Pure functions ------------------------------------------------------------------------------------------------------


def attention(change: dict[tuple[int, str, str], float], layers: int = 4, heads: int = 2) -> pd.DataFrame:
    """Mass on the subject: 0.1 * (layer + head) before, after it more by `change` * (head + 1) in the later layers."""
    rows = [
        {
            "state": state, "case": case, "prompt_kind": kind, "prompt": prompt, "layer": layer, "head": head,
            "segment": segment,
            "mass": mass if segment == "subject" else 1 - mass,
        }
        for (case, kind, prompt), more in change.items()
        for state in ("before", "after")
        for layer in range(layers)
        for head in range(heads)
        for mass in [0.1 * (layer + head) + (more * (head + 1) if state == "after" and layer >= layers // 2 else 0)]
        for segment in ("subject", "last")
    ]  # fmt: skip
    return frames.from_rows(rows, "attention")


def answers(says: dict[tuple[int, str, str], tuple[str, str]]) -> pd.DataFrame:
    """Which candidate is on top before and after."""
    rows = [
        {
            "state": state, "case": case, "prompt_kind": kind, "prompt": prompt, "candidate": candidate, "token": "x",
            "logprob": 0.0, "mean_logprob": 0.0, "prob": 1.0, "first_prob": 1.0, "rank": 1,
            "is_top": top == candidate, "is_greedy": False,
        }
        for (case, kind, prompt), tops in says.items()
        for state, top in zip(("before", "after"), tops, strict=True)
        for candidate in ("new", "true")
    ]  # fmt: skip
    return frames.from_rows(rows, "answers")


EDIT, HELD, LOST, NEVER = (
    (0, "edit", "a"), (0, "neighbourhood", "b"), (0, "neighbourhood", "c"), (0, "neighbourhood", "d"),
)  # fmt: skip
SAYS = {EDIT: ("true", "new"), HELD: ("true", "true"), LOST: ("true", "new"), NEVER: ("new", "new")}


def test_over_attention_is_after_less_before_per_head() -> None:
    found = over_attention(attention({EDIT: 0.1, HELD: 0.02}))
    assert len(found) == 2 * 4 * 2
    rows = found.set_index(["prompt", "layer", "head"])
    assert rows.loc[("a", 3, 1), "before"] == pytest.approx(0.4)
    assert rows.loc[("a", 3, 1), "after"] == pytest.approx(0.6)
    assert rows.loc[("a", 3, 1), "change"] == pytest.approx(0.2)
    assert rows.loc[("b", 2, 0), "change"] == pytest.approx(0.02)
    assert rows.loc[("b", 1, 0), "change"] == 0
    before = attention({EDIT: 0.1})
    assert over_attention(before[before["state"] == "before"]).empty


def test_link_takes_the_later_layers_and_the_edits_own_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_drift, "TOP", 2)
    found = link(attention({EDIT: 0.1, HELD: 0.02, LOST: 0.06, NEVER: 0.5}), answers(SAYS)).set_index("prompt")
    assert list(found.index) == ["a", "b", "c"]  # d did not say its object before
    assert list(found["failed"]) == [False, False, True]
    np.testing.assert_allclose(found["change"], [0.15, 0.03, 0.09])
    np.testing.assert_allclose(found["top"], [0.2, 0.04, 0.12])  # head 1 of both layers
    assert link(attention({EDIT: 0.1}), answers({EDIT: ("true", "true")}))["failed"].all()
    assert link(attention({NEVER: 0.1}), answers(SAYS)).empty


def test_a_request_without_true_object_has_its_edit_prompt_only() -> None:
    said = answers(SAYS)
    found = link(attention({EDIT: 0.1, HELD: 0.02}), said[said["candidate"] == "new"])
    assert list(found["prompt"]) == ["a"]


def test_failures_are_means_correlation_and_their_intervals() -> None:
    draw = np.random.default_rng(0)
    links = []
    for _ in range(30):
        kinds = ["edit"] + ["neighbourhood"] * 4
        failed = np.array([False, *(draw.random(4) < 0.5)])
        change = np.where(failed, 0.2, 0.0) + draw.normal(0, 0.1, 5) + np.array([0.5, 0, 0, 0, 0])
        rows = zip(kinds, "abcde", change, failed, strict=True)
        links.append(
            frames.from_rows(
                [
                    {"case": 0, "prompt_kind": k, "prompt": p, "change": c, "top": 2 * c, "failed": f}
                    for k, p, c, f in rows
                ],
                "attention_link",
            )
        )
    found = failures(links).set_index(["measure", "statistic"])
    table = pd.concat(links)
    neighbours = table[table["prompt_kind"] == "neighbourhood"]
    lost, held = neighbours[neighbours["failed"]], neighbours[~neighbours["failed"]]
    for measure in ("change", "top"):
        expected = {
            "edit": table.loc[table["prompt_kind"] == "edit", measure].mean(),
            "failed": lost[measure].mean(),
            "held": held[measure].mean(),
            "difference": lost[measure].mean() - held[measure].mean(),
            "correlation": np.corrcoef(neighbours[measure], neighbours["failed"])[0, 1],
        }
        for statistic, value in expected.items():
            row = found.loc[(measure, statistic)]
            assert row["value"] == pytest.approx(value)
            assert row["low"] < value < row["high"]
    assert found.loc[("change", "difference"), "low"] > 0.1
    width = found.loc[("change", "edit"), "high"] - found.loc[("change", "edit"), "low"]
    assert width == pytest.approx(2 * 1.96 * 0.1 / 30**0.5, rel=0.4)
    assert found.loc[("change", "failed"), "n"] + found.loc[("change", "held"), "n"] == 120
    assert failures(links, seed=0).equals(found.reset_index())


def test_what_cannot_be_known_is_absent() -> None:
    one = link(attention({EDIT: 0.1, HELD: 0.02}), answers(SAYS))
    assert set(failures([one])["statistic"]) == {"edit", "held"}
    assert failures([]).empty
    assert failures([frames.empty("attention_link")]).empty


def test_real_frames_fit_together(tiny_lm) -> None:
    lm = tiny_lm("qwen3")
    requests = (FRANCE, TOWER)
    before = look(lm, requests), looks.answers(lm, requests, "before")
    with PromptPrefix("Rome is here. ").applied(lm):
        after = look(lm, requests, state="after"), looks.answers(lm, requests, "after")
    seen, said = (pd.concat(pair, ignore_index=True) for pair in zip(before, after, strict=True))
    found = link(seen, said)
    assert set(found["prompt_kind"]) >= {"edit"}
    assert "Here they speak" not in set(over_attention(seen)["prompt"])
    failures([found])
