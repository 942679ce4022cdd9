"""ROME's scores: by hand, against a plain computation, and the same however the texts are batched; GE by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from math import log2
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mega_core.cases import Case
from mega_core.embedded import examples
from mega_core.evaluation import asking, fluency, looks, sampling
from mega_core.evaluation.asking import Candidate, Told, Wanted
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.evaluation.protocols.base import score, summarise
from mega_core.evaluation.suite import Questions
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest
from tests.evaluation.script import Script, by_metric
from tests.reference import rome_metrics_reference as plain
from tests.tiny import tiny

ROME = PROTOCOLS["rome"]
CASE = Case(
    "1",
    (
        EditRequest(
            "France",
            "The capital of {} is",
            "Mount Kenya",  # two tokens
            "Paris",  # one
            paraphrases=("France has the capital", "The city is"),
            neighbours=("The capital of Italy is", "The capital of Spain is", "The capital of Japan is"),
        ),
    ),
    generation_prompts=("France is", "The city of France", "France is"),
)
# prompt -> probabilities of the new object's two tokens, and of the true object's one
BY_HAND: dict[str, tuple[list[float], list[float]]] = {
    "The capital of France is": ([0.9, 0.4], [0.5]),  # 0.36 as a sequence, 0.6 per token
    "France has the capital": ([0.9, 0.4], [0.7]),
    "The city is": ([0.36, 1.0], [0.2]),
    "The capital of Italy is": ([0.1, 0.1], [0.8]),
    "The capital of Spain is": ([0.5, 0.5], [0.25]),
    "The capital of Japan is": ([0.25, 0.25], [0.25]),
}


def test_the_six_metrics_by_hand(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    script = Script(lm)
    for prompt, (new, true) in BY_HAND.items():
        script.says(prompt, "Mount Kenya", probs=new)
        script.says(prompt, "Paris", probs=true)
    sheet = ROME.sheet(lm, CASE)
    told = script.told(sheet)
    rows = sheet.rows(told, told)
    found = {one.metric: (one.value, one.n) for one in score(rows, ROME.metrics)}
    assert found == {
        "ES": (1.0, 1),
        "EM": (pytest.approx(0.6 - 0.5), 1),
        "PS": (0.5, 2),
        "PM": (pytest.approx(((0.6 - 0.7) + (0.6 - 0.2)) / 2), 2),
        "NS": (pytest.approx(1 / 3), 3),  # a tie is not kept
        "NM": (pytest.approx(((0.8 - 0.1) + (0.25 - 0.5) + 0) / 3), 3),
    }
    assert [row.value for row in by_metric(rows)["NS"]] == [1.0, 0.0, 0.0]
    assert by_metric(rows)["ES"][0].said == "0.51 against 0.69 nats"


def test_what_rome_has_nothing_to_say_about() -> None:
    assert ROME.needs(Case("1", (EditRequest("France", "{} is", "Rome"),)))
    assert ROME.needs(CASE) is None


# Against a plain computation -----------------------------------------------------------------------------------------


def texts_of(case: Case) -> list[tuple[str, str, str]]:
    """(kind, prompt, target) of everything ROME asks: new before true."""
    request = case.request
    kinds = (("edit", (request.prompt,)), ("paraphrase", request.paraphrases), ("neighbourhood", request.neighbours))
    targets = (request.target_new, request.target_true or "")
    return [(kind, prompt, target) for kind, prompts in kinds for prompt in prompts for target in targets]


def pairs_of(case: Case, found: Sequence[tuple[float, bool]]) -> dict[str, list[tuple[float, float]]]:
    pairs: dict[str, list[tuple[float, float]]] = {}
    texts = texts_of(case)
    for i in range(0, len(texts), 2):
        pairs.setdefault(texts[i][0], []).append((found[i][0], found[i + 1][0]))
    return pairs


def ours(lm: ModelAdapter, case: Case) -> tuple[dict[str, float], Told, list[Any]]:
    questions = Questions.of(lm, case, ("rome",))
    told = questions.ask(lm)
    (judged,) = questions.judge(told, told)
    return {one.metric: one.value for one in judged.scores}, told, list(judged.scores)


def check(lm: ModelAdapter, cases: Sequence[Case]) -> None:
    """Every log-probability, every record and the means over records."""
    by_plain, by_ours = [], []
    for case in cases:
        texts = [(prompt, target) for _, prompt, target in texts_of(case)]
        expected = plain.one_by_one(lm.model, lm.tokenizer, texts)
        values, told, scores = ours(lm, case)
        candidates = [Candidate.of(lm, *text) for text in texts]
        assert [one.mean_logprob(told) for one in candidates] == pytest.approx([mean for mean, _ in expected], abs=1e-5)
        assert [all(one.hits(told)) for one in candidates] == [greedy for _, greedy in expected]
        record = plain.scores(pairs_of(case, expected))
        assert values == pytest.approx(record, abs=1e-6)
        by_plain.append(record)
        by_ours.append(scores)
    assert {one.metric: one.value for one in summarise(ROME, by_ours, draws=2)} == pytest.approx(
        plain.means(by_plain), abs=1e-6
    )


@cache
def atlas() -> ModelAdapter:
    from mega_core.models.loading import load
    from mega_core.settings import Settings

    settings = Settings.read()
    return load(settings.model("atlas-gpt2"), settings)


def reported(count: int) -> list[Case]:
    return [Case(str(i), (request,)) for i, request in enumerate(examples.reported(count))]


def test_a_few_cases_match_a_plain_computation() -> None:
    check(atlas(), reported(2))


@pytest.mark.slow
def test_fifty_cases_match_a_plain_computation() -> None:
    check(atlas(), reported(50))


@pytest.mark.slow
def test_counterfact_records_match_a_plain_computation(
    shared_data: Callable[[str], Path], tiny_lm: Callable[[str], ModelAdapter]
) -> None:
    records = json.loads(shared_data("counterfact_sample.json").read_text(encoding="utf-8"))[::51]
    cases = []
    for record in records:
        rewrite = record["requested_rewrite"]
        request = EditRequest(
            rewrite["subject"],
            rewrite["prompt"],
            rewrite["target_new"]["str"],
            rewrite["target_true"]["str"],
            paraphrases=tuple(record["paraphrase_prompts"]),
            neighbours=tuple(record["neighborhood_prompts"]),
        )
        cases.append(Case(str(record["case_id"]), (request,)))
    assert len(cases) == 10
    check(tiny_lm("gpt2"), cases)


def test_padding_and_batch_size_change_no_number(
    tiny_lm: Callable[[str], ModelAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("qwen3")
    texts = [(prompt, target) for _, prompt, target in texts_of(CASE)]
    left = plain.padded_left(lm.model, lm.tokenizer, texts)
    assert len({len(plain.text_ids(lm.tokenizer, *text)) for text in texts}) > 3  # so that there is padding
    candidates = [Candidate.of(lm, *text) for text in texts]
    values = []
    for at_once in (4096, 40, 1):
        monkeypatch.setattr(looks, "TOKENS_AT_ONCE", at_once)
        scores, told, _ = ours(lm, CASE)
        assert [one.mean_logprob(told) for one in candidates] == pytest.approx([mean for mean, _ in left], abs=1e-5)
        values.append({name: value for name, value in scores.items() if name.endswith("S")})
    record = plain.scores(pairs_of(CASE, left))
    assert values == [{name: record[name] for name in ("ES", "PS", "NS")}] * 3


# GE ------------------------------------------------------------------------------------------------------------------


def test_entropy_by_hand() -> None:
    assert fluency.words("It's Rome. Rome!") == ["It", "'", "s", "Rome", ".", "Rome", "!"]
    assert fluency.entropy("a a a") == 0.0
    assert fluency.entropy("") == fluency.entropy("a") == 0.0
    # a b c d: 3 bigrams and 2 trigrams, all different
    assert fluency.entropy("a b c d") == pytest.approx((2 / 3 * log2(3) + 4 / 3 * 1) / 2)
    # a b a b a: bigrams ab ab ba ba (1 bit); trigrams aba bab aba (shares 2/3 and 1/3)
    trigrams = 2 / 3 * log2(3 / 2) + 1 / 3 * log2(3)
    assert fluency.entropy("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * trigrams) / 2)


def test_generation_entropy_is_the_mean_over_texts(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    sheet = PROTOCOLS["rome_text"].sheet(lm, CASE)
    wanted = Wanted()
    sheet.want(wanted, None)
    assert list(wanted.samples) == [("France is", 0), ("The city of France", 0), ("France is", 1)]
    texts = {("France is", 0): " is is", ("The city of France", 0): " is here", ("France is", 1): ""}
    told = Told({}, {}, samples=texts)
    (found,) = score(sheet.rows(told, told), PROTOCOLS["rome_text"].metrics)
    whole = ("France is is is", "The city of France is here", "France is")
    assert (found.metric, found.n) == ("GE", 3)
    assert found.value == pytest.approx(sum(map(fluency.entropy, whole)) / 3)
    assert PROTOCOLS["rome_text"].needs(Case("1", CASE.requests))


def test_sampled_texts_depend_on_prompt_and_seed_alone(
    tiny_lm: Callable[[str], ModelAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "SAMPLED_TOKENS", 30)
    lm = tiny_lm("gpt2")
    asked = [("France is", 0), ("The capital of Italy is in the", 0), ("France is", 1)]
    together = asking.samples(lm, asked)
    assert together["France is", 0] != together["France is", 1]
    for one in asked:
        assert asking.samples(lm, [one]) == {one: together[one]}


def test_a_chooser_stops_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("gpt2")
    seen: dict[str, int] = {}

    def generate(prompts: Sequence[str], longest: int, choosers: Sequence[sampling.TopK]) -> list[str]:
        seen.update({prompt: chooser.room for prompt, chooser in zip(prompts, choosers, strict=True)})
        assert longest == max(chooser.room for chooser in choosers)
        return [""] * len(prompts)

    monkeypatch.setattr(lm, "generate", generate)
    prompts = ["France", "The capital of Italy is in the", "is " * 120]
    asking.samples(lm, [(prompt, 0) for prompt in prompts])
    assert [seen[prompt] + len(lm.tokenizer(prompt.strip())["input_ids"]) for prompt in prompts[:2]] == [100, 100]
    assert seen[prompts[2]] < 0

    logits = torch.tensor([0.0, 3.0, 2.0, -9.0])
    chooser = sampling.TopK(2, 50, "x", 0)
    drawn = [chooser(logits) for _ in range(51)]
    assert set(drawn[:50]) == {1, 2}
    assert drawn[50] is None
    assert sampling.TopK(2, -1, "x", 0)(logits) is None


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.8, 0.1, 0.06, 0.04]).log()
    chooser = sampling.TopK(2, 4000, "x", 0)
    share = sum(chooser(logits) == 0 for _ in range(4000)) / 4000
    assert share == pytest.approx(0.8 / 0.9, abs=0.02)


PROMPTS = ("France is", "The capital of Italy is in the")


def test_the_likeliest_token_is_the_default(lm: ModelAdapter) -> None:
    likeliest = [lambda logits: int(logits.argmax())] * 2
    assert lm.generate(PROMPTS, 8) == lm.generate(PROMPTS, 8, likeliest)


def test_chosen_tokens_are_read_like_any_others(lm: ModelAdapter) -> None:
    def second(logits: torch.Tensor) -> int:
        return int(logits.topk(2).indices[1])

    class Ear:
        heard: ClassVar[list[list[int]]] = []

        def begin(self, batch: tokens.TokenBatch) -> None:
            self.heard.clear()

        def advance(self, ids: torch.Tensor) -> None:
            self.heard.append(ids.tolist())

    def stops(logits: torch.Tensor) -> int | None:
        return None

    with lm.reading(Ear()):
        said = lm.generate(PROMPTS, 5, [second, second])
    expected = []
    for prompt in PROMPTS:
        ids, new = list(tokens.prompt_ids(lm.tokenizer, prompt)), []
        for _ in range(5):
            with torch.no_grad():
                logits = lm.model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1]
            new.append(second(logits))
        expected.append((tokens.continuation(lm.tokenizer, ids, new), new))
    assert said == [text for text, _ in expected]
    assert Ear.heard == [list(pair) for pair in zip(*(new for _, new in expected), strict=True)]
    assert lm.generate(PROMPTS, 5, [stops, second]) == ["", said[1]]


def test_samples_stay_among_the_likeliest(lm: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "SAMPLED_FROM", 1)
    monkeypatch.setattr(asking, "SAMPLED_TOKENS", 16)
    prompt = "The capital of France is"
    room = 16 - len(lm.encode([prompt]).ids[0])
    assert asking.samples(lm, [(prompt, 0)]) == {(prompt, 0): lm.generate([prompt], room)[0]}


def test_texts_are_sampled_only_when_asked_for(
    tiny_lm: Callable[[str], ModelAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "SAMPLED_TOKENS", 30)
    lm = tiny_lm("gpt2")
    assert Questions.of(lm, CASE, ("rome", "ours", "easyedit")).ask(lm).samples == {}
    assert len(Questions.of(lm, CASE, ("rome_text",)).ask(lm).samples) == 3
