"""The command that makes the map that is looked at: what it writes, what it says, what it refuses."""

import csv
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from noisy_halves import blurred, noise_power, noisy_halves
from tiny import quiet

from dcryo import cli
from dcryo.data import mrc
from dcryo.data.curves import read_curves
from dcryo.data.model import read_model
from dcryo.data.postprocess_star import read_postprocess_star
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.postprocess import PostprocessOptions, PostprocessResult, postprocess
from dcryo.kernels import density, filters, fsc, phantom, sharpening, symmetry
from dcryo.kernels.likeness import mirrored
from dcryo.steps import validation

BOX, PIXEL_A = 48, 2.5
BFACTOR_A2 = 300.0
WRITTEN = {"map.mrc", "map_sharp.mrc", "mask.mrc", "fsc.csv", "fsc.xml", "guinier.csv", "postprocess.star", "run.json"}


@dataclass(frozen=True)
class Case:
    """Half maps in files, half1.mrc and half2.mrc in a folder, and the truth and atoms that they are of."""

    folder: Path
    truth: np.ndarray
    atoms: phantom.Phantom

    @property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        first, second = (mrc.read_map(self.folder / f"half{half}.mrc").array for half in (1, 2))
        return first, second

    def run(self, out: Path, **options: object) -> PostprocessResult:
        given = {"source": self.folder / "half1.mrc", "out": out} | options
        return postprocess(PostprocessOptions(**given), progress=quiet)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("halves")
    atoms = phantom.phantom(symmetry.operators("C1"), 38.0, seed=4)
    truth = density.gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, BOX, PIXEL_A)
    truth = blurred(truth, PIXEL_A, BFACTOR_A2)
    for half, array in enumerate(noisy_halves(truth, noise_power(truth, PIXEL_A, 7.5), 1), start=1):
        mrc.write_map(folder / f"half{half}.mrc", array, PIXEL_A)
    return Case(folder, truth, atoms)


@pytest.fixture(scope="module")
def done(case: Case, tmp_path_factory) -> PostprocessResult:
    return case.run(tmp_path_factory.mktemp("done") / "out")


def result_of(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())["result"]


def test_what_is_written(case: Case, done: PostprocessResult) -> None:
    assert {path.name for path in done.out.iterdir() if path.suffix != ".html"} - {".lock"} == WRITTEN
    first, second = case.halves
    np.testing.assert_allclose(mrc.read_map(done.out / "map.mrc").array, (first + second) / 2, atol=1e-6)
    np.testing.assert_array_equal(mrc.read_map(done.out / "mask.mrc").array, done.mask)
    table = read_curves(done.out / "fsc.csv")
    mask = done.mask
    np.testing.assert_allclose(table["fsc_masked"], fsc.shell_correlation(first * mask, second * mask), atol=1e-6)
    np.testing.assert_allclose(table["fsc_corrected"], done.curves.corrected, atol=1e-6)
    true_A = fsc.resolution_at(fsc.shell_correlation(done.map * mask, case.truth * mask), fsc.HALF, BOX, PIXEL_A)
    assert done.resolution_A == pytest.approx(true_A, rel=0.05)
    figures = result_of(done.out)
    assert figures["resolution_A"] == done.resolution_A and figures["mask"] == "automatic"
    assert figures["resolution_best_A"] <= figures["resolution_A"] <= figures["resolution_worst_A"]
    assert figures["resolution_A"] < figures["resolution_half_A"]
    assert figures["resolution_masked_A"] < figures["resolution_unmasked_A"]
    assert figures["fsc_of_mask"] < 0.05 and done.warnings == ()


