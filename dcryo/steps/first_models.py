"""The expectation and maximisation steps of first models, when nothing is known of the volume.

At the resolution of a first model a few hundred directions of view show all that there is. Projections of the models
along a grid of directions are the classes of `steps.classification`, so that the posterior of an image over models,
directions, in-plane angles and shifts is exact on the grid and nothing of it is cut off; the sums over images that it
gives for each direction are slices, which are back-projected.

Images and models are in a box that holds the same field of view in fewer, larger pixels: the working box.
"""

from typing import NamedTuple

import numpy as np
import scipy.fft
from scipy import optimize

from dcryo.kernels import alignment, axes, filters, fsc, rings, sampling, slices, solve
from dcryo.kernels.alignment import Alignment, Move
from dcryo.kernels.rings import Rings
from dcryo.kernels.shells import shell_at
from dcryo.steps import classification
from dcryo.steps.classification import Classes, Sums

# Shells between the finest that is compared and the Nyquist frequency of the working box.
_ROOM = 4
# Frequencies that no image has shown are empty, not undefined.
_LEAST_PRECISION = 1e-9
# Density above this part of the highest is the molecule's, not the noise around it.
_DENSE = 0.2


class Model(NamedTuple):
    """A volume (D, D, D) float32, masked, and the FSC (S,) between the maps of the two halves of its particles, which
    were compared with the same volume."""

    volume: np.ndarray
    fsc: np.ndarray


def working_box_px(box_px: int, pixel_size_A: float, resolution_A: float) -> int:
    """Side of the box in which images of `box_px` can be compared to a resolution."""
    shell = shell_at(resolution_A, box_px, pixel_size_A)
    return int(min(box_px, 2 * scipy.fft.next_fast_len(shell + _ROOM, real=True)))


def working_images(images: np.ndarray, work_px: int) -> np.ndarray:
    """Images (n, D, D) in the working box, on the scale on which projections of a map are sums of its voxels."""
    return filters.rescale_images(images, work_px) * np.float32(work_px / images.shape[-1])


def views(order: int, perturbation: np.ndarray, operators: np.ndarray) -> np.ndarray:
    """Rotations (N, 3, 3), one for each direction of view of a turned grid that symmetry does not make equal."""
    pixels = np.unique(sampling.global_grid(order, operators, perturbation)[0])
    return sampling.rotation_matrices(order, pixels, np.zeros_like(pixels), perturbation)


def compared(
    models: np.ndarray,
    share: np.ndarray,
    rotation: np.ndarray,
    shift_px: np.ndarray,
    shell: int,
    of: Rings,
    shift_sd_px: float,
) -> Classes:
    """Classes to compare images with: projections of models (K, D, D, D) of shares (K,) at rotations (N, 3, 3), the N
    views of the first model first."""
    samples = rings.ring_samples(of)
    projections = np.concatenate(
        [slices.extract(slices.prepare(model, of.shell_max), rotation, samples, of.box_px) for model in models]
    )
    sampled = np.swapaxes(projections.reshape(len(projections), *of.kx.shape), 0, 1)
    shares = np.repeat(share / len(rotation), len(rotation))
    return classification.prepare_sampled(np.ascontiguousarray(sampled), shares, of, shell, shift_px, shift_sd_px)


def back_projected(sums: Sums, rotation: np.ndarray, of: Rings, reach: int) -> np.ndarray:
    """Accumulators (K, ..., 3) as of `slices.insert`, up to the shell `reach`, of the sums over K times N classes."""
    values = rings.samples(sums.numerator, of)
    weights = rings.real_samples(sums.denominator, of)
    count = values.shape[1] // len(rotation)
    out = np.zeros((count, *slices.volume_shape(reach, of.box_px), 3), dtype=np.float32)
    for k in range(count):
        own = slice(k * len(rotation), (k + 1) * len(rotation))
        _insert(out[k], rotation, values[:, own], weights[:, own], of)
    return out


def _insert(volume: np.ndarray, rotation: np.ndarray, values: np.ndarray, weights: np.ndarray, of: Rings) -> None:
    """Add slices given on rings, (angles / 2, n, R), to an accumulator; a sample counts by its area."""
    flat_values, flat_weights = (
        np.ascontiguousarray(np.swapaxes(part * of.area, 0, 1)).reshape(len(rotation), -1) for part in (values, weights)
    )
    samples = rings.ring_samples(of)
    slices.insert(
        volume, rotation, flat_values.astype(np.complex64), flat_weights.astype(np.float32), samples, of.box_px
    )


def random_model(
    images: np.ndarray, ctf: np.ndarray, noise_power: np.ndarray, rotation: np.ndarray, mask: np.ndarray, of: Rings,
    shell: int,
) -> np.ndarray:  # fmt: skip
    """What a few images at random rotations add up to, (D, D, D) float32: a model that has nothing to do with the
    molecule but its size.

    images: (n, D, D); ctf: (angles / 2, n, R); noise_power: (n, R); rotation: (n, 3, 3); mask: (D, D, D); shell: the
    last that is kept. Few images make a model that is far from round, which symmetric and round molecules need: an
    average of many is a ball, which all views fit alike, and hard to leave.
    """
    volume = np.zeros((*slices.volume_shape(of.shell_max, of.box_px), 3), dtype=np.float32)
    share = ctf / noise_power.astype(np.float32)
    _insert(volume, rotation, share * rings.sample(images, of), share * ctf, of)
    whole = solve.complete(volume, np.eye(3)[None])
    precision = solve.mean_weights(whole, of.shell_max, of.box_px)
    model = solve.maximise(whole, None, precision, np.eye(3)[None], of.box_px)
    return mask * filters.lowpass(model, 1.0, of.box_px / shell)


