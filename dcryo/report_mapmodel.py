"""Sections of the report on a map and an atomic model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcryo import figures
from dcryo.data.curves import read_curves
from dcryo.data.residues import read_residues
from dcryo.kernels.fsc import GOLD_STANDARD, HALF, crossing

LEGENDS = {
    "fsc_map_model": "map, model",
    "fsc_half1_model": "half 1, model",
    "fsc_half2_model": "half 2, model",
    "fsc_halves": "half 1, half 2",
    "fsc_perfect_model": "a perfect model",
}
LINES = 8
"""So many chains have a line of their own."""
# A stretch of residues that is shorter, or numbered so far from the others, is of ligands.
_SHORTEST, _GAP = 3, 50
_WORST = 15


def fourier_shell_correlation(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The correlations of map, model and half maps."""
    if not (path / "fsc.csv").is_file():
        return None
    table = read_curves(path / "fsc.csv")
    curves = {legend: table[name] for name, legend in LEGENDS.items() if name in table}
    own, frequency = table["fsc_map_model"], table["frequency_1_A"]
    marks = [
        (LEGENDS["fsc_map_model"], level, 1 / (crossing(own, level) * frequency[1]))
        for level in (HALF, GOLD_STANDARD)
        if (own[1:] < level).any()
    ]
    words = f"Under a soft mask around the model. {HALF:g} is the threshold for a map and a model."
    if "fsc_halves" in table:
        words += (
            " What a perfect model would reach is calculated from the half maps. If the model was refined in half 1 "
            "alone, its curve lying above that of half 2 is overfitting."
        )
    if not marks:
        words += f" The curve does not fall to {HALF:g} before the Nyquist frequency."
    return figures.fsc(frequency, curves, (HALF, GOLD_STANDARD), marks), words


def q_scores(path: Path, record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Q-scores along the chains."""
    if not (path / "residues.csv").is_file():
        return None
    table, result = read_residues(path / "residues.csv"), record.get("result") or {}
    chains = _chains(table)
    named = dict(list(chains.items())[:LINES])
    others = list(chains.values())[LINES:]
    if not named:
        return None
    expected, known_A = result.get("expected_q"), result.get("map_resolution_A")
    words = (
        f"How much the map around an atom is like a Gaussian of 0.6 Å (Pintilie et al. 2020); {result['q']:.2f} on "
        f"average over {result['atoms_scored']:,} atoms."
    )
    if expected is not None:
        words += f" In a map of {known_A:.2f} Å well-fitted proteins have {expected:.2f} on average."
    if others:
        words += f" The longest {LINES} chains have lines; of the others, nine tenths lie in the grey band."
    return figures.q_by_residue(named, others, expected), words


def worst_residues(path: Path, record: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """The residues with the lowest Q-scores, a table."""
    if not (path / "residues.csv").is_file():
        return ()
    table = read_residues(path / "residues.csv")
    rows = [["lowest Q-scores", "Q", "correlation with the model", "mean B"]]
    for row in np.argsort(table["q"], kind="stable")[:_WORST].tolist():
        if np.isfinite(table["q"][row]):
            name = f"{table['chain'][row]} {table['residue'][row]} "
            name += f"{table['residue_number'][row]}{table['insertion_code'][row]}"
            rows.append([name, f"{table['q'][row]:.2f}", f"{table['correlation'][row]:.2f}",
                         f"{table['bfactor_A2'][row]:.0f} Å²"])  # fmt: skip
    return rows if len(rows) > 1 else ()


def _chains(table: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numbers and Q-scores of the residues of each chain that is more than a ligand, the longest first."""
    names, count = np.unique(table["chain"], return_counts=True)
    found = {}
    for name, n in sorted(zip(names.tolist(), count.tolist(), strict=True), key=lambda one: -one[1]):
        if n >= _SHORTEST or len(names) == 1:
            rows = np.flatnonzero(table["chain"] == name)
            rows = rows[np.argsort(table["residue_number"][rows], kind="stable")]
            stretches = np.split(rows, np.flatnonzero(np.diff(table["residue_number"][rows]) > _GAP) + 1)
            rows = np.concatenate([one for one in stretches if len(one) >= _SHORTEST] or stretches)
            found[name] = table["residue_number"][rows], table["q"][rows]
    return found
