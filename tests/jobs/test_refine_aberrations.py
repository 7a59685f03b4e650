"""A refinement of aberrated images, which has no line of its own about aberrations, is as good as one of clean ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from dcryo.data import mrc, star
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.kernels import fsc

ABERRATIONS = {
    "beam_tilt_x_mrad": 150.0,
    "beam_tilt_y_mrad": -100.0,
    "anisotropy_percent": 8.0,
    "anisotropy_angle_deg": 20.0,
}
HIGH = slice(9, 15)


@dataclass(frozen=True)
class Refined:
    agreement: float
    """Mean FSC of the map to the truth in the upper half of the shells."""
    origin_error_A: float
    """Median error of the origins in the table."""


def refined(folder: Path, table: str = "truth.star", **options: Any) -> Refined:
    made = tiny.simulated(folder / "simulated", 300, snr=2.0, shift_sigma_px=3.0, defocus_max_A=12000.0, **options)
    truth = mrc.read_map(made.truth_map).array
    if table == "blind.star":
        known, told = star.read_particles(made.truth_star), star.read_particles(made.particles_star)
        star.write_particles(
            made.truth_star.with_name(table), told.replace(half=known["half"], rotation=known["rotation"]), None
        )
    store = tiny.imported(made.truth_star.with_name(table), folder / "a.zarr")
    result = refine(
        RefineOptions(
            store=store.path, reference=made.truth_map, mask_diameter_A=130.0, initial_lowpass_A=25.0, max_iterations=3,
            out=folder / "out",
        ),
        progress=tiny.quiet,
    )  # fmt: skip
    known = star.read_particles(made.truth_star)["origin_A"]
    return Refined(
        float(fsc.shell_correlation(result.map, truth)[HIGH].mean()),
        float(np.median(np.linalg.norm(result.particles["origin_A"] - known, axis=1))),
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Refined:
    return refined(tmp_path_factory.mktemp("clean"))


def test_aberrations_cost_nothing(clean: Refined, tmp_path: Path) -> None:
    honoured, blind = refined(tmp_path / "a", **ABERRATIONS), refined(tmp_path / "b", "blind.star", **ABERRATIONS)
    assert honoured.agreement > clean.agreement - 0.02
    assert blind.agreement < clean.agreement - 0.2
    # Tables have the origins of images as they were recorded.
    assert honoured.origin_error_A < 1.3 * clean.origin_error_A
