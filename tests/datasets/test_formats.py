from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mega_core import datasets
from mega_core.cases import AxisTest, Chain, Hop, Query
from mega_core.errors import BadInput, UnknownName
from mega_core.keys import digest
from mega_core.records import EditRequest
from tests.datasets.samples import COUNTS, FILE_FORMATS, as_file, records, sample, written


def read_one(record: dict[str, Any], format: str = "auto") -> Any:
    found = datasets.read(json.dumps(record).encode(), "one.json", format)
    assert not found.problems
    (case,) = found.cases
    return case


def refusal(record: dict[str, Any], format: str) -> str:
    """What is said about a record that can't be used."""
    found = datasets.read(as_file([*records(format), record]), "x", format)
    (problem,) = found.problems
    assert problem.record == str(record.get("case_id") or record.get("id") or len(records(format)) + 1)
    return problem.text


# Whole files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(COUNTS))
def test_real_samples_load_whole_and_come_back(name: str) -> None:
    path = sample(name)
    found = datasets.load(path)
    assert (found.format, len(found.cases), found.problems) == (name, COUNTS[name], ())
    assert found.name == f"{name}_sample"
    assert found.source == str(path)
    assert len({case.id for case in found.cases}) == COUNTS[name]
    again = datasets.read(as_file([written(name, case) for case in found.cases], lines=True), "x")
    assert again.cases == found.cases
    assert again.digest == found.digest == digest(found.cases)


@pytest.mark.parametrize("name", FILE_FORMATS)
@pytest.mark.parametrize("lines", [False, True])
def test_every_format_is_told_read_and_comes_back(name: str, lines: bool) -> None:
    data = as_file(records(name), lines)
    assert datasets.sniff(data) == name
    found = datasets.read(data, "mine.json")
    assert (found.name, found.format, len(found.cases), found.problems) == ("mine", name, 8, ())
    again = datasets.read(as_file([written(name, case) for case in found.cases]), "x", name)
    assert again.cases == found.cases
    assert again.digest == found.digest
    assert datasets.read(b"\xef\xbb\xbf" + data, "x").digest == found.digest


@pytest.mark.parametrize("asked", FILE_FORMATS)
@pytest.mark.parametrize("actual", FILE_FORMATS)
def test_another_format_than_asked_is_named(asked: str, actual: str) -> None:
    data = as_file(records(actual))
    if asked == actual:
        assert datasets.read(data, "x", asked).format == asked
        return
    if (asked, actual) == ("table", "easyedit"):  # EasyEdit's flat records have a table's columns
        assert len(datasets.read(data, "x", asked).cases) == 8
        return
    with pytest.raises(BadInput) as caught:
        datasets.read(data, "x", asked)
    assert f"({actual})" in caught.value.what
    assert f"({asked})" in caught.value.what
    assert actual in caught.value.next_step


def test_every_format_has_an_example_that_loads() -> None:
    assert set(datasets.FORMATS.names()) == {*FILE_FORMATS, "builtin"}
    for entry in datasets.FORMATS:
        assert entry.title
        assert entry.summary.endswith(".")
        if entry.name != "builtin":
            found = datasets.read(entry.example.encode(), "example")
            assert (found.format, len(found.cases), found.problems) == (entry.name, 1, ())
    with pytest.raises(UnknownName, match="counterfact"):
        datasets.read(b"[]", "x", "counterfacts")
    with pytest.raises(BadInput, match="no format of files"):
        datasets.read(b"[]", "x", "builtin")


def test_some_cases_are_the_first_or_drawn() -> None:
    found = datasets.read(as_file(records("counterfact")), "x")
    assert found.limited(3).cases == found.cases[:3]
    assert found.limited(8) == found.limited(99) == found
    drawn = found.limited(3, seed=4)
    assert drawn == found.limited(3, seed=4)
    assert {case.id for case in found.limited(3, seed=5).cases} != {case.id for case in drawn.cases}
    assert [case for case in found.cases if case in drawn.cases] == list(drawn.cases)
    assert drawn.digest == digest(drawn.cases) != found.digest
    for wrong in (0, -1, True, 2.0, "3"):
        with pytest.raises(BadInput, match="limit"):
            found.limited(wrong)  # type: ignore[arg-type]


