"""Particles cut out of micrographs into a store: the job ``extract``."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from dcryo.cluster import check_kind, connect
from dcryo.data import gathered, micrographs, star
from dcryo.data.atomic import replacing
from dcryo.data.coordinates import read_coordinates
from dcryo.data.gathered import Part
from dcryo.data.items import ITEMS, Found, Item, arrays_of, committed
from dcryo.data.particles import Particles, identities
from dcryo.data.picks import Picked, Picks, read_picks
from dcryo.data.run import Run
from dcryo.data.schema import PARTICLE_FIELDS
from dcryo.data.stacks import defects, summarise
from dcryo.data.star_syntax import parse
from dcryo.data.star_table import Table
from dcryo.data.store import ImageType, Store
from dcryo.errors import InputError, RunError
from dcryo.jobs.micrographs import WatchOptions, flagged, named, work_through
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, argument
from dcryo.kernels import boxes
from dcryo.kernels.filters import rescale_images
from dcryo.steps import extraction
from dcryo.steps.extraction import Boxing

TABLE = "particles.star"
STORES = ("particles.zarr", "particles_small.zarr")
"""Of the whole boxes, and of the small ones."""

_MERIT = "rlnAutopickFigureOfMerit"
_X = PARTICLE_FIELDS["coordinate_px"].star[0]
_DEFAULT_DIAMETER = 0.75
"""Share of the box that the particle is taken to fill where the user does not say."""
_EXAMPLES, _EXAMPLE_PX = 12, 64


class ExtractOptions(OutOptions, ClusterOptions, WatchOptions):
    """Cut particles out of micrographs, into a store.

    Writes particles.zarr, the store, and particles.star; with --small-box particles_small.zarr too, the same particles
    in fewer pixels. The order is that of the micrographs in PICKS and of the picks in their files. The stores are made
    when all micrographs are done; with --watch, when it is told to stop. Until then, and whenever more picks are added
    with --resume, there has to be room for the particles twice.
    """

    picks: Path = argument(
        "STAR file: picks.star of dcryo pick; RELION's list of coordinate files; or particles with their coordinates, "
        "to extract again"
    )
    micrographs: Path | None = Field(
        None, description="STAR file of the micrographs with their CTF, where PICKS does not have it"
    )
    box_px: int = Field(gt=0, le=8192, description="side of the boxes, in pixels of the micrograph")
    scale_px: int | None = Field(None, ge=8, description="side that the boxes are scaled down to")
    small_box_px: int | None = Field(None, ge=8, description="side of a second, smaller version of the boxes")
    background_diameter_A: float | None = Field(
        None, gt=0, description="diameter of the circle outside of which is background (default: 0.75 of the box)"
    )
    normalise: bool = Field(True, description="subtract a plane and give the background mean 0 and deviation 1")
    invert: bool = Field(True, description="turn dark particles white")
    white_dust_sd: float | None = Field(
        None, gt=0, description="replace pixels so many standard deviations above the background by noise"
    )
    black_dust_sd: float | None = Field(None, gt=0, description="the same of pixels below it")
    edge: Literal["leave_out", "replicate"] = Field(
        "leave_out", description="of boxes that are partly outside: leave them out, or repeat the pixels at the edge"
    )
    min_distance_A: float | None = Field(
        None, gt=0, description="leave out picks nearer than this to one of a higher figure of merit"
    )
    recenter: bool = Field(False, description="move boxes to the refined centres, of particles with origins")
    recenter_at_A: tuple[float, float, float] | None = Field(
        None, description="move them to this point of the map (x y z from its centre), of particles with poses"
    )
    keep_flagged: bool = Field(False, description="take particles from flagged micrographs too")
    dtype: ImageType = Field("float16", description="how images are kept")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("scale_px", "small_box_px"):
            size = getattr(self, name)
            if size is not None and size > self.box_px:
                raise ValueError(f"{name} {size}: expected at most the box of {self.box_px} px; nothing is gained")
        if not self.normalise:
            if self.dtype == "float16":
                raise ValueError("without normalisation grey values may have any size: give --dtype float32")
            if self.white_dust_sd or self.black_dust_sd:
                raise ValueError("dust is told by the deviation of the background, so it goes with normalisation only")
        return self

    @property
    def sizes_px(self) -> tuple[int, ...]:
        """Sides of the images of each store."""
        sizes = (self.scale_px or self.box_px,)
        return sizes + ((self.small_box_px,) if self.small_box_px else ())


@dataclass(frozen=True)
class ExtractResult:
    """out: the run directory. store, small: what was made. left_out: picks without an image. flagged: micrographs that
    were not used."""

    out: Path
    store: Store
    small: Store | None
    left_out: int
    flagged: int

    def summary(self) -> str:
        lines = [f"{self.store.path}: {self.store.n} particles, box {self.store.box_px} px"]
        if self.small is not None:
            lines.append(f"{self.small.path}: the same, box {self.small.box_px} px")
        if self.left_out:
            reasons = {int(left["row"]) - 1: str(left["reason"]) for left in self.store.quarantined}
            lines += [f"{self.left_out} picks left out:", *summarise(reasons)]
        if self.flagged:
            lines.append(f"{self.flagged} micrographs were not used; run.json says why")
        return "\n".join(lines)


def extract(options: ExtractOptions, *, progress: Progress = print) -> ExtractResult:
    """Extract; see `ExtractOptions`. InputError for bad input, before work starts; RunError where no particle is left.

    A run that goes on does the micrographs that are not done, or whose picks have changed, and makes the stores anew
    if that changes them: to the same bits as one run over all of it.
    """
    check_kind(options.cluster)
    reader = _Reader(options)
    reader.check()
    with (
        Run.start(
            options.out, "extract", options.model_dump(), resume=options.resume, overwrite=options.overwrite,
            growing=True,
        ) as run,
        connect(options.cluster, options.workers) as cluster,
    ):  # fmt: skip
        (run.path / ITEMS).mkdir(exist_ok=True)
        _forget_lost(run.path, reader.wanted(), len(options.sizes_px))
        if options.watch:
            progress(f"watching {options.picks}; the store is made when there is a file {run.path / 'stop'}")
        found = work_through(
            run, reader.wanted, extract_micrograph, (options, run.path), cluster, options.watch,
            lambda found: run.flag(flagged(found | reader.left_aside())), progress,
        )  # fmt: skip
        picks = reader.read()
        done = [
            item
            for item in picks.items
            if item.name in found and not found[item.name].flag and not reader.reason_against(item)
        ]
        particles, left_out = _table(run.path, picks, done, found, progress)
        stores = [
            gathered.gather(
                run.path / name, run.path / ITEMS, _parts(run.path, number, done, found),
                _with_optics(particles, options, number), left_out, options.dtype, {"file": str(options.picks)},
                progress,
            )
            for number, name in enumerate(STORES[: len(options.sizes_px)])
        ]  # fmt: skip
        star.write_particles(run.path / TABLE, _with_optics(particles, options, 0))
        for item in done:
            for number in range(len(stores)):
                _boxes_file(run.path, item.name, number).unlink(missing_ok=True)
        unused = flagged(found | reader.left_aside())
        run.flag(unused)
        run.done(
            {
                "particles": stores[0].n,
                "left_out": len(left_out),
                "micrographs": len(done),
                "flagged": len(unused),
                "box_px": stores[0].box_px,
                "pixel_size_A": stores[0].pixel_size_A,
            }
        )
    return ExtractResult(options.out, stores[0], stores[1] if len(stores) > 1 else None, len(left_out), len(unused))


class _Reader:
    """The picks as they are by now, read again where one of their files has changed."""

    def __init__(self, options: ExtractOptions) -> None:
        self._options = options
        self._paths = [options.picks, *([options.micrographs] if options.micrographs else [])]
        self._seen: list[str] = []
        self._picks = Picks()

    def check(self) -> None:
        """InputError for what can be known to be wrong before any micrograph is read."""
        out = self._options.out.resolve()
        for path in self._paths:
            if out in path.resolve().parents:
                raise InputError(f"{path}: lies in {self._options.out}, whose files are this run's own; change --out")
        recentring = {
            "origin_A": self._options.recenter or self._options.recenter_at_A is not None,
            "rotation": self._options.recenter_at_A is not None,
        }
        for item in self.read().items:
            for name, wanted in recentring.items():
                if wanted and name not in item.columns:
                    labels = ", ".join(PARTICLE_FIELDS[name].star)
                    raise InputError(f"{self._options.picks}: has no {labels}; recentring takes refined particles")
            _boxing(self._options, item.pixel_size_A)

    def read(self) -> Picks:
        """The picks, their micrographs named."""
        seen = [Item("", path).fingerprint() for path in self._paths]
        if seen == self._seen or (self._options.watch and not all(seen)):
            return self._picks  # unchanged, or the job before this one has not written it yet
        try:
            picks = read_picks(self._options.picks, self._options.micrographs)
        except InputError:
            if not self._options.watch or not self._seen:
                raise
            return self._picks  # while another program writes it, it may be half a file
        names = named(item.source for item in picks.items)
        if len(names) < len(picks.items):
            raise InputError(f"{self._options.picks}: names a micrograph twice, in two ways; expected each once")
        items = [replace(item, name=one.name) for item, one in zip(picks.items, names, strict=True)]
        self._picks, self._seen = replace(picks, items=tuple(items)), seen
        return self._picks

    def wanted(self) -> list[Picked]:
        """The micrographs to work on."""
        return [item for item in self.read().items if not self.reason_against(item)]

    def left_aside(self) -> dict[str, Found]:
        """The others, as found to be flagged."""
        return {item.name: Found({}, flag=why) for item in self.read().items if (why := self.reason_against(item))}

    def reason_against(self, item: Picked) -> str:
        """Why a micrograph is not to be worked on, empty where it is."""
        if self._options.watch and not item.source.is_file():
            return f"{item.source}: is not there"  # it may come yet
        return "" if self._options.keep_flagged else item.flag


def _read_coordinates(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Picks of one micrograph: columns of the schema, and the others as text, which only a STAR file has."""
    if path.suffix != ".star":
        return {"coordinate_px": read_coordinates(path).coordinate_px}, {}
    blocks = parse(path)
    name = next((name for name, block in blocks.items() if _X in block.columns), None)
    if name is not None:
        table = Table(f"{path}, data_{name}", blocks[name])
        columns = table.plain_fields(PARTICLE_FIELDS)
        if "coordinate_px" in columns:
            columns.pop("micrograph", None)
            table.drop(("rlnImageName", "rlnOpticsGroup"))
            return columns, table.rest()
    elif all(len(block) == 0 for block in blocks.values()):
        return {"coordinate_px": np.zeros((0, 2))}, {}  # RELION's way to say that there is nothing
    raise InputError(f"{path}: no table has the columns _{_X} and _rlnCoordinateY; expected coordinates")


