"""Masks around molecules whose place is known."""

import numpy as np
import pytest
from noisy_halves import blurred, noise_power, noisy_halves
from scipy import ndimage

from dcryo.kernels import density, phantom, solvent, symmetry

BOX, PIXEL_A = 64, 2.2


def molecule(seed: int, name: str = "C1") -> np.ndarray:
    made = phantom.phantom(symmetry.operators(name), 45.0, seed=seed)
    truth = density.gaussian_density(made.position_A, made.amplitude, made.bfactor_A2, BOX, PIXEL_A)
    return blurred(truth, PIXEL_A, 150.0)


@pytest.mark.parametrize("resolution_A", [5.0, 12.0])
@pytest.mark.parametrize("name", ["C1", "D2"])
def test_the_mask_holds_the_molecule_and_little_else(resolution_A: float, name: str) -> None:
    truth = molecule(2, name)
    found = solvent.find_molecule(*noisy_halves(truth, noise_power(truth, PIXEL_A, resolution_A), 4), PIXEL_A)
    assert found is not None and found.lowpass_A >= 15
    inside = truth > 0.1 * truth.max()
    mask = solvent.soft_mask(found.core, 6 / PIXEL_A, 10 / PIXEL_A)
    assert mask[inside].mean() > 0.99
    far = ndimage.distance_transform_edt(~inside) > (6 + 10 + 15) / PIXEL_A
    assert not mask[far].any()
    assert found.core.sum() < 3 * inside.sum()


def test_the_mask_changes_little_with_its_threshold() -> None:
    truth = molecule(3)
    halves = noisy_halves(truth, noise_power(truth, PIXEL_A, 6.0), 4)
    volumes = []
    for level in (0.2, 0.3, 0.4):
        found = solvent.find_molecule(*halves, PIXEL_A, level)
        assert found is not None
        volumes.append(solvent.soft_mask(found.core, 6 / PIXEL_A, 10 / PIXEL_A).sum())
    assert volumes[0] < 1.25 * volumes[2]


def test_scale_and_offset_of_the_grey_values_do_not_matter() -> None:
    truth = molecule(3)
    first, second = noisy_halves(truth, noise_power(truth, PIXEL_A, 6.0), 4)
    one = solvent.find_molecule(first, second, PIXEL_A)
    other = solvent.find_molecule(1e-3 * first + 5, 1e-3 * second + 5, PIXEL_A)
    assert one is not None and other is not None
    assert np.mean(one.core != other.core) < 1e-3


def test_specks_of_noise_far_from_the_molecule_are_left_out() -> None:
    truth = molecule(2)
    truth[3:7, 3:7, 32:36] = truth.max() / 2
    truth[32:34, 32:34, 58:60] = truth.max()
    found = solvent.find_molecule(*noisy_halves(truth, noise_power(truth, PIXEL_A, 5.0), 4), PIXEL_A)
    assert found is not None
    assert not found.core[:8, :8].any() and found.core[26:38, 26:38, 26:38].any()


def test_pictures_lose_specks_and_keep_weak_domains() -> None:
    volume = np.zeros((32, 32, 32), dtype=np.float32)
    volume[8:20, 8:20, 8:20] = 2
    volume[24:28, 8:12, 8:12] = 1
    volume[2, 2, 2:5] = 3
    volume[28, 28, 28] = 0.5
    seen = solvent.without_specks(volume, 0.9)
    expected = volume.copy()
    expected[2, 2, 2:5] = 0
    assert np.array_equal(seen, expected)


def test_the_soft_edge_is_as_wide_as_it_is_told() -> None:
    core = np.zeros((33,) * 3, bool)
    core[16, 16, 16] = True
    line = solvent.soft_mask(core, 3.0, 8.0)[16, 16, 16:]
    np.testing.assert_allclose(line[:4], 1)
    assert line[7] == pytest.approx(0.5, abs=1e-6) and np.all(line[11:] == 0)


def test_points_are_marked_where_they_are() -> None:
    core = solvent.around_points(np.array([[1.4, -2.0, 0.0], [0.0, 0.0, 3.6]]), 16)
    assert core.sum() == 2 and core[8, 6, 9] and core[12, 8, 8]
