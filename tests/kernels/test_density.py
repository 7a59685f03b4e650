import numpy as np
import pytest
from naive_physics import density_transform

from dcryo.kernels import fft
from dcryo.kernels.density import gaussian_density


def atoms(count, reach_A, gaussians=2):
    rng = np.random.Generator(np.random.Philox(5))
    position = rng.uniform(-reach_A, reach_A, (count, 3))
    amplitude = rng.uniform(0.5, 3.0, (count, gaussians))
    bfactor = rng.uniform(0.5, 200.0, (count, gaussians))
    return position, amplitude, bfactor


@pytest.mark.parametrize(("box", "pixel"), [(32, 1.0), (33, 1.0), (24, 3.5), (40, 0.6)])
def test_transform_is_the_sum_over_atoms_up_to_nyquist(box, pixel):
    position, amplitude, bfactor = atoms(12, 0.35 * box * pixel)
    density = gaussian_density(position, amplitude, bfactor, box, pixel)
    assert density.shape == (box,) * 3 and density.dtype == np.float32
    transform = fft.rfftn(density) * pixel**3
    total = amplitude.sum()
    for kx, ky, kz in [(0, 0, 0), (1, 0, 0), (0, 2, -1), (3, -4, 5), (6, 6, -6), (box // 2 - 1, 0, 0)]:
        k_1_A = np.array([kx, ky, kz]) / (box * pixel)
        expected = density_transform(position, amplitude, bfactor, k_1_A)
        assert abs(transform[kz, ky, kx] - expected) < 2e-3 * total
    corner = transform[box // 2 - 1, box // 2 - 1, box // 2 - 1]
    assert abs(corner) < 1e-4 * total


def test_whole_pixels_move_the_density_exactly():
    position, amplitude, bfactor = atoms(5, 6.0)
    there = gaussian_density(position, amplitude, bfactor + 40.0, 32, 1.0)
    moved = gaussian_density(position + np.array([3.0, -2.0, 1.0]), amplitude, bfactor + 40.0, 32, 1.0)
    np.testing.assert_allclose(moved, np.roll(there, (1, -2, 3), axis=(0, 1, 2)), atol=1e-4 * there.max())


def test_an_atom_at_the_origin_is_at_the_box_centre_with_its_analytic_profile():
    box, pixel, b = 25, 0.8, 150.0
    density = gaussian_density(np.zeros((1, 3)), np.ones((1, 1)), np.full((1, 1), b), box, pixel)
    r = (np.arange(box) - box // 2) * pixel
    expected = (4 * np.pi / b) ** 1.5 * np.exp(-4 * np.pi**2 * r**2 / b)
    np.testing.assert_allclose(density[box // 2, box // 2], expected, atol=2e-3 * expected.max())
