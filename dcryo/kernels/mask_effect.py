"""What a mask does to the FSC of the maps that it is multiplied with, and how that is taken off.

A mask that follows the density closely, or ends sharply, spreads the signal of low resolution over all shells, where
it correlates between the halves although nothing was resolved there.
"""

import numpy as np

from dcryo.kernels import fft
from dcryo.kernels.filters import radius_px
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import volume_shells

# The unmasked FSC below which phases are replaced (Chen et al. 2013), and how many shells further on what remains of
# low resolution is taken for what it is in RELION.
RANDOMISED_BELOW = 0.8
_GUARD_SHELLS = 2


def randomised_from(fsc_unmasked: np.ndarray) -> int | None:
    """The first shell whose phases are to be replaced; None where the FSC never falls below 0.8."""
    below = np.flatnonzero(fsc_unmasked[1:] < RANDOMISED_BELOW)
    return int(below[0]) + 1 if len(below) else None


def random_phases(volume: np.ndarray, shell: int, seed: int, number: int) -> np.ndarray:
    """The map (D, D, D) with random phases from the radius of a shell on, its amplitudes kept; float32.

    The phases are those of white noise, so that they are evenly distributed and the map stays real. seed and number
    decide them: each half takes another number.
    """
    box = len(volume)
    transform = fft.rfftn(volume)
    noise = fft.rfftn(generator(seed, "phases", number).standard_normal(volume.shape, dtype=np.float32))
    turned = np.abs(transform) * noise / np.maximum(np.abs(noise), np.float32(1e-20))
    return fft.irfftn(np.where(radius_px(box, 3) >= shell, turned, transform), box)


def corrected(fsc_masked: np.ndarray, fsc_randomised: np.ndarray, shell: int | None) -> np.ndarray:
    """The FSC without what the mask adds: (FSC_t - FSC_n) / (1 - FSC_n) (Chen et al. 2013, eq. 4), (S,) float64.

    shell: the first with random phases; the correction begins two shells later. Where the mask alone correlates more
    than the maps do the result is negative, at least -1. None: nothing was randomised and there is nothing to take off.
    """
    out = np.array(fsc_masked, dtype=np.float64)
    if shell is None:
        return out
    beyond = slice(shell + _GUARD_SHELLS, None)
    of_mask = np.minimum(fsc_randomised[beyond], 1 - 1e-9)
    out[beyond] = np.maximum((out[beyond] - of_mask) / (1 - of_mask), -1)
    return out


def of_molecule(fsc: np.ndarray, mask_volume: float, molecule_volume: float) -> np.ndarray:
    """The FSC that the molecule alone would have, from the FSC under a mask that holds solvent too.

    Noise fills the mask and signal only the molecule, so that the signal to noise ratio FSC / (1 - FSC) grows by the
    ratio f of the volumes: f FSC / (1 + (f - 1) FSC) (the part FSC of Grant, Rohou & Grigorieff 2018). A molecule as
    large as the mask, or larger, changes nothing.
    """
    ratio = max(1.0, mask_volume / molecule_volume)
    known = np.maximum(fsc, 0)
    return np.where(fsc > 0, ratio * known / (1 + (ratio - 1) * known), fsc)


def filtered_first(first: np.ndarray, second: np.ndarray, mask: np.ndarray, shells: np.ndarray) -> np.ndarray:
    """Correlation of two maps under a mask, each filtered to one shell before the mask is applied, (len(shells),).

    sum m^2 a b / sqrt(sum m^2 a^2 sum m^2 b^2), a and b the maps (D, D, D) of one shell alone. For a smooth mask this
    is the masked FSC; but no mask, however tight, can bring the signal of one shell into another. It costs two
    transforms for each shell.
    """
    box = len(first)
    numbers = volume_shells(box)
    transforms = fft.rfftn(first), fft.rfftn(second)
    weights = np.square(mask, dtype=np.float64).ravel()
    seen = np.flatnonzero(weights)
    weights = weights[seen]
    out = np.zeros(len(shells))
    for place, shell in enumerate(shells):
        a, b = (fft.irfftn(np.where(numbers == shell, of, 0), box).ravel()[seen] for of in transforms)
        power = np.sum(weights * a * a) * np.sum(weights * b * b)
        out[place] = np.sum(weights * a * b) / np.sqrt(power) if power > 0 else 0.0
    return out
