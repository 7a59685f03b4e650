"""The table of a model's residues and how a map shows them, written as CSV and STAR."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dcryo.data.atomic import replacing
from dcryo.data.star_syntax import Block, write_blocks
from dcryo.errors import InputError

COLUMNS = {
    "chain": "dcryoChain",
    "residue_number": "dcryoResidueNumber",
    "insertion_code": "dcryoInsertionCode",
    "residue": "dcryoResidueName",
    "atoms": "dcryoAtoms",
    "q": "dcryoQScore",
    "correlation": "dcryoMapModelCorrelation",
    "bfactor_A2": "dcryoBFactor",
}
"""Columns of the CSV and the labels of the STAR file. atoms: without hydrogens, those that have a Q-score; q: their
mean; correlation: of map and model around the residue; bfactor_A2: their mean. What does not exist is empty, in STAR
nan."""
_TEXT = ("chain", "insertion_code", "residue")
_WHOLE = ("residue_number", "atoms")


def write_residues(csv_path: Path, star_path: Path, table: Mapping[str, np.ndarray]) -> None:
    """Write the columns of COLUMNS, (R,) each; InputError for names that the formats cannot hold."""
    lines = [",".join(COLUMNS)]
    for row in zip(*(table[name].tolist() for name in COLUMNS), strict=True):
        words = [_word(name, value) for name, value in zip(COLUMNS, row, strict=True)]
        unfit = [word for word in words if "," in word or '"' in word]
        if unfit:
            raise InputError(f"a chain or residue is named {unfit[0]!r}; expected names without commas and quotes")
        lines.append(",".join(words))
    with replacing(csv_path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    write_blocks(star_path, {"residues": Block({label: table[name] for name, label in COLUMNS.items()})})


def read_residues(path: Path) -> dict[str, np.ndarray]:
    """Columns of the CSV, (R,) each, by the names of COLUMNS; InputError where it is none."""
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        rows = [line.split(",") for line in lines]
        if header.split(",") != list(COLUMNS) or any(len(row) != len(COLUMNS) for row in rows):
            raise ValueError(f"expected the columns {', '.join(COLUMNS)}")
        return {name: _column(name, [row[n] for row in rows]) for n, name in enumerate(COLUMNS)}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a table of residues ({error})") from error


def _word(name: str, value: str | int | float) -> str:
    if name in _TEXT or name in _WHOLE:
        return str(value)
    return "" if value != value else f"{value:.5g}"


def _column(name: str, words: list[str]) -> np.ndarray:
    if name in _TEXT:
        return np.array(words, dtype=np.str_)
    if name in _WHOLE:
        return np.array([int(word) for word in words], dtype=np.int64)
    return np.array([float(word or "nan") for word in words])
