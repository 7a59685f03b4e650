"""The contrast transfer function of particles, with astigmatism and a B-factor envelope."""

import math

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray


def wavelength_A(voltage_kV: ArrayLike) -> NDArray[np.float64]:
    """Relativistic wavelength of the electrons, in Angstrom, for an acceleration voltage in kV (any shape).

    12.2643247 / sqrt(V (1 + 0.978466e-6 V)) with V in volts (Kirkland, Advanced Computing in Electron
    Microscopy, 2010, eq. 2.5, with the constants used throughout the field).
    """
    volts = 1e3 * np.asarray(voltage_kV, dtype=np.float64)
    return np.asarray(12.2643247 / np.sqrt(volts * (1.0 + 0.978466e-6 * volts)))


def ctf(
    kx: NDArray[np.number],
    ky: NDArray[np.number],
    box_px: int,
    pixel_size_A: ArrayLike,
    defocus_u_A: ArrayLike,
    defocus_v_A: ArrayLike,
    defocus_angle_deg: ArrayLike,
    voltage_kV: ArrayLike,
    spherical_aberration_mm: ArrayLike,
    amplitude_contrast: ArrayLike,
    phase_shift_deg: ArrayLike = 0.0,
    bfactor_A2: ArrayLike = 0.0,
    scale: ArrayLike = 1.0,
    even_phase_rad: NDArray[np.float64] | None = None,
) -> NDArray[np.float32]:
    """CTF of N particles at P Fourier pixels -> (N, P) float32.

    kx, ky: (P,) frequencies in Fourier pixels of a box of `box_px` pixels; with a box of 1, in 1/px. All that
    follows is one number per particle, (N,), or one for all. Defocus is in Angstrom, positive for underfocus; the
    angle is from x towards the axis of U. The value is `-sin(gamma) scale exp(-B k^2 / 4)` with

        gamma = -pi lambda df k^2 + pi/2 Cs lambda^3 k^4 - phase - atan(Q / sqrt(1 - Q^2))
        df(theta) = ((U + V) + (U - V) cos 2 (theta - angle)) / 2

    (Mindell and Grigorieff, J. Struct. Biol. 142, 2003, eqs. 1 to 4; the sign is such that particles are
    white on dark and the CTF is positive near k = 0). even_phase_rad, (P,), the same for all particles, is added to
    gamma (`kernels.aberrations`). gamma is computed in float64: it reaches thousands of radians.
    """
    table = phase_table(
        box_px, pixel_size_A, defocus_u_A, defocus_v_A, defocus_angle_deg, voltage_kV, spherical_aberration_mm,
        amplitude_contrast, phase_shift_deg, bfactor_A2, scale,
    )  # fmt: skip
    kx, ky = np.asarray(kx, dtype=np.float64), np.asarray(ky, dtype=np.float64)
    if even_phase_rad is None:
        return _evaluate(kx, ky, table)
    return _evaluate_with(kx, ky, table, np.asarray(even_phase_rad, dtype=np.float64))


def phase_table(
    box_px: int,
    pixel_size_A: ArrayLike,
    defocus_u_A: ArrayLike,
    defocus_v_A: ArrayLike,
    defocus_angle_deg: ArrayLike,
    voltage_kV: ArrayLike,
    spherical_aberration_mm: ArrayLike,
    amplitude_contrast: ArrayLike,
    phase_shift_deg: ArrayLike = 0.0,
    bfactor_A2: ArrayLike = 0.0,
    scale: ArrayLike = 1.0,
) -> NDArray[np.float64]:
    """What kernels evaluate CTFs from, (N, 7) float64; arguments as in `ctf`.

    With k in Fourier pixels, gamma is column 0 times k^2, 1 times kx^2 - ky^2, 2 times 2 kx ky, 3 times k^4, and 4; the
    envelope is the exponential of column 5 times k^2, and 6 the scale.
    """
    wavelength = wavelength_A(voltage_kV)
    Q = np.asarray(amplitude_contrast, dtype=np.float64)
    frequency_unit = 1.0 / (box_px * np.asarray(pixel_size_A, dtype=np.float64))
    U, V = np.asarray(defocus_u_A, dtype=np.float64), np.asarray(defocus_v_A, dtype=np.float64)
    twice_angle = 2.0 * np.deg2rad(np.asarray(defocus_angle_deg, dtype=np.float64))
    quadratic = -math.pi * wavelength * frequency_unit**2
    coefficients = (
        0.5 * quadratic * (U + V),
        0.5 * quadratic * (U - V) * np.cos(twice_angle),
        0.5 * quadratic * (U - V) * np.sin(twice_angle),
        0.5e7 * math.pi * np.asarray(spherical_aberration_mm) * wavelength**3 * frequency_unit**4,
        -np.deg2rad(phase_shift_deg) - np.arctan2(Q, np.sqrt(1.0 - Q**2)),
        -0.25 * np.asarray(bfactor_A2, dtype=np.float64) * frequency_unit**2,
        np.asarray(scale, dtype=np.float64),
    )
    return np.stack(np.broadcast_arrays(*(np.atleast_1d(column) for column in coefficients)), axis=1)


