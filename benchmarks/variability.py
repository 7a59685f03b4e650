"""Continuous variability: a domain that swings by 30 degrees, found with true poses and with those of a refinement.

    python benchmarks/variability.py run FOLDER [--only NAME ...]
    python benchmarks/variability.py report FOLDER --output docs/benchmarks-variability.md

The molecule is that of tests/swinging.py: a body 80 A and a domain 56 A wide, which is a sixth of the mass and turns
about a hinge by an angle uniform from -15 to 15 degrees, another for each particle; contrasts vary by 15 %, shifts by a
pixel. The mask is the union of where the domain goes. Each run leaves FOLDER/results/NAME.json and is not repeated.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measured import table
from scipy.stats import spearmanr

from dcryo.data import mrc
from dcryo.jobs.dataset import load_dataset, shard_rows
from dcryo.jobs.exchange import ImportOptions, import_particles
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.variability import VariabilityOptions, analyse
from dcryo.jobs.variability_parts import Setting, expect_shard, pack_shard, write_volumes
from dcryo.kernels import solvent
from dcryo.kernels.filters import lowpass
from dcryo.kernels.rotations import angular_distance_deg
from dcryo.kernels.shells import half_plane

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import swinging


class Set(NamedTuple):
    """Particles and where their poses are from. limit_A: of the analysis."""

    particles: int
    box_px: int
    pixel_A: float
    snr: float
    consensus: bool
    limit_A: float
    masked: bool = True


SETS = {
    "64-0.1": Set(2000, 64, 3.5, 0.1, False, 12),
    "64-0.1-sphere": Set(2000, 64, 3.5, 0.1, False, 12, False),
    "64-0.1-consensus": Set(2000, 64, 3.5, 0.1, True, 12),
    "64-0.05": Set(3000, 64, 3.5, 0.05, False, 12),
    "128-0.1": Set(2500, 128, 1.75, 0.1, False, 8),
    "128-0.1-consensus": Set(2500, 128, 1.75, 0.1, True, 8),
    "128-0.05": Set(3000, 128, 1.75, 0.05, False, 8),
    "128-0.05-consensus": Set(3000, 128, 1.75, 0.05, True, 8),
}


def run(folder: Path, name: str) -> None:
    one, place = SETS[name], folder / name.removesuffix("-consensus").removesuffix("-sphere")
    truth = place / "angle.npy"
    if not truth.is_file():
        made = swinging.make(place, one.particles, one.box_px, one.pixel_A, one.snr, contrast_sd=0.15, shift_px=1.0)
        import_particles(ImportOptions(source=made.star, out=place / "particles.zarr", overwrite=True))
        np.save(truth, made.angle_deg)
    mask, reference = _maps(place, one)
    source = place / "particles.zarr"
    figures: dict[str, Any] = {}
    if one.consensus:
        source = place / "refine"
        refined = refine(
            RefineOptions(
                store=place / "particles.zarr",
                reference=reference,
                out=source,
                resume=True,
                mask_diameter_A=swinging.MASK_DIAMETER_A,
            )
        )
        data = load_dataset(place / "particles.zarr", 0)
        true = data.rotation[np.argsort(data.particles["image_index"])][refined.particles["image_index"]]
        wrong = angular_distance_deg(refined.particles["rotation"], true, np.eye(3)[None])
        figures |= {"refined_to_A": refined.resolution_A, "pose_error_deg": float(np.median(wrong))}
    started = time.process_time()
    result = analyse(
        VariabilityOptions(
            source=source,
            out=folder / "runs" / name,
            mask=mask if one.masked else None,
            mask_diameter_A=swinging.MASK_DIAMETER_A,
            resolution_limit_A=one.limit_A,
            components=2,
            overwrite=True,
        )
    )
    figures["cpu_s"] = time.process_time() - started
    angle = np.load(truth)[result.particles["image_index"]]
    figures |= {
        "spearman": abs(float(spearmanr(result.coordinates[:, 0], angle)[0])),
        "agreement": result.agreement.tolist(),
        "supported": result.supported.tolist(),
        "iterations": json.loads((result.out / "run.json").read_text())["iterations"][-1]["iteration"],
        "cost_ms": cost(place / "particles.zarr", one),
        "memory_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / f"{name}.json").write_text(json.dumps(figures, indent=1))


def _maps(place: Path, one: Set) -> tuple[Path, Path]:
    """The mask and the first reference."""
    paths = place / "mask.mrc", place / "reference.mrc"
    if not paths[1].is_file():
        turned = [sum(swinging.parts(one.box_px, one.pixel_A, angle)) for angle in (-15, -7.5, 0, 7.5, 15)]
        sweep = lowpass(np.max(turned, axis=0), one.pixel_A, 15.0)
        core = sweep > 0.12 * sweep.max()
        mrc.write_map(paths[0], solvent.soft_mask(core, 6 / one.pixel_A, 8 / one.pixel_A), one.pixel_A)
        mrc.write_map(paths[1], turned[2], one.pixel_A)
    return paths


def cost(store: Path, one: Set, images: int = 512) -> dict[str, float]:
    """CPU milliseconds per image and iteration, by the number of components, on one core, images packed before."""
    data, out = load_dataset(store, 0), {}
    rows, ones = np.arange(min(images, len(data.particles))), np.ones(len(data.particles))
    shard = shard_rows(data, rows, "cost", ones, ones, data.rotation, data.origin_px, ones > 0)
    shell = int(one.box_px * one.pixel_A / one.limit_A)
    box = 2 * int(np.ceil(1.25 * shell))
    scratch = store.parent / "cost"
    scratch.mkdir(exist_ok=True)
    power, count, _ = pack_shard(shard, 1, shell, scratch)
    for components in (1, 3, 6):
        random = np.random.default_rng(0)
        volumes = random.standard_normal((components + 1, box, box, box)).astype(np.float32)
        path = write_volumes(volumes, shell, scratch / "volumes.npy")
        setting = Setting(power / count[:, None], shell, 1, 0.1, box)
        expect_shard(shard, scratch, path, setting, None)
        started = time.process_time()
        expect_shard(shard, scratch, path, setting, None)
        out[str(components)] = 1000 * (time.process_time() - started) / len(rows)
    out["pixels"] = len(half_plane(shell).kx)
    return out


def _angles(series: Path, prefix: str, pixel_A: float) -> str:
    files = sorted(series.glob(f"{prefix}_*.mrc"))
    return " ".join(f"{swinging.angle_in(mrc.read_map(file).array, pixel_A, 16.0):.1f}" for file in files)


def report(folder: Path, output: Path) -> None:
    done = [name for name in SETS if (folder / "results" / f"{name}.json").is_file()]
    rows, angles, costs = [], [], []
    for name in done:
        one, figures = SETS[name], json.loads((folder / "results" / f"{name}.json").read_text())
        poses = f"refined, {figures['pose_error_deg']:.1f} deg off" if one.consensus else "true"
        images, mask = f"{one.box_px} px of {one.pixel_A:g} A", "molecule" if one.masked else "sphere"
        agreement = ", ".join(f"{agreement:.2f}" for agreement in figures["agreement"])
        counts = sum(figures["supported"]), figures["iterations"]
        rows.append([images, one.particles, one.snr, poses, mask, f"{figures['spearman']:.3f}", agreement, *counts])
        series = folder / "runs" / name / "series"
        angles.append([name, *(_angles(series, prefix, one.pixel_A) for prefix in ("component1", "bins1"))])
        if not one.consensus and one.masked:
            cost = figures["cost_ms"]
            costs.append([name, int(cost["pixels"]), *(f"{cost[k]:.2f}" for k in ("1", "3", "6"))])
    heading = ["images", "particles", "SNR", "poses", "mask", "Spearman", "agreement", "supported", "iterations"]
    text = f"""# Continuous variability

