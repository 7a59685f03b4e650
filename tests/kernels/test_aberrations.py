"""Zernike polynomials against their definition in polar coordinates, and beam tilt against its formula."""

import math

import numpy as np
import pytest

from dcryo.kernels import aberrations
from dcryo.kernels.ctf import wavelength_A

RANDOM = np.random.default_rng(1)
X, Y = RANDOM.uniform(-0.5, 0.5, (2, 300))


def polar(n: int, m: int, radius: float, angle: float) -> float:
    """The definition, one point at a time."""
    order, total = abs(m), 0.0
    for s in range((n - order) // 2 + 1):
        share = math.factorial(s) * math.factorial((n + order) // 2 - s) * math.factorial((n - order) // 2 - s)
        total += (-1) ** s * math.factorial(n - s) / share * radius ** (n - 2 * s)
    return total * (math.cos(m * angle) if m >= 0 else math.sin(-m * angle))


@pytest.mark.parametrize("n", range(8))
def test_polynomials_are_those_of_the_definition(n: int) -> None:
    for m in range(-n, n + 1, 2):
        slow = [polar(n, m, math.hypot(x, y), math.atan2(y, x)) for x, y in zip(X, Y, strict=True)]
        np.testing.assert_allclose(aberrations.zernike(n, m, X, Y), slow, atol=1e-12)


def test_order_of_coefficients() -> None:
    assert aberrations.odd_orders(8) == [(1, -1), (1, 1), (3, -3), (3, -1), (3, 1), (3, 3), (5, -5), (5, -3)]
    assert aberrations.even_orders(9) == [
        (0, 0), (2, -2), (2, 0), (2, 2), (4, -4), (4, -2), (4, 0), (4, 2), (4, 4),
    ]  # fmt: skip


def test_phases_are_odd_and_even_and_zero_where_no_coefficient_is() -> None:
    odd, even = RANDOM.normal(size=12), RANDOM.normal(size=9)
    np.testing.assert_allclose(aberrations.odd_phase(odd, -X, -Y), -aberrations.odd_phase(odd, X, Y), atol=1e-12)
    np.testing.assert_allclose(aberrations.even_phase(even, -X, -Y), aberrations.even_phase(even, X, Y), atol=1e-12)
    assert np.ptp(aberrations.odd_phase(odd, X, Y)) > 0.1 and np.ptp(aberrations.even_phase(even, X, Y)) > 0.1
    assert not aberrations.odd_phase([], X, Y).any() and aberrations.even_phase([], X, Y).shape == X.shape


def test_beam_tilt_is_coma() -> None:
    coefficients = aberrations.beam_tilt_coefficients(0.3, -0.2, 2.7, 300.0)
    along = 0.3e-3 * X - 0.2e-3 * Y
    expected = -2 * np.pi * 2.7e7 * float(wavelength_A(300.0)) ** 2 * (X**2 + Y**2) * along
    np.testing.assert_allclose(aberrations.odd_phase(coefficients, X, Y), expected, atol=1e-12)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("count", [0, 2, 6, 9])
def test_beam_tilt_adds_to_coefficients_of_any_number(count: int) -> None:
    given = RANDOM.normal(size=count)
    total = aberrations.odd_coefficients(given, 0.3, 0.1, 1.4, 200.0)
    both = aberrations.odd_phase(given, X, Y) + aberrations.odd_phase(
        aberrations.beam_tilt_coefficients(0.3, 0.1, 1.4, 200.0), X, Y
    )
    np.testing.assert_allclose(aberrations.odd_phase(total, X, Y), both, atol=1e-12)
