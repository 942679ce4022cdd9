from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mega_core import __main__ as cli
from mega_core.methods.base import METHODS
from tests.conftest import ROOT
from tests.service.toy import TOY, write_catalogue

FACT = ["--subject", "France", "--template", "The capital of {} is", "--target-new", "Rome", "--target-true", "Paris"]
EDIT = ["edit", "--model", "little", "--method", "toy", *FACT, "--views", ""]


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("models"), little="gpt2", refused="gptj")


@pytest.fixture(autouse=True)
def _tiny_models(catalogue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS._entries, "toy", TOY)
    monkeypatch.setenv("MEGA_MODELS", str(catalogue))
    monkeypatch.setenv("MEGA_DEVICE", "cpu")


def run(*words: str) -> int:
    """main()'s status, also where argparse exits."""
    try:
        return cli.main(words)
    except SystemExit as left:
        return int(left.code or 0)


def process(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mega_core", *words],
        cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["edit"], "--model"),
        ([*EDIT, "--seed", "x"], "--seed"),
        ([*EDIT, "--nonsense"], "--nonsense"),
        (["cache", "burn"], "burn"),
        ([*EDIT[:2], "litle", *EDIT[3:]], "Did you mean 'little'"),
        ([*EDIT[:4], "tooy", *EDIT[5:]], "Did you mean 'toy'"),
        ([*EDIT, "--views", "module_score"], "Did you mean 'module_scores'"),
        ([*EDIT, "--param", "layer"], "NAME=VALUE"),
        ([*EDIT, "--param", "layer=99"], "toy.layer"),
        ([*EDIT, "--param", "depth=1"], "toy.depth"),
        ([*EDIT, "--seed", "-1"], "seed"),
        ([*EDIT, "--template", "no place"], "template"),
        ([*EDIT, "--subject", "a\nb"], "subject"),
        ([*EDIT, "--target-new", "Paris"], "target_new"),
        ([*EDIT, "--json", "/nowhere/at/all.json"], "--json"),
        ([*EDIT, "--json", "."], "folder"),
        (["edit", "--model", "refused", "--method", "toy", *FACT], "can't edit refused"),
        (["facts", "--model", "little"], "no fact tables"),
        (["examples", "--tries", "0"], "tries"),
        (["examples", "--model", "little", "--method", "toy"], "does not ship"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, words, said):
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert said in err
    assert "Traceback" not in err


