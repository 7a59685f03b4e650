"""The vector instructions, against loops over the taps in float64."""

import itertools

import numpy as np
import pytest
from numba import njit

from dcryo.kernels import interpolation
from dcryo.kernels.gridding import SLOPES, TAPS, WEIGHTS

SHAPE = (6, 7, 9)  # z, y, x


@njit
def read(volume, offset, stride_y, stride_z, fx, fy, fz):
    return interpolation.read(volume, offset, stride_y, stride_z, fx, fy, fz)


@njit
def read_slope(volume, offset, stride_y, stride_z, fx, fy, fz):
    return interpolation.read_slope(volume, offset, stride_y, stride_z, fx, fy, fz)


@njit
def write(volume, offset, stride_y, stride_z, fx, fy, fz, real, imaginary, weight):
    interpolation.write(volume, offset, stride_y, stride_z, fx, fy, fz, real, imaginary, weight)


@njit
def write_complex(volume, offset, stride_y, stride_z, fx, fy, fz, real, imaginary):
    interpolation.write_complex(volume, offset, stride_y, stride_z, fx, fy, fz, real, imaginary)


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def points(count, seed=0):
    """Lowest taps (z, y, x), the first and last that there are among them, and fractions (x, y, z) float32."""
    rng = generator(seed)
    last = np.array(SHAPE) - TAPS
    lowest = np.concatenate([[[0, 0, 0], last], rng.integers(0, last + 1, (count - 2, 3))])
    fractions = rng.random((count, 3), dtype=np.float32)
    fractions[2:6] = [[0, 0, 0], [0, 0.5, 1], [1, 0, 0.25], [0.5, 0.5, 0.5]]
    return list(zip(lowest, fractions, strict=True))


def strides(parts):
    """Places of numbers in a flat volume of `parts` numbers a voxel: of a step along x, y and z."""
    return parts, parts * SHAPE[2], parts * SHAPE[2] * SHAPE[1]


def arguments(lowest, fractions, parts):
    along_x, along_y, along_z = strides(parts)
    return int(lowest @ (along_z, along_y, along_x)), along_y, along_z, *fractions


def weights_of(fractions, sloped=None):
    """Weights (z, y, x) of the taps of a point; along one axis, 0 to 2 for x to z, their derivatives."""
    x, y, z = (
        np.array([np.polyval(row, float(fraction) - 0.5) for row in (SLOPES if axis == sloped else WEIGHTS)])
        for axis, fraction in enumerate(fractions)
    )
    return z[:, None, None] * y[:, None] * x


def taps(lowest):
    return tuple(slice(first, first + TAPS) for first in lowest)


def complex_noise(seed):
    rng = generator(seed)
    return (rng.standard_normal(SHAPE) + 1j * rng.standard_normal(SHAPE)).astype(np.complex64)


def flat(volume):
    return volume.view(np.float32).reshape(-1)


def test_read_is_the_sum_over_the_taps():
    volume = complex_noise(1)
    for lowest, fractions in points(30):
        expected = 0j
        weight = weights_of(fractions)
        for z, y, x in itertools.product(range(TAPS), repeat=3):
            expected += weight[z, y, x] * complex(volume[tuple(np.add(lowest, (z, y, x)))])
        assert complex(*read(flat(volume), *arguments(lowest, fractions, 2))) == pytest.approx(expected, abs=1e-5)


def test_read_slope_is_the_sum_over_the_taps_and_its_derivatives():
    volume = complex_noise(2)
    for lowest, fractions in points(30):
        found = np.array(read_slope(flat(volume), *arguments(lowest, fractions, 2))).reshape(4, 2) @ (1, 1j)
        around = volume[taps(lowest)].astype(complex)
        expected = [np.sum(weights_of(fractions, axis) * around) for axis in (None, 0, 1, 2)]
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_slopes_are_finite_differences_of_read():
    volume, step = complex_noise(3), np.float32(1 / 64)
    for lowest, fractions in points(30, seed=4):
        fractions = np.clip(fractions, step, 1 - step)
        found = np.array(read_slope(flat(volume), *arguments(lowest, fractions, 2))).reshape(4, 2) @ (1, 1j)
        assert found[0] == pytest.approx(complex(*read(flat(volume), *arguments(lowest, fractions, 2))), abs=1e-5)
        for axis in range(3):
            move = step * np.eye(3, dtype=np.float32)[axis]
            after, before = (
                complex(*read(flat(volume), *arguments(lowest, fractions + sign * move, 2))) for sign in (1, -1)
            )
            assert found[1 + axis] == pytest.approx((after - before) / (2 * float(step)), abs=2e-3)


def test_write_adds_the_weights_of_the_taps_and_nothing_else():
    for number, (lowest, fractions) in enumerate(points(30, seed=5)):
        volume = generator(number).standard_normal((*SHAPE, 3)).astype(np.float32)
        expected = volume.astype(float)
        value = generator(99 - number).standard_normal(3).astype(np.float32)
        expected[taps(lowest)] += weights_of(fractions)[..., None] * value
        kept = volume.copy()
        write(volume.reshape(-1), *arguments(lowest, fractions, 3), *value)
        np.testing.assert_allclose(volume, expected, atol=1e-6)
        others = np.ones(SHAPE, dtype=bool)
        others[taps(lowest)] = False
        np.testing.assert_array_equal(volume[others], kept[others])
        assert np.abs(volume - kept).max() > 0.01


def test_write_complex_writes_the_first_two_numbers_of_write():
    for number, (lowest, fractions) in enumerate(points(30, seed=9)):
        sums = generator(number).standard_normal((*SHAPE, 3)).astype(np.float32)
        volume = np.ascontiguousarray(sums[..., :2]).view(np.complex64)
        real, imaginary = generator(99 - number).standard_normal(2).astype(np.float32)
        kept = volume.copy()
        write_complex(flat(volume), *arguments(lowest, fractions, 2), real, imaginary)
        write(sums.reshape(-1), *arguments(lowest, fractions, 3), real, imaginary, np.float32(5))
        np.testing.assert_allclose(flat(volume).reshape(*SHAPE, 2), sums[..., :2], atol=1e-6)
        assert np.abs(volume - kept).max() > 0.01


def test_write_is_the_adjoint_of_read():
    """<read V, (a, b)> = <V, write (a, b)>, and so for a volume of weights."""
    volume, of_weights = complex_noise(6), generator(7).standard_normal(SHAPE).astype(np.complex64)
    sums, expected, expected_weights = np.zeros((*SHAPE, 3), dtype=np.float32), 0.0, 0.0
    for number, (lowest, fractions) in enumerate(points(40, seed=8)):
        real, imaginary, weight = value = generator(number).standard_normal(3).astype(np.float32)
        write(sums.reshape(-1), *arguments(lowest, fractions, 3), *value)
        found = read(flat(volume), *arguments(lowest, fractions, 2))
        expected += found[0] * float(real) + found[1] * float(imaginary)
        expected_weights += read(flat(of_weights), *arguments(lowest, fractions, 2))[0] * float(weight)
    sums = sums.astype(float)
    assert np.sum(volume.real * sums[..., 0] + volume.imag * sums[..., 1]) == pytest.approx(expected, abs=1e-4)
    assert np.sum(of_weights.real * sums[..., 2]) == pytest.approx(expected_weights, abs=1e-4)
    assert min(abs(expected), abs(expected_weights)) > 0.1
