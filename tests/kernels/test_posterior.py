import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from dcryo.kernels import fft, posterior, slices
from dcryo.kernels.modes import Points
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.shells import half_plane, pack, shell_sums

BOX, SHELL = 16, 5
PIXELS = half_plane(SHELL)
COUNT = len(PIXELS.kx)
SHIFTS = np.array([[0.0, 0.0], [1.5, -0.25], [-2.0, 3.0]])


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def complex_noise(shape, seed):
    rng = generator(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


class Scene:
    """Images of slices of a random volume: X = a C S + noise, with a CTF that changes sign and coloured noise."""

    def __init__(self, images, seed=0, amplitude=1.0):
        rng = generator(seed)
        self.reference = slices.prepare(rng.standard_normal((BOX,) * 3) / BOX, SHELL)
        self.rotations = random_rotations(7, rng)
        self.pieces = slices.extract(self.reference, self.rotations, PIXELS, BOX)
        self.transfer = rng.uniform(-1, 1, (images, COUNT)).astype(np.float32)
        self.variance = rng.uniform(0.5, 4, (images, SHELL + 1)).astype(np.float32)[:, PIXELS.shell]
        noise = complex_noise((images, COUNT), seed + 1) * np.sqrt(self.variance)
        self.images = (amplitude * self.transfer * self.pieces[:images] + noise).astype(np.complex64)
        # As of real images; at the very grid point the kernel is not even, by a thousandth.
        self.images[:, 0] = self.images[:, 0].real
        self.weights = self.transfer**2 / self.variance

    def data(self, row, shifts=SHIFTS):
        """Y = C X / v at each shift."""
        moved = [naive.moved(self.images[row], PIXELS, shift, BOX) for shift in shifts]
        return (np.array(moved) * self.transfer[row] / self.variance[row]).astype(np.complex64)

    def score(self, row, shift, piece, scale=1.0):
        """Log-likelihood of a pose over that of an empty image."""
        image = naive.moved(self.images[row], PIXELS, shift, BOX)[: len(piece)]
        transfer, variance = self.transfer[row, : len(piece)], self.variance[row, : len(piece)]
        empty = naive.log_likelihood(image, transfer, 0 * piece, variance)
        return naive.log_likelihood(image, transfer, scale * piece.astype(complex), variance) - empty

    def best_score(self, row, shift, piece):
        """The score maximised over the grey scale of the reference, which is not negative."""
        found = minimize_scalar(
            lambda a: -self.score(row, shift, piece, a), bounds=(0, 20), method="bounded", options={"xatol": 1e-7}
        )
        return max(-found.fun, 0.0)


@pytest.mark.parametrize("box", [15, 16])
def test_shift_phases_move_an_image(box):
    pixels = half_plane(box // 2 - 1)
    image = generator(1).standard_normal((box, box)).astype(np.float32)
    moved = np.roll(image, (-2, 3), axis=(0, 1))  # 3 to the right, 2 towards the first row
    phases = posterior.shift_phases(pixels, np.array([[3, -2], [0, 0]]), box, len(pixels.kx))
    assert phases.dtype == np.complex64
    packed = pack(pixels, fft.rfft2(image))
    np.testing.assert_allclose(packed * phases[0], pack(pixels, fft.rfft2(moved)), atol=1e-4)
    np.testing.assert_array_equal(phases[1], np.ones(len(pixels.kx)))


def test_shift_phases_take_parts_of_pixels_and_a_prefix():
    shifts = generator(2).uniform(-9, 9, (5, 2))
    count = PIXELS.within(3)
    found = posterior.shift_phases(PIXELS, shifts, BOX, count)
    expected = [naive.moved(np.ones(COUNT), PIXELS, shift, BOX)[:count] for shift in shifts]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("box", [15, 16])
def test_weighing_is_the_likelihoods_pixel_by_pixel(box):
    """Y = C X / v moved to the origin, W = C^2 / v, and the power of every shell of the image."""
    rng, pixels, every = generator(20), half_plane(5), half_plane(box // 2)
    count = len(pixels.kx)
    images = rng.standard_normal((3, box, box)).astype(np.float32)
    norm, origin = np.array([1.0, 2.0, 0.5]), rng.uniform(-3, 3, (3, 2))
    transfer = rng.uniform(-1, 1, (3, count)).astype(np.float32)
    variance = rng.uniform(0.5, 4, (3, 6))
    found = posterior.weigh(fft.rfft2(images), norm, transfer, (1 / variance).astype(np.float32), origin, pixels, every)
    for row in range(3):
        packed = pack(every, fft.rfft2(images[row])) / norm[row]
        of_pixel = variance[row][pixels.shell]
        data = naive.moved(packed[:count], pixels, origin[row], box) * transfer[row] / of_pixel
        np.testing.assert_allclose(found.data[row], data, atol=1e-5 * np.abs(data).max())
        np.testing.assert_allclose(found.weight[row], transfer[row] ** 2 / of_pixel, rtol=1e-6)
        power = [np.mean(np.abs(packed[every.shell == shell].astype(complex)) ** 2) for shell in range(box // 2 + 1)]
        np.testing.assert_allclose(found.power[row], power, rtol=1e-5)


@pytest.mark.parametrize("profile_scale", [False, True])
@pytest.mark.parametrize("shell", [3, SHELL])
def test_grid_scores_are_log_likelihoods_at_the_best_shift(profile_scale, shell):
    """Of every rotation and of the same turned by 180 degrees in the plane, read from the reference here."""
    scene, count = Scene(3, amplitude=2.0), PIXELS.within(shell)
    shifted = np.array([scene.data(row) for row in range(3)])[:, :, :count]
    pieces = np.ascontiguousarray(scene.pieces[:, :count])
    found, place = posterior.grid_scores(pieces, shifted, scene.weights[:, :count], profile_scale)
    assert found.shape == (3, 14) and found.dtype == np.float32 and place.dtype == np.int64
    turned = slices.extract(scene.reference, np.diag([-1, -1, 1]) @ scene.rotations, PIXELS, BOX)
    every = np.concatenate([scene.pieces, turned])[:, :count]
    of_pose = scene.best_score if profile_scale else scene.score
    expected = np.array([[[of_pose(row, t, piece) for t in SHIFTS] for piece in every] for row in range(3)])
    np.testing.assert_allclose(found, expected.max(axis=2), rtol=2e-4, atol=2e-3)
    # Where more than one shift has the wrong sign, the profiled score is 0 at all of them.
    np.testing.assert_array_equal(place[found > 0.01], expected.argmax(axis=2)[found > 0.01])
    assert [np.argmax(scores) for scores in found] == [0, 1, 2] and len(np.unique(place)) == len(SHIFTS)
    assert found.max() > 20
    if profile_scale:
        assert found.min() >= 0


def test_grid_scores_find_an_image_turned_by_180_degrees_in_the_plane():
    scene = Scene(1)
    image = scene.transfer[0] * np.conj(scene.pieces[4]) * posterior.shift_phases(PIXELS, -SHIFTS[2:], BOX, COUNT)[0]
    scene.images = image.astype(np.complex64)[None]
    scores, place = posterior.grid_scores(scene.pieces, scene.data(0)[None], scene.weights, False)
    assert np.argmax(scores[0]) == 7 + 4 and place[0, 7 + 4] == 2


def test_images_that_are_not_numbers_have_scores_that_are_not():
    """And leave the others' alone, to the bit."""
    scene = Scene(3)
    shifted = np.array([scene.data(row) for row in range(3)])
    clean, clean_place = posterior.grid_scores(scene.pieces, shifted, scene.weights, False)
    shifted[1, 2, 7] = np.nan
    scores, place = posterior.grid_scores(scene.pieces, shifted, scene.weights, False)
    assert np.isnan(scores[1]).all()
    np.testing.assert_array_equal(scores[[0, 2]], clean[[0, 2]])
    np.testing.assert_array_equal(place[[0, 2]], clean_place[[0, 2]])


def scores_of(kind, n=3000):
    rng = generator(7)
    return {
        "random": 3 * rng.standard_normal(n),
        "wide": 40 * rng.standard_normal(n),
        "flat": np.full(n, -3.0),
        "nearly flat": 1e-3 * rng.standard_normal(n),
        "tied": rng.integers(-4, 1, n).astype(float),
        "peaked": np.where(np.arange(n) == n // 3, 0.0, -500.0 + rng.standard_normal(n)),
        "two peaks": np.where(np.arange(n) % (n // 2) == 7, 1e4, 1e4 - 300),
        "one": np.array([-2.5]),
    }[kind].astype(np.float32)


@pytest.mark.parametrize("kind", ["random", "wide", "flat", "nearly flat", "tied", "peaked", "two peaks", "one"])
@pytest.mark.parametrize(("fraction", "maximum"), [(0.999, 10**6), (0.5, 10**6), (0.999, 40), (1.0, 1), (0.9, 2900)])
def test_select_is_a_sort_and_a_cut(kind, fraction, maximum):
    scores = scores_of(kind)
    index, weights = posterior.select(scores, fraction, maximum)
    expected, expected_weights = naive.select(scores, fraction, maximum)
    assert index.dtype == np.int64 and weights.dtype == np.float64
    # Sums of thousands of rounded weights may differ by the last pose.
    assert abs(len(index) - len(expected)) <= (1 if len(expected) > 100 and maximum == 10**6 else 0)
    n = min(len(index), len(expected))
    assert index[:n].tolist() == expected[:n]
    np.testing.assert_allclose(weights[:n], expected_weights[:n], rtol=1e-3 if len(index) != len(expected) else 1e-6)
    assert weights.sum() == pytest.approx(1, abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    scores=st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=60),
    fraction=st.floats(0.1, 0.9999),
    maximum=st.integers(1, 80),
    offset=st.sampled_from([0.0, -3000.0, 5000.0]),
)
def test_select_holds_the_fraction_and_no_more(scores, fraction, maximum, offset):
    scores = (np.array(scores) + offset).astype(np.float32)
    index, weights = posterior.select(scores, fraction, maximum)
    assert 1 <= len(index) <= maximum and len(set(index.tolist())) == len(index)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert index.tolist() == order[: len(index)]
    mass = np.exp(scores.astype(float) - scores.max())
    np.testing.assert_allclose(weights, mass[index] / mass[index].sum(), rtol=1e-9)
    total = mass.sum()
    assert len(index) == maximum or mass[index].sum() >= (fraction - 1e-6) * total
    assert len(index) == 1 or mass[index[:-1]].sum() <= (fraction + 1e-6) * total


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_select_takes_nothing_where_scores_are_not_numbers(spoilt):
    index, weights = posterior.select(np.array([1.0, spoilt, 2.0], dtype=np.float32), 0.999, 9)
    assert len(index) == len(weights) == 0 and index.dtype == np.int64


def points_of(scene, counts, seed=3):
    """Points of images, so many of each: rotations of the scene, shifts, spreads from none to two pixels."""
    rng, total = generator(seed), sum(counts)
    start = np.concatenate([[0], np.cumsum(counts)])
    mass = rng.uniform(0.1, 1, total)
    owner = np.repeat(np.arange(len(counts)), counts)
    probability = mass / np.bincount(owner, mass, len(counts))[owner]
    rotations = scene.rotations[np.arange(total) % len(scene.rotations)]
    return Points(start, rotations, rng.uniform(-3, 3, (total, 2)), np.linspace(0, 2, total) ** 2, probability), owner


@pytest.mark.parametrize("innovation", [False, True])
def test_accumulate_is_a_sum_over_points(innovation):
    """An image blurred by what its shift is spread by, less the slice; the second image has no point."""
    scene = Scene(3, seed=9)
    points, owner = points_of(scene, [4, 0, 3])
    data = scene.transfer * scene.images / scene.variance
    start = generator(4).standard_normal((*slices.volume_shape(SHELL, BOX), 3)).astype(np.float32)
    accumulator = start.copy()
    fit = posterior.accumulate(accumulator, scene.reference, points, data, scene.weights, PIXELS, BOX, innovation)
    pieces = slices.extract(scene.reference, points.rotation, PIXELS, BOX).astype(complex)
    values, weights, expected_fit = [], [], np.zeros((3, 2, SHELL + 1))
    for piece, shift, spread, probability, row in zip(
        pieces, points.shift, points.spread_px2, points.probability, owner, strict=True
    ):
        # Of a shell, whose number stands for the radii of its pixels.
        blur = np.exp(-spread * (2 * np.pi * PIXELS.shell / BOX) ** 2 / 2)
        image = probability * blur * naive.moved(data[row].astype(complex), PIXELS, shift, BOX)
        weight = probability * scene.weights[row]
        expected_fit[row, 0] += shell_sums((np.conj(image) * piece).real, PIXELS.start)
        expected_fit[row, 1] += shell_sums(weight * np.abs(piece) ** 2, PIXELS.start)
        values.append(image - weight * piece if innovation else image)
        weights.append(weight)
    expected = np.zeros_like(start)
    slices.insert(expected, points.rotation, np.array(values, np.complex64), np.array(weights, np.float32), PIXELS, BOX)
    np.testing.assert_allclose(accumulator, start + expected, atol=3e-6 * np.abs(expected).max())
    assert fit.dtype == np.float64 and not fit[1].any()
    np.testing.assert_allclose(fit, expected_fit, rtol=1e-5, atol=1e-5)


def test_innovations_of_images_that_are_their_slices_are_nothing():
    """Without spread or noise; the weights are those of the images all the same."""
    scene = Scene(3, seed=10)
    points = Points(np.arange(4), scene.rotations[:3], np.zeros((3, 2)), np.zeros(3), np.ones(3))
    images = (scene.weights * scene.pieces[:3]).astype(np.complex64)
    sums = [np.zeros((*slices.volume_shape(SHELL, BOX), 3), dtype=np.float32) for _ in range(2)]
    fits = [
        posterior.accumulate(of, scene.reference, points, images, scene.weights, PIXELS, BOX, innovation)
        for of, innovation in zip(sums, (False, True), strict=True)
    ]
    assert np.abs(sums[1][..., :2]).max() < 1e-5 * np.abs(sums[0][..., :2]).max()
    np.testing.assert_array_equal(sums[0][..., 2], sums[1][..., 2])
    np.testing.assert_array_equal(*fits)
    # Such an image is fitted to the full.
    np.testing.assert_allclose(fits[0][:, 0], fits[0][:, 1], rtol=1e-5)


def test_the_blur_is_the_mean_over_a_gaussian_of_shifts():
    """Of both parts, by Gauss-Hermite quadrature over shifts; within a shell its number stands for the radius."""
    scene, spread = Scene(1, seed=11), 0.6**2
    nodes, shares = np.polynomial.hermite_e.hermegauss(12)
    x, y = (np.sqrt(spread) * a.ravel() for a in np.meshgrid(nodes, nodes))
    probability = np.outer(shares, shares).ravel() / shares.sum() ** 2
    data = scene.transfer * scene.images / scene.variance
    many = Points(
        np.array([0, 144]), np.repeat(scene.rotations[:1], 144, axis=0), np.stack([x, y], axis=1) + 0.3,
        np.zeros(144), probability,
    )  # fmt: skip
    one = Points(np.array([0, 1]), scene.rotations[:1], np.full((1, 2), 0.3), np.array([spread]), np.ones(1))
    sums = [np.zeros((*slices.volume_shape(SHELL, BOX), 3), dtype=np.float32) for _ in range(2)]
    for of, points in zip(sums, (many, one), strict=True):
        posterior.accumulate(of, scene.reference, points, data, scene.weights, PIXELS, BOX, False)
    # The radius lies within half a shell of its number: the blur within sigma^2 (2 pi / D)^2 s / 2 of it.
    np.testing.assert_allclose(sums[1], sums[0], atol=0.05 * np.abs(sums[0]).max())
    unblurred = np.zeros_like(sums[0])
    posterior.accumulate(
        unblurred, scene.reference, one._replace(spread_px2=np.zeros(1)), data, scene.weights, PIXELS, BOX, False
    )
    assert np.linalg.norm(sums[1] - sums[0]) < 0.15 * np.linalg.norm(unblurred - sums[0])


def test_images_add_up_whichever_are_accumulated_together():
    scene = Scene(3, seed=12)
    points, owner = points_of(scene, [2, 3, 1])
    data = (scene.transfer * scene.images / scene.variance).astype(np.complex64)
    whole = np.zeros((*slices.volume_shape(SHELL, BOX), 3), dtype=np.float32)
    parts = whole.copy()
    fit = posterior.accumulate(whole, scene.reference, points, data, scene.weights, PIXELS, BOX, True)
    for row in range(3):
        own = owner == row
        of_row = Points(np.array([0, own.sum()]), *(column[own] for column in points[1:]))
        of_fit = posterior.accumulate(
            parts, scene.reference, of_row, data[row : row + 1], scene.weights[row : row + 1], PIXELS, BOX, True
        )
        np.testing.assert_array_equal(of_fit[0], fit[row])
    np.testing.assert_array_equal(parts, whole)
