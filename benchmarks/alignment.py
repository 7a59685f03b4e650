"""Alignment of maps and symmetry axes: how often the truth is found, how nearly, and what it costs.

    python benchmarks/alignment.py [--cases 100] [--output docs/benchmarks-alignment.md]

Maps of 64 px and 4 A are made of atoms that were turned, shifted by up to 15 percent of the box and, half of the
time, inverted; white noise is added to both maps of a pair (to the one map, for axes) so that each has an FSC of a
half with its truth at a given resolution. An alignment fails where the moved map, without noise, correlates less than
0.9 with the truth, shells whitened; axes fail where one is off by more than 5 degrees. Needs ../shared/data beside
the checkout.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measured import table

from dcryo.data.model import read_model
from dcryo.kernels import fsc
from dcryo.kernels.alignment import align, moved
from dcryo.kernels.axes import symmetry_axes, symmetry_table
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.phantom import phantom
from dcryo.kernels.randomness import generator
from dcryo.kernels.rotations import angle_between_deg, angular_distance_deg, random_rotations
from dcryo.kernels.symmetry import operators

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BOX, PIXEL = 64, 4.0
OFF_CENTRE = 0.15
# Resolution at which each map has an FSC of a half with the truth, and the resolution that the search is told; share of
# the cases.
NOISE = {(20.0, 20.0): 1.0, (30.0, 20.0): 0.3, (40.0, 40.0): 0.3}
SYMMETRIC = (("C2", 80), ("C4", 70), ("C7", 70), ("D2", 80), ("D7", 80), ("T", 70), ("O", 70), ("I1", 90))


class Atoms(NamedTuple):
    position_A: np.ndarray
    amplitude: np.ndarray
    bfactor_A2: np.ndarray
    symmetry: str


def molecules() -> dict[str, Atoms]:
    def of(found, symmetry: str, stretch: tuple = (1.0, 1.0, 1.0)) -> Atoms:  # type: ignore[no-untyped-def]
        # At 20 A every sixth atom, alike and blurred, will do.
        place = found.position_A[::6] * np.array(stretch)
        return Atoms(place, np.ones((len(place), 1)), np.full((len(place), 1), 300.0), symmetry)

    models = SHARED_DATA / "models"
    return {
        "phantom, C1": of(phantom(operators("C1"), 80, seed=5), "C1"),
        "rod, three times as long as wide, C1": of(phantom(operators("C1"), 70, seed=3), "C1", (0.45, 0.35, 1.3)),
        "beta-galactosidase, D2": of(read_model(models / "5a1a.pdb"), "D2"),
        "TRPV1, C4": of(read_model(models / "3j5p.pdb"), "C4"),
        "apoferritin, O, hollow": of(read_model(models / "7a4m.cif", assembly="1"), "O"),
        "phantom, I1": of(phantom(operators("I1"), 100, seed=2), "I1"),
    }


def density(atoms: Atoms, turn: np.ndarray, shift_px: np.ndarray) -> np.ndarray:
    place = atoms.position_A @ turn.T + shift_px * PIXEL
    return gaussian_density(place, atoms.amplitude, atoms.bfactor_A2, BOX, PIXEL)


def noisy(volume: np.ndarray, resolution_A: float, random: np.random.Generator) -> np.ndarray:
    """With white noise of three times the signal's power at a resolution."""
    power = 3 * fsc.shell_power(volume)[round(BOX * PIXEL / resolution_A)]
    return volume + (random.standard_normal(volume.shape) * np.sqrt(power / BOX**3)).astype(np.float32)


def shift(random: np.random.Generator) -> np.ndarray:
    direction = random.standard_normal(3)
    return direction / np.linalg.norm(direction) * random.random() * OFF_CENTRE * BOX


