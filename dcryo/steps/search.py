"""Which poses an iteration looks at.

Either everywhere: a grid of rotations and shifts is scored at low resolution, and from its best points poses climb to
the modes of the posterior, at twice the resolution in each level. Or, once poses are good, from the last ones alone.
The resolution of the grid is matched to its step: turning a particle of diameter D by the step moves its edge by
step * D / 2, and finer detail than that cannot be compared on such a grid.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from dcryo.kernels.hold import hold
from dcryo.kernels.modes import Window
from dcryo.kernels.sampling import order_for_step, step_deg
from dcryo.kernels.shells import resolution_A, shell_at

COARSEST_ORDER, FINEST_ORDER = 2, 4

# The step of the grid moves the particle's edge by no more than this, so that first references suffice for it.
_GRID_EDGE_A = 40.0
# Shifts of the grid move by this part of what the step of rotations moves the edge by.
_SHIFT_STEP = 1 / 3
_GRID_WINDOW = 0.6
# Once the resolution is this part of the particle's radius, only the surroundings of the last poses are searched.
_LOCAL_RESOLUTION = 1 / 8
# Poses found at a resolution that is coarser by no more than this factor need no level between.
_NEARLY = 1.2
# So much of the hold that a reference has on the poses that made it is taken off (docs/decisions/006).
_HOLD = 0.5

# A pose that is not searched for is one whose window is as narrow as this (rad and px).
_FIXED = 1e-6

NO_SYMMETRY = np.eye(3)[None]


@dataclass(frozen=True)
class Search:
    """The poses to look at in one iteration.

    grid_order: HEALPix order of the grid that looks everywhere, None where only the last poses are climbed from;
    shells: resolution of each level, coarse to fine, the first that of the grid; shift_range_px, shift_step_px: shifts
    of the grid, from the last; windows: for each level and reference, where a pose may go from its start, and what
    holds it there; perturbation: (3, 3) rotation of the whole grid; operators: (G, 3, 3) of the symmetry;
    profile_scale: the grey scale of the reference is unknown, see `posterior`; fraction, maximum: which components go
    on to the next level; temperature: what log-weights of all levels but the last are divided by before that, for they
    do not yet know all that the image says; mates: (M, 3, 3), identity first, operators that the map may lack: a search
    around the last pose is one around its mates too; last_temperature: the same of the last level, above 1 while mates
    are not to be told apart yet.
    """

    grid_order: int | None
    shells: tuple[int, ...]
    shift_range_px: float
    shift_step_px: float
    windows: tuple[tuple[Window, ...], ...]
    perturbation: np.ndarray
    operators: np.ndarray = field(default_factory=lambda: NO_SYMMETRY)
    profile_scale: bool = False
    fraction: float = 0.999
    maximum: int = 32
    temperature: float = 3.0
    mates: np.ndarray = field(default_factory=lambda: NO_SYMMETRY)
    last_temperature: float = 1.0


def plan_search(
    shell: int,
    box_px: int,
    pixel_size_A: float,
    diameter_A: float,
    shift_range_A: float,
    posed_shell: int,
    shares: np.ndarray,
    perturbation: np.ndarray,
    operators: np.ndarray = NO_SYMMETRY,
    profile_scale: bool = False,
) -> Search:
    """The search for an iteration that uses the reference up to a shell.

    diameter_A: of the particle; posed_shell: resolution at which the last poses were found, 0 where there are none;
    they are trusted once the resolution is fine enough; shares: (K, > shell) of an image in each reference
    (`hold.shares`).
    """
    radius_A = diameter_A / 2
    resolution = resolution_A(max(shell, 1), box_px, pixel_size_A)
    if posed_shell > 0 and resolution <= _LOCAL_RESOLUTION * radius_A:
        levels = (shell,) if shell <= _NEARLY * posed_shell else _doubling(max(posed_shell, shell // 2, 1), shell)
        windows = _around_last(levels, box_px, pixel_size_A, radius_A, shares)
        return Search(None, levels, 0.0, 0.0, windows, perturbation, operators, profile_scale)
    order = min(max(order_for_step(math.degrees(_GRID_EDGE_A / radius_A)), COARSEST_ORDER), FINEST_ORDER)
    edge_A = math.radians(step_deg(order)) * radius_A
    matched = max(min(shell_at(edge_A, box_px, pixel_size_A), shell), 1)
    levels = _doubling(matched, shell)
    # Windows of this part of the step add up to one to two percent, but at the poles of the grid.
    window = Window(_GRID_WINDOW * math.radians(step_deg(order)), shift_range_A / pixel_size_A, np.zeros(6))
    return Search(
        grid_order=order,
        shells=levels,
        shift_range_px=shift_range_A / pixel_size_A,
        shift_step_px=_SHIFT_STEP * edge_A / pixel_size_A,
        windows=((window,) * len(shares),) * len(levels),
        perturbation=perturbation,
        operators=operators,
        profile_scale=profile_scale,
    )


def stay(shell: int, box_px: int, radius_px: float, shares: np.ndarray, operators: np.ndarray) -> Search:
    """The search that leaves poses where they are, and only says how well each reference fits up to a shell.

    shares: (K, > shell) of an image in each reference (`hold.shares`).
    """
    held = [_HOLD * hold(of[: shell + 1], radius_px, box_px) for of in shares]
    windows = tuple(Window(_FIXED, _FIXED, force) for force in held)
    return Search(None, (shell,), 0.0, 0.0, (windows,), np.eye(3), operators)


@dataclass(frozen=True)
class Surroundings:
    """How far a local search looks. turn_sd_deg, shift_sd_A: of a Gaussian prior about the poses that particles came
    with, without limit where there is none; mates: see `Search`."""

    turn_sd_deg: float = math.inf
    shift_sd_A: float = math.inf
    mates: np.ndarray = field(default_factory=lambda: NO_SYMMETRY)

    def known_shell(self, box_px: int, pixel_size_A: float, diameter_A: float) -> int:
        """Up to which shell poses with these errors are known: what the edge of the particle moves by. At least 1, and
        the last where there is no prior."""
        off_A = max(math.radians(self.turn_sd_deg) * diameter_A / 2, self.shift_sd_A)
        return max(shell_at(off_A, box_px, pixel_size_A), 1) if math.isfinite(off_A) else box_px // 2


def plan_local(
    shell: int,
    box_px: int,
    pixel_size_A: float,
    diameter_A: float,
    posed_shell: int,
    shares: np.ndarray,
    surroundings: Surroundings,
    operators: np.ndarray = NO_SYMMETRY,
    profile_scale: bool = False,
    last_temperature: float = 1.0,
) -> Search:
    """The search of an iteration that looks around the last poses only, whatever the resolution; see `plan_search`.

    posed_shell: resolution that the last poses are good to, at least 1.
    """
    levels = (shell,) if shell <= _NEARLY * posed_shell else _doubling(posed_shell, shell)
    anchored = math.radians(surroundings.turn_sd_deg), surroundings.shift_sd_A / pixel_size_A
    windows = tuple(
        tuple(window._replace(anchored_rad=anchored[0], anchored_px=anchored[1]) for window in of_level)
        for of_level in _around_last(levels, box_px, pixel_size_A, diameter_A / 2, shares)
    )
    return Search(
        None, levels, 0.0, 0.0, windows, np.eye(3), operators, profile_scale,
        maximum=max(32, len(surroundings.mates)),
        mates=surroundings.mates,
        last_temperature=last_temperature,
    )  # fmt: skip


def _around_last(
    levels: tuple[int, ...], box_px: int, pixel_size_A: float, radius_A: float, shares: np.ndarray
) -> tuple[tuple[Window, ...], ...]:
    """Windows about the last poses, of each level and reference: as far as the first level can tell poses apart."""
    reach_A = resolution_A(levels[0], box_px, pixel_size_A)
    reach = reach_A / radius_A, reach_A / pixel_size_A
    held = [[_HOLD * hold(of[: level + 1], radius_A / pixel_size_A, box_px) for of in shares] for level in levels]
    return tuple(tuple(Window(*reach, force) for force in of_level) for of_level in held)


def _doubling(first: int, last: int) -> tuple[int, ...]:
    """Shells from the first to the last, each at most twice the one before."""
    levels = [first]
    while levels[-1] < last:
        rest = last / levels[-1]
        levels.append(last if rest <= 2 else round(levels[-1] * rest ** (1 / math.ceil(math.log2(rest)))))
    return tuple(levels)
