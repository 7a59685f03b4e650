"""Where the molecule is: masks made from maps and from atoms."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from dcryo.kernels import filters, fsc
from dcryo.kernels.masks import cosine_edge, sphere

# What a molecule is told from solvent at: coarser than side chains, finer than domains.
_SEEN_AT_A = 15.0
_SEEN_AT_MOST_A = 40.0
# The surface lies at this part of the way from solvent to the mean inside, but out of the noise.
_LEVEL = 0.3
_NOISE_SIGMAS = 4.0
# Parts with less density than this share of the largest are taken for noise.
_SMALLEST_PART = 0.1
# In pictures a part may be a helix of a domain that is weak: what is left out is smaller.
_SPECK = 0.01
_BINS = 512


class Found(NamedTuple):
    """core: (D, D, D) bool, the voxels of the molecule at low resolution; level: the density at its surface;
    lowpass_A: the resolution it was looked for at."""

    core: np.ndarray
    level: float
    lowpass_A: float


def find_molecule(first: np.ndarray, second: np.ndarray, pixel_size_A: float, level: float = _LEVEL) -> Found | None:
    """The molecule in a pair of half maps (D, D, D), or None where no density stands out of the noise.

    The mean map is filtered to 15 A, or to where the halves correlate by 0.5 if that is less. Solvent and molecule are
    told apart by the threshold that best separates their means (Otsu 1979); the surface is then where the density has
    come `level` of the way from the one mean to the other, which changes slowly with the threshold, and in any case
    above four times the noise, which the difference of the halves shows. Of the connected parts the largest is kept,
    and those that have at least a tenth of its density.
    """
    box = len(first)
    curve = fsc.shell_correlation(first, second)
    seen = fsc.resolution_at(curve, fsc.HALF, box, pixel_size_A)
    lowpass_A = float(np.clip(seen, max(_SEEN_AT_A, 3 * pixel_size_A), max(_SEEN_AT_MOST_A, 3 * pixel_size_A)))
    # Without a common offset, beside which float32 would have no digits left.
    first, second = first - first.mean(), second - second.mean()
    both = filters.lowpass((first + second) / 2, pixel_size_A, lowpass_A)
    noise = filters.lowpass((first - second) / 2, pixel_size_A, lowpass_A)
    inside = sphere(box, box - 2, 0) > 0
    values = both[inside]
    solvent, molecule = _means_of_two(values)
    sigma = 1.4826 * float(np.median(np.abs(noise[inside])))
    surface = max(solvent + level * (molecule - solvent), float(np.median(values)) + _NOISE_SIGMAS * sigma)
    core = _main_parts(both, (both > surface) & inside, _SMALLEST_PART)
    return Found(core, surface, lowpass_A) if core.any() else None


def _main_parts(volume: np.ndarray, inside: np.ndarray, share: float) -> np.ndarray:
    """Of voxels (D, D, D) bool those of the connected part with the most density, and of parts with a share of it."""
    parts, n = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    if n == 0:
        return np.zeros(inside.shape, dtype=bool)
    density = np.bincount(parts.ravel(), weights=volume.ravel())
    density[0] = 0
    return (density >= share * density.max())[parts]


def without_specks(volume: np.ndarray, level: float) -> np.ndarray:
    """A map (D, D, D) for a picture of its surface: parts above the level with less than a hundredth of
    the density of the largest lie below it."""
    above = volume >= level
    return np.where(above & ~_main_parts(volume, above, _SPECK), np.float32(0), volume)


def level_enclosing(volume: np.ndarray, mask: np.ndarray, voxels: float) -> float:
    """The level above which a map (D, D, D) has so many voxels inside a mask of 0 to 1."""
    inside = np.sort(volume[mask > 0.5])[::-1]
    return float(inside[min(int(voxels), len(inside) - 1)])


def molecule_voxels(mask: np.ndarray, molecule: Found | None) -> float:
    """How many voxels a surface is to hold where the mass is not known.

    Solvent between atoms is seen at high resolution: about half of what low resolution takes for the molecule. Where
    nothing was found, a quarter of the mask.
    """
    return float(np.sum(mask > 0.5)) / 4 if molecule is None else float(molecule.core.sum()) / 2


def contour_level(volume: np.ndarray, mask: np.ndarray, pixel_size_A: float) -> float:
    """A level for the surface of a map (D, D, D), by the volume that it encloses inside a mask, from the map alone."""
    return level_enclosing(volume, mask, molecule_voxels(mask, find_molecule(volume, volume, pixel_size_A)))


def _means_of_two(values: np.ndarray) -> tuple[float, float]:
    """Means below and above the threshold at which the variance between the two classes is greatest (Otsu 1979)."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return low, high
    counts, edges = np.histogram(values.astype(np.float64), bins=_BINS, range=(low, high))
    centres = (edges[1:] + edges[:-1]) / 2
    below, total = np.cumsum(counts)[:-1], counts.sum()
    sum_below = np.cumsum(counts * centres)[:-1]
    above, sum_above = total - below, np.sum(counts * centres) - sum_below
    means_below, means_above = sum_below / np.maximum(below, 1), sum_above / np.maximum(above, 1)
    best = int(np.argmax(below * above * (means_above - means_below) ** 2))
    return float(means_below[best]), float(means_above[best])


def soft_mask(core: np.ndarray, extend_px: float, edge_px: float) -> np.ndarray:
    """1 within `extend_px` of the voxels of a core (D, D, D) bool, falling to 0 over the next `edge_px`; float32.

    Nothing lies outside the sphere that the box holds, for there half maps are blank.
    """
    distance = ndimage.distance_transform_edt(~core).astype(np.float32)
    return cosine_edge(distance, extend_px, edge_px) * sphere(len(core), len(core) - 2, 0)


def around_points(position_px: np.ndarray, box_px: int) -> np.ndarray:
    """The voxels nearest to points (M, 3) x, y, z in px from the box centre, (D, D, D) bool; none lies outside."""
    core = np.zeros((box_px,) * 3, dtype=bool)
    x, y, z = (np.floor(position_px + 0.5).astype(np.int64) + box_px // 2).T
    core[z, y, x] = True
    return core
