"""Filters chosen place by place, on halves whose parts are known to differ in resolution or not to."""

import numpy as np
import pytest

from dcryo.kernels import fft, filters, fsc, non_uniform
from dcryo.kernels.masks import sphere
from dcryo.kernels.randomness import generator

BOX, PIXEL = 64, 2.0
MASK = sphere(BOX, 48, 4)
UPPER = np.arange(BOX)[:, None, None] >= BOX // 2


def noise(seed: int) -> np.ndarray:
    return generator(seed, "test", 0).standard_normal((BOX,) * 3).astype(np.float32)


def blurred(volume: np.ndarray, bfactor_A2: float) -> np.ndarray:
    k = filters.radius_px(BOX, 3) / (BOX * PIXEL)
    return fft.irfftn(fft.rfftn(volume) * np.exp(-bfactor_A2 * k**2 / 4).astype(np.float32), BOX)


def made(truth: np.ndarray) -> tuple[tuple, tuple, np.ndarray]:
    """Halves as they are and filtered by their FSC, and the FSC."""
    plain = tuple((truth + 0.12 * noise(seed)).astype(np.float32) for seed in (1, 2))
    curve = fsc.shell_correlation(plain[0] * MASK, plain[1] * MASK)
    gain = np.append(np.clip(curve, 0, 1), 0)[np.minimum(np.round(filters.radius_px(BOX, 3)).astype(int), BOX // 2 + 1)]
    filtered = tuple(fft.irfftn(fft.rfftn(one) * gain.astype(np.float32), BOX) for one in plain)
    return plain, filtered, curve


@pytest.fixture(scope="module")
def rigid() -> np.ndarray:
    return blurred(noise(0), 120.0) * MASK


@pytest.fixture(scope="module")
def mixed() -> np.ndarray:
    """Sharp above, blurred below."""
    return np.where(UPPER, blurred(noise(0), 60.0), 2 * blurred(noise(0), 700.0)) * MASK


def errors(maps: tuple, truth: np.ndarray, where: np.ndarray) -> float:
    return sum(float(np.sum((one - truth)[where] ** 2)) for one in maps)


def regularised(plain: tuple, filtered: tuple, curve: np.ndarray) -> tuple[np.ndarray, tuple]:
    place = non_uniform.choose(filtered, plain, curve)
    return place, tuple(non_uniform.apply(one, place, curve) for one in filtered)


def test_parts_of_different_resolution_are_both_nearer_to_the_truth(mixed):
    plain, filtered, curve = made(mixed)
    place, better = regularised(plain, filtered, curve)
    inside = MASK > 0.9
    for part, gain in ((inside & UPPER, 0.99), (inside & ~UPPER, 0.75)):
        assert errors(better, mixed, part) < gain * errors(filtered, mixed, part)
    points = len(place)
    deep = slice(points // 2 - 2, points // 2 + 2)
    top, bottom = place[-points // 3, deep, deep], place[points // 3 - 1, deep, deep]
    assert top.mean() > non_uniform.UNCHANGED > bottom.mean() + 3


def test_a_map_that_is_alike_everywhere_is_left_about_as_it_is(rigid):
    plain, filtered, curve = made(rigid)
    _, other = regularised(plain, filtered, curve)
    inside = MASK > 0.9
    assert errors(other, rigid, inside) < 1.02 * errors(filtered, rigid, inside)
    kept = fsc.shell_correlation(other[0] * MASK, rigid), fsc.shell_correlation(filtered[0] * MASK, rigid)
    assert kept[0][:20].sum() > 0.995 * kept[1][:20].sum()


def test_solvent_gets_the_strongest_filter(rigid):
    plain, filtered, curve = made(rigid)
    place, other = regularised(plain, filtered, curve)
    assert place[0, 0, 0] < 2
    corner = (slice(0, 10),) * 3
    assert other[0][corner].std() < 0.6 * filtered[0][corner].std()


def test_the_choice_is_that_of_the_errors_by_brute_force(mixed):
    """Filter by filter over the whole box, with one window for all: the same order of places."""
    plain, filtered, curve = made(mixed)
    place = non_uniform.choose(filtered, plain, curve)
    family = non_uniform.gains(curve)
    radius = np.minimum(np.floor(filters.radius_px(BOX, 3) + 0.5).astype(int), BOX // 2 + 1)
    centre = np.zeros(3)
    for z in (12, -14):
        centre[0] = z
        across = np.indices((BOX,) * 3) - BOX // 2 - centre[:, None, None, None]
        window = np.exp(-np.sum(across**2, axis=0) / (2 * 5.0**2))
        found = []
        for gain in family:
            at = np.append(gain, 0)[radius]
            one, other = (fft.irfftn(fft.rfftn(half) * at.astype(np.float32), BOX) for half in filtered)
            found.append(np.sum(window * ((one - plain[1]) ** 2 + (other - plain[0]) ** 2)))
        points = len(place)
        there = np.argmin(np.abs((np.arange(points) + 0.5) * BOX / points - 0.5 - BOX // 2 - z))
        assert abs(place[there, points // 2, points // 2] - np.argmin(found)) <= 2


def test_coarse_maps_are_left_alone(rigid):
    plain, filtered, _ = made(rigid)
    coarse = np.where(np.arange(BOX // 2 + 1) < 5, 1.0, 0.0)
    place = non_uniform.choose(filtered, plain, coarse)
    assert np.all(place == non_uniform.UNCHANGED)
    np.testing.assert_array_equal(non_uniform.apply(filtered[0], place, coarse), filtered[0])


def test_swapping_the_halves_changes_nothing(mixed):
    plain, filtered, curve = made(mixed)
    np.testing.assert_allclose(
        non_uniform.choose(filtered, plain, curve), non_uniform.choose(filtered[::-1], plain[::-1], curve), atol=0.02
    )
