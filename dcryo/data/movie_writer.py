"""Movies written frame by frame: counts in MRC or TIFF files."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from dcryo.data import mrc, tiff
from dcryo.errors import RunError

BYTE_MOST = 127
"""Programs differ on whether bytes in an MRC file are signed; up to here they agree."""


@contextmanager
def movie_writer(
    path: str | Path, kind: Literal["mrc", "tif"], frames: int, frame_px: tuple[int, int], pixel_size_A: float,
    wide: bool,
) -> Iterator[Callable[[np.ndarray], None]]:  # fmt: skip
    """Write a movie of counts, frame_px (nx, ny): gives a function that takes one frame (ny, nx) after the other.

    The file appears when all frames are there.
    MRC: mode 0 up to BYTE_MOST or, where `wide`, mode 6. TIFF: bytes or, where `wide`, two of them, LZW, the first row
    last as TIFF has it. Counts above what fits are written as the most that does. Raises RunError for frames left out
    or too many, and where the file cannot be written.
    """
    most = np.iinfo(np.uint16).max if wide else BYTE_MOST if kind == "mrc" else np.iinfo(np.uint8).max
    nx, ny = frame_px
    written = 0
    with ExitStack() as stack:
        if kind == "mrc":
            file = stack.enter_context(
                mrc.StackWriter(path, frames, (ny, nx), pixel_size_A, "uint16" if wide else "int8")
            )
        else:
            dtype = np.uint16 if wide else np.uint8
            page = stack.enter_context(tiff.page_writer(path, dtype, pixel_size_A))

        def write(frame: np.ndarray) -> None:
            nonlocal written
            if frame.shape != (ny, nx) or written == frames:
                raise ValueError(f"{path}: frame {written + 1} of {frames}, {frame.shape}, does not fit ({ny}, {nx})")
            fitting = np.clip(frame, 0, most)
            if kind == "mrc":
                file.write(written, fitting[None])
            else:
                page(fitting)
            written += 1

        yield write
        if written < frames:
            raise RunError(f"{path}: not written, since {frames - written} of {frames} frames are missing")
