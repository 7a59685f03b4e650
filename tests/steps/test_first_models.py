"""The steps of first models against their definitions."""

import numpy as np
import pytest

from dcryo.kernels import filters, fsc, masks, rings, rotations, slices, solve
from dcryo.kernels.alignment import Move, moved
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.phantom import phantom
from dcryo.kernels.randomness import generator
from dcryo.kernels.sampling import step_deg
from dcryo.kernels.symmetry import operators
from dcryo.steps import classification, first_models

BOX, PIXEL_A = 32, 6.0


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    atoms = phantom(operators("C1"), 55.0, 5)
    return gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, BOX, PIXEL_A).astype(np.float32)


def test_the_working_box_holds_the_resolution_and_the_grey_scale(volume: np.ndarray) -> None:
    assert first_models.working_box_px(256, 1.0, 16.0) >= 2 * (16 + 1)
    assert first_models.working_box_px(64, 3.0, 6.5) == 64
    # A projection of the map in the working box is the working image of its projection.
    small = 24
    projection = first_models.working_images(volume.sum(axis=0)[None], small)[0]
    of_map = filters.rescale_volume(volume, small).sum(axis=0)
    np.testing.assert_allclose(projection, of_map, atol=2e-3 * of_map.max())


def test_views_cover_the_sphere_once() -> None:
    turn = rotations.random_rotations(1, generator(1, "turn", 0))[0]
    every = first_models.views(2, turn, operators("C1"))
    assert len(every) == 192
    assert np.linalg.norm(every[:, 2].mean(axis=0)) < 1e-6
    some = first_models.views(2, turn, operators("D2"))
    # Mates of the views of the asymmetric unit come near to every direction.
    mates = np.einsum("nj,gjk->gnk", some[:, 2], operators("D2")).reshape(-1, 3)
    assert len(some) < 100 and (every[:, 2] @ mates.T).max(axis=1).min() > np.cos(np.deg2rad(0.75 * step_deg(2)))


def test_classes_are_projections(volume: np.ndarray) -> None:
    of = rings.rings(BOX, 8, 24.0)
    turns = rotations.random_rotations(5, generator(2, "turns", 0))
    classes = first_models.compared(
        np.stack([volume, 2 * volume]), np.array([0.25, 0.75]), turns, np.zeros((1, 2)), 8, of, 1.0
    )
    assert classes.series.shape[-1] == 10
    np.testing.assert_allclose(np.exp(classes.log_share), np.repeat([0.05, 0.15], 5), rtol=1e-5)
    whole = rings.samples(np.swapaxes(classes.series.conj(), 1, 2), of)
    np.testing.assert_allclose(whole[:, 5:], 2 * whole[:, :5], rtol=1e-5, atol=1e-4 * np.abs(whole).max())
    # The same as a class image: the map turned in real space and summed along z.
    turned = moved(volume, Move(turns[0], np.zeros(3), False)).sum(axis=0)
    image = rings.sample(turned[None], of)[:, 0]
    assert np.abs(whole[:, 0] - image).max() < 0.03 * np.abs(image).max()


