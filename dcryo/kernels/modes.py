"""Modes of the posterior over poses, climbed by derivatives, and the Gaussians around them.

A pose is moved by a small rotation vector d on the image's side, A = exp([d]x) A0, and by a change of its shift t.
With slice S, Y = C X / v at the pose's shift and W = C^2 / v (see `posterior`), the score Re <Y, S> - 1/2 <W, |S|^2> is
that of a least-squares problem, so its gradient comes with a Hessian that is never negative (Gauss-Newton):

    dS / dd = grad S . (k x e_x, k x e_y, k x e_z),    dY / dt = -i (2 pi / D) k Y,    k = (kx, ky, 0)

grad S is the gradient of the interpolation, turned into the image's frame. Steps are damped as by Levenberg
(1944) and Marquardt (1963). A component of the posterior is a mode with the Gaussian that its Hessian makes (Laplace's
approximation), within a Gaussian window: the windows of a grid of rotations add up to one, so that the components that
are climbed from its points share the posterior among them and count none of it twice.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from dcryo.euler import matrix_from_rotvec
from dcryo.kernels.interpolation import read_slope
from dcryo.kernels.shells import HalfPlane
from dcryo.kernels.slices import locate, numbers, scale

# A pose has five parameters: three of rotation (rad), two of shift (px).
PARAMETERS = 5
_BLOCK = 128
# Sums over pixels: cross, norm, then gradients of cross (3 and 2) and of norm (3), then the Hessian's 15.
_CROSS, _NORM, _CROSS_D, _CROSS_T, _NORM_D, _HESSIAN, _SUMS = 0, 1, 2, 5, 7, 10, 25
# A pose is looked at so many times on its way to a mode, at most.
_EVALUATIONS = 12
_FIRST_DAMPING = 1e-3
# A step that promises less than this of log-likelihood is the last one.
_SMALL_GAIN = 0.02
_LONGEST_TURN = 0.35
# Curvature along a step that falls below this part of what it was thought to be is not believed.
_LEAST_BEND = 0.05
# Modes nearer than this many standard deviations of either are one.
_SAME = 0.5
# A component that blurs a slice by no more than this at its rim (Fourier pixels) is one point.
_NARROW_PX = 0.25

# Corners (4) of the regular simplex of unit covariance in the first 0 to 3 of three dimensions.
_SIMPLEX = np.array(
    [
        [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[1, 0, 0], [-1, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[2**0.5, 0, 0], [-(0.5**0.5), 1.5**0.5, 0], [-(0.5**0.5), -(1.5**0.5), 0], [0, 0, 0]],
        [[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]],
    ],
    dtype=np.float64,
)


class Components(NamedTuple):
    """The posteriors of n images as Gaussians around K modes in all, those of image i at start[i]:start[i + 1].

    start: (n + 1,) int64; rotation: (K, 3, 3); shift: (K, 2) px, from the last origin; centre: (K, 3, 3), the middle of
    each one's window, that of shifts being the last origin; score: (K,) log-likelihood of the mode over that of an
    empty image; log_weight: (K,) log of the posterior mass, up to a constant of the image; hessian: (K, 5, 5) of minus
    the log-posterior, window included.
    """

    start: np.ndarray
    rotation: np.ndarray
    shift: np.ndarray
    centre: np.ndarray
    score: np.ndarray
    log_weight: np.ndarray
    hessian: np.ndarray


class Points(NamedTuple):
    """Weighted points that stand for the posteriors of n images, those of image i at start[i]:start[i + 1].

    start: (n + 1,) int64; rotation: (Q, 3, 3); shift: (Q, 2) px; spread_px2: (Q,) variance of the shift about it
    along x or y, their mean; probability: (Q,), which sum to one for each image.
    """

    start: np.ndarray
    rotation: np.ndarray
    shift: np.ndarray
    spread_px2: np.ndarray
    probability: np.ndarray


class Window(NamedTuple):
    """Where a pose may go from its start: standard deviations of a Gaussian window of rotation vectors and of shifts,
    and the hold that the reference has on it there, (6,), see `hold`."""

    turn_rad: float
    shift_px: float
    hold: np.ndarray


def hold(shares: np.ndarray, radius_px: float, box_px: int) -> np.ndarray:
    """With which force images hold on to the poses at which they were back-projected.

    An image's own noise is part of the reference, at its last pose, and correlates with itself there. With the share h
    that it has in what a slice of the reference says at its pixels, the score of a pose that displaces the pixels by q
    gains 2 h rho(q) each, since noise has a mean |X|^2 / v of 2. rho is the transform of the masked volume over its
    value at 0: for a sphere of radius r, 1 - (2 pi / D)^2 r^2 / 10 q^2 for small q.

    shares: (S,) h per shell, of the shells that are scored. Returns (6,): curvature of the gain at the start, for three
    rotations (rad^-2) and two shifts (px^-2), and its height. The gain is taken for a Gaussian of these.
    """
    shells = np.arange(len(shares))
    moment = (2 * np.pi / box_px) ** 2 * np.sum(np.pi * shells * shares * shells**2)
    turn = moment * radius_px**2 / 5
    return np.array([turn, turn, 2 * turn, moment, moment, 2 * np.sum(np.pi * shells * shares)])


def shares(fsc: np.ndarray, mask_fraction: float, images: float) -> np.ndarray:
    """Mean share that an image has in what a regularised reference says at the image's own pixels, per shell, (S,).

    The shares of all images add up to the degrees of freedom of the map in a shell: its voxels, (2 pi s^2 without
    Friedel mates) times the part of the box inside the mask, times what the prior leaves of them, which is the FSC. An
    image has pi s pixels there.

    fsc: (S,) between the halves; images: in a half, times the order of the symmetry.
    """
    shells = np.arange(len(fsc))
    return np.minimum(2 * shells * mask_fraction * np.clip(fsc, 0, 1) / images, 1.0)


def started(rotations: np.ndarray, shifts_px: np.ndarray, start: np.ndarray) -> Components:
    """Components that have not climbed yet, each in the middle of its window.

    rotations: (K, 3, 3); shifts_px: (K, 2); start: (n + 1,).
    """
    count = len(rotations)
    return Components(
        np.asarray(start, dtype=np.int64),
        np.array(rotations, dtype=np.float64),
        np.array(shifts_px, dtype=np.float64),
        np.array(rotations, dtype=np.float64),
        np.zeros(count),
        np.zeros(count),
        np.zeros((count, PARAMETERS, PARAMETERS)),
    )


def climb(
    components: Components,
    prepared: np.ndarray,
    images: np.ndarray,
    weights: np.ndarray,
    pixels: HalfPlane,
    shell: int,
    box_px: int,
    window: Window,
    profile_scale: bool,
) -> Components:
    """Components moved to the nearest modes of the posterior at a resolution.

    prepared: Fourier volume; images: (n, >= P) complex64, Y at the last origins; weights: (n, >= P) float32, W; shell:
    the resolution. Scores of an image that is not finite are not finite.
    """
    climbed = Components(*(column.copy() for column in components))
    _climb_all(
        *climbed, numbers(prepared), prepared.shape, scale(box_px), images, weights, pixels.kx, pixels.ky,
        pixels.within(shell), pixels.shell_max, box_px, window.turn_rad, window.shift_px, window.hold, profile_scale,
    )  # fmt: skip
    return climbed


def settled(
    components: Components, operators: np.ndarray, temperature: float, fraction: float, maximum: int
) -> tuple[Components, np.ndarray]:
    """The distinct modes of each image that hold a fraction of its posterior, best first, and their probabilities.

    Modes that are one mode, symmetry mates among them, are made one, their masses added. Log-weights are divided by the
    temperature before they are weighed. At most `maximum` are kept of an image, and none of an image whose scores are
    not finite.

    operators: (G, 3, 3) of the point group, identity included.
    """
    rows, start, probability, log_weight = _settle(
        components.start, components.rotation, components.shift, components.log_weight, components.hessian,
        np.ascontiguousarray(operators, dtype=np.float64), temperature, fraction, maximum,
    )  # fmt: skip
    kept = Components(start, *(column[rows] for column in components[1:]))
    return kept._replace(log_weight=log_weight), probability


def cubature(components: Components, probability: np.ndarray, radius_px: float) -> Points:
    """Points with the means and covariances of the components.

    Where a component is so wide along m axes that it blurs the slice at `radius_px` (Fourier pixels), it is split into
    the m + 1 corners of the regular simplex of its covariance along them (Stroud 1971, U_n 2-1). Shifts are Gaussian
    about each point, with the mean that goes with its rotation.
    """
    turn_turn, turn_shift = components.hessian[:, :3, :3], components.hessian[:, :3, 3:]
    spread = np.linalg.inv(components.hessian[:, 3:, 3:])
    # The Hessian of the rotation alone, the shift integrated out; the widest axes come first.
    curvature, axes = np.linalg.eigh(turn_turn - turn_shift @ spread @ np.swapaxes(turn_shift, 1, 2))
    sigma = 1 / np.sqrt(curvature)
    split = np.count_nonzero(sigma * radius_px > _NARROW_PX, axis=1)
    owner, corner = np.nonzero(np.arange(4) <= split[:, None])
    turn = np.einsum("qab,qb->qa", axes[owner], sigma[owner] * _SIMPLEX[split[owner], corner])
    first = np.concatenate([[0], np.cumsum(split + 1)])
    shift = components.shift[owner] - np.einsum("qab,qcb,qc->qa", spread[owner], turn_shift[owner], turn)
    return Points(
        first[components.start],
        matrix_from_rotvec(turn) @ components.rotation[owner],
        shift,
        np.trace(spread, axis1=1, axis2=2)[owner] / 2,
        (probability / (split + 1))[owner],
    )


def angular_sd_rad(components: Components) -> np.ndarray:
    """Standard deviation of each component's rotation, root mean square over directions, (K,) in rad."""
    covariance = np.linalg.inv(components.hessian)[:, :3, :3]
    return np.sqrt(np.trace(covariance, axis1=1, axis2=2) / 3)


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _gather(volume, shape, turn, kx, ky, first, last, out):  # type: ignore[no-untyped-def]
    """Slice S, its derivative z along the image's z axis, and e that of a turn about it, of a block of pixels.

    turn: rotation times the padding; out: (>= 6, block) float32: S, z and e, real and imaginary each.
    """
    row, zero = 2 * shape[2], np.float32(0)
    for p in range(first, last):
        u, v = np.float32(kx[p]), np.float32(ky[p])
        lowest, fx, fy, fz, sign = locate(shape, turn, u, v, zero)
        real, imaginary, xr, xi, yr, yi, zr, zi = read_slope(volume, 2 * lowest, row, row * shape[1], fx, fy, fz)
        ex = v * turn[0, 0] - u * turn[1, 0]
        ey = v * turn[0, 1] - u * turn[1, 1]
        ez = v * turn[0, 2] - u * turn[1, 2]
        b = p - first
        # Of the opposite pixel the value is the conjugate, and the gradient minus the conjugate.
        out[0, b] = real
        out[1, b] = sign * imaginary
        out[2, b] = sign * (turn[2, 0] * xr + turn[2, 1] * yr + turn[2, 2] * zr)
        out[3, b] = turn[2, 0] * xi + turn[2, 1] * yi + turn[2, 2] * zi
        out[4, b] = sign * (ex * xr + ey * yr + ez * zr)
        out[5, b] = ex * xi + ey * yi + ez * zi


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _evaluate(volume, shape, rotation, shift, image, weights, kx, ky, count, shell_max, box, block, phases, out):  # type: ignore[no-untyped-def]
    """Sums over `count` pixels: Re <Y, S>, <W, |S|^2>, their gradients and the Gauss-Newton Hessian of half the latter.

    block: (10, _BLOCK) float32 and phases: (2, 2, 2 shell_max + 1) float32 are work space; out: (_SUMS,) float64.
    """
    unit = 2 * np.pi / box
    for k in range(-shell_max, shell_max + 1):
        for axis in range(2):
            angle = -unit * k * shift[axis]
            phases[axis, 0, k + shell_max] = np.cos(angle)
            phases[axis, 1, k + shell_max] = np.sin(angle)
    out[:] = 0
    c = np.float32(unit)
    for first in range(0, count, _BLOCK):
        last = min(first + _BLOCK, count)
        _gather(volume, shape, rotation, kx, ky, first, last, block)
        for p in range(first, last):
            ix, iy = kx[p] + shell_max, ky[p] + shell_max
            pr = phases[0, 0, ix] * phases[1, 0, iy] - phases[0, 1, ix] * phases[1, 1, iy]
            pi = phases[0, 0, ix] * phases[1, 1, iy] + phases[0, 1, ix] * phases[1, 0, iy]
            block[6, p - first] = image[p].real * pr - image[p].imag * pi
            block[7, p - first] = image[p].real * pi + image[p].imag * pr
            block[8, p - first] = kx[p]
            block[9, p - first] = ky[p]
        zero = np.float32(0)
        cross = norm = c1 = c2 = c3 = tx = ty = n1 = n2 = n3 = zero
        h11 = h12 = h22 = h13 = h23 = h33 = zero
        h1x = h1y = h2y = h3x = h3y = hxx = hxy = hyy = zero
        for b in range(last - first):
            u, v, w = block[8, b], block[9, b], weights[first + b]
            sr, si, yr, yi = block[0, b], block[1, b], block[6, b], block[7, b]
            zr, zi, er, ei = block[2, b], block[3, b], block[4, b], block[5, b]
            cross += sr * yr + si * yi
            power = w * (sr * sr + si * si)
            norm += power
            zy = zr * yr + zi * yi
            c1 -= v * zy
            c2 += u * zy
            c3 += er * yr + ei * yi
            turn = sr * yi - si * yr
            tx += u * turn
            ty += v * turn
            zs = w * (zr * sr + zi * si)
            n1 -= v * zs
            n2 += u * zs
            n3 += w * (er * sr + ei * si)
            zz = w * (zr * zr + zi * zi)
            h11 += v * v * zz
            h12 -= u * v * zz
            h22 += u * u * zz
            ze = w * (zr * er + zi * ei)
            h13 -= v * ze
            h23 += u * ze
            h33 += w * (er * er + ei * ei)
            # Re (conj(dS) i S)
            zq = w * (zi * sr - zr * si)
            eq = w * (ei * sr - er * si)
            h1x -= u * v * zq
            h1y -= v * v * zq
            h2y += u * u * zq  # the entry (2, x); (2, y) is minus (1, x)
            h3x += u * eq
            h3y += v * eq
            hxx += u * u * power
            hxy += u * v * power
            hyy += v * v * power
        out[0] += cross
        out[1] += norm
        out[2] += c1
        out[3] += c2
        out[4] += c3
        out[5] += c * tx
        out[6] += c * ty
        out[7] += n1
        out[8] += n2
        out[9] += n3
        out[10] += h11
        out[11] += h12
        out[12] += h13
        out[13] += c * h1x
        out[14] += c * h1y
        out[15] += h22
        out[16] += h23
        out[17] += c * h2y
        out[18] -= c * h1x
        out[19] += h33
        out[20] += c * h3x
        out[21] += c * h3y
        out[22] += c * c * hxx
        out[23] += c * c * hxy
        out[24] += c * c * hyy


