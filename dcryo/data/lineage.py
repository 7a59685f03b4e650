"""The runs that a run came from, by the inputs and the options that their records name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcryo.data.run import RECORD, Run
from dcryo.errors import InputError


@dataclass(frozen=True)
class Step:
    """path: the directory of a run; record: the content of its run.json."""

    path: Path
    record: Mapping[str, Any]


def lineage(run: Path) -> list[Step]:
    """The run and all that led to it and is still there, the first to begin first.

    A name in a record counts as it stands and, if nothing is there, from the directory that the run's own is in. What
    was moved or removed ends its branch.
    """
    found: dict[Path, Step] = {}
    left = [run]
    while left:
        path = left.pop()
        if path.resolve() in found:
            continue
        try:
            record = Run.open(path).record
        except InputError:
            continue
        found[path.resolve()] = Step(path, record)
        left += [home for name in _names(record) if (home := _home(name, path)) is not None]
    return sorted(found.values(), key=lambda step: (str(step.record.get("started_utc")), str(step.path)))


def _names(record: Mapping[str, Any]) -> Iterator[str]:
    """Paths of a record's inputs and what may be paths in its options."""
    yield from (str(row["path"]) for row in record["inputs"])
    for name, value in record["options"].items():
        if name != "out":
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))


def _home(name: str, run: Path) -> Path | None:
    """The run directory that a path is, or lies in."""
    for place in (Path(name), run.parent / name):
        for candidate in (place, place.parent):
            if name and (candidate / RECORD).is_file():
                return candidate
    return None
