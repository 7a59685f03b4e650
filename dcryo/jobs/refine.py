"""Gold-standard refinement: poses and a map from particles and a first, low-passed reference.

Each half of the particles has its own reference, noise spectra and norms; the halves meet only in the Fourier shell
correlation of their maps, which sets the prior, the resolution that the next iteration uses and, with it, the
sampling (Scheres & Chen 2012).
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from dcryo import graph
from dcryo.cluster import Cluster, check_kind, connect
from dcryo.data import star
from dcryo.data.curves import write_curves
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.errors import InputError, RunError
from dcryo.jobs import em
from dcryo.jobs.back_projection import maps_of
from dcryo.jobs.dataset import Dataset, cut_shards, left_out_rows, load_dataset, load_mask, load_reference
from dcryo.jobs.memory import check_memory, expectation_bytes
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, SeedOptions, argument
from dcryo.jobs.outputs import read_maps, write_maps
from dcryo.kernels import filters, fsc, rotations, sampling
from dcryo.kernels.hold import shares
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import resolution_A, shell_at
from dcryo.kernels.symmetry import operators
from dcryo.steps import maximisation
from dcryo.steps.maximisation import HalfFsc
from dcryo.steps.search import Search, Surroundings, plan_local, plan_search

# Shells beyond the resolution that are back-projected too, so that the FSC can grow into them.
_HEADROOM_SHELLS, _HEADROOM = 12, 0.5
# A resolution is better only by more than this many shells, an FSC only if its sum over shells grows by more than this
# part, poses are surer only if their mean probability grows by more than this (that of weak images does so for long
# before the resolution moves); after so many iterations without any, the run has converged.
_PROGRESS_SHELLS, _PROGRESS_FSC, _PROGRESS_PROBABILITY = 0.5, 0.005, 0.01
_PATIENCE, _PATIENCE_AT_NYQUIST = 2, 1
_ALL_BUT_NYQUIST = 0.95
# And the poses turn by less than this part of their uncertainty, or it is not for want of patience.
_SETTLED, _LONG_PATIENCE = 0.5, 6
# Where a symmetry is relaxed, poses are settled when less than this part of them turns by as much as between mates.
_TO_A_MATE_DEG, _MOVING = 10.0, 0.03
# How far poses may be off in a local refinement, where the user does not say.
_ANGLE_SD_DEG, _SHIFT_SD_A = 5.0, 5.0
# Symmetry mates are told apart at temperatures from this part of the log-likelihood down, each that much of the last.
_HEAT, _COOLING, _ALIKE = 0.1, 0.7, 1e6
# A pose of this probability is searched for in its surroundings alone, once the resolution allows.
_TRUSTED = 0.95


class RefineOptions(OutOptions, ClusterOptions, SeedOptions):
    """Refine poses and a map against a first reference, two halves of the particles apart from each other.

    Writes half1.mrc and half2.mrc (unfiltered), map.mrc, mask.mrc, fsc.csv, fsc.xml, spectra.csv, particles.star and
    a report.
    """

    store: Path = argument("store of particles")
    reference: Path | None = Field(
        None,
        description="first reference: a map, on any grey scale, white on dark; it is low-passed (default with --local "
        "and --relax: the maps of the poses that the particles came with)",
    )
    symmetry: str = Field("C1", description="point group: Cn, Dn, T, O, I1, I2, I3 or I4")
    mask_diameter_A: float | None = Field(
        None, gt=0, description="diameter of the particle and of the soft spherical mask (default: 0.85 of the box)"
    )
    mask: Path | None = Field(None, description="solvent mask (map of 0 to 1) in place of the sphere")
    initial_lowpass_A: float = Field(
        40.0, gt=0, allow_inf_nan=False, description="low-pass filter of the first reference"
    )
    shift_range_A: float | None = Field(
        None, gt=0, description="how far particles may lie from their last centre (default: 0.1 of the diameter)"
    )
    local: bool = Field(
        False, description="look only around the poses that the particles came with, which a Gaussian prior holds there"
    )
    angle_sd_deg: float | None = Field(
        None, gt=0, le=90, description="standard deviation of that prior, about each axis (default: 5)"
    )
    shift_sd_A: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the same of shifts, along x and y (default: 5)"
    )
    relax: str | None = Field(
        None,
        description="point group that poses were found with, but that may be broken: the map is C1, and each pose is "
        "looked for around its symmetry mates too",
    )
    non_uniform: bool = Field(False, description="filter references place by place, as their halves predict each other")
    max_iterations: int = Field(30, gt=0, description="stop here even if the run has not converged")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reference is None and not self.near:
            raise ValueError(
                "a search everywhere starts from a reference; give that, or local for poses that are known"
            )
        for name in ("angle_sd_deg", "shift_sd_A"):
            if getattr(self, name) is not None and not self.local:
                raise ValueError(f"{name} is of the prior of a local refinement; give local too")
        if self.relax is not None and self.symmetry.upper() != "C1":
            raise ValueError("relax looks for what breaks a symmetry, so the map is C1; give one of relax and symmetry")
        if self.near and self.shift_range_A is not None:
            raise ValueError("shift_range_A is of a search everywhere; local takes shift_sd_A")
        return self

    @property
    def near(self) -> bool:
        """Whether the search starts from the poses that the particles came with."""
        return self.local or self.relax is not None


@dataclass(frozen=True)
class RefineResult:
    """A finished refinement. resolution_A: by FSC 0.143 under the mask; out: the run directory."""

    out: Path
    resolution_A: float
    iterations: int
    half_maps: tuple[np.ndarray, np.ndarray]
    map: np.ndarray
    fsc: HalfFsc
    particles: Particles

    def summary(self) -> str:
        return f"{self.out}: {self.resolution_A:.2f} A by FSC 0.143 of the half maps, {self.iterations} iterations"


@dataclass(frozen=True)
class State:
    """All that one iteration hands to the next; an iteration is a function of this, the data and the options.

    references: (2, D, D, D) float32, not masked; noise_power: (2, G, D // 2 + 1); fsc: (D // 2 + 1,) under the mask;
    rotation (n, 3, 3), origin_px (n, 2), norm, scale, log_likelihood, max_probability, significant (n,): of all
    particles; shell: resolution of the next search; posed_shell: that of the last; best_shell: finest crossing so far;
    best_fsc: sum of the FSC at the last progress; stalled: iterations since; last: the next iteration is the final one.
    """

    iteration: int
    references: np.ndarray
    noise_power: np.ndarray
    fsc: np.ndarray
    rotation: np.ndarray
    origin_px: np.ndarray
    norm: np.ndarray
    scale: np.ndarray
    log_likelihood: np.ndarray
    max_probability: np.ndarray
    significant: np.ndarray
    shell: int
    posed_shell: int
    best_shell: float
    best_fsc: float
    stalled: int
    last: bool


_OF_PARTICLES = ("rotation", "origin_px", "norm", "scale", "log_likelihood", "max_probability", "significant")
_ARRAYS = ("references", "noise_power", "fsc", *_OF_PARTICLES)
_FIGURES = ("shell", "posed_shell", "best_shell", "best_fsc", "stalled", "last")


@dataclass(frozen=True)
class _Job:
    """What stays the same through a refinement. surroundings: of a search around the poses that particles came with,
    None for one everywhere."""

    options: RefineOptions
    data: Dataset
    mask: np.ndarray
    diameter_A: float
    operators: np.ndarray
    surroundings: Surroundings | None
    scratch: Path

    @property
    def mates(self) -> np.ndarray | None:
        """Operators of a symmetry that is relaxed, (G, 3, 3); None where none is."""
        near = self.surroundings
        return None if near is None or len(near.mates) == 1 else near.mates

    @property
    def places(self) -> int:
        """In how many places of the map an image has its share: of a symmetry that is relaxed, most of what holds a
        pose is common to its mates."""
        return len(self.operators) * (1 if self.mates is None else len(self.mates))

    @property
    def box_px(self) -> int:
        return self.data.store.box_px

    @property
    def pixel_size_A(self) -> float:
        return self.data.store.pixel_size_A


def refine(options: RefineOptions, *, progress: Progress = print) -> RefineResult:
    """Refine; see `RefineOptions`. InputError for bad input, before work starts; RunError where a run fails.

    A finished run is read back where it is resumed.
    """
    check_kind(options.cluster)
    group = operators(options.symmetry)
    data = load_dataset(options.store, options.seed)
    mask, diameter = load_mask(data.store, options.mask_diameter_A, options.mask)
    reference = None if options.reference is None else load_reference(data.store, options.reference)
    _check_shift_range(data, options.shift_range_A)
    surroundings = _surroundings(options, data)
    inputs = [path for path in (options.store, options.reference, options.mask) if path]
    run = Run.start(
        options.out, "refine", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    )
    if run.finished:
        return _read(run)
    with run, em.scratch(run.path) as scratch, connect(options.cluster, options.workers) as cluster:
        job = _Job(options, data, mask, diameter, group, surroundings, scratch)
        run.quarantine(data.store.quarantined)
        progress(
            f"{len(data.particles)} particles, box {job.box_px} px of {job.pixel_size_A:g} A, {options.symmetry}, "
            f"diameter {diameter:.0f} A, on {cluster.description}"
        )
        state = _latest(run) or _first_state(job, reference, cluster)
        task_bytes = expectation_bytes(job.box_px, job.box_px // 2, _searches(job, state)[0], len(group))
        check_memory(cluster, job.box_px, task_bytes, len(group))
        while True:
            final = state.last
            state, made = _iterate(job, state, cluster, run, progress)
            if final:
                break
            run.save_checkpoint(
                state.iteration,
                {name: getattr(state, name) for name in _ARRAYS},
                {name: getattr(state, name) for name in _FIGURES},
            )
        return _write(job, state, made, run)


def _check_shift_range(data: Dataset, shift_range_A: float | None) -> None:
    half = data.store.box_px * data.store.pixel_size_A / 2
    if shift_range_A is not None and shift_range_A > half:
        raise InputError(f"--shift-range {shift_range_A:g} A: expected at most half the box, {half:g} A")


def _surroundings(options: RefineOptions, data: Dataset) -> Surroundings | None:
    if not options.near:
        return None
    if not data.has_poses:
        raise InputError(
            f"{options.store}: the particles have no poses (rlnAngleRot, ...) to look around; dcryo expand RUN "
            "--symmetry C1 makes a selection with those of a run"
        )
    mates = operators(options.relax or "C1")
    if not options.local:
        return Surroundings(mates=mates)
    return Surroundings(options.angle_sd_deg or _ANGLE_SD_DEG, options.shift_sd_A or _SHIFT_SD_A, mates)


def _latest(run: Run) -> State | None:
    found = run.latest_checkpoint()
    if found is None:
        return None
    iteration, arrays, figures = found
    return State(iteration, **arrays, **figures)  # type: ignore[arg-type]


def _first_state(job: _Job, reference: np.ndarray | None, cluster: Cluster) -> State:
    """The low-passed reference, or that of the poses that are there; those, or none; and the mean power of the images
    as noise."""
    data, options = job.data, job.options
    n = len(data.particles)
    noise = em.first_noise(data, cluster)
    if reference is None:
        references, curve = _maps_of_given_poses(job, cluster)
        shell = int(fsc.crossing(curve, fsc.GOLD_STANDARD))
    else:
        lowpassed = filters.lowpass(reference, job.pixel_size_A, options.initial_lowpass_A)
        references, curve = np.stack([lowpassed, lowpassed]), np.zeros(job.box_px // 2 + 1)
        shell = shell_at(options.initial_lowpass_A, job.box_px, job.pixel_size_A)
    near = job.surroundings
    known = 0 if near is None else near.known_shell(job.box_px, job.pixel_size_A, job.diameter_A)
    return State(
        iteration=0,
        references=references,
        noise_power=noise,
        fsc=curve,
        rotation=np.tile(np.eye(3), (n, 1, 1)) if near is None else data.rotation,
        origin_px=np.zeros((n, 2)) if near is None else data.origin_px,
        norm=np.ones(n),
        scale=np.ones(n),
        log_likelihood=np.zeros(n),
        max_probability=np.zeros(n),
        significant=np.zeros(n, dtype=np.int64),
        shell=max(shell, 1),
        posed_shell=min(known, max(shell, 1)),
        best_shell=0.0,
        best_fsc=0.0,
        stalled=0,
        last=options.max_iterations == 1,
    )


def _maps_of_given_poses(job: _Job, cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
    """The regularised map of each half, (2, D, D, D), from the poses that the particles came with, and the FSC under
    the mask. Of a symmetry that is relaxed it is made with it: which mate of a pose a particle came with says
    nothing."""
    group = job.operators if job.mates is None else job.mates
    maps, _ = graph.compute(maps_of(job.data, group, job.mask, job.scratch, merge=False), cluster)
    references = np.stack(maps.regularised)
    if not (np.isfinite(references).all() and references.any()):
        raise RunError("the poses of the particles make an empty or not finite map; see the quarantined particles")
    return references, maps.fsc.masked


def _searches(job: _Job, state: State) -> tuple[Search, Search]:
    """The search everywhere, and that of particles whose poses can be trusted: nearby, once the resolution allows."""

    held = shares(state.fsc, float(job.mask.mean()), len(state.norm) / 2 * job.places)[None]
    unknown_scale = state.iteration == 0 and job.options.reference is not None
    if job.surroundings is not None:
        search = plan_local(
            state.shell,
            job.box_px,
            job.pixel_size_A,
            job.diameter_A,
            posed_shell=state.posed_shell,
            shares=held,
            surroundings=job.surroundings,
            operators=job.operators,
            profile_scale=unknown_scale,
            last_temperature=_temperature(job, state),
        )
        return search, search

    def plan(posed_shell: int) -> Search:
        return plan_search(
            state.shell,
            job.box_px,
            job.pixel_size_A,
            job.diameter_A,
            job.options.shift_range_A or 0.1 * job.diameter_A,
            posed_shell=posed_shell,
            shares=held,
            perturbation=turn,
            operators=job.operators,
            profile_scale=unknown_scale,
        )

    # The whole grid is turned anew in each iteration, so that no pose sits on the same grid twice.
    random = generator(job.options.seed, "grid", state.iteration + 1)
    turn = rotations.perturbation(sampling.step_deg(3) / 2, random)
    return plan(0), plan(state.posed_shell)


def _iterate(job: _Job, state: State, cluster: Cluster, run: Run, progress: Progress) -> tuple[State, em.Iteration]:
    """One iteration: expectation, maximisation, what the next one may use, and the record of it."""
    started = time.monotonic()
    number = state.iteration + 1
    nyquist = job.box_px // 2
    headroom = max(_HEADROOM_SHELLS, int(_HEADROOM * state.shell))
    shell_max = nyquist if state.last else min(state.shell + headroom, nyquist)
    searches = _searches(job, state)
    trusted = np.full(len(state.norm), job.surroundings is not None)
    if job.surroundings is None and searches[1].grid_order is None:
        trusted = state.max_probability > _TRUSTED
    made = em.iterate(
        shards=_both(
            cut_shards(job.data, half, state.norm, state.scale, state.rotation, state.origin_px, trusted)
            for half in (1, 2)
        ),
        references=_both([reference * job.mask] for reference in state.references),
        settings=_both(em.Setting(*searches, noise, shell_max) for noise in state.noise_power),
        mask=job.mask,
        scratch=job.scratch,
        cluster=cluster,
        merge=state.last,
        local_filters=job.options.non_uniform,
    )
    for plain in made.classes[0].plain:
        if not (np.isfinite(plain).all() and np.any(plain)):
            raise RunError(f"iteration {number} gave an empty or not finite map; see the quarantined particles")
    updated = _update(job, state, made, shell_max)
    if job.mates is not None and not state.last:
        updated = _relaxed(job, updated, made, job.mates, cluster)
    for half, result in enumerate(made.halves, start=1):
        run.quarantine(left_out_rows(job.data, half, [shard.left_out for shard in result.shards]))
    figures = _figures(job, state, updated, made, shell_max) | {
        "shell_max": state.shell,
        "searched_everywhere": float(np.mean(~trusted)),
        "seconds": round(time.monotonic() - started, 2),
    }
    run.iteration(figures)
    progress(
        f"iteration {number}: {figures['resolution_A']:.2f} A, {100 * figures['searched_everywhere']:.0f} % searched "
        f"everywhere, poses known to {figures['angular_sd_deg']:.2f} deg, {figures['seconds']:.1f} s"
    )
    return updated, made


def _relaxed(job: _Job, state: State, made: em.Iteration, mates: np.ndarray, cluster: Cluster) -> State:
    """The state after an iteration in which a symmetry is relaxed."""
    if state.iteration == 1:
        # The map has the symmetry, and so has all that would come of it.
        task = graph.call(maximisation.broken, made.classes[0].regularised, mates, name="break")
        return replace(state, references=np.stack(graph.compute(task, cluster)), stalled=0)
    task = graph.call(
        maximisation.relaxed, made.classes[0].regularised, made.classes[0].plain, job.mask, mates, name="relax", parts=2
    )
    references, turn = graph.compute([task[0], task[1]], cluster)
    rotation = state.rotation.copy()
    second = job.data.rows_of(2)
    rotation[second] = rotation[second] @ turn.T
    stalled = 0 if _temperature(job, state) > 1 else state.stalled
    return replace(state, references=np.stack(references), rotation=rotation, stalled=stalled)


def _temperature(job: _Job, state: State) -> float:
    """What log-weights of symmetry mates are divided by: first so much that all are alike, then less and less, so that
    the poses fall into what makes most difference, not into what happened to be first (Ueda & Nakano 1998)."""
    if job.mates is None:
        return 1.0
    if state.iteration == 0:
        return _ALIKE
    return max(1.0, _HEAT * float(state.log_likelihood.mean()) * _COOLING ** (state.iteration - 1))


def _both(items) -> tuple:  # type: ignore[no-untyped-def]
    first, second = items
    return first, second


def _update(job: _Job, state: State, made: em.Iteration, shell_max: int) -> State:
    """The state after an iteration."""
    columns = {name: getattr(state, name).copy() for name in _OF_PARTICLES}
    noise = state.noise_power.copy()
    for index, half in enumerate(made.halves):
        rows = job.data.rows_of(index + 1)
        poses = em.all_poses(half.shards)
        usable = rows[poses.usable]
        for name in columns:
            columns[name][usable] = getattr(poses, name)[poses.usable]
        columns["scale"][usable] /= np.mean(columns["scale"][usable])
        columns["norm"][usable] /= np.sqrt(np.mean(columns["norm"][usable] ** 2))
        noise[index] = em.noise_after(noise[index], half.residual, half.particles)
    # Poses that still follow the reference by more than half of what they are known to are not done.
    turned = rotations.angular_distance_deg(columns["rotation"], state.rotation, job.operators)
    settled = bool(np.median(turned) < _SETTLED * _angular_sd_deg(made))
    if job.mates is not None:
        settled = settled and bool(np.mean(turned > _TO_A_MATE_DEG) < _MOVING)
    crossing = _crossing(made, shell_max)
    agreement = float(made.classes[0].fsc.masked[: shell_max + 1].sum())
    better = crossing > state.best_shell + _PROGRESS_SHELLS or agreement > state.best_fsc * (1 + _PROGRESS_FSC)
    surer = columns["max_probability"].mean() > state.max_probability.mean() + _PROGRESS_PROBABILITY
    stalled = 0 if better or surer else state.stalled + 1
    patience = _PATIENCE_AT_NYQUIST if crossing >= _ALL_BUT_NYQUIST * (job.box_px // 2) else _PATIENCE
    converged = stalled >= patience and _temperature(job, state) == 1 and (settled or stalled >= _LONG_PATIENCE)
    number = state.iteration + 1
    return replace(
        state,
        iteration=number,
        references=state.references if made.classes[0].regularised is None else np.stack(made.classes[0].regularised),
        noise_power=noise,
        fsc=made.classes[0].fsc.masked,
        **columns,
        shell=max(int(crossing), shell_at(job.options.initial_lowpass_A, job.box_px, job.pixel_size_A), 1),
        posed_shell=state.shell,
        best_shell=max(state.best_shell, crossing),
        best_fsc=agreement if better else state.best_fsc,
        stalled=stalled,
        last=converged or number + 1 >= job.options.max_iterations,
    )


def _crossing(made: em.Iteration, shell_max: int) -> float:
    """Shell of the gold-standard resolution, among those that were back-projected: a mask spreads power past them."""
    return fsc.crossing(made.classes[0].fsc.masked[: shell_max + 1], fsc.GOLD_STANDARD)


def _angular_sd_deg(made: em.Iteration) -> float:
    """Median over particles of the uncertainty of their rotation."""
    return float(np.median(np.concatenate([em.all_poses(half.shards).angle_sd_deg for half in made.halves])))


def _figures(job: _Job, before: State, after: State, made: em.Iteration, shell_max: int) -> dict:
    turned = rotations.angular_distance_deg(after.rotation, before.rotation, job.operators)
    moved = np.linalg.norm(after.origin_px - before.origin_px, axis=1)
    return {
        "iteration": after.iteration,
        "resolution_A": resolution_A(_crossing(made, shell_max), job.box_px, job.pixel_size_A),
        "angular_sd_deg": _angular_sd_deg(made),
        "median_rotation_change_deg": float(np.median(turned)),
        "median_shift_change_px": float(np.median(moved)),
        "mean_max_probability": float(after.max_probability.mean()),
        "mean_significant_poses": float(after.significant.mean()),
    }


def _write(job: _Job, state: State, made: em.Iteration, run: Run) -> RefineResult:
    box, pixel, out, maps = job.box_px, job.pixel_size_A, run.path, made.classes[0]
    merged = em.merged(maps)
    resolution = write_maps(out, pixel, maps, job.mask)
    # Signal on the scale of the images: the power of the map's slices.
    spectra = {f"noise_half{half}": noise.mean(axis=0) for half, noise in enumerate(state.noise_power, start=1)}
    write_curves(out / "spectra.csv", box, pixel, spectra | {"signal": fsc.shell_power(merged * job.mask)})
    refined = job.data.particles.replace(
        rotation=state.rotation,
        origin_A=job.data.origins_as_recorded(state.origin_px) * job.data.ctf.pixel_size_A[:, None],
        half=job.data.halves,
        class_number=np.ones(len(state.norm), dtype=np.int32),
        norm_correction=state.norm,
        ctf_scale=job.data.ctf.ctf_scale * state.scale,
        log_likelihood=state.log_likelihood,
        max_probability=state.max_probability,
        significant_poses=state.significant,
    )
    used = np.zeros(len(refined), dtype=bool)
    for half, found in enumerate(made.halves, start=1):
        used[job.data.rows_of(half)] = em.all_poses(found.shards).usable
    refined = refined.take(used)
    star.write_particles(out / "particles.star", refined, None)
    run.done(
        {
            "resolution_A": resolution,
            "resolution_half_A": fsc.resolution_at(maps.fsc.masked, fsc.HALF, box, pixel),
            "particles": len(refined),
            "box_px": box,
            "pixel_size_A": pixel,
            "symmetry": job.options.symmetry,
            "mask_diameter_A": job.diameter_A,
        }
    )
    first, second = maps.plain
    return RefineResult(out, resolution, state.iteration, (first, second), merged, maps.fsc, refined)


def _read(run: Run) -> RefineResult:
    """The result of a run that is done."""
    half_maps, merged, curves = read_maps(run.path)
    particles = star.read_particles(run.path / "particles.star")
    iterations = run.record["iterations"][-1]["iteration"]
    return RefineResult(
        run.path, run.record["result"]["resolution_A"], iterations, half_maps, merged, curves, particles
    )
