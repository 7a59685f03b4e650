"""What is summed of particles against the likelihood itself, written down from its definition."""

import numpy as np
import pytest

from dcryo.kernels import aberrations, ctf_sums, phase_fit, rotations, slices
from dcryo.kernels.ctf import ctf, phase_table, wavelength_A
from dcryo.kernels.ctf_sums import NORMAL, PARAMETERS, Optics, Own
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import half_plane

BOX, PIXEL_A, VOLTAGE_KV, CS_MM, CONTRAST = 24, 2.0, 300.0, 2.7, 0.1
SHELL_MIN, SHELL_MAX = 2, 10
PIXELS = half_plane(SHELL_MAX)
ODD = np.array([[0.3, -0.2, 4.0, -3.0, 2.0, 5.0], [0.0, 0.1, -6.0, 2.0, 1.0, 0.0]])
EVEN = np.array([[0.1, 1.0, -2.0, 1.5, 9.0, -4.0, 3.0, 2.0, 6.0], [0.0] * 9])
MAGNIFICATION = np.array([[[1.01, 0.004], [0.004, 0.995]], np.eye(2)])
DEFOCUS = np.array([[9000.0, 8800.0, 20.0], [12000.0, 11500.0, 100.0], [7000.0, 7000.0, 0.0]])
GROUP = np.array([0, 1, 0])
BFACTOR, SCALE = np.array([40.0, 0.0, -10.0]), np.array([1.1, 0.9, 1.0])


def frequencies(group, magnification=MAGNIFICATION):
    return magnification[group] @ np.stack([PIXELS.kx, PIXELS.ky]) / (BOX * PIXEL_A)


def optics():
    seen = [frequencies(group) for group in (0, 1)]
    odd = [
        np.exp(-1j * aberrations.odd_phase(own, *at)).astype(np.complex64) for own, at in zip(ODD, seen, strict=True)
    ]
    even = np.stack([aberrations.even_phase(own, *at) for own, at in zip(EVEN, seen, strict=True)])
    places = np.stack(seen) * BOX * PIXEL_A
    return Optics(np.stack(odd), np.cos(even), np.sin(even), places[:, 0].copy(), places[:, 1].copy())


@pytest.fixture(scope="module")
def example():
    random = generator(1, "example", 0)
    volume = random.standard_normal((BOX,) * 3).astype(np.float32)
    reference = slices.prepare(volume, SHELL_MAX + 1)
    turns = np.stack([rotations.perturbation(2.0, generator(2, "turn", number)) for number in range(3)])
    images = random.standard_normal((3, len(PIXELS.kx), 2)).astype(np.float32) @ np.array([1, 1j])
    inverse = random.uniform(1e-4, 2e-4, (3, SHELL_MAX + 1)).astype(np.float32)
    table = phase_table(
        BOX, PIXEL_A, *DEFOCUS.T, VOLTAGE_KV, CS_MM, CONTRAST, np.array([0.0, 30.0, 0.0]), BFACTOR, SCALE
    )
    rates = ctf_sums.rates(wavelength_A(np.full(3, VOLTAGE_KV)), np.full(3, PIXEL_A), BOX)
    return reference, turns, images.astype(np.complex64), inverse, table, rates


def gathered(example, offsets_A, power=None):
    reference, turns, images, inverse, table, rates = example
    sums = ctf_sums.empty(2, len(PIXELS.kx))
    own = Own(np.zeros(SHELL_MAX + 1) if power is None else power, table, optics())
    curves, normal = ctf_sums.gather(
        sums, reference, optics(), PIXELS, SHELL_MIN, BOX, offsets_A, own, turns, images, inverse, table, rates, GROUP
    )
    return sums, curves, normal


def slices_of(example, i, magnification=MAGNIFICATION):
    turn = example[1][i].copy()
    turn[:2] = magnification[GROUP[i]].T @ turn[:2]
    return slices.extract(example[0], turn[None], PIXELS, BOX)[0].astype(np.complex128)


