"""The particle store: images and what is known of them, in one Zarr v3 group.

    NAME.zarr/zarr.json        attributes: box, pixel size, scale, fingerprint; replaced last, to mark a whole store
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

from dcryo.data.atomic import replacing
from dcryo.data.columns import read_attributes, read_columns, write_columns
from dcryo.data.particles import Particles
from dcryo.errors import InputError, RunError

FORMAT = "dcryo-particles"
FORMAT_VERSION = 1
UNFINISHED = "dcryo-particles-unfinished"
"""Format of a store that is being written; its attributes say how far it is."""

ImageType = Literal["float16", "float32"]


@dataclass(frozen=True)
class Batch:
    """Images as read: float32 (n, D, D), zeros where unreadable. bad: position in the batch -> reason."""

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
        whole = Particles(*(read_columns(root / name) for name in ("particles", "optics", "extra", "optics_extra")))
        if self.selection is None:
            return whole
        own = whole.take(self.rows()).replace(**read_columns(self.path / "particles"))
        return own.replace_optics(**_own_optics(self.path))

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
        asked = np.asarray(rows, dtype=np.int64)
        if asked.size and (asked.min() < 0 or asked.max() >= self.n):
            raise IndexError(f"{self.path}: rows {asked.min()} to {asked.max()} asked, it has {self.n}")
        if self.selection is not None:
            asked = self.rows()[asked]
        images = np.zeros((len(asked), self.box_px, self.box_px), np.float32)
        bad: dict[int, str] = {}
        array = _open_images(self.selection or self.path)
        for positions in _by_chunk(asked, self.chunk_images):
            wanted = asked[positions]
            chunk = int(wanted[0]) // self.chunk_images
            low = int(wanted.min())
            try:
                block = np.asarray(array[low : int(wanted.max()) + 1])
            except MemoryError:
                raise
            # Zarr reports damage by many types of exception, none of its own.
            except Exception as error:
                bad.update(dict.fromkeys(positions.tolist(), f"chunk {chunk} of the store cannot be read: {error}"))
                continue
            found = block[_as_slice(wanted - low)]
            # Images in a store are finite, and what was never written reads as NaN.
            absent = np.isnan(found[:, 0, 0])
            if absent.any():
                bad.update(dict.fromkeys(positions[absent].tolist(), f"chunk {chunk} of the store is missing"))
                found[absent] = 0
            images[_as_slice(positions)] = found
        if self.scale != 1:
            images *= np.float32(self.scale)
        return Batch(images, bad)


def open_store(path: str | Path) -> Store:
    """Open a store or a selection; InputError where there is none, it is not whole, or its parent changed."""
    path = Path(path).absolute()
    attributes = read_attributes(path)
    if attributes.get("format") != FORMAT:
        if attributes.get("format") == UNFINISHED:
            raise InputError(f"{path}: the store is not whole, its import was interrupted; repeat it with --resume")
        raise InputError(f"{path}: not a particle store; make one with dcryo import")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {attributes.get('format_version')} of the store is not {FORMAT_VERSION}, the "
            "one this program reads; use the version of dcryo that wrote it"
        )
    try:
        if "parent" in attributes:
            return _open_selection(path, attributes)
        return _store(path, attributes)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path / 'zarr.json'}: damaged attributes ({error!r}); restore or import again") from error


def is_store(path: str | Path) -> bool:
    """Whether `path` is a whole store or a selection."""
    return read_attributes(Path(path)).get("format") == FORMAT


def select(
    store: Store,
    rows: Sequence[int] | np.ndarray,
    path: str | Path,
    columns: Mapping[str, np.ndarray] | None = None,
    optics: Mapping[str, np.ndarray] | None = None,
    *,
    repeats: bool = False,
) -> Store:
    """Make a selection: `rows` of `store` in their order, by reference. No image is copied.

    columns: particle columns (first axis as `rows`) that replace, or are added to, the store's, for instance
    poses or half sets; optics: columns of the optics table, likewise. A selection of a selection points to the
    store itself. The store is found again as long as both move together. Raises InputError for rows that are not there,
    for repeated ones unless `repeats` says that they are meant, or a path that holds a store.
    """
    path = Path(path).absolute()
    rows = np.asarray(rows, dtype=np.int64).reshape(-1)
    if rows.size and (rows.min() < 0 or rows.max() >= store.n):
        raise InputError(f"{store.path}: rows {rows.min()} to {rows.max()} selected, it has {store.n} (from 0)")
    if not repeats and len(np.unique(rows)) != len(rows):
        raise InputError(f"{store.path}: rows selected more than once; list each row once")
    refuse_complete(path)
    replaced = {} if store.selection is None else _take(read_columns(store.path / "particles"), rows)
    replaced |= {name: np.asarray(values) for name, values in (columns or {}).items()}
    of_groups = {} if store.selection is None else _own_optics(store.path)
    of_groups |= {name: np.asarray(values) for name, values in (optics or {}).items()}
    # Made as a record only to have names, types and lengths checked, and converted to those of the schema.
    checked = store.particles().take(rows).replace(**replaced).replace_optics(**of_groups)
    replaced = {name: checked[name] for name in replaced}
    of_groups = {name: checked.optics[name] for name in of_groups}
    parent = (store.selection or store.path).resolve()
    whole = open_store(parent)
    digest = write_columns(path / "rows", {"row": store.rows()[rows]})
    digest += write_columns(path / "particles", replaced)
    if of_groups:
        digest += write_columns(path / "optics", of_groups)
    mark(
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


def _own_optics(path: Path) -> dict[str, np.ndarray]:
    """Columns of the optics table that a selection has in place of its store's; most have none."""
    return read_columns(path / "optics") if (path / "optics").is_dir() else {}


