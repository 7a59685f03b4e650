"""Sections of the page on post-processing, also where there is little to show, and RELION's published curves drawn."""

import base64
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dcryo import figures, report_postprocess
from dcryo.data.curves import write_curves
from dcryo.data.postprocess_star import read_postprocess_star
from dcryo.report import warnings_of


def svg(picture: str) -> str:
    return base64.b64decode(picture.partition(",")[2]).decode()


def test_published_curves_are_drawn(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "relion4_tutorial_metadata" / "relion_tutorial_files.tar.xz") as archive:
        member = archive.extractfile("PostProcess/job030/postprocess.star")
        assert member is not None
        (tmp_path / "published.star").write_bytes(member.read())
    general, curves, guinier = read_postprocess_star(tmp_path / "published.star")
    frequency, resolution_A = curves.pop("frequency_1_A"), float(general["resolution_A"])
    legends = {report_postprocess.LEGENDS[name]: values for name, values in curves.items()}
    band = curves["fsc_corrected"] - 0.02, curves["fsc_corrected"] + 0.02
    drawn = svg(figures.half_map_fsc(frequency, legends, "corrected", band, np.full(len(frequency), 0.2), resolution_A))
    assert "2.82 Å" in drawn and "random phases, masked" in drawn
    drawn = svg(figures.guinier(frequency, guinier, float(general["slope_A2"]), (10.0, resolution_A), resolution_A))
    assert "weighted" in drawn and "fit" in drawn


@pytest.mark.parametrize("resolution_A", [None, 6.0])
def test_curves_of_a_run_with_and_without_a_resolution(tmp_path: Path, resolution_A: float | None) -> None:
    shells = np.arange(17)
    names = ["fsc_corrected", "fsc_masked", "fsc_randomised", "fsc_spherical", "fsc_unmasked", "low_95", "high_95",
             "half_bit", "independent_voxels"]  # fmt: skip
    write_curves(tmp_path / "fsc.csv", 32, 2.0, {name: 1 / (1 + shells * n / 9) for n, name in enumerate(names, 1)})
    result = {"resolution_A": resolution_A, "randomised_from_A": 12.0}
    result |= {"resolution_worst_A": resolution_A and 6.5, "resolution_best_A": resolution_A}
    made = report_postprocess.fourier_shell_correlation(tmp_path, {"result": result})
    assert made is not None
    assert ("6.00 Å" in svg(made[0])) == (resolution_A is not None)
    assert ("between 6.50 and 6.00" in made[1]) == (resolution_A is not None) and "random beyond 12.0" in made[1]
    assert report_postprocess.guinier(tmp_path, {"result": result, "options": {}}) is None
    assert report_postprocess.sharpened_map(tmp_path, {}) is None


def test_what_is_wrong_and_what_the_archives_ask_for() -> None:
    assert warnings_of({"result": {}}) == []
    assert warnings_of({"result": {"warnings": []}}) == [["Nothing was found to be wrong."]]
    assert warnings_of({"result": {"warnings": ["a", "b"]}}) == [["a"], ["b"]]
    assert report_postprocess.deposition({"result": {"resolution_A": None}}) == ()
    result = {"resolution_A": 3.456, "resolution_by": "corrected FSC", "mask": "automatic", "mask_volume_A3": 5.1e5,
              "symmetry": "D2", "box_px": 64, "pixel_size_A": 1.2, "contour_level": 0.0123,
              "bfactor_A2": -87.4}  # fmt: skip
    inputs = [{"path": "/a/half1.mrc"}, {"path": "/a/half2.mrc"}]
    rows = dict(report_postprocess.deposition({"result": result, "inputs": inputs})[1:])
    assert rows["Resolution"] == "3.46 Å" and rows["Sharpening B-factor"] == "-87.4 Å²"
    assert rows["Half maps, unfiltered and unmasked"] == "half1.mrc, half2.mrc" and "510 nm³" in rows["Mask"]
