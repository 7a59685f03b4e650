"""Grids of rotations and of shifts, each level nested in the one before.

A grid rotation of order o is a pair of integers: a HEALPix pixel in [0, 12 4^o), NESTED numbering, whose
centre is the direction of view (third row of the matrix), and an in-plane index in [0, 6 2^o), with
psi = (index + 1/2) 60 / 2^o degrees. At order o + 1 the cell of (pixel, psi) is divided among eight
rotations, pixels 4 pixel + {0, 1, 2, 3} and in-plane indices 2 psi + {0, 1}. A whole grid may be turned by a
perturbation Q (3, 3), a rotation on the volume's side: A = A_grid Q, directions of view d_grid Q.

A shift is a pair of integers (ix, iy). At a level of step s (pixels) and offset o it stands for the shift
centre + s (ix, iy) - o (o on both axes); the first level has o = 0. At the next level, of step s / 2 and
offset o + s / 4, it is divided among the four shifts 2 (ix, iy) + {0, 1}^2, each s / 4 to either side of it.

Sources: K. M. Gorski et al., Astrophys. J. 622, 759 (2005), for HEALPix and its numbering; M. R. Calabretta
and B. F. Roukema, MNRAS 381, 865 (2007), for the map of its plane to the sphere; A. Yershova et al., Int. J.
Robotics Research 29, 801 (2010), for HEALPix times the circle as a grid of SO(3).
"""

import math

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from dcryo.kernels.symmetry import asymmetric_unit

Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]

MAX_ORDER = 12  # 0.014 degrees; pixel numbers fit int32

# No point of a pixel is farther from its centre than this many steps (0.822 at order 0, rising to 1.045).
_CIRCUMRADIUS_STEPS = 1.05

# Whether a cell reaches into the asymmetric unit is seen at its descendants so many orders on, an eighth of its side.
_CELL_ORDERS = 3


def step_deg(order: int) -> float:
    """Angular step of an order in degrees: the side of a square of a pixel's area, sqrt(4 pi / npix)."""
    return math.degrees(math.sqrt(4 * math.pi / pixel_count(order)))


def order_for_step(largest_step_deg: float) -> int:
    """Smallest order whose step is at most the given one in degrees; ValueError beyond MAX_ORDER."""
    for order in range(MAX_ORDER + 1):
        if step_deg(order) <= largest_step_deg:
            return order
    raise ValueError(f"no grid has a step of {largest_step_deg} deg: the finest is {step_deg(MAX_ORDER):.2g}")


@njit(cache=True, nogil=True)
def pixel_count(order: int) -> int:
    """Number of directions of view at an order, 12 4^order."""
    return 12 << (2 * order)


@njit(cache=True, nogil=True)
def psi_count(order: int) -> int:
    """Number of in-plane angles at an order, 6 2^order."""
    return 6 << order


@njit(cache=True, nogil=True)
def _pixel_angles(order: int, pixel: int) -> tuple[float, float, float]:
    """(cos tilt, sin tilt, rot in radians) of a pixel's centre, NESTED numbering.

    In the HEALPix plane a base face is a diamond; u counts eighths of the equator, v runs from -2 to 2
    between the poles, and beyond |v| = 1 the four facets narrow towards the pole, in proportion to 2 - |v|.
    """
    face = pixel >> (2 * order)
    ix = 0
    iy = 0
    for bit in range(order):
        ix |= ((pixel >> (2 * bit)) & 1) << bit
        iy |= ((pixel >> (2 * bit + 1)) & 1) << bit
    side = 1 << order
    row = face // 4  # north polar, equatorial, south polar
    u_face = 2 * (face % 4) + (0 if row == 1 else 1)
    u = (ix - iy) / side
    v = (1 - row) + (ix + iy + 1 - side) / side
    shrink = 2.0 - abs(v)
    if shrink < 1.0:
        height = 1.0 - shrink * shrink / 3.0
        # sqrt(1 - height^2) without the cancellation at the pole.
        sine = shrink * math.sqrt((2.0 - shrink * shrink / 3.0) / 3.0)
        return math.copysign(height, v), sine, 0.25 * math.pi * (u_face + u / shrink)
    height = 2.0 * v / 3.0
    return height, math.sqrt(1.0 - height * height), 0.25 * math.pi * (u_face + u)


@njit(cache=True, nogil=True)
def pixel_directions(order: int, pixels: NDArray[np.integer]) -> Float64:
    """Unit vectors (N, 3), (x, y, z), of the centres of HEALPix pixels (N,), NESTED numbering."""
    directions = np.empty((len(pixels), 3))
    for n in range(len(pixels)):
        cos_tilt, sin_tilt, rot = _pixel_angles(order, pixels[n])
        directions[n, 0] = sin_tilt * math.cos(rot)
        directions[n, 1] = sin_tilt * math.sin(rot)
        directions[n, 2] = cos_tilt
    return directions


