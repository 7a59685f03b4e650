"""CTF refinement of simulated particles with known truth, iterated with refinement as users do, and beside RELION's.

Apoferritin (PDB entry 7A4M) is simulated with a wrong defocus of every particle, beam tilt, trefoil and anisotropic
magnification, all at once, none of which particles.star knows. Rounds of `dcryo refine` and `dcryo ctfrefine` follow,
and a refinement that knows the truth. Each step is kept; what is there is not done again.

    python benchmarks/ctfrefine.py MODEL.cif --out DIR [--particles 2400] [--snr 0.03] [--rounds 1] [--relion]
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import measured
import numpy as np

from dcryo.data import mrc, star
from dcryo.data.particles import Particles
from dcryo.jobs.ctfrefine_table import groups_of
from dcryo.jobs.dataset import ctf_columns
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels import fsc
from dcryo.kernels.masks import sphere

DIAMETER_A = 135.0
TILT_MRAD, TREFOIL_RAD, TREFOIL_DEG, ANISOTROPY_PERCENT, ANISOTROPY_DEG = (0.25, -0.17), 1.0, 25.0, 0.5, 35.0
DEFOCUS_A = 200.0


def dcryo(work: Path, name: str, command: str) -> dict:
    """A command of dcryo in a directory, measured once."""
    words = [sys.executable, "-m", "dcryo", *command.split()]
    return measured.once(work / f"{name}.json", lambda: measured.run(words, work, f"{name}.log"))


def simulated(work: Path, given: argparse.Namespace) -> None:
    options = SimulateOptions(
        model=str(given.model.resolve()), assembly="1", particles=given.particles, box_px=given.box,
        pixel_size_A=given.pixel, snr=given.snr, seed=7, defocus_min_A=6000, defocus_max_A=16000,
        defocus_scatter_A=DEFOCUS_A, defocus_error_A=DEFOCUS_A, beam_tilt_x_mrad=TILT_MRAD[0],
        beam_tilt_y_mrad=TILT_MRAD[1], trefoil=TREFOIL_RAD, trefoil_angle_deg=TREFOIL_DEG,
        anisotropy_percent=ANISOTROPY_PERCENT, anisotropy_angle_deg=ANISOTROPY_DEG, out=work / "data", resume=True,
    )  # fmt: skip
    simulate(options)
    dcryo(work, "import", "import data/particles.star --out particles.zarr")
    dcryo(work, "import_true", "import data/truth.star --out true.zarr")


def refined(work: Path, name: str, store: str) -> dict:
    return dcryo(
        work, name,
        f"refine {store} --reference data/truth.mrc --symmetry O --mask-diameter {DIAMETER_A} --initial-lowpass 20 "
        f"--workers 2 --out {name}",
    )  # fmt: skip


def errors(work: Path, table: Path) -> dict[str, float]:
    """Errors of a table of particles: median of the defocus (A), beam tilt (mrad), trefoil (percent of it), and the
    largest error of the magnification (percent)."""
    found, true = star.read_particles(table), star.read_particles(work / "data" / "truth.star")
    own = true.take(found["image_index"])
    defocus = sum(found[name] - own[name] for name in ("defocus_u_A", "defocus_v_A")) / 2
    ours, theirs = (groups_of(of, ctf_columns(of, table)) for of in (found, true))
    per_mrad = np.abs(groups_of(_with_tilt(true), ctf_columns(true, table)).odd[0, 4] - theirs.odd[0, 4])
    apart = ours.odd[0] - theirs.odd[0]
    stretch = ours.magnification[0] - theirs.magnification[0]
    stretch -= np.eye(2) * np.trace(stretch) / 2
    return {
        "defocus_A": float(np.median(np.abs(defocus))),
        "beam_tilt_mrad": float(np.hypot(apart[3], apart[4]) / per_mrad),
        "trefoil_percent": float(100 * np.hypot(apart[2], apart[5]) / np.hypot(theirs.odd[0, 2], theirs.odd[0, 5])),
        "magnification_percent": float(100 * np.abs(np.linalg.eigvalsh((stretch + stretch.T) / 2)).max()),
    }


def _with_tilt(particles: Particles) -> Particles:
    tilt = particles.optics["beam_tilt_x_mrad"]
    return particles.replace_optics(beam_tilt_x_mrad=tilt + 1)


def agreement(work: Path, name: str) -> dict[str, float]:
    """How a refined map agrees with the truth in a sphere: sum of the FSC over shells, and resolution at 0.5."""
    truth, found = (mrc.read_map(path) for path in (work / "data" / "truth.mrc", work / name / "map.mrc"))
    box, pixel = len(truth.array), truth.voxel_size_A
    mask = sphere(box, DIAMETER_A / pixel, 8)
    curve = fsc.shell_correlation(truth.array * mask, found.array * mask)
    half = work / name / "fsc.csv"
    gold = np.genfromtxt(half, delimiter=",", names=True)["fsc_masked"]
    last = box // 2
    return {
        "fsc_sum": float(curve[1:last].sum()),
        "fsc_fine": float(curve[last * 3 // 4 : last].mean()),
        "truth_A": fsc.resolution_at(curve, 0.5, box, pixel),
        "halves_A": fsc.resolution_at(gold, fsc.GOLD_STANDARD, box, pixel),
    }


def relion(work: Path) -> dict:
    """RELION's CTF refinement from our first refinement: magnification, beam tilt and trefoil, then defocus, as its
    authors advise; its processor time, and the errors of the table that it leaves."""
    particles = star.read_particles(work / "refine0" / "particles.star")
    named = np.array([f"{index + 1:06d}@data/particles.mrcs" for index in particles["image_index"]])
    star.write_particles(work / "relion_in.star", particles, named)
    for half in (1, 2):
        (work / f"relion_half{half}_class001_unfil.mrc").write_bytes(
            (work / "refine0" / f"half{half}.mrc").read_bytes()
        )
    pixel = mrc.read_map(work / "refine0" / "map.mrc").voxel_size_A
    common = "--m1 relion_half1_class001_unfil.mrc --m2 relion_half2_class001_unfil.mrc --mask refine0/mask.mrc"
    post = "relion_postprocess --i relion_half1_class001_unfil.mrc --mask refine0/mask.mrc --o relion_post"
    (work / "relion_post").mkdir(exist_ok=True)  # for its pictures
    commands, source = [f"{post} --angpix {pixel}"], "relion_in.star"
    stretch, defocus = "--fit_aniso --kmin_mag 30 --keep_astig", "--fit_defocus --kmin_defocus 30 --fit_mode fpfff"
    tilt = "--fit_beamtilt --kmin_tilt 30 --odd_aberr_max_n 3"
    for step, fits in enumerate((stretch, defocus, tilt, stretch, defocus)):
        (work / f"relion{step}").mkdir(exist_ok=True)
        commands.append(f"relion_ctf_refine --i {source} --f relion_post.star {common} --j 2 --o relion{step}/ {fits}")
        source = f"relion{step}/particles_ctf_refine.star"
    costs = []
    for step, command in enumerate(commands):
        words, log = command.split(), f"relion_step{step}.log"
        costs.append(measured.once(work / f"relion_step{step}.json", partial(measured.run, words, work, log)))
    return {"cpu_s": sum(one["cpu_s"] for one in costs[1:]), **errors(work, work / source)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--particles", type=int, default=2400)
    parser.add_argument("--snr", type=float, default=0.03)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--pixel", type=float, default=1.2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--relion", action="store_true")
    given = parser.parse_args()
    work = given.out
    work.mkdir(parents=True, exist_ok=True)
    simulated(work, given)
    refined(work, "refine0", "particles.zarr")
    costs, found, maps = {}, {"before": errors(work, work / "refine0" / "particles.star")}, {}
    maps["before"] = agreement(work, "refine0")
    for number in range(1, given.rounds + 1):
        costs[number] = dcryo(
            work,
            f"ctf{number}",
            f"ctfrefine refine{number - 1} --magnification --keep-astigmatism --workers 2 --out ctf{number}",
        )["cpu_s"]
        found[f"round {number}"] = errors(work, work / f"ctf{number}" / "particles.star")
        refined(work, f"refine{number}", f"ctf{number}/particles.zarr")
        maps[f"round {number}"] = agreement(work, f"refine{number}")
    if given.relion:
        found["RELION, from refine0"] = relion(work)
    refined(work, "refine_true", "true.zarr")
    maps["true parameters"] = agreement(work, "refine_true")
    names = ("defocus_A", "beam_tilt_mrad", "trefoil_percent", "magnification_percent")
    print(
        measured.table(
            ("errors", *names), ((key, *(f"{row[name]:.3g}" for name in names)) for key, row in found.items())
        )
    )
    names = ("fsc_sum", "fsc_fine", "truth_A", "halves_A")
    print(
        measured.table(("map", *names), ((key, *(f"{row[name]:.4g}" for name in names)) for key, row in maps.items()))
    )
    print("CPU seconds of ctfrefine:", ", ".join(f"{cost:.0f}" for cost in costs.values()))
    if given.relion:
        print(f"CPU seconds of relion_ctf_refine: {found['RELION, from refine0']['cpu_s']:.0f}")
    print(measured.described([measured.machine()]))


if __name__ == "__main__":
    main()
