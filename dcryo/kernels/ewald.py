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
from numpy.typing import ArrayLike, NDArray

from dcryo.kernels.gridding import TAPS
from dcryo.kernels.interpolation import before_read, before_write, read, write, write_complex
from dcryo.kernels.slices import AHEAD, BEFORE, CACHED, locate, numbers, scale, scaled


def curvature_per_px(wavelength_A: ArrayLike, box_px: int, pixel_size_A: ArrayLike) -> NDArray[np.float64]:
    """c in z = c k^2, all in Fourier pixels: lambda / (2 D a), of one number for all or one per particle."""
    return np.asarray(np.asarray(wavelength_A) / (2 * box_px * np.asarray(pixel_size_A)))


def sideband_overlap(height_px: NDArray[np.float64], diameter_px: float, box_px: int) -> NDArray[np.float64]:
    """How far the two sidebands of a particle are one and the same, from 1 to about 0, at heights z: the transform of a
    ball of that diameter at the distance 2 z between them, over that at 0."""
    x = 2 * np.pi * np.abs(height_px) * diameter_px / box_px
    far = np.maximum(x, 1e-2)
    return np.where(x < 1e-2, 1 - x * x / 10, 3 * (np.sin(far) - far * np.cos(far)) / far**3)


def extract(
    prepared: NDArray[np.complex64], rotations: NDArray, curvature: NDArray, kx: NDArray, ky: NDArray, box_px: int
) -> NDArray[np.complex64]:
    """Values of a volume, from `slices.prepare`, at A.T @ (kx, ky, c k^2), (N, P); 0 beyond what is held of it.

    rotations: (N, 3, 3); curvature: (N,), c in 1 / px; kx, ky: (P,) in Fourier pixels.
    """
    out = np.empty((len(rotations), len(kx)), dtype=np.complex64)
    _extract(numbers(prepared), prepared.shape, *_placed(rotations, curvature, kx, ky, prepared.shape, box_px), out)
    return out


def insert(
    accumulator: NDArray[np.float32], rotations: NDArray, curvature: NDArray, values: NDArray[np.complex64],
    weights: NDArray[np.float32], kx: NDArray, ky: NDArray, box_px: int,
) -> None:  # fmt: skip
    """Add values and weights (N, P) to an accumulator as of `slices.insert`, in place: the adjoint of `extract`."""
    shape = accumulator.shape
    _insert(
        accumulator.reshape(-1), shape, *_placed(rotations, curvature, kx, ky, shape, box_px), values, weights
    )  # fmt: skip


def insert_values(
    volume: NDArray[np.complex64], rotations: NDArray, curvature: NDArray, values: NDArray[np.complex64], kx: NDArray,
    ky: NDArray, box_px: int,
) -> None:  # fmt: skip
    """Add values (N, P) alone to a complex volume of the shape that `slices.prepare` gives, in place."""
    placed = _placed(rotations, curvature, kx, ky, volume.shape, box_px)
    _insert_values(numbers(volume), volume.shape, *placed, values)


def _placed(
    rotations: NDArray, curvature: NDArray, kx: NDArray, ky: NDArray, shape: tuple[int, ...], box_px: int
) -> tuple[NDArray, NDArray, NDArray, NDArray, np.float32]:
    """Rotations, curvatures and frequencies as kernels take them, and the square of the distance from the origin, in
    Fourier pixels, up to which all taps are held."""
    reach = (shape[2] - BEFORE - TAPS // 2) / scale(box_px) - 1e-3
    single = (np.ascontiguousarray(of, dtype=np.float32) for of in (curvature, kx, ky))
    return scaled(rotations, box_px), *single, np.float32(reach**2)  # type: ignore[return-value]


@njit(nogil=True, cache=True)
def _extract(volume, shape, turns, curvature, kx, ky, reach2, out):  # type: ignore[no-untyped-def]
    stride = 2 * shape[2]
    for i in range(len(turns)):
        for p in range(len(kx)):
            k2 = kx[p] * kx[p] + ky[p] * ky[p]
            z = curvature[i] * k2
            if k2 + z * z > reach2:
                out[i, p] = 0
                continue
            if len(volume) > CACHED:
                later = min(p + AHEAD, len(kx) - 1)
                if kx[later] * kx[later] + ky[later] * ky[later] + z * z < reach2:
                    lowest = locate(shape, turns[i], kx[later], ky[later], z)[0]
                    before_read(volume, 2 * lowest, stride, stride * shape[1])
            lowest, fx, fy, fz, sign = locate(shape, turns[i], kx[p], ky[p], z)
            real, imaginary = read(volume, 2 * lowest, stride, stride * shape[1], fx, fy, fz)
            out[i, p] = complex(real, sign * imaginary)


@njit(nogil=True, cache=True)
def _insert(volume, shape, turns, curvature, kx, ky, reach2, values, weights):  # type: ignore[no-untyped-def]
    stride = 3 * shape[2]
    for i in range(len(turns)):
        for p in range(len(kx)):
            k2 = kx[p] * kx[p] + ky[p] * ky[p]
            z = curvature[i] * k2
            if k2 + z * z > reach2:
                continue
            if len(volume) > CACHED:
                later = min(p + AHEAD, len(kx) - 1)
                if kx[later] * kx[later] + ky[later] * ky[later] + z * z < reach2:
                    lowest = locate(shape, turns[i], kx[later], ky[later], z)[0]
                    before_write(volume, 3 * lowest, stride, stride * shape[1])
            lowest, fx, fy, fz, sign = locate(shape, turns[i], kx[p], ky[p], z)
            value = values[i, p]
            write(
                volume, 3 * lowest, stride, stride * shape[1], fx, fy, fz, value.real, sign * value.imag, weights[i, p]
            )


@njit(nogil=True, cache=True)
def _insert_values(volume, shape, turns, curvature, kx, ky, reach2, values):  # type: ignore[no-untyped-def]
    stride = 2 * shape[2]
    for i in range(len(turns)):
        for p in range(len(kx)):
            k2 = kx[p] * kx[p] + ky[p] * ky[p]
            z = curvature[i] * k2
            if k2 + z * z > reach2:
                continue
            lowest, fx, fy, fz, sign = locate(shape, turns[i], kx[p], ky[p], z)
            value = values[i, p]
            write_complex(volume, 2 * lowest, stride, stride * shape[1], fx, fy, fz, value.real, sign * value.imag)
