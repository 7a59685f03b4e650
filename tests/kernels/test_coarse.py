import naive_picking as naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcryo.kernels import coarse


def noise(shape, seed=0):
    return np.random.Generator(np.random.Philox(seed)).normal(0, 1, shape).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(ny=st.integers(3, 14), nx=st.integers(3, 14), less=st.integers(0, 9), seed=st.integers(0, 99))
def test_shrinking_is_the_fourier_series_on_a_coarser_grid(ny, nx, less, seed):
    image, shape = noise((ny, nx), seed), (max(2, ny - less), max(2, nx - less // 2))
    if shape == image.shape:
        np.testing.assert_array_equal(coarse.shrink(image, shape), image)
    else:
        np.testing.assert_allclose(coarse.shrink(image, shape), naive.shrunk(image, shape), atol=2e-5)


def test_what_is_at_a_pixel_stays_at_its_place():
    y, x = np.mgrid[:300, :420]
    image = np.exp(-((x - 123.4) ** 2 + (y - 201.7) ** 2) / (2 * 15.0**2)).astype(np.float32)
    small = coarse.shrink(image, (50, 64))
    y, x = np.mgrid[:50, :64]
    expected = np.exp(-((x * 420 / 64 - 123.4) ** 2 + (y * 300 / 50 - 201.7) ** 2) / (2 * 15.0**2))
    np.testing.assert_allclose(small, expected, atol=1e-4)


def test_a_finer_grid_is_refused():
    with pytest.raises(ValueError, match="cannot shrink"):
        coarse.shrink(noise((8, 8)), (9, 8))


@pytest.mark.parametrize("shape", [(4096, 4096), (3838, 3710), (5760, 4092), (1200, 1240)])
def test_coarse_shapes_are_quickly_transformed_and_near_what_was_asked(shape):
    for factor in (1.0, 2.3, 4.24, 7.7):
        for size, old in zip(coarse.coarse_shape(shape, factor), shape, strict=True):
            assert size <= old and 0.97 * factor < old / size < factor * 1.01
            assert factor == 1.0 or all(size % prime for prime in (13, 17, 19, 23, 29))
    assert coarse.coarse_shape(shape, 0.5) == shape


@pytest.mark.parametrize("shape", [(11, 16), (12, 9)])
def test_smoothing_is_a_gaussian_over_a_mirrored_image(shape):
    image = noise(shape)
    np.testing.assert_allclose(coarse.smooth(image, 1.7), naive.gaussian_mean(image, np.ones(shape), 1.7), atol=1e-4)


def test_a_local_mean_is_over_what_has_weight():
    image, weight = noise((13, 12)), (noise((13, 12), 1) > 0).astype(np.float32)
    weight[5, 5] = 0.3
    found = coarse.local_mean(weight, 1.9)(image)
    np.testing.assert_allclose(found, naive.gaussian_mean(image, weight, 1.9), atol=1e-3)
    changed = np.where(weight == 0, 1e3, image).astype(np.float32)
    np.testing.assert_array_equal(coarse.local_mean(weight, 1.9)(changed), found)


def test_the_response_of_an_even_kernel_correlates_with_it():
    r = np.hypot(*np.mgrid[-6:7, -6:7])
    kernel = (np.exp(-(r**2) / 6) * (1 - r / 3)).astype(np.float32)
    image = noise((17, 14))
    found = coarse.filtered(coarse.cosine_transform(image), coarse.kernel_response(kernel, image.shape))
    np.testing.assert_allclose(found, naive.correlation(image, kernel), atol=1e-4)
