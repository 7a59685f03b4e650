"""Many estimates that share their spread, against what is known of them."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from dcryo.kernels import shrinkage
from dcryo.kernels.randomness import generator

STEP = 20.0
PLACES = STEP * np.arange(101)


def curves_of(measured, error):
    return (-0.5 * ((PLACES - measured[:, None]) / np.asarray(error)[:, None]) ** 2).astype(np.float32)


@pytest.mark.parametrize("spread", [30.0, 150.0])
def test_positions_are_drawn_to_their_groups_mean_as_bayes_says(spread: float) -> None:
    random = generator(1, "settle", round(spread))
    group = np.repeat(np.arange(40), 50)
    centre = random.uniform(900, 1100, 40)
    true = centre[group] + spread * random.standard_normal(len(group))
    error = random.choice([20.0, 60.0, 200.0], len(group))
    measured = true + error * random.standard_normal(len(group))
    found = shrinkage.settle(curves_of(measured, error), group, STEP)
    # Spreads are tried a factor of 1.4 apart.
    assert spread / 1.45 < found.spread < spread * 1.45
    weight = 1 / (error**2 + found.spread**2)
    mean = np.bincount(group, weights=weight * measured) / np.bincount(group, weights=weight)
    np.testing.assert_allclose(found.mean, mean, atol=3)
    share = found.spread**2 / (found.spread**2 + error**2)
    np.testing.assert_allclose(found.offset, found.mean[group] + share * (measured - found.mean[group]), atol=2)
    np.testing.assert_allclose(found.error, np.sqrt(share) * error, rtol=0.02)
    assert np.std(found.offset - true) < 0.9 * np.std(measured - true)


def test_particles_without_information_lie_at_the_mean() -> None:
    measured = np.full(20, 430.0)
    curves = curves_of(measured, np.full(20, 50.0))
    curves[3:6] = 0
    found = shrinkage.settle(curves, np.zeros(20, dtype=int), STEP)
    np.testing.assert_allclose(found.offset, 430, atol=1)


def test_particles_of_any_order_and_group_number() -> None:
    random = generator(2, "order", 0)
    group, measured = random.integers(0, 7, 300), random.uniform(400, 800, 300)
    curves = curves_of(measured, np.full(300, 40.0))
    order = random.permutation(300)
    found, again = (shrinkage.settle(curves[rows], group[rows], STEP) for rows in (np.arange(300), order))
    np.testing.assert_allclose(again.offset, found.offset[order], atol=1e-6)


def test_one_change_for_all_of_a_group_is_the_weighted_mean() -> None:
    random = generator(3, "shared", 0)
    group, error = np.repeat([0, 1], 30), random.uniform(30, 90, 60)
    measured = np.where(group == 0, 500, 640) + error * random.standard_normal(60)
    found = shrinkage.shared(curves_of(measured, error), group, STEP)
    expected = [np.average(measured[group == one], weights=error[group == one] ** -2) for one in (0, 1)]
    np.testing.assert_allclose(found.mean, expected, atol=0.1)
    np.testing.assert_allclose(found.offset, found.mean[group])
    assert found.error[0] == pytest.approx(np.sum(error[group == 0] ** -2) ** -0.5, rel=1e-3)


def test_parameters_shrink_towards_where_they_began() -> None:
    random = generator(4, "shrunk", 0)
    count, true_spread = 400, np.array([50.0, 50.0, 0.2])
    true = true_spread * random.standard_normal((count, 3))
    precision = np.array([np.diag([1e-3, 4e-4, 30.0])] * count) * random.uniform(0.2, 3, count)[:, None, None]
    noise = np.stack([multivariate_normal(np.zeros(3), np.linalg.inv(of)).rvs(random_state=i)
                      for i, of in enumerate(precision)])  # fmt: skip
    before = random.standard_normal((count, 3)) * [20, 20, 0.1]
    gradient = np.einsum("mjk,mk->mj", precision, true + noise - before)
    change, spread = shrinkage.shrunk(gradient, precision, before, np.array([0, 0, 1]))
    np.testing.assert_allclose(spread, true_spread, rtol=0.2)
    expected = np.linalg.solve(precision + np.diag(spread**-2.0), (precision @ (true + noise)[:, :, None]))[:, :, 0]
    np.testing.assert_allclose(before + change, expected, atol=0.02 * true_spread[0])
    error, plain = (np.std(values - true, axis=0) for values in (before + change, true + noise))
    assert np.all(error < plain)


def test_parameters_without_spread_stay_where_they_began() -> None:
    random = generator(5, "none", 0)
    precision = np.array([np.eye(2)] * 200)
    gradient = random.standard_normal((200, 2))
    change, spread = shrinkage.shrunk(gradient, precision, np.zeros((200, 2)), np.array([0, 0]))
    assert np.all(spread < 0.4) and np.std(change) < 0.2
