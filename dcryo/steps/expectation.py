"""The expectation step on one batch of images: poses weighed by likelihood, slices back-projected with their weights.

Pure functions over arrays. What an iteration sums is kept in one `Sums` per shard, into which batch after batch is
folded; what it learns of each particle is returned as `Poses`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dcryo.kernels import fft, modes, posterior, sampling, slices
from dcryo.kernels.modes import Components
from dcryo.kernels.shells import HalfPlane, half_plane, pack, shell_sums
from dcryo.steps.search import Search

# A particle's scale is taken to be 1 give or take 0.3, which counts as much as this much of <W, |S|^2>.
_SCALE_PRIOR = 1 / 0.3**2

# Images whose scores on the grid are held at once.
SCORED_TOGETHER = 8

# How often a pose is looked at on its way to a mode, at most, at each level.
_EVALUATIONS = 8


class Sums(NamedTuple):
    """What a shard adds to the iteration.

    volume: `slices.volume_shape(shell_max, D) + (3,)` float32, see `slices.insert`, of the images' innovations: what is
    left of them once the reference's slices are taken off (the images themselves where its grey scale is unknown);
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
    log_likelihood: (n,) of the best pose, relative to an empty image; max_probability: (n,) of the best mode;
    significant: (n,) number of modes that hold the posterior; angle_sd_deg: (n,) how uncertain the best mode's rotation
    is; usable: (n,) bool, False where the image gave no finite score and was left out of the sums.
    """

    rotation: np.ndarray
    origin_px: np.ndarray
    norm: np.ndarray
    scale: np.ndarray
    log_likelihood: np.ndarray
    max_probability: np.ndarray
    significant: np.ndarray
    angle_sd_deg: np.ndarray
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
    """Slices of the reference at the rotations of the search's grid, made once for all images of a shard.

    rotation: (2 R, 3, 3), the second half the first turned by 180 degrees in the plane; slices: (R, P) of the first.
    """

    rotation: np.ndarray
    slices: np.ndarray


def empty_sums(shell_max: int, groups: int, box_px: int) -> Sums:
    """Sums of no particles, for back-projection up to a shell."""
    return Sums(
        np.zeros((*slices.volume_shape(shell_max, box_px), 3), dtype=np.float32),
        np.zeros((groups, box_px // 2 + 1)),
        np.zeros(groups),
    )


def global_grid(reference: np.ndarray, search: Search, operators: np.ndarray, box_px: int) -> Grid | None:
    """The grid of a search that looks everywhere, restricted to the asymmetric unit; None for one that does not."""
    order = search.grid_order
    if order is None:
        return None
    pixel, psi = sampling.global_grid(order, operators, search.perturbation)
    opposite = sampling.psi_count(order) // 2
    pixel, psi = pixel[psi < opposite], psi[psi < opposite]
    rotations = sampling.rotation_matrices(
        order, np.concatenate([pixel, pixel]), np.concatenate([psi, psi + opposite]), search.perturbation
    )
    return Grid(rotations, slices.extract(reference, rotations[: len(pixel)], half_plane(search.shells[0]), box_px))


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
    Fourier pixel; pixels: the half plane up to the shell that is back-projected; grid: from `global_grid`.
    """
    model = _model(batch, noise_power, pixels)
    finite = np.isfinite(model.data.sum(axis=1)) & np.isfinite(model.weight.sum(axis=1))
    starts = _starts(batch, model, search, pixels, grid)
    found = [
        _fold_one(sums, batch, model, row, starts[row] if finite[row] else None, reference, search, pixels)
        for row in range(len(batch.images))
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


def _starts(
    batch: Batch, model: _Model, search: Search, pixels: HalfPlane, grid: Grid | None
) -> list[Components]:
    """Where the poses of each image start to climb: the last one, or the best rotations of the grid."""
    if search.grid_order is None:
        return [modes.started(rotation[None], np.zeros((1, 2))) for rotation in batch.rotation]
    if grid is None:
        raise ValueError("a search that looks everywhere needs its grid")
    count = grid.slices.shape[1]
    shifts = sampling.shift_grid(search.shift_range_px, search.shift_step_px) * search.shift_step_px
    phases = posterior.shift_phases(pixels, shifts, batch.images.shape[-1], count)
    starts = []
    for first in range(0, len(batch.images), SCORED_TOGETHER):
        rows = slice(first, first + SCORED_TOGETHER)
        shifted = model.data[rows, None, :count] * phases
        scores, shift = posterior.grid_scores(
            grid.slices, shifted, model.weight[rows, :count], search.profile_scale
        )
        for of_image, best_shift in zip(scores, shift, strict=True):
            index, _ = posterior.select(of_image / np.float32(search.temperature), search.fraction, search.maximum)
            starts.append(modes.started(grid.rotation[index], shifts[best_shift[index]]))
    return starts


def _fold_one(
    sums: Sums,
    batch: Batch,
    model: _Model,
    row: int,
    start: Components | None,
    reference: np.ndarray,
    search: Search,
    pixels: HalfPlane,
) -> tuple:
    box = batch.images.shape[-1]
    unusable = (batch.rotation[row], batch.origin_px[row], batch.norm[row], batch.scale[row], 0.0, 0.0, 0, 0.0, False)
    if start is None:
        return unusable
    components, probability = start, np.ones(1)
    window = np.deg2rad(search.window_deg), search.window_px
    for shell in search.shells:
        components = modes.climb(
            components, reference, model.data[row], model.weight[row], pixels, shell, box, window,
            search.profile_scale, _EVALUATIONS,
        )  # fmt: skip
        if len(components.score) == 0:
            return unusable
        temperature = 1.0 if shell == search.shells[-1] else search.temperature
        index, probability = posterior.select(components.log_weight / temperature, search.fraction, search.maximum)
        components = modes.take(components, index)

    points = modes.cubature(components, probability, pixels.shell_max)
    fit = posterior.accumulate(
        sums.volume, reference, points, model.data[row], model.weight[row], pixels, box, not search.profile_scale
    )
    if search.profile_scale:
        # Of a reference of unknown grey scale nothing can be said to be explained.
        norm, scale = _add_residual(sums, model, row, batch.group[row], np.zeros(1), pixels), 1.0
    else:
        norm = _add_residual(sums, model, row, batch.group[row], 2 * fit[0] - fit[1], pixels)
        # The scale so far is in Y once and in W twice; the prior is about 1, not about it, or it would wear off.
        cross, square = fit.sum(axis=1) / (batch.scale[row], batch.scale[row] ** 2)
        scale = (cross + _SCALE_PRIOR) / (square + _SCALE_PRIOR)
    return (
        components.rotation[0],
        batch.origin_px[row] + components.shift[0],
        norm * batch.norm[row],
        scale,
        float(components.score[0]),
        float(probability[0]),
        len(probability),
        float(np.rad2deg(modes.angular_sd_rad(modes.take(components, slice(0, 1)))[0])),
        True,
    )


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


def back_project(volume: np.ndarray, batch: Batch, pixels: HalfPlane, reference: np.ndarray | None) -> np.ndarray:
    """Add images at the poses they came with to an accumulator, in place: C X with weight C^2.

    volume: as `Sums.volume`; reference: from `slices.prepare`, whose slices are taken off the images beforehand, or
    None. Returns (n,) bool, False where the image or its CTF is not finite and was left out.
    """
    box, count = batch.images.shape[-1], len(pixels.kx)
    every, packed = _packed(batch)
    ctf = batch.ctf[:, :count]
    usable = np.isfinite(_mean_power(every, packed)).all(axis=1) & np.isfinite(ctf).all(axis=1)
    moved = posterior.shift_phases(pixels, batch.origin_px, box, count)
    values = packed[:, :count] * ctf * moved
    if reference is not None:
        values -= ctf**2 * slices.extract(reference, batch.rotation, pixels, box)
    slices.insert(volume, batch.rotation[usable], values[usable], (ctf**2)[usable], pixels, box)
    return usable
