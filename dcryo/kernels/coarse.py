"""Micrographs at a coarse pixel size, and their filters: what picking looks at.

A micrograph does not go on beyond its edges as it does at the opposite ones, so filters take it as mirrored there. The
cosine transform (DCT-II) is the transform of just that, and an isotropic filter a product in it (S. A. Martucci, IEEE
Trans. Signal Process. 42, 1038, 1994): nothing has to be padded.
"""

from collections.abc import Callable

import numpy as np
import scipy.fft
from numpy.typing import NDArray

Image = NDArray[np.float32]


def coarse_shape(shape: tuple[int, int], factor: float) -> tuple[int, int]:
    """A shape (ny, nx) for a micrograph whose pixels are to be up to `factor` times as large, and hardly less.

    Its sides are those that are quickly transformed, which may make pixels a percent or two wider one way.
    """
    if factor < 1:
        return shape
    ny, nx = (min(size, scipy.fft.next_fast_len(max(8, round(size / factor)))) for size in shape)
    return ny, nx


def shrink(image: NDArray[np.floating], shape: tuple[int, int]) -> Image:
    """A micrograph (ny, nx) on a coarser grid of `shape`, at most its own, cropped in Fourier space -> float32.

    The first pixels' centres coincide, so that pixel i along an axis of n pixels is pixel i n' / n of the n' there
    were. Grey values are kept; frequencies at or beyond the new Nyquist are dropped.
    """
    ny, nx = shape
    old_y, old_x = image.shape
    if ny > old_y or nx > old_x:
        raise ValueError(f"cannot shrink {image.shape} to {shape}")
    if (ny, nx) == (old_y, old_x):
        return np.asarray(image, dtype=np.float32)
    # Columns beyond are dropped between the axes: most of the second transform is never done.
    last_x, last_y = (nx - 1) // 2, (ny - 1) // 2
    lines = scipy.fft.rfft(np.asarray(image, dtype=np.float32), axis=1)[:, : last_x + 1]
    lines = scipy.fft.fft(lines, axis=0)
    out = np.zeros((ny, nx // 2 + 1), dtype=np.complex64)
    out[: last_y + 1, : last_x + 1] = lines[: last_y + 1]
    if last_y:
        out[-last_y:, : last_x + 1] = lines[-last_y:]
    out *= np.float32(ny * nx / (old_y * old_x))
    return scipy.fft.irfft2(out, s=shape).astype(np.float32)


def cosine_transform(image: Image) -> Image:
    """Transform (ny, nx) of an image mirrored at its edges, float32."""
    return scipy.fft.dctn(image, type=2)


def filtered(transform: Image, response: Image) -> Image:
    """The image of a cosine transform times a filter's `response` (ny, nx), at k / 2 cycles per side."""
    return scipy.fft.idctn(transform * response, type=2)


def gaussian_response(shape: tuple[int, int], sigma_px: float) -> Image:
    """Response of a Gaussian of unit sum, (ny, nx) float32."""
    decay = np.float32(-2.0 * np.pi**2 * sigma_px**2)
    ky, kx = (np.exp(decay * (np.arange(size, dtype=np.float32) / (2 * size)) ** 2) for size in shape)
    return ky[:, None] * kx


def smooth(image: Image, sigma_px: float) -> Image:
    """The image under a Gaussian, mirrored at its edges."""
    return filtered(cosine_transform(image), gaussian_response(image.shape, sigma_px))


def local_mean(weight: Image, sigma_px: float) -> Callable[[Image], Image]:
    """What takes an image (ny, nx) to its mean under a Gaussian over what has `weight` (ny, nx) in 0..1 alone.

    The mean is 0 where nothing near has any.
    """
    if (weight == 1.0).all():
        return lambda image: smooth(image, sigma_px)
    total = smooth(weight, sigma_px)
    factor = np.where(total > 1e-3, 1.0 / np.maximum(total, 1e-3), 0.0).astype(np.float32)
    return lambda image: smooth(image * weight, sigma_px) * factor


def kernel_response(kernel: Image, shape: tuple[int, int]) -> Image:
    """Response (ny, nx) of a kernel (2n + 1, 2n + 1) that is even in x and in y, about its central pixel."""
    reach = kernel.shape[0] // 2
    offset = np.arange(-reach, reach + 1)
    waves = [np.cos(np.outer(np.arange(size), offset) * (np.pi / size)).astype(np.float32) for size in shape]
    return waves[0] @ np.asarray(kernel, dtype=np.float32) @ waves[1].T
