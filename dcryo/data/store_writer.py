"""Writing the images of a particle store, shard after shard, so that a writer that is killed can go on."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from dcryo.data import atomic
from dcryo.data.columns import read_attributes, write_columns
from dcryo.data.particles import Particles
from dcryo.data.store import (
    FORMAT,
    FORMAT_VERSION,
    UNFINISHED,
    ImageType,
    Store,
    mark,
    open_store,
    refuse_complete,
)
from dcryo.errors import InputError, RunError

CHUNK_BYTES = 8 << 20
SHARD_BYTES = 128 << 20


def layout(box_px: int, dtype: ImageType) -> tuple[int, int]:
    """Images per chunk and per shard: about 8 MiB and 128 MiB, a function of box and type alone."""
    image_bytes = box_px * box_px * np.dtype(dtype).itemsize
    chunk_images = max(1, CHUNK_BYTES // image_bytes)
    chunks = -(-SHARD_BYTES // (chunk_images * image_bytes))
    return chunk_images, chunk_images * chunks


class Writer:
    """Writes a store shard after shard; made by `create`.

    notes: what the caller wrote down with each finished shard, in order: after an interruption it says where
    to go on. written: images in the finished shards.
    """

    def __init__(self, path: Path, attributes: dict[str, Any], progress: dict[str, Any]) -> None:
        self.path = path
        self.chunk_images, self.shard_images = attributes["chunk_images"], attributes["shard_images"]
        self.scale = float(attributes["scale"])
        self._attributes = attributes
        self._progress = progress
        # Zarr's test whether a chunk is empty takes as long as all the rest of writing it.
        array = zarr.open_array(path / "images", mode="r+", zarr_format=3)
        self._array = array.with_config({"write_empty_chunks": True})

    @property
    def notes(self) -> list[dict[str, Any]]:
        return [shard["note"] for shard in self._progress["shards"]]

    @property
    def written(self) -> int:
        return sum(shard["images"] for shard in self._progress["shards"])

    def empty_shard(self) -> np.ndarray:
        """Memory for one shard of images in the stored type, (shard_images, D, D)."""
        return np.empty((self.shard_images, *self._array.shape[1:]), self._array.dtype)

    def write(self, images: np.ndarray, note: Mapping[str, Any]) -> None:
        """Commit the next shard: images in the stored type, already divided by the scale, (n, D, D).

        Every shard but the last is full. `note` (plain JSON) is committed with it. Killed at any moment, the
        shard and its note are there or are not. Raises RunError if the disk refuses.
        """
        start = self.written
        if start % self.shard_images or not 0 < len(images) <= self.shard_images:
            raise ValueError(f"a shard of {len(images)} images after {start}; each is {self.shard_images} but the last")
        shard = self.path / "images" / "c" / str(start // self.shard_images) / "0" / "0"
        try:
            # What a killed writer left would be merged with a last shard that is not full.
            shard.unlink(missing_ok=True)
            self._array[start : start + len(images)] = images
            with shard.open("rb") as file:
                os.fsync(file.fileno())
            digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
            self._progress["shards"].append({"images": len(images), "digest": digest, "note": dict(note)})
            mark(self.path, self._progress)
        except OSError as error:
            raise RunError(
                f"{shard}: cannot be written ({error.strerror}); make room, then go on with --resume"
            ) from error

    def finish(
        self, particles: Particles, quarantined: Sequence[Mapping[str, Any]], source: Mapping[str, Any]
    ) -> Store:
        """Write the columns beside the images, then the marker that makes this a store.

        particles: one row per image written. quarantined: row, image and reason of what was left out.
        source: plain JSON that says where the particles came from; it is not part of the fingerprint.
        """
        n = self.written
        if len(particles) != n:
            raise ValueError(f"{len(particles)} particles for {n} images")
        self._array.resize((n, *self._array.shape[1:]))
        columns = {
            "particles": particles.columns,
            "optics": particles.optics,
            "extra": particles.extra,
            "optics_extra": particles.optics_extra,
            "quarantined": {
                "row": np.array([entry["row"] for entry in quarantined], np.int64),
                "image": np.array([entry["image"] for entry in quarantined], str),
                "reason": np.array([entry["reason"] for entry in quarantined], str),
            },
        }
        digests = [shard["digest"] for shard in self._progress["shards"]]
        digests += [write_columns(self.path / name, content) for name, content in columns.items()]
        attributes = {"format": FORMAT, "format_version": FORMAT_VERSION, "n": n, **self._attributes}
        digest = hashlib.sha256(json.dumps([attributes, digests], sort_keys=True).encode()).hexdigest()
        mark(self.path, {**attributes, "fingerprint": digest, "source": dict(source)})
        return open_store(self.path)


def create(
    path: str | Path,
    *,
    n_images: int,
    box_px: int,
    pixel_size_A: float,
    dtype: ImageType = "float16",
    scale: float = 1.0,
    origin: str = "",
    resume: bool = False,
) -> Writer:
    """Begin a store of at most `n_images` images of box_px x box_px, or go on with an interrupted one.

    scale: a power of two that the images are divided by (see `dcryo.data.stacks.float16_scale`). origin:
    digest of where the images come from, the same when resumed. Raises InputError if a store is there
    already, or if what is resumed was begun with other values.
    """
    path = Path(path).absolute()
    chunk_images, shard_images = layout(box_px, dtype)
    attributes = {
        "box_px": box_px,
        "pixel_size_A": pixel_size_A,
        "dtype": dtype,
        "scale": scale,
        "chunk_images": chunk_images,
        "shard_images": shard_images,
    }
    begun = {"n_images": n_images, "origin": origin, **attributes}
    refuse_complete(path)
    # Files that a killed process had not yet given their names.
    atomic.discard_unfinished(path)
    for leftover in path.rglob("*.partial"):
        leftover.unlink()
    progress = read_attributes(path)
    if resume and progress.get("format") == UNFINISHED:
        if progress["begun"] != begun:
            changed = [f"{name} {was!r}, now {begun[name]!r}" for name, was in progress["begun"].items()
                       if was != begun[name]]  # fmt: skip
            raise InputError(
                f"{path}: cannot be resumed, it was begun with {'; '.join(changed)}; give the same options and "
                "files, or start again with --overwrite"
            )
        return Writer(path, attributes, progress)
    if (path / "images").exists() and not resume:
        raise InputError(f"{path}: holds an unfinished store; go on with --resume or start again with --overwrite")
    zarr.create_array(
        path / "images",
        # Whole shards, so that Zarr does not pad a last one that is not full; `finish` cuts to the true number.
        shape=(-(-n_images // shard_images) * shard_images, box_px, box_px),
        chunks=(chunk_images, box_px, box_px),
        shards=(shard_images, box_px, box_px),
        dtype=dtype,
        compressors=[Crc32cCodec()],
        fill_value=np.nan,
        overwrite=True,
        zarr_format=3,
    )
    progress = {"format": UNFINISHED, "begun": begun, "shards": []}
    mark(path, progress)
    return Writer(path, attributes, progress)
