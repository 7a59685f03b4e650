"""The table of 2D classes beside their images: a STAR file that RELION's users know the columns of."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from dcryo.data.star_syntax import Block, read_blocks, write_blocks
from dcryo.errors import InputError

CLASSES, TABLE = "classes.mrcs", "classes.star"
_LABELS = {
    "particles": "dcryoClassParticles",
    "resolution_A": "rlnEstimatedResolution",
    "mass": "dcryoClassMass",
    "rim": "dcryoClassRim",
    "log_evidence": "dcryoClassLogEvidence",
    "rank": "dcryoClassRank",
    "reason": "dcryoFlag",
}


@dataclass(frozen=True)
class ClassTable:
    """Figures of K classes, (K,) each; see `kernels.ranking.rank_classes`. reason: why it should not be kept, empty
    where it may."""

    particles: np.ndarray
    resolution_A: np.ndarray
    mass: np.ndarray
    rim: np.ndarray
    log_evidence: np.ndarray
    rank: np.ndarray
    reason: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Whether each class looks good, (K,) bool."""
        return self.reason == ""


def write_class_table(path: Path, table: ClassTable) -> None:
    """Write the table; images are named after `CLASSES`, in its directory, from 1."""
    count = len(table.particles)
    columns = {"rlnReferenceImage": np.array([f"{number:06d}@{CLASSES}" for number in range(1, count + 1)])}
    columns["rlnClassDistribution"] = table.particles / max(1, table.particles.sum())
    columns |= {_LABELS[field.name]: getattr(table, field.name) for field in fields(table)}
    write_blocks(path, {"model_classes": Block(columns)})


def read_class_table(path: Path) -> ClassTable:
    """Read the table; InputError where it is not one."""
    block = read_blocks(path).get("model_classes")
    if block is None or any(label not in block.columns for label in _LABELS.values()):
        raise InputError(f"{path}: not a table of classes as class2d writes it")
    columns = {name: np.asarray(block.columns[label]) for name, label in _LABELS.items()}
    numbers = {name: column.astype(float) for name, column in columns.items() if name != "reason"}
    return ClassTable(
        **(numbers | {"particles": numbers["particles"].astype(int)}), reason=columns["reason"].astype(str)
    )
