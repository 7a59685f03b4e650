import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcryo.kernels import fft, shells
from dcryo.kernels.shells import half_plane


def noise(*shape):
    return np.random.Generator(np.random.Philox(3)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shell_max", [0, 1, 2, 5, 16])
def test_half_plane_has_one_of_every_friedel_pair(shell_max):
    pixels = half_plane(shell_max)
    found = list(zip(pixels.kx.tolist(), pixels.ky.tolist(), strict=True))
    assert len(set(found)) == len(found)
    assert set(found) == naive.half_plane(shell_max)
    both = set(found) | {(-kx, -ky) for kx, ky in found}
    assert len(both) == 2 * len(found) - 1  # zero is its own mate
    assert pixels.shell.tolist() == [naive.shell_of(*k) for k in found]
    assert pixels.kx.dtype == pixels.ky.dtype == pixels.shell.dtype == np.int32 and pixels.start.dtype == np.int64


def test_half_plane_is_sorted_by_shell_then_angle():
    pixels = half_plane(12)
    assert (np.diff(pixels.shell) >= 0).all()
    for shell in range(13):
        own = slice(pixels.start[shell], pixels.start[shell + 1])
        assert (pixels.shell[own] == shell).all() and pixels.counts[shell] == np.sum(pixels.shell == shell)
        assert (np.diff(np.arctan2(pixels.ky[own], pixels.kx[own])) >= 0).all()
    assert pixels.start[-1] == len(pixels.kx)


def test_lower_resolution_is_a_prefix():
    whole = half_plane(12)
    for shell in range(13):
        part, count = half_plane(shell), whole.within(shell)
        for name in ("kx", "ky", "shell"):
            np.testing.assert_array_equal(getattr(whole, name)[:count], getattr(part, name))
    assert whole.within(99) == len(whole.kx)


def test_half_plane_cannot_be_changed():
    """It is shared by all who ask for it."""
    pixels = half_plane(4)
    for array in (pixels.kx, pixels.ky, pixels.shell, pixels.start, shells.volume_shells(8)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_shells_are_rounded_half_up():
    radii = [0, 0.49, 0.5, 1.4999, 1.5, 2.5, 3.5, 4.49]
    assert shells.shell_number(np.array(radii)).tolist() == [0, 0, 1, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("box", [9, 15, 16, 24])
def test_unpacking_undoes_packing(box):
    transforms = fft.rfft2(noise(2, 3, box, box))
    for shell_max in (0, 3, box // 2):
        pixels = half_plane(shell_max)
        packed = shells.pack(pixels, transforms)
        assert packed.shape == (2, 3, len(pixels.kx)) and packed.dtype == np.complex64
        for p in range(len(pixels.kx)):
            np.testing.assert_array_equal(packed[..., p], transforms[..., pixels.ky[p], pixels.kx[p]])
        kept = np.array(
            [
                [naive.shell_of(kx, ky if 2 * ky < box else ky - box) <= shell_max for kx in range(box // 2 + 1)]
                for ky in range(box)
            ]
        )
        unpacked = shells.unpack(pixels, packed, box)
        assert unpacked.dtype == np.complex64
        np.testing.assert_allclose(unpacked, transforms * kept, atol=1e-5)
        np.testing.assert_allclose(shells.pack(pixels, unpacked), packed, atol=1e-5)


def test_unpacked_pixels_are_a_real_image():
    pixels = half_plane(7)
    packed = shells.pack(pixels, fft.rfft2(noise(16, 16)))
    full = np.zeros((16, 16), dtype=complex)
    for value, kx, ky in zip(packed, pixels.kx, pixels.ky, strict=True):
        full[ky, kx] = value
        full[-ky, -kx] = np.conj(value)
    expected = np.fft.fftshift(np.fft.ifft2(full))
    assert np.abs(expected.imag).max() < 1e-7
    np.testing.assert_allclose(fft.irfft2(shells.unpack(pixels, packed, 16), 16), expected.real, atol=1e-6)


def test_unpacking_into_too_small_a_box_is_refused():
    pixels = half_plane(9)
    with pytest.raises(ValueError, match="do not fit a box of 16"):
        shells.unpack(pixels, np.zeros(len(pixels.kx), np.complex64), 16)


def test_shell_sums_are_sums_over_shells():
    pixels = half_plane(9)
    values = noise(4, len(pixels.kx)) + 10
    found = shells.shell_sums(values, pixels.start)
    assert found.dtype == np.float64
    for shell in range(10):
        expected = [sum(float(v) for v, s in zip(row, pixels.shell, strict=True) if s == shell) for row in values]
        np.testing.assert_allclose(found[:, shell], expected, rtol=1e-9)


@pytest.mark.parametrize("box", [7, 8])
def test_volume_shells_and_weights_stand_for_the_whole_transform(box):
    found = np.zeros(2 * box)
    np.add.at(found, shells.volume_shells(box), np.broadcast_to(shells.friedel_weights(box), (box, box, box // 2 + 1)))
    expected = np.zeros(2 * box)
    for index in np.ndindex((box,) * 3):
        expected[naive.shell_of(*(i if 2 * i < box else i - box for i in index))] += 1
    np.testing.assert_array_equal(found, expected)
    volume = noise(box, box, box)
    power = np.abs(fft.rfftn(volume)) ** 2 * shells.friedel_weights(box)
    assert power.sum() == pytest.approx(box**3 * np.sum(volume.astype(float) ** 2), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(box=st.integers(4, 800), pixel=st.floats(0.2, 9.0), shell=st.integers(1, 400))
def test_shell_and_resolution_are_inverse(box, pixel, shell):
    resolution = shells.resolution_A(shell, box, pixel)
    assert resolution == pytest.approx(box * pixel / shell)
    assert shells.shell_at(resolution, box, pixel) == min(shell, box // 2)
    # A little coarser than a shell is only the shell before.
    assert shells.shell_at(resolution * 1.0001, box, pixel) == min(shell - 1, box // 2)


def test_shell_zero_has_no_resolution():
    assert shells.resolution_A(0, 64, 1.5) == float("inf")
    assert shells.shell_at(float("inf"), 64, 1.5) == 0
