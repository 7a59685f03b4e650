"""The first thing a new user runs."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo import cli
from dcryo.data import mrc, star
from dcryo.data.curves import read_curves
from dcryo.data.run import Run
from dcryo.jobs import demo as demo_module
from dcryo.jobs.demo import DemoOptions, demo
from dcryo.kernels import fsc

WORDS = ["--particles", "120", "--box", "40", "--snr", "1", "--symmetry", "D2"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert cli.main(["demo", "--out", str(out), *WORDS]) == 0
    return out


def test_the_map_is_the_truth(out: Path) -> None:
    figures = Run.open(out).record["result"]
    assert figures["resolution_A"] < 6.7 and figures["resolution_against_truth_A"] < 6.7
    assert figures["median_angular_error_deg"] < 5
    truth = mrc.read_map(out / "simulated" / "truth.mrc")
    found = mrc.read_map(out / "refined" / "map.mrc")
    mask = mrc.read_map(out / "refined" / "mask.mrc").array
    assert found.voxel_size_A == truth.voxel_size_A == 3
    curve = fsc.shell_correlation(found.array * mask, truth.array * mask)
    assert curve[:16].min() > 0.8
    np.testing.assert_allclose(read_curves(out / "refined" / "fsc_truth.csv")["fsc_masked"], curve, atol=1e-6)


def test_everything_is_where_the_contract_says(out: Path) -> None:
    for name in ("simulated", "refined", "particles.zarr"):
        assert Run.open(out / name).record["status"] == "done"
        assert (out / name / "report.html").stat().st_size > 10_000
    assert Run.open(out).record["status"] == "done" and (out / "report.html").is_file()
    assert all((out / "refined" / name).is_file() for name in tiny.REFINED)
    assert len(star.read_particles(out / "refined" / "particles.star")) == 120
    assert not [path for path in out.rglob("*") if path.name == "scratch" or path.suffix == ".tmp"]


def test_what_is_printed_is_what_was_found(out: Path, capsys) -> None:
    """Also by a demonstration that is resumed when it is done, which changes no map."""
    before = tiny.digests(out / "refined")
    assert cli.main(["demo", "--out", str(out), *WORDS, "--resume"]) == 0
    printed, figures = capsys.readouterr().out, Run.open(out).record["result"]
    assert f"resolution by FSC 0.143 of the half maps: {figures['resolution_A']:.2f} A" in printed
    assert f"FSC 0.5 against the known truth: {figures['resolution_against_truth_A']:.2f} A" in printed
    assert f"median error of the orientations: {figures['median_angular_error_deg']:.2f} degrees" in printed
    assert str(out / "refined" / "map.mrc") in printed and str(out / "refined" / "report.html") in printed
    assert tiny.digests(out / "refined") == before


@pytest.mark.slow
def test_a_demonstration_that_was_stopped_goes_on(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the import: what is there is not made again, and the maps are those of one that was not stopped."""
    options = DemoOptions(out=tmp_path / "out", particles=120, box_px=40, snr=1.0, symmetry="D2")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo_module, "refine", stop)
        demo(options, progress=tiny.quiet)
    assert Run.open(options.out).record["error"] == "interrupted"
    stack = options.out / "simulated" / "particles.mrcs"
    written = stack.stat().st_mtime_ns
    result = demo(options.model_copy(update={"resume": True}), progress=tiny.quiet)
    assert stack.stat().st_mtime_ns == written
    assert tiny.digests(options.out / "refined") == tiny.digests(out / "refined")
    assert result.resolution_A == Run.open(out).record["result"]["resolution_A"]


@pytest.mark.parametrize("words", [["--symmetry", "X"], ["--cluster", "cloud"], ["--box", "8"], ["--snr", "0"]])
def test_bad_options_are_refused_before_anything_is_made(tmp_path: Path, words: list[str], capsys) -> None:
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *words]) == 2
    assert words[1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
