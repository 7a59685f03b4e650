"""The iterations of ab initio models: what they are to be, their tasks, and what becomes of their sums."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcryo import graph
from dcryo.cluster import Cluster
from dcryo.data.atomic import replacing
from dcryo.data.run import Run
from dcryo.errors import RunError
from dcryo.euler import matrix_from_euler
from dcryo.jobs.dataset import Dataset, Shard, mini_batch, quarantine_rows, shard_rows
from dcryo.jobs.options import Progress
from dcryo.kernels import masks, rings, rotations, sampling
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import resolution_A
from dcryo.steps import classification, first_models
from dcryo.steps.classification import Found, Images
from dcryo.steps.first_models import Model

# Mini-batches: how many images are in each at first and at last for every class, and how much of the sums an iteration
# replaces, at first and at last.
_BATCH, _REPLACED = (100, 250), (0.9, 0.3)
# The resolution grows between these parts of the descent.
_GROWTH = (0.1, 0.5)
# Directions of view are so far apart that the edge of the particle moves by this part of the resolution.
_EDGE_STEP, DESCENT_ORDERS, _FINAL_ORDERS = 0.9, (1, 2), (2, 3)
# Images are centred with views so far apart first. Shifts are this part of the resolution apart.
_CENTRING_ORDER = 1
_SHIFT_STEP = 1 / 3
# Shells past the compared ones that are back-projected.
_HEADROOM_SHELLS = 3
# Rings hold what is a little outside of the mask too.
_SEEN_DIAMETER = 1.2
_SCORES_BYTES = 8 << 20
_SHARDS, _SMALLEST_SHARD, _LARGEST_SHARD = 8, 64, 2048
_LEAST_NOISE = 1e-3
# Iterations of a descent are short: of so many one leaves a line.
_TOLD_EVERY = 10


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


@dataclass(frozen=True)
class Job:
    """What does not change from one iteration to the next; lengths in pixels of the working box.

    starts, classes: S and K; descent: number of iterations over mini-batches; shells: up to which images are compared
    at first and at last; mask: (d, d, d); group: (G, 3, 3); scratch: a directory that all workers see.
    """

    data: Dataset
    seed: int
    starts: int
    classes: int
    descent: int
    work_px: int
    diameter_px: float
    shift_range_px: float
    shells: tuple[int, int]
    mask: np.ndarray
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

    def resolution_A(self, shell: float) -> float:
        return round(resolution_A(shell, self.work_px, self.work_pixel_A), 2)


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


def descent(job: Job, state: State) -> Plan:
    """The plan of an iteration over mini-batches."""
    n = len(job.data.particles)
    done = state.iteration / max(job.descent - 1, 1)
    grown = np.clip((done - _GROWTH[0]) / (_GROWTH[1] - _GROWTH[0]), 0, 1)
    shell = round(job.shells[0] + grown * (job.shells[1] - job.shells[0]))
    size = min(n, job.classes * round(_BATCH[0] + done * (_BATCH[1] - _BATCH[0])))
    replaced = _REPLACED[0] * (_REPLACED[1] / _REPLACED[0]) ** done if state.iteration else 1.0
    random = generator(job.seed, "views", state.iteration)
    rows = [
        mini_batch(n, size, job.seed, f"mini-batches of start {start}", state.iteration) for start in range(job.starts)
    ]
    turn = rotations.random_rotations(1, random)[0]
    return Plan(rows, shell, order(job, shell, DESCENT_ORDERS), turn, replaced, np.eye(3)[None], "descent")


def everything(job: Job, state: State) -> Plan:
    """The plan of an iteration over all images, with symmetry."""
    shell = job.shells[1]
    turn = rotations.random_rotations(1, generator(job.seed, "views", state.iteration))[0]
    rows = [np.arange(len(job.data.particles))]
    return Plan(rows, shell, order(job, shell, _FINAL_ORDERS), turn, 1.0, job.group, "all images")


def order(job: Job, shell: int, orders: tuple[int, int]) -> int:
    """Order of the grid of views for a resolution."""
    step = np.rad2deg(_EDGE_STEP * job.work_px / shell / (job.diameter_px / 2))
    return int(np.clip(sampling.order_for_step(step), *orders))


def _setting(job: Job, plan: Plan, share: np.ndarray, noise_power: np.ndarray) -> Setting:
    step = _shift_step_px(job, plan.shell)
    reach = max(job.shift_range_px, step)
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


def _shift_step_px(job: Job, shell: int) -> float:
    return max(0.7, _SHIFT_STEP * job.work_px / shell)


def shard(job: Job, rows: np.ndarray, name: str) -> Shard:
    n = len(job.data.particles)
    ones, nothing = np.ones(n), np.zeros((n, 2))
    return shard_rows(job.data, rows, name, ones, ones, job.data.rotation, nothing, np.ones(n, bool))


def working(shard: Shard, some: slice, of: rings.Rings) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
    """A batch: images (n, d, d) in the working box, CTFs on the rings (angles / 2, n, R), groups (n,), and which of
    them cannot be used, as position -> reason."""
    batch, bad = shard.read(some)
    box = shard.store.box_px
    images = batch.images * masks.circle(box, box - 6, 5)
    working = first_models.working_images(images, of.box_px)
    return working, shard.transfer_on_rings(some, of), batch.group, bad


def ring_power(shard: Shard, of: rings.Rings, groups: int) -> np.ndarray:
    """A task: mean power of a shard's images on each ring, (G, R); of groups without any, that of all."""
    total, count = np.zeros((groups, of.shell_max + 1)), np.zeros(groups)
    for first in range(0, len(shard.rows), _SMALLEST_SHARD):
        images, _, group, _ = working(shard, slice(first, first + _SMALLEST_SHARD), of)
        usable = np.isfinite(images).all(axis=(1, 2))
        power = np.mean(np.abs(rings.sample(images[usable], of)) ** 2, axis=0)
        np.add.at(total, group[usable], power)
        np.add.at(count, group[usable], 1)
    everyone = total.sum(axis=0) / max(count.sum(), 1)
    return np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], everyone)


