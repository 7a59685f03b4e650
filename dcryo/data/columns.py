"""Named columns in a Zarr v3 group: how the store keeps everything that is not an image.

Only types of the Zarr v3 core specification are used, and codecs that every reader has, so that others find the same
values. Numbers are arrays with a checksum per chunk. Text, for which the core has no type, is one array of bytes: the
entries in UTF-8, each ended by a NUL, compressed (paths repeat). Not by gzip: its header holds the time.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from dcryo.errors import InputError

CHUNK_BYTES = 8 << 20


def write_columns(path: Path, columns: Mapping[str, np.ndarray]) -> str:
    """Write columns (numbers of any shape, or text of dtype U) as a group at `path`, replacing what is there.

    Returns a digest of names, types and values. Raises InputError for text that holds a NUL character.
    """
    group = zarr.create_group(path, overwrite=True, zarr_format=3)
    listed = []
    digest = hashlib.sha256()
    for number, (name, values) in enumerate(columns.items()):
        values = np.asarray(values)
        # Labels of other programs may hold slashes, dots or anything else that is no name for a Zarr array.
        array = name if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,99}", name) else f"_{number}"
        listed.append({"name": name, "array": array, "dtype": values.dtype.str})
        if values.dtype.kind == "U":
            plain = _encode_text(name, values)
            compressors = [ZstdCodec(level=1), Crc32cCodec()]
        else:
            plain = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
            compressors = [Crc32cCodec()]
        row_bytes = max(1, plain.dtype.itemsize * int(np.prod(plain.shape[1:])))
        created = group.create_array(
            array,
            shape=plain.shape,
            chunks=(max(1, min(len(plain), CHUNK_BYTES // row_bytes)), *plain.shape[1:]),
            dtype=plain.dtype,
            compressors=compressors,
            # A chunk that equals the fill value would not be written, and -0.0 equals 0.0.
            config={"write_empty_chunks": True},
        )
        created[...] = plain
        described = f"{name}\0{values.dtype.kind}{values.shape}{plain.dtype.str}\0"
        digest.update(described.encode(errors="surrogatepass"))
        digest.update(plain.data)
    # An attribute set after the columns: a group without it was not finished.
    group.attrs["columns"] = listed
    return digest.hexdigest()


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns at `path`, in the order and with the types they were written with.

    Raises InputError where they are missing, damaged or not finished.
    """
    try:
        group = zarr.open_group(path, mode="r", zarr_format=3)
        listed = group.attrs["columns"]
        if not isinstance(listed, list):
            raise TypeError(f"attribute columns is {listed!r}")
        return {entry["name"]: _read_column(group, entry["array"], entry["dtype"]) for entry in listed}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: the store's columns cannot be read ({error}); import the particles again, or restore the store "
            "from a copy"
        ) from error


def _read_column(group: zarr.Group, array: str, dtype: str) -> np.ndarray:
    plain = np.asarray(group[array][...])  # type: ignore[index]
    if not dtype.startswith(("<U", ">U")):
        return plain.astype(dtype, copy=False)
    entries = plain.tobytes().decode(errors="surrogatepass").split("\0")
    return np.array(entries[:-1], dtype=dtype)


def _encode_text(name: str, values: np.ndarray) -> np.ndarray:
    if values.ndim != 1:
        raise ValueError(f"text column {name} has {values.ndim} axes, expected 1")
    entries = values.tolist()
    joined = "".join([entry + "\0" for entry in entries])
    if joined.count("\0") != len(entries):
        row = next(row for row, entry in enumerate(entries) if "\0" in entry)
        raise InputError(f"column {name}, row {row}: text holds a NUL character ({entries[row]!r}); remove it")
    return np.frombuffer(joined.encode(errors="surrogatepass"), dtype=np.uint8)


def read_attributes(path: Path) -> dict[str, Any]:
    """Attributes of the Zarr v3 group at `path`; empty where there is no such group."""
    try:
        found = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
        attributes = found["attributes"] if found["node_type"] == "group" else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return attributes if isinstance(attributes, dict) else {}
