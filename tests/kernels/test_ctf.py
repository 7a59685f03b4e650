import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_physics import ctf_value

from dcryo.kernels.ctf import ctf, wavelength_A


def test_wavelength_is_the_published_one():
    # Kirkland 2010, table 2.1.
    np.testing.assert_allclose(wavelength_A([100.0, 200.0, 300.0]), [0.0370144, 0.0250793, 0.0196875], rtol=2e-5)


@settings(max_examples=60, deadline=None)
@given(
    u=st.floats(-5e3, 5e4),
    astigmatism=st.floats(-3e3, 3e3),
    angle=st.floats(-360, 360),
    voltage=st.sampled_from([80.0, 120.0, 200.0, 300.0]),
    cs=st.floats(0.0, 3.0),
    q=st.floats(0.0, 0.99),
    phase=st.floats(0.0, 180.0),
    bfactor=st.floats(0.0, 500.0),
    scale=st.floats(0.1, 2.0),
    pixel=st.floats(0.5, 5.0),
    box=st.integers(16, 65),
)
def test_agrees_with_the_formula(u, astigmatism, angle, voltage, cs, q, phase, bfactor, scale, pixel, box):
    kx = np.array([0, 1, 3, 5, box // 2, 0, 2], dtype=np.int32)
    ky = np.array([0, 0, -4, 7, -(box // 2), 6, 2], dtype=np.int32)
    found = ctf(kx, ky, box, pixel, u, u - astigmatism, angle, voltage, cs, q, phase, bfactor, scale)
    length = box * pixel
    expected = [
        ctf_value(x / length, y / length, u, u - astigmatism, angle, voltage, cs, q, phase, bfactor, scale)
        for x, y in zip(kx, ky, strict=True)
    ]
    assert found.shape == (1, 7) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], expected, atol=2e-6)


def test_every_parameter_may_differ_between_particles():
    kx, ky = np.array([2, 5, 9], dtype=np.int32), np.array([1, -7, 3], dtype=np.int32)
    rows = np.array(
        [
            [1.1, 12000, 11000, 30, 300, 2.7, 0.1, 0, 0, 1.0],
            [1.2, 15000, 15500, 75, 200, 1.4, 0.07, 90, 40, 0.8],
        ]
    )
    together = ctf(kx, ky, 48, *rows.T)
    for row, values in zip(rows, together, strict=True):
        np.testing.assert_array_equal(ctf(kx, ky, 48, *row)[0], values)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_underfocus_is_positive_near_zero_and_has_its_first_zero_where_it_should():
    wavelength = float(wavelength_A(300.0))
    defocus, box, pixel = 20000.0, 512, 1.0
    k = np.arange(box // 2, dtype=np.int32)
    values = ctf(k, np.zeros_like(k), box, pixel, defocus, defocus, 0.0, 300.0, 0.0, 0.0)[0]
    first_zero = np.flatnonzero(np.diff(np.sign(values[1:])))[0] + 1
    assert values[1] > 0
    assert first_zero / (box * pixel) == pytest.approx(1.0 / np.sqrt(wavelength * defocus), abs=2 / (box * pixel))
    # Amplitude contrast is what is left at k = 0.
    assert ctf(k[:1], k[:1], box, pixel, defocus, defocus, 0.0, 300.0, 2.7, 0.1)[0, 0] == pytest.approx(0.1)


def test_defocus_u_lies_along_its_angle():
    at = {"box_px": 100, "pixel_size_A": 1.0, "voltage_kV": 300.0, "spherical_aberration_mm": 2.7}
    kx, ky = np.array([6, -8], dtype=np.int32), np.array([8, 6], dtype=np.int32)
    angle = np.degrees(np.arctan2(8, 6))
    found = ctf(kx, ky, defocus_u_A=20000, defocus_v_A=10000, defocus_angle_deg=angle, amplitude_contrast=0.1, **at)
    along_u = ctf(kx, ky, defocus_u_A=20000, defocus_v_A=20000, defocus_angle_deg=0, amplitude_contrast=0.1, **at)
    along_v = ctf(kx, ky, defocus_u_A=10000, defocus_v_A=10000, defocus_angle_deg=0, amplitude_contrast=0.1, **at)
    np.testing.assert_allclose(found[0], [along_u[0, 0], along_v[0, 1]], atol=1e-6)


def test_even_phases_add_to_gamma():
    """A phase of the same size everywhere is a phase shift the other way."""
    kx, ky = np.array([0, 3, 7, 11], dtype=np.int32), np.array([0, -4, 2, 5], dtype=np.int32)
    optics = (64, 1.5, [12000.0, 9000.0], 8000.0, 30.0, 300.0, 2.7, 0.1)
    phases = np.array([0.0, 0.4, -1.2, 30.0])
    found = ctf(kx, ky, *optics, 20.0, 40.0, 0.8, even_phase_rad=phases)
    for p, phase in enumerate(phases):
        expected = ctf(kx[p : p + 1], ky[p : p + 1], *optics, 20.0 - np.rad2deg(phase), 40.0, 0.8)
        np.testing.assert_allclose(found[:, p : p + 1], expected, atol=2e-6)
    np.testing.assert_array_equal(
        ctf(kx, ky, *optics, even_phase_rad=np.zeros(4)), ctf(kx, ky, *optics)
    )  # fmt: skip
