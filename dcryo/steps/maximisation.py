"""The maximisation step: from the sums of the two halves to their maps, FSC and regularised references."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcryo.kernels import fsc, solve


class HalfFsc(NamedTuple):
    """FSC of the two halves per shell, (D // 2 + 1,) float64: as they are, and under the mask."""

    unmasked: np.ndarray
    masked: np.ndarray


def assemble(slabs: Sequence[np.ndarray], operators: np.ndarray) -> np.ndarray:
    """Accumulator of a half from its slabs along z, its Friedel and symmetry mates added."""
    return solve.complete(np.concatenate(slabs), operators)


def plain_map(accumulator: np.ndarray, shell_max: int, box_px: int) -> np.ndarray:
    """The map of a half without a filter, on the grey scale of the images: what FSCs are taken of, and archived."""
    precision = solve.weight_floor(solve.mean_weights(accumulator, shell_max))
    return solve.divide(accumulator, precision, box_px)


def half_fsc(first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> HalfFsc:
    """FSC of two half maps, with and without a mask (D, D, D)."""
    return HalfFsc(fsc.shell_correlation(first, second), fsc.shell_correlation(first * mask, second * mask))


def regularised_map(accumulator: np.ndarray, halves: HalfFsc, shell_max: int, box_px: int) -> np.ndarray:
    """The maximum a posteriori map of a half, its prior from the FSC between the halves: the next reference."""
    precision = solve.prior_precision(halves.masked[: shell_max + 1], solve.mean_weights(accumulator, shell_max))
    return solve.divide(accumulator, precision, box_px)


def merged_map(first: np.ndarray, second: np.ndarray, halves: HalfFsc, shell_max: int, box_px: int) -> np.ndarray:
    """The map of all particles, its prior from FSC_full = 2 FSC / (1 + FSC) (Rosenthal & Henderson 2003, eq. 7)."""
    half = np.maximum(halves.masked[: shell_max + 1], 0)
    both = first + second
    return solve.divide(both, solve.prior_precision(2 * half / (1 + half), solve.mean_weights(both, shell_max)), box_px)
