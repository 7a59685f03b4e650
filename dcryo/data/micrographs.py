"""Micrographs: their tables in RELION's STAR files, version 3.1 and later, and their images."""

from pathlib import Path

import numpy as np
import PIL.Image
import tifffile

from dcryo.data import mrc, star_syntax, tiff
from dcryo.data.particles import Micrographs
from dcryo.data.schema import MICROGRAPH_FIELDS
from dcryo.data.star_syntax import Block, write_blocks
from dcryo.data.star_table import GROUP, Table, optics_columns_of, optics_of, plain_columns
from dcryo.errors import InputError, RunError

_NAME = "rlnMicrographName"


def read_micrographs(path: str | Path) -> Micrographs:
    """Read a STAR file of micrographs, of RELION 3.1 or later, with its optics groups.

    Columns that the schema does not know are kept as text. Paths stay as they are: they are relative to the
    directory of the project. Raises InputError where there are no optics or no micrographs, a micrograph is there
    twice, or a value is refused, which is named.
    """
    blocks = star_syntax.parse(path)
    names = [name for name, block in blocks.items() if name != "optics" and _NAME in block.columns]
    if not names:
        raise InputError(f"{path}: no table has the column _{_NAME}; expected a STAR file of micrographs")
    table = Table(f"{path}, data_{names[0]}", blocks[names[0]])
    if not len(table):
        raise InputError(f"{table.where}: has no rows; expected at least one micrograph")
    if "optics" not in blocks:
        raise InputError(f"{path}: has no data_optics; expected a file of RELION 3.1 or later")
    optics, optics_row, optics_extra = optics_of(table, Table(f"{path}, data_optics", blocks["optics"]))
    columns = table.plain_fields(MICROGRAPH_FIELDS) | {"optics_row": optics_row}
    seen: set[str] = set()
    for row, name in enumerate(columns["path"].tolist()):
        if name in seen:
            raise table.refused(_NAME, row, "each micrograph once")
        seen.add(name)
    return Micrographs(columns, optics, table.rest(), optics_extra)


def write_micrographs(path: str | Path, micrographs: Micrographs) -> None:
    """Write micrographs as a STAR file of RELION 3.1. RunError if there are none or the file cannot be written."""
    if not len(micrographs):
        raise RunError(f"{path}: not written, since there are no micrographs")
    optics_columns, groups = optics_columns_of(micrographs, {})
    columns = dict(plain_columns("micrographs", micrographs.columns)) | {GROUP: groups}
    columns |= {label: values for label, values in micrographs.extra.items() if label not in columns}
    write_blocks(path, {"optics": Block(optics_columns), "micrographs": Block(columns)})


def read_image(path: str | Path) -> np.ndarray:
    """A micrograph as float32 (y, x): MRC, TIFF, PNG or JPEG. InputError where it cannot be read as one image.

    A TIFF's first row is the last in an MRC file and here; PNG and JPEG are taken as they are.
    """
    path = Path(path)
    kind = path.suffix.lower()
    try:
        if kind in tiff.SUFFIXES:
            image = tiff.read(path)
        elif kind in (".png", ".jpg", ".jpeg"):
            with PIL.Image.open(path) as opened:
                image = np.asarray(opened.convert("L") if opened.mode in ("RGB", "RGBA", "P", "CMYK") else opened)
        else:
            stack = mrc.open_stack(path)
            if stack.n != 1 or stack.readable != 1:
                raise InputError(f"{path}: holds {stack.readable} whole images of {stack.n}; expected one micrograph")
            image = stack.read([0])[0]
    except (OSError, ValueError, SyntaxError, tifffile.TiffFileError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from error
    if image.ndim != 2:
        raise InputError(f"{path}: has {image.ndim} axes; expected an image of two")
    return np.ascontiguousarray(image, dtype=np.float32)


def pixel_size_A(path: str | Path) -> float:
    """Pixel size in the header of an MRC file, 0.0 where it says none or there is no such header."""
    return mrc.open_stack(path).voxel_size_A if Path(path).suffix.lower() in mrc.STACK_SUFFIXES else 0.0


def find(name: str, source: str | Path) -> Path:
    """Where a file that a STAR file names is: as it is, or below a directory above the STAR file.

    RELION's names start at the project's directory. Returns the name as it is where it is nowhere.
    """
    for folder in (Path(), *Path(source).absolute().parents):
        if (folder / name).is_file():
            return folder / name
    return Path(name)