def likelihood(example, i, change=(0.0,) * PARAMETERS, odd=0.0, even=0.0, magnification=MAGNIFICATION):
    """Log-likelihood of particle i. change: of its parameters; odd, even: phases beside those of the group, (P,);
    magnification: where slices are read; the CTF stays where it was."""
    group, images, inverse = GROUP[i], example[2], example[3]
    x, y = frequencies(group)
    u, v, angle = DEFOCUS[i]
    mean, vector = (u + v) / 2 + change[0], (u - v) / 2 * np.exp(2j * np.deg2rad(angle)) + change[1] + 1j * change[2]
    k2 = x**2 + y**2
    wave = wavelength_A(VOLTAGE_KV)
    defocus = mean * k2 + vector.real * (x**2 - y**2) + vector.imag * 2 * x * y
    gamma = -np.pi * wave * defocus + np.pi / 2 * CS_MM * 1e7 * wave**3 * k2**2
    gamma -= np.arctan2(CONTRAST, np.sqrt(1 - CONTRAST**2)) + np.deg2rad([0.0, 30.0, 0.0][i]) + change[3]
    gamma += aberrations.even_phase(EVEN[group], x, y) + even
    envelope = SCALE[i] * np.exp(change[5] - (BFACTOR[i] + change[4]) / 4 * k2)
    model = -np.sin(gamma) * envelope * np.exp(1j * (aberrations.odd_phase(ODD[group], x, y) + odd))
    model *= slices_of(example, i, magnification)
    of_shell = inverse[i][PIXELS.shell]
    terms = (np.conj(model) * images[i]).real - np.abs(model) ** 2 * of_shell / 2
    return terms[PIXELS.shell >= SHELL_MIN].sum()


