"""Stores made of what tasks left in files: images of many micrographs, written in one order by one writer.

A store that more micrographs join is made anew beside the one before, whose images are copied, and takes its place in
one step. Interrupted at any moment, the next call goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcryo.data.particles import Particles
from dcryo.data.store import ImageType, Store, is_store, open_store
from dcryo.data.store_writer import Writer, create
from dcryo.errors import RunError


@dataclass(frozen=True)
class Part:
    """Images that follow one another in the store: of one micrograph, `n` of them, in the stored type in `file`; where
    that is not there, in the store before. stamp: tells them from others that the micrograph might have had."""

    micrograph: str
    n: int
    file: Path
    stamp: str


def gather(
    target: Path,
    workshop: Path,
    parts: Sequence[Part],
    particles: Particles,
    left_out: list[dict[str, Any]],
    dtype: ImageType,
    source: dict[str, Any],
    progress: Callable[..., None],
) -> Store:
    """The store `target` of the images of `parts`, one after the other: made, or as it is where it holds just these.

    particles: a row per image, box and pixel size in their optics. left_out, source: see `Writer.finish`. workshop: a
    directory on the same file system, for what is not whole yet. progress: is told how many
    images are written. RunError where images are missing or damaged, or the disk refuses.
    """
    settle(target, workshop)
    known = rows_of_micrographs(target)
    before = open_store(target) if known else None
    fresh = any(part.file.is_file() for part in parts)
    if before is not None and not fresh and _same(before.particles(), particles) and before.quarantined == left_out:
        return before
    origin = _origin(parts, particles, left_out)
    made = workshop / f"{origin[:16]}.{target.name}"
    for other in workshop.glob(f"*.{target.name}"):
        if other != made:
            shutil.rmtree(other)
    writer = create(
        made,
        n_images=len(particles),
        box_px=int(particles.optics["box_px"][0]),
        pixel_size_A=float(particles.optics_of("pixel_size_A")[0]),
        dtype=dtype,
        origin=origin,
        resume=True,
    )
    _copy(writer, parts, before, known, lambda n: progress(f"{target.name}: {n} of {len(particles)} images", end="\r"))
    writer.finish(particles, left_out, source)
    settle(target, workshop)
    return open_store(target)


def settle(target: Path, workshop: Path) -> None:
    """Put a store that is whole into its place, which takes that of the one before."""
    for made in workshop.glob(f"*.{target.name}"):
        if is_store(made):
            shutil.rmtree(target, ignore_errors=True)
            made.rename(target)


def rows_of_micrographs(path: Path) -> dict[str, tuple[int, int]]:
    """First row and number of the images of each micrograph in a store of this kind; empty without one."""
    if not is_store(path):
        return {}
    names, first, counts = np.unique(open_store(path).particles()["micrograph"], return_index=True, return_counts=True)
    return dict(zip(names.tolist(), zip(first.tolist(), counts.tolist(), strict=True), strict=True))


def _copy(
    writer: Writer,
    parts: Iterable[Part],
    before: Store | None,
    known: dict[str, tuple[int, int]],
    told: Callable[[int], None],
) -> None:
    """Write the images of all parts in their order, shard by shard, from where an interrupted copy ended."""
    shard, filled, skipped = writer.empty_shard(), 0, writer.written
    for part in parts:
        first = min(part.n, skipped)
        skipped -= first
        while first < part.n:
            count = min(part.n - first, len(shard) - filled, writer.chunk_images)
            shard[filled : filled + count] = _read(part, first, count, shard, before, known)
            first, filled = first + count, filled + count
            if filled == len(shard):
                writer.write(shard, {})
                told(writer.written)
                filled = 0
    if filled:
        writer.write(shard[:filled], {})


def _read(
    part: Part, first: int, count: int, like: np.ndarray, before: Store | None, known: dict[str, tuple[int, int]]
) -> np.ndarray:
    """Images (count, D, D) of a part from `first`, of the type and size of `like` (any, D, D)."""
    if part.file.is_file():
        if part.file.stat().st_size != part.n * like[0].nbytes:
            raise RunError(f"{part.file}: is damaged; remove it and go on with --resume, which makes it anew")
        return np.memmap(part.file, like.dtype, "r", shape=(part.n, *like.shape[1:]))[first : first + count]
    start, n = known.get(part.micrograph, (0, 0))
    if before is None or n != part.n:
        raise RunError(f"{part.file}: is gone; go on with --resume, which makes it anew")
    batch = before.read(np.arange(start + first, start + first + count))
    if batch.bad:
        raise RunError(f"{before.path}: {next(iter(batch.bad.values()))}; start again with --overwrite")
    return batch.images.astype(like.dtype)


def _same(first: Particles, second: Particles) -> bool:
    return all(
        one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
        for one, other in zip(_tables(first), _tables(second), strict=True)
    )


def _origin(parts: Sequence[Part], particles: Particles, left_out: list[dict[str, Any]]) -> str:
    """Digest of all that the store is made of, to know again one that was begun."""
    digest = hashlib.sha256(json.dumps([[(part.micrograph, part.n, part.stamp) for part in parts], left_out]).encode())
    for table in _tables(particles):
        for name, values in table.items():
            digest.update(f"{name}\0{values.dtype}{values.shape}\0".encode())
            digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _tables(particles: Particles) -> tuple[dict[str, np.ndarray], ...]:
    return particles.columns, particles.optics, particles.extra, particles.optics_extra
