"""Continuous variability: principal components of the volume from images with known poses.

Each half of the particles has its own mean volume and components, found by expectation and maximisation
(`kernels.variability`); the halves meet only in the correlation of their volumes, shell by shell, which sets the
priors, and in the choice of axes within each half's own subspace. When both have settled, how far they agree is written
down, and a last few iterations join them for the components and coordinates that the run gives.
"""

import csv
import io
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.cluster.vq
from pydantic import Field, model_validator

from dcryo import graph
from dcryo.cluster import Cluster, check_kind, connect
from dcryo.data import mrc, star
from dcryo.data.atomic import replacing
from dcryo.data.curves import write_curves
from dcryo.data.particles import Particles
from dcryo.data.run import SERIES, Run
from dcryo.data.store import Store, is_store, open_store, select
from dcryo.errors import InputError, RunError
from dcryo.jobs import em
from dcryo.jobs.dataset import (
    Dataset,
    Shard,
    cut_shards,
    left_out_rows,
    load_dataset,
    load_mask,
    mask_edge_px,
    open_particles,
    posed,
)
from dcryo.jobs.memory import back_projection_bytes, check_memory
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, SeedOptions, argument
from dcryo.jobs.variability_parts import (
    Setting,
    bin_shard,
    expect_shard,
    find_shard,
    pack_shard,
    shard_bytes,
    write_volumes,
)
from dcryo.kernels import filters, fsc, masks, shells
from dcryo.kernels import variability as kernel
from dcryo.kernels.randomness import generator
from dcryo.kernels.symmetry import operators
from dcryo.steps import variability as steps
from dcryo.steps.variability import Found

# Iterations of the mean alone before there are components, and of both halves together at the end.
_MEAN, _JOINT = 3, 3
# While components form, their halves cannot agree yet: priors take them to agree by so much, less in each iteration.
_FIRST_AGREEMENT, _FADING = 0.5, 0.8
# Components have settled where an iteration changes less than this of their variability.
_SETTLED, _LEAST_APART = 2e-4, 6
# Box of the volumes while they are fitted, in shells.
_WORKING_BOX = 2.5
# Halves whose volumes of a component correlate by less than this do not support it; nor do images that know less than
# this part of its variance, for components of noise may be alike while they fall to nothing.
SUPPORTED, _LEAST_KNOWN = 0.5, 0.05
_PERCENTILES = (5, 95)
_LEAST_NOISE = 1e-6
# Standard deviation of the contrasts to begin with, and the least contrast that coordinates are divided by.
_CONTRAST_SD, _LEAST_CONTRAST = 0.3, 0.2
LABEL = "dcryoComponent"
"""Labels of the coordinates in particles.star, as columns of `select --where`: dcryoComponent1, ..."""


class VariabilityOptions(OutOptions, ClusterOptions, SeedOptions):
    """Find along which changes of the volume particles vary, and where on each of them every particle is.

    Poses are those that the particles have. Writes mean.mrc, component1.mrc, ..., coordinates.csv, particles.star (with
    the coordinates, for select --where 'dcryoComponent1 > 0'), maps along each component in series/, halves.csv and a
    report.
    """

    source: Path = argument("finished run with poses (refine), or store or selection of particles with poses")
    components: int = Field(3, gt=0, le=12, description="number of principal components")
    resolution_limit_A: float | None = Field(
        None, gt=0, description="finest resolution that is used (default: 3 times Nyquist)"
    )
    highpass_A: float | None = Field(
        None,
        gt=0,
        description="leave out what is coarser than this, where ice or contrast varies more than the molecule",
    )
    mask: Path | None = Field(None, description="where the volume may vary (map of 0 to 1)")
    mask_diameter_A: float | None = Field(
        None, gt=0, description="diameter of the particle and of the soft sphere around it (default: 0.85 of the box)"
    )
    contrast: bool = Field(True, description="fit the contrast of each image, so that it does not make a component")
    iterations: int = Field(20, gt=0, description="iterations of the two halves apart at most")
    frames: int = Field(7, gt=1, le=50, description="maps along each component, from its 5th to its 95th percentile")
    bins: bool = Field(True, description="reconstruct particles along each component too, without the model")
    clusters: int = Field(1, gt=0, description="group particles into so many classes by their coordinates (k-means)")

    @model_validator(mode="after")
    def _consistent(self) -> "VariabilityOptions":
        if self.highpass_A and self.resolution_limit_A and self.highpass_A <= self.resolution_limit_A:
            raise ValueError(f"highpass {self.highpass_A:g} A: expected coarser than the resolution limit")
        return self


