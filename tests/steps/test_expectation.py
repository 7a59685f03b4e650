from dataclasses import replace
from itertools import pairwise

import naive
import numpy as np
import pytest

from dcryo.euler import matrix_from_rotvec
from dcryo.kernels import fft, modes, posterior, sampling, slices, solve
from dcryo.kernels.ctf import ctf
from dcryo.kernels.fsc import shell_correlation
from dcryo.kernels.gridding import envelope, padded_px
from dcryo.kernels.modes import Window
from dcryo.kernels.rotations import angle_between_deg, angular_distance_deg, perturbation, random_rotations
from dcryo.kernels.shells import half_plane, pack, unpack
from dcryo.kernels.symmetry import operators
from dcryo.steps import expectation, maximisation
from dcryo.steps.expectation import Batch, Poses
from dcryo.steps.search import Search, plan_search

BOX, PIXEL, DIAMETER = 32, 3.0, 66.0
SIGMA = 1.5
PIXELS = half_plane(15)  # whole shells inside Nyquist
NOBODY = operators("C1")
NO_HOLD = np.zeros(6)


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


TURN = perturbation(3.0, generator(99))


class Particles:
    """Images of random blobs: exact projections times a CTF and an amplitude, with white noise.

    noise: standard deviation of a pixel's noise over that of its signal.
    """

    def __init__(self, count, noise, seed=0, group=NOBODY, amplitude=(0.7, 1.4)):
        rng = generator(seed)
        direction = rng.standard_normal((14, 3))
        radius = 9 * rng.random((14, 1)) ** (1 / 3)
        centres = direction / np.linalg.norm(direction, axis=1, keepdims=True) * radius
        centres = np.concatenate([centres @ operator.T for operator in group])
        amplitudes = np.tile(rng.uniform(50, 200, 14), len(group)) / len(group)
        self.rotation, self.origin = random_rotations(count, rng), rng.uniform(-2, 2, (count, 2))
        self.amplitude = rng.uniform(*amplitude, count)
        every = half_plane(BOX // 2)
        defocus = rng.uniform(6000, 15000, (2, count))
        transfer = ctf(every.kx, every.ky, BOX, PIXEL, *defocus, 30.0, 300.0, 2.7, 0.1)
        signal = [
            a * t[: len(PIXELS.kx)] * naive.blob_slice(centres, amplitudes, SIGMA, rotation, origin, PIXELS, BOX)
            for a, t, rotation, origin in zip(self.amplitude, transfer, self.rotation, self.origin, strict=True)
        ]
        images = fft.irfft2(unpack(PIXELS, np.array(signal), BOX), BOX)
        self.noise_sigma = noise * images.std()
        self.noise_power = np.full((1, BOX // 2 + 1), (BOX * self.noise_sigma) ** 2)
        images += self.noise_sigma * rng.standard_normal(images.shape).astype(np.float32)
        ones = np.ones(count)
        unknown = np.tile(np.eye(3), (count, 1, 1)), np.zeros((count, 2))
        self.batch = Batch(
            images, transfer, np.zeros(count, np.int64), ones, ones, *unknown, *unknown, np.ones((count, 1))
        )
        self.volume = naive.blob_volume(centres, amplitudes, SIGMA, BOX)
        self.reference = slices.prepare(self.volume, BOX // 2)

    def near_the_truth(self, seed=1):
        """The batch with poses some degrees and parts of a pixel off, and the true amplitudes."""
        rng = generator(seed)
        count = len(self.rotation)
        turn = matrix_from_rotvec(np.deg2rad(rng.uniform(-2.5, 2.5, (count, 3))))
        origin = self.origin + rng.uniform(-0.4, 0.4, (count, 2))
        return self.batch._replace(rotation=turn @ self.rotation, origin_px=origin, scale=self.amplitude)

    def fold(self, search, batch=None, cuts=None, group=NOBODY, noise_power=None, reference=None):
        batch = self.batch if batch is None else batch
        noise_power = self.noise_power if noise_power is None else noise_power
        reference = self.reference if reference is None else reference
        sums = expectation.empty_sums(PIXELS.shell_max, len(noise_power), BOX)
        search = replace(search, operators=group)
        references = expectation.single(reference)
        grid = expectation.global_grid(references, search, BOX)
        found = [
            expectation.fold(sums, take(batch, slice(a, b)), references, noise_power, search, PIXELS, grid)
            for a, b in pairwise(cuts or [0, len(batch.images)])
        ]
        return sums, Poses(*(np.concatenate(column) for column in zip(*found, strict=True)))


def take(batch, rows):
    return Batch(*(column[rows] for column in batch))


def everywhere(shell=12, **options):
    return plan_search(shell, BOX, PIXEL, DIAMETER, 6.0, 0, np.zeros((1, BOX // 2 + 1)), TURN, **options)


def nearby(turn_deg=5.0, shells=(12,), hold=NO_HOLD, **options):
    """A search from the last poses alone."""
    window = Window(np.deg2rad(turn_deg), 0.8, hold)
    return Search(None, shells, 0.0, 0.0, ((window,),) * len(shells), TURN, **options)


@pytest.fixture(scope="module")
def clear():
    """Particles that can be told from the noise by eye."""
    return Particles(24, noise=1.0)


@pytest.fixture(scope="module")
def found(clear):
    """Their global search."""
    return clear.fold(everywhere())


@pytest.fixture(scope="module")
def noisy():
    """Particles with four times the noise, and a search around poses that are nearly right."""
    particles = Particles(64, noise=2.0, seed=3)
    return particles, *particles.fold(nearby(), particles.near_the_truth())


def equal(a, b):
    for x, y in zip((*a[0].volumes, *a[0][1:], *a[1]), (*b[0].volumes, *b[0][1:], *b[1]), strict=True):
        np.testing.assert_array_equal(x, y)


class Integral:
    """The posterior of one image over poses around one, by its definition, on a grid that is fine against its width.

    Poses are `steps` steps of `step` standard deviations to either side along the axes of a Gaussian, of which only the
    widths matter: `width`, (5, 5), a root of its covariance.
    """

    def __init__(self, particles, batch, row, search, pixels, noise_power, centre, width, steps=3, step=1.1):
        line = step * np.arange(-steps, steps + 1)
        places = np.stack(np.meshgrid(*[line] * 5, indexing="ij"), axis=-1).reshape(-1, 5)
        # The corners of the cube of widths hold next to nothing.
        places = places[np.sum(places**2, axis=1) <= (step * steps + 0.5) ** 2] @ width.T
        self.away = places
        self.rotations = matrix_from_rotvec(places[:, :3]) @ centre[0]
        self.shifts = centre[1] + places[:, 3:] - batch.origin_px[row]
        count, n = len(pixels.kx), pixels.within(search.shells[-1])
        self.packed = pack(pixels, fft.rfft2(batch.images[row])) / batch.norm[row]
        self.transfer = batch.ctf[row, :count] * batch.scale[row]
        self.variance = noise_power[batch.group[row]][pixels.shell] / 2
        self.pixels, self.count = pixels, count
        self.pieces = slices.extract(particles.reference, self.rotations, pixels, BOX)
        self.moved = self.packed * posterior.shift_phases(pixels, batch.origin_px[row] + self.shifts, BOX, count)
        difference = np.abs(self.moved - self.transfer * self.pieces) ** 2 - np.abs(self.moved) ** 2
        self.scores = -difference[:, :n] @ (1 / (2 * self.variance[:n]))
        turns = [naive.rotation_vector(rotation, batch.rotation[row]) for rotation in self.rotations]
        log_window = -np.sum(np.square(turns), axis=1) / (2 * search.windows[-1][0].turn_rad ** 2)
        log_window -= np.sum(self.shifts**2, axis=1) / (2 * search.windows[-1][0].shift_px ** 2)
        self.posterior = np.exp(self.scores + log_window - (self.scores + log_window).max())
        self.posterior /= self.posterior.sum()

    def add_innovations_to(self, volume):
        """What is left of the image at every pose, with its weight."""
        share = self.posterior[:, None]
        weight = share * (self.transfer**2 / self.variance)
        left = share * (self.transfer / self.variance) * (self.moved - self.transfer * self.pieces)
        slices.insert(volume, self.rotations, left.astype(np.complex64), weight.astype(np.float32), self.pixels, BOX)

    def residual(self):
        """Posterior mean of |X - C S|^2 of each pixel."""
        return self.posterior @ np.abs(self.moved - self.transfer * self.pieces) ** 2

    def scale(self, before):
        """The most probable scale, known beforehand to be 1 give or take 0.3: where the derivative vanishes."""
        predicted = self.transfer / before * self.pieces
        cross = self.posterior @ (np.conj(self.moved) * predicted).real @ (1 / self.variance)
        square = self.posterior @ np.abs(predicted) ** 2 @ (1 / self.variance)
        return (cross + 1 / 0.3**2) / (square + 1 / 0.3**2)


# Axes along which the rim is blurred by less than a quarter of a pixel are not split: of these three particles five to
# seven of nine, and that makes most of the difference.
@pytest.mark.parametrize(("narrow_px", "tolerance"), [(None, 0.06), (0.1, 0.02)], ids=["as it is", "all axes split"])
def test_fold_is_the_posterior_over_poses(monkeypatch, narrow_px, tolerance):
    """Against sums over thousands of poses, which are all within the one mode that these particles have.

    Two optics groups, norms, scales and origins of their own. Laplace's approximation is as good as images are clear.
    """
    if narrow_px is not None:
        monkeypatch.setattr(modes, "_NARROW_PX", narrow_px)
    particles = Particles(3, noise=0.5, seed=5, amplitude=(1.0, 1.0))
    pixels, search = half_plane(10), nearby(5.0, (10,))
    noise_power = particles.noise_power * np.array([[1.0], [1.7]]) * np.linspace(2, 1, BOX // 2 + 1)
    batch = particles.near_the_truth()._replace(
        group=np.array([1, 0, 1]), norm=np.array([1.3, 0.8, 1.0]), scale=np.array([0.9, 1.2, 1.0])
    )
    batch = batch._replace(images=batch.images * batch.norm[:, None, None].astype(np.float32))
    sums = expectation.empty_sums(10, 2, BOX)
    poses = expectation.fold(sums, batch, expectation.single(particles.reference), noise_power, search, pixels, None)
    volume, residual = np.zeros_like(sums.volumes[0]), np.zeros((2, BOX // 2 + 1))
    every = half_plane(BOX // 2)
    np.testing.assert_array_equal(poses.significant, 1)
    np.testing.assert_array_equal(poses.max_probability, 1)
    for row in range(3):
        width = np.diag(np.deg2rad(poses.angle_sd_deg[row]) * np.array([1, 1, 1, 0, 0])) + np.diag([0, 0, 0, 0.1, 0.1])
        centre = poses.rotation[row], poses.origin_px[row]
        # Twice, so that the second grid is that of the posterior's own widths.
        for _ in range(2):
            naively = Integral(particles, batch, row, search, pixels, noise_power, centre, width)
            mean = naively.posterior @ naively.away
            covariance = (naively.away - mean).T @ ((naively.away - mean) * naively.posterior[:, None])
            width = np.linalg.cholesky(covariance)
        assert naively.posterior.max() < 0.1
        naively.add_innovations_to(volume)
        packed = pack(every, fft.rfft2(batch.images[row])) / batch.norm[row]
        of_pixel = np.abs(packed) ** 2
        of_pixel[: len(pixels.kx)] = naively.residual()
        residual[batch.group[row]] += [of_pixel[every.shell == shell].mean() for shell in range(BOX // 2 + 1)]
        sd = np.sqrt(np.diag(covariance))
        assert np.abs(mean / sd).max() < 0.15
        assert poses.angle_sd_deg[row] == pytest.approx(np.rad2deg(np.sqrt(np.mean(sd[:3] ** 2))), rel=0.15)
        assert poses.log_likelihood[row] == pytest.approx(naively.scores.max(), abs=0.1)
        in_noise_units = np.mean(of_pixel / noise_power[batch.group[row]][every.shell])
        assert poses.norm[row] == pytest.approx(batch.norm[row] * np.sqrt(in_noise_units), rel=tolerance / 15)
        assert poses.scale[row] == pytest.approx(naively.scale(batch.scale[row]), abs=2e-3)
    far = np.linalg.norm((sums.volumes[0] - volume).reshape(-1, 3), axis=0)
    assert (far < tolerance * np.linalg.norm(volume.reshape(-1, 3), axis=0)).all()
    np.testing.assert_allclose(sums.residual, residual, rtol=tolerance)
    assert sums.particles.tolist() == [1, 2] and poses.usable.all()


def test_poses_are_found(clear, found):
    """Of a step of the grid of 15 degrees and more; the sign of shifts too: origins are up to two pixels either way."""
    _, poses = found
    assert everywhere().grid_order == 2 and len(everywhere().shells) > 1
    error = angle_between_deg(poses.rotation, clear.rotation)
    assert np.median(error) < 3 and np.quantile(error, 0.9) < 5 and error.max() < 15
    assert np.quantile(np.abs(poses.origin_px - clear.origin), 0.9) < 0.3
    assert np.abs(clear.origin).max() > 1.9
    assert poses.usable.all() and (poses.log_likelihood > 50).all()


def test_poses_nearby_are_found():
    particles = Particles(48, noise=0.5)
    _, poses = particles.fold(nearby(), particles.near_the_truth())
    error = angle_between_deg(poses.rotation, particles.rotation)
    before = angle_between_deg(particles.near_the_truth().rotation, particles.rotation)
    # The posterior tells its error; its deviation is that along one axis.
    expected = np.sqrt(np.mean(poses.angle_sd_deg**2) * 3)
    assert np.sqrt(np.mean(error**2)) == pytest.approx(expected, rel=0.25)
    assert np.median(before) > 3 * np.median(error)
    assert np.abs(poses.origin_px - particles.origin).max() < 0.2


def test_levels_take_poses_further_than_the_last_alone_would():
    """From 20 degrees off they are found either way; from 30, fine detail leads astray what coarse brings near."""
    particles = Particles(96, noise=0.5)
    found = {}
    for degrees in (20, 30):
        turn = matrix_from_rotvec(np.deg2rad(degrees) * random_rotations(96, generator(2))[:, 0])
        batch = particles.near_the_truth()._replace(rotation=turn @ particles.rotation)
        for shells in ((3, 6, 12), (12,)):
            _, poses = particles.fold(nearby(30.0, shells), batch)
            found[degrees, shells] = np.mean(angle_between_deg(poses.rotation, particles.rotation) < 4)
    assert found[20, (3, 6, 12)] == found[20, (12,)] == 1
    assert found[30, (3, 6, 12)] > max(0.93, found[30, (12,)])


@pytest.mark.parametrize("profile_scale", [False, True], ids=["innovations", "images"])
def test_the_sums_make_the_map(profile_scale):
    """From innovations it is the reference's next step, from images it is theirs alone."""
    particles = Particles(200, noise=0.5, amplitude=(1.0, 1.0))
    sums, _ = particles.fold(nearby(shells=(12,), profile_scale=profile_scale), particles.near_the_truth())
    reference = None if profile_scale else particles.volume
    volume = solve.maximise(solve.complete(sums.volumes[0], NOBODY), reference, np.full(16, 1e-3), NOBODY, BOX)
    assert shell_correlation(volume, particles.volume)[:8].min() > 0.93
    assert shell_correlation(volume[::-1], particles.volume)[3:8].mean() < 0.6


def test_innovations_of_a_reference_that_is_right_are_noise():
    """And sum to less than images do; their sums do not correlate with the map."""
    particles = Particles(64, noise=0.5, amplitude=(1.0, 1.0))
    batch = particles.batch._replace(rotation=particles.rotation, origin_px=particles.origin)
    left, images = (particles.fold(nearby(profile_scale=p), batch)[0].volumes[0] for p in (False, True))
    assert np.linalg.norm(left[..., :2]) < 0.3 * np.linalg.norm(images[..., :2])
    along = np.sum(left[..., :2] * images[..., :2]) / np.sum(images[..., :2] ** 2)
    assert abs(along) < 0.03
    assert left[..., 2].sum() == pytest.approx(images[..., 2].sum(), rel=0.01)


def test_weights_of_poses_sum_to_one(noisy):
    """So the weights of all poses' slices add up to those of one slice per particle."""
    particles, sums, poses = noisy
    batch = particles.near_the_truth()
    weights = (batch.ctf[:, : len(PIXELS.kx)] * batch.scale[:, None]) ** 2 / (particles.noise_power[0, 0] / 2)
    # A value is spread over taps whose sum is, in the mean, the integral of the kernel.
    of_kernel = envelope(0.0, padded_px(BOX)) ** 3
    assert sums.volumes[0][..., 2].sum(dtype=float) / of_kernel == pytest.approx(weights.sum(dtype=float), rel=1e-3)
    assert (poses.max_probability * poses.significant >= 1 - 1e-12).all()


def test_residual_is_the_noise_that_was_put_in(noisy):
    particles, sums, poses = noisy
    ratio = sums.residual[0] / sums.particles[0] / particles.noise_power[0]
    pixels = len(particles.rotation) * half_plane(BOX // 2).counts
    # In the first and the last shell some values of the transform are real or count twice.
    tolerance = 3.5 / np.sqrt(pixels) * np.where(np.isin(np.arange(len(ratio)), (0, BOX // 2)), np.sqrt(2), 1)
    assert (np.abs(ratio - 1) < tolerance).all()
    assert sums.particles.tolist() == [64]
    assert poses.norm.mean() == pytest.approx(1, abs=0.015) and poses.norm.std() < 0.04
    # What was explained is not small: images have more power than noise.
    power, count = expectation.power(particles.batch, 1)
    assert count.tolist() == [64] and (power[0, 2:6] / 64 > 1.15 * particles.noise_power[0, 2:6]).all()


def test_norm_is_that_of_the_noise_of_each_image(noisy):
    particles = noisy[0]
    rng = generator(8)
    gain = rng.uniform(0.7, 1.5, len(particles.rotation))
    # Noise without its signal, which would grow too.
    images = particles.noise_sigma * gain[:, None, None] * rng.standard_normal(particles.batch.images.shape)
    batch = particles.near_the_truth()._replace(images=images.astype(np.float32), scale=np.full(len(gain), 1e-6))
    _, poses = particles.fold(nearby(), batch)
    np.testing.assert_allclose(poses.norm / gain, 1, atol=0.12)


def test_a_norm_divides_its_image(clear):
    """Images brighter by a factor that is known give the same to the last bits, and the factor back."""
    batch = take(clear.batch, slice(6))
    sums, poses = clear.fold(everywhere(), batch)
    brighter = batch._replace(images=batch.images * 4, norm=batch.norm * 4)
    other_sums, other_poses = clear.fold(everywhere(), brighter)
    np.testing.assert_allclose(other_poses.norm, 4 * poses.norm, rtol=1e-6)
    equal((sums, poses), (other_sums, other_poses._replace(norm=poses.norm)))


def test_scale_is_the_amplitude_of_each_particle(noisy):
    particles, _, with_truth = noisy
    sharp = Particles(48, noise=0.5)
    _, poses = sharp.fold(nearby(), sharp.near_the_truth()._replace(scale=np.ones(48)))
    np.testing.assert_allclose(poses.scale / sharp.amplitude, 1, atol=0.08)
    assert (poses.scale / sharp.amplitude).mean() == pytest.approx(1, abs=0.01)
    # Noise makes it less certain; what is right stays so.
    np.testing.assert_allclose(with_truth.scale / particles.amplitude, 1, atol=0.25)
    assert (with_truth.scale / particles.amplitude).mean() == pytest.approx(1, abs=0.03)


def test_scale_of_a_particle_that_shows_little_stays_near_one():
    """Whatever it was before: else the prior would wear off from one iteration to the next."""
    particles = Particles(16, noise=12.0)
    batch = particles.near_the_truth()
    scales = []
    for before in (0.5, 1.0, 2.0):
        _, poses = particles.fold(nearby(), batch._replace(scale=np.full(16, before)))
        scales.append(poses.scale)
    assert np.abs(np.array(scales) - 1).max() < 0.5
    assert np.ptp(scales, axis=0).max() < 0.3


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("search", [everywhere(), nearby()], ids=["global", "local"])
def test_images_that_are_not_numbers_leave_the_sums_alone(clear, search):
    batch = take(clear.near_the_truth(), slice(7))
    images, transfer = batch.images.copy(), batch.ctf.copy()
    images[1, 5, 6] = np.nan
    images[3] = np.nan
    images[4, 0, 0] = np.inf
    transfer[6, 3] = np.nan
    spoilt = batch._replace(images=images, ctf=transfer)
    sums, poses = clear.fold(search, spoilt)
    assert poses.usable.tolist() == [True, False, True, False, False, True, False]
    good = np.flatnonzero(poses.usable)
    clean_sums, clean_poses = clear.fold(search, take(batch, good))
    equal((sums, Poses(*(column[good] for column in poses))), (clean_sums, clean_poses))
    bad = ~poses.usable
    for name in ("rotation", "origin_px", "norm", "scale"):
        np.testing.assert_array_equal(getattr(poses, name)[bad], getattr(batch, name)[bad])
    assert not np.any(poses.significant[bad]) and not np.any(poses.max_probability[bad])
    assert all(np.isfinite(column).all() for column in (*sums, *poses))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("search", [everywhere(), nearby()], ids=["global", "local"])
def test_a_batch_of_nothing_but_such_images_adds_nothing(clear, search):
    batch = take(clear.near_the_truth(), slice(3))
    sums, poses = clear.fold(search, batch._replace(images=np.full_like(batch.images, np.nan)))
    assert not poses.usable.any() and not any(np.any(column) for column in sums)
    np.testing.assert_array_equal(poses.rotation, batch.rotation)


@pytest.mark.parametrize("search", [everywhere(), nearby()], ids=["global", "local"])
def test_results_do_not_depend_on_batches(clear, search):
    """To the bit, whichever images are scored together."""
    batch = clear.near_the_truth()
    whole = clear.fold(search, batch)
    for cuts in ([0, 1, 8, 9, 24], [0, 7, 14, 21, 24], [0, 8, 16, 24]):
        equal(clear.fold(search, batch, cuts), whole)


def test_local_and_global_search_agree(clear, found):
    """Around the poses that the global search found, the local one finds them again."""
    _, poses = found
    again = clear.fold(nearby(20.0), clear.batch._replace(rotation=poses.rotation, origin_px=poses.origin_px))[1]
    # Wide windows and small: their pull differs, and shifts start from others.
    assert np.abs(again.log_likelihood - poses.log_likelihood).max() < 1.5
    assert np.quantile(angle_between_deg(again.rotation, poses.rotation), 0.9) < 1.5


def test_a_hold_lets_poses_go(clear):
    """The step of a search whose hold pushes away from the last pose ends farther from it, and not very much."""
    batch = clear.batch._replace(rotation=clear.rotation, origin_px=clear.origin)
    pushed = np.array([200.0, 200.0, 400.0, 2.0, 2.0, 3.0])
    gone = [
        angle_between_deg(clear.fold(nearby(hold=hold), batch)[1].rotation, clear.rotation).mean()
        for hold in (NO_HOLD, pushed)
    ]
    assert 1.02 * gone[0] < gone[1] < 2 * gone[0]


def test_a_global_search_needs_its_grid(clear):
    sums = expectation.empty_sums(15, 1, BOX)
    with pytest.raises(ValueError, match="needs its grid"):
        expectation.fold(
            sums, clear.batch, expectation.single(clear.reference), clear.noise_power, everywhere(), PIXELS, None
        )


def test_the_grey_scale_of_the_reference_does_not_matter_where_it_is_profiled(clear):
    search, batch = everywhere(profile_scale=True), take(clear.batch, slice(8))
    sums, poses = clear.fold(search, batch)
    brighter, same = clear.fold(search, batch, reference=clear.reference * np.complex64(64))
    equal((brighter, same), (sums, poses))
    error = angle_between_deg(poses.rotation, clear.rotation[:8])
    assert np.median(error) < 3
    np.testing.assert_array_equal(poses.scale, np.ones(8))
    # Nothing is said to be explained.
    np.testing.assert_allclose(sums.residual, expectation.power(batch, 1)[0], rtol=1e-6)
    # Where it is not, it does.
    other, _ = clear.fold(everywhere(), batch, reference=clear.reference * np.complex64(64))
    assert np.abs(other.volumes[0] - sums.volumes[0]).max() > 0.1 * np.abs(sums.volumes[0]).max()


def test_optics_groups_have_their_own_noise(noisy):
    particles = noisy[0]
    batch = particles.near_the_truth()
    group = np.arange(64) % 3 % 2  # twice as many of the first
    louder = np.where(group == 1, 2.0, 1.0)
    images = batch.images + (
        particles.noise_sigma * np.sqrt(louder**2 - 1)[:, None, None] * generator(9).standard_normal((64, BOX, BOX))
    ).astype(np.float32)
    noise_power = particles.noise_power * np.array([[1.0], [4.0]])
    sums, poses = particles.fold(nearby(), batch._replace(images=images, group=group), noise_power=noise_power)
    assert sums.particles.tolist() == [43, 21]
    ratio = sums.residual / sums.particles[:, None] / noise_power
    np.testing.assert_allclose(ratio[:, 3:], 1, atol=0.12)
    np.testing.assert_allclose(poses.norm, 1, atol=0.1)
    power, count = expectation.power(batch._replace(images=images, group=group), 2)
    assert count.tolist() == [43, 21] and np.median(power[1] / power[0]) > 21 / 43 * 3


def test_a_symmetric_particle_is_sought_in_the_asymmetric_unit():
    group = operators("D2")
    particles = Particles(12, noise=1.0, seed=11, group=group)
    search = everywhere()
    grid = expectation.global_grid(expectation.single(particles.reference), replace(search, operators=group), BOX)
    whole = expectation.global_grid(expectation.single(particles.reference), search, BOX)
    # A quarter of all views, and the cells that stick out of it.
    assert 0.25 <= grid.slices.shape[1] / whole.slices.shape[1] < 0.4
    _, poses = particles.fold(search, group=group)
    error = angular_distance_deg(poses.rotation, particles.rotation, group)
    assert np.median(error) < 4 and np.quantile(error, 0.9) < 10
    assert np.median(angle_between_deg(poses.rotation, particles.rotation)) > 90


@pytest.mark.parametrize("name", ["C1", "D2"])
def test_the_grid_is_every_rotation_and_the_slices_of_half_of_them(clear, name):
    search = everywhere()
    grid = expectation.global_grid(expectation.single(clear.reference), replace(search, operators=operators(name)), BOX)
    half = grid.slices.shape[1]
    pixels = half_plane(search.shells[0])
    every = slices.extract(clear.reference, grid.rotation, pixels, BOX)
    np.testing.assert_array_equal(grid.slices[0], every[:half])
    # The others are turned by half in the plane, which makes conjugates.
    np.testing.assert_allclose(grid.rotation[half:], np.diag([-1, -1, 1]) @ grid.rotation[:half], atol=1e-12)
    np.testing.assert_allclose(every[half:], np.conj(grid.slices[0]), atol=2e-3 * np.abs(every).max())
    pixel, psi = sampling.global_grid(search.grid_order, operators(name), TURN)
    expected = sampling.rotation_matrices(search.grid_order, pixel, psi, TURN)
    order, other = (np.lexsort(np.round(a.reshape(-1, 9), 6).T) for a in (grid.rotation, expected))
    np.testing.assert_allclose(grid.rotation[order], expected[other], atol=1e-12)


def test_a_local_search_has_no_grid(clear):
    assert expectation.global_grid(expectation.single(clear.reference), nearby(), BOX) is None


def test_power_is_the_mean_square_of_the_transform():
    rng = generator(12)
    images = rng.standard_normal((6, 16, 16)).astype(np.float32)
    images[2, 3, 3] = np.nan
    norm = np.array([1.0, 2.0, 1.0, 0.5, 1.0, 1.0])
    group = np.array([0, 2, 2, 2, 0, 0])
    nothing = np.zeros(6)
    found, count = expectation.power(Batch(images, nothing, group, norm, *[nothing] * 6), 3)
    every, expected = half_plane(8), np.zeros((3, 9))
    for row in (0, 1, 3, 4, 5):
        squared = np.abs(np.fft.rfft2(np.fft.ifftshift(images[row]))[every.ky, every.kx] / norm[row]) ** 2
        expected[group[row]] += [squared[every.shell == shell].mean() for shell in range(9)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert count.tolist() == [3, 0, 2]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("innovation", [False, True], ids=["images", "innovations"])
def test_back_projection_at_given_poses(clear, innovation):
    """C X moved to its origin, less C^2 S of a reference, with weight C^2; what is not a number is left out."""
    batch = take(clear.batch, slice(5))._replace(
        rotation=clear.rotation[:5], origin_px=clear.origin[:5], norm=np.array([1.0, 2.0, 1.0, 1.0, 0.5])
    )
    images, transfer = batch.images.copy(), batch.ctf.copy()
    images[2, 1, 1] = np.nan
    transfer[3, 7] = np.nan
    pixels = half_plane(9)
    volume = np.zeros((*clear.reference.shape, 3), dtype=np.float32)
    usable = expectation.back_project(volume, batch._replace(images=images, ctf=transfer), pixels)
    assert usable.tolist() == [True, True, False, False, True]
    if innovation:
        of_reference = np.zeros_like(clear.reference)
        expectation.slices_back_projected(
            of_reference, clear.reference, batch.rotation[usable], transfer[usable], pixels, BOX
        )
        volume = maximisation.innovations(volume, of_reference)
    expected = np.zeros_like(volume)
    for row in np.flatnonzero(usable):
        packed = pack(pixels, fft.rfft2(batch.images[row] / batch.norm[row]))
        transfer = batch.ctf[row, : len(pixels.kx)]
        image = naive.moved(packed, pixels, batch.origin_px[row], BOX) * transfer
        if innovation:
            image -= transfer**2 * slices.extract(clear.reference, batch.rotation[row][None], pixels, BOX)[0]
        slices.insert(
            expected, batch.rotation[row][None], image.astype(np.complex64)[None], transfer[None] ** 2, pixels, BOX
        )
    np.testing.assert_allclose(volume, expected, atol=1e-5 * np.abs(expected).max())


def test_images_are_shared_among_references_by_likelihood_and_share():
    """Two references alike hold the posterior in the ratio of their shares; sums and modes are those of one."""
    particles = Particles(16, noise=2.0, seed=5)
    batch = particles.near_the_truth()
    alone, poses = particles.fold(nearby(), batch)
    references = expectation.References((particles.reference, particles.reference), np.array([0.8, 0.2]))
    sums = expectation.empty_sums(PIXELS.shell_max, 1, BOX, 2)
    both = batch._replace(belonging=np.zeros((16, 2)))
    search = nearby()
    search = replace(search, windows=tuple(of_level * 2 for of_level in search.windows), fraction=1.0)
    shared = expectation.fold(sums, both, references, particles.noise_power, search, PIXELS, None)
    np.testing.assert_allclose(shared.belonging, np.tile([0.8, 0.2], (16, 1)), atol=1e-9)
    np.testing.assert_array_equal(shared.rotation, poses.rotation)
    for volume, part in zip(sums.volumes, (0.8, 0.2), strict=True):
        np.testing.assert_allclose(volume, part * alone.volumes[0], atol=2e-5 * np.abs(alone.volumes[0]).max())
    np.testing.assert_allclose(sums.residual, alone.residual, rtol=1e-6)


@pytest.mark.parametrize("found_by", ["a grid", "the last poses"])
def test_each_image_goes_to_the_reference_that_it_shows(found_by):
    particles, others = Particles(16, noise=2.0, seed=5), Particles(16, noise=2.0, seed=6)
    batch = particles.near_the_truth()
    images = np.concatenate([batch.images[:8], others.batch.images[:8]])
    rotation = np.concatenate([batch.rotation[:8], others.near_the_truth().rotation[:8]])
    origin = np.concatenate([batch.origin_px[:8], others.near_the_truth().origin_px[:8]])
    mixed = batch._replace(images=images, rotation=rotation, origin_px=origin, belonging=np.full((16, 2), 0.5))
    references = expectation.References((particles.reference, others.reference), np.array([0.5, 0.5]))
    search = everywhere() if found_by == "a grid" else nearby()
    search = replace(search, windows=tuple((of_level[0],) * 2 for of_level in search.windows))
    grid = expectation.global_grid(references, search, BOX)
    sums = expectation.empty_sums(PIXELS.shell_max, 1, BOX, 2)
    poses = expectation.fold(sums, mixed, references, particles.noise_power, search, PIXELS, grid)
    assert np.argmax(poses.belonging, axis=1).tolist() == [0] * 8 + [1] * 8
    truth = np.concatenate([particles.rotation[:8], others.rotation[:8]])
    assert np.median(angle_between_deg(poses.rotation, truth)) < 5
    # A reference without a share, and one that an image was not assigned to, gets none of it.
    empty = references._replace(share=np.array([0.0, 1.0]))
    poses = expectation.fold(sums, mixed, empty, particles.noise_power, search, PIXELS, grid)
    np.testing.assert_allclose(poses.belonging, np.tile([0.0, 1.0], (16, 1)), atol=1e-12)
    only = mixed._replace(belonging=np.tile([[1.0, 0.0], [0.0, 1.0]], (8, 1)))
    poses = expectation.fold(
        sums, only, references._replace(assigned=True), particles.noise_power, search, PIXELS, grid
    )
    np.testing.assert_allclose(poses.belonging, only.belonging, atol=1e-12)


def test_a_search_around_mates_finds_the_pose_wherever_among_them_it_starts(clear):
    group = operators("C4")
    batch = clear.near_the_truth()
    plain = clear.fold(nearby(), batch)[1]
    mates = np.arange(len(clear.rotation)) % 4
    turned = batch._replace(rotation=batch.rotation @ group[mates])
    lost, found = (clear.fold(nearby(mates=of), turned)[1] for of in (NOBODY, group))
    off, before = (angle_between_deg(of.rotation, clear.rotation) for of in (found, plain))
    assert np.median(off) < 1.05 * np.median(before) and off.max() < 5
    assert np.median(angle_between_deg(lost.rotation[mates > 0], clear.rotation[mates > 0])) > 60
    np.testing.assert_allclose(found.log_likelihood, plain.log_likelihood, rtol=1e-3)
    assert (found.significant <= 4).all() and (found.significant >= 1).all()


def test_a_pose_is_anchored_to_the_nearest_mate_of_the_one_that_it_came_with(clear):
    group = operators("C4")
    batch = clear.near_the_truth()
    away = matrix_from_rotvec(np.deg2rad([0.0, 3.0, 0.0]))
    given_ = away @ batch.rotation @ group[np.arange(len(clear.rotation)) % 4]
    batch = batch._replace(given_rotation=given_, given_origin_px=batch.origin_px + np.array([0.5, 0.0]))
    search = nearby(mates=group)
    tight = tuple((window._replace(anchored_rad=1e-3, anchored_px=1e-2),) for (window,) in search.windows)
    found = clear.fold(replace(search, windows=tight), batch)[1]
    apart = angle_between_deg(found.rotation[:, None], given_[:, None] @ group)
    assert apart.min(axis=1).max() < 0.5
    np.testing.assert_allclose(found.origin_px, batch.given_origin_px, atol=0.1)
    # And the prior does not choose among mates: the image does.
    assert np.median(angle_between_deg(found.rotation, clear.rotation)) < 8
