"""Sections of the report on post-processing: pictures, words and tables from the files of the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dcryo import figures
from dcryo.data import mrc
from dcryo.data.curves import read_curves
from dcryo.kernels.fsc import GOLD_STANDARD

LEGENDS = {
    "fsc_filtered_first": "filtered, then masked",
    "fsc_corrected": "corrected",
    "fsc_masked": "masked",
    "fsc_spherical": "in a sphere",
    "fsc_unmasked": "unmasked",
    "fsc_randomised": "random phases, masked",
    "fsc_molecule": "molecule alone",
}


def fourier_shell_correlation(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """All curves of the half maps, with the confidence band of the one that counts."""
    if not (path / "fsc.csv").is_file():
        return None
    table, result = read_curves(path / "fsc.csv"), record.get("result") or {}
    curves = {LEGENDS[name]: table[name] for name in LEGENDS if name in table}
    resolution_A = result.get("resolution_A")
    counts = "fsc_filtered_first" if "fsc_filtered_first" in table else "fsc_corrected"
    picture = figures.half_map_fsc(
        table["frequency_1_A"], curves, LEGENDS[counts], (table["low_95"], table["high_95"]), table["half_bit"],
        resolution_A,
    )  # fmt: skip
    words = "Shaded: the 95 percent confidence band of the curve that counts, from the number of independent voxels."
    if result.get("randomised_from_A"):
        words += (
            f" Phases are random beyond {result['randomised_from_A']:.1f} Å; what then still correlates is the mask's "
            "doing and is taken off."
        )
    if resolution_A and result["resolution_worst_A"] != result["resolution_best_A"]:
        words += (
            f" The resolution at {GOLD_STANDARD:g} lies between {result['resolution_worst_A']:.2f} and "
            f"{result['resolution_best_A']:.2f} Å."
        )
    return picture, words


def guinier(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Logarithms of amplitudes against the square of the resolution, and the line through them."""
    if not (path / "guinier.csv").is_file():
        return None
    table, result, options = read_curves(path / "guinier.csv"), record.get("result") or {}, record["options"]
    limits = options.get("fit_from_A"), options.get("fit_to_A") or result.get("resolution_A")
    slope_A2 = None if result.get("bfactor_fitted_A2") is None else result["bfactor_fitted_A2"] / 4
    picture = figures.guinier(table["frequency_1_A"], table, slope_A2, limits, result.get("resolution_A"))
    if slope_A2 is None:
        words = "No line could be fitted."
    else:
        words = f"The line gives a B-factor of {result['bfactor_fitted_A2']:.0f} ± {result['bfactor_error_A2']:.0f} Å²"
        words += f", fitted from {limits[0]:.3g} to {limits[1]:.3g} Å to amplitudes under the mask."
        if result.get("bfactor_of_whole_box_A2") is not None:
            words += (
                f" Amplitudes of the whole box, solvent and all, would give {result['bfactor_of_whole_box_A2']:.0f}."
            )
    if result.get("bfactor_A2") is not None and result["bfactor_A2"] != result.get("bfactor_fitted_A2"):
        words += f" The map was sharpened by {result['bfactor_A2']:.0f} Å²."
    return picture, words


def sharpened_map(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Slices and projections of the sharpened map under the mask."""
    if not (path / "map_sharp.mrc").is_file():
        return None
    sharp, mask = mrc.read_map(path / "map_sharp.mrc"), mrc.read_map(path / "mask.mrc").array
    words = (
        "map_sharp.mrc: slices through the centre (above) and projections (below); the line is the edge of the mask."
    )
    return figures.map_views(sharp.array, sharp.voxel_size_A, mask), words


def deposition(record: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """What the Electron Microscopy Data Bank asks for."""
    result = record.get("result") or {}
    if not result.get("resolution_A"):
        return ()
    mask = {"automatic": "soft mask found in the map", "given": "soft mask given by the user",
            "from the model": "soft mask around the atomic model"}.get(result["mask"], "soft sphere")  # fmt: skip
    rows = [
        ["asked", "answer"],
        ["Resolution", f"{result['resolution_A']:.2f} Å"],
        ["Resolution method", f"FSC {GOLD_STANDARD:g} cut-off, half maps, {result['resolution_by']}"],
        ["Mask", f"{mask}, {result['mask_volume_A3'] / 1000:,.0f} nm³"],
        ["Symmetry", str(result["symmetry"])],
        ["Box and pixel size", f"{result['box_px']} px of {result['pixel_size_A']:.4g} Å"],
        ["Contour level", f"{result['contour_level']:.3g} (map_sharp.mrc)"],
        ["Primary map", "map_sharp.mrc"],
        ["Half maps, unfiltered and unmasked", ", ".join(Path(row["path"]).name for row in record["inputs"][:2])],
        ["Mask file and FSC file", "mask.mrc, fsc.xml"],
    ]
    if result.get("bfactor_A2") is not None:
        rows.insert(5, ["Sharpening B-factor", f"{result['bfactor_A2']:.1f} Å²"])
    return rows
