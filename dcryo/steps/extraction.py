"""One micrograph to boxes: cut out, scaled, with their grey values made alike; pure."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcryo.data.stacks import defects
from dcryo.kernels import boxes

BATCH = 8
"""Boxes that are in memory at once."""


@dataclass(frozen=True)
class Boxing:
    """What is asked of every box.

    box_px: side in the micrograph; sizes_px: sides of the images made of it, each by itself, none larger than the box.
    background_diameter_px: of the circle, in pixels of the micrograph, that holds the particle; None leaves grey values
    as they are. invert: turns dark particles white. white_dust_sd, black_dust_sd: see `boxes.normalise`. whole: leave
    out boxes that are partly outside, in place of repeating the pixels at the edge.
    """

    box_px: int
    sizes_px: tuple[int, ...]
    background_diameter_px: float | None
    invert: bool
    white_dust_sd: float | None = None
    black_dust_sd: float | None = None
    whole: bool = True


@dataclass(frozen=True)
class Boxes:
    """Images of some particles of a micrograph.

    rows: (n,) which; images: of each size, (n, D, D) float32, all zeros where there is a reason to leave it out: place
    in this batch -> reason.
    """

    rows: NDArray[np.int64]
    images: tuple[NDArray[np.float32], ...]
    left_out: dict[int, str]


def outside(centre_px: NDArray[np.int64], shape: tuple[int, int], boxing: Boxing) -> dict[int, str]:
    """Particles about centres (N, 2) that have no box in a micrograph of `shape` (y, x): row -> reason."""
    size = f"the micrograph of {shape[1]} x {shape[0]} px"
    centred = boxes.contained(centre_px, 1, shape)
    reasons = {
        int(row): f"its centre, {centre_px[row, 0]}, {centre_px[row, 1]}, is outside {size}"
        for row in np.flatnonzero(~centred)
    }
    if boxing.whole:
        reaching = centred & ~boxes.contained(centre_px, boxing.box_px, shape)
        reasons |= {
            int(row): f"its box about {centre_px[row, 0]}, {centre_px[row, 1]} reaches beyond {size}"
            for row in np.flatnonzero(reaching)
        }
    return reasons


def recentred(
    coordinate_px: NDArray[np.float64],
    origin_px: NDArray[np.float64],
    rotation: NDArray[np.float64] | None = None,
    point_px: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates and origins (N, 2) of boxes about the refined centre of each particle, in pixels of the micrograph.

    The particle's centre lies at box centre minus origin; point_px: (3,) x, y, z of the point to centre in its place,
    from the map's centre, which the poses (N, 3, 3) take to the image. Boxes move by whole pixels, halves away from
    zero, so that the fraction cut off from a coordinate stays the same; what is left over is the new origin.
    """
    origin = np.asarray(origin_px, dtype=np.float64)
    if rotation is not None and point_px is not None:
        origin = origin - (rotation @ point_px)[:, :2]
    whole = np.trunc(origin + np.copysign(0.5, origin))
    return coordinate_px - whole, origin - whole


def extract(
    micrograph: NDArray[np.float32],
    centre_px: NDArray[np.int64],
    rows: NDArray[np.int64],
    identity: NDArray[np.uint64],
    boxing: Boxing,
) -> Iterator[Boxes]:
    """The boxes of `rows` of the centres (N, 2) in a micrograph (y, x), in their order, some at a time.

    identity: (N,) what a particle's random numbers are keyed by. Left out are boxes with pixels that are not finite,
    that are constant, or whose background is.
    """
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        raw = boxes.crop(micrograph, centre_px[batch], boxing.box_px)
        left_out = defects(raw)
        raw[list(left_out)] = 0.0
        # The grey level stays out of all sums, where it would cost the digits of what is to be seen.
        level = raw.mean(axis=(1, 2), keepdims=True)
        if boxing.background_diameter_px is not None:
            raw -= level
            level = np.zeros_like(level)
        smaller = [size for size in boxing.sizes_px if size != boxing.box_px]
        scaled = dict(zip(smaller, boxes.rescaled(raw - level, smaller) if smaller else (), strict=True))
        made = []
        for size in boxing.sizes_px:
            images = scaled[size] + level if size in scaled else raw.copy()
            left_out |= _finished(images, identity[batch], boxing, left_out)
            made.append(images)
        for images in made:
            images[list(left_out)] = 0.0
        yield Boxes(batch, tuple(made), left_out)


def _finished(
    images: NDArray[np.float32], identity: NDArray[np.uint64], boxing: Boxing, left_out: dict[int, str]
) -> dict[int, str]:
    """Give images their grey values, in place; place -> reason of those, but for the known ones, that have none."""
    bad: dict[int, str] = {}
    if boxing.background_diameter_px is not None:
        radius_px = 0.5 * boxing.background_diameter_px * images.shape[-1] / boxing.box_px
        usable = boxes.normalise(images, radius_px, boxing.white_dust_sd, boxing.black_dust_sd, identity)
        bad = dict.fromkeys(np.flatnonzero(~usable).tolist(), "its background is constant")
    if boxing.invert:
        np.negative(images, out=images)
    return {place: reason for place, reason in bad.items() if place not in left_out}
