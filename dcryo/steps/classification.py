"""The expectation and maximisation steps of 2D classification, on one batch of images and on the sums of all.

A class is a reference image. The posterior of an image is over classes, in-plane angles and shifts, all on a grid, and
its expectations are exact on that grid: scores and sums are products of Fourier series over the angle
(`kernels.rings`). The model is that of the refinement (`kernels.posterior`): an image is a turned and shifted class
times the CTF, and noise of a spectrum per optics group (Scheres et al. 2005; Scheres 2012).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.fft
from numba import njit

from dcryo.kernels import rings
from dcryo.kernels.rings import Rings

# exp(-15) of the best pose's weight is beyond what any sum could notice.
_NEGLIGIBLE = 15.0
# Where hardly any image has been, sums are not divided by almost nothing.
_WEIGHT_FLOOR = 1e-3
_FSC_MAX = 0.999


@dataclass(frozen=True)
class Classes:
    """What images are compared with.

    of: rings up to which images are summed, R of them, of which the first `scored` are compared; series: (M + 1, R, K)
    complex64, the class images' series over the angle, and power: (J, R, K) complex64 that of their squared moduli,
    both conjugate; log_share: (K,) logarithm of the prior of each class; shift_px: (T, 2) shifts that are tried,
    phases: (angles / 2, T, R) what they do, and log_shift: (T,) their prior; angles: in-plane angles that are tried.
    """

    of: Rings
    scored: int
    series: np.ndarray
    power: np.ndarray
    log_share: np.ndarray
    shift_px: np.ndarray
    phases: np.ndarray
    log_shift: np.ndarray
    angles: int


class Images(NamedTuple):
    """Images and what is known of them: images (n, D, D) float32; ctf (angles / 2, n, R) float32 on the rings;
    inverse_variance (n, R) float32 of a noise component; origin_px (n, 2), which moves the image onto its class."""

    images: np.ndarray
    ctf: np.ndarray
    inverse_variance: np.ndarray
    origin_px: np.ndarray


class Sums(NamedTuple):
    """What a shard adds, as series over the angle, orders first.

    numerator: (M + 1, K, R) complex64, sums of C X / v over the posterior; denominator: (J, K, R) complex64, of C^2 /
    v; share: (K,) float64, sum of class probabilities; residual: (G, R) float64, sum of the mean residual power on each
    ring, and particles: (G,) float64, how many particles that is.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    share: np.ndarray
    residual: np.ndarray
    particles: np.ndarray


class Found(NamedTuple):
    """What is learned of each of n images.

    class_number: best class, from 0; psi_rad: RELION's in-plane angle there; origin_px (n, 2); class_probability and
    max_probability: of the best class and of the best pose; log_evidence: of all classes against an empty image;
    cross, square, power: (n, R), ring means of Re Y conj S and W |S|^2 at the best pose, and of |X|^2; usable: False
    where the image is not finite and had no part in the sums.
    """

    class_number: np.ndarray
    psi_rad: np.ndarray
    origin_px: np.ndarray
    class_probability: np.ndarray
    max_probability: np.ndarray
    log_evidence: np.ndarray
    cross: np.ndarray
    square: np.ndarray
    power: np.ndarray
    usable: np.ndarray


def prepare(
    images: np.ndarray, share: np.ndarray, of: Rings, shell: int, shift_px: np.ndarray, shift_sd_px: float
) -> Classes:
    """Classes to compare images with up to a shell, from masked class images (K, D, D) and their shares (K,)."""
    return prepare_sampled(rings.sample(images, of), share, of, shell, shift_px, shift_sd_px)


