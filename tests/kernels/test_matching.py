import naive_picking as naive
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dcryo.kernels.matching import curve, matched


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 14), m=st.integers(0, 14), within=st.floats(0.3, 4), seed=st.integers(0, 999))
def test_every_number_of_best_picks_has_as_many_pairs_as_can_be(n, m, within, seed):
    rng = np.random.Generator(np.random.Philox(seed))
    picks, labels = rng.uniform(0, 8, (n, 2)), rng.uniform(0, 8, (m, 2))
    found = matched(picks, labels, within)
    assert [int(found[:k].sum()) for k in range(n + 1)] == [
        naive.pairs(picks[:k], labels, within) for k in range(n + 1)
    ]


def test_a_label_counts_once_and_a_better_pairing_is_found():
    labels = np.array([[0.0, 0.0], [1.0, 0.0]])
    # The first could take either label, the second only the one that the first is nearest to.
    assert matched(np.array([[0.4, 0.0], [-0.5, 0.0]]), labels, 0.7).tolist() == [True, True]
    assert matched(np.array([[0.0, 0.1], [0.0, -0.1]]), labels[:1], 0.7).tolist() == [True, False]


def test_precision_and_recall_over_thresholds():
    found = curve(np.array([0.2, 0.9, 0.5, 0.5]), np.array([True, True, False, True]), labels=5)
    np.testing.assert_array_equal(found.threshold, [0.9, 0.5, 0.2])
    np.testing.assert_allclose(found.precision, [1, 2 / 3, 3 / 4])
    np.testing.assert_allclose(found.recall, [1 / 5, 2 / 5, 3 / 5])
    np.testing.assert_allclose(found.f1, [1 / 3, 1 / 2, 2 / 3])
    assert len(curve(np.zeros(0), np.zeros(0, bool), 3).f1) == 0
    assert curve(np.ones(2), np.zeros(2, bool), 3).f1.tolist() == [0.0]
