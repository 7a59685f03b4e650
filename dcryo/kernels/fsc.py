"""Fourier shell correlation and the resolutions read from it."""

import numpy as np

from dcryo.kernels import fft
from dcryo.kernels.masks import sphere
from dcryo.kernels.shells import friedel_weights, resolution_A, volume_shells

GOLD_STANDARD = 0.143
HALF = 0.5


def shell_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """FSC of two maps per shell (Harauz & van Heel 1986).

    first, second: (D, D, D) real. Returns (D // 2 + 1,) float64; shells without power give zero.
    """
    return _correlation(*_shell_products(first, second))


def smooth_shell_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The same with the sums of each shell averaged with half of those of its neighbours: for maps of which single
    shells are too noisy."""
    padded = (np.pad(sums, 1, mode="edge") for sums in _shell_products(first, second))
    return _correlation(*(np.convolve(sums, (0.25, 0.5, 0.25), mode="valid") for sums in padded))


def _correlation(cross: np.ndarray, of_first: np.ndarray, of_second: np.ndarray) -> np.ndarray:
    power = of_first * of_second
    return np.divide(cross, np.sqrt(power), out=np.zeros_like(cross), where=power > 0)


def _shell_products(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over each shell of the product of two maps and of the power of each, (D // 2 + 1,)."""
    box = first.shape[0]
    a, b = fft.rfftn(first), fft.rfftn(second)
    weights = friedel_weights(box)
    shells = volume_shells(box).ravel()

    def over_shells(values: np.ndarray) -> np.ndarray:
        return np.bincount(shells, weights=(values * weights).ravel())[: box // 2 + 1]

    cross = over_shells(a.real * b.real + a.imag * b.imag)
    return cross, over_shells(a.real**2 + a.imag**2), over_shells(b.real**2 + b.imag**2)


def shell_power(volume: np.ndarray) -> np.ndarray:
    """Mean power of a map's transform per shell, (D // 2 + 1,) float64."""
    box = volume.shape[0]
    transform = fft.rfftn(volume)
    weights = np.broadcast_to(friedel_weights(box), transform.shape).ravel()
    shells = volume_shells(box).ravel()
    power = (transform.real**2 + transform.imag**2).ravel()
    sums = np.bincount(shells, weights=power * weights)
    return (sums / np.bincount(shells, weights=weights))[: box // 2 + 1]


def signal_share(volume: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Part of a map's power inside a mask that is signal, per shell, (D // 2 + 1,) float64, in [0, 1].

    volume: (D, D, D) with noise everywhere, also outside the mask (1 inside, 0 outside), where all is noise and as
    strong as inside. Where a mask leaves less than a hundredth of the sphere that the box holds outside, nothing is
    known of the noise, and the share is 0. Signal in a soft edge counts as noise, which makes the share a little low.
    """
    box = len(volume)
    outside = (1 - mask) * sphere(box, box, 0)
    if np.sum(outside**2) < 0.01 * box**3 * np.pi / 6:
        return np.zeros(box // 2 + 1)
    noise = shell_power(volume * outside) / np.sum(outside**2)
    power = shell_power(volume * mask) / np.sum(mask**2)
    return np.clip(1 - np.divide(noise, power, out=np.ones_like(noise), where=power > 0), 0, 1)


def crossing(fsc: np.ndarray, threshold: float) -> float:
    """Shell, interpolated, at which the FSC first falls below a threshold; the last shell if it never does."""
    below = np.flatnonzero(fsc[1:] < threshold)
    if len(below) == 0:
        return float(len(fsc) - 1)
    after = int(below[0]) + 1
    if after == 1:
        return 1.0
    drop = fsc[after - 1] - fsc[after]
    return after - 1 + float((fsc[after - 1] - threshold) / drop)


def resolution_at(fsc: np.ndarray, threshold: float, box_px: int, pixel_size_A: float) -> float:
    """Resolution in Angstrom at which the FSC of two maps first falls below a threshold."""
    return resolution_A(crossing(fsc, threshold), box_px, pixel_size_A)
