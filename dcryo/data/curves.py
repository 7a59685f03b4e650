"""Curves over resolution shells, written for people (CSV) and for the archives (XML)."""

import csv
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from dcryo.data.atomic import replacing
from dcryo.errors import InputError


def write_curves(path: Path, box_px: int, pixel_size_A: float, curves: Mapping[str, np.ndarray]) -> None:
    """Write curves (S,) per shell as CSV with the columns shell, resolution_A, frequency_1_A and one for each curve."""
    lines = [",".join(("shell", "resolution_A", "frequency_1_A", *curves))]
    for shell, values in enumerate(zip(*curves.values(), strict=True)):
        frequency = shell / (box_px * pixel_size_A)
        resolution = f"{1 / frequency:.4f}" if shell else ""
        lines.append(",".join((str(shell), resolution, f"{frequency:.8f}", *(f"{value:.8g}" for value in values))))
    with replacing(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def read_curves(path: Path) -> dict[str, np.ndarray]:
    """Columns of a file of `write_curves`, (S,) float64 each; blanks are NaN. InputError where it is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        names = rows[0].keys()
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    except (OSError, ValueError, IndexError, TypeError, csv.Error) as error:
        raise InputError(f"{path}: not a table of curves over shells ({error})") from error


def write_fsc_xml(path: Path, box_px: int, pixel_size_A: float, fsc: np.ndarray) -> None:
    """Write an FSC as the XML that the Electron Microscopy Data Bank takes: frequency in 1/A against correlation."""
    root = ElementTree.Element(
        "fsc", title="FSC of half maps", xaxis="Resolution (A-1)", yaxis="Correlation Coefficient"
    )
    for shell, value in enumerate(fsc):
        point = ElementTree.SubElement(root, "coordinate")
        ElementTree.SubElement(point, "x").text = f"{shell / (box_px * pixel_size_A):.8f}"
        ElementTree.SubElement(point, "y").text = f"{value:.6f}"
    ElementTree.indent(root)
    with replacing(path) as file:
        file.write(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")
