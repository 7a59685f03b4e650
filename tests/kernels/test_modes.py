"""Poses climbed to modes of the posterior, against log-likelihoods by definition, their differences and integrals."""

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from dcryo.euler import matrix_from_rotvec
from dcryo.kernels import derivatives, hold, modes, posterior, sampling, slices, solve
from dcryo.kernels.masks import sphere
from dcryo.kernels.modes import Components, Window
from dcryo.kernels.rotations import angle_between_deg, random_rotations
from dcryo.kernels.shells import half_plane
from dcryo.kernels.symmetry import operators

BOX, SHELL = 32, 12
PIXELS = half_plane(SHELL)
COUNT = len(PIXELS.kx)
RADIUS_PX = 9.0
NO_HOLD = np.zeros(6)
NOBODY = operators("C1")
ANYWHERE = Window(30.0, 1000.0, NO_HOLD)
HALF_TURN = np.diag([-1.0, -1.0, 1.0])


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


class Scene:
    """Images that are slices of random blobs, moved, times a CTF that changes sign, and noise that falls with shells.

    noise: root mean square of a pixel's noise over that of its signal; like_its_half_turn: the blobs have all but a
    two-fold axis along z.
    """

    def __init__(self, count, noise, seed=0, like_its_half_turn=False):
        rng = generator(seed)
        direction = rng.standard_normal((12, 3))
        centres = RADIUS_PX * rng.random((12, 1)) ** (1 / 3) * direction / np.linalg.norm(direction, axis=1)[:, None]
        amplitudes = rng.uniform(50, 200, 12)
        if like_its_half_turn:
            centres = np.concatenate([centres, centres @ HALF_TURN])
            amplitudes = np.concatenate([amplitudes, amplitudes * rng.uniform(0.9, 1.1, 12)])
        self.reference = slices.prepare(naive.blob_volume(centres, amplitudes, 1.3, BOX), SHELL)
        self.rotation, self.shift = random_rotations(count, rng), rng.uniform(-1.5, 1.5, (count, 2))
        self.transfer = np.cos(rng.uniform(0.02, 0.06, (count, 1)) * (PIXELS.kx**2 + PIXELS.ky**2) + 0.3)
        pieces = slices.extract(self.reference, self.rotation, PIXELS, BOX)
        signal = [
            transfer * naive.moved(piece, PIXELS, -shift, BOX)
            for transfer, piece, shift in zip(self.transfer, pieces, self.shift, strict=True)
        ]
        level = noise * np.sqrt(np.mean(np.abs(signal) ** 2) / 2)
        self.variance = np.tile(level**2 * (1.5 - PIXELS.shell / SHELL), (count, 1))
        white = rng.standard_normal((count, COUNT)) + 1j * rng.standard_normal((count, COUNT))
        self.images = np.array(signal) + np.sqrt(self.variance) * white
        self.data = (self.transfer * self.images / self.variance).astype(np.complex64)
        self.weights = (self.transfer**2 / self.variance).astype(np.float32)

    def score(self, row, rotation, shift, count=COUNT, scale=1.0, reference=None):
        """Log-likelihood of a pose over that of an empty image, by definition."""
        reference = self.reference if reference is None else reference
        piece = scale * slices.extract(reference, rotation[None], PIXELS, BOX)[0, :count].astype(complex)
        image = naive.moved(self.images[row, :count], PIXELS, shift, BOX)
        known = self.transfer[row, :count], self.variance[row, :count]
        return naive.log_likelihood(image, known[0], piece, known[1]) - naive.log_likelihood(
            image, known[0], 0 * piece, known[1]
        )

    def profiled(self, row, rotation, shift, count=COUNT):
        """The score at the best grey scale: the vertex of a parabola through three, unless it is negative."""
        at = {a: self.score(row, rotation, shift, count, a) for a in (1.0, 2.0)}
        square = at[2.0] / 2 - at[1.0]
        slope = at[1.0] - square
        return max(slope, 0) ** 2 / (-4 * square)

    def scores(self, row, turns, rotation, shifts):
        """Scores of many poses, (N,): rotation vectors (N, 3) from a rotation, and shifts (N, 2)."""
        pieces = slices.extract(self.reference, matrix_from_rotvec(turns) @ rotation, PIXELS, BOX)
        moved = posterior.shift_phases(PIXELS, shifts, BOX, COUNT) * self.data[row]
        cross = np.sum(moved.real * pieces.real + moved.imag * pieces.imag, axis=1, dtype=float)
        return cross - np.abs(pieces) ** 2 @ self.weights[row].astype(float) / 2

    def climb(self, rotations, shifts, window=ANYWHERE, shell=SHELL, profile_scale=False, reference=None, rows=None):
        """Each image from one start; or one image (a row) from all of them."""
        rows = slice(None) if rows is None else slice(rows, rows + 1)
        start = np.arange(len(rotations) + 1) if rows.stop is None else np.array([0, len(rotations)])
        return modes.climb(
            modes.started(rotations, shifts, start),
            derivatives.view(self.reference if reference is None else reference, PIXELS, shell, BOX),
            self.data[rows], self.weights[rows], window, profile_scale,
        )  # fmt: skip


def moved_by(rotation, shift, parameters):
    """A pose moved by (rotation vector, shift)."""
    return matrix_from_rotvec(parameters[:3]) @ rotation, shift + parameters[3:]


