"""Refinement of the CTF: what a batch of images says about it at known poses, and what follows for particles,
micrographs and optics groups (Zivanov et al. 2018; Zivanov, Nakane & Scheres 2020)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dcryo.kernels import aberrations, ctf_sums, fft, phase_fit, posterior, shrinkage
from dcryo.kernels.ctf_sums import ASTIGMATISM, BFACTOR, DEFOCUS, DIAGONAL, PARAMETERS, PHASE_SHIFT, SCALE, CtfSums
from dcryo.kernels.fsc import shell_power
from dcryo.kernels.phase_fit import PhaseFit
from dcryo.kernels.shells import HalfPlane, half_plane, volume_shells
from dcryo.kernels.shrinkage import Settled

ODD, EVEN = 6, 9
# Which odd coefficients beside the shift (0, 1), which each of them needs, are of which aberration.
BEAM_TILT, TREFOIL = (3, 4), (2, 5)
# Neighbours over which phases are averaged for the eye.
_SMOOTH_PX = 2.0
# A CTF is at most 1, times the particle's scale and envelope.
_LARGEST_CTF = 1e4
# Phases at the resolution, and logarithms of the envelope there, change by no more than this in one pass.
_LONGEST_TURN_RAD, _LONGEST_DAMPING = 1.0, 0.4
# A magnification further off than this is no distortion but a wrong pixel size, and would leave the reference.
LARGEST_STRETCH = 0.03


class Images(NamedTuple):
    """Images and what is known of them; first axis n.

    images: (n, D, D) float32; offsets_A: (n, T), changes of the defocus at which its likelihood is asked for; group:
    optics group; norm divides the image; rotation (n, 3, 3), origin_px (n, 2): the pose; table: (n, 7) from
    `ctf.phase_table`; rates: (n, 2) from `ctf_sums.rates`; own_table: (n, 7), of the CTF with which each went into the
    reference.
    """

    images: np.ndarray
    offsets_A: np.ndarray
    group: np.ndarray
    norm: np.ndarray
    rotation: np.ndarray
    origin_px: np.ndarray
    table: np.ndarray
    rates: np.ndarray
    own_table: np.ndarray


class OpticsGroups(NamedTuple):
    """Aberrations of G optics groups. odd: (G, >= ODD) and even: (G, >= EVEN) coefficients (rad) as in
    `kernels.aberrations`; magnification: (G, 2, 2); pixel_size_A: (G,)."""

    odd: np.ndarray
    even: np.ndarray
    magnification: np.ndarray
    pixel_size_A: np.ndarray


class Range(NamedTuple):
    """The resolution that counts: from a shell to a shell."""

    shell_min: int
    shell_max: int


def weighted_reference(half_map: np.ndarray, mask: np.ndarray, fsc: np.ndarray, shell_max: int) -> np.ndarray:
    """The reference of a half: its own map (D, D, D), masked, each shell times the FSC of the half maps, which is
    Wiener's filter for a half map; without what is beyond a shell."""
    weight = np.where(np.arange(len(fsc)) <= shell_max, np.maximum(fsc, 0), 0)
    box = len(half_map)
    of_voxel = np.append(weight, 0)[np.minimum(volume_shells(box), len(weight))]
    return fft.irfftn(fft.rfftn(half_map * mask) * of_voxel.astype(np.float32), box)


def own_noise(half_map: np.ndarray, mask: np.ndarray, fsc: np.ndarray, shell_max: int) -> np.ndarray:
    """Power of the noise in `weighted_reference` that each of its particles shares with it, (shell_max + 1,).

    It is 1 - FSC of the power of the half map under the mask, times the filter. What a particle adds at one frequency
    is kept by a mask in the proportion of its mean, noise on the whole in that of its mean square.
    """
    share = np.clip(fsc, 0, 1)
    power = shell_power(half_map * mask) * (1 - share) * share * float(mask.sum() / np.sum(mask**2))
    return power[: shell_max + 1]


