from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError, replace

import pytest

from mega_core.embedded import facts
from mega_core.errors import (
    BadInput,
    Busy,
    ModelUnavailable,
    OutOfMemory,
    UnknownName,
    UnsupportedMethod,
)
from mega_core.events import Cancelled, Finished, Started
from mega_core.service import PROMISES, Service
from mega_core.service.core import Core
from mega_core.store import Store
from tests.conftest import ROOT

FRANCE = {"subject": "France", "template": "The capital of {} is", "target_new": "Rome", "target_true": "Paris"}
PROMPTS = {"paraphrases": ("Paris? The capital of France is",), "neighbours": ("The capital of Italy is",)}


def make_plan(service: Service, seed: int = 0, **params: object):
    return service.plan("little", "toy", **FRANCE, **PROMPTS, params=params, views=(), seed=seed)


def finished(service: Service, job: str):
    view = service.wait(job, 120)
    assert view.over
    return view


# What there is -------------------------------------------------------------------------------------------------------


def test_importing_the_service_does_not_import_torch():
    code = (
        "import sys, mega_core.service, mega_core.__main__; "
        "bad = {'torch', 'transformers', 'streamlit'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_looking_around_does_not_import_torch():
    code = (
        "import sys\n"
        "from mega_core.service import Service\n"
        "with Service.open() as service:\n"
        "    models = service.models()\n"
        "    for model in models: service.methods(model.name); service.facts(model.name)\n"
        "    service.examples(); service.status(); service.runs(); service.cached('0' * 64)\n"
        "    service.suggest('gpt2', 1)\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_models_on_this_machine_come_first_and_missing_ones_say_how(service):
    infos = service.models()
    assert [info.available for info in infos] == sorted((info.available for info in infos), reverse=True)
    little = service.model("little")
    assert (little.available, little.reason, little.how, little.architecture) == (True, "", "", "gpt2")
    assert 0 < little.parameters < 200_000  # counted in the file: the catalogue doesn't say
    for info in infos:
        assert info.available or (info.reason and info.how)
        with pytest.raises(FrozenInstanceError):
            info.name = "other"


def test_methods_carry_the_models_own_defaults(service):
    toy = next(info for info in service.methods("little") if info.name == "toy")
    assert {knob.name: knob.default for knob in toy.knobs} == {"layer": 2, "strength": 0.5, "sleep": 0.0, "fail": "no"}
    assert toy.unsupported is None
    assert dict(make_plan(service).method.params)["layer"] == 2
    assert dict(make_plan(service, layer=0).method.params)["layer"] == 0


def test_a_method_that_cannot_edit_a_model_says_why(service):
    toy = next(info for info in service.methods("refused") if info.name == "toy")
    assert toy.unsupported == "the toy does not know this family"
    with pytest.raises(UnsupportedMethod, match="does not know this family"):
        service.plan("refused", "toy", **FRANCE)


def test_facts_belong_to_embedded_models(service):
    assert service.facts("little") == ()
    atlas = service.facts("atlas-gpt2")
    assert len(atlas) == len(facts.facts())
    assert {"subject", "relation", "object", "templates"} <= set(atlas[0])


def test_surprise_me_is_repeatable(service):
    assert service.suggest("atlas-gpt2", 5) == service.suggest("atlas-gpt2", 5)
    assert len({service.suggest("atlas-gpt2", seed) for seed in range(10)}) == 10


def test_examples_that_cannot_be_read_are_a_notice_not_an_error(service, tmp_path, monkeypatch):
    from mega_core.embedded import examples

    (tmp_path / "index.json").write_text("{", encoding="utf-8")
    monkeypatch.setattr(examples, "FOLDER", tmp_path)
    monkeypatch.setattr("mega_core.embedded.examples.load", lambda: examples._read(tmp_path, 0, 0))
    assert service.examples() == ()
    assert any("examples" in notice for notice in service.status().notices)


# Planning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "litle"}, UnknownName, "little"),
        ({"method": "tooy"}, UnknownName, "toy"),
        ({"views": ("module_score",)}, UnknownName, "module_scores"),
        ({"subject": ""}, BadInput, "subject"),
        ({"template": "no place"}, BadInput, "template"),
        ({"template": "The capital of France is"}, BadInput, "{}"),
        ({"target_new": "paris"}, BadInput, "target_new"),
        ({"params": {"layer": 99}}, BadInput, "toy.layer"),
        ({"params": {"layers": 1}}, BadInput, "strength"),
        ({"params": {"layer": "x"}}, BadInput, "toy.layer"),
        ({"seed": -1}, BadInput, "seed"),
        ({"seed": True}, BadInput, "seed"),
        ({"seed": "1"}, BadInput, "seed"),
        ({"neighbours": ("x",) * 33}, BadInput, "neighbours"),
    ],
)
def test_bad_input_names_the_field_and_the_way_out(service, changes, error, words):
    asked = {"model": "little", "method": "toy", **FRANCE, **changes}
    with pytest.raises(error, match=words) as caught:
        service.plan(**asked)
    assert caught.value.next_step