def test_sharpening_gives_back_what_the_map_has_lost(case: Case, done: PostprocessResult) -> None:
    figures = result_of(done.out)
    assert done.bfactor_A2 == figures["bfactor_fitted_A2"] and figures["bfactor_error_A2"] > 0
    unblurred = density.gaussian_density(
        case.atoms.position_A, case.atoms.amplitude, case.atoms.bfactor_A2, BOX, PIXEL_A
    )
    lost = sharpening.guinier_fit(
        sharpening.radial_amplitude(case.truth), np.arange(BOX // 2 + 1) / (BOX * PIXEL_A), done.resolution_A or 0
    )
    assert lost is not None and done.bfactor_A2 == pytest.approx(lost.bfactor_A2, rel=0.1)
    assert done.sharpened is not None
    mask = done.mask
    sharp, plain = (fsc.shell_correlation(map_ * mask, unblurred * mask) for map_ in (done.sharpened, done.map))
    np.testing.assert_allclose(sharp[2:14], plain[2:14], atol=0.05)
    resolved = filters.lowpass(unblurred, PIXEL_A, done.resolution_A or 0)
    inside = mask > 0.5
    in_space = [np.corrcoef(map_[inside], resolved[inside])[0, 1] for map_ in (done.sharpened, done.map)]
    assert in_space[0] > in_space[1]


def test_fsc_for_the_archives(done: PostprocessResult) -> None:
    text = (done.out / "fsc.xml").read_text()
    table = read_curves(done.out / "fsc.csv")
    assert text.count("<coordinate>") == BOX // 2 + 1
    assert f"<y>{table['fsc_corrected'][5]:.6f}</y>" in text


def test_a_run_is_post_processed_with_its_symmetry(case: Case, tmp_path: Path) -> None:
    halves = tmp_path / "maps"
    with Run.start(halves, "refine", {"symmetry": "C2", "mask": None}) as run:
        for half in (1, 2):
            shutil.copy(case.folder / f"half{half}.mrc", halves)
        run.done({"resolution_A": 5.0, "symmetry": "C2", "mask_diameter_A": 100.0})
    out = tmp_path / "out"
    assert cli.main(["postprocess", str(halves), "--out", str(out)]) == 0
    assert result_of(out)["symmetry"] == "C2"
    assert result_of(out)["mask_diameter_A"] == 100
    assert "Post-processing of half maps" in (out / "report.html").read_text()
    other = postprocess(PostprocessOptions(source=halves, symmetry="C1", out=tmp_path / "c1"), progress=quiet)
    ratio = other.curves.independent / read_curves(out / "fsc.csv")["independent_voxels"]
    np.testing.assert_allclose(ratio, 2, rtol=1e-5)


def test_resuming_what_is_done_changes_nothing(case: Case, done: PostprocessResult) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in done.out.iterdir()}
    again = case.run(done.out, resume=True)
    assert again.summary() == done.summary()
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in done.out.iterdir()} == before
    with pytest.raises(InputError, match="holds a run already"):
        case.run(done.out)


