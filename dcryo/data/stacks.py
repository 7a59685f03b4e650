"""The stacks behind a particle table: found and checked before work starts, then read stack by stack.

Rows are counted from 1 in messages and in reasons, as the data rows of the source file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcryo.data import mrc
from dcryo.data.particles import Particles
from dcryo.errors import InputError

LISTED = 5
"""Reasons that a message names."""

SAMPLED_IMAGES = 128
FLOAT16_LARGEST = 65504.0
FLOAT16_SMALLEST_RANGE = 2.0**-10
"""Grey values that span less than this (after the scale) are near float16's subnormal numbers."""
FLOAT16_SMALLEST_CONTRAST = 2.0**-6
"""Grey values that span less than this part of their size are 32 of float16's steps at most."""
FLOAT16_LARGEST_OFFSET = 256.0
"""A mean of so many standard deviations makes float16's rounding 7 percent of the standard deviation."""


@dataclass(frozen=True)
class Sources:
    """Where each row's image is.

    names: the stacks as named in the source; paths: where they were found (None: nowhere). stack (N,): number
    of the row's stack; index (N,): image in it, from 0. sign (N,): -1 where particles are dark on white.
    absent: row -> reason, of rows whose image is known not to be there. box_px, voxel_size_A: side and
    header's voxel size (0: not said) of the first readable stack.
    """

    names: tuple[str, ...]
    paths: tuple[Path | None, ...]
    stack: np.ndarray
    index: np.ndarray
    sign: np.ndarray
    absent: dict[int, str]
    box_px: int
    voxel_size_A: float

    def image_name(self, row: int) -> str:
        """RELION's name of a row's image, counted from 1."""
        return f"{self.index[row] + 1:06d}@{self.names[self.stack[row]]}"

    def signature(self) -> list[tuple[str, int]]:
        """Name and size in bytes of every stack, to know them again when an import is resumed."""
        return [(name, path.stat().st_size if path else -1) for name, path in zip(self.names, self.paths, strict=True)]

    def read(self, rows: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray, dict[int, str]]]:
        """Read the images of `rows`, each stack once and in its order, at most `batch` at a time.

        Particles come out white on dark. Yields positions in `rows`, float32 images (n, D, D), and place in
        this batch -> reason where an image could not be read.
        """
        order = np.lexsort((self.index[rows], self.stack[rows]))
        ends = np.flatnonzero(np.diff(self.stack[rows][order])) + 1
        for of_stack in np.split(order, ends) if len(rows) else ():
            path = self.paths[self.stack[rows[of_stack[0]]]]
            assert path is not None, "rows without a stack are in `absent`"
            stack = _open(path)
            for start in range(0, len(of_stack), batch):
                positions = of_stack[start : start + batch]
                images, unread = _read(stack, self.index[rows[positions]], self.box_px)
                images[self.sign[rows[positions]] < 0] *= -1
                yield positions, images, unread


def find(particles: Particles, source: Path, *, root: Path | None = None, skip_missing: bool = False) -> Sources:
    """Find the stacks of `particles`, read from the file `source`, and check every row against their headers.

    A relative path is looked for under `root` or, without one, in the directory of `source` and in those
    above it (a project's root). Rows of a stack that cannot be read, or that is shorter than its header says,
    are absent. Raises InputError, naming the first rows, for stacks that are not there and for images past a
    stack's end (with `skip_missing` these are absent too), and for images that are not all squares of the
    size that the optics table says.
    """
    names, stack = np.unique(particles["image_path"], return_inverse=True)
    folders = [root] if root else [source.absolute().parent, *source.absolute().parent.parents]
    paths = tuple(_resolve(name, folders) for name in names.tolist())
    index = particles["image_index"]
    order = np.argsort(stack, kind="stable")
    rows_of = np.split(order, np.flatnonzero(np.diff(stack[order])) + 1) if len(stack) else []
    absent: dict[int, str] = {}
    missing: dict[int, str] = {}
    first: mrc.Stack | None = None
    for name, path, rows in zip(names.tolist(), paths, rows_of, strict=True):
        if path is None:
            reason = f"stack {name!r} is not there" if name else "no image named"
            missing.update(dict.fromkeys(rows.tolist(), reason))
            continue
        opened = _open(path)
        if isinstance(opened, str):
            absent.update(dict.fromkeys(rows.tolist(), opened))
            continue
        first = first or opened
        _check_box(source, particles, rows, path, opened, first)
        for row in rows[index[rows] >= opened.n].tolist():
            missing[row] = f"image {index[row] + 1} of {path}, which has {opened.n}"
        for row in rows[(index[rows] >= opened.readable) & (index[rows] < opened.n)].tolist():
            absent[row] = f"stack is truncated: it has {opened.readable} of {opened.n} images"
    if missing and not skip_missing:
        raise InputError(_explain_missing(source, missing, folders))
    absent |= missing
    if first is None:
        raise InputError("\n".join([f"{source}: none of its {len(particles)} images can be read:", *summarise(absent)]))
    return Sources(
        tuple(names.tolist()),
        paths,
        stack,
        index,
        particles.columns.get("image_sign", np.ones(len(particles), np.int8)),
        dict(sorted(absent.items())),
        first.shape[0],
        first.voxel_size_A,
    )