def frequencies(groups: OpticsGroups, group: int, pixels: HalfPlane, box_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (P,) of the specimen, in 1/A, that are seen at the pixels of an optics group's images."""
    seen = groups.magnification[group] @ np.stack([pixels.kx, pixels.ky]).astype(np.float64)
    x, y = seen / (box_px * groups.pixel_size_A[group])
    return x, y


def optics_of(groups: OpticsGroups, pixels: HalfPlane, box_px: int) -> ctf_sums.Optics:
    """Aberrations of groups at the pixels of images."""
    odd, even, seen = [], [], []
    for index in range(len(groups.odd)):
        x, y = frequencies(groups, index, pixels, box_px)
        odd.append(np.exp(-1j * aberrations.odd_phase(groups.odd[index], x, y)).astype(np.complex64))
        even.append(aberrations.even_phase(groups.even[index], x, y))
        seen.append(np.stack([x, y]) * box_px * groups.pixel_size_A[index])
    delta, places = np.stack(even), np.stack(seen)
    return ctf_sums.Optics(
        np.stack(odd), np.cos(delta), np.sin(delta), np.ascontiguousarray(places[:, 0]),
        np.ascontiguousarray(places[:, 1]),
    )  # fmt: skip


def learn(
    sums: CtfSums,
    batch: Images,
    reference: np.ndarray,
    noise_power: np.ndarray,
    optics: ctf_sums.Optics,
    own_power: np.ndarray,
    own_optics: ctf_sums.Optics,
    within: Range,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add a batch to the sums, in place. Returns the likelihood of each particle's defocus (n, T) float32, its normal
    equations (n, NORMAL) float64, and (n,) bool, False where an image or its CTF is not finite and was left out, with
    zeros for both.

    reference: from `slices.prepare`; noise_power: (D // 2 + 1,) mean |noise|^2 of a Fourier pixel; own_power: from
    `own_noise`; own_optics: with which particles went into the reference.
    """
    n, box = len(batch.images), batch.images.shape[-1]
    pixels = half_plane(within.shell_max)
    inverse = np.tile((2 / noise_power[: within.shell_max + 1]).astype(np.float32), (n, 1))
    with np.errstate(invalid="ignore"):
        transforms = fft.rfft2(batch.images)
    one = np.ones((n, len(pixels.kx)), dtype=np.float32)
    weighed = posterior.weigh(transforms, batch.norm, one, inverse, batch.origin_px, pixels, pixels)
    highest = (within.shell_max + 1.0) ** 2
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(batch.table[:, 6]) * np.exp(np.maximum(batch.table[:, 5] * highest, 0))
    usable = np.isfinite(weighed.power).all(axis=1) & np.isfinite(batch.table).all(axis=1) & (largest <= _LARGEST_CTF)
    curves = np.zeros(batch.offsets_A.shape, dtype=np.float32)
    normal = np.zeros((n, ctf_sums.NORMAL))
    known = (array[usable] for array in (batch.rotation, weighed.data, inverse, batch.table, batch.rates, batch.group))
    own = ctf_sums.Own(own_power, batch.own_table[usable], own_optics)
    curves[usable], normal[usable] = ctf_sums.gather(
        sums, reference, optics, pixels, within.shell_min, box, batch.offsets_A[usable], own, *known
    )
    return curves, normal, usable


def settled_defocus(curves: Sequence[np.ndarray], micrograph: np.ndarray, step_A: float, each: bool) -> Settled:
    """Defoci of all particles from their likelihoods: each its own, near what its micrograph's have in common, or one
    change for all of a micrograph. See `shrinkage`."""
    return (shrinkage.settle if each else shrinkage.shared)(np.concatenate(curves), micrograph, step_A)


class MicrographFit(NamedTuple):
    """Changes (M, K) of the parameters that were asked for of M micrographs, and how far the true ones spread, (K,)."""

    change: np.ndarray
    spread: np.ndarray


def longest_steps(rates: np.ndarray, wanted: Sequence[int], within: Range) -> np.ndarray:
    """How far parameters may go in one pass: as far as their equations, which are linear, can be believed. rates: (2,),
    from `ctf_sums.rates`."""
    of_defocus, of_envelope = np.abs(rates) * within.shell_max**2
    longest = np.full(PARAMETERS, _LONGEST_TURN_RAD)
    longest[[DEFOCUS, ASTIGMATISM, DIAGONAL]] /= of_defocus
    longest[BFACTOR], longest[SCALE] = _LONGEST_DAMPING / of_envelope, _LONGEST_DAMPING
    return longest[list(wanted)]


def fit_micrographs(
    normal: Sequence[np.ndarray],
    micrograph: np.ndarray,
    wanted: Sequence[int],
    before: np.ndarray,
    longest: np.ndarray,
    defocus: Settled | None,
) -> MicrographFit:
    """What the particles (n, NORMAL) of each micrograph (n,) have in common beside their defocus.

    wanted: which parameters of `ctf_sums`; before: (M, K), how far they are now from where they began, to which
    micrographs of few particles are drawn back; longest: (K,), from `longest_steps`; defocus: what was found of the
    particles' own, which then is free at
    the same time (eliminated from the equations); None where it is held.
    """
    every = np.concatenate(normal)
    kept = np.asarray(wanted)
    gradient = every[:, :PARAMETERS]
    rows, columns = np.triu_indices(PARAMETERS)
    matrix = np.zeros((len(every), PARAMETERS, PARAMETERS))
    matrix[:, rows, columns] = matrix[:, columns, rows] = every[:, PARAMETERS:]
    right, left = gradient[:, kept], matrix[:, kept[:, None], kept]
    if defocus is not None:
        own = matrix[:, DEFOCUS, DEFOCUS] + 1 / max(defocus.spread, 1.0) ** 2
        cross = matrix[:, DEFOCUS, kept] / own[:, None]
        right = right - cross * gradient[:, DEFOCUS, None]
        left = left - cross[:, :, None] * matrix[:, DEFOCUS][:, None, kept]
    sums = np.zeros((len(before), len(kept))), np.zeros((len(before), len(kept), len(kept)))
    np.add.at(sums[0], micrograph, right)
    np.add.at(sums[1], micrograph, left)
    kinds = {ASTIGMATISM: 0, DIAGONAL: 0, PHASE_SHIFT: 1, BFACTOR: 2, SCALE: 3}
    numbers = np.unique([kinds[one] for one in wanted], return_inverse=True)[1]
    change, spread = shrinkage.shrunk(*sums, before, numbers)
    # An envelope that all have in common is the map's: it has no part in the steps, long as they may be.
    share = np.bincount(micrograph, minlength=len(before)) / len(micrograph)
    of_map = np.isin(kept, (BFACTOR, SCALE))
    change[:, of_map] -= share @ change[:, of_map]
    change = np.clip(change, -longest, longest)
    change[:, of_map] -= share @ change[:, of_map]
    return MicrographFit(change, spread)


class GroupFit(NamedTuple):
    """What the particles of one optics group say: its coefficients and their errors, and phases for the eye, (D, D) in
    rad: `pictures` odd observed, odd fitted, even observed, even fitted."""

    fit: PhaseFit
    pictures: np.ndarray


def fit_group(
    phases: np.ndarray, groups: OpticsGroups, group: int, odd: Sequence[int], even: Sequence[int], within: Range,
    box_px: int,
) -> GroupFit:  # fmt: skip
    """Fit the coefficients of one optics group that are asked for to its sums (P, PHASE_SUMS); the others are held."""
    pixels = half_plane(within.shell_max)
    x, y = frequencies(groups, group, pixels, box_px)
    odds, evens = groups.odd.shape[1], groups.even.shape[1]
    odd_basis, even_basis = aberrations.odd_basis(odds, x, y), aberrations.even_basis(evens, x, y)
    free = np.zeros(odds, dtype=bool), np.zeros(evens, dtype=bool)
    free[0][list(odd)], free[1][list(even)] = True, True
    held = (groups.odd[group] * ~free[0]) @ odd_basis, (groups.even[group] * ~free[1]) @ even_basis
    turned = phase_fit.turned(phases, *held)
    found = phase_fit.fit(
        turned, odd_basis[free[0]], even_basis[free[1]], groups.odd[group][free[0]], groups.even[group][free[1]],
        pixels, within.shell_min,
    )  # fmt: skip
    columns = [groups.odd[group].copy(), groups.even[group].copy(), np.zeros(odds), np.zeros(evens)]
    for column, which, values in zip(columns, free * 2, found[:4], strict=True):
        column[which] = values
    fitted = columns[0] @ odd_basis, columns[1] @ even_basis
    start = pixels.start[within.shell_min]
    counted = phases.copy()
    counted[:start] = 0
    left = phase_fit.left_over(counted, *fitted, pixels, box_px, _SMOOTH_PX)
    shown = phase_fit.picture(np.stack(fitted), pixels, box_px, np.array([-1, 1]))
    return GroupFit(
        PhaseFit(columns[0], columns[1], columns[2], columns[3], found.gain),
        np.stack([shown[0] + left[0], shown[0], shown[1] + left[1], shown[1]]),
    )


def fit_magnification(
    stretch: np.ndarray, particles: np.ndarray, groups: OpticsGroups
) -> tuple[np.ndarray, np.ndarray]:
    """Magnification matrices (G, 2, 2) from the sums of groups (G, STRETCH), and standard errors of their entries.

    By linear least squares on the gradient of the slices (Zivanov, Nakane & Scheres 2020, section 2.4). A turn of the
    frequencies is a turn of all poses, and a stretch that all groups have in common is one of the map: neither can be
    told, and both are fitted and then left out.
    """
    change, error = np.zeros((len(stretch), 2, 2)), np.zeros((len(stretch), 2, 2))
    # From changes (xx, xy, yx, yy) to those along x, along y, and the symmetric shear.
    symmetric = np.array([[1.0, 0, 0, 0], [0, 0, 0, 1], [0, 0.5, 0.5, 0]])
    for index, sums in enumerate(stretch):
        uu, uv, vv = sums[4:7], sums[7:10], sums[10:13]
        full = np.array(
            [
                [uu[0], uu[1], uv[0], uv[1]],
                [uu[1], uu[2], uv[1], uv[2]],
                [uv[0], uv[1], vv[0], vv[1]],
                [uv[1], uv[2], vv[1], vv[2]],
            ]
        )
        if not np.linalg.cond(full) < 1e12:
            continue
        covariance = np.linalg.inv(full)
        x, y, shear = symmetric @ covariance @ sums[:4]
        change[index] = [[x, shear], [shear, y]]
        errors = np.sqrt(np.diag(symmetric @ covariance @ symmetric.T))
        error[index] = [[errors[0], errors[2]], [errors[2], errors[1]]]
    common = np.sum(particles * np.trace(change, axis1=1, axis2=2)) / max(np.sum(particles), 1) / 2
    change -= common * np.eye(2)
    return np.clip(groups.magnification + change, *_bounds()), error


def carried_over(
    defocus_A: np.ndarray, astigmatism_A: np.ndarray, before: np.ndarray, after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Defocus (n,) and astigmatism (n, 2) that make of a new magnification the same CTF in the image.

    The defocus is a quadratic form of the specimen's frequency: (M k)^T D (M k), D = ((z + a, b), (b, z - a)) for a
    mean z and an astigmatism (a, b). before, after: (n, 2, 2), the magnifications M of each particle's group.
    """
    a, b = astigmatism_A.T
    form = np.stack([np.stack([defocus_A + a, b], axis=1), np.stack([b, defocus_A - a], axis=1)], axis=1)
    turn = before @ np.linalg.inv(after)
    form = np.swapaxes(turn, 1, 2) @ form @ turn
    along, across = (form[:, 0, 0] - form[:, 1, 1]) / 2, (form[:, 0, 1] + form[:, 1, 0]) / 2
    return np.trace(form, axis1=1, axis2=2) / 2, np.stack([along, across], axis=1)


def _bounds() -> tuple[np.ndarray, np.ndarray]:
    return np.eye(2) - LARGEST_STRETCH, np.eye(2) + LARGEST_STRETCH
