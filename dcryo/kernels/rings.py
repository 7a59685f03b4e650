"""Images as rings of their Fourier plane, where a turn in the plane is a shift along every ring.

An image is sampled on circles about the origin of its transform. Over angles it is then a short Fourier series, and all
in-plane rotations of one image against another come from products of coefficients, ring by ring, and one inverse
transform over the angle (a classical idea: Crowther & Amos 1971; Penczek et al. 1992; Rangan et al. 2020). The same
products, of weights with images, sum images over their rotations.

A real image has f(angle + pi) = conj f(angle), so that half of each circle is sampled, and coefficients of orders m >=
0 are enough. Sums over the half plane are sums over rings with the area, in Fourier pixels, that a sample stands for.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.fft
from numba import njit

from dcryo.kernels.gridding import TAPS, WEIGHTS, envelope, padded_px

_WEIGHTS = WEIGHTS.astype(np.float32)


@dataclass(frozen=True)
class Rings:
    """Circles of radius 0, 1, ..., shell_max in the Fourier plane of boxes of `box_px`.

    angles: samples on the full circle, a multiple of four; orders: highest order m of the series that is kept;
    kx, ky: (R, angles / 2) float64, places of the samples of the half circle; area: (R,) float32, Fourier pixels per
    sample; filled: diameter of the particle over the side of the box.
    """

    box_px: int
    shell_max: int
    angles: int
    orders: int
    kx: np.ndarray
    ky: np.ndarray
    area: np.ndarray
    filled: float


@lru_cache(maxsize=64)
def rings(box_px: int, shell_max: int, diameter_px: float) -> Rings:
    """Rings up to a shell, for particles of a diameter: with a sample per Fourier pixel of the last circle, so that
    noise from all over the box is not mistaken for signal; and orders as high as the particle has."""
    angles = 4 * scipy.fft.next_fast_len(int(np.ceil(np.pi * (shell_max + 1) / 2)), real=True)
    orders = min(angles // 2 - 1, _orders(shell_max, diameter_px / box_px))
    angle = 2 * np.pi * np.arange(angles // 2) / angles
    radius = np.arange(shell_max + 1)
    area = 2 * np.pi * radius / angles
    # The trapezoidal rule over the radius, of a function that grows from 0 at the origin (Euler and Maclaurin).
    area[0] = 2 * np.pi / 12 / angles
    return Rings(
        box_px, shell_max, angles, orders, np.outer(radius, np.cos(angle)), np.outer(radius, np.sin(angle)),
        area.astype(np.float32), diameter_px / box_px,
    )  # fmt: skip


def orders_at(of: Rings, shell: int) -> int:
    """Highest order that a particle has up to a shell."""
    return min(of.orders, _orders(shell, of.filled))


def _orders(shell: int, filled: float) -> int:
    return int(np.ceil(np.pi * shell * filled)) + 4


def sample(images: np.ndarray, of: Rings) -> np.ndarray:
    """Transforms of images on rings: (n, D, D) real to (n, R, angles / 2) complex64."""
    box, padded = of.box_px, padded_px(of.box_px)
    along = envelope(np.arange(box) - box // 2, padded)
    corrected = (images / (along[:, None] * along)).astype(np.float32)
    first = padded // 2 - box // 2
    placed = np.zeros((len(images), padded, padded), dtype=np.float32)
    placed[:, first : first + box, first : first + box] = corrected
    transforms = scipy.fft.rfft2(np.fft.ifftshift(placed, axes=(1, 2)))
    out = np.empty((len(images), *of.kx.shape), dtype=np.complex64)
    scale = padded / box
    _read(
        transforms.astype(np.complex64), (scale * of.kx).ravel(), (scale * of.ky).ravel(), out.reshape(len(images), -1)
    )
    return out


def images_of(rings_: np.ndarray, of: Rings) -> np.ndarray:
    """Images whose transforms are given on rings, and zero past them: (n, R, angles / 2) complex64 to (n, D, D)
    float32.

    The sum over the plane that takes a transform to its image, taken over the samples with their areas.
    """
    box, padded = of.box_px, padded_px(of.box_px)
    scale = padded / box
    plane = np.zeros((len(rings_), padded, padded // 2 + 1), dtype=np.complex64)
    weighted = (rings_ * of.area[:, None]).astype(np.complex64)
    _write(plane, (scale * of.kx).ravel(), (scale * of.ky).ravel(), weighted.reshape(len(rings_), -1))
    images = np.fft.fftshift(scipy.fft.irfft2(plane, (padded, padded)), axes=(1, 2)) * np.float32(padded**2 / box**2)
    first = padded // 2 - box // 2
    along = envelope(np.arange(box) - box // 2, padded)
    return (images[:, first : first + box, first : first + box] / (along[:, None] * along)).astype(np.float32)


def series(half: np.ndarray, of: Rings, orders: int) -> np.ndarray:
    """Coefficients over the angle, of orders 0 to `orders`, of functions with f(angle + pi) = conj f(angle).

    half: (..., R, angles / 2) complex64 on the half circle. Returns (orders + 1, ..., R) complex64, so that
    f(angle) = 1 / angles * sum over all orders m of coefficient(m) exp(i m angle).
    """
    whole = np.concatenate([half, half.conj()], axis=-1)
    return np.ascontiguousarray(np.moveaxis(scipy.fft.fft(whole, axis=-1)[..., : orders + 1], -1, 0))


def samples(coefficients: np.ndarray, of: Rings) -> np.ndarray:
    """The inverse of `series`: (M + 1, ..., R) complex64 to (..., R, angles / 2) complex64.

    A function with f(angle + pi) = conj f(angle) has coefficients with c(-m) = (-1)^m conj c(m).
    """
    count = len(coefficients)
    whole = np.zeros((*coefficients.shape[1:], of.angles), dtype=np.complex64)
    given = np.moveaxis(coefficients, 0, -1)
    whole[..., :count] = given
    sign = np.where(np.arange(1, count) % 2, -1, 1)
    whole[..., of.angles - np.arange(1, count)] = sign * given[..., 1:].conj()
    return scipy.fft.ifft(whole, axis=-1)[..., : of.angles // 2]


def real_series(half: np.ndarray, of: Rings, orders: int) -> np.ndarray:
    """Coefficients of even orders 0, 2, ... up to `orders` of real functions with f(angle + pi) = f(angle).

    half: (..., R, angles / 2) float32. Returns (orders // 2 + 1, ..., R) complex64, on the scale of `series`.
    """
    found = 2 * scipy.fft.rfft(half, axis=-1)[..., : orders // 2 + 1]
    return np.ascontiguousarray(np.moveaxis(found, -1, 0))


def real_samples(coefficients: np.ndarray, of: Rings) -> np.ndarray:
    """The inverse of `real_series`: (J, ..., R) complex64 to (..., R, angles / 2) float32."""
    given = np.moveaxis(coefficients, 0, -1)
    return scipy.fft.irfft(given / 2, n=of.angles // 2, axis=-1).astype(np.float32)


@njit(nogil=True, cache=True, fastmath=True)
def _weights_at(fraction, out):  # type: ignore[no-untyped-def]
    t = np.float32(fraction - 0.5)
    for tap in range(TAPS):
        value = _WEIGHTS[tap, 0]
        for power in range(1, _WEIGHTS.shape[1]):
            value = value * t + _WEIGHTS[tap, power]
        out[tap] = value


@njit(nogil=True, cache=True, fastmath=True)
def _read(planes, kx, ky, out):  # type: ignore[no-untyped-def]
    padded = planes.shape[1]
    across, down = np.empty(TAPS, dtype=np.float32), np.empty(TAPS, dtype=np.float32)
    for p in range(len(kx)):
        x, y = int(np.floor(kx[p])), int(np.floor(ky[p]))
        _weights_at(kx[p] - x, across)
        _weights_at(ky[p] - y, down)
        for i in range(len(planes)):
            total = np.complex64(0)
            for b in range(TAPS):
                iy = y + b - 1
                for a in range(TAPS):
                    ix = (x + a - 1) % padded
                    if ix <= padded // 2:
                        value = planes[i, iy % padded, ix]
                    else:
                        value = np.conj(planes[i, -iy % padded, padded - ix])
                    total += down[b] * across[a] * value
            out[i, p] = total


@njit(nogil=True, cache=True, fastmath=True)
def _write(planes, kx, ky, values):  # type: ignore[no-untyped-def]
    """The adjoint of reading, of samples and of their mates on the other half of the circle."""
    padded = planes.shape[1]
    across, down = np.empty(TAPS, dtype=np.float32), np.empty(TAPS, dtype=np.float32)
    for p in range(len(kx)):
        x, y = int(np.floor(kx[p])), int(np.floor(ky[p]))
        _weights_at(kx[p] - x, across)
        _weights_at(ky[p] - y, down)
        for i in range(len(planes)):
            for b in range(TAPS):
                iy = y + b - 1
                for a in range(TAPS):
                    ix = x + a - 1
                    value = down[b] * across[a] * values[i, p]
                    # A sample and its mate; half of the plane is held.
                    if ix % padded <= padded // 2:
                        planes[i, iy % padded, ix % padded] += value
                    if -ix % padded <= padded // 2:
                        planes[i, -iy % padded, -ix % padded] += np.conj(value)
