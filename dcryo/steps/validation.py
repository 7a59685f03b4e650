"""What two half maps say about the map: their correlations, and what the mask has to do with them."""

from typing import NamedTuple

import numpy as np

from dcryo.kernels import fsc, mask_effect, significance

# Random phases are drawn again and again until this many voxels have been, so that in small boxes, whose shells have
# few of them, the mean is no noisier than in large ones.
_VOXELS_DRAWN = 3e7
_FEWEST_DRAWS, _MOST_DRAWS = 3, 12


class Curves(NamedTuple):
    """Curves over shells, (D // 2 + 1,) float64 each.

    unmasked, spherical, masked: FSC of the half maps as they are, under a soft sphere, and under the mask; randomised:
    under the mask, with random phases from `randomised_from` on (None: nowhere); corrected: what is left of masked;
    low, high: its 95 percent confidence band; half_bit: threshold; independent: voxels that each shell is worth;
    within: voxels that the shells up to each are worth together.
    """

    unmasked: np.ndarray
    spherical: np.ndarray
    masked: np.ndarray
    randomised: np.ndarray
    corrected: np.ndarray
    low: np.ndarray
    high: np.ndarray
    half_bit: np.ndarray
    independent: np.ndarray
    within: np.ndarray
    randomised_from: int | None


def half_map_curves(
    first: np.ndarray, second: np.ndarray, mask: np.ndarray, sphere: np.ndarray, symmetry_order: int, seed: int
) -> Curves:
    """All correlations of two half maps, masks and maps (D, D, D). seed: of the random phases."""
    box = len(first)
    unmasked = fsc.shell_correlation(first, second)
    masked = fsc.shell_correlation(first * mask, second * mask)
    shell = mask_effect.randomised_from(unmasked)
    randomised = masked.copy() if shell is None else randomised_fsc(first, second, mask, shell, seed)
    independent = significance.independent_voxels(mask, box, symmetry_order)
    low, high = (
        mask_effect.corrected(bound, randomised, shell) for bound in significance.confidence(masked, independent)
    )
    return Curves(
        unmasked,
        fsc.shell_correlation(first * sphere, second * sphere),
        masked,
        randomised,
        mask_effect.corrected(masked, randomised, shell),
        low,
        high,
        significance.half_bit(independent),
        independent,
        significance.independent_within(mask, symmetry_order),
        shell,
    )


def draws_of(box_px: int) -> int:
    """How often phases are drawn in a box."""
    return int(np.clip(_VOXELS_DRAWN / box_px**3, _FEWEST_DRAWS, _MOST_DRAWS))


def randomised_fsc(first: np.ndarray, second: np.ndarray, mask: np.ndarray, shell: int, seed: int) -> np.ndarray:
    """FSC under a mask of maps whose phases are random from a shell on, the mean over draws, (D // 2 + 1,) float64."""
    curves = [
        fsc.shell_correlation(
            mask_effect.random_phases(first, shell, seed, 2 * draw) * mask,
            mask_effect.random_phases(second, shell, seed, 2 * draw + 1) * mask,
        )
        for draw in range(draws_of(len(first)))
    ]
    return np.mean(curves, axis=0)


# A mask that alone makes the randomised halves correlate by this much where the resolution is read is too tight.
TIGHT, ABSURD = 0.05, 0.3
_SIGMAS = 3.0
# Shells in a row below the threshold after which no more are looked at.
_BELOW_IN_A_ROW = 4
_SHELLS_AT_ONCE = 4


class Verdict(NamedTuple):
    """What may be said of a map.

    claimed: whether there is a resolution at all; leak: the FSC that the mask alone makes at the resolution; tight:
    whether that is too much; fsc: the curve that counts, (S,), the corrected one, or, of a tight mask, that of maps
    which were filtered first; low, high: its 95 percent confidence band.
    """

    claimed: bool
    leak: float
    tight: bool
    fsc: np.ndarray
    low: np.ndarray
    high: np.ndarray


def judge(first: np.ndarray, second: np.ndarray, mask: np.ndarray, curves: Curves, symmetry_order: int) -> Verdict:
    """Which curve counts, and whether it says anything; see `Verdict`.

    There has to be signal without a mask too: under one that was made from the noise of both halves, noise correlates.
    """
    leak, noise = _leak(curves)
    tight = leak > max(TIGHT, _SIGMAS * noise)
    curve, low, high = curves.corrected, curves.low, curves.high
    if tight:
        curve = _filtered_first(first, second, mask, curves)
        low, high = significance.confidence(curve, curves.independent)
    support = ((first != 0) & (second != 0)).astype(np.float32)
    within = significance.independent_within(support, symmetry_order)
    claimed = significance.is_claimed(curve, curves.within) and significance.is_claimed(curves.unmasked, within)
    return Verdict(claimed, leak, tight, curve, low, high)


def _leak(curves: Curves) -> tuple[float, float]:
    """The randomised FSC about the shell where the masked one falls below 0.143, and its standard deviation."""
    if curves.randomised_from is None:
        return 0.0, 0.0
    last = len(curves.masked) - 1
    centre = min(max(int(fsc.crossing(curves.masked, fsc.GOLD_STANDARD)), curves.randomised_from + 3), last - 1)
    about = slice(centre - 1, centre + 2)
    weights = curves.independent[about]
    if not weights.any():
        return 0.0, 0.0
    mean = float(np.sum(curves.randomised[about] * weights) / weights.sum())
    return mean, float(1 / np.sqrt(2 * draws_of(2 * last) * weights.sum()))


def _filtered_first(first: np.ndarray, second: np.ndarray, mask: np.ndarray, curves: Curves) -> np.ndarray:
    """The masked FSC where it is not in doubt, then `mask_effect.filtered_first` as long as it matters, then 0."""
    start = max(1, (curves.randomised_from or 1) - 1)
    out = np.zeros_like(curves.masked)
    out[:start] = curves.masked[:start]
    for shell in range(start, len(out), _SHELLS_AT_ONCE):
        some = np.arange(shell, min(shell + _SHELLS_AT_ONCE, len(out)))
        out[some] = mask_effect.filtered_first(first, second, mask, some)
        if np.all(out[max(1, some[-1] + 1 - _BELOW_IN_A_ROW) : some[-1] + 1] < fsc.GOLD_STANDARD):
            break
    return out
