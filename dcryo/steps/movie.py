"""What is done to one movie: its frames aligned, weighted by dose and summed.

The frames are asked for twice, one by one: to find bad pixels and the motion, and to sum them. In between there are
only frames that are binned, to pixels of about 2 A, which is all that an alignment needs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from dcryo.errors import InputError
from dcryo.kernels import motion
from dcryo.kernels.detector import add_frame, good_neighbours, hot_pixels, repair
from dcryo.kernels.dose import frame_weights
from dcryo.kernels.motion import Motion, Patches, band_of
from dcryo.kernels.randomness import generator
from dcryo.kernels.tiles import TileSums, frequency_px

_ALIGNED_PX_A = 2.2
"""Binned pixels for the alignment are at most this large."""
_WHOLE_FINEST_A, _PATCH_FINEST_A = 8.0, 4.5
"""Finest features that whole frames and patches are aligned by."""
_SEARCH_FINEST_A, _SEARCH_BFACTOR = 16.0, 6.0
_EDGE = 0.08
"""Part of a side, at either end, over which whole frames and patches fall to 0 before they are transformed."""
_PATCH_ELECTRONS = 2e4
"""What a patch must get in a frame; there are fewer patches where it would be less."""
_PATCH_PX = 32
_MEASURED_A = 8.0
_PREVIEW_PX, _PREVIEW_A = 400, 20.0


@dataclass(frozen=True)
class MovieSettings:
    """How a movie is corrected.

    key: names the movie, and with it its random numbers. bin: factor of the micrograph's pixel size. patches: along x
    and y. exposure_e_A2: of a frame, None where there are no weights. unweighted, odd_even: whether these sums are made
    too.
    """

    key: str
    pixel_size_A: float
    voltage_kV: float
    exposure_e_A2: float | None
    before_e_A2: float = 0.0
    bin: float = 1.0
    patches: tuple[int, int] = (5, 5)
    bfactor_A2: float = 150.0
    weighted: bool = True
    unweighted: bool = False
    odd_even: bool = False


@dataclass(frozen=True)
class Corrected:
    """A micrograph (ny, nx) and what was found on the way to it.

    unweighted; odd, even: sums of the frames 1, 3, ... and 2, 4, ..., weighted as the micrograph, which is their sum;
    None where they were not asked for. motion: in pixels of the movie. patch_centre_px: (P, 2), of the movie;
    patch_measured_px: (P, F, 2), shifts without the whole frames'. hot_px: (N, 2), x and y from 0. gains: what the
    local models gained (`kernels.motion.fit`). pixel_size_A: of the micrograph.
    """

    micrograph: NDArray[np.float32]
    unweighted: NDArray[np.float32] | None
    odd: NDArray[np.float32] | None
    even: NDArray[np.float32] | None
    motion: Motion
    patch_centre_px: NDArray[np.float64]
    patch_measured_px: NDArray[np.float64]
    hot_px: NDArray[np.int64]
    gains: list[float]
    pixel_size_A: float


def correct(
    frames: Callable[[], Iterable[np.ndarray]],
    count: int,
    shape: tuple[int, int],
    gain: NDArray[np.float32] | None,
    defects: NDArray[np.bool_] | None,
    settings: MovieSettings,
) -> Corrected:
    """Correct the motion of a movie of `count` frames (ny, nx).

    frames: gives them in turn, twice the same. gain: (ny, nx) that frames are multiplied by, 0 where a pixel is dead.
    defects: (ny, nx), True where a pixel is bad. Memory: a few frames, and of each frame its binned pixels and their
    transform. Raises InputError where all pixels are bad, or a frame has another shape.
    """
    factor = max(1, int(_ALIGNED_PX_A / settings.pixel_size_A))
    known: np.ndarray = np.zeros(shape, bool) if defects is None else defects
    if gain is not None:
        known = known | (gain == 0)
    total, binned = _read_through(frames, count, shape, gain, factor)
    hot = hot_pixels(total, known)
    bad = np.asarray(known | hot)
    if bad.all():
        raise InputError("all pixels are bad by gain and defects; expected at least some that are good")
    electrons = float(total[~bad].mean(dtype=np.float64)) / count
    if not np.isfinite(electrons) or not np.ptp(total[~bad]) > 0:
        raise InputError("the frames' sum is not finite, or the same everywhere; expected images, take the movie out")
    _repair_binned(binned, bad, factor, settings.key)
    found, patches, measured, gains = _align(binned, factor, shape, electrons, settings)
    del binned
    sums = _sum(frames, count, shape, gain, bad, found, settings)
    centre = (patches.place + 0.5) * np.array(shape[::-1])
    size_A = settings.pixel_size_A * (shape[1] / sums[0].shape[1])
    return Corrected(
        *sums, motion=found, patch_centre_px=centre, patch_measured_px=measured - found.frame_px,
        hot_px=np.argwhere(hot)[:, ::-1], gains=gains, pixel_size_A=size_A,
    )  # fmt: skip


def _read_through(
    frames: Callable[[], Iterable[np.ndarray]],
    count: int,
    shape: tuple[int, int],
    gain: NDArray[np.float32] | None,
    factor: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The sum of the frames as they are, and each frame binned."""
    total = np.zeros(shape, np.float32)
    binned = np.empty((count, shape[0] // factor, shape[1] // factor), np.float32)
    factors = np.empty((0, 0), np.float32) if gain is None else gain
    for number, frame in enumerate(frames()):
        if frame.shape != shape or number >= count:
            raise InputError(f"frame {number + 1} has shape {frame.shape}; expected {count} frames of {shape}")
        add_frame(_plain(frame), factors, total, binned[number], factor)
    return total, binned


def _plain(frame: np.ndarray) -> np.ndarray:
    """In a type and order that compiled code takes: float16 and other byte orders are not."""
    if frame.dtype == np.float16 or not frame.dtype.isnative:
        frame = frame.astype(np.float32)
    return np.ascontiguousarray(frame)


def _repair_binned(binned: NDArray[np.float32], bad: NDArray[np.bool_], factor: int, key: str) -> None:
    """Give binned pixels that hold a bad one the value of a neighbour."""
    _, ny, nx = binned.shape
    held: np.ndarray = np.any(bad[: ny * factor, : nx * factor].reshape(ny, factor, nx, factor), axis=(1, 3))
    if held.all():
        return
    neighbours = good_neighbours(held)
    for number, frame in enumerate(binned):
        repair(frame, neighbours, generator(0, f"binned {key}", number))


def _align(
    binned: NDArray[np.float32], factor: int, shape: tuple[int, int], electrons: float, settings: MovieSettings
) -> tuple[Motion, Patches, NDArray[np.float64], list[float]]:
    """The motion in pixels of the movie, the patches that it was found by, what they say one by one (P, F, 2), and what
    local models gain."""
    size_A = settings.pixel_size_A * factor
    rough = _whole_frames(binned, size_A, settings.bfactor_A2)
    patches = _cut_patches(binned, rough, factor, shape, electrons, settings)
    found, gains = motion.fit(patches, rough, settings.bfactor_A2)
    measured = motion.measured_px(patches, found, _MEASURED_A / size_A)
    return (
        Motion(found.frame_px * factor, found.coefficients * factor, found.terms),
        patches,
        (measured - measured[:, :1]) * factor,
        gains,
    )


def _whole_frames(binned: NDArray[np.float32], size_A: float, bfactor_A2: float) -> NDArray[np.float64]:
    """Shifts of whole frames, (F, 2) in binned pixels."""
    ny, nx = (_fast_length(side) for side in binned.shape[1:])
    top, left = (binned.shape[1] - ny) // 2, (binned.shape[2] - nx) // 2
    edge = _edges(ny, nx)
    band = band_of((ny, nx), size_A, _WHOLE_FINEST_A, bfactor_A2)
    coarse = band_of((ny, nx), size_A, _SEARCH_FINEST_A, _SEARCH_BFACTOR * bfactor_A2)
    data = np.empty((len(binned), 2, len(band.weight)), np.float32)
    coarse_data = np.empty((len(binned), 2, len(coarse.weight)), np.float32)
    for number, frame in enumerate(binned):
        part = frame[top : top + ny, left : left + nx]
        transform = scipy.fft.rfft2((part - part.mean()) * edge, workers=1)
        data[number], coarse_data[number] = band.pack(transform), coarse.pack(transform)
    start = Motion(motion.search(coarse, coarse_data), np.zeros((2, motion.COEFFICIENTS)))
    zero = np.zeros((1, len(binned), 2))
    whole = Patches(band, data[None], np.zeros((1, 2)), zero)
    return motion.climb(whole, start, 10)[0].frame_px


def _fast_length(side: int) -> int:
    """The largest length up to `side` that is quick to transform."""
    return next(length for length in range(side, 0, -1) if scipy.fft.next_fast_len(length, real=True) == length)


def _edges(ny: int, nx: int) -> NDArray[np.float32]:
    """1 inside, falling to 0 at the edges with raised cosines, (ny, nx)."""
    sides = []
    for side in (ny, nx):
        depth = np.minimum(np.arange(side) + 0.5, side - np.arange(side) - 0.5) / max(1.0, _EDGE * side)
        sides.append(0.5 - 0.5 * np.cos(np.pi * np.minimum(depth, 1.0)))
    return np.outer(*sides).astype(np.float32)


def _cut_patches(
    binned: NDArray[np.float32],
    rough: NDArray[np.float64],
    factor: int,
    shape: tuple[int, int],
    electrons: float,
    settings: MovieSettings,
) -> Patches:
    """Patches of the part of the specimen that all frames show."""
    whole = np.rint(rough).astype(np.int64)
    count, ny, nx = binned.shape
    # A frame shows at x - s what the first would show at x, on the scale where shifts have mean 0.
    low, high = np.maximum(whole.max(axis=0), 0), np.minimum(np.array([nx, ny]) + whole.min(axis=0), [nx, ny])
    room = np.maximum(high - low, 1)
    numbers = [
        _patches_along(int(side), asked, float(room.prod()), electrons * factor**2)
        for side, asked in zip(room, settings.patches, strict=True)
    ]
    sizes = [_fast_length(int(side) // number) for side, number in zip(room, numbers, strict=True)]
    corners = [
        np.rint(low[axis] + (np.arange(numbers[axis]) + 0.5) * room[axis] / numbers[axis] - sizes[axis] / 2).astype(int)
        for axis in (0, 1)
    ]
    width, height = sizes
    edge = _edges(height, width)
    band = band_of((height, width), settings.pixel_size_A * factor, _PATCH_FINEST_A, settings.bfactor_A2)
    where = [(x, y) for y in corners[1] for x in corners[0]]
    data = np.empty((len(where), count, 2, len(band.weight)), np.float32)
    for number, frame in enumerate(binned):
        for row, (x, y) in enumerate(where):
            x0 = int(np.clip(x - whole[number, 0], 0, nx - width))
            y0 = int(np.clip(y - whole[number, 1], 0, ny - height))
            part = frame[y0 : y0 + height, x0 : x0 + width]
            data[row, number] = band.pack(scipy.fft.rfft2((part - part.mean()) * edge, workers=1))
    centre_px = (np.array(where) + np.array([width, height]) / 2.0) * factor - 0.5
    place = (centre_px - whole[0] * factor) / np.array(shape[::-1]) - 0.5
    moved = np.broadcast_to(whole.astype(np.float64), (len(where), count, 2))
    return Patches(band, data, place, moved)


def _patches_along(side_px: int, asked: int, area_px: float, electrons: float) -> int:
    """How many patches along a side, so that each holds enough electrons and pixels."""
    most = np.sqrt(max(1.0, area_px * electrons / _PATCH_ELECTRONS))
    return max(1, min(asked, int(most), side_px // _PATCH_PX))


def _sum(
    frames: Callable[[], Iterable[np.ndarray]],
    count: int,
    shape: tuple[int, int],
    gain: NDArray[np.float32] | None,
    bad: NDArray[np.bool_],
    found: Motion,
    settings: MovieSettings,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """The micrograph, and the sums without weights, of odd and of even frames, where they are asked for."""
    neighbours = good_neighbours(bad)
    weights = _weights(count, settings)
    ones = np.ones_like(weights[0])
    sums = TileSums(shape, 1 + settings.unweighted + settings.odd_even)
    odd_number = 1 + settings.unweighted
    places = sums.tiling.centre_px / np.array(shape[::-1]) - 0.5
    shifts = found.at(places)
    for number, raw in enumerate(frames()):
        frame = _plain(raw).astype(np.float32)
        if gain is not None:
            frame *= gain
        repair(frame, neighbours, generator(0, f"repair {settings.key}", number))
        filters = {0: weights[number]}
        if settings.unweighted:
            filters[1] = ones
        if settings.odd_even and number % 2 == 0:
            filters[odd_number] = weights[number]
        sums.add(frame, shifts[:, number], filters)
    micrograph = _binned(sums.image(0), settings.bin)
    unweighted = _binned(sums.image(1), settings.bin) if settings.unweighted else None
    if not settings.odd_even:
        return micrograph, unweighted, None, None
    odd = _binned(sums.image(odd_number), settings.bin)
    return micrograph, unweighted, odd, micrograph - odd


def _weights(count: int, settings: MovieSettings) -> NDArray[np.float32]:
    """Filters of the frames in a tile's Fourier space, (F, T, T // 2 + 1)."""
    k = frequency_px()
    if not settings.weighted or settings.exposure_e_A2 is None:
        return np.broadcast_to(np.ones_like(k, dtype=np.float32), (count, *k.shape))
    return frame_weights(
        k / settings.pixel_size_A, count, settings.exposure_e_A2, settings.before_e_A2, settings.voltage_kV
    )


def _binned(image: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """An image with pixels `factor` times as large, by cropping its transform; grey values are means."""
    if factor == 1.0:
        return image
    ny, nx = image.shape
    new_y, new_x = (2 * round(side / factor / 2) for side in (ny, nx))
    transform = scipy.fft.rfft2(image, workers=1)
    last = new_y // 2
    kept = np.concatenate([transform[:last, : new_x // 2 + 1], transform[-last:, : new_x // 2 + 1]])
    # The Nyquist frequencies of the new pixels have lost their partners.
    kept[last] = 0.0
    kept[:, new_x // 2] = 0.0
    return np.asarray(
        scipy.fft.irfft2(kept, (new_y, new_x), workers=1) * np.float32(new_y * new_x / (ny * nx)), dtype=np.float32
    )


def preview(micrograph: NDArray[np.float32], pixel_size_A: float) -> NDArray[np.float16]:
    """A micrograph low-passed to 20 A, its longest side at most 400 pixels, with mean 0 and standard deviation 1."""
    side = max(micrograph.shape)
    small = _binned(micrograph, max(1.0, side / _PREVIEW_PX))
    size_A = pixel_size_A * side / max(small.shape)
    ky, kx = np.fft.fftfreq(small.shape[0], size_A)[:, None], np.fft.rfftfreq(small.shape[1], size_A)
    transform = scipy.fft.rfft2(small - small.mean()) * np.exp(-0.5 * (ky**2 + kx**2) * _PREVIEW_A**2)
    shown = scipy.fft.irfft2(transform, small.shape)
    deviation = float(shown.std())
    return (shown / deviation if deviation > 0 else shown).astype(np.float16)
