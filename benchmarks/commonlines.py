"""First models by common lines from class averages of simulated particles, beside the truth.

    python benchmarks/commonlines.py data FOLDER [--only NAME ...]
    python benchmarks/commonlines.py run FOLDER [--only NAME ...] [--seeds 5]
    python benchmarks/commonlines.py refine FOLDER [--only NAME ...]
    python benchmarks/commonlines.py report FOLDER --output docs/benchmarks-commonlines.md

3,000 particles of each molecule, box 64, SNR 0.1, uniform views, centres off by 1.5 px; 60 classes by `dcryo class2d`,
those that look good are used. The true orientation of a class is that which its particles have most in common. `refine`
goes on from the model of seed 0, and from the truth at 40 A, without symmetry: a model has a frame of its own. Each run
leaves FOLDER/results/NAME.SEED.json and is not repeated.
"""

import argparse
import time
from pathlib import Path

import gemmi
import measured
import numpy as np
from measured import middle, table
from scipy import ndimage

from dcryo.data import mrc, star
from dcryo.data.classes import read_class_table
from dcryo.data.particles import identities
from dcryo.data.run import Run
from dcryo.kernels import common_lines, fsc
from dcryo.kernels.common_lines import LINES
from dcryo.kernels.masks import sphere
from dcryo.kernels.randomness import generator
from dcryo.kernels.rotations import angle_between_deg, angular_distance_deg
from dcryo.kernels.shells import resolution_A, shell_at
from dcryo.kernels.symmetry import operators
from dcryo.steps.common_lines import common_lines_model, mass_origins, matched_shell, orient

MODELS = Path(__file__).resolve().parents[2] / "shared" / "data" / "models"
BOX, CLASSES = 64, 60
_TWO_FOLD_ON_Y = np.stack([np.eye(3), np.diag([-1.0, 1.0, -1.0])])
# name -> what is shown, model and its options, pixel size in A, diameter in A, mask of class2d in A, operators
SETS = {
    "c1": ("beta-galactosidase less a chain, C1", "{folder}/abc.pdb", 3.54, 190, 190, operators("C1")),
    "ph1": ("phantom, C1", "phantom --diameter 120", 3.0, 120, 130, operators("C1")),
    "c2": ("haemoglobin, C2, nearly D2", "{models}/2dhb.pdb --assembly 1", 2.5, 90, 85, _TWO_FOLD_ON_Y),
    "c4": ("TRPV1, C4", "{models}/3j5p.pdb", 3.0, 160, 130, operators("C4")),
    "d2": ("beta-galactosidase, D2", "{models}/5a1a.pdb", 3.54, 190, 190, operators("D2")),
    "d7": ("phantom, D7", "phantom --diameter 140 --symmetry D7", 3.5, 125, 150, operators("D7")),
    "o": ("apoferritin, O", "{models}/7a4m.cif --assembly 1", 3.5, 145, 140, operators("O")),
}


def make_set(folder: Path, name: str) -> None:
    _, model, pixel_A, _, mask_A, _ = SETS[name]
    here = folder / name
    here.mkdir(parents=True, exist_ok=True)
    structure = gemmi.read_structure(str(MODELS / "5a1a.pdb"))
    structure[0].remove_chain("D")
    structure.write_minimal_pdb(str(folder / "abc.pdb"))
    of = model.format(folder=folder.resolve(), models=MODELS)
    for command in (
        f"dcryo simulate {of} --box {BOX} --pixel-size {pixel_A} --particles 3000 --snr 0.1 --shift-sigma 1.5 --seed 1 "
        "--out sim --overwrite",
        "dcryo import sim/particles.star --out particles.zarr --overwrite",
        f"dcryo class2d particles.zarr --classes {CLASSES} --mask-diameter {mask_A} --out classes --overwrite",
    ):
        measured.run(command.split(), here, "log.txt")


