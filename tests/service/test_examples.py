import json
from dataclasses import replace
from itertools import islice

import pytest

from mega_core.embedded import examples, facts
from mega_core.errors import StoreError
from tests.service.reports import REQUEST, make_report

REPORTS = {
    "works": make_report(seed=1),
    "leaks": make_report(seed=2, neighbours_kept=0),
    "fails": make_report(seed=3, says_new=False),
}


def test_written_examples_read_back(tmp_path):
    written = examples.write(REPORTS, tmp_path)
    assert written == examples.load(tmp_path)
    assert [example.outcome for example in written] == ["works", "leaks", "fails"]
    for example in written:
        report = example.report()
        assert report.digest == REPORTS[example.name].digest
        assert report.frames["answers"].equals(REPORTS[example.name].frames["answers"])
        settings = ", published settings" if example.outcome == "fails" else ""
        assert example.title == f"Eiffel Tower: Paris → Rome{settings}"
        assert example.seconds == 2.0


def test_writing_again_leaves_no_old_files(tmp_path):
    (tmp_path / "old.report").write_bytes(b"old")
    examples.write(REPORTS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fails.report", "index.json", "leaks.report", "works.report",
    ]  # fmt: skip


def test_the_same_reports_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        examples.write(REPORTS, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_no_folder_means_no_examples(tmp_path):
    assert examples.load(tmp_path / "nothing") == ()
    assert examples.find("0" * 64, tmp_path / "nothing") is None


def test_an_example_is_found_by_its_digest_only(tmp_path):
    examples.write(REPORTS, tmp_path)
    found = examples.find(REPORTS["leaks"].digest, tmp_path)
    assert found is not None
    assert found.digest == REPORTS["leaks"].digest
    for text in ("", "../works", "0" * 64, REPORTS["leaks"].digest[:12]):
        assert examples.find(text, tmp_path) is None


def test_a_damaged_report_is_told_and_counts_as_absent(tmp_path):
    examples.write(REPORTS, tmp_path)
    (tmp_path / "works.report").write_bytes(b"PK damaged")
    (tmp_path / "leaks.report").unlink()
    (tmp_path / "fails.report").write_bytes(REPORTS["works"].to_bytes())
    for example in examples.load(tmp_path):
        with pytest.raises(StoreError):
            example.report()
        assert examples.find(example.digest, tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"index_version": 1}', '{"index_version": 1, "examples": [{}]}'])
def test_a_damaged_index_is_told(tmp_path, text):
    (tmp_path / "index.json").write_text(text, encoding="utf-8")
    with pytest.raises(StoreError, match="examples"):
        examples.load(tmp_path)


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    examples.write(REPORTS, tmp_path / "shipped")
    index = tmp_path / "shipped" / "index.json"
    plain = json.loads(index.read_text(encoding="utf-8"))
    plain["examples"][0]["file"] = "../../outside.report"
    index.write_text(json.dumps(plain), encoding="utf-8")
    assert examples.load(tmp_path / "shipped")[0].path.parent == tmp_path / "shipped"


def test_choose_takes_the_clearest_of_each_outcome():
    runs = iter(
        [
            make_report(neighbours_kept=2),
            make_report(paraphrases=0),
            make_report(seed=5),
            make_report(neighbours_kept=0, seed=6),
            make_report(says_new=False, seed=7),
            make_report(neighbours_kept=3, seed=8),
        ]
    )
    chosen = examples.choose(iter([REQUEST] * 6), lambda _: next(runs), tries=6, enough=9)
    assert {kind: report.question.seed for kind, report in chosen.items()} == {"works": 5, "leaks": 6, "fails": 7}


def test_choose_stops_as_soon_as_all_are_clear():
    asked = []
    runs = list(REPORTS.values())

    def run(request):
        asked.append(request)
        return runs[(len(asked) - 1) % 3]

    examples.choose(iter([REQUEST] * 50), run, tries=50, enough=0.5)
    assert len(asked) == 3


def test_choose_passes_over_objects_that_begin_alike():
    """Their contributions, which explain first tokens, would show nothing."""
    alike = {}
    for kind, report in REPORTS.items():
        answers = report.frames["answers"].assign(token=" United")
        alike[kind] = replace(report, frames={**report.frames, "answers": answers})
    with pytest.raises(LookupError, match="works, leaks, fails"):
        examples.choose(iter([REQUEST] * 3), lambda _: list(alike.values())[0], tries=3)


def test_choose_names_what_it_never_saw():
    with pytest.raises(LookupError, match="leaks, fails"):
        examples.choose(iter([REQUEST] * 3), lambda _: REPORTS["works"], tries=3)


def test_too_few_prompts_show_nothing():

    from mega_core.summary import outcome

    bare = replace(REQUEST, neighbours=REQUEST.neighbours[:3])
    assert set(examples.fitness(outcome(make_report(request=bare))).values()) == {0.0}


def test_candidates_are_counterfactual_and_repeatable():
    first = list(islice(examples.candidates(3, min_neighbours=4), 40))
    assert first == list(islice(examples.candidates(3, min_neighbours=4), 40))
    assert first != list(islice(examples.candidates(4, min_neighbours=4), 40))
    world = facts.load()
    for request in first:
        fact = next(f for f in world.by_subject[request.subject] if request.template in f.trained)
        assert request.target_true == fact.object
        assert request.target_new in facts.counterfactuals(fact)
        assert len(request.neighbours) >= 4
        assert not set(request.paraphrases) & {fact.prompt(template) for template in fact.trained}
    assert len({request.template for request in first}) > 10


def test_what_is_shipped_is_whole():
    for example in examples.load():
        report = example.report()
        assert report.receipt.restored
        assert example.outcome in examples.OUTCOMES
        assert examples.fitness(examples.outcome(report))[example.outcome] > 0