def prepare_sampled(
    sampled: np.ndarray, share: np.ndarray, of: Rings, shell: int, shift_px: np.ndarray, shift_sd_px: float
) -> Classes:
    """`prepare` from the classes' transforms on rings, (angles / 2, K, R) complex64."""
    series = rings.series(sampled, of, of.orders)
    power = rings.real_series(sampled.real**2 + sampled.imag**2, of, of.orders)
    # A score is band-limited in the angle like the classes; twice their orders show it all.
    orders = rings.orders_at(of, shell)
    return Classes(
        of,
        shell + 1,
        np.ascontiguousarray(np.swapaxes(series.conj(), 1, 2)),
        np.ascontiguousarray(np.swapaxes(power.conj(), 1, 2)),
        np.log(np.maximum(share, 1e-30)).astype(np.float32),
        shift_px,
        phases(of, shift_px),
        (-0.5 * np.sum(shift_px**2, axis=1) / shift_sd_px**2).astype(np.float32),
        4 * scipy.fft.next_fast_len((orders + 2) // 2, real=True),
    )


def shift_grid(range_px: float, step_px: float) -> np.ndarray:
    """Shifts (T, 2) of a square grid within a disc, the centre among them."""
    steps = np.arange(-int(range_px / step_px), int(range_px / step_px) + 1) * step_px
    x, y = np.meshgrid(steps, steps)
    inside = np.hypot(x, y) <= range_px + 1e-6
    return np.stack([x[inside], y[inside]], axis=1)


def empty_sums(of: Rings, count: int, groups: int) -> Sums:
    """Sums of no images over so many classes, in G optics groups."""
    return Sums(
        np.zeros((of.orders + 1, count, of.shell_max + 1), np.complex64),
        np.zeros((of.orders // 2 + 1, count, of.shell_max + 1), np.complex64),
        np.zeros(count),
        np.zeros((groups, of.shell_max + 1)),
        np.zeros(groups),
    )


def located(batch: Images, classes: Classes) -> np.ndarray:
    """Origins (n, 2) at the best pose of each image: to look further around them."""
    return _weigh(batch, classes).origin_px


def fold(sums: Sums, batch: Images, group: np.ndarray, classes: Classes) -> Found:
    """Weigh classes, angles and shifts for each image, and add it to the sums, in place, with those weights.

    group: (n,) int, the optics group of each image.
    """
    weighed = _weigh(batch, classes)
    of, count = classes.of, classes.angles
    for own in np.unique(group[weighed.usable]):
        rows = np.flatnonzero((group == own) & weighed.usable)
        # Most classes have no part in a few images.
        met = np.flatnonzero(weighed.of_class[rows].any(axis=0))
        weights = weighed.weights[:, rows][..., met]
        turned = _periodic(np.conj(scipy.fft.rfft(weights, axis=0)), count, of.orders)
        by_class = np.swapaxes(turned.reshape(of.orders + 1, -1, len(met)), 1, 2)
        numerator = by_class @ weighed.series[:, rows].reshape(of.orders + 1, -1, of.shell_max + 1)
        over_shifts = np.swapaxes(turned[::2].sum(axis=2), 1, 2)
        denominator = over_shifts @ weighed.weight_series[:, rows]
        sums.numerator[:, met] += numerator
        sums.denominator[:, met] += denominator
        sums.share[:] += weighed.of_class[rows].sum(axis=0, dtype=np.float64)
        variance = 1 / batch.inverse_variance[rows[0]].astype(np.float64)
        cross = _ring_mean(numerator, np.swapaxes(classes.series[..., met], 1, 2), of)
        square = _ring_mean(denominator, np.swapaxes(classes.power[..., met], 1, 2), of)
        sums.residual[own] += weighed.power[rows].sum(axis=0) - variance * (2 * cross - square)
        sums.particles[own] += len(rows)
    class_probability = weighed.of_class[np.arange(len(group)), weighed.best[:, 2]]
    return Found(
        weighed.best[:, 2], -2 * np.pi * weighed.best[:, 0] / count, weighed.origin_px, class_probability,
        weighed.max_probability, weighed.log_evidence, *_fit(weighed, classes), weighed.power.astype(np.float32),
        weighed.usable,
    )  # fmt: skip


def _fit(weighed: "_Weighed", classes: Classes) -> tuple[np.ndarray, np.ndarray]:
    """Ring means of Re Y conj S and of W |S|^2 at the best pose of each image, (n, R) float32 each."""
    of, rows = classes.of, np.arange(len(weighed.best))
    angle, shift, k = weighed.best.T
    turn = np.exp(2j * np.pi * np.outer(np.arange(of.orders + 1), angle) / classes.angles).astype(np.complex64)
    product = weighed.series[:, rows, shift] * np.moveaxis(classes.series[:, :, k], 1, 2) * turn[:, :, None]
    cross = (product[0] + 2 * product[1:].sum(axis=0)).real / of.angles**2
    product = weighed.weight_series * np.moveaxis(classes.power[:, :, k], 1, 2) * turn[::2, :, None]
    square = (product[0] + 2 * product[1:].sum(axis=0)).real / of.angles**2
    return cross, square


class _Weighed(NamedTuple):
    """Weights of poses (angles, n, T, K), their sums by class (n, K), and what is made on the way to them."""

    weights: np.ndarray
    of_class: np.ndarray
    series: np.ndarray
    weight_series: np.ndarray
    power: np.ndarray
    best: np.ndarray
    origin_px: np.ndarray
    max_probability: np.ndarray
    log_evidence: np.ndarray
    usable: np.ndarray


def _weigh(batch: Images, classes: Classes) -> _Weighed:
    of, count, n = classes.of, classes.angles, len(batch.images)
    k, t, scored = len(classes.log_share), len(classes.shift_px), classes.scored
    usable = np.isfinite(batch.images).all(axis=(1, 2)) & np.isfinite(batch.ctf).all(axis=(0, 2))
    images = np.where(usable[:, None, None], batch.images, 0)
    ctf = np.where(usable[:, None], batch.ctf, 0)
    sampled = rings.sample(images, of)
    power = np.asarray(np.mean(sampled.real**2 + sampled.imag**2, axis=0, dtype=np.float64))
    share = ctf * batch.inverse_variance
    data = (sampled * share * phases(of, batch.origin_px))[:, :, None]
    turn = classes.phases[:, None]
    series = rings.series_of_parts(  # (M + 1, n, T, R)
        data.real * turn.real - data.imag * turn.imag, data.real * turn.imag + data.imag * turn.real, of, of.orders
    )
    weight_series = rings.real_series(ctf * share, of, of.orders)  # (J, n, R)
    # Orders that the scored rings do not reach are noise.
    orders = min(count // 2 - 1, of.orders)
    area = of.area[:scored, None] / 2
    left = series[: orders + 1, ..., :scored].reshape(orders + 1, n * t, scored)
    product = left @ (classes.series[: orders + 1, :scored] * area)
    scale = np.float32(count / of.angles)
    scores: np.ndarray = scipy.fft.irfft(product, n=count, axis=0).reshape(count, n, t, k)
    product = weight_series[: orders // 2 + 1, :, :scored] @ (classes.power[: orders // 2 + 1, :scored] * area)
    squares = scipy.fft.irfft(product, n=count // 2, axis=0) * (scale / 2)  # (count / 2, n, K)
    scores *= scale
    best, evidence, top, of_class = _posterior(
        scores, squares, classes.log_share, classes.log_shift, np.float32(_NEGLIGIBLE)
    )
    return _Weighed(
        scores, of_class, series, weight_series, power, best, batch.origin_px + classes.shift_px[best[:, 1]], top,
        evidence, usable,
    )  # fmt: skip


def phases(of: Rings, shift_px: np.ndarray) -> np.ndarray:
    """Factors that move images, (angles / 2, T, R) complex64; shift_px: (T, 2)."""
    angle = of.kx[:, None] * shift_px[:, 0, None] + of.ky[:, None] * shift_px[:, 1, None]
    return np.exp((-2j * np.pi / of.box_px) * angle).astype(np.complex64)


def _periodic(coefficients: np.ndarray, count: int, orders: int) -> np.ndarray:
    """Coefficients of orders 0 to `orders` of a comb of weights at `count` angles, from those of orders 0 to count /
    2."""
    order = np.arange(orders + 1) % count
    mirrored = order > count // 2
    found = coefficients[np.where(mirrored, count - order, order)]
    found[mirrored] = found[mirrored].conj()
    return found


def _ring_mean(sums: np.ndarray, conjugate: np.ndarray, of: Rings) -> np.ndarray:
    """Sum over classes of the ring means of sums times classes, (R,) float64, both as series (orders, K, R)."""
    product = np.einsum("mkr,mkr->mr", sums, conjugate).real
    return (product[0] + 2 * product[1:].sum(axis=0)) / of.angles**2


@njit(nogil=True, cache=True, fastmath=True)
def _posterior(scores, squares, log_share, log_shift, negligible):  # type: ignore[no-untyped-def]
    """Products Re <Y, S> (angle, n, T, K) turned into probabilities in place, from <W, |S|^2> (angle / 2, n, K).

    Returns the best pose (n, 3), the log-evidence (n,), the probability of the best (n,), and of the classes (n, K).
    """
    count, n, shifts, classes = scores.shape
    half = count // 2
    top = np.full(n, -np.inf, dtype=np.float32)
    best = np.zeros((n, 3), dtype=np.int64)
    for angle in range(count):
        for i in range(n):
            for t in range(shifts):
                for k in range(classes):
                    product, square = scores[angle, i, t, k], squares[angle % half, i, k]
                    value = product - np.float32(0.5) * square + log_share[k] + log_shift[t]
                    scores[angle, i, t, k] = value
                    if value > top[i]:
                        top[i] = value
                        best[i, 0], best[i, 1], best[i, 2] = angle, t, k
    total = np.zeros(n)
    for angle in range(count):
        for i in range(n):
            lowest = top[i] - negligible
            for t in range(shifts):
                for k in range(classes):
                    value = scores[angle, i, t, k]
                    weight = np.float32(0)
                    if value > lowest:
                        weight = np.exp(value - top[i])
                        total[i] += weight
                    scores[angle, i, t, k] = weight
    inverse = (1 / total).astype(np.float32)
    of_class = np.zeros((n, classes), dtype=np.float32)
    for angle in range(count):
        for i in range(n):
            for t in range(shifts):
                for k in range(classes):
                    weight = scores[angle, i, t, k] * inverse[i]
                    scores[angle, i, t, k] = weight
                    of_class[i, k] += weight
    evidence = top + np.log(total) - np.log(np.sum(np.exp(log_shift))) - np.log(count)
    return best, evidence, inverse, of_class


def class_images(numerator: np.ndarray, denominator: np.ndarray, precision: np.ndarray, of: Rings) -> np.ndarray:
    """Maximum a posteriori class images (K, D, D) float32 from sums, with a prior precision (K, R) per ring."""
    below = rings.real_samples(denominator, of) + precision
    return rings.images_of(rings.samples(numerator, of) / np.maximum(below, 1e-20), of)


def mean_weights(denominator: np.ndarray, of: Rings) -> np.ndarray:
    """Mean of the weights on each ring, (K, R) float64."""
    return denominator[0].real.astype(np.float64) / of.angles


def ring_correlation(first: np.ndarray, second: np.ndarray, of: Rings) -> np.ndarray:
    """Fourier ring correlation of images (K, D, D), (K, R) float64; rings without power give zero."""
    a, b = rings.sample(first, of), rings.sample(second, of)
    cross = np.sum(a.real * b.real + a.imag * b.imag, axis=0, dtype=np.float64)
    power = np.sum(np.abs(a) ** 2, axis=0, dtype=np.float64) * np.sum(np.abs(b) ** 2, axis=0, dtype=np.float64)
    return np.divide(cross, np.sqrt(power), out=np.zeros_like(cross), where=power > 0)


class Averages(NamedTuple):
    """Class images (K, D, D), masked; unmasked: the same without mask; halves: two of (K, D, D), masked, of the two
    halves of each class, filtered alike; frc: (K, R) correlation of the halves."""

    images: np.ndarray
    unmasked: np.ndarray
    halves: tuple[np.ndarray, np.ndarray]
    frc: np.ndarray


def averages(halves: tuple[Sums, Sums], mask: np.ndarray, of: Rings) -> Averages:
    """Class images from the sums of two halves of the particles, the prior of each class from the correlation of its
    halves.

    FRC_all = 2 FRC / (1 + FRC), tau^2 = FRC_all / (1 - FRC_all) over the mean weight (Rosenthal & Henderson 2003, eq.
    7; Scheres 2012, section 2.4). mask: (D, D). The halves were compared with the same classes, so that where there is
    noise alone they agree more than they should.
    """
    weights = [mean_weights(half.denominator, of) for half in halves]
    plain = [
        mask * class_images(half.numerator, half.denominator, _WEIGHT_FLOOR * weight + 1e-6, of)
        for half, weight in zip(halves, weights, strict=True)
    ]
    frc = ring_correlation(plain[0], plain[1], of)
    positive = np.clip(frc, 0, 1)
    share = np.clip(2 * positive / (1 + positive), 1e-3, _FSC_MAX)
    precision = (weights[0] + weights[1]) * (1 - share) / share + 1e-6
    unmasked = class_images(
        halves[0].numerator + halves[1].numerator, halves[0].denominator + halves[1].denominator, precision, of
    )
    filtered = [class_images(half.numerator, half.denominator, precision / 2, of) * mask for half in halves]
    return Averages(unmasked * mask, unmasked, (filtered[0], filtered[1]), frc)


def mass_and_rim(unmasked: np.ndarray, diameter_px: float, seen: float) -> tuple[np.ndarray, np.ndarray]:
    """Of class images (K, D, D) without mask: the density inside a circle less that around it, and the standard
    deviation around it over that inside, (K,) each. Around is up to `seen` diameters."""
    axis = np.arange(unmasked.shape[1]) - unmasked.shape[1] // 2
    radius = np.hypot(axis, axis[:, None])
    inside = radius < diameter_px / 2
    around = (radius > diameter_px / 2 + 1) & (radius < max(seen * diameter_px / 2 - 1, diameter_px / 2 + 2.5))
    background = unmasked[:, around].mean(axis=1)
    mass = unmasked[:, inside].sum(axis=1) - background * np.count_nonzero(inside)
    rim = unmasked[:, around].std(axis=1) / np.maximum(unmasked[:, inside].std(axis=1), 1e-20)
    return mass, rim


def unexplained(found: Found, noise_power: np.ndarray, shell: int) -> np.ndarray:
    """Power of each image up to a shell that is neither its class's nor noise, in units of the noise, (n,) float64.

    noise_power: (n, >= R) that of the particle's group. About zero where the class is right, whatever its resolution.
    """
    ring = np.arange(1, shell + 1)
    noise = noise_power[:, 1 : shell + 1]
    residual = found.power[:, ring] / noise - (2 * found.cross - found.square)[:, ring] / 2 - 1
    return np.asarray(2 * np.pi * (residual @ ring.astype(np.float64)))


def misfit(
    cross: np.ndarray, square: np.ndarray, power: np.ndarray, noise_power: np.ndarray, filled: float
) -> np.ndarray:
    """How much of the power of each image at low resolution its class leaves over, relative to the noise, (n,).

    cross, square, power: (n, R) as in `Found`; noise_power: (n, >= R) that of the particle's group. Low is up to a
    tenth of the diameter, which is `filled` of the box.
    """
    ring = np.arange(cross.shape[1])
    low = (ring >= 1) & (ring <= max(3, round(10 / filled)))
    noise = noise_power[:, : len(ring)]
    residual = (power - noise / 2 * (2 * cross - square)) / np.maximum(noise, 1e-20)
    return np.asarray(np.sum(residual[:, low] * ring[low], axis=1) / np.sum(ring[low]))
