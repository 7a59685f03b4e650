"""Orientations of images from the lines that their transforms share.

The transforms of two projections are central slices of one volume, which meet in a line through the origin (Crowther,
DeRosier & Klug 1970; van Heel 1987). Where the line lies in each of them, their orientations say: with directions of
view d_i and d_j, along A_i n and A_j n for n = d_i x d_j. So orientations are right where the lines that they make
common are alike, for all pairs together; here they climb to that one image at a time, every direction and turn of it
being tried against all the others, from random starts.

A centre that is off by a vector o makes a phase along a line, that of a one-dimensional shift by o . n, so lines are
compared at their best shift. What is compared is the same for a volume and its mirror image: the hand stays unknown.
Images of a symmetric volume share as many lines as it has operators, and any one of these is right.
"""

import numpy as np
from numba import njit

from dcryo.kernels import rings, sampling
from dcryo.kernels.rotations import random_rotations

# Lines on half a circle: 5 degrees apart, finer than what the resolution of class averages asks for.
LINES = 36
_STEP = np.pi / LINES
_ROBUST_ROUNDS = 5
# Likeness is kept as int16.
_UNIT = 1 / 32767


def lines(images: np.ndarray, shell: int, diameter_px: float) -> np.ndarray:
    """Central lines of the transforms of images, radii 1 to `shell` in Fourier pixels, each radius divided by the root
    of its mean power over all lines, so that no shell drowns the others.

    images: (K, D, D) real, masked; diameter_px: of the particle. Returns (K, 2 LINES, shell) complex64, a line every
    pi / LINES from the x axis towards y.
    """
    of = rings.rings(images.shape[-1], shell, diameter_px)
    coefficients = rings.series(rings.sample(images, of), of, rings.orders_at(of, shell))[..., 1:] / of.angles
    order, angle = np.arange(len(coefficients)), np.arange(LINES) * _STEP
    # Coefficients of negative orders are (-1)^m conj c(m).
    there = np.exp(1j * np.outer(angle, order))
    back = np.exp(-1j * np.outer(angle, order[1:])) * (-1.0) ** order[1:]
    half = np.tensordot(there, coefficients, 1) + np.tensordot(back, coefficients[1:].conj(), 1)
    whole = np.swapaxes(np.concatenate([half, half.conj()]), 0, 1)
    power = np.mean(np.abs(whole) ** 2, axis=(0, 1))
    return (whole / np.sqrt(np.where(power > 0, power, 1))).astype(np.complex64)


def moved(of: np.ndarray, shift_px: np.ndarray, box_px: int) -> np.ndarray:
    """Lines (K, 2 LINES, R) of images moved by (K, 2) px, (x, y)."""
    angle = np.arange(2 * LINES) * _STEP
    along = shift_px[:, :1] * np.cos(angle) + shift_px[:, 1:] * np.sin(angle)
    return (of * _phases(along, of.shape[2], box_px)).astype(np.complex64)


def _phases(along_px: np.ndarray, radii: int, box_px: int) -> np.ndarray:
    """What shifts along lines (...) multiply them by, radii 1 to `radii`: (..., radii)."""
    return np.exp(-2j * np.pi / box_px * np.multiply.outer(along_px, np.arange(1, radii + 1)))


def likeness(of: np.ndarray, box_px: int, reach_px: float, step_px: float) -> np.ndarray:
    """How alike every line of every image is to every line of the others: the cube of their correlation at the best
    shift up to `reach_px`, 0 where that is negative.

    The cube, because lines that are not common correlate as well, by half and more, and many of these would outweigh a
    few that fit.

    of: (K, 2 LINES, R) complex64. Returns (K, K, LINES, 2 LINES) int16, in units of 1 / 32767: [i, j, b, a] is of line
    a of image i with line b of image j; line b + LINES of j with a is line b with a + LINES.
    """
    count, circle, radii = of.shape
    norm = np.linalg.norm(of, axis=2, keepdims=True)
    unit = of / np.where(norm > 0, norm, 1)
    steps = int(np.floor(reach_px / step_px + 1e-6))
    shifted = [
        _parts(unit[:, :LINES] * _phases(np.asarray(step), radii, box_px)).reshape(-1, 2 * radii)
        for step in step_px * np.arange(-steps, steps + 1)
    ]
    out = np.empty((count, count, LINES, circle), dtype=np.int16)
    for i, own in enumerate(_parts(unit)):
        best = shifted[0] @ own.T
        for other in shifted[1:]:
            np.maximum(best, other @ own.T, out=best)
        np.clip(best, 0, 1, out=best)
        best = best * best * best * np.float32(1 / _UNIT)
        out[i] = np.rint(best, out=best).reshape(count, LINES, circle)
    return out


def _parts(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values.real, values.imag], axis=-1).astype(np.float32)


