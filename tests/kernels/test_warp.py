import numpy as np
import pytest
import scipy.ndimage

from dcryo.kernels import warp


def noise(shape, seed=1):
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


def smooth(shape, sigma=2.0):
    return scipy.ndimage.gaussian_filter(noise(shape), sigma, mode="wrap")


def coefficients_of(image):
    transform = np.fft.fft2(image)
    transform /= warp.spline_response(image.shape[0])[:, None] * warp.spline_response(image.shape[1])
    return np.fft.ifft2(transform).real.astype(np.float32)


def naive_warp(image, spatial, offset, corner, extent):
    """Solve for the point of each pixel until it stands still, then let scipy interpolate."""
    rows, columns = np.indices(image.shape).astype(float)
    px, py = columns + offset[0], rows + offset[1]
    for _ in range(20):
        x, y = (px - corner[0]) / extent[0] - 0.5, (py - corner[1]) / extent[1] - 0.5
        terms = np.stack([np.ones_like(x), x, x * x, y, y * y, x * y])
        px = columns + offset[0] + np.tensordot(spatial[0], terms, 1)
        py = rows + offset[1] + np.tensordot(spatial[1], terms, 1)
    return scipy.ndimage.map_coordinates(image.astype(float), [py, px], order=3, mode="grid-wrap")


@pytest.mark.parametrize("shape", [(48, 64), (63, 50)])
def test_splines_agree_with_scipy(shape):
    image = smooth(shape)
    spatial = 0.2 * np.array([[6.5, 2.0, -3.0, 0.5, 1.0, 4.0], [-2.0, 1.0, 2.0, -2.5, 3.0, -1.0]])
    corner, extent = (5.0, 4.0), (shape[1] - 10.0, shape[0] - 8.0)
    for offset in ((0.0, 0.0), (3.7, -11.2)):
        found = warp.warped(coefficients_of(image), spatial, offset, corner, extent)
        expected = naive_warp(image, spatial, offset, corner, extent)
        assert np.abs(found - expected).max() < 0.002 * image.std()


def test_without_motion_the_image_stays():
    image = noise((40, 36))
    found = warp.warped(coefficients_of(image), np.zeros((2, 6)), (0, 0), (4, 4), (28, 32))
    np.testing.assert_allclose(found, image, atol=2e-5)


def test_a_shift_brings_the_result_back():
    # By definition a point r lies at r - offset - s, so moving the result by offset + s gives the image again.
    image = noise((32, 48))
    spatial = np.zeros((2, 6))
    spatial[:, 0] = 2.0, -1.0
    found = warp.warped(coefficients_of(image), spatial, (3.0, 5.0), (0, 0), (48, 32))
    np.testing.assert_allclose(np.roll(found, (4, 5), axis=(0, 1)), image, atol=2e-5)
