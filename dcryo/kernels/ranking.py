"""Which 2D classes and which particles look like the molecule that most of them show.

A molecule has the same mass in every view, so that classes of anything else give themselves away by theirs: empty ice
by having none, aggregates by having too much, fragments by too little. Neighbours and wrong centres show at the rim of
the mask. What is typical is the median over particles; it is taken for granted that most of them are good.
"""

from typing import NamedTuple

import numpy as np

# Masses and shares of the rim between which classes are kept, relative to the median class. Wide: particles of a class
# that is nearer to these than others are judged more strictly.
_LEAST_MASS, _GREATEST_MASS, _GREATEST_RIM, _LEAST_EVIDENCE = 0.55, 1.8, 0.36, 0.25
# The least particles of a class that an average can be judged by.
_FEWEST = 10
# Classes better than this are those that others are compared with.
_TYPICAL_RANK = 0.5
# What evidence and distance count for beside the misfit, and what particles that are kept have at most. Chosen on two
# sets of simulated particles with junk; docs/benchmarks-class2d.md has others.
_WEAK, _FAR, _UNLIKE = 2.0, 0.3, 11.0


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
        * np.clip(1.2 * (1 - rim / _GREATEST_RIM), 0, 1)
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


class Judged(NamedTuple):
    """What is said of n particles: unlike (n,), how little each is like the others, from 0; reason (n,), why it is not
    to be kept, empty where it is."""

    unlike: np.ndarray
    reason: np.ndarray


def judge_particles(
    rank: np.ndarray, class_number: np.ndarray, misfit: np.ndarray, log_evidence: np.ndarray, distance_px: np.ndarray
) -> Judged:
    """Judge particles by their class and by themselves, all in one number.

    rank: (K,) of classes; class_number: (n,) from 0; misfit: (n,) residual power at low resolution over that of the
    noise; log_evidence: (n,); distance_px: (n,) from the middle of the image. Each figure, in robust standard
    deviations from the median of the good classes on the side that tells of junk, adds its square, as if it were minus
    twice the logarithm of a probability (naive Bayes); so does the rank of the class, which is a product of such.
    """
    own = rank[class_number]
    typical = own > _TYPICAL_RANK
    if not typical.any():
        typical = own >= own.max(initial=0)
    words = ("hardly explained by its class", "power at low resolution that its class does not explain", "off centre")
    terms = [-2 * np.log(np.maximum(own, 1e-30))]
    for values, side, weight in (
        (_logarithm(log_evidence), -1, _WEAK), (_logarithm(misfit), 1, 1.0), (distance_px, 1, _FAR)
    ):  # fmt: skip
        middle = np.median(values[typical])
        deviation = 1.4826 * np.median(np.abs(values[typical] - middle))
        terms.append(weight * np.clip(side * (values - middle) / max(float(deviation), 1e-6), 0, None) ** 2)
    unlike = np.sum(terms, axis=0)
    most = np.argmax(terms, axis=0)
    reason = np.array(["its class is not like the others", *words])[most]
    return Judged(unlike, np.where(unlike > _UNLIKE, reason, ""))


def _logarithm(values: np.ndarray) -> np.ndarray:
    """The logarithm, but of small and negative numbers that of a fiftieth of the median."""
    return np.log(np.maximum(values, max(0.02 * float(np.median(values)), 1e-6)))
