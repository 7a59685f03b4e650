import numpy as np
import pytest
from scipy.spatial import cKDTree

from dcryo.errors import InputError
from dcryo.kernels import fft, phantom
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.shells import volume_shells
from dcryo.kernels.symmetry import operators


@pytest.mark.parametrize("symmetry", ["C1", "C3", "D2", "T", "O", "I1"])
def test_has_its_symmetry_and_size_and_is_centred(symmetry):
    group = operators(symmetry)
    made = phantom.phantom(group, 55.0)
    tree = cKDTree(made.position_A)
    for operator in group:
        assert tree.query(made.position_A @ operator.T)[0].max() < 1e-6
    np.testing.assert_allclose(made.position_A.mean(axis=0), 0.0, atol=1e-9)
    assert 0.6 * 55 < made.radius_A < 1.15 * 55
    assert made.amplitude.shape == made.bfactor_A2.shape == (len(made.position_A), 1)
    assert len(made.position_A) > 500


def test_the_same_arguments_give_the_same_atoms_and_another_seed_others():
    group = operators("C2")
    one, two = phantom.phantom(group, 40.0, 3), phantom.phantom(group, 40.0, 3)
    np.testing.assert_array_equal(one.position_A, two.position_A)
    other = phantom.phantom(group, 40.0, 4)
    assert other.position_A.shape != one.position_A.shape or not np.allclose(other.position_A, one.position_A)


def test_atoms_do_not_pile_up():
    made = phantom.phantom(operators("D2"), 55.0)
    distances, _ = cKDTree(made.position_A).query(made.position_A, k=2)
    assert np.quantile(distances[:, 1], 0.02) > 0.4
    nearby = cKDTree(made.position_A).query_ball_point(made.position_A, 4.0, return_length=True)
    # Protein has some 25 atoms within 4 A of an atom; two chains in one place would have twice that.
    assert np.quantile(nearby, 0.99) < 50


def test_power_falls_as_a_proteins_does():
    made = phantom.phantom(operators("C1"), 45.0)
    box, pixel = 80, 1.5
    density = gaussian_density(made.position_A, made.amplitude, made.bfactor_A2, box, pixel)
    shells = volume_shells(box)
    power = np.bincount(shells.ravel(), np.abs(fft.rfftn(density).ravel()) ** 2) / np.bincount(shells.ravel())
    s2 = (np.arange(len(power)) / (box * pixel)) ** 2
    # Shape: far above the atoms' plateau at low resolution.
    assert power[2] > 30 * power[round(box * pixel / 10)]
    # Guinier plot beyond 7 A: a straight line whose slope is the atoms' B-factor, over 2.
    shells_used = slice(round(box * pixel / 7), box // 2 - 1)
    slope, _ = np.polyfit(s2[shells_used], np.log(power[shells_used]), 1)
    expected = -(phantom.ATOM_BFACTOR_A2 + phantom.MOTION_BFACTOR_A2) / 2
    assert 1.7 * expected < slope < 0.5 * expected


def test_helices_are_right_handed():
    rng = np.random.Generator(np.random.Philox(0))
    for _ in range(20):
        steps = np.diff(phantom._helix(rng, np.zeros(3)), axis=0)
        assert np.allclose(np.linalg.norm(steps, axis=1), 3.8, atol=0.1)
        triple = np.einsum("ij,ij->i", np.cross(steps[:-2], steps[1:-1]), steps[2:])
        assert (triple > 0).all()


def test_a_phantom_that_cannot_be_folded_is_refused():
    with pytest.raises(InputError, match="15 to 200 A"):
        phantom.phantom(operators("C1"), 12.0)
    with pytest.raises(InputError, match="no room for 60 copies"):
        phantom.phantom(operators("I1"), 16.0)
    assert len(phantom.phantom(operators("C1"), 15.0).position_A) > 20
