"""2D classification: like views grouped and averaged, by expectation maximisation over classes, angles and shifts."""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from dcryo import graph
from dcryo.cluster import Cluster, check_kind, connect
from dcryo.data import mrc, star
from dcryo.data.atomic import replacing
from dcryo.data.classes import CLASSES, TABLE, ClassTable, read_class_table, write_class_table
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.euler import matrix_from_euler
from dcryo.jobs import em
from dcryo.jobs.dataset import (
    Dataset,
    Shard,
    load_dataset,
    mask_edge_px,
    mini_batch,
    particle_diameter_A,
    quarantine_rows,
    shard_rows,
)
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, SeedOptions, argument
from dcryo.kernels import fsc, masks, ranking, rings
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import resolution_A, shell_at
from dcryo.steps import classification, references
from dcryo.steps.classification import Averages, Found, Images, Sums

# The half set of each class agree by this where the class is resolved: they were compared with the same images, so that
# the gold standard's 0.143 would flatter.
CLASS_RESOLVED = 0.5
# Rings hold what is a little outside of the mask too, where a neighbour or a wrong centre shows.
_SEEN_DIAMETER = 1.25
# Of images that are weighed at once: the scores of all their poses, so few that caches hold them.
_SCORES_BYTES = 8 << 20
# Averages of so many images, not aligned, are the first classes.
_FIRST_AVERAGE = 30
# Images are summed this far past the shell up to which they are compared, to see how far classes are resolved.
_SUMMED_PAST = 6
# Full iterations end when so few images change their class.
_CHANGED = 0.01
# Mini-batches: images per class in each, how many iterations, and how much of the sums an iteration replaces.
_PER_CLASS, _MINI_ITERATIONS, _REPLACED = 50, 20, 0.25
# Iterations over all images: at least, and as many as there are after mini-batches, which leave little to gain.
_FULL_AT_LEAST, _FULL_AFTER_MINI = 3, 2
# Likelihoods of the first iterations are taken to a power that grows to 1 (Ueda & Nakano 1998), from one at which an
# image's evidence is about this. Less, and all classes become one; resolution grows in the second half.
_HOT_EVIDENCE, _COOLING = 2.0, 10
_SPECTRUM_IMAGES = 1024


class Class2dOptions(OutOptions, ClusterOptions, SeedOptions):
    """Group like views of particles and average them.

    Writes classes.mrcs (masked averages, the largest class first), classes.star (size, resolution and rank of each) and
    particles.star (class, in-plane angle and shift of each particle).
    """

    store: Path = argument("store of particles, or a selection")
    classes: int = Field(50, ge=1, le=1000, description="number of classes")
    mask_diameter_A: float | None = Field(
        None, gt=0, description="diameter of the circular mask (default: 0.85 of the box)"
    )
    initial_lowpass_A: float = Field(30.0, gt=0, description="resolution of the first iterations")
    resolution_limit_A: float = Field(6.0, gt=0, description="images are compared to this resolution at most")
    shift_range_A: float | None = Field(
        None,
        gt=0,
        description="how far particles may lie from the centre of their image (default: 0.1 of the diameter)",
    )
    max_iterations: int = Field(25, ge=1, le=1000, description="iterations over all images at most")
    mini_batch: bool = Field(
        True, description="where there are many images per class, begin with iterations over some of them"
    )


@dataclass(frozen=True)
class Class2dResult:
    """Class images (K, D, D) float32, the largest class first, a row of figures of each, and the particles."""

    out: Path
    images: np.ndarray
    table: ClassTable
    particles: Particles

    def summary(self) -> str:
        kept = self.table.kept
        best = self.table.resolution_A[kept].min(initial=self.table.resolution_A.max())
        return (
            f"{self.out}: {len(self.images)} classes of {len(self.particles)} particles, the best to {best:.1f} A; "
            f"{int(kept.sum())} look good, with {int(self.table.particles[kept].sum())} particles"
        )


