import math

import numpy as np
import pytest

from dcryo.kernels.damage import critical_exposure_e_A2, survival


@pytest.mark.parametrize("resolution_A", [40.0, 10.0, 4.0, 2.0])
def test_critical_exposure_is_that_of_the_paper(resolution_A):
    expected = 0.245 * math.pow(1.0 / resolution_A, -1.665) + 2.81
    assert critical_exposure_e_A2(1.0 / resolution_A, 300.0) == pytest.approx(expected)
    assert critical_exposure_e_A2(1.0 / resolution_A, 200.0) == pytest.approx(0.8 * expected)


def test_the_mean_survives_and_detail_is_lost_first():
    left = survival(np.array([0.0, 0.1, 0.3]), 20.0, 300.0)
    assert left[0] == 1.0
    assert left[1] == pytest.approx(math.exp(-20.0 / (2.0 * (0.245 * 0.1**-1.665 + 2.81))))
    assert left[2] < left[1]
    assert survival(0.2, critical_exposure_e_A2(0.2, 300.0), 300.0) == pytest.approx(math.exp(-0.5))
