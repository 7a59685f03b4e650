"""Sections of the report on what tests a refinement for overfitting."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dcryo import figures
from dcryo.data.curves import read_curves
from dcryo.kernels.fsc import GOLD_STANDARD, crossing

_TESTS = {"noise": "Noise", "bfactor": "B factor", "unseen": "Unseen particles", "hand": "Hand"}
_SAID = {True: "passed", False: "FAILED", None: "no answer"}


def verdicts(record: Mapping[str, Any]) -> list[list[str]]:
    """A table of what each test found, in words."""
    result = record.get("result") or {}
    rows = []
    for name, title in _TESTS.items():
        if name in result:
            said = "measured" if name == "bfactor" else _SAID[result[name]["passed"]]
            rows.append([title, said, result[name]["verdict"]])
    return [["test", "", "what was found"], *rows] if rows else []


def figures_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the tests, without the words that `verdicts` shows."""
    result = record.get("result") or {}
    return {
        name: {key: one for key, one in value.items() if key != "verdict"} if name in _TESTS else value
        for name, value in result.items()
    }


def noise(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The FSC of the run, of its repetition with noise, and what is left of the first."""
    found = _of(record, "noise")
    if found is None:
        return None
    table = read_curves(path / "noise.csv")
    curves = {"FSC_t": table["fsc"], "FSC_n": table["fsc_noise"], "FSC_true": table["fsc_true"]}
    frequency = table["frequency_1_A"]
    last = curves["FSC_true"]
    marks = []
    if (last[1:] < GOLD_STANDARD).any():
        marks.append(("FSC_true", GOLD_STANDARD, 1 / (crossing(last, GOLD_STANDARD) * frequency[1])))
    words = (
        f"FSC_t: of the run. FSC_n: refined from its images with random phases beyond {found['noise_from_A']:.2f} Å, "
        "where it should fall to zero. FSC_true = (FSC_t - FSC_n) / (1 - FSC_n) (Chen et al. 2013)."
    )
    return figures.fsc(frequency, curves, (GOLD_STANDARD,), marks), words


def particles_against_resolution(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Resolutions of subsets and the line through them."""
    found = _of(record, "bfactor")
    if found is None:
        return None
    with (path / "bfactor.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([float(row[name]) for row in rows]) for name in ("particles", "resolution_A", "used")}
    line = None if found["slope"] is None else (found["slope"], found["intercept"])
    words = "Resolution of half maps from subsets"
    words += ", each refined anew" if found["refined_anew"] else ", at the poses that all particles found together"
    words += ". The slope is 2 / B (Rosenthal & Henderson 2003)."
    if not columns["used"].all():
        words += " Resolutions next to Nyquist, or of the first shells, are left out."
    picture = figures.particles_against_resolution(
        columns["particles"], columns["resolution_A"], columns["used"] > 0, line
    )
    return picture, words


def seen_and_unseen(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """How particles correlate with a half map that they are in, and with one that they are not in."""
    found = _of(record, "unseen")
    if found is None:
        return None
    table = read_curves(path / "unseen.csv")
    curves = {name: (table[name], table[f"{name}_error"]) for name in ("seen", "unseen")}
    words = (
        f"Images aligned to a half map up to {found['aligned_to_A']:.2f} Å (shaded) and correlated with it: its own, "
        f"and those that it has never seen ({found['unseen_are']}), which are to reach the broken line. Bands: two "
        "standard errors."
    )
    promised = table["seen"] * np.clip(table["fsc"], 0, 1)
    return figures.seen_and_unseen(table["frequency_1_A"], curves, promised, found["aligned_to_A"]), words


def _of(record: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The figures of a test that is done."""
    return (record.get("result") or {}).get(name)
