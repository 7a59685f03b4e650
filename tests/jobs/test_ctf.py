from pathlib import Path

import mrcfile
import numpy as np
import pytest
from thon_rings import Truth, angle_between, micrograph

from dcryo.cli import main
from dcryo.data import mrc
from dcryo.data.items import arrays_of
from dcryo.data.micrographs import read_micrographs, write_micrographs
from dcryo.data.particles import Micrographs
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.ctf import CtfOptions, ctf

TRUTHS = {"b": Truth(15300, 14900, 30), "a": Truth(9200, 9000, 150)}
"""Of the good micrographs; their order is not that of their names."""


def quiet(line: str, end: str = "\n") -> None:
    pass


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """b.mrc and a.mrc, in this order good; noise.mrc, bad.mrc with a pixel that is not finite, and cut.mrc."""
    folder = tmp_path_factory.mktemp("images")
    for name, truth in TRUTHS.items():
        save(folder / f"{name}.mrc", micrograph(truth, side_px=1024, pixel_size_A=1.4, signal=4.0))
    noise = np.random.Generator(np.random.Philox(key=3)).standard_normal((1024, 1024)).astype(np.float32)
    save(folder / "noise.mrc", noise)
    noise[17, 3] = np.nan
    save(folder / "bad.mrc", noise)
    (folder / "cut.mrc").write_bytes((folder / "b.mrc").read_bytes()[:100_000])
    return folder


def save(path: Path, image: np.ndarray) -> None:
    with mrcfile.new(path, image) as file:
        file.voxel_size = 1.4


@pytest.fixture
def star(images: Path, tmp_path: Path) -> Path:
    """A STAR file of all, whose names are relative to the directory above it."""
    names = [*TRUTHS, "noise", "bad", "cut"]
    table = Micrographs(
        {
            "path": np.array([str(images / f"{name}.mrc") for name in names]),
            "optics_row": np.zeros(len(names)),
            "motion_total_A": np.arange(5.0),
        },
        {
            "group": np.ones(1), "voltage_kV": np.array([300.0]), "spherical_aberration_mm": np.array([2.7]),
            "amplitude_contrast": np.array([0.1]), "micrograph_pixel_size_A": np.array([1.4]),
        },
        {"rlnSomethingElse": np.array(list("vwxyz"))},
    )  # fmt: skip
    path = tmp_path / "micrographs.star"
    write_micrographs(path, table)
    return path


def test_a_table_comes_out_with_fits_and_flags(star: Path, tmp_path: Path) -> None:
    result = ctf(CtfOptions(micrographs=(star,), out=tmp_path / "out", local=2), progress=quiet)
    table = read_micrographs(tmp_path / "out" / "micrographs.star")
    assert [Path(path).stem for path in table["path"]] == ["b", "a", "noise", "bad", "cut"]
    np.testing.assert_array_equal(table["motion_total_A"], np.arange(5.0))
    assert table.extra["rlnSomethingElse"].tolist() == list("vwxyz")
    for row, truth in enumerate(TRUTHS.values()):
        assert table["defocus_u_A"][row] == pytest.approx(truth.u_A, abs=50)
        assert table["defocus_v_A"][row] == pytest.approx(truth.v_A, abs=50)
        assert angle_between(table["defocus_angle_deg"][row], truth.angle_deg) < 5
    assert table["flag"][:2].tolist() == ["", ""] and "phase_shift_deg" not in table
    assert table["flag"][2].startswith("no Thon rings") and table["flag"][3] == "1 pixels are not finite"
    assert "cut.mrc" in table["flag"][4]
    assert (table["ctf_resolution_A"][:2] < 5).all() and (table["ctf_score"][:2] > 0.2).all()
    assert (result.flagged, result.median_resolution_A) == (3, pytest.approx(table["ctf_resolution_A"][:2].mean()))
    record = Run.open(tmp_path / "out").record
    assert record["status"] == "done" and record["result"]["flagged"] == 3
    assert [row["image"] for row in record["quarantined"]] == ["bad", "cut", "noise"]


