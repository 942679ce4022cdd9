"""Executors run every unit once, survive workers that die, and leave nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from mega_core import executors
from mega_core.errors import ActionableError, BadInput, OutOfMemory, UnknownName
from mega_core.events import Advanced, Cancelled, Finished, Note, Started
from mega_core.executors import Local, Ray, WorkerFailed, by_name
from tests.conftest import ROOT
from tests.executors.toy import Heard, gone, noted, open_toy, unit

BOTH = pytest.mark.parametrize("workers", [1, 2])


def plan(folder: Path, **does: object) -> str:
    return json.dumps({"folder": str(folder), **does})


def run(
    folder: Path, units: list[tuple[str, str]], workers: int = 2, heard: Heard | None = None, **does: object
) -> Heard:
    heard = heard or Heard()
    Local(workers).run(open_toy, plan(folder, **does), units, heard.take, heard.report)
    return heard


@BOTH
def test_every_line_of_every_unit_comes_once(tmp_path: Path, workers: int):
    heard = run(tmp_path, [unit(f"u{n}", lines=n) for n in range(5)], workers)
    assert heard.told() == sorted((f"u{n}", line) for n in range(5) for line in range(n))
    assert {line["text"] for _, line in heard.lines} == {"ÿ\n" * 3}
    assert {key for key, line in heard.lines} == {line["key"] for _, line in heard.lines}
    # Lines of a unit keep their order.
    for n in range(5):
        assert [line["n"] for key, line in heard.lines if key == f"u{n}"] == list(range(n))


@BOTH
def test_each_worker_opens_once_and_closes(tmp_path: Path, workers: int):
    heard = run(tmp_path, [unit(f"u{n}", meet=workers) for n in range(6)], workers)
    assert len(heard.pids()) == workers
    assert (os.getpid() in heard.pids()) == (workers == 1)
    assert noted(tmp_path, "opened") == noted(tmp_path, "closed") == heard.pids()
    assert workers == 1 or gone(heard.pids(), 0)


@BOTH
def test_lines_and_events_reach_the_callers_thread(tmp_path: Path, workers: int):
    heard = Heard()
    thread = threading.Thread(
        target=lambda: run(tmp_path, [unit("a"), unit("b"), unit("c")], workers, heard), name="the caller"
    )
    thread.start()
    thread.join()
    assert heard.threads == {"the caller"}
    assert heard.events[0] == Started("cases", 3)
    assert heard.events[-1] == Finished("cases")
    done = [event.done for event in heard.events if isinstance(event, Advanced)]
    assert done == sorted(done)
    assert done[-1] == 3
    assert {event.total for event in heard.events if isinstance(event, Advanced)} == {3}


def test_a_line_arrives_before_its_unit_is_done(tmp_path: Path):
    def stop(heard: Heard) -> None:
        if heard.lines:
            raise Cancelled

    heard = Heard(stop)
    with pytest.raises(Cancelled):
        run(tmp_path, [unit("slow", lines=1, sleep=600), unit("other", lines=0, sleep=600)], 2, heard)
    assert heard.told() == [("slow", 0)]


def test_no_more_processes_than_units(tmp_path: Path):
    run(tmp_path, [unit("a", meet=2), unit("b")], 64)
    assert len(noted(tmp_path, "tried")) == 2


@BOTH
def test_without_units_no_model_is_opened(tmp_path: Path, workers: int):
    assert run(tmp_path, [], workers).lines == []
    assert not list(tmp_path.iterdir())


def test_a_killed_process_has_its_unit_done_by_another(tmp_path: Path):
    heard = run(tmp_path, [unit("a", meet=3), unit("bad", die="once"), *(unit(f"u{n}") for n in range(4))])
    # What the unit had said before is said again: whoever takes lines knows their keys.
    assert [(line["n"], key) for key, line in heard.lines if key == "bad"] == [(n, "bad") for n in (0, 1, 0, 1)]
    assert len({line["pid"] for key, line in heard.lines if key == "bad"}) == 2
    assert [item for item in heard.told() if item[0] != "bad"] == sorted(
        (key, n) for key in ("a", "u0", "u1", "u2", "u3") for n in range(2)
    )
    assert [event.text for event in heard.events if isinstance(event, Note)] == [
        "A worker died by SIGKILL (often: out of memory); its unit goes to another one."
    ]


def test_a_unit_that_kills_every_process_stops_the_run_by_name(tmp_path: Path):
    heard = Heard()
    with pytest.raises(
        WorkerFailed, match=r"Unit bad: the worker that had it died 3 times, at last by SIGKILL"
    ) as found:
        run(tmp_path, [unit("bad", die="always"), *(unit(f"u{n}", sleep=0.1) for n in range(50))], 2, heard)
    assert "run again" in found.value.next_step
    assert len({line["pid"] for key, line in heard.lines if key == "bad"}) == 3
    assert gone(noted(tmp_path, "opened"), 0)


@BOTH
def test_an_error_of_a_worker_keeps_its_words(tmp_path: Path, workers: int):
    with pytest.raises(BadInput) as found:
        run(tmp_path, [unit("a"), unit("bad", **{"raise": "input"}), unit("b", sleep=0.2)], workers)
    assert str(found.value) == "subject: isn't in the prompt. Write it out."
    assert (found.value.field, found.value.next_step, found.value.code) == ("subject", "Write it out.", "bad_input")
    assert workers == 1 or gone(noted(tmp_path, "opened"), 0)


@BOTH
def test_a_defect_in_a_worker_is_told_with_its_unit(tmp_path: Path, workers: int):
    with pytest.raises(WorkerFailed, match="Unit bad: KeyError: 'a key of the toy'"):
        run(tmp_path, [unit("a"), unit("bad", **{"raise": "defect"})], workers)


@BOTH
def test_a_model_that_can_not_be_opened_says_why(tmp_path: Path, workers: int):
    with pytest.raises(OutOfMemory, match="There is no room for the toy. Tidy up."):
        run(tmp_path, [unit("a"), unit("b")], workers, refuse=True)
    assert workers == 1 or gone(noted(tmp_path, "tried"), 0)


def test_processes_that_die_while_they_open_the_model_stop_the_run(tmp_path: Path):
    with pytest.raises(WorkerFailed, match="No worker could open the model: each died, at last by SIGKILL"):
        run(tmp_path, [unit("a"), unit("b")], room=0)
    assert 3 <= len(noted(tmp_path, "tried")) <= 4


def test_a_process_too_many_for_the_memory_is_left_out(tmp_path: Path):
    units = [unit("u0", meet=4, of="tried"), *(unit(f"u{n}", sleep=0.2) for n in range(1, 6))]
    heard = run(tmp_path, units, room=1)
    assert heard.told() == sorted((f"u{n}", line) for n in range(6) for line in range(2))
    assert len(heard.pids()) == 1
    assert "1 go on" in " ".join(event.text for event in heard.events if isinstance(event, Note))


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
@pytest.mark.parametrize("through", ["report", "take"])
def test_stopping_leaves_no_process(tmp_path: Path, error: type[BaseException], through: str):
    def stop(heard: Heard) -> None:
        if through == "report" and len(heard.pids()) == 2:
            raise error

    class Taking(Heard):
        def take(self, key: str, line: str) -> None:
            super().take(key, line)
            if through == "take" and len(self.pids()) == 2:
                raise error

    heard = Taking(stop)
    start = time.monotonic()
    with pytest.raises(error):
        run(tmp_path, [unit(f"u{n}", sleep=600) for n in range(4)], 2, heard)
    assert time.monotonic() - start < 30  # the units take ten minutes each
    assert len(heard.pids()) == 2
    assert gone(heard.pids(), 0)
    assert noted(tmp_path, "closed") == heard.pids()  # even so, workers put their things away


def test_processes_end_when_their_driver_is_killed(tmp_path: Path):
    script = (
        "import json, sys\n"
        "from mega_core.executors import Local\n"
        "from tests.executors.toy import open_toy, unit\n"
        "Local(2).run(open_toy, json.dumps({'folder': sys.argv[1]}), [unit('a', sleep=600), unit('b', sleep=600)],"
        " lambda *line: None, lambda event: None)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(noted(tmp_path, "opened")) < 2:
        assert time.monotonic() < until
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert gone(noted(tmp_path, "opened"), 20)


def test_cores_are_shared_out_and_torch_is_the_workers_affair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executors, "_cores", lambda: 9)
    for name in executors.THREADS:
        monkeypatch.delenv(name, raising=False)
    heard = run(tmp_path, [unit("a", meet=2), unit("b")])
    assert {line["OMP_NUM_THREADS"] for _, line in heard.lines} == {"4"}
    assert {line["torch"] for _, line in heard.lines} == {False}
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_lower_number_of_threads_is_kept():
    env = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "64", "OPENBLAS_NUM_THREADS": "many"}
    executors._limit_threads(env, 4)
    assert env == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"}


def test_gpus_are_dealt_out_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    heard = run(tmp_path, [unit("a", meet=2), unit("b", meet=2)])
    seen = {line["pid"]: line["CUDA_VISIBLE_DEVICES"] for _, line in heard.lines}
    assert set(seen.values()) <= {"3", "5"}
    assert len(set(seen.values())) == len(seen)  # workers of the same time share none
    again = tmp_path / "again"
    again.mkdir()
    heard = run(again, [unit("a", meet=2), unit("bad", die="once"), unit("c", meet=3)])
    assert {line["CUDA_VISIBLE_DEVICES"] for _, line in heard.lines} <= {"3", "5"}  # also of the one that took over
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


@pytest.mark.parametrize(
    ("env", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "MEGA_DEVICE": "auto"}, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "MEGA_DEVICE": "cpu"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "MEGA_DEVICE": "cuda:1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "MEGA_DEVICE_MAP": "auto"}, []),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_gpus_are_dealt_out_only_where_the_choice_is_open(env: dict[str, str], gpus: list[str]):
    assert executors._gpus(env) == gpus


@BOTH
def test_two_units_of_one_key_are_refused(tmp_path: Path, workers: int):
    with pytest.raises(ValueError, match="same key"):
        run(tmp_path, [unit("a"), unit("a")], workers)


def test_a_function_no_other_process_can_find_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="top of a module"):
        Local(2).run(lambda plan: nullcontext(iter), "{}", [unit("a"), unit("b")], print, print)


def test_executors_by_name():
    assert by_name("local") == Local(1)
    assert by_name("local", 3) == Local(3)
    assert by_name("ray") == Ray(None, None)
    assert by_name("ray", 4, "10.0.0.1:6379") == Ray("10.0.0.1:6379", 4)
    assert (by_name("local").name, by_name("ray").name) == executors.NAMES
    with pytest.raises(UnknownName, match="Did you mean 'ray'"):
        by_name("rai")
    for wrong in (0, -1, 1025, True):
        with pytest.raises(BadInput, match="workers"):
            by_name("local", wrong)
        with pytest.raises(BadInput, match="workers"):
            by_name("ray", wrong)


def test_ray_that_is_not_installed_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ActionableError, match="pip install -r requirements-cluster.txt"):
        Ray().run(open_toy, plan(tmp_path), [unit("a")], print, print)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("nodes", "wanted", "workers", "cpus", "gpus", "threads"),
    [
        ([(64, 8)], None, 8, 1, 1, 8),
        ([(64, 8)], 3, 3, 1, 1, 8),
        ([(16, 4), (16, 4), (8, 0)], None, 8, 1, 1, 5),
        ([(64, 8)], 20, 8, 1, 1, 8),  # never two models on a GPU
        ([(16, 0), (8, 0)], None, 6, 4, 0, 4),
        ([(2, 0)], None, 1, 2, 0, 2),
        ([(3, 0), (6, 0)], None, 1, 4, 0, 4),
        ([(16, 0)], 2, 2, 8, 0, 8),
        ([(6, 0), (6, 0)], 3, 3, 3, 0, 3),  # one of 4 cores fits on each, so 2; of 3 two on each
        ([(2, 0)], 5, 2, 1, 0, 1),
    ],
)
def test_room_in_a_cluster(nodes, wanted, workers, cpus, gpus, threads):
    assert executors._room(nodes, wanted) == executors._Room(workers, cpus, gpus, threads)


def test_a_cluster_without_cores_says_so():
    with pytest.raises(ActionableError, match="no cores"):
        executors._room([(0.0, 0.0)], None)


def test_code_is_sent_to_a_cluster_of_other_machines_only():
    assert executors._code_for("auto") == executors._code_for("127.0.0.1:6379") == {}
    sent = executors._code_for("192.0.2.77:6379")  # an address for documentation: nobody has it
    assert sent == {"runtime_env": {"py_modules": [str(ROOT / "mega_core")]}}


def test_neither_torch_nor_ray_is_imported():
    code = "import sys, mega_core.executors; sys.exit(str({'torch', 'ray'} & set(sys.modules) or 0) != '0')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
