import gemmi
import numpy as np
import pytest
from scipy.spatial import cKDTree

from dcryo.data.model import read_model
from dcryo.errors import InputError
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.filters import lowpass

PDB = """\
CRYST1   50.000   60.000   70.000  90.00  90.00  90.00 P 1           1
ATOM      1  N   GLY A   1      11.104   6.134  -6.504  1.00 10.00           N
ATOM      2  CA  GLY A   1      11.639   6.071  -5.147  1.00 12.00           C
ATOM      3  C   GLY A   1      13.559  16.086  -5.196  0.50 14.00           C
ATOM      4  O   GLY A   1      13.000   6.500   4.500  0.00 14.00           O
HETATM    5  O   HOH A   2      20.000  20.000  20.000  1.00 14.00           O
END
"""


def test_atoms_are_centred_weighted_by_occupancy_and_without_waters(tmp_path):
    path = tmp_path / "small.pdb"
    path.write_text(PDB)
    model = read_model(path)
    assert len(model.position_A) == 3  # no water, nothing of zero occupancy
    mass = np.array([14.007, 12.011, 0.5 * 12.011])
    position = model.position_A + model.centre_A
    np.testing.assert_allclose(position[0], [11.104, 6.134, -6.504], atol=1e-6)
    np.testing.assert_allclose(mass @ model.position_A, 0.0, atol=1e-3)
    # Mott-Bethe: a carbon atom scatters 2.51 A forward, a nitrogen 2.21 A (International Tables C, 4.3.2.2).
    np.testing.assert_allclose(model.amplitude.sum(axis=1), [2.2110, 2.5088, 2.5088 / 2], atol=5e-3)
    carbon = gemmi.Element("C").c4322
    np.testing.assert_allclose(model.bfactor_A2[1], np.array(carbon.b) + 12.0)
    assert model.radius_A == pytest.approx(np.linalg.norm(model.position_A, axis=1).max())


def test_density_agrees_with_gemmis_calculator(shared_data):
    path = shared_data / "models" / "2dhb.pdb"
    box, pixel, extra = 48, 1.6, 120.0
    model = read_model(path)
    ours = gaussian_density(model.position_A, model.amplitude, model.bfactor_A2 + extra, box, pixel)

    structure = gemmi.read_structure(str(path))
    structure.remove_waters()
    for site in structure[0].all():
        moved = np.array(site.atom.pos.tolist()) - model.centre_A + box // 2 * pixel
        site.atom.pos = gemmi.Position(*moved)
        site.atom.b_iso += extra
    calculator = gemmi.DensityCalculatorE()
    calculator.grid.unit_cell = gemmi.UnitCell(*[box * pixel] * 3, 90, 90, 90)
    calculator.grid.spacegroup = gemmi.SpaceGroup("P1")
    calculator.grid.set_size(box, box, box)
    calculator.add_model_density_to_grid(structure[0])
    theirs = np.array(calculator.grid.array).transpose(2, 1, 0)

    a, b = lowpass(ours, pixel, 4.0), lowpass(theirs.astype(np.float32), pixel, 4.0)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9999
    np.testing.assert_allclose(a, b, atol=0.01 * a.max())


@pytest.mark.parametrize(
    ("name", "copies", "diagonal"),
    [("2dhb.pdb", 2, (-1, 1, -1)), ("7a4m.cif", 24, (-1, -1, 1))],
)
def test_assembly_has_its_symmetry(shared_data, name, copies, diagonal):
    path = shared_data / "models" / name
    unit, whole = read_model(path), read_model(path, "1")
    assert len(whole.position_A) == copies * len(unit.position_A)
    distances, _ = cKDTree(whole.position_A).query(whole.position_A * diagonal)
    assert distances.max() < 0.02
    np.testing.assert_allclose(whole.amplitude.sum(), copies * unit.amplitude.sum())


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.pdb: no such file"):
        read_model(tmp_path / "absent.pdb")
    empty = tmp_path / "empty.pdb"
    empty.write_text("REMARK nothing\n")
    with pytest.raises(InputError, match=r"empty\.pdb"):
        read_model(empty)
    broken = tmp_path / "broken.cif"
    broken.write_text("data_x\nloop_\n_a.b\n_a.c\n1\n")
    with pytest.raises(InputError, match=r"broken\.cif"):
        read_model(broken)
    water = tmp_path / "water.pdb"
    water.write_text("\n".join(line for line in PDB.splitlines() if not line.startswith("ATOM")))
    with pytest.raises(InputError, match="no atoms"):
        read_model(water)
    whole = tmp_path / "whole.pdb"
    whole.write_text(PDB)
    with pytest.raises(InputError, match="no biological assembly '7'"):
        read_model(whole, "7")
