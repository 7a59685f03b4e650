"""What a reference remembers of the images that it was made of.

Every image is part of the reference that it is aligned with. Its own noise, back-projected at its last pose, correlates
with itself there and holds the pose where it is (docs/decisions/006-hold.md).
"""

import numpy as np


def hold(shares: np.ndarray, radius_px: float, box_px: int) -> np.ndarray:
    """With which force images hold on to the poses at which they were back-projected.

    With the share h that an image has in what a slice of the reference says at its pixels, the score of a pose that
    displaces the pixels by q gains 2 h rho(q) each, since noise has a mean |X|^2 / v of 2. rho is the transform of the
    masked volume over its value at 0: for a sphere of radius r, 1 - (2 pi / D)^2 r^2 / 10 q^2 for small q.

    shares: (S,) h per shell, of the shells that are scored. Returns (6,): curvature of the gain at the start, for three
    rotations (rad^-2) and two shifts (px^-2), and its height. The gain is taken for a Gaussian of these.
    """
    shells = np.arange(len(shares))
    moment = (2 * np.pi / box_px) ** 2 * np.sum(np.pi * shells * shares * shells**2)
    turn = moment * radius_px**2 / 5
    return np.array([turn, turn, 2 * turn, moment, moment, 2 * np.sum(np.pi * shells * shares)])


def shares(fsc: np.ndarray, mask_fraction: float, images: float) -> np.ndarray:
    """Mean share that an image has in what a regularised reference says at the image's own pixels, per shell, (S,).

    The shares of all images add up to the degrees of freedom of the map in a shell: its voxels, (2 pi s^2 without
    Friedel mates) times the part of the box inside the mask, times what the prior leaves of them, which is the FSC. An
    image has pi s pixels there.

    fsc: (S,) between the halves; images: in a half, times the order of the symmetry.
    """
    shells = np.arange(len(fsc))
    return np.minimum(2 * shells * mask_fraction * np.clip(fsc, 0, 1) / images, 1.0)
