"""Projections of a part of the map taken off the images, and images moved onto another point of the map.

An image X is taken to be a C (S_outside + S_inside) and noise: S are the slices of the two parts of the map at the
image's pose, C is its CTF. How strong the part outside is in an image, a, is found beside a free amplitude of the part
inside, so that a part inside that is missing, bound or moved does not change what is subtracted.
"""

from typing import NamedTuple

import numpy as np

from dcryo.kernels import fft, filters, posterior, slices
from dcryo.kernels.hold import hold, shares
from dcryo.kernels.shells import HalfPlane, unpack, volume_shells
from dcryo.steps.expectation import Batch, power

# Amplitudes of particles are taken to be 1 give or take 0.3 before anything is known.
_PRIOR_SPREAD = 0.3


class Amplitudes(NamedTuple):
    """What n images say of the amplitude of the part outside: it is cross / square give or take 1 / sqrt(square).

    cross, square: (n,) float64. Both are 0 for an image that cannot be used.
    """

    cross: np.ndarray
    square: np.ndarray


class Parts(NamedTuple):
    """A map in two parts, (D, D, D) float32 each: what is to be subtracted, and what stays."""

    outside: np.ndarray
    inside: np.ndarray


def parts(half_map: np.ndarray, fsc: np.ndarray, solvent: np.ndarray, kept: np.ndarray, last_shell: int) -> Parts:
    """A half map, filtered by the FSC with the other, inside the solvent mask, in what a mask keeps and the rest.

    The FSC of two half maps is the Wiener filter of either: signal over signal and noise. So the slices have the
    amplitude that they have in images, in the sense of least squares (Rosenthal & Henderson 2003).
    half_map, solvent, kept: (D, D, D); fsc: (D // 2 + 1,); last_shell: shells beyond it are taken for noise.
    """
    box = len(half_map)
    gain = np.zeros(int(volume_shells(box).max()) + 1, dtype=np.float32)
    gain[: last_shell + 1] = np.clip(fsc[: last_shell + 1], 0, 1)
    filtered = fft.irfftn(fft.rfftn(half_map) * gain[volume_shells(box)], box) * solvent
    return Parts((filtered * (1 - kept)).astype(np.float32), (filtered * kept).astype(np.float32))


