"""3D classification of mixtures with known truth, beside RELION's, and of real particles.

    python benchmarks/class3d.py FOLDER data         # makes the mixtures and their consensus refinements
    python benchmarks/class3d.py FOLDER sort         # sorts them in several ways
    python benchmarks/class3d.py FOLDER relion       # relion_refine, 3 classes, on the same particles
    python benchmarks/class3d.py FOLDER labels       # reconstructs them with true labels
    python benchmarks/class3d.py FOLDER real         # beta-galactosidase of the shared data, and what RELION kept of it
    python benchmarks/class3d.py FOLDER report       # the tables of docs/benchmarks-class3d.md

`swing`: three of the four chains of beta-galactosidase, which have no symmetry; one of them turned by 15 degrees about
a hinge in its interface in 30 percent; `lacking`: without that chain in 10 percent. 4,000 particles at an SNR of 0.1,
box 64 of 3.54 A.
"""

import argparse
import json
import shutil
from pathlib import Path

import gemmi
import measured
import numpy as np
from relion import TO_RELIONS_FRAME, micrographs, real_particles

from dcryo.data import mrc, star
from dcryo.data.model import read_model
from dcryo.data.particles import Particles
from dcryo.data.store import open_store, select
from dcryo.euler import matrix_from_rotvec
from dcryo.kernels import alignment, fsc, masks, slices
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.randomness import generator
from dcryo.steps import simulation
from dcryo.steps.simulation import Microscope

SHARED = Path("../shared/data").resolve()
MODEL = SHARED / "models/5a1a.pdb"
BOX, PIXEL_A, COUNT, SNR = 64, 3.54, 4000, 0.1
MIXTURES = {"swing": (("whole", 0.7), ("turned", 0.3)), "lacking": (("whole", 0.9), ("two", 0.1))}
DIAMETER_A, CHUNK = 190.0, 64
# Pixel of the micrographs that the real picks are counted in; one is kept that lies so near to a kept one.
REAL_MOVIE_PIXEL_A, KEPT_WITHIN_A = 0.885, 40.0
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
    """Part of the particles whose class is the right one, where each class found stands for the true one that most of
    it is of; and which that is."""
    order = np.argsort(found["image_index"])
    true = truth["class_number"][np.sort(found["image_index"])]
    own = found["class_number"][order]
    count, kinds = int(own.max()), int(true.max())
    table = np.bincount((own - 1) * kinds + true - 1, minlength=count * kinds).reshape(count, kinds)
    return float(table.max(axis=1).sum() / len(own)), (table.argmax(axis=1) + 1).tolist()