@dataclass(frozen=True)
class VariabilityResult:
    """A finished run. components: (K, D, D, D) of unit length, by falling variance; coordinates, sd: (n, K), of the
    rows of `particles`; agreement: (K,) correlation between the halves of the components; supported: (K,) bool, whether
    both halves show them."""

    out: Path
    mean: np.ndarray
    components: np.ndarray
    coordinates: np.ndarray
    sd: np.ndarray
    particles: Particles
    agreement: np.ndarray
    supported: np.ndarray

    def summary(self) -> str:
        agree = ", ".join(f"{one:.2f}" for one in self.agreement)
        return (
            f"{self.out}: {len(self.components)} components of {len(self.particles)} particles; the halves support "
            f"{int(self.supported.sum())} (correlations {agree})"
        )


@dataclass(frozen=True)
class State:
    """All that one iteration hands to the next.

    volumes: (2, q, d, d, d) float32, the mean and the loadings of each half, in the working box; noise_power: (2, G,
    shell_max + 1); contrast_sd: (2,), of the images' contrasts; correlation: (q, shell_max + 1) between the halves;
    cosine, angles: (K,), as in
    `steps.variability.Canonical`; stage: mean, apart, joint or done; of_stage: iterations done of it.
    """

    iteration: int
    stage: str
    of_stage: int
    volumes: np.ndarray
    noise_power: np.ndarray
    contrast_sd: np.ndarray
    correlation: np.ndarray
    cosine: np.ndarray
    angles: np.ndarray


_ARRAYS = ("volumes", "noise_power", "contrast_sd", "correlation", "cosine", "angles")
_FIGURES = ("stage", "of_stage")


@dataclass(frozen=True)
class _Job:
    """What stays the same. masks: (q, d, d, d), of the mean and of each component; first_shell: of the components."""

    options: VariabilityOptions
    data: Dataset
    shell_max: int
    first_shell: int
    box_px: int
    masks: np.ndarray
    mask: np.ndarray
    shards: tuple[list[Shard], list[Shard]]
    scratch: Path

    @property
    def pixel_size_A(self) -> float:
        return self.data.store.pixel_size_A


class _Source(NamedTuple):
    """The store, and for a run the rows of its particles in that and what it found of them."""

    store: Store
    rows: np.ndarray | None
    columns: dict[str, np.ndarray]
    symmetry: str


