"""The syntax of STAR files as RELION writes and reads them: blocks of pairs or of one table, line by line.

This is narrower than the STAR of the crystallographers (S. R. Hall, J. Chem. Inf. Comput. Sci. 31, 326,
1991) and in places outside it, where its parsers fail: `save_noDW` and `data_1/stack.mrcs` are plain values
of a row, and remarks may follow a table. A row is one line. A value stands in quotes if it is empty or holds
white space.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dcryo.data.atomic import replacing
from dcryo.errors import InputError

_CHUNK_ROWS = 1 << 15
_WORD = re.compile(rb"\S+")
_CLOSING = {b'"': re.compile(rb'"(?=\s|$)'), b"'": re.compile(rb"'(?=\s|$)")}
_NEEDS_QUOTES = re.compile(r"""[\s\0]|^$|^["'#_;$\[\]]|^(data|loop|save|global|stop)_""", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """One data block: label (without its underscore) -> column; a block that is no loop has one row.

    Columns read are text. Columns written may be text, or numbers, which get ten significant digits.
    """

    columns: dict[str, np.ndarray]
    is_loop: bool = True

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def read_blocks(path: str | Path) -> dict[str, Block]:
    """Every block of a STAR file by its name (without `data_`); values stay text, as they stand.

    Raises InputError, naming the line, where the file is not such a STAR file, or not in UTF-8.
    """
    return {
        name: Block(
            {label: text(values, f"{path}: column _{label}") for label, values in block.columns.items()},
            block.is_loop,
        )
        for name, block in parse(path).items()
    }


def write_blocks(path: str | Path, blocks: Mapping[str, Block]) -> None:
    """Write blocks so that RELION 3.1 and later read them; InputError for text that STAR cannot hold."""
    with replacing(path) as file:
        for name, block in blocks.items():
            try:
                file.writelines(line.encode() for line in _lines(name, block))
            except UnicodeEncodeError as error:
                raise InputError(f"{path}: {error.object!r} is not text that UTF-8 can hold; rename it") from error


def parse(path: str | Path) -> dict[str, Block]:
    """Like `read_blocks`, but with columns of bytes: a quarter of the memory."""
    builders: dict[str, _Builder] = {}
    current: _Builder | None = None
    blank = True
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                words = line.split()
                if not words or words[0].startswith(b"#"):
                    blank = blank or not words
                    continue
                if _opens_block(words, current, blank):
                    current = _Builder(path, words[0][5:].decode("utf-8", "replace"))
                    if current.name in builders:
                        raise InputError(f"{path}, line {number}: a second data_{current.name}; expected one")
                    builders[current.name] = current
                elif current is None:
                    raise InputError(f"{path}, line {number}: found {line[:40]!r}; expected data_, as STAR files begin")
                else:
                    current.add(number, line, words, blank)
                blank = False
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a STAR file") from error
    if not builders:
        raise InputError(f"{path}: has no data_ block; expected a STAR file")
    return {name: builder.build() for name, builder in builders.items()}


def text(values: np.ndarray, where: str) -> np.ndarray:
    """Text of a column of bytes; InputError, beginning with `where`, if it is not UTF-8."""
    try:
        return values.astype("U")
    except UnicodeDecodeError:
        pass  # not ASCII, which is the fast case
    try:
        return np.char.decode(values, "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} holds {error.object[:40]!r}; expected UTF-8, convert the file") from error


@dataclass
class _Builder:
    """A block while its lines come in; `stray` tells of a line after the table that was no row of it."""

    path: str | Path
    name: str
    labels: list[str] = field(default_factory=list)
    is_loop: bool = False
    n_rows: int = 0
    rows: list[list[bytes]] = field(default_factory=list)
    chunks: list[list[np.ndarray]] = field(default_factory=list)
    stray: str = ""

    def add(self, number: int, line: bytes, words: list[bytes], blank: bool) -> None:
        if b"'" in line or b'"' in line or b"#" in line or b"\0" in line:
            words = self._split(number, line)
        # A value that begins with _ is no label: it stands in quotes, or after the first row.
        labelled = not self.n_rows and line.lstrip().startswith(b"_")
        if self.is_loop and labelled and len(words) == 1:
            self._add_label(number, words[0])
        elif self.is_loop:
            self._add_row(number, line, words, blank)
        elif line.split() == [b"loop_"] and not self.labels:
            self.is_loop = True
        elif labelled and len(words) == 2:
            self._add_label(number, words[0])
            self.rows = [[*(self.rows[0] if self.rows else []), words[1]]]
        else:
            raise self._refused(number, f"found {line[:60]!r}", "a label and its value, or one table per block")

    def build(self) -> Block:
        self._flush()
        empty = [np.empty(0, "S1")]
        return Block(
            {
                label: np.concatenate([chunk[i] for chunk in self.chunks] or empty)
                for i, label in enumerate(self.labels)
            },
            self.is_loop,
        )

    def _add_label(self, number: int, word: bytes) -> None:
        label = word[1:].decode("utf-8", "replace")
        if label in self.labels or not label:
            raise self._refused(number, f"label _{label} once more", "each label once in a block")
        self.labels.append(label)

    def _add_row(self, number: int, line: bytes, words: list[bytes], blank: bool) -> None:
        width = len(self.labels)
        if len(words) != width and b"\t" in line:
            # RELION's job files hold a tab inside a value.
            words = [word for word in line.rstrip().split(b" ") if word]
        if len(words) == width and not self.stray:
            self.n_rows += 1
            self.rows.append(words)
            if len(self.rows) == _CHUNK_ROWS:
                self._flush()
        elif len(words) == width:
            raise InputError(self.stray)
        elif not self.stray:
            refused = self._refused(
                number, f"row {self.n_rows + 1} has {len(words)} values", f"{width}, one for each label"
            )
            # For RELION an empty line ends a table, and its local resolution job writes remarks there. Rows
            # may go on after an empty line, but not after such a remark: then it was a damaged row.
            if not blank or not self.n_rows:
                raise refused
            self.stray = str(refused)

    def _flush(self) -> None:
        if self.rows:
            self.chunks.append([np.array(column, dtype="S") for column in zip(*self.rows, strict=True)])
            self.rows = []

    def _split(self, number: int, line: bytes) -> list[bytes]:
        """The values of a line with quotes or a remark; a quote closes where white space follows."""
        if b"\0" in line:
            raise self._refused(number, "a NUL byte", "a STAR file, which is text")
        words = []
        position = 0
        while match := _WORD.search(line, position):
            start, position = match.span()
            quote = line[start : start + 1]
            if quote == b"#":
                break
            if quote in _CLOSING:
                closing = _CLOSING[quote].search(line, start + 1)
                if closing is None:
                    raise self._refused(number, f"{line[start : start + 40]!r}", "the quote to be closed")
                position = closing.end()
                words.append(line[start + 1 : closing.start()])
            else:
                words.append(match.group())
        return words

    def _refused(self, number: int, found: str, expected: str) -> InputError:
        return InputError(f"{self.path}, line {number}, in data_{self.name}: {found}; expected {expected}")


def _opens_block(words: list[bytes], current: _Builder | None, blank: bool) -> bool:
    """Whether a line opens a block, and is not a row that begins with a name such as data_1/stack.mrcs."""
    if not words[0].startswith(b"data_") or (len(words) > 1 and not words[1].startswith(b"#")):
        return False
    in_one_column = current is not None and current.is_loop and len(current.labels) == 1
    return blank or not in_one_column


def _lines(name: str, block: Block) -> Iterator[str]:
    # RELION takes the file's version from this comment, and a file without it for one of before 3.1.
    yield f"\n# version 30001\n\ndata_{name}\n\n"
    if not block.is_loop:
        yield from (f"_{label} {_formatted(values)[0]}\n" for label, values in block.columns.items())
        return
    yield "loop_\n"
    yield from (f"_{label} #{number}\n" for number, label in enumerate(block.columns, 1))
    for start in range(0, len(block), _CHUNK_ROWS):
        chunk = [_formatted(values[start : start + _CHUNK_ROWS]) for values in block.columns.values()]
        yield from (" ".join(row) + "\n" for row in zip(*chunk, strict=True))
    yield "\n"


def _formatted(values: np.ndarray) -> list[str]:
    if values.dtype.kind == "f":
        return [f"{value:.10g}" for value in values.tolist()]
    if values.dtype.kind in "iu":
        return [str(value) for value in values.tolist()]
    return [_quoted(value) if _NEEDS_QUOTES.search(value) else value for value in values.tolist()]


def _quoted(value: str) -> str:
    for quote in ('"', "'"):
        if not re.search(quote + r"(\s|$)", value) and not re.search(r"[\r\n\0]", value):
            return f"{quote}{value}{quote}"
    raise InputError(f"{value!r} cannot be written as STAR; take line breaks or one kind of quotes out of it")
