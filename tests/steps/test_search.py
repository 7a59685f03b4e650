import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcryo.kernels.hold import hold
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.sampling import global_grid, rotation_matrices, step_deg
from dcryo.kernels.shells import resolution_A
from dcryo.kernels.symmetry import operators
from dcryo.steps.search import COARSEST_ORDER, FINEST_ORDER, Surroundings, plan_local, plan_search, stay

TURN = np.eye(3)[[1, 2, 0]]


@st.composite
def settings_of_an_iteration(draw):
    box = draw(st.integers(24, 640))
    pixel = draw(st.floats(0.4, 6))
    shell = draw(st.integers(1, box // 2))
    return {
        "shell": shell,
        "box_px": box,
        "pixel_size_A": pixel,
        "diameter_A": box * pixel * draw(st.floats(0.2, 1)),
        "shift_range_A": pixel * draw(st.floats(0.5, 30)),
        "shares": np.linspace(0, 1, box // 2 + 1)[None] * draw(st.floats(0, 0.1)),
        "perturbation": TURN,
    }


posed_shells = st.integers(0, 320)


@settings(max_examples=150, deadline=None)
@given(given_=settings_of_an_iteration(), posed_shell=posed_shells)
def test_levels_go_to_the_last_shell_by_no_more_than_doubling(given_, posed_shell):
    search = plan_search(**given_, posed_shell=posed_shell)
    assert search.shells[-1] == given_["shell"] and search.shells[0] >= 1
    for coarse, fine in pairwise(search.shells):
        # Rounding may add half a shell.
        assert coarse < fine <= 2 * coarse + 1
    # No more levels than doubling needs.
    assert len(search.shells) <= math.ceil(math.log2(search.shells[-1] / search.shells[0])) + 1
    assert 0 < search.fraction <= 1 and search.maximum >= 1 and search.temperature >= 1
    np.testing.assert_array_equal(search.perturbation, TURN)
    assert not search.profile_scale and plan_search(**given_, posed_shell=posed_shell, profile_scale=True).profile_scale


@settings(max_examples=150, deadline=None)
@given(given_=settings_of_an_iteration())
def test_a_global_search_matches_its_first_resolution_to_the_step_of_its_grid(given_):
    search = plan_search(**given_, posed_shell=0)
    box, pixel, first = given_["box_px"], given_["pixel_size_A"], search.shells[0]
    step_rad = math.radians(step_deg(search.grid_order))
    edge_A = step_rad * given_["diameter_A"] / 2
    # Nothing finer than what a step moves, and no coarser than that.
    assert first == 1 or resolution_A(first, box, pixel) >= edge_A * (1 - 1e-6)
    assert first == given_["shell"] or resolution_A(first + 1, box, pixel) < edge_A
    assert search.shift_range_px == pytest.approx(given_["shift_range_A"] / pixel)
    assert search.shift_step_px == pytest.approx(edge_A / 3 / pixel)
    # Rotations may leave their cell, shifts may go as far as the grid; no pose was back-projected before.
    assert search.windows[0][0].turn_rad == pytest.approx(0.6 * step_rad)
    assert search.windows[0][0].shift_px == pytest.approx(search.shift_range_px)
    assert not any(np.any(window.hold) for (window,) in search.windows)


@settings(max_examples=150, deadline=None)
@given(given_=settings_of_an_iteration())
def test_the_grid_moves_the_edge_of_the_particle_by_40_A(given_):
    search = plan_search(**given_, posed_shell=0)
    order = search.grid_order
    assert COARSEST_ORDER == 2 <= order <= FINEST_ORDER == 4
    edges_A = {o: math.radians(step_deg(o)) * given_["diameter_A"] / 2 for o in (order - 1, order)}
    assert edges_A[order] <= 40 or order == FINEST_ORDER
    assert edges_A[order - 1] > 40 or order == COARSEST_ORDER


def test_grid_order_grows_with_the_particle():
    diameters_A = np.linspace(50, 1500, 100)
    orders = [plan_search(20, 512, 4.0, d, 20.0, 0, np.zeros((1, 257)), TURN).grid_order for d in diameters_A]
    assert orders == sorted(orders) and set(orders) == {2, 3, 4}
    # A step of order 2 is 14.7 degrees, by which a radius of 156 A moves the edge by 40 A.
    assert diameters_A[orders.index(3)] == pytest.approx(2 * 156, abs=1500 / 100)


@settings(max_examples=150, deadline=None)
@given(given_=settings_of_an_iteration(), posed_shell=posed_shells)
def test_posed_particles_are_searched_locally_once_the_resolution_is_fine_enough(given_, posed_shell):
    search = plan_search(**given_, posed_shell=posed_shell)
    box, pixel, shell = given_["box_px"], given_["pixel_size_A"], given_["shell"]
    radius_A = given_["diameter_A"] / 2
    local = posed_shell > 0 and resolution_A(shell, box, pixel) <= radius_A / 8
    assert (search.grid_order is None) == local
    if not local:
        everywhere = plan_search(**given_, posed_shell=0)
        assert search.shells == everywhere.shells and search.windows[0][0][:2] == everywhere.windows[0][0][:2]
        return
    # From where the poses are good to; if the resolution grew by much since, not from too far back.
    first = search.shells[0]
    nearly = shell <= 1.2 * posed_shell
    assert first == (shell if nearly else max(posed_shell, shell // 2)) and len(search.shells) <= 3
    # The windows are what the first level can tell apart.
    assert search.windows[0][0].shift_px * pixel == pytest.approx(resolution_A(first, box, pixel))
    assert search.windows[0][0].turn_rad * radius_A == pytest.approx(resolution_A(first, box, pixel))
    for level, (window,) in zip(search.shells, search.windows, strict=True):
        held = hold(given_["shares"][0, : level + 1], radius_A / pixel, box)
        np.testing.assert_allclose(window.hold, held / 2)


def test_a_finer_resolution_makes_a_finer_search_at_last_local():
    """A particle of 200 A in 128 pixels of 2 A, from 40 A to Nyquist: local from 12.5 A, a sixteenth of it."""
    searches = [
        plan_search(s, 128, 2.0, 200.0, 20.0, s - 1, np.zeros((1, 65)), TURN, profile_scale=s < 9) for s in range(6, 65)
    ]
    local = [search.grid_order is None for search in searches]
    assert local == sorted(local) and local.index(True) + 6 == math.ceil(256 / 12.5)
    assert all(search.shells[0] >= s - 1 for s, search in enumerate(searches, 6) if search.grid_order is None)
    assert [search.profile_scale for search in searches] == [True] * 3 + [False] * 56
    windows = [search.windows[0][0].turn_rad for search in searches if search.grid_order is None]
    assert windows == sorted(windows, reverse=True)


@pytest.mark.parametrize("diameter_A", [100.0, 500.0])
def test_windows_of_the_grid_add_up_to_one(diameter_A):
    """So that components that climb from all of its points share a posterior out and count none of it twice."""
    search = plan_search(20, 128, 4.0, diameter_A, 20.0, 0, np.zeros((1, 65)), TURN)
    pixel, psi = global_grid(search.grid_order, operators("C1"), TURN)
    grid = rotation_matrices(search.grid_order, pixel, psi, TURN).reshape(-1, 9)
    sums = []
    for rotation in random_rotations(300, np.random.default_rng(1)).reshape(-1, 9):
        angle = np.arccos(np.clip((grid @ rotation - 1) / 2, -1, 1))
        sums.append(np.sum(np.exp(-((angle / search.windows[0][0].turn_rad) ** 2) / 2)))
    density = len(grid) / (8 * np.pi**2)
    sums = np.array(sums) / (density * (2 * np.pi) ** 1.5 * search.windows[0][0].turn_rad ** 3)
    assert sums.mean() == pytest.approx(1, abs=0.02)
    # At the poles, where the facets of HEALPix narrow, up to a quarter is missing.
    assert np.quantile(np.abs(sums - 1), 0.5) < 0.03 and sums.std() < 0.06 and np.abs(sums - 1).max() < 0.35


@settings(max_examples=150, deadline=None)
@given(given_=settings_of_an_iteration(), turn_deg=st.floats(0.1, 40), shift_A=st.floats(0.1, 40))
def test_a_local_search_starts_as_coarse_as_poses_are_known_and_is_held_by_its_prior(given_, turn_deg, shift_A):
    box, pixel, radius_A = given_["box_px"], given_["pixel_size_A"], given_["diameter_A"] / 2
    near = Surroundings(turn_deg, shift_A)
    known = near.known_shell(box, pixel, given_["diameter_A"])
    off_A = max(math.radians(turn_deg) * radius_A, shift_A)
    assert known == 1 or known == box // 2 or resolution_A(known + 1, box, pixel) < off_A + 1e-6
    assert known == 1 or resolution_A(known, box, pixel) >= off_A * (1 - 1e-6)
    del given_["shift_range_A"], given_["perturbation"]
    posed = min(known, given_["shell"])
    search = plan_local(**given_, posed_shell=posed, surroundings=near)
    assert search.grid_order is None and search.shells[-1] == given_["shell"]
    assert search.shells == (given_["shell"],) or search.shells[0] == posed
    reach_A = resolution_A(search.shells[0], box, pixel)
    for (window,), level in zip(search.windows, search.shells, strict=True):
        assert (window.anchored_rad, window.anchored_px) == pytest.approx((math.radians(turn_deg), shift_A / pixel))
        assert (window.turn_rad, window.shift_px) == pytest.approx((reach_A / radius_A, reach_A / pixel))
        expected = 0.5 * hold(given_["shares"][0, : level + 1], radius_A / pixel, box)
        np.testing.assert_allclose(window.hold, expected)


def test_without_a_prior_nothing_holds_poses_and_all_mates_have_room():
    near = Surroundings(mates=operators("I1"))
    assert near.known_shell(64, 2.0, 100.0) == 32
    search = plan_local(20, 64, 2.0, 100.0, 20, np.zeros((1, 33)), near)
    assert search.maximum >= 60 and search.shells == (20,)
    assert all(window.anchored_rad == math.inf and window.anchored_px == math.inf for (window,) in search.windows)


def test_poses_that_stay_are_held_by_each_reference_as_much_as_it_has_of_them():
    held = np.linspace(0, 0.1, 17) * np.array([[1.0], [0.0]])
    search = stay(12, 32, 10.0, held, operators("C2"))
    assert search.grid_order is None and search.shells == (12,) and len(search.operators) == 2
    (first, second) = search.windows[0]
    assert first.turn_rad < 1e-4 and first.shift_px < 1e-4
    np.testing.assert_allclose(first.hold, 0.5 * hold(held[0, :13], 10.0, 32))
    assert not second.hold.any()
