import numpy as np
import pytest

from dcryo.kernels.dose import critical_exposure_e_A2, frame_weights


def test_the_critical_exposure_is_that_of_the_paper() -> None:
    # Read off their figure 3 and computed by hand from eq. 3.
    assert critical_exposure_e_A2(0.1, 300.0) == pytest.approx(0.245 * 46.2381 + 2.81, rel=1e-4)
    assert critical_exposure_e_A2(1 / 3, 300.0) == pytest.approx(4.336, abs=0.002)
    assert critical_exposure_e_A2(0.1, 200.0) == pytest.approx(0.8 * critical_exposure_e_A2(0.1, 300.0))
    assert np.isinf(critical_exposure_e_A2(0.0, 300.0))


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
