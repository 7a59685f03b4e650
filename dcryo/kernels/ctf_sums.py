"""What the likelihood knows of errors of the CTF, as sums over Fourier pixels.

With Y = X / v (white-on-dark image at its origin over the noise variance per real component), S the slice of a
reference times the particle's envelope and scale, and the model C exp(i phi) S, the log-likelihood of a CTF is, up to a
constant,

    sum Re(conj(S) Y exp(-i phi)) C - 1/2 |S|^2 C^2 / v,    C = -sin(gamma + delta),

phi an odd and delta an even phase (Zivanov, Nakane & Scheres 2020, sections 2.1 to 2.3). C and C^2 are trigonometric
polynomials of delta, so seven real numbers of a pixel (`PHASE_SUMS`), summed over any number of particles, hold the
likelihood of every phi and delta that these have in common there, exactly; and four numbers of a ring of equal |k|^2
that of every change of one particle's defocus.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from dcryo.kernels.interpolation import before_read, read_slope
from dcryo.kernels.shells import HalfPlane
from dcryo.kernels.slices import AHEAD, CACHED, locate, numbers, scale

# With c = conj(S) Y and b = |S|^2 / v: c sin gamma and c cos gamma, real and imaginary; b cos 2 gamma, b sin 2 gamma
# and b.
PHASE_SUMS = 7
# Parameters of one particle's CTF: change of defocus, and of astigmatism along x and along the diagonal (A), of the
# phase shift (rad) and of the B factor (A^2), and the logarithm of its scale.
DEFOCUS, ASTIGMATISM, DIAGONAL, PHASE_SHIFT, BFACTOR, SCALE, PARAMETERS = 0, 1, 2, 3, 4, 5, 6
# A particle's gradient, then the upper triangle of its Gauss-Newton matrix, row by row.
NORMAL = PARAMETERS + PARAMETERS * (PARAMETERS + 1) // 2
# Gradients by a change e of the magnification, M k -> (M + e) k (xx, xy, yx, yy), where it moves the slice; then of the
# Gauss-Newton matrix uu, uv and vv times kx^2, kx ky and ky^2, (u, v) the axes of the slice's gradient.
STRETCH = 4 + 9
# Rings are so narrow that the phase of the largest change of defocus turns by this much over one.
_TURN_RAD = 0.15


class Optics(NamedTuple):
    """Aberrations of each of G optics groups on the packed axis, (G, P) each: odd = exp(-i phi) complex64; cosine and
    sine of delta, float64; fx, fy: the frequency M k of the specimen that is seen at k, float64, in Fourier pixels."""

    odd: np.ndarray
    cosine: np.ndarray
    sine: np.ndarray
    fx: np.ndarray
    fy: np.ndarray


class CtfSums(NamedTuple):
    """Sums of the particles of one task.

    phases: (G, P, PHASE_SUMS) float64; stretch: (G, STRETCH) float64; particles: (G,) float64, how many.
    """

    phases: np.ndarray
    stretch: np.ndarray
    particles: np.ndarray


class Own(NamedTuple):
    """What particles correlate with in a reference because it was made of themselves.

    A map's noise is that of its particles: the one that is compared adds C Y / sum C^2 to it, C the CTF that it was
    back-projected with, of which the product with its own noise has the mean C N / v, N the noise power of the
    reference, and the phase with which it went in. power: (shell_max + 1,), N; table: (n, 7), of that CTF; optics: of
    that time.
    """

    power: np.ndarray
    table: np.ndarray
    optics: Optics


def rates(wavelength_A: np.ndarray, pixel_size_A: np.ndarray, box_px: int) -> np.ndarray:
    """By how much gamma changes with the defocus (rad / A), and the logarithm of the envelope with the B factor, at
    |k| of one Fourier pixel: (n, 2) float64."""
    square = 1 / (box_px * np.asarray(pixel_size_A, dtype=np.float64)) ** 2
    return np.stack([-np.pi * wavelength_A * square, -square / 4], axis=1)


def empty(groups: int, pixels: int) -> CtfSums:
    """Sums of no particle."""
    return CtfSums(np.zeros((groups, pixels, PHASE_SUMS)), np.zeros((groups, STRETCH)), np.zeros(groups))


def gather(
    sums: CtfSums,
    reference: np.ndarray,
    optics: Optics,
    pixels: HalfPlane,
    shell_min: int,
    box_px: int,
    offsets_A: np.ndarray,
    own: Own,
    rotations: np.ndarray,
    images: np.ndarray,
    inverse_variance: np.ndarray,
    table: np.ndarray,
    rates: np.ndarray,
    group: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Add particles to the sums, in place; log-likelihood curves of their defocus, and their normal equations.

    reference: from `slices.prepare`, for frequencies M k too; rotations: (n, 3, 3); images: (n, P) complex64, X / v;
    inverse_variance: (n, shell_max + 1), 1 / v; table: (n, 7) from `ctf.phase_table`; rates: (n, 2) from `rates`;
    group: (n,) int; shell_min: first shell that counts; offsets_A: (n, T), evenly spaced, changes of the defocus; own:
    what is taken off.

    Returns curves (n, T) float32, up to a constant of each particle, and (n, NORMAL) float64.
    """
    n, steps = offsets_A.shape
    reach = 2 * np.abs(rates[:, 0]).max() * (pixels.shell_max + 0.5) ** 2 * np.abs(offsets_A).max(initial=0)
    rings = max(int(np.ceil(reach / _TURN_RAD)), 1)
    curves, normal = np.empty((n, steps), dtype=np.float32), np.zeros((n, NORMAL))
    spacing = offsets_A[:, 1] - offsets_A[:, 0] if steps > 1 else np.zeros(n)
    turns = np.asarray(rotations, dtype=np.float64) * scale(box_px)
    _gather(
        numbers(reference), reference.shape, np.ascontiguousarray(turns, dtype=np.float32), images,
        np.ascontiguousarray(inverse_variance, dtype=np.float32), table, rates, np.asarray(group, dtype=np.int64),
        *optics, np.asarray(own.power, dtype=np.float64), own.table, *own.optics, pixels.kx, pixels.ky, pixels.start,
        shell_min, rings, np.ascontiguousarray(offsets_A[:, 0]), spacing,
        sums.phases, sums.stretch, sums.particles, curves, normal,
    )  # fmt: skip
    return curves, normal


