"""Poses and CTFs as cryoDRGN and RECOVAR read them: pickled arrays beside a stack of images that are white on dark.

Both take a rotation as the matrix from volume to image coordinates, as dcryo does; a shift in fractions of the box,
with RELION's sign; and a row of nine numbers for the CTF (Zhong et al. 2021, its `parse_pose_star` and
`parse_ctf_star`). They invert the images by default, and their CTF has the other sign, which is the same.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcryo.data.atomic import replacing

POSES, CTF = "poses.pkl", "ctf.pkl"


def write_poses(path: Path, rotation: np.ndarray, origin_px: np.ndarray, box_px: int) -> None:
    """A pair of arrays: rotations (n, 3, 3), and shifts (n, 2) in fractions of the box. origin_px: (n, 2)."""
    _write(path, (np.asarray(rotation, dtype=np.float64), np.asarray(origin_px, dtype=np.float64) / box_px))


def write_ctf(path: Path, box_px: int, columns: Sequence[np.ndarray]) -> None:
    """An array (n, 9) float32: box in px, pixel size in A, defocus U and V in A and the angle of U in degrees, voltage
    in kV, spherical aberration in mm, amplitude contrast, phase shift in degrees.

    columns: the eight after the box, (n,)."""
    count = len(columns[0])
    _write(path, np.stack([np.full(count, box_px), *columns], axis=1).astype(np.float32))


def _write(path: Path, value: Any) -> None:
    with replacing(path) as file:
        pickle.dump(value, file, protocol=4)
