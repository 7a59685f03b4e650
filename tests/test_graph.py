"""Task graphs: trees whose shape depends on the number of terms alone, and tasks that no scheduler mixes up."""

import threading

import numpy as np
import pytest
from distributed import Client, LocalCluster

from dcryo import graph
from dcryo.cluster import Cluster, connect


def value(number: float) -> np.ndarray:
    return np.array([number], dtype=np.float32)


def tree(numbers: list[np.float32]) -> np.float32:
    """Sums of neighbours, level by level, an odd one out carried along."""
    while len(numbers) > 1:
        pairs = [first + second for first, second in zip(numbers[::2], numbers[1::2], strict=False)]
        numbers = pairs + numbers[2 * len(pairs) :]
    return numbers[0]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("workers", [1, 4])
def test_sums_are_a_tree_of_the_terms_in_their_order(count: int, workers: int) -> None:
    random = np.random.default_rng(count)
    numbers = (random.standard_normal(count) * 10.0 ** random.permutation(count)).astype(np.float32)
    with connect("threads", workers) as cluster:
        total = graph.tree_sum([graph.call(value, number, name="value") for number in numbers], name="sum")
        assert graph.compute(total, cluster)[0] == tree(list(numbers))


def test_terms_are_not_changed() -> None:
    terms = [graph.call(value, number, name="value") for number in (1.0, 2.0, 4.0)]
    with connect("synchronous") as cluster:
        kept, total = graph.compute((terms, graph.tree_sum(terms, "sum")), cluster)
    assert [term[0] for term in kept] == [1, 2, 4] and total[0] == 7


def test_parts_of_a_result_and_nested_arguments() -> None:
    both = graph.call(divmod, 17, 5, name="both", parts=2)
    total = graph.call(sum, [both[0], both[1], 10], name="total")
    with connect("synchronous") as cluster:
        assert graph.compute({"parts": [both[0], both[1]], "total": total}, cluster) == {"parts": [3, 2], "total": 15}


def test_runs_that_share_a_scheduler_do_not_get_each_others_tasks() -> None:
    """Graphs of the same names, at the same time from several clients, and again in the next iteration."""
    found: dict[int, list[float]] = {1: [], 2: [], 3: []}

    def run(start: int, address: str) -> None:
        with Client(address) as client:
            for iteration in range(4):
                terms = [graph.call(value, start + 10 * iteration, name=f"expect-1-{shard}") for shard in range(3)]
                total = graph.compute(graph.tree_sum(terms, "half1-part0"), Cluster(client, None, None, ""))
                found[start].append(float(total[0]))

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    ) as local:  # fmt: skip
        threads = [threading.Thread(target=run, args=(start, local.scheduler_address)) for start in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {start: [3.0 * (start + 10 * iteration) for iteration in range(4)] for start in found}
