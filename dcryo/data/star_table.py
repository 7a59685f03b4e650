"""Tables of STAR files as typed columns: what reading and writing particles and micrographs share."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dcryo.data import star_syntax
from dcryo.data.particles import OpticsRows, numbered
from dcryo.data.schema import FIELDS, OPTICS_FIELDS, Field, expected, first_refused
from dcryo.data.star_syntax import Block
from dcryo.errors import InputError

GROUP = "rlnOpticsGroup"
# These are more than a column of text or numbers.
_OWN_WAY = {"image_path", "image_index", "optics_row", "rotation"}


class Table:
    """A table as it is read: which labels are left, and where an error is."""

    def __init__(self, where: str, block: Block) -> None:
        self.where = where
        self._columns = block.columns
        self._used: set[str] = set()
        self._rows = len(block)

    def __len__(self) -> int:
        return self._rows

    def __contains__(self, label: str) -> bool:
        return label in self._columns

    def raw(self, label: str) -> np.ndarray:
        """The column's bytes, from here on not part of the rest."""
        if label not in self._columns:
            raise InputError(f"{self.where}: has no column _{label}; add it")
        self._used.add(label)
        return self._columns[label]

    def numbers(self, field: Field, label: str) -> np.ndarray:
        """The column as float64 (N,), every number accepted by the field."""
        raw = self.raw(label)
        try:
            values = raw.astype(np.float64)
        except ValueError:
            raise self.refused(label, _first_word(raw), expected(field)) from None
        row = first_refused(field, values)
        if row is not None:
            raise self.refused(label, row, expected(field))
        return values

    def lists(self, field: Field, label: str) -> np.ndarray:
        """A column of lists [c0,c1,...] as float64 (N, L), L numbers of the longest; shorter ones end in zeros."""
        lists = []
        for row, word in enumerate(self.raw(label).tolist()):
            try:
                if not (word.startswith(b"[") and word.endswith(b"]")):
                    raise ValueError(word)
                lists.append(np.array([float(number) for number in word[1:-1].split(b",") if number]))
            except ValueError:
                raise self.refused(label, row, "a list of numbers, [c0,c1,...]") from None
            if first_refused(field, lists[-1][None]) is not None:
                raise self.refused(label, row, f"{expected(field)} at every place")
        longest = max(map(len, lists), default=0)
        return np.stack([np.pad(one, (0, longest - len(one))) for one in lists] or [np.zeros(0)])[: len(lists)]

    def plain_fields(self, fields: Mapping[str, Field]) -> dict[str, np.ndarray]:
        """The fields that are here and need no conversion, by name."""
        found: dict[str, np.ndarray] = {}
        for field in fields.values():
            labels = field.star
            if field.star_also in self and not any(label in self for label in labels):
                labels = (field.star_also,)
            if field.name in _OWN_WAY or not any(label in self for label in labels):
                continue
            if field.dtype == "U":
                found[field.name] = star_syntax.text(self.raw(labels[0]), f"{self.where}: _{labels[0]}")
            elif field.shape == (None,):
                found[field.name] = self.lists(field, labels[0])
            else:
                values = np.stack([self.numbers(field, label) for label in labels], axis=1)
                found[field.name] = values.reshape(len(self), *field.shape)
        return found

    def drop(self, labels: Sequence[str]) -> None:
        self._used.update(labels)

    def rest(self) -> dict[str, np.ndarray]:
        return {
            label: star_syntax.text(values, f"{self.where}: _{label}")
            for label, values in self._columns.items()
            if label not in self._used
        }

    def refused(self, label: str, row: int, wanted: str) -> InputError:
        value = self._columns[label][row].decode("utf-8", "replace")
        return InputError(
            f"{self.where}, row {row + 1}, _{label}: found {value!r}; expected {wanted}. "
            "Correct the value or take the row out"
        )


def _first_word(raw: np.ndarray) -> int:
    for row, value in enumerate(raw.tolist()):
        try:
            float(value)
        except ValueError:
            return row
    raise AssertionError("every value is a number")


def optics_of(table: Table, optics_table: Table) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """The optics of a table: columns (G,) by name, row of each of the table's (N,), and other columns (G,) as text."""
    optics = optics_table.plain_fields(OPTICS_FIELDS)
    return optics, _optics_rows(table, optics_table, optics), optics_table.rest()


def _optics_rows(table: Table, optics_table: Table, optics: Mapping[str, np.ndarray]) -> np.ndarray:
    if "group" not in optics:
        raise InputError(f"{optics_table.where}: has no column _{GROUP}; add it")
    groups = optics["group"]
    order = np.argsort(groups, kind="stable")
    twice = np.flatnonzero(np.diff(groups[order]) == 0)
    if len(twice):
        raise optics_table.refused(GROUP, int(order[twice[0] + 1]), "each optics group once")
    if GROUP not in table and len(groups) == 1:
        return np.zeros(len(table), np.int32)
    wanted = table.numbers(OPTICS_FIELDS["group"], GROUP)
    rows = order[np.searchsorted(groups[order], wanted).clip(max=len(groups) - 1)] if len(groups) else wanted
    missing = np.flatnonzero(groups[rows] != wanted) if len(groups) else np.arange(len(wanted))
    if len(missing):
        raise table.refused(GROUP, int(missing[0]), f"a group of data_optics, {groups.astype(int).tolist()}")
    return rows


def optics_columns_of(rows: OpticsRows, fixed: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The optics table to write, by label, and the number of each row's group, (N,).

    fixed: columns that RELION asks for; the source's own values of them are kept.
    """
    optics = numbered(rows.optics, rows.n_groups)
    columns = dict(plain_columns("optics", optics)) | dict(fixed)
    for label, values in rows.optics_extra.items():
        if label not in columns or label in fixed:
            columns[label] = values
    return columns, optics["group"][rows["optics_row"]]


def plain_columns(table: str, columns: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The columns that need no conversion, as labels and values (N,), of a table of the schema."""
    for field in FIELDS:
        if field.table == table and field.name in columns and field.name not in _OWN_WAY and field.star:
            if field.shape == (None,):
                yield field.star[0], np.array([_listed(row) for row in columns[field.name].tolist()], dtype="U")
                continue
            values = columns[field.name].reshape(-1, len(field.star))
            yield from ((label, values[:, i]) for i, label in enumerate(field.star))


def _listed(numbers: Sequence[float]) -> str:
    return "[" + ",".join(f"{number:.12g}" for number in numbers) + "]"
