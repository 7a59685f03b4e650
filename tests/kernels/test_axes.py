import naive
import numpy as np
import pytest

from dcryo.data.model import read_model
from dcryo.errors import InputError
from dcryo.kernels import fsc
from dcryo.kernels.alignment import moved
from dcryo.kernels.axes import PLAUSIBLE_GROUPS, symmetrised, symmetry_axes, symmetry_table
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.phantom import phantom
from dcryo.kernels.randomness import generator
from dcryo.kernels.rotations import angle_between_deg, random_rotations
from dcryo.kernels.symmetry import operators

BOX, PIXEL = 48, 5.0
RADIUS_A = {"I1": 90}


def density(position_A, box=BOX):
    """Map of atoms, all alike, at 20 A and better."""
    ones = np.ones((len(position_A), 1))
    return gaussian_density(position_A, ones, 300 * ones, box, PIXEL)


def turned_map(position_A, random, box=BOX):
    """A map in an orientation that is not that of its group, off-centre; the turn R that takes it back, its centre."""
    turn, centre = random_rotations(1, random)[0], random.uniform(-3, 3, 3)
    return density(position_A @ turn + centre * PIXEL, box), turn, centre


def noisy(volume, resolution_A, random):
    """With so much white noise that the FSC with the volume is a half at a resolution."""
    power = 3 * fsc.shell_power(volume)[round(len(volume) * PIXEL / resolution_A)]
    return volume + (random.standard_normal(volume.shape) * np.sqrt(power / volume.size)).astype(np.float32)


def off_axes_deg(rotation, true, group):
    """How far the worst operator, in the map's frame, is from its nearest true one: settings that are equal do not
    count as off."""
    found, expected = (np.swapaxes(r, 0, 1) @ group @ r for r in (rotation, true))
    return angle_between_deg(found[:, None], expected[None]).min(axis=1).max()


def off_centre_px(axes, true, centre, group):
    """Distance from the true centre or, in Cn, from the true axis."""
    off = -axes.rotation.T @ axes.shift_px - centre
    return np.linalg.norm(off - true.T @ group.mean(axis=0) @ true @ off)


