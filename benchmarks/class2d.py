"""2D classification: what it keeps of a stack with junk, beside RELION's, and what mini-batches save.

    python benchmarks/class2d.py data FOLDER [--only SET ...]
    python benchmarks/class2d.py run FOLDER [--only NAME ...] [--repeat 3]
    python benchmarks/class2d.py report FOLDER --output docs/benchmarks-class2d.md

Particles are of beta-galactosidase (5A1A) without one chain, which has no symmetry, box 64 of 3.54 A, SNR 0.05; a fifth
is junk in equal parts: empty ice, halves (cut across the longest axis, centred on themselves), boxes between two
particles, heaps of four to six. `clean` has none. The other sets with junk are of other seeds and molecules (TRPV1
without one chain, the alpha-beta dimer of haemoglobin). Each run leaves FOLDER/results/NAME.json and is not repeated.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gemmi
import measured
import numpy as np
from measured import MIB, middle, table

from dcryo.data import mrc, star
from dcryo.data.classes import read_class_table
from dcryo.data.model import read_model
from dcryo.data.particles import Particles, identities
from dcryo.data.store import open_store
from dcryo.kernels import fft, rings, sampling, slices
from dcryo.kernels.ctf import ctf
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.masks import circle, cosine_edge
from dcryo.kernels.posterior import shift_phases
from dcryo.kernels.randomness import generator
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.shells import half_plane, unpack
from dcryo.steps import simulation
from dcryo.steps.simulation import Microscope

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BOX, SNR = 64, 0.05
KINDS = ("particles", "empty ice", "halves", "between two", "heaps")


class Molecule(NamedTuple):
    """A model without some of its chains, and how it is imaged: pixel size and diameter of the mask."""

    file: str
    without: str
    pixel_A: float
    diameter_A: float


class Set(NamedTuple):
    """Images of a molecule, of which a part is junk."""

    molecule: Molecule
    count: int
    junk: float
    seed: int


GALACTOSIDASE = Molecule("5a1a.pdb", "D", 3.54, 190)
CHANNEL = Molecule("3j5p.pdb", "D", 3.1, 170)
HAEMOGLOBIN = Molecule("2dhb.pdb", "", 1.3, 70)
SETS = {
    "junk": Set(GALACTOSIDASE, 3000, 0.2, 0),
    "junk-seed-1": Set(GALACTOSIDASE, 3000, 0.2, 1),
    "junk-seed-2": Set(GALACTOSIDASE, 3000, 0.2, 2),
    "junk-channel": Set(CHANNEL, 3000, 0.2, 0),
    "junk-channel-seed-1": Set(CHANNEL, 3000, 0.2, 1),
    "junk-haemoglobin": Set(HAEMOGLOBIN, 3000, 0.2, 0),
    "clean": Set(GALACTOSIDASE, 3000, 0.0, 0),
    "many": Set(GALACTOSIDASE, 20000, 0.0, 0),
    "fewer": Set(GALACTOSIDASE, 8000, 0.0, 0),
}
DCRYO = "dcryo class2d {data}.zarr --classes {classes} --mask-diameter {diameter:g} --out {out} --overwrite"
RELION = (
    "relion_refine --o ../relion/run --i particles.star --ctf --iter 25 --tau2_fudge 2 --particle_diameter 190 "
    "--K 20 --flatten_solvent --zero_mask --oversampling 1 --psi_step 12 --offset_range 5 --offset_step 2 --norm "
    "--scale --dont_combine_weights_via_disc --preread_images --pool 30 --j 1 --random_seed 1"
)
# name -> set, classes, more options
RUNS = {
    **{name: (name, 40, "") for name, of in SETS.items() if of.junk},
    "clean-20": ("clean", 20, ""),
    "fewer-mini": ("fewer", 30, ""),
    "fewer-full": ("fewer", 30, "--no-mini-batch"),
    "clean-20-seed-1": ("clean", 20, "--seed 1"),
    "many-mini": ("many", 50, ""),
    "many-full": ("many", 50, "--no-mini-batch"),
}


def microscope(molecule: Molecule) -> Microscope:
    return Microscope(BOX, molecule.pixel_A, 300.0, 2.7, 0.1, 8000.0, 20000.0, 300.0, 100.0, 1.5, 0.0, 100.0)


def density(folder: Path, molecule: Molecule) -> np.ndarray:
    structure = gemmi.read_structure(str(SHARED_DATA / "models" / molecule.file))
    for chain in molecule.without:
        structure[0].remove_chain(chain)
    path = folder / molecule.file
    structure.write_minimal_pdb(str(path))
    model = read_model(path)
    centred = model.position_A - model.position_A.mean(axis=0)
    return gaussian_density(centred, model.amplitude, model.bfactor_A2, BOX, molecule.pixel_A)


def make_set(folder: Path, name: str) -> None:
    """particles.star and its stack, truth.mrc, and kinds.npy: what each image is of."""
    here = folder / name
    here.mkdir(exist_ok=True)
    molecule, count, junk, seed = SETS[name]
    seen, pixel_A = microscope(molecule), molecule.pixel_A
    volume = density(folder, molecule)
    micrograph = simulation.micrograph_of(count, count // 100)
    truth = simulation.draw_truth(seen, seed, micrograph)
    pixels = simulation.image_pixels(BOX)
    pilot = simulation.signal(slices.prepare(volume, pixels.shell_max), seen, truth.take(slice(0, 256)))
    volume = volume * np.float32(math.sqrt(SNR / np.mean(simulation.pixel_variance(pilot, BOX))))
    whole = slices.prepare(volume, pixels.shell_max)
    half, off = cut(volume, pixels.shell_max)
    kinds = np.zeros(count, dtype=int)
    spoilt = generator(seed, "kinds", 0).permutation(count)[: int(junk * count)]
    kinds[spoilt] = 1 + np.arange(len(spoilt)) % 4
    colour, wide = simulation.noise_amplitude(seen), molecule.diameter_A / pixel_A

    def projection(of: np.ndarray, rotation: np.ndarray, shift_px: np.ndarray) -> np.ndarray:
        moved = shift_phases(pixels, shift_px[None], BOX, len(pixels.kx))
        return slices.extract(of, rotation[None], pixels, BOX) * moved

    def one(row: int) -> np.ndarray:
        rotation, shift, own = truth.rotation[row], -truth.origin_A[row] / pixel_A, generator(seed, "junk", row)
        if kinds[row] == 0:
            return projection(whole, rotation, shift)
        if kinds[row] == 1:
            return np.zeros((1, len(pixels.kx)), np.complex64)
        if kinds[row] == 2:
            return projection(half, rotation, shift - (rotation @ off)[:2])
        others = random_rotations(2 if kinds[row] == 3 else int(own.integers(4, 7)), own)
        if kinds[row] == 3:
            angle, apart = own.uniform(0, 2 * np.pi), 0.425 * wide * own.uniform(0.8, 1)
            side = apart * np.array([np.cos(angle), np.sin(angle)])
            return projection(whole, others[0], side) + projection(whole, others[1], -side)
        return sum(projection(whole, other, own.uniform(-0.4, 0.4, 2) * wide) for other in others)

    with mrc.StackWriter(here / "particles.mrcs", count, BOX, pixel_A, "float32") as writer:
        for row in range(count):
            transfer = ctf(
                pixels.kx, pixels.ky, BOX, pixel_A, truth.defocus_u_A[row], truth.defocus_v_A[row],
                truth.defocus_angle_deg[row], 300.0, 2.7, 0.1,
            )  # fmt: skip
            transform = unpack(pixels, (one(row) * transfer).astype(np.complex64), BOX)
            noise = generator(seed, "noise", row).standard_normal((BOX, BOX), dtype=np.float32)
            writer.write(row, fft.irfft2(transform + colour * fft.rfft2(noise), BOX))
    optics = {
        "group": 1, "voltage_kV": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1,
        "pixel_size_A": pixel_A, "box_px": BOX,
    }  # fmt: skip
    columns = {
        "image_path": np.full(count, "particles.mrcs"),
        "image_index": np.arange(count),
        "optics_row": np.zeros(count, dtype=int),
        "micrograph": np.array([f"m{number:05d}.mrc" for number in micrograph]),
        "defocus_u_A": truth.defocus_u_A,
        "defocus_v_A": truth.defocus_v_A,
        "defocus_angle_deg": truth.defocus_angle_deg,
    }
    particles = Particles(columns, {key: np.array([value]) for key, value in optics.items()})
    star.write_particles(here / "particles.star", particles)
    mrc.write_map(here / "truth.mrc", volume, pixel_A)
    np.save(here / "kinds.npy", kinds)


def cut(volume: np.ndarray, shell_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Half of a volume, across its longest axis, prepared for slices, and its centre of mass (x, y, z) in pixels."""
    axes = [axis - BOX // 2 for axis in np.mgrid[:BOX, :BOX, :BOX]][::-1]
    weight = np.clip(volume, 0, None)
    longest = axes[int(np.argmax([np.sum(weight * axis**2) for axis in axes]))]
    half = (volume * cosine_edge(longest.astype(float), 0, 2)).astype(np.float32)
    weight = np.clip(half, 0, None)
    centre = np.array([np.sum(weight * axis) / np.sum(weight) for axis in axes])
    return slices.prepare(half, shell_max), centre


def make_data(folder: Path, only: Sequence[str] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in only or SETS:
        if not (folder / f"{name}.zarr").exists():
            make_set(folder, name)
            words = ["dcryo", "import", f"{name}/particles.star", "--out", f"{name}.zarr", "--overwrite"]
            measured.run(words, folder, "import.log")


def correlations(images: np.ndarray, shells: np.ndarray, truth: np.ndarray, wide_px: float) -> np.ndarray:
    """Correlation of each class image with the projection of the truth that is most like it, (K,).

    Over views 7 degrees apart, all in-plane angles and shifts of up to 3 px, under the mask and up to the shell to
    which the class is resolved.
    """
    order = 3
    views = sampling.pixel_count(order)
    rotations = sampling.rotation_matrices(order, np.arange(views), np.zeros(views, int), np.eye(3))
    pixels = half_plane((BOX - 1) // 2)
    mask = circle(BOX, wide_px, 3)
    cuts = slices.extract(slices.prepare(truth, pixels.shell_max), rotations, pixels, BOX)
    projections = fft.irfft2(unpack(pixels, cuts, BOX), BOX) * mask
    found = []
    for image, shell in zip(images * mask, shells, strict=True):
        of = rings.rings(BOX, max(int(shell), 4), BOX)
        root = np.sqrt(of.area)
        sampled, own = rings.sample(projections, of), rings.sample(image[None], of)
        sampled[..., 0], own[..., 0] = 0, 0
        lengths = np.sqrt(np.sum(np.abs(sampled) ** 2 * of.area, axis=(0, 2)) * np.sum(np.abs(own) ** 2 * of.area))
        series, best = rings.series(sampled, of, of.orders) * root, 0.0
        for x in range(-3, 4):
            for y in range(-3, 4):
                moved = own * np.exp(-2j * np.pi * (x * of.kx + y * of.ky) / BOX)[:, None]
                product = (rings.series(moved.astype(np.complex64), of, of.orders) * root).conj() * series
                turned = np.fft.irfft(product.sum(axis=2), n=4 * of.orders, axis=0) * 4 * of.orders / of.angles / 2
                best = max(best, float(np.max(turned.max(axis=0) / lengths)))
        found.append(best)
    return np.array(found)


def run_dcryo(folder: Path, name: str) -> dict:
    data, classes, more = RUNS[name]
    diameter_A = SETS[data].molecule.diameter_A
    words = DCRYO.format(data=data, classes=classes, out=f"run-{name}", diameter=diameter_A).split() + more.split()
    return {"measured": measured.run(words, folder, f"{name}.log")} | scored(folder, name)


def scored(folder: Path, name: str) -> dict:
    """Figures of a run that is there, and of what is selected from it."""
    data = RUNS[name][0]
    molecule = SETS[data].molecule
    wide_px, side_A = molecule.diameter_A / molecule.pixel_A, BOX * molecule.pixel_A
    table = read_class_table(folder / f"run-{name}" / "classes.star")
    stack = mrc.open_stack(folder / f"run-{name}" / "classes.mrcs")
    truth = mrc.read_map(folder / data / "truth.mrc").array
    agreement = correlations(stack.read(np.arange(stack.n)), side_A / table.resolution_A, truth, wide_px)
    kept = table.kept
    weights = table.particles[kept] / table.particles[kept].sum()
    found: dict = {
        "correlation_median": float(np.median(agreement[kept])),
        "correlation_least": float(agreement[kept].min()),
        "resolution_A": float(np.sum(weights * table.resolution_A[kept])),
        "kept_classes": int(kept.sum()),
        "iterations": len(json.loads((folder / f"run-{name}" / "run.json").read_text())["iterations"]),
    }
    if SETS[data].junk:
        words = ["dcryo", "select", f"run-{name}", "--auto", "--out", f"{name}-selected.zarr", "--overwrite"]
        measured.run(words, folder, f"{name}-select.log")
        kinds, rows = np.load(folder / data / "kinds.npy"), open_store(folder / f"{name}-selected.zarr").rows()
        taken = np.zeros(len(kinds), bool)
        taken[rows] = True
        found["kept_of_kind"] = {kind: float(taken[kinds == number].mean()) for number, kind in enumerate(KINDS)}
        found["good_kept"], found["junk_gone"] = float(taken[kinds == 0].mean()), float(1 - taken[kinds > 0].mean())
    return found


def run_relion(folder: Path) -> dict:
    (folder / "relion").mkdir(exist_ok=True)
    found: dict = {"measured": measured.run(RELION.split(), folder / "clean", "relion.log")}
    blocks = star.read_blocks(folder / "relion" / "run_it025_model.star")
    share = blocks["model_classes"].columns["rlnClassDistribution"].astype(float)
    resolution = blocks["model_classes"].columns["rlnEstimatedResolution"].astype(float)
    stack = mrc.open_stack(folder / "relion" / "run_it025_classes.mrcs")
    used = share > 0.1 / len(share)
    truth = mrc.read_map(folder / "clean" / "truth.mrc").array
    # Compared at the resolution of dcryo's classes too, which its own estimate may not reach.
    wide_px, side_A = GALACTOSIDASE.diameter_A / GALACTOSIDASE.pixel_A, BOX * GALACTOSIDASE.pixel_A
    agreement = correlations(stack.read(np.arange(stack.n)), side_A / resolution, truth, wide_px)
    at_18 = correlations(stack.read(np.arange(stack.n)), np.full(stack.n, side_A / 18), truth, wide_px)
    return found | {
        "correlation_median": float(np.median(agreement[used])),
        "correlation_least": float(agreement[used].min()),
        "correlation_at_18_A": float(np.average(at_18[used], weights=share[used])),
        "resolution_A": float(np.average(resolution[used], weights=share[used])),
        "kept_classes": int(used.sum()),
        "iterations": 25,
    }


def overlap(folder: Path, first: str, second: str) -> float:
    """Part of the particles that two runs put together alike: of pairs in one class in either, those in one in both."""
    found = []
    for name in (first, second):
        particles = star.read_particles(folder / f"run-{name}" / "particles.star")
        found.append(particles["class_number"][np.argsort(identities(particles))])
    counts = np.zeros((found[0].max() + 1, found[1].max() + 1))
    np.add.at(counts, (found[0], found[1]), 1)
    return float(counts.max(axis=1).sum() / counts.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["data", "run", "report"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.command == "data":
        make_data(options.folder, options.only)
    elif options.command == "run":
        results = options.folder / "results"
        for repeat in range(1, options.repeat + 1):
            for name in RUNS:
                if not options.only or name in options.only:
                    measured.once(results / f"{name}.{repeat}.json", lambda name=name: run_dcryo(options.folder, name))
        if not options.only or "relion" in options.only:
            measured.once(results / "relion.1.json", lambda: run_relion(options.folder))
    else:
        text = report(options.folder)
        if options.output:
            options.output.write_text(text)
        else:
            print(text)


def report(folder: Path) -> str:
    rows = []
    for name in ("relion", *RUNS):
        runs = [measured.load(path) for path in sorted((folder / "results").glob(f"{name}.*.json"))]
        if not runs:
            continue
        one = runs[0]
        memory = max(run["measured"]["tree_bytes"] for run in runs) / MIB
        rows.append(
            [
                name, len(runs), middle(run["measured"]["cpu_s"] for run in runs), one["iterations"], f"{memory:.0f}",
                one["kept_classes"], f"{one['resolution_A']:.1f}", f"{one['correlation_median']:.3f}",
                f"{one['correlation_least']:.3f}",
            ]
        )  # fmt: skip
    heading = ["run", "repeats", "CPU s", "iterations", "MiB", "classes kept", "resolution A", "correlation", "least"]
    paths = sorted((folder / "results").glob("*.json"))
    where = measured.described(measured.load(path)["machine"] for path in paths)
    parts = ["# 2D classification\n", f"Written by `benchmarks/class2d.py` on {where}.\n"]
    parts.append(
        "`clean-20` is of the same 3,000 particles as `relion`, where that was run to its end. Resolution is each "
        "program's own, weighted by the classes' sizes; the correlation is that of a class with the projection of the "
        "truth that is most like it, up to that resolution: the median and the least of the classes that are kept.\n"
    )
    parts.append(table(heading, rows))
    junk = []
    for name, of in SETS.items():
        path = folder / "results" / f"{name}.1.json"
        if of.junk and path.exists():
            found = measured.load(path)
            parts_kept = [f"{100 * part:.0f}" for part in found["kept_of_kind"].values()][1:]
            junk.append([name, f"{100 * found['good_kept']:.1f}", f"{100 * found['junk_gone']:.1f}", *parts_kept])
    parts.append(
        "\nAfter `select --auto`, in percent: the particles that are kept, the junk that is gone, and what is kept of "
        "each kind of it. The weights of `kernels/ranking.py` were chosen on `junk` and `junk-channel`.\n"
    )
    parts.append(table(["set", "particles kept", "junk gone", *KINDS[1:]], junk))
    if (folder / "run-clean-20-seed-1" / "particles.star").exists():
        parts.append(f"\nSame sets from another seed: {100 * overlap(folder, 'clean-20', 'clean-20-seed-1'):.0f} %.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
