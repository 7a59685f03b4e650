"""Ab initio models: first maps from the images alone, by stochastic expectation maximisation from random starts.

Each start begins at what a few images at random rotations add up to, and follows mini-batches: every image is compared
with projections of the model in all directions, and the sums that this gives replace a part of those before (online
EM, Cappe & Moulines 2009; for cryo-EM Punjani et al. 2017 and Kimanius et al. 2021). Starts know nothing of one another
and of the symmetry. Those that agree make the model, whose axes are looked for; iterations over all images end the run.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field

from dcryo import graph
from dcryo.cluster import Cluster, check_kind, connect
from dcryo.data import mrc, star
from dcryo.data.atomic import replacing
from dcryo.data.curves import write_curves
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.errors import InputError, RunError
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
from dcryo.kernels import filters, fsc, masks, rings, rotations, sampling, slices
from dcryo.kernels.ctf import ctf
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import resolution_A, shell_at
from dcryo.kernels.symmetry import operators
from dcryo.steps import classification, first_models
from dcryo.steps.classification import Found, Images
from dcryo.steps.first_models import Model

# Detail that tells views apart: from this part of the particle's diameter at first to this at last.
_FIRST_DETAIL, _LAST_DETAIL, _FINEST_A = 1 / 7.5, 1 / 10, 10.0
# Iterations over mini-batches, how many images are in each at first and at last for every class, and how much of the
# sums an iteration replaces, at first and at last.
_DESCENT, _BATCH, _REPLACED = 50, (100, 250), (0.9, 0.3)
# The resolution grows between these parts of the descent.
_GROWTH = (0.1, 0.5)
# A first model is of so many images: few, for a model that is far from round.
_FIRST_IMAGES = 10
# Iterations over all images at the end.
_FINAL = 2
# Directions of view are so far apart that the edge of the particle moves by this part of the resolution.
_EDGE_STEP, _DESCENT_ORDERS, _FINAL_ORDERS = 0.9, (1, 2), (2, 3)
# Images are centred with views so far apart first. Shifts are this part of the resolution apart.
_CENTRING_ORDER = 1
_SHIFT_STEP = 1 / 3
# Shells past the compared ones that are back-projected.
_HEADROOM_SHELLS = 3
# Rings hold what is a little outside of the mask too.
_SEEN_DIAMETER = 1.2
# Starts agree where their models correlate by half to this part of the shells in use.
_AGREE = 0.6
# Starts are judged by so many images, of which as many tell the noise at the beginning.
_JUDGED = 400
_SCORES_BYTES = 8 << 20
_SHARDS, _SMALLEST_SHARD, _LARGEST_SHARD = 8, 64, 2048
_CHECKPOINT_EVERY = 5
_LEAST_NOISE = 1e-3


class AbinitioOptions(OutOptions, ClusterOptions, SeedOptions):
    """Make first models from the particles alone.

    Writes class1.mrc, class2.mrc, ... (the largest class first, low resolution, hand unknown), fsc.csv and
    particles.star (class and pose of each particle).
    """

    store: Path = argument("store of particles, or a selection")
    classes: int = Field(1, ge=1, le=20, description="number of models")
    symmetry: str = Field(
        "C1", description="point group of the molecule: its axes are looked for once there is a model without"
    )
    mask_diameter_A: float | None = Field(
        None, gt=0, description="diameter of the particle and of the soft spherical mask (default: 0.85 of the box)"
    )
    starts: int = Field(3, ge=1, le=100, description="models that are made independently and compared")
    resolution_limit_A: float | None = Field(
        None, gt=0, description="images are compared to this resolution (default: a tenth of the diameter, 10 at least)"
    )
    shift_range_A: float | None = Field(
        None,
        gt=0,
        description="how far particles may lie from the centre of their image (default: 0.1 of the diameter)",
    )


@dataclass(frozen=True)
class AbinitioResult:
    """Maps (K, D, D, D) float32, the largest class first, the share of each, how many of the starts agree, and the
    particles."""

    out: Path
    maps: np.ndarray
    share: np.ndarray
    resolution_A: np.ndarray
    starts: int
    agreeing: int
    explained: float
    particles: Particles

    def summary(self) -> str:
        models = ", ".join(
            f"class{k + 1}.mrc ({100 * share:.0f} %, {resolution:.0f} A)"
            for k, (share, resolution) in enumerate(zip(self.share, self.resolution_A, strict=True))
        )
        agree = f"{self.agreeing} of {self.starts} starts agree"
        if self.starts > 1 and self.agreeing == 1:
            agree = f"no two of {self.starts} starts agree: the model is not to be trusted"
        return (
            f"{self.out}: {models}; {agree}; the images are explained {self.explained:.1f} times as well as by a blob"
        )


class Agreement(NamedTuple):
    """What the comparison of the starts says: those that agree, the best first; the mean log-evidence of each; that of
    a blob, the best one's models with nothing but their profile left; resolution in Angstrom at which models of two
    starts correlate by half, (S, S); and how well models obey the point group, by class."""

    agreeing: list[int]
    evidence_of_starts: list[float]
    evidence_of_blob: float
    resolution_between_A: list[list[float]]
    symmetry_agreement: list[float]


@dataclass(frozen=True)
class State:
    """Where a run is. All arrays hold one item for each of S starts, of which the consensus is the only one later.

    iteration: done so far; models: (S, K, d, d, d) in the working box, masked; sums: (S, 2, K, ..., 3), what they were
    made of, for each half; share: (S, K); noise_power: (S, G, R); fsc: (S, K, R); agreement: of the starts, once they
    have been compared.
    """

    iteration: int
    models: np.ndarray
    sums: np.ndarray
    share: np.ndarray
    noise_power: np.ndarray
    fsc: np.ndarray
    agreement: Agreement | None = None


_ARRAYS = ("models", "sums", "share", "noise_power", "fsc")


@dataclass(frozen=True)
class _Job:
    """What does not change from one iteration to the next; lengths in pixels of the working box."""

    options: AbinitioOptions
    data: Dataset
    work_px: int
    mask: np.ndarray
    diameter_px: float
    shells: tuple[int, int]
    group: np.ndarray
    scratch: Path

    @property
    def work_pixel_A(self) -> float:
        return self.data.store.pixel_size_A * self.data.store.box_px / self.work_px

    @property
    def reach(self) -> int:
        """The last shell that is ever back-projected."""
        return self.rings_to(self.shells[1]).shell_max

    def rings_to(self, shell: int) -> rings.Rings:
        """Rings for images that are compared up to a shell."""
        last = min(shell + _HEADROOM_SHELLS, self.work_px // 2 - 1)
        return rings.rings(self.work_px, last, min(self.work_px, _SEEN_DIAMETER * self.diameter_px))


class Looks(NamedTuple):
    """How images are looked at: rotation (N, 3, 3) of the views, shifts (T, 2) in the working box, the last shell."""

    rotation: np.ndarray
    shift_px: np.ndarray
    shell: int


@dataclass(frozen=True)
class Setting:
    """What all shards of a start share in an iteration, but for the models, which are in a file.

    centring: by which images are located first; comparison: then, around where they are; shift_sd_px: in the working
    box; share: (K,); noise_power: (G, >= R); reach: last shell of the sums.
    """

    of: rings.Rings
    centring: Looks
    comparison: Looks
    shift_sd_px: float
    share: np.ndarray
    noise_power: np.ndarray
    reach: int


def abinitio(options: AbinitioOptions, *, progress: Progress = print) -> AbinitioResult:
    """First models; see `AbinitioOptions`. InputError for bad input, before work starts."""
    check_kind(options.cluster)
    group = operators(options.symmetry)
    data = load_dataset(options.store, options.seed)
    box, pixel = data.store.box_px, data.store.pixel_size_A
    diameter = particle_diameter_A(data.store, options.mask_diameter_A)
    limit = options.resolution_limit_A or max(_LAST_DETAIL * diameter, _FINEST_A)
    shells = _shells(data, diameter, limit)
    if len(data.particles) < _FIRST_IMAGES * options.classes:
        raise InputError(
            f"{options.store}: {len(data.particles)} particles; expected at least {_FIRST_IMAGES} for each of "
            f"{options.classes} classes"
        )
    work = first_models.working_box_px(box, pixel, limit)
    scale = work / box
    mask = masks.sphere(work, diameter / pixel * scale, max(mask_edge_px(pixel) * scale, 2.0))
    run = Run.start(
        options.out, "abinitio", options.model_dump(), [options.store], options.seed, options.resume, options.overwrite
    )
    if run.finished:
        return _read(run)
    with run, em.scratch(run.path) as scratch, connect(options.cluster, options.workers) as cluster:
        run.quarantine(data.store.quarantined)
        job = _Job(options, data, work, mask, diameter / pixel * scale, shells, group, scratch)
        progress(
            f"{len(data.particles)} particles, box {box} px of {pixel:g} A, compared in {work} px of "
            f"{job.work_pixel_A:.3g} A; {options.starts} starts of {options.classes} classes, diameter "
            f"{diameter:.0f} A, on {cluster.description}"
        )
        state = _latest(run) or _first_state(job, cluster)
        while state.iteration < _DESCENT:
            state, _ = _iterate(job, state, _descent(job, state), cluster, run, progress)
            if state.iteration % _CHECKPOINT_EVERY == 0 or state.iteration == _DESCENT:
                _save(run, state)
        if state.agreement is None:
            state = _agreed(job, state, cluster, progress)
        while True:
            last = state.iteration == _DESCENT + _FINAL - 1
            state, made = _iterate(job, state, _everything(job, state), cluster, run, progress)
            if last:
                break
            _save(run, state)
        return _write(job, state, made[0], run)


def _shells(data: Dataset, diameter_A: float, limit_A: float) -> tuple[int, int]:
    """The shells up to which images are compared at first and at last; InputError where the last is too few or too
    many."""
    box, pixel = data.store.box_px, data.store.pixel_size_A
    last = shell_at(limit_A, box, pixel)
    if not 4 <= last <= box // 2 - 1 or limit_A < 2 * pixel:
        raise InputError(
            f"--resolution-limit {limit_A:g} A: expected a resolution between {2.1 * pixel:.3g} A, which the pixels of "
            f"{pixel:g} A hold, and {box * pixel / 4:.3g} A, a quarter of the box"
        )
    first = shell_at(max(limit_A, _FIRST_DETAIL * diameter_A), box, pixel)
    return min(max(first, 4), last), last


def _latest(run: Run) -> State | None:
    found = run.latest_checkpoint()
    if found is None:
        return None
    iteration, arrays, figures = found
    return State(iteration, **arrays, agreement=Agreement(**figures) if figures else None)


def _save(run: Run, state: State) -> None:
    run.save_checkpoint(
        state.iteration,
        {name: getattr(state, name) for name in _ARRAYS},
        {} if state.agreement is None else state.agreement._asdict(),
    )


def _shard(job: _Job, rows: np.ndarray, name: str) -> Shard:
    n = len(job.data.particles)
    ones, nothing = np.ones(n), np.zeros((n, 2))
    return shard_rows(job.data, rows, name, ones, ones, job.data.rotation, nothing, np.ones(n, bool))


def _first_state(job: _Job, cluster: Cluster) -> State:
    """For each start and class a model of a few images at random rotations; and the mean power of images as noise."""
    options, n = job.options, len(job.data.particles)
    of = job.rings_to(job.shells[1])
    sample = np.arange(n)[:: max(1, n // _JUDGED)]
    noise = graph.call(ring_power, _shard(job, sample, "spectrum"), of, job.data.n_groups, name="spectrum")
    models = []
    for start in range(options.starts):
        for k in range(options.classes):
            random = generator(options.seed, "first model", start * options.classes + k)
            rows = np.sort(random.choice(n, _FIRST_IMAGES, replace=False))
            turns = rotations.random_rotations(len(rows), random)
            shard = _shard(job, rows, f"first-{start}-{k}")
            models.append(graph.call(first_model, shard, noise, turns, job.mask, of, job.shells[0], name=shard.name))
    noise, models = graph.compute((noise, models), cluster)
    many = (options.starts, options.classes)
    sums = (options.starts, 2, options.classes, *slices.volume_shape(job.reach, job.work_px), 3)
    return State(
        0,
        np.stack(models).reshape(*many, *job.mask.shape),
        np.zeros(sums, dtype=np.float32),
        np.full(many, 1 / options.classes),
        np.stack([noise] * options.starts),
        np.zeros((*many, job.reach + 1)),
    )


def _working(shard: Shard, some: slice, of: rings.Rings) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
    """A batch: images (n, d, d) in the working box, CTFs on the rings (angles / 2, n, R), groups (n,), and which of
    them cannot be used, as position -> reason."""
    batch, bad = shard.read(some)
    box = shard.store.box_px
    images = batch.images * masks.circle(box, box - 6, 5)
    columns = (column[some] for column in shard.ctf)
    transfer = ctf(of.kx.ravel(), of.ky.ravel(), box, *columns).reshape(-1, *of.kx.shape)
    working = first_models.working_images(images, of.box_px)
    return working, np.ascontiguousarray(np.swapaxes(transfer, 0, 1)), batch.group, bad


def ring_power(shard: Shard, of: rings.Rings, groups: int) -> np.ndarray:
    """A task: mean power of a shard's images on each ring, (G, R); of groups without any, that of all."""
    total, count = np.zeros((groups, of.shell_max + 1)), np.zeros(groups)
    for first in range(0, len(shard.rows), _SMALLEST_SHARD):
        images, _, group, _ = _working(shard, slice(first, first + _SMALLEST_SHARD), of)
        usable = np.isfinite(images).all(axis=(1, 2))
        power = np.mean(np.abs(rings.sample(images[usable], of)) ** 2, axis=0)
        np.add.at(total, group[usable], power)
        np.add.at(count, group[usable], 1)
    everyone = total.sum(axis=0) / max(count.sum(), 1)
    return np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], everyone)


