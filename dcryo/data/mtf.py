"""The modulation transfer function of a detector, as RELION keeps it in a STAR file."""

from pathlib import Path

import numpy as np

from dcryo.data.star_syntax import read_blocks
from dcryo.errors import InputError

_FREQUENCY, _VALUE = "rlnResolutionInversePixel", "rlnMtfValue"


def read_mtf(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Spatial frequency in cycles per pixel of the detector, rising, and the MTF at it, (n,) float64 each.

    InputError where there is no such table, or its values are no MTF.
    """
    found = [block.columns for block in read_blocks(path).values() if {_FREQUENCY, _VALUE} <= block.columns.keys()]
    if not found:
        raise InputError(f"{path}: has no table with _{_FREQUENCY} and _{_VALUE}; expected the MTF of a detector")
    try:
        frequency, value = (found[0][name].astype(np.float64) for name in (_FREQUENCY, _VALUE))
    except ValueError as error:
        raise InputError(f"{path}: not a table of numbers ({error}); correct it") from error
    wrong = np.flatnonzero(~(np.isfinite(value) & (value > 0) & (value <= 1.5)))
    if len(wrong):
        raise InputError(
            f"{path}, row {wrong[0] + 1}, _{_VALUE}: found {value[wrong[0]]:g}; expected more than 0 and at most 1"
        )
    if len(frequency) < 2 or not np.all(np.diff(frequency) > 0) or frequency[0] < 0:
        raise InputError(f"{path}: _{_FREQUENCY} does not rise from 0; expected cycles per pixel of the detector")
    return frequency, value