@njit(cache=True, nogil=True)
def rotation_of(order: int, pixel: int, psi_index: int, out: Float64) -> None:
    """Writes into out (3, 3) the matrix of a grid rotation (not perturbed)."""
    cos_tilt, sin_tilt, rot = _pixel_angles(order, pixel)
    psi = (psi_index + 0.5) * (2.0 * math.pi / psi_count(order))
    cos_rot, sin_rot = math.cos(rot), math.sin(rot)
    cos_psi, sin_psi = math.cos(psi), math.sin(psi)
    out[0, 0] = cos_psi * cos_tilt * cos_rot - sin_psi * sin_rot
    out[0, 1] = cos_psi * cos_tilt * sin_rot + sin_psi * cos_rot
    out[0, 2] = -cos_psi * sin_tilt
    out[1, 0] = -sin_psi * cos_tilt * cos_rot - cos_psi * sin_rot
    out[1, 1] = -sin_psi * cos_tilt * sin_rot + cos_psi * cos_rot
    out[1, 2] = sin_psi * sin_tilt
    out[2, 0] = sin_tilt * cos_rot
    out[2, 1] = sin_tilt * sin_rot
    out[2, 2] = cos_tilt


@njit(cache=True, nogil=True)
def rotation_matrices(
    order: int, pixels: NDArray[np.integer], psis: NDArray[np.integer], perturbation: Float64
) -> Float64:
    """Matrices A = A_grid Q (N, 3, 3) of grid rotations, pixels (N,) and psis (N,); Q is the perturbation."""
    matrices = np.empty((len(pixels), 3, 3))
    grid = np.empty((3, 3))
    for n in range(len(pixels)):
        rotation_of(order, pixels[n], psis[n], grid)
        for i in range(3):
            for j in range(3):
                matrices[n, i, j] = (
                    grid[i, 0] * perturbation[0, j] + grid[i, 1] * perturbation[1, j] + grid[i, 2] * perturbation[2, j]
                )
    return matrices


def global_grid(order: int, operators: ArrayLike, perturbation: ArrayLike) -> tuple[Int32, Int32]:
    """Grid rotations whose cell of directions of view, perturbed, reaches into the asymmetric unit.

    The cells cover the unit, so that dividing them leaves no pose out; where they stick out of it, poses that symmetry
    makes equal are there twice. Returns (pixels, psis), (N,) each, sorted by pixel, then psi. operators (G, 3, 3) as
    from `symmetry.operators`, perturbation (3, 3). ValueError where the order is not in [0, MAX_ORDER].
    """
    _check_order(order)
    finer = min(order + _CELL_ORDERS, MAX_ORDER)
    inside = np.arange(pixel_count(finer), dtype=np.int32)
    directions = pixel_directions(finer, inside) @ np.asarray(perturbation, dtype=np.float64)
    kept = np.unique(inside[asymmetric_unit(directions, operators)] >> 2 * (finer - order))
    psis = np.arange(psi_count(order), dtype=np.int32)
    return np.repeat(kept, len(psis)), np.tile(psis, len(kept))


def neighbours(
    order: int, rotations: ArrayLike, radius_deg: float, perturbation: ArrayLike
) -> tuple[Int32, Int32, NDArray[np.int64]]:
    """All rotations of the perturbed grid within radius_deg of each rotation (N, 3, 3), by geodesic angle.

    Returns (pixels, psis, start): those of rotation n are at start[n]:start[n + 1], sorted by pixel, then
    psi; start is (N + 1,). A single rotation (3, 3) counts as N = 1. Not cut to an asymmetric unit.
    ValueError where the shape is another, the radius negative or the order not in [0, MAX_ORDER].
    """
    _check_order(order)
    matrices = np.ascontiguousarray(rotations, dtype=np.float64)
    if matrices.ndim == 2:
        matrices = matrices[None]
    if matrices.shape[1:] != (3, 3) or not radius_deg >= 0:
        raise ValueError(f"expected (N, 3, 3) and a radius >= 0 deg, got {matrices.shape} and {radius_deg}")
    radius = math.radians(min(radius_deg, 180.0))
    return _neighbours_of_all(order, matrices, radius, np.ascontiguousarray(perturbation, dtype=np.float64))


def _check_order(order: int) -> None:
    if not 0 <= order <= MAX_ORDER:
        raise ValueError(f"expected an order of the grid from 0 to {MAX_ORDER}, got {order}")


@njit(cache=True, nogil=True)
def _neighbours_of_all(
    order: int, rotations: Float64, radius: float, perturbation: Float64
) -> tuple[Int32, Int32, NDArray[np.int64]]:
    """`neighbours`, the radius in radians."""
    # The ball's share of SO(3) is (r - sin r) / pi; a quarter more for the grid's unevenness.
    share = (radius - math.sin(radius)) / math.pi
    expected = 1.25 * share * pixel_count(order) * psi_count(order)
    pixels = np.empty(int(expected * len(rotations)) + 64, np.int32)
    psis = np.empty_like(pixels)
    start = np.zeros(len(rotations) + 1, np.int64)
    from_image = np.empty((3, 3))
    for n in range(len(rotations)):
        for i in range(3):
            for j in range(3):
                from_image[i, j] = (
                    perturbation[i, 0] * rotations[n, j, 0]
                    + perturbation[i, 1] * rotations[n, j, 1]
                    + perturbation[i, 2] * rotations[n, j, 2]
                )
        begin = start[n]
        found = _neighbours_of(order, from_image, radius, pixels[begin:], psis[begin:])
        if begin + found > len(pixels):
            grown = np.empty(2 * (begin + found), np.int32)
            grown[:begin] = pixels[:begin]
            pixels = grown
            grown = np.empty(2 * (begin + found), np.int32)
            grown[:begin] = psis[:begin]
            psis = grown
            found = _neighbours_of(order, from_image, radius, pixels[begin:], psis[begin:])
        start[n + 1] = begin + found
    return pixels[: start[-1]].copy(), psis[: start[-1]].copy(), start


