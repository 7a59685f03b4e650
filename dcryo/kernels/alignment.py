"""Bring one map onto another: rotation, shift and hand.

The search is exhaustive where the maps are so coarse that the grid of rotations cannot miss: at each of its rotations,
in both hands, the best shift comes from the peak of their phase correlation (Kuglin & Hines 1975), with every voxel
whitened (divided by the root of the mean power of its shell) so that the shells count by what they show, not by how
strong they are. How far that is, the map says itself: up to the shell in which it hardly knows itself after a turn
as large as the grid's step. The best candidates climb from there (`overlay.climb`) through levels of growing
resolution, fewer in each.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from numba import njit

from dcryo.errors import InputError
from dcryo.euler import matrix_from_rotvec
from dcryo.kernels import fft, overlay, slices
from dcryo.kernels.filters import pad_or_crop
from dcryo.kernels.interpolation import read
from dcryo.kernels.overlay import HalfBall, Turnable, half_ball
from dcryo.kernels.rotations import angle_between_deg
from dcryo.kernels.sampling import pixel_count, psi_count, rotation_matrices, step_deg
from dcryo.kernels.slices import locate

_ORDER = 2
# A coarse search looks no farther than a shell in which the map still correlates so well with itself after a turn by
# _OFF_GRID_DEG, about what a rotation lies off the grid of _ORDER; and within these shells in any case.
_KNOWS_ITSELF = 0.5
_OFF_GRID_DEG = 0.5 * step_deg(_ORDER)
_COARSE_SHELLS = (4, 8)
# Shifts are looked for up to this part of the box: two maps, each off-centre by 15 percent, in opposite directions.
_LARGEST_SHIFT = 0.35
# Candidates of each hand that climb on the first level, and from one level to the next.
_CANDIDATES, _KEPT = 80, (24, 8, 3)
_FINER = 1.5
# Steps of a climb: enough to tell candidates apart, and to the top.
_SOME_STEPS, _STEPS = 6, 30
# `moved` reads the transform of the volume in a box so much larger, which keeps what the kernel folds back small.
_MARGIN = 1.5


@dataclass(frozen=True)
class Move:
    """Where a map goes; `moved` does it.

    What lies at p from the box centre of the map goes to R p + t, or, where the map is mirrored, to R (-p) + t: it is
    inverted through the box centre first. rotation: R, (3, 3) float64; shift_px: t, (3,) x y z.
    """

    rotation: np.ndarray
    shift_px: np.ndarray
    mirrored: bool

    @property
    def turn(self) -> np.ndarray:
        """The orthogonal matrix (3, 3) that takes p to R p or, mirrored, to -R p."""
        return -self.rotation if self.mirrored else self.rotation


@dataclass(frozen=True)
class Alignment(Move):
    """The move that brings a map onto another. correlation: of both maps' whitened transforms, over all voxels of
    shells 1 to the last that was looked at."""

    correlation: float


def align(moving: np.ndarray, onto: np.ndarray, resolution_shell: int, *, hands: bool) -> Alignment:
    """The rotation, shift and, with `hands`, hand that bring a map onto another best.

    moving, onto: (D, D, D) real, of the same voxel size; resolution_shell: the last shell that both maps have signal
    in, or the last below D / 2 where that is less; hands: whether the mirror image is tried too. What lies outside the
    sphere that the box holds does not count. Where the molecule is symmetric any of the equal answers is given.
    Raises InputError where a map is constant or not finite, or the maps have no common box.
    """
    if moving.shape != onto.shape or len(set(moving.shape)) != 1:
        raise InputError(f"maps of {moving.shape} and {onto.shape} voxels cannot be aligned; expected two equal cubes")
    for name, volume in (("that is moved", moving), ("that it is moved onto", onto)):
        if not np.isfinite(volume).all() or np.ptp(volume) == 0:
            raise InputError(f"the map {name} is constant or not finite: there is nothing to align")
    box = len(moving)
    shell = max(1, min(resolution_shell, (box - 1) // 2))
    ball = half_ball(shell)
    source = overlay.turnable(overlay.framed(moving), shell)
    target = overlay.sampled(overlay.framed(onto), shell)
    level = coarse_shell(source, ball)
    signs = (1.0, -1.0) if hands else (1.0,)
    found = [
        (sign * rotations, shifts) for sign, (rotations, shifts) in
        zip(signs, _coarse_search(source, target, ball, level, signs), strict=True)
    ]  # fmt: skip
    kept = iter(_KEPT)
    while True:
        steps = _STEPS if level == shell else _SOME_STEPS
        reached = [overlay.climb(source, target, *one, level, ball, steps) for one in found]
        if level == shell:
            break
        count = next(kept, _KEPT[-1])
        found = [distinct(*one, count, box / (2 * np.pi * level))[:2] for one in reached]
        level = min(shell, int(np.ceil(level * _FINER)))
    turns, shifts, information = (np.concatenate(parts) for parts in zip(*reached, strict=True))
    best = int(np.argmax(information))
    turn, shift = turns[best], shifts[best]
    mirrored = bool(np.linalg.det(turn) < 0)
    correlations = overlay.shell_correlations(
        overlay.turned(source, turn[None], ball.frequencies)[0] * overlay.phases(ball.frequencies, shift, box),
        target, ball.start,
    )  # fmt: skip
    correlation = float(np.average(correlations, weights=np.diff(ball.start)))
    return Alignment(-turn if mirrored else turn, shift, mirrored, correlation)


def coarse_shell(source: Turnable, ball: HalfBall) -> int:
    """The last shell in which a grid of rotations of _ORDER cannot miss what the map shows, within _COARSE_SHELLS."""
    axes = np.concatenate([np.eye(3), np.array([[1, 1, 1], [1, -1, 1], [1, 1, -1], [-1, 1, 1]]) / np.sqrt(3)])
    last = min(_COARSE_SHELLS[1], ball.shell_max)
    used = slice(0, ball.within(last))
    itself, *others = overlay.turned(
        source, np.concatenate([np.eye(3)[None], matrix_from_rotvec(np.deg2rad(_OFF_GRID_DEG) * axes)]),
        ball.frequencies[used],
    )  # fmt: skip
    start = ball.start[: last + 2]
    known = np.mean([overlay.shell_correlations(itself, other, start) for other in others], axis=0)
    lost = np.flatnonzero(known[1:] < _KNOWS_ITSELF)
    return min(max(int(lost[0]) if len(lost) else last, _COARSE_SHELLS[0]), last)


def _coarse_search(
    source: Turnable, target: np.ndarray, ball: HalfBall, shell: int, signs: tuple[float, ...]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The best rotations (N, 3, 3) of the grid, and their shifts (N, 3) in px, for each sign."""
    used = ball.within(shell)
    correlator = Correlator(source, target, ball, shell)
    psis = np.arange(psi_count(_ORDER))
    scores, shifts, rotations = [], [], []
    for pixel in range(pixel_count(_ORDER)):
        some = rotation_matrices(_ORDER, np.full_like(psis, pixel), psis, np.eye(3))
        values = overlay.turned(source, some, ball.frequencies[:used])
        pairs = [correlator.best(values if sign > 0 else np.conj(values)) for sign in signs]
        scores.append([score for score, _ in pairs])
        shifts.append([shift for _, shift in pairs])
        rotations.append(some)
    every = np.concatenate(rotations)
    found = []
    for hand in range(len(signs)):
        of_hand = np.concatenate([score[hand] for score in scores])
        best = np.argsort(-of_hand, kind="stable")[:_CANDIDATES]
        found.append((every[best], np.concatenate([shift[hand] for shift in shifts])[best]))
    return found


