"""Speed of dcryo's kernels on one core, beside two libraries of non-uniform transforms and the machine's own limits.

    python benchmarks/kernels.py [--box 64 128 256] [--seconds 1] [--output docs/benchmarks-kernels.md]

Particles are 190/256 of the box wide, in a box of 256 A. Times are of the processor, one thread, best of three. ducc0
and finufft, where they are installed, do the same slices to three digits.
"""

import argparse
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import measured
import numpy as np
from measured import table
from threadpoolctl import threadpool_limits

from dcryo.euler import matrix_from_rotvec
from dcryo.kernels import derivatives, gridding, modes, posterior, sampling, shells, slices
from dcryo.kernels.ctf import ctf
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.shells import HalfPlane, half_plane
from dcryo.steps import expectation
from dcryo.steps.search import plan_search

WIDTH_A, DIAMETER_A = 256.0, 190.0
SHIFT_RANGE_A = 0.1 * DIAMETER_A
INITIAL_LOWPASS_A = 40.0
SNR = 0.1
IMAGES = 8
SLICES = 64
# More for other libraries, whose work on the volume is to be told from that on slices.
OTHER_SLICES = 512
# How far from the truth climbs start.
OFF_DEG, OFF_PX = 2.0, 0.7
EPSILON = 1e-3

# Multiply-adds of a pixel: its place on the grid, and the polynomials of 12 weights (or slopes).
PLACE = 6
WEIGHTS = gridding.WEIGHTS.size * 3 - 12
SLOPES = gridding.SLOPES.size * 3 - 12
# The 64 grid points, summed along y (16 rows of 4 complex numbers), z (4 rows) and x (1).
READ = PLACE + WEIGHTS + 16 * 8 + 4 * 8 + 8
# The value and the derivatives: two sums along y, three along z, four along x; then 18 to turn the gradient, 8 for the
# phase and 63 for the sums over pixels.
LOOK = PLACE + WEIGHTS + SLOPES + 2 * 128 + 3 * 32 + 4 * 8 + 18 + 8 + 63
# Three numbers at 64 grid points; before that the weights of 16 rows and of 12 numbers along x.
WRITE = PLACE + WEIGHTS + 16 + 12 + 64 * 3
# The phase of the shift (two complex products, one real) and the fit.
BACK_PROJECT = READ + WRITE + 10 + 6
TAPS = gridding.TAPS**3
COMPLEX, TRIPLE = 8, 12


class Cost(NamedTuple):
    """What one unit of a kernel's work must do: multiply-adds; bytes that it must move if nothing is in the cache, each
    voxel once; and bytes of all the grid points that it reads or writes, again and again (0 where it does not)."""

    multiply_adds: float
    bytes: float
    tap_bytes: float


class Machine(NamedTuple):
    """Limits of a core: bytes/s of a copy, read and written, larger than the cache and within it; multiply-adds/s."""

    memory: float
    cache: float
    multiply_adds: float


class Problem(NamedTuple):
    """A simulated volume, its particles at all shells, and their true poses. data, weight: Y and W of `posterior`."""

    box_px: int
    pixels: HalfPlane
    volume: np.ndarray
    prepared: np.ndarray
    rotation: np.ndarray
    shift: np.ndarray
    data: np.ndarray
    weight: np.ndarray


def seconds(job: Callable[[], object], at_least: float) -> float:
    """Processor's seconds of a call, best of three rounds that take a while; the first call, which compiles, is not
    one of them."""
    job()
    began = time.process_time()
    job()
    calls = max(1, int(at_least / 3 / max(time.process_time() - began, 1e-6)))
    rounds = []
    for _ in range(3):
        began = time.process_time()
        for _ in range(calls):
            job()
        rounds.append((time.process_time() - began) / calls)
    return min(rounds)