def test_a_known_fact_brings_its_prompts_on_an_embedded_model(service):
    fact = facts.find("Eiffel Tower", "landmark_city")
    plan = service.plan("atlas-gpt2", "toy", "Eiffel Tower", fact.templates_edit[0], "Rome")
    (request,) = plan.requests
    assert request.target_true == "Paris"
    assert set(request.paraphrases) == {fact.prompt(template) for template in fact.templates_held_out}
    assert request.neighbours
    own = service.plan("atlas-gpt2", "toy", "Eiffel Tower", fact.templates_edit[0], "Rome", paraphrases=("Mine is",))
    assert own.requests[0].paraphrases == ("Mine is",)
    assert own.requests[0].neighbours == request.neighbours


@pytest.mark.parametrize(
    ("model", "subject", "target_new", "target_true"),
    [
        ("little", "Eiffel Tower", "Rome", ""),
        ("atlas-gpt2", "Tower of Nobody", "Rome", ""),
        ("atlas-gpt2", "Eiffel Tower", "Paris", ""),
        ("atlas-gpt2", "Eiffel Tower", "Rome", "London"),
    ],
)
def test_otherwise_nothing_is_added(service, model, subject, target_new, target_true):
    template = facts.find("Eiffel Tower", "landmark_city").templates_edit[0]
    (request,) = service.plan(model, "toy", subject, template, target_new, target_true).requests
    assert (request.paraphrases, request.neighbours) == ((), ())
    assert request.target_true == (target_true or None)


def test_the_digest_is_the_question(service):
    base = service.digest(make_plan(service))
    assert service.digest(make_plan(service)) == base
    others = [make_plan(service, seed=1), make_plan(service, strength=0.6), replace(make_plan(service), views=("x",))]
    assert len({base, *map(service.digest, others)}) == 4


def test_a_model_that_is_not_here_has_no_digest(service):
    missing = next(info.name for info in service.models() if not info.available and not info.embedded)
    with pytest.raises(ModelUnavailable, match=missing):
        service.digest(service.plan(missing, "toy", **FRANCE))


# Answering -----------------------------------------------------------------------------------------------------------


def test_a_run_gives_a_report_that_is_stored_and_reopened(service, settings):
    plan = make_plan(service)
    report = service.run(plan)
    assert report.digest == service.digest(plan)
    assert report.question == plan
    assert report.receipt.restored
    assert set(report.timing) == {"before", "edit", "after", "restore"}
    assert service.cached(report.digest) is not None
    with Service.open(settings) as later:
        again = later.report(report.digest)
    assert again.to_bytes() == report.to_bytes()


