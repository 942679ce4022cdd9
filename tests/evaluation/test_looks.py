from __future__ import annotations

import math

import pytest
import torch

from mega_core.changes import MatrixDelta, WeightDelta
from mega_core.errors import ActionableError, BadInput
from mega_core.evaluation import looks
from mega_core.events import Cancelled, silent
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest

FRANCE = EditRequest(
    "France",
    "The capital of {} is",
    "Rome, the city of Germany",
    "Paris",
    paraphrases=("France speaks", "The capital that belongs to France is the city of", "In France", "France is"),
    neighbours=("The capital of Spain is", "Japan", "The city of Marie Curie is in the country of"),
)
UNKNOWN = EditRequest("Mount Kenya", "{} is in", "Tokyo", neighbours=("Mount Fuji is in",))
REQUESTS = (FRANCE, UNKNOWN)


def one_by_one(lm: ModelAdapter, prompt: str, target: str) -> tuple[list[float], list[int], list[bool]]:
    """Log-probability, rank and argmax of each target token, from full logits of one row alone."""
    row = tokens.with_target(lm.tokenizer, prompt, target)
    with torch.no_grad():
        logits = lm.logits(tokens.pack(lm.tokenizer, [row.ids]))[0].double()
    log_p, ranks, tops = [], [], []
    for position in range(row.target_start, len(row.ids)):
        at, token = logits[position - 1], row.ids[position]
        log_p.append(float(at.log_softmax(-1)[token]))
        ranks.append(int((at > at[token]).sum()) + 1)
        tops.append(int(at.argmax()) == token)
    return log_p, ranks, tops


def test_answers_equal_one_prompt_at_a_time(lm: ModelAdapter) -> None:
    found = looks.answers(lm, REQUESTS, "before")
    assert len(found) == 2 * 8 + 2  # the unknown original object is left out
    assert not ((found["case"] == 1) & (found["candidate"] == "true")).any()
    for row in found.itertuples():
        request = REQUESTS[row.case]
        target = request.target_new if row.candidate == "new" else request.target_true
        log_p, ranks, tops = one_by_one(lm, row.prompt, target)
        assert row.logprob == pytest.approx(sum(log_p), abs=1e-4)
        assert row.mean_logprob == pytest.approx(sum(log_p) / len(log_p), abs=1e-4)
        assert row.prob == pytest.approx(math.exp(sum(log_p)), rel=1e-3)
        assert row.first_prob == pytest.approx(math.exp(log_p[0]), rel=1e-3)
        assert (row.rank, row.is_top, row.is_greedy) == (ranks[0], tops[0], all(tops))


def test_the_object_the_model_would_write_is_greedy(lm: ModelAdapter) -> None:
    """Take what the model generates as the new object: then it must be seen as the greedy continuation."""
    prompt = "The capital of France is"
    with torch.no_grad():
        ids = list(tokens.prompt_ids(lm.tokenizer, prompt))
        for _ in range(2):
            ids.append(int(lm.last_logits(tokens.pack(lm.tokenizer, [ids])).argmax()))
    start, (first, second) = len(ids) - 2, ids[-2:]
    context, longer = looks.Context(tuple(ids[:-2]), start), looks.Context(tuple(ids[:-1]), start)
    found = looks.distributions(lm, {context: [first], longer: [second]})
    assert [found[context].best, found[longer].best] == [first, second]
    assert found[context].rank[first] == found[longer].rank[second] == 1


