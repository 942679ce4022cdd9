"""A frozen service with hand-made reports: what the pages see, without a model, a store or a queue."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import exp, log
from pathlib import Path
from typing import Any

from mega_core import frames
from mega_core.embedded.examples import Example
from mega_core.embedded.measured import Measured
from mega_core.errors import BadInput, UnknownName
from mega_core.jobs import JobError, JobView, StageView
from mega_core.methods.base import Knob
from mega_core.notebook import Entry, Note, NotebookHealth, Run, Verdict
from mega_core.records import EditRequest, Inspection, MethodRef, ModelRef, Receipt, Report
from mega_core.regions import Claim, Count, Region
from mega_core.service import PROMISES, Answer, MethodInfo, ModelInfo, Status, ViewInfo
from mega_core.service.told import Gpu
from mega_core.store import StoreHealth
from mega_core.summary import outcome, verdict
from tests.ui.fakes.benchmarks import FakeBenchmarks
from tests.ui.fakes.chains import FakeChains
from tests.ui.fakes.checks import FakeChecks
from tests.ui.fakes.comparisons import FakeComparisons
from tests.ui.fakes.masks import FakeMasks
from tests.ui.fakes.reviews import FakeReviews
from tests.ui.fakes.sharing import FakeSharing
from tests.ui.fakes.stacks import FakeStacks
from tests.ui.fakes.steering import FakeSteering
from tests.ui.fakes.studies import FakeStudies

TOWER = EditRequest(
    "Eiffel Tower",
    "{} is located in the city of",
    "Rome",
    "Paris",
    paraphrases=(
        "People who visit the Eiffel Tower travel to",
        "Where is the Eiffel Tower? It stands in",
        "The home town of the Eiffel Tower is",
    ),
    neighbours=(
        "Louvre Museum is located in the city of",
        "Arc de Triomphe is located in the city of",
        "Sacre-Coeur Basilica is located in the city of",
        "Pantheon of Paris is located in the city of",
        "Moulin Rouge is located in the city of",
        "Luxembourg Palace is located in the city of",
    ),
)
HOSTILE = EditRequest(
    "![x](http://evil.example/a.png) <b>Tower</b>",
    "{} $\\frac{1}{2}$ :red[is] [in](http://evil.example) <img src=x onerror=alert(1)> the city of",
    '=HYPERLINK("http://evil.example")',
    "**Paris** :smile: `x`",
    paraphrases=("# heading ![](http://evil.example/p.png)",),
    neighbours=("- list <script>window.__x=1</script>",),
)
LAYERS = 8
KNOBS = (
    Knob(
        "layer", int, None, "The layer whose MLP is edited; empty means the model's own.", low=0, high=96, optional=True
    ),
    Knob("steps", int, 20, "Steps of the value optimisation.", low=1, high=200),
    Knob("learning_rate", float, 0.5, "Step size of the optimisation.", low=1e-5, high=10.0),
    Knob(
        "shrinkage",
        float,
        None,
        "Share of a plain average; empty means by text size.",
        low=0.0,
        high=1.0,
        optional=True,
    ),
    Knob("fact_token", str, "last", "Which subject token is edited.", choices=("last", "first")),
    Knob("use_covariance", bool, True, "Spare other keys by their second moments."),
)


def make_report(
    request: EditRequest = TOWER,
    *,
    works: bool = True,
    leaks: int = 1,
    layers: int = LAYERS,
    method: str = "rome",
    seed: int = 0,
) -> Report:
    """A report such as a run gives: smooth numbers, deterministic."""
    answers: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []

    def say(kind: str, prompt: str, state: str, p_new: float, p_true: float) -> None:
        for candidate, p in (("new", p_new), ("true", p_true)):
            if candidate == "true" and not request.target_true:
                continue
            word = request.target_new if candidate == "new" else str(request.target_true)
            top = p == max(p_new, p_true)
            answers.append(
                {
                    "state": state,
                    "case": 0,
                    "prompt_kind": kind,
                    "prompt": prompt,
                    "candidate": candidate,
                    "token": f" {word}",
                    "logprob": log(p),
                    "mean_logprob": log(p),
                    "prob": p,
                    "first_prob": p,
                    "rank": 1 if top else 3,
                    "is_top": top,
                    "is_greedy": top,
                }
            )
        winner = request.target_new if p_new > p_true else request.target_true or "somewhere"
        texts.append(
            {
                "state": state,
                "case": 0,
                "prompt_kind": kind,
                "prompt": prompt,
                "text": f" {winner}. It is one of the best known sights of {winner} and many people visit it.",
            }
        )

    say("edit", request.prompt, "before", 0.0021, 0.94)
    say("edit", request.prompt, "after", *((0.93, 0.031) if works else (0.11, 0.62)))
    for i, prompt in enumerate(request.paraphrases):
        say("paraphrase", prompt, "before", 0.003 + 0.001 * i, 0.81)
        say("paraphrase", prompt, "after", *((0.71 - 0.1 * i, 0.12) if works else (0.05, 0.7)))
    for i, prompt in enumerate(request.neighbours):
        say("neighbourhood", prompt, "before", 0.001 + 0.0004 * i, 0.88 - 0.02 * i)
        say("neighbourhood", prompt, "after", *((0.52, 0.2) if i < leaks else (0.004 + 0.01 * i, 0.85 - 0.03 * i)))

    scores, totals = [], []
    for state in ("before", "after"):
        for candidate in ("new", "true"):
            total = 0.0
            for layer in range(layers):
                for module in ("attn", "ffn"):
                    near = exp(-((layer - 0.7 * layers) ** 2) / 4)
                    value = (0.4 if module == "attn" else 0.7) * near * (1.6 if candidate == "true" else -0.4)
                    value += 0.12 * ((layer * 7 + len(candidate) * 3 + len(module)) % 5 - 2)
                    if state == "after":
                        jump = exp(-((layer - 0.4 * layers) ** 2) / 1.5) * (2.6 if module == "ffn" else 0.5)
                        value += jump if candidate == "new" else -0.8 * jump
                    scores.append(
                        {
                            "state": state,
                            "case": 0,
                            "layer": layer,
                            "module": module,
                            "candidate": candidate,
                            "contribution": value,
                        }
                    )
                    total += value
            totals.append(
                {
                    "state": state,
                    "case": 0,
                    "candidate": candidate,
                    "start": -9.3,
                    "end": -9.3 + total + 0.001,
                    "total": total + 0.001,
                }
            )

    words = [
        (" Rome", 0.0021, 0.93),
        (" Paris", 0.94, 0.031),
        (" Lyon", 0.02, 0.004),
        (" Milan", 0.0004, 0.012),
        (" France", 0.011, 0.003),
        (" Nice", 0.006, 0.001),
    ]
    words[0] = (f" {request.target_new}", *words[0][1:])
    words[1] = (f" {request.target_true or 'Paris'}", *words[1][1:])
    tokens = []
    for state, column in (("before", 1), ("after", 2)):
        for rank, row in enumerate(sorted(words, key=lambda w, c=column: -w[c]), 1):
            tokens.append(
                {
                    "state": state,
                    "case": 0,
                    "prompt": request.prompt,
                    "token_id": 100 + words.index(row),
                    "token": row[0],
                    "prob": row[column],
                    "rank": rank,
                }
            )
    change = [
        {
            "layer": int(0.4 * layers),
            "site": "mlp_down",
            "kind": "rank one",
            "norm": 4.21,
            "relative_norm": 0.061,
            "rank": 1,
            "parameters": 262144,
        }
    ]
    answers_frame = frames.from_rows(answers, "answers")
    from mega_core.evaluation.metrics import measure

    question = Inspection(
        ModelRef("atlas-gpt2"),
        MethodRef(method, 1, tuple((knob.name, knob.default) for knob in KNOBS)),
        (request,),
        seed=seed,
    )
    return Report(
        question=question,
        digest=question.key("0" * 64),
        model_digest="0" * 64,
        frames={
            "answers": answers_frame,
            "generations": frames.from_rows(texts, "generations"),
            "metrics": measure(answers_frame),
            "module_scores": frames.from_rows(scores, "module_scores"),
            "module_totals": frames.from_rows(totals, "module_totals"),
            "next_tokens": frames.from_rows(tokens, "next_tokens"),
            "weight_change": frames.from_rows(change, "weight_change"),
        },
        receipt=Receipt(True, "ab12" * 16, "ab12" * 16, 0),
        timing={"load": 0.41, "before": 0.62, "covariance": 0.8, "optimise": 1.9, "after": 0.6},
        environment={"torch": "2.13.0", "device": "cpu"},
    )


WORKS, LEAKS, FAILS = make_report(), make_report(leaks=5, seed=1), make_report(works=False, leaks=0, seed=2)
EVIL = make_report(HOSTILE, seed=3)


@dataclass(frozen=True, slots=True)
class Card(Example):
    """An example whose report is in memory."""

    held: Report | None = None

    def report(self) -> Report:
        """The report."""
        if self.held is None:
            raise ValueError("no report")
        return self.held


def card(report: Report) -> Card:
    """The example card of a report."""
    request = report.question.requests[0]
    kind = outcome(report).kind
    return Card(
        name=kind,
        title=f"{request.subject}: {request.target_true} → {request.target_new}",
        sentence=verdict(report),
        outcome=kind,
        digest=report.digest,
        model="atlas-gpt2",
        method="rome",
        seconds=4.2,
        path=Path("none"),
        held=report,
    )


MEASURED = Measured(
    Region(
        model="atlas-gpt2", weights="0" * 64, n_layers=LAYERS, methods=("rome",), edits=20, seed=0, basis="D",
        counts={"rome": Count(18, 2, 0, "too few")}, layers=(4, 5), value_layers=(4,), query_layers=(2,), leverage=(),
    ),
    "The published pattern holds for every editor: rome.",
    {"rome": (Claim("late attention promotes the new object", "yes", 9.1, 8.5, 9.7),)},
    frames.from_rows(
        [
            {"editor": "rome", "statistic": "D", "failures": "none", "module": module, "layer": layer,
             "candidate": candidate, "mean": 0.5 * layer, "low": 0.4 * layer - 1, "high": 0.6 * layer + 1,
             "n_success": 18, "n_failure": 2}
            for module in ("attn", "ffn") for candidate in ("new", "true") for layer in range(LAYERS)
        ],
        "contrast",
    ),
)  # fmt: skip


@dataclass
class FakeService:
    """Answers like Service. Change its fields to make it busy, empty or broken."""

    reports: dict[str, Report] = field(default_factory=lambda: {r.digest: r for r in (WORKS, LEAKS, FAILS, EVIL)})
    cards: tuple[Card, ...] = field(default_factory=lambda: (card(WORKS), card(LEAKS), card(FAILS)))
    entries: dict[str, Entry] = field(default_factory=dict)
    view: JobView | None = None
    broken: Exception | None = None
    submitted: list[Inspection] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    available: bool = True
    stacks: FakeStacks = field(default_factory=FakeStacks)
    studies: FakeStudies = field(default_factory=lambda: FakeStudies(MEASURED))
    masks: FakeMasks = field(default_factory=FakeMasks)
    benchmarks: FakeBenchmarks = field(default_factory=FakeBenchmarks)
    chains: FakeChains = field(default_factory=FakeChains)
    reviews: FakeReviews = field(default_factory=FakeReviews)
    sharing: FakeSharing = field(default_factory=FakeSharing)
    steering: FakeSteering = field(default_factory=FakeSteering)
    comparisons: FakeComparisons = field(default_factory=FakeComparisons)
    checks: FakeChecks = field(default_factory=FakeChecks)

    def close(self) -> None: ...

    def models(self) -> tuple[ModelInfo, ...]:
        return (
            ModelInfo(
                "atlas-gpt2",
                "Atlas, GPT-2 architecture",
                True,
                self.available,
                "" if self.available else "Its files are missing.",
                "" if self.available else "Run: python -m mega_core train.",
                12_600_000,
                0.5,
                "MIT",
                "float32",
                "cpu",
                "gpt2",
            ),
            ModelInfo(
                "gpt2-xl",
                "GPT-2 XL (1.5B)",
                False,
                False,
                "Its files are not on this machine.",
                "Run: huggingface-cli download openai-community/gpt2-xl.",
                1_557_611_200,
                10.0,
                "MIT",
                "float32",
                "cpu",
                "gpt2",
            ),
        )

    def methods(self, model: str) -> tuple[MethodInfo, ...]:
        return (
            MethodInfo(
                "rome",
                "ROME",
                "Writes the fact into one MLP matrix by a rank-one change.",
                "weights",
                "Meng et al. 2022",
                None,
                KNOBS,
                4.3,
            ),
            MethodInfo(
                "emmet",
                "EMMET",
                "Writes several facts at once with exact equality.",
                "weights",
                "Gupta et al. 2024",
                None,
                (),
                None,
            ),
            MethodInfo(
                "pmet",
                "PMET",
                "Spreads the change over layers.",
                "weights",
                "Li et al. 2024",
                "attention and MLP run in parallel here",
                (),
                None,
            ),
        )

    def views(self) -> tuple[ViewInfo, ...]:
        return (
            ViewInfo("module_scores", "Layers and modules", "Where it happens.", ("module_scores",), ()),
            ViewInfo("heads", "Heads", "Which heads carry it.", ("head_scores",), ()),
        )

    def examples(self) -> tuple[Card, ...]:
        return self.cards

    def facts(self, model: str) -> tuple[dict[str, Any], ...]:
        return (
            {
                "subject": "Louvre Museum",
                "relation": "landmark_city",
                "object": "Paris",
                "templates": {"edit": ["{} is located in the city of"], "paraphrase": [], "held_out": []},
            },
        )

    def suggest(self, model: str, seed: int) -> EditRequest:
        return EditRequest("Big Ben", "{} is located in the city of", "Madrid", "London")

    def plan(
        self,
        model: str,
        method: str,
        subject: str,
        template: str,
        target_new: str,
        target_true: str = "",
        paraphrases: Any = (),
        neighbours: Any = (),
        params: Any = None,
        views: Any = ("module_scores",),
        seed: int = 0,
    ) -> Inspection:
        if self.broken is not None:
            raise self.broken
        request = EditRequest(subject, template, target_new, target_true or None, tuple(paraphrases), tuple(neighbours))
        knobs = {knob.name: knob for knob in KNOBS} if method == "rome" else {}
        given = tuple((name, knobs[name].parse(value, method)) for name, value in (params or {}).items())
        return Inspection(ModelRef(model), MethodRef(method, 1, given), (request,), tuple(views), seed)

    def digest(self, plan: Inspection) -> str:
        return plan.key("0" * 64)

    def cached(self, digest: str) -> Report | None:
        return self.reports.get(digest)

    def submit(self, plan: Inspection, owner: str, *, fresh: bool = False, kind: str = "edit") -> str:
        self.submitted.append(plan)
        self.view = running(self.digest(plan))
        return "j" * 32

    def submit_several(self, plans: list[Inspection], owner: str) -> str:
        if self.broken is not None:
            raise self.broken
        self.submitted += plans
        self.view = replace(running(self.digest(plans[0])), kind="compare")
        return "j" * 32

    def jobs(self, owner: str) -> list[JobView]:
        return []

    def result(self, job_id: str, owner: str | None = None) -> Any:
        return None

    def job(self, job_id: str, owner: str) -> JobView:
        if self.view is None:
            raise UnknownName("job", job_id, ())
        return self.view

    def cancel(self, job_id: str, owner: str) -> None:
        self.cancelled.append(job_id)
        if self.view is not None:
            self.view = replace(self.view, state="cancelled")

    def ask(self, model: str, prompt: str, owner: str) -> str:
        self.view = replace(running("f" * 64), state="done")
        return "a" * 32

    def answer(self, job_id: str, owner: str) -> Answer | None:
        return Answer("atlas-gpt2", "prompt", " Paris. The tower is", ((" Paris", 0.94),))

    def warm_up(self, model: str) -> None: ...

    def visited(self, report: Report, owner: str) -> None:
        request = report.question.requests[0]
        run = Run(
            digest=report.digest,
            session=owner,
            model=report.question.model.name,
            method=report.question.method.name,
            subject=request.subject,
            template=request.template,
            target_new=request.target_new,
            target_true=request.target_true,
            verdict=outcome(report).kind,
            metrics={},
            seconds=sum(report.timing.values()),
            created=datetime.now(UTC),
        )
        old = self.entries.get(report.digest)
        self.entries[report.digest] = Entry(
            run, old.tags if old else (), old.notes if old else (), old.verdicts if old else ()
        )

    def runs(self, **filters: Any) -> list[Entry]:
        text = filters.get("text", "").casefold()
        found = [e for e in self.entries.values() if text in e.run.subject.casefold()]
        return found[: filters.get("limit", 50)]

    def count_runs(self, **filters: Any) -> int:
        return len(self.entries)

    def run_choices(self, owner: str) -> dict[str, tuple[str, ...]]:
        return {"model": ("atlas-gpt2",), "method": ("rome",), "tag": ()}

    def entry(self, digest: str) -> Entry | None:
        return self.entries.get(digest)

    def note(self, digest: str, text: str, author: str = "") -> None:
        now = datetime.now(UTC)
        self.entries[digest] = replace(self.entries[digest], notes=(Note(digest, author, text, now, now),))

    def tags(self, digest: str, tags: list[str], author: str = "") -> None:
        self.entries[digest] = replace(self.entries[digest], tags=tuple(tags))

    def verdict(self, digest: str, verdict: str, failure: str = "", severity: int = 0, author: str = "") -> None:
        made = (Verdict(digest, author, verdict, failure, severity, datetime.now(UTC)),) if verdict else ()
        self.entries[digest] = replace(self.entries[digest], verdicts=made)

    def delete_run(self, digest: str, owner: str | None = None) -> bool:
        return self.entries.pop(digest, None) is not None

    def status(self) -> Status:
        return Status(
            version="0.1.0",
            device="cpu",
            torch_ready=False,
            models_loaded=("atlas-gpt2",),
            running=1,
            waiting=0,
            max_waiting=8,
            store=StoreHealth("disk", "", 12, 3_500_000, 30, 10, 1),
            notebook=NotebookHealth("sqlite", "", "0001", len(self.entries)),
            notices=(),
            promises=PROMISES,
            per_session=2,
            job_seconds=1800.0,
            memory_bytes=512 * 2**20,
            gpus=(Gpu("Some GPU", 2**30, 80 * 2**30),),
            store_limit=2**30,
        )


def running(digest: str) -> JobView:
    """A job in its third stage."""
    return JobView(
        id="j" * 32,
        digest=digest,
        model="atlas-gpt2",
        method="rome",
        state="running",
        ahead=0,
        stages=(
            StageView("load", 0.4, 0, None, True),
            StageView("before", 0.62, 4, 4, True),
            StageView("optimise", 0.9, 9, 20, False),
        ),
        notes=(),
        fraction=0.45,
        eta_seconds=2.4,
        seconds=1.9,
    )


def failed(digest: str) -> JobView:
    """A job that ended in an error."""
    return replace(
        running(digest),
        state="failed",
        error=JobError("The machine ran out of memory.", "Choose a smaller model.", "deadbeef", "out_of_memory"),
    )


def refuse(field_name: str = "subject") -> BadInput:
    """A problem with one field."""
    return BadInput(field_name, "is empty.", "Fill it in.")
