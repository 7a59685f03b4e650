"""Central slices of a Fourier volume, and their exact adjoint.

The transform of a projection is a central slice of the transform of the volume (Bracewell 1956; De Rosier & Klug
1968). Slices are read with the kernel of `gridding` from the transform of the volume in a padded box; what the kernel
does to the volume in real space is divided out by `prepare` beforehand and by `solve` afterwards.

Only the cube around the sphere in use is held, and half of it: (z, y, x) from (-h, -h, -1) to (h, h, h) in samples of
the padded transform. The plane x = -1 repeats what Friedel's law says of x = 1, so that the kernel's taps never leave
the cube.
"""

import numpy as np
from numba import njit

from dcryo.kernels import fft
from dcryo.kernels.gridding import TAPS, envelope, padded_px
from dcryo.kernels.interpolation import before_read, before_write, read, write, write_complex
from dcryo.kernels.shells import Frequencies

# Planes before x = 0.
BEFORE = 1

# Kernels on volumes of more numbers than this, which caches do not hold, ask for what they need so many pixels early.
CACHED = 6 << 20
AHEAD = 16


def half_width(shell_max: int, box_px: int) -> int:
    """Highest frequency of the cube that holds the kernel's taps up to a shell, in padded samples."""
    return int(np.floor(scale(box_px) * (shell_max + 0.5))) + TAPS // 2


def scale(box_px: int) -> float:
    """Padded samples per Fourier pixel."""
    return padded_px(box_px) / box_px


def volume_shape(shell_max: int, box_px: int) -> tuple[int, int, int]:
    """Shape of the half-complex cube for slices up to a shell."""
    width = half_width(shell_max, box_px)
    return 2 * width + 1, 2 * width + 1, width + 1 + BEFORE


