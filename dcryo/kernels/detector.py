"""Frames as a detector gives them: gain, sums, pixels that do not tell the truth and what takes their place."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

HOT_SD = 6.0
_BLOCK_PX = 64
_CLIPPINGS = 3
_CANDIDATES = 24
_ENOUGH = 6


def orient_gain(gain: NDArray[np.float32], quarter_turns: int, flip: str) -> NDArray[np.float32]:
    """A gain reference (ny, nx) turned and then flipped, as RELION and MotionCor2 name it.

    quarter_turns: clockwise as relion_display shows it, which has the first row on top. flip: "none", "y" (upside down)
    or "x" (left to right).
    """
    turned = np.rot90(gain, -quarter_turns)
    turned = {"none": turned, "y": turned[::-1], "x": turned[:, ::-1]}[flip]
    return np.ascontiguousarray(turned, dtype=np.float32)


@njit(nogil=True, cache=True)
def add_frame(frame: np.ndarray, gain: np.ndarray, total: np.ndarray, binned: np.ndarray, factor: int) -> None:
    """Add a frame (ny, nx), times the gain, to a sum (ny, nx), and put sums of factor x factor pixels into `binned`.

    gain: (ny, nx), or of size 0 for none. binned: (ny // factor, nx // factor) float32; what is left over at the last
    rows and columns is dropped. total: float32; sums of whole electrons in it are exact up to 2^24.
    """
    ny, nx = frame.shape
    by, bx = binned.shape
    line = np.empty(nx, np.float32)
    binned[:] = 0.0
    for j in range(ny):
        if gain.size > 0:
            for i in range(nx):
                line[i] = np.float32(frame[j, i]) * gain[j, i]
        else:
            for i in range(nx):
                line[i] = np.float32(frame[j, i])
        for i in range(nx):
            total[j, i] += line[i]
        row = j // factor
        if row < by:
            if factor == 2:
                for i in range(bx):
                    binned[row, i] += line[2 * i] + line[2 * i + 1]
            else:
                for i in range(bx):
                    for a in range(factor):
                        binned[row, i] += line[i * factor + a]


@njit(nogil=True, cache=True)
def hot_pixels(total: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Pixels of a sum of frames (ny, nx) that its surroundings do not explain -> (ny, nx) bool.

    Hot ones lie more than HOT_SD standard deviations above the mean of their block of 64 x 64 pixels, dead ones are 0
    where the mean lies as far above that. Mean and deviation are those of the block's pixels that are not `known`
    (ny, nx) to be bad nor lie further out than that, found by clipping three times.
    """
    ny, nx = total.shape
    out = np.zeros((ny, nx), np.bool_)
    for top in range(0, ny, _BLOCK_PX):
        for left in range(0, nx, _BLOCK_PX):
            # The last blocks reach back, so that all have the same size.
            j0, i0 = max(0, min(top, ny - _BLOCK_PX)), max(0, min(left, nx - _BLOCK_PX))
            j1, i1 = min(ny, j0 + _BLOCK_PX), min(nx, i0 + _BLOCK_PX)
            low, high, mean, deviation = -np.inf, np.inf, 0.0, 0.0
            for _ in range(_CLIPPINGS):
                count, first, second = 0, 0.0, 0.0
                for j in range(j0, j1):
                    for i in range(i0, i1):
                        value = np.float64(total[j, i])
                        if not known[j, i] and low <= value <= high:
                            count += 1
                            first += value
                            second += value * value
                if count == 0:
                    break
                mean = first / count
                deviation = np.sqrt(max(0.0, second / count - mean * mean))
                low, high = mean - HOT_SD * deviation, mean + HOT_SD * deviation
            for j in range(j0, j1):
                for i in range(i0, i1):
                    dead = total[j, i] == 0.0 and low > 0.0
                    if not known[j, i] and (total[j, i] > high or dead):
                        out[j, i] = True
    return out


@njit(nogil=True, cache=True)
def good_neighbours(bad: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every bad pixel of a mask (ny, nx): where it is, where good pixels near it are, and how many of those.

    Returns indices into the flattened image: (n,) int64 and (n, 24) int64, and counts (n,) int64 of the second's
    entries. The square around the pixel grows until it holds six good ones. A mask without good pixels has counts 0.
    """
    ny, nx = bad.shape
    at = np.flatnonzero(bad.ravel())
    near = np.zeros((at.size, _CANDIDATES), np.int64)
    counts = np.zeros(at.size, np.int64)
    for n in range(at.size):
        y, x = at[n] // nx, at[n] % nx
        radius = 2
        while True:
            count = 0
            for j in range(max(0, y - radius), min(ny, y + radius + 1)):
                for i in range(max(0, x - radius), min(nx, x + radius + 1)):
                    if not bad[j, i] and count < _CANDIDATES:
                        near[n, count] = j * nx + i
                        count += 1
            if count >= _ENOUGH or radius > max(ny, nx):
                counts[n] = count
                break
            radius += 1
    return at, near, counts


def repair(
    image: NDArray[np.float32],
    neighbours: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    rng: np.random.Generator,
) -> None:
    """Give every bad pixel of an image (ny, nx), in place, the value of a good one near it, drawn at random.

    So the repaired pixels have the mean, the variance and the distribution of their surroundings. neighbours: as
    `good_neighbours` returns them; the image must be contiguous.
    """
    at, near, counts = neighbours
    if len(at):
        drawn = np.minimum((rng.random(len(at)) * counts).astype(np.int64), counts - 1)
        flat = image.reshape(-1)
        flat[at] = flat[near[np.arange(len(at)), drawn]]
