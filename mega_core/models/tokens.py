"""Every subtlety of tokenizers: spacing of targets, the subject's position, padding.

Positions are indices into the tokens of the whole prompt, special tokens included, and come from character offsets on
the whole string: token counts of pieces don't add up (merges across the border, a BOS per piece, SentencePiece blanks).
Prompts carry no blank at their end; the blank before a target belongs to the target's first token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mega_core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens, padded on the right: position p is the same token in a batch and alone."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    """True at real tokens."""
    last: Int[Tensor, " batch"]
    """Index of each row's last real token."""
    start: Int[Tensor, " batch"]
    """Index of the first token after each row's prompt: last + 1, or where a target begins that is read along."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Real tokens per row."""
        return [last + 1 for last in self.last.tolist()]

    def rows(self) -> list[tuple[int, ...]]:
        """The ids of each row without padding."""
        return [tuple(row[:n]) for row, n in zip(self.ids.tolist(), self.lengths, strict=True)]


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt followed by its target."""

    ids: tuple[int, ...]
    target_start: int
    """Index of the target's first token; the token that predicts it is the one before."""

    @property
    def target(self) -> tuple[int, ...]:
        """The target's ids."""
        return self.ids[self.target_start :]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> tuple[int, ...]:
    """The ids of a prompt after the special tokens that the tokenizer puts in front. Raises BadInput without any."""
    text = prompt.rstrip(" ")
    if not text:
        raise BadInput("prompt", "is empty.", "Write the beginning of a sentence.")
    return _ids(tokenizer, text)


def encode(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], device: torch.device | str = "cpu"
) -> TokenBatch:
    """Prompts as one right-padded batch."""
    return pack(tokenizer, [prompt_ids(tokenizer, prompt) for prompt in prompts], device)


def pack(
    tokenizer: PreTrainedTokenizerFast,
    rows: Iterable[Sequence[int]],
    device: torch.device | str = "cpu",
    starts: Sequence[int] | None = None,
) -> TokenBatch:
    """Rows of ids (such as Row.ids) as one right-padded batch; `starts` tells where their prompts end."""
    listed = [list(row) for row in rows]
    if not listed or not all(listed):
        raise BadInput("prompt", "there is nothing to run.", "Give at least one prompt of one token.")
    lengths = torch.tensor([len(row) for row in listed])
    width = int(lengths.max())
    pad = pad_id(tokenizer)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in listed])
    mask = torch.arange(width) < lengths[:, None]  # (batch, pos)
    start = lengths if starts is None else torch.tensor(list(starts))
    return TokenBatch(ids.to(device), mask.to(device), (lengths - 1).to(device), start.to(device))


