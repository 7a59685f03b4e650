import naive_geometry as naive
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.stats import kstest

from dcryo.euler import matrix_from_rotvec
from dcryo.kernels.rotations import (
    angle_between_deg,
    angular_distance_deg,
    perturbation,
    random_rotations,
    rotations_from_uniform,
)
from dcryo.kernels.symmetry import operators


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=7))


def test_angle_agrees_with_scipy_and_the_twin(generator):
    a, b = random_rotations(200, generator), random_rotations(200, generator)
    expected = np.rad2deg((Rotation.from_matrix(a) * Rotation.from_matrix(b).inv()).magnitude())
    np.testing.assert_allclose(angle_between_deg(a, b), expected, atol=1e-10)
    assert angle_between_deg(a[0], b[0]) == pytest.approx(naive.angle_deg(a[0], b[0]))


@pytest.mark.parametrize("angle_deg", [0, 1e-12, 1e-6, 90, 180 - 1e-6, 180])
def test_angle_is_accurate_at_its_ends(angle_deg, generator):
    a = random_rotations(50, generator)
    axis = generator.normal(size=(50, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    b = matrix_from_rotvec(np.deg2rad(angle_deg) * axis) @ a
    np.testing.assert_allclose(angle_between_deg(a, b), angle_deg, atol=1e-13)


@pytest.mark.parametrize("name", ["C1", "C4", "D2", "O", "I1"])
def test_angular_distance_agrees_with_the_twin(name, generator):
    a, b = random_rotations(30, generator), random_rotations(30, generator)
    group = operators(name)
    expected = [naive.angular_distance_deg(*pair, group) for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(angular_distance_deg(a, b, group), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["C5", "D7", "T", "I3"])
def test_symmetry_acts_on_the_right(name, generator):
    group = operators(name)
    a = random_rotations(1, generator)[0]
    turned = matrix_from_rotvec(np.deg2rad([0, 0, 0.5])) @ a
    np.testing.assert_allclose(angular_distance_deg(a, a @ group, group), 0, atol=1e-12)
    np.testing.assert_allclose(angular_distance_deg(turned @ group, a, group), 0.5, atol=1e-12)
    assert angular_distance_deg(a, group[1] @ a, group) > 1


@pytest.mark.parametrize("name", ["C3", "D2", "T", "I2"])
def test_poses_that_symmetry_makes_equal_have_equal_slices(name, generator):
    """A symmetric cloud of Gaussians: its transform at A^T k is the same for A and A g, not g A."""
    group = operators(name)
    points = np.concatenate(generator.normal(size=(3, 3)) @ group.transpose(0, 2, 1))
    wave = np.array([[0.31, 0.22, 0], [-0.17, 0.4, 0]])  # frequencies in the plane of the image

    def slice_of(matrix: np.ndarray) -> np.ndarray:
        return np.exp(-2j * np.pi * (wave @ matrix) @ points.T).sum(axis=1)

    a = random_rotations(1, generator)[0]
    for operator in group[1:6]:
        np.testing.assert_allclose(slice_of(a @ operator), slice_of(a), atol=1e-10)
    assert max(np.abs(slice_of(operator @ a) - slice_of(a)).max() for operator in group) > 0.1


def test_random_rotations_are_uniform(generator):
    matrices = random_rotations(20_000, generator)
    identities = np.broadcast_to(np.eye(3), matrices.shape)
    np.testing.assert_allclose(matrices @ matrices.transpose(0, 2, 1), identities, atol=1e-14)
    np.testing.assert_allclose(np.linalg.det(matrices), 1)
    # Each row and column is uniform on the sphere, and the angle has the law (a - sin a) / pi.
    for values in (matrices[:, 2, 0], matrices[:, 0, 2], matrices[:, 1, 1]):
        assert kstest(values, "uniform", args=(-1, 2)).pvalue > 0.001
    angles = np.deg2rad(angle_between_deg(matrices, np.eye(3)))
    assert kstest(angles, lambda a: (a - np.sin(a)) / np.pi).pvalue > 0.001


def test_random_rotations_depend_on_the_numbers_alone(generator):
    numbers = np.random.Generator(np.random.Philox(key=7)).random((10, 3))
    assert np.array_equal(random_rotations(10, generator), rotations_from_uniform(numbers))
    assert np.array_equal(rotations_from_uniform(numbers[3]), rotations_from_uniform(numbers)[3])
    with pytest.raises(ValueError, match="shape"):
        rotations_from_uniform(np.zeros(4))


def test_perturbation_fills_its_ball(generator):
    draws = np.array([perturbation(3.0, generator) for _ in range(2000)])
    angles = angle_between_deg(draws, np.eye(3))
    assert angles.max() <= 3.0
    assert kstest(angles, lambda a: (a / 3.0) ** 3).pvalue > 0.001
    mean_axis = np.mean(draws[:, [2, 0, 1], [1, 2, 0]] - draws[:, [1, 2, 0], [2, 0, 1]], axis=0)
    assert np.abs(mean_axis).max() < 0.005
    assert np.array_equal(perturbation(0.0, generator), np.eye(3))
