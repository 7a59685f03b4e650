"""Central slices of a Fourier volume, and their exact adjoint.

The transform of a projection is a central slice of the transform of the volume (Bracewell 1956; De Rosier & Klug
1968). Slices are read by trilinear interpolation from a volume padded in real space; trilinear interpolation in
Fourier space multiplies the volume in real space by a product of squared sinc, which `prepare` divides out beforehand
and `solve` afterwards (the gridding correction).

Only the cube around the sphere in use is held. Frequencies are in samples of the padded transform and stored in the
order 0, 1, ..., h, -h, ..., -1, so that a negative index of numpy is a negative frequency.
"""

import numpy as np
from numba import njit

from dcryo.kernels import fft
from dcryo.kernels.shells import HalfPlane

PADDING = 2


def half_width(shell_max: int) -> int:
    """Highest frequency of the cube that holds all corners of trilinear cells up to a shell, in padded samples."""
    return PADDING * shell_max + PADDING // 2 + 1


def volume_shape(shell_max: int) -> tuple[int, int, int]:
    """Shape of the half-complex cube for slices up to a shell."""
    width = half_width(shell_max)
    return 2 * width + 1, 2 * width + 1, width + 1


def gridding_correction(box_px: int) -> np.ndarray:
    """Real-space envelope of trilinear interpolation along one axis, (D,) float64: sinc squared."""
    return np.sinc((np.arange(box_px) - box_px // 2) / (PADDING * box_px)) ** 2


def prepare(volume: np.ndarray, shell_max: int) -> np.ndarray:
    """Fourier volume to take slices from, up to a shell.

    volume: (D, D, D) real, origin at D // 2. Returns `volume_shape(shell_max)` complex64.
    """
    box = volume.shape[0]
    envelope = gridding_correction(box)
    corrected = volume / (envelope[:, None, None] * envelope[:, None] * envelope)
    return fft.padded_transform(corrected, PADDING * box, half_width(shell_max))


def extract(prepared: np.ndarray, rotations: np.ndarray, pixels: HalfPlane) -> np.ndarray:
    """Central slices at the given rotations.

    prepared: from `prepare`, for at least `pixels.shell_max`; rotations: (N, 3, 3), volume to image coordinates.
    Returns (N, P) complex64: pixel (kx, ky) read at A.T @ (kx, ky, 0).
    """
    _check_reach(prepared, pixels)
    out = np.empty((len(rotations), len(pixels.kx)), dtype=np.complex64)
    _extract_all(prepared, _scaled(rotations), pixels.kx, pixels.ky, out)
    return out


def insert(
    accumulator: np.ndarray, rotations: np.ndarray, values: np.ndarray, weights: np.ndarray, pixels: HalfPlane
) -> None:
    """Add slices and their weights to an accumulator, in place: the adjoint of `extract`.

    accumulator: `volume_shape(shell_max) + (3,)` float32, each voxel (real, imaginary, weight);
    rotations: (N, 3, 3); values: (N, P) complex64; weights: (N, P) float32.
    """
    _check_reach(accumulator, pixels)
    _insert_all(accumulator, _scaled(rotations), values, weights, pixels.kx, pixels.ky)


def _scaled(rotations: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(rotations, dtype=np.float64) * PADDING, dtype=np.float32)


def _check_reach(volume: np.ndarray, pixels: HalfPlane) -> None:
    if volume.shape[2] <= half_width(pixels.shell_max):
        raise ValueError(f"a volume of shape {volume.shape} does not reach shell {pixels.shell_max}")


@njit(nogil=True, cache=True)
def _extract_all(prepared, scaled, kx, ky, out):  # type: ignore[no-untyped-def]
    for i in range(scaled.shape[0]):
        extract_one(prepared, scaled[i], kx, ky, len(kx), out[i])


@njit(nogil=True, cache=True, fastmath=True)
def extract_one(prepared, scaled, kx, ky, count, out):  # type: ignore[no-untyped-def]
    """One slice into out[:count]; `scaled` is the rotation times the padding, float32."""
    for p in range(count):
        u = np.float32(kx[p])
        v = np.float32(ky[p])
        x = scaled[0, 0] * u + scaled[1, 0] * v
        y = scaled[0, 1] * u + scaled[1, 1] * v
        z = scaled[0, 2] * u + scaled[1, 2] * v
        friedel = x < 0
        if friedel:
            x, y, z = -x, -y, -z
        x0 = int(x)
        y0 = int(np.floor(y))
        z0 = int(np.floor(z))
        fx = x - np.float32(x0)
        fy = y - np.float32(y0)
        fz = z - np.float32(z0)
        gx = np.float32(1) - fx
        gy = np.float32(1) - fy
        gz = np.float32(1) - fz
        line00 = prepared[z0, y0, x0] * gx + prepared[z0, y0, x0 + 1] * fx
        line01 = prepared[z0, y0 + 1, x0] * gx + prepared[z0, y0 + 1, x0 + 1] * fx
        line10 = prepared[z0 + 1, y0, x0] * gx + prepared[z0 + 1, y0, x0 + 1] * fx
        line11 = prepared[z0 + 1, y0 + 1, x0] * gx + prepared[z0 + 1, y0 + 1, x0 + 1] * fx
        value = (line00 * gy + line01 * fy) * gz + (line10 * gy + line11 * fy) * fz
        out[p] = value.conjugate() if friedel else value


@njit(nogil=True, cache=True)
def _insert_all(accumulator, scaled, values, weights, kx, ky):  # type: ignore[no-untyped-def]
    for i in range(scaled.shape[0]):
        insert_one(accumulator, scaled[i], values[i], weights[i], kx, ky, len(kx))


@njit(nogil=True, cache=True, fastmath=True)
def insert_one(accumulator, scaled, values, weights, kx, ky, count):  # type: ignore[no-untyped-def]
    """One slice of `count` pixels spread over the eight corners of each pixel's cell."""
    for p in range(count):
        u = np.float32(kx[p])
        v = np.float32(ky[p])
        x = scaled[0, 0] * u + scaled[1, 0] * v
        y = scaled[0, 1] * u + scaled[1, 1] * v
        z = scaled[0, 2] * u + scaled[1, 2] * v
        re = values[p].real
        im = values[p].imag
        if x < 0:
            x, y, z = -x, -y, -z
            im = -im
        w = weights[p]
        x0 = int(x)
        y0 = int(np.floor(y))
        z0 = int(np.floor(z))
        fx = x - np.float32(x0)
        fy = y - np.float32(y0)
        fz = z - np.float32(z0)
        for dz in range(2):
            cz = fz if dz else np.float32(1) - fz
            for dy in range(2):
                c = cz * (fy if dy else np.float32(1) - fy)
                left = accumulator[z0 + dz, y0 + dy, x0]
                g = c * (np.float32(1) - fx)
                left[0] += g * re
                left[1] += g * im
                left[2] += g * w
                right = accumulator[z0 + dz, y0 + dy, x0 + 1]
                g = c * fx
                right[0] += g * re
                right[1] += g * im
                right[2] += g * w
