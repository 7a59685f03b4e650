import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dcryo.data import mrc
from dcryo.data.coordinates import Coordinates, coordinates_of, read_coordinates, write_boxes, write_coordinates
from dcryo.errors import InputError

AT = np.array([[10.25, 2000.5], [0.0, 17.0], [333.125, 4.75]])


def test_picks_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = Coordinates(AT, np.array([0.9, 0.5, -0.1]), np.array([0.0, 90.0, 350.0]), np.array([1, 3, 2]))
    write_coordinates(tmp_path / "a.star", written)
    found = read_coordinates(tmp_path / "a.star")
    for name in ("coordinate_px", "score", "psi_deg", "class_number"):
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name))
    assert found.micrograph is None and len(found) == 3
    text = (tmp_path / "a.star").read_text()
    for label in ("rlnCoordinateX", "rlnCoordinateY", "rlnAutopickFigureOfMerit", "rlnAnglePsi", "rlnClassNumber"):
        assert f"_{label} #" in text


def test_no_picks_are_picks_too(tmp_path: Path) -> None:
    write_coordinates(tmp_path / "none.star", Coordinates(np.zeros((0, 2)), np.zeros(0)))
    assert len(read_coordinates(tmp_path / "none.star")) == 0
    write_boxes(tmp_path / "none.box", np.zeros((0, 2)), 64)
    (tmp_path / "none.txt").write_text("# x y\n\n")
    assert len(read_coordinates(tmp_path / "none.box")) == len(read_coordinates(tmp_path / "none.txt")) == 0


@pytest.mark.parametrize("box_px", [64, 65])
def test_boxes_are_about_the_nearest_pixel(tmp_path: Path, box_px: int) -> None:
    write_boxes(tmp_path / "a.box", AT, box_px)
    np.testing.assert_array_equal(read_coordinates(tmp_path / "a.box").coordinate_px, np.floor(AT + 0.5))
    corner = [int(word) for word in (tmp_path / "a.box").read_text().split()[:4]]
    assert corner == [10 - box_px // 2, 2001 - box_px // 2, box_px, box_px]


def test_coordinates_of_one_micrograph_among_several(tmp_path: Path) -> None:
    names = np.array(["Micrographs/m1.mrc", "m2.mrc", "other/m1.mrc"])
    write_coordinates(tmp_path / "all.star", Coordinates(AT, np.arange(3.0), micrograph=names))
    found = coordinates_of(tmp_path / "all.star", "m1")
    assert found is not None
    np.testing.assert_array_equal(found.coordinate_px, AT[[0, 2]])
    np.testing.assert_array_equal(found.score, [0, 2])
    assert coordinates_of(tmp_path / "all.star", "m") is None


def test_coordinates_in_a_directory(tmp_path: Path) -> None:
    write_coordinates(tmp_path / "m1_coordinates.star", Coordinates(AT))
    write_boxes(tmp_path / "m1.box", AT[:1], 10)
    write_coordinates(tmp_path / "m2_autopick.star", Coordinates(AT[:2]))
    (tmp_path / "m3.txt").write_text("# x y\n1.5 2.5\n3,4\n")
    write_coordinates(tmp_path / "m[4]_picks.star", Coordinates(AT[:1]))
    found = {name: coordinates_of(tmp_path, name) for name in ("m1", "m2", "m3", "m[4]", "m", "m4")}
    assert {name: None if one is None else len(one) for name, one in found.items()} == {
        "m1": 3, "m2": 2, "m3": 2, "m[4]": 1, "m": None, "m4": None,
    }  # fmt: skip
    np.testing.assert_array_equal(found["m3"].coordinate_px, [[1.5, 2.5], [3, 4]])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.star", "data_\n\nloop_\n_rlnCoordinateX #1\n1\n", "_rlnCoordinateX and _rlnCoordinateY"),
        ("a.star", "data_\n\nloop_\n_rlnCoordinateX #1\n_rlnCoordinateY #2\n1 2\n3 nan\n", "row 2, _rlnCoordinateY"),
        ("a.box", "1 2 3\n", "line 1: found '1 2 3'; expected at least 4 numbers"),
        ("a.box", "1 2 3 4\n1 2 3 4 5\n", "line 2.*expected 4 numbers"),
        ("a.txt", "1 x\n", "line 1"),
        ("a.csv", "1,2\n", "expected one that ends in .star"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=told):
        read_coordinates(tmp_path / name)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for name in ("a.star", "a.box"):
        with pytest.raises(InputError, match="cannot be read"):
            read_coordinates(tmp_path / name)


def test_real_coordinates(shared_data: Path) -> None:
    folder = shared_data / "bgal_empiar10017"
    name = "Falcon_2012_06_12-14_33_35_0"
    curated = coordinates_of(folder / "cryoppp_14_33_35.star", name)
    assert curated is not None and len(curated) == 629 and curated.coordinate_px[0].tolist() == [3752, 693]
    crowded = coordinates_of(folder / "crYOLO", name)
    assert crowded is not None and crowded.score is not None and 0 < crowded.score.min() < crowded.score.max() <= 1
    assert crowded.coordinate_px[0].tolist() == [2889 + 90, 3885 + 90]


MICROGRAPHS = """
# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnMicrographPixelSize #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
1 2.0 300 2.7 0.1


# version 30001

data_micrographs

loop_
_rlnMicrographName #1
_rlnOpticsGroup #2
m1.mrc 1

"""


@pytest.mark.skipif(shutil.which("relion_preprocess") is None, reason="RELION is not installed")
def test_relion_cuts_out_what_is_at_our_coordinates(tmp_path: Path) -> None:
    places = [(70, 40), (33, 61)]
    image = np.zeros((1, 100, 120), np.float32)
    for x, y in places:
        image[0, y, x] = 10
    mrc.write_map(tmp_path / "m1.mrc", image, 2.0)
    write_coordinates(tmp_path / "m1_coordinates.star", Coordinates(np.array(places, float), np.array([0.9, 0.1])))
    (tmp_path / "mics.star").write_text(MICROGRAPHS)
    command = "relion_preprocess --i mics.star --coord_dir ./ --coord_suffix _coordinates.star --part_star out.star"
    command += " --part_dir Extract/ --extract --extract_size 32"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    boxes = mrc.open_stack(next((tmp_path / "Extract").rglob("*.mrcs"))).read([0, 1])
    assert [np.unravel_index(box.argmax(), box.shape) for box in boxes] == [(16, 16), (16, 16)]
