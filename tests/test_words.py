"""The words everything else is written in: what they accept, how they refuse, and that they survive being stored."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mega_core import frames, keys
from mega_core.errors import ActionableError, BadInput, FrameError, StoreError, UnknownName
from mega_core.events import Advanced, Cancelled, Event, Finished, Started, silent, stage
from mega_core.records import (
    MAX_PROMPTS,
    MAX_SUBJECT,
    MAX_TARGET,
    MAX_TEMPLATE,
    EditRequest,
    Inspection,
    MethodRef,
    ModelRef,
    Receipt,
    Report,
    as_plain,
    inspection_from_plain,
)
from mega_core.registry import Registry

GOOD: dict[str, Any] = {
    "subject": "France", "template": "The capital of {} is", "target_new": "Rome", "target_true": "Paris",
}  # fmt: skip


def request(**changed: Any) -> EditRequest:
    return EditRequest(**{**GOOD, **changed})


# EditRequest -------------------------------------------------------------------------------------------------------


def test_a_request_fills_its_template() -> None:
    assert request().prompt == "The capital of France is"
    assert request().sentence == "The capital of France is Rome"


def test_the_template_is_filled_by_replacing_not_by_formatting() -> None:
    assert request(template="{0} and {name} of {} {{x}} is").prompt == "{0} and {name} of France {{x}} is"


@pytest.mark.parametrize(
    ("changed", "field", "words"),
    [
        ({"subject": ""}, "subject", "is empty"),
        ({"subject": "   "}, "subject", "is empty"),
        ({"subject": "a {} b"}, "subject", "contains {}"),
        ({"subject": "x" * 10_000}, "subject", "10,000 characters"),
        ({"subject": "x" * (MAX_SUBJECT + 1)}, "subject", f"the limit is {MAX_SUBJECT}"),
        ({"subject": None}, "subject", "expected text"),
        ({"subject": b"France"}, "subject", "expected text, got bytes"),
        ({"subject": "Fra\x00nce"}, "subject", "U+0000"),
        ({"subject": "Fra\tnce"}, "subject", "U+0009"),
        ({"subject": "Fra\nnce"}, "subject", "U+000A"),
        ({"subject": "Fra\u202ence"}, "subject", "U+202E"),
        ({"subject": "Fra\u2028nce"}, "subject", "U+2028"),
        ({"subject": "Fra\ud800nce"}, "subject", "U+D800"),
        ({"template": ""}, "template", "is empty"),
        ({"template": "The capital is"}, "template", "has no {}"),
        ({"template": "{} and {} are"}, "template", "2 places"),
        ({"template": "The capital of France is"}, "template", 'Write it as "The capital of {} is"'),
        ({"template": "{} " + "x" * 10_000}, "template", "characters, the limit is"),
        ({"template": "{} is\x1b[2J"}, "template", "U+001B"),
        ({"target_new": ""}, "target_new", "is empty"),
        ({"target_new": "x" * 10_000}, "target_new", f"the limit is {MAX_TARGET}"),
        ({"target_new": "Paris"}, "target_new", "same as the original"),
        ({"target_new": " paris "}, "target_new", "same as the original"),
        ({"target_true": "Par\x07is"}, "target_true", "U+0007"),
        ({"paraphrases": ("",)}, "paraphrases", "is empty"),
        ({"neighbours": ("a\rb",)}, "neighbours", "U+000D"),
        (
            {"neighbours": tuple(f"prompt {i}" for i in range(MAX_PROMPTS + 1))},
            "neighbours",
            f"the limit is {MAX_PROMPTS}",
        ),
        ({"paraphrases": ("x" * (MAX_TEMPLATE + 1),)}, "paraphrases", "the limit is"),
    ],
)
def test_what_a_request_refuses_and_how_it_says_so(changed: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        request(**changed)
    assert caught.value.field == field
    assert words in str(caught.value)
    assert caught.value.next_step, "an error says what to do next"
    assert len(str(caught.value)) < 1_000, "an error doesn't repeat a huge input"


def test_what_a_request_tidies() -> None:
    tidy = request(
        subject="  Cafe\u0301 ", target_true="", paraphrases=["One is", " One is ", "Two is"], template=" {} is "
    )
    assert tidy.subject == "Café"
    assert tidy.template == "{} is"
    assert tidy.target_true is None
    assert tidy.paraphrases == ("One is", "Two is")
    assert request(target_true=None).target_true is None
    assert request(target_true="  ").target_true is None
    assert request(subject="مصر").subject == "مصر"  # written right to left, without direction marks
    assert request(subject="北京 🏯").subject == "北京 🏯"


def test_records_are_frozen_and_compare_by_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        request().subject = "Spain"  # type: ignore[misc]
    assert request() == request()
    assert hash(request()) == hash(request())


visible = st.characters(exclude_categories=("Cc", "Cs", "Cn", "Co", "Cf", "Zl", "Zp"))


def words(limit: int) -> st.SearchStrategy[str]:
    # Normalising may lengthen a text, hence the head room.
    return st.text(visible, min_size=1, max_size=limit // 4).filter(lambda text: text.strip() and "{}" not in text)


@st.composite
def requests(draw: st.DrawFn) -> EditRequest:
    new = draw(words(MAX_TARGET))
    folded = unicodedata.normalize("NFC", new).strip().casefold()
    true = draw(
        st.none() | words(MAX_TARGET).filter(lambda t: unicodedata.normalize("NFC", t).strip().casefold() != folded)
    )
    around = st.text(visible, max_size=40).filter(lambda text: "{" not in text and "}" not in text)
    prompts = st.lists(words(MAX_TEMPLATE), max_size=4).map(tuple)
    return EditRequest(
        draw(words(MAX_SUBJECT).filter(lambda text: "{" not in text and "}" not in text)),
        draw(around) + "{}" + draw(around), new, true, draw(prompts), draw(prompts),
    )  # fmt: skip


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(visible)
)


@st.composite
def inspections(draw: st.DrawFn) -> Inspection:
    params = draw(st.dictionaries(st.text(visible, min_size=1, max_size=9), scalars, max_size=4))
    return Inspection(
        ModelRef(draw(words(60)), draw(st.text(visible, max_size=9)), draw(st.sampled_from(["float32", "bfloat16"]))),
        MethodRef(draw(words(60)), draw(st.integers(1, 99)), tuple(params.items())),
        tuple(draw(st.lists(requests(), min_size=1, max_size=3))),
        tuple(draw(st.lists(st.sampled_from(["module_scores", "lens", "trace"]), max_size=3))),
        draw(st.integers(0, 2**31)),
    )


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)
@given(requests())
def test_a_request_made_again_from_its_own_text_is_the_same(made: EditRequest) -> None:
    again = EditRequest(**dataclasses.asdict(made))
    assert again == made
    assert made.subject in made.prompt


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)
@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=100), st.text(max_size=100))
def test_any_text_is_taken_or_refused_with_a_reason(subject: str, template: str, new: str, true: str) -> None:
    refused: BadInput | None = None
    try:
        made = EditRequest(subject, template, new, true)
    except BadInput as error:
        refused = error
    if refused is None:
        assert made.template.count("{}") == 1
    else:
        assert refused.field in ("subject", "template", "target_new", "target_true")
        assert refused.next_step


# Inspection and its key --------------------------------------------------------------------------------------------


def test_a_question_needs_a_request() -> None:
    with pytest.raises(BadInput, match="no edit"):
        Inspection(ModelRef("m"), MethodRef("rome"), ())


def test_order_of_params_and_views_is_no_part_of_the_question() -> None:
    def asked(params: Any, views: Any) -> Inspection:
        return Inspection(ModelRef("m"), MethodRef("rome", 1, params), (request(),), views)

    one = asked((("b", 1), ("a", 2.5)), ("lens", "module_scores"))
    two = asked((("a", 2.5), ("b", 1)), ("module_scores", "lens", "lens"))
    assert one == two
    assert one.key("w") == two.key("w")


def test_everything_that_decides_the_answer_changes_the_key() -> None:
    base = Inspection(ModelRef("m"), MethodRef("rome", 1, (("layer", 5),)), (request(),))
    others = [
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, views=()),
        dataclasses.replace(base, model=ModelRef("m", "main")),
        dataclasses.replace(base, model=ModelRef("m", "", "float16")),
        dataclasses.replace(base, method=MethodRef("rome", 2, (("layer", 5),))),
        dataclasses.replace(base, method=MethodRef("rome", 1, (("layer", 5.0),))),
        dataclasses.replace(base, method=MethodRef("rome", 1, (("layer", "5"),))),
        dataclasses.replace(base, method=MethodRef("emmet", 1, (("layer", 5),))),
        dataclasses.replace(base, requests=(request(), request())),
        *(
            dataclasses.replace(base, requests=(request(**{name: value}),))
            for name, value in (
                ("subject", "france"), ("template", "The capital of {}"), ("target_new", "rome"), ("target_true", None),
                ("paraphrases", ("x",)), ("neighbours", ("x",)),
            )
        ),
    ]  # fmt: skip
    found = [question.key("w") for question in (base, *others)] + [base.key("other weights")]
    assert len(set(found)) == len(found)
    assert all(len(key) == 64 for key in found)


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)
@given(inspections())
def test_a_question_survives_plain_json(question: Inspection) -> None:
    again = inspection_from_plain(json.loads(json.dumps(as_plain(question))))
    assert again == question
    assert again.key("w") == question.key("w")


# keys --------------------------------------------------------------------------------------------------------------

plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def undo(value: Any) -> Any:
    """What canonical JSON says, back as a value."""
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float.fromhex(value["float"])
        return {key: undo(item) for key, item in value["map"].items()}
    return [undo(item) for item in value] if isinstance(value, list) else value


def same(a: Any, b: Any) -> bool:
    """Equal in type too: 1, 1.0 and True are three values; so are 0.0 and -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a.hex() == b.hex() if isinstance(a, float) else a == b


