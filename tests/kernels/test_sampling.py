import naive_geometry as naive
import numpy as np
import pytest
from astropy import units
from astropy_healpix import HEALPix

from dcryo.euler import matrix_from_euler
from dcryo.kernels.rotations import angle_between_deg, perturbation, random_rotations
from dcryo.kernels.sampling import (
    MAX_ORDER,
    global_grid,
    neighbours,
    order_for_step,
    pixel_count,
    pixel_directions,
    psi_count,
    rotation_matrices,
    rotation_of,
    shift_grid,
    step_deg,
)
from dcryo.kernels.symmetry import asymmetric_unit, operators

TURN = perturbation(4.0, np.random.default_rng(5))


def whole_grid(order: int) -> tuple[np.ndarray, np.ndarray]:
    return global_grid(order, operators("C1"), np.eye(3))


def peer(order: int) -> HEALPix:
    return HEALPix(nside=2**order, order="nested")


def longitude_latitude(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arctan2(directions[:, 1], directions[:, 0]), np.arcsin(directions[:, 2])


@pytest.mark.parametrize("order", range(9))
def test_pixels_are_healpix_nested(order):
    pixels = np.arange(pixel_count(order))
    longitude, latitude = (angle.to_value("rad") for angle in peer(order).healpix_to_lonlat(pixels))
    expected = [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)]
    np.testing.assert_allclose(pixel_directions(order, pixels), np.stack(expected, axis=1), atol=2e-15)


def test_pixels_of_the_finest_order_are_healpix_nested_and_unit_vectors():
    ends = [0, 1, 4**MAX_ORDER - 1, 4**MAX_ORDER // 3, pixel_count(MAX_ORDER) - 1]
    others = np.random.default_rng(6).integers(0, pixel_count(MAX_ORDER), 1000)
    pixels = np.concatenate([ends, others]).astype(np.int32)
    longitude, latitude = (angle.to_value("rad") for angle in peer(MAX_ORDER).healpix_to_lonlat(pixels))
    expected = [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)]
    directions = pixel_directions(MAX_ORDER, pixels)
    np.testing.assert_allclose(directions, np.stack(expected, axis=1), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-15)


def test_steps_are_those_of_relions_table():
    steps = [step_deg(order) for order in range(7)]
    np.testing.assert_allclose(steps, [58.6, 29.3, 14.7, 7.3, 3.7, 1.8, 0.9], atol=0.05)
    for order in range(7):
        assert 360 / psi_count(order) == pytest.approx(step_deg(order), rel=0.03)


def test_order_for_step():
    assert order_for_step(180) == 0
    assert order_for_step(step_deg(3)) == 3
    assert order_for_step(step_deg(3) * 0.999) == 4
    assert order_for_step(7.5) == 3
    with pytest.raises(ValueError, match="finest"):
        order_for_step(1e-3)
    with pytest.raises(ValueError, match="finest"):
        order_for_step(float("nan"))


@pytest.mark.parametrize("order", [0, 1, 3])
def test_matrices_are_those_of_the_euler_angles(order):
    pixels, psis = whole_grid(order)
    longitude, latitude = (angle.to_value("deg") for angle in peer(order).healpix_to_lonlat(pixels))
    expected = matrix_from_euler(longitude, 90 - latitude, (psis + 0.5) * 60 / 2**order)
    np.testing.assert_allclose(rotation_matrices(order, pixels, psis, np.eye(3)), expected, atol=1e-14)
    np.testing.assert_allclose(rotation_matrices(order, pixels, psis, TURN), expected @ TURN, atol=1e-14)
    one = np.empty((3, 3))
    rotation_of(order, pixels[17], psis[17], one)
    np.testing.assert_allclose(one, expected[17], atol=1e-14)


