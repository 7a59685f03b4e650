"""Images of phantoms as if they were class averages, and how far found orientations are from the true ones."""

import functools

import numpy as np

from dcryo.kernels import fft, slices
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.masks import circle
from dcryo.kernels.phantom import phantom
from dcryo.kernels.posterior import shift_phases
from dcryo.kernels.randomness import generator
from dcryo.kernels.rotations import angular_distance_deg, random_rotations
from dcryo.kernels.shells import half_plane, unpack
from dcryo.kernels.symmetry import operators

BOX, PIXEL_A, DIAMETER_PX = 32, 5.0, 24


@functools.cache
def density(symmetry, box):
    made = phantom(operators(symmetry), 55.0)
    return gaussian_density(made.position_A, made.amplitude, made.bfactor_A2, box, PIXEL_A)


def projections(symmetry, rotations, origins=None, noise=0.0, box=BOX):
    """Images of a phantom of 120 A, and noise of a part of their standard deviation."""
    volume, pixels = density(symmetry, box), half_plane((box - 1) // 2)
    transforms = slices.extract(slices.prepare(volume, pixels.shell_max), rotations, pixels, box)
    if origins is not None:
        transforms *= shift_phases(pixels, -origins, box, len(pixels.kx))
    images = fft.irfft2(unpack(pixels, transforms, box), box)
    random = generator(0, "noise of tests", len(rotations))
    images = images + noise * images.std() * random.standard_normal(images.shape).astype(np.float32)
    return images * circle(box, DIAMETER_PX + 4, 3)


def views(count, seed=0):
    return random_rotations(count, generator(seed, "views of tests", 0))


def compared(found, true, group):
    """Angles (K,) in degrees from the true orientations after the best turn and hand of the frame, in which their
    median is least; and the matrix (3, 3) that takes places in the found frame to the true one."""
    mirror, best = np.diag([1.0, 1.0, -1.0]), None
    for hand in (np.eye(3), mirror):
        handed = hand @ found @ hand
        for one, other in zip(handed, true, strict=True):
            turn = other.T @ one
            errors = angular_distance_deg(handed @ turn.T, true, group)
            if best is None or np.median(errors) < np.median(best[0]):
                best = errors, turn @ hand
    return best


def in_frame_of(symmetry, to_true, centre_px):
    """The phantom's density (D, D, D) in another frame, whose origin lies at a place (3,) of its own."""
    made = phantom(operators(symmetry), 55.0)
    places = (made.position_A - centre_px * PIXEL_A) @ to_true
    return gaussian_density(places, made.amplitude, made.bfactor_A2, BOX, PIXEL_A)
