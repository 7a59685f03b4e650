"""Where work runs: what is refused at once, and what is told when workers or the scheduler are lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcryo import cluster, graph
from dcryo.cluster import check_kind, connect
from dcryo.errors import InputError, RunError


@pytest.mark.parametrize("kind", ["", "cloud", "thread", "slurm", "127.0.0.1:8786"])
def test_names_that_are_not_known(kind: str) -> None:
    for refusing in (check_kind, lambda name: connect(name).__enter__()):
        with pytest.raises(InputError, match=r"not known here; expected one of threads, processes"):
            refusing(kind)


def test_a_scheduler_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.json: there is no such scheduler file"):
        check_kind(str(tmp_path / "gone.json"))


@pytest.mark.parametrize("kind", ["tcp://127.0.0.1:9", "tcp://no.such.host.invalid:8786", "carrier://pigeon:1"])
def test_a_scheduler_that_does_not_answer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(RunError, match="no scheduler answers"), connect(kind):
        pass


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"address": 7}', "\x00"])
def test_a_scheduler_file_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "scheduler.json").write_text(text)
    with pytest.raises(InputError, match=r"scheduler\.json: not a scheduler file"):
        check_kind(str(tmp_path / "scheduler.json"))


@pytest.mark.parametrize(("kind", "workers", "count"), [("threads", 3, 3), ("synchronous", 3, 1), ("threads", None, 0)])
def test_local_threads(kind: str, workers: int | None, count: int) -> None:
    with connect(kind, workers) as found:
        assert found.workers == (count or len(os.sched_getaffinity(0)))
        assert f"{found.workers} local thread" in found.description


# Tasks of the tests below are functions that a worker can import: not of this module, which it does not find.


def test_a_task_that_kills_its_workers_is_a_run_that_failed() -> None:
    message = r"several workers died .* at the task hungry-.*, most often for want of memory; go on with --resume"
    with pytest.raises(RunError, match=message), connect("processes", 1) as found:
        graph.compute(graph.call(signal.raise_signal, signal.SIGKILL, name="hungry"), found)


def test_a_scheduler_that_is_lost_is_a_run_that_failed(tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    where = ["--scheduler-file", str(file), "--host", "127.0.0.1", "--no-dashboard"]
    command = [sys.executable, "-m", "dask", "scheduler", *where, "--port", "0"]
    with (tmp_path / "log").open("w") as log:
        scheduler = subprocess.Popen(command, stdout=log, stderr=log)
        worker = None
        try:
            while not file.is_file():
                assert scheduler.poll() is None
                time.sleep(0.05)
            command = [sys.executable, "-m", "dask", "worker", *where, "--no-nanny"]
            worker = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
            with pytest.raises(RunError, match="connection to the scheduler was lost"), connect(str(file)) as found:
                program = f"kill -9 {scheduler.pid}; sleep 5"
                graph.compute(graph.call(subprocess.run, ["sh", "-c", program], name="last"), found)
        finally:
            for process in filter(None, (scheduler, worker)):
                process.kill()
                process.wait()
