"""Slow, obvious twins of the kernels for spectra and Thon rings."""

import math

import numpy as np
from scipy.optimize import brentq


def tile_power(image, x, y, tile_px, highest):
    """|transform|^2 of one windowed tile, from the whole transform; rows ky = -h ... h, columns kx = 0 ... h."""
    window = np.sin(np.pi * (np.arange(tile_px) + 0.5) / tile_px) ** 2
    tile = (image[y : y + tile_px, x : x + tile_px].astype(float) - image.mean(dtype=float)) * np.outer(window, window)
    whole = np.abs(np.fft.fft2(tile)) ** 2
    return whole[np.ix_(np.arange(-highest, highest + 1), np.arange(highest + 1))]


def pixels(half):
    """Every pixel (row, kx, ky, value) that counts."""
    highest = half.shape[1] - 1
    for row in range(2 * highest + 1):
        for kx in range(highest + 1):
            ky = row - highest
            if abs(ky) >= 2 and kx >= 2:
                yield row, kx, ky, half[row, kx]


def ring_means(half, sectors):
    highest = half.shape[1] - 1
    found = {}
    for _, kx, ky, value in pixels(half):
        ring = math.floor(math.hypot(kx, ky) + 0.5)
        if ring <= highest:
            sector = math.floor((math.degrees(math.atan2(ky, kx)) % 180.0) / (180.0 / sectors))
            found.setdefault((ring, sector), []).append(value)
    means, counts = np.zeros((highest + 1, sectors)), np.zeros((highest + 1, sectors))
    for place, values in found.items():
        means[place], counts[place] = np.mean(values), len(values)
    return means, counts


def gamma(kx, ky, step, aberration, lens):
    k2 = (kx**2 + ky**2) * step**2
    theta = math.atan2(ky, kx)
    defocus = aberration.mean_A + aberration.along_A * math.cos(2 * theta) + aberration.across_A * math.sin(2 * theta)
    return lens.quadratic_A * defocus * k2 + lens.quartic_A4 * k2**2 - aberration.phase_rad - lens.offset_rad


def residuals(half, values, basis, used, step, lens, aberration_type):
    """What is left of each used pixel by a model whose numbers are mean, along, across, phase, background, envelope."""
    aberration, count = aberration_type(*values[:4]), basis.shape[1]
    out = []
    for _, kx, ky, value in pixels(half):
        ring = math.floor(math.hypot(kx, ky) + 0.5)
        if ring < len(used) and used[ring]:
            background = basis[ring] @ values[4 : 4 + count]
            envelope = basis[ring] @ values[4 + count :]
            out.append(value - background + envelope * math.cos(2 * gamma(kx, ky, step, aberration, lens)))
    return np.array(out)


def equiphase_ring(kx, ky, step, aberration, lens):
    """The ring on which the mean defocus has a pixel's gamma, by bisection."""
    wanted = gamma(kx, ky, step, aberration, lens)
    round_ = aberration._replace(along_A=0.0, across_A=0.0)
    radius = math.hypot(kx, ky)
    found = brentq(lambda r: gamma(r, 0.0, step, round_, lens) - wanted, 0.3 * radius, 2.0 * radius)
    return math.floor(found + 0.5)


def quality(measured, fitted, counts, low, high):
    """Correlation of two curves from `low` to `high` inclusive, each less a straight line, weighted by counts."""
    x = np.arange(low, high + 1)
    root = np.sqrt(counts[low : high + 1])
    left = [
        (curve[low : high + 1] - np.polyval(np.polyfit(x, curve[low : high + 1], 1, w=root), x)) * root
        for curve in (measured, fitted)
    ]
    return left[0] @ left[1] / math.sqrt((left[0] @ left[0]) * (left[1] @ left[1]))
