"""RELION's post-processing files, and the curves that its tutorial published."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from dcryo.data.mtf import read_mtf
from dcryo.data.postprocess_star import read_postprocess_star, write_postprocess_star
from dcryo.errors import InputError
from dcryo.kernels import fsc, mask_effect, sharpening

JOBS = {"job021": 3.03, "job026": 2.98, "job030": 2.82}


@pytest.fixture(scope="module")
def published(shared_data: Path, tmp_path_factory) -> Path:
    """Folder with NAME.star of the post-processing jobs of RELION 4's tutorial."""
    out = tmp_path_factory.mktemp("published")
    with tarfile.open(shared_data / "relion4_tutorial_metadata" / "relion_tutorial_files.tar.xz") as archive:
        for name in JOBS:
            member = archive.extractfile(f"PostProcess/{name}/postprocess.star")
            assert member is not None
            (out / f"{name}.star").write_bytes(member.read())
    return out


@pytest.mark.parametrize("name", JOBS)
def test_published_curves_are_corrected_alike(published: Path, name: str) -> None:
    general, curves, _ = read_postprocess_star(published / f"{name}.star")
    shell = mask_effect.randomised_from(curves["fsc_unmasked"])
    assert shell is not None
    assert 1 / curves["frequency_1_A"][shell] == pytest.approx(float(general["randomised_from_A"]), rel=1e-5)
    found = mask_effect.corrected(curves["fsc_masked"], curves["fsc_randomised"], shell)
    np.testing.assert_allclose(found, curves["fsc_corrected"], atol=1e-5)
    box = 2 * (len(found) - 1)
    pixel_A = 1 / (curves["frequency_1_A"][-1] * 2)
    said_A = float(general["resolution_A"])
    assert said_A == pytest.approx(JOBS[name], abs=0.01)
    # RELION names the last shell that is not below; where it falls is between that and the next.
    next_A = 1 / (1 / said_A + curves["frequency_1_A"][1])
    assert next_A - 1e-4 <= fsc.resolution_at(found, fsc.GOLD_STANDARD, box, pixel_A) <= said_A + 1e-4


@pytest.mark.parametrize("name", JOBS)
def test_published_guinier_plots_have_the_published_slope(published: Path, name: str) -> None:
    general, _, guinier = read_postprocess_star(published / f"{name}.star")
    frequency, weighted = np.sqrt(guinier["resolution_squared_1_A2"]), guinier["weighted"]
    known = np.isfinite(weighted)
    amplitude = np.where(known, np.exp(np.where(known, weighted, 0)), 0)
    fit = sharpening.guinier_fit(amplitude, frequency, 1 / frequency[known].max())
    assert fit is not None
    assert fit.bfactor_A2 == pytest.approx(float(general["bfactor_A2"]), rel=1e-4)
    assert fit.intercept == pytest.approx(float(general["intercept"]), abs=1e-4)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    shells = np.arange(9)
    curves = {name: 1 / (1 + shells * n) for n, name in
              enumerate(("fsc_corrected", "fsc_unmasked", "fsc_masked", "fsc_randomised"), 1)}  # fmt: skip
    guinier = {name: -shells * 0.5 for name in ("original", "weighted", "sharpened", "intercept")}
    guinier["weighted"] = np.where(shells == 8, -np.inf, guinier["weighted"])
    path = tmp_path / "postprocess.star"
    write_postprocess_star(path, 16, 2.0, {"resolution_A": 4.5, "mask": "a b/mask.mrc"}, curves, guinier)
    general, read, plot = read_postprocess_star(path)
    assert float(general["resolution_A"]) == 4.5 and general["mask"] == "a b/mask.mrc"
    for name, values in curves.items():
        np.testing.assert_allclose(read[name], values, rtol=1e-9)
    np.testing.assert_allclose(read["frequency_1_A"], shells / 32)
    np.testing.assert_allclose(plot["resolution_squared_1_A2"], (shells / 32) ** 2)
    assert np.isnan(plot["weighted"][8]) and plot["weighted"][7] == -3.5


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.star"
    path.write_text("data_fsc\n\nloop_\n_rlnSpectralIndex #1\n0\n")
    with pytest.raises(InputError, match="no table data_general"):
        read_postprocess_star(path)


def mtf(path: Path, rows: str) -> Path:
    path.write_text(f"data_\n\nloop_\n_rlnResolutionInversePixel #1\n_rlnMtfValue #2\n{rows}\n")
    return path


def test_mtf(tmp_path: Path) -> None:
    frequency, value = read_mtf(mtf(tmp_path / "a.star", "0 1\n0.25 0.8\n0.5 0.5"))
    np.testing.assert_allclose(frequency, [0, 0.25, 0.5])
    np.testing.assert_allclose(value, [1, 0.8, 0.5])


@pytest.mark.parametrize(
    ("rows", "said"),
    [("0 1\n0.5 0", "row 2, _rlnMtfValue: found 0"), ("0.5 1\n0 0.5", "does not rise"), ("0 1\n0.5 a", "numbers")],
)
def test_mtf_that_is_none(tmp_path: Path, rows: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_mtf(mtf(tmp_path / "a.star", rows))


def test_star_without_mtf(tmp_path: Path) -> None:
    path = tmp_path / "a.star"
    path.write_text("data_a\n\n_rlnX 1\n")
    with pytest.raises(InputError, match="MTF of a detector"):
        read_mtf(path)
