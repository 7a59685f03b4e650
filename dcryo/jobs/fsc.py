"""Fourier shell correlation of two maps, or of a map and an atomic model."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from dcryo.data import mrc
from dcryo.data.curves import write_curves
from dcryo.data.model import read_model
from dcryo.data.run import Run
from dcryo.jobs.given_maps import check_cubes_alike, first_voxel_A, placed_A
from dcryo.jobs.options import OutOptions, Progress, argument
from dcryo.kernels import density, fsc

MODELS = re.compile(r"\.(pdb|ent|cif|mmcif)(\.gz)?$", re.IGNORECASE)
"""Names of files that hold atomic models."""


class FscOptions(OutOptions):
    """Compare two maps, or a map and an atomic model in its place in it, shell by shell.

    Writes fsc.csv and prints the resolutions at 0.143 and 0.5.
    """

    first: Path = argument("a map")
    second: Path = argument("another map, of the same box and pixel size, or an atomic model (.pdb, .cif)")
    mask: Path | None = Field(None, description="mask (map of 0 to 1), multiplied with both")


@dataclass(frozen=True)
class FscResult:
    """fsc: (D // 2 + 1,) under the mask if there is one; resolutions in Angstrom at 0.143 and at 0.5."""

    out: Path
    fsc: np.ndarray
    resolution_A: float
    resolution_half_A: float

    def summary(self) -> str:
        return f"FSC 0.143 at {self.resolution_A:.2f} A, 0.5 at {self.resolution_half_A:.2f} A ({self.out / 'fsc.csv'})"


def fsc_of_maps(options: FscOptions, *, progress: Progress = print) -> FscResult:
    """FSC of two map files; InputError where they do not fit each other."""
    paths = [options.first, options.second] + ([options.mask] if options.mask else [])
    is_model = MODELS.search(options.second.name) is not None
    maps = [mrc.read_map(path) for path in paths if not (is_model and path == options.second)]
    check_cubes_alike(maps)
    first, *others = (one.array for one in maps)
    if is_model:
        others.insert(0, _density(options.second, maps[0]))
    second, *mask = others
    box, pixel = len(first), maps[0].voxel_size_A
    with Run.start(options.out, "fsc", options.model_dump(), paths, None, options.resume, options.overwrite) as run:
        curves = {"fsc_unmasked": fsc.shell_correlation(first, second)}
        if mask:
            curves["fsc_masked"] = fsc.shell_correlation(first * mask[0], second * mask[0])
        curve = curves.get("fsc_masked", curves["fsc_unmasked"])
        resolution, half = (fsc.resolution_at(curve, level, box, pixel) for level in (fsc.GOLD_STANDARD, fsc.HALF))
        if not run.finished:
            write_curves(run.path / "fsc.csv", box, pixel, curves)
            run.done({"resolution_A": resolution, "resolution_half_A": half, "box_px": box, "pixel_size_A": pixel})
    return FscResult(options.out, curve, resolution, half)


def _density(path: Path, given: mrc.MapFile) -> np.ndarray:
    """The density of a model on the grid of a map, atoms where the file has them and with their own B-factors."""
    model, box, pixel = read_model(path), len(given.array), given.voxel_size_A
    atoms_A = placed_A(model, path, box, pixel, first_voxel_A(given))
    return density.gaussian_density(atoms_A, model.amplitude, model.bfactor_A2, box, pixel)
