"""What an exposure to electrons leaves of the signal, and the weights of a movie's frames that follow (Grant and
Grigorieff, eLife 4, e06980, 2015)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Of the critical exposure at 300 kV: their 0.8 at 200 kV, and once more the same at 100 kV, as RELION has it.
_VOLTAGES_KV, _FACTORS = (100.0, 200.0, 300.0), (0.64, 0.8, 1.0)


def critical_exposure_e_A2(frequency_per_A: ArrayLike, voltage_kV: float) -> NDArray[np.float64]:
    """Exposure in e/A2 after which the signal's amplitude at a frequency (1/A, any shape) has fallen to exp(-1/2), its
    power to 1/e; infinite at 0.

    0.245 k^-1.665 + 2.81 at 300 kV (their eq. 3), 0.8 of it at 200 kV; in between and down to 100 kV by linear
    interpolation of the factor, which stays the same beyond.
    """
    k = np.asarray(frequency_per_A, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray((0.245 * k**-1.665 + 2.81) * np.interp(voltage_kV, _VOLTAGES_KV, _FACTORS))


def survival(frequency_per_A: ArrayLike, exposure_e_A2: ArrayLike, voltage_kV: float) -> NDArray[np.float64]:
    """Factor exp(-N / (2 Ne)) on the signal's amplitude after an exposure N, Ne the critical one (their eq. 2).

    Arguments of shapes that go together; 1 at frequency 0, where the mean density stays.
    """
    exposure = np.asarray(exposure_e_A2, dtype=np.float64)
    return np.exp(-0.5 * exposure / critical_exposure_e_A2(frequency_per_A, voltage_kV))


def frame_weights(
    frequency_per_A: ArrayLike, frames: int, exposure_e_A2: float, before_e_A2: float, voltage_kV: float
) -> NDArray[np.float32]:
    """Weights q of the frames at frequencies (1/A, any shape) -> (frames, *shape) float32.

    exposure_e_A2: of a frame; before_e_A2: what the specimen had got before the first. q is what survives the exposure
    up to the end of the frame, over the root of the sum over frames of q^2: so that white noise stays white, with the
    variance that it has in one frame (their eqs. 5 to 9).
    """
    ends = before_e_A2 + exposure_e_A2 * np.arange(1, frames + 1)
    weights = survival(frequency_per_A, ends.reshape(-1, *[1] * np.ndim(frequency_per_A)), voltage_kV)
    return (weights / np.sqrt(np.sum(weights**2, axis=0))).astype(np.float32)
