"""How well a map resolves the atoms of a model: Q-scores, and correlation residue by residue.

The Q-score of an atom (Pintilie et al., Nature Methods 17, 328, 2020) is the correlation, about the means, of the map
around the atom with a Gaussian of standard deviation 0.6 A at its place. The map is read on shells around the atom, 0.1
A apart and up to 2 A, at eight points of each that are nearer to this atom than to any other. The paper gives the
Gaussian the height of the map's mean plus 10 standard deviations and the floor of its mean less one; a correlation
about the means does not change by either, so they do not appear here."""

import math

import numpy as np
from numba import njit
from scipy import ndimage
from scipy.spatial import cKDTree

SIGMA_A = 0.6
REACH_A = 2.0
STEP_A = 0.1
POINTS = 8
SHELLS = round(REACH_A / STEP_A)
# Sets of points on a sphere that are tried, each twice as large as the one before, until POINTS of one are the atom's
# own.
_SETS = 7
# Of the paper's linear fit to maps of proteins: expected mean Q = _SLOPE * resolution (A) + _AT_ZERO.
_SLOPE, _AT_ZERO = -0.178, 1.119
_COARSEST_A = 5.0
# Voxels around a residue, at the least, for a correlation to be said.
_FEWEST_VOXELS = 8


def expected_q(resolution_A: float) -> float | None:
    """Mean Q-score that a well-fitted protein has in a map of a resolution, at most 1, by the linear fit of Pintilie et
    al. (2020) to deposited maps; None coarser than 5 A, where a line that ends at 0 says nothing."""
    return None if resolution_A > _COARSEST_A else min(1.0, _SLOPE * resolution_A + _AT_ZERO)


def sphere_points(count: int) -> np.ndarray:
    """Points spread evenly over the unit sphere, (count, 3): a Fibonacci lattice (Gonzalez, Math. Geosci. 42, 2010)."""
    n = np.arange(count)
    z = 1 - (2 * n + 1) / count
    longitude = n * np.pi * (3 - np.sqrt(5))
    radius = np.sqrt(1 - z**2)
    return np.stack([radius * np.cos(longitude), radius * np.sin(longitude), z], axis=1)


def q_scores(volume: np.ndarray, pixel_size_A: float, position_A: np.ndarray) -> np.ndarray:
    """Q-score of each atom, (M,) float64, NaN where the map is flat around it.

    volume: (D, D, D); position_A: (M, 3) x, y, z from the box centre, without hydrogens, which would take points from
    the others. The map is read with cubic B-splines (mirrored at its edges). On a shell where an atom owns fewer than
    POINTS of 512 points, those are taken, and none where it owns none. Where more are its own, they are taken evenly
    from the smallest set that has enough.
    """
    spline = ndimage.spline_filter(volume.astype(np.float64), order=3, mode="mirror").astype(np.float32)
    position = np.ascontiguousarray(position_A, dtype=np.float64)
    start, near = neighbours(position, 2 * REACH_A)
    sets = [sphere_points(POINTS << n) for n in range(_SETS)]
    ends = np.cumsum([0] + [len(points) for points in sets])
    return _q_scores(spline, 1 / pixel_size_A, position, start, near, np.concatenate(sets), ends)


def neighbours(position_A: np.ndarray, within_A: float) -> tuple[np.ndarray, np.ndarray]:
    """Which points are within a distance of each of M: numbers `near[start[m]:start[m + 1]]`, sorted, without m
    itself."""
    pairs = cKDTree(position_A).query_pairs(within_A, output_type="ndarray")
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    start = np.searchsorted(both[:, 0], np.arange(len(position_A) + 1))
    return start.astype(np.int64), both[:, 1].astype(np.int64)


