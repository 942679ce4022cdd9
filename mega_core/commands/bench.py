"""The command that compares methods on a dataset, by published protocols and ours, and can be stopped at any moment."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mega_core.commands.common import Parser, name_list, open_service, params_of, short, with_regions
from mega_core.errors import BadInput

if TYPE_CHECKING:
    from mega_core.benchmark import Results, Setup
    from mega_core.events import Event, Reporter
    from mega_core.service import Service

QUIET_SECONDS = 60.0
"""Between two lines of progress where nobody watches."""
FEW = 5
"""Measurements before the time that is left is guessed."""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Register it."""
    parser = commands.add_parser("bench", help="compare methods on a dataset; stopped runs go on with --resume")
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", default="all", help="separated by commas; all: every one that can edit the model")
    parser.add_argument(
        "--dataset", required=True, metavar="NAME_OR_FILE", help="builtin, builtin:SEED, a file, or a dataset's hub id"
    )
    parser.add_argument("--format", default="auto", help="how the file is written (default: told by its records)")
    parser.add_argument("--limit", type=int, help="the first N cases only; more of them later with --resume")
    parser.add_argument(
        "--protocols", default="", help="separated by commas (default: those with something to ask); ours joins them"
    )
    parser.add_argument(
        "--mode",
        default="single",
        choices=("single", "batch", "sequential"),
        help="each case's edits alone; all together; one after the other, all kept",
    )
    parser.add_argument(
        "--every", type=int, default=0, metavar="K", help="sequential: ask all cases so far every K edits"
    )
    parser.add_argument("--apart", action="store_true", help="leave out cases that ask about another case's subject")
    parser.add_argument("--control", action="store_true", help="measure each method's controls as well")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="a parameter; NAME=VALUE sets it for all methods that have it",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.add_argument("--executor", default="local", choices=("local", "ray"), help="where the work is done")
    parser.add_argument("--workers", type=int, help="processes, each with its own model (default 1; ray: what fits)")
    parser.add_argument("--address", help="of a Ray cluster (default: one of this machine)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and stop")
    parser.set_defaults(command=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from mega_core.events import Cancelled
    from mega_core.executors import by_name

    executor = by_name(arguments.executor, arguments.workers, arguments.address)
    methods = name_list(arguments.methods)
    if not methods:
        raise BadInput("--methods", "names none.", "For example: --methods rome,memit, or all.")
    with open_service() as service:
        setup = service.benchmarks.plan(
            arguments.model,
            methods,
            arguments.dataset,
            format=arguments.format,
            limit=arguments.limit,
            protocols=name_list(arguments.protocols),
            mode=arguments.mode,
            every=arguments.every,
            seed=arguments.seed,
            params=_params(arguments, methods, service),
            control=arguments.control,
            apart=arguments.apart,
        )
        print(summary(setup), file=sys.stderr, flush=True)
        if arguments.dry_run:
            return 0
        command = ["python", "-m", "mega_core", *_words(arguments)]
        try:
            with _log_kept(arguments.out):
                results = service.benchmarks.run(
                    setup,
                    arguments.out,
                    executor=executor,
                    resume=arguments.resume,
                    command=command,
                    report=_reporter(),
                )
        except (KeyboardInterrupt, Cancelled):
            print(_stopped(arguments.out, command), file=sys.stderr)
            return 130
    print(table(results))
    print(f"\nWritten to {arguments.out}: summary.csv, report.html, answers.parquet, cases.jsonl, plan.json.")
    return 0


# Words ---------------------------------------------------------------------------------------------------------------


def summary(setup: Setup) -> str:
    """What will be measured and what is left out, before anything is loaded."""
    plan = setup.plan
    lines = len(list(plan.expected()))
    edits = f"{sum(plan.edits)} edits in {len(plan.ids)} cases"
    names = [one.label for one in plan.entrants[1:]]
    said = [
        f"Model      {plan.model.name} ({plan.weights[:12]})",
        f"Dataset    {plan.dataset}: {edits}" + (f", {setup.apart} passed over (--apart)" if setup.apart else ""),
        f"Mode       {plan.mode}" + (f", asked every {plan.every} edits" if plan.every else ""),
        f"Methods    {', '.join(names)}; beside them the unedited model",
        *(f"Without    {label}: {reason}" for label, reason in setup.unsupported),
        f"Protocols  {', '.join(plan.protocols)}",
        *(f"           {name} has nothing to ask about {n} cases: {why}" for name, why, n in setup.left_out),
        f"To do      {lines} measurements",
    ]
    if setup.problems:
        said.append(f"Problems   {len(setup.problems)} records can't be used (all of them in plan.json):")
        said += [f"           line {line}, {short(record, 40)}: {short(text, 160)}"
                 for line, record, text in setup.problems[:3]]  # fmt: skip
    return "\n".join(said)


def table(results: Results) -> str:
    """The summary for a terminal: a block per protocol, methods by metrics; shares in percent."""
    from mega_core.evaluation.protocols import PROTOCOLS

    frame = results.summary
    said = []
    for name, rows in frame.groupby("protocol", sort=False):
        protocol = PROTOCOLS[str(name)]
        shares = {one.name for one in protocol.metrics if one.unit == "share"} | {one.name for one in protocol.derived}
        metrics = list(dict.fromkeys(rows["metric"]))
        cells = {(row.method, row.metric): row.value for row in rows.itertuples()}
        labels = list(dict.fromkeys(rows["method"]))
        wide = max(map(len, labels))
        for part in _lines_of(metrics):
            widths = [max(len(metric), 7) for metric in part]
            heads = "  ".join(f"{metric:>{width}}" for metric, width in zip(part, widths, strict=True))
            said += ["", f"{protocol.title} ({name})", f"{'':<{wide}}  {heads}"]
            for label in labels:
                shown = (_cell(cells.get((label, metric)), metric in shares) for metric in part)
                said.append(f"{label:<{wide}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(shown, widths, strict=True)))
    times = results.timing
    if len(times):
        wide = max(map(len, times["method"]))
        said += ["", f"{'Seconds':<{wide}}  {'median':>8}  {'all':>9}  {'refused':>7}  {'alarms':>6}  {'collapsed':>9}"]
        said += [f"{row.method:<{wide}}  {row.seconds:>8.3f}  {row.total:>9.1f}  {row.refused:>7}  {row.alarmed:>6}"
                 f"  {row.collapsed:>9}" for row in times.itertuples()]  # fmt: skip
    if not results.complete:
        said += ["", f"Not finished: {len(results.lines)} of {results.total} measurements."]
    return "\n".join(said).lstrip("\n")


WIDTH = 96
"""Of a row of metrics, without the methods' names."""


def _lines_of(metrics: Sequence[str]) -> list[list[str]]:
    """The metrics as rows that fit."""
    rows: list[list[str]] = [[]]
    for metric in metrics:
        if rows[-1] and sum(max(len(name), 7) + 2 for name in (*rows[-1], metric)) > WIDTH:
            rows.append([])
        rows[-1].append(metric)
    return rows


def _cell(value: float | None, share: bool) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if share else f"{value:.3g}"


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _reporter() -> Reporter:
    """Progress with the time that is left, from the seconds that the lines of this run took."""
    from mega_core.benchmark.run import STAGE
    from mega_core.events import Advanced, Note

    watched = sys.stderr.isatty()
    start: int | None = None
    begun: tuple[float, int] | None = None
    shown, said = time.monotonic(), -1

    def tell(event: Event) -> None:
        nonlocal start, begun, shown, said
        if isinstance(event, Note):
            print(event.text, file=sys.stderr, flush=True)
        if not isinstance(event, Advanced) or event.stage != STAGE or not event.total:
            return
        now = time.monotonic()
        if start is None:
            start = event.done
        if begun is None and event.done > start:  # opening the model is over
            begun = now, event.done
        over = event.done == event.total
        if said == event.done or (not over and now - shown < (0.2 if watched else QUIET_SECONDS)):
            return
        shown, said = now, event.done
        text = f"{event.done} of {event.total} measured"
        if begun is not None and event.done >= begun[1] + FEW and not over:
            left = (now - begun[0]) / (event.done - begun[1]) * (event.total - event.done)
            text += f", about {duration(left)} left"
        sys.stderr.write(f"\r\033[K{text}" + ("\n" if over else "") if watched else f"{text}\n")
        sys.stderr.flush()

    return tell


def _params(arguments: argparse.Namespace, methods: list[str], service: Service) -> dict[str, dict[str, object]]:
    from mega_core.methods import METHODS

    names = list(METHODS.names()) if methods == ["all"] else methods
    return with_regions(params_of(arguments.param, names), service, arguments.model)


def _words(arguments: argparse.Namespace) -> list[str]:
    """The command that asks for this again, without the folders of this machine."""
    dataset = Path(arguments.dataset)
    words = ["bench", "--model", arguments.model, "--methods", arguments.methods]
    words += ["--dataset", dataset.name if dataset.is_absolute() else arguments.dataset]
    for name, usual in (
        ("format", "auto"), ("limit", None), ("protocols", ""), ("mode", "single"), ("every", 0), ("seed", 0),
        ("executor", "local"), ("workers", None),
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value != usual:
            words += [f"--{name}", str(value)]
    words += [f"--{name}" for name in ("apart", "control") if getattr(arguments, name)]
    for pair in arguments.param:
        words += ["--param", pair]
    return [*words, "--out", arguments.out.name if arguments.out.is_absolute() else str(arguments.out)]


def _stopped(out: Path, command: list[str]) -> str:
    from mega_core.benchmark import Results

    try:
        there = Results.load(out)
        done = f" {len(there.lines)} of {there.total} measurements are in {out}, with tables of them."
    except BadInput:
        return "Stopped before anything was measured."
    return f"Stopped.{done} Go on with: {shlex.join([*command, '--resume'])}"


@contextmanager
def _log_kept(out: Path) -> Iterator[None]:
    """What goes wrong inside a method goes into log.txt beside the results."""
    log = logging.getLogger("mega_core")
    handler = logging.FileHandler(out / "log.txt", encoding="utf-8", delay=True)
    handler.setLevel(logging.ERROR)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
