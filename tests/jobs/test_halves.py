"""The halves never meet but in the FSC: whatever becomes of half 2, nothing of half 1 moves by a bit.

In a refinement the FSC sets the prior and what the next iteration uses, so the law is held where it can hold: through
one iteration as it is, and through all of them where the FSC is given.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo.data import mrc, star
from dcryo.data.curves import read_curves
from dcryo.data.run import Run
from dcryo.data.store import Store, select
from dcryo.jobs import dataset
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.simulate import SimulateResult
from dcryo.steps import maximisation
from dcryo.steps.maximisation import HalfFsc

Images = np.ndarray
COUNT = 80
SHELLS = tiny.BOX_PX // 2 + 1


@pytest.fixture(autouse=True)
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_SMALLEST_SHARD", 16)


def permuted(images: Images) -> Images:
    return np.random.Generator(np.random.Philox(key=1)).permutation(images)


def noise(images: Images) -> Images:
    return 3 * np.random.Generator(np.random.Philox(key=2)).standard_normal(images.shape, np.float32)


def bad(images: Images) -> Images:
    images = images.copy()
    images[5, 3, 3] = np.nan
    images[9] = 7.0
    return images


CHANGES = pytest.mark.parametrize("change", [permuted, noise, bad])


@pytest.fixture
def changed_store(simulated: SimulateResult, tmp_path: Path) -> Callable[[Callable[[Images], Images]], Store]:
    """The store of the shared particles with another half 2."""

    def make(change: Callable[[Images], Images]) -> Store:
        folder = tmp_path / "changed"
        particles = star.read_particles(simulated.truth_star).take(np.arange(COUNT))
        images = mrc.open_stack(simulated.truth_star.with_name("particles.mrcs")).read(np.arange(COUNT))
        second = particles["half"] == 2
        images[second] = change(images[second])
        folder.mkdir()
        # The writer refuses what is not finite, so such a stack is made by hand.
        with mrc.StackWriter(folder / "particles.mrcs", len(images), tiny.BOX_PX, tiny.PIXEL_SIZE_A) as writer:
            writer.write(0, np.zeros_like(images))
        with (folder / "particles.mrcs").open("r+b") as file:
            file.seek(mrc.HEADER_BYTES)
            file.write(images.tobytes())
        star.write_particles(folder / "particles.star", particles)
        return tiny.imported(folder / "particles.star", tmp_path / "changed.zarr", dtype="float32")

    return make


@pytest.fixture(scope="module")
def exact(simulated: SimulateResult, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The first of `posed`, in float32 like the changed stores."""
    folder = tmp_path_factory.mktemp("halves")
    whole = tiny.imported(simulated.truth_star, folder / "exact.zarr", dtype="float32")
    return select(whole, np.arange(COUNT), folder / "first.zarr")


def rows_of_half(run: Path, half: int) -> list[str]:
    """Rows of particles.star that are of a half, as written."""
    lines = (run / "particles.star").read_text().splitlines()
    table = lines[lines.index("data_particles") :]
    labels = [line.split()[0] for line in table if line.startswith("_")]
    column = labels.index("_rlnRandomSubset")
    rows = [line for line in table if "@" in line]
    return [row for row in rows if row.split()[column] == str(half)]


def same(one: Path, other: Path, half: int) -> dict[str, bool]:
    """What of a half is the same to the bit in two refinements."""
    column = f"noise_half{half}"
    spectra = [read_curves(run / "spectra.csv")[column] for run in (one, other)]
    name = f"half{half}.mrc"
    return {
        "map": (one / name).read_bytes() == (other / name).read_bytes(),
        "particles": rows_of_half(one, half) == rows_of_half(other, half),
        "noise": np.array_equal(*spectra),
    }


ALL = {"map": True, "particles": True, "noise": True}


def differ(one: Path, other: Path, half: int) -> bool:
    found = same(one, other, half)
    return not found["map"] and not found["particles"]


