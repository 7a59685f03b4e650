import naive
import numpy as np
import pytest

from dcryo.kernels import fft, fsc, slices, solve
from dcryo.kernels.gridding import envelope, padded_px
from dcryo.kernels.masks import sphere
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.shells import half_plane
from dcryo.kernels.symmetry import operators

IDENTITY = operators("C1")
# Twins weight taps with the kernel itself: see test_slices.
OF_POLYNOMIALS = 2.5e-3


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def random_slices(count, shell_max, seed):
    rng, pixels = generator(seed), half_plane(shell_max)
    shape = (count, len(pixels.kx))
    values = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)
    return random_rotations(count, rng), values, rng.random(shape, dtype=np.float32), pixels


def inserted(rotations, values, weights, pixels, box):
    accumulator = np.zeros((*slices.volume_shape(pixels.shell_max, box), 3), dtype=np.float32)
    slices.insert(accumulator, rotations, values, weights, pixels, box)
    return accumulator


def completed_noise(shell_max, box, seed):
    """Accumulator of a volume's transform and of even weights, of which no two are alike."""
    rng, side = generator(seed), slices.volume_shape(shell_max, box)[0]
    whole = np.fft.fftshift(np.fft.fftn(rng.standard_normal((side,) * 3)))
    weights = np.abs(np.fft.fftshift(np.fft.fftn(rng.standard_normal((side,) * 3))))
    return naive.half_complex(np.stack([whole.real, whole.imag, weights], axis=-1)).astype(np.float32)


def as_complex(accumulator):
    """Values and weights (two cubes, complex) of an accumulator."""
    return accumulator[..., 0] + 1j * accumulator[..., 1].astype(float), accumulator[..., 2].astype(complex)


def map_envelope(box, group):
    """What is divided out of a map, one at the centre: the mean over the mates of a place of the kernel's envelope, or
    of its square for mates off the grid, which are read once more."""
    padded = padded_px(box)
    axis = np.arange(box) - box // 2
    places = np.stack(np.meshgrid(axis, axis, axis, indexing="ij")[::-1], axis=-1)
    of_mates = [np.prod(envelope(places @ g.T, padded) / envelope(0.0, padded), axis=-1) for g in group]
    return np.mean([e if naive.on_grid(g) else e**2 for e, g in zip(of_mates, group, strict=True)], axis=0)


@pytest.mark.parametrize(("shell_max", "box"), [(3, 8), (4, 9)])
def test_friedel_mates_are_as_if_inserted(shell_max, box):
    data = random_slices(5, shell_max, 1)
    accumulator = inserted(*data, box)
    kept = accumulator.copy()
    found = solve.complete(accumulator, IDENTITY)
    full = naive.insert(slices.half_width(shell_max, box), *data, padded_px(box) / box)
    expected = naive.half_complex(full)
    np.testing.assert_allclose(found, expected, atol=OF_POLYNOMIALS * np.abs(expected).max())
    np.testing.assert_array_equal(accumulator, kept)
    assert np.abs(expected - accumulator)[:, :, :3].max() > 0.3 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "shell_max", "box"), [("C2", 2, 8), ("C3", 3, 9), ("D2", 2, 9), ("O", 2, 8)])
def test_symmetry_mates_are_read_with_the_kernel(name, shell_max, box):
    group, accumulator = operators(name), completed_noise(shell_max, box, 2)
    # Friedel mates are there, so that adding them doubles what there is at x = 0, and more besides.
    friedel = solve.complete(accumulator, IDENTITY)
    found = solve.complete(accumulator, group)
    radius = padded_px(box) / box * (shell_max + 0.5) - 1  # a map ends at most one further out
    expected = [naive.symmetrised(cube, group, radius) for cube in as_complex(friedel)]
    inside = expected[1] != 0
    assert np.sum(inside) > 4 / 3 * np.pi / 2 * (radius - 1) ** 3
    for cube, own in zip(as_complex(found), expected, strict=True):
        np.testing.assert_allclose(cube[inside], own[inside], atol=OF_POLYNOMIALS * np.abs(own).max())


def test_every_frequency_of_a_map_has_its_symmetry_mates():
    for shell_max, box in [(3, 8), (8, 16), (16, 32), (12, 25), (13, 40)]:
        accumulator = np.ones((*slices.volume_shape(shell_max, box), 3), dtype=np.float32)
        found = solve.complete(accumulator, operators("C3"))[:, :, slices.BEFORE :, 2]
        shells = naive.shells_of_cube(slices.half_width(shell_max, box), box, padded_px(box))
        assert found[shells <= shell_max].min() > 0


