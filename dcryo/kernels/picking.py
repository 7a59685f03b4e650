"""Where particles are in a micrograph: scores, peaks, what to leave out, and what to take.

All of it at a coarse pixel size, at which a particle is some twenty pixels wide. A score is the correlation of what is
around a pixel with a template that has zero mean and unit norm under its mask, divided by the standard deviation of the
micrograph around it times the square root of the mask's pixels. Taken over the mask alone the deviation would make it
the normalised correlation of A. M. Roseman (Ultramicroscopy 94, 225, 2003), which is blind to contrast: noise that
looks like a particle scores like one. Taken over a wider surrounding, contrast counts, and slow changes of the
micrograph do not.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from numba import njit
from numpy.typing import NDArray

from dcryo.kernels.coarse import (
    Image,
    cosine_transform,
    filtered,
    gaussian_response,
    kernel_response,
    local_mean,
    smooth,
)

Float32 = NDArray[np.float32]

BACKGROUND_DIAMETERS = 1.0
"""Standard deviation of the Gaussian, in diameters, over which background and local deviation are taken."""
CLIP_SIGMAS = 8.0
DECOY_RATIO, DECOY_SIGMAS, DECOY_REACH = 1.5, 3.0, 1.3
"""Where peaks are more than noise: so many for each decoy, so many standard deviations more; and a score so many times
as far from the decoys' median as the best of them."""


def robust(values: NDArray[np.floating]) -> tuple[float, float]:
    """Median and standard deviation as 1.4826 of the median distance from it, which outliers do not move."""
    median = float(np.median(values))
    return median, 1.4826 * float(np.median(np.abs(values - median)))


def standardised(image: Image) -> Image:
    """The image with median 0 and robust deviation 1, cut off at CLIP_SIGMAS; ValueError where it is constant."""
    median, deviation = robust(image)
    if not math.isfinite(deviation) or deviation == 0.0:
        raise ValueError("the image is constant, or not finite")
    return np.clip((image - np.float32(median)) / np.float32(deviation), -CLIP_SIGMAS, CLIP_SIGMAS)


def flattened(image: Image, valid: Image, diameter_px: float) -> tuple[Image, Image]:
    """The image less its local mean and 0 where not `valid` (ny, nx in 0..1), and its local standard deviation.

    Where the deviation is under a third of its median, as in areas without any noise, it is raised to that.
    """
    mean = local_mean(valid, BACKGROUND_DIAMETERS * diameter_px)
    flat = (image - mean(image)) * valid
    variance = np.maximum(mean(flat * flat), 0.0)
    lowest = float(np.median(variance[valid > 0.5])) / 9.0 if (valid > 0.5).any() else 1.0
    return flat, np.sqrt(np.maximum(variance, max(lowest, 1e-12)))


def disc(radius_px: float) -> Image:
    """Soft disc (2n + 1, 2n + 1) with an edge of one pixel."""
    r = _radii(math.ceil(radius_px))
    return np.clip(radius_px + 0.5 - r, 0.0, 1.0).astype(np.float32)


def blob(diameter_px: float) -> tuple[Image, Image]:
    """Template of a bright disc, the negative Laplacian of a Gaussian, and its mask, (2n + 1, 2n + 1) each.

    Its zero lies at the disc's edge: sigma = radius / sqrt(2) (T. Lindeberg, Int. J. Comput. Vis. 30, 79, 1998).
    """
    sigma = diameter_px / math.sqrt(8.0)
    r2 = (_radii(math.ceil(4.0 * sigma)) / sigma) ** 2
    return ((1.0 - r2 / 2.0) * np.exp(-r2 / 2.0)).astype(np.float32), disc(4.0 * sigma)


def _radii(reach_px: int) -> NDArray[np.float64]:
    axis = np.arange(-reach_px, reach_px + 1)
    return np.hypot(axis[:, None], axis)


