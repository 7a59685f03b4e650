"""The command that brings a map onto another."""

import json
from pathlib import Path

import numpy as np
import pytest

import dcryo
from dcryo import cli
from dcryo.data import mrc
from dcryo.data.curves import read_curves
from dcryo.errors import InputError
from dcryo.euler import euler_from_matrix, matrix_from_euler
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.phantom import phantom
from dcryo.kernels.rotations import angle_between_deg
from dcryo.kernels.symmetry import operators

ROTATION, SHIFT_A = matrix_from_euler(40, 70, -100), np.array([8.0, -12.0, 5.0])


def write(path: Path, turn: np.ndarray, shift_A: np.ndarray, box_px: int, pixel_A: float) -> Path:
    place = phantom(operators("C1"), 50).position_A @ turn.T + shift_A
    ones = np.ones((len(place), 1))
    mrc.write_map(path, gaussian_density(place, ones, 600 * ones, box_px, pixel_A), pixel_A)
    return path


@pytest.fixture
def moving(tmp_path: Path) -> Path:
    return write(tmp_path / "moving.mrc", np.eye(3), np.zeros(3), 36, 5.0)


def test_files_and_what_is_printed(moving: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    onto, out = write(tmp_path / "onto.mrc", -ROTATION, SHIFT_A, 36, 5.0), tmp_path / "out"
    assert cli.main(["align", str(moving), str(onto), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "the other hand" in printed and "rot 40.0" in printed and "tilt 70.0" in printed and "psi -100.0" in printed
    figures = json.loads((out / "run.json").read_text())["result"]
    assert figures["mirrored"] is True
    rotation = matrix_from_euler(figures["rot_deg"], figures["tilt_deg"], figures["psi_deg"])
    assert angle_between_deg(rotation, ROTATION) < 0.1
    np.testing.assert_allclose(figures["shift_A"], SHIFT_A, atol=0.1)
    table = read_curves(out / "fsc.csv")
    assert list(table)[-2:] == ["fsc_before", "fsc_after"]
    assert table["fsc_after"][1:15].min() > 0.999 and table["fsc_before"][5:15].max() < 0.7
    there = mrc.read_map(out / "moved.mrc")
    assert there.voxel_size_A == pytest.approx(5.0)
    expected = mrc.read_map(onto).array
    np.testing.assert_allclose(there.array, expected, atol=0.03 * expected.max())


def test_another_box_and_voxel_size_are_told_and_resampled(moving: Path, tmp_path: Path) -> None:
    onto = write(tmp_path / "onto.mrc", ROTATION, SHIFT_A, 50, 4.0)
    lines: list[str] = []
    options = dcryo.AlignOptions(moving=moving, onto=onto, out=tmp_path / "out", hand=False)
    result = dcryo.align(options, progress=lambda line, **_: lines.append(line))
    assert any("resampled from 5 to 4 A" in line for line in lines) and any("box of 50 px" in line for line in lines)
    assert angle_between_deg(result.alignment.rotation, ROTATION) < 0.3
    np.testing.assert_allclose(result.alignment.shift_px * 4.0, SHIFT_A, atol=0.4)
    assert result.moved.shape == (50, 50, 50) and result.resolution_half_A < 12
    again = dcryo.align(dcryo.AlignOptions(**{**options.model_dump(), "resume": True}))
    np.testing.assert_array_equal(again.moved, result.moved)
    np.testing.assert_allclose(euler_from_matrix(again.alignment.rotation)[1], 70, atol=0.3)


def test_bad_input_is_refused_before_the_run_starts(moving: Path, tmp_path: Path) -> None:
    flat, slab, tiny = (tmp_path / f"{name}.mrc" for name in ("flat", "slab", "tiny"))
    mrc.write_map(flat, np.full((36, 36, 36), 3.0, np.float32), 5.0)
    mrc.write_map(slab, np.random.default_rng(0).random((36, 36, 20)).astype(np.float32), 5.0)
    mrc.write_map(tiny, np.random.default_rng(0).random((36, 36, 36)).astype(np.float32), 0.1)
    for first, second, resolution, words in (
        (moving, flat, 20, "all voxels are 3"),
        (moving, slab, 20, "expected a cube"),
        (tiny, moving, 20, "headers must be wrong"),
        (moving, moving, 150, "45 A or finer"),
    ):
        options = dcryo.AlignOptions(moving=first, onto=second, out=tmp_path / "out", resolution_A=resolution)
        with pytest.raises(InputError, match=words):
            dcryo.align(options)
    assert not (tmp_path / "out").exists()
