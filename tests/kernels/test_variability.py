"""Slices, sums and steps of several volumes at once: against those of one volume, and against slow twins."""

import numpy as np
import pytest

from dcryo.kernels import slices, solve, variability
from dcryo.kernels.randomness import generator
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.shells import half_plane

BOX, SHELL, IMAGES = 20, 8, 6
PIXELS = half_plane(SHELL)
ROTATIONS = random_rotations(IMAGES, generator(0, "rotations of tests", 0))


@pytest.fixture(params=[1, 2, 4])
def volumes(request: pytest.FixtureRequest) -> np.ndarray:
    random = generator(1, "volumes of tests", request.param)
    return random.standard_normal((request.param, BOX, BOX, BOX)).astype(np.float32)


def images() -> tuple[np.ndarray, np.ndarray]:
    """Y and W of images of noise."""
    random, shape = generator(2, "images of tests", 0), (IMAGES, len(PIXELS.kx))
    data = (random.standard_normal(shape) + 1j * random.standard_normal(shape)).astype(np.complex64)
    return data, random.uniform(0.1, 2, shape).astype(np.float32)


def moments(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = generator(3, "moments of tests", count)
    first = random.standard_normal((IMAGES, count))
    spread = random.standard_normal((IMAGES, count, count))
    return first, first[:, :, None] * first[:, None, :] + spread @ np.swapaxes(spread, 1, 2)


def filled(volumes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the images, and their fit."""
    data, weight = images()
    sliced = variability.extract(variability.interleave(volumes, SHELL), ROTATIONS, PIXELS, BOX)
    sums = variability.empty_sums(len(volumes), SHELL, BOX)
    fit = variability.insert(sums, ROTATIONS, sliced, data, weight, *moments(len(volumes)), PIXELS, BOX)
    return sums, fit


def triangle(count: int) -> list[tuple[int, int]]:
    return [(k, other) for k in range(count) for other in range(k + 1)]


def test_slices_are_those_of_each_volume(volumes: np.ndarray) -> None:
    found = variability.extract(variability.interleave(volumes, SHELL), ROTATIONS, PIXELS, BOX)
    for k, volume in enumerate(volumes):
        expected = slices.extract(slices.prepare(volume, SHELL), ROTATIONS, PIXELS, BOX)
        assert np.abs(found[:, :, k] - expected).max() < 1e-5 * np.abs(expected).max()


def test_products(volumes: np.ndarray) -> None:
    data, weight = images()
    sliced = variability.extract(variability.interleave(volumes, SHELL), ROTATIONS, PIXELS, BOX)
    cross, gram = variability.products(sliced, data, weight)
    np.testing.assert_allclose(cross, np.einsum("np,npk->nk", data, sliced.conj()).real, rtol=1e-4, atol=1e-2)
    expected = np.einsum("np,npk,npl->nkl", weight, sliced, sliced.conj()).real
    np.testing.assert_allclose(gram, expected, rtol=1e-4, atol=1e-2 * np.sqrt(expected.max()))


def test_sums_are_those_of_one_volume_with_each_channel_in_turn(volumes: np.ndarray) -> None:
    count, (data, weight) = len(volumes), images()
    first, second = moments(count)
    sums, fit = filled(volumes)
    sliced = variability.extract(variability.interleave(volumes, SHELL), ROTATIONS, PIXELS, BOX)
    of_model = np.einsum("nkl,npl->npk", second, sliced) * weight[:, :, None]
    scale = np.abs(sums).max()
    for place, (k, other) in enumerate(triangle(count)):
        expected = np.zeros((*sums.shape[:3], 3), dtype=np.float32)
        values = (first[:, k, None] * data - of_model[:, :, k]).astype(np.complex64)
        shares = (second[:, k, other, None] * weight).astype(np.float32)
        slices.insert(expected, ROTATIONS, values, shares, PIXELS, BOX)
        assert np.abs(sums[..., 2 * k : 2 * k + 2] - expected[..., :2]).max() < 1e-5 * scale
        assert np.abs(sums[..., 2 * count + place] - expected[..., 2]).max() < 1e-5 * scale
    cross = np.einsum("nk,np,npk->np", first, data, sliced.conj()).real
    power = np.einsum("npk,npk->np", of_model, sliced.conj()).real
    for row, values in enumerate((cross, power)):
        for shell in range(SHELL + 1):
            of_shell = values[:, PIXELS.start[shell] : PIXELS.start[shell + 1]].sum(axis=1)
            np.testing.assert_allclose(fit[:, row, shell], of_shell, rtol=2e-4, atol=1e-4 * np.abs(values).max())


def test_one_volume_is_solved_as_alone() -> None:
    volume = generator(4, "volumes of tests", 0).standard_normal((BOX, BOX, BOX)).astype(np.float32)
    sums, _ = filled(volume[None])
    complete = variability.complete(sums, 1)
    alone = solve.complete(sums, np.eye(3)[None])
    np.testing.assert_array_equal(complete, alone)
    weights = variability.mean_weights(complete, 1, SHELL, BOX)
    np.testing.assert_array_equal(weights[0], solve.mean_weights(alone, SHELL, BOX))
    precision = 0.1 * weights
    found = variability.maximise(complete, volume[None], precision)[0]
    expected = solve.maximise(alone, volume, precision[0], np.eye(3)[None], BOX)
    inside = solve._corners(BOX) == 1  # `solve` blanks the corners
    assert np.abs(found - expected)[inside].max() < 1e-4 * np.abs(expected).max()


def test_a_step_solves_the_equations_of_every_voxel() -> None:
    """Against numpy's solver, voxel by voxel."""
    count = 3
    volumes = generator(5, "volumes of tests", 0).standard_normal((count, BOX, BOX, BOX)).astype(np.float32)
    sums = variability.complete(filled(volumes)[0], count)
    precision = generator(5, "precision of tests", 0).uniform(1, 5, (count, SHELL + 1))
    shape = (*sums.shape[:2], sums.shape[2] - slices.BEFORE, count)
    random = generator(6, "steps of tests", 0)
    before = (random.standard_normal(shape) + 1j * random.standard_normal(shape)).astype(np.complex64)
    step = before.copy()
    variability._step(sums, precision, 1 / slices.scale(BOX), step)
    half, solved = sums.shape[0] // 2, 0
    for iz, iy, x in zip(*(random.integers(0, size, 400) for size in shape[:3]), strict=True):
        shell = int(np.sqrt((iz - half) ** 2 + (iy - half) ** 2 + x * x) / slices.scale(BOX) + 0.5)
        here = sums[iz, iy, x + slices.BEFORE].astype(np.float64)
        if shell > SHELL:
            assert not step[iz, iy, x].any()
            continue
        matrix = np.zeros((count, count))
        for place, (k, other) in enumerate(triangle(count)):
            matrix[k, other] = matrix[other, k] = here[2 * count + place]
        right = here[: 2 * count : 2] + 1j * here[1 : 2 * count : 2] - precision[:, shell] * before[iz, iy, x]
        expected = np.linalg.solve(matrix + np.diag(precision[:, shell]), right)
        np.testing.assert_allclose(step[iz, iy, x], expected, rtol=1e-3, atol=1e-5)
        solved += 1
    assert solved > 50


def test_sums_too_small_for_the_pixels_are_refused() -> None:
    volumes = np.zeros((2, BOX, BOX, BOX), dtype=np.float32)
    with pytest.raises(ValueError, match="do not reach shell"):
        variability.extract(variability.interleave(volumes, SHELL - 3), ROTATIONS, PIXELS, BOX)
    with pytest.raises(ValueError, match="does not fit"):
        variability.maximise(variability.empty_sums(2, SHELL, BOX), volumes, np.ones((2, SHELL)))
