"""Movies to micrographs: motion correction, weighting by dose and summing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dcryo.cluster import check_kind, connect
from dcryo.data import micrographs, movies, mrc
from dcryo.data.items import Found, Item, committed
from dcryo.data.motion import MotionFile, write_motion
from dcryo.data.particles import Micrographs
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.micrographs import WatchOptions, flagged, named, work_through
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, argument
from dcryo.kernels.detector import orient_gain
from dcryo.kernels.motion import local_shift_px
from dcryo.steps import movie as step
from dcryo.steps.movie import Corrected, MovieSettings

TABLE, GAIN = "micrographs.star", "gain.mrc"
_EARLY_E_A2 = 4.0
_LOOKED_AT = 5
"""As many movies say how many frames the movies of a run have, where --frames does not."""


class MotionOptions(OutOptions, ClusterOptions, WatchOptions):
    """Align the frames of movies, weight them by dose and sum them to micrographs.

    Writes per movie NAME.mrc (the micrograph) and NAME.star (its motion, as RELION holds it), and micrographs.star.
    """

    movies: tuple[str, ...] = argument(
        "movies (MRC, TIFF, EER), directories of them, patterns such as 'raw/*.tif', or RELION's movies.star"
    )
    gain: Path | None = Field(None, description="gain reference (MRC, TIFF, .gain); 0 marks a dead pixel")
    gain_rotate: int = Field(0, ge=0, le=3, description="quarter turns of the gain, clockwise, as in RELION")
    gain_flip: Literal["none", "x", "y"] = Field(
        "none", description="flip of the gain after that: x is left to right, y upside down (RELION's 2 and 1)"
    )
    defects: Path | None = Field(None, description="bad pixels: rows of x y width height, or an image that is 1 there")
    pixel_size_A: float | None = Field(None, gt=0, description="of the movies (default: what their header says)")
    voltage_kV: float | None = Field(None, gt=0, description="acceleration voltage (default: 300)")
    spherical_aberration_mm: float | None = Field(None, ge=0, description="for the table (default: 2.7)")
    amplitude_contrast: float | None = Field(None, ge=0, lt=1, description="for the table (default: 0.1)")
    dose_per_frame_e_A2: float | None = Field(None, gt=0, description="exposure of a frame")
    pre_dose_e_A2: float = Field(0.0, ge=0, description="exposure before the first frame")
    frames: int | None = Field(None, gt=1, description="frames of a movie (default: what most of the first have)")
    eer_fraction: int | None = Field(None, gt=0, description="raw frames of EER movies that make one frame")
    bin: float = Field(1.0, ge=1, le=8, description="how much larger the micrographs' pixels are than the movies'")
    patches: tuple[int, ...] = Field((5, 5), description="patches along a side, or along x and y, as in 5 or 7,5")
    bfactor_A2: float = Field(150.0, ge=0, description="B factor that correlations are weighted by")
    dose_weighting: bool = Field(True, description="weight the frames by the damage done")
    save_unweighted: bool = Field(False, description="also write NAME_noDW.mrc, the sum without weights")
    save_odd_even: bool = Field(False, description="also write NAME_odd.mrc and NAME_even.mrc, of every other frame")
    dtype: Literal["float32", "float16"] = Field("float32", description="number type of the micrographs")


@dataclass(frozen=True)
class MotionResult:
    """micrographs: how many there are; flagged: movies that gave none."""

    out: Path
    micrographs: int
    flagged: int
    motion_A: float | None

    def summary(self) -> str:
        moved = "" if self.motion_A is None else f", which moved by {self.motion_A:.1f} A (median)"
        bad = f"; {self.flagged} movies are flagged, see run.json" if self.flagged else ""
        return f"{self.out / TABLE}: {self.micrographs} micrographs{moved}{bad}"


@dataclass(frozen=True)
class MovieItem(Item):
    """A movie, its optics, and how many frames are expected, None where that is not known."""

    pixel_size_A: float
    voltage_kV: float
    frames: int | None


@dataclass(frozen=True)
class _Work:
    """What is the same for every movie. out: the run directory; gain_path: as the motion's files name it."""

    out: Path
    options: MotionOptions
    gain_path: Path | None

    def settings(self, item: MovieItem) -> MovieSettings:
        options = self.options
        return MovieSettings(
            key=item.name, pixel_size_A=item.pixel_size_A, voltage_kV=item.voltage_kV,
            exposure_e_A2=options.dose_per_frame_e_A2, before_e_A2=options.pre_dose_e_A2, bin=options.bin,
            patches=(options.patches[0], options.patches[-1]), bfactor_A2=options.bfactor_A2,
            weighted=options.dose_weighting, unweighted=options.save_unweighted, odd_even=options.save_odd_even,
        )  # fmt: skip