def behind(
    tokenizer: PreTrainedTokenizerFast, prefix: str, ids: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A row of ids with a text put in front, read as one text; and where each of the row's tokens went.

    The row's first word may be cut into other tokens there (it may gain a blank); then a token went to the one that
    holds its last character. All later tokens are the same ones. Special tokens at the front stay there.
    """
    lead = leading_specials(tokenizer, ids)
    own = tuple(ids[lead:])
    text = _text(tokenizer, own)
    again, spans = _encode(tokenizer, text)
    if again[-len(own) :] == own:
        full, places = _encode(tokenizer, prefix + text)
        starts = [start for start, _ in places]
        ends = [len(prefix) + end for _, end in spans[-len(own) :]]
        return full, (*range(lead), *(bisect_left(starts, end) - 1 for end in ends))
    full = _ids(tokenizer, prefix.rstrip(" ")) + own  # the text doesn't give these tokens again: keep them
    return full, (*range(lead), *range(len(full) - len(own), len(full)))


def leading_specials(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> int:
    """How many special tokens (a BOS) the row begins with."""
    specials = set(tokenizer.all_special_ids)
    return next((i for i, token in enumerate(ids) if token not in specials), 0)


def with_target(tokenizer: PreTrainedTokenizerFast, prompt: str, target: str) -> Row:
    """The prompt's ids followed by the target's: the ids that come after the prompt when " " + target is appended.

    The row always begins with exactly the prompt's ids, so that positions found in the prompt hold in the row.
    """
    word = target.strip(" ")
    if not word:
        raise BadInput("target", "is empty.", "Write the new object.")
    before = prompt_ids(tokenizer, prompt)
    full = _ids(tokenizer, f"{prompt.rstrip(' ')} {word}")
    if full[: len(before)] == before and len(full) > len(before):
        return Row(full, len(before))
    # The border was merged into one token (punctuation, some scripts): keep the prompt as the model read it.
    tail = _tail_ids(tokenizer, word)
    if not tail:
        raise BadInput("target", f"{word[:40]!r} has no tokens in this model.", "Choose another object.")
    return Row(before + tail, len(before))


def target_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, target: str) -> tuple[int, ...]:
    """The ids of the target as it follows the prompt."""
    return with_target(tokenizer, prompt, target).target


def subject_last(tokenizer: PreTrainedTokenizerFast, template: str, subject: str) -> int:
    """Index of the last token that holds a character of the subject, in the filled template."""
    return subject_span(tokenizer, template, subject)[1] - 1


def subject_span(tokenizer: PreTrainedTokenizerFast, template: str, subject: str) -> tuple[int, int]:
    """First token of the subject and the one after its last, in the filled template. Raises BadInput if not there."""
    if template.count("{}") != 1:
        raise BadInput("template", "needs exactly one {} where the subject goes.", "For example: The capital of {} is")
    name = subject.strip()
    if not name:
        raise BadInput("subject", "is empty.", "Name the subject of the fact.")
    start = template.index("{}") + subject.index(name)
    end = start + len(name)
    text = template.replace("{}", subject).rstrip(" ")
    offsets = _encode(tokenizer, text)[1]
    inside = [i for i, (left, right) in enumerate(offsets) if left < end and right > start and right > left]
    if not inside:
        raise BadInput("subject", f"no token of the prompt belongs to {subject[:40]!r}.", "Choose another subject.")
    return inside[0], inside[-1] + 1


def token_strings(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> list[str]:
    """A readable label per token, leading blanks kept. Labels repeat: never use them as an index."""
    listed = [int(i) for i in ids]
    labels = []
    for i, token in zip(listed, tokenizer.convert_ids_to_tokens(listed), strict=True):
        if token is None:  # the model's matrix is often wider than the tokenizer's vocabulary
            labels.append(f"<{i}>")
        elif "▁" in token:  # decode() drops a SentencePiece token's leading blank
            labels.append(token.replace("▁", " "))
        else:
            labels.append(_text(tokenizer, [i], special=True))
    return labels


def continuation(tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that `new` adds after `prompt`."""
    both, before = _text(tokenizer, [*prompt, *new]), _text(tokenizer, prompt)
    return both[len(before) :] if both.startswith(before) else _text(tokenizer, new)


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of a row, without special tokens."""
    return _text(tokenizer, ids)


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that fills rows; which one doesn't matter, since no real token attends to what follows it."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _text(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], special: bool = False) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    ids = _encode(tokenizer, text)[0]
    if not ids:
        raise BadInput("prompt", f"{text[:40]!r} has no tokens in this model.", "Write a longer prompt.")
    return ids


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Ids and character spans, without special tokens that the tokenizer puts at the end: a prompt must stay open."""
    out = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    n = len(out["input_ids"])
    while n and out["special_tokens_mask"][n - 1]:
        n -= 1
    return tuple(out["input_ids"][:n]), [tuple(span) for span in out["offset_mapping"][:n]]


def _tail_ids(tokenizer: PreTrainedTokenizerFast, word: str) -> tuple[int, ...]:
    """Ids of " word" inside a text, found behind a neutral word because SentencePiece adds a blank at the start."""
    stem = _ids(tokenizer, "a")
    full = _ids(tokenizer, f"a {word}")
    if full[: len(stem)] == stem:
        return full[len(stem) :]
    return tuple(tokenizer(f" {word}", add_special_tokens=False)["input_ids"])
