"""Filters chosen for each place of a map by how well they make one half predict the other.

Non-uniform regularisation (Punjani, Zhang & Fleet 2020): of a family of low-pass filters each place takes the one under
which each half of the data, filtered, is nearest to the other, unfiltered, around there. The family here is that of
the filter that the halves have already been given, which is right for the map on the whole, stretched along frequency:
where the map is as good as on the whole nothing is changed, and where its signal ends sooner or later so does the
filter.
"""

import numpy as np

from dcryo.kernels import fft, separable
from dcryo.kernels.fsc import crossing
from dcryo.kernels.separable import FWHM
from dcryo.kernels.shells import volume_shells

# Stretches of the filter, the last ones beyond it.
_STEP, _SHORTER, _LONGER = 1.09, 11, 5
UNCHANGED = _SHORTER
# What the halves have been given less of than this cannot be raised again.
_LEAST_GAIN = 0.02
# Windows are so many wavelengths of the cut-off wide (the adaptive window factor of Punjani et al. is 3), at most this
# part of the box; points are this part of the narrowest apart.
_WAVELENGTHS, _WIDEST, _STRIDE = 3.0, 0.4, 0.35
# Below this shell windows would be as wide as the molecule, and all places are left as they are.
_LEAST_SHELL = 8


def gains(fsc: np.ndarray) -> np.ndarray:
    """The family: gains (K, S) float32 on maps that were filtered by their FSC (S,) as by a Wiener filter.

    Filter `UNCHANGED` leaves the maps as they are, those before it end sooner, those after it later.
    """
    given = np.minimum.accumulate(np.clip(fsc, 0, 1))
    shells = np.arange(len(fsc))
    stretches = _STEP ** np.arange(-_SHORTER, _LONGER + 1)
    wanted = np.stack([np.interp(shells / stretch, shells, given, right=0) for stretch in stretches])
    family = wanted / np.maximum(given, _LEAST_GAIN)
    family[UNCHANGED] = 1
    return family.astype(np.float32)


def choose(
    filtered: tuple[np.ndarray, np.ndarray], plain: tuple[np.ndarray, np.ndarray], fsc: np.ndarray
) -> np.ndarray:
    """Which filter of the family, fractional, is best at each point: (P, P, P) float32.

    filtered: two halves (D, D, D) as filtered by their FSC (S,); plain: the same without a filter. Around a point the
    squared difference of each half from the plain other is summed under a Gaussian window. From one filter to the next
    the window follows the wavelength at which they end, so that what a step gains is summed up over steps.
    """
    box = len(filtered[0])
    end = crossing(fsc, 0.5)
    points = separable.points_across(box, _spacing_px(box, fsc))
    if end < _LEAST_SHELL:
        return np.full((len(points),) * 3, UNCHANGED, dtype=np.float32)
    family, shells = gains(fsc), volume_shells(box)
    transforms = [fft.rfftn(one) for one in filtered]
    # What no filter lets pass of the other half adds noise to the errors, and no more.
    passed = _at(np.where(family[-1] * np.clip(fsc, 0, 1) > 0.01, 1, 0).astype(np.float32), shells)
    others = [fft.irfftn(fft.rfftn(one) * passed, box) for one in plain]
    change, before = np.empty((len(family) - 1, *(len(points),) * 3), dtype=np.float32), None
    for number, gain in enumerate(family):
        at = _at(gain, shells)
        first, second = (fft.irfftn(one * at, box) for one in transforms)
        # (F a - b)^2 + (F b - a)^2 without what no filter changes.
        error = first * (first - 2 * others[1]) + second * (second - 2 * others[0])
        if before is not None:
            wavelength = box / (end * _STEP ** (number - 0.5 - UNCHANGED))
            sigma = min(_WAVELENGTHS * wavelength, _WIDEST * box) / FWHM
            change[number - 1] = separable.along_axes(separable.gaussian(points, box, box, sigma), error - before)
        before = error
    return _best(change)


def _best(change: np.ndarray) -> np.ndarray:
    """The place of the least sum of changes (K - 1, ...), where they go through zero, fractional."""
    total = np.concatenate([np.zeros((1, *change.shape[1:]), change.dtype), np.cumsum(change, axis=0)])
    best = total.argmin(axis=0)
    last = len(change)
    down = -np.take_along_axis(change, np.maximum(best - 1, 0)[None], axis=0)[0]
    up = np.take_along_axis(change, np.minimum(best, last - 1)[None], axis=0)[0]
    # Changes belong half-way between filters.
    part = np.divide(down, down + up, out=np.full(best.shape, 0.5, change.dtype), where=down + up > 0) - 0.5
    return np.where((best == 0) | (best == last), best, best + part).astype(np.float32)


def apply(volume: np.ndarray, place: np.ndarray, fsc: np.ndarray) -> np.ndarray:
    """A map (D, D, D) filtered by its FSC (S,), each place filtered further as chosen (P, P, P): (D, D, D) float32."""
    box = len(volume)
    points = separable.points_across(box, _spacing_px(box, fsc))
    at_voxels = separable.along_axes(separable.linear(points, box, box), place)
    family, shells, transform = gains(fsc), volume_shells(box), fft.rfftn(volume)
    out = np.zeros_like(volume, dtype=np.float32)
    for number, gain in enumerate(family):
        weight = np.maximum(0, 1 - np.abs(at_voxels - number))
        if np.any(weight):
            one = volume if number == UNCHANGED else fft.irfftn(transform * _at(gain, shells), box)
            out += weight * one
    return out


def _spacing_px(box_px: int, fsc: np.ndarray) -> float:
    """Distance of points: part of the narrowest window that there is."""
    shell = max(crossing(fsc, 0.5), _LEAST_SHELL) * _STEP**_LONGER
    return _STRIDE * min(_WAVELENGTHS * box_px / shell, _WIDEST * box_px)


def _at(curve: np.ndarray, shells: np.ndarray) -> np.ndarray:
    """A curve (S,) at the shells of a transform, past its end 0."""
    return np.append(curve, np.float32(0))[np.minimum(shells, len(curve))]