def first_model(
    shard: Shard, noise_power: np.ndarray, turns: np.ndarray, mask: np.ndarray, of: rings.Rings, shell: int
) -> np.ndarray:
    """A task: `first_models.random_model` of a shard."""
    images, transfer, group, _ = _working(shard, slice(None), of)
    usable = np.isfinite(images).all(axis=(1, 2))
    return first_models.random_model(
        images[usable], transfer[:, usable], noise_power[group[usable]], turns[usable], mask, of, shell
    )


class Plan(NamedTuple):
    """An iteration to be: rows of images for each start, how images are compared, how much of the sums it replaces, the
    point group (G, 3, 3), and what it is called."""

    rows: list[np.ndarray]
    shell: int
    order: int
    perturbation: np.ndarray
    replaced: float
    group: np.ndarray
    name: str


def _descent(job: _Job, state: State) -> Plan:
    """The plan of an iteration over mini-batches."""
    options, n = job.options, len(job.data.particles)
    done = state.iteration / (_DESCENT - 1)
    grown = np.clip((done - _GROWTH[0]) / (_GROWTH[1] - _GROWTH[0]), 0, 1)
    shell = round(job.shells[0] + grown * (job.shells[1] - job.shells[0]))
    size = min(n, options.classes * round(_BATCH[0] + done * (_BATCH[1] - _BATCH[0])))
    replaced = _REPLACED[0] * (_REPLACED[1] / _REPLACED[0]) ** done if state.iteration else 1.0
    random = generator(options.seed, "views", state.iteration)
    rows = [
        mini_batch(n, size, options.seed, f"mini-batches of start {start}", state.iteration)
        for start in range(options.starts)
    ]
    turn = rotations.random_rotations(1, random)[0]
    return Plan(rows, shell, _order(job, shell, _DESCENT_ORDERS), turn, replaced, np.eye(3)[None], "descent")


