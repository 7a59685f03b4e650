"""Steps of the analysis of variability: what one task does to a batch of images, and what is made of the sums.

The loadings of a model are volumes V_1 ... V_K whose coordinates have a standard normal prior, so that their lengths
are the standard deviations of the variability. Any rotation of them among themselves is the same model.
"""

from typing import NamedTuple

import numpy as np

from dcryo.kernels import fft, filters, fsc, posterior, slices, solve, variability
from dcryo.kernels.shells import HalfPlane, half_plane, volume_shells
from dcryo.steps.expectation import Batch


class Packed(NamedTuple):
    """Images moved to their origins and divided by their norms, up to a shell.

    images: (n, P) complex64, not a number where unusable; ctf: (n, P) float32; power: (n, shell_max + 1) float64.
    """

    images: np.ndarray
    ctf: np.ndarray
    power: np.ndarray


class Found(NamedTuple):
    """What an iteration learns of each of n images.

    mean: (n, q) and covariance: (n, q, q) of the posterior of (c, z_1 ... z_K), 1 + c being the contrast; gain: (n,)
    log-likelihood that these add; usable: (n,) bool.
    """

    mean: np.ndarray
    covariance: np.ndarray
    gain: np.ndarray
    usable: np.ndarray


def pack(batch: Batch, pixels: HalfPlane) -> Packed:
    """Images of a batch as the model sees them."""
    ctf = batch.ctf[:, : len(pixels.kx)]
    ones = np.ones_like(ctf)
    flat = np.ones((len(ctf), pixels.shell_max + 1), dtype=np.float32)
    # Images that could not be read are not a number, and stay that.
    with np.errstate(invalid="ignore"):
        transforms = fft.rfft2(batch.images)
    every = half_plane(batch.images.shape[-1] // 2)
    moved = posterior.weigh(transforms, batch.norm, ones, flat, batch.origin_px, pixels, every)
    images, power = moved.data, moved.power
    images[~np.isfinite(power).all(axis=1)] = np.nan
    return Packed(images, ctf * batch.scale[:, None].astype(np.float32), power[:, : pixels.shell_max + 1])


def weigh(images: np.ndarray, ctf: np.ndarray, noise_power: np.ndarray, first_shell: int, pixels: HalfPlane) -> tuple:
    """Y and W, (n, P) each, of packed images: C X / v and C^2 / v.

    noise_power: (n, shell_max + 1), mean |noise|^2; first_shell: nothing is weighed below it.
    """
    inverse = (2 / noise_power).astype(np.float32)
    inverse[:, :first_shell] = 0
    share = ctf * inverse[:, pixels.shell]
    return images * share, ctf * share


def coordinates(cross: np.ndarray, gram: np.ndarray, contrast_sd: float) -> Found:
    """The posterior of each image's contrast and coordinates.

    The contrast 1 + c, c ~ N(0, contrast_sd^2), is one more coordinate, whose volume is the mean: so variations of it
    are told from others with their uncertainty, in closed form. With A = diag(1 / sd^2, 1 ... 1) + G the posterior has
    the mean A^-1 (b - g) and the covariance A^-1 (Tipping & Bishop 1999, eq. 6), G being <W S_k, S_l>, b <Y, S_k> and g
    the column of G that is the mean's. cross: b, (n, q); gram: G, (n, q, q); contrast_sd: 0 where contrasts are all 1.
    """
    usable = np.isfinite(cross).all(axis=1) & np.isfinite(gram).all(axis=(1, 2))
    cross, gram = np.where(usable[:, None], cross, 0), np.where(usable[:, None, None], gram, 0)
    # In units of their priors' deviations: the contrast may have none.
    sd = np.ones(cross.shape[1])
    sd[0] = contrast_sd
    precision = np.eye(len(sd)) + gram * sd[:, None] * sd
    right = sd * (cross - gram[:, :, 0])
    covariance = np.linalg.inv(precision)
    mean = np.einsum("nkl,nl->nk", covariance, right)
    gain = (np.sum(right * mean, axis=1) - np.linalg.slogdet(precision)[1]) / 2
    return Found(mean * sd, covariance * sd[:, None] * sd, gain, usable)


def moments(found: Found) -> tuple[np.ndarray, np.ndarray]:
    """Means (n, q) and second moments (n, q, q) of (1 + c, z_1 ... z_K)."""
    first = found.mean.copy()
    first[:, 0] += 1
    return first, first[:, :, None] * first[:, None, :] + found.covariance


def drawn(mean: np.ndarray, found: Found) -> Found:
    """What was found, with coordinates (n, K) that were drawn in place of those found."""
    out = found.mean.copy()
    out[:, 1:] = mean
    covariance = np.zeros_like(found.covariance)
    covariance[:, 0, 0] = found.covariance[:, 0, 0]
    return found._replace(mean=out, covariance=covariance)


def residual_power(power: np.ndarray, fit: np.ndarray, noise_power: np.ndarray, pixels: HalfPlane) -> np.ndarray:
    """Mean power per shell of what the model leaves of each image, (n, shell_max + 1).

    power, noise_power: of the images, (n, shell_max + 1); fit: (n, 2, shell_max + 1) from `variability.insert`.
    """
    return power - (2 * fit[:, 0] - fit[:, 1]) / pixels.counts * noise_power / 2


def in_box(volume: np.ndarray, box_px: int) -> np.ndarray:
    """A volume (D, D, D) in another box of the same field of view, its Fourier coefficients, not its grey values, kept:
    so images of the one are images of the other."""
    old = len(volume)
    if old == box_px:
        return volume.astype(np.float32)
    return fft.irfftn(filters.crop_transform(fft.rfftn(volume), old, box_px, 3), box_px)


def band(volume: np.ndarray, first: int, last: int) -> np.ndarray:
    """A volume without the frequencies before and after some shells."""
    box = len(volume)
    shells = volume_shells(box)
    return fft.irfftn(np.where((shells >= first) & (shells <= last), fft.rfftn(volume), 0), box)


def plain_volumes(sums: np.ndarray, volumes: np.ndarray, shell_max: int) -> np.ndarray:
    """Volumes of one half without a filter, of which correlations are taken. sums: from `variability.complete`."""
    weights = variability.mean_weights(sums, len(volumes), shell_max, volumes.shape[1])
    return variability.maximise(sums, volumes, solve.weight_floor(weights))


def correlations(first: np.ndarray, second: np.ndarray, masks: np.ndarray, shell_max: int) -> np.ndarray:
    """FSC of volumes (q, D, D, D) of two halves under their masks (q, D, D, D), averaged over neighbouring shells:
    (q, shell_max + 1)."""
    pairs = zip(first * masks, second * masks, strict=True)
    return np.stack([fsc.smooth_shell_correlation(*pair)[: shell_max + 1] for pair in pairs])


def regularised_volumes(
    sums: np.ndarray, volumes: np.ndarray, correlation: np.ndarray, masks: np.ndarray, first_shell: int
) -> np.ndarray:
    """The next volumes of a half: their priors from the correlations (q, shell_max + 1) between the halves, under their
    masks, without the frequencies that images say nothing of, which masks would fill ever more.

    first_shell: of the components.
    """
    weights = variability.mean_weights(sums, len(volumes), correlation.shape[1] - 1, volumes.shape[1])
    precision = np.stack([solve.prior_precision(*one) for one in zip(correlation, weights, strict=True)])
    masked = masks * variability.maximise(sums, volumes, precision)
    last = correlation.shape[1] - 1
    return np.stack([band(one, first_shell if k else 0, last) for k, one in enumerate(masked)])


class Spread(NamedTuple):
    """Moments of (c, z_1 ... z_K) over images: their number, sums (q,) and sums of products (q, q)."""

    images: int
    first: np.ndarray
    second: np.ndarray


def spread(found: Found) -> Spread:
    """The moments of what was found of images, with its uncertainty."""
    mean, covariance = found.mean[found.usable], found.covariance[found.usable]
    return Spread(len(mean), mean.sum(axis=0), mean.T @ mean + covariance.sum(axis=0))


def expanded(volumes: np.ndarray, over: Spread) -> tuple[np.ndarray, float]:
    """Volumes whose coordinates have mean 0 and covariance 1 and whose contrasts have mean 1, made of some (q, D, D, D)
    whose coordinates have the moments `over` images; and the standard deviation of the contrasts.

    It is the same model with a prior that fits the coordinates (parameter-expanded EM: Liu, Rubin & Wu 1998). Without
    it loadings are too short, for their priors shrink them in each iteration.
    """
    first, second = over.first / over.images, over.second / over.images
    covariance = second - np.outer(first, first)
    values, vectors = np.linalg.eigh(covariance[1:, 1:])
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    out = volumes.copy()
    out[0] = (1 + first[0]) * volumes[0] + np.tensordot(first[1:], volumes[1:], 1)
    out[1:] = np.tensordot(root.T, volumes[1:], 1)
    return out.astype(np.float32), float(np.sqrt(max(covariance[0, 0], 0)) / (1 + first[0]))


class Canonical(NamedTuple):
    """Loadings of two halves turned so that they go in pairs.

    first, second: (K, D, D, D); cosine: (K,) correlation of the volumes of each pair; angles: (K,) cosines of the
    principal angles between the two subspaces, from the smallest angle on.
    """

    first: np.ndarray
    second: np.ndarray
    cosine: np.ndarray
    angles: np.ndarray


def canonical(first: np.ndarray, second: np.ndarray) -> Canonical:
    """Turn the loadings (K, D, D, D) of each half among themselves, which changes no model, so that those that vary
    most in both make the first pair, and so on: by the singular vectors of their products (Schoenemann 1966).

    Principal angles: Bjoerck & Golub 1973. Loadings that are nothing have cosine 0.
    """
    flat = [half.reshape(len(half), -1).astype(np.float64) for half in (first, second)]
    left, _, right = np.linalg.svd(flat[0] @ flat[1].T)
    turned = [turn @ half for turn, half in zip((left.T, right), flat, strict=True)]
    lengths = np.maximum(np.linalg.norm(turned[0], axis=1) * np.linalg.norm(turned[1], axis=1), 1e-30)
    bases = [_basis(half) for half in flat]
    angles = np.zeros(len(first))
    found = np.linalg.svd(bases[0] @ bases[1].T, compute_uv=False)
    angles[: len(found)] = np.minimum(found, 1)
    pair = [half.reshape(first.shape).astype(np.float32) for half in turned]
    return Canonical(pair[0], pair[1], np.sum(turned[0] * turned[1], axis=1) / lengths, angles)


def _basis(flat: np.ndarray) -> np.ndarray:
    """Orthonormal rows that span those of (K, N)."""
    values, vectors = np.linalg.eigh(flat @ flat.T)
    kept = values > 1e-10 * max(values.max(initial=0), 1e-30)
    return (vectors[:, kept].T @ flat) / np.sqrt(values[kept])[:, None]


def settled(before: np.ndarray, after: np.ndarray) -> float:
    """How much of the variability of loadings (K, D, D, D) is that of others: 1 where they are the same but for a
    rotation."""
    one, other = (half.reshape(len(half), -1).astype(np.float64) for half in (before, after))
    common = np.linalg.svd(one @ other.T, compute_uv=False).sum()
    return float(common / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-30))


