"""Curved sections of a Fourier volume: what an image shows where the specimen is too thick for a central slice.

Elastic scattering samples the specimen's transform on the Ewald sphere, of radius 1 / lambda. An image holds both
sidebands: with P = i exp(i gamma) = CTF + i cos(gamma), whose real part is the CTF,

    I(k) = 1/2 [P(k) V(k, -h z(k)) + conj(P(k)) V(k, h z(k))],   z(k) = lambda k^2 / 2

(DeRosier, Ultramicroscopy 81, 2000; Wolf, DeRosier & Grigorieff, Ultramicroscopy 106, 2006; Russo & Henderson,
Ultramicroscopy 187, 2018; the sphere by its paraboloid, which is right to k^4 lambda^3 / 8). The hand h is 1 or -1:
with 1 a part of the particle at z in the image's frame has the defocus of the particle less z, as RELION's correction
assumes; -1 is what its --reverse_curvature does. Data tell of the hand of the curvature only if that of the map is
known: what can be told is the product of both.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dcryo.kernels.gridding import TAPS
from dcryo.kernels.interpolation import read, write, write_complex
from dcryo.kernels.slices import BEFORE, locate, numbers, scale, scaled


def heights_px(kx: NDArray, ky: NDArray, box_px: int, pixel_size_A: float, wavelength_A: float) -> NDArray[np.float64]:
    """z(k) = lambda k^2 / 2 of frequencies (P,), all in Fourier pixels."""
    x, y = np.asarray(kx, dtype=np.float64), np.asarray(ky, dtype=np.float64)
    return np.asarray(wavelength_A / (2 * box_px * pixel_size_A) * (x * x + y * y))


def sideband_overlap(height_px: NDArray[np.float64], diameter_px: float, box_px: int) -> NDArray[np.float64]:
    """How far the two sidebands of a particle are one and the same, 1 to about 0, at heights (P,): the transform of a
    ball of that diameter at the distance 2 z between them."""
    x = 2 * np.pi * np.abs(height_px) * diameter_px / box_px
    near = np.maximum(x, 1e-2)
    return np.where(x < 1e-2, 1 - x * x / 10, 3 * (np.sin(near) - near * np.cos(near)) / near**3)


def extract(
    prepared: NDArray[np.complex64], rotations: NDArray, kx: NDArray, ky: NDArray, kz: NDArray, box_px: int
) -> NDArray[np.complex64]:
    """Values of a volume, from `slices.prepare`, at A.T @ (kx, ky, kz), (N, P); 0 beyond what is held of it.

    rotations: (N, 3, 3); kx, ky, kz: (P,) in Fourier pixels.
    """
    out = np.empty((len(rotations), len(kx)), dtype=np.complex64)
    points, reach = _points(kx, ky, kz), _reach(prepared.shape)
    _extract(numbers(prepared), prepared.shape, scaled(rotations, box_px), points, _within(points, reach, box_px), out)
    return out


def insert(
    accumulator: NDArray[np.float32], rotations: NDArray, values: NDArray[np.complex64], weights: NDArray[np.float32],
    kx: NDArray, ky: NDArray, kz: NDArray, box_px: int,
) -> None:  # fmt: skip
    """Add values and weights (N, P) to an accumulator as of `slices.insert`, in place: the adjoint of `extract`."""
    points, shape = _points(kx, ky, kz), accumulator.shape
    within = _within(points, _reach(shape), box_px)
    _insert(accumulator.reshape(-1), shape, scaled(rotations, box_px), values, weights, points, within)


def insert_values(
    volume: NDArray[np.complex64], rotations: NDArray, values: NDArray[np.complex64], kx: NDArray, ky: NDArray,
    kz: NDArray, box_px: int,
) -> None:  # fmt: skip
    """Add values (N, P) alone to a complex volume of the same shape, in place."""
    points = _points(kx, ky, kz)
    within = _within(points, _reach(volume.shape), box_px)
    _insert_values(numbers(volume), volume.shape, scaled(rotations, box_px), values, points, within)


def _points(kx: NDArray, ky: NDArray, kz: NDArray) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.stack([kx, ky, kz], axis=1), dtype=np.float32)


def _reach(shape: tuple[int, ...]) -> float:
    """Distance from the origin, in padded samples, up to which all taps are held."""
    return shape[2] - BEFORE - TAPS // 2


def _within(points: NDArray[np.float32], reach: float, box_px: int) -> NDArray[np.bool_]:
    return np.asarray(np.linalg.norm(points.astype(np.float64), axis=1) * scale(box_px) < reach - 1e-3)


@njit(nogil=True, cache=True)
def _extract(volume, shape, turns, points, within, out):  # type: ignore[no-untyped-def]
    stride = 2 * shape[2]
    for i in range(len(turns)):
        for p in range(len(points)):
            if not within[p]:
                out[i, p] = 0
                continue
            lowest, fx, fy, fz, sign = locate(shape, turns[i], points[p, 0], points[p, 1], points[p, 2])
            real, imaginary = read(volume, 2 * lowest, stride, stride * shape[1], fx, fy, fz)
            out[i, p] = complex(real, sign * imaginary)


@njit(nogil=True, cache=True)
def _insert(volume, shape, turns, values, weights, points, within):  # type: ignore[no-untyped-def]
    stride = 3 * shape[2]
    for i in range(len(turns)):
        for p in range(len(points)):
            if within[p]:
                lowest, fx, fy, fz, sign = locate(shape, turns[i], points[p, 0], points[p, 1], points[p, 2])
                value = values[i, p]
                write(
                    volume, 3 * lowest, stride, stride * shape[1], fx, fy, fz,
                    value.real, sign * value.imag, weights[i, p],
                )  # fmt: skip


@njit(nogil=True, cache=True)
def _insert_values(volume, shape, turns, values, points, within):  # type: ignore[no-untyped-def]
    stride = 2 * shape[2]
    for i in range(len(turns)):
        for p in range(len(points)):
            if within[p]:
                lowest, fx, fy, fz, sign = locate(shape, turns[i], points[p, 0], points[p, 1], points[p, 2])
                value = values[i, p]
                write_complex(volume, 2 * lowest, stride, stride * shape[1], fx, fy, fz, value.real, sign * value.imag)
