"""Local Fourier shell correlation: of two maps, in bands of frequency, under Gaussian windows all over the box.

A window cut out of a map, transformed and summed over a shell is, by Parseval, a sum in real space: of the products of
the two maps, each band-passed, under the square of the window. Taken in that order (band first, then window), no
strong low frequency leaks into a band through the window's edge, and noise that is independent between the halves
stays at a correlation of zero (Penczek 2020, IUCrJ 7, 995). And it is fast: a band is transformed once for all
windows, in a box no larger than it needs, and Gaussian windows are separable, so that the sums under all of them are
three products with matrices.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numba import njit

from dcryo.kernels import fft, separable
from dcryo.kernels.separable import FWHM

# What is seen at a point is blurred by the window and by the band's own kernel, whose square is 0.72 / reach wide for a
# raised cosine that reaches so far to either side. The window is this part of the reciprocal of the reach: a wider one
# would blur more than it gains in numbers to average over.
_KERNEL, _WINDOW = 0.72, 0.5
_REACH = np.hypot(_KERNEL, _WINDOW)
# Windows are at least so many wavelengths wide, which makes bands reach a sixth of their frequency to either side:
# resolutions are known to a part of that. But they are no wider than this part of the box.
_WAVELENGTHS, _WIDEST = 6 * _REACH, 0.4
# Bands are so many times closer than they reach, for crossings are interpolated between them.
OVERLAP = 2
# Windows overlap: their points are this part of their width apart.
_STRIDE = 0.35
# Of correlations that are noise alone, 19 in 20 lie below so many standard deviations.
_NOISE_QUANTILE = 1.645


@dataclass(frozen=True)
class Windows:
    """Points of the box and bands of the spectrum, in which correlations are taken.

    box_px: D; points: (P,) positions along each axis, in voxels from the box centre; knots: (B + 2 O,) middles of the
    bands in Fourier pixels, O more at either end to which the outer ones reach; width_px: (B,) full width at half
    maximum of what is seen at a point in each band.
    """

    box_px: int
    points: np.ndarray
    knots: np.ndarray
    width_px: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.points),) * 3

    @property
    def centre(self) -> np.ndarray:
        """Middle of each band in Fourier pixels, (B,) float64."""
        return self.knots[OVERLAP:-OVERLAP]


def windows(box_px: int, width_px: float) -> Windows:
    """Windows at least as wide as given (full width at half maximum), on a grid across the box, and their bands.

    At low frequency they grow with the wavelength. Bands run up to the Nyquist frequency. ValueError where the window
    is wider than the box allows.
    """

    def width(shell: float) -> float:
        return max(width_px, min(_WAVELENGTHS * box_px / shell, _WIDEST * box_px))

    def step(shell: float) -> float:
        return float(_REACH * box_px / (OVERLAP * width(shell)))

    nyquist = box_px / 2
    knots = [nyquist + number * step(nyquist) for number in range(OVERLAP, -1, -1)]
    while knots[-1] - step(knots[-1]) >= 0:
        knots.append(knots[-1] - step(knots[-1]))
    centre = np.array(knots[OVERLAP:-OVERLAP])[::-1]
    if width_px > _WIDEST * box_px:
        raise ValueError(
            f"windows of {width_px:.3g} px in a box of {box_px} px; expected at most {_WIDEST:g} of the box"
        )
    points = separable.points_across(box_px, _STRIDE * width(nyquist))
    return Windows(box_px, points, np.array(knots)[::-1], np.array([width(shell) for shell in centre]))


def band_filter(radius: np.ndarray, grid: Windows, band: int) -> np.ndarray:
    """Amplitude of a band at a radius in Fourier pixels, float32: a period of a raised cosine over the number of the
    band, which is interpolated between their middles. All bands add up to the number of times that they overlap."""
    number = np.interp(radius, grid.knots, np.arange(len(grid.knots)) - OVERLAP)
    offset = np.minimum(np.abs(number - band) / OVERLAP, 1)
    return (0.5 + 0.5 * np.cos(np.pi * offset)).astype(np.float32)


def grid_px(grid: Windows, band: int) -> int:
    """Side of a box that holds a band, and the low frequencies of products in it without aliases, at most D."""
    highest = grid.knots[band + 2 * OVERLAP]
    # Four standard deviations of the transform of the window.
    guard = 4 * grid.box_px / (2 * np.pi * _sigma_px(grid, band))
    return min(int(scipy.fft.next_fast_len(int(np.ceil(2 * highest + guard)) + 1, real=True)), grid.box_px)


def band_map(transform: np.ndarray, grid: Windows, band: int) -> np.ndarray:
    """A band of a map on its smaller grid: (D, D, D // 2 + 1) complex64 to (m, m, m) float32, grey values kept."""
    small = grid_px(grid, band)
    out = np.zeros((small, small, small // 2 + 1), dtype=np.complex64)
    scale = np.float32((small / grid.box_px) ** 3)
    _crop(transform, scale * band_filter(_radii(small), grid, band), _highest(small, grid.box_px), out)
    return fft.irfftn(out, small)


def below(transform: np.ndarray, grid: Windows) -> np.ndarray:
    """What the first bands leave of a map towards zero frequency, so that it and `1 / OVERLAP` of all bands add up to
    the map as far as they reach: (D, D, D // 2 + 1) complex64, the same shape."""
    radius = _radii(grid.box_px)
    bands = sum(band_filter(radius, grid, band) for band in range(2 * OVERLAP)) / OVERLAP
    out = np.zeros_like(transform)
    _crop(transform, np.where(radius < grid.centre[OVERLAP], 1 - bands, 0).astype(np.float32), grid.box_px // 2, out)
    return out


def _radii(box_px: int) -> np.ndarray:
    """Radius in Fourier pixels by its square, as far as the corners of a box."""
    return np.sqrt(np.arange(3 * (box_px // 2) ** 2 + 1))


def _highest(small: int, box_px: int) -> int:
    """The highest frequency along an axis that a smaller box shares with a larger one."""
    return (small - 1) // 2 if small < box_px else small // 2


@njit(nogil=True, cache=True)
def _crop(transform, table, last, out):  # type: ignore[no-untyped-def]
    """Frequencies up to `last` along each axis, times a table over |k|^2, on a smaller grid."""
    full, small = transform.shape[0], out.shape[0]
    for iz in range(small):
        kz = iz if iz <= small // 2 else iz - small
        if abs(kz) > last:
            continue
        for iy in range(small):
            ky = iy if iy <= small // 2 else iy - small
            if abs(ky) > last:
                continue
            across = kz * kz + ky * ky
            line = transform[kz % full, ky % full]
            for kx in range(last + 1):
                out[iz, iy, kx] = table[across + kx * kx] * line[kx]


def products(first: np.ndarray, second: np.ndarray, grid: Windows, band: int) -> np.ndarray:
    """Mean products of two maps in a band under each window.

    first, second: (D, D, D // 2 + 1) complex64, as `fft.rfftn` gives them. Returns (3, P, P, P) float32: of the first
    with the second, the first with itself and the second with itself; the ratio of the first to the root of the other
    two is the local FSC.
    """
    a, b = band_map(first, grid, band), band_map(second, grid, band)
    window = _window_matrix(grid, band, len(a))
    return np.stack([separable.along_axes(window, one * other) for one, other in ((a, b), (a, a), (b, b))])


def _window_matrix(grid: Windows, band: int, small: int) -> np.ndarray:
    """Weights (P, m) of the voxels of a grid of m along an axis at each point, which sum up to one."""
    return separable.gaussian(grid.points, grid.box_px, small, _sigma_px(grid, band))


def _sigma_px(grid: Windows, band: int) -> float:
    """Standard deviation of the window on the products of a band."""
    return float(_WINDOW / _REACH * grid.width_px[band] / FWHM)


def at_points(volume: np.ndarray, grid: Windows) -> np.ndarray:
    """Means of a volume (D, D, D) under the narrowest windows: (P, P, P) float32."""
    return separable.along_axes(_window_matrix(grid, len(grid.centre) - 1, grid.box_px), volume)


def spread(values: np.ndarray, grid: Windows, side_px: int) -> np.ndarray:
    """Values at the points, (P, P, P), interpolated linearly to `side_px` voxels across the box: float32.

    Outside the points, the nearest.
    """
    matrix = separable.linear(grid.points, grid.box_px, side_px)
    return separable.along_axes(matrix, values.astype(np.float32))


def correlation(sums: np.ndarray) -> np.ndarray:
    """Local FSC of sums (..., 3, P, P, P): (..., P, P, P) float32, 0 where there is no power."""
    cross, first, second = np.moveaxis(sums, -4, 0)
    root = np.sqrt(np.maximum(first, 0) * np.maximum(second, 0))
    return np.divide(cross, root, out=np.zeros_like(cross), where=root > 0)


def modes(grid: Windows) -> np.ndarray:
    """Independent values of white noise in a band under a window, (B,): the variance of a correlation that is noise is
    one over it.

    With a window g of sum 1 the variance of a sum of g a b, of two fields of unit variance whose correlation at a
    distance r is rho, is the sum of (g * g)(r) rho(r)^2 over all r. g * g is a Gaussian, and rho(r) the mean of
    sinc(2 pi k r / D) over the power of the band. (The corners of the box are taken to be empty.)
    """
    counted = []
    for band in range(len(grid.centre)):
        k = np.linspace(grid.knots[band], min(grid.knots[band + 2 * OVERLAP], grid.box_px / 2), 256)
        power = k**2 * band_filter(k, grid, band).astype(np.float64) ** 2
        sigma = np.sqrt(2) * _sigma_px(grid, band)
        r = np.linspace(0, 5 * sigma, 512)
        rho = np.sum(power[:, None] * np.sinc(2 * k[:, None] * r / grid.box_px), axis=0) / np.sum(power)
        pairs = r**2 * np.exp(-0.5 * (r / sigma) ** 2)
        counted.append(np.sum(pairs) / np.sum(pairs * rho**2))
    return np.array(counted)


def thresholds(grid: Windows, threshold: float) -> np.ndarray:
    """The correlation below which a band is not resolved, (B,): the given one, or what noise reaches in 1 of 20."""
    return np.maximum(threshold, _NOISE_QUANTILE / np.sqrt(modes(grid)))


def resolved(correlations: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Where the local FSC first falls below the thresholds, in bands from the first (0), fractional: (P, P, P) float32.

    correlations: (B, P, P, P). Where the first band is below its own, 0; where none is, B - 1.
    """
    above = correlations - thresholds[:, None, None, None].astype(np.float32)
    below = above < 0
    last = len(above) - 1
    after = np.where(below.any(axis=0), below.argmax(axis=0), last + 1)
    before = np.clip(after - 1, 0, last)
    up = np.take_along_axis(above, before[None], axis=0)[0]
    down = np.take_along_axis(above, np.minimum(after, last)[None], axis=0)[0]
    part = np.divide(up, up - down, out=np.zeros_like(up), where=up > down)
    return np.where(after == 0, 0, np.where(after > last, last, before + part)).astype(np.float32)


def frequency(place: np.ndarray, grid: Windows) -> np.ndarray:
    """Fourier pixels of a place among the bands, as `resolved` gives it."""
    return np.interp(place, np.arange(len(grid.centre)), grid.centre)
