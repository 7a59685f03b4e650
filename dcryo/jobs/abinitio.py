"""Ab initio models: first maps from the images alone, by stochastic expectation maximisation from random starts.

Each start begins at what a few images at random rotations add up to, and follows mini-batches: every image is compared
with projections of the model in all directions, and the sums that this gives replace a part of those before (online
EM, Cappe & Moulines 2009; for cryo-EM Punjani et al. 2017 and Kimanius et al. 2021). Starts know nothing of one another
and of the symmetry. Those that agree make the model, whose axes are looked for; iterations over all images end the run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from dcryo.cluster import check_kind, connect
from dcryo.data import mrc, star
from dcryo.data.curves import write_curves
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs import em
from dcryo.jobs.abinitio_iterations import Agreement, Job, Learned, State, descent, everything, iterate
from dcryo.jobs.abinitio_starts import FIRST_IMAGES, Views, agreed, load_views, random_starts, with_common_lines
from dcryo.jobs.dataset import Dataset, load_dataset, mask_edge_px, particle_diameter_A
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, SeedOptions, argument
from dcryo.kernels import filters, fsc, masks
from dcryo.kernels.shells import shell_at
from dcryo.kernels.symmetry import operators
from dcryo.steps import first_models

# Detail that tells views apart: from this part of the particle's diameter at first to this at last.
_FIRST_DETAIL, _LAST_DETAIL, _FINEST_A = 1 / 7.5, 1 / 10, 10.0
# Iterations over all images at the end.
_FINAL = 2
_CHECKPOINT_EVERY = 5


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
    method: Literal["sgd", "commonlines"] = Field(
        "sgd", description="models by stochastic descent from random ones, or by common lines of class averages"
    )
    averages: Path | None = Field(
        None,
        description="run of class2d, whose good averages give a model by common lines: one more to compare",
    )
    starts: int = Field(3, ge=1, le=100, description="models that are made independently and compared")
    iterations: int = Field(50, ge=10, le=10000, description="iterations over mini-batches in each start")
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


_ARRAYS = ("models", "sums", "share", "noise_power", "fsc")


def abinitio(options: AbinitioOptions, *, progress: Progress = print) -> AbinitioResult:
    """First models; see `AbinitioOptions`. InputError for bad input, before work starts."""
    check_kind(options.cluster)
    group = operators(options.symmetry)
    data = load_dataset(options.store, options.seed)
    diameter = particle_diameter_A(data.store, options.mask_diameter_A)
    limit = options.resolution_limit_A or max(_LAST_DETAIL * diameter, _FINEST_A)
    shells = _shells(data, diameter, limit)
    if len(data.particles) < FIRST_IMAGES * options.classes:
        raise InputError(
            f"{options.store}: {len(data.particles)} particles; expected at least {FIRST_IMAGES} for each of "
            f"{options.classes} classes"
        )
    views = _views(options, data)
    inputs = [options.store] + ([options.averages] if options.averages else [])
    run = Run.start(
        options.out, "abinitio", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    )
    if run.finished:
        return _read(run)
    with run, em.scratch(run.path) as scratch, connect(options.cluster, options.workers) as cluster:
        run.quarantine(data.store.quarantined)
        job = _job(options, data, diameter, limit, shells, group, scratch)
        progress(
            f"{len(data.particles)} particles, box {data.store.box_px} px of {data.store.pixel_size_A:g} A, compared "
            f"in {job.work_px} px of {job.work_pixel_A:.3g} A; {options.starts} starts of {options.classes} classes, "
            f"diameter {diameter:.0f} A, on {cluster.description}"
        )
        by_descent = options.method == "sgd"
        state = _latest(run) or random_starts(job, options.starts if by_descent else 0, cluster)
        while by_descent and state.iteration < job.descent:
            state, _ = iterate(job, state, descent(job, state), cluster, run, progress)
            if state.iteration % _CHECKPOINT_EVERY == 0 or state.iteration == job.descent:
                _save(run, state)
        if state.agreement is None:
            state = with_common_lines(job, state, views, 1 if by_descent else options.starts, cluster)
            state = agreed(job, state, cluster)
            assert state.agreement is not None
            progress(_of_agreement(state.agreement, options.symmetry))
        while True:
            last = state.iteration == job.descent + _FINAL - 1
            state, made = iterate(job, state, everything(job, state), cluster, run, progress)
            if last:
                break
            _save(run, state)
        return _write(job, state, made[0], run)


def _views(options: AbinitioOptions, data: Dataset) -> Views | None:
    """The class averages whose lines are compared, if any; InputError where they are wanted and not there."""
    if options.averages is None:
        if options.method == "commonlines":
            raise InputError("--method commonlines needs class averages; give the run of class2d as --averages")
        return None
    if options.classes > 1:
        raise InputError(
            f"--averages with --classes {options.classes}: common lines make one model; give --classes 1, or select "
            "the averages of one molecule first"
        )
    return load_views(options.averages, data.store)


def _job(
    options: AbinitioOptions,
    data: Dataset,
    diameter_A: float,
    limit_A: float,
    shells: tuple[int, int],
    group: np.ndarray,
    scratch: Path,
) -> Job:
    box, pixel = data.store.box_px, data.store.pixel_size_A
    work = first_models.working_box_px(box, pixel, limit_A)
    scale = work / box / pixel
    edge_px = max(mask_edge_px(pixel) * pixel * scale, 2.0)
    return Job(
        data=data,
        seed=options.seed,
        starts=options.starts,
        classes=options.classes,
        descent=options.iterations,
        work_px=work,
        diameter_px=diameter_A * scale,
        shift_range_px=(options.shift_range_A or 0.1 * diameter_A) * scale,
        shells=shells,
        mask=masks.sphere(work, diameter_A * scale, edge_px),
        group=group,
        scratch=scratch,
    )


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


def _of_agreement(found: Agreement, symmetry: str) -> str:
    starts = len(found.evidence_of_starts)
    line = f"{len(found.agreeing)} of {starts} starts agree"
    if symmetry.upper() != "C1":
        line += f"; agreement with {symmetry}: " + ", ".join(f"{value:.2f}" for value in found.symmetry_agreement)
    return line


def _write(job: Job, state: State, made: Learned, run: Run) -> AbinitioResult:
    assert state.agreement is not None
    data, share = job.data, state.share[0]
    box, pixel = data.store.box_px, data.store.pixel_size_A
    order = np.argsort(-share, kind="stable")
    maps = np.stack([filters.rescale_volume(state.models[0, k], box) for k in order])
    resolution = np.array([job.resolution_A(fsc.crossing(state.fsc[0, k], fsc.HALF)) for k in order])
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
            "starts": len(agreement.evidence_of_starts),
            "explained": round(explained, 2),
            **agreement._asdict(),
            "particles": len(particles),
            "box_px": box,
            "pixel_size_A": pixel,
            "mask_diameter_A": job.diameter_px * job.work_pixel_A,
        }
    )
    return AbinitioResult(
        run.path,
        maps,
        share[order],
        resolution,
        len(agreement.evidence_of_starts),
        len(agreement.agreeing),
        explained,
        particles,
    )


def _with_poses(job: Job, made: Learned, order: np.ndarray) -> Particles:
    """The particles with their class, pose and how sure that is; without those that could not be used."""
    n = len(job.data.particles)
    place = np.argsort(order)
    to_A = job.work_pixel_A
    back = np.argsort(made.rows, kind="stable")
    found, used = made.found, np.zeros(n, dtype=bool)
    used[made.rows] = found.usable
    return job.data.particles.replace(
        rotation=made.rotation[back],
        origin_A=job.data.origins_as_recorded(found.origin_px[back]) * to_A,
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
