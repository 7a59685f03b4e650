"""What a result was made from and with: digests of inputs, versions of programs, the machine."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

from dcryo import __version__
from dcryo.errors import InputError

WHOLE_BYTES = 64 << 20
"""Files up to this size are digested whole."""
SAMPLE_BYTES = 1 << 20
SAMPLES = 32

PACKAGES = ("numpy", "scipy", "numba", "pyfftw", "dask", "distributed", "zarr", "gemmi")


def digest(path: str | Path) -> dict[str, str | int]:
    """Identify an input by its content, never by its dates.

    Returns a row ``{"path", "bytes", "digest", "digest_of"}``. ``digest_of`` says what was digested: a file
    up to 64 MiB whole; of a larger one its size and 32 evenly spaced blocks of 1 MiB (the first and the last
    among them); of a store the fingerprint that it keeps; of a run directory its record; of any other
    directory the names and sizes of its files.

    Raises InputError if the path does not exist or cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found, size, value = _digest_directory(path)
        else:
            found, size, value = _digest_file(path)
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); name a file or directory that exists"
        raise InputError(message) from error
    return {"path": str(path), "bytes": size, "digest": value, "digest_of": found}


def _digest_file(path: Path) -> tuple[str, int, str]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_BYTES:
            return "whole file", size, "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        sha = hashlib.sha256(str(size).encode())
        for sample in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            sha.update(file.read(SAMPLE_BYTES))
    found = f"size and {SAMPLES} evenly spaced blocks of {SAMPLE_BYTES >> 20} MiB, first and last among them"
    return found, size, "sha256-sampled:" + sha.hexdigest()


def _digest_directory(path: Path) -> tuple[str, int, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    fingerprint = _store_fingerprint(path / "zarr.json")
    if fingerprint is not None:
        return "fingerprint kept by the store", size, f"fingerprint:{fingerprint}"
    if (path / "run.json").is_file():
        return "run.json of the run directory", size, _digest_file(path / "run.json")[2]
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
    return "names and sizes of the files in the directory", size, "sha256-listing:" + sha.hexdigest()


def _store_fingerprint(group: Path) -> str | None:
    """The attribute ``fingerprint`` of a Zarr v3 group's metadata file; None where there is none."""
    try:
        attributes = json.loads(group.read_text())["attributes"]
        return str(attributes["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def provenance() -> dict[str, object]:
    """The command line (argv), the versions of dcryo, Python and the packages in use, and the machine."""
    return {
        "command": command_line(),
        "versions": dict(_versions()),
        "platform": {"system": platform.platform(), "cpu": _cpu_model(), "cores": os.cpu_count()},
    }


def command_line() -> list[str]:
    """argv with the program's own name in place of the path that it was started from."""
    program, *arguments = sys.argv or [""]
    stem = Path(program)
    name = "dcryo" if stem.name in ("dcryo", "__main__.py") and "dcryo" in str(stem) else program
    return [name, *arguments]


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("dcryo", __version__), ("python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    return tuple(found)


@functools.cache
def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
