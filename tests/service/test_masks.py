"""Masks and detector reports that are kept, folders that may be searched, and what is measured for people to see."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mega_core.errors import ActionableError, BadInput, ModelUnavailable, UnknownName
from mega_core.masking import evaluate
from mega_core.masking.detect import Detection, Finding
from mega_core.masking.edits import bank_of
from mega_core.masking.masks import Mask
from mega_core.methods.base import METHODS
from mega_core.notebook import Run
from mega_core.records import EditRequest, Inspection, MethodRef, ModelRef
from mega_core.service import Service, checks, mask_work
from mega_core.service.masks import COLLATERAL, EDITS, TIMES, KeptMask
from mega_core.settings import Settings
from tests.masking.cases import LAYER, random_edits
from tests.tiny import tiny

ME = "o" * 32
CHOICE = {"layer": None, "pruned": 0.3, "seed": 0}


def a_mask(shape: tuple[int, int] = (6, 10)) -> Mask:
    keep = torch.ones(shape, dtype=torch.bool)
    keep[:, :2] = False  # two whole neurons
    keep[0, 2] = False
    return Mask(keep, 1, "little", "0" * 64, trained={"edits": 9, "held_relations": ["river"]})


@pytest.fixture
def trained(service: Service, monkeypatch: pytest.MonkeyPatch) -> KeptMask:
    """A mask of the tiny model, trained by nobody."""

    def train(model: str, method: str, n: int, out: Path, **_: object) -> Mask:
        mask = a_mask()
        mask.save(out)
        return mask

    monkeypatch.setattr(service.masks, "train", train)
    job = service.wait(service.masks.start_training("little", "rome", 10, ME, **CHOICE), 30)
    assert (job.state, job.kind) == ("done", "mask")
    kept = service.masks.kept(service.result(job.id, ME))
    assert kept is not None
    return kept


class TestKept:
    def test_a_trained_mask_is_kept_with_its_picture(self, service: Service, trained: KeptMask) -> None:
        assert (trained.model, trained.method, trained.n, trained.edits) == ("little", "rome", 10, 9)
        assert (trained.layer, trained.shape, trained.held_relations) == (1, (6, 10), ("river",))
        assert trained.pruned == pytest.approx(13 / 60)
        assert trained.neurons == (1.0, 1.0, pytest.approx(1 / 6, abs=1e-4), *[0.0] * 7)
        assert trained.outputs[:2] == (0.3, 0.2)
        assert not trained.judged
        assert service.masks.listed() == (trained,)

    def test_the_same_question_has_the_same_id(self, service: Service, trained: KeptMask) -> None:
        assert service.masks.mask_id("little", "rome", 10, **CHOICE) == trained.id
        others = [
            service.masks.mask_id("little", "memit", 10, **CHOICE),
            service.masks.mask_id("little", "rome", 11, **CHOICE),
            service.masks.mask_id("little", "rome", 10, **{**CHOICE, "layer": 1}),
            service.masks.mask_id("little", "rome", 10, **{**CHOICE, "pruned": 0.2}),
            service.masks.mask_id("little", "rome", 10, **{**CHOICE, "seed": 1}),
        ]
        assert len({trained.id, *others}) == 6

    @pytest.mark.parametrize(
        ("changed", "field"),
        [({"n": 9}, "n"), ({"n": 201}, "n"), ({"pruned": 0.01}, "pruned"), ({"pruned": 0.9}, "pruned"),
         ({"seed": -1}, "seed"), ({"method": "toy"}, "method")],
    )  # fmt: skip
    def test_what_cannot_be_trained_is_refused(self, service: Service, changed: dict, field: str) -> None:
        asked = {"model": "little", "method": "rome", "n": 10, **CHOICE, **changed}
        with pytest.raises(BadInput) as error:
            service.masks.mask_id(**asked)
        assert error.value.field == field

    @pytest.mark.parametrize("asked", ["", "../x", "a" * 64, "A" * 64, "0" * 63 + "\n", "*"])
    def test_an_id_that_is_none_gives_nothing(self, service: Service, trained: KeptMask, asked: str) -> None:
        assert service.masks.kept(asked) is None
        assert service.masks.judgement(asked) is None
        assert service.masks.detection(asked) is None
        with pytest.raises(BadInput):
            service.masks.file(asked)

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "null", '{"version": 99}', '{"version": 1}', "[" * 100_000, '{"version": 1, "shape": 1}'],
    )
    def test_a_damaged_file_counts_as_not_there(self, service: Service, trained: KeptMask, text: str) -> None:
        file = service.settings.cache_dir / "masks" / f"{trained.id}.json"
        file.write_text(text, encoding="utf-8")
        assert service.masks.kept(trained.id) is None
        assert service.masks.listed() == ()

    def test_the_file_is_the_mask(self, service: Service, trained: KeptMask, tmp_path: Path) -> None:
        copy = tmp_path / "copy.mask"
        copy.write_bytes(service.masks.file(trained.id))
        assert torch.equal(Mask.load(copy).keep, a_mask().keep)

    def test_a_mask_has_a_longer_limit_of_its_own(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict = {}
        monkeypatch.setattr(service.core, "start", lambda work, **given: seen.update(given) or "job")
        service.masks.start_training("little", "rome", 10, ME, **CHOICE)
        assert seen["timeout_seconds"] == TIMES * service.settings.job_seconds
        assert (seen["lane"], seen["kind"]) == ("little", "mask")

    def test_the_estimate_follows_what_was_measured(self, service: Service, trained: KeptMask) -> None:
        assert service.masks.seconds_estimate("little", "memit", 10) is None
        known = service.masks.seconds_estimate("little", "rome", 10)
        assert known is not None
        assert service.masks.seconds_estimate("little", "rome", 100) > known

    def test_layers_are_those_the_method_writes_to(self, service: Service) -> None:
        assert service.masks.layers("atlas-gpt2", "rome") == (2,)
        assert service.masks.layers("atlas-gpt2", "memit") == (2, 3)


PLAIN = {
    "degenerate": False,
    "rows": [{"mask": "trained", "set": "training", "kind": "edit",
              "scores": {"cases": 0, "took": 0.0, **dict.fromkeys(("rsr", "rsm", "top1", "top5", "top10", "top100"))}}],
    "collateral": [{"mask": "none", "pruned": 0.0, "recall": 0.9, "perplexity": float("inf")}],
    "editability": [],
    "over_attention": [],
    "heads": [],
    "edits": [],
    "perplexity": {"original": 2.0},
}  # fmt: skip


class TestJudged:
    def test_what_was_measured_comes_back_as_tables(
        self, service: Service, trained: KeptMask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list = []
        monkeypatch.setattr(mask_work, "judge", lambda lm, mask, defaults, n, editable, report: (
            asked.append((mask.pruned, n, editable)), PLAIN)[1])  # fmt: skip
        job = service.wait(service.masks.start_judging(trained.id, ME), 60)
        assert job.state == "done", job.error
        assert asked == [(trained.pruned, 20, 6)]
        found = service.masks.judgement(trained.id)
        assert found is not None
        assert (found.size, found.degenerate) == ("quick", False)
        assert np.isnan(found.reversal["rsr"].astype(float)).all()
        assert list(found.collateral.columns) == list(COLLATERAL)
        assert found.collateral["perplexity"].isna().all()
        assert service.masks.listed()[0].judged

    def test_a_mask_that_is_not_here_is_refused(self, service: Service) -> None:
        with pytest.raises(BadInput, match="not kept"):
            service.masks.start_judging("0" * 64, ME)

    def test_a_size_that_is_none_is_refused(self, service: Service, trained: KeptMask) -> None:
        with pytest.raises(BadInput, match="choices"):
            service.masks.start_judging(trained.id, ME, "huge")

    def test_a_damaged_judgement_counts_as_none(self, service: Service, trained: KeptMask) -> None:
        file = service.settings.cache_dir / "masks" / f"{trained.id}.judged.json"
        file.write_text('{"version": 1, "rows": 3}', encoding="utf-8")
        assert service.masks.judgement(trained.id) is None


class TestOwn:
    @pytest.fixture
    def runs(self, service: Service, trained: KeptMask, monkeypatch: pytest.MonkeyPatch) -> dict[str, Inspection]:
        """Run id -> question, of which only the first can be tried."""
        fact = EditRequest("Rome", "{} lies in", "Spain", "Italy", ("Where is Rome? In",))
        little, rome = ModelRef("little"), MethodRef("rome")
        asked = (
            Inspection(little, rome, (fact,), seed=3),
            Inspection(little, MethodRef("toy"), (fact,)),
            Inspection(little, rome, (replace(fact, target_true=None),)),
            Inspection(little, rome, (fact, replace(fact, subject="Paris"))),
            Inspection(ModelRef("refused"), rome, (fact,)),
        )
        known = {f"{i:064x}": question for i, question in enumerate(asked, start=1)}
        for run, question in known.items():
            fact = question.requests[0]
            service.core.notebook.add_run(
                Run(run, ME, question.model.name, question.method.name, fact.subject, fact.template, fact.target_new,
                    fact.target_true, len(question.requests))
            )  # fmt: skip
        cached = {run: SimpleNamespace(question=question, digest=run) for run, question in known.items()}
        monkeypatch.setattr(service.core, "cached", cached.get)
        return known

    def test_only_what_a_mask_can_read_is_offered(self, service: Service, trained: KeptMask, runs: dict) -> None:
        assert service.masks.own(trained, ME) == (next(iter(runs)),)
        assert service.masks.own(trained, "somebody else") == ()

    def test_they_are_edited_as_they_were(
        self, service: Service, trained: KeptMask, runs: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list = []
        row = dict.fromkeys(EDITS[1:], "said")
        monkeypatch.setattr(Mask, "check", lambda self, lm: None)
        monkeypatch.setattr(mask_work, "under_mask", lambda lm, mask, given, report: (asked.extend(given), [row])[1])
        job = service.wait(service.masks.start_own(trained.id, ME), 60)
        assert job.state == "done", job.error
        first = next(iter(runs.values()))
        assert asked == [(first.method, first.requests[0], 3)]
        assert list(service.result(job.id, ME).columns) == list(EDITS[1:])

    def test_what_is_no_longer_stored_is_refused(
        self, service: Service, trained: KeptMask, runs: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(service.core, "cached", lambda run: None)
        with pytest.raises(BadInput, match="no edit of yours"):
            service.masks.start_own(trained.id, ME)

    def test_nothing_to_try_is_refused(self, service: Service, trained: KeptMask) -> None:
        with pytest.raises(BadInput, match="no edit of yours"):
            service.masks.start_own(trained.id, ME)

    def test_an_edit_of_a_person_is_measured_like_the_others(self) -> None:
        lm = tiny("gpt2")
        ref = METHODS["rome"].ref({"steps": 2, "contexts": 1, "covariance": "identity", "layer": LAYER,
                                   "kl_weight": 0.0})  # fmt: skip
        mask = Mask(torch.rand(lm.read_weight(LAYER, "mlp_down").shape) > 0.3, LAYER, lm.name, lm.file_digest)
        request = EditRequest("Mount Kenya", "Here we see {}", "Berlin", "Rome", ("Look at Mount Kenya",))
        (row,) = mask_work.under_mask(lm, mask, [(ref, request, 0)])
        assert (row["prompt"], row["old"], row["new"]) == ("Here we see Mount Kenya", "Rome", "Berlin")
        assert row["margin_edited"] < row["margin_original"]


def test_the_operator_names_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    read = Settings.read({"MEGA_DETECT_DIRS": f"{tmp_path / 'a'}, {tmp_path / 'b'},"})
    assert read.detect_dirs == (tmp_path / "a", tmp_path / "b")
    assert Settings.read({"MEGA_DETECT_DIRS": f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}"}) == read
    assert Settings.read({}).detect_dirs == ()
    with pytest.raises(BadInput, match="MEGA_DETECT_DIRS"):
        Settings.read({"MEGA_DETECT_DIRS": str(tmp_path / "nowhere")})


def a_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


@pytest.fixture
def allowed(settings: Settings, tmp_path: Path):
    """A service that may search a folder, and the folder."""
    root = tmp_path / "allowed"
    a_model(root / "one")
    a_model(root / "deep" / "two")
    with Service.open(replace(settings, detect_dirs=(root, root))) as opened:
        yield opened, root


def finding(layer: int, kind: str) -> Finding:
    return Finding(layer, "mlp_down", kind, kind, 0.9, 1, 1.0, 0.1, ((3, 0.5),), ((" Rome", 2.0),), (),
                   (("the tower", 8.0),), ((" Rome", 0.5),), {})  # fmt: skip


class TestSuspects:
    def test_every_model_folder_in_and_below_once(self, allowed) -> None:
        service, _ = allowed
        assert [one.label for one in service.masks.suspects()] == ["allowed/deep/two", "allowed/one"]

    def test_an_allowed_model_folder_itself(self, settings: Settings, tmp_path: Path) -> None:
        folder = a_model(tmp_path / "alone")
        with Service.open(replace(settings, detect_dirs=(folder,))) as service:
            assert [one.label for one in service.masks.suspects()] == ["alone"]

    def test_two_roots_of_one_name_are_told_apart(self, settings: Settings, tmp_path: Path) -> None:
        folders = (a_model(tmp_path / "a" / "m"), a_model(tmp_path / "b" / "m"))
        with Service.open(replace(settings, detect_dirs=folders)) as service:
            assert [one.label for one in service.masks.suspects()] == ["m", "m (2)"]

    def test_no_link_leads_out(self, allowed, tmp_path: Path) -> None:
        service, root = allowed
        outside = a_model(tmp_path / "outside")
        (root / "linked").symlink_to(outside)
        linked_file = a_model(root / "half")
        (linked_file / "model.safetensors").unlink()
        (linked_file / "model.safetensors").symlink_to(outside / "model.safetensors")
        assert [one.label for one in service.masks.suspects()] == ["allowed/deep/two", "allowed/one"]

    def test_hidden_folders_and_what_is_no_model_are_left_out(self, allowed) -> None:
        service, root = allowed
        a_model(root / ".hidden")
        (root / "empty").mkdir()
        (root / "pickle").mkdir()
        (root / "pickle" / "config.json").write_text("{}", encoding="utf-8")
        (root / "pickle" / "pytorch_model.bin").write_bytes(b"x")
        assert len(service.masks.suspects()) == 2

    def test_no_folder_is_allowed_by_default(self, service: Service) -> None:
        assert service.masks.suspects() == ()


class TestDetecting:
    def test_a_report_is_kept_and_names_no_path(self, allowed, monkeypatch: pytest.MonkeyPatch) -> None:
        service, root = allowed
        asked: list = []

        def detect(folder: Path, reference: str | None, report: object) -> Detection:
            asked.append((folder, reference))
            return Detection(str(folder), "little", 0.9, "low-rank edit", (),
                             (finding(0, "low_rank"), finding(1, "unchanged")), {}, notes=("a note",))  # fmt: skip

        monkeypatch.setattr(service.masks, "detect", detect)
        one = service.masks.suspects()[1]
        job = service.wait(service.masks.start_detecting(one.id, "little", ME), 30)
        assert (job.state, job.kind) == ("done", "detect")
        assert asked == [(root / "one", "little")]
        found = service.masks.detection(service.result(job.id, ME))
        assert found is not None
        assert (found.label, found.reference, found.verdict) == ("allowed/one", "little", "low-rank edit")
        assert list(found.matrices["layer"]) == [0, 1]
        assert [clue["layer"] for clue in found.clues] == [0]
        assert service.masks.detections()[0].id == found.id
        file = service.settings.cache_dir / "detections" / f"{found.id}.json"
        assert str(root) not in file.read_text(encoding="utf-8")

    def test_a_folder_that_is_not_allowed_is_refused(self, allowed, tmp_path: Path) -> None:
        service, _ = allowed
        for asked in (str(tmp_path), "", "0" * 64):
            with pytest.raises(BadInput, match="operator"):
                service.masks.start_detecting(asked, "", ME)

    def test_an_unknown_reference_is_refused(self, allowed) -> None:
        service, _ = allowed
        with pytest.raises(UnknownName):
            service.masks.start_detecting(service.masks.suspects()[0].id, "../x", ME)

    def test_a_folder_that_cannot_be_read_is_told_without_its_path(self, allowed) -> None:
        service, root = allowed
        job = service.wait(service.masks.start_detecting(service.masks.suspects()[1].id, "", ME), 60)
        assert job.state == "failed"
        assert str(root) not in job.error.what + job.error.next_step

    def test_another_file_is_another_question(self, allowed, monkeypatch: pytest.MonkeyPatch) -> None:
        service, root = allowed
        keys: list = []
        monkeypatch.setattr(service.core, "start", lambda work, **given: keys.append(given["key"]) or "job")
        one = service.masks.suspects()[1]
        service.masks.start_detecting(one.id, "", ME)
        service.masks.start_detecting(one.id, "little", ME)
        (root / "one" / "model.safetensors").write_bytes(b"changed")
        service.masks.start_detecting(one.id, "", ME)
        assert len(set(keys)) == 3


class TestMeasured:
    def test_blocks_and_shares_average_to_what_is_cut(self) -> None:
        mask = a_mask((48, 96))
        found = mask_work.picture(mask)
        assert (len(found["blocks"]), len(found["blocks"][0])) == (24, 48)
        for name in ("neurons", "outputs", "blocks"):
            assert np.mean(found[name]) == pytest.approx(mask.pruned, abs=1e-3)
        assert found["blocks"][0][0] == 1.0  # the most cut come first

    def test_each_edit_has_the_margins_of_the_evaluation(self) -> None:
        lm = tiny("gpt2")
        before = lm.live_digest()
        edits = random_edits(lm)
        mask = Mask(torch.rand(lm.read_weight(LAYER, "mlp_down").shape) > 0.3, LAYER, lm.name, lm.file_digest)
        rows = mask_work.one_by_one(lm, mask, edits)
        assert [row["prompt"] for row in rows] == [edit.request.prompt for edit in edits]
        bank, whose = bank_of(edits)
        cases = evaluate.cases_of(edits, whose, paraphrases=False)
        masked = evaluate.answers(lm, cases, bank, {LAYER: mask.matrix()}).margin.tolist()
        assert [row["margin_masked"] for row in rows] == pytest.approx(masked)
        assert [row["reversed"] for row in rows] == [value > 0 for value in masked]
        assert lm.live_digest() == before

    def test_the_heads_add_up_to_their_attention(self) -> None:
        lm = tiny("gpt2")
        edits = random_edits(lm)
        mask = Mask(torch.rand(lm.read_weight(LAYER, "mlp_down").shape) > 0.3, LAYER, lm.name, lm.file_digest)
        heads = mask_work.by_head(lm, mask, edits)
        bank, whose = bank_of(edits)
        cases = evaluate.cases_of(edits, whose, paraphrases=False)
        whole = {
            (one.state, one.layer, one.candidate): one.mean
            for one in evaluate.over_attention(lm, cases, bank, {LAYER: mask.matrix()})
            if one.module == "attn"
        }
        summed: dict = {}
        for row in heads:
            key = (row["state"], row["layer"], row["candidate"])
            summed[key] = summed.get(key, 0.0) + row["mean"]
        assert summed.keys() == whole.keys()
        moved = 0.0
        for state, layer, candidate in whole:  # the bias of W_O is no head's, and the same in every state
            base = ("original", layer, candidate)
            change = whole[state, layer, candidate] - whole[base]
            assert summed[state, layer, candidate] - summed[base] == pytest.approx(change, abs=1e-4)
            moved = max(moved, abs(change))
        assert moved > 0.01

    def test_numbers_that_are_none_become_null(self) -> None:
        told = mask_work.finite({"a": [float("nan"), 1.0], "b": (float("inf"), "x"), "c": {"d": float("-inf")}})
        assert told == {"a": [None, 1.0], "b": [None, "x"], "c": {"d": None}}
        assert json.dumps(told, allow_nan=False)


class TestSelfCheck:
    @pytest.fixture(autouse=True)
    def quick(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checks, "METHOD", "toy")
        monkeypatch.setattr(checks, "QUICK", {})
        monkeypatch.setattr(service.checks, "_smallest", lambda: service.settings.model("little"))

    def checked(self, service: Service, **extra) -> dict:
        job = service.wait(service.checks.start(ME, extra), 60)
        assert (job.state, job.kind) == ("done", "check"), job.error
        return {one.name: one for one in service.result(job.id, ME)}

    def test_everything_is_tried_and_nothing_is_left_behind(self, service: Service) -> None:
        keys = service.core.store.keys()
        found = self.checked(service, drawn=lambda: "a picture")
        assert len(found) == 4
        assert all(one.good for one in found.values()), found
        assert "bit-identical" in found["Load a model and undo an edit"].told
        assert found["drawn"].told == "a picture"
        left = set(service.core.store.keys()) - set(keys)
        assert not [key for key in left if "self-check" in key]
        assert service.count_runs() == 0

    def test_one_failure_costs_the_others_nothing(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(run: object) -> None:
            raise ActionableError("The history is full.", "Free some space.")

        def fail() -> str:
            raise RuntimeError("secret at /home/someone")

        monkeypatch.setattr(service.core.notebook, "add_run", refuse)
        found = self.checked(service, drawn=fail)
        assert {name: one.good for name, one in found.items()} == {
            "Load a model and undo an edit": True,
            "Keep a result and read it again": True,
            "Write into the history": False,
            "drawn": False,
        }
        assert found["Write into the history"].told == "The history is full. Free some space."
        assert "secret" not in found["drawn"].told

    def test_a_model_that_is_not_given_back_is_found(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        digests = iter("abcdefgh")
        with service.core.held(service.settings.model("little").ref(), lambda event: None) as lm:
            monkeypatch.setattr(lm, "live_digest", lambda: next(digests))
            with pytest.raises(ActionableError, match="not given back"):
                checks._undone(lm, service.settings.model("little"), lambda event: None)
            monkeypatch.undo()

    def test_without_an_embedded_model_the_rest_is_tried(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(service.checks, "_smallest", lambda: None)
        found = self.checked(service)
        assert not found["Load a model and undo an edit"].good
        assert found["Keep a result and read it again"].good


def test_the_smallest_embedded_model_is_checked(service: Service) -> None:
    entry = service.checks._smallest()
    if entry is None:
        pytest.skip("no embedded model is here")
    assert entry.embedded


def test_the_status_tells_memory_and_limits(service: Service) -> None:
    state = service.status()
    assert state.store_limit == int(service.settings.store_gb * 2**30)
    assert (state.per_session, state.job_seconds) == (2, 120.0)
    assert state.gpus == ()
    if Path("/proc/self/statm").exists():
        assert state.memory_bytes > 2**20


def test_unavailable_is_what_an_absent_model_is(service: Service) -> None:
    with pytest.raises(ModelUnavailable):
        service.masks.mask_id("gpt2-xl", "rome", 10, **CHOICE)
