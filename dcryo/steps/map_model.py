"""What a map says of an atomic model in it: where it lies, of which hand, and residue by residue."""

from typing import NamedTuple

import numpy as np

from dcryo.data.model import AtomicModel
from dcryo.kernels import alignment, fft, filters, fsc, resolvability, shells
from dcryo.kernels.likeness import AXES, mirrored
from dcryo.kernels.overlay import framed

# Map and model are compared around a residue out to so far from its atoms, or to where coarse voxels are enough.
REACH_A, _REACH_PX = 2.5, 1.5
# A residue stands out by its Q-score where it lies so many robust standard deviations, of at least so much, below the
# median of all.
_SIGMAS, _LEAST_SIGMA = 3.0, 0.03


class Hand(NamedTuple):
    """How well a map and a model's map agree: here, at the place that they have; best, at `shift_px`, the shift (x, y,
    z) that would bring the model on; chance: what noise may reach. Correlations of whitened transforms up to a
    shell."""

    here: float
    best: float
    shift_px: np.ndarray
    chance: float


class Fit(NamedTuple):
    """The move of a model, rotation (3, 3) and shift (x, y, z) in A about the box centre; correlations, of whitened
    transforms up to the resolution compared, after it and of the mirror image after its own."""

    rotation: np.ndarray
    shift_A: np.ndarray
    correlation: float
    mirrored_correlation: float


