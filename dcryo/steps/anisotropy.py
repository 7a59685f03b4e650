"""What curves by direction and the views of particles come to, in figures and in words."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from dcryo.kernels import directional, fsc
from dcryo.kernels.shells import resolution_A

# Below these a preferred orientation has done harm: the least and the greatest area under conical FSCs (as cryoSPARC's
# guide takes it), and the sampling compensation factor of side views alone (Baldwin & Lyumkis 2020).
LEAST_AREA_RATIO, LEAST_COMPENSATION = 0.5, 8 / np.pi**2
# Half of the angle across a plane of frequencies that a view samples is at least this, the distance of directions.
_LEAST_WIDTH = 0.03


@dataclass(frozen=True)
class Anisotropy:
    """Figures of a map and its particles by direction.

    resolution_A, area: (N,) of the curve in each direction, by FSC 0.143; best, worst: the directions with the most and
    the least area; worst_direction: (3,); area_ratio: of these two; overall_A: of the FSC of all directions;
    sampling_at_cones: (N,) relative sampling, NaN without views; compensation and unsampled: the sampling compensation
    factor, and the part of directions that no view samples, None without views.
    """

    resolution_A: np.ndarray
    area: np.ndarray
    best: int
    worst: int
    worst_direction: np.ndarray
    area_ratio: float
    overall_A: float
    sampling_at_cones: np.ndarray
    compensation: float | None
    unsampled: float | None

    @classmethod
    def of(
        cls,
        directions: np.ndarray,
        curves: np.ndarray,
        overall: np.ndarray,
        views: np.ndarray | None,
        operators: np.ndarray,
        box_px: int,
        pixel_size_A: float,
    ) -> Self:
        """From conical FSCs (N, S) about directions (N, 3), the FSC (S,), and the particles' views (M, 3) or None."""
        area = directional.areas(curves)
        end = fsc.crossing(overall, fsc.GOLD_STANDARD)
        sampled, compensation, unsampled = np.full(len(directions), np.nan), None, None
        if views is not None:
            # A slice is as thick as its Fourier pixels: half of one on either side, seen from the centre.
            width = max(_LEAST_WIDTH, 0.5 / max(end, 1.0))
            everywhere = directional.sampling_of(
                directional.unique_directions(directional.SAMPLED, operators), views, operators, width
            )
            # Half of what a single view would give where it samples.
            compensation = directional.compensation_factor(everywhere, 0.5 / (len(views) * len(operators) * width))
            unsampled = float(np.mean(everywhere == 0))
            cones = np.sin(np.deg2rad(directional.HALF_ANGLE_DEG) / 2)
            sampled = directional.sampling_of(directions, views, operators, cones)
        return cls(
            resolution_A=box_px * pixel_size_A / directional.resolutions(curves),
            area=area,
            best=int(area.argmax()),
            worst=int(area.argmin()),
            worst_direction=directions[area.argmin()],
            area_ratio=directional.area_ratio(curves),
            overall_A=resolution_A(end, box_px, pixel_size_A),
            sampling_at_cones=sampled,
            compensation=compensation,
            unsampled=unsampled,
        )

    @property
    def uneven(self) -> bool:
        """Whether resolution depends on direction more than it should."""
        return self.area_ratio < LEAST_AREA_RATIO

    @property
    def views_uneven(self) -> bool:
        """Whether the particles' views leave directions out that the map would need."""
        return self.compensation is not None and self.compensation < LEAST_COMPENSATION

    def figures(self) -> dict[str, float | list[float] | None]:
        """Plain figures, by the names of the run's record."""
        return {
            "resolution_A": self.overall_A,
            "best_direction_A": float(self.resolution_A[self.best]),
            "worst_direction_A": float(self.resolution_A[self.worst]),
            "worst_direction": [round(float(part), 4) for part in self.worst_direction],
            "area_ratio": self.area_ratio,
            "sampling_compensation": self.compensation,
            "unsampled": self.unsampled,
        }


def verdict(found: Anisotropy) -> str:
    """What the views have done to the map, in a sentence or two."""
    best, worst = found.resolution_A[found.best], found.resolution_A[found.worst]
    x, y, z = found.worst_direction
    span = f"{best:.1f} A along its best direction and {worst:.1f} A along its worst, ({x:.2f}, {y:.2f}, {z:.2f})"
    ratio = f"area ratio of conical FSCs {found.area_ratio:.2f}"
    if found.compensation is not None:
        ratio += f", sampling compensation factor {found.compensation:.2f}"
    if found.uneven and found.views_uneven:
        return (
            f"Preferred orientation: resolution is {span} ({ratio}). Views from across that direction are too few, so "
            "the map is smeared along it. Details that run along it are not to be trusted; more of those views, as "
            "from a tilted stage, are what helps."
        )
    if found.uneven and found.compensation is not None:
        return (
            f"Uneven resolution: {span} ({ratio}), though the poses cover all directions. Some of the particles in the "
            "views that make the worst direction may be wrongly aligned or not the molecule; look at the 2D classes of "
            "these views."
        )
    if found.uneven:
        return (
            f"Uneven resolution: {span} ({ratio}). The map is smeared along the worst direction, as by a preferred "
            "orientation; the particles' poses would tell (--particles)."
        )
    if found.views_uneven:
        return (
            f"Views are uneven ({ratio}), but the map does not suffer much: {span}. More particles in the rare views "
            "would help more than as many in the common ones."
        )
    return f"Resolution is alike in all directions: {span} ({ratio})."
