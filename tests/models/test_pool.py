"""One holder at a time, as many models as fit, and a model that comes back changed is never lent again."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from time import sleep

import pytest
import torch

from mega_core.errors import BadInput, Busy, DirtyModel, UnknownName
from mega_core.events import Cancelled, Event
from mega_core.models.adapter import ModelAdapter
from mega_core.models.pool import ModelPool
from mega_core.records import ModelRef
from mega_core.settings import ModelEntry, Settings
from tests.tiny import tiny

ENTRIES = {
    name: ModelEntry(name, path=Path(name), architecture=name, memory_gb=4.0) for name in ("gpt2", "llama", "qwen3")
}


class Loader:
    """Counts loads; each takes a moment, so that races would show."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.loads: list[str] = []
        self.seconds = seconds

    def __call__(self, entry: ModelEntry, settings: Settings, report) -> ModelAdapter:
        self.loads.append(entry.name)
        sleep(self.seconds)
        lm = tiny(entry.architecture)
        lm.ref = entry.ref()
        return lm


def pool_of(loader: Loader, **more) -> ModelPool:
    return ModelPool(Settings(models=ENTRIES, **more), loader)


def test_a_model_is_loaded_once_and_lent_again():
    loader = Loader()
    pool = pool_of(loader)
    with pool.lease(ModelRef("gpt2")) as first:
        assert first.ref == ModelRef("gpt2")
        assert pool.loaded() == ((ModelRef("gpt2"), True),)
    with pool.lease(ModelRef("gpt2")) as second:
        assert second is first
    assert loader.loads == ["gpt2"]
    assert pool.loaded() == ((ModelRef("gpt2"), False),)


