"""Scores of poses, the few that matter, and what they add to the sums of an iteration.

With white-on-dark image X, CTF C, slice S of the reference and noise variance v per real component, the log-likelihood
of a pose is, up to a constant of the image,

    score = Re <Y, S> - 1/2 <W, |S|^2>,    Y = C X / v,    W = C^2 / v

(Sigworth 1998; Scheres 2012, eq. 1-3), sums over the half plane. Only Y knows the shift and only the second term the
CTF envelope, so a score costs one product once the slice is there.

Where the grey scale of the reference is not yet known, the score is maximised over a factor a >= 0 on S, which gives
Re<Y, S>^2 / (2 <W, |S|^2>) where the product is positive: the profile likelihood.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from dcryo.kernels.shells import HalfPlane
from dcryo.kernels.slices import PADDING, extract_one, insert_one

# exp(-20) of the best pose's weight is beyond what any fraction of the posterior could notice.
_NEGLIGIBLE = 20.0
_BINS = 400


class Candidates(NamedTuple):
    """Poses of one image as pairs (rotation, shift), grouped by rotation.

    pixel, psi: (R,) int64, grid indices of the rotations at the level's order; shifts: (T, 2) int64, lattice indices;
    start: (R + 1,) int64, rotation r owns pairs `start[r]:start[r + 1]`; shift: (pairs,) int64, row of `shifts`.
    """

    pixel: np.ndarray
    psi: np.ndarray
    shifts: np.ndarray
    start: np.ndarray
    shift: np.ndarray


def shift_phases(pixels: HalfPlane, shifts_px: np.ndarray, box_px: int, count: int) -> np.ndarray:
    """Factors that move an image by each shift, (T, count) complex64: exp(-2 pi i k.t / D).

    shifts_px: (T, 2), x and y, in pixels; count: length of the prefix of the packed axis.
    """
    out = np.empty((len(shifts_px), count), dtype=np.complex64)
    _shift_phases(pixels.kx, pixels.ky, np.asarray(shifts_px, dtype=np.float64), box_px, pixels.shell_max, out)
    return out


@njit(nogil=True, cache=True)
def _shift_phases(kx, ky, shifts, box, shell_max, out):  # type: ignore[no-untyped-def]
    along_x = np.empty(shell_max + 1, dtype=np.complex64)
    along_y = np.empty(2 * shell_max + 1, dtype=np.complex64)
    for t in range(out.shape[0]):
        for k in range(-shell_max, shell_max + 1):
            along_y[k + shell_max] = np.exp(-2j * np.pi * k * shifts[t, 1] / box)
            if k >= 0:
                along_x[k] = np.exp(-2j * np.pi * k * shifts[t, 0] / box)
        for p in range(out.shape[1]):
            out[t, p] = along_x[kx[p]] * along_y[ky[p] + shell_max]


def product_scores(slices: np.ndarray, shifted: np.ndarray, weights: np.ndarray, profile_scale: bool) -> np.ndarray:
    """Scores of every rotation with every shift, as one matrix product.

    slices: (R, P) complex64; shifted: (B, T, P) complex64, the images' Y at each shift; weights: (B, P) float32, the
    images' W. Returns (B, T, R) float32.
    """
    images, shifts, count = shifted.shape
    real_slices = slices.view(np.float32)
    products = shifted.reshape(-1, count).view(np.float32) @ real_slices.T
    scores = products.reshape(images, shifts, len(slices))
    power = slices.real**2 + slices.imag**2
    norms = (weights @ power.T)[:, None, :]
    if profile_scale:
        np.maximum(scores, 0, out=scores)
        return scores**2 / (2 * norms)
    scores -= norms / 2
    return scores


@njit(nogil=True, cache=True)
def select(scores, fraction, maximum):  # type: ignore[no-untyped-def]
    """The fewest poses that together hold a fraction of the posterior, best first, at most `maximum`.

    scores: (n,) float32. Returns indices (m,) int64 and their weights (m,) float64, which sum to one. Ties are taken in
    the order of their index, so the choice depends on nothing but the scores.
    """
    best = scores.max()
    mass = np.zeros(_BINS)
    count = np.zeros(_BINS, dtype=np.int64)
    scale = _BINS / _NEGLIGIBLE
    for s in scores:
        if s > best - _NEGLIGIBLE:
            b = min(int((best - s) * scale), _BINS - 1)
            mass[b] += np.exp(s - best)
            count[b] += 1
    target = fraction * mass.sum()
    held = 0.0
    wanted = 0
    last = 0
    for b in range(_BINS):
        held += mass[b]
        wanted += count[b]
        last = b
        if held >= target or wanted >= maximum:
            break
    index = np.empty(wanted, dtype=np.int64)
    n = 0
    for i in range(scores.size):
        s = scores[i]
        if s > best - _NEGLIGIBLE and min(int((best - s) * scale), _BINS - 1) <= last:
            index[n] = i
            n += 1
    order = np.argsort(-scores[index], kind="mergesort")[:maximum]
    index = index[order]
    weights = np.exp((scores[index] - best).astype(np.float64))
    cumulated = np.cumsum(weights)
    keep = np.searchsorted(cumulated, target) + 1
    index, weights = index[:keep], weights[:keep]
    return index, weights / weights.sum()


@njit(nogil=True, cache=True)
def group(rotation, shift):  # type: ignore[no-untyped-def]
    """Pairs grouped by rotation: the order that groups them, the rotations used and where each one's pairs start.

    rotation, shift: (n,) int64. Returns order (n,), used (R,), start (R + 1,), int64 all.
    """
    span = shift.max() + 1
    order = np.argsort(rotation * span + shift, kind="mergesort")
    used = np.empty(len(rotation), dtype=np.int64)
    start = np.empty(len(rotation) + 1, dtype=np.int64)
    n = 0
    for i in range(len(order)):
        r = rotation[order[i]]
        if n == 0 or used[n - 1] != r:
            used[n] = r
            start[n] = i
            n += 1
    start[n] = len(order)
    return order, used[:n], start[: n + 1]


@njit(nogil=True, cache=True)
def _children(pixel, psi, shifts, start, shift):  # type: ignore[no-untyped-def]
    rotations = len(pixel)
    pixels = np.empty(8 * rotations, dtype=np.int64)
    psis = np.empty(8 * rotations, dtype=np.int64)
    starts = np.empty(8 * rotations + 1, dtype=np.int64)
    pairs = np.empty(32 * len(shift), dtype=np.int64)
    n = 0
    for r in range(rotations):
        for j in range(8):
            child = 8 * r + j
            pixels[child] = 4 * pixel[r] + j // 2
            psis[child] = 2 * psi[r] + j % 2
            starts[child] = n
            for i in range(start[r], start[r + 1]):
                for q in range(4):
                    pairs[n] = 4 * shift[i] + q
                    n += 1
    starts[8 * rotations] = n
    lattice = np.empty((4 * len(shifts), 2), dtype=np.int64)
    for t in range(len(shifts)):
        for q in range(4):
            lattice[4 * t + q, 0] = 2 * shifts[t, 0] + q // 2
            lattice[4 * t + q, 1] = 2 * shifts[t, 1] + q % 2
    return pixels, psis, lattice, starts, pairs


def children(parents: Candidates) -> Candidates:
    """Every pose of the next level below the given ones: 8 rotations times 4 shifts for each pair."""
    return Candidates(*_children(*parents))


@njit(nogil=True, cache=True)
def _keep(pixel, psi, shifts, start, shift, chosen):  # type: ignore[no-untyped-def]
    rotation = np.empty(len(chosen), dtype=np.int64)
    for i in range(len(chosen)):
        rotation[i] = np.searchsorted(start, chosen[i], side="right") - 1
    order, used, starts = group(rotation, shift[chosen])
    kept = shift[chosen][order]
    renumber = np.full(len(shifts), -1, dtype=np.int64)
    lattice = np.empty((len(shifts), 2), dtype=np.int64)
    n = 0
    for i in range(len(kept)):
        if renumber[kept[i]] < 0:
            renumber[kept[i]] = n
            lattice[n] = shifts[kept[i]]
            n += 1
        kept[i] = renumber[kept[i]]
    return (pixel[used], psi[used], lattice[:n], starts, kept), order


def keep(candidates: Candidates, chosen: np.ndarray) -> tuple[Candidates, np.ndarray]:
    """The chosen pairs alone. Returns them and the order in which they stand: pair i was `chosen[order[i]]`."""
    kept, order = _keep(*candidates, chosen)
    return Candidates(*kept), order


def pair_scores(
    prepared: np.ndarray,
    rotations: np.ndarray,
    candidates: Candidates,
    shifted: np.ndarray,
    weights: np.ndarray,
    pixels: HalfPlane,
    profile_scale: bool,
) -> np.ndarray:
    """Scores of the candidate pairs of one image.

    prepared: Fourier volume; rotations: (R, 3, 3); shifted: (T, P) complex64, Y at each of the candidates' shifts;
    weights: (>= P,) float32. P, the length of the prefix of the packed axis, sets the resolution. Returns (pairs,)
    float32.
    """
    out = np.empty(len(candidates.shift), dtype=np.float32)
    scaled = (rotations * PADDING).astype(np.float32)
    _pair_scores(
        prepared, scaled, candidates.start, candidates.shift, shifted, weights, pixels.kx, pixels.ky, profile_scale, out
    )
    return out


@njit(nogil=True, cache=True, fastmath=True)
def _pair_scores(prepared, scaled, start, shift, shifted, weights, kx, ky, profile, out):  # type: ignore[no-untyped-def]
    count = shifted.shape[1]
    piece = np.empty(count, dtype=np.complex64)
    for r in range(len(scaled)):
        extract_one(prepared, scaled[r], kx, ky, count, piece)
        norm = np.float32(0)
        for p in range(count):
            norm += weights[p] * (piece[p].real * piece[p].real + piece[p].imag * piece[p].imag)
        for i in range(start[r], start[r + 1]):
            image = shifted[shift[i]]
            product = np.float32(0)
            for p in range(count):
                product += image[p].real * piece[p].real + image[p].imag * piece[p].imag
            if profile:
                out[i] = max(product, np.float32(0)) ** 2 / (2 * norm)
            else:
                out[i] = product - norm / 2


def accumulate(
    accumulator: np.ndarray,
    prepared: np.ndarray,
    rotations: np.ndarray,
    candidates: Candidates,
    posterior: np.ndarray,
    shifted: np.ndarray,
    weights: np.ndarray,
    pixels: HalfPlane,
) -> np.ndarray:
    """Back-project one image with its posterior weights, and measure how well the reference fits it.

    accumulator: as in `slices.insert`, changed in place; posterior: (pairs,) float64, weights of the candidate pairs.
    Returns (2, shell_max + 1) float64: the posterior means of Re <Y, S> and of <W, |S|^2> per shell.
    """
    fit = np.zeros((2, pixels.shell_max + 1))
    scaled = (rotations * PADDING).astype(np.float32)
    _accumulate(
        accumulator, prepared, scaled, candidates.start, candidates.shift, posterior.astype(np.float32), shifted,
        weights, pixels.kx, pixels.ky, pixels.shell, fit,
    )  # fmt: skip
    return fit


@njit(nogil=True, cache=True)
def _accumulate(accumulator, prepared, scaled, start, shift, posterior, shifted, weights, kx, ky, shell, fit):  # type: ignore[no-untyped-def]
    count = len(kx)
    piece = np.empty(count, dtype=np.complex64)
    image = np.empty(count, dtype=np.complex64)
    weight = np.empty(count, dtype=np.float32)
    for r in range(len(scaled)):
        total = np.float32(0)
        image[:] = 0
        for i in range(start[r], start[r + 1]):
            total += posterior[i]
            for p in range(count):
                image[p] += posterior[i] * shifted[shift[i], p]
        extract_one(prepared, scaled[r], kx, ky, count, piece)
        for p in range(count):
            weight[p] = total * weights[p]
            cross = image[p].real * piece[p].real + image[p].imag * piece[p].imag
            power = piece[p].real * piece[p].real + piece[p].imag * piece[p].imag
            fit[0, shell[p]] += cross
            fit[1, shell[p]] += weight[p] * power
        insert_one(accumulator, scaled[r], image, weight, kx, ky, count)
