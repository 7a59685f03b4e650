"""First models from the images alone, from the store to the reference of a refinement."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import zarr

from dcryo.data import mrc, star
from dcryo.data.classes import CLASSES, TABLE, ClassTable, write_class_table
from dcryo.data.run import Run
from dcryo.data.store import Store, open_store, select
from dcryo.errors import InputError
from dcryo.jobs.abinitio import AbinitioOptions, AbinitioResult, abinitio
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.simulate import SimulateResult
from dcryo.kernels import alignment, fft, fsc, masks, slices
from dcryo.kernels.randomness import generator
from dcryo.kernels.rotations import angular_distance_deg, random_rotations
from dcryo.kernels.shells import half_plane, unpack
from dcryo.kernels.symmetry import operators

WRITTEN = ("class1.mrc", "fsc.csv", "particles.star")
DIAMETER_A = 125.0


def models(store: Path, out: Path, **changes: object) -> AbinitioResult:
    given = {"mask_diameter_A": DIAMETER_A, "starts": 2, "iterations": 20, "resolution_limit_A": 16.0} | changes
    return abinitio(AbinitioOptions(store=store, out=out, **given), progress=tiny.quiet)


def agreement_with(truth: Path, volume: np.ndarray, shell: int) -> tuple[alignment.Alignment, np.ndarray]:
    """How a model goes onto the truth, and their FSC there."""
    known = mrc.read_map(truth).array
    move = alignment.align(volume, known, shell, hands=True)
    mask = masks.sphere(len(known), DIAMETER_A / tiny.PIXEL_SIZE_A, 3)
    return move, fsc.shell_correlation(alignment.moved(volume, move) * mask, known * mask)


@pytest.fixture(scope="module")
def made(store: Store, tmp_path_factory: pytest.TempPathFactory) -> AbinitioResult:
    return models(store.path, tmp_path_factory.mktemp("abinitio") / "run")


def test_what_is_written(made: AbinitioResult, store: Store) -> None:
    record = Run.open(made.out).record
    result = record["result"]
    assert record["status"] == "done" and result["classes"] == 1 and result["starts"] == 2
    assert result["agreeing"] == [0, 1] or result["agreeing"] == [1, 0]
    assert min(result["evidence_of_starts"]) > 1.2 * result["evidence_of_blob"] > 0
    particles = star.read_particles(made.out / "particles.star")
    assert len(particles) == store.n and (particles["class_number"] == 1).all()
    assert ((particles["max_probability"] > 0) & (particles["max_probability"] <= 1 + 1e-6)).all()
    written = mrc.read_map(made.out / "class1.mrc")
    assert written.array.shape == (store.box_px,) * 3 and written.voxel_size_A == pytest.approx(store.pixel_size_A)
    np.testing.assert_array_equal(written.array, made.maps[0])
    # Both starts are plotted, and the page says what to think of them.
    assert len(record["iterations"][0]["log_evidence"]) == 2 and len(record["iterations"]) == 22


def test_the_model_is_the_molecule(made: AbinitioResult, simulated: SimulateResult) -> None:
    _, curve = agreement_with(simulated.truth_map, made.maps[0], 8)
    assert curve[1:9].min() > 0.5  # 24 A


def test_poses_are_those_of_the_model(made: AbinitioResult, simulated: SimulateResult) -> None:
    """Once the model is brought onto the truth, the poses are the true ones."""
    move, _ = agreement_with(simulated.truth_map, made.maps[0], 8)
    found, truth = star.read_particles(made.out / "particles.star"), star.read_particles(simulated.truth_star)
    row = np.argsort(truth["image_index"])[found["image_index"]]
    rotation, origin_px = alignment.moved_poses(found["rotation"], found["origin_A"] / tiny.PIXEL_SIZE_A, move)
    off = angular_distance_deg(rotation, truth["rotation"][row], operators("C1"))
    assert np.median(off) < 10
    assert np.median(np.linalg.norm(origin_px * tiny.PIXEL_SIZE_A - truth["origin_A"][row], axis=1)) < 5


def test_refinement_succeeds_from_it(made: AbinitioResult, store: Store, tmp_path: Path) -> None:
    options = RefineOptions(
        store=store.path, reference=made.out / "class1.mrc", out=tmp_path / "refined", mask_diameter_A=DIAMETER_A
    )
    assert refine(options, progress=tiny.quiet).resolution_A < 15


@pytest.mark.parametrize(("kind", "workers"), [("threads", 3), ("processes", 2)])
def test_same_bits_wherever_it_runs(
    made: AbinitioResult, store: Store, tmp_path: Path, kind: str, workers: int | None
) -> None:
    other = models(store.path, tmp_path / "run", cluster=kind, workers=workers)
    assert tiny.digests(other.out, WRITTEN) == tiny.digests(made.out, WRITTEN)


def test_a_killed_run_goes_on_to_the_same_bits(made: AbinitioResult, store: Store, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [sys.executable, "-m", "dcryo", "abinitio", str(store.path), "--out", str(out), "--starts", "2"]
    words += ["--mask-diameter", str(DIAMETER_A), "--iterations", "20", "--resolution-limit", "16"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = out / "checkpoints"
    while process.poll() is None and not (checkpoints.is_dir() and any(checkpoints.glob("0*"))):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert Run.open(out).record["status"] == "running"
    resumed = models(store.path, out, resume=True)
    assert tiny.digests(resumed.out, WRITTEN) == tiny.digests(made.out, WRITTEN)
    # And one that is done is read back.
    again = models(store.path, out, resume=True)
    np.testing.assert_array_equal(again.maps, made.maps)
    assert again.summary() == resumed.summary()


def test_bad_images_are_left_out_and_the_rest_goes_on(store: Store, tmp_path: Path) -> None:
    bad = tmp_path / "bad.zarr"
    shutil.copytree(store.path, bad)
    images = zarr.open_array(bad / "images", mode="r+")
    images[5] = np.nan
    result = models(bad, tmp_path / "run", starts=1, iterations=10)
    assert len(result.particles) == store.n - 1
    assert len(Run.open(result.out).record["quarantined"]) == 1
    assert np.isfinite(result.maps).all()


def test_a_selection_goes_straight_on(store: Store, tmp_path: Path) -> None:
    """The rows of a selection are the particles; no image is copied."""
    some = select(store, np.arange(0, store.n, 2), tmp_path / "some.zarr")
    result = models(some.path, tmp_path / "run", starts=1, iterations=10)
    assert len(result.particles) == store.n // 2
    size = sum(file.stat().st_size for file in some.path.rglob("*") if file.is_file())
    assert size < 0.2 * store.n * store.box_px**2 * 2


def test_two_molecules_are_told_apart(store: Store, simulated: SimulateResult, tmp_path: Path) -> None:
    other = tiny.simulated(tmp_path / "other", 100, symmetry="D3", seed=5)
    stacks = [mrc.open_stack(made.particles_star.parent / "particles.mrcs") for made in (simulated, other)]
    images = np.concatenate([stack.read(np.arange(stack.n)) for stack in stacks])
    one, two = (star.read_particles(made.particles_star) for made in (simulated, other))
    columns = {name: np.concatenate([one[name], two[name]]) for name in one.columns}
    columns["image_index"] = np.arange(len(images))
    with mrc.StackWriter(tmp_path / "particles.mrcs", len(images), tiny.BOX_PX, tiny.PIXEL_SIZE_A, "float32") as writer:
        writer.write(0, images)
    star.write_particles(tmp_path / "particles.star", replace(one, columns=columns), None)
    both = tiny.imported(tmp_path / "particles.star", tmp_path / "both.zarr")
    result = models(both.path, tmp_path / "run", classes=2, starts=1, iterations=20)
    molecule = result.particles["image_index"] >= len(one)
    right = np.mean((result.particles["class_number"] == 2) == molecule)
    assert max(right, 1 - right) > 0.9
    np.testing.assert_allclose(result.share.sum(), 1, atol=1e-3)
    assert result.share[0] >= result.share[1] > 0.2


@pytest.fixture(scope="module")
def averages(simulated: SimulateResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of class2d, as far as its averages: projections of the truth, hardly noisy."""
    run = tmp_path_factory.mktemp("abinitio") / "classes"
    run.mkdir()
    random = generator(1, "averages", 0)
    count, pixels = 24, half_plane(tiny.BOX_PX // 2 - 1)
    prepared = slices.prepare(mrc.read_map(simulated.truth_map).array, pixels.shell_max)
    transforms = slices.extract(prepared, random_rotations(count, random), pixels, tiny.BOX_PX)
    images = fft.irfft2(unpack(pixels, transforms, tiny.BOX_PX), tiny.BOX_PX)
    images += 0.2 * images.std() * random.normal(size=images.shape).astype(np.float32)
    with mrc.StackWriter(run / CLASSES, count, tiny.BOX_PX, tiny.PIXEL_SIZE_A, "float32") as writer:
        writer.write(0, images)
    ones = np.ones(count)
    write_class_table(
        run / TABLE, ClassTable(np.full(count, 10), 20 * ones, ones, ones, ones, ones, np.full(count, "", dtype=object))
    )
    return run


def test_common_lines_make_a_model_too(store: Store, averages: Path, simulated: SimulateResult, tmp_path: Path) -> None:
    """Class averages give a model by another way, alone or as one more start to compare."""
    alone = models(store.path, tmp_path / "lines", method="commonlines", averages=averages, starts=1)
    assert alone.starts == 1
    _, curve = agreement_with(simulated.truth_map, alone.maps[0], 8)
    assert curve[1:8].min() > 0.5
    both = models(store.path, tmp_path / "both", averages=averages)
    assert both.starts == 3 and both.agreeing >= 2
    assert len(Run.open(both.out).record["result"]["resolution_between_A"]) == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"symmetry": "Q7"}, "symmetry"),
        ({"classes": 20}, "at least 10 for each"),
        ({"mask_diameter_A": 900.0}, "mask-diameter"),
        ({"resolution_limit_A": 5.0}, "resolution-limit"),
        ({"method": "commonlines"}, "averages"),
        ({"averages": Path("nowhere"), "classes": 2}, "one model"),
    ],
)
def test_what_cannot_be_done_is_refused(store: Store, tmp_path: Path, changes: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        models(store.path, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_store_is_not_changed(made: AbinitioResult, store: Store) -> None:
    assert "rotation" not in open_store(store.path).particles()
