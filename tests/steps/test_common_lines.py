import numpy as np
import pytest
from averages import BOX, DIAMETER_PX, PIXEL_A, compared, in_frame_of, projections, views

from dcryo.kernels import fft, fsc
from dcryo.kernels.masks import circle, sphere
from dcryo.kernels.randomness import generator
from dcryo.kernels.symmetry import operators
from dcryo.steps.common_lines import common_lines_model, matched_shell

DIAMETER_A, SHELL = DIAMETER_PX * PIXEL_A, 8


def model_of(images, weights=None, seed=0):
    weights = np.ones(len(images)) if weights is None else weights
    return common_lines_model(images, weights, PIXEL_A, DIAMETER_A, SHELL, generator(seed, "model", 0))


def off_centre(count):
    return generator(0, "origins", 0).normal(0, 0.5, (count, 2))


@pytest.mark.parametrize(("symmetry", "count"), [("C1", 30), ("C1", 20), ("C4", 24), ("D2", 24)])
def test_a_model_of_noisy_averages_that_are_off_centre(symmetry, count):
    true, origins = views(count), off_centre(count)
    model = model_of(projections(symmetry, true, origins, noise=0.4))
    group = operators(symmetry)
    errors, to_true = compared(model.rotation, true, group)
    assert np.median(errors) < 5
    assert model.consistency > 0.7
    # What is left of the shifts is one of the whole map.
    nearest = true @ group[:, None]
    turned = model.rotation if np.linalg.det(to_true) > 0 else model.rotation @ np.diag([1.0, 1.0, -1.0])
    mates = np.argmax(np.einsum("gkij,kij->gk", nearest[..., :2, :], turned[:, :2] @ to_true.T), axis=0)
    planes = nearest[mates, np.arange(count), :2].reshape(-1, 3)
    apart = (origins - model.origin_px).ravel()
    centre = np.linalg.lstsq(planes, apart, rcond=None)[0]
    assert np.median(np.abs(apart - planes @ centre)) < 0.4
    truth = in_frame_of(symmetry, to_true, centre) * sphere(BOX, DIAMETER_PX, 3)
    resolution = fsc.resolution_at(fsc.shell_correlation(model.volume, truth), 0.5, BOX, PIXEL_A)
    assert resolution < 1.25 * BOX * PIXEL_A / SHELL


def test_averages_of_something_else_are_not_relied_upon_and_weigh_little():
    count, junk = 30, 5
    true = views(count)
    images = projections("C1", true, off_centre(count), noise=0.3)
    images[:junk] = projections("D2", views(junk, seed=9), noise=0.3)
    model = model_of(images)
    assert np.median(compared(model.rotation[junk:], true[junk:], operators("C1"))[0]) < 6
    assert model.reliability[:junk].max() < np.median(model.reliability[junk:])
    assert np.mean(model.reliability[:junk]) < 0.8 * np.mean(model.reliability[junk:])


def test_noise_gives_no_consistent_model():
    """Noise with the spectrum and outline of averages."""
    count = 24
    images = projections("C1", views(count))
    amplitude = np.sqrt(np.mean(np.abs(fft.rfft2(images)) ** 2, axis=0)) / BOX
    white = generator(0, "white", 0).standard_normal(images.shape).astype(np.float32)
    noise = fft.irfft2(fft.rfft2(white) * amplitude, BOX) * circle(BOX, DIAMETER_PX, 3)
    assert model_of(noise).consistency < 0.6 * model_of(images).consistency


def test_the_same_random_numbers_give_the_same_bits():
    images = projections("C1", views(10), noise=0.3)
    one, two, other = model_of(images), model_of(images), model_of(images, seed=1)
    for first, second in zip(one, two, strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(one.rotation, other.rotation)


def test_an_average_without_weight_is_refused():
    weights = np.ones(12)
    weights[4] = 0
    with pytest.raises(ValueError, match="average 4 has weight 0"):
        model_of(projections("C1", views(12)), weights)


def test_three_averages_are_refused():
    with pytest.raises(ValueError, match="at least four"):
        model_of(projections("C1", views(3)))


def test_detail_and_the_step_of_a_grid_fit():
    """A step of 14.7 degrees moves the edge of a particle of 190 A by 24.3 A."""
    assert matched_shell(2, 190.0, 64, 3.54) == 9
    assert matched_shell(3, 190.0, 64, 3.54) == 18
