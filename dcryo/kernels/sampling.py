"""Grids of rotations and of shifts.

A grid rotation of order o is a pair of integers: a HEALPix pixel in [0, 12 4^o), NESTED numbering, whose
centre is the direction of view (third row of the matrix), and an in-plane index in [0, 6 2^o), with
psi = (index + 1/2) 60 / 2^o degrees. At order o + 1 the cell of (pixel, psi) is divided among eight
rotations, pixels 4 pixel + {0, 1, 2, 3} and in-plane indices 2 psi + {0, 1}. A whole grid may be turned by a
perturbation Q (3, 3), a rotation on the volume's side: A = A_grid Q, directions of view d_grid Q.

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


def _check_order(order: int) -> None:
    if not 0 <= order <= MAX_ORDER:
        raise ValueError(f"expected an order of the grid from 0 to {MAX_ORDER}, got {order}")


def shift_grid(range_px: float, step_px: float) -> Int32:
    """Shifts as indices (T, 2), (ix, iy), of the lattice points with step |i| <= range.

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
