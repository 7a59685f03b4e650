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
    full = np.arange(-half_width, half_width + 1)
    half = np.arange(half_width + 1)
    # The last kept frequencies may lie past the padded Nyquist, where the transform repeats itself.
    rows = np.empty((box, len(full), half_width + 1), dtype=np.complex64)
    phase_x = _axis_phases(half, box, padded)
    phase_y = _axis_phases(full, box, padded)[:, None]
    for plane, out in zip(volume, rows, strict=True):
        along_x = _forward(plane, padded, axis=1)[:, half % padded] * phase_x
        out[:] = _forward(along_x, padded, axis=0)[full % padded] * phase_y
    result = np.empty((len(full), len(full), half_width + 1), dtype=np.complex64)
    for y in range(len(full)):
        result[:, y] = _forward(rows[:, y], padded, axis=0)[full % padded] * phase_y
    return result


def padded_inverse(transform: np.ndarray, padded: int, box_px: int) -> np.ndarray:
    """The central box of the real volume whose padded transform is zero outside the given cube.

    transform: (2h+1, 2h+1, h+1) complex64 as `padded_transform` returns; frequencies past the padded Nyquist are
    left out. Returns (D, D, D) float32, so that `padded_inverse(padded_transform(v, ...), ...)` is v low-passed.
    """
    half_width = transform.shape[2] - 1
    every = np.arange(-half_width, half_width + 1)
    inside = np.abs(every) < padded / 2
    full = every[inside]
    half = np.arange(half_width + 1)[: np.count_nonzero(full >= 0)]
    conj_y = np.conj(_axis_phases(full, box_px, padded))[:, None]
    conj_x = np.conj(_axis_phases(half, box_px, padded))
    columns = np.empty((box_px, len(full), len(half)), dtype=np.complex64)
    for position, y in enumerate(np.flatnonzero(inside)):
        columns[:, position] = _backward(transform[inside, y, : len(half)] * conj_y, full, padded, box_px)
    volume = np.empty((box_px, box_px, box_px), dtype=np.float32)
    for plane, out in zip(columns, volume, strict=True):
        rows = np.zeros((box_px, padded // 2 + 1), dtype=np.complex64)
        rows[:, half] = _backward(plane * conj_y, full, padded, box_px) * conj_x
        out[:] = pyfftw.interfaces.numpy_fft.irfft(rows, n=padded, axis=1, planner_effort="FFTW_ESTIMATE", threads=1)[
            :, :box_px
        ]
    return volume


def _forward(lines: np.ndarray, padded: int, axis: int) -> np.ndarray:
    """Full complex transform along one axis, zero-padded at its end."""
    return pyfftw.interfaces.numpy_fft.fft(
        lines.astype(np.complex64), n=padded, axis=axis, planner_effort="FFTW_ESTIMATE", threads=1
    )


def _backward(lines: np.ndarray, frequencies: np.ndarray, padded: int, keep: int) -> np.ndarray:
    """Inverse transform along the first axis of lines given at `frequencies`, first `keep` samples of it."""
    spread = np.zeros((padded, *lines.shape[1:]), dtype=np.complex64)
    spread[frequencies % padded] = lines
    return pyfftw.interfaces.numpy_fft.ifft(spread, axis=0, planner_effort="FFTW_ESTIMATE", threads=1)[:keep]
