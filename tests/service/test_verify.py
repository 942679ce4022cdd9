"""Verification in the background: a job like any other, whose result is a table of effects."""

from __future__ import annotations

from typing import Any

from mega_core.service import Service

OWNER, OTHER = "o" * 32, "p" * 32


def start(service: Service, cells: list[str], **asked: Any) -> str:
    plan = service.plan("little", "toy", "France", "The capital of {} is", "Rome", "Paris", views=())
    return service.studies.start_verify(plan, cells, owner=asked.pop("owner", OWNER), controls=2, **asked)


def test_a_verification_is_a_job_with_a_table(service: Service) -> None:
    job = start(service, ["attn:1"])
    view = service.wait(job, 120)
    assert view.state == "done", view.error
    assert (view.kind, view.model) == ("verify", "little")
    found = service.result(job, OWNER)
    assert found.receipt.restored
    assert set(found.table["candidate"]) == {"new", "true"}
    assert (found.table["cells"] == "attn:1").all()
    assert (found.table["controls"] == 2).all()


def test_other_cells_and_actions_are_other_work(service: Service) -> None:
    first, same, cell, action = (
        service.job(start(service, cells, action=action, owner=owner), owner).digest
        for cells, action, owner in (
            (["attn:1"], "ablate", "a" * 32),
            (["attn:1"], "ablate", "b" * 32),
            (["attn:0"], "ablate", "c" * 32),
            (["attn:1"], "patch", "d" * 32),
        )
    )
    assert first == same
    assert len({first, cell, action}) == 3


def test_a_cell_the_model_has_not_got_is_told(service: Service) -> None:
    view = service.wait(start(service, ["attn:99"]), 120)
    assert view.state == "failed"
    assert view.error is not None
    assert "layer 99" in view.error.what
