"""The command that compares a map with an atomic model."""

import csv
import json
from pathlib import Path

import gemmi
import numpy as np
import pytest

from dcryo import cli
from dcryo.data import mrc
from dcryo.data.model import AtomicModel, read_model
from dcryo.data.residues import read_residues
from dcryo.data.star_syntax import read_blocks
from dcryo.errors import InputError
from dcryo.euler import matrix_from_rotvec
from dcryo.jobs.mapmodel import MapModelOptions, MapModelResult, mapmodel
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.filters import lowpass
from dcryo.kernels.likeness import mirrored

BOX, PIXEL = 64, 1.1
GONE = 20


def quiet(line: str, /, *, end: str = "\n") -> None:
    pass


@pytest.fixture(scope="session")
def protein(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty residues of real protein in the middle of the box."""
    structure = gemmi.read_structure(str(shared_data / "models" / "2dhb.pdb"))
    structure.remove_ligands_and_waters()
    chain = structure[0][0]
    for index in reversed(range(60, len(chain))):
        del chain[index]
    for index in reversed(range(1, len(structure[0]))):
        del structure[0][index]
    atoms = [site.atom for site in structure[0].all()]
    middle = np.mean([atom.pos.tolist() for atom in atoms], axis=0)
    for atom in atoms:
        atom.pos = gemmi.Position(*(np.array(atom.pos.tolist()) - middle + BOX // 2 * PIXEL))
        atom.b_iso = 10.0
    path = tmp_path_factory.mktemp("protein") / "protein.pdb"
    structure.write_pdb(str(path))
    return path


def density_of(model: AtomicModel, resolution_A: float, used: np.ndarray | None = None) -> np.ndarray:
    place = model.position_A + model.centre_A - BOX // 2 * PIXEL
    used = np.ones(len(place), bool) if used is None else used
    made = gaussian_density(place[used], model.amplitude[used], model.bfactor_A2[used], BOX, PIXEL)
    return lowpass(made, PIXEL, resolution_A)


def moved(source: Path, target: Path, rotation: np.ndarray, shift_A: np.ndarray) -> Path:
    structure = gemmi.read_structure(str(source))
    for site in structure[0].all():
        place = np.array(site.atom.pos.tolist()) - BOX // 2 * PIXEL
        site.atom.pos = gemmi.Position(*(rotation @ place + BOX // 2 * PIXEL + shift_A))
    structure.write_pdb(str(target))
    return target


def compared(tmp_path: Path, volume: np.ndarray, model: Path, name: str = "out", **options) -> MapModelResult:
    mrc.write_map(tmp_path / f"{name}.mrc", volume, PIXEL)
    given = MapModelOptions(source=tmp_path / f"{name}.mrc", model=model, out=tmp_path / name, **options)
    return mapmodel(given, progress=quiet)


def test_a_map_of_the_model_and_what_q_says_of_its_resolution(protein: Path, tmp_path: Path) -> None:
    model = read_model(protein)
    found = [compared(tmp_path, density_of(model, d), protein, f"at{d}", resolution_A=d) for d in (2.2, 3.0, 4.5, 7.0)]
    q = [one.q for one in found]
    assert q[0] > 0.85 and np.all(np.diff(q) < -0.05)
    assert not any(one.warnings for one in found[:2])
    assert found[0].resolution_half_A == pytest.approx(2 * PIXEL, abs=0.1)
    for one, d in zip(found[1:3], (3.0, 4.5), strict=True):
        assert abs(one.resolution_half_A / d - 1) < 0.1
    assert "does not resolve atoms" in found[3].warnings[0] and found[3].expected_q is None
    assert np.nanmin(found[0].residues["correlation"]) > 0.95


def test_a_residue_that_the_map_lacks_is_pointed_at(protein: Path, tmp_path: Path, capsys) -> None:
    model = read_model(protein)
    volume = density_of(model, 3.0, model.names.residue_number != GONE)
    mrc.write_map(tmp_path / "map.mrc", volume, PIXEL)
    out = tmp_path / "out"
    assert cli.main(["mapmodel", str(tmp_path / "map.mrc"), str(protein), "--out", str(out)]) == 0
    assert f" {GONE} (Q " in capsys.readouterr().out
    table = read_residues(out / "residues.csv")
    row = int(np.argmin(table["q"]))
    assert table["residue_number"][row] == GONE == table["residue_number"][np.argmin(table["correlation"])]
    assert table["q"][row] < np.median(table["q"]) - 0.3
    star = read_blocks(out / "residues.star")["residues"].columns
    np.testing.assert_allclose(star["dcryoQScore"].astype(float), table["q"], atol=1e-4)
    with (out / "residues.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(table["q"]) == 60
    page = (out / "report.html").read_text()
    assert "Q-scores by residue" in page and "Could not be shown" not in page


def test_a_model_beside_its_place_and_a_mirrored_map_are_called_out(protein: Path, tmp_path: Path) -> None:
    volume = density_of(read_model(protein), 4.0)
    beside = moved(protein, tmp_path / "beside.pdb", np.eye(3), np.array([0.0, 2.0, -1.5]))
    found = compared(tmp_path, volume, beside, "beside", resolution_A=4.0)
    assert any("shifted by 0.0, -2.0, 1.5 A" in line.replace("-0.0", "0.0") for line in found.warnings)
    far = moved(protein, tmp_path / "far.pdb", matrix_from_rotvec(np.array([[0.0, 2.0, 1.0]]))[0], np.zeros(3))
    lines = compared(tmp_path, volume, far, "far", resolution_A=4.0).warnings
    assert any("--fit" in line for line in lines) and not any("hand" in line for line in lines)
    for name, axes in {"z": (0,), "the centre": (0, 1, 2)}.items():
        other = volume
        for axis in axes:
            other = mirrored(other, axis)
        lines = compared(tmp_path, other, protein, f"mirror{len(axes)}", resolution_A=4.0).warnings
        assert any(name in line and "wrong hand" in line for line in lines)


@pytest.mark.parametrize("origin_A", [(0.0, 0.0, 0.0), (-30.0, 12.0, 7.0)])
def test_fit_brings_a_displaced_model_back(protein: Path, tmp_path: Path, origin_A) -> None:
    model = read_model(protein)
    mrc.write_map(tmp_path / "map.mrc", density_of(model, 4.0), PIXEL, origin_A)
    turn = matrix_from_rotvec(np.array([[1.0, -0.7, 2.0]]))[0]
    away = moved(protein, tmp_path / "away.pdb", turn, np.array([100.0, -40.0, 9.0]))
    options = MapModelOptions(source=tmp_path / "map.mrc", model=away, fit=True, resolution_A=4.0, out=tmp_path / "out")
    found = mapmodel(options, progress=quiet)
    back = read_model(tmp_path / "out" / "model_fitted.cif")
    place, truth = (one.position_A + one.centre_A for one in (back, model))
    assert np.linalg.norm(place - truth - np.array(origin_A), axis=1).max() < 0.5 * PIXEL
    assert found.resolution_half_A < 4.3 and not found.warnings
    np.testing.assert_array_equal(back.names.atom, model.names.atom)
    # The file lies in the map as written: without --fit it gives the same.
    again = options.model_copy(update={"model": tmp_path / "out" / "model_fitted.cif", "fit": False,
                                       "out": tmp_path / "again"})  # fmt: skip
    assert mapmodel(again, progress=quiet).q == pytest.approx(found.q, abs=0.01)
    # Onto the mirrored map it cannot be brought, and that is said.
    mrc.write_map(tmp_path / "mirror.mrc", mirrored(density_of(model, 4.0), 0), PIXEL)
    other = options.model_copy(update={"source": tmp_path / "mirror.mrc", "out": tmp_path / "mirror"})
    assert any("wrong hand" in line for line in mapmodel(other, progress=quiet).warnings)


def test_half_maps_have_curves_of_their_own(protein: Path, tmp_path: Path) -> None:
    signal = density_of(read_model(protein), 3.0)
    noise = [np.random.Generator(np.random.Philox(key=n)).normal(0, signal.std(), signal.shape) for n in (1, 2)]
    halves = [signal + one for one in noise]
    for n, half in enumerate(halves, start=1):
        mrc.write_map(tmp_path / f"half{n}.mrc", half, PIXEL)
    found = compared(tmp_path, (halves[0] + halves[1]) / 2, protein, half1=tmp_path / "half1.mrc")
    last = int(BOX * PIXEL / 3.5)
    curves = {name: values[3:last] for name, values in found.curves.items()}
    np.testing.assert_allclose(curves["fsc_half1_model"], np.sqrt(curves["fsc_halves"]), atol=0.12)
    np.testing.assert_allclose(curves["fsc_map_model"], curves["fsc_perfect_model"], atol=0.1)
    assert np.all(curves["fsc_map_model"].mean() > curves["fsc_half1_model"].mean())
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert abs(record["result"]["work_less_free"]) < 0.05 and len(record["inputs"]) == 4


def test_hydrogens_and_second_conformers_have_no_score(protein: Path, tmp_path: Path) -> None:
    structure = gemmi.read_structure(str(protein))
    residue = structure[0][0][5]
    for element, letter in (("H", "\0"), ("C", "B")):
        atom = gemmi.Atom()
        atom.name, atom.element, atom.altloc = element + "X", gemmi.Element(element), letter
        atom.pos, atom.occ, atom.b_iso = residue[0].pos + gemmi.Position(0.3, 0, 0), 0.5, 10.0
        residue.add_atom(atom)
    residue["CB"][0].altloc = "A"
    structure.write_pdb(str(tmp_path / "more.pdb"))
    volume = density_of(read_model(protein), 3.0)
    plain = compared(tmp_path, volume, protein, "plain").residues
    more = compared(tmp_path, volume, tmp_path / "more.pdb", "more").residues
    np.testing.assert_array_equal(more["q"], plain["q"])
    np.testing.assert_array_equal(more["atoms"], plain["atoms"])


def test_a_model_of_ca_atoms_is_allowed_and_said(protein: Path, tmp_path: Path) -> None:
    structure = gemmi.read_structure(str(protein))
    gemmi.Selection("/1/*//CA").remove_not_selected(structure)
    structure.write_pdb(str(tmp_path / "ca.pdb"))
    found = compared(tmp_path, density_of(read_model(protein), 3.0), tmp_path / "ca.pdb")
    assert any("one atom for each residue" in line for line in found.warnings)
    assert np.all(found.residues["atoms"] == 1)


def test_what_is_refused(protein: Path, tmp_path: Path) -> None:
    volume = density_of(read_model(protein), 3.0)
    outside = moved(protein, tmp_path / "outside.pdb", np.eye(3), np.array([60.0, 0, 0]))
    with pytest.raises(InputError, match=r"outside\.pdb: \d+ of \d+ atoms lie outside the map"):
        compared(tmp_path, volume, outside)
    mrc.write_map(tmp_path / "bare.mrc", volume, 0.0)
    with pytest.raises(InputError, match=r"bare\.mrc: no voxel size"):
        mapmodel(MapModelOptions(source=tmp_path / "bare.mrc", model=protein, out=tmp_path / "out"), progress=quiet)
    with pytest.raises(InputError, match="all voxels are 0"):
        compared(tmp_path, np.zeros((BOX,) * 3), protein)
    with pytest.raises(InputError, match="--half2 says nothing"):
        compared(tmp_path, volume, protein, half2=tmp_path / "bare.mrc")
    mrc.write_map(tmp_path / "small.mrc", volume[16:48, 16:48, 16:48], 0.5)
    with pytest.raises(InputError, match=r"reaches .* A from its centre"):
        mapmodel(MapModelOptions(source=tmp_path / "small.mrc", model=protein, fit=True, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
