"""Real particles: beta-galactosidase (EMPIAR-10204, D2, 200 kV), box 64 at 3.54 A, so that Nyquist is 7.1 A.

Poses of RELION's refinement for part of the particles, and the atomic model 5A1A, tell what is right.
"""

from pathlib import Path

import numpy as np
import pytest
from tiny import quiet

from dcryo.data import mrc, star
from dcryo.data.model import read_model
from dcryo.data.particles import Particles
from dcryo.data.store import open_store, select
from dcryo.jobs.exchange import ImportOptions, import_particles
from dcryo.jobs.reconstruct import ReconstructOptions, ReconstructResult, reconstruct
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.kernels import fsc, masks, shells, symmetry
from dcryo.kernels.density import gaussian_density

BOX_PX, PIXEL_A = 64, 3.54
# The model's two-folds lie on the axes as RELION's D2 wants them, but in another order.
TO_RELIONS_FRAME = np.array([[0.0, 1, 0], [0, 0, -1], [-1, 0, 0]])
# Half-map FSC of a plain Wiener reconstruction from the matched poses, under a sphere of 81 A.
PLAIN_FSC = {14.2: 0.86, 10.3: 0.79, 9.4: 0.51, 7.1: 0.21}
# Mean defocus of each micrograph by RELION's CTF refinement.
DEFOCUS_U_A = {21: 10920.0, 22: 9850.0, 23: 10663.0, 24: 11680.0, 25: 10688.0}
DEFOCUS_V_A = {21: 10585.0, 22: 9539.0, 23: 10329.0, 24: 11326.0, 25: 10346.0}


def shell_of(resolution_A: float) -> int:
    return round(BOX_PX * PIXEL_A / resolution_A)


def bring(source: Path, store: Path, **options) -> Path:
    import_particles(ImportOptions(source=source, out=store, **options), progress=quiet)
    return store


def reconstructed(store: Path, out: Path) -> ReconstructResult:
    return reconstruct(ReconstructOptions(store=store, symmetry="D2", mask_diameter_A=162.0, out=out), progress=quiet)


@pytest.fixture(scope="module")
def model(shared_data: Path):
    return read_model(shared_data / "models" / "5a1a.pdb")


def density(model, turn: np.ndarray) -> np.ndarray:
    """The model's atoms, turned (or mirrored) by a matrix."""
    return gaussian_density(model.position_A @ turn.T, model.amplitude, model.bfactor_A2, BOX_PX, PIXEL_A)


def against(map_: np.ndarray, other: np.ndarray) -> np.ndarray:
    """FSC from shell 4 to 32 in a sphere that holds the whole particle, the same for every map."""
    inside = masks.sphere(BOX_PX, 185 / PIXEL_A, 5.0)
    return fsc.shell_correlation(map_ * inside, other * inside)[4:]


@pytest.fixture(scope="module")
def matched(shared_data: Path, tmp_path_factory) -> Path:
    """Selection of the particles whose pose and defocus are known: their partner lies within 40 A."""
    folder = tmp_path_factory.mktemp("matched")
    source = shared_data / "bgal_empiar10204" / "derived_relion_poses.star"
    store = open_store(bring(source, folder / "all.zarr", skip_missing=True))
    near = np.flatnonzero(store.particles().extra["labMatchDistA"].astype(float) < 40)
    assert len(near) == 574
    return select(store, near, folder / "near.zarr").path


@pytest.fixture(scope="module")
def matched_map(matched: Path, tmp_path_factory) -> ReconstructResult:
    return reconstructed(matched, tmp_path_factory.mktemp("map") / "matched")


def test_half_maps_from_known_poses_are_as_good_as_a_plain_reconstruction(matched_map: ReconstructResult) -> None:
    for resolution, expected in PLAIN_FSC.items():
        assert matched_map.fsc.masked[shell_of(resolution)] >= expected - 0.05, resolution