def test_the_model_is_that_of_the_ctf(example) -> None:
    x, y = frequencies(1)
    expected = ctf(x, y, 1, 1.0, *DEFOCUS[1], VOLTAGE_KV, CS_MM, CONTRAST, 30.0, BFACTOR[1], SCALE[1])[0]
    found = ctf(
        PIXELS.kx, PIXELS.ky, BOX, PIXEL_A, *DEFOCUS[1], VOLTAGE_KV, CS_MM, CONTRAST, 30.0, BFACTOR[1], SCALE[1]
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_curves_are_likelihoods_of_changes_of_the_defocus(example) -> None:
    offsets = np.array([-300.0, 20.0, 0.0])[:, None] + 60.0 * np.arange(8)
    _, curves, _ = gathered(example, offsets)
    for i in range(3):
        expected = [likelihood(example, i, (dz, 0, 0, 0, 0, 0)) for dz in offsets[i]]
        # A ring's phase is that of its middle.
        np.testing.assert_allclose(np.diff(curves[i]), np.diff(expected), atol=0.02 * np.ptp(expected))


def test_normal_equations_are_the_gradient_and_gauss_newtons_matrix(example) -> None:
    _, _, normal = gathered(example, np.zeros((3, 1)))
    steps = np.array([5.0, 5.0, 5.0, 1e-3, 0.5, 1e-3])
    for i in range(3):
        for m, step in enumerate(steps):
            change = np.zeros(PARAMETERS)
            change[m] = step
            slope = (likelihood(example, i, change) - likelihood(example, i, -change)) / (2 * step)
            assert normal[i, m] == pytest.approx(slope, rel=1e-3, abs=1e-5 / step)
        matrix = np.zeros((PARAMETERS,) * 2)
        matrix[np.triu_indices(PARAMETERS)] = normal[i, PARAMETERS:]
        assert normal.shape == (3, NORMAL) and np.all(np.linalg.eigvalsh(matrix + np.triu(matrix, 1).T) > 0)
        # The diagonal is exact where the model is linear: in the logarithm of the scale, of a model times exp.
        square = likelihood(example, i, (0, 0, 0, 0, 0, np.log(2.0))) - 2 * likelihood(example, i)
        assert normal[i, NORMAL - 1] == pytest.approx(-square, rel=1e-4)


def test_sums_hold_the_likelihood_of_any_phases(example) -> None:
    sums, _, _ = gathered(example, np.zeros((3, 1)))
    assert sums.particles.tolist() == [2, 1]
    random = generator(3, "phases", 0)
    for group, members in ((0, (0, 2)), (1, (1,))):
        x, y = frequencies(group)
        base = aberrations.odd_phase(ODD[group], x, y), aberrations.even_phase(EVEN[group], x, y)
        values = []
        for _ in range(3):
            odd, even = random.uniform(-3, 3, (2, len(PIXELS.kx)))
            ours = phase_fit._local(sums.phases[group], base[0] + odd, base[1] + even).value.sum()
            values.append((ours, sum(likelihood(example, i, odd=odd, even=even) for i in members)))
            again = phase_fit._local(phase_fit.turned(sums.phases[group], *base), odd, even).value.sum()
            assert again == pytest.approx(ours, rel=1e-6, abs=1e-9)
        ours, direct = np.array(values).T
        np.testing.assert_allclose(np.diff(ours), np.diff(direct), rtol=1e-3, atol=1e-4)


def test_the_stretch_is_the_gradient_by_where_slices_are_read(example) -> None:
    sums, _, _ = gathered(example, np.zeros((3, 1)))
    step, slopes = 2e-3, np.zeros((2, 2, 2))
    for group, members in ((0, (0, 2)), (1, (1,))):
        for place in np.ndindex(2, 2):
            change = np.zeros((2, 2, 2))
            change[group][place] = step
            above, below = (
                sum(likelihood(example, i, magnification=MAGNIFICATION + sign * change) for i in members)
                for sign in (1, -1)
            )
            slopes[group][place] = (above - below) / (2 * step)
    # The twin reads slices at places in float32, and takes differences of them.
    np.testing.assert_allclose(sums.stretch[:, :4].reshape(2, 2, 2), slopes, atol=0.01 * np.abs(slopes).max())


def test_what_a_particle_shares_with_its_reference_is_taken_off(example) -> None:
    """C N / v of its CTF and phase, in place of images that are zero."""
    reference, turns, images, inverse, table, rates = example
    blank = reference, turns, 0 * images, inverse, table, rates
    power = np.linspace(5.0, 1.0, SHELL_MAX + 1)
    sums, curves, normal = gathered(blank, np.zeros((3, 1)), power)
    plain, _, _ = gathered(blank, np.zeros((3, 1)))
    for group, members in ((0, (0, 2)), (1, (1,))):
        x, y = frequencies(group)
        expected = 0
        for i in members:
            shift = [0.0, 30.0, 0.0][i]
            given = *DEFOCUS[i], VOLTAGE_KV, CS_MM, CONTRAST, shift
            even = aberrations.even_phase(EVEN[group], x, y)
            own = ctf(x, y, 1, 1.0, *given, BFACTOR[i], SCALE[i], even_phase_rad=even)[0]
            envelope = SCALE[i] * np.exp(-BFACTOR[i] / 4 * (x**2 + y**2))
            shared = power[PIXELS.shell] * inverse[i][PIXELS.shell] * envelope * own
            sine = -ctf(x, y, 1, 1.0, *given)[0]
            expected = expected - shared * np.exp(1j * aberrations.odd_phase(ODD[group], x, y)) * sine
        expected[PIXELS.shell < SHELL_MIN] = 0
        change = sums.phases[group] - plain.phases[group]
        np.testing.assert_allclose(change[:, 0] + 1j * change[:, 1], expected, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_array_equal(change[:, 4:], 0)
    assert curves.shape == (3, 1) and np.isfinite(normal).all()
