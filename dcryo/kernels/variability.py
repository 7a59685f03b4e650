"""A linear model of a variable molecule in Fourier space: slices, sums of back-projected moments, and the step to new
volumes.

An image of pose P, CTF C and contrast a shows

    X = a C P (V_0 + z_1 V_1 + ... + z_K V_K) + noise,    z ~ N(0, 1)

which is probabilistic principal component analysis (Tipping & Bishop 1999) of volumes that are seen in projection
(Tagare et al. 2015; Punjani & Fleet 2021). With Y = C X / v, W = C^2 / v and S_k the slice of V_k, the image enters the
posterior of z by the numbers <Y, S_k> and <W S_k, S_l> alone, and the next volumes solve, voxel by voxel,

    sum_l (sum_i a^2 E[z_k z_l] W + delta_kl / tau_k^2) V_l = sum_i a E[z_k] Y

with z_0 = 1. q = K + 1 volumes are interleaved, voxel by voxel, so that the kernel's weights are computed once for all
of them; the sums hold q complex numerators and the q (q + 1) / 2 weights of the lower triangle per voxel, as real
numbers.
"""

import numpy as np
from numba import njit

from dcryo.kernels import fft, slices
from dcryo.kernels.gridding import TAPS, WEIGHTS, padded_px
from dcryo.kernels.shells import Frequencies, HalfPlane
from dcryo.kernels.slices import BEFORE, half_width, locate, numbers, scale, scaled

_COEFFICIENTS = WEIGHTS.astype(np.float32)
_DEGREE = WEIGHTS.shape[1]


def channels(volumes: int) -> int:
    """Numbers per voxel of the sums of q volumes."""
    return 2 * volumes + volumes * (volumes + 1) // 2


def interleave(volumes: np.ndarray, shell_max: int) -> np.ndarray:
    """Volumes (q, D, D, D) prepared for slicing up to a shell: `slices.volume_shape(shell_max, D) + (q,)` complex64."""
    return np.stack([slices.prepare(volume, shell_max) for volume in volumes], axis=-1)


def empty_sums(volumes: int, shell_max: int, box_px: int) -> np.ndarray:
    """Sums of no images, `slices.volume_shape(shell_max, box_px) + (channels(q),)` float32."""
    return np.zeros((*slices.volume_shape(shell_max, box_px), channels(volumes)), dtype=np.float32)


def extract(prepared: np.ndarray, rotations: np.ndarray, pixels: Frequencies, box_px: int) -> np.ndarray:
    """Central slices of q volumes at once.

    prepared: from `interleave`; rotations: (n, 3, 3), volume to image coordinates. Returns (n, P, q) complex64.
    """
    _check_reach(prepared.shape, pixels, box_px)
    out = np.empty((len(rotations), len(pixels.kx), prepared.shape[3]), dtype=np.complex64)
    _extract(numbers(prepared), prepared.shape, scaled(rotations, box_px), pixels.kx, pixels.ky, out.view(np.float32))
    return out


