import numpy as np
import pytest

from dcryo.kernels import rings
from dcryo.kernels.masks import circle


def noise(count, box, diameter=None, seed=0):
    images = np.random.Generator(np.random.Philox(seed)).standard_normal((count, box, box)).astype(np.float32)
    return images * circle(box, diameter or 0.8 * box, 3)


def transform_at(image, kx, ky):
    """Fourier sum of an image about its centre, at any frequencies."""
    box = len(image)
    y, x = np.mgrid[:box, :box] - box // 2
    angle = np.multiply.outer(kx, x) + np.multiply.outer(ky, y)
    return np.sum(image * np.exp(-2j * np.pi * angle / box), axis=(-2, -1))


@pytest.mark.parametrize(("box", "shell_max"), [(16, 8), (17, 8), (32, 9), (31, 15)])
def test_samples_are_the_fourier_sum_of_the_image(box, shell_max):
    """Up to Nyquist, where the transform is read past the last column that is held."""
    images, of = noise(2, box, seed=box), rings.rings(box, shell_max, 0.8 * box)
    found = rings.sample(images, of)
    assert found.shape == (of.angles // 2, 2, shell_max + 1) and found.dtype == np.complex64
    expected = np.stack([transform_at(image, of.kx, of.ky) for image in images], axis=1)
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)
    for shell in range(shell_max + 1):
        assert np.linalg.norm((found - expected)[..., shell]) < 0.02 * np.linalg.norm(expected[..., shell])


@pytest.mark.parametrize("box", [32, 33])
def test_images_come_back_without_what_is_past_the_last_ring(box):
    images, of = noise(3, box, diameter=0.6 * box, seed=1), rings.rings(box, 10, 0.6 * box)
    found = rings.images_of(rings.sample(images, of), of)
    ky, kx = np.fft.fftfreq(box, 1 / box)[:, None], np.fft.rfftfreq(box, 1 / box)
    low = np.fft.irfft2(np.fft.rfft2(images) * (np.hypot(kx, ky) < 10.5), (box, box))
    inside = circle(box, 0.6 * box, 0) > 0
    for mine, theirs in zip(found[:, inside], low[:, inside], strict=True):
        assert np.corrcoef(mine, theirs)[0, 1] > 0.98
        assert mine.std() == pytest.approx(theirs.std(), rel=0.03)


def test_writing_is_the_adjoint_of_reading():
    """<sample(image), values> = <image, images_of(values)> but for the areas."""
    box = 24
    of = rings.rings(box, 12, box)
    rng = np.random.Generator(np.random.Philox(3))
    image = rng.standard_normal((1, box, box)).astype(np.float32)
    shape = (of.angles // 2, 1, 13)
    values = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)
    product = np.sum((rings.sample(image, of) * values.conj()).real * of.area)
    # The mate of every sample is written too, and an image is the mean over the plane.
    assert 2 * product / box**2 == pytest.approx(np.sum(image * rings.images_of(values, of)), rel=1e-3)


def test_areas_add_up_to_the_disc():
    of = rings.rings(64, 20, 64)
    assert of.angles * of.area.sum() == pytest.approx(np.pi * 20.5**2, rel=0.01)


@pytest.mark.parametrize("real", [False, True])
def test_series_are_sums_over_the_circle(real):
    of = rings.rings(32, 9, 26)
    rng = np.random.Generator(np.random.Philox(4))
    half = rng.standard_normal((of.angles // 2, 2, 10)).astype(np.float32)
    if not real:
        half = (half + 1j * rng.standard_normal(half.shape)).astype(np.complex64)
    whole = np.concatenate([half, half.conj()])
    order = np.arange(0, of.orders + 1, 2 if real else 1)
    angle = 2 * np.pi * np.arange(of.angles) / of.angles
    expected = np.tensordot(np.exp(-1j * np.outer(order, angle)), whole, 1)
    found = (rings.real_series if real else rings.series)(half, of, of.orders)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_samples_of_a_series_are_those_it_was_made_of():
    """Where the function has no orders but those that are kept."""
    of = rings.rings(48, 12, 30)
    sampled = rings.sample(noise(2, 48, diameter=16, seed=5), of)
    np.testing.assert_allclose(
        rings.samples(rings.series(sampled, of, of.orders), of), sampled, atol=2e-3 * np.abs(sampled).max()
    )
    angle = 2 * np.pi * np.arange(of.angles // 2) / of.angles
    smooth = (2 + np.cos(2 * angle) - 0.3 * np.sin(4 * angle)).astype(np.float32)[:, None] * np.ones(3, np.float32)
    np.testing.assert_allclose(rings.real_samples(rings.real_series(smooth, of, of.orders), of), smooth, atol=1e-5)


def test_a_turn_of_the_image_is_a_shift_along_the_rings():
    box = 33
    of = rings.rings(box, 8, 26)
    image = noise(1, box, seed=6)
    turned = np.rot90(image, axes=(1, 2), k=-1)  # from x towards y: rows are y, counted upwards
    found, before = rings.sample(turned, of)[:, 0], rings.sample(image, of)[:, 0]
    expected = np.roll(np.concatenate([before, before.conj()]), of.angles // 4, axis=0)[: of.angles // 2]
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(found).max())


@pytest.mark.parametrize(("first", "second"), [(6, 10), (10, 6)])
def test_series_move_to_other_rings_as_if_sampled_there(first, second):
    box = 32
    images = np.random.Generator(np.random.Philox(3)).standard_normal((3, box, box)) * circle(box, 12, 3)
    of, other = rings.rings(box, first, 12), rings.rings(box, second, 12)
    both = min(first, second) + 1
    # Orders that a small disc has below the last ring that both have; the others differ by what was cut off.
    orders = rings.orders_at(rings.rings(box, both - 1, 12), both - 1) - 2
    found = rings.moved_to(rings.series(rings.sample(images, of), of, of.orders), of, other)
    expected = rings.series(rings.sample(images, other), other, other.orders)
    assert found.shape == expected.shape and found.dtype == np.complex64
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found[:orders, :, :both], expected[:orders, :, :both], atol=2e-3 * scale)
    assert not found[:, :, both:].any()
    power = [np.abs(rings.sample(images, ring)).astype(np.float32) ** 2 for ring in (of, other)]
    found = rings.moved_to(rings.real_series(power[0], of, of.orders), of, other)
    expected = rings.real_series(power[1], other, other.orders)
    assert found.shape == expected.shape
    np.testing.assert_allclose(
        found[: orders // 2, :, :both], expected[: orders // 2, :, :both], atol=2e-3 * np.abs(expected).max()
    )