def analyse(options: VariabilityOptions, *, progress: Progress = print) -> VariabilityResult:
    """Analyse; see `VariabilityOptions`. InputError for bad input, before work starts.

    A finished run is read back where it is resumed.
    """
    check_kind(options.cluster)
    source = _source(options.source)
    mask, diameter = load_mask(source.store, options.mask_diameter_A, options.mask)
    shell_max, first_shell = _band(options, source.store)
    if source.rows is None and not load_dataset(source.store.path, options.seed).has_poses:
        raise InputError(f"{options.source}: the particles have no poses (rlnAngleRot, ...); refine them first")
    inputs: list[Path] = [source.store.path]
    inputs += [options.source / "particles.star"] if source.rows is not None else []
    inputs += [options.mask] if options.mask else []
    run = Run.start(
        options.out, "variability", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    )
    if run.finished:
        return _read(run)
    with run, em.scratch(run.path) as scratch, connect(options.cluster, options.workers) as cluster:
        data = load_dataset(_posed(source, run.path).path, options.seed)
        job = _planned(options, data, mask, diameter, shell_max, first_shell, scratch)
        run.quarantine(data.store.quarantined)
        if options.mask is None:
            progress("no --mask: one that leaves out the solvent finds much weaker variability than a sphere does")
        progress(
            f"{len(data.particles)} particles, {options.components} components from {job.box_px} px volumes up to "
            f"{shells.resolution_A(shell_max, data.store.box_px, job.pixel_size_A):.1f} A, on {cluster.description}"
        )
        if source.symmetry.upper() != "C1":
            progress(
                f"the poses are those of {source.symmetry}: expand the particles, or variability of one copy blurs"
            )
        volumes = options.components + 1
        task_bytes = max(
            shard_bytes(job.box_px, data.store.box_px, shell_max, volumes),
            back_projection_bytes(data.store.box_px) if options.bins else 0,
        )
        check_memory(cluster, data.store.box_px, task_bytes, 1)
        power = _pack(job, run, cluster)
        state = _latest(run) or _first_state(job, power)
        while state.stage != "done":
            state = _iterate(job, state, cluster, run, progress)
            run.save_checkpoint(
                state.iteration,
                {name: getattr(state, name) for name in _ARRAYS},
                {name: getattr(state, name) for name in _FIGURES},
            )
        return _write(job, state, run, cluster, progress)


def _source(path: Path) -> _Source:
    if is_store(path):
        return _Source(open_store(path), None, {}, "C1")
    run = Run.open(path)
    table = path / "particles.star"
    if not run.finished or not table.is_file():
        raise InputError(f"{path}: not a finished run with particles.star, a store or a selection")
    particles, store, rows = open_particles(path)
    if not posed(path, particles):
        raise InputError(f"{path}: its particles have no poses in space; give a run of refine")
    names = ["rotation", "origin_A", "half", "ctf_scale"]
    if run.record["job"] == "refine":
        names.append("norm_correction")
    columns = {name: particles[name] for name in names if name in particles}
    return _Source(store, rows, columns, str(run.record["options"].get("symmetry", "C1")))


def _posed(source: _Source, out: Path) -> Store:
    """The particles with the poses of their run, as a selection in the run's directory."""
    if source.rows is None:
        return source.store
    path = out / "posed.zarr"
    return open_store(path) if is_store(path) else select(source.store, source.rows, path, source.columns)


