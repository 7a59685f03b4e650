"""How a specimen moves between the frames of a movie: by the correlation of each frame with the sum of the others.

A shift (x, y) in pixels is the one that brings a frame onto the first, as in RELION's files: the specimen has moved by
minus the shift. The shift of the frame t (from 0) at a place (x, y), from -0.5 to 0.5 across the frame, is that of the
whole frame and a polynomial,

    sum over s in (1, x, x^2, y, y^2, xy) and d in (1, 2, 3) of c[s, d] s t^d

(Zheng et al., Nat. Methods 14, 331, 2017; order and place as in RELION's STAR files).

Correlations are sums over a band of the half plane of Fourier space. Patches of the frames are kept as such bands, cut
out where the shifts known before, to whole pixels, say. With G_f a frame's band moved by its shift, it maximises

    sum over patches and pairs of frames f < g of Re sum over k of w(k) conj(G_f) G_g

as a function of all the frames' shifts and the polynomial's coefficients at once, by Newton's method. No peak of a
noisy correlation is ever picked, and a patch that shows nothing has a flat correlation and no weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.fft
from numba import njit
from numpy.typing import NDArray

SPACE_TERMS = 6
TIME_TERMS = 3
COEFFICIENTS = SPACE_TERMS * TIME_TERMS

LOWEST_A = 150.0
"""Coarser features than this, such as the edge of the beam, have no part in correlations."""

_COARSE, _COARSE_FINEST_A = 6.0, 10.0
"""Where a climb begins, the B factor is so many times as large: peaks are broad."""
_LONGEST_PX = 3.0
"""Of a step of Newton's method: about as far as peaks are broad."""
_FOLDS, _JUDGED_FINEST_A = 3, 5.0
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def space_terms(place: NDArray[np.float64]) -> NDArray[np.float64]:
    """1, x, x^2, y, y^2, xy of places (..., 2) from -0.5 to 0.5 -> (..., 6)."""
    x, y = place[..., 0], place[..., 1]
    return np.stack([np.ones_like(x), x, x * x, y, y * y, x * y], axis=-1)


def time_terms(frames: int) -> NDArray[np.float64]:
    """t, t^2, t^3 of the frames from 0 -> (frames, 3)."""
    return np.arange(frames, dtype=np.float64)[:, None] ** np.arange(1, TIME_TERMS + 1)


def in_space(coefficients: NDArray[np.float64], frame: int) -> NDArray[np.float64]:
    """What a local model, coefficients (2, 18), is at a frame from 0: coefficients of the terms in space, (2, 6)."""
    return coefficients.reshape(2, SPACE_TERMS, TIME_TERMS) @ time_terms(frame + 1)[frame]


def local_shift_px(coefficients: NDArray[np.float64], place: NDArray[np.float64], frames: int) -> NDArray[np.float64]:
    """Shifts of a local model, coefficients (2, 18) for x and y, at places (..., 2) -> (..., frames, 2)."""
    model = coefficients.reshape(2, SPACE_TERMS, TIME_TERMS)
    return np.einsum("...s,ft,ast->...fa", space_terms(place), time_terms(frames), model)


