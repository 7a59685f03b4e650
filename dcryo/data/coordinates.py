"""Coordinates of particles in a micrograph: STAR files as RELION writes them, EMAN's .box, and plain text.

x and y are in pixels of the micrograph, from its first column and row; the centre of the first pixel is 0. A box file
holds the corner of each box and its sides; the particle is at corner + side // 2, the box's origin.
"""

import glob
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcryo.data import star_syntax
from dcryo.data.atomic import replacing
from dcryo.data.schema import PARTICLE_FIELDS, Field
from dcryo.data.star_syntax import Block, write_blocks
from dcryo.data.star_table import Table
from dcryo.errors import InputError

ENDINGS = (".star", ".box", ".txt")
_X, _Y = PARTICLE_FIELDS["coordinate_px"].star
_MICROGRAPH = "rlnMicrographName"
_SCORE, _PSI = "rlnAutopickFigureOfMerit", "rlnAnglePsi"
_CLASS = PARTICLE_FIELDS["class_number"]
_NUMBER = Field("number", "particles", "f8", "", "any of a pick's numbers")


@dataclass(frozen=True)
class Coordinates:
    """N picks. coordinate_px: (N, 2) float64, x and y; and what else there is of each, (N,), None where it is unknown.

    score: figure of merit; psi_deg: in-plane angle; class_number: from 1, of the template; micrograph: as the file
    names it, in files of several.
    """

    coordinate_px: np.ndarray
    score: np.ndarray | None = None
    psi_deg: np.ndarray | None = None
    class_number: np.ndarray | None = None
    micrograph: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.coordinate_px)

    def take(self, rows: np.ndarray) -> "Coordinates":
        """The picks at `rows` (indices, or a mask (N,))."""
        rest = (self.score, self.psi_deg, self.class_number, self.micrograph)
        return Coordinates(self.coordinate_px[rows], *(None if values is None else values[rows] for values in rest))


def read_coordinates(path: str | Path) -> Coordinates:
    """Read a .star (also of particles), .box or .txt file. InputError where it is none or a value is no number.

    A STAR table without rows gives no picks. Of several tables the first with coordinates is read.
    """
    path = Path(path)
    if path.suffix == ".star":
        return _read_star(path)
    if path.suffix == ".box":
        columns = _read_columns(path, 4)
        score = columns[:, 4] if columns.shape[1] > 4 else None
        return Coordinates(columns[:, :2] + columns[:, 2:4] // 2, score)
    if path.suffix == ".txt":
        return Coordinates(_read_columns(path, 2)[:, :2])
    raise InputError(f"{path}: not a file of coordinates; expected one that ends in {', '.join(ENDINGS)}")


def write_coordinates(path: str | Path, picks: Coordinates) -> None:
    """Write picks as a STAR file that RELION reads; there may be none."""
    columns = {_X: picks.coordinate_px[:, 0], _Y: picks.coordinate_px[:, 1]}
    if picks.score is not None:
        columns[_SCORE] = picks.score
    if picks.psi_deg is not None:
        columns[_PSI] = picks.psi_deg
    if picks.class_number is not None:
        columns[_CLASS.star[0]] = picks.class_number
    if picks.micrograph is not None:
        columns[_MICROGRAPH] = picks.micrograph
    write_blocks(path, {"": Block(columns)})


def write_boxes(path: str | Path, coordinate_px: np.ndarray, box_px: int) -> None:
    """Write picks (N, 2) as EMAN boxes of `box_px` pixels, whose corners are whole pixels."""
    corners = np.floor(coordinate_px + 0.5).astype(int) - box_px // 2
    with replacing(path) as file:
        file.writelines(f"{x}\t{y}\t{box_px}\t{box_px}\n".encode() for x, y in corners.tolist())


def coordinates_of(source: Path, name: str) -> Coordinates | None:
    """The coordinates of one micrograph, by its name without directory and ending; None where there are none.

    source: a file, in which the rows of micrographs of that name count, or all if it names none; or a directory with a
    file for each micrograph, NAME.box, NAME_coordinates.star, or NAME_ and other words before .star.
    """
    path = _file_of(source, name) if source.is_dir() else source
    if path is None:
        return None
    picks = read_coordinates(path)
    if picks.micrograph is None:
        return picks
    rows = np.array([_stem(one) == name for one in picks.micrograph.tolist()], dtype=bool)
    return picks.take(rows) if rows.any() or source.is_dir() else None


def _file_of(folder: Path, name: str) -> Path | None:
    exact = [folder / f"{name}{middle}{ending}" for middle in ("_coordinates", "") for ending in ENDINGS]
    found = [path for path in exact if path.is_file()] or sorted(folder.glob(f"{glob.escape(name)}_*.star"))
    return found[0] if found else None


def _stem(path: str) -> str:
    return Path(path).name.rpartition(".")[0] or path


def _read_star(path: Path) -> Coordinates:
    blocks = star_syntax.parse(path)
    names = [name for name, block in blocks.items() if {_X, _Y} <= block.columns.keys()]
    if not names:
        raise InputError(f"{path}: no table has the columns _{_X} and _{_Y}; expected coordinates")
    table = Table(f"{path}, data_{names[0]}", blocks[names[0]])

    def column(field: Field, label: str) -> np.ndarray | None:
        return table.numbers(field, label) if label in table else None

    place = [table.numbers(PARTICLE_FIELDS["coordinate_px"], label) for label in (_X, _Y)]
    numbers = column(_CLASS, _CLASS.star[0])
    return Coordinates(
        np.stack(place, axis=1),
        column(_NUMBER, _SCORE),
        column(_NUMBER, _PSI),
        None if numbers is None else numbers.astype(np.int32),
        star_syntax.text(table.raw(_MICROGRAPH), table.where) if _MICROGRAPH in table else None,
    )


def _read_columns(path: Path, least: int) -> np.ndarray:
    """Numbers of a text file in columns, `least` or more; # begins a remark."""
    rows: list[list[float]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected columns of numbers") from error
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if len(values) < least or not np.isfinite(values).all() or (rows and len(values) != len(rows[0])):
            wanted = f"{len(rows[0])}" if rows else f"at least {least}"
            raise InputError(f"{path}, line {number}: found {line[:60]!r}; expected {wanted} numbers")
        rows.append(values)
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(rows[0]) if rows else least)