def gridding_correction(box_px: int) -> np.ndarray:
    """Real-space envelope of the kernel along one axis, (D,) float64."""
    return envelope(np.arange(box_px) - box_px // 2, padded_px(box_px))


def prepare(volume: np.ndarray, shell_max: int) -> np.ndarray:
    """Fourier volume to take slices from, up to a shell.

    volume: (D, D, D) real, origin at D // 2. Returns `volume_shape(shell_max, D)` complex64.
    """
    box = volume.shape[0]
    along = gridding_correction(box)
    corrected = volume / (along[:, None, None] * along[:, None] * along)
    width = half_width(shell_max, box)
    out = np.empty(volume_shape(shell_max, box), dtype=np.complex64)
    out[:, :, BEFORE:] = fft.padded_transform(corrected, padded_px(box), width)
    np.conj(out[::-1, ::-1, BEFORE + 1], out=out[:, :, BEFORE - 1])
    return out


def extract(prepared: np.ndarray, rotations: np.ndarray, pixels: Frequencies, box_px: int) -> np.ndarray:
    """Central slices at the given rotations.

    prepared: from `prepare`, for at least `pixels.shell_max`; rotations: (N, 3, 3), volume to image coordinates.
    Returns (N, P) complex64: pixel (kx, ky) read at A.T @ (kx, ky, 0).
    """
    _check_reach(prepared, pixels, box_px)
    out = np.empty((len(rotations), len(pixels.kx)), dtype=np.complex64)
    _extract_all(numbers(prepared), prepared.shape, scaled(rotations, box_px), pixels.kx, pixels.ky, out)
    return out


def insert(
    accumulator: np.ndarray, rotations: np.ndarray, values: np.ndarray, weights: np.ndarray, pixels: Frequencies,
    box_px: int,
) -> None:  # fmt: skip
    """Add slices and their weights to an accumulator, in place: the adjoint of `extract`.

    accumulator: `volume_shape(shell_max, box_px) + (3,)` float32, each voxel (real, imaginary, weight);
    rotations: (N, 3, 3); values: (N, P) complex64; weights: (N, P) float32.
    """
    _check_reach(accumulator, pixels, box_px)
    _insert_all(
        accumulator.reshape(-1), accumulator.shape, scaled(rotations, box_px), values, weights, pixels.kx, pixels.ky
    )


def insert_slices_of(
    prepared: np.ndarray, volume: np.ndarray, rotations: np.ndarray, weights: np.ndarray, pixels: Frequencies,
    box_px: int,
) -> None:  # fmt: skip
    """Add slices of one Fourier volume, weighted, to another, in place: `insert` of `weights * extract(prepared, ...)`.

    prepared: from `prepare`; volume: `volume_shape(shell_max, box_px)` complex64, of the same shape; rotations:
    (N, 3, 3); weights: (N, P) float32.
    """
    _check_reach(prepared, pixels, box_px)
    if volume.shape != prepared.shape:
        raise ValueError(f"volumes of different shapes, {prepared.shape} and {volume.shape}")
    _insert_slices_of(
        numbers(prepared), numbers(volume), volume.shape, scaled(rotations, box_px), weights, pixels.kx, pixels.ky
    )


def numbers(prepared: np.ndarray) -> np.ndarray:
    """Real and imaginary parts of a Fourier volume as one flat array, as kernels read it."""
    return prepared.view(np.float32).reshape(-1)


def scaled(rotations: np.ndarray, box_px: int) -> np.ndarray:
    """Rotations times the padding, float32, as kernels take them."""
    return np.ascontiguousarray(np.asarray(rotations, dtype=np.float64) * scale(box_px), dtype=np.float32)


def _check_reach(volume: np.ndarray, pixels: Frequencies, box_px: int) -> None:
    if volume.shape[2] - BEFORE <= half_width(pixels.shell_max, box_px):
        raise ValueError(f"a volume of shape {volume.shape} does not reach shell {pixels.shell_max}")


@njit(nogil=True, cache=True, inline="always", fastmath=True)
def locate(shape, turn, u, v, w):  # type: ignore[no-untyped-def]
    """Where the taps of a frequency (u, v, w) of the turned frame start, in voxels; the fractions; and -1 where it is
    its Friedel mate that is held."""
    x = turn[0, 0] * u + turn[1, 0] * v + turn[2, 0] * w
    y = turn[0, 1] * u + turn[1, 1] * v + turn[2, 1] * w
    z = turn[0, 2] * u + turn[1, 2] * v + turn[2, 2] * w
    sign = np.float32(1)
    if x < 0:
        x, y, z, sign = -x, -y, -z, np.float32(-1)
    below_x, below_y, below_z = np.floor(x), np.floor(y), np.floor(z)
    half = shape[0] // 2
    lowest = ((int(below_z) + half - 1) * shape[1] + int(below_y) + half - 1) * shape[2] + int(below_x)
    return lowest, x - below_x, y - below_y, z - below_z, sign


@njit(nogil=True, cache=True)
def _extract_all(volume, shape, turns, kx, ky, out):  # type: ignore[no-untyped-def]
    for i in range(len(turns)):
        extract_one(volume, shape, turns[i], kx, ky, len(kx), out[i])


@njit(nogil=True, cache=True, fastmath=True)
def extract_one(volume, shape, turn, kx, ky, count, out):  # type: ignore[no-untyped-def]
    """One slice into out[:count]."""
    stride, zero = 2 * shape[2], np.float32(0)
    for p in range(count):
        if len(volume) > CACHED:
            later = min(p + AHEAD, count - 1)
            lowest = locate(shape, turn, np.float32(kx[later]), np.float32(ky[later]), zero)[0]
            before_read(volume, 2 * lowest, stride, stride * shape[1])
        lowest, fx, fy, fz, sign = locate(shape, turn, np.float32(kx[p]), np.float32(ky[p]), zero)
        real, imaginary = read(volume, 2 * lowest, stride, stride * shape[1], fx, fy, fz)
        out[p] = complex(real, sign * imaginary)


@njit(nogil=True, cache=True)
def _insert_all(volume, shape, turns, values, weights, kx, ky):  # type: ignore[no-untyped-def]
    for i in range(len(turns)):
        insert_one(volume, shape, turns[i], values[i], weights[i], kx, ky, len(kx))


@njit(nogil=True, cache=True, fastmath=True)
def insert_one(volume, shape, turn, values, weights, kx, ky, count):  # type: ignore[no-untyped-def]
    """One slice of `count` pixels spread over the kernel's taps around each."""
    stride, zero = 3 * shape[2], np.float32(0)
    for p in range(count):
        if len(volume) > CACHED:
            later = min(p + AHEAD, count - 1)
            lowest = locate(shape, turn, np.float32(kx[later]), np.float32(ky[later]), zero)[0]
            before_write(volume, 3 * lowest, stride, stride * shape[1])
        lowest, fx, fy, fz, sign = locate(shape, turn, np.float32(kx[p]), np.float32(ky[p]), zero)
        write(
            volume, 3 * lowest, stride, stride * shape[1], fx, fy, fz,
            values[p].real, sign * values[p].imag, weights[p],
        )  # fmt: skip


@njit(nogil=True, cache=True, fastmath=True)
def _insert_slices_of(prepared, volume, shape, turns, weights, kx, ky):  # type: ignore[no-untyped-def]
    stride, zero = 2 * shape[2], np.float32(0)
    for i in range(len(turns)):
        for p in range(len(kx)):
            if len(volume) > CACHED:
                later = min(p + AHEAD, len(kx) - 1)
                lowest = locate(shape, turns[i], np.float32(kx[later]), np.float32(ky[later]), zero)[0]
                before_read(prepared, 2 * lowest, stride, stride * shape[1])
                before_read(volume, 2 * lowest, stride, stride * shape[1])
            # The mate of a frequency is read and written alike, so its sign does not matter.
            lowest, fx, fy, fz, _ = locate(shape, turns[i], np.float32(kx[p]), np.float32(ky[p]), zero)
            real, imaginary = read(prepared, 2 * lowest, stride, stride * shape[1], fx, fy, fz)
            write_complex(
                volume, 2 * lowest, stride, stride * shape[1], fx, fy, fz,
                weights[i, p] * real, weights[i, p] * imaginary,
            )  # fmt: skip
