"""First models: how often random starts end at the molecule, what that costs, and the same of RELION's.

    python benchmarks/abinitio.py data FOLDER
    python benchmarks/abinitio.py run FOLDER [--only NAME ...] [--seeds 10]
    python benchmarks/abinitio.py relion FOLDER
    python benchmarks/abinitio.py report FOLDER --output docs/benchmarks-abinitio.md

2,000 particles of each of six molecules (compact, elongated, hollow; C1, C4, D2, D7, O), SNR 0.1, box 64; 1,200 of
5A1A with 800 of 3J5P for two classes; and the real beta-galactosidase, where FOLDER/beta-galactosidase.zarr is there.
Every run is one start (`--starts 1`): what the program compares by default are three. Each run leaves
FOLDER/results/NAME.SEED.json and is not repeated.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median

import gemmi
import measured
import numpy as np
from measured import MIB, middle, table

from dcryo.data import mrc, star
from dcryo.data.model import read_model
from dcryo.data.run import Run
from dcryo.kernels import alignment, fsc, masks
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.randomness import generator

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MODELS = SHARED_DATA / "models"
BOX = 64
# name -> what is simulated, pixel size A, diameter A, symmetry
SETS = {
    "5A1A A-C": ("{folder}/three.pdb", 3.54, 190, "C1"),
    "phantom C1": ("phantom --diameter 120", 3.0, 130, "C1"),
    "3J5P": (f"{MODELS}/3j5p.pdb", 3.2, 160, "C4"),
    "5A1A": (f"{MODELS}/5a1a.pdb", 3.54, 190, "D2"),
    "phantom D7": ("phantom --symmetry D7 --diameter 140", 3.5, 150, "D7"),
    "7A4M": (f"{MODELS}/7a4m.cif --assembly 1", 3.0, 140, "O"),
}
MIXED = ("mixed", 1200, 800)
REAL = {"beta-galactosidase C1": "C1", "beta-galactosidase D2": "D2"}
REAL_PIXEL_A, REAL_DIAMETER_A = 3.54, 180
# Of a model against the truth, what is wanted.
WANTED_A = 20.0
DCRYO = (
    "dcryo abinitio {store}.zarr --mask-diameter {diameter} --symmetry {symmetry} --seed {seed} --out {out} --overwrite"
)
RELION_SET = "5A1A A-C"
# Its 300 iterations take more than an hour and a half; what it has reached by then is compared. A second thread costs
# more than it gains.
RELION_CPU_S = 900
RELION = (
    "relion_refine --o ../relion/run --sgd_ini_iter 50 --sgd_inbetween_iter 200 --sgd_fin_iter 50 --sgd_write_iter 5 "
    "--sgd_ini_resol 35 --sgd_fin_resol 15 --sgd_ini_subset 100 --sgd_fin_subset 500 --sgd --denovo_3dref "
    "--i particles.star --ctf --K 1 --sym C1 --flatten_solvent --zero_mask --dont_combine_weights_via_disc "
    "--preread_images --pool 30 --pad 1 --particle_diameter 190 --oversampling 1 --healpix_order 1 --offset_range 6 "
    "--offset_step 2 --j 1 --random_seed 1"
)


def slug(name: str) -> str:
    return name.replace(" ", "-")


def make_data(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    structure = gemmi.read_structure(str(MODELS / "5a1a.pdb"))
    structure[0].remove_chain("D")
    structure.write_minimal_pdb(str(folder / "three.pdb"))
    for name, (model, pixel_A, _, _) in SETS.items():
        simulate(folder, slug(name), model.format(folder=folder.resolve()), pixel_A)
    for number, name in enumerate(("5a1a", "3j5p"), start=1):
        simulate(folder, f"{MIXED[0]}-{number}", str(MODELS / f"{name}.pdb"), 3.54)
    mix(folder)


def simulate(folder: Path, name: str, model: str, pixel_A: float) -> None:
    if (folder / f"{name}.zarr").exists():
        return
    words = (
        f"dcryo simulate {model} --pixel-size {pixel_A} --box {BOX} --particles 2000 --snr 0.1 --seed 7 --out {name}"
    )
    measured.run([*words.split(), "--overwrite"], folder, "data.log")
    measured.run(f"dcryo import {name}/particles.star --out {name}.zarr --overwrite".split(), folder, "data.log")


def mix(folder: Path) -> None:
    name, *counts = MIXED
    if (folder / f"{name}.zarr").exists():
        return
    sources = [folder / f"{name}-{number}" for number in (1, 2)]
    tables = [
        star.read_particles(source / "truth.star").take(np.arange(n)) for source, n in zip(sources, counts, strict=True)
    ]
    images = [
        mrc.open_stack(source / "particles.mrcs").read(np.arange(n)) for source, n in zip(sources, counts, strict=True)
    ]
    order = generator(1, "mixed", 0).permutation(sum(counts))
    columns = {key: np.concatenate([one[key] for one in tables])[order] for key in tables[0].columns}
    columns["image_index"] = np.arange(len(order))
    columns["class_number"] = np.repeat([1, 2], counts)[order]
    truth = replace(tables[0], columns=columns)
    (folder / name).mkdir(exist_ok=True)
    star.write_particles(folder / name / "truth.star", truth)
    unknown = {
        key: value for key, value in columns.items() if key not in ("rotation", "origin_A", "half", "class_number")
    }
    star.write_particles(folder / name / "particles.star", replace(truth, columns=unknown))
    with mrc.StackWriter(folder / name / "particles.mrcs", len(order), BOX, 3.54, "float32") as writer:
        writer.write(0, np.concatenate(images)[order])
    measured.run(f"dcryo import {name}/particles.star --out {name}.zarr --overwrite".split(), folder, "data.log")


def against(volume: np.ndarray, truth: np.ndarray, pixel_A: float, diameter_A: float) -> float:
    """Resolution at which a model, brought onto the truth in either hand, has an FSC of 0.5 with it."""
    shell = int(BOX * pixel_A / 16)
    moved = alignment.moved(volume, alignment.align(volume, truth, shell, hands=True))
    mask = masks.sphere(BOX, diameter_A / pixel_A, 3)
    return fsc.resolution_at(fsc.shell_correlation(moved * mask, truth * mask), fsc.HALF, BOX, pixel_A)


def run_set(folder: Path, name: str, seed: int) -> dict:
    _, pixel_A, diameter_A, symmetry = SETS[name]
    truth = mrc.read_map(folder / slug(name) / "truth.mrc").array
    return run_one(folder, name, slug(name), diameter_A, symmetry, seed, truth, pixel_A)


def run_real(folder: Path, name: str, seed: int) -> dict:
    """Needs FOLDER/beta-galactosidase.zarr, which benchmarks/relion.py says how to import."""
    model = read_model(MODELS / "5a1a.pdb")
    truth = gaussian_density(model.position_A, model.amplitude, model.bfactor_A2, BOX, REAL_PIXEL_A)
    return run_one(folder, name, "beta-galactosidase", REAL_DIAMETER_A, REAL[name], seed, truth, REAL_PIXEL_A)


def run_one(
    folder: Path, name: str, store: str, diameter_A: float, symmetry: str, seed: int, truth: np.ndarray, pixel_A: float
) -> dict:
    out = f"run-{slug(name)}-{seed}"
    words = DCRYO.format(store=store, diameter=diameter_A, symmetry=symmetry, seed=seed, out=out).split()
    found: dict = {"measured": measured.run([*words, "--starts", "1"], folder, f"{slug(name)}.log")}
    result = Run.open(folder / out).record["result"]
    model = mrc.read_map(folder / out / "class1.mrc").array
    return found | {
        "resolution_A": against(model, truth, pixel_A, diameter_A),
        "symmetry_agreement": result["symmetry_agreement"][0],
        "explained": result["explained"],
    }


def run_mixed(folder: Path, seed: int) -> dict:
    name = MIXED[0]
    out = f"run-{name}-{seed}"
    words = DCRYO.format(store=name, diameter=190, symmetry="C1", seed=seed, out=out).split()
    found: dict = {"measured": measured.run([*words, "--starts", "1", "--classes", "2"], folder, f"{name}.log")}
    truth, made = (
        star.read_particles(folder / name / "truth.star"),
        star.read_particles(folder / out / "particles.star"),
    )
    molecule = truth["class_number"][np.argsort(truth["image_index"])[made["image_index"]]]
    right = float(np.mean(molecule == made["class_number"]))
    return found | {"right": max(right, 1 - right)}


def run_relion(folder: Path) -> dict:
    """RELION's gradient descent on the same particles, as far as it comes, and its model against the truth."""
    _, pixel_A, diameter_A, _ = SETS[RELION_SET]
    (folder / "relion").mkdir(exist_ok=True)
    found: dict = {
        "measured": measured.run(
            ["sh", "-c", f"ulimit -t {RELION_CPU_S}; {RELION}; true"], folder / slug(RELION_SET), "relion.log"
        )
    }
    model = mrc.read_map(sorted((folder / "relion").glob("run_it*_class001.mrc"))[-1]).array
    truth = mrc.read_map(folder / slug(RELION_SET) / "truth.mrc").array
    log = (folder / slug(RELION_SET) / "relion.log").read_text(errors="replace")
    return found | {
        "resolution_A": against(model, truth, pixel_A, diameter_A),
        "iterations": log.count("Stochastic Gradient Descent iteration"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["data", "run", "relion", "report"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder, results = options.folder, options.folder / "results"
    if options.command == "data":
        make_data(folder)
    elif options.command == "relion":
        measured.once(results / "relion.1.json", lambda: run_relion(folder))
    elif options.command == "run":
        jobs = {name: lambda seed, name=name: run_set(folder, name, seed) for name in SETS}
        jobs[MIXED[0]] = lambda seed: run_mixed(folder, seed)
        if (folder / "beta-galactosidase.zarr").exists():
            jobs |= {name: lambda seed, name=name: run_real(folder, name, seed) for name in REAL}
        for seed in range(options.seeds):
            for name, job in jobs.items():
                if not options.only or name in options.only:
                    measured.once(results / f"{slug(name)}.{seed}.json", lambda job=job, seed=seed: job(seed))
    elif options.output:
        options.output.write_text(report(folder))
    else:
        print(report(folder))


def report(folder: Path) -> str:
    results = folder / "results"

    def of(name: str) -> list[dict]:
        return [measured.load(path) for path in sorted(results.glob(f"{slug(name)}.*.json"))]

    rows = []
    for name in (*SETS, *REAL, "relion"):
        runs = of(name)
        if not runs:
            continue
        found = [run["resolution_A"] for run in runs]
        symmetry = SETS[name][3] if name in SETS else REAL.get(name, "C1")
        agreement = median(run.get("symmetry_agreement", 1.0) for run in runs)
        rows.append(
            [
                name, symmetry, f"{sum(value <= WANTED_A for value in found)} of {len(found)}", middle(found),
                f"{agreement:.2f}" if symmetry != "C1" else "", middle(run["measured"]["wall_s"] for run in runs),
                middle(run["measured"]["cpu_s"] for run in runs),
                f"{max(run['measured']['tree_bytes'] for run in runs) / MIB:.0f}",
            ]
        )  # fmt: skip
    heading = ["particles", "symmetry", f"{WANTED_A:.0f} A or better", "FSC 0.5 with the truth, A", "axes", "wall s"]
    heading += ["CPU s", "MiB"]
    where = measured.described(measured.load(path)["machine"] for path in sorted(results.glob("*.json")))
    text = f"# First models\n\nWritten by `benchmarks/abinitio.py` on {where}.\n\n"
    text += (
        "Each run is one start from random orientations, another seed each, told nothing but the diameter and the name "
        "of the point group, and brought onto the truth in either hand. `axes`: how well the model made without "
        "symmetry obeys its group once the axes are found (1: perfect, 0: chance). `relion` is `relion_refine "
        f"--denovo_3dref` on the particles of {RELION_SET}, stopped after {RELION_CPU_S} CPU s"
        + "".join(f", at iteration {run['iterations']} of 300" for run in of("relion"))
        + ".\n\n"
    )
    text += table(heading, rows)
    mixed = of(MIXED[0])
    if mixed:
        right = middle((100 * run["right"] for run in mixed), ".1f")
        text += (
            f"\nTwo molecules, {MIXED[1]} to {MIXED[2]}, two classes: {right} % of the particles in the right one.\n"
        )
    return text


if __name__ == "__main__":
    main()
