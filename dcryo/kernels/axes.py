"""The symmetry axes of a map that was made without symmetry.

A map V has the point group {g} in the orientation R and about the centre where every g leaves W(x) = V(R^T (x - t))
as it is. How well V agrees with itself turned is measured once: for directions over the half sphere and each angle
that the group has, the best correlation over shifts (a self-rotation function, Rossmann & Blow 1962, but of the map
and not of its intensities, so that the centre comes with it). The score of an orientation is the mean of what its
operators find there.

The best ones are refined through levels of growing resolution. W is brought onto the mean of its mates W(g x), itself
not among them, for its noise would hold it. If W is off by a small turn or shift d, a mate is off by g^-1 d. The sum
of g d over the group is G P d, P d being the part of d that every g leaves alone: what lies along the axis of Cn, for
other groups nothing. So the mean of the mates is off by (G P d - d) / (G - 1), and of the step from W to it the part
(G - 1) / G, less what lies in P, leads to the axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from dcryo.errors import InputError
from dcryo.euler import matrix_from_rotvec, rotvec_from_matrix
from dcryo.kernels import overlay
from dcryo.kernels.alignment import Correlator, Move, coarse_shell, distinct, turned_sum, within
from dcryo.kernels.overlay import half_ball
from dcryo.kernels.randomness import generator
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.sampling import global_grid, pixel_count, pixel_directions, rotation_matrices
from dcryo.kernels.symmetry import operators as point_group

_ORDER = 3
# Orientations that are refined on the first level, and from one level to the next.
_CANDIDATES, _KEPT = 96, (10, 4, 2)
_FINER = 1.5
# Rounds of a refinement and steps of each climb, on the first level and on others.
_FIRST, _OTHERS = (3, 3), (8, 8)
_SHORTEST_STEP = 1e-3
_RANDOM_TURNS = 48

PLAUSIBLE_GROUPS = (*(f"C{n}" for n in range(2, 9)), *(f"D{n}" for n in range(2, 8)), "T", "O", "I1")


@dataclass(frozen=True)
class SymmetryAxes(Move):
    """The move that brings a map into the setting of a point group.

    agreement: (c - c0) / (1 - c0), c the mean correlation of the moved map with its mates under the group, c0 that with
    itself after random turns about the centre of its round part, both of whitened transforms over all voxels of the
    shells in use. 1 is perfect symmetry, 0 is no more than chance; c0 does not depend on the group.
    """

    agreement: float


def symmetry_axes(volume: np.ndarray, operators: np.ndarray, shell: int) -> SymmetryAxes:
    """Orientation and centre in which a map (D, D, D) best obeys a point group, operators (G, 3, 3), up to a shell.

    Where the map has the symmetry, orientations that turn the group into itself are as good as each other, and any is
    given; along the axis of Cn neither shift nor turn is determined, and the map is left where it is. Raises
    InputError where the map is constant or not finite, or the group has no other operator than the identity.
    """
    if len(operators) < 2:
        raise InputError("C1 has no axes to be found; name the point group that the map may have")
    return _Search(volume, shell).best(operators)


def symmetry_table(volume: np.ndarray, shell: int, groups: Sequence[str] = PLAUSIBLE_GROUPS) -> dict[str, SymmetryAxes]:
    """Axes and agreement of a map (D, D, D) for each of several point groups, by name, up to a shell.

    A map that has a symmetry has those of its subgroups too: look for the largest group that agrees about as well.
    """
    search = _Search(volume, shell)
    return {name: search.best(point_group(name)) for name in groups}


def symmetrised(volume: np.ndarray, operators: np.ndarray) -> np.ndarray:
    """Mean of a map (D, D, D) over a point group, operators (G, 3, 3), about the box centre; (D, D, D) float32.

    Voxels that an operator takes out of the box are 0, and frequencies beyond the last shell blank.
    """
    box = len(volume)
    kept = np.logical_and.reduce([within(operator, np.zeros(3), box) for operator in operators])
    mean = turned_sum(np.where(kept, volume, 0), np.asarray(operators), np.zeros(3)) / len(operators)
    return np.where(kept, mean, 0).astype(np.float32)


class _Search:
    """What a map says of turns that leave it as it is, kept over the groups that are tried."""

    def __init__(self, volume: np.ndarray, shell: int) -> None:
        if len(set(volume.shape)) != 1 or not np.isfinite(volume).all() or np.ptp(volume) == 0:
            raise InputError(f"a map of {volume.shape} voxels; expected a cube that is finite and not constant")
        self._box = len(volume)
        self._shell = max(1, min(shell, (self._box - 1) // 2))
        self._ball = half_ball(self._shell)
        framed = overlay.framed(volume)
        self._source = overlay.turnable(framed, self._shell)
        self._level = coarse_shell(self._source, self._ball)
        own = overlay.sampled(framed, self._shell)
        self._correlator = Correlator(self._source, own, self._ball, self._level)
        self._of_angle: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def best(self, operators: np.ndarray) -> SymmetryAxes:
        """The best axes of a group."""
        group = np.asarray(operators, dtype=np.float64)
        rotations, shifts = self._candidates(group)
        level, kept, effort = self._level, iter(_KEPT), _FIRST
        while True:
            refined = [self._refined(*one, group, level, *effort) for one in zip(rotations, shifts, strict=True)]
            rotations, shifts, information = (np.array(part) for part in zip(*refined, strict=True))
            if level == self._shell and effort == _OTHERS:
                break
            near_px = self._box / (2 * np.pi * level)
            rotations, shifts, _ = distinct(rotations, shifts, information, next(kept, _KEPT[-1]), near_px)
            level, effort = min(self._shell, int(np.ceil(level * _FINER))), _OTHERS
        best = int(np.argmax(information))
        return SymmetryAxes(rotations[best], shifts[best], False, self._agreement(rotations[best], shifts[best], group))

    def _candidates(self, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Orientations (N, 3, 3) and shifts (N, 3) in px that the table of turns favours."""
        turns = rotvec_from_matrix(group[1:])
        angles = np.linalg.norm(turns, axis=1)
        axes = turns / angles[:, None]
        rotations = _orientations(group)
        scores = np.zeros(len(rotations))
        nearest = []
        for axis, angle in zip(axes, angles, strict=True):
            # In the map the axis of g is R^T a.
            place = np.argmax(np.abs(axis @ rotations @ _half_sphere().T), axis=1)
            scores += self._turns(angle)[0][place]
            nearest.append(place)
        order = np.argsort(-scores, kind="stable")[: 20 * _CANDIDATES]
        best, _, _ = distinct(rotations[order], np.zeros((len(order), 3)), scores[order], _CANDIDATES, 1.0)
        chosen = [int(np.flatnonzero((rotations == one).all(axis=(1, 2)))[0]) for one in best]
        shifts = []
        for n in chosen:
            there = [self._turns(angle)[1][place[n]] for angle, place in zip(angles, nearest, strict=True)]
            turns = matrix_from_rotvec(angles[:, None] * _half_sphere()[[place[n] for place in nearest]])
            shifts.append(-rotations[n] @ _centre(turns, np.array(there)))
        return best, np.array(shifts)

    def _turns(self, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """Best correlation (N,) of the map with itself turned by an angle about directions, and its shift (N, 3)."""
        key = round(angle * 1e6)
        if key not in self._of_angle:
            turns = matrix_from_rotvec(angle * _half_sphere())
            used = self._ball.frequencies[: self._ball.within(self._level)]
            parts = [
                self._correlator.best(overlay.turned(self._source, turns[first : first + 32], used))
                for first in range(0, len(turns), 32)
            ]
            self._of_angle[key] = np.concatenate([p for p, _ in parts]), np.concatenate([s for _, s in parts])
        return self._of_angle[key]

    def _refined(
        self, rotation: np.ndarray, shift: np.ndarray, group: np.ndarray, shell: int, rounds: int, steps: int
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """The nearest orientation and shift that obey the group best up to a shell, and the information in that."""
        damp = (len(group) - 1) / len(group) * (np.eye(3) - group.mean(axis=0))
        used = self._ball.within(shell)
        mates = np.zeros(len(self._ball.frequencies), dtype=np.complex64)
        for _ in range(rounds):
            mates[:used] = self._mates(rotation, shift, group, shell)
            turns, shifts, _ = overlay.climb(self._source, mates, rotation[None], shift[None], shell, self._ball, steps)
            turn, move = damp @ rotvec_from_matrix(turns[0] @ rotation.T), damp @ (shifts[0] - shift)
            rotation, shift = matrix_from_rotvec(turn) @ rotation, shift + move
            if np.linalg.norm(turn) + 2 * np.pi * shell / self._box * np.linalg.norm(move) < _SHORTEST_STEP:
                break
        mates[:used] = self._mates(rotation, shift, group, shell)
        own, start = self._moved(rotation, shift, np.eye(3), shell), self._ball.start[: shell + 2]
        # The mates' mean is weaker than they are: its correlation is put back to the mean of theirs.
        weaker = np.sqrt(overlay.shell_power(mates[:used], start) / np.maximum(overlay.shell_power(own, start), 1e-30))
        correlations = overlay.shell_correlations(own, mates[:used], start) * weaker
        counts = np.diff(start)
        return rotation, shift, sum(overlay.gain(c, n)[0] for c, n in zip(correlations, counts, strict=True) if n)

    def _moved(self, rotation: np.ndarray, shift: np.ndarray, turn: np.ndarray, shell: int) -> np.ndarray:
        """The transform (P,) of W(g^T x) up to a shell."""
        frequencies = self._ball.frequencies[: self._ball.within(shell)]
        values = overlay.turned(self._source, (turn @ rotation)[None], frequencies)[0]
        return values * overlay.phases(frequencies, turn @ shift, self._box)

    def _mates(self, rotation: np.ndarray, shift: np.ndarray, group: np.ndarray, shell: int) -> np.ndarray:
        """The mean of the mates' transforms (P,), without W itself."""
        total = np.zeros(self._ball.within(shell), dtype=np.complex64)
        for turn in group[1:]:
            total += self._moved(rotation, shift, turn, shell)
        return total / np.float32(len(group) - 1)

    def _correlations(self, rotation: np.ndarray, shift: np.ndarray, turns: np.ndarray, shell: int) -> np.ndarray:
        """Mean correlation per shell of W with itself after turns (N, 3, 3) about the box centre."""
        start = self._ball.start[: shell + 2]
        own = self._moved(rotation, shift, np.eye(3), shell)
        return np.mean(
            [overlay.shell_correlations(own, self._moved(rotation, shift, turn, shell), start) for turn in turns],
            axis=0,
        )

    def _agreement(self, rotation: np.ndarray, shift: np.ndarray, group: np.ndarray) -> float:
        found = self._mean_correlation(rotation, shift, group[1:])
        return (found - self._by_chance) / max(1 - self._by_chance, 1e-6)

    @cached_property
    def _by_chance(self) -> float:
        """Mean correlation of the map with itself after random turns, about the centre that suits them best."""
        turns = random_rotations(_RANDOM_TURNS, generator(0, "turns by chance", 0))
        used = self._ball.frequencies[: self._ball.within(self._level)]
        _, shifts = self._correlator.best(overlay.turned(self._source, turns, used))
        return self._mean_correlation(np.eye(3), -_centre(turns, shifts), turns)

    def _mean_correlation(self, rotation: np.ndarray, shift: np.ndarray, turns: np.ndarray) -> float:
        correlations = self._correlations(rotation, shift, turns, self._shell)
        return float(np.average(correlations, weights=np.diff(self._ball.start)))


def _centre(turns: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Centre c (3,) whose turns (N, 3, 3) need the shifts (N, 3) that were found, (1 - Q) c, in the least squares."""
    return np.linalg.lstsq((np.eye(3) - turns).reshape(-1, 3), shifts.ravel(), rcond=1e-6)[0]


@cache
def _half_sphere() -> np.ndarray:
    """Directions (N, 3) of the grid of _ORDER with z >= 0, and of those on the equator half."""
    directions = pixel_directions(_ORDER, np.arange(pixel_count(_ORDER)))
    x, y, z = np.round(directions, 9).T
    return directions[(z > 0) | ((z == 0) & ((y > 0) | ((y == 0) & (x > 0))))]


def _orientations(group: np.ndarray) -> np.ndarray:
    """Rotations (N, 3, 3), a grid over all that a group does not make equal."""
    axis = group.mean(axis=0)
    if np.trace(axis) > 0.5:  # one axis, that of Cn: all that counts is which direction is turned onto it
        directions = _half_sphere()
        onto = np.linalg.eigh(axis + axis.T)[1][:, -1]
        half_way = directions + onto * np.where(directions @ onto < 0, -1, 1)[:, None]
        half_way /= np.linalg.norm(half_way, axis=1, keepdims=True)
        # Two half turns make the smallest turn.
        first, second = (2 * v[:, :, None] * v[:, None, :] - np.eye(3) for v in (directions, half_way))
        return second @ first
    # R and g R are equal, and so are R^T and R^T g.
    pixels, psis = global_grid(_ORDER, group, np.eye(3))
    return np.ascontiguousarray(np.swapaxes(rotation_matrices(_ORDER, pixels, psis, np.eye(3)), 1, 2))
