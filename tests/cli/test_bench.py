"""The command that compares methods: what it says, refuses, writes and goes on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mega_core import __main__ as cli
from mega_core.benchmark import Results
from mega_core.benchmark import plan as plans
from mega_core.benchmark.journal import Journal
from mega_core.commands import bench
from mega_core.evaluation import asking
from mega_core.events import Advanced
from mega_core.methods import METHODS
from mega_core.service import Service
from tests.service.toy import TOY, write_catalogue

RECORD = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The capital of {} is", "relation_id": "P36", "subject": "France",
        "target_new": {"str": "Rome", "id": "Q1"}, "target_true": {"str": "Paris", "id": "Q2"},
    },
    "paraphrase_prompts": ["France has the capital"], "neighborhood_prompts": ["The capital of Italy is"],
    "attribute_prompts": [], "generation_prompts": [],
}  # fmt: skip


def record(number: int, subject: str) -> dict[str, object]:
    rewrite = {**RECORD["requested_rewrite"], "subject": subject}  # type: ignore[dict-item]
    return {**RECORD, "case_id": number, "requested_rewrite": rewrite}


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("models"), little="gpt2", refused="gptj")


@pytest.fixture(autouse=True)
def _tiny(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = {"toy": TOY, "other": replace(TOY, name="other")}
    monkeypatch.setattr(METHODS, "_entries", only)
    monkeypatch.setattr(asking, "NEW_TOKENS", 2)
    monkeypatch.setattr(plans, "BESIDE", "")
    monkeypatch.setenv("MEGA_MODELS", str(catalogue))
    monkeypatch.setenv("MEGA_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    records = [record(1, "France"), record(2, "Spain"), record(3, "Japan"), {"case_id": 4}]
    (tmp_path / "facts.json").write_text(json.dumps(records))


BENCH = ["bench", "--model", "little", "--dataset", "facts.json", "--protocols", "rome"]


def run(*words: str) -> int:
    try:
        return cli.main(words)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench"], "--model"),
        ([*BENCH, "--out", "out", "--methods", "tooy"], "Did you mean 'toy'"),
        ([*BENCH, "--out", "out", "--methods", "toy,toy"], "twice"),
        ([*BENCH, "--out", "out", "--methods", ","], "--methods"),
        ([*BENCH, "--out", "out", "--limit", "0"], "limit"),
        ([*BENCH, "--out", "out", "--seed", "-1"], "seed"),
        ([*BENCH, "--out", "out", "--mode", "all"], "--mode"),
        ([*BENCH, "--out", "out", "--every", "2"], "sequential"),
        ([*BENCH, "--out", "out", "--protocols", "rom"], "Did you mean 'rome'"),
        ([*BENCH, "--out", "out", "--param", "toy.layer=99"], "toy.layer"),
        ([*BENCH, "--out", "out", "--workers", "0"], "workers"),
        ([*BENCH, "--out", "out", "--resume"], "no results in out"),
        ([*BENCH, "--out", "no/where"], "no folder"),
        ([*BENCH[:4], "nowhere.json", "--out", "out"], "nowhere.json"),
        ([*BENCH[:2], "litle", *BENCH[3:], "--out", "out"], "Did you mean 'little'"),
        ([*BENCH[:2], "refused", *BENCH[3:], "--out", "out", "--methods", "toy"], "can't edit refused"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, words, said):
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not Path("out").exists()


def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(capsys):
    assert run(*BENCH, "--out", "out", "--dry-run", "--mode", "sequential", "--every", "2") == 0
    err = capsys.readouterr().err
    for words in ("little", "3 edits in 3 cases", "toy, other", "asked every 2 edits", "15 measurements",
                  "1 records can't be used", "requested_rewrite"):  # fmt: skip
        assert words in err
    assert not Path("out").exists()


def test_results_are_written_and_the_same_command_needs_resume(capsys):
    assert run(*BENCH, "--out", "out", "--methods", "toy", "--param", "toy.layer=1") == 0
    out, err = capsys.readouterr()
    assert "toy layer=1" in out
    assert "6 of 6 measured" in err
    for name in ("summary.csv", "report.html", "answers.parquet", "cases.jsonl", "plan.json"):
        assert (Path("out") / name).stat().st_size
    plain = json.loads(Path("out/plan.json").read_text())
    assert plain["command"][3:] == [
        *BENCH[:3],
        "--methods",
        "toy",
        *BENCH[3:],
        "--param",
        "toy.layer=1",
        "--out",
        "out",
    ]
    assert plain["versions"]["torch"]
    assert len(plain["problems"]) == 1
    assert run(*BENCH, "--out", "out", "--methods", "toy", "--param", "toy.layer=1") == 2
    assert "--resume" in capsys.readouterr().err
    assert run(*BENCH, "--out", "out", "--methods", "toy", "--resume") == 2
    assert "another benchmark; what differs is a method" in capsys.readouterr().err
    before = Path("out/summary.csv").read_bytes()
    assert run(*BENCH, "--out", "out", "--methods", "toy", "--param", "toy.layer=1", "--resume") == 0
    assert Path("out/summary.csv").read_bytes() == before


def test_ctrl_c_keeps_what_is_there_and_says_how_to_go_on(capsys, monkeypatch):
    add = Journal.add

    def one(self, text):
        if len(self.keys) == 3:
            raise KeyboardInterrupt
        return add(self, text)

    monkeypatch.setattr(Journal, "add", one)
    assert run(*BENCH, "--out", "out", "--methods", "toy") == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert "3 of 6 measurements are in out" in said
    assert said.endswith("--methods toy --dataset facts.json --protocols rome --out out --resume")
    assert len(Path("out/summary.csv").read_text().splitlines()) > 1
    monkeypatch.setattr(Journal, "add", add)
    assert run(*BENCH, "--out", "out", "--methods", "toy", "--resume") == 0
    assert Results.load(Path("out")).complete


def test_all_methods_leave_out_those_that_cannot_edit_the_model(monkeypatch):
    picky = replace(TOY, name="picky", needs=lambda spec: "it is picky")
    monkeypatch.setitem(METHODS._entries, "picky", picky)
    with Service.open() as service:
        setup = service.benchmarks.plan("little", ["all"], "facts.json", protocols=["rome"])
        assert [one.label for one in setup.plan.entrants] == ["unedited", "toy", "other"]
        assert setup.unsupported == (("picky", "it is picky"),)


def test_controls_are_entrants_of_their_own(monkeypatch):
    from mega_core.methods.mega import MEGA

    monkeypatch.setitem(METHODS._entries, "mega", MEGA)
    with Service.open() as service:
        setup = service.benchmarks.plan("little", ["mega"], "facts.json", protocols=["rome"], control=True)
        labels = [one.label for one in setup.plan.entrants]
        assert labels[:3] == ["unedited", "mega", "mega gate=always"]
        assert len(labels) > 3
        assert len({one.method for one in setup.plan.entrants}) == len(labels)


def test_the_time_left_is_guessed_from_this_runs_measurements(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    tell = bench._reporter()
    tell(Advanced("benchmark", 40, 100))  # there already
    now[0] += 500  # opening the model doesn't count
    for done in range(41, 52):
        tell(Advanced("benchmark", done, 100))
        now[0] += 61
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "51 of 100 measured, about 50 min left"  # 49 to go at 61 s each


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 s"), (720, "12 min"), (12000, "3 h 20 min")])
def test_durations_in_words(seconds, words):
    assert bench.duration(seconds) == words
