"""Estimates of many alike that share what the data say about their spread (empirical Bayes).

A weak particle's own defocus, or a sparse micrograph's astigmatism, is drawn towards what its neighbours share, the
more the less its images say. How far the true values spread is not given but is itself what makes the data most likely.
"""

from typing import NamedTuple

import numpy as np

# Spreads that are tried, A.
_SPREADS_A = np.geomspace(10.0, 1280.0, 15)
# A likelihood that is as good as none, above what floating point can hold.
_LEAST = 1e-290
_ROUNDS = 200
_CONVERGED = 1e-6


class Settled(NamedTuple):
    """Positions on curves: of each of n particles, their standard errors (0 where the curve has no maximum inside), and
    those of the M groups' means; and the spread of the particles about their group's mean."""

    offset: np.ndarray
    error: np.ndarray
    mean: np.ndarray
    spread: float


def settle(curves: np.ndarray, group: np.ndarray, step: float) -> Settled:
    """Positions of the maxima of log-likelihood curves under a normal prior about the mean of each group.

    curves: (n, T) float32, evenly spaced by `step`, all of a group over the same positions, from 0 on; group: (n,) int.
    The means and the one spread of the prior maximise the likelihood with the particles' positions integrated out.
    """
    order = np.argsort(group, kind="stable")
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    likelihood = np.exp((curves - curves.max(axis=1, keepdims=True))[order].astype(np.float64))
    apart = step * (np.arange(curves.shape[1])[:, None] - np.arange(curves.shape[1]))
    best, spread, means = -np.inf, 0.0, np.zeros(len(first))
    for tried in _SPREADS_A[step / 4 < _SPREADS_A]:
        prior = np.exp(-0.5 * (apart / tried) ** 2)
        marginal = np.log(np.maximum(likelihood @ (prior / prior.sum(axis=1).max()), _LEAST))
        of_group = np.add.reduceat(marginal, first, axis=0)
        place, peak = _peaks(of_group)
        if peak.sum() > best:
            best, spread, means = float(peak.sum()), float(tried), place * step
    mean = np.zeros(int(group.max()) + 1)
    mean[group[order][first]] = means
    positions = step * np.arange(curves.shape[1])
    penalised = curves - 0.5 * ((positions - mean[group][:, None]) / spread) ** 2
    place, _ = _peaks(penalised)
    return Settled(step * place, step * _errors(penalised), mean, spread)


def shared(curves: np.ndarray, group: np.ndarray, step: float) -> Settled:
    """The same with one position for all of a group, over curves that each begin at the particle's own."""
    totals = np.zeros((int(group.max()) + 1, curves.shape[1]))
    np.add.at(totals, group, curves.astype(np.float64))
    place, error = _peaks(totals)[0] * step, _errors(totals) * step
    return Settled(place[group], error[group], place, 0.0)


def _peaks(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places and heights of the highest points of curves (n, T), by a parabola through it and its neighbours."""
    n, length = curves.shape
    top = np.argmax(curves, axis=1)
    inner = np.clip(top, 1, length - 2)
    rows = np.arange(n)
    below, at, above = (curves[rows, inner + k].astype(np.float64) for k in (-1, 0, 1))
    bend = below - 2 * at + above
    curved = (bend < 0) & (inner == top)
    shift = np.divide(below - above, 2 * bend, out=np.zeros(n), where=curved)
    height = np.where(curved, at - 0.25 * (below - above) * shift, curves[rows, top])
    return np.where(curved, inner + shift, top), height


def _errors(curves: np.ndarray) -> np.ndarray:
    """Standard errors, in steps, of the places of the highest points of log-likelihood curves."""
    inner = np.clip(np.argmax(curves, axis=1), 1, curves.shape[1] - 2)
    rows = np.arange(len(curves))
    bend = curves[rows, inner - 1] - 2.0 * curves[rows, inner] + curves[rows, inner + 1]
    return np.sqrt(np.divide(-1, bend, out=np.zeros(len(curves)), where=bend < 0))


def shrunk(
    gradient: np.ndarray, matrix: np.ndarray, before: np.ndarray, kinds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Changes of M groups' K parameters from their normal equations, and the spread (K,) of the true ones.

    gradient: (M, K), at the values now; matrix: (M, K, K), of Gauss and Newton; before: (M, K), how far the values now
    are from those to shrink to; kinds: (K,) int, parameters of one kind have one spread. Spreads are found by
    expectation maximisation (Dempster, Laird & Rubin 1977). Returns changes (M, K) of the values now.
    """
    count = np.bincount(kinds).astype(np.float64)
    size = np.sqrt(np.bincount(kinds, weights=np.einsum("mkk->k", matrix)) / count / max(len(matrix), 1))[kinds]
    size = np.where(size > 0, size, 1)
    scaled, right = matrix / size / size[:, None], gradient / size
    kept = before * size
    variance = np.full(len(count), 1e4)
    for _ in range(_ROUNDS):
        precision = scaled + np.diag(1 / variance[kinds])
        covariance = np.linalg.inv(precision)
        moved = np.einsum("mjk,mk->mj", covariance, right - kept / variance[kinds])
        squares = (moved + kept) ** 2 + np.einsum("mkk->mk", covariance)
        new = np.maximum(np.bincount(kinds, weights=squares.mean(axis=0)) / count, 1e-9)
        done = np.all(np.abs(new - variance) <= _CONVERGED * variance)
        variance = new
        if done:
            break
    return moved / size, np.sqrt(variance[kinds]) / size
