"""From sums of weighted slices to a map: the maximisation step.

The maximum a posteriori volume under Gaussian noise and a Gaussian prior of power tau^2 per shell is, voxel by voxel,

    V = sum C X / v / (sum C^2 / v + 1 / tau^2)          (Scheres 2012, eq. 8)

a Wiener filter. Both sums come from `slices.insert`, one accumulator of (real, imaginary, weight) per voxel.
"""

import functools

import numpy as np
from numba import njit
from scipy import ndimage

from dcryo.kernels import fft
from dcryo.kernels.gridding import envelope, padded_px
from dcryo.kernels.interpolation import read
from dcryo.kernels.masks import sphere
from dcryo.kernels.slices import BEFORE, half_width, locate, numbers, scale

# Voxels that hardly any slice touched are not divided by almost nothing: this part of the mean weight is added to all.
_WEIGHT_FLOOR = 1e-3
_CORNER_EDGE_PX = 3.0
# An FSC of exactly one would ask for no regularisation at all.
_FSC_MAX = 0.999
# The envelope of a symmetrised map is smooth: it is computed on a grid of so many points a side.
_ENVELOPE_POINTS = 25


def complete(accumulator: np.ndarray, operators: np.ndarray) -> np.ndarray:
    """Sums of all slices, their Friedel mates and their symmetry mates.

    accumulator: volume_shape + (3,) float32; operators: (G, 3, 3), the group, identity included. Returns a new array of
    the same shape. Mates that fall between grid points are read with the gridding kernel; `maximise` undoes what that
    does.
    """
    friedel = accumulator.copy()
    zero = accumulator[:, :, BEFORE]
    friedel[:, :, BEFORE] += zero[::-1, ::-1] * _CONJUGATE
    friedel[:, :, BEFORE + 1] += accumulator[::-1, ::-1, BEFORE - 1] * _CONJUGATE
    friedel[:, :, BEFORE - 1] = friedel[::-1, ::-1, BEFORE + 1] * _CONJUGATE
    if len(operators) == 1:
        return friedel
    out = np.zeros_like(friedel)
    values = np.ascontiguousarray(friedel[..., :2]).view(np.complex64)[..., 0]
    weights = friedel[..., 2].astype(np.complex64)
    turns = np.ascontiguousarray(np.swapaxes(operators, 1, 2), dtype=np.float32)
    _symmetrise(numbers(values), numbers(weights), values.shape, turns, _on_grid(operators), out)
    return out


def _on_grid(operators: np.ndarray) -> np.ndarray:
    """Whether an operator takes grid points onto grid points, (G,) bool."""
    return np.all(np.abs(operators - np.round(operators)) < 1e-9, axis=(1, 2))


_CONJUGATE = np.array([1, -1, 1], dtype=np.float32)


@njit(nogil=True, cache=True, fastmath=True)
def _symmetrise(values, weights, shape, turns, on_grid, out):  # type: ignore[no-untyped-def]
    half = shape[0] // 2
    # Taps, two above the grid point below, must stay inside the cube.
    reach = np.float32((half - 1) * (half - 1) - 1)
    stride = 2 * shape[2]
    centre = (shape[1] + 1) * shape[2] + 1  # from the lowest tap to the second on each axis
    for iz in range(shape[0]):
        kz = np.float32(iz - half)
        for iy in range(shape[1]):
            ky = np.float32(iy - half)
            for ix in range(BEFORE, shape[2]):
                kx = np.float32(ix - BEFORE)
                if kx * kx + ky * ky + kz * kz > reach:
                    continue
                for g in range(len(turns)):
                    lowest, fx, fy, fz, sign = locate(shape, turns[g], kx, ky, kz)
                    if on_grid[g]:
                        place = 2 * (lowest + centre)
                        real, imaginary, weight = values[place], values[place + 1], weights[place]
                    else:
                        real, imaginary = read(values, 2 * lowest, stride, stride * shape[1], fx, fy, fz)
                        weight, _ = read(weights, 2 * lowest, stride, stride * shape[1], fx, fy, fz)
                    out[iz, iy, ix, 0] += real
                    out[iz, iy, ix, 1] += sign * imaginary
                    out[iz, iy, ix, 2] += weight


