"""Back-projection of images onto the two curved surfaces that they show, in place of a central slice.

With P = CTF + i cos(gamma), an image is 1/2 [P V(-h z) + conj(P) V(h z)] (`kernels.ewald`). Its adjoint puts
conj(P) / 2 and P / 2 times the image on the two surfaces. What one sideband adds to the other is left to the step from
a first map: the weights alone are those of two surfaces that share as much as a ball would, `sideband_overlap`, which
are CTF^2 where they are one surface and |P|^2 / 4 each where they are apart (as RELION's weights, from other
premises: Zivanov et al., eLife 7:e42166, 2018).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dcryo.kernels import ewald, fft, posterior
from dcryo.kernels.shells import HalfPlane, half_plane
from dcryo.steps.expectation import Batch

# Images whose sidebands are held at once.
_TOGETHER = 8


class Sidebands(NamedTuple):
    """P of n images, (n, P) complex64; curvature (n,) in 1 / px, times the hand; diameter_px of the particle."""

    P: np.ndarray
    curvature: np.ndarray
    diameter_px: float

    def take(self, rows: np.ndarray | slice) -> "Sidebands":
        return Sidebands(self.P[rows], self.curvature[rows], self.diameter_px)


def back_project(volume: np.ndarray, batch: Batch, sidebands: Sidebands, pixels: HalfPlane) -> np.ndarray:
    """Add images at the poses they came with to an accumulator, in place; see `expectation.back_project`.

    sidebands: of the images; `batch.ctf` is not looked at. Returns (n,) bool, False where an image or its CTF is not
    finite and was left out.
    """
    box = batch.images.shape[-1]
    usable = np.zeros(len(batch.images), dtype=bool)
    one = np.ones((_TOGETHER, len(pixels.kx)), dtype=np.float32)
    for some in _parts(len(batch.images)):
        images, norm, origin = batch.images[some], batch.norm[some], batch.origin_px[some]
        n = len(images)
        with np.errstate(invalid="ignore"):
            transforms = fft.rfft2(images)
        moved = posterior.weigh(
            transforms, norm, one[:n], one[:n, : pixels.shell_max + 1], origin, pixels, half_plane(box // 2)
        )
        own = sidebands.take(some)
        good = np.isfinite(moved.power).all(axis=1) & np.isfinite(own.P).all(axis=1)
        usable[some] = good
        _insert(volume, batch.rotation[some][good], moved.data[good], own.take(good), pixels, box)
    return usable


def _insert(
    volume: np.ndarray, rotation: np.ndarray, data: np.ndarray, sidebands: Sidebands, pixels: HalfPlane, box_px: int
) -> None:
    P, curvature, diameter_px = sidebands
    kx, ky = pixels.kx, pixels.ky
    square = (kx**2 + ky**2).astype(np.float64)
    overlap = ewald.sideband_overlap(curvature[:, None] * square, diameter_px, box_px).astype(np.float32)
    weights = np.float32(0.25) * (1 - overlap) * (P.real**2 + P.imag**2) + np.float32(0.5) * overlap * P.real**2
    ewald.insert(volume, rotation, -curvature, np.conj(P) * data / 2, weights, kx, ky, box_px)
    ewald.insert(volume, rotation, curvature, P * data / 2, weights, kx, ky, box_px)


def sections_back_projected(
    volume: np.ndarray, reference: np.ndarray, rotation: np.ndarray, sidebands: Sidebands, pixels: HalfPlane,
    box_px: int,
) -> None:  # fmt: skip
    """Add what `back_project` would add for images that a reference makes, in place; see
    `expectation.slices_back_projected`."""
    kx, ky = pixels.kx, pixels.ky
    for some in _parts(len(rotation)):
        (P, curvature, _), turn = sidebands.take(some), rotation[some]
        image = P * ewald.extract(reference, turn, -curvature, kx, ky, box_px)
        image += np.conj(P) * ewald.extract(reference, turn, curvature, kx, ky, box_px)
        image /= 4
        ewald.insert_values(volume, turn, -curvature, np.conj(P) * image, kx, ky, box_px)
        ewald.insert_values(volume, turn, curvature, P * image, kx, ky, box_px)


def _parts(n: int) -> Iterator[slice]:
    return (slice(first, first + _TOGETHER) for first in range(0, n, _TOGETHER))
