"""Kernels that a process compiles and those that it finds compiled give the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

RUNS = {
    "abinitio": (
        (
            "--symmetry",
            "D2",
            "--starts",
            "2",
            "--iterations",
            "20",
            "--mask-diameter",
            "125",
            "--resolution-limit",
            "16",
        ),
        ("class1.mrc", "fsc.csv", "particles.star"),
    ),
    "class2d": (("--classes", "3", "--max-iterations", "4"), ("classes.mrcs", "classes.star", "particles.star")),
    "refine": (("--reference", "{truth}", "--symmetry", "D2", "--max-iterations", "4"), tiny.REFINED),
}


@pytest.mark.slow
@pytest.mark.parametrize("job", RUNS)
def test_the_first_run_on_a_machine_gives_the_bits_of_the_next(job: str, tmp_path: Path) -> None:
    made = tiny.simulated(tmp_path / "simulated", 128, symmetry="D2")
    store = tiny.imported(made.particles_star, tmp_path / "particles.zarr")
    options, written = RUNS[job]
    words = [option.format(truth=made.truth_map) for option in options]
    found = []
    for number in ("first", "second"):
        out = tmp_path / number
        subprocess.run(
            [sys.executable, "-m", "dcryo", job, str(store.path), *words, "--out", str(out)],
            check=True, capture_output=True, env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "compiled")},
        )  # fmt: skip
        found.append(tiny.digests(out, written))
    assert any((tmp_path / "compiled").rglob("*.nbc"))
    assert found[0] == found[1]
