"""The command that compares two maps."""

import json
from pathlib import Path

import numpy as np
import pytest

from dcryo import cli
from dcryo.data import mrc
from dcryo.data.curves import read_curves
from dcryo.data.model import read_model
from dcryo.jobs.fsc import FscOptions, fsc_of_maps
from dcryo.kernels.density import gaussian_density

BOX, PIXEL = 24, 2.5


def noise(seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal((BOX,) * 3).astype(np.float32)


@pytest.fixture
def maps(tmp_path: Path) -> tuple[Path, Path]:
    """A signal that falls off with frequency in two portions of noise that do not, outside of a cube more of it."""
    frequency = np.fft.fftfreq(BOX)
    falling = np.exp(-60 * sum(np.meshgrid(*[frequency**2] * 3)))
    signal = np.fft.ifftn(np.fft.fftn(noise(0)) * falling).real
    outside = np.ones((BOX,) * 3)
    outside[6:18, 6:18, 6:18] = 0
    paths = tmp_path / "first.mrc", tmp_path / "second.mrc"
    for seed, path in enumerate(paths, start=1):
        mrc.write_map(path, signal + 0.02 * noise(seed) + 0.3 * outside * noise(seed + 10), PIXEL)
    return paths


def naive(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Shell by shell over the whole transform."""
    one, other = (np.fft.fftn(np.fft.ifftshift(volume)) for volume in (first, second))
    frequency = np.fft.fftfreq(BOX, 1 / BOX)
    radius = np.sqrt(sum(np.meshgrid(*[frequency**2] * 3)))
    curve = []
    for shell in range(BOX // 2 + 1):
        inside = np.floor(radius + 0.5) == shell
        cross = np.sum(one[inside] * other[inside].conj()).real
        curve.append(cross / np.sqrt(np.sum(np.abs(one[inside]) ** 2) * np.sum(np.abs(other[inside]) ** 2)))
    return np.array(curve)


def test_curve_file_and_what_is_printed(maps: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["fsc", *map(str, maps), "--out", str(out)]) == 0
    first, second = (mrc.read_map(path).array for path in maps)
    table = read_curves(out / "fsc.csv")
    assert list(table) == ["shell", "resolution_A", "frequency_1_A", "fsc_unmasked"]
    np.testing.assert_allclose(table["fsc_unmasked"], naive(first, second), atol=1e-5)
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "done" and len(record["inputs"]) == 2
    figures = record["result"]
    below = int(np.argmax(table["fsc_unmasked"] < 0.5))
    assert BOX * PIXEL / below < figures["resolution_half_A"] <= BOX * PIXEL / (below - 1)
    assert figures["resolution_A"] < figures["resolution_half_A"]
    printed = capsys.readouterr().out
    assert f"FSC 0.143 at {figures['resolution_A']:.2f} A, 0.5 at {figures['resolution_half_A']:.2f} A" in printed


def test_a_mask_takes_the_noise_away(maps: tuple[Path, Path], tmp_path: Path) -> None:
    mask = np.zeros((BOX,) * 3, np.float32)
    mask[6:18, 6:18, 6:18] = 1
    mrc.write_map(tmp_path / "mask.mrc", mask, PIXEL)
    plain = fsc_of_maps(FscOptions(first=maps[0], second=maps[1], out=tmp_path / "a"))
    masked = fsc_of_maps(FscOptions(first=maps[0], second=maps[1], mask=tmp_path / "mask.mrc", out=tmp_path / "b"))
    assert masked.resolution_A < plain.resolution_A
    first, second = (mrc.read_map(path).array * mask for path in maps)
    table = read_curves(tmp_path / "b" / "fsc.csv")
    np.testing.assert_allclose(table["fsc_masked"], naive(first, second), atol=1e-5)
    np.testing.assert_array_equal(table["fsc_unmasked"], read_curves(tmp_path / "a" / "fsc.csv")["fsc_unmasked"])


def test_a_map_with_itself_and_with_noise(maps: tuple[Path, Path], tmp_path: Path) -> None:
    same = fsc_of_maps(FscOptions(first=maps[0], second=maps[0], out=tmp_path / "a"))
    np.testing.assert_allclose(same.fsc, 1, atol=1e-6)
    assert same.resolution_A == same.resolution_half_A == 2 * PIXEL
    for seed in (1, 2):
        mrc.write_map(tmp_path / f"{seed}.mrc", noise(seed), PIXEL)
    other = fsc_of_maps(FscOptions(first=tmp_path / "1.mrc", second=tmp_path / "2.mrc", out=tmp_path / "b"))
    assert np.abs(other.fsc[3:]).max() < 0.2
    assert other.resolution_A > 15


@pytest.mark.parametrize(
    ("array", "voxel", "said"),
    [
        (np.zeros((BOX + 2,) * 3), PIXEL, "(26, 26, 26) voxels, but"),
        (noise(3), 3.0, "voxels of 3 A, but"),
        (noise(3)[:-2], PIXEL, "expected a cube"),
    ],
)
@pytest.mark.parametrize("place", ["second", "mask"])
def test_maps_that_do_not_fit(maps, tmp_path: Path, capsys, place: str, array, voxel: float, said: str) -> None:
    mrc.write_map(tmp_path / "other.mrc", array, voxel)
    given = {"second": [maps[0], tmp_path / "other.mrc"], "mask": [*maps, "--mask", tmp_path / "other.mrc"]}[place]
    out = tmp_path / "out"
    assert cli.main(["fsc", *map(str, given), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'other.mrc'}: " in error and said in error
    assert not out.exists()


def test_resuming_what_is_done_changes_nothing(maps: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    command = ["fsc", *map(str, maps), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").iterdir()}
    assert cli.main([*command, "--resume"]) == 0
    assert capsys.readouterr().out == printed
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").iterdir()} == before
    assert cli.main(command) == 2
    assert cli.main(["fsc", str(maps[0]), str(maps[0]), "--out", str(tmp_path / "out"), "--resume"]) == 2
    assert "its digest differs" in capsys.readouterr().err
    assert cli.main(["fsc", str(maps[0]), str(maps[0]), "--out", str(tmp_path / "out"), "--overwrite"]) == 0


def write_pdb(path: Path, position_A: np.ndarray) -> Path:
    rows = [f"ATOM  {n:5d}  CA  ALA A{n:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 40.00           C"
            for n, (x, y, z) in enumerate(position_A, start=1)]  # fmt: skip
    path.write_text("\n".join([*rows, "END", ""]))
    return path


@pytest.mark.parametrize("origin_A", [(0.0, 0.0, 0.0), (-20.0, 5.0, 11.0)])
def test_a_map_and_the_model_that_it_was_made_of(tmp_path: Path, origin_A: tuple[float, float, float]) -> None:
    centre_A = BOX // 2 * PIXEL + np.array(origin_A)
    place = np.random.Generator(np.random.Philox(key=9)).normal(0, 7, (60, 3)).round(3)
    model = write_pdb(tmp_path / "model.pdb", place + centre_A)
    atoms = read_model(model)
    made = gaussian_density(place, atoms.amplitude, atoms.bfactor_A2, BOX, PIXEL)
    mrc.write_map(tmp_path / "map.mrc", made, PIXEL, origin_A)
    found = fsc_of_maps(FscOptions(first=tmp_path / "map.mrc", second=model, out=tmp_path / "out"))
    np.testing.assert_allclose(found.fsc[1:], 1, atol=1e-4)
    moved = write_pdb(tmp_path / "moved.pdb", place + centre_A + np.array([2.0, 0.0, 0.0]))
    apart = fsc_of_maps(FscOptions(first=tmp_path / "map.mrc", second=moved, out=tmp_path / "moved"))
    # Moved by d, a shell at k keeps the mean of the cosine over directions, sin(2 pi k d) / (2 pi k d).
    k = np.arange(BOX // 2 + 1) / (BOX * PIXEL)
    np.testing.assert_allclose(apart.fsc[3:], np.sinc(2 * k * 2.0)[3:], atol=0.08)


def test_a_model_outside_the_map(maps: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    model = write_pdb(tmp_path / "model.pdb", np.array([[30.0, 30.0, 30.0], [99.0, 30.0, 30.0]]))
    assert cli.main(["fsc", str(maps[0]), str(model), "--out", str(tmp_path / "out")]) == 2
    assert f"{model}: 1 of 2 atoms lie outside the map" in capsys.readouterr().err
