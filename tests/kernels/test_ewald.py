"""Curved sections of a volume against the sum that defines its transform."""

import naive
import numpy as np
import pytest

from dcryo.kernels import ewald, slices
from dcryo.kernels.ctf import wavelength_A
from dcryo.kernels.masks import sphere
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.shells import half_plane

# Far more curved than any microscope's sphere: z of 3 px at the edge of a box of 32.
BOX, CURVATURE = 32, 3 / 16**2


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def random_volume(seed: int) -> np.ndarray:
    return (generator(seed).standard_normal((BOX,) * 3) * sphere(BOX, 0.8 * BOX, 0)).astype(np.float32)


def curvatures(n: int) -> np.ndarray:
    return np.linspace(-CURVATURE, CURVATURE, n)


def test_the_paraboloid_is_the_sphere() -> None:
    """At 3 A and 300 kV, in a box of 1000 A."""
    wavelength, width_A = float(wavelength_A(300.0)), 1000.0
    k = np.arange(0, width_A / 3)
    radius = width_A / wavelength
    of_sphere = radius - np.sqrt(radius**2 - k**2)
    found = ewald.curvature_per_px(wavelength, 500, 2.0) * k**2
    assert of_sphere.max() > 1
    np.testing.assert_allclose(found, of_sphere, atol=1e-4)


def test_sections_are_the_fourier_sum_of_the_volume() -> None:
    volume, pixels, rotations = random_volume(1), half_plane(BOX // 2), random_rotations(5, generator(2))
    found = ewald.extract(
        slices.prepare(volume, BOX // 2), rotations, curvatures(5), pixels.kx, pixels.ky, BOX
    )  # fmt: skip
    square = (pixels.kx**2 + pixels.ky**2).astype(float)
    for rotation, curvature, piece in zip(rotations, curvatures(5), found, strict=True):
        points = np.stack([pixels.kx, pixels.ky, curvature * square], axis=1)
        expected = naive.fourier_sums(volume, points @ rotation, BOX)
        # Beyond what is held of the volume nothing is read.
        held = np.linalg.norm(points, axis=1) < BOX / 2 + 0.5
        assert np.linalg.norm((piece - expected)[held]) < 0.005 * np.linalg.norm(expected[held])
        assert held.all() == (np.abs(curvature) < CURVATURE / 4)
        assert not piece[np.linalg.norm(points, axis=1) > BOX / 2 + 1.5].any()


def test_flat_sections_are_slices() -> None:
    prepared, pixels = slices.prepare(random_volume(3), BOX // 2), half_plane(BOX // 2)
    rotations = random_rotations(4, generator(4))
    found = ewald.extract(prepared, rotations, np.zeros(4), pixels.kx, pixels.ky, BOX)
    expected = slices.extract(prepared, rotations, pixels, BOX)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_insertion_is_the_adjoint_of_extraction() -> None:
    """Re <extract(V), I> = Re <V, insert(I)>; and so for weights, and for values alone."""
    pixels, shape = half_plane(10), slices.volume_shape(10, BOX)
    rotations, rng = random_rotations(4, generator(5)), generator(6)

    def noise(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)

    cube, images = noise(*shape), noise(4, len(pixels.kx))
    weights = rng.random(images.shape, dtype=np.float32)
    where = (rotations, curvatures(4))
    sums, alone = np.zeros((*shape, 3), dtype=np.float32), np.zeros(shape, dtype=np.complex64)
    ewald.insert(sums, *where, images, weights, pixels.kx, pixels.ky, BOX)
    ewald.insert_values(alone, *where, images, pixels.kx, pixels.ky, BOX)
    out = ewald.extract(cube, *where, pixels.kx, pixels.ky, BOX)
    scale = float(np.abs(images).sum())
    assert np.vdot(images, out).real == pytest.approx(
        np.sum(cube.real * sums[..., 0] + cube.imag * sums[..., 1], dtype=float), abs=1e-5 * scale
    )
    np.testing.assert_allclose(alone, sums[..., 0] + 1j * sums[..., 1], atol=1e-5 * np.abs(alone).max())
    of_weights = ewald.extract(cube.real.astype(np.complex64), *where, pixels.kx, pixels.ky, BOX).real
    assert np.sum(of_weights * weights, dtype=float) == pytest.approx(
        np.sum(cube.real * sums[..., 2], dtype=float), abs=1e-5 * scale
    )


def test_overlap_of_sidebands_is_the_transform_of_a_ball() -> None:
    z = np.array([0.0, 1e-4, 0.2, 0.7, 1.5, 3.0])
    diameter, box = 40.0, 100
    # The ball as a stack of discs along z.
    height = (np.arange(4000) + 0.5) / 4000 * diameter - diameter / 2
    area = diameter**2 / 4 - height**2
    expected = (area * np.cos(2 * np.pi * 2 * z[:, None] * height / box)).sum(axis=1) / area.sum()
    np.testing.assert_allclose(ewald.sideband_overlap(z, diameter, box), expected, atol=1e-5)
    np.testing.assert_allclose(ewald.sideband_overlap(-z, diameter, box), expected, atol=1e-5)
