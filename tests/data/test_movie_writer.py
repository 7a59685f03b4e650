import mrcfile
import numpy as np
import pytest
import tifffile

from dcryo.data.movie_writer import movie_writer
from dcryo.errors import RunError


def frames(most):
    return np.random.Generator(np.random.Philox(3)).integers(0, most, (3, 5, 7))


@pytest.mark.parametrize(
    ("kind", "wide", "most", "dtype"),
    [("mrc", False, 127, "i1"), ("mrc", True, 60000, "u2"), ("tif", False, 255, "u1"), ("tif", True, 60000, "u2")],
)
def test_other_readers_find_the_counts(tmp_path, kind, wide, most, dtype):
    path, made = tmp_path / f"movie.{kind}", frames(most)
    with movie_writer(path, kind, 3, (7, 5), 0.885, wide) as write:
        for frame in made:
            write(frame)
    if kind == "mrc":
        with mrcfile.open(path) as opened:
            found = np.array(opened.data)
            assert opened.voxel_size.x == pytest.approx(0.885) and opened.is_image_stack()
    else:
        found = tifffile.imread(path)[:, ::-1]
        with tifffile.TiffFile(path) as opened:
            assert len(opened.pages) == 3 and opened.pages[0].compression == tifffile.COMPRESSION.LZW
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, made)


@pytest.mark.parametrize("kind", ["mrc", "tif"])
def test_what_does_not_fit_is_cut_and_the_same_counts_give_the_same_bytes(tmp_path, kind):
    made = frames(300)
    made[0, 0, 0] = 1000
    for name in "ab":
        with movie_writer(tmp_path / name, kind, 3, (7, 5), 1.0, False) as write:
            for frame in made:
                write(frame)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = mrcfile.read(tmp_path / "a") if kind == "mrc" else tifffile.imread(tmp_path / "a")
    assert found.max() == (127 if kind == "mrc" else 255)


@pytest.mark.parametrize("kind", ["mrc", "tif"])
def test_a_movie_without_all_its_frames_is_none(tmp_path, kind):
    path = tmp_path / f"movie.{kind}"
    with pytest.raises(RunError, match="missing"), movie_writer(path, kind, 3, (7, 5), 1.0, False) as write:
        write(frames(9)[0])
    with pytest.raises(ValueError, match="does not fit"), movie_writer(path, kind, 3, (5, 7), 1.0, False) as write:
        write(frames(9)[0])
    with pytest.raises(ValueError, match="does not fit"), movie_writer(path, kind, 1, (7, 5), 1.0, False) as write:
        write(frames(9)[0])
        write(frames(9)[1])
    assert not list(tmp_path.iterdir())
