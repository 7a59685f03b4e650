"""The maximisation step: from the sums of the two halves to their maps, FSC and regularised references."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from dcryo.kernels import fft, fsc, non_uniform, solve
from dcryo.kernels.alignment import turned_sum
from dcryo.kernels.shells import volume_shells
from dcryo.kernels.symmetry import symmetry_broken

# Correlations are taken to be at most this, and a turn to be right if it is so much likelier than none.
_SAME, _CLEARLY = 0.999, 10.0
# How often filters by shell and by place are found with each other's help, and the width of a place in wavelengths.
_ROUNDS, _PLACE = 3, 0.7


class HalfFsc(NamedTuple):
    """FSC of the two halves per shell, (D // 2 + 1,) float64: as they are, and under the mask."""

    unmasked: np.ndarray
    masked: np.ndarray


def assemble(slabs: Sequence[np.ndarray], operators: np.ndarray) -> np.ndarray:
    """Accumulator of a half from its slabs along z, its Friedel and symmetry mates added."""
    return solve.complete(np.concatenate(slabs), operators)


def innovations(sums: np.ndarray, of_reference: np.ndarray) -> np.ndarray:
    """What is left of images' sums (..., 3) once those of a reference's slices, (...) complex64, are taken off."""
    left = sums.copy()
    left[..., 0] -= of_reference.real
    left[..., 1] -= of_reference.imag
    return left


def plain_map(
    accumulator: np.ndarray, reference: np.ndarray | None, operators: np.ndarray, shell_max: int, box_px: int
) -> np.ndarray:
    """The map of a half without a filter, on the grey scale of the images: what FSCs are taken of, and archived.

    reference: (D, D, D), whose slices were taken off the images that the accumulator sums, or None.
    """
    precision = solve.weight_floor(solve.mean_weights(accumulator, shell_max, box_px))
    return solve.maximise(accumulator, reference, precision, operators, box_px)


def first_map(accumulator: np.ndarray, mask: np.ndarray, operators: np.ndarray, shell_max: int) -> np.ndarray:
    """A masked map of one half for others to improve on, its prior from the half itself: what is outside the mask is
    noise."""
    weights = solve.mean_weights(accumulator, shell_max, len(mask))
    plain = solve.maximise(accumulator, None, solve.weight_floor(weights), operators, len(mask))
    share = fsc.signal_share(plain, mask)[: shell_max + 1]
    return mask * solve.maximise(accumulator, None, solve.prior_precision(share, weights), operators, len(mask))


def half_fsc(first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> HalfFsc:
    """FSC of two half maps, with and without a mask (D, D, D)."""
    return HalfFsc(fsc.shell_correlation(first, second), fsc.shell_correlation(first * mask, second * mask))


def regularised_map(
    accumulator: np.ndarray,
    reference: np.ndarray | None,
    halves: HalfFsc,
    operators: np.ndarray,
    shell_max: int,
    box_px: int,
    tau2_factor: float = 1.0,
) -> np.ndarray:
    """The maximum a posteriori map of a half, its prior from the FSC between the halves: the next reference.

    tau2_factor: on the power of the prior.
    """
    weights = solve.mean_weights(accumulator, shell_max, box_px)
    precision = solve.prior_precision(halves.masked[: shell_max + 1], weights) / tau2_factor
    return solve.maximise(accumulator, reference, precision, operators, box_px)


def local_filters(regularised: Sequence[np.ndarray], plain: Sequence[np.ndarray], halves: HalfFsc) -> np.ndarray:
    """Which filters make each of two regularised maps predict the other best, place by place; see `filtered`."""
    return non_uniform.choose((regularised[0], regularised[1]), (plain[0], plain[1]), halves.masked)


def filtered(regularised: np.ndarray, place: np.ndarray, halves: HalfFsc) -> np.ndarray:
    """A regularised map with the filter of each place, which both halves have in common."""
    return non_uniform.apply(regularised, place, halves.masked)


def broken(regularised: Sequence[np.ndarray], operators: np.ndarray) -> list[np.ndarray]:
    """References whose subunits differ, the same in both halves, to begin with where a symmetry is relaxed."""
    return [symmetry_broken(_common(volume, operators)[1], operators) for volume in regularised]


class Relaxed(NamedTuple):
    """References (2 of (D, D, D)) of a relaxed symmetry, and the operator by which the second was turned onto the
    first."""

    references: list[np.ndarray]
    turn: np.ndarray


def relaxed(
    regularised: Sequence[np.ndarray], plain: Sequence[np.ndarray], mask: np.ndarray, operators: np.ndarray
) -> Relaxed:
    """The references of the two halves where a symmetry is relaxed: what subunits have in common as it was regularised,
    and what they differ by filtered by its own FSC between the halves, which says how much of it is signal.

    A map has far more signal in what subunits have in common, so that one filter for both would leave the noise of the
    difference, and poses would follow it from mate to mate. Which subunit is the odd one is another in each half,
    unless it is settled between them: the second half is turned where that makes its differences those of the first.
    operators: (G, 3, 3) of the symmetry.
    """
    common = [_common(volume, operators)[1] for volume in regularised]
    first, second = (whole - shared for whole, shared in (_common(volume, operators) for volume in plain))
    turned = [turned_sum(second, operator[None], np.zeros(3)) for operator in operators]
    curves = [np.clip(fsc.shell_correlation(first * mask, other * mask), 0, _SAME) for other in turned]
    shells = np.arange(len(curves[0]))
    # What a correlation of so many voxels says for the turn, over that of noise.
    voxels = 2 * np.pi * shells**2 * float(mask.mean())
    says = np.array([-0.5 * np.sum(voxels * np.log(1 - curve**2)) for curve in curves])
    best = int(np.argmax(says))
    best = best if says[best] > says[0] + _CLEARLY else 0
    pair, place = (first * mask, turned[best] * mask), np.ones_like(mask)
    for _ in range(_ROUNDS):
        gain = np.clip(fsc.shell_correlation(pair[0] * place, pair[1] * place), 0, 1)
        filtered = [_by_shell(volume, gain) for volume in pair]
        place = _agreement(filtered, gain)
    references = [shared + place * difference for shared, difference in zip(common, filtered, strict=True)]
    return Relaxed(references, operators[best])


def _by_shell(volume: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """A map with each shell multiplied by its gain, the corners of Fourier space by none."""
    of_shell = volume_shells(len(volume))
    every = np.zeros(of_shell.max() + 1, dtype=np.float32)
    every[: len(gain)] = gain
    return fft.irfftn(fft.rfftn(volume) * every[of_shell], len(volume))


def _agreement(pair: Sequence[np.ndarray], gain: np.ndarray) -> np.ndarray:
    """What part of two maps' power, place by place, is common to both: (D, D, D) in 0 to 1. Places are as wide as a
    wavelength of what they show."""
    shells = np.arange(len(gain))
    signal = float(np.sum(gain * shells**2))
    mean_shell = max(float(np.sum(gain * shells**3)) / max(signal, 1e-30), 1.0)
    width_px = max(_PLACE * len(pair[0]) / mean_shell, 1.0)
    both = ndimage.gaussian_filter(pair[0] * pair[1], width_px, mode="constant")
    each = ndimage.gaussian_filter((pair[0] ** 2 + pair[1] ** 2) / 2, width_px, mode="constant")
    return np.clip(np.divide(both, each, out=np.zeros_like(both), where=each > 0), 0, 1)


def _common(volume: np.ndarray, operators: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A map, and the mean of it and its symmetry mates; interpolation does the same to both."""
    nowhere = np.zeros(3)
    return turned_sum(volume, np.eye(3)[None], nowhere), turned_sum(volume, operators, nowhere) / len(operators)


def merged_map(
    first: np.ndarray,
    second: np.ndarray,
    references: Sequence[np.ndarray] | None,
    halves: HalfFsc,
    operators: np.ndarray,
    shell_max: int,
    box_px: int,
    tau2_factor: float = 1.0,
) -> np.ndarray:
    """The map of all particles, its prior from FSC_full = 2 FSC / (1 + FSC) (Rosenthal & Henderson 2003, eq. 7).

    references: those of the halves, or None. Their mean is the reference of both together. tau2_factor: on the power
    of the prior.
    """
    half = np.maximum(halves.masked[: shell_max + 1], 0)
    reference = None
    if references is not None:
        reference, apart = (references[0] + references[1]) / 2, (references[0] - references[1]) / 2
        if np.any(apart):
            first, second = (solve.rebased(of, sign * apart, operators) for of, sign in ((first, 1), (second, -1)))
    both = first + second
    precision = solve.prior_precision(2 * half / (1 + half), solve.mean_weights(both, shell_max, box_px)) / tau2_factor
    return solve.maximise(both, reference, precision, operators, box_px)
