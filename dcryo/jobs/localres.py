"""Local resolution of two half maps, and the map filtered and sharpened by it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from dcryo import graph
from dcryo.cluster import check_kind, connect
from dcryo.data import mrc
from dcryo.data.run import Run
from dcryo.errors import InputError, RunError
from dcryo.jobs.given_maps import HalfMapOptions, load_half_maps, load_solvent_mask
from dcryo.jobs.options import ClusterOptions, Progress
from dcryo.kernels import fft, fsc, local_fsc
from dcryo.steps import local_resolution

# Windows are at least so many times as wide as the resolution of the whole.
_WINDOW = 5.25
# Bands are shared out to so many tasks, dealt like cards, for the higher ones are the larger.
_TASKS = 8
_PERCENTILES = (5, 25, 50, 75, 95)


class LocalResolutionOptions(HalfMapOptions, ClusterOptions):
    """Local resolution of a run's half maps, or of two files, and the map filtered and sharpened by it.

    Writes localres.mrc (in Angstrom), map_local.mrc and a report.
    """

    mask: Path | None = Field(
        None,
        description="where the particle is (map of 0 to 1; default: the run's mask, or a sphere of 0.85 of the box)",
    )
    threshold: float = Field(fsc.HALF, gt=0, lt=1, description="local FSC at which resolution ends")
    window_A: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="least width of the windows, at half their height (default: 5.25 times the resolution); at "
        "lower frequencies they are that many wavelengths wide",
    )
    bfactor_A2: float | None = Field(
        None,
        allow_inf_nan=False,
        description="B to sharpen with everywhere, negative to sharpen, 0 to leave it (default: fitted locally)",
    )


@dataclass(frozen=True)
class LocalResolutionResult:
    """resolution_A, map: (D, D, D); median_A: of the resolution inside the mask; global_A: by the FSC under it."""

    out: Path
    resolution_A: np.ndarray
    map: np.ndarray
    median_A: float
    global_A: float

    def summary(self) -> str:
        return f"{self.out}: median local resolution {self.median_A:.2f} A, of the whole {self.global_A:.2f} A"


def localres(options: LocalResolutionOptions, *, progress: Progress = print) -> LocalResolutionResult:
    """Local resolution; see `LocalResolutionOptions`. InputError for bad input, before work starts."""
    check_kind(options.cluster)
    halves = load_half_maps(options.source, options.half2, None)
    mask, mask_path = load_solvent_mask(options.mask, halves)
    box, pixel = halves.box_px, halves.pixel_size_A
    curve = fsc.shell_correlation(halves.first * mask, halves.second * mask)
    overall = fsc.resolution_at(curve, fsc.GOLD_STANDARD, box, pixel)
    width = options.window_A or _WINDOW * overall
    try:
        grid = local_fsc.windows(box, width / pixel)
    except ValueError as error:
        raise InputError(f"--window {width:.4g} A: {error}") from error
    inputs = [*halves.paths] + ([mask_path] if mask_path else [])
    run = Run.start(options.out, "localres", options.model_dump(), inputs, None, options.resume, options.overwrite)
    if not run.finished:
        with run, connect(options.cluster, options.workers) as cluster:
            progress(f"box {box} px, {len(grid.centre)} bands, windows of {width:.0f} A and more")
            found = graph.compute(_tasks(halves.first, halves.second, mask, grid, pixel, options), cluster)
            resolution, bfactor, filtered = found
            if not np.isfinite(filtered).all():
                raise RunError("the filtered map is not finite; give --bfactor 0 to leave it as it is")
            mrc.write_map(run.path / "localres.mrc", resolution, pixel)
            mrc.write_map(run.path / "map_local.mrc", filtered, pixel)
            mrc.write_map(run.path / "mask.mrc", mask, pixel)
            run.done(
                {
                    "resolution_A": overall,
                    **_percentiles(resolution, mask),
                    "window_A": width,
                    "threshold": options.threshold,
                    "bfactor_A2": -float(np.average(bfactor, weights=local_fsc.at_points(mask, grid))),
                    "box_px": box,
                    "pixel_size_A": pixel,
                }
            )
    return LocalResolutionResult(
        options.out,
        mrc.read_map(run.path / "localres.mrc").array,
        mrc.read_map(run.path / "map_local.mrc").array,
        run.record["result"]["local_50_percent_A"],
        run.record["result"]["resolution_A"],
    )


def _percentiles(resolution_A: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Percentiles of the resolution inside a mask, by the names of the run's record."""
    inside = resolution_A[mask >= 0.5 * mask.max()]
    return {f"local_{part}_percent_A": float(np.percentile(inside, part)) for part in _PERCENTILES}


def _tasks(
    first: np.ndarray,
    second: np.ndarray,
    mask: np.ndarray,
    grid: local_fsc.Windows,
    pixel_size_A: float,
    options: LocalResolutionOptions,
) -> tuple:
    """Tasks whose values are the map of resolution, the local B at the points and the filtered map."""
    pair = [graph.call(fft.rfftn, one, name=f"transform-{half}") for half, one in enumerate((first, second), start=1)]
    hands = [range(hand, len(grid.centre), _TASKS) for hand in range(min(_TASKS, len(grid.centre)))]
    sums = [graph.call(local_resolution.band_sums, *pair, grid, own, name=f"bands-{n}") for n, own in enumerate(hands)]
    local = graph.call(local_resolution.local_correlation, sums, hands, grid, options.threshold, name="local-fsc")
    resolution = graph.call(local_resolution.resolution_map, local, grid, pixel_size_A, name="local-resolution")
    if options.bfactor_A2 is None:
        inside = graph.call(local_fsc.at_points, mask, grid, name="mask")
        bfactor = graph.call(local_resolution.bfactors_A2, local, grid, pixel_size_A, inside, name="bfactors")
    else:
        bfactor = np.full(grid.shape, -options.bfactor_A2, dtype=np.float32)
    parts = [
        graph.call(local_resolution.filtered, *pair, local, bfactor, grid, own, pixel_size_A, name=f"filter-{n}")
        for n, own in enumerate(hands)
    ]
    filtered = graph.call(fft.irfftn, graph.tree_sum(parts, name="filtered"), grid.box_px, name="filtered-map")
    return resolution, bfactor, filtered
