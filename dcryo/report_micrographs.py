"""The sections of the report on movies and micrographs: motion, CTF, picks, and what was extracted.

They read the table that a run wrote and what it committed of each item. However many there are, a few are shown: the
first, the last and some between, and of those that were flagged the first.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dcryo import figures
from dcryo.data.items import ITEMS, arrays_of
from dcryo.data.micrographs import read_micrographs
from dcryo.data.particles import Micrographs

SHOWN, FLAGGED_SHOWN = 9, 3
TABLES = ("micrographs.star", "picks.star")


class Items:
    """The table and the arrays of a run over movies or micrographs."""

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        self.path = path
        self.flags = {str(row["image"]): str(row["reason"]) for row in record["quarantined"]}
        self.names = sorted(file.stem for file in (path / ITEMS).glob("*.npz"))
        found = next((path / name for name in TABLES if (path / name).is_file()), None)
        self.table: Micrographs | None = read_micrographs(found) if found else None

    def shown(self, *needed: str) -> list[tuple[str, dict[str, np.ndarray]]]:
        """Names and arrays of the items to show, those that have what is needed."""
        flagged = [name for name in self.names if name in self.flags][:FLAGGED_SHOWN]
        good = [name for name in self.names if name not in self.flags]
        room = SHOWN - len(flagged)
        if len(good) > room:
            good = [good[place] for place in np.linspace(0, len(good) - 1, room).round().astype(int)]
        found = [(name, arrays_of(self.path, name)) for name in [*good, *flagged]]
        return [(name, arrays) for name, arrays in found if arrays.keys() >= set(needed)]

    def title(self, name: str, said: str = "") -> str:
        words = f"{name if len(name) <= 34 else '…' + name[-33:]}{' (flagged)' if name in self.flags else ''}"
        return f"{words}\n{said}" if said else words


def motion(items: Items) -> tuple[str, str] | None:
    """How far frames moved: picture and words."""
    if items.table is None or "motion_total_A" not in items.table or "defocus_u_A" in items.table:
        return None
    columns = {
        f"{name} motion (Å)": items.table[f"motion_{name}_A"]
        for name in ("total", "early", "late")
        if f"motion_{name}_A" in items.table
    }
    total = items.table["motion_total_A"]
    words = f"Length of the whole-frame tracks of {len(total):,} movies, median {np.median(total):.1f} Å"
    words += "; early is up to 4 e/Å²."
    return figures.histograms(columns), words


def tracks(items: Items) -> tuple[str, str] | None:
    """Tracks over micrographs."""
    shown = items.shown("preview", "track_px", "patch_centre_px", "patch_track_px", "shape_px")
    pictures = [
        figures.Tracks(
            items.title(name, f"{np.abs(np.ptp(arrays['track_px'], axis=0)).max():.1f} px"),
            arrays["preview"].astype(np.float32),
            *(arrays[key] for key in ("shape_px", "track_px", "patch_centre_px", "patch_track_px")),
        )
        for name, arrays in shown
    ]
    if not pictures:
        return None
    words = (
        "Tracks of the whole frame (orange, from the centre) and what patches (blue) move besides, enlarged so that "
        "the longest takes a quarter of the picture. The number is how far the whole frame moved along one axis, in "
        "pixels of the movie."
    )
    return figures.tracks(pictures), words


def thon_rings(items: Items) -> tuple[str, str] | None:
    """Power spectra and their fits."""
    shown = items.shown("picture", "frequency_1_A", "spectrum", "fit", "quality")
    pictures = [
        figures.Rings(
            items.title(name, _fit_of(items.table, name)),
            *(arrays[key].astype(np.float32) for key in ("picture", "frequency_1_A", "spectrum", "fit", "quality")),
        )
        for name, arrays in shown
    ]
    if not pictures:
        return None
    words = (
        "Half of each picture is the power spectrum, half the fit. Below, both along the rings, and how well they "
        "agree around each frequency."
    )
    return figures.thon_rings(pictures), words


def ctf_parameters(items: Items) -> tuple[str, str] | None:
    """Defocus, astigmatism and resolution of the fits."""
    table = items.table
    if (
        table is None
        or not {"defocus_u_A", "defocus_v_A", "ctf_resolution_A"} <= table.columns.keys()
        or "picks" in table
    ):
        return None
    u_A, v_A = table["defocus_u_A"], table["defocus_v_A"]
    columns = {
        "mean defocus (µm)": (u_A + v_A) / 2e4,
        "astigmatism (nm)": np.abs(u_A - v_A) / 10,
        "fit holds to (Å)": table["ctf_resolution_A"],
    }
    reach_A = np.nanmedian(table["ctf_resolution_A"])
    words = f"Of {len(table):,} micrographs; the fit holds to {reach_A:.1f} Å in the median."
    return figures.histograms(columns), words


def picks(items: Items) -> tuple[str, str] | None:
    """Picks over micrographs."""
    shown = items.shown("preview", "coordinate_px", "shape_px", "diameter_px")
    pictures = [
        figures.Picks(
            items.title(name, f"{len(arrays['coordinate_px'])} picks"),
            arrays["preview"].astype(np.float32),
            arrays["shape_px"],
            arrays["coordinate_px"],
            float(arrays["diameter_px"]),
            arrays.get("excluded"),
            arrays.get("labels_px"),
        )
        for name, arrays in shown
    ]
    if not pictures:
        return None
    words = "Circles have the particle's diameter; shaded areas were left out"
    labelled = any(picture.labels_px is not None for picture in pictures)
    return figures.picks(pictures), words + ("; crosses are the given coordinates." if labelled else ".")


def picks_per_micrograph(items: Items) -> tuple[str, str] | None:
    """Number of picks, and their scores."""
    if items.table is None or "picks" not in items.table:
        return None
    columns = {"picks": items.table["picks"].astype(float)}
    scores = [arrays["score"] for _, arrays in items.shown("score")]
    if scores:
        columns["score, of the picks shown"] = np.concatenate(scores).astype(float)
    words = f"{int(items.table['picks'].sum()):,} picks on {len(items.table):,} micrographs."
    return figures.histograms(columns, across=2), words


def _fit_of(table: Micrographs | None, name: str) -> str:
    if table is None or "defocus_u_A" not in table:
        return ""
    rows = [row for row, path in enumerate(table["path"].tolist()) if Path(path).stem == name]
    if not rows:
        return ""
    u_A, v_A = table["defocus_u_A"][rows[0]], table["defocus_v_A"][rows[0]]
    words = f"{(u_A + v_A) / 2e4:.2f} µm, astigmatism {abs(u_A - v_A) / 10:.0f} nm"
    return words + (f", to {table['ctf_resolution_A'][rows[0]]:.1f} Å" if "ctf_resolution_A" in table else "")


SECTIONS = {
    "Motion": motion,
    "Tracks": tracks,
    "CTF": ctf_parameters,
    "Thon rings": thon_rings,
    "Picks": picks,
    "Picks per micrograph": picks_per_micrograph,
}
"""Title -> function from the items of a run to a picture and words, or to None where it has nothing to show."""
