import naive
import numpy as np
import pytest

from dcryo.kernels import fft, fsc, slices, solve
from dcryo.kernels.alignment import turned_sum
from dcryo.kernels.gridding import padded_px
from dcryo.kernels.masks import sphere
from dcryo.kernels.symmetry import operators
from dcryo.steps import maximisation
from dcryo.steps.maximisation import HalfFsc

BOX, SHELL = 16, 6
IDENTITY = operators("C1")
CORNERS = sphere(BOX, BOX, 3.0)  # they are blank in a map


def noise(*shape, seed=0):
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


def envelope():
    along = slices.gridding_correction(BOX)
    along /= along[BOX // 2]
    return along[:, None, None] * along[:, None] * along


def accumulator_of(volume, weight):
    """Sums of slices that touch each voxel with the same weight, and hold the volume."""
    held = np.zeros((*slices.volume_shape(SHELL, BOX), 3), dtype=np.float32)
    width = slices.half_width(SHELL, BOX)
    transform = fft.padded_transform(volume * envelope(), padded_px(BOX), width)
    parts = weight * transform.real, weight * transform.imag, np.full(transform.shape, weight)
    held[:, :, slices.BEFORE :] = np.stack(parts, axis=-1)
    return held


def filtered(volume, filter_of_shell):
    """The volume times a function of the shell, in its padded box."""
    padded = padded_px(BOX)
    radius = np.sqrt(sum(k**2 for k in np.meshgrid(*[np.fft.fftfreq(padded, 1 / padded)] * 3)))
    shells = np.floor(radius * BOX / padded + 0.5).astype(int)
    gain = np.where(shells <= SHELL, np.append(filter_of_shell, 0)[np.minimum(shells, SHELL + 1)], 0)
    transform = naive.full_transform(naive.embedded(volume * envelope(), padded)) * gain
    first = padded // 2 - BOX // 2
    return np.fft.fftshift(np.fft.ifftn(transform).real)[(slice(first, first + BOX),) * 3] / envelope() * CORNERS


def stepped(reference, volume, filter_of_shell):
    """What a step from a reference ends at: what it holds past the last shell, and the filtered map."""
    return CORNERS * reference - filtered(reference, np.ones(SHELL + 1)) + filtered(volume, filter_of_shell)


FIRST, SECOND = noise(BOX, BOX, BOX), noise(BOX, BOX, BOX, seed=1)
REFERENCES = 0.7 * noise(BOX, BOX, BOX, seed=5), 0.7 * noise(BOX, BOX, BOX, seed=6)
# What an FSC may look like, under the mask; without it another, which no prior may be taken from.
CURVE = np.array([1, 0.99, 0.9, 0.7, 0.5, 0.2, -0.1, 0.4, 0.3])
HALVES = HalfFsc(unmasked=np.full(9, 0.05), masked=CURVE)
OF_HALF = np.clip(CURVE[: SHELL + 1], 1e-3, 0.999)
OF_BOTH = np.clip(2 * np.clip(CURVE, 0, None) / (1 + np.clip(CURVE, 0, None)), 1e-3, 0.999)[: SHELL + 1]


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", ["C1", "D2"])
def test_assembled_slabs_are_the_whole(name):
    whole = noise(*slices.volume_shape(SHELL, BOX), 3, seed=2)
    slabs = np.split(whole, [3, 4, 11])
    np.testing.assert_array_equal(maximisation.assemble(slabs, operators(name)), solve.complete(whole, operators(name)))


@pytest.mark.parametrize("weight", [0.01, 700.0])
def test_plain_map_is_not_filtered_and_on_the_scale_of_the_images(weight):
    # A thousandth of the mean weight is added, so that no voxel is divided by almost nothing.
    found = maximisation.plain_map(accumulator_of(FIRST, weight), None, IDENTITY, SHELL, BOX)
    close(found, filtered(FIRST, np.ones(SHELL + 1)), 1.5e-3)
    innovations = accumulator_of(FIRST - REFERENCES[0], weight)
    found = maximisation.plain_map(innovations, REFERENCES[0], IDENTITY, SHELL, BOX)
    close(found, stepped(REFERENCES[0], FIRST, np.ones(SHELL + 1)), 1.5e-3)


def test_regularised_map_is_filtered_by_the_masked_fsc():
    """With even weights the Wiener filter of a prior from the FSC is the FSC, from whatever reference."""
    found = maximisation.regularised_map(accumulator_of(FIRST, 3.0), None, HALVES, IDENTITY, SHELL, BOX)
    close(found, filtered(FIRST, OF_HALF))
    innovations = accumulator_of(FIRST - REFERENCES[0], 3.0)
    found = maximisation.regularised_map(innovations, REFERENCES[0], HALVES, IDENTITY, SHELL, BOX)
    close(found, stepped(REFERENCES[0], FIRST, OF_HALF))


def test_merged_map_is_filtered_by_the_fsc_of_all_particles():
    """The mean of the halves, weighted by their weights, times 2 FSC / (1 + FSC)."""
    first, second = accumulator_of(FIRST, 3.0), accumulator_of(SECOND, 1.0)
    found = maximisation.merged_map(first, second, None, HALVES, IDENTITY, SHELL, BOX)
    close(found, filtered((3 * FIRST + SECOND) / 4, OF_BOTH))


def test_merged_map_takes_each_half_from_its_own_reference():
    """The halves step from other maps, and yet end at that of their images; past the last shell at their mean."""
    first, second = accumulator_of(FIRST - REFERENCES[0], 3.0), accumulator_of(SECOND - REFERENCES[1], 1.0)
    kept = first.copy(), second.copy(), *(reference.copy() for reference in REFERENCES)
    found = maximisation.merged_map(first, second, REFERENCES, HALVES, IDENTITY, SHELL, BOX)
    close(found, stepped((REFERENCES[0] + REFERENCES[1]) / 2, (3 * FIRST + SECOND) / 4, OF_BOTH))
    for given, before in zip((first, second, *REFERENCES), kept, strict=True):
        np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("name", ["C1", "D3"])
def test_maps_are_those_of_the_group(name):
    """Each function hands the operators on: their envelopes differ."""
    group, accumulator = operators(name), accumulator_of(FIRST, 3.0)
    weights = solve.mean_weights(accumulator, SHELL, BOX)

    def expected(precision, reference=None, of=accumulator):
        return solve.maximise(of, reference, precision, group, BOX)

    found = maximisation.plain_map(accumulator, REFERENCES[0], group, SHELL, BOX)
    np.testing.assert_array_equal(found, expected(solve.weight_floor(weights), REFERENCES[0]))
    found = maximisation.regularised_map(accumulator, REFERENCES[0], HALVES, group, SHELL, BOX)
    precision = solve.prior_precision(CURVE[: SHELL + 1], weights)
    np.testing.assert_array_equal(found, expected(precision, REFERENCES[0]))
    found = maximisation.merged_map(accumulator, accumulator, (SECOND, SECOND), HALVES, group, SHELL, BOX)
    np.testing.assert_array_equal(found, expected(solve.prior_precision(OF_BOTH, 2 * weights), SECOND, 2 * accumulator))


def test_first_map_is_masked_and_filtered_by_what_the_mask_tells_of_noise():
    mask = sphere(BOX, 6, 3)
    volume = 0.3 * FIRST + 2 * SECOND * mask
    found = maximisation.first_map(accumulator_of(volume, 5.0), mask, IDENTITY, SHELL)
    plain = filtered(volume, np.ones(SHELL + 1))
    outside = (1 - mask) * sphere(BOX, BOX, 0)
    noise_power = naive.shell_power(plain * outside) / np.sum(outside**2)
    share = np.clip(1 - noise_power / (naive.shell_power(plain * mask) / np.sum(mask**2)), 1e-3, 0.999)
    assert share[: SHELL + 1].max() - share[: SHELL + 1].min() > 0.01
    close(found, mask * filtered(volume, share[: SHELL + 1]), 2e-3)
    assert np.all(found[mask == 0] == 0)


def test_first_map_of_noise_is_all_but_empty():
    mask = sphere(BOX, 8, 3)
    found = maximisation.first_map(accumulator_of(FIRST, 5.0), mask, IDENTITY, SHELL)
    plain = maximisation.plain_map(accumulator_of(FIRST, 5.0), None, IDENTITY, SHELL, BOX)
    assert fsc.signal_share(plain, mask)[: SHELL + 1].min() == 0
    assert np.linalg.norm(found) < 0.4 * np.linalg.norm(mask * plain)


def test_half_fsc_is_taken_without_and_under_the_mask():
    mask = sphere(BOX, 8, 2)
    inside = FIRST * (mask > 0.5)
    first, second = inside + 0.3 * noise(BOX, BOX, BOX, seed=3), inside + 0.3 * noise(BOX, BOX, BOX, seed=4)
    found = maximisation.half_fsc(first, second, mask)
    np.testing.assert_allclose(found.unmasked, naive.shell_correlation(first, second), atol=1e-5)
    np.testing.assert_allclose(found.masked, naive.shell_correlation(first * mask, second * mask), atol=1e-5)
    assert found.masked[2:].mean() > found.unmasked[2:].mean() + 0.1


@pytest.mark.parametrize("name", ["C4", "C3"])
def test_relaxed_references_keep_what_subunits_have_in_common_and_filter_what_they_differ_by(name):
    box, group = 32, operators(name)
    mask = sphere(box, 22, 4.0)
    rng = np.random.Generator(np.random.Philox(4))
    centres = rng.uniform(-5, 5, (6, 3))
    common = naive.blob_volume(np.concatenate([centres @ g.T for g in group]), np.full(6 * len(group), 30.0), 1.5, box)
    odd = naive.blob_volume(centres[:1] + np.array([1, 2, 3]), np.array([40.0]), 2.0, box)
    halves = [common + odd + level * noise(box, box, box, seed=seed) for seed, level in ((2, 0.1), (3, 0.1))]
    found = maximisation.relaxed([common, common], halves, mask, group).references
    true = odd_part(common + odd, group)
    for half, reference in zip(halves, found, strict=True):
        kept, before = (odd_part(volume, group) * mask for volume in (reference, half))
        wanted = true * mask
        # What they differ by is nearer to the truth than it was in the half map.
        assert np.sum((kept - wanted) ** 2) < 0.3 * np.sum((before - wanted) ** 2)
        assert np.vdot(kept, wanted) / np.vdot(wanted, wanted) == pytest.approx(0.9, abs=0.15)
        # What they have in common comes from the regularised map, not from the half.
        shared = (reference - odd_part(reference, group)) * mask
        assert np.sum((shared - common * mask) ** 2) < 0.01 * np.sum((common * mask) ** 2)


def test_relaxed_references_of_halves_that_differ_in_noise_alone_are_symmetric():
    box, group = 32, operators("C4")
    halves = [noise(box, box, box, seed=seed) for seed in (5, 6)]
    blank = np.zeros((box,) * 3, dtype=np.float32)
    for half, reference in zip(
        halves, maximisation.relaxed([blank, blank], halves, sphere(box, 24, 4.0), group).references, strict=True
    ):
        assert np.sum(reference**2) < 0.02 * np.sum(half**2)


def odd_part(volume, group):
    """A map less the mean of its symmetry mates."""
    return turned_sum(volume, np.eye(3)[None], np.zeros(3)) - turned_sum(volume, group, np.zeros(3)) / len(group)


def test_the_second_half_is_turned_to_where_its_odd_subunit_is_that_of_the_first():
    box, group = 32, operators("D2")
    mask = sphere(box, 24, 4.0)
    common = naive.blob_volume(
        np.concatenate([np.array([[5.0, 3, 2]]) @ g.T for g in group]), np.full(4, 30.0), 1.5, box
    )
    for turn in group:
        places = [np.array([[6.0, 2, -3]]), np.array([[6.0, 2, -3]]) @ turn]
        halves = [
            common + naive.blob_volume(place, np.array([40.0]), 1.5, box) + 0.05 * noise(box, box, box, seed=seed)
            for seed, place in enumerate(places)
        ]
        found = maximisation.relaxed([common, common], halves, mask, group)
        np.testing.assert_allclose(found.turn, turn, atol=1e-9)
        first, second = (odd_part(reference, group) * mask for reference in found.references)
        assert np.vdot(first, second) > 0.9 * np.linalg.norm(first) * np.linalg.norm(second)
