"""The score of a pose, its gradient and its Hessian.

A pose is moved by a small rotation vector d on the image's side, A = exp([d]x) A0, and by a change of its shift t.
With slice S, Y = C X / v at the pose's shift and W = C^2 / v (see `posterior`), the score Re <Y, S> - 1/2 <W, |S|^2> is
that of a least-squares problem, so its gradient comes with a Hessian that is never negative (Gauss-Newton):

    dS / dd = grad S . (k x e_x, k x e_y, k x e_z),    dY / dt = -i (2 pi / D) k Y,    k = (kx, ky, 0)

grad S is the gradient of the interpolation, turned into the image's frame.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from dcryo.kernels.interpolation import before_read, read_slope
from dcryo.kernels.shells import HalfPlane
from dcryo.kernels.slices import AHEAD, CACHED, locate, numbers, scale

# A pose has five parameters: three of rotation (rad), two of shift (px).
PARAMETERS = 5
# Sums over pixels: cross, norm, then gradients of cross (3 and 2) and of half the norm (3), then the Hessian's 15.
CROSS, NORM, CROSS_D, CROSS_T, NORM_D, HESSIAN, SUMS = 0, 1, 2, 5, 7, 10, 25
_BLOCK = 128


class View(NamedTuple):
    """A reference, and the pixels up to which it is looked at: what all scores of a level share.

    volume: flat float32, real and imaginary parts of the Fourier volume of a shape; padding: its samples per Fourier
    pixel; kx, ky: of the packed axis, of which the first `used` are looked at.
    """

    volume: np.ndarray
    shape: tuple[int, int, int]
    padding: float
    kx: np.ndarray
    ky: np.ndarray
    used: int
    shell_max: int
    box_px: int


def view(prepared: np.ndarray, pixels: HalfPlane, shell: int, box_px: int) -> View:
    """The view of a Fourier volume from `slices.prepare` up to a shell."""
    return View(
        numbers(prepared), prepared.shape, scale(box_px), pixels.kx, pixels.ky, pixels.within(shell), pixels.shell_max,
        box_px,
    )  # fmt: skip


class Work(NamedTuple):
    """Arrays that evaluations write into: a block of pixels, phases along the axes, and the sums."""

    block: np.ndarray
    phases: np.ndarray
    sums: np.ndarray


@njit(nogil=True, cache=True)
def work_space(shell_max):  # type: ignore[no-untyped-def]
    return Work(
        np.empty((10, _BLOCK), dtype=np.float32), np.empty((2, 2, 2 * shell_max + 1), dtype=np.float32), np.empty(SUMS)
    )


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _gather(view, turn, first, last, out):  # type: ignore[no-untyped-def]
    """Slice S, its derivative z along the image's z axis, and e that of a turn about it, of a block of pixels.

    turn: rotation times the padding; out: (>= 6, block) float32: S, z and e, real and imaginary each.
    """
    volume, shape = view.volume, view.shape
    row, zero = 2 * shape[2], np.float32(0)
    for p in range(first, last):
        if len(volume) > CACHED:
            later = min(p + AHEAD, view.used - 1)
            lowest = locate(shape, turn, np.float32(view.kx[later]), np.float32(view.ky[later]), zero)[0]
            before_read(volume, 2 * lowest, row, row * shape[1])
        u, v = np.float32(view.kx[p]), np.float32(view.ky[p])
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
def evaluate(view, rotation, shift, image, weights, work):  # type: ignore[no-untyped-def]
    """Sums over the pixels of a view, into work.sums: Re <Y, S>, <W, |S|^2>, the gradients of the first and of half the
    second, and the Gauss-Newton Hessian of that.

    rotation: (3, 3); shift: (2,); image: (>= used,) complex64, Y at the last origin; weights: (>= used,) float32, W.
    """
    block, phases, out = work.block, work.phases, work.sums
    kx, ky, shell_max = view.kx, view.ky, view.shell_max
    scaled = np.empty((3, 3), dtype=np.float32)
    scaled[:] = view.padding * rotation
    unit = 2 * np.pi / view.box_px
    for k in range(-shell_max, shell_max + 1):
        for axis in range(2):
            angle = -unit * k * shift[axis]
            phases[axis, 0, k + shell_max] = np.cos(angle)
            phases[axis, 1, k + shell_max] = np.sin(angle)
    out[:] = 0
    c = np.float32(unit)
    for first in range(0, view.used, _BLOCK):
        last = min(first + _BLOCK, view.used)
        _gather(view, scaled, first, last, block)
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
def quadratic(sums, profile, gradient, hessian):  # type: ignore[no-untyped-def]
    """Score, gradient and Hessian (of minus the score) from the sums; over the grey scale's best value if profiled."""
    a = 1.0
    if profile:
        a = max(sums[CROSS], 0.0) / max(sums[NORM], 1e-30)
    for j in range(3):
        gradient[j] = a * sums[CROSS_D + j] - a * a * sums[NORM_D + j]
    for j in range(2):
        gradient[3 + j] = a * sums[CROSS_T + j]
    n = HESSIAN
    for i in range(PARAMETERS):
        for j in range(i, PARAMETERS):
            hessian[i, j] = hessian[j, i] = a * a * sums[n]
            n += 1
    return a * sums[CROSS] - 0.5 * a * a * sums[NORM]