def log_prior(window, rotation, shift, centre):
    """Log of the window, its height but for one, and of what it takes off for the hold."""
    away = np.concatenate([naive.rotation_vector(rotation, centre), shift])
    value = -np.sum(away[:3] ** 2) / (2 * window.turn_rad**2) - np.sum(away[3:] ** 2) / (2 * window.shift_px**2)
    height = window.hold[5]
    if height > 0:
        value -= height * np.exp(-np.sum(window.hold[:5] * away**2) / (2 * height))
    return value


def differences(function, steps):
    """Central differences of a function of five parameters about 0."""
    return np.array([(function(step) - function(-step)) / (2 * step.max()) for step in np.diag(steps)])


STEPS = np.array([2e-3, 2e-3, 2e-3, 1e-2, 1e-2])
TOLERANCE = 2e-3


def keep_steady_pixels(scene, row, rotation):
    """Leave out pixels whose taps move on by one within the steps of the differences.

    The kernel jumps by a thousandth there, which differences see and derivatives do not.
    """
    k = np.stack([PIXELS.kx, PIXELS.ky, 0 * PIXELS.kx], axis=1)
    turns = np.concatenate([np.zeros((1, 3)), np.diag(STEPS[:3]), -np.diag(STEPS[:3])])
    places = slices.scale(BOX) * (k @ (matrix_from_rotvec(turns) @ rotation))
    taps = np.floor(np.where(places[..., :1] < 0, -places, places))
    steady = (taps == taps[0]).all(axis=(0, 2))
    assert steady.mean() > 0.7
    for array in (scene.transfer, scene.data, scene.weights):
        array[row, ~steady] = 0


def evaluated(scene, row, rotation, shift, count):
    view = derivatives.view(scene.reference, PIXELS, SHELL, BOX)._replace(used=count)
    work = derivatives.work_space(SHELL)
    for array in work:
        array[:] = np.nan
    derivatives.evaluate(view, rotation, shift, scene.data[row], scene.weights[row], work)
    return work.sums


@pytest.mark.parametrize("shell", [2, 7, SHELL])
def test_sums_are_those_of_numpy_and_their_slopes(shell):
    """Re <Y, S> and <W, |S|^2>, and finite differences of both, at poses that are off."""
    scene, count = Scene(3, noise=1.0), PIXELS.within(shell)
    for row in range(3):
        rotation, shift = moved_by(scene.rotation[row], scene.shift[row], np.array([0.08, -0.05, 0.1, 0.6, -0.4]))
        keep_steady_pixels(scene, row, rotation)

        def both(parameters, row=row, rotation=rotation, shift=shift):
            a, t = moved_by(rotation, shift, parameters)
            piece = slices.extract(scene.reference, a[None], PIXELS, BOX)[0, :count].astype(complex)
            data = naive.moved(scene.data[row, :count].astype(complex), PIXELS, t, BOX)
            return np.array([np.sum((np.conj(data) * piece).real), scene.weights[row, :count] @ np.abs(piece) ** 2])

        sums = evaluated(scene, row, rotation, shift, count)
        np.testing.assert_allclose(sums[:2], both(np.zeros(5)), rtol=2e-5)
        slopes = differences(both, STEPS)
        largest = np.abs(slopes).max(axis=0)
        np.testing.assert_allclose(sums[2:7], slopes[:, 0], atol=TOLERANCE * largest[0])
        # Half of it, as it goes into the score.
        np.testing.assert_allclose(2 * sums[7:10], slopes[:3, 1], atol=TOLERANCE * largest[1])
        np.testing.assert_allclose(slopes[3:, 1], 0, atol=1e-9)


@pytest.mark.parametrize("profile_scale", [False, True])
def test_score_and_gradient_are_those_of_the_log_likelihood(profile_scale):
    scene = Scene(4, noise=1.0, seed=1)
    of_pose = scene.profiled if profile_scale else scene.score
    gradient, hessian = np.empty(5), np.empty((5, 5))
    for row in range(4):
        rotation, shift = moved_by(scene.rotation[row], scene.shift[row], np.array([-0.1, 0.04, 0.07, -0.5, 0.5]))
        keep_steady_pixels(scene, row, rotation)
        sums = evaluated(scene, row, rotation, shift, COUNT)
        score = derivatives.quadratic(sums, profile_scale, gradient, hessian)
        assert score == pytest.approx(of_pose(row, rotation, shift), rel=1e-4)
        slopes = differences(lambda p, pose=(rotation, shift), row=row: of_pose(row, *moved_by(*pose, p)), STEPS)
        np.testing.assert_allclose(gradient, slopes, atol=TOLERANCE * np.abs(slopes).max())


def test_the_hessian_is_that_of_gauss_and_newton():
    """J^T W J of the model that an image at rest is compared with: the slice, moved back by the shift."""
    scene = Scene(3, noise=1.0, seed=2)
    gradient, hessian = np.empty(5), np.empty((5, 5))
    for row in range(3):
        pose = scene.rotation[row], scene.shift[row]
        keep_steady_pixels(scene, row, pose[0])

        def model(parameters, pose=pose):
            a, t = moved_by(*pose, parameters)
            piece = slices.extract(scene.reference, a[None], PIXELS, BOX)[0].astype(complex)
            return naive.moved(piece, PIXELS, -t, BOX)

        jacobian = differences(model, STEPS)
        expected = ((np.conj(jacobian) * scene.weights[row]) @ jacobian.T).real
        derivatives.quadratic(evaluated(scene, row, *pose, COUNT), False, gradient, hessian)
        width = np.sqrt(np.diag(expected))
        np.testing.assert_allclose(hessian / np.outer(width, width), expected / np.outer(width, width), atol=1e-3)
        np.testing.assert_array_equal(hessian, hessian.T)
        # Of the profiled score it is that of the reference at its best grey scale.
        sums = evaluated(scene, row, *pose, COUNT)
        profiled = np.empty((5, 5))
        derivatives.quadratic(sums, True, gradient, profiled)
        np.testing.assert_allclose(profiled, (sums[0] / sums[1]) ** 2 * hessian, rtol=1e-12)


