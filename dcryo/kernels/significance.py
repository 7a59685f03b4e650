"""How much an FSC is worth: independent voxels, confidence bands, information thresholds, and when to claim nothing."""

import numpy as np

from dcryo.kernels import fft
from dcryo.kernels.filters import radius_px
from dcryo.kernels.fsc import GOLD_STANDARD, crossing
from dcryo.kernels.shells import friedel_weights, volume_shells

# The two-sided 95 percent of a normal distribution.
_Z_95 = 1.959964
# Standard deviations of pure noise that an FSC has to stand out by before a resolution is read from it: among a hundred
# thousand pairs of noise maps about three do.
_CLAIMED_FROM = 4.0


def independent_voxels(mask: np.ndarray | None, box_px: int, symmetry_order: int) -> np.ndarray:
    """Independent complex numbers in each shell of the transform of a masked map, (D // 2 + 1,) float64.

    mask: (D, D, D) in 0..1, or None for the whole box; one that is 0 everywhere leaves none. Half of a shell's voxels
    count (the others are their Friedel mates), divided by the operators of the point group, and fewer under a mask, for
    neighbours are then correlated.
    White noise times a mask m has the covariance c(d) = FT(m^2)(d) between voxels that are d apart, so the sum of
    powers over a shell varies like that of n / sum_d h(d) |c(d) / c(0)|^2 independent voxels, h(d) being the share of
    the n voxels whose neighbour at d is in the shell too: 1 - d/2 up to d = 1, and 1/(2d) up to the diameter of the
    shell. (van Heel & Schatz 2005 take the ratio of the object's diameter to the box instead.)
    """
    shells = volume_shells(box_px).ravel()
    weights = np.broadcast_to(friedel_weights(box_px), (box_px, box_px, box_px // 2 + 1)).ravel()
    voxels = np.bincount(shells, weights=weights)[: box_px // 2 + 1]
    if mask is None:
        return voxels / 2 / symmetry_order
    if not np.any(mask):
        return np.zeros(len(voxels))
    covariance = np.abs(fft.rfftn(np.square(mask, dtype=np.float32))).ravel().astype(np.float64)
    distance = radius_px(box_px, 3).ravel()
    in_shell = np.where(distance <= 1, 1 - distance / 2, 0.5 / np.maximum(distance, 1))
    correlated = np.cumsum(np.bincount(shells, weights=weights * in_shell * (covariance / covariance[0]) ** 2))
    reach = np.minimum(2 * np.arange(box_px // 2 + 1), len(correlated) - 1)
    return voxels / 2 / np.maximum(correlated[reach], 1) / symmetry_order


def half_bit(independent: np.ndarray) -> np.ndarray:
    """FSC of half maps at which a voxel of the whole map carries half a bit (van Heel & Schatz 2005, eq. 17).

    independent: voxels per shell as `independent_voxels` counts them. Returns the same shape.
    """
    spread = 1 / np.sqrt(np.maximum(independent, 1e-9))
    return (0.2071 + 1.9102 * spread) / (1.2071 + 0.9102 * spread)


def half_bit_crossing(fsc: np.ndarray, threshold: np.ndarray) -> float:
    """Shell, interpolated, at which the FSC first falls below the half-bit threshold, once it has been above it.

    The first shells may have so few voxels that no FSC is above. 0 where it never is.
    """
    above = np.flatnonzero(fsc >= threshold)
    if len(above) == 0:
        return 0.0
    start = int(above[0])
    return start + crossing(np.concatenate([[1.0], (fsc - threshold)[start:]]), 0.0) - 1


def confidence(fsc: np.ndarray, independent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The band (low, high) in which 95 of 100 true correlations lie, (S,) each.

    A shell is a correlation of 2 n real numbers, whose arc tangens hyperbolicus is normal with the variance
    1 / (2 n - 3) (Fisher 1921). Below two independent voxels next to nothing is known, and the variance is 1.
    """
    spread = _Z_95 / np.sqrt(np.maximum(2 * independent - 3, 1.0))
    centre = np.arctanh(np.clip(fsc, -1 + 1e-7, 1 - 1e-7))
    return np.tanh(centre - spread), np.tanh(centre + spread)


def independent_within(mask: np.ndarray, symmetry_order: int) -> np.ndarray:
    """Independent complex numbers in all shells from 1 to each, together, (D // 2 + 1,) float64.

    Under a mask (D, D, D) shells are correlated with their neighbours, so that together they are worth less than
    `independent_voxels` counts in each: of n voxels, n (sum m^2)^2 / (D^3 sum m^4).
    """
    box = len(mask)
    if not np.any(mask):
        return np.zeros(box // 2 + 1)
    squares = np.square(mask, dtype=np.float64)
    share = squares.sum() ** 2 / (box**3 * np.square(squares).sum())
    each = independent_voxels(None, box, symmetry_order)
    each[0] = 0
    return np.cumsum(each) * share


def standing_out(fsc: np.ndarray, within: np.ndarray, threshold: float = GOLD_STANDARD) -> float:
    """By how many standard deviations of pure noise the FSC up to its first fall below a threshold stands out.

    The mean correlation of the n independent voxels of these shells, `within` as `independent_within` counts them; that
    of pure noise has a standard deviation of 1 / sqrt(2 n).
    """
    last = int(crossing(fsc, threshold))
    if within[last] <= 0:
        return 0.0
    mean = np.sum(fsc[1 : last + 1] * np.diff(within)[:last]) / within[last]
    return float(mean * np.sqrt(2 * within[last]))


def is_claimed(fsc: np.ndarray, within: np.ndarray) -> bool:
    """Whether there is a resolution to speak of, or the FSC is what pure noise may have."""
    return bool(fsc[1] >= GOLD_STANDARD) and standing_out(fsc, within) >= _CLAIMED_FROM