def test_the_same_run_again_is_not_computed(service, monkeypatch):
    first = service.run(make_plan(service))
    monkeypatch.setattr(Core, "pool", lambda self: pytest.fail("a stored answer needs no model"))
    assert service.run(make_plan(service)).to_bytes() == first.to_bytes()


def test_fresh_computes_and_gives_the_same_numbers(service):
    first = service.run(make_plan(service))
    second = service.run(make_plan(service), fresh=True)
    assert second.timing != first.timing
    for name, frame in first.frames.items():
        assert frame.equals(second.frames[name]), name


def test_statistics_of_the_unedited_model_are_shared_through_the_store(service):
    seen = []

    def probe(lm, requests, params, seed, report):
        seen.append(lm.memo.get_arrays("statistics"))
        import numpy as np

        lm.memo.put_arrays("statistics", {"moment": np.eye(2)})
        return type(service)._prepare(lm, requests, params, seed, report)

    from mega_core.methods.base import METHODS
    from tests.service.toy import prepare

    type(service)._prepare = staticmethod(prepare)
    METHODS._entries["toy"] = replace(METHODS["toy"], prepare=probe)
    try:
        service.run(make_plan(service))
        service.run(make_plan(service, seed=1))
    finally:
        del type(service)._prepare
    assert seen[0] is None
    assert seen[1]["moment"].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_a_submitted_question_runs_in_a_worker_and_enters_the_history(service):
    job = service.submit(make_plan(service), "anna")
    view = finished(service, job)
    assert view.state == "done"
    assert view.digest == service.digest(make_plan(service))
    (entry,) = service.runs(session="anna")
    assert entry.run.digest == view.digest
    assert entry.run.metrics["argmax.accuracy"] in (0.0, 1.0)
    assert entry.run.verdict in ("works", "leaks", "narrow", "fails")
    assert service.runs(session="berta") == []


def test_everybody_who_asked_finds_the_run_in_their_history(service):
    plan = make_plan(service, sleep=0.1)
    jobs = [service.submit(plan, owner) for owner in ("anna", "berta", "clara")]
    service.cancel(jobs[2], "clara")
    for job in jobs[:2]:
        assert finished(service, job).state == "done"
    assert service.cached(service.digest(plan)) is not None
    assert [len(service.runs(session=owner)) for owner in ("anna", "berta", "clara")] == [1, 1, 0]
    assert service.count_runs() == 1


def test_a_job_is_its_owners(service):
    job = service.submit(make_plan(service), "anna")
    for intrusion in (service.job, service.cancel):
        with pytest.raises(UnknownName):
            intrusion(job, "berta")
    finished(service, job)
    with pytest.raises(UnknownName):
        service.answer(job, "berta")
    with pytest.raises(BadInput, match="not a prompt"):
        service.answer(job, "anna")


def test_one_person_cannot_fill_the_queue(service):
    jobs = [service.submit(make_plan(service, seed=seed, sleep=1.0), "anna") for seed in range(2)]
    with pytest.raises(Busy):
        service.submit(make_plan(service, seed=9), "anna")
    assert service.submit(make_plan(service, seed=1, sleep=1.0), "anna") == jobs[1]
    for job in jobs:
        service.cancel(job, "anna")
    assert service.digest(make_plan(service, seed=9)) not in service._askers


def test_cancelling_leaves_nothing_behind(service):
    base = service.condition("little")
    job = service.submit(make_plan(service, sleep=1.0), "anna")
    while not service.job(job, "anna").stages:
        threading.Event().wait(0.01)
    assert service.cancel(job, "anna").state == "cancelled"
    assert service.condition("little") == base
    assert service.cached(service.digest(make_plan(service, sleep=1.0))) is None
    assert service.runs() == []


