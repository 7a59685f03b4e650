from itertools import pairwise

import naive
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from dcryo.euler import matrix_from_rotvec
from dcryo.kernels import fft, sampling, slices, solve
from dcryo.kernels.ctf import ctf
from dcryo.kernels.fsc import shell_correlation
from dcryo.kernels.rotations import (
    angle_between_deg,
    angular_distance_deg,
    mean_rotation,
    perturbation,
    random_rotations,
)
from dcryo.kernels.shells import half_plane, pack, unpack
from dcryo.kernels.symmetry import operators
from dcryo.steps import expectation
from dcryo.steps.expectation import Batch, Poses
from dcryo.steps.search import Level, Search, plan_search

BOX, PIXEL, DIAMETER = 32, 3.0, 66.0
SIGMA = 1.5
PIXELS = half_plane(15)  # whole shells inside Nyquist
NOBODY = operators("C1")


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
        self.batch = Batch(images, transfer, np.zeros(count, np.int64), ones, ones, *unknown)
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
        grid = expectation.global_grid(reference, search, group) if search.radius_deg is None else None
        found = [
            expectation.fold(sums, take(batch, slice(a, b)), reference, noise_power, search, PIXELS, grid)
            for a, b in pairwise(cuts or [0, len(batch.images)])
        ]
        return sums, Poses(*(np.concatenate(column) for column in zip(*found, strict=True)))


def take(batch, rows):
    return Batch(*(column[rows] for column in batch))


def everywhere(shell=12, **options):
    return plan_search(shell, BOX, PIXEL, DIAMETER, 6.0, False, TURN, **options)


def nearby(order=6):
    """A search of a few degrees and part of a pixel about the last poses, in two levels."""
    steps = [np.deg2rad(sampling.step_deg(o)) * DIAMETER / 8 / PIXEL for o in (order - 1, order)]
    levels = Level(order - 1, 12, steps[0], 0.0), Level(order, 12, steps[1], steps[0] / 4)
    return Search(levels, shift_range_px=0.8, radius_deg=5.0, perturbation=TURN)


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
    for x, y in zip((*a[0], *a[1]), (*b[0], *b[1]), strict=True):
        np.testing.assert_array_equal(x, y)


class Exhaustive:
    """The posterior of one image over every pose of a two-level search that drops none, by its definition."""

    def __init__(self, particles, batch, row, search, pixels, noise_power):
        box, finest = BOX, search.finest
        pixel, psi = (a.ravel() for a in np.indices((12 * 4**finest.order, 6 * 2**finest.order)))
        self.rotations = sampling.rotation_matrices(finest.order, pixel, psi, TURN)
        coarse = sampling.shift_grid(search.shift_range_px, search.levels[0].shift_step_px)
        corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        lattice = (2 * coarse[:, None] + corners).reshape(-1, 2)
        self.shifts = lattice * finest.shift_step_px - finest.shift_offset_px
        self.pieces = slices.extract(particles.reference, self.rotations, pixels).astype(complex)
        packed = pack(pixels, fft.rfft2(batch.images[row])) / batch.norm[row]
        self.moved = [naive.moved(packed, pixels, batch.origin_px[row] + shift, box) for shift in self.shifts]
        self.transfer = batch.ctf[row, : len(pixels.kx)] * batch.scale[row]
        self.variance = noise_power[batch.group[row]][pixels.shell] / 2
        n = pixels.within(finest.shell)
        self.scores = np.array(
            [
                [
                    naive.log_likelihood(image[:n], self.transfer[:n], piece[:n], self.variance[:n])
                    - naive.log_likelihood(image[:n], self.transfer[:n], 0 * piece[:n], self.variance[:n])
                    for image in self.moved
                ]
                for piece in self.pieces
            ]
        )
        self.posterior = np.exp(self.scores - self.scores.max())
        self.posterior /= self.posterior.sum()

    def add_to(self, volume, pixels):
        """Back-projection of every shifted image at every rotation with its weight."""
        images = self.posterior @ (np.array(self.moved) * self.transfer / self.variance)
        weights = self.posterior.sum(axis=1)[:, None] * (self.transfer**2 / self.variance)
        slices.insert(volume, self.rotations, images.astype(np.complex64), weights.astype(np.float32), pixels)

    def residual(self, scale=1.0):
        """Posterior mean of |X - a C S|^2 of each pixel, a times as much as the scale so far."""
        of_rotation, moved = self.posterior.sum(axis=1), np.array(self.moved)
        predicted = scale * self.transfer * self.pieces
        power = np.abs(moved[0]) ** 2 + of_rotation @ np.abs(predicted) ** 2
        return power - 2 * np.sum((np.conj(self.posterior @ moved) * predicted).real, axis=0)

    def scale(self, before):
        """The most probable scale, known beforehand to be 1 give or take 0.3."""
        loss = minimize_scalar(
            lambda a: np.sum(self.residual(a / before) / (2 * self.variance)) + (a - 1) ** 2 / (2 * 0.3**2),
            bounds=(-5, 5), method="bounded", options={"xatol": 1e-6},
        )  # fmt: skip
        return loss.x


