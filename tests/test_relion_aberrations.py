"""RELION and dcryo mean the same by beam tilt, Zernike coefficients and matrices of magnification."""

import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import imported, quiet

from dcryo.data import mrc, star
from dcryo.jobs.dataset import aberrations_of, load_dataset
from dcryo.jobs.exchange import ExportOptions, InfoOptions, describe, export_particles
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.simulate import SimulateOptions, SimulateResult, simulate
from dcryo.kernels import fsc
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.phantom import phantom
from dcryo.kernels.slices import prepare
from dcryo.kernels.symmetry import operators
from dcryo.steps.simulation import Microscope, draw_truth, image_pixels, images

ABERRATIONS = ("beam_tilt_x_mrad", "beam_tilt_y_mrad", "odd_zernike", "even_zernike", "magnification")
# Shells of a box of 64, towards Nyquist.
HIGH = slice(18, 30)

CASES: dict[str, dict[str, float]] = {
    "beam tilt": {"beam_tilt_x_mrad": 3.0, "beam_tilt_y_mrad": -4.0},
    "trefoil": {"trefoil": 3.0, "trefoil_angle_deg": 17.0},
    "tetrafoil": {"tetrafoil": 3.0, "tetrafoil_angle_deg": 11.0},
    "magnification": {"anisotropy_percent": 8.0, "anisotropy_angle_deg": 30.0},
    "all": {
        "beam_tilt_x_mrad": 3.0, "beam_tilt_y_mrad": -4.0, "trefoil": 3.0, "trefoil_angle_deg": 17.0, "tetrafoil": 3.0,
        "tetrafoil_angle_deg": 11.0, "anisotropy_percent": 8.0, "anisotropy_angle_deg": 30.0,
    },
}  # fmt: skip


def simulated(out: Path, **options: Any) -> SimulateResult:
    """Particles without noise, of so little defocus that their contrast stays in the box."""
    given = {"box_px": 64, "pixel_size_A": 2.0, "particles": 300, "snr": float("inf"), "voltage_kV": 200.0,
             "diameter_A": 60.0, "defocus_min_A": 2000.0, "defocus_max_A": 5000.0, "seed": 2} | options  # fmt: skip
    return simulate(SimulateOptions(model="phantom", out=out, **given), progress=quiet)


def blind_to(source: Path, out: Path) -> Path:
    """The same table without its aberrations."""
    particles = star.read_particles(source)
    optics = {name: column for name, column in particles.optics.items() if name not in ABERRATIONS}
    assert len(optics) < len(particles.optics)
    star.write_particles(out, replace(particles, optics=optics), None)
    return out


def of_ours(table: Path, folder: Path, truth: np.ndarray) -> np.ndarray:
    store = imported(table, folder / f"{table.stem}.zarr").path
    halves = reconstruct(ReconstructOptions(store=store, out=folder / table.stem), progress=quiet).half_maps
    return fsc.shell_correlation(halves[0] + halves[1], truth)


def of_relion(table: Path, truth: np.ndarray) -> np.ndarray:
    subprocess.run(
        ["relion_reconstruct", "--i", table.name, "--o", "relion.mrc", "--ctf"],
        cwd=table.parent, capture_output=True, check=True, timeout=300,
    )  # fmt: skip
    return fsc.shell_correlation(mrc.read_map(table.with_name("relion.mrc")).array, truth)


with_relion = pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="RELION is not installed")


@with_relion
@pytest.mark.parametrize("case", CASES)
def test_both_take_off_what_is_there(case: str, tmp_path: Path) -> None:
    made = simulated(tmp_path / "simulated", **CASES[case])
    truth = mrc.read_map(made.truth_map).array
    blind = of_ours(blind_to(made.truth_star, made.truth_star.with_name("blind.star")), tmp_path, truth)
    ours = of_ours(made.truth_star, tmp_path, truth)
    # RELION reads what we export.
    exported = made.truth_star.with_name("exported.star")
    export_particles(ExportOptions(source=tmp_path / "truth.zarr", out=exported), progress=quiet)
    relions = of_relion(exported, truth)
    assert blind[HIGH].min() < 0.93
    assert ours[HIGH].min() > 0.99 and relions[HIGH].min() > 0.99
    assert ours[HIGH].mean() > relions[HIGH].mean() - 0.002


