"""Checkpoints that are either whole or absent, whenever the process is killed.

A checkpoint is a directory ``NNNNNN`` of one ``.npy`` file per array and, written last, ``meta.json``, which
lists the arrays with their sizes and checksums. It is made under a temporary name, flushed to the disk and
renamed; the last two are kept, so that a damaged one leaves the one before it.
"""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dcryo.data.atomic import replacing
from dcryo.errors import RunError

KEPT = 2
MARKER = "meta.json"


def save(folder: Path, iteration: int, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Commit a checkpoint of an iteration and remove all but the last two.

    arrays: name -> array of any shape and any dtype but object. meta: plain JSON values.
    Raises RunError if it cannot be written (a full disk); what was there before is kept.
    """
    final = folder / f"{iteration:06d}"
    temporary = folder / f".{iteration:06d}.tmp"
    try:
        folder.mkdir(exist_ok=True)
        discard_unfinished(folder)
        temporary.mkdir()
        listing = {name: _write_array(temporary / f"{name}.npy", array) for name, array in arrays.items()}
        content = {"iteration": iteration, "meta": meta, "arrays": listing}
        with replacing(temporary / MARKER) as file:
            file.write(json.dumps(content, indent=1).encode())
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(folder)
    except OSError as error:
        raise RunError(
            f"{final}: the checkpoint cannot be written ({error.strerror}); free space or mend "
            "permissions, then continue with --resume"
        ) from error
    for old in _finished(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_latest(folder: Path) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
    """Iteration, arrays and meta of the newest checkpoint that is whole; None if there is none."""
    for path in reversed(_finished(folder)):
        try:
            content = json.loads((path / MARKER).read_text())
            arrays = {name: _read_array(path / f"{name}.npy", row) for name, row in content["arrays"].items()}
            return int(content["iteration"]), arrays, content["meta"]
        except (OSError, ValueError, KeyError, EOFError):
            continue
    return None


def discard_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush the entries of a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finished(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def _write_array(path: Path, array: np.ndarray) -> dict[str, int]:
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "crc32": _checksum(path)}


def _read_array(path: Path, row: dict[str, int]) -> np.ndarray:
    if path.stat().st_size != row["bytes"] or _checksum(path) != row["crc32"]:
        raise ValueError(f"{path}: damaged")
    return np.load(path, allow_pickle=False)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
