"""Phases fitted to sums of simulated particles."""

import numpy as np
import pytest

from dcryo.kernels import aberrations, phase_fit
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import half_plane

SHELL_MIN, SHELL_MAX, WIDTH_A, BOX = 3, 24, 60.0, 56
PIXELS = half_plane(SHELL_MAX)
X, Y = PIXELS.kx / WIDTH_A, PIXELS.ky / WIDTH_A
ODD_BASIS, EVEN_BASIS = aberrations.odd_basis(6, X, Y), aberrations.even_basis(9, X, Y)
# Beam tilt and trefoil of more than a turn at the rim, 1/k = 2.5 A, with a shift of 0.3 A; and fourth-order phases with
# a change of defocus. Polynomials of low order cancel what those of high order have of it.
ODD = np.array([2 * -40.0 + 1.5, 2 * 90.0 - 1.0, 20.0, -40.0, 90.0, 15.0])
EVEN = np.array([0.0, 3 * -5.0 + 1.5, -1.0 + 3 * 8.0, 3 * 4.0 + 0.8, 6.0, -5.0, 8.0, 4.0, 9.0])
EVEN[0] = EVEN[2] - EVEN[6] + 0.2


def sums_of(odd, even, particles=400, snr=0.1, seed=1):
    """Sums over particles, from their definition: images C exp(i phi) S + noise, in units of the noise."""
    random = generator(seed, "phase fit", 0)
    count = len(PIXELS.kx)
    total = np.zeros((count, 7))
    for _ in range(particles):
        gamma = -0.02 * random.uniform(8e3, 2e4) * np.pi * (X**2 + Y**2) - 0.1
        signal = np.sqrt(snr) * (random.standard_normal((count, 2)) @ np.array([1, 1j]))
        noise = random.standard_normal((count, 2)) @ np.array([1, 1j])
        image = -np.sin(gamma + even @ EVEN_BASIS) * np.exp(1j * (odd @ ODD_BASIS)) * signal + noise
        c, b = np.conj(signal) * image, np.abs(signal) ** 2
        sine, cosine = c * np.sin(gamma), c * np.cos(gamma)
        total += np.stack([sine.real, sine.imag, cosine.real, cosine.imag, b * np.cos(2 * gamma),
                           b * np.sin(2 * gamma), b], axis=1)  # fmt: skip
    return total


@pytest.fixture(scope="module")
def sums():
    return sums_of(ODD, EVEN)


def test_phases_of_several_turns_are_found_within_their_errors(sums) -> None:
    found = phase_fit.fit(sums, ODD_BASIS, EVEN_BASIS, np.zeros(6), np.zeros(9), PIXELS, SHELL_MIN)
    assert np.abs(ODD @ ODD_BASIS).max() > 2 * np.pi and np.abs(EVEN @ EVEN_BASIS).max() > 1
    assert np.all(np.abs(found.odd - ODD) < 4 * found.odd_error)
    assert np.all(np.abs(found.even - EVEN) < 4 * found.even_error)
    assert np.abs((found.odd - ODD) @ ODD_BASIS).max() < 0.1 and found.gain > 1000
    # They are the same wherever it begins.
    again = phase_fit.fit(sums, ODD_BASIS, EVEN_BASIS, found.odd, found.even, PIXELS, SHELL_MIN)
    np.testing.assert_allclose(again.odd, found.odd, atol=0.01 * found.odd_error.min())


def test_errors_are_those_of_repetitions() -> None:
    fits = [
        phase_fit.fit(
            sums_of(ODD / 20, 0 * EVEN, 20, 0.1, seed), ODD_BASIS, EVEN_BASIS[:0], np.zeros(6), np.zeros(0), PIXELS, 3
        )
        for seed in range(40)
    ]
    scatter = np.std([one.odd for one in fits], axis=0)
    told = np.mean([one.odd_error for one in fits], axis=0)
    assert np.all((scatter / told > 0.6) & (scatter / told < 1.6))


def test_without_a_basis_nothing_is_fitted(sums) -> None:
    found = phase_fit.fit(sums, ODD_BASIS[:0], EVEN_BASIS[:0], np.zeros(0), np.zeros(0), PIXELS, SHELL_MIN)
    assert found.odd.shape == found.even.shape == (0,) and found.gain == 0


def test_noise_without_signal_has_no_phases_that_matter() -> None:
    found = phase_fit.fit(sums_of(ODD, EVEN, 50, 0.0), ODD_BASIS, EVEN_BASIS, np.zeros(6), np.zeros(9), PIXELS, 3)
    assert np.all(found.odd == 0) and np.all(found.even == 0)


def test_what_is_left_over_is_seen(sums) -> None:
    fitted = ODD @ ODD_BASIS - 0.2 * np.sign(PIXELS.kx), EVEN @ EVEN_BASIS - 0.1
    odd, even = phase_fit.left_over(sums, *fitted, PIXELS, BOX, 2.0)
    middle, away = BOX // 2, 12
    assert odd[middle, middle + away] == pytest.approx(0.2, abs=0.06)
    assert odd[middle, middle - away] == pytest.approx(-0.2, abs=0.06)
    assert even[middle + away, middle] == pytest.approx(0.1, abs=0.06) and even[middle, middle - away] > 0.05


def test_a_picture_has_positive_frequencies_to_the_right_and_up() -> None:
    odd, even = phase_fit.picture(np.stack([PIXELS.kx, PIXELS.ky**2]), PIXELS, BOX, np.array([-1, 1]))
    row, column = np.mgrid[:BOX, :BOX] - BOX // 2
    inside = np.hypot(row, column) < SHELL_MAX
    np.testing.assert_array_equal(odd[inside], column[inside])
    np.testing.assert_array_equal(even[inside], row[inside] ** 2)
