"""The first thing a new user runs: simulate a small data set, refine it, and compare the map with the truth.

The one job that chains others, as a user would from the command line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dcryo.cluster import check_kind
from dcryo.data import mrc, star
from dcryo.data.curves import write_curves
from dcryo.data.run import Run
from dcryo.jobs.exchange import ImportOptions, import_particles
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, SeedOptions
from dcryo.jobs.refine import RefineOptions, RefineResult, refine
from dcryo.jobs.simulate import PHANTOM, SimulateOptions, SimulateResult, simulate
from dcryo.kernels import fsc, rotations, symmetry

_PIXEL_SIZE_A = 3.0
# What the half maps need the particles to fill, and what keeps the demonstration to about a minute.
_DIAMETER_FRACTION = 0.65


class DemoOptions(OutOptions, ClusterOptions, SeedOptions):
    """Simulate particles of a protein-like phantom and refine them from its blurred shape, poses unknown.

    Writes the simulated data (simulated), the store (particles.zarr) and the refinement (refined), with reports.
    """

    particles: int = Field(1500, ge=100, le=100_000, description="number of particles")
    box_px: int = Field(64, ge=32, le=256, description="side of the images")
    symmetry: str = Field("C1", description="symmetry of the phantom")
    snr: float = Field(0.1, gt=0, description="variance of the signal over that of the noise")


@dataclass(frozen=True)
class DemoResult:
    """resolution_A: by FSC 0.143 of the half maps; truth_A: where the map's FSC with the truth falls to 0.5;
    angle_deg: median error of the orientations."""

    out: Path
    report: Path
    resolution_A: float
    truth_A: float
    angle_deg: float

    def summary(self) -> str:
        return (
            f"resolution by FSC 0.143 of the half maps: {self.resolution_A:.2f} A\n"
            f"resolution by FSC 0.5 against the known truth: {self.truth_A:.2f} A\n"
            f"median error of the orientations: {self.angle_deg:.2f} degrees\n"
            f"map: {self.out / 'refined' / 'map.mrc'}\nreport: {self.report}"
        )


def demo(options: DemoOptions, *, progress: Progress = print) -> DemoResult:
    """Simulate, import, refine and compare; see `DemoOptions`."""
    check_kind(options.cluster)
    operators = symmetry.operators(options.symmetry)
    out = options.out
    with Run.start(out, "demo", options.model_dump(), [], options.seed, options.resume, options.overwrite) as run:
        again: dict[str, Any] = {"resume": options.resume, "overwrite": options.overwrite}
        where: dict[str, Any] = {"cluster": options.cluster, "workers": options.workers, "seed": options.seed}
        width = options.box_px * _PIXEL_SIZE_A
        diameter = _DIAMETER_FRACTION * width
        data = simulate(
            SimulateOptions(
                model=PHANTOM, out=out / "simulated", particles=options.particles, box_px=options.box_px,
                pixel_size_A=_PIXEL_SIZE_A, diameter_A=diameter, symmetry=options.symmetry, snr=options.snr,
                seed=options.seed, **again,
            ),
            progress=progress,
        )  # fmt: skip
        assert isinstance(data, SimulateResult)
        store = out / "particles.zarr"
        import_particles(ImportOptions(source=data.particles_star, out=store, **again), progress=progress)
        refined = refine(
            RefineOptions(
                store=store, reference=data.truth_map, out=out / "refined", symmetry=options.symmetry,
                mask_diameter_A=1.1 * diameter, **where, **again,
            ),
            progress=progress,
        )  # fmt: skip
        result = _compare(options, operators, data.truth_map, data.truth_star, refined)
        if not run.finished:
            run.done(
                {
                    "resolution_A": result.resolution_A,
                    "resolution_against_truth_A": result.truth_A,
                    "median_angular_error_deg": result.angle_deg,
                }
            )
    return result


def _compare(
    options: DemoOptions, operators: np.ndarray, truth_map: Path, truth_star: Path, refined: RefineResult
) -> DemoResult:
    """The refined map and poses against the truth; leaves the curve beside the map, where the report finds it."""
    out = options.out / "refined"
    truth, mask = mrc.read_map(truth_map).array, mrc.read_map(out / "mask.mrc").array
    curve = fsc.shell_correlation(refined.map * mask, truth * mask)
    write_curves(out / "fsc_truth.csv", options.box_px, _PIXEL_SIZE_A, {"fsc_masked": curve})
    errors = rotations.angular_distance_deg(
        refined.particles["rotation"], star.read_particles(truth_star)["rotation"], operators
    )
    return DemoResult(
        options.out,
        out / "report.html",
        refined.resolution_A,
        fsc.resolution_at(curve, fsc.HALF, options.box_px, _PIXEL_SIZE_A),
        float(np.median(errors)),
    )
