"""The particle store: images and what is known of them, in one Zarr v3 group.

    NAME.zarr/zarr.json        attributes: box, pixel size, scale, fingerprint; written last, so it marks a whole store
    NAME.zarr/images           (N, D, D) float16 or float32, chunked and sharded along particles only
    NAME.zarr/particles, extra, optics, optics_extra    the columns of `Particles`
    NAME.zarr/quarantined      row, image and reason of what was left out
    NAME.zarr/rows             (a selection only) rows of the store that its attribute `parent` points to

Images are stored divided by the store's scale, a power of two, so that only the rounding to float16 is lost:
at most 2^-11 of each value, 2e-4 root mean square. A shard is written whole by one writer and read chunk by
chunk. The layout was measured: docs/decisions/001-store-layout.md.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from dcryo.data.atomic import replacing
from dcryo.data.columns import read_attributes, read_columns, write_columns
from dcryo.data.particles import Particles
from dcryo.errors import InputError, RunError

FORMAT = "dcryo-particles"
FORMAT_VERSION = 1
CHUNK_BYTES = 8 << 20
SHARD_BYTES = 128 << 20
PROGRESS = "progress.json"

ImageType = Literal["float16", "float32"]


def layout(box_px: int, dtype: ImageType) -> tuple[int, int]:
    """Images per chunk and per shard: about 8 MiB and 128 MiB, a function of box and type alone."""
    image_bytes = box_px * box_px * np.dtype(dtype).itemsize
    chunk_images = max(1, CHUNK_BYTES // image_bytes)
    chunks = -(-SHARD_BYTES // (chunk_images * image_bytes))
    return chunk_images, chunk_images * chunks


@dataclass(frozen=True)
class Batch:
    """Images as read. images: float32 (n, D, D), zeros where unreadable. bad: position in the batch ->
    reason."""

    images: np.ndarray
    bad: dict[int, str]


@dataclass(frozen=True)
class Store:
    """A complete store, or a selection of one, open for reading; small, picklable, and safe to share.

    path: where it is. n: particles. box_px: side D of the images. pixel_size_A: of the first particle's
    optics group. dtype and scale: images are kept as `dtype` of value / scale. chunk_images, shard_images:
    images read at once and per file. fingerprint: digest of all images and columns. selection: the store
    whose rows these are, None if the images are here.
    """

    path: Path
    n: int
    box_px: int
    pixel_size_A: float
    dtype: ImageType
    scale: float
    chunk_images: int
    shard_images: int
    fingerprint: str
    selection: Path | None = None

    def particles(self) -> Particles:
        """What is known of each particle, aligned with the images. Raises InputError if it cannot be read."""
        root = self.selection or self.path
        whole = Particles(
            *(read_columns(root / name) for name in ("particles", "optics", "extra", "optics_extra"))
        )
        if self.selection is None:
            return whole
        return whole.take(self.rows()).replace(**read_columns(self.path / "particles"))

    def rows(self) -> np.ndarray:
        """Row of each particle in the store that holds its image, int64 (n,)."""
        if self.selection is None:
            return np.arange(self.n)
        return _selected_rows(self.path, self.fingerprint)

    @property
    def quarantined(self) -> list[dict[str, Any]]:
        """What the import left out: data row in the source (from 1), image, reason."""
        columns = read_columns((self.selection or self.path) / "quarantined")
        names = ("row", "image", "reason")
        lists = (columns[name].tolist() for name in names)
        return [dict(zip(names, entry, strict=True)) for entry in zip(*lists, strict=True)]

    @property
    def source(self) -> dict[str, Any]:
        """Where the particles came from, as the import recorded it."""
        found = read_attributes(self.selection or self.path).get("source", {})
        return found if isinstance(found, dict) else {}

    def read(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Images of `rows`, any order, repeats allowed.

        Images that cannot be read (a chunk with a wrong checksum, a missing or truncated file) are zeros, and
        listed in the batch with the reason. Raises IndexError for rows that the store does not have, and
        RunError if the store itself is gone.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.n):
            raise IndexError(f"{self.path}: rows {rows.min()} to {rows.max()} asked, it has {self.n}")
        if self.selection is not None:
            rows = self.rows()[rows]
        images = np.zeros((len(rows), self.box_px, self.box_px), np.float32)
        bad: dict[int, str] = {}
        array = _open_images(self.selection or self.path)
        for positions in _by_chunk(rows, self.chunk_images):
            wanted = rows[positions]
            chunk = int(wanted[0]) // self.chunk_images
            low = int(wanted.min())
            try:
                block = np.asarray(array[low : int(wanted.max()) + 1])
            except MemoryError:
                raise
            # Zarr reports damage by many types of exception, none of its own.
            except Exception as error:
                bad.update(
                    dict.fromkeys(positions.tolist(), f"chunk {chunk} of the store cannot be read: {error}")
                )
                continue
            found = block[wanted - low]
            # Images in a store are finite, and what was never written reads as NaN.
            absent = np.isnan(found[:, 0, 0])
            if absent.any():
                bad.update(
                    dict.fromkeys(positions[absent].tolist(), f"chunk {chunk} of the store is missing")
                )
                found[absent] = 0
            images[positions] = found
        if self.scale != 1:
            images *= np.float32(self.scale)
        return Batch(images, bad)


def open_store(path: str | Path) -> Store:
    """Open a store or a selection. Raises InputError where there is none, it is not whole, or its parent
    changed."""
    path = Path(path).absolute()
    attributes = read_attributes(path)
    if attributes.get("format") != FORMAT:
        if (path / PROGRESS).is_file():
            raise InputError(
                f"{path}: the store is not whole, its import was interrupted; repeat it with --resume"
            )
        raise InputError(f"{path}: not a particle store; make one with dcryo import")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {attributes.get('format_version')} of the store is not "
            f"{FORMAT_VERSION}, the "
            "one this program reads; use the version of dcryo that wrote it"
        )
    try:
        if "parent" in attributes:
            return _open_selection(path, attributes)
        return _store(path, attributes)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path / 'zarr.json'}: damaged attributes ({error!r}); restore or import again"
        ) from error


def is_store(path: str | Path) -> bool:
    """Whether `path` is a whole store or a selection."""
    return read_attributes(Path(path)).get("format") == FORMAT


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
        self._array = zarr.open_array(path / "images", mode="r+", zarr_format=3)

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
            raise ValueError(
                f"a shard of {len(images)} images after {start}; each is {self.shard_images} but the last"
            )
        shard = self.path / "images" / "c" / str(start // self.shard_images) / "0" / "0"
        try:
            # What a killed writer left would be merged with a last shard that is not full.
            shard.unlink(missing_ok=True)
            self._array[start : start + len(images)] = images
            with shard.open("rb") as file:
                os.fsync(file.fileno())
            digest = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
            self._progress["shards"].append({"images": len(images), "digest": digest, "note": dict(note)})
            _write_json(self.path / PROGRESS, self._progress)
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
        _mark(self.path, {**attributes, "fingerprint": digest, "source": dict(source)})
        (self.path / PROGRESS).unlink(missing_ok=True)
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
    _refuse_complete(path)
    if resume and (path / PROGRESS).is_file():
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        if progress["begun"] != begun:
            changed = [f"{name} {was!r}, now {begun[name]!r}" for name, was in progress["begun"].items()
                       if was != begun[name]]  # fmt: skip
            raise InputError(
                f"{path}: cannot be resumed, it was begun with {'; '.join(changed)}; give the same options "
                "and files, "
                "or start again with --overwrite"
            )
        for leftover in [*path.rglob("*.partial"), *path.glob(".*.tmp")]:
            leftover.unlink()
        return Writer(path, attributes, progress)
    if (path / "images").exists() and not resume:
        raise InputError(
            f"{path}: holds an unfinished store; go on with --resume or start again with --overwrite"
        )
    progress = {"begun": begun, "shards": []}
    zarr.create_array(
        path / "images",
        shape=(n_images, box_px, box_px),
        chunks=(chunk_images, box_px, box_px),
        shards=(shard_images, box_px, box_px),
        dtype=dtype,
        compressors=[Crc32cCodec()],
        fill_value=np.nan,
        overwrite=True,
        zarr_format=3,
    )
    _write_json(path / PROGRESS, progress)
    return Writer(path, attributes, progress)


def select(
    store: Store,
    rows: Sequence[int] | np.ndarray,
    path: str | Path,
    columns: Mapping[str, np.ndarray] | None = None,
) -> Store:
    """Make a selection: `rows` of `store` in their order, by reference. No image is copied.

    columns: particle columns (first axis as `rows`) that replace, or are added to, the store's, for instance
    poses or half sets. A selection of a selection points to the store itself. The store is found again as
    long as both move together. Raises InputError for repeated rows, rows that are not there, or a path that
    holds a store.
    """
    path = Path(path).absolute()
    rows = np.asarray(rows, dtype=np.int64).reshape(-1)
    if rows.size and (rows.min() < 0 or rows.max() >= store.n):
        raise InputError(
            f"{store.path}: rows {rows.min()} to {rows.max()} selected, it has {store.n} (from 0)"
        )
    if len(np.unique(rows)) != len(rows):
        raise InputError(f"{store.path}: rows selected more than once; list each row once")
    _refuse_complete(path)
    replaced = {} if store.selection is None else _take(read_columns(store.path / "particles"), rows)
    replaced |= {name: np.asarray(values) for name, values in (columns or {}).items()}
    # Made as a record only to have names, types and lengths checked, and converted to those of the schema.
    checked = store.particles().take(rows).replace(**replaced)
    replaced = {name: checked[name] for name in replaced}
    parent = (store.selection or store.path).resolve()
    whole = open_store(parent)
    digest = write_columns(path / "rows", {"row": store.rows()[rows]})
    digest += write_columns(path / "particles", replaced)
    _mark(
        path,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "n": len(rows),
            "parent": os.path.relpath(parent, path.resolve()),
            "parent_fingerprint": whole.fingerprint,
            "fingerprint": hashlib.sha256((whole.fingerprint + digest).encode()).hexdigest(),
        },
    )
    return open_store(path)


def _take(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[rows] for name, values in columns.items()}


def _mark(path: Path, attributes: Mapping[str, Any]) -> None:
    group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    _write_json(path / "zarr.json", group)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def _refuse_complete(path: Path) -> None:
    if is_store(path):
        raise InputError(f"{path}: holds a store already; name another one, or give --overwrite")


def _store(path: Path, attributes: Mapping[str, Any]) -> Store:
    return Store(
        path=path,
        n=int(attributes["n"]),
        box_px=int(attributes["box_px"]),
        pixel_size_A=float(attributes["pixel_size_A"]),
        dtype=attributes["dtype"],
        scale=float(attributes["scale"]),
        chunk_images=int(attributes["chunk_images"]),
        shard_images=int(attributes["shard_images"]),
        fingerprint=str(attributes["fingerprint"]),
    )


def _open_selection(path: Path, attributes: Mapping[str, Any]) -> Store:
    parent = Path(os.path.normpath(path.resolve() / str(attributes["parent"])))
    if not is_store(parent):
        raise InputError(
            f"{path}: its images are in {parent}, which is not there; a selection finds its store only if "
            "both are "
            "moved together"
        )
    whole = open_store(parent)
    if whole.fingerprint != attributes["parent_fingerprint"]:
        raise InputError(
            f"{path}: {parent} is not the store it was selected from (it was replaced); select again"
        )
    return replace(
        whole, path=path, n=int(attributes["n"]), fingerprint=str(attributes["fingerprint"]), selection=parent
    )


@functools.lru_cache(maxsize=8)
def _selected_rows(path: Path, fingerprint: str) -> np.ndarray:
    """The rows of a selection; kept, as every batch asks for them. The fingerprint keeps a replaced one
    apart."""
    rows = read_columns(path / "rows")["row"]
    rows.flags.writeable = False
    return rows


def _open_images(path: Path) -> zarr.Array:
    try:
        return zarr.open_array(path / "images", mode="r", zarr_format=3)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path / 'images'}: cannot be opened ({error}); restore the store from a copy"
        ) from error


def _by_chunk(rows: np.ndarray, chunk_images: int) -> Iterator[np.ndarray]:
    """Positions in `rows` that lie in the same chunk, chunk after chunk: indexing a sharded array with a list
    of rows decodes a chunk again for every row."""
    order = np.argsort(rows, kind="stable")
    chunks = rows[order] // chunk_images
    yield from np.split(order, np.flatnonzero(np.diff(chunks)) + 1) if len(rows) else ()
