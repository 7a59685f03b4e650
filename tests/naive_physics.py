"""Slow, obvious twins of the physics kernels: one number at a time, straight from the formulas."""

import cmath
import math

import numpy as np


def ctf_value(
    kx_1_A, ky_1_A, u_A, v_A, angle_deg, voltage_kV, cs_mm, q, phase_shift_deg=0.0, bfactor_A2=0.0, scale=1.0
):
    """CTF at one spatial frequency, with the defocus along its own direction."""
    volts = voltage_kV * 1000.0
    wavelength = 12.2643247 / math.sqrt(volts * (1.0 + volts * 0.978466e-6))
    k = math.hypot(kx_1_A, ky_1_A)
    theta = math.atan2(ky_1_A, kx_1_A)
    defocus = ((u_A + v_A) + (u_A - v_A) * math.cos(2.0 * (theta - math.radians(angle_deg)))) / 2.0
    gamma = (
        -math.pi * wavelength * defocus * k**2
        + math.pi / 2.0 * cs_mm * 1e7 * wavelength**3 * k**4
        - math.radians(phase_shift_deg)
        - math.atan(q / math.sqrt(1.0 - q**2))
    )
    return -math.sin(gamma) * math.exp(-bfactor_A2 * k**2 / 4.0) * scale


def density_transform(position_A, amplitude, bfactor_A2, k_1_A):
    """Fourier transform of Gaussian atoms at one spatial frequency k (x, y, z), by the sum over atoms."""
    k2 = sum(component**2 for component in k_1_A)
    total = 0j
    for position, a, b in zip(position_A, amplitude, bfactor_A2, strict=True):
        scattering = sum(ag * math.exp(-bg * k2 / 4.0) for ag, bg in zip(a, b, strict=True))
        total += scattering * cmath.exp(-2j * math.pi * sum(p * k for p, k in zip(position, k_1_A, strict=True)))
    return total


def blob_image(centre_px, sigma_px, box_px):
    """Projection of a Gaussian blob of unit sum whose centre, (x, y), is given from the box centre."""
    image = np.empty((box_px, box_px))
    for row in range(box_px):
        for column in range(box_px):
            dx = column - box_px // 2 - centre_px[0]
            dy = row - box_px // 2 - centre_px[1]
            image[row, column] = math.exp(-(dx**2 + dy**2) / (2.0 * sigma_px**2)) / (2.0 * math.pi * sigma_px**2)
    return image
