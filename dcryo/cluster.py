"""Where work runs. The only module that imports distributed.

The same graph runs on local threads, local processes or any Dask cluster; which one never changes a result.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcryo.errors import InputError, RunError

_CONNECT_TIMEOUT_S = 30
KINDS = "threads, processes, synchronous, tcp://HOST:PORT, or the path of a scheduler file (.json)"


@dataclass(frozen=True)
class Cluster:
    """A place to compute.

    scheduler: what dask calls it, a name or a client; workers: threads of a local scheduler, None where the scheduler
    knows itself; description: for people.
    """

    scheduler: Any
    workers: int | None
    description: str


@contextmanager
def connect(kind: str = "threads", workers: int | None = None) -> Iterator[Cluster]:
    """A cluster by the name that `--cluster` takes, closed again at the end of the block.

    Raises InputError where the name is not known or the scheduler file is missing, RunError where nobody answers.
    """
    cores = len(os.sched_getaffinity(0))
    if kind in ("threads", "synchronous"):
        count = 1 if kind == "synchronous" else workers or cores
        yield Cluster(kind, count, f"{count} local thread{'s' * (count > 1)}")
    elif kind == "processes":
        with _local_processes(workers or cores) as cluster:
            yield cluster
    elif "://" in kind or kind.endswith(".json"):
        with _remote(kind) as cluster:
            yield cluster
    else:
        raise InputError(f"--cluster {kind!r} is not known here; expected one of {KINDS}")


@contextmanager
def _local_processes(workers: int) -> Iterator[Cluster]:
    from distributed import Client, LocalCluster

    # Memory is predicted before a run; a limit per worker would only kill one that was predicted to fit.
    local = LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=None
    )
    with local, Client(local) as client:
        yield Cluster(client, None, f"{workers} local process{'es' * (workers > 1)}")


@contextmanager
def _remote(kind: str) -> Iterator[Cluster]:
    from distributed import Client

    if "://" not in kind and not Path(kind).is_file():
        raise InputError(f"--cluster {kind}: there is no such scheduler file; start the scheduler with it first")
    target = {"address": kind} if "://" in kind else {"scheduler_file": kind}
    try:
        client = Client(**target, timeout=_CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError, ValueError) as error:
        raise RunError(
            f"--cluster {kind}: no scheduler answers ({error}); check that it runs and the address"
        ) from error
    with client:
        found = len(client.scheduler_info(n_workers=-1)["workers"])
        yield Cluster(client, None, f"{found} workers at {kind}")
