"""Maps from the poses that particles have, as tasks: for `reconstruct`, and for refinements that start from poses."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcryo import graph
from dcryo.jobs import em
from dcryo.jobs.dataset import BATCH, Dataset, Shard, cut_shards
from dcryo.kernels.shells import half_plane
from dcryo.steps import ewald, expectation, maximisation


class Curvature(NamedTuple):
    """The curvature of the Ewald sphere that is corrected for: its hand, 1 or -1, and the particle's diameter."""

    hand: int
    diameter_A: float


def maps_of(
    data: Dataset,
    group: np.ndarray,
    mask: np.ndarray,
    scratch: Path,
    name: str = "reference",
    curvature: Curvature | None = None,
    merge: bool = True,
) -> tuple[em.Maps, list[list[graph.Task]]]:
    """Tasks: the maps of a data set's two halves, and for each half what its shards left out.

    The images are back-projected for a first map of each half, whose slices are then taken off the sums, which needs no
    image: what is left is the step from it to the map that explains them best (`solve.maximise`). name: of the first
    maps in `scratch`, of its own where a graph holds several data sets; curvature: of the Ewald sphere, None where it
    is taken to be flat; merge: as in `em.maximise`.
    """
    nyquist = data.store.box_px // 2
    volumes, references, results, ones = [], [], [], np.ones(len(data.particles))
    for half in (1, 2):
        shards = cut_shards(data, half, ones, ones, data.rotation, data.origin_px, ones > 0)
        slabs = len(em.slab_bounds(nyquist, data.store.box_px))
        outs = [
            graph.call(back_project_shard, shard, curvature, name=f"back-project-{shard.name}", parts=slabs + 1)
            for shard in shards
        ]
        sums = _trees(outs, slabs, f"half{half}")
        left_out = [out[slabs] for out in outs]
        accumulator = graph.call(maximisation.assemble, sums, group, name=f"first-assemble-{half}")
        first = graph.call(maximisation.first_map, accumulator, mask, group, nyquist, name=f"first-map-{half}")
        prepared = graph.call(
            em.write_reference, first, nyquist, scratch / f"{name}{half}.npy", name=f"reference-{half}"
        )
        outs = [
            graph.call(
                reference_shard,
                shard,
                prepared,
                bad,
                curvature,
                name=f"back-project-reference-{shard.name}",
                parts=slabs,
            )
            for shard, bad in zip(shards, left_out, strict=True)
        ]
        of_reference = _trees(outs, slabs, f"reference-half{half}")
        volumes.append(
            [
                graph.call(maximisation.innovations, *pair, name=f"innovations-half{half}-slab{part}")
                for part, pair in enumerate(zip(sums, of_reference, strict=True))
            ]
        )
        references.append(first)
        results.append(left_out)
    return em.maximise(volumes, references, group, nyquist, mask, merge), results


def _trees(outs: list, slabs: int, name: str) -> list[graph.Task]:
    """Sums over shards of each slab."""
    return [graph.tree_sum([out[part] for out in outs], name=f"{name}-slab{part}") for part in range(slabs)]


def back_project_shard(shard: Shard, curvature: Curvature | None) -> tuple:
    """The task: slabs of the shard's accumulator, and position -> reason of what was left out."""
    box = shard.store.box_px
    (volume,) = expectation.empty_sums(box // 2, 1, box).volumes
    left_out: dict[int, str] = {}
    for first in range(0, len(shard.rows), BATCH):
        some = slice(first, first + BATCH)
        batch, bad = shard.read(some)
        if curvature is None:
            usable = expectation.back_project(volume, batch, half_plane(box // 2))
        else:
            usable = ewald.back_project(volume, batch, shard.sidebands(some, *curvature), half_plane(box // 2))
        bad = dict.fromkeys(np.flatnonzero(~usable).tolist(), "the image is not finite") | bad
        left_out.update({first + position: reason for position, reason in bad.items()})
    return *(volume[bounds] for bounds in em.slab_bounds(box // 2, box)), left_out


def reference_shard(shard: Shard, reference_path: Path, left_out: dict[int, str], curvature: Curvature | None) -> tuple:
    """The task: slabs of what a reference's slices, in place of the shard's images, would have summed to, but for what
    was left out."""
    box = shard.store.box_px
    reference = em.read_reference(reference_path)
    volume = np.zeros_like(reference)
    kept = np.ones(len(shard.rows), dtype=bool)
    kept[list(left_out)] = False
    for first in range(0, len(shard.rows), BATCH):
        some = slice(first, first + BATCH)
        used = kept[some]
        turn, pixels = shard.rotation[some][used], half_plane(box // 2)
        if curvature is None:
            expectation.slices_back_projected(volume, reference, turn, shard.transfer(some)[used], pixels, box)
        else:
            sidebands = shard.sidebands(some, *curvature).take(used)
            ewald.sections_back_projected(volume, reference, turn, sidebands, pixels, box)
    return tuple(volume[bounds] for bounds in em.slab_bounds(box // 2, box))
