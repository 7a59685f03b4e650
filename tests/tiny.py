"""Data sets and runs that take seconds, for the tests of jobs."""

import hashlib
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcryo.data.items import Found, Item
from dcryo.data.store import Store
from dcryo.errors import InputError, RunError
from dcryo.jobs import dataset
from dcryo.jobs.exchange import ImportOptions, import_particles
from dcryo.jobs.simulate import PHANTOM, SimulateOptions, SimulateResult, simulate
from dcryo.kernels import fft, slices
from dcryo.kernels.posterior import shift_phases
from dcryo.kernels.shells import half_plane, unpack

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


def projections(store: Store, volume: np.ndarray) -> np.ndarray:
    """Images (n, D, D) of a map at the poses of a store, times their CTFs."""
    data = dataset.load_dataset(store.path, 0)
    ones = np.ones(store.n)
    shard = dataset.shard_rows(data, np.arange(store.n), "all", ones, ones, data.rotation, data.origin_px, ones > 0)
    pixels = half_plane((len(volume) - 1) // 2)
    packed = slices.extract(slices.prepare(volume, pixels.shell_max), data.rotation, pixels, len(volume))
    packed *= shift_phases(pixels, -data.origin_px, len(volume), len(pixels.kx))
    packed *= shard.transfer(slice(None))[:, : len(pixels.kx)]
    return fft.irfft2(unpack(pixels, packed, len(volume)), len(volume))


def digests(folder: Path, names: Sequence[str] = REFINED) -> dict[str, str]:
    """Digest of the bytes of each file."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def started(target: Callable[..., None], *arguments: Any) -> multiprocessing.Process:
    """A process of its own, forked off one that has imported dcryo and done nothing: it starts at once.

    Its target has to be a function of a module that is found by name, such as those here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny", "dcryo.cli", "dcryo.jobs.refine"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def command(words: Sequence[str], constants: dict[str, int], dies_at: tuple[str, str, int] | None = None) -> None:
    """Run a command line and end the process with its status.

    constants: "module:name" -> value to set before; dies_at: "module" or "module:class", function and which call of it
    the process is killed at, by the signal that cannot be caught.
    """
    from dcryo import cli

    for name, value in constants.items():
        module, _, constant = name.partition(":")
        setattr(importlib.import_module(module), constant, value)
    if dies_at is not None:
        _die_at(*dies_at)
    os._exit(cli.main(list(words)))


def _die_at(owner: str, name: str, call: int) -> None:
    module, _, inner = owner.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, inner) if inner else holder
    before, calls = getattr(holder, name), []

    def dying(*given: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*given, **named)

    setattr(holder, name, dying)


def measured(item: Item, unit: str) -> Found:
    """What a test does with a file: the length of its text."""
    text = item.source.read_text()
    if text == "refused":
        raise InputError(f"{item.source}: refused")
    if text == "full":
        raise RunError("the disk is full")
    return Found(
        {"length": len(text), "unit": unit},
        flag="empty" if not text else "",
    )
