"""Pictures of surfaces against spheres and ellipsoids known by formula, and against a slow march."""

import numpy as np
import pytest

from dcryo.kernels import surface

BOX = 40
RADII = {"x": 14.0, "y": 10.0, "z": 7.0}
CENTRE = {"x": 20.4, "y": 18.7, "z": 21.2}
FACING = {"z": ("x", "y", "z", 1), "y": ("x", "z", "y", -1), "x": ("y", "z", "x", 1)}


def ellipsoid() -> np.ndarray:
    """1 - (distance in units of the radii)^2 in voxels of a box: 0 at the surface of an ellipsoid off the centre."""
    z, y, x = np.meshgrid(*[np.arange(BOX, dtype=np.float64)] * 3, indexing="ij")
    places = {"x": x, "y": y, "z": z}
    return (1 - sum(((places[a] - CENTRE[a]) / RADII[a]) ** 2 for a in "xyz")).astype(np.float32)


@pytest.mark.parametrize("axis", surface.AXES)
def test_depth_and_normals_of_an_ellipsoid(axis: str) -> None:
    right, up, towards, sign = FACING[axis]
    seen = (-0.5, BOX - 0.5)
    found = surface.view(ellipsoid(), 0.0, axis, 120, seen)
    at = seen[0] + (np.arange(120) + 0.5) * BOX / 120
    u, v = (at[None, :] - CENTRE[right]) / RADII[right], (at[:, None] - CENTRE[up]) / RADII[up]
    left = 1 - u**2 - v**2
    sure = left > 0.1
    front = CENTRE[towards] + sign * RADII[towards] * np.sqrt(np.where(sure, left, 1))
    depth = (BOX - 1 - front) if sign > 0 else front
    assert np.isfinite(found.depth_px[sure]).all() and np.isnan(found.depth_px[left < -0.1]).all()
    # What lies between grid points is linear: so far does that take a parabola down, over the slope along the ray.
    least = sum(1 / radius**2 for radius in RADII.values()) / 4
    bound = 1.15 * (least * RADII[towards] / (2 * np.sqrt(np.where(sure, left, 1))))[sure]
    assert (np.abs(found.depth_px - depth)[sure] < bound).all() and bound.max() < 0.25
    assert (np.abs(found.place_px[..., "zyx".index(towards)] - front)[sure] < bound).all()
    normal = np.stack(
        np.broadcast_arrays(u / RADII[right], v / RADII[up], np.sqrt(np.maximum(left, 0)) / RADII[towards]), axis=-1
    )
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    assert np.sum(found.normal * normal, axis=-1)[sure].min() > np.cos(np.radians(1.5))


def march(volume: np.ndarray, level: float, at: np.ndarray) -> np.ndarray:
    """Depth along z from the last plane on, ray by ray and plane by plane."""
    depth = np.full((len(at), len(at)), np.nan)
    for i, y in enumerate(at):
        for j, x in enumerate(at):
            row, column = int(np.floor(y)), int(np.floor(x))
            if min(row, column) < 0 or max(row, column) + 1 >= len(volume):
                continue
            fy, fx = y - row, x - column
            four = volume[::-1, row : row + 2, column : column + 2].astype(float)
            ray = np.einsum("zyx,y,x->z", four, [1 - fy, fy], [1 - fx, fx])
            above = np.flatnonzero(ray >= level)
            if len(above):
                k = above[0]
                depth[i, j] = k - ((ray[k] - level) / (ray[k] - ray[k - 1]) if k else 0)
    return depth


def test_the_march_finds_what_a_slow_one_finds_in_noise_that_the_box_cuts() -> None:
    volume = np.random.Generator(np.random.Philox(key=3)).standard_normal((14, 14, 14)).astype(np.float32)
    seen = (-2.0, 15.0)
    found = surface.view(volume, 1.2, "z", 50, seen)
    slow = march(volume, 1.2, (seen[0] + (np.arange(50) + 0.5) * 17 / 50).astype(np.float32).astype(float))
    assert np.isnan(slow).any() and (slow == 0).any()
    np.testing.assert_allclose(found.depth_px, slow, atol=1e-4)
    np.testing.assert_array_equal(found.normal[found.depth_px == 0], np.tile([0, 0, 1], ((slow == 0).sum(), 1)))


def test_pictures_have_the_same_bits_twice() -> None:
    volume = ellipsoid()
    pictures = []
    for _ in range(2):
        seen = surface.seen_px(volume, 0.0)
        view = surface.view(volume, 0.0, "z", 80, seen)
        pictures.append(surface.coloured(surface.light(view, seen[1] - seen[0]), surface.PLAIN))
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].shape == (40, 40, 3) and (pictures[0][0] == 255).all() and pictures[0].min() < 200


def test_values_are_read_at_the_surface_and_edges_are_smooth() -> None:
    volume = ellipsoid()
    view = surface.view(volume, 0.0, "x", 60, surface.seen_px(volume, 0.0))
    along_x = np.broadcast_to(np.arange(BOX, dtype=np.float32), (BOX,) * 3)
    values = surface.values_at(view.place_px, along_x)
    met = np.isfinite(view.depth_px)
    np.testing.assert_allclose(values[met], BOX - 1 - view.depth_px[met], atol=1e-4)
    assert np.isnan(values[~met]).all()
    half = np.full((2, 2), np.nan, dtype=np.float32)
    half[0] = 0.0
    np.testing.assert_array_equal(surface.coloured(half, surface.PLAIN), np.full((1, 1, 3), 128))
    empty = surface.view(volume, 5.0, "z", 8, surface.seen_px(volume, 5.0))
    assert (surface.coloured(surface.light(empty, 1.0), surface.PLAIN) == 255).all()
