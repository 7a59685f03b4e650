"""Movies, frame by frame, and what a detector needs to be corrected for: gain and defects.

MRC (modes 0, 1, 2, 6, 12 and 101, which holds two pixels a byte), TIFF and EER. Rows are in the order of an MRC file: a
TIFF's first row is the last here, an EER's is the first, as RELION takes them. No movie is ever held as a whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from dcryo.data import micrographs, mrc, star_syntax, tiff
from dcryo.data.particles import Micrographs
from dcryo.data.star_table import Table, optics_of
from dcryo.errors import InputError

IMAGE_SUFFIXES = (*mrc.STACK_SUFFIXES, *tiff.SUFFIXES)
SUFFIXES = (*IMAGE_SUFFIXES, ".eer")
_NAME = "rlnMicrographMovieName"
_EER_BITS = {65000: (8, 2, 2), 65001: (7, 2, 2)}
"""Of the pixels passed over, and of the place across and along a pixel, by the number of the compression."""


@dataclass(frozen=True)
class Movie:
    """An open movie. shape: (ny, nx); n: number of frames; pixel_size_A: 0.0 where the file does not say; remark: what
    a reader should know, such as frames that were dropped."""

    path: Path
    shape: tuple[int, int]
    n: int
    pixel_size_A: float
    reader: Callable[[], Iterator[np.ndarray]]
    remark: str = ""

    def frames(self) -> Iterator[np.ndarray]:
        """The frames in turn, (ny, nx) of the file's own type; may be asked for again. InputError where one cannot be
        read, or all are 0."""
        anything = False
        try:
            for frame in self.reader():
                anything = anything or bool(frame.any())
                yield frame
        except (OSError, ValueError, RuntimeError, tifffile.TiffFileError, IndexError) as error:
            raise InputError(f"{self.path}: cannot be read to its end ({error}); get the movie again") from error
        if not anything:
            raise InputError(f"{self.path}: every pixel of its {self.n} frames is 0; expected a movie, take it out")


def open_movie(path: str | Path, eer_fraction: int | None = None) -> Movie:
    """Open a movie by its ending.

    eer_fraction: raw frames of an EER file that make one frame; those left over at the end are dropped. Raises
    InputError where the file is no movie, holds fewer frames than its header says, or is an EER file and the fraction
    is not given.
    """
    path = Path(path)
    kind = path.suffix.lower()
    try:
        if kind == ".eer":
            return _open_eer(path, eer_fraction)
        if kind in tiff.SUFFIXES:
            return _open_tiff(path)
        return _open_mrc(path)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, IndexError, tifffile.TiffFileError) as error:
        raise InputError(f"{path}: cannot be read as a movie ({error})") from error


def _open_mrc(path: Path) -> Movie:
    packed = mrc.open_packed(path)
    stack, nx = packed or (mrc.open_stack(path), 0)
    if stack.readable < stack.n:
        raise InputError(f"{path}: its header says {stack.n} frames, but it ends after {stack.readable}; get it again")
    if packed is None:
        return Movie(path, stack.shape, stack.n, stack.voxel_size_A, lambda: iter(stack.images))
    return Movie(path, (stack.shape[0], nx), stack.n, stack.voxel_size_A, lambda: _unpacked(stack.images, nx))


def _unpacked(images: np.ndarray, nx: int) -> Iterator[np.ndarray]:
    """Frames of nx columns, of bytes that hold two pixels each."""
    for packed in images:
        pixels = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
        pixels[:, ::2] = packed & 15
        pixels[:, 1::2] = packed >> 4
        yield pixels[:, :nx]


def _open_tiff(path: Path) -> Movie:
    with tifffile.TiffFile(path) as file:
        n, first = len(file.pages), file.pages.first
        if first.ndim != 2:
            raise InputError(f"{path}: has pages of {first.ndim} axes; expected a movie, one page a frame")
        shape, pixel_size = (int(first.shape[0]), int(first.shape[1])), tiff.pixel_size_A(first)

    def read() -> Iterator[np.ndarray]:
        with tifffile.TiffFile(path) as file:
            for number, page in enumerate(file.pages, 1):
                if page.shape != shape:
                    raise InputError(f"{path}: frame {number} has shape {page.shape}, the first {shape}; take it out")
                yield tiff.rows(page)

    return Movie(path, shape, n, pixel_size, read)


def _open_eer(path: Path, fraction: int | None) -> Movie:
    if not fraction:
        raise InputError(f"{path}: is an EER file; give --eer-fraction, the number of raw frames that make one frame")
    with tifffile.TiffFile(path) as file:
        raw, first = len(file.pages), file.pages.first
        shape = (int(first.shape[0]), int(first.shape[1]))
        if not 65000 <= int(first.compression) <= 65002:
            raise InputError(f"{path}: is not compressed as EER files are; expected raw frames of an electron counter")
        known = file.eer_metadata
    n = raw // fraction
    if not n:
        raise InputError(f"{path}: has {raw} raw frames, fewer than one frame of {fraction}; lower --eer-fraction")

    def read() -> Iterator[np.ndarray]:
        with tifffile.TiffFile(path) as file:
            for frame in range(n):
                counts = np.zeros(shape, np.uint8 if fraction < 256 else np.uint16)
                for number in range(frame * fraction, (frame + 1) * fraction):
                    counts += _electrons(file, file.pages[number], shape)
                yield counts

    left = raw - n * fraction
    remark = f"the last {left} of {raw} raw frames make no whole frame of {fraction} and are dropped" if left else ""
    return Movie(path, shape, n, _eer_pixel_size_A(known), read, remark)


def _electrons(file: tifffile.TiffFile, page: Any, shape: tuple[int, int]) -> np.ndarray:
    """Where electrons were counted in a raw frame, (ny, nx) of 0 and 1; where within a pixel is not used."""
    data = bytearray()
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.filehandle.seek(offset)
        data += file.filehandle.read(count)
    if len(data) < sum(page.databytecounts):
        raise ValueError("the file ends within a raw frame")
    # The decoder reads words, and stops before an event that its last bits might be cut off of.
    data += bytes(4 + len(data) % 2)
    skip, across, along = _EER_BITS.get(int(page.compression)) or (
        int(page.tags.valueof(tag, usual)) for tag, usual in ((65007, 7), (65008, 2), (65009, 2))
    )
    return imagecodecs.eer_decode(bytes(data), shape, skip, across, along).view(np.uint8)


def _eer_pixel_size_A(known: object) -> float:
    try:
        size = 1e10 * float(known["sensorPixelSize.width"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return 0.0
    return tiff.plausible_A(size)


def is_eer(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".eer"


def read_gain(path: str | Path, for_eer: bool) -> np.ndarray:
    """A gain reference (ny, nx) float32 that frames are multiplied by; 0 marks a dead pixel.

    A `.gain` file, which is a TIFF in the order of EER files, multiplies; any other (MRC, TIFF) multiplies frames of
    MRC and TIFF movies and divides those of EER movies. Raises InputError where it cannot be read, or a value is not
    finite or below 0.
    """
    path = Path(path)
    if path.suffix.lower() == ".gain":
        try:
            gain = np.asarray(tifffile.imread(path, key=0), dtype=np.float32)
        except (OSError, ValueError, tifffile.TiffFileError) as error:
            raise InputError(f"{path}: cannot be read as a gain reference ({error})") from error
        if gain.ndim != 2:
            raise InputError(f"{path}: has {gain.ndim} axes; expected an image")
    else:
        gain = micrographs.read_image(path)
    wrong = np.argwhere(~(np.isfinite(gain) & (gain >= 0)))
    if len(wrong):
        y, x = wrong[0].tolist()
        raise InputError(f"{path}: the gain at column {x + 1}, row {y + 1} is {gain[y, x]}; expected 0 or more")
    if not gain.any():
        raise InputError(f"{path}: is 0 everywhere; expected a gain reference")
    if for_eer and path.suffix.lower() != ".gain":
        gain = np.divide(1.0, gain, out=np.zeros_like(gain), where=gain > 0)
    return gain


def read_defects(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Bad pixels, (ny, nx) bool: an image (MRC, TIFF) that is not 0 there, or rows of `x y width height` in pixels.

    x and y count from 0, from the first column and row here. Raises InputError for an image of another size, or a row
    that is not four whole numbers or not in the frame.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        image = micrographs.read_image(path)
        if image.shape != shape:
            raise InputError(f"{path}: has {size_px(image.shape)} pixels; the frames have {size_px(shape)}")
        return image != 0
    bad = np.zeros(shape, bool)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of defects ({error})") from error
    for row, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            x, y, width, height = (int(word) for word in words)
        except ValueError:
            raise InputError(f"{path}, row {row}: found {line!r}; expected x, y, width and height in pixels") from None
        if x < 0 or y < 0 or min(width, height) < 1 or x + width > shape[1] or y + height > shape[0]:
            raise InputError(f"{path}, row {row}: {line!r} is not within the frame of {size_px(shape)} pixels")
        bad[y : y + height, x : x + width] = True
    return bad


def size_px(shape: tuple[int, ...]) -> str:
    """Columns x rows, as messages say it."""
    return " x ".join(str(side) for side in reversed(shape))


def read_movies(path: str | Path) -> Micrographs:
    """The movies of a STAR file that RELION's import wrote: `path` and `movie_path` are the movie's.

    Raises InputError where no table has the column rlnMicrographMovieName, there are no optics, or no rows.
    """
    blocks = star_syntax.parse(path)
    names = [name for name, block in blocks.items() if name != "optics" and _NAME in block.columns and block.is_loop]
    if not names or "optics" not in blocks:
        raise InputError(f"{path}: has no data_optics, or no table with _{_NAME}; expected a STAR file of movies")
    table = Table(f"{path}, data_{names[0]}", blocks[names[0]])
    if not len(table):
        raise InputError(f"{table.where}: has no rows; expected at least one movie")
    movies = star_syntax.text(table.raw(_NAME), f"{table.where}: _{_NAME}")
    optics, optics_row, optics_extra = optics_of(table, Table(f"{path}, data_optics", blocks["optics"]))
    table.drop(["rlnOpticsGroup"])
    columns = {"path": movies, "movie_path": movies, "optics_row": optics_row}
    return Micrographs(columns, optics, table.rest(), optics_extra)
