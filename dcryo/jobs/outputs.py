"""What jobs that end in a gold-standard pair of maps write."""

from pathlib import Path

import numpy as np

from dcryo.data import mrc
from dcryo.data.curves import read_curves, write_curves, write_fsc_xml
from dcryo.jobs.em import Maps, merged
from dcryo.kernels import fsc
from dcryo.steps.maximisation import HalfFsc


def write_maps(out: Path, pixel_size_A: float, maps: Maps, mask: np.ndarray) -> float:
    """Write half1.mrc, half2.mrc, map.mrc, mask.mrc, fsc.csv and fsc.xml; returns the resolution at FSC 0.143."""
    box = mask.shape[0]
    first, second = maps.plain
    for name, array in {"half1": first, "half2": second, "map": merged(maps), "mask": mask}.items():
        mrc.write_map(out / f"{name}.mrc", array, pixel_size_A)
    write_curves(out / "fsc.csv", box, pixel_size_A, {"fsc_unmasked": maps.fsc.unmasked, "fsc_masked": maps.fsc.masked})
    write_fsc_xml(out / "fsc.xml", box, pixel_size_A, maps.fsc.masked)
    return fsc.resolution_at(maps.fsc.masked, fsc.GOLD_STANDARD, box, pixel_size_A)


def read_maps(out: Path) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, HalfFsc]:
    """What `write_maps` left: the half maps, the map and the FSC. InputError where a file is gone or damaged."""
    first, second, merged = (mrc.read_map(out / f"{name}.mrc").array for name in ("half1", "half2", "map"))
    curves = read_curves(out / "fsc.csv")
    return (first, second), merged, HalfFsc(curves["fsc_unmasked"], curves["fsc_masked"])
