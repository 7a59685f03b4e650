import numpy as np
import pytest
from averages import BOX, DIAMETER_PX, compared, projections, views

from dcryo.euler import matrix_from_rotvec
from dcryo.kernels import common_lines, sampling
from dcryo.kernels.common_lines import LINES
from dcryo.kernels.randomness import generator
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.symmetry import operators

SHELL = 7


def line_of(image, angle, radii):
    """A line of the transform of an image about its centre, by its definition."""
    y, x = np.mgrid[: len(image), : len(image)] - len(image) // 2
    along = x * np.cos(angle) + y * np.sin(angle)
    return np.array([np.sum(image * np.exp(-2j * np.pi * r * along / len(image))) for r in radii])


@pytest.mark.parametrize("box", [32, 33])
def test_lines_are_those_of_the_transform_each_radius_with_the_same_power(box):
    images = projections("C1", views(3), box=box)
    found = common_lines.lines(images, SHELL, DIAMETER_PX)
    assert found.shape == (3, 2 * LINES, SHELL) and found.dtype == np.complex64
    np.testing.assert_allclose(np.mean(np.abs(found) ** 2, axis=(0, 1)), 1, rtol=1e-4)
    np.testing.assert_allclose(found[:, LINES:], found[:, :LINES].conj(), atol=1e-6)
    angles, radii = np.arange(0, 2 * LINES, 7), np.arange(1, SHELL + 1)
    direct = np.array([[line_of(image, np.pi * a / LINES, radii) for a in angles] for image in images])
    every = np.array([[line_of(image, np.pi * a / LINES, radii) for a in range(LINES)] for image in images])
    direct /= np.sqrt(np.mean(np.abs(every) ** 2, axis=(0, 1)))
    assert np.linalg.norm(found[:, angles] - direct) < 0.02 * np.linalg.norm(direct)


def test_lines_of_moved_images_are_moved_lines():
    rotations, origins = views(4), np.array([[2.0, -1.0], [0.5, 1.5], [-2.0, 0.0], [1.0, 1.0]])
    still, off = (
        common_lines.lines(projections("C1", rotations, origin), SHELL, DIAMETER_PX) for origin in (None, origins)
    )
    found = common_lines.moved(off, origins, BOX)
    assert np.linalg.norm(found - still) < 0.1 * np.linalg.norm(still)
    assert np.linalg.norm(off - still) > 0.5 * np.linalg.norm(still)


def test_lines_are_compared_at_the_best_shift():
    lines = common_lines.lines(projections("C1", views(3), noise=0.5), SHELL, DIAMETER_PX)
    table = common_lines.likeness(lines, BOX, 2.0, 0.5)
    assert table.shape == (3, 3, LINES, 2 * LINES)
    radii, random = np.arange(1, SHELL + 1), generator(0, "lines that are looked at", 0)
    for _ in range(50):
        i, j, b, a = random.integers((3, 3, LINES, 2 * LINES))
        one, other = lines[i, a], lines[j, b]
        each = [
            np.sum(one.conj() * other * np.exp(-2j * np.pi * radii * shift / BOX)).real
            for shift in np.arange(-2, 2.01, 0.5)
        ]
        expected = max(0, *each) / np.linalg.norm(one) / np.linalg.norm(other)
        assert table[i, j, b, a] / 32767 == pytest.approx(expected**3, abs=1e-4)


def test_common_lines_are_where_the_slices_meet():
    rotations = views(5)
    own, other = common_lines.common_line_angles(rotations)
    for i in range(5):
        for j in range(5):
            if i != j:
                one, two = (
                    np.array([np.cos(angle), np.sin(angle), 0]) @ rotations[image]
                    for image, angle in ((i, own[i, j]), (j, other[i, j]))
                )
                np.testing.assert_allclose(one, two, atol=1e-9)


def test_right_orientations_agree_and_do_so_in_either_hand():
    rotations = views(12)
    table = common_lines.likeness(common_lines.lines(projections("C1", rotations), SHELL, DIAMETER_PX), BOX, 0.0, 1.0)
    off = ~np.eye(12, dtype=bool)
    mirror = np.diag([1.0, 1.0, -1.0])
    for same in (rotations, mirror @ rotations @ mirror, rotations @ views(1, seed=5)):
        assert np.mean(common_lines.agreement(table, same)[off]) > 0.8
    assert np.mean(common_lines.agreement(table, views(12, seed=1))[off]) < 0.4


