"""Slow, obvious twins of the kernels of picking, from the definitions."""

import math

import numpy as np
from scipy.optimize import linear_sum_assignment


def mirrored(image, y, x):
    """A pixel of an image that is mirrored at its edges again and again."""
    ny, nx = image.shape
    y, x = y % (2 * ny), x % (2 * nx)
    return image[min(y, 2 * ny - 1 - y), min(x, 2 * nx - 1 - x)]


def correlation(image, kernel):
    """Sum of a mirrored image times an odd kernel about each pixel."""
    reach = len(kernel) // 2
    out = np.zeros(image.shape)
    for y, x in np.ndindex(image.shape):
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                out[y, x] += kernel[dy + reach, dx + reach] * mirrored(image, y + dy, x + dx)
    return out


def gaussian_mean(image, weight, sigma):
    """Mean over pixels, and their mirror images, weighted by a Gaussian and by `weight`."""
    reach = math.ceil(5 * sigma)
    axis = np.arange(-reach, reach + 1)
    kernel = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * sigma**2))
    return correlation(image * weight, kernel) / correlation(weight, kernel)


def shrunk(image, shape):
    """Fourier series of an image, evaluated on a coarser grid up to that grid's Nyquist frequency, excluding it."""
    ny, nx = shape
    old_y, old_x = image.shape
    transform = np.fft.fft2(image) / image.size
    out = np.zeros(shape, complex)
    for ky in range(-((ny - 1) // 2), (ny - 1) // 2 + 1):
        for kx in range(-((nx - 1) // 2), (nx - 1) // 2 + 1):
            for y in range(ny):
                for x in range(nx):
                    phase = ky * (y * old_y / ny) / old_y + kx * (x * old_x / nx) / old_x
                    out[y, x] += transform[ky, kx] * np.exp(2j * np.pi * phase)
    return out.real


def peaks(scores, allowed, distance):
    """Greedy, best first: local maxima of 3 by 3 pixels, none at the edge; positions by parabolas."""
    ny, nx = scores.shape
    found = [
        (scores[y, x], x + vertex(scores[y, x - 1 : x + 2]), y + vertex(scores[y - 1 : y + 2, x]))
        for y in range(1, ny - 1)
        for x in range(1, nx - 1)
        if allowed[y, x] and scores[y, x] == scores[y - 1 : y + 2, x - 1 : x + 2].max()
    ]
    found.sort(reverse=True)
    kept = []
    for score, x, y in found:
        if all(math.hypot(x - other[1], y - other[2]) >= distance for other in kept):
            kept.append((score, x, y))
    return np.array([row[1:] for row in kept]).reshape(-1, 2), np.array([row[0] for row in kept])


def vertex(three):
    fit = np.polyfit([-1, 0, 1], np.asarray(three, float), 2)
    return float(np.clip(-fit[1] / (2 * fit[0]), -0.5, 0.5)) if fit[0] < 0 else 0.0


def ring_means(image, at, rings):
    """Means over rings one pixel apart about a position, a pixel belonging to a ring by how near it is to it."""
    total, weight = np.zeros(rings), np.zeros(rings)
    for y, x in np.ndindex(image.shape):
        r = math.hypot(x - at[0], y - at[1])
        if r < rings - 1:
            for ring in range(rings):
                share = max(0.0, 1.0 - abs(r - ring))
                total[ring] += share * image[y, x]
                weight[ring] += share
    return total, weight


def pairs(picks, labels, within):
    """The largest number of pairs nearer than that, by the assignment of least cost."""
    near = np.hypot(*(picks[:, None] - labels[None]).transpose(2, 0, 1)) <= within
    rows, columns = linear_sum_assignment(-near.astype(float))
    return int(near[rows, columns].sum())
