"""Local resolution of maps whose parts have a known one."""

import numpy as np
import pytest

from dcryo.kernels import fft, filters, fsc, local_fsc
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.phantom import phantom
from dcryo.steps import local_resolution

BOX, PIXEL = 96, 1.8
FINE_A, COARSE_A = 4.0, 8.0


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """A molecule whose upper part goes to 4 A and whose lower part to 8 A."""
    atoms = phantom(np.eye(3)[None], 0.36 * BOX * PIXEL)
    density = gaussian_density(atoms.position_A, atoms.amplitude, 0.3 * atoms.bfactor_A2, BOX, PIXEL)
    z = np.arange(BOX)[:, None, None] - BOX // 2
    fine, coarse = (filters.lowpass(density, PIXEL, end) for end in (FINE_A, COARSE_A))
    return np.where(z >= 0, fine, coarse)


@pytest.fixture(scope="module")
def halves(truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two portions of white noise on it, as strong as half of the signal's power at 4.5 A."""
    power = fsc.shell_power(truth)[round(BOX * PIXEL / 4.5)]
    sigma = 2.0 * np.sqrt(power / BOX**3)
    draws = [np.random.Generator(np.random.Philox(key=seed)).standard_normal((BOX,) * 3) for seed in (1, 2)]
    return tuple((truth + sigma * draw).astype(np.float32) for draw in draws)


def local(halves: tuple[np.ndarray, np.ndarray], width_A: float, threshold: float = fsc.HALF):
    grid = local_fsc.windows(BOX, width_A / PIXEL)
    hands = [range(0, len(grid.centre), 2), range(1, len(grid.centre), 2)]
    pair = [fft.rfftn(one) for one in halves]
    sums = [local_resolution.band_sums(*pair, grid, hand) for hand in hands]
    return grid, hands, pair, local_resolution.local_correlation(sums, hands, grid, threshold)


def test_each_part_has_its_own_resolution(truth, halves):
    grid, _, _, found = local(halves, 5.25 * FINE_A)
    resolution = local_resolution.resolution_map(found, grid, PIXEL)
    z = (np.arange(BOX)[:, None, None] - BOX // 2) * PIXEL * np.ones((BOX, BOX, BOX))
    molecule = filters.lowpass(truth, PIXEL, 15.0)
    molecule = molecule > 0.2 * molecule.max()
    # Farther from where they meet than half of a window of the coarser.
    upper, lower = resolution[molecule & (z > 15)], resolution[molecule & (z < -28)]
    assert abs(np.median(upper) / FINE_A - 1) < 0.1
    assert abs(np.median(lower) / COARSE_A - 1) < 0.1
    assert np.mean(np.abs(upper / FINE_A - 1) < 0.1) > 0.9
    assert np.mean(np.abs(lower / COARSE_A - 1) < 0.1) > 0.9


def test_the_filtered_map_is_nearer_to_the_truth_than_any_filter_of_the_whole(truth, halves):
    grid, hands, pair, found = local(halves, 5.25 * FINE_A)
    plain = np.zeros(grid.shape, dtype=np.float32)
    parts = [local_resolution.filtered(*pair, found, plain, grid, hand, PIXEL) for hand in hands]
    made = fft.irfftn(sum(parts), BOX)
    mean = (halves[0] + halves[1]) / 2
    others = [np.sum((filters.lowpass(mean, PIXEL, end) - truth) ** 2) for end in np.arange(3.6, 14, 0.4)]
    assert np.sum((made - truth) ** 2) < 0.9 * min(others)


def test_local_b_factors_are_those_that_blurred_the_parts():
    """White noise blurred by another B in each half of the box."""
    draw = np.random.Generator(np.random.Philox(key=5)).standard_normal((BOX,) * 3).astype(np.float32)
    k = filters.radius_px(BOX, 3) / (BOX * PIXEL)
    blurred = [fft.irfftn(fft.rfftn(draw) * np.exp(-b * k**2 / 4).astype(np.float32), BOX) for b in (60.0, 180.0)]
    upper = np.arange(BOX)[:, None, None] >= BOX // 2
    signal = np.where(upper, *blurred)
    halves = tuple(
        signal + 1e-3 * np.random.Generator(np.random.Philox(key=seed)).standard_normal((BOX,) * 3).astype(np.float32)
        for seed in (6, 7)
    )
    grid, _, _, found = local(halves, 28.0)
    fitted = local_resolution.bfactors_A2(found, grid, PIXEL, np.ones(grid.shape))
    deep = np.abs(grid.points) < 0.35 * BOX
    top, bottom = (
        fitted[grid.points > 0.2 * BOX][:, deep][:, :, deep],
        fitted[grid.points < -0.2 * BOX][:, deep][:, :, deep],
    )
    # Drawn to the mean of the whole, a third of the way.
    assert 60 < np.median(top) < 110
    assert 130 < np.median(bottom) < 180
