import numpy as np
import pytest

from dcryo.kernels.masks import circle, cosine_edge, sphere


@pytest.mark.parametrize("box", [16, 17])
def test_mask_is_one_inside_zero_outside_and_half_in_the_middle_of_its_edge(box):
    mask = sphere(box, 8.0, 2.0)
    z, y, x = np.indices((box,) * 3) - box // 2
    distance = np.sqrt(x**2 + y**2 + z**2)
    assert mask.dtype == np.float32 and mask.shape == (box,) * 3
    np.testing.assert_array_equal(mask[distance <= 4.0], 1.0)
    np.testing.assert_array_equal(mask[distance >= 6.0], 0.0)
    assert mask[box // 2, box // 2, box // 2 + 5] == pytest.approx(0.5, abs=1e-6)
    order = np.argsort(distance, axis=None)
    assert (np.diff(mask.ravel()[order]) <= 1e-6).all()
    np.testing.assert_array_equal(circle(box, 8.0, 2.0), mask[box // 2])


def test_no_edge_is_a_hard_edge():
    assert set(np.unique(sphere(16, 9.0, 0.0))) == {0.0, 1.0}
    assert sphere(64, 40.0, 0.0).sum() == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.01)
    np.testing.assert_array_equal(cosine_edge(np.array([0.9, 1.0, 1.1]), 1.0, 0.0), [1, 1, 0])
