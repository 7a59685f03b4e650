"""Mirrors and negatives of a molecule in noise are told from the molecule."""

import numpy as np
import pytest

from dcryo.kernels import density, phantom, symmetry
from dcryo.kernels.likeness import AXES, likeness, mirrored
from dcryo.kernels.randomness import generator

PIXEL_A = 3.0


def halves(box: int) -> list[np.ndarray]:
    made = phantom.phantom(symmetry.operators("C1"), 40.0, seed=1)
    truth = density.gaussian_density(made.position_A, made.amplitude, made.bfactor_A2, box, PIXEL_A)
    noise = [generator(0, "noise", half).standard_normal((box,) * 3, dtype=np.float32) for half in (1, 2)]
    return [truth + truth.std() * 3 * one for one in noise]


@pytest.mark.parametrize("box", [48, 49, 120])
def test_a_mirror_is_found_whatever_its_axis(box: int) -> None:
    first, second = halves(box)
    alike, mirrors = likeness(first, second, PIXEL_A)
    assert alike > max(mirrors.values()) + 0.1
    for axis, name in enumerate(AXES):
        alike, mirrors = likeness(first, mirrored(second, axis), PIXEL_A)
        assert max(mirrors, key=lambda key: mirrors[key]) == name and mirrors[name] > alike + 0.1
    inverted = mirrored(mirrored(mirrored(second, 0), 1), 2)
    alike, mirrors = likeness(first, inverted, PIXEL_A)
    assert max(mirrors, key=lambda key: mirrors[key]) == "centre" and mirrors["centre"] > alike + 0.1
    assert likeness(first, -second, PIXEL_A)[0] < -0.3


@pytest.mark.parametrize("box", [8, 9])
def test_mirroring_keeps_the_centre(box: int) -> None:
    volume = np.zeros((box,) * 3)
    volume[box // 2, box // 2, box // 2] = 1
    volume[box // 2 + 2, box // 2 + 1, box // 2] = 2
    turned = mirrored(volume, 0)
    assert turned[box // 2, box // 2, box // 2] == 1 and turned[box // 2 - 2, box // 2 + 1, box // 2] == 2
