"""Pictures of the surface at which a map has a level: seen along an axis, shaded, coloured.

Orthographic rays, one per pixel, run through the map, which is taken to be linear between its grid points along each
axis. Pictures show a right-handed molecule as it is: to the right, up and towards the viewer are x, y, z in the view
along z; x, z, -y in that along y; and y, z, x in that along x. Their first row is the lowest.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from scipy import ndimage

AXES = ("z", "y", "x")
RIGHT_UP = {"z": ("x", "y"), "y": ("x", "z"), "x": ("y", "z")}
"""What is to the right and up in the view along each axis."""

OVERSAMPLING = 2
PLAIN = (0.56, 0.66, 0.79)

# A head light a little to the left and above, for under one from the eye alone facets of equal tilt look alike.
_LIGHT = np.array([-0.30, 0.42, 0.86]) / np.linalg.norm([-0.30, 0.42, 0.86])
_AMBIENT, _DIFFUSE, _GLOSS, _SHININESS = 0.34, 0.62, 0.12, 24.0
# Clefts are dark: a surface so far behind what is around it, in parts of the width seen, loses this part of its light.
_AROUND, _CLEFT, _LOSS = 0.02, 0.05, 0.55
# What is farther away fades by this part from the front of the surface to its back.
_FADE = 0.22


class View(NamedTuple):
    """depth_px: (H, W) float32, voxels from the face of the box that is nearest to the viewer, whose voxels' centres
    are at 0, NaN where no surface is met; normal: (H, W, 3) float32, outward, of length 1, its components to the right,
    up and towards the viewer; place_px: (H, W, 3) float32, where the surface is, in voxels z, y, x from the first."""

    depth_px: np.ndarray
    normal: np.ndarray
    place_px: np.ndarray


def seen_px(volume: np.ndarray, level: float, margin: float = 0.04) -> tuple[float, float]:
    """The range of voxels, one for all axes, that holds every voxel of a map (D, D, D) of at least the level, and a
    margin; the whole box where there is none."""
    above = volume >= level
    found = [np.flatnonzero(above.any(axis)) for axis in ((1, 2), (0, 2), (0, 1))]
    if len(found[0]) == 0:
        return -0.5, len(volume) - 0.5
    low, high = min(int(one[0]) for one in found) - 1.0, max(int(one[-1]) for one in found) + 1.0
    room = margin * (high - low)
    return low - room, high + room


def view(volume: np.ndarray, level: float, axis: str, side_px: int, seen: tuple[float, float]) -> View:
    """What is seen of the surface of a map (D, D, D) along an axis ("z", "y" or "x"), in a square of `side_px` pixels.

    seen: the range of voxels from one edge of the picture to the other, to the right and up. Outside of the box there
    is nothing; where the box cuts through what is above the level, the cut is seen.
    """
    facing = _facing(np.asarray(volume, dtype=np.float32), axis)
    step = (seen[1] - seen[0]) / side_px
    at = (seen[0] + (np.arange(side_px) + 0.5) * step).astype(np.float32)
    depth, normal = _march(facing, np.float32(level), at)
    across = np.broadcast_to(at, depth.shape)
    up = across.T
    last = np.float32(len(volume) - 1)
    places = {"z": (last - depth, up, across), "y": (up, depth, across), "x": (up, across, last - depth)}
    return View(depth, normal, np.stack(places[axis], axis=-1))


def _facing(volume: np.ndarray, axis: str) -> np.ndarray:
    """The map as (depth, up, right), the plane that is nearest to the viewer first."""
    turned = {"z": volume[::-1], "y": volume.transpose(1, 0, 2), "x": volume.transpose(2, 0, 1)[::-1]}
    return np.ascontiguousarray(turned[axis])


@njit(nogil=True, cache=True)
def _march(volume, level, at):  # type: ignore[no-untyped-def]
    """Depth and normal where rays through (at[row], at[column]) first reach the level, front to back.

    Between its four columns of voxels a ray sees nothing larger than the largest of them, so that it starts at the
    first plane at which one of them is above the level.
    """
    planes, rows, columns = volume.shape
    first = np.full((rows, columns), planes, dtype=np.int32)
    for plane in range(planes - 1, -1, -1):
        for row in range(rows):
            for column in range(columns):
                if volume[plane, row, column] >= level:
                    first[row, column] = plane
    n = len(at)
    depth = np.full((n, n), np.nan, dtype=np.float32)
    normal = np.zeros((n, n, 3), dtype=np.float32)
    for i in range(n):
        y = at[i]
        row = int(np.floor(y))
        if row < 0 or row + 1 >= rows:
            continue
        fy = y - np.float32(row)
        for j in range(n):
            x = at[j]
            column = int(np.floor(x))
            if column < 0 or column + 1 >= columns:
                continue
            fx = x - np.float32(column)
            start = min(first[row, column], first[row, column + 1], first[row + 1, column], first[row + 1, column + 1])
            before = np.float32(0.0)
            if start > 0:
                before = _bilinear(volume, start - 1, row, column, fy, fx)
            for plane in range(start, planes):
                value = _bilinear(volume, plane, row, column, fy, fx)
                if value >= level:
                    z = np.float32(plane)
                    if plane > 0:
                        z -= (value - level) / (value - before)
                    depth[i, j] = z
                    break
                before = value
            if np.isnan(depth[i, j]):
                continue
            z = depth[i, j]
            if z == 0.0:
                normal[i, j, 2] = 1.0
                continue
            one = np.float32(1.0)
            right = _trilinear(volume, z, y, x - one) - _trilinear(volume, z, y, x + one)
            up = _trilinear(volume, z, y - one, x) - _trilinear(volume, z, y + one, x)
            towards = _trilinear(volume, z + one, y, x) - _trilinear(volume, z - one, y, x)
            length = np.sqrt(right * right + up * up + towards * towards)
            if length > 0.0:
                normal[i, j, 0] = right / length
                normal[i, j, 1] = up / length
                normal[i, j, 2] = towards / length
            else:
                normal[i, j, 2] = 1.0
    return depth, normal


@njit(nogil=True, cache=True, inline="always")
def _bilinear(volume, plane, row, column, fy, fx):  # type: ignore[no-untyped-def]
    """A plane's value between four voxels."""
    low = volume[plane, row, column] + fx * (volume[plane, row, column + 1] - volume[plane, row, column])
    high = volume[plane, row + 1, column] + fx * (volume[plane, row + 1, column + 1] - volume[plane, row + 1, column])
    return low + fy * (high - low)


