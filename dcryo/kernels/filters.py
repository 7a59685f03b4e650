"""Fourier filters of volumes, and their rescaling and that of images to another box."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dcryo.kernels import fft
from dcryo.kernels.masks import cosine_edge


def radius_px(box_px: int, dimensions: int) -> NDArray[np.float32]:
    """|k| in Fourier pixels of each element of the half-complex transform: (D, D//2+1) or (D, D, D//2+1)."""
    full = np.fft.fftfreq(box_px, 1.0 / box_px).astype(np.float32)
    half = np.arange(box_px // 2 + 1, dtype=np.float32)
    squares = np.ix_(*[full**2] * (dimensions - 1), half**2)
    return np.sqrt(sum(squares[1:], start=squares[0]))


def lowpass(
    volume: NDArray[np.float32], pixel_size_A: float, resolution_A: float, width_shells: float = 2.0
) -> NDArray[np.float32]:
    """Low-pass filter a (D, D, D) volume -> the same shape, float32.

    The filter is 1/2 at `resolution_A`; its raised cosine edge is `width_shells` Fourier pixels wide, half of
    them on either side. A resolution beyond Nyquist keeps everything but what the edge touches.
    """
    box_px = volume.shape[0]
    cutoff = box_px * pixel_size_A / resolution_A
    edge = cosine_edge(radius_px(box_px, 3), cutoff - width_shells / 2.0, width_shells)
    return fft.irfftn(fft.rfftn(volume) * edge, box_px)


def rescale_volume(volume: NDArray[np.float32], box_px: int) -> NDArray[np.float32]:
    """Resample a (D, D, D) volume to `box_px` voxels across the same field of view, in Fourier space.

    Grey values and the position of the box centre (D // 2, odd or even) are kept; the voxel size changes by
    D / box_px. Frequencies at or beyond the smaller box's Nyquist are dropped, for they have no partner.
    """
    old_px = volume.shape[0]
    if old_px == box_px:
        return volume.astype(np.float32)
    resized = crop_transform(fft.rfftn(volume), old_px, box_px, 3)
    return fft.irfftn(resized * np.float32((box_px / old_px) ** 3), box_px)


def resample_volume(volume: NDArray[np.float32], ratio: float) -> NDArray[np.float32]:
    """Resample a (z, y, x) volume of any shape to voxels 1 / ratio of its own -> a cube, centre (n // 2) on centre.

    A box has a whole number of voxels before and after, so it is padded with zeros, to at most twice its size, to one
    for which both are whole to 2e-4, or as near as there is.
    """
    sizes = np.arange(max(volume.shape), 2 * max(volume.shape) + 1)
    errors = np.abs(np.round(sizes * ratio) / (sizes * ratio) - 1.0)
    padded_px = int(sizes[np.argmax(errors < max(2e-4, errors.min() * 1.001))])
    return rescale_volume(pad_or_crop(volume, padded_px), round(padded_px * ratio))


def rescale_images(images: NDArray[np.float32], box_px: int) -> NDArray[np.float32]:
    """Resample images (N, D, D) to `box_px` pixels across the same field of view; see `rescale_volume`."""
    old_px = images.shape[-1]
    if old_px == box_px:
        return images.astype(np.float32)
    resized = crop_transform(fft.rfft2(images), old_px, box_px, 2)
    return fft.irfft2(resized * np.float32((box_px / old_px) ** 2), box_px)


def crop_transform(
    transform: NDArray[np.complex64], old_px: int, new_px: int, dimensions: int
) -> NDArray[np.complex64]:
    """Crop or zero-pad the last 2 or 3 axes of a half-complex transform, from `old_px` to `new_px` pixels.

    Phases refer to the box centre, so none change, odd or even; nor do values, so the grey scale of what is
    transformed back changes by (old_px / new_px) ** dimensions.
    """
    last = (min(old_px, new_px) - 1) // 2
    kept: tuple[Any, ...] = np.ix_(*[np.arange(-last, last + 1)] * (dimensions - 1), np.arange(last + 1))
    shape = transform.shape[:-dimensions] + (new_px,) * (dimensions - 1) + (new_px // 2 + 1,)
    out = np.zeros(shape, dtype=transform.dtype)
    out[..., *kept] = transform[..., *kept]
    return out


def pad_or_crop(volume: NDArray[np.float32], box_px: int) -> NDArray[np.float32]:
    """Place a (z, y, x) volume of any shape in a cube of `box_px` voxels, centre (n // 2) on centre.

    What lies outside the cube is cut off; what the volume does not cover is 0.
    """
    out = np.zeros((box_px,) * 3, dtype=np.float32)
    source, target = [], []
    for size in volume.shape:
        offset = box_px // 2 - size // 2
        source.append(slice(max(0, -offset), min(size, box_px - offset)))
        target.append(slice(max(0, offset), min(box_px, size + offset)))
    out[tuple(target)] = volume[tuple(source)]
    return out
