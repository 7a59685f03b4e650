"""What follows from sums over particles for micrographs and optics groups."""

import numpy as np
import pytest

from dcryo.kernels.ctf_sums import (
    ASTIGMATISM,
    BFACTOR,
    DEFOCUS,
    DIAGONAL,
    NORMAL,
    PARAMETERS,
    PHASE_SHIFT,
    SCALE,
    STRETCH,
)
from dcryo.kernels.fsc import shell_correlation
from dcryo.kernels.masks import sphere
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import half_plane
from dcryo.kernels.shrinkage import Settled
from dcryo.steps import ctf_refinement
from dcryo.steps.ctf_refinement import OpticsGroups, Range


def groups_of(count, magnification=None):
    stretch = np.tile(np.eye(2), (count, 1, 1)) if magnification is None else magnification
    return OpticsGroups(np.zeros((count, 6)), np.zeros((count, 9)), stretch, np.full(count, 1.5))


def packed(gradient, matrix):
    """Normal equations as kernels leave them."""
    rows, columns = np.triu_indices(PARAMETERS)
    return np.concatenate([gradient, matrix[:, rows, columns]], axis=1)


def equations(true, precision, seed):
    """Normal equations at zero of particles whose parameters (n, PARAMETERS) are known to about a precision."""
    random = generator(seed, "equations", 0)
    factor = random.standard_normal((len(true), PARAMETERS, 2 * PARAMETERS)) * np.sqrt(precision)[:, None]
    matrix = factor @ np.swapaxes(factor, 1, 2)
    noise = np.einsum("njk,nk->nj", factor, random.standard_normal((len(true), 2 * PARAMETERS)))
    return packed(np.einsum("njk,nk->nj", matrix, true) + noise, matrix)


def test_the_reference_is_the_half_map_by_wieners_filter() -> None:
    random = generator(1, "reference", 0)
    mask, half = sphere(24, 14, 4), random.standard_normal((24,) * 3).astype(np.float32)
    weights = np.r_[np.linspace(1, 0.2, 9), -0.1, 0.05, 0.1, 0.0]
    found = ctf_refinement.weighted_reference(half, mask, weights, 10)
    from_shells = np.fft.fftn(found) / np.fft.fftn(half * mask)
    frequency = np.fft.fftfreq(24, 1 / 24)
    shell = np.floor(np.sqrt(sum(axis**2 for axis in np.meshgrid(*[frequency] * 3))) + 0.5).astype(int)
    for number, weight in ((0, 1.0), (4, weights[4]), (9, 0.0), (10, 0.05), (11, 0.0), (15, 0.0)):
        np.testing.assert_allclose(from_shells[shell == number].real, weight, atol=2e-3)
    assert shell_correlation(found, half * mask)[5] == pytest.approx(1, abs=1e-5)


def test_micrographs_share_their_particles_astigmatism_whatever_their_defoci() -> None:
    random = generator(2, "micrographs", 0)
    micrograph = np.repeat(np.arange(30), 40)
    scale = np.array([100.0, 80.0, 80.0, 0.0, 0.0, 0.0])
    of_micrograph = random.standard_normal((30, PARAMETERS)) * scale
    true = of_micrograph[micrograph]
    true[:, DEFOCUS] = 150 * random.standard_normal(len(micrograph))
    normal = equations(true, np.array([1e-4, 1e-4, 1e-4, 1, 1e-4, 1]), 3)
    defocus = Settled(np.zeros(1), np.zeros(1), np.zeros(1), 150.0)
    wanted = [ASTIGMATISM, DIAGONAL]
    before, far = np.zeros((30, 2)), np.full(2, 1e3)
    free = ctf_refinement.fit_micrographs([normal[:500], normal[500:]], micrograph, wanted, before, far, defocus)
    held = ctf_refinement.fit_micrographs([normal], micrograph, wanted, before, far, None)
    error = [np.std(fit.change - of_micrograph[:, wanted]) for fit in (free, held)]
    assert error[0] < 12 and error[0] < error[1]
    np.testing.assert_allclose(free.spread, 80, rtol=0.3)


def test_steps_are_no_longer_than_their_equations_hold() -> None:
    rates = np.array([-1e-6, -2.5e-5])
    wanted = [ASTIGMATISM, PHASE_SHIFT, BFACTOR, SCALE]
    longest = ctf_refinement.longest_steps(rates, wanted, Range(2, 20))
    turn, damping = longest[1], longest[3]
    np.testing.assert_allclose(longest * [1e-6 * 400, 1, 2.5e-5 * 400, 1], [turn, turn, damping, damping])
    true = np.zeros((40, PARAMETERS))
    true[:, ASTIGMATISM] = 500
    normal = equations(true, np.full(PARAMETERS, 1e-2), 9)
    found = ctf_refinement.fit_micrographs(
        [normal], np.repeat([0, 1], 20), [ASTIGMATISM], np.zeros((2, 1)), np.array([70.0]), None
    )
    np.testing.assert_array_equal(found.change, 70)


