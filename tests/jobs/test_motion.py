import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import tifffile
from movie_making import REAL_TRACK_PX, make_movie

from dcryo import cli
from dcryo.data import micrographs
from dcryo.data.items import arrays_of
from dcryo.data.motion import read_motion
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs import micrographs as shared
from dcryo.jobs.motion import MotionOptions, motion
from dcryo.kernels.detector import orient_gain

FRAMES = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three movies of 10 frames: MRC, and two TIFF."""
    where = tmp_path_factory.mktemp("movies")
    for number in (1, 2, 3):
        frames = make_movie((300, 340), REAL_TRACK_PX[:FRAMES], None, seed=number, contrast=0.15).frames
        if number == 1:
            with mrcfile.new(where / "m1.mrcs") as file:
                file.set_data(frames.astype(np.int8))
                file.voxel_size = 0.885
        else:
            with tifffile.TiffWriter(where / f"m{number}.tif") as file:
                for frame in frames:
                    file.write(frame[::-1], compression="lzw", contiguous=False)
    return where


def quiet(line: str, end: str = "\n") -> None:
    pass


def run(folder: Path | tuple[str, ...], out: Path, **more: Any) -> Path:
    given = {"dose_per_frame_e_A2": 1.277, "pixel_size_A": 0.885, "voltage_kV": 200.0, "workers": 2} | more
    words = folder if isinstance(folder, tuple) else (str(folder),)
    motion(MotionOptions(movies=words, out=out, **given), progress=quiet)
    return out


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".mrc", ".star")}


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(folder, tmp_path_factory.mktemp("done") / "out", save_unweighted=True, save_odd_even=True)


def test_what_a_run_leaves(folder: Path, done: Path) -> None:
    table = micrographs.read_micrographs(done / "micrographs.star")
    assert table["path"].tolist() == [str(done / f"m{number}.mrc") for number in (1, 2, 3)]
    assert table["movie_path"].tolist() == [str(folder / name) for name in ("m1.mrcs", "m2.tif", "m3.tif")]
    assert table.optics["micrograph_pixel_size_A"].tolist() == [0.885]
    assert table.optics["micrograph_original_pixel_size_A"].tolist() == [0.885]
    assert table.optics["voltage_kV"].tolist() == [200.0]
    assert table["motion_total_A"] == pytest.approx(table["motion_early_A"] + table["motion_late_A"])
    for row in range(3):
        found = read_motion(table["motion_path"][row])
        assert np.abs(-found.frame_px - REAL_TRACK_PX[:FRAMES]).max() < 0.5
        assert found.shape_px == (340, 300) and found.dose_e_A2 == 1.277 and found.binning == 1.0
        length = np.linalg.norm(np.diff(found.frame_px, axis=0), axis=1) * 0.885
        assert table["motion_total_A"][row] == pytest.approx(length.sum(), rel=1e-6)
        assert table["motion_early_A"][row] == pytest.approx(length[:2].sum(), rel=1e-6)
    image = micrographs.read_image(done / "m2.mrc")
    assert image.shape == (300, 340) and micrographs.pixel_size_A(done / "m2.mrc") == 0.885
    halves = [micrographs.read_image(done / f"m2_{name}.mrc") for name in ("odd", "even")]
    assert halves[0] + halves[1] == pytest.approx(image, abs=1e-3)
    plain = micrographs.read_image(done / "m2_noDW.mrc")
    # The first row of a TIFF is the last.
    expected = tifffile.imread(folder / "m2.tif", key=range(FRAMES))[:, ::-1].sum(axis=0)
    assert plain.mean() == pytest.approx(expected.mean(), rel=0.01)
    values = json.loads((done / "items" / "m1.json").read_text())["values"]
    assert values["frames"] == FRAMES and values["shape_px"] == [340, 300] and values["hot_pixels"] >= 0
    arrays = arrays_of(done, "m1")
    patches = len(arrays["patch_centre_px"])
    assert arrays["track_px"].shape == (FRAMES, 2) and max(arrays["preview"].shape) <= 400
    assert arrays["patch_track_px"].shape == arrays["measured_patch_track_px"].shape == (patches, FRAMES, 2)
    assert Run.open(done).record["result"]["micrographs"] == 3


@pytest.mark.parametrize("cluster", ["processes", "synchronous"])
def test_the_same_bits_wherever_it_runs(folder: Path, done: Path, tmp_path: Path, cluster: str) -> None:
    again = run(folder, tmp_path / "out", cluster=cluster, save_unweighted=True, save_odd_even=True)
    before, now = files(done), files(again)
    assert before.keys() == now.keys()
    for name, data in before.items():
        assert data.replace(bytes(done), bytes(again)) == now[name], name


def test_bad_movies_are_flagged_and_the_rest_goes_on(folder: Path, tmp_path: Path) -> None:
    movies = tmp_path / "movies"
    shutil.copytree(folder, movies)
    whole = (movies / "m1.mrcs").read_bytes()
    (movies / "cut.mrcs").write_bytes(whole[:-1000])
    (movies / "zero.mrcs").write_bytes(whole[:1024] + bytes(len(whole) - 1024))
    (movies / "text.tif").write_text("not a movie")
    short = tifffile.imread(movies / "m2.tif", key=range(4))
    tifffile.imwrite(movies / "short.tif", short, photometric="minisblack")
    out = run(movies, tmp_path / "out")
    flags = {row["image"]: row["reason"] for row in Run.open(out).record["quarantined"]}
    assert set(flags) == {"cut", "zero", "text", "short"}
    assert "ends after 9" in flags["cut"] and "every pixel of its 10 frames is 0" in flags["zero"]
    assert "has 4 frames, the others of this run 10" in flags["short"] and "text.tif" in flags["text"]
    assert len(micrographs.read_micrographs(out / "micrographs.star")) == 3
    assert not (out / "zero.mrc").exists()
    named = run((str(movies / "s*.tif"),), tmp_path / "named", frames=4)
    assert len(micrographs.read_micrographs(named / "micrographs.star")) == 1


def test_a_run_goes_on_with_what_is_new(folder: Path, done: Path, tmp_path: Path) -> None:
    movies = tmp_path / "movies"
    movies.mkdir()
    shutil.copy(folder / "m1.mrcs", movies)
    out = run(movies, tmp_path / "out")
    before = (out / "m1.mrc").stat().st_mtime_ns
    shutil.copy(folder / "m2.tif", movies)
    run(movies, out, resume=True)
    assert (out / "m1.mrc").stat().st_mtime_ns == before
    assert len(micrographs.read_micrographs(out / "micrographs.star")) == 2
    for name in ("m1.mrc", "m2.mrc"):
        assert (out / name).read_bytes() == (done / name).read_bytes()


def test_watching_a_directory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_POLL_S", 0.02)
    monkeypatch.setattr(shared, "_SETTLED_S", 0.2)
    movies, out = tmp_path / "movies", tmp_path / "out"
    movies.mkdir()
    thread = threading.Thread(target=run, args=(movies, out), kwargs={"watch": True})
    thread.start()
    for wanted, name in ((1, "m1.mrcs"), (2, "m3.tif")):
        shutil.copy(folder / name, movies)
        for _ in wait():
            table = out / "micrographs.star"
            if table.exists() and len(micrographs.read_micrographs(table)) == wanted:
                break
    (out / shared.STOP).touch()
    thread.join(20)
    assert not thread.is_alive() and Run.open(out).record["status"] == "done"


def wait() -> Iterator[None]:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(0.02)
        yield
    raise AssertionError("waited too long")


def test_a_gain_is_turned_and_a_turned_copy_is_kept(folder: Path, tmp_path: Path) -> None:
    gain = np.random.default_rng(1).uniform(0.5, 2.0, (340, 300)).astype(np.float32)
    with mrcfile.new(tmp_path / "gain.mrc") as file:
        file.set_data(gain)
    movie = (str(folder / "m1.mrcs"),)
    more = {"gain": tmp_path / "gain.mrc", "save_unweighted": True}
    out = run(movie, tmp_path / "out", gain_rotate=1, gain_flip="y", **more)
    right = orient_gain(gain, 1, "y")
    assert np.array_equal(micrographs.read_image(out / "gain.mrc"), right)
    assert read_motion(out / "m1.star").gain_path == str(out / "gain.mrc")
    with mrcfile.new(tmp_path / "right.mrc") as file:
        file.set_data(right)
    same = run(movie, tmp_path / "same", gain=tmp_path / "right.mrc", save_unweighted=True)
    assert (same / "m1_noDW.mrc").read_bytes() == (out / "m1_noDW.mrc").read_bytes()
    wrong = run(movie, tmp_path / "wrong", **more)
    (row,) = Run.open(wrong).record["quarantined"]
    assert "has frames of 340 x 300 pixels, the gain" in row["reason"] and "300 x 340" in row["reason"]


def test_a_star_file_of_movies_brings_its_optics(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "movies.star").write_text(
        "# version 30001\n\ndata_optics\n\nloop_\n_rlnOpticsGroupName\n_rlnOpticsGroup\n_rlnMtfFileName\n"
        "_rlnMicrographOriginalPixelSize\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
        "a 1 mtf.star 0.885 200 1.4 0.1\nb 2 mtf.star 1.0 300 2.7 0.07\n\n\ndata_movies\n\nloop_\n"
        f"_rlnMicrographMovieName\n_rlnOpticsGroup\n{folder}/m2.tif 2\n{folder}/m1.mrcs 1\n\n"
    )
    where = (str(tmp_path / "movies.star"),)
    out = run(where, tmp_path / "out", pixel_size_A=None, voltage_kV=None, bin=2.0, dtype="float16")
    table = micrographs.read_micrographs(out / "micrographs.star")
    assert [Path(path).name for path in table["path"]] == ["m2.mrc", "m1.mrc"]
    assert table.optics_of("micrograph_pixel_size_A").tolist() == [2.0, 1.77]
    assert table.optics_of("voltage_kV").tolist() == [300.0, 200.0]
    assert table.optics_extra["rlnMtfFileName"].tolist() == ["mtf.star", "mtf.star"]
    assert mrcfile.open(out / "m1.mrc").data.dtype == np.float16
    assert read_motion(out / "m1.star").binning == 2.0
    with pytest.raises(InputError, match=r"has its own optics.*\(voltage_kV\)"):
        run(where, tmp_path / "other", pixel_size_A=None)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"dose_per_frame_e_A2": None}, "--dose-per-frame is missing"),
        ({"patches": (1, 2, 3)}, "one number or two"),
        ({"gain": Path("nowhere.mrc")}, "nowhere.mrc: not a file"),
        ({"defects": Path("nowhere.txt")}, "nowhere.txt: not a file"),
        ({"gain": Path(__file__)}, "test_motion.py: "),
        ({"gain_rotate": 1}, "of no use without --gain"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(folder: Path, tmp_path: Path, more: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        run(folder, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_places_without_movies_are_refused(folder: Path, tmp_path: Path) -> None:
    for words, told in (
        ((str(tmp_path),), "no movies there; expected files ending in"),
        ((str(tmp_path / "a.mrcs"),), "no such file, directory or pattern"),
        ((str(folder / "m2.tif"), "a.star"), "stands alone"),
    ):
        with pytest.raises(InputError, match=told):
            run(words, tmp_path / "out")
    with pytest.raises(InputError, match=r"m2\.tif: the header says no pixel size"):
        run((str(folder / "m2.tif"),), tmp_path / "out", pixel_size_A=None)


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["motion", str(folder / "m?.tif"), "--out", str(tmp_path / "out"), "--dose-per-frame", "1.277"]
    status = cli.main([*words, "--pixel-size", "0.885", "--voltage", "200", "--patches", "3,2", "--bfactor", "200"])
    assert status == 0 and "2 micrographs, which moved by" in capsys.readouterr().out
    options = Run.open(tmp_path / "out").record["options"]
    assert options["patches"] == [3, 2] and options["dose_per_frame_e_A2"] == 1.277 and options["bfactor_A2"] == 200
