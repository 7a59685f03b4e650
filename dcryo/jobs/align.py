"""One map brought onto another."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from dcryo.data import mrc
from dcryo.data.curves import write_curves
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.euler import euler_from_matrix
from dcryo.jobs.options import OutOptions, Progress, argument
from dcryo.kernels import alignment, fsc
from dcryo.kernels.filters import pad_or_crop, resample_volume
from dcryo.kernels.shells import shell_at

# Voxels whose sizes differ by less than this are the same; a header rarely holds more digits.
_SAME_VOXEL = 1e-3


class AlignOptions(OutOptions):
    """Bring a map onto another: rotation, shift and hand. Writes moved.mrc and fsc.csv (before and after).

    The map that is moved is resampled where its voxels or its box are not those of the other.
    """

    moving: Path = argument("the map that is moved")
    onto: Path = argument("the map that it is brought onto, which stays")
    resolution_A: float = Field(20.0, gt=0, description="resolution up to which the maps are compared")
    hand: bool = Field(True, description="also try the mirror image")


@dataclass(frozen=True)
class AlignResult:
    """alignment: how the map was moved; moved: (D, D, D) float32; fsc_before, fsc_after: (D // 2 + 1,), with the other
    map; resolutions in Angstrom at which the second falls below 0.143 and 0.5."""

    out: Path
    alignment: alignment.Alignment
    moved: np.ndarray
    fsc_before: np.ndarray
    fsc_after: np.ndarray
    pixel_size_A: float
    resolution_A: float
    resolution_half_A: float

    def summary(self) -> str:
        rot, tilt, psi = euler_from_matrix(self.alignment.rotation)
        x, y, z = self.alignment.shift_px * self.pixel_size_A
        hand = "inverted (the other hand), then " if self.alignment.mirrored else ""
        return (
            f"{self.out / 'moved.mrc'}: {hand}rotated by rot {rot:.2f}, tilt {tilt:.2f}, psi {psi:.2f} deg, "
            f"shifted by {x:.2f}, {y:.2f}, {z:.2f} A (x, y, z)\n"
            f"FSC 0.143 at {self.resolution_A:.2f} A, 0.5 at {self.resolution_half_A:.2f} A "
            f"({self.out / 'fsc.csv'}); correlation {self.alignment.correlation:.3f} up to the resolution compared"
        )


def align(options: AlignOptions, *, progress: Progress = print) -> AlignResult:
    """Align two map files; InputError where they cannot be compared."""
    onto = mrc.read_map(options.onto)
    if len(set(onto.array.shape)) != 1:
        raise InputError(f"{options.onto}: a map of {onto.array.shape} voxels; expected a cube. Pad it to one")
    box, pixel = len(onto.array), onto.voxel_size_A
    shell = shell_at(options.resolution_A, box, pixel)
    if shell < 2:
        raise InputError(
            f"--resolution {options.resolution_A:g}: {options.onto} is {box * pixel:g} A wide, which holds less than "
            f"two shells up to that resolution; give {box * pixel / 4:.0f} A or finer"
        )
    moving = _fitted(options.moving, mrc.read_map(options.moving), box, pixel, progress)
    for path, array in ((options.moving, moving), (options.onto, onto.array)):
        if np.ptp(array) == 0:
            raise InputError(f"{path}: all voxels are {array.flat[0]:g}; expected a map with a molecule in it")
    with Run.start(
        options.out, "align", options.model_dump(), [options.moving, options.onto], None, options.resume,
        options.overwrite,
    ) as run:  # fmt: skip
        found = alignment.align(moving, onto.array, shell, hands=options.hand)
        there = alignment.moved(moving, found)
        before, after = fsc.shell_correlation(moving, onto.array), fsc.shell_correlation(there, onto.array)
        resolution, half = (fsc.resolution_at(after, level, box, pixel) for level in (fsc.GOLD_STANDARD, fsc.HALF))
        result = AlignResult(options.out, found, there, before, after, pixel, resolution, half)
        if not run.finished:
            mrc.write_map(run.path / "moved.mrc", there, pixel)
            write_curves(run.path / "fsc.csv", box, pixel, {"fsc_before": before, "fsc_after": after})
            rot, tilt, psi = euler_from_matrix(found.rotation)
            run.done(
                {
                    "rot_deg": rot,
                    "tilt_deg": tilt,
                    "psi_deg": psi,
                    "shift_A": found.shift_px * pixel,
                    "mirrored": found.mirrored,
                    "correlation": found.correlation,
                    "resolution_A": resolution,
                    "resolution_half_A": half,
                    "box_px": box,
                    "pixel_size_A": pixel,
                }
            )
    return result


def _fitted(path: Path, moving: mrc.MapFile, box: int, pixel_size_A: float, progress: Progress) -> np.ndarray:
    """The map in the box and with the voxels of the other."""
    array, ratio = moving.array, moving.voxel_size_A / pixel_size_A
    if not 0.1 < ratio < 10:
        raise InputError(
            f"{path}: voxels of {moving.voxel_size_A:g} A against {pixel_size_A:g} A; one of the headers must be wrong"
        )
    if abs(ratio - 1) > _SAME_VOXEL:
        progress(f"{path}: resampled from {moving.voxel_size_A:g} to {pixel_size_A:g} A a voxel")
        array = resample_volume(array, ratio)
    if array.shape != (box,) * 3:
        progress(f"{path}: put in a box of {box} px, centre on centre, from {' x '.join(map(str, array.shape))}")
        array = pad_or_crop(array, box)
    return array
