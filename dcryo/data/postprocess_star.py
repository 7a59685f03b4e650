"""The STAR file of RELION's post-processing, which its other programs take masks, half maps and FSC from."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dcryo.data.star_syntax import Block, read_blocks, write_blocks
from dcryo.errors import InputError

FSC_COLUMNS = {
    "fsc_corrected": "rlnFourierShellCorrelationCorrected",
    "fsc_unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "fsc_masked": "rlnFourierShellCorrelationMaskedMaps",
    "fsc_randomised": "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
}
GUINIER_COLUMNS = {
    "resolution_squared_1_A2": "rlnResolutionSquared",
    "original": "rlnLogAmplitudesOriginal",
    "weighted": "rlnLogAmplitudesWeighted",
    "sharpened": "rlnLogAmplitudesSharpened",
    "intercept": "rlnLogAmplitudesIntercept",
}
GENERAL_COLUMNS = {
    "resolution_A": "rlnFinalResolution",
    "bfactor_A2": "rlnBfactorUsedForSharpening",
    "half1": "rlnUnfilteredMapHalf1",
    "half2": "rlnUnfilteredMapHalf2",
    "mask": "rlnMaskName",
    "randomised_from_A": "rlnRandomiseFrom",
    "slope_A2": "rlnFittedSlopeGuinierPlot",
    "intercept": "rlnFittedInterceptGuinierPlot",
    "correlation": "rlnCorrelationFitGuinierPlot",
}
# RELION's value where a logarithm does not exist, and its resolution of shell 0.
_NO_LOGARITHM, _NO_RESOLUTION_A = -99.0, 999.0


def write_postprocess_star(
    path: Path,
    box_px: int,
    pixel_size_A: float,
    general: Mapping[str, float | str],
    curves: Mapping[str, np.ndarray],
    guinier: Mapping[str, np.ndarray],
) -> None:
    """Write the tables data_general, data_fsc and data_guinier.

    general: values by the names of GENERAL_COLUMNS, those that are known. curves, guinier: (S,) each by the names of
    FSC_COLUMNS and GUINIER_COLUMNS but for resolution_squared_1_A2; a logarithm that does not exist is -inf or NaN.
    """
    shells = np.arange(box_px // 2 + 1)
    frequency = shells / (box_px * pixel_size_A)
    resolution = np.divide(1.0, frequency, out=np.full(len(shells), _NO_RESOLUTION_A), where=frequency > 0)
    fsc = {"rlnSpectralIndex": shells, "rlnResolution": frequency, "rlnAngstromResolution": resolution}
    fsc |= {label: curves[name] for name, label in FSC_COLUMNS.items()}
    logarithms = {GUINIER_COLUMNS["resolution_squared_1_A2"]: frequency**2}
    for name, values in guinier.items():
        logarithms[GUINIER_COLUMNS[name]] = np.where(np.isfinite(values), values, _NO_LOGARITHM)
    row = {GENERAL_COLUMNS[name]: np.array([value]) for name, value in general.items()}
    write_blocks(path, {"general": Block(row, is_loop=False), "fsc": Block(fsc), "guinier": Block(logarithms)})


def read_postprocess_star(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The general values as text, the curves (S,) with frequency_1_A, and the Guinier plot, by the names above.

    InputError where a table or a column is not there, or holds something else than numbers.
    """
    blocks = read_blocks(path)
    missing = [name for name in ("general", "fsc", "guinier") if name not in blocks]
    if missing:
        raise InputError(f"{path}: has no table data_{missing[0]}; expected the result of a post-processing by RELION")

    def numbers(table: str, labels: Mapping[str, str]) -> dict[str, np.ndarray]:
        columns = blocks[table].columns
        absent = [label for label in labels.values() if label not in columns]
        if absent:
            raise InputError(f"{path}: data_{table} has no column _{absent[0]}; add it")
        try:
            return {name: columns[label].astype(np.float64) for name, label in labels.items()}
        except ValueError as error:
            raise InputError(f"{path}: data_{table} is not of numbers ({error}); correct it") from error

    general = {name: str(blocks["general"].columns[label][0]) for name, label in GENERAL_COLUMNS.items()
               if label in blocks["general"].columns}  # fmt: skip
    curves = numbers("fsc", {"frequency_1_A": "rlnResolution", **FSC_COLUMNS})
    curves["frequency_1_A"][0] = 0.0  # RELION writes 1 / 999 A
    guinier = numbers("guinier", {name: label for name, label in GUINIER_COLUMNS.items()
                                  if label in blocks["guinier"].columns})  # fmt: skip
    for name, values in guinier.items():
        if name != "resolution_squared_1_A2":
            values[values <= _NO_LOGARITHM] = np.nan
    return general, curves, guinier
