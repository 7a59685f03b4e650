import naive
import numpy as np
import pytest
from scipy.integrate import quad

from dcryo.kernels import gridding

FRACTIONS = np.linspace(0, 1, 401)
# Distance of each tap from a point at each fraction of the way from the second tap to the third.
DISTANCES = np.arange(-1, 3)[:, None] - FRACTIONS


def values(polynomials):
    return np.array([np.polyval(row, FRACTIONS - 0.5) for row in polynomials])


def test_weights_are_the_exponential_of_a_semicircle():
    found, expected = values(gridding.WEIGHTS), np.vectorize(naive.kernel)(DISTANCES)
    assert found.shape == (naive.TAPS, len(FRACTIONS))
    np.testing.assert_allclose(found, expected, atol=3e-4)
    assert expected.max() == 1


def test_slopes_are_the_derivatives_of_the_weights():
    step = 1e-5
    before, after = (
        np.array([np.polyval(row, FRACTIONS - 0.5 + s) for row in gridding.WEIGHTS]) for s in (-step, step)
    )
    np.testing.assert_allclose(values(gridding.SLOPES), (after - before) / (2 * step), atol=1e-6)


def test_weights_are_the_same_from_either_side():
    np.testing.assert_allclose(values(gridding.WEIGHTS), values(gridding.WEIGHTS)[::-1, ::-1], atol=1e-9)


def is_5_smooth(number):
    return number in {2**a * 3**b * 5**c for a in range(12) for b in range(8) for c in range(6)}


def test_padded_box_is_the_first_even_size_of_small_factors_that_is_a_quarter_larger():
    for box in range(2, 800):
        expected = next(size for size in range(2, 2000, 2) if 4 * size >= 5 * box and is_5_smooth(size))
        assert gridding.padded_px(box) == expected
    # A transform does not get much larger than that.
    assert max(gridding.padded_px(box) / box for box in range(32, 800)) < 1.5


def test_envelope_is_the_transform_of_the_kernel():
    """The integral of kernel(u) cos(2 pi r u / padded) over its width."""
    padded = 40
    for distance in (0, 1, 7.5, 16, 20, 33, 40):
        angle = 2 * np.pi * distance / padded
        expected = 2 * quad(lambda u, angle=angle: naive.kernel(u) * np.cos(angle * u), 0, naive.TAPS / 2)[0]
        assert gridding.envelope(distance, padded) == pytest.approx(expected, abs=1e-4)
    table = gridding.envelope(np.arange(-20, 21).reshape(1, -1), padded)
    assert table.shape == (1, 41) and table.dtype == np.float64
    np.testing.assert_allclose(table, table[:, ::-1], rtol=1e-9)


def alias_over_signal(distance, box):
    """Root mean square, over fractions, of what the samples' copies of a place add to a value, over the place's own."""
    padded = gridding.padded_px(box)
    copies = gridding.envelope(distance + padded * np.array([-3, -2, -1, 1, 2, 3]), padded)
    return np.sqrt(np.sum(copies**2)) / gridding.envelope(distance, padded)


@pytest.mark.parametrize("box", [32, 48, 65, 128, 200, 256])
def test_aliases_are_small_inside_the_box(box):
    places = np.linspace(0, 0.43, 50) * box
    assert max(alias_over_signal(place, box) for place in places) < 0.006
    assert alias_over_signal(0.25 * box, box) < 0.0015
