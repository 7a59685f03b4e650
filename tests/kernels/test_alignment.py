import naive
import numpy as np
import pytest

from dcryo.data.model import read_model
from dcryo.errors import InputError
from dcryo.kernels import fsc
from dcryo.kernels.alignment import Move, align, moved, moved_poses
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.filters import lowpass
from dcryo.kernels.phantom import phantom
from dcryo.kernels.randomness import generator
from dcryo.kernels.rotations import angle_between_deg, angular_distance_deg, random_rotations
from dcryo.kernels.shells import half_plane
from dcryo.kernels.symmetry import operators

BOX, PIXEL = 48, 5.0
SHELL = int(BOX * PIXEL / 20)


def density(position_A, turn=None, shift_px=(0, 0, 0), box=BOX):
    """Map of atoms, all alike, at 20 A and better, after a move."""
    place = np.asarray(position_A) @ (np.eye(3) if turn is None else turn).T + np.asarray(shift_px) * PIXEL
    ones = np.ones((len(place), 1))
    return gaussian_density(place, ones, 300 * ones, box, PIXEL)


def noisy(volume, resolution_A, random):
    """With so much white noise that the FSC with the volume is a half at a resolution."""
    power = 3 * fsc.shell_power(volume)[round(len(volume) * PIXEL / resolution_A)]
    return volume + (random.standard_normal(volume.shape) * np.sqrt(power / volume.size)).astype(np.float32)


def atoms_of(symmetry, radius_A=70, seed=1):
    return phantom(operators(symmetry), radius_A, seed).position_A[::4]


def agreement(found, truth, shell=SHELL):
    """Correlation of two maps over all voxels up to a shell, shells whitened."""
    curve = fsc.shell_correlation(found, truth)[1 : shell + 1]
    return np.average(curve, weights=np.arange(1, shell + 1) ** 2)


def random_move(random, mirrored):
    direction = random.standard_normal(3)
    shift = direction / np.linalg.norm(direction) * 0.15 * BOX * random.random()
    return Move(random_rotations(1, random)[0], shift, mirrored)


@pytest.mark.parametrize(("symmetry", "mirrored"), [("C1", False), ("C1", True), ("D2", True), ("O", False)])
def test_a_known_move_is_found(symmetry, mirrored):
    atoms, random = atoms_of(symmetry), generator(1, symmetry, mirrored)
    move = random_move(random, mirrored)
    first, second = density(atoms), density(atoms, move.turn, move.shift_px)
    found = align(first, second, SHELL, hands=True)
    assert found.mirrored == mirrored
    # Every fourth atom of a symmetric phantom: only nearly symmetric, so that there is one best answer.
    assert angular_distance_deg(found.rotation, move.rotation, operators(symmetry)) < 0.3
    np.testing.assert_allclose(found.shift_px, move.shift_px, atol=0.1)
    assert found.correlation > 0.999 and agreement(moved(first, found), second) > 0.999


@pytest.mark.parametrize("case", range(2))
def test_a_move_is_found_in_noise(case):
    """Both maps have an FSC of a half with the truth at 25 A, and are compared to 20 A."""
    atoms, random = atoms_of("C1", seed=case), generator(2, "noise", case)
    move = random_move(random, mirrored=case % 2 == 1)
    first, second = density(atoms), density(atoms, move.turn, move.shift_px)
    found = align(noisy(first, 25, random), noisy(second, 25, random), SHELL, hands=True)
    assert found.mirrored == move.mirrored
    assert angle_between_deg(found.rotation, move.rotation) < 4
    assert agreement(moved(first, found), second) > 0.95
    assert 0.3 < found.correlation < 0.9


@pytest.mark.parametrize(
    ("name", "assembly"),
    [
        ("5a1a.pdb", None),
        pytest.param("7a4m.cif", "1", marks=pytest.mark.slow),
        pytest.param("3j5p.pdb", None, marks=pytest.mark.slow),
        pytest.param("2dhb.pdb", None, marks=pytest.mark.slow),
    ],
)
def test_real_molecules_in_noise(shared_data, name, assembly):
    atoms = read_model(shared_data / "models" / name, assembly).position_A[::6]
    random = generator(3, name, 0)
    move = random_move(random, mirrored=True)
    first, second = density(atoms), density(atoms, move.turn, move.shift_px)
    found = align(noisy(first, 20, random), noisy(second, 20, random), SHELL, hands=True)
    assert found.mirrored
    assert agreement(moved(first, found), second) > 0.97


def test_an_elongated_molecule():
    atoms = atoms_of("C1", seed=6) * np.array([0.4, 0.4, 1.3])
    move = random_move(generator(4, "rod", 0), mirrored=False)
    found = align(density(atoms), density(atoms, move.turn, move.shift_px), SHELL, hands=True)
    assert not found.mirrored and angle_between_deg(found.rotation, move.rotation) < 0.3


def test_without_hands_the_map_is_not_mirrored():
    atoms = atoms_of("C1")
    found = align(density(atoms), density(-atoms), SHELL, hands=False)
    assert not found.mirrored and found.correlation < 0.8


def test_grey_values_and_background_do_not_matter():
    atoms, move = atoms_of("C1"), random_move(generator(5, "grey", 0), mirrored=False)
    found = align(density(atoms), 40 * density(atoms, move.turn, move.shift_px) + 7, SHELL, hands=False)
    assert angle_between_deg(found.rotation, move.rotation) < 0.3