@pytest.mark.parametrize(
    "symmetry",
    ["C4", "D2", "D7", "O", "I1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("C2", "C7", "T"))],
)
def test_axes_are_found(symmetry):
    group, random = operators(symmetry), generator(1, symmetry, 0)
    volume, turn, centre = turned_map(phantom(group, RADIUS_A.get(symmetry, 70), 3).position_A, random)
    axes = symmetry_axes(volume, group, int(BOX * PIXEL / 25))
    assert off_axes_deg(axes.rotation, turn, group) < 0.3
    assert off_centre_px(axes, turn, centre, group) < 0.1
    assert axes.agreement > 0.99
    there = moved(volume, axes)
    curve = fsc.shell_correlation(there, symmetrised(there, group))
    assert curve[1 : int(BOX * PIXEL / 25)].min() > 0.99


@pytest.mark.parametrize(
    "symmetry", ["C4", "D2", "O", *(pytest.param(name, marks=pytest.mark.slow) for name in ("D7", "I1"))]
)
def test_axes_are_found_in_noise(symmetry):
    """The map has an FSC of a half with the truth at 25 A."""
    group, random = operators(symmetry), generator(2, symmetry, 0)
    volume, turn, centre = turned_map(phantom(group, RADIUS_A.get(symmetry, 70), 3).position_A, random)
    axes = symmetry_axes(noisy(volume, 25, random), group, int(BOX * PIXEL / 25))
    assert off_axes_deg(axes.rotation, turn, group) < 4
    assert off_centre_px(axes, turn, centre, group) < 0.4
    assert 0.2 < axes.agreement < 0.9


@pytest.mark.parametrize(
    ("name", "assembly", "symmetry"),
    [
        ("5a1a.pdb", None, "D2"),
        pytest.param("7a4m.cif", "1", "O", marks=pytest.mark.slow),
        pytest.param("3j5p.pdb", None, "C4", marks=pytest.mark.slow),
    ],
)
def test_axes_of_real_molecules_in_noise(shared_data, name, assembly, symmetry):
    group, random = operators(symmetry), generator(3, name, 0)
    atoms = read_model(shared_data / "models" / name, assembly).position_A
    volume, _, _ = turned_map(atoms[::3], random)
    axes = symmetry_axes(noisy(volume, 25, random), group, int(BOX * PIXEL / 25))
    there = moved(volume, axes)
    # Whatever the setting of the file is: without the noise, the map obeys the group where it was found with it.
    curve = fsc.shell_correlation(there, symmetrised(there, group))[1 : int(BOX * PIXEL / 25)]
    assert np.average(curve, weights=np.arange(1, len(curve) + 1) ** 2) > 0.93
    wrong = symmetry_axes(noisy(volume, 25, random), operators("C5"), int(BOX * PIXEL / 25))
    assert wrong.agreement < 0.6 * axes.agreement


def test_the_table_tells_the_groups_that_a_map_has():
    random = generator(4, "table", 0)
    volume, _, _ = turned_map(phantom(operators("D3"), 70, 3).position_A, random)
    groups = ("C2", "C3", "C4", "C6", "D2", "D3", "D6", "T")
    assert set(groups) < set(PLAUSIBLE_GROUPS)
    agreement = {name: axes.agreement for name, axes in symmetry_table(noisy(volume, 20, random), 8, groups).items()}
    assert tuple(agreement) == groups
    has = {"C2", "C3", "D3"}
    assert min(agreement[name] for name in has) > max(agreement[name] for name in set(agreement) - has) + 0.1


def test_a_map_without_symmetry_obeys_no_group():
    volume, _, _ = turned_map(phantom(operators("C1"), 70, 3).position_A, generator(5, "none", 0))
    for symmetry in ("C3", "D2"):
        assert symmetry_axes(volume, operators(symmetry), 9).agreement < 0.6


def test_along_the_axis_of_a_cyclic_group_the_map_stays():
    group, random = operators("C4"), generator(6, "stay", 0)
    volume, turn, _ = turned_map(phantom(group, 70, 3).position_A, random)
    axes = symmetry_axes(volume, group, 8)
    assert abs(axes.shift_px[2]) < 0.5
    # The turn is the smallest that takes the axis to z.
    direction = turn[2] * np.sign(axes.rotation[2] @ turn[2])
    assert angle_between_deg(axes.rotation, np.eye(3)) == pytest.approx(np.rad2deg(np.arccos(direction[2])), abs=2)


def test_symmetrised_is_the_mean_over_the_group():
    """Blobs without symmetry, averaged, against a map of all their copies."""
    group = operators("D3")
    atoms, ones = generator(7, "atoms", 0).uniform(-5, 5, (20, 3)), np.ones(20)
    copies = np.concatenate([atoms @ operator.T for operator in group])
    found = symmetrised(naive.blob_volume(atoms, ones, 1.5, 28), group)
    expected = naive.blob_volume(copies, np.ones(len(copies)), 1.5, 28) / len(group)
    np.testing.assert_allclose(found, expected, atol=5e-3 * expected.max())


def test_symmetrised_is_zero_where_an_operator_leaves_the_box():
    volume = naive.blob_volume([(0, 0, 0), (-11, -11, 0)], [1, 1], 1.5, 24)
    found = symmetrised(volume, operators("C8"))
    assert found[12, 2, 2] == 0
    np.testing.assert_allclose(found, naive.blob_volume([(0, 0, 0)], [1], 1.5, 24), atol=0.02 * volume.max())


def test_what_has_no_axes_is_refused():
    volume = density(phantom(operators("C1"), 40).position_A, 24)
    with pytest.raises(InputError, match="C1"):
        symmetry_axes(volume, operators("C1"), 5)
    with pytest.raises(InputError, match="constant"):
        symmetry_axes(np.zeros((16, 16, 16)), operators("C2"), 5)
    with pytest.raises(InputError, match="cube"):
        symmetry_axes(volume[1:], operators("C2"), 5)