def test_fold_is_the_posterior_over_all_poses():
    """Two optics groups, norms, scales and origins of their own; a noise at which every pose keeps some weight."""
    particles = Particles(3, noise=16.0, seed=5)
    pixels = half_plane(6)
    search = Search(
        (Level(0, 4, 1.2, 0.0), Level(1, 5, 0.6, 0.3)), shift_range_px=1.2, radius_deg=None, perturbation=TURN,
        fraction=1.0, maximum=10**6,
    )  # fmt: skip
    noise_power = particles.noise_power * np.array([[1.0], [1.7]]) * np.linspace(2, 1, BOX // 2 + 1)
    batch = particles.batch._replace(
        group=np.array([1, 0, 1]), norm=np.array([1.3, 0.8, 1.0]), scale=np.array([0.9, 1.2, 1.0]),
        origin_px=generator(6).uniform(-2, 2, (3, 2)),
    )  # fmt: skip
    sums = expectation.empty_sums(6, 2, BOX)
    grid = expectation.global_grid(particles.reference, search, NOBODY)
    poses = expectation.fold(sums, batch, particles.reference, noise_power, search, pixels, grid)
    volume, residual = np.zeros_like(sums.volume), np.zeros((2, BOX // 2 + 1))
    every = half_plane(BOX // 2)
    for row in range(3):
        naively = Exhaustive(particles, batch, row, search, pixels, noise_power)
        assert naively.posterior.min() > 1e-12 and naively.posterior.max() > 5 * naively.posterior.mean()
        naively.add_to(volume, pixels)
        packed = pack(every, fft.rfft2(batch.images[row])) / batch.norm[row]
        of_pixel = np.abs(packed) ** 2
        of_pixel[: len(pixels.kx)] = naively.residual()
        residual[batch.group[row]] += [of_pixel[every.shell == shell].mean() for shell in range(BOX // 2 + 1)]

        assert poses.log_likelihood[row] == pytest.approx(naively.scores.max(), abs=1e-3)
        assert poses.max_probability[row] == pytest.approx(naively.posterior.max(), rel=1e-3)
        assert poses.significant[row] == pytest.approx(naively.posterior.size, abs=31)
        in_noise_units = np.mean(of_pixel / noise_power[batch.group[row]][every.shell])
        assert poses.norm[row] == pytest.approx(batch.norm[row] * np.sqrt(in_noise_units), rel=1e-4)
        assert poses.scale[row] == pytest.approx(naively.scale(batch.scale[row]), abs=1e-3)
        best = np.argmax(naively.posterior.max(axis=1))
        close = angle_between_deg(naively.rotations, naively.rotations[best]) <= 2 * sampling.step_deg(1)
        weights = naively.posterior * close[:, None]
        np.testing.assert_allclose(
            poses.rotation[row], mean_rotation(naively.rotations, weights.sum(axis=1)), atol=1e-3
        )
        shift = weights.sum(axis=0) @ naively.shifts / weights.sum()
        np.testing.assert_allclose(poses.origin_px[row], batch.origin_px[row] + shift, atol=1e-3)
    np.testing.assert_allclose(sums.volume, volume, atol=1e-4 * np.abs(volume).max())
    np.testing.assert_allclose(sums.residual, residual, rtol=1e-4)
    assert sums.particles.tolist() == [1, 2] and poses.usable.all()


def test_poses_are_found(clear, found):
    _, poses = found
    step = sampling.step_deg(everywhere().finest.order)
    error = angle_between_deg(poses.rotation, clear.rotation)
    assert np.median(error) < step and np.quantile(error, 0.9) < 2 * step and error.max() < 4 * step
    # The sign too: origins are up to two pixels either way.
    assert np.abs(poses.origin_px - clear.origin).max() < everywhere().levels[0].shift_step_px
    assert np.abs(clear.origin).max() > 1.9
    assert poses.usable.all() and (poses.log_likelihood > 50).all()


def test_poses_nearby_are_found_within_a_step_or_so():
    particles = Particles(48, noise=0.5)
    _, poses = particles.fold(nearby(), particles.near_the_truth())
    error = angle_between_deg(poses.rotation, particles.rotation)
    assert np.median(error) < sampling.step_deg(6) and error.max() < 2.5 * sampling.step_deg(6)
    before = angle_between_deg(particles.near_the_truth().rotation, particles.rotation)
    assert np.median(before) > 2.5 * np.median(error)
    assert np.abs(poses.origin_px - particles.origin).max() < 0.2


def test_the_sums_make_the_map():
    particles = Particles(200, noise=0.5)
    sums, _ = particles.fold(nearby(5), particles.near_the_truth())
    volume = solve.divide(solve.complete(sums.volume, NOBODY), np.full(16, 1e-3), BOX)
    assert shell_correlation(volume, particles.volume)[:8].min() > 0.93
    assert shell_correlation(volume[::-1], particles.volume)[3:8].mean() < 0.6


def test_weights_of_poses_sum_to_one(noisy):
    """So the weights of all poses' slices add up to those of one slice per particle."""
    particles, sums, poses = noisy
    batch = particles.near_the_truth()
    weights = (batch.ctf[:, : len(PIXELS.kx)] * batch.scale[:, None]) ** 2 / (particles.noise_power[0, 0] / 2)
    assert sums.volume[..., 2].sum(dtype=float) == pytest.approx(weights.sum(dtype=float), rel=1e-4)
    assert poses.significant.min() > 5 and poses.max_probability.max() < 0.9
    assert (poses.max_probability * poses.significant >= 1).all()


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
    _, poses = particles.fold(nearby(5), batch)
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
        _, poses = particles.fold(nearby(5), batch._replace(scale=np.full(16, before)))
        scales.append(poses.scale)
    assert np.abs(np.array(scales) - 1).max() < 0.5
    assert np.ptp(scales, axis=0).max() < 0.3


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("search", [everywhere(), nearby(5)], ids=["global", "local"])
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


@pytest.mark.parametrize("search", [everywhere(), nearby(5)], ids=["global", "local"])
def test_results_do_not_depend_on_batches(clear, search):
    """To the bit, whichever images are scored together."""
    batch = clear.near_the_truth()
    whole = clear.fold(search, batch)
    for cuts in ([0, 1, 8, 9, 24], [0, 7, 14, 21, 24], [0, 8, 16, 24]):
        equal(clear.fold(search, batch, cuts), whole)


def test_local_and_global_search_agree(clear, found):
    """Around the poses that the global search found, on the same finest grid, the local one finds them again."""
    search, (_, poses) = everywhere(), found
    coarse, finest = search.levels[-2:]
    # The offset of the finest shifts is that of a search whose first level is the one before.
    levels = (
        Level(coarse.order, finest.shell, coarse.shift_step_px, 0.0),
        Level(finest.order, finest.shell, finest.shift_step_px, coarse.shift_step_px / 4),
    )
    local = Search(levels, 2 * coarse.shift_step_px, 2.5 * sampling.step_deg(coarse.order), TURN)
    _, again = clear.fold(local, clear.batch._replace(rotation=poses.rotation, origin_px=poses.origin_px))
    # The global search may drop a cell too early, the local one looks at all that are near.
    assert (again.log_likelihood > poses.log_likelihood - 8).all()
    assert np.median(again.log_likelihood - poses.log_likelihood) < 8
    error = angle_between_deg(again.rotation, clear.rotation)
    assert np.median(error) <= 1.1 * np.median(angle_between_deg(poses.rotation, clear.rotation))
    assert np.quantile(error, 0.9) < 2 * sampling.step_deg(finest.order)


def test_a_global_search_needs_its_grid(clear):
    sums = expectation.empty_sums(15, 1, BOX)
    with pytest.raises(ValueError, match="needs the grid"):
        expectation.fold(sums, clear.batch, clear.reference, clear.noise_power, everywhere(), PIXELS, None)


def test_the_grey_scale_of_the_reference_does_not_matter_where_it_is_profiled(clear):
    search, batch = everywhere(profile_scale=True), take(clear.batch, slice(8))
    sums, poses = clear.fold(search, batch)
    brighter, same = clear.fold(search, batch, reference=clear.reference * np.complex64(64))
    equal((brighter, same), (sums, poses))
    error = angle_between_deg(poses.rotation, clear.rotation[:8])
    assert np.median(error) < 1.5 * sampling.step_deg(search.finest.order)
    np.testing.assert_array_equal(poses.scale, np.ones(8))
    # Nothing is said to be explained.
    np.testing.assert_allclose(sums.residual, expectation.power(batch, 1)[0], rtol=1e-6)
    # Where it is not, it does.
    other, _ = clear.fold(everywhere(), batch, reference=clear.reference * np.complex64(64))
    assert np.abs(other.volume - sums.volume).max() > 0.1 * np.abs(sums.volume).max()


def test_optics_groups_have_their_own_noise(noisy):
    particles = noisy[0]
    batch = particles.near_the_truth()
    group = np.arange(64) % 3 % 2  # twice as many of the first
    louder = np.where(group == 1, 2.0, 1.0)
    images = batch.images + (
        particles.noise_sigma * np.sqrt(louder**2 - 1)[:, None, None] * generator(9).standard_normal((64, BOX, BOX))
    ).astype(np.float32)
    noise_power = particles.noise_power * np.array([[1.0], [4.0]])
    sums, poses = particles.fold(nearby(5), batch._replace(images=images, group=group), noise_power=noise_power)
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
    grid = expectation.global_grid(particles.reference, search, group)
    whole = expectation.global_grid(particles.reference, search, NOBODY)
    # A quarter of all views, and the cells that stick out of it.
    assert 0.25 <= len(grid.psi) / len(whole.psi) < 0.4 and len(grid.slices) == len(grid.psi)
    rotations = sampling.rotation_matrices(search.levels[0].order, grid.pixel, grid.psi, TURN)
    pixels = half_plane(search.levels[0].shell)
    np.testing.assert_array_equal(grid.slices, slices.extract(particles.reference, rotations, pixels))
    _, poses = particles.fold(search, group=group)
    step = sampling.step_deg(search.finest.order)
    error = angular_distance_deg(poses.rotation, particles.rotation, group)
    assert np.median(error) < 1.5 * step and error.max() < 4 * step
    assert np.median(angle_between_deg(poses.rotation, particles.rotation)) > 10 * step


def test_power_is_the_mean_square_of_the_transform():
    rng = generator(12)
    images = rng.standard_normal((6, 16, 16)).astype(np.float32)
    images[2, 3, 3] = np.nan
    norm = np.array([1.0, 2.0, 1.0, 0.5, 1.0, 1.0])
    group = np.array([0, 2, 2, 2, 0, 0])
    nothing = np.zeros(6)
    found, count = expectation.power(Batch(images, nothing, group, norm, nothing, nothing, nothing), 3)
    every, expected = half_plane(8), np.zeros((3, 9))
    for row in (0, 1, 3, 4, 5):
        squared = np.abs(np.fft.rfft2(np.fft.ifftshift(images[row]))[every.ky, every.kx] / norm[row]) ** 2
        expected[group[row]] += [squared[every.shell == shell].mean() for shell in range(9)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert count.tolist() == [3, 0, 2]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_back_projection_at_given_poses(clear):
    """C X moved to its origin, with weight C^2; images and CTFs that are not numbers left out."""
    batch = take(clear.batch, slice(5))._replace(
        rotation=clear.rotation[:5], origin_px=clear.origin[:5], norm=np.array([1.0, 2.0, 1.0, 1.0, 0.5])
    )
    images = batch.images.copy()
    images[2, 1, 1] = np.nan
    pixels, volume = half_plane(9), np.zeros((*slices.volume_shape(9), 3), dtype=np.float32)
    transfer = batch.ctf.copy()
    transfer[3, 7] = np.nan
    usable = expectation.back_project(volume, batch._replace(images=images, ctf=transfer), pixels)
    assert usable.tolist() == [True, True, False, False, True]
    expected = np.zeros_like(volume)
    for row in np.flatnonzero(usable):
        packed = pack(pixels, fft.rfft2(batch.images[row] / batch.norm[row]))
        transfer = batch.ctf[row, : len(pixels.kx)]
        image = naive.moved(packed, pixels, batch.origin_px[row], BOX) * transfer
        slices.insert(
            expected, batch.rotation[row][None], image.astype(np.complex64)[None], transfer[None] ** 2, pixels
        )
    np.testing.assert_allclose(volume, expected, atol=1e-5 * np.abs(expected).max())
