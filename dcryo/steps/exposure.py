"""Simulated movies: a specimen of particles in ice that moves and is damaged while a camera counts electrons.

Everything random is keyed by (seed, what it is for, movie, frame), so a movie is the same to the bit wherever it is
made. Not simulated: motion within a frame, the detector's transfer function, coincidence loss, beam tilt, and
interactions beyond the weak-phase approximation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from dcryo.kernels import fft, field, slices, warp
from dcryo.kernels.ctf import ctf, wavelength_A
from dcryo.kernels.dose import critical_exposure_e_A2
from dcryo.kernels.motion import SPACE_TERMS, Motion, in_space, local_shift_px, time_terms
from dcryo.kernels.posterior import shift_phases
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import unpack
from dcryo.steps import simulation
from dcryo.steps.simulation import Microscope, Truth

# Power of the ice before the CTF: 1 / (1 + (k L)^2), falling faster towards high frequencies by a B factor.
ICE_LENGTH_A, ICE_BFACTOR_A2 = 50.0, 50.0
# The specimen slows down over this exposure, in e/A2, to a drift of this share of its first speed.
SETTLING_E_A2, DRIFT = 6.0, 0.15
JITTER_A = 0.1
# Of crystals on the ice, and of the film around a hole: their light, and their grain relative to that of the ice.
CRYSTAL_RADIUS_A, CRYSTAL_TRANSMISSION, CRYSTAL_GRAIN = (100.0, 350.0), (0.5, 0.85), 2.0
CRYSTAL_DENTS = (0.25, 0.12)
HOLE_RADIUS_A, FILM_TRANSMISSION, FILM_GRAIN = 6000.0, 0.9, 2.5
EDGE_A = 15.0
# How a gain comes about: a smooth field of waves, columns, and pixels, each with this share of the variance.
GAIN_SHARES, GAIN_WAVES = (0.5, 0.25, 0.25), 4
HOT_LEVEL = (20.0, 60.0)
COVERAGE = 0.3
PLACING_ATTEMPTS = 40
LAID_AT_ONCE = 32
# Of defocus, over which tilted ice is taken to be level.
STRIP_A = 60.0
FRAMES_MOST = 1 << 32


@dataclass(frozen=True)
class Exposure:
    """What the movies of a session share.

    frame_px: (nx, ny). particles: how many are tried to be placed in a movie; spacing_A: least distance of their
    centres. ice: variance of its grain over that of the electrons' noise, both in the sum of the frames weighted by
    exposure, at the middle of the microscope's range of defocus. tilt_deg: of the specimen, about a random axis in the
    plane. motion_A: length of the typical whole-frame track; local_motion_A: typical shift at the corners of the field
    relative to its centre. crystals: mean number in a movie; film: the share of movies with the edge of the hole in
    view. gain_sigma: relative spread of the pixels' gain; hot_pixels: their number.
    """

    frame_px: tuple[int, int]
    frames: int
    dose_per_frame_e_A2: float
    particles: int
    spacing_A: float
    ice: float
    tilt_deg: float
    motion_A: float
    local_motion_A: float
    crystals: float
    film: float
    gain_sigma: float
    hot_pixels: int

    def electrons_per_px(self, pixel_size_A: float) -> float:
        """Mean count of a pixel in a frame, where the specimen takes nothing away."""
        return self.dose_per_frame_e_A2 * pixel_size_A**2

    def before_e_A2(self) -> NDArray[np.floating]:
        """Exposure (F,) that the specimen had at the middle of each frame."""
        return self.dose_per_frame_e_A2 * (np.arange(self.frames) + 0.5)


@dataclass(frozen=True)
class Specimen:
    """What is in the field of one movie and how it moves: its truth.

    centre_px: (n, 2) column and row, from 0, of the particles in the first frame; truth: of these, the origins 0;
    defocus: U and V in A and the angle in degrees at the middle of the field; gradient: (2,) change of defocus with x
    and y, A per px. crystals: (m, 5) column, row, greatest radius in px, transmission, and the direction of
    that radius in radians; hole: column and row of its centre
    and its radius, in px, or None where its edge is out of view.
    """

    motion: Motion
    centre_px: NDArray[np.float64]
    truth: Truth
    defocus: tuple[float, float, float]
    gradient_A_px: NDArray[np.float64]
    crystals: NDArray[np.float64]
    hole: tuple[float, float, float] | None


def most_particles(frame_px: tuple[int, int], pixel_size_A: float, spacing_A: float) -> int:
    """Particles that cover COVERAGE of a frame with discs of the spacing's diameter, at least 1."""
    area_A2 = frame_px[0] * frame_px[1] * pixel_size_A**2
    return max(1, round(COVERAGE * area_A2 / (0.25 * math.pi * spacing_A**2)))


