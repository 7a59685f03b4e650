"""The one table of fields: each quantity of a particle, a micrograph or an optics group, and its name in every format.

`star.py` and `cs.py` are driven by these rows. A conversion that is more than a factor and an offset (Euler
angles, image names, shifts in pixels, fractions of a micrograph) is found by the field's name in the module
of the format.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

_DEG = 180.0 / math.pi


@dataclass(frozen=True)
class Field:
    """One quantity.

    `dtype` is a numpy type ("U" for text) and `shape` that of one entry. `star` lists the labels it is
    written as, one per component; `star_also` is a label read in their place where they are absent. In a .cs
    file it is the field `cs` of type `cs_dtype`, and `cs_scale * (number in the file) + cs_offset` here.
    `values` says which numbers are accepted ("positive": finite and above 0); `lowest` and `highest` bound
    integers. A `shape` of (None,) is a list of any length, one label in a STAR file, `[c0,c1,...]`: in a table of
    several, shorter lists are followed by zeros.
    """

    name: str
    table: Literal["particles", "micrographs", "optics"]
    dtype: str
    unit: str
    meaning: str
    shape: tuple[int | None, ...] = ()
    star: tuple[str, ...] = ()
    star_also: str = ""
    cs: str = ""
    cs_dtype: str = "<f4"
    cs_scale: float = 1.0
    cs_offset: float = 0.0
    values: Literal["any", "finite", "positive"] = "finite"
    lowest: int | None = None
    highest: int | None = None


def _particle(name: str, dtype: str, unit: str, meaning: str, **rest: Any) -> Field:
    return Field(name, "particles", dtype, unit, meaning, **rest)


def _micrograph(name: str, dtype: str, unit: str, meaning: str, **rest: Any) -> Field:
    return Field(name, "micrographs", dtype, unit, meaning, **rest)


def _optics(name: str, dtype: str, unit: str, meaning: str, **rest: Any) -> Field:
    return Field(name, "optics", dtype, unit, meaning, **rest)


# fmt: off
FIELDS: tuple[Field, ...] = (
    _particle("uid", "u8", "", "identity of the particle", cs="uid", cs_dtype="<u8"),
    _particle("image_path", "U", "", "stack as named in the source, empty if there is none",
              star=("rlnImageName",), cs="blob/path"),
    _particle("image_index", "i8", "", "image in its stack, from 0",
              star=("rlnImageName",), cs="blob/idx", cs_dtype="<u4", lowest=0),
    _particle("image_sign", "i1", "", "1 if particles are white on dark, -1 if dark on white; 1 where absent",
              cs="blob/sign", lowest=-1, highest=1),
    _particle("micrograph", "U", "", "micrograph as named in the source",
              star=("rlnMicrographName",), cs="location/micrograph_path"),
    _particle("coordinate_px", "f8", "px", "x and y in the micrograph, from its first column and row",
              shape=(2,), star=("rlnCoordinateX", "rlnCoordinateY"), cs="location/center_x_frac"),
    _particle("optics_row", "i4", "", "row of the optics table, from 0",
              star=("rlnOpticsGroup",), cs="ctf/exp_group_id", cs_dtype="<u4", lowest=0),
    _particle("defocus_u_A", "f8", "A", "defocus along one axis, positive for underfocus",
              star=("rlnDefocusU",), cs="ctf/df1_A"),
    _particle("defocus_v_A", "f8", "A", "defocus along the other axis",
              star=("rlnDefocusV",), cs="ctf/df2_A"),
    _particle("defocus_angle_deg", "f8", "deg", "from x towards the axis of U",
              star=("rlnDefocusAngle",), cs="ctf/df_angle_rad", cs_scale=_DEG),
    _particle("phase_shift_deg", "f8", "deg", "phase shift of a phase plate; 0 where absent",
              star=("rlnPhaseShift",), cs="ctf/phase_shift_rad", cs_scale=_DEG),
    _particle("ctf_bfactor_A2", "f8", "A2", "B factor of the CTF's envelope; 0 where absent",
              star=("rlnCtfBfactor",), cs="ctf/bfactor"),
    _particle("ctf_scale", "f8", "", "factor of the CTF; 1 where absent",
              star=("rlnCtfScalefactor",), cs="ctf/scale"),
    _particle("rotation", "f8", "", "matrix that takes volume to image coordinates", shape=(3, 3),
              star=("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), cs="alignments3D/pose"),
    _particle("origin_A", "f8", "A", "x and y of the shift that brings the image onto the reference",
              shape=(2,), star=("rlnOriginXAngst", "rlnOriginYAngst"), cs="alignments3D/shift"),
    _particle("half", "i1", "", "half set, 1 or 2; 0 unknown", star=("rlnRandomSubset",),
              cs="alignments3D/split", cs_dtype="<u4", cs_offset=1.0, lowest=0, highest=2),
    _particle("class_number", "i4", "", "class, from 1; 0 none", star=("rlnClassNumber",),
              cs="alignments3D/class", cs_dtype="<u4", cs_offset=1.0, lowest=0),
    _particle("class_probability", "f8", "", "posterior probability of the class", star=("dcryoClassProbability",)),
    _particle("norm_correction", "f8", "", "factor of the image's grey values; 1 where absent",
              star=("rlnNormCorrection",)),
    _particle("log_likelihood", "f8", "", "contribution to the log-likelihood",
              star=("rlnLogLikeliContribution",), values="any"),
    _particle("max_probability", "f8", "", "largest posterior probability of a pose",
              star=("rlnMaxValueProbDistribution",), values="any"),
    _particle("significant_poses", "i8", "", "number of modes that hold most of the posterior",
              star=("rlnNrOfSignificantSamples",)),
    _particle("symmetry_copy", "i4", "", "which operator of the group turned the pose in an expansion, from 0",
              star=("dcryoSymmetryCopy",), lowest=0),
    _particle("box_moved_px", "i8", "px", "x and y by which the image was moved off the original one's centre",
              shape=(2,), star=("dcryoBoxMovedX", "dcryoBoxMovedY")),
    _micrograph("path", "U", "", "micrograph", star=("rlnMicrographName",)),
    _micrograph("movie_path", "U", "", "movie that it was summed from", star=("rlnMicrographMovieName",)),
    _micrograph("motion_path", "U", "", "STAR file of its motion", star=("rlnMicrographMetadata",)),
    _micrograph("optics_row", "i4", "", "row of the optics table, from 0", star=("rlnOpticsGroup",), lowest=0),
    _micrograph("motion_total_A", "f8", "A", "length of the whole-frame track", star=("rlnAccumMotionTotal",)),
    _micrograph("motion_early_A", "f8", "A", "the same of the frames up to 4 e/A2", star=("rlnAccumMotionEarly",)),
    _micrograph("motion_late_A", "f8", "A", "the same of the frames after them", star=("rlnAccumMotionLate",)),
    _micrograph("defocus_u_A", "f8", "A", "defocus along one axis, positive for underfocus", star=("rlnDefocusU",)),
    _micrograph("defocus_v_A", "f8", "A", "defocus along the other axis, at most that of U", star=("rlnDefocusV",)),
    _micrograph("defocus_angle_deg", "f8", "deg", "from x towards the axis of U", star=("rlnDefocusAngle",)),
    _micrograph("phase_shift_deg", "f8", "deg", "phase shift of a phase plate", star=("rlnPhaseShift",)),
    _micrograph("ctf_score", "f8", "", "correlation of the power spectrum with the fitted CTF's",
                star=("rlnCtfFigureOfMerit",), values="any"),
    _micrograph("ctf_resolution_A", "f8", "A", "resolution to which the fit holds",
                star=("rlnCtfMaxResolution",), values="any"),
    _micrograph("ctf_image_path", "U", "", "power spectrum and fit, side by side", star=("rlnCtfImage",)),
    _micrograph("coordinates_path", "U", "", "STAR file of its picks", star=("rlnMicrographCoordinates",)),
    _micrograph("picks", "i8", "", "number of picks", star=("dcryoPicks",), lowest=0),
    _micrograph("flag", "U", "", "why it should not be used; empty where it may", star=("dcryoFlag",)),
    _optics("name", "U", "", "name of the optics group", star=("rlnOpticsGroupName",)),
    _optics("group", "i4", "", "the file's number of the optics group",
            star=("rlnOpticsGroup",), cs="ctf/exp_group_id", cs_dtype="<u4", lowest=0),
    _optics("voltage_kV", "f8", "kV", "acceleration voltage",
            star=("rlnVoltage",), cs="ctf/accel_kv", values="positive"),
    _optics("spherical_aberration_mm", "f8", "mm", "spherical aberration",
            star=("rlnSphericalAberration",), cs="ctf/cs_mm"),
    _optics("amplitude_contrast", "f8", "", "fraction of amplitude contrast",
            star=("rlnAmplitudeContrast",), cs="ctf/amp_contrast"),
    _optics("pixel_size_A", "f8", "A", "pixel size of the images",
            star=("rlnImagePixelSize",), star_also="rlnPixelSize", cs="blob/psize_A", values="positive"),
    _optics("box_px", "i4", "px", "side of the images",
            star=("rlnImageSize",), cs="blob/shape", cs_dtype="<u4", lowest=1),
    _optics("micrograph_pixel_size_A", "f8", "A", "pixel size of the micrographs",
            star=("rlnMicrographPixelSize",), cs="location/micrograph_psize_A", values="positive"),
    _optics("micrograph_original_pixel_size_A", "f8", "A", "pixel size of the movies",
            star=("rlnMicrographOriginalPixelSize",), values="positive"),
    _optics("beam_tilt_x_mrad", "f8", "mrad", "beam tilt along x", star=("rlnBeamTiltX",)),
    _optics("beam_tilt_y_mrad", "f8", "mrad", "beam tilt along y", star=("rlnBeamTiltY",)),
    _optics("odd_zernike", "f8", "rad", "odd aberrations, coefficients of Zernike polynomials of 1/A",
            shape=(None,), star=("rlnOddZernike",)),
    _optics("even_zernike", "f8", "rad", "even aberrations beside defocus and Cs, likewise",
            shape=(None,), star=("rlnEvenZernike",)),
    _optics("magnification", "f8", "", "matrix that takes frequencies of the image to those of the specimen",
            shape=(2, 2), star=("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")),
)
# fmt: on

PARTICLE_FIELDS: dict[str, Field] = {field.name: field for field in FIELDS if field.table == "particles"}
MICROGRAPH_FIELDS: dict[str, Field] = {field.name: field for field in FIELDS if field.table == "micrographs"}
OPTICS_FIELDS: dict[str, Field] = {field.name: field for field in FIELDS if field.table == "optics"}


def expected(field: Field) -> str:
    """What the field accepts, in words for an error message."""
    if field.dtype[0] in "iu":
        low, high = _bounds(field)
        return f"a whole number from {low} to {high}"
    return {"any": "a number", "finite": "a finite number", "positive": "a number above 0"}[field.values]


def first_refused(field: Field, values: np.ndarray) -> int | None:
    """Row of the first of `values` (N, ...), float64, that the field refuses; None if all are fine."""
    accepted = np.ones(len(values), bool) if field.values == "any" else np.isfinite(values)
    if field.values == "positive":
        accepted &= values > 0
    if field.dtype[0] in "iu":
        low, high = _bounds(field)
        accepted &= (values == np.rint(values)) & (values >= low) & (values <= high)
    refused = np.flatnonzero(~accepted.all(axis=tuple(range(1, accepted.ndim))))
    return int(refused[0]) if len(refused) else None


def _bounds(field: Field) -> tuple[int, int]:
    # float64 holds whole numbers up to 2^53 exactly.
    limits = np.iinfo(field.dtype)
    low = field.lowest if field.lowest is not None else max(int(limits.min), -(2**53))
    high = field.highest if field.highest is not None else min(int(limits.max), 2**53)
    return low, high
