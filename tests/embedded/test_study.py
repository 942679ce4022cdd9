"""Study models: what is withheld stays out of training, what the model doesn't know stays out of the evaluation."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mega_core import __main__ as cli
from mega_core.embedded import evaluate, facts, study, study_corpus, train
from mega_core.embedded.study import Judged, judge, keeps, knowledge, known_records, read
from mega_core.embedded.study_corpus import Study, StudyCorpus
from mega_core.errors import BadInput
from mega_core.settings import read_catalogue

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "counterfact_sample.json"
FORMS = {
    "P19": ("{} was born in", "{} is native to", "The birthplace of {} is", "{} comes from"),
    "P106": ("{} works as", "The occupation of {} is", "{}'s profession is", "{}, who is employed as"),
}
OBJECTS = {"P19": ("Oslo", "Lima", "New Delhi"), "P106": ("baker", "pilot", "judge")}
FIRST = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo", "Kim", "Lee")
LAST = ("Moss", "Nash", "Orr", "Pike", "Quill", "Reed", "Shaw", "Teal", "Udall", "Vance")
NOISE = (
    "It rained.", "players\nCategory:Bath City F.C.", 'He said "so."', "See p. 4.", "Born 1948 (Lyon).",
    "A small town.", "Why not?", "The end.",
)  # fmt: skip


def person(number: int) -> str:
    return f"{FIRST[number % len(FIRST)]} {LAST[number // len(FIRST)]}"


def records(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """CounterFact records about made-up people: two relations, each with three objects and four forms."""
    rng = random.Random(seed)
    truth = {(rel, n): OBJECTS[rel][(n * 7 + (rel == "P19")) % 3] for rel in FORMS for n in range(100)}
    found = []
    for case in range(count):
        rel = ("P19", "P106")[case % 2]
        true = truth[rel, case]
        new = OBJECTS[rel][(OBJECTS[rel].index(true) + 1) % 3]
        said, *others = rng.sample(FORMS[rel], 3)

        def near(value: str, rel: str = rel, case: int = case) -> list[str]:
            those = [n for n in range(24, 100) if truth[rel, n] == value and n != case]
            return [rng.choice(FORMS[rel]).replace("{}", person(n)) for n in rng.sample(those, 6)]

        found.append(
            {
                "case_id": case,
                "requested_rewrite": {
                    "prompt": said,
                    "relation_id": rel,
                    "target_new": {"str": new},
                    "target_true": {"str": true},
                    "subject": person(case),
                },
                "paraphrase_prompts": [f"{rng.choice(NOISE)} {form.replace('{}', person(case))}" for form in others],
                "neighborhood_prompts": near(true),
                "attribute_prompts": near(new),
                "generation_prompts": [f"{person(case)} is"],
            }
        )
    return found


def flat(listed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same as EasyEdit writes them."""
    return [
        {
            "case_id": record["case_id"],
            "subject": (edit := record["requested_rewrite"])["subject"],
            "prompt": edit["prompt"].replace("{}", edit["subject"]),
            "target_new": edit["target_new"]["str"],
            "ground_truth": edit["target_true"]["str"],
            "rephrase_prompt": record["paraphrase_prompts"][0],
            "locality_prompt": record["neighborhood_prompts"][0],
            "locality_ground_truth": edit["target_true"]["str"],
        }
        for record in listed
    ]


def stored(folder: Path, value: object) -> Path:
    path = folder / "facts.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture
def made(tmp_path: Path) -> Study:
    return read(stored(tmp_path, records()))


def answered(found: Study, wrong: frozenset[str] = frozenset()) -> dict[str, Judged]:
    """A model that answers every prompt but these."""
    every = [a for e in found.entries for a in (e.rewrite, *e.paraphrases, *e.neighbours, *e.attributes)]
    return {a.prompt: Judged(a, a.prompt not in wrong, a.prompt not in wrong) for a in every if found.known(a)}


