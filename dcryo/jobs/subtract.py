"""Signal subtraction: images less the projections of what is outside a mask, about a new centre, in a new box."""

import dataclasses
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from dcryo import graph
from dcryo.cluster import Cluster, check_kind, connect
from dcryo.data import mrc, star
from dcryo.data.atomic import replacing
from dcryo.data.curves import read_curves
from dcryo.data.particles import Particles
from dcryo.data.run import PARTS, Run
from dcryo.data.stacks import defects, summarise
from dcryo.data.store import Store, is_store, open_store, select
from dcryo.data.store_writer import Writer, create, layout
from dcryo.errors import InputError, RunError
from dcryo.jobs import em
from dcryo.jobs.dataset import (
    BATCH,
    Dataset,
    Shard,
    as_read,
    load_dataset,
    load_mask,
    open_particles,
    shard_rows,
    shard_size,
)
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, SeedOptions, argument
from dcryo.kernels import fsc
from dcryo.kernels.shells import HalfPlane, half_plane
from dcryo.kernels.symmetry import operators
from dcryo.steps import extraction, subtraction
from dcryo.steps.subtraction import Amplitudes

STORE, TABLE, REFERENCE, MASK = "particles.zarr", "particles.star", "reference.mrc", "mask.mrc"
ORIGINAL_NAME = "rlnImageOriginalName"
"""Column of the name that an image had before it was subtracted from."""

_MAPS = ("half1.mrc", "half2.mrc", "map.mrc", "mask.mrc", "fsc.csv")
_SPECTRUM_PARTICLES = 1024
_OF_POSES = ("rotation", "origin_A", "half", "class_number", "norm_correction", "ctf_scale", "max_probability")


