"""dcryo motion against relion_run_motioncorr on the same simulated movies: time, memory, and the distance to the truth.

    python benchmarks/motion.py FOLDER [--sizes 1024x1200 2048x2048 3838x3710] [--contrasts 0.05 0.15] [--repeat 3]

Movies have 24 frames of 1 electron a pixel, 0.885 A and 200 kV, the specimen of tests/movie_making.py, and the motion
of real ones: the whole-frame track of a movie of EMPIAR-10204 and a local model of about the size of its own. Both
programs get one thread, and 5 x 5 patches. A result that is there already is not made again.
"""

import argparse
import sys
from pathlib import Path

import measured
import mrcfile
import numpy as np
import scipy.fft
from measured import MIB, middle, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from movie_making import REAL_TRACK_PX, Truth, make_movie, ring_contrast

from dcryo.data import micrographs
from dcryo.data.motion import read_motion
from dcryo.kernels.motion import Motion

SIZE_A = 0.885
MODEL = np.zeros((2, 18))
MODEL[0, [3, 4, 6, 9, 12, 15]] = [-0.16, 0.003, 0.1, 0.08, -0.06, 0.05]
MODEL[1, [3, 6, 9, 10, 12, 15]] = [0.07, -0.06, -0.15, 0.003, 0.09, -0.06]
COMMANDS = {
    "dcryo": "dcryo motion {movie} --out {out} --overwrite --workers 1 --dose-per-frame 1.277 --voltage 200 "
    "--save-unweighted",
    "RELION": "relion_run_motioncorr --i {movie} --o {out}/ --use_own --j 1 --patch_x 5 --patch_y 5 --angpix 0.885 "
    "--voltage 200 --dose_per_frame 1.277 --dose_weighting --save_noDW --bin_factor 1 --bfactor 150",
}


def errors_px(path: Path, truth: Truth) -> tuple[float, float]:
    """Root mean square over 5 x 5 places and the frames: against the first frame, and against each track's mean."""
    found = read_motion(path)
    ny, nx = truth.specimen.shape
    motion = Motion(found.frame_px, np.zeros((2, 18)) if found.coefficients is None else found.coefficients)
    places = np.array([(x, y) for x in np.linspace(-0.4, 0.4, 5) for y in np.linspace(-0.4, 0.4, 5)])
    true = np.array([truth.track_px((x + 0.5) * nx, (y + 0.5) * ny) for x, y in places])
    difference = -motion.at(places) - true
    centred = difference - difference.mean(axis=1, keepdims=True)
    return float(np.sqrt(np.mean(difference**2))), float(np.sqrt(np.mean(centred**2)))


def measure(folder: Path, program: str, truth: Truth, repeat: int) -> dict:
    """A program's runs, and what came out of the last."""
    command = COMMANDS[program].format(movie="movie.mrcs", out=program).split()
    runs = [measured.run(command, folder, f"{program}.txt") for _ in range(repeat)]
    to_first, to_mean = errors_px(folder / program / "movie.star", truth)
    return {
        "wall_s": [run["wall_s"] for run in runs],
        "cpu_s": [run["cpu_s"] for run in runs],
        "peak_mib": max(run["largest_bytes"] for run in runs) / MIB,
        "to_first_px": to_first,
        "to_mean_px": to_mean,
        "rings": contrast(micrographs.read_image(folder / program / "movie_noDW.mrc")),
    }


def likeness(image: np.ndarray, specimen: np.ndarray) -> float:
    """Correlation of a micrograph with the specimen without noise, between 6 and 4 A."""
    ny, nx = image.shape
    k = np.hypot(np.fft.fftfreq(ny, SIZE_A)[:, None], np.fft.rfftfreq(nx, SIZE_A))
    ring = (k > 1 / 6) & (k < 1 / 4)
    edge = np.outer(np.hanning(ny), np.hanning(nx))
    a, b = (scipy.fft.rfft2((one - one.mean()) * edge)[ring] for one in (image, specimen))
    return float(np.vdot(a, b).real / np.sqrt(np.vdot(a, a).real * np.vdot(b, b).real))


def contrast(image: np.ndarray) -> float:
    return ring_contrast(image, SIZE_A, 8.0, 4.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["1024x1200", "2048x2048", "3838x3710"])
    parser.add_argument("--contrasts", nargs="+", type=float, default=[0.05, 0.15])
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        for strength in options.contrasts:
            folder = options.folder / f"{size}-{strength}"
            folder.mkdir(parents=True, exist_ok=True)
            shape = tuple(int(side) for side in size.split("x"))
            truth = make_movie((shape[0], shape[1]), REAL_TRACK_PX, MODEL, seed=1, contrast=strength)
            with mrcfile.new(folder / "movie.mrcs", overwrite=True) as file:
                file.set_data(truth.frames.astype(np.int8))
                file.voxel_size = SIZE_A
            plain = contrast(truth.frames.sum(axis=0, dtype=np.float32))
            for program in COMMANDS:

                def made(program: str = program, folder: Path = folder, truth: Truth = truth) -> dict:
                    return measure(folder, program, truth, options.repeat)

                found = measured.once(folder / f"{program}.json", made)
                like = likeness(micrographs.read_image(folder / program / "movie_noDW.mrc"), truth.specimen)
                rows.append(
                    [size, strength, program, middle(found["wall_s"]), middle(found["cpu_s"]),
                     f"{found['peak_mib']:.0f}", f"{found['to_first_px']:.3f}", f"{found['to_mean_px']:.3f}",
                     f"{found['rings']:.2f} ({plain:.2f})",
                     f"{like:.3f}"]
                )  # fmt: skip
    header = [
        "frames",
        "contrast",
        "program",
        "wall s",
        "CPU s",
        "MiB",
        "error px",
        "about the mean",
        "rings (uncorrected)",
        "likeness",
    ]
    print(table(header, rows))


if __name__ == "__main__":
    main()