# One micrograph.


def extract_micrograph(item: Picked, options: ExtractOptions, out: Path) -> Found:
    """The task: boxes of a micrograph into files beside its record.

    Found are how many there are, the columns of those that have an image (`columns/NAME`, `extra/LABEL`), picks that
    have none (`left_out/row`, from 0, `left_out/image` and `left_out/reason`), and some examples. InputError where the
    micrograph or its picks cannot be used.
    """
    stamp = item.fingerprint()
    columns, extra = _picks_of(item, options)
    micrograph = micrographs.read_image(item.source)
    _refuse_empty(item.source, micrograph)
    boxing = _boxing(options, item.pixel_size_A)
    centre_px = boxes.centres(columns["coordinate_px"])
    left_out = extraction.outside(centre_px, micrograph.shape, boxing)
    rows = _but(len(centre_px), left_out)
    if options.min_distance_A is not None:
        apart = boxes.apart(*_places(item, columns, extra, rows), options.min_distance_A / item.pixel_size_A)
        reason = f"nearer than {options.min_distance_A:g} A to one with a higher figure of merit"
        left_out |= dict.fromkeys(rows[~apart].tolist(), reason)
        rows = rows[apart]
    names = _image_names(item.micrograph, centre_px, micrograph.shape[1])
    files = [_boxes_file(out, item.name, number) for number in range(len(boxing.sizes_px))]
    made = extraction.extract(micrograph, centre_px, rows, identities(names), boxing)
    bad, examples = _write(files, made, options.dtype)
    left_out |= bad
    kept = _but(len(centre_px), left_out)
    arrays = {f"columns/{name}": values[kept] for name, values in columns.items()}
    arrays |= {f"columns/{name}": names[name][kept] for name in ("image_path", "image_index")}
    arrays |= {f"extra/{label}": values[kept] for label, values in extra.items()}
    if left_out:
        left = np.array(sorted(left_out))
        places = [f"{item.micrograph} at {x:g}, {y:g}" for x, y in columns["coordinate_px"][left].tolist()]
        arrays["left_out/row"], arrays["left_out/image"] = left, np.array(places)
        arrays["left_out/reason"] = np.array([left_out[row] for row in left.tolist()])
    if len(examples):
        arrays["examples"] = examples
    return Found({"particles": len(kept), "left_out": len(left_out), "stamp": stamp}, arrays)