def test_a_file_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(as_file(records("zsre")))
    found = datasets.load(path, "zsre", limit=2)
    assert [case.id for case in found.cases] == ["1", "2"]
    assert (found.name, found.source) == ("facts", str(path))
    whole = datasets.load(str(path))
    assert datasets.load(path, seed=3, limit=2) == whole.limited(2, 3)
    assert len(whole.cases) == 8


# Each format, by hand ------------------------------------------------------------------------------------------------


def test_counterfact_by_hand() -> None:
    case = read_one(records("counterfact")[0])
    place = "Orrin Lighthouse"
    assert case.requests == (
        EditRequest(
            place, "{} was built by", "Ada Finch", "Mara Quill",
            (f"Example:\n\t1. {place}, a work of", f"The builder of {place} was"),
            ("Bray Hall was built by", "Velm Bridge was built by", "Tarn Station was built by"),
        ),
    )  # fmt: skip
    assert (case.id, case.relation) == ("100", "P84")
    assert case.attributes == ("Finch House was built by",) * 2
    assert case.generation_prompts == (f"{place} is known for", f"Visitors to {place}")
    assert (case.locality, case.portability, case.tests, case.chains) == ((), (), (), ())


def test_zsre_by_hand() -> None:
    record = {
        **records("zsre")[0],
        "portability": {"Recalled Relation": "", "New Question": "Where?", "New Answer": "T"},
    }
    case = read_one(record)
    asked = EditRequest(
        "Orrin Lighthouse", "Who built {}?", "Ada Finch", "Mara Quill", ("By whom was Orrin Lighthouse built?",)
    )
    assert case.requests == (asked,)
    assert case.locality == (Query("when was the tarn bridge opened", (("1931",),), "nq"),)
    assert case.portability == (Query("Where?", (("T",),), "portability"),)
    assert read_one({**record, "alt": "mara quill"}).request == replace(
        asked, target_new="mara quill", target_true=None
    )
    assert "doesn't name the subject" in refusal({**record, "src": "Who built it?"}, "zsre")


def test_mquake_by_hand() -> None:
    case = read_one(records("mquake")[1])
    assert case.requests == (
        EditRequest("Bray Hall", "{} was built by", "Tomas Bray", "Noor Ashby"),
        EditRequest("Tomas Bray", "{} was born in", "Tarn", "Velm"),
    )

    def hops(who: str, town: str) -> tuple[Hop, Hop]:
        return (
            Hop("Who built Bray Hall?", "Bray Hall was built by", (who, f"{who}, the")),
            Hop(f"Where was {who} born?", f"{who} was born in", (town, f"{town}, the")),
        )

    questions = ("Where was the builder of Bray Hall born?", "The birthplace of Bray Hall's builder?", "And where?")
    assert case.chains == (
        Chain(questions, hops("Noor Ashby", "Velm"), hops("Tomas Bray", "Tarn"), ("Velm", "Velm-on-Sea"), ("Tarn",)),
    )
    assert (case.id, case.relation) == ("51", "P84")
    record = {**records("mquake")[1], "case_id": 500}
    assert refusal({**record, "requested_rewrite": []}, "mquake").startswith("requested_rewrite: is empty")
    broken = {**record["single_hops"][1], "answer": 5}
    assert refusal({**record, "single_hops": [broken]}, "mquake").startswith("single_hops[0].answer: is a number")


def test_easyedit_by_hand() -> None:
    flat, full = read_one(records("easyedit")[1]), read_one(records("easyedit")[0])
    assert flat.requests == (
        EditRequest(
            "Bray Hall", "{} was built by", "Tomas Bray", "Noor Ashby", ("The builder of Bray Hall was",),
            ("Lund Mill was built by",),
        ),
    )  # fmt: skip
    assert flat.locality == (Query("Lund Mill was built by", (("Noor Ashby",),), "neighborhood"),)
    place = "Orrin Lighthouse"
    assert full.request == EditRequest(
        place, "{} was built by", "Ada Finch", "Mara Quill", (f"The builder of {place} was",)
    )
    assert full.portability == (Query(f"{place}'s builder lives in", (("Tarn", "T."),), "Reasoning"),)
    assert full.locality == (
        Query(f"{place} stands in", (("Velm", "V."),), "Relation_Specificity"),
        Query(f"{place} was also built by", (("Ivo",), ("Mara",)), "Forgetfulness"),
    )
    pair = {**records("easyedit")[1], "locality_prompt": ["A is", "B is"], "locality_ground_truth": ["a", "b"]}
    assert [query.answers for query in read_one(pair).locality] == [(("a",),), (("b",),)]
    pair["case_id"] = 70
    assert "1 answers to 2 prompts" in refusal({**pair, "locality_ground_truth": ["a"]}, "easyedit")
    assert refusal({**pair, "ground_truth": [["a", 3]]}, "easyedit").startswith("ground_truth[0]: holds a number")


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        ("The USA and the US is", "US", "The USA and the {} is"),
        ("Velm is Velm", "Velm", "{} is Velm"),
        ("{} is in", "Velm", "{} is in"),
        ("Velmish food comes from", "Velm", "{}ish food comes from"),
        ("Who built {x} {}", "{x}", "Who built {} {}"),
    ],
)
def test_the_subject_becomes_a_place(prompt: str, subject: str, template: str) -> None:
    record = {"subject": subject, "prompt": prompt, "target_new": "new", "ground_truth": "old"}
    if template.count("{}") == 1:
        assert read_one(record).request.template == template
    else:
        assert "2 places" in refusal(record, "easyedit")


