"""RELION and dcryo on the same movies: the same signs, the same files, and who comes nearer to the truth."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import scipy.ndimage
from movie_making import REAL_TRACK_PX, Truth, make_movie

from dcryo.data import micrographs, mrc, star_syntax
from dcryo.data.motion import read_motion
from dcryo.data.star_syntax import Block
from dcryo.jobs.motion import MotionOptions, motion
from dcryo.kernels.detector import orient_gain
from dcryo.kernels.motion import Motion

pytestmark = pytest.mark.skipif(shutil.which("relion_run_motioncorr") is None, reason="RELION is not installed")

MODEL = np.zeros((2, 18))
MODEL[0, [3, 4, 6, 9, 15]] = [-0.16, 0.003, 0.1, 0.08, 0.05]
MODEL[1, [3, 6, 9, 10, 15]] = [0.07, -0.06, -0.15, 0.003, -0.06]


def relion(folder: Path, *words: str) -> str:
    made = subprocess.run([*words], cwd=folder, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout


def motioncorr(folder: Path, movie: str, out: str, *more: str) -> None:
    relion(
        folder, "relion_run_motioncorr", "--i", movie, "--o", out, "--use_own", "--j", "1", "--angpix", "0.885",
        "--voltage", "200", "--dose_per_frame", "1.277", "--dose_weighting", "--save_noDW", "--bin_factor", "1",
        "--bfactor", "150", *more,
    )  # fmt: skip


def write(path: Path, frames: np.ndarray) -> None:
    with mrcfile.new(path) as file:
        file.set_data(frames)
        file.voxel_size = 0.885


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch) -> tuple[Path, Truth]:
    """A movie corrected by both, in one project: dcryo in ours/, RELION in theirs/."""
    folder = tmp_path_factory.mktemp("project")
    truth = make_movie((1024, 1200), REAL_TRACK_PX, MODEL, seed=4, contrast=0.2)
    write(folder / "m.mrcs", truth.frames.astype(np.int8))
    monkeypatch_module.chdir(folder)
    options: dict[str, Any] = {"voltage_kV": 200.0, "dose_per_frame_e_A2": 1.277, "save_unweighted": True}
    motion(MotionOptions(movies=("m.mrcs",), out=Path("ours"), **options), progress=lambda line, end="": None)
    motioncorr(folder, "m.mrcs", "theirs/", "--patch_x", "5", "--patch_y", "5")
    return folder, truth


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def error_px(path: Path, truth: Truth) -> float:
    found = read_motion(path)
    ny, nx = truth.specimen.shape
    model = Motion(found.frame_px, np.zeros((2, 18)) if found.coefficients is None else found.coefficients)
    places = np.array([(x, y) for x in np.linspace(-0.4, 0.4, 5) for y in np.linspace(-0.4, 0.4, 5)])
    true = np.array([truth.track_px((x + 0.5) * nx, (y + 0.5) * ny) for x, y in places])
    difference = -model.at(places) - true
    return float(np.sqrt(np.mean((difference - difference.mean(axis=1, keepdims=True)) ** 2)))


def test_signs_and_units_are_relions_and_we_are_nearer_to_the_truth(case: tuple[Path, Truth]) -> None:
    folder, truth = case
    ours, theirs = (error_px(folder / name / "m.star", truth) for name in ("ours", "theirs"))
    assert theirs < 0.3 and ours < 0.1 and ours < theirs


def test_micrographs_agree(case: tuple[Path, Truth]) -> None:
    folder, _ = case
    for name in ("m.mrc", "m_noDW.mrc"):
        ours, theirs = (micrographs.read_image(folder / who / name) for who in ("ours", "theirs"))
        assert ours.mean() == pytest.approx(theirs.mean(), rel=0.01)
        inner = np.s_[60:-60, 60:-60]
        # Both start from white noise that they move differently; this is what they have in common.
        ours, theirs = (np.fft.rfft2(image[inner] - image[inner].mean()) for image in (ours, theirs))
        k = np.hypot(np.fft.fftfreq(ours.shape[0])[:, None], np.fft.rfftfreq(1200 - 120))
        low = (k > 0.01) & (k < 0.1)
        common = np.vdot(ours[low], theirs[low]).real / np.linalg.norm(ours[low]) / np.linalg.norm(theirs[low])
        assert common > 0.98
        # RELION interpolates linearly where the local model is in play, and loses power at high frequencies by it.
        power = [np.mean(np.abs(one[(k > 0.2) & (k < 0.4)]) ** 2) for one in (ours, theirs)]
        assert 0.5 < power[1] / power[0] < 0.9


def test_relion_reads_our_table_of_micrographs(case: tuple[Path, Truth]) -> None:
    folder, _ = case
    relion(folder, "relion_star_handler", "--i", "ours/micrographs.star", "--o", "copy.star")
    ours = micrographs.read_micrographs(folder / "ours" / "micrographs.star")
    theirs = micrographs.read_micrographs(folder / "copy.star")
    for name in ("path", "motion_path", "motion_total_A", "motion_early_A", "optics_row"):
        same = ours[name] == (theirs[name] if ours[name].dtype.kind == "U" else pytest.approx(theirs[name], rel=1e-5))
        assert np.all(same), name
    for name in ("voltage_kV", "micrograph_pixel_size_A", "micrograph_original_pixel_size_A"):
        assert ours.optics[name] == pytest.approx(theirs.optics[name])


def test_relion_extracts_and_polishes_from_our_files(case: tuple[Path, Truth]) -> None:
    """Polishing begins with the tracks of the particles that our motion says: where that puts them, sign and all."""
    folder, _ = case
    places = [(x, y) for x in (200, 500, 800, 1000) for y in (200, 500, 800)]
    picks = "data_\n\nloop_\n_rlnCoordinateX #1\n_rlnCoordinateY #2\n" + "".join(f"{x} {y}\n" for x, y in places)
    (folder / "ours" / "m_pick.star").write_text(picks)
    relion(
        folder, "relion_preprocess", "--i", "ours/micrographs.star", "--coord_dir", "./", "--part_star", "p.star",
        "--coord_suffix", "_pick.star", "--part_dir", "p/", "--extract", "--extract_size", "64",
    )  # fmt: skip
    boxes = mrcfile.read(next((folder / "p").rglob("*.mrcs")))
    image = micrographs.read_image(folder / "ours" / "m.mrc")
    assert boxes[0] == pytest.approx(image[200 - 32 : 200 + 32, 200 - 32 : 200 + 32], abs=1e-4)
    write_references(folder, len(places))
    relion(
        folder, "relion_motion_refine", "--i", "refined.star", "--f", "fsc.star", "--m1", "half1.mrc",
        "--m2", "half2.mrc", "--mask", "mask.mrc", "--corr_mic", "ours/micrographs.star", "--o", "polished/",
        "--fdose", "1.277", "--s_vel", "5", "--s_div", "50000", "--s_acc", "5", "--max_iters", "0",
        "--angpix_ref", "0.885",
    )  # fmt: skip
    tracks = star_syntax.read_blocks(folder / "polished" / "ours" / "m_tracks.star")
    ours = read_motion(folder / "ours" / "m.star")
    assert ours.coefficients is not None
    for number, (x, y) in enumerate(places):
        track = np.stack([tracks[str(number)].columns[f"rlnOrigin{axis}Angst"].astype(float) for axis in "XY"], axis=1)
        motion = Motion(ours.frame_px, ours.coefficients).at(np.array([x / 1200 - 0.5, y / 1024 - 0.5]))
        assert track - track[0] == pytest.approx(-0.885 * motion, abs=1e-3)


def write_references(folder: Path, particles: int) -> None:
    """What polishing asks for besides: half maps, a mask, an FSC, and poses of the particles extracted."""
    blocks = star_syntax.read_blocks(folder / "p.star")
    columns = dict(blocks["particles"].columns)
    fixed = {
        "rlnAngleRot": 0.0, "rlnAngleTilt": 0.0, "rlnAnglePsi": 0.0, "rlnOriginXAngst": 0.0, "rlnOriginYAngst": 0.0,
        "rlnDefocusU": 11000.0, "rlnDefocusV": 10700.0, "rlnDefocusAngle": 30.0,
    }  # fmt: skip
    columns |= {label: np.full(particles, value) for label, value in fixed.items()}
    columns["rlnRandomSubset"] = np.arange(particles) % 2 + 1
    star_syntax.write_blocks(folder / "refined.star", {"optics": blocks["optics"], "particles": Block(columns)})
    side = np.arange(64) - 32
    radius = np.sqrt(side[:, None, None] ** 2 + side[:, None] ** 2 + side**2)
    density = scipy.ndimage.gaussian_filter(np.random.default_rng(1).standard_normal((64, 64, 64)), 1.5) * (radius < 20)
    for name, volume in (("half1", density), ("half2", density), ("mask", np.clip((28 - radius) / 5, 0, 1))):
        mrc.write_map(folder / f"{name}.mrc", volume.astype(np.float32), 0.885)
    shell = np.arange(33)
    curve = {
        "rlnSpectralIndex": shell, "rlnResolution": shell / (64 * 0.885),
        "rlnAngstromResolution": 64 * 0.885 / np.maximum(shell, 0.1),
        "rlnFourierShellCorrelationCorrected": np.clip(1.2 - shell / 20, 0, 1),
    }  # fmt: skip
    general = {"rlnFinalResolution": np.array([4.0]), "rlnBfactorUsedForSharpening": np.array([-10.0])}
    star_syntax.write_blocks(folder / "fsc.star", {"general": Block(general, is_loop=False), "fsc": Block(curve)})


@pytest.mark.parametrize(("turns", "flip"), [(0, "none"), (1, "none"), (3, "y"), (2, "x")])
def test_a_gain_is_turned_as_relion_turns_it(tmp_path: Path, turns: int, flip: str) -> None:
    gain = np.ones((128, 128), np.float32)
    gain[10:30, 15:60] = 1.5
    gain[100:110, 5:15] = 2.0
    frames = np.random.default_rng(1).poisson(50, (4, 128, 128)).astype(np.int16)
    write(tmp_path / "flat.mrcs", frames)
    write(tmp_path / "gain.mrc", gain)
    number = {"none": "0", "y": "1", "x": "2"}[flip]
    motioncorr(tmp_path, "flat.mrcs", "out/", "--gainref", "gain.mrc", "--gain_rot", str(turns), "--gain_flip", number,
               "--skip_defect")  # fmt: skip
    theirs = micrographs.read_image(tmp_path / "out" / "flat_noDW.mrc")
    ours = [orient_gain(gain, t, f) for t in range(4) for f in ("none", "y", "x")]
    likeness = [np.corrcoef((one * frames.sum(axis=0)).ravel(), theirs.ravel())[0, 1] for one in ours]
    right = np.corrcoef((orient_gain(gain, turns, flip) * frames.sum(axis=0)).ravel(), theirs.ravel())[0, 1]
    assert right > 0.9 and right == max(likeness)
