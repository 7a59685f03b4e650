"""`simulate --movies`: its files, and the way from them to a map."""

import json
import shutil
import subprocess
from dataclasses import replace

import mrcfile
import numpy as np
import pytest
import scipy.fft
import starfile
import tifffile
from pydantic import ValidationError
from tiny import imported, quiet

from dcryo.data import micrographs, mrc, star
from dcryo.data.motion import MotionFile, read_motion, write_motion
from dcryo.errors import InputError, RunError
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels import fsc

SMALL = {
    "movies": 3, "frames": 4, "frame_size_px": (150, 120), "box_px": 32, "pixel_size_A": 5.0, "seed": 4,
    "hot_pixels": 6, "dose_per_frame_e_A2": 0.3, "crystals": 1.0, "carbon": 0.5, "diameter_A": 90.0, "workers": 1,
}  # fmt: skip


def run(out, **options):
    return simulate(SimulateOptions(model="phantom", out=out, **(SMALL | options)), progress=quiet)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.suffix in (".mrc", ".star", ".tif")}  # fmt: skip


def corrected(folder, number):
    """Frames of a movie times the gain, hot pixels at the mean, and its motion."""
    name = f"movie{number:05d}"
    frames = mrcfile.read(folder / "movies" / f"{name}.mrc") * mrc.read_map(folder / "gain.mrc").array[0]
    if (folder / "dirt.star").exists():
        hot = star.read_blocks(folder / "dirt.star")["hot_pixels"].columns
        x, y = (hot[f"rlnCoordinate{axis}"].astype(int) for axis in "XY")
        frames[:, y, x] = frames.mean()
    return frames, read_motion(folder / "motion" / f"{name}.star")


def aligned(frames, shifts):
    """Frames moved by shifts and summed."""
    kx, ky = np.fft.rfftfreq(frames.shape[2]), np.fft.fftfreq(frames.shape[1])[:, None]
    total = sum(
        scipy.fft.rfft2(frame) * np.exp(-2j * np.pi * (kx * x + ky * y))
        for frame, (x, y) in zip(frames, shifts, strict=True)
    )
    return scipy.fft.irfft2(total, s=frames.shape[1:])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run(tmp_path_factory.mktemp("movies") / "out")


def test_files_agree_with_one_another_and_with_other_readers(made):
    out = made.movies_star.parent
    tables = starfile.read(made.movies_star)
    assert list(tables["movies"].rlnMicrographMovieName) == [f"movies/movie{n:05d}.mrc" for n in (1, 2, 3)]
    assert tables["optics"].rlnMicrographOriginalPixelSize[0] == 5.0
    assert "rlnMicrographPixelSize" not in tables["optics"]
    for name in tables["movies"].rlnMicrographMovieName:
        with mrcfile.open(out / name) as opened:
            assert opened.data.shape == (4, 120, 150) and opened.data.dtype == np.int8
            assert opened.voxel_size.x == pytest.approx(5.0)
    assert mrcfile.read(out / "gain.mrc").squeeze().shape == (120, 150)
    table = micrographs.read_micrographs(out / "micrographs_truth.star")
    particles = star.read_particles(made.truth_star)
    assert len(particles) == made.particles > 10
    assert set(particles["micrograph"]) <= set(table["path"]) and table["path"][0] == "movie00001.mrc"
    for path, motion, total in zip(table["movie_path"], table["motion_path"], table["motion_total_A"], strict=True):
        assert (out / path).is_file()
        track = read_motion(out / motion)
        assert track.pixel_size_A == 5.0 and track.frame_px.shape == (4, 2) and track.shape_px == (150, 120)
        assert track.movie_path == path and track.coefficients is not None and len(track.hot_px) == 6
        assert total == pytest.approx(5.0 * np.hypot(*np.diff(track.frame_px, axis=0).T).sum(), rel=1e-6)
    of = [list(table["path"]).index(name) for name in particles["micrograph"]]
    assert np.abs(particles["defocus_u_A"] - table["defocus_u_A"][of]).std() < 300.0
    assert np.all((particles["coordinate_px"] >= 0) & (particles["coordinate_px"] < (150, 120)))
    assert np.abs(particles["origin_A"]).max() <= 2.5 and particles["class_number"].tolist() == [1] * made.particles
    assert json.loads((out / "run.json").read_text())["result"]["movies"] == 3
    assert "3 movies" in made.summary()
    kinds = set(starfile.read(out / "dirt.star")["dirt"].dcryoDirt)
    assert kinds == {"crystal", "hole"}


