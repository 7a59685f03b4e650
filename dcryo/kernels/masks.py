"""Soft masks with a raised cosine edge."""

import numpy as np
from numpy.typing import NDArray


def cosine_edge(distance: NDArray[np.floating], start: float, width: float) -> NDArray[np.float32]:
    """1 up to `start`, 0 from `start + width` on, half a cosine period between; any shape, float32."""
    if width <= 0.0:
        return (distance <= start).astype(np.float32)
    phase = np.clip((distance - start) / width, 0.0, 1.0)
    return (0.5 + 0.5 * np.cos(np.pi * phase)).astype(np.float32)


def _distance(box_px: int, dimensions: int) -> NDArray[np.float32]:
    axis = np.arange(box_px, dtype=np.float32) - box_px // 2
    squares = np.ix_(*[axis**2] * dimensions)
    return np.sqrt(sum(squares[1:], start=squares[0]))


def sphere(box_px: int, diameter_px: float, edge_px: float) -> NDArray[np.float32]:
    """Soft sphere about the box centre: (D, D, D) float32 in 0..1.

    It is 1 inside `diameter_px` and falls to 0 over the next `edge_px` pixels; 0 pixels make a hard edge.
    """
    return cosine_edge(_distance(box_px, 3), diameter_px / 2.0, edge_px)


def circle(box_px: int, diameter_px: float, edge_px: float) -> NDArray[np.float32]:
    """Soft disc about the box centre: (D, D) float32 in 0..1, with the edge of `sphere`."""
    return cosine_edge(_distance(box_px, 2), diameter_px / 2.0, edge_px)
