"""Slow, obvious twins of the reconstruction kernels: loops over pixels, voxels and poses, from the definitions.

Frequencies of a transform are integers in its order, 0, 1, ..., h, -h, ..., -1, so that an index may be negative; those
of a cube of slices are (z, y, x) from (-h, -h, -1) to (h, h, h), and of a whole one from -h to h on every axis.
"""

import itertools
import math

import numpy as np
from scipy.spatial.transform import Rotation

# Taps of the gridding kernel along an axis, and what it takes a box to be padded by.
TAPS = 4
PADDING = 1.25


def fourier_sum(array, frequency, padded):
    """Transform of an array about its box centre at one frequency (x, y, ...), by its definition."""
    total = 0j
    for index, value in np.ndenumerate(array):
        place = [i - size // 2 for i, size in zip(index, array.shape, strict=True)][::-1]
        total += value * np.exp(-2j * np.pi * sum(k * r for k, r in zip(frequency, place, strict=True)) / padded)
    return total


def fourier_sums(volume, frequencies, box):
    """Transform of a cube about its box centre at frequencies (N, 3) (x, y, z), by its definition, an axis a time."""
    place = np.arange(len(volume)) - len(volume) // 2
    x, y, z = (np.exp(-2j * np.pi * k[:, None] * place / box) for k in np.asarray(frequencies, dtype=float).T)
    return np.einsum("zn,nz->n", np.einsum("zyn,ny->zn", volume @ x.T, y), z)


def slice_of(volume, rotation, pixels):
    """Packed central slice of a volume, by the definition of its transform."""
    image_plane = np.stack([pixels.kx, pixels.ky, np.zeros(len(pixels.kx))], axis=1)
    return fourier_sums(volume, image_plane @ rotation, len(volume))


def embedded(volume, padded):
    """A cube in the middle of a larger one of zeros, centre on centre."""
    out = np.zeros((padded,) * 3)
    first = padded // 2 - len(volume) // 2
    out[(slice(first, first + len(volume)),) * 3] = volume
    return out


def full_transform(volume):
    """All D^3 voxels of the transform of a volume about its box centre."""
    return np.fft.fftn(np.fft.ifftshift(volume))


def shell_of(*frequency):
    """Radius rounded half up, in whole numbers: r + 1/2 >= n where 4 r^2 >= (2 n - 1)^2."""
    squared, shell = sum(k * k for k in frequency), 0
    while 4 * squared >= (2 * shell + 1) ** 2:
        shell += 1
    return shell


def half_plane(shell_max):
    """Frequencies (kx, ky) up to a shell, one of each Friedel pair."""
    line = range(-shell_max, shell_max + 1)
    found = set()
    for kx, ky in itertools.product(line, line):
        if shell_of(kx, ky) <= shell_max and (-kx, -ky) not in found:
            found.add((kx, ky))
    return {k if k > (0, 0) else (-k[0], -k[1]) for k in found}


def projection(volume, rotation):
    """Sum along z of a volume turned by a rotation that takes the axes onto axes."""
    box, out = len(volume), np.zeros(volume.shape[1:])
    for z, y, x in np.argwhere(volume):
        turned = rotation @ (x - box // 2, y - box // 2, z - box // 2)
        out[round(turned[1]) + box // 2, round(turned[0]) + box // 2] += volume[z, y, x]
    return out


def voxel(cube, x, y, z):
    """Value of a half-complex cube at a frequency; its Friedel mate conjugated where x is negative."""
    half = len(cube) // 2
    return cube[z + half, y + half, x + 1] if x >= 0 else np.conj(cube[half - z, half - y, 1 - x])


def half_complex(whole):
    """The part of a cube of every frequency that is held: from x = -1 on."""
    return whole[:, :, len(whole) // 2 - 1 :]


def kernel(distance):
    """Exponential of a semicircle (Barnett, Magland & af Klinteberg 2019, eq. 1.8, beta of eq. 4.5)."""
    beta = 0.976 * math.pi * TAPS * (1 - 1 / (2 * PADDING))
    inside = 1 - (2 * distance / TAPS) ** 2
    return math.exp(beta * (math.sqrt(inside) - 1)) if inside >= 0 else 0.0


def taps(x, y, z):
    """The grid points around a point, each with the kernel's weight."""
    for dx, dy, dz in itertools.product(range(1 - TAPS // 2, TAPS // 2 + 1), repeat=3):
        tap = math.floor(x) + dx, math.floor(y) + dy, math.floor(z) + dz
        yield tap, math.prod(kernel(a - b) for a, b in zip(tap, (x, y, z), strict=True))


def read(cube, x, y, z):
    """A half-complex cube between its grid points."""
    return sum(weight * voxel(cube, *tap) for tap, weight in taps(x, y, z))


def extract(cube, rotation, pixels, scale):
    """Central slice of a half-complex cube of `scale` samples per Fourier pixel."""
    return np.array(
        [read(cube, *(scale * (rotation.T @ (kx, ky, 0)))) for kx, ky in zip(pixels.kx, pixels.ky, strict=True)]
    )


def insert(half_width, rotations, values, weights, pixels, scale):
    """(real, imaginary, weight) sums of slices and their Friedel mates, of every frequency."""
    out = np.zeros((2 * half_width + 1,) * 3 + (3,))
    for rotation, row, of_row in zip(rotations, values, weights, strict=True):
        for kx, ky, value, weight in zip(pixels.kx, pixels.ky, row, of_row, strict=True):
            for sign in (1, -1):
                for (x, y, z), share in taps(*(sign * scale * (rotation.T @ (kx, ky, 0)))):
                    place = z + half_width, y + half_width, x + half_width
                    out[place] += share * np.array([value.real, sign * value.imag, weight])
    return out


def symmetrised(cube, operators, radius):
    """Sum of a half-complex cube read at g k over a group, for frequencies k up to a radius and x not negative; where
    all g k are grid points, as they are there."""
    half, out = len(cube) // 2, np.zeros_like(cube)
    for z, y, x in itertools.product(range(-half, half + 1), range(-half, half + 1), range(half + 1)):
        if math.hypot(x, y, z) <= radius:
            for g in operators:
                place = g @ (x, y, z)
                out[z + half, y + half, x + 1] += voxel(cube, *place.astype(int)) if on_grid(g) else read(cube, *place)
    return out


def on_grid(operator):
    """Whether a matrix takes grid points onto grid points."""
    return bool(np.all(operator == np.round(operator)))


def shells_of_cube(half_width, box, padded):
    """Image shell of each frequency of a cube from x = 0 on: its radius in Fourier pixels, rounded half up."""
    out = np.zeros((2 * half_width + 1, 2 * half_width + 1, half_width + 1), dtype=int)
    for z, y, x in np.ndindex(out.shape):
        squared = ((z - half_width) ** 2 + (y - half_width) ** 2 + x**2) * box**2
        while 4 * squared >= ((2 * out[z, y, x] + 1) * padded) ** 2:
            out[z, y, x] += 1
    return out


def log_likelihood(image, transfer, piece, variance):
    """Of complex pixels with a variance per real component, but for a constant."""
    return -np.sum(np.abs(image - transfer * piece) ** 2 / (2 * variance))


def moved(image, pixels, shift, box):
    """Packed pixels of an image moved by a shift (x, y) in pixels."""
    return np.array(
        [
            value * np.exp(-2j * np.pi * (int(kx) * shift[0] + int(ky) * shift[1]) / box)
            for value, kx, ky in zip(image, pixels.kx, pixels.ky, strict=False)
        ]
    )


def select(scores, fraction, maximum):
    """Best poses, best first, until they hold the fraction of the posterior, and their weights."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    weights = [math.exp(float(scores[i]) - float(scores[order[0]])) for i in order]
    total, held, kept = math.fsum(weights), 0.0, 0
    while kept < min(maximum, len(order)) and held < fraction * total:
        held += weights[kept]
        kept += 1
    return order[:kept], np.array(weights[:kept]) / math.fsum(weights[:kept])


def rotation_vector(a, b):
    """Of the rotation that takes b to a."""
    return Rotation.from_matrix(a @ np.transpose(b)).as_rotvec()


def settled(modes, temperature, fraction, maximum, same):
    """Of one image's modes, each (rotation, shift, log weight, Hessian): indices that are kept and their probabilities.

    The heaviest come first; one that is nearer than `same` standard deviations to one that came before is added to it.
    """
    groups = []
    for n in sorted((n for n, mode in enumerate(modes) if math.isfinite(mode[2])), key=lambda n: (-modes[n][2], n)):
        for group in groups:
            rotation, shift, _, hessian = modes[group[0]]
            away = np.concatenate([rotation_vector(modes[n][0], rotation), modes[n][1] - shift])
            if away @ hessian @ away < same**2:
                group.append(n)
                break
        else:
            groups.append([n])
    if not groups:
        return [], []
    log_weights = [np.logaddexp.reduce([modes[n][2] for n in group]) for group in groups]
    kept, probability = select(np.array(log_weights) / temperature, fraction, maximum)
    return [groups[g][0] for g in kept], probability


def shell_correlation(first, second):
    """FSC of two maps, voxel by voxel of their whole transforms."""
    box = len(first)
    a, b = full_transform(first), full_transform(second)
    cross, power_a, power_b = np.zeros((3, box))
    for index in np.ndindex(a.shape):
        shell = shell_of(*(i if 2 * i < box else i - box for i in index))
        cross[shell] += (a[index] * np.conj(b[index])).real
        power_a[shell] += abs(a[index]) ** 2
        power_b[shell] += abs(b[index]) ** 2
    inside = slice(box // 2 + 1)  # the corners of the box lie outside of all shells
    return cross[inside] / np.sqrt(power_a[inside] * power_b[inside])


def shell_power(volume):
    """Mean power of a map's transform per shell, voxel by voxel of the whole transform."""
    box, transform = len(volume), full_transform(volume)
    of_shell = [[] for _ in range(box)]
    for index in np.ndindex(transform.shape):
        shell = shell_of(*(i if 2 * i < box else i - box for i in index))
        of_shell[shell].append(abs(transform[index]) ** 2)
    return np.array([np.mean(powers) for powers in of_shell[: box // 2 + 1]])


def blob_volume(centres, amplitudes, sigma, box):
    """Map of Gaussian blobs of one width, centres (x, y, z) in pixels from the centre; amplitude: the sum of each."""
    axis = np.arange(box) - box // 2
    out = np.zeros((box,) * 3)
    for centre, amplitude in zip(centres, amplitudes, strict=True):
        x, y, z = (np.exp(-((axis - c) ** 2) / (2 * sigma**2)) for c in centre)
        out += amplitude * z[:, None, None] * y[:, None] * x / (2 * np.pi * sigma**2) ** 1.5
    return out.astype(np.float32)


def blob_transform(centres, amplitudes, sigma, box):
    """Half-complex transform of blobs, exact: that of a volume whose samples are as fine as one likes."""
    wrapped = np.fft.fftfreq(box)
    out = np.zeros((box, box, box // 2 + 1), dtype=complex)
    for centre, amplitude in zip(centres, amplitudes, strict=True):
        x, y, z = (np.exp(-2 * np.pi**2 * sigma**2 * wrapped**2 - 2j * np.pi * wrapped * c) for c in centre)
        out += amplitude * z[:, None, None] * y[:, None] * x[: box // 2 + 1]
    return out


def blob_slice(centres, amplitudes, sigma, rotation, origin_px, pixels, box):
    """Packed transform of the projection of blobs, exact: the particle's centre lies at box centre minus origin."""
    place = centres @ rotation[:2].T - origin_px
    k = np.stack([pixels.kx, pixels.ky], axis=1) / box
    envelope = np.exp(-2 * np.pi**2 * sigma**2 * np.sum(k**2, axis=1))
    return envelope * (np.exp(-2j * np.pi * k @ place.T) @ amplitudes)
