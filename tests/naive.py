"""Slow, obvious twins of the reconstruction kernels: loops over pixels, voxels and poses, from the definitions.

Frequencies are integers in the order of a transform, 0, 1, ..., h, -h, ..., -1, so that an index may be negative.
"""

import itertools
import math

import numpy as np

PADDING = 2


def fourier_sum(array, frequency, padded):
    """Transform of an array about its box centre at one frequency (x, y, ...), by its definition."""
    total = 0j
    for index, value in np.ndenumerate(array):
        place = [i - size // 2 for i, size in zip(index, array.shape, strict=True)][::-1]
        total += value * np.exp(-2j * np.pi * sum(k * r for k, r in zip(frequency, place, strict=True)) / padded)
    return total


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
    """Value of a half-complex cube at a frequency; its Friedel mate conjugated where that is the one that is held."""
    return cube[z, y, x] if x >= 0 else np.conj(cube[-z, -y, -x])


def corners(x, y, z):
    """The eight grid points around a point, each with its share."""
    for dx, dy, dz in itertools.product((0, 1), repeat=3):
        corner = math.floor(x) + dx, math.floor(y) + dy, math.floor(z) + dz
        yield corner, math.prod(1 - abs(a - b) for a, b in zip(corner, (x, y, z), strict=True))


def extract(cube, rotation, pixels):
    """Central slice of a half-complex cube (complex128) by trilinear interpolation."""
    out = []
    for kx, ky in zip(pixels.kx, pixels.ky, strict=True):
        x, y, z = PADDING * (rotation.T @ (kx, ky, 0))
        out.append(sum(share * voxel(cube, *corner) for corner, share in corners(x, y, z)))
    return np.array(out)


def insert(half_width, rotations, values, weights, pixels, operators):
    """(real, imaginary, weight) sums of slices, their Friedel mates and symmetry mates, of every frequency."""
    out = np.zeros((2 * half_width + 1,) * 3 + (3,))
    for rotation, row, of_row in zip(rotations, values, weights, strict=True):
        for operator in operators:
            turned = rotation @ operator
            for kx, ky, value, weight in zip(pixels.kx, pixels.ky, row, of_row, strict=True):
                for sign in (1, -1):
                    for corner, share in corners(*(sign * PADDING * (turned.T @ (kx, ky, 0)))):
                        out[corner[::-1]] += share * np.array([value.real, sign * value.imag, weight])
    return out


def smoothed(weights):
    """Weights of every frequency averaged with their 26 neighbours, binomially."""
    out = np.zeros_like(weights)
    for offset in itertools.product((-1, 0, 1), repeat=3):
        out += np.roll(weights, offset, axis=(0, 1, 2)) * math.prod(0.25 if d else 0.5 for d in offset)
    return out


def evened(weights):
    """Two rounds of weights whose quotients smooth to an even one: q = 1 / S(w), then q / S(q w); returns 1 / q."""
    quotient = np.divide(1, smoothed(weights), out=np.zeros_like(weights), where=smoothed(weights) > 0)
    uneven = smoothed(quotient * weights)
    quotient = np.divide(quotient, uneven, out=np.zeros_like(weights), where=uneven > 0)
    return np.divide(1, quotient, out=np.zeros_like(weights), where=quotient > 0)


def shells_of_cube(half_width):
    """Image shell of each voxel of the half-complex padded cube: the padded radius halved, rounded half up."""
    wrapped = [*range(half_width + 1), *range(-half_width, 0)]
    out = np.zeros((len(wrapped), len(wrapped), half_width + 1), dtype=int)
    for z, y, x in itertools.product(wrapped, wrapped, range(half_width + 1)):
        out[z, y, x] = math.floor(math.sqrt(z * z + y * y + x * x) / PADDING + 0.5)
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


def poses(candidates):
    """The pairs of candidates in their order, each (pixel, psi, ix, iy)."""
    out = []
    for r, (pixel, psi) in enumerate(zip(candidates.pixel, candidates.psi, strict=True)):
        for i in range(candidates.start[r], candidates.start[r + 1]):
            ix, iy = candidates.shifts[candidates.shift[i]]
            out.append((int(pixel), int(psi), int(ix), int(iy)))
    return out


def children(pose):
    """The 32 poses of the next level below one (pixel, psi, ix, iy)."""
    pixel, psi, ix, iy = pose
    return [
        (4 * pixel + a, 2 * psi + b, 2 * ix + c, 2 * iy + d)
        for a, b, c, d in itertools.product(range(4), range(2), range(2), range(2))
    ]


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
