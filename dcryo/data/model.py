"""Atomic models (PDB, mmCIF) as sums of Gaussians that scatter electrons."""

from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from dcryo.errors import InputError


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

    @property
    def radius_A(self) -> float:
        """Distance of the farthest atom from the centre."""
        return float(np.linalg.norm(self.position_A, axis=1).max())


def read_model(path: str | Path, assembly: str | None = None) -> AtomicModel:
    """Read the first model of a PDB or mmCIF file, without its waters.

    assembly: name of the biological assembly to build from the operators that the file lists, such as "1";
    None takes the coordinates as they are. Raises InputError for what cannot be read or is not there.
    """
    structure = _read_structure(Path(path))
    model = structure[0]
    if assembly is not None:
        known = {found.name: found for found in structure.assemblies}
        if assembly not in known:
            raise InputError(
                f"{path}: no biological assembly {assembly!r}; the file lists {sorted(known) or 'none'}. "
                "Name one of those, or leave the assembly out to take the coordinates as they are."
            )
        model = gemmi.make_assembly(known[assembly], model, gemmi.HowToNameCopiedChain.Short)
    model.remove_waters()
    atoms = [site.atom for site in model.all() if site.atom.occ > 0]
    if not atoms:
        raise InputError(f"{path}: no atoms in the first model; expected the coordinates of a molecule.")
    position = np.array([atom.pos.tolist() for atom in atoms])
    mass = np.array([atom.element.weight * atom.occ for atom in atoms])
    if not np.isfinite(position).all() or not mass.sum() > 0:
        raise InputError(f"{path}: atoms without finite coordinates or a known element.")
    centre = mass @ position / mass.sum()
    factors = {atom.element.name: atom.element.c4322 for atom in atoms}
    occupancy = np.array([atom.occ for atom in atoms])[:, None]
    own_bfactor = np.array([max(atom.b_iso, 0.0) for atom in atoms])[:, None]
    return AtomicModel(
        position_A=position - centre,
        amplitude=occupancy * np.array([factors[atom.element.name].a for atom in atoms]),
        bfactor_A2=own_bfactor + np.array([factors[atom.element.name].b for atom in atoms]),
        centre_A=centre,
        mass_kDa=float(mass.sum()) / 1000,
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
