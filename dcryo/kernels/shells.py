"""Fourier pixels of an image as one packed axis, and averages over resolution shells.

A real image is determined by half of its Fourier plane. That half, sorted by shell, is the packed axis on which the
expectation step works: the first pixels are the lowest resolution, so a resolution limit is a prefix.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np


class Frequencies(Protocol):
    """Samples of the Fourier plane of an image: kx, ky (P,) in Fourier pixels, |k| at most shell_max + 1/2."""

    @property
    def shell_max(self) -> int: ...
    @property
    def kx(self) -> np.ndarray: ...
    @property
    def ky(self) -> np.ndarray: ...


@dataclass(frozen=True)
class HalfPlane:
    """Every frequency of the half plane (kx > 0, or kx = 0 and ky >= 0) with shell number up to `shell_max`.

    kx, ky: (P,) int32, frequency in Fourier pixels; shell: (P,) int32, |k| rounded half up;
    start: (shell_max + 2,) int64, shell s is `start[s]:start[s + 1]`.
    """

    shell_max: int
    kx: np.ndarray
    ky: np.ndarray
    shell: np.ndarray
    start: np.ndarray

    def within(self, shell: int) -> int:
        """Number of pixels up to and including a shell: the prefix of the packed axis at that resolution."""
        return int(self.start[min(shell, self.shell_max) + 1])

    @property
    def counts(self) -> np.ndarray:
        """Pixels in each shell, (shell_max + 1,) int64."""
        return np.diff(self.start)


@lru_cache(maxsize=32)
def half_plane(shell_max: int) -> HalfPlane:
    """The half plane up to a shell, sorted by shell and, within it, by polar angle."""
    ky, kx = np.mgrid[-shell_max : shell_max + 1, 0 : shell_max + 1]
    shell = shell_number(np.hypot(kx, ky))
    keep = (shell <= shell_max) & ((kx > 0) | (ky >= 0))
    kx, ky, shell = kx[keep], ky[keep], shell[keep]
    order = np.lexsort((np.arctan2(ky, kx), shell))
    kx, ky, shell = (array[order].astype(np.int32) for array in (kx, ky, shell))
    start = np.searchsorted(shell, np.arange(shell_max + 2)).astype(np.int64)
    for array in (kx, ky, shell, start):
        array.setflags(write=False)
    return HalfPlane(shell_max, kx, ky, shell, start)


def shell_number(radius: np.ndarray) -> np.ndarray:
    """Shell of a radius in Fourier pixels: rounded half up, as the field does (not to even)."""
    return np.floor(np.asarray(radius) + 0.5).astype(np.int32)


def pack(pixels: HalfPlane, transforms: np.ndarray) -> np.ndarray:
    """Packed pixels (..., P) complex64 of half-complex transforms (..., D, D // 2 + 1)."""
    return transforms[..., pixels.ky % transforms.shape[-2], pixels.kx]


def unpack(pixels: HalfPlane, packed: np.ndarray, box_px: int) -> np.ndarray:
    """Half-complex transforms (..., D, D // 2 + 1) of packed pixels (..., P), zero where no pixel is.

    Pixels that a box of `box_px` cannot hold (shell_max > D // 2) are an error of the caller.
    """
    if pixels.shell_max > box_px // 2:
        raise ValueError(f"shells up to {pixels.shell_max} do not fit a box of {box_px} px")
    out = np.zeros((*packed.shape[:-1], box_px, box_px // 2 + 1), dtype=np.complex64)
    out[..., pixels.ky % box_px, pixels.kx] = packed
    axis = pixels.kx == 0
    out[..., -pixels.ky[axis] % box_px, 0] = np.conj(packed[..., axis])
    return out


def shell_sums(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Sums over shells of packed values (..., P) real; `start` as in HalfPlane. Returns (..., S) float64."""
    return np.add.reduceat(values, start[:-1], axis=-1, dtype=np.float64)


@lru_cache(maxsize=8)
def volume_shells(box_px: int) -> np.ndarray:
    """Shell number of every voxel of a half-complex volume transform, (D, D, D // 2 + 1) int32."""
    full = np.fft.fftfreq(box_px, 1 / box_px)
    half = np.arange(box_px // 2 + 1)
    squared = full[:, None, None] ** 2 + full[None, :, None] ** 2 + half**2
    shells = shell_number(np.sqrt(squared))
    shells.setflags(write=False)
    return shells


def friedel_weights(box_px: int) -> np.ndarray:
    """How many voxels of the full transform each half-complex column stands for, (D // 2 + 1,) float64."""
    weights = np.full(box_px // 2 + 1, 2.0)
    weights[0] = 1
    if box_px % 2 == 0:
        weights[-1] = 1
    return weights


def resolution_A(shell: float, box_px: int, pixel_size_A: float) -> float:
    """Resolution of a shell in Angstrom; infinite for shell 0."""
    return float("inf") if shell == 0 else box_px * pixel_size_A / shell


def shell_at(resolution_A: float, box_px: int, pixel_size_A: float) -> int:
    """Last shell that is no finer than a resolution, at most that of the Nyquist frequency."""
    return min(int(box_px * pixel_size_A / resolution_A + 1e-6), box_px // 2)
