"""Modes of the posterior over poses, climbed by derivatives, and the Gaussians around them.

Steps are those of Gauss and Newton, damped as by Levenberg (1944) and Marquardt (1963), their curvature corrected by
what gradients say of it on the way. A component of the posterior is a mode with the Gaussian that its Hessian makes
(Laplace's approximation), within a Gaussian window: the windows of a grid of rotations add up to one, so that the
components that are climbed from its points share the posterior among them and count none of it twice.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from dcryo.euler import matrix_from_rotvec
from dcryo.kernels.derivatives import PARAMETERS, View, evaluate, quadratic, work_space

# A pose is looked at so many times on its way to a mode, at most.
_EVALUATIONS = 12
_FIRST_DAMPING = 1e-3
# A step that promises less than this of log-likelihood is the last one.
_SMALL_GAIN = 0.02
_LONGEST_TURN = 0.35
# Curvature along a step that falls below this part of what it was thought to be is not believed.
_LEAST_BEND = 0.05
# Modes nearer than this many standard deviations of either are one.
_SAME = 0.5
# A component that blurs a slice by no more than this at its rim (Fourier pixels) is one point.
_NARROW_PX = 0.25

# Corners (4) of the regular simplex of unit covariance in the first 0 to 3 of three dimensions.
_SIMPLEX = np.array(
    [
        [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[1, 0, 0], [-1, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[2**0.5, 0, 0], [-(0.5**0.5), 1.5**0.5, 0], [-(0.5**0.5), -(1.5**0.5), 0], [0, 0, 0]],
        [[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]],
    ],
    dtype=np.float64,
)


class Components(NamedTuple):
    """The posteriors of n images as Gaussians around K modes in all, those of image i at start[i]:start[i + 1].

    start: (n + 1,) int64; rotation: (K, 3, 3); shift: (K, 2) px, from the last origin; centre: (K, 3, 3), the middle of
    each one's window, that of shifts being the last origin; anchor: (K, 3, 3) and anchor_shift: (K, 2), about which the
    prior is, if there is one; score: (K,) log-likelihood of the mode over that of an empty image; log_weight: (K,) log
    of the posterior mass, up to a constant of the image; hessian: (K, 5, 5) of minus the log-posterior, window
    included; reference: (K,) which of several references each is a pose of.
    """

    start: np.ndarray
    rotation: np.ndarray
    shift: np.ndarray
    centre: np.ndarray
    anchor: np.ndarray
    anchor_shift: np.ndarray
    score: np.ndarray
    log_weight: np.ndarray
    hessian: np.ndarray
    reference: np.ndarray


class Points(NamedTuple):
    """Weighted points that stand for the posteriors of n images, those of image i at start[i]:start[i + 1].

    start: (n + 1,) int64; rotation: (Q, 3, 3); shift: (Q, 2) px; spread_px2: (Q,) variance of the shift about it
    along x or y, their mean; probability: (Q,), which sum to one for each image.
    """

    start: np.ndarray
    rotation: np.ndarray
    shift: np.ndarray
    spread_px2: np.ndarray
    probability: np.ndarray


class Window(NamedTuple):
    """Where a pose may go from its start: standard deviations of a Gaussian window of rotation vectors and of shifts,
    and the hold that the reference has on it there, (6,), see `hold.hold`; and those of a Gaussian prior about its
    anchor, without limit where there is none."""

    turn_rad: float
    shift_px: float
    hold: np.ndarray
    anchored_rad: float = np.inf
    anchored_px: float = np.inf


def started(
    rotations: np.ndarray,
    shifts_px: np.ndarray,
    start: np.ndarray,
    anchors: np.ndarray | None = None,
    anchor_shifts_px: np.ndarray | None = None,
    reference: np.ndarray | None = None,
) -> Components:
    """Components that have not climbed yet, each in the middle of its window.

    rotations: (K, 3, 3); shifts_px: (K, 2); start: (n + 1,); anchors: (K, 3, 3) and anchor_shifts_px: (K, 2), by
    default where they start; reference: (K,), or None where there is but one.
    """
    count = len(rotations)
    return Components(
        np.asarray(start, dtype=np.int64),
        np.array(rotations, dtype=np.float64),
        np.array(shifts_px, dtype=np.float64),
        np.array(rotations, dtype=np.float64),
        np.array(rotations if anchors is None else anchors, dtype=np.float64),
        np.array(shifts_px if anchor_shifts_px is None else anchor_shifts_px, dtype=np.float64),
        np.zeros(count),
        np.zeros(count),
        np.zeros((count, PARAMETERS, PARAMETERS)),
        np.zeros(count, dtype=np.int64) if reference is None else np.array(reference, dtype=np.int64),
    )


def climb(
    components: Components,
    view: View,
    images: np.ndarray,
    weights: np.ndarray,
    window: Window,
    profile_scale: bool,
    reference: int = 0,
    belonging: np.ndarray | None = None,
) -> Components:
    """Components of one reference moved to the nearest modes of the posterior at the resolution of its view; those of
    others stay.

    images: (n, >= P) complex64, Y at the last origins; weights: (n, >= P) float32, W; belonging: (n,) which part of
    each image is in the reference and holds on to it, all of it where not given. Scores of an image that is not finite
    are not finite.
    """
    climbed = Components(*(column.copy() for column in components))
    part = np.ones(len(images)) if belonging is None else np.asarray(belonging, dtype=np.float64)
    _climb_all(climbed, view, images, weights, window, profile_scale, reference, part)
    return climbed


def settled(
    components: Components, operators: np.ndarray, temperature: float, fraction: float, maximum: int
) -> tuple[Components, np.ndarray]:
    """The distinct modes of each image that hold a fraction of its posterior, best first, and their probabilities.

    Modes of a reference that are one mode, symmetry mates among them, are made one, their masses added. Log-weights are
    divided by the temperature before they are weighed. At most `maximum` are kept of an image, and none of an image
    whose scores are not finite.

    operators: (G, 3, 3) of the point group, identity included.
    """
    rows, start, probability, log_weight = _settle(
        components.start, components.rotation, components.shift, components.log_weight, components.hessian,
        components.reference, np.ascontiguousarray(operators, dtype=np.float64), temperature, fraction, maximum,
    )  # fmt: skip
    kept = Components(start, *(column[rows] for column in components[1:]))
    return kept._replace(log_weight=log_weight), probability


def cubature(components: Components, probability: np.ndarray, radius_px: float) -> Points:
    """Points with the means and covariances of the components.

    Where a component is so wide along m axes that it blurs the slice at `radius_px` (Fourier pixels), it is split into
    the m + 1 corners of the regular simplex of its covariance along them (Stroud 1971, U_n 2-1). Shifts are Gaussian
    about each point, with the mean that goes with its rotation.
    """
    turn_turn, turn_shift = components.hessian[:, :3, :3], components.hessian[:, :3, 3:]
    spread = np.linalg.inv(components.hessian[:, 3:, 3:])
    # The Hessian of the rotation alone, the shift integrated out; the widest axes come first.
    curvature, axes = np.linalg.eigh(turn_turn - turn_shift @ spread @ np.swapaxes(turn_shift, 1, 2))
    sigma = 1 / np.sqrt(curvature)
    split = np.count_nonzero(sigma * radius_px > _NARROW_PX, axis=1)
    owner, corner = np.nonzero(np.arange(4) <= split[:, None])
    turn = np.einsum("qab,qb->qa", axes[owner], sigma[owner] * _SIMPLEX[split[owner], corner])
    first = np.concatenate([[0], np.cumsum(split + 1)])
    shift = components.shift[owner] - np.einsum("qab,qcb,qc->qa", spread[owner], turn_shift[owner], turn)
    return Points(
        first[components.start],
        matrix_from_rotvec(turn) @ components.rotation[owner],
        shift,
        np.trace(spread, axis1=1, axis2=2)[owner] / 2,
        (probability / (split + 1))[owner],
    )


def angular_sd_rad(components: Components) -> np.ndarray:
    """Standard deviation of each component's rotation, root mean square over directions, (K,) in rad."""
    covariance = np.linalg.inv(components.hessian)[:, :3, :3]
    return np.sqrt(np.trace(covariance, axis1=1, axis2=2) / 3)


