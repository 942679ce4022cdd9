from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mega_core import alarms as signs
from mega_core import stack as stacks
from mega_core.changes import Chain, MatrixDelta, PromptPrefix, WeightDelta
from mega_core.errors import BadInput, Busy, StoreError, UnknownName, UnsupportedMethod
from mega_core.events import Cancelled, silent
from mega_core.folders import alone
from mega_core.methods import METHODS
from mega_core.methods.base import Method
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest, MethodRef
from mega_core.service import Service
from mega_core.settings import Settings
from mega_core.stack import EditStack
from tests.methods.test_promises import SETTINGS
from tests.service.toy import TOY, write_catalogue
from tests.tiny import tiny

REQUESTS = (
    EditRequest("The Eiffel Tower", "Here we see {}", "Madrid", "Paris"),
    EditRequest("Mount Kenya", "Look at {}", "Rome", "Kenya"),
    EditRequest("France", "The capital of {} is", "Berlin", "Paris"),
)
FEW = {"steps": 2, "contexts": 2, "prompts": 2, "pool": 8, "k": 2}
"""Settings with which every method is quick; what it finds doesn't matter here."""


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS._entries, "toy", TOY)


def quick(method: Method[Any]) -> MethodRef:
    few = {knob.name: FEW[knob.name] for knob in method.knobs() if knob.name in FEW and knob.kind is int}
    return method.ref({**SETTINGS.get(method.name, {}), **few})


def toy(**params: Any) -> MethodRef:
    return TOY.ref({"strength": 0.1, **params})


def logits(lm: ModelAdapter) -> torch.Tensor:
    with torch.no_grad():
        return lm.last_logits(lm.encode(["The capital of France is", "Here we see The Eiffel Tower"]))


def three(lm: ModelAdapter) -> EditStack:
    stack = EditStack.empty(lm)
    for seed, request in enumerate(REQUESTS):
        stack = stack.add(lm, toy(layer=seed), [request], seed)
    return stack


@pytest.fixture
def saved(tiny_lm: Any, tmp_path: Path) -> Path:
    three(tiny_lm("gpt2")).save(tmp_path / "stack")
    return tmp_path / "stack"


# Adding, undoing -----------------------------------------------------------------------------------------------------


def test_any_edit_is_undone_as_if_it_had_never_been_applied(lm):
    stack = three(lm) if TOY.needs(lm.spec) is None else None
    if stack is None:
        with pytest.raises(UnsupportedMethod, match="toy does not know"):
            three(lm)
        return
    before, digest = logits(lm), lm.live_digest()
    for gone in range(3):
        less = stack.without(stack.edits[gone].name)
        kept = [edit.change for i, edit in enumerate(stack.edits) if i != gone]
        with less.applied(lm):
            found = logits(lm)
            assert lm.changes == kept
        with Chain(tuple(kept)).applied(lm):
            assert torch.equal(logits(lm), found)
        with stack.applied(lm):
            assert not torch.equal(logits(lm), found)
        assert [edit.change for edit in less.edits] == kept
    nothing = stack.without("toy-1").without("toy-3").without("toy-2")
    with nothing.applied(lm):
        assert torch.equal(logits(lm), before)
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])


def test_names_are_never_given_twice(tiny_lm):
    stack = three(tiny_lm("gpt2"))
    assert [edit.name for edit in stack.edits] == ["toy-1", "toy-2", "toy-3"]
    again = stack.without("toy-3").add(tiny_lm("gpt2"), toy(), REQUESTS[:1])
    assert [edit.name for edit in again.edits] == ["toy-1", "toy-2", "toy-4"]
    assert len(stack) == 3  # a value: what was made from it did not change it
    with pytest.raises(UnknownName, match="Did you mean 'toy-1'"):
        stack.without("toy1")


def test_an_edit_is_prepared_on_the_weights_of_the_earlier_ones_only(tiny_lm, monkeypatch):
    seen: list[list[Any]] = []

    def prepare(lm, requests, params, seed, report):
        seen.append(list(lm.changes))
        return TOY.prepare(lm, requests, params, seed, report)

    lm = tiny_lm("gpt2")
    monkeypatch.setitem(METHODS._entries, "toy", replace(TOY, prepare=prepare))
    stack = EditStack.empty(lm).add(lm, toy(), REQUESTS[:1])
    stack = stack.add(lm, METHODS["ike"].ref({"k": 0}), REQUESTS[1:2]).add(lm, toy(), REQUESTS[2:])
    assert seen == [[], [stack["toy-1"].change]]
    assert stack["toy-3"].on == ("toy-1",)
    with stack.applied(lm):
        assert len(lm.changes) == 3


