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


def particles(n: int) -> tuple[np.ndarray, ...]:
    rng = np.random.Generator(np.random.Philox(0))
    number = rng.integers(0, 3, n)
    evidence = 30 * np.exp(0.3 * rng.standard_normal(n))
    misfit = np.exp(0.1 * rng.standard_normal(n))
    return number, misfit, evidence, np.abs(rng.normal(0, 2, n))


RANK = np.array([1.0, 0.95, 0.3, 0.001])


def test_particles_that_stand_out_are_told_from_those_that_do_not():
    number, misfit, evidence, distance = particles(4000)
    misfit[:50] *= 2
    evidence[50:100] *= 0.2
    distance[100:150] += 30
    number[150:200] = 3
    found = ranking.judge_particles(RANK, number, misfit, evidence, distance)
    for some, words in (
        (slice(50), "low resolution"), (slice(50, 100), "hardly explained"), (slice(100, 150), "off centre"),
        (slice(150, 200), "its class"),
    ):  # fmt: skip
        assert np.mean(np.char.find(found.reason[some], words) >= 0) > 0.9
    rest = found.reason[200:] != ""
    assert rest.mean() < 0.05
    # The same figures weigh more where the class is less like the others.
    assert rest[number[200:] == 2].mean() > 1.3 * rest[number[200:] < 2].mean()


def test_what_is_not_so_good_in_several_ways_is_left_out_though_no_one_way_would_do():
    number, misfit, evidence, distance = particles(4000)
    number[:] = 0
    ways = {"misfit": (1.25, 1, 0), "evidence": (1, 0.55, 0), "distance": (1, 1, 5)}

    def unlike(*names):
        figures = misfit.copy(), evidence.copy(), distance.copy()
        for name in names:
            times, by, more = ways[name]
            figures[0][0] *= times
            figures[1][0] *= by
            figures[2][0] += more
        return ranking.judge_particles(RANK, number, *figures)

    misfit[0], evidence[0], distance[0] = np.median(misfit), np.median(evidence), np.median(distance)
    assert all(unlike(name).reason[0] == "" for name in ways)
    together = unlike(*ways)
    assert together.reason[0] != "" and together.unlike[0] > max(unlike(name).unlike[0] for name in ways)


def test_where_all_classes_are_poor_particles_are_judged_all_the_same():
    number, misfit, evidence, distance = particles(100)
    found = ranking.judge_particles(RANK * 0.3, number, misfit, evidence, distance)
    assert np.isfinite(found.unlike).all() and (found.reason == "").mean() > 0.5