@njit(nogil=True, cache=True, error_model="numpy")
def _factor(matrix, lower):  # type: ignore[no-untyped-def]
    """Cholesky factor of a positive 5 x 5 matrix; returns the log of its determinant."""
    log_det = 0.0
    for i in range(PARAMETERS):
        for j in range(i + 1):
            rest = matrix[i, j]
            for k in range(j):
                rest -= lower[i, k] * lower[j, k]
            if i == j:
                rest = max(rest, 1e-12 * matrix[i, i] + 1e-300)
                lower[i, i] = np.sqrt(rest)
                log_det += np.log(rest)
            else:
                lower[i, j] = rest / lower[j, j]
    return log_det


@njit(nogil=True, cache=True, error_model="numpy")
def _substitute(lower, right, out):  # type: ignore[no-untyped-def]
    """Solve L L^T out = right."""
    for i in range(PARAMETERS):
        rest = right[i]
        for k in range(i):
            rest -= lower[i, k] * out[k]
        out[i] = rest / lower[i, i]
    for i in range(PARAMETERS - 1, -1, -1):
        rest = out[i]
        for k in range(i + 1, PARAMETERS):
            rest -= lower[k, i] * out[k]
        out[i] = rest / lower[i, i]


@njit(nogil=True, cache=True, error_model="numpy")
def _learn(curvature, step, before, after, work):  # type: ignore[no-untyped-def]
    """Update the curvature with what gradients before and after a step say of it (Broyden, Fletcher, Goldfarb, Shanno).

    Gauss-Newton's leaves out noise times the curvature of the slice, which is no less on noisy images.
    """
    change = bend = 0.0
    for i in range(PARAMETERS):
        work[i] = 0.0
        for j in range(PARAMETERS):
            work[i] += curvature[i, j] * step[j]
        bend += step[i] * work[i]
        change += step[i] * (before[i] - after[i])
    if change > _LEAST_BEND * bend:
        for i in range(PARAMETERS):
            for j in range(PARAMETERS):
                curvature[i, j] += (before[i] - after[i]) * (before[j] - after[j]) / change - work[i] * work[j] / bend