@njit(nogil=True, cache=True)
def _q_scores(spline, per_A, position, start, near, points, ends):  # type: ignore[no-untyped-def]
    scores = np.empty(len(position))
    own = np.empty(ends[-1], dtype=np.int64)
    values, reference = np.empty((SHELLS + 1) * POINTS), np.empty((SHELLS + 1) * POINTS)
    for m in range(len(position)):
        x, y, z = position[m]
        others = near[start[m] : start[m + 1]]
        values[:POINTS] = _spline_at(spline, x * per_A, y * per_A, z * per_A)
        reference[:POINTS] = 1.0
        count = POINTS
        for shell in range(1, SHELLS + 1):
            radius = shell * STEP_A
            found, first = 0, 0
            for level in range(len(ends) - 1):
                first, found = ends[level], 0
                for n in range(first, ends[level + 1]):
                    px, py, pz = x + radius * points[n, 0], y + radius * points[n, 1], z + radius * points[n, 2]
                    nearest = True
                    for other in others:
                        ox, oy, oz = position[other]
                        if (px - ox) ** 2 + (py - oy) ** 2 + (pz - oz) ** 2 < radius * radius:
                            nearest = False
                            break
                    if nearest:
                        own[found] = n
                        found += 1
                if found >= POINTS:
                    break
            for k in range(min(found, POINTS)):
                n = own[k * found // POINTS] if found > POINTS else own[k]
                values[count] = _spline_at(
                    spline, (x + radius * points[n, 0]) * per_A, (y + radius * points[n, 1]) * per_A,
                    (z + radius * points[n, 2]) * per_A,
                )  # fmt: skip
                reference[count] = math.exp(-0.5 * (radius / SIGMA_A) ** 2)
                count += 1
        scores[m] = _correlation(values[:count], reference[:count])
    return scores


@njit(nogil=True, cache=True)
def _correlation(one, other):  # type: ignore[no-untyped-def]
    """Correlation about the means; NaN where either is constant."""
    mean, mean_other = one.mean(), other.mean()
    cross, power, power_other = 0.0, 0.0, 0.0
    for n in range(len(one)):
        a, b = one[n] - mean, other[n] - mean_other
        cross += a * b
        power += a * a
        power_other += b * b
    if power <= 1e-12 * (mean * mean * len(one)) or power_other <= 0.0:
        return np.nan
    return cross / math.sqrt(power * power_other)


@njit(nogil=True, cache=True)
def _spline_at(spline, x, y, z):  # type: ignore[no-untyped-def]
    """A cubic spline with coefficients (D, D, D), mirrored about its first and last voxels, at a place in px from the
    box centre."""
    box = len(spline)
    weights, index = np.empty((3, 4)), np.empty((3, 4), dtype=np.int64)
    for axis, at in enumerate((x, y, z)):
        place = at + box // 2
        low = math.floor(place)
        f = place - low
        weights[axis, 0] = (1 - f) ** 3 / 6
        weights[axis, 1] = 2 / 3 - f * f * (1 - f / 2)
        weights[axis, 2] = 2 / 3 - (1 - f) ** 2 * (1 + f) / 2
        weights[axis, 3] = f**3 / 6
        for tap in range(4):
            i = abs(int(low) - 1 + tap)
            index[axis, tap] = min(i, max(0, 2 * (box - 1) - i))
    total = 0.0
    for iz in range(4):
        for iy in range(4):
            row = 0.0
            for ix in range(4):
                row += weights[0, ix] * spline[index[2, iz], index[1, iy], index[0, ix]]
            total += weights[2, iz] * weights[1, iy] * row
    return total


def group_correlations(
    first: np.ndarray,
    second: np.ndarray,
    pixel_size_A: float,
    position_A: np.ndarray,
    start: np.ndarray,
    reach_A: float,
) -> np.ndarray:
    """Correlation about the means of two maps around groups of atoms, (G,) float64; NaN where a map is constant there
    or fewer than 8 voxels are.

    first, second: (D, D, D). position_A: (M, 3) x, y, z from the box centre; group g is `start[g]:start[g + 1]`. Voxels
    within `reach_A` of any of its atoms count, once each.
    """
    return _group_correlations(
        first, second, np.ascontiguousarray(position_A, dtype=np.float64) / pixel_size_A, start, reach_A / pixel_size_A
    )


@njit(nogil=True, cache=True)
def _group_correlations(first, second, position, start, reach):  # type: ignore[no-untyped-def]
    box, centre = len(first), len(first) // 2
    out = np.full(len(start) - 1, np.nan)
    for g in range(len(out)):
        atoms = position[start[g] : start[g + 1]]
        low, high = np.empty(3, dtype=np.int64), np.empty(3, dtype=np.int64)
        for axis in range(3):
            low[axis] = max(0, math.ceil(atoms[:, axis].min() - reach) + centre)
            high[axis] = min(box - 1, math.floor(atoms[:, axis].max() + reach) + centre)
        n, a, b, aa, bb, ab = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        for z in range(low[2], high[2] + 1):
            for y in range(low[1], high[1] + 1):
                for x in range(low[0], high[0] + 1):
                    for m in range(len(atoms)):
                        dx, dy, dz = atoms[m, 0] + centre - x, atoms[m, 1] + centre - y, atoms[m, 2] + centre - z
                        if dx * dx + dy * dy + dz * dz <= reach * reach:
                            one, other = float(first[z, y, x]), float(second[z, y, x])
                            n += 1
                            a += one
                            b += other
                            aa += one * one
                            bb += other * other
                            ab += one * other
                            break
        if n >= _FEWEST_VOXELS:
            power, power_other = aa - a * a / n, bb - b * b / n
            if power > 1e-12 * aa and power_other > 1e-12 * bb:
                out[g] = (ab - a * b / n) / math.sqrt(power * power_other)
    return out
