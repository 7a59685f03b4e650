"""TIFF images and movies. Their first row is the last of an MRC file, and of an array here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import DTypeLike

import dcryo
from dcryo.data.atomic import replacing

SUFFIXES = (".tif", ".tiff")
_PER_CENTIMETRE_A = 1e8
_PLAUSIBLE_A = (0.05, 20.0)
"""A pixel size outside of this is that of a screen or a printer."""


def read(path: str | Path) -> np.ndarray:
    """An image, (ny, nx) of its own type; of more axes where the file holds more. Errors are those of tifffile."""
    return tifffile.imread(path)[::-1]


def rows(page: tifffile.TiffPage | tifffile.TiffFrame) -> np.ndarray:
    """A page of a movie, (ny, nx) of its own type."""
    return np.ascontiguousarray(page.asarray(maxworkers=1)[::-1])


def pixel_size_A(page: tifffile.TiffPage) -> float:
    """By the tags for resolution in pixels per centimetre, as SerialEM writes them; 0.0 where there are none."""
    tags = page.tags
    if "XResolution" not in tags or "ResolutionUnit" not in tags or int(tags["ResolutionUnit"].value) != 3:
        return 0.0
    numerator, denominator = tags["XResolution"].value
    return plausible_A(_PER_CENTIMETRE_A * denominator / numerator if numerator else 0.0)


def plausible_A(size_A: float) -> float:
    """A pixel size to seven digits, 0.0 where a microscope does not have it."""
    return float(f"{size_A:.7g}") if _PLAUSIBLE_A[0] < size_A < _PLAUSIBLE_A[1] else 0.0


@contextmanager
def page_writer(path: str | Path, dtype: DTypeLike, size_A: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Write a movie, LZW: gives a function that takes one frame (ny, nx) after the other. size_A: of a pixel.

    The file appears at the end. RunError where it cannot be written.
    """
    with replacing(path) as file, tifffile.TiffWriter(file) as pages:

        def write(frame: np.ndarray) -> None:
            pages.write(
                np.ascontiguousarray(frame[::-1], dtype=dtype), compression="lzw", metadata=None,
                software=f"dcryo {dcryo.__version__}", resolution=(_PER_CENTIMETRE_A / size_A,) * 2,
                resolutionunit="CENTIMETER",
            )  # fmt: skip

        yield write
