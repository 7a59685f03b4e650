"""RELION's own programs read what dcryo writes, and come to the same results."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import quiet

from dcryo.data import mrc, star
from dcryo.data.curves import read_curves
from dcryo.jobs.exchange import ExportOptions, ImportOptions, export_particles, import_particles
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels import fsc, masks, rotations, shells, symmetry

pytestmark = pytest.mark.skipif(shutil.which("relion_refine") is None, reason="RELION is not installed")

BOX_PX, PIXEL_A = 48, 3.0
DIAMETER_A = 105.0


def relion(program: str, *words: Any, cwd: Path) -> str:
    """Run one of RELION's programs; returns what it printed."""
    made = subprocess.run(
        [f"relion_{program}", *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return made.stdout


def volume(path: Path) -> np.ndarray:
    return mrc.read_map(path).array


@dataclass(frozen=True)
class Case:
    """Simulated particles in a folder, their store, and what was written from it: exported/particles.star."""

    folder: Path
    symmetry: str
    truth: Path
    store: Path

    @property
    def exported(self) -> Path:
        return self.folder / "exported" / "particles.star"


def make(folder: Path, symmetry: str, poses: bool = True, **options: Any) -> Case:
    """Simulate, import and export with the stack; the STAR names it relative to `folder`."""
    data = simulate(
        SimulateOptions(
            model="phantom", symmetry=symmetry, diameter_A=DIAMETER_A, box_px=BOX_PX, pixel_size_A=PIXEL_A,
            astigmatism_A=1500.0, seed=3, out=folder / "simulated", **options,
        ),
        progress=quiet,
    )  # fmt: skip
    store = folder / "particles.zarr"
    import_particles(ImportOptions(source=data.truth_star if poses else data.particles_star, out=store), progress=quiet)
    case = Case(folder, symmetry, data.truth_map, store)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        out = case.exported.relative_to(folder)
        export_particles(ExportOptions(source=store, out=out, stack=True), progress=quiet)
    return case


@pytest.fixture(scope="module", params=["C1", "D2"])
def with_poses(request, tmp_path_factory) -> Case:
    """Astigmatic, shifted particles with poses, reconstructed by dcryo in FOLDER/maps."""
    particles = {"C1": 2000, "D2": 1000}[request.param]
    case = make(tmp_path_factory.mktemp(request.param), request.param, particles=particles, snr=0.5, shift_sigma_px=4.0)
    options = ReconstructOptions(
        store=case.store, symmetry=case.symmetry, mask_diameter_A=1.1 * DIAMETER_A, out=case.folder / "maps"
    )
    reconstruct(options, progress=quiet)
    return case


def agreement(ours: np.ndarray, relions: np.ndarray) -> np.ndarray:
    """FSC of the maps as they are, without a mask, up to 0.9 of Nyquist."""
    return fsc.shell_correlation(ours, relions)[: int(0.9 * BOX_PX / 2) + 1]


@pytest.mark.parametrize("subset", [None, 1, 2])
def test_relion_reconstruct_makes_the_same_map(with_poses: Case, subset: int | None) -> None:
    folder, maps = with_poses.folder, with_poses.folder / "maps"
    words = ["--subset", subset] if subset else []
    made = folder / f"relion{subset}.mrc"
    relion("reconstruct", "--i", with_poses.exported, "--o", made, "--ctf", "--sym", with_poses.symmetry, *words,
           cwd=folder)  # fmt: skip
    theirs = volume(made)
    assert mrc.read_map(made).voxel_size_A == pytest.approx(PIXEL_A)
    first, second = volume(maps / "half1.mrc"), volume(maps / "half2.mrc")
    ours = {None: (first + second) / 2, 1: first, 2: second}[subset]
    assert agreement(ours, theirs).min() > 0.99
    # On the same grey scale too: that of the density whose projections the images are.
    inside = masks.sphere(BOX_PX, 0.8 * BOX_PX, 3.0)
    assert np.sum(ours * theirs * inside) / np.sum(theirs**2 * inside) == pytest.approx(1, abs=0.1)
    if subset is None:
        assert agreement(volume(maps / "map.mrc"), theirs).min() > 0.99
    else:
        # The other half has the same signal and other noise: what agrees above is the noise, image by image.
        assert agreement({1: second, 2: first}[subset], theirs).min() < 0.95


def test_relion_postprocess_takes_our_half_maps_and_mask(with_poses: Case) -> None:
    folder, maps = with_poses.folder, with_poses.folder / "maps"
    (folder / "post").mkdir()
    said = relion("postprocess", "--i", maps / "half1.mrc", "--mask", maps / "mask.mrc", "--o", "post/run", cwd=folder)
    assert f"{PIXEL_A:g} A/px" in said
    blocks = star.read_blocks(folder / "post" / "run.star")
    assert blocks["general"].columns["rlnUnfilteredMapHalf2"][0] == str(maps / "half2.mrc")
    table = blocks["fsc"].columns
    ours = read_curves(maps / "fsc.csv")
    mask = volume(maps / "mask.mrc")
    for label, name, weight in (("Unmasked", "fsc_unmasked", 1.0), ("Masked", "fsc_masked", mask)):
        theirs = table[f"rlnFourierShellCorrelation{label}Maps"].astype(float)
        assert len(theirs) == len(ours[name])
        np.testing.assert_allclose(ours[name], theirs, atol=0.02)
        # RELION sums over the half-complex transform, where only the plane x = 0 stands for both Friedel mates. With
        # its weights ours is the same number: shells, centres and grey values are read as they were meant.
        halves = (volume(maps / f"half{half}.mrc") * weight for half in (1, 2))
        np.testing.assert_allclose(fsc_of_half_transforms(*halves), theirs, atol=3e-6)


def fsc_of_half_transforms(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    a, b = np.fft.rfftn(first.astype(float)), np.fft.rfftn(second.astype(float))
    of_voxel = shells.volume_shells(BOX_PX).ravel()

    def over_shells(values: np.ndarray) -> np.ndarray:
        return np.bincount(of_voxel, weights=values.ravel())[: BOX_PX // 2 + 1]

    power = over_shells(np.abs(a) ** 2) * over_shells(np.abs(b) ** 2)
    return over_shells((a * b.conj()).real) / np.sqrt(power)


@pytest.fixture(scope="module")
def without_poses(tmp_path_factory) -> Case:
    return make(tmp_path_factory.mktemp("unknown"), "D2", poses=False, particles=150, snr=1.0)


def relion_refine(case: Case, star_file: Path, out: str, *words: Any, cwd: Path) -> tuple[np.ndarray, np.ndarray]:
    """One iteration of relion_refine from the truth at 15 A: FSC of its map with the truth up to there, and the
    angular errors of the poses that it leaves, in degrees."""
    relion(
        "refine", "--i", star_file, "--ref", case.truth, "--ini_high", 15, "--firstiter_cc", "--o", cwd / out,
        "--iter", 1, "--particle_diameter", 1.25 * DIAMETER_A, "--ctf", "--sym", case.symmetry, "--flatten_solvent",
        "--zero_mask", "--random_seed", 1, *words, cwd=cwd,
    )  # fmt: skip
    particles = star.read_particles(cwd / f"{out}_it001_data.star")
    truth = star.read_particles(case.truth.with_suffix(".star"))
    np.testing.assert_array_equal(particles["image_index"], truth["image_index"])
    errors = rotations.angular_distance_deg(particles["rotation"], truth["rotation"], symmetry.operators(case.symmetry))
    curve = fsc.shell_correlation(volume(cwd / f"{out}_it001_class001.mrc"), volume(case.truth))
    return curve[: shells.shell_at(15.0, BOX_PX, PIXEL_A)], errors


def test_relion_refine_starts_from_exported_particles(without_poses: Case) -> None:
    case = without_poses
    curve, errors = relion_refine(
        case, case.exported, "search", "--healpix_order", 1, "--offset_range", 6, "--offset_step", 2, cwd=case.folder
    )
    # It searches everywhere at 15 degrees; poses drawn at random are 79 degrees off in the median.
    assert np.median(errors) < 20
    assert curve.min() > 0.8


def test_relion_refine_starts_from_the_particles_of_a_refinement(without_poses: Case) -> None:
    case = without_poses
    refined = refine(
        RefineOptions(
            store=case.store, reference=case.truth, symmetry=case.symmetry, initial_lowpass_A=25.0,
            mask_diameter_A=1.2 * DIAMETER_A, max_iterations=3, out=case.folder / "refined",
        ),
        progress=quiet,
    )  # fmt: skip
    # Stacks are named as in the STAR file that was imported, relative to its folder.
    curve, errors = relion_refine(case, refined.out / "particles.star", "go_on", "--skip_align", cwd=case.truth.parent)
    assert np.median(errors) < 3
    assert curve.min() > 0.95
    ours = star.read_particles(refined.out / "particles.star")
    theirs = star.read_particles(case.truth.parent / "go_on_it001_data.star")
    assert rotations.angle_between_deg(ours["rotation"], theirs["rotation"]).max() < 1e-3
    for name in ("origin_A", "half", "ctf_scale", "class_number", "defocus_u_A", "defocus_angle_deg"):
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-3, err_msg=name)