def test_shells_beyond_the_box_are_left_out():
    atoms, move = atoms_of("C1", radius_A=40), random_move(generator(6, "small", 0), mirrored=False)
    first, second = (density(atoms, *how, box=25) for how in ((None,), (move.turn, move.shift_px / 2)))
    found = align(first, second, 1000, hands=False)
    assert angle_between_deg(found.rotation, move.rotation) < 0.3
    np.testing.assert_allclose(found.shift_px, move.shift_px / 2, atol=0.1)


def test_the_best_move_is_as_good_as_the_truth_or_better():
    """In noise the truth is not the best; what is found must not be worse, or the search has stopped short."""
    random = generator(7, "best", 0)
    atoms, move = atoms_of("D2"), random_move(random, mirrored=False)
    first, second = noisy(density(atoms), 30, random), noisy(density(atoms, move.turn, move.shift_px), 30, random)

    def information(how):
        curve = fsc.shell_correlation(moved(first, how), second)[1 : SHELL + 1]
        return -np.sum(np.arange(1, SHELL + 1) ** 2 * np.log(1 - curve**2) * np.sign(curve))

    assert information(align(first, second, SHELL, hands=False)) > 0.99 * information(move)


def test_the_same_maps_give_the_same_bits():
    atoms = atoms_of("C1")
    first, second = density(atoms), density(atoms, random_rotations(1, generator(8, "bits", 0))[0])
    one, other = (align(first, second, 5, hands=False) for _ in range(2))
    assert one.rotation.tobytes() == other.rotation.tobytes() and one.shift_px.tobytes() == other.shift_px.tobytes()


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (np.zeros((16,) * 3), np.ones((18,) * 3), "two equal cubes"),
        (np.zeros((16, 16, 18)), np.zeros((16, 16, 18)), "two equal cubes"),
        (np.zeros((16,) * 3), np.random.default_rng(0).random((16,) * 3), "constant"),
        (np.random.default_rng(0).random((16,) * 3), np.full((16,) * 3, np.nan), "not finite"),
    ],
)
def test_what_cannot_be_aligned_is_refused(first, second, words):
    with pytest.raises(InputError, match=words):
        align(first, second, 5, hands=True)


def blobs(box, radius):
    random = generator(9, "blobs", box)
    place = random.standard_normal((12, 3))
    return place / np.linalg.norm(place, axis=1, keepdims=True) * radius * random.random((12, 1)), random.random(12)


@pytest.mark.parametrize("box", [24, 25])
@pytest.mark.parametrize("mirrored", [False, True])
def test_moved_is_the_map_of_the_moved_molecule(box, mirrored):
    place, weight = blobs(box, box / 4)
    move = Move(random_rotations(1, generator(10, "moved", box))[0], np.array([1.3, -2.2, 0.6]), mirrored)
    found = moved(naive.blob_volume(place, weight, 1.5, box), move)
    expected = naive.blob_volume(place @ move.turn.T + move.shift_px, weight, 1.5, box)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=3e-3 * expected.max())
    assert found.sum() == pytest.approx(weight.sum(), rel=1e-3)


def test_what_is_moved_out_of_the_box_does_not_come_back():
    box = 24
    place, weight = np.array([[8.0, 0, 0], [-6, 3, 0]]), np.array([1.0, 1])
    move = Move(np.eye(3), np.array([9.0, 0, 0]), False)
    found = moved(naive.blob_volume(place, weight, 1.5, box), move)
    expected = naive.blob_volume(place[1:] + move.shift_px, weight[1:], 1.5, box)
    np.testing.assert_allclose(found, expected, atol=0.01 * expected.max())


def test_what_comes_from_outside_of_the_box_is_zero():
    volume = np.ones((20, 20, 20), dtype=np.float32)
    found = moved(volume, Move(np.eye(3), np.array([0, 6.0, 0]), False))
    assert np.all(found[:, :6] == 0)
    np.testing.assert_allclose(found[5:15, 9:18, 5:15], 1, atol=0.1)


@pytest.mark.parametrize("mirrored", [False, True])
def test_poses_follow_the_map(mirrored):
    """Images do not change when the map is replaced by the moved one and its poses with it."""
    box, pixels = 24, half_plane(8)
    place, weight = blobs(box, 6)
    random = generator(11, "poses", mirrored)
    move = Move(random_rotations(1, random)[0], random.uniform(-2, 2, 3), mirrored)
    rotations, origins = random_rotations(5, random), random.uniform(-2, 2, (5, 2))
    new_rotations, new_origins = moved_poses(rotations, origins, move)
    np.testing.assert_allclose(np.linalg.det(new_rotations), 1)
    there = place @ move.turn.T + move.shift_px
    for before, after in zip(
        zip(rotations, origins, strict=True), zip(new_rotations, new_origins, strict=True), strict=True
    ):
        image = naive.blob_slice(place, weight, 1.2, *before, pixels, box)
        np.testing.assert_allclose(naive.blob_slice(there, weight, 1.2, *after, pixels, box), image, atol=1e-9)


def test_shells_that_a_filter_has_emptied_do_not_mislead():
    """One map ends at 35 A, and the maps are compared to 20 A all the same."""
    atoms, move = atoms_of("C1"), random_move(generator(12, "filtered", 0), mirrored=True)
    first, second = lowpass(density(atoms), PIXEL, 35), density(atoms, move.turn, move.shift_px)
    found = align(first, second, SHELL, hands=True)
    assert found.mirrored and angle_between_deg(found.rotation, move.rotation) < 0.3