def test_alphaedit_spares_the_keys_of_earlier_edits(tiny_lm):
    lm = tiny_lm("qwen3")
    ref = METHODS["alphaedit"].ref({**SETTINGS["alphaedit"], "steps": 5, "layers": "0-1"})
    stack = EditStack.empty(lm).add(lm, ref, REQUESTS[:1]).add(lm, ref, REQUESTS[1:2])
    alone = EditStack.empty(lm).add(lm, ref, REQUESTS[1:2])
    keys = stack.edits[0].change.keys[0].double()  # (n, d_mlp)

    def moved(edit: stacks.Edit) -> float:
        lowest = edit.change.matrices[0]
        return float((lowest.update(torch.device("cpu")).double() @ keys.T).norm() / lowest.norm())

    assert moved(stack.edits[1]) < moved(alone.edits[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "tooy"}, "no method"),
        ({"method": MethodRef("toy", 9)}, "version"),
        ({"method": MethodRef("toy", 1, (("layer", 99),))}, "toy.layer"),
        ({"requests": ()}, "requests"),
        ({"other": True}, "other weights"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_what_cannot_be_added_is_refused(tiny_lm, change, words):
    lm = tiny("gpt2", seed=1) if "other" in change else tiny_lm("gpt2")
    stack = EditStack.empty(tiny_lm("gpt2"))
    if "dtype" in change:
        stack = replace(stack, model=replace(stack.model, dtype=change["dtype"]))
    method = change.get("method", toy())
    method = MethodRef(method) if isinstance(method, str) else method
    with pytest.raises((BadInput, UnknownName), match=words) as caught:
        stack.add(lm, method, change.get("requests", REQUESTS[:1]))
    assert caught.value.next_step


def test_an_edit_is_not_prepared_on_top_of_a_strangers_change(tiny_lm):
    lm = tiny_lm("gpt2")
    stack = three(lm)
    with stack.applied(lm), pytest.raises(BadInput, match="unedited"):
        stack.add(lm, toy(), REQUESTS[:1])


def test_a_stop_or_a_failure_leaves_the_model_alone(tiny_lm):
    lm = tiny_lm("gpt2")
    stack, digest = three(lm), lm.live_digest()

    def stop(event: object) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        stack.add(lm, toy(), REQUESTS[:1], 0, stop)
    with pytest.raises(RuntimeError):
        stack.add(lm, toy(fail="error"), REQUESTS[:1])
    with pytest.raises(ZeroDivisionError), stack.applied(lm):
        raise ZeroDivisionError
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [method.name for method in METHODS])
def test_every_methods_change_comes_back_from_its_file(tiny_lm, name, tmp_path):
    """Also the test that every kind of change has a line in KINDS."""
    lm, method = tiny_lm("gpt2"), METHODS[name]
    if method.needs(lm.spec):
        pytest.skip(str(method.needs(lm.spec)))
    stack = EditStack.empty(lm).add(lm, quick(method), REQUESTS[:1], 3)
    stack.save(tmp_path / "stack")
    again = EditStack.load(tmp_path / "stack", lm)
    assert stacks.kind_of(again.edits[0].change) in stacks.KINDS
    assert (again.model, again.model_digest, again.made) == (stack.model, stack.model_digest, 1)
    first, second = stack.edits[0], again.edits[0]
    for part in ("name", "method", "requests", "seed", "on", "environment"):
        assert getattr(first, part) == getattr(second, part)
    plain, tensors = first.change.pack()
    assert json.loads(json.dumps(plain)) == json.loads(json.dumps(second.change.pack()[0]))
    assert tensors.keys() == second.change.pack()[1].keys()
    assert all(torch.equal(tensor, second.change.pack()[1][key]) for key, tensor in tensors.items())
    with stack.applied(lm):
        found = logits(lm)
    with again.applied(lm):
        assert torch.equal(logits(lm), found)


def test_the_classes_of_the_table_are_there():
    for kind in stacks.KINDS:
        cls = stacks.class_of(kind)
        assert callable(cls.unpack)
        assert callable(cls.pack)


