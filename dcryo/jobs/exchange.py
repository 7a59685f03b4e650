"""Particles in, particles out, and what is in a file: the jobs ``import``, ``export`` and ``info``."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dcryo.data import cryodrgn, cs, mrc, stacks, star
from dcryo.data.contents import aberrations_of_group, carried_aberrations, describe_path
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.data.store import ImageType, Store, is_store, open_store
from dcryo.data.store_writer import Writer, create
from dcryo.errors import InputError, RunError
from dcryo.jobs.dataset import TABLE, ctf_columns, open_particles, store_of
from dcryo.jobs.options import JobOptions, OutOptions, argument

RECORDED = 1000
"""Quarantined particles that run.json lists; the store lists all."""


class ImportOptions(OutOptions):
    """Bring the particles of a STAR or cryoSPARC file, and their images, into a store."""

    source: Path = argument("STAR or .cs file of particles")
    out: Path = Field(description="store to make; its name ends in .zarr")
    passthrough: tuple[Path, ...] = Field(
        (),
        description="passthrough .cs file with more columns of the same particles; may be given several times",
    )
    root: Path | None = Field(
        None, description="directory that relative stack names start from (default: found above the source)"
    )
    dtype: ImageType = Field("float16", description="how images are kept")
    skip_missing: bool = Field(False, description="quarantine particles whose image is not there, do not refuse")


class ExportOptions(JobOptions):
    """Write the particles of a store, selection or run as a STAR or cryoSPARC file."""

    source: Path = argument("store, selection or run directory")
    out: Path = Field(description="file to write; its name ends in .star or .cs")
    stack: bool = Field(False, description="write the images too, beside OUT, and point to them")
    dtype: ImageType = Field("float32", description="type of the images written (mode 2 or 12)")
    pickles: bool = Field(
        False, description="write poses.pkl and ctf.pkl too, beside OUT and in its order, for cryoDRGN and RECOVAR"
    )
    overwrite: bool = Field(False, description="replace the files")


class InfoOptions(JobOptions):
    """Say what is in a store, selection, run, map, stack, STAR or .cs file."""

    path: Path = argument("file or directory to look into")


@dataclass(frozen=True)
class ImportResult:
    """The store, and what was left out: data row in the source (from 1), image, reason."""

    store: Store
    quarantined: list[dict[str, Any]]

    def summary(self) -> str:
        lines = [f"{self.store.path}: {self.store.n} particles, box {self.store.box_px} px"]
        if self.quarantined:
            reasons = {int(left["row"]) - 1: str(left["reason"]) for left in self.quarantined}
            lines += [f"{len(reasons)} rows of the source left out:", *stacks.summarise(reasons)]
        return "\n".join(lines)


@dataclass(frozen=True)
class ExportResult:
    """path: the table. stack: the images, if written. particles: its rows. left_out: row of the source -> reason."""

    path: Path
    stack: Path | None
    particles: int
    left_out: dict[int, str]

    def summary(self) -> str:
        lines = [f"{self.path}: {self.particles} particles" + (f", images in {self.stack}" if self.stack else "")]
        if self.left_out:
            lines += [f"{len(self.left_out)} rows left out:", *stacks.summarise(self.left_out)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Description:
    """What is in a file or directory, as pairs of a label and a value."""

    lines: list[tuple[str, str]]

    def summary(self) -> str:
        width = max(len(label) for label, _ in self.lines) + 2
        return "\n".join(f"{label + ':':{width}}{value}" for label, value in self.lines)


def import_particles(options: ImportOptions, *, progress: Callable[..., None] = print) -> ImportResult:
    """Stream the images of a particle file into a store, a shard at a time, in the rows' order.

    Images that are NaN, infinite, constant, truncated or unreadable are left out and listed with the reason.
    Memory is that of four shards, half a gigabyte, whatever the size of the stacks. An interrupted import goes on
    with `resume`, to the same bits. Raises InputError before anything is written if the file or its stacks do not
    fit (see `stacks.find`), and RunError if no image is good or the disk refuses.
    """
    if options.out.suffix != ".zarr":
        raise InputError(f"--out {options.out}: a store's name ends in .zarr")
    particles = _read_table(options.source, *options.passthrough)
    sources = stacks.find(particles, options.source, root=options.root, skip_missing=options.skip_missing)
    particles = _with_sizes(particles, sources, options.source)
    pixel_sizes_A = particles.optics_of("pixel_size_A")
    if len(np.unique(pixel_sizes_A)) > 1:
        progress("optics groups differ in pixel size: " + ", ".join(f"{p:g} A" for p in np.unique(pixel_sizes_A)))
    carried = carried_aberrations(particles)
    if carried:
        progress(
            f"{', '.join(carried)} are not zero: they are carried along, but not applied, since how cryoSPARC means "
            "them is not known; import a STAR file where one can be had"
        )
    scale = stacks.float16_scale(sources) if options.dtype == "float16" else 1.0
    inputs = [options.source, *options.passthrough]
    with Run.start(
        options.out,
        "import",
        options.model_dump(),
        inputs,
        resume=options.resume,
        overwrite=options.overwrite,
    ) as run:
        if not is_store(options.out):
            writer = create(
                options.out,
                n_images=len(particles),
                box_px=sources.box_px,
                pixel_size_A=float(pixel_sizes_A[0]),
                dtype=options.dtype,
                scale=scale,
                origin=hashlib.sha256(json.dumps(sources.signature()).encode()).hexdigest(),
                resume=options.resume,
            )
            left_out = _copy_images(writer, sources, progress)
            kept = np.setdiff1d(np.arange(len(particles)), np.fromiter(left_out, np.int64))
            writer.finish(
                particles.take(kept),
                [
                    {"row": row + 1, "image": sources.image_name(row), "reason": reason}
                    for row, reason in left_out.items()
                ],
                {"file": str(options.source), "passthrough": [str(path) for path in options.passthrough]},
            )
        store = open_store(options.out)
        if not run.finished:
            run.quarantine(store.quarantined[:RECORDED])
            run.done({"particles": store.n, "quarantined": len(store.quarantined)})
    return ImportResult(store, store.quarantined)


def export_particles(options: ExportOptions, *, progress: Callable[..., None] = print) -> ExportResult:
    """Write a table of particles, pointing to the stacks they were imported from or to one written with it.

    Of a run directory the particles are those of its particles.star, and what a STAR file cannot hold
    (identities) comes from the store that the run names. Images that cannot be read are left out of the table
    (and are zeros in the stack). The stack is named in the table as `--out` names it: relative to the
    directory it is run from. Raises InputError for a source without particles, and for files that are there
    (without `overwrite`).
    """
    writers = {".star": _write_star, ".cs": cs.write_particles}
    if options.out.suffix not in writers:
        raise InputError(f"--out {options.out}: its name must end in {' or '.join(writers)}")
    stack = options.out.with_suffix(".mrcs") if options.stack else None
    pickles = [options.out.parent / name for name in (cryodrgn.POSES, cryodrgn.CTF)] if options.pickles else []
    for path in filter(None, (options.out, stack, *pickles)):
        if path.exists() and not options.overwrite:
            raise InputError(f"{path}: is there already; name another, or give --overwrite")
    particles, store, rows = _exported(options.source)
    if pickles:
        _check_pickles(particles, options.source)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    left_out: dict[int, str] = {}
    if stack is not None:
        if store is None:
            raise InputError(
                f"{options.source}: none of the inputs that its run.json names is a store that is there, so there are "
                "no images for --stack; repeat this in the directory that the run was started in"
            )
        left_out = _write_stack(stack, store, rows, options.dtype, progress)
        if len(left_out) == len(particles):
            raise RunError(f"{options.source}: no image could be read; the first: {next(iter(left_out.values()))}")
        particles = _pointing_to(stack, particles, left_out)
    elif options.out.suffix == ".star" and (particles.columns.get("image_sign", np.ones(1)) < 0).any():
        progress("particles are dark on white in their stacks, which STAR cannot say: give --stack to write them anew")
    if options.out.suffix == ".cs" and any(aberrations_of_group(particles, row) for row in range(particles.n_groups)):
        progress(
            "the particles' aberrations (beam tilt, Zernike, magnification) are left out: write .star to keep them"
        )
    writers[options.out.suffix](options.out, particles)
    if pickles:
        _write_pickles(pickles, particles, options.source)
    return ExportResult(options.out, stack, len(particles), left_out)


def describe(options: InfoOptions, *, progress: Callable[..., None] = print) -> Description:
    """Say what is in a file or directory. Raises InputError for what dcryo does not know."""
    return Description(describe_path(options.path))


def _read_table(source: Path, *passthrough: Path) -> Particles:
    if source.suffix == ".cs":
        particles = cs.read_particles(source, *passthrough)
    elif source.suffix != ".star":
        raise InputError(f"{source}: not a STAR or .cs file by its name; only these can be imported")
    elif passthrough:
        raise InputError(f"--passthrough {passthrough[0]}: goes with a .cs file, {source} is a STAR file")
    else:
        particles = star.read_particles(source)
    if len(particles) == 0:
        raise InputError(f"{source}: has no particles")
    return particles


def _with_sizes(particles: Particles, sources: stacks.Sources, source: Path) -> Particles:
    """The particles with the box of the stacks, and their pixel size where the optics table has none.

    A pixel size of the table stands against that of the stacks: headers are not trusted.
    """
    n_groups = particles.n_groups
    if "box_px" not in particles.optics:
        particles = particles.replace_optics(box_px=np.full(n_groups, sources.box_px))
    if "pixel_size_A" in particles.optics:
        return particles
    if sources.voxel_size_A <= 0:
        raise InputError(f"{source}: says no pixel size, nor do its stacks; add rlnImagePixelSize to its optics table")
    return particles.replace_optics(pixel_size_A=np.full(n_groups, sources.voxel_size_A))


def _copy_images(writer: Writer, sources: stacks.Sources, progress: Callable[..., None]) -> dict[int, str]:
    """Write all good images; returns row -> reason of the others, in the rows' order."""
    left_out = {int(row): reason for note in writer.notes for row, reason in note["left_out"].items()}
    present = np.setdiff1d(np.arange(len(sources.stack)), np.fromiter(sources.absent, np.int64))
    at = writer.notes[-1]["stop"] if writer.notes else 0
    if at:
        progress(f"going on after {at} of {len(present)} images")
    shard = writer.empty_shard()
    while at < len(present):
        filled, at, bad = _fill(shard, present, at, sources, writer)
        left_out |= bad
        if filled:
            writer.write(shard[:filled], {"stop": at, "left_out": bad})
        progress(f"read {at} of {len(present)} images, {len(left_out)} left out", end="\r")
    if not writer.written:
        raise RunError(f"none of {len(present)} images is good; the first: {next(iter(left_out.values()))}")
    return dict(sorted((left_out | sources.absent).items()))