def off(scene, degrees, pixels, seed=5):
    """Starts that are off by so much about each axis, at most."""
    rng, count = generator(seed), len(scene.rotation)
    turn = matrix_from_rotvec(np.deg2rad(rng.uniform(-degrees, degrees, (count, 3))))
    return turn @ scene.rotation, scene.shift + rng.uniform(-pixels, pixels, (count, 2))


# Gauss and Newton's Hessian is as good as the image is clear: of noisy ones some are still on their way up when the
# eight looks are over (a fifth of them by more than 0.2 of log-likelihood).
NOISE_LOSSES = [(0.5, 0.02, 0.1), (2.0, 0.1, 0.6)]


@pytest.mark.parametrize("profile_scale", [False, True])
@pytest.mark.parametrize(("noise", "half", "most"), NOISE_LOSSES)
def test_climbing_reaches_a_pose_that_no_pose_nearby_beats(noise, half, most, profile_scale):
    scene = Scene(12, noise, seed=3)
    climbed = scene.climb(*off(scene, 5, 1), profile_scale=profile_scale)
    of_pose = scene.profiled if profile_scale else scene.score
    covariance = np.linalg.inv(climbed.hessian)
    losses, chi_square = [], []
    for row in range(12):
        pose, spread = (climbed.rotation[row], climbed.shift[row]), np.sqrt(np.diag(covariance[row]))
        # The last step is not looked at.
        assert climbed.score[row] == pytest.approx(of_pose(row, *pose), abs=0.06 if noise < 1 else 0.25)
        found = minimize(
            lambda p, pose=pose, row=row, spread=spread: -of_pose(row, *moved_by(*pose, p * spread)), np.zeros(5),
            method="Nelder-Mead", options={"initial_simplex": 0.5 * np.eye(6, 5), "xatol": 1e-3, "fatol": 1e-3},
        )  # fmt: skip
        losses.append(-found.fun - of_pose(row, *pose))
        away = [naive.rotation_vector(scene.rotation[row], pose[0]), scene.shift[row] - pose[1]]
        chi_square.append(np.concatenate(away) @ climbed.hessian[row] @ np.concatenate(away))
    assert np.median(losses) < half and np.quantile(losses, 0.75) < most
    # What is left of the way to the truth is what the Hessian says; at the start it was a multiple.
    assert 2.5 < np.mean(chi_square) < (8 if noise < 1 else 12)


def test_climbing_looks_at_the_shells_that_it_is_given():
    scene = Scene(4, noise=0.5, seed=4)
    climbed = scene.climb(scene.rotation, scene.shift, shell=5)
    count = PIXELS.within(5)
    for row in range(4):
        pose = climbed.rotation[row], climbed.shift[row]
        assert climbed.score[row] == pytest.approx(scene.score(row, *pose, count), abs=0.1)
        assert abs(climbed.score[row] - scene.score(row, *pose)) > 10


def test_the_scale_of_the_reference_does_not_matter_where_it_is_profiled():
    scene = Scene(6, noise=1.0, seed=5)
    starts = off(scene, 4, 1)
    climbed = scene.climb(*starts, profile_scale=True)
    brighter = scene.climb(*starts, profile_scale=True, reference=scene.reference * np.complex64(64))
    for one, other in zip(climbed, brighter, strict=True):
        np.testing.assert_array_equal(one, other)
    known = scene.climb(*starts, reference=scene.reference * np.complex64(64))
    assert (known.score < climbed.score).all()


@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
@pytest.mark.parametrize("window", [(0.03, 0.5), (0.1, 0.1)])
def test_the_window_and_the_hold_are_a_prior(window, held):
    """The mode of window times likelihood, less the gain of the hold, by a minimiser that sees values alone."""
    scene = Scene(6, noise=1.5 if held else 2.5, seed=6)
    rotations, _ = off(scene, 3, 0)
    force = np.array([100.0, 100.0, 200.0, 1.5, 1.5, 5.0]) if held else NO_HOLD
    climbed = scene.climb(rotations, np.zeros((6, 2)), Window(*window, force))
    np.testing.assert_array_equal(climbed.centre, rotations)
    spread = np.sqrt(np.diagonal(np.linalg.inv(climbed.hessian), axis1=1, axis2=2))
    for row in range(6):
        pose = climbed.rotation[row], climbed.shift[row]

        def loss(p, pose=pose, row=row):
            a, t = moved_by(*pose, p * spread[row])
            return -scene.score(row, a, t) - log_prior(Window(*window, force), a, t, rotations[row])

        found = minimize(
            loss, np.zeros(5), method="Nelder-Mead",
            options={"initial_simplex": 0.5 * np.eye(6, 5), "xatol": 1e-3, "fatol": 1e-3},
        )  # fmt: skip
        assert np.linalg.norm(found.x) < 1.2
        assert loss(np.zeros(5)) - found.fun < 0.3
        # The window matters: without it the mode is another.
        free = scene.climb(rotations, np.zeros((6, 2)))
        assert angle_between_deg(free.rotation[row], pose[0]) > 0.1
        # What is reported is the likelihood alone.
        assert climbed.score[row] == pytest.approx(scene.score(row, *pose), abs=0.4)


