from itertools import pairwise

import numpy as np
import pytest
from naive_physics import blob_image, ctf_value

from dcryo.euler import matrix_from_euler
from dcryo.kernels import fft, slices
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.phantom import phantom
from dcryo.kernels.shells import friedel_weights, half_plane, pack, shell_sums, unpack
from dcryo.kernels.symmetry import operators
from dcryo.steps import simulation
from dcryo.steps.simulation import Microscope, Truth

BOX, PIXEL = 48, 2.0


def microscope(**changed):
    given = {
        "box_px": BOX,
        "pixel_size_A": PIXEL,
        "voltage_kV": 300.0,
        "spherical_aberration_mm": 2.7,
        "amplitude_contrast": 0.1,
        "defocus_min_A": 8000.0,
        "defocus_max_A": 20000.0,
        "astigmatism_A": 300.0,
        "defocus_scatter_A": 100.0,
        "shift_sigma_px": 2.0,
        "preference": 0.0,
        "noise_bfactor_A2": 100.0,
    }
    return Microscope(**(given | changed))


def perfect(box=BOX):
    """A microscope whose CTF is 1 at every frequency."""
    return microscope(box_px=box, spherical_aberration_mm=0.0, amplitude_contrast=1.0 - 1e-16)


def prepared(volume):
    return slices.prepare(volume, simulation.image_pixels(len(volume)).shell_max)


def blob_volume(centre, sigma, box):
    axis = np.arange(box) - box // 2
    x, y, z = (np.exp(-((axis - c) ** 2) / (2 * sigma**2)) for c in centre)
    return (z[:, None, None] * y[:, None] * x / (2 * np.pi * sigma**2) ** 1.5).astype(np.float32)


@pytest.mark.parametrize("box", [48, 49])
@pytest.mark.parametrize("euler", [(0, 0, 0), (35, 0, 0), (0, 90, 0), (20, 60, -110)])
def test_a_blob_lands_where_its_pose_and_shift_say(box, euler):
    centre, sigma = np.array([7.0, -4.0, 2.5]), 2.0
    origin_px = np.array([3.25, -1.5])
    rotation = matrix_from_euler(*euler)
    truth = Truth(rotation[None], origin_px[None] * PIXEL, *(np.zeros(1) for _ in range(3)), np.ones(1, np.int8))
    image = simulation.images(prepared(blob_volume(centre, sigma, box)), perfect(box), truth, 0, 0, 0.0)[0]
    expected = blob_image((rotation @ centre)[:2] - origin_px, sigma, box)
    # Trilinear slices are corrected on average over views: along the axes they are some percent too bright.
    np.testing.assert_allclose(image, expected, atol=0.04 * expected.max())
    # To first order in its gradients, what is left is a shift of some hundredths of a pixel at most.
    down, along = np.gradient(expected)
    basis = np.stack([expected, down, along], axis=-1).reshape(-1, 3)
    _, *shift = np.linalg.lstsq(basis, (image - expected).ravel())[0]
    assert np.abs(shift).max() < 0.03


def test_images_of_atoms_are_the_sum_over_atoms():
    """From atoms to images with no volume between: turned, projected, shifted and modulated one by one."""
    scope = microscope()
    made = phantom(operators("C2"), 30.0)
    density = gaussian_density(made.position_A, made.amplitude, made.bfactor_A2, BOX, PIXEL)
    truth = simulation.draw_truth(scope, 3, simulation.micrograph_of(6, 2))
    found = simulation.signal(prepared(density), scope, truth)
    pixels = simulation.image_pixels(BOX)
    k_1_A = np.stack([pixels.kx, pixels.ky], axis=1) / (BOX * PIXEL)
    scattering = made.amplitude[0, 0] * np.exp(-made.bfactor_A2[0, 0] * np.sum(k_1_A**2, axis=1) / 4)
    for i in range(6):
        place_A = made.position_A @ truth.rotation[i, :2].T - truth.origin_A[i]
        waves = np.exp(-2j * np.pi * k_1_A @ place_A.T).sum(axis=1)
        u, v, angle = truth.defocus_u_A[i], truth.defocus_v_A[i], truth.defocus_angle_deg[i]
        transfer = [ctf_value(*k, u, v, angle, 300.0, 2.7, 0.1) for k in k_1_A]
        expected = scattering * waves * transfer / PIXEL**3
        cross = shell_sums((found[i] * expected.conj()).real, pixels.start)
        powers = shell_sums(np.abs(found[i]) ** 2, pixels.start), shell_sums(np.abs(expected) ** 2, pixels.start)
        correlation = cross / np.sqrt(powers[0] * powers[1])
        assert correlation[:20].min() > 0.99 and correlation.min() > 0.97
        assert np.sum(powers[0]) == pytest.approx(np.sum(powers[1]), rel=0.05)


def test_defocus_inverts_and_erases_bands_of_frequency():
    volume = blob_volume((0, 0, 0), 1.0, BOX)
    truth = Truth(np.eye(3)[None], np.zeros((1, 2)), *(np.array([v]) for v in (20000.0, 20000.0, 0.0)), None)
    plain = Truth(np.eye(3)[None], np.zeros((1, 2)), *(np.zeros(1) for _ in range(3)), None)
    pixels = simulation.image_pixels(BOX)
    ratio = simulation.signal(prepared(volume), microscope(), truth) / simulation.signal(
        prepared(volume), perfect(), plain
    )
    profile = shell_sums(ratio.real, pixels.start)[0] / pixels.counts
    assert profile[1] > 0.2 and profile.min() < -0.8 and np.abs(ratio.imag).max() < 1e-3


