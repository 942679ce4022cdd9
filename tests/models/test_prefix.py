"""A prefix stands in front of every prompt, and nothing else notices: positions are those of the prompt itself."""

import pytest
import torch

from mega_core.changes import PromptPrefix
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import PARTS, Site, capture, intervene

PREFIX = "New fact: the sky is green.\nPrompt: "
PROMPTS = ["The capital of France is", "Rome", "Marie Curie is a citizen of Poland and speaks"]


def _whole(lm: ModelAdapter, prompt: str) -> torch.Tensor:
    return lm.last_logits(lm.encode([PREFIX + prompt]))[0]


def test_logits_are_those_of_the_whole_text(lm: ModelAdapter) -> None:
    with torch.no_grad(), PromptPrefix(PREFIX).applied(lm):
        together = lm.last_logits(lm.encode(PROMPTS))
    for prompt, row in zip(PROMPTS, together, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(row, _whole(lm, prompt), rtol=1e-4, atol=1e-4)


def test_generations_are_those_of_the_whole_text(lm: ModelAdapter) -> None:
    wanted = [lm.generate([PREFIX + prompt], 6)[0] for prompt in PROMPTS]
    with PromptPrefix(PREFIX).applied(lm):
        assert lm.generate(PROMPTS, 6) == wanted


def test_captures_lie_at_the_prompts_own_positions(lm: ModelAdapter) -> None:
    sites = [Site(1, part) for part in PARTS]
    batch = lm.encode(PROMPTS)
    with PromptPrefix(PREFIX).applied(lm), capture(lm, sites) as got:
        lm.forward(batch)
    for row, prompt in enumerate(PROMPTS):
        alone = lm.encode([PREFIX + prompt])
        with capture(lm, sites) as whole:
            lm.forward(alone)
        last, end = int(batch.last[row]), int(alone.last[0])
        for site in sites:
            if site.part == "pattern":
                mine, theirs = got[site][row, :, last, last], whole[site][0, :, end, end]
            else:
                mine, theirs = got[site][row, last], whole[site][0, end]
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["attn", "resid_mid", "mlp", "block_in"])
def test_an_intervention_reaches_the_prompts_own_positions_only(lm: ModelAdapter, part: str) -> None:
    batch = lm.encode(PROMPTS)
    seen = []

    def double_last(value: torch.Tensor) -> torch.Tensor:
        seen.append(value.shape[1])
        new = value.clone()
        new[torch.arange(len(batch)), batch.last] *= 2
        return new

    with torch.no_grad(), PromptPrefix(PREFIX).applied(lm), intervene(lm, {Site(1, part): double_last}):
        together = lm.last_logits(batch)
    assert seen == [batch.ids.shape[1]]
    for row, prompt in enumerate(PROMPTS):
        alone = lm.encode([PREFIX + prompt])

        def double_end(value: torch.Tensor, end: int = int(alone.last[0])) -> torch.Tensor:
            new = value.clone()
            new[:, end] *= 2
            return new

        with torch.no_grad(), intervene(lm, {Site(1, part): double_end}):
            torch.testing.assert_close(together[row], lm.last_logits(alone)[0], rtol=1e-4, atol=1e-4)


def test_readers_are_told_the_prompt_and_each_new_token(lm: ModelAdapter) -> None:
    class Log:
        def __init__(self) -> None:
            self.told: list[list[int]] = []

        def begin(self, batch: tokens.TokenBatch) -> None:
            self.told.append(batch.start.tolist())

        def advance(self, ids: torch.Tensor) -> None:
            self.told.append(ids.tolist())

    log = Log()
    with lm.reading(log), PromptPrefix(PREFIX).applied(lm):
        lm.generate(PROMPTS[:1], 3)
        with lm.aside():
            lm.last_logits(lm.encode(["Rome"]))
    assert log.told[0] == [len(tokens.prompt_ids(lm.tokenizer, PROMPTS[0]))]
    assert 1 <= len(log.told) <= 4
    assert (lm.readers, lm.prefix, lm.changes) == ([], None, [])


def test_an_empty_prefix_changes_no_bit(lm: ModelAdapter) -> None:
    batch = lm.encode(PROMPTS)
    with torch.no_grad():
        plain = lm.last_logits(batch)
        with PromptPrefix("").applied(lm):
            assert torch.equal(lm.last_logits(batch), plain)