def test_ripple_by_hand() -> None:
    case = read_one(records("ripple")[4])
    place, new = "House of Quill", "Noor Ashby"
    assert case.requests == (EditRequest(place, "The name of the builder of {} is", new, "Ren Oduya"),)
    assert case.relation == "BUILDER"
    town = Query(f"The name of the town of {place} is", (("Tarn", "Tarn-on-Sea"),), "regular")
    assert case.tests == (
        AxisTest("RS", (town,), True, (town,)),
        AxisTest("LG", (Query(f"The names of the works of {new} are", ((place,), ("Lund Mill",)), "regular"),), False),
        AxisTest("SA", (Query("The name of the builder of the old pile is", ((new,),), "regular"),), True),
        AxisTest(
            "CI", (Query(f"The name of the birthplace of the builder of {place} is", (("Velm",),), "regular"),), True,
            (Query(f"The birthplace of {new} is", (("Velm",),), "regular"),
             Query("The country of Velm is", (("Lundia",),), "regular")),
        ),
        AxisTest(
            "CII", (Query("The builder of the sight of Tarn is", ((new,),), "regular"),), True,
            (Query("The sight of Tarn is", ((place,),), "regular"),),
        ),
    )  # fmt: skip
    other = {**records("ripple")[4], "id": "x"}
    other["Relation_Specificity"][0]["test_condition"] = "NOT"
    assert refusal(other, "ripple").startswith("Relation_Specificity[0].test_condition: is neither")


def _query(prompt: str, about: str = "S", answer: str = "x", to: object = "Z") -> dict[str, Any]:
    return {"prompt": prompt, "answers": [{"value": answer, "aliases": []}], "subject_id": about, "target_ids": [to]}


