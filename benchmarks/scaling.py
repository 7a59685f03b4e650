"""How the time and memory of `dcryo refine` grow with particles, box and workers, and what Dask takes of it.

    python benchmarks/scaling.py FOLDER --output docs/scaling [--only particles box workers dask]
        [--particles N ...] [--box D ...] [--box-particles 500] [--workers-case N D] [--dask-case N D]
        [--max-iterations 6] [--repeat 1]

Phantoms in a box of 256 A whatever the number of pixels, a fixed number of iterations. FOLDER holds data, which are
deleted again once they are measured, and results: each measurement that is done leaves a file FOLDER/results/NAME.json,
so that a session that was cut goes on where it was. --output gets scaling.md and its plots. Without --output nothing is
written but results.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import measured
from measured import MIB, middle, table

import dcryo
from dcryo import graph
from dcryo.data.run import Run

WIDTH_A = 256.0
PARTICLES_BOX_PX = 64
DIAMETER_A = 180
INITIAL_LOWPASS_A = 40
KINDS = ("particles", "box", "workers", "dask")


@dataclass(frozen=True)
class Case:
    """A refinement to measure; workers: threads, None for one on each core."""

    particles: int
    box_px: int
    workers: int | None = None

    @property
    def data(self) -> str:
        return f"{self.particles}-{self.box_px}"

    def name(self, iterations: int) -> str:
        threads = "all" if self.workers is None else self.workers
        return f"{self.data}.threads-{threads}.iterations-{iterations}"


def make_store(case: Case, folder: Path) -> Path:
    """The directory of a case's data: particles.zarr and data/truth.mrc."""
    here = folder / case.data
    if not (here / "made").exists():
        here.mkdir(parents=True, exist_ok=True)
        for command in (
            f"dcryo simulate phantom --particles {case.particles} --box {case.box_px} --pixel-size "
            f"{WIDTH_A / case.box_px:g} --diameter {0.8 * DIAMETER_A:g} --seed 1 --out data --overwrite",
            "dcryo import data/particles.star --out particles.zarr --overwrite",
        ):
            measured.run(command.split(), here, "data.log")
        (here / "data" / "particles.mrcs").unlink()
        (here / "made").touch()
    return here


def measure_refinement(case: Case, folder: Path, iterations: int) -> dict:
    here = make_store(case, folder)
    command = (
        f"dcryo refine particles.zarr --reference data/truth.mrc --mask-diameter {DIAMETER_A} --initial-lowpass "
        f"{INITIAL_LOWPASS_A} --max-iterations {iterations} --out refined --overwrite"
    )
    if case.workers is not None:
        command += f" --workers {case.workers}"
    taken = measured.run(command.split(), here, "refine.log")
    rows = Run.open(here / "refined").record["iterations"]
    shutil.rmtree(here / "refined")
    return {
        "measured": taken,
        "iterations": len(rows),
        "iteration_s": [row["seconds"] for row in rows],
        "figures": rows,
    }