def test_threads_hold_a_model_one_after_the_other():
    loader = Loader(0.05)
    pool = pool_of(loader, max_models=2)
    inside: list[str] = []
    overlaps: list[str] = []
    texts: set[str] = set()

    def work(name: str) -> None:
        for _ in range(3):
            with pool.lease(ModelRef(name)) as lm:
                if name in inside:
                    overlaps.append(name)
                inside.append(name)
                texts.add(f"{name} {lm.generate(['Rome'], 3)[0]}")
                inside.remove(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("gpt2", "gpt2", "gpt2", "llama", "llama")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert overlaps == []
    assert len(texts) == 2
    assert sorted(loader.loads) == ["gpt2", "llama"]


def test_the_least_recently_used_model_makes_room():
    loader = Loader()
    pool = pool_of(loader, max_models=2)
    for name in ("gpt2", "llama", "gpt2", "qwen3"):
        with pool.lease(ModelRef(name)):
            pass
    assert [ref.name for ref, _ in pool.loaded()] == ["gpt2", "qwen3"]
    assert loader.loads == ["gpt2", "llama", "qwen3"]


def test_the_memory_budget_makes_room_too():
    pool = pool_of(Loader(), max_models=9, memory_gb=9.0)
    for name in ("gpt2", "llama", "qwen3"):
        with pool.lease(ModelRef(name)):
            pass
    assert [ref.name for ref, _ in pool.loaded()] == ["llama", "qwen3"]


def test_embedded_models_stay_and_take_no_room():
    loader = Loader()
    small = {name: replace(ENTRIES[name], embedded=True) for name in ("llama", "qwen3")}
    pool = ModelPool(Settings(models={**ENTRIES, **small}, max_models=1), loader)
    for name in ("llama", "gpt2", "qwen3", "llama", "gpt2"):
        with pool.lease(ModelRef(name)):
            pass
    assert loader.loads == ["llama", "gpt2", "qwen3"]


def test_a_model_in_use_is_not_dropped_for_another():
    pool = pool_of(Loader(), max_models=1)
    with (
        pool.lease(ModelRef("gpt2")),
        pytest.raises(Busy, match="llama"),
        pool.lease(ModelRef("llama"), timeout_s=0.1),
    ):
        pass
    with pool.lease(ModelRef("llama")):
        pass


def test_waiting_can_be_cancelled():
    pool = pool_of(Loader())
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if len(events) > 1:
            raise Cancelled

    caught: list[BaseException] = []

    def wait() -> None:
        try:
            with pool.lease(ModelRef("gpt2"), report):
                pass
        except Cancelled as error:
            caught.append(error)

    with pool.lease(ModelRef("gpt2")):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(10)
    assert len(caught) == 1
    with pool.lease(ModelRef("gpt2")):
        pass


def test_leasing_twice_in_one_job_is_an_error_instead_of_a_deadlock():
    pool = pool_of(Loader())
    again = pool.lease(ModelRef("gpt2"))
    with pool.lease(ModelRef("gpt2")), pytest.raises(Busy, match="already holds"), again:
        pass


def spoil_weight(lm: ModelAdapter) -> None:
    with torch.no_grad():
        weight = lm.weight(0, "mlp_down")
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


SPOIL = {
    "weights changed": spoil_weight,
    "hooks": lambda lm: lm.mlp(0).register_forward_hook(lambda *args: None),
    "training mode": lambda lm: lm.model.train(),
    "trainable": lambda lm: lm.weight(0, "mlp_down").requires_grad_(True),
}


@pytest.mark.parametrize("reason", SPOIL)
def test_a_dirty_model_is_dropped_and_named(reason: str):
    loader = Loader()
    pool = pool_of(loader)
    with pytest.raises(DirtyModel, match=f"gpt2.*{reason}"), pool.lease(ModelRef("gpt2")) as spoiled:
        SPOIL[reason](spoiled)
    assert pool.loaded() == ()
    with pool.lease(ModelRef("gpt2")) as fresh:
        assert fresh is not spoiled
        assert fresh.hook_count() == 0
    assert loader.loads == ["gpt2", "gpt2"]


def spoil_then_raise(lm: ModelAdapter, error: type[BaseException]) -> None:
    spoil_weight(lm)
    raise error


@pytest.mark.parametrize("error", [Cancelled, ValueError, KeyboardInterrupt])
def test_an_exception_passes_through(error: type[BaseException]):
    pool = pool_of(Loader())
    with pytest.raises(error), pool.lease(ModelRef("gpt2")) as lm:
        raise error
    with pool.lease(ModelRef("gpt2")) as again:
        assert again is lm
    with pytest.raises(error) as caught, pool.lease(ModelRef("gpt2")) as lm:
        spoil_then_raise(lm, error)
    assert "weights changed" in caught.value.__notes__[0]
    assert pool.loaded() == ()


def test_a_failed_load_leaves_no_trace():
    class Failing(Loader):
        def __call__(self, entry, settings, report):
            if not self.loads:
                self.loads.append("failed")
                raise OSError("no")
            return super().__call__(entry, settings, report)

    pool = pool_of(Failing())
    with pytest.raises(OSError, match="no"), pool.lease(ModelRef("gpt2")):
        pass
    assert pool.loaded() == ()
    with pool.lease(ModelRef("gpt2")):
        pass


def test_only_the_catalogue_is_served():
    pool = pool_of(Loader())
    for name in ("gtp2", "../../etc", "/root/model", "someone/else"):
        with pytest.raises(UnknownName), pool.lease(ModelRef(name)):
            pass
    with pytest.raises(BadInput, match="revision"), pool.lease(ModelRef("gpt2", revision="other")):
        pass
    with pytest.raises(BadInput, match="dtype"), pool.lease(ModelRef("gpt2", dtype="int8")):
        pass


def test_another_dtype_is_another_model():
    pool = pool_of(Loader(), max_models=2)
    with pool.lease(ModelRef("gpt2")) as one, pool.lease(ModelRef("gpt2", dtype="bfloat16")) as two:
        assert one is not two
        assert two.ref == replace(one.ref, dtype="bfloat16")


def test_close_drops_what_nobody_holds():
    pool = pool_of(Loader(), max_models=2)
    with pool.lease(ModelRef("gpt2")):
        with pool.lease(ModelRef("llama")):
            pass
        pool.close()
        assert [ref.name for ref, _ in pool.loaded()] == ["gpt2"]
    pool.close()
    assert pool.loaded() == ()
