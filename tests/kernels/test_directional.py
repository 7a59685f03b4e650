"""FSC and sampling by direction."""

import numpy as np
import pytest

from dcryo.kernels import directional, fft, fsc
from dcryo.kernels.randomness import generator
from dcryo.kernels.symmetry import operators

C1 = operators("C1")


def noise(seed: int, box: int) -> np.ndarray:
    return generator(seed, "test", 0).standard_normal((box,) * 3).astype(np.float32)


def naive_conical_fsc(first: np.ndarray, second: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Over the whole transforms, frequency by frequency."""
    box = len(first)
    a, b = (np.fft.fftn(volume) for volume in (first, second))
    k = np.fft.fftfreq(box, 1 / box)
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    cosine = np.abs(x * direction[0] + y * direction[1] + z * direction[2]) / np.maximum(radius, 1e-9)
    curve = []
    for shell in range(1, box // 2 + 1):
        inside = (np.floor(radius + 0.5) == shell) & (cosine >= np.cos(np.deg2rad(20)))
        power = np.sum(np.abs(a[inside]) ** 2) * np.sum(np.abs(b[inside]) ** 2)
        curve.append(np.sum(a[inside] * b[inside].conj()).real / np.sqrt(power) if inside.sum() >= 16 else np.nan)
    return np.array(curve)


@pytest.mark.parametrize("box", [16, 17])
def test_conical_fsc_is_the_sum_over_the_whole_cone(box):
    first = noise(1, box)
    second = first + noise(2, box)
    directions = np.array([[0, 0, 1.0], [1, 0, 0], [0.48, 0.6, 0.64]])
    found = directional.conical_fsc(directional.cone_sums(fft.rfftn(first), fft.rfftn(second), directions))
    for curve, direction in zip(found, directions, strict=True):
        expected = naive_conical_fsc(first, second, direction)
        known = np.isfinite(expected)
        assert known.sum() >= 3
        np.testing.assert_allclose(curve[1:][known], expected[known], atol=1e-4)


@pytest.mark.parametrize(("name", "share"), [("C1", 2), ("C3", 6), ("D2", 8), ("O", 48), ("T", 24)])
def test_unique_directions_cover_the_sphere_once(name, share):
    group = operators(name)
    found = directional.unique_directions(4, group)
    assert len(found) == pytest.approx(3072 / share, rel=0.15)
    mates = np.concatenate([found @ g.T for g in group])
    mates = np.concatenate([mates, -mates])
    others = generator(0, "directions", 0).standard_normal((500, 3))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    farthest = np.arccos(np.clip((others @ mates.T).max(axis=1), -1, 1)).max()
    assert np.rad2deg(farthest) < 4.5


def test_a_map_blurred_along_an_axis_is_worst_there():
    box = 48
    signal, kz = 3 * noise(0, box), np.fft.fftfreq(box)[:, None, None]
    blurred = np.fft.ifftn(np.fft.fftn(signal) * np.exp(-((kz / 0.1) ** 2))).real
    directions = directional.unique_directions(2, C1)
    transforms = [fft.rfftn((blurred + noise(seed, box)).astype(np.float32)) for seed in (1, 2)]
    curves = directional.conical_fsc(directional.cone_sums(*transforms, directions))
    ends = directional.resolutions(curves)
    tilt = np.abs(directions[:, 2])
    assert tilt[ends.argmin()] > 0.8
    assert ends[tilt > 0.9].max() < 0.8 * ends[tilt < 0.3].min()
    assert directional.area_ratio(curves) < 0.7
    volume = directional.fsc_volume(curves, directions, C1, box)
    middle = box // 2
    assert volume[middle + 15, middle, middle] < 0.3 < 0.7 < volume[middle, middle + 15, middle]
    assert volume[middle, middle, middle] == pytest.approx(1)
    # The opposite frequency.
    np.testing.assert_allclose(volume[1:, 1:, 1:], volume[:0:-1, :0:-1, :0:-1], atol=1e-6)


def test_an_even_map_has_the_fsc_of_the_whole_in_each_direction():
    box = 64
    falling = np.exp(-sum(np.meshgrid(*[(np.fft.fftfreq(box) / 0.25) ** 2] * 3)))
    signal = 3 * np.fft.ifftn(np.fft.fftn(noise(0, box)) * falling).real
    first, second = ((signal + noise(seed, box)).astype(np.float32) for seed in (1, 2))
    directions = directional.unique_directions(2, C1)
    curves = directional.conical_fsc(directional.cone_sums(fft.rfftn(first), fft.rfftn(second), directions))
    np.testing.assert_allclose(curves.mean(axis=0)[6:], fsc.shell_correlation(first, second)[6:], atol=0.05)
    assert directional.area_ratio(curves) > 0.8


def test_a_dip_of_one_shell_ends_no_curve():
    curves = np.array([[1, 1, 1, 0.1, 1, 1, 0.5, 0.0, 0.0], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    # Means of three: 1, 1, 0.7, 0.7, 0.7, 0.833, 0.5, 0.167, 0.
    np.testing.assert_allclose(directional.resolutions(curves), [7 + 0.024 / 0.1667, 8], atol=0.01)
    np.testing.assert_allclose(directional.areas(curves), [4.6, 8])
    assert directional.area_ratio(curves) == pytest.approx(4.6 / 8)


def views(kind: str, count: int) -> np.ndarray:
    random = generator(3, "views", 0)
    angle, height = 2 * np.pi * random.random(count), 2 * random.random(count) - 1
    if kind == "side":
        height = 0 * height
    if kind == "top":
        height = 0.95 + 0.05 * np.abs(height)
    if kind == "wide":
        height = 0.7 + 0.3 * np.abs(height)
    across = np.sqrt(1 - height**2)
    return np.stack([across * np.cos(angle), across * np.sin(angle), height], axis=1)


@pytest.mark.parametrize(("kind", "expected", "off"), [("even", 1.0, 0.03), ("side", 8 / np.pi**2, 0.03)])
def test_compensation_factors_that_are_known(kind, expected, off):
    directions = directional.unique_directions(directional.SAMPLED, C1)
    sampled = directional.sampling_of(directions, views(kind, 20000), C1, 0.04)
    assert sampled.mean() == pytest.approx(1, abs=0.05)
    assert directional.compensation_factor(sampled, 1e-3) == pytest.approx(expected, abs=off)


def test_top_views_leave_a_cone_out_and_symmetry_fills_it():
    directions = directional.unique_directions(directional.SAMPLED, C1)
    seen = views("top", 2000)
    sampled = directional.sampling_of(directions, seen, C1, 0.04)
    # The frequencies along z that no view reaches: views lean by at most 18 degrees.
    expected = np.abs(directions[:, 2]) > np.sin(np.deg2rad(18.2)) + 0.05
    assert np.all(sampled[expected] == 0) and np.mean(sampled == 0) < expected.mean() + 0.1
    assert directional.compensation_factor(sampled, 1e-3) < 0.01
    # The three-folds of a cube are 55 degrees from its faces: views of these alone miss them, wider ones do not.
    octahedral = operators("O")
    assert directional.compensation_factor(directional.sampling_of(directions, seen, octahedral, 0.04), 1e-3) < 0.01
    wide = views("wide", 2000)
    symmetric = directional.sampling_of(directions, wide, octahedral, 0.04)
    assert directional.compensation_factor(symmetric, 1e-3) > 0.5
    mates = directional.sampling_of(directions @ octahedral[5].T, wide, octahedral, 0.04)
    np.testing.assert_allclose(mates, symmetric, atol=1e-9)