@njit(nogil=True, cache=True, error_model="numpy")
def _turned(rotation, vector, out):  # type: ignore[no-untyped-def]
    """out = exp([vector]x) rotation (Rodrigues)."""
    x, y, z = vector[0], vector[1], vector[2]
    square = x * x + y * y + z * z
    angle = np.sqrt(square)
    if angle < 1e-6:
        s, c = 1.0, 0.5
    else:
        s, c = np.sin(angle) / angle, (1 - np.cos(angle)) / square
    for j in range(3):
        a, b, d = rotation[0, j], rotation[1, j], rotation[2, j]
        along = x * a + y * b + z * d
        cosine = 1 - c * square
        out[0, j] = cosine * a + s * (y * d - z * b) + c * along * x
        out[1, j] = cosine * b + s * (z * a - x * d) + c * along * y
        out[2, j] = cosine * d + s * (x * b - y * a) + c * along * z


@njit(nogil=True, cache=True, error_model="numpy")
def _turn_between(first, second, out):  # type: ignore[no-untyped-def]
    """Rotation vector that takes `second` to `first`: log(first second^T); of half a turn, one of the two."""
    trace = 0.0
    for i in range(3):
        for k in range(3):
            trace += first[i, k] * second[i, k]
    for i in range(3):
        j, l = (i + 1) % 3, (i + 2) % 3  # noqa: E741
        entry = 0.0
        for k in range(3):
            entry += first[l, k] * second[j, k] - first[j, k] * second[l, k]
        out[i] = entry / 2
    sine = np.sqrt(out[0] ** 2 + out[1] ** 2 + out[2] ** 2)
    if sine < 1e-9 and trace < 0:
        # The turn is 2 a a^T - 1 about its axis a: any column but a zero one, plus the unit vector, lies along it.
        longest = 0.0
        for j in range(3):
            column = np.zeros(3)
            column[j] = 1.0
            for i in range(3):
                for k in range(3):
                    column[i] += first[i, k] * second[j, k]
            length = np.sqrt(column[0] ** 2 + column[1] ** 2 + column[2] ** 2)
            if length > longest:
                longest = length
                out[:3] = np.pi * column / length
        return
    angle = np.arctan2(sine, (trace - 1) / 2)
    factor = 1.0 if sine < 1e-9 else angle / sine
    for i in range(3):
        out[i] *= factor


