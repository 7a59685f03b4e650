"""Distances, means and random draws of rotations.

Rotations are float64 matrices (..., 3, 3) that take volume coordinates to image coordinates. A volume that
is unchanged by the operators g of its point group, V(g x) = V(x), has a transform F(g u) = F(u), and the
slice of A samples it at A^T k. So A and A g (the operator on the volume's side, on the right) have equal
slices: the slice of A g is F(g^T A^T k) = F(A^T k).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcryo.euler import matrix_from_rotvec

Float64 = NDArray[np.float64]


def angle_between_deg(a: ArrayLike, b: ArrayLike) -> Float64:
    """Geodesic angle in degrees, in [0, 180], between rotations (..., 3, 3), broadcast, to (...).

    From both the sine and the cosine of the turn A B^T, hence accurate near 0 and near 180 too.
    """
    turn = np.asarray(a, dtype=np.float64) @ np.swapaxes(np.asarray(b, dtype=np.float64), -1, -2)
    twice_sine = np.sqrt(
        (turn[..., 2, 1] - turn[..., 1, 2]) ** 2
        + (turn[..., 0, 2] - turn[..., 2, 0]) ** 2
        + (turn[..., 1, 0] - turn[..., 0, 1]) ** 2
    )
    twice_cosine = np.trace(turn, axis1=-2, axis2=-1) - 1
    return np.rad2deg(np.arctan2(twice_sine, twice_cosine))


def angular_distance_deg(a: ArrayLike, b: ArrayLike, operators: ArrayLike) -> Float64:
    """Smallest angle in degrees from A to B g over the operators g (G, 3, 3) of a point group, to (...).

    A and B are (..., 3, 3), broadcast. The distance between poses that symmetry makes equal is 0.
    """
    a, b = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    # The nearest B g has the largest trace of A^T B g = sum of (B^T A) * g.
    product = np.swapaxes(b, -1, -2) @ a
    largest = np.full(a.shape[:-2], -np.inf)
    nearest = np.broadcast_to(np.eye(3), a.shape).copy()
    for operator in np.asarray(operators, dtype=np.float64):
        trace = np.sum(product * operator, axis=(-2, -1))
        better = trace > largest
        largest = np.where(better, trace, largest)
        nearest[better] = operator
    return angle_between_deg(a, b @ nearest)


def rotations_from_uniform(uniform: ArrayLike) -> Float64:
    """Uniformly distributed rotations (..., 3, 3) of numbers (..., 3) uniform in [0, 1).

    K. Shoemake, Uniform random rotations, Graphics Gems III, 124 (1992). ValueError where the last axis is
    not 3.
    """
    numbers = np.asarray(uniform, dtype=np.float64)
    if numbers.shape[-1:] != (3,):
        raise ValueError(f"three uniform numbers make a rotation: got shape {numbers.shape}")
    first, second = 2 * np.pi * numbers[..., 1], 2 * np.pi * numbers[..., 2]
    low, high = np.sqrt(1 - numbers[..., 0]), np.sqrt(numbers[..., 0])
    x, y, z, w = low * np.sin(first), low * np.cos(first), high * np.sin(second), high * np.cos(second)
    matrix = np.empty((*numbers.shape[:-1], 3, 3))
    matrix[..., 0, 0] = 1 - 2 * (y * y + z * z)
    matrix[..., 0, 1] = 2 * (x * y - w * z)
    matrix[..., 0, 2] = 2 * (x * z + w * y)
    matrix[..., 1, 0] = 2 * (x * y + w * z)
    matrix[..., 1, 1] = 1 - 2 * (x * x + z * z)
    matrix[..., 1, 2] = 2 * (y * z - w * x)
    matrix[..., 2, 0] = 2 * (x * z - w * y)
    matrix[..., 2, 1] = 2 * (y * z + w * x)
    matrix[..., 2, 2] = 1 - 2 * (x * x + y * y)
    return matrix


def random_rotations(count: int, generator: np.random.Generator) -> Float64:
    """Uniformly distributed rotations (count, 3, 3); takes 3 count uniform numbers from the generator."""
    return rotations_from_uniform(generator.random((count, 3)))


def perturbation(max_angle_deg: float, generator: np.random.Generator) -> Float64:
    """One random rotation (3, 3) of at most max_angle_deg, its rotation vector uniform in the ball.

    Takes three uniform numbers from the generator.
    """
    height, azimuth, volume = generator.random(3)
    z = 2 * height - 1
    rho = np.sqrt(1 - z * z)
    axis = np.array([rho * np.cos(2 * np.pi * azimuth), rho * np.sin(2 * np.pi * azimuth), z])
    return matrix_from_rotvec(np.deg2rad(max_angle_deg) * np.cbrt(volume) * axis)