{(__doc__ or "").strip().split(chr(10) * 2)[2]}

Made by `benchmarks/variability.py`. SNR is over the whole box, of the projection times the CTF: at the same SNR a box
of half the pixel size has four times the signal at each frequency. Poses are the true ones, or those of `dcryo refine`
from a first reference of the molecule with its domain in the middle.

## Whether the coordinate follows the angle
Rank correlation of the first of two coordinates with the true angle; correlation of each component between the halves,
and how many of them are supported.

{table(heading, rows)}
What falls short of 0.9 is what the images do not hold: with 64 px at SNR 0.05 the true principal components reach 0.898
too, and at refined poses 3.4 degrees off the true densities with known angles reach 0.79
([decision 023](decisions/023-variability.md)).

## Whether the maps swing
Angle of the domain against the body in degrees, fitted to each of the seven maps from the 5th to the 95th percentile
(true: -13.5 to 13.5). The sign of a component is not that of the angle.

{table(["run", "mean and component", "particles reconstructed"], angles)}
## Cost
CPU milliseconds per image and iteration on one core, by the number of components.

{table(["run", "Fourier pixels", "1", "3", "6"], costs)}"""
    output.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=list(SETS))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks-variability.md"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.what == "report":
        report(given.folder, given.output)
        return
    for name in given.only:
        if not (given.folder / "results" / f"{name}.json").is_file():
            run(given.folder, name)


if __name__ == "__main__":
    main()