def _band(options: VariabilityOptions, store: Store) -> tuple[int, int]:
    """First and last shell of the components. InputError where there is nothing between them."""
    box, pixel = store.box_px, store.pixel_size_A
    limit = options.resolution_limit_A or 6 * pixel
    last = min(shells.shell_at(limit, box, pixel), (box - 1) // 2)
    first = 1 + shells.shell_at(options.highpass_A, box, pixel) if options.highpass_A else 0
    if last < 3 or first > last - 2:
        raise InputError(
            f"--resolution-limit {limit:g} A leaves the shells {first} to {last} of a box of {box * pixel:g} A; "
            "expected three or more. Give a finer limit, or a coarser --highpass"
        )
    return last, first


def _planned(
    options: VariabilityOptions, data: Dataset, mask: np.ndarray, diameter_A: float, shell_max: int, first_shell: int,
    scratch: Path,
) -> _Job:  # fmt: skip
    full, pixel = data.store.box_px, data.store.pixel_size_A
    box = min(full, 2 * int(np.ceil(_WORKING_BOX * shell_max / 2)))
    sphere = masks.sphere(full, diameter_A / pixel, mask_edge_px(pixel))
    small = [np.clip(filters.rescale_volume(one, box), 0, 1) for one in (sphere, mask)]
    of_each = np.stack([small[0]] + [small[1]] * options.components)
    norm = np.ones(len(data.particles))
    if "norm_correction" in data.particles and data.store.path.name == "posed.zarr":
        norm = data.particles["norm_correction"]
        norm = norm / np.sqrt(np.mean(norm**2))
    ones = np.ones(len(norm))
    cut = [cut_shards(data, half, norm, ones, data.rotation, data.origin_px, ones > 0) for half in (1, 2)]
    return _Job(options, data, shell_max, first_shell, box, of_each, mask, (cut[0], cut[1]), scratch)


def _latest(run: Run) -> State | None:
    found = run.latest_checkpoint()
    if found is None:
        return None
    iteration, arrays, figures = found
    return State(iteration, **arrays, **figures)  # type: ignore[arg-type]


def _pack(job: _Job, run: Run, cluster: Cluster) -> np.ndarray:
    """Leave every image, packed, in the scratch directory. Returns the mean power of each half, (2, G, shells)."""
    tasks = [
        [
            graph.call(pack_shard, shard, job.data.n_groups, job.shell_max, job.scratch, name=f"pack-{shard.name}")
            for shard in own
        ]
        for own in job.shards
    ]
    powers = []
    for half, outs in enumerate(graph.compute(tasks, cluster), start=1):
        run.quarantine(left_out_rows(job.data, half, [out[2] for out in outs]))
        total, count = sum(out[0] for out in outs), sum(out[1] for out in outs)
        if not count.sum():
            raise RunError(f"no image of half {half} can be used; see the quarantined particles")
        overall = total.sum(axis=0) / count.sum()
        powers.append(np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], overall))
    return np.stack(powers)


def _first_state(job: _Job, power: np.ndarray) -> State:
    count, volumes = job.options.components, job.options.components + 1
    return State(
        iteration=0,
        stage="mean",
        of_stage=0,
        volumes=np.zeros((2, volumes, *(job.box_px,) * 3), dtype=np.float32),
        noise_power=power,
        contrast_sd=np.full(2, _CONTRAST_SD if job.options.contrast else 0.0),
        correlation=np.zeros((volumes, job.shell_max + 1)),
        cosine=np.zeros(count),
        angles=np.zeros(count),
    )


def _iterate(job: _Job, state: State, cluster: Cluster, run: Run, progress: Progress) -> State:
    """One iteration of whatever stage it is."""
    started = time.monotonic()
    used = 1 if state.stage == "mean" else len(job.masks)
    found, residual, updated, correlation = _expected_and_maximised(job, state, used, cluster)
    if not (np.isfinite(updated).all() and np.any(updated)):
        raise RunError(f"iteration {state.iteration + 1} gave volumes that are empty or not finite")
    noise = state.noise_power.copy()
    for half, (power, count) in enumerate(residual):
        seen = count > 0
        mean_power = power[seen] / count[seen, None]
        noise[half, seen] = np.maximum(mean_power, _LEAST_NOISE * mean_power.mean(axis=1, keepdims=True))
    volumes, contrast_sd = state.volumes.copy(), state.contrast_sd.copy()
    volumes[:, :used] = updated
    if state.iteration > 0 and not _drawing(state):
        of_halves = [steps.spread(one) for one in found]
        if state.stage == "joint":
            one, other = of_halves
            both = steps.Spread(one.images + other.images, one.first + other.first, one.second + other.second)
            of_halves = [both, both]
        for half, over in enumerate(of_halves):
            volumes[half, :used], contrast_sd[half] = steps.expanded(volumes[half, :used], over)
    cosine, angles = state.cosine, state.angles
    change = 1.0
    if used > 1:
        change = 1 - min(steps.settled(*pair) for pair in zip(state.volumes[:, 1:], volumes[:, 1:], strict=True))
    if state.stage == "apart":
        paired = steps.canonical(volumes[0, 1:], volumes[1, 1:])
        volumes[0, 1:], volumes[1, 1:] = paired.first, paired.second
        cosine, angles = paired.cosine, paired.angles
    state = _next_stage(
        job,
        replace(
            state,
            iteration=state.iteration + 1,
            of_stage=state.of_stage + 1,
            volumes=volumes,
            noise_power=noise,
            contrast_sd=contrast_sd,
            correlation=correlation if state.stage != "joint" else state.correlation,
            cosine=cosine,
            angles=angles,
        ),
        change,
    )
    usable = [one.gain[one.usable] for one in found]
    figures = {
        "iteration": state.iteration,
        "change": change,
        "gain": float(np.mean(np.concatenate(usable))),
        "agreement": cosine,
        "contrast_sd": float(contrast_sd.mean()),
        "seconds": round(time.monotonic() - started, 2),
    }
    run.iteration(figures)
    agree = " ".join(f"{one:.2f}" for one in cosine)
    progress(f"iteration {state.iteration}: halves agree by {agree}, change {change:.4f}, {figures['seconds']:.1f} s")
    return state