def test_counts_are_those_of_the_dose(made, tmp_path):
    out = run(tmp_path / "out", crystals=0.0, carbon=0.0, particles_per_movie=1, hot_pixels=0).movies_star.parent
    frames, _ = corrected(out, 1)
    assert frames.mean() == pytest.approx(0.3 * 25.0, rel=0.01)
    plain = mrcfile.read(out / "movies" / "movie00001.mrc").astype(float)
    gain = mrc.read_map(out / "gain.mrc").array[0]
    # Of neighbouring frames the specimen is almost the same, and their difference is the noise of counting.
    assert np.var((plain[3] - plain[2]) * np.sqrt(gain)) == pytest.approx(2 * 0.3 * 25.0, rel=0.06)


def test_the_same_bits_by_any_number_of_workers_and_after_a_stop(made, tmp_path):
    expected = contents(made.movies_star.parent)
    again = run(tmp_path / "again", workers=2).movies_star.parent
    assert contents(again) == expected
    assert contents(run(tmp_path / "processes", workers=2, cluster="processes").movies_star.parent) == expected
    # As if it had been killed before the last movie was there.
    record = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps(record | {"status": "running"}))
    (again / "movies" / "movie00002.mrc").unlink()
    kept = again / "movies" / "movie00001.mrc"
    before = kept.stat().st_mtime_ns
    assert run(tmp_path / "again", resume=True) == run(tmp_path / "again", resume=True)
    assert contents(again) == expected and kept.stat().st_mtime_ns == before


def test_overwriting_leaves_no_movie_of_before(made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made.movies_star.parent, out)
    with pytest.raises(InputError, match="--overwrite"):
        run(out)
    run(out, movies=1, seed=5, overwrite=True)
    assert [path.name for path in (out / "movies").iterdir()] == ["movie00001.mrc"]
    first = "movies/movie00001.mrc"
    assert (out / first).read_bytes() != (made.movies_star.parent / first).read_bytes()


def test_movies_that_are_not_of_a_run_are_not_replaced(tmp_path):
    mine = tmp_path / "out" / "movies" / "movie00001.mrc"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match="movie00001"):
            run(tmp_path / "out", resume=resume)
    assert mine.read_text() == "mine" and not (tmp_path / "out" / "run.json").exists()


def test_the_number_of_movies_changes_none(made, tmp_path):
    few = run(tmp_path / "out", movies=1).movies_star.parent
    first = "movies/movie00001.mrc"
    assert (few / first).read_bytes() == (made.movies_star.parent / first).read_bytes()


def test_tiff_has_the_same_counts_upside_down(made, tmp_path):
    out = run(tmp_path / "out", format="tif", movies=1).movies_star.parent
    found = tifffile.imread(out / "movies" / "movie00001.tif")
    assert found.dtype == np.uint8
    cool = mrcfile.read(made.movies_star.parent / "movies" / "movie00001.mrc")
    np.testing.assert_array_equal(np.minimum(found[:, ::-1], 127), cool)
    assert "movies/movie00001.tif" in (out / "movies.star").read_text()


def test_many_counts_take_two_bytes(tmp_path):
    out = run(tmp_path / "out", movies=1, dose_per_frame_e_A2=20.0, hot_pixels=0).movies_star.parent
    frames = mrcfile.read(out / "movies" / "movie00001.mrc")
    assert frames.dtype == np.uint16 and frames.mean() == pytest.approx(500.0, rel=0.2)