@njit(nogil=True, cache=True, error_model="numpy")
def _quadratic(sums, profile, gradient, hessian):  # type: ignore[no-untyped-def]
    """Score, gradient and Hessian (of minus the score) from the sums; over the grey scale's best value if profiled."""
    a = 1.0
    if profile:
        a = max(sums[_CROSS], 0.0) / max(sums[_NORM], 1e-30)
    for j in range(3):
        gradient[j] = a * sums[_CROSS_D + j] - a * a * sums[_NORM_D + j]
    for j in range(2):
        gradient[3 + j] = a * sums[_CROSS_T + j]
    n = _HESSIAN
    for i in range(PARAMETERS):
        for j in range(i, PARAMETERS):
            hessian[i, j] = hessian[j, i] = a * a * sums[n]
            n += 1
    return a * sums[_CROSS] - 0.5 * a * a * sums[_NORM]


@njit(nogil=True, cache=True, error_model="numpy")
def _factor(matrix, lower):  # type: ignore[no-untyped-def]
    """Cholesky factor of a positive 5 x 5 matrix; returns the log of its determinant."""
    log_det = 0.0
    for i in range(PARAMETERS):
        for j in range(i + 1):
            rest = matrix[i, j]
            for k in range(j):
                rest -= lower[i, k] * lower[j, k]
            if i == j:
                rest = max(rest, 1e-12 * matrix[i, i] + 1e-300)
                lower[i, i] = np.sqrt(rest)
                log_det += np.log(rest)
            else:
                lower[i, j] = rest / lower[j, j]
    return log_det