def motion(options: MotionOptions, *, progress: Progress = print) -> MotionResult:
    """Correct movies; see `MotionOptions`. InputError for bad input, before work starts; a bad movie is flagged."""
    check_kind(options.cluster)
    _refuse(options)
    source = _Source(options)
    if not options.watch and not source.table():
        raise InputError(f"{', '.join(options.movies)}: no movies there; expected files ending in {_endings()}")
    inputs = [path for path in (options.gain, options.defects) if path is not None]
    run = Run.start(
        options.out, "motion", options.model_dump(), inputs, None, options.resume, options.overwrite, growing=True
    )
    with run, connect(options.cluster, options.workers) as cluster:
        progress(f"motion correction on {cluster.description}")
        work = _Work(run.path, options, _named_gain(options, run.path))

        def told(found: Mapping[str, Found]) -> None:
            _write_table(run.path, source, found, options)
            run.flag(flagged(found))

        found = work_through(
            run, lambda: source.items(run.path), correct_movie, (work,), cluster, options.watch, told, progress
        )
        good = [one.values for one in found.values() if not one.flag]
        moved = float(np.median([values["motion_total_A"] for values in good])) if good else None
        run.done({"micrographs": len(good), "flagged": len(found) - len(good), "motion_A": moved})
    return MotionResult(options.out, len(good), len(found) - len(good), moved)


def _refuse(options: MotionOptions) -> None:
    if options.dose_weighting and options.dose_per_frame_e_A2 is None:
        raise InputError("--dose-per-frame is missing, which the weights need; give it, or --no-dose-weighting")
    if len(options.patches) not in (1, 2) or min(options.patches) < 1:
        raise InputError(f"--patches {options.patches}: expected one number or two, each 1 or more")
    for path in (options.gain, options.defects):
        if path is not None and not path.is_file():
            raise InputError(f"{path}: not a file that can be read; correct --gain or --defects")
    if options.gain is not None:
        movies.read_gain(options.gain, for_eer=False)
    elif options.gain_rotate or options.gain_flip != "none":
        raise InputError("--gain-rotate and --gain-flip are of no use without --gain; give it or leave them out")


def _endings() -> str:
    return ", ".join(movies.SUFFIXES)


