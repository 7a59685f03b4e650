"""Images of noise, where doubt begins, and the line of particles against resolution."""

import numpy as np
import pytest

from dcryo.kernels import fft
from dcryo.kernels.filters import radius_px
from dcryo.kernels.fsc import GOLD_STANDARD
from dcryo.kernels.overfitting import first_doubtful_shell, noise_substituted, resolution_line

WIDTH_A, SHELLS = 200.0, 51


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((5, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("box", [32, 33])
def test_noise_keeps_amplitudes_and_what_is_below_its_shell(box: int) -> None:
    given = np.random.default_rng(1).standard_normal((5, box, box)).astype(np.float32)
    before, after = fft.rfft2(given), fft.rfft2(noise_substituted(given, 7, 0))
    below = radius_px(box, 2) < 7
    np.testing.assert_allclose(after[:, below], before[:, below], atol=2e-4)
    np.testing.assert_allclose(np.abs(after), np.abs(before), atol=2e-4)


def test_noise_has_nothing_in_common_with_the_image_beyond_its_shell(images: np.ndarray) -> None:
    before, after = fft.rfft2(images), fft.rfft2(noise_substituted(images, 7, 0))
    beyond = radius_px(32, 2) >= 7
    for one, other in zip(before[:, beyond], after[:, beyond], strict=True):
        shared = np.vdot(one, other).real / np.sqrt(np.vdot(one, one).real * np.vdot(other, other).real)
        assert abs(shared) < 5 / np.sqrt(2 * beyond.sum())


def test_noise_is_keyed_by_what_is_in_the_image(images: np.ndarray) -> None:
    """An image that is there twice has one noise, whatever else is there; another seed, or image, gives another."""
    once, reverse = noise_substituted(images, 7, 0), noise_substituted(images[::-1], 7, 0)
    np.testing.assert_array_equal(once, reverse[::-1])
    assert np.abs(once - noise_substituted(images, 7, 1)).max() > 0.5
    almost = images + np.float32(1e-3)
    assert np.abs(once - noise_substituted(almost, 7, 0)).max() > 0.5


def test_doubt_begins_where_the_halves_agree_less() -> None:
    curve = np.ones(21)
    assert first_doubtful_shell(curve) == 13
    curve[9:] = 0.79
    assert first_doubtful_shell(curve) == 9
    curve[2:] = 0.1
    assert first_doubtful_shell(curve) == 4


def fallen(resolution_A: np.ndarray) -> np.ndarray:
    """Curves that fall to the threshold at resolutions, steeply."""
    shell = WIDTH_A / resolution_A[:, None] - np.arange(SHELLS)
    return np.clip(GOLD_STANDARD + 0.1 * shell, 0, 1)


def test_a_line_is_found_where_there_is_one() -> None:
    numbers = 100 * 2 ** np.arange(6)[::-1]
    for bfactor in (60.0, 180.0):
        square = 0.004 + 2 / bfactor * np.log(numbers / 100)
        line = resolution_line(numbers, fallen(square**-0.5), GOLD_STANDARD, WIDTH_A)
        inside = square < (0.95 * 50 / WIDTH_A) ** 2
        assert line.used.tolist() == inside.tolist()
        assert line.bfactor_A2 == pytest.approx(bfactor, rel=1e-3)
        assert line.error_A2 < 1e-3 * bfactor
        assert line.slope * np.log(numbers[-1]) + line.intercept == pytest.approx(square[-1], rel=1e-3)


def test_the_line_and_its_error_are_those_of_a_general_fit() -> None:
    numbers = 100 * 2 ** np.arange(6)
    square = 0.004 + 0.008 * np.log(numbers / 100) + np.random.default_rng(2).normal(0, 8e-4, 6)
    line = resolution_line(numbers, fallen(square**-0.5), GOLD_STANDARD, WIDTH_A)
    (slope, intercept), covariance = np.polyfit(np.log(numbers), square, 1, cov=True)
    assert (line.slope, line.intercept) == pytest.approx((slope, intercept), rel=1e-3)
    assert line.bfactor_A2 == pytest.approx(2 / slope, rel=1e-3)
    assert line.error_A2 == pytest.approx(2 / slope**2 * np.sqrt(covariance[0, 0]), rel=0.02)


def test_first_shells_and_nyquist_make_no_line() -> None:
    numbers = np.array([800, 400, 200, 100])
    line = resolution_line(numbers, fallen(np.array([4.0, 8.0, 10.0, 90.0])), GOLD_STANDARD, WIDTH_A)
    assert line.used.tolist() == [False, True, True, False]
    assert np.isfinite(line.bfactor_A2) and np.isnan(line.error_A2)
    assert np.isnan(resolution_line(numbers, fallen(np.full(4, 4.0)), GOLD_STANDARD, WIDTH_A).bfactor_A2)


def test_particles_that_make_it_worse_have_no_bfactor() -> None:
    numbers = np.array([800, 400, 200])
    assert np.isnan(resolution_line(numbers, fallen(np.array([12.0, 11.0, 10.0])), GOLD_STANDARD, WIDTH_A).bfactor_A2)