GIVEN = MotionFile(
    movie_path="a.mrc", shape_px=(300, 240), pixel_size_A=2.5, coefficients=np.full((2, 18), 1e-3),
    frame_px=np.array([[1.0, 1.0], [3.0, -1.0], [4.0, 0.5], [9.0, 9.0], [0.0, 0.0]]),
)  # fmt: skip


def test_motion_can_be_given(tmp_path):
    write_motion(tmp_path / "a.star", GIVEN)
    result = run(tmp_path / "out", tracks=(tmp_path / "a.star",), movies=2)
    for number in (1, 2):
        found = read_motion(result.movies_star.parent / "motion" / f"movie{number:05d}.star")
        np.testing.assert_allclose(found.frame_px, 0.5 * (GIVEN.frame_px[:4] - 1.0))
        np.testing.assert_allclose(found.coefficients, 0.5 * GIVEN.coefficients)
    with pytest.raises(InputError, match=r"5 frames; expected at least --frames 6"):
        run(tmp_path / "other", tracks=(tmp_path / "a.star",), frames=6)


def test_motion_without_a_local_model_or_of_a_part_of_the_frames(tmp_path):
    """A movie that was corrected from its second frame on: that is where the simulated one begins."""
    frame_px = np.concatenate([np.full((1, 2), np.nan), GIVEN.frame_px])
    write_motion(tmp_path / "a.star", replace(GIVEN, frame_px=frame_px, first_frame=2, coefficients=None))
    options = {"tracks": (tmp_path / "a.star",), "movies": 1}
    out = run(tmp_path / "out", **options).movies_star.parent
    found = read_motion(out / "motion" / "movie00001.star")
    np.testing.assert_allclose(found.frame_px, 0.5 * (GIVEN.frame_px[:4] - 1.0))
    assert not found.coefficients.any()
    for change in ({"first_frame": 1}, {"frame_px": np.insert(GIVEN.frame_px, 3, np.nan, axis=0)}):
        write_motion(tmp_path / "a.star", replace(GIVEN, **({"frame_px": frame_px} | change)))
        with pytest.raises(InputError, match="none left out"):
            run(tmp_path / "other", **options)
    write_motion(tmp_path / "a.star", replace(GIVEN, pixel_size_A=0.0))
    with pytest.raises(InputError, match="rlnMicrographOriginalPixelSize is 0"):
        run(tmp_path / "other", **options)


def test_real_motion_is_taken(tmp_path, shared_data):
    folder = shared_data / "bgal_empiar10204" / "MotionCorr" / "job002" / "Movies"
    paths = tuple(sorted(folder.glob("*.star"))[:2])
    result = run(tmp_path / "out", tracks=paths, movies=2, frames=8)
    found = read_motion(result.movies_star.parent / "motion" / "movie00002.star")
    np.testing.assert_allclose(found.frame_px, read_motion(paths[1]).frame_px[:8] * 0.885 / 5.0, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"snr": float("inf")}, {"particles": 7}, {"dtype": "float16"}, {"movies": None}, {"movies": 0},
        {"frame_size_px": (150,)}, {"carbon": 1.5}, {"format": "eer"},
    ],
)  # fmt: skip
def test_bad_options_are_refused(tmp_path, options):
    with pytest.raises(ValidationError):
        run(tmp_path / "out", **options)


def test_frames_that_hold_no_box_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="--frame-size"):
        run(tmp_path / "out", frame_size_px=(150, 31))
    assert not (tmp_path / "out").exists()


def test_movies_without_room_for_particles_are_an_error(tmp_path):
    with pytest.raises(RunError, match="found room"):
        run(tmp_path / "out", crystals=90.0)


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    """Movies with a signal as strong as the noise, each particle alone."""
    return run(
        tmp_path_factory.mktemp("movies") / "out", movies=4, frame_size_px=(512, 480), crystals=0.0, carbon=0.0,
        snr=2.0, ice=0.05, dose_per_frame_e_A2=1.3, box_px=40, pixel_size_A=4.0, diameter_A=95.0, motion_A=40.0,
        local_motion_A=4.0, particles_per_movie=60,
    )  # fmt: skip


