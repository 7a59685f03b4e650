"""Particles with a domain that swings about a hinge, each by an angle of its own, and how a map shows the swing."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.optimize import minimize

from dcryo.data import mrc, star
from dcryo.data.particles import Particles
from dcryo.kernels import fft, slices
from dcryo.kernels.ctf import ctf
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.filters import lowpass, rescale_volume
from dcryo.kernels.phantom import Phantom, phantom
from dcryo.kernels.posterior import shift_phases
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import unpack
from dcryo.kernels.symmetry import operators
from dcryo.steps.simulation import Microscope, draw_truth, image_pixels, micrograph_of, pixel_variance

BODY_A = np.array([-15.0, 0.0, 0.0])
HINGE_A = np.array([20.0, 0.0, 0.0])
DOMAIN_A = np.array([50.0, 0.0, 0.0])
BODY_RADIUS_A, DOMAIN_RADIUS_A = 40.0, 28.0
MASK_DIAMETER_A = 170.0
_COMPARED_PX, _ANGLES_DEG = 48, np.arange(-24.0, 25.0, 4.0)


@dataclass(frozen=True)
class Swinging:
    """Where the particles are, and the angle of each (n,), in degrees."""

    star: Path
    angle_deg: np.ndarray
    body: np.ndarray
    domain: np.ndarray
    pixel_size_A: float


def turn(angle_deg: float) -> np.ndarray:
    """The rotation by which the domain swings, about the z axis through the hinge."""
    c, s = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


@functools.cache
def _atoms(radius_A: float, seed: int) -> Phantom:
    return phantom(operators("C1"), radius_A, seed)


@functools.lru_cache(maxsize=64)
def parts(box_px: int, pixel_size_A: float, angle_deg: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Densities (D, D, D) of the body, and of the domain turned by an angle about the hinge."""
    out = []
    for radius, centre, seed in ((BODY_RADIUS_A, BODY_A, 1), (DOMAIN_RADIUS_A, DOMAIN_A, 2)):
        atoms = _atoms(radius, seed)
        place = atoms.position_A + centre
        if seed == 2:
            place = (place - HINGE_A) @ turn(angle_deg).T + HINGE_A
        out.append(gaussian_density(place, atoms.amplitude, atoms.bfactor_A2, box_px, pixel_size_A))
    return out[0], out[1]


