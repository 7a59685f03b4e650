"""Where work runs. The only module that imports distributed.

The same graph runs on local threads, local processes or any Dask cluster; which one never changes a result.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dcryo.errors import InputError, RunError

_CONNECT_TIMEOUT_S = 30
KINDS = "threads, processes, synchronous, tcp://HOST:PORT, or the path of a scheduler file (.json)"


@dataclass(frozen=True)
class Cluster:
    """A place to compute.

    scheduler: what dask calls it, a name or a client; workers: threads of a local scheduler, None where the scheduler
    knows itself; task_memory_bytes: what each of the tasks that run at once may take, None where nothing says;
    description: for people.
    """

    scheduler: Any
    workers: int | None
    task_memory_bytes: int | None
    description: str


def check_kind(kind: str) -> None:
    """InputError where `--cluster` names nothing that is known, or a scheduler file that is not there."""
    if "://" in kind or kind in ("threads", "synchronous", "processes"):
        return
    if not kind.endswith(".json"):
        raise InputError(f"--cluster {kind!r} is not known here; expected one of {KINDS}")
    if not Path(kind).is_file():
        raise InputError(f"--cluster {kind}: there is no such scheduler file; start the scheduler with it first")
    try:
        address = json.loads(Path(kind).read_text())["address"]
    except (OSError, ValueError, KeyError, TypeError):
        address = None
    if not isinstance(address, str):
        raise InputError(f"--cluster {kind}: not a scheduler file, it has no address; start the scheduler with it")


@contextmanager
def connect(kind: str = "threads", workers: int | None = None) -> Iterator[Cluster]:
    """A cluster by the name that `--cluster` takes, closed again at the end of the block.

    Raises InputError as `check_kind` does, RunError where nobody answers.
    """
    check_kind(kind)
    cores = len(os.sched_getaffinity(0))
    if kind in ("threads", "synchronous"):
        count = 1 if kind == "synchronous" else workers or cores
        yield Cluster(kind, count, _available_bytes() // count, f"{count} local thread{'s' * (count > 1)}")
    elif kind == "processes":
        with _local_processes(workers or cores) as cluster:
            yield cluster
    else:
        with _remote(kind) as cluster:
            yield cluster


@contextmanager
def _local_processes(workers: int) -> Iterator[Cluster]:
    from distributed import Client, LocalCluster

    # Memory is predicted before a run; a limit per worker would only kill one that was predicted to fit. Without an
    # address, any free port, the scheduler's pages would be open to the network.
    local = LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address="127.0.0.1:0"
    )
    with _losses_told(), local, Client(local) as client:
        yield Cluster(client, None, _available_bytes() // workers, f"{workers} local process{'es' * (workers > 1)}")


@contextmanager
def _remote(kind: str) -> Iterator[Cluster]:
    from distributed import Client

    target = {"address": kind} if "://" in kind else {"scheduler_file": kind}
    try:
        client = Client(**target, timeout=_CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError, ValueError) as error:
        raise RunError(
            f"--cluster {kind}: no scheduler answers ({error}); check that it runs and the address"
        ) from error
    with _losses_told(), client:
        found = client.scheduler_info(n_workers=-1)["workers"].values()
        shares = [worker["memory_limit"] // worker["nthreads"] for worker in found if worker["memory_limit"]]
        yield Cluster(client, None, min(shares, default=None), f"{len(found)} workers at {kind}")


def _available_bytes() -> int:
    return int(psutil.virtual_memory().available)


@contextmanager
def _losses_told() -> Iterator[None]:
    """RunError, with what to do, where the workers or the scheduler are lost for good."""
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError

    try:
        yield
    except KilledWorker as error:
        raise RunError(
            f"several workers died one after the other at the task {error.task}, most often for want of memory; go on "
            "with --resume and fewer --workers, or workers with more memory"
        ) from error
    except FutureCancelledError as error:
        raise RunError(
            f"the connection to the scheduler was lost ({error}); start it again, go on with --resume"
        ) from error
