import naive
import numpy as np
import pytest

from dcryo.kernels import fft, fsc, slices, solve
from dcryo.kernels.masks import sphere
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.shells import half_plane
from dcryo.kernels.symmetry import operators

IDENTITY = operators("C1")


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def random_slices(count, shell_max, seed):
    rng, pixels = generator(seed), half_plane(shell_max)
    shape = (count, len(pixels.kx))
    values = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)
    return random_rotations(count, rng), values, rng.random(shape, dtype=np.float32), pixels


def inserted(rotations, values, weights, pixels):
    accumulator = np.zeros((*slices.volume_shape(pixels.shell_max), 3), dtype=np.float32)
    slices.insert(accumulator, rotations, values, weights, pixels)
    return accumulator


def radius_of_cube(half_width):
    wrapped = fft.wrapped_frequencies(half_width)
    return np.sqrt(wrapped[:, None, None] ** 2 + wrapped[:, None] ** 2 + wrapped[: half_width + 1] ** 2)


def test_friedel_mates_are_as_if_inserted():
    data = random_slices(5, 3, 1)
    accumulator = inserted(*data)
    kept = accumulator.copy()
    found = solve.complete(accumulator, IDENTITY)
    width = slices.half_width(3)
    full = naive.insert(width, *data, IDENTITY)[:, :, : width + 1]
    np.testing.assert_allclose(found[..., :2], full[..., :2], atol=1e-5)
    np.testing.assert_array_equal(accumulator, kept)


def test_weights_are_evened_in_two_rounds():
    data = random_slices(5, 3, 2)
    found = solve.complete(inserted(*data), IDENTITY)[..., 2]
    width = slices.half_width(3)
    expected = naive.evened(naive.insert(width, *data, IDENTITY)[..., 2])[:, :, : width + 1]
    inside = np.abs(fft.wrapped_frequencies(width)) < width - 1
    inside = np.ix_(inside, inside, inside[: width + 1])
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-5)
    assert np.abs(found - inserted(*data)[..., 2]).max() > 0.1


@pytest.mark.parametrize("name", ["C2", "C4", "D2", "D4", "O"])
def test_symmetry_mates_are_as_if_inserted(name):
    """Groups that take grid points onto grid points: exact."""
    group, data = operators(name), random_slices(2, 2, 3)
    found = solve.complete(inserted(*data), group)
    width = slices.half_width(2)
    full = naive.insert(width, *data, group)
    full[..., 2] = naive.evened(full[..., 2])
    full, radius = full[:, :, : width + 1], radius_of_cube(width)
    # Cells that reach out of the cube have no mates; a map ends half a shell before them.
    np.testing.assert_allclose(found[radius <= width - 1, :2], full[radius <= width - 1, :2], atol=3e-5)
    np.testing.assert_allclose(found[radius <= width - 4, 2], full[radius <= width - 4, 2], atol=3e-5)
    assert width - 1 == 2 * 2.5


