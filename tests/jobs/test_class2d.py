"""2D classification of two molecules, from the store to the selection."""

import itertools
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
from dcryo.data.particles import identities
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
    # Runs of 32 neighbours, of which there are five in an epoch.
    assert set(images[:6]) == {32} and set(images[6:]) == {store.n}
    assert sum(images[:5]) == store.n
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


@pytest.fixture(scope="module")
def few_views(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, np.ndarray]:
    """Particles seen from within 20 degrees of one of four directions, and which that is."""
    folder = tmp_path_factory.mktemp("views")
    every = tiny.imported(tiny.simulated(folder / "simulated", 1500).truth_star, folder / "every.zarr")
    views = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-0.577, -0.577, -0.577]])
    near = every.particles()["rotation"][:, 2] @ views.T
    rows = np.flatnonzero(near.max(axis=1) > np.cos(np.deg2rad(20)))
    return select(every, rows, folder / "views.zarr", {}), near[rows].argmax(axis=1)


def test_where_views_are_distinct_any_seed_finds_them(few_views: tuple[Store, np.ndarray], tmp_path: Path) -> None:
    store, view = few_views
    sets = []
    for seed in range(3):
        result = classify(store.path, tmp_path / str(seed), classes=4, max_iterations=20, seed=seed)
        order = np.argsort(identities(store.particles()))
        number = np.empty(store.n, int)
        number[order] = result.particles["class_number"][np.argsort(identities(result.particles))] - 1
        sets.append(number)
    for one, other in [*itertools.combinations(sets, 2), *((one, view) for one in sets)]:
        alike = np.zeros((4, 4))
        np.add.at(alike, (one, other), 1)
        assert alike.max(axis=1).sum() > 0.95 * store.n and len(set(alike.argmax(axis=1))) == 4
