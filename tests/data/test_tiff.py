from pathlib import Path

import numpy as np
import pytest
import tifffile

from dcryo.data import micrographs, movies, tiff
from dcryo.errors import RunError


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_what_is_written_is_read_again_by_each_reader(tmp_path: Path, kind: str) -> None:
    frames = np.random.default_rng(1).integers(0, 200, (3, 5, 7))
    path = tmp_path / "a.tif"
    with tiff.page_writer(path, kind, 0.885) as write:
        for frame in frames:
            write(frame)
    movie = movies.open_movie(path)
    assert (movie.n, movie.shape) == (3, (5, 7)) and movie.pixel_size_A == pytest.approx(0.885, rel=1e-6)
    for found, frame in zip(movie.frames(), frames, strict=True):
        assert found.dtype == kind and np.array_equal(found, frame)
    with tiff.page_writer(path, kind, 0.885) as write:
        write(frames[0])
    assert np.array_equal(micrographs.read_image(path), frames[0])
    assert np.array_equal(tifffile.imread(path), frames[0][::-1])


@pytest.mark.parametrize(("size_A", "found"), [(0.8849999, 0.8849999), (1.06000001, 1.06), (0.01, 0.0), (84666.7, 0.0)])
def test_a_pixel_size_is_one_of_a_microscope(size_A: float, found: float) -> None:
    assert tiff.plausible_A(size_A) == found


def test_a_movie_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"), tiff.page_writer(tmp_path / "no" / "a.tif", "u1", 1.0):
        raise AssertionError("nothing to write to")
    with pytest.raises(ZeroDivisionError), tiff.page_writer(tmp_path / "a.tif", "u1", 1.0) as write:
        write(np.zeros((2, 2)))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