class Principal(NamedTuple):
    """Principal components: volumes (K, D, D, D) of unit length, orthogonal, by falling variance; sd: (K,) standard
    deviation of their coordinates; turn: (K, K), coordinates of the components = turn @ coordinates of the loadings;
    share: (K, K), how much of each component's variance is of each loading."""

    volumes: np.ndarray
    sd: np.ndarray
    turn: np.ndarray
    share: np.ndarray


def principal(loadings: np.ndarray) -> Principal:
    """The principal components of loadings (K, D, D, D). The sign is such that the cubes of a component's voxels have a
    positive sum."""
    flat = loadings.reshape(len(loadings), -1).astype(np.float64)
    values, vectors = np.linalg.eigh(flat @ flat.T)
    order = np.argsort(-values, kind="stable")
    sd, vectors = np.sqrt(np.maximum(values[order], 0)), vectors[:, order]
    volumes = (vectors.T @ flat) / np.maximum(sd, 1e-30)[:, None]
    sign = np.where(np.sum(volumes**3, axis=1) < 0, -1.0, 1.0)
    volumes = (sign[:, None] * volumes).reshape(loadings.shape).astype(np.float32)
    return Principal(volumes, sd, (vectors * sd * sign).T, vectors.T**2)


def back_project_shares(
    volume: np.ndarray, batch: Batch, share: np.ndarray, contrast: np.ndarray, pixels: HalfPlane
) -> None:
    """Add images at the poses they came with to an accumulator, in place, each counted by its share (n,).

    volume: as `expectation.Sums.volume`; contrast: (n,), a factor of the CTF. Images that are not finite are left out.
    """
    packed = pack(batch, pixels)
    used = np.isfinite(packed.power).all(axis=1)
    ctf = packed.ctf[used] * contrast[used, None].astype(np.float32)
    weighted = ctf * share[used, None].astype(np.float32)
    box = batch.images.shape[-1]
    slices.insert(volume, batch.rotation[used], packed.images[used] * weighted, ctf * weighted, pixels, box)
