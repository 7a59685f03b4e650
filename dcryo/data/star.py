"""Particles in RELION's STAR files: read from any version up to 5, written as version 3.1.

From 3.1 on there is a table of optics groups, and shifts are in Angstrom. Before, every particle has the
columns of its optics, shifts are in pixels, and the pixel size is rlnDetectorPixelSize (um) over
rlnMagnification.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dcryo import euler
from dcryo.data import star_syntax
from dcryo.data.particles import Particles, group_optics, numbered
from dcryo.data.schema import OPTICS_FIELDS, PARTICLE_FIELDS, first_refused
from dcryo.data.star_syntax import Block, read_blocks, write_blocks
from dcryo.data.star_table import GROUP, Table, optics_columns_of, optics_of, plain_columns
from dcryo.errors import InputError, RunError

__all__ = ["Block", "read_blocks", "read_particles", "write_blocks", "write_particles"]

_IMAGE, _DIMENSIONS = "rlnImageName", "rlnImageDimensionality"
_MAGNIFICATION, _DETECTOR_UM = "rlnMagnification", "rlnDetectorPixelSize"
_ORIGIN_PX = ("rlnOriginX", "rlnOriginY")
_ORIGIN_A = PARTICLE_FIELDS["origin_A"].star
_ANGLES = PARTICLE_FIELDS["rotation"].star


def read_particles(path: str | Path) -> Particles:
    """Read a particle STAR file.

    Columns that the schema does not know are kept as text in `extra` and `optics_extra`, and so is an
    incomplete set of Euler angles. Without rlnImageName (picks), every `image_path` is empty. Raises
    InputError, naming row, column and value, for what cannot be a particle: missing columns, words for
    numbers, NaN in a pose or CTF, image 0, an optics group that is not in the table.
    """
    blocks = star_syntax.parse(path)
    table = _particle_table(path, blocks)
    if not len(table):
        raise InputError(f"{table.where}: has no rows; expected at least one particle")
    if "optics" in blocks:
        optics, optics_rows, optics_extra = optics_of(table, Table(f"{path}, data_optics", blocks["optics"]))
    else:
        (optics, optics_rows), optics_extra = _optics_of_particles(table), {}
    columns = {"optics_row": optics_rows} | _images(table)
    if all(label in table for label in _ANGLES):
        angles = [table.numbers(PARTICLE_FIELDS["rotation"], label) for label in _ANGLES]
        columns["rotation"] = euler.matrix_from_euler(*angles)
    if _ORIGIN_A[0] not in table and _ORIGIN_PX[0] in table:
        columns["origin_A"] = _origins_from_pixels(table, optics, optics_rows)
    columns |= table.plain_fields(PARTICLE_FIELDS)
    if "origin_A" in columns:
        table.drop(_ORIGIN_PX)
    return Particles(columns, optics, table.rest(), optics_extra)


def write_particles(
    path: str | Path, particles: Particles, image_names: Sequence[str] | np.ndarray | None = None
) -> None:
    """Write particles as a STAR file of RELION 3.1.

    `image_names` are N names such as "000001@stack.mrcs"; by default they are made of `image_path` and
    `image_index`. Optics groups are renumbered from 1 where a number is below 1 or taken twice. RELION asks
    for `box_px` and `pixel_size_A` of each group. Raises RunError if there are no particles or the file
    cannot be written.
    """
    if not len(particles):
        raise RunError(f"{path}: not written, since there are no particles")
    if image_names is not None and len(image_names) != len(particles):
        raise ValueError(f"{len(image_names)} image names for {len(particles)} particles")
    if image_names is None and (particles["image_path"] != "").any():
        pairs = zip(particles["image_index"].tolist(), particles["image_path"].tolist(), strict=True)
        image_names = [f"{index + 1:06d}@{stack}" for index, stack in pairs]
    optics_columns, groups = optics_columns_of(particles, {_DIMENSIONS: np.full(particles.n_groups, 2)})
    columns = {} if image_names is None else {_IMAGE: np.array(image_names, dtype="U")}
    columns |= dict(plain_columns("particles", particles.columns))
    columns[GROUP] = groups
    if "rotation" in particles:
        columns |= dict(zip(_ANGLES, euler.euler_from_matrix(particles["rotation"]), strict=True))
    for label, values in particles.extra.items():
        # What is kept of a .cs file has a space in its name, which no label has.
        if label not in columns and " " not in label:
            columns[label] = values
    write_blocks(path, {"optics": Block(optics_columns), "particles": Block(columns)})


def _particle_table(path: str | Path, blocks: Mapping[str, Block]) -> Table:
    candidates = {name: block for name, block in blocks.items() if name != "optics"}
    for name in ("particles", "images", "", *candidates):
        if name in candidates and _is_of_particles(candidates[name]):
            return Table(f"{path}, data_{name}", candidates[name])
    raise InputError(
        f"{path}: no block has the column _{_IMAGE}, or _rlnMicrographName and _rlnCoordinateX; "
        f"expected a STAR file of particles, found {', '.join(f'data_{name}' for name in blocks)}"
    )


def _is_of_particles(block: Block) -> bool:
    return _IMAGE in block.columns or {"rlnMicrographName", "rlnCoordinateX"} <= block.columns.keys()


def _images(table: Table) -> dict[str, np.ndarray]:
    """`image_path` and `image_index` of names such as 000001@stack.mrcs, or of one image's file."""
    if _IMAGE not in table:
        return {"image_path": np.zeros(len(table), "U1"), "image_index": np.zeros(len(table), np.int64)}
    names = table.raw(_IMAGE)
    before, at, after = np.strings.partition(names, b"@")
    in_stack = at == b"@"
    # Eighteen digits fit int64.
    numbered = np.strings.isdigit(before) & (np.strings.str_len(before) <= 18) & (after != b"")
    numbers = np.where(in_stack & numbered, before, b"0").astype(np.int64)
    wrong = np.flatnonzero(np.where(in_stack, numbers < 1, before == b""))
    if len(wrong):
        raise table.refused(_IMAGE, int(wrong[0]), "NUMBER@STACK with images numbered from 1, or a file")
    paths = star_syntax.text(np.where(in_stack, after, before), f"{table.where}: _{_IMAGE}")
    return {"image_path": paths, "image_index": np.where(in_stack, numbers - 1, 0)}


