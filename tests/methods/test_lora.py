"""LoRA: what peft trains is what comes back as factors, and peft leaves nothing behind, wherever it is stopped."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from mega_core.errors import ActionableError, BadInput, UnsupportedMethod
from mega_core.events import Advanced, Cancelled, Event, silent
from mega_core.methods import METHODS, finetune, lora
from mega_core.methods.lora import LORA
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest
from tests.tiny import LAYERS, tiny

pytest.importorskip("peft")

TOWER = EditRequest("The Eiffel Tower", "{} is in the city of", "Madrid", "Paris")
SEE = EditRequest("The Eiffel Tower", "Here we see {}", "Rome and Berlin")
STRONG = {"learning_rate": 0.03, "steps": 20}


def _run(lm: ModelAdapter, requests: list[EditRequest], report: Any = silent, seed: int = 0, **given: Any) -> Any:
    return LORA.prepare(lm, requests, LORA.read(LORA.ref(given)), seed, report)


def _logits(lm: ModelAdapter, request: EditRequest) -> torch.Tensor:
    row = tokens.with_target(lm.tokenizer, request.prompt, request.target_new)
    with torch.no_grad():
        return lm.logits(tokens.pack(lm.tokenizer, [row.ids]))


def _picture(lm: ModelAdapter) -> dict[str, Any]:
    """Everything that peft could leave behind: modules, their attributes, flags, hooks, bits."""
    model = lm.model
    return {
        "modules": [(name, id(module), sorted(vars(module))) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        "training": [module.training for module in model.modules()],
        "config": model.config.to_dict(),
        "hooks": lm.hook_count(),
        "digest": lm.live_digest(),
        "forward": [module.forward.__func__ for module in model.modules()],
        "random": torch.random.get_rng_state().tolist(),
    }


def test_it_is_registered_and_any_architecture_will_do(lm: ModelAdapter) -> None:
    assert METHODS["lora"] is LORA
    assert LORA.needs(lm.spec) is None


@pytest.mark.parametrize("also_attention", [False, True])
def test_the_factors_are_what_the_adapters_did(
    lm: ModelAdapter, also_attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model with adapters, at the end of training, and the model with the update give the same logits."""
    seen: list[torch.Tensor] = []
    descend = finetune.descend

    def then_look(*args: Any, **named: Any) -> tuple[float, ...]:
        history = descend(*args, **named)
        seen.append(_logits(lm, SEE))
        return history

    monkeypatch.setattr(finetune, "descend", then_look)
    change = _run(lm, [SEE], also_attention=also_attention, rank=3, alpha=7, **STRONG)
    assert len(change.matrices) == LAYERS * (1 + also_attention)
    before = _logits(lm, SEE)
    with change.applied(lm):
        after = _logits(lm, SEE)
    torch.testing.assert_close(after, seen[0], rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.1
    for matrix in change.matrices:
        assert matrix.rank() == 3
        assert matrix.norm() > 0


@pytest.mark.parametrize("given", [{}, {"also_attention": True}, {"layers": "1-2", "kl_weight": 0.5, "contexts": 3}])
def test_the_model_is_left_as_it_was(lm: ModelAdapter, given: dict[str, Any]) -> None:
    before = _picture(lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(lm, [TOWER, SEE], steps=2, **given)
    assert _picture(lm) == before


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_stopped_half_way_it_is_left_as_it_was_too(stop_at: int) -> None:
    for arch in ("gpt2", "mistral"):
        lm = tiny(arch)
        before = _picture(lm)

        def stop(event: Event) -> None:
            if stop_at == 0 or (isinstance(event, Advanced) and event.done == stop_at):
                raise Cancelled

        with pytest.raises(Cancelled):
            _run(lm, [TOWER], stop, also_attention=True)
        assert _picture(lm) == before


@pytest.mark.parametrize("modules", [0, 1, 2])
def test_an_injection_that_fails_in_the_middle_leaves_it_as_it_was(
    modules: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraModel

    replace = LoraModel._replace_module
    left = modules

    def fail(self: Any, *args: Any) -> None:
        nonlocal left
        replace(self, *args)
        left -= 1
        if left < 0:
            raise ZeroDivisionError

    lm = tiny("qwen3")
    before = _picture(lm)
    monkeypatch.setattr(LoraModel, "_replace_module", fail)
    with pytest.raises(ZeroDivisionError):
        _run(lm, [TOWER])
    assert _picture(lm) == before


def test_the_seed_draws_the_start_and_torchs_own_state_stays(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one, same = (_run(lm, [TOWER], seed=1, steps=2).matrices for _ in range(2))
    other = _run(lm, [TOWER], seed=2, steps=2).matrices
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b, c in zip(one, same, other, strict=True):
        assert torch.equal(a.right, b.right)
        assert torch.equal(a.left, b.left)
        assert not torch.equal(a.right, c.right)


def test_training_is_that_of_the_papers_formula(tiny_lm: Any) -> None:
    """Two steps by hand: W + alpha / rank B A in the full model, with autograd and torch's own Adam."""
    from tests.reference.ft_reference import copy_of, plain_loss

    for arch in ("gpt2", "llama"):
        lm = tiny_lm(arch)
        given = {"layers": "1", "rank": 2, "alpha": 6.0, "learning_rate": 0.01}
        # after one update A is as drawn: B = 0 lets no gradient through to it
        start = _run(lm, [SEE], steps=1, **given).matrices[0].right.T
        matrix = _run(lm, [SEE], steps=3, **given).matrices[0]
        a = start.clone().requires_grad_()
        b = torch.zeros(lm.d_model, 2, requires_grad=True)
        adam = torch.optim.Adam([a, b], lr=0.01)
        other = copy_of(lm, [])
        module = other.mlp_down(1)
        original = module.weight.detach().clone()
        del module.weight
        for _ in range(3):
            update = 6.0 / 2 * b @ a
            module.weight = original + (update.T if lm.conv1d(1, "mlp_down") else update)
            adam.zero_grad()
            plain_loss(other, [SEE.prompt], [SEE.target_new], "target").backward()
            adam.step()
        wanted = (3.0 * b @ a).detach()
        assert (matrix.left @ matrix.right.T - wanted).norm() < 1e-3 * wanted.norm()


def test_without_the_library_it_says_what_to_install(tiny_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    assert "requirements-lora.txt" in str(LORA.needs(lm.spec))
    with pytest.raises(UnsupportedMethod, match=r"pip install -r requirements-lora\.txt"):
        _run(lm, [TOWER])


def test_half_precision_trains_in_full_precision(tiny_lm: Any) -> None:
    lm = tiny("llama")
    lm.model.to(torch.bfloat16)
    change = _run(lm, [SEE], **STRONG)
    for matrix in change.matrices:
        assert matrix.left.dtype == matrix.right.dtype == torch.float32
    before = float(_logits(lm, SEE).float().log_softmax(-1).max())
    with change.applied(lm):
        assert float(_logits(lm, SEE).float().log_softmax(-1).max()) != before
    assert lm.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "field"),
    [({"layers": "99"}, "layers"), ({"layers": "x"}, "layers"), ({"kl_weight": 1, "kl_prompts": "no"}, "kl_prompts")],
)
def test_params_that_do_not_fit_are_refused_by_name(tiny_lm: Any, given: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput) as caught:
        _run(tiny_lm("gpt2"), [TOWER], **given)
    assert caught.value.field == f"lora.{field}"


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_wrapped(tiny_lm: Any) -> None:
    with pytest.raises(ActionableError):
        _run(tiny_lm("gpt2"), [EditRequest("Rome", "wordy " * 80 + "{} is", "Madrid")])
