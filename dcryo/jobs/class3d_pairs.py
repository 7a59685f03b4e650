"""Whether two classes are two: their particles are dealt out anew, in each half by itself, and sorted again.

What tells classes apart that are copies is noise, and the way in which the first iterations happened to divide it. It
is handed on from reference to reference, so that even halves that part keep it. Only a division that two halves find
which never had a reference in common is one of the particles.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcryo.cluster import Cluster
from dcryo.jobs import em
from dcryo.jobs.dataset import BATCH, Dataset, Shard, shard_rows, shard_size
from dcryo.kernels.hold import shares
from dcryo.kernels.randomness import generator
from dcryo.steps import heterogeneity
from dcryo.steps.heterogeneity import Growth
from dcryo.steps.search import stay

# Particles of a pair that are sorted again, iterations, and deals, at most; a correlation above the last needs no more.
_MOST, _ITERATIONS, _DEALS = 8192, 30, 3
_PLAIN = 0.3
_HEADROOM_SHELLS = 6


@dataclass(frozen=True)
class Sorted:
    """What a classification knows at its end, for particles (n, ...), as in `class3d.State`.

    mask: of the particle; compared: under which classes differ; growth: from coarse to fine; radius_px: of the
    particle.
    """

    data: Dataset
    rotation: np.ndarray
    origin_px: np.ndarray
    norm: np.ndarray
    belonging: np.ndarray
    noise_power: np.ndarray
    mask: np.ndarray
    compared: np.ndarray
    operators: np.ndarray
    growth: Growth
    radius_px: float
    seed: int


def reproducible(found: Sorted, first: int, second: int, scratch: Path, cluster: Cluster) -> float:
    """Correlation, without its sign, of the difference of two classes that one half finds with that which the other
    does: the best of several deals, since from one of them few particles among many are not always found."""
    best = found.belonging.argmax(axis=1)
    random = generator(found.seed, "pair", first * found.belonging.shape[1] + second)
    own = random.permutation(np.flatnonzero((best == first) | (best == second)))[:_MOST]
    rows = [np.sort(own[found.data.halves[own] == half]) for half in (1, 2)]
    if min(len(of_half) for of_half in rows) < 2 * BATCH:
        return 0.0
    differences: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    correlation = 0.0
    for _ in range(_DEALS):
        dealt = np.zeros((len(found.norm), 2))
        dealt[np.arange(len(dealt)), random.integers(2, size=len(dealt))] = 1
        for of_half, difference in zip(differences, _sorted_apart(found, rows, dealt, scratch, cluster), strict=True):
            of_half.append(difference)
        pairs = itertools.product(*differences)
        correlation = max(abs(heterogeneity.correlation(*pair)) for pair in pairs)
        if correlation > _PLAIN:
            break
    return correlation


def _sorted_apart(
    found: Sorted, rows: list[np.ndarray], belonging: np.ndarray, scratch: Path, cluster: Cluster
) -> list[np.ndarray]:
    """What each half (its rows) finds two classes to differ by, (D, D, D), from particles as they are dealt, (n, 2)."""
    box, own = found.data.store.box_px, np.concatenate(rows)
    references = np.zeros((2, 2, box, box, box), dtype=np.float32)
    curves, share = np.zeros((2, box // 2 + 1)), np.array([0.5, 0.5])
    shell = found.growth.first
    for iteration in range(_ITERATIONS):
        images = share * len(own) / 2 * len(found.operators)
        held = np.stack(
            [shares(of, float(found.mask.mean()), max(count, 1)) for of, count in zip(curves, images, strict=True)]
        )
        search = stay(shell, box, found.radius_px, held, found.operators)
        shell_max = min(shell + _HEADROOM_SHELLS, box // 2)
        setting = [
            em.Setting(search, search, noise, shell_max, tuple(share.tolist()), iteration == 0)
            for noise in found.noise_power
        ]
        masked = [[volume * found.mask for volume in of_half] for of_half in references]
        made = em.iterate(
            shards=(_shards(found, rows[0], 1, belonging), _shards(found, rows[1], 2, belonging)),
            references=(masked[0], masked[1]),
            settings=(setting[0], setting[1]),
            mask=found.compared,
            scratch=scratch,
            cluster=cluster,
            merge=False,
        )
        references = np.stack(
            [[maps.regularised[half] for maps in made.classes if maps.regularised] for half in (0, 1)]
        )
        curves = np.stack([maps.fsc.masked for maps in made.classes])
        before = belonging[own].argmax(axis=1)
        for of_half, result in zip(rows, made.halves, strict=True):
            belonging[of_half] = em.all_poses(result.shards).belonging
        share = belonging[own].mean(axis=0)
        changed = float(np.mean(belonging[own].argmax(axis=1) != before))
        if iteration > 0 and found.growth.settled(shell, changed):
            break
        if iteration > 0:
            shell = found.growth.next(shell, changed)
    return [(of_half[0] - of_half[1]) * found.compared for of_half in references]


def _shards(found: Sorted, rows: np.ndarray, half: int, belonging: np.ndarray) -> Sequence[Shard]:
    size = shard_size(len(rows))
    ones = np.ones(len(found.norm))
    known = (found.norm, ones, found.rotation, found.origin_px, ones > 0, belonging)
    return [
        shard_rows(found.data, rows[first : first + size], f"pair-{half}-{first}", *known)
        for first in range(0, len(rows), size)
    ]