def under_mask(template: Image, mask: Image) -> Image:
    """A template (..., m, m) with zero mean and unit norm under its mask (m, m), and zero outside."""
    inside = template * mask
    inside = inside - mask * (inside.sum(axis=(-2, -1), keepdims=True) / mask.sum())
    norm = np.sqrt(np.square(inside).sum(axis=(-2, -1), keepdims=True))
    return (inside / np.maximum(norm, 1e-12)).astype(np.float32)


def isotropic_scores(transform: Image, deviation: Image, template: Image, mask: Image) -> Image:
    """Correlation (ny, nx) with an isotropic template under its mask, (m, m) both, over the local deviation.

    transform: `coarse.cosine_transform` of the flat image; that and deviation as from `flattened`. In white noise the
    result has a standard deviation of 1.
    """
    response = kernel_response(under_mask(template, mask), deviation.shape)
    return filtered(transform, response) / deviation


def profile_template(image: Image, at_px: NDArray[np.floating], reach_px: int) -> Image:
    """Rotational average of an image (ny, nx) about positions (n, 2), (x, y) -> (2 reach + 1, 2 reach + 1).

    What is around each position is given the same variance first, so that a few of strong contrast do not decide.
    """
    profile = _profile(image, np.asarray(at_px, dtype=np.float64), reach_px)
    return np.interp(_radii(reach_px), np.arange(len(profile)), profile).astype(np.float32)


@njit(nogil=True, cache=True)
def _profile(image: np.ndarray, at: np.ndarray, reach: int) -> np.ndarray:
    """Means over rings one pixel apart, up to the corners, each pixel shared by the two that it lies between."""
    rings = math.ceil(reach * math.sqrt(2.0)) + 2
    total, weight = np.zeros(rings), np.zeros(rings)
    own_total, own_weight = np.zeros(rings), np.zeros(rings)
    for i in range(len(at)):
        x, y = at[i, 0], at[i, 1]
        own_total[:] = 0.0
        own_weight[:] = 0.0
        count, plain, squared = 0, 0.0, 0.0
        for row in range(max(0, math.ceil(y - rings + 1)), min(image.shape[0], math.floor(y + rings - 1) + 1)):
            for column in range(max(0, math.ceil(x - rings + 1)), min(image.shape[1], math.floor(x + rings - 1) + 1)):
                r = math.hypot(row - y, column - x)
                ring = int(r)
                if ring + 1 < rings:
                    value, outer = image[row, column], r - ring
                    count += 1
                    plain += value
                    squared += value * value
                    own_total[ring] += (1.0 - outer) * value
                    own_weight[ring] += 1.0 - outer
                    own_total[ring + 1] += outer * value
                    own_weight[ring + 1] += outer
        if count > 0:
            mean = plain / count
            variance = squared / count - mean * mean
            if variance > 0.0:
                total += (own_total - mean * own_weight) / math.sqrt(variance)
                weight += own_weight
    return total / np.maximum(weight, 1e-9)


