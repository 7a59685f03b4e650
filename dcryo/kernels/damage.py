"""What an exposure to electrons leaves of the signal at each spatial frequency."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def critical_exposure_e_A2(k_1_A: ArrayLike, voltage_kV: float) -> NDArray[np.float64]:
    """Exposure, in electrons per square Angstrom, after which the signal at a spatial frequency falls to exp(-1/2).

    k_1_A: spatial frequencies in 1/A, any shape. 0.245 k^-1.665 + 2.81 at 300 kV, 0.8 of it at 200 kV (Grant &
    Grigorieff, eLife 4, e06980, 2015, eq. 3); at other voltages by the line through these two. Infinite at k = 0.
    """
    k = np.asarray(k_1_A, dtype=np.float64)
    with np.errstate(divide="ignore"):
        at_300_kV = 0.245 * k**-1.665 + 2.81
    return at_300_kV * max(0.8 + 0.2 * (voltage_kV - 200.0) / 100.0, 0.1)


def survival(k_1_A: ArrayLike, exposure_e_A2: ArrayLike, voltage_kV: float) -> NDArray[np.float64]:
    """Factor exp(-N / (2 Ne)) on the signal's amplitude after an exposure N, Ne the critical one (ibid., eq. 2).

    Arguments of shapes that go together; 1 at k = 0, where the mean density stays.
    """
    return np.exp(-0.5 * np.asarray(exposure_e_A2, dtype=np.float64) / critical_exposure_e_A2(k_1_A, voltage_kV))
