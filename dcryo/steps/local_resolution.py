"""Local resolution, and the map filtered and sharpened by it: what tasks do with some of the bands of two half maps."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcryo.kernels import fft, local_fsc
from dcryo.kernels.filters import crop_transform
from dcryo.kernels.local_fsc import Windows

# Guinier plots are straight from here on (Rosenthal & Henderson 2003); a slope is fitted if they reach this, at least.
_GUINIER_A, _GUINIER_END_A = 10.0, 6.5
# The slope at a point is drawn to that of the whole map as if this part of its evidence were another's.
_SHRINKAGE = 0.5


class LocalFsc(NamedTuple):
    """fsc: (B, P, P, P) local FSC of two half maps; signal: (B, P, P, P), their mean product, the power of what they
    share; place: (P, P, P), the last resolved band, fractional."""

    fsc: np.ndarray
    signal: np.ndarray
    place: np.ndarray


def band_sums(first: np.ndarray, second: np.ndarray, grid: Windows, bands: Sequence[int]) -> np.ndarray:
    """Sums of some bands: (len(bands), 3, P, P, P), as `local_fsc.products` gives them, of two transforms."""
    return np.stack([local_fsc.products(first, second, grid, band) for band in bands])


def local_correlation(
    sums: Sequence[np.ndarray], bands: Sequence[Sequence[int]], grid: Windows, threshold: float
) -> LocalFsc:
    """The local FSC from the sums of all bands, each array those of the bands beside it."""
    every = np.empty((len(grid.centre), 3, *grid.shape), dtype=np.float32)
    for some, own in zip(sums, bands, strict=True):
        every[list(own)] = some
    fsc = local_fsc.correlation(every)
    return LocalFsc(fsc, every[:, 0], local_fsc.resolved(fsc, local_fsc.thresholds(grid, threshold)))


def resolution_map(local: LocalFsc, grid: Windows, pixel_size_A: float) -> np.ndarray:
    """Local resolution in Angstrom, (D, D, D) float32; frequencies are interpolated, not resolutions."""
    shells = local_fsc.frequency(local.place, grid)
    return (grid.box_px * pixel_size_A / local_fsc.spread(shells, grid, grid.box_px)).astype(np.float32)


def bfactors_A2(local: LocalFsc, grid: Windows, pixel_size_A: float, inside: np.ndarray) -> np.ndarray:
    """Fall-off of the signal's amplitude at each point, exp(-B k^2 / 4), (P, P, P) float32 in A^2.

    Guinier's fit (Rosenthal & Henderson 2003) of the local signal from 10 A to the local resolution (as in Kaur et al.
    2021), drawn to that of the mean signal inside (P, P, P) of weights. 0 where the whole map does not go
    far enough for it.
    """
    k = grid.centre / (grid.box_px * pixel_size_A)
    square = k**2 / 4
    used = (k >= 1 / _GUINIER_A)[:, None, None, None] & (np.arange(len(k))[:, None, None, None] <= local.place)
    used &= local.signal > 0
    powers = np.log(np.maximum(local.signal, 1e-30) / _filter_power(grid)[:, None, None, None]) / 2
    weight = used * inside
    in_band = weight.sum(axis=(1, 2, 3))
    rows = in_band > 0.5 * inside.sum()
    if not np.any(rows) or k[rows].max() < 1 / _GUINIER_END_A:
        return np.zeros(grid.shape, dtype=np.float32)
    mean = (powers * weight).sum(axis=(1, 2, 3))[rows] / in_band[rows]
    overall = -float(np.polyfit(square[rows], mean, 1)[0])
    evidence = len(square[rows]) * np.var(square[rows])
    counts = np.maximum(used.sum(axis=0), 1)
    x = square[:, None, None, None] * used
    spread = (x**2).sum(axis=0) - x.sum(axis=0) ** 2 / counts
    along = (x * powers).sum(axis=0) - x.sum(axis=0) * (powers * used).sum(axis=0) / counts
    return ((_SHRINKAGE * evidence * overall - along) / (_SHRINKAGE * evidence + spread)).astype(np.float32)


def _filter_power(grid: Windows) -> np.ndarray:
    """Fourier pixels in each band, weighted by the square of its filter, on any scale, (B,)."""
    radius = np.linspace(0, grid.knots[-1], 4096)
    filters = [local_fsc.band_filter(radius, grid, band).astype(np.float64) for band in range(len(grid.centre))]
    return np.array([np.mean(radius**2 * one**2) for one in filters])


def filtered(
    first: np.ndarray, second: np.ndarray, local: LocalFsc, bfactor_A2: np.ndarray, grid: Windows,
    bands: Sequence[int], pixel_size_A: float,
) -> np.ndarray:  # fmt: skip
    """Some bands of the mean of two half maps, each weighted at each point by what is known there: a transform.

    The weight is C_ref = sqrt(2 FSC / (1 + FSC)) (Rosenthal & Henderson 2003, eq. 7) of the local FSC up to the local
    resolution and 0 past it, times exp(B k^2 / 4) of the local B (P, P, P). What is below the bands is kept, and comes
    with the first. Returns (D, D, D // 2 + 1) complex64; those of all bands add up to the map's.
    """
    box = grid.box_px
    mean = (first + second) / 2
    out = local_fsc.below(mean, grid) if 0 in bands else np.zeros_like(first)
    for band in bands:
        known = np.clip(local.fsc[band], 0, 1)
        weight = np.sqrt(2 * known / (1 + known)) * np.clip(local.place - band + 1, 0, 1)
        k = grid.centre[band] / (box * pixel_size_A)
        weight *= np.exp(bfactor_A2 * np.float32(k**2 / 4)) / local_fsc.OVERLAP
        part = local_fsc.band_map(mean, grid, band)
        small = len(part)
        part *= local_fsc.spread(weight, grid, small)
        out += crop_transform(fft.rfftn(part), small, box, 3) * np.float32((box / small) ** 3)
    return out
