"""Variability of particles with a domain that swings, and of ones with none."""

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import swinging
import tiny
from scipy.stats import spearmanr

from dcryo.data import mrc
from dcryo.data.run import Run
from dcryo.data.store import open_store, select
from dcryo.errors import InputError
from dcryo.jobs import dataset
from dcryo.jobs.select import SelectOptions, select_particles
from dcryo.jobs.variability import VariabilityOptions, VariabilityResult, analyse
from dcryo.kernels import solvent
from dcryo.report import write_report

BOX, PIXEL_A, PARTICLES = 32, 7.0, 500
FILES = ("mean.mrc", "component1.mrc", "component2.mrc", "coordinates.csv", "particles.star", "halves.csv")


def mask_of(folder: Path) -> Path:
    sweep = np.max([sum(swinging.parts(BOX, PIXEL_A, angle)) for angle in (-15, 0, 15)], axis=0)
    mask = solvent.soft_mask(sweep > 0.1 * sweep.max(), 1.5, 2.0)
    mrc.write_map(folder / "mask.mrc", mask, PIXEL_A)
    return folder / "mask.mrc"


Made = tuple[swinging.Swinging, Path, Path]


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Particles, their store and a mask: contrasts vary by a fifth."""
    folder = tmp_path_factory.mktemp("moving")
    made = swinging.make(folder / "simulated", PARTICLES, BOX, PIXEL_A, snr=1.0, contrast_sd=0.2, shift_px=1.0)
    return made, tiny.imported(made.star, folder / "moving.zarr").path, mask_of(folder)


def options(made: Made, out: Path, **changes: object) -> VariabilityOptions:
    given = {"components": 2, "mask": made[2], "mask_diameter_A": swinging.MASK_DIAMETER_A, "resolution_limit_A": 18,
             "frames": 5, "bins": False, "cluster": "synchronous"} | changes  # fmt: skip
    return VariabilityOptions(source=made[1], out=out, **given)


@pytest.fixture(scope="module")
def found(moving: Made, tmp_path_factory: pytest.TempPathFactory) -> VariabilityResult:
    out = tmp_path_factory.mktemp("found") / "out"
    return analyse(options(moving, out, bins=True, clusters=3), progress=tiny.quiet)


def digests(out: Path) -> list[str]:
    return [hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES]


def test_the_first_coordinate_follows_the_angle(moving: Made, found: VariabilityResult) -> None:
    assert found.supported[0] and found.agreement[0] > 0.8
    assert abs(spearmanr(found.coordinates[:, 0], moving[0].angle_deg)[0]) > 0.93
    # The error that is given is the error that is made: of the part that a line explains, and no more than twice it.
    slope, offset = np.polyfit(moving[0].angle_deg, found.coordinates[:, 0], 1)
    left = found.coordinates[:, 0] - offset - slope * moving[0].angle_deg
    assert 0.7 < np.std(left) / np.sqrt(np.mean(found.sd[:, 0] ** 2)) < 2


def test_contrast_is_no_component(moving: Made, found: VariabilityResult) -> None:
    record = Run.open(found.out).record["result"]
    assert record["contrast_sd"] == pytest.approx(0.2, abs=0.03)
    mean = found.mean.ravel().astype(np.float64)
    assert np.abs(found.components.reshape(2, -1) @ mean).max() < 0.5 * np.linalg.norm(mean)


@pytest.mark.parametrize("prefix", ["component1", "bins1"])
def test_the_series_swings(found: VariabilityResult, prefix: str) -> None:
    files = sorted((found.out / "series").glob(f"{prefix}_*.mrc"))
    angles = [swinging.angle_in(mrc.read_map(file).array, PIXEL_A, 20.0) for file in files]
    steps = np.diff(angles)
    assert len(files) == 5 and ((steps > 0).all() or (steps < 0).all()), angles
    assert abs(angles[-1] - angles[0]) > 14, angles


def test_files_and_report(found: VariabilityResult) -> None:
    with (found.out / "coordinates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (
        len(rows) == PARTICLES and {"image", "micrograph", "component1", "component1_sd", "contrast"} <= rows[0].keys()
    )
    assert np.allclose([float(row["component1"]) for row in rows], found.coordinates[:, 0])
    flat = found.components.reshape(2, -1).astype(np.float64)
    np.testing.assert_allclose(flat @ flat.T, np.eye(2), atol=1e-4)
    page = write_report(found.out).read_text()
    assert "Maps along the components" in page and "Coordinates of the particles" in page
    assert "Could not be shown" not in page


def test_selections_by_coordinate_and_by_cluster_carry_the_poses(found: VariabilityResult, tmp_path: Path) -> None:
    kept = select_particles(
        SelectOptions(source=found.out, out=tmp_path / "a.zarr", where=("dcryoComponent1 > 1",)), progress=tiny.quiet
    )
    assert kept.store.n == np.sum(found.coordinates[:, 0] > 1)
    assert "rotation" in kept.store.particles()
    few = select_particles(SelectOptions(source=found.out, out=tmp_path / "b.zarr", classes=(1,)), progress=tiny.quiet)
    classes = found.particles["class_number"]
    assert 0 < few.store.n == np.sum(classes == 1)
    means = [found.coordinates[classes == k, 0].mean() for k in (1, 2, 3)]
    assert means == sorted(means)


def test_the_same_bits_with_threads_and_after_the_driver_dies(
    moving: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_SMALLEST_SHARD", 30)
    short = {"iterations": 3, "components": 2}
    some = select(open_store(moving[1]), np.arange(150), tmp_path / "some.zarr").path
    given = (moving[0], some, moving[2])
    analyse(options(given, tmp_path / "one", **short), progress=tiny.quiet)
    analyse(options(given, tmp_path / "two", cluster="threads", workers=3, **short), progress=tiny.quiet)
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        analyse(options(given, tmp_path / "three", **short), progress=dying_at("iteration 5"))
    analyse(options(given, tmp_path / "three", resume=True, **short), progress=tiny.quiet)
    assert Run.open(tmp_path / "three").record["resumed"]
    assert digests(tmp_path / "three") == digests(tmp_path / "one")


def dying_at(words: str) -> Callable[..., None]:
    def progress(line: str, /, *, end: str = "\n") -> None:
        if line.startswith(words):
            raise KeyboardInterrupt

    return progress


def test_of_a_rigid_molecule_nothing_is_supported(tmp_path: Path) -> None:
    made = swinging.make(tmp_path / "rigid", 300, BOX, PIXEL_A, snr=1.0, range_deg=0.0, contrast_sd=0.2)
    store = tiny.imported(made.star, tmp_path / "rigid.zarr").path
    result = analyse(options((made, store, mask_of(tmp_path)), tmp_path / "out"), progress=tiny.quiet)
    assert not result.supported.any()


def test_a_bad_particle_is_left_out_and_no_other_changes_place(moving: Made, tmp_path: Path) -> None:
    columns = {"ctf_scale": np.ones(120)}
    columns["ctf_scale"][7] = 1e6
    store = select(open_store(moving[1]), np.arange(120), tmp_path / "some.zarr", columns).path
    result = analyse(
        options((moving[0], store, moving[2]), tmp_path / "out", iterations=1, components=1), progress=tiny.quiet
    )
    (left_out,) = Run.open(tmp_path / "out").record["quarantined"]
    assert left_out["row"] == 8 and "CTF reaches" in left_out["reason"]
    assert result.particles["image_index"].tolist() == [row for row in range(120) if row != 7]


def test_a_run_is_analysed_with_the_poses_that_it_left(moving: Made, tmp_path: Path) -> None:
    """From a run that has half of the particles of its store, in another order of its own."""
    store = select(open_store(moving[1]), np.arange(100)[::-1], tmp_path / "half.zarr").path
    first = analyse(
        options((moving[0], store, moving[2]), tmp_path / "first", iterations=1, components=1), progress=tiny.quiet
    )
    given = options((moving[0], tmp_path / "first", moving[2]), tmp_path / "second", iterations=1, components=1)
    second = analyse(given, progress=tiny.quiet)
    np.testing.assert_array_equal(second.particles["image_index"], first.particles["image_index"])
    np.testing.assert_allclose(second.particles["rotation"], first.particles["rotation"], atol=1e-6)
    # Finished, it is read back.
    again = analyse(given.model_copy(update={"resume": True}), progress=tiny.quiet)
    np.testing.assert_array_equal(again.coordinates, second.coordinates)


def test_what_cannot_be_analysed_is_refused(moving: Made, tmp_path: Path) -> None:
    made = tiny.simulated(tmp_path / "simulated", 20)
    unposed = tiny.imported(made.particles_star, tmp_path / "unposed.zarr").path
    with pytest.raises(InputError, match="no poses"):
        analyse(VariabilityOptions(source=unposed, out=tmp_path / "out"))
    with pytest.raises(InputError, match="three or more"):
        analyse(options(moving, tmp_path / "out", resolution_limit_A=200))
    with pytest.raises(ValueError, match="coarser than the resolution limit"):
        options(moving, tmp_path / "out", highpass_A=10)
    assert not (tmp_path / "out").exists()


def test_a_highpass_leaves_out_what_is_coarser(moving: Made, tmp_path: Path) -> None:
    some = select(open_store(moving[1]), np.arange(200), tmp_path / "some.zarr").path
    result = analyse(
        options((moving[0], some, moving[2]), tmp_path / "out", highpass_A=60, components=1), progress=tiny.quiet
    )
    power = np.abs(np.fft.fftn(result.components[0])) ** 2
    k = np.fft.fftfreq(BOX, 1 / BOX)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)
    assert power[radius < 3].sum() < 1e-6 * power.sum()
    assert result.mean.sum() > 0
