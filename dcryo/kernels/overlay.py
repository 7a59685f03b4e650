"""How well one Fourier volume lies on another, shell by shell, and which small move makes it lie better.

A volume F is turned and shifted to F'(k) = exp(-2 pi i k . t / D) F(A^T k) and compared with G. A is orthogonal, of
determinant -1 where the volume is inverted through the box centre first, which makes its mirror image; t is in pixels.

Volumes of one molecule agree well in some shells and badly in others, and nobody knows in which. Where half of shell s
holds n_s complex voxels and the maps are Gaussian with a correlation c_s there, what one tells of the other is
-n_s log(1 - c_s^2) (Cover & Thomas, Elements of Information Theory, 2006, section 8.5). With the correlations that are
found in place of the true ones this is the likelihood ratio against maps that have nothing in common. This information
is what is climbed: a shell counts by its voxels and by how well it agrees, so neither the few strong voxels of lowest
resolution decide alone, nor the many of the highest that hold noise.

A small move turns A to exp([d]x) A and adds to t:

    dF' / dd = -k x grad F', dF' / dt = -i (2 pi / D) k F'

The Hessian of a shell's correlation c is taken where G is c F' and noise (Gauss-Newton): minus c <dF', dF'> / <F', F'>
for the part of dF' that is perpendicular to F'.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit

from dcryo.kernels import fft, slices
from dcryo.kernels.interpolation import before_read, read, read_slope
from dcryo.kernels.masks import sphere
from dcryo.kernels.shells import shell_number
from dcryo.kernels.slices import AHEAD, CACHED, locate

# Beyond this correlation the information grows as a straight line: what is left of better ones is interpolation.
_SURE = 0.95
# Of shells that do not agree (yet) the Hessian is taken as if they did so much, so that it stays positive.
_UNSURE = 0.1
_PARAMETERS = 6
# Sums over a shell: Re <G, F'>, its gradient by d and t, <dF', dF'> (the upper triangle by rows), |F'|^2 and half its
# gradient by d.
_CROSS, _GRADIENT, _SQUARES, _POWER, _POWER_GRADIENT, _SUMS = 0, 1, 7, 28, 29, 32
# Steps of a climb in radians, of the turn and of the phases that a shift turns: the longest, and one that ends it.
_LONGEST_STEP, _SHORTEST_STEP = 0.15, 1e-5
_EDGE_PX = 3


@dataclass(frozen=True)
class HalfBall:
    """Every frequency of shells 1 to `shell_max` in half of Fourier space, sorted by shell.

    frequencies: (P, 3) float32, x y z in Fourier pixels, the first that is not 0 of x, y, z positive;
    start: (shell_max + 2,) int64, shell s is start[s]:start[s + 1].
    """

    shell_max: int
    frequencies: np.ndarray
    start: np.ndarray

    def within(self, shell: int) -> int:
        """Number of frequencies up to and including a shell: a resolution is a prefix."""
        return int(self.start[shell + 1])


@lru_cache(maxsize=8)
def half_ball(shell_max: int) -> HalfBall:
    """The half ball up to a shell."""
    axis = np.arange(-shell_max, shell_max + 1)
    kz, ky, kx = (grid.ravel() for grid in np.meshgrid(axis, axis, axis[shell_max:], indexing="ij"))
    shell = shell_number(np.sqrt(kx**2 + ky**2 + kz**2))
    half = (kx > 0) | ((ky > 0) | ((ky == 0) & (kz > 0)))
    kept = (shell >= 1) & (shell <= shell_max) & half
    order = np.argsort(shell[kept], kind="stable")
    frequencies = np.stack([kx, ky, kz], axis=1)[kept][order].astype(np.float32)
    start = np.searchsorted(shell[kept][order], np.arange(shell_max + 2)).astype(np.int64)
    for array in (frequencies, start):
        array.setflags(write=False)
    return HalfBall(shell_max, frequencies, start)


class Turnable(NamedTuple):
    """A volume that can be read at any frequency, up to a shell, and its power per shell (S,) on the half ball.

    volume: flat float32, real and imaginary parts of the Fourier volume of a shape (see `slices.prepare`); padding:
    its samples per Fourier pixel.
    """

    volume: np.ndarray
    shape: tuple[int, int, int]
    padding: float
    power: np.ndarray
    box_px: int


def framed(volume: np.ndarray) -> np.ndarray:
    """A volume (D, D, D) inside the sphere that its box holds, its solvent (the median) at 0: what can be turned."""
    box = volume.shape[0]
    mask = sphere(box, box - 2 * _EDGE_PX, _EDGE_PX)
    return ((volume - np.median(volume[mask > 0])) * mask).astype(np.float32)


def turnable(volume: np.ndarray, shell_max: int) -> Turnable:
    """Prepare a volume (D, D, D) to be turned; shells up to `shell_max`, which lies below D / 2."""
    box = volume.shape[0]
    prepared = slices.prepare(volume, shell_max)
    power = shell_power(sampled(volume, shell_max), half_ball(shell_max).start)
    return Turnable(slices.numbers(prepared), prepared.shape, slices.scale(box), power, box)


def sampled(volume: np.ndarray, shell_max: int) -> np.ndarray:
    """The transform (P,) complex64 of a volume (D, D, D) on the half ball up to a shell below D / 2."""
    kx, ky, kz = half_ball(shell_max).frequencies.astype(int).T
    return fft.rfftn(volume)[kz, ky, kx]


def shell_power(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Sum of |values|^2 (P,) per shell, (S,) float64; shell 0 has none."""
    power = np.concatenate([[0.0], np.cumsum(values.real.astype(float) ** 2 + values.imag.astype(float) ** 2)])
    return np.diff(power[start])