@pytest.mark.parametrize(("fail", "code"), [("error", "internal"), ("memory", "out_of_memory")])
def test_a_failure_is_told_without_details_and_leaves_nothing_behind(service, fail, code):
    base = service.condition("little")
    view = finished(service, service.submit(make_plan(service, fail=fail), "anna"))
    assert (view.state, view.error.code) == ("failed", code)
    assert "secret" not in f"{view.error}"
    assert bool(view.error.error_id) == (code == "internal")
    assert service.condition("little") == base
    assert service.cached(view.digest) is None
    assert service.runs() == []


def test_out_of_memory_is_an_error_that_helps(service):
    with pytest.raises(OutOfMemory) as caught:
        service.run(make_plan(service, fail="memory"))
    assert caught.value.next_step


def test_a_run_that_is_not_saved_fails_loudly_only_when_the_store_breaks(service, monkeypatch):
    monkeypatch.setattr(
        Store, "put_report", lambda self, report: False
    )  # a full disk: told by health(), not by the run
    assert service.run(make_plan(service)).receipt.restored


def test_a_notebook_that_cannot_be_written_costs_nobody_the_result(service, monkeypatch):
    from mega_core.errors import StoreError
    from mega_core.notebook import Notebook

    def refuse(self, run):
        raise StoreError("The notebook is full.", "Make room.")

    monkeypatch.setattr(Notebook, "add_run", refuse)
    view = finished(service, service.submit(make_plan(service), "anna"))
    assert view.state == "done"
    assert service.cached(view.digest) is not None
    assert any("notebook is full" in notice for notice in service.status().notices)


def test_events_reach_the_caller_and_a_reporter_can_cancel(service):
    events = []
    service.run(make_plan(service), events.append)
    started = [event.stage for event in events if isinstance(event, Started)]
    assert [stage for stage in started if stage in ("before", "edit", "after", "restore")] == [
        "before", "edit", "after", "restore",
    ]  # fmt: skip
    base = service.condition("little")

    def stop(event):
        if event == Finished("toy"):
            raise Cancelled

    with pytest.raises(Cancelled):
        service.run(make_plan(service, seed=3), stop)
    assert service.condition("little") == base


def test_asking_the_model(service):
    job = service.ask("little", "The capital of France is", "anna")
    assert finished(service, job).state == "done"
    answer = service.answer(job, "anna")
    assert (answer.model, answer.prompt) == ("little", "The capital of France is")
    assert isinstance(answer.continuation, str)
    assert len(answer.tokens) == 10
    assert all(isinstance(token, str) and 0 < probability <= 1 for token, probability in answer.tokens)
    assert [p for _, p in answer.tokens] == sorted((p for _, p in answer.tokens), reverse=True)
    again = service.ask("little", "The capital of France is", "berta")
    assert finished(service, again).state == "done"
    assert service.answer(again) == answer


@pytest.mark.parametrize("prompt", ["", " ", "a\0b", "x" * 5000])
def test_a_bad_prompt_is_refused_before_it_is_queued(service, prompt):
    with pytest.raises(BadInput, match="prompt"):
        service.ask("little", prompt, "anna")


@pytest.mark.parametrize("text", ["", "0" * 64, "../../etc/passwd", "f" * 12, "report:x", "\0", None, 3])
def test_a_run_id_from_a_link_can_be_anything(service, text):
    assert service.cached(text) is None
    with pytest.raises(BadInput, match="run"):
        service.report(text)


# Operation -----------------------------------------------------------------------------------------------------------


def test_time_estimates_come_from_earlier_runs(service):
    report = service.run(make_plan(service))
    assert service.seconds_estimate("little", "toy") == pytest.approx(sum(report.timing.values()))


def test_the_status_says_what_is_going_on(service):
    before = service.status()
    assert (before.models_loaded, before.running, before.waiting) == ((), 0, 0)
    assert before.promises == PROMISES
    assert before.store.mode == "disk"
    service.run(make_plan(service))
    after = service.status()
    assert after.models_loaded == ("little",)
    assert after.device == "cpu"
    service.unload()
    assert service.status().models_loaded == ()