@dataclass(frozen=True)
class State:
    """Where a classification is.

    images: (K, D, D) masked; share: (K,); noise_power: (G, D // 2 + 1); shell: up to which images are compared next;
    origin_px (n, 2), class_number (n,), psi_rad, class_probability, max_probability, log_evidence, explained: of each
    particle; seen: (n,) whether it was; stalled, full: iterations without progress, iterations over all images; last:
    the next iteration is the final one. numerator...: running sums of mini-batches, of both halves, on the rings for
    summed_shell. evidence: mean log-evidence of an image, if likelihoods were not taken to a power.
    """

    iteration: int
    images: np.ndarray
    share: np.ndarray
    noise_power: np.ndarray
    shell: int
    origin_px: np.ndarray
    class_number: np.ndarray
    psi_rad: np.ndarray
    class_probability: np.ndarray
    max_probability: np.ndarray
    log_evidence: np.ndarray
    cross: np.ndarray
    square: np.ndarray
    power: np.ndarray
    seen: np.ndarray
    numerator: np.ndarray
    denominator: np.ndarray
    sums_share: np.ndarray
    summed_shell: int
    evidence: float
    full: int
    last: bool


_OF_PARTICLES = (
    "origin_px", "class_number", "psi_rad", "class_probability", "max_probability", "log_evidence", "cross", "square",
    "power",
)  # fmt: skip
_OF_RINGS = ("cross", "square", "power")
_ARRAYS = (
    "images", "share", "noise_power", *_OF_PARTICLES, "seen", "numerator", "denominator", "sums_share",
)  # fmt: skip
_FIGURES = ("shell", "summed_shell", "evidence", "full", "last")


@dataclass(frozen=True)
class _Job:
    """What does not change from one iteration to the next."""

    options: Class2dOptions
    data: Dataset
    mask: np.ndarray
    diameter_A: float
    seen_px: float
    shell_max: int
    scratch: Path

    @property
    def box_px(self) -> int:
        return self.data.store.box_px

    @property
    def pixel_size_A(self) -> float:
        return self.data.store.pixel_size_A

    @property
    def diameter_px(self) -> float:
        return self.diameter_A / self.pixel_size_A

    def rings_for(self, shell: int) -> rings.Rings:
        """Rings on which images are summed that are compared up to a shell."""
        return rings.rings(self.box_px, min(self.shell_max, shell + _SUMMED_PAST), self.seen_px)


@dataclass(frozen=True)
class Setting:
    """What all shards share in an iteration, but for the class images, which are in a file. coarse: shells and shifts
    by which images that were not seen before are located first; fine: those of the comparison."""

    of: rings.Rings
    share: np.ndarray
    noise_power: np.ndarray
    coarse_shell: int
    coarse_shift_px: np.ndarray
    shell: int
    shift_px: np.ndarray
    shift_sd_px: float


def class2d(options: Class2dOptions, *, progress: Progress = print) -> Class2dResult:
    """Classify; see `Class2dOptions`. InputError for bad input, before work starts."""
    check_kind(options.cluster)
    data = load_dataset(options.store, options.seed)
    box, pixel = data.store.box_px, data.store.pixel_size_A
    diameter = particle_diameter_A(data.store, options.mask_diameter_A)
    if options.classes > len(data.particles):
        raise InputError(f"--classes {options.classes}: the store has {len(data.particles)} particles; give fewer")
    mask = masks.circle(box, diameter / pixel, mask_edge_px(pixel))
    run = Run.start(
        options.out, "class2d", options.model_dump(), [options.store], options.seed, options.resume, options.overwrite
    )
    if run.finished:
        return _read(run)
    with run, em.scratch(run.path) as scratch, connect(options.cluster, options.workers) as cluster:
        run.quarantine(data.store.quarantined)
        seen_px = min(box, _SEEN_DIAMETER * diameter / pixel)
        job = _Job(
            options, data, mask, diameter, seen_px, max(4, shell_at(options.resolution_limit_A, box, pixel)), scratch
        )
        progress(
            f"{len(data.particles)} particles, box {box} px of {pixel:g} A, {options.classes} classes, diameter "
            f"{diameter:.0f} A, on {cluster.description}"
        )
        state = _latest(run) or _first_state(job, cluster)
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


def _latest(run: Run) -> State | None:
    found = run.latest_checkpoint()
    if found is None:
        return None
    iteration, arrays, figures = found
    return State(iteration, **arrays, **figures)  # type: ignore[arg-type]


