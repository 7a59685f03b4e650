"""One iteration of expectation and maximisation over a store, as a graph.

The data set alone decides how particles are cut into shards and in which order sums are added. A task gets a path and
row numbers, reads its images, folds batch after batch into one set of sums and returns it in slabs, which are added
slab by slab. References go through the run directory, where every worker maps them.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcryo import graph
from dcryo.cluster import Cluster
from dcryo.errors import RunError
from dcryo.jobs.dataset import BATCH, Dataset, Shard, cut_shards
from dcryo.kernels import slices
from dcryo.kernels.shells import HalfPlane, half_plane
from dcryo.steps import expectation, maximisation
from dcryo.steps.expectation import Batch, Grid, Poses, References, Sums
from dcryo.steps.maximisation import HalfFsc
from dcryo.steps.search import Search

_SLAB_BYTES = 64 << 20
# Images of each half that tell the first noise spectra.
_SPECTRUM_PARTICLES = 1024
# Noise in a shell is at least this part of the mean over the shells.
_LEAST_NOISE = 1e-6


@dataclass(frozen=True)
class Setting:
    """What all shards of a half share in an iteration.

    search: of particles whose poses are not trusted; nearby: of those that are; noise_power: (G, D // 2 + 1);
    shell_max: highest shell back-projected; share, assigned: as in `expectation.References`, for each of K references.
    """

    search: Search
    nearby: Search
    noise_power: np.ndarray
    shell_max: int
    share: tuple[float, ...] = (1.0,)
    assigned: bool = False


class ShardResult(NamedTuple):
    """What a shard learned of its particles. left_out: position in the shard -> reason."""

    poses: Poses
    left_out: dict[int, str]


class Half(NamedTuple):
    """What an iteration found in one half: residual (G, D // 2 + 1) and particles (G,) as in `expectation.Sums`, and a
    ShardResult per shard, in order."""

    residual: np.ndarray
    particles: np.ndarray
    shards: list[ShardResult]


class Maps(NamedTuple):
    """What the maximisation step makes of the sums of two halves.

    plain: two maps (D, D, D) float32; fsc: between them; regularised: the two references of the next iteration, None
    where the halves are merged; merged: the map of all particles, None but there.
    """

    plain: list
    fsc: HalfFsc
    regularised: list | None
    merged: np.ndarray | None


class Iteration(NamedTuple):
    """An iteration: the maps of each class, and what it found in the two halves."""

    classes: list[Maps]
    halves: tuple[Half, Half]


def slab_bounds(shell_max: int, box_px: int) -> list[slice]:
    """How an accumulator is cut along z into slabs of about 64 MiB."""
    depth, height, width = slices.volume_shape(shell_max, box_px)
    planes = max(1, _SLAB_BYTES // (height * width * 3 * 4))
    return [slice(first, min(first + planes, depth)) for first in range(0, depth, planes)]


def iterate(
    shards: tuple[Sequence[Shard], Sequence[Shard]],
    references: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    settings: tuple[Setting, Setting],
    mask: np.ndarray,
    scratch: Path,
    cluster: Cluster,
    merge: bool,
    local_filters: bool = False,
    tau2_factor: float = 1.0,
) -> Iteration:
    """Expectation over all shards, maximisation of both halves of each class.

    references: for each half K maps (D, D, D) float32, masked; mask: (D, D, D), for the FSC; scratch: a directory that
    all workers see; merge: the halves of each class are merged, as in a last iteration, and have no references of their
    own; local_filters: the next references are filtered place by place; tau2_factor: on the power of the prior.
    """
    shell_max, count = settings[0].shell_max, len(references[0])
    slabs = len(slab_bounds(shell_max, mask.shape[0]))
    volumes, sums, results, paths = [], [], [], []
    for half, (own, of_half, setting) in enumerate(zip(shards, references, settings, strict=True), start=1):
        prepared = []
        for number, reference in enumerate(of_half, start=1):
            path = scratch / f"reference{half}-{number}.npy"
            name = f"reference-{half}-{number}"
            prepared.append(graph.call(write_reference, reference, shell_max, path, name=name))
            paths.append(path)
        outs = [
            graph.call(expect_shard, shard, prepared, setting, name=f"expect-{shard.name}", parts=count * slabs + 3)
            for shard in own
        ]
        totals = [
            graph.tree_sum([out[part] for out in outs], name=f"half{half}-part{part}")
            for part in range(count * slabs + 2)
        ]
        volumes.append([totals[number * slabs : (number + 1) * slabs] for number in range(count)])
        sums.append(totals[-2:])
        results.append([out[-1] for out in outs])
    classes = []
    for number in range(count):
        # A reference of unknown grey scale is not taken off the images.
        known = None if settings[0].search.profile_scale else [of_half[number] for of_half in references]
        slabs_of = [of_half[number] for of_half in volumes]
        classes.append(
            maximise(slabs_of, known, settings[0].search.operators, shell_max, mask, merge, local_filters, tau2_factor)
        )
    classes, sums, results = graph.compute((classes, sums, results), cluster)
    for path in paths:
        path.unlink(missing_ok=True)
    return Iteration(classes, (Half(sums[0][0], sums[0][1], results[0]), Half(sums[1][0], sums[1][1], results[1])))


def maximise(
    volumes: Sequence[Sequence[graph.Task]],
    references: Sequence[np.ndarray | graph.Task] | None,
    operators: np.ndarray,
    shell_max: int,
    mask: np.ndarray,
    merge: bool,
    local_filters: bool = False,
    tau2_factor: float = 1.0,
) -> Maps:
    """Tasks from the slabs of the two halves' sums to their maps: a `Maps` whose items are tasks."""
    box = mask.shape[0]
    accumulators = [
        graph.call(maximisation.assemble, slabs, operators, name=f"assemble-{half}")
        for half, slabs in enumerate(volumes, start=1)
    ]
    pairs = list(zip(accumulators, references or (None, None), strict=True))
    plain = [
        graph.call(maximisation.plain_map, *pair, operators, shell_max, box, name=f"plain-{half}")
        for half, pair in enumerate(pairs, start=1)
    ]
    fsc = graph.call(maximisation.half_fsc, *plain, mask, name="fsc")
    if merge:
        merged = graph.call(
            maximisation.merged_map,
            *accumulators,
            references,
            fsc,
            operators,
            shell_max,
            box,
            tau2_factor,
            name="merge",
        )
        return Maps(plain, fsc, None, merged)
    regularised = [
        graph.call(
            maximisation.regularised_map, *pair, fsc, operators, shell_max, box, tau2_factor, name=f"regularise-{half}"
        )
        for half, pair in enumerate(pairs, start=1)
    ]
    if local_filters:
        place = graph.call(maximisation.local_filters, regularised, plain, fsc, name="local-filters")
        regularised = [
            graph.call(maximisation.filtered, one, place, fsc, name=f"filter-{half}")
            for half, one in enumerate(regularised, start=1)
        ]
    return Maps(plain, fsc, regularised, None)


def merged(maps: Maps) -> np.ndarray:
    """The map of all particles, of an iteration that merges its halves."""
    if maps.merged is None:
        raise ValueError("the halves of this iteration were not merged")
    return maps.merged


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A directory for what tasks share while a run goes on; a killed task or run may have left something in it."""
    path = (out / "scratch").absolute()
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def write_reference(reference: np.ndarray, shell_max: int, path: Path) -> Path:
    """Prepare a reference for slicing and leave it where every task can map it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npy")
    with os.fdopen(handle, "wb") as file:
        np.save(file, slices.prepare(reference, shell_max))
    os.replace(temporary, path)
    return path


def read_reference(path: Path) -> np.ndarray:
    """Map what `write_reference` left."""
    # Copy-on-write only so that kernels see the same array type as in memory; nobody writes.
    return np.asarray(np.load(path, mmap_mode="c"))


def expect_shard(shard: Shard, reference_paths: Sequence[Path], setting: Setting) -> tuple:
    """The task: slabs of the shard's sums, of one reference after the other, the residual and number of its particles,
    and its ShardResult."""
    references = References(
        [read_reference(path) for path in reference_paths], np.array(setting.share), setting.assigned
    )
    box = shard.store.box_px
    pixels = half_plane(setting.shell_max)
    sums = expectation.empty_sums(setting.shell_max, len(setting.noise_power), box, len(reference_paths))
    grid = None
    if not shard.trusted.all():
        grid = expectation.global_grid(references, setting.search, box)
    poses, left_out = [], {}
    for first in range(0, len(shard.rows), BATCH):
        some = slice(first, first + BATCH)
        batch, bad = shard.read(some)
        found = _folded(sums, batch, shard.trusted[some], references, setting, pixels, grid)
        poses.append(found)
        bad.update({int(i): "its likelihood is not a finite number" for i in np.flatnonzero(~found.usable)} | bad)
        left_out.update({first + position: reason for position, reason in bad.items()})
    every = Poses(*(np.concatenate(column) for column in zip(*poses, strict=True)))
    slabs = [volume[bounds] for volume in sums.volumes for bounds in slab_bounds(setting.shell_max, box)]
    return (*slabs, sums.residual, sums.particles, ShardResult(every, left_out))


def _folded(
    sums: Sums,
    batch: Batch,
    trusted: np.ndarray,
    references: References,
    setting: Setting,
    pixels: HalfPlane,
    grid: Grid | None,
) -> Poses:
    """Particles whose poses are trusted folded by the search nearby, the others by the other; poses in their order."""
    if trusted.all() or not trusted.any():
        search = setting.nearby if trusted.all() else setting.search
        return expectation.fold(sums, batch, references, setting.noise_power, search, pixels, grid)
    found, order = [], []
    for search, rows in ((setting.search, np.flatnonzero(~trusted)), (setting.nearby, np.flatnonzero(trusted))):
        own = Batch(*(column[rows] for column in batch))
        found.append(expectation.fold(sums, own, references, setting.noise_power, search, pixels, grid))
        order.append(rows)
    back = np.argsort(np.concatenate(order))
    return Poses(*(np.concatenate(column)[back] for column in zip(*found, strict=True)))


def all_poses(shards: Sequence[ShardResult]) -> Poses:
    """Poses of a half's particles, in the order of the shards."""
    return Poses(*(np.concatenate(column) for column in zip(*(shard.poses for shard in shards), strict=True)))


def first_noise(data: Dataset, cluster: Cluster) -> np.ndarray:
    """Noise before anything is known: the mean power of each half's images, (2, G, D // 2 + 1)."""
    n = len(data.particles)
    ones, blank, nobody = np.ones(n), np.zeros((n, 2)), np.zeros(n, dtype=bool)
    powers = [
        graph.call(
            mean_power,
            cut_shards(data, half, ones, ones, data.rotation, blank, nobody),
            data.n_groups,
            _SPECTRUM_PARTICLES,
            name=f"power-{half}",
        )
        for half in (1, 2)
    ]
    return np.stack(graph.compute(powers, cluster))


def noise_after(before: np.ndarray, residual: np.ndarray, particles: np.ndarray) -> np.ndarray:
    """Noise power per optics group after an iteration, (G, D // 2 + 1); groups without particles keep theirs.

    residual, particles: as in `Half`.
    """
    seen, noise = particles > 0, before.copy()
    found = residual[seen] / particles[seen, None]
    # Images without noise, which simulations make, would have weights without limit.
    noise[seen] = np.maximum(found, _LEAST_NOISE * found.mean(axis=1, keepdims=True))
    return noise


def mean_power(shards: Sequence[Shard], groups: int, at_most: int) -> np.ndarray:
    """A task: mean power of images per shell, (groups, D // 2 + 1), from at most so many images spread over a half.

    Optics groups without an image among them get the mean of the others.
    """
    total = sum(len(shard.rows) for shard in shards)
    step = max(1, total // at_most)
    sums, counts = np.zeros((groups, shards[0].store.box_px // 2 + 1)), np.zeros(groups)
    for shard in shards:
        for first in range(0, len(shard.rows), BATCH * step):
            batch, _ = shard.read(slice(first, first + BATCH * step, step))
            power, particles = expectation.power(batch, groups)
            sums += power
            counts += particles
    if not np.any(counts):
        raise RunError("none of the images could be read; see the report of the import")
    overall = np.sum(sums, axis=0) / np.sum(counts)
    return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], overall)
