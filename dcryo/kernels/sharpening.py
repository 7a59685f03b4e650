"""The fall-off of a map's amplitudes with resolution, and filters by shell that undo it.

A B-factor multiplies amplitudes by exp(-B / (4 d^2)) at the resolution d. That of the fall-off is positive; the one to
sharpen by is its negative, as the field writes it.
"""

from typing import NamedTuple

import numpy as np

from dcryo.kernels import fft
from dcryo.kernels.filters import radius_px
from dcryo.kernels.shells import friedel_weights, volume_shells

FITTED_FROM_A = 10.0
# A straight line through fewer shells says nothing.
_LEAST_SHELLS = 5
# A shell at the very end of the range is in it, for pixel sizes in files have seven digits.
_END = 1e-5


class GuinierFit(NamedTuple):
    """ln(amplitude) = intercept + slope / d^2 over `shells`. bfactor_A2: to sharpen by, 4 x slope (negative where
    amplitudes fall); error_A2: its standard error from the scatter about the line; correlation: of the points."""

    bfactor_A2: float
    error_A2: float
    intercept: float
    correlation: float
    shells: slice


def radial_amplitude(volume: np.ndarray) -> np.ndarray:
    """Mean amplitude of a map's transform per shell, (D // 2 + 1,) float64."""
    box = len(volume)
    amplitude = np.abs(fft.rfftn(volume)).ravel()
    weights = np.broadcast_to(friedel_weights(box), (box, box, box // 2 + 1)).ravel()
    shells = volume_shells(box).ravel()
    sums = np.bincount(shells, weights=amplitude * weights)
    return (sums / np.bincount(shells, weights=weights))[: box // 2 + 1]


def guinier_fit(
    amplitude: np.ndarray, frequency_1_A: np.ndarray, resolution_A: float, from_A: float = FITTED_FROM_A
) -> GuinierFit | None:
    """A line through ln(amplitude) against 1/d^2 from `from_A` to the resolution (Rosenthal & Henderson 2003).

    amplitude, frequency_1_A: (S,), amplitudes weighted by the FSC already. Below 10 A the shape of the molecule decides
    amplitudes, and not their fall-off. None where there are fewer than five shells of positive amplitude.
    """
    within = (frequency_1_A * from_A > 1 - _END) & (frequency_1_A * resolution_A < 1 + _END) & (amplitude > 0)
    shells = np.flatnonzero(within)
    if len(shells) < _LEAST_SHELLS:
        return None
    x, y = frequency_1_A[shells] ** 2, np.log(amplitude[shells])
    spread = np.sum((x - x.mean()) ** 2)
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / spread)
    intercept = float(y.mean() - slope * x.mean())
    left = y - intercept - slope * x
    error = float(np.sqrt(np.sum(left**2) / (len(x) - 2) / spread))
    correlation = float(np.corrcoef(x, y)[0, 1]) if np.ptp(y) > 0 else 0.0
    return GuinierFit(4 * slope, 4 * error, intercept, correlation, slice(int(shells[0]), int(shells[-1]) + 1))


def fsc_weight(fsc: np.ndarray) -> np.ndarray:
    """Weight of each shell of the map of both halves, sqrt(2 FSC / (1 + FSC)) (Rosenthal & Henderson 2003, eq. 7)."""
    known = np.maximum(fsc, 0)
    return np.sqrt(2 * known / (1 + known))


def bfactor_gain(bfactor_A2: float, frequency_1_A: np.ndarray) -> np.ndarray:
    """Factor of each shell by a B-factor: a negative one sharpens."""
    return np.exp(-bfactor_A2 / 4 * frequency_1_A**2)


def model_gain(amplitude: np.ndarray, model_amplitude: np.ndarray) -> np.ndarray:
    """Factor of each shell that gives a map the mean amplitudes of a model's density, up to one common factor.

    Shells where the map is empty keep what they have. The common factor leaves the sum of the squares of the
    amplitudes as it was, so that levels stay comparable.
    """
    gain = np.divide(model_amplitude, amplitude, out=np.zeros_like(amplitude), where=amplitude > 0)
    number = np.arange(len(amplitude), dtype=np.float64) ** 2
    kept = np.sum(number * amplitude**2) / max(float(np.sum(number * (gain * amplitude) ** 2)), 1e-300)
    return gain * np.sqrt(kept)


def filtered(volume: np.ndarray, gain: np.ndarray, last_shell: float) -> np.ndarray:
    """The map (D, D, D) with each shell multiplied by its gain (D // 2 + 1,), and cut softly about a last shell.

    Between shells gains are interpolated; the cut falls over two shells and is 1/2 at `last_shell`.
    """
    box = len(volume)
    radius = radius_px(box, 3)
    fine = np.arange(0, box // 2 + 1 + 1e-9, 0.05)
    table = np.interp(fine, np.arange(len(gain)), gain)
    table *= 0.5 + 0.5 * np.cos(np.pi * np.clip((fine - last_shell + 1) / 2, 0, 1))
    by_voxel = np.interp(radius, fine, table, right=0.0).astype(np.float32)
    return fft.irfftn(fft.rfftn(volume) * by_voxel, box)
