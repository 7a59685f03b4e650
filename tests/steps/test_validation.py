"""The resolution that half maps are given, against the truth that they were made from."""

import numpy as np
import pytest
from noisy_halves import blurred, noise_power, noisy_halves

from dcryo.kernels import density, filters, fsc, mask_effect, masks, phantom, solvent, symmetry
from dcryo.steps import validation

BOX, PIXEL_A = 64, 2.2
SPHERE = masks.sphere(BOX, 50, 5)


def halves_of(seed: int, name: str, unmasked_A: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    made = phantom.phantom(symmetry.operators(name), 45.0, seed=seed)
    truth = density.gaussian_density(made.position_A, made.amplitude, made.bfactor_A2, BOX, PIXEL_A)
    truth = blurred(truth, PIXEL_A, 8 * unmasked_A**2)
    return truth, *noisy_halves(truth, noise_power(truth, PIXEL_A, unmasked_A), seed)


def masks_of(first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    """Soft, tight, and one that no one should use: the brightest hundredth of the voxels, with no edge."""
    found = solvent.find_molecule(first, second, PIXEL_A)
    assert found is not None
    mean = filters.lowpass((first + second) / 2, PIXEL_A, 5.0)
    return {
        "soft": solvent.soft_mask(found.core, 6 / PIXEL_A, 10 / PIXEL_A),
        "tight": solvent.soft_mask(found.core, 0, 2),
        "absurd": (mean > np.percentile(mean, 99)).astype(np.float32),
    }


def resolution_A(curve: np.ndarray, threshold: float) -> float:
    return fsc.resolution_at(curve, threshold, BOX, PIXEL_A)


@pytest.mark.parametrize(("name", "unmasked_A"), [("C1", 7.0), ("C1", 10.0), ("D2", 8.0)])
def test_resolution_is_where_the_map_agrees_with_the_truth(name: str, unmasked_A: float) -> None:
    truth, first, second = halves_of(3, name, unmasked_A)
    mean, given = (first + second) / 2, masks_of(first, second)
    true_A = resolution_A(fsc.shell_correlation(mean * given["soft"], truth * given["soft"]), fsc.HALF)
    for kind, mask in given.items():
        order = len(symmetry.operators(name))
        curves = validation.half_map_curves(first, second, mask, SPHERE, order, 0)
        verdict = validation.judge(first, second, mask, curves, order)
        assert verdict.claimed
        if kind == "tight" and not verdict.tight:
            # Less solvent is in it than in the soft one, and its truth is a little better.
            true_here_A = resolution_A(fsc.shell_correlation(mean * mask, truth * mask), fsc.HALF)
            assert resolution_A(verdict.fsc, fsc.GOLD_STANDARD) == pytest.approx(true_here_A, rel=0.05)
        else:
            assert resolution_A(verdict.fsc, fsc.GOLD_STANDARD) == pytest.approx(true_A, rel=0.05), kind
        assert verdict.tight == (kind != "soft") or kind == "tight"
        if kind == "absurd":
            assert verdict.leak > validation.ABSURD
            assert resolution_A(curves.masked, fsc.GOLD_STANDARD) < 0.85 * true_A
        if kind == "soft":
            assert verdict.leak < 0.03
            np.testing.assert_array_equal(verdict.fsc, curves.corrected)


def test_noise_claims_nothing_even_under_a_mask_made_from_it() -> None:
    for seed in range(2):
        first, second = noisy_halves(np.zeros((BOX,) * 3, np.float32), np.full(BOX // 2 + 1, BOX**3), seed)
        mean = filters.lowpass((first + second) / 2, PIXEL_A, 12.0)
        made_of_noise = (mean > np.percentile(mean, 99)).astype(np.float32)
        for mask in (SPHERE, np.ones_like(SPHERE), masks.sphere(BOX, 14, 0), made_of_noise):
            curves = validation.half_map_curves(first, second, mask, SPHERE, 1, 0)
            assert not validation.judge(first, second, mask, curves, 1).claimed


def test_the_curves_are_those_of_their_definitions() -> None:
    _, first, second = halves_of(3, "C1", 8.0)
    mask = masks_of(first, second)["soft"]
    curves = validation.half_map_curves(first, second, mask, SPHERE, 1, 0)
    np.testing.assert_array_equal(curves.unmasked, fsc.shell_correlation(first, second))
    np.testing.assert_array_equal(curves.masked, fsc.shell_correlation(first * mask, second * mask))
    np.testing.assert_array_equal(curves.spherical, fsc.shell_correlation(first * SPHERE, second * SPHERE))
    assert curves.randomised_from == mask_effect.randomised_from(curves.unmasked)
    np.testing.assert_array_equal(
        curves.corrected, mask_effect.corrected(curves.masked, curves.randomised, curves.randomised_from)
    )
    assert np.all(curves.low <= curves.corrected + 1e-6) and np.all(curves.corrected <= curves.high + 1e-6)
    again = validation.half_map_curves(first, second, mask, SPHERE, 1, 0)
    np.testing.assert_array_equal(again.randomised, curves.randomised)
    other = validation.half_map_curves(first, second, mask, SPHERE, 1, 1)
    assert np.any(other.randomised != curves.randomised)
    assert np.abs(other.corrected - curves.corrected).max() < 0.05