@pytest.mark.parametrize("order", range(6))
def test_grid_covers_the_rotations(order):
    """No rotation lies farther than 0.95 steps from the grid, and its nearest is about half a step away."""
    rotations = random_rotations(5000, np.random.default_rng(order))
    pixels, psis, start = neighbours(order, rotations, 1.2 * step_deg(order), TURN)
    assert np.all(np.diff(start) > 0)
    owner = np.repeat(np.arange(len(rotations)), np.diff(start))
    angles = angle_between_deg(rotation_matrices(order, pixels, psis, TURN), rotations[owner])
    nearest = np.minimum.reduceat(angles, start[:-1]) / step_deg(order)
    assert nearest.max() < 0.95
    assert nearest.mean() == pytest.approx(0.48, abs=0.02)


@pytest.mark.parametrize("order", [1, 2])
def test_grid_is_uniform_by_its_moments(order):
    """Under the uniform law the entries of A have mean 0 and the products A_ij A_kl mean d_ik d_jl / 3."""
    matrices = rotation_matrices(order, *whole_grid(order), TURN).reshape(-1, 9)
    np.testing.assert_allclose(matrices.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(matrices.T @ matrices / len(matrices), np.eye(9) / 3, atol=0.01)


@pytest.mark.parametrize("order", [3, 6])
def test_grid_is_uniform_by_counts_in_balls(order):
    radius_deg = 6 * step_deg(order)
    rotations = random_rotations(300, np.random.default_rng(8))
    radius = np.deg2rad(radius_deg)
    expected = pixel_count(order) * psi_count(order) * (radius - np.sin(radius)) / np.pi
    counts = np.diff(neighbours(order, rotations, radius_deg, TURN)[2])
    assert counts.mean() == pytest.approx(expected, rel=0.01)
    assert counts.std() < 0.03 * expected


@pytest.mark.parametrize("order", range(5))
def test_children_lie_in_the_cell_of_their_parent(order):
    pixels, psis = np.arange(pixel_count(order)), np.arange(psi_count(order))
    children = (4 * pixels[:, None] + np.arange(4)).ravel()
    assert np.array_equal(np.sort(children), np.arange(pixel_count(order + 1)))
    longitude, latitude = longitude_latitude(pixel_directions(order + 1, children))
    cell = peer(order).lonlat_to_healpix(longitude * units.rad, latitude * units.rad)
    assert np.array_equal(cell, np.repeat(pixels, 4))
    psi_deg = (2 * psis[:, None] + np.arange(2) + 0.5) * 360 / psi_count(order + 1)
    parent_deg = (psis + 0.5) * 360 / psi_count(order)
    np.testing.assert_allclose(psi_deg.mean(axis=1), parent_deg)
    assert np.all(np.abs(psi_deg - parent_deg[:, None]) < 180 / psi_count(order))


@pytest.mark.parametrize("name", ["C1", "C4", "D2", "D7", "T", "O", "I1", "I4"])
def test_global_grid_is_the_asymmetric_unit_and_its_rim(name):
    order, group = 4, operators(name)
    pixels, psis = global_grid(order, group, TURN)
    kept = np.unique(pixels)
    inside = np.flatnonzero(asymmetric_unit(pixel_directions(order, np.arange(pixel_count(order))) @ TURN, group))
    assert np.isin(inside, kept).all()
    assert len(kept) <= 2 * pixel_count(order) / len(group)
    assert (len(kept) == len(inside)) == (name == "C1")
    assert np.array_equal(pixels, np.repeat(kept, psi_count(order)))
    assert np.array_equal(psis, np.tile(np.arange(psi_count(order)), len(kept)))


@pytest.mark.parametrize("name", ["C4", "D2", "D7", "T", "O", "I1"])
def test_dividing_the_global_grid_leaves_no_direction_out(name):
    """A cell whose centre lies outside of the unit holds poses that no other cell does."""
    order, finer, group = 2, 5, operators(name)
    anywhere = random_rotations(1000, np.random.default_rng(9))[:, 2]
    for seed in range(3):
        turn = perturbation(step_deg(3) / 2, np.random.default_rng(seed))
        kept = np.unique(global_grid(order, group, turn)[0])
        divided = (kept[:, None] * 4 ** (finer - order) + np.arange(4 ** (finer - order))).ravel()
        directions = pixel_directions(finer, divided) @ turn
        nearest = max_over(np.max(anywhere @ operator @ directions.T, axis=1) for operator in group)
        distance_deg = np.rad2deg(np.arccos(np.minimum(nearest, 1)))
        assert np.quantile(distance_deg, 0.995) < step_deg(finer)
        assert distance_deg.max() < 2.5 * step_deg(finer)


def max_over(arrays):
    return np.max(np.stack(list(arrays)), axis=0)


@pytest.mark.parametrize("name", ["C4", "D2", "T", "O", "I2"])
def test_operators_spread_the_global_grid_over_the_sphere(name):
    order, group = 4, operators(name)
    kept = np.unique(global_grid(order, group, TURN)[0])
    images = np.einsum("ni,gij->ngj", pixel_directions(order, kept) @ TURN, group).reshape(-1, 3)
    anywhere = random_rotations(1000, np.random.default_rng(9))[:, 2]
    nearest_deg = np.rad2deg(np.arccos((anywhere @ images.T).max(axis=1)))
    assert nearest_deg.max() < 1.5 * step_deg(order)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("turn", [np.eye(3), TURN], ids=["grid", "perturbed"])
def test_neighbours_agree_with_looking_at_all(order, turn):
    pixels, psis = whole_grid(order)
    matrices = rotation_matrices(order, pixels, psis, turn)
    rotations = random_rotations(12, np.random.default_rng(10))
    for radius_deg in (0.0, 3.0, 11.0, 31.0, 100.0, 179.0):
        near_pixels, near_psis, start = neighbours(order, rotations, radius_deg, turn)
        assert start[0] == 0
        assert start[-1] == len(near_pixels) == len(near_psis)
        for n, rotation in enumerate(rotations):
            rows = naive.neighbours(matrices, rotation, radius_deg)
            assert np.array_equal(near_pixels[start[n] : start[n + 1]], pixels[rows])
            assert np.array_equal(near_psis[start[n] : start[n + 1]], psis[rows])


def test_neighbours_on_the_poles_and_of_grid_rotations():
    """Directions of view on the pole, and rotations of the grid themselves, whose cells meet at corners."""
    order = 2
    pixels, psis = whole_grid(order)
    matrices = rotation_matrices(order, pixels, psis, np.eye(3))
    special = np.concatenate([matrix_from_euler(0, [0, 180, 90, 90], [3, 4, 0, 5]), matrices[::191]])
    for rotation in special:
        near = neighbours(order, rotation, 21.3, np.eye(3))
        rows = naive.neighbours(matrices, rotation, 21.3)
        assert np.array_equal(near[0], pixels[rows])
        assert np.array_equal(near[1], psis[rows])


@pytest.mark.parametrize("order", [5, 7])
def test_neighbours_at_fine_orders_agree_with_looking_at_all_near_pixels(order):
    """Pruning the tree loses nothing: the near pixels are found here among all, with all their psis."""
    every = np.arange(pixel_count(order))
    directions = pixel_directions(order, every) @ TURN
    psis = np.arange(psi_count(order))
    radius_deg = 2.2 * step_deg(order)
    for rotation in random_rotations(12, np.random.default_rng(11)):
        near = every[directions @ rotation[2] > np.cos(np.deg2rad(1.1 * radius_deg))]
        candidates = np.repeat(near, len(psis)), np.tile(psis, len(near))
        rows = naive.neighbours(rotation_matrices(order, *candidates, TURN), rotation, radius_deg)
        pixels, found_psis, _ = neighbours(order, rotation, radius_deg, TURN)
        assert np.array_equal(pixels, candidates[0][rows])
        assert np.array_equal(found_psis, candidates[1][rows])


def test_grid_rotations_are_their_own_neighbours():
    """Those in the four corners of every coarse pixel too, as far from its centre as a descendant can be."""
    order, coarse = MAX_ORDER, 4
    descendants = 4 ** (order - coarse)
    corners = np.arange(4) * (descendants - 1) // 3
    own_pixels = (np.arange(pixel_count(coarse))[:, None] * descendants + corners).ravel()
    own_psis = np.random.default_rng(14).integers(0, psi_count(order), len(own_pixels))
    rotations = rotation_matrices(order, own_pixels, own_psis, TURN)
    pixels, psis, start = neighbours(order, rotations, 0.2 * step_deg(order), TURN)
    assert np.array_equal(start, np.arange(len(own_pixels) + 1))
    assert np.array_equal(pixels, own_pixels)
    assert np.array_equal(psis, own_psis)


def test_neighbours_repeat_and_do_not_depend_on_the_batch():
    rotations = random_rotations(40, np.random.default_rng(12)).astype(np.float32)
    pixels, psis, start = neighbours(5, rotations, 6.0, TURN)
    assert pixels.dtype == psis.dtype == np.int32
    for n, rotation in enumerate(rotations):
        one = neighbours(5, rotation, 6.0, TURN)
        assert np.array_equal(one[0], pixels[start[n] : start[n + 1]])
        assert np.array_equal(one[1], psis[start[n] : start[n + 1]])


def test_neighbours_ends():
    rotation = random_rotations(1, np.random.default_rng(13))
    assert len(neighbours(1, rotation, 180.0, TURN)[0]) == pixel_count(1) * psi_count(1)
    assert len(neighbours(1, rotation, 500.0, TURN)[0]) == pixel_count(1) * psi_count(1)
    assert np.array_equal(neighbours(2, np.empty((0, 3, 3)), 5.0, TURN)[2], [0])
    assert len(neighbours(2, np.full((3, 3), np.nan), 5.0, TURN)[0]) == 0
    with pytest.raises(ValueError, match="radius"):
        neighbours(2, rotation, -1.0, TURN)
    with pytest.raises(ValueError, match="expected"):
        neighbours(2, np.zeros((2, 3)), 1.0, TURN)
    with pytest.raises(ValueError, match="from 0 to"):
        neighbours(MAX_ORDER + 1, rotation, 1.0, TURN)
    with pytest.raises(ValueError, match="from 0 to"):
        global_grid(-1, operators("C1"), TURN)


@pytest.mark.parametrize(("range_px", "step_px"), [(0, 1), (0.9, 1), (3, 1), (5, 0.5), (7.3, 2.1), (0.3, 0.1)])
def test_shift_grid_is_a_disc(range_px, step_px):
    shifts = shift_grid(range_px, step_px)
    assert shifts.dtype == np.int32
    as_set = {(int(ix), int(iy)) for ix, iy in shifts}
    assert as_set == naive.shift_grid(range_px, step_px)
    assert len(as_set) == len(shifts)
    assert [tuple(row) for row in shifts] == sorted(map(tuple, shifts), key=lambda row: (row[1], row[0]))


def test_shift_children_surround_their_parent():
    """The documented positions: centre + s i - o, children 2 i + {0, 1} at s / 2 and o + s / 4."""
    shifts, step, offset = shift_grid(3, 2.0), 2.0, 0.0
    for _ in range(4):
        parents = step * shifts - offset
        pairs = np.stack(np.meshgrid([0, 1], [0, 1]), axis=-1).reshape(4, 2)
        shifts = 2 * shifts[:, None] + pairs
        step, offset = step / 2, offset + step / 4
        children = step * shifts - offset
        np.testing.assert_allclose(children.mean(axis=1), parents, atol=1e-12)
        np.testing.assert_allclose(np.abs(children - parents[:, None]), step / 2)
        shifts = shifts.reshape(-1, 2)


@pytest.mark.parametrize(("range_px", "step_px"), [(-1, 1), (1, 0), (1, -1), (float("nan"), 1)])
def test_shift_grid_refuses(range_px, step_px):
    with pytest.raises(ValueError, match="range"):
        shift_grid(range_px, step_px)
