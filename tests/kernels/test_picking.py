import naive_picking as naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcryo.kernels import coarse, picking


def noise(shape, seed=0):
    return np.random.Generator(np.random.Philox(seed)).normal(0, 1, shape).astype(np.float32)


def test_standardised_images_do_not_notice_outliers():
    image = noise((60, 50)) * 4 + 100
    image[:3] = 1e6
    found = picking.standardised(image)
    assert found.max() == picking.CLIP_SIGMAS
    assert abs(np.median(found)) < 1e-5 and found[3:].std() == pytest.approx(1, abs=0.1)
    for bad in (np.ones((9, 9), np.float32), np.full((9, 9), np.nan, np.float32)):
        with pytest.raises(ValueError, match="constant, or not finite"):
            picking.standardised(bad)


def test_templates_have_zero_mean_and_unit_norm_under_their_mask():
    template, mask = picking.blob(9.0)
    found = picking.under_mask(np.stack([template, template**2]), mask)
    np.testing.assert_allclose(found.sum(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose((found**2).sum(axis=(1, 2)), 1, rtol=1e-5)
    assert not found[:, mask == 0].any()


def test_isotropic_scores_are_correlations_over_the_deviation():
    image, deviation = noise((18, 15)), np.abs(noise((18, 15), 1)) + 1
    template, mask = picking.blob(4.0)
    scores = picking.isotropic_scores(coarse.cosine_transform(image), deviation, template, mask)
    expected = naive.correlation(image, picking.under_mask(template, mask)) / deviation
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_scores_of_white_noise_have_unit_deviation_whatever_the_diameter():
    image = noise((300, 310))
    for diameter in (8.0, 14.0, 25.0):
        scores = picking.isotropic_scores(coarse.cosine_transform(image), np.ones_like(image), *picking.blob(diameter))
        assert scores.std() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("diameter", [8.0, 13.0, 20.0])
def test_a_blob_is_above_zero_within_its_diameter(diameter):
    template, mask = picking.blob(diameter)
    r = np.hypot(*(np.indices(template.shape) - len(template) // 2))
    np.testing.assert_array_equal(template > 0, r < diameter / 2)
    assert mask[r < 1.3 * diameter].all()


@settings(max_examples=30, deadline=None)
@given(ny=st.integers(3, 20), nx=st.integers(3, 20), distance=st.floats(0, 9), seed=st.integers(0, 99))
def test_peaks_are_those_of_the_greedy_search(ny, nx, distance, seed):
    scores, allowed = noise((ny, nx), seed), noise((ny, nx), seed + 1) > -1
    at, values = picking.peaks(scores, allowed, distance)
    expected_at, expected = naive.peaks(scores, allowed, max(distance, 1e-6))
    np.testing.assert_allclose(at, expected_at, atol=1e-3)
    np.testing.assert_array_equal(values, expected.astype(np.float32))


def test_a_plateau_is_one_peak():
    scores = np.zeros((7, 8), np.float32)
    scores[2:4, 3:6] = 1
    at, values = picking.peaks(scores, np.ones((7, 8), bool), 0.0)
    assert len(at) == 1 and values.tolist() == [1]


def test_peaks_lie_between_pixels():
    y, x = np.mgrid[:40, :50]
    scores = -((x - 21.3) ** 2 + (y - 17.6) ** 2).astype(np.float32)
    np.testing.assert_allclose(picking.peaks(scores, np.ones((40, 50), bool), 3.0)[0], [[21.3, 17.6]], atol=1e-3)


def test_a_profile_is_the_mean_over_rings_of_patches_of_equal_variance():
    image = noise((26, 24))
    image[:13] *= 7  # the upper position has more contrast, but no more say
    at = np.array([[11.3, 12.0], [12.0, 20.7], [3.2, 4.9]])
    reach, rings = 5, 10
    total, weight = np.zeros(rings), np.zeros(rings)
    y, x = np.mgrid[:26, :24]
    for one in at:
        patch = image[np.hypot(x - one[0], y - one[1]) < rings - 1]
        own_total, own_weight = naive.ring_means((image - patch.mean()) / patch.std(), one, rings)
        total, weight = total + own_total, weight + own_weight
    r = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1])
    expected = np.interp(r, np.arange(rings), total / weight)
    np.testing.assert_allclose(picking.profile_template(image, at, reach), expected, atol=1e-4)


def mixture(particles, seed=0):
    rng = np.random.Generator(np.random.Philox(seed))
    scores = np.concatenate([rng.normal(0.1, 0.03, 300), rng.normal(0.4, 0.05, particles)]).astype(np.float32)
    return scores, rng.normal(0.1, 0.03, 300).astype(np.float32)


@pytest.mark.parametrize("particles", [8, 40, 200, 900])
def test_the_threshold_parts_particles_from_noise(particles):
    scores, decoys = mixture(particles)
    for found in (picking.threshold(scores, decoys), picking.threshold(scores)):
        above = scores >= found
        assert above[300:].mean() > 0.97 and above[:300].mean() < 0.05


@pytest.mark.parametrize("seed", range(12))
def test_noise_gives_few_picks(seed):
    scores, decoys = mixture(0, seed)
    assert np.count_nonzero(scores >= picking.threshold(scores, decoys)) <= 5
    assert picking.threshold(scores) < np.percentile(scores, 97)  # which is what the decoys are for


def test_where_all_peaks_are_particles_they_are_taken():
    rng = np.random.Generator(np.random.Philox(1))
    scores = rng.normal(0.5, 0.08, 400).astype(np.float32)
    assert np.mean(scores >= picking.threshold(scores, rng.normal(0.1, 0.03, 300).astype(np.float32))) > 0.99


def test_thresholds_of_hardly_any_peaks():
    none, one = np.zeros(0, np.float32), np.array([0.3], np.float32)
    assert picking.threshold(none, none) == picking.threshold(none) == 1.0
    assert picking.threshold(one) == pytest.approx(0.3)
    assert picking.threshold(one, none) > 0.3
    assert picking.threshold(np.full(20, 0.3, np.float32), none) == pytest.approx(0.3)


def test_a_few_particles_far_beyond_noise_are_taken():
    rng = np.random.Generator(np.random.Philox(1))
    noise = rng.normal(0.1, 0.03, (2, 300)).astype(np.float32)
    scores = np.append(noise[0], np.float32([0.5, 0.6, 0.55]))
    assert np.count_nonzero(scores >= picking.threshold(scores, noise[1])) == 3
