"""Parts of `validate`: the run that is tested, its particles with random phases, and images aligned to a map."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcryo import graph
from dcryo.cluster import Cluster
from dcryo.data import mrc, star
from dcryo.data.curves import read_curves
from dcryo.data.particles import Particles
from dcryo.data.provenance import digest
from dcryo.data.run import Run
from dcryo.data.store import Store, is_store, open_store, select
from dcryo.data.store_writer import create
from dcryo.errors import InputError, RunError
from dcryo.jobs import em
from dcryo.jobs.dataset import BATCH, Dataset, Shard, load_dataset, rows_in_store, shard_rows, shard_size
from dcryo.kernels import rotations, sampling
from dcryo.kernels.overfitting import noise_substituted
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import half_plane
from dcryo.kernels.symmetry import operators
from dcryo.steps import expectation, overfitting
from dcryo.steps.search import Search, plan_search

# Images of one task, and particles of a half that are aligned at most.
_IMAGES, _MOST_ALIGNED = 512, 4096
_FILES = ("half1.mrc", "half2.mrc", "map.mrc", "mask.mrc", "fsc.csv", "spectra.csv", "particles.star")


@dataclass(frozen=True)
class Tested:
    """A finished refinement. store: what it was made from; rows: of its particles in that; particles: as it left them;
    options: those it was given; fsc: under the mask, (D // 2 + 1,)."""

    path: Path
    store: Store
    rows: np.ndarray
    particles: Particles
    options: dict[str, Any]
    seed: int
    fsc: np.ndarray
    mask: np.ndarray
    resolution_A: float
    diameter_A: float

    @property
    def width_A(self) -> float:
        return self.store.box_px * self.store.pixel_size_A

    def selection(self, path: Path, which: np.ndarray, posed: bool) -> Store:
        """Those of its particles (positions) as a selection, in the halves that they were in; with their poses, or as
        they were before."""
        names = ("half", "rotation", "origin_A", "ctf_scale") if posed else ("half",)
        if is_store(path):
            return open_store(path)
        return select(self.store, self.rows[which], path, {name: self.particles[name][which] for name in names})


def open_tested(path: Path) -> Tested:
    """Read a run of `refine`. InputError where it is none, is not done, or what it was made from is not there as it
    was."""
    run = Run.open(path)
    record = run.record
    if record["job"] != "refine" or not run.finished:
        raise InputError(f"{path}: a run of {record['job']} that is {record['status']}; expected one of refine, done")
    absent = [name for name in _FILES if not (path / name).is_file()]
    if absent:
        raise InputError(f"{path}: has no {absent[0]}; restore it, or repeat the refinement")
    for row in record["inputs"]:
        if digest(row["path"])["digest"] != row["digest"]:
            raise InputError(
                f"{row['path']}: is not what {path} was made from (its digest differs); restore it, or refine again"
            )
    store = open_store(Path(record["inputs"][0]["path"]))
    particles = star.read_particles(path / "particles.star")
    rows = rows_in_store(store, particles, path / "particles.star")
    return Tested(
        path, store, rows, particles, record["options"], record["seed"],
        read_curves(path / "fsc.csv")["fsc_masked"], mrc.read_map(path / "mask.mrc").array,
        record["result"]["resolution_A"], record["result"]["mask_diameter_A"],
    )  # fmt: skip


def substituted_store(source: Store, path: Path, shell: int, seed: int, cluster: Cluster) -> Store:
    """A store of the images of another with random phases from a shell on; what a killed writer left is gone on with.

    The phases are keyed by the row in the store that holds the image.
    """
    if is_store(path):
        return open_store(path)
    origin = f"{source.fingerprint}/{seed}/{shell}"
    writer = create(
        path, n_images=source.n, box_px=source.box_px, pixel_size_A=source.pixel_size_A, dtype=source.dtype,
        scale=source.scale, origin=origin, resume=True,
    )  # fmt: skip
    while writer.written < source.n:
        rows = np.arange(writer.written, min(writer.written + writer.shard_images, source.n))
        parts = np.array_split(rows, -(-len(rows) // _IMAGES))
        tasks = [graph.call(substituted, source, part, shell, seed, name=f"random-phases-{part[0]}") for part in parts]
        writer.write(np.concatenate(graph.compute(tasks, cluster)), {})
    return writer.finish(source.particles(), [], {"random phases of": str(source.path)})


def substituted(source: Store, rows: np.ndarray, shell: int, seed: int) -> np.ndarray:
    """The task: images of rows with random phases from a shell on, in the stored type, divided by the scale."""
    read = source.read(rows)
    if read.bad:
        position, reason = next(iter(read.bad.items()))
        raise RunError(f"{source.path}: particle {rows[position] + 1} cannot be read any more: {reason}")
    images = noise_substituted(read.images, shell, seed, source.rows()[rows])
    return (images / np.float32(source.scale)).astype(source.dtype)


def drawn(count: int, seed: int, name: str, number: int) -> np.ndarray:
    """So many positions of particles that are aligned at most, in their order."""
    every = generator(seed, name, number).permutation(count)[:_MOST_ALIGNED]
    return np.sort(every)


def aligned_agreement(
    tested: Tested,
    half: int,
    source: Path,
    rows: np.ndarray,
    shell: int,
    name: str,
    scratch: Path,
    seed: int,
) -> graph.Task:
    """A task: `overfitting.ring_correlations` of rows of a store with a half map, aligned to it up to a shell, summed."""
    data = load_dataset(source, seed)
    group = operators(tested.options["symmetry"])
    turn = rotations.perturbation(sampling.step_deg(3) / 2, generator(seed, "grid", 0))
    box, pixel = tested.store.box_px, tested.store.pixel_size_A
    search = plan_search(
        shell, box, pixel, tested.diameter_A, tested.options["shift_range_A"] or 0.1 * tested.diameter_A,
        posed_shell=0, shares=np.zeros(shell + 1), perturbation=turn, operators=group,
    )  # fmt: skip
    noise = np.tile(read_curves(tested.path / "spectra.csv")[f"noise_half{half}"], (data.n_groups, 1))
    reference = mrc.read_map(tested.path / f"half{half}.mrc").array * tested.mask
    prepared = graph.call(
        em.write_reference, reference, box // 2, scratch / f"half{half}-{name}.npy", name=f"reference-{half}-{name}"
    )
    tasks = [
        graph.call(align_shard, shard, prepared, search, noise, shell, name=f"align-{name}-{shard.name}")
        for shard in _shards(data, rows, f"half{half}")
    ]
    return graph.tree_sum(tasks, name=f"correlations-{half}-{name}")


def _shards(data: Dataset, rows: np.ndarray, name: str) -> list[Shard]:
    n, size = len(data.particles), shard_size(len(rows))
    ones, blank, nobody = np.ones(n), np.zeros((n, 2)), np.zeros(n, dtype=bool)
    return [
        shard_rows(
            data, rows[first : first + size], f"{name}-{first // size}", ones, ones, data.rotation, blank, nobody
        )
        for first in range(0, len(rows), size)
    ]


def align_shard(shard: Shard, reference_path: Path, search: Search, noise_power: np.ndarray, shell: int) -> np.ndarray:
    """The task: images looked for everywhere up to a shell, and how they correlate with the map at all shells."""
    reference = em.read_reference(reference_path)
    box, pixels = shard.store.box_px, half_plane(shell)
    grid = expectation.global_grid(reference, search, box)
    sums = expectation.empty_sums(box // 2, len(noise_power), box)
    found = np.zeros((3, box // 2 + 1))
    for first in range(0, len(shard.rows), BATCH):
        batch, _ = shard.read(slice(first, first + BATCH))
        poses = expectation.fold(sums, batch, reference, noise_power, search, pixels, grid)
        batch.images[~poses.usable] = np.nan
        found += overfitting.ring_correlations(
            batch._replace(rotation=poses.rotation, origin_px=poses.origin_px), reference
        )
    return found