@given(plain)
def test_canonical_json_loses_nothing(value: Any) -> None:
    assert same(undo(json.loads(keys.canonical(value))), value)


@given(plain, plain)
def test_one_key_means_one_value(a: Any, b: Any) -> None:
    assert (keys.digest(a) == keys.digest(b)) == same(a, b)


@given(st.dictionaries(st.text(max_size=5), scalars, max_size=5))
def test_order_of_a_mapping_is_no_part_of_its_key(value: dict[str, Any]) -> None:
    assert keys.digest(value) == keys.digest(dict(reversed(value.items())))


@dataclass(frozen=True)
class Left:
    x: int = 1


@dataclass(frozen=True)
class Right:
    x: int = 1


def test_dataclasses_are_told_apart_by_name() -> None:
    assert keys.digest(Left()) != keys.digest(Right())
    assert keys.digest(Left()) != keys.digest({"x": 1})


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), b"x", {1, 2}, {1: 2}, object(), Left, 1j, pd.Series([1])]
)
def test_what_cannot_be_written_exactly_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="key can"):
        keys.digest({"value": [value]})


# frames ------------------------------------------------------------------------------------------------------------

SAMPLE = {"text": "a", "int": 3, "float": 0.25, "bool": True}


def row(name: str, **changed: object) -> dict[str, object]:
    return {**{column: SAMPLE[kind] for column, kind in frames.CONTRACTS[name].columns.items()}, **changed}


