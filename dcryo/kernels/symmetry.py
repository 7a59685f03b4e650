"""Point groups of rotations, in RELION's settings, and their asymmetric units.

Cn and Dn have their axis on z, Dn a two-fold on x. T has a three-fold on z and a two-fold in the yz plane,
at (0, sqrt 2, 1). O has its four-folds on x, y and z. I1 and I2 have two-folds on x, y and z, I1 with a
five-fold at (0, 1, golden ratio), I2 at (1, 0, golden ratio); I3 and I4 have a five-fold on z, I3 with
another at (-2, 0, 1), I4 at (2, 0, 1).
"""

import re

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dcryo.errors import InputError
from dcryo.euler import matrix_from_rotvec

Float64 = NDArray[np.float64]

_GOLDEN = (1 + np.sqrt(5)) / 2

# Two rotations that generate each group: (direction of the axis, fold).
_GENERATORS: dict[str, tuple[tuple[tuple[float, float, float], int], ...]] = {
    "T": (((0, 0, 1), 3), ((0, np.sqrt(2), 1), 2)),
    "O": (((0, 0, 1), 4), ((1, 1, 1), 3)),
    "I1": (((0, 0, 1), 2), ((0, 1, _GOLDEN), 5)),
    "I2": (((0, 0, 1), 2), ((1, 0, _GOLDEN), 5)),
    "I3": (((0, 0, 1), 5), ((-2, 0, 1), 5)),
    "I4": (((0, 0, 1), 5), ((2, 0, 1), 5)),
}

# The asymmetric unit is what lies nearest to this direction: any that is off every axis of the groups does.
_REFERENCE_DIRECTION = np.array([0.4330127, 0.1943651, 0.8801791])

# Where the share of a subunit has fallen to e to the minus so much of it, in the direction of its neighbour.
_SECTOR_SHARPNESS = 4.0
# Directions tried for the subunits, spread evenly over the sphere (Fibonacci lattice).
_TRIED = 500


def operators(name: str) -> Float64:
    """Rotations (G, 3, 3) of a point group: C1 to C99, D1 to D99, T, O, I1, I2, I3, I4 (or in lower case).

    The identity comes first and the order is fixed. They act on volume coordinates, V(g x) = V(x), so that
    the poses A and A g are equal. InputError where the name is another.
    """
    label = name.strip().upper()
    if label in _GENERATORS:
        return _tidy(_closure([_rotation(axis, fold) for axis, fold in _GENERATORS[label]]))
    cyclic_or_dihedral = re.fullmatch("([CD])([1-9][0-9]?)", label)
    if not cyclic_or_dihedral:
        raise InputError(
            f"symmetry {name!r} is not known: expected C1 to C99, D1 to D99, T, O, I1, I2, I3 or I4 "
            "(RELION's settings; an icosahedral group needs its number)"
        )
    fold = int(cyclic_or_dihedral[2])
    turns = np.arange(fold)[:, None] * np.array([0, 0, 2 * np.pi / fold])
    cyclic = matrix_from_rotvec(turns)
    if cyclic_or_dihedral[1] == "C":
        return _tidy(cyclic)
    return _tidy(np.concatenate([cyclic, cyclic @ np.diag([1.0, -1.0, -1.0])]))


def asymmetric_unit(directions: ArrayLike, operators: ArrayLike) -> NDArray[np.bool_]:
    """Mask (N,) of the unit directions (N, 3) in the asymmetric unit of a point group, operators (G, 3, 3).

    The unit is the Dirichlet domain of one fixed direction n off every axis: d is kept where
    d . n >= (g d) . n for all g. Its images under the group cover the sphere once. Directions on the boundary
    (axes among them) are kept.
    """
    directions = np.asarray(directions, dtype=np.float64)
    keep = np.ones(len(directions), dtype=bool)
    for operator in np.asarray(operators, dtype=np.float64):
        keep &= directions @ (_REFERENCE_DIRECTION - _REFERENCE_DIRECTION @ operator) >= -1e-12
    return keep


def symmetry_broken(volume: NDArray[np.float32], operators: ArrayLike, strength: float = 0.1) -> NDArray[np.float32]:
    """A map (D, D, D) whose subunits differ: one after the other they are multiplied by 1 - strength to 1 + strength.

    Density goes to the subunits by its direction, softly, so that what is on an axis stays as it is. All of them are
    other than their neighbours: whatever makes a subunit odd, more of it or less, there is one that it is nearest to.
    operators: (G, 3, 3).
    """
    box = len(volume)
    axis = np.arange(box, dtype=np.float32) - box // 2
    place = np.stack(np.meshgrid(axis, axis, axis, indexing="ij")[::-1], axis=-1)
    place /= np.maximum(np.linalg.norm(place, axis=-1, keepdims=True), 1)
    directions, apart = _apart(np.asarray(operators, dtype=np.float64))
    share = np.exp(_SECTOR_SHARPNESS / apart * (place @ directions.T.astype(np.float32)))
    share /= share.sum(axis=-1, keepdims=True)
    return np.asarray(volume * (1 + share @ np.linspace(-strength, strength, len(directions), dtype=np.float32)))


def _apart(operators: Float64) -> tuple[Float64, float]:
    """A direction and its mates (G, 3), in the order of the operators, as far from one another as mates can be, and 1
    less the cosine between neighbours."""
    z = 1 - (np.arange(_TRIED) + 0.5) * 2 / _TRIED
    around = np.pi * (3 - np.sqrt(5)) * np.arange(_TRIED)
    tried = np.stack([np.sqrt(1 - z**2) * np.cos(around), np.sqrt(1 - z**2) * np.sin(around), z], axis=1)
    near = np.einsum("ta,gab,tb->tg", tried, operators, tried)[:, 1:].max(axis=1, initial=-1)
    best = int(np.argmin(near))
    return operators @ tried[best], float(1 - near[best])


def _rotation(axis: tuple[float, float, float], fold: int) -> Float64:
    direction = np.asarray(axis, dtype=np.float64)
    return matrix_from_rotvec(direction / np.linalg.norm(direction) * (2 * np.pi / fold))


def _closure(generators: list[Float64]) -> Float64:
    """All products of the generators, breadth first from the identity."""
    group = [np.eye(3)]
    for element in group:  # grows while it is walked
        for generator in generators:
            product = element @ generator
            if np.min(np.max(np.abs(np.array(group) - product), axis=(1, 2))) > 1e-6:
                group.append(product)
    return np.array(group)


def _tidy(matrices: Float64) -> Float64:
    """Entries that rounding took off 0, 1/2 or 1 put back, so that turns onto the axes are exact."""
    halves = np.round(2 * matrices) / 2
    return np.where(np.abs(matrices - halves) < 1e-14, halves, matrices) + 0.0