def _optics_of_particles(table: Table) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Optics groups where there is no table: particles whose optics are the same, by first appearance."""
    if GROUP in table:
        raise InputError(f"{table.where}: has _{GROUP}, but the file has no data_optics; add that table")
    values = table.plain_fields(OPTICS_FIELDS)
    pixel_size = OPTICS_FIELDS["pixel_size_A"]
    if "pixel_size_A" not in values and _MAGNIFICATION in table and _DETECTOR_UM in table:
        detector_um = table.numbers(pixel_size, _DETECTOR_UM)
        with np.errstate(over="ignore", under="ignore"):
            values["pixel_size_A"] = detector_um * 1e4 / table.numbers(pixel_size, _MAGNIFICATION)
        row = first_refused(pixel_size, values["pixel_size_A"])
        if row is not None:
            raise table.refused(_MAGNIFICATION, row, f"a magnification that fits _{_DETECTOR_UM}")
    optics, rows = group_optics(values, len(table))
    return numbered(optics, rows.max(initial=-1) + 1), rows


def _origins_from_pixels(table: Table, optics: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    field = PARTICLE_FIELDS["origin_A"]
    origin_px = np.stack([table.numbers(field, label) for label in _ORIGIN_PX], axis=1)
    if "pixel_size_A" not in optics:
        raise InputError(
            f"{table.where}: _{_ORIGIN_PX[0]} is in pixels of an unknown size; "
            f"add _rlnImagePixelSize, or _{_MAGNIFICATION} and _{_DETECTOR_UM}"
        )
    with np.errstate(over="ignore"):
        origin = origin_px * optics["pixel_size_A"][rows, None]
    row = first_refused(field, origin)
    if row is not None:
        raise table.refused(_ORIGIN_PX[0], row, "a shift in pixels")
    return origin