def test_particles_cut_out_at_the_truth_give_the_density(strong, tmp_path):
    out, truth = strong.movies_star.parent, star.read_particles(strong.truth_star)
    density = mrc.read_map(strong.truth_map).array
    resolved = {}
    for sign in (1, -1):
        boxes = []
        for number in range(1, 5):
            frames, track = corrected(out, number)
            total = aligned(frames, sign * track.frame_px)
            rows = truth["micrograph"] == f"movie{number:05d}.mrc"
            boxes += [_box(total, *place) for place in truth["coordinate_px"][rows].astype(int)]
        folder = tmp_path / f"sign{sign}"
        folder.mkdir()
        images = -np.array(boxes, np.float32)
        images -= images.mean(axis=(1, 2), keepdims=True)
        images /= images.std(axis=(1, 2), keepdims=True)
        with mrc.StackWriter(folder / "stack.mrcs", len(images), 40, 4.0) as writer:
            writer.write(0, images)
        named = truth.replace(image_path=np.full(len(truth), "stack.mrcs"), image_index=np.arange(len(truth)))
        star.write_particles(folder / "particles.star", named.replace_optics(box_px=np.array([40])))
        store = imported(folder / "particles.star", folder / "particles.zarr")
        map_ = reconstruct(ReconstructOptions(store=store.path, out=folder / "map"), progress=quiet).map
        resolved[sign] = fsc.shell_correlation(map_, density)
    assert resolved[1][2:12].min() > 0.9
    # Moved the wrong way detail is gone.
    assert resolved[-1][8:12].max() < resolved[1][8:12].min()


def _box(image, x, y, half=20):
    """A box about a pixel; what lies outside repeats the edge."""
    return np.pad(image, half, mode="edge")[y : y + 2 * half, x : x + 2 * half]


@pytest.mark.skipif(shutil.which("relion_run_motioncorr") is None, reason="RELION is not installed")
@pytest.mark.parametrize("kind", ["mrc", "tif"])
def test_relion_finds_the_tracks(tmp_path, kind):
    out = tmp_path / "out"
    run(
        out, movies=1, format=kind, frames=12, frame_size_px=(640, 512), box_px=48, pixel_size_A=2.0, diameter_A=70.0,
        dose_per_frame_e_A2=1.277, crystals=0.0, carbon=0.0, motion_A=25.0, local_motion_A=0.0, hot_pixels=5, ice=0.5,
    )  # fmt: skip
    words = [
        "--use_own", "--j", "1", "--i", "movies.star", "--o", "mc/", "--gainref", "gain.mrc", "--angpix", "2",
        "--voltage", "300", "--dose_per_frame", "1.277", "--bfactor", "150",
    ]  # fmt: skip
    done = subprocess.run(
        ["relion_run_motioncorr", *words], cwd=out, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = read_motion(out / "mc" / "movies" / "movie00001.star")
    truth = read_motion(out / "motion" / "movie00001.star")
    assert np.abs(truth.frame_px[-1]).max() > 4.0
    off = found.frame_px - truth.frame_px
    assert np.sqrt(np.mean((off - off.mean(axis=0)) ** 2)) < 0.3
    hot = star.read_blocks(out / "mc" / "movies" / "movie00001.star")["hot_pixels"].columns
    places = {(float(x), float(y)) for x, y in zip(hot["rlnCoordinateX"], hot["rlnCoordinateY"], strict=True)}
    ours = star.read_blocks(out / "dirt.star")["hot_pixels"].columns
    true = {(float(x), float(y)) for x, y in zip(ours["rlnCoordinateX"], ours["rlnCoordinateY"], strict=True)}
    assert true <= places