def test_a_model_that_is_not_here_is_bad_input(capsys):
    assert run(*EDIT[:2], "gpt2-xl", *EDIT[3:]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "gpt2-xl" in err


def test_a_broken_setting_is_bad_input(capsys, monkeypatch):
    monkeypatch.setenv("MEGA_DEVICE", "abacus")
    assert run("models") == 2
    assert "MEGA_DEVICE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["models"],
        ["models", "--json"],
        ["facts", "--model", "atlas-gpt2"],
        ["cache", "stats"],
        ["--help"],
        ["edit", "--help"],
        ["edit", "--model", "atlas-gpt2", "--method", "rome", *FACT, "--seed", "-1"],
        ["edit", "--model", "atlas-gpt2", "--method", "rome", *FACT, "--param", "layer=x"],
    ],
)
def test_what_can_be_told_without_torch_is(words, tmp_path):
    """A torch that cannot be imported stands in the way of nothing here."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')", encoding="utf-8")
    done = process(*words, PYTHONPATH=str(tmp_path), MEGA_MODELS="")
    assert "torch was imported" not in done.stderr
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr


# Failures of ours ----------------------------------------------------------------------------------------------------


def test_an_unforeseen_failure_has_an_id_that_is_in_the_log(capsys, tmp_path):
    assert run(*EDIT, "--param", "fail=error") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "secret" not in err
    error_id = err.split("(error ")[1].split(",")[0].rstrip(")\n")
    log = (tmp_path / "cache" / "logs" / "mega_core.log").read_text(encoding="utf-8")
    assert error_id in log
    assert "Traceback" in log


def test_a_foreseen_failure_says_what_to_do(capsys):
    assert run(*EDIT, "--param", "fail=memory") == 1
    assert "memory" in capsys.readouterr().err


def test_a_failed_edit_leaves_no_file(tmp_path):
    target = tmp_path / "out.json"
    assert run(*EDIT, "--param", "fail=error", "--json", str(target)) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_interrupting_is_status_130(capsys, monkeypatch):
    from mega_core.service import Service

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Service, "run", interrupt)
    assert run(*EDIT) == 130
    assert capsys.readouterr().err == "Stopped.\n"


# Success -------------------------------------------------------------------------------------------------------------


def test_an_edit_is_summed_up_for_a_person(capsys):
    assert run(*EDIT, "--paraphrase", "France is ruled from", "--neighbour", "The capital of Italy is") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("The capital of France is Rome", "Verdict", "before", "after", "Paris", "Neighbours", "Paraphrases"):
        assert word in out
    for word in ("Continuations", "restored bit for bit, 0 hooks left", "Seconds", "Run "):
        assert word in out


def test_the_json_has_its_fields_and_the_file_is_written_whole(capsys, tmp_path):
    target = tmp_path / "out.json"
    target.write_text("old", encoding="utf-8")
    assert run(*EDIT, "--param", "layer=0", "--param", "strength=0.25", "--seed", "7", "--json", str(target)) == 0
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out.json"]
    plain = json.loads(target.read_text(encoding="utf-8"))
    assert {"schema_version", "question", "digest", "frames", "generations", "receipt", "timing"} <= set(plain)
    assert plain["schema_version"] == 1
    assert dict(map(tuple, plain["question"]["method"]["params"])) == {
        "fail": "no", "layer": 0, "sleep": 0.0, "strength": 0.25,
    }  # fmt: skip
    assert plain["question"]["seed"] == 7
    receipt = plain["receipt"]
    assert set(receipt) == {"restored", "weights_digest_before", "weights_digest_after", "hooks_left"}
    assert receipt["restored"] is True
    assert receipt["weights_digest_before"] == receipt["weights_digest_after"]
    assert receipt["hooks_left"] == 0
    assert {"answers", "metrics", "weight_change"} <= set(plain["frames"])
    row = plain["frames"]["answers"][0]
    assert row["state"] == "before"
    assert isinstance(row["prob"], float)
    assert {row["state"] for row in plain["generations"]} == {"before", "after"}
    assert "Verdict" in capsys.readouterr().out


def test_json_on_standard_output_is_nothing_but_json(capsys):
    assert run(*EDIT, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["digest"]


def test_the_same_edit_again_gives_the_same_answer(capsys):
    results = []
    for extra in ([], [], ["--fresh"]):
        assert run(*EDIT, "--json", "-", *extra) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]
    assert results[0]["frames"] == results[2]["frames"]
    assert results[0]["timing"] != results[2]["timing"]


def test_models_as_text_and_as_json(capsys):
    assert run("models") == 0
    text = capsys.readouterr().out
    assert "little" in text
    assert "ready" in text
    assert run("models", "--json") == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)["models"]}
    assert models["little"]["available"] is True
    assert models["gpt2-xl"]["parameters"] == 1_557_611_200
    assert all(model["available"] or (model["reason"] and model["how"]) for model in models.values())


def test_facts_as_text_and_as_json(capsys):
    assert run("facts", "--model", "atlas-gpt2", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"subject", "relation", "object", "templates"} <= set(facts[0])
    assert run("facts", "--model", "atlas-gpt2") == 0
    assert "Eiffel Tower\tlandmark_city\tParis" in capsys.readouterr().out.splitlines()


def test_the_cache_is_counted_and_cleared(capsys):
    assert run(*EDIT) == 0
    capsys.readouterr()
    assert run("cache", "stats", "--json") == 0
    assert json.loads(capsys.readouterr().out)["store"]["entries"] > 0
    assert run("cache", "clear") == 0
    assert "Forgot" in capsys.readouterr().out
    assert run("cache", "stats", "--json") == 0
    assert json.loads(capsys.readouterr().out)["store"]["entries"] == 0


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m mega_core facts --model atlas-gpt2 | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_process_of_its_own_works_offline():
    done = process("models", "--json", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["schema_version"] == 1
