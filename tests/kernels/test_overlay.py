import naive
import naive_alignment
import numpy as np
import pytest

from dcryo.euler import matrix_from_rotvec
from dcryo.kernels import overlay
from dcryo.kernels.alignment import Correlator
from dcryo.kernels.overlay import half_ball
from dcryo.kernels.randomness import generator
from dcryo.kernels.rotations import random_rotations

BOX, SHELL = 20, 6


def blobs(seed, count=9):
    """Centres (N, 3) in px and weights of blobs without any symmetry, well inside of the box."""
    random = generator(seed, "blobs", 0)
    return random.uniform(-4.5, 4.5, (count, 3)), random.uniform(0.5, 2, count)


@pytest.fixture(scope="module")
def pair():
    """Two volumes that agree in part, and a move that does not make them agree much better."""
    random = generator(0, "pair", 0)
    centres, weights = blobs(1)
    first = naive.blob_volume(centres, weights, 1.2, BOX)
    second = naive.blob_volume(centres + random.normal(0, 0.8, centres.shape), weights, 1.2, BOX)
    return first, second, random_rotations(1, random)[0], random.uniform(-1, 1, 3)


def test_half_ball_holds_one_of_each_pair_of_frequencies_by_shell():
    ball = half_ball(SHELL)
    held = [tuple(int(part) for part in k) for k in ball.frequencies]
    assert len(held) == len(set(held)) and set(held) == naive_alignment.frequencies(SHELL)
    for shell in range(SHELL + 1):
        assert all(naive.shell_of(*k) == shell for k in held[ball.start[shell] : ball.start[shell + 1]])
    assert ball.within(3) == len(naive_alignment.frequencies(3))


@pytest.mark.parametrize("sign", [1, -1])
def test_turned_values_are_those_of_the_turned_volume(pair, sign):
    first, _, rotation, _ = pair
    ball = half_ball(SHELL)
    found = overlay.turned(overlay.turnable(first, SHELL), sign * rotation[None], ball.frequencies)[0]
    expected = naive_alignment.transform(first, sign * rotation, np.zeros(3), ball.frequencies)
    np.testing.assert_allclose(found, expected, atol=3e-3 * np.abs(expected).max())


def test_correlations_per_shell(pair):
    first, second, _, _ = pair
    ball = half_ball(SHELL)
    a, b = overlay.sampled(first, SHELL), overlay.sampled(second, SHELL)
    found = overlay.shell_correlations(a, b, ball.start)
    np.testing.assert_allclose(found[1:], naive.shell_correlation(first, second)[1 : SHELL + 1], atol=1e-5)
    assert found[0] == 0


def evaluated(pair, sign, small, shift):
    """Information, gradient and Hessian of the fast kernel after a small turn of the pair's move."""
    first, second, rotation, _ = pair
    ball = half_ball(SHELL)
    onto = overlay.sampled(second, SHELL)
    gradient, hessian = np.empty(6), np.empty((6, 6))
    value = overlay._evaluate(
        overlay.turnable(first, SHELL), overlay._small_turn(small) @ (sign * rotation), shift, ball.frequencies,
        ball.start, SHELL, onto, overlay.shell_power(onto, ball.start), gradient, hessian,
    )  # fmt: skip
    return value, gradient, hessian


