import math

import numpy as np
import pytest

from dcryo.kernels.dose import critical_exposure_e_A2, frame_weights, survival


def test_the_critical_exposure_is_that_of_the_paper() -> None:
    # Read off their figure 3 and computed by hand from eq. 3.
    assert critical_exposure_e_A2(0.1, 300.0) == pytest.approx(0.245 * 46.2381 + 2.81, rel=1e-4)
    assert critical_exposure_e_A2(1 / 3, 300.0) == pytest.approx(4.336, abs=0.002)
    assert critical_exposure_e_A2(0.1, 200.0) == pytest.approx(0.8 * critical_exposure_e_A2(0.1, 300.0))
    assert np.isinf(critical_exposure_e_A2(0.0, 300.0))


@pytest.mark.parametrize(
    ("voltage_kV", "factor"), [(80, 0.64), (100, 0.64), (120, 0.672), (200, 0.8), (250, 0.9), (300, 1.0), (400, 1.0)]
)
def test_the_voltage_counts(voltage_kV: float, factor: float) -> None:
    of_300_kV = np.array([0.245 * k**-1.665 + 2.81 for k in (0.025, 0.25, 0.5)])
    assert critical_exposure_e_A2([0.025, 0.25, 0.5], voltage_kV) == pytest.approx(factor * of_300_kV)


def test_the_mean_survives_and_detail_is_lost_first() -> None:
    left = survival(np.array([0.0, 0.1, 0.3]), 20.0, 300.0)
    assert left[0] == 1.0
    assert left[1] == pytest.approx(math.exp(-20.0 / (2.0 * (0.245 * 0.1**-1.665 + 2.81))))
    assert left[2] < left[1]
    assert survival(0.2, critical_exposure_e_A2(0.2, 300.0), 300.0) == pytest.approx(math.exp(-0.5))


@pytest.mark.parametrize("before", [0.0, 7.5])
def test_weights_are_the_obvious_ones(before: float) -> None:
    k = np.array([[0.0, 0.05], [0.2, 0.4]])
    weights = frame_weights(k, 6, 1.5, before, 200.0)
    assert weights.shape == (6, 2, 2) and weights.dtype == np.float32
    for place in np.ndindex(k.shape):
        left = []
        for frame in range(6):
            critical = 0.8 * (0.245 * k[place] ** -1.665 + 2.81) if k[place] else np.inf
            left.append(np.exp(-(before + 1.5 * (frame + 1)) / (2 * critical)))
        assert weights[:, *place] == pytest.approx(np.array(left) / np.sqrt(np.sum(np.square(left))), rel=1e-5)


def test_white_noise_stays_white() -> None:
    weights = frame_weights(np.linspace(0, 0.5, 40), 30, 1.2, 0.0, 300.0)
    assert np.sum(weights**2, axis=0) == pytest.approx(np.ones(40), rel=1e-5)
    assert np.all(np.diff(weights[:, 1:], axis=0) < 0) and np.ptp(weights[:, 0]) == 0
