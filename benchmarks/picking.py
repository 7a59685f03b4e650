"""Picks of `dcryo pick` against coordinates by hand, and how long a micrograph takes.

    python benchmarks/picking.py SHARED_DATA [--figure picking.svg] [--repeat 3]

SHARED_DATA holds apof_empiar10146, bgal_empiar10017 and models, as the tests use them. One setting per data set.
Without an edge, particles that the micrograph's edges cut are looked for as well; half of the labelled ones near edges
are such. A pick is right within 0.4 of the diameter of a label, each label once.
"""

import argparse
import base64
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from measured import table

from dcryo import figures
from dcryo.data.coordinates import read_coordinates
from dcryo.data.micrographs import read_image
from dcryo.data.model import read_model
from dcryo.jobs.pick import WITHIN_DIAMETERS
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.matching import curve, matched
from dcryo.kernels.symmetry import operators
from dcryo.steps import picking
from dcryo.steps.picking import Search

MODEL_PIXEL_A = 3.0


@dataclass(frozen=True)
class Case:
    """A data set with one kind of labels. micrographs: image and labels (n, 2) in its pixels."""

    name: str
    pixel_size_A: float
    diameter_A: float
    model: Path
    assembly: str | None
    symmetry: str
    micrographs: tuple[tuple[np.ndarray, np.ndarray], ...]


def cases(shared: Path) -> Iterator[Case]:
    apof, bgal, models = shared / "apof_empiar10146", shared / "bgal_empiar10017", shared / "models"
    pairs = [
        (read_image(path), read_coordinates(apof / "gt_xy" / f"{path.stem}.txt").coordinate_px)
        for path in sorted((apof / "avg").glob("*.png"))
    ]
    yield Case("apoferritin, by hand", 1.5, 130.0, models / "7a4m.cif", "1", "O", tuple(pairs))
    (path,) = (bgal / "images").glob("*.jpg")
    image = read_image(path)
    curated = read_coordinates(bgal / "cryoppp_14_33_35.star").coordinate_px
    # The boxes count y from the other side.
    others = {
        name: read_coordinates(bgal / name / f"{path.stem}.box").coordinate_px * [1, -1] + [0, len(image)]
        for name in ("crYOLO", "topaz", "deepPicker")
    }
    for name, labels in {"curated": curated, **others}.items():
        yield Case(f"beta-galactosidase, {name}", 1.77, 180.0, models / "5a1a.pdb", None, "D2", ((image, labels),))


def templates(case: Case, search: Search) -> np.ndarray:
    atoms = read_model(case.model, case.assembly)
    box = 2 * int(np.ceil(1.2 * atoms.radius_A / MODEL_PIXEL_A))
    density = gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, box, MODEL_PIXEL_A)
    return picking.project(density, MODEL_PIXEL_A, operators(case.symmetry), 1, search, 20.0)


def measured(case: Case, search: Search, views: np.ndarray | None, repeat: int) -> tuple[list[str], np.ndarray]:
    """A row of the table, and the curve (n, 2) of recall and precision."""
    scores, right, labels, taken, hits, best_s = [], [], 0, 0, 0, np.inf
    for image, known in case.micrographs:
        for _ in range(repeat):
            began = time.perf_counter()
            found = picking.find(image, case.pixel_size_A, search, views)
            best_s = min(best_s, time.perf_counter() - began)
        good = matched(found.coordinate_px, known, WITHIN_DIAMETERS * case.diameter_A / case.pixel_size_A)
        scores.append(found.score)
        right.append(good)
        labels, taken, hits = labels + len(known), taken + found.taken, hits + int(good[: found.taken].sum())
    whole = curve(np.concatenate(scores), np.concatenate(right), labels)
    precision, recall = hits / taken, hits / labels
    numbers = [precision, recall, 2 * hits / (taken + labels), whole.f1.max()]
    row = [str(labels), str(taken), *(f"{number:.3f}" for number in numbers), f"{best_s:.2f}"]
    return row, np.stack([whole.recall, whole.precision], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--repeat", type=int, default=2)
    given = parser.parse_args()
    rows, curves = [], {}
    for case in cases(given.shared):
        whole = Search((case.diameter_A,) * 2, 0.6 * case.diameter_A, 0.0)
        inner = replace(whole, edge_A=case.diameter_A / 2)
        ways = {"own profile": (whole, None), "own profile, a radius from edges": (inner, None),
                "views of the model": (whole, templates(case, whole))}  # fmt: skip
        for way, (search, views) in ways.items():
            row, points = measured(case, search, views, given.repeat)
            rows.append([case.name, way, *row])
            if way != "own profile, a radius from edges" and ("hand" in case.name or "curated" in case.name):
                curves[f"{case.name.partition(',')[0]}, {way}"] = points
    heading = ["labels", "by", "labels", "picks", "precision", "recall", "F1", "best F1", "s per micrograph"]
    print(table(heading, rows))
    if given.figure:
        _, _, data = figures.precision_recall(curves).partition("base64,")
        given.figure.write_bytes(base64.b64decode(data))


if __name__ == "__main__":
    main()