def _drawing(state: State) -> bool:
    """Whether coordinates are drawn at random, for components to start from."""
    return state.stage == "apart" and state.of_stage == 0


def _next_stage(job: _Job, state: State, change: float) -> State:
    """The state with the stage of the next iteration."""
    done = state.of_stage
    if state.stage == "mean" and done == _MEAN:
        return replace(state, stage="apart", of_stage=0)
    settled = change < _SETTLED and done >= _LEAST_APART
    if state.stage == "apart" and (done >= job.options.iterations or settled):
        joined = np.mean(state.volumes, axis=0, dtype=np.float64).astype(np.float32)
        return replace(state, stage="joint", of_stage=0, volumes=np.stack([joined, joined]))
    if state.stage == "joint" and done == _JOINT:
        return replace(state, stage="done")
    return state


def _setting(job: _Job, state: State, half: int, used: int) -> Setting:
    # In the first iteration there is no mean yet that could have a contrast.
    contrast_sd = float(state.contrast_sd[half]) if state.iteration > 0 else 0.0
    # The mean of an image is its normalisation's more than the molecule's.
    first_shell = max(job.first_shell, 1) if used > 1 else 0
    return Setting(state.noise_power[half], job.shell_max, first_shell, contrast_sd, job.box_px)


def _expected_and_maximised(
    job: _Job, state: State, used: int, cluster: Cluster
) -> tuple[list[Found], list, np.ndarray, np.ndarray]:
    """What the expectation finds of each half, sums and counts of residuals, the next volumes (2, q, d, d, d) and the
    correlation between the halves (q, shell_max + 1)."""
    found, residuals, sums = [], [], []
    for half, shards in enumerate(job.shards):
        volumes = state.volumes[half, :used]
        path = job.scratch / f"volumes{half + 1}.npy"
        prepared = graph.call(write_volumes, volumes, job.shell_max, path, name=f"volumes-{half + 1}")
        setting, outs = _setting(job, state, half, used), []
        for shard in shards:
            drawn = _drawn(job, state, shard) if _drawing(state) else None
            outs.append(
                graph.call(
                    expect_shard,
                    shard,
                    job.scratch,
                    prepared,
                    setting,
                    drawn,
                    name=f"expect-{shard.name}",
                    parts=4,
                )
            )
        totals = [graph.tree_sum([out[part] for out in outs], name=f"half{half + 1}-part{part}") for part in range(3)]
        sums.append(totals[0])
        residuals.append(totals[1:])
        found.append([out[3] for out in outs])
    own = job.masks[:used]
    if state.stage == "joint":
        both = graph.call(kernel.complete, graph.tree_sum(sums, name="joint"), used, name="complete-joint")
        agreement = np.maximum(state.correlation, 0)
        made = graph.call(
            steps.regularised_volumes,
            both,
            state.volumes[0],
            2 * agreement / (1 + agreement),
            own,
            job.first_shell,
            name="joint-volumes",
        )
        updated, correlation = [made, made], state.correlation
    else:
        complete = [
            graph.call(kernel.complete, one, used, name=f"complete-{half + 1}") for half, one in enumerate(sums)
        ]
        plain = [
            graph.call(steps.plain_volumes, one, state.volumes[half, :used], job.shell_max, name=f"plain-{half + 1}")
            for half, one in enumerate(complete)
        ]
        correlation = graph.call(steps.correlations, *plain, own, job.shell_max, name="correlation")
        floored = graph.call(_at_least, correlation, _floor(state), name="prior")
        updated = [
            graph.call(
                steps.regularised_volumes,
                one,
                state.volumes[half, :used],
                floored,
                own,
                job.first_shell,
                name=f"regularise-{half + 1}",
            )
            for half, one in enumerate(complete)
        ]
    values = graph.compute((found, residuals, updated, correlation), cluster)
    together = [Found(*(np.concatenate(column) for column in zip(*of_half, strict=True))) for of_half in values[0]]
    every = np.zeros_like(state.correlation)
    every[: len(values[3])] = values[3]
    return together, values[1], np.stack(values[2]), every


