"""What `dcryo validate` says of refinements whose truth is known, and of B factors that are known.

    python benchmarks/validation.py WORK

WORK is a directory for files. Prints the tables of docs/benchmarks-validation.md. Takes about half an hour on 2 cores.
"""

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np

from dcryo import graph
from dcryo.cluster import connect
from dcryo.data import mrc
from dcryo.data.store import Store, select
from dcryo.jobs import em
from dcryo.jobs.back_projection import maps_of
from dcryo.jobs.dataset import load_dataset
from dcryo.jobs.exchange import ImportOptions, import_particles
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.simulate import PHANTOM, SimulateOptions, simulate
from dcryo.jobs.validate import ValidateOptions, validate
from dcryo.kernels import fft, fsc
from dcryo.kernels.filters import radius_px
from dcryo.kernels.masks import sphere
from dcryo.kernels.overfitting import resolution_line
from dcryo.kernels.symmetry import operators

BOX, PIXEL_A = 48, 3.5
# Particles of a run, their SNR, and how often.
HONEST = ((500, 0.03), (500, 0.1), (1000, 0.1))
SEEDS, OTHERS = 3, 500
WORDS = {True: "passes", False: "fails", None: "no answer"}
BFACTORS_A2, BFACTOR_SEEDS, BFACTOR_BOX, BFACTOR_PIXEL_A, BFACTOR_PARTICLES = (200.0, 300.0, 400.0), 6, 48, 2.0, 1600
refine_module = importlib.import_module("dcryo.jobs.refine")
subsets_of = importlib.import_module("dcryo.jobs.validate")._subsets


def quiet(line: str, /, *, end: str = "\n") -> None:
    pass


def particles(folder: Path, count: int, snr: float, seed: int) -> tuple[Path, Store, Store]:
    """Truth, particles to refine, and others."""
    options = SimulateOptions(
        model=PHANTOM, out=folder / "simulated", particles=count + OTHERS, snr=snr, seed=seed, box_px=BOX,
        pixel_size_A=PIXEL_A,
    )  # fmt: skip
    made = simulate(options, progress=quiet)
    every = import_particles(ImportOptions(source=made.particles_star, out=folder / "all.zarr"), progress=quiet).store
    own = select(every, np.arange(count), folder / "own.zarr")
    return made.truth_map, own, select(every, np.arange(count, count + OTHERS), folder / "others.zarr")


def judged(folder: Path, name: str, truth: Path, store: Store, others: Store) -> str:
    """A row: what the run claims, what is true, and what the tests say."""
    run = folder / name
    result = refine(RefineOptions(store=store.path, reference=truth, out=run, workers=2), progress=quiet)
    mask, known = (mrc.read_map(path).array for path in (run / "mask.mrc", truth))
    # The halves' correlations with the truth, multiplied, are what the FSC between them would be without shared noise.
    first, second = (fsc.shell_correlation(half * mask, known * mask) for half in result.half_maps)
    true_A = fsc.resolution_at(first * np.abs(second), fsc.GOLD_STANDARD, BOX, PIXEL_A)
    given = {"run": run, "workers": 2}
    one = validate(ValidateOptions(out=folder / f"{name}-1", tests="noise,unseen", **given), progress=quiet)
    other = validate(
        ValidateOptions(out=folder / f"{name}-2", tests="unseen", others=others.path, **given), progress=quiet
    )
    noise, unseen = one.figures["noise"], other.figures["unseen"]
    return (
        f"{result.resolution_A:.1f} | {true_A:.1f} | {noise['fsc_of_noise']:.2f} +- {noise['fsc_of_noise_error']:.2f} "
        f"| {noise['resolution_true_A']:.1f} | {WORDS[one.passed['noise']]} | {WORDS[one.passed['unseen']]} | "
        f"{WORDS[other.passed['unseen']]} | {unseen['unseen_correlation']:.4f} of {unseen['promised_correlation']:.4f}"
    )


