import sys
from concurrent.futures import ThreadPoolExecutor

import naive
import numpy as np
import pytest

from dcryo.kernels import fft

BOXES = [7, 8, 15, 16]


def noise(*shape, seed=0):
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("box", BOXES)
def test_image_transforms_are_numpys_about_the_box_centre(box):
    images = noise(2, 3, box, box)
    kept = images.copy()
    found = fft.rfft2(images)
    assert found.shape == (2, 3, box, box // 2 + 1) and found.dtype == np.complex64
    np.testing.assert_allclose(found, np.fft.rfft2(np.fft.ifftshift(images, axes=(-2, -1))), atol=1e-4)
    np.testing.assert_array_equal(fft.rfft2(images[1, 2]), found[1, 2])
    back = fft.irfft2(found, box)
    assert back.shape == images.shape and back.dtype == np.float32
    np.testing.assert_allclose(back, images, atol=1e-5)
    np.testing.assert_array_equal(images, kept)


@pytest.mark.parametrize("box", BOXES)
def test_volume_transforms_are_numpys_about_the_box_centre(box):
    volume = noise(box, box, box)
    kept = volume.copy()
    found = fft.rfftn(volume)
    assert found.shape == (box, box, box // 2 + 1) and found.dtype == np.complex64
    np.testing.assert_allclose(found, np.fft.rfftn(np.fft.ifftshift(volume)), atol=1e-3)
    transform = found.copy()
    back = fft.irfftn(found, box)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, volume, atol=1e-5)
    # FFTW's inverse of real data eats its input.
    np.testing.assert_array_equal(found, transform)
    np.testing.assert_array_equal(volume, kept)


@pytest.mark.parametrize("box", [6, 7])
def test_transforms_are_the_sum_over_places_from_the_centre(box):
    image, volume = noise(box, box), noise(box, box, box)
    of_image, of_volume = fft.rfft2(image), fft.rfftn(volume)
    for kx, ky, kz in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (2, -1, 0), (1, 2, -2), (3, -2, 1)]:
        assert of_image[ky, kx] == pytest.approx(naive.fourier_sum(image, (kx, ky), box), abs=1e-4)
        assert of_volume[kz, ky, kx] == pytest.approx(naive.fourier_sum(volume, (kx, ky, kz), box), abs=1e-4)


@pytest.mark.parametrize("box", BOXES)
def test_a_point_at_the_box_centre_has_no_phase(box):
    volume = np.zeros((box,) * 3)
    volume[box // 2, box // 2, box // 2] = 1
    ones = np.ones((box, box, box // 2 + 1))
    np.testing.assert_allclose(fft.rfftn(volume), ones, atol=1e-6)
    np.testing.assert_allclose(fft.rfft2(volume), np.where(np.arange(box) == box // 2, 1, 0)[:, None, None] * ones,
                               atol=1e-6)  # fmt: skip
    np.testing.assert_allclose(fft.irfftn(ones, box), volume, atol=1e-6)
    np.testing.assert_allclose(fft.padded_transform(volume, 2 * box, 3), np.ones((7, 7, 4)), atol=1e-6)


@pytest.mark.parametrize("box", BOXES)
def test_transform_of_a_projection_is_the_central_plane(box):
    volume = noise(box, box, box)
    np.testing.assert_allclose(fft.rfft2(volume.sum(axis=0)), fft.rfftn(volume)[0], atol=1e-4)


def test_bits_are_the_same_from_every_thread_and_in_any_order():
    """Plans own their buffers: threads that shared one would mix their images."""
    images = noise(96, 96, 96)
    alone = fft.rfft2(images)
    back = fft.irfft2(alone, 96)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            np.testing.assert_array_equal(np.array(list(pool.map(fft.rfft2, images))), alone)
            inverse = list(pool.map(lambda transform: fft.irfft2(transform, 96), alone))
    finally:
        sys.setswitchinterval(interval)
    np.testing.assert_array_equal(np.array(inverse), back)
    np.testing.assert_array_equal(fft.rfft2(images[::-1])[::-1], alone)


PADDED = [
    (8, 10, 4),
    (8, 10, 7),
    (7, 10, 5),
    (8, 16, 5),
    (8, 16, 8),
    (8, 16, 10),
    (7, 14, 9),
    (7, 15, 7),
    (9, 18, 10),
    (6, 6, 5),
]


@pytest.mark.parametrize(("box", "padded", "half_width"), PADDED)
def test_padded_transform_is_that_of_the_padded_box(box, padded, half_width):
    volume = noise(box, box, box)
    found = fft.padded_transform(volume, padded, half_width)
    assert found.dtype == np.complex64
    # Past the Nyquist frequency a transform repeats itself.
    place = np.arange(-half_width, half_width + 1) % padded
    full = naive.full_transform(naive.embedded(volume, padded))
    np.testing.assert_allclose(found, full[np.ix_(place, place, place[half_width:])], atol=1e-3)
    for x, y, z in [(half_width, -half_width, half_width - 1), (0, 1, -2), (1, 0, 0)]:
        value = found[z + half_width, y + half_width, x]
        assert value == pytest.approx(naive.fourier_sum(volume, (x, y, z), padded), abs=1e-3)


@pytest.mark.parametrize(("box", "padded", "half_width"), PADDED)
def test_padded_inverse_is_the_middle_of_the_padded_volume(box, padded, half_width):
    whole = np.fft.fftshift(np.fft.fftn(noise(*(2 * half_width + 1,) * 3, seed=1)))
    cube = np.ascontiguousarray(whole[:, :, half_width:], dtype=np.complex64)
    kept = cube.copy()
    full = np.zeros((padded,) * 3, dtype=complex)
    inside = [k for k in range(-half_width, half_width + 1) if abs(k) < padded / 2]
    for z in inside:
        for y in inside:
            for x in inside:
                full[z, y, x] = whole[z + half_width, y + half_width, x + half_width]
    expected = np.fft.fftshift(np.fft.ifftn(full))
    assert np.abs(expected.imag).max() < 1e-6 * np.abs(expected.real).max()
    first = padded // 2 - box // 2
    expected = expected.real[(slice(first, first + box),) * 3]
    found = fft.padded_inverse(cube, padded, box)
    assert found.shape == (box,) * 3 and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(cube, kept)


@pytest.mark.parametrize(("box", "padded"), [(7, 15), (8, 17), (9, 9)])
def test_padded_round_trip_is_the_volume(box, padded):
    """An odd padded box has no Nyquist frequency, so nothing is lost."""
    volume = noise(box, box, box)
    for half_width in (padded // 2, padded // 2 + 2):
        back = fft.padded_inverse(fft.padded_transform(volume, padded, half_width), padded, box)
        np.testing.assert_allclose(back, volume, atol=1e-5)