@njit(nogil=True, cache=True, error_model="numpy")
def _climb_all(components, view, images, weights, window, profile, reference, belonging):  # type: ignore[no-untyped-def]
    work, away = work_space(view.shell_max), np.empty(PARAMETERS)
    prior = np.empty(PARAMETERS)
    prior[:3] = 1 / window.turn_rad**2
    prior[3:] = 1 / window.shift_px**2
    log_prior = 0.5 * np.sum(np.log(prior))
    anchoring = np.empty(PARAMETERS)
    anchoring[:3] = 1 / window.anchored_rad**2
    anchoring[3:] = 1 / window.anchored_px**2
    lower = np.zeros((PARAMETERS, PARAMETERS))
    for i in range(len(images)):
        hold = window.hold * belonging[i]
        for n in range(components.start[i], components.start[i + 1]):
            if components.reference[n] != reference:
                continue
            value, score = _climb_one(
                components.rotation[n], components.shift[n], components.hessian[n], components.centre[n],
                components.anchor[n], components.anchor_shift[n], view, images[i], weights[i], prior, anchoring,
                hold, profile, work, away,
            )  # fmt: skip
            components.score[n] = score
            # Laplace: the integral over window times likelihood around the mode.
            components.log_weight[n] = value + log_prior - 0.5 * _factor(components.hessian[n], lower)


@njit(nogil=True, cache=True, error_model="numpy")
def _climb_one(  # type: ignore[no-untyped-def]
    rotation, shift, hessian, centre, anchor, anchor_shift, view, image, weights, prior, anchoring, hold, profile, work,
    away,
):  # fmt: skip
    """Move a pose to the mode nearest to it, in place, and write the Hessian there. Returns the log-posterior and the
    score.

    prior: (5,) precision of the window around the centre; anchoring: (5,) that of the prior around the anchor; hold: as
    in `Window`.
    """
    gradient, trial_gradient = np.empty(PARAMETERS), np.empty(PARAMETERS)
    trial_hessian, curvature = np.empty((PARAMETERS, PARAMETERS)), np.empty((PARAMETERS, PARAMETERS))
    damped, lower = np.empty((PARAMETERS, PARAMETERS)), np.zeros((PARAMETERS, PARAMETERS))
    step = np.empty(PARAMETERS)
    trial_rotation, trial_shift = rotation.copy(), shift.copy()
    best, score = -np.inf, 0.0
    damping = _FIRST_DAMPING
    for evaluation in range(_EVALUATIONS):
        evaluate(view, trial_rotation, trial_shift, image, weights, work)
        trial_score = quadratic(work.sums, profile, trial_gradient, trial_hessian)
        _turn_between(trial_rotation, centre, away)
        away[3:] = trial_shift
        value = trial_score + _add_hold(away, hold, trial_gradient)
        value += _add_gaussian(away, prior, trial_gradient, trial_hessian)
        if np.any(anchoring > 0):
            _turn_between(trial_rotation, anchor, away)
            away[3:] = trial_shift - anchor_shift
            value += _add_gaussian(away, anchoring, trial_gradient, trial_hessian)
        if evaluation == 0:
            curvature[:] = trial_hessian
            for j in range(PARAMETERS):
                # Its own noise, half of whose hold is left, bends the score too.
                curvature[j, j] += hold[j]
        else:
            _learn(curvature, step, gradient, trial_gradient, away)
        if value > best or evaluation == 0:
            damping *= 0.2
            best, score = value, trial_score
            rotation[:] = trial_rotation
            shift[:] = trial_shift
            gradient[:] = trial_gradient
            hessian[:] = trial_hessian
        else:
            damping = max(10 * damping, 0.05)
        damped[:] = curvature
        for j in range(PARAMETERS):
            damped[j, j] *= 1 + damping
        _factor(damped, lower)
        _substitute(lower, gradient, step)
        gain = 0.0
        for j in range(PARAMETERS):
            gain += 0.5 * step[j] * gradient[j]
        turn = np.sqrt(step[0] ** 2 + step[1] ** 2 + step[2] ** 2)
        if turn > _LONGEST_TURN:
            step *= _LONGEST_TURN / turn
        _turned(rotation, step, trial_rotation)
        trial_shift[0] = shift[0] + step[3]
        trial_shift[1] = shift[1] + step[4]
        if not gain > _SMALL_GAIN:
            # So near to the mode the quadratic form is as good as another look.
            rotation[:] = trial_rotation
            shift[:] = trial_shift
            return best + gain, score + gain
    return best, score


