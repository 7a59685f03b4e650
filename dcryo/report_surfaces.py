"""The section of the report that shows the surface of a map, for each job that makes one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dcryo import figures
from dcryo.data import mrc
from dcryo.kernels import solvent, surface

SHOWN: dict[str, tuple[str, str | None]] = {
    "postprocess": ("map_sharp.mrc", None),
    "localres": ("map_local.mrc", "localres.mrc"),
    "refine": ("map.mrc", None),
    "reconstruct": ("map.mrc", None),
}
"""Job -> the map whose surface is shown, and the map of local resolution that colours it."""
SIDE_PX = 440
_LEAST_RANGE = 1.25


def section(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Picture and words, or None where the run has no such map or nothing in it stands out."""
    name, colours = SHOWN.get(record["job"], (None, None))
    if name is None or not (path / name).is_file() or not (path / "mask.mrc").is_file():
        return None
    given, mask = mrc.read_map(path / name), mrc.read_map(path / "mask.mrc").array
    pixel_size_A = given.voxel_size_A or 1.0
    level = (record.get("result") or {}).get("contour_level")
    if level is None:
        level = solvent.contour_level(given.array, mask, pixel_size_A)
    masked = given.array * mask
    if not masked.max() > level > 0:
        return None
    words = (
        f"{name} under the mask, at a level of {level:.3g}, chosen by the volume that it encloses "
        f"({np.sum(masked >= level) * pixel_size_A**3 / 1000:,.0f} nm³). "
    )
    masked = solvent.without_specks(masked, level)
    seen = surface.seen_px(masked, level)
    views = [surface.view(masked, level, axis, surface.OVERSAMPLING * SIDE_PX, seen) for axis in surface.AXES]
    lights = [surface.light(view, seen[1] - seen[0]) for view in views]
    limits = None
    if colours is None:
        pictures = [surface.coloured(bright, surface.PLAIN) for bright in lights]
    else:
        local = mrc.read_map(path / colours).array
        values = [surface.values_at(view.place_px, local) for view in views]
        low, high = np.nanpercentile(np.concatenate([one.ravel() for one in values]), [2, 98]).tolist()
        # A bar that is narrower than this would make much of differences that are none.
        limits = low, max(high, _LEAST_RANGE * low)
        scaled = [np.clip((one - limits[0]) / (limits[1] - limits[0]), 0, 1) for one in values]
        pictures = [
            surface.coloured(bright, figures.resolution_palette(np.nan_to_num(one)))
            for bright, one in zip(lights, scaled, strict=True)
        ]
        words += "Colours: the local resolution at the surface. "
    words += (
        "Specks apart from the molecule are not shown. The hand of a map cannot be known from the images: this may be "
        "the mirror image of the molecule."
    )
    return figures.surfaces(pictures, (seen[1] - seen[0]) * pixel_size_A, limits), words
