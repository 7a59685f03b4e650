"""How much an FSC is worth: independent voxels, confidence bands, information thresholds, and when to claim nothing."""

import numpy as np

from dcryo.kernels.fsc import GOLD_STANDARD, crossing
from dcryo.kernels.shells import friedel_weights, volume_shells

# The two-sided 95 percent of a normal distribution.
_Z_95 = 1.959964
# Standard deviations of pure noise that an FSC has to stand out by before a resolution is read from it: among a hundred
# thousand pairs of noise maps about three do.
_CLAIMED_FROM = 4.0


def independent_voxels(mask: np.ndarray | None, box_px: int, symmetry_order: int) -> np.ndarray:
    """Independent complex numbers in each shell of the transform of a masked map, (D // 2 + 1,) float64.

    mask: (D, D, D) in 0..1, or None for the whole box. Half of the shell's voxels (the others are their Friedel mates),
    fewer by the part of the box that the mask leaves, for neighbours are then correlated, and by the operators of the
    point group. White noise times a mask m has the covariance FT(m^2) between voxels, so that the sum of powers over a
    shell of n voxels varies like one of n (sum m^2)^2 / (D^3 sum m^4) independent ones. (van Heel & Schatz 2005 take
    the box and the object's diameter instead.)
    """
    weights = np.broadcast_to(friedel_weights(box_px), (box_px, box_px, box_px // 2 + 1)).ravel()
    voxels = np.bincount(volume_shells(box_px).ravel(), weights=weights)[: box_px // 2 + 1]
    share = 1.0
    if mask is not None:
        squares = np.square(mask, dtype=np.float64)
        share = float(squares.sum() ** 2 / (box_px**3 * np.square(squares).sum()))
    return voxels / 2 * share / symmetry_order


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


def standing_out(fsc: np.ndarray, independent: np.ndarray, threshold: float = GOLD_STANDARD) -> float:
    """By how many standard deviations of pure noise the FSC up to its first fall below a threshold stands out.

    The mean correlation of these shells, weighted by their independent voxels, of which pure noise has a standard
    deviation of 1 / sqrt(2 n), n of them in all.
    """
    shells = slice(1, int(crossing(fsc, threshold)) + 1)
    total = float(np.sum(independent[shells]))
    return float(np.sum(fsc[shells] * independent[shells]) / total * np.sqrt(2 * total)) if total > 0 else 0.0


def is_claimed(fsc: np.ndarray, independent: np.ndarray) -> bool:
    """Whether there is a resolution to speak of, or the FSC is what pure noise may have."""
    return bool(fsc[1] >= GOLD_STANDARD) and standing_out(fsc, independent) >= _CLAIMED_FROM