def _fill(
    shard: np.ndarray, present: np.ndarray, at: int, sources: stacks.Sources, writer: Writer
) -> tuple[int, int, dict[int, str]]:
    """Fill the shard with the next good images; returns how many, where to go on, and the bad ones' reasons."""
    filled = 0
    left_out: dict[int, str] = {}
    while filled < len(shard) and at < len(present):
        rows = present[at : at + len(shard) - filled]
        bad: dict[int, str] = {}
        for positions, images, unread in sources.read(rows, writer.chunk_images):
            found = stacks.defects(images, shard.dtype.name, writer.scale) | unread
            if writer.scale != 1:
                images /= np.float32(writer.scale)
            with np.errstate(over="ignore", invalid="ignore"):
                shard[filled + positions] = images
            bad |= {int(positions[place]): reason for place, reason in found.items()}
        kept = np.setdiff1d(np.arange(len(rows)), np.fromiter(bad, np.int64))
        # Moved one by one and forwards: no second shard in memory, and none is overwritten before it is moved.
        for place, position in enumerate(kept.tolist() if bad else ()):
            shard[filled + place] = shard[filled + position]
        filled += len(kept)
        at += len(rows)
        left_out |= {int(rows[position]): reason for position, reason in bad.items()}
    return filled, at, left_out


