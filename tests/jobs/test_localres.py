"""The command that makes a map of local resolution."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo import cli
from dcryo.data import mrc
from dcryo.jobs.localres import LocalResolutionOptions, localres
from dcryo.kernels.masks import sphere

BOX, PIXEL = 48, 2.0
FILES = ("localres.mrc", "map_local.mrc", "mask.mrc")


def noise(seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal((BOX,) * 3).astype(np.float32)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ball of signal that is as sharp as the box allows on one side, in two portions of noise."""
    folder = tmp_path_factory.mktemp("halves")
    frequency = np.fft.fftfreq(BOX)
    falling = np.exp(-120 * sum(np.meshgrid(*[frequency**2] * 3)))
    draw = 3 * noise(0)
    blurred = np.fft.ifftn(np.fft.fftn(draw) * falling).real
    signal = np.where(np.arange(BOX)[:, None, None] < BOX // 2, blurred, draw) * sphere(BOX, 30, 4)
    paths = folder / "half1.mrc", folder / "half2.mrc"
    for seed, path in enumerate(paths, start=1):
        mrc.write_map(path, (signal + noise(seed)).astype(np.float32), PIXEL)
    return paths


def test_what_the_command_writes(halves: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["localres", *map(str, halves), "--out", str(out), "--window", "21"]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "done" and len(record["inputs"]) == 2
    figures = record["result"]
    resolution = mrc.read_map(out / "localres.mrc")
    assert resolution.voxel_size_A == pytest.approx(PIXEL)
    inside = resolution.array[mrc.read_map(out / "mask.mrc").array > 0.5]
    assert figures["local_50_percent_A"] == pytest.approx(np.median(inside), rel=1e-4)
    middle = BOX // 2
    sharp, blurred = (resolution.array[middle + offset, middle, middle] for offset in (9, -9))
    empty = resolution.array[3, 3, 3]
    assert 2 * PIXEL <= sharp < 4.6 and 6 < blurred < 20 and empty > 20
    # Noise outside of the ball is filtered away.
    filtered, mean = mrc.read_map(out / "map_local.mrc").array, sum(mrc.read_map(path).array for path in halves) / 2
    corner = (slice(0, 8),) * 3
    assert filtered[corner].std() < 0.3 * mean[corner].std()
    assert f"{figures['local_50_percent_A']:.2f} A" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "Local resolution" in page and "could not be shown" not in page.lower()


def test_a_run_is_taken_with_its_mask(halves: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    record = {"job": "refine", "options": {"symmetry": "C1"}, "inputs": [], "status": "done"}
    (run / "run.json").write_text(json.dumps(record))
    for path in halves:
        (run / path.name).write_bytes(path.read_bytes())
    mrc.write_map(run / "mask.mrc", sphere(BOX, 36, 4), PIXEL)
    made = localres(LocalResolutionOptions(source=run, out=tmp_path / "out"), progress=tiny.quiet)
    np.testing.assert_array_equal(mrc.read_map(tmp_path / "out" / "mask.mrc").array, sphere(BOX, 36, 4))
    given = LocalResolutionOptions(
        source=halves[0], half2=halves[1], mask=run / "mask.mrc", out=tmp_path / "files", workers=1
    )
    again = localres(given, progress=tiny.quiet)
    # Also the same bits on one worker as on several.
    np.testing.assert_array_equal(made.resolution_A, again.resolution_A)
    np.testing.assert_array_equal(made.map, again.map)


def test_processes_give_the_same_bits(halves: tuple[Path, Path], tmp_path: Path) -> None:
    for name, cluster in (("a", "threads"), ("b", "processes")):
        options = LocalResolutionOptions(
            source=halves[0], half2=halves[1], out=tmp_path / name, cluster=cluster, workers=2
        )
        localres(options, progress=tiny.quiet)
    assert tiny.digests(tmp_path / "a", FILES) == tiny.digests(tmp_path / "b", FILES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{small}"], "name both"),
        (["{first}", "{first}"], "the same map as"),
        (["{first}", "{small}"], "resample one of them"),
        (["{first}", "{flat}"], "the map is constant"),
        (["{first}", "{second}", "--mask", "{second}"], "expected 0 (solvent) to 1 (particle)"),
        (["{first}", "{second}", "--window", "90"], "--window 90 A: windows of 45 px in a box of 48 px"),
        (["{folder}", "{second}"], "name a run or two half maps"),
        (["{folder}"], "not a run directory"),
    ],
)
def test_what_is_refused(halves: tuple[Path, Path], tmp_path: Path, capsys, words: list[str], said: str) -> None:
    mrc.write_map(tmp_path / "small.mrc", noise(9)[:40, :40, :40], PIXEL)
    mrc.write_map(tmp_path / "flat.mrc", np.ones((BOX,) * 3, np.float32), PIXEL)
    (tmp_path / "folder").mkdir()
    names = {name: tmp_path / f"{name}.mrc" for name in ("small", "flat")}
    names |= {"first": halves[0], "second": halves[1], "folder": tmp_path / "folder"}
    out = tmp_path / "out"
    assert cli.main(["localres", *(word.format(**names) for word in words), "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
