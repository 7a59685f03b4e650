"""3D classification of mixtures with known truth, beside RELION's, and of real particles.

    python benchmarks/class3d.py FOLDER data         # makes the mixtures and their consensus refinements
    python benchmarks/class3d.py FOLDER sort         # sorts them in several ways
    python benchmarks/class3d.py FOLDER relion       # relion_refine, 3 classes, on the same particles
    python benchmarks/class3d.py FOLDER real         # beta-galactosidase of the shared data
    python benchmarks/class3d.py FOLDER report       # the tables of docs/benchmarks-class3d.md

`swing`: three of the four chains of beta-galactosidase, which have no symmetry; one of them turned by 15 degrees about a
hinge in its interface in 30 percent; `lacking`: without that chain in 10 percent. 4,000 particles at an SNR of 0.1, box
64 of 3.54 A.
"""

import argparse
import json
import time
from pathlib import Path

import gemmi
import measured
import numpy as np
from scipy import optimize

from dcryo.data import mrc, star
from dcryo.data.particles import Particles
from dcryo.euler import matrix_from_rotvec
from dcryo.kernels import fsc, masks, slices
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.randomness import generator
from dcryo.steps import simulation
from dcryo.steps.simulation import Microscope

SHARED = Path("../shared/data").resolve()
MODEL = SHARED / "models/5a1a.pdb"
BOX, PIXEL_A, COUNT, SNR = 64, 3.54, 4000, 0.1
MIXTURES = {"swing": (("whole", 0.7), ("turned", 0.3)), "lacking": (("whole", 0.9), ("two", 0.1))}
DIAMETER_A, CHUNK = 190.0, 64
MICROSCOPE = Microscope(BOX, PIXEL_A, 300.0, 2.7, 0.1, 8000.0, 20000.0, 300.0, 100.0, 2.0, 0.0, 100.0)


def densities() -> dict[str, np.ndarray]:
    """Maps of three chains, of them with one turned about a hinge in its interface, and without that one."""
    model = gemmi.read_structure(str(MODEL))[0]
    model.remove_waters()
    model.remove_chain("D")
    sites = list(model.all())
    place = np.array([site.atom.pos.tolist() for site in sites])
    place -= place.mean(axis=0)
    moving = np.array([site.chain.name == "C" for site in sites])
    rest, own = place[~moving], place[moving]
    # The hinge is where the chain touches the others; it swings about an axis that lies across it.
    near = np.array([np.min(np.sum((rest[::5] - one) ** 2, axis=1)) < 8**2 for one in own[::5]])
    hinge = own[::5][near].mean(axis=0)
    axis = np.cross(own.mean(axis=0) - hinge, [0.0, 0.0, 1.0])
    turned = place.copy()
    turned[moving] = hinge + (own - hinge) @ matrix_from_rotvec(np.deg2rad(15) * axis / np.linalg.norm(axis)).T
    amplitude = np.array([site.atom.element.c4322.a for site in sites])
    bfactor = np.array([site.atom.element.c4322.b for site in sites]) + 60.0

    def density(places: np.ndarray, kept: np.ndarray) -> np.ndarray:
        return gaussian_density(places[kept], amplitude[kept], bfactor[kept], BOX, PIXEL_A)

    every = np.ones(len(place), dtype=bool)
    return {"whole": density(place, every), "turned": density(turned, every), "two": density(place, ~moving)}