def _drawn(job: _Job, state: State, shard: Shard) -> np.ndarray:
    return np.stack(
        [generator(job.options.seed, "coordinates", row).standard_normal(job.options.components) for row in shard.rows]
    )


def _floor(state: State) -> float:
    """Least correlation between halves that priors of components are made of, which have still to form."""
    return _FIRST_AGREEMENT * _FADING**state.of_stage if state.stage == "apart" else 0.0


def _at_least(correlation: np.ndarray, floor: float) -> np.ndarray:
    """The task: correlations (q, S), those of the components no less than a floor."""
    out = correlation.copy()
    out[1:] = np.maximum(out[1:], floor)
    return out


def _write(job: _Job, state: State, run: Run, cluster: Cluster, progress: Progress) -> VariabilityResult:
    """Coordinates of all particles by the joint model, and the files."""
    out, options, box, pixel = run.path, job.options, job.data.store.box_px, job.pixel_size_A
    found = _coordinates(job, state, cluster)
    mean_map = steps.in_box(state.volumes[0, 0], box)
    made = steps.principal(np.stack([steps.in_box(one, box) for one in state.volumes[0, 1:]]))
    contrast = np.maximum(1 + found.mean[:, 0], _LEAST_CONTRAST)
    # What is fitted to an image is its contrast times the coordinate of the molecule.
    coordinates = found.mean[:, 1:] @ made.turn.T / contrast[:, None]
    covariance = found.covariance[:, 1:, 1:]
    sd = np.sqrt(np.einsum("kl,nlm,km->nk", made.turn, covariance, made.turn)) / contrast[:, None]
    used, classes = found.usable, _clusters(options, coordinates, found.usable)
    mrc.write_map(out / "mean.mrc", mean_map, pixel)
    mrc.write_map(out / "mask.mrc", job.mask, pixel)
    for number, component in enumerate(made.volumes, start=1):
        mrc.write_map(out / f"component{number}.mrc", component, pixel)
    names = ("mean", *(f"component{number}" for number in range(1, options.components + 1)))
    # Of pairs of the halves' loadings, the components are made.
    agreement, of_pairs = made.share @ state.cosine, made.share @ state.correlation[1:]
    write_curves(out / "halves.csv", box, pixel, dict(zip(names, [state.correlation[0], *of_pairs], strict=True)))
    known = _known(sd[used], made.sd)
    labels = {f"{LABEL}{number}": np.char.mod("%.6g", column) for number, column in enumerate(coordinates.T, start=1)}
    particles = replace(
        job.data.particles.replace(
            half=job.data.halves, class_number=classes, ctf_scale=job.data.ctf.ctf_scale * contrast
        ),
        extra={**job.data.particles.extra, **labels},
    ).take(used)
    star.write_particles(out / "particles.star", particles, None)
    _write_coordinates(out / "coordinates.csv", particles, coordinates[used], sd[used], contrast[used])
    (out / SERIES).mkdir(exist_ok=True)
    figures: list[dict[str, Any]] = []
    for number, component in enumerate(made.volumes):
        places = _places(coordinates[used, number], options.frames)
        for frame, place in enumerate(places, start=1):
            name = out / SERIES / f"component{number + 1}_{frame:03d}.mrc"
            mrc.write_map(name, mean_map + np.float32(place) * component, pixel)
        figures.append({"places": places})
        if options.bins:
            progress(f"component {number + 1}: reconstructing {options.frames} bins")
            binned = _reconstructed(job, coordinates[:, number], places, found.usable, contrast, cluster)
            for frame, one in enumerate(binned, start=1):
                mrc.write_map(out / SERIES / f"bins{number + 1}_{frame:03d}.mrc", one[0], pixel)
            figures[-1] |= {"bin_particles": [one[2] for one in binned], "bin_resolution_A": [one[1] for one in binned]}
    run.done(
        {
            "particles": int(used.sum()),
            "components": options.components,
            "supported": (agreement >= SUPPORTED) & (known >= _LEAST_KNOWN),
            "agreement": agreement,
            "known": known,
            "principal_angle_cosines": state.angles,
            "sd": made.sd,
            "variance_share": made.sd**2 / max(np.sum(made.sd**2), 1e-30),
            "variance_of_mean": np.sum(made.sd**2) / float(np.sum(mean_map.astype(np.float64) ** 2)),
            "contrast_sd": float(np.mean(state.contrast_sd)),
            "resolution_limit_A": shells.resolution_A(job.shell_max, box, pixel),
            "box_px": box,
            "pixel_size_A": pixel,
            "clusters": np.bincount(classes[used], minlength=options.clusters + 1)[1:],
            "series": figures,
        }
    )
    return _read(run)


