"""One refinement, wherever it runs and whatever dies on the way: the same bytes in every file."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tiny
from distributed import LocalCluster

from dcryo.data.run import Run
from dcryo.data.store import Store, select
from dcryo.jobs import dataset
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.steps import search

# Of 96 particles: three shards a half, a tree that is not balanced, and searches both global and local.
PARTICLES, SMALLEST_SHARD, LOCAL_RESOLUTION, TRUSTED = 96, 16, 0.4, 0.6
SLOW = pytest.mark.slow
CONSTANTS = {
    "dcryo.jobs.dataset:_SMALLEST_SHARD": SMALLEST_SHARD, "dcryo.steps.search:_LOCAL_RESOLUTION": LOCAL_RESOLUTION,
    "dcryo.jobs.refine:_TRUSTED": TRUSTED,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Given:
    """What is refined, and the files of the run that all others are compared with."""

    store: Path
    reference: Path
    expected: dict[str, str]

    def options(self, out: Path, **changes: object) -> RefineOptions:
        given = {"mask_diameter_A": 180.0, "max_iterations": 3} | changes
        return RefineOptions(store=self.store, reference=self.reference, out=out, **given)

    def words(self, out: Path) -> list[str]:
        """The same as the words of a command."""
        return [
            "refine", str(self.store), "--reference", str(self.reference), "--out", str(out), "--mask-diameter", "180",
            "--max-iterations", "3", "--cluster", "threads", "--workers", "2", "--resume",
        ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_plans() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_SMALLEST_SHARD", SMALLEST_SHARD)
        patch.setattr(search, "_LOCAL_RESOLUTION", LOCAL_RESOLUTION)
        patch.setattr(sys.modules["dcryo.jobs.refine"], "_TRUSTED", TRUSTED)
        yield


@pytest.fixture(scope="module")
def given(store: Store, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("same")
    some = select(store, np.arange(PARTICLES)[::-1], folder / "some.zarr")
    blank = Given(some.path, reference, {})
    refine(blank.options(folder / "synchronous", cluster="synchronous"), progress=tiny.quiet)
    everywhere = [row["searched_everywhere"] for row in Run.open(folder / "synchronous").record["iterations"]]
    assert everywhere[:2] == [1, 1] and 0 < everywhere[2] < 1
    return dataclasses.replace(blank, expected=tiny.digests(folder / "synchronous"))


@pytest.mark.parametrize("workers", [1, 4])
def test_threads(given: Given, tmp_path: Path, workers: int) -> None:
    refine(given.options(tmp_path / "out", workers=workers), progress=tiny.quiet)
    assert tiny.digests(tmp_path / "out") == given.expected


@pytest.mark.parametrize("workers", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)])
def test_processes(given: Given, tmp_path: Path, workers: int) -> None:
    refine(given.options(tmp_path / "out", cluster="processes", workers=workers), progress=tiny.quiet)
    assert tiny.digests(tmp_path / "out") == given.expected


@pytest.fixture(scope="module")
def another(given: Given, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a run with another seed."""
    out = tmp_path_factory.mktemp("another") / "out"
    refine(given.options(out, seed=1), progress=tiny.quiet)
    return tiny.digests(out)


def test_another_seed_gives_other_bits(given: Given, another: dict[str, str]) -> None:
    """So that equal bits above are no accident of files that never change."""
    assert [name for name in another if another[name] == given.expected[name]] == ["mask.mrc"]


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Dask scheduler with two workers, each another program, as on a cluster: the scheduler file."""
    folder = tmp_path_factory.mktemp("scheduler")
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    where = ["--scheduler-file", str(file), "--no-dashboard", "--host", "127.0.0.1"]
    worker = [*dask, "worker", *where, "--no-nanny", "--nthreads", "1", "--local-directory", str(folder)]
    commands = [[*dask, "scheduler", *where, "--port", "0"], worker, [*worker[:-3], "2", *worker[-2:]]]
    started: list[subprocess.Popen] = []
    with (folder / "log").open("w") as log:
        try:
            for command in commands:
                started.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=folder))
                wait_for(file.is_file, 60)
            yield file
        finally:
            for process in reversed(started):
                process.kill()
                process.wait()


def wait_for(true: object, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def test_a_shared_scheduler(given: Given, another: dict[str, str], scheduler: Path, tmp_path: Path) -> None:
    """By scheduler file and by address, two runs at the same time that must not get each other's results."""
    address = json.loads(scheduler.read_text())["address"]
    assert address.startswith("tcp://")
    runs = [
        given.options(tmp_path / "file", cluster=str(scheduler)),
        given.options(tmp_path / "address", cluster=address, seed=1),
    ]
    threads = [threading.Thread(target=refine, args=(run,), kwargs={"progress": tiny.quiet}) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tiny.digests(tmp_path / "file") == given.expected
    assert tiny.digests(tmp_path / "address") == another


def test_a_worker_killed_in_mid_iteration(given: Given, tmp_path: Path) -> None:
    killed: list[int] = []
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address="127.0.0.1:0"
    ) as cluster:
        stop = threading.Event()

        def kill() -> None:
            """In the second and in the third iteration: a worker that is about a shard."""
            while not stop.is_set() and len(killed) < 2:
                time.sleep(0.005)
                record = tmp_path / "out" / "run.json"
                if not record.is_file() or len(Run.open(record.parent).record["iterations"]) <= len(killed):
                    continue
                for name, state in list(cluster.scheduler.workers.items()):
                    if any(task.key.startswith("expect-") for task in list(state.processing)):
                        pid = next(nanny.pid for nanny in cluster.workers.values() if nanny.worker_address == name)
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                        break

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            refine(given.options(tmp_path / "out", cluster=cluster.scheduler_address), progress=tiny.quiet)
        finally:
            stop.set()
            killer.join()
    assert len(set(killed)) == 2
    assert tiny.digests(tmp_path / "out") == given.expected