@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
def test_an_anchor_is_a_prior_of_its_own_place_and_width(held):
    """The mode of prior, window and likelihood, by a minimiser that sees values alone."""
    scene = Scene(5, noise=2.5, seed=9)
    rotations, _ = off(scene, 2, 0)
    rng = generator(3)
    anchors = matrix_from_rotvec(np.deg2rad(rng.uniform(-3, 3, (5, 3)))) @ rotations
    anchor_shifts = rng.uniform(-1, 1, (5, 2))
    force = np.array([20.0, 20.0, 40.0, 0.4, 0.4, 2.0]) if held else NO_HOLD
    window = Window(0.1, 1.0, force, anchored_rad=0.02, anchored_px=0.2)
    view = derivatives.view(scene.reference, PIXELS, SHELL, BOX)
    every = rotations, np.zeros((5, 2)), np.arange(6)
    climbed = modes.climb(modes.started(*every, anchors, anchor_shifts), view, scene.data, scene.weights, window, False)
    free = modes.climb(modes.started(*every), view, scene.data, scene.weights, window._replace(anchored_rad=np.inf,
        anchored_px=np.inf), False)  # fmt: skip
    spread = np.sqrt(np.diagonal(np.linalg.inv(climbed.hessian), axis1=1, axis2=2))
    for row in range(5):
        pose = climbed.rotation[row], climbed.shift[row]

        def loss(p, pose=pose, row=row):
            a, t = moved_by(*pose, p * spread[row])
            away = np.concatenate([naive.rotation_vector(a, anchors[row]) / 0.02, (t - anchor_shifts[row]) / 0.2])
            return np.sum(away**2) / 2 - scene.score(row, a, t) - log_prior(window, a, t, rotations[row])

        found = minimize(
            loss, np.zeros(5), method="Nelder-Mead",
            options={"initial_simplex": 0.5 * np.eye(6, 5), "xatol": 1e-3, "fatol": 1e-3},
        )  # fmt: skip
        assert np.linalg.norm(found.x) < 1.2
        assert loss(np.zeros(5)) - found.fun < 0.3
        nearer = angle_between_deg(pose[0], anchors[row]) < angle_between_deg(free.rotation[row], anchors[row])
        assert (
            nearer and np.abs(pose[1] - anchor_shifts[row]).sum() < np.abs(free.shift[row] - anchor_shifts[row]).sum()
        )


def test_images_that_are_not_numbers_get_no_finite_score_and_leave_the_others_alone():
    scene = Scene(4, noise=1.0, seed=7)
    starts = off(scene, 3, 0.5)
    clean = scene.climb(*starts)
    scene.data[1, 40] = np.nan
    scene.weights[2, 3] = np.nan
    spoilt = scene.climb(*starts)
    assert np.isfinite(spoilt.log_weight).tolist() == [True, False, False, True]
    for one, other in zip(clean[1:], spoilt[1:], strict=True):
        np.testing.assert_array_equal(one[[0, 3]], other[[0, 3]])


def test_components_climb_alone():
    """To the bit, whichever are climbed together; what was given is left as it was."""
    scene = Scene(5, noise=1.0, seed=8)
    rotations, shifts = off(scene, 4, 1)
    whole = scene.climb(rotations, shifts)
    before = modes.started(rotations, shifts, np.arange(6))
    kept = Components(*(column.copy() for column in before))
    view = derivatives.view(scene.reference, PIXELS, SHELL, BOX)
    modes.climb(before, view, scene.data, scene.weights, ANYWHERE, False)
    for one, other in zip(before, kept, strict=True):
        np.testing.assert_array_equal(one, other)
    for row in range(5):
        alone = scene.climb(rotations[row : row + 1], shifts[row : row + 1], rows=row)
        for one, other in zip(alone[1:], whole[1:], strict=True):
            np.testing.assert_array_equal(one[0], other[row])


def integral(scene, row, mode, window, centre, samples=20000, seed=9):
    """Log of the integral of likelihood times window (of unit mass, as if of flat space) around a mode.

    By importance sampling from the mode's Gaussian, made somewhat wider; mode: (rotation, shift, Hessian).
    """
    rotation, shift, hessian = mode
    rng, root = generator(seed), np.linalg.cholesky(np.linalg.inv(hessian))
    z = 1.25 * rng.standard_normal((samples, 5))
    away = z @ root.T
    log_density = -np.sum(z**2, axis=1) / (2 * 1.25**2) - np.linalg.slogdet(root)[1] - 5 * np.log(1.25)
    scores = scene.scores(row, away[:, :3], rotation, shift + away[:, 3:])
    turns = Rotation.from_matrix(matrix_from_rotvec(away[:, :3]) @ rotation @ centre.T).as_rotvec()
    log_window = -np.sum(turns**2, axis=1) / (2 * window.turn_rad**2) - 3 * np.log(window.turn_rad)
    log_window -= np.sum((shift + away[:, 3:]) ** 2, axis=1) / (2 * window.shift_px**2) + 2 * np.log(window.shift_px)
    # The factors (2 pi)^(5/2) of both densities cancel.
    return np.logaddexp.reduce(scores + log_window - log_density) - np.log(samples)


