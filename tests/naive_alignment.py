"""Slow and obvious twins of the alignment of maps."""

import naive
import numpy as np


def frequencies(shell_max):
    """Half of the frequencies of shells 1 to shell_max, one of each pair k and -k, as a set of (x, y, z)."""
    kept = set()
    axis = range(-shell_max, shell_max + 1)
    for k in ((x, y, z) for x in axis for y in axis for z in axis):
        first = next((part for part in k if part), 0)
        if first > 0 and naive.shell_of(*k) <= shell_max:
            kept.add(k)
    return kept


def transform(volume, turn, shift, k):
    """Transform (P,) at k (P, 3) of a volume whose points p go to turn @ p + shift, by its definition."""
    box = len(volume)
    k = np.asarray(k, dtype=float)
    return naive.fourier_sums(volume, k @ turn, box) * np.exp(-2j * np.pi * k @ shift / box)


def correlations(first, second, k, shell_max):
    """Correlation of transforms (P,) at k (P, 3), shells 1 to shell_max."""
    shells = np.array([naive.shell_of(*one) for one in np.asarray(k, dtype=int)])
    curve = []
    for shell in range(1, shell_max + 1):
        a, b = first[shells == shell], second[shells == shell]
        curve.append(np.sum(a.conj() * b).real / np.sqrt(np.sum(abs(a) ** 2) * np.sum(abs(b) ** 2)))
    return np.array(curve), np.array([np.sum(shells == shell) for shell in range(1, shell_max + 1)])


def information(curve, counts):
    """What maps tell of each other; beyond a correlation of 0.95, along the tangent."""
    total = 0.0
    for c, count in zip(curve, counts, strict=True):
        certain = min(abs(c), 0.95)
        value = -np.log(1 - certain**2) + 2 * certain / (1 - certain**2) * (abs(c) - certain)
        total += count * np.sign(c) * value
    return total


def best_shift(moving, fixed, k, shell_max, size, box):
    """The best shift, of those on a grid of `size` across the box, by the whitened correlation of two transforms."""
    shells = np.array([naive.shell_of(*one) for one in np.asarray(k, dtype=int)])
    product = fixed * moving.conj()
    for shell in range(1, shell_max + 1):
        at = shells == shell
        product[at] /= np.sqrt(np.mean(abs(moving[at]) ** 2) * np.mean(abs(fixed[at]) ** 2))
    steps = np.arange(-(size // 2), size // 2 + 1) * box / size
    best = (-np.inf, np.zeros(3))
    for shift in np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3):
        value = np.sum(product * np.exp(2j * np.pi * k @ shift / box)).real
        if np.linalg.norm(shift) <= 0.35 * box and value > best[0] + 1e-9:
            best = (value, shift)
    return best
