"""Data sets and runs that take seconds, for the tests of jobs."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcryo.data.store import Store
from dcryo.jobs.exchange import ImportOptions, import_particles
from dcryo.jobs.simulate import PHANTOM, SimulateOptions, SimulateResult, simulate

BOX_PX, PIXEL_SIZE_A = 32, 6.0
WIDTH_A = BOX_PX * PIXEL_SIZE_A

MAPS = ("half1.mrc", "half2.mrc", "map.mrc")
REFINED = (*MAPS, "mask.mrc", "particles.star", "fsc.csv", "fsc.xml", "spectra.csv")


def quiet(line: str, /, *, end: str = "\n") -> None:
    pass


def simulated(out: Path, particles: int, **options: Any) -> SimulateResult:
    """Particles of a phantom, 32 px of 6 A, signal as strong as the noise where nothing else is said."""
    given = {"box_px": BOX_PX, "pixel_size_A": PIXEL_SIZE_A, "snr": 1.0, "seed": 3} | options
    return simulate(SimulateOptions(model=PHANTOM, out=out, particles=particles, **given), progress=quiet)


def imported(source: Path, out: Path, **options: Any) -> Store:
    return import_particles(ImportOptions(source=source, out=out, **options), progress=quiet).store


def digests(folder: Path, names: Sequence[str] = REFINED) -> dict[str, str]:
    """Digest of the bytes of each file."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
