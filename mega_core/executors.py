"""Where the units of a benchmark run: in this thread, in processes of this machine, on a Ray cluster.

1. The driver is the caller's thread. It holds all units, hands an idle worker the next one, and takes every line
   itself, so there is one writer however many workers there are.
2. A worker opens the model once and answers unit after unit, line by line. Only text crosses between processes: the
   plan, the units and the lines, each JSON.
3. A worker that dies (killed, out of memory, its machine gone) has its unit given to another one, before all others. A
   unit that ends RESTARTS + 1 workers stops the run. Lines that had arrived come a second time: who takes them knows
   their keys.
4. An exception inside a worker stops the run: ActionableErrors arrive with their class and words, others as
   WorkerFailed.
5. Whatever ends the run (Cancelled from the reporter, Ctrl-C, an error), no process of ours stays behind.

All of it ours. Nothing here knows torch or what a unit is about.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from mega_core import errors
from mega_core.errors import ActionableError, BadInput, UnknownName
from mega_core.events import Advanced, Cancelled, Note, Reporter, stage

log = logging.getLogger(__name__)

Worker = Callable[[str], Iterator[str]]
"""A unit's JSON text -> its lines, each as it is done."""
OpenWorker = Callable[[str], AbstractContextManager[Worker]]
"""A plan's JSON text -> a worker with its model. At the top of a module: other processes import it by name."""
Take = Callable[[str, str], None]

STAGE = "cases"
RESTARTS = 2
"""How often a unit is given to another worker after the one that had it died."""
TICK = 0.5
"""Seconds between two looks at the reporter while no line comes: how soon a cancel is noticed."""
GRACE, PATIENCE = 3.0, 15.0
"""Seconds a worker gets to put its things away before it is killed: when the run is stopped, and when it is over."""
LINE, DONE, ERROR, READY = "L", "D", "E", "R"


class WorkerFailed(ActionableError):
    """A worker raised something that is a defect of ours, or died more often than we try again."""

    code = "worker"


class Executor(Protocol):
    """Runs units somewhere."""

    @property
    def name(self) -> str:
        """local or ray."""

    def run(
        self, open_worker: OpenWorker, plan: str, units: Sequence[tuple[str, str]], take: Take, report: Reporter
    ) -> None:
        """Run every unit (key, JSON text) and call `take(key, line)` here for each line, in any order of units.

        A unit that came back whole is not run again. Raises what the worker raised, WorkerFailed, or Cancelled from
        `report`; nothing is left running.
        """


def by_name(name: str, workers: int | None = None, address: str | None = None) -> Executor:
    """The executor of the command line's --executor, --workers and --address. Raises UnknownName or BadInput.

    `workers` None: one for "local", as many as the cluster has room for with "ray".
    """
    if name == "local":
        return Local(1 if workers is None else workers)
    if name == "ray":
        return Ray(address or None, workers)
    raise UnknownName("executor", name, NAMES)


NAMES = ("local", "ray")


# 1. What the driver remembers ----------------------------------------------------------------------------------------


@dataclass
class _Units:
    """The units that wait, and what happened to them."""

    waiting: deque[tuple[str, str]]
    total: int
    away: int = 0
    """With a worker now."""
    done: int = 0
    deaths: Counter[str] = field(default_factory=Counter)
    idle_deaths: int = 0
    """Workers that died while they opened the model, since one last managed to."""

    @classmethod
    def of(cls, units: Sequence[tuple[str, str]]) -> _Units:
        if len({key for key, _ in units}) != len(units):
            raise ValueError("two units have the same key")
        return cls(deque(units), len(units))

    @property
    def left(self) -> int:
        return len(self.waiting) + self.away

    def next(self) -> tuple[str, str]:
        self.away += 1
        return self.waiting.popleft()

    def finish(self) -> None:
        self.away -= 1
        self.done += 1

    def back(self, unit: tuple[str, str], how: str) -> None:
        """Its worker died: the unit is the next one again. Raises WorkerFailed when that happened too often."""
        self.away -= 1
        self.deaths[unit[0]] += 1
        if self.deaths[unit[0]] > RESTARTS:
            raise WorkerFailed(
                f"Unit {unit[0]}: the worker that had it died {self.deaths[unit[0]]} times, at last by {how}.",
                "Use fewer workers or more memory, or leave that case out. What is done is kept: run again to go on.",
            )
        self.waiting.appendleft(unit)

    def died_opening(self, others: bool, how: str) -> bool:
        """A worker died before it could take a unit. False: go on without it. Raises WorkerFailed if it was all."""
        self.idle_deaths += 1
        if self.idle_deaths <= RESTARTS:
            return True
        if not others:
            raise WorkerFailed(
                f"No worker could open the model: each died, at last by {how}.", "Use fewer workers or more memory."
            )
        return False


