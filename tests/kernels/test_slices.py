import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcryo.kernels import fft, slices
from dcryo.kernels.rotations import random_rotations, rotations_from_uniform
from dcryo.kernels.shells import half_plane, pack
from dcryo.kernels.symmetry import operators

uniform = st.floats(0, 1, exclude_max=True)
# Turns that put pixels on grid points and on the plane x = 0, where a cell is chosen by a hair.
ON_AXES = operators("O")


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def complex_noise(shape, seed):
    rng = generator(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def hermitian(shell_max, seed):
    """Half-complex cube of a real random volume."""
    side = slices.volume_shape(shell_max)[0]
    return np.fft.rfftn(generator(seed).standard_normal((side,) * 3)).astype(np.complex64)


def test_the_cube_is_wide_enough_and_no_wider():
    for shell_max in (1, 5, 32):
        pixels = half_plane(shell_max)
        corner = int(np.floor(2 * np.hypot(pixels.kx, pixels.ky).max())) + 1
        assert slices.half_width(shell_max) in (corner, corner + 1)
        width = slices.half_width(shell_max)
        assert slices.volume_shape(shell_max) == (2 * width + 1, 2 * width + 1, width + 1)


@pytest.mark.parametrize("shell_max", [1, 2, 5])
def test_slices_are_trilinear(shell_max):
    cube, pixels = hermitian(shell_max, 1), half_plane(shell_max)
    rotations = np.concatenate([random_rotations(6, generator(2)), ON_AXES[:4]])
    found = slices.extract(cube, rotations, pixels)
    assert found.shape == (10, len(pixels.kx)) and found.dtype == np.complex64
    expected = [naive.extract(cube.astype(complex), rotation, pixels) for rotation in rotations]
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(cube).max())


def test_slices_of_fewer_shells_are_a_prefix_and_take_any_cube_that_reaches():
    cube, rotations = hermitian(6, 1), random_rotations(3, generator(3))
    every, few = half_plane(6), half_plane(4)
    found = slices.extract(cube, rotations, every)
    np.testing.assert_array_equal(slices.extract(cube, rotations, few), found[:, : every.within(4)])
    with pytest.raises(ValueError, match="does not reach shell 7"):
        slices.extract(cube, rotations, half_plane(7))
    with pytest.raises(ValueError, match="does not reach shell 7"):
        slices.insert(np.zeros((*cube.shape, 3), np.float32), rotations, found, found.real, half_plane(7))


