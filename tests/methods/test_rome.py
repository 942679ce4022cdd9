"""What ROME promises on every architecture: the new pair is in the matrix, the target rises, all can be undone."""

import numpy as np
import pytest
import torch

from mega_core.embedded import facts
from mega_core.errors import BadInput
from mega_core.events import Advanced, Cancelled, Event, Note, silent
from mega_core.methods import METHODS, covariance, optimise
from mega_core.methods.rome import CONTEXTS, ROME, default_layer, kept_prompts, other_relations, prepare
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest
from tests.reference.rome_reference import naive_second_moment, rome_update
from tests.tiny import LAYERS, tiny

TOWER = EditRequest("The Eiffel Tower", "{} is in the city of", "Madrid", "Paris")
KENYA = EditRequest("Mount Kenya", "{} is on the continent of", "Berlin and Rome")
# Where the subject ends the prompt, the new value is read directly, so that random weights can say anything.
SEE = EditRequest("The Eiffel Tower", "Here we see {}", "Madrid")
LOOK = EditRequest("Mount Kenya", "Look at {}", "Rome and Berlin")
STRONG = {"learning_rate": 0.3, "clamp": 30.0, "clamp_reference": "residual", "weight_decay": 0.0, "steps": 40}


def _params(**given):
    return ROME.read(ROME.ref(given))


def _prob(lm: ModelAdapter, request: EditRequest) -> float:
    row = tokens.with_target(lm.tokenizer, request.prompt, request.target_new)
    with torch.no_grad():
        logs = lm.logits(tokens.pack(lm.tokenizer, [row.ids])).float().log_softmax(-1)[0]
    return float(sum(logs[row.target_start - 1 + t, token] for t, token in enumerate(row.target)).exp())


def _mean_key(lm: ModelAdapter, request: EditRequest, layer: int, contexts: int = 6) -> torch.Tensor:
    keys = []
    for context in ("{}", *CONTEXTS[: contexts - 1]):
        template = context.replace("{}", request.template)
        at = tokens.subject_last(lm.tokenizer, template, request.subject)
        with capture(lm, [Site(layer, "mlp_down_in")]) as got:
            lm.forward(lm.encode([template.replace("{}", request.subject)]))
        keys.append(got[Site(layer, "mlp_down_in")][0, at])
    return torch.stack(keys).mean(0).double()


def _w_times(lm: ModelAdapter, layer: int, key: torch.Tensor) -> torch.Tensor:
    return lm.read_weight(layer, "mlp_down").double() @ key


def test_it_is_registered_without_torch_maths_at_import() -> None:
    assert METHODS["rome"] is ROME
    assert ROME.family == "weights"


@pytest.mark.parametrize("request_", [SEE, LOOK], ids=["one token", "several tokens"])
@pytest.mark.parametrize("form", ["consistent", "original"])
def test_the_target_rises_strongly_and_all_is_undone(lm: ModelAdapter, request_: EditRequest, form: str) -> None:
    before, digest = _prob(lm, request_), lm.live_digest()
    change = prepare(lm, [request_], _params(key_form=form, contexts=3, **STRONG), 0, silent)
    assert lm.live_digest() == digest
    assert lm.hook_count() == 0
    with change.applied(lm):
        assert lm.live_digest() != digest
        assert _prob(lm, request_) > 15 * before
    assert lm.live_digest() == digest
    assert _prob(lm, request_) == before


@pytest.mark.parametrize("request_", [TOWER, KENYA], ids=["one token", "several tokens"])
def test_the_target_rises_through_attention_too(lm: ModelAdapter, request_: EditRequest) -> None:
    before = _prob(lm, request_)
    with prepare(lm, [request_], _params(layer=0, contexts=1, **STRONG), 0, silent).applied(lm):
        assert _prob(lm, request_) > 1.5 * before


def test_the_edited_matrix_maps_the_key_to_the_new_value(lm: ModelAdapter) -> None:
    """W' k* = W k* + delta, in the consistent form."""
    params = _params(layer=1, steps=4)
    key = _mean_key(lm, TOWER, 1)
    rows = optimise.rows_for(lm, 0, TOWER, ("{}", *CONTEXTS[:5]), ("{} is a",))
    found = optimise.find_values(lm, 1, rows, optimise.Search(steps=4))
    before = _w_times(lm, 1, key)
    with prepare(lm, [TOWER], params, 0, silent).applied(lm):
        moved = _w_times(lm, 1, key) - before
    torch.testing.assert_close(moved, found.delta[0].double(), rtol=1e-3, atol=1e-4)


def test_the_original_form_hits_the_bare_prompts_key(lm: ModelAdapter) -> None:
    bare = _mean_key(lm, TOWER, 1, contexts=1)
    rows = optimise.rows_for(lm, 0, TOWER, ("{}", *CONTEXTS[:5]), ("{} is a",))
    found = optimise.find_values(lm, 1, rows, optimise.Search(steps=4))
    before = _w_times(lm, 1, bare)
    with prepare(lm, [TOWER], _params(layer=1, steps=4, key_form="original"), 0, silent).applied(lm):
        moved = _w_times(lm, 1, bare) - before
    torch.testing.assert_close(moved, found.delta[0].double(), rtol=1e-3, atol=1e-4)


