"""Resolution by direction, and whether the views that particles have explain it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from dcryo import graph
from dcryo.cluster import check_kind, connect
from dcryo.data import mrc, star
from dcryo.data.atomic import replacing
from dcryo.data.curves import write_curves
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.given_maps import HalfMapOptions, load_half_maps, load_solvent_mask
from dcryo.jobs.options import ClusterOptions, Progress
from dcryo.kernels import directional, fft, fsc
from dcryo.kernels.symmetry import operators
from dcryo.steps.anisotropy import Anisotropy, verdict

_TASKS = 8


class DirectionalOptions(HalfMapOptions, ClusterOptions):
    """Resolution by direction of a run's half maps, or of two files, and how evenly the particles' views cover it.

    Writes directional.csv (curves over shells), directions.csv, fsc3d.mrc (the FSC at every frequency, zero frequency
    at the centre of the box) and a report, which says whether views are missing.
    """

    mask: Path | None = Field(
        None,
        description="where the particle is (map of 0 to 1; default: the run's mask, or a sphere of 0.85 of the box)",
    )
    symmetry: str | None = Field(None, description="point group (default: the run's, or C1)")
    particles: Path | None = Field(None, description="STAR file with the particles' poses (default: the run's)")


@dataclass(frozen=True)
class DirectionalResult:
    """directions: (N, 3), one of each and its mates; curves: (N, D // 2 + 1) their FSC; found: what it comes to."""

    out: Path
    directions: np.ndarray
    curves: np.ndarray
    found: Anisotropy
    words: str

    def summary(self) -> str:
        return f"{self.out}: {self.words}"


def directional_resolution(options: DirectionalOptions, *, progress: Progress = print) -> DirectionalResult:
    """Directional resolution; see `DirectionalOptions`. InputError for bad input, before work starts."""
    check_kind(options.cluster)
    halves = load_half_maps(options.source, options.half2, options.symmetry)
    mask, mask_path = load_solvent_mask(options.mask, halves)
    group = operators(halves.symmetry)
    source = options.particles or _particles_of(halves.run)
    views = None if source is None else _views(source)
    directions = directional.unique_directions(directional.CONES, group)
    inputs = [*halves.paths, *(path for path in (mask_path, source) if path)]
    box, pixel = halves.box_px, halves.pixel_size_A
    run = Run.start(options.out, "directional", options.model_dump(), inputs, None, options.resume, options.overwrite)
    with run, connect(options.cluster, options.workers) as cluster:
        progress(f"box {box} px, {len(directions)} directions, {halves.symmetry}")
        pair = [
            graph.call(fft.rfftn, one * mask, name=f"transform-{half}")
            for half, one in enumerate((halves.first, halves.second), start=1)
        ]
        hands = np.array_split(directions, min(_TASKS, len(directions)))
        sums = [graph.call(directional.cone_sums, *pair, own, name=f"cones-{n}") for n, own in enumerate(hands)]
        curves = directional.conical_fsc(np.concatenate(graph.compute(sums, cluster)))
        overall = fsc.shell_correlation(halves.first * mask, halves.second * mask)
        found = Anisotropy.of(directions, curves, overall, views, group, box, pixel)
        words = verdict(found)
        if not run.finished:
            _write(run, halves.box_px, pixel, directions, curves, overall, found, group)
            run.done(
                {**found.figures(), "symmetry": halves.symmetry, "verdict": words, "box_px": box, "pixel_size_A": pixel}
            )
    return DirectionalResult(options.out, directions, curves, found, words)


def _particles_of(run: Path | None) -> Path | None:
    path = None if run is None else run / "particles.star"
    return path if path is not None and path.is_file() else None


def _views(source: Path) -> np.ndarray:
    """Directions of view, (M, 3), of the particles of a STAR file."""
    particles = star.read_particles(source)
    if "rotation" not in particles or len(particles) == 0:
        raise InputError(f"{source}: the particles have no poses (rlnAngleRot, ...); name a file that has them")
    return np.asarray(particles["rotation"])[:, 2]


def _write(
    run: Run,
    box_px: int,
    pixel_size_A: float,
    directions: np.ndarray,
    curves: np.ndarray,
    overall: np.ndarray,
    found: Anisotropy,
    group: np.ndarray,
) -> None:
    columns = {"fsc": overall, "mean": curves.mean(axis=0), "best": curves[found.best], "worst": curves[found.worst]}
    columns |= {"least": curves.min(axis=0), "greatest": curves.max(axis=0)}
    columns |= {f"direction{number}": curve for number, curve in enumerate(curves, start=1)}
    write_curves(run.path / "directional.csv", box_px, pixel_size_A, columns)
    lines = ["direction,x,y,z,resolution_A,area_shells,sampling"]
    for number, (direction, resolution, area, sampled) in enumerate(
        zip(directions, found.resolution_A, found.area, found.sampling_at_cones, strict=True), start=1
    ):
        place = ",".join(f"{part:.5f}" for part in direction)
        lines.append(f"{number},{place},{resolution:.4f},{area:.3f},{'' if np.isnan(sampled) else f'{sampled:.4f}'}")
    with replacing(run.path / "directions.csv") as file:
        file.write(("\n".join(lines) + "\n").encode())
    volume = directional.fsc_volume(curves, directions, group, box_px)
    mrc.write_map(run.path / "fsc3d.mrc", volume, pixel_size_A)
