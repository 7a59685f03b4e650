"""How the specimen moves during a movie, in the STAR files of RELION's motion correction."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcryo.data.star_syntax import Block, read_blocks, write_blocks
from dcryo.errors import InputError

COEFFICIENTS = 18
"""Of one axis: (1, x, x^2, y, y^2, x y), each times (t, t^2, t^3)."""


@dataclass(frozen=True)
class Track:
    """Motion of a movie of F frames, in pixels of its frames.

    whole_px: (F, 2) x and y, the shift that brings each frame onto the first; local_px: (2, 18), for x and y, the
    polynomial of what is added to it over the field (see `dcryo.kernels.warp`), 0 everywhere in the first frame. The
    specimen at r in the first frame lies at r - whole - local(r) in another.
    """

    whole_px: np.ndarray
    local_px: np.ndarray


def read_track(path: str | Path) -> tuple[Track, float]:
    """A movie's track and its pixel size in A (0.0 where the file has none), from RELION's file of its motion.

    A file without a local model has one of zeros. Raises InputError where the whole-frame shifts are missing, or a
    value is no finite number.
    """
    blocks = read_blocks(path)
    if "global_shift" not in blocks:
        raise InputError(f"{path}: has no data_global_shift; expected the STAR file of a movie's motion")
    whole = np.stack([_numbers(path, blocks, "global_shift", f"rlnMicrographShift{axis}") for axis in "XY"], axis=1)
    local = np.zeros((2, COEFFICIENTS))
    if len(blocks.get("local_motion_model", ())):
        coefficients = _numbers(path, blocks, "local_motion_model", "rlnMotionModelCoeff")
        if len(coefficients) != local.size:
            raise InputError(
                f"{path}: data_local_motion_model has {len(coefficients)} coefficients; expected {local.size}"
            )
        local = coefficients.reshape(local.shape)
    general = blocks.get("general", Block({}))
    known = "rlnMicrographOriginalPixelSize" in general.columns
    pixel_size_A = float(_numbers(path, blocks, "general", "rlnMicrographOriginalPixelSize")[0]) if known else 0.0
    return Track(whole, local), pixel_size_A


def _numbers(path: str | Path, blocks: Mapping[str, Block], name: str, label: str) -> np.ndarray:
    columns = blocks[name].columns
    if label not in columns:
        raise InputError(f"{path}: data_{name} has no column _{label}; expected the STAR file of a movie's motion")
    try:
        values = columns[label].astype(np.float64)
    except ValueError:
        values = np.array([np.nan])
    if not np.isfinite(values).all():
        raise InputError(f"{path}: data_{name}, _{label} holds a value that is no finite number; correct it")
    return values


def write_track(
    path: str | Path, track: Track, general: Mapping[str, str | float | int], hot_pixels: np.ndarray
) -> None:
    """Write a track as RELION's motion correction does.

    general: label -> value of data_general, such as rlnMicrographMovieName; hot_pixels: (n, 2) column and row from 0.
    """
    frames = np.arange(1, len(track.whole_px) + 1)
    blocks = {
        "general": Block({label: np.array([value]) for label, value in general.items()}, is_loop=False),
        "global_shift": Block(
            {
                "rlnMicrographFrameNumber": frames,
                "rlnMicrographShiftX": track.whole_px[:, 0],
                "rlnMicrographShiftY": track.whole_px[:, 1],
            }
        ),
        "local_motion_model": Block(
            {"rlnMotionModelCoeffsIdx": np.arange(track.local_px.size), "rlnMotionModelCoeff": track.local_px.ravel()}
        ),
    }
    if len(hot_pixels):
        columns = {"rlnCoordinateX": hot_pixels[:, 0], "rlnCoordinateY": hot_pixels[:, 1]}
        blocks["hot_pixels"] = Block({label: values.astype(np.float64) for label, values in columns.items()})
    write_blocks(path, blocks)
