import naive
import numpy as np
import pytest

from dcryo.kernels import fft, fsc
from dcryo.kernels.masks import sphere
from dcryo.kernels.shells import volume_shells


def noise(*shape, seed=0):
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("box", [8, 9])
def test_fsc_and_power_are_sums_over_the_whole_transform(box):
    first = noise(box, box, box)
    second = first + noise(box, box, box, seed=1)
    np.testing.assert_allclose(fsc.shell_correlation(first, second), naive.shell_correlation(first, second), atol=1e-5)
    np.testing.assert_allclose(fsc.shell_power(first), naive.shell_power(first), rtol=1e-5)


@pytest.mark.parametrize("box", [16, 17])
def test_a_map_correlates_with_itself_on_any_grey_scale(box):
    first, second = noise(box, box, box), noise(box, box, box, seed=1)
    np.testing.assert_allclose(fsc.shell_correlation(first, 3.5 * first), 1, atol=1e-6)
    np.testing.assert_allclose(fsc.shell_correlation(first, -first), -1, atol=1e-6)
    np.testing.assert_array_equal(fsc.shell_correlation(first, second), fsc.shell_correlation(second, first))


@pytest.mark.parametrize("box", [48, 49])
def test_equal_noise_in_both_maps_gives_snr_over_one_plus_snr(box):
    """Each shell has its own signal-to-noise ratio."""
    shells = volume_shells(box)
    snr = 20 * np.exp(-np.arange(shells.max() + 1) / 6)
    signal = fft.irfftn(fft.rfftn(noise(box, box, box)) * np.sqrt(snr)[shells], box)
    found = fsc.shell_correlation(signal + noise(box, box, box, seed=1), signal + noise(box, box, box, seed=2))
    expected = (snr / (1 + snr))[: box // 2 + 1]
    voxels = np.bincount(shells.ravel())[: box // 2 + 1]
    deviation = (found - expected) * np.sqrt(voxels)
    assert np.abs(deviation[4:]).max() < 3.5 and deviation[4:].std() < 1.3
    assert expected[4] > 0.9 and expected[-1] < 0.3


def test_shells_without_power_give_zero():
    box = 16
    smooth = fft.irfftn(np.where(volume_shells(box) <= 3, fft.rfftn(noise(box, box, box)), 0), box)
    found = fsc.shell_correlation(smooth, np.zeros((box,) * 3, np.float32))
    np.testing.assert_array_equal(found, np.zeros(box // 2 + 1))


@pytest.mark.parametrize("box", [15, 16])
def test_signal_share_is_what_power_inside_exceeds_that_outside(box):
    volume, mask = noise(box, box, box), sphere(box, box / 3, 3)
    volume += 3 * noise(box, box, box, seed=1) * mask
    outside = (1 - mask) * sphere(box, box, 0)
    power = [naive.shell_power(volume * part) / np.sum(part**2.0) for part in (outside, mask)]
    found = fsc.signal_share(volume, mask)
    assert found.shape == (box // 2 + 1,) and found.dtype == np.float64
    np.testing.assert_allclose(found, np.clip(1 - power[0] / power[1], 0, 1), atol=1e-5)
    np.testing.assert_allclose(fsc.signal_share(1e3 * volume, mask), found, atol=1e-6)


@pytest.mark.parametrize("box", [48, 49])
def test_signal_share_is_snr_over_one_plus_snr(box):
    """Of signal inside the mask, each shell's own, and white noise everywhere."""
    mask = sphere(box, 0.7 * box, 0)
    snr = 20 * np.exp(-np.arange(volume_shells(box).max() + 1) / 6)
    signal = fft.irfftn(fft.rfftn(noise(box, box, box)) * np.sqrt(snr)[volume_shells(box)], box)
    found = fsc.signal_share(signal * mask + noise(box, box, box, seed=1), mask)
    expected = (snr / (1 + snr))[: box // 2 + 1]
    np.testing.assert_allclose(found[4:], expected[4:], atol=0.12)
    assert np.abs(found[4:] - expected[4:]).mean() < 0.04
    assert expected[4] > 0.9 and expected[-1] < 0.3


def test_signal_share_of_noise_alone_is_small_and_of_a_map_without_noise_is_one():
    box, mask = 48, sphere(48, 24, 4)
    assert fsc.signal_share(noise(box, box, box), mask)[3:].mean() < 0.1
    np.testing.assert_allclose(fsc.signal_share(noise(box, box, box) * (mask == 1), mask), 1, atol=1e-6)
    # A map that is stronger outside has no signal inside, and no less than none.
    found = fsc.signal_share(noise(box, box, box) * (2 - mask), mask)
    assert found.min() == 0 and found[6:].max() < 0.2
    np.testing.assert_array_equal(fsc.signal_share(np.zeros((box,) * 3, np.float32), mask), np.zeros(25))


@pytest.mark.parametrize("diameter", [16, 40])
def test_signal_share_is_nothing_where_the_mask_leaves_no_noise(diameter):
    mask = sphere(16, diameter, 3)
    np.testing.assert_array_equal(fsc.signal_share(noise(16, 16, 16), mask), np.zeros(9))


def test_crossing_is_interpolated_and_the_first():
    curve = np.array([1, 0.9, 0.8, 0.6, 0.2, 0.0, 0.7, 0.1])
    assert fsc.crossing(curve, 0.5) == pytest.approx(3.25)
    assert fsc.crossing(curve, 0.143) == pytest.approx(4 + (0.2 - 0.143) / 0.2)
    assert fsc.crossing(curve, 0.8) == 2.0  # not below yet
    assert fsc.crossing(curve, 0.05) == pytest.approx(4.75)
    assert fsc.crossing(curve, -0.5) == 7.0
    assert fsc.crossing(np.array([0.0, 0.9, 0.8, 0.1]), 0.5) == pytest.approx(2 + 3 / 7)  # zero frequency is no shell
    assert fsc.crossing(np.array([1.0, 0.1, 0.9]), 0.5) == 1.0


def test_resolution_is_that_of_the_crossing():
    curve = np.array([1, 0.9, 0.8, 0.6, 0.2, 0.0, 0.0])
    assert fsc.resolution_at(curve, fsc.HALF, 12, 1.3) == pytest.approx(12 * 1.3 / 3.25)
    assert fsc.resolution_at(np.ones(7), fsc.GOLD_STANDARD, 12, 1.3) == pytest.approx(2.6)