# 2, 4. In the worker ---------------------------------------------------------------------------------------------


def _told(worker: Worker, unit: tuple[str, str]) -> Iterator[str]:
    """The unit's lines; what is not an ActionableError becomes WorkerFailed."""
    with _named(f"unit {unit[0]}"):
        yield from worker(unit[1])


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except (ActionableError, Cancelled):
        raise
    except Exception as error:
        log.exception("a worker failed: %s", where)
        raise WorkerFailed(
            f"{where[:1].upper()}{where[1:]}: {type(error).__name__}: {error}.",
            "The log has where it happened. What is done is kept: run again to go on.",
        ) from error


def _packed(error: Exception) -> str:
    """An error as JSON text. Anything but an ActionableError is told as WorkerFailed."""
    if not isinstance(error, ActionableError):
        error = WorkerFailed(f"A worker failed: {type(error).__name__}: {error}.", "The log has where it happened.")
    known = {name: value for name, value in vars(error).items() if isinstance(value, str)}
    return json.dumps({"class": type(error).__name__, "words": known})


def _unpacked(text: str) -> ActionableError:
    """The error that `_packed` wrote, with its class where it is one of errors.py, and its words."""
    found = json.loads(text)
    words: dict[str, str] = found["words"]
    kind = getattr(errors, found["class"], WorkerFailed)
    if not (isinstance(kind, type) and issubclass(kind, ActionableError)):
        kind = WorkerFailed
    error = kind.__new__(kind)
    ActionableError.__init__(error, words.get("what", ""), words.get("next_step", ""))
    for name, value in words.items():
        setattr(error, name, value)
    return error