def _first_state(job: _Job, cluster: Cluster) -> State:
    """Averages of a few images each, not aligned, and the mean power of the images as noise."""
    options, data = job.options, job.data
    n, k = len(data.particles), options.classes
    everyone = np.arange(n)
    sample = everyone[:: max(1, n // _SPECTRUM_IMAGES)]
    power = graph.call(em.mean_power, [_shard(job, sample, "spectrum")], data.n_groups, n, name="power")
    shell = max(shell_at(options.initial_lowpass_A, job.box_px, job.pixel_size_A), 3)
    of = job.rings_for(shell)
    chosen = generator(options.seed, "first classes", 0)
    per_class = min(n, _FIRST_AVERAGE)
    firsts = [
        graph.call(
            first_class, _shard(job, np.sort(chosen.choice(n, per_class, replace=False)), f"first-{number}"),
            of, shell, name=f"first-class-{number}",
        )
        for number in range(k)
    ]  # fmt: skip
    power, firsts = graph.compute((power, firsts), cluster)
    blank, per_ring = np.zeros(n), np.zeros((n, job.shell_max + 1), dtype=np.float32)
    sums = classification.empty_sums(of, k, data.n_groups)
    return State(
        iteration=0, images=np.stack(firsts) * job.mask, share=np.full(k, 1 / k), noise_power=power, shell=shell,
        origin_px=np.zeros((n, 2)), class_number=np.full(n, -1), psi_rad=blank, class_probability=blank,
        max_probability=blank, log_evidence=blank, cross=per_ring, square=per_ring, power=per_ring,
        seen=np.zeros(n, dtype=bool),
        numerator=np.stack([sums.numerator] * 2), denominator=np.stack([sums.denominator] * 2),
        sums_share=np.zeros((2, k)), summed_shell=shell, evidence=0.0, full=0,
        last=options.max_iterations == 1 and not _in_batches(job),
    )  # fmt: skip


def _shard(job: _Job, rows: np.ndarray, name: str) -> Shard:
    n = len(job.data.particles)
    return shard_rows(
        job.data, rows, name, np.ones(n), np.ones(n), job.data.rotation, np.zeros((n, 2)), np.ones(n, bool)
    )


def first_class(shard: Shard, of: rings.Rings, shell: int) -> np.ndarray:
    """A task: the average (D, D) of images that are not aligned, CTFs corrected, up to a shell."""
    batch, _ = shard.read(slice(None))
    usable = np.isfinite(batch.images).all(axis=(1, 2))
    if not usable.any():
        return np.zeros((of.box_px,) * 2, dtype=np.float32)
    sampled = rings.sample(batch.images[usable], of)
    transfer = shard.transfer_on_rings(slice(None), of)[:, usable]
    weight = np.sum(transfer**2, axis=1)
    average = np.sum(transfer * sampled, axis=1) / (weight + 0.5 * weight.mean())
    average[:, shell + 1 :] = 0
    return rings.images_of(average[:, None], of)[0]


def classify_shard(shard: Shard, images_path: Path, setting: Setting) -> tuple:
    """The task: the sums of a shard, one by one, what it learned of its particles, and position -> reason of what was
    left out."""
    images = np.load(io.BytesIO(images_path.read_bytes()))
    of = setting.of
    coarse = classification.prepare(
        images, setting.share, of, setting.coarse_shell, setting.coarse_shift_px, setting.shift_sd_px
    )
    fine = classification.prepare(images, setting.share, of, setting.shell, setting.shift_px, setting.shift_sd_px)
    sums = classification.empty_sums(of, len(setting.share), len(setting.noise_power))
    found, left_out = [], {}
    inverse = (2 / setting.noise_power[:, : of.shell_max + 1]).astype(np.float32)
    step = _batch_size(fine, coarse)
    for first in range(0, len(shard.rows), step):
        some = slice(first, first + step)
        batch, bad = shard.read(some)
        edge = masks.circle(of.box_px, of.box_px - 6, 5)
        own = Images(batch.images * edge, shard.transfer_on_rings(some, of), inverse[batch.group], batch.origin_px)
        unseen = np.flatnonzero(~shard.trusted[some])
        if len(unseen):
            origin = own.origin_px.copy()
            some_of = Images(own.images[unseen], own.ctf[:, unseen], own.inverse_variance[unseen], origin[unseen])
            origin[unseen] = classification.located(some_of, coarse)
            own = own._replace(origin_px=origin)
        learned = classification.fold(sums, own, batch.group, fine)
        found.append(learned)
        bad.update({int(i): "the image is not finite" for i in np.flatnonzero(~learned.usable)} | bad)
        left_out.update({first + position: reason for position, reason in bad.items()})
    every = Found(*(np.concatenate(column) for column in zip(*found, strict=True)))
    return (*sums, every, left_out)


def _batch_size(*of: classification.Classes) -> int:
    largest = max(4 * c.angles * len(c.shift_px) * len(c.log_share) for c in of)
    return int(np.clip(_SCORES_BYTES // largest, 1, 64))


def _in_batches(job: _Job) -> bool:
    options = job.options
    return options.mini_batch and len(job.data.particles) >= 4 * _PER_CLASS * options.classes


def _mini(job: _Job, state: State) -> bool:
    return _in_batches(job) and state.iteration < _MINI_ITERATIONS


def _rows(job: _Job, state: State) -> np.ndarray:
    """The images of an iteration: all, or a mini-batch."""
    n = len(job.data.particles)
    if not _mini(job, state):
        return np.arange(n)
    return mini_batch(n, _PER_CLASS * job.options.classes, job.options.seed, "mini-batches", state.iteration)


def _cooling(job: _Job) -> int:
    """Iterations until likelihoods are what they are; the last ones always are."""
    return _COOLING if _in_batches(job) else min(_COOLING, job.options.max_iterations // 2)


def _power(job: _Job, state: State) -> float:
    """The power to which likelihoods are taken: in proportion, by logarithm, to how far the cooling is."""
    hottest = min(1.0, _HOT_EVIDENCE / max(state.evidence, 1e-9))
    return float(hottest ** max(0.0, 1 - state.iteration / max(1, _cooling(job))))


def _setting(job: _Job, state: State) -> Setting:
    """How images are compared: shifts about a quarter of the resolution apart."""
    shift_range = (job.options.shift_range_A or 0.1 * job.diameter_A) / job.pixel_size_A
    first = max(shell_at(job.options.initial_lowpass_A, job.box_px, job.pixel_size_A), 3)
    coarse_shell = min(first, state.shell)
    coarse_step, step = (max(0.5, job.box_px / (4.5 * shell)) for shell in (coarse_shell, state.shell))
    fine_range = max(1.5 * step, 0.75 * coarse_step) if state.shell > first else shift_range
    return Setting(
        job.rings_for(state.shell), state.share, state.noise_power / _power(job, state), coarse_shell,
        classification.shift_grid(shift_range, coarse_step),
        state.shell, classification.shift_grid(fine_range, step), max(shift_range, step),
    )  # fmt: skip


class _Made(NamedTuple):
    averages: Averages
    share: np.ndarray
    found: Found
    rows: np.ndarray


def _iterate(job: _Job, state: State, cluster: Cluster, run: Run, progress: Progress) -> tuple[State, _Made]:
    started, number, n = time.monotonic(), state.iteration + 1, len(job.data.particles)
    mini, rows, setting = _mini(job, state), _rows(job, state), _setting(job, state)
    of = setting.of
    path = job.scratch / f"classes{number}.npy"
    packed = io.BytesIO()
    np.save(packed, state.images.astype(np.float32))
    with replacing(path) as file:
        file.write(packed.getvalue())
    sums, results, rows_of_shards = [], [], []
    for half in (1, 2):
        own = rows[job.data.halves[rows] == half]
        shards = cut(job, own, half, state)
        outs = [
            graph.call(classify_shard, shard, path, setting, name=f"classify-{shard.name}", parts=7) for shard in shards
        ]
        sums.append([graph.tree_sum([out[part] for out in outs], name=f"half{half}-{part}") for part in range(5)])
        results += [(out[5], out[6]) for out in outs]
        rows_of_shards += [shard.rows for shard in shards]
    sums, results = graph.compute((sums, results), cluster)
    path.unlink(missing_ok=True)
    halves = tuple(Sums(*half) for half in sums)
    found = Found(*(np.concatenate(column) for column in zip(*(learned for learned, _ in results), strict=True)))
    order = np.concatenate(rows_of_shards)
    # Running sums of mini-batches forget what was before at a fixed rate (Cappe & Moulines 2009).
    kept = 1 - _REPLACED if mini and state.iteration > 0 else 0.0
    scale = n / max(1, len(rows))
    former = job.rings_for(state.summed_shell)
    blended = tuple(
        half._replace(
            numerator=kept * before[0] + (1 - kept) * scale * half.numerator,
            denominator=kept * before[1] + (1 - kept) * scale * half.denominator,
            share=kept * before[2] + (1 - kept) * scale * half.share,
        )
        for half, before in zip(
            halves,
            zip(
                (rings.moved_to(numerator, former, of) for numerator in state.numerator),
                (rings.moved_to(denominator, former, of) for denominator in state.denominator),
                state.sums_share,
                strict=True,
            ),
            strict=True,
        )
    )
    averages = classification.averages((blended[0], blended[1]), job.mask, of)
    share = (blended[0].share + blended[1].share) / max(1e-9, float(np.sum(blended[0].share + blended[1].share)))
    made = _Made(averages, share, found, order)
    run.quarantine(quarantine_rows(job.data, rows_of_shards, [left for _, left in results]))
    updated, figures = _update(job, state, halves, blended, made, mini)
    figures |= {"images": len(rows), "seconds": round(time.monotonic() - started, 2)}
    run.iteration(figures)
    progress(
        f"iteration {number}: {figures['images']} images, compared to "
        f"{resolution_A(state.shell, job.box_px, job.pixel_size_A):.1f} A, classes to {figures['resolution_A']:.1f} A, "
        f"{100 * figures['changed']:.0f} % changed class, {figures['seconds']:.1f} s"
    )
    return updated, made


def cut(job: _Job, rows: np.ndarray, half: int, state: State) -> list[Shard]:
    """Shards of an iteration: a function of its images alone."""
    n, size = len(job.data.particles), max(64, min(2048, -(-len(rows) // 8)))
    ones = np.ones(n)
    return [
        shard_rows(
            job.data, rows[first : first + size], f"{half}-{number}", ones, ones, job.data.rotation, state.origin_px,
            state.seen,
        )
        for number, first in enumerate(range(0, len(rows), size))
    ]  # fmt: skip


def _resolved(frc: np.ndarray) -> np.ndarray:
    """Shell to which each class is resolved, (K,) float64."""
    return np.array([fsc.crossing(curve, CLASS_RESOLVED) for curve in frc])


def _update(
    job: _Job, state: State, halves: Sequence[Sums], blended: Sequence[Sums], made: _Made, mini: bool
) -> tuple[State, dict[str, Any]]:
    box, pixel = job.box_px, job.pixel_size_A
    usable = made.rows[made.found.usable]
    columns = {name: getattr(state, name).copy() for name in _OF_PARTICLES}
    changed = float(np.mean(made.found.class_number[made.found.usable] != state.class_number[usable]))
    for name, column in columns.items():
        learned = getattr(made.found, name)[made.found.usable]
        if name in _OF_RINGS:
            column[usable] = 0
            column[usable, : learned.shape[1]] = learned
        else:
            column[usable] = learned
    seen = state.seen.copy()
    seen[usable] = True
    noise = state.noise_power.copy()
    particles = halves[0].particles + halves[1].particles
    there = particles > 0
    residual = (halves[0].residual + halves[1].residual)[there] / particles[there, None]
    noise[there, : residual.shape[1]] = np.maximum(residual, 1e-3 * residual.mean(axis=1, keepdims=True))
    resolved = _resolved(made.averages.frc)
    typical = float(np.average(resolved, weights=made.share))
    best = float(np.max(resolved[made.share > references.DEAD / len(resolved)], initial=1.0))
    full = state.full + (not mini)
    number = state.iteration + 1
    images, share = made.averages.images, made.share
    if not state.last:
        excess = classification.unexplained(made.found, state.noise_power[job.data.groups[made.rows]], state.shell)
        own = made.found.usable
        left = np.bincount(made.found.class_number[own], excess[own], minlength=len(share))
        images, share = references.revived(made.averages, share, left)
        images = references.centred(images)
    converged = number > _cooling(job) and full >= _FULL_AT_LEAST and changed < _CHANGED
    most = min(job.options.max_iterations, _FULL_AFTER_MINI) if _in_batches(job) else job.options.max_iterations
    late = number > max(2, _cooling(job) // 2)
    shell = references.grown(state.shell, made.averages.frc, made.share) if late else state.shell
    evidence = float(made.found.log_evidence.mean()) / _power(job, state)
    updated = replace(
        state, iteration=number, images=images, share=share, noise_power=noise, shell=shell, seen=seen, full=full,
        numerator=np.stack([half.numerator for half in blended]),
        denominator=np.stack([half.denominator for half in blended]),
        sums_share=np.stack([half.share for half in blended]), summed_shell=state.shell, evidence=evidence,
        last=not mini and (converged or full + 1 >= most), **columns,
    )  # fmt: skip
    figures = {
        "iteration": number,
        "resolution_A": resolution_A(typical, box, pixel),
        "best_class_A": resolution_A(best, box, pixel),
        "changed": changed,
        "largest_share": float(share.max()),
        "smallest_share": float(share.min()),
        "mean_class_probability": float(made.found.class_probability.mean()),
        "mean_log_evidence": evidence,
        "likelihood_power": _power(job, state),
    }
    return updated, figures


def _write(job: _Job, state: State, made: _Made, run: Run) -> Class2dResult:
    box, pixel, data = job.box_px, job.pixel_size_A, job.data
    used = state.class_number >= 0
    resolved = _resolved(made.averages.frc)
    counts = np.bincount(state.class_number[used], minlength=len(resolved))
    total = np.bincount(state.class_number[used], state.log_evidence[used], minlength=len(counts))
    mass, rim = classification.mass_and_rim(made.averages.unmasked, job.diameter_px, _SEEN_DIAMETER)
    order = np.argsort(-counts, kind="stable")
    resolution = box * pixel / np.maximum(resolved, 1)
    evidence = total / np.maximum(counts, 1)
    ranked = ranking.rank_classes(counts, resolution, mass, rim, evidence)
    table = ClassTable(*(of[order] for of in (counts, resolution, mass, rim, evidence, ranked.rank, ranked.reason)))
    images = made.averages.images[order]
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    numbers = np.where(used, place[state.class_number], 0)
    misfit = classification.misfit(
        state.cross, state.square, state.power, state.noise_power[data.groups], job.diameter_px / box
    )
    judged = ranking.judge_particles(
        table.rank, numbers[used], misfit[used], state.log_evidence[used], np.hypot(*state.origin_px[used].T)
    )
    psi_deg = np.rad2deg(state.psi_rad[used])
    zero = np.zeros(len(psi_deg))
    particles = data.particles.take(used).replace(
        rotation=matrix_from_euler(zero, zero, psi_deg),
        origin_A=(data.origins_as_recorded(state.origin_px) * data.ctf.pixel_size_A[:, None])[used],
        class_number=numbers[used] + 1,
        log_likelihood=state.log_evidence[used],
        max_probability=state.max_probability[used],
    )
    found = {
        "dcryoClassProbability": np.char.mod("%.4f", state.class_probability[used]),
        "dcryoMisfit": np.char.mod("%.5g", misfit[used]),
        "dcryoUnlike": np.char.mod("%.4g", judged.unlike),
        "dcryoFlag": judged.reason,
    }
    particles = replace(particles, extra=particles.extra | found)
    with mrc.StackWriter(run.path / CLASSES, len(images), box, pixel, "float32") as writer:
        writer.write(0, images)
    write_class_table(run.path / TABLE, table)
    star.write_particles(run.path / "particles.star", particles, None)
    run.done(
        {
            "classes": len(images),
            "classes_kept": int(table.kept.sum()),
            "particles": len(particles),
            "resolution_A": float(table.resolution_A[table.kept].min(initial=table.resolution_A.max())),
            "box_px": box,
            "pixel_size_A": pixel,
            "mask_diameter_A": job.diameter_A,
        }
    )
    return Class2dResult(run.path, images, table, particles)


def _read(run: Run) -> Class2dResult:
    """The result of a run that is done."""
    stack = mrc.open_stack(run.path / CLASSES)
    particles = star.read_particles(run.path / "particles.star")
    return Class2dResult(run.path, stack.read(np.arange(stack.n)), read_class_table(run.path / TABLE), particles)
