"""ACE: what the diagnosis measures, which layers it picks, what the two passes write, and what they never read."""

import pytest
import torch

from mega_core.embedded import facts
from mega_core.errors import BadInput
from mega_core.events import Event, Note, silent
from mega_core.methods import METHODS, ace
from mega_core.methods.ace import ACE, diagnosis, groups, prepare, wordings
from mega_core.methods.pathway import pathway, window
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, intervene
from mega_core.records import EditRequest
from tests.tiny import LAYERS

TOWER = EditRequest("The Eiffel Tower", "{} is in the city of", "Madrid", "Paris")
GIVEN = {"steps": 4, "contexts": 2, "mom2_weight": 0.5, "clamp": 5.0, "value_layers": "1", "query_layers": "0"}


def _params(**given):
    return ACE.read(ACE.ref({**GIVEN, **given}))


def _known() -> EditRequest:
    """An edit of a fact from the tables whose relation begins two-hop questions."""
    hop = next(hop for hop in facts.hops() if (hop.subject, hop.first) in facts.load().by_key)
    fact = facts.find(hop.subject, hop.first)
    return EditRequest(fact.subject, fact.templates_edit[0], facts.counterfactuals(fact)[0], fact.object)


def test_it_is_among_the_methods() -> None:
    assert METHODS["ace"] is ACE


# diagnosis -----------------------------------------------------------------------------------------------------------


def test_value_scores_telescope(lm: ModelAdapter) -> None:
    """All together they are the rise from the embedding to the answer that the model really gives."""
    found = pathway(lm, [(TOWER.prompt, "Paris")])
    ids = lm.encode([TOWER.prompt])
    answer = lm.tokenizer(" Paris")["input_ids"]
    token = _token(lm, TOWER.prompt, "Paris")
    assert token in answer
    last = float(lm.last_logits(ids).double().log_softmax(-1)[0, token])
    start = last - found.total
    again = pathway(lm, [(TOWER.prompt, "Paris"), (TOWER.prompt, "Paris")])
    torch.testing.assert_close(again.value, found.value)
    # The first state is the embedding under the last state's scale; its log-probability is what is left.
    assert start == pytest.approx(_embedding_log_prob(lm, TOWER.prompt, token), abs=1e-3)


def _token(lm: ModelAdapter, prompt: str, answer: str) -> int:
    from mega_core.models import tokens

    return tokens.target_ids(lm.tokenizer, prompt, answer)[0]


def _embedding_log_prob(lm: ModelAdapter, prompt: str, token: int) -> float:
    from mega_core.models.hooks import capture

    batch = lm.encode([prompt])
    sites = [Site(0, "block_in"), Site(lm.n_layers - 1, "block_out")]
    with capture(lm, sites, stop=False) as got, torch.no_grad():
        lm.logits(batch)
    first, last = (got[site][0, -1].double() for site in sites)
    layernorm = lm.spec.norm == "layernorm"
    if layernorm:
        first, last = first - first.mean(), last - last.mean()
    norm = lm.final_norm
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    normed = first / (last.square().mean() + eps).sqrt() * norm.weight.double()
    if getattr(norm, "bias", None) is not None:
        normed = normed + norm.bias.double()
    logits = normed @ lm.head_weight.double().T
    if lm.head_bias is not None:
        logits = logits + lm.head_bias.double()
    return float(logits.log_softmax(-1)[token])


def test_a_layer_that_writes_nothing_has_no_score(lm: ModelAdapter) -> None:
    with intervene(lm, {Site(1, "mlp"): lambda mlp: 0 * mlp}):
        found = pathway(lm, [(TOWER.prompt, "Paris")])
    assert float(found.value[1]) == pytest.approx(0, abs=1e-9)
    assert float(found.query[1]) == 0
    assert float(found.query[0]) != 0
    assert float(found.query[LAYERS - 1]) == 0  # nothing above it to switch on


def test_the_window_with_the_highest_sum() -> None:
    scores = torch.tensor([9.0, 0.0, 3.0, 4.0, 1.0, 8.0])
    assert window(scores, 2, 0, 5) == (0, 1)
    assert window(scores, 2, 1, 4) == (2, 3)
    assert window(scores, 3, 0, 1) == (0, 1)


