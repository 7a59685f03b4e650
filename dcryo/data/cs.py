"""Particles in cryoSPARC's .cs files: tables in numpy's .npy format, joined on `uid`, read without pickle.

What differs from dcryo's conventions (docs/formats.md says how it was found): a pose is the rotation vector of
the transposed matrix, a shift counts pixels of alignments3D/psize_A, y in a micrograph counts from its last row,
angles are in radians, and half sets and classes start at 0. Numbers are float32.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dcryo import euler
from dcryo.data.atomic import replacing
from dcryo.data.particles import Particles, group_optics, identities
from dcryo.data.schema import FIELDS, OPTICS_FIELDS, PARTICLE_FIELDS, Field, expected, first_refused
from dcryo.data.star_syntax import text
from dcryo.errors import InputError, RunError

_MAX_HEADER_BYTES = 1 << 20
_HEADER_READERS = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}
_SHIFT_PIXEL, _BLOB_PIXEL = "alignments3D/psize_A", "blob/psize_A"
_CENTRE = ("location/center_x_frac", "location/center_y_frac")
_MICROGRAPH_SHAPE = "location/micrograph_shape"
_OWN_WAY = {"uid", "image_sign", "coordinate_px", "optics_row", "rotation", "origin_A", "box_px"}
# A field that the schema does not know is kept as text under "name type [shape]", such as "ctf/tilt_A <f4 2".
_KEPT = re.compile(r"(.+) ([<|][biufS]\d+)((?: \d+)*)", re.DOTALL)
# What cryoSPARC wants to see beside the fields of the schema, as it sets them itself for imported particles.
_ZERO, _ONE = np.zeros(1, "<f4"), np.ones(1, "<f4")
_COMPLETION: dict[str, dict[str, np.ndarray]] = {
    "ctf": {
        "type": np.array([b"imported"]),
        "phase_shift_rad": _ZERO,
        "scale": _ONE,
        "scale_const": _ZERO,
        "shift_A": np.zeros((1, 2), "<f4"),
        "tilt_A": np.zeros((1, 2), "<f4"),
        "trefoil_A": np.zeros((1, 2), "<f4"),
        "tetra_A": np.zeros((1, 4), "<f4"),
        "anisomag": np.zeros((1, 4), "<f4"),
        "bfactor": _ZERO,
    },
    "alignments3D": {
        "error": _ZERO,
        "error_min": _ZERO,
        "resid_pow": _ZERO,
        "slice_pow": _ZERO,
        "image_pow": _ZERO,
        "cross_cor": _ZERO,
        "alpha": _ONE,
        "weight": _ZERO,
        "pose_ess": _ZERO,
        "shift_ess": _ZERO,
        "class_posterior": _ONE,
        "class_ess": _ONE,
    },
}


def read_particles(path: str | Path, *passthrough: str | Path) -> Particles:
    """Read the particles of a .cs file, with the fields that it lacks taken from passthrough files.

    Fields that the schema does not know are kept in `extra` as text, exactly. Particles of the same
    ctf/exp_group_id, optics, pixel size and box make one optics group. Raises InputError, naming row, field and
    value, for what is no such file, a uid that a passthrough file lacks, and values that a particle cannot have.
    """
    fields = _load(Path(path))
    for other in passthrough:
        _join(path, fields, Path(other))
    table = _Table(path, fields)
    if not len(table):
        raise InputError(f"{path}: has no rows; expected at least one particle")
    columns: dict[str, np.ndarray] = {}
    if "uid" in fields:
        columns["uid"] = table.take("uid", "u")
    optics, columns["optics_row"] = _optics(table)
    if "blob/path" not in fields and _CENTRE[0] in fields:
        columns["image_path"] = np.zeros(len(table), "U1")
        columns["image_index"] = np.zeros(len(table), np.int64)
    elif "blob/path" not in fields or "blob/idx" not in fields:
        raise InputError(f"{path}: has no blob/path and blob/idx; name the passthrough file that has them too")
    for field in PARTICLE_FIELDS.values():
        if field.cs in fields and field.name not in _OWN_WAY:
            columns[field.name] = table.text(field.cs) if field.dtype == "U" else table.numbers(field)
    if "blob/sign" in fields:
        columns["image_sign"] = np.where(table.numbers(PARTICLE_FIELDS["image_sign"]) < 0, -1, 1)
    if "alignments3D/pose" in fields:
        pose = table.numbers(PARTICLE_FIELDS["rotation"], shape=(3,))
        columns["rotation"] = euler.matrix_from_rotvec(-pose)
    if "alignments3D/shift" in fields:
        pixel = _SHIFT_PIXEL if _SHIFT_PIXEL in fields else _BLOB_PIXEL
        if pixel not in fields:
            raise InputError(f"{path}: has shifts, but neither {_SHIFT_PIXEL} nor {_BLOB_PIXEL}; add one of them")
        pixel_A = table.numbers(OPTICS_FIELDS["pixel_size_A"], pixel)
        columns["origin_A"] = table.numbers(PARTICLE_FIELDS["origin_A"], shape=(2,)) * pixel_A[:, None]
    if all(name in fields for name in (*_CENTRE, _MICROGRAPH_SHAPE)):
        columns["coordinate_px"] = _coordinates(table)
    return Particles(columns, optics, table.rest())


def write_particles(path: str | Path, particles: Particles) -> None:
    """Write particles as a .cs file that cryosparc-tools and cryoSPARC's import read.

    Columns without a field in the format, STAR's unknown columns among them, are left out; so are half sets
    and classes that are not known for every particle, and coordinates where the shape of the micrograph is
    not. Raises InputError for shifts without a pixel size, RunError if there are no particles or the file
    cannot be written.
    """
    if not len(particles):
        raise RunError(f"{path}: not written, since there are no particles")
    columns = {"uid": identities(particles).astype("<u8")} | _plain_columns(particles)
    if "blob/path" in columns:
        columns["blob/sign"] = particles.columns.get("image_sign", np.ones(len(particles))).astype("<f4")
    if "box_px" in particles.optics:
        columns["blob/shape"] = np.repeat(particles.optics_of("box_px")[:, None], 2, axis=1).astype("<u4")
    groups = particles.optics.get("group", np.arange(1, particles.n_groups + 1))
    columns["ctf/exp_group_id"] = groups[particles["optics_row"]].astype("<u4")
    if "rotation" in particles:
        columns["alignments3D/pose"] = -euler.rotvec_from_matrix(particles["rotation"]).astype("<f4")
    if "origin_A" in particles:
        if "pixel_size_A" not in particles.optics:
            raise InputError(f"{path}: shifts are written in pixels, whose size is not known; add pixel_size_A")
        pixel_A = particles.optics_of("pixel_size_A").astype("<f4")
        columns[_SHIFT_PIXEL] = pixel_A
        columns["alignments3D/shift"] = (particles["origin_A"] / pixel_A[:, None]).astype("<f4")
    for key, texts in particles.extra.items():
        if kept := _KEPT.fullmatch(key):
            columns.setdefault(kept[1], _from_text(kept, texts))
    if "coordinate_px" in particles and _MICROGRAPH_SHAPE in columns:
        ny_nx = columns[_MICROGRAPH_SHAPE]
        columns[_CENTRE[0]] = (particles["coordinate_px"][:, 0] / ny_nx[:, 1]).astype("<f4")
        columns[_CENTRE[1]] = (1 - particles["coordinate_px"][:, 1] / ny_nx[:, 0]).astype("<f4")
    for slot, completion in _COMPLETION.items():
        if any(name.startswith(f"{slot}/") for name in columns):
            for name, value in completion.items():
                columns.setdefault(f"{slot}/{name}", np.repeat(value, len(particles), axis=0))
    rows = np.empty(len(particles), [(name, column.dtype, column.shape[1:]) for name, column in columns.items()])
    for name, column in columns.items():
        rows[name] = column
    with replacing(path) as file:
        np.lib.format.write_array(file, rows, allow_pickle=False)


class _Table:
    """The fields as they are read: which are left, and where an error is."""

    def __init__(self, path: str | Path, fields: Mapping[str, np.ndarray]) -> None:
        self.path = path
        self._fields = fields
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def __len__(self) -> int:
        return len(next(iter(self._fields.values())))

    def take(self, name: str, kinds: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """The field's array as it stands, of one of the numpy `kinds`, from here on not part of the rest."""
        values = self._fields[name]
        if values.dtype.kind not in kinds or values.shape[1:] != shape:
            raise InputError(
                f"{self.path}: {name} has type {values.dtype} and shape {values.shape[1:]}; "
                f"expected {'text' if 'S' in kinds else 'numbers'} of shape {shape}"
            )
        self._used.add(name)
        return values

    def numbers(self, field: Field, name: str = "", shape: tuple[int, ...] = ()) -> np.ndarray:
        """A field as float64 in the schema's unit, every number accepted; `name` is the field's own if empty."""
        name = name or field.cs
        with np.errstate(invalid="ignore"):  # NaN is refused below, by row
            values = self.take(name, "iuf", shape) * np.float64(field.cs_scale) + field.cs_offset
        row = first_refused(field, values)
        if row is not None:
            raise InputError(
                f"{self.path}, row {row + 1}, {name}: found {self._fields[name][row]}; expected "
                f"{expected(field)} (after adding {field.cs_offset:g}). Correct the value or take the row out"
            )
        return values

    def text(self, name: str) -> np.ndarray:
        """A field of text; paths lose the > that some begin with."""
        values = text(self.take(name, "S"), f"{self.path}: {name}")
        return np.strings.lstrip(values, ">") if name.endswith("path") else values

    def keep(self, name: str) -> None:
        """Leave a field in the rest though it was taken."""
        self._used.discard(name)

    def rest(self) -> dict[str, np.ndarray]:
        left = {name: values for name, values in self._fields.items() if name not in self._used}
        return dict(_to_text(name, values, f"{self.path}: {name}") for name, values in left.items())


