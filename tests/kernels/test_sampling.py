from collections.abc import Iterator

import naive_geometry as naive
import numpy as np
import pytest
from astropy import units
from astropy_healpix import HEALPix

from dcryo.euler import matrix_from_euler
from dcryo.kernels.rotations import perturbation, random_rotations
from dcryo.kernels.sampling import (
    MAX_ORDER,
    global_grid,
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


def angles_to_grid(order: int, rotations: np.ndarray) -> Iterator[np.ndarray]:
    """Angles in degrees of each rotation to every one of the whole grid, (N,), by the trace."""
    grid = rotation_matrices(order, *whole_grid(order), TURN).reshape(-1, 9)
    for rotation in rotations:
        yield np.rad2deg(np.arccos(np.clip((grid @ rotation.ravel() - 1) / 2, -1, 1)))


@pytest.mark.parametrize("order", range(5))
def test_grid_covers_the_rotations(order):
    """No rotation lies farther than 0.95 steps from the grid, and its nearest is about half a step away."""
    rotations = random_rotations(1500, np.random.default_rng(order))
    nearest = np.array([angles.min() for angles in angles_to_grid(order, rotations)]) / step_deg(order)
    assert nearest.max() < 0.95
    assert nearest.mean() == pytest.approx(0.48, abs=0.02)


@pytest.mark.parametrize("order", [1, 2])
def test_grid_is_uniform_by_its_moments(order):
    """Under the uniform law the entries of A have mean 0 and the products A_ij A_kl mean d_ik d_jl / 3."""
    matrices = rotation_matrices(order, *whole_grid(order), TURN).reshape(-1, 9)
    np.testing.assert_allclose(matrices.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(matrices.T @ matrices / len(matrices), np.eye(9) / 3, atol=0.01)


@pytest.mark.parametrize("order", [3, 4])
def test_grid_is_uniform_by_counts_in_balls(order):
    radius_deg = 6 * step_deg(order)
    rotations = random_rotations(300, np.random.default_rng(8))
    radius = np.deg2rad(radius_deg)
    expected = pixel_count(order) * psi_count(order) * (radius - np.sin(radius)) / np.pi
    counts = np.array([np.count_nonzero(angles <= radius_deg) for angles in angles_to_grid(order, rotations)])
    assert counts.mean() == pytest.approx(expected, rel=0.01)
    assert counts.std() < 0.03 * expected


@pytest.mark.parametrize("order", range(5))
def test_children_lie_in_the_cell_of_their_parent(order):
    """The global grid sees by the descendants of a pixel whether its cell reaches into the asymmetric unit."""
    children = (4 * np.arange(pixel_count(order))[:, None] + np.arange(4)).ravel()
    assert np.array_equal(np.sort(children), np.arange(pixel_count(order + 1)))
    longitude, latitude = longitude_latitude(pixel_directions(order + 1, children))
    cell = peer(order).lonlat_to_healpix(longitude * units.rad, latitude * units.rad)
    assert np.array_equal(cell, children // 4)


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


def test_global_grid_ends():
    assert len(global_grid(0, operators("C1"), TURN)[0]) == pixel_count(0) * psi_count(0)
    for order in (-1, MAX_ORDER + 1):
        with pytest.raises(ValueError, match="from 0 to"):
            global_grid(order, operators("C1"), TURN)


@pytest.mark.parametrize(("range_px", "step_px"), [(0, 1), (0.9, 1), (3, 1), (5, 0.5), (7.3, 2.1), (0.3, 0.1)])
def test_shift_grid_is_a_disc(range_px, step_px):
    shifts = shift_grid(range_px, step_px)
    assert shifts.dtype == np.int32
    as_set = {(int(ix), int(iy)) for ix, iy in shifts}
    assert as_set == naive.shift_grid(range_px, step_px)
    assert len(as_set) == len(shifts)
    assert [tuple(row) for row in shifts] == sorted(map(tuple, shifts), key=lambda row: (row[1], row[0]))


@pytest.mark.parametrize(("range_px", "step_px"), [(-1, 1), (1, 0), (1, -1), (float("nan"), 1)])
def test_shift_grid_refuses(range_px, step_px):
    with pytest.raises(ValueError, match="range"):
        shift_grid(range_px, step_px)
