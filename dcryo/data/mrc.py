"""MRC maps and image stacks.

The format is MRC2014 (https://www.ccpem.ac.uk/mrc_format/mrc2014.php), with float16 as mode 12. Headers are
not trusted: every number that sizes a read is checked against the file before anything is allocated. Arrays
leave as float32 in (z, y, x) order, whatever the axis order of the file.
"""

import bz2
import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import ArrayLike

import dcryo
from dcryo.data.atomic import replacing
from dcryo.errors import InputError, RunError

STACK_SUFFIXES = (".mrc", ".mrcs", ".st")
HEADER_BYTES = 1024
VERSION = 20141  # of the standard, with mode 12
_DTYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_PACKED_MODE = 101
_MODES = {"int8": 0, "float32": 2, "uint16": 6, "float16": 12}
_IMOD_STAMP = 1146047817
_READ_BYTES = 16 << 20
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}
Order = Literal["<", ">"]
_NAMES: dict[Order, Literal["little", "big"]] = {"<": "little", ">": "big"}


@dataclass(frozen=True)
class MapFile:
    """A map as a file holds it.

    `array` is float32 (z, y, x). `voxel_A` (0.0 where the header does not say), `origin_A` (the header's
    ORIGIN) and `start_px` (its NXSTART and so on) are (x, y, z). `angles_deg` are those of the cell.
    """

    path: str
    array: np.ndarray
    voxel_A: tuple[float, float, float]
    angles_deg: tuple[float, float, float] = (90.0, 90.0, 90.0)
    origin_A: tuple[float, float, float] = (0.0, 0.0, 0.0)
    start_px: tuple[int, int, int] = (0, 0, 0)

    @property
    def voxel_size_A(self) -> float:
        """Side of the cubic voxel, 0.0 if the header does not say; InputError if voxels are not cubes."""
        skewed = any(angle != 0 and not abs(angle - 90) < 0.01 for angle in self.angles_deg)
        known = [side for side in self.voxel_A if side > 0] or [0.0]
        if skewed or max(known) - min(known) > 1e-3 * max(known):
            raise InputError(
                f"{self.path}: voxels of {self.voxel_A} A with angles {self.angles_deg} deg are not cubes; "
                "resample the map to one voxel size on orthogonal axes, or correct its header"
            )
        return known[0]


@dataclass(frozen=True)
class Stack:
    """An open stack of images, mapped and not read.

    `n` is the number of images in the header, of which the first `readable` are whole in the file. `shape` is
    (ny, nx); `voxel_size_A` is 0.0 if the header does not say.
    """

    path: str
    n: int
    shape: tuple[int, int]
    voxel_size_A: float
    readable: int
    images: np.ndarray

    def read(self, indices: ArrayLike) -> np.ndarray:
        """Images at `indices` (from 0), float32 (n, ny, nx); InputError for an image that is not there."""
        rows = np.atleast_1d(np.asarray(indices))
        if rows.size and rows.dtype.kind not in "iu":
            raise ValueError(f"indices must be integers, got {rows.dtype}")
        rows = rows.astype(np.int64)
        outside = np.flatnonzero((rows < 0) | (rows >= self.readable))
        if len(outside):
            index = int(rows[outside[0]])
            found = f"it has {self.n} images"
            if self.readable < self.n:
                found = f"its header says {self.n} images, but the file ends after {self.readable}"
            raise InputError(
                f"{self.path}: image {index + 1} was asked for, {found}; "
                "correct the row that names it or restore the file"
            )
        return self.images[rows].astype(np.float32)


@dataclass(frozen=True)
class _Header:
    columns: int
    rows: int
    sections: int
    dtype: np.dtype
    offset: int
    axes: tuple[int, int, int]
    voxel_A: tuple[float, float, float]
    angles_deg: tuple[float, float, float]
    origin_A: tuple[float, float, float]
    start_px: tuple[int, int, int]

    @property
    def image_bytes(self) -> int:
        return self.columns * self.rows * self.dtype.itemsize


