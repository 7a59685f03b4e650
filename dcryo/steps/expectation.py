"""The expectation step on one batch of images: poses weighed by likelihood, slices back-projected with their weights.

Pure functions over arrays. What an iteration sums is kept in one `Sums` per shard, into which batch after batch is
folded; what it learns of each particle is returned as `Poses`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dcryo.kernels import fft, posterior, sampling, slices
from dcryo.kernels.posterior import Candidates
from dcryo.kernels.rotations import angle_between_deg, mean_rotation
from dcryo.kernels.shells import HalfPlane, half_plane, pack, shell_sums
from dcryo.steps.search import Search

# A particle's scale is taken to be 1 give or take 0.3, which counts as much as this much of <W, |S|^2>.
_SCALE_PRIOR = 1 / 0.3**2

# Images whose scores are held at once; a grid of all rotations and shifts has some million scores per image.
SCORED_TOGETHER = 8


class Sums(NamedTuple):
    """What a shard adds to the iteration.

    volume: `slices.volume_shape(shell_max) + (3,)` float32, see `slices.insert`;
    residual: (G, D // 2 + 1) float64, sum over particles of the mean residual power per shell, per optics group;
    particles: (G,) float64, how many particles that is.
    """

    volume: np.ndarray
    residual: np.ndarray
    particles: np.ndarray


class Poses(NamedTuple):
    """What an iteration learns of each of n particles.

    rotation: (n, 3, 3); origin_px: (n, 2); norm: (n,) root mean square of the residual in units of the noise model;
    scale: (n,) amplitude of the particle's signal in units of the reference;
    log_likelihood: (n,) of the best pose, relative to an empty image; max_probability: (n,);
    significant: (n,) number of poses that hold the posterior; usable: (n,) bool, False where the image gave no finite
    score and was left out of the sums.
    """

    rotation: np.ndarray
    origin_px: np.ndarray
    norm: np.ndarray
    scale: np.ndarray
    log_likelihood: np.ndarray
    max_probability: np.ndarray
    significant: np.ndarray
    usable: np.ndarray


class Batch(NamedTuple):
    """Images and what is known of them before the step.

    images: (n, D, D) float32; ctf: (n, P) float32 on `half_plane(D // 2)`; group: (n,) int, row of the noise spectra;
    norm: (n,) divides the image; scale: (n,) multiplies the CTF; rotation: (n, 3, 3) and origin_px: (n, 2), the last
    poses, around which is searched.
    """

    images: np.ndarray
    ctf: np.ndarray
    group: np.ndarray
    norm: np.ndarray
    scale: np.ndarray
    rotation: np.ndarray
    origin_px: np.ndarray


@dataclass(frozen=True)
class Grid:
    """Slices of the reference at every rotation of the coarsest level, made once for all images of a shard."""

    pixel: np.ndarray
    psi: np.ndarray
    slices: np.ndarray


def empty_sums(shell_max: int, groups: int, box_px: int) -> Sums:
    """Sums of no particles, for back-projection up to a shell."""
    return Sums(
        np.zeros((*slices.volume_shape(shell_max), 3), dtype=np.float32),
        np.zeros((groups, box_px // 2 + 1)),
        np.zeros(groups),
    )


def global_grid(reference: np.ndarray, search: Search, operators: np.ndarray) -> Grid:
    """The coarsest level of a search that looks everywhere, restricted to the asymmetric unit."""
    level = search.levels[0]
    pixel, psi = sampling.global_grid(level.order, operators, search.perturbation)
    rotations = sampling.rotation_matrices(level.order, pixel, psi, search.perturbation)
    pixels = half_plane(level.shell)
    return Grid(pixel.astype(np.int64), psi.astype(np.int64), slices.extract(reference, rotations, pixels))


def power(batch: Batch, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums over images of their mean power per shell, (groups, D // 2 + 1) float64, and their number, (groups,)."""
    every, packed = _packed(batch)
    of_image = _mean_power(every, packed)
    usable = np.isfinite(of_image).all(axis=1)
    sums, counts = np.zeros((groups, of_image.shape[1])), np.zeros(groups)
    np.add.at(sums, batch.group[usable], of_image[usable])
    np.add.at(counts, batch.group[usable], 1)
    return sums, counts


def _packed(batch: Batch) -> tuple[HalfPlane, np.ndarray]:
    every = half_plane(batch.images.shape[-1] // 2)
    # Images that could not be read are not a number, and stay that.
    with np.errstate(invalid="ignore"):
        return every, pack(every, fft.rfft2(batch.images)) / batch.norm[:, None].astype(np.float32)


def _mean_power(every: HalfPlane, packed: np.ndarray) -> np.ndarray:
    return shell_sums(packed.real**2 + packed.imag**2, every.start) / every.counts


class _Model(NamedTuple):
    """Images as the likelihood sees them, on the packed axis up to the back-projected shell.

    data: (n, P) complex64, Y = C X / v moved to the last origin; weight: (n, P) float32, W = C^2 / v;
    power: (n, D // 2 + 1) mean power of the normalised image per shell; variance: (n, D // 2 + 1) float64, v per shell.
    """

    data: np.ndarray
    weight: np.ndarray
    power: np.ndarray
    variance: np.ndarray


def fold(
    sums: Sums,
    batch: Batch,
    reference: np.ndarray,
    noise_power: np.ndarray,
    search: Search,
    pixels: HalfPlane,
    grid: Grid | None,
) -> Poses:
    """Weigh the poses of a batch against the reference and add its back-projections to the sums, in place.

    reference: from `slices.prepare`, for at least `pixels.shell_max`; noise_power: (G, D // 2 + 1) mean |noise|^2 per
    Fourier pixel; pixels: the half plane up to the shell that is back-projected; grid: from `global_grid` where the
    search looks everywhere.
    """
    model = _model(batch, noise_power, pixels)
    coarse = _coarse_candidates(batch, model, reference, search, pixels, grid)
    found = [
        _fold_one(sums, batch, model, row, coarse[row], reference, search, pixels) for row in range(len(batch.images))
    ]
    return Poses(*(np.array(column) for column in zip(*found, strict=True)))


def _model(batch: Batch, noise_power: np.ndarray, pixels: HalfPlane) -> _Model:
    box = batch.images.shape[-1]
    every, packed = _packed(batch)
    count = len(pixels.kx)
    variance = noise_power[batch.group] / 2
    inverse = (1 / variance).astype(np.float32)[:, pixels.shell]
    ctf = batch.ctf[:, :count] * batch.scale[:, None].astype(np.float32)
    moved = posterior.shift_phases(pixels, batch.origin_px, box, count)
    return _Model(packed[:, :count] * ctf * inverse * moved, ctf**2 * inverse, _mean_power(every, packed), variance)


def _coarse_candidates(
    batch: Batch, model: _Model, reference: np.ndarray, search: Search, pixels: HalfPlane, grid: Grid | None
) -> list[tuple[Candidates, np.ndarray] | None]:
    """The poses of the coarsest level that hold the posterior of each image, with their scores."""
    level = search.levels[0]
    count = pixels.within(level.shell)
    lattice = sampling.shift_grid(search.shift_range_px, level.shift_step_px).astype(np.int64)
    shifts = lattice * level.shift_step_px - level.shift_offset_px
    phases = posterior.shift_phases(pixels, shifts, batch.images.shape[-1], count)

    def scores(rows: slice, pieces: np.ndarray) -> np.ndarray:
        shifted = model.data[rows, None, :count] * phases
        return posterior.product_scores(pieces, shifted, model.weight[rows, :count], search.profile_scale)

    def chosen(pixel: np.ndarray, psi: np.ndarray, of_image: np.ndarray) -> tuple[Candidates, np.ndarray] | None:
        if not np.isfinite(of_image).all():
            return None
        index, _ = posterior.select(of_image.ravel() / np.float32(search.temperature), search.fraction, search.maximum)
        shift, rotation = np.divmod(index, of_image.shape[1])
        order, used, start = posterior.group(rotation, shift)
        return Candidates(pixel[used], psi[used], lattice, start, shift[order]), of_image.ravel()[index[order]]

    if grid is not None:
        return [
            chosen(grid.pixel, grid.psi, of_image)
            for first in range(0, len(batch.images), SCORED_TOGETHER)
            for of_image in scores(slice(first, first + SCORED_TOGETHER), grid.slices)
        ]
    if search.radius_deg is None:
        raise ValueError("a search that looks everywhere needs the grid of its coarsest level")
    pixel, psi, start = sampling.neighbours(level.order, batch.rotation, search.radius_deg, search.perturbation)
    near = half_plane(level.shell)
    found = []
    for row in range(len(batch.images)):
        own = slice(start[row], start[row + 1])
        rotations = sampling.rotation_matrices(level.order, pixel[own], psi[own], search.perturbation)
        of_image = scores(slice(row, row + 1), slices.extract(reference, rotations, near))[0]
        found.append(chosen(pixel[own].astype(np.int64), psi[own].astype(np.int64), of_image))
    return found


def _fold_one(
    sums: Sums,
    batch: Batch,
    model: _Model,
    row: int,
    coarse: tuple[Candidates, np.ndarray] | None,
    reference: np.ndarray,
    search: Search,
    pixels: HalfPlane,
) -> tuple:
    box = batch.images.shape[-1]
    if coarse is None:
        return batch.rotation[row], batch.origin_px[row], batch.norm[row], batch.scale[row], 0.0, 0.0, 0, False
    candidates, scores = coarse
    for level in search.levels[1:]:
        candidates = posterior.children(candidates)
        count = pixels.within(level.shell)
        rotations = sampling.rotation_matrices(level.order, candidates.pixel, candidates.psi, search.perturbation)
        shifts = candidates.shifts * level.shift_step_px - level.shift_offset_px
        shifted = model.data[row, :count] * posterior.shift_phases(pixels, shifts, box, count)
        every = posterior.pair_scores(
            reference, rotations, candidates, shifted, model.weight[row], pixels, search.profile_scale
        )
        temperature = 1.0 if level is search.finest else search.temperature
        index, _ = posterior.select(every / np.float32(temperature), search.fraction, search.maximum)
        candidates, order = posterior.keep(candidates, index)
        scores = every[index[order]]
    weights = np.exp((scores - scores.max()).astype(np.float64))
    weights /= weights.sum()

    finest = search.finest
    rotations = sampling.rotation_matrices(finest.order, candidates.pixel, candidates.psi, search.perturbation)
    shifts = candidates.shifts * finest.shift_step_px - finest.shift_offset_px
    shifted = model.data[row] * posterior.shift_phases(pixels, shifts, box, len(pixels.kx))
    fit = posterior.accumulate(
        sums.volume, reference, rotations, candidates, weights, shifted, model.weight[row], pixels
    )
    if search.profile_scale:
        # Of a reference of unknown grey scale nothing can be said to be explained.
        norm, scale = _add_residual(sums, model, row, batch.group[row], np.zeros(1), pixels), 1.0
    else:
        norm = _add_residual(sums, model, row, batch.group[row], 2 * fit[0] - fit[1], pixels)
        # The scale so far is in Y once and in W twice; the prior is about 1, not about it, or it would wear off.
        cross, square = fit.sum(axis=1) / (batch.scale[row], batch.scale[row] ** 2)
        scale = (cross + _SCALE_PRIOR) / (square + _SCALE_PRIOR)
    norm *= batch.norm[row]
    rotation, shift = _mean_pose(candidates, rotations, shifts, weights, sampling.step_deg(finest.order))
    origin = batch.origin_px[row] + shift
    return rotation, origin, norm, scale, float(scores.max()), float(weights.max()), len(weights), True


def _add_residual(sums: Sums, model: _Model, row: int, group: int, explained: np.ndarray, pixels: HalfPlane) -> float:
    """Add what the reference leaves unexplained to the noise sums; returns its root mean square in noise units.

    explained: (<= D // 2 + 1,) sum over the pixels of a shell of the power that the reference explains, in units of v.
    """
    residual = model.power[row].copy()
    shells = len(explained)
    residual[:shells] -= explained / pixels.counts[:shells] * model.variance[row, :shells]
    sums.residual[group] += residual
    sums.particles[group] += 1
    counts = half_plane(len(residual) - 1).counts
    return float(np.sqrt(np.sum(counts * residual / (2 * model.variance[row])) / counts.sum()))


def _mean_pose(
    candidates: Candidates, rotations: np.ndarray, shifts: np.ndarray, weights: np.ndarray, step_deg: float
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean of the pose around its mode, finer than the grid: over rotations within two steps of the best."""
    best = int(np.argmax(weights))
    of_pair = np.repeat(np.arange(len(rotations)), np.diff(candidates.start))
    near = angle_between_deg(rotations, rotations[of_pair[best]])[of_pair] <= 2 * step_deg
    rotation = mean_rotation(rotations[of_pair[near]], weights[near])
    shift = np.average(shifts[candidates.shift[near]], axis=0, weights=weights[near])
    return rotation, shift


def back_project(volume: np.ndarray, batch: Batch, pixels: HalfPlane) -> np.ndarray:
    """Add images at the poses they came with to an accumulator, in place: C X with weight C^2.

    volume: as `Sums.volume`. Returns (n,) bool, False where the image or its CTF is not finite and was left out.
    """
    count = len(pixels.kx)
    every, packed = _packed(batch)
    ctf = batch.ctf[:, :count]
    usable = np.isfinite(_mean_power(every, packed)).all(axis=1) & np.isfinite(ctf).all(axis=1)
    moved = posterior.shift_phases(pixels, batch.origin_px, batch.images.shape[-1], count)
    values = packed[:, :count] * ctf * moved
    slices.insert(volume, batch.rotation[usable], values[usable], (ctf**2)[usable], pixels)
    return usable
