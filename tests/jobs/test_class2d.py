"""2D classification of two molecules, from the store to the selection."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo.data import mrc, star
from dcryo.data.run import Run
from dcryo.data.store import Store, open_store, select
from dcryo.errors import InputError
from dcryo.jobs import class2d as job
from dcryo.jobs.class2d import Class2dOptions, class2d
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.select import SelectOptions, select_particles
from dcryo.kernels import rings
from dcryo.kernels.masks import circle
from dcryo.steps import classification

WRITTEN = ("classes.mrcs", "classes.star", "particles.star")


def classify(store: Path, out: Path, **changes: object) -> job.Class2dResult:
    given = {"classes": 3, "mask_diameter_A": 180.0, "max_iterations": 8, "resolution_limit_A": 10.0} | changes
    return class2d(Class2dOptions(store=store, out=out, **given), progress=tiny.quiet)


@pytest.fixture(scope="module")
def made(store: Store, tmp_path_factory: pytest.TempPathFactory) -> job.Class2dResult:
    return classify(store.path, tmp_path_factory.mktemp("class2d") / "run")


def test_what_is_written(made: job.Class2dResult, store: Store) -> None:
    record = Run.open(made.out).record
    assert record["status"] == "done" and record["result"]["classes"] == 3
    particles = star.read_particles(made.out / "particles.star")
    assert len(particles) == store.n
    counts = np.bincount(particles["class_number"], minlength=4)[1:]
    assert counts.tolist() == made.table.particles.tolist() == sorted(counts, reverse=True)
    assert counts.sum() == store.n
    assert ((particles["max_probability"] > 0) & (particles["max_probability"] <= 1)).all()
    stack = mrc.open_stack(made.out / "classes.mrcs")
    assert (stack.n, stack.shape) == (3, (store.box_px,) * 2)
    np.testing.assert_array_equal(stack.read(np.arange(3)), made.images)
    np.testing.assert_allclose(particles["rotation"][:, 2, 2], 1)
    # Figures of each iteration are there to be plotted.
    assert {"resolution_A", "changed", "mean_log_evidence", "seconds"} <= record["iterations"][-1].keys()


def test_class_averages_are_the_images_put_on_top_of_each_other(made: job.Class2dResult, store: Store) -> None:
    """Turned and moved as particles.star says, images of a class agree with its average."""
    particles = star.read_particles(made.out / "particles.star")
    box = store.box_px
    images = store.read(np.arange(store.n)).images
    of = rings.rings(box, 6, box)
    psi = np.arctan2(particles["rotation"][:, 0, 1], particles["rotation"][:, 0, 0])
    origin = particles["origin_A"] / store.pixel_size_A
    agreement = []
    for number in range(3):
        own = np.flatnonzero(particles["class_number"] == number + 1)
        moved = rings.sample(images[own], of) * classification.phases(of, origin[own])
        series = rings.series(moved.astype(np.complex64), of, of.orders)
        turned = series * np.exp(-1j * np.outer(np.arange(of.orders + 1), psi[own]))[:, :, None]
        average = rings.images_of(rings.samples(turned.astype(np.complex64), of).mean(axis=1)[:, None], of)[0]
        inside = circle(box, 180 / store.pixel_size_A, 0) > 0
        agreement.append(np.corrcoef(average[inside], made.images[number][inside])[0, 1])
    # The phases of the CTF are not undone here, so that the agreement is that of low frequencies.
    assert np.median(agreement) > 0.6


@pytest.mark.parametrize(("kind", "workers"), [("synchronous", None), ("threads", 3), ("processes", 2)])
def test_same_bits_wherever_it_runs(
    made: job.Class2dResult, store: Store, tmp_path: Path, kind: str, workers: int | None
) -> None:
    classify(store.path, tmp_path / "out", cluster=kind, workers=workers)
    assert tiny.digests(tmp_path / "out", WRITTEN) == tiny.digests(made.out, WRITTEN)


def test_a_killed_run_goes_on_to_the_same_bits(made: job.Class2dResult, store: Store, tmp_path: Path) -> None:
    words = [
        "class2d", str(store.path), "--out", str(tmp_path / "out"), "--classes", "3", "--mask-diameter", "180",
        "--max-iterations", "8", "--resolution-limit", "10", "--resume",
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "dcryo", *words], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list((tmp_path / "out" / "checkpoints").glob("*"))) < 2 and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = Run.open(tmp_path / "out").record
    classify(store.path, tmp_path / "out", resume=True)
    assert before["status"] == "done" or Run.open(tmp_path / "out").record["resumed"]
    assert tiny.digests(tmp_path / "out", WRITTEN) == tiny.digests(made.out, WRITTEN)
    # A run that is done is read back.
    again = classify(store.path, tmp_path / "out", resume=True)
    np.testing.assert_array_equal(again.images, made.images)
    assert again.table.rank.tolist() == pytest.approx(made.table.rank.tolist(), abs=1e-5)


def test_mini_batches_come_before_iterations_over_all(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_PER_CLASS", 10)
    monkeypatch.setattr(job, "_MINI_ITERATIONS", 6)
    result = classify(store.path, tmp_path / "out", max_iterations=4)
    images = [row["images"] for row in Run.open(result.out).record["iterations"]]
    # Runs of 64 neighbours, of which the last has 32.
    assert set(images[:6]) <= {32, 64} and set(images[6:]) == {store.n}
    assert sum(images[:3]) == sum(images[3:6]) == store.n
    assert classify(store.path, tmp_path / "other", max_iterations=2, mini_batch=False)
    assert {row["images"] for row in Run.open(tmp_path / "other").record["iterations"]} == {store.n}


def test_bad_images_are_left_out_and_the_rest_goes_on(store: Store, tmp_path: Path) -> None:
    particles = store.particles()
    scale = np.ones(store.n)
    scale[[5, 17]] = 1e9
    bad = select(store, np.arange(store.n), tmp_path / "bad.zarr", {"ctf_scale": scale})
    result = classify(bad.path, tmp_path / "out", max_iterations=2)
    assert len(result.particles) == store.n - 2
    rows = Run.open(result.out).record["quarantined"]
    assert [row["row"] for row in rows] == [6, 18] and "CTF reaches" in rows[0]["reason"]
    assert particles["image_index"][5] not in result.particles["image_index"]


def test_a_selection_goes_straight_on(made: job.Class2dResult, store: Store, reference: Path, tmp_path: Path) -> None:
    chosen = select_particles(SelectOptions(source=made.out, out=tmp_path / "good.zarr", classes=(1, 2)))
    assert chosen.store.n == int(made.table.particles[:2].sum())
    assert not list((tmp_path / "good.zarr").rglob("images"))
    refined = refine(
        RefineOptions(store=tmp_path / "good.zarr", reference=reference, out=tmp_path / "refined", max_iterations=1),
        progress=tiny.quiet,
    )
    assert len(refined.particles) == open_store(tmp_path / "good.zarr").n


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"classes": 161}, "the store has 160 particles"),
        ({"mask_diameter_A": 1.0}, "--mask-diameter 1 A: expected more than"),
        ({"mask_diameter_A": 1e4}, "at most the box"),
    ],
)
def test_what_cannot_be_done_is_refused(store: Store, tmp_path: Path, changes: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        classify(store.path, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_dead_class_shares_the_largest() -> None:
    images = np.zeros((3, 8, 8), np.float32)
    halves = tuple(np.stack([np.full((8, 8), 10.0 * half + k) for k in range(3)]) for half in (1, 2))
    averages = job.Averages(images, images, halves, np.zeros((3, 5)))
    made = job._Made(averages, np.array([0.89, 0.1, 0.01]), None, None)
    found, share = job.revived(made)
    assert share.tolist() == pytest.approx([0.445, 0.1, 0.445])
    assert (found[0] == 10).all() and (found[2] == 20).all() and (found[1] == 0).all()
    # Where no class is larger than its share, none is divided.
    even = job._Made(averages, np.array([0.4, 0.59, 0.01]), None, None)
    assert job.revived(even)[1].tolist() == [0.4, 0.59, 0.01]


def test_classes_move_to_the_middle() -> None:
    box = 32
    y, x = np.mgrid[:box, :box] - box // 2
    blob = np.exp(-((x - 3.0) ** 2 + (y + 2.0) ** 2) / 8).astype(np.float32)
    images = blob[None]
    for _ in range(6):
        images = job.centred(images)
    weight = np.clip(images[0], 0, None)
    assert abs((weight * x).sum() / weight.sum()) < 0.2 and abs((weight * y).sum() / weight.sum()) < 0.2