@CHANGES
def test_reconstruct(exact: Store, changed_store, tmp_path: Path, change) -> None:
    for name, store in (("one", exact), ("other", changed_store(change))):
        reconstruct(ReconstructOptions(store=store.path, out=tmp_path / name), progress=tiny.quiet)
    first, second, merged = (
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in tiny.MAPS
    )
    assert (first, second, merged) == (True, False, False)


def options(store: Store, reference: Path, out: Path, iterations: int) -> RefineOptions:
    return RefineOptions(
        store=store.path, reference=reference, out=out, mask_diameter_A=120.0, max_iterations=iterations
    )


@CHANGES
def test_one_iteration(exact: Store, changed_store, reference: Path, tmp_path: Path, change) -> None:
    for name, store in (("one", exact), ("other", changed_store(change))):
        refine(options(store, reference, tmp_path / name, 1), progress=tiny.quiet)
        assert len(Run.open(tmp_path / name).record["iterations"]) == 1
    assert same(tmp_path / "one", tmp_path / "other", 1) == ALL
    assert differ(tmp_path / "one", tmp_path / "other", 2)


@pytest.mark.parametrize("change", [permuted, pytest.param(bad, marks=pytest.mark.slow)])
def test_all_iterations_with_a_given_fsc(
    exact: Store, changed_store, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change
) -> None:
    """Three iterations, the later ones from poses, noise spectra, norms and scales of their own."""
    curve = np.linspace(1.0, 0.0, SHELLS)
    fscs: list[HalfFsc] = []

    def given(first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> HalfFsc:
        fscs.append(half_fsc(first, second, mask))
        return HalfFsc(curve, curve)

    half_fsc = maximisation.half_fsc
    monkeypatch.setattr(maximisation, "half_fsc", given)
    for name, store in (("one", exact), ("other", changed_store(change))):
        refine(options(store, reference, tmp_path / name, 3), progress=tiny.quiet)
    # The FSC that would have been used is another one: it is the only thing that both halves are in.
    assert len(fscs) == 6 and not np.array_equal(fscs[0].masked, fscs[3].masked)
    assert same(tmp_path / "one", tmp_path / "other", 1) == ALL
    assert differ(tmp_path / "one", tmp_path / "other", 2)
    states = [Run.open(tmp_path / name).latest_checkpoint() for name in ("one", "other")]
    for array in ("references", "noise_power"):
        first, second = (state[1][array] for state in states)
        assert np.array_equal(first[0], second[0]) and not np.array_equal(first[1], second[1])


def test_the_fsc_is_all_that_a_half_gets_of_the_other(
    exact: Store, changed_store, reference: Path, tmp_path: Path
) -> None:
    """So that the test above does not hold what is not there: in a run as it is, half 1 does change."""
    for name, store in (("one", exact), ("other", changed_store(noise))):
        refine(options(store, reference, tmp_path / name, 2), progress=tiny.quiet)
    assert differ(tmp_path / "one", tmp_path / "other", 1)


def test_rows_of_one_image_stay_in_one_half(simulated: SimulateResult, tmp_path: Path) -> None:
    """Particles that share an image share its noise, which two halves would take for signal."""
    particles = star.read_particles(simulated.particles_star).take(np.arange(160) % 40)
    source = simulated.particles_star.with_name("repeated.star")
    star.write_particles(source, particles)
    store = tiny.imported(source, tmp_path / "store.zarr")
    halves = [dataset.load_dataset(store.path, seed).halves for seed in range(3)]
    for of_seed in halves:
        assert np.array_equal(of_seed, of_seed[np.arange(160) % 40])
        assert np.bincount(of_seed).tolist() == [0, 80, 80]
    assert not np.array_equal(halves[0], halves[1])


def test_the_split_depends_on_the_seed_and_the_number_of_particles_alone(store: Store) -> None:
    found = dataset.load_dataset(store.path, 0).halves
    renamed = store.particles().replace(image_path=np.array([f"stack{row % 7}.mrcs" for row in range(store.n)]))
    assert np.array_equal(dataset._halves(renamed, 0, store.path), found)
    assert np.bincount(found).tolist() == [0, 80, 80]