@njit(nogil=True, cache=True)
def _trilinear(volume, z, y, x):  # type: ignore[no-untyped-def]
    """The value at a point; outside of the box that of its nearest face."""
    planes, rows, columns = volume.shape
    z = min(max(z, np.float32(0.0)), np.float32(planes - 1))
    y = min(max(y, np.float32(0.0)), np.float32(rows - 1))
    x = min(max(x, np.float32(0.0)), np.float32(columns - 1))
    plane, row, column = min(int(z), planes - 2), min(int(y), rows - 2), min(int(x), columns - 2)
    fz, fy, fx = z - np.float32(plane), y - np.float32(row), x - np.float32(column)
    low = _bilinear(volume, plane, row, column, fy, fx)
    high = _bilinear(volume, plane + 1, row, column, fy, fx)
    return low + fz * (high - low)


def values_at(place_px: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Another map (D, D, D), such as of local resolution, where a surface is: (H, W) float32, NaN where none is."""
    found = np.full(place_px.shape[:2], np.nan, dtype=np.float32)
    met = np.isfinite(place_px[..., 0])
    found[met] = ndimage.map_coordinates(values, place_px[met].T, order=1, mode="nearest")
    return found


def light(seen: View, width_px: float) -> np.ndarray:
    """How bright a surface is, (H, W) float32 from 0 to about 1, NaN where none is; width_px: voxels across it.

    Lambert's law and Phong's highlight (1975, Comm. ACM 18, 311); what lies behind its surroundings is darkened by the
    difference of the depth from the blurred depth (Luft, Colditz & Deussen 2006, ACM Trans. Graph. 25, 1206), which
    shows clefts and what lies in front of what; and what is far away fades.
    """
    met = np.isfinite(seen.depth_px)
    bright = np.full(seen.depth_px.shape, np.nan, dtype=np.float32)
    if not met.any():
        return bright
    normal = seen.normal[met].astype(np.float64)
    facing = np.maximum(normal @ _LIGHT, 0)
    mirrored = 2 * facing * normal[:, 2] - _LIGHT[2]
    shaded = _AMBIENT + _DIFFUSE * facing + _GLOSS * np.maximum(mirrored, 0) ** _SHININESS * (facing > 0)
    depth = np.where(met, seen.depth_px, 0).astype(np.float64)
    sigma = _AROUND * len(depth)
    around = ndimage.gaussian_filter(depth, sigma) / np.maximum(ndimage.gaussian_filter(met.astype(float), sigma), 1e-6)
    behind = np.clip((depth - around)[met] / (_CLEFT * width_px), 0, 1)
    front, back = depth[met].min(), depth[met].max()
    away = (depth[met] - front) / max(back - front, 1e-6)
    bright[met] = shaded * (1 - _LOSS * behind) * (1 - _FADE * away)
    return bright


def coloured(bright: np.ndarray, colour: np.ndarray | tuple[float, float, float]) -> np.ndarray:
    """A picture on white, (H / 2, W / 2, 3) uint8, of the brightness (H, W) of a surface, its edges smoothed.

    colour: red, green and blue from 0 to 1, one for all (3,) or one for each pixel (H, W, 3).
    """
    met = np.isfinite(bright)[..., None]
    fine = np.where(met, np.clip(np.nan_to_num(bright)[..., None] * np.asarray(colour, dtype=np.float64), 0, 1), 1.0)
    height, width = (side // OVERSAMPLING for side in bright.shape)
    blocks = fine.reshape(height, OVERSAMPLING, width, OVERSAMPLING, 3)
    return np.rint(255 * blocks.mean(axis=(1, 3))).astype(np.uint8)