def test_a_sweep_takes_the_best_of_all_orientations():
    """The first image of a sweep, against the definition: every direction of the grid and every turn."""
    count, order = 4, 0
    table = common_lines.likeness(
        common_lines.lines(projections("C1", views(count)), SHELL, DIAMETER_PX), BOX, 1.0, 1.0
    )
    weights, start = np.array([1.0, 0.5, 2.0, 0.0]), views(count, seed=3)
    found = common_lines.ascend(table, weights, start, order, 1, generator(0, "sweep", 0))
    random, pixels = generator(0, "sweep", 0), np.arange(12, dtype=np.int32)
    frames = sampling.rotation_matrices(order, pixels, np.zeros_like(pixels), random_rotations(1, random)[0])
    turns = matrix_from_rotvec(np.arange(2 * LINES)[:, None] * np.array([0, 0, np.pi / LINES]))
    first, best = random.permutation(count)[0], -np.inf
    for rotation in (turns[:, None] @ frames).reshape(-1, 3, 3):
        tried = start.copy()
        tried[first] = rotation
        score = common_lines.agreement(table, tried)[first] @ weights
        if score > best:
            best, expected = score, rotation
    np.testing.assert_allclose(found[first], expected, atol=1e-9)


@pytest.mark.parametrize("symmetry", ["C1", "C4", "D2"])
def test_orientations_are_found_though_one_line_in_four_is_wrong(symmetry):
    count = 30
    rotations = views(count)
    table = common_lines.likeness(
        common_lines.lines(projections(symmetry, rotations, noise=0.3), SHELL, DIAMETER_PX), BOX, 0.0, 1.0
    )
    random = generator(0, "wrong lines", 0)
    for i, j in zip(*np.triu_indices(count, 1), strict=True):
        if random.random() < 0.25:
            b, a = random.integers((LINES, LINES))
            table[i, j] = np.roll(table[i, j], (b, a), axis=(0, 1))
            table[j, i] = np.roll(table[j, i], (a, b), axis=(0, 1))
    off, found = ~np.eye(count, dtype=bool), []
    for start in range(6):
        own = generator(start, "starts", 0)
        each = common_lines.ascend(table, np.ones(count), random_rotations(count, own), 2, 10, own)
        found.append((np.mean(common_lines.agreement(table, each)[off]), each))
    best = common_lines.ascend(table, np.ones(count), max(found, key=lambda f: f[0])[1], 3, 2, generator(9, "last", 0))
    errors, _ = compared(best, rotations, operators(symmetry))
    assert np.median(errors) < 8
    assert np.mean(errors < 20) > 0.9


def test_equal_views_have_no_common_line_and_do_no_harm():
    rotations = views(24)
    turns = matrix_from_rotvec(np.outer(np.linspace(0, 6, 8), [0, 0, 1.0]))
    rotations[:8] = turns @ rotations[0]
    table = common_lines.likeness(
        common_lines.lines(projections("C1", rotations, noise=0.3), SHELL, DIAMETER_PX), BOX, 0.0, 1.0
    )
    random = generator(0, "starts", 0)
    tried = [
        common_lines.ascend(table, np.ones(24), random_rotations(24, random), 2, 10, random) for _ in range(6)
    ]  # fmt: skip
    best = max(tried, key=lambda found: common_lines.agreement(table, found).sum())
    assert np.median(compared(best, rotations, np.eye(3)[None])[0]) < 10


def test_centres_are_found_but_for_a_shift_of_the_volume():
    count, true = 24, views(24)
    origins = generator(0, "origins", 0).uniform(-2, 2, (count, 2))
    lines = common_lines.lines(projections("C1", true, origins, noise=0.2), SHELL, DIAMETER_PX)
    wrong = true.copy()
    wrong[:3] = views(3, seed=7)
    found = common_lines.centres(lines, wrong, np.ones(count), BOX, 5.0, 0.25)
    apart, planes = (origins - found)[3:].ravel(), true[3:, :2].reshape(-1, 3)
    left = apart - planes @ np.linalg.lstsq(planes, apart, rcond=None)[0]
    assert np.sqrt(np.mean(left**2)) < 0.25
    assert np.sqrt(np.mean(origins**2)) > 1
