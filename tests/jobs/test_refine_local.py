"""Refinements that start from the poses that particles came with: around them, and around their symmetry mates."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo.data import mrc, star
from dcryo.data.run import Run
from dcryo.data.store import Store, select
from dcryo.errors import InputError
from dcryo.euler import matrix_from_rotvec
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.refine import RefineOptions, RefineResult, refine
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.jobs.subtract import SubtractOptions, subtract
from dcryo.kernels import alignment, filters, fsc
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.phantom import phantom
from dcryo.kernels.rotations import angle_between_deg
from dcryo.kernels.symmetry import operators

DIAMETER_A = 130.0


def made(store: Path, out: Path, **options: object) -> RefineResult:
    given = {"mask_diameter_A": DIAMETER_A} | options
    return refine(RefineOptions(store=store, out=out, **given), progress=tiny.quiet)


def off_deg(result: RefineResult, poses: np.ndarray) -> np.ndarray:
    """Angles between the poses that a run found and others, of the same images."""
    return angle_between_deg(result.particles["rotation"], poses[result.particles["image_index"]])


def random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@pytest.fixture(scope="module")
def off(posed: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Particles with poses that are some degrees and Angstrom off the truth."""
    particles = posed.particles()
    turn = matrix_from_rotvec(np.deg2rad(4.0) * random(0).standard_normal((posed.n, 3)))
    moved = particles["origin_A"] + 3.0 * random(1).standard_normal((posed.n, 2))
    columns = {"rotation": turn @ particles["rotation"], "origin_A": moved}
    return select(posed, np.arange(posed.n), tmp_path_factory.mktemp("local") / "off.zarr", columns)


def test_poses_that_are_nearly_right_become_right_without_a_reference(off: Store, posed: Store, tmp_path: Path) -> None:
    result = made(off.path, tmp_path / "out", local=True, max_iterations=8)
    truth = posed.particles()["rotation"]
    before = np.median(angle_between_deg(off.particles()["rotation"], truth))
    assert before > 5 and np.median(off_deg(result, truth)) < 0.5 * before
    assert [row["searched_everywhere"] for row in Run.open(result.out).record["iterations"]] == [0] * result.iterations


def test_the_prior_decides_how_far_poses_go_from_where_they_were_however_long_it_takes(
    off: Store, reference: Path, tmp_path: Path
) -> None:
    given = off.particles()
    went = []
    for name, widths in (("tight", (0.1, 0.2)), ("wide", (6.0, 6.0))):
        options = {"angle_sd_deg": widths[0], "shift_sd_A": widths[1], "reference": reference, "max_iterations": 5}
        result = made(off.path, tmp_path / name, local=True, **options)
        moved = np.linalg.norm(
            result.particles["origin_A"] - given["origin_A"][result.particles["image_index"]], axis=1
        )
        went.append((np.median(off_deg(result, given["rotation"])), np.median(moved)))
    assert went[0][0] < 0.2 and went[0][1] < 1
    assert went[1][0] > 4 and went[1][1] > 2


@dataclass(frozen=True)
class Odd:
    """Particles of a C4 molecule of which one subunit is not whole, posed as if all were; and the truth."""

    store: Store
    rotation: np.ndarray
    map: np.ndarray
    whole: Path


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Odd:
    folder = tmp_path_factory.mktemp("relax")
    group, box, pixel, count = operators("C4"), tiny.BOX_PX, tiny.PIXEL_SIZE_A, 300
    atoms = phantom(group, 62.0, seed=1)
    amplitude = atoms.amplitude.copy()
    amplitude[: int(0.5 * len(amplitude) / 4)] = 0
    for name, strength in (("odd", amplitude), ("whole", atoms.amplitude)):
        density = gaussian_density(atoms.position_A, strength, atoms.bfactor_A2, box, pixel)
        mrc.write_map(folder / f"{name}.mrc", density, pixel)
    options = SimulateOptions(model=str(folder / "odd.mrc"), out=folder / "made", particles=count, snr=0.4, seed=5)
    simulated = simulate(options, progress=tiny.quiet)
    store = tiny.imported(simulated.truth_star, folder / "truth.zarr")
    truth = store.particles()["rotation"]
    mates = random(3).integers(0, 4, count)
    posed = select(store, np.arange(count), folder / "posed.zarr", {"rotation": truth @ group[mates]})
    return Odd(posed, truth, mrc.read_map(simulated.truth_map).array, folder / "whole.mrc")