class _Source:
    """The movies as they are named on the command line; looked for anew at every call, since more may have come."""

    def __init__(self, options: MotionOptions) -> None:
        self._options = options
        self._star = next((Path(word) for word in options.movies if Path(word).suffix == ".star"), None)
        if self._star is not None and len(options.movies) > 1:
            raise InputError(f"{self._star}: is a STAR file of movies and stands alone; give it, or movies")
        self._own_optics: dict[str, np.ndarray] | None = None
        self._frames: int | None = options.frames

    def paths(self) -> list[Path]:
        """Files of movies; of a STAR file in its order, others by name."""
        if self._star is not None:
            table = movies.read_movies(self._star)
            return [micrographs.find(name, self._star) for name in table["movie_path"].tolist()]
        found: dict[Path, None] = {}
        for word in self._options.movies:
            path = Path(word)
            if path.is_dir():
                there = [one for one in path.iterdir() if one.suffix.lower() in movies.SUFFIXES]
            elif path.is_file():
                there = [path]
            elif any(letter in word for letter in "*?["):
                there = [one for one in _glob(word) if one.is_file()]
            elif self._options.watch:
                there = []
            else:
                raise InputError(f"{path}: no such file, directory or pattern; correct it")
            found |= dict.fromkeys(sorted(there))
        return list(found)

    def table(self) -> Micrographs | None:
        """A row for every movie, named by it, with its optics; None where there is none yet."""
        paths = self.paths()
        if not paths:
            return None
        names = np.array([str(path) for path in paths])
        if self._star is not None:
            return self._from_star(names)
        if self._own_optics is None:
            self._own_optics = self._optics_of_files(paths)
        return Micrographs(
            {"path": names, "movie_path": names, "optics_row": np.zeros(len(names))}, self._own_optics
        )  # fmt: skip

    def _from_star(self, names: np.ndarray) -> Micrographs:
        assert self._star is not None
        options, table = self._options, movies.read_movies(self._star)
        given = ", ".join(name for name in ("pixel_size_A", *_DEFAULTS) if getattr(options, name) is not None)
        if given:
            raise InputError(f"{self._star}: has its own optics; correct them there, and give none ({given})")
        if "micrograph_original_pixel_size_A" not in table.optics or "voltage_kV" not in table.optics:
            raise InputError(f"{self._star}: data_optics lacks rlnMicrographOriginalPixelSize or rlnVoltage; add them")
        return table.replace(path=names, movie_path=names)

    def _optics_of_files(self, paths: Sequence[Path]) -> dict[str, np.ndarray]:
        options = self._options
        size = options.pixel_size_A
        for path in paths:
            if size:
                break
            try:
                size = movies.open_movie(path, options.eer_fraction).pixel_size_A
            except InputError:
                continue
        if not size:
            raise InputError(f"{paths[0]}: the header says no pixel size; give --pixel-size")
        values = {name: getattr(options, name) for name in _DEFAULTS}
        optics = {name: _DEFAULTS[name] if value is None else value for name, value in values.items()}
        optics |= {"group": 1, "micrograph_original_pixel_size_A": size}
        return {name: np.array([value]) for name, value in optics.items()}

    def items(self, run: Path) -> list[MovieItem]:
        table = self.table()
        if table is None:
            return []
        plain = named([Path(name) for name in table["path"].tolist()])
        sizes, voltages = table.optics_of("micrograph_original_pixel_size_A"), table.optics_of("voltage_kV")
        frames = self._expected(run, plain)
        return [
            MovieItem(item.name, item.source, float(size), float(voltage), frames)
            for item, size, voltage in zip(plain, sizes, voltages, strict=True)
        ]

    def _expected(self, run: Path, items: Sequence[Item]) -> int | None:
        """How many frames a movie should have: as the run went before, or as most of the first movies."""
        if self._frames is None:
            before = [found.values["frames"] for item in items if (found := committed(run, item)) and found.values]
            self._frames = before[0] if before else None
        if self._frames is None:
            counts = []
            for item in items[:_LOOKED_AT]:
                try:
                    counts.append(movies.open_movie(item.source, self._options.eer_fraction).n)
                except InputError:
                    continue
            # While a movie is still being written it does not speak for the others.
            if not self._options.watch or len(counts) >= min(_LOOKED_AT, len(items)):
                self._frames = max(counts, key=counts.count) if counts else None
        return self._frames


_DEFAULTS = {"voltage_kV": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1}


def _glob(pattern: str) -> list[Path]:
    path = Path(pattern)
    return list(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))


def _turned(options: MotionOptions, for_eer: bool) -> np.ndarray | None:
    """What frames are multiplied by, as they lie."""
    if options.gain is None:
        return None
    return orient_gain(movies.read_gain(options.gain, for_eer), options.gain_rotate, options.gain_flip)


def _named_gain(options: MotionOptions, out: Path) -> Path | None:
    """The gain reference for the motion's files: the user's, or where that has to be turned, a turned copy.

    The copy is in the sense that RELION takes it in: it divides the frames of EER movies.
    """
    if options.gain is None or (not options.gain_rotate and options.gain_flip == "none"):
        return options.gain
    for_eer = options.eer_fraction is not None
    gain = _turned(options, for_eer)
    assert gain is not None
    if for_eer:
        gain = np.divide(1.0, gain, out=np.zeros_like(gain), where=gain > 0)
    mrc.write_image(out / GAIN, gain, 1.0)
    return out / GAIN


def correct_movie(item: MovieItem, work: _Work) -> Found:
    """The task of one movie: read it, correct it, write its micrograph and its motion."""
    options = work.options
    movie = movies.open_movie(item.source, options.eer_fraction)
    if item.frames is not None and movie.n != item.frames:
        raise InputError(
            f"{movie.path}: has {movie.n} frames, the others of this run {item.frames}; take it out, or say --frames"
        )
    if movie.n < 2:
        raise InputError(f"{movie.path}: has {movie.n} frame; expected a movie of at least 2")
    gain = _turned(options, movies.is_eer(movie.path))
    if gain is not None and gain.shape != movie.shape:
        raise InputError(
            f"{movie.path}: has frames of {movies.size_px(movie.shape)} pixels, the gain {options.gain} "
            f"{movies.size_px(gain.shape)}; give the gain of this detector, turned as the frames are (--gain-rotate)"
        )
    defects = None if options.defects is None else movies.read_defects(options.defects, movie.shape)
    settings = work.settings(item)
    try:
        done = step.correct(movie.frames, movie.n, movie.shape, gain, defects, settings)
    except InputError as error:
        raise error if str(movie.path) in str(error) else InputError(f"{movie.path}: {error}") from error
    _write_products(item, work, movie, done)
    return _found(item, work, movie, done)


