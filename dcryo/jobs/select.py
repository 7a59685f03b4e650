"""Keeping some of the particles: good classes, given classes, a condition on a column, a random part, a common part."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from dcryo.data.classes import TABLE, read_class_table
from dcryo.data.particles import Particles, identities
from dcryo.data.run import Run
from dcryo.data.store import Store, is_store, open_store, select
from dcryo.errors import InputError, RunError
from dcryo.jobs.dataset import open_particles, posed
from dcryo.jobs.options import OutOptions, Progress, SeedOptions, argument
from dcryo.kernels.randomness import generator

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_CONDITION = re.compile(r"\s*([A-Za-z]\w*)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")
# What a run found of a particle that a next job may use.
_CARRIED, _OF_POSES = ("class_number", "origin_A"), ("rotation", "half", "ctf_scale")


class SelectOptions(OutOptions, SeedOptions):
    """Keep particles of a classification, or of a store, as a selection: rows of the store, no copy of images.

    What is given is asked one after the other: the class, the conditions, that the particle is in other selections
    too, and a random part of those.
    """

    source: Path = argument("run of class2d, class3d or variability, store or selection")
    out: Path = Field(description="selection to make; its name ends in .zarr")
    auto: bool = Field(False, description="keep the classes that look good, and of them the particles that do")
    classes: tuple[int, ...] = Field((), description="keep these classes")
    drop: tuple[int, ...] = Field((), description="keep all classes but these")
    where: tuple[str, ...] = Field(
        (),
        description="keep particles of which it is true, such as 'max_probability > 0.5' or, of a run of variability, "
        "'dcryoComponent1 > 2'; may be given several times",
    )
    random: int | None = Field(None, gt=0, description="keep so many, drawn at random")
    common: tuple[Path, ...] = Field(
        (), description="keep particles that are in this selection too; may be given several times"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "SelectOptions":
        if self.auto + bool(self.classes) + bool(self.drop) > 1:
            raise ValueError("auto, classes and drop exclude each other; give one of them")
        if not (self.auto or self.classes or self.drop or self.where or self.random or self.common):
            raise ValueError("nothing says what to keep; give auto, classes, drop, where, random or common")
        return self


@dataclass(frozen=True)
class SelectResult:
    """The selection, the number of particles that it was made from, and reason -> number of what was left out."""

    store: Store
    before: int
    left_out: dict[str, int]

    def summary(self) -> str:
        lines = [f"{self.store.path}: {self.store.n} of {self.before} particles kept"]
        lines += [f"  {count:7d} left out: {reason}" for reason, count in self.left_out.items()]
        return "\n".join(lines)


def select_particles(options: SelectOptions, *, progress: Progress = print) -> SelectResult:
    """Select; see `SelectOptions`. InputError for classes or columns that are not there, RunError if none is left."""
    if options.out.suffix != ".zarr":
        raise InputError(f"--out {options.out}: a selection's name ends in .zarr")
    particles, store, rows = open_particles(options.source)
    reasons = np.full(len(particles), "", dtype=object)
    _by_class(options, particles, reasons)
    for condition in options.where:
        _leave_out(reasons, ~_holds(condition, particles), f"not {condition.strip()}")
    for path in options.common:
        own = np.isin(identities(particles), identities(open_store(path).particles()))
        _leave_out(reasons, ~own, f"not in {path}")
    left = np.flatnonzero(reasons == "")
    if options.random is not None and len(left) > options.random:
        drawn = generator(options.seed, "selection", 0).choice(left, options.random, replace=False)
        _leave_out(reasons, ~np.isin(np.arange(len(reasons)), drawn), f"not among {options.random} drawn at random")
        left = np.sort(drawn)
    if not len(left):
        raise RunError(f"{options.source}: no particle is left of {len(particles)}; ask for less")
    names, counts = np.unique(reasons[reasons != ""].astype(str), return_counts=True)
    left_out = {str(names[place]): int(counts[place]) for place in np.argsort(-counts)}
    inputs = [options.source, *options.common]
    with Run.start(
        options.out, "select", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    ) as run:
        if not is_store(options.out):
            carried = _CARRIED + (_OF_POSES if posed(options.source, particles) else ())
            columns = {name: particles[name][left] for name in carried if name in particles}
            select(store, rows[left], options.out, columns)
        run.done({"particles": len(left), "before": len(particles), "left_out": left_out})
    return SelectResult(open_store(options.out), len(particles), left_out)


def _by_class(options: SelectOptions, particles: Particles, reasons: np.ndarray) -> None:
    if not (options.auto or options.classes or options.drop):
        return
    if "class_number" not in particles:
        raise InputError(f"{options.source}: the particles have no classes; run class2d or class3d first")
    number, last = particles["class_number"], int(particles["class_number"].max())
    wrong = [asked for asked in (*options.classes, *options.drop) if not 1 <= asked <= last]
    if wrong:
        raise InputError(f"{options.source}: there is no class {wrong[0]}; the classes are 1 to {last}")
    if options.classes:
        _leave_out(reasons, ~np.isin(number, options.classes), "in another class")
    elif options.drop:
        _leave_out(reasons, np.isin(number, options.drop), "in a class to drop")
    else:
        if not (options.source / TABLE).is_file():
            raise InputError(f"{options.source}: has no {TABLE}; --auto takes a run of class2d")
        table = read_class_table(options.source / TABLE)
        of_class = table.reason[number - 1]
        for words in np.unique(of_class[of_class != ""]):
            _leave_out(reasons, of_class == words, f"class: {words}")
        own = particles.extra.get("dcryoFlag", np.full(len(particles), ""))
        for words in np.unique(own[own != ""]):
            _leave_out(reasons, own == words, f"particle: {words}")


def _leave_out(reasons: np.ndarray, which: np.ndarray, words: str) -> None:
    reasons[which & (reasons == "")] = words


def _holds(condition: str, particles: Particles) -> np.ndarray:
    """Where a condition such as 'defocus_u_A < 20000' is true, (n,) bool."""
    parsed = _CONDITION.fullmatch(condition)
    if parsed is None:
        raise InputError(f"--where {condition!r}: expected a column, one of {' '.join(_COMPARISONS)} and a value")
    name, comparison, word = parsed.groups()
    values = _column(name, particles)
    if values is None:
        known = [*particles.columns, *particles.optics, *particles.extra]
        raise InputError(f"--where {condition!r}: there is no column {name}; the columns are {', '.join(known)}")
    if values.dtype.kind not in "US":
        try:
            return np.asarray(_COMPARISONS[comparison](values, float(word)))
        except ValueError:
            raise InputError(f"--where {condition!r}: {name} is a number; found {word!r}") from None
    return np.asarray(_COMPARISONS[comparison](values, word.strip("'\"")))


def _column(name: str, particles: Particles) -> np.ndarray | None:
    if name in particles and particles[name].ndim == 1:
        return particles[name]
    if name in particles.optics:
        return particles.optics_of(name)
    if name not in particles.extra:
        return None
    text = particles.extra[name]
    try:
        return text.astype(np.float64)
    except ValueError:
        return text
