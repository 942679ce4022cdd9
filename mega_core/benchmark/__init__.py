"""Benchmark runs: one dataset, some methods, some protocols, one model; measured once, resumed after anything.

    plan      what will be measured, spelled out, and the key of every line that it needs
    journal   the lines that are measured already, in one file that only grows
    work      a unit of work on a model that is held: edits, asks, judges (the only part with torch)
    run       units to an executor, lines to the journal, tables at the end
    results   lines to tables: summary, retention, timing, answers

The same plan gives the same summary.csv, byte for byte, however often it was killed in between.
"""

from mega_core.benchmark.plan import MODES, UNEDITED, Entrant, Line, Plan, Setup, controls, set_up
from mega_core.benchmark.results import PLAN, Results
from mega_core.benchmark.run import run

__all__ = ["MODES", "PLAN", "UNEDITED", "Entrant", "Line", "Plan", "Results", "Setup", "controls", "run", "set_up"]
