from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mega_core import __main__ as cli
from mega_core import frames, reference
from mega_core.commands import edit
from mega_core.methods.base import METHODS
from tests.conftest import ROOT
from tests.service.reports import make_report
from tests.service.toy import TOY, write_catalogue

FACT = ["--subject", "France", "--template", "The capital of {} is", "--target-new", "Rome", "--target-true", "Paris"]
EDIT = ["edit", "--model", "little", "--method", "toy", *FACT, "--views", ""]
BOTH = ["edit", "--model", "little", *FACT, "--views", ""]


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
        ([*EDIT, "--methods", "toy,rome"], "not allowed with"),
        ([*BOTH, "--methods", "toy,tooy"], "Did you mean 'toy'"),
        ([*BOTH, "--methods", "toy,toy"], "twice"),
        ([*BOTH, "--methods", " , "], "--methods"),
        ([*BOTH, "--methods", "toy,rome", "--param", "depth=1"], "no method here has a parameter 'depth'"),
        ([*BOTH, "--methods", "toy,rome", "--param", "memit.layers=1"], "'memit' is none of the methods"),
        ([*BOTH, "--methods", "toy,rome", "--param", "toy.steps=1"], "toy.steps"),
        ([*BOTH, "--methods", "toy,rome", "--param", "rome.steps=0"], "rome.steps"),
        ([*EDIT[:5], *FACT[2:]], "--subject"),
        ([*EDIT, "--file", "facts.json"], "does not go with --file"),
        ([*EDIT[:5], "--file", "nowhere.json"], "nowhere.json can't be read"),
        (["methods", "--json", "--markdown"], "not allowed with"),
        (["export", "--out", "x"], "--model"),
        (["export", *EDIT[1:5], *FACT], "--out"),
        (["export", "--model", "little", "--method", "ike", *FACT, "--out", "new"], "IKE can't be exported"),
        (["export", *EDIT[1:5], *FACT, "--out", "."], "not empty"),
        (["export", "--stack", "nowhere", "--out", "new"], "no stack in nowhere"),
        (["export", "--stack", "nowhere", "--model", "little", "--out", "new"], "does not go with --stack"),
        (["stack"], "ACTION"),
        (["stack", "burn"], "burn"),
        (["stack", "list", "--folder", "nowhere"], "no stack in nowhere"),
        (["stack", "undo", "--folder", "nowhere", "--edit", "toy-1"], "no stack in nowhere"),
        (["stack", "check", "--folder", "nowhere"], "no stack in nowhere"),
        (["stack", "add", "--folder", "no/where", *EDIT[1:5], *FACT], "no folder"),
        (["stack", "add", "--folder", ".", *EDIT[1:5], *FACT], "no stack in ."),
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
        ["methods"],
        ["methods", "--json"],
        ["methods", "--markdown"],
        ["--help"],
        ["stack", "--help"],
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


# Several methods, several facts --------------------------------------------------------------------------------------


