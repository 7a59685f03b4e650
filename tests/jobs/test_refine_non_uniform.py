"""A refinement whose references are filtered place by place."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo.data.store import Store
from dcryo.jobs.refine import RefineOptions, RefineResult, refine
from dcryo.kernels import non_uniform

FILES = ("half1.mrc", "half2.mrc", "map.mrc", "fsc.csv", "particles.star")


@pytest.fixture
def refined(few: Store, reference: Path, tmp_path: Path):
    def run(name: str, **options) -> RefineResult:
        given = {"store": few.path, "reference": reference, "initial_lowpass_A": 20.0, "max_iterations": 2}
        return refine(RefineOptions(**given, **options, out=tmp_path / name), progress=tiny.quiet)

    return run


def test_references_are_filtered_and_the_bits_are_the_same_on_any_workers(refined, tmp_path: Path, monkeypatch) -> None:
    # So few images do not go as far as where filters are worth it.
    monkeypatch.setattr(non_uniform, "_LEAST_SHELL", 1)
    plain, one, other = (
        refined("plain"),
        refined("one", non_uniform=True, workers=1),
        refined("other", non_uniform=True),
    )
    assert tiny.digests(tmp_path / "one", FILES) == tiny.digests(tmp_path / "other", FILES)
    assert not np.array_equal(one.half_maps[0], plain.half_maps[0])
    correlation = np.corrcoef(one.map.ravel(), plain.map.ravel())[0, 1]
    assert correlation > 0.8 and other.iterations == plain.iterations


def test_coarse_references_are_left_as_they_are(refined, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(non_uniform, "_LEAST_SHELL", 16)
    refined("plain")
    refined("local", non_uniform=True)
    assert tiny.digests(tmp_path / "plain", FILES) == tiny.digests(tmp_path / "local", FILES)