class Learned(NamedTuple):
    """What an iteration learned of the images of a start: rows, in the order of what was found of them, the pose and
    model of each, and position -> reason of what was left out, by shard."""

    rows: np.ndarray
    found: Found
    rotation: np.ndarray
    model: np.ndarray
    rows_of_shards: list[np.ndarray]
    left_out: list[dict[int, str]]


def mean_evidence(found: Sequence[Found]) -> float:
    """Mean over the usable images of the logarithm of how much better the models explain them than nothing does."""
    return float(np.mean(np.concatenate([of.log_evidence[of.usable] for of in found])))


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
        images, transfer, group, bad = working(shard, slice(first, first + read), of)
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


def expect(job: Job, state: State, plan: Plan, path: Path, start: int) -> tuple[list, list, list[np.ndarray]]:
    """Tasks of a start: the sums of its two halves, what is learned shard by shard, and the rows of the shards."""
    setting = _setting(job, plan, state.share[start], state.noise_power[start])
    sums, results, rows_of_shards = [], [], []
    for half in (1, 2):
        own = plan.rows[start][job.data.halves[plan.rows[start]] == half]
        size = int(np.clip(-(-len(own) // _SHARDS), _SMALLEST_SHARD, _LARGEST_SHARD))
        shards = [
            shard(job, own[first : first + size], f"{start}-{half}-{number}")
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


def write_models(job: Job, models: np.ndarray) -> Path:
    path = job.scratch / "models.npy"
    with replacing(path) as file:
        np.save(file, models)
    return path


def iterate(
    job: Job, state: State, plan: Plan, cluster: Cluster, run: Run, progress: Progress
) -> tuple[State, list[Learned]]:
    """One iteration of all starts, and the record of it."""
    began, number = time.monotonic(), state.iteration + 1
    path = write_models(job, state.models)
    tasks = []
    for start, rows in enumerate(plan.rows):
        sums, results, rows_of_shards = expect(job, state, plan, path, start)
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
        "compared_to_A": job.resolution_A(plan.shell),
        "log_evidence": [round(mean_evidence([of_start.found]), 3) for of_start in learned],
        "share": np.round(share, 4).tolist(),
        "max_probability": [round(float(of_start.found.max_probability.mean()), 4) for of_start in learned],
        "seconds": round(time.monotonic() - began, 2),
    }
    run.iteration(figures)
    evidence = ", ".join(f"{value:.1f}" for value in figures["log_evidence"])
    progress(
        f"iteration {number}: {figures['images']} images, compared to {figures['compared_to_A']:.1f} A, log-evidence "
        f"{evidence}, {figures['seconds']:.1f} s",
        end="\r" if plan.name == "descent" and number % _TOLD_EVERY else "\n",
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