def draw_specimen(
    exposure: Exposure, microscope: Microscope, seed: int, movie: int, motion: Motion | None = None
) -> Specimen:
    """Draw a movie's specimen; motion: how it moves, where that is known."""
    rng = generator(seed, "field", movie)
    crystals, hole = _draw_dirt(exposure, microscope.pixel_size_A, rng)
    azimuth, slope = rng.uniform(0.0, 2.0 * math.pi), math.tan(math.radians(exposure.tilt_deg))
    gradient = slope * microscope.pixel_size_A * np.array([math.cos(azimuth), math.sin(azimuth)])
    centre = _draw_centres(exposure, microscope.pixel_size_A, crystals, hole, rng)
    numbers = np.full(len(centre), movie, dtype=np.int64)
    truth = simulation.draw_truth(
        replace(microscope, shift_sigma_px=0.0), seed, numbers, first=movie * exposure.particles
    )
    below_A = (centre - 0.5 * np.array(exposure.frame_px)) @ gradient
    truth = replace(truth, defocus_u_A=truth.defocus_u_A + below_A, defocus_v_A=truth.defocus_v_A + below_A)
    if motion is None:
        motion = draw_motion(exposure, microscope.pixel_size_A, seed, movie)
    defocus = simulation.draw_defocus(microscope, seed, movie)
    return Specimen(motion, centre, truth, defocus, gradient, crystals, hole)


def _draw_dirt(
    exposure: Exposure, pixel_size_A: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], tuple[float, float, float] | None]:
    size = np.array(exposure.frame_px, dtype=np.float64)
    crystals = np.array(
        [
            (*rng.uniform(0.0, 1.0, 2) * size, rng.uniform(*CRYSTAL_RADIUS_A) / pixel_size_A,
             rng.uniform(*CRYSTAL_TRANSMISSION), rng.uniform(0.0, 2.0 * math.pi))
            for _ in range(rng.poisson(exposure.crystals))
        ]
    ).reshape(-1, 5)  # fmt: skip
    direction, depth, in_view = rng.uniform(0.0, 2.0 * math.pi), rng.uniform(0.1, 0.35), rng.random() < exposure.film
    if not in_view:
        return crystals, None
    # The edge of the hole crosses the field: on this side its centre, on the other the film.
    radius = HOLE_RADIUS_A / pixel_size_A
    distance = radius - (0.5 - depth) * size.min()
    return crystals, (
        0.5 * size[0] - distance * math.cos(direction), 0.5 * size[1] - distance * math.sin(direction), radius
    )  # fmt: skip


