"""Movies with known truth: what `simulate --movies` writes. Part of the job `simulate`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dcryo import graph
from dcryo.cluster import Cluster
from dcryo.data import micrographs, mrc, star
from dcryo.data.motion import MotionFile, read_motion, write_motion
from dcryo.data.movie_writer import BYTE_MOST, movie_writer
from dcryo.data.particles import Micrographs, Particles
from dcryo.data.run import RECORD, Run
from dcryo.data.star_syntax import Block, write_blocks
from dcryo.data.star_table import optics_columns_of
from dcryo.errors import InputError, RunError
from dcryo.jobs import em
from dcryo.jobs.options import JobOptions, Progress
from dcryo.kernels import slices
from dcryo.kernels.motion import COEFFICIENTS, Motion
from dcryo.steps import exposure as exposures
from dcryo.steps import simulation
from dcryo.steps.exposure import Exposure, Specimen
from dcryo.steps.simulation import Microscope, Truth

MOVIES, MOTION, GAIN, DENSITY = "movies", "motion", "gain.mrc", "truth.mrc"
PILOTS = 256


class MovieOptions(JobOptions):
    """What movies are like, where they are simulated."""

    movies: int | None = Field(None, gt=0, le=10**6, description="make so many movies in place of particles")
    frames: int = Field(24, gt=0, le=10_000, description="frames of a movie")
    frame_size_px: tuple[int, int] = Field((2048, 2048), description="columns and rows of a frame")
    dose_per_frame_e_A2: float = Field(1.277, gt=0, le=1000, description="exposure of a frame")
    particles_per_movie: int | None = Field(
        None, gt=0, le=10**6, description="particles tried to be placed in a movie (default: three tenths of its area)"
    )
    spacing_A: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="least distance of particles (default: 1.1 of their diameter)"
    )
    ice: float = Field(
        0.2,
        ge=0,
        le=100,
        description="variance of the grain of the ice, which moves as it does, over that of the electrons' noise",
    )
    tilt_deg: float = Field(0.0, ge=0, le=60, description="tilt of the specimen, about a random axis")
    motion_A: float = Field(15.0, ge=0, le=1000, description="typical length of a movie's whole-frame track")
    local_motion_A: float = Field(1.5, ge=0, le=100, description="typical local motion at the edges of the field")
    tracks: tuple[Path, ...] = Field(
        (),
        description="STAR file of a movie's motion (dcryo motion, RELION), not a random one; several are taken in turn",
    )
    crystals: float = Field(0.0, ge=0, le=100, description="mean number of ice crystals in a movie")
    carbon: float = Field(0.0, ge=0, le=1, description="share of the movies with the edge of the carbon film in view")
    gain_sigma: float = Field(0.05, ge=0, le=0.5, description="relative spread of the gain over the pixels")
    hot_pixels: int = Field(40, ge=0, le=10**5, description="pixels that count too much, the same in all movies")
    format: Literal["mrc", "tif"] = Field("mrc", description="files of the movies")


@dataclass(frozen=True)
class Session:
    """All that a movie is made of but its density, its specimen and its frames' noise.

    tracks: those that movies take in turn, or none.
    """

    microscope: Microscope
    exposure: Exposure
    seed: int
    tracks: tuple[Motion, ...]
    format: Literal["mrc", "tif"]

    def name(self, movie: int) -> str:
        return f"movie{movie + 1:05d}"

    def file(self, movie: int) -> str:
        return f"{MOVIES}/{self.name(movie)}.{self.format}"

    def specimen(self, movie: int) -> Specimen:
        motion = self.tracks[movie % len(self.tracks)] if self.tracks else None
        return exposures.draw_specimen(self.exposure, self.microscope, self.seed, movie, motion)


def movie_exposure(options: MovieOptions, density: NDArray[np.float32], pixel_size_A: float) -> Exposure:
    """The exposure that the options ask for. InputError where the frames are too small for the particles."""
    box_px = density.shape[0]
    if min(options.frame_size_px) < box_px:
        raise InputError(
            f"frames of {options.frame_size_px[0]} x {options.frame_size_px[1]} px do not hold a box of {box_px} px; "
            "give a larger --frame-size"
        )
    spacing_A = options.spacing_A or 1.1 * _diameter_px(density) * pixel_size_A
    return Exposure(
        frame_px=options.frame_size_px,
        frames=options.frames,
        dose_per_frame_e_A2=options.dose_per_frame_e_A2,
        particles=options.particles_per_movie
        or exposures.most_particles(options.frame_size_px, pixel_size_A, spacing_A),
        spacing_A=spacing_A,
        ice=options.ice,
        tilt_deg=options.tilt_deg,
        motion_A=options.motion_A,
        local_motion_A=options.local_motion_A,
        crystals=options.crystals,
        film=options.carbon,
        gain_sigma=options.gain_sigma,
        hot_pixels=options.hot_pixels,
    )


def _diameter_px(density: NDArray[np.float32]) -> float:
    """Diameter of the sphere about the box centre that holds 99 % of the squared density."""
    axis = np.arange(len(density)) - len(density) // 2
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    shell = np.bincount(np.rint(radius).astype(int).ravel(), np.square(density, dtype=np.float64).ravel())
    return 2.0 * float(np.searchsorted(np.cumsum(shell), 0.99 * shell.sum()) + 1)


def read_tracks(options: MovieOptions, pixel_size_A: float) -> tuple[Motion, ...]:
    """The motions of --tracks, brought to our pixels. InputError where one is shorter than the movies."""
    return tuple(_read_track(path, options.frames, pixel_size_A) for path in options.tracks)


def _read_track(path: Path, frames: int, pixel_size_A: float) -> Motion:
    file = read_motion(path)
    if not file.pixel_size_A > 0:
        raise InputError(f"{path}: _rlnMicrographOriginalPixelSize is {file.pixel_size_A}; expected more than 0")
    frame_px = file.frame_px[file.first_frame - 1 :][:frames]
    known = np.isfinite(frame_px).all(axis=1)
    if len(frame_px) < frames or not known.all():
        n = int(np.argmin(np.append(known, False)))
        raise InputError(f"{path}: has the shifts of {n} frames; expected at least --frames {frames}, none left out")
    scale = file.pixel_size_A / pixel_size_A
    coefficients = np.zeros((2, COEFFICIENTS)) if file.coefficients is None else file.coefficients
    return Motion(scale * (frame_px - frame_px[0]), scale * coefficients)


def make_movies(
    run: Run,
    n: int,
    density: NDArray[np.float32],
    microscope: Microscope,
    exposure: Exposure,
    snr: float,
    seed: int,
    tracks: tuple[Motion, ...],
    kind: Literal["mrc", "tif"],
    cluster: Cluster,
    progress: Progress,
) -> int:
    """Write `n` movies and their truth into a run, those that are not there yet; returns the number of particles."""
    density = density * np.float32(_contrast(density, microscope, exposure, snr, seed))
    session = Session(microscope, exposure, seed, tracks, kind)
    specimens = [session.specimen(movie) for movie in range(n)]
    if not any(len(specimen.centre_px) for specimen in specimens):
        raise RunError(
            f"no particle found room in {n} movies; give larger --frame-size, fewer --crystals or less --spacing"
        )
    _clear(run)
    mrc.write_map(run.path / DENSITY, density, microscope.pixel_size_A)
    gain = exposures.draw_gain(exposure, seed)
    mrc.write_map(run.path / GAIN, gain[None], microscope.pixel_size_A)
    _write_tables(run.path, session, specimens)
    missing = [movie for movie in range(n) if not (run.path / session.file(movie)).is_file()]
    done = n - len(missing)
    with em.scratch(run.path) as scratch:
        shell_max = simulation.image_pixels(microscope.box_px).shell_max
        prepared = em.write_reference(density, shell_max, scratch / "density.npy")
        for movie, _ in graph.each(_make_movie, missing, (run.path.absolute(), session, prepared), cluster):
            done += 1
            progress(f"{done} of {n} movies done, {session.name(movie)}", end="\r")
    return sum(len(specimen.centre_px) for specimen in specimens)


def _contrast(density: NDArray[np.float32], microscope: Microscope, exposure: Exposure, snr: float, seed: int) -> float:
    prepared = slices.prepare(density, simulation.image_pixels(microscope.box_px).shell_max)
    truth = simulation.draw_truth(microscope, seed, np.arange(PILOTS) // 16)
    contrast = exposures.contrast_of(prepared, microscope, exposure, truth, snr)
    if not math.isfinite(contrast):
        raise RunError("the density has no contrast, or is not finite")
    return contrast


def refuse_used(out: Path, overwrite: bool) -> None:
    """InputError where a new run would replace movies that are not of a run."""
    old = [] if overwrite or (out / RECORD).is_file() else _written(out)
    if old:
        raise InputError(
            f"{out}: holds {old[0].relative_to(out)}, which is not of a run that can be continued; name a new or empty "
            "directory for --out, or replace what is there with --overwrite"
        )


def _written(out: Path) -> list[Path]:
    return [path for folder in (MOVIES, MOTION) for path in sorted((out / folder).glob("movie[0-9]*.*"))]


def _clear(run: Run) -> None:
    """Make the folders; what is in them of a run that is being replaced is removed."""
    for folder in (MOVIES, MOTION):
        (run.path / folder).mkdir(exist_ok=True)
    if not run.record["resumed"]:
        for old in _written(run.path):
            old.unlink()


def _make_movie(movie: int, out: Path, session: Session, density: Path) -> None:
    """The task: one movie."""
    exposure, microscope = session.exposure, session.microscope
    specimen = session.specimen(movie)
    gain = exposures.draw_gain(exposure, session.seed)
    hot = exposures.draw_hot_pixels(exposure, session.seed)
    electrons = exposure.electrons_per_px(microscope.pixel_size_A)
    # A count above its mean by eight standard deviations does not occur, and hot pixels may be cut.
    greatest = 2.0 * electrons / float(gain.min())
    wide = greatest + 8.0 * math.sqrt(greatest) > BYTE_MOST
    prepared = em.read_reference(density)
    frames = exposures.intensities(prepared, microscope, exposure, specimen, session.seed, movie)
    with movie_writer(
        out / session.file(movie), session.format, exposure.frames, exposure.frame_px, microscope.pixel_size_A, wide
    ) as write:
        for frame, intensity in enumerate(frames):
            write(exposures.counts(intensity, gain, hot, electrons, session.seed, movie, frame))


def _write_tables(out: Path, session: Session, specimens: list[Specimen]) -> None:
    hot = exposures.draw_hot_pixels(session.exposure, session.seed)
    for movie, specimen in enumerate(specimens):
        write_motion(out / MOTION / f"{session.name(movie)}.star", _motion_file(session, movie, specimen.motion, hot))
    table = _micrographs(session, specimens)
    micrographs.write_micrographs(out / "micrographs_truth.star", table)
    optics, groups = optics_columns_of(_without_sum(table), {})
    movies = {"rlnMicrographMovieName": table["movie_path"], "rlnOpticsGroup": groups}
    write_blocks(out / "movies.star", {"optics": Block(optics), "movies": Block(movies)})
    star.write_particles(out / "truth.star", _particles(session, specimens))
    _write_dirt(out, session, specimens, hot)


def _motion_file(session: Session, movie: int, motion: Motion, hot: NDArray[np.int64]) -> MotionFile:
    exposure, scope = session.exposure, session.microscope
    return MotionFile(
        movie_path=session.file(movie), shape_px=exposure.frame_px, frame_px=motion.frame_px,
        pixel_size_A=scope.pixel_size_A, coefficients=motion.coefficients, hot_px=hot.astype(np.float64),
        gain_path=GAIN, dose_e_A2=exposure.dose_per_frame_e_A2, voltage_kV=scope.voltage_kV,
    )  # fmt: skip


def _optics(scope: Microscope) -> dict[str, np.ndarray]:
    return {
        "name": np.array(["opticsGroup1"]),
        "group": np.array([1]),
        "voltage_kV": np.array([scope.voltage_kV]),
        "spherical_aberration_mm": np.array([scope.spherical_aberration_mm]),
        "amplitude_contrast": np.array([scope.amplitude_contrast]),
        "micrograph_original_pixel_size_A": np.array([scope.pixel_size_A]),
    }


def _without_sum(table: Micrographs) -> Micrographs:
    """The optics of movies, which have no pixel size of a micrograph yet."""
    optics = {name: values for name, values in table.optics.items() if name != "micrograph_pixel_size_A"}
    return Micrographs(table.columns, optics)


def _micrographs(session: Session, specimens: list[Specimen]) -> Micrographs:
    n, scope = len(specimens), session.microscope
    names = [session.name(movie) for movie in range(n)]
    steps = [np.hypot(*np.diff(specimen.motion.frame_px, axis=0).T) for specimen in specimens]
    defocus = np.array([specimen.defocus for specimen in specimens])
    return Micrographs(
        {
            "path": np.array([f"{name}.mrc" for name in names]),
            "movie_path": np.array([session.file(movie) for movie in range(n)]),
            "motion_path": np.array([f"{MOTION}/{name}.star" for name in names]),
            "optics_row": np.zeros(n),
            "motion_total_A": scope.pixel_size_A * np.array([each.sum() for each in steps]),
            "defocus_u_A": defocus[:, 0],
            "defocus_v_A": defocus[:, 1],
            "defocus_angle_deg": defocus[:, 2],
        },
        _optics(scope) | {"micrograph_pixel_size_A": np.array([scope.pixel_size_A])},
    )


def _particles(session: Session, specimens: list[Specimen]) -> Particles:
    """All particles. Coordinates are whole pixels, as particles are cut out; the rest of the way is their origin."""
    scope = session.microscope
    centre = np.concatenate([specimen.centre_px for specimen in specimens])
    whole = np.rint(centre)
    of = np.repeat(np.arange(len(specimens)), [len(specimen.centre_px) for specimen in specimens])
    truths = {
        name: np.concatenate([getattr(specimen.truth, name) for specimen in specimens])
        for name in Truth.__dataclass_fields__
    }
    n = len(centre)
    return Particles(
        columns={
            "image_path": np.full(n, ""),
            "image_index": np.zeros(n),
            "micrograph": np.array([f"{session.name(movie)}.mrc" for movie in of.tolist()], dtype="U"),
            "coordinate_px": whole,
            "optics_row": np.zeros(n),
            "class_number": np.ones(n),
            **truths,
            "origin_A": (whole - centre) * scope.pixel_size_A,
        },
        optics=_optics(scope)
        | {"pixel_size_A": np.array([scope.pixel_size_A]), "micrograph_pixel_size_A": np.array([scope.pixel_size_A])},
    )


def _write_dirt(out: Path, session: Session, specimens: list[Specimen], hot: NDArray[np.int64]) -> None:
    """What a picker has to leave out, in dirt.star: crystals and the hole in the carbon, circles each."""
    rows: list[tuple[Any, ...]] = []
    for movie, specimen in enumerate(specimens):
        name = f"{session.name(movie)}.mrc"
        rows += [(name, "crystal", *crystal[:3].tolist()) for crystal in specimen.crystals]
        rows += [(name, "hole", *specimen.hole)] if specimen.hole is not None else []
    blocks = {}
    if rows:
        labels = ("rlnMicrographName", "dcryoDirt", "rlnCoordinateX", "rlnCoordinateY", "dcryoRadiusPx")
        columns = [np.array(column) for column in zip(*rows, strict=True)]
        blocks["dirt"] = Block(dict(zip(labels, columns, strict=True)))
    if len(hot):
        blocks["hot_pixels"] = Block({"rlnCoordinateX": hot[:, 0], "rlnCoordinateY": hot[:, 1]})
    if blocks:
        write_blocks(out / "dirt.star", blocks)
