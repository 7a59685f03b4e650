"""Which 2D classes and which particles look like the molecule that most of them show.

A molecule has the same mass in every view, so that classes of anything else give themselves away by theirs: empty ice
by having none, aggregates by having too much, fragments by too little. Neighbours and wrong centres show at the rim of
the mask. What is typical is the median over particles; it is taken for granted that most of them are good.
"""

from typing import NamedTuple

import numpy as np

# Masses and shares of the rim between which classes are kept, relative to the median class.
_LEAST_MASS, _GREATEST_MASS, _GREATEST_RIM, _LEAST_EVIDENCE = 0.6, 1.6, 0.3, 0.25
# The least particles of a class that an average can be judged by.
_FEWEST = 10
# Particles of good classes are kept within so many standard deviations of the others, on the side that tells of junk.
_OUTLYING = 2.0


class Ranked(NamedTuple):
    """What is said of K classes: rank (K,), 1 for the best and 0 for the worst; reason (K,), why it is not to be kept,
    empty where it is."""

    rank: np.ndarray
    reason: np.ndarray


def rank_classes(
    particles: np.ndarray, resolution_A: np.ndarray, mass: np.ndarray, rim: np.ndarray, log_evidence: np.ndarray
) -> Ranked:
    """Judge classes by figures of each, (K,).

    particles: in the class; resolution_A: by the correlation of its halves; mass: density inside the mask over that
    around it; rim: standard deviation just outside the mask over that inside; log_evidence: mean of its particles.
    """
    typical_mass, typical_evidence = (weighted_quantile(of, particles, 0.5) for of in (mass, log_evidence))
    relative_mass = mass / typical_mass
    relative_evidence = log_evidence / typical_evidence
    finest = resolution_A[particles >= _FEWEST].min(initial=resolution_A.max())
    rank = (
        np.exp(-0.5 * (np.log(np.clip(relative_mass, 1e-3, None)) / 0.3) ** 2)
        * np.clip(1.2 - rim / _GREATEST_RIM, 0, 1)
        * np.clip(relative_evidence, 0, 1) ** 0.5
        * np.clip(finest / resolution_A, 0, 1) ** 0.5
    )
    reason = np.full(len(mass), "", dtype="U64")
    for failed, words in (
        (rim > _GREATEST_RIM, "density at the rim of the mask: a neighbour, or off centre"),
        (relative_evidence < _LEAST_EVIDENCE, "its images are hardly better explained by it than by nothing"),
        (relative_mass > _GREATEST_MASS, "more mass than the others: an aggregate or neighbours"),
        (relative_mass < _LEAST_MASS, "less mass than the others: empty, or a fragment"),
        (particles < _FEWEST, "too few particles to judge by"),
    ):
        reason[failed] = words
    return Ranked(rank, reason)


def weighted_quantile(values: np.ndarray, weights: np.ndarray, part: float) -> float:
    """The value that a part of the weight is below."""
    order = np.argsort(values)
    below = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(below, part * below[-1])])


def judge_particles(
    kept: np.ndarray, class_number: np.ndarray, misfit: np.ndarray, strength: np.ndarray, log_evidence: np.ndarray
) -> np.ndarray:
    """What is wrong with each of n particles, (n,) text, empty where nothing is.

    kept: (n,) bool, whether its class is; class_number: (n,) from 0; misfit: (n,) residual power at low resolution over
    that of the noise; strength: (n,) product of the image with its class at low resolution; log_evidence: (n,). The
    last two are compared with the median of the class.
    """
    found = np.full(len(kept), "", dtype="U64")
    if not kept.any():
        return found
    for values, side, words in (
        (_of_class(log_evidence, class_number), -1, "fits its class less well than the others"),
        (_of_class(strength, class_number), -1, "weaker than the others of its class"),
        (misfit, 1, "power at low resolution that its class does not explain"),
    ):
        logarithm = np.log(np.clip(values, 0.02, None))
        middle = np.median(logarithm[kept])
        deviation = 1.4826 * np.median(np.abs(logarithm[kept] - middle))
        found[kept & (side * (logarithm - middle) > _OUTLYING * max(deviation, 1e-6))] = words
    return found


def _of_class(values: np.ndarray, class_number: np.ndarray) -> np.ndarray:
    medians = np.ones(int(class_number.max(initial=0)) + 1)
    for number in np.unique(class_number[class_number >= 0]):
        medians[number] = max(float(np.median(values[class_number == number])), 1e-9)
    return values / medians[np.maximum(class_number, 0)]