def _take(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[rows] for name, values in columns.items()}


def mark(path: Path, attributes: Mapping[str, Any]) -> None:
    """Make `path` a Zarr group with these attributes, in one step; their format says if it is a whole store."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    with replacing(path / "zarr.json") as file:
        file.write(json.dumps(group, indent=1).encode())


def refuse_complete(path: Path) -> None:
    """Raise InputError where `path` is a store."""
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
            f"{path}: its images are in {parent}, which is not there; a selection finds its store only if both "
            "are moved together"
        )
    whole = open_store(parent)
    if whole.fingerprint != attributes["parent_fingerprint"]:
        raise InputError(f"{path}: {parent} is not the store it was selected from (it was replaced); select again")
    return replace(
        whole, path=path, n=int(attributes["n"]), fingerprint=str(attributes["fingerprint"]), selection=parent
    )


@functools.lru_cache(maxsize=8)
def _selected_rows(path: Path, fingerprint: str) -> np.ndarray:
    """The rows of a selection; kept, as every batch asks for them. The fingerprint keeps a replaced one apart."""
    rows = read_columns(path / "rows")["row"]
    rows.flags.writeable = False
    return rows


def _open_images(path: Path) -> zarr.Array:
    try:
        return zarr.open_array(path / "images", mode="r", zarr_format=3)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path / 'images'}: cannot be opened ({error}); restore the store from a copy") from error


def _by_chunk(rows: np.ndarray, chunk_images: int) -> Iterator[np.ndarray]:
    """Positions in `rows` that lie in the same chunk, chunk after chunk.

    Indexing a sharded array with a list of rows would decode a chunk again for every row.
    """
    order = np.argsort(rows, kind="stable")
    chunks = rows[order] // chunk_images
    yield from np.split(order, np.flatnonzero(np.diff(chunks)) + 1) if len(rows) else ()


def _as_slice(indices: np.ndarray) -> slice | np.ndarray:
    """A slice where the indices run up by ones, which spares a copy."""
    start, stop = int(indices[0]), int(indices[-1]) + 1
    return slice(start, stop) if np.array_equal(indices, np.arange(start, stop)) else indices
