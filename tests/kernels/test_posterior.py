import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from dcryo.kernels import fft, posterior, slices
from dcryo.kernels.posterior import Candidates
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
        side = slices.volume_shape(SHELL)[0]
        self.cube = np.fft.rfftn(rng.standard_normal((side,) * 3)).astype(np.complex64) / np.float32(side)
        self.rotations = random_rotations(7, rng)
        self.pieces = slices.extract(self.cube, self.rotations, PIXELS)
        self.transfer = rng.uniform(-1, 1, (images, COUNT)).astype(np.float32)
        self.variance = rng.uniform(0.5, 4, (images, SHELL + 1)).astype(np.float32)[:, PIXELS.shell]
        noise = complex_noise((images, COUNT), seed + 1) * np.sqrt(self.variance)
        self.images = (amplitude * self.transfer * self.pieces[:images] + noise).astype(np.complex64)
        self.weights = self.transfer**2 / self.variance

    def data(self, row, shifts=SHIFTS):
        """Y = C X / v at each shift."""
        moved = [naive.moved(self.images[row], PIXELS, shift, BOX) for shift in shifts]
        return (np.array(moved) * self.transfer[row] / self.variance[row]).astype(np.complex64)

    def score(self, row, shift, rotation, count=COUNT, scale=1.0):
        """Log-likelihood of a pose over that of an empty image."""
        image = naive.moved(self.images[row], PIXELS, shift, BOX)[:count]
        transfer, variance, piece = (
            self.transfer[row, :count],
            self.variance[row, :count],
            self.pieces[rotation, :count],
        )
        empty = naive.log_likelihood(image, transfer, 0 * piece, variance)
        return naive.log_likelihood(image, transfer, scale * piece.astype(complex), variance) - empty

    def best_score(self, row, shift, rotation, count=COUNT):
        """The score maximised over the grey scale of the reference, which is not negative."""
        found = minimize_scalar(
            lambda a: -self.score(row, shift, rotation, count, a), bounds=(0, 20), method="bounded",
            options={"xatol": 1e-7},
        )  # fmt: skip
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


@pytest.mark.parametrize("profile_scale", [False, True])
def test_product_scores_are_log_likelihoods(profile_scale):
    scene = Scene(3, amplitude=2.0)
    shifted = np.array([scene.data(row) for row in range(3)])
    found = posterior.product_scores(scene.pieces, shifted, scene.weights, profile_scale)
    assert found.shape == (3, len(SHIFTS), 7) and found.dtype == np.float32
    of_pose = scene.best_score if profile_scale else scene.score
    expected = [[[of_pose(row, shift, r) for r in range(7)] for shift in SHIFTS] for row in range(3)]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-3)
    assert [np.argmax(scores[0]) for scores in found] == [0, 1, 2]
    assert np.ptp(found) > 20
    if profile_scale:
        assert found.min() == 0  # poses against which the image has the wrong sign


def candidates_of(pairs, lattice):
    """Candidates of (rotation, shift) pairs, sorted; rotation r has grid indices (10 r, 100 r)."""
    rotations = sorted({r for r, _ in pairs})
    start = [0]
    for r in rotations:
        start.append(start[-1] + sum(q == r for q, _ in pairs))
    shift = [t for r in rotations for q, t in sorted(pairs) if q == r]
    as_int = (np.array(a, dtype=np.int64) for a in ([10 * r for r in rotations], [100 * r for r in rotations], lattice,
                                                     start, shift))  # fmt: skip
    return Candidates(*as_int)


PAIRS = [(0, 0), (0, 2), (1, 1), (3, 0), (3, 1), (3, 2), (6, 2)]


@pytest.mark.parametrize("profile_scale", [False, True])
@pytest.mark.parametrize("shell", [3, SHELL])
def test_pair_scores_are_log_likelihoods(profile_scale, shell):
    scene, count = Scene(1, seed=5, amplitude=2.0), PIXELS.within(shell)
    candidates = candidates_of(PAIRS, np.zeros((3, 2)))
    rotations = scene.rotations[[0, 1, 3, 6]]
    shifted = np.ascontiguousarray(scene.data(0)[:, :count])
    found = posterior.pair_scores(scene.cube, rotations, candidates, shifted, scene.weights[0], PIXELS, profile_scale)
    assert found.dtype == np.float32
    of_pose = scene.best_score if profile_scale else scene.score
    expected = [of_pose(0, SHIFTS[t], r, count) for r, t in PAIRS]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-3)


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


pairs_of_ints = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=40, unique=True)


