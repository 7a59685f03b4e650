import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcryo.kernels import fft, slices
from dcryo.kernels.gridding import padded_px
from dcryo.kernels.masks import sphere
from dcryo.kernels.rotations import random_rotations, rotations_from_uniform
from dcryo.kernels.shells import half_plane, pack
from dcryo.kernels.symmetry import operators

uniform = st.floats(0, 1, exclude_max=True)
# Turns that put pixels on grid points and on the plane x = 0, where a cell is chosen by a hair.
ON_AXES = operators("O")
# Twins weight taps with the kernel itself, of which the polynomials are off by 2e-4; and on a grid point it may be the
# tap at -2 or that at 2, of weight 6e-4, that is read.
OF_POLYNOMIALS = 2.5e-3


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def complex_noise(shape, seed):
    rng = generator(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def noise_volume(box, diameter, seed):
    return (generator(seed).standard_normal((box,) * 3) * sphere(box, diameter * box, 0)).astype(np.float32)


def hermitian(shell_max, box, seed):
    """Half-complex cube of a real random volume, of the shape that slices are taken from."""
    side = slices.volume_shape(shell_max, box)[0]
    whole = np.fft.fftshift(np.fft.fftn(generator(seed).standard_normal((side,) * 3)))
    return np.ascontiguousarray(naive.half_complex(whole), dtype=np.complex64)


@pytest.mark.parametrize("box", [16, 17, 64, 65, 90])
def test_the_cube_is_wide_enough_and_no_wider(box):
    """The kernel reaches two grid points past the one below the last pixel of a shell."""
    for shell_max in range(1, box // 2 + 1):
        pixels, width = half_plane(shell_max), slices.half_width(shell_max, box)
        assert slices.volume_shape(shell_max, box) == (2 * width + 1, 2 * width + 1, width + 2)
        last = padded_px(box) / box * np.hypot(pixels.kx, pixels.ky).max()
        assert int(np.floor(last)) + 2 in (width, width - 1)
    # And some shell needs all of it.
    assert any(
        int(np.floor(padded_px(box) / box * np.hypot(half_plane(shell).kx, half_plane(shell).ky).max())) + 2
        == slices.half_width(shell, box)
        for shell in range(1, box // 2 + 1)
    )


@pytest.mark.parametrize(("shell_max", "box"), [(1, 8), (2, 9), (5, 16), (8, 17)])
def test_slices_are_read_with_the_kernel(shell_max, box):
    cube, pixels = hermitian(shell_max, box, 1), half_plane(shell_max)
    rotations = np.concatenate([random_rotations(4, generator(2)), ON_AXES[:4]])
    found = slices.extract(cube, rotations, pixels, box)
    assert found.shape == (8, len(pixels.kx)) and found.dtype == np.complex64
    expected = [naive.extract(cube.astype(complex), rotation, pixels, padded_px(box) / box) for rotation in rotations]
    np.testing.assert_allclose(found, expected, atol=OF_POLYNOMIALS * np.abs(cube).max())
    assert np.abs(expected).max() > 0.3 * np.abs(cube).max()


def test_slices_of_fewer_shells_are_a_prefix_and_take_any_cube_that_reaches():
    cube, rotations = hermitian(6, 16, 1), random_rotations(3, generator(3))
    every, few = half_plane(6), half_plane(4)
    found = slices.extract(cube, rotations, every, 16)
    np.testing.assert_array_equal(slices.extract(cube, rotations, few, 16), found[:, : every.within(4)])
    with pytest.raises(ValueError, match="does not reach shell 7"):
        slices.extract(cube, rotations, half_plane(7), 16)
    with pytest.raises(ValueError, match="does not reach shell 7"):
        slices.insert(np.zeros((*cube.shape, 3), np.float32), rotations, found, found.real, half_plane(7), 16)


@pytest.mark.parametrize("box", [16, 17])
def test_a_prepared_volume_is_its_padded_transform_without_the_envelope(box):
    volume, shell_max, padded = noise_volume(box, 1, 4), box // 2, padded_px(box)
    prepared = slices.prepare(volume, shell_max)
    assert prepared.shape == slices.volume_shape(shell_max, box) and prepared.dtype == np.complex64
    width = slices.half_width(shell_max, box)
    along = slices.gridding_correction(box)
    corrected = volume / (along[:, None, None] * along[:, None] * along)
    place = np.arange(-width, width + 1) % padded  # past its Nyquist frequency a transform repeats itself
    whole = naive.full_transform(naive.embedded(corrected, padded))[np.ix_(place, place, place)]
    np.testing.assert_allclose(prepared, naive.half_complex(whole), atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("box", [16, 17])
@pytest.mark.parametrize("rotation", ON_AXES, ids=range(24))
def test_slices_along_the_axes_are_projections(box, rotation):
    volume = noise_volume(box, 0.86, 4)
    pixels = half_plane(box // 2)
    found = slices.extract(slices.prepare(volume, box // 2), rotation[None], pixels, box)[0]
    expected = pack(pixels, fft.rfft2(naive.projection(volume, rotation)))
    assert np.linalg.norm(found - expected) < SLICE_ERROR * np.linalg.norm(expected)


# Of the norm, for noise in a sphere of 0.86 box; and for noise up to the faces of the box.
SLICE_ERROR, SPHERE_ERROR = 0.004, 0.007


@pytest.mark.parametrize("box", [16, 17, 32, 33])
@pytest.mark.parametrize(("diameter", "bound"), [(0.86, SLICE_ERROR), (1, SPHERE_ERROR)])
def test_slices_are_the_fourier_sum_of_the_volume(box, diameter, bound):
    """Noise has the same power at every frequency and place, so the error is that of the kernel and of no map."""
    volume, pixels = noise_volume(box, diameter, box), half_plane(box // 2)
    rotations = random_rotations(6, generator(5))
    found = slices.extract(slices.prepare(volume, box // 2), rotations, pixels, box)
    expected = np.array([naive.slice_of(volume, rotation, pixels) for rotation in rotations])
    frequency = pixels.kx[9] * rotations[2][0] + pixels.ky[9] * rotations[2][1]
    assert expected[2][9] == pytest.approx(naive.fourier_sum(volume, frequency, box), abs=1e-9)
    for piece, exact in zip(found, expected, strict=True):
        assert np.linalg.norm(piece - exact) < bound * np.linalg.norm(exact)
    # No shell is worse than the rest, not even the last.
    for start, end in zip(pixels.start[2:-1], pixels.start[3:], strict=True):
        own = (slice(None), slice(start, end))
        assert np.linalg.norm((found - expected)[own]) < 2 * bound * np.linalg.norm(expected[own])
    assert np.vdot(expected, found).real / np.vdot(expected, expected).real == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize("box", [32, 33])
def test_slices_are_the_transforms_of_real_space_projections(box):
    """Blobs turned in real space and summed along z, against slices."""
    rng = generator(5)
    centres, amplitudes = rng.uniform(-5, 5, (12, 3)), rng.uniform(0.5, 2, 12)
    rotations = random_rotations(40, rng)
    pixels = half_plane(box // 2)
    prepared = slices.prepare(naive.blob_volume(centres, amplitudes, 1.5, box), box // 2)
    found = slices.extract(prepared, rotations, pixels, box)
    for rotation, piece in zip(rotations, found, strict=True):
        turned = naive.blob_volume(centres @ rotation.T, amplitudes, 1.5, box).sum(axis=0)
        expected = pack(pixels, fft.rfft2(turned))
        assert np.linalg.norm(piece - expected) < 0.0025 * np.linalg.norm(expected)


def test_opposite_pixels_are_conjugate():
    cube, pixels = hermitian(5, 16, 6), half_plane(5)
    rotations = random_rotations(20, generator(6))
    half_turn = np.diag([-1.0, -1.0, 1.0])
    opposite = slices.extract(cube, half_turn @ rotations, pixels, 16)
    expected = slices.extract(cube, rotations, pixels, 16).conj()
    np.testing.assert_allclose(opposite[:, 1:], expected[:, 1:], atol=1e-5 * np.abs(cube).max())
    # Zero is its own opposite, and the taps at 2 grid points from it, but not those at -2, are read.
    np.testing.assert_allclose(opposite[:, 0], expected[:, 0], atol=OF_POLYNOMIALS * np.abs(cube).max())


@settings(max_examples=60, deadline=None)
@given(
    shell_max=st.integers(1, 9),
    more_px=st.integers(0, 5),
    numbers=st.lists(st.tuples(uniform, uniform, uniform), min_size=1, max_size=3),
    on_axis=st.integers(0, 23),
    seed=st.integers(0, 2**32),
)
def test_insert_is_the_adjoint_of_extract(shell_max, more_px, numbers, on_axis, seed):
    """Re <extract(V), I> = Re <V, insert(I)>, for cubes without any symmetry too; and so for the weights."""
    box = 2 * shell_max + more_px
    pixels, shape = half_plane(shell_max), slices.volume_shape(shell_max, box)
    rotations = np.concatenate([rotations_from_uniform(numbers), ON_AXES[on_axis][None]])
    cube = complex_noise(shape, seed)
    images = complex_noise((len(rotations), len(pixels.kx)), seed + 1)
    weights = generator(seed + 2).random(images.shape, dtype=np.float32)
    accumulator = np.zeros((*shape, 3), dtype=np.float32)
    slices.insert(accumulator, rotations, images, weights, pixels, box)
    sums = accumulator.astype(np.float64)
    out = slices.extract(cube, rotations, pixels, box).astype(complex)
    scale = float(np.sum(np.abs(images)))
    assert np.sum(out.real * images.real + out.imag * images.imag) == pytest.approx(
        np.sum(cube.real * sums[..., 0] + cube.imag * sums[..., 1]), abs=1e-5 * scale
    )
    of_weights = slices.extract(cube.real.astype(np.complex64), rotations, pixels, box).real
    assert np.sum(of_weights * weights, dtype=float) == pytest.approx(
        np.sum(cube.real * sums[..., 2]), abs=1e-5 * scale
    )
    # Shares of a pixel add up to nearly the same wherever it lies: to what the kernel does at the centre of the volume.
    centre = slices.gridding_correction(box)[box // 2] ** 3
    assert sums[..., 2].sum() == pytest.approx(centre * weights.sum(dtype=float), rel=5e-3)


def test_inserting_adds_to_what_is_there():
    pixels, rotations = half_plane(4), random_rotations(3, generator(7))
    images = complex_noise((3, len(pixels.kx)), 8)
    weights = np.ones(images.shape, dtype=np.float32)
    together = np.ones((*slices.volume_shape(4, 8), 3), dtype=np.float32)
    one_by_one = together.copy()
    slices.insert(together, rotations, images, weights, pixels, 8)
    for i in range(3):
        slices.insert(one_by_one, rotations[i : i + 1], images[i : i + 1], weights[i : i + 1], pixels, 8)
    np.testing.assert_array_equal(together, one_by_one)
    assert together.min() < 1 < together.max()


@pytest.mark.parametrize(("shell_max", "box"), [(2, 8), (4, 9)])
def test_inserting_spreads_a_pixel_as_the_definition_says(shell_max, box):
    pixels, rotations = half_plane(shell_max), np.concatenate([random_rotations(3, generator(9)), ON_AXES[3:6]])
    images = complex_noise((6, len(pixels.kx)), 10)
    weights = generator(11).random(images.shape, dtype=np.float32)
    accumulator = np.zeros((*slices.volume_shape(shell_max, box), 3), dtype=np.float32)
    slices.insert(accumulator, rotations, images, weights, pixels, box)
    width = slices.half_width(shell_max, box)
    full = naive.insert(width, rotations, images, weights, pixels, padded_px(box) / box)
    # Of a pair one is held: planes that both may reach, up to x = 1, are whole only with the mates.
    found, expected = accumulator[:, :, 3:], naive.half_complex(full)[:, :, 3:]
    np.testing.assert_allclose(found, expected, atol=OF_POLYNOMIALS * np.abs(expected).max())


@pytest.mark.parametrize(("shell_max", "box"), [(1, 8), (5, 16), (8, 17)])
def test_slices_of_one_volume_are_inserted_in_another(shell_max, box):
    """What extraction, weights and insertion give one after the other; Friedel mates are written once."""
    pixels, rotations = half_plane(shell_max), np.concatenate([random_rotations(4, generator(13)), ON_AXES[:4]])
    cube, volume = hermitian(shell_max, box, 14), complex_noise(slices.volume_shape(shell_max, box), 15)
    weights = generator(16).random((8, len(pixels.kx)), dtype=np.float32)
    expected = np.zeros((*cube.shape, 3), dtype=np.float32)
    expected[..., 0], expected[..., 1] = volume.real, volume.imag
    slices.insert(expected, rotations, weights * slices.extract(cube, rotations, pixels, box), weights, pixels, box)
    slices.insert_slices_of(cube, volume, rotations, weights, pixels, box)
    np.testing.assert_allclose(volume, expected[..., 0] + 1j * expected[..., 1], atol=1e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match="different shapes"):
        slices.insert_slices_of(cube, volume[1:], rotations, weights, pixels, box)


def test_volumes_that_no_cache_holds_give_the_same_slices():
    """Kernels on them ask for memory early; all else, up to the rotation of the last pixel, is as in small cubes."""
    box, shell_max, few = 160, 100, 7
    pixels, rotations = half_plane(few), np.concatenate([random_rotations(3, generator(17)), ON_AXES[5:7]])
    volume = generator(18).standard_normal((box,) * 3).astype(np.float32)
    large, small = slices.prepare(volume, shell_max), slices.prepare(volume, few)
    assert 2 * small.size < slices.CACHED < 2 * large.size
    found = slices.extract(large, rotations, pixels, box)
    np.testing.assert_allclose(found, slices.extract(small, rotations, pixels, box), atol=1e-5 * np.abs(found).max())
    margin = (large.shape[0] - small.shape[0]) // 2
    inner = (slice(margin, -margin), slice(margin, -margin), slice(small.shape[2]))
    weights = generator(19).random(found.shape, dtype=np.float32)
    of_large, of_small = (np.zeros((*of.shape, 3), dtype=np.float32) for of in (large, small))
    for of in (of_large, of_small):
        slices.insert(of, rotations, found, weights, pixels, box)
    np.testing.assert_array_equal(of_large[inner], of_small)
    assert np.count_nonzero(of_large) == np.count_nonzero(of_small) > 0
    into_large, into_small = np.zeros_like(large), np.zeros_like(small)
    slices.insert_slices_of(large, into_large, rotations, weights, pixels, box)
    slices.insert_slices_of(small, into_small, rotations, weights, pixels, box)
    np.testing.assert_allclose(into_large[inner], into_small, atol=1e-5 * np.abs(into_small).max())
