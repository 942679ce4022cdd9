"""Records to load: real samples where they are at hand, invented ones in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mega_core.cases import AXES, AxisTest, Case, Query

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
COUNTS = {"counterfact": 510, "mquake": 40, "zsre": 60}
PEOPLE = ("Ada Finch", "Tomas Bray", "Ivo Lund", "Mara Quill", "Noor Ashby", "Pell Arden", "Zoë Müller", "Ren Oduya")
PLACES = (
    "Orrin Lighthouse",
    "Bray Hall",
    "Velm Bridge",
    "Tarn Station",
    "House of Quill",
    "Pier 9",
    "Hôtel Lund",
    "Oduya Dam",
)


def sample(name: str) -> Path:
    """The real sample file, or a skip."""
    path = DATA / f"{name}_sample.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand")
    return path


def records(format: str) -> list[dict[str, Any]]:
    """Eight invented records."""
    return [_MAKE[format](i) for i in range(len(PLACES))]


def as_file(listed: list[Any], lines: bool = False) -> bytes:
    if lines:
        return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in listed)
    return json.dumps(listed, ensure_ascii=False, indent=1).encode()


def _names(i: int) -> tuple[str, str, str]:
    return PLACES[i], PEOPLE[i], PEOPLE[(i + 3) % 8]


def _counterfact(i: int) -> dict[str, Any]:
    place, new, true = _names(i)
    return {
        "case_id": 100 + i,
        "pararel_idx": i,
        "requested_rewrite": {
            "prompt": "{} was built by", "relation_id": "P84", "target_new": {"str": new, "id": "Q1"},
            "target_true": {"str": true, "id": "Q2"}, "subject": place,
        },
        "paraphrase_prompts": [f"Example:\n\t1. {place}, a work of", f"The builder of {place} was"],
        "neighborhood_prompts": [f"{other} was built by" for other in PLACES if other != place][:3],
        "attribute_prompts": ["Finch House was built by", "Finch House was built by"],
        "generation_prompts": [f"{place} is known for", f"Visitors to {place}"],
    }  # fmt: skip


def _zsre(i: int) -> dict[str, Any]:
    place, new, true = _names(i)
    return {
        "subject": place, "src": f"Who built {place}?", "pred": true, "rephrase": f"By whom was {place} built?",
        "alt": new, "answers": [true], "loc": "nq question: when was the tarn bridge opened", "loc_ans": "1931",
        "cond": f"{true} >> {new} || Who built {place}?",
    }  # fmt: skip


def _mquake(i: int) -> dict[str, Any]:
    place, new, true = _names(i)
    hops = [
        [(f"Who built {place}?", f"{place} was built by", who), (f"Where was {who} born?", f"{who} was born in", town)]
        for who, town in ((true, "Velm"), (new, "Tarn"))
    ]
    old_hops, new_hops = (
        [{"question": q, "cloze": c, "answer": a, "answer_alias": [f"{a}, the"]} for q, c, a in both] for both in hops
    )
    rewrites = [
        {"prompt": "{} was built by", "relation_id": "P84", "target_new": {"str": new, "id": "Q1"},
         "target_true": {"str": true, "id": "Q2"}, "subject": place, "question": f"Who built {place}?"},
        {"prompt": "{} was born in", "relation_id": "P19", "target_new": {"str": "Tarn", "id": "Q3"},
         "target_true": {"str": "Velm", "id": "Q4"}, "subject": new, "question": f"Where was {new} born?"},
    ]  # fmt: skip
    return {
        "case_id": 50 + i, "requested_rewrite": rewrites[: 1 + i % 2],
        "questions": [f"Where was the builder of {place} born?", f"The birthplace of {place}'s builder?", "And where?"],
        "answer": "Velm", "answer_alias": ["Velm-on-Sea"], "new_answer": "Tarn", "new_answer_alias": [],
        "single_hops": old_hops, "new_single_hops": new_hops, "orig": {"triples": [["Q5", "P84", "Q2"]]},
    }  # fmt: skip


def _easyedit(i: int) -> dict[str, Any]:
    place, new, true = _names(i)
    record: dict[str, Any] = {
        "case_id": 50 + i, "subject": place, "prompt": f"{place} was built by", "target_new": new, "ground_truth": true,
    }  # fmt: skip
    if i % 2:
        return {
            **record, "rephrase_prompt": f"The builder of {place} was",
            "locality_prompt": "Lund Mill was built by", "locality_ground_truth": true,
        }  # fmt: skip
    return {
        **record, "ground_truth": [true], "rephrase": [f"The builder of {place} was"],
        "portability": {"Reasoning": [{"prompt": f"{place}'s builder lives in", "ground_truth": [["Tarn", "T."]]}],
                        "Subject_Aliasing": []},
        "locality": {"Relation_Specificity": [{"prompt": f"{place} stands in", "ground_truth": ["Velm", "V."]}],
                     "Forgetfulness": [{"prompt": f"{place} was also built by", "ground_truth": [["Ivo"], ["Mara"]]}]},
    }  # fmt: skip


def _ripple(i: int) -> dict[str, Any]:
    place, new, true = _names(i)

    def query(prompt: str, *answers: tuple[str, ...], about: str = f"Q{i}", to: tuple[str, ...] = ()) -> dict[str, Any]:
        return {
            "prompt": prompt, "answers": [{"value": names[0], "aliases": list(names[1:])} for names in answers],
            "query_type": "regular", "subject_id": about, "relation": "R", "target_ids": list(to), "phrase": None,
        }  # fmt: skip

    def test(*queries: dict[str, Any], given: tuple[dict[str, Any], ...] = (), condition: str = "OR") -> dict[str, Any]:
        return {"test_queries": list(queries), "test_condition": condition, "condition_queries": list(given)}

    town = query(f"The name of the town of {place} is", ("Tarn", "Tarn-on-Sea"), to=("Q77",))
    record: dict[str, Any] = {
        "example_type": "popular",
        "edit": {
            "prompt": f"The name of the builder of {place} is {new}.", "subject_id": f"Q{i}", "relation": "BUILDER",
            "target_id": f"Q{i}1",
            "original_fact": {"prompt": f"The name of the builder of {place} is {true}.", "subject_id": f"Q{i}",
                              "relation": "BUILDER", "target_id": f"Q{i}2"},
        },
        "Relation_Specificity": [test(town, given=(town,))],
        "Logical_Generalization": [test(query(f"The names of the works of {new} are", (place,), ("Lund Mill",)),
                                        condition="AND")],
        "Subject_Aliasing": [test(query("The name of the builder of the old pile is", (new,), to=(f"Q{i}1",)))],
        "Compositionality_I": [test(query(f"The name of the birthplace of the builder of {place} is", ("Velm",)),
                                    given=(query(f"The birthplace of {new} is", ("Velm",), about=f"Q{i}1"),
                                           query("The country of Velm is", ("Lundia",), about="Q78")))],
        "Compositionality_II": [test(query("The builder of the sight of Tarn is", (new,), about="Q77"),
                                     given=(query("The sight of Tarn is", (place,), about="Q77", to=(f"Q{i}",)),))],
        "Forgetfulness": [],
    }  # fmt: skip
    if i % 2:
        record["Relation_Specifity"] = record.pop("Relation_Specificity")
        del record["edit"]["original_fact"]
    return record


def _table(i: int) -> dict[str, Any]:
    place, new, true = _names(i)
    record: dict[str, Any] = {"id": f"row {i}", "subject": place, "target_new": new}
    if i % 2:
        return {**record, "prompt": f"{place} was built by"}
    return {
        **record, "template": "{} was built by", "target_true": true, "paraphrases": [f"The builder of {place} was"],
        "neighbours": ["Finch House was built by", "Lund Mill was built by"],
    }  # fmt: skip


_MAKE = {
    "counterfact": _counterfact, "zsre": _zsre, "mquake": _mquake, "easyedit": _easyedit, "ripple": _ripple,
    "table": _table,
}  # fmt: skip


# Back to records: plain inverses, one per format ---------------------------------------------------------------------


def written(format: str, case: Case) -> dict[str, Any]:
    """A case as a record of this format."""
    return _WRITE[format](case)


def _rewrite(request: Any, relation: str) -> dict[str, Any]:
    return {
        "prompt": request.template, "subject": request.subject, "relation_id": relation,
        "target_new": {"str": request.target_new},
        "target_true": request.target_true and {"str": request.target_true},
    }  # fmt: skip


def _write_counterfact(case: Case) -> dict[str, Any]:
    return {
        "case_id": case.id, "requested_rewrite": _rewrite(case.request, case.relation),
        "paraphrase_prompts": list(case.request.paraphrases), "neighborhood_prompts": list(case.request.neighbours),
        "attribute_prompts": list(case.attributes), "generation_prompts": list(case.generation_prompts),
    }  # fmt: skip


def _write_zsre(case: Case) -> dict[str, Any]:
    (asked,) = case.locality
    return {
        "subject": case.request.subject, "src": case.request.prompt, "alt": case.request.target_new,
        "answers": [case.request.target_true or case.request.target_new], "rephrase": case.request.paraphrases[0],
        "loc": f"nq question: {asked.prompt}", "loc_ans": asked.answer,
    }  # fmt: skip


def _write_mquake(case: Case) -> dict[str, Any]:
    (chain,) = case.chains
    hops = {
        key: [{"question": hop.question, "cloze": hop.cloze, "answer": hop.answers[0], "answer_alias": hop.answers[1:]}
              for hop in listed]
        for key, listed in (("single_hops", chain.hops), ("new_single_hops", chain.new_hops))
    }  # fmt: skip
    return {
        "case_id": case.id, "requested_rewrite": [_rewrite(request, case.relation) for request in case.requests],
        "questions": chain.questions, "answer": chain.answers[0], "answer_alias": chain.answers[1:],
        "new_answer": chain.new_answers[0], "new_answer_alias": chain.new_answers[1:], **hops,
    }  # fmt: skip


def _write_easyedit(case: Case) -> dict[str, Any]:
    def listed(queries: tuple[Query, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for query in queries:
            found.setdefault(query.name, []).append({"prompt": query.prompt, "ground_truth": query.answers})
        return found

    return {
        "case_id": case.id, "subject": case.request.subject, "prompt": case.request.prompt,
        "target_new": case.request.target_new, "ground_truth": case.request.target_true,
        "rephrase_prompt": list(case.request.paraphrases), "locality": listed(case.locality),
        "portability": listed(case.portability),
    }  # fmt: skip


def _write_ripple(case: Case) -> dict[str, Any]:
    def query(one: Query) -> dict[str, Any]:
        about = "S" if case.request.subject in one.prompt else "other"
        answers = [{"value": names[0], "aliases": names[1:]} for names in one.answers]
        return {"prompt": one.prompt, "answers": answers, "query_type": one.name, "subject_id": about}

    def test(one: AxisTest) -> dict[str, Any]:
        return {
            "test_queries": [query(asked) for asked in one.queries],
            "test_condition": "OR" if one.any_query else "AND",
            "condition_queries": [query(asked) for asked in one.conditions],
        }

    request = case.request
    original = request.target_true and {"prompt": f"{request.prompt} {request.target_true}."}
    edit = {"prompt": f"{request.prompt} {request.target_new}.", "subject_id": "S", "relation": case.relation}
    tests = {name: [test(one) for one in case.tests if one.axis == axis] for axis, name in AXES.items()}
    return {"edit": {**edit, "original_fact": original}, **tests}


def _write_table(case: Case) -> dict[str, Any]:
    return {
        "id": case.id, "subject": case.request.subject, "template": case.request.template,
        "target_new": case.request.target_new, "target_true": case.request.target_true or "",
        "paraphrases": "|".join(case.request.paraphrases), "neighbours": json.dumps(case.request.neighbours),
    }  # fmt: skip


_WRITE = {
    "counterfact": _write_counterfact, "zsre": _write_zsre, "mquake": _write_mquake, "easyedit": _write_easyedit,
    "ripple": _write_ripple, "table": _write_table,
}  # fmt: skip
FILE_FORMATS = tuple(_WRITE)
