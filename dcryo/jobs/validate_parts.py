"""Parts of `validate`: a run's images with random phases, and images aligned to its half maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcryo import graph
from dcryo.cluster import Cluster
from dcryo.data.store import Store, is_store, open_store
from dcryo.data.store_writer import create
from dcryo.jobs import em
from dcryo.jobs.dataset import BATCH, Dataset, Shard, load_dataset, shard_rows, shard_size
from dcryo.jobs.memory import check_memory, expectation_bytes
from dcryo.jobs.refined import Refined
from dcryo.kernels import rotations, sampling
from dcryo.kernels.overfitting import noise_substituted
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import half_plane
from dcryo.steps import expectation, overfitting
from dcryo.steps.search import Search, plan_search

# Images of one task, and particles that are aligned to a half map at most.
_IMAGES, _MOST_ALIGNED = 512, 4096


def substituted_store(source: Store, path: Path, shell: int, seed: int, cluster: Cluster) -> Store:
    """A store of another's images with random phases from a shell on; what a killed writer left is gone on with."""
    if is_store(path):
        return open_store(path)
    writer = create(
        path, n_images=source.n, box_px=source.box_px, pixel_size_A=source.pixel_size_A, dtype=source.dtype,
        scale=source.scale, origin=f"{source.fingerprint}/{seed}/{shell}", resume=True,
    )  # fmt: skip
    while writer.written < source.n:
        rows = np.arange(writer.written, min(writer.written + writer.shard_images, source.n))
        parts = np.array_split(rows, -(-len(rows) // _IMAGES))
        tasks = [graph.call(substituted, source, part, shell, seed, name=f"random-phases-{part[0]}") for part in parts]
        writer.write(np.concatenate(graph.compute(tasks, cluster)), {})
    return writer.finish(source.particles(), [], {"random phases of": str(source.path)})


def substituted(source: Store, rows: np.ndarray, shell: int, seed: int) -> np.ndarray:
    """The task: images of rows with random phases from a shell on, as they are stored. One that cannot be read is not a
    number, as in a store that lacks it."""
    read = source.read(rows)
    images = noise_substituted(read.images, shell, seed) / np.float32(source.scale)
    images[list(read.bad)] = np.nan
    return images.astype(source.dtype)


@dataclass(frozen=True)
class Alignment:
    """How images are aligned to the half maps of a run, in `scratch`: everywhere, up to a shell."""

    tested: Refined
    shell: int
    seed: int
    scratch: Path
    search: Search

    @classmethod
    def planned(cls, tested: Refined, shell: int, seed: int, scratch: Path) -> "Alignment":
        turn = rotations.perturbation(sampling.step_deg(3) / 2, generator(seed, "grid", 0))
        search = plan_search(
            shell, tested.store.box_px, tested.store.pixel_size_A, tested.diameter_A,
            tested.options["shift_range_A"] or 0.1 * tested.diameter_A, posed_shell=0, shares=np.zeros((1, shell + 1)),
            perturbation=turn, operators=tested.group,
        )  # fmt: skip
        return cls(tested, shell, seed, scratch, search)

    def check_memory(self, cluster: Cluster) -> None:
        """InputError where a worker has too little for a task."""
        box = self.tested.store.box_px
        needed = expectation_bytes(box, box // 2, self.search, len(self.tested.group))
        check_memory(cluster, box, needed, len(self.tested.group))

    def drawn(self, candidates: Sequence[int] | np.ndarray, number: int) -> np.ndarray:
        """Those of the candidates that are aligned, in their order: all, or as many as there is use for."""
        order = generator(self.seed, "aligned", number).permutation(len(candidates))
        return np.asarray(candidates)[np.sort(order[:_MOST_ALIGNED])]

    def agreement(self, half: int, source: Path, rows: np.ndarray, name: str) -> graph.Task:
        """A task: the sum of `overfitting.ring_correlations` of rows of a store, once aligned, with a half map."""
        tested, data, box = self.tested, load_dataset(source, self.seed), self.tested.store.box_px
        noise = np.tile(tested.noise_power(half), (data.n_groups, 1))
        reference = tested.half_map(half) * tested.mask
        prepared = graph.call(
            em.write_reference, reference, box // 2, self.scratch / f"half{half}-{name}.npy", name=f"half{half}-{name}"
        )
        tasks = [
            graph.call(align_shard, shard, prepared, self.search, noise, self.shell, name=f"align-{name}-{shard.name}")
            for shard in _unposed_shards(data, rows, f"half{half}")
        ]
        return graph.tree_sum(tasks, name=f"correlations-{name}-half{half}")


def _unposed_shards(data: Dataset, rows: np.ndarray, name: str) -> list[Shard]:
    n, size = len(data.particles), shard_size(len(rows))
    ones, blank, nobody = np.ones(n), np.zeros((n, 2)), np.zeros(n, dtype=bool)
    return [
        shard_rows(
            data, rows[first : first + size], f"{name}-{first // size}", ones, ones, data.rotation, blank, nobody
        )
        for first in range(0, len(rows), size)
    ]


def align_shard(shard: Shard, reference_path: Path, search: Search, noise_power: np.ndarray, shell: int) -> np.ndarray:
    """The task: images looked for everywhere up to a shell, and how they correlate with the map in all shells."""
    reference = em.read_reference(reference_path)
    box, pixels = shard.store.box_px, half_plane(shell)
    references = expectation.single(reference)
    grid = expectation.global_grid(references, search, box)
    sums = expectation.empty_sums(box // 2, len(noise_power), box)
    found = np.zeros((3, box // 2 + 1))
    for first in range(0, len(shard.rows), BATCH):
        batch, _ = shard.read(slice(first, first + BATCH))
        poses = expectation.fold(sums, batch, references, noise_power, search, pixels, grid)
        batch.images[~poses.usable] = np.nan
        found += overfitting.ring_correlations(
            batch._replace(rotation=poses.rotation, origin_px=poses.origin_px), reference
        )
    return found
