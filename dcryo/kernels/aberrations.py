"""Aberrations beside defocus, astigmatism and spherical aberration, as phases over spatial frequency.

An even phase e(k) = e(-k) is part of the CTF, `-sin(gamma + e)`; an odd one o(k) = -o(-k) multiplies the image's
transform by `exp(i o)` (Zivanov, Nakane & Scheres, IUCrJ 7, 2020). Both are sums of Zernike polynomials with one
coefficient in radians each, in RELION's order. The polynomials are taken of the frequency (x, y) in 1/A, not of a share
of an aperture, so that coefficients do not depend on the box or the pixel:

    Z(n, m) = R(n, |m|; r) times cos(m phi) for m >= 0, sin(|m| phi) for m < 0
    R(n, m; r) = sum over s of (-1)^s (n - s)! / (s! ((n + m) / 2 - s)! ((n - m) / 2 - s)!) r^(n - 2 s)

(Zernike, Physica 1, 1934), one after the other in n, within it in m from -n to n in steps of two. Odd ones begin with
(n, m) = (1, -1), (1, 1), (3, -3), (3, -1), (3, 1), (3, 3); even ones with (0, 0), (2, -2), (2, 0), (2, 2), (4, -4), ...

A magnification that is not the same along all axes is a matrix M, RELION's rlnMagMat: what the image shows at the
frequency k belongs to the frequency M k of the specimen, at which all phases and the CTF are taken.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcryo.kernels.ctf import wavelength_A


def odd_orders(count: int) -> list[tuple[int, int]]:
    """(n, m) of the first `count` odd polynomials."""
    return _first(count, 1)


def even_orders(count: int) -> list[tuple[int, int]]:
    """(n, m) of the first `count` even polynomials."""
    return _first(count, 0)


def _first(count: int, lowest: int) -> list[tuple[int, int]]:
    def every() -> Iterator[tuple[int, int]]:
        n = lowest
        while True:
            yield from ((n, m) for m in range(-n, n + 1, 2))
            n += 2

    orders = every()
    return [next(orders) for _ in range(count)]


def zernike(n: int, m: int, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
    """Z(n, m) at points (x, y) of any shape; a polynomial in them, so that the origin needs no care."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    order = abs(m)
    square, radial = x * x + y * y, np.zeros(np.broadcast_shapes(x.shape, y.shape))
    for s in range((n - order) // 2 + 1):  # Horner's scheme in r^2, highest power first
        radial = radial * square + _radial(n, order, s)
    angular = (x + 1j * y) ** order  # r^m (cos + i sin) m phi
    return radial * (angular.real if m >= 0 else angular.imag)


def _radial(n: int, m: int, s: int) -> float:
    numerator = (-1) ** s * math.factorial(n - s)
    return numerator / (math.factorial(s) * math.factorial((n + m) // 2 - s) * math.factorial((n - m) // 2 - s))


def odd_basis(count: int, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
    """The first `count` odd polynomials at frequencies (x, y), (P,) each, in 1/A: (count, P)."""
    return _basis(odd_orders(count), x, y)


def even_basis(count: int, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
    """The first `count` even polynomials at frequencies (x, y), (P,) each, in 1/A: (count, P)."""
    return _basis(even_orders(count), x, y)


def _basis(orders: list[tuple[int, int]], x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
    out = np.zeros((len(orders), np.size(x)))
    for row, (n, m) in zip(out, orders, strict=True):
        row[:] = zernike(n, m, x, y)
    return out


def odd_phase(coefficients: ArrayLike, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
    """Phase (P,) in radians, by which `exp(i phase)` multiplies an image's transform, of odd coefficients (in radians,
    as many as there are) at frequencies (x, y), (P,) each, in 1/A."""
    given = np.asarray(coefficients, dtype=np.float64)
    return given @ odd_basis(len(given), x, y)


def even_phase(coefficients: ArrayLike, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
    """Phase (P,) in radians that is added to the CTF's gamma, of even coefficients; the rest as in `odd_phase`."""
    given = np.asarray(coefficients, dtype=np.float64)
    return given @ even_basis(len(given), x, y)


def beam_tilt_coefficients(
    tilt_x_mrad: float, tilt_y_mrad: float, spherical_aberration_mm: float, voltage_kV: float
) -> NDArray[np.float64]:
    """Odd coefficients (6,) of a beam tilt, as RELION's rlnBeamTiltX and rlnBeamTiltY mean it.

    The phase is -2 pi Cs lambda^2 |k|^2 (t . k) for a tilt t (Glaeser et al., J. Struct. Biol. 174, 2011, eq. 1,
    without the part linear in k, which moves the image); in polynomials, |k|^2 x = (Z(3, 1) + 2 Z(1, 1)) / 3.
    """
    Cs_A, tilt = 1e7 * spherical_aberration_mm, 1e-3 * np.array([tilt_x_mrad, tilt_y_mrad])
    x, y = -2 * math.pi * Cs_A * wavelength_A(voltage_kV) ** 2 * tilt / 3
    return np.array([2 * y, 2 * x, 0.0, y, x, 0.0])


def odd_coefficients(
    odd_zernike: ArrayLike, tilt_x_mrad: float, tilt_y_mrad: float, spherical_aberration_mm: float, voltage_kV: float
) -> NDArray[np.float64]:
    """All odd coefficients (>= 6,) of a microscope: those given, any number, and those of its beam tilt."""
    given = np.asarray(odd_zernike, dtype=np.float64)
    total = beam_tilt_coefficients(tilt_x_mrad, tilt_y_mrad, spherical_aberration_mm, voltage_kV)
    total = np.pad(total, (0, max(0, len(given) - len(total))))
    total[: len(given)] += given
    return total
