from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dcryo.data import micrographs, star_syntax
from dcryo.data.motion import MotionFile, read_motion, write_motion
from dcryo.errors import InputError


def example(frames: int = 5) -> MotionFile:
    rng = np.random.default_rng(1)
    return MotionFile(
        movie_path="Movies/a b.tiff", shape_px=(3710, 3838), frame_px=rng.normal(size=(frames, 2)), pixel_size_A=0.885,
        coefficients=rng.normal(size=(2, 18)), hot_px=np.array([[3.0, 4.0], [10.0, 0.0]]), gain_path="gain.mrc",
        defect_path="bad.txt", binning=2.0, dose_e_A2=1.277, pre_dose_e_A2=0.5, voltage_kV=200.0, eer_fraction=30,
    )  # fmt: skip


def same(one: MotionFile, other: MotionFile) -> bool:
    for name in MotionFile.__dataclass_fields__:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, np.ndarray):
            if not np.allclose(a, b, rtol=1e-9, atol=0, equal_nan=True):
                return False
        elif a != b:
            return False
    return True


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for number, motion in enumerate(
        (example(), replace(example(), coefficients=None, hot_px=np.empty((0, 2)), gain_path="", eer_fraction=0))
    ):
        path = tmp_path / f"{number}.star"
        write_motion(path, motion)
        assert same(read_motion(path), motion)
    general = star_syntax.read_blocks(tmp_path / "1.star")["general"].columns
    assert general["rlnMotionModelVersion"] == "0" and "rlnMicrographGainName" not in general


def test_frames_that_were_not_used_have_no_shift(tmp_path: Path) -> None:
    motion = example()
    motion.frame_px[2] = np.nan
    write_motion(tmp_path / "a.star", motion)
    assert same(read_motion(tmp_path / "a.star"), motion)


def test_real_motion_is_read_and_adds_up(shared_data: Path) -> None:
    folder = shared_data / "bgal_empiar10204" / "MotionCorr" / "job002"
    table = micrographs.read_micrographs(folder / "corrected_micrographs.star")
    assert len(table) == 24
    for row, path in enumerate(sorted((folder / "Movies").glob("*.star"))):
        motion = read_motion(path)
        assert motion.shape_px == (3710, 3838) and motion.frame_px.shape == (24, 2)
        assert motion.pixel_size_A == 0.885 and motion.dose_e_A2 == 1.277 and motion.voltage_kV == 200.0
        assert motion.coefficients is not None and np.all(motion.frame_px[0] == 0)
        step_px = np.linalg.norm(np.diff(motion.frame_px, axis=0), axis=1)
        # The columns of RELION 3.1 and 4 are in pixels, whatever their description says; the first 3 frames are early.
        assert step_px.sum() == pytest.approx(table["motion_total_A"][row], rel=1e-5)
        assert step_px[:2].sum() == pytest.approx(table["motion_early_A"][row], rel=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("data_global_shift", "data_shift", "data_global_shift"),
        ("_rlnMicrographMovieName", "_rlnOther", "no _rlnMicrographMovieName"),
        ("_rlnMicrographOriginalPixelSize 0.885", "", "no _rlnMicrographOriginalPixelSize"),
        ("_rlnImageSizeX 3710", "_rlnImageSizeX x", "rlnImageSizeX is not a number"),
        ("_rlnImageSizeZ 5", "_rlnImageSizeZ 3", "is 4; expected 1 to 3"),
        ("_rlnImageSizeZ 5", "_rlnImageSizeZ 5.5", "not whole"),
        ("\n35 ", "\n34 ", "expected 0 to 35"),
        ("_rlnMotionModelCoeff #2", "_rlnOther #2", "no _rlnMotionModelCoeff"),
        ("_rlnMicrographShiftY #3", "_rlnOther #3", "no _rlnMicrographShiftY"),
        ("4 7.5 -2", "4 nan -2", "rlnMicrographShiftX has values that are not finite"),
        ("4 7.5 -2", "4 7.5 word", "rlnMicrographShiftY is not a number"),
        ("_rlnMicrographStartFrame 1", "_rlnMicrographStartFrame 0", "StartFrame is 0; expected 1 to 5"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "a.star"
    motion = example()
    motion.frame_px[3] = 7.5, -2.0
    write_motion(path, motion)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=told) as caught:
        read_motion(path)
    assert "a.star" in str(caught.value)
