import struct
import tarfile
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile

from dcryo.data import movies
from dcryo.errors import InputError

FRAMES = np.random.default_rng(1).integers(0, 15, (4, 30, 41))


def write_mrc(path: Path, frames: np.ndarray, pixel_size_A: float = 0.9) -> Path:
    with mrcfile.new(path) as file:
        file.set_data(frames)
        file.voxel_size = pixel_size_A
    return path


def write_tiff(path: Path, frames: np.ndarray, compression: str | None = "lzw", pixel_size_A: float = 0.9) -> Path:
    """As the field's programs do: the first row of an MRC file is the last."""
    with tifffile.TiffWriter(path) as file:
        for frame in frames:
            file.write(
                frame[::-1], compression=compression, photometric="minisblack", contiguous=False,
                resolution=(1e8 / pixel_size_A, 1e8 / pixel_size_A), resolutionunit=3,
            )  # fmt: skip
    return path


def eer_bits(image: np.ndarray) -> bytes:
    """Raw frame of an electron counter (ny, nx): 7 bits of pixels passed over and 4 of the place in a pixel."""
    bits, at = [], 0
    for electron in [*np.flatnonzero(image).tolist(), image.size]:
        skip = electron - at
        while skip >= 127:
            bits.append(np.ones(7, np.uint8))
            skip -= 127
        bits.append((skip >> np.arange(7)) & 1)
        bits.append(np.array([0, 1, 0, 1]))
        at = electron + 1
    return np.packbits(np.concatenate(bits).astype(np.uint8), bitorder="little").tobytes()


def write_eer(path: Path, frames: np.ndarray) -> Path:
    """A TIFF of one strip a page, compressed as type 65001."""
    out = bytearray(struct.pack("<2sHI", b"II", 42, 0))
    link = 4
    for frame in frames:
        data = eer_bits(frame)
        strip = len(out)
        out += data + b"\0" * (len(data) % 2)
        struct.pack_into("<I", out, link, len(out))
        tags = [(256, frame.shape[1]), (257, frame.shape[0]), (258, 1), (259, 65001), (262, 1), (273, strip), (277, 1),
                (278, frame.shape[0]), (279, len(data))]  # fmt: skip
        out += struct.pack("<H", len(tags))
        for tag, value in tags:
            out += struct.pack("<HHII", tag, 4, 1, value)
        link = len(out)
        out += struct.pack("<I", 0)
    path.write_bytes(out)
    return path


@pytest.mark.parametrize("kind", ["i1", "i2", "u2", "f4", "f2"])
@pytest.mark.parametrize("ending", [".mrc", ".mrcs"])
def test_mrc(tmp_path: Path, kind: str, ending: str) -> None:
    movie = movies.open_movie(write_mrc(tmp_path / f"a{ending}", FRAMES.astype(kind)))
    assert (movie.n, movie.shape, movie.pixel_size_A, movie.remark) == (4, (30, 41), 0.9, "")
    for _ in range(2):
        assert np.array_equal(np.array(list(movie.frames())), FRAMES)


@pytest.mark.parametrize("width", [40, 41])
def test_two_pixels_a_byte(tmp_path: Path, width: int) -> None:
    frames = FRAMES[:, :, :width]
    padded = np.pad(frames, ((0, 0), (0, 0), (0, width % 2))).astype(np.uint8)
    path = write_mrc(tmp_path / "a.mrcs", (padded[:, :, ::2] | padded[:, :, 1::2] << 4).view("i1"), 1.1)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<4i", raw, 0, width, 30, 4, 101)
    struct.pack_into("<i", raw, 28, width)
    struct.pack_into("<f", raw, 40, 1.1 * width)
    path.write_bytes(raw)
    movie = movies.open_movie(path)
    assert (movie.n, movie.shape, movie.pixel_size_A) == (4, (30, width), 1.1)
    assert np.array_equal(np.array(list(movie.frames())), frames)
    path.write_bytes(raw[:-1])
    with pytest.raises(InputError, match="says 4 frames, but it ends after 3"):
        movies.open_movie(path)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_tiff_is_upside_down(tmp_path: Path, compression: str | None, kind: str) -> None:
    movie = movies.open_movie(write_tiff(tmp_path / "a.tif", FRAMES.astype(kind), compression))
    assert (movie.n, movie.shape) == (4, (30, 41)) and movie.pixel_size_A == pytest.approx(0.9)
    assert np.array_equal(np.array(list(movie.frames())), FRAMES)


def test_a_printers_resolution_is_no_pixel_size(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", FRAMES[0].astype("u1"), resolution=(300, 300), resolutionunit=3, photometric="minisblack"
    )
    assert movies.open_movie(tmp_path / "a.tif").pixel_size_A == 0.0


def test_eer_frames_are_summed_and_what_is_left_over_is_dropped(tmp_path: Path) -> None:
    raw = np.random.default_rng(2).random((11, 64, 96)) < 0.03
    path = write_eer(tmp_path / "a.eer", raw)
    movie = movies.open_movie(path, 3)
    assert (movie.n, movie.shape) == (3, (64, 96)) and "last 2 of 11 raw frames" in movie.remark
    assert np.array_equal(np.array(list(movie.frames())), raw[:9].reshape(3, 3, 64, 96).sum(axis=1))
    with pytest.raises(InputError, match="give --eer-fraction"):
        movies.open_movie(path)
    with pytest.raises(InputError, match="fewer than one frame of 12"):
        movies.open_movie(path, 12)