def make_data(folder: Path, seed: int = 7) -> None:
    """Stores of the mixtures, the truth of each, and a consensus refinement of each."""
    folder.mkdir(parents=True, exist_ok=True)
    maps = densities()
    micrograph = simulation.micrograph_of(COUNT, COUNT // 100)
    truth = simulation.draw_truth(MICROSCOPE, seed, micrograph)
    some = truth.take(slice(0, 256))
    signal = simulation.signal(_prepared(maps["whole"]), MICROSCOPE, some)
    factor = np.float32(np.sqrt(SNR / simulation.pixel_variance(signal, BOX).mean()))
    for name, density in maps.items():
        mrc.write_map(folder / f"{name}.mrc", factor * density, PIXEL_A)
    for name, parts in MIXTURES.items():
        out = folder / name
        if (folder / f"{name}.zarr").exists():
            continue
        out.mkdir(exist_ok=True)
        shares = np.array([share for _, share in parts])
        number = generator(seed, f"mixture {name}", 0).choice(len(parts), size=COUNT, p=shares)
        prepared = [_prepared(factor * maps[part]) for part, _ in parts]
        with mrc.StackWriter(out / "particles.mrcs", COUNT, BOX, PIXEL_A, "float32") as writer:
            for first in range(0, COUNT, CHUNK):
                rows = slice(first, min(first + CHUNK, COUNT))
                made = [simulation.images(one, MICROSCOPE, truth.take(rows), first, seed, 1.0) for one in prepared]
                chosen = number[rows]
                writer.write(first, np.stack([made[k][i] for i, k in enumerate(chosen)]))
        _tables(out, truth, micrograph, number)
        measured.run(f"dcryo import {name}/particles.star --out {name}.zarr --overwrite".split(), folder, "data.log")
        words = (
            f"dcryo refine {name}.zarr --reference whole.mrc --initial-lowpass 40 --mask-diameter {DIAMETER_A:g} "
            f"--seed 1 --out {name}-consensus --overwrite"
        )
        measured.run(words.split(), folder, "data.log")


def _prepared(density: np.ndarray) -> np.ndarray:
    return slices.prepare(density, simulation.image_pixels(BOX).shell_max)


def _tables(out: Path, truth: simulation.Truth, micrograph: np.ndarray, number: np.ndarray) -> None:
    n = len(number)
    blank = Particles(
        columns={
            "image_path": np.full(n, "particles.mrcs"),
            "image_index": np.arange(n),
            "optics_row": np.zeros(n, dtype=np.int32),
            "micrograph": np.array([f"micrograph{one + 1:05d}.mrc" for one in micrograph]),
            "defocus_u_A": truth.defocus_u_A,
            "defocus_v_A": truth.defocus_v_A,
            "defocus_angle_deg": truth.defocus_angle_deg,
        },
        optics={
            "name": np.array(["opticsGroup1"]),
            "group": np.array([1]),
            "voltage_kV": np.array([MICROSCOPE.voltage_kV]),
            "spherical_aberration_mm": np.array([MICROSCOPE.spherical_aberration_mm]),
            "amplitude_contrast": np.array([MICROSCOPE.amplitude_contrast]),
            "pixel_size_A": np.array([PIXEL_A]),
            "box_px": np.array([BOX]),
        },
    )
    star.write_particles(out / "particles.star", blank, None)
    known = blank.replace(
        rotation=truth.rotation, origin_A=truth.origin_A, half=truth.half, class_number=(number + 1).astype(np.int32)
    )
    star.write_particles(out / "truth.star", known, None)


def sorted_right(found: Particles, truth: Particles) -> tuple[float, list[int]]:
    """Part of the particles whose class is the right one, where each class found stands for the true one that most of it
    is of; and which that is."""
    order = np.argsort(found["image_index"])
    true = truth["class_number"][np.sort(found["image_index"])]
    own = found["class_number"][order]
    count, kinds = int(own.max()), int(true.max())
    table = np.bincount((own - 1) * kinds + true - 1, minlength=count * kinds).reshape(count, kinds)
    return float(table.max(axis=1).sum() / len(own)), (table.argmax(axis=1) + 1).tolist()


def against(volume: np.ndarray, truth: np.ndarray) -> float:
    """Resolution at which a map has an FSC of 0.5 with the truth, under a soft sphere."""
    mask = masks.sphere(BOX, DIAMETER_A / PIXEL_A, 3)
    return fsc.resolution_at(fsc.shell_correlation(volume * mask, truth * mask), fsc.HALF, BOX, PIXEL_A)
