"""Particles of a known density: their true poses and optics drawn from a seed, and their images.

Every particle's random numbers are keyed by (seed, particle id), so a particle is the same to the bit
whatever chunk it is made in.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcryo.euler import matrix_from_euler
from dcryo.kernels import ewald, fft, slices
from dcryo.kernels.aberrations import odd_phase
from dcryo.kernels.ctf import ctf, wavelength_A
from dcryo.kernels.filters import radius_px
from dcryo.kernels.posterior import shift_phases
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import HalfPlane, half_plane, unpack
from dcryo.steps.aberrations import NO_ABERRATIONS, Aberrations

NOISE_FLOOR = 0.25


@dataclass(frozen=True)
class Microscope:
    """What all images share, and the spread of what they do not.

    noise_bfactor_A2: the noise power falls with spatial frequency k as f + (1 - f) exp(-B k^2 / 2), f being
    NOISE_FLOOR; 0 makes it white. astigmatism_A: standard deviation, over micrographs, of U - V before its
    sign is dropped. defocus_scatter_A: standard deviation of a particle's defocus about its micrograph's.
    preference: concentration kappa of the von Mises-Fisher distribution of viewing directions about the
    volume's z axis; 0 is uniform. aberrations: those of all images; hand: 1 or -1 for images that feel the
    curvature of the Ewald sphere (`kernels.ewald`), 0 for flat ones.
    """

    box_px: int
    pixel_size_A: float
    voltage_kV: float
    spherical_aberration_mm: float
    amplitude_contrast: float
    defocus_min_A: float
    defocus_max_A: float
    astigmatism_A: float
    defocus_scatter_A: float
    shift_sigma_px: float
    preference: float
    noise_bfactor_A2: float
    aberrations: Aberrations = NO_ABERRATIONS
    hand: int = 0

    def ctf(self, truth: "Truth", kx: NDArray, ky: NDArray, phase_shift_deg: float = 0.0) -> NDArray[np.float32]:
        """CTFs (n, P) of particles, with even aberrations, at frequencies (P,) in Fourier pixels."""
        return ctf(
            kx,
            ky,
            self.box_px,
            self.pixel_size_A,
            truth.defocus_u_A,
            truth.defocus_v_A,
            truth.defocus_angle_deg,
            self.voltage_kV,
            self.spherical_aberration_mm,
            self.amplitude_contrast,
            phase_shift_deg,
            even_phase_rad=self.aberrations.even_phase(kx, ky, self.box_px * self.pixel_size_A),
        )


@dataclass(frozen=True)
class Truth:
    """True parameters of n particles, first axis n; names, units and signs as in a particle table."""

    rotation: NDArray[np.float64]
    origin_A: NDArray[np.float64]
    defocus_u_A: NDArray[np.float64]
    defocus_v_A: NDArray[np.float64]
    defocus_angle_deg: NDArray[np.float64]
    half: NDArray[np.int8]

    def take(self, rows: slice) -> "Truth":
        """The particles at `rows`."""
        return Truth(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def micrograph_of(particles: int, micrographs: int) -> NDArray[np.int64]:
    """Micrograph of each particle, (N,) from 0: runs of equal length but for rounding."""
    return np.arange(particles, dtype=np.int64) * micrographs // particles


def draw_defocus(microscope: Microscope, seed: int, micrograph: int) -> tuple[float, float, float]:
    """Defocus U and V in A and the angle of U in degrees of a micrograph, its mean uniform between its limits."""
    rng = generator(seed, "micrograph", micrograph)
    spread = 0.5 * microscope.astigmatism_A * abs(rng.standard_normal())
    mean = rng.uniform(microscope.defocus_min_A, microscope.defocus_max_A)
    return mean + spread, mean - spread, rng.uniform(0.0, 180.0)


def draw_truth(microscope: Microscope, seed: int, micrograph: NDArray[np.int64], first: int = 0) -> Truth:
    """Draw the poses, shifts, defoci and half sets of N particles, whose micrographs are given, (N,).

    first: number of the first of them, by which their random numbers are keyed. Viewing directions follow a density
    proportional to exp(kappa cos tilt) (sampled as by Wood, Commun. Stat. Simul. 23, 1994), in-plane angles are
    uniform, shifts are normal. Halves are 1 and 2 in turn.
    """
    n = len(micrograph)
    numbers, rows = np.unique(micrograph, return_inverse=True)
    per_micrograph = np.array([draw_defocus(microscope, seed, number) for number in numbers.tolist()]).reshape(-1, 3)
    uniform, normal = np.empty((n, 3)), np.empty((n, 3))
    for i in range(n):
        rng = generator(seed, "pose", first + i)
        uniform[i], normal[i] = rng.random(3), rng.standard_normal(3)
    cos_tilt = _cos_tilt(uniform[:, 0], microscope.preference)
    scatter = microscope.defocus_scatter_A * normal[:, 2]
    defocus = per_micrograph[rows]
    return Truth(
        rotation=matrix_from_euler(360.0 * uniform[:, 1], np.rad2deg(np.arccos(cos_tilt)), 360.0 * uniform[:, 2]),
        origin_A=microscope.shift_sigma_px * microscope.pixel_size_A * normal[:, :2],
        defocus_u_A=defocus[:, 0] + scatter,
        defocus_v_A=defocus[:, 1] + scatter,
        defocus_angle_deg=defocus[:, 2],
        half=(1 + (first + np.arange(n)) % 2).astype(np.int8),
    )


def _cos_tilt(uniform: NDArray[np.float64], kappa: float) -> NDArray[np.float64]:
    """Quantile function of the von Mises-Fisher distribution's cosine on the sphere."""
    if kappa == 0.0:
        return 2.0 * uniform - 1.0
    return np.clip(1.0 + np.log(uniform + (1.0 - uniform) * np.exp(-2.0 * kappa)) / kappa, -1.0, 1.0)


