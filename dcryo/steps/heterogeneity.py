"""Whether classes differ: how like their maps are, and whether what tells them apart is there in both halves."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcryo.kernels import fft
from dcryo.kernels.shells import volume_shells

# Classes whose difference in one half correlates with that in the other by less than this are copies.
_REPRODUCIBLE = 0.5


class Likeness(NamedTuple):
    """Of K classes, (K, K) each: correlation of their maps, and of the difference of two in one half with that in the
    other. A class is like itself, and differs from itself by nothing."""

    correlation: np.ndarray
    reproducible: np.ndarray


def compare(
    halves: Sequence[Sequence[np.ndarray]], curves: np.ndarray, share: np.ndarray, mask: np.ndarray, shell: int
) -> Likeness:
    """Compare classes under a mask up to a shell.

    halves: K pairs of maps (D, D, D); curves: (K, D // 2 + 1) FSC of each pair; share: (K,). Both maps of two classes
    are filtered alike, by the lower of their curves, C = sqrt(2 FSC / (1 + FSC)) (Rosenthal & Henderson 2003). Classes
    of no share are compared with none.
    """
    count, box = len(halves), len(mask)
    positive = np.clip(curves, 0, 1)
    weights = np.sqrt(2 * positive / (1 + positive))
    weights[:, shell + 1 :] = 0
    found = Likeness(np.eye(count), np.zeros((count, count)))
    for j, k in itertools.combinations(np.flatnonzero(share > 0).tolist(), 2):
        filtered = _Filter(np.minimum(weights[j], weights[k]), box)
        first, second = ([filtered(volume) * mask for volume in halves[of]] for of in (j, k))
        likeness = _correlation(first[0] + first[1], second[0] + second[1])
        apart = _correlation(first[0] - second[0], first[1] - second[1])
        found.correlation[[j, k], [k, j]] = likeness
        found.reproducible[[j, k], [k, j]] = apart
    return found


class _Filter:
    """Multiplies the transforms of maps by a weight per shell, (D // 2 + 1,); what is beyond the last is taken away."""

    def __init__(self, weights: np.ndarray, box_px: int) -> None:
        self.box_px = box_px
        shells = volume_shells(box_px)
        self.weights = np.where(shells < len(weights), weights[np.minimum(shells, len(weights) - 1)], 0)

    def __call__(self, volume: np.ndarray) -> np.ndarray:
        return fft.irfftn((fft.rfftn(volume) * self.weights).astype(np.complex64), self.box_px)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation coefficient of two maps; 0 where one is constant."""
    a, b = first - first.mean(), second - second.mean()
    power = float(np.sqrt(np.sum(a * a, dtype=np.float64) * np.sum(b * b, dtype=np.float64)))
    return float(np.sum(a * b, dtype=np.float64)) / power if power > 0 else 0.0


def copies(reproducible: np.ndarray, share: np.ndarray) -> tuple[int, ...]:
    """For each class, the largest first, the number (from 1) of the larger one that it is a copy of; 0 for none.

    reproducible: as in `Likeness`; share: (K,).
    """
    found: list[int] = []
    for k in range(len(share)):
        like = [j for j in range(k) if found[j] == 0 and reproducible[j, k] < _REPRODUCIBLE and share[k] > 0]
        found.append(1 + min(like, key=lambda j: reproducible[j, k]) if like else 0)
    return tuple(found)
