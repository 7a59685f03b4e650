"""Whether a refinement fitted noise: images against projections of a map, and what the figures come to in words."""

from dataclasses import dataclass

import numpy as np

from dcryo.kernels import fft, fsc, posterior, slices
from dcryo.kernels.overfitting import ResolutionLine
from dcryo.kernels.shells import half_plane, shell_sums
from dcryo.steps.expectation import Batch

# An FSC between halves of noise of this much, and so many standard deviations, is made by the refinement.
_NOISE_FSC, _SIGMAS = 0.1, 3.0
# Beyond this one, FSC_true is a ratio of two numbers next to nothing.
_HOPELESS_FSC = 0.8
# Below this part of what the FSC promises, particles that a map has never seen do not agree with it.
_UNSEEN_SHARE = 0.5
# Hands are told apart where their correlations with a model differ by this much.
_HAND_MARGIN = 0.05


def ring_correlations(batch: Batch, reference: np.ndarray) -> np.ndarray:
    """How images correlate with projections of a map at their poses, ring by ring: sums over images of the correlation
    and of its square, and their number, (3, D // 2 + 1) float64.

    reference: from `slices.prepare`, up to Nyquist. Of an image X, its CTF C and its slice S it is
    sum Re(conj(C S) X) / sqrt(sum |C S|^2 sum |X|^2); images that are not finite have no part.
    """
    box = batch.images.shape[-1]
    pixels = half_plane(box // 2)
    usable = np.isfinite(batch.images).all(axis=(1, 2)) & np.isfinite(batch.ctf).all(axis=1)
    images, ctf, norm, rotation, origin = (
        column[usable] for column in (batch.images, batch.ctf, batch.norm, batch.rotation, batch.origin_px)
    )
    one = np.ones((len(images), pixels.shell_max + 1), dtype=np.float32)
    data, weight, power = posterior.weigh(fft.rfft2(images), norm, ctf, one, origin, pixels, pixels)
    of_map = slices.extract(reference, rotation, pixels, box)
    cross = shell_sums(of_map.real * data.real + of_map.imag * data.imag, pixels.start)
    squares = shell_sums(weight * (of_map.real**2 + of_map.imag**2), pixels.start) * power * pixels.counts
    found = np.divide(cross, np.sqrt(squares), out=np.zeros_like(cross), where=squares > 0)
    return np.stack([found.sum(axis=0), (found**2).sum(axis=0), np.full(found.shape[1], float(len(found)))])


@dataclass(frozen=True)
class Agreement:
    """How a set of images agrees with a map: mean correlation per ring (S,), its standard error, and their number."""

    mean: np.ndarray
    error: np.ndarray
    images: int


def agreement(sums: np.ndarray) -> Agreement:
    """The mean of `ring_correlations` summed over images, (3, S)."""
    count = np.maximum(sums[2], 2)
    mean = sums[0] / count
    variance = np.maximum(sums[1] / count - mean**2, 0) / (count - 1)
    return Agreement(mean, np.sqrt(variance), int(sums[2].max()))


def checked_shells(curve: np.ndarray, first: int) -> np.ndarray:
    """Shells that a claim is about: from the first that is in doubt to that of the resolution, three at least."""
    last = len(curve) - 1
    end = max(int(fsc.crossing(curve, fsc.GOLD_STANDARD)), first + 2)
    return np.arange(min(first, last), min(end, last) + 1)


@dataclass(frozen=True)
class Verdict:
    """passed: True, False, or None where the test cannot tell; words: what was found, in plain words."""

    passed: bool | None
    words: str


def noise_verdict(
    total: np.ndarray, of_noise: np.ndarray, true: np.ndarray, within: np.ndarray, shell: int, width_A: float
) -> tuple[Verdict, dict[str, float]]:
    """Of a refinement of noise beyond a shell, and what it comes to in figures.

    total, of_noise, true: FSC_t, FSC_n and FSC_true (S,); within: from `significance.independent_within`; width_A: of
    the box. FSC_n counts from two shells past the first random phases.
    """
    some = checked_shells(total, shell + 2)
    weight = np.diff(within, prepend=0)[some]
    mean = float(np.average(of_noise[some], weights=weight))
    error = float(1 / np.sqrt(2 * weight.sum()))
    claimed_A, left_A = (width_A / fsc.crossing(curve, fsc.GOLD_STANDARD) for curve in (total, true))
    figures = {
        "noise_from_A": width_A / shell,
        "fsc_of_noise": mean,
        "fsc_of_noise_error": error,
        "resolution_A": claimed_A,
        "resolution_true_A": left_A,
    }
    found = (
        f"the half maps of images that are noise beyond {width_A / shell:.2f} A have an FSC of {mean:.2f} +- "
        f"{error:.2f} between {width_A / some[0]:.2f} and {width_A / some[-1]:.2f} A."
    )
    left = f"FSC_true falls to {fsc.GOLD_STANDARD:g} at {left_A:.2f} A, the FSC of the run at {claimed_A:.2f} A."
    if width_A / claimed_A < shell + 2:
        words = "The run claims too little beyond that to tell; a coarser --noise-beyond may."
        return Verdict(None, f"{found[0].upper()}{found[1:]} {left} {words}"), figures
    if mean > max(_NOISE_FSC, _SIGMAS * error):
        beyond_use = " FSC_true says nothing where noise correlates like that." if mean > _HOPELESS_FSC else ""
        return Verdict(False, f"Overfitted: {found} {left}{beyond_use}"), figures
    return Verdict(True, f"No overfitting is seen: {found} {left}"), figures


def unseen_verdict(
    seen: Agreement, unseen: Agreement, curve: np.ndarray, shell: int, width_A: float
) -> tuple[Verdict, dict[str, float | int | None]]:
    """Of images that a half map has never seen, and its own, all aligned to it up to the shell before this one.

    The noise of an image is in a map that it made, so that its own correlate with it even where there is no signal: of
    their correlation, at the same poses, SNR / (1 + SNR) is signal, SNR that of the half map, which is its FSC. So much
    the unseen are to reach. The finer half of the shells in doubt counts, in which a map is overfitted first. curve:
    FSC of the half maps (S,).
    """
    some = checked_shells(curve, shell)
    some = some[len(some) // 2 :]

    def over(images: Agreement) -> tuple[float, float]:
        return float(images.mean[some].mean()), float(np.sqrt(np.sum(images.error[some] ** 2)) / len(some))

    (own, own_error), (other, other_error) = over(seen), over(unseen)
    promised = float(np.mean(seen.mean[some] * np.clip(curve[some], 0, 1)))
    gone = np.flatnonzero(unseen.mean[1:] <= _SIGMAS * unseen.error[1:])
    reach = int(gone[0]) if len(gone) else len(curve) - 1
    figures = {
        "aligned_to_A": width_A / max(shell - 1, 1),
        "seen_particles": seen.images,
        "unseen_particles": unseen.images,
        "seen_correlation": own,
        "seen_correlation_error": own_error,
        "unseen_correlation": other,
        "unseen_correlation_error": other_error,
        "promised_correlation": promised,
        "unseen_agree_to_A": width_A / reach if reach else None,
    }
    found = (
        f"Between {width_A / some[0]:.2f} and {width_A / some[-1]:.2f} A particles that a half map has never seen "
        f"correlate with it by {other:.4f} +- {other_error:.4f}, its own by {own:.4f} +- {own_error:.4f}; after the "
        f"FSC it should be {promised:.4f}."
    )
    if other > _SIGMAS * other_error and other > _UNSEEN_SHARE * promised:
        return Verdict(True, f"{found} What the map shows there is in them too."), figures
    if other + _SIGMAS * other_error < _UNSEEN_SHARE * promised:
        return Verdict(False, f"Overfitted: {found} What the map shows there is in its own particles alone."), figures
    return Verdict(None, f"{found} That is too little to tell; it would take more particles."), figures


ONLY_THE_OTHER_HALF = (
    "(They are of the other half, which began from the same reference and may hold some of the same images; --others "
    "and --leave-out ask particles that had no part.)"
)


def bfactor_verdict(line: ResolutionLine, resolution_A: float, nyquist_A: float, refined: bool) -> Verdict:
    """Of the line of particles against resolution, which is a measurement and not a test. resolution_A: of the
    run; refined: each subset was refined anew."""
    points = int(line.used.sum())
    if not np.isfinite(line.bfactor_A2):
        return Verdict(
            None,
            f"There is no line: {points} of the {len(line.used)} numbers of particles have a resolution between the "
            "first shells and Nyquist, or more particles gave no more.",
        )
    error = f" +- {line.error_A2:.0f}" if np.isfinite(line.error_A2) else ""
    twice_A = 1 / np.sqrt(1 / resolution_A**2 + line.slope * np.log(2))
    gain = f"would give {twice_A:.2f} A" if twice_A > nyquist_A else f"would reach Nyquist, {nyquist_A:.2f} A,"
    words = (
        f"B factor {line.bfactor_A2:.0f}{error} A^2 from {points} numbers of particles: twice as many {gain} where "
        f"there are {resolution_A:.2f} A now."
    )
    if not refined:
        words += (
            " The subsets have the poses that all particles found together, which flatters the small ones: "
            "--refine-subsets refines each anew."
        )
    return Verdict(None, words)


CANNOT_TELL = (
    "Projections cannot tell the hand: a map and its mirror image have the same ones. An atomic model, a map of known "
    "hand (give one as --model), or images of the tilted specimen can."
)


def hand_verdict(as_it_is: float, mirrored: float) -> Verdict:
    """Of the correlations of both hands of the map with a model."""
    values = f"the map correlates with the model by {as_it_is:.3f}, its mirror image by {mirrored:.3f}"
    if abs(as_it_is - mirrored) < _HAND_MARGIN:
        return Verdict(None, f"The hand cannot be told at this resolution: {values}.")
    if as_it_is > mirrored:
        return Verdict(True, f"The map has the hand of the model: {values}.")
    return Verdict(False, f"The map has the other hand than the model: {values}.")
