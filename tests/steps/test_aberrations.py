"""Images without their aberrations, against images that had none."""

import numpy as np
import pytest

from dcryo.kernels import fft, shells
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.phantom import phantom
from dcryo.kernels.slices import prepare
from dcryo.kernels.symmetry import operators
from dcryo.steps import simulation
from dcryo.steps.aberrations import NO_ABERRATIONS, Aberrations, corrected
from dcryo.steps.simulation import Microscope

BOX, PIXEL_A = 64, 2.0
ODD = (0.0, 0.0, 60.0, -90.0, 120.0, 40.0)
MATRIX = ((1.03, 0.011), (0.006, 0.985))


def microscope(aberrations: Aberrations) -> Microscope:
    """Little defocus, so that the contrast of a small particle stays in the box."""
    return Microscope(
        box_px=BOX, pixel_size_A=PIXEL_A, voltage_kV=300.0, spherical_aberration_mm=2.7, amplitude_contrast=0.1,
        defocus_min_A=1500.0, defocus_max_A=3000.0, astigmatism_A=300.0, defocus_scatter_A=0.0, shift_sigma_px=1.0,
        preference=0.0, noise_bfactor_A2=0.0, aberrations=aberrations,
    )  # fmt: skip


def images(aberrations: Aberrations) -> tuple[np.ndarray, simulation.Truth]:
    atoms = phantom(operators("C1"), 25.0)
    density = gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, BOX, PIXEL_A)
    scope = microscope(aberrations)
    truth = simulation.draw_truth(scope, 1, np.arange(6))
    if aberrations.anisotropic:  # in the image as it is, where the corrected one has these origins
        truth = simulation.Truth(
            **{**vars(truth), "origin_A": aberrations.observed_origin(truth.origin_A)},
        )
    prepared = prepare(density, simulation.image_pixels(BOX).shell_max)
    return simulation.images(prepared, scope, truth, 0, 1, 0.0), truth


def shell_agreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlation of two stacks in each shell below the last, (S,)."""
    pixels = shells.half_plane(BOX // 2 - 1)
    a, b = (shells.pack(pixels, fft.rfft2(stack)) for stack in (first, second))
    cross, one, two = (
        shells.shell_sums(values.sum(axis=0), pixels.start)
        for values in ((a * b.conj()).real, np.abs(a) ** 2, np.abs(b) ** 2)
    )
    return cross / np.sqrt(one * two)


def test_odd_phases_are_taken_off() -> None:
    clean, _ = images(NO_ABERRATIONS)
    aberrations = Aberrations(odd=ODD)
    aberrated, _ = images(aberrations)
    assert shell_agreement(aberrated, clean).min() < 0.5
    assert shell_agreement(corrected(aberrated, aberrations, PIXEL_A), clean).min() > 1 - 1e-6


@pytest.mark.parametrize("odd", [(), ODD])
def test_magnification_is_made_even(odd: tuple[float, ...]) -> None:
    clean, _ = images(NO_ABERRATIONS)
    aberrations = Aberrations(odd=odd, magnification=MATRIX)
    aberrated, _ = images(aberrations)
    before = shell_agreement(aberrated, clean)
    # What the detector has not seen, beyond its last shells, is not there.
    after = shell_agreement(corrected(aberrated, aberrations, PIXEL_A), clean)[:-2]
    assert before[: BOX // 4].min() < 0.9975 and before.min() < 0.95
    assert after[: BOX // 4].min() > 0.9995 and after.min() > 0.99


def test_pixels_that_are_not_known_stay_unknown() -> None:
    one = np.full((1, BOX, BOX), np.nan, dtype=np.float32)
    assert np.isnan(corrected(one, Aberrations(odd=ODD), PIXEL_A)).all()
    assert np.isnan(corrected(one, Aberrations(magnification=MATRIX), PIXEL_A)).any()


def test_origins_go_there_and_back() -> None:
    aberrations = Aberrations(magnification=MATRIX)
    origin = np.random.default_rng(1).normal(size=(5, 2))
    there = aberrations.origin(origin)
    np.testing.assert_allclose(aberrations.observed_origin(there), origin, atol=1e-12)
    # k . t is what counts: the frequency M k of the corrected image has the phase that k had.
    k = np.array([3.0, -2.0])
    np.testing.assert_allclose(there @ (np.array(MATRIX) @ k), origin @ k, atol=1e-12)


def test_only_recorded_frequencies_count() -> None:
    wide = Aberrations(magnification=((1.1, 0.0), (0.0, 1.0)))  # the detector sees 1.1 of Nyquist along x
    narrow = Aberrations(magnification=((0.9, 0.0), (0.0, 1.0)))
    k = np.array([0.0, 28.0, 29.0, 32.0])
    assert wide.recorded(k, 0 * k, BOX).all()
    assert narrow.recorded(k, 0 * k, BOX).tolist() == [True, True, False, False]