def _draw_centres(
    exposure: Exposure,
    pixel_size_A: float,
    crystals: NDArray[np.float64],
    hole: tuple[float, float, float] | None,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Centres at random, one after the other, that keep their distance from one another, dirt, film and edges."""
    spacing = exposure.spacing_A / pixel_size_A
    size = np.array(exposure.frame_px, dtype=np.float64)
    margin = np.minimum(0.5 * spacing, 0.5 * size)
    placed = np.empty((exposure.particles, 2))
    n = 0
    for candidate in rng.uniform(margin, size - margin, (PLACING_ATTEMPTS * exposure.particles, 2)):
        if n == len(placed):
            break
        far = np.hypot(*(placed[:n] - candidate).T).min(initial=np.inf) >= spacing
        far &= bool(np.all(np.hypot(*(crystals[:, :2] - candidate).T) >= crystals[:, 2] + 0.5 * spacing))
        if hole is not None:
            far &= math.hypot(candidate[0] - hole[0], candidate[1] - hole[1]) <= hole[2] - 0.5 * spacing
        if far:
            placed[n] = candidate
            n += 1
    return placed[:n]


def draw_motion(exposure: Exposure, pixel_size_A: float, seed: int, movie: int) -> Motion:
    """Whole frames whose motion is fast first and slows down to a drift, and a local model that does alike."""
    rng = generator(seed, "motion", movie)
    frames = exposure.frames
    ends_e_A2 = exposure.dose_per_frame_e_A2 * np.arange(frames)
    # The integral of a speed that decays to the drift; 0 in the first frame, 1 in the last.
    way = DRIFT * ends_e_A2 / SETTLING_E_A2 + (1.0 - DRIFT) * -np.expm1(-ends_e_A2 / SETTLING_E_A2)
    way /= max(way[-1], 1e-9)
    heading = rng.uniform(0.0, 2.0 * math.pi) + np.cumsum(0.15 * rng.standard_normal(frames))
    steps = exposure.motion_A * rng.uniform(0.6, 1.4) * np.diff(way, prepend=0.0)
    whole = np.cumsum(steps[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    if exposure.motion_A > 0.0:
        whole += JITTER_A * rng.standard_normal((frames, 2)) * (np.arange(frames) > 0)[:, None]
    course = np.linalg.lstsq(time_terms(frames), way, rcond=None)[0]
    # At the edges |x| is 1/2, and x^2 and x y are 1/4.
    strength = rng.standard_normal((2, SPACE_TERMS)) * np.array([0.0, 2.0, 4.0, 2.0, 4.0, 4.0]) / math.sqrt(5.0)
    local = exposure.local_motion_A * strength[:, :, None] * course
    return Motion(whole / pixel_size_A, local.reshape(2, -1) / pixel_size_A)


def draw_gain(exposure: Exposure, seed: int) -> NDArray[np.float32]:
    """What a raw frame is multiplied by to be flat: (ny, nx) float32, of mean 1."""
    nx, ny = exposure.frame_px
    rng = generator(seed, "gain", 0)
    orders = np.arange(GAIN_WAVES)
    waves = [np.cos(np.pi * orders * (np.arange(n)[:, None] + 0.5) / n) for n in (ny, nx)]
    strength = rng.standard_normal((GAIN_WAVES, GAIN_WAVES))
    strength[0, 0] = 0.0
    patterns = (
        waves[0] @ strength @ waves[1].T, rng.standard_normal(nx)[None, :], rng.standard_normal((ny, nx))
    )  # fmt: skip
    logarithm = np.zeros((ny, nx))
    for pattern, share in zip(patterns, GAIN_SHARES, strict=True):
        logarithm += math.sqrt(share) * exposure.gain_sigma * pattern / max(pattern.std(), 1e-9)
    gain = np.exp(logarithm)
    return (gain / gain.mean()).astype(np.float32)


def draw_hot_pixels(exposure: Exposure, seed: int) -> NDArray[np.int64]:
    """Columns and rows (n, 2), from 0, of the pixels that count too much, in the order of the rows."""
    nx, ny = exposure.frame_px
    chosen = generator(seed, "hot", 0).choice(nx * ny, min(exposure.hot_pixels, nx * ny), replace=False)
    return np.stack([np.sort(chosen) % nx, np.sort(chosen) // nx], axis=1)


def weight_of_frames(k_1_A: NDArray[np.floating], exposure: Exposure, voltage_kV: float) -> NDArray[np.float64]:
    """Amplitude that the sum of frames, weighted by exposure, has of the signal at a frequency, where that of the noise
    of one frame is 1: the root of the sum over frames of their survival squared (Grant & Grigorieff 2015, eq. 9)."""
    # The squares are a geometric series.
    ratio = exposure.dose_per_frame_e_A2 / critical_exposure_e_A2(k_1_A, voltage_kV)
    with np.errstate(invalid="ignore"):
        terms = np.expm1(-exposure.frames * ratio) / np.expm1(-ratio)
    return np.sqrt(np.where(ratio > 0.0, np.exp(-0.5 * ratio) * terms, exposure.frames))


def contrast_of(
    prepared: NDArray[np.complex64], microscope: Microscope, exposure: Exposure, truth: Truth, snr: float
) -> float:
    """Factor on the density that gives particles the SNR asked for: of their boxes in the sum of the frames weighted by
    exposure, against the noise of the electrons and the ice. Its projections are the contrast, relative to the mean."""
    pixels = simulation.image_pixels(microscope.box_px)
    k_1_A = np.hypot(pixels.kx, pixels.ky) / (microscope.box_px * microscope.pixel_size_A)
    weight = weight_of_frames(k_1_A, exposure, microscope.voltage_kV).astype(np.float32)
    transforms = simulation.signal(prepared, microscope, truth) * weight
    variance = float(simulation.pixel_variance(transforms, microscope.box_px).mean())
    noise = (1.0 + exposure.ice) / exposure.electrons_per_px(microscope.pixel_size_A)
    return math.sqrt(snr * noise / variance) if variance > 0.0 else math.nan


def intensities(
    prepared: NDArray[np.complex64],
    microscope: Microscope,
    exposure: Exposure,
    specimen: Specimen,
    seed: int,
    movie: int,
) -> Iterator[NDArray[np.float32]]:
    """The frames without the camera's noise, (ny, nx) float32 each, relative to where there is no specimen.

    prepared: the density as `slices.prepare` gives it; its projections are the contrast. Particles are darker than the
    ice. They are moved in Fourier space, so that they keep all frequencies; the ice by cubic splines.
    """
    view = _View(microscope, exposure, specimen)
    pixels = simulation.image_pixels(microscope.box_px)
    particles = slices.extract(prepared, specimen.truth.rotation, pixels, microscope.box_px)
    # The CTF is that of particles white on dark; in movies they are dark.
    particles *= np.float32(-1.0)
    light, grain = view.light_and_grain()
    ice = view.ice(grain, generator(seed, "ice", movie))
    nx, ny = exposure.frame_px
    coefficients = specimen.motion.coefficients
    place = specimen.centre_px / np.array(exposure.frame_px) - 0.5
    of_particles = local_shift_px(coefficients, place, exposure.frames)
    for frame, before in enumerate(exposure.before_e_A2()):
        spatial = in_space(coefficients, frame)
        channels = [warp.warped(channel, spatial, (0.0, 0.0), view.corner, exposure.frame_px) for channel in ice]
        if view.has_quadrature and len(channels) == 1:
            channels.append(np.zeros(view.shape, np.float32))
        view.lay_particles(channels, particles, of_particles[:, frame])
        whole = specimen.motion.frame_px[frame]
        image = view.passed_on(channels, before, whole)
        image += np.float32(1.0)
        if light is not None:
            image *= warp.warped(light, spatial, whole, view.corner, exposure.frame_px)
        left, top = view.corner
        yield np.maximum(image[top : top + ny, left : left + nx], 0.0)


def counts(
    intensity: NDArray[np.float32],
    gain: NDArray[np.float32],
    hot_pixels: NDArray[np.int64],
    electrons_per_px: float,
    seed: int,
    movie: int,
    frame: int,
) -> NDArray[np.int64]:
    """What the camera counts of a frame: (ny, nx), Poisson, of mean intensity x electrons / gain.

    hot_pixels: (n, 2) columns and rows of those that count HOT_LEVEL times too much, each at its own level.
    """
    rng = generator(seed, "counts", movie * FRAMES_MOST + frame)
    mean = intensity * np.float32(electrons_per_px) / gain
    levels = generator(seed, "hot levels", 0).uniform(*HOT_LEVEL, len(hot_pixels))
    mean[hot_pixels[:, 1], hot_pixels[:, 0]] *= levels.astype(np.float32)
    return rng.poisson(mean)


class _View:
    """A field around a movie's frames, wide enough for what moves into them, and what the microscope does to it."""

    def __init__(self, microscope: Microscope, exposure: Exposure, specimen: Specimen) -> None:
        self.microscope, self.exposure, self.specimen = microscope, exposure, specimen
        nx, ny = exposure.frame_px
        edges = np.array([-0.5, 0.0, 0.5])
        moved = specimen.motion.at(np.stack(np.meshgrid(edges, edges), axis=-1))
        margin = math.ceil(np.abs(moved).max()) + 8
        self.shape = (scipy.fft.next_fast_len(ny + 2 * margin, True), scipy.fft.next_fast_len(nx + 2 * margin, True))
        self.corner = (margin, margin)
        self.kx, self.ky = field.frequencies(self.shape)
        self.k_1_A = (np.hypot(self.ky[:, None], self.kx) / microscope.pixel_size_A).astype(np.float32)
        with np.errstate(divide="ignore"):
            self.decay = (0.5 / critical_exposure_e_A2(self.k_1_A, microscope.voltage_kV)).astype(np.float32)
        # A defocus that differs by d turns gamma by e = -pi lambda d k^2, and -sin(gamma + e) is
        # -sin(gamma) cos(e) - cos(gamma) sin(e): two transfer functions for all particles, whatever their defocus.
        self.turn_per_A = -math.pi * float(wavelength_A(microscope.voltage_kV))
        self.transfer = self._transfer(specimen.defocus, 0.0)
        self.has_quadrature = bool(specimen.gradient_A_px.any()) or microscope.defocus_scatter_A > 0.0
        self.quadrature = (
            -self._transfer(specimen.defocus, 90.0) if self.has_quadrature else np.empty((0, 0), np.float32)
        )

    def _transfer(self, defocus: tuple[float, float, float], phase_shift_deg: float) -> NDArray[np.float32]:
        scope, (u, v, angle) = self.microscope, defocus
        kx, ky = np.meshgrid(self.kx, self.ky)
        values = ctf(
            kx.ravel(), ky.ravel(), 1, scope.pixel_size_A, u, v, angle, scope.voltage_kV,
            scope.spherical_aberration_mm, scope.amplitude_contrast, phase_shift_deg,
        )  # fmt: skip
        return values.reshape(self.k_1_A.shape)

    def _coordinates(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Columns (1, nx) and rows (ny, 1) of the field, from the frame's first pixel."""
        x, y = np.arange(self.shape[1]) - self.corner[0], np.arange(self.shape[0]) - self.corner[1]
        return x[None, :].astype(np.float32), y[:, None].astype(np.float32)

    def light_and_grain(self) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """Spline coefficients of what dirt and film let through, and the factor of the ice's grain; None where 1."""
        specimen = self.specimen
        if specimen.hole is None and not len(specimen.crystals):
            return None, None
        edge = EDGE_A / self.microscope.pixel_size_A
        light, grain = np.ones(self.shape, np.float32), np.ones(self.shape, np.float32)
        x, y = self._coordinates()
        for column, row, radius, transmission, direction in specimen.crystals.astype(np.float32):
            turn = np.arctan2(y - row, x - column) - direction
            outline = radius * (1.0 - CRYSTAL_DENTS[0] * np.sin(turn) ** 2 - CRYSTAL_DENTS[1] * np.sin(1.5 * turn) ** 2)
            cover = _inside(np.hypot(x - column, y - row), outline, edge)
            light *= 1.0 - np.float32(1.0 - transmission) * cover
            grain += np.float32(CRYSTAL_GRAIN) * cover
        if specimen.hole is not None:
            column, row, radius = specimen.hole
            cover = 1.0 - _inside(np.hypot(x - np.float32(column), y - np.float32(row)), radius, edge)
            light *= 1.0 - np.float32(1.0 - FILM_TRANSMISSION) * cover
            grain += np.float32(FILM_GRAIN) * cover
        return self._coefficients(scipy.fft.rfft2(light)), grain

    def ice(self, grain: NDArray[np.float32] | None, rng: np.random.Generator) -> list[NDArray[np.float32]]:
        """Spline coefficients of the ice's contrast before the CTF: in phase and, where it is tilted, in quadrature."""
        exposure, scope = self.exposure, self.microscope
        power = np.exp(-0.5 * ICE_BFACTOR_A2 * self.k_1_A**2) / (1.0 + (ICE_LENGTH_A * self.k_1_A) ** 2)
        power[0, 0] = 0.0
        weight = weight_of_frames(self.k_1_A, exposure, scope.voltage_kV)
        # How strong it is does not depend on this movie's defocus, but on what is usual.
        usual_A = 0.5 * (scope.defocus_min_A + scope.defocus_max_A)
        shown = power * (weight * self._transfer((usual_A, usual_A, 0.0), 0.0)) ** 2
        # Columns stand for two, but for the first and, in even fields, the last.
        twice = np.full(len(self.kx), 2.0)
        twice[0] = 1.0
        twice[-1] = 1.0 + self.shape[1] % 2
        variance = float(np.sum(shown * twice)) / (self.shape[0] * self.shape[1])
        wanted = exposure.ice / exposure.electrons_per_px(scope.pixel_size_A)
        noise = scipy.fft.rfft2(rng.standard_normal(self.shape, dtype=np.float32))
        noise *= np.sqrt(power * (wanted / variance)).astype(np.float32)
        if grain is not None:
            noise = scipy.fft.rfft2(scipy.fft.irfft2(noise, s=self.shape) * grain)
        if not self.specimen.gradient_A_px.any():
            return [self._coefficients(noise)]
        return self._tilted(scipy.fft.irfft2(noise, s=self.shape))

    def _tilted(self, ice: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Ice whose defocus changes over the field: in strips of one defocus that fade into one another."""
        x, y = self._coordinates()
        gradient, centre = self.specimen.gradient_A_px, 0.5 * np.array(self.exposure.frame_px)
        below = (x - centre[0]) * gradient[0] + (y - centre[1]) * gradient[1]
        steps = max(1, math.ceil(float(np.ptp(below)) / STRIP_A))
        levels = np.linspace(below.min(), below.max(), steps + 1)
        in_phase, quadrature = np.zeros((2, *self.k_1_A.shape), np.complex64)
        for level in levels:
            share = np.maximum(0.0, 1.0 - np.abs(below - level) / (levels[1] - levels[0])).astype(np.float32)
            strip = scipy.fft.rfft2(ice * share)
            turn = np.float32(self.turn_per_A * level) * self.k_1_A**2
            in_phase += strip * np.cos(turn)
            quadrature += strip * np.sin(turn)
        return [self._coefficients(in_phase), self._coefficients(quadrature)]

    def _coefficients(self, transform: NDArray[np.complex64]) -> NDArray[np.float32]:
        along_y = warp.spline_response(self.shape[0])[:, None]
        along_x = warp.spline_response(self.shape[1])[: len(self.kx)]
        return scipy.fft.irfft2(transform / (along_y * along_x), s=self.shape)

    def lay_particles(
        self, channels: list[NDArray[np.float32]], particles: NDArray[np.complex64], local_px: NDArray[np.float64]
    ) -> None:
        """Add the particles' projections, (n, P) complex64, to the channels, moved by minus the local shifts (n, 2)."""
        truth, box_px = self.specimen.truth, self.microscope.box_px
        pixels = simulation.image_pixels(box_px)
        centre = self.specimen.centre_px - local_px + np.array(self.corner)
        whole = np.rint(centre).astype(np.int64)
        below_A = 0.5 * (truth.defocus_u_A + truth.defocus_v_A) - 0.5 * sum(self.specimen.defocus[:2])
        k2 = ((pixels.kx**2 + pixels.ky**2) / (box_px * self.microscope.pixel_size_A) ** 2).astype(np.float32)
        for start in range(0, len(centre), LAID_AT_ONCE):
            some = slice(start, start + LAID_AT_ONCE)
            moved = particles[some] * shift_phases(pixels, (centre - whole)[some], box_px, len(pixels.kx))
            turn = (self.turn_per_A * below_A[some, None]).astype(np.float32) * k2
            parts = [moved * np.cos(turn), moved * np.sin(turn)] if self.has_quadrature else [moved]
            for channel, part in zip(channels, parts, strict=True):
                images = fft.irfft2(unpack(pixels, part, box_px), box_px)
                field.lay(channel, images, whole[some] - box_px // 2)

    def passed_on(
        self, channels: list[NDArray[np.float32]], exposure_e_A2: float, whole_px: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """The contrast of a frame after an exposure, moved by minus a whole-frame shift."""
        transforms = [scipy.fft.rfft2(channel) for channel in channels]
        second = transforms[1] if self.has_quadrature else np.empty((0, 0), np.complex64)
        along_x, along_y = (
            np.exp(2j * np.pi * k * shift).astype(np.complex64)
            for k, shift in zip((self.kx, self.ky), whole_px, strict=True)
        )
        field.pass_on(
            transforms[0], second, self.transfer, self.quadrature, self.decay, exposure_e_A2, along_x, along_y
        )
        return scipy.fft.irfft2(transforms[0], s=self.shape)


def _inside(distance: NDArray[np.float32], radius: float | NDArray[np.float32], edge: float) -> NDArray[np.float32]:
    """1 within a radius, 0 without, over a soft edge."""
    return np.asarray(
        0.5 - 0.5 * np.tanh((distance - np.asarray(radius, np.float32)) / np.float32(edge)), dtype=np.float32
    )