@njit(nogil=True, cache=True, error_model="numpy")
def _substitute(lower, right, out):  # type: ignore[no-untyped-def]
    """Solve L L^T out = right."""
    for i in range(PARAMETERS):
        rest = right[i]
        for k in range(i):
            rest -= lower[i, k] * out[k]
        out[i] = rest / lower[i, i]
    for i in range(PARAMETERS - 1, -1, -1):
        rest = out[i]
        for k in range(i + 1, PARAMETERS):
            rest -= lower[k, i] * out[k]
        out[i] = rest / lower[i, i]


@njit(nogil=True, cache=True, error_model="numpy")
def _learn(curvature, step, before, after, work):  # type: ignore[no-untyped-def]
    """Update the curvature with what gradients before and after a step say of it (Broyden, Fletcher, Goldfarb, Shanno).

    Gauss-Newton's leaves out noise times the curvature of the slice, which is no less on noisy images.
    """
    change = bend = 0.0
    for i in range(PARAMETERS):
        work[i] = 0.0
        for j in range(PARAMETERS):
            work[i] += curvature[i, j] * step[j]
        bend += step[i] * work[i]
        change += step[i] * (before[i] - after[i])
    if change > _LEAST_BEND * bend:
        for i in range(PARAMETERS):
            for j in range(PARAMETERS):
                curvature[i, j] += (before[i] - after[i]) * (before[j] - after[j]) / change - work[i] * work[j] / bend


