"""Maps from the poses that particles already have."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field, model_validator

from dcryo import graph
from dcryo.cluster import check_kind, connect
from dcryo.data.run import Run
from dcryo.errors import InputError, RunError
from dcryo.jobs import em
from dcryo.jobs.dataset import BATCH, Dataset, Shard, cut_shards, left_out_rows, load_dataset, load_mask
from dcryo.jobs.memory import back_projection_bytes, check_memory
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, SeedOptions, argument
from dcryo.jobs.outputs import read_maps, write_maps
from dcryo.kernels.shells import half_plane
from dcryo.kernels.symmetry import operators
from dcryo.steps import ewald, expectation, maximisation
from dcryo.steps.maximisation import HalfFsc


class ReconstructOptions(OutOptions, ClusterOptions, SeedOptions):
    """Back-project particles with the poses, shifts and CTF that they have, each half by itself.

    Writes half1.mrc and half2.mrc (unfiltered), map.mrc (both halves, weighted by their FSC), mask.mrc and fsc.csv.
    """

    store: Path = argument("store of particles with poses")
    symmetry: str = Field("C1", description="point group: Cn, Dn, T, O, I1, I2, I3 or I4")
    mask_diameter_A: float | None = Field(
        None, gt=0, description="diameter of the soft sphere of the masked FSC (default: 0.85 of the box)"
    )
    mask: Path | None = Field(None, description="mask for the FSC (map of 0 to 1) in place of the sphere")
    ewald: bool = Field(False, description="correct for the curvature of the Ewald sphere, as of thick particles")
    ewald_hand: int = Field(
        1, ge=-1, le=1, description="hand of that curvature: 1 is RELION's, -1 its --reverse_curvature"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "ReconstructOptions":
        if self.ewald_hand == 0:
            raise ValueError("ewald_hand is 1 or -1")
        if self.ewald_hand != 1 and not self.ewald:
            raise ValueError("ewald_hand is of the curvature of the Ewald sphere: give --ewald too")
        return self


class Curvature(NamedTuple):
    """The curvature of the Ewald sphere that is corrected for: its hand, 1 or -1, and the particle's diameter."""

    hand: int
    diameter_A: float


@dataclass(frozen=True)
class ReconstructResult:
    """Maps (D, D, D) of a reconstruction. resolution_A: by FSC 0.143 under the mask; out: the run directory."""

    out: Path
    resolution_A: float
    half_maps: tuple[np.ndarray, np.ndarray]
    map: np.ndarray
    fsc: HalfFsc

    def summary(self) -> str:
        return f"{self.out}: {self.resolution_A:.2f} A by FSC 0.143 of the half maps"


def reconstruct(options: ReconstructOptions, *, progress: Progress = print) -> ReconstructResult:
    """Reconstruct; see `ReconstructOptions`. InputError for bad input, before work starts.

    A finished run is read back where it is resumed.
    """
    check_kind(options.cluster)
    group = operators(options.symmetry)
    data = load_dataset(options.store, options.seed)
    if not data.has_poses:
        raise InputError(f"{options.store}: the particles have no poses (rlnAngleRot, ...); refine them first")
    mask, diameter = load_mask(data.store, options.mask_diameter_A, options.mask)
    inputs = [options.store] + ([options.mask] if options.mask else [])
    run = Run.start(
        options.out, "reconstruct", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    )
    if run.finished:
        return ReconstructResult(options.out, run.record["result"]["resolution_A"], *read_maps(run.path))
    with run, em.scratch(run.path) as scratch, connect(options.cluster, options.workers) as cluster:
        run.quarantine(data.store.quarantined)
        progress(f"{len(data.particles)} particles, box {data.store.box_px} px, on {cluster.description}")
        check_memory(cluster, data.store.box_px, back_projection_bytes(data.store.box_px, options.ewald), len(group))
        curvature = Curvature(options.ewald_hand, diameter) if options.ewald else None
        maps, left_out = graph.compute(maps_of(data, group, mask, scratch, curvature=curvature), cluster)
        bad = [row for half, of_half in enumerate(left_out, start=1) for row in left_out_rows(data, half, of_half)]
        run.quarantine(bad)
        merged = em.merged(maps)
        if not np.isfinite(merged).all() or not np.any(merged):
            raise RunError("the reconstruction is empty or not finite; see the quarantined particles")
        resolution = write_maps(run.path, data.store.pixel_size_A, maps, mask)
        run.done(
            {
                "resolution_A": resolution,
                "particles": len(data.particles) - len(bad),
                "box_px": data.store.box_px,
                "pixel_size_A": data.store.pixel_size_A,
                "symmetry": options.symmetry,
                "mask_diameter_A": diameter,
                **({"ewald_hand": options.ewald_hand} if options.ewald else {}),
            }
        )
    return ReconstructResult(options.out, resolution, (maps.plain[0], maps.plain[1]), merged, maps.fsc)


def maps_of(
    data: Dataset,
    group: np.ndarray,
    mask: np.ndarray,
    scratch: Path,
    name: str = "reference",
    curvature: Curvature | None = None,
) -> tuple[em.Maps, list[list[graph.Task]]]:
    """Tasks: the maps of a data set's two halves, and for each half what its shards left out.

    The images are back-projected for a first map of each half, whose slices are then taken off the sums, which needs no
    image: what is left is the step from it to the map that explains them best (`solve.maximise`). name: of the first
    maps in `scratch`, of its own where a graph holds several data sets.
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
    return em.maximise(volumes, references, group, nyquist, mask, last=True), results


def _trees(outs: list, slabs: int, name: str) -> list[graph.Task]:
    """Sums over shards of each slab."""
    return [graph.tree_sum([out[part] for out in outs], name=f"{name}-slab{part}") for part in range(slabs)]


def back_project_shard(shard: Shard, curvature: Curvature | None) -> tuple:
    """The task: slabs of the shard's accumulator, and position -> reason of what was left out."""
    box = shard.store.box_px
    volume = expectation.empty_sums(box // 2, 1, box).volume
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
