"""A person's stack: added to, checked and undone by jobs, kept on disk, nobody else's."""

from __future__ import annotations

import json
from io import BytesIO
from zipfile import ZipFile

import pytest

from mega_core.errors import ActionableError, BadInput, UnknownName
from mega_core.service import Service, StackCheck, stacks

ME, YOU = "o" * 32, "p" * 32


def plan(service: Service, new: str = "Rome", seed: int = 0):
    return service.plan(
        "little", "toy", "Eiffel Tower", "{} stands in", new, "Paris", params={"strength": 0.1}, views=(), seed=seed
    )


def done(service: Service, job: str):
    view = service.wait(job, 60)
    if view.error is not None:
        raise ActionableError(view.error.what, view.error.next_step)
    return service.result(job, ME)


def test_edits_are_added_checked_and_undone_and_the_model_is_as_before(service):
    service.run(plan(service))
    before = service.condition("little")
    assert service.stacks.mine("little", ME) == ()
    names = [done(service, service.stacks.start_add(plan(service, seed=seed), ME)) for seed in (0, 1)]
    assert names == ["toy-1", "toy-2"]
    edits = service.stacks.mine("little", ME)
    assert [edit.name for edit in edits] == names
    assert stacks.holds(edits[0], plan(service))
    assert not stacks.holds(edits[0], plan(service, seed=1))
    assert edits == service.stacks.edits(service.stacks.folder("little", ME))  # the quick reading is the strict one
    check = done(service, service.stacks.start_check("little", ME))
    assert isinstance(check, StackCheck)
    assert [held.edit for held in check.held] == names
    assert check.receipt.restored
    left = done(service, service.stacks.start_undo("little", "toy-1", ME))
    assert [edit.name for edit in left] == ["toy-2"] == [edit.name for edit in service.stacks.mine("little", ME)]
    assert service.condition("little") == before


def test_a_stack_is_its_owners_and_outlives_the_app(service, settings):
    done(service, service.stacks.start_add(plan(service), ME))
    assert service.stacks.mine("little", YOU) == ()
    folder = service.stacks.folder("little", ME)
    assert ME not in str(folder)
    assert folder.parent.stat().st_mode & 0o077 == 0
    service.close()
    with Service.open(settings) as again:
        assert [edit.name for edit in again.stacks.mine("little", ME)] == ["toy-1"]


def test_two_windows_adding_at_once_both_get_their_edit(service):
    jobs = [service.stacks.start_add(plan(service, seed=seed), ME) for seed in (0, 1)]
    assert [done(service, job) for job in jobs] == ["toy-1", "toy-2"]
    same = [service.stacks.start_add(plan(service, seed=2), ME) for _ in range(2)]
    assert same[0] == same[1]
    done(service, same[0])
    assert len(service.stacks.mine("little", ME)) == 3


def test_what_cannot_be_done_is_told(service, monkeypatch):
    done(service, service.stacks.start_add(plan(service), ME))
    with pytest.raises(BadInput, match="in it already"):
        service.stacks.start_add(plan(service), ME)
    with pytest.raises(ActionableError, match="toy-9"):
        done(service, service.stacks.start_undo("little", "toy-9", ME))
    monkeypatch.setattr(stacks, "MAX_STACKED", 1)
    with pytest.raises(BadInput, match="Undo one first"):
        service.stacks.start_add(plan(service, seed=1), ME)
    with pytest.raises(UnknownName):
        service.stacks.mine("../../etc", ME)


@pytest.mark.parametrize("damage", ["{", "[]", '{"edits": [1]}', '{"edits": [{"name": "a"}]}'])
def test_a_damaged_stack_is_told_and_can_be_removed(service, damage):
    done(service, service.stacks.start_add(plan(service), ME))
    folder = service.stacks.folder("little", ME)
    (folder / stacks.HEADER).write_text(damage)
    with pytest.raises(BadInput, match="can't be read"):
        service.stacks.mine("little", ME)
    done(service, service.stacks.start_removal("little", ME))
    assert service.stacks.mine("little", ME) == ()
    assert not folder.exists()
    assert done(service, service.stacks.start_add(plan(service), ME)) == "toy-1"


def test_the_zip_is_a_folder_for_the_command_line(service, tmp_path):
    with pytest.raises(BadInput, match="there is none"):
        service.stacks.packed("little", ME)
    done(service, service.stacks.start_add(plan(service), ME))
    with ZipFile(BytesIO(service.stacks.packed("little", ME))) as box:
        assert json.loads(box.read("stack.json"))["edits"][0]["name"] == "toy-1"
        box.extractall(tmp_path / "copy")
    assert [edit.name for edit in service.stacks.edits(tmp_path / "copy")] == ["toy-1"]


def test_a_failing_method_leaves_the_stack_as_it_was(service):
    done(service, service.stacks.start_add(plan(service), ME))
    bad = service.plan("little", "toy", "Big Ben", "{} stands in", "Rome", params={"fail": "error"}, views=())
    with pytest.raises(ActionableError):
        done(service, service.stacks.start_add(bad, ME))
    assert len(service.stacks.mine("little", ME)) == 1
