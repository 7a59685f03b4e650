"""Maps as commands get them: pairs of half maps, as a run or two files, masks, and where an atomic model lies."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcryo.data import mrc
from dcryo.data.model import AtomicModel
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.dataset import DEFAULT_DIAMETER, mask_edge_px
from dcryo.jobs.options import OutOptions, argument
from dcryo.kernels import masks
from dcryo.kernels.fsc import shell_correlation
from dcryo.kernels.likeness import likeness
from dcryo.kernels.symmetry import operators

# Correlations at low resolution: halves that are less alike than one is like the mirror image of the other, by this
# much, are of opposite hands; and so negative, negatives. Equal but for a factor, they are one map.
_MIRROR_MARGIN = 0.1
_NEGATIVE = -0.3
_SAME = 1 - 1e-9
# Nor do two halves agree like this in every shell up to Nyquist, as a map and its filtered copy do.
_SAME_IN_SHELLS = 0.999


class HalfMapOptions(OutOptions):
    """Which half maps a job looks at; `load_half_maps` reads them."""

    source: Path = argument("directory of a run of refine or reconstruct, or the first half map")
    half2: Path | None = argument("the second half map (default: the first's name with half2 for half1)", default=None)


@dataclass(frozen=True)
class HalfMaps:
    """first, second: (D, D, D) float32; origin_A: (x, y, z) of the first voxel; paths: the files; symmetry: that of the
    run, or C1; diameter_A: of the run's spherical mask, if it is known; mask: the mask that the run was given; run: its
    directory, None where they are two files."""

    first: np.ndarray
    second: np.ndarray
    pixel_size_A: float
    origin_A: tuple[float, float, float]
    paths: tuple[Path, Path]
    symmetry: str
    diameter_A: float | None
    mask: Path | None
    run: Path | None

    @property
    def box_px(self) -> int:
        return len(self.first)


def load_half_maps(source: Path, second: Path | None, symmetry: str | None) -> HalfMaps:
    """Half maps of a run directory, or of two files; where only one is named, the other's name has half2 for half1.

    symmetry: the user's, which counts more than the run's. InputError where they are no pair of half maps: files that
    cannot be read, boxes or pixels that differ, constant maps, one map twice, opposite hands, one the other's negative.
    """
    diameter, mask = None, None
    if source.is_dir():
        if second is not None:
            raise InputError(f"{source}: is a directory and {second} was given too; name a run or two half maps")
        record = Run.open(source).record
        paths = source / "half1.mrc", source / "half2.mrc"
        absent = [path for path in paths if not path.is_file()]
        if absent:
            raise InputError(
                f"{source}: a run of {record['job']} that has no {absent[0].name}; expected one of refine or "
                "reconstruct that is done"
            )
        result = record.get("result") or {}
        symmetry = symmetry or result.get("symmetry") or record["options"].get("symmetry")
        diameter = result.get("mask_diameter_A")
        if record["options"].get("mask") and (source / "mask.mrc").is_file():
            mask = source / "mask.mrc"
    else:
        paths = source, second or _other_half(source)
    operators(symmetry or "C1")
    maps = [mrc.read_map(path) for path in paths]
    check_cubes_alike(maps)
    _check_a_pair(maps)
    pixel = maps[0].voxel_size_A
    origin = first_voxel_A(maps[0])
    run = source if source.is_dir() else None
    symmetry = (symmetry or "C1").upper()
    return HalfMaps(maps[0].array, maps[1].array, pixel, origin, paths, symmetry, diameter, mask, run)


def load_solvent_mask(path: Path | None, half_maps: HalfMaps) -> tuple[np.ndarray, Path | None]:
    """The mask to look at half maps through, (D, D, D) float32, and its file: a user's, the run's, or a soft sphere."""
    if path is None and half_maps.run is not None and (half_maps.run / "mask.mrc").is_file():
        path = half_maps.run / "mask.mrc"
    if path is None:
        box, pixel = half_maps.box_px, half_maps.pixel_size_A
        return masks.sphere(box, DEFAULT_DIAMETER * box, mask_edge_px(pixel)), None
    return load_given_mask(path, half_maps), path


def load_given_mask(path: Path, half_maps: HalfMaps) -> np.ndarray:
    """A user's mask, (D, D, D) float32; InputError where it does not fit the half maps or is no mask."""
    given = mrc.read_map(path)
    box, pixel = half_maps.box_px, half_maps.pixel_size_A
    if given.array.shape != (box,) * 3 or abs(given.voxel_size_A / pixel - 1) > 0.01:
        raise InputError(
            f"{path}: mask of {given.array.shape} voxels of {given.voxel_size_A:g} A; expected {(box,) * 3} of "
            f"{pixel:g} A like the half maps. Rescale it"
        )
    low, high = float(given.array.min()), float(given.array.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4 and high > 0.5):
        raise InputError(f"{path}: mask values run from {low:g} to {high:g}; expected 0 (solvent) to 1 (particle)")
    return np.clip(given.array, 0, 1)


