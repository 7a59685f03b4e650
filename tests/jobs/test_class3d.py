"""3D classification: particles of two molecules sorted, classes that are one told, the laws kept."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo.data import mrc, star
from dcryo.data.run import Run
from dcryo.data.store import Store, open_store, select
from dcryo.errors import InputError
from dcryo.jobs.class3d import Class3dOptions, class3d
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.select import SelectOptions, select_particles
from dcryo.report import write_report

PARTICLES, SHARE = 480, 0.3


@dataclass(frozen=True)
class Mixture:
    """A store of particles with poses, the class of each (n,), 1 or 2, in the order of the store, and both maps."""

    store: Store
    number: np.ndarray
    maps: tuple[Path, Path]

    def right(self, found: np.ndarray) -> float:
        """Part of the particles that are where most of their class are."""
        table = np.bincount((found - 1) * 2 + self.number - 1, minlength=2 * int(found.max())).reshape(-1, 2)
        return float(table.max(axis=1).sum() / len(found))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Two phantoms, without symmetry and with, in the same poses: 70 to 30."""
    folder = tmp_path_factory.mktemp("mixture")
    made = [tiny.simulated(folder / name, PARTICLES, symmetry=name, snr=0.5) for name in ("C1", "C2")]
    number = 1 + (np.random.default_rng(1).random(PARTICLES) < SHARE).astype(int)
    images = [mrc.open_stack(one.particles_star.parent / "particles.mrcs").read(np.arange(PARTICLES)) for one in made]
    (folder / "mixed").mkdir()
    with mrc.StackWriter(folder / "mixed/particles.mrcs", PARTICLES, tiny.BOX_PX, tiny.PIXEL_SIZE_A, "float32") as file:
        file.write(0, np.where((number == 1)[:, None, None], *images))
    star.write_particles(folder / "mixed/particles.star", star.read_particles(made[0].truth_star), None)
    store = tiny.imported(folder / "mixed/particles.star", folder / "mixed.zarr")
    return Mixture(store, number[store.particles()["image_index"]], (made[0].truth_map, made[1].truth_map))


def options(store: Path, out: Path, **more: object) -> Class3dOptions:
    given: dict = {"classes": 2, "resolution_limit_A": 14.0, "iterations": 20}
    return Class3dOptions(store=store, out=out, **(given | more))


@pytest.fixture(scope="module")
def found(mixture: Mixture, tmp_path_factory: pytest.TempPathFactory):
    """They sorted into two classes, their poses kept, without a reference."""
    return class3d(options(mixture.store.path, tmp_path_factory.mktemp("found") / "out"), progress=tiny.quiet)


FILES = ("class1.mrc", "class2.mrc", "class1_half1.mrc", "class2_half2.mrc", "mask.mrc", "fsc.csv", "particles.star")


def test_two_molecules_are_told_apart(mixture: Mixture, found) -> None:
    assert mixture.right(found.particles["class_number"]) > 0.95
    assert found.share == pytest.approx(np.bincount(mixture.number)[1:] / PARTICLES, abs=0.05)
    assert found.copies == (0, 0)
    record = Run.open(found.out).record
    assert record["result"]["reproduced"][1] > 0.3
    truths = [mrc.read_map(path).array.ravel() for path in mixture.maps]
    for volume, truth, other in zip(found.maps, truths, truths[::-1], strict=True):
        like, unlike = (np.corrcoef(volume.ravel(), one)[0, 1] for one in (truth, other))
        assert like > 0.8 and like > unlike + 0.05
    flow = np.array(record["iterations"][-1]["flow"])
    assert flow.sum() == PARTICLES and flow.sum(axis=0) == pytest.approx(
        np.bincount(found.particles["class_number"])[1:][np.argsort(record["result"]["order"])]
    )


def test_a_class_too_many_is_a_copy_or_empty(mixture: Mixture, tmp_path: Path) -> None:
    result = class3d(options(mixture.store.path, tmp_path / "out", classes=3), progress=tiny.quiet)
    assert mixture.right(result.particles["class_number"]) > 0.95
    superfluous = [k for k in range(3) if result.copies[k] or result.share[k] == 0]
    assert len(superfluous) == 1
    words = result.summary()
    assert "a copy of class" in words or result.share[superfluous[0]] == 0


@pytest.mark.parametrize("poses", ["local", "global"])
def test_poses_are_searched_with_the_class(mixture: Mixture, tmp_path: Path, poses: str) -> None:
    more = {"reference": mixture.maps} if poses == "global" else {}
    few = select(mixture.store, np.arange(240), tmp_path / "few.zarr")
    result = class3d(options(few.path, tmp_path / "out", poses=poses, iterations=8, **more), progress=tiny.quiet)
    own = Mixture(few, mixture.number[:240], mixture.maps)
    assert own.right(result.particles["class_number"]) > 0.93


def test_one_map_is_enough_where_nothing_is_known(mixture: Mixture, tmp_path: Path) -> None:
    """Perturbed, for as many classes as are asked for; poses everywhere."""
    unknown = options(mixture.store.path, tmp_path / "out", poses="global", reference=mixture.maps[:1], iterations=12)
    result = class3d(unknown, progress=tiny.quiet)
    assert mixture.right(result.particles["class_number"]) > 0.85


