"""The motion of a movie as RELION's STAR files hold it, one file a movie.

Shifts bring a frame onto the first and are in pixels of the movie, whatever the binning of the micrograph; see
`dcryo.kernels.motion` for the local model. This file is what Bayesian polishing starts from.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dcryo.data import star_syntax
from dcryo.data.star_syntax import Block, write_blocks
from dcryo.errors import InputError

_COEFFICIENTS = 36
_POLYNOMIAL = 1
"""rlnMotionModelVersion of the polynomial with 18 coefficients an axis; 0 is none."""


@dataclass(frozen=True)
class MotionFile:
    """shape_px: (nx, ny) of the movie; binning: of the micrograph; frame_px: (F, 2), nan for a frame that was not used;
    coefficients: (2, 18) or None where there is no local model; hot_px: (N, 2) x and y from 0.

    dose_e_A2: of a frame; first_frame: from 1, the one that is 0 for the local model's polynomial in time. Numbers that
    a file does not have are 0, texts empty.
    """

    movie_path: str
    shape_px: tuple[int, int]
    frame_px: np.ndarray
    pixel_size_A: float
    coefficients: np.ndarray | None = None
    hot_px: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))
    gain_path: str = ""
    defect_path: str = ""
    binning: float = 1.0
    dose_e_A2: float = 0.0
    pre_dose_e_A2: float = 0.0
    voltage_kV: float = 0.0
    first_frame: int = 1
    eer_fraction: int = 0


# name, label, type: what data_general may hold besides the size.
_GENERAL = (
    ("movie_path", "rlnMicrographMovieName", str),
    ("gain_path", "rlnMicrographGainName", str),
    ("defect_path", "rlnMicrographDefectFile", str),
    ("binning", "rlnMicrographBinning", float),
    ("pixel_size_A", "rlnMicrographOriginalPixelSize", float),
    ("dose_e_A2", "rlnMicrographDoseRate", float),
    ("pre_dose_e_A2", "rlnMicrographPreExposure", float),
    ("voltage_kV", "rlnVoltage", float),
    ("first_frame", "rlnMicrographStartFrame", int),
    ("eer_fraction", "rlnEERGrouping", int),
)
_OPTIONAL = {"gain_path", "defect_path", "eer_fraction"}


def write_motion(path: str | Path, motion: MotionFile) -> None:
    """Write the motion as RELION 3.1 does, so that it reads it."""
    nx, ny = motion.shape_px
    general: dict[str, np.ndarray] = {
        "rlnImageSizeX": np.array([nx]),
        "rlnImageSizeY": np.array([ny]),
        "rlnImageSizeZ": np.array([len(motion.frame_px)]),
    }
    for name, label, _ in _GENERAL:
        value = getattr(motion, name)
        if value or name not in _OPTIONAL:
            general[label] = np.array([value])
    if motion.eer_fraction:
        general["rlnEERUpsampling"] = np.array([1])
    general["rlnMotionModelVersion"] = np.array([0 if motion.coefficients is None else _POLYNOMIAL])
    frames = np.flatnonzero(np.isfinite(motion.frame_px).all(axis=1))
    blocks = {
        "general": Block(general, is_loop=False),
        "global_shift": Block(
            {
                "rlnMicrographFrameNumber": frames + 1,
                "rlnMicrographShiftX": motion.frame_px[frames, 0],
                "rlnMicrographShiftY": motion.frame_px[frames, 1],
            }
        ),
    }
    if motion.coefficients is not None:
        blocks["local_motion_model"] = Block(
            {"rlnMotionModelCoeffsIdx": np.arange(_COEFFICIENTS), "rlnMotionModelCoeff": motion.coefficients.ravel()}
        )
    if len(motion.hot_px):
        blocks["hot_pixels"] = Block({"rlnCoordinateX": motion.hot_px[:, 0], "rlnCoordinateY": motion.hot_px[:, 1]})
    write_blocks(path, blocks)


def read_motion(path: str | Path) -> MotionFile:
    """Read the motion of a movie; InputError where a block, label or number is missing or wrong."""
    blocks = star_syntax.read_blocks(path)
    for name in ("general", "global_shift"):
        if name not in blocks:
            raise InputError(f"{path}: has no data_{name}; expected a movie's motion as RELION writes it")
    general = blocks["general"].columns
    nx, ny, n = (_numbers(path, general, f"rlnImageSize{axis}", int)[0] for axis in "XYZ")
    values: dict[str, Any] = {
        name: str(general[label][0]) if kind is str else kind(_numbers(path, general, label, kind)[0])
        for name, label, kind in _GENERAL
        if label in general
    }
    for name in ("movie_path", "pixel_size_A"):
        if name not in values:
            label = next(label for own, label, _ in _GENERAL if own == name)
            raise InputError(f"{path}: data_general has no _{label}; add it")
    table = blocks["global_shift"].columns
    numbers = _numbers(path, table, "rlnMicrographFrameNumber", int)
    first = np.array([values.get("first_frame", 1)])
    for label, found in (("rlnMicrographFrameNumber", numbers), ("rlnMicrographStartFrame", first)):
        outside = found[(found < 1) | (found > n)]
        if len(outside):
            raise InputError(f"{path}: _{label} is {outside[0]}; expected 1 to {n}, the frames of the movie")
    frame_px = np.full((int(n), 2), np.nan)
    for column, axis in enumerate("XY"):
        frame_px[numbers - 1, column] = _numbers(path, table, f"rlnMicrographShift{axis}", float)
    coefficients = None
    if "local_motion_model" in blocks:
        model = blocks["local_motion_model"].columns
        which = _numbers(path, model, "rlnMotionModelCoeffsIdx", int)
        if not np.array_equal(np.sort(which), np.arange(_COEFFICIENTS)):
            raise InputError(f"{path}: data_local_motion_model has coefficients {which.tolist()}; expected 0 to 35")
        coefficients = np.empty((2, _COEFFICIENTS // 2))
        coefficients.flat[which] = _numbers(path, model, "rlnMotionModelCoeff", float)
    hot = np.empty((0, 2))
    if "hot_pixels" in blocks:
        columns = blocks["hot_pixels"].columns
        hot = np.stack([_numbers(path, columns, f"rlnCoordinate{axis}", float) for axis in "XY"], axis=1)
    return MotionFile(shape_px=(int(nx), int(ny)), frame_px=frame_px, coefficients=coefficients, hot_px=hot, **values)


def _numbers(path: str | Path, columns: dict[str, np.ndarray], label: str, kind: type) -> np.ndarray:
    if label not in columns:
        raise InputError(f"{path}: has no _{label}; expected a movie's motion as RELION writes it")
    try:
        values = columns[label].astype(np.float64)
    except ValueError:
        raise InputError(f"{path}: _{label} is not a number in every row; correct it") from None
    if not np.isfinite(values).all() or (kind is int and (values != np.rint(values)).any()):
        raise InputError(
            f"{path}: _{label} has values that are not {'whole' if kind is int else 'finite'}; correct them"
        )
    return values.astype(np.int64) if kind is int else values
