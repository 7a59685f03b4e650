"""Simulated micrographs with known particles, carbon and contamination, for the tests of picking."""

from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from scipy.spatial.transform import Rotation

from dcryo.kernels import fft
from dcryo.kernels.ctf import ctf
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.phantom import phantom
from dcryo.kernels.shells import half_plane, unpack
from dcryo.kernels.slices import extract, prepare

PIXEL_A, DIAMETER_A, BOX = 5.0, 160.0, 48
VOLTAGE_KV, CS_MM, AMPLITUDE, DEFOCUS_A = 300.0, 2.7, 0.1, 15000.0
SHAPE = (460, 560)


@dataclass
class Simulated:
    """image: (y, x), particles dark; at_px: (n, 2) where they are; spoilt: (y, x) carbon and contamination."""

    image: np.ndarray
    at_px: np.ndarray
    rotations: np.ndarray
    spoilt: np.ndarray

    @property
    def good_px(self) -> np.ndarray:
        """Particles on clean ice, a radius or more from what is not."""
        far = scipy.ndimage.distance_transform_edt(~np.pad(self.spoilt, 1))[1:-1, 1:-1] if self.spoilt.any() else None
        x, y = np.rint(self.at_px).astype(int).T
        return self.at_px if far is None else self.at_px[far[y, x] > DIAMETER_A / PIXEL_A / 2]

    def in_spoilt(self, at_px) -> int:
        """How many of some positions lie on carbon or contamination."""
        x, y = np.rint(at_px).astype(int).T
        return int(self.spoilt[y, x].sum())


def volume(group=None) -> np.ndarray:
    """A pseudo-protein of about the diameter, (BOX, BOX, BOX)."""
    atoms = phantom(np.eye(3)[None] if group is None else group, DIAMETER_A / 2.3)
    return gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, BOX, PIXEL_A)


def positions(rng, count, shape, least_px) -> np.ndarray:
    """Up to `count` random whole pixels no nearer to one another than that, nor to the edges than half of it."""
    found = np.zeros((0, 2))
    for _ in range(60 * count):
        at = np.rint(rng.uniform(least_px / 2, np.array(shape[::-1]) - least_px / 2))
        if len(found) < count and (len(found) == 0 or np.hypot(*(found - at).T).min() >= least_px):
            found = np.vstack([found, at])
    return found


def simulated(count, snr, seed=0, carbon=False, blobs=0, shape=SHAPE, spacing=1.0) -> Simulated:
    """snr: mean variance within the particles' boxes, after the CTF, over that of the noise; without particles 1."""
    rng = np.random.Generator(np.random.Philox(seed))
    at = positions(rng, count, shape, spacing * DIAMETER_A / PIXEL_A)
    rotations = Rotation.random(max(1, len(at)), rng=rng).as_matrix()[: len(at)]
    signal = np.zeros((shape[0] + BOX, shape[1] + BOX))
    if len(at):
        plane = half_plane(BOX // 2)
        slices = unpack(plane, extract(prepare(volume(), BOX // 2), rotations, plane, BOX), BOX)
        corners = at.astype(int)  # + BOX // 2 for the margin, - BOX // 2 for the box's centre
        for (x, y), image in zip(corners, fft.irfft2(slices, BOX), strict=True):
            signal[y : y + BOX, x : x + BOX] += image
        signal = times_ctf(signal)
        within = [signal[y : y + BOX, x : x + BOX].var() for x, y in corners]
        signal *= np.sqrt(snr / np.mean(within))
    image = signal[BOX // 2 : -BOX // 2, BOX // 2 : -BOX // 2] + rng.normal(0, 1, shape)
    y, x = np.mgrid[: shape[0], : shape[1]]
    image += 0.6 * x / shape[1]  # thicker ice on one side
    spoilt = np.zeros(shape, bool)
    if carbon:
        depth = (x + 0.5 * y - 0.85 * shape[1]) / np.hypot(1, 0.5)
        spoilt |= depth > 0
        image += 3 / (1 + np.exp(-depth)) - 2 * np.exp(-((depth + 4) ** 2) / 10)
        image += (depth > 0) * 6 * scipy.ndimage.gaussian_filter(rng.normal(0, 1, shape), 1.2)
    for centre in positions(rng, blobs, shape, 0.2 * min(shape)):
        distance = np.hypot(x - centre[0], y - centre[1]) - rng.uniform(8, 22)
        spoilt |= distance < 1
        image += 7 / (1 + np.exp(np.clip(distance, -50, 50)))
    return Simulated((1000 - 20 * image).astype(np.float32), at, rotations, spoilt)


def times_ctf(image) -> np.ndarray:
    ny, nx = image.shape
    scale = 4096  # of the grid on which whole frequencies are asked for
    ky, kx = np.meshgrid(np.fft.fftfreq(ny) * scale, np.fft.rfftfreq(nx) * scale, indexing="ij")
    values = ctf(kx.ravel(), ky.ravel(), scale, PIXEL_A, DEFOCUS_A, DEFOCUS_A, 0.0, VOLTAGE_KV, CS_MM, AMPLITUDE)
    return np.fft.irfft2(np.fft.rfft2(image) * values.reshape(kx.shape), s=image.shape)
