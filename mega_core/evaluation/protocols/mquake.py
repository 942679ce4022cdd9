"""MQuAKE's protocol: whether facts that are edited can be reasoned with (Zhong et al. 2023, arXiv 2305.14795).

1. Edit-wise success: the edit prompt gives the new object.
2. Hops: each step of the chain after the edits, edited or not, recalled by its cloze. Instance-wise: every hop of a
   chain is.
3. 1 and 2 are judged twice: every token of one of the answer's names is the most likely one there (forced; the names
   are followed token by token), and the most likely next token begins one of the names (`_first`).
4. Multi-hop accuracy: the greedy text gives the new answer to one of the question's forms (MQuAKE has three); strict:
   to all. How a question is put and its text judged: evaluation/multihop.py.
5. `multihop_known`: only chains whose hops before the edits the unedited model recalls all; ACE filters so.
   `composition`: only chains whose hops after the edits are all recalled: what is left is putting them together (ours).
   `old_answer`: one of the forms still gives the answer from before the edits (ours).
6. Means over a case's chains, then over cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mega_core.evaluation import multihop
from mega_core.evaluation.asking import Row, Told, Wanted
from mega_core.evaluation.multihop import Frame
from mega_core.evaluation.protocols.base import Metric, Protocol

if TYPE_CHECKING:
    from mega_core.cases import Case, Chain
    from mega_core.evaluation.probes import Read
    from mega_core.models.adapter import ModelAdapter


@dataclass(frozen=True, slots=True)
class _Recall:
    """A cloze with the names of its answer, as tokens."""

    prompt: str
    expected: str
    read: Read


@dataclass(frozen=True, slots=True)
class _Chain:
    hops: tuple[_Recall, ...]
    """After the edits."""
    before: tuple[_Recall, ...]
    questions: tuple[tuple[str, str], ...]
    """Each form as the dataset words it, and the prompt that asks it."""
    chain: Chain


class Sheet:
    """Clozes of edits and hops as tokens, questions as texts. `frame` puts every question so, whatever its form."""

    def __init__(self, lm: ModelAdapter, case: Case, frame: Frame | None = None) -> None:
        from mega_core.evaluation.probes import Read
        from mega_core.models import tokens

        self.tokenizer = lm.tokenizer

        def recall(prompt: str, names: Sequence[str]) -> _Recall:
            return _Recall(prompt, names[0], Read.of(lm, prompt, names, None))

        self.edits = []
        for request in case.requests:
            same = [
                hop.answers
                for chain in case.chains
                for hop in chain.new_hops
                if hop.cloze == request.prompt and request.target_new in hop.answers
            ]
            self.edits.append(recall(request.prompt, tuple(dict.fromkeys((request.target_new, *sum(same, ()))))))
        self.chains = []
        for chain in case.chains:
            questions = tuple((question, multihop.framed(question, frame)) for question in chain.questions)
            for _, prompt in questions:
                tokens.prompt_ids(lm.tokenizer, prompt)  # raises on what can't be read
            self.chains.append(
                _Chain(
                    tuple(recall(hop.cloze, hop.answers) for hop in chain.new_hops),
                    tuple(recall(hop.cloze, hop.answers) for hop in chain.hops),
                    questions,
                    chain,
                )
            )

    def want(self, wanted: Wanted, base: Told | None) -> None:
        """Names token by token and greedy texts; the hops before the edits only of the unedited model."""
        asked = [*self.edits]
        for one in self.chains:
            asked += [*one.hops, *(one.before if base is None else ())]
            for _, prompt in one.questions:
                wanted.text(prompt)
        for recall in asked:
            for context, token in recall.read.wanted():
                wanted.next(context, (token,))

    def rows(self, told: Told, base: Told) -> list[Row]:
        """A row per cloze and question, and per metric that it is behind."""
        rows = []
        for edit in self.edits:
            whole, first, said = self.recalled(edit, told)
            rows.append(Row(multihop.EDIT, edit.prompt, edit.expected, said, whole))
            rows.append(Row("edit_first", edit.prompt, edit.expected, said, first))
        for group, one in enumerate(self.chains):
            recalled = [(hop, *self.recalled(hop, told)) for hop in one.hops]
            for hop, whole, first, said in recalled:
                for metric, value in (
                    (multihop.HOP, whole), ("hop_first", first), ("instance", whole), ("instance_first", first),
                ):  # fmt: skip
                    rows.append(Row(metric, hop.prompt, hop.expected, said, value, group=group))
            held = all(whole for _, whole, _, _ in recalled)
            known = bool(one.before) and all(hop.read.whole(base.next) for hop in one.before)
            new, old = one.chain.new_answers, one.chain.answers
            for question, prompt in one.questions:
                text = told.texts[prompt]
                said, good = multihop.answer_in(text), float(multihop.gives(text, new, old))
                for metric in (multihop.MULTIHOP, "multihop_strict"):
                    rows.append(Row(metric, question, new[0], said, good, group=group))
                rows.append(Row(multihop.KNOWN, question, new[0], said, good, known, group, known))
                rows.append(Row(multihop.COMPOSITION, question, new[0], said, good, held, group))
                if old:
                    still = float(multihop.gives(text, old, new))
                    rows.append(Row(multihop.OLD, question, old[0], said, still, group=group))
        return rows

    def recalled(self, recall: _Recall, told: Told) -> tuple[float, float, str]:
        """Whole answer, its first token, and what was said as far as a name goes along."""
        from mega_core.models import tokens

        read, context, said = recall.read, recall.read.context, []
        own = {context for context, _ in read.wanted()}
        while context in own:
            said.append(told.next[context].best)
            context = context._replace(ids=(*context.ids, said[-1]))
        text = tokens.continuation(self.tokenizer, read.context.ids, said).strip()
        return float(read.whole(told.next)), float(read.begun(told.next)), text


def _needs(case: Case) -> str | None:
    return None if case.chains else "there are no multi-hop questions"


_WHOLE = "every token of one of the answer's names is the most likely one"
_FIRST = "the most likely next token begins one of the answer's names"
_GIVES = "the greedy text gives the new answer"

MQUAKE = Protocol(
    name="mquake",
    title="MQuAKE",
    summary="Chains of facts after an edit: is each step recalled, and is the question through all of them answered?",
    paper="arXiv 2305.14795",
    metrics=(
        Metric(
            multihop.EDIT, "Edit-wise success", f"after the edit prompt, {_WHOLE}", "forced",
            "edits recalled", "edits of a case; then cases",
        ),
        Metric(
            "edit_first", "Edit-wise success, first token", f"after the edit prompt, {_FIRST}", "forced",
            "edits recalled", "edits of a case; then cases",
        ),
        Metric(
            multihop.HOP, "Hops", f"after the cloze of a hop, {_WHOLE}", "forced",
            "hops recalled", "hops of the new chains of a case; then cases",
        ),
        Metric(
            "hop_first", "Hops, first token", f"after the cloze of a hop, {_FIRST}", "forced",
            "hops recalled", "hops of the new chains of a case; then cases",
        ),
        Metric(
            "instance", "Instance-wise accuracy", f"for every hop of the new chain, {_WHOLE}", "forced",
            "chains with all hops recalled", "chains of a case; then cases", "all",
        ),
        Metric(
            "instance_first", "Instance-wise accuracy, first token", f"for every hop of the new chain, {_FIRST}",
            "forced", "chains with all hops recalled", "chains of a case; then cases", "all",
        ),
        Metric(
            multihop.MULTIHOP, "Multi-hop accuracy", f"{_GIVES} to one of the question's forms", "generated",
            "chains answered in any form", "chains of a case; then cases", "any",
        ),
        Metric(
            "multihop_strict", "Multi-hop accuracy, strict", f"{_GIVES} to all of the question's forms", "generated",
            "chains answered in all forms", "chains of a case; then cases", "all",
        ),
        Metric(
            multihop.KNOWN, "Multi-hop accuracy, known chains", f"{_GIVES} to one of the question's forms", "generated",
            "chains answered in any form",
            "chains of a case whose old hops the unedited model recalls all; then cases", "any",
        ),
        Metric(
            multihop.COMPOSITION, "Composition", f"{_GIVES} to one of the question's forms", "generated",
            "chains answered in any form", "chains of a case whose new hops are all recalled; then cases", "any",
        ),
        Metric(
            multihop.OLD, "Old answer", "the greedy text gives the old answer to one of the question's forms",
            "generated", "chains with the old answer in any form", "chains of a case; then cases", "any", "lower",
        ),
    ),
    needs=_needs,
    sheet=Sheet,
    notes="Ours: hops that are not edited are recalled by their cloze too (published: as questions behind "
    "demonstrations of the relation); questions with a question mark stand behind demonstrations of our own, others as "
    "they are worded; an answer is given when the text's first line holds a name of it as whole words (published: the "
    "extracted answer equals one).",
)  # fmt: skip
