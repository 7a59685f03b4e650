"""A first model from class averages: orientations from common lines, then from re-projections of their map.

Common lines need no model to begin with, but see one line of each pair; re-projections see whole images, but need one.
"""

import math
from typing import NamedTuple

import numpy as np

from dcryo.euler import matrix_from_rotvec
from dcryo.kernels import common_lines, fft, masks, posterior, sampling, slices, solve
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.shells import HalfPlane, half_plane, pack, shell_at
from dcryo.steps import maximisation
from dcryo.steps.search import NO_SYMMETRY

# Grid of directions that common lines are first tried on, and a finer one for when they are nearly right.
_FIRST_ORDER, _SECOND_ORDER = 2, 3
# Random starts, of so many averages at most; how many go on after every few sweeps; the last is the one.
_STARTS, _IN_A_START, _SWEEPS = (24, 8, 3), 40, 4
_SWEEPS_OF_ALL = 3
# Centres of averages may be off by this part of the diameter.
_OFF_CENTRE = 0.06
# Rounds of matching averages to re-projections, and the steps of the climb that ends each.
_ROUNDS, _MATCHING_ORDER = 4, 3
_CLIMB_DEG = (4.0, 4.0, 2.0, 2.0, 1.0, 1.0)
_GRID_CHUNK = 2048


class Model(NamedTuple):
    """A first model of K averages, in a frame and hand of its own.

    volume: (D, D, D) float32, masked by a sphere; rotation: (K, 3, 3); origin_px: (K, 2), (x, y); reliability: (K,)
    in 0..1, correlation of each average with the re-projection of a map that only others made; consistency: their
    mean, weighted.
    """

    volume: np.ndarray
    rotation: np.ndarray
    origin_px: np.ndarray
    reliability: np.ndarray
    consistency: float


class _Views(NamedTuple):
    """Averages as packed transforms (K, P) on the pixels, and their weights (K,)."""

    transforms: np.ndarray
    weights: np.ndarray
    pixels: HalfPlane
    box_px: int


def common_lines_model(
    averages: np.ndarray,
    weights: np.ndarray,
    pixel_size_A: float,
    diameter_A: float,
    shell: int,
    random: np.random.Generator,
) -> Model:
    """A model of the molecule that averages (K, D, D) show.

    weights: (K,), such as the numbers of particles; shell: resolution to which averages are good. ValueError for fewer
    than four averages or a weight that is not above 0. The best of several calls with other random numbers is that of
    the greatest consistency.
    """
    if len(weights) < 4:
        raise ValueError(f"common lines need at least four averages, got {len(weights)}")
    if np.min(weights) <= 0:
        raise ValueError(f"average {np.argmin(weights)} has weight {np.min(weights)}; leave it out")
    weights = weights / np.mean(weights)
    rotation, origin = orient(averages, weights, pixel_size_A, diameter_A, shell, random)
    return match(averages, weights, rotation, origin, pixel_size_A, diameter_A, shell, random)


def matched_shell(order: int, diameter_A: float, box_px: int, pixel_size_A: float) -> int:
    """The finest shell whose detail a step of a grid of directions does not move away, at the particle's edge."""
    edge_A = math.radians(sampling.step_deg(order)) * diameter_A / 2
    return max(shell_at(edge_A, box_px, pixel_size_A), 3)


