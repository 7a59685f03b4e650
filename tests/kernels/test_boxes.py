import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcryo.kernels import boxes, fft
from dcryo.kernels.filters import rescale_images


def noise(*shape, seed=1):
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


def naive_crop(micrograph, centre, box):
    """A box, pixel by pixel, the nearest pixel of the micrograph where there is none."""
    ny, nx = micrograph.shape
    out = np.empty((box, box), np.float32)
    for y in range(box):
        for x in range(box):
            at_x, at_y = centre[0] - box // 2 + x, centre[1] - box // 2 + y
            out[y, x] = micrograph[min(max(at_y, 0), ny - 1), min(max(at_x, 0), nx - 1)]
    return out


def naive_background(box, radius):
    """Pixels farther than the radius from the box centre."""
    return np.array([[np.hypot(x - box // 2, y - box // 2) > radius + 1e-9 for x in range(box)] for y in range(box)])


def naive_normalised(image, radius):
    """Least squares by the book, in float64."""
    outside = naive_background(len(image), radius)
    y, x = np.indices(image.shape)
    design = np.stack([np.ones_like(x), x, y], axis=-1).astype(float)
    plane = np.linalg.lstsq(design[outside], image[outside].astype(float), rcond=None)[0]
    flat = image - design @ plane
    return (flat - flat[outside].mean()) / flat[outside].std()


def normalised(images, radius, white=None, black=None, identity=None):
    images = images.copy()
    usable = boxes.normalise(images, radius, white, black, np.arange(len(images)) if identity is None else identity)
    return images, usable


@settings(max_examples=40, deadline=None)
@given(x=st.integers(-12, 40), y=st.integers(-12, 30), box=st.integers(1, 17))
def test_crops_are_those_of_the_twin_also_beyond_the_edge(x, y, box):
    micrograph = noise(23, 31)
    made = boxes.crop(micrograph, np.array([[x, y], [5, 7]]), box)
    np.testing.assert_array_equal(made[0], naive_crop(micrograph, (x, y), box))
    np.testing.assert_array_equal(made[1], naive_crop(micrograph, (5, 7), box))
    whole = x >= box // 2 and y >= box // 2 and x - box // 2 + box <= 31 and y - box // 2 + box <= 23
    assert boxes.contained(np.array([[x, y]]), box, micrograph.shape)[0] == whole


def test_the_fraction_of_a_coordinate_is_cut_off():
    coordinates = np.array([[10.0, 10.49], [10.5, 10.99], [-0.4, 3.0]])
    np.testing.assert_array_equal(boxes.centres(coordinates), [[10, 10], [10, 10], [0, 3]])


@pytest.mark.parametrize("box", [16, 17])
@pytest.mark.parametrize("radius", [0.0, 5.0, 6.3, 8.0, 10.0])
def test_normalised_backgrounds_are_those_of_the_twin(box, radius):
    y, x = np.indices((box, box))
    images = 3.0 * noise(4, box, box) + 100.0 + (0.5 * x - 0.8 * y).astype(np.float32)
    made, usable = normalised(images, radius)
    assert usable.all()
    for image, before in zip(made, images, strict=True):
        np.testing.assert_allclose(image, naive_normalised(before, radius), rtol=2e-5, atol=1e-5)


def test_a_radius_that_is_whole_but_for_its_last_digits_is_whole():
    images = noise(2, 32, 32)
    np.testing.assert_array_equal(normalised(images, 10.0)[0], normalised(images, 10.0 - 1e-12)[0])
    assert not np.array_equal(normalised(images, 10.0)[0], normalised(images, 9.9)[0])


@pytest.mark.parametrize("radius", [4.0, 100.0])
def test_what_has_no_background_to_measure_is_told_and_left_as_it_is(radius):
    images = noise(3, 16, 16)
    images[1] = 7.0
    images[2, 0, 0] = np.nan
    made, usable = normalised(images, radius)
    assert usable.tolist() == ([True, False, False] if radius == 4.0 else [False] * 3)
    assert np.isfinite(made[0]).all()


@pytest.mark.parametrize(("white", "black"), [(5.0, None), (None, 5.0), (5.0, 5.0)])
def test_dust_is_replaced_by_noise_before_the_plane_is_fitted(white, black):
    y, x = np.indices((32, 32))
    images = noise(3, 32, 32) + 0.02 * (x - 2 * y).astype(np.float32)
    images[0, 3, 4], images[0, 16, 16], images[1, 20, 20] = 40.0, 30.0, -40.0
    made, _ = normalised(images, 10.0, white, black)
    outside = naive_background(32, 10.0)
    for image, before in zip(made, images, strict=True):
        mean, deviation = before[outside].mean(), before[outside].std()
        high = np.inf if white is None else mean + white * deviation
        low = -np.inf if black is None else mean - black * deviation
        dust = (before > high) | (before < low)
        # The noise is the kernel's own: put in its place, the twin has to come to the same image.
        y, x = np.indices(before.shape)
        design = np.stack([before, np.ones_like(x), x, y], axis=-1).astype(float)
        fit = np.linalg.lstsq(design[~dust], image[~dust].astype(float), rcond=None)[0]
        np.testing.assert_allclose(image[~dust], design[~dust] @ fit, atol=2e-5)
        cleaned = before.astype(float)
        cleaned[dust] = (image[dust] - design[dust][:, 1:] @ fit[1:]) / fit[0]
        assert np.abs(cleaned[dust] - mean).max(initial=0) < 4.5 * deviation
        np.testing.assert_allclose(image, naive_normalised(cleaned, 10.0), atol=1e-4)
    assert (made[0].max() > 20) == (white is None) and (made[1].min() < -20) == (black is None)
    np.testing.assert_array_equal(made[2], normalised(images, 10.0)[0][2])


def test_the_noise_in_place_of_dust_is_keyed_by_the_particle():
    images = noise(4, 16, 16)
    images[:, 8, 8] = 50.0
    images[:] = images[0]
    identity = np.array([7, 8, 7, 2**64 - 1], np.uint64)
    made, _ = normalised(images, 5.0, 6.0, None, identity)
    np.testing.assert_array_equal(made[0], made[2])
    assert len({float(value) for value in made[[0, 1, 3], 8, 8]}) == 3
    np.testing.assert_array_equal(normalised(images[1:], 5.0, 6.0, None, identity[1:])[0], made[1:])


def naive_rescaled(image, size):
    """A sum of the waves that are kept, one by one, at every pixel; about the box centre."""
    box = len(image)
    place = np.arange(box) - box // 2
    y, x = np.meshgrid(place, place, indexing="ij")
    new = (np.arange(size) - size // 2) * box / size
    new_y, new_x = np.meshgrid(new, new, indexing="ij")
    out = np.zeros((size, size))
    half = (size - 1) // 2
    waves = {(kx, ky): 1.0 for kx in range(-half, half + 1) for ky in range(-half, half + 1)}
    if size % 2 == 0:
        nyquist = size // 2
        for k in range(-half, half + 1):
            waves |= {(k, nyquist if k > 0 else -nyquist): 1.0} if k else {(0, nyquist): 0.5, (0, -nyquist): 0.5}
            # On the sampled grid a wave at +Nyquist along x is that at -Nyquist: half of each is its real part.
            waves |= {(nyquist, k): 0.5, (-nyquist, k): 0.5}
        waves |= {(nyquist, nyquist): 0.5, (-nyquist, -nyquist): 0.5}
    for (kx, ky), weight in waves.items():
        value = np.sum(image * np.exp(-2j * np.pi * (kx * x + ky * y) / box)) / box**2
        out += weight * (value * np.exp(2j * np.pi * (kx * new_x + ky * new_y) / box)).real
    return out


@pytest.mark.parametrize(("box", "size"), [(16, 8), (16, 12), (16, 9), (15, 8), (15, 9), (16, 10)])
def test_rescaled_images_are_those_of_the_twin(box, size):
    images = noise(2, box, box) + 3.0
    made, other = boxes.rescaled(images, (size, 7))
    np.testing.assert_allclose(other, boxes.rescaled(images, (7,))[0], atol=1e-6)
    for image, before in zip(made, images, strict=True):
        np.testing.assert_allclose(image, naive_rescaled(before.astype(float), size), atol=2e-5)


def test_noise_goes_on_to_nyquist_and_below_it_all_is_as_in_other_rescaling():
    images = noise(300, 32, 32)
    (made,) = boxes.rescaled(images, (16,))
    power = (np.abs(fft.rfft2(made)) ** 2).mean(axis=0)
    inside = power[1:8, 1:8].mean()
    assert power[8, 1:8].mean() == pytest.approx(inside, rel=0.15)
    assert power[1:8, 8].mean() == pytest.approx(inside / 2, rel=0.15)
    transforms = fft.rfft2(made)
    transforms[:, 8], transforms[:, :, 8] = 0, 0
    np.testing.assert_allclose(fft.irfft2(transforms, 16), rescale_images(images, 16), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 25), distance=st.floats(0.5, 6.0), ties=st.booleans(), seed=st.integers(0, 99))
def test_of_near_particles_the_better_stays(n, distance, ties, seed):
    random = np.random.Generator(np.random.Philox(seed))
    position, merit = random.uniform(0, 10, (n, 2)), random.standard_normal(n)
    if ties:
        merit = np.round(merit)
    kept = boxes.apart(position, merit, distance)
    expected = np.zeros(n, bool)
    for row in sorted(range(n), key=lambda row: (-merit[row], row)):
        near = [other for other in np.flatnonzero(expected) if np.hypot(*(position[row] - position[other])) < distance]
        expected[row] = not near
    np.testing.assert_array_equal(kept, expected)
