"""Signal subtraction against the images that a molecule without its outside would have made."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo import cli
from dcryo.data import mrc, star
from dcryo.data.curves import read_curves
from dcryo.data.particles import identities
from dcryo.data.run import Run
from dcryo.data.store import Store, open_store, select
from dcryo.errors import InputError
from dcryo.jobs import dataset
from dcryo.jobs import subtract as module
from dcryo.jobs.expand import ExpandOptions, expand
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.subtract import SubtractOptions, SubtractResult, subtract
from dcryo.kernels import fft, fsc, masks
from dcryo.kernels.filters import pad_or_crop
from dcryo.kernels.shells import volume_shells

BOX, PIXEL, COUNT = tiny.BOX_PX, tiny.PIXEL_SIZE_A, 320
CENTRE_PX = (4, -3, 2)


@dataclass(frozen=True)
class Given:
    """A run over particles with true poses; the truth; and the noise-free images of its outside and its inside."""

    run: Path
    store: Store
    truth: np.ndarray
    mask: Path
    outside: np.ndarray
    inside: np.ndarray


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("subtract")
    made = tiny.simulated(folder / "simulated", COUNT, snr=0.5)
    store = tiny.imported(made.truth_star, folder / "particles.zarr")
    run = folder / "run"
    reconstruct(ReconstructOptions(store=store.path, out=run, mask_diameter_A=130.0), progress=tiny.quiet)
    truth = mrc.read_map(made.truth_map).array
    kept = np.roll(masks.sphere(BOX, 9.0, 3.0), CENTRE_PX[::-1], axis=(0, 1, 2))
    mrc.write_map(folder / "kept.mrc", kept, PIXEL)
    outside, inside = (tiny.projections(store, truth * part) for part in (1 - kept, kept))
    return Given(run, store, truth, folder / "kept.mrc", outside, inside)


def made(given: Given, out: Path, **options: object) -> SubtractResult:
    return subtract(
        SubtractOptions(**({"source": given.run, "out": out, "mask": given.mask} | options)), progress=tiny.quiet
    )


@pytest.fixture(scope="module")
def result(given: Given, tmp_path_factory: pytest.TempPathFactory) -> SubtractResult:
    return made(given, tmp_path_factory.mktemp("subtract") / "out")


def slope(images: np.ndarray, of: np.ndarray) -> float:
    """How much of some noise-free images is in others."""
    return float(np.vdot(of, images) / np.vdot(of, of))


def correlation(images: np.ndarray, others: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(images, others, strict=True)]))


def test_what_is_left_has_the_inside_whole_and_nothing_of_the_outside(given: Given, result: SubtractResult) -> None:
    before, after = given.store.read(np.arange(COUNT)).images, result.store.read(np.arange(COUNT)).images
    outside, inside = alone(given)
    assert slope(before, outside) == pytest.approx(1, abs=0.05) and slope(before, inside) == pytest.approx(1, abs=0.1)
    # What the filter of the half maps keeps back of the outside is all that is left of it.
    assert 0 < unseen(given) < 0.12
    assert slope(after, outside) == pytest.approx(unseen(given), abs=0.02)
    assert slope(after, inside) == pytest.approx(1, abs=0.1)
    # Noise stays: nothing else was touched.
    noise = before - given.outside - given.inside
    assert correlation(after - given.inside, noise) > 0.97
    assert correlation(after, given.inside) > correlation(before, given.inside) + 0.02


def alone(given: Given) -> tuple[np.ndarray, np.ndarray]:
    """The parts of the images of the outside and of the inside that the other does not look like."""
    outside = given.outside - slope(given.outside, given.inside) * given.inside
    return outside, given.inside - slope(given.inside, given.outside) * given.outside


def unseen(given: Given) -> float:
    """How much of the images of the outside the FSC says that the half maps do not show."""
    curve = read_curves(given.run / "fsc.csv")["fsc_masked"]
    shells = volume_shells(BOX)
    gain = np.zeros(shells.max() + 1)
    last = int(fsc.crossing(curve, fsc.GOLD_STANDARD))
    gain[: last + 1] = curve[: last + 1]
    filtered = fft.irfftn(fft.rfftn(given.truth) * gain[shells].astype(np.float32), BOX)
    seen = tiny.projections(given.store, filtered * (1 - mrc.read_map(given.mask).array))
    return 1 - slope(seen, alone(given)[0])


def test_the_outside_is_taken_off_with_the_strength_that_it_has_in_each_image(given: Given, tmp_path: Path) -> None:
    strength = np.where(np.arange(COUNT) % 2, 1.3, 0.7)
    data = given.store.read(np.arange(COUNT)).images + (strength - 1)[:, None, None] * given.outside
    run = with_images(given, data, tmp_path)
    found = made(given, tmp_path / "out", source=run)
    amplitude = Run.open(found.out).latest_checkpoint()[1]["amplitude"]
    assert np.mean(amplitude[1::2]) - np.mean(amplitude[::2]) > 0.4
    after = found.store.read(np.arange(COUNT)).images
    for own in (strength > 1, strength < 1):
        # Shrunk towards their mean by as much as they are uncertain.
        assert abs(slope(after[own], alone(given)[0][own])) < 0.15


def test_an_inside_that_is_not_there_does_not_change_what_is_subtracted(given: Given, tmp_path: Path) -> None:
    empty = (
        given.store.read(np.arange(COUNT)).images - np.where(np.arange(COUNT) % 2, 1, 0)[:, None, None] * given.inside
    )
    run = with_images(given, empty, tmp_path)
    after = made(given, tmp_path / "out", source=run).store.read(np.arange(COUNT)).images
    for first in (0, 1):
        assert slope(after[first::2], alone(given)[0][first::2]) == pytest.approx(unseen(given), abs=0.03)


def with_images(given: Given, images: np.ndarray, folder: Path) -> Path:
    """A run with the same maps over the same particles with other images."""
    stack = folder / "other.mrcs"
    with mrc.StackWriter(stack, COUNT, BOX, PIXEL, "float32") as writer:
        writer.write(0, images)
    particles = given.store.particles()
    star.write_particles(folder / "other.star", particles.replace(image_path=np.full(COUNT, "other.mrcs")))
    store = tiny.imported(folder / "other.star", folder / "other.zarr")
    run = folder / "run"
    shutil.copytree(given.run, run)
    Run.start(run, "reconstruct", {}, [store.path], overwrite=True).done({})
    for file in given.run.iterdir():
        if file.suffix in (".mrc", ".csv"):
            shutil.copy(file, run)
    return run


def test_subtraction_commutes_with_a_new_centre_and_box(given: Given, tmp_path: Path) -> None:
    found = made(given, tmp_path / "out", recenter=True, box_px=20)
    assert found.centre_px == CENTRE_PX and found.store.box_px == 20
    # The inside alone, about its own centre, at the new poses, is what the new images show.
    kept = mrc.read_map(given.mask).array
    moved = pad_or_crop(np.roll(given.truth * kept, tuple(-x for x in CENTRE_PX[::-1]), axis=(0, 1, 2)), 20)
    expected = tiny.projections(found.store, moved)
    after = found.store.read(np.arange(COUNT)).images
    assert slope(after, expected) == pytest.approx(1, abs=0.1)
    assert np.abs(found.store.particles()["origin_A"]).max() <= PIXEL / 2 + 1e-9
    mask = mrc.read_map(found.out / "mask.mrc")
    assert mask.array.shape == (20,) * 3
    np.testing.assert_allclose(
        np.roll(kept, tuple(-x for x in CENTRE_PX[::-1]), (0, 1, 2))[6:26, 6:26, 6:26], mask.array
    )
    # And they make the map of the inside.
    again = reconstruct(
        ReconstructOptions(store=found.store.path, out=tmp_path / "map", mask=found.out / "mask.mrc"),
        progress=tiny.quiet,
    )
    curve = fsc.shell_correlation(again.map * mask.array, moved * mask.array)
    assert curve[1:8].min() > 0.9


def test_images_are_moved_without_a_mask(given: Given, tmp_path: Path) -> None:
    point_A = tuple(PIXEL * x for x in CENTRE_PX)
    found = made(given, tmp_path / "out", source=given.store.path, mask=None, recenter_at_A=point_A)
    moved = found.store.particles()["box_moved_px"]
    for row in (0, 5, 77):
        before = given.store.read([row]).images[0]
        np.testing.assert_allclose(
            found.store.read([row]).images[0], np.roll(before, tuple(-moved[row, ::-1]), axis=(0, 1)), atol=1e-5
        )
    # The same map, its centre elsewhere.
    options = {"mask_diameter_A": 180.0}
    first = mrc.read_map(given.run / "map.mrc").array
    second = reconstruct(
        ReconstructOptions(store=found.store.path, out=tmp_path / "map", **options), progress=tiny.quiet
    ).map
    assert fsc.shell_correlation(np.roll(second, CENTRE_PX[::-1], axis=(0, 1, 2)), first)[1:12].min() > 0.9
    assert fsc.shell_correlation(second, first)[1:12].min() < 0.5


def test_coordinates_follow_the_boxes(given: Given, tmp_path: Path) -> None:
    placed = select(
        given.store, np.arange(COUNT), tmp_path / "placed.zarr", {"coordinate_px": np.full((COUNT, 2), 100.0)}
    )
    found = made(
        given, tmp_path / "out", source=placed.path, mask=None, recenter_at_A=(30.0, 0.0, 0.0)
    ).store.particles()
    np.testing.assert_allclose(found["coordinate_px"], 100.0 + found["box_moved_px"])
    assert np.abs(found["box_moved_px"]).max() >= 5


@pytest.mark.parametrize("twice", [False, True])
def test_revert_gives_the_images_back_with_the_poses_as_they_are_now(given: Given, tmp_path: Path, twice: bool) -> None:
    found = made(given, tmp_path / "out", recenter=True, box_px=24)
    if twice:
        found = made(
            given, tmp_path / "out2", source=found.out / "particles.zarr", mask=None, recenter_at_A=(-12.0, 6.0, 6.0)
        )
    order = np.random.Generator(np.random.Philox(0)).permutation(COUNT)[:100]
    some = select(found.store, order, tmp_path / "some.zarr")
    back = made(given, tmp_path / "back", source=some.path, mask=None, revert=True)
    before, after = given.store.particles().take(order), back.store.particles()
    np.testing.assert_array_equal(back.store.read(np.arange(100)).images, given.store.read(order).images)
    np.testing.assert_allclose(after["rotation"], before["rotation"], atol=1e-12)
    np.testing.assert_allclose(after["origin_A"], before["origin_A"], atol=1e-9)
    np.testing.assert_array_equal(identities(after), identities(before))
    np.testing.assert_array_equal(after["half"], before["half"])


def test_a_turn_about_the_new_centre_turns_about_it_after_revert(given: Given, tmp_path: Path) -> None:
    found = made(given, tmp_path / "out", recenter=True)
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    rotation = found.store.particles()["rotation"]
    turned = select(found.store, np.arange(COUNT), tmp_path / "turned.zarr", {"rotation": rotation @ quarter})
    back = made(given, tmp_path / "back", source=turned.path, mask=None, revert=True).store.particles()
    before = given.store.particles()
    centre_A = PIXEL * np.array(CENTRE_PX)
    # The particle's point at the centre of the mask lies where it lay.
    places = [(-of["origin_A"] + (of["rotation"] @ centre_A)[:, :2]) for of in (before, back)]
    np.testing.assert_allclose(*places, atol=1e-6)


def test_expanded_particles_are_subtracted_each_in_its_own_pose(given: Given, tmp_path: Path) -> None:
    expanded = expand(
        ExpandOptions(source=given.store.path, out=tmp_path / "c2.zarr", symmetry="C2"), progress=tiny.quiet
    )
    few = select(expanded.store, np.arange(80), tmp_path / "few.zarr")
    found = made(given, tmp_path / "out", source=few.path, mask=None, recenter_at_A=(24.0, 0.0, 0.0))
    particles = found.store.particles()
    assert len(np.unique(identities(particles))) == 80
    assert (particles["half"].reshape(-1, 2) == particles["half"].reshape(-1, 2)[:, :1]).all()
    assert np.any(particles["box_moved_px"][::2] != particles["box_moved_px"][1::2])
    back = made(given, tmp_path / "back", source=found.store.path, mask=None, revert=True).store
    np.testing.assert_array_equal(back.read([0, 1]).images, given.store.read([0, 0]).images)
    np.testing.assert_allclose(back.particles()["origin_A"], few.particles()["origin_A"], atol=1e-9)


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "shard_size", lambda count: 50)


@pytest.mark.parametrize("where", [{"cluster": "synchronous"}, {"workers": 4}])
def test_the_same_bits_wherever_it_runs(given: Given, tmp_path: Path, where: dict, many_parts: None) -> None:
    kinds = [made(given, tmp_path / name, **options) for name, options in (("one", {"workers": 1}), ("two", where))]
    first, second = (tiny.digests(of.out, ("particles.star", "reference.mrc", "mask.mrc")) for of in kinds)
    assert first == second and kinds[0].store.fingerprint == kinds[1].store.fingerprint


def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    given: Given, tmp_path: Path, many_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(given, tmp_path / "whole")
    calls: list[str] = []
    before = module.make_part

    def dying(part, *rest):  # type: ignore[no-untyped-def]
        calls.append(part.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return before(part, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "make_part", dying)
        made(given, tmp_path / "killed", workers=1)
    left = sorted((tmp_path / "killed" / "parts").glob("*.npz"))
    assert 3 <= len(left) < 7
    left[0].write_bytes(left[0].read_bytes()[:100])  # as a full disk leaves it
    resumed = made(given, tmp_path / "killed", resume=True)
    assert resumed.store.fingerprint == whole.store.fingerprint
    assert not (tmp_path / "killed" / "parts").exists()
    assert made(given, tmp_path / "killed", resume=True).store.fingerprint == whole.store.fingerprint


def test_bad_images_are_left_out_with_a_reason(given: Given, tmp_path: Path, many_parts: None) -> None:
    scale = np.ones(COUNT)
    scale[[3, 60]] = 1e9
    spoilt = select(given.store, np.arange(COUNT), tmp_path / "spoilt.zarr", {"ctf_scale": scale})
    run = tmp_path / "run"
    Run.start(run, "reconstruct", {}, [spoilt.path]).done({})
    for file in given.run.iterdir():
        if file.suffix in (".mrc", ".csv"):
            shutil.copy(file, run)
    found = made(given, tmp_path / "out", source=run)
    assert (found.store.n, found.left_out) == (COUNT - 2, 2)
    assert [row["row"] for row in Run.open(found.out).record["quarantined"]] == [4, 61]
    assert "CTF reaches" in found.summary()
    kept = np.setdiff1d(np.arange(COUNT), [3, 60])
    np.testing.assert_array_equal(found.store.particles()["image_index"], given.store.particles()["image_index"][kept])


def test_what_reading_undoes_is_not_said_of_the_new_images(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "UNDONE_BY_READING", ("spherical_aberration_mm",))
    found = made(given, tmp_path / "out").store.particles()
    assert "spherical_aberration_mm" in given.store.particles().optics and "spherical_aberration_mm" not in found.optics


def test_what_cannot_be_done_is_refused(given: Given, store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"no half1\.mrc"):
        made(given, out, source=given.store.path)
    with pytest.raises(InputError, match="no poses"):
        made(given, out, source=store.path, mask=None, recenter_at_A=(0.0, 0.0, 5.0))
    with pytest.raises(InputError, match="at most that of the images, 32 px"):
        made(given, out, box_px=40)
    with pytest.raises(InputError, match="outside the box"):
        made(given, out, mask=None, recenter_at_A=(0.0, 0.0, 500.0))
    with pytest.raises(InputError, match="not of dcryo subtract"):
        made(given, out, source=given.store.path, mask=None, revert=True)
    mrc.write_map(tmp_path / "all.mrc", np.ones((BOX,) * 3, np.float32), PIXEL)
    with pytest.raises(InputError, match="nothing of the map outside"):
        made(given, out, mask=tmp_path / "all.mrc")
    for options in ({"mask": None}, {"mask": None, "recenter": True}, {"revert": True}):
        with pytest.raises(ValueError, match=r"nothing says|goes to the centre of a mask|goes without"):
            SubtractOptions(**({"source": given.run, "out": out, "mask": given.mask} | options))
    assert not out.exists()


def test_the_command(given: Given, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [
        "subtract",
        str(given.run),
        "--mask",
        str(given.mask),
        "--out",
        str(tmp_path / "out"),
        "--recenter",
        "--box",
        "24",
    ]
    assert cli.main(words) == 0
    assert "320 particles, box 24 px" in capsys.readouterr().out
    assert open_store(tmp_path / "out" / "particles.zarr").box_px == 24
    assert len(star.read_particles(tmp_path / "out" / "particles.star")) == COUNT