def hands(volume: np.ndarray, model: np.ndarray, shell: int) -> tuple[Hand, dict[str, Hand]]:
    """Agreement of two maps (D, D, D), and with the second mirrored along z, y and x and through the centre.

    Any shift is tried and no turn: it tells whether a model that should lie in a map does.
    """
    box = len(volume)
    shell = min(shell, (box - 1) // 2)
    first, counted = _whitened(volume, shell)
    mirrors = {name: mirrored(model, axis) for axis, name in enumerate(AXES)}
    mirrors["centre"] = mirrored(mirrored(mirrors["z"], 1), 2)
    return _agreement(first, model, shell, counted), {
        name: _agreement(first, one, shell, counted) for name, one in mirrors.items()
    }


def _whitened(volume: np.ndarray, shell: int) -> tuple[np.ndarray, int]:
    """Transform with every voxel divided by the root mean power of its shell, shells 1 to `shell` alone; how many."""
    box = len(volume)
    framed_ = framed(volume)
    power, number = fsc.shell_power(framed_), shells.volume_shells(box)
    factor = np.zeros(int(number.max()) + 1)
    used = power[1 : shell + 1] > 0
    factor[1 : shell + 1][used] = power[1 : shell + 1][used] ** -0.5
    weights = np.broadcast_to(shells.friedel_weights(box), number.shape)
    counted = int(weights[(number >= 1) & (number <= shell)].sum())
    return (fft.rfftn(framed_) * factor[number]).astype(np.complex64), counted


def _agreement(first: np.ndarray, model: np.ndarray, shell: int, counted: int) -> Hand:
    box = len(model)
    second, _ = _whitened(model, shell)
    correlations = fft.irfftn(first * np.conj(second), box) * (box**3 / counted)
    place = np.unravel_index(int(np.argmax(correlations)), correlations.shape)
    shift = [float(at) - box // 2 + _vertex(correlations, place, axis) for axis, at in enumerate(place)]
    # Of about counted / 2 independent values as many peaks: five standard deviations are out of the reach of chance.
    chance = 5 * np.sqrt(2 / counted)
    here = float(correlations[(box // 2,) * 3])
    return Hand(here, float(correlations[place]), np.array(shift[::-1]), float(chance))


def _vertex(values: np.ndarray, place: tuple[np.intp, ...], axis: int) -> float:
    """Where a parabola through a peak and its neighbours along an axis is highest, in px from the peak."""
    box = values.shape[axis]
    before, at, after = (
        float(values[tuple((n + step) % box if k == axis else n for k, n in enumerate(place))]) for step in (-1, 0, 1)
    )
    curvature = before - 2 * at + after
    return 0.0 if curvature >= 0 else 0.5 * (before - after) / curvature


def fit(volume: np.ndarray, model: np.ndarray, pixel_size_A: float, resolution_A: float) -> Fit:
    """The move that brings a model's map onto a map, both (D, D, D), compared up to a resolution; and how well its
    mirror image would fit. InputError where a map is constant."""
    box = len(volume)
    shell = max(2, shells.shell_at(resolution_A, box, pixel_size_A))
    small = min(box, 2 * (shell + 2))
    onto, moving = filters.rescale_volume(volume, small), filters.rescale_volume(model, small)
    found = alignment.align(moving, onto, shell, hands=False)
    other = alignment.align(mirrored(mirrored(mirrored(moving, 0), 1), 2), onto, shell, hands=False)
    return Fit(found.rotation, found.shift_px * (pixel_size_A * box / small), found.correlation, other.correlation)


def scaled_to(volume: np.ndarray, model: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A model's map (D, D, D), each shell scaled to a map by least squares under a mask, but not negative; the corners
    of the transform are blank. What the map lacks of a shell, or holds of noise, the scaled model lacks too."""
    box = len(volume)
    curve = fsc.shell_correlation(volume * mask, model * mask)
    power, of_model = fsc.shell_power(volume * mask), fsc.shell_power(model * mask)
    scale = np.maximum(curve, 0) * np.sqrt(np.divide(power, of_model, out=np.zeros_like(power), where=of_model > 0))
    number = shells.volume_shells(box)
    factor = np.zeros(int(number.max()) + 1)
    factor[: len(scale)] = scale
    return fft.irfftn(fft.rfftn(model) * factor[number].astype(np.float32), box)


def residue_table(
    volume: np.ndarray, scaled: np.ndarray, pixel_size_A: float, model: AtomicModel, atoms_A: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The columns of `data.residues`, (R,) each, and the Q-score of every atom, (M,), NaN where it has none.

    volume, scaled: the map and the model's, from `scaled_to`, (D, D, D); atoms_A: (M, 3) from the box centre. Hydrogens
    and further conformations have no Q-score and take no points from other atoms.
    """
    names = model.names
    scored = names.conformer & ~np.isin(names.element, ("H", "D"))
    q = np.full(len(atoms_A), np.nan)
    q[scored] = resolvability.q_scores(volume, pixel_size_A, atoms_A[scored])
    keys = [names.chain, names.residue_number, names.insertion_code, names.residue]
    first = np.concatenate([[True], np.any([column[1:] != column[:-1] for column in keys], axis=0)])
    start = np.append(np.flatnonzero(first), len(atoms_A))
    group = np.cumsum(first) - 1
    count = np.bincount(group, weights=scored).astype(np.int64)
    known = np.isfinite(q)

    def mean(values: np.ndarray, used: np.ndarray) -> np.ndarray:
        n = np.bincount(group, weights=used, minlength=len(count))
        total = np.bincount(group, weights=np.where(used, values, 0.0), minlength=len(count))
        return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)

    reach_A = max(REACH_A, _REACH_PX * pixel_size_A)
    table = {
        "chain": names.chain[start[:-1]],
        "residue_number": names.residue_number[start[:-1]],
        "insertion_code": names.insertion_code[start[:-1]],
        "residue": names.residue[start[:-1]],
        "atoms": count,
        "q": mean(q, known),
        "correlation": resolvability.group_correlations(volume, scaled, pixel_size_A, atoms_A, start, reach_A),
        "bfactor_A2": mean(model.own_bfactor_A2, scored),
    }
    return table, q


def standing_out(table: dict[str, np.ndarray]) -> np.ndarray:
    """Rows of the residues whose Q-score lies far below the others', the lowest first."""
    q = table["q"]
    if not np.isfinite(q).any():
        return np.empty(0, dtype=np.int64)
    median = np.nanmedian(q)
    sigma = max(1.4826 * float(np.nanmedian(np.abs(q - median))), _LEAST_SIGMA)
    low = np.flatnonzero(q < median - _SIGMAS * sigma)
    return low[np.argsort(q[low], kind="stable")]
