"""What `dcryo postprocess` says of half maps whose truth is known, of noise, and beside RELION.

    python benchmarks/postprocess.py WORK --models DIR [--box 96] [--relion]

WORK is a directory for files; DIR has the atomic models named in MOLECULES (those of the wwPDB). Writes
WORK/results.json and prints the tables of docs/benchmarks-postprocess.md. What is there already is not made again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dcryo.data import mrc
from dcryo.data.curves import read_curves
from dcryo.data.model import read_model
from dcryo.data.postprocess_star import read_postprocess_star
from dcryo.jobs.exchange import ImportOptions, import_particles
from dcryo.jobs.postprocess import PostprocessOptions, postprocess
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels import (
    density,
    filters,
    fsc,
    mask_effect,
    masks,
    phantom,
    sharpening,
    significance,
    solvent,
    symmetry,
)
from dcryo.kernels.randomness import generator
from dcryo.steps import validation

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from noisy_halves import blurred, noise_power, noisy_halves

# name -> file, assembly, point group; the phantom is the program's own.
MOLECULES = {
    "beta-galactosidase": ("5a1a.pdb", None, "D2"),
    "haemoglobin": ("2dhb.pdb", "1", "C2"),
    "TRPV1": ("3j5p.pdb", None, "C4"),
    "apoferritin": ("7a4m.cif", "1", "O"),
    "phantom": ("", None, "C1"),
}
# Unmasked resolution in pixels, and how much amplitudes fall by: B = that many times its square.
CASES = ((3.2, 6.0), (3.2, 10.0), (5.0, 6.0), (5.0, 10.0))
FILLED = 0.65
SMALL_BOX_PX = 64
NOISE_PAIRS = 40
# Point groups whose axes are where the program wants them, and SNRs.
SIMULATED = {"beta-galactosidase": ("D2", 0.003), "haemoglobin": ("C1", 0.05), "phantom": ("C1", 0.05)}
PARTICLES = 600
RELION_SEEDS = 16


def truth_of(models: Path, name: str, box_px: int) -> tuple[np.ndarray, float, str]:
    file, assembly, group = MOLECULES[name]
    atoms = read_model(models / file, assembly) if file else phantom.phantom(symmetry.operators(group), 45.0, seed=2)
    pixel_A = 2 * atoms.radius_A / FILLED / box_px
    made = density.gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, box_px, pixel_A)
    return made, pixel_A, group


def masks_of(first: np.ndarray, second: np.ndarray, pixel_A: float) -> dict[str, np.ndarray]:
    """The automatic mask; one that ends within two pixels of the density; the brightest hundredth of the voxels."""
    found = solvent.find_molecule(first, second, pixel_A)
    assert found is not None
    mean = filters.lowpass((first + second) / 2, pixel_A, 2.2 * pixel_A)
    return {
        "soft": solvent.soft_mask(found.core, max(6 / pixel_A, 2), max(10 / pixel_A, 3)),
        "tight": solvent.soft_mask(found.core, 0, 2),
        "absurd": (mean > np.percentile(mean, 99)).astype(np.float32),
    }


def against_truth(models: Path, box_px: int) -> list[dict]:
    rows = []
    for name in MOLECULES:
        unblurred, pixel_A, _ = truth_of(models, name, box_px)
        for unmasked_px, falls in CASES:
            truth = blurred(unblurred, pixel_A, falls * (unmasked_px * pixel_A) ** 2)
            first, second = noisy_halves(truth, noise_power(truth, pixel_A, unmasked_px * pixel_A), 7)
            mean = (first + second) / 2
            given = masks_of(first, second, pixel_A)
            every = np.arange(box_px // 2 + 1)

            def at(curve: np.ndarray, threshold: float, pixel_A: float = pixel_A) -> float:
                return fsc.resolution_at(curve, threshold, box_px, pixel_A)

            true_A = at(fsc.shell_correlation(mean * given["soft"], truth * given["soft"]), fsc.HALF)
            for kind, mask in given.items():
                curves = validation.half_map_curves(first, second, mask, masks.sphere(box_px, box_px, 0), 1, 0)
                verdict = validation.judge(first, second, mask, curves, 1)
                rows.append({
                    "molecule": name, "unmasked_px": unmasked_px, "falls": falls, "mask": kind, "true_A": true_A,
                    "true_here_A": at(fsc.shell_correlation(mean * mask, truth * mask), fsc.HALF),
                    "true_filtered_first_A": at(mask_effect.filtered_first(mean, truth, mask, every), fsc.HALF),
                    "masked_A": at(curves.masked, fsc.GOLD_STANDARD),
                    "corrected_A": at(curves.corrected, fsc.GOLD_STANDARD),
                    "said_A": at(verdict.fsc, fsc.GOLD_STANDARD), "leak": verdict.leak, "tight": verdict.tight,
                    "claimed": verdict.claimed,
                })  # fmt: skip
            print(name, unmasked_px, falls, flush=True)
    return rows


def white(box_px: int, pair: int, stream: str, half: int) -> np.ndarray:
    return generator(pair, stream, half).standard_normal((box_px,) * 3, dtype=np.float32)


def noise(box_px: int = 48) -> list[dict]:
    """Noise, white and low-passed, under masks that know nothing of it and under one made from it."""
    rows = []
    sphere = masks.sphere(box_px, 40, 5)
    for shells in (None, 8.0, 20.0):
        for pair in range(NOISE_PAIRS):
            halves = [
                generator(pair, "noise", half).standard_normal((box_px,) * 3, dtype=np.float32) for half in (1, 2)
            ]
            if shells is not None:
                more = [
                    generator(pair, "more", half).standard_normal((box_px,) * 3, dtype=np.float32) for half in (1, 2)
                ]
                halves = [filters.lowpass(one, 1.0, box_px / shells) + 0.02 * other
                          for one, other in zip(halves, more, strict=True)]  # fmt: skip
            mean = filters.lowpass((halves[0] + halves[1]) / 2, 3.0, 15.0)
            given = {
                "sphere": sphere,
                "small soft sphere": masks.sphere(box_px, 8, 1),
                "hard sphere": masks.sphere(box_px, 12, 0),
                "brightest hundredth": (mean > np.percentile(mean, 99)).astype(np.float32),
            }
            for kind, mask in given.items():
                curves = validation.half_map_curves(halves[0], halves[1], mask, sphere, 1, 0)
                verdict = validation.judge(halves[0], halves[1], mask, curves, 1)
                rows.append({"lowpass_shell": shells, "mask": kind, "claimed": verdict.claimed,
                             "claimed_by_mask_alone": significance.is_claimed(verdict.fsc, curves.within)})  # fmt: skip
    return rows


def reconstructed(work: Path, models: Path, box_px: int) -> list[dict]:
    """Half maps of simulated particles with their true poses, CTFs and noise."""
    rows = []
    for name, (group, snr) in SIMULATED.items():
        file, assembly, _ = MOLECULES[name]
        _, pixel_A, _ = truth_of(models, name, box_px)
        folder = work / f"particles-{name}"
        quiet = {"progress": lambda line, end="": None}
        data = simulate(
            SimulateOptions(
                model=str(models / file) if file else "phantom", assembly=assembly, particles=PARTICLES, box_px=box_px,
                pixel_size_A=pixel_A, snr=snr, seed=3, out=folder / "simulated", overwrite=True,
            ),
            **quiet,
        )  # fmt: skip
        store = folder / "particles.zarr"
        import_particles(ImportOptions(source=data.truth_star, out=store, overwrite=True), **quiet)
        reconstruct(ReconstructOptions(store=store, symmetry=group, out=folder / "maps", overwrite=True), **quiet)
        found = postprocess(PostprocessOptions(source=folder / "maps", out=folder / "post", overwrite=True), **quiet)
        truth = mrc.read_map(data.truth_map).array
        curve = fsc.shell_correlation(found.map * found.mask, truth * found.mask)
        rows.append({"molecule": name, "said_A": found.resolution_A, "warnings": found.warnings,
                     "true_A": fsc.resolution_at(curve, fsc.HALF, box_px, pixel_A)})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def beside_relion(work: Path, models: Path, box_px: int) -> list[dict]:
    """The same half maps and mask: curves, B-factors, time. RELION's draws are averaged over its seeds."""
    rows = []
    for name in MOLECULES:
        unblurred, pixel_A, _ = truth_of(models, name, box_px)
        truth = blurred(unblurred, pixel_A, 6 * (3 * pixel_A) ** 2)
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        for half, array in enumerate(noisy_halves(truth, noise_power(truth, pixel_A, 3.2 * pixel_A), 7), start=1):
            mrc.write_map(folder / f"half{half}.mrc", array, pixel_A)
        began = time.process_time()
        ours = postprocess(
            PostprocessOptions(source=folder / "half1.mrc", out=folder / "out", overwrite=True, fit_from_A=8 * pixel_A),
            progress=lambda line, end="": None,
        )
        ours_s = time.process_time() - began
        figures = json.loads((folder / "out" / "run.json").read_text())["result"]
        theirs, theirs_s = [], []
        for seed in range(1, RELION_SEEDS + 1):
            words = ["relion_postprocess", "--i", folder / "half1.mrc", "--i2", folder / "half2.mrc", "--mask",
                     folder / "out" / "mask.mrc", "--angpix", pixel_A, "--auto_bfac", "--autob_lowres", 8 * pixel_A,
                     "--autob_highres", figures["resolution_A"], "--random_seed", seed, "--force_mask",
                     "--o", folder / f"relion{seed}"]  # fmt: skip
            made = subprocess.run(["bash", "-c", 'time "$@"', "bash", *map(str, words)], check=True,
                                  capture_output=True, text=True)  # fmt: skip
            times = [line.split()[1] for line in made.stderr.splitlines() if line.startswith(("user", "sys"))]
            theirs_s.append(sum(60 * float(text.split("m")[0]) + float(text.split("m")[1][:-1]) for text in times))
            theirs.append(read_postprocess_star(folder / f"relion{seed}.star"))
        table = read_curves(folder / "out" / "fsc.csv")
        corrected = np.array([curves["fsc_corrected"] for _, curves, _ in theirs])
        apart = {key: float(np.abs(table[key] - theirs[0][1][key])[1:].max()) for key in ("fsc_unmasked", "fsc_masked")}
        rows.append({
            "molecule": name, **apart, "corrected": float(np.abs(table["fsc_corrected"] - corrected.mean(0))[1:].max()),
            "one_seed": float(np.abs(table["fsc_corrected"] - corrected[0])[1:].max()),
            "relion_seeds": float(max(np.abs(corrected[0] - other)[1:].max() for other in corrected[1:])),
            "bfactor_whole_box_A2": figures["bfactor_of_whole_box_A2"], "bfactor_A2": ours.bfactor_A2,
            "relion_bfactor_A2": float(np.mean([float(general["bfactor_A2"]) for general, _, _ in theirs])),
            "true_bfactor_A2": true_bfactor(truth, pixel_A, figures["resolution_A"]),
            "cpu_s": ours_s, "relion_cpu_s": float(np.median(theirs_s)),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def true_bfactor(truth: np.ndarray, pixel_A: float, resolution_A: float) -> float:
    frequency = np.arange(len(truth) // 2 + 1) / (len(truth) * pixel_A)
    fit = sharpening.guinier_fit(sharpening.radial_amplitude(truth), frequency, resolution_A, 8 * pixel_A)
    assert fit is not None
    return fit.bfactor_A2


def tables(found: dict) -> str:
    lines = ["| mask | cases | called tight | masked FSC | corrected FSC | what is said |", "|---|---|---|---|---|---|"]

    def spread(values: list[float]) -> str:
        return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    for kind in ("soft", "tight", "absurd"):
        rows = [row for row in found["truth"] if row["mask"] == kind]
        columns = [spread([row[key] / row["true_A"] for row in rows]) for key in ("masked_A", "corrected_A", "said_A")]
        lines.append(f"| {kind} | {len(rows)} | {sum(row['tight'] for row in rows)} | " + " | ".join(columns) + " |")
    lines += ["", "| noise, mask | pairs | claimed | would be by the mask alone |", "|---|---|---|---|"]
    for kind in dict.fromkeys(row["mask"] for row in found["noise"]):
        rows = [row for row in found["noise"] if row["mask"] == kind]
        lines.append(f"| {kind} | {len(rows)} | {sum(row['claimed'] for row in rows)} | "
                     f"{sum(row['claimed_by_mask_alone'] for row in rows)} |")  # fmt: skip
    lines += ["", "| simulated particles | true resolution | what is said |", "|---|---|---|"]
    lines += [f"| {row['molecule']} | {row['true_A']:.2f} A | {row['said_A']:.2f} A |" for row in found["particles"]]
    if "relion" in found:
        heads = ("unmasked", "masked", "corrected, mean of seeds", "corrected, one seed", "two seeds of RELION",
                 "B of the whole box", "B of RELION", "B used", "true B", "CPU s", "CPU s of RELION")  # fmt: skip
        lines += ["", "| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        for row in found["relion"]:
            lines.append(
                f"| {row['molecule']} | {row['fsc_unmasked']:.4f} | {row['fsc_masked']:.4f} | {row['corrected']:.4f} | "
                f"{row['one_seed']:.4f} | {row['relion_seeds']:.4f} | {row['bfactor_whole_box_A2']:.1f} | "
                f"{row['relion_bfactor_A2']:.1f} | {row['bfactor_A2']:.1f} | {row['true_bfactor_A2']:.1f} | "
                f"{row['cpu_s']:.1f} | {row['relion_cpu_s']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--box", type=int, default=96, help="of what is compared with RELION")
    parser.add_argument("--relion", action="store_true", help="also beside relion_postprocess")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    parts = {
        "noise": noise,
        "truth": lambda: against_truth(options.models, SMALL_BOX_PX),
        "particles": lambda: reconstructed(options.work, options.models, SMALL_BOX_PX),
    }
    if options.relion:
        parts = {"relion": lambda: beside_relion(options.work, options.models, options.box), **parts}
    for name, make in parts.items():
        if name not in found:
            found[name] = make()
            path.write_text(json.dumps(found, indent=1))
    print(tables(found))


if __name__ == "__main__":
    main()