def _everything(job: _Job, state: State) -> Plan:
    """The plan of an iteration over all images, with symmetry."""
    shell = job.shells[1]
    turn = rotations.random_rotations(1, generator(job.options.seed, "views", state.iteration))[0]
    rows = [np.arange(len(job.data.particles))]
    return Plan(rows, shell, _order(job, shell, _FINAL_ORDERS), turn, 1.0, job.group, "all images")


def _order(job: _Job, shell: int, orders: tuple[int, int]) -> int:
    """Order of the grid of views for a resolution."""
    step = np.rad2deg(_EDGE_STEP * job.work_px / shell / (job.diameter_px / 2))
    return int(np.clip(sampling.order_for_step(step), *orders))


def _setting(job: _Job, plan: Plan, share: np.ndarray, noise_power: np.ndarray) -> Setting:
    given = job.options.shift_range_A
    step = _shift_step_px(job, plan.shell)
    reach = max(given / job.work_pixel_A if given else 0.1 * job.diameter_px, step)
    coarse = min(job.shells[0], plan.shell)
    centring = Looks(
        first_models.views(_CENTRING_ORDER, plan.perturbation, plan.group),
        classification.shift_grid(reach, _shift_step_px(job, coarse)),
        coarse,
    )
    comparison = Looks(
        first_models.views(plan.order, plan.perturbation, plan.group),
        classification.shift_grid(1.5 * step, step),
        plan.shell,
    )
    return Setting(job.rings_to(plan.shell), centring, comparison, reach, share, noise_power, job.reach)


