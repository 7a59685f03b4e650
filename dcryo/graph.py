"""Task graphs: calls, trees of sums, and their execution where a cluster says. The only module that imports dask.

A graph is a function of the data set alone, but for the keys of its tasks; where it runs changes neither its nodes nor
the order of any sum.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar
from uuid import uuid4

import dask.threaded
import numpy as np
from dask.delayed import Delayed as Task
from dask.delayed import delayed
from threadpoolctl import threadpool_limits

from dcryo.cluster import Cluster

# Dask imports distributed to find a scheduler by its name, which takes longer than a small graph.
_LOCAL = {"threads": dask.threaded.get, "synchronous": dask.get}

Item = TypeVar("Item")
Result = TypeVar("Result")

_thread = threading.local()


def call(function: Callable, *arguments: Any, name: str, parts: int | None = None) -> Any:
    """A task: `function` of arguments that are values or other tasks, lists of tasks included.

    name: what the task is called where people watch a run; parts: length of the tuple that the function returns, where
    its items are wanted one by one (`task[i]`).
    """
    # A scheduler takes tasks of the same key, also those of another run that it serves, for one task.
    key = f"{name}-{uuid4().hex}"
    return delayed(_single_threaded, pure=False, nout=parts)(function, *arguments, dask_key_name=key)


def _single_threaded(function: Callable, *arguments: Any) -> Any:
    _limit_native_threads()
    return function(*arguments)


def _limit_native_threads() -> None:
    """BLAS and OpenMP stay on their task's thread, so that tasks alone fill the cores; OpenMP counts per thread."""
    if not getattr(_thread, "limited", False):
        threadpool_limits(1)
        _thread.limited = True


def each(
    function: Callable[..., Result], items: Iterable[Item], arguments: Sequence[Any], cluster: Cluster
) -> Iterator[tuple[Item, Result]]:
    """Pairs of an item and `function(item, *arguments)`, as they are done: for items that know nothing of one another.

    Items are asked for as workers become free, so that there may be any number. An exception of the function ends it.
    """
    pending: dict[Future, Item] = {}
    with _executor(cluster) as (executor, at_once):
        try:
            for item in items:
                pending[executor.submit(_single_threaded, function, item, *arguments)] = item
                if len(pending) >= at_once:
                    yield from _finished(pending)
            while pending:
                yield from _finished(pending)
        finally:
            for future in pending:
                future.cancel()


def _finished(pending: dict[Future, Item]) -> Iterator[tuple[Item, Any]]:
    """Wait for the next to be done, and take those that are out."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()


@contextmanager
def _executor(cluster: Cluster) -> Iterator[tuple[Executor, int]]:
    """Where items go, and how many are worth having there at once."""
    if cluster.workers is not None:
        with ThreadPoolExecutor(cluster.workers) as executor:
            yield executor, 2 * cluster.workers
    else:
        with cluster.scheduler.get_executor(pure=False) as executor:
            yield executor, 2 * max(1, sum(cluster.scheduler.nthreads().values()))


def tree_sum(terms: Sequence[Task], name: str) -> Task:
    """Sum of arrays by a binary tree whose shape depends on their number alone; terms are never changed in place."""
    level, rank = list(terms), 0
    while len(level) > 1:
        paired = [
            call(np.add, first, second, name=f"{name}-sum{rank}-{position}")
            for position, (first, second) in enumerate(zip(level[::2], level[1::2], strict=False))
        ]
        level = paired + level[2 * len(paired) :]
        rank += 1
    return level[0]


def compute(nodes: Any, cluster: Cluster) -> Any:
    """Values of the tasks in `nodes` (any nesting of lists, tuples and dicts), computed on a cluster."""
    options = {} if cluster.workers is None else {"num_workers": cluster.workers}
    scheduler = _LOCAL.get(cluster.scheduler, cluster.scheduler)
    return dask.compute(nodes, scheduler=scheduler, optimize_graph=False, **options)[0]
