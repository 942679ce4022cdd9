"""What every method promises on every architecture. A new method needs one line in SETTINGS, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mega_core import frames
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Cancelled, Event, silent
from mega_core.methods import METHODS
from mega_core.methods.base import Method
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest

# Where the subject ends the prompt, an edit is read directly, so that random weights can be made to say anything.
ONE = EditRequest(
    "The Eiffel Tower", "Here we see {}", "Madrid", "Paris", ("We all see the Eiffel Tower",), ("Look at",)
)
MANY = EditRequest("Mount Kenya", "Look at {}", "Rome and Berlin", "Kenya")

# Method -> parameters with which it can move a tiny random model.
_STRONG = {"learning_rate": 0.3, "clamp": 30.0, "clamp_reference": "residual", "weight_decay": 0.0, "steps": 40}
_SPREAD = {"learning_rate": 0.3, "clamp": 30.0, "weight_decay": 0.0, "steps": 40, "contexts": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "rome": {**_STRONG, "contexts": 3},
    "memit": {**_SPREAD, "mom2_weight": 0.01},
    "alphaedit": {**_SPREAD, "l2": 0.01, "nullspace_cut": 0.7},
    "pmet": {**_STRONG, "contexts": 3, "mom2_weight": 0.01, "stop_loss": 0.0, "adaptive": False},
    "ace": {**_STRONG, "contexts": 3, "mom2_weight": 0.01, "stop_loss": 0.0, "adaptive": False},
    "ft": {"learning_rate": 0.03, "loss": "target"},
    "ft_l": {"learning_rate": 0.03, "loss": "target", "epsilon": 0.2},
    "ft_m": {"learning_rate": 0.03},
    "lora": {"learning_rate": 0.05, "steps": 20},
    "sake": {"target": "contexts", "prompts": 4},
    "mean_shift": {"target": "contexts", "prompts": 4},
    "mega": {"target": "contexts", "prompts": 4},
    "grace": {"learning_rate": 0.3},
    "wise": {"learning_rate": 3.0, "contexts": 2},
}
NEEDS_CONTEXT: frozenset[str] = frozenset({"mega", "sake", "mean_shift", "ike"})
"""Methods whose effect rests on a model that obeys its prompt: on random weights they promise all but the effect."""


@pytest.fixture(params=[method.name for method in METHODS])
def method(request: pytest.FixtureRequest) -> Method[Any]:
    return METHODS[request.param]


def _params(method: Method[Any]) -> Any:
    return method.read(method.ref(SETTINGS.get(method.name, {})))


def _fits(method: Method[Any], lm: ModelAdapter) -> bool:
    return method.needs(lm.spec) is None


def _log_prob(lm: ModelAdapter, request: EditRequest) -> float:
    """Of the whole new object after the edit prompt."""
    row = tokens.with_target(lm.tokenizer, request.prompt, request.target_new)
    batch = tokens.pack(lm.tokenizer, [row.ids], lm.device, [row.target_start])
    at = torch.arange(row.target_start - 1, len(row.ids) - 1)
    with torch.no_grad():
        logs = lm.logits_at(batch, torch.zeros_like(at), at).float().log_softmax(-1)
    return float(logs.gather(-1, torch.tensor(row.target)[:, None]).sum())


@pytest.mark.parametrize("request_", [ONE, MANY], ids=["one token", "several tokens"])
def test_the_target_rises_and_all_is_undone(lm: ModelAdapter, method: Method[Any], request_: EditRequest) -> None:
    if not _fits(method, lm):
        pytest.skip(str(method.needs(lm.spec)))
    before, digest = _log_prob(lm, request_), lm.live_digest()
    change = method.prepare(lm, [request_], _params(method), 0, silent)
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])
    with change.applied(lm):
        after = _log_prob(lm, request_)
        assert lm.changes
        if method.name not in NEEDS_CONTEXT:
            assert after > before + 0.5
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])
    assert (lm.readers, lm.prefix) == ([], None)
    assert _log_prob(lm, request_) == before
    assert len(frames.check(change.summary(), "weight_change"))


def test_it_is_the_same_again_under_its_seed(tiny_lm: Any, method: Method[Any]) -> None:
    lm = tiny_lm("gpt2")
    packed = [method.prepare(lm, [ONE], _params(method), 7, silent).pack() for _ in range(2)]
    assert packed[0][0] == packed[1][0]
    assert packed[0][1].keys() == packed[1][1].keys()
    assert all(torch.equal(tensor, packed[1][1][name]) for name, tensor in packed[0][1].items())


def test_what_is_packed_comes_back(tiny_lm: Any, method: Method[Any]) -> None:
    lm = tiny_lm("qwen3")
    change = method.prepare(lm, [ONE], _params(method), 0, silent)
    again = type(change).unpack(*change.pack())  # type: ignore[attr-defined]
    with change.applied(lm):
        first = _log_prob(lm, ONE)
    with again.applied(lm):
        assert _log_prob(lm, ONE) == first


def test_a_stop_half_way_leaves_the_model_alone(tiny_lm: Any, method: Method[Any]) -> None:
    lm = tiny_lm("llama")
    digest = lm.live_digest()
    events = 0

    def count(event: Event) -> None:
        nonlocal events
        events += 1

    method.prepare(lm, [ONE], _params(method), 0, count)
    for stop_at in sorted({1, events // 2, events} - {0}):
        left = stop_at

        def stop(event: Event) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                raise Cancelled

        with pytest.raises(Cancelled):
            method.prepare(lm, [ONE], _params(method), 0, stop)
        assert (lm.live_digest(), lm.hook_count()) == (digest, 0)
        assert (lm.changes, lm.readers, lm.prefix) == ([], [], None)


def test_an_error_inside_the_block_restores_too(tiny_lm: Any, method: Method[Any]) -> None:
    lm = tiny_lm("gptj")
    digest = lm.live_digest()
    change = method.prepare(lm, [ONE], _params(method), 0, silent)
    with pytest.raises(ZeroDivisionError), change.applied(lm):
        raise ZeroDivisionError
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])


def test_a_layer_that_is_not_there_is_refused(tiny_lm: Any, method: Method[Any]) -> None:
    names = {knob.name for knob in method.knobs()}
    for name, value in (("layer", 99), ("layers", "98-99"), ("value_layers", "98"), ("region", "98-99")):
        if name in names:
            given = {**SETTINGS.get(method.name, {}), name: value}
            with pytest.raises(BadInput, match="99|98"):
                method.prepare(tiny_lm("gpt2"), [ONE], method.read(method.ref(given)), 0, silent)


def test_a_prompt_longer_than_the_model_reads_is_refused(tiny_lm: Any, method: Method[Any]) -> None:
    lm, long = tiny_lm("gpt2"), EditRequest("Rome", "wordy " * 80 + "{} is", "Madrid")

    def edit_and_ask() -> None:
        with method.prepare(lm, [long], _params(method), 0, silent).applied(lm):
            _log_prob(lm, long)

    with pytest.raises(ActionableError):
        edit_and_ask()
