"""Speed of extraction: dcryo extract beside relion_preprocess, on the same noise micrographs, on one core each.

    python benchmarks/extraction.py FOLDER [--repeat 3] [--output docs/benchmarks-extraction.md]

Boxes of 256 px, kept so or scaled to 128, background normalised and contrast inverted. Both programs are started as a
command; what is told is particles per second of the clock and of the processor, start and end of the program included,
and the same for the particles alone: from the difference to a run over the first micrograph with two picks. RELION
writes float32 and dcryo its store, in float16; both write a table. The two take turns, median of the repeats.
"""

import argparse
from pathlib import Path
from statistics import median

import measured
import numpy as np
from measured import described, machine, middle, table

from dcryo.data import mrc
from dcryo.data.micrographs import write_micrographs
from dcryo.data.particles import Micrographs
from dcryo.data.star_syntax import Block, write_blocks

SIZE_PX, PIXEL_A, BOX_PX = 4096, 1.0, 256
SCALES_PX = (256, 128)
OPTICS = {
    "group": np.ones(1), "name": np.array(["opticsGroup1"]), "micrograph_pixel_size_A": np.array([PIXEL_A]),
    "voltage_kV": np.array([300.0]), "spherical_aberration_mm": np.array([2.7]), "amplitude_contrast": np.array([0.1]),
}  # fmt: skip


def make(folder: Path, n: int, picks: int) -> None:
    """Micrographs of noise and picks within them: all, and `few` of them, to know what starting costs."""
    (folder / "mics").mkdir(parents=True, exist_ok=True)
    random = np.random.Generator(np.random.Philox(1))
    names = [f"mics/m{number:02d}" for number in range(n)]
    for name in names:
        path = folder / f"{name}.mrc"
        if not path.exists():
            mrc.write_map(path, 5 * random.standard_normal((1, SIZE_PX, SIZE_PX), np.float32) + 30, PIXEL_A)
    for kind, some, count in (("all", names, picks), ("few", names[:1], 2)):
        (folder / f"picks_{kind}" / "mics").mkdir(parents=True, exist_ok=True)
        files = [f"picks_{kind}/{name}_pick.star" for name in some]
        for file in files:
            x, y = random.uniform(BOX_PX, SIZE_PX - BOX_PX, (2, count))
            write_blocks(folder / file, {"": Block({"rlnCoordinateX": x, "rlnCoordinateY": y})})
        given = {
            "path": np.array([f"{name}.mrc" for name in some]), "optics_row": np.zeros(len(some)),
            "coordinates_path": np.array(files), "defocus_u_A": np.full(len(some), 1e4),
            "defocus_v_A": np.full(len(some), 9e3), "defocus_angle_deg": np.zeros(len(some)),
        }  # fmt: skip
        write_micrographs(folder / f"{kind}.star", Micrographs(given, OPTICS))


def commands(kind: str, scale_px: int) -> dict[str, list[object]]:
    radius_px = round(0.375 * scale_px)
    relion = [
        "relion_preprocess",
        "--i",
        f"{kind}.star",
        "--coord_dir",
        f"picks_{kind}",
        "--coord_suffix",
        "_pick.star",
    ]
    relion += ["--extract", "--extract_size", BOX_PX, "--norm", "--bg_radius", radius_px, "--invert_contrast"]
    relion += ["--part_star", f"relion/{kind}.star", "--part_dir", f"relion/{kind}/"]
    dcryo = [
        "dcryo",
        "extract",
        f"{kind}.star",
        "--box",
        BOX_PX,
        "--workers",
        1,
        "--out",
        f"ours/{kind}",
        "--overwrite",
    ]
    if scale_px != BOX_PX:
        relion += ["--scale", scale_px]
        dcryo += ["--scale", scale_px]
    return {"RELION": relion, "dcryo": dcryo}


def compare(folder: Path, scale_px: int, particles: int, repeat: int) -> list[list[str]]:
    """Rows of the table: both programs, and how many times faster dcryo is."""
    taken: dict[str, list[tuple[dict, dict]]] = {"RELION": [], "dcryo": []}
    for _ in range(repeat):
        for program in taken:
            few, every = (measured.run(commands(kind, scale_px)[program], folder, "log.txt") for kind in ("few", "all"))
            taken[program].append((few, every))
    rates: dict[str, list[list[float]]] = {
        program: [
            [particles / every[clock] for _, every in runs] for clock in ("wall_s", "cpu_s")
        ] + [[(particles - 2) / (every[clock] - few[clock]) for few, every in runs] for clock in ("wall_s", "cpu_s")]
        for program, runs in taken.items()
    }  # fmt: skip
    size = f"{BOX_PX} px" if scale_px == BOX_PX else f"{BOX_PX} px to {scale_px}"
    rows = [[size, program, *(middle(values, ".0f") for values in found)] for program, found in rates.items()]
    ratios = [
        f"{median(ours) / median(theirs):.1f}"
        for ours, theirs in zip(rates["dcryo"], rates["RELION"], strict=True)
    ]  # fmt: skip
    return [*rows, [size, "ratio", *ratios]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--micrographs", type=int, default=4)
    parser.add_argument("--picks", type=int, default=1500)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    make(given.folder, given.micrographs, given.picks)
    measured.run(commands("few", 128)["dcryo"], given.folder, "log.txt")  # compiles the kernels
    rows = [
        row
        for scale_px in SCALES_PX
        for row in compare(given.folder, scale_px, given.micrographs * given.picks, given.repeat)
    ]
    heading = [
        "box",
        "",
        "per s",
        "per s of processor",
        "per s, start taken off",
        "per s of processor, start taken off",
    ]
    text = (
        f"# Extraction\n\nParticles cut out of {given.micrographs} micrographs of {SIZE_PX} x {SIZE_PX} px with "
        f"{given.picks} picks each, per second (median and range of {given.repeat}).\n\n{table(heading, rows)}\n"
        f"Made by `benchmarks/extraction.py` on: {described([machine()])}.\n"
    )
    print(text)
    if given.output:
        given.output.write_text(text)


if __name__ == "__main__":
    main()