def _exported(source: Path) -> tuple[Particles, Store | None, np.ndarray]:
    """The particles to write, the store with their images if it is known, and their rows in it."""
    if not is_store(source) and (source / TABLE).is_file() and store_of(source) is None:
        return star.read_particles(source / TABLE), None, np.empty(0, np.int64)
    return open_particles(source)


def _write_star(path: Path, particles: Particles) -> None:
    star.write_particles(path, particles, None)


def _check_pickles(particles: Particles, source: Path) -> None:
    """InputError where poses or CTFs are missing, or images are not of one size."""
    ctf_columns(particles, source)
    if "rotation" not in particles:
        raise InputError(f"{source}: the particles have no poses (rlnAngleRot, ...) for --pickles; refine them first")
    boxes = np.unique(particles.optics["box_px"]) if "box_px" in particles.optics else ()
    if len(boxes) != 1:
        raise InputError(f"{source}: boxes of {len(boxes)} sizes; expected one for --pickles. Import the images anew")


def _write_pickles(paths: Sequence[Path], particles: Particles, source: Path) -> None:
    box, columns = int(particles.optics["box_px"][0]), ctf_columns(particles, source)
    origin_A = particles["origin_A"] if "origin_A" in particles else np.zeros((len(particles), 2))
    cryodrgn.write_poses(paths[0], particles["rotation"], origin_A / columns.pixel_size_A[:, None], box)
    cryodrgn.write_ctf(paths[1], box, columns[:8])


def _pointing_to(stack: Path, particles: Particles, left_out: dict[int, str]) -> Particles:
    """The particles but those left out, with their images in `stack`, in order and white on dark."""
    n = len(particles)
    particles = particles.replace(
        image_path=np.full(n, str(stack)), image_index=np.arange(n), image_sign=np.ones(n, np.int8)
    )
    return particles.take(np.setdiff1d(np.arange(n), np.fromiter(left_out, np.int64)))


def _write_stack(
    path: Path, store: Store, rows: np.ndarray, dtype: ImageType, progress: Callable[..., None]
) -> dict[int, str]:
    """Write the images of `rows` as a stack; returns position -> reason of those that could not be read."""
    left_out: dict[int, str] = {}
    with mrc.StackWriter(path, len(rows), store.box_px, store.pixel_size_A, dtype) as writer:
        for start in range(0, len(rows), store.chunk_images):
            batch = store.read(rows[start : start + store.chunk_images])
            left_out |= {start + position: reason for position, reason in batch.bad.items()}
            writer.write(start, batch.images)
            progress(f"wrote {start + len(batch.images)} of {len(rows)} images", end="\r")
    return left_out