def products(sliced: np.ndarray, data: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What images say of their coordinates: Re <Y, S_k>, (n, q), and Re <W S_k, S_l>, (n, q, q), both float64.

    sliced: (n, P, q) complex64; data: (n, P) complex64, Y; weight: (n, P) float32, W.
    """
    n, _, volumes = sliced.shape
    cross, gram = np.zeros((n, volumes)), np.zeros((n, volumes, volumes))
    _products(sliced, data, weight, cross, gram)
    return cross, gram


def insert(
    sums: np.ndarray,
    rotations: np.ndarray,
    sliced: np.ndarray,
    data: np.ndarray,
    weight: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    pixels: HalfPlane,
    box_px: int,
) -> np.ndarray:
    """Add images' innovations and weights to the sums, in place, and measure how well the model fits each.

    sums: from `empty_sums`; first: (n, q), a E[z], with z_0 = 1; second: (n, q, q), a^2 E[z z^T]; the others as in
    `products`. The innovation of volume k is a E[z_k] Y - W sum_l a^2 E[z_k z_l] S_l: what the image has beyond the
    present volumes. Returns (n, 2, shell_max + 1) float64, per shell: Re <Y, E[S]> and <W, E[|S|^2]>, S being the
    model of the image.
    """
    _check_reach(sums.shape, pixels, box_px)
    fit = np.zeros((len(data), 2, pixels.shell_max + 1))
    _insert(
        sums.reshape(-1), sums.shape, scaled(rotations, box_px), sliced.view(np.float32), data, weight,
        first.astype(np.float32), second.astype(np.float32), pixels.kx, pixels.ky, pixels.start, fit,
    )  # fmt: skip
    return fit


def complete(sums: np.ndarray, volumes: int) -> np.ndarray:
    """Sums with those of the Friedel mates of all slices added: a new array of the same shape."""
    conjugate = np.ones(sums.shape[-1], dtype=np.float32)
    conjugate[1 : 2 * volumes : 2] = -1
    out = sums.copy()
    out[:, :, BEFORE] += sums[::-1, ::-1, BEFORE] * conjugate
    out[:, :, BEFORE + 1] += sums[::-1, ::-1, BEFORE - 1] * conjugate
    out[:, :, BEFORE - 1] = out[::-1, ::-1, BEFORE + 1] * conjugate
    return out


def mean_weights(sums: np.ndarray, volumes: int, shell_max: int, box_px: int) -> np.ndarray:
    """Mean over the voxels of each shell of the weights sum_i a^2 E[z_k^2] W, (q, shell_max + 1) float64."""
    return _mean_weights(sums, volumes, shell_max, 1 / scale(box_px))


def maximise(sums: np.ndarray, volumes: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """The volumes that maximise the posterior, given the sums of images' innovations from the present ones.

    sums: from `complete`; volumes: (q, D, D, D), those that the innovations are from; precision: (q, shell_max + 1),
    1 / tau_k^2 per shell. Frequencies past shell_max stay as they are; those that no image touched are emptied by a
    prior and else stay too. Returns (q, D, D, D) float32. (The step of `solve.maximise`, for several volumes that share
    their images.)
    """
    count, box = len(volumes), volumes.shape[1]
    shell_max = precision.shape[1] - 1
    if half_width(shell_max, box) + 1 + BEFORE != sums.shape[2]:
        raise ValueError(f"precision for {shell_max} shells does not fit sums of shape {sums.shape}")
    along = slices.gridding_correction(box)
    along = along / along[box // 2]
    envelope = (along[:, None, None] * along[:, None] * along).astype(np.float32)
    padded = padded_px(box)
    step = np.stack([fft.padded_transform(volume * envelope, padded, sums.shape[0] // 2) for volume in volumes], -1)
    _step(sums, np.ascontiguousarray(precision, dtype=np.float64), 1 / scale(box), step)
    changes = [fft.padded_inverse(np.ascontiguousarray(step[..., k]), padded, box) / envelope for k in range(count)]
    return volumes + np.stack(changes)


def _check_reach(shape: tuple[int, ...], pixels: Frequencies, box_px: int) -> None:
    if shape[2] - BEFORE <= half_width(pixels.shell_max, box_px):
        raise ValueError(f"volumes of shape {shape} do not reach shell {pixels.shell_max}")


@njit(nogil=True, cache=True, inline="always", fastmath=True)
def _taps(fraction, out):  # type: ignore[no-untyped-def]
    """The kernel's weights of the taps of one axis."""
    place = fraction - np.float32(0.5)
    for tap in range(TAPS):
        value = _COEFFICIENTS[tap, 0]
        for power in range(1, _DEGREE):
            value = value * place + _COEFFICIENTS[tap, power]
        out[tap] = value


@njit(nogil=True, cache=True, fastmath=True)
def _extract(volume, shape, turns, kx, ky, out):  # type: ignore[no-untyped-def]
    length = 2 * shape[3]
    stride, zero = length * shape[2], np.float32(0)
    x, y, z = np.empty(TAPS, np.float32), np.empty(TAPS, np.float32), np.empty(TAPS, np.float32)
    row = np.empty(TAPS * length, np.float32)
    for i in range(len(turns)):
        for p in range(len(kx)):
            lowest, fx, fy, fz, sign = locate(shape, turns[i], np.float32(kx[p]), np.float32(ky[p]), zero)
            _taps(fx, x)
            _taps(fy, y)
            _taps(fz, z)
            row[:] = 0
            for tap_z in range(TAPS):
                for tap_y in range(TAPS):
                    share = z[tap_z] * y[tap_y]
                    first = length * lowest + stride * (tap_y + shape[1] * tap_z)
                    values = volume[first : first + len(row)]
                    for c in range(len(row)):
                        row[c] += share * values[c]
            for c in range(length):
                total = zero
                for tap in range(TAPS):
                    total += x[tap] * row[tap * length + c]
                out[i, p, c] = total if c % 2 == 0 else sign * total


@njit(nogil=True, cache=True, fastmath=True)
def _products(sliced, data, weight, cross, gram):  # type: ignore[no-untyped-def]
    n, count, volumes = sliced.shape
    for i in range(n):
        for p in range(count):
            for k in range(volumes):
                value = sliced[i, p, k]
                cross[i, k] += data[i, p].real * value.real + data[i, p].imag * value.imag
                for other in range(k + 1):
                    mate = sliced[i, p, other]
                    gram[i, k, other] += weight[i, p] * (value.real * mate.real + value.imag * mate.imag)
        for k in range(volumes):
            for other in range(k):
                gram[i, other, k] = gram[i, k, other]


@njit(nogil=True, cache=True, fastmath=True)
def _insert(sums, shape, turns, sliced, data, weight, first, second, kx, ky, shells, fit):  # type: ignore[no-untyped-def]
    volumes, length = first.shape[1], shape[3]
    stride, zero = length * shape[2], np.float32(0)
    x, y, z = np.empty(TAPS, np.float32), np.empty(TAPS, np.float32), np.empty(TAPS, np.float32)
    added, row = np.empty(length, np.float32), np.empty(TAPS * length, np.float32)
    for i in range(len(turns)):
        for shell in range(len(shells) - 1):
            cross = power = zero
            for p in range(shells[shell], shells[shell + 1]):
                lowest, fx, fy, fz, sign = locate(shape, turns[i], np.float32(kx[p]), np.float32(ky[p]), zero)
                place = 2 * volumes
                for k in range(volumes):
                    real = imaginary = zero
                    for other in range(volumes):
                        real += second[i, k, other] * sliced[i, p, 2 * other]
                        imaginary += second[i, k, other] * sliced[i, p, 2 * other + 1]
                    cross += first[i, k] * (
                        data[i, p].real * sliced[i, p, 2 * k] + data[i, p].imag * sliced[i, p, 2 * k + 1]
                    )
                    power += weight[i, p] * (real * sliced[i, p, 2 * k] + imaginary * sliced[i, p, 2 * k + 1])
                    added[2 * k] = first[i, k] * data[i, p].real - weight[i, p] * real
                    added[2 * k + 1] = sign * (first[i, k] * data[i, p].imag - weight[i, p] * imaginary)
                    for other in range(k + 1):
                        added[place] = second[i, k, other] * weight[i, p]
                        place += 1
                _taps(fx, x)
                _taps(fy, y)
                _taps(fz, z)
                for tap in range(TAPS):
                    for c in range(length):
                        row[tap * length + c] = x[tap] * added[c]
                for tap_z in range(TAPS):
                    for tap_y in range(TAPS):
                        share = z[tap_z] * y[tap_y]
                        begin = length * lowest + stride * (tap_y + shape[1] * tap_z)
                        target = sums[begin : begin + len(row)]
                        for c in range(len(row)):
                            target[c] += share * row[c]
            fit[i, 0, shell] = cross
            fit[i, 1, shell] = power


@njit(nogil=True, cache=True)
def _mean_weights(sums, volumes, shell_max, spacing):  # type: ignore[no-untyped-def]
    totals, counts = np.zeros((volumes, shell_max + 1)), np.zeros(shell_max + 1)
    half = sums.shape[0] // 2
    for iz in range(sums.shape[0]):
        for iy in range(sums.shape[1]):
            across = (iz - half) ** 2 + (iy - half) ** 2
            for x in range(sums.shape[2] - BEFORE):
                shell = int(np.sqrt(across + x * x) * spacing + 0.5)
                if shell <= shell_max:
                    counts[shell] += 1
                    for k in range(volumes):
                        totals[k, shell] += sums[iz, iy, x + BEFORE, 2 * volumes + k * (k + 3) // 2]
    return totals / np.maximum(counts, 1)


@njit(nogil=True, cache=True)
def _step(sums, precision, spacing, step):  # type: ignore[no-untyped-def]
    """The change of each volume, in place of its transform: a system of q equations per voxel, by Cholesky's method."""
    volumes, shells = precision.shape
    half = sums.shape[0] // 2
    factor, right = np.zeros((volumes, volumes)), np.zeros(volumes, np.complex128)
    for iz in range(sums.shape[0]):
        for iy in range(sums.shape[1]):
            across = (iz - half) ** 2 + (iy - half) ** 2
            for x in range(step.shape[2]):
                shell = int(np.sqrt(across + x * x) * spacing + 0.5)
                if shell >= shells:
                    step[iz, iy, x] = 0
                    continue
                here = sums[iz, iy, x + BEFORE]
                solved = True
                for k in range(volumes):
                    prior = precision[k, shell]
                    right[k] = complex(here[2 * k], here[2 * k + 1]) - prior * step[iz, iy, x, k]
                    for other in range(k + 1):
                        value = float(here[2 * volumes + k * (k + 1) // 2 + other])
                        if other == k:
                            value += prior
                        for m in range(other):
                            value -= factor[k, m] * factor[other, m]
                        if other < k:
                            factor[k, other] = value / factor[other, other]
                        elif value > 0:
                            factor[k, k] = np.sqrt(value)
                        else:
                            solved, factor[k, k] = False, 1.0
                for k in range(volumes):
                    for m in range(k):
                        right[k] -= factor[k, m] * right[m]
                    right[k] /= factor[k, k]
                for k in range(volumes - 1, -1, -1):
                    for m in range(k + 1, volumes):
                        right[k] -= factor[m, k] * right[m]
                    right[k] /= factor[k, k]
                for k in range(volumes):
                    step[iz, iy, x, k] = np.complex64(right[k]) if solved else np.complex64(0)