@njit(nogil=True, cache=True, error_model="numpy")
def _add_hold(away, hold, gradient):  # type: ignore[no-untyped-def]
    """What is taken off the score for the hold at a pose so far away from the centre; its gradient is added."""
    if not hold[PARAMETERS] > 0:
        return 0.0
    far = 0.0
    for j in range(PARAMETERS):
        far += hold[j] * away[j] ** 2
    share = np.exp(-0.5 * far / hold[PARAMETERS])
    for j in range(PARAMETERS):
        gradient[j] += hold[j] * away[j] * share
    return -hold[PARAMETERS] * share


@njit(nogil=True, cache=True, error_model="numpy")
def _add_gaussian(away, precision, gradient, hessian):  # type: ignore[no-untyped-def]
    """Log of a Gaussian, its height but for one, at a pose so far away from its centre; its derivatives are added."""
    value = 0.0
    for j in range(PARAMETERS):
        value -= 0.5 * precision[j] * away[j] ** 2
        gradient[j] -= precision[j] * away[j]
        hessian[j, j] += precision[j]
    return value


@njit(nogil=True, cache=True, error_model="numpy")
def _settle(  # type: ignore[no-untyped-def]
    start, rotations, shifts, log_weights, hessians, references, operators, temperature, fraction, maximum
):
    """Rows kept, where each image's start, their probabilities and their log-weights with those of their doubles."""
    rows, starts = np.empty(len(log_weights), dtype=np.int64), np.zeros(len(start), dtype=np.int64)
    probability, masses = np.empty(len(log_weights)), np.empty(len(log_weights))
    away, mate = np.empty(PARAMETERS), np.empty((3, 3))
    kept = 0
    for i in range(len(start) - 1):
        first = kept
        own = log_weights[start[i] : start[i + 1]]
        for row in start[i] + np.argsort(-own, kind="mergesort"):
            if not np.isfinite(log_weights[row]):
                continue
            double = -1
            for n in range(first, kept):
                other = rows[n]
                if references[other] != references[row]:
                    continue
                for g in range(len(operators)):
                    mate[:] = rotations[other] @ operators[g]
                    _turn_between(rotations[row], mate, away)
                    away[3:] = shifts[row] - shifts[other]
                    square = 0.0
                    for j in range(PARAMETERS):
                        for k in range(PARAMETERS):
                            square += away[j] * hessians[other, j, k] * away[k]
                    if square < _SAME**2:
                        double = n
                        break
                if double >= 0:
                    break
            if double < 0:
                rows[kept] = row
                masses[kept] = log_weights[row]
                kept += 1
            else:
                most = max(log_weights[row], masses[double])
                masses[double] = most + np.log(np.exp(log_weights[row] - most) + np.exp(masses[double] - most))
        if kept > first:
            order = first + np.argsort(-masses[first:kept], kind="mergesort")
            rows[first:kept], masses[first:kept] = rows[order], masses[order]
            share = np.exp((masses[first:kept] - masses[first]) / temperature)
            held = np.cumsum(share)
            enough = min(np.searchsorted(held, fraction * held[-1]) + 1, maximum, len(share))
            probability[first : first + enough] = share[:enough] / held[enough - 1]
            kept = first + enough
        starts[i + 1] = kept
    return rows[:kept], starts, probability[:kept], masses[:kept]