# sin(2 pi t) for |t| <= 1/4 as t times a polynomial in t^2, Taylor's; its error there is below 1e-9.
_SINE = tuple((-1) ** n * (2 * math.pi) ** (2 * n + 1) / math.factorial(2 * n + 1) for n in range(7))


@njit(nogil=True, cache=True, inline="always")
def _minus_sine(gamma, scale):  # type: ignore[no-untyped-def]
    # Turns from the nearest crest of -sin, folded about it: -sin(gamma) = sin(2 pi t), |t| <= 1/4.
    turns = gamma * (0.5 / math.pi) + 0.25
    t = 0.25 - abs(turns - math.floor(turns + 0.5))
    t2 = t * t
    value = _SINE[6]
    value = value * t2 + _SINE[5]
    value = value * t2 + _SINE[4]
    value = value * t2 + _SINE[3]
    value = value * t2 + _SINE[2]
    value = value * t2 + _SINE[1]
    value = value * t2 + _SINE[0]
    return scale * value * t


@njit(nogil=True, cache=True, inline="always")
def _gamma(kx, ky, isotropic, along, across, quartic, offset):  # type: ignore[no-untyped-def]
    """df(theta) k^2 is the quadratic form of the defocus tensor, so no angle is computed per pixel."""
    x2, y2 = kx * kx, ky * ky
    k2 = x2 + y2
    return isotropic * k2 + along * (x2 - y2) + across * 2.0 * kx * ky + quartic * k2 * k2 + offset


@njit(nogil=True, cache=True)
def _evaluate(kx: np.ndarray, ky: np.ndarray, table: np.ndarray) -> np.ndarray:
    out = np.empty((table.shape[0], kx.size), dtype=np.float32)
    for i in range(table.shape[0]):
        isotropic, along, across, quartic, offset, envelope, scale = table[i]
        # Without a branch or a call the loop becomes vector code.
        for p in range(kx.size):
            out[i, p] = _minus_sine(_gamma(kx[p], ky[p], isotropic, along, across, quartic, offset), scale)
        _damp(kx, ky, envelope, out[i])
    return out


@njit(nogil=True, cache=True)
def _evaluate_with(kx: np.ndarray, ky: np.ndarray, table: np.ndarray, even: np.ndarray) -> np.ndarray:
    """`_evaluate` with a phase (P,) added to every gamma."""
    out = np.empty((table.shape[0], kx.size), dtype=np.float32)
    for i in range(table.shape[0]):
        isotropic, along, across, quartic, offset, envelope, scale = table[i]
        for p in range(kx.size):
            gamma = _gamma(kx[p], ky[p], isotropic, along, across, quartic, offset) + even[p]
            out[i, p] = _minus_sine(gamma, scale)
        _damp(kx, ky, envelope, out[i])
    return out


@njit(nogil=True, cache=True)
def _damp(kx, ky, envelope, out):  # type: ignore[no-untyped-def]
    if envelope != 0.0:
        for p in range(kx.size):
            out[p] *= math.exp(envelope * (kx[p] * kx[p] + ky[p] * ky[p]))
