"""Gaussian windows and linear interpolation between a cube of voxels and a coarser cube of points, axis by axis.

Points are given by their positions along an axis, (P,) in voxels from the box centre D // 2, the same for all axes.
"""

import numpy as np

# A Gaussian's full width at half maximum over its standard deviation.
FWHM = 2 * np.sqrt(2 * np.log(2))


def points_across(box_px: int, apart_px: float) -> np.ndarray:
    """Points that cover a box evenly, at most so far apart, (P,) float64."""
    each = int(np.ceil(box_px / apart_px))
    return (np.arange(each) + 0.5) * box_px / each - 0.5 - box_px // 2


def gaussian(points: np.ndarray, box_px: int, side_px: int, sigma_px: float) -> np.ndarray:
    """Weights (P, m), which sum up to one, of m samples across a box at each point; sigma in voxels of the box."""
    weights = np.exp(-0.5 * ((_places(box_px, side_px) - points[:, None]) / sigma_px) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def linear(points: np.ndarray, box_px: int, side_px: int) -> np.ndarray:
    """Weights (m, P) that interpolate values at points to m samples across a box; past the last point, the last."""
    each = np.arange(len(points), dtype=np.float64)
    at = np.interp(_places(box_px, side_px), points, each)
    return np.maximum(0, 1 - np.abs(at[:, None] - each)).astype(np.float32)


def _places(box_px: int, side_px: int) -> np.ndarray:
    """Positions of samples along an axis in voxels of the box from its centre: (m,)."""
    return (np.arange(side_px) - side_px // 2) * (box_px / side_px)


def along_axes(matrix: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """A matrix (P, m) applied along each axis of a volume (m, m, m): (P, P, P)."""
    out = np.tensordot(volume, matrix, axes=(2, 1))
    out = np.tensordot(out, matrix, axes=(1, 1))
    return np.ascontiguousarray(np.tensordot(out, matrix, axes=(0, 1)).transpose(2, 1, 0))
