import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dcryo.euler import (
    euler_from_matrix,
    matrix_from_euler,
    matrix_from_rotvec,
    quaternion_from_matrix,
    rotvec_from_matrix,
)

# Symmetry operators with their Euler angles as relion_refine --print_symmetry_ops (3.1.3) prints them.
RELION_PRINTED = [
    ((0, 0, 90), [[0, 1, 0], [-1, 0, 0], [0, 0, 1]]),
    (
        (90, 109.471, -150),
        [[0.5, 0.28867, 0.8165], [0.86603, -0.16667, -0.4714], [0, 0.94281, -0.33333]],
    ),
    (
        (-110.905, 60, 69.0948),
        [[0.80902, -0.5, -0.30902], [0.5, 0.30902, 0.80902], [-0.30902, -0.80902, 0.5]],
    ),
]


def random_angles(count: int) -> np.ndarray:
    generator = np.random.default_rng(1)
    return generator.uniform([-180, 0, -180], [180, 180, 180], (count, 3))


@pytest.mark.parametrize(("angles", "matrix"), RELION_PRINTED)
def test_matrix_is_relions(angles, matrix):
    np.testing.assert_allclose(matrix_from_euler(*angles), matrix, atol=2e-5)


def test_matrix_agrees_with_scipy_frame_turns():
    angles = random_angles(500)
    expected = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix().transpose(0, 2, 1)
    np.testing.assert_allclose(matrix_from_euler(*angles.T), expected, atol=1e-14)


def test_third_row_is_the_direction_of_view():
    rot, tilt, psi = random_angles(50).T
    direction = matrix_from_euler(rot, tilt, psi)[:, 2]
    np.testing.assert_allclose(np.rad2deg(np.arccos(direction[:, 2])), tilt, atol=1e-10)
    np.testing.assert_allclose(np.rad2deg(np.arctan2(direction[:, 1], direction[:, 0])), rot, atol=1e-10)


def test_angles_come_back():
    angles = random_angles(500)
    back = np.stack(euler_from_matrix(matrix_from_euler(*angles.T)), axis=1)
    np.testing.assert_allclose(back, angles, atol=1e-8)


@pytest.mark.parametrize("tilt_deg", [0, 180, 1e-14, 1e-12, 1e-10, 1e-7, 1e-3, 180 - 1e-13, 180 - 1e-9, 180 - 1e-5])
def test_matrix_comes_back_at_the_poles(tilt_deg):
    rot, _, psi = random_angles(200).T
    matrix = matrix_from_euler(rot, tilt_deg, psi)
    back_rot, back_tilt, back_psi = euler_from_matrix(matrix)
    assert np.all((back_tilt >= 0) & (back_tilt <= 180))
    np.testing.assert_allclose(matrix_from_euler(back_rot, back_tilt, back_psi), matrix, atol=1e-11)


def test_pole_gives_the_turn_to_psi():
    rot, tilt, psi = euler_from_matrix(matrix_from_euler(30, 0, 40))
    assert (rot, tilt) == (0, 0)
    assert psi == pytest.approx(70)


def test_angles_outside_their_ranges_are_the_same_rotation():
    matrix = matrix_from_euler(400, -20, -500)
    rot, tilt, psi = euler_from_matrix(matrix)
    assert tilt == pytest.approx(20)
    assert -180 <= rot <= 180
    assert -180 <= psi <= 180
    np.testing.assert_allclose(matrix_from_euler(rot, tilt, psi), matrix, atol=1e-14)


def rotation_vectors() -> np.ndarray:
    """Random axes at random angles, at angles down to nothing, and at angles up to a half turn."""
    generator = np.random.default_rng(2)
    axes = generator.normal(size=(600, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    angles = np.concatenate(
        [
            generator.uniform(0, np.pi, 200),
            10.0 ** -generator.uniform(0, 170, 200),
            np.pi - 10.0 ** -generator.uniform(0, 17, 200),
        ]
    )
    return axes * angles[:, None]


def test_rotation_vectors_agree_with_scipy():
    vectors = rotation_vectors()
    expected = Rotation.from_rotvec(vectors).as_matrix()
    np.testing.assert_allclose(matrix_from_rotvec(vectors), expected, atol=1e-14)


def test_rotation_vector_turns_right_handed():
    np.testing.assert_allclose(matrix_from_rotvec([0, 0, np.pi / 2]) @ [1, 0, 0], [0, 1, 0], atol=1e-15)


def test_rotation_vectors_come_back():
    vectors = rotation_vectors()
    matrices = matrix_from_rotvec(vectors)
    back = rotvec_from_matrix(matrices)
    assert np.all(np.linalg.norm(back, axis=1) <= np.pi + 1e-15)
    np.testing.assert_allclose(matrix_from_rotvec(back), matrices, atol=1e-14)
    sure = np.linalg.norm(vectors, axis=1) < np.pi - 1e-6  # nearer to a half turn the sign is open
    np.testing.assert_allclose(back[sure], vectors[sure], rtol=1e-9, atol=1e-15)


def test_small_rotation_vectors_keep_their_relative_accuracy():
    vectors = np.array([[1e-9, -2e-9, 3e-9], [1e-200, 0, 0]])
    np.testing.assert_allclose(rotvec_from_matrix(matrix_from_rotvec(vectors)), vectors, rtol=1e-12)


def test_quaternion_agrees_with_scipy():
    matrices = matrix_from_rotvec(rotation_vectors()[:200])
    expected = Rotation.from_matrix(matrices).as_quat(canonical=True, scalar_first=True)
    np.testing.assert_allclose(quaternion_from_matrix(matrices), expected, atol=1e-14)


def test_leading_shapes_and_single_precision():
    angles = random_angles(12).reshape(4, 3, 3)
    matrices = matrix_from_euler(angles[..., 0], angles[..., 1], angles[..., 2])
    assert matrices.shape == (4, 3, 3, 3)
    assert euler_from_matrix(matrices)[0].shape == (4, 3)
    assert rotvec_from_matrix(matrices).shape == (4, 3, 3)
    assert matrix_from_euler(np.float32(10), 20, 30).dtype == np.float64
    assert euler_from_matrix(matrices.astype(np.float32))[1].dtype == np.float64
    assert matrix_from_euler([], [], []).shape == (0, 3, 3)
    assert euler_from_matrix(np.empty((0, 3, 3)))[0].shape == (0,)
    assert rotvec_from_matrix(np.empty((0, 3, 3))).shape == (0, 3)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        euler_from_matrix(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="shape"):
        matrix_from_rotvec(np.zeros((3, 4)))
