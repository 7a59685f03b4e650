"""What an FSC is worth, against noise that is drawn and against the definitions."""

import numpy as np
import pytest

from dcryo.kernels import fft, fsc, masks, significance
from dcryo.kernels.randomness import generator

BOX = 32


def white(seed: int) -> np.ndarray:
    return generator(seed, "noise", 0).standard_normal((BOX,) * 3, dtype=np.float32)


def test_without_a_mask_half_the_voxels_of_a_shell_are_independent() -> None:
    frequency = np.fft.fftfreq(BOX, 1 / BOX)
    radius = np.sqrt(sum(np.meshgrid(*[frequency**2] * 3)))
    counted = [np.sum(np.floor(radius + 0.5) == shell) for shell in range(BOX // 2 + 1)]
    plain = significance.independent_voxels(None, BOX, 1)
    np.testing.assert_allclose(plain, np.array(counted) / 2)
    np.testing.assert_allclose(significance.independent_voxels(np.ones((BOX,) * 3), BOX, 1), plain)
    np.testing.assert_allclose(significance.independent_voxels(None, BOX, 4), plain / 4)


@pytest.mark.parametrize(("diameter", "edge"), [(16, 5), (10, 0), (32, 0)])
def test_under_a_mask_fsc_of_noise_scatters_as_its_independent_voxels_say(diameter: float, edge: float) -> None:
    mask = masks.sphere(BOX, diameter, edge)
    curves = np.array(
        [fsc.shell_correlation(white(2 * n) * mask, white(2 * n + 1) * mask) for n in range(60)]
    )[:, 6:]  # fmt: skip
    expected = 1 / np.sqrt(2 * significance.independent_voxels(mask, BOX, 1)[6:])
    assert np.mean(curves.std(axis=0) / expected) == pytest.approx(1, abs=0.1)


def test_half_bit_is_half_a_bit() -> None:
    # log2(1 + SNR) = 1/2 for the map of both halves, each half of which has half that SNR.
    snr = (2**0.5 - 1) / 2
    assert significance.half_bit(np.array([1e12]))[0] == pytest.approx(snr / (1 + snr), abs=1e-4)
    few = significance.half_bit(np.array([10.0, 100.0, 1000.0]))
    assert np.all(np.diff(few) < 0) and few[0] == pytest.approx(0.5427, abs=1e-3)


def test_half_bit_is_crossed_after_the_first_shells_that_have_too_few_voxels() -> None:
    threshold = np.array([2.0, 1.2, 0.6, 0.5, 0.4, 0.3])
    curve = np.array([1.0, 1.0, 0.9, 0.8, 0.3, 0.1])
    assert significance.half_bit_crossing(curve, threshold) == pytest.approx(3.75)
    assert significance.half_bit_crossing(curve * 0.1, threshold) == 0
    assert significance.half_bit_crossing(np.ones(6), threshold) == 5


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_confidence_bands_hold_the_truth_95_times_in_100(correlation: float) -> None:
    mask = masks.sphere(BOX, 18, 6)
    independent = significance.independent_voxels(mask, BOX, 1)
    held = []
    for n in range(25):
        signal = np.sqrt(correlation) * white(3 * n)
        halves = [(signal + np.sqrt(1 - correlation) * white(3 * n + half)) * mask for half in (1, 2)]
        low, high = significance.confidence(fsc.shell_correlation(*halves), independent)
        held.append((low <= correlation) & (correlation <= high))
    share = np.mean(np.array(held)[:, 5:])
    assert 0.92 < share < 0.98


@pytest.mark.parametrize("diameter", [None, 20, 8, 4])
def test_noise_claims_nothing(diameter: float | None) -> None:
    mask = np.ones((BOX,) * 3, np.float32) if diameter is None else masks.sphere(BOX, diameter, 0)
    within = significance.independent_within(mask, 1)
    for n in range(40):
        curve = fsc.shell_correlation(white(2 * n) * mask, white(2 * n + 1) * mask)
        assert not significance.is_claimed(curve, within), n


def test_a_weak_signal_is_claimed() -> None:
    blurred = fft.irfftn(fft.rfftn(white(1)) * np.exp(-((np.arange(17) / 4.0) ** 2)), BOX)
    halves = [blurred + 0.3 * white(seed) for seed in (2, 3)]
    curve = fsc.shell_correlation(*halves)
    assert significance.is_claimed(curve, significance.independent_within(np.ones((BOX,) * 3), 1))


def test_a_mask_that_is_empty_leaves_nothing_independent() -> None:
    empty = np.zeros((32, 32, 32), dtype=np.float32)
    assert not significance.independent_voxels(empty, 32, 1).any()
    assert not significance.is_claimed(np.ones(17), significance.independent_within(empty, 1))