def _picks_of(item: Picked, options: ExtractOptions) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Columns of the schema and other ones, as text, of the picks; about refined centres if that is asked for."""
    if item.picks is not None:
        return _read_coordinates(item.picks)
    columns, point_A = dict(item.columns), options.recenter_at_A
    if options.recenter or point_A is not None:
        columns["coordinate_px"], origin_px = extraction.recentred(
            columns["coordinate_px"],
            columns["origin_A"] / item.pixel_size_A,
            columns.get("rotation"),
            None if point_A is None else np.array(point_A) / item.pixel_size_A,
        )
        columns["origin_A"] = origin_px * item.pixel_size_A
    return columns, dict(item.extra)


def _write(
    files: Sequence[Path], made: Iterable[extraction.Boxes], dtype: ImageType
) -> tuple[dict[int, str], np.ndarray]:
    """Write the images of each size into its file, but for those that cannot be kept; those, row -> reason, and a few
    examples, small."""
    left_out: dict[int, str] = {}
    examples: list[np.ndarray] = []
    with ExitStack() as opened:
        streams = [opened.enter_context(replacing(file)) for file in files]
        for batch in made:
            bad = dict(batch.left_out)
            for images in batch.images:
                bad = defects(images, dtype) | bad
            left_out |= {int(batch.rows[place]): reason for place, reason in bad.items()}
            good = _but(len(batch.rows), bad)
            for stream, images in zip(streams, batch.images, strict=True):
                stream.write(images[good].astype(dtype).data)
            examples += list(batch.images[-1][good[: _EXAMPLES - len(examples)]])
    if not examples:
        return left_out, np.empty(0)
    shown = np.stack(examples)
    return left_out, rescale_images(shown, min(_EXAMPLE_PX, shown.shape[-1])).astype(np.float16)


def _but(n: int, left_out: Mapping[int, str]) -> np.ndarray:
    """The rows from 0 to n - 1 that are not left out."""
    return np.setdiff1d(np.arange(n), np.fromiter(left_out, np.int64, len(left_out)))


def _boxing(options: ExtractOptions, pixel_size_A: float) -> Boxing:
    width_A = options.box_px * pixel_size_A
    diameter_A = options.background_diameter_A or _DEFAULT_DIAMETER * width_A
    if options.normalise and diameter_A >= width_A:
        raise InputError(
            f"--background-diameter {diameter_A:g}: expected less than the box, which is {width_A:g} A wide; give a "
            "larger box"
        )
    return Boxing(
        options.box_px, options.sizes_px, diameter_A / pixel_size_A if options.normalise else None, options.invert,
        options.white_dust_sd, options.black_dust_sd, whole=options.edge == "leave_out",
    )  # fmt: skip


def _refuse_empty(path: Path, micrograph: np.ndarray) -> None:
    low, high = float(micrograph.min()), float(micrograph.max())
    if not math.isfinite(low) or not math.isfinite(high):
        finite = micrograph[np.isfinite(micrograph)]
        if not len(finite):
            raise InputError(f"{path}: none of its pixels is finite; make the micrograph anew")
        low, high = float(finite.min()), float(finite.max())
    if low == high:
        raise InputError(f"{path}: every pixel is {low:g}; make the micrograph anew")


def _places(
    item: Picked, columns: Mapping[str, np.ndarray], extra: Mapping[str, np.ndarray], rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the particles of `rows` are, (n, 2) pixels, and their figures of merit, (n,): all alike without any."""
    place_px = columns["coordinate_px"][rows]
    if "origin_A" in columns:
        place_px = place_px - columns["origin_A"][rows] / item.pixel_size_A
    if _MERIT not in extra:
        return place_px, np.zeros(len(rows))
    try:
        return place_px, extra[_MERIT][rows].astype(np.float64)
    except ValueError as error:
        raise InputError(f"{item.picks or item.micrograph}: _{_MERIT}: {error}; expected numbers") from error