@settings(max_examples=60, deadline=None)
@given(pairs=pairs_of_ints)
def test_grouping_is_a_sort_by_rotation_then_shift(pairs):
    rotation, shift = np.array(pairs, dtype=np.int64).T.copy()
    order, used, start = posterior.group(rotation, shift)
    assert [pairs[i] for i in order] == sorted(pairs)
    assert used.tolist() == sorted({r for r, _ in pairs})
    assert start[0] == 0 and start[-1] == len(pairs) and len(start) == len(used) + 1
    for r, rotation_of_group in enumerate(used):
        assert {pairs[i][0] for i in order[start[r] : start[r + 1]]} == {rotation_of_group}


LATTICE = np.array([[0, 0], [-3, 2], [5, -1], [1, 1], [-2, -2], [0, 4], [7, 0]])


@settings(max_examples=40, deadline=None)
@given(pairs=pairs_of_ints)
def test_children_are_the_cells_of_every_parent(pairs):
    parents = candidates_of(pairs, LATTICE)
    children = posterior.children(parents)
    found = naive.poses(children)
    assert len(found) == 32 * len(pairs)
    assert sorted(found) == sorted(child for pose in naive.poses(parents) for child in naive.children(pose))
    assert len(children.pixel) == 8 * len(parents.pixel) and children.start[-1] == len(children.shift)
    # The rotations of a group are not repeated: each slice is read once.
    assert len(set(zip(children.pixel.tolist(), children.psi.tolist(), strict=True))) == len(children.pixel)


def test_children_of_a_shift_lie_a_quarter_of_a_step_to_either_side():
    """The rule of sampling: index i of a level of step s and offset o stands for s i - o."""
    parents = candidates_of([(0, t) for t in range(len(LATTICE))], LATTICE)
    step, offset = 1.6, 0.3
    places = parents.shifts * step - offset
    children = posterior.children(parents)
    found = (children.shifts * (step / 2) - (offset + step / 4))[children.shift[: 4 * len(LATTICE)]]
    corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * step / 4
    np.testing.assert_allclose(found, np.concatenate([place + corners for place in places]), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(pairs=pairs_of_ints, data=st.data())
def test_keeping_leaves_the_chosen_pairs_alone(pairs, data):
    every = candidates_of(pairs, LATTICE)
    poses = naive.poses(every)
    chosen = data.draw(st.lists(st.integers(0, len(poses) - 1), min_size=1, unique=True))
    kept, order = posterior.keep(every, np.array(chosen, dtype=np.int64))
    assert naive.poses(kept) == [poses[chosen[i]] for i in order]
    assert sorted(order.tolist()) == list(range(len(chosen)))
    rotations = [pose[:2] for pose in naive.poses(kept)]
    assert rotations == sorted(rotations) and len(kept.pixel) == len(set(rotations))
    # Shifts that no pair uses any more cost nothing further on.
    assert sorted(set(kept.shift.tolist())) == list(range(len(kept.shifts)))


def test_accumulate_is_a_sum_over_poses():
    scene, wide = Scene(1, seed=9), slices.volume_shape(SHELL + 2)
    candidates = candidates_of(PAIRS, np.zeros((3, 2)))
    rows = [0, 1, 3, 6]
    weights = generator(3).random(len(PAIRS))
    weights /= weights.sum()
    shifted = scene.data(0)
    start = generator(4).standard_normal((*wide, 3)).astype(np.float32)
    accumulator = start.copy()
    fit = posterior.accumulate(
        accumulator, scene.cube, scene.rotations[rows], candidates, weights, shifted, scene.weights[0], PIXELS
    )
    expected, expected_fit = np.zeros((*wide, 3), dtype=np.float32), np.zeros((2, SHELL + 1))
    for weight, (r, t) in zip(weights, PAIRS, strict=True):
        slices.insert(
            expected, scene.rotations[r : r + 1], (weight * shifted[t : t + 1]).astype(np.complex64),
            (weight * scene.weights[:1]).astype(np.float32), PIXELS,
        )  # fmt: skip
        piece = scene.pieces[r].astype(complex)
        expected_fit[0] += weight * shell_sums((np.conj(shifted[t]) * piece).real, PIXELS.start)
        expected_fit[1] += weight * shell_sums(scene.weights[0] * np.abs(piece) ** 2, PIXELS.start)
    np.testing.assert_allclose(accumulator, start + expected, atol=1e-5)
    assert fit.dtype == np.float64
    np.testing.assert_allclose(fit, expected_fit, rtol=1e-5, atol=1e-5)
