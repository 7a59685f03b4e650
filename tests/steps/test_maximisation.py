import naive
import numpy as np
import pytest

from dcryo.kernels import fft, slices, solve
from dcryo.kernels.masks import sphere
from dcryo.kernels.symmetry import operators
from dcryo.steps import maximisation
from dcryo.steps.maximisation import HalfFsc

BOX, SHELL = 16, 6


def noise(*shape, seed=0):
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


def accumulator_of(volume, weight):
    """Sums of slices that touch each voxel with the same weight, and hold the volume."""
    envelope = slices.gridding_correction(BOX)
    spread = volume * envelope[:, None, None] * envelope[:, None] * envelope
    transform = fft.padded_transform(spread, 2 * BOX, slices.half_width(SHELL))
    return np.stack(
        [weight * transform.real, weight * transform.imag, np.full(transform.shape, weight)], axis=-1
    ).astype(np.float32)


def filtered(volume, filter_of_shell):
    """The volume times a function of the shell, in its padded box."""
    envelope = slices.gridding_correction(BOX)
    envelope = envelope[:, None, None] * envelope[:, None] * envelope
    radius = np.sqrt(sum(k**2 for k in np.meshgrid(*[np.fft.fftfreq(2 * BOX, 1 / (2 * BOX))] * 3)))
    shells = np.floor(radius / 2 + 0.5).astype(int)
    gain = np.where(shells <= SHELL, np.append(filter_of_shell, 0)[np.minimum(shells, SHELL + 1)], 0)
    transform = naive.full_transform(naive.embedded(volume * envelope, 2 * BOX)) * gain
    cropped = np.fft.fftshift(np.fft.ifftn(transform).real)[(slice(BOX // 2, BOX // 2 + BOX),) * 3] / envelope
    return cropped * sphere(BOX, BOX, 3.0)  # the corners are blank


FIRST, SECOND = noise(BOX, BOX, BOX), noise(BOX, BOX, BOX, seed=1)
# What an FSC may look like, under the mask; without it another, which no prior may be taken from.
CURVE = np.array([1, 0.99, 0.9, 0.7, 0.5, 0.2, -0.1, 0.4, 0.3])
HALVES = HalfFsc(unmasked=np.full(9, 0.05), masked=CURVE)


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", ["C1", "D2"])
def test_assembled_slabs_are_the_whole(name):
    whole = noise(*slices.volume_shape(SHELL), 3, seed=2)
    slabs = np.split(whole, [3, 4, 11])
    np.testing.assert_array_equal(maximisation.assemble(slabs, operators(name)), solve.complete(whole, operators(name)))


def test_plain_map_is_not_filtered_and_on_the_scale_of_the_images():
    for weight in (0.01, 700.0):
        found = maximisation.plain_map(accumulator_of(FIRST, weight), SHELL, BOX)
        # A thousandth of the mean weight is added, so that no voxel is divided by almost nothing.
        close(found, filtered(FIRST, np.ones(SHELL + 1)), 1.5e-3)


def test_regularised_map_is_filtered_by_the_masked_fsc():
    """With even weights the Wiener filter of a prior from the FSC is the FSC."""
    found = maximisation.regularised_map(accumulator_of(FIRST, 3.0), HALVES, SHELL, BOX)
    close(found, filtered(FIRST, np.clip(CURVE[: SHELL + 1], 1e-3, 0.999)))


def test_merged_map_is_filtered_by_the_fsc_of_all_particles():
    """The mean of the halves, weighted by their weights, times 2 FSC / (1 + FSC)."""
    found = maximisation.merged_map(accumulator_of(FIRST, 3.0), accumulator_of(SECOND, 1.0), HALVES, SHELL, BOX)
    half = np.clip(CURVE[: SHELL + 1], 0, None)
    close(found, filtered((3 * FIRST + SECOND) / 4, np.clip(2 * half / (1 + half), 1e-3, 0.999)))


def test_half_fsc_is_taken_without_and_under_the_mask():
    mask = sphere(BOX, 8, 2)
    inside = FIRST * (mask > 0.5)
    first, second = inside + 0.3 * noise(BOX, BOX, BOX, seed=3), inside + 0.3 * noise(BOX, BOX, BOX, seed=4)
    found = maximisation.half_fsc(first, second, mask)
    np.testing.assert_allclose(found.unmasked, naive.shell_correlation(first, second), atol=1e-5)
    np.testing.assert_allclose(found.masked, naive.shell_correlation(first * mask, second * mask), atol=1e-5)
    assert found.masked[2:].mean() > found.unmasked[2:].mean() + 0.1
