"""Which particles to cut out of which micrographs, in the files that say so.

Three kinds of STAR file do: micrographs with the coordinate file of each (`dcryo pick`), RELION's list of micrographs
and coordinate files, which goes with a table of micrographs, and particles with coordinates of their own.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dcryo.data import micrographs, star
from dcryo.data.items import Item
from dcryo.data.micrographs import find
from dcryo.data.particles import Micrographs
from dcryo.data.schema import PARTICLE_FIELDS
from dcryo.data.star_syntax import parse
from dcryo.errors import InputError

_NAME, _COORDINATES = "rlnMicrographName", "rlnMicrographCoordinates"
_X = PARTICLE_FIELDS["coordinate_px"].star[0]
_CTF = ("defocus_u_A", "defocus_v_A", "defocus_angle_deg", "phase_shift_deg")
_CTF_FACTORS = ("ctf_bfactor_A2", "ctf_scale")
_CTF_QUALITY = {"ctf_resolution_A": "rlnCtfMaxResolution", "ctf_score": "rlnCtfFigureOfMerit"}
_OF_IMAGES = ("image_path", "image_index", "image_sign", "uid")
_APPLIED = ("rlnCtfDataAreCtfPremultiplied", "rlnCtfDataArePhaseFlipped")
"""What an optics table says of images that were made before."""


@dataclass(frozen=True)
class Picked(Item):
    """A micrograph, and where its picks are: in the file `picks`, or here, as columns of the schema and other ones.

    micrograph: its name in tables; row: in `Picks.shared`; flag: why it should not be used, empty where it may.
    """

    micrograph: str
    row: int
    pixel_size_A: float
    flag: str = ""
    picks: Path | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """That of the micrograph, of its picks and of its pixel size."""
        if self.picks is not None:
            picks = Item("", self.picks).fingerprint()
        else:
            digest = hashlib.sha256()
            for name, values in {**self.columns, **self.extra}.items():
                digest.update(f"{name}\0{values.dtype}{values.shape}\0".encode())
                digest.update(np.ascontiguousarray(values).data)
            picks = digest.hexdigest()[:32]
        return f"{super().fingerprint()} {picks} {self.pixel_size_A!r}"


@dataclass(frozen=True)
class Picks:
    """What there is to extract by now.

    items: in the order of the particles, not named yet. shared, shared_extra: what is known of each micrograph that
    its particles have too, first axis the items' `row`; empty where nothing is. optics, optics_extra: the groups that
    the particles' `optics_row` points to.
    """

    items: tuple[Picked, ...] = ()
    shared: Mapping[str, np.ndarray] = field(default_factory=dict)
    shared_extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    optics: Mapping[str, np.ndarray] = field(default_factory=dict)
    optics_extra: Mapping[str, np.ndarray] = field(default_factory=dict)


def read_picks(path: Path, micrographs_path: Path | None = None) -> Picks:
    """Read a STAR file of picks, and where it does not have them the micrographs.

    Particles keep what is known of them but for their images; what they lack of the CTF is that of their micrograph.
    InputError for what is no such file, or lacks what is needed.
    """
    blocks = parse(path)
    if any({_NAME, _X} <= block.columns.keys() for block in blocks.values()):
        return _of_particles(path, micrographs_path)
    if not any({_NAME, _COORDINATES} <= block.columns.keys() for block in blocks.values()):
        raise InputError(f"{path}: no table has _{_COORDINATES} (a list of picks) or _{_X} with _{_NAME} (particles)")
    if "optics" not in blocks:
        return _of_list(path, micrographs_path)
    if micrographs_path is not None:
        raise InputError(f"--micrographs {micrographs_path}: {path} has the micrographs itself; leave it out")
    table = micrographs.read_micrographs(path)
    return _of_micrographs(path, table, np.arange(len(table)), table["coordinates_path"].tolist())


def _of_list(path: Path, micrographs_path: Path | None) -> Picks:
    """Picks of RELION's list of micrographs and their coordinate files."""
    if micrographs_path is None:
        raise InputError(f"{path}: has no optics; give the STAR file of its micrographs with --micrographs")
    blocks = star.read_blocks(path).values()
    columns = next(block.columns for block in blocks if {_NAME, _COORDINATES} <= block.columns.keys())
    table = micrographs.read_micrographs(micrographs_path)
    rows = _rows_in(table, columns[_NAME].tolist(), path, micrographs_path)
    return _of_micrographs(path, table, rows, columns[_COORDINATES].tolist())


def _of_micrographs(path: Path, table: Micrographs, rows: np.ndarray, coordinates: Sequence[str]) -> Picks:
    """Picks in files of their own, of each of `rows` of a table of micrographs, in that order."""
    if len(np.unique(rows)) < len(rows):
        raise InputError(f"{path}: a micrograph is listed twice; expected each once")
    names, groups = table["path"][rows].tolist(), table["optics_row"][rows]
    sources = [find(name, path) for name in names]
    pixel_sizes_A = _micrograph_pixels_A(path, table.optics, table.n_groups, groups, sources)
    items = [
        Picked("", source, name, int(row), float(pixel_sizes_A[group]), _flag(table, row), find(file, path))
        for source, name, row, group, file in zip(sources, names, rows, groups, coordinates, strict=True)
    ]
    shared = {"optics_row": table["optics_row"], "micrograph": table["path"]} | _ctf_of(table)
    optics = dict(table.optics) | {"micrograph_pixel_size_A": pixel_sizes_A}
    return Picks(tuple(items), shared, _ctf_quality_of(table), optics, _without(table.optics_extra, _APPLIED))