def curvature(function, widths):
    """Log determinant of the second derivatives of a function of five parameters about 0, by differences."""
    steps = np.diag(widths) / 2
    second = [
        [
            (function(a + b) - function(a - b) - function(b - a) + function(-a - b)) / (4 * a.max() * b.max())
            for b in steps
        ]
        for a in steps
    ]
    return np.linalg.slogdet(second)[1]


def test_the_log_weight_is_the_integral_over_the_mode():
    """But for what Gauss and Newton leave out of the Hessian, the noise times the slice's curvature.

    That makes masses uncertain by a part that falls with the noise; with a Hessian by differences there is none of it.
    """
    window = Window(0.15, 1.5, NO_HOLD)
    for noise, tolerance in ((0.1, 0.15), (0.3, 0.4)):
        scene = Scene(8, noise, seed=10)
        rotations, _ = off(scene, 4, 0)
        climbed = scene.climb(rotations, np.zeros((8, 2)), window)
        for row in range(8):
            pose, hessian = (climbed.rotation[row], climbed.shift[row]), climbed.hessian[row]

            def loss(p, pose=pose, row=row, scene=scene, centre=rotations[row]):
                a, t = moved_by(*pose, p)
                return -scene.score(row, a, t) - log_prior(window, a, t, centre)

            expected = integral(scene, row, (*pose, hessian), window, rotations[row])
            assert climbed.log_weight[row] == pytest.approx(expected, abs=tolerance)
            left_out = (np.linalg.slogdet(hessian)[1] - curvature(loss, np.sqrt(np.diag(np.linalg.inv(hessian))))) / 2
            assert climbed.log_weight[row] + left_out == pytest.approx(expected, abs=0.08)


def test_modes_far_apart_have_the_masses_of_their_surroundings():
    """Of a particle that all but equals itself turned by half: two modes, whose masses differ by some e-folds."""
    scene = Scene(6, noise=2.5, seed=11, like_its_half_turn=True)
    window, shares = Window(0.15, 1.5, NO_HOLD), []
    for row in range(6):
        rotations = np.stack([scene.rotation[row], scene.rotation[row] @ HALF_TURN])
        climbed = scene.climb(rotations, np.zeros((2, 2)), window, rows=row)
        assert angle_between_deg(*climbed.rotation) > 150
        log_masses = [
            integral(scene, row, (climbed.rotation[n], climbed.shift[n], climbed.hessian[n]), window, rotations[n])
            for n in range(2)
        ]
        kept, probability = modes.settled(climbed, NOBODY, 1.0, 1.0, 9)
        expected = np.exp(log_masses - np.logaddexp.reduce(log_masses))
        assert len(probability) == 2 and kept.start.tolist() == [0, 2]
        np.testing.assert_allclose(probability, np.sort(expected)[::-1], atol=0.06)
        shares.append(probability[1])
    assert max(shares) > 0.1


@pytest.mark.parametrize(("noise", "tolerance"), [(0.3, 0.35), (1.5, 0.5)], ids=["narrow", "as wide as windows"])
def test_components_from_a_grid_share_the_posterior_out_and_count_none_of_it_twice(noise, tolerance):
    """Windows of half a step add up to the density of the grid, so all masses to the integral times that.

    To some percent where each mass is an integral; Laplace's approximation to each adds some of its own.
    """
    scene, order, wide = Scene(3, noise, seed=12), 2, Window(9.0, 2.0, NO_HOLD)
    grid = sampling.rotation_matrices(order, *sampling.global_grid(order, operators("C1"), np.eye(3)), np.eye(3))
    window = Window(np.deg2rad(sampling.step_deg(order)) / 2, 2.0, NO_HOLD)
    for row in range(3):
        best = scene.climb(scene.rotation[row : row + 1], scene.shift[row : row + 1], wide, rows=row)
        near = grid[angle_between_deg(grid, best.rotation[0]) < 40]
        climbed = scene.climb(near, np.tile(scene.shift[row], (len(near), 1)), window, rows=row)
        mode = best.rotation[0], best.shift[0], best.hessian[0]
        # The density of rotations, over that of a window that is wide in them.
        density = np.log(len(grid) / (8 * np.pi**2)) + 1.5 * np.log(2 * np.pi) + 3 * np.log(wide.turn_rad)
        expected = integral(scene, row, mode, wide, best.rotation[0]) + density
        assert np.logaddexp.reduce(climbed.log_weight) == pytest.approx(expected, abs=tolerance)
        heavy = np.flatnonzero(climbed.log_weight > climbed.log_weight.max() - 6)
        assert len(heavy) > 15
        own = [
            integral(scene, row, (climbed.rotation[n], climbed.shift[n], climbed.hessian[n]), window, near[n], 2000)
            for n in heavy
        ]
        assert np.logaddexp.reduce(own) == pytest.approx(expected, abs=0.1)
        assert np.median(climbed.log_weight[heavy] - own) == pytest.approx(0, abs=tolerance + 0.15)
        # A few modes where the posterior is narrow, however many have climbed it.
        settled, _ = modes.settled(climbed._replace(start=np.array([0, len(near)])), NOBODY, 1.0, 0.999, 99)
        assert len(settled.rotation) <= 4 or noise > 1