def improved(halves: np.ndarray, mask: np.ndarray, operators: np.ndarray, reach: int) -> Model:
    """The model that sums of two halves, (2, ..., 3), ask for, its prior from their correlation.

    FSC_all = 2 FSC / (1 + FSC) (Rosenthal & Henderson 2003, eq. 7), tau^2 = FSC_all / (1 - FSC_all) over the mean
    weight (Scheres 2012, section 2.4). mask: (D, D, D); operators: (G, 3, 3); reach: last shell of the sums.
    """
    box = len(mask)
    whole = [solve.complete(half, operators) for half in halves]
    plain = []
    for half in whole:
        precision = solve.weight_floor(solve.mean_weights(half, reach, box)) + _LEAST_PRECISION
        plain.append(mask * solve.maximise(half, None, precision, operators, box))
    between = fsc.shell_correlation(plain[0], plain[1])[: reach + 1]
    positive = np.maximum(between, 0)
    both = whole[0] + whole[1]
    precision = solve.prior_precision(2 * positive / (1 + positive), solve.mean_weights(both, reach, box))
    volume = solve.maximise(both, None, precision + _LEAST_PRECISION, operators, box)
    return Model(mask * volume, between)


def rounded(model: np.ndarray) -> np.ndarray:
    """A model (D, D, D) with nothing left but its mean at each distance from the centre: a blob."""
    axis = np.arange(len(model)) - len(model) // 2
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    bins = np.round(radius).astype(int).ravel()
    profile = np.bincount(bins, model.ravel()) / np.bincount(bins)
    return np.interp(radius, np.arange(len(profile)), profile).astype(np.float32)


class Match(NamedTuple):
    """A model and the one of another start that it is most like: its number there, how it goes onto that, and the FSC
    (S,) between the two once it is there."""

    number: int
    alignment: Alignment
    fsc: np.ndarray


def matched(models: np.ndarray, onto: np.ndarray, shell: int) -> list[Match]:
    """The models (K, D, D, D) of one start each brought onto another one of `onto`, (K, D, D, D), up to a shell, so
    that the correlations add up to the most."""
    moves = [[alignment.align(model, other, shell, hands=True) for other in onto] for model in models]
    rows, columns = optimize.linear_sum_assignment([[-move.correlation for move in row] for row in moves])
    found = []
    for row, column in zip(rows, columns, strict=True):
        move = moves[row][column]
        curve = fsc.shell_correlation(alignment.moved(models[row], move), onto[column])
        found.append(Match(int(column), move, curve))
    return found


def agreeing(first_shells: np.ndarray, shell: float) -> np.ndarray:
    """The largest group of starts that agree with one of them, as their numbers, that one first.

    first_shells: (S, S), the shell to which models of two starts correlate (the worst of their K pairs); they agree
    where that is at least `shell`.
    """
    agree = (first_shells >= shell) | np.eye(len(first_shells), dtype=bool)
    central = int(np.argmax(agree.sum(axis=1)))
    others = np.flatnonzero(agree[central] & (np.arange(len(agree)) != central))
    return np.concatenate([[central], others])


def centred(model: np.ndarray) -> np.ndarray:
    """A model (D, D, D) moved so that the centre of mass of its denser part is the centre of the box."""
    axis = np.arange(len(model)) - len(model) // 2
    dense = np.clip(model - _DENSE * model.max(), 0, None)
    along = [np.sum(dense.sum(axis=others) * axis) for others in ((0, 1), (0, 2), (1, 2))]
    shift_px = -np.array(along) / dense.sum(dtype=np.float64)
    return alignment.moved(model, Move(np.eye(3), shift_px, False))


def common_model(
    number: int,
    best: np.ndarray,
    others: np.ndarray,
    matches: list[list[Match]],
    operators: np.ndarray,
    mask: np.ndarray,
    shell: int,
) -> tuple[np.ndarray, float]:
    """What starts that agree have in common of one model, in the setting of a point group, (D, D, D); and how well it
    obeys the group, 1 in C1.

    number: of the model in the best start; best: (K, D, D, D); others: (S, K, D, D, D); matches: of each of those with
    the best.
    """
    copies = [best[number]]
    for models, found in zip(others, matches, strict=True):
        copies += [
            alignment.moved(model, match.alignment)
            for model, match in zip(models, found, strict=True)
            if match.number == number
        ]
    mean = centred(np.asarray(np.mean(copies, axis=0, dtype=np.float32)))
    if len(operators) == 1:
        return mask * mean, 1.0
    found_axes = axes.symmetry_axes(mean, operators, shell)
    return mask * axes.symmetrised(alignment.moved(mean, found_axes), operators), found_axes.agreement