def mates_found(result: RefineResult, odd: Odd) -> np.ndarray:
    """Which mate of its true pose each particle was given, (n,)."""
    truth = odd.rotation[result.particles["image_index"]]
    group = operators("C4")
    return angle_between_deg(result.particles["rotation"][:, None], truth[:, None] @ group).argmin(axis=1)


@pytest.fixture(scope="module")
def relaxed(odd: Odd, tmp_path_factory: pytest.TempPathFactory) -> RefineResult:
    return made(odd.store.path, tmp_path_factory.mktemp("relax") / "out", relax="C4", mask_diameter_A=150.0)


def test_a_relaxed_symmetry_finds_which_subunit_is_odd(odd: Odd, relaxed: RefineResult) -> None:
    found = mates_found(relaxed, odd)
    counts = np.bincount(found, minlength=4)
    assert counts.max() > 0.9 * len(found)
    # The same subunit in both halves.
    halves = relaxed.particles["half"]
    assert len({np.bincount(found[halves == half]).argmax() for half in (1, 2)}) == 1


def test_the_relaxed_map_shows_the_odd_subunit(odd: Odd, relaxed: RefineResult) -> None:
    group, nowhere = operators("C4"), np.zeros(3)

    def difference(volume: np.ndarray) -> np.ndarray:
        return alignment.turned_sum(volume, group[:1], nowhere) - alignment.turned_sum(volume, group, nowhere) / 4

    mate = np.bincount(mates_found(relaxed, odd)).argmax()
    wanted = difference(alignment.turned_sum(odd.map, group[mate : mate + 1].transpose(0, 2, 1), nowhere))
    curves = [
        fsc.shell_correlation(difference(volume), wanted)[2:10].mean()
        for volume in (relaxed.map, alignment.turned_sum(relaxed.map, group[1:2], nowhere))
    ]
    assert curves[0] > 0.7 and curves[1] < 0.3


def test_poses_without_their_mates_leave_the_map_symmetric(odd: Odd, tmp_path: Path) -> None:
    result = made(odd.store.path, tmp_path / "out", local=True, symmetry="C1", mask_diameter_A=150.0, max_iterations=3)
    assert np.bincount(mates_found(result, odd), minlength=4).max() < 0.4 * odd.store.n


def test_a_whole_map_is_a_reference_too(odd: Odd, tmp_path: Path) -> None:
    options = {"relax": "C4", "reference": odd.whole, "initial_lowpass_A": 20.0, "mask_diameter_A": 150.0}
    result = made(odd.store.path, tmp_path / "out", **options)
    assert np.bincount(mates_found(result, odd), minlength=4).max() > 0.85 * odd.store.n


