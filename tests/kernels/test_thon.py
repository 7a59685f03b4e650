import math

import naive_thon
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thon_rings import angle_between

from dcryo.kernels import spectrum, thon
from dcryo.kernels.ctf import ctf
from dcryo.kernels.thon import Aberration, Range

HIGHEST, STEP = 120, 1.0 / 600.0
"""Spectra of these tests: up to 5 A, of tiles of 600 A."""

LENS = thon.lens(300.0, 2.7, 0.07)
BASIS = spectrum.splines(HIGHEST, 15.0, 7)
USED = np.arange(HIGHEST + 1) >= 20
WITHIN = Range((3000.0, 40000.0), (0.0, 0.0), 500.0)
EXACT = thon.Fit(
    Aberration(12000.0, 150.0, -90.0, 0.0), Aberration(1.0, 1.0, 1.0, 0.0), np.full(HIGHEST + 1, 0.2),
    np.zeros(HIGHEST + 1), 1.0,
)  # fmt: skip


def aberration(u: float, v: float, angle: float, phase_deg: float = 0.0) -> Aberration:
    turn = math.radians(2.0 * angle)
    half = (u - v) / 2.0
    return Aberration((u + v) / 2.0, half * math.cos(turn), half * math.sin(turn), math.radians(phase_deg))


def rings_of(u: float, v: float, angle: float, phase_deg: float = 0.0, noise: float = 0.0) -> np.ndarray:
    """A flattened half spectrum, 0.1 below 1 - 2 CTF^2 of `dcryo.kernels.ctf` and fading."""
    ky, kx = np.mgrid[-HIGHEST : HIGHEST + 1, 0 : HIGHEST + 1].astype(np.int32)
    values = ctf(kx.ravel(), ky.ravel(), 600, 1.0, u, v, angle, 300.0, 2.7, 0.07, phase_deg)[0].reshape(kx.shape)
    fade = np.exp(-((np.hypot(kx, ky) / HIGHEST) ** 2))
    random = np.random.Generator(np.random.Philox(key=int(u)))
    return (0.1 + 0.3 * fade * (2.0 * values**2 - 1.0) + noise * random.standard_normal(kx.shape)).astype(np.float32)


def test_gamma_is_that_of_the_ctf_of_particles() -> None:
    ky, kx = np.mgrid[-50:51, -50:51].astype(np.int32)
    values = ctf(kx.ravel(), ky.ravel(), 300, 1.0, 9400, 8200, 65, 300.0, 2.7, 0.07, 25)[0].reshape(kx.shape)
    found = thon.gamma(kx / 300.0, ky / 300.0, aberration(9400, 8200, 65, 25), LENS)
    np.testing.assert_allclose(-np.sin(found), values, atol=1e-5)
    along_x = thon.round_gamma((np.arange(51) / 300.0) ** 2, 9000.0, 0.3, LENS)
    np.testing.assert_allclose(
        along_x, thon.gamma(np.arange(51) / 300.0, np.zeros(51), Aberration(9000, 0, 0, 0.3), LENS)
    )


@settings(max_examples=15, deadline=None)
@given(mean=st.floats(6000, 25000), astigmatism=st.floats(100, 1500), angle=st.floats(0, 180), off=st.floats(-60, 60))
def test_refinement_finds_the_ctf_of_the_particles(mean: float, astigmatism: float, angle: float, off: float) -> None:
    u, v = mean + astigmatism / 2, mean - astigmatism / 2
    start = aberration(u + off, v + off / 2, angle)
    fit = thon.refine(rings_of(u, v, angle), start, BASIS, USED, STEP, LENS, WITHIN, 1.0, rounds=30)
    found_u, found_v, found_angle = fit.aberration.defocus()
    assert (found_u, found_v) == (pytest.approx(u, abs=3.0), pytest.approx(v, abs=3.0))
    assert 0.0 <= found_angle < 180.0 and angle_between(found_angle, angle) < 1.0
    assert fit.score > 0.99
    np.testing.assert_allclose(fit.background[USED], 0.1, atol=0.02)
    np.testing.assert_allclose(fit.envelope[USED], 0.3 * np.exp(-((np.arange(20, 121) / 120) ** 2)), atol=0.03)


def test_phase_shift_and_defocus_are_told_apart() -> None:
    start = aberration(11000, 10800, 30, 60)
    within = WITHIN._replace(phase_rad=(0.0, math.pi))
    fit = thon.refine(rings_of(11050, 10750, 35, 70), start, BASIS, USED, STEP, LENS, within, 1.0, rounds=30)
    assert math.degrees(fit.aberration.phase_rad) == pytest.approx(70, abs=1)
    assert fit.aberration.mean_A == pytest.approx(10900, abs=8)


