"""What jobs that end in a gold-standard pair of maps write, and how those that look at one find it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcryo.data import mrc
from dcryo.data.curves import read_curves, write_curves, write_fsc_xml
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.dataset import mask_edge_px
from dcryo.jobs.em import Maps, merged
from dcryo.kernels import fsc, masks
from dcryo.steps.maximisation import HalfFsc


def write_maps(out: Path, pixel_size_A: float, maps: Maps, mask: np.ndarray) -> float:
    """Write half1.mrc, half2.mrc, map.mrc, mask.mrc, fsc.csv and fsc.xml; returns the resolution at FSC 0.143."""
    box = mask.shape[0]
    first, second = maps.plain
    for name, array in {"half1": first, "half2": second, "map": merged(maps), "mask": mask}.items():
        mrc.write_map(out / f"{name}.mrc", array, pixel_size_A)
    write_curves(out / "fsc.csv", box, pixel_size_A, {"fsc_unmasked": maps.fsc.unmasked, "fsc_masked": maps.fsc.masked})
    write_fsc_xml(out / "fsc.xml", box, pixel_size_A, maps.fsc.masked)
    return fsc.resolution_at(maps.fsc.masked, fsc.GOLD_STANDARD, box, pixel_size_A)


def read_maps(out: Path) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, HalfFsc]:
    """What `write_maps` left: the half maps, the map and the FSC. InputError where a file is gone or damaged."""
    first, second, merged = (mrc.read_map(out / f"{name}.mrc").array for name in ("half1", "half2", "map"))
    curves = read_curves(out / "fsc.csv")
    return (first, second), merged, HalfFsc(curves["fsc_unmasked"], curves["fsc_masked"])


# Of the box, the diameter of the soft sphere that stands in for a mask.
_SPHERE = 0.85


@dataclass(frozen=True)
class HalfMaps:
    """Two half maps (D, D, D) and the mask to look at them through.

    symmetry and particles are those of the run that they are from; None where they are two files.
    """

    paths: tuple[Path, ...]
    first: np.ndarray
    second: np.ndarray
    mask: np.ndarray
    pixel_size_A: float
    symmetry: str | None
    particles: Path | None

    @property
    def box_px(self) -> int:
        return len(self.first)

    @property
    def resolution_A(self) -> float:
        """By FSC 0.143 under the mask."""
        curve = fsc.shell_correlation(self.first * self.mask, self.second * self.mask)
        return fsc.resolution_at(curve, fsc.GOLD_STANDARD, self.box_px, self.pixel_size_A)


def load_half_maps(run_or_half1: Path, half2: Path | None, mask: Path | None) -> HalfMaps:
    """The half maps of a run directory, or two files, with a mask: the given one, the run's, or a soft sphere.

    InputError where a file is missing, maps do not fit each other or say nothing.
    """
    symmetry, particles, folder = None, None, None
    if run_or_half1.is_dir():
        if half2 is not None:
            raise InputError(f"{half2}: {run_or_half1} is a run with both of its half maps; give one or the other")
        folder = run_or_half1
        symmetry = str(Run.open(folder).record["options"].get("symmetry") or "C1")
        particles = folder / "particles.star" if (folder / "particles.star").is_file() else None
        pair = folder / "half1.mrc", folder / "half2.mrc"
    elif half2 is None:
        raise InputError(f"{run_or_half1}: is one half map; name the other too, or the directory of a run")
    else:
        pair = run_or_half1, half2
    first, second = (mrc.read_map(path) for path in pair)
    if mask is None and folder is not None and (folder / "mask.mrc").is_file():
        mask = folder / "mask.mrc"
    given = None if mask is None else mrc.read_map(mask)
    if len(set(first.array.shape)) != 1 or not first.voxel_size_A:
        raise InputError(
            f"{pair[0]}: {first.array.shape} voxels of {first.voxel_size_A:g} A; expected a cube of a size"
        )
    for path, other in ((pair[1], second), (mask, given)):
        if other is None:
            continue
        if other.array.shape != first.array.shape or abs(other.voxel_size_A / first.voxel_size_A - 1) > 0.01:
            raise InputError(
                f"{path}: {other.array.shape} voxels of {other.voxel_size_A:g} A, but {pair[0]} has "
                f"{first.array.shape} of {first.voxel_size_A:g} A; resample one of them"
            )
    for path, one in zip(pair, (first, second), strict=True):
        if not np.isfinite(one.array).all() or np.ptp(one.array) == 0:
            raise InputError(f"{path}: is constant or not finite; expected a half map")
    if np.array_equal(first.array, second.array):
        raise InputError(f"{pair[1]}: is the same map as {pair[0]}; expected the two halves of a refinement")
    box, pixel = len(first.array), first.voxel_size_A
    if given is not None and not (given.array.min() >= 0 and 0 < given.array.max() <= 1):
        raise InputError(
            f"{mask}: values from {given.array.min():g} to {given.array.max():g}; expected 0 (solvent) to 1 (particle)"
        )
    inside = masks.sphere(box, _SPHERE * box, mask_edge_px(pixel)) if given is None else given.array
    paths = pair if mask is None else (*pair, mask)
    return HalfMaps(paths, first.array, second.array, inside, pixel, symmetry, particles)