def aligned(name: str, atoms: Atoms, cases: int, noise_A: float, resolution_A: float) -> tuple:
    random = generator(1, f"align {name}", round(noise_A))
    shell = int(BOX * PIXEL / resolution_A)
    agreed, hands, angles, shifts, cost = [], 0, [], [], 0.0
    for _ in range(cases):
        first, turn = random_rotations(2, random)
        sign, offset = random.choice([-1, 1]), shift(random)
        there, truth = density(atoms, first, np.zeros(3)), density(atoms, sign * turn @ first, offset)
        began = time.process_time()
        found = align(noisy(there, noise_A, random), noisy(truth, noise_A, random), shell, hands=True)
        cost += time.process_time() - began
        curve = fsc.shell_correlation(moved(there, found), truth)[1 : shell + 1]
        agreed.append(np.average(curve, weights=np.arange(1, shell + 1) ** 2))
        hands += found.mirrored != (sign < 0)
        if agreed[-1] > 0.9:
            shifts.append(np.linalg.norm(found.shift_px - offset))
            if atoms.symmetry == "C1":
                angles.append(angle_between_deg(found.rotation, turn))
            elif atoms.symmetry == "I1":
                angles.append(angular_distance_deg(found.rotation @ first, turn @ first, operators("I1")))
    failed = sum(value < 0.9 for value in agreed)
    angle = f"{np.median(angles):.2f}, {np.max(angles):.2f}" if angles else ""
    return (
        name, f"{noise_A:g}", f"{resolution_A:g}", f"{failed} of {cases}", hands, f"{min(agreed):.3f}", angle,
        f"{np.median(shifts):.2f}, {np.max(shifts):.2f}", f"{cost / cases:.2f}",
    )  # fmt: skip


def axes_found(symmetry: str, radius_A: float, cases: int, noise_A: float) -> tuple:
    group = operators(symmetry)
    found = phantom(group, radius_A, seed=4)
    atoms = Atoms(found.position_A, np.ones_like(found.amplitude), np.full_like(found.amplitude, 300.0), symmetry)
    random = generator(1, f"axes {symmetry}", round(noise_A))
    angles, shifts, agreements, cost = [], [], [], 0.0
    for _ in range(cases):
        turn, offset = random_rotations(1, random)[0], shift(random) / 2
        volume = noisy(density(atoms, turn.T, offset), noise_A, random)
        began = time.process_time()
        axes = symmetry_axes(volume, group, int(BOX * PIXEL / 25))
        cost += time.process_time() - began
        mine, true = (rotation.T @ group @ rotation for rotation in (axes.rotation, turn))
        angles.append(angle_between_deg(mine[:, None], true[None]).min(axis=1).max())
        off = -axes.rotation.T @ axes.shift_px - offset
        shifts.append(np.linalg.norm(off - turn.T @ group.mean(axis=0) @ turn @ off))
        agreements.append(axes.agreement)
    failed = sum(angle > 5 for angle in angles)
    return (
        symmetry, f"{noise_A:g}", f"{failed} of {cases}", f"{np.median(angles):.2f}, {np.max(angles):.2f}",
        f"{np.median(shifts):.2f}, {np.max(shifts):.2f}", f"{np.median(agreements):.2f}", f"{cost / cases:.2f}",
    )  # fmt: skip


def groups(name: str, atoms: Atoms, noise_A: float | None) -> tuple:
    random = generator(1, f"groups {name}", 0)
    volume = density(atoms, random_rotations(1, random)[0], shift(random) / 2)
    if noise_A:
        volume = noisy(volume, noise_A, random)
    agreements = symmetry_table(volume, int(BOX * PIXEL / 25))
    return name, f"{noise_A:g}" if noise_A else "none", *(f"{axes.agreement:.2f}" for axes in agreements.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    head = (
        "molecule", "FSC 0.5 at (A)", "search to (A)", "failed", "wrong hands", "worst agreement",
        "angle off (deg): median, worst", "shift off (px)", "CPU s",
    )  # fmt: skip
    rows = []
    for (noise_A, resolution_A), share in NOISE.items():
        for name, atoms in molecules().items():
            rows.append(aligned(name, atoms, round(share * arguments.cases), noise_A, resolution_A))
            print(*rows[-1], sep=", ", flush=True)
    text = "## Maps brought onto one another\n" + table(head, rows)
    head = (
        "group",
        "FSC 0.5 at (A)",
        "failed",
        "axes off (deg): median, worst",
        "centre off (px)",
        "agreement",
        "CPU s",
    )
    rows = []
    for noise_A in (25.0, 35.0):
        for symmetry, radius_A in SYMMETRIC:
            rows.append(axes_found(symmetry, radius_A, round(0.3 * arguments.cases), noise_A))
            print(*rows[-1], sep=", ", flush=True)
    text += "\n## Axes\n" + table(head, rows)
    names = tuple(symmetry_table(np.random.default_rng(0).random((8, 8, 8)), 3))
    rows = [groups(*one, noise) for one in molecules().items() for noise in (None, 25.0)]
    text += "\n## Agreement with each group, to 25 A\n" + table(("molecule", "FSC 0.5 at (A)", *names), rows)
    print(text)
    if arguments.output:
        arguments.output.write_text(f"# Alignment of maps and symmetry axes\n\n{text}")


if __name__ == "__main__":
    main()