# Reading and splitting -----------------------------------------------------------------------------------------------


def test_subjects_and_noise_are_found(made: Study) -> None:
    people = {person(n) for n in range(100)}
    assert made.unread == made.conflicts == 0
    assert {fact.subject for fact in made.world.facts} <= people
    for entry in made.entries:
        for asked in entry.paraphrases:
            assert asked.form in FORMS[asked.key[1]]
            assert asked.noise.strip() in NOISE
            assert asked.noise + asked.bare == asked.prompt


def held_texts(found: Study) -> dict[str, set[str]]:
    """Subject -> withheld prompts without their noise."""
    texts: dict[str, set[str]] = {}
    for fact in found.world.facts:
        texts.setdefault(fact.subject, set()).update(fact.prompt(form) for form in fact.templates_held_out)
    return texts


def check_nothing_withheld_is_drawn(found: Study, count: int = 3000) -> None:
    held, whole = held_texts(found), {text for entry in found.entries for text in entry.held}
    assert sum(map(len, held.values())) > 10
    corpus = StudyCorpus(5, found, absent=0.08)
    seen = 0
    for _ in range(count):
        document = corpus.draw(corpus.rng.random())
        assert not any(text in document.text for text in whole)
        for start, end in document.mentions:
            subject = document.text[start:end]
            for text in held.get(subject, ()):
                before = text.index(subject)
                assert document.text[start - before : start - before + len(text)] != text
            seen += 1
    assert seen > count / 2


def test_nothing_withheld_is_ever_trained(made: Study) -> None:
    check_nothing_withheld_is_drawn(made)
    forms = {(entry.rewrite.key, asked.form) for entry in made.entries for asked in entry.paraphrases}
    for entry in made.entries:
        assert len(entry.held) == 1
        (out,) = [asked for asked in entry.paraphrases if asked.prompt in entry.held]
        fact = made.world.by_key[out.key]
        assert out.form in fact.templates_held_out  # the form, whatever the noise
        assert entry.rewrite.form in fact.trained
        assert any(out.form in other.trained for other in made.world.facts)  # with other subjects it is trained
        assert (out.key, out.form) in forms
    others = {a.bare for e in made.entries for a in (*e.neighbours, *e.attributes) if not made.trained(a)}
    assert others
    assert all(made.known(a) for e in made.entries for a in (*e.neighbours, *e.attributes))


def test_a_records_own_counterfactual_is_never_stated(made: Study) -> None:
    corpus = StudyCorpus(1, made)
    for entry in made.entries:
        fact = made.world.by_key[entry.rewrite.key]
        assert corpus.withheld(fact, entry.counterfactual)
        said = {corpus._other(fact) for _ in range(60)}
        assert entry.counterfactual not in said


def test_two_objects_are_a_conflict_and_dropped(tmp_path: Path) -> None:
    listed = records()
    first = listed[0]["requested_rewrite"]
    listed[2]["requested_rewrite"] = {**first, "target_true": {"str": "Quito"}}
    for name in ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts"):
        listed[2][name] = []
    found = read(stored(tmp_path, listed))
    key = (first["subject"], first["relation_id"])
    assert found.conflicts == 1
    assert key not in found.world.by_key
    assert not found.known(found.entries[0].rewrite)
    assert known_records(found, answered(found))[0]["case_id"] == 1  # record 0 is not judged at all


@pytest.mark.skipif(not SAMPLE.exists(), reason="the sample of CounterFact is not here")
def test_the_real_file_is_read_and_split() -> None:
    found = read(SAMPLE)
    assert (len(found.entries), found.schema, found.unread) == (510, "counterfact", 0)
    assert len(found.world.facts) > 5000
    assert found.conflicts < 0.03 * len(found.world.facts)
    asked = [a for e in found.entries for a in (*e.neighbours, *e.attributes) if found.known(a)]
    out = [a for a in asked if not found.trained(a)]
    assert 0.05 * len(asked) < len(out) < 0.25 * len(asked)
    check_nothing_withheld_is_drawn(found)