def random_components(counts, seed, spread=0.02):
    """Modes that come in clusters, some of them one mode."""
    rng, total = generator(seed), sum(counts)
    places = random_rotations(3, rng)[rng.integers(0, 3, total)]
    rotation = matrix_from_rotvec(spread * rng.standard_normal((total, 3))) @ places
    root = rng.standard_normal((total, 5, 5)) + 3 * np.eye(5)
    hessian = root @ np.swapaxes(root, 1, 2)
    start = np.concatenate([[0], np.cumsum(counts)])
    components = modes.started(rotation, spread * rng.standard_normal((total, 2)), start)
    return components._replace(
        hessian=hessian, log_weight=rng.uniform(-8, 0, total) - 3000, score=rng.uniform(0, 100, total)
    )


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=4), seed=st.integers(0, 10**6),
    temperature=st.sampled_from([1.0, 3.0]), fraction=st.sampled_from([0.5, 0.9, 0.999, 1.0]),
    maximum=st.sampled_from([1, 3, 32]),
)  # fmt: skip
def test_settling_agrees_with_the_twin(counts, seed, temperature, fraction, maximum):
    components = random_components(counts, seed)
    spoilt = generator(seed + 1).random(sum(counts)) < 0.15
    components.log_weight[spoilt] = np.where(generator(seed + 2).random(spoilt.sum()) < 0.5, np.nan, -np.inf)
    kept, probability = modes.settled(components, NOBODY, temperature, fraction, maximum)
    assert kept.start[0] == 0 and kept.start[-1] == len(probability) == len(kept.rotation)
    for image, count in enumerate(counts):
        rows = np.arange(count) + components.start[image]
        of_image = [
            (components.rotation[n], components.shift[n], components.log_weight[n], components.hessian[n]) for n in rows
        ]
        expected, shares = naive.settled(of_image, temperature, fraction, maximum, modes._SAME)
        own = slice(kept.start[image], kept.start[image + 1])
        for name in ("rotation", "shift", "centre", "score", "hessian"):
            np.testing.assert_array_equal(getattr(kept, name)[own], getattr(components, name)[rows[expected]])
        np.testing.assert_allclose(probability[own], shares, rtol=1e-6)


def test_settling_adds_doubles_and_orders_what_is_left():
    """Two that are one outweigh a better one; a third is too light to be kept."""
    rotations = random_rotations(3, generator(13))[[0, 1, 1, 2]]
    components = modes.started(rotations, np.zeros((4, 2)), np.array([0, 4]))._replace(
        hessian=np.tile(np.eye(5), (4, 1, 1)), log_weight=np.log([0.4, 0.3, 0.29, 0.01])
    )
    kept, probability = modes.settled(components, NOBODY, 1.0, 0.98, 9)
    np.testing.assert_array_equal(kept.rotation, rotations[[1, 0]])
    np.testing.assert_allclose(probability, np.array([0.59, 0.4]) / 0.99)
    # The log-weights are those before the temperature, doubles added.
    np.testing.assert_allclose(kept.log_weight, np.log([0.59, 0.4]))
    hot, probability = modes.settled(components, NOBODY, 2.0, 1.0, 9)
    np.testing.assert_allclose(probability, np.sqrt([0.59, 0.4, 0.01]) / np.sqrt([0.59, 0.4, 0.01]).sum())
    np.testing.assert_allclose(hot.log_weight, np.log([0.59, 0.4, 0.01]))
    assert len(modes.settled(components, NOBODY, 1.0, 1.0, 1)[1]) == 1
    # Half a standard deviation is what makes two of one.
    for distance, count in ((0.45, 1), (0.55, 2)):
        two = modes.started(rotations[:1].repeat(2, axis=0), [[0.0, 0.0], [distance, 0.0]], np.array([0, 2]))
        assert len(modes.settled(two._replace(hessian=np.tile(np.eye(5), (2, 1, 1))), NOBODY, 1.0, 1.0, 9)[1]) == count


def gaussians(count, seed, widths_rad):
    """Components with Hessians whose rotation has these standard deviations, shift correlated with it."""
    rng = generator(seed)
    components = modes.started(random_rotations(count, rng), rng.uniform(-2, 2, (count, 2)), np.arange(count + 1))
    hessians = []
    for _ in range(count):
        axes = random_rotations(1, rng)[0]
        mixing = rng.normal(0, 1.5, (2, 3))
        covariance = np.zeros((5, 5))
        covariance[:3, :3] = axes.T @ np.diag(np.square(widths_rad)) @ axes
        covariance[3:, :3] = mixing @ covariance[:3, :3]
        covariance[:3, 3:] = covariance[3:, :3].T
        covariance[3:, 3:] = mixing @ covariance[:3, :3] @ mixing.T + np.diag([0.2, 0.1])
        hessians.append(np.linalg.inv(covariance))
    return components._replace(hessian=np.array(hessians))


def moments(points, of, component):
    """Mean and covariance of the points of a component, in parameters about its mode."""
    turn = Rotation.from_matrix(points.rotation[of] @ component.rotation[0].T).as_rotvec()
    away = np.concatenate([turn, points.shift[of] - component.shift[0]], axis=1)
    share = points.probability[of] / points.probability[of].sum()
    mean = share @ away
    return mean, (away - mean).T @ ((away - mean) * share[:, None]), share @ points.spread_px2[of]


