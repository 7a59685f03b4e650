import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dcryo.data import micrographs, star
from dcryo.data.particles import Micrographs
from dcryo.errors import InputError, RunError


def two(**columns) -> Micrographs:
    return Micrographs(
        {"path": np.array(["Micrographs/a.mrc", "Micrographs/b 2.mrc"]), "optics_row": np.array([1, 0])} | columns,
        {
            "group": np.array([1, 2]),
            "micrograph_pixel_size_A": np.array([0.885, 1.0]),
            "micrograph_original_pixel_size_A": np.array([0.885, 0.5]),
            "voltage_kV": np.array([200.0, 300.0]),
            "spherical_aberration_mm": np.array([1.4, 2.7]),
            "amplitude_contrast": np.array([0.1, 0.07]),
        },
        extra={"rlnCtfPowerSpectrum": np.array(["a_PS.mrc", "b_PS.mrc"])},
        optics_extra={"rlnMtfFileName": np.array(["k2.star", "k3.star"])},
    )


def test_micrographs_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = two(
        defocus_u_A=np.array([10000.0, 12345.5]), flag=np.array(["", "no rings: 14 A, worse than 10 A"]),
        picks=np.array([3, 0]), ctf_resolution_A=np.array([3.5, np.inf]),
    )  # fmt: skip
    micrographs.write_micrographs(tmp_path / "m.star", written)
    found = micrographs.read_micrographs(tmp_path / "m.star")
    assert found.columns.keys() == written.columns.keys()
    for name, values in written.columns.items():
        np.testing.assert_array_equal(found[name], values)
    for name, values in written.optics.items():
        np.testing.assert_array_equal(found.optics[name], values)
    assert found.extra["rlnCtfPowerSpectrum"].tolist() == ["a_PS.mrc", "b_PS.mrc"]
    assert found.optics_extra["rlnMtfFileName"].tolist() == ["k2.star", "k3.star"]
    assert found.optics_of("voltage_kV").tolist() == [300.0, 200.0]


def test_micrographs_of_relion(shared_data: Path) -> None:
    found = micrographs.read_micrographs(shared_data / "bgal_empiar10204/MotionCorr/job002/corrected_micrographs.star")
    assert len(found) == 24
    assert found["path"][0] == "MotionCorr/job002/Movies/20170629_00021_frameImage.mrc"
    assert found["motion_path"][0] == "MotionCorr/job002/Movies/20170629_00021_frameImage.star"
    assert found["motion_total_A"][0] == 16.420846
    assert found.optics["micrograph_original_pixel_size_A"].tolist() == [0.885]


@pytest.mark.skipif(shutil.which("relion_star_handler") is None, reason="RELION is not installed")
def test_relion_reads_our_micrographs(tmp_path: Path) -> None:
    written = two(flag=np.array(["", "bad"]), motion_total_A=np.ones(2), path=np.array(["M/a.mrc", "M/b.mrc"]))
    micrographs.write_micrographs(tmp_path / "m.star", written)
    command = ["relion_star_handler", "--i", "m.star", "--o", "out.star", "--select", "rlnAccumMotionTotal"]
    subprocess.run([*command, "--minval", "0"], cwd=tmp_path, check=True, capture_output=True)
    kept = star.read_blocks(tmp_path / "out.star")["micrographs"]
    assert kept.columns["rlnMicrographName"].tolist() == ["M/a.mrc", "M/b.mrc"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data_optics\nloop_\n_rlnOpticsGroup\n1\n", "no table has the column _rlnMicrographName"),
        ("data_micrographs\nloop_\n_rlnMicrographName\na.mrc\n", "expected a file of RELION 3.1 or later"),
        (
            "data_optics\nloop_\n_rlnOpticsGroup\n1\n\ndata_micrographs\nloop_\n_rlnMicrographName\n"
            "_rlnOpticsGroup\na.mrc 1\na.mrc 1\n",
            r"row 2, _rlnMicrographName: found 'a.mrc'; expected each micrograph once",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "m.star").write_text(text)
    with pytest.raises(InputError, match=told):
        micrographs.read_micrographs(tmp_path / "m.star")


def test_none_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there are no micrographs"):
        micrographs.write_micrographs(tmp_path / "m.star", two().take(np.zeros(2, bool)))


def test_files_are_found_from_the_directory_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "Motion").mkdir()
    (tmp_path / "Motion" / "a.mrc").touch()
    assert micrographs.find("Motion/a.mrc", tmp_path / "Ctf" / "m.star") == tmp_path / "Motion" / "a.mrc"
    assert micrographs.find("Motion/b.mrc", tmp_path / "Ctf" / "m.star") == Path("Motion/b.mrc")