def common_line_angles(rotations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angles in the planes of images i and j of the line that they share: two arrays (K, K) in radians.

    rotations: (K, 3, 3). Views of one direction share all lines; the angles are then those of any.
    """
    direction = rotations[:, 2]
    line = np.cross(direction[:, None], direction)
    own = np.einsum("ixk,ijk->ijx", rotations[:, :2], line)
    other = np.einsum("jxk,ijk->ijx", rotations[:, :2], line)
    return np.arctan2(own[..., 1], own[..., 0]), np.arctan2(other[..., 1], other[..., 0])


def agreement(table: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Likeness of the common line of each pair of images, (K, K) float64, 0 on the diagonal.

    table: from `likeness`; rotations: (K, 3, 3).
    """
    own, other = (np.floor(angle / _STEP + 0.5).astype(int) for angle in common_line_angles(rotations))
    turn = (other % (2 * LINES)) // LINES
    rows, columns = np.indices(own.shape)
    found = table[rows, columns, other % LINES, (own + turn * LINES) % (2 * LINES)] * _UNIT
    np.fill_diagonal(found, 0)
    return found


def ascend(
    table: np.ndarray, weights: np.ndarray, start: np.ndarray, order: int, sweeps: int, random: np.random.Generator
) -> np.ndarray:
    """Orientations (K, 3, 3) from others: in each sweep, image after image takes the orientation in which its lines
    with all the others are most alike.

    table: from `likeness`; weights: (K,) of the images, 0 for those that have no orientation yet; they get one and
    do not decide that of others. order: of the grid of directions, which is turned at random in each sweep; turns in
    the plane are LINES apart.
    """
    rotations = start.copy()
    pixels = np.arange(sampling.pixel_count(order), dtype=np.int32)
    for _ in range(sweeps):
        turn = random_rotations(1, random)[0]
        frames = sampling.rotation_matrices(order, pixels, np.zeros_like(pixels), turn)
        images = random.permutation(len(rotations))
        _sweep(table, np.asarray(weights, dtype=np.float32), frames, images, rotations)
    return rotations


@njit(nogil=True, cache=True)
def _sweep(table, weights, frames, images, rotations):  # type: ignore[no-untyped-def]
    scores = np.empty((len(frames), 2 * LINES), dtype=np.float32)
    for i in images:
        scores[:] = 0
        for j in range(len(rotations)):
            if j != i and weights[j] > 0:
                _score(table[i, j], weights[j], frames, rotations[j], scores)
        best = np.argmax(scores)
        frame, angle = frames[best // (2 * LINES)], (best % (2 * LINES)) * _STEP
        cosine, sine = np.cos(angle), np.sin(angle)
        for axis in range(3):
            rotations[i, 0, axis] = cosine * frame[0, axis] - sine * frame[1, axis]
            rotations[i, 1, axis] = sine * frame[0, axis] + cosine * frame[1, axis]
            rotations[i, 2, axis] = frame[2, axis]


# Without fastmath, for the reason that `overlay._shell_sums` gives.
@njit(nogil=True, cache=True)
def _score(table, weight, frames, other, scores):  # type: ignore[no-untyped-def]
    """Add what one image says of all orientations of another: (C, 2 LINES), directions by turns in the plane."""
    circle = 2 * LINES
    for c in range(len(frames)):
        d, e = frames[c, 2], other[2]
        x = d[1] * e[2] - d[2] * e[1]
        y = d[2] * e[0] - d[0] * e[2]
        z = d[0] * e[1] - d[1] * e[0]
        own = np.arctan2(
            frames[c, 1, 0] * x + frames[c, 1, 1] * y + frames[c, 1, 2] * z,
            frames[c, 0, 0] * x + frames[c, 0, 1] * y + frames[c, 0, 2] * z,
        )
        theirs = np.arctan2(
            other[1, 0] * x + other[1, 1] * y + other[1, 2] * z, other[0, 0] * x + other[0, 1] * y + other[0, 2] * z
        )
        a = int(np.floor(own / _STEP + 0.5)) % circle
        b = int(np.floor(theirs / _STEP + 0.5)) % circle
        if b >= LINES:
            a, b = (a + LINES) % circle, b - LINES
        # A turn in the plane by p lines takes line a of the frame to a + p.
        row, into = table[b], scores[c]
        for p in range(circle - a):
            into[p] += weight * np.float32(row[a + p])
        for p in range(circle - a, circle):
            into[p] += weight * np.float32(row[a + p - circle])


def centres(
    of: np.ndarray, rotations: np.ndarray, weights: np.ndarray, box_px: int, reach_px: float, step_px: float
) -> np.ndarray:
    """Origins (K, 2) px, (x, y), by least squares from the shifts at which common lines agree best.

    of: lines (K, 2 LINES, R); weights: (K,). For the shift t that takes line b of j onto line a of i, o_j . n_b - o_i .
    n_a = t. Equations weigh less where they are not met (Cauchy's weights, iterated). Three combinations of origins
    stay free, for a shift of the volume moves no line off another: of these the least is taken.
    """
    count, _, radii = of.shape
    own, other = common_line_angles(rotations)
    first, second = np.triu_indices(count, 1)
    a, b = own[first, second], other[first, second]
    place = [np.floor(angle / _STEP + 0.5).astype(int) % (2 * LINES) for angle in (a, b)]
    steps = int(np.floor(reach_px / step_px + 1e-6))
    tried = step_px * np.arange(-steps, steps + 1)
    product = of[first, place[0]] * of[second, place[1]].conj()
    shift = tried[np.argmax((product @ _phases(-tried, radii, box_px).T.astype(np.complex64)).real, axis=1)]
    # Rows of the equations have four numbers: (image, axis) columns and their coefficients.
    column = np.stack([2 * first, 2 * first + 1, 2 * second, 2 * second + 1], axis=1)
    row = np.stack([-np.cos(a), -np.sin(a), np.cos(b), np.sin(b)], axis=1)
    product_of_row = row[:, :, None] * row[:, None, :]
    weight, origins = weights[first] * weights[second], np.zeros(2 * count)
    for _ in range(_ROBUST_ROUNDS):
        left = np.sum(row * origins[column], axis=1) - shift
        each = weight / (1 + (left / step_px) ** 2)
        normal, right = np.zeros((2 * count, 2 * count)), np.zeros(2 * count)
        np.add.at(normal, (column[:, :, None], column[:, None, :]), each[:, None, None] * product_of_row)
        np.add.at(right, column, (each * shift)[:, None] * row)
        origins = np.linalg.lstsq(normal, right, rcond=1e-6)[0]
    return origins.reshape(count, 2)
