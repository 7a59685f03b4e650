"""Local FSC in bands under Gaussian windows, against its definition and against what noise does."""

import numpy as np
import pytest

from dcryo.kernels import fft, local_fsc
from dcryo.kernels.masks import sphere

BOX, WIDTH = 40, 9.0


def noise(seed: int, box: int = BOX) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal((box,) * 3).astype(np.float32)


def radius(box: int) -> np.ndarray:
    """|k| of every voxel of the full transform."""
    along = np.fft.fftfreq(box, 1 / box)
    return np.sqrt(along[:, None, None] ** 2 + along[:, None] ** 2 + along**2)


def band_passed(volume: np.ndarray, grid: local_fsc.Windows, band: int) -> np.ndarray:
    """A band of a map over the whole box, by the full transform."""
    return np.fft.ifftn(np.fft.fftn(volume) * local_fsc.band_filter(radius(len(volume)), grid, band)).real


def window_at(point: np.ndarray, grid: local_fsc.Windows, band: int) -> np.ndarray:
    """The window on products about a point (z, y, x) in voxels from the centre."""
    across = np.indices((grid.box_px,) * 3) - grid.box_px // 2 - np.asarray(point)[:, None, None, None]
    sigma = grid.width_px[band] * 0.5 / np.hypot(0.5, 0.72) / 2.35482
    return np.exp(-np.sum(across**2, axis=0) / (2 * sigma**2))


def pair(box: int = BOX) -> tuple[np.ndarray, np.ndarray]:
    """A signal that falls off, in two portions of noise."""
    falling = np.exp(-((radius(box) / (0.2 * box)) ** 2))
    signal = 3 * np.fft.ifftn(np.fft.fftn(noise(0, box)) * falling).real * sphere(box, 0.6 * box, 4)
    return tuple((signal + noise(seed, box)).astype(np.float32) for seed in (1, 2))


def transforms(maps: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return fft.rfftn(maps[0]), fft.rfftn(maps[1])


@pytest.mark.parametrize("box", [40, 33])
def test_sums_under_windows_are_those_of_the_products(box):
    maps, grid = pair(box), local_fsc.windows(box, WIDTH)
    places = [(len(grid.points) // 2,) * 3, (3, len(grid.points) // 2, len(grid.points) - 4)]
    for band in range(len(grid.centre)):
        found = local_fsc.products(*transforms(maps), grid, band)
        a, b = (band_passed(one, grid, band) for one in maps)
        for place in places:
            window = window_at(grid.points[list(place)], grid, band)
            expected = [np.sum(window * one * other) / np.sum(window) for one, other in ((a, b), (a, a), (b, b))]
            tolerance = 0.02 * np.sqrt(expected[1] * expected[2])
            np.testing.assert_allclose(found[(slice(None), *place)], expected, atol=tolerance)


def test_it_is_the_fsc_of_windows_cut_out():
    """The definition: cut a window out of both maps, transform, correlate over the band."""
    maps, grid = pair(), local_fsc.windows(BOX, WIDTH)
    k, middle = radius(BOX), len(grid.points) // 2
    found = np.array(
        [local_fsc.correlation(local_fsc.products(*transforms(maps), grid, b)) for b in range(len(grid.centre))]
    )
    for place in ((middle,) * 3, (middle, middle - 3, middle), (middle + 3, middle, middle)):
        defined = []
        for band in range(len(grid.centre)):
            window = np.sqrt(window_at(grid.points[list(place)], grid, band))
            a, b = (np.fft.fftn(window * one) for one in maps)
            weight = local_fsc.band_filter(k, grid, band) ** 2
            power = np.sum(weight * np.abs(a) ** 2) * np.sum(weight * np.abs(b) ** 2)
            defined.append(np.sum(weight * a * b.conj()).real / np.sqrt(power))
        assert max(defined) > 0.7 and min(defined) < 0.15
        np.testing.assert_allclose(found[(slice(None), *place)], defined, atol=0.12)


def test_noise_correlates_as_much_as_its_modes_say():
    grid = local_fsc.windows(BOX, WIDTH)
    counted, correlations = local_fsc.modes(grid), []
    for seed in range(12):
        both = fft.rfftn(noise(2 * seed + 10)), fft.rfftn(noise(2 * seed + 11))
        correlations.append(
            [local_fsc.correlation(local_fsc.products(*both, grid, b)) for b in range(len(grid.centre))]
        )
    # Windows that the faces of the box do not cut.
    deep = (slice(None), slice(None), *[slice(3, -3)] * 3)
    spread = np.array(correlations)[deep].std(axis=(0, 2, 3, 4))
    # The windows of the first bands are as wide as the box.
    np.testing.assert_allclose(spread[4:] * np.sqrt(counted[4:]), 1, atol=0.2)
    assert abs(np.array(correlations)[deep][:, 4:].mean()) < 0.02


@pytest.mark.parametrize("box", [40, 33])
def test_bands_and_what_is_below_them_make_the_map(box):
    grid = local_fsc.windows(box, WIDTH)
    transform = fft.rfftn(noise(3, box))
    bands = sum(
        transform * local_fsc.band_filter(radius(box)[:, :, : box // 2 + 1], grid, band)
        for band in range(len(grid.centre))
    )
    total = bands / local_fsc.OVERLAP + local_fsc.below(transform, grid)
    inside = radius(box)[:, :, : box // 2 + 1] <= grid.centre[-local_fsc.OVERLAP]
    np.testing.assert_allclose(total[inside], transform[inside], rtol=1e-4, atol=1e-3)


def test_where_curves_cross_their_thresholds():
    curves = np.array([[0.9, 0.8, 0.4, 0.0], [0.1, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9], [0.9, 0.1, 0.9, 0.9]]).T
    found = local_fsc.resolved(curves.reshape(4, 4, 1, 1).astype(np.float32), np.array([0.2, 0.2, 0.2, 0.2]))
    np.testing.assert_allclose(found.ravel(), [2.5, 0.0, 3.0, 0.875], atol=1e-6)
    raised = local_fsc.resolved(curves.reshape(4, 4, 1, 1).astype(np.float32), np.array([0.2, 0.2, 0.6, 0.2]))
    assert raised.ravel()[0] == pytest.approx(1.75)


def test_points_and_voxels_agree_on_a_slope():
    grid = local_fsc.windows(BOX, WIDTH)
    z, y, x = np.indices((BOX,) * 3) - BOX // 2
    slope = (z + 2 * y - 3 * x).astype(np.float32)
    deep = (slice(4, -4),) * 3
    at = grid.points
    expected = at[:, None, None] + 2 * at[:, None] - 3 * at
    np.testing.assert_allclose(local_fsc.at_points(slope, grid)[deep], expected[deep], atol=0.05)
    np.testing.assert_allclose(
        local_fsc.spread(expected, grid, BOX)[8:-8, 8:-8, 8:-8], slope[8:-8, 8:-8, 8:-8], atol=0.01
    )


def test_windows_too_wide_are_refused():
    with pytest.raises(ValueError, match="at most"):
        local_fsc.windows(40, 20.0)
