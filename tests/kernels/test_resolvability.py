"""Q-scores and correlations around residues, against slow twins and what must hold of them."""

import numpy as np
import pytest
from scipy import ndimage

from dcryo.kernels import resolvability
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.filters import lowpass

BOX, PIXEL = 32, 1.1


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def chain(count: int = 40) -> np.ndarray:
    """Atoms 1.5 A apart along a folded walk, (count, 3) from the box centre."""
    generator, place = rng(3), [np.zeros(3)]
    while len(place) < count:
        step = generator.normal(size=3)
        new = place[-1] + 1.5 * step / np.linalg.norm(step)
        apart = np.linalg.norm(np.array(place) - new, axis=1)
        if np.abs(new).max() < 11 and apart.min() > 1.4:
            place.append(new)
    return np.array(place)


def made(atoms_A: np.ndarray, resolution_A: float) -> np.ndarray:
    ones = np.ones((len(atoms_A), 1))
    return lowpass(gaussian_density(atoms_A, 6 * ones, 12 * ones, BOX, PIXEL), PIXEL, resolution_A)


def naive_q(volume: np.ndarray, atoms_A: np.ndarray, m: int) -> float:
    """The paper's definition with its height and floor, one point after the other."""
    height, floor = volume.mean() + 10 * volume.std(), volume.mean() - volume.std()
    places, wanted = [atoms_A[m]] * 8, [height + floor] * 8
    for radius in np.arange(1, 21) * 0.1:
        for count in (8, 16, 32, 64, 128, 256, 512):
            points = atoms_A[m] + radius * resolvability.sphere_points(count)
            own = [p for p in points if np.delete(np.linalg.norm(atoms_A - p, axis=1), m).min() >= radius - 1e-12]
            if len(own) >= 8:
                break
        own = [own[k * len(own) // 8] for k in range(8)] if len(own) > 8 else own
        places += own
        wanted += [height * np.exp(-0.5 * (radius / 0.6) ** 2) + floor] * len(own)
    at = np.array(places).T[::-1] / PIXEL + BOX // 2
    values = ndimage.map_coordinates(volume.astype(float), at, order=3, mode="mirror")
    return float(np.corrcoef(values, wanted)[0, 1])


def test_q_scores_are_those_of_the_definition() -> None:
    atoms = chain()
    volume = made(atoms, 3.0) + 0.02 * rng(4).normal(size=(BOX,) * 3).astype(np.float32)
    found = resolvability.q_scores(volume, PIXEL, atoms)
    np.testing.assert_allclose(found, [naive_q(volume, atoms, m) for m in range(len(atoms))], atol=2e-5)
    # Neither grey scale nor an offset matters; a negative turns every sign.
    np.testing.assert_allclose(resolvability.q_scores(7 * volume + 3, PIXEL, atoms), found, atol=1e-4)
    np.testing.assert_allclose(resolvability.q_scores(-volume, PIXEL, atoms), -found, atol=1e-5)


def test_an_atom_like_the_gaussian_has_one_and_a_flat_map_none() -> None:
    axis = (np.arange(BOX) - BOX // 2) * 0.5
    squares = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
    volume = np.exp(-0.5 * squares / 0.36).astype(np.float32)
    assert resolvability.q_scores(volume, 0.5, np.zeros((1, 3)))[0] > 0.999
    assert np.isnan(resolvability.q_scores(np.ones_like(volume), 0.5, np.zeros((1, 3)))[0])


def test_q_falls_with_resolution() -> None:
    atoms = chain()
    means = [resolvability.q_scores(made(atoms, d), PIXEL, atoms).mean() for d in (2.2, 3.0, 4.0, 6.0, 9.0)]
    assert np.all(np.diff(means) < -0.02)


def test_edges_are_mirrored() -> None:
    volume = rng(5).normal(size=(8,) * 3).astype(np.float32)
    corner = np.full((1, 3), 3.0)
    places = [corner[0]] * 8
    wanted = [1.0] * 8
    for radius in np.arange(1, 21) * 0.1:
        places += list(corner[0] + radius * resolvability.sphere_points(8))
        wanted += [np.exp(-0.5 * (radius / 0.6) ** 2)] * 8
    values = ndimage.map_coordinates(volume.astype(float), np.array(places).T[::-1] + 4, order=3, mode="mirror")
    assert resolvability.q_scores(volume, 1.0, corner)[0] == pytest.approx(np.corrcoef(values, wanted)[0, 1], abs=1e-5)


def test_correlations_around_groups_are_numpys() -> None:
    first, second = (rng(seed).normal(size=(BOX,) * 3).astype(np.float32) for seed in (6, 7))
    second += first
    atoms, start = chain(), np.array([0, 5, 6, 20, 40])
    found = resolvability.group_correlations(first, second, PIXEL, atoms, start, 2.5)
    z, y, x = (np.indices((BOX,) * 3) - BOX // 2) * PIXEL
    grid = np.stack([x, y, z], axis=-1)
    for g in range(4):
        near = np.zeros((BOX,) * 3, bool)
        for atom in atoms[start[g] : start[g + 1]]:
            near |= np.linalg.norm(grid - atom, axis=-1) <= 2.5
        assert found[g] == pytest.approx(np.corrcoef(first[near], second[near])[0, 1], abs=1e-6)
    alone = resolvability.group_correlations(first, second, PIXEL, atoms, np.array([0, 1]), 0.5)
    assert np.isnan(alone[0])


def test_expected_scores() -> None:
    assert resolvability.expected_q(3.0) == pytest.approx(0.585)
    assert resolvability.expected_q(0.5) == 1.0
    assert resolvability.expected_q(7.0) is None