@njit(nogil=True, cache=True, error_model="numpy")
def _turned(rotation, vector, out):  # type: ignore[no-untyped-def]
    """out = exp([vector]x) rotation (Rodrigues)."""
    x, y, z = vector[0], vector[1], vector[2]
    square = x * x + y * y + z * z
    angle = np.sqrt(square)
    if angle < 1e-6:
        s, c = 1.0, 0.5
    else:
        s, c = np.sin(angle) / angle, (1 - np.cos(angle)) / square
    for j in range(3):
        a, b, d = rotation[0, j], rotation[1, j], rotation[2, j]
        along = x * a + y * b + z * d
        cosine = 1 - c * square
        out[0, j] = cosine * a + s * (y * d - z * b) + c * along * x
        out[1, j] = cosine * b + s * (z * a - x * d) + c * along * y
        out[2, j] = cosine * d + s * (x * b - y * a) + c * along * z


@njit(nogil=True, cache=True, error_model="numpy")
def _turn_between(first, second, out):  # type: ignore[no-untyped-def]
    """Rotation vector that takes `second` to `first`: log(first second^T); of half a turn, one of the two."""
    trace = 0.0
    for i in range(3):
        for k in range(3):
            trace += first[i, k] * second[i, k]
    for i in range(3):
        j, l = (i + 1) % 3, (i + 2) % 3  # noqa: E741
        entry = 0.0
        for k in range(3):
            entry += first[l, k] * second[j, k] - first[j, k] * second[l, k]
        out[i] = entry / 2
    sine = np.sqrt(out[0] ** 2 + out[1] ** 2 + out[2] ** 2)
    if sine < 1e-9 and trace < 0:
        # The turn is 2 a a^T - 1 about its axis a: any column but a zero one, plus the unit vector, lies along it.
        longest = 0.0
        for j in range(3):
            column = np.zeros(3)
            column[j] = 1.0
            for i in range(3):
                for k in range(3):
                    column[i] += first[i, k] * second[j, k]
            length = np.sqrt(column[0] ** 2 + column[1] ** 2 + column[2] ** 2)
            if length > longest:
                longest = length
                out[:3] = np.pi * column / length
        return
    angle = np.arctan2(sine, (trace - 1) / 2)
    factor = 1.0 if sine < 1e-9 else angle / sine
    for i in range(3):
        out[i] *= factor