def _shift_step_px(job: _Job, shell: int) -> float:
    return max(0.7, _SHIFT_STEP * job.work_px / shell)


class Learned(NamedTuple):
    """What an iteration learned of the images of a start: rows, in the order of what was found of them, the pose and
    model of each, and position -> reason of what was left out, by shard."""

    rows: np.ndarray
    found: Found
    rotation: np.ndarray
    model: np.ndarray
    rows_of_shards: list[np.ndarray]
    left_out: list[dict[int, str]]

    @property
    def log_evidence(self) -> float:
        """Mean over the images of the logarithm of how much better the models explain them than nothing does."""
        return float(self.found.log_evidence[self.found.usable].mean())


def expect_shard(shard: Shard, models_path: Path, start: int, setting: Setting) -> tuple:
    """The task: accumulators (K, ..., 3), share (K,), residual and number of particles of each group; and what it
    learned of each particle, and position -> reason of what was left out."""
    models = np.load(models_path)[start]
    of = setting.of
    coarse, classes = (
        first_models.compared(models, setting.share, *looks, of, setting.shift_sd_px)
        for looks in (setting.centring, setting.comparison)
    )
    sums = classification.empty_sums(of, len(classes.log_share), len(setting.noise_power))
    inverse = (2 / setting.noise_power[:, : of.shell_max + 1]).astype(np.float32)
    found, left_out = [], {}
    scores = max(4 * c.angles * len(c.shift_px) * len(c.log_share) for c in (coarse, classes))
    read = int(np.clip(len(shard.rows), 1, _SMALLEST_SHARD))
    weighed = int(np.clip(_SCORES_BYTES // scores, 1, read))
    for first in range(0, len(shard.rows), read):
        images, transfer, group, bad = _working(shard, slice(first, first + read), of)
        for some in (slice(begin, begin + weighed) for begin in range(0, len(images), weighed)):
            batch = Images(images[some], transfer[:, some], inverse[group[some]], np.zeros((len(images[some]), 2)))
            batch = batch._replace(origin_px=classification.located(batch, coarse))
            found.append(classification.fold(sums, batch, group[some], classes))
        usable = np.concatenate([f.usable for f in found])[first:]
        bad.update({int(i): "the image is not finite" for i in np.flatnonzero(~usable)} | bad)
        left_out.update({first + position: reason for position, reason in bad.items()})
    every = Found(*(np.concatenate(column) for column in zip(*found, strict=True)))
    volumes = first_models.back_projected(sums, setting.comparison.rotation, of, setting.reach)
    share = sums.share.reshape(len(models), -1).sum(axis=1)
    residual = np.zeros_like(setting.noise_power)
    residual[:, : of.shell_max + 1] = sums.residual
    return volumes, share, residual, sums.particles, every, left_out


def improve(
    new: Sequence[np.ndarray], images: int, before: np.ndarray, replaced: float, mask: np.ndarray, group: np.ndarray,
    reach: int,
) -> tuple[np.ndarray, list[Model]]:  # fmt: skip
    """The task: sums of a start, a part of them replaced by new ones, and the models that they ask for."""
    sums = (1 - replaced) * before + np.float32(replaced / images) * np.stack(new)
    return sums, [first_models.improved(sums[:, k], mask, group, reach) for k in range(sums.shape[1])]


def _expect(job: _Job, state: State, plan: Plan, path: Path, start: int) -> tuple[list, list, list[np.ndarray]]:
    """Tasks of a start: the sums of its two halves, what is learned shard by shard, and the rows of the shards."""
    setting = _setting(job, plan, state.share[start], state.noise_power[start])
    sums, results, rows_of_shards = [], [], []
    for half in (1, 2):
        own = plan.rows[start][job.data.halves[plan.rows[start]] == half]
        size = int(np.clip(-(-len(own) // _SHARDS), _SMALLEST_SHARD, _LARGEST_SHARD))
        shards = [
            _shard(job, own[first : first + size], f"{start}-{half}-{number}")
            for number, first in enumerate(range(0, len(own), size))
        ]
        outs = [graph.call(expect_shard, s, path, start, setting, name=f"expect-{s.name}", parts=6) for s in shards]
        sums.append(
            [graph.tree_sum([out[part] for out in outs], name=f"sum-{start}-{half}-{part}") for part in range(4)]
        )
        results += [(out[4], out[5]) for out in outs]
        rows_of_shards += [shard.rows for shard in shards]
    return sums, results, rows_of_shards


def _learned(results: list, rows_of_shards: list[np.ndarray], views: np.ndarray) -> Learned:
    found = Found(*(np.concatenate(column) for column in zip(*(of for of, _ in results), strict=True)))
    model, view = np.divmod(found.class_number, len(views))
    zero = np.zeros(len(view))
    turned = matrix_from_euler(zero, zero, np.rad2deg(found.psi_rad)) @ views[view]
    return Learned(np.concatenate(rows_of_shards), found, turned, model, rows_of_shards, [left for _, left in results])


def _write_models(job: _Job, models: np.ndarray) -> Path:
    path = job.scratch / "models.npy"
    with replacing(path) as file:
        np.save(file, models)
    return path


def _iterate(
    job: _Job, state: State, plan: Plan, cluster: Cluster, run: Run, progress: Progress
) -> tuple[State, list[Learned]]:
    """One iteration of all starts, and the record of it."""
    began, number = time.monotonic(), state.iteration + 1
    path = _write_models(job, state.models)
    tasks = []
    for start, rows in enumerate(plan.rows):
        sums, results, rows_of_shards = _expect(job, state, plan, path, start)
        volumes = [half[0] for half in sums]
        better = graph.call(
            improve, volumes, len(rows), state.sums[start], plan.replaced, job.mask, plan.group, job.reach,
            name=f"improve-{start}", parts=2,
        )  # fmt: skip
        tasks.append((better[0], better[1], [half[1:] for half in sums], results, rows_of_shards))
    computed = graph.compute(tasks, cluster)
    views = first_models.views(plan.order, plan.perturbation, plan.group)
    learned = [_learned(results, rows_of_shards, views) for *_, results, rows_of_shards in computed]
    share, noise = state.share.copy(), state.noise_power.copy()
    for start, (_, _, sums, _, _) in enumerate(computed):
        shares, residuals, particles = (sums[0][part] + sums[1][part] for part in range(3))
        share[start] += plan.replaced * (shares / shares.sum() - share[start])
        noise[start] = _noise(noise[start], residuals, particles, plan.replaced)
    models = np.stack([[model.volume for model in of_start] for _, of_start, *_ in computed])
    if not (np.isfinite(models).all() and np.any(models)):
        raise RunError(f"iteration {number} gave an empty or not finite model; see the quarantined particles")
    curves = np.stack([[model.fsc for model in of_start] for _, of_start, *_ in computed])
    sums_of = np.stack([sums for sums, *_ in computed])
    state = State(number, models, sums_of, share, noise, curves, state.agreement)
    for of_start in learned:
        run.quarantine(quarantine_rows(job.data, of_start.rows_of_shards, of_start.left_out))
    figures = {
        "iteration": number,
        "phase": plan.name,
        "images": len(plan.rows[0]),
        "compared_to_A": _resolution_A(job, plan.shell),
        "log_evidence": [round(of_start.log_evidence, 3) for of_start in learned],
        "share": np.round(share, 4).tolist(),
        "max_probability": [round(float(of_start.found.max_probability.mean()), 4) for of_start in learned],
        "seconds": round(time.monotonic() - began, 2),
    }
    run.iteration(figures)
    evidence = ", ".join(f"{value:.1f}" for value in figures["log_evidence"])
    progress(
        f"iteration {number}: {figures['images']} images, compared to {figures['compared_to_A']:.1f} A, log-evidence "
        f"{evidence}, {figures['seconds']:.1f} s"
    )
    return state, learned


def _noise(before: np.ndarray, residual: np.ndarray, particles: np.ndarray, replaced: float) -> np.ndarray:
    """Noise spectra (G, R) after an iteration, which saw rings up to some shell and perhaps not all groups."""
    after = before.copy()
    there = particles > 0
    found = residual[there] / particles[there, None]
    seen = np.any(residual > 0, axis=0)
    floor = _LEAST_NOISE * before[there].mean(axis=1, keepdims=True)
    blended = before[there] + replaced * (np.maximum(found, floor) - before[there])
    after[there] = np.where(seen, blended, before[there])
    return after


def _resolution_A(job: _Job, shell: float) -> float:
    return round(resolution_A(shell, job.work_px, job.work_pixel_A), 2)


def _agreed(job: _Job, state: State, cluster: Cluster, progress: Progress) -> State:
    """The starts judged by the same images and compared; and what those that agree have in common, in the setting of
    the point group, to go on from."""
    count, shell = len(state.models), job.shells[1]
    plan = _everything(job, state)
    judges = np.sort(generator(job.options.seed, "judges", 0).permutation(len(job.data.particles))[:_JUDGED])
    plan = plan._replace(rows=[judges] * count, order=_order(job, shell, _DESCENT_ORDERS), group=np.eye(3)[None])
    path = _write_models(job, state.models)
    evidence = [[out[0] for out in _expect(job, state, plan, path, start)[1]] for start in range(count)]
    pairs = [(first, second) for first in range(count) for second in range(first + 1, count)]
    matches = [
        graph.call(
            first_models.matched, state.models[second], state.models[first], shell, name=f"match-{first}-{second}"
        )
        for first, second in pairs
    ]
    evidence, matches = graph.compute((evidence, matches), cluster)
    means = np.array([np.mean(np.concatenate([found.log_evidence for found in shards])) for shards in evidence])
    shells = np.full((count, count), float(job.work_px // 2))
    for (first, second), found in zip(pairs, matches, strict=True):
        shells[first, second] = shells[second, first] = min(fsc.crossing(match.fsc, fsc.HALF) for match in found)
    group = first_models.agreeing(shells, _AGREE * shell)
    best = int(group[np.argmax(means[group])])
    others = [int(other) for other in group if other != best]
    onto_best = [
        graph.call(first_models.matched, state.models[other], state.models[best], shell, name=f"match-best-{other}")
        for other in others
    ]
    common = [
        graph.call(
            first_models.common_model, k, state.models[best], state.models[others], onto_best, job.group, job.mask,
            shell, name=f"common-{k}", parts=2,
        )
        for k in range(job.options.classes)
    ]  # fmt: skip
    blob = np.stack([first_models.rounded(model) for model in state.models[best]])
    path = _write_models(job, blob[None])
    alone = replace(state, share=state.share[[best]], noise_power=state.noise_power[[best]])
    of_blob = [out[0] for out in _expect(job, alone, plan._replace(rows=[judges], order=0), path, 0)[1]]
    common, of_blob = graph.compute((common, of_blob), cluster)
    agreement = Agreement(
        [best, *others],
        np.round(means, 3).tolist(),
        round(float(np.mean(np.concatenate([found.log_evidence for found in of_blob]))), 3),
        [[_resolution_A(job, value) for value in row] for row in shells],
        [round(float(agree), 3) for _, agree in common],
    )
    progress(_of_agreement(agreement, job.options.symmetry))
    return replace(
        alone, models=np.stack([[model for model, _ in common]]), sums=np.zeros_like(state.sums[:1]),
        fsc=state.fsc[[best]], agreement=agreement,
    )  # fmt: skip


def _of_agreement(found: Agreement, symmetry: str) -> str:
    starts = len(found.evidence_of_starts)
    line = f"{len(found.agreeing)} of {starts} starts agree"
    if symmetry.upper() != "C1":
        line += f"; agreement with {symmetry}: " + ", ".join(f"{value:.2f}" for value in found.symmetry_agreement)
    return line


def _write(job: _Job, state: State, made: Learned, run: Run) -> AbinitioResult:
    assert state.agreement is not None
    data, options, share = job.data, job.options, state.share[0]
    box, pixel = data.store.box_px, data.store.pixel_size_A
    order = np.argsort(-share, kind="stable")
    maps = np.stack([filters.rescale_volume(state.models[0, k], box) for k in order])
    resolution = np.array([_resolution_A(job, fsc.crossing(state.fsc[0, k], fsc.HALF)) for k in order])
    for k, volume in enumerate(maps, start=1):
        mrc.write_map(run.path / f"class{k}.mrc", volume, pixel)
    write_curves(
        run.path / "fsc.csv", job.work_px, job.work_pixel_A,
        {f"fsc_class{k}": state.fsc[0, index] for k, index in enumerate(order, start=1)},
    )  # fmt: skip
    particles = _with_poses(job, made, order)
    star.write_particles(run.path / "particles.star", particles, None)
    agreement = state.agreement
    per_image = max(agreement.evidence_of_starts[agreement.agreeing[0]], 0.0)
    explained = per_image / max(agreement.evidence_of_blob, 1e-3)
    run.done(
        {
            "classes": len(maps),
            "share": np.round(share[order], 4).tolist(),
            "resolution_A": resolution.min(),
            "resolution_of_classes_A": resolution.tolist(),
            "starts": options.starts,
            "explained": round(explained, 2),
            **agreement._asdict(),
            "particles": len(particles),
            "box_px": box,
            "pixel_size_A": pixel,
            "mask_diameter_A": job.diameter_px * job.work_pixel_A,
        }
    )
    return AbinitioResult(
        run.path, maps, share[order], resolution, options.starts, len(agreement.agreeing), explained, particles
    )


def _with_poses(job: _Job, made: Learned, order: np.ndarray) -> Particles:
    """The particles with their class, pose and how sure that is; without those that could not be used."""
    n = len(job.data.particles)
    place = np.argsort(order)
    to_A = job.work_pixel_A
    back = np.argsort(made.rows, kind="stable")
    found, used = made.found, np.zeros(n, dtype=bool)
    used[made.rows] = found.usable
    return job.data.particles.replace(
        rotation=made.rotation[back],
        origin_A=found.origin_px[back] * to_A,
        class_number=place[made.model[back]] + 1,
        log_likelihood=found.log_evidence[back],
        max_probability=found.max_probability[back],
    ).take(used)


def _read(run: Run) -> AbinitioResult:
    """The result of a run that is done."""
    result = run.record["result"]
    maps = [mrc.read_map(run.path / f"class{k}.mrc").array for k in range(1, result["classes"] + 1)]
    return AbinitioResult(
        run.path, np.stack(maps), np.array(result["share"]), np.array(result["resolution_of_classes_A"]),
        result["starts"], len(result["agreeing"]), result["explained"],
        star.read_particles(run.path / "particles.star"),
    )  # fmt: skip
