"""Which poses an iteration looks at: a pyramid of grids, each level half the step and twice the resolution.

The resolution that a level uses is matched to its angular step: turning a particle of diameter D by the step moves its
edge by step * D / 2, and finer detail than that cannot be compared on such a grid. Only poses that still hold part of
the posterior are divided on (adaptive oversampling; Scheres 2012, section 2.5).
"""

import math
from dataclasses import dataclass

import numpy as np

from dcryo.kernels.sampling import order_for_step, step_deg
from dcryo.kernels.shells import resolution_A, shell_at

COARSEST_ORDER = 2
FINEST_ORDER = 8

# The finest step moves the particle's edge by this fraction of the resolution, so that the grid is not what limits it.
_FINEST_STEP = 0.5
# From this order on the poses of the last iteration are trusted and only their surroundings are searched.
_LOCAL_ORDER = 5
_LOCAL_RADIUS_STEPS = 2.5


@dataclass(frozen=True)
class Level:
    """One grid: HEALPix order of the rotations, shells used in scores, step and offset of the shifts in pixels."""

    order: int
    shell: int
    shift_step_px: float
    shift_offset_px: float


@dataclass(frozen=True)
class Search:
    """The poses to look at in one iteration.

    radius_deg: how far from the last pose, or None for everywhere; shift_range_px: how far from the last shift;
    perturbation: (3, 3) rotation of the whole grid; fraction, maximum: which poses are divided on and back-projected;
    temperature: what scores of all levels but the finest are divided by before they are weighed, for the pose that a
    coarse grid lacks may be worth tens of units more than its neighbours on the grid;
    profile_scale: the grey scale of the reference is unknown, see `posterior`.
    """

    levels: tuple[Level, ...]
    shift_range_px: float
    radius_deg: float | None
    perturbation: np.ndarray
    profile_scale: bool = False
    fraction: float = 0.999
    maximum: int = 500
    temperature: float = 3.0

    @property
    def finest(self) -> Level:
        return self.levels[-1]


def plan_search(
    shell: int,
    box_px: int,
    pixel_size_A: float,
    diameter_A: float,
    shift_range_A: float,
    trusted: bool,
    perturbation: np.ndarray,
    profile_scale: bool = False,
) -> Search:
    """The search for an iteration that uses the reference up to a shell.

    diameter_A: of the particle; trusted: whether there are poses from an earlier iteration good enough for a local
    search, which is made once the finest grid is fine enough.
    """
    resolution = resolution_A(max(shell, 1), box_px, pixel_size_A)
    finest_step = math.degrees(_FINEST_STEP * resolution / (diameter_A / 2))
    finest = min(max(order_for_step(finest_step), COARSEST_ORDER + 1), FINEST_ORDER)
    local = trusted and finest >= _LOCAL_ORDER
    first = finest - 1 if local else COARSEST_ORDER

    def level(order: int) -> Level:
        edge_A = math.radians(step_deg(order)) * diameter_A / 2
        matched = shell_at(max(edge_A, resolution), box_px, pixel_size_A)
        step = edge_A / 4 / pixel_size_A
        first_step = step * 2 ** (order - first)
        return Level(order, shell if order == finest or local else matched, step, (first_step - step) / 2)

    levels = tuple(level(order) for order in range(first, finest + 1))
    shift_range = _LOCAL_RADIUS_STEPS * levels[0].shift_step_px if local else shift_range_A / pixel_size_A
    return Search(
        levels=levels,
        shift_range_px=shift_range,
        radius_deg=_LOCAL_RADIUS_STEPS * step_deg(first) if local else None,
        perturbation=perturbation,
        profile_scale=profile_scale,
    )
