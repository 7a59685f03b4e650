"""Slow, obvious twins of the geometry kernels."""

import numpy as np


def angle_deg(a: np.ndarray, b: np.ndarray) -> float:
    """Angle of one rotation to another by the trace."""
    return float(np.rad2deg(np.arccos(np.clip((np.trace(a @ b.T) - 1) / 2, -1, 1))))


def angular_distance_deg(a: np.ndarray, b: np.ndarray, operators: np.ndarray) -> float:
    return min(angle_deg(a, b @ operator) for operator in operators)


def shift_grid(range_px: float, step_px: float) -> set[tuple[int, int]]:
    """Lattice points of a disc, by looking at a square that holds it."""
    line = range(-100, 101)
    return {(ix, iy) for iy in line for ix in line if step_px * (ix**2 + iy**2) ** 0.5 <= range_px + 1e-9}
