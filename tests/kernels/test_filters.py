import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcryo.kernels import fft
from dcryo.kernels.filters import crop_transform, lowpass, pad_or_crop, rescale_images, rescale_volume


def blob(box, dimensions, pixel, centre_A, sigma_A=6.0):
    """Gaussian in real space, its position in Angstrom from the box centre, (x, y[, z])."""
    axis = (np.arange(box) - box // 2) * pixel
    grids = np.meshgrid(*[axis] * dimensions, indexing="ij")
    squares = sum((grid - c) ** 2 for grid, c in zip(grids, centre_A[::-1], strict=True))
    return np.exp(-squares / (2 * sigma_A**2)).astype(np.float32)


@pytest.mark.parametrize(("old", "new"), [(48, 32), (48, 33), (49, 32), (49, 33), (32, 49), (33, 48)])
def test_rescaling_keeps_grey_values_and_the_place_of_the_centre(old, new):
    field_A = 96.0
    centre = (7.0, -5.0, 3.0)
    volume = rescale_volume(blob(old, 3, field_A / old, centre), new)
    np.testing.assert_allclose(volume, blob(new, 3, field_A / new, centre), atol=2e-4)
    images = np.stack([blob(old, 2, field_A / old, c) for c in ((7.0, -5.0), (0.0, 2.0))])
    expected = np.stack([blob(new, 2, field_A / new, c) for c in ((7.0, -5.0), (0.0, 2.0))])
    np.testing.assert_allclose(rescale_images(images, new), expected, atol=2e-4)


@settings(max_examples=30, deadline=None)
@given(small=st.integers(4, 20), extra=st.integers(0, 9), seed=st.integers(0, 99))
def test_going_up_and_down_again_loses_only_the_nyquist_frequency(small, extra, seed):
    images = np.random.Generator(np.random.Philox(seed)).standard_normal((2, small, small)).astype(np.float32)
    back = rescale_images(rescale_images(images, small + extra), small)
    transform = fft.rfft2(images)
    if small % 2 == 0 and extra:
        transform[:, small // 2, :] = transform[:, :, small // 2] = 0.0
    np.testing.assert_allclose(back, fft.irfft2(transform, small), atol=1e-5)


def test_cropped_transform_is_that_of_the_projection_of_the_cropped_volume():
    volume = blob(24, 3, 2.0, (3.0, -4.0, 5.0))
    cropped = crop_transform(fft.rfftn(volume), 24, 15, 3)
    central = crop_transform(fft.rfft2(volume.sum(axis=0)[None]), 24, 15, 2)[0]
    np.testing.assert_allclose(cropped[0], central, atol=1e-2)


@pytest.mark.parametrize("box", [32, 33])
def test_lowpass_keeps_below_halves_at_and_removes_above(box):
    pixel, width = 2.0, 4.0
    rng = np.random.Generator(np.random.Philox(1))
    volume = rng.standard_normal((box,) * 3).astype(np.float32)
    cutoff = 8
    before = fft.rfftn(volume)
    after = fft.rfftn(lowpass(volume, pixel, box * pixel / cutoff, width))
    ratio = np.abs(after) / np.abs(before)
    assert ratio[0, 0, 1 : cutoff - 2] == pytest.approx(1.0, abs=1e-3)
    assert ratio[0, 0, cutoff] == pytest.approx(0.5, abs=1e-3)
    assert ratio[0, cutoff, 0] == pytest.approx(0.5, abs=1e-3)
    assert ratio[0, 0, cutoff + 2 :] == pytest.approx(0.0, abs=1e-3)
    np.testing.assert_allclose(lowpass(volume, pixel, 0.1), volume, atol=1e-5)


def test_pad_and_crop_put_centre_on_centre():
    volume = np.zeros((5, 8, 3), dtype=np.float32)
    volume[2, 4, 1] = 1.0
    for box in (3, 4, 8, 9):
        placed = pad_or_crop(volume, box)
        assert placed.shape == (box,) * 3
        assert placed[box // 2, box // 2, box // 2] == 1.0 and placed.sum() == 1.0
    rng = np.random.Generator(np.random.Philox(2))
    cube = rng.standard_normal((7, 7, 7)).astype(np.float32)
    np.testing.assert_array_equal(pad_or_crop(pad_or_crop(cube, 12), 7), cube)