def _image_names(micrograph: str, centre_px: np.ndarray, nx: int) -> Particles:
    """What tells an image from others, in the particles of a micrograph of `nx` columns: the micrograph and the number
    of the pixel that the box is centred on. Extracted again, in a box of another size, a particle is the same."""
    n = len(centre_px)
    number = np.maximum(centre_px[:, 1] * nx + centre_px[:, 0], 0)
    return Particles(
        {"image_path": np.full(n, micrograph), "image_index": number, "optics_row": np.zeros(n)}, {"group": np.ones(1)}
    )


def _boxes_file(out: Path, name: str, number: int) -> Path:
    """Images of a micrograph on their way to store `number`: one after the other, in the stored type."""
    return out / ITEMS / f"{name}.{('boxes', 'small')[number]}"


def _table(
    out: Path, picks: Picks, done: Sequence[Picked], found: Mapping[str, Found], progress: Progress
) -> tuple[Particles, list[dict[str, Any]]]:
    """The particles of all micrographs, one after the other, and what was left out, rows counted over both from 1."""
    parts: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
    left_out: list[dict[str, Any]] = []
    before = 0
    for item in done:
        arrays = arrays_of(out, item.name)
        n = int(found[item.name].values["particles"])
        for row, image, reason in zip(
            *(arrays.get(f"left_out/{key}", np.empty(0)).tolist() for key in ("row", "image", "reason")), strict=True
        ):
            left_out.append({"row": before + row + 1, "image": image, "reason": reason})
        before += n + int(found[item.name].values["left_out"])
        if not n:
            continue
        columns, extra = (
            {key.partition("/")[2]: values for key, values in arrays.items() if key.startswith(kind)}
            for kind in ("columns/", "extra/")
        )
        if len(columns.get("image_index", ())) != n:
            raise RunError(f"{out / ITEMS / item.name}.npz: is damaged; remove it and its .json, go on with --resume")
        columns = {key: np.repeat(all_[item.row], n, axis=0) for key, all_ in picks.shared.items()} | columns
        extra = {key: np.repeat(all_[item.row], n) for key, all_ in picks.shared_extra.items()} | extra
        parts.append((columns, extra))
    if not parts:
        reasons = [f"; the first of {len(left_out)} picks left out: {left_out[0]['reason']}"] if left_out else []
        raise RunError(f"{out}: no particle was extracted{''.join(reasons)}")
    columns, extra = (_joined([part[kind] for part in parts], progress) for kind in (0, 1))
    return Particles(columns, dict(picks.optics), extra, dict(picks.optics_extra)), left_out