def whitening(power: np.ndarray, start: np.ndarray) -> np.ndarray:
    """What makes each voxel of a shell's mean power 1, (S,) float64, from the sums of power (S,)."""
    return np.sqrt(np.divide(np.diff(start), power, out=np.zeros(len(power)), where=power > 0))


@njit(nogil=True, cache=True, fastmath=True)
def turn_all(source, turns, frequencies, out):  # type: ignore[no-untyped-def]
    """Values of a Turnable at A^T k, without shift: turns A (N, 3, 3) float32 times its padding, frequencies k (P, 3)
    float32, into out (N, P) complex64."""
    volume, shape = source.volume, source.shape
    row = 2 * shape[2]
    for n in range(len(turns)):
        for p in range(len(frequencies)):
            lowest, fx, fy, fz, sign = locate(shape, turns[n], frequencies[p, 0], frequencies[p, 1], frequencies[p, 2])
            real, imaginary = read(volume, 2 * lowest, row, row * shape[1], fx, fy, fz)
            out[n, p] = complex(real, sign * imaginary)


def turned(source: Turnable, turns: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Values (N, P) complex64 at A^T k of turns A (N, 3, 3) and frequencies k (P, 3) in Fourier pixels."""
    out = np.empty((len(turns), len(frequencies)), dtype=np.complex64)
    turn_all(source, (source.padding * np.asarray(turns)).astype(np.float32), frequencies, out)
    return out


@njit(nogil=True, cache=True)
def gain(correlation, count):  # type: ignore[no-untyped-def]
    """Information of a half shell of `count` voxels and its derivative by the correlation; odd in the correlation."""
    c = min(abs(correlation), _SURE)
    slope = 2 * count * c / (1 - c * c)
    value = -count * np.log(1 - c * c) + slope * (abs(correlation) - c)
    return (value if correlation > 0 else -value), slope


# Without fastmath: code that may be rearranged is so in another way where it is compiled into its caller, and whether
# that is what runs depends on which process compiled it. Bits must not.
@njit(nogil=True, cache=True, error_model="numpy")
def _shell_sums(source, turn, shift, frequencies, first, last, onto, sums):  # type: ignore[no-untyped-def]
    """Sums over one shell, frequencies[first:last], into sums (_SUMS,) float64; turn: (3, 3) float32 times the
    padding."""
    volume, shape = source.volume, source.shape
    row = 2 * shape[2]
    unit = 2 * np.pi / source.box_px
    slopes = np.empty((_PARAMETERS, 2))
    sums[:] = 0
    for p in range(first, last):
        u, v, w = frequencies[p, 0], frequencies[p, 1], frequencies[p, 2]
        if len(volume) > CACHED:
            q = min(p + AHEAD, last - 1)
            later = locate(shape, turn, frequencies[q, 0], frequencies[q, 1], frequencies[q, 2])[0]
            before_read(volume, 2 * later, row, row * shape[1])
        lowest, fx, fy, fz, sign = locate(shape, turn, u, v, w)
        real, imaginary, xr, xi, yr, yi, zr, zi = read_slope(volume, 2 * lowest, row, row * shape[1], fx, fy, fz)
        # Of the opposite frequency the value is the conjugate, and the gradient minus the conjugate.
        imaginary, xr, yr, zr = sign * imaginary, sign * xr, sign * yr, sign * zr
        # The gradient in the turned frame, e = A grad F.
        ar = turn[0, 0] * xr + turn[0, 1] * yr + turn[0, 2] * zr
        ai = turn[0, 0] * xi + turn[0, 1] * yi + turn[0, 2] * zi
        br = turn[1, 0] * xr + turn[1, 1] * yr + turn[1, 2] * zr
        bi = turn[1, 0] * xi + turn[1, 1] * yi + turn[1, 2] * zi
        cr = turn[2, 0] * xr + turn[2, 1] * yr + turn[2, 2] * zr
        ci = turn[2, 0] * xi + turn[2, 1] * yi + turn[2, 2] * zi
        slopes[0, 0], slopes[0, 1] = w * br - v * cr, w * bi - v * ci
        slopes[1, 0], slopes[1, 1] = u * cr - w * ar, u * ci - w * ai
        slopes[2, 0], slopes[2, 1] = v * ar - u * br, v * ai - u * bi
        slopes[3, 0], slopes[3, 1] = unit * u * imaginary, -unit * u * real
        slopes[4, 0], slopes[4, 1] = unit * v * imaginary, -unit * v * real
        slopes[5, 0], slopes[5, 1] = unit * w * imaginary, -unit * w * real
        # The phase of the shift is put on G.
        angle = unit * (u * shift[0] + v * shift[1] + w * shift[2])
        cosine, sine = np.cos(angle), np.sin(angle)
        gr = onto[p].real * cosine - onto[p].imag * sine
        gi = onto[p].real * sine + onto[p].imag * cosine
        sums[_CROSS] += gr * real + gi * imaginary
        sums[_POWER] += real * real + imaginary * imaginary
        for i in range(3):
            sums[_POWER_GRADIENT + i] += slopes[i, 0] * real + slopes[i, 1] * imaginary
        place = _SQUARES
        for i in range(_PARAMETERS):
            sums[_GRADIENT + i] += gr * slopes[i, 0] + gi * slopes[i, 1]
            for j in range(i, _PARAMETERS):
                sums[place] += slopes[i, 0] * slopes[j, 0] + slopes[i, 1] * slopes[j, 1]
                place += 1


@njit(nogil=True, cache=True)
def _evaluate(source, turn, shift, frequencies, start, shell, onto, onto_power, gradient, hessian):  # type: ignore[no-untyped-def]
    """Information up to a shell; into gradient (6,) and hessian (6, 6) its slope and minus its curvature
    (Gauss-Newton), which is never negative."""
    scaled = np.empty((3, 3), dtype=np.float32)
    scaled[:] = source.padding * turn
    sums = np.empty(_SUMS)
    along = np.zeros(_PARAMETERS)  # half the gradient of |F'|^2, which a shift does not change
    gradient[:] = 0
    hessian[:] = 0
    total = 0.0
    for s in range(1, shell + 1):
        _shell_sums(source, scaled, shift, frequencies, start[s], start[s + 1], onto, sums)
        power = sums[_POWER]
        norm = np.sqrt(power * onto_power[s])
        if norm == 0:
            continue
        count = start[s + 1] - start[s]
        correlation = sums[_CROSS] / norm
        value, slope = gain(correlation, count)
        total += value
        agreement = max(correlation, _UNSURE)
        curvature = gain(agreement, count)[1] * agreement / power
        along[:3] = sums[_POWER_GRADIENT : _POWER_GRADIENT + 3]
        place = _SQUARES
        for i in range(_PARAMETERS):
            gradient[i] += slope * (sums[_GRADIENT + i] / norm - correlation * along[i] / power)
            for j in range(i, _PARAMETERS):
                hessian[i, j] += curvature * (sums[place] - along[i] * along[j] / power)
                place += 1
    for i in range(_PARAMETERS):
        for j in range(i):
            hessian[i, j] = hessian[j, i]
    return total


@njit(nogil=True, cache=True)
def _small_turn(d):  # type: ignore[no-untyped-def]
    """Matrix of a rotation vector (Rodrigues' formula)."""
    angle = np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
    first = 1.0 if angle < 1e-9 else np.sin(angle) / angle
    second = 0.5 if angle < 1e-6 else (1 - np.cos(angle)) / (angle * angle)
    cross = np.array([[0.0, -d[2], d[1]], [d[2], 0.0, -d[0]], [-d[1], d[0], 0.0]])
    return np.eye(3) + first * cross + second * (cross @ cross)


@njit(nogil=True, cache=True)
def _climb(source, turn, shift, frequencies, start, shell, onto, onto_power, steps):  # type: ignore[no-untyped-def]
    """Climb from a turn (3, 3) and a shift (3,), both changed in place; returns the information reached."""
    gradient, hessian = np.empty(_PARAMETERS), np.empty((_PARAMETERS, _PARAMETERS))
    new_gradient, new_hessian = np.empty(_PARAMETERS), np.empty((_PARAMETERS, _PARAMETERS))
    here = _evaluate(source, turn, shift, frequencies, start, shell, onto, onto_power, gradient, hessian)
    damping = 1e-3
    period = source.box_px / (2 * np.pi * shell)  # a shift that turns phases by a radian, in px
    for _ in range(steps):
        damped = hessian.copy()
        for i in range(_PARAMETERS):
            damped[i, i] = damped[i, i] * (1 + damping) + 1e-12 * (1 + np.trace(hessian))
        step = np.linalg.solve(damped, gradient)
        length = np.sqrt(np.sum(step[:3] ** 2)) + np.sqrt(np.sum(step[3:] ** 2)) / period
        if length > _LONGEST_STEP:
            step *= _LONGEST_STEP / length
        new_turn = _small_turn(step[:3]) @ turn
        new_shift = shift + step[3:]
        there = _evaluate(
            source, new_turn, new_shift, frequencies, start, shell, onto, onto_power, new_gradient, new_hessian
        )
        if there > here:
            turn[:], shift[:], here = new_turn, new_shift, there
            gradient[:], hessian[:] = new_gradient, new_hessian
            damping = max(damping / 10, 1e-6)
        else:
            damping *= 10
        if length < _SHORTEST_STEP or damping > 1e6:
            break
    return here


@njit(nogil=True, cache=True)
def _climb_all(source, turns, shifts, frequencies, start, shell, onto, onto_power, steps, out):  # type: ignore[no-untyped-def]
    for n in range(len(turns)):
        out[n] = _climb(source, turns[n], shifts[n], frequencies, start, shell, onto, onto_power, steps)


def climb(
    source: Turnable, onto: np.ndarray, turns: np.ndarray, shifts: np.ndarray, shell: int, ball: HalfBall, steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest maxima of the information up to a shell, from N starts.

    onto: (P,) complex64 on the ball; turns: (N, 3, 3) orthogonal; shifts: (N, 3) in px, x y z; steps: at most so many.
    Returns turns, shifts and information (N,), float64. Levenberg and Marquardt's damping of Gauss-Newton steps.
    """
    turns, shifts = np.array(turns, dtype=np.float64), np.array(shifts, dtype=np.float64)
    reached = np.empty(len(turns))
    power = shell_power(onto, ball.start)
    _climb_all(source, turns, shifts, ball.frequencies, ball.start, shell, onto, power, steps, reached)
    return turns, shifts, reached


def phases(frequencies: np.ndarray, shift_px: np.ndarray, box_px: int) -> np.ndarray:
    """exp(-2 pi i k . t / D) of frequencies (P, 3), complex64: what shifts a volume by t (3,)."""
    angles = frequencies @ np.asarray(2 * np.pi / box_px * shift_px, dtype=np.float32)
    out = np.empty(len(angles), dtype=np.complex64)
    np.cos(angles, out=out.real)
    np.sin(-angles, out=out.imag)
    return out


def shell_correlations(first: np.ndarray, second: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Correlation of two transforms (P,) on a half ball per shell, (S,) float64; 0 where one has no power."""
    cross = np.concatenate([[0.0], np.cumsum((np.conj(first) * second).real.astype(np.float64))])
    norm = np.sqrt(shell_power(first, start) * shell_power(second, start))
    return np.divide(np.diff(cross[start]), norm, out=np.zeros(len(norm)), where=norm > 0)