def test_errors_are_those_of_many_fits() -> None:
    truths = [aberration(12000 + n, 11700 + n, 20) for n in range(40)]
    fits = [
        thon.refine(rings_of(*truth.defocus(), noise=0.2), truths[0], BASIS, USED, STEP, LENS, WITHIN, 1.0)
        for truth in truths
    ]
    off = np.array([np.subtract(fit.aberration, truth) for fit, truth in zip(fits, truths, strict=True)])
    ratio = np.sqrt(np.mean(off**2, axis=0))[:3] / fits[0].error[:3]
    # Of forty numbers, the root mean square is within a third of their deviation, 999 times in a thousand.
    assert (ratio > 0.67).all() and (ratio < 1.4).all()


def test_a_step_has_the_derivatives_of_the_model() -> None:
    basis = spectrum.splines(40, 8.0, 6)
    used = np.arange(41) >= 12
    half = rings_of(9000, 8000, 50, 20)[HIGHEST - 40 : HIGHEST + 41, :41].copy()
    random = np.random.Generator(np.random.Philox(key=1))
    values = np.concatenate([[8600, 300, 200, 0.3], 0.1 * random.standard_normal(12)])
    first, taps = thon._taps(basis)
    normal, right, count, squares = thon._normal(half, values, first, taps, used, STEP, *LENS)

    def left(at: np.ndarray) -> np.ndarray:
        return naive_thon.residuals(half, at, basis, used, STEP, LENS, Aberration)

    size = np.concatenate([[1.0, 1.0, 1.0, 1e-3], np.full(12, 1e-3)])
    jacobian = np.stack([-(left(values + s) - left(values - s)) / (2 * s[n]) for n, s in enumerate(np.diag(size))], 1)
    assert count == len(jacobian) and squares == pytest.approx((left(values) ** 2).sum(), rel=1e-5)
    scale = np.sqrt(np.diag(jacobian.T @ jacobian))
    np.testing.assert_allclose(
        normal / np.outer(scale, scale), jacobian.T @ jacobian / np.outer(scale, scale), atol=1e-4
    )
    np.testing.assert_allclose(right / scale, jacobian.T @ left(values) / scale, atol=1e-3)


@pytest.mark.parametrize(("mean", "astigmatism", "angle"), [(5000, 300, 10), (15000, 900, 100), (33000, 0, 0)])
def test_the_search_comes_near_enough_for_refinement(mean: float, astigmatism: float, angle: float) -> None:
    half = rings_of(mean + astigmatism / 2, mean - astigmatism / 2, angle, 0, 1.0)
    means, counts = spectrum.rings(half, 24)
    found, standing_out = thon.search(means, counts, BASIS, USED, STEP, LENS, WITHIN, 1.0)
    assert standing_out > 10
    # gamma at the last ring is off by less than a quarter of a ring.
    wanted = aberration(mean + astigmatism / 2, mean - astigmatism / 2, angle)
    worst = np.abs(np.subtract(found[:3], wanted[:3])).max()
    assert abs(LENS.quadratic_A) * worst / 25.0 < math.pi / 4


def test_noise_does_not_stand_out() -> None:
    random = np.random.Generator(np.random.Philox(key=4))
    for _ in range(5):
        means, counts = spectrum.rings(random.standard_normal((241, 121)).astype(np.float32), 24)
        assert thon.search(means, counts, BASIS, USED, STEP, LENS, WITHIN, 1.0)[1] < 5.5


def test_paths_are_the_best_of_all_that_are_tried() -> None:
    random = np.random.Generator(np.random.Philox(key=2))
    places = random.standard_normal((60, 8))
    first, step, low, high, expected = 1000.0, 50.0, 1500.0, 3500.0, 400.0
    z, mean, along, across = thon._paths(places, first, step, low, high, expected)
    best = -np.inf
    for half in range(int(2.0 * expected / 2 / (2 * step)) + 1):
        for turn in range(12):
            for place in range(2 * half, 60 - 2 * half):
                if low <= first + place * step <= high:
                    rows = [
                        place + math.floor(2 * half * math.cos(2 * math.pi * ((s + 0.5) / 8 - turn / 12)) + 0.5)
                        for s in range(8)
                    ]
                    total = places[rows, range(8)].sum()
                    value = total * abs(total) / 2 - 0.5 * (4 * half * step / expected) ** 2
                    best = max(best, value)
    assert 0.5 * z * abs(z) - 0.5 * (2 * math.hypot(along, across) / expected) ** 2 == pytest.approx(best)
    assert low <= mean <= high


def test_hann_windows_overlap_as_they_do() -> None:
    window = np.sin(np.pi * (np.arange(1000) + 0.5) / 1000) ** 2
    whole = np.correlate(window, window, "full")[999:] / (window @ window)
    np.testing.assert_allclose(thon.hann_overlap(np.arange(1000) / 1000), whole, atol=1e-3)
    assert thon.hann_overlap(np.array([1.5]))[0] == pytest.approx(0.0, abs=1e-12)


