"""A protein-like phantom of any symmetry: helices and loops packed into lobes, drawn from a seed."""

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dcryo.errors import InputError
from dcryo.kernels.randomness import generator

CA_STEP_A = 3.8
HELIX_RADIUS_A, HELIX_RISE_A, HELIX_TURN_DEG = 2.3, 1.5, 100.0
CLEARANCE_A = 6.0
RESIDUE_VOLUME_A3 = 135.0
PACKING = 0.5
SPHERE_FILL = 0.35
LOBES, LOBE_DRAWS = 4, 300
CANDIDATES, MOST_FAILURES = 60, 25
SIDE_CHAIN_A = 7.0
SMALLEST_A, LARGEST_A = 15.0, 200.0
# Scattering of C, N and O, about alike: the value at k = 0, and the fall-off as one Gaussian.
ATOM_AMPLITUDE_A, ATOM_BFACTOR_A2 = 2.3, 25.0
MOTION_BFACTOR_A2 = 30.0

Vectors = NDArray[np.float64]


@dataclass(frozen=True)
class Phantom:
    """M Gaussian atoms, their centre of mass at the origin; fields as `density.gaussian_density` takes."""

    position_A: Vectors  # (M, 3) x, y, z
    amplitude: Vectors  # (M, 1)
    bfactor_A2: Vectors  # (M, 1)

    @property
    def radius_A(self) -> float:
        """Distance of the farthest atom from the centre."""
        return float(np.linalg.norm(self.position_A, axis=1).max())


def phantom(operators: NDArray[np.floating], radius_A: float, seed: int = 0) -> Phantom:
    """Fold a pseudo-protein of about `radius_A` that has the given symmetry.

    operators: (G, 3, 3) rotations of the point group, the identity among them. The asymmetric unit is a chain
    of pseudo-residues, right-handed alpha helices joined by loops, self-avoiding also against its own copies,
    inside LOBES overlapping balls off the axes; the fold has a hand, a shape at low resolution, rods at 10 A
    and atoms. The same arguments give the same atoms. InputError where the asymmetric unit has no room.
    """
    if not SMALLEST_A <= radius_A <= LARGEST_A:
        raise InputError(
            f"a phantom of radius {radius_A:g} A cannot be folded; expected {SMALLEST_A:g} to {LARGEST_A:g} A"
        )
    rng = generator(seed, "phantom", 0)
    group = np.asarray(operators, dtype=np.float64)
    trace_radius_A = radius_A - SIDE_CHAIN_A
    lobes = _lobes(rng, group, trace_radius_A)
    volume_A3 = SPHERE_FILL * 4.0 / 3.0 * math.pi * trace_radius_A**3 / len(group)
    residues = max(12, round(PACKING * volume_A3 / RESIDUE_VOLUME_A3))
    traces = _fold(rng, group, lobes, residues)
    if not traces:
        raise InputError(
            f"a phantom of radius {radius_A:g} A has no room for {len(group)} copies of a chain; make it larger"
        )
    unit = np.concatenate([_residue_atoms(rng, trace) for trace in traces])
    position = np.concatenate([unit @ operator.T for operator in group])
    position -= position.mean(axis=0)
    shape = (len(position), 1)
    bfactor = ATOM_BFACTOR_A2 + MOTION_BFACTOR_A2
    return Phantom(position, np.full(shape, ATOM_AMPLITUDE_A), np.full(shape, bfactor))


def _unit_vector(rng: np.random.Generator) -> Vectors:
    vector = rng.standard_normal(3)
    return vector / np.linalg.norm(vector)


def _lobes(rng: np.random.Generator, operators: Vectors, radius_A: float) -> tuple[Vectors, Vectors]:
    """Centres (LOBES, 3) and radii (LOBES,) of the asymmetric unit's balls, each touching the one before.

    All copies together fill SPHERE_FILL of the sphere. Of many draws inside it the one whose balls overlap
    each other and their copies least is kept.
    """
    fixed = operators.mean(axis=0)  # projects on what the symmetry leaves in place: there the centre must be
    others = np.trace(operators, axis1=1, axis2=2) < 3.0 - 1e-6
    best_gap = -np.inf
    for _ in range(LOBE_DRAWS):
        radii = rng.uniform(0.75, 1.25, LOBES)
        radii *= radius_A * (SPHERE_FILL / (len(operators) * np.sum(radii**3))) ** (1.0 / 3.0)
        centres = np.empty((LOBES, 3))
        centres[0] = _unit_vector(rng) * (radius_A - radii[0]) * rng.uniform(0.3, 1.0)
        for i in range(1, LOBES):
            centres[i] = centres[i - 1] + _unit_vector(rng) * 0.75 * (radii[i] + radii[i - 1])
        centres -= fixed @ (radii**3 @ centres / np.sum(radii**3))
        outside = max(0.0, float((np.linalg.norm(centres, axis=1) + radii).max() - radius_A))
        copies = np.einsum("gij,lj->gli", operators[others], centres)
        gaps = np.linalg.norm(copies[:, :, None] - centres, axis=3) - radii[:, None] - radii
        own = np.linalg.norm(centres[:, None] - centres, axis=2) - radii[:, None] - radii
        gap = min(own[~np.eye(LOBES, dtype=bool)].min(), gaps.min(initial=np.inf)) - 3.0 * outside
        if gap > best_gap:
            best_gap, best = gap, (centres, radii)
    return best