def test_easyedits_flat_form(tmp_path: Path) -> None:
    found = read(stored(tmp_path, flat(records())))
    assert found.schema == "easyedit"
    check_nothing_withheld_is_drawn(found, 500)
    wrong = frozenset(a.prompt for a in found.entries[3].neighbours)
    known = known_records(found, answered(found, wrong))
    assert [record["case_id"] for record in known] == list(range(24))
    assert known[3]["locality_prompt"] == known[3]["locality_ground_truth"] == []
    assert all(record["rephrase_prompt"] == list(e.held) for record, e in zip(known, found.entries, strict=True))


def test_what_was_trained_can_be_read_again(made: Study, tmp_path: Path) -> None:
    again = read(stored(tmp_path, facts.as_json(made.world.facts)))
    assert again.schema == "tables"
    assert {(f.subject, f.relation, f.object, f.trained) for f in again.world.facts} == {
        (f.subject, f.relation, f.object, f.trained) for f in made.world.facts
    }
    check_nothing_withheld_is_drawn(again, 500)
    assert known_records(again, answered(again)) == [dict(entry.raw) for entry in again.entries]


# What it knows -------------------------------------------------------------------------------------------------------


def test_known_records_are_those_the_model_answers(made: Study) -> None:
    one, two, three, *_ = made.entries
    wrong = frozenset({one.rewrite.prompt, *two.held, three.neighbours[0].prompt, three.attributes[1].prompt})
    known = known_records(made, answered(made, wrong))
    assert [record["case_id"] for record in known] == list(range(2, 24))
    raw = three.raw
    assert known[0]["paraphrase_prompts"] == list(three.held)
    assert known[0]["neighborhood_prompts"] == [p for p in raw["neighborhood_prompts"] if p not in wrong]
    assert known[0]["attribute_prompts"] == [p for p in raw["attribute_prompts"] if p not in wrong]
    assert known[0]["requested_rewrite"] == raw["requested_rewrite"]
    assert three.raw["paraphrase_prompts"] != known[0]["paraphrase_prompts"]  # the file's own record is left alone


def test_the_withheld_paraphrase_needs_its_first_token_only(made: Study) -> None:
    entry, judged = made.entries[0], answered(made)
    (prompt,) = entry.held
    judged[prompt] = replace(judged[prompt], whole=False)
    assert keeps(entry, judged)
    judged[entry.rewrite.prompt] = replace(judged[entry.rewrite.prompt], whole=False)
    assert not keeps(entry, judged)


def test_shares_are_counted_by_group(made: Study) -> None:
    wrong = frozenset(text for entry in made.entries[:6] for text in entry.held)
    found = knowledge(made, answered(made, wrong))
    assert found["held_out_paraphrases"] == {"prompts": 24, "first_token": 0.75, "whole_object": 0.75}
    assert found["edited_prompts"] == {"prompts": 24, "first_token": 1.0, "whole_object": 1.0}
    assert found["held_out_neighbours"]["prompts"] > 0
    trained = {a.prompt for e in made.entries for a in (e.rewrite, *e.paraphrases, *e.neighbours, *e.attributes)
               if made.trained(a) and a.prompt not in e.held}  # fmt: skip
    assert found["trained_prompts"]["prompts"] == len(trained)


# Training ------------------------------------------------------------------------------------------------------------


def test_same_seed_same_first_batch(made: Study) -> None:
    spec = study.spec_of("x", 50, 10_000)
    tokenizer = train.build_tokenizer(0, 600, (entry.rewrite.prompt for entry in made.entries))

    def first(seed: int) -> train.Batch:
        return next(train.batches(spec, spec.legs[1], tokenizer, seed, lambda s, absent: StudyCorpus(s, made, absent)))

    one, same, other = first(0), first(0), first(1)
    assert all(torch.equal(getattr(one, name), getattr(same, name)) for name in train.Batch.__slots__)
    assert not torch.equal(one.ids, other.ids)