def defects(images: np.ndarray, dtype: str = "float32", scale: float = 1.0) -> dict[int, str]:
    """Which of `images`, float32 (n, D, D), cannot be kept: position -> reason.

    NaN, infinite or constant; and, for dtype float16, grey values that float16 cannot hold once divided by
    `scale`.
    """
    low = images.min(axis=(1, 2)).astype(np.float64)
    high = images.max(axis=(1, 2)).astype(np.float64)
    found = {}
    for place in np.flatnonzero(~(np.isfinite(low) & np.isfinite(high)) | (low == high)).tolist():
        if np.isnan(low[place]):
            found[place] = f"{np.count_nonzero(np.isnan(images[place]))} pixels are NaN"
        elif low[place] == high[place]:
            found[place] = f"constant, every pixel is {low[place]:g}"
        else:
            found[place] = f"{np.count_nonzero(np.isinf(images[place]))} pixels are infinite"
    if dtype != "float16":
        return found
    size = np.maximum(np.abs(low), np.abs(high)) / scale
    for place in np.flatnonzero(size > FLOAT16_LARGEST).tolist():
        found.setdefault(place, f"pixel of {size[place] * scale:g} is too large for float16, not for float32")
    with np.errstate(invalid="ignore"):
        span = (high - low) / scale
    faint = (span < FLOAT16_SMALLEST_RANGE) | (span < FLOAT16_SMALLEST_CONTRAST * size)
    for place in np.flatnonzero(faint).tolist():
        found.setdefault(
            place, f"{low[place]:g} to {high[place]:g} is too little contrast for float16, not for float32"
        )
    return found


def float16_scale(sources: Sources) -> float:
    """The power of two to divide all images by so that float16 holds them, 1 wherever that does.

    From the root mean square of up to 128 images spread over the rows. Raises InputError where the mean is so
    large against the standard deviation that float16 would round the picture away.
    """
    rows = np.setdiff1d(np.arange(len(sources.stack)), np.fromiter(sources.absent, np.int64))
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_IMAGES)).astype(np.int64)]
    means, deviations = [], []
    for _, images, unread in sources.read(rows, batch=1):
        if not unread and not defects(images):
            means.append(abs(images.mean(dtype=np.float64)))
            deviations.append(images.std(dtype=np.float64))
    if not means:
        return 1.0
    offset = float(np.median(np.divide(means, deviations)))
    if offset > FLOAT16_LARGEST_OFFSET:
        raise InputError(
            f"{sources.names[0]}: the images' mean is {offset:.0f} times their standard deviation, which float16 "
            "would round away; normalise the images, or give --dtype float32"
        )
    size = float(np.median(np.hypot(means, deviations)))
    return 1.0 if 1 / 16 <= size <= 16 else float(2.0 ** np.round(np.log2(size)))


def _resolve(name: str, folders: Sequence[Path]) -> Path | None:
    if not name:
        return None
    candidates = [folder / name for folder in folders]  # an absolute name stays as it is
    try:
        return next((path for path in candidates if path.is_file()), None)
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL in it
        return None


def _open(path: Path) -> mrc.Stack | str:
    """The stack, or why it cannot be read."""
    try:
        return mrc.open_stack(path)
    except (InputError, OSError) as error:
        return f"stack cannot be read: {error}"


def _read(stack: mrc.Stack | str, indices: np.ndarray, box_px: int) -> tuple[np.ndarray, dict[int, str]]:
    """Images at `indices`, and place -> reason of those that could not be read, which are zeros."""
    images = np.zeros((len(indices), box_px, box_px), np.float32)
    if isinstance(stack, str):
        return images, dict.fromkeys(range(len(indices)), stack)
    try:
        return stack.read(indices), {}
    except (InputError, OSError):
        unread = {}
    for place in range(len(indices)):
        try:
            images[place] = stack.read(indices[place : place + 1])[0]
        except (InputError, OSError) as error:
            unread[place] = f"image cannot be read: {error}"
    return images, unread


def _check_box(
    source: Path, particles: Particles, rows: np.ndarray, path: Path, stack: mrc.Stack, first: mrc.Stack
) -> None:
    ny, nx = stack.shape
    if ny != nx:
        raise InputError(f"{path}: images of {nx} x {ny} pixels; dcryo needs square ones, extract them again")
    if "box_px" in particles.optics:
        said = particles.optics["box_px"][particles["optics_row"][rows]]
        wrong = np.flatnonzero(said != nx)
        if len(wrong):
            raise InputError(
                f"{source}, row {rows[wrong[0]] + 1}: its optics group says images of {said[wrong[0]]} pixels, but "
                f"those of {path} have {nx}; correct the optics table"
            )
    if nx != first.shape[1]:
        raise InputError(
            f"{source}, row {rows[0] + 1}: images of {path} have {nx} pixels, those before it {first.shape[1]}; "
            "a store holds one size: import each in its own, or rescale"
        )


def summarise(reasons: Mapping[int, str]) -> list[str]:
    """Lines that name rows (counted from 1) by reason, the first few: `row 7 and 12 more: REASON`."""
    rows_of: dict[str, list[int]] = {}
    for row, reason in sorted(reasons.items()):
        rows_of.setdefault(reason, []).append(row)
    lines = []
    for reason, rows in list(rows_of.items())[:LISTED]:
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        lines.append(f"  row {rows[0] + 1}{more}: {reason}")
    if len(rows_of) > LISTED:
        left = sum(len(rows) for rows in list(rows_of.values())[LISTED:])
        lines.append(f"  and {left} rows more, for other reasons")
    return lines


def _explain_missing(source: Path, missing: dict[int, str], folders: Sequence[Path]) -> str:
    where = f"{folders[0]} and the directories above it" if len(folders) > 1 else str(folders[0])
    return "\n".join(
        [
            f"{source}: {len(missing)} of its rows name images that are not there (looked for in {where}):",
            *summarise(missing),
            "  give --root DIR if the stacks are elsewhere, or --skip-missing to import the others",
        ]
    )