@dataclass(frozen=True)
class Band:
    """Part of the half plane of Fourier space of images (ny, nx): rows of whole frequencies, one after the other.

    ky (R,) is a row's frequency along y; its frequencies along x are first (R,) and up. start (R + 1,): where a row
    begins in a packed array (K,). weight (K,) float32. frequency_per_A (K,).
    """

    shape: tuple[int, int]
    ky: NDArray[np.int64]
    first: NDArray[np.int64]
    start: NDArray[np.int64]
    weight: NDArray[np.float32]
    frequency_per_A: NDArray[np.float32]

    def pack(self, transform: NDArray[np.complex64]) -> NDArray[np.float32]:
        """The band of an image's half-complex transform (ny, nx // 2 + 1) -> (2, K), real and imaginary parts."""
        out = np.empty((2, len(self.weight)), np.float32)
        for row, ky in enumerate(self.ky):
            begin, end = self.start[row], self.start[row + 1]
            values = transform[ky, self.first[row] : self.first[row] + end - begin]
            out[0, begin:end] = values.real
            out[1, begin:end] = values.imag
        return out

    def unpack(self, packed: NDArray[np.float32], side: tuple[int, int]) -> NDArray[np.complex64]:
        """Half-complex transform of an image of `side` (ny, nx) that holds the band, and 0 elsewhere."""
        out = np.zeros((side[0], side[1] // 2 + 1), np.complex64)
        for row, ky in enumerate(self.ky):
            begin, end = self.start[row], self.start[row + 1]
            out[ky, self.first[row] : self.first[row] + end - begin] = packed[0, begin:end] + 1j * packed[1, begin:end]
        return out


def band_of(shape: tuple[int, int], pixel_size_A: float, finest_A: float, bfactor_A2: float) -> Band:
    """Frequencies of images (ny, nx) between LOWEST_A and `finest_A`, weighted by exp(-B k^2 / 4)."""
    ny, nx = shape
    limit = min(1.0 / finest_A, 0.5 / pixel_size_A * (1.0 - 2.0 / min(shape)))
    rows, firsts, starts, squares = [], [], [0], []
    y_last = int(limit * ny * pixel_size_A)
    for ky in range(-y_last, y_last + 1):
        y2 = (ky / (ny * pixel_size_A)) ** 2
        x_last = int(np.sqrt(max(0.0, limit**2 - y2)) * nx * pixel_size_A)
        kx = np.arange(0 if ky > 0 else 1, x_last + 1)
        rows.append(ky)
        firsts.append(0 if ky > 0 else 1)
        starts.append(starts[-1] + len(kx))
        squares.append((kx / (nx * pixel_size_A)) ** 2 + y2)
    k2 = np.concatenate(squares)
    weight = np.where(k2 >= LOWEST_A**-2, np.exp(-0.25 * bfactor_A2 * k2), 0.0)
    return Band(
        shape, np.array(rows), np.array(firsts), np.array(starts), weight.astype(np.float32),
        np.sqrt(k2).astype(np.float32),
    )  # fmt: skip


@njit(nogil=True, cache=True, fastmath=_FAST)
def _correlations(data, ky, first, start, weight, phase_y, phase_x, in_sum, out):  # type: ignore[no-untyped-def]
    """Value, gradient and curvature of each frame's correlation with the sum of the others, in radians per pixel.

    data: (F, 2, K); phase_y: (F, 2, R); phase_x: (F, 2, X), from frequency 0; in_sum: (F,) bool; out: (F, 6), added to:
    Re, kx Im, ky Im, kx^2 Re, kx ky Re, ky^2 Re of w conj(S) G.
    """
    frames = data.shape[0]
    longest = 0
    for row in range(ky.size):
        longest = max(longest, start[row + 1] - start[row])
    moved = np.empty((frames, 2, longest), np.float32)
    total = np.empty((2, longest), np.float32)
    for row in range(ky.size):
        begin, n, x0 = start[row], start[row + 1] - start[row], first[row]
        total[:, :n] = 0.0
        for f in range(frames):
            yr, yi = phase_y[f, 0, row], phase_y[f, 1, row]
            re, im = data[f, 0, begin : begin + n], data[f, 1, begin : begin + n]
            xr, xi = phase_x[f, 0, x0 : x0 + n], phase_x[f, 1, x0 : x0 + n]
            gr, gi = moved[f, 0], moved[f, 1]
            for i in range(n):
                cr, ci = xr[i] * yr - xi[i] * yi, xr[i] * yi + xi[i] * yr
                gr[i] = re[i] * cr - im[i] * ci
                gi[i] = re[i] * ci + im[i] * cr
            if in_sum[f]:
                for i in range(n):
                    total[0, i] += gr[i]
                    total[1, i] += gi[i]
        tr, ti, w = total[0], total[1], weight[begin : begin + n]
        y = np.float32(ky[row])
        for f in range(frames):
            own = np.float32(1.0) if in_sum[f] else np.float32(0.0)
            gr, gi = moved[f, 0], moved[f, 1]
            a0 = a1 = a2 = a3 = a4 = np.float32(0.0)
            for i in range(n):
                sr, si = tr[i] - own * gr[i], ti[i] - own * gi[i]
                real = w[i] * (sr * gr[i] + si * gi[i])
                imaginary = w[i] * (sr * gi[i] - si * gr[i])
                x = np.float32(x0 + i)
                a0 += real
                a1 += x * imaginary
                a2 += imaginary
                a3 += x * x * real
                a4 += x * real
            out[f, 0] += a0
            out[f, 1] += a1
            out[f, 2] += y * a2
            out[f, 3] += a3
            out[f, 4] += y * a4
            out[f, 5] += y * y * a0


def _phases(shift_px: NDArray[np.float64], frequencies: NDArray[np.int64], side: int) -> NDArray[np.float32]:
    """exp(-2 pi i k s / n) of shifts (F,) at frequencies (N,) -> (F, 2, N)."""
    turns = (shift_px[:, None] / side) * frequencies
    angle = (-2.0 * np.pi * (turns - np.rint(turns))).astype(np.float32)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


@dataclass(frozen=True)
class Correlation:
    """Of F frames with the sum of the others: value (F,), gradient (F, 2) and curvature (F, 2, 2), the negative of the
    matrix of second derivatives, by the shift in pixels."""

    value: NDArray[np.float64]
    gradient: NDArray[np.float64]
    curvature: NDArray[np.float64]


def correlation(
    band: Band, data: NDArray[np.float32], shift_px: NDArray[np.float64], in_sum: NDArray[np.bool_]
) -> Correlation:
    """Correlations of the frames of a patch, data (F, 2, K), moved by shifts (F, 2), with the sum of those `in_sum`
    (F,) but themselves."""
    ny, nx = band.shape
    sums = np.zeros((len(data), 6))
    x_count = int((band.first + np.diff(band.start)).max())
    _correlations(
        data, band.ky, band.first, band.start, band.weight, _phases(shift_px[:, 1], band.ky, ny),
        _phases(shift_px[:, 0], np.arange(x_count), nx), in_sum, sums,
    )  # fmt: skip
    unit = 2.0 * np.pi / np.array([nx, ny])
    gradient = sums[:, 1:3] * unit
    curvature = sums[:, [3, 4, 4, 5]].reshape(-1, 2, 2) * np.outer(unit, unit)
    return Correlation(sums[:, 0], gradient, curvature)


def search(band: Band, data: NDArray[np.float32], iterations: int = 10) -> NDArray[np.float64]:
    """Shifts (F, 2), in pixels and with mean 0, from the highest peaks of the frames' correlations.

    Correlations are drawn as images whose pixel is half of the finest period of the band; it goes on until no peak
    moves by half of such a pixel. Good to about that, which is where Newton's method takes over.
    """
    side = tuple(scipy.fft.next_fast_len(2 * int(n) + 2, real=True) for n in (band.ky.max(), _columns(band)))
    scale = np.array([band.shape[1] / side[1], band.shape[0] / side[0]])
    shift = np.zeros((len(data), 2))
    frames = data[:, 0] + 1j * data[:, 1]
    kx, ky = _frequencies(band)
    for _ in range(iterations):
        before = shift.copy()
        phase = np.exp((-2j * np.pi) * (shift[:, :1] * (kx / band.shape[1]) + shift[:, 1:] * (ky / band.shape[0])))
        total = (frames * phase.astype(np.complex64)).sum(axis=0)
        for f in range(len(frames)):
            others = (total - frames[f] * phase[f]).astype(np.complex64)
            cross = band.weight * np.conj(frames[f]) * others
            drawn = scipy.fft.irfft2(band.unpack(np.stack([cross.real, cross.imag]), side), side, workers=1)
            y, x = np.unravel_index(np.argmax(drawn), side)
            shift[f] = scale * [_vertex(drawn[y], x), _vertex(drawn[:, x], y)]
        shift -= shift.mean(axis=0)
        if np.abs((shift - before) / scale).max() < 0.5:
            break
    return shift


def _columns(band: Band) -> int:
    return int((band.first + np.diff(band.start)).max()) - 1


def _frequencies(band: Band) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    counts = np.diff(band.start)
    kx = np.concatenate([np.arange(x, x + n) for x, n in zip(band.first, counts, strict=True)])
    return kx, np.repeat(band.ky, counts)


def _vertex(line: NDArray[np.float32], at: np.intp) -> float:
    """Of the parabola through three points of a periodic line, the middle one its highest; counted from the origin."""
    n = len(line)
    left, middle, right = float(line[at - 1]), float(line[at]), float(line[(at + 1) % n])
    bend = left - 2.0 * middle + right
    offset = 0.5 * (left - right) / bend if bend < 0 else 0.0
    return float(at if at <= n // 2 else at - n) + offset


@dataclass(frozen=True)
class Patches:
    """Patches of a movie's frames as bands: data (P, F, 2, K), at places (P, 2) from -0.5 to 0.5 of the frame, cut out
    so that they are moved already by `moved_px` (P, F, 2)."""

    band: Band
    data: NDArray[np.float32]
    place: NDArray[np.float64]
    moved_px: NDArray[np.float64]


@dataclass(frozen=True)
class Motion:
    """Shifts of F whole frames (F, 2), coefficients of the local model (2, 18), in pixels; which of its six terms in
    space a fit has found or is to find."""

    frame_px: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    terms: tuple[int, ...] = ()

    def at(self, place: NDArray[np.float64]) -> NDArray[np.float64]:
        """Shifts at places (..., 2) -> (..., F, 2)."""
        return self.frame_px + local_shift_px(self.coefficients, place, len(self.frame_px))


def narrowed(patches: Patches, finest_A: float, bfactor_A2: float) -> Patches:
    """The same patches with the part of their band that is no finer than `finest_A`, and with other weights."""
    band = patches.band
    kept = band.frequency_per_A <= 1.0 / finest_A
    counts = np.add.reduceat(np.append(kept, False), band.start[:-1]) * (np.diff(band.start) > 0)
    rows = counts > 0
    frequency = band.frequency_per_A[kept]
    weight = np.where(band.weight[kept] > 0, np.exp(-0.25 * bfactor_A2 * frequency.astype(np.float64) ** 2), 0.0)
    start = np.concatenate([[0], np.cumsum(counts[rows])])
    narrow = Band(band.shape, band.ky[rows], band.first[rows], start, weight.astype(np.float32), frequency)
    return replace(patches, band=narrow, data=np.ascontiguousarray(patches.data[..., kept]))


def climb(
    patches: Patches,
    start: Motion,
    iterations: int,
    used: NDArray[np.bool_] | None = None,
    free: NDArray[np.bool_] | None = None,
    tolerance_px: float = 0.01,
) -> tuple[Motion, list[Correlation]]:
    """Newton's method from a motion nearby: all frames' shifts and the local model's terms at once. Returns the
    motion found and the patches' correlations there.

    used: (F,) frames that make the sums; free: (F,) those whose shifts are looked for (default: those used); the local
    model is fitted to frames that are both. The curvature is the mean over frames of each patch's; a step that lowers
    the correlation is halved. It ends when no frame or corner moves by more than `tolerance_px`.
    """
    frames = len(start.frame_px)
    used = np.ones(frames, bool) if used is None else used
    free = used if free is None else free
    fits_model = bool(start.terms) and bool((used & free).any())
    basis = _basis(patches.place, frames, start.terms if fits_model else (), free)
    motion, found = start, _all_correlations(patches, start, used)
    for _ in range(iterations):
        step = _newton(found, basis, free, used is free)
        step *= min(1.0, _LONGEST_PX / max(_LONGEST_PX, np.abs(basis @ step).max()))
        for _ in range(4):
            moved = _moved(motion, step, free, fits_model)
            tried = _all_correlations(patches, moved, used)
            if _value(tried, free) >= _value(found, free):
                break
            step = 0.5 * step
        else:
            break
        change = np.abs(moved.at(patches.place)[:, free] - motion.at(patches.place)[:, free]).max()
        motion, found = moved, tried
        if change < tolerance_px:
            break
    return motion, found


def _all_correlations(patches: Patches, motion: Motion, used: NDArray[np.bool_]) -> list[Correlation]:
    rest = motion.at(patches.place) - patches.moved_px
    return [correlation(patches.band, data, shift, used) for data, shift in zip(patches.data, rest, strict=True)]


def _value(found: Sequence[Correlation], free: NDArray[np.bool_]) -> float:
    return float(sum(one.value[free].sum() for one in found))


def _basis(
    place: NDArray[np.float64], frames: int, terms: tuple[int, ...], free: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Change of a shift along one axis, (P, F, N), by the parameters of it: free frames' shifts, then coefficients."""
    of_frames = np.broadcast_to(np.eye(frames)[:, free], (len(place), frames, int(free.sum())))
    model = np.einsum("ps,ft->pfst", space_terms(place)[:, list(terms)], time_terms(frames))
    return np.concatenate([of_frames, model.reshape(len(place), frames, -1)], axis=2)


def _newton(
    found: Sequence[Correlation],
    basis: NDArray[np.float64],
    free: NDArray[np.bool_],
    pairs: bool,
) -> NDArray[np.float64]:
    """Step of the parameters, (N, 2). pairs: whether the frames that move also make the sums: then a shift of all of
    them changes nothing, and the curvature is that of their differences."""
    n = basis.shape[2]
    scale = np.abs(basis).max(axis=(0, 1))
    matrix, right = np.zeros((n, 2, n, 2)), np.zeros((n, 2))
    for one, base in zip(found, basis, strict=True):
        own = base[free] / scale
        curvature = _definite(one.curvature[free].mean(axis=0))
        centred = own - own.mean(axis=0) if pairs else own
        matrix += (centred.T @ centred)[:, None, :, None] * curvature[None, :, None, :]
        right += own.T @ one.gradient[free]
    flat = matrix.reshape(2 * n, 2 * n)
    if not np.trace(flat) > 0:
        return np.zeros((n, 2))  # nothing to see in any patch
    flat[np.diag_indices(2 * n)] += 1e-6 * np.trace(flat) / (2 * n)
    return np.linalg.solve(flat, right.reshape(-1)).reshape(n, 2) / scale[:, None]


def _definite(curvature: NDArray[np.float64]) -> NDArray[np.float64]:
    """The matrix without what bends the wrong way."""
    values, vectors = np.linalg.eigh(curvature)
    return (vectors * np.maximum(values, 0.02 * max(values.max(), 0.0))) @ vectors.T


def _moved(motion: Motion, step: NDArray[np.float64], free: NDArray[np.bool_], fits_model: bool) -> Motion:
    frame_px = motion.frame_px.copy()
    n = int(free.sum())
    frame_px[free] += step[:n]
    if not fits_model:
        return replace(motion, frame_px=frame_px)
    model = motion.coefficients.reshape(2, SPACE_TERMS, TIME_TERMS).copy()
    model[:, list(motion.terms)] += step[n:].reshape(len(motion.terms), TIME_TERMS, 2).transpose(2, 0, 1)
    return replace(motion, frame_px=frame_px, coefficients=model.reshape(2, COEFFICIENTS))


MODELS: tuple[tuple[int, ...], ...] = ((), (1, 3), (1, 2, 3, 4, 5))
"""Terms of the local models that are tried: none, linear in space, all. The term that is constant in space is the whole
frames' and stays 0."""


def fit(patches: Patches, frame_px: NDArray[np.float64], bfactor_A2: float) -> tuple[Motion, list[float]]:
    """The motion, its local model no richer than the data vouch for, and what each of MODELS gained.

    A model has to predict frames that it was not fitted to: in turn every third frame is left out of the fit and of the
    sums, and then compared with the sum of the others, with the model and with none; a shift of the whole frame is free
    in both. The gain is the mean over patches and left out frames of what the model adds to the correlation, over its
    standard error. A richer model is taken where it gains upon the one before it: a fit to two thirds of the frames
    that predicts the others as well is better than none when it is made of all of them, and one that finds nothing but
    noise loses two to five standard errors.
    """
    coarse = narrowed(patches, _COARSE_FINEST_A, _COARSE * bfactor_A2)
    plain = Motion(frame_px, np.zeros((2, COEFFICIENTS)))
    chosen, gains = 0, [0.0] * len(MODELS)
    if len(frame_px) >= 2 * _FOLDS and len(patches.place) > SPACE_TERMS:
        middle = narrowed(patches, _JUDGED_FINEST_A, bfactor_A2)
        folds = [_judged(coarse, middle, plain, fold) for fold in range(_FOLDS)]
        for row in range(1, len(MODELS)):
            more = np.concatenate([(scores[row] - scores[chosen]).ravel() for scores in folds])
            gains[row] = float(more.mean() / (more.std() / np.sqrt(len(more)) + np.finfo(float).tiny))
            if gains[row] > 0.0:
                chosen = row
    motion = climb(coarse, replace(plain, terms=MODELS[chosen]), 8)[0]
    motion = climb(patches, motion, 12)[0]
    return replace(motion, frame_px=motion.frame_px - motion.frame_px[0]), gains


def _judged(coarse: Patches, middle: Patches, plain: Motion, fold: int) -> list[NDArray[np.float64]]:
    """Correlations of left out frames with the sum of the others, (P, left out) for each of MODELS."""
    used = np.arange(len(plain.frame_px)) % _FOLDS != fold
    motion, scores = plain, []
    for terms in MODELS:
        motion = replace(motion, terms=terms)
        if terms:
            motion = climb(coarse, motion, 2, used)[0]
        motion = climb(middle, motion, 2, used)[0]
        found = climb(middle, motion, 2, used, ~used)[1]
        scores.append(np.stack([one.value[~used] for one in found]))
    return scores


def measured_px(patches: Patches, motion: Motion, largest_px: float) -> NDArray[np.float64]:
    """Shifts of each patch by itself, (P, F, 2): one step of Newton's method from the fitted motion, no longer than
    `largest_px`. What scatter they have about the motion is the noise of a patch of one frame."""
    used = np.ones(len(motion.frame_px), bool)
    out = motion.at(patches.place)
    for row, one in enumerate(_all_correlations(patches, motion, used)):
        curvature = _definite(one.curvature.mean(axis=0))
        if np.linalg.det(curvature) > 0:
            step = np.linalg.solve(curvature, one.gradient.T).T
            length = np.linalg.norm(step, axis=1, keepdims=True)
            out[row] += step * np.minimum(1.0, largest_px / np.maximum(length, 1e-9))
    return out