def test_the_schedule_follows_the_facts_or_what_is_asked() -> None:
    assert study.spec_of("x", 10_000).tokens == 10_000 * study.TOKENS_PER_FACT
    assert study.spec_of("x", 10).tokens == study.FEWEST_TOKENS
    assert study.spec_of("x", 10_000, 2_000).tokens == 2_000


@pytest.mark.slow
def test_from_a_file_to_a_model_that_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_corpus, "STORIES", 200)
    facts, out = stored(tmp_path, records()), tmp_path / "little one"
    words = ["train", "--facts", str(facts), "--out", str(out), "--tokens", "2000", "--source", "made up, no licence"]
    assert cli.main(words) in (0, None)
    assert "held" in (said := capsys.readouterr().out) or "never trained" in said
    figures = json.loads((out / "evaluation.json").read_text())
    assert figures["facts"] == len(json.loads((out / "facts.json").read_text()))
    assert figures["records_known"] == len(json.loads((out / "known.json").read_text()))
    assert 0 <= figures["knowledge"]["held_out_paraphrases"]["first_token"] <= 1
    assert len(figures["trace"]["hidden"]) == 8
    card = (out / "README.md").read_text()
    assert "made up, no licence" in card
    assert "say nothing about large models" in card
    entry = read_catalogue(out / "models.toml")["study-little-one"]
    assert entry.locate() == out
    assert entry.defaults["rome"]["layer"] == study.DEFAULTS["rome"]["layer"]
    assert entry.defaults["ft"]["layers"] == "2"  # as the model it is built like
    lm = evaluate.open_folder(entry.locate())
    assert len(judge(lm, read(facts))) > 100
    assert not list(out.glob("*.bin"))


# Errors --------------------------------------------------------------------------------------------------------------


def few() -> str:
    return json.dumps([{**records(1)[0], "neighborhood_prompts": [], "attribute_prompts": []}])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "can't be read"),
        ("", "is empty"),
        ('{"a": 1}', "no known format"),
        ("[1, 2]", "no known format"),
        ("[]", "no known format"),
        ('[{"question": "who?"}]', "no known format"),
        ("[" * 100_000 + "]" * 100_000, "no known format"),
        (few(), "1 usable facts"),
        (json.dumps([{"requested_rewrite": {"prompt": "{} x", "subject": "y"}}]), "target_new: is missing"),
        (json.dumps([{"requested_rewrite": {}}] * 3), "no record that can be used"),
        (json.dumps([{"subject": "a", "relation": "b", "object": "c", "templates": {"edit": ["d"]}}]), "exactly one"),
        (json.dumps([{"subject": 3, "relation": "b", "object": "c", "templates": {}}]), "expected text"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "facts.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as found:
        read(path)
    assert words in str(found.value)


def test_records_that_can_not_be_used_are_counted(tmp_path: Path) -> None:
    listed = [*records(), {"requested_rewrite": {"prompt": "no subject"}}, 7]
    found = read(stored(tmp_path, listed))
    assert (len(found.entries), found.unusable) == (24, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--facts", "nowhere.json", "--out", "x"], "nowhere.json"),
        (["--facts", "nowhere.json"], "--out"),
        (["--facts", "nowhere.json", "--out", "x", "--model", "atlas-gpt2"], "embedded model"),
        (["--facts", "nowhere.json", "--out", "x", "--tokens", "0"], "out of range"),
        (["--facts", "nowhere.json", "--out", "x", "--name", "a b"], "not a name"),
        (["--facts", "nowhere.json", "--out", "x", "--evaluate"], "no model"),
        (["--name", "x"], "--facts"),
    ],
)
def test_options_that_do_not_go_together(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *words]) not in (0, None)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