def test_equal_phases_are_averaged() -> None:
    half = rings_of(9500, 8300, 70)[HIGHEST - 60 : HIGHEST + 61, :61].copy()
    of = aberration(9500, 8300, 70)
    means, counts = thon.equiphase(half, np.array(of), STEP, LENS.quadratic_A, LENS.quartic_A4)
    found: dict[int, list[float]] = {}
    for _, kx, ky, value in naive_thon.pixels(half):
        if math.hypot(kx, ky) <= 60:
            found.setdefault(naive_thon.equiphase_ring(kx, ky, STEP, of, LENS), []).append(value)
    for ring in range(10, 60):
        assert counts[ring] == len(found[ring])
        assert means[ring] == pytest.approx(np.mean(found[ring]), abs=1e-6)


def test_rings_along_equal_phases_are_sharp_where_circles_blur_them() -> None:
    half = rings_of(16000, 14500, 25)
    sharp, _ = thon.equiphase(half, np.array(aberration(16000, 14500, 25)), STEP, LENS.quadratic_A, LENS.quartic_A4)
    blurred = spectrum.rings(half, 1)[0][:, 0]
    assert sharp[80:110].std() > 1.5 * blurred[80:110].std()


def test_quality_is_the_correlation_of_stretches_without_their_slope() -> None:
    random = np.random.Generator(np.random.Philox(key=3))
    measured, fitted = random.standard_normal((2, 80)) + 0.1 * np.arange(80)
    counts, reach = 1.0 + np.arange(80.0), np.full(80, 7.0)
    found = thon._quality(measured, fitted, counts, reach, 5)
    assert np.isnan(found[:12]).all()
    for ring in range(12, 80):
        expected = naive_thon.quality(measured, fitted, counts, ring - 7, min(ring + 7, 79))
        assert found[ring] == pytest.approx(expected, abs=1e-9)


def test_quality_falls_where_a_wrong_defocus_falls_out_of_step() -> None:
    half = rings_of(15000, 15000, 0)
    right = thon.curves(half, EXACT._replace(aberration=aberration(15000, 15000, 0)), 20, STEP, LENS)
    wrong = thon.curves(half, EXACT._replace(aberration=aberration(15400, 15400, 0)), 20, STEP, LENS)
    assert np.nanmin(right.quality) > 0.95 and thon.holds_to(right.quality) == HIGHEST
    assert 40 < thon.holds_to(wrong.quality) < 100


def test_a_fit_holds_up_to_the_first_fall() -> None:
    nan = np.nan
    assert thon.holds_to(np.array([nan, nan, 0.9, 0.8, 0.4, 0.9])) == 3
    assert thon.holds_to(np.array([nan, 0.4, 0.8, 0.9])) == 0
    assert thon.holds_to(np.array([nan, 0.8, 0.9])) == 2
    assert thon.holds_to(np.array([nan, nan])) == 0


def test_a_tile_is_most_likely_at_its_own_defocus() -> None:
    offsets = np.arange(-20, 21) * 50.0
    truth = EXACT.aberration
    powers = []
    for off in (-400.0, 0.0, 250.0):
        u, v, angle = truth._replace(mean_A=truth.mean_A + off).defocus()
        powers.append((1.0 + rings_of(u, v, angle)) ** 2)
    curve = np.ones(HIGHEST + 1)
    tiles, counts = thon.tile_curves(np.array(powers), curve, np.array(truth), STEP, LENS.quadratic_A, LENS.quartic_A4)
    for tile, power in zip(tiles, powers, strict=True):
        alone, _ = thon.equiphase(
            (np.sqrt(power) - 1).astype(np.float32), np.array(truth), STEP, LENS.quadratic_A, LENS.quartic_A4
        )
        np.testing.assert_allclose(tile[20:], alone[20:], atol=1e-5)
    likelihood = thon.likelihoods(tiles, counts, EXACT, BASIS, USED, offsets, STEP, LENS, 1.0)
    np.testing.assert_allclose(offsets[likelihood.argmax(axis=1)], [-400.0, 0.0, 250.0], atol=50)


def test_a_plane_is_found_through_noisy_tiles() -> None:
    random = np.random.Generator(np.random.Philox(key=5))
    places = random.uniform(-2000, 2000, (60, 2))
    heights = 120.0 + places @ [0.4, -0.15]
    offsets = np.arange(-40, 41) * 100.0
    seen = heights + 200.0 * random.standard_normal(60)
    likelihood = -0.5 * ((offsets - seen[:, None]) / 200.0) ** 2
    middle, slope_x, slope_y, gain = thon.plane(likelihood, offsets, places)
    assert middle == pytest.approx(120, abs=80)
    assert (slope_x, slope_y) == (pytest.approx(0.4, abs=0.07), pytest.approx(-0.15, abs=0.07))
    assert gain > 100
    level = thon.plane(-0.5 * ((offsets - 120 + 0 * seen[:, None]) / 200.0) ** 2, offsets, places)
    assert level[3] < 1.0