@njit(cache=True, nogil=True)
def _neighbours_of(order: int, from_image: Float64, radius: float, pixels: Int32, psis: Int32) -> int:
    """Counts the grid rotations within the radius (radians) of B, and writes as many as fit.

    from_image is Q B^T, from the image of B to the volume of the unperturbed grid. Walks the pixels depth
    first from the twelve faces and drops those whose descendants all lie too far from B's direction of
    view.
    """
    cos_reach = np.empty(order + 1)
    for level in range(order):
        pixel_radius = _CIRCUMRADIUS_STEPS * math.sqrt(4 * math.pi / pixel_count(level))
        cos_reach[level] = math.cos(min(radius + pixel_radius, math.pi))
    cos_reach[order] = math.cos(radius)
    levels = np.zeros(12 + 3 * order, np.int64)
    stack = np.empty(12 + 3 * order, np.int64)
    for face in range(12):
        stack[face] = 11 - face
    height = 12
    found = 0
    while height > 0:
        height -= 1
        level, pixel = levels[height], stack[height]
        cos_tilt, sin_tilt, rot = _pixel_angles(level, pixel)
        cos_rot, sin_rot = math.cos(rot), math.sin(rot)
        x, y = sin_tilt * cos_rot, sin_tilt * sin_rot
        cos_distance = x * from_image[0, 2] + y * from_image[1, 2] + cos_tilt * from_image[2, 2]
        if not cos_distance >= cos_reach[level]:  # NaN has no neighbours
            continue
        if level < order:
            for child in range(3, -1, -1):
                levels[height] = level + 1
                stack[height] = 4 * pixel + child
                height += 1
            continue
        # M = A(psi = 0) Q B^T; the turn from B to A is Rz(psi) M, of trace size cos(psi - best) + M22.
        x, y = cos_tilt * cos_rot, cos_tilt * sin_rot
        m00 = x * from_image[0, 0] + y * from_image[1, 0] - sin_tilt * from_image[2, 0]
        m01 = x * from_image[0, 1] + y * from_image[1, 1] - sin_tilt * from_image[2, 1]
        m10 = cos_rot * from_image[1, 0] - sin_rot * from_image[0, 0]
        m11 = cos_rot * from_image[1, 1] - sin_rot * from_image[0, 1]
        best = math.atan2(m10 - m01, m00 + m11)
        cosine = 1.0 + 2.0 * math.cos(radius) - cos_distance
        found = _psis_within(order, best, cosine, 1.0 + cos_distance, pixel, found, pixels, psis)
    return found


@njit(cache=True, nogil=True)
def _psis_within(
    order: int, best: float, cosine: float, size: float, pixel: int, found: int, pixels: Int32, psis: Int32
) -> int:
    """Adds, in order, the psi indices with size cos(psi - best) >= cosine, and returns the new count."""
    if cosine > size:
        return found
    count = psi_count(order)
    half_width = math.acos(cosine / size) if cosine > -size else math.pi
    step = 2.0 * math.pi / count
    first = math.ceil((best - half_width) / step - 0.5)
    last = math.floor((best + half_width) / step - 0.5)
    width = min(last - first + 1, count)
    wrapped = max((first % count) + width - count, 0)
    for k in range(width):
        psi = k if k < wrapped else (first % count) + k - wrapped
        if found < len(pixels):
            pixels[found] = pixel
            psis[found] = psi
        found += 1
    return found


def shift_grid(range_px: float, step_px: float) -> Int32:
    """First level of shifts: indices (T, 2), (ix, iy), of the lattice points with step |i| <= range.

    Sorted by iy, then ix; (0, 0) is always one of them. ValueError where the step is not positive or the
    range negative.
    """
    if not (step_px > 0 and range_px >= 0):
        raise ValueError(f"expected a range >= 0 and a step > 0, got {range_px} and {step_px} px")
    # One part in 10^9 of slack, so that a range of a whole number of steps holds its end.
    reach = range_px / step_px * (1 + 1e-9)
    whole = math.floor(reach)
    line = np.arange(-whole, whole + 1, dtype=np.int32)
    iy, ix = np.meshgrid(line, line, indexing="ij")
    inside = ix**2 + iy**2 <= reach**2
    return np.stack([ix[inside], iy[inside]], axis=1)
