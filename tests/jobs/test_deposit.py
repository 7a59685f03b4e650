"""The folder for a deposition: complete, readable by others, and refused where something does not fit."""

import hashlib
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import mrcfile
import noisy_halves
import numpy as np
import pytest
import tiny
from PIL import Image

from dcryo import cli
from dcryo.data import mrc
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.deposit import DepositOptions, deposit
from dcryo.jobs.postprocess import PostprocessOptions, postprocess
from dcryo.kernels.masks import sphere

BOX, PIXEL = 48, 3.0
MAPS = ("primary_map.mrc", "half_map_1.mrc", "half_map_2.mrc", "mask.mrc")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a run of refine leaves of maps, and its postprocess."""
    folder = tmp_path_factory.mktemp("deposit")
    refined = folder / "refined"
    run = Run.start(refined, "refine", {"symmetry": "C1"})
    truth = noisy_halves.blurred(density(), PIXEL, 100.0)
    halves = noisy_halves.noisy_halves(truth, noisy_halves.noise_power(truth, PIXEL, 8.0), 1)
    for number, half in enumerate(halves, start=1):
        mrc.write_map(refined / f"half{number}.mrc", half, PIXEL)
    run.done({"symmetry": "C1", "mask_diameter_A": 100.0})
    postprocess(PostprocessOptions(source=refined, out=folder / "sharp"), progress=tiny.quiet)
    return folder


def density() -> np.ndarray:
    draw = np.random.Generator(np.random.Philox(key=5))
    axis = np.arange(BOX) - BOX // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    places = draw.normal(0, 5, (80, 3))
    volume = sum(np.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 3) for a, b, c in places)
    return volume.astype(np.float32)


def test_the_folder_is_complete_and_others_read_it(runs: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["deposit", str(runs / "sharp"), "--out", str(out)]) == 0
    for name in MAPS:
        assert mrcfile.validate(out / name)
        with mrcfile.open(out / name) as opened:
            assert opened.data.shape == (BOX,) * 3 and opened.voxel_size.x == pytest.approx(PIXEL)
    points = ElementTree.parse(out / "fsc.xml").getroot().findall("coordinate")
    assert len(points) == BOX // 2 + 1
    with Image.open(out / "image.png") as picture:
        picture.load()
        assert picture.size == (600, 600) and np.asarray(picture).std() > 20
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    content = json.loads((out / "emdb.json").read_text())
    answers = {row["item"]: row["answer"] for row in content["answers"]}
    result = Run.open(runs / "sharp").record["result"]
    assert answers["em_map.contour_level"] == result["contour_level"]
    assert answers["em_3d_reconstruction.resolution"] == round(result["resolution_A"], 2)
    # What is not known is asked for and not made up.
    assert "em_3d_reconstruction.num_particles" not in answers
    words = (out / "emdb.md").read_text()
    assert "em_3d_reconstruction.num_particles" in words and "Detector" in words
    assert [row["category"].split()[0] for row in content["software"]] == ["FINAL", "MASK,"]
    assert "answers are yours" in capsys.readouterr().out


def test_what_does_not_fit_is_refused(runs: Path, tmp_path: Path) -> None:
    def refused(source: Path, message: str, **more: Path) -> None:
        with pytest.raises(InputError, match=message):
            deposit(DepositOptions(source=source, out=tmp_path / "out", **more), progress=tiny.quiet)
        assert not (tmp_path / "out").exists()

    refused(runs / "refined", "expected one of postprocess")
    refused(runs / "sharp", "not a run of localres", localres=runs / "refined")
    refused(runs / "sharp", "is gone", refined=tmp_path)
    changed = tmp_path / "changed"
    shutil.copytree(runs / "refined", changed)
    mrc.write_map(changed / "half2.mrc", mrc.read_map(changed / "half2.mrc").array + 1, PIXEL)
    refused(runs / "sharp", "digest differs", refined=changed)
    smaller = tmp_path / "smaller"
    shutil.copytree(runs / "sharp", smaller)
    mrc.write_map(smaller / "map_sharp.mrc", np.ones((40,) * 3, dtype=np.float32), PIXEL)
    refused(smaller, "resample one")
    mrc.write_map(smaller / "map_sharp.mrc", np.ones((BOX,) * 3, dtype=np.float32), PIXEL, (9.0, 0.0, 0.0))
    refused(smaller, "lie on one another")
    (smaller / "mask.mrc").unlink()
    refused(smaller, "not there")


def test_masked_half_maps_are_refused(runs: Path, tmp_path: Path) -> None:
    masked = tmp_path / "masked"
    masked.mkdir()
    for number in (1, 2):
        half = mrc.read_map(runs / "refined" / f"half{number}.mrc").array
        mrc.write_map(masked / f"half{number}.mrc", half * sphere(BOX, 30, 3), PIXEL)
    made = postprocess(
        PostprocessOptions(source=masked / "half1.mrc", out=tmp_path / "sharp", mask_diameter_A=95.0),
        progress=tiny.quiet,
    )
    assert made.resolution_A is not None
    with pytest.raises(InputError, match="were masked"):
        deposit(DepositOptions(source=tmp_path / "sharp", out=tmp_path / "out"), progress=tiny.quiet)