@pytest.mark.parametrize("options", [{"local": True}, {"relax": "C4"}], ids=["local", "relax"])
def test_the_same_bits_on_any_number_of_workers_and_after_an_interruption(
    odd: Odd, tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = select(odd.store, np.arange(80), tmp_path / "some.zarr")
    options = options | {"max_iterations": 3, "mask_diameter_A": 150.0}
    made(some.path, tmp_path / "one", cluster="synchronous", **options)
    expected = tiny.digests(tmp_path / "one")
    made(some.path, tmp_path / "four", workers=4, **options)
    assert tiny.digests(tmp_path / "four") == expected
    save, calls = Run.save_checkpoint, []

    def interrupted(*given: object) -> None:
        save(*given)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save_checkpoint", interrupted)
        made(some.path, tmp_path / "killed", **options)
    made(some.path, tmp_path / "killed", resume=True, **options)
    assert tiny.digests(tmp_path / "killed") == expected


def test_a_domain_that_moves_is_seen_better_by_itself(tmp_path: Path) -> None:
    box, pixel, count = tiny.BOX_PX, tiny.PIXEL_SIZE_A, 300
    atoms = phantom(operators("C1"), 62.0, seed=4)
    moves = atoms.position_A[:, 2] > 8.0
    centre_px = np.round(atoms.position_A[moves].mean(axis=0) / pixel)

    def density(some: np.ndarray, about_A: np.ndarray) -> np.ndarray:
        place = atoms.position_A[some] - about_A
        return gaussian_density(place, atoms.amplitude[some], atoms.bfactor_A2[some], box, pixel)

    rest, domain = density(~moves, np.zeros(3)), density(moves, centre_px * pixel)
    made_of = tiny.simulated(tmp_path / "made", count, seed=6)
    posed = tiny.imported(made_of.truth_star, tmp_path / "posed.zarr")
    particles = posed.particles()
    turns = matrix_from_rotvec(np.deg2rad(7.0) * random(2).standard_normal((count, 3)))
    columns = {
        "rotation": particles["rotation"] @ turns,
        "origin_A": particles["origin_A"] - (particles["rotation"] @ (centre_px * pixel))[:, :2],
    }
    there = select(posed, np.arange(count), tmp_path / "there.zarr", columns)
    signal = tiny.projections(posed, rest) + tiny.projections(there, domain)
    images = 2 * signal / signal.std() + random(7).standard_normal(signal.shape).astype(np.float32)
    with mrc.StackWriter(tmp_path / "moving.mrcs", count, box, pixel, "float32") as writer:
        writer.write(0, images.astype(np.float32))
    table = star.read_particles(made_of.truth_star).replace(image_path=np.full(count, "moving.mrcs"))
    star.write_particles(tmp_path / "moving.star", table)
    store = tiny.imported(tmp_path / "moving.star", tmp_path / "moving.zarr")
    consensus = reconstruct(
        ReconstructOptions(store=store.path, out=tmp_path / "consensus", mask_diameter_A=150.0), progress=tiny.quiet
    )
    smooth = filters.lowpass(domain, pixel, 20.0)
    mask = np.clip(smooth / (0.15 * smooth.max()), 0, 1)
    mrc.write_map(tmp_path / "kept.mrc", np.roll(mask, tuple(int(x) for x in centre_px[::-1]), axis=(0, 1, 2)), pixel)
    alone = subtract(
        SubtractOptions(
            source=consensus.out,
            mask=tmp_path / "kept.mrc",
            recenter_at_A=tuple(centre_px * pixel),
            out=tmp_path / "alone",
        ),
        progress=tiny.quiet,
    ).store
    local = made(
        alone.path,
        tmp_path / "local",
        local=True,
        angle_sd_deg=7.0,
        shift_sd_A=3.0,
        mask_diameter_A=110.0,
        max_iterations=6,
    )
    before = np.roll(consensus.map, tuple(-int(x) for x in centre_px[::-1]), axis=(0, 1, 2))
    curves = [fsc.shell_correlation(volume * mask, domain * mask)[4:16].mean() for volume in (before, local.map)]
    assert curves[1] > curves[0] + 0.03
    # The poses become those of the domain.
    off_before = np.median(angle_between_deg(particles["rotation"], columns["rotation"]))
    assert np.median(off_deg(local, columns["rotation"])) < 0.6 * off_before


def test_what_does_not_go_together_is_refused(store: Store, posed: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="dcryo expand RUN"):
        made(store.path, out, local=True)
    for options, reason in (
        ({}, "starts from a reference"),
        ({"relax": "C4", "angle_sd_deg": 2.0}, "give local too"),
        ({"relax": "C4", "symmetry": "C2"}, "give one of relax and symmetry"),
        ({"local": True, "shift_range_A": 5.0}, "search everywhere"),
    ):
        with pytest.raises(ValueError, match=reason):
            RefineOptions(store=posed.path, out=out, **options)
    with pytest.raises(InputError, match="X3"):
        made(posed.path, out, relax="X3")
    assert not out.exists()