@pytest.mark.parametrize("box", [8, 9])
@pytest.mark.parametrize("rotation", ON_AXES, ids=range(24))
def test_projection_slice_theorem_is_exact_along_the_axes(box, rotation):
    volume = generator(4).standard_normal((box,) * 3).astype(np.float32)
    if box % 2 == 0:  # the first planes of an even box have nothing opposite
        volume[0] = volume[:, 0] = volume[:, :, 0] = 0
    envelope = slices.gridding_correction(box)
    pixels = half_plane(box // 2)
    # On grid points nothing is interpolated, so the correction for interpolation has to be undone.
    prepared = slices.prepare(volume * envelope[:, None, None] * envelope[:, None] * envelope, box // 2)
    found = slices.extract(prepared, rotation[None], pixels)[0]
    expected = pack(pixels, fft.rfft2(naive.projection(volume, rotation)))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("box", [32, 33])
def test_slices_are_the_transforms_of_real_space_projections(box):
    """Blobs turned in real space and summed along z, against slices; errors cancel over views."""
    rng = generator(5)
    centres, amplitudes = rng.uniform(-5, 5, (12, 3)), rng.uniform(0.5, 2, 12)
    rotations = random_rotations(40, rng)
    pixels = half_plane(box // 2)
    found = slices.extract(
        slices.prepare(naive.blob_volume(centres, amplitudes, 1.5, box), box // 2), rotations, pixels
    )
    gains = []
    for rotation, piece in zip(rotations, found, strict=True):
        turned = naive.blob_volume(centres @ rotation.T, amplitudes, 1.5, box).sum(axis=0)
        expected = pack(pixels, fft.rfft2(turned))
        assert np.linalg.norm(piece - expected) < 0.02 * np.linalg.norm(expected)
        # Zero frequency always lies on a grid point, and is corrected for an interpolation that did not happen.
        gains.append(np.vdot(expected[1:], piece[1:]).real / np.vdot(expected[1:], expected[1:]).real)
    assert np.mean(gains) == pytest.approx(1, abs=0.002)


def test_opposite_pixels_are_conjugate():
    cube, pixels = hermitian(5, 6), half_plane(5)
    rotations = random_rotations(20, generator(6))
    half_turn = np.diag([-1.0, -1.0, 1.0])
    opposite = slices.extract(cube, half_turn @ rotations, pixels)
    np.testing.assert_allclose(opposite, slices.extract(cube, rotations, pixels).conj(), atol=1e-5 * np.abs(cube).max())


@settings(max_examples=60, deadline=None)
@given(
    shell_max=st.integers(1, 9),
    numbers=st.lists(st.tuples(uniform, uniform, uniform), min_size=1, max_size=3),
    on_axis=st.integers(0, 23),
    seed=st.integers(0, 2**32),
)
def test_insert_is_the_adjoint_of_extract(shell_max, numbers, on_axis, seed):
    """Re <extract(V), I> = Re <V, insert(I)>, for cubes without any symmetry too; and so for the weights."""
    pixels, shape = half_plane(shell_max), slices.volume_shape(shell_max)
    rotations = np.concatenate([rotations_from_uniform(numbers), ON_AXES[on_axis][None]])
    cube = complex_noise(shape, seed)
    images = complex_noise((len(rotations), len(pixels.kx)), seed + 1)
    weights = generator(seed + 2).random(images.shape, dtype=np.float32)
    accumulator = np.zeros((*shape, 3), dtype=np.float32)
    slices.insert(accumulator, rotations, images, weights, pixels)
    sums = accumulator.astype(np.float64)
    out = slices.extract(cube, rotations, pixels).astype(complex)
    scale = float(np.sum(np.abs(images)))
    assert np.sum(out.real * images.real + out.imag * images.imag) == pytest.approx(
        np.sum(cube.real * sums[..., 0] + cube.imag * sums[..., 1]), abs=1e-5 * scale
    )
    of_weights = slices.extract(cube.real.astype(np.complex64), rotations, pixels).real
    assert np.sum(of_weights * weights, dtype=float) == pytest.approx(
        np.sum(cube.real * sums[..., 2]), abs=1e-5 * scale
    )
    # Shares of a pixel add up to one.
    assert sums[..., 2].sum() == pytest.approx(weights.sum(dtype=float), rel=1e-5)


def test_inserting_adds_to_what_is_there():
    pixels, rotations = half_plane(4), random_rotations(3, generator(7))
    images = complex_noise((3, len(pixels.kx)), 8)
    weights = np.ones(images.shape, dtype=np.float32)
    together = np.ones((*slices.volume_shape(4), 3), dtype=np.float32)
    one_by_one = together.copy()
    slices.insert(together, rotations, images, weights, pixels)
    for i in range(3):
        slices.insert(one_by_one, rotations[i : i + 1], images[i : i + 1], weights[i : i + 1], pixels)
    np.testing.assert_array_equal(together, one_by_one)
    assert together.min() < 1 < together.max()


def test_inserting_spreads_a_pixel_as_the_definition_says():
    pixels, rotations = half_plane(2), np.concatenate([random_rotations(3, generator(9)), ON_AXES[3:6]])
    images = complex_noise((6, len(pixels.kx)), 10)
    weights = generator(11).random(images.shape, dtype=np.float32)
    accumulator = np.zeros((*slices.volume_shape(2), 3), dtype=np.float32)
    slices.insert(accumulator, rotations, images, weights, pixels)
    full = naive.insert(slices.half_width(2), rotations, images, weights, pixels, [np.eye(3)])
    # The plane x = 0 holds one of each pair or the other, so only the rest is the same at once.
    np.testing.assert_allclose(accumulator[:, :, 1:], full[:, :, 1 : accumulator.shape[2]], atol=1e-5)
