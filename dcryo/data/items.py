"""What is committed of each movie or micrograph of a run, so that a run that goes on does only what is missing.

``items/NAME.json`` holds what was found, plain JSON, and with it the fingerprint of the source it was found of;
``items/NAME.npz`` small arrays for the report. The JSON is written last: where it is, the item is done.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dcryo.data.atomic import replacing

ITEMS = "items"


@dataclass(frozen=True)
class Item:
    """A movie or micrograph to work on. name: of its files in the run, unique in it; source: the file."""

    name: str
    source: Path

    def fingerprint(self) -> str:
        """Tells a source that was replaced: its size and time of change. Empty where it is not there."""
        try:
            status = self.source.stat()
        except OSError:
            return ""
        return f"{status.st_size}-{status.st_mtime_ns}"


@dataclass(frozen=True)
class Found:
    """What was found of an item.

    values: plain JSON; arrays: small, for the report; flag: why the item should not be used, empty where it may.
    """

    values: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    flag: str = ""


def commit(run: Path, item: Item, found: Found, fingerprint: str) -> None:
    """Write down what was found. Killed at any moment, it is there whole or not at all."""
    folder = run / ITEMS
    folder.mkdir(exist_ok=True)
    if found.arrays:
        packed, arrays = io.BytesIO(), dict[str, Any](found.arrays)
        np.savez_compressed(packed, **arrays)
        with replacing(folder / f"{item.name}.npz") as file:
            file.write(packed.getvalue())
    record = {"source": str(item.source), "fingerprint": fingerprint, "flag": found.flag, "values": dict(found.values)}
    with replacing(folder / f"{item.name}.json") as file:
        file.write(json.dumps(record, allow_nan=False).encode())


def committed(run: Path, item: Item) -> Found | None:
    """What was found of an item, without its arrays; None where nothing is or its source has changed since."""
    try:
        record = json.loads((run / ITEMS / f"{item.name}.json").read_text())
        same = record["fingerprint"] == item.fingerprint()
        return Found(record["values"], flag=record["flag"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def arrays_of(run: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of an item; none where it has none that can be read."""
    try:
        with np.load(run / ITEMS / f"{name}.npz") as packed:
            return {key: packed[key] for key in packed.files}
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}
