"""Symmetry expansion: the poses, what other jobs make of them, and RELION's."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo.data import star
from dcryo.data.particles import identities
from dcryo.data.run import Run
from dcryo.data.store import Store, open_store, select
from dcryo.errors import InputError
from dcryo.jobs.dataset import load_dataset, open_particles
from dcryo.jobs.expand import ExpandOptions, ExpandResult, expand
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.simulate import SimulateResult
from dcryo.kernels import fsc
from dcryo.kernels.rotations import angle_between_deg
from dcryo.kernels.symmetry import operators

GROUPS = ["C1", "C4", "D3", "T", "O", "I2"]


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory: pytest.TempPathFactory) -> SimulateResult:
    """Particles of a phantom of symmetry D2, with their truth."""
    return tiny.simulated(tmp_path_factory.mktemp("expand") / "simulated", 96, symmetry="D2")


@pytest.fixture(scope="module")
def posed_d2(symmetric: SimulateResult, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return tiny.imported(symmetric.truth_star, tmp_path_factory.mktemp("expand") / "posed.zarr")


def made(source: Path, out: Path, symmetry: str) -> ExpandResult:
    return expand(ExpandOptions(source=source, out=out, symmetry=symmetry), progress=tiny.quiet)


@pytest.mark.parametrize("symmetry", GROUPS)
def test_every_particle_is_there_in_every_pose_of_its_group(posed_d2: Store, tmp_path: Path, symmetry: str) -> None:
    group = operators(symmetry)
    result = made(posed_d2.path, tmp_path / "out.zarr", symmetry)
    before, found = posed_d2.particles(), result.store.particles()
    assert (result.before, result.operators, len(found)) == (96, len(group), 96 * len(group))
    owner = np.repeat(np.arange(96), len(group))
    for name in ("image_path", "image_index", "half", "defocus_u_A", "origin_A"):
        np.testing.assert_array_equal(found[name], before[name][owner])
    for particle in (0, 7, 95):
        poses = found["rotation"][owner == particle]
        turns = np.swapaxes(before["rotation"][particle : particle + 1], 1, 2) @ poses
        apart = angle_between_deg(turns[:, None], group[None])
        np.testing.assert_allclose(apart.min(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(apart.min(axis=1), 0, atol=1e-6)
    # Nothing but columns: images are those of the store.
    assert result.store.selection == posed_d2.path
    np.testing.assert_array_equal(result.store.read([len(group)]).images, posed_d2.read([1]).images)


def test_the_expanded_particles_make_without_symmetry_the_map_that_they_make_with_it(
    posed_d2: Store, tmp_path: Path
) -> None:
    expanded = made(posed_d2.path, tmp_path / "out.zarr", "D2").store
    maps = [
        reconstruct(ReconstructOptions(store=store, out=tmp_path / name, **given), progress=tiny.quiet)
        for name, store, given in (
            ("with", posed_d2.path, {"symmetry": "D2"}),
            ("without", expanded.path, {}),
            ("never", posed_d2.path, {}),
        )
    ]
    expected, found, plain = (np.mean(of.half_maps, axis=0) for of in maps)
    assert fsc.shell_correlation(expected, found)[1:14].min() > 0.995
    assert fsc.shell_correlation(expected, plain)[1:14].min() < 0.97


def test_all_copies_of_an_image_are_in_one_half_also_where_the_halves_are_made(posed_d2: Store, tmp_path: Path) -> None:
    undivided = select(posed_d2, np.arange(96), tmp_path / "undivided.zarr", {"half": np.zeros(96)})
    expanded = made(undivided.path, tmp_path / "out.zarr", "D2").store
    again = select(expanded, np.arange(expanded.n), tmp_path / "again.zarr", {"half": np.zeros(expanded.n)})
    for store in (expanded, again):
        halves = load_dataset(store.path, seed=5).halves.reshape(96, 4)
        assert (halves == halves[:, :1]).all() and 10 < np.count_nonzero(halves[:, 0] == 1) < 86


def test_copies_are_told_apart_and_the_first_is_the_particle_itself(posed_d2: Store, tmp_path: Path) -> None:
    store = made(posed_d2.path, tmp_path / "out.zarr", "D2").store
    found = identities(store.particles())
    assert len(np.unique(found)) == store.n
    np.testing.assert_array_equal(found[::4], identities(posed_d2.particles()))
    # So a run's table finds its rows in the store that it came from, in whatever order.
    order = np.random.Generator(np.random.Philox(2)).permutation(store.n)[:200]
    run = tmp_path / "run"
    with Run.start(run, "refine", {}, [store.path]) as begun:
        star.write_particles(run / "particles.star", store.particles().take(order), None)
        begun.done({})
    particles, whole, rows = open_particles(run)
    assert whole.path == store.path
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(particles["rotation"], store.particles()["rotation"][order], atol=1e-6)


def test_what_cannot_be_expanded_is_refused(posed_d2: Store, store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no poses"):
        made(store.path, tmp_path / "a.zarr", "C2")
    once = made(posed_d2.path, tmp_path / "once.zarr", "C2")
    with pytest.raises(InputError, match="expanded already"):
        made(once.store.path, tmp_path / "b.zarr", "C2")
    with pytest.raises(InputError, match=r"\.zarr"):
        made(posed_d2.path, tmp_path / "c", "C2")
    with pytest.raises(InputError, match="C5x"):
        made(posed_d2.path, tmp_path / "c.zarr", "C5x")
    assert not (tmp_path / "a.zarr").exists() and not (tmp_path / "b.zarr").exists()


def test_a_run_that_goes_on_leaves_the_selection_as_it_is(posed_d2: Store, tmp_path: Path) -> None:
    first = made(posed_d2.path, tmp_path / "out.zarr", "C2").store
    options = ExpandOptions(source=posed_d2.path, out=tmp_path / "out.zarr", symmetry="C2", resume=True)
    assert expand(options, progress=tiny.quiet).store.fingerprint == first.fingerprint
    assert made(posed_d2.path, tmp_path / "other.zarr", "C2").store.fingerprint == first.fingerprint


@pytest.mark.skipif(shutil.which("relion_particle_symmetry_expand") is None, reason="RELION is not installed")
@pytest.mark.parametrize("symmetry", ["C4", "D2", "T", "O", "I1"])
def test_relion_makes_the_same_poses(symmetric: SimulateResult, posed_d2: Store, tmp_path: Path, symmetry: str) -> None:
    command = [
        "relion_particle_symmetry_expand",
        "--i",
        symmetric.truth_star,
        "--o",
        "expanded.star",
        "--sym",
        symmetry,
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    peer = star.read_particles(tmp_path / "expanded.star")
    own = made(posed_d2.path, tmp_path / "out.zarr", symmetry).store.particles()
    assert len(peer) == len(own)
    # Theirs repeat an image in a row too, but its poses come in another order.
    for particle in (0, 50):
        theirs = peer["rotation"][peer["image_index"] == particle]
        ours = own["rotation"][own["image_index"] == particle]
        apart = angle_between_deg(theirs[:, None], ours[None])
        np.testing.assert_allclose(apart.min(axis=0), 0, atol=1e-3)
        np.testing.assert_allclose(apart.min(axis=1), 0, atol=1e-3)


def test_the_command(posed_d2: Store, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from dcryo import cli

    assert cli.main(["expand", str(posed_d2.path), "--symmetry", "C2", "--out", str(tmp_path / "out.zarr")]) == 0
    assert "192 particles, 2 for each of 96" in capsys.readouterr().out
    assert open_store(tmp_path / "out.zarr").n == 192