def _answers(worker: Worker, unit: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """(tag, text) of everything that is to say about a unit: its lines, then that it is done or the error."""
    try:
        for line in _told(worker, unit):
            yield LINE, line
    except Exception as error:
        yield ERROR, _packed(error)
    else:
        yield DONE, ""


def _address_of(open_worker: OpenWorker) -> str:
    """module:name, by which another process finds the function. Raises ValueError if it could not."""
    module, name = getattr(open_worker, "__module__", ""), getattr(open_worker, "__qualname__", "")
    if module in ("", "__main__") or getattr(sys.modules.get(module), name, None) is not open_worker:
        raise ValueError(f"{module}:{name} is not at the top of a module that another process can import")
    return f"{module}:{name}"


def _found(address: str) -> OpenWorker:
    module, name = address.split(":")
    found: OpenWorker = getattr(importlib.import_module(module), name)
    return found


THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _limit_threads(env: MutableMapping[str, str], threads: int) -> None:
    """At most `threads` threads for libraries that read these variables when they are loaded; a lower number stays."""
    for name in THREADS:
        given = env.get(name, "")
        env[name] = str(min(threads, int(given)) if given.isdecimal() and int(given) > 0 else threads)


# 3, 5. On this machine -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Local:
    """One worker in this thread, or several in processes of their own."""

    workers: int = 1
    """More than 1: that many processes, each with its own model and its share of the cores; where there are several
    GPUs and MEGA_DEVICE leaves the choice open, they are dealt out in turn."""
    name: str = field(default="local", init=False)

    def __post_init__(self) -> None:
        _check_count("workers", self.workers)

    def run(
        self, open_worker: OpenWorker, plan: str, units: Sequence[tuple[str, str]], take: Take, report: Reporter
    ) -> None:
        """See Executor."""
        known = _Units.of(units)
        if not known.left:
            return
        if self.workers == 1:
            _run_here(open_worker, plan, known, take, report)
        else:
            _Crew(open_worker, plan, known, min(self.workers, known.left)).run(take, report)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
        raise BadInput(name, f"{value!r} is not a number of workers.", "Give 1 to 1024.")


def _run_here(open_worker: OpenWorker, plan: str, units: _Units, take: Take, report: Reporter) -> None:
    with stage(report, STAGE, units.total) as step, open_worker(plan) as worker:
        while units.waiting:
            unit = units.next()
            for line in _told(worker, unit):
                take(unit[0], line)
                report(Advanced(STAGE, units.done, units.total))
            units.finish()
            step()


# Frames between the driver and a process: tag (1 byte), length (8 bytes), UTF-8 text.
_HEAD = struct.Struct(">cQ")


def _write(stream: IO[bytes], tag: str, text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    stream.write(_HEAD.pack(tag.encode("ascii"), len(content)) + content)
    stream.flush()


def _read(stream: IO[bytes]) -> tuple[str, str] | None:
    """The next frame, None at the end or where it was torn."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    tag, length = _HEAD.unpack(head)
    content = stream.read(length)
    return (tag.decode("ascii"), content.decode("utf-8", "surrogatepass")) if len(content) == length else None


@dataclass(eq=False)
class _Member:
    """A process with a model, as the driver sees it."""

    process: subprocess.Popen[bytes]
    slot: int
    unit: tuple[str, str] | None = None
    ready: bool = False

    def give(self, tag: str, text: str) -> None:
        """A process that is gone is noticed when its answers end."""
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):
            _write(self.process.stdin, tag, text)


class _Crew:
    """The processes of one run.

    They are started by subprocess instead of multiprocessing: its spawn runs the main module again in each child, which
    under the dashboard is a page, and pickles what it hands over.
    """

    def __init__(self, open_worker: OpenWorker, plan: str, units: _Units, size: int) -> None:
        self.address, self.plan, self.units, self.size = _address_of(open_worker), plan, units, size
        self.threads = max(1, _cores() // size)
        self.gpus = _gpus(os.environ)
        self.members: list[_Member] = []
        self.inbox: queue.SimpleQueue[tuple[_Member, tuple[str, str] | None]] = queue.SimpleQueue()

    def run(self, take: Take, report: Reporter) -> None:
        gently = False
        try:
            with stage(report, STAGE, self.units.total) as step:
                while self.units.left:
                    while len(self.members) < min(self.size, self.units.left):
                        self.hire()
                    self.hand_out()
                    for member, frame in self.listen():
                        self.hear(member, frame, take, step, report)
                    report(Advanced(STAGE, self.units.done, self.units.total))
            gently = True
        finally:
            self.dismiss(gently)

    def hire(self) -> None:
        """Start one more process. Its standard input closes with the driver, and then it ends, busy or not."""
        slot = min(set(range(len(self.members) + 1)) - {member.slot for member in self.members})
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        _limit_threads(env, self.threads)
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        command = [sys.executable, "-c", "from mega_core.executors import serve; serve()"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        member = _Member(process, slot)
        self.members.append(member)
        threading.Thread(target=self.collect, args=(member,), daemon=True, name=f"worker-{process.pid}").start()
        member.give(READY, json.dumps([self.address, self.plan]))

    def collect(self, member: _Member) -> None:
        """In a thread of its own: what the process says, then None when it has ended."""
        assert member.process.stdout is not None
        with member.process.stdout as answers:
            while (frame := _read(answers)) is not None:
                self.inbox.put((member, frame))
        self.inbox.put((member, None))

    def hand_out(self) -> None:
        for member in self.members:
            if member.ready and member.unit is None and self.units.waiting:
                member.unit = self.units.next()
                member.give(LINE, json.dumps(member.unit))

    def listen(self) -> list[tuple[_Member, tuple[str, str] | None]]:
        """What has arrived: waits for it at most TICK seconds."""
        heard = []
        try:
            heard.append(self.inbox.get(timeout=TICK))
            while len(heard) < 100:
                heard.append(self.inbox.get_nowait())
        except queue.Empty:
            pass
        return heard

    def hear(
        self,
        member: _Member,
        frame: tuple[str, str] | None,
        take: Take,
        step: Callable[[], None],
        report: Reporter,
    ) -> None:
        if frame is None:
            self.bury(member, report)
        elif frame[0] == READY:
            member.ready, self.units.idle_deaths = True, 0
        elif frame[0] == ERROR:
            raise _unpacked(frame[1])
        elif member.unit is not None and frame[0] == LINE:
            take(member.unit[0], frame[1])
        elif frame[0] == DONE:
            member.unit = None
            self.units.finish()
            step()

    def bury(self, member: _Member, report: Reporter) -> None:
        self.members.remove(member)
        _hang_up(member)
        _end(member, GRACE)
        how = _how(member.process.returncode)
        if not member.ready:
            if not self.units.died_opening(any(other.ready for other in self.members), how):
                self.size = max(1, len(self.members))
                report(Note(f"A worker died by {how} while it opened the model: {self.size} go on."))
        elif member.unit is not None:
            self.units.back(member.unit, how)
            report(Note(f"A worker died by {how}; its unit goes to another one."))

    def dismiss(self, gently: bool) -> None:
        """End all processes by closing their input, else by force, and wait for each."""
        for member in self.members:
            _hang_up(member)
        until = time.monotonic() + (PATIENCE if gently else GRACE + 1.0)
        for member in self.members:
            _end(member, until - time.monotonic())
        self.members.clear()


def _hang_up(member: _Member) -> None:
    with suppress(OSError, ValueError):
        assert member.process.stdin is not None
        member.process.stdin.close()


def _end(member: _Member, seconds: float) -> None:
    """Wait for the process that long, then kill it."""
    try:
        member.process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        member.process.kill()
        member.process.wait()


def _how(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        name = signal.Signals(-code).name
        return f"{name} (often: out of memory)" if name == "SIGKILL" else name
    return f"signal {-code}"


def _gpus(env: MutableMapping[str, str]) -> list[str]:
    """The GPUs to deal out among processes; empty: leave it to the model's own settings."""
    if env.get("MEGA_DEVICE", "").strip() not in ("", "auto", "cuda") or env.get("MEGA_DEVICE_MAP", "").strip():
        return []
    if "CUDA_VISIBLE_DEVICES" in env:
        return [name for name in (part.strip() for part in env["CUDA_VISIBLE_DEVICES"].split(",")) if name]
    names = (file.name.removeprefix("nvidia") for file in Path("/dev").glob("nvidia[0-9]*"))
    return sorted((name for name in names if name.isdecimal()), key=int)


def serve() -> None:
    """A process of Local: reads frames from standard input, answers on standard output, ends with its driver.

    What a library prints goes to standard error, so that it can't be taken for an answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides
    signal.signal(signal.SIGTERM, _leave)
    source, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    first = _read(source)
    if first is None:
        return
    address, plan = json.loads(first[1])
    orders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    busy = threading.Event()
    busy.set()
    threading.Thread(target=_obey, args=(source, orders, busy), daemon=True).start()
    with suppress(BrokenPipeError), ExitStack() as opened:
        try:
            with _named("opening the model"):
                worker = opened.enter_context(_found(address)(plan))
        except Exception as error:
            _write(answers, ERROR, _packed(error))
            return
        busy.clear()
        _write(answers, READY, "")
        while (order := orders.get()) is not None:
            key, text = json.loads(order)
            for tag, told in _answers(worker, (key, text)):
                _write(answers, tag, told)
            busy.clear()


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _obey(source: IO[bytes], orders: queue.SimpleQueue[str | None], busy: threading.Event) -> None:
    """In a thread of the process: its orders. When its input ends, so does the process: by itself if it is idle."""
    while (frame := _read(source)) is not None:
        busy.set()
        orders.put(frame[1])
    if not busy.is_set():
        orders.put(None)
        return
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


# 3, 5. On a Ray cluster ----------------------------------------------------------------------------------------------

CPUS_EACH = 4
"""Cores of one worker where there is no GPU and nobody said how many workers."""
LOOPBACK = "ENABLE_RAY_CLUSTER"
STORE_BYTES = 256 * 2**20
"""Object store of a cluster that we start: only text passes through it."""


@dataclass(frozen=True, slots=True)
class Ray:
    """Workers on a Ray cluster: one per GPU, or one per few cores where there is none."""

    address: str | None = None
    """host:port or "auto" of a running cluster; else RAY_ADDRESS; else a cluster on this machine for this run only."""
    actors: int | None = None
    """At most so many workers; None: as many as the cluster has room for."""
    name: str = field(default="ray", init=False)

    def __post_init__(self) -> None:
        if self.actors is not None:
            _check_count("workers", self.actors)

    def run(
        self, open_worker: OpenWorker, plan: str, units: Sequence[tuple[str, str]], take: Take, report: Reporter
    ) -> None:
        """See Executor. Raises ActionableError when ray is not installed or no cluster answers."""
        known = _Units.of(units)
        if not known.left:
            return
        address = _address_of(open_worker)
        with _cluster(self.address or os.environ.get("RAY_ADDRESS", "").strip() or "local", self.actors) as ray:
            _Cast(ray, address, plan, known, self.actors).run(take, report)


@contextmanager
def _cluster(address: str, actors: int | None) -> Iterator[Any]:
    """The module ray, connected. A connection that was there is used and left; one that we made is closed."""
    try:
        import ray
    except ImportError as error:
        raise ActionableError(
            "The executor ray needs the package ray, which is not installed.",
            "Run: pip install -r requirements-cluster.txt. Or use --executor local.",
        ) from error
    if ray.is_initialized():
        yield ray
        return
    with ExitStack() as ours:
        ours.enter_context(_quiet(logging.getLogger("ray")))
        _check_address(address)
        told: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
        told |= _own_cluster(ray, ours, actors) if address == "local" else _code_for(address)
        try:
            with _variables(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0"):
                ray.init(address=address, **told)
        except Exception as error:
            with suppress(Exception):
                ray.shutdown()
            where = "could not be started" if address == "local" else f"does not answer at {address[:60]}"
            first = (str(error).strip().splitlines() or [""])[0]
            raise ActionableError(
                f"The Ray cluster {where}: {type(error).__name__}: {first[:300]}",
                "Start one with: ray start --head. Or use --executor local.",
            ) from error
        ours.callback(ray.shutdown)
        yield ray


def _own_cluster(ray: Any, ours: ExitStack, actors: int | None) -> dict[str, Any]:
    """A cluster for this run: it listens on this machine only, has no dashboard and leaves no files; Ray itself asks
    for a token.

    Ray binds to all interfaces on Linux unless it is told that there are no clusters, which is what this switch says.
    """
    base = tempfile.gettempdir()
    folder = tempfile.TemporaryDirectory(
        prefix="ray-", dir=base if len(base) <= 24 else "/tmp", ignore_cleanup_errors=True
    )  # sockets lie in it: their paths may have 107 characters
    constants = getattr(getattr(ray, "_private", None), "ray_constants", None)
    if hasattr(constants, LOOPBACK):
        ours.callback(setattr, constants, LOOPBACK, getattr(constants, LOOPBACK))
        setattr(constants, LOOPBACK, False)
    ours.enter_context(_variables(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"))
    return {
        "num_cpus": max(_cores(), actors or 1),
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": ours.enter_context(folder),
    }


def _code_for(address: str) -> dict[str, Any]:
    """A cluster of other machines gets this package, so that all of them run the same code."""
    return {} if _is_near(address) else {"runtime_env": {"py_modules": [str(Path(__file__).parent)]}}


def _check_address(address: str) -> None:
    """Raises BadInput or ActionableError for an address nobody listens at: Ray itself would ask for minutes."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal() or int(port) > 65535:
        raise BadInput(
            "address", f"{address[:60]!r} is not host:port.", "Start the run on a machine of the cluster, with auto."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    except OSError as error:
        raise ActionableError(
            f"No Ray cluster answers at {address[:60]}: {error}.",
            "Start one with: ray start --head. Or use --executor local.",
        ) from error


def _is_near(address: str) -> bool:
    """Is this a cluster whose first machine is this one, so that it has our files?"""
    if address == "auto":
        return True
    host = address.rpartition(":")[0].strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        try:
            trial.bind((host, 0))  # only an address of this machine's own can be bound
        except OSError:
            return False
    return True


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Errors only: notices at its start, and deaths of workers, which we tell ourselves."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _variables(**values: str) -> Iterator[None]:
    """Environment variables that ray reads when it starts; those that are set stay."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class _RayWorker:
    """One worker on the cluster, with its model."""

    def __init__(self, threads: int) -> None:
        _limit_threads(os.environ, threads)
        self.opened = ExitStack()
        self.worker: Worker | None = None

    def open(self, address: str, plan: str) -> tuple[str, str]:
        """(READY, process id) or (ERROR, the error)."""
        try:
            with _named("opening the model"):
                self.worker = self.opened.enter_context(_found(address)(plan))
        except Exception as error:
            return ERROR, _packed(error)
        return READY, str(os.getpid())

    def answers(self, key: str, text: str) -> Iterator[tuple[str, str]]:
        """What is to say about a unit, each as soon as it is there."""
        assert self.worker is not None
        yield from _answers(self.worker, (key, text))

    def close(self) -> None:
        """Put the model away."""
        self.opened.close()


@dataclass(eq=False)
class _Actor:
    """A worker of the cluster, as the driver sees it."""

    handle: Any
    coming: Any
    """What to wait for: the answer to `open`, then the stream of a unit's answers; None when idle."""
    ready: bool = False
    unit: tuple[str, str] | None = None


class _Cast:
    """The workers of one run on a cluster.

    A worker that waits for room in the cluster has no unit yet: it gets one when its model is open.
    """

    def __init__(self, ray: Any, address: str, plan: str, units: _Units, actors: int | None) -> None:
        self.ray, self.address, self.plan, self.units = ray, address, plan, units
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = _room([(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes], actors)
        self.size = min(room.workers, units.left)
        self.threads = room.threads
        self.make = ray.remote(_RayWorker).options(
            num_cpus=room.cpus, num_gpus=room.gpus, max_restarts=0, max_task_retries=0
        )
        self.actors: list[_Actor] = []

    def run(self, take: Take, report: Reporter) -> None:
        gently = False
        waited, told = time.monotonic(), False
        try:
            with stage(report, STAGE, self.units.total) as step:
                while self.units.left:
                    while len(self.actors) < min(self.size, self.units.left):
                        self.hire()
                    self.hand_out()
                    for actor in self.listen():
                        self.hear(actor, take, step, report)
                    report(Advanced(STAGE, self.units.done, self.units.total))
                    if any(actor.ready for actor in self.actors):
                        waited, told = time.monotonic(), False
                    elif not told and time.monotonic() - waited > 60:
                        report(
                            Note("No worker is ready after a minute: the cluster has no room, or the model is large.")
                        )
                        told = True
            gently = True
        finally:
            self.dismiss(gently)

    def hire(self) -> None:
        handle = self.make.remote(self.threads)
        self.actors.append(_Actor(handle, handle.open.remote(self.address, self.plan)))

    def hand_out(self) -> None:
        for actor in self.actors:
            if actor.ready and actor.unit is None and self.units.waiting:
                actor.unit = self.units.next()
                stream = actor.handle.answers.options(num_returns="streaming")
                actor.coming = stream.remote(*actor.unit)

    def listen(self) -> list[_Actor]:
        """Those from whom something has arrived: waits for it at most TICK seconds."""
        coming = {actor.coming: actor for actor in self.actors if actor.coming is not None}
        if not coming:
            return []
        ready, _ = self.ray.wait(list(coming), num_returns=1, timeout=TICK)
        if ready:
            ready, _ = self.ray.wait(list(coming), num_returns=len(coming), timeout=0)
        return [coming[found] for found in ready]

    def hear(self, actor: _Actor, take: Take, step: Callable[[], None], report: Reporter) -> None:
        failures = self.ray.exceptions
        try:
            tag, text = self.ray.get(next(actor.coming) if actor.ready else actor.coming)
        except failures.RayTaskError as error:
            raise WorkerFailed(
                f"A worker of the cluster could not start: {str(error).strip().splitlines()[-1][:300]}.",
                "Its machine needs this project and its packages: see docs/scaling.md.",
            ) from error
        except (failures.RayError, StopIteration) as error:
            self.bury(actor, type(error).__name__, report)
            return
        if tag == ERROR:
            raise _unpacked(text)
        if tag == READY:
            actor.ready, actor.coming, self.units.idle_deaths = True, None, 0
        elif tag == LINE and actor.unit is not None:
            take(actor.unit[0], text)
        elif tag == DONE:
            actor.unit = actor.coming = None
            self.units.finish()
            step()

    def bury(self, actor: _Actor, how: str, report: Reporter) -> None:
        self.actors.remove(actor)
        with suppress(Exception):
            self.ray.kill(actor.handle)
        if not actor.ready:
            if not self.units.died_opening(any(other.ready for other in self.actors), how):
                self.size = max(1, len(self.actors))
                report(Note(f"A worker died ({how}) while it opened the model: {self.size} go on."))
        elif actor.unit is not None:
            self.units.back(actor.unit, how)
            report(Note(f"A worker died ({how}); its unit goes to another one."))

    def dismiss(self, gently: bool) -> None:
        """End all workers, waiting for them to put their models away if the run is over."""
        with suppress(Exception):
            if gently:
                closing = [actor.handle.close.remote() for actor in self.actors if actor.ready]
                self.ray.wait(closing, num_returns=len(closing), timeout=PATIENCE)
        for actor in self.actors:
            with suppress(Exception):
                self.ray.kill(actor.handle)
        self.actors.clear()


@dataclass(frozen=True, slots=True)
class _Room:
    """How many workers a cluster holds, and what each asks for."""

    workers: int
    cpus: int
    gpus: int
    threads: int


def _room(nodes: Sequence[tuple[float, float]], wanted: int | None) -> _Room:
    """Of machines with (CPUs, GPUs): one worker per GPU; without GPUs one per CPUS_EACH cores, or `wanted` in all.

    Raises ActionableError for a cluster without cores.
    """
    gpus = sum(math.floor(gpu) for _, gpu in nodes)
    cpus = sum(math.floor(cpu) for cpu, _ in nodes)
    if gpus:
        return _Room(min(gpus, wanted or gpus), 1, 1, max(1, cpus // gpus))
    if not cpus:
        raise ActionableError(
            "The Ray cluster has no cores to work on.", "Add a machine: ray start --address HOST:PORT."
        )
    sizes = range(min(cpus // wanted, math.floor(max(cpu for cpu, _ in nodes))) if wanted else CPUS_EACH, 0, -1)
    held = 0
    for size in sizes:
        held = sum(math.floor(cpu) // size for cpu, _ in nodes)
        if held >= (wanted or 1):
            return _Room(wanted or held, size, 0, size)
    return _Room(max(held, cpus), 1, 0, 1)