def _load(path: Path) -> dict[str, np.ndarray]:
    """The fields of a .cs file; nothing is allocated before the header agrees with the size of the file."""
    try:
        with path.open("rb") as file:
            dtype, n = _read_header(path, file)
            if not 0 <= n * dtype.itemsize <= path.stat().st_size - file.tell() or dtype.itemsize == 0:
                raise InputError(
                    f"{path}: has {path.stat().st_size - file.tell()} bytes of data; expected {n} rows of "
                    f"{dtype.itemsize} bytes. It was cut short or is damaged: export it again"
                )
            rows = np.fromfile(file, dtype, n)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a .cs file") from error
    fields = {name: np.ascontiguousarray(rows[name]) for name in dtype.names or ()}
    return {name: values.astype(values.dtype.newbyteorder("=")) for name, values in fields.items()}


def _read_header(path: Path, file: BinaryIO) -> tuple[np.dtype, int]:
    start = file.read(12)
    if start.startswith(b"\x94CSDAT"):
        raise InputError(f"{path}: is in cryoSPARC's stream format; save it with Dataset.save(path) as .cs")
    version = tuple(start[6:8])
    if not start.startswith(b"\x93NUMPY") or version not in _HEADER_READERS:
        raise InputError(f"{path}: begins with {start[:8]!r}; expected a .cs file (numpy format 1.0 or 2.0)")
    width, read_header = _HEADER_READERS[version]
    length = int.from_bytes(start[8 : 8 + width], "little")
    if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
        raise InputError(f"{path}: claims a header of {length} bytes; expected a .cs file, export it again")
    file.seek(8)
    try:
        shape, _, dtype = read_header(file, max_header_size=_MAX_HEADER_BYTES)
    except Exception as error:  # the header is a Python literal: numpy lets out whatever parsing one can raise
        raise InputError(f"{path}: its header is damaged ({error}); export the file again") from error
    kinds = {dtype[name].base.kind for name in dtype.names or ()}
    if not kinds or not kinds <= set("biufS") or dtype.hasobject or len(shape) != 1:
        raise InputError(f"{path}: holds {shape} of {dtype}; expected a table of numbers and text")
    return dtype, shape[0]


