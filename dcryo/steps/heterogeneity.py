"""Classes of particles: from coarse to fine, how like their maps are, and which of them are copies."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcryo.kernels import fft
from dcryo.kernels.shells import volume_shells

# Once fewer particles than this part change their class, the resolution at which they are compared grows by the factor;
# at the last they are sorted once fewer than the last part do.
_QUIET, _FACTOR = 0.05, 1.25
SETTLED = 0.01
# Classes are copies where the difference that one half finds between them correlates by less with that of the other.
# Differences of noise correlate by 0.02 to 0.1, those of molecules by 0.2 to 0.8 (docs/benchmarks-class3d.md).
REPRODUCIBLE = 0.15


class Growth(NamedTuple):
    """Shells at which particles are compared: the first, and the last.

    At low resolution references are nearly free of noise, and what they differ by grows along what particles differ by;
    at high resolution at once, classes that began with particles dealt out at random stay what they are.
    """

    first: int
    last: int

    def next(self, shell: int, changed: float) -> int:
        """The next shell, where a part of the particles changed class."""
        grown = max(int(_FACTOR * shell), shell + 1) if changed < _QUIET else shell
        return max(min(grown, self.last), self.first)

    def settled(self, shell: int, changed: float) -> bool:
        return shell >= self.last and changed < SETTLED


def likeness(halves: Sequence[Sequence[np.ndarray]], curves: np.ndarray, mask: np.ndarray, shell: int) -> np.ndarray:
    """Correlation of the maps of K classes under a mask up to a shell, (K, K).

    halves: K pairs of maps (D, D, D); curves: (K, D // 2 + 1) FSC of each pair. Maps of two classes are filtered alike,
    by the lower of their curves, C = sqrt(2 FSC / (1 + FSC)) (Rosenthal & Henderson 2003, eq. 7).
    """
    positive = np.clip(curves, 0, 1)
    weights = np.sqrt(2 * positive / (1 + positive))
    weights[:, shell + 1 :] = 0
    shells = np.minimum(volume_shells(len(mask)), curves.shape[1] - 1)
    transforms = [fft.rfftn(first + second) for first, second in halves]
    found = np.eye(len(halves))
    for j, k in itertools.combinations(range(len(halves)), 2):
        weight = np.minimum(weights[j], weights[k]).astype(np.float32)[shells]
        maps = [fft.irfftn(transforms[of] * weight, len(mask)) * mask for of in (j, k)]
        found[[j, k], [k, j]] = correlation(*maps)
    return found


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation coefficient of two maps; 0 where one is constant."""
    a, b = first - first.mean(dtype=np.float64), second - second.mean(dtype=np.float64)
    power = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b)) / power if power > 0 else 0.0