# groups --------------------------------------------------------------------------------------------------------------


def test_groups_are_found_one_above_the_other(lm: ModelAdapter) -> None:
    values, queries = groups(lm, [TOWER], _params(value_layers="auto", query_layers="auto"), 0, silent)
    assert 0 <= queries[0] <= queries[-1] < values[0] <= values[-1] < LAYERS - 1


def test_groups_as_given(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    assert groups(lm, [TOWER], _params(value_layers="1", query_layers="0-1"), 0, silent) == ((1,), (0, 1))
    with pytest.raises(BadInput, match="below the value layers"):
        groups(lm, [TOWER], _params(value_layers="0", query_layers="auto"), 0, silent)


def test_known_facts_are_diagnosed_by_questions_about_others(tiny_lm) -> None:
    request = _known()
    for prompt, _ in diagnosis(tiny_lm("qwen3"), [request], 0):
        assert prompt == request.prompt or request.subject not in prompt
    assert diagnosis(tiny_lm("gpt2"), [TOWER], 0) == [(TOWER.prompt, "Paris")]


# passes --------------------------------------------------------------------------------------------------------------


def test_both_passes_are_written(lm: ModelAdapter) -> None:
    notes: list[Event] = []
    change = prepare(lm, [TOWER], _params(), 0, notes.append)
    assert [(matrix.layer, matrix.site) for matrix in change.matrices] == [(1, "mlp_down"), (0, "mlp_down")]
    assert set(change.keys) == {0, 1}
    texts = [event.text for event in notes if isinstance(event, Note)]
    assert any("Value layers 1, query layers 0" in text for text in texts)
    assert any("before" in text and "after" in text for text in texts)


def test_attention_is_written_when_asked(lm: ModelAdapter) -> None:
    change = prepare(lm, [TOWER], _params(also_attention=True), 0, silent)
    assert [(matrix.layer, matrix.site) for matrix in change.matrices] == [
        (1, "attn_out"),
        (1, "mlp_down"),
        (0, "attn_out"),
        (0, "mlp_down"),
    ]
    assert change.matrices[0].right.shape[0] == lm.n_heads * lm.head_dim
    before = lm.live_digest()
    with change.applied(lm):
        assert lm.live_digest() != before
    assert lm.live_digest() == before


def test_each_pass_is_pmets_write(tiny_lm) -> None:
    """With the edit's own prompts, each pass alone is PMET on its group; the second sees the first."""
    lm = tiny_lm("gptj")
    pmet = METHODS["pmet"]
    common = {name: value for name, value in GIVEN.items() if not name.endswith("_layers")}
    change = prepare(lm, [TOWER], _params(value_prompts="edit"), 0, silent)
    for matrix in change.matrices:
        alone = pmet.prepare(lm, [TOWER], pmet.read(pmet.ref({**common, "layers": str(matrix.layer)})), 0, silent)
        torch.testing.assert_close(matrix.left @ matrix.right.T, alone.matrices[0].left @ alone.matrices[0].right.T)


def test_only_trained_wordings_are_read() -> None:
    request = _known()
    fact = next(f for f in facts.load().by_subject[request.subject] if request.template in f.templates_edit)
    found = wordings(request)
    assert found
    assert set(found) <= set(fact.trained)
    assert not set(found) & set(fact.templates_held_out)
    assert request.template not in found
    assert wordings(TOWER) == ()


def test_two_hop_questions_of_the_subject_are_never_read(tiny_lm, monkeypatch) -> None:
    lm, request = tiny_lm("gpt2"), _known()
    read: list[str] = []
    encode = lm.encode
    monkeypatch.setattr(lm, "encode", lambda prompts: read.extend(prompts) or encode(prompts))
    rows = []
    original = ace._reworded_rows
    monkeypatch.setattr(ace, "_reworded_rows", lambda *given: rows.extend(original(*given)) or original(*given))
    prepare(lm, [request], _params(value_layers="auto", query_layers="auto", steps=1), 0, silent)
    read += [str(lm.tokenizer.decode(row.ids)) for row in rows]
    assert rows
    questions = [hop.prompt(t) for hop in facts.hops() if hop.subject == request.subject for t in hop.templates]
    assert not any(question in text for question in questions for text in read)
