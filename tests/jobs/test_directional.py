"""The command that tells how resolution depends on direction, on particles with and without a preferred orientation."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from scipy.ndimage import uniform_filter1d

from dcryo import cli
from dcryo.data import mrc
from dcryo.data.curves import read_curves
from dcryo.jobs.directional import DirectionalOptions, directional_resolution
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels import directional, fft, fsc
from dcryo.kernels.symmetry import operators

BOX, PIXEL = 56, 2.0
FILES = ("directional.csv", "directions.csv", "fsc3d.mrc")


@pytest.fixture(scope="module", params=[0, 5], ids=["even", "preferred"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """A reconstruction from the true poses, with them beside it; the truth; and how strongly views prefer z."""
    folder = tmp_path_factory.mktemp("views")
    made = simulate(
        SimulateOptions(
            model="phantom", particles=1500, box_px=BOX, pixel_size_A=PIXEL, snr=0.06, preference=request.param, seed=4,
            out=folder / "simulated",
        ),
        progress=tiny.quiet,
    )  # fmt: skip
    store = tiny.imported(made.truth_star, folder / "particles.zarr")
    reconstruct(ReconstructOptions(store=store.path, out=folder / "run"), progress=tiny.quiet)
    (folder / "run" / "particles.star").write_bytes(made.truth_star.read_bytes())
    return folder / "run", made.truth_map, request.param


def test_a_preferred_orientation_is_called_out_and_its_even_twin_is_not(run, tmp_path: Path, capsys) -> None:
    path, _, preference = run
    assert cli.main(["directional", str(path), "--out", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "run.json").read_text())["result"]
    said = capsys.readouterr().out
    if preference:
        assert "Preferred orientation" in said and "Preferred orientation" in figures["verdict"]
        assert figures["area_ratio"] < 0.4 and figures["sampling_compensation"] < 0.6
        assert abs(figures["worst_direction"][2]) > 0.9
        assert figures["worst_direction_A"] > 2 * figures["best_direction_A"]
    else:
        assert "alike in all directions" in said
        assert figures["area_ratio"] > 0.6 and figures["sampling_compensation"] > 0.9
    table, places = (read_curves(tmp_path / "out" / name) for name in FILES[:2])
    assert len(places["z"]) == 384 and len(table["direction384"]) == BOX // 2 + 1
    volume = mrc.read_map(tmp_path / "out" / "fsc3d.mrc").array
    middle = BOX // 2
    along, across = volume[middle + 10, middle, middle], volume[middle, middle + 10, middle]
    assert (along < 0.6 * across) == bool(preference)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Resolution by direction" in page and "could not be shown" not in page.lower()


def test_curves_by_direction_are_those_to_the_truth(run) -> None:
    """FSC of the half maps, as C_ref, against that of their mean to the truth, cone by cone."""
    path, truth, preference = run
    first, second, mask = (mrc.read_map(path / f"{name}.mrc").array for name in ("half1", "half2", "mask"))
    directions = directional.unique_directions(2, operators("C1"))

    def conical(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        pair = fft.rfftn(one * mask), fft.rfftn(other * mask)
        return directional.conical_fsc(directional.cone_sums(*pair, directions))

    halves, to_truth = conical(first, second), conical((first + second) / 2, mrc.read_map(truth).array)
    height = np.abs(directions[:, 2])
    for low, high in ((0, 0.3), (0.3, 0.6), (0.6, 0.85), (0.85, 1)):
        there = (height >= low) & (height < high)
        half, true = (uniform_filter1d(curves[there].mean(axis=0), 3, mode="nearest") for curves in (halves, to_truth))
        known = half[: int(fsc.crossing(half, fsc.GOLD_STANDARD))]
        assert np.abs(np.sqrt(2 * known / (1 + known)) - true[: len(known)]).max() < 0.15
        assert fsc.crossing(half, fsc.GOLD_STANDARD) == pytest.approx(fsc.crossing(true, fsc.HALF), rel=0.1)
    if preference:
        ends = [fsc.crossing(curve, fsc.HALF) for curve in uniform_filter1d(to_truth, 3, axis=1, mode="nearest")]
        assert np.corrcoef(directional.resolutions(halves), ends)[0, 1] > 0.8


def test_the_same_bits_on_any_workers(run, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 3)):
        options = DirectionalOptions(source=run[0], out=tmp_path / name, workers=workers)
        directional_resolution(options, progress=tiny.quiet)
    assert tiny.digests(tmp_path / "a", FILES) == tiny.digests(tmp_path / "b", FILES)


def test_particles_without_poses_are_refused(run, tmp_path: Path, capsys) -> None:
    given = ["--particles", str(run[1].with_name("particles.star"))]
    assert cli.main(["directional", str(run[0]), *given, "--out", str(tmp_path / "out")]) == 2
    assert "have no poses" in capsys.readouterr().err


def test_symmetry_halves_the_directions(run, tmp_path: Path) -> None:
    options = DirectionalOptions(source=run[0], symmetry="C2", out=tmp_path / "out")
    assert len(directional_resolution(options, progress=tiny.quiet).directions) == pytest.approx(192, abs=20)