def test_half_maps_from_permuted_angles_share_nothing_beyond_16_angstrom(matched: Path, tmp_path: Path) -> None:
    store = open_store(matched)
    order = np.random.Generator(np.random.Philox(2)).permutation(store.n)
    rotation = store.particles()["rotation"][order]
    permuted = select(store, np.arange(store.n), tmp_path / "permuted.zarr", {"rotation": rotation})
    made = reconstructed(permuted.path, tmp_path / "map")
    beyond = made.fsc.masked[shell_of(16.0) + 1 :]
    assert abs(beyond.mean()) < 0.05 and np.abs(beyond).max() < 0.2


def test_the_map_has_the_models_hand(matched_map: ReconstructResult, model) -> None:
    right = against(matched_map.map, density(model, TO_RELIONS_FRAME))
    assert right[: shell_of(10.0)].mean() > 0.8
    # A mirrored tetramer may lie in any order of the axes.
    mirror = np.diag([1.0, 1.0, -1.0])
    orders = [turn @ mirror for turn in symmetry.operators("O") if is_first_of_its_coset(turn)]
    assert len(orders) == 6
    wrong = max(against(matched_map.map, density(model, turn))[shell_of(25.0) :].mean() for turn in orders)
    assert wrong < 0.5 * right[shell_of(25.0) :].mean()


def is_first_of_its_coset(turn: np.ndarray) -> bool:
    """Whether a rotation comes first among its products with D2, which all turn the model onto itself."""
    return all(tuple(turn.ravel()) <= tuple((turn @ other).ravel()) for other in symmetry.operators("D2"))


def all_particles(shared_data: Path) -> Particles:
    """All particles that have images, with their micrograph's CTF and without poses or half sets."""
    folder = shared_data / "bgal_empiar10204"
    every = star.read_particles(folder / "Extract" / "job009" / "particles.star")
    derived = star.read_particles(folder / "derived_relion_poses.star")
    number, derived_number = micrographs(every), micrographs(derived)
    kept = np.isin(number, list(DEFOCUS_U_A))
    every, number = every.take(kept), number[kept]
    angle = {of: np.median(derived["defocus_angle_deg"][derived_number == of]) for of in DEFOCUS_U_A}
    columns = {name: values for name, values in every.columns.items() if name not in ("rotation", "origin_A", "half")}
    columns |= {
        "image_path": np.char.add(f"{folder}/", every["image_path"]),
        "defocus_u_A": np.array([DEFOCUS_U_A[of] for of in number]),
        "defocus_v_A": np.array([DEFOCUS_V_A[of] for of in number]),
        "defocus_angle_deg": np.array([angle[of] for of in number]),
    }
    return Particles(columns, every.optics)


def micrographs(particles: Particles) -> np.ndarray:
    return np.array([int(name.split("20170629_")[1][:5]) for name in particles["micrograph"].tolist()])


@pytest.mark.slow
def test_refinement_from_nothing_but_a_low_passed_model(shared_data, model, matched_map, tmp_path: Path) -> None:
    particles = all_particles(shared_data)
    assert len(particles) == 1157
    star.write_particles(tmp_path / "all.star", particles)
    truth = density(model, TO_RELIONS_FRAME)
    mrc.write_map(tmp_path / "model.mrc", truth, PIXEL_A)
    made = refine(
        RefineOptions(
            store=bring(tmp_path / "all.star", tmp_path / "all.zarr"),
            reference=tmp_path / "model.mrc",
            symmetry="D2",
            mask_diameter_A=180.0,
            out=tmp_path / "refined",
        ),
        progress=quiet,
    )
    assert made.resolution_A <= 11.0
    known, refined = against(matched_map.map, truth), against(made.map, truth)
    assert refined.mean() > known.mean() - 0.01
    resolutions = [shells.resolution_A(4 + fsc.crossing(curve, 0.5), BOX_PX, PIXEL_A) for curve in (known, refined)]
    assert resolutions[1] < resolutions[0] + 0.2