def test_batches_and_padding_change_nothing(lm: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    together = looks.look(lm, REQUESTS, "before")
    monkeypatch.setattr(looks, "TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(looks, "ROWS_GENERATED_AT_ONCE", 1)
    alone = looks.look(lm, REQUESTS, "before")
    for name, column in (("answers", "logprob"), ("next_tokens", "prob")):
        torch.testing.assert_close(
            torch.tensor(together[name][column]), torch.tensor(alone[name][column]), atol=2e-5, rtol=1e-4
        )
    exact = [column for column in together["answers"] if "prob" not in column]
    assert together["answers"][exact].equals(alone["answers"][exact])
    assert together["generations"].equals(alone["generations"])


def test_one_forward_answers_a_request(tiny_lm, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    seen: list[tuple[int, int]] = []
    original = ModelAdapter.logits_at

    def counted(self, batch, rows, positions):  # noqa: ANN001, ANN202
        seen.append((len(batch), len(positions)))
        return original(self, batch, rows, positions)

    monkeypatch.setattr(ModelAdapter, "logits_at", counted)
    looks.answers(lm, [FRANCE], "before")
    ((rows, positions),) = seen
    longest = len(tokens.target_ids(lm.tokenizer, FRANCE.prompt, FRANCE.target_new))
    shorter = len(tokens.target_ids(lm.tokenizer, FRANCE.prompt, FRANCE.target_true or ""))
    assert rows <= 8 * (
        1 if shorter == 1 else 2
    )  # a prompt whose original object is one token shares the new one's row
    assert positions == 8 * (longest + shorter - 1)  # both start from the same context


def test_next_tokens_are_the_ten_most_likely_and_both_objects(lm: ModelAdapter) -> None:
    found = looks.next_tokens(lm, REQUESTS, "after")
    with torch.no_grad():
        probs = torch.softmax(lm.last_logits(lm.encode([r.prompt for r in REQUESTS])).double(), -1)
    for case, request in enumerate(REQUESTS):
        mine = found[found["case"] == case].set_index("token_id")
        top = mine[mine["rank"] <= 10]
        assert set(top.index) == set(probs[case].topk(10).indices.tolist())
        for token, row in mine.iterrows():
            assert row["prob"] == pytest.approx(float(probs[case, token]), rel=1e-3)
        wanted = [word for word in (request.target_new, request.target_true) if word]
        assert {tokens.target_ids(lm.tokenizer, request.prompt, word)[0] for word in wanted} <= set(mine.index)
    assert set(found["state"]) == {"after"}


def test_generations_are_of_the_first_prompts_of_each_kind(lm: ModelAdapter) -> None:
    found = looks.generations(lm, REQUESTS, "before", max_new_tokens=6)
    kinds = found.groupby(["case", "prompt_kind"], sort=False).size().to_dict()
    assert kinds == {
        (0, "edit"): 1,
        (0, "paraphrase"): 2,
        (0, "neighbourhood"): 2,
        (1, "edit"): 1,
        (1, "neighbourhood"): 1,
    }
    for row in found.itertuples():
        assert lm.generate([row.prompt], 6) == [row.text]


def test_a_prompt_in_two_roles_is_one_row_for_the_model_and_two_in_the_table(tiny_lm) -> None:
    twice = EditRequest("France", "The capital of {} is", "Rome", "Paris", paraphrases=("The capital of France is",))
    found = looks.look(tiny_lm("llama"), [twice, twice], "before")
    assert len(found["answers"]) == 8
    assert found["answers"].groupby("candidate")["logprob"].nunique().to_dict() == {"new": 1, "true": 1}


def test_the_subject_is_marked_in_the_tokens(lm: ModelAdapter) -> None:
    found = looks.prompt_tokens(lm, REQUESTS)
    for case, request in enumerate(REQUESTS):
        mine = found[found["case"] == case]
        assert "".join(mine[mine["is_subject"]]["token"]).strip() == request.subject
        assert "".join(mine["token"]).removeprefix("<s>") == request.prompt


def test_most_likely_sums_up_any_prompt(tiny_lm) -> None:
    lm = tiny_lm("gptj")
    listed = looks.most_likely(lm, "Japan is", count=5)
    probs = [prob for _, prob in listed]
    with torch.no_grad():
        own = torch.softmax(lm.last_logits(lm.encode(["Japan is"]))[0], -1).topk(5)
    assert probs == pytest.approx(own.values.tolist(), rel=1e-4)
    assert [label for label, _ in listed] == tokens.token_strings(lm.tokenizer, own.indices.tolist())
    assert sorted(probs, reverse=True) == probs


def test_a_prompt_that_is_too_long_is_refused(tiny_lm) -> None:
    long = EditRequest("France", "{} " + "x y " * 120 + "is", "Rome", "Paris")
    with pytest.raises(BadInput, match="at most 256"):
        looks.look(tiny_lm("gpt2"), [long], "before")


def test_numbers_that_are_not_finite_are_refused(tiny_lm) -> None:
    lm = tiny_lm("qwen2")
    huge = torch.full((lm.d_model, 1), float("inf"))
    broken = WeightDelta((MatrixDelta(0, "mlp_down", huge, torch.ones(lm.d_mlp, 1), 1.0),))
    with broken.applied(lm), pytest.raises(ActionableError, match="not finite"):
        looks.look(lm, [FRANCE], "after")


def test_cancelling_stops_at_the_next_step(tiny_lm) -> None:
    def stop(event: object) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        looks.look(tiny_lm("gpt2"), [FRANCE], "before", stop)
    assert len(looks.look(tiny_lm("gpt2"), [FRANCE], "before", silent)) == 3


def test_contexts_that_begin_others_share_rows() -> None:
    one, whole, other, longer, alone = (
        looks.Context((1, 2), 2),
        looks.Context((1, 2, 3), 2),
        looks.Context((4,), 1),
        looks.Context((4, 5), 1),
        looks.Context((1, 2, 3), 3),
    )
    rows = looks._rows([one, whole, other, longer, alone])
    assert rows == {whole: [whole, one], alone: [alone], longer: [longer, other]}
    assert [list(batch) for batch in looks._batches(rows, vocab=2**25)] == [[whole], [alone], [longer]]
