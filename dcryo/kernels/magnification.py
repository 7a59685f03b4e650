"""Transforms of images between their Fourier pixels, by which a magnification that depends on the direction is undone.

What an image shows at the frequency k belongs to the frequency M k of the specimen (M is RELION's rlnMagMat; Zivanov,
Nakane & Scheres, IUCrJ 7, 2020). So the transform of the image as an even magnification would have made it is, at k,
the transform of the given one at M^-1 k: a sum over its pixels with frequencies off the grid. The sum is taken as by a
non-uniform transform (Dutt & Rokhlin 1993): the image is divided by the envelope of a kernel, padded and transformed,
and the kernel interpolates between the samples. With six taps, the exponential of a semicircle (Barnett, Magland & af
Klinteberg 2019, eq. 1.8) and a box twice as large, what it gets wrong is 1e-5 of the transform, everywhere in the box.
"""

from functools import lru_cache

import numpy as np
import scipy.fft
from numba import njit
from numpy.typing import NDArray

from dcryo.kernels.gridding import smooth_px

_TAPS = 6
_BETA = 2.30 * _TAPS


def transforms_at(images: NDArray[np.float32], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.complex64]:
    """Sums over the pixels of images (n, D, D) at P frequencies, (n, P): of the box centre D // 2, without a factor.

    x, y: (P,) in Fourier pixels, of any value up to D / 2.
    """
    box = images.shape[-1]
    padded = smooth_px(2 * box)
    along = _envelope(box, padded)
    start, weights = _around(np.stack([x, y]) * (padded / box))
    out = np.empty((len(images), len(x)), dtype=np.complex64)
    margin = _TAPS
    for image, values in zip(images, out, strict=True):
        filled = np.zeros((padded, padded), dtype=np.float32)
        filled[:box, :box] = image / (along[:, None] * along)
        filled = np.roll(filled, (-(box // 2), -(box // 2)), axis=(0, 1))
        half = scipy.fft.rfft2(filled, workers=1)
        # Columns before the first and after the last are those of the other half plane.
        mates = np.conj(np.roll(half[::-1], 1, axis=0))
        grid = np.concatenate([mates[:, margin:0:-1], half, mates[:, -2 : -2 - margin : -1]], axis=1)
        _interpolate(grid, start[0] + margin, start[1], weights[0], weights[1], values)
    return out


@lru_cache(maxsize=4)
def _envelope(box_px: int, padded: int) -> NDArray[np.float32]:
    """Transform of the kernel at the pixels of a box, (D,)."""
    nodes, shares = np.polynomial.legendre.leggauss(100)
    place = nodes * _TAPS / 2
    angle = 2 * np.pi * (np.arange(box_px) - box_px // 2)[:, None] / padded * place
    return np.asarray((_kernel(place) * shares * _TAPS / 2 * np.cos(angle)).sum(axis=1), dtype=np.float32)


def _kernel(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    square = np.clip(1 - (2 * distance / _TAPS) ** 2, 0, None)
    return np.asarray(np.exp(_BETA * (np.sqrt(square) - 1)))


def _around(place: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """First of the grid points around places (2, P), and the weights of all, (2, P, _TAPS)."""
    start = np.floor(place).astype(np.int64) - (_TAPS // 2 - 1)
    return start, _kernel(place[..., None] - start[..., None] - np.arange(_TAPS)).astype(np.float32)


@njit(nogil=True, cache=True, fastmath=True)
def _interpolate(grid, column, row, weight_x, weight_y, out):  # type: ignore[no-untyped-def]
    rows = grid.shape[0]
    for p in range(len(out)):
        total = np.complex64(0)
        for j in range(_TAPS):
            line = grid[(row[p] + j) % rows]
            along = np.complex64(0)
            for i in range(_TAPS):
                along += weight_x[p, i] * line[column[p] + i]
            total += weight_y[p, j] * along
        out[p] = total