def test_edits_of_all_families_stand_together(tiny_lm, tmp_path):
    lm = tiny_lm("gpt2")
    names = ("toy", "ike", "grace", "toy")
    stack = EditStack.empty(lm)
    for i, name in enumerate(names):
        stack = stack.add(lm, quick(METHODS[name]), [REQUESTS[i % 3]], i)
    stack.save(tmp_path / "stack")
    again = EditStack.load(tmp_path / "stack", lm)
    digest = lm.live_digest()
    for gone in (None, "toy-1", "ike-2", "grace-3", "toy-4"):
        pair = [s if gone is None else s.without(gone) for s in (stack, again)]
        found = []
        for one in pair:
            with one.applied(lm):
                found.append(logits(lm))
        assert torch.equal(*found)
    assert (lm.live_digest(), lm.hook_count(), lm.changes, lm.prefix) == (digest, 0, [], None)
    assert set(stack.summary()["kind"]) == {"weights", "memory", "prompt"}


def test_an_empty_stack_is_a_stack(tiny_lm, tmp_path):
    lm = tiny_lm("gpt2")
    EditStack.empty(lm).save(tmp_path / "stack")
    again = EditStack.load(tmp_path / "stack", lm)
    assert len(again) == 0
    with again.applied(lm):
        assert lm.changes == []


