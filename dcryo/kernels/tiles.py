"""Sums of images that move, filtered and moved by parts of a pixel: tile by tile in Fourier space.

An image is cut into tiles that overlap, under windows whose sum is 1 everywhere. A tile is cut out where its shift, to
whole pixels, says; the rest of the shift and the filter are factors of its transform. Sums are kept as transforms, so
that every frame is transformed once and transformed back never, and nothing is interpolated in real space: within a
tile high frequencies are as they were.
"""

from dataclasses import dataclass

import numpy as np
import pyfftw
from numba import njit
from numpy.typing import NDArray

TILE_PX = 256
_EMPTY_PX = 8
_RAMP_PX = 24
_STEP_PX = TILE_PX - 2 * _EMPTY_PX - _RAMP_PX
_FAST = {"reassoc", "contract", "nsz", "arcp"}


@dataclass(frozen=True)
class Tiling:
    """Tiles of an image (ny, nx): first row and column of each, (T, 2) as (y, x), and centres (T, 2) as (x, y)."""

    shape: tuple[int, int]
    corner: NDArray[np.int64]
    centre_px: NDArray[np.float64]


def tiling_of(shape: tuple[int, int]) -> Tiling:
    """The tiles that cover an image; those at its edges reach beyond it."""
    before = _EMPTY_PX + _RAMP_PX
    starts = [np.arange(-before, side - _EMPTY_PX, _STEP_PX) for side in shape]
    starts = [start[start + _EMPTY_PX < side] for start, side in zip(starts, shape, strict=True)]
    corner = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 2)
    return Tiling(shape, corner, corner[:, ::-1].astype(np.float64) + (TILE_PX - 1) / 2.0)


def window() -> NDArray[np.float32]:
    """Along one side of a tile, (TILE_PX,): 0, a raised cosine, 1, and back; windows a step apart add up to 1."""
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(_RAMP_PX) + 0.5) / _RAMP_PX)
    flat = np.ones(TILE_PX - 2 * (_EMPTY_PX + _RAMP_PX))
    empty = np.zeros(_EMPTY_PX)
    return np.concatenate([empty, ramp, flat, ramp[::-1], empty]).astype(np.float32)


def frequency_px() -> NDArray[np.float64]:
    """|k| in cycles per pixel of a tile's half-complex transform, (TILE_PX, TILE_PX // 2 + 1)."""
    return np.hypot(np.fft.fftfreq(TILE_PX)[:, None], np.arange(TILE_PX // 2 + 1) / TILE_PX)


@njit(nogil=True, cache=True)
def _cut(image, top, left, edge, offset, tile):  # type: ignore[no-untyped-def]
    """A tile under its window; beyond its edges the image is reflected."""
    ny, nx = image.shape
    inside = left >= 0 and left + tile.shape[1] <= nx
    for j in range(tile.shape[0]):
        y = top + j
        while y < 0 or y >= ny:
            y = -1 - y if y < 0 else 2 * ny - 1 - y
        if inside:
            line = image[y, left : left + tile.shape[1]]
            for i in range(tile.shape[1]):
                tile[j, i] = (line[i] - offset) * edge[j] * edge[i]
        else:
            for i in range(tile.shape[1]):
                x = left + i
                while x < 0 or x >= nx:
                    x = -1 - x if x < 0 else 2 * nx - 1 - x
                tile[j, i] = (image[y, x] - offset) * edge[j] * edge[i]


@njit(nogil=True, cache=True, fastmath=_FAST)
def _add(total, transform, weight, phase_y, phase_x):  # type: ignore[no-untyped-def]
    """total += transform * weight * phases; complex arrays as float32 with a last axis of 2."""
    for j in range(transform.shape[0]):
        yr, yi = phase_y[j].real, phase_y[j].imag
        for i in range(transform.shape[1]):
            pr = phase_x[i].real * yr - phase_x[i].imag * yi
            pi = phase_x[i].real * yi + phase_x[i].imag * yr
            re, im, w = transform[j, i].real, transform[j, i].imag, weight[j, i]
            total[j, i] += np.complex64(complex(w * (re * pr - im * pi), w * (re * pi + im * pr)))


def _phases(shift_px: float) -> tuple[NDArray[np.complex64], NDArray[np.complex64]]:
    """Factors along an axis that is whole and one that is halved. At the Nyquist frequency they are real, as the
    transform of what is real is."""
    whole = np.exp(-2j * np.pi * np.fft.fftfreq(TILE_PX) * shift_px)
    whole[TILE_PX // 2] = whole[TILE_PX // 2].real
    return whole.astype(np.complex64), whole[: TILE_PX // 2 + 1].astype(np.complex64)


class TileSums:
    """Sums of moved images, several with weights of their own.

    sums: how many; each takes 1.4 times the memory of an image of float32.
    """

    def __init__(self, shape: tuple[int, int], sums: int) -> None:
        self.tiling = tiling_of(shape)
        half = TILE_PX // 2 + 1
        self._sums = np.zeros((sums, len(self.tiling.corner), TILE_PX, half), np.complex64)
        self._means = np.zeros(sums)
        self._tile = pyfftw.zeros_aligned((TILE_PX, TILE_PX), dtype=np.float32)
        self._transform = pyfftw.zeros_aligned((TILE_PX, half), dtype=np.complex64)
        flags = ("FFTW_ESTIMATE",)
        self._forward = pyfftw.FFTW(self._tile, self._transform, axes=(0, 1), flags=flags, threads=1)
        self._backward = pyfftw.FFTW(
            self._transform, self._tile, axes=(0, 1), direction="FFTW_BACKWARD", flags=flags, threads=1
        )
        self._edge = window()

    def add(
        self, image: NDArray[np.float32], shift_px: NDArray[np.float64], weights: dict[int, NDArray[np.float32]]
    ) -> None:
        """Add an image (ny, nx), its tiles moved by shifts (T, 2) in pixels, to the sums that `weights` names.

        weights: filters (TILE_PX, TILE_PX // 2 + 1) by the number of the sum. The image's mean goes its own way, by the
        filter's value at frequency 0, so that windows have nothing to do with it.
        """
        mean = float(image.mean(dtype=np.float64))
        for number, weight in weights.items():
            self._means[number] += mean * float(weight[0, 0])
        whole = np.rint(shift_px).astype(np.int64)
        for tile, (corner, moved, shift) in enumerate(zip(self.tiling.corner, whole, shift_px, strict=True)):
            top, left = int(corner[0] - moved[1]), int(corner[1] - moved[0])
            _cut(image, top, left, self._edge, np.float32(mean), self._tile)
            self._forward.execute()
            phase_x, phase_y = _phases(shift[0] - moved[0])[1], _phases(shift[1] - moved[1])[0]
            for number, weight in weights.items():
                _add(self._sums[number, tile], self._transform, weight, phase_y, phase_x)

    def image(self, number: int) -> NDArray[np.float32]:
        """One of the sums, (ny, nx)."""
        ny, nx = self.tiling.shape
        out = np.full((ny, nx), self._means[number], np.float32)
        for (top, left), total in zip(self.tiling.corner, self._sums[number], strict=True):
            self._transform[:] = total
            self._backward.execute()
            j0, i0, j1, i1 = max(0, top), max(0, left), min(ny, top + TILE_PX), min(nx, left + TILE_PX)
            out[j0:j1, i0:i1] += self._tile[j0 - top : j1 - top, i0 - left : i1 - left] / np.float32(TILE_PX**2)
        return out
