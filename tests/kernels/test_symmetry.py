import re
import shutil
import subprocess

import numpy as np
import pytest

from dcryo.errors import InputError
from dcryo.euler import rotvec_from_matrix
from dcryo.kernels.rotations import random_rotations
from dcryo.kernels.symmetry import asymmetric_unit, operators, symmetry_broken

ORDERS = {"C1": 1, "C2": 2, "C4": 4, "C13": 13, "D1": 2, "D2": 4, "D7": 14, "T": 12, "O": 24} | {
    f"I{setting}": 60 for setting in (1, 2, 3, 4)
}

# Axes that settle each setting, (direction, fold), read off relion_refine --print_symmetry_ops (3.1.3).
AXES = {
    "C4": [((0, 0, 1), 4)],
    "D2": [((0, 0, 1), 2), ((1, 0, 0), 2), ((0, 1, 0), 2)],
    "D7": [((0, 0, 1), 7), ((1, 0, 0), 2)],
    "T": [((0, 0, 1), 3), ((0, -0.9428, 0.3333), 3), ((0, 0.8165, 0.5774), 2)],
    "O": [((1, 0, 0), 4), ((0, 1, 0), 4), ((0, 0, 1), 4), ((0.5774, 0.5774, 0.5774), 3)],
    "I1": [((1, 0, 0), 2), ((0, 1, 0), 2), ((0, 0.5257, 0.8507), 5), ((0.3568, 0, 0.9342), 3)],
    "I2": [((1, 0, 0), 2), ((0, 1, 0), 2), ((0.5257, 0, 0.8507), 5), ((0, 0.3568, 0.9342), 3)],
    "I3": [((0, 0, 1), 5), ((-0.8944, 0, 0.4472), 5), ((0, 1, 0), 2), ((0.6071, 0, 0.7947), 3)],
    "I4": [((0, 0, 1), 5), ((0.8944, 0, 0.4472), 5), ((0, 1, 0), 2), ((-0.6071, 0, 0.7947), 3)],
}


def distances(group: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Largest difference of entries of each matrix (G, 3, 3) from each of the others (H, 3, 3), (G, H)."""
    return np.abs(group[:, None] - others[None]).max(axis=(2, 3))


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_is_a_group_of_rotations(name, order):
    group = operators(name)
    assert group.shape == (order, 3, 3)
    assert group.dtype == np.float64
    assert np.array_equal(group[0], np.eye(3))
    identities = np.broadcast_to(np.eye(3), group.shape)
    np.testing.assert_allclose(group @ group.transpose(0, 2, 1), identities, atol=4e-15)
    np.testing.assert_allclose(np.linalg.det(group), 1)
    assert np.all(distances(group, group) + 9 * np.eye(order) > 0.1)
    for element in group:
        nearest = distances(element @ group, group).min(axis=1)
        assert nearest.max() < 1e-14


@pytest.mark.parametrize("name", ORDERS)
def test_order_is_fixed_and_case_does_not_matter(name):
    assert np.array_equal(operators(name), operators(name.lower()))
    assert not np.any(np.signbit(operators(name)) & (operators(name) == 0))


@pytest.mark.parametrize("name", ["C4", "D2", "O"])
def test_turns_onto_the_axes_are_exact(name):
    assert set(np.unique(operators(name))) == {-1, 0, 1}


@pytest.mark.parametrize(("name", "direction", "fold"), [(name, *axis) for name in AXES for axis in AXES[name]])
def test_axes_are_relions(name, direction, fold):
    vectors = rotvec_from_matrix(operators(name)) / (2 * np.pi / fold)
    either = np.minimum(
        np.linalg.norm(vectors - direction, axis=1), np.linalg.norm(vectors + np.array(direction), axis=1)
    )
    assert either.min() < 1e-4


@pytest.mark.skipif(shutil.which("relion_refine") is None, reason="relion_refine is not installed")
@pytest.mark.parametrize("name", ["C1", "C4", "C7", "D2", "D7", "T", "O", "I1", "I2", "I3", "I4"])
def test_operators_are_relions(name):
    command = ["relion_refine", "--sym", name, "--print_symmetry_ops"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    number = r"\s*([-+.\deE]+)"
    rows = re.findall(r"R\(\d+\)=" + number * 9, done.stdout + done.stderr)
    theirs = np.array(rows, dtype=float).reshape(-1, 3, 3)
    ours = operators(name)
    assert len(theirs) == len(ours)
    difference = distances(ours, theirs)
    assert difference.min(axis=0).max() < 1e-5
    assert difference.min(axis=1).max() < 1e-5


@pytest.mark.parametrize("name", ["", "C0", "C", "D0", "c-1", "C100", "I", "I5", "TH", "C4 D2", "C\u0662"])
def test_other_names_are_refused_with_what_is_accepted(name):
    with pytest.raises(InputError, match=r"expected C1 to C99, D1 to D99, T, O, I1, I2, I3 or I4") as refusal:
        operators(name)
    assert repr(name) in str(refusal.value)


@pytest.mark.parametrize("name", ORDERS)
def test_asymmetric_unit_holds_one_of_each_set_of_equal_directions(name):
    group = operators(name)
    directions = random_rotations(2000, np.random.default_rng(4))[:, 2]
    copies = np.einsum("gij,nj->ngi", group, directions)
    kept = asymmetric_unit(copies.reshape(-1, 3), group).reshape(len(directions), len(group))
    assert np.all(kept.sum(axis=1) == 1)
    share = asymmetric_unit(directions, group).mean() * len(group)
    assert share == pytest.approx(1, abs=5 * np.sqrt(len(group) / 2000))


@pytest.mark.parametrize("name", ["C4", "D7", "T", "O", "I1", "I3"])
def test_asymmetric_unit_keeps_an_axis(name):
    """A direction on an axis stays, for one of its images at least, whatever rounding does to it."""
    group = operators(name)
    for element in group[1:]:
        axis = rotvec_from_matrix(element)
        images = group @ (axis / np.linalg.norm(axis))
        assert asymmetric_unit(images, group).any()


@pytest.mark.parametrize("name", ["C4", "D2", "D3", "O"])
def test_a_broken_map_has_subunits_of_as_many_strengths_as_there_are(name):
    group = operators(name)
    box, direction = 32, np.array([0.8, 0.4, 0.45])
    axis = np.arange(box) - box // 2
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")[::-1]
    place = np.stack([x, y, z], axis=-1)

    def ball(centre):
        return np.exp(-np.sum((place - centre) ** 2, axis=-1) / 3)

    whole = sum(ball(11 * g @ direction) for g in group).astype(np.float32)
    broken = symmetry_broken(whole, group, 0.2)
    assert broken.dtype == np.float32 and np.all((broken >= 0.8 * whole - 1e-6) & (broken <= 1.2 * whole + 1e-6))
    strength = np.array(
        [np.sum(broken * ball(11 * g @ direction)) / np.sum(whole * ball(11 * g @ direction)) for g in group]
    )
    # Each other than its neighbours: one is the weakest, one the strongest.
    assert strength.max() - strength.min() > 0.15 and np.diff(np.sort(strength))[[0, -1]].min() > 0.005
    on_axis = ball([0, 0, 0])
    assert np.sum(broken * on_axis) == pytest.approx(np.sum(whole * on_axis), rel=0.02)