def test_saving_again_replaces_the_stack_and_leaves_two_files(tiny_lm, saved):
    lm = tiny_lm("gpt2")
    EditStack.load(saved, lm).without("toy-2").save(saved)
    assert sorted(path.suffix for path in saved.iterdir()) == [".json", ".safetensors"]
    assert [edit.name for edit in EditStack.load(saved, lm).edits] == ["toy-1", "toy-3"]
    assert [path.name for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def test_a_stack_can_be_read_without_its_model(tiny_lm, saved):
    lm = tiny_lm("gpt2")
    assert len(EditStack.load(saved, lm.file_digest)) == 3
    with pytest.raises(BadInput, match="other weights"):
        EditStack.load(saved, "f" * 64)
    rows = stacks.headline(saved)["edits"]
    assert [row["name"] for row in rows] == ["toy-1", "toy-2", "toy-3"]
    assert rows[1]["method"]["params"] == {"fail": "no", "layer": 1, "sleep": 0.0, "strength": 0.1}
    assert rows[1]["environment"]["torch"] == torch.__version__


def test_a_stack_of_another_model_is_refused(tiny_lm, saved):
    for other in (tiny("gpt2", seed=1), tiny_lm("qwen3")):
        with pytest.raises(BadInput, match="was made for tiny-gpt2"):
            EditStack.load(saved, other)
        with pytest.raises(BadInput, match="was made for tiny-gpt2"), three(tiny_lm("gpt2")).applied(other):
            pass


def test_a_model_without_files_is_known_by_its_parameters(tmp_path):
    lm = tiny("gpt2")
    lm.file_digest = ""
    stack = three(lm)
    stack.save(tmp_path / "stack")
    with EditStack.load(tmp_path / "stack", lm).applied(lm):
        assert len(lm.changes) == 3
    with torch.no_grad():
        lm.weight(0, "mlp_down").add_(1)
    with pytest.raises(BadInput, match="other weights"):
        EditStack.load(tmp_path / "stack", lm)


def _rewrite(folder: Path, edit: Any) -> None:
    """Change the header as somebody would who knows the checksum."""
    path = folder / stacks.HEADER
    header = json.loads(path.read_text(encoding="utf-8"))
    edit(header)
    header["checksum"] = stacks._checksum(header)
    path.write_text(json.dumps(header), encoding="utf-8")


def _retensor(folder: Path, edit: Any) -> None:
    """Change the tensors likewise."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    data = path.read_bytes()

    def relist(header: dict[str, Any]) -> None:
        header["tensors"] |= {"sha256": sha256(data).hexdigest(), "bytes": len(data)}

    _rewrite(folder, relist)


HEADERS = {
    "unknown kind": (lambda h: h["edits"][0].update(kind="os:system"), "unknown kind 'os:system'"),
    "other class": (lambda h: h["edits"][0].update(kind="steering"), "change of toy-1"),
    "path": (lambda h: h["tensors"].update(file="../../etc/passwd"), "not listed"),
    "absent": (lambda h: h["tensors"].update(file=f"tensors-{'0' * 16}.safetensors"), "missing"),
    "hash": (lambda h: h["tensors"].update(sha256="0" * 64), "damaged"),
    "size": (lambda h: h["tensors"].update(bytes=7), "bytes instead of 7"),
    "newer": (lambda h: h.update(schema_version=99), "schema 99"),
    "no edits": (lambda h: h.pop("edits"), "edits"),
    "edits of text": (lambda h: h.update(edits=["x"]), "edits"),
    "twice": (lambda h: h["edits"][1].update(name="toy-1"), "one name"),
    "name": (lambda h: h["edits"][1].update(name="../x"), "can't be read"),
    "subject": (lambda h: h["edits"][1]["requests"][0].update(subject="a\nb"), "subject"),
    "request": (lambda h: h["edits"][1]["requests"][0].update(hidden=1), "can't be read"),
    "param": (lambda h: h["edits"][1]["method"]["params"].update(layer=[1]), "can't be read"),
    "model": (lambda h: h.update(model=["x"]), "header"),
    "layer": (lambda h: h["edits"][0]["change"]["matrices"][0].update(layer=99), "does not fit"),
    "negative layer": (lambda h: h["edits"][0]["change"]["matrices"][0].update(layer=-1), "does not fit"),
    "site": (lambda h: h["edits"][0]["change"]["matrices"][0].update(site="head"), "does not fit"),
    "norm": (lambda h: h["edits"][0]["change"]["matrices"][0].update(base_norm="x"), "change of toy-1"),
    "fewer": (lambda h: h["edits"].pop(), "belongs to no edit"),
    "matrices": (lambda h: h["edits"][0]["change"].update(matrices=[]), "change of toy-1"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_foreign_header_is_refused_in_words(tiny_lm, saved, case):
    edit, words = HEADERS[case]
    _rewrite(saved, edit)
    lm = tiny_lm("gpt2")
    with pytest.raises(BadInput, match=words) as caught:
        EditStack.load(saved, lm)
    assert "\n" not in str(caught.value)
    assert lm.changes == []


TENSORS = {
    "shape": (lambda t: t.update({"0/0.left": torch.zeros(5, 1)}), "shape"),
    "rank": (lambda t: t.update({"0/0.left": t["0/0.left"].repeat(1, 2)}), "rank"),
    "huge rank": (lambda t: t.update({"0/0.left": torch.zeros(32, 999), "0/0.right": torch.zeros(56, 999)}), "rank"),
    "flat": (lambda t: t.update({"0/0.left": torch.zeros(32)}), "shape|fit|can't be read"),
    "missing": (lambda t: t.pop("0/0.left"), "change of toy-1"),
    "extra": (lambda t: t.update({"0/9.left": torch.zeros(2)}), "change of toy-1"),
    "of nobody": (lambda t: t.update({"7/x": torch.zeros(2)}), "belongs to no edit"),
    "not a number": (lambda t: t["0/0.left"].fill_(float("nan")), "infinite or missing"),
    "keys": (lambda t: t.update({"0/keys.0": torch.zeros(2, 3)}), "keys of the shape"),
    "keys of no layer": (lambda t: t.update({"0/keys.77": torch.zeros(2, 56)}), "layer 77"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_foreign_tensors_are_refused_in_words(tiny_lm, saved, case):
    edit, words = TENSORS[case]
    _retensor(saved, edit)
    with pytest.raises(BadInput, match=words):
        EditStack.load(saved, tiny_lm("gpt2"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [_cut, _flip, Path.unlink, lambda path: path.write_bytes(b"\x80\x04N.")])
@pytest.mark.parametrize("file", ["*.json", "*.safetensors"])
def test_a_damaged_file_is_refused(tiny_lm, saved, harm, file):
    (path,) = saved.glob(file)
    harm(path)
    with pytest.raises(BadInput) as caught:
        EditStack.load(saved, tiny_lm("gpt2"))
    assert caught.value.next_step


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 100_000, '{"format": "edit-anatomy stack", "schema_version": 1}']
)
def test_a_file_that_is_no_header_is_refused(tiny_lm, saved, text):
    (saved / stacks.HEADER).write_text(text, encoding="utf-8")
    with pytest.raises(BadInput):
        EditStack.load(saved, tiny_lm("gpt2"))
    with pytest.raises(BadInput):  # nor is it overwritten
        three(tiny_lm("gpt2")).save(saved)


def test_a_stack_is_written_whole_or_not_at_all(tiny_lm, tmp_path, monkeypatch):
    lm = tiny_lm("gpt2")
    stack = three(lm)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear", encoding="utf-8")
    for target, words in ((tmp_path / "mine", "not empty"), (tmp_path / "no" / "where", "no folder")):
        with pytest.raises(BadInput, match=words):
            stack.save(target)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    stack.save(tmp_path / "old")
    with monkeypatch.context() as patch:
        patch.setattr("mega_core.folders.os.fsync", full)
        for target in (tmp_path / "new", tmp_path / "old"):
            with pytest.raises(StoreError, match="No space left"):
                stack.without("toy-1").save(target)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["mine", "old"]
    assert len(EditStack.load(tmp_path / "old", lm)) == 3
    shutil.rmtree(tmp_path / "old")
    (tmp_path / "old").mkdir()
    stack.save(tmp_path / "old")  # an empty folder is taken


def test_numbers_that_are_none_are_not_saved(tiny_lm, tmp_path):
    lm = tiny_lm("gpt2")
    stack = three(lm)
    bad = WeightDelta((MatrixDelta(0, "mlp_down", torch.full((32, 1), float("nan")), torch.ones(56, 1), 1.0),))
    stack = replace(stack, edits=(replace(stack.edits[0], change=bad),))
    with pytest.raises(StoreError, match="infinite or missing"):
        stack.save(tmp_path / "stack")
    assert not (tmp_path / "stack").exists()


def test_a_kind_without_a_line_is_named():
    class Strange:
        pass

    with pytest.raises(StoreError, match="Strange"):
        stacks.kind_of(Strange())  # type: ignore[arg-type]


def test_only_one_at_a_time_changes_a_folder(tmp_path):
    """Asked from another thread: a lock of the same process counts too, because each opens the folder anew."""
    from threading import Thread

    found: list[str] = []

    def other() -> None:
        try:
            with alone(tmp_path, "stack"):
                found.append("in")
        except Busy as error:
            found.append(str(error))

    with alone(tmp_path, "stack"):
        thread = Thread(target=other)
        thread.start()
        thread.join()
    assert "another process" in found[0]
    other()
    assert found[1:] == ["in"]
    with alone(tmp_path / "not there", "stack"):
        pass


# The service ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    catalogue = write_catalogue(tmp_path / "models", little="gpt2")
    env = {"MEGA_CACHE_DIR": str(tmp_path / "cache"), "MEGA_MODELS": str(catalogue), "MEGA_DEVICE": "cpu"}
    with Service.open(Settings.read(env)) as opened:
        yield opened


def test_several_facts_in_one_question(service):
    plan = service.plan_several("little", "toy", REQUESTS, {"strength": 0.1}, (), 3)
    assert plan.requests == REQUESTS
    assert service.plan_several("little", "toy", REQUESTS[:1], views=(), seed=3) == service.plan(
        "little", "toy", "The Eiffel Tower", "Here we see {}", "Madrid", "Paris", views=(), seed=3
    )
    report = service.run(plan)
    assert report.receipt.restored
    assert set(report.frames["metrics"]["case"]) == {0, 1, 2}
    for requests, words in (((), "no edit"), (REQUESTS * 2, "number 4"), (REQUESTS * 50, "limit")):
        with pytest.raises(BadInput, match=words):
            service.plan_several("little", "toy", requests)


def test_known_facts_bring_their_prompts_in_a_batch_too(service):
    from mega_core.embedded.examples import candidates

    asked = [request for request, _ in zip(candidates(3), range(3), strict=False)]
    bare = [replace(request, target_true=None, paraphrases=(), neighbours=()) for request in asked]
    assert service.plan_several("atlas-gpt2", "toy", bare).requests == tuple(asked)


def test_a_stack_and_an_export_through_the_service(service, tmp_path):
    plan = service.plan_several("little", "toy", REQUESTS[:2], {"strength": 0.1}, ())
    before = service.condition("little")
    assert service.stacks.add(tmp_path / "stack", plan) == "toy-1"
    assert service.stacks.add(tmp_path / "stack", plan) == "toy-2"
    checked = service.stacks.check(tmp_path / "stack")
    assert [held.edit for held in checked.held] == ["toy-1", "toy-1", "toy-2", "toy-2"]
    assert checked.receipt.restored
    assert set(checked.raised) <= set(checked.signs)
    service.stacks.export_stack(tmp_path / "stack", tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "edit.json").read_text(encoding="utf-8"))["edits"]) == 2
    assert [edit.name for edit in service.stacks.undo(tmp_path / "stack", "toy-1")] == ["toy-2"]
    assert service.condition("little") == before
    with alone(tmp_path / "stack", "stack"), pytest.raises(Busy):
        service.stacks.add(tmp_path / "stack", plan)


# Alarms --------------------------------------------------------------------------------------------------------------


def delta(lm: ModelAdapter, size: float) -> WeightDelta:
    """A random direction of `size` times the matrix's norm."""
    weight = lm.read_weight(1, "mlp_down")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 1, generator=generator) for n in weight.shape)
    norm = float(weight.norm())
    scale = size * norm / float(left.norm() * right.norm())
    return WeightDelta((MatrixDelta(1, "mlp_down", scale * left, right, norm),))