def measure_dask(case: Case, folder: Path, iterations: int) -> dict:
    """Seconds within tasks and of the computation of graphs, of a refinement in this thread."""
    here = make_store(case, folder)
    task_s, compute_s = [], []
    task, compute = graph._single_threaded, graph.compute

    def timed_task(function: Callable, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return task(function, *arguments)
        finally:
            task_s.append(time.perf_counter() - began)

    def timed_compute(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return compute(*arguments)
        finally:
            compute_s.append(time.perf_counter() - began)

    options = dcryo.RefineOptions(
        store=here / "particles.zarr", reference=here / "data" / "truth.mrc", mask_diameter_A=DIAMETER_A,
        initial_lowpass_A=INITIAL_LOWPASS_A, max_iterations=iterations, cluster="synchronous", out=here / "refined",
        overwrite=True,
    )  # fmt: skip
    patched = mock.patch.multiple(graph, _single_threaded=timed_task, compute=timed_compute)
    began = time.perf_counter()
    with patched:
        dcryo.refine(options, progress=lambda *_, **__: None)
    wall_s = time.perf_counter() - began
    shutil.rmtree(here / "refined")
    return {"wall_s": wall_s, "task_s": sum(task_s), "tasks": len(task_s), "compute_s": sum(compute_s)}


def cases(options: argparse.Namespace, kind: str) -> list[Case]:
    if kind == "particles":
        return [Case(n, PARTICLES_BOX_PX) for n in options.particles]
    if kind == "box":
        return [Case(options.box_particles, box) for box in options.box]
    if kind == "workers":
        return [Case(*options.workers_case, workers=workers) for workers in (1, 2)]
    return [Case(*options.dask_case)]


def names(options: argparse.Namespace, kind: str, case: Case) -> list[str]:
    """Names of the results of a case, one for each repeat."""
    stem = case.name(options.max_iterations)
    return [f"{'dask' if kind == 'dask' else 'refine'}.{stem}.{number + 1}" for number in range(options.repeat)]


def measure_all(options: argparse.Namespace) -> None:
    measure = {"dask": measure_dask}
    needed = {case.data for kind in options.only for case in cases(options, kind) if pending(options, kind, case)}
    if needed:
        measured.warm_up(options.folder)
    for kind in options.only:
        # Repeats in turn, so that what disturbs a machine for a while does not disturb all of one case.
        for number in range(options.repeat):
            for case in cases(options, kind):
                measured.once(
                    options.folder / "results" / f"{names(options, kind, case)[number]}.json",
                    lambda case=case, kind=kind: measure.get(kind, measure_refinement)(
                        case, options.folder, options.max_iterations
                    ),
                )
    for data in needed:
        shutil.rmtree(options.folder / data, ignore_errors=True)


def pending(options: argparse.Namespace, kind: str, case: Case) -> bool:
    return not all((options.folder / "results" / f"{name}.json").exists() for name in names(options, kind, case))


def found(options: argparse.Namespace, kind: str) -> list[tuple[Case, list[dict]]]:
    """Cases that have results, with them."""
    every = []
    for case in cases(options, kind):
        paths = [options.folder / "results" / f"{name}.json" for name in names(options, kind, case)]
        runs = [measured.load(path) for path in paths if path.exists()]
        if runs:
            every.append((case, runs))
    return every


def wall_s(runs: Sequence[dict]) -> float:
    return median(run["measured"]["wall_s"] for run in runs)


def mib(runs: Sequence[dict], of: str = "tree_bytes") -> float:
    return median(run["measured"][of] for run in runs) / MIB


HEADER = (
    "particles", "box px", "threads", "runs", "wall s", "of it in iterations s", "CPU s", "MiB", "iterations",
    "searched everywhere %", "resolution A",
)  # fmt: skip


def refinement_row(case: Case, runs: Sequence[dict]) -> list[object]:
    rows = runs[0]["figures"]
    everywhere = 100 * sum(row["searched_everywhere"] for row in rows) / len(rows)
    return [
        case.particles, case.box_px, case.workers or runs[0]["machine"]["cores"], len(runs),
        middle(run["measured"]["wall_s"] for run in runs), f"{in_iterations_s(runs):.1f}",
        f"{median(run['measured']['cpu_s'] for run in runs):.0f}", f"{mib(runs):.0f}", runs[0]["iterations"],
        f"{everywhere:.0f}", f"{rows[-1]['resolution_A']:.2f}",
    ]  # fmt: skip


def in_iterations_s(runs: Sequence[dict]) -> float:
    return median(sum(run["iteration_s"]) for run in runs)


def plot(path: Path, title: str, axis: str, sizes: Sequence[int], every: Sequence[list[dict]], power: float) -> None:
    """Wall time and memory over a size, scales logarithmic, with a dotted line that grows as a power of the size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    values = ([wall_s(runs) for runs in every], [mib(runs) for runs in every])
    for axes, of, label in zip((left, right), values, ("wall time, s", "peak memory, MiB"), strict=True):
        axes.loglog(sizes, of, "o-", color="#1f5fa8")
        axes.set_ylim(min(of) / 2, 2 * max(of))
        axes.set_xlabel(axis)
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    line = [values[0][-1] * (size / sizes[-1]) ** power for size in sizes]
    left.plot(sizes, line, ":", color="grey", label=f"to the power {power:g}")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def report(options: argparse.Namespace) -> str:
    parts: list[str] = []
    machines: list[dict] = []
    for kind, heading, axis, power in (
        ("particles", "Number of particles", "particles", 1.0),
        ("box", "Size of the box", "box, px", 3.0),
    ):
        every = found(options, kind)
        if every:
            machines += [run["machine"] for _, runs in every for run in runs]
            sizes = [getattr(case, {"particles": "particles", "box": "box_px"}[kind]) for case, _ in every]
            plot(
                options.output / f"scaling-{kind}.png", "dcryo refine", axis, sizes, [runs for _, runs in every], power
            )
            rows = [refinement_row(case, runs) for case, runs in every]
            parts += [f"## {heading}\n", table(HEADER, rows), f"![{heading}](scaling-{kind}.png)\n"]
    every = found(options, "workers")
    if every:
        machines += [run["machine"] for _, runs in every for run in runs]
        parts += ["## Workers\n", table(HEADER, [refinement_row(case, runs) for case, runs in every])]
        if len(every) == 2:
            (_, one), (_, two) = every
            whole, within = (of(one) / (2 * of(two)) for of in (wall_s, in_iterations_s))
            parts.append(
                f"Efficiency of two threads, t1 / (2 t2): {whole:.2f} of the whole process, {within:.2f} of its "
                "iterations alone, without its start and the report.\n"
            )
    every = found(options, "dask")
    if every:
        machines += [run["machine"] for _, runs in every for run in runs]
        parts += [
            "## Dask\n",
            "A refinement on the synchronous scheduler, so that one task runs at a time: what is left of the time that "
            "graphs take to compute once that within their tasks is taken off. To build the graphs is not in it.\n",
            table(
                ("particles", "box px", "runs", "tasks", "graphs s", "tasks s", "overhead %", "ms per task"),
                [dask_row(case, runs) for case, runs in every],
            ),
        ]
    if not parts:
        raise SystemExit(f"{options.folder}: there are no results for these sizes")
    head = [
        "# How refinement scales\n",
        f"Written by `benchmarks/scaling.py` on {measured.described(machines)}. Times are by the clock, of whole "
        f"processes of `dcryo refine --max-iterations {options.max_iterations}` on simulated phantoms in a box of "
        f"{WIDTH_A:g} A, kernels compiled before; medians where there are several runs, with their range. Memory is "
        "the peak of the resident memory of all processes, sampled every 0.1 s. `searched everywhere` is the share of "
        "particles, mean over iterations, that were not searched near their last pose alone.\n",
    ]
    return "\n".join(head + parts)


def dask_row(case: Case, runs: Sequence[dict]) -> list[object]:
    rest = [run["compute_s"] - run["task_s"] for run in runs]
    share = [100 * each / run["compute_s"] for each, run in zip(rest, runs, strict=True)]
    per_task = [1000 * each / run["tasks"] for each, run in zip(rest, runs, strict=True)]
    return [
        case.particles, case.box_px, len(runs), runs[0]["tasks"], middle(run["compute_s"] for run in runs),
        middle(run["task_s"] for run in runs), middle(share, ".2f"), middle(per_task, ".2f"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--particles", type=int, nargs="+", default=[500, 1000, 2000, 5000, 10000, 20000])
    parser.add_argument("--box", type=int, nargs="+", default=[64, 96, 128, 192, 256])
    parser.add_argument("--box-particles", type=int, default=500)
    parser.add_argument("--workers-case", type=int, nargs=2, default=[2000, 128], metavar=("N", "D"))
    parser.add_argument("--dask-case", type=int, nargs=2, default=[2000, 64], metavar=("N", "D"))
    parser.add_argument("--max-iterations", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    measure_all(options)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "scaling.md").write_text(report(options))


if __name__ == "__main__":
    main()