def _of_particles(path: Path, micrographs_path: Path | None) -> Picks:
    particles = star.read_particles(path)
    if "coordinate_px" not in particles:
        raise InputError(f"{path}: has no _rlnCoordinateY; expected particles with coordinates")
    names, first, of_particle = np.unique(particles["micrograph"], return_index=True, return_inverse=True)
    order = np.argsort(first)
    listed, groups = names[order].tolist(), particles["optics_row"][first[order]]
    sources = [find(name, micrographs_path or path) for name in listed]
    table = None if micrographs_path is None else micrographs.read_micrographs(micrographs_path)
    row = np.full(len(listed), -1)
    optics = dict(particles.optics)
    if table is not None and micrographs_path is not None:
        row = _rows_in(table, listed, path, micrographs_path)
        if "micrograph_pixel_size_A" in table.optics:
            of_micrograph = table.optics_of("micrograph_pixel_size_A")[row]
            optics["micrograph_pixel_size_A"] = _pixels_of_groups(path, particles.n_groups, groups, of_micrograph)
    pixel_sizes_A = _micrograph_pixels_A(path, optics, particles.n_groups, groups, sources)
    columns = _without(particles.columns, _OF_IMAGES)
    rows_of = np.split(np.argsort(of_particle, kind="stable"), np.cumsum(np.bincount(of_particle))[:-1])
    items = [
        Picked(
            "", source, name, int(row[number]), float(pixel_sizes_A[groups[number]]),
            "" if table is None else _flag(table, row[number]), None,
            {key: values[rows_of[place]] for key, values in columns.items()},
            {label: values[rows_of[place]] for label, values in particles.extra.items()},
        )
        for number, (place, source, name) in enumerate(zip(order, sources, listed, strict=True))
    ]  # fmt: skip
    return Picks(
        tuple(items),
        {} if table is None else _ctf_of(table),
        {} if table is None else _ctf_quality_of(table),
        optics | {"micrograph_pixel_size_A": pixel_sizes_A},
        _without(particles.optics_extra, _APPLIED),
    )


def _rows_in(table: Micrographs, names: Iterable[str], path: Path, micrographs_path: Path) -> np.ndarray:
    """Rows of micrographs in their table."""
    row_of = {name: row for row, name in enumerate(table["path"].tolist())}
    for name in names:
        if name not in row_of:
            raise InputError(f"{path}: micrograph {name} is not in {micrographs_path}; give the table that it is in")
    return np.array([row_of[name] for name in names])


def _micrograph_pixels_A(
    path: Path, optics: Mapping[str, np.ndarray], n_groups: int, groups: np.ndarray, sources: Sequence[Path]
) -> np.ndarray:
    """Pixel size of the micrographs of each optics group, (G,): from the header of the first, where no table says.

    groups: of each micrograph, whose files are `sources`.
    """
    if "micrograph_pixel_size_A" in optics:
        return optics["micrograph_pixel_size_A"]
    sizes = np.ones(n_groups)
    for group in np.unique(groups).tolist():
        first = sources[groups.tolist().index(group)]
        sizes[group] = micrographs.pixel_size_A(first) if first.is_file() else 0.0
        if not sizes[group] > 0:
            raise InputError(
                f"{path}: says no pixel size of its micrographs, nor does {first}; add rlnMicrographPixelSize to "
                "data_optics"
            )
    return sizes


def _pixels_of_groups(path: Path, n_groups: int, groups: np.ndarray, of_micrograph: np.ndarray) -> np.ndarray:
    """Pixel size of the micrographs of each group, (G,), from that of each micrograph."""
    sizes = np.ones(n_groups)
    for group in np.unique(groups):
        found = np.unique(of_micrograph[groups == group])
        if len(found) > 1:
            raise InputError(
                f"{path}: micrographs of optics group {group + 1} have pixels of {found[0]:g} and {found[1]:g} A; "
                "expected one size. Give them groups of their own"
            )
        sizes[group] = found[0]
    return sizes


def _flag(table: Micrographs, row: int) -> str:
    return str(table["flag"][row]) if "flag" in table else ""


def _ctf_of(table: Micrographs) -> dict[str, np.ndarray]:
    """The columns of micrographs that their particles have too, (M,) by name."""
    found = {name: table[name] for name in _CTF if name in table}
    for name in _CTF_FACTORS:
        label = PARTICLE_FIELDS[name].star[0]
        if label in table.extra:
            found[name] = table.extra[label].astype(np.float64)
    return found


def _ctf_quality_of(table: Micrographs) -> dict[str, np.ndarray]:
    """How well each CTF is known, as RELION writes it for particles, (M,) text by label."""
    return {
        label: np.array([f"{value:.10g}" for value in table[name].tolist()])
        for name, label in _CTF_QUALITY.items()
        if name in table
    }


def _without(columns: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: values for name, values in columns.items() if name not in names}
