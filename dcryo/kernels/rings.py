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
from typing import NamedTuple

import numpy as np
import scipy.fft
from numba import njit

from dcryo.kernels.gridding import TAPS, WEIGHTS, envelope, padded_px


@dataclass(frozen=True)
class Rings:
    """Circles of radius 0, 1, ..., shell_max in the Fourier plane of boxes of `box_px`.

    angles: samples on the full circle, a multiple of four; orders: highest order m of the series that is kept;
    kx, ky: (angles / 2, R) float64, places of the samples of the half circle; area: (R,) float32, Fourier pixels per
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


class RingSamples(NamedTuple):
    """The samples of the half circles as one list of `shells.Frequencies`, angle by angle; kx, ky: (P,) float32."""

    shell_max: int
    kx: np.ndarray
    ky: np.ndarray


def ring_samples(of: Rings) -> RingSamples:
    """Where the samples of rings are, for slices of volumes that are read or written there."""
    return RingSamples(of.shell_max, of.kx.ravel().astype(np.float32), of.ky.ravel().astype(np.float32))


@lru_cache(maxsize=64)
def rings(box_px: int, shell_max: int, diameter_px: float) -> Rings:
    """Rings up to a shell, for particles of a diameter: with a sample per Fourier pixel of the last circle, so that
    noise from all over the box is not mistaken for signal; and orders as high as the particle has."""
    angles = 4 * scipy.fft.next_fast_len(int(np.ceil(np.pi * (shell_max + 1) / 2)), real=True)
    orders = min(angles // 2 - 1, _orders(shell_max, diameter_px / box_px))
    area = 2 * np.pi * np.arange(shell_max + 1) / angles
    # The trapezoidal rule over the radius, of a function that grows from 0 at the origin (Euler and Maclaurin).
    area[0] = 2 * np.pi / 12 / angles
    places = _places(shell_max, angles)
    return Rings(box_px, shell_max, angles, orders, *places, area.astype(np.float32), diameter_px / box_px)


def _places(shell_max: int, angles: int) -> tuple[np.ndarray, np.ndarray]:
    angle, radius = 2 * np.pi * np.arange(angles // 2) / angles, np.arange(shell_max + 1)
    return np.outer(np.cos(angle), radius), np.outer(np.sin(angle), radius)


def orders_at(of: Rings, shell: int) -> int:
    """Highest order that a particle has up to a shell."""
    return min(of.orders, _orders(shell, of.filled))


def _orders(shell: int, filled: float) -> int:
    return int(np.ceil(np.pi * shell * filled)) + 4


def sample(images: np.ndarray, of: Rings) -> np.ndarray:
    """Transforms of images on rings: (n, D, D) real to (angles / 2, n, R) complex64."""
    box, padded = of.box_px, padded_px(of.box_px)
    along = envelope(np.arange(box) - box // 2, padded)
    first = padded // 2 - box // 2
    placed = np.zeros((len(images), padded, padded), dtype=np.float32)
    placed[:, first : first + box, first : first + box] = images / (along[:, None] * along)
    planes = scipy.fft.fft2(np.fft.ifftshift(placed, axes=(1, 2)))
    place, weight = _taps(of)
    out = np.empty((len(planes), len(place)), dtype=np.complex64)
    _gather(planes.reshape(len(planes), -1), place, weight, out)
    angles, count = of.kx.shape
    return np.ascontiguousarray(np.swapaxes(out.reshape(len(planes), angles, count), 0, 1))


def images_of(sampled: np.ndarray, of: Rings) -> np.ndarray:
    """Images whose transforms are given on rings, and zero past them: (angles / 2, n, R) complex64 to (n, D, D)
    float32.

    The sum over the plane that takes a transform to its image, taken over the samples with their areas.
    """
    box, padded, n = of.box_px, padded_px(of.box_px), sampled.shape[1]
    place, weight = _taps(of)
    planes = np.zeros((n, padded * padded), dtype=np.complex64)
    values = np.ascontiguousarray(np.swapaxes(sampled * of.area, 0, 1)).astype(np.complex64).reshape(n, -1)
    _scatter(planes, place, weight, values)
    # Samples of the other half of the circle are conjugate, and so is what they would have added.
    images = 2 * scipy.fft.ifft2(planes.reshape(n, padded, padded)).real * (padded**2 / box**2)
    first = padded // 2 - box // 2
    along = envelope(np.arange(box) - box // 2, padded)
    inner = np.fft.fftshift(images, axes=(1, 2))[:, first : first + box, first : first + box]
    return (inner / (along[:, None] * along)).astype(np.float32)


@lru_cache(maxsize=16)
def _taps_of(box_px: int, shell_max: int, angles: int) -> tuple[np.ndarray, np.ndarray]:
    """Grid points of the padded transform around each sample, (P, 16) int32, and their weights, (P, 16) float32."""
    padded = padded_px(box_px)
    kx, ky = _places(shell_max, angles)
    indices, weights = [], []
    for k in (kx.ravel(), ky.ravel()):
        place = padded / box_px * k
        below = np.floor(place).astype(np.int64)
        indices.append((below[:, None] + np.arange(TAPS) - (TAPS // 2 - 1)) % padded)
        weights.append(np.array([np.polyval(row, place - below - 0.5) for row in WEIGHTS]).T)
    index = indices[1][:, :, None] * padded + indices[0][:, None, :]
    weight = weights[1][:, :, None] * weights[0][:, None, :]
    return index.reshape(len(index), -1).astype(np.int32), weight.reshape(len(weight), -1).astype(np.float32)


def _taps(of: Rings) -> tuple[np.ndarray, np.ndarray]:
    return _taps_of(of.box_px, of.shell_max, of.angles)


def series(sampled: np.ndarray, of: Rings, orders: int) -> np.ndarray:
    """Coefficients over the angle, of orders 0 to `orders`, of functions with f(angle + pi) = conj f(angle).

    sampled: (angles / 2, ..., R) complex64. Returns (orders + 1, ..., R) complex64, so that
    f(angle) = 1 / angles * sum over all orders m of coefficient(m) exp(i m angle).

    The real part has even orders only, the imaginary part odd ones: both are products with a table of cosines and
    sines, which for so few orders is faster than transforms.
    """
    return series_of_parts(sampled.real, sampled.imag, of, orders)


def series_of_parts(real: np.ndarray, imaginary: np.ndarray, of: Rings, orders: int) -> np.ndarray:
    """`series` of functions whose real and imaginary parts are given apart, float32."""
    even, odd = _tables(of.angles, orders)
    out = np.empty((orders + 1, *real.shape[1:]), dtype=np.complex64)
    for first, table, part in ((0, even, real), (1, odd, imaginary)):
        found = (table @ np.ascontiguousarray(part).reshape(len(part), -1)).reshape(2, -1, *part.shape[1:])
        out.real[first::2], out.imag[first::2] = found
    return out


@lru_cache(maxsize=64)
def _tables(angles: int, orders: int) -> tuple[np.ndarray, np.ndarray]:
    """What takes samples on half a circle to coefficients of even orders of a real function, and of odd orders of i
    times one: (2 orders, angles / 2) float32, real parts first."""
    angle = 2 * np.pi * np.arange(angles // 2) / angles
    even, odd = (np.outer(np.arange(first, orders + 1, 2), angle) for first in (0, 1))
    return (
        2 * np.concatenate([np.cos(even), -np.sin(even)]).astype(np.float32),
        2 * np.concatenate([np.sin(odd), np.cos(odd)]).astype(np.float32),
    )


def samples(coefficients: np.ndarray, of: Rings) -> np.ndarray:
    """The inverse of `series`: (M + 1, ..., R) complex64 to (angles / 2, ..., R) complex64.

    A function with f(angle + pi) = conj f(angle) has coefficients with c(-m) = (-1)^m conj c(m).
    """
    count = len(coefficients)
    whole = np.zeros((of.angles, *coefficients.shape[1:]), dtype=np.complex64)
    whole[:count] = coefficients
    order = np.arange(1, count)
    sign = np.where(order % 2, -1, 1).reshape(-1, *[1] * (coefficients.ndim - 1))
    whole[of.angles - order] = sign * coefficients[1:].conj()
    return scipy.fft.ifft(whole, axis=0)[: of.angles // 2]


def real_series(sampled: np.ndarray, of: Rings, orders: int) -> np.ndarray:
    """Coefficients of even orders 0, 2, ... up to `orders` of real functions with f(angle + pi) = f(angle).

    sampled: (angles / 2, ..., R) float32. Returns (orders // 2 + 1, ..., R) complex64, on the scale of `series`.
    """
    even, _ = _tables(of.angles, orders)
    found = (even @ sampled.reshape(len(sampled), -1)).reshape(2, -1, *sampled.shape[1:])
    return (found[0] + 1j * found[1]).astype(np.complex64)


def real_samples(coefficients: np.ndarray, of: Rings) -> np.ndarray:
    """The inverse of `real_series`: (J, ..., R) complex64 to (angles / 2, ..., R) float32."""
    return scipy.fft.irfft(coefficients / 2, n=of.angles // 2, axis=0).astype(np.float32)


def moved_to(coefficients: np.ndarray, of: Rings, other: Rings) -> np.ndarray:
    """Coefficients of `series` or `real_series` (orders, ..., R) on other rings of the same boxes: rings and orders
    that are not there are zero."""
    steps = of.orders // (len(coefficients) - 1)
    found = np.zeros((other.orders // steps + 1, *coefficients.shape[1:-1], other.shell_max + 1), coefficients.dtype)
    orders, shells = min(len(found), len(coefficients)), min(of.shell_max, other.shell_max) + 1
    found[:orders, ..., :shells] = coefficients[:orders, ..., :shells] * np.float32(other.angles / of.angles)
    return found


@njit(nogil=True, cache=True, fastmath=True)
def _gather(planes, place, weight, out):  # type: ignore[no-untyped-def]
    for i in range(len(planes)):
        plane = planes[i]
        for p in range(len(place)):
            real = imaginary = np.float32(0)
            for tap in range(place.shape[1]):
                value = plane[place[p, tap]]
                real += weight[p, tap] * value.real
                imaginary += weight[p, tap] * value.imag
            out[i, p] = complex(real, imaginary)


@njit(nogil=True, cache=True)
def _scatter(planes, place, weight, values):  # type: ignore[no-untyped-def]
    """The adjoint of `_gather`."""
    for i in range(len(planes)):
        for p in range(len(place)):
            for tap in range(place.shape[1]):
                planes[i, place[p, tap]] += weight[p, tap] * values[i, p]