@njit(nogil=True, cache=True, error_model="numpy")
def _climb_all(  # type: ignore[no-untyped-def]
    start, rotations, shifts, centres, scores, log_weights, hessians, volume, shape, padding, images, weights, kx, ky,
    count, shell_max, box, window_turn, window_shift, hold, profile,
):  # fmt: skip
    block = np.empty((10, _BLOCK), dtype=np.float32)
    phases = np.empty((2, 2, 2 * shell_max + 1), dtype=np.float32)
    sums = np.empty(_SUMS)
    turn_scaled = np.empty((3, 3), dtype=np.float32)
    prior = np.empty(PARAMETERS)
    prior[:3] = 1 / window_turn**2
    prior[3:] = 1 / window_shift**2
    log_prior = 0.5 * np.sum(np.log(prior))
    gradient, trial_gradient = np.empty(PARAMETERS), np.empty(PARAMETERS)
    hessian, trial_hessian = np.empty((PARAMETERS, PARAMETERS)), np.empty((PARAMETERS, PARAMETERS))
    curvature = np.empty((PARAMETERS, PARAMETERS))
    damped, lower = np.empty((PARAMETERS, PARAMETERS)), np.zeros((PARAMETERS, PARAMETERS))
    step, away = np.empty(PARAMETERS), np.empty(PARAMETERS)
    rotation, trial_rotation = np.empty((3, 3)), np.empty((3, 3))
    shift, trial_shift = np.empty(2), np.empty(2)
    for i in range(len(images)):
        for n in range(start[i], start[i + 1]):
            trial_rotation[:] = rotations[n]
            trial_shift[:] = shifts[n]
            best, score = -np.inf, 0.0
            damping = _FIRST_DAMPING
            for evaluation in range(_EVALUATIONS):
                turn_scaled[:] = padding * trial_rotation
                _evaluate(
                    volume, shape, turn_scaled, trial_shift, images[i], weights[i], kx, ky, count, shell_max, box,
                    block, phases, sums,
                )  # fmt: skip
                trial_score = _quadratic(sums, profile, trial_gradient, trial_hessian)
                _turn_between(trial_rotation, centres[n], away)
                away[3:] = trial_shift
                value = trial_score
                if hold[5] > 0:
                    far = 0.0
                    for j in range(PARAMETERS):
                        far += hold[j] * away[j] ** 2
                    gain = np.exp(-0.5 * far / hold[5])
                    value -= hold[5] * gain
                    for j in range(PARAMETERS):
                        trial_gradient[j] += hold[j] * away[j] * gain
                for j in range(PARAMETERS):
                    value -= 0.5 * prior[j] * away[j] ** 2
                    trial_gradient[j] -= prior[j] * away[j]
                    trial_hessian[j, j] += prior[j]
                if evaluation == 0:
                    curvature[:] = trial_hessian
                    for j in range(PARAMETERS):
                        # Its own noise, half of whose hold is left, bends the score too.
                        curvature[j, j] += hold[j]
                else:
                    _learn(curvature, step, gradient, trial_gradient, away)
                if value > best or evaluation == 0:
                    damping *= 0.2
                    best, score = value, trial_score
                    rotation[:] = trial_rotation
                    shift[:] = trial_shift
                    gradient[:] = trial_gradient
                    hessian[:] = trial_hessian
                else:
                    damping = max(10 * damping, 0.05)
                damped[:] = curvature
                for j in range(PARAMETERS):
                    damped[j, j] *= 1 + damping
                _factor(damped, lower)
                _substitute(lower, gradient, step)
                gain = 0.0
                for j in range(PARAMETERS):
                    gain += 0.5 * step[j] * gradient[j]
                small = not gain > _SMALL_GAIN
                turn = np.sqrt(step[0] ** 2 + step[1] ** 2 + step[2] ** 2)
                if turn > _LONGEST_TURN:
                    step *= _LONGEST_TURN / turn
                _turned(rotation, step, trial_rotation)
                trial_shift[0] = shift[0] + step[3]
                trial_shift[1] = shift[1] + step[4]
                if small:
                    # So near to the mode the quadratic form is as good as another look.
                    rotation[:] = trial_rotation
                    shift[:] = trial_shift
                    best += gain
                    score += gain
                    break
            rotations[n] = rotation
            shifts[n] = shift
            scores[n] = score
            hessians[n] = hessian
            # Laplace: the integral over window times likelihood around the mode.
            log_weights[n] = best + log_prior - 0.5 * _factor(hessian, lower)


