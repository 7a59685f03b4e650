"""Images that feel the curvature of the Ewald sphere: what they are, and their back-projection."""

import numpy as np
import pytest
from naive import blob_volume

from dcryo.kernels import ewald as kernel
from dcryo.kernels import fft, slices
from dcryo.kernels.ctf import ctf, wavelength_A
from dcryo.kernels.posterior import shift_phases
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.shells import half_plane, unpack
from dcryo.steps import ewald, expectation, simulation
from dcryo.steps.ewald import Sidebands
from dcryo.steps.expectation import Batch
from dcryo.steps.simulation import Microscope

BOX, PIXEL_A, VOLTAGE_KV = 48, 1.0, 20.0
PIXELS = half_plane(BOX // 2)


def microscope(hand: int) -> Microscope:
    return Microscope(
        box_px=BOX, pixel_size_A=PIXEL_A, voltage_kV=VOLTAGE_KV, spherical_aberration_mm=0.01, amplitude_contrast=0.1,
        defocus_min_A=300.0, defocus_max_A=600.0, astigmatism_A=30.0, defocus_scatter_A=0.0, shift_sigma_px=1.0,
        preference=0.0, noise_bfactor_A2=0.0, hand=hand,
    )  # fmt: skip


@pytest.mark.parametrize("hand", [1, -1])
def test_parts_at_different_heights_have_different_defocus(hand: int) -> None:
    """With hand 1 what lies at z in the image's frame has the defocus of the particle less z."""
    scope = microscope(hand)
    truth = simulation.draw_truth(scope, 1, np.arange(4))
    centres = np.array([[3.0, -4.0, 12.0], [-5.0, 2.0, -11.0], [6.0, 8.0, 3.0]])
    amplitudes, pixels = np.array([1.0, 0.8, 1.3]), simulation.image_pixels(BOX)
    prepared = slices.prepare(blob_volume(centres, amplitudes, 0.8, BOX), pixels.shell_max)
    found = simulation.signal(prepared, scope, truth)
    expected = np.zeros_like(found)
    flat = np.zeros_like(found)
    for centre, amplitude in zip(centres, amplitudes, strict=True):
        of_one = slices.prepare(blob_volume(centre[None], np.array([amplitude]), 0.8, BOX), pixels.shell_max)
        projections = slices.extract(of_one, truth.rotation, pixels, BOX)
        height_A = PIXEL_A * (truth.rotation @ centre)[:, 2]
        for total, of_height in ((expected, hand), (flat, 0)):
            total += projections * ctf(
                pixels.kx, pixels.ky, BOX, PIXEL_A, truth.defocus_u_A - of_height * height_A,
                truth.defocus_v_A - of_height * height_A, truth.defocus_angle_deg, VOLTAGE_KV, 0.01, 0.1,
            )  # fmt: skip
    for total in (expected, flat):
        total *= shift_phases(pixels, -truth.origin_A / PIXEL_A, BOX, len(pixels.kx))
    found, expected, flat = (total[:, pixels.start[12] :] for total in (found, expected, flat))
    curvature = np.linalg.norm(found - flat)
    assert curvature > 0.15 * np.linalg.norm(expected)
    # Within a blob the defocus differs a little too.
    assert np.linalg.norm(found - expected) < 0.15 * curvature


def made(curvature: float) -> tuple[Batch, Sidebands, np.ndarray]:
    """Images of a volume in two sidebands, moved by their origins; the volume as slices are taken from it."""
    rng = np.random.Generator(np.random.Philox(3))
    centres = rng.uniform(-12, 12, (20, 3))
    prepared = slices.prepare(blob_volume(centres, np.ones(20), 1.0, BOX), BOX // 2)
    rotation, origin = random_rotations(10, rng), rng.uniform(-3, 3, (10, 2))
    defocus = rng.uniform(300, 800, 10)
    P = np.empty((10, len(PIXELS.kx)), dtype=np.complex64)
    for part, phase in (("real", 0.0), ("imag", 90.0)):
        setattr(P, part, ctf(PIXELS.kx, PIXELS.ky, BOX, PIXEL_A, defocus, defocus, 0.0, VOLTAGE_KV, 0.01, 0.1, phase))
    sidebands = Sidebands(P, np.full(10, curvature), 0.8 * BOX)
    sections = [kernel.extract(prepared, rotation, c * sidebands.curvature, PIXELS.kx, PIXELS.ky, BOX) for c in (-1, 1)]
    packed = (P * sections[0] + np.conj(P) * sections[1]) / 2
    packed *= shift_phases(PIXELS, -origin, BOX, packed.shape[1])
    ones = np.ones(10)
    images = fft.irfft2(unpack(PIXELS, packed, BOX), BOX)
    poses = (rotation, origin, rotation, origin)
    return Batch(images, P.real, np.zeros(10, int), ones, ones, *poses, np.ones((10, 1))), sidebands, prepared


def accumulator() -> np.ndarray:
    return np.zeros((*slices.volume_shape(BOX // 2, BOX), 3), dtype=np.float32)


def test_flat_images_are_back_projected_as_ever() -> None:
    batch, sidebands, _ = made(0.0)
    curved, flat = accumulator(), accumulator()
    assert ewald.back_project(curved, batch, sidebands, PIXELS).all()
    expectation.back_project(flat, batch, PIXELS)
    for part in (slice(0, 2), slice(2, 3)):
        assert np.linalg.norm((curved - flat)[..., part]) < 1e-5 * np.linalg.norm(flat[..., part])


def test_a_reference_in_place_of_images_sums_to_the_same() -> None:
    wavelength = float(wavelength_A(VOLTAGE_KV))
    batch, sidebands, prepared = made(4 * float(kernel.curvature_per_px(wavelength, BOX, PIXEL_A)))
    sums, of_reference = accumulator(), np.zeros(prepared.shape, dtype=np.complex64)
    ewald.back_project(sums, batch, sidebands, PIXELS)
    ewald.sections_back_projected(of_reference, prepared, batch.rotation, sidebands, PIXELS, BOX)
    found = sums[..., 0] + 1j * sums[..., 1]
    # But for the Nyquist frequency, which a real image cannot hold both parts of.
    assert np.linalg.norm(found - of_reference) < 0.02 * np.linalg.norm(of_reference)
    flat = np.zeros_like(of_reference)
    expectation.slices_back_projected(flat, prepared, batch.rotation, batch.ctf, PIXELS, BOX)
    assert np.linalg.norm(found - flat) > 0.1 * np.linalg.norm(of_reference)


def test_what_is_not_finite_is_left_out() -> None:
    batch, sidebands, _ = made(0.002)
    whole, without = accumulator(), accumulator()
    batch.images[3], rest = np.nan, np.arange(10) != 3
    assert ewald.back_project(whole, batch, sidebands, PIXELS).tolist() == rest.tolist()
    ewald.back_project(without, Batch(*(column[rest] for column in batch)), sidebands.take(rest), PIXELS)
    np.testing.assert_allclose(whole, without, atol=1e-5 * np.abs(without).max())
