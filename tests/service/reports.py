"""Reports made by hand: what a run would have given, without a model."""

from __future__ import annotations

from mega_core import frames
from mega_core.records import EditRequest, Inspection, MethodRef, ModelRef, Receipt, Report

REQUEST = EditRequest(
    "Eiffel Tower",
    "{} is located in the city of",
    "Rome",
    "Paris",
    paraphrases=("Where is the Eiffel Tower? In", "The Eiffel Tower stands in"),
    neighbours=("Louvre Museum is in", "Arc de Triomphe is in", "Notre-Dame is in", "Pantheon is in"),
)


def answer_row(state: str, kind: str, prompt: str, candidate: str, prob: float, top: bool) -> dict[str, object]:
    from math import log

    return {
        "state": state, "case": 0, "prompt_kind": kind, "prompt": prompt, "candidate": candidate,
        "token": f" {candidate}",
        "logprob": log(prob), "mean_logprob": log(prob), "prob": prob, "first_prob": prob, "rank": 1 if top else 2,
        "is_top": top, "is_greedy": top,
    }  # fmt: skip


def make_report(
    *,
    says_new: bool = True,
    paraphrases: int = 2,
    neighbours_kept: int = 4,
    request: EditRequest = REQUEST,
    seed: int = 0,
    digest: str | None = None,
    method: str = "rome",
) -> Report:
    """A report in which so many paraphrases say the new object and so many neighbours keep theirs."""
    rows = []

    def ask(kind: str, prompt: str, after_new: bool) -> None:
        for state, new in (("before", False), ("after", after_new)):
            rows.append(answer_row(state, kind, prompt, "new", 0.9 if new else 0.01, new))
            if request.target_true:
                rows.append(answer_row(state, kind, prompt, "true", 0.01 if new else 0.8, not new))

    ask("edit", request.prompt, says_new)
    for i, prompt in enumerate(request.paraphrases):
        ask("paraphrase", prompt, i < paraphrases)
    for i, prompt in enumerate(request.neighbours):
        ask("neighbourhood", prompt, i >= neighbours_kept)
    question = Inspection(ModelRef("atlas-gpt2"), MethodRef(method, 1, (("layer", 3),)), (request,), seed=seed)
    return Report(
        question=question,
        digest=digest or question.key("0" * 64),
        model_digest="0" * 64,
        frames={"answers": frames.from_rows(rows, "answers"), "weight_change": frames.empty("weight_change")},
        receipt=Receipt(True, "a" * 64, "a" * 64, 0),
        timing={"before": 0.5, "edit": 1.0, "after": 0.5},
    )
