"""The expectation step on one batch of images: poses weighed by likelihood, slices back-projected with their weights.

There may be several references, the classes of a 3D classification; a pose is then one of a reference, and the
posterior is over both (Scheres 2012, eq. 4).

Pure functions over arrays. What an iteration sums is kept in one `Sums` per shard, into which batch after batch is
folded; what it learns of each particle is returned as `Poses`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dcryo.kernels import derivatives, fft, modes, posterior, sampling, slices
from dcryo.kernels.modes import Components, Window
from dcryo.kernels.posterior import Weighed
from dcryo.kernels.shells import HalfPlane, half_plane
from dcryo.steps.search import Search

# A particle's scale is taken to be 1 give or take 0.3, which counts as much as this much of <W, |S|^2>.
_SCALE_PRIOR = 1 / 0.3**2

# Images whose scores on the grid are held at once.
SCORED_TOGETHER = 8

# How often a pose is looked at on its way to a mode, at most, at each level.
_EVALUATIONS = 8


class Sums(NamedTuple):
    """What a shard adds to the iteration.

    volumes: for each of K references `slices.volume_shape(shell_max, D) + (3,)` float32, see `slices.insert`, of the
    images' innovations: what is left of them once the reference's slices are taken off (the images themselves where its
    grey scale is unknown);
    residual: (G, D // 2 + 1) float64, sum over particles of the mean residual power per shell, per optics group;
    particles: (G,) float64, how many particles that is.
    """

    volumes: tuple[np.ndarray, ...]
    residual: np.ndarray
    particles: np.ndarray


class Poses(NamedTuple):
    """What an iteration learns of each of n particles.

    rotation: (n, 3, 3); origin_px: (n, 2); norm: (n,) root mean square of the residual in units of the noise model;
    scale: (n,) amplitude of the particle's signal in units of the reference;
    log_likelihood: (n,) of the best pose, relative to an empty image; max_probability: (n,) of the best mode;
    significant: (n,) number of modes that hold the posterior; angle_sd_deg: (n,) how uncertain the best mode's rotation
    is; belonging: (n, K) posterior probability of each reference, the pose being the best of the most probable one;
    usable: (n,) bool, False where the image gave no finite score and was left out of the sums.
    """

    rotation: np.ndarray
    origin_px: np.ndarray
    norm: np.ndarray
    scale: np.ndarray
    log_likelihood: np.ndarray
    max_probability: np.ndarray
    significant: np.ndarray
    angle_sd_deg: np.ndarray
    belonging: np.ndarray
    usable: np.ndarray


class Batch(NamedTuple):
    """Images and what is known of them before the step.

    images: (n, D, D) float32; ctf: (n, P) float32 on `half_plane(D // 2)`; group: (n,) int, row of the noise spectra;
    norm: (n,) divides the image; scale: (n,) multiplies the CTF; rotation: (n, 3, 3) and origin_px: (n, 2), the last
    poses, around which is searched; given_rotation, given_origin_px: those that the particles came with; belonging:
    (n, K), which part of the image each reference was made with.
    """

    images: np.ndarray
    ctf: np.ndarray
    group: np.ndarray
    norm: np.ndarray
    scale: np.ndarray
    rotation: np.ndarray
    origin_px: np.ndarray
    given_rotation: np.ndarray
    given_origin_px: np.ndarray
    belonging: np.ndarray


class References(NamedTuple):
    """What images are compared with.

    volumes: K Fourier volumes, each from `slices.prepare`; share: (K,) part of the particles that is taken to belong to
    each, 0 for one that none does; assigned: each image is compared only with references that it belongs to already.
    """

    volumes: Sequence[np.ndarray]
    share: np.ndarray
    assigned: bool = False


def single(volume: np.ndarray) -> References:
    """One reference, to which all images belong."""
    return References((volume,), np.ones(1))


@dataclass(frozen=True)
class Grid:
    """Slices of the references at the rotations of the search's grid, made once for all images of a shard.

    rotation: (2 R, 3, 3), the second half the first turned by 180 degrees in the plane; slices: (K, R, P) of the first.
    """

    rotation: np.ndarray
    slices: np.ndarray


def empty_sums(shell_max: int, groups: int, box_px: int, references: int = 1) -> Sums:
    """Sums of no particles, for back-projection up to a shell."""
    shape = (*slices.volume_shape(shell_max, box_px), 3)
    return Sums(
        tuple(np.zeros(shape, dtype=np.float32) for _ in range(references)),
        np.zeros((groups, box_px // 2 + 1)),
        np.zeros(groups),
    )


def global_grid(references: References, search: Search, box_px: int) -> Grid | None:
    """The grid of a search that looks everywhere, restricted to the asymmetric unit; None for one that does not."""
    order = search.grid_order
    if order is None:
        return None
    pixel, psi = sampling.global_grid(order, search.operators, search.perturbation)
    opposite = sampling.psi_count(order) // 2
    pixel, psi = pixel[psi < opposite], psi[psi < opposite]
    rotations = sampling.rotation_matrices(
        order, np.concatenate([pixel, pixel]), np.concatenate([psi, psi + opposite]), search.perturbation
    )
    pixels = half_plane(search.shells[0])
    found = [slices.extract(volume, rotations[: len(pixel)], pixels, box_px) for volume in references.volumes]
    return Grid(rotations, np.stack(found))


def power(batch: Batch, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums over images of their mean power per shell, (groups, D // 2 + 1) float64, and their number, (groups,)."""
    n, shells = len(batch.images), batch.images.shape[-1] // 2 + 1
    nothing = half_plane(0)
    blank = np.zeros((n, 1), dtype=np.float32)
    of_image = posterior.weigh(
        _transforms(batch), batch.norm, blank, blank, np.zeros((n, 2)), nothing, half_plane(shells - 1)
    ).power
    usable = np.isfinite(of_image).all(axis=1)
    sums, counts = np.zeros((groups, shells)), np.zeros(groups)
    np.add.at(sums, batch.group[usable], of_image[usable])
    np.add.at(counts, batch.group[usable], 1)
    return sums, counts


def _transforms(batch: Batch) -> np.ndarray:
    # Images that could not be read are not a number, and stay that.
    with np.errstate(invalid="ignore"):
        return fft.rfft2(batch.images)


def fold(
    sums: Sums,
    batch: Batch,
    references: References,
    noise_power: np.ndarray,
    search: Search,
    pixels: HalfPlane,
    grid: Grid | None,
) -> Poses:
    """Weigh the poses of a batch against the references and add its back-projections to the sums, in place.

    references: for at least `pixels.shell_max`; noise_power: (G, D // 2 + 1) mean |noise|^2 per Fourier pixel; pixels:
    the half plane up to the shell that is back-projected; grid: from `global_grid`.
    """
    box = batch.images.shape[-1]
    variance = noise_power[batch.group] / 2
    model = _model(batch, variance, pixels)
    components = _starts(batch, model, references, search, pixels, grid)
    for shell, windows in zip(search.shells, search.windows, strict=True):
        components = _climbed(components, batch, model, references, shell, windows, search.profile_scale, pixels)
        temperature = search.last_temperature if shell == search.shells[-1] else search.temperature
        components, probability = modes.settled(
            components, search.operators, temperature, search.fraction, search.maximum
        )
    found = np.diff(components.start)
    usable = (found > 0) & np.isfinite(model.power).all(axis=1) & np.isfinite(model.weight.sum(axis=1))
    components, probability = _of_images(components, probability, usable)
    fit = np.zeros((len(batch.images), 2, pixels.shell_max + 1))
    for number, (volume, reference) in enumerate(zip(sums.volumes, references.volumes, strict=True)):
        points = modes.cubature(*_kept(components, probability, components.reference == number), pixels.shell_max)
        fit += posterior.accumulate(
            volume, reference, points, model.data, model.weight, pixels, box, not search.profile_scale
        )
    # Of a reference of unknown grey scale nothing can be said to be explained.
    explained = None if search.profile_scale else fit[usable]
    return _learnt(sums, batch, model.power, variance, components, probability, usable, explained)


def _model(batch: Batch, variance: np.ndarray, pixels: HalfPlane) -> Weighed:
    """Images as the likelihood sees them, moved to their last origin, up to the back-projected shell."""
    inverse = (1 / variance[:, : pixels.shell_max + 1]).astype(np.float32)
    ctf = batch.ctf[:, : len(pixels.kx)] * batch.scale[:, None].astype(np.float32)
    every = half_plane(batch.images.shape[-1] // 2)
    return posterior.weigh(_transforms(batch), batch.norm, ctf, inverse, batch.origin_px, pixels, every)


def _climbed(
    components: Components,
    batch: Batch,
    model: Weighed,
    references: References,
    shell: int,
    windows: Sequence[Window],
    profile_scale: bool,
    pixels: HalfPlane,
) -> Components:
    """Components at their modes, those of each reference in its own view up to a shell, its share in their weights."""
    box = batch.images.shape[-1]
    for number, (volume, window) in enumerate(zip(references.volumes, windows, strict=True)):
        view, part = derivatives.view(volume, pixels, shell, box), batch.belonging[:, number]
        components = modes.climb(components, view, model.data, model.weight, window, profile_scale, number, part)
    with np.errstate(divide="ignore"):
        prior = np.log(references.share)
    return components._replace(log_weight=components.log_weight + prior[components.reference])


def _open(batch: Batch, references: References) -> np.ndarray:
    """Which references each image is compared with, (n, K) bool."""
    there = np.broadcast_to(references.share > 0, batch.belonging.shape)
    return there & (batch.belonging > 0) if references.assigned else there


def _starts(
    batch: Batch, model: Weighed, references: References, search: Search, pixels: HalfPlane, grid: Grid | None
) -> Components:
    """Where the poses of each image start to climb: the last one and its mates, or the best rotations of the grid, of
    each reference."""
    n, every = len(batch.images), _open(batch, references)
    if search.grid_order is None:
        return _last_poses(batch, every, search)
    if grid is None:
        raise ValueError("a search that looks everywhere needs its grid")
    count, rotations = grid.slices.shape[2], len(grid.rotation)
    prior = np.where(every, np.log(np.where(references.share > 0, references.share, 1)), -np.inf).astype(np.float32)
    shifts = sampling.shift_grid(search.shift_range_px, search.shift_step_px) * search.shift_step_px
    phases = posterior.shift_phases(pixels, shifts, batch.images.shape[-1], count)
    chosen, chosen_shift = [], []
    for first in range(0, n, SCORED_TOGETHER):
        rows = slice(first, first + SCORED_TOGETHER)
        shifted = model.data[rows, None, :count] * phases
        found = [
            posterior.grid_scores(of_reference, shifted, model.weight[rows, :count], search.profile_scale)
            for of_reference in grid.slices
        ]
        scores = np.concatenate([of + prior[rows, k : k + 1] for k, (of, _) in enumerate(found)], axis=1)
        shift = np.concatenate([best for _, best in found], axis=1)
        for of_image, best_shift in zip(scores, shift, strict=True):
            index, _ = posterior.select(of_image / np.float32(search.temperature), search.fraction, search.maximum)
            chosen.append(index)
            chosen_shift.append(best_shift[index])
    start = np.concatenate([[0], np.cumsum([len(index) for index in chosen])])
    reference, place = np.divmod(np.concatenate(chosen), rotations)
    return modes.started(grid.rotation[place], shifts[np.concatenate(chosen_shift)], start, reference=reference)


def _last_poses(batch: Batch, every: np.ndarray, search: Search) -> Components:
    """The last pose of each image and its mates, each anchored to the nearest mate of the pose that the image came
    with, for each reference that the image is compared with, (n, K) bool."""
    mates = search.mates
    starts = batch.rotation[:, None] @ mates
    given = batch.given_rotation[:, None] @ mates
    nearest = np.einsum("igab,ihab->igh", starts, given).argmax(axis=2)
    anchors = given[np.arange(len(given))[:, None], nearest]
    image, reference = np.nonzero(every)
    return modes.started(
        starts[image].reshape(-1, 3, 3),
        np.zeros((len(image) * len(mates), 2)),
        np.concatenate([[0], np.cumsum(every.sum(axis=1))]) * len(mates),
        anchors[image].reshape(-1, 3, 3),
        np.repeat((batch.given_origin_px - batch.origin_px)[image], len(mates), axis=0),
        np.repeat(reference, len(mates)),
    )


def _of_images(components: Components, probability: np.ndarray, usable: np.ndarray) -> tuple[Components, np.ndarray]:
    """The components of the usable images; the others keep none."""
    return _kept(components, probability, np.repeat(usable, np.diff(components.start)))


def _kept(components: Components, probability: np.ndarray, kept: np.ndarray) -> tuple[Components, np.ndarray]:
    """Some of the components, (K,) bool, each with its image."""
    start = np.concatenate([[0], np.cumsum(kept)])[components.start]
    return Components(start, *(column[kept] for column in components[1:])), probability[kept]


def _learnt(
    sums: Sums,
    batch: Batch,
    power: np.ndarray,
    variance: np.ndarray,
    components: Components,
    probability: np.ndarray,
    usable: np.ndarray,
    fit: np.ndarray | None,
) -> Poses:
    """The best pose of each image, its norm and scale, and its residual added to the noise sums.

    power, variance: (n, D // 2 + 1); fit: from `posterior.accumulate`, of the usable images.
    """
    n = len(usable)
    belonging = np.zeros_like(batch.belonging)
    np.add.at(belonging, (np.repeat(np.arange(n), np.diff(components.start)), components.reference), probability)
    best = _best(components, belonging)
    residual, variance = power[usable], variance[usable]
    counts = half_plane(residual.shape[1] - 1).counts
    scale = np.ones(np.count_nonzero(usable))
    if fit is not None:
        shells = fit.shape[2]
        residual[:, :shells] -= (2 * fit[:, 0] - fit[:, 1]) / counts[:shells] * variance[:, :shells]
        # The scale so far is in Y once and in W twice; the prior is about 1, not about it, or it would wear off.
        before = batch.scale[usable]
        cross, square = fit[:, 0].sum(axis=1) / before, fit[:, 1].sum(axis=1) / before**2
        scale = (cross + _SCALE_PRIOR) / (square + _SCALE_PRIOR)
    np.add.at(sums.residual, batch.group[usable], residual)
    np.add.at(sums.particles, batch.group[usable], 1)
    norm = np.sqrt(np.sum(counts * residual / (2 * variance), axis=1) / counts.sum())

    def filled(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        out = np.array(before)
        out[usable] = after
        return out

    return Poses(
        rotation=filled(batch.rotation, components.rotation[best]),
        origin_px=filled(batch.origin_px, batch.origin_px[usable] + components.shift[best]),
        norm=filled(batch.norm, norm * batch.norm[usable]),
        scale=filled(batch.scale, scale),
        log_likelihood=filled(np.zeros(n), components.score[best]),
        max_probability=filled(np.zeros(n), probability[best]),
        significant=np.diff(components.start),
        angle_sd_deg=filled(np.zeros(n), np.rad2deg(modes.angular_sd_rad(components)[best])),
        belonging=filled(batch.belonging, belonging[usable]),
        usable=usable,
    )


def _best(components: Components, belonging: np.ndarray) -> np.ndarray:
    """The best component of the most probable reference of each image that has any; an image's come best first."""
    image = np.repeat(np.arange(len(belonging)), np.diff(components.start))
    of_class = np.flatnonzero(components.reference == np.argmax(belonging, axis=1)[image])
    first = of_class[np.unique(image[of_class], return_index=True)[1]]
    return first


def back_project(volume: np.ndarray, batch: Batch, pixels: HalfPlane) -> np.ndarray:
    """Add images at the poses they came with to an accumulator, in place: C X with weight C^2.

    volume: as in `Sums`. Returns (n,) bool, False where the image or its CTF is not finite and was left out.
    """
    box = batch.images.shape[-1]
    one = np.ones((len(batch.images), pixels.shell_max + 1), dtype=np.float32)
    ctf, every = batch.ctf[:, : len(pixels.kx)], half_plane(box // 2)
    data, weight, of_image = posterior.weigh(_transforms(batch), batch.norm, ctf, one, batch.origin_px, pixels, every)
    usable = np.isfinite(of_image).all(axis=1) & np.isfinite(ctf).all(axis=1)
    if usable.all():
        slices.insert(volume, batch.rotation, data, weight, pixels, box)
    else:
        slices.insert(volume, batch.rotation[usable], data[usable], weight[usable], pixels, box)
    return usable


def slices_back_projected(
    volume: np.ndarray, reference: np.ndarray, rotation: np.ndarray, ctf: np.ndarray, pixels: HalfPlane, box_px: int
) -> None:
    """Add what `back_project` would add for images that are a reference's slices times their CTFs, in place.

    volume: `slices.volume_shape(shell_max, D)` complex64; reference: from `slices.prepare`; rotation: (n, 3, 3);
    ctf: (n, >= P) float32.
    """
    slices.insert_slices_of(reference, volume, rotation, ctf[:, : len(pixels.kx)] ** 2, pixels, box_px)