@pytest.mark.parametrize("name", frames.CONTRACTS)
def test_every_table_survives_parquet(name: str) -> None:
    for table in (frames.empty(name), frames.from_rows([row(name)], name)):
        again = frames.from_parquet(frames.to_parquet(table), name)
        pd.testing.assert_frame_equal(again, table)
        assert list(again.columns) == list(frames.CONTRACTS[name].columns)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row("metrics", value=None)], "missing values in ['value']"),
        ([row("metrics", value="many")], "wrong kind"),
        ([row("metrics"), row("metrics", value=2.0)], "two rows with the same"),
        ([{**row("metrics"), "colour": "red"}], "colour"),
        ([{k: v for k, v in row("metrics").items() if k != "n"}], "lacks ['n']"),
    ],
)
def test_a_table_that_breaks_its_contract_is_refused(rows: list[dict[str, object]], says: str) -> None:
    with pytest.raises(FrameError) as caught:
        frames.from_rows(rows, "metrics")
    assert says in str(caught.value)


def test_check_orders_columns_and_sets_kinds() -> None:
    shuffled = pd.DataFrame([row("metrics", value=1, case=2.0)])[::-1]
    table = frames.check(shuffled[shuffled.columns[::-1]], "metrics")
    assert list(table.columns) == list(frames.CONTRACTS["metrics"].columns)
    assert table["value"].dtype == "float64"
    assert table["case"].dtype == "int64"


def test_an_unknown_table_and_damaged_bytes() -> None:
    with pytest.raises(UnknownName, match="answers"):
        frames.empty("answer")
    with pytest.raises(FrameError, match="can't be read"):
        frames.from_parquet(b"PAR1 not really", "answers")


# Report ------------------------------------------------------------------------------------------------------------


def report(question: Inspection, tables: dict[str, pd.DataFrame] | None = None, **changed: Any) -> Report:
    known: dict[str, Any] = {
        "question": question, "digest": question.key("w"), "model_digest": "w", "frames": tables or {},
        "receipt": Receipt(True, "a", "a", 0), "timing": {"before": 0.5}, "notes": ("one",),
        "environment": {"torch": "2"},
    }  # fmt: skip
    return Report(**{**known, **changed})