@SLOW
def test_a_driver_killed_at_random_moments(given: Given, tmp_path: Path) -> None:
    out, kills = tmp_path / "out", 0
    record = out / "run.json"
    for moment_s in np.random.Generator(np.random.Philox(key=6)).uniform(0.0, 0.5, 10).tolist():
        known = record.read_bytes() if record.is_file() else b""
        process = tiny.started(tiny.command, given.words(out), CONSTANTS)
        # The clock starts when the run does.
        while process.is_alive() and (not record.is_file() or record.read_bytes() == known):
            time.sleep(0.005)
        time.sleep(moment_s)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode == -signal.SIGKILL
    process = tiny.started(tiny.command, given.words(out), CONSTANTS)
    process.join()
    assert process.exitcode == 0 and kills > 2
    assert tiny.digests(out) == given.expected
    assert [row["iteration"] for row in Run.open(out).record["iterations"]] == [1, 2, 3]
    assert not (out / "scratch").exists()


WORST = {
    "shards of the second iteration": ("dcryo.steps.expectation", "fold", 9),
    "iteration recorded, not committed": ("dcryo.data.run:Run", "save_checkpoint", 1),
    "checkpoint written, not renamed": ("pathlib:Path", "rename", 1),
    "a reference half written": ("numpy", "save", 1),
    "one half map written": ("dcryo.data.mrc", "write_map", 2),
    "all written, not recorded": ("dcryo.data.run:Run", "done", 1),
}


def test_a_driver_killed_at_the_worst_moments(given: Given, tmp_path: Path) -> None:
    """One run that dies at each of these in turn."""
    out = tmp_path / "out"
    for moment, dies_at in WORST.items():
        process = tiny.started(tiny.command, given.words(out), CONSTANTS, dies_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        assert Run.open(out).record["status"] == "running"
    process = tiny.started(tiny.command, given.words(out), CONSTANTS)
    process.join()
    assert process.exitcode == 0
    assert tiny.digests(out) == given.expected
    assert len(Run.open(out).record["resumed"]) == len(WORST)
    assert not (out / "scratch").exists()


@SLOW
def test_no_worker_outlives_its_driver(given: Given, tmp_path: Path) -> None:
    words = [word.replace("threads", "processes") for word in given.words(tmp_path / "out")]
    process = tiny.started(tiny.command, words, CONSTANTS)
    scratch = tmp_path / "out" / "scratch"
    while not (scratch.is_dir() and any(scratch.iterdir())):
        assert process.is_alive()
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    alive = psutil.wait_procs(children, timeout=20)[1]
    for child in alive:
        child.kill()
    assert not alive


@pytest.mark.parametrize("where", ["threads", pytest.param("processes", marks=SLOW)])
def test_reconstruct(posed: Store, tmp_path: Path, where: str) -> None:
    for name, options in (("expected", {"cluster": "synchronous"}), ("found", {"cluster": where, "workers": 3})):
        reconstruct(ReconstructOptions(store=posed.path, out=tmp_path / name, **options), progress=tiny.quiet)
    names = (*tiny.MAPS, "fsc.csv")
    assert tiny.digests(tmp_path / "found", names) == tiny.digests(tmp_path / "expected", names)