def shared(job, state, made, shell_max):  # type: ignore[no-untyped-def]
    """An update that gives both halves the mean of their unfiltered maps as reference, and all shells to align with."""
    both = np.mean(made.classes[0].plain, axis=0)
    after = UPDATE(job, state, made, shell_max)
    return dataclasses.replace(after, references=np.stack([both, both]), shell=job.box_px // 2 - 1)


UPDATE = refine_module._update


def refinements(work: Path) -> None:
    print("| particles, SNR | claimed A | true A | FSC of noise | FSC_true A | noise | other half | others | of what |")
    print("|---|---|---|---|---|---|---|---|---|")
    for count, snr in HONEST:
        for seed in range(SEEDS):
            folder = work / f"{count}-{snr}-{seed}"
            truth, own, others = particles(folder, count, snr, seed)
            print(f"| {count}, {snr} | {judged(folder, 'run', truth, own, others)} |", flush=True)
            if (count, snr) == HONEST[0]:
                refine_module._update = shared
                row = judged(folder, "shared", truth, own, others)
                refine_module._update = UPDATE
                print(f"| {count}, {snr}, one reference | {row} |", flush=True)


def bfactors(work: Path) -> None:
    print(
        "\n| B A^2 | found, mean | their scatter | error given, median | foretold over reached |\n|---|---|---|---|---|"
    )
    for known_A2 in BFACTORS_A2:
        lines, foretold = [], []
        for seed in range(BFACTOR_SEEDS):
            numbers, curves = curves_of_subsets(work / f"b{known_A2:g}-{seed}", known_A2, seed)
            width_A = BFACTOR_BOX * BFACTOR_PIXEL_A
            lines.append(resolution_line(numbers, curves, fsc.GOLD_STANDARD, width_A))
            fewer = resolution_line(numbers[1:], curves[1:], fsc.GOLD_STANDARD, width_A)
            all_A, half_A = (width_A / fsc.crossing(curve, fsc.GOLD_STANDARD) for curve in curves[:2])
            foretold.append((1 / half_A**2 + fewer.slope * np.log(2)) ** -0.5 / all_A)
        found = np.array([line.bfactor_A2 for line in lines])
        error = np.median([line.error_A2 for line in lines])
        print(
            f"| {known_A2:.0f} | {found.mean():.0f} | {found.std(ddof=1):.0f} | {error:.0f} | "
            f"{min(foretold):.3f} to {max(foretold):.3f} |", flush=True,
        )  # fmt: skip


def curves_of_subsets(folder: Path, bfactor_A2: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of particles, and FSC of their half maps, of a density with a flat spectrum but for a B factor."""
    box, pixel = BFACTOR_BOX, BFACTOR_PIXEL_A
    white = np.random.default_rng(seed).standard_normal((box,) * 3) * sphere(box, 0.55 * box, 4)
    falling = np.exp(-bfactor_A2 * (radius_px(box, 3) / (box * pixel)) ** 2 / 4)
    folder.mkdir(parents=True)
    mrc.write_map(folder / "flat.mrc", fft.irfftn(fft.rfftn(white.astype(np.float32)) * falling, box), pixel)
    options = SimulateOptions(
        model=str(folder / "flat.mrc"), out=folder / "simulated", particles=BFACTOR_PARTICLES, snr=0.05,
        noise_bfactor_A2=0, seed=seed,
    )  # fmt: skip
    truth = simulate(options, progress=quiet).truth_star
    store = import_particles(ImportOptions(source=truth, out=folder / "flat.zarr"), progress=quiet).store
    data, mask = load_dataset(store.path, 0), sphere(box, 0.6 * box, 4)
    sizes = subsets_of([data.rows_of(half) for half in (1, 2)], 0, 4)
    curves = []
    with em.scratch(folder) as scratch, connect("threads", 2) as cluster:
        for subsets in sizes:
            tasks = []
            for draw, which in enumerate(subsets):
                halves = np.where(np.isin(np.arange(store.n), which), data.halves, 0)
                maps, _ = maps_of(dataclasses.replace(data, halves=halves), operators("C1"), mask, scratch, f"{draw}-")
                tasks.append(maps.fsc)
            curves.append(np.mean([found.masked for found in graph.compute(tasks, cluster)], axis=0))
    return np.array([len(subsets[0]) for subsets in sizes]), np.stack(curves)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    bfactors(where)
    refinements(where)