def first_voxel_A(given: mrc.MapFile) -> tuple[float, float, float]:
    """Where the first voxel of a map lies (x, y, z): the header's origin or, where that is 0, its first columns."""
    if any(given.origin_A):
        return given.origin_A
    x, y, z = (given.voxel_size_A * start for start in given.start_px)
    return x, y, z


def placed_A(
    model: AtomicModel, path: Path, box_px: int, pixel_size_A: float, origin_A: tuple[float, float, float]
) -> np.ndarray:
    """Atoms (M, 3) x, y, z from the box centre of a map whose first voxel is at `origin_A`, as their file has them.

    InputError where atoms lie outside the map.
    """
    place = model.position_A + model.centre_A - np.array(origin_A) - box_px // 2 * pixel_size_A
    outside = int(np.sum(np.any(np.abs(place) > (box_px / 2 - 1.5) * pixel_size_A, axis=1)))
    if outside:
        corner = ", ".join(f"{value:.1f}" for value in origin_A)
        raise InputError(
            f"{path}: {outside} of {len(place)} atoms lie outside the map, which reaches from ({corner}) A over "
            f"{box_px * pixel_size_A:.1f} A; fit the model into the map first"
        )
    return place


def check_cubes_alike(maps: list[mrc.MapFile]) -> None:
    """InputError unless all maps are cubes of the same box and pixel size as the first, which its header says."""
    reference = maps[0]
    for one in maps:
        if len(set(one.array.shape)) != 1:
            raise InputError(f"{one.path}: a map of {one.array.shape} voxels; expected a cube")
        if one.array.shape != reference.array.shape:
            raise InputError(
                f"{one.path}: {one.array.shape} voxels, but {reference.path} has {reference.array.shape}; resample one "
                "of them"
            )
        if not one.voxel_size_A > 0:
            raise InputError(f"{one.path}: no voxel size in the header; set it")
        if abs(one.voxel_size_A / reference.voxel_size_A - 1) > 0.01:
            raise InputError(
                f"{one.path}: voxels of {one.voxel_size_A:g} A, but {reference.path} has "
                f"{reference.voxel_size_A:g} A; resample one of them, or correct its header"
            )


def _other_half(path: Path) -> Path:
    """The second half map by the name of the first."""
    other = path.with_name(path.name.replace("half1", "half2"))
    if other == path:
        raise InputError(f"{path}: no second half map was given, and its name has no half1 to put half2 for; name both")
    return other


def _check_a_pair(maps: list[mrc.MapFile]) -> None:
    first, second = maps
    for one in maps:
        if one.array.std() == 0:
            raise InputError(f"{one.path}: the map is constant, {one.array.flat[0]:g} everywhere; expected a half map")
    overall = float(np.corrcoef(first.array.ravel(), second.array.ravel())[0, 1])
    curve = shell_correlation(first.array, second.array)
    if overall > _SAME or np.all(curve[1:] > _SAME_IN_SHELLS):
        raise InputError(
            f"{second.path}: the same map as {first.path}; expected the two halves of a gold-standard refinement, each "
            "from its own particles"
        )
    alike, mirrors = likeness(first.array, second.array, first.voxel_size_A)
    axis = max(mirrors, key=lambda name: mirrors[name])
    if alike < _NEGATIVE and -alike > mirrors[axis]:
        raise InputError(
            f"{second.path}: dark where {first.path} is bright (they correlate by {alike:.2f} at low resolution); "
            "expected half maps of one contrast, multiply one of them by -1"
        )
    if mirrors[axis] > max(alike, 0) + _MIRROR_MARGIN and mirrors[axis] > -_NEGATIVE:
        how = "inverted through the centre" if axis == "centre" else f"mirrored along {axis}"
        raise InputError(
            f"{second.path}: of the other hand than {first.path}: they correlate by {alike:.2f} at low resolution, but "
            f"by {mirrors[axis]:.2f} once it is {how}; expected half maps of one hand, mirror one of them"
        )
