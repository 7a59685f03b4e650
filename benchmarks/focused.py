"""What is odd in one subunit, and what moves: relaxed symmetry, expansion, subtraction and local refinement.

    python benchmarks/focused.py relax --out DIR [--particles 1000] [--snr 0.05] [--piece less]
    python benchmarks/focused.py subtract --out DIR     beside relion_particle_subtract
    python benchmarks/focused.py expand --out DIR       expansion and subtraction, then two classes by class3d
    python benchmarks/focused.py local --out DIR        a domain that turns by 5 degrees against the rest

The molecule is TRPV1 (3J5P, C4), of which one chain has lost a part (`less`), or is the only one to have it (`more`);
in `local` it is a phantom. Poses are the true ones, each turned to one of its symmetry mates at random, as a refinement
with the symmetry leaves them, and off by 1 degree.
"""

import argparse
import shutil
import subprocess
from pathlib import Path

import numpy as np

from dcryo.data import mrc, star
from dcryo.data.model import read_model
from dcryo.data.store import Store, select
from dcryo.euler import matrix_from_rotvec
from dcryo.jobs import dataset
from dcryo.jobs.class3d import Class3dOptions, class3d
from dcryo.jobs.exchange import ImportOptions, import_particles
from dcryo.jobs.expand import ExpandOptions, expand
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.jobs.subtract import SubtractOptions, subtract
from dcryo.kernels import alignment, fft, filters, fsc, posterior, slices
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.masks import cosine_edge
from dcryo.kernels.phantom import phantom
from dcryo.kernels.rotations import angle_between_deg
from dcryo.kernels.shells import half_plane, unpack
from dcryo.kernels.symmetry import operators

MODEL = Path(__file__).resolve().parents[2] / "shared" / "data" / "models" / "3j5p.pdb"
BOX, PIXEL, DIAMETER_A = 56, 3.6, 160.0
GROUP = operators("C4")
PIECE_A, OFF_DEG, JITTER_DEG = 32.0, 1.0, 5.0


def quiet(line: str, /, *, end: str = "\n") -> None:
    pass


