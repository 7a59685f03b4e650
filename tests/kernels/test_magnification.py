"""Transforms of images off the grid against the sum that defines them."""

import numpy as np
import pytest
from naive import fourier_sum

from dcryo.kernels import fft
from dcryo.kernels.magnification import transforms_at
from dcryo.kernels.shells import half_plane, pack


@pytest.mark.parametrize("box", [16, 33, 48])
def test_transforms_are_the_sums_over_pixels(box: int) -> None:
    random = np.random.default_rng(box)
    images = random.normal(size=(2, box, box)).astype(np.float32)
    x, y = random.uniform(0, box / 2, 60), random.uniform(-box / 2, box / 2, 60)
    x[:4], y[:4] = (0, 0, box / 2, box / 2), (0, box / 2, box / 2, -box / 2)
    expected = [[fourier_sum(image, k, box) for k in zip(x, y, strict=True)] for image in images]
    # Noise up to Nyquist has a transform of root mean square D: what is wrong is a ten-thousandth of it.
    assert np.abs(transforms_at(images, x, y) - expected).max() < 1e-4 * box


def test_on_the_grid_they_are_the_discrete_transform() -> None:
    images = np.random.default_rng(1).normal(size=(3, 40, 40)).astype(np.float32)
    pixels = half_plane(20)
    found = transforms_at(images, pixels.kx, pixels.ky)
    np.testing.assert_allclose(found, pack(pixels, fft.rfft2(images)), atol=1e-4 * 40)
