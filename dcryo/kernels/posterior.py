"""Scores of poses, the few that matter, and what they add to the sums of an iteration.

With white-on-dark image X, CTF C, slice S of the reference and noise variance v per real component, the log-likelihood
of a pose is, up to a constant of the image,

    score = Re <Y, S> - 1/2 <W, |S|^2>,    Y = C X / v,    W = C^2 / v

(Sigworth 1998; Scheres 2012, eq. 1-3), sums over the half plane. Only Y knows the shift and only the second term the
CTF envelope, so a score costs one product once the slice is there.

Where the grey scale of the reference is not yet known, the score is maximised over a factor a >= 0 on S, which gives
Re<Y, S>^2 / (2 <W, |S|^2>) where the product is positive: the profile likelihood.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from dcryo.kernels.interpolation import before_read, before_write, read, write
from dcryo.kernels.modes import Points
from dcryo.kernels.shells import HalfPlane
from dcryo.kernels.slices import AHEAD, CACHED, locate, numbers, scaled

# exp(-20) of the best pose's weight is beyond what any fraction of the posterior could notice.
_NEGLIGIBLE = 20.0


class Weighed(NamedTuple):
    """Images as the likelihood sees them, on the packed axis.

    data: (n, P) complex64, Y; weight: (n, P) float32, W; power: (n, D // 2 + 1) float64, mean power of the normalised
    image per shell.
    """

    data: np.ndarray
    weight: np.ndarray
    power: np.ndarray


def weigh(
    transforms: np.ndarray,
    norm: np.ndarray,
    ctf: np.ndarray,
    inverse_variance: np.ndarray,
    origin_px: np.ndarray,
    pixels: HalfPlane,
    every: HalfPlane,
) -> Weighed:
    """Y and W of images, moved by their origins, and their power.

    transforms: (n, D, D // 2 + 1) complex64; norm: (n,) divides the image; ctf: (n, P) float32, on `pixels`;
    inverse_variance: (n, shell_max + 1) float32, 1 / v per shell; origin_px: (n, 2); every: the half plane of the
    power, of which `pixels` is a prefix.
    """
    n = len(transforms)
    out = Weighed(
        np.empty((n, len(pixels.kx)), dtype=np.complex64),
        np.empty((n, len(pixels.kx)), dtype=np.float32),
        np.empty((n, every.shell_max + 1)),
    )
    _weigh(
        transforms, norm, ctf, inverse_variance, np.asarray(origin_px, dtype=np.float64), every.kx, every.ky,
        every.start, pixels.shell_max, *out,
    )  # fmt: skip
    return out


@njit(nogil=True, cache=True, error_model="numpy")
def _weigh(transforms, norm, ctf, inverse, origin, kx, ky, start, shell_max, data, weight, power):  # type: ignore[no-untyped-def]
    box = transforms.shape[1]
    reach = len(start) - 2
    along_x = np.empty(reach + 1, dtype=np.complex64)
    along_y = np.empty(2 * reach + 1, dtype=np.complex64)
    for i in range(len(transforms)):
        for k in range(-reach, reach + 1):
            along_y[k + reach] = np.exp(-2j * np.pi * k * origin[i, 1] / box)
            if k >= 0:
                along_x[k] = np.exp(-2j * np.pi * k * origin[i, 0] / box)
        divided = np.float32(1 / norm[i])
        for shell in range(reach + 1):
            total = 0.0
            for p in range(start[shell], start[shell + 1]):
                value = transforms[i, ky[p] % box, kx[p]] * divided
                total += value.real * value.real + value.imag * value.imag
                if shell <= shell_max:
                    share = ctf[i, p] * inverse[i, shell]
                    data[i, p] = value * share * (along_x[kx[p]] * along_y[ky[p] + reach])
                    weight[i, p] = ctf[i, p] * share
            power[i, shell] = total / (start[shell + 1] - start[shell])


def shift_phases(pixels: HalfPlane, shifts_px: np.ndarray, box_px: int, count: int) -> np.ndarray:
    """Factors that move an image by each shift, (T, count) complex64: exp(-2 pi i k.t / D).

    shifts_px: (T, 2), x and y, in pixels; count: length of the prefix of the packed axis.
    """
    out = np.empty((len(shifts_px), count), dtype=np.complex64)
    _shift_phases(pixels.kx, pixels.ky, np.asarray(shifts_px, dtype=np.float64), box_px, pixels.shell_max, out)
    return out


@njit(nogil=True, cache=True, error_model="numpy")
def _shift_phases(kx, ky, shifts, box, shell_max, out):  # type: ignore[no-untyped-def]
    along_x = np.empty(shell_max + 1, dtype=np.complex64)
    along_y = np.empty(2 * shell_max + 1, dtype=np.complex64)
    for t in range(out.shape[0]):
        for k in range(-shell_max, shell_max + 1):
            along_y[k + shell_max] = np.exp(-2j * np.pi * k * shifts[t, 1] / box)
            if k >= 0:
                along_x[k] = np.exp(-2j * np.pi * k * shifts[t, 0] / box)
        for p in range(out.shape[1]):
            out[t, p] = along_x[kx[p]] * along_y[ky[p] + shell_max]


def grid_scores(
    slices: np.ndarray, shifted: np.ndarray, weights: np.ndarray, profile_scale: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of rotations, each at its best shift, and of the same turned by 180 degrees in the plane.

    The slice of a rotation turned by 180 degrees is the conjugate, so both have the same two real matrix products:
    their sum and their difference.

    slices: (R, P) complex64; shifted: (B, T, P) complex64, the images' Y at each shift; weights: (B, P) float32, the
    images' W. Returns the scores (B, 2 R) float32 and the index of the best shift (B, 2 R) int64.
    """
    images, shifts, count = shifted.shape
    flat = shifted.reshape(-1, count)
    real = np.ascontiguousarray(flat.real) @ np.ascontiguousarray(slices.real).T
    imaginary = np.ascontiguousarray(flat.imag) @ np.ascontiguousarray(slices.imag).T
    norms = weights @ (slices.real**2 + slices.imag**2).T
    best = np.empty((images, 2 * len(slices)), dtype=np.float32)
    shift = np.empty(best.shape, dtype=np.int64)
    _best_shifts(real, imaginary, norms, shifts, profile_scale, best, shift)
    return best, shift


@njit(nogil=True, cache=True, error_model="numpy")
def _best_shifts(real, imaginary, norms, shifts, profile, best, shift):  # type: ignore[no-untyped-def]
    images, rotations = norms.shape
    for i in range(images):
        for half in range(2):
            sign = np.float32(1 - 2 * half)
            first = half * rotations
            product, place = best[i, first : first + rotations], shift[i, first : first + rotations]
            product[:] = real[i * shifts] + sign * imaginary[i * shifts]
            place[:] = 0
            for t in range(1, shifts):
                for r in range(rotations):
                    value = real[i * shifts + t, r] + sign * imaginary[i * shifts + t, r]
                    # Not a number stays one.
                    if not value <= product[r]:
                        product[r] = value
                        place[r] = t
            for r in range(rotations):
                if profile:
                    product[r] = max(product[r], np.float32(0)) ** 2 / (2 * norms[i, r])
                else:
                    product[r] -= norms[i, r] / 2


def select(log_weights: np.ndarray, fraction: float, maximum: int) -> tuple[np.ndarray, np.ndarray]:
    """The fewest poses that together hold a fraction of the posterior, best first, at most `maximum`.

    log_weights: (n,). Returns indices (m,) int64 and their probabilities (m,) float64, which sum to one. Ties are taken
    in the order of their index, so the choice depends on nothing but the weights. None where they are not finite.
    """
    if not np.isfinite(log_weights.max()):
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    near = np.flatnonzero(log_weights > log_weights.max() - _NEGLIGIBLE)
    near = near[np.argsort(-log_weights[near], kind="stable")]
    mass = np.exp((log_weights[near] - log_weights[near[0]]).astype(np.float64))
    cumulated = np.cumsum(mass)
    kept = min(int(np.searchsorted(cumulated, fraction * cumulated[-1])) + 1, maximum, len(near))
    return near[:kept], mass[:kept] / cumulated[kept - 1]


def accumulate(
    accumulator: np.ndarray,
    prepared: np.ndarray,
    points: Points,
    images: np.ndarray,
    weights: np.ndarray,
    pixels: HalfPlane,
    box_px: int,
    innovation: bool,
) -> np.ndarray:
    """Back-project images over the points of their posteriors, and measure how well the reference fits each.

    What is back-projected is an image, or its innovation: what is left of it once the reference's slice is taken off.

    accumulator: as in `slices.insert`, changed in place; images: (n, P) complex64, Y; weights: (n, P) float32, W.
    Returns (n, 2, shell_max + 1) float64: the posterior means of Re <Y, S> and of <W, |S|^2> per shell.
    """
    fit = np.zeros((len(images), 2, pixels.shell_max + 1))
    _accumulate(
        accumulator.reshape(-1), accumulator.shape, numbers(prepared), prepared.shape, points.start,
        scaled(points.rotation, box_px), points.shift, points.spread_px2, points.probability, images, weights,
        pixels.kx, pixels.ky, pixels.start, box_px, innovation, fit,
    )  # fmt: skip
    return fit


@njit(nogil=True, cache=True, error_model="numpy")
def _accumulate(  # type: ignore[no-untyped-def]
    sums, sums_shape, volume, shape, start, turns, shifts, spreads, probabilities, images, weights, kx, ky, shells,
    box, innovation, fit,
):  # fmt: skip
    for i in range(len(images)):
        for q in range(start[i], start[i + 1]):
            _accumulate_one(
                sums, sums_shape, volume, shape, turns[q], shifts[q], spreads[q], np.float32(probabilities[q]),
                images[i], weights[i], kx, ky, shells, box, innovation, fit[i],
            )  # fmt: skip


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _accumulate_one(  # type: ignore[no-untyped-def]
    sums, sums_shape, volume, shape, turn, shift, spread, probability, image, weights, kx, ky, shells, box, innovation,
    fit,
):  # fmt: skip
    shell_max = len(shells) - 2
    along_x = np.empty(shell_max + 1, dtype=np.complex64)
    along_y = np.empty(2 * shell_max + 1, dtype=np.complex64)
    unit = 2 * np.pi / box
    row, sums_row, zero = 2 * shape[2], 3 * sums_shape[2], np.float32(0)
    for k in range(-shell_max, shell_max + 1):
        along_y[k + shell_max] = np.exp(-1j * unit * k * shift[1])
        if k >= 0:
            along_x[k] = np.exp(-1j * unit * k * shift[0])
    for shell in range(shell_max + 1):
        # The mean of the shift's phase over a Gaussian.
        share = np.float32(probability * np.exp(-0.5 * spread * (unit * shell) ** 2))
        cross = power = zero
        for p in range(shells[shell], shells[shell + 1]):
            moved = image[p] * (along_x[kx[p]] * along_y[ky[p] + shell_max])
            real, imaginary, weight = share * moved.real, share * moved.imag, probability * weights[p]
            u, v = np.float32(kx[p]), np.float32(ky[p])
            if len(volume) + len(sums) > CACHED:
                later = min(p + AHEAD, len(kx) - 1)
                lowest = locate(shape, turn, np.float32(kx[later]), np.float32(ky[later]), zero)[0]
                before_read(volume, 2 * lowest, row, row * shape[1])
                lowest = locate(sums_shape, turn, np.float32(kx[later]), np.float32(ky[later]), zero)[0]
                before_write(sums, 3 * lowest, sums_row, sums_row * sums_shape[1])
            lowest, fx, fy, fz, sign = locate(shape, turn, u, v, zero)
            of_slice, of_slice_imaginary = read(volume, 2 * lowest, row, row * shape[1], fx, fy, fz)
            of_slice_imaginary *= sign
            cross += real * of_slice + imaginary * of_slice_imaginary
            power += weight * (of_slice * of_slice + of_slice_imaginary * of_slice_imaginary)
            if innovation:
                real -= weight * of_slice
                imaginary -= weight * of_slice_imaginary
            lowest, fx, fy, fz, sign = locate(sums_shape, turn, u, v, zero)
            write(sums, 3 * lowest, sums_row, sums_row * sums_shape[1], fx, fy, fz, real, sign * imaginary, weight)
        fit[0, shell] += cross
        fit[1, shell] += power