def _write_products(item: MovieItem, work: _Work, movie: movies.Movie, done: Corrected) -> None:
    options = work.options
    images = {"": done.micrograph, "_noDW": done.unweighted, "_odd": done.odd, "_even": done.even}
    for ending, image in images.items():
        if image is not None:
            mrc.write_image(work.out / f"{item.name}{ending}.mrc", image, done.pixel_size_A, options.dtype)
    ny, nx = movie.shape
    write_motion(
        work.out / f"{item.name}.star",
        MotionFile(
            movie_path=str(item.source), shape_px=(nx, ny), frame_px=done.motion.frame_px,
            pixel_size_A=item.pixel_size_A, coefficients=done.motion.coefficients if done.motion.terms else None,
            hot_px=done.hot_px.astype(np.float64), gain_path=str(work.gain_path or ""),
            defect_path=str(options.defects or ""), binning=done.pixel_size_A / item.pixel_size_A,
            dose_e_A2=options.dose_per_frame_e_A2 or 0.0, pre_dose_e_A2=options.pre_dose_e_A2,
            voltage_kV=item.voltage_kV, eer_fraction=(options.eer_fraction or 0) if movies.is_eer(movie.path) else 0,
        ),
    )  # fmt: skip


def _found(item: MovieItem, work: _Work, movie: movies.Movie, done: Corrected) -> Found:
    options, track = work.options, done.motion.frame_px
    steps_A = np.linalg.norm(np.diff(track, axis=0), axis=1) * item.pixel_size_A
    dose = options.pre_dose_e_A2 + (options.dose_per_frame_e_A2 or 0.0) * np.arange(2, movie.n + 1)
    early = float(steps_A[dose <= _EARLY_E_A2].sum()) if options.dose_per_frame_e_A2 else 0.0
    total = float(steps_A.sum())
    name = item.name
    values: dict[str, Any] = {
        "path": str(work.out / f"{name}.mrc"),
        "movie_path": str(item.source), "motion_path": str(work.out / f"{name}.star"),
        "motion_total_A": total, "motion_early_A": early, "motion_late_A": total - early, "frames": movie.n,
        "hot_pixels": len(done.hot_px), "shape_px": list(reversed(done.micrograph.shape)),
        "pixel_size_A": done.pixel_size_A, "local_model_terms": len(done.motion.terms), "remark": movie.remark,
    }  # fmt: skip
    place = done.patch_centre_px / np.array(movie.shape[::-1]) - 0.5
    arrays: dict[str, np.ndarray] = {
        "preview": step.preview(done.micrograph, done.pixel_size_A),
        "track_px": track.astype(np.float32),
        "patch_centre_px": done.patch_centre_px.astype(np.float32),
        "patch_track_px": local_shift_px(done.motion.coefficients, place, movie.n).astype(np.float32),
        "shape_px": np.array(movie.shape[::-1]),
        "measured_patch_track_px": done.patch_measured_px.astype(np.float32),
    }
    return Found(values, arrays)


_COLUMNS = ("path", "movie_path", "motion_path", "motion_total_A", "motion_early_A", "motion_late_A")


def _write_table(out: Path, source: _Source, found: Mapping[str, Found], options: MotionOptions) -> None:
    """micrographs.star: those that came out well, in the order of the movies."""
    table = source.table()
    if table is None:
        return
    names = [item.name for item in named([Path(name) for name in table["path"].tolist()])]
    rows = [row for row, name in enumerate(names) if name in found and not found[name].flag]
    if not rows:
        return
    values = [found[names[row]].values for row in rows]
    kept = table.take(np.array(rows))
    kept = kept.replace(**{column: np.array([one[column] for one in values]) for column in _COLUMNS})
    original = kept.optics["micrograph_original_pixel_size_A"]
    sizes = original * options.bin
    for row, one in zip(kept["optics_row"].tolist(), values, strict=True):
        sizes[row] = one["pixel_size_A"]
    micrographs.write_micrographs(out / TABLE, kept.replace_optics(micrograph_pixel_size_A=sizes))