def peaks(scores: Image, allowed: NDArray[np.bool_], distance_px: float) -> tuple[NDArray[np.float64], Float32]:
    """Local maxima of scores (ny, nx), at pixels that are `allowed` (ny, nx), no nearer to each other than a distance
    -> positions (n, 2) as (x, y), and scores (n,), best first.

    Of two that are nearer the better one stays. Positions are those of the parabola through each maximum and its
    neighbours along x and along y, at most half a pixel off.
    """
    rows, columns = _maxima(scores)
    fine = allowed[rows, columns]
    rows, columns = rows[fine], columns[fine]
    order = np.argsort(-scores[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    at = np.stack([columns + _vertex(scores, rows, columns, 0, 1), rows + _vertex(scores, rows, columns, 1, 0)], axis=1)
    kept = _spaced(at, max(distance_px, 1e-6), scores.shape[0], scores.shape[1])
    return at[kept], scores[rows, columns][kept].astype(np.float32)


@njit(nogil=True, cache=True)
def _maxima(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, but for those at the edge, above the four neighbours before them and not below the four after."""
    ny, nx = scores.shape
    rows, columns = [], []
    for y in range(1, ny - 1):
        for x in range(1, nx - 1):
            s = scores[y, x]
            if (
                s > scores[y - 1, x - 1] and s > scores[y - 1, x] and s > scores[y - 1, x + 1] and s > scores[y, x - 1]
                and s >= scores[y, x + 1] and s >= scores[y + 1, x - 1] and s >= scores[y + 1, x]
                and s >= scores[y + 1, x + 1]
            ):  # fmt: skip
                rows.append(y)
                columns.append(x)
    return np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64)


def _vertex(scores: Image, rows: np.ndarray, columns: np.ndarray, dy: int, dx: int) -> NDArray[np.float64]:
    before, here, after = (scores[rows + step * dy, columns + step * dx].astype(np.float64) for step in (-1, 0, 1))
    curvature = before - 2.0 * here + after
    return np.clip(0.5 * (before - after) / np.where(curvature < 0, curvature, -np.inf), -0.5, 0.5)


@njit(nogil=True, cache=True)
def _spaced(at: np.ndarray, distance: float, ny: int, nx: int) -> np.ndarray:
    """Which of the positions (n, 2), best first, have no better one that stays within the distance."""
    cell = max(distance, 1.0)
    down, across = int(ny / cell) + 2, int(nx / cell) + 2
    first = np.full((down, across), -1, dtype=np.int64)
    following = np.full(len(at), -1, dtype=np.int64)
    kept = np.zeros(len(at), dtype=np.bool_)
    for i in range(len(at)):
        cx, cy = int((at[i, 0] + 0.5) / cell), int((at[i, 1] + 0.5) / cell)
        free = True
        for y in range(max(0, cy - 1), min(down, cy + 2)):
            for x in range(max(0, cx - 1), min(across, cx + 2)):
                j = first[y, x]
                while j >= 0 and free:
                    free = math.hypot(at[i, 0] - at[j, 0], at[i, 1] - at[j, 1]) >= distance
                    j = following[j]
        if free:
            kept[i] = True
            following[i] = first[cy, cx]
            first[cy, cx] = i
    return kept


PIXEL_SIGMAS, CONTRAST_RATIO = 7.0, 3.0
"""Contrasts out of the ordinary are beyond so many robust deviations, and so many times those of the candidates."""
WIDER, FEW = 1.5, 5.0
"""Patches are of more than a particle, and of more than a few, if they are so many times as large."""
VARIANCE_SIGMAS, VARIANCE_RATIO = 6.0, 1.5
"""The same for local variances, whose logarithms are compared."""
_PARTS, _QUANTILES = (0.05, 0.25), (-1.645, -0.674)
"""Parts of a normal distribution, and how many deviations from its mean they reach to."""


@dataclass(frozen=True)
class Contrast:
    """A micrograph (ny, nx) and what is seen of it at the scale of a particle.

    inner: under a Gaussian of half a particle's radius; outer: under one of three radii; of: their difference.
    """

    image: Image
    diameter_px: float
    inner: Image
    outer: Image

    @property
    def of(self) -> Image:
        return self.inner - self.outer


def contrast(image: Image, diameter_px: float) -> Contrast:
    """The contrast of a micrograph, `standardised`."""
    transform, radius = cosine_transform(image), diameter_px / 2.0
    inner, outer = (filtered(transform, gaussian_response(image.shape, r * radius)) for r in (0.5, 3.0))
    return Contrast(image, diameter_px, inner, outer)


def tamed(seen: Contrast) -> tuple[Image, NDArray[np.bool_]]:
    """The micrograph with no contrast beyond PIXEL_SIGMAS, and where it is surely no ice with particles, (ny, nx) bool.

    That is in patches, of more than a particle, that are beyond it, and in those, of more than a few, in which what is
    far finer than particles has more variance than elsewhere, as on carbon. Neither needs to know the particles: for a
    first look, before it is known what is ordinary.
    """
    limit = np.float32(PIXEL_SIGMAS * robust(seen.of)[1])
    particle = math.pi * (seen.diameter_px / 2.0) ** 2
    wide = _patches(np.abs(seen.of) > limit, WIDER * particle)
    valid = ~_widened(wide, seen.diameter_px / 2.0)
    fine = seen.image - smooth(seen.image, seen.diameter_px / 8.0)
    variance = local_mean(valid.astype(np.float32), seen.diameter_px / 2.0)
    level = np.log(np.maximum(variance(fine * fine), np.float32(1e-6)))
    rough = _patches(valid & (level > _limit(level[valid])), FEW * particle)
    return seen.image - (seen.of - np.clip(seen.of, -limit, limit)), wide | rough


def _patches(mask: NDArray[np.bool_], more_px: float) -> NDArray[np.bool_]:
    """The connected parts of a mask that are of more pixels than that."""
    part, _ = scipy.ndimage.label(mask)
    large = np.bincount(part.ravel()) > more_px
    large[0] = False
    return large[part]


def outliers(seen: Contrast, rough: NDArray[np.bool_], candidates_px: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Where a micrograph is not like the rest of it: contamination, carbon, edges -> (ny, nx) bool.

    rough: from `tamed`. Looked at are the contrast, and its variance over two diameters. What is out of the ordinary is
    judged by the robust spread over all pixels, and by what is there at the candidates (n, 2), (x, y): few particles of
    strong contrast on plain ice are out of the ordinary for the ice, but not among themselves. What is left out is
    closed, so that no small islands stay within it.
    """
    radius = seen.diameter_px / 2.0
    rows, columns = _pixels(candidates_px, seen.image.shape)
    typical = float(np.median(np.abs(seen.of[rows, columns]))) if len(rows) else 0.0
    spread = robust(seen.of[~rough])[1] if not rough.all() else 0.0
    bad = rough | (np.abs(seen.of) > max(PIXEL_SIGMAS * spread, CONTRAST_RATIO * typical))
    # The rest is judged without these and what they do to the mean around them.
    valid = ~_widened(bad, radius)
    weight = valid.astype(np.float32)
    middle = seen.inner - (local_mean(weight, 3.0 * radius)(seen.image) if bad.any() else seen.outer)
    level = np.log(np.maximum(local_mean(weight, seen.diameter_px)(np.square(middle)), np.float32(1e-6)))
    of_candidates = level[rows, columns][valid[rows, columns]]
    return _closed(bad | (valid & (level > max(_limit(level[valid]), _limit(of_candidates)))), radius)


def _limit(levels: NDArray[np.floating]) -> float:
    """How far ordinary logarithms of variances go, -inf where there are none.

    Their median and deviation are taken from the values below the median: carbon may be half of a micrograph, or of the
    candidates, and what it does to variances it does above.
    """
    if len(levels) == 0:
        return -math.inf
    low, middle = np.percentile(levels, [100 * part for part in _PARTS])
    deviation = float(middle - low) / (_QUANTILES[1] - _QUANTILES[0])
    median = float(middle) - _QUANTILES[1] * deviation
    return median + max(VARIANCE_SIGMAS * deviation, math.log(VARIANCE_RATIO))


def _pixels(at_px: NDArray[np.floating], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    nearest = np.rint(np.asarray(at_px).reshape(-1, 2)).astype(np.int64)
    return nearest[:, 1].clip(0, shape[0] - 1), nearest[:, 0].clip(0, shape[1] - 1)


def _widened(mask: NDArray[np.bool_], by_px: float) -> NDArray[np.bool_]:
    return mask if not mask.any() else scipy.ndimage.distance_transform_edt(~mask) <= by_px


def _closed(mask: NDArray[np.bool_], by_px: float) -> NDArray[np.bool_]:
    """The mask with what lies between its parts, widened by half of `by_px` in all; it does not recede at the edges."""
    if not mask.any():
        return mask
    wide = np.pad(_widened(mask, 1.5 * by_px), 1, mode="edge")
    return wide if wide.all() else scipy.ndimage.distance_transform_edt(wide)[1:-1, 1:-1] > by_px


def threshold(scores: Float32, decoys: Float32 | None = None) -> float:
    """The score that parts particles from noise.

    scores: (n,), of all peaks. decoys: (m,), of the peaks of the template with its contrast turned over, which find
    what noise can do. The scores are taken as a mixture of two normal distributions, and parted where either is as
    likely, or, if that is lower, where F1 is greatest if decoys stand for the false ones. Where particles are few, or
    there are none, that parts the noise; so the threshold is raised until there are DECOY_RATIO peaks for each decoy
    above it, and more by DECOY_SIGMAS than chance gives, as in target-decoy competition (J. E. Elias and S. P. Gygi,
    Nat. Methods 4, 207, 2007), or until it is well beyond all decoys. The ratio is low, for decoys are more than noise
    where particles are crowded: the gaps between them.
    """
    if len(scores) == 0:
        return 1.0
    parted = _parted(np.sort(scores.astype(np.float64)))
    if decoys is None:
        return parted
    levels = np.sort(scores)[::-1]
    count = np.arange(1, len(levels) + 1)
    above = len(decoys) - np.searchsorted(np.sort(decoys), levels)
    # As many are right as there are more peaks than decoys.
    right = np.maximum.accumulate(np.maximum(count - above, 0))
    most_f1 = float(levels[np.argmax(right / (count + right[-1]))])
    fine = (count >= DECOY_RATIO * above) & (count - above >= 1 + DECOY_SIGMAS * np.sqrt(count + above))
    if fine.any():
        lowest = float(levels[np.flatnonzero(fine)[-1]])
    elif len(decoys):
        median = float(np.median(decoys))
        lowest = median + DECOY_REACH * (float(decoys.max()) - median)
    else:
        lowest = float(np.nextafter(levels[0], np.float32(np.inf)))
    return max(min(parted, most_f1), lowest)


def _parted(x: NDArray[np.float64]) -> float:
    """Where two normal distributions, fitted to sorted values by expectation and maximisation, are equally likely."""
    if len(x) < 4 or x[-1] - x[0] < 1e-9:
        return float(x[0])
    # From the split that leaves the least variance within (Otsu 1979).
    n = np.arange(1, len(x))
    sums = np.cumsum(x)
    split = int(np.argmax((sums[-1] * n / len(x) - sums[:-1]) ** 2 / (n * (len(x) - n)))) + 1
    upper = (np.arange(len(x)) >= split).astype(np.float64)
    least = 0.02 * (x[-1] - x[0])
    for _ in range(200):
        weight = np.array([1.0 - upper, upper])
        total = weight.sum(axis=1)
        mean = weight @ x / total
        deviation = np.maximum(np.sqrt((weight * (x - mean[:, None]) ** 2).sum(axis=1) / total), least)
        z = (x - mean[:, None]) / deviation[:, None]
        log_density = np.log(total / len(x) / deviation)[:, None] - 0.5 * z * z
        before, upper = upper, 1.0 / (1.0 + np.exp(np.clip(log_density[0] - log_density[1], -500, 500)))
        # The wider one is also the likelier far on the other side, which is no place of its own.
        upper[x < mean[0]], upper[x > mean[1]] = 0.0, 1.0
        if np.abs(upper - before).max() < 1e-6 or upper.sum() < 1.0 or upper.sum() > len(x) - 1.0:
            break
    above = np.flatnonzero(upper >= 0.5)
    return float(x[above[0]]) if len(above) else float(x[-1])