def _fold(rng: np.random.Generator, operators: Vectors, lobes: tuple[Vectors, Vectors], residues: int) -> list[Vectors]:
    """Alpha-carbon traces of the asymmetric unit, each (L, 3); a new one starts where the last is stuck."""
    placed = np.empty((residues + 64, 3))
    count, stuck, helix = 0, 0, True
    traces: list[list[Vectors]] = []
    growing = False
    while count < residues and stuck < MOST_FAILURES:
        segment = None
        for _ in range(CANDIDATES):
            if growing:
                start = placed[count - 1] + CA_STEP_A * _unit_vector(rng)
            else:
                lobe = rng.integers(LOBES)
                start = lobes[0][lobe] + lobes[1][lobe] * rng.uniform() * _unit_vector(rng)
            candidate = _helix(rng, start) if helix else _loop(rng, start)
            # The last residues of a growing chain are its neighbours, nearer than the clearance.
            fixed = placed[: max(0, count - 4)] if growing else placed[:count]
            if _inside(candidate, *lobes) and _clear(candidate, fixed, operators, CLEARANCE_A):
                segment = candidate
                break
        if segment is None:
            growing, helix, stuck = False, not helix, stuck + 1
            continue
        if growing:
            traces[-1].append(segment)
        else:
            traces.append([segment])
        placed[count : count + len(segment)] = segment
        count, stuck, growing, helix = count + len(segment), 0, True, not helix
    return [np.concatenate(trace) for trace in traces]


def _helix(rng: np.random.Generator, start: Vectors) -> Vectors:
    """Right-handed helix of 7 to 20 residues from `start` along a random axis."""
    axis, other = _unit_vector(rng), _unit_vector(rng)
    u = np.cross(axis, other)
    u /= np.linalg.norm(u)
    v = np.cross(axis, u)
    i = np.arange(rng.integers(7, 21))[:, None]
    angle = np.deg2rad(HELIX_TURN_DEG) * i
    return start + HELIX_RADIUS_A * ((np.cos(angle) - 1.0) * u + np.sin(angle) * v) + HELIX_RISE_A * i * axis


def _loop(rng: np.random.Generator, start: Vectors) -> Vectors:
    """Persistent random walk of 3 to 7 residues from `start`."""
    length = rng.integers(3, 8)
    direction = _unit_vector(rng)
    points = [start]
    for _ in range(length - 1):
        direction = direction + 0.6 * rng.standard_normal(3)
        direction /= np.linalg.norm(direction)
        points.append(points[-1] + CA_STEP_A * direction)
    return np.array(points)


def _inside(points: Vectors, centres: Vectors, radii: Vectors) -> bool:
    return bool((np.linalg.norm(points[:, None] - centres, axis=2) < radii).any(axis=1).all())


@njit(nogil=True, cache=True)
def _clear(points: np.ndarray, placed: np.ndarray, operators: np.ndarray, clearance: float) -> bool:
    """Whether points, and their copies, keep their distance from what is placed, and copies from points."""
    limit = clearance * clearance
    for g in range(operators.shape[0]):
        m = operators[g]
        identity = m[0, 0] + m[1, 1] + m[2, 2] > 3.0 - 1e-6
        for i in range(points.shape[0]):
            x = m[0, 0] * points[i, 0] + m[0, 1] * points[i, 1] + m[0, 2] * points[i, 2]
            y = m[1, 0] * points[i, 0] + m[1, 1] * points[i, 1] + m[1, 2] * points[i, 2]
            z = m[2, 0] * points[i, 0] + m[2, 1] * points[i, 1] + m[2, 2] * points[i, 2]
            for j in range(placed.shape[0]):
                dx, dy, dz = x - placed[j, 0], y - placed[j, 1], z - placed[j, 2]
                if dx * dx + dy * dy + dz * dz < limit:
                    return False
            if identity:
                continue
            for j in range(points.shape[0]):
                dx, dy, dz = x - points[j, 0], y - points[j, 1], z - points[j, 2]
                if dx * dx + dy * dy + dz * dz < limit:
                    return False
    return True


def _residue_atoms(rng: np.random.Generator, trace: Vectors) -> Vectors:
    """Backbone and side-chain atoms (M, 3) around alpha carbons (L, 3).

    N, C and O lie between neighbouring alpha carbons; a side chain of 0 to 7 atoms points away from the local
    axis, as the bend of the trace tells.
    """
    before = np.concatenate([2 * trace[:1] - trace[1:2], trace[:-1]])
    after = np.concatenate([trace[1:], 2 * trace[-1:] - trace[-2:-1]])
    outward = 2 * trace - before - after
    # A trace may run straight, as it does at its ends; any direction across it will do there.
    outward += 0.1 * rng.standard_normal(trace.shape)
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    onward = (after - trace) / np.linalg.norm(after - trace, axis=1, keepdims=True)
    across = np.cross(onward, outward)
    carbonyl = trace + 1.5 * onward + 0.3 * across
    atoms = [trace, carbonyl, trace - 1.45 * onward + 0.3 * across, carbonyl + 0.8 * onward + 0.9 * across]
    size = rng.integers(0, 8, size=len(trace))
    tilt = 0.35 * rng.standard_normal(trace.shape)
    for step in range(1, size.max(initial=0) + 1):
        rows = size >= step
        zigzag = 0.7 * (-1.0) ** step * across[rows]
        atoms.append(trace[rows] + 1.1 * step * (outward[rows] + tilt[rows]) + zigzag)
    return np.concatenate(atoms)
