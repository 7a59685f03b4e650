import numpy as np
import pytest

from dcryo.kernels import ranking


def classes(**changed):
    """Five good classes, the first the best."""
    figures = {
        "particles": np.array([300, 200, 200, 150, 100]),
        "resolution_A": np.array([8.0, 9.0, 9.0, 10.0, 12.0]),
        "mass": np.array([100.0, 105.0, 95.0, 110.0, 90.0]),
        "rim": np.array([0.05, 0.06, 0.05, 0.08, 0.1]),
        "log_evidence": np.array([30.0, 28.0, 33.0, 25.0, 20.0]),
    }
    for name, value in changed.items():
        figures[name][3] = value
    return ranking.rank_classes(**figures)


def test_good_classes_are_kept_the_best_first():
    found = classes()
    assert (found.reason == "").all()
    assert found.rank.argmax() == 0 and found.rank[0] > 0.9 and found.rank[4] == found.rank.min() > 0.2


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mass", 20.0, "less mass"),
        ("mass", -5.0, "less mass"),
        ("mass", 300.0, "more mass"),
        ("rim", 0.5, "rim of the mask"),
        ("log_evidence", 2.0, "hardly better explained"),
        ("particles", 4, "too few"),
    ],
)
def test_a_class_of_something_else_is_not(name, value, words):
    found = classes(**{name: value})
    assert words in found.reason[3] and (np.delete(found.reason, 3) == "").all()
    assert found.rank[3] < 0.6 * classes().rank[3] or name == "particles"


def test_weighted_quantile():
    assert ranking.weighted_quantile(np.array([5.0, 1, 3]), np.array([1, 1, 10]), 0.5) == 3
    assert ranking.weighted_quantile(np.array([5.0, 1, 3]), np.array([9, 1, 1]), 0.5) == 5
    assert ranking.weighted_quantile(np.array([5.0, 1, 3]), np.array([1, 1, 2]), 0.75) == 3
    assert ranking.weighted_quantile(np.array([5.0, 1, 3]), np.array([1, 1, 2]), 0.8) == 5


def test_particles_that_stand_out_are_told_from_those_that_do_not():
    rng = np.random.Generator(np.random.Philox(0))
    n = 4000
    number = rng.integers(0, 3, n)
    level = np.array([10.0, 20.0, 40.0])[number]  # classes differ in how well they explain their images
    strength, evidence = (level * np.exp(0.2 * rng.standard_normal(n)) for _ in range(2))
    misfit = np.exp(0.1 * rng.standard_normal(n))
    misfit[:50] *= 2
    strength[50:100] *= 0.3
    evidence[100:150] *= 0.3
    kept = np.ones(n, bool)
    kept[-100:] = False
    found = ranking.judge_particles(kept, number, misfit, strength, evidence)
    assert np.mean(np.char.find(found[:50], "low resolution") >= 0) > 0.95
    assert np.mean(np.char.find(found[50:100], "weaker") >= 0) > 0.95
    assert np.mean(np.char.find(found[100:150], "fits its class less well") >= 0) > 0.9
    # Two standard deviations on one side of three figures.
    assert 0.04 < np.mean(found[150:-100] != "") < 0.1
    assert (found[-100:] == "").all()
    assert (ranking.judge_particles(~(kept | True), number, misfit, strength, evidence) == "").all()
