import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcryo.kernels.sampling import step_deg
from dcryo.kernels.shells import resolution_A
from dcryo.steps.search import COARSEST_ORDER, FINEST_ORDER, plan_search

TURN = np.eye(3)[[1, 2, 0]]


@st.composite
def settings_of_an_iteration(draw):
    box = draw(st.integers(24, 640))
    pixel = draw(st.floats(0.4, 6))
    return {
        "shell": draw(st.integers(1, box // 2)),
        "box_px": box,
        "pixel_size_A": pixel,
        "diameter_A": box * pixel * draw(st.floats(0.2, 1)),
        "shift_range_A": pixel * draw(st.floats(0.5, 30)),
    }


@settings(max_examples=150, deadline=None)
@given(given_=settings_of_an_iteration(), trusted=st.booleans())
def test_levels_are_a_pyramid(given_, trusted):
    search = plan_search(**given_, trusted=trusted, perturbation=TURN)
    levels, shell = search.levels, given_["shell"]
    assert len(levels) >= 2 and search.finest is levels[-1]
    assert all(COARSEST_ORDER <= level.order <= FINEST_ORDER for level in levels)
    assert levels[0].shift_offset_px == 0
    for coarse, fine in pairwise(levels):
        assert fine.order == coarse.order + 1
        assert fine.shift_step_px == pytest.approx(coarse.shift_step_px / 2)
        # Each shift is divided into two, a quarter of its step to either side.
        assert fine.shift_offset_px == pytest.approx(coarse.shift_offset_px + coarse.shift_step_px / 4)
        assert fine.shell >= coarse.shell
    assert search.finest.shell == shell
    assert all(level.shell <= shell for level in levels)
    np.testing.assert_array_equal(search.perturbation, TURN)


@settings(max_examples=150, deadline=None)
@given(given_=settings_of_an_iteration())
def test_a_global_search_matches_resolution_to_step(given_):
    search = plan_search(**given_, trusted=False, perturbation=TURN)
    box, pixel, shell = given_["box_px"], given_["pixel_size_A"], given_["shell"]
    assert search.radius_deg is None and search.levels[0].order == COARSEST_ORDER
    assert search.shift_range_px == pytest.approx(given_["shift_range_A"] / pixel)
    for level in search.levels:
        edge_A = math.radians(step_deg(level.order)) * given_["diameter_A"] / 2
        assert level.shift_step_px == pytest.approx(edge_A / 4 / pixel)
        if level is not search.finest:
            assert level.shell >= 1 or shell == 0
            assert level.shell == 0 or resolution_A(level.shell, box, pixel) >= edge_A * (1 - 1e-6)
            assert level.shell == shell or resolution_A(level.shell + 1, box, pixel) < edge_A


@settings(max_examples=150, deadline=None)
@given(given_=settings_of_an_iteration(), trusted=st.booleans())
def test_the_finest_step_follows_the_resolution(given_, trusted):
    search = plan_search(**given_, trusted=trusted, perturbation=TURN)
    resolution = resolution_A(given_["shell"], given_["box_px"], given_["pixel_size_A"])
    order = search.finest.order
    edge_A = math.radians(step_deg(order)) * given_["diameter_A"] / 2
    # A step moves the edge of the particle by about half of the resolution at most, and not by much less.
    assert edge_A < 0.55 * resolution or order == FINEST_ORDER
    assert edge_A > 0.15 * resolution or order == COARSEST_ORDER + 1


@settings(max_examples=150, deadline=None)
@given(given_=settings_of_an_iteration())
def test_trusted_poses_are_searched_locally_once_the_grid_is_fine(given_):
    search = plan_search(**given_, trusted=True, perturbation=TURN)
    everywhere = plan_search(**given_, trusted=False, perturbation=TURN)
    if search.radius_deg is None:
        assert search.levels == everywhere.levels and search.shift_range_px == everywhere.shift_range_px
        return
    first, finest = search.levels
    assert finest.order == everywhere.finest.order > COARSEST_ORDER + 1
    assert first.shell == finest.shell == given_["shell"]
    # As many steps of the first level in angle as in shift, enough to leave the cell of the last pose.
    steps = search.radius_deg / step_deg(first.order)
    assert 1.5 <= steps <= 4
    assert search.shift_range_px == pytest.approx(steps * first.shift_step_px)


def test_a_finer_resolution_makes_a_finer_search_at_last_local():
    """A particle of 200 A in 128 pixels of 2 A, from 40 A to Nyquist."""
    searches = [plan_search(s, 128, 2.0, 200.0, 20.0, True, TURN, s < 9) for s in range(6, 65)]
    orders = [search.finest.order for search in searches]
    assert orders == sorted(orders) and orders[0] == 3 and orders[-1] >= 5
    local = [search.radius_deg is not None for search in searches]
    assert local == sorted(local) and local[-1] and not local[0]
    assert [search.profile_scale for search in searches] == [True] * 3 + [False] * 56
