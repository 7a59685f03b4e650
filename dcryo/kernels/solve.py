"""From sums of weighted slices to a map: the maximisation step.

The maximum a posteriori volume under Gaussian noise and a Gaussian prior of power tau^2 per shell is, voxel by voxel,

    V = sum C X / v / (sum C^2 / v + 1 / tau^2)          (Scheres 2012, eq. 8)

a Wiener filter. Both sums come from `slices.insert`, one accumulator of (real, imaginary, weight) per voxel.
"""

import numpy as np
from numba import njit

from dcryo.kernels import fft
from dcryo.kernels.masks import sphere
from dcryo.kernels.shells import shell_number
from dcryo.kernels.slices import PADDING, gridding_correction, half_width

# Voxels that hardly any slice touched are not divided by almost nothing: this part of the mean weight is added to all.
_WEIGHT_FLOOR = 1e-3
_CORNER_EDGE_PX = 3.0
# An FSC of exactly one would ask for no regularisation at all.
_FSC_MAX = 0.999


def complete(accumulator: np.ndarray, operators: np.ndarray) -> np.ndarray:
    """Sums of all slices, their Friedel mates and their symmetry mates, with evened weights.

    accumulator: volume_shape + (3,) float32; operators: (G, 3, 3), the group, identity included. Returns a new array of
    the same shape. Mates off the grid are read by trilinear interpolation.

    A map is cropped from the padded box, which averages the sums over neighbouring voxels. A voxel must then be divided
    by a weight that makes the average of the divided weights even; such weights are found by iteration (Jackson et al.
    1991; Pipe & Menon 1999). Two rounds are made: more would follow the noise of single voxels' weights.
    """
    friedel = accumulator.copy()
    plane = accumulator[:, :, 0]
    mates = np.roll(plane[::-1, ::-1], (1, 1), axis=(0, 1))
    friedel[:, :, 0, 0] += mates[..., 0]
    friedel[:, :, 0, 1] -= mates[..., 1]
    friedel[:, :, 0, 2] += mates[..., 2]
    out = friedel
    if len(operators) > 1:
        out = np.zeros_like(friedel)
        _symmetrise(friedel, np.ascontiguousarray(operators, dtype=np.float32), out)
    out[..., 2] = _evened(out[..., 2])
    return out


def _evened(weights: np.ndarray) -> np.ndarray:
    """What to divide by: the weights smoothed, times what smoothing leaves of the weights divided by that."""
    smooth = _smoothed(weights)
    return smooth * _smoothed(np.divide(weights, smooth, out=np.zeros_like(weights), where=smooth > 0))


def _smoothed(weights: np.ndarray) -> np.ndarray:
    """Weights convolved with (1/4, 1/2, 1/4) along each axis; they are even, so the plane x = -1 is that of x = 1."""
    behind = np.roll(weights[::-1, ::-1, 1:2], (1, 1), axis=(0, 1))
    wide = np.concatenate([behind, weights, weights[:, :, -1:]], axis=2)
    out = (wide[:, :, :-2] + wide[:, :, 2:]) / 4 + weights / 2
    for axis in (0, 1):
        # The cube wraps round at its rim, beyond the sphere in use.
        out = (np.roll(out, 1, axis) + np.roll(out, -1, axis)) / 4 + out / 2
    return out


@njit(nogil=True, cache=True, fastmath=True)
def _symmetrise(source, operators, out):  # type: ignore[no-untyped-def]
    half = source.shape[2] - 1
    # Trilinear cells must stay inside the cube.
    reach = np.float32((half - 1) * (half - 1))
    for iz in range(source.shape[0]):
        kz = np.float32(iz if iz <= half else iz - source.shape[0])
        for iy in range(source.shape[1]):
            ky = np.float32(iy if iy <= half else iy - source.shape[1])
            for ix in range(source.shape[2]):
                kx = np.float32(ix)
                if kx * kx + ky * ky + kz * kz > reach:
                    continue
                for g in range(len(operators)):
                    op = operators[g]
                    x = op[0, 0] * kx + op[0, 1] * ky + op[0, 2] * kz
                    y = op[1, 0] * kx + op[1, 1] * ky + op[1, 2] * kz
                    z = op[2, 0] * kx + op[2, 1] * ky + op[2, 2] * kz
                    sign = np.float32(1)
                    if x < 0:
                        x, y, z, sign = -x, -y, -z, np.float32(-1)
                    x0, y0, z0 = int(x), int(np.floor(y)), int(np.floor(z))
                    fx, fy, fz = x - np.float32(x0), y - np.float32(y0), z - np.float32(z0)
                    for dz in range(2):
                        cz = fz if dz else np.float32(1) - fz
                        for dy in range(2):
                            cy = cz * (fy if dy else np.float32(1) - fy)
                            for dx in range(2):
                                c = cy * (fx if dx else np.float32(1) - fx)
                                corner = source[z0 + dz, y0 + dy, x0 + dx]
                                out[iz, iy, ix, 0] += c * corner[0]
                                out[iz, iy, ix, 1] += c * sign * corner[1]
                                out[iz, iy, ix, 2] += c * corner[2]


def _shell_volume(shape: tuple[int, ...], shell_max: int) -> np.ndarray:
    """Image shell of every voxel of a padded half-complex cube; past `shell_max` all are `shell_max + 1`."""
    wrapped = fft.wrapped_frequencies(shape[2] - 1).astype(np.float32)
    squared = wrapped[:, None, None] ** 2 + wrapped[:, None] ** 2 + wrapped[: shape[2]] ** 2
    return np.minimum(shell_number(np.sqrt(squared) / PADDING), shell_max + 1)


def mean_weights(accumulator: np.ndarray, shell_max: int) -> np.ndarray:
    """Mean of the weights over the voxels of each shell, (shell_max + 1,) float64."""
    shells = _shell_volume(accumulator.shape[:3], shell_max).ravel()
    sums = np.bincount(shells, weights=accumulator[..., 2].ravel(), minlength=shell_max + 2)
    counts = np.bincount(shells, minlength=shell_max + 2)
    return (sums / np.maximum(counts, 1))[: shell_max + 1]


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


def divide(accumulator: np.ndarray, precision: np.ndarray, box_px: int) -> np.ndarray:
    """The map of an accumulator from `complete`.

    precision: (shell_max + 1,) 1 / tau^2 per shell. Frequencies past shell_max, and those that nothing touched, are
    zero, and so are the corners outside the sphere that the box holds. Returns (D, D, D) float32.
    """
    shell_max = len(precision) - 1
    if half_width(shell_max) + 1 != accumulator.shape[2]:
        raise ValueError(f"precision for {shell_max} shells does not fit an accumulator {accumulator.shape}")
    shells = _shell_volume(accumulator.shape[:3], shell_max)
    precision_of = np.concatenate([precision, [np.inf]]).astype(np.float32)
    denominator = accumulator[..., 2] + precision_of[shells]
    transform = np.zeros(accumulator.shape[:3], dtype=np.complex64)
    np.divide(accumulator[..., 0], denominator, out=transform.real, where=denominator > 0)
    np.divide(accumulator[..., 1], denominator, out=transform.imag, where=denominator > 0)
    volume = fft.padded_inverse(transform, PADDING * box_px, box_px)
    envelope = gridding_correction(box_px).astype(np.float32)
    volume /= envelope[:, None, None] * envelope[:, None] * envelope
    # Views turn the corners of the box out of their images, and the correction makes most of the noise there.
    volume *= sphere(box_px, box_px, _CORNER_EDGE_PX)
    return volume