def read_map(path: str | Path) -> MapFile:
    """Read a map, also gzipped or bzipped; modes 0, 1, 2, 6 and 12, either byte order, any axis order.

    Raises InputError if it is no such file, is shorter than its header says, or holds values that are not
    finite.
    """
    with _opened(path) as (file, size):
        header = _read_header(path, file)
        array = np.ascontiguousarray(_read_data(path, file, header, size), dtype=np.float32)
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        z, y, x = (int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(
            f"{path}: {bad} voxels are not finite, the first at (z, y, x) = ({z}, {y}, {x}); "
            "expected a map of finite numbers, write it again"
        )
    return MapFile(str(path), array, header.voxel_A, header.angles_deg, header.origin_A, header.start_px)


def open_stack(path: str | Path) -> Stack:
    """Map a stack of images; a file that was cut short opens with fewer `readable` images than `n`.

    Raises InputError if it is no MRC file of modes 0, 1, 2, 6 or 12, is compressed, or has its axes permuted.
    """
    with _opened(path) as (file, size):
        if size is None:
            raise InputError(f"{path}: is compressed; a stack is read in place, decompress it first")
        header = _read_header(path, file)
    if header.axes != (1, 2, 3):
        raise InputError(f"{path}: has its axes in the order {header.axes}; expected (1, 2, 3) for a stack")
    shape = (header.rows, header.columns)
    return _mapped(path, size, header.offset, header.sections, shape, header.dtype, header.voxel_A[0])


def open_packed(path: str | Path) -> tuple[Stack, int] | None:
    """Map a stack of mode 101, as SerialEM writes it: of bytes that hold two pixels each, the low half first.

    Gives the stack of bytes, of rows of (nx + 1) // 2, and nx; None where the file is of another mode.
    """
    with _opened(path) as (file, size):
        raw = _read(path, file, HEADER_BYTES)
    if size is None or len(raw) < HEADER_BYTES:
        return None
    header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(">" if raw[212] == 0x11 else "<"))[0]
    nx, ny, n = (int(header[name]) for name in ("nx", "ny", "nz"))
    if int(header["mode"]) != _PACKED_MODE or min(nx, ny, n) < 1:
        return None
    offset = HEADER_BYTES + max(0, int(header["nsymbt"]))
    pixel_size_A = _ratio(header["cella"]["x"], header["mx"])
    return _mapped(path, size, offset, n, (ny, (nx + 1) // 2), np.dtype(np.uint8), pixel_size_A), nx


def _mapped(
    path: str | Path, size: int, offset: int, n: int, shape: tuple[int, int], dtype: np.dtype, voxel_size_A: float
) -> Stack:
    """A stack in a file of `size` bytes."""
    readable = max(0, min(n, (size - offset) // (shape[0] * shape[1] * dtype.itemsize)))
    images = np.memmap(path, dtype, "r", offset, (readable, *shape)) if readable else np.empty((0, *shape), dtype)
    return Stack(str(path), n, shape, voxel_size_A, readable, images)


def write_map(
    path: str | Path,
    array: np.ndarray,
    voxel_size_A: float,
    origin_A: tuple[float, float, float] = (0.0, 0.0, 0.0),
    start_px: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """Write a volume (z, y, x) as float32; `origin_A` and `start_px` are (x, y, z).

    The same array gives the same bytes. Raises RunError if the volume is empty or not finite, or cannot be
    written.
    """
    volume = np.ascontiguousarray(array, dtype="<f4")
    if volume.ndim != 3:
        raise ValueError(f"a map has three axes, got shape {volume.shape}")
    if not volume.size or not np.isfinite(volume).all():
        raise RunError(f"{path}: not written, since the map is empty or holds values that are not finite")
    sums = np.array([_sums(section) for section in volume])
    header = _new_header(volume.shape, 2, voxel_size_A, sums, volume=True)
    header["origin"] = origin_A
    header["nxstart"], header["nystart"], header["nzstart"] = start_px
    with replacing(path) as file:
        file.write(header.tobytes())
        file.write(volume.data)


def write_image(
    path: str | Path,
    image: np.ndarray,
    pixel_size_A: float,
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Write one image (ny, nx), such as a micrograph, as a stack of one (space group 0), mode 2 or 12.

    Raises RunError if it is empty or holds values that are not finite in `dtype`, or cannot be written.
    """
    if image.ndim != 2:
        raise ValueError(f"an image has two axes, got shape {image.shape}")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(image, dtype=np.dtype(dtype).newbyteorder("<"))
    if not stored.size or not np.isfinite(stored).all():
        raise RunError(f"{path}: not written, since it is empty or holds values that are not finite as {dtype}")
    sums = np.array([_sums(stored)])
    with replacing(path) as file:
        file.write(_new_header((1, *stored.shape), _MODES[dtype], pixel_size_A, sums, volume=False).tobytes())
        file.write(stored.data)


class StackWriter:
    """Write a stack of `n` images piece by piece, in any order; the file appears when all are there.

    A context manager. Images are squares of `box_px`, or (ny, nx) where that is a pair. `dtype` is "float32" (mode 2),
    "float16" (mode 12), "int8" (mode 0) or "uint16" (mode 6). The bytes do not depend on the pieces. Raises RunError
    for values that are not finite in `dtype`, for images left out, and where the file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        n: int,
        box_px: int | tuple[int, int],
        voxel_size_A: float,
        dtype: Literal["float32", "float16", "int8", "uint16"] = "float32",
    ) -> None:
        ny, nx = (box_px, box_px) if isinstance(box_px, int) else box_px
        if n < 1 or ny < 1 or nx < 1:
            raise RunError(f"{path}: not written, since a stack of {n} images of {ny} x {nx} px is empty")
        self._path, self._shape, self._voxel_size_A = path, (n, ny, nx), voxel_size_A
        self._mode = _MODES[dtype]
        self._dtype = np.dtype(dtype).newbyteorder("<")
        # Smallest and largest value, sum and sum of squares of each image: reduced in the order of the file.
        self._sums = np.full((n, 4), np.nan)

    def __enter__(self) -> "StackWriter":
        self._open = ExitStack()
        self._file = self._open.enter_context(replacing(self._path))
        return self

    def write(self, start: int, images: np.ndarray) -> None:
        """Put `images` (m, box, box) at positions `start` to `start + m` (from 0)."""
        n, ny, nx = self._shape
        if images.shape[1:] != self._shape[1:] or not 0 <= start <= n - len(images):
            raise ValueError(f"images {images.shape} at {start} do not fit a stack of shape {self._shape}")
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(images, dtype=self._dtype)
        for row, image in enumerate(stored, start):
            if not np.isfinite(image).all():
                raise RunError(
                    f"{self._path}: image {row + 1} holds values that are not finite as {self._dtype.name}; "
                    "quarantine it, or write float32 if it is out of range"
                )
            self._sums[row] = _sums(image)
        self._file.seek(HEADER_BYTES + start * ny * nx * self._dtype.itemsize)
        self._file.write(stored.data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._open.__exit__(kind, error, trace)
            return
        with self._open:
            missing = np.flatnonzero(np.isnan(self._sums[:, 0]))
            if len(missing):
                raise RunError(f"{self._path}: not written, image {missing[0] + 1} is missing ({len(missing)} in all)")
            header = _new_header(self._shape, self._mode, self._voxel_size_A, self._sums, volume=False)
            self._file.seek(0)
            self._file.write(header.tobytes())


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """The file, decompressed, and its size: None for a compressed one, where only reading tells."""
    path = Path(path)
    with ExitStack() as stack:
        try:
            plain = stack.enter_context(path.open("rb"))
            size = path.stat().st_size
            magic = plain.read(2)
            plain.seek(0)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); expected an MRC file") from error
        if magic in _OPENERS:
            yield cast(BinaryIO, stack.enter_context(_OPENERS[magic](plain, "rb"))), None
        else:
            yield plain, size


def _read(path: str | Path, file: BinaryIO, count: int) -> bytearray:
    """Up to `count` bytes; what is allocated follows what is there, not what a header claims."""
    data = bytearray()
    try:
        while len(data) < count and (piece := file.read(min(count - len(data), _READ_BYTES))):
            data += piece
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a whole, undamaged MRC file") from error
    return data


def _read_header(path: str | Path, file: BinaryIO) -> _Header:
    raw = _read(path, file, HEADER_BYTES)
    if len(raw) < HEADER_BYTES:
        raise InputError(f"{path}: is {len(raw)} bytes long; expected an MRC file, whose header alone has 1024")
    # The machine stamp first, then the other order: stamps are wrong in some old files.
    orders: tuple[Order, Order] = (">", "<") if raw[212] == 0x11 else ("<", ">")
    problems = []
    for order in orders:
        header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
        problem = _problem(header)
        if not problem:
            break
        problems.append(problem)
    else:
        modes = ", ".join(map(str, _DTYPES))
        raise InputError(f"{path}: {problems[0]}; expected an MRC file of mode {modes}")
    nx, ny, nz, mode, extended = (int(header[name]) for name in ("nx", "ny", "nz", "mode", "nsymbt"))
    dtype = _DTYPES[mode]
    # The standard's bytes are signed; IMOD's older ones are not, unless its flag says so.
    if mode == 0 and int.from_bytes(raw[152:156], _NAMES[order]) == _IMOD_STAMP:
        dtype = "i1" if int.from_bytes(raw[156:160], _NAMES[order]) & 1 else "u1"
    axes = _axes(header)
    start = dict(zip(axes, (int(header[name]) for name in ("nxstart", "nystart", "nzstart")), strict=True))
    voxel = [_ratio(header["cella"][axis], header["m" + axis]) for axis in "xyz"]
    if header["ispg"] == 0:  # a stack has no third axis
        voxel[2] = voxel[0]
    angles = [float(header["cellb"][angle]) for angle in ("alpha", "beta", "gamma")]
    origin = [float(header["origin"][axis]) for axis in "xyz"]
    return _Header(
        columns=nx,
        rows=ny,
        sections=nz,
        dtype=np.dtype(dtype).newbyteorder(order),
        offset=HEADER_BYTES + extended,
        axes=axes,
        voxel_A=(voxel[0], voxel[1], voxel[2]),
        angles_deg=(angles[0], angles[1], angles[2]),
        origin_A=(origin[0], origin[1], origin[2]) if np.isfinite(origin).all() else (0.0, 0.0, 0.0),
        start_px=(start[1], start[2], start[3]),
    )


def _problem(header: np.void) -> str:
    """What is wrong with a header read in one byte order, empty if nothing is."""
    size = tuple(int(header[name]) for name in ("nx", "ny", "nz"))
    if min(size) < 1:
        return f"its header gives a size of {size}"
    if int(header["mode"]) not in _DTYPES:
        return f"its header gives mode {int(header['mode'])}"
    if sorted(_axes(header)) != [1, 2, 3]:
        return f"its header gives the axis order {_axes(header)}"
    if header["nsymbt"] < 0:
        return f"its header gives an extended header of {int(header['nsymbt'])} bytes"
    return ""


def _axes(header: np.void) -> tuple[int, int, int]:
    axes = (int(header["mapc"]), int(header["mapr"]), int(header["maps"]))
    return axes if axes != (0, 0, 0) else (1, 2, 3)


def _ratio(length: np.floating, cells: np.integer) -> float:
    ratio = float(length) / int(cells) if cells > 0 else 0.0
    # The cell is float32, good to seven digits: 3.54, not 3.539999961853027.
    return float(f"{ratio:.7g}") if 0 < ratio < math.inf else 0.0


def _read_data(path: str | Path, file: BinaryIO, header: _Header, size: int | None) -> np.ndarray:
    expected = header.sections * header.image_bytes
    data = bytearray()
    if size is None or header.offset + expected <= size:
        _read(path, file, header.offset - HEADER_BYTES)
        data = _read(path, file, expected)
    if len(data) < expected:
        present = len(data) if size is None else max(0, size - header.offset)
        raise InputError(
            f"{path}: holds {present} bytes of data; expected {expected} ({header.sections} sections of "
            f"{header.rows} x {header.columns} voxels). It was cut short or is damaged: get the file again"
        )
    # Array axes are sections, rows, columns, which lie along the reverse of header.axes (1, 2, 3 for x, y, z).
    array = np.frombuffer(data, header.dtype).reshape(header.sections, header.rows, header.columns)
    return array.transpose([header.axes[::-1].index(axis) for axis in (3, 2, 1)])


def _sums(image: np.ndarray) -> tuple[float, float, float, float]:
    values = image.astype(np.float64)
    return values.min(), values.max(), values.sum(), np.square(values).sum()


def _new_header(shape: tuple[int, ...], mode: int, voxel_size_A: float, sums: np.ndarray, volume: bool) -> np.ndarray:
    nz, ny, nx = shape
    header = np.zeros((), HEADER_DTYPE)
    header["nx"], header["ny"], header["nz"], header["mode"] = nx, ny, nz, mode
    # A stack (space group 0) is sampled by one section along z.
    header["mx"], header["my"], header["mz"] = nx, ny, nz if volume else 1
    for axis in "xyz":
        header["cella"][axis] = header["m" + axis] * voxel_size_A
    for angle in ("alpha", "beta", "gamma"):
        header["cellb"][angle] = 90
    header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
    mean = sums[:, 2].sum() / (nz * ny * nx)
    header["dmin"], header["dmax"], header["dmean"] = sums[:, 0].min(), sums[:, 1].max(), mean
    header["rms"] = math.sqrt(max(0.0, sums[:, 3].sum() / (nz * ny * nx) - mean * mean))
    header["ispg"] = 1 if volume else 0
    header["map"], header["machst"], header["nversion"] = b"MAP ", (0x44, 0x44, 0, 0), VERSION
    header["nlabl"] = 1
    header["label"][0] = f"dcryo {dcryo.__version__}".ljust(80).encode()
    return header