def make(
    out: Path,
    particles: int,
    box_px: int = 64,
    pixel_size_A: float = 3.5,
    snr: float = 0.1,
    range_deg: float = 15.0,
    contrast_sd: float = 0.0,
    shift_px: float = 0.0,
    seed: int = 5,
) -> Swinging:
    """Write particles.mrcs and truth.star; angles are uniform within +- range_deg, contrasts normal about 1."""
    microscope = Microscope(box_px, pixel_size_A, 300.0, 2.7, 0.1, 8000.0, 25000.0, 300.0, 0.0, shift_px, 0.0, 0.0)
    micrograph = micrograph_of(particles, max(1, particles // 50))
    truth = draw_truth(microscope, seed, micrograph)
    random = generator(seed, "swing", 0)
    angle = random.uniform(-range_deg, range_deg, particles)
    contrast = np.clip(random.normal(1, contrast_sd, particles), 0.3, None)
    body, domain = parts(box_px, pixel_size_A)
    pixels = image_pixels(box_px)
    prepared = [slices.prepare(one, pixels.shell_max) for one in (body, domain)]
    turns = np.stack([turn(one) for one in angle])
    moved = HINGE_A - turns @ HINGE_A
    optics = (truth.defocus_u_A, truth.defocus_v_A, truth.defocus_angle_deg)
    out.mkdir(parents=True, exist_ok=True)
    with mrc.StackWriter(out / "particles.mrcs", particles, box_px, pixel_size_A, "float16") as writer:
        sigma = None
        for first in range(0, particles, 250):
            some = slice(first, first + 250)
            pose = truth.rotation[some]
            of_body = slices.extract(prepared[0], pose, pixels, box_px)
            of_domain = slices.extract(prepared[1], pose @ turns[some], pixels, box_px)
            shift = np.einsum("nij,nj->ni", pose, moved[some])[:, :2] / pixel_size_A
            signal = of_body + of_domain * shift_phases(pixels, shift, box_px, len(pixels.kx))
            signal *= shift_phases(pixels, -truth.origin_A[some] / pixel_size_A, box_px, len(pixels.kx))
            signal *= ctf(pixels.kx, pixels.ky, box_px, pixel_size_A, *(one[some] for one in optics), 300.0, 2.7, 0.1)
            if sigma is None:
                sigma = np.sqrt(pixel_variance(signal, box_px).mean() / snr)
            images = fft.irfft2(unpack(pixels, signal * contrast[some, None].astype(np.float32), box_px), box_px)
            for number, image in enumerate(images, start=first):
                noise = generator(seed, "noise of the swinging", number).standard_normal(image.shape)
                image += (sigma * noise).astype(np.float32)
            writer.write(first, images / np.float32(sigma))
    table = Particles(
        columns={
            "image_path": np.full(particles, str(out / "particles.mrcs")),
            "image_index": np.arange(particles),
            "optics_row": np.zeros(particles, dtype=np.int32),
            "micrograph": np.array([f"micrograph{number + 1:05d}.mrc" for number in micrograph]),
            "defocus_u_A": truth.defocus_u_A,
            "defocus_v_A": truth.defocus_v_A,
            "defocus_angle_deg": truth.defocus_angle_deg,
            "rotation": truth.rotation,
            "origin_A": truth.origin_A,
            "half": truth.half,
        },
        optics={
            "name": np.array(["opticsGroup1"]),
            "group": np.array([1]),
            "voltage_kV": np.array([300.0]),
            "spherical_aberration_mm": np.array([2.7]),
            "amplitude_contrast": np.array([0.1]),
            "pixel_size_A": np.array([pixel_size_A]),
            "box_px": np.array([box_px]),
        },
    )
    star.write_particles(out / "truth.star", table, None)
    return Swinging(out / "truth.star", angle, body, domain, pixel_size_A)


def angle_in(volume: np.ndarray, pixel_size_A: float, resolution_A: float) -> float:
    """The angle of the domain against the body in a map, in degrees.

    Poses that were refined take a part of the swing for a turn of the whole. So the map is first turned about z, and
    moved across, until its body lies where it should; then the molecule with the domain at each of some angles is
    compared with it, in a sphere about the domain's way, and the best angle interpolated by a parabola.
    """
    box = min(len(volume), _COMPARED_PX)
    pixel = pixel_size_A * len(volume) / box
    shown = lowpass(rescale_volume(volume, box), pixel, resolution_A)
    fitted = _body_in_place(shown, pixel, resolution_A)
    way = _ball(box, DOMAIN_A / pixel, (DOMAIN_RADIUS_A + 12) / pixel)
    scores = [
        np.corrcoef(lowpass(sum(parts(box, pixel, angle)), pixel, resolution_A)[way], fitted[way])[0, 1]
        for angle in _ANGLES_DEG
    ]
    best = int(np.clip(np.argmax(scores), 1, len(scores) - 2))
    left, middle, right = scores[best - 1 : best + 2]
    step = _ANGLES_DEG[1] - _ANGLES_DEG[0]
    return float(_ANGLES_DEG[best] + step * np.clip((left - right) / (2 * (left - 2 * middle + right)), -1, 1))


def _body_in_place(shown: np.ndarray, pixel_size_A: float, resolution_A: float) -> np.ndarray:
    box = len(shown)
    body = lowpass(parts(box, pixel_size_A)[0], pixel_size_A, resolution_A)
    inside = _ball(box, BODY_A / pixel_size_A, (BODY_RADIUS_A + 2) / pixel_size_A)
    centre = np.full(3, box // 2)

    def moved(place: np.ndarray) -> np.ndarray:
        turned = turn(place[0])[::-1, ::-1]  # as (z, y, x)
        offset = centre + np.array([0, place[2], place[1]]) - turned @ centre
        return ndimage.affine_transform(shown, turned, offset, order=1)

    found = minimize(
        lambda place: -np.corrcoef(moved(place)[inside], body[inside])[0, 1], np.zeros(3), method="Nelder-Mead",
        options={"initial_simplex": [[0, 0, 0], [4, 0, 0], [0, 1, 0], [0, 0, 1]], "xatol": 0.05, "fatol": 1e-5},
    )  # fmt: skip
    return moved(found.x)


def _ball(box_px: int, centre_px: np.ndarray, radius_px: float) -> np.ndarray:
    axis = np.arange(box_px) - box_px // 2
    squares = np.ix_(*[(axis - place) ** 2 for place in centre_px[::-1]])
    return sum(squares) < radius_px**2
