"""Half maps of known truth: a density in coloured noise that fills the box."""

import numpy as np

from dcryo.kernels import fft, filters, fsc
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import volume_shells


def blurred(density: np.ndarray, pixel_size_A: float, bfactor_A2: float) -> np.ndarray:
    """A density (D, D, D) whose amplitudes fall by a B-factor, as those of real maps do."""
    box = len(density)
    frequency = filters.radius_px(box, 3) / (box * pixel_size_A)
    return fft.irfftn(fft.rfftn(density) * np.exp(-bfactor_A2 / 4 * frequency**2).astype(np.float32), box)


def noise_power(truth: np.ndarray, pixel_size_A: float, resolution_A: float) -> np.ndarray:
    """Power of noise per shell that grows threefold up to Nyquist, and in which the FSC of two half maps, without a
    mask, is expected to fall to 0.143 at a resolution."""
    box = len(truth)
    colour = 1 + 2 * (np.arange(box // 2 + 1) / (box // 2)) ** 2
    shell = box * pixel_size_A / resolution_A
    power = fsc.shell_power(truth)
    at = [np.interp(shell, np.arange(box // 2 + 1), values) for values in (np.log(power), np.log(colour))]
    return colour * np.exp(at[0] - at[1]) * 0.857 / 0.143


def noisy_halves(truth: np.ndarray, noise: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The truth (D, D, D) in two portions of noise of a power per shell (D // 2 + 1,), white in space."""
    box = len(truth)
    shells = np.minimum(volume_shells(box), box // 2)
    halves = []
    for half in (1, 2):
        white = generator(seed, "noise", half).standard_normal(truth.shape, dtype=np.float32)
        halves.append(truth + fft.irfftn(fft.rfftn(white) * np.sqrt(noise / box**3)[shells].astype(np.float32), box))
    return halves[0], halves[1]