def true_orientations(folder: Path, count: int, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orientation (K, 3, 3) of each class that its particles have most in common, and the median angle (K,) in degrees
    of theirs from it."""
    truth, found = (
        star.read_particles(folder / "sim/truth.star"),
        star.read_particles(folder / "classes/particles.star"),
    )
    order = np.argsort(identities(truth))
    rows = order[np.searchsorted(identities(truth)[order], identities(found))]
    own = np.swapaxes(found["rotation"], 1, 2) @ truth["rotation"][rows]
    rotations, spread = np.tile(np.eye(3), (count, 1, 1)), np.full(count, 180.0)
    for k in range(count):
        members = own[found["class_number"] == k + 1]
        if len(members) == 0:
            continue
        spreads = [np.median(angular_distance_deg(one, members, group)) for one in members[:60]]
        centre = members[int(np.argmin(spreads))]
        for _ in range(5):
            centre, spread[k] = mean_orientation(centre, members, group)
        rotations[k] = centre
    return rotations, spread


def mean_orientation(about: np.ndarray, rotations: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean of rotations (N, 3, 3), each in the symmetry mate nearest to one, those far off counting less; and the
    median angle from that one."""
    mates = rotations[:, None] @ group
    near = mates[np.arange(len(mates)), np.argmax(np.sum(about * mates, axis=(2, 3)), axis=1)]
    angles = angle_between_deg(about, near)
    return nearest_rotation(np.sum(near / np.maximum(angles, 5.0)[:, None, None], axis=0)), float(np.median(angles))


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(matrix)
    return u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt


def aligned(found: np.ndarray, true: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angles (K,) in degrees between orientations in the best frame and hand, and the matrix from the found frame to
    the true one."""
    mirror, best = np.diag([1.0, 1.0, -1.0]), None
    for hand in (np.eye(3), mirror):
        handed = hand @ found @ hand
        for one, other in zip(handed, true, strict=True):
            turn = other.T @ one
            for last in (False, True):
                errors = angular_distance_deg(handed @ turn.T, true, group)
                if best is None or np.median(errors) < np.median(best[0]):
                    best = errors, turn @ hand
                if last or np.median(errors) > 20:
                    break
                # Least squares, those far off counting less: T g turn is to be the orientation that was found.
                mates = true[:, None] @ group
                near = np.argmax(np.sum((handed @ turn.T)[:, None] * mates, axis=(2, 3)), axis=1)
                each = np.swapaxes(mates[np.arange(len(mates)), near], 1, 2) @ handed
                turn = nearest_rotation(np.sum(each / np.maximum(errors, 5.0)[:, None, None], axis=0))
    return best


def truth_in_frame(volume: np.ndarray, to_true: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The true map (D, D, D) turned into another frame, and moved to where a map is most like it."""
    turn, centre = to_true[::-1, ::-1], np.full(3, len(volume) // 2)
    turned = ndimage.affine_transform(volume, turn, centre - turn @ centre, order=3)
    cross = np.conj(np.fft.fftn(turned)) * np.fft.fftn(like)
    lag = np.unravel_index(np.argmax(np.fft.ifftn(cross).real), volume.shape)
    around = np.stack(np.meshgrid(*[np.arange(-0.5, 0.51, 0.25)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    moved = [ndimage.fourier_shift(np.fft.fftn(turned), lag + step) for step in around]
    like_transform = np.fft.fftn(like)
    best = max(moved, key=lambda one: np.sum((like_transform.conj() * one).real))
    return np.fft.ifftn(best).real.astype(np.float32)


def by_eigenvectors(averages: np.ndarray, shell: int, diameter_px: float) -> np.ndarray:
    """Orientations from the most alike lines of each pair, from the three leading eigenvectors of the matrix of their
    directions (Singer & Shkolnisky 2011, section 3), (K, 3, 3)."""
    box, count = averages.shape[-1], len(averages)
    lines = common_lines.lines(averages, shell, diameter_px)
    centred = common_lines.moved(lines, mass_origins(averages, diameter_px), box)
    likeness = common_lines.likeness(centred, box, box / (6 * shell), box / (6 * shell))
    other, own = np.divmod(likeness.reshape(count, count, -1).argmax(axis=2), 2 * LINES)
    first, second = np.triu_indices(count, 1)
    u, v = (np.exp(1j * np.pi / LINES * angle[first, second]) for angle in (own, other))
    products = np.stack([u.real, u.imag], 1)[:, :, None] * np.stack([v.real, v.imag], 1)[:, None, :]
    matrix = np.zeros((count, 2, count, 2))
    matrix[first, :, second], matrix[second, :, first] = products, np.swapaxes(products, 1, 2)
    vectors = np.linalg.eigh(matrix.reshape(2 * count, 2 * count))[1][:, -3:].reshape(count, 2, 3)
    # The transform of the vectors that makes rows orthonormal, by least squares for its square.
    pairs = [(vectors[:, 0], vectors[:, 0]), (vectors[:, 1], vectors[:, 1]), (vectors[:, 0], vectors[:, 1])]
    products = np.concatenate([(a[:, :, None] * b[:, None, :] + b[:, :, None] * a[:, None, :]) / 2 for a, b in pairs])
    wanted = np.repeat([1.0, 1.0, 0.0], count)
    square = np.linalg.lstsq(products.reshape(-1, 9), wanted, rcond=None)[0].reshape(3, 3)
    values, axes = np.linalg.eigh((square + square.T) / 2)
    rows = vectors @ (axes * np.sqrt(np.maximum(values, 1e-3 * np.abs(values).max())))
    u, _, vt = np.linalg.svd(rows, full_matrices=False)
    planes = u @ vt
    return np.concatenate([planes, np.cross(planes[:, 0], planes[:, 1])[:, None]], axis=1)


def measure(folder: Path, name: str, seed: int) -> dict:
    _, _, pixel_A, diameter_A, _, group = SETS[name]
    here = folder / name
    classes = read_class_table(here / "classes/classes.star")
    stack = mrc.open_stack(here / "classes/classes.mrcs")
    true, spread = true_orientations(here, len(classes.particles), group)
    kept = np.flatnonzero(classes.kept)
    averages, weights, true = stack.read(kept), classes.particles[kept].astype(float), true[kept]
    shell = min(shell_at(float(np.average(classes.resolution_A[kept], weights=weights)), BOX, pixel_A), BOX // 4)
    began = time.process_time()
    model = common_lines_model(averages, weights, pixel_A, diameter_A, shell, generator(seed, "common lines", 0))
    seconds = time.process_time() - began
    alone, _ = orient(averages, weights / weights.mean(), pixel_A, diameter_A, shell, generator(seed, "orient", 0))
    first = min(shell, matched_shell(2, diameter_A, BOX, pixel_A))
    eigenvectors = by_eigenvectors(averages, first, diameter_A / pixel_A)
    errors, to_true = aligned(model.rotation, true, group)
    truth = mrc.read_map(here / "sim/truth.mrc").array * sphere(BOX, diameter_A / pixel_A, 3)
    curve = fsc.shell_correlation(model.volume, truth_in_frame(truth, to_true, model.volume))
    mrc.write_map(folder / f"{name}.{seed}.mrc", model.volume, pixel_A)
    return {
        "averages": len(kept),
        "spread_deg": float(np.median(spread[kept])),
        "shell_A": resolution_A(shell, BOX, pixel_A),
        "cpu_s": seconds,
        "error_deg": float(np.median(errors)),
        "within_20_deg": float(np.mean(errors < 20)),
        "common_lines_deg": float(np.median(aligned(alone, true, group)[0])),
        "eigenvectors_deg": float(np.median(aligned(eigenvectors, true, group)[0])),
        "fsc_half_A": fsc.resolution_at(curve, 0.5, BOX, pixel_A),
        "consistency": model.consistency,
        "reliability_of_wrong": float(np.median(model.reliability[errors > 20])) if np.any(errors > 20) else None,
    }


def refine(folder: Path, name: str) -> dict:
    """Resolution of refinements from the model of seed 0, `lines_A`, and from the truth, `truth_A`."""
    words = f"dcryo refine particles.zarr --mask-diameter {SETS[name][3]} --initial-lowpass 40 --overwrite"
    found: dict = {}
    for start, reference in (("lines", folder.resolve() / f"{name}.0.mrc"), ("truth", "sim/truth.mrc")):
        command = [*words.split(), "--reference", reference, "--out", f"from-{start}"]
        found |= {"measured": measured.run(command, folder / name, f"from-{start}.log")}
        found[f"{start}_A"] = Run.open(folder / name / f"from-{start}").record["result"]["resolution_A"]
    return found


def report(folder: Path) -> str:
    rows, every = [], []
    for name, (title, *_) in SETS.items():
        runs = [measured.load(path) for path in sorted((folder / "results").glob(f"{name}.*.json"))]
        if not runs:
            continue
        every += runs
        good = sum(run["error_deg"] < 10 for run in runs)
        columns = [
            middle((run[key] for run in runs), form)
            for key, form in (
                ("eigenvectors_deg", ".0f"), ("common_lines_deg", ".1f"), ("error_deg", ".1f"), ("fsc_half_A", ".1f"),
                ("consistency", ".2f"), ("cpu_s", ".1f"),
            )
        ]  # fmt: skip
        shown = f"{runs[0]['averages']}, {runs[0]['spread_deg']:.0f} deg, {runs[0]['shell_A']:.0f} A"
        refined = folder / "results" / f"refined.{name}.json"
        ends = measured.load(refined) if refined.exists() else None
        pair = f"{ends['lines_A']:.2f}, {ends['truth_A']:.2f}" if ends else ""
        rows.append([title, shown, f"{good} of {len(runs)}", *columns, pair])
    heading = [
        "molecule", "averages, spread, resolution", "below 10 deg", "eigenvectors deg", "common lines deg", "model deg",
        "FSC 0.5 A", "consistency", "CPU s", "refined from it, from the truth, A",
    ]  # fmt: skip
    where = measured.described(run["machine"] for run in every)
    parts = [
        "# First models by common lines\n",
        f"Written by `benchmarks/commonlines.py` on {where}.\n",
        "3,000 particles at SNR 0.1, box 64, in 60 classes, of which those that look good are used. Spread: median "
        "angle of particles from their class's orientation. Errors are medians over averages of the whole rotation "
        "(direction and turn), in the best frame and hand; over seeds, the median and the range. Eigenvectors: Singer "
        "& Shkolnisky (2011) from each pair's most alike lines; common lines: before re-projections; FSC of the model "
        "with the truth, both in a sphere. Last: FSC 0.143 of the halves of refinements without symmetry.\n",
        table(heading, rows),
    ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["data", "run", "refine", "report"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.command == "data":
        for name in options.only:
            make_set(options.folder, name)
    elif options.command == "run":
        for seed in range(options.seeds):
            for name in options.only:
                path = options.folder / "results" / f"{name}.{seed}.json"
                measured.once(path, lambda name=name, seed=seed: measure(options.folder, name, seed))
    elif options.command == "refine":
        for name in options.only:
            path = options.folder / "results" / f"refined.{name}.json"
            measured.once(path, lambda name=name: refine(options.folder, name))
    else:
        text = report(options.folder)
        if options.output:
            options.output.write_text(text)
        else:
            print(text)


if __name__ == "__main__":
    main()
