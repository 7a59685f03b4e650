"""Particles and micrographs as columns: what every file format is read into and written from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import ClassVar, Self

import numpy as np

from dcryo.data.schema import MICROGRAPH_FIELDS, OPTICS_FIELDS, PARTICLE_FIELDS, Field


@dataclass(frozen=True)
class OpticsRows:
    """N rows in G optics groups, one array per column: particles or micrographs.

    `columns` (first axis N) and `optics` (first axis G) are named, typed and shaped by `dcryo.data.schema`; a
    column is there only if the source had it or a job added it, except those in `required`. `extra` and
    `optics_extra` keep the source's other columns verbatim: label -> array of text, (N,) and (G,). Arrays are
    converted to the schema's types. Raises ValueError for names that the schema does not have and for shapes
    that do not agree.
    """

    fields: ClassVar[Mapping[str, Field]]
    required: ClassVar[tuple[str, ...]]
    noun: ClassVar[str]

    columns: dict[str, np.ndarray]
    optics: dict[str, np.ndarray]
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    optics_extra: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [name for name in self.required if name not in self.columns]
        if missing:
            raise ValueError(f"{self.noun} lack the columns {', '.join(missing)}")
        n = len(self.columns["optics_row"])
        n_groups = self.n_groups
        object.__setattr__(self, "columns", _checked(self.columns, self.fields, n))
        object.__setattr__(self, "optics", _checked(self.optics, OPTICS_FIELDS, n_groups))
        object.__setattr__(self, "extra", _checked_text(self.extra, n))
        object.__setattr__(self, "optics_extra", _checked_text(self.optics_extra, n_groups))
        rows = self.columns["optics_row"]
        if n and (rows.min() < 0 or rows.max() >= n_groups):
            raise ValueError(
                f"optics_row runs from {rows.min()} to {rows.max()}, but there are {n_groups} optics groups"
            )

    def __len__(self) -> int:
        return len(self.columns["optics_row"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    @property
    def n_groups(self) -> int:
        """Number G of optics groups."""
        tables = (*self.optics.values(), *self.optics_extra.values())
        return len(tables[0]) if tables else 0

    def optics_of(self, name: str) -> np.ndarray:
        """The optics column `name` spread over the rows, (N,)."""
        return self.optics[name][self.columns["optics_row"]]

    def take(self, rows: np.ndarray) -> Self:
        """The rows at `rows` (indices, in their order, or a mask (N,)); the optics table stays whole."""
        rows = np.asarray(rows)
        if rows.dtype == bool and rows.shape != (len(self),):
            raise ValueError(f"a mask of shape {rows.shape} cannot select from {len(self)} {self.noun}")
        if rows.size == 0:
            rows = np.empty(0, np.int64)
        return replace(
            self,
            columns={name: values[rows] for name, values in self.columns.items()},
            extra={label: values[rows] for label, values in self.extra.items()},
        )

    def replace(self, **columns: np.ndarray) -> Self:
        """The same with `columns` added or exchanged; their lengths are checked."""
        return replace(self, columns={**self.columns, **columns})

    def replace_optics(self, **columns: np.ndarray) -> Self:
        """The same with optics `columns` added or exchanged; their lengths are checked."""
        return replace(self, optics={**self.optics, **columns})


@dataclass(frozen=True)
class Particles(OpticsRows):
    """N particles; see `OpticsRows`."""

    fields = PARTICLE_FIELDS
    required = ("image_path", "image_index", "optics_row")
    noun = "particles"


@dataclass(frozen=True)
class Micrographs(OpticsRows):
    """N micrographs; see `OpticsRows`."""

    fields = MICROGRAPH_FIELDS
    required = ("path", "optics_row")
    noun = "micrographs"


def identities(particles: Particles) -> np.ndarray:
    """What tells each particle from the others, uint64 (N,): `uid` if it is there, or made of the image's name.

    The second stays the same in any selection, order or run; it repeats where an image is named twice. The copies of a
    symmetry expansion are told apart, and the first of them (`symmetry_copy` 0) is the particle that it was made of.
    """
    if "uid" in particles:
        own = particles["uid"]
    else:
        names = zip(particles["image_path"].tolist(), particles["image_index"].tolist(), strict=True)
        digests = (blake2b(f"{index}@{path}".encode(), digest_size=8).digest() for path, index in names)
        own = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
    if "symmetry_copy" not in particles:
        return own
    pairs = zip(own.tolist(), particles["symmetry_copy"].tolist(), strict=True)
    digests = (blake2b(f"{number}.{copy}".encode(), digest_size=8).digest() for number, copy in pairs)
    return np.where(particles["symmetry_copy"] == 0, own, np.frombuffer(b"".join(digests), "<u8").astype(np.uint64))


def group_optics(values: Mapping[str, np.ndarray], n: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Optics groups of `n` particles that each have their own optics, `values` (n, ...) by name.

    Returns the distinct optics (G,) in the order in which they first appear, and each particle's row in them.
    """
    keys = np.concatenate([np.zeros((n, 1)), *(column.reshape(n, -1) for column in values.values())], axis=1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    first_rows = np.sort(first)
    rows = np.searchsorted(first_rows, first)[inverse.reshape(-1)]
    return {name: column[first_rows] for name, column in values.items()}, rows


def numbered(optics: Mapping[str, np.ndarray], n_groups: int) -> dict[str, np.ndarray]:
    """The optics with a `group` that is fit for a file (from 1, each once; else 1 to G) and with a `name`."""
    groups = optics.get("group", np.zeros(n_groups, np.int32))
    if len(np.unique(groups)) < n_groups or groups.min(initial=1) < 1:
        groups = np.arange(1, n_groups + 1)
    names = np.array([f"opticsGroup{group}" for group in groups], dtype="U")
    return {"name": names} | dict(optics) | {"group": groups}


def _checked(columns: Mapping[str, np.ndarray], fields: Mapping[str, Field], n: int) -> dict[str, np.ndarray]:
    checked = {}
    for name, values in columns.items():
        if name not in fields:
            raise ValueError(f"no field is called {name!r}; dcryo.data.schema lists them")
        array = np.asarray(values)
        if fields[name].dtype != "U" or array.dtype.kind != "U":
            array = array.astype(fields[name].dtype, copy=False)
        wanted = (n, *fields[name].shape)
        if len(array.shape) != len(wanted) or any(b not in (a, None) for a, b in zip(array.shape, wanted, strict=True)):
            raise ValueError(f"column {name} has shape {array.shape}, expected {wanted}")
        checked[name] = array
    return checked


def _checked_text(columns: Mapping[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    checked = {}
    for label, values in columns.items():
        array = np.asarray(values)
        if array.dtype.kind != "U":
            array = array.astype("U")
        if array.shape != (n,):
            raise ValueError(f"column {label} has shape {array.shape}, expected {(n,)}")
        checked[label] = array
    return checked