def test_movies_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    whole = write_mrc(tmp_path / "a.mrcs", FRAMES.astype("i2"))
    (tmp_path / "cut.mrcs").write_bytes(whole.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"cut.mrcs.*says 4 frames, but it ends after 3"):
        movies.open_movie(tmp_path / "cut.mrcs")
    tiff = write_tiff(tmp_path / "a.tif", FRAMES.astype("u1")).read_bytes()
    # Cut in its pixels and in its directory of pages.
    refused = 0
    for length in range(0, len(tiff), 97):
        (tmp_path / "cut.tif").write_bytes(tiff[:length])
        try:
            found = np.array(list(movies.open_movie(tmp_path / "cut.tif").frames()))
            assert len(found) < 4
        except InputError as error:
            assert "cut.tif" in str(error)
            refused += 1
    assert refused > 5
    zero = movies.open_movie(write_mrc(tmp_path / "zero.mrcs", 0 * FRAMES.astype("i2")))
    with pytest.raises(InputError, match=r"zero.mrcs.*every pixel of its 4 frames is 0"):
        list(zero.frames())
    with pytest.raises(InputError, match=r"b\.mrcs"):
        movies.open_movie(tmp_path / "b.mrcs")
    with pytest.raises(InputError, match=r"b\.eer"):
        movies.open_movie(tmp_path / "b.eer", 3)


def test_frames_of_different_sizes_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for side in (20, 20, 21):
            file.write(np.ones((side, 20), np.uint8), contiguous=False)
    with pytest.raises(InputError, match=r"a.tif: frame 3 has shape \(21, 20\), the first \(20, 20\)"):
        list(movies.open_movie(tmp_path / "a.tif").frames())


def test_gains_multiply_or_divide(tmp_path: Path) -> None:
    gain = np.random.default_rng(3).uniform(0.5, 2.0, (10, 12)).astype(np.float32)
    gain[2, 3] = 0
    inverse = np.where(gain > 0, 1 / np.where(gain > 0, gain, 1), 0)
    write_mrc(tmp_path / "gain.mrc", gain)
    tifffile.imwrite(tmp_path / "gain.tif", gain[::-1])
    tifffile.imwrite(tmp_path / "raw.tif", gain)
    (tmp_path / "raw.tif").rename(tmp_path / "a.gain")
    for name in ("gain.mrc", "gain.tif"):
        assert movies.read_gain(tmp_path / name, for_eer=False) == pytest.approx(gain)
        assert movies.read_gain(tmp_path / name, for_eer=True) == pytest.approx(inverse)
    assert movies.read_gain(tmp_path / "a.gain", for_eer=True) == pytest.approx(gain)


@pytest.mark.parametrize(("value", "told"), [(np.nan, "column 4, row 3 is nan"), (-1.0, "is -1.0; expected 0 or more")])
def test_gains_that_are_none_are_refused(tmp_path: Path, value: float, told: str) -> None:
    gain = np.ones((10, 12), np.float32)
    gain[2, 3] = value
    with pytest.raises(InputError, match=told):
        movies.read_gain(write_mrc(tmp_path / "gain.mrc", gain), for_eer=False)
    with pytest.raises(InputError, match="0 everywhere"):
        movies.read_gain(write_mrc(tmp_path / "zero.mrc", 0 * np.ones((10, 12), np.float32)), for_eer=False)


def test_defects_as_rows_and_as_an_image(tmp_path: Path) -> None:
    bad = np.zeros((10, 12), bool)
    bad[3:5, 2:9] = bad[0, 11] = True
    (tmp_path / "bad.txt").write_text("# x y w h\n2 3 7 2\n\n11 0 1 1\n")
    assert np.array_equal(movies.read_defects(tmp_path / "bad.txt", (10, 12)), bad)
    write_mrc(tmp_path / "bad.mrc", bad.astype(np.float32))
    assert np.array_equal(movies.read_defects(tmp_path / "bad.mrc", (10, 12)), bad)
    with pytest.raises(InputError, match=r"has 12 x 10 pixels; the frames have 13 x 10"):
        movies.read_defects(tmp_path / "bad.mrc", (10, 13))
    for row, told in (("1 2 3", "row 1"), ("1 2 x 4", "expected x, y, width"), ("8 0 5 1", "not within the frame")):
        (tmp_path / "bad.txt").write_text(row)
        with pytest.raises(InputError, match=told):
            movies.read_defects(tmp_path / "bad.txt", (10, 12))


def test_relions_table_of_movies(tmp_path: Path, shared_data: Path) -> None:
    with tarfile.open(next((shared_data / "relion4_tutorial_metadata").glob("*.tar.xz"))) as archive:
        member = archive.extractfile("Import/job001/movies.star")
        assert member is not None
        (tmp_path / "movies.star").write_bytes(member.read())
    table = movies.read_movies(tmp_path / "movies.star")
    assert len(table) == 24 and table["movie_path"][0].startswith("Movies/20170629_")
    assert table.optics["micrograph_original_pixel_size_A"].tolist() == [0.885]
    assert table.optics["voltage_kV"].tolist() == [200.0] and "rlnMtfFileName" in table.optics_extra


def test_a_table_without_movies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.star").write_text("data_optics\n\nloop_\n_rlnOpticsGroup #1\n1\n")
    with pytest.raises(InputError, match="expected a STAR file of movies"):
        movies.read_movies(tmp_path / "a.star")
