"""dcryo against RELION 3.1 on the same particles and the same cores: time, memory and what comes out.

    python benchmarks/relion.py data FOLDER [--only NAME ...]
    python benchmarks/relion.py run FOLDER [--only NAME ...] [--repeat 3] [--relion-repeat 1] [--skip-relion]
    python benchmarks/relion.py report FOLDER --output docs/benchmarks-relion.md

`data` simulates and imports what is not there yet. `run` does what has no result yet: each run that is done leaves a
file FOLDER/results/NAME.json, so that a session that was cut goes on where it was. Names are SET.WHAT.REPEAT, such as
c1-500.dcryo.1, c1-500.relion-3.1, c1-500.relion-4.1 and c1-500.reconstruct.1; --only takes sets, names and patterns of
names. Everything is run in the directory of its set, one command at a time.
"""

import argparse
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from statistics import median

import gemmi
import measured
import numpy as np
from measured import MIB, middle, table

from dcryo.data import mrc, star
from dcryo.data.model import read_model
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.kernels import fsc, masks, symmetry
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.rotations import angular_distance_deg

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
INITIAL_LOWPASS_A = 40
MASK_EDGE_PX = 5.0
FAR_DEG = 10.0
# Local searches start at this HEALPix order: 3 spares RELION iterations of global search, 4 is its default.
RELION_ORDERS = (3, 4)
RELION = (
    "mpirun --allow-run-as-root --oversubscribe -n 3 relion_refine_mpi --o {out}/run --auto_refine "
    "--split_random_halves --i particles.star --ref truth.mrc --firstiter_cc --ini_high {lowpass} "
    "--dont_combine_weights_via_disc --preread_images --pool 30 --pad 2 --ctf --particle_diameter {diameter} "
    "--flatten_solvent --zero_mask --oversampling 1 --healpix_order 2 --auto_local_healpix_order {order} "
    "--offset_range 5 --offset_step 2 --sym {symmetry} --low_resol_join_halves 40 --norm --scale --j 1 --random_seed 1"
)
DCRYO = (
    "dcryo refine particles.zarr --reference truth.mrc --symmetry {symmetry} --mask-diameter {diameter} "
    "--initial-lowpass {lowpass} --out {out} --overwrite"
)


@dataclass(frozen=True)
class Set:
    """Particles to refine. chains: of the model, all where empty; seed: of the simulation, None for real particles;
    relion: whether RELION's refinement of it is run; usual: whether it is part of the benchmark."""

    name: str
    symmetry: str
    particles: int
    seed: int | None
    chains: str = ""
    diameter_A: int = 190
    box_px: int = 128
    pixel_size_A: float = 2.0
    relion: bool = True
    usual: bool = True


SETS = (
    Set("bgal", "D2", 1157, None, diameter_A=180, box_px=64, pixel_size_A=3.54),
    Set("d2-500", "D2", 500, 11),
    Set("c1-250", "C1", 250, 12, "ABC"),
    Set("c1-500", "C1", 500, 13, "ABC"),
    Set("c1-5000", "C1", 5000, 14, "ABC", relion=False),
    # To see that everything runs; only when it is named.
    Set("smoke", "D2", 60, 15, box_px=32, pixel_size_A=8.0, usual=False),
)

# Real particles: see tests/test_beta_galactosidase.py, where each of these numbers comes from.
TO_RELIONS_FRAME = np.array([[0.0, 1, 0], [0, 0, -1], [-1, 0, 0]])
DEFOCUS_U_A = {21: 10920.0, 22: 9850.0, 23: 10663.0, 24: 11680.0, 25: 10688.0}
DEFOCUS_V_A = {21: 10585.0, 22: 9539.0, 23: 10329.0, 24: 11326.0, 25: 10346.0}
REAL_SPHERE_A, REAL_FIRST_SHELL = 185.0, 4