def measure_machine(at_least: float) -> Machine:
    big = np.ones(64 << 20, dtype=np.float32)
    big_copy = np.empty_like(big)
    small, small_copy = big[: 32 << 10], np.empty(32 << 10, dtype=np.float32)
    matrix = np.ones((1024, 1024), dtype=np.float32)
    out = np.empty_like(matrix)
    return Machine(
        2 * big.nbytes / seconds(lambda: np.copyto(big_copy, big), at_least),
        2 * small.nbytes / seconds(lambda: np.copyto(small_copy, small), at_least),
        len(matrix) ** 3 / seconds(lambda: np.matmul(matrix, matrix, out=out), at_least),
    )


def make_problem(box_px: int) -> Problem:
    """White noise of variance 1 on images of blobs, with CTF and shifts, at SNR 0.1 over the box."""
    rng = np.random.Generator(np.random.Philox(key=box_px))
    pixel_A = WIDTH_A / box_px
    inside = rng.standard_normal((300, 3))
    inside *= 0.42 * DIAMETER_A * np.cbrt(rng.random((300, 1))) / np.linalg.norm(inside, axis=1, keepdims=True)
    volume = gaussian_density(inside, np.ones((300, 1)), np.full((300, 1), 60.0), box_px, pixel_A)
    pixels = half_plane(box_px // 2)
    count = len(pixels.kx)
    rotation, shift = random_rotations(SLICES, rng), rng.normal(0, 2, (SLICES, 2))
    defocus_A = rng.uniform(8000, 20000, SLICES)
    factor = ctf(pixels.kx, pixels.ky, box_px, pixel_A, defocus_A, defocus_A, 0.0, 300.0, 2.7, 0.1)
    found = slices.extract(slices.prepare(volume, pixels.shell_max), rotation, pixels, box_px) * factor
    variance = 2 * np.mean(np.sum(np.abs(found[:, 1:]) ** 2, axis=1)) / box_px**4
    grey = np.float32(np.sqrt(SNR / variance))
    volume = volume * grey
    prepared = slices.prepare(volume, pixels.shell_max)
    # Per real component of the transform of white noise.
    v = np.float32(box_px**2 / 2)
    noise = rng.standard_normal((SLICES, count, 2), dtype=np.float32).view(np.complex64)[..., 0] * np.sqrt(v)
    image = found * grey * posterior.shift_phases(pixels, -shift, box_px, count) + noise
    return Problem(box_px, pixels, volume, prepared, rotation, shift, image * factor / v, factor**2 / v)


def distinct_voxels(problem: Problem) -> float:
    """Voxels within the kernel's reach of a slice, per pixel, mean of a few slices."""
    total, few = 0, 4
    for turn in slices.scaled(problem.rotation[:few], problem.box_px):
        place = np.stack([problem.pixels.kx, problem.pixels.ky], axis=1) @ turn[:2]
        place[place[:, 0] < 0] *= -1
        lowest = np.floor(place).astype(np.int64)
        steps = np.arange(gridding.TAPS) - (gridding.TAPS // 2 - 1)
        keys = np.zeros((len(place), 1), dtype=np.int64)
        for axis in range(3):
            along = lowest[:, axis, None] + steps + (1 << 15)
            keys = (keys[:, :, None] * (1 << 16) + along[:, None, :]).reshape(len(place), -1)
        total += len(np.unique(keys))
    return total / few / len(problem.pixels.kx)


def looks_of(problem: Problem, start: modes.Components, shell: int, window: modes.Window) -> int:
    """How often poses are looked at in a climb: the climb itself, its loop interpreted so that it can be counted."""
    counted = mock.Mock(side_effect=modes.evaluate)
    with (
        mock.patch.object(modes, "_climb_all", modes._climb_all.py_func),
        mock.patch.object(modes, "_climb_one", modes._climb_one.py_func),
        mock.patch.object(modes, "evaluate", counted),
    ):
        climb(problem, start, shell, window)
    return counted.call_count


def climb(problem: Problem, start: modes.Components, shell: int, window: modes.Window) -> modes.Components:
    view = derivatives.view(problem.prepared, problem.pixels, shell, problem.box_px)
    return modes.climb(start, view, problem.data, problem.weight, window, False)


def kernel_rows(problem: Problem, at_least: float) -> list[tuple[str, str, float, Cost]]:
    """What is measured: kernel, unit of work, seconds of a unit, and what it must do."""
    box, pixels, count = problem.box_px, problem.pixels, len(problem.pixels.kx)
    ones = np.arange(SLICES + 1)
    voxels = distinct_voxels(problem)
    rows = []

    def add(kernel: str, unit: str, units: int, job: Callable[[], object], cost: Cost) -> None:
        rows.append((kernel, unit, seconds(job, at_least) / units, cost))
        print(f"box {box}: {kernel}: {1 / rows[-1][2]:.3g} {unit} per second", flush=True)

    add(
        "slices.extract", "slices", SLICES,
        lambda: slices.extract(problem.prepared, problem.rotation, pixels, box),
        Cost(count * READ, count * COMPLEX * (voxels + 1), count * COMPLEX * TAPS),
    )  # fmt: skip
    sums = np.zeros((*slices.volume_shape(pixels.shell_max, box), 3), dtype=np.float32)
    add(
        "slices.insert", "slices", SLICES,
        lambda: slices.insert(sums, problem.rotation, problem.data, problem.weight, pixels, box),
        Cost(count * WRITE, count * TRIPLE * (2 * voxels + 1), count * 2 * TRIPLE * TAPS),
    )  # fmt: skip
    points = modes.Points(ones, problem.rotation, problem.shift, np.full(SLICES, 0.01), np.ones(SLICES))
    add(
        "posterior.accumulate", "poses", SLICES,
        lambda: posterior.accumulate(
            sums, problem.prepared, points, problem.data, problem.weight, pixels, box, True
        ),
        Cost(
            count * BACK_PROJECT,
            count * (COMPLEX * voxels + TRIPLE * (2 * voxels + 1)),
            count * (COMPLEX + 2 * TRIPLE) * TAPS,
        ),
    )  # fmt: skip
    add_scores(problem, add)
    add_climb(problem, voxels, add)
    return rows


def add_scores(problem: Problem, add: Callable) -> None:
    """The grid that looks everywhere, in an iteration on the low-passed first reference."""
    box, pixel_A = problem.box_px, WIDTH_A / problem.box_px
    shell = shells.shell_at(INITIAL_LOWPASS_A / 2, box, pixel_A)
    search = plan_search(shell, box, pixel_A, DIAMETER_A, SHIFT_RANGE_A, 0, np.zeros((1, box // 2 + 1)), np.eye(3))
    grid = expectation.global_grid(expectation.single(problem.prepared), search, box)
    if grid is None:
        raise SystemExit("a first search was planned without a grid; the benchmark no longer fits dcryo")
    _, rotations, count = grid.slices.shape
    step = search.shift_step_px
    shifts = sampling.shift_grid(search.shift_range_px, step) * step
    shifted = problem.data[:IMAGES, None, :count] * posterior.shift_phases(problem.pixels, shifts, box, count)
    weight = np.ascontiguousarray(problem.weight[:IMAGES, :count])
    poses = IMAGES * len(shifts) * 2 * rotations
    # Two real products make the scores of two poses. Both are written and read, and the images' and slices' numbers.
    once = COMPLEX * (rotations + IMAGES * len(shifts)) * count
    moved = (4 * 4 * IMAGES * len(shifts) * rotations + once) / poses
    add(
        f"posterior.grid_scores (order {search.grid_order}, {2 * rotations} rotations, {len(shifts)} shifts, "
        f"{count} pixels)",
        "poses", poses, lambda: posterior.grid_scores(grid.slices, shifted, weight, False), Cost(count, moved, 0),
    )  # fmt: skip


def add_climb(problem: Problem, voxels: float, add: Callable) -> None:
    """A local refinement at two thirds of Nyquist."""
    rng = np.random.Generator(np.random.Philox(key=1))
    axis, angle = rng.standard_normal((SLICES, 3)), rng.uniform(0, 2 * np.pi, SLICES)
    turn = matrix_from_rotvec(np.deg2rad(OFF_DEG) * axis / np.linalg.norm(axis, axis=1, keepdims=True))
    away = OFF_PX * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    start = modes.started(turn @ problem.rotation, problem.shift + away, np.arange(SLICES + 1))
    shell = problem.box_px // 3
    window = modes.Window(np.deg2rad(4 * OFF_DEG), 4 * OFF_PX, np.zeros(6))
    # The window is about the start of rotations, and of shifts about no shift: so images are moved to the truth first.
    moved = posterior.shift_phases(problem.pixels, problem.shift, problem.box_px, len(problem.pixels.kx))
    problem = problem._replace(data=problem.data * moved)
    start = start._replace(shift=away)
    looks = looks_of(problem, start, shell, window) / SLICES
    count = looks * problem.pixels.within(shell)
    add(
        f"modes.climb (shell {shell}, {looks:.1f} looks each)", "refinements", SLICES,
        lambda: climb(problem, start, shell, window),
        Cost(count * LOOK, count * (COMPLEX * voxels + TRIPLE), count * COMPLEX * TAPS),
    )  # fmt: skip


def optional(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None


def other_rows(problem: Problem, libraries: dict[str, ModuleType], at_least: float) -> list[list[str]]:
    """Slices by other libraries: speed without what they do once per volume, that, and how far ours are from theirs."""
    ours = slices.extract(problem.prepared, problem.rotation, problem.pixels, problem.box_px)
    grid = np.ascontiguousarray(problem.volume, dtype=np.complex64)
    more = random_rotations(OTHER_SLICES - SLICES, np.random.Generator(np.random.Philox(key=2)))
    # Frequencies along z, y and x as angles.
    flat = np.stack([problem.pixels.kx, problem.pixels.ky], axis=1).astype(np.float32)
    turn = np.concatenate([problem.rotation, more])[:, :2, ::-1] * (2 * np.pi / problem.box_px)
    place = flat @ turn.astype(np.float32)
    values = np.tile(problem.data, (OTHER_SLICES // SLICES, 1))
    rows = []
    for name, library in libraries.items():
        read, write = {"ducc0": by_ducc, "finufft": by_finufft}[name](library, grid)
        found = read(place[:SLICES]).reshape(ours.shape)
        apart = np.linalg.norm(found - ours) / np.linalg.norm(ours)
        for what, job in (("read", lambda at, read=read: read(at)),
                          ("write", lambda at, write=write: write(at, values[: len(at)]))):  # fmt: skip
            # What is done once per volume is the same for few slices and for many.
            few, many = (seconds(lambda at=at, job=job: job(at), at_least) for at in (place[:2], place))
            rate = (OTHER_SLICES - 2) / (many - few) if many > 1.1 * few else None
            rows.append(
                [
                    problem.box_px, name, what, "too many to tell" if rate is None else f"{rate:.0f}", f"{few:.3f}",
                    f"{OTHER_SLICES / many:.0f}", f"{apart:.1e}" if what == "read" else "",
                ]
            )  # fmt: skip
            print(f"box {problem.box_px}: {name}, {what}: {rows[-1][3]} slices per second", flush=True)
    return rows


def by_ducc(ducc0: ModuleType, grid: np.ndarray) -> tuple[Callable, Callable]:
    def read(place: np.ndarray) -> np.ndarray:
        return ducc0.nufft.u2nu(grid=grid, coord=place.reshape(-1, 3), forward=True, epsilon=EPSILON, nthreads=1)

    def write(place: np.ndarray, values: np.ndarray) -> np.ndarray:
        return ducc0.nufft.nu2u(
            points=values.reshape(-1), coord=place.reshape(-1, 3), forward=False, epsilon=EPSILON, nthreads=1,
            out=np.empty_like(grid),
        )  # fmt: skip

    return read, write


def by_finufft(finufft: ModuleType, grid: np.ndarray) -> tuple[Callable, Callable]:
    def axes(place: np.ndarray) -> list[np.ndarray]:
        return [np.ascontiguousarray(place[..., axis].reshape(-1)) for axis in range(3)]

    def read(place: np.ndarray) -> np.ndarray:
        return finufft.nufft3d2(*axes(place), grid, eps=EPSILON, isign=-1, nthreads=1)

    def write(place: np.ndarray, values: np.ndarray) -> np.ndarray:
        return finufft.nufft3d1(*axes(place), values.reshape(-1), grid.shape, eps=EPSILON, isign=1, nthreads=1)

    return read, write


def floors_row(box_px: int, row: tuple[str, str, float, Cost], machine: Machine) -> list[str]:
    kernel, unit, taken, cost = row
    by_sums, by_memory = cost.multiply_adds / machine.multiply_adds, cost.bytes / machine.memory
    floor = max(by_sums, by_memory)
    rates = (machine.cache, machine.memory)
    taps = [f"{taken * rate / cost.tap_bytes:.2f}" if cost.tap_bytes else "" for rate in rates]
    return [
        box_px, kernel, unit, f"{1 / taken:.4g}", si(taken), si(by_sums), si(by_memory), f"{taken / floor:.1f}", *taps,
    ]  # fmt: skip


def si(value_s: float) -> str:
    """Seconds with a unit."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value_s * factor >= 1:
            return f"{value_s * factor:.3g} {unit}"
    return f"{value_s * 1e9:.3g} ns"


HEADER = (
    "box", "kernel", "unit", "per second", "time", "multiply-adds", "memory", "time / floor", "time / taps in cache",
    "time / taps from memory",
)  # fmt: skip
OTHER_HEADER = (
    "box", "library", "what", "slices per second", "call with two slices, s",
    f"slices per second, {OTHER_SLICES} in one call",
    "ours apart from theirs",
)  # fmt: skip


def report(machine: Machine, rows: list[list[str]], others: list[list[str]], absent: list[str]) -> str:
    parts = [
        "# Kernels on one core\n",
        f"Written by `benchmarks/kernels.py` on {measured.described([measured.machine()])}; one thread.\n",
        f"This core copies {machine.memory / 1e9:.1f} GB/s in memory and {machine.cache / 1e9:.1f} GB/s in cache (read "
        f"and written) and does {machine.multiply_adds / 1e9:.1f} 10^9 multiply-adds a second in a product of float32 "
        "matrices.\n",
        "`multiply-adds` and `memory` are what a unit of work takes at least at these rates. The multiply-adds are "
        "counted: 64 grid points of a complex number (or three numbers) to a pixel, summed along one axis after the "
        "other, and their weights. Memory is every voxel that a slice comes near to, moved once, 8 bytes read or 12 "
        "read and written, as if nothing were in the cache from the slice before. The floor is the larger of the two. "
        "The last columns compare with moving all 64 grid points of every pixel at the rate of the cache and of "
        "memory; neighbours share grid points, so a kernel can be faster than the last.\n",
        table(HEADER, rows),
        f"Slices and back-projections are at all shells up to Nyquist, at random rotations; climbs start {OFF_DEG:g} "
        f"degrees and {OFF_PX:g} px off, SNR {SNR:g}.\n",
        "## Other libraries\n",
    ]
    if absent:
        parts.append(f"Not installed and so not measured: {', '.join(absent)}.\n")
    if others:
        parts += [
            f"Non-uniform transforms of type 2 (read) and 1 (write), float32, to {EPSILON:g}; they take the volume as "
            "complex, ours as real, and write two numbers where ours writes three. `slices per second` is the "
            f"difference of calls with {OTHER_SLICES} and two slices, which leaves out what is done once per volume "
            "(the transform of the padded volume), as it is left out of ours.\n",
            table(OTHER_HEADER, others),
        ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each is measured, at least")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = {name: optional(name) for name in ("ducc0", "finufft")}
    libraries = {name: library for name, library in found.items() if library is not None}
    rows, others = [], []
    with threadpool_limits(1):
        machine = measure_machine(options.seconds)
        for box_px in options.box:
            problem = make_problem(box_px)
            rows += [floors_row(box_px, row, machine) for row in kernel_rows(problem, options.seconds)]
            others += other_rows(problem, libraries, options.seconds)
    text = report(machine, rows, others, [name for name in found if name not in libraries])
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
