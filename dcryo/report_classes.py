"""What the report shows of 3D classes: maps, surfaces and differences side by side, and who went where."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcryo import figures
from dcryo.data import mrc, star
from dcryo.kernels import solvent, surface

SIDE_PX = 300
_SHOWN = 12


def maps(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Slices and projections of each class."""
    result = _result(record)
    if result is None:
        return None
    words = "Slices through the centre along z, y and x, and projections along them."
    copies = [f"class {k} is a copy of class {of}" for k, of in enumerate(result["copy_of"], start=1) if of]
    if copies:
        words += (
            f" {', '.join(copies)}: sorted again by halves that have nothing in common, their particles do not fall "
            "into the same two groups."
        )
    empty = [f"class {k}" for k, share in enumerate(result["share"], start=1) if share == 0]
    if empty:
        words += f" {', '.join(empty)} lost all particles; fewer classes would do."
    return figures.models(_volumes(path, result), _captions(result)), words


def surfaces(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Surfaces of the classes, all at one level."""
    result = _result(record)
    if result is None or not (path / "mask.mrc").is_file():
        return None
    volumes, pixel_size_A = _volumes(path, result), result["pixel_size_A"]
    mask = mrc.read_map(path / "mask.mrc").array
    level = solvent.contour_level(volumes[0], mask, pixel_size_A)
    if not volumes[0].max() > level > 0:
        return None
    clean = [solvent.without_specks(volume, level) for volume in volumes]
    seen = surface.seen_px(np.max(clean, axis=0), level)
    rows = []
    for volume in clean:
        views = [surface.view(volume, level, axis, surface.OVERSAMPLING * SIDE_PX, seen) for axis in surface.AXES]
        rows.append([surface.coloured(surface.light(one, seen[1] - seen[0]), surface.PLAIN) for one in views])
    words = f"All at a level of {level:.3g}, that of class 1, seen from z, -y and x. Specks apart are not shown."
    return figures.surface_rows(rows, _captions(result), (seen[1] - seen[0]) * pixel_size_A), words


def differences(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Each class less the first."""
    result = _result(record)
    if result is None:
        return None
    volumes = _volumes(path, result)
    if len(volumes) < 2:
        return None
    captions = [
        f"class {k} less class 1; maps correlate by {result['correlation'][0][k - 1]:.3f}"
        for k in range(2, len(volumes) + 1)
    ]
    words = (
        "Central slices along z, y and x of the difference of each class and the first, over the range of density of "
        "the first: red where there is more, blue where there is less."
    )
    return figures.differences([volume - volumes[0] for volume in volumes[1:]], captions, volumes[0]), words


def flow(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Sizes of the classes over iterations, and how many particles went from which to which."""
    rows = [row for row in record["iterations"] if isinstance(row.get("flow"), list)]
    if record["job"] != "class3d" or len(rows) < 2:
        return None
    order = (record.get("result") or {}).get("order") or range(len(rows[0]["share"]))
    table = np.array([row["flow"] for row in rows])[:, order][:, :, order]
    apart = next((row["iteration"] for row in rows if row["halves"] == "apart"), None)
    words = "Width: particles whose most probable class it is; between iterations, those that go from class to class."
    if apart is not None:
        words += f" From iteration {apart} on the halves have references of their own."
    return figures.flow([row["iteration"] for row in rows], table), words


def confidence(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """How sure the classes of particles are."""
    if record["job"] != "class3d" or not (path / "particles.star").is_file():
        return None
    particles = star.read_particles(path / "particles.star")
    if "class_probability" not in particles:
        return None
    number, probability = particles["class_number"], particles["class_probability"]
    words = (
        f"Posterior probability of each particle's class; {100 * np.mean(probability > 0.9):.0f} percent of all are "
        "above 0.9."
    )
    return figures.class_confidence(number, probability), words


def table(record: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Rows: share, resolution and what is said of each class."""
    result = _result(record)
    if result is None:
        return ()
    rows = [["class", "particles", "resolution (Å)", "difference found again", "verdict"]]
    columns = (result["share"], result["resolution_of_classes_A"], result["reproduced"], result["copy_of"])
    for k, (share, resolution, found, copy) in enumerate(zip(*columns, strict=True), start=1):
        verdict = f"a copy of class {copy}" if copy else "empty" if share == 0 else "" if k == 1 else "differs"
        again = "" if k == 1 or share == 0 else f"{found:.2f}"
        rows.append([str(k), f"{100 * share:.1f} %", "" if share == 0 else f"{resolution:.2f}", again, verdict])
    return rows


def _result(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    result = record.get("result") or {}
    return result if record["job"] == "class3d" and "copy_of" in result else None


def _volumes(path: Path, result: Mapping[str, Any]) -> list[np.ndarray]:
    return [mrc.read_map(path / f"class{k + 1}.mrc").array for k in range(min(len(result["share"]), _SHOWN))]


def _captions(result: Mapping[str, Any]) -> list[str]:
    captions = []
    for k, (share, resolution) in enumerate(
        zip(result["share"], result["resolution_of_classes_A"], strict=True), start=1
    ):
        copy = result["copy_of"][k - 1]
        words = f"class{k}.mrc: {100 * share:.1f} % of the particles, {resolution:.2f} Å"
        captions.append(words + (f", a copy of class {copy}" if copy else ""))
    return captions[:_SHOWN]