def make_data(data: Set, folder: Path) -> None:
    """particles.star, its stack, truth.mrc, particles.zarr and, of simulated particles, truth.star and truth.zarr."""
    if not SHARED_DATA.is_dir():
        raise SystemExit("the reference data (shared/data beside the checkout) is needed and not there")
    here = folder / data.name
    here.mkdir(parents=True, exist_ok=True)
    results = folder / "results"
    if data.seed is None:
        if not (here / "particles.mrcs").exists():
            make_real(data, here)
    else:
        model = make_model(data, here)
        command = (
            f"dcryo simulate {model} --particles {data.particles} --box {data.box_px} --pixel-size "
            f"{data.pixel_size_A:g} --snr 0.1 --seed {data.seed} --out simulated --resume"
        )
        measured.run(command.split(), here, "simulate.log")
        for name in ("particles.star", "particles.mrcs", "truth.star", "truth.mrc"):
            (here / name).unlink(missing_ok=True)
            (here / name).symlink_to(Path("simulated") / name)
    for name in ("particles", "truth"):
        if (here / f"{name}.star").exists():
            words = ["dcryo", "import", f"{name}.star", "--out", f"{name}.zarr", "--overwrite"]
            measured.once(
                results / f"{data.name}.import-{name}.json",
                lambda words=words: {"set": data.name, "measured": measured.run(words, here, "import.log")},
            )


def make_model(data: Set, here: Path) -> str:
    """The atomic model of a set, written into its directory, where it has but some of the chains."""
    structure = gemmi.read_structure(str(SHARED_DATA / "models" / "5a1a.pdb"))
    for chain in [chain.name for chain in structure[0]]:
        if data.chains and chain not in data.chains:
            structure[0].remove_chain(chain)
    structure.write_minimal_pdb(str(here / "model.pdb"))
    return "model.pdb"


def make_real(data: Set, here: Path) -> None:
    """Beta-galactosidase: all particles, without poses or half sets, and the density of its model."""
    star.write_particles(here / "all.star", real_particles())
    model = read_model(SHARED_DATA / "models" / "5a1a.pdb")
    truth = gaussian_density(
        model.position_A @ TO_RELIONS_FRAME.T, model.amplitude, model.bfactor_A2, data.box_px, data.pixel_size_A
    )
    mrc.write_map(here / "truth.mrc", truth, data.pixel_size_A)
    for command in (
        "dcryo import all.star --out all.zarr --overwrite",
        "dcryo export all.zarr --stack --out particles.star --overwrite",
    ):
        measured.run(command.split(), here, "data.log")


def real_particles() -> Particles:
    """All particles that have images, with their micrograph's CTF."""
    folder = SHARED_DATA / "bgal_empiar10204"
    every = star.read_particles(folder / "Extract" / "job009" / "particles.star")
    derived = star.read_particles(folder / "derived_relion_poses.star")
    number, derived_number = micrographs(every), micrographs(derived)
    kept = np.isin(number, list(DEFOCUS_U_A))
    every, number = every.take(kept), number[kept]
    angle = {of: np.median(derived["defocus_angle_deg"][derived_number == of]) for of in DEFOCUS_U_A}
    columns = {name: values for name, values in every.columns.items() if name not in ("rotation", "origin_A", "half")}
    columns |= {
        "image_path": np.char.add(f"{folder}/", every["image_path"]),
        "defocus_u_A": np.array([DEFOCUS_U_A[of] for of in number]),
        "defocus_v_A": np.array([DEFOCUS_V_A[of] for of in number]),
        "defocus_angle_deg": np.array([angle[of] for of in number]),
    }
    return Particles(columns, every.optics)


def micrographs(particles: Particles) -> np.ndarray:
    return np.array([int(name.split("20170629_")[1][:5]) for name in particles["micrograph"].tolist()])


def volume(path: Path) -> np.ndarray:
    return mrc.read_map(path).array


def inside(data: Set) -> np.ndarray:
    """The soft sphere in which all maps of a set are compared."""
    diameter_A = REAL_SPHERE_A if data.seed is None else data.diameter_A
    return masks.sphere(data.box_px, diameter_A / data.pixel_size_A, MASK_EDGE_PX)


