"""Particles, or movies of them, of a map, an atomic model or the built-in phantom, with known truth."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dcryo.cluster import check_kind, connect
from dcryo.data import mrc, star
from dcryo.data.model import AtomicModel, read_model
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.errors import InputError, RunError
from dcryo.jobs import simulate_movies
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, SeedOptions, argument
from dcryo.jobs.simulate_movies import MovieOptions
from dcryo.kernels import slices
from dcryo.kernels.aberrations import odd_coefficients
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.filters import pad_or_crop, resample_volume
from dcryo.kernels.phantom import Phantom, phantom
from dcryo.kernels.randomness import generator
from dcryo.kernels.symmetry import operators
from dcryo.steps import simulation
from dcryo.steps.aberrations import Aberrations
from dcryo.steps.simulation import Microscope, Truth

PHANTOM = "phantom"
MAP_ENDINGS = (".mrc", ".map", ".ccp4", ".mrc.gz", ".map.gz", ".mrc.bz2", ".map.bz2")
CHUNK_IMAGES = 64
PILOT_IMAGES = 256
STACK, MAP = "particles.mrcs", "truth.mrc"


OF_PARTICLES = (
    "particles", "micrographs", "shift_sigma_px", "noise_bfactor_A2", "dtype", "beam_tilt_x_mrad", "beam_tilt_y_mrad",
    "trefoil", "trefoil_angle_deg", "tetrafoil", "tetrafoil_angle_deg", "anisotropy_percent", "anisotropy_angle_deg",
    "defocus_error_A", "ewald", "ewald_hand",
)  # fmt: skip
"""Options that movies do not have."""


class SimulateOptions(OutOptions, ClusterOptions, SeedOptions, MovieOptions):
    """Make particles, or movies of them, with known truth from a map, an atomic model or the built-in phantom.

    Writes particles.mrcs, particles.star (optics and CTF, no poses), truth.star (poses, shifts and half sets
    too) and truth.mrc, the density whose projections are the signal, on the images' grey scale. Particles are
    white on dark and the noise has variance 1. Aberrations and, with an error of it, the true defocus are in
    truth.star alone.

    With --movies it writes movies (raw counts of electrons, particles dark on white), gain.mrc (a raw frame times
    the gain is flat) and movies.star in place of particles; motion (each movie's track, as RELION writes it),
    micrographs_truth.star (defocus and motion) and dirt.star (crystals, carbon and hot pixels); in truth.star where
    the particles are, and in truth.mrc the density whose projections are the contrast. Movies are made by the
    workers of --cluster, particles are not.
    """

    model: str = argument("map (.mrc), atomic model (.pdb, .cif), or the word phantom")
    particles: int = Field(1000, gt=0, le=10**8, description="number of particles")
    box_px: int | None = Field(None, ge=16, le=2048, description="side of the images (default: the map's, or 128)")
    pixel_size_A: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="pixel size (default: the map's, or 2)"
    )
    symmetry: str = Field("C1", description="symmetry of the phantom; a map or model has its own")
    diameter_A: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="diameter of the phantom (default: 0.6 of the box)"
    )
    assembly: str | None = Field(
        None, description="biological assembly of the atomic model, such as 1 (default: the file as it is)"
    )
    snr: float = Field(
        0.1,
        gt=0,
        allow_inf_nan=True,
        description="variance of the signal (projection times CTF) over that of the noise, both over the "
        "whole box; inf makes no noise. In movies, of the sum of the frames weighted by exposure",
    )
    voltage_kV: float = Field(300.0, ge=20, le=3000, description="acceleration voltage")
    spherical_aberration_mm: float = Field(2.7, ge=0, le=10, description="spherical aberration")
    amplitude_contrast: float = Field(0.1, ge=0, lt=1, description="fraction of amplitude contrast")
    defocus_min_A: float = Field(8000.0, allow_inf_nan=False, description="least defocus of a micrograph")
    defocus_max_A: float = Field(20000.0, allow_inf_nan=False, description="greatest defocus of a micrograph")
    astigmatism_A: float = Field(
        300.0, ge=0, allow_inf_nan=False, description="spread of defocus U - V over the micrographs"
    )
    defocus_scatter_A: float = Field(
        100.0, ge=0, allow_inf_nan=False, description="spread of the particles' defocus in a micrograph"
    )
    micrographs: int | None = Field(None, gt=0, description="number of micrographs (default: one in 100 particles)")
    shift_sigma_px: float = Field(
        2.0,
        ge=0,
        allow_inf_nan=False,
        description="standard deviation of the particles' shifts along x and y",
    )
    noise_bfactor_A2: float = Field(
        100.0, ge=0, allow_inf_nan=False, description="fall-off of the noise power with frequency; 0 is white"
    )
    preference: float = Field(
        0.0,
        ge=0,
        le=1e4,
        description="preferred orientation: concentration (kappa) of the views about z; 0 is uniform",
    )
    beam_tilt_x_mrad: float = Field(0.0, allow_inf_nan=False, description="beam tilt along x, as RELION means it")
    beam_tilt_y_mrad: float = Field(0.0, allow_inf_nan=False, description="beam tilt along y")
    trefoil: float = Field(0.0, allow_inf_nan=False, description="greatest odd phase of trefoil at Nyquist, rad")
    trefoil_angle_deg: float = Field(0.0, allow_inf_nan=False, description="direction of that phase, from x")
    tetrafoil: float = Field(0.0, allow_inf_nan=False, description="greatest even phase of tetrafoil at Nyquist, rad")
    tetrafoil_angle_deg: float = Field(0.0, allow_inf_nan=False, description="direction of that phase, from x")
    anisotropy_percent: float = Field(
        0.0, ge=0, le=10, description="by how much the magnification differs between two axes, percent"
    )
    anisotropy_angle_deg: float = Field(
        0.0, allow_inf_nan=False, description="direction in which frequencies of the specimen are higher, from x"
    )
    defocus_error_A: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="standard deviation of the defocus of particles.star about the true one",
    )
    ewald: bool = Field(False, description="images feel the curvature of the Ewald sphere")
    ewald_hand: int = Field(1, ge=-1, le=1, description="hand of that curvature, 1 or -1, as of reconstruct")
    dtype: Literal["float32", "float16"] = Field("float32", description="number format of the stack")

    @model_validator(mode="after")
    def _consistent(self) -> "SimulateOptions":
        if self.defocus_max_A < self.defocus_min_A:
            raise ValueError(f"defocus_max_A {self.defocus_max_A:g} is below defocus_min_A {self.defocus_min_A:g}")
        if self.model != PHANTOM and (self.symmetry.upper() != "C1" or self.diameter_A is not None):
            raise ValueError("symmetry and diameter are the phantom's; a map or an atomic model has its own")
        if self.assembly is not None and (self.model == PHANTOM or self.model.lower().endswith(MAP_ENDINGS)):
            raise ValueError("an assembly is built from an atomic model (.pdb, .cif)")
        if self.ewald_hand == 0:
            raise ValueError("ewald_hand is 1 or -1")
        if self.ewald_hand != 1 and not self.ewald:
            raise ValueError("ewald_hand is of the curvature of the Ewald sphere: give --ewald too")
        fields = type(self).model_fields
        foreign = OF_PARTICLES if self.movies else [name for name in MovieOptions.model_fields if name != "movies"]
        given = [name for name in foreign if getattr(self, name) != fields[name].default]
        if given:
            raise ValueError(f"{given[0]} is for {'particles' if self.movies else 'movies'}; see --movies")
        if self.movies and math.isinf(self.snr):
            raise ValueError("movies are counts of electrons, which have noise; give a finite snr")
        if self.micrographs is not None and self.micrographs > self.particles:
            raise ValueError(f"{self.micrographs} micrographs for {self.particles} particles: each wants one")
        return self


@dataclass(frozen=True)
class SimulateResult:
    """Where things are, and what was made."""

    particles_star: Path
    truth_star: Path
    truth_map: Path
    particles: int
    box_px: int
    pixel_size_A: float

    def summary(self) -> str:
        """Lines of text for the reader at the terminal."""
        return (
            f"{self.particles} particles, {self.box_px} px at {self.pixel_size_A:.4g} A: "
            f"{self.particles_star}\ntheir truth: {self.truth_star} and {self.truth_map}"
        )


@dataclass(frozen=True)
class SimulateMoviesResult:
    """Where things are, and what was made."""

    movies_star: Path
    truth_star: Path
    truth_map: Path
    movies: int
    particles: int
    box_px: int
    pixel_size_A: float

    def summary(self) -> str:
        """Lines of text for the reader at the terminal."""
        return (
            f"{self.movies} movies with {self.particles} particles, at {self.pixel_size_A:.4g} A: {self.movies_star}\n"
            f"their truth: {self.truth_star} and {self.truth_map}"
        )


def simulate(options: SimulateOptions, *, progress: Progress = print) -> SimulateResult | SimulateMoviesResult:
    """Simulate particles or movies; see `SimulateOptions` for what is written into `options.out`.

    The bits of an image depend on the options, the seed and the particle's number alone, those of a movie on its
    own number. Raises InputError for a model that cannot be read or does not fit the box.
    """
    check_kind(options.cluster)
    density, pixel_size_A = _density(options)
    return (_movies if options.movies else _particles)(options, density, pixel_size_A, progress)


def _movies(
    options: SimulateOptions, density: NDArray[np.float32], pixel_size_A: float, progress: Progress
) -> SimulateMoviesResult:
    assert options.movies is not None
    box_px, out = density.shape[0], options.out
    exposure = simulate_movies.movie_exposure(options, density, pixel_size_A)
    tracks = simulate_movies.read_tracks(options, pixel_size_A)
    simulate_movies.refuse_used(out, options.overwrite)
    inputs = ([] if options.model == PHANTOM else [Path(options.model)]) + list(options.tracks)
    run = Run.start(out, "simulate", options.model_dump(), inputs, options.seed, options.resume, options.overwrite)
    if not run.finished:
        with run, connect(options.cluster, options.workers) as cluster:
            microscope = _microscope(options, box_px, pixel_size_A)
            particles = simulate_movies.make_movies(
                run, options.movies, density, microscope, exposure, options.snr, options.seed, tracks,
                options.format, cluster, progress,
            )  # fmt: skip
            run.done({"movies": options.movies, "particles": particles, "box_px": box_px, "pixel_size_A": pixel_size_A})
    particles = run.record["result"]["particles"]
    return SimulateMoviesResult(
        out / "movies.star", out / "truth.star", out / MAP, options.movies, particles, box_px, pixel_size_A
    )


def _particles(
    options: SimulateOptions, density: NDArray[np.float32], pixel_size_A: float, progress: Progress
) -> SimulateResult:
    box_px = density.shape[0]
    inputs = [] if options.model == PHANTOM else [Path(options.model)]
    run = Run.start(
        options.out, "simulate", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    )
    result = SimulateResult(
        options.out / "particles.star",
        options.out / "truth.star",
        options.out / MAP,
        options.particles,
        box_px,
        pixel_size_A,
    )
    if run.finished:
        return result
    with run:
        microscope = _microscope(options, box_px, pixel_size_A)
        micrographs = options.micrographs or math.ceil(options.particles / 100)
        micrograph = simulation.micrograph_of(options.particles, micrographs)
        truth = simulation.draw_truth(microscope, options.seed, micrograph)
        density = density * np.float32(_grey_scale(density, microscope, truth, options.snr))
        mrc.write_map(result.truth_map, density, pixel_size_A)
        _write_images(options, microscope, density, truth, progress)
        _write_tables(options, result, microscope, truth, micrograph)
        run.done({"particles": options.particles, "box_px": box_px, "pixel_size_A": pixel_size_A})
    return result


def _density(options: SimulateOptions) -> tuple[NDArray[np.float32], float]:
    """The density to project and its voxel size, in the box that the options ask for."""
    if options.model.lower().endswith(MAP_ENDINGS):
        return _density_of_map(options)
    box_px, pixel_size_A = options.box_px or 128, options.pixel_size_A or 2.0
    atoms: Phantom | AtomicModel
    if options.model == PHANTOM:
        diameter_A = options.diameter_A or 0.6 * box_px * pixel_size_A
        atoms = phantom(operators(options.symmetry), diameter_A / 2.0)
    else:
        atoms = read_model(options.model, options.assembly)
    least_px = math.ceil(2.0 * atoms.radius_A / pixel_size_A) + 4
    if least_px > box_px:
        raise InputError(
            f"{options.model}: reaches {atoms.radius_A:.0f} A from its centre, which a box of {box_px} px at "
            f"{pixel_size_A:g} A does not hold; give at least --box {least_px}, or larger pixels"
        )
    density = gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, box_px, pixel_size_A)
    return density, pixel_size_A


def _density_of_map(options: SimulateOptions) -> tuple[NDArray[np.float32], float]:
    """A map in a cube, at the pixel size asked for, cropped or padded with zeros to the box."""
    source = mrc.read_map(options.model)
    voxel_size_A = source.voxel_size_A or options.pixel_size_A
    if not voxel_size_A:
        raise InputError(f"{options.model}: its header has no voxel size; give it as --pixel-size")
    pixel_size_A = options.pixel_size_A or voxel_size_A
    side_px = max(source.array.shape)
    if abs(pixel_size_A / voxel_size_A - 1.0) > 1e-4:
        density = resample_volume(source.array, voxel_size_A / pixel_size_A)
        side_px = math.ceil(side_px * voxel_size_A / pixel_size_A)
    else:
        density = pad_or_crop(source.array, side_px)
    density = pad_or_crop(density, options.box_px or side_px)
    if not density.any():
        raise InputError(f"{options.model}: is zero in a box of {density.shape[0]} px about its centre")
    return density, pixel_size_A


def _microscope(options: SimulateOptions, box_px: int, pixel_size_A: float) -> Microscope:
    made: dict[str, Any] = {
        "box_px": box_px,
        "pixel_size_A": pixel_size_A,
        "aberrations": _aberrations(options, pixel_size_A),
        "hand": options.ewald_hand if options.ewald else 0,
    }
    named = [name for name in Microscope.__dataclass_fields__ if name not in made]
    return Microscope(**{name: getattr(options, name) for name in named}, **made)


def _aberrations(options: SimulateOptions, pixel_size_A: float) -> Aberrations:
    """A foil of n leaves is a phase that grows as k^n: the polynomials Z(n, n) and Z(n, -n)."""
    foils, even, magnification = _foils(options, pixel_size_A)
    optics = (options.spherical_aberration_mm, options.voltage_kV)
    odd = odd_coefficients(foils, options.beam_tilt_x_mrad, options.beam_tilt_y_mrad, *optics)
    (a, b), (c, d) = magnification.tolist()
    return Aberrations(
        tuple(odd.tolist()) if odd.any() else (), tuple(even.tolist()) if even.any() else (), ((a, b), (c, d))
    )


def _foils(
    options: SimulateOptions, pixel_size_A: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Odd coefficients without the beam tilt, (6,), even ones, (9,), and the matrix of magnification."""
    nyquist_1_A = 0.5 / pixel_size_A

    def leaves(n: int, rad: float, angle_deg: float) -> NDArray[np.float64]:
        angle = n * math.radians(angle_deg)
        return rad / nyquist_1_A**n * np.array([math.sin(angle), math.cos(angle)])

    odd, even = np.zeros(6), np.zeros(9)
    odd[[2, 5]] = leaves(3, options.trefoil, options.trefoil_angle_deg)
    even[[4, 8]] = leaves(4, options.tetrafoil, options.tetrafoil_angle_deg)
    angle, half = math.radians(options.anisotropy_angle_deg), options.anisotropy_percent / 200
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    magnification = turn @ np.diag([1 + half, 1 - half]) @ turn.T if half else np.eye(2)
    return odd, even, magnification


def _grey_scale(density: NDArray[np.float32], microscope: Microscope, truth: Truth, snr: float) -> float:
    """Factor on the density that gives the images the SNR asked for with noise of variance 1.

    The signal's variance is the mean over the first PILOT_IMAGES particles. Without noise it becomes 1.
    """
    prepared = _prepared(density)
    variances = []
    pilots = min(PILOT_IMAGES, len(truth.half))
    for start in range(0, pilots, CHUNK_IMAGES):
        part = truth.take(slice(start, min(start + CHUNK_IMAGES, pilots)))
        transforms = simulation.signal(prepared, microscope, part)
        variances.append(simulation.pixel_variance(transforms, microscope.box_px))
    variance = float(np.mean(np.concatenate(variances)))
    if not (math.isfinite(variance) and variance > 0.0):
        raise RunError(f"the signal's variance is {variance}: the density has no contrast, or is not finite")
    return math.sqrt((1.0 if math.isinf(snr) else snr) / variance)


def _prepared(density: NDArray[np.float32]) -> NDArray[np.complex64]:
    return slices.prepare(density, simulation.image_pixels(density.shape[0]).shell_max)


def _write_images(
    options: SimulateOptions,
    microscope: Microscope,
    density: NDArray[np.float32],
    truth: Truth,
    progress: Progress,
) -> None:
    n = options.particles
    prepared = _prepared(density)
    noise_sigma = 0.0 if math.isinf(options.snr) else 1.0
    path = options.out / STACK
    with mrc.StackWriter(path, n, microscope.box_px, microscope.pixel_size_A, options.dtype) as writer:
        for start in range(0, n, CHUNK_IMAGES):
            part = truth.take(slice(start, min(start + CHUNK_IMAGES, n)))
            writer.write(start, simulation.images(prepared, microscope, part, start, options.seed, noise_sigma))
            progress(f"simulated {start + len(part.half)} of {n} particles", end="\r")


def _write_tables(
    options: SimulateOptions,
    result: SimulateResult,
    microscope: Microscope,
    truth: Truth,
    micrograph: NDArray[np.int64],
) -> None:
    n = len(micrograph)
    optics = {
        "name": np.array(["opticsGroup1"]),
        "group": np.array([1]),
        "voltage_kV": np.array([microscope.voltage_kV]),
        "spherical_aberration_mm": np.array([microscope.spherical_aberration_mm]),
        "amplitude_contrast": np.array([microscope.amplitude_contrast]),
        "pixel_size_A": np.array([microscope.pixel_size_A]),
        "box_px": np.array([microscope.box_px]),
    }
    blank = Particles(
        columns={
            "image_path": np.full(n, STACK),
            "image_index": np.arange(n),
            "optics_row": np.zeros(n, dtype=np.int32),
            "micrograph": np.array([f"micrograph{number + 1:05d}.mrc" for number in micrograph]),
            "defocus_u_A": truth.defocus_u_A,
            "defocus_v_A": truth.defocus_v_A,
            "defocus_angle_deg": truth.defocus_angle_deg,
        },
        optics=optics,
    )
    wrong = {}
    if options.defocus_error_A:
        drawn = [generator(options.seed, "defocus error", i).standard_normal() for i in range(n)]
        error_A = options.defocus_error_A * np.array(drawn)
        wrong = {name: blank[name] + error_A for name in ("defocus_u_A", "defocus_v_A")}
    star.write_particles(result.particles_star, blank.replace(**wrong), None)
    known = blank.replace(rotation=truth.rotation, origin_A=truth.origin_A, half=truth.half)
    star.write_particles(result.truth_star, known.replace_optics(**_optics_of_aberrations(options, microscope)), None)


def _optics_of_aberrations(options: SimulateOptions, microscope: Microscope) -> dict[str, NDArray[np.float64]]:
    """Columns (1, ...) of the optics table; none where there are no aberrations, so that tables are those of before."""
    odd, even, magnification = _foils(options, microscope.pixel_size_A)
    tilt = {name: getattr(options, name) for name in ("beam_tilt_x_mrad", "beam_tilt_y_mrad")}
    columns = {name: np.array([value]) for name, value in tilt.items() if any(tilt.values())}
    columns |= {"odd_zernike": odd[None]} if odd.any() else {}
    columns |= {"even_zernike": even[None]} if even.any() else {}
    return columns | ({"magnification": magnification[None]} if options.anisotropy_percent else {})
