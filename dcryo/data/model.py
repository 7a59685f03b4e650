"""Atomic models (PDB, mmCIF) as sums of Gaussians that scatter electrons."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gemmi
import numpy as np
from numpy.typing import NDArray

from dcryo.data.atomic import replacing
from dcryo.errors import InputError


class Names(NamedTuple):
    """What the M atoms of a model are called, (M,) each. residue_number: that of the authors; insertion_code: a letter
    or nothing; conformer: whether an atom is in the first of the conformations that its residue has."""

    chain: NDArray[np.str_]
    residue_number: NDArray[np.int64]
    insertion_code: NDArray[np.str_]
    residue: NDArray[np.str_]
    atom: NDArray[np.str_]
    element: NDArray[np.str_]
    conformer: NDArray[np.bool_]


@dataclass(frozen=True)
class AtomicModel:
    """M atoms, their centre of mass at the origin.

    An atom scatters sum_g amplitude_g exp(-bfactor_g k^2 / 4) Angstrom at spatial frequency k (1/A): the five
    Gaussians of International Tables C, 4.3.2.2, times its occupancy, widened by its B-factor.
    """

    position_A: NDArray[np.float64]  # (M, 3) x, y, z
    amplitude: NDArray[np.float64]  # (M, 5)
    bfactor_A2: NDArray[np.float64]  # (M, 5)
    centre_A: NDArray[np.float64]  # (3,) where the file has the centre of mass
    mass_kDa: float  # of the atoms that the file has
    own_bfactor_A2: NDArray[np.float64]  # (M,) as the file has them, not below 0
    names: Names

    @property
    def radius_A(self) -> float:
        """Distance of the farthest atom from the centre."""
        return float(np.linalg.norm(self.position_A, axis=1).max())


def read_model(path: str | Path, assembly: str | None = None) -> AtomicModel:
    """Read the first model of a PDB or mmCIF file, without its waters.

    assembly: name of the biological assembly to build from the operators that the file lists, such as "1";
    None takes the coordinates as they are. Raises InputError for what cannot be read or is not there.
    """
    model = _first_model(_read_structure(Path(path)), path, assembly)
    model.remove_waters()
    sites = [site for site in model.all() if site.atom.occ > 0]
    atoms = [site.atom for site in sites]
    if not atoms:
        raise InputError(f"{path}: no atoms in the first model; expected the coordinates of a molecule.")
    position = np.array([atom.pos.tolist() for atom in atoms])
    mass = np.array([atom.element.weight * atom.occ for atom in atoms])
    if not np.isfinite(position).all() or not mass.sum() > 0:
        raise InputError(f"{path}: atoms without finite coordinates or a known element.")
    centre = mass @ position / mass.sum()
    factors = {atom.element.name: atom.element.c4322 for atom in atoms}
    occupancy = np.array([atom.occ for atom in atoms])[:, None]
    own_bfactor = np.array([max(atom.b_iso, 0.0) for atom in atoms])
    return AtomicModel(
        position_A=position - centre,
        amplitude=occupancy * np.array([factors[atom.element.name].a for atom in atoms]),
        bfactor_A2=own_bfactor[:, None] + np.array([factors[atom.element.name].b for atom in atoms]),
        centre_A=centre,
        mass_kDa=float(mass.sum()) / 1000,
        own_bfactor_A2=own_bfactor,
        names=_names(sites),
    )


def write_moved(
    source: str | Path, target: str | Path, assembly: str | None, rotation: np.ndarray, shift_A: np.ndarray
) -> None:
    """Write the first model of a file as mmCIF with every atom at R x + t, waters too.

    assembly: as in `read_model`; rotation: R, (3, 3); shift_A: t, (3,). The cell and the symmetry of a crystal, which
    would not hold there, are left out.
    """
    read = _read_structure(Path(source))
    moved = gemmi.Structure()
    moved.name = Path(target).stem
    moved.add_model(_first_model(read, source, assembly))
    move = gemmi.Transform(gemmi.Mat33(np.asarray(rotation).tolist()), gemmi.Vec3(*np.asarray(shift_A).tolist()))
    moved[0].transform_pos_and_adp(move)
    moved.setup_entities()
    with replacing(target) as file:
        file.write(moved.make_mmcif_document().as_string().encode())


def _first_model(structure: gemmi.Structure, path: str | Path, assembly: str | None) -> gemmi.Model:
    model = structure[0]
    if assembly is None:
        return model
    known = {found.name: found for found in structure.assemblies}
    if assembly not in known:
        raise InputError(
            f"{path}: no biological assembly {assembly!r}; the file lists {sorted(known) or 'none'}. "
            "Name one of those, or leave the assembly out to take the coordinates as they are."
        )
    return gemmi.make_assembly(known[assembly], model, gemmi.HowToNameCopiedChain.Short)


def _names(sites: list[gemmi.CRA]) -> Names:
    first: dict[tuple[str, str], str] = {}
    for site in sites:
        if site.atom.has_altloc():
            first.setdefault((site.chain.name, str(site.residue.seqid)), site.atom.altloc)
    conformer = [
        not site.atom.has_altloc() or site.atom.altloc == first[site.chain.name, str(site.residue.seqid)]
        for site in sites
    ]
    return Names(
        chain=np.array([site.chain.name for site in sites], dtype=np.str_),
        residue_number=np.array([site.residue.seqid.num for site in sites], dtype=np.int64),
        insertion_code=np.array([site.residue.seqid.icode.strip() for site in sites], dtype=np.str_),
        residue=np.array([site.residue.name for site in sites], dtype=np.str_),
        atom=np.array([site.atom.name for site in sites], dtype=np.str_),
        element=np.array([site.atom.element.name for site in sites], dtype=np.str_),
        conformer=np.array(conformer, dtype=np.bool_),
    )


def _read_structure(path: Path) -> gemmi.Structure:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an atomic model (.pdb, .cif, also .gz).")
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable PDB or mmCIF file: {error}") from error
    if len(structure) == 0:
        raise InputError(f"{path}: no model in the file; expected the coordinates of a molecule.")
    structure.setup_entities()
    return structure