some_tables = st.lists(st.sampled_from(sorted(frames.CONTRACTS)), unique=True, max_size=4)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=30)
@given(inspections(), some_tables, numbers, st.text(visible), st.lists(st.text(visible), max_size=2))
def test_a_report_survives_its_bytes(
    question: Inspection, names: list[str], number: float, text: str, notes: list[str]
) -> None:
    tables = {}
    for name in names:
        values = {
            column: {"float": number, "text": text}.get(kind, 1)
            for column, kind in frames.CONTRACTS[name].values.items()
        }
        tables[name] = frames.from_rows([row(name, **values)], name)
    made = report(question, tables, notes=tuple(notes), timing={"before": abs(number)})
    data = made.to_bytes()
    again = Report.from_bytes(data)
    assert again.header() == made.header()
    assert again.question == question
    assert set(again.frames) == set(names)
    for name in names:
        pd.testing.assert_frame_equal(again.frames[name], made.frames[name], check_exact=True)
    assert again.to_bytes() == data, "the same report gives the same bytes"
    json.dumps(made.to_json(), allow_nan=False)


QUESTION = Inspection(ModelRef("m"), MethodRef("rome"), (request(),))


def test_a_report_holds_its_tables_to_their_contracts() -> None:
    with pytest.raises(FrameError):
        report(QUESTION, {"answers": pd.DataFrame({"state": ["before"]})})
    with pytest.raises(TypeError):
        report(QUESTION).frames["answers"] = frames.empty("answers")  # type: ignore[index]


def test_the_same_bytes_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = report(QUESTION, {"metrics": frames.from_rows([row("metrics")], "metrics")}, notes=("once",)).to_bytes()
    first = Report.from_bytes(data)
    assert Report.from_bytes(bytes(bytearray(data))) is first
    monkeypatch.setattr("mega_core.records.KEPT_REPORT_BYTES", 0)  # what is large is not kept
    assert Report.from_bytes(data) is not first


@pytest.mark.parametrize("cut", [0, 1, 40, -30])
def test_a_cut_report_is_refused_with_a_next_step(cut: int) -> None:
    data = report(QUESTION, {"metrics": frames.from_rows([row("metrics")], "metrics")}).to_bytes()
    with pytest.raises(StoreError) as caught:
        Report.from_bytes(data[:cut])
    assert "Run the edit again." in caught.value.next_step


def test_a_report_of_another_schema_is_refused() -> None:
    data = report(QUESTION).to_bytes().replace(b'"schema_version": 1', b'"schema_version": 2')
    with pytest.raises(StoreError):
        Report.from_bytes(data)


# events ------------------------------------------------------------------------------------------------------------


def test_a_stage_says_when_it_begins_advances_and_ends() -> None:
    said: list[Event] = []
    with stage(said.append, "edit", total=2) as step:
        step()
        step()
    assert said == [Started("edit", 2), Advanced("edit", 1, 2), Advanced("edit", 2, 2), Finished("edit")]


def test_a_stage_that_fails_does_not_end() -> None:
    said: list[Event] = []
    with pytest.raises(RuntimeError), stage(said.append, "edit"):
        raise RuntimeError
    assert said == [Started("edit")]


def test_a_reporter_cancels_by_raising() -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Advanced):
            raise Cancelled

    reached: list[int] = []

    def work() -> None:
        with stage(stop, "edit") as step:
            reached.append(1)
            step()
            reached.append(2)

    with pytest.raises(Cancelled):
        work()
    assert reached == [1]
    assert silent(Started("edit")) is None


# errors and registry -----------------------------------------------------------------------------------------------


def every_error(base: type[ActionableError]) -> list[type[ActionableError]]:
    return [base, *(error for child in base.__subclasses__() for error in every_error(child))]


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [error.code for error in every_error(ActionableError) if error.__module__ == "mega_core.errors"]
    assert len(set(codes)) == len(codes)


def test_an_error_carries_what_and_next_step() -> None:
    error = ActionableError("It broke.", "Mend it.")
    assert (error.what, error.next_step, str(error)) == ("It broke.", "Mend it.", "It broke. Mend it.")
    assert str(ActionableError("It broke.")) == "It broke."


def test_a_registry_keeps_order_and_refuses_a_second_of_the_same_name() -> None:
    table: Registry[int] = Registry("method")
    assert table.add("rome", 1) == 1
    table.add("emmet", 2)
    assert (table["rome"], table.names(), list(table), "emmet" in table) == (1, ("rome", "emmet"), [1, 2], True)
    with pytest.raises(ValueError, match="already a method named 'rome'"):
        table.add("rome", 3)


def test_a_registry_suggests_the_closest_name() -> None:
    table: Registry[int] = Registry("method")
    with pytest.raises(UnknownName, match="Known: none"):
        table["rome"]
    table.add("rome", 1)
    with pytest.raises(UnknownName) as caught:
        table["roem"]
    assert "There is no method named 'roem'. Did you mean 'rome'? Known: rome." in str(caught.value)
    with pytest.raises(UnknownName) as huge:
        table["x" * 10_000]
    assert len(str(huge.value)) < 300