def orient(
    averages: np.ndarray,
    weights: np.ndarray,
    pixel_size_A: float,
    diameter_A: float,
    shell: int,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Rotations (K, 3, 3) and origins (K, 2) px from common lines alone."""
    box, diameter_px = averages.shape[-1], diameter_A / pixel_size_A
    first = min(shell, matched_shell(_FIRST_ORDER, diameter_A, box, pixel_size_A))
    step = box / (6 * first)
    lines = common_lines.lines(averages, first, diameter_px)
    origins = mass_origins(averages, diameter_px)
    for order in (_FIRST_ORDER, _SECOND_ORDER):
        centred = common_lines.moved(lines, origins, box)
        table = common_lines.likeness(centred, box, step, step)
        if order == _FIRST_ORDER:
            rotations = _best_start(table, weights, random)
        trust = weights * _trust(table, rotations, weights)
        rotations = common_lines.ascend(table, trust, rotations, order, _SWEEPS_OF_ALL, random)
        trust = weights * _trust(table, rotations, weights)
        left = common_lines.centres(centred, rotations, trust, box, _OFF_CENTRE * diameter_px, step / 4)
        origins = origins + left
    return rotations, origins


def mass_origins(averages: np.ndarray, diameter_px: float) -> np.ndarray:
    """Origins (K, 2) px that bring centres of mass to the box centre.

    The centre of mass of a projection is the projection of that of the volume. Lines that have to be compared at any
    shift say much less (docs/decisions/014).
    """
    box = averages.shape[-1]
    place = np.arange(box) - box // 2
    mass = np.clip(averages, 0, None) * masks.circle(box, diameter_px, 0.1 * diameter_px)
    total = np.maximum(mass.sum(axis=(1, 2)), 1e-30)
    return -np.stack([mass.sum(axis=1) @ place, mass.sum(axis=2) @ place], axis=1) / total[:, None]


def _best_start(table: np.ndarray, weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Of several random starts of the averages that weigh most the one whose lines agree best; then of all averages."""
    some = np.sort(np.argsort(-weights, kind="stable")[:_IN_A_START])
    of_some, weights_of_some = np.ascontiguousarray(table[np.ix_(some, some)]), weights[some]
    starts = [random_rotations(len(some), random) for _ in range(_STARTS[0])]
    for kept in (*_STARTS[1:], 1):
        found = [common_lines.ascend(of_some, weights_of_some, s, _FIRST_ORDER, _SWEEPS, random) for s in starts]
        agreed = [np.average(_agreed(of_some, each, weights_of_some), weights=weights_of_some) for each in found]
        starts = [found[n] for n in np.argsort(-np.array(agreed), kind="stable")[:kept]]
    rotations = random_rotations(len(weights), random)
    rotations[some] = starts[0]
    known = np.zeros(len(weights))
    known[some] = weights[some]
    rotations = common_lines.ascend(table, known, rotations, _FIRST_ORDER, 1, random)
    return common_lines.ascend(table, weights, rotations, _FIRST_ORDER, _SWEEPS_OF_ALL, random)


def _agreed(table: np.ndarray, rotations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean likeness of each average's common lines with the others, (K,)."""
    return common_lines.agreement(table, rotations) @ weights / (weights.sum() - weights)


def _trust(table: np.ndarray, rotations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights (K,) in 0..1 that are small for averages whose lines agree less than others' do (Cauchy's weights)."""
    agreed = _agreed(table, rotations, weights)
    below = np.maximum(np.median(agreed) - agreed, 0)
    spread = 1.4826 * np.median(np.abs(agreed - np.median(agreed)))
    return 1 / (1 + (below / max(2 * spread, 1e-6)) ** 2)


def match(
    averages: np.ndarray,
    weights: np.ndarray,
    rotation: np.ndarray,
    origin_px: np.ndarray,
    pixel_size_A: float,
    diameter_A: float,
    shell: int,
    random: np.random.Generator,
) -> Model:
    """Better orientations, by rounds of matching averages to re-projections of the map that they make together."""
    box = averages.shape[-1]
    views = _views(averages, weights, shell)
    mask = masks.sphere(box, diameter_A / pixel_size_A, 3.0)
    coarse = min(shell, matched_shell(_MATCHING_ORDER, diameter_A, box, pixel_size_A))
    first = min(shell, matched_shell(_FIRST_ORDER, diameter_A, box, pixel_size_A))
    trust = weights
    reach = _OFF_CENTRE * diameter_A / pixel_size_A
    for number in range(_ROUNDS):
        volume, halves = _maps(views._replace(weights=trust), rotation, origin_px, mask)
        level = first + (coarse - first) * number // (_ROUNDS - 1)
        rotation, origin_px = _searched(views, volume, origin_px, level, reach, random)
        rotation, origin_px = _climbed(views, volume, rotation, origin_px, coarse)
        trust = weights * _cross_correlation(views, halves, rotation, origin_px, first)
    volume, halves = _maps(views._replace(weights=trust), rotation, origin_px, mask)
    rotation, origin_px = _climbed(views, volume, rotation, origin_px, shell)
    volume, halves = _maps(views._replace(weights=trust), rotation, origin_px, mask)
    reliability = _cross_correlation(views, halves, rotation, origin_px, first)
    return Model(volume, rotation, origin_px, reliability, float(np.average(reliability, weights=weights)))


def _views(averages: np.ndarray, weights: np.ndarray, shell: int) -> _Views:
    pixels = half_plane(shell)
    return _Views(pack(pixels, fft.rfft2(averages)), weights, pixels, averages.shape[-1])


def _whitening(views: _Views, count: int) -> np.ndarray:
    """Inverse of the mean power of averages in each shell, on pixels (count,); of shell 0, which is alike in all, 0."""
    power = np.mean(np.abs(views.transforms[:, :count]) ** 2, axis=0)
    shell = views.pixels.shell[:count]
    mean = np.bincount(shell, weights=power) / np.bincount(shell)
    inverse = np.divide(1, mean, out=np.zeros_like(mean), where=mean > 0)
    inverse[0] = 0
    return inverse[shell].astype(np.float32)


def _maps(
    views: _Views, rotations: np.ndarray, origins: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The masked map of all averages, filtered by what those of every second one have in common; and those, (D, D, D)
    each."""
    pixels, box = views.pixels, views.box_px
    centred = views.transforms * posterior.shift_phases(pixels, origins, box, len(pixels.kx))
    weight = np.broadcast_to(views.weights[:, None], centred.shape).astype(np.float32)
    sums = []
    for half in (0, 1):
        accumulator = np.zeros((*slices.volume_shape(pixels.shell_max, box), 3), dtype=np.float32)
        of = slice(half, None, 2)
        slices.insert(
            accumulator, rotations[of], (centred[of] * weight[of]).astype(np.complex64), weight[of], pixels, box
        )
        sums.append(solve.complete(accumulator, NO_SYMMETRY))
    plain = [maximisation.plain_map(of_half, None, NO_SYMMETRY, pixels.shell_max, box) for of_half in sums]
    halves = maximisation.half_fsc(plain[0], plain[1], mask)
    merged = maximisation.merged_map(sums[0], sums[1], None, halves, NO_SYMMETRY, pixels.shell_max, box)
    return mask * merged, (mask * plain[0], mask * plain[1])


def _searched(
    views: _Views, volume: np.ndarray, origins: np.ndarray, shell: int, reach_px: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The orientation on a grid of all, and the shift from the last origin, at which each average is most like the
    re-projection."""
    box, count = views.box_px, views.pixels.within(shell)
    pixels, inverse = half_plane(shell), _whitening(views, count)
    step = box / (6 * shell)
    shifts = sampling.shift_grid(reach_px, step) * step
    shifted = np.stack(
        [
            views.transforms[:, :count] * posterior.shift_phases(pixels, origins + shift, box, count) * inverse
            for shift in shifts
        ],
        axis=1,
    ).astype(np.complex64)
    turn = random_rotations(1, random)[0]
    directions, turns = sampling.global_grid(_MATCHING_ORDER, NO_SYMMETRY, turn)
    half = turns < sampling.psi_count(_MATCHING_ORDER) // 2
    grid = sampling.rotation_matrices(_MATCHING_ORDER, directions[half], turns[half], turn)
    prepared = slices.prepare(volume, shell)
    images = np.arange(len(origins))
    best, rotations, found = np.full(len(images), -np.inf), np.zeros((len(images), 3, 3)), origins.copy()
    for start in range(0, len(grid), _GRID_CHUNK):
        some = grid[start : start + _GRID_CHUNK]
        of_grid = slices.extract(prepared, some, pixels, box)
        weight = np.broadcast_to(inverse, (len(images), count))
        scores, places = posterior.grid_scores(of_grid, shifted, weight, profile_scale=True)
        which = np.argmax(scores, axis=1)
        better = scores[images, which] > best
        flipped = np.concatenate([some, np.diag([-1.0, -1.0, 1.0]) @ some])
        best = np.where(better, scores[images, which], best)
        rotations[better] = flipped[which[better]]
        found[better] = (origins + shifts[places[images, which]])[better]
    return rotations, found


def _climbed(
    views: _Views, volume: np.ndarray, rotations: np.ndarray, origins: np.ndarray, shell: int
) -> tuple[np.ndarray, np.ndarray]:
    """Orientations and origins moved to where averages are more like the re-projection, by steps that get smaller."""
    prepared = slices.prepare(volume, shell)
    axes = np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)])
    sides = np.concatenate([np.zeros((1, 2)), np.eye(2), -np.eye(2)])
    images = np.arange(len(rotations))
    for step in _CLIMB_DEG:
        tried = matrix_from_rotvec(np.deg2rad(step) * axes)[:, None] @ rotations
        scores = [_correlation(views, prepared, rotation, origins, shell) for rotation in tried]
        rotations = tried[np.argmax(scores, axis=0), images]
        moved = step / 8 * sides[:, None] + origins
        scores = [_correlation(views, prepared, rotations, origin, shell) for origin in moved]
        origins = moved[np.argmax(scores, axis=0), images]
    return rotations, origins


def _correlation(
    views: _Views, prepared: np.ndarray, rotations: np.ndarray, origins: np.ndarray, shell: int
) -> np.ndarray:
    """Correlation (K,) of averages with re-projections, all shells from 1 to `shell` of equal power in averages."""
    box, count = views.box_px, views.pixels.within(shell)
    pixels, inverse = half_plane(shell), _whitening(views, count)
    of_map = slices.extract(prepared, rotations, pixels, box)
    images = views.transforms[:, :count] * posterior.shift_phases(pixels, origins, box, count)
    product = np.sum(inverse * (of_map.conj() * images).real, axis=1)
    norms = (np.sum(inverse * np.abs(x) ** 2, axis=1) for x in (of_map, images))
    return product / np.sqrt(np.maximum(math.prod(norms), 1e-30))


def _cross_correlation(
    views: _Views, halves: tuple[np.ndarray, np.ndarray], rotations: np.ndarray, origins: np.ndarray, shell: int
) -> np.ndarray:
    """Correlation of each average, not less than 0, with the map that it has no part in."""
    out = np.empty(len(rotations))
    for half, volume in enumerate(halves[::-1]):
        of = slice(half, None, 2)
        own = views._replace(transforms=views.transforms[of])
        out[of] = _correlation(own, slices.prepare(volume, shell), rotations[of], origins[of], shell)
    return np.clip(out, 0, 1)
