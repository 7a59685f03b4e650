"""Images moved by the local model of a motion (`dcryo.kernels.motion`), pixel by pixel, by cubic splines.

This is how movies are simulated, with a shift of its own for every pixel. How they are corrected is another matter
(`dcryo.kernels.tiles`): there a tile has one shift and keeps all frequencies, of which splines take the highest. A
simulation that moved the specimen as the correction moves it back would not show what the tiles get wrong.
"""

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray


def spline_response(size: int) -> NDArray[np.float32]:
    """Transform of the cubic B-spline's samples (1/6, 2/3, 1/6) along a periodic axis, at the full axis' frequencies.

    Dividing a transform by it turns samples into the coefficients whose spline goes through them (Unser, IEEE Signal
    Process. Mag. 16(6), 22, 1999, eq. 9), exactly for a periodic axis.
    """
    return ((2.0 + np.cos(2.0 * np.pi * np.fft.fftfreq(size))) / 3.0).astype(np.float32)


def warped(
    coefficients: NDArray[np.float32],
    spatial: NDArray[np.float64],
    offset_px: ArrayLike,
    corner_px: ArrayLike,
    extent_px: ArrayLike,
) -> NDArray[np.float32]:
    """The image that a local model brings onto the image of these spline coefficients.

    coefficients: (ny, nx) float32, periodic. A point r of the image lies in the result at r - offset - s(r), s the
    local model of a frame, `spatial` (2, 6) of `motion.in_space`, at the fractions (r - corner) / extent - 1/2; offset,
    corner and extent are (x, y).
    The point of a pixel is found to s |grad s|^2, far below what an interpolation sees. Returns (ny, nx) float32.
    """
    out = np.empty_like(coefficients)
    offset, corner, extent = (np.asarray(pair, dtype=np.float64) for pair in (offset_px, corner_px, extent_px))
    _warp(coefficients, np.ascontiguousarray(spatial, dtype=np.float64), offset, corner, extent, out)
    return out


@njit(nogil=True, cache=True, inline="always", fastmath=True)
def _polynomial(a, x, y):  # type: ignore[no-untyped-def]
    """The product of `motion.space_terms` and its coefficients, a pixel at a time."""
    return a[0] + x * (a[1] + a[2] * x + a[5] * y) + y * (a[3] + a[4] * y)


@njit(nogil=True, cache=True, inline="always", fastmath=True)
def _weights(f):  # type: ignore[no-untyped-def]
    g = np.float32(1) - f
    sixth = np.float32(1.0 / 6.0)
    first, last = g * g * g * sixth, f * f * f * sixth
    second = np.float32(2.0 / 3.0) - np.float32(0.5) * f * f * (np.float32(2) - f)
    return first, second, np.float32(1) - first - second - last, last


@njit(nogil=True, cache=True, fastmath=True)
def _warp(coefficients, spatial, offset, corner, extent, out):  # type: ignore[no-untyped-def]
    ny, nx = out.shape
    flat = coefficients.reshape(-1)
    ax, ay = spatial[0], spatial[1]
    for row in range(ny):
        for column in range(nx):
            px, py = column + offset[0], row + offset[1]
            x, y = (px - corner[0]) / extent[0] - 0.5, (py - corner[1]) / extent[1] - 0.5
            # Where the point is that comes to this pixel: the shift is that of the point, not of the pixel.
            nearer_x, nearer_y = x + _polynomial(ax, x, y) / extent[0], y + _polynomial(ay, x, y) / extent[1]
            px += _polynomial(ax, nearer_x, nearer_y)
            py += _polynomial(ay, nearer_x, nearer_y)
            below_x, below_y = int(np.floor(px)), int(np.floor(py))
            wx = _weights(np.float32(px - below_x))
            wy = _weights(np.float32(py - below_y))
            total = np.float32(0)
            if 1 <= below_x < nx - 2 and 1 <= below_y < ny - 2:
                first = (below_y - 1) * nx + below_x - 1
                for j in range(4):
                    at = first + j * nx
                    total += wy[j] * (
                        wx[0] * flat[at] + wx[1] * flat[at + 1] + wx[2] * flat[at + 2] + wx[3] * flat[at + 3]
                    )
            else:
                for j in range(4):
                    line = coefficients[(below_y + j - 1) % ny]
                    for i in range(4):
                        total += wy[j] * wx[i] * line[(below_x + i - 1) % nx]
            out[row, column] = total
