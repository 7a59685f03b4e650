"""What the jobs from movies to particles share: one task per movie or micrograph, each committed when it is done.

A run that goes on (``--resume``) does what is not committed, what changed since, and what is new. With ``--watch`` it
waits for more, until a file named ``stop`` is put into its directory or the process is told to end.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dcryo import graph
from dcryo.cluster import Cluster
from dcryo.data import micrographs
from dcryo.data.items import Found, Item, commit, committed
from dcryo.data.particles import Micrographs
from dcryo.data.run import Run
from dcryo.errors import InputError, RunError
from dcryo.jobs.options import JobOptions, Progress, argument

STOP = "stop"
_POLL_S = 2.0
_SETTLED_S = 5.0
"""A file that has not changed for so long is taken to be whole."""
_TOLD_S = 5.0
"""Tables and records of a run are rewritten at most so often."""


class WatchOptions(JobOptions):
    """Whether a job goes on waiting for more of its input."""

    watch: bool = Field(
        False, description="wait for more as it arrives, until a file named stop is put into the output directory"
    )


class MicrographOptions(JobOptions):
    """The micrographs that a job takes."""

    micrographs: tuple[Path, ...] = argument("STAR file of micrographs; or image files, with what is known of them")
    pixel_size_A: float | None = Field(None, gt=0, description="of image files (default: what their header says)")
    voltage_kV: float | None = Field(None, gt=0, description="of image files")
    spherical_aberration_mm: float | None = Field(None, ge=0, description="of image files")
    amplitude_contrast: float | None = Field(None, ge=0, lt=1, description="of image files (default: 0.1)")


def load_micrographs(options: MicrographOptions) -> tuple[Micrographs, list[Item]]:
    """The table of micrographs, and an item for each row, in its order, with its image's path.

    Read anew at every call, since another job may be adding to it. Raises InputError where a STAR file and image files
    are mixed, options are given for a STAR file, which has its own, or what image files need is missing.
    """
    paths = options.micrographs
    if len(paths) == 1 and paths[0].suffix == ".star":
        _refuse_given(options)
        table = micrographs.read_micrographs(paths[0])
        sources = [micrographs.find(name, paths[0]) for name in table["path"].tolist()]
    else:
        table = _table_of_images(options)
        sources = list(paths)
    return table, named(sources)


def await_table(options: MicrographOptions, out: Path, progress: Progress) -> None:
    """Wait until the STAR file of micrographs is there, which another job that watches has yet to write.

    InputError where a file named ``stop`` comes first.
    """
    path = options.micrographs[0]
    if path.suffix != ".star" or path.exists():
        return
    progress(f"waiting for {path}")
    while not path.exists():
        if (out / STOP).exists():
            (out / STOP).unlink()
            raise InputError(f"{path}: was not there before {out / STOP}; nothing was done")
        time.sleep(_POLL_S)


def _refuse_given(options: MicrographOptions) -> None:
    for name in MicrographOptions.model_fields:
        if name != "micrographs" and getattr(options, name) is not None:
            raise InputError(f"{options.micrographs[0]}: has its own {name}; correct it there, or give image files")


def _table_of_images(options: MicrographOptions) -> Micrographs:
    paths = options.micrographs
    wrong = [path for path in paths if path.suffix == ".star" or not path.is_file()]
    if wrong:
        raise InputError(f"{wrong[0]}: not an image file; expected one STAR file of micrographs, or image files")
    optics = {
        "micrograph_pixel_size_A": options.pixel_size_A or micrographs.pixel_size_A(paths[0]),
        "voltage_kV": options.voltage_kV,
        "spherical_aberration_mm": options.spherical_aberration_mm,
        "amplitude_contrast": 0.1 if options.amplitude_contrast is None else options.amplitude_contrast,
    }
    if not optics["micrograph_pixel_size_A"]:
        raise InputError(f"{paths[0]}: the header says no pixel size; give --pixel-size")
    return Micrographs(
        {"path": np.array([str(path) for path in paths]), "optics_row": np.zeros(len(paths))},
        {"group": np.ones(1)} | {name: np.array([value]) for name, value in optics.items() if value is not None},
    )


def named(sources: Iterable[Path]) -> list[Item]:
    """Items named by their files, without directories and endings. InputError where two have the same name."""
    items: dict[str, Item] = {}
    for source in sources:
        name = source.name.removesuffix(".gz").removesuffix(".bz2").rpartition(".")[0] or source.name
        if name in items and items[name].source != source:
            raise InputError(
                f"{source} and {items[name].source} have the same name, which their results would share; rename one, "
                "or give them to two runs"
            )
        items[name] = Item(name, source)
    return list(items.values())


def work_through(
    run: Run,
    find: Callable[[], Sequence[Item]],
    work: Callable[..., Found],
    arguments: Sequence[Any],
    cluster: Cluster,
    watch: bool,
    told: Callable[[dict[str, Found]], None],
    progress: Progress,
) -> dict[str, Found]:
    """What was found of every item, by name: committed before, or by `work(item, *arguments)` now.

    find: all the items there are by now; with `watch` it is asked again and again. An item that `work` refuses with an
    exception is flagged with its message, and the rest goes on; but for RunError, such as a full disk, and MemoryError,
    which end the run. told: gets what was found so far, now and then and at the end, to write tables of it.
    """
    everything = {item.name: found for item in find() if (found := committed(run.path, item))}
    if everything:
        progress(f"{len(everything)} were done before")
    last = time.monotonic()
    while True:
        stop = not watch or (run.path / STOP).exists()
        there = [item for item in find() if item.name not in everything]
        whole = [item for item in there if not watch or _whole(item.source)]
        for item, found in graph.each(_committing, whole, (run.path, work, *arguments), cluster):
            everything[item.name] = found
            progress(f"{len(everything)} done, {item.name}: {found.flag or 'good'}", end="\n" if found.flag else "\r")
            if time.monotonic() - last > _TOLD_S:
                told(everything)
                last = time.monotonic()
        if whole or stop:
            told(everything)
        if stop and len(whole) == len(there):
            (run.path / STOP).unlink(missing_ok=True)
            return everything
        time.sleep(_POLL_S)


def _committing(item: Item, run: Path, work: Callable[..., Found], *arguments: Any) -> Found:
    fingerprint = item.fingerprint()
    try:
        found = work(item, *arguments)
    except (RunError, MemoryError):
        raise
    except InputError as error:
        found = Found({}, flag=str(error))
    except Exception as error:  # one movie of thousands that a library stumbles over must not end the run
        found = Found({}, flag=f"{type(error).__name__}: {error}")
    commit(run, item, found, fingerprint)
    return Found(found.values, flag=found.flag)


def _whole(path: Path) -> bool:
    """Whether a file has not been written to for a while; one that is not there will not change, and is refused."""
    try:
        return time.time() - path.stat().st_mtime > _SETTLED_S
    except OSError:
        return True


def flagged(found: Mapping[str, Found]) -> list[dict[str, Any]]:
    """Rows for `Run.flag`, by name of the item."""
    return [
        {"row": row, "image": name, "reason": found[name].flag}
        for row, name in enumerate(sorted(found), start=1)
        if found[name].flag
    ]