class Correlator:
    """Phase correlation of many transforms with one, up to a shell; both whitened."""

    def __init__(self, source: Turnable, target: np.ndarray, ball: HalfBall, shell: int) -> None:
        used, start = ball.within(shell), ball.start[: shell + 2]
        counts = np.diff(start)
        white = overlay.whitening(source.power[: shell + 1], start) * overlay.whitening(
            overlay.shell_power(target[:used], start), start
        )
        self._target = target[:used] * np.repeat(white, counts).astype(np.float32)
        self._size = scipy.fft.next_fast_len(2 * shell + 2, real=True)
        self._to_px = source.box_px / self._size
        kx, ky, kz = ball.frequencies[:used].astype(np.int64).T
        self._place = (kz % self._size) * self._size * (self._size // 2 + 1) + (ky % self._size) * (
            self._size // 2 + 1
        ) + kx  # fmt: skip
        # The plane x = 0 is its own mate.
        plane = kx == 0
        self._plane = np.flatnonzero(plane)
        self._mate = (-kz[plane] % self._size) * self._size * (self._size // 2 + 1) + (
            -ky[plane] % self._size
        ) * (self._size // 2 + 1)  # fmt: skip
        axis = np.fft.fftfreq(self._size, 1 / self._size)
        distance = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) * self._to_px
        self._allowed = np.flatnonzero((distance <= _LARGEST_SHIFT * source.box_px).ravel())

    def best(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Highest correlation (N,) of transforms (N, P) over shifts, and the shift (N, 3) x y z in px."""
        size = self._size
        product = np.zeros((len(values), size * size * (size // 2 + 1)), dtype=np.complex64)
        _multiply(values, self._target, self._place, self._plane, self._mate, product)
        maps = scipy.fft.irfftn(product.reshape(-1, size, size, size // 2 + 1), s=(size,) * 3, axes=(1, 2, 3))
        highest, place = _peaks(maps.reshape(len(values), -1), self._allowed)
        index = np.stack([place % size, place // size % size, place // size**2], axis=1)
        return highest, np.where(index > size // 2, index - size, index) * self._to_px


@njit(nogil=True, cache=True)
def _multiply(values, target, place, plane, mate, out):  # type: ignore[no-untyped-def]
    """conj(F) G on the grid of a half-complex transform, so that the peak of its inverse lies at the shift."""
    for n in range(len(values)):
        for p in range(len(target)):
            out[n, place[p]] = np.conj(values[n, p]) * target[p]
        for i in range(len(plane)):
            out[n, mate[i]] = np.conj(out[n, place[plane[i]]])


@njit(nogil=True, cache=True)
def _peaks(maps, allowed):  # type: ignore[no-untyped-def]
    highest, place = np.empty(len(maps)), np.empty(len(maps), dtype=np.int64)
    for n in range(len(maps)):
        best = allowed[0]
        for i in allowed:
            if maps[n, i] > maps[n, best]:
                best = i
        highest[n], place[n] = maps[n, best], best
    return highest, place


def distinct(
    turns: np.ndarray, shifts: np.ndarray, information: np.ndarray, count: int, near_px: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best `count` of candidates, (N, 3, 3), (N, 3) and (N,), without those that are near a better one: shifted by
    less than near_px and turned by less than half of the grid's step."""
    kept: list[int] = []
    for n in np.argsort(-information, kind="stable"):
        near = (np.linalg.norm(shifts[kept] - shifts[n], axis=1) < near_px) & (
            angle_between_deg(turns[kept], turns[n]) < _OFF_GRID_DEG
        )
        if not near.any():
            kept.append(int(n))
        if len(kept) == count:
            break
    return turns[kept], shifts[kept], information[kept]


def moved(volume: np.ndarray, move: Move) -> np.ndarray:
    """A map (D, D, D) after a move, (D, D, D) float32.

    What a move takes out of the box is lost; what it brings in from outside the box is 0. Interpolated in Fourier
    space with the kernel of `gridding`; frequencies beyond the last shell, in the corners of Fourier space, are blank.
    """
    turn, shift = move.turn, np.asarray(move.shift_px, dtype=np.float64)
    box = volume.shape[0]
    # A volume repeats itself beyond its box: what would leave the box is left out, what would come in is cut off.
    staying = np.where(within(turn, shift, box), volume, 0)
    there = turned_sum(staying, turn[None], shift)
    return np.where(within(turn.T, -turn.T @ shift, box), there, 0).astype(np.float32)


def turned_sum(volume: np.ndarray, turns: np.ndarray, shift_px: np.ndarray) -> np.ndarray:
    """Sum of a volume (D, D, D) after turns (N, 3, 3), then shifted by (3,) px; (D, D, D) float32, periodic."""
    box = volume.shape[0]
    last = (box - 1) // 2
    wide = 2 * int(np.ceil(_MARGIN * box / 2))
    zoom = wide / box
    prepared = slices.prepare(pad_or_crop(volume, wide), int(np.ceil(zoom * (last + 0.5))))
    source = Turnable(slices.numbers(prepared), prepared.shape, slices.scale(wide) * zoom, np.empty(0), box)
    transform = np.zeros((box, box, box // 2 + 1), dtype=np.complex64)
    for turn in turns:
        _add_turned(source, (source.padding * turn).astype(np.float32), last, transform)
    full, half = np.fft.fftfreq(box), np.arange(box // 2 + 1) / box
    x, y, z = (
        np.exp(-2j * np.pi * k * t).astype(np.complex64) for k, t in zip((half, full, full), shift_px, strict=True)
    )
    transform *= z[:, None, None] * y[:, None]
    transform *= x
    transform[0, 0, 0] = len(turns) * np.sum(volume, dtype=np.float64)
    return fft.irfftn(transform, box)


@njit(nogil=True, cache=True, fastmath=True)
def _add_turned(source, turn, last, out):  # type: ignore[no-untyped-def]
    """Add a turned volume to a half-complex transform (D, D, D // 2 + 1), up to a shell; turn: (3, 3) float32 times the
    padding. Along a row the volume is read along a straight line, of which caches hold what comes next."""
    volume, shape, box = source.volume, source.shape, len(out)
    row = 2 * shape[2]
    for z in range(box):
        kz = z if 2 * z < box else z - box
        for y in range(box):
            ky = y if 2 * y < box else y - box
            for kx in range(last + 1):
                if kx * kx + ky * ky + kz * kz >= (last + 0.5) ** 2:
                    break
                lowest, fx, fy, fz, sign = locate(shape, turn, np.float32(kx), np.float32(ky), np.float32(kz))
                real, imaginary = read(volume, 2 * lowest, row, row * shape[1], fx, fy, fz)
                out[z, y, kx] += complex(real, sign * imaginary)


def within(turn: np.ndarray, shift: np.ndarray, box: int) -> np.ndarray:
    """Whether a voxel's centre, turned and shifted, still lies in the box, (D, D, D) bool."""
    axis = np.arange(box) - box // 2
    low, high = axis[0] - 0.5, axis[-1] + 0.5
    inside = np.ones((box,) * 3, dtype=bool)
    for row, offset in zip(turn, shift, strict=True):
        place = row[2] * axis[:, None, None] + row[1] * axis[:, None] + row[0] * axis + offset
        inside &= (place > low) & (place < high)
    return inside


def moved_poses(rotations: np.ndarray, origins_px: np.ndarray, move: Move) -> tuple[np.ndarray, np.ndarray]:
    """Poses of particles after their map is replaced by the moved one: rotations A (N, 3, 3) and origins (N, 2) in px.

    Projections do not change. With the map's points at q = T p + t (T the turn, of determinant -1 where mirrored) the
    image shows A p - o = A T' q - (A T' t + o), so A becomes A T' and the origin grows by its first two rows times t.
    Where T is improper so is A T'; its third row, which a projection does not see, then changes its sign. So a map and
    its mirror image have the same projections: the mirrored pose is the other one turned by 180 degrees in the plane.
    """
    turns = np.asarray(rotations, dtype=np.float64) @ move.turn.T
    if move.mirrored:
        turns[..., 2, :] *= -1
    return turns, np.asarray(origins_px, dtype=np.float64) + (turns @ move.shift_px)[..., :2]
