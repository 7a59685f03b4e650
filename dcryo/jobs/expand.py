"""Symmetry expansion: each particle once per operator of its point group, its pose turned by it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from dcryo.data.run import Run
from dcryo.data.store import Store, is_store, open_store, select
from dcryo.errors import InputError
from dcryo.jobs.dataset import load_dataset
from dcryo.jobs.options import OutOptions, Progress, SeedOptions, argument
from dcryo.kernels.symmetry import operators

# What a run found of a particle that holds for all its copies.
_CARRIED = ("origin_A", "class_number", "norm_correction", "ctf_scale", "max_probability")


class ExpandOptions(OutOptions, SeedOptions):
    """Repeat particles once per symmetry operator, as a selection: rows of the store and poses, no copy of images.

    Every operator brings another subunit to the place of the first, so that what differs among subunits becomes what
    differs among particles. With C1 it makes a selection of a run's particles that has their poses. All copies of an
    image are in the half that it was in.
    """

    source: Path = argument("finished run with poses, or store or selection that came with them")
    symmetry: str = Field(description="point group: Cn, Dn, T, O, I1, I2, I3 or I4")
    out: Path = Field(description="selection to make; its name ends in .zarr")


@dataclass(frozen=True)
class ExpandResult:
    """The selection, the number of particles that it was made from, and of operators."""

    store: Store
    before: int
    operators: int

    def summary(self) -> str:
        return f"{self.store.path}: {self.store.n} particles, {self.operators} for each of {self.before}"


def expand(options: ExpandOptions, *, progress: Progress = print) -> ExpandResult:
    """Expand; see `ExpandOptions`. InputError where particles have no poses, or were expanded before."""
    if options.out.suffix != ".zarr":
        raise InputError(f"--out {options.out}: a selection's name ends in .zarr")
    group = operators(options.symmetry)
    data = load_dataset(options.source, options.seed)
    particles = data.particles
    if not data.has_poses:
        raise InputError(f"{options.source}: the particles have no poses (rlnAngleRot, ...); refine them first")
    if particles.columns.get("symmetry_copy", np.zeros(1)).any():
        raise InputError(
            f"{options.source}: was expanded already (dcryoSymmetryCopy); expand what that was made of, by the group "
            "that holds all the operators"
        )
    with Run.start(
        options.out, "expand", options.model_dump(), [options.source], options.seed, options.resume, options.overwrite
    ) as run:
        if not is_store(options.out):
            n, order = len(particles), len(group)
            of_copy = np.repeat(np.arange(n), order)
            columns = {name: particles[name][of_copy] for name in _CARRIED if name in particles}
            columns["rotation"] = turned_by(data.rotation, group)
            columns["half"] = data.halves[of_copy]
            columns["symmetry_copy"] = np.tile(np.arange(order), n)
            select(data.store, data.rows[of_copy], options.out, columns, repeats=True)
        run.done({"particles": len(particles) * len(group), "before": len(particles), "symmetry": options.symmetry})
    return ExpandResult(open_store(options.out), len(particles), len(group))


def turned_by(rotation: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Poses A g of poses A (n, 3, 3) and operators g (G, 3, 3): (n G, 3, 3), those of one A after the other. As
    V(g x) = V(x), they are views of the same molecule from the same side, its subunits renumbered."""
    return (rotation[:, None] @ group).reshape(-1, 3, 3)
