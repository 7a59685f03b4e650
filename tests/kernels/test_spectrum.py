import naive_thon
import numpy as np
import pytest

from dcryo.kernels import spectrum


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(key=seed))
    return random.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize(("length", "tile"), [(512, 512), (513, 512), (1000, 128), (4096, 1024), (300, 299)])
def test_tiles_cover_an_axis_and_overlap_by_half(length: int, tile: int) -> None:
    starts = spectrum.tile_starts(length, tile)
    assert starts[0] == 0 and starts[-1] == length - tile
    assert (np.diff(starts) > 0).all() and (np.diff(starts) <= tile // 2 + 1).all()


@pytest.mark.parametrize("shape", [(150, 200), (97, 64), (64, 64)])
def test_tile_powers_are_those_of_each_tile_alone(shape: tuple[int, int]) -> None:
    image = 5.0 + noise(*shape)
    powers, centres = spectrum.tile_powers(image, 64, 20)
    assert powers.shape[1:] == (41, 21) and powers.dtype == np.float32
    for power, (x, y) in zip(powers, centres, strict=True):
        expected = naive_thon.tile_power(image, int(x - 32), int(y - 32), 64, 20)
        np.testing.assert_allclose(power, expected, rtol=2e-4, atol=1e-3 * expected.mean())
    assert len(np.unique(centres, axis=0)) == len(powers)


def test_pixels_of_a_spectrum_share_noise_as_is_said() -> None:
    powers, _ = spectrum.tile_powers(noise(1024, 1024), 128, 50)
    off = powers - powers.mean(axis=0)
    # The sum over a patch varies by so much more than the same number of independent pixels.
    patch = off[:, 10:90, 5:45]
    ratio = patch.sum(axis=(1, 2)).var() / (patch.var() * patch[0].size)
    assert ratio == pytest.approx(spectrum.LOOKS_PER_PIXEL, rel=0.25)


def test_a_gradient_leaves_little_beyond_the_first_samples() -> None:
    image = noise(512, 512)
    ramp = (20.0 * np.linspace(-1, 1, 512)[:, None] + np.zeros(512)).astype(np.float32)
    plain, _ = spectrum.tile_powers(image, 256, 60)
    leaning, _ = spectrum.tile_powers(image + ramp, 256, 60)
    kept = np.ones(len(plain), bool)
    plain, leaning = (spectrum.rings(spectrum.amplitude(powers, kept), 1)[0][8:, 0] for powers in (plain, leaning))
    np.testing.assert_allclose(leaning, plain, rtol=0.02)


def test_tiles_unlike_the_others_are_left_out() -> None:
    image = noise(1024, 1024)
    image[:256, :256] += 30.0 * (noise(256, 256, seed=1) > 2.0)
    image[-200:, -200:] = 0.0
    powers, centres = spectrum.tile_powers(image, 128, 50)
    kept = spectrum.alike(powers, 4.0)
    inside = (centres < 256 - 64).all(axis=1)
    blank = (centres > 1024 - 200 + 64).all(axis=1)
    clean = ((centres > 256 + 64).any(axis=1)) & (centres < 1024 - 200 - 64).any(axis=1)
    assert inside.any() and blank.any() and not kept[inside].any() and not kept[blank].any()
    assert kept[clean].mean() > 0.98


def test_nothing_is_kept_of_nothing() -> None:
    powers = np.zeros((5, 41, 21), np.float32)
    assert not spectrum.alike(powers, 4.0).any()
    powers[:3] = np.nan
    assert not spectrum.alike(powers, 4.0).any()


def test_amplitude_is_the_root_of_the_mean_power() -> None:
    powers = noise(5, 21, 11) ** 2
    kept = np.array([True, False, True, True, False])
    np.testing.assert_allclose(spectrum.amplitude(powers, kept), np.sqrt(powers[kept].mean(axis=0)), rtol=1e-5)


@pytest.mark.parametrize("side", [32, 33])
def test_a_half_and_its_whole(side: int) -> None:
    image = noise(side, side)
    centred = np.fft.fftshift(np.abs(np.fft.fft2(image))).astype(np.float32)
    half = spectrum.half_of(centred)
    inner = centred[1:, 1:] if side % 2 == 0 else centred
    np.testing.assert_allclose(spectrum.whole_of(half), inner, rtol=1e-4, atol=1e-3)


def test_rings_are_means_over_sectors() -> None:
    half = noise(61, 31)
    means, counts = spectrum.rings(half, 6)
    expected, expected_counts = naive_thon.ring_means(half, 6)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_allclose(means, expected, atol=1e-6)


def test_splines_add_up_to_one_and_are_smooth() -> None:
    basis = spectrum.splines(200, 20.0, 8)
    assert not basis[:20].any()
    np.testing.assert_allclose(basis[20:].sum(axis=1), 1.0)
    assert ((basis > 0).sum(axis=1) <= 4).all() and np.abs(np.diff(basis[20:], axis=0)).max() < 0.15


def test_a_baseline_follows_the_background_and_not_the_rings() -> None:
    radius = np.arange(1.0, 302.0)
    background = 3.0 + 200.0 / radius + 2.0 * np.exp(-((radius / 150.0) ** 2))
    rings = 1.0 + 0.1 * np.cos(2e-3 * radius**2)
    curve = spectrum.baseline(background * rings, radius, spectrum.splines(300, 15.0, 8))
    np.testing.assert_allclose(curve[20:], background[20:], rtol=0.06)
    np.testing.assert_array_equal(curve[:15], curve[15])


def test_a_flattened_spectrum_is_what_differs_from_its_baseline() -> None:
    ky, kx = np.mgrid[-40:41, 0:41]
    radius = np.hypot(kx, ky)
    curve = 10.0 - 0.2 * np.arange(41)
    half = ((10.0 - 0.2 * radius) * 1.25).astype(np.float32)
    half[50, 10] = 1e6
    flat = spectrum.flattened(half, curve, 4.0)
    assert flat[50, 10] == 4.0
    flat[50, 10] = 0.25
    np.testing.assert_allclose(flat[radius < 40], 0.25, atol=1e-5)
    assert not flat[radius > 41].any()
