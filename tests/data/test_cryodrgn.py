"""Pickles for cryoDRGN and RECOVAR: against that program's own, and against scipy's Euler angles."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from scipy.spatial.transform import Rotation

from dcryo.data import cryodrgn, cs
from dcryo.errors import InputError
from dcryo.jobs.exchange import ExportOptions, export_particles
from dcryo.kernels.ctf import ctf


def read(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def test_poses_are_those_that_cryodrgn_makes_of_the_same_file(shared_data: Path, tmp_path: Path) -> None:
    """pose.cs.pkl is what cryoDRGN made of the .cs file beside it."""
    folder = shared_data / "cryodrgn_real"
    particles = cs.read_particles(folder / "cryosparc_P12_J24_001_particles.cs")
    pixel, box = particles.optics_of("pixel_size_A"), int(particles.optics["box_px"][0])
    cryodrgn.write_poses(tmp_path / "poses.pkl", particles["rotation"], particles["origin_A"] / pixel[:, None], box)
    rotation, shift = read(tmp_path / "poses.pkl")
    expected = read(folder / "pose.cs.pkl")
    np.testing.assert_allclose(rotation, expected[0], atol=2e-6)
    np.testing.assert_allclose(shift, expected[1], atol=1e-6)


def test_export_of_a_star_file(tmp_path: Path) -> None:
    made = tiny.simulated(tmp_path / "simulated", 20)
    store = tiny.imported(made.truth_star, tmp_path / "posed.zarr")
    out = tmp_path / "out" / "particles.star"
    export_particles(ExportOptions(source=store.path, out=out, pickles=True, stack=True), progress=tiny.quiet)
    rotation, shift = read(out.parent / "poses.pkl")
    lines = out.read_text().split("data_particles")[1].splitlines()
    labels = [line.split()[0] for line in lines if line.startswith("_")]
    rows = [line.split() for line in lines if "@" in line]
    assert len(rotation) == len(rows) == 20
    table = {label: [row[place] for row in rows] for place, label in enumerate(labels)}
    angles = np.array([table[f"_rlnAngle{one}"] for one in ("Rot", "Tilt", "Psi")], dtype=float).T
    # RELION's matrix turns the frame, scipy's intrinsic ZYZ the object.
    np.testing.assert_allclose(rotation, Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix(), atol=1e-6)
    origin = np.array([table[f"_rlnOrigin{one}Angst"] for one in "XY"], dtype=float).T
    np.testing.assert_allclose(shift, origin / (tiny.PIXEL_SIZE_A * tiny.BOX_PX), atol=1e-6)


def test_the_ctf_is_ours_with_the_other_sign(tmp_path: Path) -> None:
    """The formula by which cryoDRGN evaluates the nine numbers (Zhong et al. 2021), written anew."""
    made = tiny.simulated(tmp_path / "simulated", 5)
    store = tiny.imported(made.truth_star, tmp_path / "posed.zarr")
    export_particles(ExportOptions(source=store.path, out=tmp_path / "a.star", pickles=True), progress=tiny.quiet)
    table = read(tmp_path / "ctf.pkl")
    assert table.shape == (5, 9) and table.dtype == np.float32
    kx, ky = np.arange(12.0), np.arange(12.0)[::-1]
    box, pixel, u, v, angle, voltage, cs_mm, w, phase = table.astype(np.float64).T[:, :, None]
    assert (box == tiny.BOX_PX).all() and np.allclose(pixel, tiny.PIXEL_SIZE_A)
    sx, sy = kx / (box * pixel), ky / (box * pixel)
    squared, volts = sx**2 + sy**2, 1000 * voltage
    wavelength = 12.2639 / np.sqrt(volts + 0.97845e-6 * volts**2)
    defocus = (u + v + (u - v) * np.cos(2 * (np.arctan2(sy, sx) - np.deg2rad(angle)))) / 2
    gamma = 2 * np.pi * (-defocus * wavelength * squared / 2 + 1e7 * cs_mm * wavelength**3 * squared**2 / 4)
    gamma -= np.deg2rad(phase)
    theirs = np.sqrt(1 - w**2) * np.sin(gamma) - w * np.cos(gamma)
    ours = ctf(kx, ky, tiny.BOX_PX, pixel[:, 0], u[:, 0], v[:, 0], angle[:, 0], voltage[:, 0], cs_mm[:, 0], w[:, 0])
    np.testing.assert_allclose(ours, -theirs, atol=5e-3)


def test_particles_without_poses_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    made = tiny.simulated(tmp_path / "simulated", 5)
    store = tiny.imported(made.particles_star, tmp_path / "unposed.zarr")
    with pytest.raises(InputError, match="no poses"):
        export_particles(ExportOptions(source=store.path, out=tmp_path / "out" / "a.star", pickles=True))
    assert not (tmp_path / "out").exists()