def molecule(piece: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Densities (D, D, D) of the molecule with the odd chain and of the part that makes it odd, and the part's share of
    a chain's atoms."""
    model = read_model(MODEL)
    place = model.position_A
    quarter = np.floor(np.rad2deg(np.arctan2(place[:, 1], place[:, 0])) % 360 / 90).astype(int)
    first = quarter == 0
    tip = place[first][np.argmax(np.linalg.norm(place[first, :2], axis=1))]
    inside = [np.linalg.norm(place - g @ tip, axis=1) < PIECE_A for g in GROUP]
    gone = inside[0] if piece == "less" else inside[1] | inside[2] | inside[3]
    part = inside[0] & first

    def density(atoms: np.ndarray) -> np.ndarray:
        return gaussian_density(place[atoms], model.amplitude[atoms], model.bfactor_A2[atoms], BOX, PIXEL)

    return density(~gone), density(part), part.sum() / first.sum()


def simulated(
    folder: Path, density: np.ndarray, particles: int, snr: float, seed: int
) -> tuple[Store, Store, np.ndarray]:
    """A store with the true poses, one with those that a refinement with the symmetry leaves, and the truth."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mrc.write_map(folder / "model.mrc", density, PIXEL)
    made = simulate(
        SimulateOptions(model=str(folder / "model.mrc"), particles=particles, snr=snr, seed=seed, out=folder / "made"),
        progress=quiet,
    )
    true = import_particles(ImportOptions(source=made.truth_star, out=folder / "true.zarr"), progress=quiet).store
    random = np.random.Generator(np.random.Philox(seed))
    mates = GROUP[random.integers(0, len(GROUP), particles)]
    off = matrix_from_rotvec(np.deg2rad(OFF_DEG) * random.standard_normal((particles, 3)))
    rotation = off @ true.particles()["rotation"] @ mates
    posed = select(true, np.arange(particles), folder / "posed.zarr", {"rotation": rotation})
    return true, posed, mrc.read_map(made.truth_map).array


def transforms(store: Store) -> tuple[np.ndarray, np.ndarray, dataset.Dataset]:
    """Packed transforms of all images at their origins, their CTFs, and the data set."""
    data = dataset.load_dataset(store.path, 0)
    ones = np.ones(store.n)
    shard = dataset.shard_rows(data, np.arange(store.n), "all", ones, ones, data.rotation, data.origin_px, ones > 0)
    batch, _ = shard.read(slice(None))
    pixels = half_plane((store.box_px - 1) // 2)
    flat = np.ones((store.n, len(pixels.kx)), np.float32)
    even = np.ones((store.n, pixels.shell_max + 1), np.float32)
    moved = posterior.weigh(fft.rfft2(batch.images), ones, flat, even, batch.origin_px, pixels, pixels).data
    return moved, batch.ctf[:, : len(pixels.kx)], data


def misfits(store: Store, volume: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Minus twice the log-likelihood of each image at its pose times each turn, (T, n), with the noise that the first
    leaves."""
    images, ctf, data = transforms(store)
    pixels = half_plane((store.box_px - 1) // 2)
    prepared = slices.prepare(volume, pixels.shell_max)
    found = []
    for turn in turns:
        residual = np.abs(images - ctf * slices.extract(prepared, data.rotation @ turn, pixels, store.box_px)) ** 2
        if not found:
            shells = [residual[:, pixels.shell == shell].mean() for shell in range(pixels.shell_max + 1)]
            noise = np.array(shells)[pixels.shell]
        found.append(2 * np.sum((residual / noise)[:, 1:], axis=1))
    return np.array(found)


def difference(volume: np.ndarray) -> np.ndarray:
    """A map less the mean of its symmetry mates."""
    nowhere = np.zeros(3)
    return alignment.turned_sum(volume, GROUP[:1], nowhere) - alignment.turned_sum(volume, GROUP, nowhere) / len(GROUP)


def relax(given: argparse.Namespace) -> None:
    density, _, share = molecule(given.piece)
    true, posed, truth = simulated(given.out, density, given.particles, given.snr, given.seed)
    best = float(np.mean(misfits(true, truth, GROUP).argmin(axis=0) == 0))
    run = refine(
        RefineOptions(store=posed.path, out=given.out / "relaxed", relax="C4", mask_diameter_A=DIAMETER_A, workers=2),
        progress=print,
    )
    poses = true.particles()["rotation"][run.particles["image_index"]]
    mate = angle_between_deg(run.particles["rotation"][:, None], poses[:, None] @ GROUP).argmin(axis=1)
    halves = [np.bincount(mate[run.particles["half"] == half], minlength=4).tolist() for half in (1, 2)]
    counts = np.bincount(mate, minlength=4)
    turned = alignment.turned_sum(truth, GROUP[counts.argmax()].T[None], np.zeros(3))
    curve = fsc.shell_correlation(difference(run.map), difference(turned))
    print(
        f"{given.piece}, {100 * share:.0f} % of a chain, SNR {given.snr:g}, {given.particles} particles, mates {halves}"
    )
    print(
        f"right mate: {100 * counts.max() / len(mate):.1f} % (with the true map and poses {100 * best:.1f} %), "
        f"FSC of what is odd to the truth 0.5 at {fsc.resolution_at(curve, fsc.HALF, BOX, PIXEL):.1f} A, "
        f"mean {curve[2:20].mean():.2f}, {run.iterations} iterations"
    )


def soft_mask(density: np.ndarray, pixel_A: float, level: float = 0.1) -> np.ndarray:
    """A mask of a density with a soft edge."""
    smooth = filters.lowpass(density, pixel_A, 15.0)
    solid = filters.lowpass((smooth > level * smooth.max()).astype(np.float32), pixel_A, 12.0)
    return (1 - cosine_edge(solid, 0.1, 0.5)).astype(np.float32)


def projections(store: Store, volume: np.ndarray) -> np.ndarray:
    """Images (n, D, D) of a map at the poses of a store, times their CTFs."""
    _, ctf, data = transforms(store)
    pixels = half_plane((store.box_px - 1) // 2)
    packed = slices.extract(slices.prepare(volume, pixels.shell_max), data.rotation, pixels, store.box_px) * ctf
    packed *= posterior.shift_phases(pixels, -data.origin_px, store.box_px, len(pixels.kx))
    return fft.irfft2(unpack(pixels, packed, store.box_px), store.box_px)


def judged(name: str, images: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> None:
    """How like the truth of the part inside images are, and how much of each part is in them."""
    images, inside, outside = (of.reshape(len(of), -1).astype(np.float64) for of in (images, inside, outside))
    images, inside, outside = (of - of.mean(axis=1, keepdims=True) for of in (images, inside, outside))
    like = np.mean(np.sum(images * inside, axis=1) / np.linalg.norm(images, axis=1) / np.linalg.norm(inside, axis=1))
    gram = np.array([[np.vdot(a, b) for b in (inside, outside)] for a in (inside, outside)])
    amount = np.linalg.solve(gram, [np.vdot(inside, images), np.vdot(outside, images)])
    print(f"| {name} | {like:.4f} | {amount[0]:.3f} | {amount[1]:.3f} |")


def subtraction(given: argparse.Namespace) -> None:
    density, part, _ = molecule("more")
    true, _, truth = simulated(given.out, density, given.particles, given.snr, given.seed)
    first = soft_mask(part, PIXEL, 0.05)
    mrc.write_map(given.out / "kept.mrc", first, PIXEL)
    inside, outside = (projections(true, truth * of) for of in (first, 1 - first))
    run = given.out / "map"
    reconstruct(ReconstructOptions(store=true.path, out=run, mask_diameter_A=DIAMETER_A, workers=2), progress=quiet)
    made = subtract(
        SubtractOptions(source=run, mask=given.out / "kept.mrc", out=given.out / "ours", workers=2), progress=print
    )
    print("| images | correlation with the inside | inside in them | outside in them |\n|---|---|---|---|")
    judged("recorded", true.read(np.arange(true.n)).images, inside, outside)
    judged("recorded, less the true outside", true.read(np.arange(true.n)).images - outside, inside, outside)
    judged("dcryo subtract", made.store.read(np.arange(made.store.n)).images, inside, outside)
    if shutil.which("relion_particle_subtract") is None:
        return
    (given.out / "made" / "ref").mkdir()
    for number, command in enumerate((
        f"relion_refine --i truth.star --ref truth.mrc --o ref/run --skip_align --ctf --iter 2 --K 1 --tau2_fudge 4 "
        f"--particle_diameter {DIAMETER_A:g} --flatten_solvent --zero_mask --norm --scale --sym C1 --j 2 --pad 2",
        "relion_particle_subtract --i ref/run_it002_optimiser.star --mask ../kept.mrc --o theirs",
    )):  # fmt: skip
        with (given.out / f"relion{number}.log").open("w") as log:
            subprocess.run(command.split(), cwd=given.out / "made", check=True, stdout=log, stderr=log)
    table = star.read_particles(given.out / "made" / "theirs" / "particles_subtracted.star")
    names = table.extra["rlnImageOriginalName"]
    row = np.argsort([int(name.split("@")[0]) for name in names.tolist()])
    stacks = {path: mrc.open_stack(given.out / "made" / path) for path in np.unique(table["image_path"]).tolist()}
    theirs = [
        stacks[path].read(np.array([index]))[0]
        for path, index in zip(table["image_path"][row].tolist(), table["image_index"][row].tolist(), strict=True)
    ]
    judged("relion_particle_subtract", np.array(theirs), inside, outside)


def expansion(given: argparse.Namespace) -> None:
    """Which of the four places of each particle lacks the part, by two classes of expanded, subtracted images."""
    density, part, _ = molecule("less")
    true, posed, _ = simulated(given.out, density, given.particles, given.snr, given.seed)
    mrc.write_map(given.out / "kept.mrc", soft_mask(part, PIXEL, 0.05), PIXEL)
    symmetric = given.out / "c4"
    options = {"symmetry": "C4", "mask_diameter_A": DIAMETER_A, "workers": 2}
    reconstruct(ReconstructOptions(store=posed.path, out=symmetric, **options), progress=quiet)
    expanded = expand(ExpandOptions(source=posed.path, symmetry="C4", out=given.out / "expanded.zarr"), progress=quiet)
    # The run whose maps are subtracted, over the expanded particles.
    over = given.out / "expanded"
    reconstruct(
        ReconstructOptions(store=expanded.store.path, out=over, mask_diameter_A=DIAMETER_A, workers=2), progress=quiet
    )
    small = subtract(
        SubtractOptions(
            source=over, mask=given.out / "kept.mrc", recenter=True, box_px=28, out=given.out / "small", workers=2
        ),
        progress=print,
    ).store
    lacks = two_classes(small, given.out, given.seed)
    # The truth: the copy of which the pose is the one with the odd chain at the place of the mask.
    found = expanded.store.particles()["rotation"]
    poses = np.repeat(true.particles()["rotation"], 4, axis=0)
    odd = angle_between_deg(found, poses) < 45
    order = lacks.reshape(-1, 4)
    print(f"part missing: {100 * odd.mean():.0f} % of copies; class without it holds {100 * np.mean(lacks > 0):.0f} %")
    print(
        f"of {given.particles} particles at SNR {given.snr:g} the likeliest place is the odd one in "
        f"{100 * np.mean(odd.reshape(-1, 4)[np.arange(len(order)), order.argmax(axis=1)]):.1f} %; copies sorted right: "
        f"{100 * np.mean((lacks > 0) == odd):.1f} %"
    )


def two_classes(store: Store, folder: Path, seed: int) -> np.ndarray:
    """How much likelier each image is to be of the class with less in it than of the other, (n,), by `class3d` at fixed
    poses from particles dealt out at random."""
    given = Class3dOptions(
        store=store.path, classes=2, poses="fixed", mask=folder / "small" / "mask.mrc", seed=seed, workers=2,
        out=folder / "classes",
    )  # fmt: skip
    made = class3d(given, progress=print)
    mask = mrc.read_map(given.mask).array
    emptier = 1 + int(np.argmin([np.sum(volume * mask) for volume in made.maps]))
    probability = np.zeros(store.n)
    # The table is in the order of the store; what was left out of it is of neither class.
    probability[: len(made.particles)] = made.particles["class_probability"]
    certain = np.clip(probability, 1e-12, 1 - 1e-12)
    return np.where(made.particles["class_number"] == emptier, 1, -1) * np.log(certain / (1 - certain))


def local(given: argparse.Namespace) -> None:
    shutil.rmtree(given.out, ignore_errors=True)
    atoms = phantom(operators("C1"), 62.0, seed=4)
    moves = atoms.position_A[:, 2] > 8.0
    domain_A = atoms.position_A[moves].mean(axis=0)
    centre_px = np.round(domain_A / PIXEL)

    def density(some: np.ndarray, about_A: np.ndarray) -> np.ndarray:
        return gaussian_density(
            atoms.position_A[some] - about_A, atoms.amplitude[some], atoms.bfactor_A2[some], BOX, PIXEL
        )

    given.out.mkdir(parents=True)
    mrc.write_map(given.out / "model.mrc", density(moves | ~moves, np.zeros(3)), PIXEL)
    made = simulate(
        SimulateOptions(
            model=str(given.out / "model.mrc"), particles=given.particles, snr=given.snr, seed=given.seed,
            out=given.out / "made",
        ),
        progress=quiet,
    )  # fmt: skip
    true = import_particles(ImportOptions(source=made.truth_star, out=given.out / "true.zarr"), progress=quiet).store
    grey = np.vdot(density(moves | ~moves, np.zeros(3)), mrc.read_map(made.truth_map).array)
    grey /= np.sum(density(moves | ~moves, np.zeros(3)).astype(np.float64) ** 2)
    about_A = centre_px * PIXEL
    domain = np.float32(grey) * density(moves, about_A)
    # The domain turns about its own centre: where it stood its images are taken out, and put in where it stands.
    random = np.random.Generator(np.random.Philox(given.seed))
    turns = matrix_from_rotvec(np.deg2rad(JITTER_DEG) * random.standard_normal((true.n, 3)))
    particles = true.particles()
    place = particles["rotation"] @ about_A
    origin_A = particles["origin_A"] - place[:, :2]
    images = true.read(np.arange(true.n)).images
    for sign, rotation in ((-1, particles["rotation"]), (1, particles["rotation"] @ turns)):
        columns = {"rotation": rotation, "origin_A": origin_A}
        there = select(true, np.arange(true.n), given.out / f"there{sign}.zarr", columns)
        images = images + sign * projections(there, domain)
    with mrc.StackWriter(given.out / "made" / "moving.mrcs", true.n, BOX, PIXEL, "float32") as writer:
        writer.write(0, images)
    table = star.read_particles(made.truth_star)
    star.write_particles(
        given.out / "made" / "moving.star", table.replace(image_path=np.full(len(table), "moving.mrcs"))
    )
    store = import_particles(
        ImportOptions(source=given.out / "made" / "moving.star", out=given.out / "moving.zarr"), progress=quiet
    ).store
    consensus = given.out / "consensus"
    refine(
        RefineOptions(
            store=store.path,
            out=consensus,
            local=True,
            angle_sd_deg=2.0,
            shift_sd_A=2.0,
            mask_diameter_A=150.0,
            workers=2,
        ),
        progress=print,
    )
    mask = soft_mask(domain, PIXEL)
    back = tuple(int(x) for x in centre_px[::-1])
    mrc.write_map(given.out / "kept.mrc", np.roll(mask, back, axis=(0, 1, 2)), PIXEL)
    diameter = 2 * np.linalg.norm(atoms.position_A[moves] - domain_A, axis=1).max()
    inner = subtract(
        SubtractOptions(
            source=consensus,
            mask=given.out / "kept.mrc",
            recenter_at_A=tuple(about_A),
            out=given.out / "inner",
            workers=2,
        ),
        progress=print,
    )
    plain = expand(ExpandOptions(source=consensus, symmetry="C1", out=given.out / "plain.zarr"), progress=quiet).store
    inner_mask = inner.out / "mask.mrc"
    runs = {"consensus": consensus}
    for name, source, under in (("local", inner.store, inner_mask), ("whole", plain, given.out / "kept.mrc")):
        refine(
            RefineOptions(
                store=source.path, out=given.out / name, local=True, angle_sd_deg=5.0, shift_sd_A=3.0, mask=under,
                mask_diameter_A=diameter, workers=2,
            ),
            progress=print,
        )  # fmt: skip
        runs[name] = given.out / name
    print("| map | FSC to the true domain 0.5 | sum | half maps 0.143 | domain's poses off |\n|---|---|---|---|---|")
    for name, run in runs.items():
        halves = [mrc.read_map(run / f"half{half}.mrc").array for half in (1, 2)]
        if name != "local":
            halves = [np.roll(half, tuple(-x for x in back), axis=(0, 1, 2)) for half in halves]
        curve = fsc.shell_correlation((halves[0] + halves[1]) * mask, domain * mask)
        both = fsc.shell_correlation(halves[0] * mask, halves[1] * mask)
        found = star.read_particles(run / "particles.star")
        row = found["image_index"]
        off = angle_between_deg(found["rotation"], particles["rotation"][row] @ turns[row])
        print(
            f"| {name} | {fsc.resolution_at(curve, 0.5, BOX, PIXEL):.2f} A | {curve.sum():.2f} | "
            f"{fsc.resolution_at(both, 0.143, BOX, PIXEL):.2f} A | {np.median(off):.2f} deg |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("relax", "subtract", "expand", "local"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--snr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--piece", choices=("less", "more"), default="less")
    given = parser.parse_args()
    {"relax": relax, "subtract": subtraction, "expand": expansion, "local": local}[given.what](given)


if __name__ == "__main__":
    main()