def test_envelopes_that_all_micrographs_have_in_common_are_the_maps() -> None:
    random = generator(4, "envelopes", 0)
    micrograph = np.repeat(np.arange(20), random.integers(10, 60, 20))
    true = np.zeros((len(micrograph), PARAMETERS))
    true[:, BFACTOR] = (50 + 30 * random.standard_normal(20))[micrograph]
    normal = equations(true, np.array([1e-4, 1e-4, 1e-4, 1, 1e-2, 10]), 5)
    found = ctf_refinement.fit_micrographs(
        [normal], micrograph, [BFACTOR, SCALE], np.zeros((20, 2)), np.full(2, 1e3), None
    )
    assert found.change[micrograph].mean(axis=0) == pytest.approx(0, abs=1e-9)
    expected = true[:, BFACTOR] - true[:, BFACTOR].mean()
    assert np.std(found.change[micrograph, 0] - expected) < 3


def stretch_sums(true, seed):
    """Sums of a group whose slices' gradients and images are drawn, stretched by `true`."""
    random = generator(seed, "stretch", 0)
    kx, ky = random.integers(-20, 20, (2, 4000))
    u, v = random.standard_normal((2, 4000))
    slope = np.stack([u * kx, u * ky, v * kx, v * ky])
    left = true.ravel() @ slope + random.standard_normal(4000)
    squares = [(product * power).sum() for product in (u * u, u * v, v * v) for power in (kx * kx, kx * ky, ky * ky)]
    return np.r_[slope @ left, squares]


def test_magnification_is_found_but_for_what_poses_and_the_map_explain() -> None:
    true = np.array([[0.012, 0.003 + 0.02], [0.003 - 0.02, -0.004]])
    sums = np.stack([stretch_sums(true, 6), stretch_sums(true + 0.01 * np.eye(2), 7)])
    assert sums.shape == (2, STRETCH)
    found, error = ctf_refinement.fit_magnification(sums, np.array([100.0, 100.0]), groups_of(2))
    # The turn of 0.02 is one of all poses, the mean stretch of 0.009 one of the map.
    even = np.array([[0.012, 0.003], [0.003, -0.004]]) - 0.004 * np.eye(2)
    for own, apart in zip(found, (-0.005, 0.005), strict=True):
        np.testing.assert_allclose(own - np.eye(2), even + apart * np.eye(2), atol=4 * error.max())
    np.testing.assert_allclose(found, np.swapaxes(found, 1, 2))
    assert np.trace(found.mean(axis=0)) == pytest.approx(2)
    assert error.min() > 0 and error.max() < 0.01
    nothing, _ = ctf_refinement.fit_magnification(np.zeros((2, STRETCH)), np.zeros(2), groups_of(2))
    np.testing.assert_array_equal(nothing, np.tile(np.eye(2), (2, 1, 1)))


def test_defocus_carried_over_to_another_magnification_is_that_of_the_same_ctf() -> None:
    before = np.array([[[1.01, 0.004], [0.004, 0.99]], np.eye(2)])
    after = np.array([np.eye(2), [[0.995, -0.01], [0.006, 1.02]]])
    mean, vector = np.array([12000.0, -3000.0]), np.array([[300.0, -150.0], [0.0, 40.0]])
    found = ctf_refinement.carried_over(mean, vector, before, after)
    pixels = half_plane(6)
    k = np.stack([pixels.kx, pixels.ky]).astype(float)

    def defocus(magnification, mean, vector):
        x, y = magnification @ k
        return mean * (x**2 + y**2) + vector[0] * (x**2 - y**2) + vector[1] * 2 * x * y

    for i in range(2):
        np.testing.assert_allclose(
            defocus(after[i], found[0][i], found[1][i]), defocus(before[i], mean[i], vector[i]), rtol=1e-12, atol=1e-6
        )


def test_what_is_not_asked_for_is_held_and_shown() -> None:
    within, box = Range(2, 12), 32
    pixels = half_plane(12)
    groups = groups_of(1)
    groups.odd[0], groups.even[0] = [1, 2, 30, 0, 0, 10], [0.1, 2, -1, 1, 3, 0, 0, 0, 5]
    random = generator(8, "group", 0)
    sums = np.abs(random.standard_normal((len(pixels.kx), 7)))
    sums[:, 6] = sums[:, 4] + 1
    found = ctf_refinement.fit_group(sums, groups, 0, (), (), within, box)
    np.testing.assert_array_equal(found.fit.odd, groups.odd[0])
    np.testing.assert_array_equal(found.fit.even, groups.even[0])
    assert found.pictures.shape == (4, box, box) and not found.fit.odd_error.any()
    shift = ctf_refinement.fit_group(sums, groups, 0, (0, 1), (), within, box)
    assert np.all(shift.fit.odd[:2] != groups.odd[0, :2])
    np.testing.assert_array_equal(shift.fit.odd[2:], groups.odd[0, 2:])
    assert NORMAL == PARAMETERS + 21