@njit(nogil=True, cache=True, error_model="numpy")
def _gather(  # type: ignore[no-untyped-def]
    volume, shape, turns, images, inverse, table, rates, group, odd, cosine, sine, across, down, own_power, own_table,
    own_odd, own_cosine, own_sine, own_across, own_down, kx, ky, start, shell_min, rings, first_A, spacing_A, phases,
    stretch, particles, curves, normal,
):  # fmt: skip
    ring = np.empty((rings, 4))
    largest = (len(start) - 1.5) ** 2
    for i in range(len(images)):
        g = group[i]
        ring[:] = 0
        for shell in range(shell_min, len(start) - 1):
            _gather_shell(
                volume, shape, turns[i], images[i], inverse[i, shell], table[i], rates[i], odd[g], cosine[g], sine[g],
                across[g], down[g], own_power[shell], own_table[i], own_odd[g], own_cosine[g], own_sine[g],
                own_across[g], own_down[g], kx, ky, start[shell], start[shell + 1], rings / largest, ring, phases[g],
                stretch[g], normal[i],
            )  # fmt: skip
        particles[g] += 1
        _curve(ring, rates[i, 0] * largest / rings, first_A[i], spacing_A[i], curves[i])


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy", inline="always")
def _ctf(table, x, y, cosine, sine):  # type: ignore[no-untyped-def]
    """The CTF with its scale, envelope and even phase at one frequency."""
    isotropic, along, across, quartic, offset, envelope, scale = table
    xx, yy = x * x, y * y
    k2 = xx + yy
    gamma = isotropic * k2 + along * (xx - yy) + across * 2.0 * x * y + quartic * k2 * k2 + offset
    value = -scale * (np.sin(gamma) * cosine + np.cos(gamma) * sine)
    return value * np.exp(envelope * k2) if envelope != 0.0 else value


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _gather_shell(  # type: ignore[no-untyped-def]
    volume, shape, turn, image, inverse, table, rates, odd, cosine, sine, us, vs, own_power, own_table, own_odd,
    own_cosine, own_sine, own_us, own_vs, kx, ky, first, last, rings_per_square, ring, phases, stretch, normal,
):  # fmt: skip
    row, zero = 2 * shape[2], np.float32(0)
    isotropic, along, across, quartic, offset, envelope, scale = table
    d = np.empty(PARAMETERS)
    for p in range(first, last):
        if len(volume) > CACHED:
            later = min(p + AHEAD, len(kx) - 1)
            lowest = locate(shape, turn, np.float32(us[later]), np.float32(vs[later]), zero)[0]
            before_read(volume, 2 * lowest, row, row * shape[1])
        x, y = us[p], vs[p]
        lowest, fx, fy, fz, sign = locate(shape, turn, np.float32(x), np.float32(y), zero)
        real, imaginary, xr, xi, yr, yi, zr, zi = read_slope(volume, 2 * lowest, row, row * shape[1], fx, fy, fz)
        xx, yy, xy = x * x, y * y, x * y
        k2 = xx + yy
        factor = scale
        if envelope != 0.0:
            factor *= np.exp(envelope * k2)
        # Of the opposite pixel the value is the conjugate, and the gradient minus the conjugate.
        sr, si = factor * real, factor * sign * imaginary
        ur = factor * sign * (turn[0, 0] * xr + turn[0, 1] * yr + turn[0, 2] * zr)
        ui = factor * (turn[0, 0] * xi + turn[0, 1] * yi + turn[0, 2] * zi)
        vr = factor * sign * (turn[1, 0] * xr + turn[1, 1] * yr + turn[1, 2] * zr)
        vi = factor * (turn[1, 0] * xi + turn[1, 1] * yi + turn[1, 2] * zi)
        gamma = isotropic * k2 + along * (xx - yy) + across * 2.0 * xy + quartic * k2 * k2 + offset
        sin, cos = np.sin(gamma), np.cos(gamma)
        dr, di = float(image[p].real), float(image[p].imag)
        cr, ci = sr * dr + si * di, sr * di - si * dr
        # What is not of others.
        mine = own_power * inverse * factor * _ctf(own_table, own_us[p], own_vs[p], own_cosine[p], own_sine[p])
        cr -= mine * float(own_odd[p].real)
        ci += mine * float(own_odd[p].imag)
        b = (sr * sr + si * si) * inverse
        phases[p, 0] += cr * sin
        phases[p, 1] += ci * sin
        phases[p, 2] += cr * cos
        phases[p, 3] += ci * cos
        phases[p, 4] += b * (cos * cos - sin * sin)
        phases[p, 5] += b * 2 * sin * cos
        phases[p, 6] += b
        sin, cos = sin * cosine[p] + cos * sine[p], cos * cosine[p] - sin * sine[p]
        back_r, back_i = float(odd[p].real), float(odd[p].imag)
        dr, di = dr * back_r - di * back_i, dr * back_i + di * back_r
        a = cr * back_r - ci * back_i
        j = min(int(k2 * rings_per_square), len(ring) - 1)
        ring[j, 0] -= a * sin
        ring[j, 1] -= a * cos
        ring[j, 2] += 0.25 * b * (cos * cos - sin * sin)
        ring[j, 3] -= 0.5 * b * sin * cos
        # C = -sin, dC / d gamma = -cos.
        per_A = -cos * rates[0]
        d[0], d[1], d[2], d[3] = per_A * k2, per_A * (xx - yy), per_A * 2 * xy, cos
        d[4], d[5] = -sin * rates[1] * k2, -sin
        left, place = a + b * sin, PARAMETERS
        for m in range(PARAMETERS):
            normal[m] += left * d[m]
            for n in range(m, PARAMETERS):
                normal[place] += b * d[m] * d[n]
                place += 1
        # What is left of the image, times the gradient of the slice.
        rr, ri = -sin * (dr + sin * sr * inverse), -sin * (di + sin * si * inverse)
        along_u, along_v = ur * rr + ui * ri, vr * rr + vi * ri
        x, y = float(kx[p]), float(ky[p])
        xx, yy, xy = x * x, y * y, x * y
        stretch[0] += along_u * x
        stretch[1] += along_u * y
        stretch[2] += along_v * x
        stretch[3] += along_v * y
        power = sin * sin * inverse
        uu, uv, vv = power * (ur * ur + ui * ui), power * (ur * vr + ui * vi), power * (vr * vr + vi * vi)
        stretch[4] += uu * xx
        stretch[5] += uu * xy
        stretch[6] += uu * yy
        stretch[7] += uv * xx
        stretch[8] += uv * xy
        stretch[9] += uv * yy
        stretch[10] += vv * xx
        stretch[11] += vv * xy
        stretch[12] += vv * yy


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _curve(ring, rate, first, spacing, curve):  # type: ignore[no-untyped-def]
    """The likelihood at evenly spaced changes of the defocus, the phase of each ring turned by recurrence."""
    total = np.zeros(len(curve))
    for j in range(len(ring)):
        turn = rate * (j + 0.5)
        cos, sin = np.cos(turn * first), np.sin(turn * first)
        step_cos, step_sin = np.cos(turn * spacing), np.sin(turn * spacing)
        for t in range(len(curve)):
            total[t] += (
                ring[j, 0] * cos + ring[j, 1] * sin + ring[j, 2] * (cos * cos - sin * sin) + ring[j, 3] * 2 * sin * cos
            )
            cos, sin = cos * step_cos - sin * step_sin, cos * step_sin + sin * step_cos
    curve[:] = total