@njit(nogil=True, cache=True, error_model="numpy")
def _settle(  # type: ignore[no-untyped-def]
    start, rotations, shifts, log_weights, hessians, operators, temperature, fraction, maximum
):
    """Rows kept, where each image's start, their probabilities and their log-weights with those of their doubles."""
    rows, starts = np.empty(len(log_weights), dtype=np.int64), np.zeros(len(start), dtype=np.int64)
    probability, masses = np.empty(len(log_weights)), np.empty(len(log_weights))
    away, mate = np.empty(PARAMETERS), np.empty((3, 3))
    kept = 0
    for i in range(len(start) - 1):
        first = kept
        own = log_weights[start[i] : start[i + 1]]
        for row in start[i] + np.argsort(-own, kind="mergesort"):
            if not np.isfinite(log_weights[row]):
                continue
            double = -1
            for n in range(first, kept):
                other = rows[n]
                for g in range(len(operators)):
                    mate[:] = rotations[other] @ operators[g]
                    _turn_between(rotations[row], mate, away)
                    away[3:] = shifts[row] - shifts[other]
                    square = 0.0
                    for j in range(PARAMETERS):
                        for k in range(PARAMETERS):
                            square += away[j] * hessians[other, j, k] * away[k]
                    if square < _SAME**2:
                        double = n
                        break
                if double >= 0:
                    break
            if double < 0:
                rows[kept] = row
                masses[kept] = log_weights[row]
                kept += 1
            else:
                most = max(log_weights[row], masses[double])
                masses[double] = most + np.log(np.exp(log_weights[row] - most) + np.exp(masses[double] - most))
        if kept > first:
            order = first + np.argsort(-masses[first:kept], kind="mergesort")
            rows[first:kept], masses[first:kept] = rows[order], masses[order]
            share = np.exp((masses[first:kept] - masses[first]) / temperature)
            held = np.cumsum(share)
            enough = min(np.searchsorted(held, fraction * held[-1]) + 1, maximum, len(share))
            probability[first : first + enough] = share[:enough] / held[enough - 1]
            kept = first + enough
        starts[i + 1] = kept
    return rows[:kept], starts, probability[:kept], masses[:kept]
