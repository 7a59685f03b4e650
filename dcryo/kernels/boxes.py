"""Boxes cut out of micrographs: where they lie, their size in Fourier space, their grey values.

Coordinates (x, y) count from the centre of a micrograph's first pixel. What is done to a box, and in which order, is
what RELION's extraction does (Scheres, J. Struct. Biol. 180, 2012), so that particles of both programs can be mixed:
rescaled, dust replaced, a plane subtracted, mean 0 and standard deviation 1 given to the background.
"""

import math
from collections.abc import Sequence

import numpy as np
import scipy.fft
from numba import njit
from numpy.typing import NDArray

from dcryo.kernels.randomness import generator

_DUST_SEED, _DUST = 0, "dust"


def centres(coordinate_px: NDArray[np.float64]) -> NDArray[np.int64]:
    """The pixel (x, y) that a box of each coordinate (N, 2) is centred on, its fraction cut off as RELION does.

    Poses found in RELION's boxes, whose shifts count from there, stay right.
    """
    return np.trunc(np.asarray(coordinate_px, dtype=np.float64)).astype(np.int64)


def contained(centre_px: NDArray[np.int64], box_px: int, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Whether the box about each centre (N, 2) lies wholly in a micrograph of `shape` (y, x); a box_px of 1 asks for
    the centre alone."""
    first = centre_px - box_px // 2
    return np.asarray(((first >= 0) & (first + box_px <= np.array(shape)[::-1])).all(axis=1))


@njit(nogil=True, cache=True)
def crop(micrograph: np.ndarray, centre_px: np.ndarray, box_px: int) -> np.ndarray:
    """Boxes (N, D, D) float32 of a micrograph (y, x) float32 about centres (N, 2) x, y; D // 2 lies on the centre.

    Beyond the edge the nearest pixel of the micrograph is repeated.
    """
    ny, nx = micrograph.shape
    out = np.empty((len(centre_px), box_px, box_px), dtype=np.float32)
    for i in range(len(centre_px)):
        left, low = centre_px[i, 0] - box_px // 2, centre_px[i, 1] - box_px // 2
        # Columns of the box that are in the micrograph.
        start, stop = min(max(-left, 0), box_px), max(min(nx - left, box_px), 0)
        for y in range(box_px):
            row = micrograph[min(max(low + y, 0), ny - 1)]
            for x in range(start):
                out[i, y, x] = row[0]
            if stop > start:
                out[i, y, start:stop] = row[left + start : left + stop]
            for x in range(stop, box_px):
                out[i, y, x] = row[nx - 1]
    return out


def rescaled(images: NDArray[np.float32], sizes_px: Sequence[int]) -> tuple[NDArray[np.float32], ...]:
    """Images (N, D, D) in fewer pixels over the same field of view, (N, d, d) of each size d < D, grey values kept.

    Unlike `filters.rescale_images` this keeps the Nyquist frequency of an even size, or noise would end before it: of a
    pair of frequencies that fall together there, the one with y positive, as RELION does; of those along x the part
    that an image of real numbers can have. The transform is cropped along x before it goes on along y.
    """
    old_px = images.shape[-1]
    lines = scipy.fft.rfft(images, axis=2)[:, :, : max(sizes_px) // 2 + 1]
    transform = scipy.fft.fft(lines, axis=1)
    made = []
    for new_px in sizes_px:
        # 0 to the highest frequency, Nyquist if there is one, and on from the lowest.
        along_x, below = np.arange(new_px // 2 + 1), np.arange(-((new_px - 1) // 2), 0)
        along_y = np.concatenate([along_x, below])
        kept = transform[:, along_y, : new_px // 2 + 1]
        # What the box centre D // 2 of an odd size is off the middle of its first and last pixel.
        shift = (old_px // 2) / old_px - (new_px // 2) / new_px
        if shift != 0.0:
            kept *= np.exp(2j * np.pi * shift * along_x).astype(np.complex64)
            kept *= np.exp(2j * np.pi * shift * along_y).astype(np.complex64)[:, None]
        # Along the last axis the imaginary parts of frequency zero and of Nyquist do not count.
        lines = scipy.fft.ifft(kept, axis=1, overwrite_x=True)
        image = scipy.fft.irfft(lines, n=new_px, axis=2, overwrite_x=True)
        image *= np.float32((new_px / old_px) ** 2)
        made.append(image)
    return tuple(made)


def normalise(
    images: NDArray[np.float32],
    radius_px: float,
    white_dust_sd: float | None,
    black_dust_sd: float | None,
    identity: NDArray[np.uint64],
) -> NDArray[np.bool_]:
    """Give the background of images (N, D, D), in place, mean 0 and standard deviation 1.

    The background is what lies farther than `radius_px` from the box centre. First, if asked for, pixels of the whole
    image that are so many standard deviations of the background above (white) or below (black) its mean are replaced by
    noise like the background's. Then a plane fitted to the background is subtracted. identity: (N,) what the noise is
    keyed by. Returns (N,) whether the background has a deviation; images without one, or with one that is not finite,
    keep their contrast.
    """
    edges = _disc_edges(images.shape[-1], radius_px)
    usable = np.empty(len(images), dtype=bool)
    for number, image in enumerate(images):
        if white_dust_sd is not None or black_dust_sd is not None:
            mean, deviation = _moments(image, edges)
            low = -np.inf if black_dust_sd is None else mean - black_dust_sd * deviation
            high = np.inf if white_dust_sd is None else mean + white_dust_sd * deviation
            dust = np.flatnonzero((image < low) | (image > high))
            noise = generator(_DUST_SEED, _DUST, int(identity[number])).standard_normal(len(dust))
            image.flat[dust] = mean + deviation * noise
        mean, deviation = _flatten(image, edges)
        usable[number] = 0.0 < deviation < math.inf
        if usable[number]:
            _standardise(image, mean, deviation)
    return usable


def _disc_edges(box_px: int, radius_px: float) -> NDArray[np.int64]:
    """First column inside the disc about the box centre and first one past it, of each row, (D, 2); equal where the
    row misses it."""
    axis = np.arange(box_px) - box_px // 2
    # What is meant to be a whole number of pixels, diameter by pixel size, need not be one in its last digits.
    squared = round(radius_px, 6) ** 2 - axis.astype(np.float64) ** 2
    half = np.floor(np.sqrt(np.maximum(squared, 0.0))).astype(np.int64)
    start = np.clip(box_px // 2 - half, 0, box_px)
    stop = np.clip(box_px // 2 + half + 1, 0, box_px)
    return np.stack([start, np.where(squared < 0, start, stop)], axis=1)


# Sums may be taken in any order, which lets the compiler add several numbers at once; numbers that are not finite stay.
_SUMS = {"reassoc", "contract"}


@njit(nogil=True, cache=True, fastmath=_SUMS)
def _flatten(image: np.ndarray, edges: np.ndarray) -> tuple:
    """Subtract the plane a + b x + c y that fits the background best, by least squares, in place; mean and deviation of
    the background then."""
    box = image.shape[0]
    middle = box // 2
    n, sx, sy, sxx, syy, sxy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    s, sxv, syv = 0.0, 0.0, 0.0
    for row in range(box):
        y = float(row - middle)
        total, moment, count, first, second = 0.0, 0.0, 0, 0.0, 0.0
        for part in range(2):
            start, stop = (0, edges[row, 0]) if part == 0 else (edges[row, 1], box)
            count += max(stop - start, 0)
            for column in range(start, stop):
                x = float(column - middle)
                value = float(image[row, column])
                total += value
                moment += x * value
                first += x
                second += x * x
        n += count
        sx += first
        sy += count * y
        sxx += second
        syy += count * y * y
        sxy += first * y
        s += total
        sxv += moment
        syv += y * total
    if n == 0.0:
        return 0.0, 0.0
    # Normal equations about the background's centre.
    xx, yy, xy = sxx - sx * sx / n, syy - sy * sy / n, sxy - sx * sy / n
    xv, yv = sxv - sx * s / n, syv - sy * s / n
    determinant = xx * yy - xy * xy
    b, c = 0.0, 0.0
    if determinant > 0.0:
        b, c = (xv * yy - yv * xy) / determinant, (yv * xx - xv * xy) / determinant
    a = (s - b * sx - c * sy) / n
    for row in range(box):
        start = a + c * (row - middle)
        for column in range(box):
            image[row, column] -= np.float32(start + b * (column - middle))
    return _moments(image, edges)


@njit(nogil=True, cache=True, fastmath=_SUMS)
def _moments(image: np.ndarray, edges: np.ndarray) -> tuple:
    """Mean and standard deviation of the background."""
    box = image.shape[0]
    n, total, squares = 0, 0.0, 0.0
    for row in range(box):
        for part in range(2):
            start, stop = (0, edges[row, 0]) if part == 0 else (edges[row, 1], box)
            n += max(stop - start, 0)
            for column in range(start, stop):
                value = float(image[row, column])
                total += value
                squares += value * value
    if n == 0:
        return 0.0, 0.0
    mean = total / n
    return mean, math.sqrt(max(squares / n - mean * mean, 0.0))


@njit(nogil=True, cache=True, fastmath=_SUMS)
def _standardise(image: np.ndarray, mean: float, deviation: float) -> None:
    factor = 1.0 / deviation
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            image[row, column] = np.float32((image[row, column] - mean) * factor)


@njit(nogil=True, cache=True)
def apart(position_px: np.ndarray, merit: np.ndarray, distance_px: float) -> np.ndarray:
    """Which of the positions (N, 2) to keep so that none is nearer than a distance to a better one that is kept.

    merit: (N,), the higher the better; of equal ones the first. Returns (N,) bool.
    """
    order = np.argsort(-merit, kind="mergesort")
    kept = np.zeros(len(order), dtype=np.bool_)
    for place in range(len(order)):
        candidate = order[place]
        free = True
        for better in range(place):
            other = order[better]
            if kept[other]:
                x = position_px[candidate, 0] - position_px[other, 0]
                y = position_px[candidate, 1] - position_px[other, 1]
                if x * x + y * y < distance_px * distance_px:
                    free = False
                    break
        kept[candidate] = free
    return kept
