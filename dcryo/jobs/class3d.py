"""3D classification: several references compete for each particle.

The posterior of a particle is over poses of all references (Scheres et al. 2007; Scheres 2012, eq. 4); what sorts is
the one loop of expectation and maximisation, with as many references as there are classes. Classes are found together:
the halves share references, which are compared with images no further than the resolution limit. Then they part: each
half goes on with references of its own, so that the FSC of a class, and whether two classes differ in both halves, are
told by maps that no longer share what sorts them.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from dcryo.cluster import Cluster, check_kind, connect
from dcryo.data import mrc, star
from dcryo.data.curves import write_curves
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.errors import InputError, RunError
from dcryo.jobs import em
from dcryo.jobs.class3d_pairs import Sorted, reproducible
from dcryo.jobs.dataset import Dataset, cut_shards, left_out_rows, load_dataset, load_mask, load_reference
from dcryo.jobs.memory import check_memory, expectation_bytes
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, SeedOptions, argument
from dcryo.kernels import alignment, filters, fsc, rotations, sampling
from dcryo.kernels.hold import shares
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import resolution_A, shell_at
from dcryo.kernels.symmetry import operators
from dcryo.steps import heterogeneity
from dcryo.steps.heterogeneity import SETTLED, Growth
from dcryo.steps.search import Search, Surroundings, plan_local, plan_search, stay

# Shells beyond those that are compared that are back-projected too.
_HEADROOM_SHELLS, _HEADROOM = 6, 0.25
# Of a reference that is perturbed, density is raised or lowered by about this part in places of this size.
_PERTURBATION, _PERTURBED_A = 0.3, 60.0
# A pose of this probability among those of its class is searched for in its surroundings alone.
_TRUSTED = 0.95
# The classes are found once they are settled for so many iterations.
_PATIENCE = 2
# A class of fewer particles is empty, and none is compared with it.
_FEWEST = 10


class Class3dOptions(OutOptions, ClusterOptions, SeedOptions):
    """Sort particles into classes with a map each.

    Poses are searched for everywhere, around those that particles have (--poses local), or kept (fixed, which takes
    seconds). Writes class1.mrc, class2.mrc, ... (the largest class first) and their half maps (class1_half1.mrc, ...),
    fsc.csv, classes.csv, particles.star and a report.
    """

    store: Path = argument("store of particles, a selection, or a finished run whose poses are taken")
    reference: tuple[Path, ...] = Field(
        (),
        description="first map: one for all classes or, given several times, one for each; on any grey scale. None is "
        "needed where particles have poses",
    )
    classes: int | None = Field(None, ge=2, le=50, description="number of classes (default: that of the references)")
    poses: Literal["global", "local", "fixed"] | None = Field(
        None,
        description="search poses everywhere, around those that are there, or not at all (default: fixed where there "
        "are any)",
    )
    symmetry: str = Field("C1", description="point group: Cn, Dn, T, O, I1, I2, I3 or I4")
    mask_diameter_A: float | None = Field(
        None, gt=0, description="diameter of the particle and of the soft spherical mask (default: 0.85 of the box)"
    )
    mask: Path | None = Field(None, description="solvent mask (map of 0 to 1) in place of the sphere")
    focus: Path | None = Field(
        None, description="classes differ under this mask alone (map of 0 to 1); elsewhere they have a map in common"
    )
    initial_lowpass_A: float = Field(40.0, gt=0, allow_inf_nan=False, description="low-pass filter of first references")
    resolution_limit_A: float = Field(
        8.0,
        gt=0,
        allow_inf_nan=False,
        description="particles are compared up to this resolution, and halves share references up to it",
    )
    regularisation: float = Field(
        1.0, gt=0, le=100, description="factor on the prior's power: above 1 references are smoothed less"
    )
    shift_range_A: float | None = Field(
        None, gt=0, description="how far particles may lie from their last centre (default: 0.1 of the diameter)"
    )
    iterations: int = Field(30, ge=2, description="at most so many in which the classes are found")
    apart: int = Field(2, ge=1, description="iterations after those, with references of each half its own")

    @model_validator(mode="after")
    def _consistent(self) -> "Class3dOptions":
        given = len(self.reference)
        if given > 1 and self.classes not in (None, given):
            raise ValueError(f"{given} references for {self.classes} classes; give one, or one for each class")
        if given < 2 and self.classes is None:
            raise ValueError("how many classes? give classes, or a reference for each")
        return self

    @property
    def count(self) -> int:
        return self.classes or len(self.reference)


@dataclass(frozen=True)
class Class3dResult:
    """A finished classification; the largest class comes first.

    maps: (K, D, D, D) float32; share: (K,); resolution_A: (K,) by FSC 0.143 under the mask; copies: for each class the
    number (from 1) of the larger class that it is a copy of, 0 where it is none.
    """

    out: Path
    maps: np.ndarray
    share: np.ndarray
    resolution_A: np.ndarray
    copies: tuple[int, ...]
    particles: Particles

    def summary(self) -> str:
        lines = [f"{self.out}: {len(self.share)} classes"]
        for k, (share, resolution, copy) in enumerate(
            zip(self.share, self.resolution_A, self.copies, strict=True), start=1
        ):
            words = f"  class{k}.mrc: {100 * share:5.1f} %, {resolution:.2f} A"
            lines.append(words + (f"; a copy of class {copy}" if copy else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class State:
    """All that one iteration hands to the next.

    references: (1 or 2, K, D, D, D) float32, of both halves or of each, not masked; noise_power: (2, G, D // 2 + 1);
    fsc: (K, D // 2 + 1) under the mask; rotation (n, 3, 3), origin_px (n, 2), norm, log_likelihood, max_probability,
    significant (n,), belonging (n, K): of all particles; share: (K,); shell: resolution of the next search;
    posed_shell: that of the last, 0 where there was none; stalled: iterations since classes changed; apart: how many
    iterations the halves have been apart; last: the next iteration is the final one.
    """

    iteration: int
    references: np.ndarray
    noise_power: np.ndarray
    fsc: np.ndarray
    rotation: np.ndarray
    origin_px: np.ndarray
    norm: np.ndarray
    log_likelihood: np.ndarray
    max_probability: np.ndarray
    significant: np.ndarray
    belonging: np.ndarray
    share: np.ndarray
    shell: int
    posed_shell: int
    stalled: int
    apart: int
    last: bool


_OF_PARTICLES = (
    "rotation", "origin_px", "norm", "log_likelihood", "max_probability", "significant", "belonging",
)  # fmt: skip
_ARRAYS = ("references", "noise_power", "fsc", "share", *_OF_PARTICLES)
_FIGURES = ("shell", "posed_shell", "stalled", "apart", "last")


@dataclass(frozen=True)
class _Job:
    """What stays the same through a classification. compared: the mask under which classes differ."""

    options: Class3dOptions
    data: Dataset
    poses: str
    mask: np.ndarray
    focus: np.ndarray | None
    diameter_A: float
    operators: np.ndarray
    scratch: Path

    @property
    def compared(self) -> np.ndarray:
        return self.mask if self.focus is None else self.focus

    @property
    def box_px(self) -> int:
        return self.data.store.box_px

    @property
    def pixel_size_A(self) -> float:
        return self.data.store.pixel_size_A

    @property
    def growth(self) -> Growth:
        last = min(shell_at(self.options.resolution_limit_A, self.box_px, self.pixel_size_A), self.box_px // 2)
        first = shell_at(self.options.initial_lowpass_A, self.box_px, self.pixel_size_A)
        return Growth(max(1, min(first, last)), last)


def class3d(options: Class3dOptions, *, progress: Progress = print) -> Class3dResult:
    """Classify; see `Class3dOptions`. InputError for bad input, before work starts; RunError where a run fails.

    A finished run is read back where it is resumed.
    """
    check_kind(options.cluster)
    group = operators(options.symmetry)
    data = load_dataset(options.store, options.seed)
    poses = _poses(options, data)
    mask, diameter = load_mask(data.store, options.mask_diameter_A, options.mask)
    focus = load_mask(data.store, options.mask_diameter_A, options.focus)[0] * mask if options.focus else None
    references = [load_reference(data.store, path) for path in options.reference]
    if len(data.particles) < _FEWEST * options.count:
        raise InputError(
            f"{options.store}: {len(data.particles)} particles; expected at least {_FEWEST} for each of "
            f"{options.count} classes"
        )
    inputs = [options.store, *options.reference, *(path for path in (options.mask, options.focus) if path)]
    run = Run.start(
        options.out, "class3d", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    )
    if run.finished:
        return _read(run)
    with run, em.scratch(run.path) as scratch, connect(options.cluster, options.workers) as cluster:
        job = _Job(options, data, poses, mask, focus, diameter, group, scratch)
        run.quarantine(data.store.quarantined)
        progress(
            f"{len(data.particles)} particles, box {job.box_px} px of {job.pixel_size_A:g} A, {options.count} classes, "
            f"{poses} poses, {options.symmetry}, diameter {diameter:.0f} A, on {cluster.description}"
        )
        state = _latest(run) or _first_state(job, references, cluster)
        task = expectation_bytes(job.box_px, job.box_px // 2, _searches(job, state)[0], len(group), options.count)
        check_memory(cluster, job.box_px, task, len(group))
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
        return _write(job, state, made, run, cluster, progress)


def _poses(options: Class3dOptions, data: Dataset) -> str:
    """How poses are searched for; InputError where that needs poses or a reference that are not there."""
    poses = options.poses or ("fixed" if data.has_poses else "global")
    if poses != "global" and not data.has_poses:
        raise InputError(
            f"{options.store}: the particles have no poses (rlnAngleRot, ...), which --poses {poses} starts from; give "
            "a finished refinement in place of the store, or --poses global with a --reference"
        )
    if poses == "global" and not options.reference:
        raise InputError("--poses global: a search everywhere needs a --reference; abinitio makes one")
    return poses


def _latest(run: Run) -> State | None:
    found = run.latest_checkpoint()
    if found is None:
        return None
    iteration, arrays, figures = found
    return State(iteration, **arrays, **figures)  # type: ignore[arg-type]


def _first_state(job: _Job, given: list[np.ndarray], cluster: Cluster) -> State:
    """References that differ, or particles dealt out at random to references that do not."""
    data, options, count = job.data, job.options, job.options.count
    n, box = len(data.particles), job.box_px
    belonging = np.full((n, count), 1 / count)
    lowpassed = [filters.lowpass(volume, job.pixel_size_A, options.initial_lowpass_A) for volume in given]
    if not lowpassed:
        lowpassed = [np.zeros((box,) * 3, dtype=np.float32)]
    if len(lowpassed) == 1 and count > 1:
        if job.poses == "global":
            lowpassed = _perturbed(job, lowpassed[0])
        else:
            lowpassed = lowpassed * count
            dealt = generator(options.seed, "classes", 0).integers(count, size=n)
            belonging = np.eye(count)[dealt]
    ones = np.ones(n)
    noise = em.first_noise(data, cluster).mean(axis=0)
    known = job.poses != "global"
    return State(
        iteration=0,
        references=np.stack(lowpassed)[None],
        noise_power=np.stack([noise, noise]),
        fsc=np.zeros((count, box // 2 + 1)),
        rotation=data.rotation if known else np.tile(np.eye(3), (n, 1, 1)),
        origin_px=data.origin_px if known else np.zeros((n, 2)),
        norm=ones,
        log_likelihood=np.zeros(n),
        max_probability=np.zeros(n),
        significant=np.zeros(n, dtype=np.int64),
        belonging=belonging,
        share=np.full(count, 1 / count),
        shell=job.growth.first,
        posed_shell=0,
        stalled=0,
        apart=0,
        last=False,
    )


def _perturbed(job: _Job, volume: np.ndarray) -> list[np.ndarray]:
    """Copies of a map with density raised in some places and lowered in others, other places in each."""
    out = []
    for number in range(job.options.count):
        noise = generator(job.options.seed, "perturbation", number).standard_normal(volume.shape, dtype=np.float32)
        smooth = filters.lowpass(noise, job.pixel_size_A, _PERTURBED_A)
        out.append(volume * (1 + np.float32(_PERTURBATION / smooth.std()) * smooth))
    return out


def _searches(job: _Job, state: State) -> tuple[Search, Search]:
    """The search of particles whose poses are not trusted, and of those that are."""
    both = 2 * np.maximum(state.fsc, 0) / (1 + np.maximum(state.fsc, 0)) if len(state.references) == 1 else state.fsc
    images = np.maximum(state.share * len(state.norm), 1) * len(job.operators) * len(state.references) ** -1.0
    held = np.stack([shares(of, float(job.mask.mean()), count) for of, count in zip(both, images, strict=True)])
    radius_px = job.diameter_A / 2 / job.pixel_size_A
    # A map of unknown grey scale is fitted by its best factor; one that is not there fits by none.
    unknown = state.iteration == 0 and bool(job.options.reference)
    if job.poses == "fixed" or (job.poses == "local" and state.shell < job.growth.last):
        # Poses that are there are better than what a coarse map would make of them.
        search = stay(state.shell, job.box_px, radius_px, held, job.operators)
        search = replace(search, profile_scale=unknown)
        return search, search
    if job.poses == "local":
        search = plan_local(
            state.shell,
            job.box_px,
            job.pixel_size_A,
            job.diameter_A,
            posed_shell=state.shell,
            shares=held,
            surroundings=Surroundings(),
            operators=job.operators,
            profile_scale=unknown,
        )
        return search, search
    random = generator(job.options.seed, "grid", state.iteration + 1)
    turn = rotations.perturbation(sampling.step_deg(3) / 2, random)

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
            profile_scale=unknown,
        )

    return plan(0), plan(state.posed_shell)


def _iterate(job: _Job, state: State, cluster: Cluster, run: Run, progress: Progress) -> tuple[State, em.Iteration]:
    """One iteration: expectation, maximisation, what the next one may use, and the record of it."""
    started = time.monotonic()
    number, nyquist = state.iteration + 1, job.box_px // 2
    headroom = max(_HEADROOM_SHELLS, int(_HEADROOM * state.shell))
    shell_max = nyquist if state.last else min(state.shell + headroom, nyquist)
    searches = _searches(job, state)
    trusted = np.zeros(len(state.norm), dtype=bool)
    if searches[1].grid_order is None:
        own = state.belonging.max(axis=1)
        trusted = state.max_probability > _TRUSTED * own
    if job.poses != "global":
        trusted[:] = True
    joined = len(state.references) == 1
    # The first iteration's references are all one where particles were dealt out to them.
    dealt = bool(state.iteration == 0 and np.all(state.belonging.max(axis=1) == 1))
    setting = [
        em.Setting(*searches, noise, shell_max, tuple(state.share.tolist()), dealt) for noise in state.noise_power
    ]
    references = [[volume * job.mask for volume in of_half] for of_half in state.references]
    made = em.iterate(
        shards=(_shards(job, state, 1, trusted), _shards(job, state, 2, trusted)),
        references=(references[0], references[-1]),
        settings=(setting[0], setting[1]),
        mask=job.compared,
        scratch=job.scratch,
        cluster=cluster,
        merge=joined or state.last,
        tau2_factor=job.options.regularisation,
    )
    for maps in made.classes:
        if not all(np.isfinite(plain).all() for plain in maps.plain):
            raise RunError(f"iteration {number} gave a map that is not finite; see the quarantined particles")
    updated = _update(job, state, made, shell_max)
    for half, result in enumerate(made.halves, start=1):
        run.quarantine(left_out_rows(job.data, half, [shard.left_out for shard in result.shards]))
    figures = _figures(job, state, updated) | {"seconds": round(time.monotonic() - started, 2)}
    run.iteration(figures)
    progress(
        f"iteration {number}: {figures['resolution_A']:.1f} A, classes "
        + " ".join(f"{100 * share:.1f}" for share in updated.share)
        + f" %, {100 * figures['changed']:.1f} % changed, {figures['seconds']:.1f} s"
    )
    return updated, made


def _shards(job: _Job, state: State, half: int, trusted: np.ndarray) -> list:
    # Contrasts stay those that particles came with: one that is found here would explain what is missing in a particle.
    contrast = np.ones(len(state.norm))
    return cut_shards(job.data, half, state.norm, contrast, state.rotation, state.origin_px, trusted, state.belonging)


def _update(job: _Job, state: State, made: em.Iteration, shell_max: int) -> State:
    """The state after an iteration."""
    columns = {name: getattr(state, name).copy() for name in _OF_PARTICLES}
    used = np.zeros(len(state.norm), dtype=bool)
    for index, half in enumerate(made.halves):
        rows = job.data.rows_of(index + 1)
        poses = em.all_poses(half.shards)
        usable = rows[poses.usable]
        used[usable] = True
        for name in columns:
            columns[name][usable] = getattr(poses, name)[poses.usable]
        columns["norm"][usable] /= np.sqrt(np.mean(columns["norm"][usable] ** 2))
    found = columns["belonging"][used].mean(axis=0)
    share = np.where(found * used.sum() < _FEWEST, 0.0, found)
    share /= share.sum()
    curves = np.stack([maps.fsc.masked for maps in made.classes])
    reached = max(fsc.crossing(curve[: shell_max + 1], fsc.GOLD_STANDARD) for curve in curves[share > 0])
    changed = _changed(state, columns["belonging"])
    grown = job.growth.next(state.shell, changed) if state.iteration > 0 else state.shell
    shell = max(min(grown, int(reached)), job.growth.first)
    # Where the maps resolve less than the limit, particles are compared to that.
    stalled = state.stalled + 1 if shell == state.shell and changed < SETTLED and state.iteration > 0 else 0
    joined = len(state.references) == 1
    number = state.iteration + 1
    parts = joined and (stalled >= _PATIENCE or number >= job.options.iterations)
    apart = state.apart + (not joined)
    return replace(
        state,
        iteration=number,
        references=_next_references(job, state, made, share, parts),
        noise_power=_noise(state, made, joined),
        fsc=curves,
        **columns,
        share=share,
        shell=shell,
        posed_shell=state.shell,
        stalled=stalled,
        apart=apart,
        last=apart + 1 >= job.options.apart and not joined,
    )


def _changed(state: State, belonging: np.ndarray) -> float:
    """Part of the particles whose class is another than before."""
    return float(np.mean(belonging.argmax(axis=1) != state.belonging.argmax(axis=1)))


def _noise(state: State, made: em.Iteration, joined: bool) -> np.ndarray:
    """The noise of the halves, one and the same while they share references."""
    residual = np.stack([half.residual for half in made.halves])
    particles = np.stack([half.particles for half in made.halves])
    if joined:
        residual, particles = (np.broadcast_to(of.sum(axis=0), of.shape) for of in (residual, particles))
    return np.stack([em.noise_after(*of_half) for of_half in zip(state.noise_power, residual, particles, strict=True)])


def _next_references(job: _Job, state: State, made: em.Iteration, share: np.ndarray, parts: bool) -> np.ndarray:
    """The next references, (1 or 2, K, D, D, D): those of both halves, one copy for each where they part."""
    if state.last:
        return state.references
    apart = [maps.regularised for maps in made.classes if maps.regularised is not None]
    if apart:
        found = np.stack([[of[half] for of in apart] for half in (0, 1)])
    else:
        found = np.stack([em.merged(maps) for maps in made.classes])[None]
    # A class that is empty keeps what it was.
    found[:, share == 0] = state.references[:, share == 0]
    if job.focus is not None:
        common = np.einsum("k,hkxyz->hxyz", share.astype(np.float32), found)[:, None]
        found = common + job.focus * (found - common)
    return np.concatenate([found, found]) if parts else found


def _figures(job: _Job, before: State, after: State) -> dict:
    count = len(after.share)
    was, now = before.belonging.argmax(axis=1), after.belonging.argmax(axis=1)
    best = max(fsc.crossing(curve, fsc.GOLD_STANDARD) for curve in after.fsc[after.share > 0])
    figures = {
        "iteration": after.iteration,
        "resolution_A": resolution_A(best, job.box_px, job.pixel_size_A),
        "compared_to_A": resolution_A(before.shell, job.box_px, job.pixel_size_A),
        "halves": "together" if len(before.references) == 1 else "apart",
        "share": [round(float(share), 5) for share in after.share],
        "changed": _changed(before, after.belonging),
        "flow": np.bincount(was * count + now, minlength=count**2).reshape(count, count).tolist(),
        "mean_confidence": float(after.belonging.max(axis=1).mean()),
        "mean_log_likelihood": float(after.log_likelihood.mean()),
    }
    if job.poses != "fixed":
        turned = rotations.angular_distance_deg(after.rotation, before.rotation, job.operators)
        figures["median_rotation_change_deg"] = float(np.median(turned))
    return figures


def _copies(
    job: _Job,
    state: State,
    order: np.ndarray,
    maps: np.ndarray,
    likeness: np.ndarray,
    cluster: Cluster,
    progress: Progress,
) -> tuple[list[float], tuple[int, ...]]:
    """For each class, in an order by size: how well the halves reproduce what tells it from the larger class that it is
    most like, and the number (from 1) of that class where it is a copy of it, or 0."""
    rotation, origin_px = _in_one_frame(job, state, order, maps) if job.poses != "fixed" else (
        state.rotation, state.origin_px)  # fmt: skip
    known = Sorted(
        data=job.data, rotation=rotation, origin_px=origin_px, norm=state.norm,
        belonging=state.belonging[:, order], noise_power=state.noise_power, mask=job.mask, compared=job.compared,
        operators=job.operators, growth=job.growth, radius_px=job.diameter_A / 2 / job.pixel_size_A,
        seed=job.options.seed,
    )  # fmt: skip
    reproduced, copies = [1.0], [0]
    for k in range(1, len(order)):
        like = max((j for j in range(k) if copies[j] == 0), key=lambda j: float(likeness[j, k]))
        found = 0.0
        if state.share[order[k]] > 0:
            found = reproducible(known, like, k, job.scratch, cluster)
            progress(f"classes {like + 1} and {k + 1}: the halves apart find differences that correlate by {found:.2f}")
        reproduced.append(found)
        copies.append(like + 1 if state.share[order[k]] > 0 and found < heterogeneity.REPRODUCIBLE else 0)
    return reproduced, tuple(copies)


def _in_one_frame(job: _Job, state: State, order: np.ndarray, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Poses in the frame of the largest class: maps that move with their poses may drift apart, and a class that is a
    copy, but turned by a degree, would look like another one."""
    rotation, origin_px = state.rotation.copy(), state.origin_px.copy()
    best = state.belonging.argmax(axis=1)
    for volume, number in zip(maps[1:], order[1:], strict=True):
        own = best == number
        if own.any() and state.share[number] > 0:
            move = alignment.align(volume * job.mask, maps[0] * job.mask, job.growth.last, hands=False)
            rotation[own], origin_px[own] = alignment.moved_poses(rotation[own], origin_px[own], move)
    return rotation, origin_px


def _write(
    job: _Job, state: State, made: em.Iteration, run: Run, cluster: Cluster, progress: Progress
) -> Class3dResult:
    box, pixel, out = job.box_px, job.pixel_size_A, run.path
    order = np.argsort(-state.share, kind="stable")
    classes, share, belonging = [made.classes[k] for k in order], state.share[order], state.belonging[:, order]
    maps = np.stack([em.merged(of) for of in classes])
    curves: dict[str, np.ndarray] = {}
    for number, of in enumerate(classes, start=1):
        mrc.write_map(out / f"class{number}.mrc", em.merged(of), pixel)
        for half, plain in enumerate(of.plain, start=1):
            mrc.write_map(out / f"class{number}_half{half}.mrc", plain, pixel)
        curves[f"fsc_class{number}"] = of.fsc.masked
    mrc.write_map(out / "mask.mrc", job.compared, pixel)
    write_curves(out / "fsc.csv", box, pixel, curves)
    resolution = np.array([fsc.resolution_at(of.fsc.masked, fsc.GOLD_STANDARD, box, pixel) for of in classes])
    likeness = heterogeneity.likeness([of.plain for of in classes], state.fsc[order], job.compared, job.growth.last)
    reproduced, copies = _copies(job, state, order, maps, likeness, cluster, progress)
    used = np.zeros(len(state.norm), dtype=bool)
    for half, found in enumerate(made.halves, start=1):
        used[job.data.rows_of(half)] = em.all_poses(found.shards).usable
    sorted_ = job.data.particles.replace(
        rotation=state.rotation,
        origin_A=job.data.origins_as_recorded(state.origin_px) * job.data.ctf.pixel_size_A[:, None],
        half=job.data.halves,
        class_number=belonging.argmax(axis=1) + 1,
        class_probability=belonging.max(axis=1),
        norm_correction=state.norm,
        ctf_scale=job.data.ctf.ctf_scale,
        log_likelihood=state.log_likelihood,
        max_probability=state.max_probability,
        significant_poses=state.significant,
    ).take(used)
    star.write_particles(out / "particles.star", sorted_, None)
    run.done(
        {
            "particles": len(sorted_),
            "share": share.tolist(),
            "resolution_of_classes_A": resolution.tolist(),
            "copy_of": list(copies),
            "reproduced": reproduced,
            "correlation": likeness.tolist(),
            "order": order.tolist(),
            "box_px": box,
            "pixel_size_A": pixel,
            "symmetry": job.options.symmetry,
            "mask_diameter_A": job.diameter_A,
        }
    )
    return Class3dResult(out, maps, share, resolution, copies, sorted_)


def _read(run: Run) -> Class3dResult:
    """The result of a run that is done."""
    result = run.record["result"]
    maps = np.stack([mrc.read_map(run.path / f"class{k + 1}.mrc").array for k in range(len(result["share"]))])
    return Class3dResult(
        run.path,
        maps,
        np.array(result["share"]),
        np.array(result["resolution_of_classes_A"]),
        tuple(result["copy_of"]),
        star.read_particles(run.path / "particles.star"),
    )
