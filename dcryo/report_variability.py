"""Sections of the report on continuous variability."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dcryo import figures
from dcryo.data import mrc, star
from dcryo.data.curves import read_curves
from dcryo.data.run import SERIES
from dcryo.jobs.variability import LABEL
from dcryo.kernels import solvent, surface
from dcryo.kernels.fsc import GOLD_STANDARD

SIDE_PX = 260
_SHOWN = 5


def components(record: Mapping[str, Any]) -> list[list[str]]:
    """A table of the components: how much varies along each, and whether both halves show it."""
    result = record.get("result") or {}
    if "agreement" not in result:
        return []
    rows = [
        [
            "component",
            "deviation",
            "of the variance found",
            "known of it by the images",
            "correlation between the halves",
            "",
        ]
    ]
    for k, agreement in enumerate(result["agreement"]):
        said = "both halves show it" if result["supported"][k] else "NOT supported: noise, or too weak"
        shares = (f"{100 * result[name][k]:.1f} %" for name in ("variance_share", "known"))
        rows.append([str(k + 1), f"{result['sd'][k]:.3g}", *shares, f"{agreement:.2f}", said])
    return rows


def series(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Surfaces of the maps along each component, and of the particles reconstructed along it."""
    result = record.get("result") or {}
    if "series" not in result:
        return None
    mask = mrc.read_map(path / "mask.mrc").array
    rows, captions, titles = [], [], []
    for k, figures_of in enumerate(result["series"], start=1):
        places = figures_of["places"]
        shown = np.unique(np.linspace(0, len(places) - 1, _SHOWN).round().astype(int))
        axis = _facing(mrc.read_map(path / f"component{k}.mrc").array)
        for prefix, title in ((f"component{k}", "the model"), (f"bins{k}", "particles reconstructed")):
            files = [path / SERIES / f"{prefix}_{frame + 1:03d}.mrc" for frame in shown]
            if not all(file.is_file() for file in files):
                continue
            maps = [mrc.read_map(file) for file in files]
            pictures = _pictures([one.array * mask for one in maps], mask, maps[0].voxel_size_A or 1.0, axis)
            if pictures is None:
                continue
            rows.append(pictures)
            titles.append(f"component {k}, {title}, seen along {axis}")
            captions.append([f"{places[frame]:.3g}" for frame in shown])
    if not rows:
        return None
    words = (
        f"Maps from the 5th to the 95th percentile of each coordinate, which is below them ({SERIES}/): the mean and "
        "the component, and maps of the particles that are near, which know nothing of the model. Where the two "
        "differ, the change is not along a line."
    )
    return figures.series(rows, captions, titles), words


def coordinates(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Histograms of the coordinates and their pairs."""
    result = record.get("result") or {}
    if not (path / "particles.star").is_file() or "components" not in result:
        return None
    extra = star.read_particles(path / "particles.star").extra
    numbers = range(1, result["components"] + 1)
    values = np.stack([extra[f"{LABEL}{k}"].astype(float) for k in numbers], axis=1)
    words = (
        "One clump is variability without states, or too weak for them; several are states. Coordinates of components "
        "that the halves do not support are noise."
    )
    return figures.coordinates(values, [f"component {k}" for k in numbers]), words


def halves(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """FSC between the halves of the mean and of each component."""
    if not (path / "halves.csv").is_file():
        return None
    table = read_curves(path / "halves.csv")
    frequency = table["frequency_1_A"]
    curves = {name.replace("component", "component "): values for name, values in table.items()
              if name.startswith(("mean", "component"))}  # fmt: skip
    words = "Both halves of the particles were analysed apart, and their components paired."
    return figures.fsc(frequency, curves, (GOLD_STANDARD,), []), words


def _facing(component: np.ndarray) -> str:
    """The axis along which a component is seen best: of the largest projection of its squares' roots."""
    seen = [np.sum(np.abs(component.sum(axis=place))) for place in range(3)]
    return surface.AXES[int(np.argmax(seen))]


def _pictures(maps: list[np.ndarray], mask: np.ndarray, pixel_size_A: float, axis: str) -> list[np.ndarray] | None:
    """Views of the surfaces of maps at one level, chosen for the middle one."""
    middle = maps[len(maps) // 2]
    level = solvent.contour_level(middle, mask, pixel_size_A)
    if not middle.max() > level > 0:
        return None
    clean = [solvent.without_specks(one, level) for one in maps]
    ranges = [surface.seen_px(one, level) for one in clean]
    seen = min(one[0] for one in ranges), max(one[1] for one in ranges)
    views = [surface.view(one, level, axis, surface.OVERSAMPLING * SIDE_PX, seen) for one in clean]
    return [surface.coloured(surface.light(view, seen[1] - seen[0]), surface.PLAIN) for view in views]
