"""Whether two maps are of the same thing: alike, mirror images of one another, or negatives."""

import numpy as np

from dcryo.kernels import filters
from dcryo.kernels.masks import sphere

# Shape is enough to tell, and costs little in a small box.
_SEEN_AT_A = 12.0
_LARGEST_BOX_PX = 96
AXES = ("z", "y", "x")


def mirrored(volume: np.ndarray, axis: int) -> np.ndarray:
    """A map (D, D, D) mirrored along one axis about the box centre (D // 2), odd or even."""
    return np.roll(np.flip(volume, axis), 1 - len(volume) % 2, axis)


def likeness(first: np.ndarray, second: np.ndarray, pixel_size_A: float) -> tuple[float, dict[str, float]]:
    """Correlation of two maps (D, D, D) at low resolution: as they are, and with the second mirrored.

    The mirrors are those along z, y and x and through the centre ("centre"); any other is one of these and a turn.
    """
    box = len(first)
    small = min(box, _LARGEST_BOX_PX)
    pixel = pixel_size_A * box / small
    inside = sphere(small, small - 2, 0) > 0
    one, other = (
        filters.lowpass(filters.rescale_volume(map_, small), pixel, max(_SEEN_AT_A, 3 * pixel))
        for map_ in (first, second)
    )

    def correlation(volume: np.ndarray) -> float:
        pair = np.corrcoef(one[inside], volume[inside])
        return float(pair[0, 1]) if np.isfinite(pair).all() else 0.0

    mirrors = {name: mirrored(other, axis) for axis, name in enumerate(AXES)}
    mirrors["centre"] = mirrored(mirrored(mirrors["z"], 1), 2)
    return correlation(other), {name: correlation(volume) for name, volume in mirrors.items()}