def _join(path: str | Path, fields: dict[str, np.ndarray], other: Path) -> None:
    """Add to `fields` those that only the passthrough file `other` has, in the order of `uid`."""
    more = _load(other)
    for name, table in ((path, fields), (other, more)):
        if "uid" not in table or table["uid"].dtype.kind != "u" or table["uid"].ndim != 1:
            raise InputError(f"{name}: has no uid; expected one, for .cs files are joined on it")
    order = np.argsort(more["uid"], kind="stable")
    known = more["uid"][order]
    at = np.searchsorted(known, fields["uid"])
    missing = at == len(known)
    missing[~missing] = known[at[~missing]] != fields["uid"][~missing]
    if missing.any():
        row = int(np.flatnonzero(missing)[0])
        raise InputError(
            f"{other}: lacks {missing.sum()} particles of {path}, first uid {fields['uid'][row]} of row {row + 1}; "
            "expected the passthrough file of the same job"
        )
    rows = order[at]
    fields |= {name: values[rows] for name, values in more.items() if name not in fields}


def _plain_columns(particles: Particles) -> dict[str, np.ndarray]:
    columns = {}
    for field in FIELDS:
        table = particles.columns if field.table == "particles" else particles.optics
        if field.name not in table or not field.cs or field.name in _OWN_WAY:
            continue
        values = particles[field.name] if field.table == "particles" else particles.optics_of(field.name)
        if field.dtype == "U":
            columns[field.cs] = np.char.encode(values, "utf-8")
        # What begins at 0 in the file has no place for the 0 that means "not known" here.
        elif not field.cs_offset or (values >= field.cs_offset).all():
            columns[field.cs] = ((values - field.cs_offset) / field.cs_scale).astype(field.cs_dtype)
    if (particles["image_path"] == "").all():
        del columns["blob/path"], columns["blob/idx"]
    return columns