def test_the_update_is_the_papers_closed_form(tiny_lm) -> None:
    for arch in ("gpt2", "llama"):
        lm = tiny_lm(arch)
        change = prepare(lm, [TOWER], _params(layer=1, steps=3, shrinkage=0.1), 0, silent)
        rows = covariance.covariance_texts(lm, covariance.tokens_for("quick", lm.d_mlp))
        c = covariance.shrink(torch.from_numpy(naive_second_moment(lm, 1, rows)), 0.1).numpy()
        key = _mean_key(lm, TOWER, 1).numpy()
        found = optimise.find_values(
            lm,
            1,
            optimise.rows_for(lm, 0, TOWER, ("{}", *CONTEXTS[:5]), ("{} is a",)),
            optimise.Search(steps=3),
        )
        wanted = rome_update(c, key, key, found.delta[0].double().numpy())
        matrix = change.matrices[0]
        update = (matrix.left @ matrix.right.T).double().numpy()
        assert np.abs(update - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_summary_says_what_changed(tiny_lm) -> None:
    lm = tiny_lm("gptj")
    summary = prepare(lm, [TOWER], _params(layer=1, steps=2), 0, silent).summary()
    row = summary.iloc[0]
    assert (row["layer"], row["site"], row["kind"], row["rank"]) == (1, "mlp_down", "weights", 1)
    assert row["parameters"] == lm.d_model * lm.d_mlp
    assert row["norm"] > 0


def test_the_same_question_gives_the_same_numbers(lm: ModelAdapter) -> None:
    for source in ("fixed", "sampled"):
        params = _params(steps=3, context_source=source)
        first, again = (prepare(lm, [TOWER], params, 7, silent).matrices[0] for _ in range(2))
        assert torch.equal(first.left, again.left)
        assert torch.equal(first.right, again.right)


def test_sampled_contexts_depend_on_the_seed_and_leave_torchs_own_alone(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    state = torch.random.get_rng_state()
    params = _params(steps=2, context_source="sampled")
    a, b = (prepare(lm, [TOWER], params, seed, silent).matrices[0].right for seed in (0, 1))
    assert not torch.equal(a, b)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_several_requests_are_all_inserted(lm: ModelAdapter) -> None:
    requests = [SEE, EditRequest("Mount Kenya", "Look at {}", "Berlin"), EditRequest("Japan", "Tokyo is in {}", "Rome")]
    before = [_prob(lm, request) for request in requests]
    change = prepare(lm, requests, _params(layer=1, contexts=1, **STRONG), 0, silent)
    assert change.matrices[0].left.shape == (lm.d_model, 3)
    with change.applied(lm):
        for old, request in zip(before, requests, strict=True):
            assert _prob(lm, request) > 10 * old


def test_a_ridge_lets_the_pairs_give(tiny_lm) -> None:
    """EMMET's lambda: none holds every pair exactly, much leaves the matrix alone, and one prompt may come twice."""
    lm = tiny_lm("gpt2")
    norms = {}
    for ridge in (0.0, 0.1, 1e6):
        change = prepare(lm, [SEE, LOOK], _params(layer=1, steps=3, ridge=ridge), 0, silent)
        norms[ridge] = change.matrices[0].norm()
    assert norms[0.0] > norms[0.1] > 100 * norms[1e6]
    other = EditRequest(TOWER.subject, TOWER.template, "Rome")
    prepare(lm, [TOWER, other], _params(steps=2, ridge=0.1), 0, silent)


@pytest.mark.parametrize(("form", "contexts"), [("consistent", 3), ("original", 1)])
def test_the_edit_says_which_keys_it_set(tiny_lm, form: str, contexts: int) -> None:
    """For later edits that have to spare them: layer -> the keys whose values are now new."""
    lm = tiny_lm("llama")
    change = prepare(lm, [TOWER], _params(layer=1, steps=2, key_form=form, contexts=3), 0, silent)
    (keys,) = change.keys.values()
    assert list(change.keys) == [1]
    torch.testing.assert_close(keys[0].double(), _mean_key(lm, TOWER, 1, contexts=contexts), rtol=1e-4, atol=1e-5)


def test_more_edits_than_dimensions_are_kept_by_the_smaller_side(tiny_lm) -> None:
    lm = tiny_lm("qwen3")
    requests = [EditRequest(f"Town {i}", "Look at {}", "Rome") for i in range(lm.d_model + 4)]
    change = prepare(lm, requests, _params(layer=1, steps=1, contexts=1, ridge=0.1), 0, silent)
    assert change.matrices[0].rank() == lm.d_model


def test_other_relations_of_a_known_subject_are_kept_in_words_it_was_trained_on() -> None:
    fact = facts.find("France", "capital")
    kept = other_relations(EditRequest("France", fact.templates_edit[0], "Rome", fact.object))
    trained = {form for other in facts.siblings(fact) for form in other.templates_paraphrase}
    assert kept
    assert set(kept) <= trained
    assert not set(kept) & {*fact.trained, *fact.templates_held_out}
    held_out = {form for other in facts.siblings(fact) for form in other.templates_held_out}
    assert not set(kept) & held_out


def test_relations_bound_to_the_edited_one_are_not_kept() -> None:
    """Moving a landmark to another city moves it to another country too."""
    world = facts.load()
    tower = [fact for fact in facts.facts() if fact.relation == "landmark_city"][0]
    bound = {form for name in ("landmark_city", "landmark_country") for form in world.relations[name].pool}
    for relation in ("landmark_city", "landmark_country"):
        fact = facts.find(tower.subject, relation)
        assert not set(other_relations(EditRequest(fact.subject, fact.templates_edit[0], "Nowhere"))) & bound


@pytest.mark.parametrize(
    ("subject", "template"), [("Nobody", "The capital of {} is"), ("France", "What I like about {} is")]
)
def test_where_the_tables_know_nothing_the_usual_prompt_is_kept(subject: str, template: str) -> None:
    request = EditRequest(subject, template, "Rome")
    assert other_relations(request) == ()
    assert kept_prompts(request, " Auto ", "rome.kl_prompts") == ("{} is a",)
    assert kept_prompts(request, "{} is a | I like {}", "rome.kl_prompts") == ("{} is a", "I like {}")


def test_two_requests_about_one_prompt_are_refused(tiny_lm) -> None:
    other = EditRequest(TOWER.subject, TOWER.template, "Rome")
    with pytest.raises(BadInput, match="same key"):
        prepare(tiny_lm("gpt2"), [TOWER, other], _params(steps=2), 0, silent)


def test_stop_probability_saves_steps(tiny_lm) -> None:
    lm = tiny_lm("qwen2")
    counts = {}
    for stop in (0.5, 1.0):
        seen: list[Event] = []
        prepare(lm, [SEE], _params(stop_probability=stop, contexts=2, **STRONG), 0, seen.append)
        counts[stop] = sum(isinstance(e, Advanced) and e.stage == "new value" for e in seen)
    assert counts[0.5] < counts[1.0] == 40


@pytest.mark.parametrize("at", [("key statistics", 1), ("new value", 1), ("new value", 4)])
def test_cancelling_leaves_the_model_identical(at: tuple[str, int]) -> None:
    lm = tiny("llama")
    digest = lm.live_digest()

    def stop(event: Event) -> None:
        if isinstance(event, Advanced) and (event.stage, event.done) == at:
            raise Cancelled

    with pytest.raises(Cancelled):
        prepare(lm, [TOWER], _params(steps=8), 0, stop)
    assert lm.live_digest() == digest
    assert lm.hook_count() == 0


def test_a_weak_key_match_is_said(tiny_lm, monkeypatch) -> None:
    monkeypatch.setattr("mega_core.methods.rome.WEAK_MATCH", 100.0)
    notes: list[Event] = []
    prepare(tiny_lm("gpt2"), [TOWER], _params(steps=2, key_form="original"), 0, notes.append)
    assert any(isinstance(event, Note) and "key" in event.text for event in notes)


def test_kept_prompts_hold_their_answers(tiny_lm) -> None:
    """With a large weight the next word after the kept prompt moves less."""
    lm = tiny_lm("gpt2")
    keep = lm.encode(["The Eiffel Tower is a"])
    with torch.no_grad():
        before = lm.last_logits(keep).log_softmax(-1)[0]
    moved = []
    for weight in (0.0, 20.0):
        with prepare(lm, [TOWER], _params(kl_weight=weight, **STRONG), 0, silent).applied(lm), torch.no_grad():
            after = lm.last_logits(keep).log_softmax(-1)[0]
        moved.append(float((before.exp() * (before - after)).sum()))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"layer": 99}, "layer"),
        ({"kl_prompts": "no place for the subject"}, "kl_prompts"),
        ({"kl_prompts": "{} is a | {} and {}"}, "kl_prompts"),
    ],
)
def test_params_that_do_not_fit_are_refused_by_name(tiny_lm, given, field: str) -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(BadInput) as caught:
        prepare(lm, [TOWER], _params(**given), 0, silent)
    assert field in caught.value.field


@pytest.mark.parametrize("given", [{"layer": -1}, {"steps": 0}, {"key_form": "both"}, {"clamp": "much"}, {"warmth": 1}])
def test_params_out_of_range_are_refused(given) -> None:
    with pytest.raises(BadInput, match=f"rome.{next(iter(given))}"):
        ROME.ref(given)


def test_the_default_layer_is_about_a_third() -> None:
    assert [default_layer(n) for n in (1, 3, 12, 24, 36)] == [0, 1, 4, 8, 12]
    assert default_layer(LAYERS) < LAYERS - 1
