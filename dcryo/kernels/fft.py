"""Discrete Fourier transforms of arrays whose origin is the box centre `D // 2`, zero frequency at the corner.

Transforms are unnormalised on the way forward, so that the transform of a projection (a sum along z) is the central
slice of the transform of the volume, with no factor between them.

FFTW plans are made with ESTIMATE: MEASURE times candidates and may choose another algorithm, and so other bits, from
one process to the next.
"""

import threading
from typing import NamedTuple

import numpy as np
import pyfftw
import scipy.fft

_ESTIMATE = ("FFTW_ESTIMATE",)


class _Plan(NamedTuple):
    source: np.ndarray
    result: np.ndarray
    execute: pyfftw.FFTW


class _ThreadPlans(threading.local):
    """Plans own their buffers, hence one set of plans per thread."""

    def __init__(self) -> None:
        self.of_box: dict[tuple[int, str], _Plan] = {}


_plans = _ThreadPlans()


def _image_plan(box_px: int, direction: str) -> _Plan:
    key = (box_px, direction)
    if key not in _plans.of_box:
        real = pyfftw.zeros_aligned((box_px, box_px), dtype=np.float32)
        half = pyfftw.zeros_aligned((box_px, box_px // 2 + 1), dtype=np.complex64)
        source, result = (real, half) if direction == "FFTW_FORWARD" else (half, real)
        plan = pyfftw.FFTW(source, result, axes=(0, 1), direction=direction, flags=_ESTIMATE, threads=1)
        _plans.of_box[key] = _Plan(source, result, plan)
    return _plans.of_box[key]


def rfft2(images: np.ndarray) -> np.ndarray:
    """Half-complex transforms of real images.

    images: (..., D, D) real. Returns (..., D, D // 2 + 1) complex64.
    """
    box = images.shape[-1]
    plan = _image_plan(box, "FFTW_FORWARD")
    flat = images.reshape(-1, box, box)
    out = np.empty((len(flat), box, box // 2 + 1), dtype=np.complex64)
    for image, transform in zip(flat, out, strict=True):
        _roll_into(plan.source, image, -(box // 2))
        plan.execute.execute()
        transform[:] = plan.result
    return out.reshape(*images.shape[:-1], box // 2 + 1)


def irfft2(transforms: np.ndarray, box_px: int) -> np.ndarray:
    """Real images of half-complex transforms, the inverse of `rfft2`.

    transforms: (..., D, D // 2 + 1) complex. Returns (..., D, D) float32.
    """
    plan = _image_plan(box_px, "FFTW_BACKWARD")
    flat = transforms.reshape(-1, box_px, box_px // 2 + 1)
    out = np.empty((len(flat), box_px, box_px), dtype=np.float32)
    for transform, image in zip(flat, out, strict=True):
        plan.source[:] = transform
        plan.execute.execute()
        _roll_into(image, plan.result, box_px // 2)
    out /= box_px * box_px
    return out.reshape(*transforms.shape[:-2], box_px, box_px)


def _roll_into(target: np.ndarray, source: np.ndarray, shift: int) -> None:
    """Copy source into target, rolled by `shift` along both axes, without a temporary array."""
    cut = shift % source.shape[0]
    target[cut:, cut:] = source[: len(source) - cut, : len(source) - cut]
    if cut:
        target[:cut, cut:] = source[-cut:, : len(source) - cut]
        target[cut:, :cut] = source[: len(source) - cut, -cut:]
        target[:cut, :cut] = source[-cut:, -cut:]


def rfftn(volume: np.ndarray) -> np.ndarray:
    """Half-complex transform of a real volume: (D, D, D) real to (D, D, D // 2 + 1) complex64."""
    box = volume.shape[0]
    source = pyfftw.empty_aligned(volume.shape, dtype=np.float32)
    source[:] = np.fft.ifftshift(volume)
    result = pyfftw.empty_aligned((box, box, box // 2 + 1), dtype=np.complex64)
    pyfftw.FFTW(source, result, axes=(0, 1, 2), flags=_ESTIMATE, threads=1).execute()
    return result


def irfftn(transform: np.ndarray, box_px: int) -> np.ndarray:
    """Real volume of a half-complex transform, the inverse of `rfftn`: (D, D, D // 2 + 1) to (D, D, D) float32."""
    source = pyfftw.empty_aligned(transform.shape, dtype=np.complex64)
    source[:] = transform
    result = pyfftw.empty_aligned((box_px,) * 3, dtype=np.float32)
    plan = pyfftw.FFTW(source, result, axes=(0, 1, 2), direction="FFTW_BACKWARD", flags=_ESTIMATE, threads=1)
    plan.execute()
    result /= box_px**3
    return np.fft.fftshift(result)


def _axis_phases(frequencies: np.ndarray, length: int, padded: int) -> np.ndarray:
    """Phases that move the origin of an axis of `length` samples from its first sample to its centre."""
    return np.exp(2j * np.pi * frequencies * (length // 2) / padded).astype(np.complex64)


def padded_transform(volume: np.ndarray, padded: int, half_width: int) -> np.ndarray:
    """The central cube of the transform of a volume in a zero-padded box, without ever holding the padded box.

    One axis is padded, transformed and cropped at a time, so that memory and work follow the cube that is kept.

    volume: (D, D, D) real; padded: samples of the padded box; half_width: highest frequency kept, in samples of the
    padded transform. Returns (2h+1, 2h+1, h+1) complex64, frequencies from -h (along x from 0) to h.
    """
    box = volume.shape[0]
    full, half = np.arange(-half_width, half_width + 1), np.arange(half_width + 1)
    phase_x, phase_y = _axis_phases(half, box, padded), _axis_phases(full, box, padded)[:, None]
    # The last kept frequencies may lie past the padded Nyquist, where the transform repeats itself: the real one by its
    # conjugate, backwards.
    along_x = scipy.fft.rfft(np.asarray(volume, dtype=np.float32), n=padded, axis=2)
    past = half > padded // 2
    lines = along_x[:, :, np.where(past, padded - half, half)]
    lines[:, :, past] = np.conj(lines[:, :, past])
    lines *= phase_x
    lines = scipy.fft.fft(lines, n=padded, axis=1, overwrite_x=True)[:, full % padded]
    lines *= phase_y
    lines = scipy.fft.fft(lines, n=padded, axis=0, overwrite_x=True)[full % padded]
    lines *= phase_y[:, None]
    return lines


def padded_inverse(transform: np.ndarray, padded: int, box_px: int) -> np.ndarray:
    """The central box of the real volume whose padded transform is zero outside the given cube.

    transform: (2h+1, 2h+1, h+1) complex64 as `padded_transform` returns; frequencies past the padded Nyquist are
    left out. Returns (D, D, D) float32, so that `padded_inverse(padded_transform(v, ...), ...)` is v low-passed.
    """
    half_width = transform.shape[2] - 1
    every = np.arange(-half_width, half_width + 1)
    inside = np.flatnonzero(np.abs(every) < padded / 2)
    full = every[inside]
    half = full[full >= 0]
    conj_y = np.conj(_axis_phases(full, box_px, padded))[:, None]
    conj_x = np.conj(_axis_phases(half, box_px, padded))
    kept = transform[inside[0] : inside[-1] + 1, inside[0] : inside[-1] + 1, : len(half)]
    lines = np.zeros((padded, *kept.shape[1:]), dtype=np.complex64)
    lines[full % padded] = kept * conj_y[:, None]
    kept = scipy.fft.ifft(lines, axis=0, overwrite_x=True)[:box_px]
    lines = np.zeros((box_px, padded, len(half)), dtype=np.complex64)
    lines[:, full % padded] = kept * conj_y
    kept = scipy.fft.ifft(lines, axis=1, overwrite_x=True)[:, :box_px]
    return np.ascontiguousarray(scipy.fft.irfft(kept * conj_x, n=padded, axis=2)[:, :, :box_px])