@pytest.fixture
def push(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second method that is quick."""
    monkeypatch.setitem(METHODS._entries, "push", replace(TOY, name="push", title="Push"))


def test_several_methods_stand_side_by_side(capsys, push, tmp_path):
    words = [*BOTH, "--methods", "toy,push,ike", "--paraphrase", "France is ruled from", "--neighbour", "Italy has"]
    given = ["--param", "layer=0", "--param", "push.strength=0.25", "--param", "push.layer=1", "--param", "k=0"]
    assert run(*words, *given, "--json", str(tmp_path / "all.json")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("argmax", "rome", "exact", "p(new)", "p(true)", "seconds", "restored", "paraphrases", "neighbours"):
        assert word in out
    assert "Weights: layer 0 mlp_down" in out
    assert "Weights: layer 1 mlp_down" in out
    assert "Prompt: a text stands in front of every prompt" in out
    assert max(map(len, out.splitlines())) <= 120
    plain = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert plain["failed"] == {}
    params = {r["question"]["method"]["name"]: dict(map(tuple, r["question"]["method"]["params"]))
              for r in plain["reports"]}  # fmt: skip
    assert list(params) == ["toy", "push", "ike"]
    assert (params["toy"]["layer"], params["toy"]["strength"]) == (0, 0.5)
    assert (params["push"]["layer"], params["push"]["strength"]) == (1, 0.25)
    assert params["ike"]["k"] == 0


def test_a_method_that_fails_does_not_take_the_others_with_it(capsys, push):
    assert run(*BOTH, "--methods", "toy,push", "--param", "toy.fail=memory") == 1
    out, err = capsys.readouterr()
    assert "push" in out
    assert err.startswith("toy: The machine ran out of memory")
    assert err.count("\n") == 1
    assert run(*BOTH, "--methods", "toy,push", "--param", "toy.fail=memory", "--json", "-") == 1
    plain = json.loads(capsys.readouterr().out)
    assert (len(plain["reports"]), list(plain["failed"])) == (1, ["toy"])


TWO = [
    {"subject": "France", "template": "The capital of {} is", "target_new": "Rome", "target_true": "Paris"},
    {"subject": "Italy", "template": "The capital of {} is", "target_new": "Paris", "paraphrases": ["Italy has"]},
]


def test_several_facts_are_edited_together(capsys, tmp_path):
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(TWO), encoding="utf-8")
    assert run(*EDIT[:5], "--file", str(file), "--views", "", "--json", str(tmp_path / "out.json")) == 0
    assert "Rome and 1 more" in capsys.readouterr().out
    plain = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [request["subject"] for request in plain["question"]["requests"]] == ["France", "Italy"]
    assert {row["case"] for row in plain["frames"]["answers"]} == {0, 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "not a list"),
        ("[]", "not a list"),
        ('["x"]', "fact 1: is not an object"),
        ([{**TWO[0], "object": 1}], "unknown key 'object'"),
        ([TWO[0], {"subject": "x"}], "fact 2: has no template"),
        ([{**TWO[0], "subject": 3}], "fact 1, subject: expected text"),
        ([{**TWO[0], "template": "x"}], "fact 1, template"),
        ([{**TWO[1], "paraphrases": "x"}], "paraphrases is not a list"),
        ([{**TWO[1], "paraphrases": [1]}], "fact 1, paraphrases"),
        ([TWO[0], TWO[0]], "number 2 edits 'The capital of France is' a second time"),
        ([{**TWO[0], "subject": f"F{i}"} for i in range(129)], "the limit is 128"),
    ],
)
def test_a_file_of_facts_that_cannot_be_used(capsys, tmp_path, content, said):
    file = tmp_path / "facts.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    assert run(*EDIT[:5], "--file", str(file)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


@pytest.mark.parametrize(
    ("kind", "title", "words"),
    [
        ("weights", "Weights", "0.5 of its norm, rank 3"),
        ("steering", "Steering", "moved by 0.5 of its length; no weight changes"),
        ("memory", "Memory", "beside layer 4 attn: 1,000 numbers; no weight changes"),
        ("prompt", "Prompt", "nothing in the model changes"),
    ],
)
def test_every_kind_of_change_is_put_in_words(kind, title, words):
    row = {"layer": 4, "site": "attn", "kind": kind, "norm": 1.0, "relative_norm": 0.5, "rank": 3, "parameters": 1000}
    report = make_report()
    report = replace(report, frames={**report.frames, "weight_change": frames.from_rows([row], "weight_change")})
    ((found, text),) = edit.changes(report)
    assert found == title
    assert words in text
    assert f"{title:<9} " in edit.summary(report)


# Stacks, export ------------------------------------------------------------------------------------------------------


def test_a_stack_from_the_command_line(capsys, tmp_path):
    folder = str(tmp_path / "stack")
    add = ["stack", "add", "--folder", folder, *EDIT[1:5]]
    assert run(*add, *FACT, "--seed", "1") == 0
    assert "Added toy-1" in capsys.readouterr().out
    assert run(*add, "--subject", "Italy", "--template", "{} has", "--target-new", "Madrid", "--param", "layer=0") == 0
    assert "Added toy-2" in capsys.readouterr().out
    assert run("stack", "list", "--folder", folder) == 0
    assert capsys.readouterr().out.splitlines() == [
        "toy-1            weights      The capital of France is Rome",
        "toy-2            weights      Italy has Madrid",
    ]
    assert run("stack", "check", "--folder", folder) == 0
    out = capsys.readouterr().out
    assert "restored bit for bit, 0 hooks left" in out
    assert "Perplexity" in out
    assert run("stack", "check", "--folder", folder, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert [held["edit"] for held in plain["held"]] == ["toy-1", "toy-2"]
    assert plain["receipt"]["restored"] is True
    assert run("stack", "undo", "--folder", folder, "--edit", "toy1") == 2
    assert "Did you mean 'toy-1'" in capsys.readouterr().err
    assert run("stack", "undo", "--folder", folder, "--edit", "toy-1") == 0
    assert "Italy has Madrid" in capsys.readouterr().out
    assert run("stack", "list", "--folder", folder, "--json") == 0
    (edit,) = json.loads(capsys.readouterr().out)["edits"]
    assert (edit["name"], edit["kind"], edit["method"]["name"]) == ("toy-2", "weights", "toy")
    assert run("stack", "add", "--folder", folder, "--model", "refused", "--method", "ike", *FACT) == 2
    assert "was made for little" in capsys.readouterr().err


def test_somebody_elses_folder_is_not_touched(capsys, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear", encoding="utf-8")
    assert run("stack", "add", "--folder", str(folder), *EDIT[1:5], *FACT) == 2
    assert run("export", *EDIT[1:5], *FACT, "--out", str(folder)) == 2
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


def test_an_edited_model_is_exported(capsys, tmp_path):
    out, stack = tmp_path / "out", tmp_path / "stack"
    assert run("export", *EDIT[1:5], *FACT, "--out", str(out)) == 0
    assert str(out) in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json", "edit.json", "README.md"} <= {
        path.name for path in out.iterdir()
    }
    assert run("stack", "add", "--folder", str(stack), *EDIT[1:5], *FACT) == 0
    assert run("export", "--stack", str(stack), "--out", str(tmp_path / "again")) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert run("stack", "add", "--folder", str(stack), "--model", "little", "--method", "ike", *FACT) == 0
    assert run("export", "--stack", str(stack), "--out", str(tmp_path / "third")) == 2
    assert "ike-2 can't be exported" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


# The reference -------------------------------------------------------------------------------------------------------


def test_the_reference_is_up_to_date(monkeypatch):
    monkeypatch.delitem(METHODS._entries, "toy")
    written = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert written == reference.markdown(), "docs/methods.md is not what the code says: run `make docs`"


def test_the_reference_names_everything(capsys):
    assert run("methods", "--json") == 0
    plain = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["methods"]}
    assert list(plain) == list(METHODS.names())
    text = reference.markdown()
    for method in METHODS:
        assert f"## {method.title}\n" in text
        assert method.paper in text
        assert [param["name"] for param in plain[method.name]["params"]] == [knob.name for knob in method.knobs()]
        assert all(f"| `{knob.name}` |" in text for knob in method.knobs())
    assert plain["rome"]["models"]["gpt2-xl"] == {"layer": 17}
    assert plain["rome"]["choices"].startswith("Choices that the papers leave open")
    assert run("methods") == 0
    assert capsys.readouterr().out.count("\n") == len(plain)


def test_signs_of_a_docstring_mean_themselves_in_the_reference():
    assert reference._prose("v* and `a_b*` of <x> [y] | a_b") == "v\\* and `a_b*` of \\<x> \\[y\\] \\| a\\_b"


# Listings ------------------------------------------------------------------------------------------------------------


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
