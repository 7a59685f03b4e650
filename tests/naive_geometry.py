"""Slow, obvious twins of the geometry kernels."""

import numpy as np


def angle_deg(a: np.ndarray, b: np.ndarray) -> float:
    """Angle of one rotation to another by the trace."""
    return float(np.rad2deg(np.arccos(np.clip((np.trace(a @ b.T) - 1) / 2, -1, 1))))


def angular_distance_deg(a: np.ndarray, b: np.ndarray, operators: np.ndarray) -> float:
    return min(angle_deg(a, b @ operator) for operator in operators)


def mean_rotation(quaternions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Quaternion of the mean, by the definition of Markley et al. (2007): eigenvector of sum w q q^T."""
    total = np.zeros((4, 4))
    for quaternion, weight in zip(quaternions, weights, strict=True):
        total += weight * np.outer(quaternion, quaternion)
    return np.linalg.eigh(total)[1][:, -1]


def neighbours(grid: np.ndarray, rotation: np.ndarray, radius_deg: float) -> list[int]:
    """Rows of the grid (N, 3, 3) within the radius of a rotation, by looking at them all."""
    traces = np.einsum("nij,ij->n", grid, rotation)
    return [n for n, trace in enumerate(traces) if (trace - 1) / 2 >= np.cos(np.deg2rad(radius_deg))]


def shift_grid(range_px: float, step_px: float) -> set[tuple[int, int]]:
    """Lattice points of a disc, by looking at a square that holds it."""
    line = range(-100, 101)
    return {(ix, iy) for iy in line for ix in line if step_px * (ix**2 + iy**2) ** 0.5 <= range_px + 1e-9}
