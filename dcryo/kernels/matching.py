"""Picks against particles that are known: which are right, and how precision and recall go with the threshold."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree


class Curve(NamedTuple):
    """Over picks from the best on, (n,) float64 each: the score of the last one taken, and precision and recall."""

    threshold: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    @property
    def f1(self) -> NDArray[np.float64]:
        """Harmonic mean of precision and recall, 0 where both are."""
        total = self.precision + self.recall
        return 2.0 * self.precision * self.recall / np.where(total > 0, total, 1.0)


def matched(picks_px: NDArray[np.floating], labels_px: NDArray[np.floating], within_px: float) -> NDArray[np.bool_]:
    """Which picks (n, 2), best first, are particles that labels (m, 2) name, each label once -> (n,) bool.

    As many as can be are paired within the distance, and the best n' of the picks have as many pairs as they can have
    by themselves, for any n': a pick is taken in turn where an augmenting path gives it a label and leaves those before
    it theirs (H. W. Kuhn, Naval Res. Logist. Q. 2, 83, 1955).
    """
    found = np.zeros(len(picks_px), dtype=bool)
    if len(picks_px) == 0 or len(labels_px) == 0:
        return found
    near = cKDTree(labels_px).query_ball_point(picks_px, within_px, return_sorted=True)
    holder = np.full(len(labels_px), -1)
    for pick in range(len(picks_px)):
        found[pick] = _augmented(pick, near, holder)
    return found


def _augmented(pick: int, near: NDArray[np.object_], holder: NDArray[np.intp]) -> bool:
    """Give a pick a label, moving others if need be; breadth first."""
    came_from: dict[int, int] = {}  # label -> the pick that asks for it
    queue = [pick]
    for asking in queue:
        for label in near[asking]:
            if label in came_from:
                continue
            came_from[label] = asking
            if holder[label] < 0:
                while True:
                    asking = came_from[label]
                    given_up = np.flatnonzero(holder == asking)
                    holder[label] = asking
                    if asking == pick:
                        return True
                    label = int(given_up[0])
            queue.append(int(holder[label]))
    return False


def curve(scores: NDArray[np.floating], right: NDArray[np.bool_], labels: int) -> Curve:
    """Precision and recall over thresholds. scores, right: (n,) of picks in any order; labels: number of all there are.

    Picks of the same score are taken together.
    """
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    values = np.asarray(scores, dtype=np.float64)[order]
    hits = np.cumsum(right[order])
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True)) if len(values) else np.zeros(0, np.intp)
    return Curve(values[last], hits[last] / (last + 1.0), hits[last] / max(labels, 1))
