"""Local resolution beside RELION's, on the same half maps: how well the maps agree, and what each costs.

Half maps of known local resolution are simulated: a phantom whose upper part goes to one resolution and whose lower
part to another, with white noise. Others may be given. RELION's local resolution runs with its default sampling of
25 A and, with --sampling, another.

    python benchmarks/localres.py --out DIR [--box 96] [--halves HALF1 HALF2 --mask MASK] [--sampling 25]
"""

import argparse
import resource
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np

from dcryo.data import mrc
from dcryo.jobs.localres import LocalResolutionOptions, localres
from dcryo.kernels import filters, fsc
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.masks import cosine_edge
from dcryo.kernels.phantom import phantom
from dcryo.kernels.randomness import generator


def simulated(out: Path, box: int, pixel: float, fine_A: float, coarse_A: float) -> tuple[Path, Path, Path]:
    """Two half maps and a mask, as files; the noise has a half of the signal's power at 1.1 times the finer limit."""
    atoms = phantom(np.eye(3)[None], 0.33 * box * pixel)
    density = gaussian_density(atoms.position_A, atoms.amplitude, 0.5 * atoms.bfactor_A2, box, pixel)
    upper = np.arange(box)[:, None, None] >= box // 2
    truth = np.where(upper, filters.lowpass(density, pixel, fine_A), filters.lowpass(density, pixel, coarse_A))
    sigma = 2 * np.sqrt(fsc.shell_power(truth)[round(box * pixel / (1.1 * fine_A))] / box**3)
    paths = out / "sim_half1_class001_unfil.mrc", out / "sim_half2_class001_unfil.mrc", out / "mask.mrc"
    for number, path in enumerate(paths[:2]):
        noise = generator(7, "noise", number).standard_normal((box,) * 3)
        mrc.write_map(path, (truth + sigma * noise).astype(np.float32), pixel)
    smooth = filters.lowpass(density, pixel, 20.0)
    inside = filters.lowpass((smooth > 0.15 * smooth.max()).astype(np.float32), pixel, 12.0)
    mrc.write_map(paths[2], 1 - cosine_edge(inside, 0.1, 0.3), pixel)
    return paths


def relion(half1: Path, mask: Path, pixel: float, sampling: float, out: Path) -> tuple[np.ndarray, float]:
    """RELION's map of local resolution, and its processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["--i", half1, "--mask", mask, "--angpix", pixel, "--o", out / "relion", "--locres", "--adhoc_bfac", -0.001]
    # Its histogram may fail where there is no viewer for it, when the maps are already there.
    subprocess.run(
        ["relion_postprocess", *map(str, words), "--locres_sampling", str(sampling)], capture_output=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return mrc.read_map(out / "relion_locres.mrc").array, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--box", type=int, default=96)
    parser.add_argument("--pixel", type=float, default=2.0)
    parser.add_argument("--limits", type=float, nargs=2, default=(4.5, 9.0), help="of the upper and the lower part, A")
    parser.add_argument("--halves", type=Path, nargs=2)
    parser.add_argument("--mask", type=Path)
    parser.add_argument("--threshold", type=float, default=0.143)
    parser.add_argument("--window", type=float, help="least width of windows (default: that of the command)")
    parser.add_argument("--sampling", type=float, default=25.0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.halves:
        paths = given.out / "sim_half1_class001_unfil.mrc", given.out / "sim_half2_class001_unfil.mrc", given.mask
        for source, path in zip(given.halves, paths, strict=False):
            shutil.copyfile(source, path)
    else:
        paths = simulated(given.out, given.box, given.pixel, *given.limits)
    half1, half2, mask = paths
    options = LocalResolutionOptions(
        source=half1, half2=half2, mask=mask, threshold=given.threshold, window_A=given.window, workers=2,
        out=given.out / "dcryo", overwrite=True,
    )  # fmt: skip
    for _ in range(2):  # the first compiles
        started = time.process_time()
        made = localres(options, progress=lambda *_, **__: None)
        used = time.process_time() - started
    inside = mrc.read_map(mask).array > 0.5
    pixel = mrc.read_map(half1).voxel_size_A
    theirs, relions = relion(half1, mask, pixel, given.sampling, given.out)
    ours, box = made.resolution_A, len(inside)
    print(f"box {box} of {pixel:g} A, {made.global_A:.2f} A on the whole; correlation inside the mask "
          f"{np.corrcoef(ours[inside], theirs[inside])[0, 1]:.3f}")  # fmt: skip
    times = f"dcryo {used:.1f} s, RELION {relions:.1f} s at {given.sampling:g} A"
    print(f"processor time: {times}: {relions / used:.0f} times")
    if given.halves:
        return
    z = (np.arange(box)[:, None, None] - box // 2) * pixel * np.ones(inside.shape)
    for limit, part in zip(given.limits, (z > 15, z < -20), strict=True):
        for name, found in (("dcryo", ours), ("RELION", theirs)):
            low, middle, high = np.percentile(found[inside & part], [5, 50, 95])
            print(f"part to {limit:g} A: {name} median {middle:.2f} A ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
