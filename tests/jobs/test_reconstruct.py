"""Maps from true poses, against the truth."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo import cli
from dcryo.data import mrc, star
from dcryo.data.curves import read_curves
from dcryo.data.run import Run
from dcryo.data.store import Store
from dcryo.jobs.reconstruct import ReconstructOptions, ReconstructResult, reconstruct
from dcryo.jobs.simulate import SimulateResult
from dcryo.kernels import fft, fsc, rotations
from dcryo.kernels.shells import volume_shells

BOX, PIXEL = tiny.BOX_PX, tiny.PIXEL_SIZE_A
DIAMETER_A = 130.0


def made(store: Path, out: Path, **options: object) -> ReconstructResult:
    given = {"mask_diameter_A": DIAMETER_A} | options
    return reconstruct(ReconstructOptions(store=store, out=out, **given), progress=tiny.quiet)


@pytest.fixture(scope="module")
def result(posed: Store, tmp_path_factory: pytest.TempPathFactory) -> ReconstructResult:
    return made(posed.path, tmp_path_factory.mktemp("reconstruct") / "out")


@pytest.fixture(scope="module")
def truth(reference: Path) -> np.ndarray:
    return mrc.read_map(reference).array


def ratios(volume: np.ndarray, truth: np.ndarray, shells: range) -> list[float]:
    """Amplitude of a map in units of the truth, per shell."""
    found, known, of = fft.rfftn(volume), fft.rfftn(truth), volume_shells(BOX)
    return [
        float(np.vdot(known[of == shell], found[of == shell]).real / np.sum(np.abs(known[of == shell]) ** 2))
        for shell in shells
    ]


def test_the_map_is_the_truth_on_its_grey_scale(result: ReconstructResult, truth: np.ndarray) -> None:
    mask = mrc.read_map(result.out / "mask.mrc").array
    curve = fsc.shell_correlation(result.map * mask, truth * mask)
    assert curve[:10].min() > 0.97 and curve[:15].min() > 0.8
    assert result.resolution_A < 12.6
    assert ratios(result.map * mask, truth * mask, range(1, 9)) == pytest.approx([1] * 8, abs=0.1)
    for half in result.half_maps:
        assert ratios(half * mask, truth * mask, range(1, 9)) == pytest.approx([1] * 8, abs=0.2)


def test_the_hand_is_right(result: ReconstructResult, truth: np.ndarray) -> None:
    mirrored = np.roll(truth[::-1], 1, axis=0)
    assert fsc.shell_correlation(result.map, truth)[6:14].mean() > 0.8
    assert abs(fsc.shell_correlation(result.map, mirrored)[6:14].mean()) < 0.4


def test_files_and_record(result: ReconstructResult, posed: Store) -> None:
    files = {path.name for path in result.out.iterdir()}
    assert files == {*tiny.MAPS, "mask.mrc", "fsc.csv", "fsc.xml", "run.json"}
    for name, array in zip(tiny.MAPS, (*result.half_maps, result.map), strict=True):
        written = mrc.read_map(result.out / name)
        assert written.voxel_size_A == PIXEL
        np.testing.assert_array_equal(written.array, array)
    mask = mrc.read_map(result.out / "mask.mrc").array
    first, second = result.half_maps
    table = read_curves(result.out / "fsc.csv")
    np.testing.assert_allclose(table["fsc_unmasked"], fsc.shell_correlation(first, second), atol=1e-6)
    np.testing.assert_allclose(table["fsc_masked"], fsc.shell_correlation(first * mask, second * mask), atol=1e-6)
    record = Run.open(result.out).record
    assert record["status"] == "done" and record["iterations"] == []
    assert record["result"] == {
        "resolution_A": result.resolution_A, "particles": posed.n, "box_px": BOX, "pixel_size_A": PIXEL,
        "symmetry": "C1", "mask_diameter_A": DIAMETER_A,
    }  # fmt: skip


def test_each_half_is_of_its_own_particles(posed: Store, simulated: SimulateResult, tmp_path: Path) -> None:
    """The half sets of the source are kept; with them exchanged, so are the maps, to the bit."""
    particles = star.read_particles(simulated.truth_star)
    swapped = simulated.truth_star.with_name("swapped.star")
    star.write_particles(swapped, particles.replace(half=3 - particles["half"]))
    other = tiny.imported(swapped, tmp_path / "swapped.zarr")
    first, second = made(posed.path, tmp_path / "a"), made(other.path, tmp_path / "b")
    np.testing.assert_array_equal(first.half_maps[0], second.half_maps[1])
    np.testing.assert_array_equal(first.half_maps[1], second.half_maps[0])


def test_wrong_poses_make_no_map(simulated: SimulateResult, tmp_path: Path) -> None:
    particles = star.read_particles(simulated.truth_star)
    permuted = np.random.Generator(np.random.Philox(key=4)).permutation(len(particles))
    source = simulated.truth_star.with_name("permuted.star")
    star.write_particles(source, particles.replace(rotation=particles["rotation"][permuted]))
    result = made(tiny.imported(source, tmp_path / "permuted.zarr").path, tmp_path / "out")
    assert np.abs(result.fsc.masked[7:]).mean() < 0.15
    assert result.resolution_A > 20


def test_shifts_and_ctf_matter(
    simulated: SimulateResult, result: ReconstructResult, truth: np.ndarray, tmp_path: Path
) -> None:
    """Each spoilt by itself makes a worse map: none of them is passed over."""
    particles = star.read_particles(simulated.truth_star)
    good = fsc.shell_correlation(result.map, truth)[5:15].mean()
    changes = {
        "origin_A": -particles["origin_A"],
        "defocus_u_A": particles["defocus_u_A"] + 4000,
        "rotation": rotations.random_rotations(1, np.random.default_rng(1)) @ particles["rotation"],
    }
    for name, values in changes.items():
        source = simulated.truth_star.with_name(f"spoilt_{name}.star")
        star.write_particles(source, particles.replace(**{name: values}))
        store = tiny.imported(source, tmp_path / f"{name}.zarr")
        spoilt = made(store.path, tmp_path / name).map
        assert fsc.shell_correlation(spoilt, truth)[5:15].mean() < 0.95 * good


def test_symmetry_multiplies_the_data(tmp_path: Path) -> None:
    simulated = tiny.simulated(tmp_path / "simulated", 60, symmetry="C4", snr=0.3)
    store = tiny.imported(simulated.truth_star, tmp_path / "store.zarr")
    truth = mrc.read_map(simulated.truth_map).array
    with_it, without = made(store.path, tmp_path / "c4", symmetry="C4"), made(store.path, tmp_path / "c1")
    better, worse = (fsc.shell_correlation(one.map, truth)[4:12].mean() for one in (with_it, without))
    assert better > worse + 0.05
    quarter = np.roll(np.rot90(with_it.map, axes=(1, 2)), 1, axis=1)
    inner = slice(2, -2)
    difference = (quarter - with_it.map)[inner, inner, inner]
    assert np.abs(difference).max() < 0.02 * np.abs(with_it.map).max()


def test_command_resume_and_overwrite(posed: Store, result: ReconstructResult, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    command = ["reconstruct", str(posed.path), "--out", str(out), "--mask-diameter", str(DIAMETER_A)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: {result.resolution_A:.2f} A")
    assert tiny.digests(out, tiny.MAPS) == tiny.digests(result.out, tiny.MAPS)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert cli.main([*command, "--resume"]) == 0
    assert capsys.readouterr().out == printed
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    assert cli.main(command) == 2
    assert cli.main([*command, "--overwrite"]) == 0
    assert tiny.digests(out, tiny.MAPS) == tiny.digests(result.out, tiny.MAPS)
