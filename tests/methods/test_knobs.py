"""Parameters as forms, command line and keys see them: everything spelled out, nothing wrong gets through."""

from dataclasses import FrozenInstanceError, dataclass

import pytest

from mega_core.errors import BadInput
from mega_core.methods.base import METHODS, Knob, Method, knob
from mega_core.methods.rome import ROME
from mega_core.records import MethodRef


@dataclass(frozen=True, slots=True)
class Params:
    depth: int | None = knob(None, "How deep.", low=0, high=9)
    rate: float = knob(0.5, "How fast.", low=0.0, high=1.0)
    count: int = knob(3, "How many.", low=1)
    careful: bool = knob(True, "Whether.")
    colour: str = knob("red", "Which.", choices=("red", "blue"))
    words: str = knob("", "Anything.")


def _never(*_):
    raise RuntimeError("not called")


TOY = Method("toy", "Toy", "A toy.", "weights", "none", Params, _never, lambda spec: None, version=4)


def _knob(name: str) -> Knob:
    return next(k for k in TOY.knobs() if k.name == name)


def test_knobs_come_from_the_dataclass_in_its_order() -> None:
    assert [k.name for k in TOY.knobs()] == ["depth", "rate", "count", "careful", "colour", "words"]
    depth = _knob("depth")
    assert (depth.kind, depth.optional, depth.low, depth.high, depth.default) == (int, True, 0, 9, None)
    assert _knob("colour").choices == ("red", "blue")
    assert not _knob("rate").optional
    assert all(k.help for k in TOY.knobs())


def test_a_ref_spells_out_every_parameter() -> None:
    ref = TOY.ref()
    assert ref == MethodRef("toy", 4, tuple(TOY.ref({}).params))
    assert dict(ref.params) == {
        "depth": None, "rate": 0.5, "count": 3, "careful": True, "colour": "red", "words": "",
    }  # fmt: skip


def test_given_wins_over_the_models_default_wins_over_the_methods() -> None:
    params = dict(TOY.ref({"rate": 0.2}, {"rate": 0.9, "count": 7}).params)
    assert (params["rate"], params["count"], params["colour"]) == (0.2, 7, "red")


def test_text_and_plain_values_give_the_same_question() -> None:
    plain = TOY.ref({"depth": 4, "rate": 1, "count": 2, "careful": False, "colour": "blue"})
    text = TOY.ref({"depth": "4", "rate": "1.0", "count": "2.0", "careful": "no", "colour": "blue"})
    assert plain == text
    assert type(dict(plain.params)["rate"]) is float


@pytest.mark.parametrize("value", [None, "", "none", "Auto", "  "])
def test_an_optional_knob_may_be_unset(value) -> None:
    assert dict(TOY.ref({"depth": value}).params)["depth"] is None


def test_read_gives_the_frozen_dataclass_back() -> None:
    params = TOY.read(TOY.ref({"depth": 2, "colour": "blue"}))
    assert params == Params(depth=2, colour="blue")
    with pytest.raises(FrozenInstanceError):
        params.depth = 3


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("depth", 10, "Allowed: 0 to 9"),
        ("depth", -1, "out of range"),
        ("depth", 1.5, "whole number"),
        ("depth", True, "whole number"),
        ("depth", "inf", "whole number"),
        ("rate", float("nan"), "Allowed"),
        ("rate", "nan", "Allowed"),
        ("rate", "1e999", "Allowed"),
        ("rate", "fast", "a number"),
        ("rate", None, "needs a value"),
        ("rate", [1], "a number"),
        ("count", 0, "out of range"),
        ("count", "", "whole number"),
        ("careful", "perhaps", "true or false"),
        ("careful", 1, "true or false"),
        ("colour", "green", "Choose one of: red, blue"),
        ("words", 3, "text"),
    ],
)
def test_wrong_values_are_refused_by_method_and_parameter(name: str, value, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        TOY.ref({name: value})
    assert caught.value.field == f"toy.{name}"
    assert words in str(caught.value)


def test_unknown_parameters_are_refused_with_the_known_ones() -> None:
    with pytest.raises(BadInput, match="Known: depth, rate") as caught:
        TOY.ref({"deph": 1})
    assert caught.value.field == "toy.deph"
    with pytest.raises(BadInput):
        TOY.ref({}, {"from the catalogue": 1})


def test_a_stored_ref_is_checked_again() -> None:
    with pytest.raises(BadInput):
        TOY.read(MethodRef("toy", 4, (("rate", 7.0),)))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_methods_defaults_are_within_their_own_range(method: Method) -> None:
    ref = method.ref()
    assert method.read(ref) == method.params()
    for each in method.knobs():
        assert each.kind in (int, float, bool, str), each.name
        assert each.help.endswith("."), each.name


def test_romes_knobs_are_all_there() -> None:
    names = {k.name for k in ROME.knobs()}
    assert {"layer", "key_form", "covariance", "steps", "clamp", "clamp_reference", "kl_weight"} <= names