def test_images_do_not_depend_on_the_chunks_they_are_made_in():
    rng = np.random.Generator(np.random.Philox(1))
    density = prepared(rng.standard_normal((BOX,) * 3).astype(np.float32))
    scope = microscope()
    truth = simulation.draw_truth(scope, 5, simulation.micrograph_of(23, 3))

    def made(cuts):
        return np.concatenate(
            [simulation.images(density, scope, truth.take(slice(a, b)), a, 5, 2.0) for a, b in pairwise(cuts)]
        )

    whole = made([0, 23])
    np.testing.assert_array_equal(whole, made([0, 1, 8, 15, 23]))
    np.testing.assert_array_equal(whole, made([0, 13, 16, 23]))
    assert np.abs(whole - simulation.images(density, scope, truth, 0, 6, 2.0)).max() > 1.0


def test_noise_has_its_variance_and_colour():
    scope = microscope(noise_bfactor_A2=100.0)
    blank = prepared(np.zeros((BOX,) * 3, dtype=np.float32))
    truth = simulation.draw_truth(scope, 1, simulation.micrograph_of(200, 2))
    noise = simulation.images(blank, scope, truth, 0, 1, 3.0)
    assert noise.var() == pytest.approx(9.0, rel=0.02) and abs(noise.mean()) < 0.05
    pixels = half_plane(BOX // 2 - 1)
    power = np.abs(pack(pixels, fft.rfft2(noise))) ** 2
    profile = shell_sums(power, pixels.start).mean(axis=0) / pixels.counts
    k = np.arange(BOX // 2) / (BOX * PIXEL)
    expected = simulation.NOISE_FLOOR + (1 - simulation.NOISE_FLOOR) * np.exp(-100.0 * k**2 / 2)
    np.testing.assert_allclose(profile[2:] / profile[2:].sum(), expected[2:] / expected[2:].sum(), rtol=0.12)
    white = simulation.noise_amplitude(microscope(noise_bfactor_A2=0.0))
    np.testing.assert_allclose(white, 1.0, rtol=1e-6)


@pytest.mark.parametrize("box", [31, 32])
def test_pixel_variance_is_that_of_the_images(box):
    rng = np.random.Generator(np.random.Philox(2))
    pixels = simulation.image_pixels(box)
    images = rng.standard_normal((3, box, box)).astype(np.float32) + 5.0
    packed = pack(pixels, fft.rfft2(images))
    smooth = fft.irfft2(unpack(pixels, packed, box), box)
    np.testing.assert_allclose(simulation.pixel_variance(packed, box), smooth.var(axis=(1, 2)), rtol=1e-4)
    # And the weights agree with those that the rest of the package uses.
    amplitude = simulation.noise_amplitude(microscope(box_px=box))
    assert np.sum(amplitude**2 * friedel_weights(box)) == pytest.approx(box**2)


def test_views_are_uniform_or_concentrated_as_asked():
    micrograph = simulation.micrograph_of(4000, 10)
    views = simulation.draw_truth(microscope(), 0, micrograph).rotation[:, 2]
    assert np.abs(views.mean(axis=0)).max() < 0.04
    np.testing.assert_allclose(views.T @ views / len(views), np.eye(3) / 3, atol=0.03)
    for kappa in (0.01, 3.0, 800.0, 5000.0):
        truth = simulation.draw_truth(microscope(preference=kappa), 0, micrograph)
        expected = 1 / np.tanh(kappa) - 1 / kappa
        assert truth.rotation[:, 2, 2].mean() == pytest.approx(expected, abs=0.06)
        np.testing.assert_allclose(np.linalg.det(truth.rotation), 1.0)
        np.testing.assert_allclose(truth.rotation[:, :2, 2].mean(axis=0), 0.0, atol=0.04)


def test_shifts_defoci_and_halves_are_spread_as_asked():
    micrograph = simulation.micrograph_of(3000, 60)
    assert np.bincount(micrograph).tolist() == [50] * 60
    truth = simulation.draw_truth(microscope(), 9, micrograph)
    assert truth.origin_A.std(axis=0) / PIXEL == pytest.approx(2.0, rel=0.05)
    mean = (truth.defocus_u_A + truth.defocus_v_A) / 2
    of_micrograph = mean.reshape(60, 50)
    assert of_micrograph.std(axis=1).mean() == pytest.approx(100.0, rel=0.05)
    assert of_micrograph.mean(axis=1).min() > 7900 and of_micrograph.mean(axis=1).max() < 20100
    assert of_micrograph.mean(axis=1).std() == pytest.approx(12000 / np.sqrt(12), rel=0.2)
    assert (truth.defocus_u_A >= truth.defocus_v_A).all()
    assert len(np.unique(truth.defocus_angle_deg)) == 60
    assert np.bincount(truth.half).tolist() == [0, 1500, 1500]
    assert np.array_equal(simulation.micrograph_of(5, 2), [0, 0, 0, 1, 1])
