"""The run directory: what was asked, from which inputs, with which programs, how it went, where to go on.

``run.json`` is rewritten atomically at every step, so a reader sees a whole record at any moment, and a
record that says "running" without a living process is a run that was killed and can be resumed.
"""

import datetime
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np

from dcryo.data import atomic, checkpoints
from dcryo.data.items import ITEMS
from dcryo.data.provenance import digest, provenance
from dcryo.errors import InputError

RECORD = "run.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
PARTS = "parts"
"""Folder of results of tasks that are put together when all are there."""
FITTED_MODEL = "model_fitted.cif"
SERIES = "series"

NEUTRAL_OPTIONS = frozenset({"out", "resume", "overwrite", "cluster", "workers", "watch"})
"""Options that say where and how a job runs; the result is the same whatever they are."""

PRODUCTS = (".mrc", ".mrcs", ".star", ".box", ".cs", ".csv", ".xml", ".html", ".zarr")
"""Endings of what jobs write; overwriting a run removes these, those below and the record, nothing else."""
NAMED_PRODUCTS = (FITTED_MODEL, SERIES, "emdb.md", "emdb.json", "image.png", "SHA256SUMS")
"""What jobs write whose endings users' own files have too."""


class Run:
    """One run directory. Made by `Run.start` (to write) or `Run.open` (to read).

    path: the directory. record: the content of run.json, plain JSON values; change it through the methods.
    As a context manager it marks the run as failed when an exception leaves the block.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: TextIO | None = None) -> None:
        self.path = path
        self.record = record
        self._lock = lock
        self._elapsed_before_s = float(record.get("elapsed_s") or 0.0)
        self._began = time.monotonic()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read the record of a run directory. Raises InputError if there is none or it is not readable."""
        path = Path(path)
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: not a run directory (it has no {RECORD})") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path / RECORD}: cannot be read as a run record ({error})") from error
        if not isinstance(record, dict) or not {"job", "options", "inputs", "status"} <= record.keys():
            raise InputError(f"{path / RECORD}: not a run record (job, options, inputs or status is missing)")
        return cls(path, record)

    def inputs(self) -> list[Path]:
        """Where the inputs are: as they were named or, where nothing is there, by that name from the directory in which
        the run was started, if the run is where it was."""
        found = []
        for row in self.record["inputs"]:
            path, out = Path(row["path"]), Path(self.record["options"].get("out") or ".")
            here = self.path.absolute()
            if not path.exists() and not path.is_absolute() and here.parts[-len(out.parts) :] == out.parts:
                path = here.parents[len(out.parts) - 1] / path
            found.append(path)
        return found

    @classmethod
    def start(
        cls,
        out: str | Path,
        job: str,
        options: Mapping[str, Any],
        inputs: Sequence[str | Path] = (),
        seed: int | None = None,
        resume: bool = False,
        overwrite: bool = False,
        growing: bool = False,
    ) -> Self:
        """Begin a run in a directory, or go on with the run that it holds.

        options: name -> value as the job got them (paths, tuples and numpy scalars are made plain).
        inputs: files, stores or run directories that the result depends on; they are digested here.
        With ``resume`` a directory without a run begins one, and a run goes on if its job, its options (but
        for those in NEUTRAL_OPTIONS) and the digests of its inputs are the same; inputs may have moved. If
        the run is done already, `finished` is true and nothing is changed, unless it is `growing`, one that
        may find more to do than the last time.

        Raises InputError, before anything is written, if an input is missing, the directory holds another
        run, what is resumed differs (the message names what), another process is writing there, or both
        flags are given.
        """
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other; give one of them")
        path = Path(out)
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file; --out wants a directory that is new or empty")
        rows = [digest(item) for item in inputs]
        fresh = {
            "job": job, "options": plain(options), "inputs": rows, "seed": seed, "status": "running",
            **provenance(), "started_utc": _now(), "finished_utc": None, "elapsed_s": 0.0, "resumed": [],
            "iterations": [], "quarantined": [], "result": {}, "error": None,
        }  # fmt: skip
        holds_run = (path / RECORD).is_file()
        if resume and holds_run:
            return cls._resume(path, fresh, growing)
        if not overwrite:
            _refuse_used(path, holds_run)
        _refuse_own_inputs(path, rows)
        lock = _lock(path)
        atomic.discard_unfinished(path)
        _clear(path)
        run = cls(path, fresh, lock)
        run._write()
        return run

    @classmethod
    def _resume(cls, path: Path, fresh: dict[str, Any], growing: bool) -> Self:
        run = cls.open(path)
        differences = list(_differences(run.record, fresh))
        if differences:
            raise InputError(
                f"{path}: cannot be resumed, this is not the same run: "
                + "; ".join(differences)
                + ". Repeat the first command (see run.json), or name another --out"
            )
        if run.finished and not growing:
            return run
        run._lock = _lock(path)
        checkpoints.discard_unfinished(path / CHECKPOINTS)
        atomic.discard_unfinished(path)
        run.record["resumed"].append({"utc": _now(), **{key: fresh[key] for key in provenance()}})
        run.record.update(status="running", error=None, finished_utc=None)
        run._write()
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self.record["status"] == "running":
            self.fail(error)

    @property
    def finished(self) -> bool:
        """Whether the run is done."""
        return bool(self.record["status"] == "done")

    def iteration(self, figures: Mapping[str, Any]) -> None:
        """Record an iteration's figures; "iteration" must be among them.

        Rows of this iteration and later ones, left by a process that was killed, are dropped.
        """
        row = plain(figures)
        earlier = [old for old in self.record["iterations"] if old["iteration"] < row["iteration"]]
        self.record["iterations"] = [*earlier, row]
        self._write()

    def quarantine(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add particles that were left out: mappings with "row", "image", "reason". Repeats are dropped."""
        known = {(row["row"], row["image"]): row for row in self.record["quarantined"]}
        for row in map(plain, rows):
            known.setdefault((row["row"], row["image"]), row)
        self.record["quarantined"] = sorted(known.values(), key=lambda row: row["row"])
        self._write()

    def flag(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record the micrographs that are set aside so far, as `quarantine` does, in place of those before."""
        self.record["quarantined"] = []
        self.quarantine(rows)

    def done(self, result: Mapping[str, Any]) -> None:
        """Mark the run as done with its result figures (plain values: resolution_A, particles, ...)."""
        self._finish(status="done", result=plain(result), error=None)

    def fail(self, error: BaseException | str) -> None:
        """Mark the run as failed with the reason. It can be resumed."""
        if isinstance(error, KeyboardInterrupt):
            error = "interrupted"
        reason = error if isinstance(error, str) else str(error) or type(error).__name__
        self._finish(status="failed", error=reason)

    def save_checkpoint(self, iteration: int, arrays: dict[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Commit arrays (any dtype but object) and plain values of an iteration; the last two are kept.

        Killed at any moment, the directory holds this checkpoint whole or not at all. Raises RunError if the
        disk refuses.
        """
        checkpoints.save(self.path / CHECKPOINTS, iteration, arrays, plain(meta))

    def latest_checkpoint(self) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
        """Iteration, arrays (bit for bit as saved) and meta of the newest whole checkpoint, or None."""
        return checkpoints.load_latest(self.path / CHECKPOINTS)

    def _finish(self, **changes: Any) -> None:
        self.record.update(finished_utc=_now(), **changes)
        self._write()
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _write(self) -> None:
        self.record["elapsed_s"] = round(self._elapsed_before_s + time.monotonic() - self._began, 3)
        text = json.dumps(self.record, indent=1, ensure_ascii=False, allow_nan=False)
        with atomic.replacing(self.path / RECORD) as file:
            file.write(f"{text}\n".encode())


def plain(value: Any) -> Any:
    """Make a value plain JSON: paths are strings, arrays and tuples lists, not-finite numbers null."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterable[str]:
    """What keeps a new command from going on with an old run, in words."""
    if old["job"] != new["job"]:
        yield f"job {old['job']} there, {new['job']} now"
    before, now = _comparable_options(old), _comparable_options(new)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield f"option {name} is {before.get(name)!r} there, {now.get(name)!r} now"
    if old["seed"] != new["seed"]:
        yield f"seed {old['seed']} there, {new['seed']} now"
    if len(old["inputs"]) != len(new["inputs"]):
        yield f"{len(old['inputs'])} inputs there, {len(new['inputs'])} now"
    for row, other in zip(old["inputs"], new["inputs"], strict=False):
        if row["digest"] != other["digest"]:
            yield f"input {other['path']} is not what {row['path']} was (its digest differs)"


def _comparable_options(record: dict[str, Any]) -> dict[str, Any]:
    """Options that decide the result; paths of inputs (compared by digest) are replaced by their number."""
    numbers = {row["path"]: f"input {number}" for number, row in enumerate(record["inputs"])}

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(item) for item in value]
        return numbers.get(value, value) if isinstance(value, str) else value

    decisive = record["options"].keys() - NEUTRAL_OPTIONS - {"seed"}
    return {name: named(record["options"][name]) for name in decisive}


def _own_files(path: Path) -> list[Path]:
    """What a run has written into its directory (all of it, if the directory is a store)."""
    if not path.is_dir():
        return []
    is_store = path.suffix == ".zarr"

    def own(item: Path) -> bool:
        product = is_store or ((item.is_file() or item.suffix == ".zarr") and item.suffix in PRODUCTS)
        passing = item.name == LOCK or item.suffix == ".tmp"
        return not passing and (product or item.name in (RECORD, CHECKPOINTS, ITEMS, PARTS, *NAMED_PRODUCTS))

    return [item for item in sorted(path.iterdir()) if own(item)]


def _refuse_used(path: Path, holds_run: bool) -> None:
    if holds_run:
        raise InputError(
            f"{path}: holds a run already; continue it with --resume, replace it with --overwrite, or name "
            "another --out"
        )
    used = _own_files(path)
    if used:
        raise InputError(
            f"{path}: holds {used[0].name}, which is not of a run that can be continued; name a new or empty "
            "directory for --out, or replace what is there with --overwrite"
        )


def _refuse_own_inputs(path: Path, rows: list[dict[str, Any]]) -> None:
    """Starting a run clears its directory: an input must not be in what is cleared."""
    own = [item.resolve() for item in _own_files(path)]
    for row in rows:
        source = Path(row["path"]).resolve()
        if source == path.resolve() or any(source == item or item in source.parents for item in own):
            raise InputError(f"{row['path']}: is an input and lies in {path}, which would be overwritten; change --out")


def _clear(path: Path) -> None:
    # The record goes first: whatever happens after it, what is left is not taken for a run.
    (path / RECORD).unlink(missing_ok=True)
    for item in _own_files(path):
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def _lock(path: Path) -> TextIO:
    """Keep other processes from writing to the same run; the system lets go of it when this process ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK).open("a+")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another --out") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise InputError(
            f"{path}: another process ({holder}) is writing to this run; wait for it or stop it first"
        ) from None
    except OSError:
        pass  # a file system without locks: then the user is trusted
    file.truncate(0)
    file.write(f"host {os.uname().nodename}, process {os.getpid()}\n")
    file.flush()
    return file