class Blobs:
    """Exact slices of a smooth, symmetric volume; where modulated, with the weights of CTFs that change sign."""

    def __init__(self, box, count, seed=0, modulated=True, group=IDENTITY, spread=0.25):
        sigma = 0.7
        rng = generator(seed)
        self.box, self.pixels, self.group = box, half_plane(box // 2), group
        centres, amplitudes = rng.uniform(-spread, spread, (8, 3)) * box, rng.uniform(0.5, 2, 8)
        blobs = np.concatenate([centres @ g.T for g in group]), np.tile(amplitudes, len(group)), sigma
        self.volume = fft.irfftn(naive.blob_transform(*blobs, box), box)
        self.rotations = random_rotations(count, rng)
        self.images = np.array(
            [naive.blob_slice(*blobs, rotation, np.zeros(2), self.pixels, box) for rotation in self.rotations]
        )
        defocus = modulated * rng.uniform(0.5, 1.5, (count, 1))
        self.transfer = np.cos(defocus * (self.pixels.kx**2 + self.pixels.ky**2) / box).astype(np.float32)

    def accumulator(self, reference=None):
        """Sums of the images, less the slices of a reference, with all of their mates."""
        return solve.complete(self._inserted(reference, self.rotations), self.group)

    def explicit_accumulator(self, reference=None):
        """The same with each image inserted at all the poses that are equal to its own."""
        turned = (self._inserted(reference, self.rotations @ g) for g in self.group)
        return sum(solve.complete(each, IDENTITY) for each in turned)

    def _inserted(self, reference, rotations):
        images = self.images
        if reference is not None:
            prepared = slices.prepare(reference, self.pixels.shell_max)
            images = images - slices.extract(prepared, rotations, self.pixels, self.box)
        values = (self.transfer**2 * images).astype(np.complex64)
        return inserted(rotations, values, self.transfer**2, self.pixels, self.box)

    def map(self, accumulator, reference=None, group=None):
        floor = solve.weight_floor(solve.mean_weights(accumulator, self.pixels.shell_max, self.box))
        return solve.maximise(accumulator, reference, floor, self.group if group is None else group, self.box)

    def error(self, found):
        """Of a map, as a part of the volume, in the shells that it is known in."""
        return error(low_passed(found, self.box // 2 - 1), low_passed(self.volume, self.box // 2 - 1))


def low_passed(volume, shell):
    box = len(volume)
    return fft.irfftn(np.where(fsc.volume_shells(box) <= shell, fft.rfftn(volume), 0), box)


def error(found, truth):
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


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
    found = blobs.map(blobs.accumulator())
    assert found.shape == (box,) * 3 and found.dtype == np.float32
    correlation, gain = compare(found, blobs.volume, box // 2 - 1)
    # About zero frequency weights fall steeply, so that the kernel's average is not the value in its middle.
    assert correlation[3:].min() > 0.95 and correlation[1:3].min() > 0.9
    np.testing.assert_allclose(gain[3:], 1, atol=0.1 if modulated else 0.05)
    np.testing.assert_allclose(gain[:3], 1, atol=0.4)
    # A step mends that.
    correlation, gain = compare(blobs.map(blobs.accumulator(found), found), blobs.volume, box // 2 - 1)
    assert correlation.min() > 0.99
    np.testing.assert_allclose(gain, 1, atol=0.12)
    assert np.mean(np.abs(gain - 1)) < 0.03


@pytest.mark.parametrize("modulated", [False, True])
def test_a_second_step_is_nearer_to_the_truth(modulated):
    """What the division by the kernel's averages gets wrong is mended by images less the slices of the first map."""
    blobs = Blobs(32, 1500, seed=2, modulated=modulated)
    errors, reference = [], None
    for _ in range(3):
        reference = blobs.map(blobs.accumulator(reference), reference)
        errors.append(blobs.error(reference))
    assert errors[0] > 0.05
    assert errors[1] < 0.35 * errors[0]
    assert errors[2] < min(errors[1], 0.03)


@pytest.mark.parametrize("name", ["C3", "D2", "O"])
def test_symmetry_mates_are_nearly_as_if_inserted(name):
    """Maps of symmetrised sums, against those of every view inserted at all of its mates."""
    blobs = Blobs(24, 2400 // len(operators(name)), seed=1, group=operators(name), spread=0.15)
    # Outside of the particle, what averages get wrong grows with the square of the envelope that is divided out.
    mask = sphere(24, 12.5, 3)
    found = mask * blobs.map(blobs.accumulator())
    expected = mask * blobs.map(blobs.explicit_accumulator(), group=IDENTITY)
    correlation, gain = compare(found, expected, 10)
    assert correlation.min() > 0.97
    np.testing.assert_allclose(gain, 1, atol=0.2)
    for _ in range(2):
        found = mask * blobs.map(blobs.accumulator(found), found)
        expected = mask * blobs.map(blobs.explicit_accumulator(expected), expected, IDENTITY)
    correlation, gain = compare(found, expected, 10)
    assert correlation.min() > 0.995
    np.testing.assert_allclose(gain, 1, atol=0.05)
    assert max(blobs.error(found), blobs.error(expected)) < 0.03


def test_images_that_the_reference_explains_leave_it_as_it_is():
    blobs, other = Blobs(32, 300, seed=3), Blobs(32, 300, seed=4)
    found = solve.maximise(blobs.accumulator(blobs.volume), blobs.volume, np.zeros(17), IDENTITY, 32)
    assert error(found, blobs.volume) < 0.02
    # As many images of another map do not.
    moved = solve.maximise(other.accumulator(blobs.volume), blobs.volume, np.zeros(17), IDENTITY, 32)
    assert error(moved, blobs.volume) > 0.5


@pytest.mark.parametrize(("shell_max", "box"), [(4, 8), (4, 9), (6, 16)])
def test_mean_weights_are_means_over_shells(shell_max, box):
    accumulator = completed_noise(shell_max, box, 4)
    shells = naive.shells_of_cube(slices.half_width(shell_max, box), box, padded_px(box))
    weights = accumulator[:, :, slices.BEFORE :, 2]
    expected = [weights[shells == shell].mean() for shell in range(shell_max + 1)]
    np.testing.assert_allclose(solve.mean_weights(accumulator, shell_max, box), expected, rtol=1e-5)


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


def cropped(whole, box):
    """The middle of the volume of a whole padded transform."""
    padded = len(whole)
    volume = np.fft.fftshift(np.fft.ifftn(whole))
    assert np.abs(volume.imag).max() < 1e-6 * np.abs(volume.real).max()
    return volume.real[(slice(padded // 2 - box // 2, padded // 2 - box // 2 + box),) * 3]


def naive_maximise(accumulator, reference, precision, group, box):
    """reference + (A - R F(reference E)) / (W + R), transformed back and divided by E, voxel by voxel."""
    padded, shell_max, half = padded_px(box), len(precision) - 1, len(accumulator) // 2
    along = map_envelope(box, group)
    of_reference = naive.full_transform(naive.embedded(reference * along, padded))
    shells = naive.shells_of_cube(half, box, padded)
    change = np.zeros((padded,) * 3, dtype=complex)
    for z, y, x in np.argwhere(shells <= shell_max) - (half, half, 0):
        real, imaginary, weight = accumulator[z + half, y + half, x + slices.BEFORE].astype(float)
        prior = precision[shells[z + half, y + half, x]]
        if max(abs(z), abs(y), x) < padded / 2 and weight + prior > 0:
            value = (real + 1j * imaginary - prior * of_reference[z, y, x]) / (weight + prior)
            change[z, y, x], change[-z, -y, -x] = value, np.conj(value)
    return (reference + cropped(change, box) / along) * sphere(box, box, 3.0)  # the corners are blank


@pytest.mark.parametrize("stepping", [False, True])
@pytest.mark.parametrize(
    ("box", "shell_max", "name"), [(8, 3, "C1"), (8, 4, "C1"), (9, 4, "C1"), (16, 8, "D3"), (13, 6, "O")]
)
def test_maximise_is_a_step_of_a_wiener_filter(box, shell_max, name, stepping):
    accumulator = completed_noise(shell_max, box, 6)
    rng, group = generator(7), operators(name)
    precision = rng.uniform(0, 50, shell_max + 1)
    reference = (stepping * 5 * rng.standard_normal((box,) * 3)).astype(np.float32)
    expected = naive_maximise(accumulator, reference, precision, group, box)
    kept = accumulator.copy(), reference.copy()
    found = solve.maximise(accumulator, reference if stepping else None, precision, group, box)
    # The envelope of a group is interpolated.
    np.testing.assert_allclose(found, expected, atol=(2e-5 if name == "C1" else 1e-3) * np.abs(expected).max())
    np.testing.assert_array_equal(accumulator, kept[0])
    np.testing.assert_array_equal(reference, kept[1])
    if stepping:  # it is far from a map of its own
        assert error(found, naive_maximise(accumulator, 0 * reference, precision, group, box)) > 0.1


@pytest.mark.parametrize(("box", "name"), [(16, "C1"), (17, "C4"), (32, "C3"), (33, "D2"), (17, "O"), (16, "I1")])
def test_envelope_of_a_map_is_the_mean_over_mates(box, name):
    """Found from a map: a point of the transform's zero is a volume of ones over the envelope."""
    group, accumulator = operators(name), np.zeros((*slices.volume_shape(4, box), 3), dtype=np.float32)
    half = len(accumulator) // 2
    accumulator[half, half, slices.BEFORE] = padded_px(box) ** 3, 0, 1
    found = solve.maximise(accumulator, None, np.zeros(5), group, box)
    inside = sphere(box, box, 0) > 0
    expected = 1 / map_envelope(box, group)[inside]
    np.testing.assert_allclose(found[inside], expected, rtol=1e-5 if name == "C1" else 1e-3)
    assert expected.max() > 1.5


def test_what_nothing_touched_is_empty_or_stays_the_reference():
    accumulator = np.zeros((*slices.volume_shape(4, 8), 3), dtype=np.float32)
    reference = generator(8).standard_normal((8,) * 3).astype(np.float32)
    corners = sphere(8, 8, 3.0)
    np.testing.assert_array_equal(solve.maximise(accumulator, None, np.zeros(5), IDENTITY, 8), np.zeros((8, 8, 8)))
    np.testing.assert_array_equal(solve.maximise(accumulator, reference, np.zeros(5), IDENTITY, 8), reference * corners)
    half = len(accumulator) // 2
    accumulator[half + 1, half + 1, 1 + slices.BEFORE] = 6, 0, 3
    wave = solve.maximise(accumulator, None, np.zeros(5), IDENTITY, 8)
    assert np.isfinite(wave).all() and wave[4, 4, 4] == pytest.approx(2 * 2 / 10**3)
    stepped = solve.maximise(accumulator, reference, np.zeros(5), IDENTITY, 8)
    np.testing.assert_allclose(stepped, reference * corners + wave, atol=1e-6)


def test_frequencies_past_the_last_shell_stay_those_of_the_reference():
    """However strong the prior is that draws the rest to nothing."""
    box, shell_max = 32, 6
    accumulator = np.zeros((*slices.volume_shape(shell_max, box), 3), dtype=np.float32)
    reference = generator(9).standard_normal((box,) * 3).astype(np.float32) * sphere(box, 12, 4)
    found = solve.maximise(accumulator, reference, np.full(shell_max + 1, 100.0), IDENTITY, box)
    before, after = fsc.shell_power(reference), fsc.shell_power(found)
    # What the step spreads past the box is cut off, so that some power stays.
    assert (after / before)[: shell_max - 1].max() < 0.1
    np.testing.assert_allclose((after / before)[shell_max + 3 :], 1, atol=0.03)


@pytest.mark.parametrize(("box", "name"), [(8, "C1"), (9, "C1"), (9, "D2")])
def test_rebased_adds_what_the_weights_see_of_the_change(box, name):
    accumulator, group = completed_noise(4, box, 10), operators(name)
    change, kept = generator(11).standard_normal((box,) * 3), accumulator.copy()
    found = solve.rebased(accumulator, change, group)
    half, padded = len(accumulator) // 2, padded_px(box)
    place = np.arange(-half, half + 1) % padded
    whole = naive.full_transform(naive.embedded(change * map_envelope(box, group), padded))
    moved = whole[np.ix_(place, place, place)][:, :, half:]
    held = (slice(None), slice(None), slice(slices.BEFORE, None))
    expected = accumulator.astype(float)
    expected[(*held, 0)] += expected[(*held, 2)] * moved.real
    expected[(*held, 1)] += expected[(*held, 2)] * moved.imag
    np.testing.assert_allclose(found[held], expected[held], atol=(1e-5 if name == "C1" else 1e-3) * expected.max())
    np.testing.assert_array_equal(accumulator, kept)


def test_rebased_sums_are_those_of_images_less_the_other_reference():
    blobs, other = Blobs(32, 600, seed=12), Blobs(32, 1, seed=13)
    change = 0.05 * other.volume
    before, expected = blobs.accumulator(blobs.volume), blobs.accumulator(blobs.volume - change)
    found = solve.rebased(before, change, IDENTITY)
    maps = [blobs.map(each, blobs.volume - change) for each in (found, expected, before)]
    # As near as a step is to the map that it leads to.
    assert error(maps[0] - maps[2], maps[1] - maps[2]) < 0.2
    assert error(maps[0], maps[1]) < 0.01


def test_precision_of_other_shells_is_refused():
    accumulator = np.zeros((*slices.volume_shape(4, 16), 3), dtype=np.float32)
    for shells in (4, 6):
        with pytest.raises(ValueError, match="does not fit"):
            solve.maximise(accumulator, None, np.ones(shells), IDENTITY, 16)
