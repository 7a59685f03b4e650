"""Coordinates against integration by brute force; what is done to the volumes of a model leaves it the same model."""

import numpy as np
import pytest

from dcryo.kernels import fft
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import volume_shells
from dcryo.steps import variability as steps

BOX = 12


def loadings(count: int, stream: int = 0) -> np.ndarray:
    random = generator(stream, "loadings of tests", count)
    return (
        random.standard_normal((count, BOX, BOX, BOX)).astype(np.float32) * np.arange(1, count + 1)[:, None, None, None]
    )


def rotation(count: int) -> np.ndarray:
    return np.linalg.qr(generator(0, "turns of tests", count).standard_normal((count, count)))[0]


def gram_and_cross() -> tuple[np.ndarray, np.ndarray]:
    """An image of a mean and two components, with contrast 1.2 and coordinates 0.5 and -1."""
    random = generator(1, "images of tests", 0)
    sliced = random.standard_normal((3, 60)) * np.array([[1.0], [0.3], [0.2]])
    image = np.array([1.2, 0.5, -1.0]) @ sliced + random.standard_normal(60)
    return sliced @ image, sliced @ sliced.T


@pytest.mark.parametrize("contrast_sd", [0.3, 0.05])
def test_coordinates_are_the_moments_of_the_posterior(contrast_sd: float) -> None:
    cross, gram = gram_and_cross()
    found = steps.coordinates(cross[None], gram[None], contrast_sd)
    c = np.linspace(-1, 1.5, 121)
    z = np.linspace(-6, 6, 121)
    x = np.stack(np.meshgrid(1 + c, z, z, indexing="ij"), axis=-1).reshape(-1, 3)
    log = x @ cross - np.einsum("nk,kl,nl->n", x, gram, x) / 2
    log -= (x[:, 0] - 1) ** 2 / (2 * contrast_sd**2) + (x[:, 1:] ** 2).sum(axis=1) / 2
    weight = np.exp(log - log.max())
    x[:, 0] -= 1
    mean = np.average(x, axis=0, weights=weight)
    np.testing.assert_allclose(found.mean[0], mean, atol=2e-3)
    np.testing.assert_allclose(found.covariance[0], np.cov(x.T, aweights=weight, ddof=0), atol=2e-3)
    # And the likelihood that they add, against that of the mean alone.
    cell = (c[1] - c[0]) * (z[1] - z[0]) ** 2 / (contrast_sd * (2 * np.pi) ** 1.5)
    alone = cross[0] - gram[0, 0] / 2
    assert found.gain[0] == pytest.approx(np.log(np.exp(log - alone).sum() * cell), abs=2e-3)


def test_contrasts_that_do_not_vary_are_one() -> None:
    cross, gram = gram_and_cross()
    found = steps.coordinates(cross[None], gram[None], 0.0)
    first, second = steps.moments(found)
    assert first[0, 0] == 1 and second[0, 0, 0] == 1
    np.testing.assert_allclose(second[0, 1:, 0], first[0, 1:])
    precision = np.eye(2) + gram[1:, 1:]
    np.testing.assert_allclose(found.mean[0, 1:], np.linalg.solve(precision, cross[1:] - gram[1:, 0]))


def test_an_image_that_is_not_finite_is_not_usable() -> None:
    cross, gram = gram_and_cross()
    both = steps.coordinates(np.stack([cross, np.full(3, np.nan)]), np.stack([gram, gram]), 0.3)
    assert both.usable.tolist() == [True, False]
    np.testing.assert_array_equal(both.mean[0], steps.coordinates(cross[None], gram[None], 0.3).mean[0])


def test_expanded_is_the_same_model_with_coordinates_of_unit_covariance() -> None:
    volumes, random = loadings(3), generator(2, "coordinates of tests", 0)
    z = random.standard_normal((500, 3)) @ random.standard_normal((3, 3)) + np.array([0.1, 2.0, -1.0])
    found = steps.Found(z, np.zeros((500, 3, 3)), np.zeros(500), np.ones(500, dtype=bool))
    made, contrast_sd = steps.expanded(volumes, steps.spread(found))
    covariance = np.cov(z.T, ddof=0)
    flat, after = volumes[1:].reshape(2, -1), made[1:].reshape(2, -1)
    np.testing.assert_allclose(after.T @ after, flat.T @ covariance[1:, 1:] @ flat, rtol=1e-3, atol=1e-2)
    mean = z.mean(axis=0)
    np.testing.assert_allclose(made[0], (1 + mean[0]) * volumes[0] + np.tensordot(mean[1:], volumes[1:], 1), rtol=1e-3,
                               atol=1e-3)  # fmt: skip
    assert contrast_sd == pytest.approx(np.sqrt(covariance[0, 0]) / (1 + mean[0]))


def test_loadings_that_are_turned_are_found_to_be_the_same() -> None:
    first = loadings(3)
    second = np.tensordot(rotation(3), first, 1).astype(np.float32)
    assert steps.settled(first, second) == pytest.approx(1)
    paired = steps.canonical(first, second)
    np.testing.assert_allclose(paired.first, paired.second, atol=1e-4 * np.abs(first).max())
    np.testing.assert_allclose(paired.cosine, 1, atol=1e-5)
    np.testing.assert_allclose(paired.angles, 1, atol=1e-5)


def test_of_what_two_halves_have_in_common_the_pairs_tell() -> None:
    first, second = loadings(2), loadings(2, stream=1)
    second[0] = 3 * first[1]
    paired = steps.canonical(first, second)
    assert paired.cosine[0] > 0.95 and abs(paired.cosine[1]) < 0.2
    assert paired.angles[0] == pytest.approx(1, abs=1e-5) and paired.angles[1] < 0.2
    assert steps.settled(first, loadings(2, stream=2)) < 0.2


def test_principal_components() -> None:
    made = steps.principal(loadings(3))
    flat = made.volumes.reshape(3, -1).astype(np.float64)
    np.testing.assert_allclose(flat @ flat.T, np.eye(3), atol=1e-5)
    assert (np.diff(made.sd) < 0).all() and (np.sum(flat**3, axis=1) > 0).all()
    z = np.array([0.3, -1.0, 2.0])
    np.testing.assert_allclose(np.tensordot(made.turn @ z, made.volumes, 1), np.tensordot(z, loadings(3), 1), atol=1e-3)
    np.testing.assert_allclose(made.share.sum(axis=1), 1)
    # Of any turn of the loadings they are the same, signs included.
    again = steps.principal(np.tensordot(rotation(3), loadings(3), 1))
    np.testing.assert_allclose(again.volumes, made.volumes, atol=1e-4)


def test_a_volume_in_another_box_keeps_its_coefficients() -> None:
    volume = steps.band(loadings(1)[0], 0, 4)
    larger = steps.in_box(volume, 20)
    here, there = fft.rfftn(volume), fft.rfftn(larger)
    np.testing.assert_allclose(there[:4, :4, :4], here[:4, :4, :4], atol=1e-3)
    np.testing.assert_allclose(steps.in_box(larger, BOX), volume, atol=1e-5)


def test_a_band_has_its_shells_and_no_others() -> None:
    volume = loadings(1)[0]
    before, after = fft.rfftn(volume), fft.rfftn(steps.band(volume, 2, 4))
    shells = volume_shells(BOX)
    inside = (shells >= 2) & (shells <= 4)
    np.testing.assert_allclose(after[inside], before[inside], atol=1e-3)
    assert np.abs(after[~inside]).max() < 1e-3