def test_under_a_focus_classes_differ_there_alone(mixture: Mixture, tmp_path: Path) -> None:
    box = tiny.BOX_PX
    x = np.arange(box) - box // 2
    focus = np.broadcast_to((x > 0).astype(np.float32), (box,) * 3)
    mrc.write_map(tmp_path / "focus.mrc", np.ascontiguousarray(focus), tiny.PIXEL_SIZE_A)
    given = options(mixture.store.path, tmp_path / "out", focus=tmp_path / "focus.mrc", iterations=14)
    seen: list[np.ndarray] = []
    result = class3d(given, progress=tiny.quiet)
    seen = [volume for volume in result.maps]
    apart = np.abs(seen[0] - seen[1])
    # The last maps are of the particles alone; what sorted them differed inside only.
    assert mixture.right(result.particles["class_number"]) > 0.85 and apart.max() > 0
    mask = mrc.read_map(tmp_path / "out/mask.mrc").array
    assert mask[:, :, : box // 2].max() == 0 and mask.max() > 0.9


def test_the_same_bits_wherever_it_runs(mixture: Mixture, tmp_path: Path) -> None:
    few = select(mixture.store, np.arange(200), tmp_path / "few.zarr")
    for name, where in (
        ("one", {"cluster": "synchronous"}),
        ("two", {"workers": 3}),
        ("three", {"cluster": "processes", "workers": 2}),
    ):
        class3d(options(few.path, tmp_path / name, iterations=3, **where), progress=tiny.quiet)
    first = tiny.digests(tmp_path / "one", FILES)
    assert tiny.digests(tmp_path / "two", FILES) == first and tiny.digests(tmp_path / "three", FILES) == first
    class3d(options(few.path, tmp_path / "seed", iterations=3, seed=1), progress=tiny.quiet)
    assert tiny.digests(tmp_path / "seed", FILES) != first


def test_a_killed_run_goes_on_to_the_same_bits(mixture: Mixture, tmp_path: Path) -> None:
    few = select(mixture.store, np.arange(200), tmp_path / "few.zarr")
    class3d(options(few.path, tmp_path / "whole", iterations=3), progress=tiny.quiet)
    out = tmp_path / "out"
    words = f"class3d {few.path} --classes 2 --resolution-limit 14 --iterations 3 --out {out} --resume".split()
    for dies_at in (("dcryo.steps.expectation", "fold", 7), ("dcryo.data.mrc", "write_map", 2)):
        process = tiny.started(tiny.command, words, {}, dies_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    result = class3d(options(few.path, out, iterations=3, resume=True), progress=tiny.quiet)
    assert tiny.digests(out, FILES) == tiny.digests(tmp_path / "whole", FILES)
    again = class3d(options(few.path, out, iterations=3, resume=True), progress=tiny.quiet)
    np.testing.assert_array_equal(again.maps, result.maps)
    assert again.copies == result.copies and again.share == pytest.approx(result.share)


def test_a_bad_particle_is_left_out(mixture: Mixture, tmp_path: Path) -> None:
    few = select(
        mixture.store, np.arange(200), tmp_path / "few.zarr", {"ctf_scale": np.where(np.arange(200) == 17, np.inf, 1.0)}
    )
    result = class3d(options(few.path, tmp_path / "out", iterations=3), progress=tiny.quiet)
    rows = Run.open(tmp_path / "out").record["quarantined"]
    assert len(rows) == 1 and "CTF" in rows[0]["reason"] and len(result.particles) == 199
    assert np.isfinite(result.maps).all()


def test_a_class_goes_on_to_other_jobs(mixture: Mixture, found, tmp_path: Path) -> None:
    """As a selection with its poses and halves, and the run itself as a store."""
    kept = select_particles(
        SelectOptions(source=found.out, out=tmp_path / "kept.zarr", classes=(2,)), progress=tiny.quiet
    )
    particles = open_store(kept.store.path).particles()
    assert (
        np.mean(mixture.number[np.isin(mixture.store.particles()["image_index"], particles["image_index"])] == 2) > 0.9
    )
    assert "rotation" in particles and set(particles["half"]) == {1, 2}
    made = reconstruct(ReconstructOptions(store=found.out, out=tmp_path / "all"), progress=tiny.quiet)
    assert np.isfinite(made.map).all()
    assert Run.open(tmp_path / "all").record["result"]["particles"] == PARTICLES


def test_the_page_shows_classes(found) -> None:
    page = write_report(found.out).read_text()
    for words in ("3D classification", "Surfaces of the classes", "Flow between classes", "Differences", "Confidence"):
        assert words in page
    assert "could not be made" not in page


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"classes": None}, "how many classes"),
        ({"classes": 3, "reference": ("a", "b")}, "2 references for 3 classes"),
    ],
)
def test_options_that_contradict(more: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        options(tmp_path / "store.zarr", tmp_path / "out", **more)


def test_bad_input_is_refused_before_work_starts(store: Store, mixture: Mixture, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for where, more, words in (
        (store.path, {"poses": "local"}, "no poses"),
        (store.path, {}, "needs a --reference"),
        (mixture.store.path, {"classes": 50}, "at least 10 for each of 50 classes"),
    ):
        with pytest.raises(InputError, match=words):
            class3d(options(where, out, **more), progress=tiny.quiet)
    assert not out.exists()


def test_the_record_tells_each_iteration(found) -> None:
    rows = json.loads((found.out / "run.json").read_text())["iterations"]
    assert [row["halves"] for row in rows][-2:] == ["apart", "apart"]
    assert all(abs(sum(row["share"]) - 1) < 1e-3 for row in rows)
