"""From movies to a map by dcryo alone, beside the map that true positions, motions and CTFs give.

    python benchmarks/chain.py FOLDER [--movies 16] [--output docs/benchmarks-chain.md]

For two molecules, beta-galactosidase (5A1A, D2) and TRPV1 (3J5P, C4): movies are simulated and taken through motion,
ctf, pick, extract and refine, each with the options that a user knows (pixel size and the like from the movies; the
diameter, the symmetry). `refined` starts from the truth at 40 A, `unreferenced` from what class2d, select and abinitio
make of the same particles. The map to compare with is of the same movies without motion (same seed, same specimen),
its particles extracted at their true places with their true CTFs. Commands that are done are not repeated.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import measured
import numpy as np
from measured import table

from dcryo.data import mrc, star
from dcryo.data.run import Run
from dcryo.kernels import alignment, fsc, masks
from dcryo.kernels.shells import shell_at

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FRAME, DOSE = 2048, 1.277
ALIGNED_AT_A = 5.0
MAPS = {
    "refined": "by dcryo from the truth at 40 A",
    "unreferenced": "by dcryo alone, no reference",
    "still-refined": "true positions, motions, CTFs",
}


@dataclass(frozen=True)
class Molecule:
    name: str
    model: str
    symmetry: str
    diameter_A: float
    pixel_A: float
    box_px: int


MOLECULES = (
    Molecule("beta-galactosidase", "5a1a.pdb", "D2", 180, 1.2, 224),
    Molecule("TRPV1", "3j5p.pdb", "C4", 150, 1.2, 192),
)


def commands(of: Molecule, movies: int) -> list[tuple[str, str]]:
    """Directory -> command that makes it, in order."""
    simulated = (
        f"dcryo simulate {SHARED_DATA / 'models' / of.model} --movies {movies} --frame-size {FRAME} {FRAME} "
        f"--pixel-size {of.pixel_A} --box {of.box_px} --crystals 0.5 --seed 1"
    )
    motion = f"--dose-per-frame {DOSE}"
    extract = f"--box {of.box_px}"
    molecule = f"--symmetry {of.symmetry} --mask-diameter {of.diameter_A}"
    refine = f"--reference simulated/truth.mrc {molecule} --initial-lowpass 40"
    return [
        ("simulated", f"{simulated} --out simulated"),
        ("motion", f"dcryo motion simulated/movies.star --gain simulated/gain.mrc {motion} --out motion"),
        ("ctf", "dcryo ctf motion/micrographs.star --out ctf"),
        ("pick", f"dcryo pick ctf/micrographs.star --diameter {of.diameter_A} --out pick"),
        ("extract", f"dcryo extract pick/picks.star {extract} --out extract"),
        ("refined", f"dcryo refine extract/particles.zarr {refine} --out refined"),
        ("classes", f"dcryo class2d extract/particles.zarr --classes 20 --mask-diameter {of.diameter_A} --out classes"),
        ("selected", "dcryo select classes --auto --out selected.zarr"),
        ("first", f"dcryo abinitio selected.zarr {molecule} --out first"),
        ("unreferenced", f"dcryo refine selected.zarr --reference first/class1.mrc {molecule} --out unreferenced"),
        ("still", f"{simulated} --motion 0 --local-motion 0 --out still"),
        ("still-motion", f"dcryo motion still/movies.star --gain still/gain.mrc {motion} --out still-motion"),
        ("still-extract", f"dcryo extract at-truth.star {extract} --out still-extract"),
        ("still-refined", f"dcryo refine still-extract/particles.zarr {refine} --out still-refined"),
    ]


def at_truth(here: Path) -> None:
    """The true particles, without poses, named after the micrographs of the movies that stood still."""
    truth = star.read_particles(here / "still" / "truth.star")
    columns = {name: values for name, values in truth.columns.items() if name not in ("rotation", "half")}
    stems = [Path(path).stem for path in truth["micrograph"].tolist()]
    columns["micrograph"] = np.array([f"still-motion/{stem}.mrc" for stem in stems])
    star.write_particles(here / "at-truth.star", type(truth)(columns, truth.optics, {}, truth.optics_extra))


def run(of: Molecule, folder: Path, movies: int) -> list[dict]:
    here = folder / of.name
    here.mkdir(parents=True, exist_ok=True)
    found = []
    for name, command in commands(of, movies):
        if name == "still-extract":
            at_truth(here)
        took = measured.once(
            folder / "results" / f"{of.name}.{name}.json",
            lambda command=command, name=name: {
                "measured": measured.run([*command.split(), "--overwrite"], here, f"{name}.log")
            },
        )
        found.append({"name": name, **took["measured"]})
    return found


def to_truth(of: Molecule, here: Path, name: str) -> float:
    """Resolution of a map at FSC 0.5 with the density that was simulated, in whatever frame and hand."""
    first, second = (mrc.read_map(path).array for path in (here / name / "map.mrc", here / "simulated" / "truth.mrc"))
    if name == "unreferenced":
        shell = shell_at(ALIGNED_AT_A, of.box_px, of.pixel_A)
        first = alignment.moved(first, alignment.align(first, second, shell, hands=True))
    mask = masks.sphere(of.box_px, of.diameter_A / of.pixel_A, 5)
    return fsc.resolution_at(fsc.shell_correlation(first * mask, second * mask), 0.5, of.box_px, of.pixel_A)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--movies", type=int, default=16)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows, times = [], []
    for of in MOLECULES:
        took = run(of, options.folder, options.movies)
        here = options.folder / of.name
        for name, words in MAPS.items():
            result = Run.open(here / name).record["result"]
            rows.append(
                [
                    of.name,
                    words,
                    result["particles"],
                    f"{result['resolution_A']:.2f}",
                    f"{to_truth(of, here, name):.2f}",
                ]
            )
        times.append([of.name, *(f"{one['wall_s']:.0f}" for one in took[:10])])
    paths = sorted((options.folder / "results").glob("*.json"))
    where = measured.described(measured.load(path)["machine"] for path in paths)
    text = "\n".join(
        [
            "# From movies to a map\n",
            f"Written by `benchmarks/chain.py` on {where}; {options.movies} movies of {FRAME} x {FRAME} px, 24 frames "
            f"of {DOSE} e/A2, on a busy machine.\n",
            table(["molecule", "", "particles", "FSC 0.143, A", "FSC 0.5 with the truth, A"], rows),
            "Seconds of each command:\n",
            table(
                [
                    "molecule",
                    "simulate",
                    "motion",
                    "ctf",
                    "pick",
                    "extract",
                    "refine",
                    "class2d",
                    "select",
                    "abinitio",
                    "refine",
                ],
                times,
            ),
        ]
    )
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
