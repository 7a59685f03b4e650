"""What masks add to an FSC, against definitions written out and against cases whose answer is known."""

import numpy as np
import pytest

from dcryo.kernels import fft, filters, fsc, mask_effect, masks
from dcryo.kernels.randomness import generator

BOX = 32


def white(number: int) -> np.ndarray:
    return generator(5, "noise", number).standard_normal((BOX,) * 3, dtype=np.float32)


@pytest.mark.parametrize("box", [24, 25])
def test_random_phases_keep_amplitudes_and_low_resolution(box: int) -> None:
    volume = generator(1, "noise", 0).standard_normal((box,) * 3, dtype=np.float32)
    turned = mask_effect.random_phases(volume, 6, 0, 1)
    before, after = np.fft.fftn(np.fft.ifftshift(volume)), np.fft.fftn(np.fft.ifftshift(turned))
    frequency = np.fft.fftfreq(box, 1 / box)
    radius = np.sqrt(sum(np.meshgrid(*[frequency**2] * 3)))
    np.testing.assert_allclose(np.abs(after), np.abs(before), atol=2e-2)
    np.testing.assert_allclose(after[radius < 6], before[radius < 6], atol=2e-2)
    beyond = (radius >= 6) & (radius < box / 2)
    phase = np.angle(after[beyond] / before[beyond])
    assert abs(np.mean(np.exp(1j * phase))) < 0.05 and abs(np.mean(np.exp(2j * phase))) < 0.05


def test_random_phases_are_decided_by_seed_and_number() -> None:
    volume = white(0)
    one = mask_effect.random_phases(volume, 3, 7, 0)
    np.testing.assert_array_equal(one, mask_effect.random_phases(volume, 3, 7, 0))
    for other in (mask_effect.random_phases(volume, 3, 7, 1), mask_effect.random_phases(volume, 3, 8, 0)):
        assert np.abs(fsc.shell_correlation(one, other)[6:]).max() < 0.15


def test_correction_by_hand() -> None:
    masked, of_mask = np.array([1, 1, 0.9, 0.8, 0.5, 0.2]), np.array([1, 1, 0.9, 0.7, 0.2, 0.4])
    found = mask_effect.corrected(masked, of_mask, 2)
    np.testing.assert_allclose(found, [1, 1, 0.9, 0.8, 0.375, -1 / 3])
    np.testing.assert_array_equal(mask_effect.corrected(masked, of_mask, None), masked)
    assert mask_effect.corrected(np.array([1, 0.5, 0.5, 0.5]), np.array([1, 1, 1, 1.0]), 1)[3] == -1


def test_phases_are_random_from_where_the_unmasked_fsc_falls_below_eight_tenths() -> None:
    assert mask_effect.randomised_from(np.array([0.1, 1, 0.81, 0.79, 0.9])) == 3
    assert mask_effect.randomised_from(np.array([1, 0.9, 0.9])) is None


def test_the_molecule_alone_has_the_snr_that_the_mask_dilutes() -> None:
    snr = np.array([0.0, 0.1, 1.0, 50.0])
    found = mask_effect.of_molecule(snr / (1 + snr), 30.0, 10.0)
    np.testing.assert_allclose(found, 3 * snr / (1 + 3 * snr))
    np.testing.assert_allclose(mask_effect.of_molecule(snr / (1 + snr), 10.0, 30.0), snr / (1 + snr))
    assert mask_effect.of_molecule(np.array([-0.1]), 30.0, 10.0)[0] == -0.1


def filtered_first_naive(first: np.ndarray, second: np.ndarray, mask: np.ndarray, shell: int) -> float:
    frequency = np.fft.fftfreq(BOX, 1 / BOX)
    inside = np.floor(np.sqrt(sum(np.meshgrid(*[frequency**2] * 3))) + 0.5) == shell
    a, b = (mask * np.fft.ifftn(np.fft.fftn(volume) * inside).real for volume in (first, second))
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


def test_filtered_first_is_what_it_says() -> None:
    signal = white(0)
    first, second, mask = signal + white(1), signal + white(2), masks.sphere(BOX, 14, 4)
    shells = np.array([1, 4, 9, 16])
    found = mask_effect.filtered_first(first, second, mask, shells)
    naive = [filtered_first_naive(first, second, mask, shell) for shell in shells]
    np.testing.assert_allclose(found, naive, atol=1e-5)


def test_filtered_first_is_the_masked_fsc_of_a_smooth_mask() -> None:
    signal = white(0)
    first, second, mask = signal + white(1), signal + white(2), masks.sphere(BOX, 8, 12)
    found = mask_effect.filtered_first(first, second, mask, np.arange(BOX // 2 + 1))
    np.testing.assert_allclose(found[3:], fsc.shell_correlation(first * mask, second * mask)[3:], atol=0.08)


def test_a_hard_small_mask_makes_the_fsc_of_noise_and_not_that_of_maps_filtered_first() -> None:
    common = 20 * filters.lowpass(white(0), 1.0, BOX / 5)
    first, second = common + white(1), common + white(2)
    mask = (common > np.percentile(common, 97)).astype(np.float32)
    shells = np.arange(9, 15)
    masked = fsc.shell_correlation(first * mask, second * mask)[shells]
    assert masked.min() > 0.3
    unmasked = fsc.shell_correlation(first, second)[shells]
    found = mask_effect.filtered_first(first, second, mask, shells)
    assert abs(found.mean()) < 0.06 and np.abs(unmasked).max() < 0.1
    randomised = [fft.irfftn(fft.rfftn(volume), BOX) for volume in (first, second)]
    randomised = [mask_effect.random_phases(volume, 8, 0, n) * mask for n, volume in enumerate(randomised)]
    np.testing.assert_allclose(fsc.shell_correlation(*randomised)[shells[2:]], masked[2:], atol=0.12)
