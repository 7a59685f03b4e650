"""Data that the tests of jobs share: made once, never changed."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo.data.store import Store, select
from dcryo.jobs.simulate import SimulateResult


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> SimulateResult:
    """160 particles of a phantom without symmetry, with their truth."""
    return tiny.simulated(tmp_path_factory.mktemp("tiny") / "simulated", 160)


@pytest.fixture(scope="session")
def store(simulated: SimulateResult, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Those particles, poses unknown."""
    return tiny.imported(simulated.particles_star, tmp_path_factory.mktemp("tiny") / "particles.zarr")


@pytest.fixture(scope="session")
def few(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The first 64 of them."""
    return select(store, np.arange(64), tmp_path_factory.mktemp("tiny") / "few.zarr")


@pytest.fixture(scope="session")
def posed(simulated: SimulateResult, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Those particles with their true poses and half sets."""
    return tiny.imported(simulated.truth_star, tmp_path_factory.mktemp("tiny") / "posed.zarr")


@pytest.fixture(scope="session")
def reference(simulated: SimulateResult) -> Path:
    """The density that the particles were made of."""
    return simulated.truth_map
