"""The report page: whole for a finished run, still a page for anything less."""

import base64
import csv
import html.parser
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from dcryo import figures, report
from dcryo.cli import main
from dcryo.data import mrc, star
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.euler import matrix_from_euler
from dcryo.report import write_report

BOX, PIXEL_A, N = 64, 3.0, 800


def write_csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow(["" if not np.isfinite(value) else value for value in row])


def write_curves(path: Path) -> None:
    shell = np.arange(BOX // 2 + 1)
    frequency = shell / (BOX * PIXEL_A)
    with np.errstate(divide="ignore"):
        axis = {"shell": shell, "resolution_A": 1 / frequency, "frequency_1_A": frequency}
    ripple = 0.03 * np.sin(shell * 1.7) * (shell / shell[-1])

    def fall(at: float) -> np.ndarray:
        return 1 / (1 + np.exp((shell - at) / 1.6)) + ripple

    write_csv(path / "fsc.csv", {**axis, "fsc_unmasked": fall(20), "fsc_masked": fall(23)})
    write_csv(path / "fsc_truth.csv", {**axis, "fsc_unmasked": fall(21), "fsc_masked": fall(24)})
    noise = 900 * np.exp(-shell / 30) + 200
    signal = 3e4 * np.exp(-shell / 3.5) + 1
    write_csv(path / "spectra.csv", {"shell": shell, "frequency_1_A": frequency, "noise_half1": noise,
                                     "noise_half2": noise * (1 + ripple), "signal": signal})  # fmt: skip


def write_maps(path: Path) -> None:
    axis = np.arange(BOX, dtype=np.float32) - BOX // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    rng = np.random.default_rng(3)
    volume = 0.02 * rng.standard_normal((BOX, BOX, BOX)).astype(np.float32)
    for centre in rng.normal(0, 7, (60, 3)):
        distance = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2] * 0.6) ** 2
        volume += np.exp(-distance / 5)
    mrc.write_map(path / "map.mrc", volume, PIXEL_A)
    radius = np.sqrt(x**2 + y**2 + z**2)
    mrc.write_map(path / "mask.mrc", np.clip((26 - radius) / 3, 0, 1), PIXEL_A)


def some_particles() -> Particles:
    rng = np.random.default_rng(4)
    rot, psi = rng.uniform(-180, 180, (2, N))
    tilt = np.degrees(np.arccos(np.clip(rng.normal(0.1, 0.5, N), -1, 1)))
    defocus = np.repeat(rng.uniform(8000, 22000, 20), N // 20) + rng.normal(0, 200, N)
    columns = {
        "image_path": np.full(N, "particles.mrcs"),
        "image_index": np.arange(N),
        "optics_row": np.zeros(N, np.int32),
        "rotation": matrix_from_euler(rot, tilt, psi),
        "origin_A": rng.normal(0, 4, (N, 2)),
        "defocus_u_A": defocus + rng.gamma(4, 40, N),
        "defocus_v_A": defocus,
        "defocus_angle_deg": rng.uniform(0, 180, N),
        "half": np.arange(N) % 2 + 1,
        "max_probability": rng.beta(4, 1.4, N),
        "significant_poses": rng.integers(1, 200, N),
    }
    optics = {"name": np.array(["opticsGroup1"]), "group": np.array([1]), "voltage_kV": np.array([300.0]),
              "spherical_aberration_mm": np.array([2.7]), "amplitude_contrast": np.array([0.1]),
              "pixel_size_A": np.array([PIXEL_A]), "box_px": np.array([BOX])}  # fmt: skip
    return Particles(columns, optics)


def iterate(run: Run, number: int) -> None:
    run.iteration({
        "iteration": number, "resolution_A": 40 * 0.8**number + 8.5, "shell_max": 6 + 2 * number,
        "angular_step_deg": 7.5 / 2 ** (number // 4), "shift_step_px": 1.0 / 2 ** (number // 4),
        "search": "global" if number < 8 else "local",
        "median_rotation_change_deg": None if number == 1 else 30 * 0.55**number + 0.1,
        "median_shift_change_px": None if number == 1 else 2 * 0.6**number + 0.03,
        "mean_max_probability": min(0.9, 0.08 * number), "mean_significant_poses": 900 / number, "seconds": 31.2,
    })  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run directory such as `dcryo refine` leaves."""
    path = tmp_path_factory.mktemp("runs") / "refine"
    reference = path.parent / "reference.mrc"
    reference.write_bytes(bytes(2000))
    options = {"store": "particles.zarr", "reference": reference, "symmetry": "D2", "mask_diameter": 150.0,
               "initial_lowpass": 40.0, "out": path, "cluster": "threads", "workers": None}  # fmt: skip
    run = Run.start(path, "refine", options, [reference], seed=0)
    run.record["command"] = [
        "dcryo",
        "refine",
        "my particles.zarr",
        "--reference",
        "<model>.mrc",
        "--symmetry",
        "D2",
    ]
    for number in range(1, 13):
        iterate(run, number)
    write_curves(path)
    write_maps(path)
    star.write_particles(path / "particles.star", some_particles(), None)
    run.quarantine(
        {"row": row, "image": f"{row + 1:06d}@particles.mrcs", "reason": "constant"} for row in (5, 77)
    )
    run.done({"resolution_A": 8.31, "particles": N, "median_rotation_error_deg": 1.2345})
    write_report(path)
    return path