def _joined(parts: Sequence[Mapping[str, np.ndarray]], progress: Progress) -> dict[str, np.ndarray]:
    """The columns that all parts have, one part after the other."""
    common = [name for name in parts[0] if all(name in part for part in parts)]
    dropped = sorted({name for part in parts for name in part} - set(common))
    if dropped:
        progress(f"left out, since not all picks have them: {', '.join(dropped)}")
    return {name: np.concatenate([part[name] for part in parts]) for name in common}


def _with_optics(particles: Particles, options: ExtractOptions, number: int) -> Particles:
    """The particles of store `number`."""
    size = options.sizes_px[number]
    pixel_sizes_A = particles.optics["micrograph_pixel_size_A"] * (options.box_px / size)
    return particles.replace_optics(pixel_size_A=pixel_sizes_A, box_px=np.full(particles.n_groups, size))


def _parts(out: Path, number: int, done: Iterable[Picked], found: Mapping[str, Found]) -> list[Part]:
    """Where the images of store `number` are."""
    parts = []
    for item in done:
        values = found[item.name].values
        if values["particles"]:
            file = _boxes_file(out, item.name, number)
            parts.append(Part(item.micrograph, values["particles"], file, values["stamp"]))
    return parts


def _forget_lost(out: Path, items: Iterable[Picked], n_stores: int) -> None:
    """Micrographs whose images are neither in files nor in the stores, as after one was removed, are done again."""
    known = []
    for name in STORES[:n_stores]:
        gathered.settle(out / name, out / ITEMS)
        known.append(gathered.rows_of_micrographs(out / name))
    for item in items:
        found = committed(out, item)
        n = 0 if found is None else found.values.get("particles", 0)
        for number, rows in enumerate(known):
            if n and rows.get(item.micrograph, (0, 0))[1] != n and not _boxes_file(out, item.name, number).is_file():
                (out / ITEMS / f"{item.name}.json").unlink(missing_ok=True)