def test_masks_of_other_kinds(case: Case, done: PostprocessResult, tmp_path: Path) -> None:
    given = case.run(tmp_path / "given", mask=done.out / "mask.mrc")
    np.testing.assert_array_equal(given.curves.corrected, done.curves.corrected)
    sphere = case.run(tmp_path / "sphere", mask_diameter_A=100.0)
    np.testing.assert_array_equal(sphere.curves.spherical, sphere.curves.masked)
    assert result_of(tmp_path / "sphere")["mask"] == "sphere"
    model = write_pdb(tmp_path / "model.pdb", case.atoms.position_A + PIXEL_A * (BOX // 2))
    from_model = case.run(tmp_path / "model", mask_model=model)
    assert from_model.warnings == ()
    overlap = np.sum(np.minimum(from_model.mask, done.mask)) / np.sum(np.maximum(from_model.mask, done.mask))
    assert overlap > 0.7
    figures = result_of(tmp_path / "model")
    assert figures["resolution_molecule_A"] < figures["resolution_A"] and figures["mass_kDa"] > 1
    moved = write_pdb(tmp_path / "moved.pdb", case.atoms.position_A[:200] * 0.2 + 12)
    assert any("does not lie on the density" in line for line in case.run(tmp_path / "m", mask_model=moved).warnings)


def write_pdb(path: Path, position_A: np.ndarray) -> Path:
    lines = [
        f"ATOM  {n % 99999:5d}  C   ALA A{n % 9999:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 30.00           C"
        for n, (x, y, z) in enumerate(position_A, start=1)
    ]
    path.write_text("\n".join([*lines, "END", ""]))
    return path


def test_a_mask_without_room_is_called_out(case: Case, tmp_path: Path) -> None:
    first, second = case.halves
    tight = (first + second > np.percentile(first + second, 98.5)).astype(np.float32)
    mrc.write_map(tmp_path / "tight.mrc", tight, PIXEL_A)
    found = case.run(tmp_path / "out", mask=tmp_path / "tight.mrc")
    assert any("So tight is the mask" in line for line in found.warnings)
    assert any("leaves out" in line for line in found.warnings)
    figures = result_of(tmp_path / "out")
    assert figures["resolution_masked_A"] < 0.85 * figures["resolution_A"]
    assert "fsc_filtered_first" in read_curves(tmp_path / "out" / "fsc.csv")


def test_noise_claims_nothing_and_is_not_sharpened(tmp_path: Path) -> None:
    for half, array in enumerate(noisy_halves(np.zeros((32,) * 3, np.float32), np.full(17, 1e4), 3), start=1):
        mrc.write_map(tmp_path / f"half{half}.mrc", array, PIXEL_A)
    out = tmp_path / "out"
    assert cli.main(["postprocess", str(tmp_path / "half1.mrc"), "--out", str(out)]) == 0
    figures = result_of(out)
    assert figures["resolution_A"] is None and figures["resolution_masked_A"] is None
    assert any("no resolution is claimed" in line for line in figures["warnings"])
    assert not (out / "map_sharp.mrc").exists() and (out / "fsc.csv").exists()
    assert "no resolution is claimed" in (out / "report.html").read_text()


def test_a_resolution_that_few_voxels_tell_of_is_called_uncertain(case: Case, tmp_path: Path) -> None:
    noise = 3 * noise_power(case.truth, PIXEL_A, 12.0)
    for half, array in enumerate(noisy_halves(case.truth, noise, 2), start=1):
        mrc.write_map(tmp_path / f"half{half}.mrc", array, PIXEL_A)
    options = PostprocessOptions(source=tmp_path / "half1.mrc", symmetry="C4", out=tmp_path / "out")
    found = postprocess(options, progress=quiet)
    assert found.resolution_A is not None
    assert any("uncertain: at 95 percent" in line for line in found.warnings)


def test_sharpening_by_hand(case: Case, done: PostprocessResult, tmp_path: Path) -> None:
    mild = case.run(tmp_path / "mild", bfactor_A2=-100.0)
    assert mild.bfactor_A2 == -100 and mild.warnings == ()
    assert result_of(tmp_path / "mild")["bfactor_fitted_A2"] == done.bfactor_A2
    hard = case.run(tmp_path / "hard", bfactor_A2=-900.0)
    assert any("sharpens more than the map has lost" in line for line in hard.warnings)
    assert any("blurs" in line for line in case.run(tmp_path / "blur", bfactor_A2=50.0).warnings)


def test_mtf_is_divided_out(case: Case, done: PostprocessResult, tmp_path: Path) -> None:
    star = tmp_path / "mtf.star"
    frequency = np.linspace(0, 0.5, 26)
    rows = "\n".join(f"{x:.6f} {1 - x:.6f}" for x in frequency)
    star.write_text(f"data_\n\nloop_\n_rlnResolutionInversePixel #1\n_rlnMtfValue #2\n{rows}\n")
    found = case.run(tmp_path / "out", mtf=star, bfactor_A2=0.0, mtf_pixel_size_A=PIXEL_A / 2)
    plain = case.run(tmp_path / "plain", bfactor_A2=0.0)
    assert found.sharpened is not None and plain.sharpened is not None
    ratio = sharpening.radial_amplitude(found.sharpened)[1:15] / sharpening.radial_amplitude(plain.sharpened)[1:15]
    np.testing.assert_allclose(ratio, 1 / (1 - np.arange(1, 15) / BOX / 2), rtol=0.01)
    with pytest.raises(InputError, match="cycles per pixel, but the map reaches"):
        case.run(tmp_path / "wrong", mtf=star, mtf_pixel_size_A=2 * PIXEL_A)


def test_a_map_gets_the_amplitudes_of_a_model(case: Case, tmp_path: Path) -> None:
    model = write_pdb(tmp_path / "model.pdb", case.atoms.position_A)
    found = case.run(tmp_path / "out", sharpen_model=model)
    assert found.bfactor_A2 is None and found.sharpened is not None
    table = read_curves(tmp_path / "out" / "fsc.csv")
    inside = sharpening.radial_amplitude(found.sharpened * found.mask)
    weight = sharpening.fsc_weight(table["fsc_corrected"])
    atoms = read_model(model)
    made = density.gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, BOX, PIXEL_A)
    ratio = (inside / sharpening.radial_amplitude(made))[3:14]
    assert ratio.std() / ratio.mean() < 0.1 and weight[3] > 0.9


def test_the_same_bits_again(case: Case, done: PostprocessResult, tmp_path: Path) -> None:
    case.run(tmp_path / "out")
    for name in WRITTEN - {"run.json", "postprocess.star"}:
        assert (tmp_path / "out" / name).read_bytes() == (done.out / name).read_bytes(), name


def refused(case: Case, out: Path, capsys, *words: object) -> str:
    """What is said of half maps or options that are refused before anything is written."""
    assert cli.main(["postprocess", *map(str, words), "--out", str(out)]) == 2
    assert not out.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one, other: one, "the same map as"),
        (lambda one, other: 3 * one + 1, "the same map as"),
        (lambda one, other: mirrored(other, 0), "mirrored along z"),
        (lambda one, other: mirrored(other, 2), "mirrored along x"),
        (lambda one, other: -other, "multiply one of them by -1"),
        (lambda one, other: np.full_like(one, 2.0), "constant, 2 everywhere"),
        (lambda one, other: other[:-2, :-2, :-2], "(46, 46, 46) voxels, but"),
        (lambda one, other: other[:-2], "expected a cube"),
    ],
)
def test_half_maps_that_are_no_pair(case: Case, tmp_path: Path, capsys, change, said: str) -> None:
    mrc.write_map(tmp_path / "other.mrc", change(*case.halves), PIXEL_A)
    error = refused(case, tmp_path / "out", capsys, case.folder / "half1.mrc", tmp_path / "other.mrc")
    assert f"{tmp_path / 'other.mrc'}: " in error and said in error