@pytest.mark.parametrize(
    ("sentence", "original", "queries", "template", "subject", "new", "true"),
    [
        # The objects begin alike: the split goes back to the verb.
        ("The town of Ivo Lund is New Velm.", "The town of Ivo Lund is New Tarn.", [], "The town of {} is", "Ivo Lund",
         "New Velm", "New Tarn"),
        # No original fact, a verb in the subject.
        ("The author of What is Velm is Ada Finch.", None, [_query("The year of What is Velm is")],
         "The author of {} is", "What is Velm", "Ada Finch", None),
        # A verb in the object, which a query's target names.
        ("The song of Ivo Lund is Love is Blue.", None, [_query("A song is", "other", "Love is Blue", "T")],
         "The song of {} is", "Ivo Lund", "Love is Blue", None),
        # The prompt itself is asked elsewhere; the verb is neither is nor are.
        ("Ivo Lund was taught by Ada Finch.", "Ivo Lund was taught by Mara Quill.", [_query("Ivo Lund was taught by")],
         "{} was taught by", "Ivo Lund", "Ada Finch", "Mara Quill"),
        # A subject in small letters, shared by what is asked about it.
        ("The maker of bell weather is Ada Finch.", None,
         [_query("The year of bell weather is"), _query("The land where bell weather lies is")],
         "The maker of {} is", "bell weather", "Ada Finch", None),
        # A subject with a small word inside; the longest run that all prompts share.
        ("The maker of House of the red Quill is Ada Finch.", None,
         [_query("The year of House of the red Quill is"), _query("The maker of the door of House of the red Quill")],
         "The maker of {} is", "House of the red Quill", "Ada Finch", None),
        # An answer elsewhere names the subject.
        ("The maker of the red door is Ada Finch.", None, [_query("The door of Velm is", "V", "red door", "S")],
         "The maker of the {} is", "red door", "Ada Finch", None),
        # Sentences with other verbs, and shared words after the subject.
        ("Tarn Pier is followed by Velm Pier.", None, [_query("The year of Tarn Pier is")], "{} is followed by",
         "Tarn Pier", "Velm Pier", None),
        ("Tarn Pier follows Is it Velm.", None, [], "{} follows", "Tarn Pier", "Is it Velm", None),
        ("The name of the land which Ivo Lund is associated with is Velm.", None,
         [_query("The name of the creed which Ivo Lund is associated with is")],
         "The name of the land which {} is associated with is", "Ivo Lund", "Velm", None),
        ("The number of children Ivo Lund has is 5.", "The number of children Ivo Lund has is 7.",
         [_query("The number of doors Ivo Lund has is", to=5)], "The number of children {} has is", "Ivo Lund", "5",
         "7"),
        # A test of forgetting names the object.
        ("The song of Ivo Lund is Love is Blue.", None, [_query("The song of Ivo Lund, which is not Love is Blue, is")],
         "The song of {} is", "Ivo Lund", "Love is Blue", None),
        # Another name in the sentence, not shared.
        ("The Velm name of Tarn Pier is Ada.", None, [_query("The year of Tarn Pier is")], "The Velm name of {} is",
         "Tarn Pier", "Ada", None),
    ],
)  # fmt: skip
def test_ripple_names_are_found_in_the_records_texts(
    sentence: str, original: str | None, queries: list[Any], template: str, subject: str, new: str, true: str | None
) -> None:
    edit: dict[str, Any] = {"prompt": sentence, "subject_id": "S", "relation": "R", "target_id": "T"}
    if original is not None:
        edit["original_fact"] = {"prompt": original}
    tests = [{"test_queries": [query], "test_condition": "OR"} for query in queries]
    case = read_one({"edit": edit, "Compositionality_I": tests, "Forgetfulness": tests})
    assert case.requests == (EditRequest(subject, template, new, true),)


def test_ripple_without_a_clue_is_left_out() -> None:
    for sentence, words in (("Tarn lies near Velm.", "object"), ("the maker of it is Ada.", "subject")):
        record = {"edit": {"prompt": sentence, "subject_id": "S", "relation": "R"}, "Forgetfulness": []}
        assert words in refusal(record, "ripple")


def test_a_table_is_the_same_however_it_is_written() -> None:
    cases = datasets.read(as_file(records("table")), "x").cases
    assert cases[0].request == EditRequest(
        "Orrin Lighthouse", "{} was built by", "Ada Finch", "Mara Quill", ("The builder of Orrin Lighthouse was",),
        ("Finch House was built by", "Lund Mill was built by"),
    )  # fmt: skip
    assert cases[1].request == EditRequest("Bray Hall", "{} was built by", "Tomas Bray")
    rows = [written("table", case) for case in cases]
    for delimiter, newline in ((",", "\n"), ("\t", "\r\n"), (";", "\n")):
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
            text = io.StringIO()
            table = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=newline, quoting=quoting)
            table.writeheader()
            table.writerows(rows)
            data = text.getvalue().replace("target_new", "Target New").encode("utf-8-sig")
            assert datasets.sniff(data) == "table"
            assert datasets.read(data, "x.csv").cases == cases


def test_a_template_without_its_place_is_mended_in_words() -> None:
    record = {"id": "m", "subject": "Velm", "template": "Velm lies in", "target_new": "Tarn"}
    assert 'Write it as "{} lies in".' in refusal(record, "table")
    same = {"id": "m", "subject": "Velm", "template": "{} lies in", "target_new": "Tarn", "target_true": "tarn"}
    assert "the same as the original" in refusal(same, "table")
    assert refusal({**same, "target_true": None, "paraphrases": 3}, "table").startswith("paraphrases: is a number")


def test_the_documentation_shows_every_format_as_it_is_read() -> None:
    """The examples of docs/datasets.md are those that load."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
    for entry in datasets.FORMATS:
        assert f"`{entry.name}`" in page
        if entry.name != "builtin":
            assert "\n".join(f"    {line}" for line in entry.example.split("\n")) in page