def against(volume: np.ndarray, truth: np.ndarray) -> float:
    """Resolution at which a map has an FSC of 0.5 with the truth that it is brought onto, under a soft sphere."""
    volume = alignment.moved(volume, alignment.align(volume, truth, BOX // 3, hands=False))
    mask = masks.sphere(BOX, DIAMETER_A / PIXEL_A, 3)
    return fsc.resolution_at(fsc.shell_correlation(volume * mask, truth * mask), fsc.HALF, BOX, PIXEL_A)


RUNS = {
    "swing, 2 classes": ("swing-consensus", "--classes 2"),
    "swing, 3 classes": ("swing-consensus", "--classes 3"),
    "lacking, 2 classes": ("lacking-consensus", "--classes 2"),
    "lacking, 3 classes": ("lacking-consensus", "--classes 3"),
    "swing, 2 classes, poses local": ("swing-consensus", "--classes 2 --poses local"),
    "swing, 2 classes, poses global from one map": (
        "swing.zarr", "--classes 2 --poses global --reference swing-consensus/map.mrc"
    ),
    "swing, 3 classes, poses global from one map": (
        "swing.zarr", "--classes 3 --poses global --reference swing-consensus/map.mrc"
    ),
}  # fmt: skip
RELION = {
    "poses fixed": "--skip_align",
    "poses global": "--oversampling 1 --healpix_order 2 --offset_range 5 --offset_step 2",
}
RELION_COMMAND = (
    "relion_refine --i swing-relion/particles.star --ref swing-consensus/map.mrc --o swing-relion/{out}/run --K 3 "
    "--iter {iterations} "
    f"--ini_high 40 --tau2_fudge 4 --particle_diameter {DIAMETER_A:g} --flatten_solvent --zero_mask --ctf --norm "
    "--scale --sym C1 --pad 2 --firstiter_cc --dont_combine_weights_via_disc --j 2 --random_seed {seed} {how}"
)


def keep(folder: Path, name: str, found: dict) -> None:
    path = folder / "class3d.json"
    measured.save(path, (measured.load(path) if path.is_file() else {}) | {name: found})


def sort(folder: Path, seeds: int) -> None:
    """Every run of RUNS with some seeds."""
    for name, (source, more) in RUNS.items():
        for seed in range(seeds):
            out = f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            words = (
                f"dcryo class3d {source} {more} --mask-diameter {DIAMETER_A:g} --seed {seed} --out {out} --overwrite"
            )
            found = measured.run(words.split(), folder, f"{out}.log")
            keep(folder, f"{name}/{seed}", found | judged(folder, out, name.split(",")[0]))


def judged(folder: Path, out: str, mixture: str) -> dict:
    """What a classification is worth beside the truth."""
    particles, truth = (star.read_particles(folder / of) for of in (f"{out}/particles.star", f"{mixture}/truth.star"))
    result = json.loads((folder / out / "run.json").read_text())["result"]
    right, which = sorted_right(particles, truth)
    names = [name for name, _ in MIXTURES[mixture]]
    maps = [mrc.read_map(folder / out / f"class{k + 1}.mrc").array for k in range(len(which))]
    truths = [mrc.read_map(folder / f"{name}.mrc").array for name in names]
    return {
        "right": right,
        "which": which,
        "truth_A": [against(volume, truths[of - 1]) for volume, of in zip(maps, which, strict=True)],
        **{key: result[key] for key in ("share", "resolution_of_classes_A", "copy_of", "reproduced")},
    }


def true_labels(folder: Path) -> None:
    """The classes as they truly are, reconstructed at the poses of the consensus."""
    for mixture, parts in MIXTURES.items():
        truth = star.read_particles(folder / mixture / "truth.star")
        consensus = star.read_particles(folder / f"{mixture}-consensus" / "particles.star")
        number = dict(zip(truth["image_index"].tolist(), truth["class_number"].tolist(), strict=True))
        classes = np.array([number[index] for index in consensus["image_index"].tolist()], dtype=np.int32)
        store = open_store(folder / f"{mixture}.zarr")
        place = np.argsort(store.particles()["image_index"])[consensus["image_index"]]
        for k, (name, _) in enumerate(parts, start=1):
            out, own = f"{mixture}-true{k}", np.flatnonzero(classes == k)
            shutil.rmtree(folder / f"{out}.zarr", ignore_errors=True)
            columns = {of: consensus[of][own] for of in ("rotation", "origin_A", "half", "ctf_scale")}
            select(store, place[own], folder / f"{out}.zarr", columns)
            words = f"dcryo reconstruct {out}.zarr --mask-diameter {DIAMETER_A:g} --out {out} --overwrite"
            measured.run(words.split(), folder, f"{out}.log")
            resolution = json.loads((folder / out / "run.json").read_text())["result"]["resolution_A"]
            truth_A = against(mrc.read_map(folder / out / "map.mrc").array, mrc.read_map(folder / f"{name}.mrc").array)
            found = {"particles": len(own), "resolution_A": resolution, "truth_A": truth_A}
            keep(folder, f"true labels/{out}", found)


def relion(folder: Path, iterations: int, kinds: list[str], seed: int = 1) -> None:
    """RELION's 3D classification of the same particles, in three classes from the consensus map."""
    here = folder / "swing-relion"
    measured.run(
        ["dcryo", "export", "swing-consensus", "--stack", "--out", "swing-relion/particles.star", "--overwrite"],
        folder,
        "data.log",
    )
    for kind in kinds:
        out = kind.replace(" ", "-")
        (here / out).mkdir(exist_ok=True)
        words = RELION_COMMAND.format(out=out, iterations=iterations, seed=seed, how=RELION[kind])
        found = measured.run(words.split(), folder, f"swing-relion-{out}.log")
        particles = star.read_particles(here / out / f"run_it{iterations:03d}_data.star")
        right, which = sorted_right(particles, star.read_particles(folder / "swing" / "truth.star"))
        sizes = np.bincount(particles["class_number"], minlength=4)[1:] / len(particles)
        more = {"iterations": iterations, "right": right, "which": which, "share": sizes.tolist()}
        keep(folder, f"RELION, {kind}", found | more)


def real(folder: Path) -> None:
    """Real picks in two classes from a low-passed model, poses everywhere: how many of each RELION's project kept."""
    folder.mkdir(parents=True, exist_ok=True)
    particles = real_particles()
    derived = star.read_particles(SHARED / "bgal_empiar10204" / "derived_relion_poses.star")
    number, of_derived = micrographs(particles), micrographs(derived)
    near = np.zeros(len(particles), dtype=bool)
    for row, place in enumerate(particles["coordinate_px"]):
        others = derived["coordinate_px"][of_derived == number[row]]
        near[row] = np.linalg.norm(others - place, axis=1).min() * REAL_MOVIE_PIXEL_A < KEPT_WITHIN_A
    star.write_particles(folder / "real.star", particles, None)
    model = read_model(MODEL)
    density = gaussian_density(model.position_A @ TO_RELIONS_FRAME.T, model.amplitude, model.bfactor_A2, BOX, PIXEL_A)
    mrc.write_map(folder / "real-model.mrc", density, PIXEL_A)
    measured.run(["dcryo", "import", "real.star", "--out", "real.zarr", "--overwrite"], folder, "data.log")
    words = (
        "dcryo class3d real.zarr --reference real-model.mrc --classes 2 --poses global --symmetry D2 "
        "--mask-diameter 180 --resolution-limit 10 --out real --overwrite"
    )
    found = measured.run(words.split(), folder, "real.log")
    made = star.read_particles(folder / "real" / "particles.star")
    # Images by name, of which there is one row each.
    order, back = (np.lexsort((of["image_index"], of["image_path"])) for of in (particles, made))
    of_made = np.empty(len(made), dtype=bool)
    of_made[back] = near[order]
    for k in (1, 2):
        own = made["class_number"] == k
        print(f"class {k}: {own.sum()} particles, {100 * of_made[own].mean():.0f} % of them kept by RELION's project")
    print(f"{found['wall_s']:.0f} s, {found['cpu_s']:.0f} s of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("data", "sort", "labels", "relion", "real", "report"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=25, help="of relion_refine")
    parser.add_argument("--kind", action="append", choices=tuple(RELION), help="how RELION searches (default: both)")
    given = parser.parse_args()
    if given.what == "data":
        make_data(given.folder)
    elif given.what == "sort":
        sort(given.folder, given.seeds)
    elif given.what == "labels":
        true_labels(given.folder)
    elif given.what == "real":
        real(given.folder)
    elif given.what == "relion":
        relion(given.folder, given.iterations, given.kind or list(RELION))
    else:
        print(report(given.folder))


def report(folder: Path) -> str:
    """Tables for docs/benchmarks-class3d.md."""
    rows = measured.load(folder / "class3d.json")

    def listed(values: list[float], digits: int) -> str:
        return ", ".join(f"{value:.{digits}f}" for value in values)

    lines = [
        "| run | right | shares | FSC 0.143 | FSC 0.5 to the truth | found again | wall | CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "copy_of" in row:
            again = [
                f"{value:.2f}" + (" (copy)" if copy else "")
                for value, copy in zip(row["reproduced"], row["copy_of"], strict=True)
            ]
            lines.append(
                f"| {name} | {100 * row['right']:.1f} % | {listed([100 * s for s in row['share']], 1)} | "
                f"{listed(row['resolution_of_classes_A'], 2)} | {listed(row['truth_A'], 2)} | {', '.join(again[1:])} | "
                f"{row['wall_s']:.0f} s | {row['cpu_s']:.0f} s |"
            )
        elif name.startswith("true labels"):
            lines.append(f"| {name} | 100 % | | {row['resolution_A']:.2f} | {row['truth_A']:.2f} | | | |")
        else:
            lines.append(
                f"| {name}, {row['iterations']} iterations | {100 * row['right']:.1f} % | "
                f"{listed([100 * s for s in row['share']], 1)} | | | | {row['wall_s']:.0f} s | {row['cpu_s']:.0f} s |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