class Blobs:
    """Exact slices of a smooth volume at many views; where modulated, with the weights of CTFs that change sign."""

    def __init__(self, box, count, seed=0, modulated=True):
        sigma = 0.7
        rng = generator(seed)
        self.box, self.pixels = box, half_plane(box // 2)
        self.centres, self.amplitudes = rng.uniform(-0.25, 0.25, (8, 3)) * box, rng.uniform(0.5, 2, 8)
        self.volume = fft.irfftn(naive.blob_transform(self.centres, self.amplitudes, sigma, box), box)
        self.rotations = random_rotations(count, rng)
        self.images = np.array(
            [
                naive.blob_slice(self.centres, self.amplitudes, sigma, rotation, np.zeros(2), self.pixels, box)
                for rotation in self.rotations
            ]
        )
        defocus = rng.uniform(0.5, 1.5, (count, 1))
        defocus *= modulated
        self.transfer = np.cos(defocus * (self.pixels.kx**2 + self.pixels.ky**2) / box).astype(np.float32)

    def accumulator(self, rotations=None):
        rotations = self.rotations if rotations is None else rotations
        values = (self.transfer**2 * self.images).astype(np.complex64)
        return inserted(rotations, values, self.transfer**2, self.pixels)


def compare(found, truth, shell):
    """FSC, and amplitude of the first over the second, per shell up to one."""
    a, b = fft.rfftn(found), fft.rfftn(truth)
    gain = []
    for s in range(shell + 1):
        own = fsc.volume_shells(len(truth)) == s
        gain.append(np.vdot(b[own], a[own]).real / np.vdot(b[own], b[own]).real)
    return fsc.shell_correlation(found, truth)[: shell + 1], np.array(gain)


@pytest.mark.parametrize(("box", "modulated"), [(32, False), (33, False), (32, True)])
def test_many_slices_give_the_map_back(box, modulated):
    blobs = Blobs(box, 1500, modulated=modulated)
    found = solve.divide(solve.complete(blobs.accumulator(), IDENTITY), np.zeros(box // 2 + 1), box)
    assert found.shape == (box,) * 3 and found.dtype == np.float32
    correlation, gain = compare(found, blobs.volume, box // 2 - 1)
    assert correlation.min() > (0.99 if modulated else 0.994)
    # Where the weights of neighbouring shells differ, as they do about zero frequency and about the zeros of the CTFs,
    # smooth weights are not those of the voxel.
    np.testing.assert_allclose(gain[2:], 1, atol=0.1 if modulated else 0.02)
    np.testing.assert_allclose(gain[:2], 1, atol=0.15)


def test_mates_off_the_grid_are_nearly_as_if_inserted():
    group, blobs = operators("C3"), Blobs(24, 700, seed=1)
    precision = np.zeros(13)
    found = solve.divide(solve.complete(blobs.accumulator(), group), precision, 24)
    explicit = sum(solve.complete(blobs.accumulator(blobs.rotations @ g), IDENTITY) for g in group)
    expected = solve.divide(explicit, precision, 24)
    correlation, gain = compare(found, expected, 11)
    assert correlation.min() > 0.985
    np.testing.assert_allclose(gain[1:], 1, atol=0.06)
    # Not the map of the views alone, which has no symmetry.
    alone = solve.divide(solve.complete(blobs.accumulator(), IDENTITY), precision, 24)
    assert compare(alone, expected, 11)[0][3:].max() < 0.9


def test_mean_weights_are_means_over_shells():
    accumulator = generator(4).random((*slices.volume_shape(4), 3), dtype=np.float32)
    shells = naive.shells_of_cube(slices.half_width(4))
    expected = [accumulator[..., 2][shells == shell].mean() for shell in range(5)]
    np.testing.assert_allclose(solve.mean_weights(accumulator, 4), expected, rtol=1e-5)


def test_prior_makes_the_filter_the_fsc():
    """At the mean weight the Wiener filter w / (w + 1 / tau^2) is SSNR / (SSNR + 1) = FSC."""
    weights = generator(5).uniform(0.1, 90, 7)
    fsc_of_halves = np.array([1.0, 0.999, 0.9, 0.5, 0.143, 0.01, -0.3])
    precision = solve.prior_precision(fsc_of_halves, weights)
    expected = np.clip(fsc_of_halves, 1e-3, 0.999)
    np.testing.assert_allclose(weights / (weights + precision), expected, rtol=1e-9)


def test_a_map_without_a_filter_is_hardly_damped():
    weights = generator(5).uniform(0.1, 90, 7)
    np.testing.assert_allclose(weights / (weights + solve.weight_floor(weights)), 1, atol=2e-3)


@pytest.mark.parametrize(("box", "shell_max"), [(8, 3), (8, 4), (9, 4)])
def test_divide_is_a_wiener_filter_of_the_padded_volume(box, shell_max):
    rng, width, padded = generator(6), slices.half_width(shell_max), 2 * box
    side = 2 * width + 1
    accumulator = np.empty((side, side, width + 1, 3), dtype=np.float32)
    cube = np.fft.rfftn(rng.standard_normal((side,) * 3))
    accumulator[..., 0], accumulator[..., 1] = cube.real, cube.imag
    weights = np.abs(np.fft.rfftn(rng.standard_normal((side,) * 3)))  # even, as those of slices
    accumulator[..., 2] = weights
    precision = rng.uniform(0, 50, shell_max + 1)
    full, shells = np.zeros((padded,) * 3, dtype=complex), naive.shells_of_cube(width)
    for z, y, x in np.ndindex(shells.shape):
        z, y = (i if i <= width else i - side for i in (z, y))
        if shells[z, y, x] <= shell_max and max(abs(z), abs(y), x) < box:
            value = cube[z, y, x] / (weights[z, y, x] + precision[shells[z, y, x]])
            full[z, y, x] = value
            full[-z, -y, -x] = np.conj(value)
    first = padded // 2 - box // 2
    expected = np.fft.fftshift(np.fft.ifftn(full).real)[(slice(first, first + box),) * 3]
    envelope = np.sinc((np.arange(box) - box // 2) / padded) ** 2
    expected /= envelope[:, None, None] * envelope[:, None] * envelope
    expected *= sphere(box, box, 3.0)  # the corners are blank
    found = solve.divide(accumulator, precision, box)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_voxels_that_nothing_touched_are_empty():
    accumulator = np.zeros((*slices.volume_shape(4), 3), dtype=np.float32)
    np.testing.assert_array_equal(solve.divide(accumulator, np.zeros(5), 8), np.zeros((8, 8, 8)))
    accumulator[1, 1, 1] = 6, 0, 3
    wave = solve.divide(accumulator, np.zeros(5), 8)
    assert np.isfinite(wave).all() and wave[4, 4, 4] == pytest.approx(2 * 2 / 16**3)


def test_precision_of_other_shells_is_refused():
    accumulator = np.zeros((*slices.volume_shape(4), 3), dtype=np.float32)
    for shells in (4, 6):
        with pytest.raises(ValueError, match="does not fit"):
            solve.divide(accumulator, np.ones(shells), 16)