def test_points_have_the_mean_and_covariance_of_their_components():
    """Where all axes are wide; the shift's own spread about each point is given as its mean over x and y."""
    components = gaussians(6, 14, (0.05, 0.08, 0.12))._replace(start=np.array([0, 2, 2, 6]))
    probability = np.array([0.7, 0.3, 0.4, 0.3, 0.2, 0.1])
    points = modes.cubature(components, probability, radius_px=10.0)
    assert points.start.tolist() == [0, 8, 8, 24]
    np.testing.assert_allclose(np.add.reduceat(points.probability, [0, 8]), 1)
    for n in range(6):
        one = Components(np.array([0, 1]), *(column[n : n + 1] for column in components[1:]))
        of = slice(4 * n, 4 * n + 4)
        np.testing.assert_allclose(points.probability[of], probability[n] / 4)
        mean, covariance, spread = moments(points, of, one)
        expected = np.linalg.inv(one.hessian[0])
        np.testing.assert_allclose(mean, 0, atol=1e-12)
        np.testing.assert_allclose(covariance[:3], expected[:3], atol=1e-10)
        between = covariance[3:, 3:]
        assert np.trace(between) + 2 * spread == pytest.approx(np.trace(expected[3:, 3:]))
        # What is left is the covariance of a shift once the rotation is known.
        assert spread == pytest.approx(np.trace(np.linalg.inv(one.hessian[0, 3:, 3:])) / 2)


@pytest.mark.parametrize("wide", [1, 2])
def test_only_wide_axes_are_split(wide):
    """A width that moves the rim of the slice by a quarter of a pixel at most is left as it is."""
    components, count = gaussians(4, 15, (0.02, 0.05 if wide == 2 else 0.024, 0.06)), wide + 1
    points = modes.cubature(components, np.ones(4), radius_px=10.0)
    assert points.start.tolist() == [n * count for n in range(5)]
    for n in range(4):
        one = Components(np.array([0, 1]), *(column[n : n + 1] for column in components[1:]))
        mean, covariance, _ = moments(points, slice(count * n, count * (n + 1)), one)
        values, axes = np.linalg.eigh(np.linalg.inv(one.hessian[0])[:3, :3])
        expected = axes[:, 3 - wide :] * values[3 - wide :] @ axes[:, 3 - wide :].T
        np.testing.assert_allclose(mean, 0, atol=1e-12)
        np.testing.assert_allclose(covariance[:3, :3], expected, atol=1e-10)
    narrow = modes.cubature(components, np.ones(4), radius_px=4.0)
    assert narrow.start.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(narrow.rotation, components.rotation, atol=1e-15)
    np.testing.assert_allclose(narrow.shift, components.shift, atol=1e-15)
    np.testing.assert_array_equal(narrow.probability, np.ones(4))


def test_no_components_make_no_points():
    empty = modes.started(np.empty((0, 3, 3)), np.empty((0, 2)), np.array([0, 0]))
    points = modes.cubature(empty, np.empty(0), 10.0)
    assert points.start.tolist() == [0, 0] and len(points.rotation) == 0
    assert len(modes.angular_sd_rad(empty)) == 0


def test_the_angular_deviation_is_the_root_mean_square_over_directions():
    components = gaussians(5, 16, (0.02, 0.03, 0.06))
    np.testing.assert_allclose(modes.angular_sd_rad(components), np.sqrt((0.02**2 + 0.03**2 + 0.06**2) / 3))


def test_the_hold_is_the_curvature_of_the_gain():
    """Sum over pixels of 2 h rho(displacement), with the transform of a sphere; for shifts, of cosines."""
    shell, radius = 40, 18.0
    pixels, shares, box = half_plane(shell), np.linspace(0.3, 0.01, shell + 1), 128
    shares[0] = 0
    share = shares[pixels.shell]
    k = np.stack([pixels.kx, pixels.ky, 0 * pixels.kx], axis=1)

    def gain(parameters):
        moved = k @ matrix_from_rotvec(parameters[:3])
        x = 2 * np.pi / box * radius * np.linalg.norm(moved - k, axis=1) + 1e-3
        rho = 3 * (np.sin(x) - x * np.cos(x)) / x**3
        phase = 2 * np.pi / box * (k[:, :2] @ parameters[3:])
        return np.sum(2 * share * rho * np.cos(phase))

    found = hold.hold(shares, radius, box)
    height = gain(np.zeros(5))
    assert found[5] == pytest.approx(height, rel=0.01)
    for n, step in enumerate([0.01, 0.01, 0.01, 0.1, 0.1]):
        away = step * np.eye(5)[n]
        assert found[n] == pytest.approx((2 * height - gain(away) - gain(-away)) / step**2, rel=0.02)


def test_shares_add_up_to_the_degrees_of_freedom_of_the_map():
    fsc = np.concatenate([np.ones(10), np.linspace(1, -0.2, 31)])
    found, shells = hold.shares(fsc, 0.2, 5000), np.arange(41)
    freedom = 2 * np.pi * shells**2 * 0.2 * np.clip(fsc, 0, 1)
    np.testing.assert_allclose(5000 * found * np.pi * shells, freedom)
    # Of one image there is nothing else in the map.
    assert hold.shares(fsc, 0.2, 1).max() == 1 and (found < 0.01).all()