def test_images_without_noise_give_their_map_back(volume: np.ndarray) -> None:
    """Expectation with the true map and maximisation of what it gives: the true map."""
    mask = masks.sphere(BOX, 22.0, 4.0)
    truth = filters.lowpass(mask * volume, PIXEL_A, 24.0)
    of = rings.rings(BOX, 11, 26.0)
    turn = rotations.random_rotations(1, generator(3, "turn", 0))[0]
    views = first_models.views(2, turn, np.eye(3)[None])
    poses = rotations.random_rotations(300, generator(4, "poses", 0))
    projected = slices.extract(slices.prepare(truth, 11), poses, rings.ring_samples(of), BOX)
    images = rings.images_of(np.swapaxes(projected.reshape(-1, *of.kx.shape), 0, 1), of)
    classes = first_models.compared(truth[None], np.ones(1), views, np.zeros((1, 2)), 8, of, 1.0)
    sums = []
    for half in (0, 1):
        own = images[half::2]
        weak = np.full((len(own), 12), 1 / np.mean(np.abs(rings.sample(own, of)) ** 2) * 50, dtype=np.float32)
        batch = classification.Images(
            own, np.ones((of.angles // 2, len(own), 12), np.float32), weak, np.zeros((len(own), 2))
        )
        of_half = classification.empty_sums(of, len(views), 1)
        classification.fold(of_half, batch, np.zeros(len(own), int), classes)
        sums.append(first_models.back_projected(of_half, views, of, 11))
    model = first_models.improved(np.stack(sums)[:, 0], mask, np.eye(3)[None], 11)
    agreement = fsc.shell_correlation(model.volume, truth)
    # Views are 15 degrees apart, so that only the lowest shells can be right to the last.
    assert agreement[1:6].min() > 0.97
    assert model.fsc[1:6].min() > 0.9


def test_the_sums_of_a_view_are_a_slice(volume: np.ndarray) -> None:
    """Back-projected, sums of one image at the angle zero are that image's slice and its weights."""
    of = rings.rings(BOX, 8, 24.0)
    turns = rotations.random_rotations(2, generator(5, "turns", 0))
    samples = rings.ring_samples(of)
    values = slices.extract(slices.prepare(volume, 8), turns, samples, BOX)
    sampled = np.swapaxes(values.reshape(2, *of.kx.shape), 0, 1)
    weights = np.full(sampled.shape, 3.0, dtype=np.float32)
    sums = classification.empty_sums(of, 2, 1)
    sums.numerator[:] = np.swapaxes(rings.series(np.ascontiguousarray(sampled), of, of.orders), 0, 0)
    sums.denominator[:] = rings.real_series(weights, of, of.orders)
    found = first_models.back_projected(sums, turns, of, 9)[0]
    expected = np.zeros((*slices.volume_shape(9, BOX), 3), dtype=np.float32)
    area = np.tile(of.area, of.angles // 2)
    slices.insert(expected, turns, (values * area).astype(np.complex64), np.tile(3 * area, (2, 1)), samples, BOX)
    # The series keeps the orders that a particle of this diameter has.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_first_model_is_as_large_as_the_molecule_and_far_from_round(volume: np.ndarray) -> None:
    of = rings.rings(BOX, 8, 24.0)
    mask = masks.sphere(BOX, 22.0, 4.0)
    random = generator(6, "first", 0)
    poses = rotations.random_rotations(10, random)
    projected = slices.extract(slices.prepare(volume, 8), poses, rings.ring_samples(of), BOX)
    images = rings.images_of(np.swapaxes(projected.reshape(-1, *of.kx.shape), 0, 1), of)
    noise = np.full((10, 9), 1e-2 * np.mean(np.abs(rings.sample(images, of)) ** 2))
    ones = np.ones((of.angles // 2, 10, 9), np.float32)
    model = first_models.random_model(images, ones, noise, rotations.random_rotations(10, random), mask, of, 6)
    assert np.isfinite(model).all()
    assert np.abs(model[mask == 0]).max() == 0
    assert fsc.shell_correlation(model, volume)[1] > 0.5
    round_part = first_models.rounded(model)
    assert np.std(model - round_part) > 0.2 * np.std(model)
    np.testing.assert_allclose(first_models.rounded(round_part), round_part, atol=0.05 * np.abs(round_part).max())


def test_models_of_starts_find_their_mates(volume: np.ndarray) -> None:
    atoms = phantom(operators("C1"), 50.0, 11)
    other = gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, BOX, PIXEL_A).astype(np.float32)
    onto = np.stack([filters.lowpass(one, PIXEL_A, 20.0) for one in (volume, other)])
    turns = rotations.random_rotations(2, generator(7, "turns", 0))
    models = np.stack([
        moved(onto[1], Move(turns[0], np.array([1.0, -1.5, 0.5]), True)),
        moved(onto[0], Move(turns[1], np.array([0.0, 1.0, -1.0]), False)),
    ])  # fmt: skip
    found = first_models.matched(models, onto, 7)
    assert [match.number for match in found] == [1, 0]
    assert all(match.fsc[1:8].min() > 0.95 for match in found)
    # What they have in common is what they were made of.
    mask = masks.sphere(BOX, 28.0, 3.0)
    common, agreement = first_models.common_model(0, onto, models[None], [found], np.eye(3)[None], mask, 7)
    assert agreement == 1
    assert fsc.shell_correlation(common, first_models.centred(onto[0]) * mask)[1:8].min() > 0.95


def test_a_model_is_turned_into_the_setting_of_its_point_group() -> None:
    group = operators("D2")
    atoms = phantom(group, 60.0, 2)
    truth = gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, BOX, PIXEL_A).astype(np.float32)
    turn = rotations.random_rotations(1, generator(8, "turn", 0))[0]
    turned = filters.lowpass(moved(truth, Move(turn, np.array([0.7, -0.4, 1.0]), False)), PIXEL_A, 20.0)
    mask = masks.sphere(BOX, 28.0, 3.0)
    common, agreement = first_models.common_model(0, turned[None], np.zeros((0, 1, *turned.shape)), [], group, mask, 8)
    assert agreement > 0.9
    for operator in group[1:]:
        mate = moved(common, Move(operator, np.zeros(3), False))
        assert fsc.shell_correlation(common, mate)[1:8].min() > 0.98


def test_the_largest_group_of_starts_wins() -> None:
    shells = np.array([[9, 8, 1, 2], [8, 9, 2, 7], [1, 2, 9, 1], [2, 7, 1, 9]])
    assert first_models.agreeing(shells, 6).tolist() == [1, 0, 3]
    assert first_models.agreeing(shells, 10).tolist() == [0]


def test_the_prior_comes_from_the_halves() -> None:
    """Halves that do not agree make a model that is empty where they do not."""
    random = generator(9, "noise", 0)
    shape = (2, *slices.volume_shape(8, BOX), 3)
    halves = np.abs(random.normal(size=shape)).astype(np.float32)
    halves[..., :2] = random.normal(size=(*shape[:-1], 2))
    model = first_models.improved(halves, masks.sphere(BOX, 26.0, 3.0), np.eye(3)[None], 8)
    plain = solve.maximise(
        solve.complete(halves[0] + halves[1], np.eye(3)[None]), None, np.full(9, 1e-3), np.eye(3)[None], BOX
    )
    assert np.std(model.volume) < 0.3 * np.std(plain)