def residual_power(
    batch: Batch, outside: np.ndarray, inside: np.ndarray, groups: int, pixels: HalfPlane
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over images of the mean power per shell that both parts leave of them, and their number; as
    `expectation.power`."""
    ones = np.ones(len(batch.images))
    with np.errstate(invalid="ignore"):
        for part in (outside, inside):
            batch = batch._replace(images=subtract(batch, part, ones, pixels))
    return power(batch, groups)


def measure(
    batch: Batch, outside: np.ndarray, inside: np.ndarray, noise_power: np.ndarray, pixels: HalfPlane
) -> Amplitudes:
    """The amplitude of the part outside in each image.

    outside, inside: from `slices.prepare`; noise_power: (G, D // 2 + 1) mean |noise|^2 of a Fourier pixel.
    """
    box = batch.images.shape[-1]
    inverse = (2 / noise_power[batch.group][:, : pixels.shell_max + 1]).astype(np.float32)
    with np.errstate(invalid="ignore"):
        transforms = fft.rfft2(batch.images)
    ctf = batch.ctf[:, : len(pixels.kx)] * batch.scale[:, None].astype(np.float32)
    data, weight, _ = posterior.weigh(transforms, batch.norm, ctf, inverse, batch.origin_px, pixels, pixels)
    out, own = (slices.extract(prepared, batch.rotation, pixels, box) for prepared in (outside, inside))
    # The constant term, which backgrounds make what it is, is left out.
    data, weight, out, own = (
        array[:, 1:].astype(np.result_type(array, np.float64)) for array in (data, weight, out, own)
    )
    with np.errstate(invalid="ignore"):
        out_image, own_image = (np.einsum("np,np->n", data, np.conj(part)).real for part in (out, own))
        out_out, own_own = (np.einsum("np,np->n", weight, np.abs(part) ** 2) for part in (out, own))
        out_own = np.einsum("np,np->n", weight, (out * np.conj(own)).real)
        share = np.divide(out_own, own_own, out=np.zeros_like(out_own), where=own_own > 0)
        cross, square = out_image - share * own_image, out_out - share * out_own
    usable = np.isfinite(cross) & np.isfinite(square)
    return Amplitudes(np.where(usable, cross, 0), np.where(usable, square, 0))


def own_score(fsc: np.ndarray, part: np.ndarray, images: int, last_shell: int) -> float:
    """What an image's own noise adds to `cross`, for it is in the map that it is compared with (`hold.hold`).

    fsc: (D // 2 + 1,) that filtered the map; part: mask (D, D, D) of the part outside; images: in the half that made
    it, times the order of the symmetry.
    """
    used = shares(fsc[: last_shell + 1], float(part.mean()), images)
    return float(hold(used, 0.0, len(part))[-1])


def amplitudes(measured: Amplitudes, group: np.ndarray, own_score: float) -> np.ndarray:
    """Amplitude of the part outside in each of n images, (n,): that of its group (n,), and its own as far as it is
    known.

    own_score: what there is in each `cross` that is noise.
    Group by group, amplitudes are taken to be normal about their mean with the spread that is left of their scatter
    once their errors are taken off (empirical Bayes: DerSimonian & Laird 1986, eq. 9), so that weak images get that
    mean.
    """
    found = np.ones(len(group))
    for number in np.unique(group):
        own = group == number
        square = measured.square[own]
        cross = measured.cross[own] - own_score * (square > 0)
        prior = 1 / _PRIOR_SPREAD**2
        mean = (cross.sum() + prior) / (square.sum() + prior)
        seen = square > 0
        excess = np.sum((cross[seen] - mean * square[seen]) ** 2 / square[seen]) - (np.count_nonzero(seen) - 1)
        total = square.sum()
        spread = max(excess, 0) * total / max(total**2 - np.sum(square**2), 1e-30) if total > 0 else 0.0
        spread = min(spread, _PRIOR_SPREAD**2)
        found[own] = (mean + spread * cross) / (1 + spread * square)
    return found


def subtract(batch: Batch, outside: np.ndarray, amplitude: np.ndarray, pixels: HalfPlane) -> np.ndarray:
    """Images less their projections of the part outside, (n, D, D) float32, on the grey scale that they came with.

    outside: from `slices.prepare`; amplitude: (n,).
    """
    box = batch.images.shape[-1]
    projected = slices.extract(outside, batch.rotation, pixels, box)
    projected *= posterior.shift_phases(pixels, -batch.origin_px, box, len(pixels.kx))
    projected *= batch.ctf[:, : len(pixels.kx)] * (amplitude * batch.scale * batch.norm)[:, None].astype(np.float32)
    return np.asarray(batch.images - fft.irfft2(unpack(pixels, projected, box), box))


def moved_boxes(images: np.ndarray, moved_px: np.ndarray, box_px: int) -> np.ndarray:
    """Images (n, D, D) whose boxes are moved by whole pixels (n, 2), x and y, and cut to (n, box_px, box_px).

    What comes in at one side is what left at the other: noise stays noise of the same spectrum, and a box that is not
    cut is the same image with another origin.
    """
    side = images.shape[-1]
    first = side // 2 - box_px // 2
    columns = (first + np.arange(box_px) + moved_px[:, :1]) % side
    rows = (first + np.arange(box_px) + moved_px[:, 1:]) % side
    return images[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def moved_map(volume: np.ndarray, centre_px: np.ndarray, box_px: int) -> np.ndarray:
    """A map (D, D, D) whose point `centre_px` (3,), x y z in whole pixels from the box centre, comes to the centre of a
    box of `box_px`. As in images, what leaves the box comes in at the other side."""
    return filters.pad_or_crop(np.roll(volume, tuple(-centre_px[::-1]), axis=(0, 1, 2)), box_px)


def centre_of_mass_px(mask: np.ndarray) -> np.ndarray:
    """Centre of mass of a mask (D, D, D), from the box centre, x y z, (3,) float64."""
    box, total = len(mask), float(mask.sum(dtype=np.float64))
    axis = np.arange(box) - box // 2
    return np.array([axis @ mask.sum(axis=across, dtype=np.float64) / total for across in ((0, 1), (0, 2), (1, 2))])


def reverted_origins_px(
    origin_px: np.ndarray, rotation: np.ndarray, moved_px: np.ndarray, centre_px: np.ndarray
) -> np.ndarray:
    """Origins (n, 2) in the images before their boxes were moved by (n, 2), of the map before the point `centre_px`
    (3,) came to its centre; the inverse of what `extraction.recentred` does to origins, at any poses (n, 3, 3)."""
    return np.asarray(origin_px - moved_px + (rotation @ centre_px)[:, :2])