class SubtractOptions(OutOptions, ClusterOptions, SeedOptions):
    """Subtract projections of what is outside a mask from the images of a run, so that the part inside can be looked at
    alone.

    Each image loses the projection of its own half's map, filtered by the FSC, times its CTF, norm and scale, with an
    amplitude that is fitted. Writes particles.zarr, the store, with the poses of the run, particles.star, and the part
    that stays as reference.mrc and the mask as mask.mrc, both about the new centre and in the new box. Without a mask
    images are only moved and cut.
    """

    source: Path = argument("finished run with half maps and poses; with --revert, or without --mask, a store will do")
    mask: Path | None = Field(None, description="mask (map of 0 to 1) of the part that stays")
    recenter: bool = Field(False, description="move the centre of the mask's mass to the centre of the images")
    recenter_at_A: tuple[float, float, float] | None = Field(
        None, description="move this point of the map (x y z from its centre) there; both by whole voxels"
    )
    box_px: int | None = Field(None, ge=16, description="side of the new images (default: as they are)")
    revert: bool = Field(
        False, description="back to the images before the subtraction, as a selection, with the poses as they are now"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        others = [name for name in ("mask", "recenter", "recenter_at_A", "box_px") if getattr(self, name)]
        if self.revert and others:
            raise ValueError(f"revert goes without {', '.join(others)}: it takes back what they did")
        if not (self.revert or others):
            raise ValueError("nothing says what to do; give mask, recenter_at_A, box_px or revert")
        if self.recenter and self.mask is None:
            raise ValueError("recenter goes to the centre of a mask; give that, or recenter_at_A")
        if self.recenter and self.recenter_at_A is not None:
            raise ValueError("recenter and recenter_at_A exclude each other; give one of them")
        return self


@dataclass(frozen=True)
class SubtractResult:
    """out: the run directory; store: what was made; left_out: particles without an image; centre_px: point of the map,
    x y z in pixels from its centre, that is the new centre."""

    out: Path
    store: Store
    left_out: int
    centre_px: tuple[int, int, int]

    def summary(self) -> str:
        lines = [f"{self.store.path}: {self.store.n} particles, box {self.store.box_px} px"]
        if any(self.centre_px):
            x, y, z = (pixel * self.store.pixel_size_A for pixel in self.centre_px)
            lines.append(f"centred on what was at {x:.1f}, {y:.1f}, {z:.1f} A")
        if self.left_out:
            reasons = {row: str(left["reason"]) for row, left in enumerate(self.store.quarantined)}
            lines += [f"{self.left_out} left out:", *summarise(reasons)]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Job:
    """What stays the same: maps: of the two halves, None without a mask."""

    options: SubtractOptions
    data: Dataset
    box_px: int
    centre_px: np.ndarray
    maps: tuple[subtraction.Parts, subtraction.Parts] | None
    own_score: tuple[float, float]
    reference: np.ndarray | None
    mask: np.ndarray | None

    @property
    def pixels(self) -> HalfPlane:
        return half_plane((self.data.store.box_px - 1) // 2)

    def shard(self, rows: np.ndarray, name: str) -> Shard:
        """A shard of some particles, all of one half."""
        ones = np.ones(len(self.data.particles))
        norm = self.data.particles.columns.get("norm_correction", ones)
        known = (norm, ones, self.data.rotation, self.data.origin_px, ones > 0)
        return shard_rows(self.data, rows, name, *known)


@dataclass(frozen=True)
class _Part:
    """Particles that follow one another in the store, `positions`, as a shard for each half; amplitude: (n,) of
    each."""

    name: str
    shards: tuple[Shard, ...]
    positions: tuple[np.ndarray, ...]
    amplitude: tuple[np.ndarray, ...]
    moved_px: tuple[np.ndarray, ...]


def subtract(options: SubtractOptions, *, progress: Progress = print) -> SubtractResult:
    """Subtract, or revert; see `SubtractOptions`. InputError for bad input, before work starts; RunError where no image
    is left. A run that goes on does the parts that are not there, to the same bits."""
    check_kind(options.cluster)
    if options.revert:
        return _revert(options)
    job = _load(options)
    inputs = [options.source] + ([options.mask] if options.mask else [])
    run = Run.start(
        options.out, "subtract", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    )
    if not run.finished:
        with run, em.scratch(run.path) as scratch, connect(options.cluster, options.workers) as cluster:
            run.quarantine(job.data.store.quarantined)
            progress(f"{len(job.data.particles)} particles, box {job.data.store.box_px} px, on {cluster.description}")
            _make(job, run, scratch, cluster, progress)
    return _result(options.out, run)


def _result(out: Path, run: Run) -> SubtractResult:
    result = run.record["result"]
    x, y, z = result["centre_px"]
    return SubtractResult(out, open_store(out / STORE), result["left_out"], (x, y, z))


def _load(options: SubtractOptions) -> _Job:
    """Everything that is read, checked."""
    data = load_dataset(options.source, options.seed)
    store = data.store
    box = options.box_px or store.box_px
    if box > store.box_px:
        raise InputError(f"--box {box}: expected at most that of the images, {store.box_px} px")
    if not data.has_poses and (options.mask or options.recenter_at_A):
        raise InputError(f"{options.source}: the particles have no poses (rlnAngleRot, ...); refine them first")
    mask = None if options.mask is None else load_mask(store, None, options.mask)[0]
    centre = np.zeros(3)
    if options.recenter and mask is not None:
        centre = subtraction.centre_of_mass_px(mask)
    elif options.recenter_at_A is not None:
        centre = np.array(options.recenter_at_A) / store.pixel_size_A
    centre_px = np.floor(centre + 0.5).astype(np.int64)
    if np.abs(centre_px).max() > store.box_px // 2:
        raise InputError(
            f"--recenter-at {options.recenter_at_A}: is outside the box, which reaches {store.box_px // 2} px of "
            f"{store.pixel_size_A:g} A from its centre; these are Angstrom from the centre of the map"
        )
    maps, reference, own_score = None, None, (0.0, 0.0)
    if mask is not None:
        maps, reference, own_score = _maps(options.source, data, mask)
    elif (options.source / "map.mrc").is_file():
        reference = mrc.read_map(options.source / "map.mrc").array
    return _Job(options, data, box, centre_px, maps, own_score, reference, mask)


def _maps(
    source: Path, data: Dataset, mask: np.ndarray
) -> tuple[tuple[subtraction.Parts, subtraction.Parts], np.ndarray, tuple[float, float]]:
    """The parts of the two half maps of a run, the part of its map that stays, and what images' own noise adds to the
    amplitude that is found of the rest, in each half."""
    absent = [name for name in _MAPS if not (source / name).is_file()]
    if absent:
        raise InputError(
            f"{source}: has no {absent[0]}; what is subtracted comes from the half maps of a run of refine"
        )
    solvent = load_mask(data.store, None, source / "mask.mrc")[0]
    curve = read_curves(source / "fsc.csv")["fsc_masked"]
    last = int(fsc.crossing(curve, fsc.GOLD_STANDARD))
    first, second = (
        subtraction.parts(mrc.read_map(source / f"half{half}.mrc").array, curve, solvent, mask, last) for half in (1, 2)
    )
    if not np.any(first.outside) or not np.any(second.outside):
        raise InputError(f"{source}: the mask leaves nothing of the map outside; there is nothing to subtract")
    order = len(operators(Run.open(source).record["options"].get("symmetry", "C1")))
    own = [subtraction.own_score(curve, solvent * (1 - mask), order * len(data.rows_of(half)), last) for half in (1, 2)]
    return (first, second), mrc.read_map(source / "map.mrc").array * solvent * mask, (own[0], own[1])


def _make(job: _Job, run: Run, scratch: Path, cluster: Cluster, progress: Progress) -> None:
    prepared: tuple[Path, ...] = ()
    amplitude = np.zeros(len(job.data.particles))
    figures: dict[str, Any] = {}
    if job.maps is not None:
        prepared = tuple(_prepared(job.maps, scratch, job.pixels.shell_max))
        amplitude = _amplitudes(job, run, prepared, cluster)
        figures = {"amplitude_mean": float(amplitude.mean()), "amplitude_sd": float(amplitude.std())}
        progress("amplitude of what is subtracted: {amplitude_mean:.3f} +- {amplitude_sd:.3f}".format(**figures))
    particles, parts = _parts(job, amplitude)
    folder = run.path.absolute() / PARTS
    if not is_store(run.path / STORE):
        folder.mkdir(exist_ok=True)
        missing = [part for part in parts if not _is_whole(_file(folder, part))]
        arguments = (prepared[::2], job.pixels, job.box_px, job.data.store.dtype, job.data.store.scale, folder)
        for done, _ in enumerate(graph.each(make_part, missing, arguments, cluster), start=1):
            progress(f"{done} of {len(missing)} parts", end="\r")
        _put_together(job, run, particles, parts, folder)
    shutil.rmtree(folder, ignore_errors=True)
    made = open_store(run.path / STORE)
    run.quarantine(made.quarantined)
    star.write_particles(run.path / TABLE, made.particles())
    pixel = made.pixel_size_A
    for name, volume in ((REFERENCE, job.reference), (MASK, job.mask)):
        if volume is not None:
            mrc.write_map(run.path / name, subtraction.moved_map(volume, job.centre_px, job.box_px), pixel)
    left_out = len(job.data.particles) - made.n
    run.done(
        {"particles": made.n, "left_out": left_out, "box_px": made.box_px, "pixel_size_A": pixel,
         "centre_px": job.centre_px, **figures}
    )  # fmt: skip


def _prepared(maps: tuple[subtraction.Parts, ...], scratch: Path, shell_max: int) -> Iterable[Path]:
    """Where tasks find the two parts of each half's map, outside and inside by turns."""
    for half, of_half in enumerate(maps, start=1):
        for name, volume in zip(of_half._fields, of_half, strict=True):
            yield em.write_reference(volume, shell_max, scratch / f"{name}{half}.npy")


def _amplitudes(job: _Job, run: Run, prepared: tuple[Path, ...], cluster: Cluster) -> np.ndarray:
    """Amplitude of the part outside in each particle, (n,)."""
    known = run.latest_checkpoint()
    if known is not None:
        return known[1]["amplitude"]
    found = np.ones(len(job.data.particles))
    halves = []
    for half in (1, 2):
        every = job.data.rows_of(half)
        size = shard_size(len(every))
        shards = [
            job.shard(every[first : first + size], f"{half}-{index}")
            for index, first in enumerate(range(0, len(every), size))
        ]
        files = prepared[2 * half - 2 : 2 * half]
        noise = graph.call(noise_of, shards, *files, job.data.n_groups, job.pixels, name=f"noise-{half}")
        halves.append(
            [
                graph.call(measure_shard, shard, *files, noise, job.pixels, name=f"measure-{shard.name}")
                for shard in shards
            ]
        )
    for half, measured in enumerate(graph.compute(halves, cluster), start=1):
        own = job.data.rows_of(half)
        whole = Amplitudes(*(np.concatenate(column) for column in zip(*measured, strict=True)))
        found[own] = subtraction.amplitudes(whole, job.data.groups[own], job.own_score[half - 1])
    run.save_checkpoint(1, {"amplitude": found}, {})
    return found


def noise_of(shards: list[Shard], outside: Path, inside: Path, groups: int, pixels: HalfPlane) -> np.ndarray:
    """A task: mean power per shell of what both parts leave of images, (groups, D // 2 + 1), from some of a half.

    Optics groups without an image among them get the mean of the others.
    """
    references = em.read_reference(outside), em.read_reference(inside)
    step = max(1, sum(len(shard.rows) for shard in shards) // _SPECTRUM_PARTICLES)
    sums, counts = np.zeros((groups, shards[0].store.box_px // 2 + 1)), np.zeros(groups)
    for shard in shards:
        for first in range(0, len(shard.rows), BATCH * step):
            batch, _ = shard.read(slice(first, first + BATCH * step, step))
            power, particles = subtraction.residual_power(batch, *references, groups, pixels)
            sums += power
            counts += particles
    if not np.any(counts):
        raise RunError("none of the images could be read; see the report of the import")
    return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], sums.sum(axis=0) / counts.sum())


def measure_shard(shard: Shard, outside: Path, inside: Path, noise: np.ndarray, pixels: HalfPlane) -> Amplitudes:
    """A task: what the images of a shard say of the amplitude of the part outside."""
    references = em.read_reference(outside), em.read_reference(inside)
    found = [
        subtraction.measure(shard.read(slice(first, first + BATCH))[0], *references, noise, pixels)
        for first in range(0, len(shard.rows), BATCH)
    ]
    return Amplitudes(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _parts(job: _Job, amplitude: np.ndarray) -> tuple[Particles, list[_Part]]:
    """The particles as they are to be in the new store, and the parts that it is made of."""
    data, n, pixel = job.data, len(job.data.particles), job.data.ctf.pixel_size_A[:, None]
    point = data.rotation, job.centre_px.astype(np.float64)
    back, origin_px = extraction.recentred(np.zeros((n, 2)), data.origin_px, *point)
    # Only what was asked to be moved is: boxes stay where they are centred on what they were.
    if not np.any(job.centre_px) and not (job.options.recenter or job.options.recenter_at_A):
        back, origin_px = np.zeros((n, 2)), data.origin_px
    moved_px = back.astype(np.int64)
    particles = as_read(data.particles)
    columns = {
        "image_path": np.array([f"subtracted/{name}" for name in particles["image_path"].tolist()], dtype="U"),
        "half": data.halves,
        "origin_A": origin_px * pixel,
        "box_moved_px": particles.columns.get("box_moved_px", 0) + moved_px,
    }
    if "image_sign" in particles:
        columns["image_sign"] = np.ones(n)
    if "coordinate_px" in particles:
        scale = pixel / particles.optics_of("micrograph_pixel_size_A")[:, None] if (
            "micrograph_pixel_size_A" in particles.optics) else 1.0  # fmt: skip
        columns["coordinate_px"] = particles["coordinate_px"] + moved_px * scale
    names = zip(particles["image_index"].tolist(), particles["image_path"].tolist(), strict=True)
    extra = {ORIGINAL_NAME: np.array([f"{index + 1:06d}@{path}" for index, path in names], dtype="U")}
    particles = particles.replace(**columns).replace_optics(box_px=np.full(particles.n_groups, job.box_px))
    particles = dataclasses.replace(particles, extra=extra | particles.extra)
    size = min(shard_size(n), layout(job.box_px, data.store.dtype)[1])
    parts = []
    for index, first in enumerate(range(0, n, size)):
        some = np.arange(first, min(first + size, n))
        of_halves = tuple(some[data.halves[some] == half] for half in (1, 2))
        parts.append(
            _Part(
                f"{index:06d}",
                tuple(job.shard(rows, f"{half}-{index}") for half, rows in enumerate(of_halves, start=1)),
                tuple(rows - first for rows in of_halves),
                tuple(amplitude[rows] for rows in of_halves),
                tuple(moved_px[rows] for rows in of_halves),
            )
        )
    return particles, parts


def _file(folder: Path, part: _Part) -> Path:
    return folder / f"{part.name}.npz"


def _is_whole(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)


def make_part(
    part: _Part,
    outside: tuple[Path, ...],
    pixels: HalfPlane,
    box_px: int,
    dtype: Any,
    scale: float,
    folder: Path,
) -> None:
    """A task: the images of a part, in the stored type, and what was left out of them, into a file.

    outside: prepared maps to subtract, one for each half; none where images are only moved.
    """
    n = sum(map(len, part.positions))
    made = np.zeros((n, box_px, box_px), dtype=dtype)
    left_out: dict[int, str] = {}
    for half, (shard, positions) in enumerate(zip(part.shards, part.positions, strict=True)):
        reference = em.read_reference(outside[half]) if outside else None
        for first in range(0, len(positions), BATCH):
            some = slice(first, first + BATCH)
            batch, bad = shard.read(some)
            with np.errstate(invalid="ignore"):
                images = batch.images
                if reference is not None:
                    images = subtraction.subtract(batch, reference, part.amplitude[half][some], pixels)
                images = subtraction.moved_boxes(images, part.moved_px[half][some], box_px)
                bad = defects(images, dtype, scale) | bad
                images[list(bad)] = 0
            made[positions[some]] = images / np.float32(scale)
            left_out |= {int(positions[first + place]): reason for place, reason in bad.items()}
    rows = np.array(sorted(left_out), dtype=np.int64)
    reasons = np.array([left_out[row] for row in rows.tolist()], dtype="U")
    with replacing(_file(folder, part)) as file:
        np.savez(file, images=made, rows=rows, reasons=reasons)


def _put_together(job: _Job, run: Run, particles: Particles, parts: list[_Part], folder: Path) -> None:
    """The store of all parts, one after the other, but for what was left out."""
    source = _lineage(job)
    writer = create(
        run.path / STORE, n_images=len(particles), box_px=job.box_px, pixel_size_A=job.data.store.pixel_size_A,
        dtype=job.data.store.dtype, scale=job.data.store.scale, origin=job.data.store.fingerprint, resume=True,
    )  # fmt: skip
    left_out: dict[int, str] = {}
    skipped, shard, filled, first = writer.written, writer.empty_shard(), 0, 0
    for part in parts:
        with np.load(_file(folder, part)) as packed:
            images, rows, reasons = packed["images"], packed["rows"], packed["reasons"]
        left_out |= dict(zip((first + rows).tolist(), reasons.tolist(), strict=True))
        first += len(images)
        images = np.delete(images, rows, axis=0)
        images, skipped = images[skipped:], max(skipped - len(images), 0)
        filled = _append(writer, shard, filled, images)
    if filled:
        writer.write(shard[:filled], {})
    if not writer.written:
        raise RunError(f"{job.options.source}: no image is left; the first: {next(iter(left_out.values()))}")
    names = particles.extra[ORIGINAL_NAME]
    quarantined = [
        {"row": row + 1, "image": str(names[row]), "reason": reason} for row, reason in sorted(left_out.items())
    ]
    writer.finish(particles.take(np.setdiff1d(np.arange(len(particles)), list(left_out))), quarantined, source)


def _append(writer: Writer, shard: np.ndarray, filled: int, images: np.ndarray) -> int:
    """Put images into the shard of a store that is being filled, writing it where it is full; how full it is then."""
    while len(images):
        count = min(len(images), len(shard) - filled)
        shard[filled : filled + count] = images[:count]
        images, filled = images[count:], filled + count
        if filled == len(shard):
            writer.write(shard, {})
            filled = 0
    return filled


def _lineage(job: _Job) -> dict[str, Any]:
    """Where the images came from, and which point of that map is the centre now; of a store that was made so itself,
    the images before all of it."""
    before = job.data.store.source
    if "centre_px" in before:
        return {"store": before["store"], "centre_px": (np.array(before["centre_px"]) + job.centre_px).tolist()}
    return {"store": str(job.data.store.path), "centre_px": job.centre_px.tolist()}


def _revert(options: SubtractOptions) -> SubtractResult:
    """A selection of the images that a store of subtracted ones was made from, with the poses as they are now."""
    particles, store, _ = open_particles(options.source)
    lineage = store.source
    if "centre_px" not in lineage or ORIGINAL_NAME not in particles.extra:
        raise InputError(f"{options.source}: its images are not of dcryo subtract; there is nothing to revert")
    original = open_store(lineage["store"])
    centre = np.array(lineage["centre_px"])
    known = original.particles()
    rows_of: dict[str, int] = {}
    for row, (index, path) in enumerate(zip(known["image_index"].tolist(), known["image_path"].tolist(), strict=True)):
        rows_of.setdefault(f"{index + 1:06d}@{path}", row)
    names = particles.extra[ORIGINAL_NAME].tolist()
    absent = [name for name in names if name not in rows_of]
    if absent:
        raise InputError(f"{original.path}: has no image {absent[0]}; it is not the store that was subtracted from")
    pixel = particles.optics_of("pixel_size_A")[:, None]
    columns = {name: particles[name] for name in (*_OF_POSES, "symmetry_copy") if name in particles}
    columns["origin_A"] = pixel * subtraction.reverted_origins_px(
        particles["origin_A"] / pixel, particles["rotation"], particles["box_moved_px"], centre
    )
    inputs = [options.source, original.path]
    run = Run.start(
        options.out, "subtract", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    )
    if not run.finished:
        with run:
            if not is_store(options.out / STORE):
                select(
                    original, np.array([rows_of[name] for name in names]), options.out / STORE, columns, repeats=True
                )
            made = open_store(options.out / STORE)
            star.write_particles(options.out / TABLE, made.particles())
            figures = {"box_px": made.box_px, "pixel_size_A": made.pixel_size_A, "centre_px": [0, 0, 0]}
            run.done({"particles": made.n, "left_out": 0, **figures})
    return _result(options.out, run)