def correlation(data: Set, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    sphere = inside(data)
    return fsc.shell_correlation(first * sphere, second * sphere)


def resolution_A(data: Set, curve: Sequence[float], threshold: float) -> float:
    """Resolution at which a curve falls below a threshold. Of real particles the first shells, where the background
    of the images matters and the model has none, are not looked at."""
    first = REAL_FIRST_SHELL if data.seed is None else 0
    shell = first + fsc.crossing(np.asarray(curve[first:]), threshold)
    return data.box_px * data.pixel_size_A / shell


def map_figures(data: Set, here: Path, map_: Path, halves: tuple[Path, Path]) -> dict:
    """What the maps of a run are worth: FSC with the truth and between the half maps, in the same sphere for all."""
    truth = correlation(data, volume(map_), volume(here / "truth.mrc"))
    between = correlation(data, *(volume(half) for half in halves))
    mean = truth[REAL_FIRST_SHELL:] if data.seed is None else truth[1:]
    return {
        "truth_fsc": truth.tolist(),
        "truth_A": resolution_A(data, truth, fsc.HALF),
        "truth_mean": float(mean.mean()),
        "half_fsc": between.tolist(),
        "half_A": resolution_A(data, between, fsc.GOLD_STANDARD),
    }


def pose_figures(data: Set, here: Path, found: Particles) -> dict:
    """How far the poses are from the truth; particles are matched by their place in the stack."""
    if data.seed is None:
        return {"particles": len(found)}
    truth = star.read_particles(here / "truth.star")
    place = np.empty(len(truth), dtype=int)
    place[truth["image_index"]] = np.arange(len(truth))
    truth = truth.take(place[found["image_index"]])
    off_deg = angular_distance_deg(found["rotation"], truth["rotation"], symmetry.operators(data.symmetry))
    off_A = np.linalg.norm(found["origin_A"] - truth["origin_A"], axis=1)
    return {
        "particles": len(found),
        "angle_median_deg": float(np.median(off_deg)),
        "angle_p90_deg": float(np.percentile(off_deg, 90)),
        "far_percent": float(100 * np.mean(off_deg > FAR_DEG)),
        "shift_median_A": float(np.median(off_A)),
    }


def refine_with_dcryo(data: Set, here: Path, repeat: int) -> dict:
    out = f"dcryo-{repeat}"
    command = DCRYO.format(symmetry=data.symmetry, diameter=data.diameter_A, lowpass=INITIAL_LOWPASS_A, out=out).split()
    taken = measured.run(command, here, f"{out}.log")
    record, made = Run.open(here / out).record, here / out
    seconds = [row["seconds"] for row in record["iterations"]]
    return {
        "program": "dcryo",
        "measured": taken,
        "iterations": len(seconds),
        "iteration_s": seconds,
        "claimed_A": record["result"]["resolution_A"],
        **map_figures(data, here, made / "map.mrc", (made / "half1.mrc", made / "half2.mrc")),
        **pose_figures(data, here, star.read_particles(made / "particles.star")),
    }


def refine_with_relion(data: Set, here: Path, repeat: int, order: int) -> dict:
    out = f"relion-{order}-{repeat}"
    made = here / out
    made.mkdir(exist_ok=True)
    for old in made.iterdir():
        old.unlink()
    command = RELION.format(
        out=out, lowpass=INITIAL_LOWPASS_A, diameter=data.diameter_A, order=order, symmetry=data.symmetry
    ).split()
    taken = measured.run(command, here, f"{out}.log")
    # Written at the end of every iteration, that of iteration 0 before the first; the last has files without a number.
    written = [*sorted(made.glob("run_it*_optimiser.star")), made / "run_model.star"]
    seconds = np.diff([path.stat().st_mtime for path in written]).tolist()
    general = star.read_blocks(made / "run_model.star")["model_general"]
    halves = (made / "run_half1_class001_unfil.mrc", made / "run_half2_class001_unfil.mrc")
    return {
        "program": f"RELION, local from order {order}",
        "version": relion_version(),
        "measured": taken,
        "iterations": len(seconds),
        "iteration_s": seconds,
        "claimed_A": float(general.columns["rlnCurrentResolution"][0]),
        **map_figures(data, here, made / "run_class001.mrc", halves),
        **pose_figures(data, here, star.read_particles(made / "run_data.star")),
    }


def reconstruct_with_both(data: Set, here: Path, repeat: int, skip_relion: bool) -> dict:
    """Both programs' maps from the true poses; ours are the ceiling for refinements too."""
    out = f"reconstructed-{repeat}"
    command = (
        f"dcryo reconstruct truth.zarr --symmetry {data.symmetry} --mask-diameter {data.diameter_A} --out {out} "
        "--overwrite"
    )
    ours = measured.run(command.split(), here, f"{out}.log")
    made = here / out
    halves = (made / "half1.mrc", made / "half2.mrc")
    found = {
        "dcryo": {
            "measured": ours,
            "claimed_A": Run.open(made).record["result"]["resolution_A"],
            "half1_fsc": correlation(data, volume(halves[0]), volume(here / "truth.mrc")).tolist(),
            **map_figures(data, here, made / "map.mrc", halves),
        }
    }
    if skip_relion:
        return found
    taken, maps = {}, {}
    for subset in ("all", "1", "2"):
        maps[subset] = here / f"{out}-relion-{subset}.mrc"
        words = (
            f"relion_reconstruct --i truth.star --o {maps[subset].name} --ctf --angpix {data.pixel_size_A:g} --pad 2 "
            f"--sym {data.symmetry}"
        ).split() + ([] if subset == "all" else ["--subset", subset])
        taken[subset] = measured.run(words, here, f"{out}-relion.log")
    found["relion"] = {
        "version": relion_version(),
        "measured": taken,
        "half1_fsc": correlation(data, volume(maps["1"]), volume(here / "truth.mrc")).tolist(),
        **map_figures(data, here, maps["all"], (maps["1"], maps["2"])),
    }
    return found


def relion_version() -> str:
    said = subprocess.run(["relion_refine", "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.split(":")[1].strip() for line in said.splitlines() if "version" in line), "unknown")


def planned(data: Set, repeat: int, relion_repeat: int, skip_relion: bool) -> list[tuple[str, Callable[[Path], dict]]]:
    """Names of a set's runs, in turn, and what makes each in the set's directory."""
    jobs: list[tuple[str, Callable[[Path], dict]]] = []
    for number in range(1, max(repeat, relion_repeat) + 1):
        if number <= repeat:
            jobs.append((f"{data.name}.dcryo.{number}", lambda here, n=number: refine_with_dcryo(data, here, n)))
            if data.seed is not None:
                # A name of its own without RELION, so that a later run with it is not taken for done.
                what = "reconstruct-alone" if skip_relion else "reconstruct"
                jobs.append(
                    (
                        f"{data.name}.{what}.{number}",
                        lambda here, n=number: reconstruct_with_both(data, here, n, skip_relion),
                    )
                )
        if number <= relion_repeat and data.relion and not skip_relion:
            jobs += [
                (
                    f"{data.name}.relion-{order}.{number}",
                    lambda here, n=number, order=order: refine_with_relion(data, here, n, order),
                )
                for order in RELION_ORDERS
            ]
    return jobs


def wanted(name: str, only: Sequence[str] | None) -> bool:
    """Whether a run, or a set, is meant by --only."""
    return only is None or any(name == given or name.startswith(f"{given}.") or fnmatch(name, given) for given in only)


def chosen_sets(only: Sequence[str] | None) -> list[Set]:
    if only is None:
        return [data for data in SETS if data.usual]
    return [data for data in SETS if any(fnmatch(data.name, given.split(".")[0]) for given in only)]


def run_all(options: argparse.Namespace) -> None:
    left = []
    for data in chosen_sets(options.only):
        for name, job in planned(data, options.repeat, options.relion_repeat, options.skip_relion):
            path = options.folder / "results" / f"{name}.json"
            if wanted(name, options.only) and not path.exists():
                left.append((path, data, job))
    for _, data, _ in left:
        if not (options.folder / "results" / f"{data.name}.import-particles.json").exists():
            raise SystemExit(f"{data.name}: there is no data; run the command data first")
    if left:
        measured.warm_up(options.folder)
    for path, data, job in left:
        here = options.folder / data.name
        measured.once(path, lambda data=data, job=job, here=here: {"set": data.name, **job(here)})


def results(folder: Path, data: Set, what: str) -> list[dict]:
    return [measured.load(path) for path in sorted((folder / "results").glob(f"{data.name}.{what}.*.json"))]


def reconstructions(folder: Path, data: Set) -> list[dict]:
    return results(folder, data, "reconstruct") or results(folder, data, "reconstruct-alone")


def seconds(runs: Sequence[dict]) -> list[float]:
    return [run["measured"]["wall_s"] for run in runs]


def memory(takens: Sequence[dict]) -> str:
    """Peak memory of all processes and of the largest, MiB, medians."""
    return " / ".join(f"{median(taken[of] for taken in takens) / MIB:.0f}" for of in ("tree_bytes", "largest_bytes"))


def figure(runs: Sequence[dict], name: str, form: str = ".2f") -> str:
    values = [run[name] for run in runs if name in run]
    return f"{median(values):{form}}" if values else ""


def refinement_rows(folder: Path, data: Set) -> list[list[str]]:
    """A row for each program, and one for the ceiling: a reconstruction from the true poses."""
    rows = []
    ours = results(folder, data, "dcryo")
    for what in ("dcryo", *(f"relion-{order}" for order in RELION_ORDERS)):
        runs = results(folder, data, what)
        if not runs:
            continue
        ratio = median(seconds(runs)) / median(seconds(ours)) if ours else float("nan")
        rows.append(
            [
                data.name, runs[0]["program"], len(runs), middle(seconds(runs)), f"{ratio:.1f}",
                f"{median(run['measured']['cpu_s'] for run in runs):.0f}", memory([run["measured"] for run in runs]),
                figure(runs, "iterations", ".0f"), *quality(runs), figure(runs, "angle_median_deg"),
                figure(runs, "angle_p90_deg"), figure(runs, "far_percent", ".1f"), figure(runs, "shift_median_A"),
            ]
        )  # fmt: skip
    known = [run["dcryo"] for run in reconstructions(folder, data)]
    if known:
        blank = [""] * 5
        rows.append([data.name, "ceiling: true poses", len(known), *blank, *quality(known), *["0"] * 4])
    return rows


def quality(runs: Sequence[dict]) -> list[str]:
    resolutions = [figure(runs, name) for name in ("claimed_A", "half_A", "truth_A")]
    return [*resolutions, figure(runs, "truth_mean", ".3f")]


REFINEMENT_HEADER = (
    "set", "program", "runs", "wall s", "times ours", "CPU s", "MiB, all / largest process", "iterations", "claimed A",
    "half maps A", "truth A", "truth mean FSC", "angle median deg", "angle 90 % deg", "> 10 deg %", "shift median A",
)  # fmt: skip


def reconstruction_rows(folder: Path, data: Set) -> list[list[str]]:
    runs = [run for run in results(folder, data, "reconstruct") if "relion" in run]
    if not runs:
        return []
    ours = median(run["dcryo"]["measured"]["wall_s"] for run in runs)
    of = {subset: median(run["relion"]["measured"][subset]["wall_s"] for run in runs) for subset in ("all", "1", "2")}
    total = sum(of.values())
    # Shell 0 is the mean of the map, which nobody looks at.
    pair = np.array([runs[0]["dcryo"]["half1_fsc"], runs[0]["relion"]["half1_fsc"]])[:, 1:]
    lack = pair[1] - pair[0]
    worst, best = int(np.argmax(lack)), int(np.argmin(lack))
    return [
        [
            data.name, len(runs), f"{ours:.1f}", f"{total:.1f}", f"{of['all']:.1f}", f"{total / ours:.1f}",
            memory([run["dcryo"]["measured"] for run in runs]),
            memory([run["relion"]["measured"]["all"] for run in runs]),
            f"{pair[0].mean():.4f}", f"{pair[1].mean():.4f}", f"{lack[worst]:+.4f} in shell {worst + 1}",
            f"{-lack[best]:+.4f} in shell {best + 1}",
        ]
    ]  # fmt: skip


RECONSTRUCTION_HEADER = (
    "set", "runs", "dcryo s", "RELION s, three runs", "RELION s, all particles alone", "times ours", "dcryo MiB",
    "RELION MiB", "dcryo half 1 mean FSC", "RELION half 1 mean FSC", "most that ours lacks", "most that ours gains",
)  # fmt: skip


def iteration_rows(folder: Path, data: Set) -> list[list[str]]:
    rows = []
    for what in ("dcryo", *(f"relion-{order}" for order in RELION_ORDERS)):
        runs = results(folder, data, what)
        if runs:
            rows.append([data.name, runs[0]["program"], " ".join(f"{each:.1f}" for each in runs[0]["iteration_s"])])
    return rows


def extrapolated_rows(folder: Path) -> list[list[str]]:
    """RELION's time for 5,000 particles without symmetry, from 250 and 500: see the text of the report."""
    of = {data.name: data for data in SETS}
    small, large, target = (of[name] for name in ("c1-250", "c1-500", "c1-5000"))
    ours = results(folder, target, "dcryo")
    rows = []
    for order in RELION_ORDERS:
        pair = [results(folder, data, f"relion-{order}") for data in (small, large)]
        if not all(pair):
            continue
        each = [median(run["measured"]["wall_s"] / run["iterations"] for run in runs) for runs in pair]
        iterations = median(run["iterations"] for run in pair[1])
        slope = (each[1] - each[0]) / (large.particles - small.particles)
        offset = each[0] - slope * small.particles
        total = iterations * (offset + slope * target.particles)
        rows.append(
            [
                f"RELION, local from order {order}", f"{each[0]:.1f}", f"{each[1]:.1f}", f"{offset:.1f}",
                f"{1000 * slope:.1f}", f"{iterations:.0f}", f"{total:.0f}",
                f"{median(seconds(ours)):.0f}" if ours else "", f"{total / median(seconds(ours)):.1f}" if ours else "",
            ]
        )  # fmt: skip
    return rows


EXTRAPOLATION_HEADER = (
    "program", "s per iteration at 250", "at 500", "a, s", "b, s per 1,000 particles", "iterations at 500",
    "extrapolated s at 5,000", "dcryo s, measured", "times ours",
)  # fmt: skip


def import_rows(folder: Path, data: Set) -> list[list[str]]:
    rows = []
    for name in ("particles", "truth"):
        path = folder / "results" / f"{data.name}.import-{name}.json"
        if path.exists():
            taken = measured.load(path)["measured"]
            rows.append([data.name, f"{name}.star", f"{taken['wall_s']:.1f}", memory([taken])])
    return rows


def report(folder: Path, only: Sequence[str] | None) -> str:
    paths = sorted((folder / "results").glob("*.json"))
    if not paths:
        raise SystemExit(f"{folder}: there are no results; run the commands data and run first")
    sets = chosen_sets(only)
    every = [measured.load(path) for path in paths]
    versions = {run["version"] for run in every if "version" in run}
    versions |= {run["relion"]["version"] for run in every if "relion" in run}
    extrapolated = extrapolated_rows(folder)

    def rows(of: Callable[[Path, Set], list[list[str]]]) -> list[list[str]]:
        return [row for data in sets for row in of(folder, data)]

    sizes = table(
        ("set", "particles", "box px", "pixel A", "symmetry", "diameter A", "what"),
        [
            [data.name, data.particles, data.box_px, data.pixel_size_A, data.symmetry, data.diameter_A, kind(data)]
            for data in sets
        ],
    )
    parts = [
        "# dcryo and RELION on the same particles\n",
        "Written by `benchmarks/relion.py report`. "
        f"On {measured.described(run['machine'] for run in every)}; "
        f"RELION {', '.join(sorted(versions)) or 'not run'}.\n",
        "Times are by the clock, of whole processes, start and the writing of files included; medians, with the range "
        "where there are several runs. One program at a time has the cores: dcryo a thread on each, RELION a leader, "
        "which waits, and two followers of one thread. dcryo's kernels were compiled before. Memory is the peak of the "
        "resident memory summed over all processes every 0.1 s (shared pages count for each process) and that of the "
        "largest process.\n",
        "Maps are compared in the same soft sphere, of the diameter of the table (185 A for bgal) with an edge of 5 "
        "px: `half maps A` is where the FSC of a program's two half maps falls below 0.143, `truth A` where that of "
        "its final map with the density that was simulated (for bgal: of the atomic model) falls below 0.5, `truth "
        "mean FSC` the mean over all shells (bgal: 4 to 32). `claimed A` is what a program says itself: dcryo of "
        "masked half maps, RELION during refinement of half maps without a mask. Angles and shifts are off the true "
        "ones, up to symmetry, without turning the whole map onto the truth. The ceiling is `dcryo reconstruct` from "
        "true poses.\n",
        "## Particles\n", sizes,
        "First references are the truth, low-passed at 40 A by each program itself. Simulated particles: 5A1A "
        "(beta-galactosidase), SNR 0.1. RELION's reconstruction and refinement pad by two.\n",
        "## Refinement\n", table(REFINEMENT_HEADER, rows(refinement_rows)),
        "RELION starts local searches at HEALPix order 4 by default; from order 3 it does fewer iterations of global "
        "search, which is a favour.\n",
        "### Seconds of each iteration, first run\n", table(("set", "program", "s"), rows(iteration_rows)),
        "RELION's are between the times at which it wrote the files of its iterations, the last one being that to "
        "Nyquist with all particles.\n",
        "### Import\n", "dcryo reads a stack once into a store, which is not part of the times above.\n",
        table(("set", "file", "wall s", "MiB, all / largest process"), rows(import_rows)),
    ]  # fmt: skip
    if extrapolated:
        parts += [
            "### 5,000 particles without symmetry\n",
            "**RELION was not run on 5,000 particles; its time here is extrapolated.** Seconds per iteration (wall "
            "time of the whole run over the number of its iterations) are taken to be a + b N, a and b from the runs "
            "with 250 and 500 particles, and there are taken to be as many iterations as with 500. More particles "
            "reach a higher resolution, at which each costs more, and may take more or fewer iterations; neither is "
            "in it.\n",
            table(EXTRAPOLATION_HEADER, extrapolated),
        ]
    reconstruction = rows(reconstruction_rows)
    if reconstruction:
        parts += [
            "## Reconstruction from true poses\n",
            "`dcryo reconstruct` makes both half maps, the merged map and their FSC; of RELION the same takes three "
            "runs (all particles, half 1, half 2), one after the other. `half 1` is compared with the truth, shell by "
            "shell.\n",
            table(RECONSTRUCTION_HEADER, reconstruction),
        ]
    return "\n".join([*parts, "## Commands\n", *commands(folder, sets)])


def kind(data: Set) -> str:
    if data.seed is None:
        return "real (EMPIAR-10204)"
    return f"simulated, seed {data.seed}, " + (f"chains {', '.join(data.chains)}" if data.chains else "all chains")


def commands(folder: Path, sets: Sequence[Set]) -> list[str]:
    """The commands of the first run of each kind, as they were given in the set's directory."""
    lines: list[str] = []
    for data in sets:
        programs = ("dcryo", *(f"relion-{order}" for order in RELION_ORDERS))
        found = [run["measured"]["command"] for what in programs for run in results(folder, data, what)[:1]]
        for run in reconstructions(folder, data)[:1]:
            found.append(run["dcryo"]["measured"]["command"])
            found += [taken["command"] for taken in run.get("relion", {}).get("measured", {}).values()]
        if found:
            lines += [f"{data.name}:\n", "```", *dict.fromkeys(found), "```\n"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands_ = parser.add_subparsers(dest="command", required=True)
    for name in ("data", "run", "report"):
        command = commands_.add_parser(name)
        command.add_argument("folder", type=Path)
        command.add_argument("--only", nargs="+", metavar="NAME", help="sets, names of runs, or patterns of names")
        if name == "run":
            command.add_argument("--repeat", type=int, default=3)
            command.add_argument("--relion-repeat", type=int, default=1, help="refinements by RELION take long")
            command.add_argument("--skip-relion", action="store_true")
        elif name == "report":
            command.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if options.command == "data":
        for data in chosen_sets(options.only):
            make_data(data, options.folder)
    elif options.command == "run":
        run_all(options)
    else:
        options.output.write_text(report(options.folder, options.only))


if __name__ == "__main__":
    main()
