"""Amplitude spectra of micrographs, averaged over tiles that overlap, and what is left of them without background.

A half spectrum has shape (2 h + 1, h + 1): rows are ky = -h ... h, columns kx = 0 ... h, in samples of 1 / (side of the
tile), so that a ring of resolution d lies at radius side / d whatever the pixel size.
"""

import math

import numpy as np
import scipy.fft
from numba import njit
from numpy.typing import NDArray

Half = NDArray[np.float32]

_BANDS = 4
"""Bands of frequency in which a tile is compared with the others."""

LOOKS_PER_PIXEL = (35.0 / 18.0) ** 2
"""Pixels of a spectrum of Hann-windowed tiles to one independent number: (sum w^4 / (sum w^2)^2 per sample) squared."""


def tile_starts(length_px: int, tile_px: int) -> NDArray[np.int64]:
    """First pixels of tiles that cover an axis evenly and overlap by half or more."""
    count = 1 + math.ceil(2.0 * (length_px - tile_px) / tile_px)
    return np.rint(np.linspace(0, length_px - tile_px, count)).astype(np.int64)


def tile_powers(
    image: NDArray[np.float32], tile_px: int, highest: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Power spectra of Hann-windowed tiles of an image (y, x).

    tile_px: side of the tiles, at most the image's; highest: frequency up to which the spectra are kept, in samples of
    the tile's transform, at most tile_px // 2 - 1. Returns (T, 2 h + 1, h + 1) float32, |transform|^2, and the tiles'
    centres (T, 2), (x, y) in pixels. The image's mean is taken off before.

    Tiles one above the other share rows, and so their transforms along x; of those only the columns that are kept are
    transformed along y.
    """
    window = (0.5 - 0.5 * np.cos(2.0 * np.pi * (np.arange(tile_px) + 0.5) / tile_px)).astype(np.float32)
    rows, columns = (tile_starts(length, tile_px) for length in image.shape)
    mean = image.mean()
    powers = np.empty((len(rows) * len(columns), 2 * highest + 1, highest + 1), dtype=np.float32)
    lines = np.empty((len(image), highest + 1), dtype=np.complex64)
    centres = np.empty((len(powers), 2))
    for column, x in enumerate(columns):
        for first in range(0, len(image), _LINES):
            windowed = (image[first : first + _LINES, x : x + tile_px] - mean) * window
            lines[first : first + _LINES] = scipy.fft.rfft(windowed, axis=1, workers=1)[:, : highest + 1]
        for row, y in enumerate(rows):
            number = row * len(columns) + column
            windowed_lines = lines[y : y + tile_px] * window[:, None]
            _power(powers[number], scipy.fft.fft(windowed_lines, axis=0, overwrite_x=True, workers=1))
            centres[number] = x + tile_px / 2, y + tile_px / 2
    return powers, centres


_LINES = 64
"""Rows that are transformed at once, so that they stay in the cache."""


@njit(nogil=True, cache=True)
def _power(out: np.ndarray, transform: np.ndarray) -> None:
    highest = out.shape[1] - 1
    for row in range(out.shape[0]):
        source = transform[row - highest]
        for column in range(out.shape[1]):
            value = source[column]
            out[row, column] = value.real * value.real + value.imag * value.imag


def alike(powers: NDArray[np.float32], lowest: float, deviations: float = 6.0) -> NDArray[np.bool_]:
    """Which of T tiles are like most of them -> (T,) bool.

    powers: (T, 2 h + 1, h + 1). A tile is compared with the median of the others by its mean power in four bands
    between the radius `lowest` and h, in logarithms. It is left out where it is further off than `deviations` times the
    normal spread (1.4826 times the median deviation) and than half as much again, and where it has no finite power.
    """
    highest = powers.shape[2] - 1
    edges = np.linspace(lowest, highest, _BANDS + 1)
    means = _band_means(powers, edges)
    good = np.isfinite(means).all(axis=1) & (means > 0.0).all(axis=1)
    if not good.any():
        return good
    logs = np.log(np.where(good[:, None], means, 1.0))
    off = np.abs(logs - np.median(logs[good], axis=0))
    spread = 1.4826 * np.median(off[good], axis=0)
    return good & (off <= np.maximum(deviations * spread, math.log(1.5))).all(axis=1)


@njit(nogil=True, cache=True)
def _band_means(powers: np.ndarray, edges: np.ndarray) -> np.ndarray:
    highest = powers.shape[2] - 1
    _, height, width = powers.shape
    band = np.full((height, width), -1, dtype=np.int8)
    counts = np.zeros(len(edges) - 1)
    # Every second line tells as much.
    for row in range(0, height, 2):
        for column in range(width):
            radius = math.sqrt((row - highest) ** 2 + column**2)
            for b in range(len(counts)):
                if edges[b] <= radius < edges[b + 1]:
                    band[row, column] = b
                    counts[b] += 1.0
    sums = np.zeros((len(powers), len(counts)))
    for t in range(len(powers)):
        for row in range(0, height, 2):
            line = np.zeros(len(counts))
            for column in range(width):
                if band[row, column] >= 0:
                    line[band[row, column]] += powers[t, row, column]
            sums[t] += line
    return sums / counts


def amplitude(powers: NDArray[np.float32], kept: NDArray[np.bool_]) -> Half:
    """Root of the mean power of the tiles that are kept -> (2 h + 1, h + 1) float32."""
    return _root_mean(powers, np.flatnonzero(kept))


@njit(nogil=True, cache=True)
def _root_mean(powers: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    _, height, width = powers.shape
    out = np.zeros((height, width), dtype=np.float32)
    for t in tiles:
        for row in range(height):
            for column in range(width):
                out[row, column] += powers[t, row, column]
    scale = np.float32(1.0 / max(1, len(tiles)))
    for row in range(height):
        for column in range(width):
            out[row, column] = math.sqrt(out[row, column] * scale)
    return out


def half_of(centred: NDArray[np.float32]) -> Half:
    """Half spectrum of a whole one (D, D) with zero frequency at D // 2 -> (2 h + 1, h + 1), h = (D - 1) // 2."""
    side = len(centred)
    highest, centre = (side - 1) // 2, side // 2
    return np.ascontiguousarray(
        centred[centre - highest : centre + highest + 1, centre : centre + highest + 1], dtype=np.float32
    )


def whole_of(half: Half) -> NDArray[np.float32]:
    """The whole spectrum (2 h + 1, 2 h + 1), zero frequency in the middle, of its half."""
    return np.concatenate([half[::-1, :0:-1], half], axis=1)


@njit(nogil=True, cache=True)
def rings(half: np.ndarray, sectors: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of a half spectrum over sectors of rings one sample wide, and the numbers of pixels in them.

    Returns two arrays (h + 1, sectors) float64. Ring r holds |k| from r - 1/2 to r + 1/2; sector s directions from
    s pi / sectors on, from kx towards ky. The axes and the lines beside them, where detectors leave their pattern, are
    left out; means of empty sectors are 0.
    """
    highest = half.shape[1] - 1
    sums = np.zeros((highest + 1, sectors))
    counts = np.zeros((highest + 1, sectors))
    for row in range(half.shape[0]):
        ky = row - highest
        if abs(ky) <= 1:
            continue
        for kx in range(2, highest + 1):
            ring = int(math.sqrt(kx * kx + ky * ky) + 0.5)
            if ring <= highest:
                angle = math.atan2(ky, kx) / math.pi
                sector = int((angle + 1.0 if angle < 0.0 else angle) * sectors) % sectors
                sums[ring, sector] += half[row, kx]
                counts[ring, sector] += 1.0
    for ring in range(highest + 1):
        for sector in range(sectors):
            if counts[ring, sector] > 0.0:
                sums[ring, sector] /= counts[ring, sector]
    return sums, counts


def splines(highest: int, lowest: float, count: int) -> NDArray[np.float64]:
    """Values of `count` cubic B-splines at rings 0 to h -> (h + 1, count); 0 below the radius `lowest`.

    Knots are even in the root of the radius: the background falls steeply near the origin and slowly further out.
    """
    place = np.sqrt(np.arange(highest + 1) / lowest)
    place = (place - 1.0) / (place[-1] - 1.0) * (count - 3)
    inside = place >= 0.0
    cell = np.clip(np.floor(place), 0, count - 4).astype(np.int64)
    t = place - cell
    values = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6.0
    out = np.zeros((highest + 1, count))
    for tap in range(4):
        out[np.arange(highest + 1)[inside], cell[inside] + tap] = values[inside, tap]
    return out


def baseline(profile: NDArray[np.float64], weights: NDArray[np.float64], basis: NDArray[np.float64]) -> NDArray:
    """Smooth curve through a radial profile (h + 1,), everywhere above 0: least squares of its logarithm in splines.

    Rings of no weight, and those below the basis, are not looked at; there the curve continues as a constant.
    """
    used = (weights > 0) & (basis.sum(axis=1) > 0) & (profile > 0)
    root = np.sqrt(weights[used])[:, None]
    coefficients = np.linalg.lstsq(basis[used] * root, np.log(profile[used]) * root[:, 0], rcond=1e-8)[0]
    curve = np.exp(basis @ coefficients)
    first = int(np.argmax(basis.sum(axis=1) > 0))
    curve[:first] = curve[first]
    return curve


@njit(nogil=True, cache=True)
def flattened(half: np.ndarray, curve: np.ndarray, limit: float) -> np.ndarray:
    """A half spectrum over its baseline (h + 1,), less 1 -> float32; cut at `limit`. 0 beyond ring h.

    The noise of an amplitude is in proportion to it, so that this has the same noise everywhere.
    """
    highest = half.shape[1] - 1
    out = np.zeros(half.shape, dtype=np.float32)
    for row in range(half.shape[0]):
        ky = row - highest
        for kx in range(highest + 1):
            radius = math.sqrt(kx * kx + ky * ky)
            ring = int(radius)
            if ring < highest:
                along = radius - ring
                value = half[row, kx] / (curve[ring] * (1.0 - along) + curve[ring + 1] * along) - 1.0
                out[row, kx] = min(value, limit)
    return out
