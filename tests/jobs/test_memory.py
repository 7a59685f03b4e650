"""Memory that is predicted for a task is what it takes, and a job that will not fit is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dcryo.cluster import Cluster
from dcryo.errors import InputError
from dcryo.jobs.memory import back_projection_bytes, check_memory, expectation_bytes, maximisation_bytes
from dcryo.steps.search import plan_search

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


def search(box_px: int):
    return plan_search(box_px // 4, box_px, 2.0, 1.2 * box_px, 0.1 * box_px, 0, np.zeros((1, box_px)), np.eye(3))


@pytest.mark.slow
@pytest.mark.parametrize("box_px", [64, 128])
@pytest.mark.parametrize("kind", ["global", "local", "maximisation"])
def test_prediction_is_within_a_quarter_of_the_measured_peak(kind: str, box_px: int, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--one", kind, str(tmp_path), str(box_px)]
    for _ in range(2):  # the first makes the store and the reference
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    row = json.loads(done.stdout)
    assert 0.75 < row["predicted"] / row["measured"] < 1.25, row


def test_a_job_that_does_not_fit_is_refused_and_the_message_says_what_to_turn() -> None:
    tight = Cluster("threads", 4, 1 << 30, "4 local threads")
    check_memory(tight, 64, back_projection_bytes(64), 1)
    with pytest.raises(InputError, match=r"512 px needs .* GiB .* 1\.0 GiB for each; use fewer workers \(--workers\)"):
        check_memory(tight, 512, expectation_bytes(512, 256, search(512), 1), 1)
    unknown = Cluster("threads", 4, None, "a cluster that does not say")
    check_memory(unknown, 512, back_projection_bytes(512), 1)


def test_memory_grows_with_the_volume_and_not_with_the_particles() -> None:
    small, large = (expectation_bytes(box, box // 2, search(box), 1) for box in (128, 256))
    assert 5 < large / small < 8
    assert maximisation_bytes(256, 4) > 5 * maximisation_bytes(128, 4) and maximisation_bytes(128, 1) > 0