def test_what_is_left_of_a_micrograph_to_look_at(star: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ctf(CtfOptions(micrographs=(star,), out=out), progress=quiet)
    assert sorted(path.name for path in out.glob("*.mrc")) == ["a_ctf.mrc", "b_ctf.mrc", "noise_ctf.mrc"]
    assert mrcfile.validate(out / "b_ctf.mrc")
    stack = mrc.open_stack(out / "b_ctf.mrc")
    side = stack.shape[0]
    assert stack.n == 1 and stack.shape == (side, side)
    # The edge of the picture is the frequency up to which spectra are kept, 3 A.
    assert 2.0 * stack.voxel_size_A == pytest.approx(3.0, rel=0.02)
    # Its right half is CTF^2: dark in the middle and where the CTF is 0.
    assert stack.read([0])[0][side // 2, side // 2] == pytest.approx(0.01, abs=1e-3)
    arrays = arrays_of(out, "b")
    assert arrays["picture"].shape[0] == arrays["picture"].shape[1] <= 300 and arrays["picture"].dtype == np.float16
    middle = len(arrays["picture"]) // 2
    assert arrays["picture"][middle, middle] < 0.2 and arrays["picture"][middle, middle + 1 :].max() > 0.9
    lengths = {len(arrays[name]) for name in ("frequency_1_A", "spectrum", "fit", "quality")}
    assert len(lengths) == 1 and arrays["frequency_1_A"][-1] == pytest.approx(1 / 3, rel=0.02)
    assert np.nanmax(arrays["quality"]) > 0.9


def test_the_same_bits_from_processes_and_after_an_interruption(star: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ctf(CtfOptions(micrographs=(star,), out=one, workers=1), progress=quiet)

    def interrupting(line: str, end: str = "\n") -> None:
        if line.startswith("2 done"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ctf(CtfOptions(micrographs=(star,), out=two, workers=1), progress=interrupting)
    ctf(CtfOptions(micrographs=(star,), out=two, cluster="processes", workers=2, resume=True), progress=quiet)
    # The paths of the two runs differ.
    tables = [(out / "micrographs.star").read_text().replace(str(out), "") for out in (one, two)]
    assert tables[0] == tables[1]
    for name in ("a", "b", "noise"):
        assert (one / f"{name}_ctf.mrc").read_bytes() == (two / f"{name}_ctf.mrc").read_bytes()


def test_image_files_need_their_optics(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ctf", str(images / "b.mrc"), "--out", str(tmp_path / "out")]
    assert main(words) == 2 and "--voltage" in capsys.readouterr().err
    words += ["--voltage", "300"]
    assert main(words) == 2 and "--spherical-aberration" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    words += ["--spherical-aberration", "2.7", "--phase-plate", "--max-phase-shift", "90"]
    assert main(words) == 0 and "1 of 1 micrographs are good" in capsys.readouterr().out
    table = read_micrographs(tmp_path / "out" / "micrographs.star")
    assert 0 <= table["phase_shift_deg"][0] < 180


def test_options_that_contradict_one_another_are_refused(star: Path, tmp_path: Path) -> None:
    for wrong, told in (
        ({"min_defocus_A": 20000, "max_defocus_A": 10000}, "--max-defocus"),
        ({"highest_resolution_A": 25}, "--highest-resolution"),
        ({"phase_plate": True, "min_phase_shift_deg": 100, "max_phase_shift_deg": 90}, "--max-phase-shift"),
        ({"max_phase_shift_deg": 200}, "--max-phase-shift"),
        ({"power_spectra": True, "local": 3}, "--local"),
    ):
        with pytest.raises(ValueError, match=told):
            CtfOptions(micrographs=(star,), out=tmp_path / "out", **wrong)
    with pytest.raises(InputError, match="rlnCtfPowerSpectrum"):
        ctf(CtfOptions(micrographs=(star,), out=tmp_path / "out", power_spectra=True), progress=quiet)


def test_real_spectra_of_a_project(shared_data: Path, tmp_path: Path) -> None:
    star = shared_data / "bgal_empiar10204/MotionCorr/job002/corrected_micrographs.star"
    result = ctf(CtfOptions(micrographs=(star,), out=tmp_path / "out", power_spectra=True), progress=quiet)
    table = result.micrographs
    # Five of the spectra are there; the others' rows stay, flagged.
    good = table["flag"] == ""
    assert len(table) == 24 and good.sum() == 5
    refined = [10752.5, 9694.5, 10496.0, 11503.0, 10517.0]
    np.testing.assert_allclose((table["defocus_u_A"] + table["defocus_v_A"])[good] / 2, refined, rtol=0.01)
