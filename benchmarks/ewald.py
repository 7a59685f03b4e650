"""Correction for the curvature of the Ewald sphere: a simulated capsid, with the right hand, the wrong one and none.

The capsid is a shell of 180 pseudo-proteins in icosahedral symmetry, made here; its images feel the curvature. Each
reconstruction uses the true poses, and its map is compared with the truth.

    python benchmarks/ewald.py --out DIR [--diameter 700] [--box 400] [--pixel-size 1.8] [--particles 300]
                               [--symmetry I1] [--snr 0.1] [--voltage 300] [--relion]

A subgroup of I1 (D2, C2) in place of I1 makes less use of the particles and takes a part of the time.
"""

import argparse
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dcryo.data import mrc
from dcryo.jobs.exchange import ImportOptions, import_particles
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels import fsc, masks
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.phantom import phantom
from dcryo.kernels.symmetry import operators

# Directions of the proteins of an asymmetric unit, away from the axes of I1, and the part of the shell that they fill.
DIRECTIONS = np.array([[0.20, 0.12, 0.97], [0.42, 0.05, 0.90], [0.33, 0.38, 0.86]])
THICKNESS = 0.2


def capsid(diameter_A: float, box: int, pixel_A: float) -> np.ndarray:
    """A shell of 180 proteins, three to each asymmetric unit, no two of which are alike: (D, D, D) float32."""
    group, place, amplitude, bfactor = operators("I1"), [], [], []
    half = THICKNESS * diameter_A / 4
    for seed, direction in enumerate(DIRECTIONS):
        atoms = phantom(np.eye(3)[None], half, seed)
        centre = (diameter_A / 2 - half) * direction / np.linalg.norm(direction)
        place.append(np.concatenate([(atoms.position_A + centre) @ turn.T for turn in group]))
        amplitude.append(np.tile(atoms.amplitude, (len(group), 1)))
        bfactor.append(np.tile(atoms.bfactor_A2, (len(group), 1)))
    return gaussian_density(np.concatenate(place), np.concatenate(amplitude), np.concatenate(bfactor), box, pixel_A)


def processor_time_s(work: Callable[[], object], who: int = resource.RUSAGE_SELF) -> float:
    before = resource.getrusage(who)
    work()
    after = resource.getrusage(who)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--diameter", type=float, default=700.0)
    parser.add_argument("--box", type=int, default=400)
    parser.add_argument("--pixel-size", type=float, default=1.8)
    parser.add_argument("--particles", type=int, default=300)
    parser.add_argument("--symmetry", default="I1")
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--voltage", type=float, default=300.0)
    parser.add_argument("--relion", action="store_true", help="run relion_reconstruct --ewald too")
    given = parser.parse_args()
    out, box, pixel = given.out, given.box, given.pixel_size
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "simulated" / "truth.star").exists():
        mrc.write_map(out / "capsid.mrc", capsid(given.diameter, box, pixel), pixel)
        simulate(
            SimulateOptions(
                model=str(out / "capsid.mrc"), out=out / "simulated", particles=given.particles, snr=given.snr,
                voltage_kV=given.voltage, defocus_min_A=5000.0, defocus_max_A=15000.0, noise_bfactor_A2=0.0,
                ewald=True, overwrite=True,
            )
        )  # fmt: skip
        import_particles(
            ImportOptions(source=out / "simulated" / "truth.star", out=out / "particles.zarr", overwrite=True)
        )
    truth = mrc.read_map(out / "simulated" / "truth.mrc").array
    mask = masks.sphere(box, given.diameter / pixel, 6)
    print(f"{given.diameter:g} A at {given.voltage:g} kV, box {box} px of {pixel:g} A, {given.particles} particles, "
          f"SNR {given.snr:g}, reconstructed in {given.symmetry}")  # fmt: skip
    print("| correction | half maps 0.143 | truth 0.5 | truth at 6, 5, 4.5, 4 A, Nyquist | sum of that FSC | s |")
    print("|---|---|---|---|---|---|")

    def row(name: str, found: np.ndarray, halves: str, seconds: float) -> None:
        curve = fsc.shell_correlation(found * mask, truth * mask)
        at = ", ".join(f"{curve[round(box * pixel / d)]:.3f}" for d in (6, 5, 4.5, 4, 2.02 * pixel) if d >= 2 * pixel)
        resolution = fsc.resolution_at(curve, 0.5, box, pixel)
        print(f"| {name} | {halves} | {resolution:.2f} A | {at} | {curve.sum():.2f} | {seconds:.0f} |", flush=True)

    cases: dict[str, tuple[dict[str, object], list[str]]] = {
        "none": ({}, []),
        "right hand": ({"ewald": True}, ["--ewald"]),
        "wrong hand": ({"ewald": True, "ewald_hand": -1}, ["--ewald", "--reverse_curvature"]),
    }
    for name, (words, of_relion) in cases.items():
        made = []
        options = ReconstructOptions(
            store=out / "particles.zarr", out=out / name.replace(" ", "_"), symmetry=given.symmetry,
            mask_diameter_A=given.diameter, workers=1, overwrite=True, **words,
        )  # fmt: skip
        seconds = processor_time_s(lambda options=options, made=made: made.append(reconstruct(options)))
        row(name, made[0].map, f"{made[0].resolution_A:.2f} A", seconds)
        if given.relion:
            if "--ewald" in of_relion:
                of_relion = [*of_relion, "--mask_diameter", str(given.diameter)]
            command = ["relion_reconstruct", "--i", "truth.star", "--o", f"../relion_{name.replace(' ', '_')}.mrc",
                       "--ctf", "--sym", given.symmetry, *of_relion]  # fmt: skip
            seconds = processor_time_s(
                lambda command=command: subprocess.run(command, cwd=out / "simulated", check=True, capture_output=True),
                resource.RUSAGE_CHILDREN,
            )
            row(f"RELION, {name}", mrc.read_map(out / f"relion_{name.replace(' ', '_')}.mrc").array, "", seconds)


if __name__ == "__main__":
    main()