def test_a_text_in_front_is_no_damage(lm: ModelAdapter) -> None:
    """Behind a stated fact any other text is less expected."""
    found = signs.alarms(lm, PromptPrefix("New fact: the sky is green. "), before=1.0, after=9.0)
    assert [alarm.name for alarm in found if alarm.raised] == []
    assert any(alarm.name == "perplexity" and alarm.value > 8 for alarm in found)


def test_a_quiet_edit_raises_nothing_and_a_loud_one_does(lm):
    digest = lm.live_digest()
    quiet = signs.alarms(lm, delta(lm, 1e-4), REQUESTS[:1])
    assert [alarm.name for alarm in quiet] == ["finite", "relative_norm", "key_match", "perplexity"]
    by = {alarm.name: alarm for alarm in quiet}
    assert by["relative_norm"].value == pytest.approx(1e-4, rel=1e-3)
    assert by["perplexity"].value == pytest.approx(1, abs=1e-2)
    assert not any(by[name].raised for name in ("finite", "relative_norm", "perplexity"))
    loud = {alarm.name: alarm for alarm in signs.alarms(lm, delta(lm, 1e4), REQUESTS[:1])}
    assert loud["relative_norm"].raised
    assert loud["perplexity"].value != 1
    assert all(alarm.text.endswith(".") for alarm in (*quiet, *loud.values()))
    assert (lm.live_digest(), lm.changes) == (digest, [])


