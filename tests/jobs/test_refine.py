"""Refinement of a small simulated set against its truth, and all that a run leaves behind."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import mrcfile
import numpy as np
import pytest
import starfile
import tiny

from dcryo import cli
from dcryo.data import mrc, star
from dcryo.data.curves import read_curves
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.data.store import Store
from dcryo.errors import InputError, RunError
from dcryo.jobs import dataset
from dcryo.jobs import refine as refine_module
from dcryo.jobs.refine import RefineOptions, RefineResult, refine
from dcryo.jobs.simulate import SimulateResult
from dcryo.kernels import fft, filters, fsc, rotations
from dcryo.kernels.shells import resolution_A, volume_shells
from dcryo.kernels.symmetry import operators

BOX, PIXEL = tiny.BOX_PX, 4.0
START_A = 40.0
SNR = 0.2


@dataclass(frozen=True)
class Refined:
    """A refinement from the truth low-passed at 40 A, and that truth."""

    simulated: SimulateResult
    store: Store
    result: RefineResult
    symmetry: str

    @property
    def out(self) -> Path:
        return self.result.out

    @property
    def truth(self) -> np.ndarray:
        return mrc.read_map(self.simulated.truth_map).array

    @property
    def mask(self) -> np.ndarray:
        return mrc.read_map(self.out / "mask.mrc").array

    def against_truth(self, volume: np.ndarray) -> np.ndarray:
        return fsc.shell_correlation(volume * self.mask, self.truth * self.mask)

    def angle_errors_deg(self) -> np.ndarray:
        known = star.read_particles(self.simulated.truth_star)["rotation"]
        found = star.read_particles(self.out / "particles.star")["rotation"]
        return rotations.angular_distance_deg(found, known, operators(self.symmetry))


def make(folder: Path, particles: int, symmetry: str, iterations: int, snr: float = SNR) -> Refined:
    simulated = tiny.simulated(folder / "simulated", particles, pixel_size_A=PIXEL, snr=snr, symmetry=symmetry)
    # A column that dcryo does not know, and the truth's half sets.
    known = star.read_particles(simulated.truth_star)
    blank = star.read_particles(simulated.particles_star)
    extra = {"rlnFoo": np.array([f"a{row}" for row in range(particles)])}
    particles_star = simulated.particles_star.with_name("halves.star")
    star.write_particles(
        particles_star, Particles(blank.columns | {"half": known["half"]}, blank.optics, extra, blank.optics_extra)
    )
    store = tiny.imported(particles_star, folder / "particles.zarr")
    options = RefineOptions(
        store=store.path, reference=simulated.truth_map, out=folder / "refined", symmetry=symmetry,
        mask_diameter_A=0.66 * BOX * PIXEL, max_iterations=iterations, initial_lowpass_A=START_A,
    )  # fmt: skip
    return Refined(simulated, store, refine(options, progress=tiny.quiet), symmetry)


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Refined:
    return make(tmp_path_factory.mktemp("refine"), 200, "C1", 4)


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory: pytest.TempPathFactory) -> Refined:
    return make(tmp_path_factory.mktemp("refine"), 140, "D2", 5)


@pytest.mark.parametrize("name", ["refined", "symmetric"])
def test_what_the_half_maps_claim_is_true(name: str, request: pytest.FixtureRequest) -> None:
    run: Refined = request.getfixturevalue(name)
    curve = run.against_truth(run.result.map)
    reached_A = fsc.resolution_at(curve, fsc.HALF, BOX, PIXEL)
    assert run.result.resolution_A < 11 < START_A
    assert reached_A == pytest.approx(run.result.resolution_A, rel=0.15)
    start = filters.lowpass(run.truth, PIXEL, START_A)
    assert fsc.resolution_at(run.against_truth(start), fsc.HALF, BOX, PIXEL) > 3 * reached_A


@pytest.mark.parametrize(("name", "median_deg"), [("refined", 16.0), ("symmetric", 20.0)])
def test_poses_are_found(name: str, median_deg: float, request: pytest.FixtureRequest) -> None:
    run: Refined = request.getfixturevalue(name)
    # Of random poses the median is 126 degrees without symmetry and 75 with D2.
    assert np.median(run.angle_errors_deg()) < median_deg
    known, found = star.read_particles(run.simulated.truth_star), star.read_particles(run.out / "particles.star")
    assert found["image_index"].tolist() == known["image_index"].tolist()
    offset = np.linalg.norm(found["origin_A"] - known["origin_A"], axis=1)
    assert np.median(offset) < 0.6 * np.median(np.linalg.norm(known["origin_A"], axis=1))


def test_the_map_is_on_the_grey_scale_of_the_images(refined: Refined) -> None:
    truth, shells = fft.rfftn(refined.truth * refined.mask), volume_shells(BOX)
    for volume in (*refined.result.half_maps, refined.result.map):
        found = fft.rfftn(volume * refined.mask)
        for shell in (1, 2, 3, 4):
            of_shell = shells == shell
            ratio = np.vdot(truth[of_shell], found[of_shell]).real / np.sum(np.abs(truth[of_shell]) ** 2)
            assert 0.75 < ratio < 1.2


def test_a_symmetric_map_is_symmetric(symmetric: Refined) -> None:
    """Two-folds along z and x; about the box centre they are flips and a roll by one."""
    for volume in (*symmetric.result.half_maps, symmetric.result.map):
        for axes in ((1, 2), (0, 1)):
            turned = np.roll(np.flip(volume, axes), (1, 1), axes)
            inner = slice(2, -2)
            difference = (turned - volume)[inner, inner, inner]
            assert np.abs(difference).max() < 0.02 * np.abs(volume).max()


def test_maps_are_the_results_and_half_maps_are_as_they_are(refined: Refined) -> None:
    arrays = (*refined.result.half_maps, refined.result.map)
    for name, array in zip(tiny.MAPS, arrays, strict=True):
        with mrcfile.open(refined.out / name) as file:
            assert file.is_volume() and file.data.dtype == np.float32
            assert file.voxel_size.x == pytest.approx(PIXEL)
            np.testing.assert_array_equal(file.data, array)
    # Neither masked nor filtered: noise out to the corners, power up to Nyquist.
    corner = refined.mask == 0
    for half in refined.result.half_maps:
        power = fsc.shell_power(half)
        assert half[corner].std() > 0.1 * half[~corner].std()
        assert power[BOX // 2] > 0.05 * power[BOX // 4]
    mask = refined.mask
    assert mask.min() == 0 and mask.max() == 1
    assert 0.4 < np.cbrt(mask.sum() / 4.19) / (0.66 * BOX) < 0.65


def test_the_fsc_is_that_of_the_maps_that_are_written(refined: Refined) -> None:
    first, second = (mrc.read_map(refined.out / name).array for name in tiny.MAPS[:2])
    table = read_curves(refined.out / "fsc.csv")
    assert list(table) == ["shell", "resolution_A", "frequency_1_A", "fsc_unmasked", "fsc_masked"]
    mask = refined.mask
    np.testing.assert_allclose(table["fsc_unmasked"], fsc.shell_correlation(first, second), atol=1e-6)
    np.testing.assert_allclose(table["fsc_masked"], fsc.shell_correlation(first * mask, second * mask), atol=1e-6)
    np.testing.assert_allclose(table["frequency_1_A"], np.arange(BOX // 2 + 1) / (BOX * PIXEL), atol=1e-7)
    np.testing.assert_allclose(table["resolution_A"][1:] * table["frequency_1_A"][1:], 1, atol=1e-4)
    root = ElementTree.parse(refined.out / "fsc.xml").getroot()
    points = [[float(point.find(axis).text) for axis in "xy"] for point in root.iter("coordinate")]
    np.testing.assert_allclose(points, np.stack([table["frequency_1_A"], table["fsc_masked"]], axis=1), atol=1e-6)
    crossed = fsc.resolution_at(table["fsc_masked"], fsc.GOLD_STANDARD, BOX, PIXEL)
    assert refined.result.resolution_A == pytest.approx(crossed, rel=1e-6)


def test_the_noise_spectra_are_those_of_the_noise(refined: Refined, tmp_path: Path) -> None:
    """The noise is known: what is left of the images without the signal, which the same seed makes again."""
    clean = tiny.simulated(tmp_path / "clean", 200, pixel_size_A=PIXEL, snr=np.inf)
    images, signal = (
        mrc.open_stack(made.particles_star.with_name("particles.mrcs")).read(np.arange(200))
        for made in (refined.simulated, clean)
    )
    noise = images - np.sqrt(SNR).astype(np.float32) * signal
    assert noise.var() == pytest.approx(1, rel=0.01)
    transform = np.fft.fft2(noise)
    frequency = np.fft.fftfreq(BOX, 1 / BOX)
    shells = np.rint(np.hypot(frequency[:, None], frequency)).astype(int)
    power = np.bincount(shells.ravel(), np.mean(np.abs(transform) ** 2, axis=0).ravel()) / np.bincount(shells.ravel())
    found = read_curves(refined.out / "spectra.csv")
    assert list(found) == ["shell", "resolution_A", "frequency_1_A", "noise_half1", "noise_half2", "signal"]
    for half in ("noise_half1", "noise_half2"):
        np.testing.assert_allclose(found[half][2 : BOX // 2], power[2 : BOX // 2], rtol=0.2)
    assert (found["signal"][2:6] > found["signal"][12:].max()).all()


def test_particles_are_a_table_that_others_read(refined: Refined) -> None:
    table = starfile.read(refined.out / "particles.star")
    particles, optics = table["particles"], table["optics"]
    assert len(particles) == 200 and len(optics) == 1
    assert optics.rlnImagePixelSize.iloc[0] == PIXEL and optics.rlnImageSize.iloc[0] == BOX
    wanted = {
        "rlnImageName", "rlnMicrographName", "rlnOpticsGroup", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle",
        "rlnCtfScalefactor", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst",
        "rlnRandomSubset", "rlnClassNumber", "rlnNormCorrection", "rlnLogLikeliContribution",
        "rlnMaxValueProbDistribution", "rlnNrOfSignificantSamples", "rlnFoo",
    }  # fmt: skip
    assert set(particles.columns) == wanted
    assert np.isfinite(particles.select_dtypes("number").to_numpy()).all()
    assert particles.rlnFoo.tolist() == [f"a{row}" for row in range(200)]
    assert (particles.rlnClassNumber == 1).all()
    known = star.read_particles(refined.simulated.truth_star)
    assert particles.rlnRandomSubset.tolist() == known["half"].tolist()
    assert particles.rlnMaxValueProbDistribution.between(0, 1).all()
    assert (particles.rlnNrOfSignificantSamples >= 1).all()
    for half in (1, 2):
        of_half = particles[particles.rlnRandomSubset == half]
        assert of_half.rlnCtfScalefactor.mean() == pytest.approx(1)
        assert np.mean(of_half.rlnNormCorrection**2) == pytest.approx(1)


def test_the_record_tells_each_iteration_and_the_result(refined: Refined) -> None:
    record = json.loads((refined.out / "run.json").read_text())
    assert (record["job"], record["status"], record["seed"], record["error"]) == ("refine", "done", 0, None)
    assert [row["path"] for row in record["inputs"]] == [str(refined.store.path), str(refined.simulated.truth_map)]
    assert refined.store.fingerprint in record["inputs"][0]["digest"]
    assert record["options"]["mask_diameter_A"] == pytest.approx(84.48)
    assert [row["iteration"] for row in record["iterations"]] == list(range(1, refined.result.iterations + 1))
    for row in record["iterations"]:
        assert set(row) == {
            "iteration", "resolution_A", "shell_max", "angular_sd_deg", "searched_everywhere",
            "median_rotation_change_deg", "median_shift_change_px", "mean_max_probability", "mean_significant_poses",
            "seconds",
        }  # fmt: skip
        assert 0 <= row["searched_everywhere"] <= 1 and None not in row.values()
    first, last = record["iterations"][0], record["iterations"][-1]
    assert first["resolution_A"] > last["resolution_A"]
    assert first["shell_max"] == round(BOX * PIXEL / START_A)
    assert first["median_rotation_change_deg"] > 60 > 30 > last["median_rotation_change_deg"]
    result = record["result"]
    assert result["resolution_A"] == refined.result.resolution_A < result["resolution_half_A"]
    assert (result["particles"], result["box_px"], result["pixel_size_A"]) == (200, BOX, PIXEL)
    assert (result["symmetry"], result["mask_diameter_A"]) == ("C1", pytest.approx(84.48))
    assert record["quarantined"] == []
    assert f"{refined.result.resolution_A:.2f} A" in refined.result.summary()


def words(run: Refined, out: Path, *more: object) -> list[str]:
    given = ["refine", run.store.path, "--reference", run.simulated.truth_map, "--out", out]
    return [str(word) for word in (*given, *more)]


def test_a_finished_run_that_is_resumed_is_read_back(refined: Refined, capsys, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(refined.out, out)
    same = ["--mask-diameter", 0.66 * BOX * PIXEL, "--max-iterations", 4]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert cli.main(words(refined, out, *same, "--resume", "--cluster", "processes")) == 0
    assert capsys.readouterr().out.strip().startswith(refined.result.summary().replace(str(refined.out), str(out)))
    # The page is written where there is none; all else stays.
    assert {path: path.read_bytes() for path in out.rglob("*") if path in before} == before
    assert cli.main(words(refined, out, *same)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main(words(refined, out, "--mask-diameter", 80, "--max-iterations", 4, "--resume")) == 2
    assert "option mask_diameter_A is 84.48 there, 80.0 now" in capsys.readouterr().err
    options = RefineOptions(**json.loads((out / "run.json").read_text())["options"] | {"out": out, "resume": True})
    again = refine(options, progress=tiny.quiet)
    assert again.resolution_A == refined.result.resolution_A and again.iterations == refined.result.iterations
    for one, other in zip(again.half_maps, refined.result.half_maps, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(again.fsc.masked, refined.result.fsc.masked, atol=1e-7)
    np.testing.assert_allclose(again.particles["origin_A"], refined.result.particles["origin_A"], atol=1e-5)


def test_overwriting_leaves_nothing_of_the_run_before(few: Store, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refine(options(few, reference, out, max_iterations=2), progress=tiny.quiet)
    (out / "fsc_truth.csv").write_text("of the run before")
    (out / "notes.txt").write_text("mine")
    before = tiny.digests(out)
    words = ["refine", few.path, "--reference", reference, "--out", out, "--max-iterations", 1, "--overwrite"]
    assert cli.main([str(word) for word in words]) == 0
    assert not (out / "fsc_truth.csv").exists() and not (out / "checkpoints").exists()
    assert (out / "notes.txt").read_text() == "mine"
    record = Run.open(out).record
    assert len(record["iterations"]) == 1 and record["resumed"] == []
    assert tiny.digests(out)["half1.mrc"] != before["half1.mrc"]
    files = {path.name for path in out.iterdir()}
    assert files == {*tiny.REFINED, "run.json", "report.html", "notes.txt"}


def options(store: Store, reference: Path, out: Path, **more: object) -> RefineOptions:
    given = {"mask_diameter_A": 120.0, "max_iterations": 1} | more
    return RefineOptions(store=store.path, reference=reference, out=out, **given)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_failed_goes_on(
    few: Store, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """The error is in the record, nothing is half written, and the run ends with the bits of one that did not fail.

    Also where the last checkpoint was damaged on the disk.
    """
    whole = options(few, reference, tmp_path / "whole", max_iterations=2)
    refine(whole, progress=tiny.quiet)

    def full(*_: object) -> float:
        raise RunError("the disk is full")

    broken = whole.model_copy(update={"out": tmp_path / "broken"})
    with monkeypatch.context() as patch, pytest.raises(RunError, match="full"):
        patch.setattr(refine_module, "write_maps", full)
        refine(broken, progress=tiny.quiet)
    record = Run.open(broken.out).record
    assert (record["status"], record["error"]) == ("failed", "the disk is full")
    assert {path.name for path in broken.out.iterdir()} == {"run.json", "checkpoints"}
    with pytest.raises(InputError, match="--resume"):
        refine(broken, progress=tiny.quiet)
    if damaged:
        with (broken.out / "checkpoints" / "000001" / "references.npy").open("r+b") as file:
            file.seek(5000)
            file.write(b"damage")
    refine(broken.model_copy(update={"resume": True}), progress=tiny.quiet)
    assert tiny.digests(broken.out) == tiny.digests(whole.out)
    assert len(Run.open(broken.out).record["iterations"]) == 2


def test_the_grey_scale_of_the_reference_does_not_matter(few: Store, reference: Path, tmp_path: Path) -> None:
    """Nor does a constant added to it: half maps of one iteration, in which poses are found against it."""
    array = mrc.read_map(reference).array
    maps = []
    for number, factor in enumerate((1.0, 1e4, 1e-5)):
        mrc.write_map(tmp_path / "reference.mrc", factor * array, tiny.PIXEL_SIZE_A)
        given = options(few, tmp_path / "reference.mrc", tmp_path / f"out{number}")
        maps.append(refine(given, progress=tiny.quiet).half_maps[0])
    for other in maps[1:]:
        assert np.corrcoef(maps[0].ravel(), other.ravel())[0, 1] > 0.999


@pytest.mark.parametrize(("box_px", "pixel_size_A"), [(48, 4.0), (32, 8.0), (26, 7.3), (49, 5.0), (31, 6.0), (40, 6.0)])
def test_a_reference_of_another_box_and_pixel_size(
    few: Store, reference: Path, tmp_path: Path, box_px: int, pixel_size_A: float
) -> None:
    known = mrc.read_map(reference).array
    smooth = filters.lowpass(known, tiny.PIXEL_SIZE_A, 25.0)
    scaled = filters.pad_or_crop(filters.resample_volume(smooth, tiny.PIXEL_SIZE_A / pixel_size_A), box_px)
    path = tmp_path / "reference.mrc"
    mrc.write_map(path, scaled, pixel_size_A)
    found = dataset.load_reference(few, path)
    assert found.shape == (tiny.BOX_PX,) * 3 and found.dtype == np.float32
    assert np.corrcoef(found.ravel(), smooth.ravel())[0, 1] > 0.9995
    assert np.vdot(found, smooth) / np.vdot(smooth, smooth) == pytest.approx(1, abs=0.01)


def test_a_reference_whose_voxel_size_cannot_be_is_refused(few: Store, reference: Path, tmp_path: Path) -> None:
    mrc.write_map(tmp_path / "reference.mrc", mrc.read_map(reference).array, 600.0)
    with pytest.raises(InputError, match="voxels of 600 A, where the particles have 6 A"):
        dataset.load_reference(few, tmp_path / "reference.mrc")


def test_a_mask_that_is_given_is_used(few: Store, reference: Path, tmp_path: Path) -> None:
    mask = np.zeros((tiny.BOX_PX,) * 3, np.float32)
    mask[8:24, 8:24, 8:24] = 1
    mrc.write_map(tmp_path / "mask.mrc", mask, tiny.PIXEL_SIZE_A)
    given = options(few, reference, tmp_path / "out", mask=tmp_path / "mask.mrc")
    result = refine(given, progress=tiny.quiet)
    np.testing.assert_array_equal(mrc.read_map(tmp_path / "out" / "mask.mrc").array, mask)
    first, second = result.half_maps
    np.testing.assert_allclose(result.fsc.masked, fsc.shell_correlation(first * mask, second * mask), atol=1e-6)
    assert [row["path"] for row in Run.open(tmp_path / "out").record["inputs"]][2] == str(tmp_path / "mask.mrc")


@pytest.mark.parametrize("iterations", [1, 2])
def test_iterations_stop_where_told(few: Store, reference: Path, tmp_path: Path, iterations: int) -> None:
    lines: list[str] = []

    def tell(line: str, /, *, end: str = "\n") -> None:
        lines.append(line)

    result = refine(options(few, reference, tmp_path / "out", max_iterations=iterations), progress=tell)
    assert result.iterations == iterations
    assert [line.split(":")[0] for line in lines[1:]] == [f"iteration {n}" for n in range(1, iterations + 1)]
    # Whenever the last iteration is, it goes to Nyquist.
    assert fsc.shell_power(result.half_maps[0])[-2] > 0


def test_a_run_converges_by_itself(symmetric: Refined) -> None:
    """It ends when the resolution has not risen for two iterations; here in fewer than it was allowed."""
    rows = Run.open(symmetric.out).record["iterations"]
    crossings = [BOX * PIXEL / row["resolution_A"] for row in rows]
    assert resolution_A(crossings[-1], BOX, PIXEL) == pytest.approx(symmetric.result.resolution_A, rel=0.02)
    assert len(rows) <= 5
