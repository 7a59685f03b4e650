"""Particles found in micrographs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from dcryo.cluster import check_kind, connect
from dcryo.data import micrographs, mrc
from dcryo.data.coordinates import Coordinates, coordinates_of, write_boxes, write_coordinates
from dcryo.data.items import Found, Item, arrays_of
from dcryo.data.particles import Micrographs
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.micrographs import (
    MicrographOptions,
    WatchOptions,
    await_table,
    flagged,
    load_micrographs,
    work_through,
)
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress
from dcryo.kernels.matching import Curve, curve, matched
from dcryo.kernels.symmetry import operators
from dcryo.steps import picking
from dcryo.steps.picking import Optics, Search

PICKS = "picks.star"
WITHIN_DIAMETERS = 0.4
"""A pick is right if it lies so near to a label."""
CURVE_POINTS = 50


class PickOptions(OutOptions, ClusterOptions, WatchOptions, MicrographOptions):
    """Find particles in micrographs.

    Without templates, blobs of the diameter are looked for first, and then what looks like the best of them. Writes
    NAME_coordinates.star for each micrograph and picks.star, the table of the micrographs with the paths of those.
    Micrographs that are flagged, and those without particles, are left out of it.
    """

    diameter_A: float | None = Field(None, gt=0, description="diameter of the particles; or give the next two")
    smallest_A: float | None = Field(None, gt=0, description="diameter of the smallest, where they differ")
    largest_A: float | None = Field(None, gt=0, description="diameter of the largest")
    templates: Path | None = Field(None, description="stack of 2D classes (.mrcs) or a map (.mrc), white on dark")
    template_pixel_size_A: float | None = Field(None, gt=0, description="of the templates (default: their header's)")
    symmetry: str = Field("C1", description="point group of the map: Cn, Dn, T, O, I1, I2, I3 or I4")
    template_order: int = Field(1, ge=0, le=3, description="grid of the map's views: steps of 59, 29, 15 or 7 degrees")
    in_plane_step_deg: float = Field(10.0, gt=0, le=360, description="step of the templates' in-plane angles")
    lowpass_A: float = Field(20.0, gt=0, description="resolution of the templates")
    threshold: float | None = Field(None, description="lowest score (default: found for each micrograph)")
    most: int | None = Field(None, gt=0, description="picks in a micrograph, at most")
    distance_A: float | None = Field(
        None, gt=0, description="between picks, at least (default: 0.6 of the smallest diameter)"
    )
    edge_A: float | None = Field(
        None, ge=0, description="from the micrograph's edges, at least (default: the largest radius)"
    )
    contrast: Literal["dark", "light"] = Field("dark", description="particles are darker or lighter than the ice")
    exclude: bool = Field(True, description="leave out carbon, contamination and what else is unlike the rest")
    keep_flagged: bool = Field(False, description="also pick on micrographs that were flagged")
    labels: Path | None = Field(None, description="known coordinates to compare with: STAR file, or directory of files")
    write_box_px: int | None = Field(None, gt=0, description="also write NAME.box, with boxes of so many pixels")

    @model_validator(mode="after")
    def _consistent(self) -> "PickOptions":
        pair = (self.smallest_A, self.largest_A)
        if (self.diameter_A is None) == (pair == (None, None)) or (None in pair and pair != (None, None)):
            raise ValueError("give --diameter, or both --smallest and --largest")
        if self.smallest_A is not None and self.largest_A is not None and self.smallest_A > self.largest_A:
            raise ValueError(f"--smallest {self.smallest_A:g} is larger than --largest {self.largest_A:g}")
        return self

    @property
    def search(self) -> Search:
        """What is looked for."""
        smallest_A, largest_A = self.diameter_A or self.smallest_A, self.diameter_A or self.largest_A
        assert smallest_A is not None and largest_A is not None
        return Search(
            diameters_A=(smallest_A, largest_A),
            distance_A=0.6 * smallest_A if self.distance_A is None else self.distance_A,
            edge_A=largest_A / 2.0 if self.edge_A is None else self.edge_A,
            sign=-1 if self.contrast == "dark" else 1,
            threshold=self.threshold,
            most=self.most,
            step_deg=self.in_plane_step_deg,
            exclude=self.exclude,
        )


@dataclass(frozen=True)
class PickResult:
    """out: the run directory. micrographs: with picks; picks: in all of them; labels: precision, recall and F1."""

    out: Path
    micrographs: int
    picks: int
    labels: Mapping[str, Any] | None

    @cached_property
    def table(self) -> Micrographs:
        """picks.star."""
        return micrographs.read_micrographs(self.out / PICKS)

    def summary(self) -> str:
        lines = [f"{self.out / PICKS}: {self.picks} particles on {self.micrographs} micrographs"]
        if self.labels and self.labels["labels"]:
            words = (f"{name} {self.labels[name]:.3f}" for name in ("precision", "recall", "f1"))
            lines.append(f"against {self.labels['labels']} labels: {', '.join(words)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Micrograph(Item):
    """An item with what picking needs of its row. optics: None where it is unknown or no templates are multiplied."""

    pixel_size_A: float
    optics: Optics | None

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}-{self.optics}" if self.optics else super().fingerprint()


def pick(options: PickOptions, *, progress: Progress = print) -> PickResult:
    """Pick; see `PickOptions`. InputError for bad input, before work starts."""
    check_kind(options.cluster)
    if options.watch:
        await_table(options, options.out, progress)
    search = options.search
    templates = _templates(options)
    _find(options)
    if options.labels is not None and not options.labels.exists():
        raise InputError(f"{options.labels}: no such file or directory; expected coordinates to compare with")
    inputs = [path for path in (options.templates, options.labels) if path is not None]
    run = Run.start(
        options.out, "pick", options.model_dump(), inputs,
        resume=options.resume, overwrite=options.overwrite, growing=True,
    )  # fmt: skip
    with run, connect(options.cluster, options.workers) as cluster:
        table, _ = _find(options)
        kind = "blobs" if templates is None else f"{len(templates)} templates"
        progress(f"{len(table)} micrographs, {kind}, on {cluster.description}")

        def told(found: dict[str, Found]) -> None:
            _write_table(options, run.path, found)
            run.flag(flagged(found))

        arguments = (run.path, search, templates, options.labels, options.write_box_px)
        found = work_through(
            run, lambda: _find(options)[1], pick_one, arguments, cluster, options.watch, told, progress
        )
        good = [one for one in found.values() if not one.flag]
        result = {"micrographs": len(good), "picks": sum(one.values["picks"] for one in good)}
        labels = None if options.labels is None else _compared(run.path, found)
        run.done(result | ({} if labels is None else {"labels": labels}))
    return PickResult(options.out, result["micrographs"], result["picks"], labels)


def _find(options: PickOptions) -> tuple[Micrographs, list[Item]]:
    """The table as it is by now, and an item for each row of it that is not flagged."""
    table, items = load_micrographs(options)
    if "micrograph_pixel_size_A" not in table.optics:
        raise InputError(f"{options.micrographs[0]}: its optics have no _rlnMicrographPixelSize; add it")
    pixel_size_A = table.optics_of("micrograph_pixel_size_A")
    found: list[Item] = []
    for row, item in enumerate(items):
        if options.keep_flagged or "flag" not in table or not table["flag"][row]:
            optics = _optics(table, row) if options.templates else None
            found.append(_Micrograph(item.name, item.source, float(pixel_size_A[row]), optics))
    return table, found


def _optics(table: Micrographs, row: int) -> Optics | None:
    """What the CTF of a row is made of, None where a part is not known."""
    names = ("voltage_kV", "spherical_aberration_mm", "amplitude_contrast")
    fitted = ("defocus_u_A", "defocus_v_A", "defocus_angle_deg")
    if not all(name in table.optics for name in names) or not all(name in table for name in fitted):
        return None
    columns = {name: table.optics_of(name) for name in names} | {name: table[name] for name in fitted}
    if "phase_shift_deg" in table:
        columns["phase_shift_deg"] = table["phase_shift_deg"]
    return Optics(**{name: float(values[row]) for name, values in columns.items()})


def _templates(options: PickOptions) -> np.ndarray | None:
    """Templates (K, m, m), None without. A file that ends in .mrcs is a stack, any other a map."""
    path, search = options.templates, options.search
    if path is None:
        return None
    if path.suffix == ".mrcs":
        stack = mrc.open_stack(path)
        if stack.shape[0] != stack.shape[1] or stack.readable < stack.n:
            raise InputError(f"{path}: holds {stack.readable} of {stack.n} images of {stack.shape}; expected squares")
        images, pixel_size_A = stack.read(np.arange(stack.n)), stack.voxel_size_A
        images = images[images.std(axis=(1, 2)) > 0]
        if not len(images) or not np.isfinite(images).all():
            raise InputError(f"{path}: holds no image, empty ones apart, that is finite; expected 2D classes")
    else:
        volume = mrc.read_map(path)
        images, pixel_size_A = volume.array, volume.voxel_A[0]
    pixel_size_A = options.template_pixel_size_A or pixel_size_A
    if not pixel_size_A:
        raise InputError(f"{path}: the header says no pixel size; give --template-pixel-size")
    if path.suffix == ".mrcs":
        return picking.scaled(images, pixel_size_A, search, options.lowpass_A)
    group = operators(options.symmetry)
    return picking.project(images, pixel_size_A, group, options.template_order, search, options.lowpass_A)


def pick_one(
    item: _Micrograph,
    out: Path,
    search: Search,
    templates: np.ndarray | None,
    labels: Path | None,
    box_px: int | None,
) -> Found:
    """The work on one micrograph: its coordinates, written, and figures."""
    image = micrographs.read_image(item.source)
    try:
        picks = picking.find(image, item.pixel_size_A, search, templates, item.optics)
    except ValueError as error:
        raise InputError(f"{item.source}: {error}") from error
    taken = slice(picks.taken)
    coordinates = Coordinates(
        picks.coordinate_px[taken].astype(np.float64),
        picks.score[taken],
        picks.psi_deg[taken] if templates is not None else None,
        picks.template[taken] + 1 if templates is not None else None,
    )
    path = out / f"{item.name}_coordinates.star"
    write_coordinates(path, coordinates)
    if box_px is not None:
        write_boxes(out / f"{item.name}.box", coordinates.coordinate_px, box_px)
    arrays: dict[str, np.ndarray] = {
        "preview": picks.preview.astype(np.float16),
        "shape_px": np.array(image.shape[::-1]),
        "diameter_px": np.array(search.diameters_A[1] / item.pixel_size_A),
        "coordinate_px": picks.coordinate_px[taken],
        "score": picks.score[taken],
        "excluded": picks.excluded.astype(np.uint8),
    }
    given = None if labels is None else coordinates_of(labels, item.name)
    if given is not None:
        within_px = WITHIN_DIAMETERS * search.diameters_A[1] / item.pixel_size_A
        arrays["labels_px"] = given.coordinate_px.astype(np.float32)
        arrays["candidate_score"] = picks.score
        arrays["candidate_right"] = matched(picks.coordinate_px, given.coordinate_px, within_px)
    values = {
        "picks": picks.taken,
        "threshold": float(picks.threshold),
        "coordinates_path": str(path),
        "masked_fraction": float(picks.excluded.mean()),
    }
    return Found(values, arrays, flag="" if picks.taken else "no particles found")


def _write_table(options: PickOptions, out: Path, found: Mapping[str, Found]) -> None:
    """picks.star: the rows of what has picks, in their order."""
    table, items = load_micrographs(options)
    rows = [row for row, item in enumerate(items) if item.name in found and not found[item.name].flag]
    if not rows:
        return
    values = [found[items[row].name].values for row in rows]
    picked = table.take(np.array(rows)).replace(
        coordinates_path=np.array([one["coordinates_path"] for one in values]),
        picks=np.array([one["picks"] for one in values]),
    )
    micrographs.write_micrographs(out / PICKS, picked)


def _compared(out: Path, found: Mapping[str, Found]) -> dict[str, Any]:
    """Precision, recall and F1 of all picks on micrographs with labels, and the curve over one threshold for all."""
    scores, right, labels, taken, hits = [], [], 0, 0, 0
    for name in sorted(found):
        arrays = arrays_of(out, name)
        if "labels_px" not in arrays:
            continue
        labels += len(arrays["labels_px"])
        taken += len(arrays["score"])
        hits += int(arrays["candidate_right"][: len(arrays["score"])].sum())
        scores.append(arrays["candidate_score"])
        right.append(arrays["candidate_right"])
    if not labels:
        return {"labels": 0, "precision": None, "recall": None, "f1": None, "curve": {}}
    whole = curve(np.concatenate(scores), np.concatenate(right), labels)
    some = np.unique(np.linspace(0, len(whole.threshold) - 1, CURVE_POINTS).astype(int))
    shown = Curve(*(values[some] for values in whole))
    return {
        "labels": labels,
        "precision": hits / max(taken, 1),
        "recall": hits / labels,
        "f1": 2.0 * hits / (taken + labels),
        "curve": {"threshold": shown.threshold, "precision": shown.precision, "recall": shown.recall},
    }
