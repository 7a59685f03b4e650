"""Refinement of a membrane protein in a disordered belt, and of the same one without, with and without local filters.

TRPV1 (3J5P, C4) as in a detergent micelle, in short: to its projection each particle adds those of blobs at random in a
torus about the transmembrane domain, others in every particle. What counts is the FSC to the protein inside the mask of
its own density, and how far poses are off.

    python benchmarks/nonuniform.py --out DIR [--particles 700] [--snr 0.018] [--seed 0] [--repeat 1]
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from dcryo.data import mrc, star
from dcryo.jobs.exchange import ImportOptions, import_particles
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels import fft, filters, fsc, rotations
from dcryo.kernels.ctf import ctf
from dcryo.kernels.masks import cosine_edge
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import half_plane, unpack
from dcryo.kernels.symmetry import operators

MODEL = Path(__file__).resolve().parents[2] / "shared" / "data" / "models" / "3j5p.pdb"
SYMMETRY, DIAMETER_A = "C4", 160.0
# Blobs: their number, B factor of the Gaussian that each of them is, and the torus they lie in: its two radii, and how
# high it is from the protein's centre.
BLOBS, BLOB_B_A2 = 150, 400.0
RING_A, TUBE_A, HEIGHT_A = 52.0, 18.0, -30.0
OPTICS = {"voltage_kV": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1}


def add_belts(folder: Path, box: int, pixel: float, mass: float, seed: int) -> None:
    """Add belts to the images of a simulation, in place; mass: that of a belt over the molecule's."""
    particles = star.read_particles(folder / "truth.star")
    truth = mrc.read_map(folder / "truth.mrc").array
    stack = mrc.open_stack(folder / "particles.mrcs").read(np.arange(len(particles)))
    pixels = half_plane((box - 1) // 2)
    k = np.stack([pixels.kx, pixels.ky, np.zeros(len(pixels.kx))], axis=1) / (box * pixel)
    blob = mass * truth.sum() / BLOBS * np.exp(-BLOB_B_A2 * np.sum(k**2, axis=1) / 4)
    out = mrc.StackWriter(folder / "belted.mrcs", len(particles), box, pixel, "float32")
    with out:
        for row in range(len(particles)):
            random = generator(seed, "belt", row)
            angle, around, depth = 2 * np.pi * random.random((3, BLOBS))
            tube = TUBE_A * np.sqrt(depth / (2 * np.pi))
            ring = RING_A + tube * np.cos(around)
            place = np.stack([ring * np.cos(angle), ring * np.sin(angle), tube * np.sin(around) + HEIGHT_A], axis=1)
            seen = place @ particles["rotation"][row].T
            seen[:, :2] -= particles["origin_A"][row]
            phases = np.exp(-2j * np.pi * (k[:, :2] @ seen[:, :2].T)).sum(axis=1)
            defocus = (particles[name][row : row + 1] for name in ("defocus_u_A", "defocus_v_A", "defocus_angle_deg"))
            transfer = ctf(pixels.kx, pixels.ky, box, pixel, *defocus, *OPTICS.values())[0]
            image = fft.irfft2(unpack(pixels, (blob * phases * transfer)[None].astype(np.complex64), box), box)
            out.write(row, stack[row : row + 1] + image)
    (folder / "belted.mrcs").replace(folder / "particles.mrcs")


def figures(run: Path, truth: np.ndarray, pixel: float, poses: np.ndarray) -> dict:
    """FSC of the half maps' mean to the truth inside the mask of the ordered part, and errors of poses."""
    box = len(truth)
    smooth = filters.lowpass(truth, pixel, 15.0)
    distance = fft.irfftn(fft.rfftn((smooth > 0.1 * smooth.max()).astype(np.float32)), box)
    ordered = 1 - cosine_edge(filters.lowpass(distance, pixel, 12.0), 0.1, 0.5)
    mean = sum(mrc.read_map(run / f"half{half}.mrc").array for half in (1, 2)) / 2
    curve = fsc.shell_correlation(mean * ordered, truth * ordered)
    record = json.loads((run / "run.json").read_text())
    found = star.read_particles(run / "particles.star")
    turned = rotations.angular_distance_deg(found["rotation"], poses[found["image_index"]], operators(SYMMETRY))
    return {
        "truth_A": fsc.resolution_at(curve, fsc.HALF, box, pixel),
        "truth_sum": float(curve.sum()),
        "half_A": record["result"]["resolution_A"],
        "error_deg": float(np.median(turned)),
        "iterations": record["iterations"][-1]["iteration"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--particles", type=int, default=700)
    parser.add_argument("--box", type=int, default=88)
    parser.add_argument("--pixel", type=float, default=2.2)
    parser.add_argument("--snr", type=float, default=0.018)
    parser.add_argument("--mass", type=float, default=0.5, help="of the belt, over that of the molecule")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--repeat", type=int, default=1)
    given = parser.parse_args()
    print("| molecule | references | FSC to truth 0.5 | sum | half maps 0.143 | poses off | iterations |")
    print("|---|---|---|---|---|---|---|")
    for seed in range(given.seed, given.seed + given.repeat):
        for kind, mass in (("in a belt", given.mass), ("alone", 0.0)):
            folder = given.out / f"{kind.split()[-1]}{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            made = simulate(
                SimulateOptions(
                    model=str(MODEL), particles=given.particles, box_px=given.box, pixel_size_A=given.pixel,
                    snr=given.snr, seed=seed, out=folder / "simulated",
                ),
                progress=lambda *_, **__: None,
            )  # fmt: skip
            if mass:
                add_belts(folder / "simulated", given.box, given.pixel, mass, seed)
            store = folder / "particles.zarr"
            import_particles(ImportOptions(source=made.particles_star, out=store), progress=lambda *_, **__: None)
            truth, poses = mrc.read_map(made.truth_map).array, star.read_particles(made.truth_star)["rotation"]
            for name, non_uniform in (("one filter", False), ("local filters", True)):
                run = folder / name.split()[0]
                refine(
                    RefineOptions(
                        store=store, reference=made.truth_map, initial_lowpass_A=30.0, mask_diameter_A=DIAMETER_A,
                        symmetry=SYMMETRY, non_uniform=non_uniform, out=run, seed=seed,
                    ),
                    progress=lambda *_, **__: None,
                )  # fmt: skip
                row = figures(run, truth, given.pixel, poses)
                print(
                    f"| {kind} | {name} | {row['truth_A']:.2f} A | {row['truth_sum']:.2f} | {row['half_A']:.2f} A | "
                    f"{row['error_deg']:.2f} deg | {row['iterations']} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