@pytest.mark.parametrize("sign", [1, -1])
def test_information_is_that_of_the_correlations(pair, sign):
    first, second, rotation, shift = pair
    k = half_ball(SHELL).frequencies
    there = naive_alignment.transform(first, sign * rotation, shift, k)
    onto = naive_alignment.transform(second, np.eye(3), np.zeros(3), k)
    curve, counts = naive_alignment.correlations(there, onto, k, SHELL)
    found = evaluated(pair, sign, np.zeros(3), shift)[0]
    assert found == pytest.approx(naive_alignment.information(curve, counts), rel=2e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_is_the_slope_of_the_information(pair, sign):
    shift = pair[3]
    _, gradient, _ = evaluated(pair, sign, np.zeros(3), shift)
    step = 2e-3
    for parameter in range(6):
        values = []
        for move in (-step, step):
            change = np.zeros(6)
            change[parameter] = move
            values.append(evaluated(pair, sign, change[:3], shift + change[3:])[0])
        slope = (values[1] - values[0]) / (2 * step)
        assert gradient[parameter] == pytest.approx(slope, abs=0.01 * np.abs(gradient).max())


def test_hessian_is_that_of_gauss_and_newton(pair):
    """Sums of products of the transform's derivatives, those by finite differences of its definition."""
    first, second, rotation, shift = pair
    k = half_ball(SHELL).frequencies
    step, slopes = 1e-4, []
    for parameter in range(6):
        change = np.zeros((2, 6))
        change[:, parameter] = -step, step
        behind, ahead = (
            naive_alignment.transform(first, matrix_from_rotvec(c[:3]) @ rotation, shift + c[3:], k) for c in change
        )
        slopes.append((ahead - behind) / (2 * step))
    slopes = np.array(slopes)
    here, onto = naive_alignment.transform(first, rotation, shift, k), overlay.sampled(second, SHELL)
    curve, counts = naive_alignment.correlations(here, onto, k, SHELL)
    shells = np.array([naive.shell_of(*one) for one in k.astype(int)])
    expected = np.zeros((6, 6))
    for shell, (c, count) in enumerate(zip(curve, counts, strict=True), start=1):
        at = shells == shell
        c = max(c, 0.1)
        sure = min(c, 0.95)
        along = (slopes[:, at] @ here[at].conj()).real / np.sum(abs(here[at]) ** 2)
        across = slopes[:, at] - along[:, None] * here[at]
        weight = 2 * count * sure / (1 - sure**2) * c / np.sum(abs(here[at]) ** 2)
        expected += weight * (across @ across.conj().T).real
    found = evaluated(pair, 1, np.zeros(3), shift)[2]
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())
    assert np.linalg.eigvalsh(found).min() > 0


def test_gain_is_odd_and_its_slope_continuous():
    counts = 7
    for c in (-0.99, -0.3, 0.2, 0.9499, 0.9501, 1.0):
        value, slope = overlay.gain(c, counts)
        assert overlay.gain(-c, counts)[0] == -value
        assert slope == pytest.approx(
            (overlay.gain(c + 1e-6, counts)[0] - overlay.gain(c - 1e-6, counts)[0]) / 2e-6, rel=1e-3
        )
    assert overlay.gain(0.5, 10)[0] == pytest.approx(-10 * np.log(0.75))


@pytest.mark.parametrize("sign", [1, -1])
def test_climb_ends_at_the_true_move(pair, sign):
    first, _, rotation, shift = pair
    centres, weights = blobs(1)
    second = naive.blob_volume(sign * centres @ rotation.T + shift, weights, 1.2, BOX)
    start = overlay._small_turn(np.array([0.15, -0.1, 0.12])) @ (sign * rotation)
    turns, shifts, reached = overlay.climb(
        overlay.turnable(first, SHELL), overlay.sampled(second, SHELL), start[None], np.zeros((1, 3)), SHELL,
        half_ball(SHELL), 40,
    )  # fmt: skip
    assert np.abs(turns[0] - sign * rotation).max() < 2e-3
    assert np.abs(shifts[0] - shift).max() < 0.01
    np.testing.assert_allclose(turns[0] @ turns[0].T, np.eye(3), atol=1e-9)
    assert reached[0] > evaluated((first, second, rotation, shift), sign, np.zeros(3), np.zeros(3))[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_best_shift_is_the_peak_of_the_whitened_correlation(pair, sign):
    first, second, rotation, _ = pair
    shell = 4
    source, ball = overlay.turnable(first, SHELL), half_ball(SHELL)
    used = ball.within(shell)
    correlator = Correlator(source, overlay.sampled(second, SHELL), ball, shell)
    values = overlay.turned(source, sign * rotation[None], ball.frequencies[:used])
    highest, shift = correlator.best(values)
    k = ball.frequencies[:used].astype(float)
    first_values, second_values = values[0].astype(complex), overlay.sampled(second, SHELL)[:used].astype(complex)
    expected = naive_alignment.best_shift(first_values, second_values, k, shell, correlator._size, BOX)
    np.testing.assert_allclose(shift[0], expected[1], atol=1e-6)
    # Twice the sum over the half ball, over the voxels of the small box; power as on the grid, not as turned.
    assert highest[0] == pytest.approx(2 * expected[0] / correlator._size**3, rel=0.1)
