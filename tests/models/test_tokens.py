"""Spacing, subjects and padding: byte-level, with BOS, the real GPT-2 tokenizer and a real SentencePiece one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mega_core.errors import BadInput
from mega_core.models import tokens
from tests.tiny import tiny_tokenizer

KINDS = ("byte-level", "bos", "gpt2-tokenizer", "stories260k")


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, shared_data: Callable[[str], Path]):
    if request.param in ("byte-level", "bos"):
        return tiny_tokenizer(bos=request.param == "bos")
    return AutoTokenizer.from_pretrained(shared_data(request.param), local_files_only=True)


FACTS = [
    ("The capital of {} is", "France"),
    ("{} is located in the city of", "The Eiffel Tower"),
    ("{}", "Rome"),
    ("Where is {}?", "Mount Kenya"),
    ("In {}'s opinion, the best is", "Marie Curie"),
    ("({}) speaks", "Zürich"),
    ("{} is by", "東京タワー"),
    ("{}-based", "São Paulo"),
]


@pytest.mark.parametrize(("template", "subject"), FACTS)
def test_the_subject_ends_where_its_last_character_is(tokenizer, template: str, subject: str):
    prompt = template.replace("{}", subject)
    ids = tokens.prompt_ids(tokenizer, prompt)
    first, end = tokens.subject_span(tokenizer, template, subject)
    at = tokens.subject_last(tokenizer, template, subject)
    assert at == end - 1 < len(ids)

    def text(some: tuple[int, ...]) -> str:
        return tokenizer.decode(list(some), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    start, stop = template.index("{}"), template.index("{}") + len(subject)
    # All of the subject is inside the span, and without its last token it isn't.
    assert text(ids[:end]).lstrip().startswith(prompt[:stop].lstrip())
    assert not text(ids[:at]).lstrip().startswith(prompt[:stop].lstrip())
    assert len(text(ids[:first]).strip()) <= len(prompt[:start])


def test_a_subject_of_several_tokens(tokenizer):
    first, end = tokens.subject_span(tokenizer, "{} is located in", "Xylophonia Quux")
    assert end - first > 1
    assert tokens.subject_last(tokenizer, "{} is located in", "Xylophonia Quux") == end - 1


def test_the_index_holds_in_a_padded_batch(tokenizer):
    template, subject = "The capital of {} is", "France"
    at = tokens.subject_last(tokenizer, template, subject)
    alone = tokens.encode(tokenizer, [template.replace("{}", subject)])
    batch = tokens.encode(tokenizer, [template.replace("{}", subject), "A much longer prompt about nothing at all is"])
    assert batch.ids[0, at] == alone.ids[0, at]
    assert batch.mask[0].tolist() == [i < alone.ids.shape[1] for i in range(batch.ids.shape[1])]
    assert batch.last.tolist() == [alone.ids.shape[1] - 1, batch.ids.shape[1] - 1]
    assert batch.rows()[0] == alone.rows()[0]


def test_the_same_subject_word_elsewhere_does_not_confuse(tokenizer):
    template = "Paris, said the man, is the capital; {} is"
    at = tokens.subject_last(tokenizer, template, "Paris")
    assert at > tokens.subject_last(tokenizer, "{}, said the man, is the capital; Paris is", "Paris")


# Targets --------------------------------------------------------------------------------------------------------------

PROMPT = "The capital of France is"


@pytest.mark.parametrize("target", ["Paris", "New York City", "Zürich", "42", "x"])
def test_a_target_is_what_follows_the_prompt(tokenizer, target: str):
    row = tokens.with_target(tokenizer, PROMPT, target)
    assert row.ids[: row.target_start] == tokens.prompt_ids(tokenizer, PROMPT)
    assert row.target == tokens.target_ids(tokenizer, PROMPT, target)
    whole = tokenizer.decode(list(row.ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert whole.strip() == f"{PROMPT} {target}"
    assert tokens.continuation(tokenizer, row.ids[: row.target_start], row.target) == f" {target}"
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        assert row.ids.count(tokenizer.bos_token_id) == 1, "the target must not bring a BOS of its own"


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        (PROMPT, " Paris"),
        (PROMPT + " ", "Paris"),
        (PROMPT + " ", " Paris"),
        (PROMPT + "   ", "  Paris "),
        (PROMPT, "Paris "),
    ],
)
def test_blanks_are_never_doubled(tokenizer, prompt: str, target: str):
    assert tokens.with_target(tokenizer, prompt, target) == tokens.with_target(tokenizer, PROMPT, "Paris")
    assert tokens.prompt_ids(tokenizer, prompt) == tokens.prompt_ids(tokenizer, PROMPT)


def test_the_real_gpt2_ids(shared_data: Callable[[str], Path]):
    tokenizer = AutoTokenizer.from_pretrained(shared_data("gpt2-tokenizer"), local_files_only=True)
    assert tokens.target_ids(tokenizer, PROMPT, "Paris") == (6342,)
    assert tokens.prompt_ids(tokenizer, "The Eiffel Tower is in") == (464, 412, 733, 417, 8765, 318, 287)
    assert tokens.subject_span(tokenizer, "The {} is in", "Eiffel Tower") == (1, 5)
    assert tokens.token_strings(tokenizer, (464, 412, 733, 417, 8765)) == ["The", " E", "iff", "el", " Tower"]


def test_a_prompt_keeps_its_ids_when_the_border_would_merge():
    class Merging:
        """Joins "is Rome" into one token, as some scripts and punctuation do."""

        table = {"Who is": (5, 6), "Who is Rome": (5, 99), "a": (1,), "a Rome": (1, 7, 8)}

        def __call__(self, text: str, **_: object) -> dict[str, list]:
            ids = list(self.table[text])
            return {"input_ids": ids, "offset_mapping": [(0, 1)] * len(ids), "special_tokens_mask": [0] * len(ids)}

    assert tokens.with_target(Merging(), "Who is", "Rome") == tokens.Row((5, 6, 7, 8), 2)


def test_a_tokenizer_that_closes_texts_is_left_open():
    class Closing:
        def __call__(self, text: str, **_: object) -> dict[str, list]:
            ids = [1, *(ord(c) for c in text), 2]
            spans = [(0, 0), *((i, i + 1) for i in range(len(text))), (0, 0)]
            return {"input_ids": ids, "offset_mapping": spans, "special_tokens_mask": [1, *[0] * len(text), 1]}

    row = tokens.with_target(Closing(), "ab", "c")
    assert row.ids == (1, ord("a"), ord("b"), ord(" "), ord("c"))
    assert row.target == (ord(" "), ord("c"))


# Refusals and labels --------------------------------------------------------------------------------------------------


def test_nothing_to_read_is_refused(tokenizer):
    for prompt in ("", "   "):
        with pytest.raises(BadInput, match="empty"):
            tokens.encode(tokenizer, [prompt])
        with pytest.raises(BadInput, match="empty"):
            tokens.with_target(tokenizer, prompt, "Paris")
    with pytest.raises(BadInput, match="target"):
        tokens.with_target(tokenizer, PROMPT, " ")
    with pytest.raises(BadInput, match="prompt"):
        tokens.encode(tokenizer, [])
    with pytest.raises(BadInput, match="template"):
        tokens.subject_last(tokenizer, "The capital of France is", "France")
    with pytest.raises(BadInput, match="template"):
        tokens.subject_last(tokenizer, "{} and {}", "France")
    with pytest.raises(BadInput, match="subject"):
        tokens.subject_last(tokenizer, "{} is", " ")


def test_labels_keep_their_blanks(tokenizer):
    text = "Paris is in France"
    ids = tokens.prompt_ids(tokenizer, text)
    labels = tokens.token_strings(tokenizer, ids)
    assert len(labels) == len(ids)
    specials = set(tokenizer.all_special_tokens)
    assert "".join(label for label in labels if label not in specials).lstrip() == text
    assert tokens.token_strings(tokenizer, [10**6]) == ["<1000000>"]


@settings(max_examples=60, deadline=None)
@given(
    subject=st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co", "Zs", "Zl", "Zp"]),
        min_size=1,
        max_size=12,
    ),
    before=st.sampled_from(["", "The capital of ", "(", "x", '"']),
    after=st.sampled_from([" is", "", "'s name is", ")", "s"]),
    bos=st.booleans(),
)
def test_any_subject_is_found_and_any_target_follows(subject: str, before: str, after: str, bos: bool):
    tokenizer = tiny_tokenizer(bos)
    template = f"{before}{{}}{after}"
    if template.count("{}") != 1 or "{}" in subject:
        return
    at = tokens.subject_last(tokenizer, template, subject)
    ids = tokens.prompt_ids(tokenizer, template.replace("{}", subject))
    assert 0 <= at < len(ids)
    row = tokens.with_target(tokenizer, template.replace("{}", subject), subject)
    assert row.ids[: row.target_start] == ids
    assert row.target