def _optics(table: _Table) -> tuple[dict[str, np.ndarray], np.ndarray]:
    values = {}
    for field in OPTICS_FIELDS.values():
        if field.cs in table and field.name not in _OWN_WAY:
            values[field.name] = table.numbers(field)
    if "blob/shape" in table:
        box = table.numbers(OPTICS_FIELDS["box_px"], shape=(2,))
        other = np.flatnonzero(box[:, 0] != box[:, 1])
        if len(other):
            raise InputError(f"{table.path}, row {other[0] + 1}, blob/shape: found {box[other[0]]}; expected a square")
        values["box_px"] = box[:, 0]
    optics, rows = group_optics(values, len(table))
    for name, column in optics.items():
        # Numbers are float32: 2.7, not 2.700000047683716.
        optics[name] = np.array([float(str(np.float32(value))) for value in column.tolist()])
    n_groups = int(rows.max(initial=-1)) + 1
    if len(np.unique(optics.get("group", ()))) < n_groups:
        optics["group"] = np.arange(1, n_groups + 1)
    return optics, rows


def _coordinates(table: _Table) -> np.ndarray:
    x, y = (table.numbers(PARTICLE_FIELDS["coordinate_px"], name) for name in _CENTRE)
    ny_nx = table.numbers(OPTICS_FIELDS["box_px"], _MICROGRAPH_SHAPE, shape=(2,))
    table.keep(_MICROGRAPH_SHAPE)  # for the way back
    return np.stack([x * ny_nx[:, 1], (1 - y) * ny_nx[:, 0]], axis=1)


def _to_text(name: str, values: np.ndarray, where: str) -> tuple[str, np.ndarray]:
    """A field that the schema does not know as (key, text), from which `_from_text` makes it again."""
    key = " ".join([name, values.dtype.str, *map(str, values.shape[1:])])
    if values.dtype.kind == "S":
        if values.ndim > 1:
            raise InputError(f"{where} holds several texts for each particle; expected one, take the field out")
        return key, text(values, where)
    flat = values.reshape(len(values), -1)
    # Few values are distinct in most fields, and bits compare exactly.
    bits, inverse = np.unique(flat.view(f"u{flat.itemsize}"), return_inverse=True)
    words = bits.view(flat.dtype if flat.dtype.kind != "b" else "u1").astype("U")[inverse.reshape(flat.shape)]
    return key, np.array([" ".join(row) for row in words.tolist()], dtype="U")


def _from_text(kept: re.Match[str], texts: np.ndarray) -> np.ndarray:
    dtype = np.dtype(kept[2])
    if dtype.kind == "S":
        return np.char.encode(texts, "utf-8")
    words = np.array(" ".join(texts.tolist()).split(), dtype="U")
    try:
        numbers = words.astype("u1" if dtype.kind == "b" else dtype)
        return numbers.reshape(len(texts), *map(int, kept[3].split())).astype(dtype)
    except ValueError as error:
        raise InputError(f"extra column {kept[0]!r} does not hold such numbers ({error}); take it out") from error
