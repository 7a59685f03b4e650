"""B-factors and filters, on amplitudes that are known."""

import numpy as np
import pytest

from dcryo.kernels import fft, sharpening
from dcryo.kernels.filters import radius_px
from dcryo.kernels.randomness import generator

BOX, PIXEL_A = 48, 1.5
FREQUENCY = np.arange(BOX // 2 + 1) / (BOX * PIXEL_A)


def white() -> np.ndarray:
    return generator(2, "noise", 0).standard_normal((BOX,) * 3, dtype=np.float32)


def test_radial_amplitude_is_the_mean_over_the_whole_transform() -> None:
    volume = white()
    amplitude = np.abs(np.fft.fftn(volume))
    frequency = np.fft.fftfreq(BOX, 1 / BOX)
    shells = np.floor(np.sqrt(sum(np.meshgrid(*[frequency**2] * 3))) + 0.5)
    naive = [amplitude[shells == shell].mean() for shell in range(BOX // 2 + 1)]
    np.testing.assert_allclose(sharpening.radial_amplitude(volume), naive, rtol=1e-4)


@pytest.mark.parametrize("bfactor_A2", [20.0, 150.0])
def test_the_b_factor_that_a_map_lost_is_the_one_to_sharpen_by(bfactor_A2: float) -> None:
    radius = radius_px(BOX, 3) / (BOX * PIXEL_A)
    blurred = fft.irfftn(fft.rfftn(white()) * np.exp(-bfactor_A2 / 4 * radius**2), BOX)
    fit = sharpening.guinier_fit(sharpening.radial_amplitude(blurred), FREQUENCY, 3.2)
    assert fit is not None
    assert fit.bfactor_A2 == pytest.approx(-bfactor_A2, abs=max(3 * fit.error_A2, 2.0))
    gain = sharpening.bfactor_gain(fit.bfactor_A2, FREQUENCY)
    flat = sharpening.radial_amplitude(sharpening.filtered(blurred, gain, 22.0))[8:20]
    assert flat.std() / flat.mean() < 0.05


def test_a_line_through_few_shells_is_none() -> None:
    amplitude = np.exp(-50 * FREQUENCY**2)
    assert sharpening.guinier_fit(amplitude, FREQUENCY, 9.0) is None
    assert sharpening.guinier_fit(np.zeros_like(amplitude), FREQUENCY, 3.0) is None
    fit = sharpening.guinier_fit(amplitude, FREQUENCY, 5.0, from_A=10.0)
    assert fit is not None and fit.bfactor_A2 == pytest.approx(-200)
    used = FREQUENCY[fit.shells]
    assert used[0] == pytest.approx(FREQUENCY[FREQUENCY >= 0.1 - 1e-9][0]) and used[-1] <= 0.2


def test_weights_by_the_fsc() -> None:
    np.testing.assert_allclose(sharpening.fsc_weight(np.array([1.0, 0.143, 0.0, -0.2])), [1, 0.5, 0, 0], atol=1e-3)


def test_a_filter_multiplies_shells_and_ends_at_its_last() -> None:
    gain = 1 + np.arange(BOX // 2 + 1) / 4
    before, after = fft.rfftn(white()), fft.rfftn(sharpening.filtered(white(), gain, 15))
    radius = radius_px(BOX, 3)
    kept, cut, left = radius <= 14, np.abs(radius - 15) < 0.05, radius >= 16.1
    np.testing.assert_allclose(after[kept], (before * (1 + radius / 4))[kept], rtol=1e-3, atol=0.5)
    np.testing.assert_allclose(after[cut], (before * gain[15] / 2)[cut], rtol=0.1, atol=5)
    assert np.all(np.abs(after[left]) < 0.05)


def test_a_map_gets_the_amplitudes_of_a_model_but_for_a_factor() -> None:
    amplitude, of_model = np.exp(-30 * FREQUENCY**2), 7 * np.exp(-5 * FREQUENCY**2)
    amplitude[-3:] = 0
    gain = sharpening.model_gain(amplitude, of_model)
    ratio = (gain * amplitude / of_model)[1:-3]
    np.testing.assert_allclose(ratio, ratio[0])
    assert np.all(gain[-3:] == 0)
