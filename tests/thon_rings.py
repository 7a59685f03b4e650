"""Micrographs with known CTF, for tests: ice and particles seen through the microscope, and the noise of the dose."""

from typing import NamedTuple

import numpy as np

from dcryo.kernels.ctf import ctf


class Truth(NamedTuple):
    """The CTF that a micrograph is made with; angles in degrees, from x towards the axis of U."""

    u_A: float
    v_A: float
    angle_deg: float
    phase_deg: float = 0.0


def micrograph(
    truth: Truth,
    side_px: int = 2048,
    pixel_size_A: float = 1.1,
    voltage_kV: float = 300.0,
    cs_mm: float = 2.7,
    q: float = 0.1,
    signal: float = 0.4,
    bfactor_A2: float = 60.0,
    seed: int = 0,
) -> np.ndarray:
    """A square micrograph (y, x) float32. signal: power of the ice over that of the noise, at low resolution, where
    particles add ten times as much. The noise is white."""
    random = np.random.Generator(np.random.Philox(key=seed))
    object_ = np.fft.rfft2(random.standard_normal((side_px, side_px), dtype=np.float32))
    ky = np.rint(np.fft.fftfreq(side_px, 1.0 / side_px)).astype(np.int32)[:, None]
    kx = np.arange(side_px // 2 + 1, dtype=np.int32)
    kx, ky = (axis.ravel() for axis in np.broadcast_arrays(kx, ky))
    transfer = ctf(
        kx, ky, side_px, pixel_size_A, truth.u_A, truth.v_A, truth.angle_deg, voltage_kV, cs_mm, q, truth.phase_deg,
        bfactor_A2,
    )[0].reshape(object_.shape)  # fmt: skip
    k2 = (kx.astype(float) ** 2 + ky.astype(float) ** 2).reshape(object_.shape) / (side_px * pixel_size_A) ** 2
    power = signal * (1.0 + 10.0 * np.exp(-k2 / 0.04**2))
    image = np.fft.irfft2(object_ * transfer * np.sqrt(power), s=(side_px, side_px))
    return (image + random.standard_normal(image.shape)).astype(np.float32)


def angle_between(first_deg: float, second_deg: float) -> float:
    """Between two axes, 0 to 90 degrees."""
    return abs((first_deg - second_deg + 90.0) % 180.0 - 90.0)