def _known(sd: np.ndarray, prior_sd: np.ndarray) -> np.ndarray:
    """Part of the variance of each component, (K,), that images know: 1 less that of their coordinates' posteriors.

    sd: (n, K) of those; prior_sd: (K,)."""
    left = np.mean(sd**2, axis=0) / np.maximum(prior_sd**2, 1e-30)
    return np.where(prior_sd > 1e-12 * max(prior_sd.max(), 1e-30), np.clip(1 - left, 0, 1), 0)


def _coordinates(job: _Job, state: State, cluster: Cluster) -> Found:
    """What the joint model says of every particle, in the order of the store."""
    tasks = []
    for half, shards in enumerate(job.shards):
        path = job.scratch / f"volumes{half + 1}.npy"
        prepared = graph.call(write_volumes, state.volumes[half], job.shell_max, path, name=f"volumes-{half + 1}")
        setting = _setting(job, state, half, len(job.masks))
        tasks.append(
            [
                graph.call(
                    find_shard,
                    shard,
                    job.scratch,
                    prepared,
                    setting,
                    name=f"coordinates-{shard.name}",
                )
                for shard in shards
            ]
        )
    outs = [one for of_half in graph.compute(tasks, cluster) for one in of_half]
    order = np.argsort(np.concatenate([shard.rows for own in job.shards for shard in own]))
    return Found(*(np.concatenate(column)[order] for column in zip(*outs, strict=True)))


