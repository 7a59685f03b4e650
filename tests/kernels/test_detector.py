import numpy as np
import pytest

from dcryo.kernels.detector import add_frame, good_neighbours, hot_pixels, orient_gain, repair
from dcryo.kernels.randomness import generator


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("gained", [True, False])
def test_adding_a_frame(kind: type, factor: int, gained: bool) -> None:
    rng = np.random.default_rng(1)
    frame = rng.integers(0, 100, (37, 50)).astype(kind)
    gain = rng.random((37, 50)).astype(np.float32) if gained else np.empty((0, 0), np.float32)
    total = np.full((37, 50), 2.0, np.float32)
    binned = np.full((37 // factor, 50 // factor), np.nan, np.float32)
    add_frame(frame, gain, total, binned, factor)
    corrected = frame * (gain if gained else 1.0)
    assert total == pytest.approx(corrected + 2.0)
    for y, x in np.ndindex(binned.shape):
        block = corrected[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        assert binned[y, x] == pytest.approx(block.sum(), rel=1e-5)


def test_hot_and_dead_pixels_are_found_and_nothing_else() -> None:
    rng = np.random.default_rng(2)
    brightness = 60.0 + 20.0 * np.linspace(-1, 1, 300)[:, None] * np.ones(430)
    total = rng.poisson(brightness).astype(np.float32)
    known = np.zeros(total.shape, bool)
    known[100:104, :200] = True
    total[known] = 10000
    places = rng.permutation(np.argwhere(~known))[:40]
    hot, dead = places[:30], places[30:]
    total[tuple(hot.T)] += rng.uniform(80, 5000, 30)
    total[tuple(dead.T)] = 0
    found = {tuple(place) for place in np.argwhere(hot_pixels(total, known)).tolist()}
    assert found == {tuple(place) for place in places.tolist()}


def test_whole_counts_make_few_hot_pixels_at_low_dose() -> None:
    total = np.random.default_rng(3).poisson(24.0, (1024, 1024)).astype(np.float32)
    assert hot_pixels(total, np.zeros(total.shape, bool)).sum() <= 3


def test_repaired_pixels_are_like_their_neighbours() -> None:
    rng = np.random.default_rng(4)
    clean = rng.poisson(np.where(np.arange(400) < 200, 2.0, 8.0), (400, 400)).astype(np.float32)
    bad = rng.random(clean.shape) < 0.05
    bad[50:60, 100:300] = True
    damaged = np.where(bad, np.float32(1e6), clean)
    neighbours = good_neighbours(bad)
    repair(damaged, neighbours, generator(0, "movie", 3))
    assert np.array_equal(damaged[~bad], clean[~bad])
    for half, mean in ((np.s_[:, 10:190], 2.0), (np.s_[:, 210:390], 8.0)):
        drawn = damaged[half][bad[half]]
        assert drawn.mean() == pytest.approx(mean, abs=5 * np.sqrt(mean / drawn.size))
        assert drawn.var() == pytest.approx(mean, rel=0.12)
    again = np.where(bad, np.float32(-5), clean)
    repair(again, neighbours, generator(0, "movie", 3))
    assert np.array_equal(again, damaged)
    repair(again, neighbours, generator(0, "movie", 4))
    assert not np.array_equal(again, damaged)


def test_good_neighbours_are_good_and_near() -> None:
    bad = np.random.default_rng(5).random((40, 30)) < 0.3
    at, near, counts = good_neighbours(bad)
    assert np.array_equal(at, np.flatnonzero(bad)) and counts.min() >= 6
    for pixel, candidates, count in zip(at, near, counts, strict=True):
        y, x = np.divmod(candidates[:count], 30)
        assert not bad[y, x].any() and len(set(candidates[:count].tolist())) == count
        assert max(abs(y - pixel // 30).max(), abs(x - pixel % 30).max()) <= 4
    assert good_neighbours(np.ones((5, 5), bool))[2].max() == 0


def test_a_gain_is_turned_before_it_is_flipped() -> None:
    gain = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(orient_gain(gain, 0, "none"), gain)
    # A quarter turn clockwise brings the first column, bottom to top, to the first row.
    assert np.array_equal(orient_gain(gain, 1, "none"), [[3, 0], [4, 1], [5, 2]])
    assert np.array_equal(orient_gain(gain, 1, "y"), [[5, 2], [4, 1], [3, 0]])
    assert np.array_equal(orient_gain(gain, 1, "x"), [[0, 3], [1, 4], [2, 5]])
    assert np.array_equal(orient_gain(gain, 2, "none"), [[5, 4, 3], [2, 1, 0]])