def image_pixels(box_px: int) -> HalfPlane:
    """The Fourier pixels that images are made of: whole shells inside Nyquist."""
    return half_plane((box_px - 1) // 2)


def signal(prepared: NDArray[np.complex64], microscope: Microscope, truth: Truth) -> NDArray[np.complex64]:
    """Noise-free images of n particles as packed transforms (n, P) complex64, on `image_pixels`.

    prepared: the density as `slices.prepare` gives it. An image is the sum of the density along z, shifted so
    that the particle's centre lies at the box centre minus the origin, times the CTF, and aberrated as the microscope
    does it.
    """
    pixels, box = image_pixels(microscope.box_px), microscope.box_px
    shifts = shift_phases(pixels, -truth.origin_A / microscope.pixel_size_A, box, len(pixels.kx))
    if microscope.hand or microscope.aberrations != NO_ABERRATIONS:
        return _aberrated(prepared, microscope, truth, pixels) * shifts
    transforms = slices.extract(prepared, truth.rotation, pixels, box)
    transforms *= shifts
    transforms *= microscope.ctf(truth, pixels.kx, pixels.ky)
    return transforms


def _aberrated(
    prepared: NDArray[np.complex64], microscope: Microscope, truth: Truth, pixels: HalfPlane
) -> NDArray[np.complex64]:
    """What images of particles at the origin show at their pixels, (n, P): the specimen at the frequencies M k, on
    central slices or in two sidebands."""
    box, aberrations = microscope.box_px, microscope.aberrations
    x, y = np.array(aberrations.magnification) @ np.stack([pixels.kx, pixels.ky]).astype(np.float64)
    transfer = microscope.ctf(truth, x, y)
    n, wavelength = len(truth.rotation), wavelength_A(microscope.voltage_kV)
    curvature = np.full(n, microscope.hand * ewald.curvature_per_px(wavelength, box, microscope.pixel_size_A))
    if microscope.hand:
        P = transfer + 1j * microscope.ctf(truth, x, y, phase_shift_deg=90.0)
        transforms = P * ewald.extract(prepared, truth.rotation, -curvature, x, y, box)
        transforms += np.conj(P) * ewald.extract(prepared, truth.rotation, curvature, x, y, box)
        transforms /= 2
    else:
        transforms = transfer * ewald.extract(prepared, truth.rotation, curvature, x, y, box)
    width_A = box * microscope.pixel_size_A
    transforms *= np.exp(1j * odd_phase(aberrations.odd, x / width_A, y / width_A)).astype(np.complex64)
    return transforms


def pixel_variance(transforms: NDArray[np.complex64], box_px: int) -> NDArray[np.float64]:
    """Variance over the whole box of the images (n, D, D) of packed transforms (n, P), by Parseval; (n,)."""
    power = np.sum(np.abs(transforms[:, 1:].astype(np.complex128)) ** 2, axis=1)
    return 2.0 * power / float(box_px) ** 4


def noise_amplitude(microscope: Microscope) -> NDArray[np.float32]:
    """Filter (D, D // 2 + 1) that colours white noise, and leaves the mean variance of a pixel as it is."""
    box_px = microscope.box_px
    k_1_A = radius_px(box_px, 2).astype(np.float64) / (box_px * microscope.pixel_size_A)
    power = NOISE_FLOOR + (1.0 - NOISE_FLOOR) * np.exp(-0.5 * microscope.noise_bfactor_A2 * k_1_A**2)
    # Columns stand for two, but for the first and, in even boxes, the last.
    weight = np.full(power.shape[1], 2.0)
    weight[0] = 1.0
    if box_px % 2 == 0:
        weight[-1] = 1.0
    return np.sqrt(power * box_px**2 / np.sum(power * weight)).astype(np.float32)


def images(
    prepared: NDArray[np.complex64],
    microscope: Microscope,
    truth: Truth,
    first: int,
    seed: int,
    noise_sigma: float,
) -> NDArray[np.float32]:
    """Images (n, D, D) float32 of the particles numbered `first`, `first + 1`, ..., whose truth is given.

    noise_sigma: standard deviation of the noise of a pixel.
    """
    box_px = microscope.box_px
    transforms = unpack(image_pixels(box_px), signal(prepared, microscope, truth), box_px)
    if noise_sigma > 0.0:
        colour = noise_amplitude(microscope) * np.float32(noise_sigma)
        for i, transform in enumerate(transforms):
            rng = generator(seed, "noise", first + i)
            transform += colour * fft.rfft2(rng.standard_normal((box_px, box_px), dtype=np.float32))
    return fft.irfft2(transforms, box_px)