def _clusters(options: VariabilityOptions, coordinates: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Class of each particle, from 1 along the first component, (n,) int32: k-means of the coordinates."""
    classes = np.ones(len(coordinates), dtype=np.int32)
    if options.clusters > 1:
        if usable.sum() < options.clusters:
            raise RunError(
                f"{usable.sum()} particles cannot be grouped into {options.clusters} clusters; ask for fewer"
            )
        random = generator(options.seed, "clusters", 0)
        centres, label = scipy.cluster.vq.kmeans2(coordinates[usable], options.clusters, minit="++", rng=random)
        classes[usable] = 1 + np.argsort(np.argsort(centres[:, 0], kind="stable"))[label]
    return classes


def _write_coordinates(
    path: Path, particles: Particles, coordinates: np.ndarray, sd: np.ndarray, contrast: np.ndarray
) -> None:
    count = coordinates.shape[1]
    names = [f"component{number}{suffix}" for number in range(1, count + 1) for suffix in ("", "_sd")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["particle", "image", "micrograph", "half", "contrast", "cluster", *names])
    micrographs = particles["micrograph"] if "micrograph" in particles else np.full(len(particles), "")
    numbers = np.stack([coordinates, sd], axis=2).reshape(len(coordinates), -1)
    for row in range(len(particles)):
        image = f"{particles['image_index'][row] + 1:06d}@{particles['image_path'][row]}"
        writer.writerow(
            [row + 1, image, micrographs[row], particles["half"][row], f"{contrast[row]:.5g}",
             particles["class_number"][row], *(f"{number:.6g}" for number in numbers[row])]
        )  # fmt: skip
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def _places(coordinate: np.ndarray, frames: int) -> np.ndarray:
    """Places along a component, from its 5th to its 95th percentile."""
    low, high = np.percentile(coordinate, _PERCENTILES).tolist()
    return np.linspace(low, high, frames)


def _reconstructed(
    job: _Job, coordinate: np.ndarray, places: np.ndarray, usable: np.ndarray, contrast: np.ndarray, cluster: Cluster
) -> list[tuple[np.ndarray, float, float]]:
    """A map, its resolution by FSC 0.143 of its halves, and the number of its particles, for each place along a
    component: particles count by how near they are, to nothing at the next place."""
    nyquist, mask, tasks, counts = job.data.store.box_px // 2, job.mask, [], []
    step = max(float(places[1] - places[0]), 1e-30)
    for frame, place in enumerate(places):
        share = np.where(usable, np.clip(1 - np.abs(coordinate - place) / step, 0, 1), 0)
        counts.append(float(share.sum()))
        volumes = []
        for half, shards in enumerate(job.shards):
            some = [shard for shard in shards if np.any(share[shard.rows] > 0)]
            if not some:
                break
            outs = [
                graph.call(
                    bin_shard,
                    shard,
                    share[shard.rows],
                    contrast[shard.rows],
                    name=f"bin{frame}-{shard.name}",
                    parts=len(em.slab_bounds(nyquist, len(mask))),
                )
                for shard in some
            ]
            slabs = range(len(em.slab_bounds(nyquist, len(mask))))
            volumes.append(
                [graph.tree_sum([out[part] for out in outs], name=f"bin{frame}-half{half}-{part}") for part in slabs]
            )
        made = em.maximise(volumes, None, operators("C1"), nyquist, mask, merge=True) if len(volumes) == 2 else None
        tasks.append(None if made is None else (made.merged, made.fsc))
    out = []
    for made, count in zip(graph.compute(tasks, cluster), counts, strict=True):
        if made is None:
            out.append((np.zeros_like(mask), float("inf"), count))
            continue
        resolution = fsc.resolution_at(made[1].masked, fsc.GOLD_STANDARD, len(mask), job.pixel_size_A)
        out.append((made[0], resolution, count))
    return out


def _read(run: Run) -> VariabilityResult:
    """The result of a run that is done."""
    result: dict[str, Any] = run.record["result"]
    numbers = range(1, result["components"] + 1)
    with (run.path / "coordinates.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = [
        np.array([[float(row[f"component{k}{suffix}"]) for k in numbers] for row in rows]) for suffix in ("", "_sd")
    ]
    return VariabilityResult(
        out=run.path,
        mean=mrc.read_map(run.path / "mean.mrc").array,
        components=np.stack([mrc.read_map(run.path / f"component{k}.mrc").array for k in numbers]),
        coordinates=columns[0],
        sd=columns[1],
        particles=star.read_particles(run.path / "particles.star"),
        agreement=np.array(result["agreement"]),
        supported=np.array(result["supported"]),
    )