def test_warming_up_returns_at_once_and_loads_the_model(service):
    service.warm_up("little")
    service.warm_up("little")
    for _ in range(600):
        if service.status().models_loaded and not service._warming:
            break
        threading.Event().wait(0.1)
    assert service.status().models_loaded == ("little",)
    with pytest.raises(UnknownName):
        service.warm_up("nothing")


def test_warming_up_a_missing_model_is_quiet(service):
    missing = next(info.name for info in service.models() if not info.available)
    service.warm_up(missing)
    for thread in threading.enumerate():
        if thread.name.startswith("warm-up"):
            thread.join(60)
    assert not service._warming


def test_notes_tags_and_verdicts_go_to_the_notebook(service):
    digest = service.run(make_plan(service)).digest
    with pytest.raises(UnknownName):
        service.note(digest, "before anybody saw it")
    service.visited(service.report(digest), "anna")
    service.note(digest, "look at this", "anna")
    assert service.tags(digest, ["Odd", "odd"]) == ("odd",)
    service.verdict(digest, "fails", "neighbour bleed", 2, "anna")
    entry = service.entry(digest)
    assert [note.text for note in entry.notes] == ["look at this"]
    assert entry.verdicts[0].failure == "neighbour bleed"
    assert service.run_choices("anna")["tag"] == ("odd",)
    assert service.run_choices("berta") == {"model": (), "method": (), "tag": ()}
    assert service.delete_run(digest, "berta") is False
    assert service.delete_run(digest, "anna") is True
    assert service.entry(digest) is None


def test_clearing_forgets_results_and_keeps_the_history(service):
    report = service.run(make_plan(service))
    service.visited(report, "anna")
    assert service.clear_results() > 0
    assert service.cached(report.digest) is None
    assert service.entry(report.digest) is not None


def test_closing_twice_is_harmless(settings):
    service = Service.open(settings)
    job = service.submit(make_plan(service, sleep=1.0), "anna")
    service.close()
    service.close()
    assert service.job(job, "anna").state == "cancelled"


def test_shipped_examples_answer_the_questions_of_the_shipped_models(service):
    """Fails when weights, a method or a default changed since: run python -m mega_core examples."""
    for example in service.examples():
        question = example.report().question
        if not service.model(question.model.name).available:
            pytest.skip(f"{question.model.name} is not here")
        assert service.digest(question) == example.digest
        (request,) = question.requests
        params = dict(question.method.params) if example.outcome == "fails" else None  # it has settings of its own
        again = service.plan(
            question.model.name, question.method.name, request.subject, request.template, request.target_new,
            params=params, seed=question.seed,
        )  # fmt: skip
        assert service.digest(again) == example.digest


def test_examples_are_built_for_embedded_models_only(service):
    with pytest.raises(BadInput, match="does not ship"):
        service.rebuild_examples("little", "toy", 1, 0)


def test_two_people_two_models_one_machine(service, settings):
    """Answers don't depend on what else is going on."""
    alone = {}
    for seed in range(4):
        alone[seed] = service.run(make_plan(service, seed=seed)).frames["answers"]
    service.clear_results()
    jobs = {seed: service.submit(make_plan(service, seed=seed), f"person-{seed}") for seed in range(4)}
    for seed, job in jobs.items():
        view = finished(service, job)
        assert service.report(view.digest).frames["answers"].equals(alone[seed])


@pytest.mark.slow
def test_a_storm_of_cancelled_and_broken_jobs_leaves_the_model_identical(service):
    from bench.storm import storm

    found = storm(service, [make_plan(service), make_plan(service, layer=0)], jobs=200)
    assert found.unclean == ()
    assert found.done + found.cancelled + found.failed == 200
    assert min(found.done, found.cancelled, found.failed) >= 20
    assert {"before", "edit", "toy", "after", "restore", "answers", "generations", "save"} <= set(found.stages)
    assert any(stage.startswith("load") for stage in found.stages)
