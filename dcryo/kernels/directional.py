"""How resolution and sampling depend on direction: conical FSC, the 3D FSC, and the sampling compensation factor.

Directions are unit vectors (x, y, z) of frequencies. A direction, its opposite and their symmetry mates are the same.
"""

import numpy as np
from numba import njit
from scipy.ndimage import uniform_filter1d
from scipy.spatial import cKDTree

from dcryo.kernels import sampling
from dcryo.kernels.fsc import GOLD_STANDARD, crossing
from dcryo.kernels.shells import friedel_weights, volume_shells
from dcryo.kernels.symmetry import asymmetric_unit

HALF_ANGLE_DEG = 20.0
# HEALPix orders of the directions of cones, 7 degrees apart; of those in which sampling is counted, 4 degrees; and of
# the bins of views, 2 degrees.
CONES, SAMPLED, _VIEWS = 3, 4, 5
# A cone's correlation over fewer frequencies than this, mates not counted, says nothing.
_LEAST = 8


def unique_directions(order: int, operators: np.ndarray) -> np.ndarray:
    """Centres of HEALPix pixels of which none is another's opposite or symmetry mate, (N, 3) float64.

    They cover a fundamental domain of the group (G, 3, 3) and the inversion evenly.
    """
    every = sampling.pixel_directions(order, np.arange(sampling.pixel_count(order)))
    return every[asymmetric_unit(every, np.concatenate([operators, -operators]))]