class Held:
    """A reference with the noise of the images themselves in it, back-projected at poses that are off."""

    def __init__(self, count=60, noise=1.0, fsc=0.9):
        self.scene = scene = Scene(count, noise, seed=17)
        # The images lie at their origins, so that poses differ in rotation from the truth, and in shift.
        self.rotations, shifts = off(scene, 4, 0.5, seed=18)
        for row, shift in enumerate(shifts):
            for array in (scene.images, scene.data):
                array[row] = naive.moved(array[row], PIXELS, shift, BOX)
        scene.shift = scene.shift - shifts
        pieces = slices.extract(scene.reference, scene.rotation, PIXELS, BOX)
        clean = [naive.moved(p, PIXELS, -t, BOX) for p, t in zip(pieces, scene.shift, strict=True)]
        noise_of = (scene.data - scene.weights * clean).astype(np.complex64)
        sums = np.zeros((*slices.volume_shape(SHELL, BOX), 3), dtype=np.float32)
        slices.insert(sums, self.rotations, noise_of, scene.weights, PIXELS, BOX)
        sums = solve.complete(sums, operators("C1"))
        precision = solve.prior_precision(np.full(SHELL + 1, fsc), solve.mean_weights(sums, SHELL, BOX))
        mask = sphere(BOX, 2 * RADIUS_PX + 5, 2.0)
        of_noise = mask * solve.maximise(sums, None, precision, operators("C1"), BOX)
        self.reference = scene.reference + slices.prepare(of_noise, SHELL)
        self.shares = hold.shares(np.full(SHELL + 1, fsc), float(np.mean(mask)), count)
        # Share of an image's noise in what a slice of the reference says of it: by regression, per shell.
        held = slices.extract(self.reference - scene.reference, self.rotations, PIXELS, BOX)
        cross = np.sum((np.conj(noise_of) * held).real, axis=0)
        power = np.sum(np.abs(noise_of) ** 2 / scene.weights, axis=0)
        self.measured = np.add.reduceat(cross, PIXELS.start[:-1]) / np.add.reduceat(power, PIXELS.start[:-1])


@pytest.fixture(scope="module")
def held():
    return Held()


def test_an_image_has_its_share_in_the_reference(held):
    np.testing.assert_allclose(held.measured[3:], held.shares[3:], rtol=0.35)
    assert held.measured[3:].sum() == pytest.approx(held.shares[3:].sum(), rel=0.05)


def test_an_image_holds_on_to_its_pose_less_once_the_hold_is_taken_off(held):
    """Poses go towards the truth by a part of the way there: 1 where they reach it, 0 where they stay."""
    scene, start = held.scene, np.zeros((len(held.rotations), 2))
    force = hold.hold(held.shares, RADIUS_PX + 2, BOX)

    def way_gone(hold, reference):
        climbed = scene.climb(held.rotations, start, Window(0.2, 2.0, hold), reference=reference)
        way = [naive.rotation_vector(*pair) for pair in zip(scene.rotation, held.rotations, strict=True)]
        gone = [naive.rotation_vector(*pair) for pair in zip(climbed.rotation, held.rotations, strict=True)]
        turn = np.sum(np.multiply(way, gone)) / np.sum(np.square(way))
        return np.array([turn, np.sum(scene.shift * climbed.shift) / np.sum(scene.shift**2)])

    # Of a reference without their noise poses are found; of one with it they are not.
    assert way_gone(NO_HOLD, scene.reference).min() > 0.8
    stuck, half, freed = (way_gone(part * force, held.reference) for part in (0, 0.5, 1))
    assert (stuck < 0.5).all() and (half > stuck + 0.07).all() and (freed > half + 0.1).all()
    assert (freed > 0.45).all()


def test_symmetry_mates_are_one_mode():
    """Also where a third mode is near to neither."""
    group = operators("D2")
    first, third = random_rotations(2, generator(31))
    blank = modes.started(np.array([first, third, first @ group[2]]), np.zeros((3, 2)), np.array([0, 3]))
    components = blank._replace(log_weight=np.array([1.0, 0.5, 1.0]), hessian=np.tile(1e4 * np.eye(5), (3, 1, 1)))
    kept, probability = modes.settled(components, group, 1.0, 1.0, 9)
    np.testing.assert_array_equal(kept.rotation, [first, third])
    shares = np.array([2 * np.exp(1.0), np.exp(0.5)])
    np.testing.assert_allclose(probability, shares / shares.sum())
    assert len(modes.settled(components, NOBODY, 1.0, 1.0, 9)[1]) == 3


@pytest.mark.parametrize("angle_deg", [0.0, 1e-7, 0.3, 90.0, 179.9, 180.0])
def test_the_turn_between_rotations_is_a_rotation_vector(angle_deg):
    rng = generator(33)
    for second in random_rotations(5, rng):
        axis = rng.standard_normal(3)
        vector = np.deg2rad(angle_deg) * axis / np.linalg.norm(axis)
        out = np.empty(5)
        modes._turn_between(matrix_from_rotvec(vector) @ second, second, out)
        if angle_deg == 180:
            assert np.abs(np.cross(out[:3], vector)).max() < 1e-6 and np.linalg.norm(out[:3]) == pytest.approx(np.pi)
        else:
            np.testing.assert_allclose(out[:3], vector, atol=1e-9)
