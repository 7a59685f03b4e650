"""Sections of the report on refined CTFs: changes of the defocus, phases of optics groups, and their aberrations."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcryo import figures
from dcryo.data import mrc, star

_GROUPS_SHOWN, _MICROGRAPHS_SHOWN = 6, 6


def figures_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a run, without those of optics groups that `aberrations` shows."""
    return {name: value for name, value in (record.get("result") or {}).items() if name != "groups"}


def aberrations(record: Mapping[str, Any]) -> list[list[str]]:
    """A table of each optics group's aberrations, with standard errors."""
    groups = (record.get("result") or {}).get("groups") or []
    rows = []
    for one in groups:
        tilt = (one["beam_tilt_x_mrad"], one["beam_tilt_y_mrad"]), one["beam_tilt_error_mrad"]
        rows.append(
            [
                one["name"],
                f"{one['particles']:,}",
                _with_error("{:+.3f}, {:+.3f}", *tilt),
                f"{one['odd_deg']:.0f}",
                _with_error("{:.0f}", (one["trefoil_A"],), one["trefoil_error_A"], one["trefoil_angle_deg"]),
                _with_error("{:.2f}", (one["tetrafoil_A"] / 1e4,), one["tetrafoil_error_A"] / 1e4,
                            one["tetrafoil_angle_deg"]),
                _with_error("{:+.3f}", (one["spherical_aberration_change_mm"],), one["spherical_aberration_error_mm"]),
                _with_error("{:.2f}", (one["anisotropy_percent"],), one["magnification_error_percent"],
                            one["anisotropy_angle_deg"]),
            ]
        )  # fmt: skip
    heading = ["optics group", "particles", "beam tilt x, y (mrad)", "odd phase at the resolution (°)", "trefoil (Å)",
               "tetrafoil (µm)", "change of Cs (mm)", "anisotropic magnification (%)"]  # fmt: skip
    return [heading, *rows] if rows else []


def _with_error(form: str, values: Sequence[float], error: float, angle_deg: float | None = None) -> str:
    """Values with their standard error, and the angle of an axis; in words where they were not fitted and are 0."""
    if error == 0:
        return form.format(*values) + ", not fitted" if any(values) else "not fitted"
    digits = form.rpartition(".")[2].removesuffix("f}")
    said = f"{form.format(*values)} ± {error:.{digits}f}"
    return said if angle_deg is None else f"{said} at {angle_deg:.0f}°"


def phases(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Phases of the optics groups as observed beside those fitted."""
    groups = (record.get("result") or {}).get("groups") or []
    if not groups or not (path / "phases.mrcs").is_file():
        return None
    stack = mrc.open_stack(path / "phases.mrcs")
    pictures = {
        str(one["name"]): stack.read(range(4 * index, 4 * index + 4))
        for index, one in enumerate(groups[:_GROUPS_SHOWN])
    }
    finest = float(record["result"]["fitted_to_A"])
    words = (
        f"Phases over the plane of spatial frequencies, zero in the middle, to {finest:.2f} Å at the rim: on the left "
        "of each pair as the particles show them (averaged over neighbours), on the right as fitted. Odd phases "
        "are of beam tilt, trefoil and a common shift; even ones of what is left beside defocus, astigmatism and "
        "spherical aberration."
    )
    return figures.phases(pictures), words


def defocus_changes(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """How far the defocus of particles moved, and how it lies about the means of their micrographs."""
    result = record.get("result") or {}
    if not result or record["options"].get("defocus") == "no":
        return None
    particles = star.read_particles(path / "particles.star")
    change = particles.extra["dcryoDefocusChange"].astype(float)
    with (path / "micrographs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    mean = np.array([float(row["mean_change_A"]) for row in rows])
    spread = np.array([float(row["spread_of_change_A"]) for row in rows])
    words = (
        f"Change of the defocus of {len(change):,} particles, median {result['median_defocus_change_A']:.0f} Å, and, "
        f"of {len(rows):,} micrographs, its mean and spread. "
    )
    if record["options"]["defocus"] == "particle":
        words += (
            f"Particles lie about the mean of their micrograph with a standard deviation of "
            f"{result['defocus_spread_A']:.0f} Å (estimated, not set), and each is known to "
            f"{result['median_defocus_error_A']:.0f} Å."
        )
    return figures.defocus_changes(change, mean, spread), words


def over_micrographs(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The defocus of particles over the plane of their micrographs, where they have coordinates."""
    if not record.get("result") or record["options"].get("defocus") != "particle":
        return None
    particles = star.read_particles(path / "particles.star")
    if "coordinate_px" not in particles or "micrograph" not in particles:
        return None
    defocus = (particles["defocus_u_A"] + particles["defocus_v_A"]) / 2
    names, which, counts = np.unique(particles["micrograph"], return_inverse=True, return_counts=True)
    largest = np.sort(np.argsort(-counts, kind="stable")[:_MICROGRAPHS_SHOWN])
    shown = {
        f"{Path(str(names[index])).stem[-34:]}, mean {defocus[which == index].mean() / 1e4:.2f} µm": (
            particles["coordinate_px"][which == index],
            defocus[which == index] - defocus[which == index].mean(),
        )
        for index in largest
    }
    words = (
        "Defocus of particles less the mean of their micrograph, where they lie: the micrographs of most particles. A "
        "slope is a tilted specimen."
    )
    return figures.over_micrographs(shown), words