@functools.lru_cache(maxsize=4)
def _envelope(box_px: int, group: bytes) -> np.ndarray:
    """What gridding, and reading symmetry mates, multiply a map by: (D, D, D) float32, 1 at the centre.

    group: the operators as bytes of float64. The envelope of the kernel is not isotropic, so that mates differ.
    """
    operators = np.frombuffer(group).reshape(-1, 3, 3)
    padded = padded_px(box_px)
    if _on_grid(operators).all():
        along = envelope(np.arange(box_px) - box_px // 2, padded)
        return (along[:, None, None] * along[:, None] * along / envelope(np.zeros(1), padded) ** 3).astype(np.float32)
    reach = 0.75 * box_px
    table = np.linspace(0, reach * np.sqrt(3), 1000)
    along = envelope(table, padded) / envelope(np.zeros(1), padded)
    axis = np.linspace(-reach, reach, _ENVELOPE_POINTS)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij")[::-1], axis=-1)
    of_mate = [np.prod(np.interp(np.abs(points @ g.T), table, along), axis=-1) for g in operators]
    coarse = np.mean([e if exact else e**2 for e, exact in zip(of_mate, _on_grid(operators), strict=True)], axis=0)
    place = (np.arange(box_px) - box_px // 2 + reach) * (_ENVELOPE_POINTS - 1) / (2 * reach)
    return ndimage.map_coordinates(coarse, np.meshgrid(place, place, place, indexing="ij")).astype(np.float32)


def mean_weights(accumulator: np.ndarray, shell_max: int, box_px: int) -> np.ndarray:
    """Mean of the weights over the voxels of each shell, (shell_max + 1,) float64."""
    return _mean_weights(accumulator, shell_max, 1 / scale(box_px))


@njit(nogil=True, cache=True)
def _mean_weights(accumulator, shell_max, spacing):  # type: ignore[no-untyped-def]
    sums, counts = np.zeros(shell_max + 1), np.zeros(shell_max + 1)
    half = accumulator.shape[0] // 2
    for iz in range(accumulator.shape[0]):
        for iy in range(accumulator.shape[1]):
            across = (iz - half) ** 2 + (iy - half) ** 2
            for x in range(accumulator.shape[2] - BEFORE):
                shell = int(np.sqrt(across + x * x) * spacing + 0.5)
                if shell <= shell_max:
                    sums[shell] += accumulator[iz, iy, x + BEFORE, 2]
                    counts[shell] += 1
    return sums / np.maximum(counts, 1)


def prior_precision(fsc: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 / tau^2 per shell from an FSC between halves: tau^2 = SSNR / mean weight, SSNR = FSC / (1 - FSC).

    fsc, weights: (S,). Where the FSC is not positive the prior is that of an FSC of 1e-3: all but empty.
    (Scheres 2012, section 2.4.)
    """
    bounded = np.clip(fsc, 1e-3, _FSC_MAX)
    return weights * (1 - bounded) / bounded


def weight_floor(weights: np.ndarray) -> np.ndarray:
    """Precision per shell, (S,), for a map without a filter, from the mean weights (S,)."""
    return _WEIGHT_FLOOR * weights


def maximise(
    accumulator: np.ndarray,
    reference: np.ndarray | None,
    precision: np.ndarray,
    operators: np.ndarray,
    box_px: int,
) -> np.ndarray:
    """The map that maximises the posterior, from an accumulator that `complete` returned.

    Where the accumulator sums images less the slices of a reference (D, D, D), what it says is by how much the map
    differs from that: the step from the reference is (sum of innovations - reference / tau^2) / (weights + 1 / tau^2).
    At a map that such steps no longer change, the normal equations of the least-squares problem hold exactly, though
    the kernel's averages, which the division takes for values, are not quite that.

    precision: (shell_max + 1,) 1 / tau^2 per shell. Frequencies past shell_max stay those of the reference, those that
    nothing touched too unless there is a prior, which empties them; the corners outside the sphere that the box holds
    are zero. Near its edge, where the envelope is small, errors are divided by it: references should be masked.
    Returns (D, D, D) float32.
    """
    shell_max = len(precision) - 1
    if half_width(shell_max, box_px) + 1 + BEFORE != accumulator.shape[2]:
        raise ValueError(f"precision for {shell_max} shells does not fit an accumulator {accumulator.shape}")
    along, padded = _envelope(box_px, _key(operators)), padded_px(box_px)
    if reference is None:
        step = np.zeros((*accumulator.shape[:2], accumulator.shape[2] - BEFORE), dtype=np.complex64)
    else:
        step = fft.padded_transform(reference * along, padded, accumulator.shape[0] // 2)
    _step(accumulator, precision.astype(np.float32), 1 / scale(box_px), step)
    volume = fft.padded_inverse(step, padded, box_px)
    volume /= along
    if reference is not None:
        volume += reference
    # Views turn the corners of the box out of their images, and the correction makes most of the noise there.
    volume *= _corners(box_px)
    return volume


@njit(nogil=True, cache=True)
def _step(accumulator, precision, spacing, step):  # type: ignore[no-untyped-def]
    """The step of `maximise` in Fourier space, in place of the transform of the reference."""
    half = accumulator.shape[0] // 2
    for iz in range(accumulator.shape[0]):
        for iy in range(accumulator.shape[1]):
            across = (iz - half) ** 2 + (iy - half) ** 2
            for x in range(step.shape[2]):
                shell = int(np.sqrt(across + x * x) * spacing + 0.5)
                change = np.complex64(0)
                if shell < len(precision):
                    real, imaginary, weight = accumulator[iz, iy, x + BEFORE]
                    prior = precision[shell]
                    if weight + prior > 0:
                        change = (complex(real, imaginary) - prior * step[iz, iy, x]) / (weight + prior)
                step[iz, iy, x] = change


@functools.lru_cache(maxsize=4)
def _corners(box_px: int) -> np.ndarray:
    return sphere(box_px, box_px, _CORNER_EDGE_PX)


def rebased(accumulator: np.ndarray, change: np.ndarray, operators: np.ndarray) -> np.ndarray:
    """An accumulator as it would be if its reference were less by a small change (D, D, D): a new array."""
    box = len(change)
    moved = fft.padded_transform(change * _envelope(box, _key(operators)), padded_px(box), accumulator.shape[0] // 2)
    out = accumulator.copy()
    out[:, :, BEFORE:, 0] += out[:, :, BEFORE:, 2] * moved.real
    out[:, :, BEFORE:, 1] += out[:, :, BEFORE:, 2] * moved.imag
    return out


def _key(operators: np.ndarray) -> bytes:
    return np.ascontiguousarray(operators, dtype=np.float64).tobytes()
