"""A finished refinement read back: what jobs that go on from one share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcryo.data import mrc, star
from dcryo.data.curves import read_curves
from dcryo.data.particles import Particles
from dcryo.data.provenance import digest
from dcryo.data.run import Run
from dcryo.data.store import Store, is_store, open_store, select
from dcryo.errors import InputError
from dcryo.jobs.dataset import open_particles
from dcryo.kernels.symmetry import operators

_FILES = ("half1.mrc", "half2.mrc", "map.mrc", "mask.mrc", "fsc.csv", "spectra.csv", "particles.star")


@dataclass(frozen=True)
class Refined:
    """A finished refinement. store: what it was made from; rows: of its particles in that; particles: as it left them;
    options: those it was given; group: operators of its symmetry; fsc: of the half maps under the mask."""

    path: Path
    store: Store
    rows: np.ndarray
    particles: Particles
    options: dict[str, Any]
    seed: int
    group: np.ndarray
    fsc: np.ndarray
    mask: np.ndarray
    diameter_A: float

    @property
    def width_A(self) -> float:
        return self.store.box_px * self.store.pixel_size_A

    def rows_of(self, half: int) -> np.ndarray:
        """Positions of the particles of a half."""
        return np.flatnonzero(self.particles["half"] == half)

    def half_map(self, half: int) -> np.ndarray:
        """The map of a half, (D, D, D) float32, as it is archived."""
        return mrc.read_map(self.path / f"half{half}.mrc").array

    def noise_power(self, half: int) -> np.ndarray:
        """Mean power of the noise of a half's images in a Fourier pixel, (D // 2 + 1,)."""
        return read_curves(self.path / "spectra.csv")[f"noise_half{half}"]

    def selection(self, path: Path, which: np.ndarray | None = None, posed: bool = False) -> Store:
        """Its particles, or those at some positions, as a selection: in the halves that they were in, and with the
        poses that they got where they are to be `posed`."""
        if is_store(path):
            return open_store(path)
        which = np.arange(len(self.rows)) if which is None else which
        names = ("half", "rotation", "origin_A", "ctf_scale") if posed else ("half",)
        return select(self.store, self.rows[which], path, {name: self.particles[name][which] for name in names})


def open_refined(path: Path) -> Refined:
    """Read a run of `refine`. InputError where it is none, is not done, or what it was made from is not there as it
    was."""
    run = Run.open(path)
    record = run.record
    if record["job"] != "refine" or not run.finished:
        raise InputError(
            f"{path}: a run of {record['job']} whose status is {record['status']}; expected one of refine that is done"
        )
    absent = [name for name in _FILES if not (path / name).is_file()]
    if absent:
        raise InputError(f"{path}: has no {absent[0]}; restore it, or repeat the refinement")
    for row, where in zip(record["inputs"], run.inputs(), strict=True):
        if digest(where)["digest"] != row["digest"]:
            raise InputError(
                f"{row['path']}: is not what {path} was made from (its digest differs); restore it, or refine again"
            )
    _, store, rows = open_particles(path)
    # The table as the run left it: what it lacks is not taken from the store.
    particles = star.read_particles(path / "particles.star")
    return Refined(
        path=path,
        store=store,
        rows=rows,
        particles=particles,
        options=record["options"],
        seed=record["seed"],
        group=operators(record["options"]["symmetry"]),
        fsc=read_curves(path / "fsc.csv")["fsc_masked"],
        mask=mrc.read_map(path / "mask.mrc").array,
        diameter_A=record["result"]["mask_diameter_A"],
    )
