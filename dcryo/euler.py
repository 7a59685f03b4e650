"""Rotation matrices from Euler angles and rotation vectors, and back.

The only module that knows a parametrisation of rotations other than the matrix. Inside the package a
rotation is a matrix A that takes volume coordinates to image coordinates; every function here works on any
leading shape ``...`` (a single rotation is the empty shape) in float64.

Sources: Euler angles as in J. B. Heymann, M. Chagoyen and D. M. Belnap, J. Struct. Biol. 151, 196 (2005), the
ZYZ angles of RELION (rot, tilt, psi); quaternion of a matrix by the largest component, S. W. Shepperd,
J. Guidance and Control 1, 223 (1978); rotation vectors by Rodrigues' formula.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]

# Below this sin(tilt) the view lies on the pole, where rot and psi are one angle: it is given to psi.
_POLE_SINE = 1e-12


def matrix_from_euler(rot_deg: ArrayLike, tilt_deg: ArrayLike, psi_deg: ArrayLike) -> Float64:
    """Matrix A = Rz(psi) Ry(tilt) Rz(rot) of ZYZ angles in degrees; (...) each, broadcast, to (..., 3, 3).

    Rz and Ry turn the frame, not the vector (Heymann et al. 2005): A[2] = (sin tilt cos rot,
    sin tilt sin rot, cos tilt) is the direction of view in the volume. Angles that are not finite give NaN.
    """
    rot, tilt, psi = np.broadcast_arrays(
        *(np.deg2rad(np.asarray(angle, dtype=np.float64)) for angle in (rot_deg, tilt_deg, psi_deg))
    )
    cos_rot, sin_rot = np.cos(rot), np.sin(rot)
    cos_tilt, sin_tilt = np.cos(tilt), np.sin(tilt)
    cos_psi, sin_psi = np.cos(psi), np.sin(psi)
    matrix = np.empty((*rot.shape, 3, 3))
    matrix[..., 0, 0] = cos_psi * cos_tilt * cos_rot - sin_psi * sin_rot
    matrix[..., 0, 1] = cos_psi * cos_tilt * sin_rot + sin_psi * cos_rot
    matrix[..., 0, 2] = -cos_psi * sin_tilt
    matrix[..., 1, 0] = -sin_psi * cos_tilt * cos_rot - cos_psi * sin_rot
    matrix[..., 1, 1] = -sin_psi * cos_tilt * sin_rot + cos_psi * cos_rot
    matrix[..., 1, 2] = sin_psi * sin_tilt
    matrix[..., 2, 0] = sin_tilt * cos_rot
    matrix[..., 2, 1] = sin_tilt * sin_rot
    matrix[..., 2, 2] = cos_tilt
    return matrix


def euler_from_matrix(matrix: ArrayLike) -> tuple[Float64, Float64, Float64]:
    """ZYZ angles (rot, tilt, psi) in degrees, (...) each, of rotation matrices (..., 3, 3).

    rot and psi lie in [-180, 180], tilt in [0, 180]. On the poles (tilt 0 or 180) rot is 0 and psi takes all
    of the in-plane turn, so that the matrix comes back there too. ValueError where the shape is another.
    """
    a = _matrices(matrix)
    sin_tilt = np.hypot(a[..., 2, 0], a[..., 2, 1])
    tilt = np.arctan2(sin_tilt, a[..., 2, 2])
    rot = np.where(sin_tilt < _POLE_SINE, 0.0, np.arctan2(a[..., 2, 1], a[..., 2, 0]))
    # A Rz(rot)^T = Rz(psi) Ry(tilt), whose middle column is (sin psi, cos psi, 0) whatever the tilt.
    cos_rot, sin_rot = np.cos(rot), np.sin(rot)
    sin_psi = cos_rot * a[..., 0, 1] - sin_rot * a[..., 0, 0]
    cos_psi = cos_rot * a[..., 1, 1] - sin_rot * a[..., 1, 0]
    return np.rad2deg(rot), np.rad2deg(tilt), np.rad2deg(np.arctan2(sin_psi, cos_psi))


def matrix_from_rotvec(rotvec: ArrayLike) -> Float64:
    """Matrix (..., 3, 3) that turns a vector by |v| radians, right-handed, about rotation vector v (..., 3).

    Rodrigues' formula: I + sin|v|/|v| K + (1 - cos|v|)/|v|^2 K^2, with K u = v x u. ValueError where the
    shape is another.
    """
    vector = np.asarray(rotvec, dtype=np.float64)
    if vector.shape[-1:] != (3,):
        raise ValueError(f"rotation vectors must be (..., 3), got shape {vector.shape}")
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    cross = np.zeros((*vector.shape[:-1], 3, 3))
    cross[..., 0, 1], cross[..., 0, 2], cross[..., 1, 2] = -vector[..., 2], vector[..., 1], -vector[..., 0]
    cross -= np.swapaxes(cross, -1, -2)
    # sinc keeps both quotients exact through 0: (1 - cos a) / a^2 = (sin(a / 2) / (a / 2))^2 / 2.
    first = np.sinc(angle / np.pi)
    second = 0.5 * np.sinc(angle / (2 * np.pi)) ** 2
    return np.eye(3) + first * cross + second * (cross @ cross)


def rotvec_from_matrix(matrix: ArrayLike) -> Float64:
    """Rotation vector (..., 3) in radians, length in [0, pi], of rotation matrices (..., 3, 3).

    The inverse of `matrix_from_rotvec`, to rounding at every angle; of the two vectors of a half turn, one.
    """
    quaternion = quaternion_from_matrix(matrix)
    axis = quaternion[..., 1:]
    sine = np.linalg.norm(axis, axis=-1)
    angle = 2 * np.arctan2(sine, quaternion[..., 0])
    # Where the sine underflows, angle = 2 sine.
    scale = np.divide(angle, sine, out=np.full_like(sine, 2.0), where=sine > 0)
    return axis * scale[..., None]


def quaternion_from_matrix(matrix: ArrayLike) -> Float64:
    """Unit quaternion (w, x, y, z), shape (..., 4) with w >= 0, of rotation matrices (..., 3, 3).

    (x, y, z) = sin(angle / 2) axis, of the right-handed turn of a vector. Built from its largest component
    (Shepperd 1978), hence accurate to rounding at every angle.
    """
    a = _matrices(matrix)
    # 4 q q^T of the quaternion q, whose row of largest diagonal is q up to a factor.
    outer = np.empty((*a.shape[:-2], 4, 4))
    xx, yy, zz = a[..., 0, 0], a[..., 1, 1], a[..., 2, 2]
    outer[..., 0, 0] = 1 + xx + yy + zz
    outer[..., 1, 1] = 1 + xx - yy - zz
    outer[..., 2, 2] = 1 - xx + yy - zz
    outer[..., 3, 3] = 1 - xx - yy + zz
    outer[..., 0, 1] = outer[..., 1, 0] = a[..., 2, 1] - a[..., 1, 2]
    outer[..., 0, 2] = outer[..., 2, 0] = a[..., 0, 2] - a[..., 2, 0]
    outer[..., 0, 3] = outer[..., 3, 0] = a[..., 1, 0] - a[..., 0, 1]
    outer[..., 1, 2] = outer[..., 2, 1] = a[..., 0, 1] + a[..., 1, 0]
    outer[..., 1, 3] = outer[..., 3, 1] = a[..., 0, 2] + a[..., 2, 0]
    outer[..., 2, 3] = outer[..., 3, 2] = a[..., 1, 2] + a[..., 2, 1]
    largest = np.argmax(np.diagonal(outer, axis1=-2, axis2=-1), axis=-1)
    row = np.take_along_axis(outer, largest[..., None, None], axis=-2)[..., 0, :]
    row = np.where(row[..., :1] < 0, -row, row)
    return row / np.linalg.norm(row, axis=-1, keepdims=True)


def _matrices(matrix: ArrayLike) -> Float64:
    a = np.asarray(matrix, dtype=np.float64)
    if a.shape[-2:] != (3, 3):
        raise ValueError(f"rotation matrices must be (..., 3, 3), got shape {a.shape}")
    return a