def test_numbers_that_are_none_are_an_alarm_and_every_value_is_one(tiny_lm):
    lm = tiny_lm("gpt2")
    for size in (float("nan"), float("inf")):
        found = {alarm.name: alarm for alarm in signs.alarms(lm, delta(lm, size))}
        assert found["finite"].raised
        assert found["perplexity"].raised
        json.dumps([alarm.value for alarm in found.values()], allow_nan=False)


def test_perplexity_is_that_of_reading_row_by_row(tiny_lm):
    lm = tiny_lm("llama")
    total, count = 0.0, 0
    for text in signs.TEXT:
        batch = lm.encode([text])
        batch = replace(batch, ids=batch.ids[:, : signs.LONGEST_ROW], mask=batch.mask[:, : signs.LONGEST_ROW])
        with torch.no_grad():
            logs = lm.model(input_ids=batch.ids).logits.double().log_softmax(-1)[0, :-1]
        total -= float(logs.gather(-1, batch.ids[0, 1:, None]).sum())
        count += batch.ids.shape[1] - 1
    assert signs.perplexity(lm) == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-4)


def test_the_key_match_is_that_of_the_change(tiny_lm):
    """One along the prompt's own key lands on it in full and on the mean of the contexts in part."""
    lm = tiny_lm("gpt2")
    request = REQUESTS[2]
    keys = signs._keys(lm, 1, request)
    across = keys.mean(0) - (keys.mean(0) @ keys[0]) / (keys[0] @ keys[0]) * keys[0]
    for key, match in ((keys[0] + keys.mean(0), None), (across, 0.0)):
        change = WeightDelta((MatrixDelta(1, "mlp_down", torch.ones(32, 1), key[:, None].float(), 1.0),))
        found = signs.key_match(lm, change, [request])
        shares = [float(key @ keys[0]), float(key @ keys.mean(0))]
        expected = shares[0] * shares[1] / max(s**2 for s in shares)
        assert found == pytest.approx(expected if match is None else match, abs=1e-3)
    assert signs.key_match(lm, change, ()) is None
    assert signs.key_match(lm, METHODS["ike"].prepare(lm, [request], METHODS["ike"].read(
        METHODS["ike"].ref({"k": 0})), 0, silent), [request]) is None  # fmt: skip


def test_a_stack_has_alarms_too_and_known_perplexities_are_not_measured_again(tiny_lm, monkeypatch):
    lm = tiny_lm("gpt2")
    stack = three(lm)
    before = signs.perplexity(lm)
    with stack.applied(lm):
        after = signs.perplexity(lm)
    found = signs.alarms(lm, stack, stack.requests)
    monkeypatch.setattr(signs, "perplexity", None)
    assert signs.alarms(lm, stack, stack.requests, before=before, after=after) == found
    assert sum(alarm.name == "relative_norm" for alarm in found) == 3