@with_relion
@pytest.mark.parametrize("turned", [False, True])
def test_the_microscope_of_relions_tutorial(shared_data: Path, tmp_path: Path, turned: bool) -> None:
    """Particles of a phantom seen through the aberrations that RELION found, in its own table; turned: with a matrix
    of magnification that turns images too, so that it is not its own transpose."""
    with tarfile.open(shared_data / "relion4_tutorial_metadata" / "relion_tutorial_files.tar.xz") as archive:
        archive.extract("CtfRefine/job024/particles_ctf_refine.star", tmp_path, filter="data")
    real = star.read_particles(tmp_path / "CtfRefine" / "job024" / "particles_ctf_refine.star").take(np.arange(300))
    if turned:
        real = real.replace_optics(magnification=np.array([[[1.03, 0.05], [-0.03, 0.98]]]))
    pixel_A, box = float(real.optics["pixel_size_A"][0]), 96
    aberrations = aberrations_of(real, tmp_path)[0]
    assert aberrations.odd and aberrations.even and aberrations.anisotropic
    # Less defocus than there, so that the contrast stays in a small box, and views from everywhere.
    scope = Microscope(
        box_px=box, pixel_size_A=pixel_A, voltage_kV=200.0, spherical_aberration_mm=1.4, amplitude_contrast=0.1,
        defocus_min_A=800.0, defocus_max_A=2800.0, astigmatism_A=100.0, defocus_scatter_A=0.0, shift_sigma_px=1.0,
        preference=0.0, noise_bfactor_A2=0.0, aberrations=aberrations,
    )  # fmt: skip
    truth = draw_truth(scope, 1, np.arange(len(real)))
    particles = real.replace(
        image_path=np.full(len(real), "stack.mrcs"), image_index=np.arange(len(real)), **vars(truth)
    ).replace_optics(box_px=np.array([box]))
    atoms = phantom(operators("C1"), 25.0)
    density = gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, box, pixel_A)
    prepared = prepare(density, image_pixels(box).shell_max)
    with mrc.StackWriter(tmp_path / "stack.mrcs", len(real), box, pixel_A, "float32") as writer:
        writer.write(0, images(prepared, scope, truth, 0, 1, 0.0))
    table = tmp_path / "table.star"
    star.write_particles(table, particles, None)
    high = slice(35, 45)
    assert of_ours(blind_to(table, tmp_path / "blind.star"), tmp_path, density)[high].min() < 0.93
    # As good as of the same particles without aberrations.
    assert of_ours(table, tmp_path, density)[high].min() > 0.985
    assert of_relion(table, density)[high].min() > 0.985


def test_tables_keep_aberrations_and_origins(tmp_path: Path) -> None:
    made = simulated(tmp_path / "simulated", particles=20, **CASES["all"])
    source = star.read_particles(made.truth_star)
    assert not set(ABERRATIONS) & star.read_particles(made.particles_star).optics.keys()
    store = imported(made.truth_star, tmp_path / "a.zarr")
    export_particles(ExportOptions(source=store.path, out=tmp_path / "b.star"), progress=quiet)
    found = star.read_particles(tmp_path / "b.star")
    for name in ABERRATIONS:
        np.testing.assert_allclose(found.optics[name], source.optics[name], rtol=1e-9)
    data = load_dataset(store.path, 0)
    origin_A = data.origins_as_recorded(data.origin_px) * 2.0
    np.testing.assert_allclose(origin_A, data.particles["origin_A"], atol=1e-9)
    assert np.abs(data.origin_px * 2.0 - origin_A).max() > 0.05
    told = describe(InfoOptions(path=store.path)).summary()
    assert "beam tilt 3, -4 mrad" in told and "odd phases of 2" in told and "even phases of 2" in told
    assert "magnification that differs by 8.3 %" in told