def test_a_filtered_copy_is_the_same_map(case: Case, tmp_path: Path, capsys) -> None:
    gain = np.exp(-np.arange(BOX // 2 + 1) / 20)
    mrc.write_map(tmp_path / "other.mrc", sharpening.filtered(case.halves[0], gain, 30.0), PIXEL_A)
    error = refused(case, tmp_path / "out", capsys, case.folder / "half1.mrc", tmp_path / "other.mrc")
    assert "the same map as" in error


def test_other_half_maps_that_are_refused(case: Case, tmp_path: Path, capsys) -> None:
    half1, out = case.folder / "half1.mrc", tmp_path / "out"
    mrc.write_map(tmp_path / "pixel.mrc", case.halves[1], 3.0)
    assert "voxels of 3 A, but" in refused(case, out, capsys, half1, tmp_path / "pixel.mrc")
    mrc.write_map(tmp_path / "none.mrc", case.halves[1], 0.0)
    assert "no voxel size" in refused(case, out, capsys, half1, tmp_path / "none.mrc")
    raw = bytearray((case.folder / "half2.mrc").read_bytes())
    raw[1024 + 400 : 1024 + 404] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.mrc").write_bytes(raw)
    assert "1 voxels are not finite" in refused(case, out, capsys, half1, tmp_path / "nan.mrc")
    shutil.copy(half1, tmp_path / "alone.mrc")
    assert "no second half map" in refused(case, out, capsys, tmp_path / "alone.mrc")
    assert "cannot be read" in refused(case, out, capsys, half1, tmp_path / "absent.mrc")
    assert "not a run directory" in refused(case, out, capsys, case.folder)
    assert "symmetry 'X7' is not known" in refused(case, out, capsys, half1, "--symmetry", "X7")


@pytest.mark.parametrize(
    ("array", "voxel_A", "said"),
    [
        (np.ones((40,) * 3), PIXEL_A, "mask of (40, 40, 40) voxels"),
        (np.ones((BOX,) * 3), 3.0, "of 3 A; expected"),
        (np.full((BOX,) * 3, 5.0), PIXEL_A, "mask values run from 5 to 5"),
        (np.zeros((BOX,) * 3), PIXEL_A, "mask values run from 0 to 0"),
        (np.full((BOX,) * 3, -1.0), PIXEL_A, "mask values run from -1"),
    ],
)
def test_masks_that_do_not_fit(case: Case, tmp_path: Path, capsys, array, voxel_A: float, said: str) -> None:
    mrc.write_map(tmp_path / "mask.mrc", array, voxel_A)
    error = refused(
        case, tmp_path / "out", capsys, case.folder / "half1.mrc", "--mask", tmp_path / "mask.mrc"
    )  # fmt: skip
    assert f"{tmp_path / 'mask.mrc'}: " in error and said in error


def test_options_that_are_refused(case: Case, done: PostprocessResult, tmp_path: Path, capsys) -> None:
    half1, out, mask = case.folder / "half1.mrc", tmp_path / "out", done.out / "mask.mrc"
    outside = write_pdb(tmp_path / "outside.pdb", case.atoms.position_A)
    for words, said in {
        ("--mask", mask, "--mask-diameter", 90): "--mask and --mask-diameter exclude each other",
        ("--bfactor", -50, "--sharpen-model", outside): "--bfactor and --sharpen-model exclude each other",
        ("--mask-diameter", 500): "at most the box, 120 A",
        ("--fit-from", 5, "--fit-to", 8): "finer resolution than --fit-from",
        ("--mtf-pixel-size", 1): "says nothing without --mtf",
        ("--mask-model", outside): "atoms lie outside the map",
        ("--mass", -3): "greater than 0",
    }.items():
        assert said in refused(case, out, capsys, half1, *words)


def test_half_maps_that_are_masked_already_are_told(case: Case, done: PostprocessResult, tmp_path: Path) -> None:
    for half, array in enumerate(case.halves, start=1):
        mrc.write_map(tmp_path / f"half{half}.mrc", array * done.mask, PIXEL_A)
    found = postprocess(PostprocessOptions(source=tmp_path / "half1.mrc", out=tmp_path / "out"), progress=quiet)
    assert any("masked already" in line for line in found.warnings)


def test_what_correlates_beyond_the_resolution_is_told(case: Case, tmp_path: Path) -> None:
    common = noisy_halves(np.zeros((BOX,) * 3, np.float32), np.full(BOX // 2 + 1, BOX**3), 9)[0]
    common *= 0.8 * (case.halves[0] - case.truth).std()
    for half, array in enumerate(case.halves, start=1):
        mrc.write_map(tmp_path / f"half{half}.mrc", array + common, PIXEL_A)
    found = postprocess(PostprocessOptions(source=tmp_path / "half1.mrc", out=tmp_path / "out"), progress=quiet)
    said = " ".join(found.warnings)
    assert "in common" in said or "does not fall to 0.143" in said


@pytest.mark.skipif(shutil.which("relion_postprocess") is None, reason="RELION is not installed")
def test_relion_gives_the_same_curves_and_b_factor(case: Case, done: PostprocessResult, tmp_path: Path) -> None:
    words = ["--i", case.folder / "half1.mrc", "--i2", case.folder / "half2.mrc", "--mask", done.out / "mask.mrc",
             "--angpix", PIXEL_A, "--auto_bfac", "--autob_highres", done.resolution_A]  # fmt: skip
    theirs = []
    for seed in range(1, 9):
        out = tmp_path / f"seed{seed}"
        subprocess.run(
            ["relion_postprocess", *map(str, words), "--random_seed", str(seed), "--o", str(out)],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        theirs.append(read_postprocess_star(out.with_suffix(".star")))
    general = theirs[0][0]
    for name in ("fsc_unmasked", "fsc_masked"):
        ours = getattr(done.curves, name.removeprefix("fsc_"))
        np.testing.assert_allclose(ours[2:], theirs[0][1][name][2:], atol=0.01)
    theirs_corrected = np.array([curves["fsc_corrected"] for _, curves, _ in theirs])
    draws = validation.draws_of(BOX)
    # What is left of the randomness of both means; of two of RELION's own runs it is more than 0.1.
    noise = theirs_corrected.std(axis=0, ddof=1) * np.sqrt(1 / len(theirs) + 1 / draws)
    apart = np.abs(done.curves.corrected - theirs_corrected.mean(axis=0))
    assert np.all(apart[2:] < 0.01 + 3 * noise[2:])
    assert float(general["randomised_from_A"]) == pytest.approx(result_of(done.out)["randomised_from_A"], rel=1e-5)
    figures = result_of(done.out)
    assert figures["bfactor_of_whole_box_A2"] == pytest.approx(float(general["bfactor_A2"]), rel=0.05)


@pytest.mark.skipif(shutil.which("relion_star_printtable") is None, reason="RELION is not installed")
def test_relion_reads_the_tables(done: PostprocessResult) -> None:
    made = subprocess.run(
        ["relion_star_printtable", str(done.out / "postprocess.star"), "data_fsc", "_rlnAngstromResolution",
         "_rlnFourierShellCorrelationCorrected"],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    rows = np.array([list(map(float, row)) for row in csv.reader(made.stdout.splitlines(), delimiter=" ",
                                                                 skipinitialspace=True) if row])  # fmt: skip
    np.testing.assert_allclose(rows[:, -1], done.curves.corrected, atol=1e-4)