def cone_sums(first: np.ndarray, second: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Sums over shells in double cones about directions: of the product of two maps, of the power of each, and of ones.

    first, second: (D, D, D // 2 + 1) complex64 as `fft.rfftn` gives them; directions: (N, 3). Returns
    (N, D // 2 + 1, 4) float64.
    """
    box = first.shape[0]
    sums = np.zeros((len(directions), box // 2 + 1, 4))
    cosine = np.cos(np.deg2rad(HALF_ANGLE_DEG))
    _add_cones(
        first, second, volume_shells(box), friedel_weights(box), directions.astype(np.float32), np.float32(cosine), sums
    )
    return sums


@njit(nogil=True, cache=True)
def _add_cones(first, second, shells, weights, directions, cosine, sums):  # type: ignore[no-untyped-def]
    box = first.shape[0]
    for iz in range(box):
        kz = np.float32(iz if iz <= box // 2 else iz - box)
        for iy in range(box):
            ky = np.float32(iy if iy <= box // 2 else iy - box)
            for ix in range(first.shape[2]):
                shell = shells[iz, iy, ix]
                if shell == 0 or shell >= sums.shape[1]:
                    continue
                kx = np.float32(ix)
                least = cosine * np.sqrt(kx * kx + ky * ky + kz * kz)
                a, b, weight = first[iz, iy, ix], second[iz, iy, ix], weights[ix]
                product = weight * (a.real * b.real + a.imag * b.imag)
                power_a = weight * (a.real * a.real + a.imag * a.imag)
                power_b = weight * (b.real * b.real + b.imag * b.imag)
                for n in range(len(directions)):
                    along = kx * directions[n, 0] + ky * directions[n, 1] + kz * directions[n, 2]
                    if abs(along) >= least:
                        sums[n, shell, 0] += product
                        sums[n, shell, 1] += power_a
                        sums[n, shell, 2] += power_b
                        sums[n, shell, 3] += weight


def conical_fsc(sums: np.ndarray) -> np.ndarray:
    """FSC in double cones of half angle 20 degrees (Tan et al. 2017), (N, S), of sums (N, S, 4); shell 0 is 1.

    Shells of which a cone holds too few frequencies are as the next one that has enough.
    """
    power = np.sqrt(sums[..., 1] * sums[..., 2])
    enough = (power > 0) & (sums[..., 3] >= 2 * _LEAST)
    curves = np.divide(sums[..., 0], power, out=np.full(power.shape, np.nan), where=enough)
    for shell in range(curves.shape[1] - 2, 0, -1):
        missing = np.isnan(curves[:, shell])
        curves[missing, shell] = curves[missing, shell + 1]
    curves[:, 0] = 1
    return np.nan_to_num(curves)


def resolutions(curves: np.ndarray) -> np.ndarray:
    """Shell at which each curve (N, S), averaged over three shells, first falls below 0.143, fractional, (N,).

    Cones hold few frequencies, so that single shells dip below it by chance.
    """
    return np.array([crossing(curve, GOLD_STANDARD) for curve in uniform_filter1d(curves, 3, axis=1, mode="nearest")])


def areas(curves: np.ndarray) -> np.ndarray:
    """Area under each curve (N, S) from shell 1, in shells, (N,), at least 0; noise past the resolution cancels out."""
    return np.maximum(curves[:, 1:].sum(axis=1), 0)


def area_ratio(curves: np.ndarray) -> float:
    """Conical FSC area ratio: the least area under a curve over the greatest, 1 where all directions are alike.

    (cFAR, as the guide of cryoSPARC 4.4 defines it; it takes less than 0.5 for a preferred orientation.)
    """
    found = areas(curves)
    return float(found.min() / found.max())


def fsc_volume(curves: np.ndarray, directions: np.ndarray, operators: np.ndarray, box_px: int) -> np.ndarray:
    """The 3D FSC (Tan et al. 2017): at every frequency the conical FSC about it, (D, D, D) float32.

    curves: (N, S) at directions (N, 3), between which they are interpolated by weights that fall off like a Gaussian of
    the distance of neighbours. Zero frequency is at D // 2; corners past the last shell are 0.
    """
    mates = np.concatenate([directions @ g.T for g in operators])
    mates = np.concatenate([mates, -mates])
    order = 4  # where curves are interpolated to; a frequency takes the nearest of these
    fine = sampling.pixel_directions(order, np.arange(sampling.pixel_count(order)))
    squared = 2 - 2 * np.clip(fine @ mates.T, -1, 1)
    width = np.deg2rad(sampling.step_deg(CONES))
    weights = np.exp(-squared / (2 * (0.7 * width) ** 2))
    weights = weights.reshape(len(fine), 2 * len(operators), len(directions)).sum(axis=1)
    table = (weights / weights.sum(axis=1, keepdims=True)) @ curves
    axis = np.arange(box_px) - box_px // 2
    out = np.empty((box_px,) * 3, dtype=np.float32)
    tree, y, x = cKDTree(fine), axis[:, None], axis
    for iz, kz in enumerate(axis):
        radius = np.sqrt(kz * kz + y * y + x * x)
        unit = np.stack(np.broadcast_arrays(x, y, kz), axis=-1) / np.maximum(radius, 1)[..., None]
        shell = np.floor(radius + 0.5).astype(int)
        inside = shell < curves.shape[1]
        # Of opposite frequencies both take the curve of the same one.
        unit *= np.where(kz != 0, np.sign(kz), np.where(y != 0, np.sign(y), np.sign(x)))[..., None]
        nearest = tree.query(unit.reshape(-1, 3))[1].reshape(radius.shape)
        out[iz] = np.where(inside, table[nearest, np.minimum(shell, curves.shape[1] - 1)], 0)
    return out


def sampling_of(directions: np.ndarray, views: np.ndarray, operators: np.ndarray, half_width: float) -> np.ndarray:
    """How well views sample frequencies in directions, relative to views spread evenly: (N,), 1 on average.

    A view v (M, 3) and its symmetry mates (G, 3, 3) hold the frequencies on the plane across it, here those with
    |u . v| < half_width. (Baldwin & Lyumkis 2020.)
    """
    bins = sampling.pixel_directions(_VIEWS, np.arange(sampling.pixel_count(_VIEWS)))
    counts = np.bincount(cKDTree(bins).query(views)[1], minlength=len(bins))
    used = np.flatnonzero(counts)
    found = np.zeros(len(directions))
    for g in operators:
        # A frequency u of a view v g is one g u of v.
        along = np.abs((directions @ g.T) @ bins[used].T)
        found += (along < half_width) @ counts[used]
    return found / (len(views) * len(operators) * half_width)


def compensation_factor(sampled: np.ndarray, least: float) -> float:
    """Sampling compensation factor: the harmonic over the arithmetic mean of the sampling over directions (N,).

    1 for an even spread, 8 / pi^2 = 0.81 for side views alone; below that a preferred orientation costs resolution
    (Baldwin & Lyumkis 2020). Directions that no view samples, which would make it 0, count as sampled by `least`.
    """
    bounded = np.maximum(sampled, least)
    return float(1 / (np.mean(1 / bounded) * np.mean(bounded)))
