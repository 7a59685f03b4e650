"""Estimation of the CTF of micrographs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from dcryo.cluster import check_kind, connect
from dcryo.data import micrographs
from dcryo.data.items import Found, Item
from dcryo.data.mrc import StackWriter
from dcryo.data.particles import Micrographs
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.micrographs import (
    MicrographOptions,
    WatchOptions,
    await_table,
    flagged,
    load_micrographs,
    work_through,
)
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress
from dcryo.steps import ctf as steps
from dcryo.steps.ctf import Estimate, Optics, Wanted

_PICTURE_PX = 300
_SPECTRA = "rlnCtfPowerSpectrum"


class CtfOptions(OutOptions, ClusterOptions, WatchOptions, MicrographOptions):
    """Fit the CTF to the Thon rings of each micrograph, and flag those without.

    Writes micrographs.star and, per micrograph, NAME_ctf.mrc: its spectrum on the left, the fitted CTF on the right.
    """

    lowest_resolution_A: float = Field(30.0, gt=0, description="where the fit begins")
    highest_resolution_A: float | None = Field(
        None, gt=0, description="where the fit ends (default: as far as the rings hold)"
    )
    min_defocus_A: float = Field(1000.0, gt=0, description="smallest defocus that is searched")
    max_defocus_A: float = Field(50000.0, gt=0, description="largest defocus that is searched")
    astigmatism_A: float = Field(500.0, gt=0, description="expected astigmatism; four times that is flagged")
    phase_plate: bool = Field(False, description="fit the phase shift too")
    min_phase_shift_deg: float = Field(0.0, description="smallest phase shift that is searched")
    max_phase_shift_deg: float = Field(180.0, description="largest phase shift that is searched, at most 180 more")
    tile_px: int | None = Field(None, ge=64, description="side of the tiles of a spectrum (default: 1000 A)")
    local: int = Field(0, ge=0, le=20, description="patches along each side whose defocus is estimated too")
    power_spectra: bool = Field(
        False, description=f"fit the amplitude spectra that the STAR file names ({_SPECTRA}) in place of the images"
    )

    @model_validator(mode="after")
    def _ranges(self) -> "CtfOptions":
        for low, high, what in (
            (self.min_defocus_A, self.max_defocus_A, "--max-defocus: must be above --min-defocus"),
            (self.min_phase_shift_deg, self.max_phase_shift_deg, "--max-phase-shift: must be above --min-phase-shift"),
            (
                self.highest_resolution_A or 0.0,
                self.lowest_resolution_A / 1.5,
                "--highest-resolution: must be finer than two thirds of --lowest-resolution",
            ),
        ):
            if low >= high:
                raise ValueError(what)
        if self.max_phase_shift_deg - self.min_phase_shift_deg > 180.0:
            raise ValueError(
                "--max-phase-shift: may be 180 degrees above --min-phase-shift, from where on rings repeat"
            )
        if self.power_spectra and (self.local or self.tile_px):
            raise ValueError("--power-spectra: spectra are not cut in tiles; leave out --local and --tile")
        return self

    def wanted(self) -> Wanted:
        """What is looked for in each micrograph."""
        phases = (self.min_phase_shift_deg, self.max_phase_shift_deg) if self.phase_plate else (0.0, 0.0)
        return Wanted(
            lowest_resolution_A=self.lowest_resolution_A,
            highest_resolution_A=self.highest_resolution_A,
            defocus_A=(self.min_defocus_A, self.max_defocus_A),
            phase_deg=phases,
            astigmatism_A=self.astigmatism_A,
            tile_px=self.tile_px,
            local=self.local,
        )


@dataclass(frozen=True)
class CtfResult:
    """Estimates of micrographs. micrographs: the table as written; flagged: how many should not be used."""

    out: Path
    micrographs: Micrographs
    flagged: int
    median_resolution_A: float | None

    def summary(self) -> str:
        good = len(self.micrographs) - self.flagged
        text = f"{self.out}: {good} of {len(self.micrographs)} micrographs are good"
        return (
            text if self.median_resolution_A is None else f"{text}; rings to {self.median_resolution_A:.2f} A (median)"
        )


@dataclass(frozen=True)
class _Micrograph(Item):
    """A micrograph, or its spectrum, with its optics."""

    optics: Optics


def ctf(options: CtfOptions, *, progress: Progress = print) -> CtfResult:
    """Estimate; see `CtfOptions`. InputError for bad input, before work starts."""
    check_kind(options.cluster)
    if options.watch:
        await_table(options, options.out, progress)
    _load(options)
    run = Run.start(
        options.out, "ctf", options.model_dump(), resume=options.resume, overwrite=options.overwrite, growing=True
    )
    with run, connect(options.cluster, options.workers) as cluster:

        def told(found: dict[str, Found]) -> None:
            if found:
                micrographs.write_micrographs(run.path / "micrographs.star", _table(options, found))
            run.flag(flagged(found))

        progress(f"{len(_load(options)[1])} micrographs, on {cluster.description}")
        found = work_through(
            run,
            lambda: _load(options)[1],
            estimate_item,
            (run.path, options.wanted(), options.power_spectra),
            cluster,
            options.watch,
            told,
            progress,
        )
        result = _result(options, found)
        run.done(
            {
                "micrographs": len(result.micrographs),
                "flagged": result.flagged,
                "resolution_median_A": result.median_resolution_A,
                "defocus_median_A": _median(found, "defocus_u_A", "defocus_v_A"),
                "astigmatism_median_A": _median(found, "astigmatism_A"),
                "score_median": _median(found, "ctf_score"),
            }
        )
    return result


def _load(options: CtfOptions) -> tuple[Micrographs, list[_Micrograph]]:
    """The table, and an item of each row. InputError where its optics are missing."""
    table, items = load_micrographs(options)
    source = options.micrographs[0]
    image_files = source.suffix != ".star"
    for name, option, label in (
        ("voltage_kV", "--voltage", "rlnVoltage"),
        ("spherical_aberration_mm", "--spherical-aberration", "rlnSphericalAberration"),
        ("amplitude_contrast", "--amplitude-contrast", "rlnAmplitudeContrast"),
        ("micrograph_pixel_size_A", "--pixel-size", "rlnMicrographPixelSize"),
    ):
        if name not in table.optics:
            told = f"give {option}" if image_files else f"add the column _{label} to its data_optics"
            raise InputError(f"{source}: nothing says the {name}; {told}")
    if options.power_spectra:
        items = _spectra(table, items, source)
    of = [table.optics_of(name).tolist() for name in ("micrograph_pixel_size_A", "voltage_kV")]
    of += [table.optics_of(name).tolist() for name in ("spherical_aberration_mm", "amplitude_contrast")]
    return table, [
        _Micrograph(item.name, item.source, Optics(*optics)) for item, *optics in zip(items, *of, strict=True)
    ]


def _spectra(table: Micrographs, items: list[Item], source: Path) -> list[Item]:
    """The micrographs' items with the files of their spectra."""
    if _SPECTRA not in table.extra:
        raise InputError(f"{source}: has no column _{_SPECTRA}; leave out --power-spectra to use the images")
    return [
        Item(item.name, micrographs.find(name, source))
        for item, name in zip(items, table.extra[_SPECTRA].tolist(), strict=True)
    ]


def estimate_item(item: _Micrograph, run: Path, wanted: Wanted, power_spectra: bool) -> Found:
    """The task: read a micrograph or spectrum, fit it, leave NAME_ctf.mrc in the run's directory."""
    image = micrographs.read_image(item.source)
    if power_spectra:
        pixel_size_A = micrographs.pixel_size_A(item.source)
        if not pixel_size_A:
            raise InputError(f"{item.source}: the header says no pixel size, which a spectrum needs")
        if image.shape[0] != image.shape[1]:
            raise InputError(
                f"{item.source}: is {image.shape[1]} x {image.shape[0]} pixels; expected a square spectrum"
            )
        optics = Optics(pixel_size_A, *_without_pixel(item.optics))
        found = steps.estimate_of_spectrum(image, optics, wanted)
    else:
        found = steps.estimate(image, item.optics, wanted)
    if isinstance(found, str):
        return Found({}, flag=found)
    path = run / f"{item.name}_ctf.mrc"
    side = len(found.picture)
    with StackWriter(path, 1, side, 1.0 / (side * found.step_1_A)) as stack:
        stack.write(0, found.picture[None])
    return Found(_values(found, path), _arrays(found), found.flag)


def _without_pixel(optics: Optics) -> tuple[float, float, float]:
    return optics.voltage_kV, optics.spherical_aberration_mm, optics.amplitude_contrast


def _values(found: Estimate, path: Path) -> dict[str, Any]:
    resolution_A = found.resolution_A if np.isfinite(found.resolution_A) else None
    return {
        "defocus_u_A": found.defocus_u_A,
        "defocus_v_A": found.defocus_v_A,
        "defocus_angle_deg": found.defocus_angle_deg,
        "phase_shift_deg": found.phase_shift_deg,
        "defocus_error_A": found.defocus_error_A,
        "astigmatism_A": found.astigmatism_A,
        "ctf_score": found.score,
        "ctf_resolution_A": resolution_A,
        "standing_out": found.standing_out,
        "ice": found.ice,
        "tilt_hint_A": found.tilt_A,
        "tilt_hint_deg": found.tilt_deg,
        "local": [vars(patch) for patch in found.local],
        "ctf_image_path": path.as_posix(),
    }


def _arrays(found: Estimate) -> dict[str, np.ndarray]:
    """What the report shows of a micrograph."""
    curves = found.curves
    last = len(curves.rings)
    return {
        "picture": _smaller(_middle(found)).astype(np.float16),
        "frequency_1_A": (np.arange(last) * found.step_1_A).astype(np.float32),
        "spectrum": curves.rings.astype(np.float32),
        "fit": curves.fit.astype(np.float32),
        "quality": curves.quality.astype(np.float32),
    }


def _middle(found: Estimate) -> np.ndarray:
    """The picture to a little beyond where the rings hold, or to 6 A."""
    middle = len(found.picture) // 2
    shown = min(middle, int(1.25 / (min(found.resolution_A, 6.0) * found.step_1_A)))
    return found.picture[middle - shown : middle + shown + 1, middle - shown : middle + shown + 1]


def _smaller(picture: np.ndarray) -> np.ndarray:
    """The picture with an odd number of pixels averaged into one, so that the origin stays in the middle."""
    factor = 1
    while len(picture) / factor > _PICTURE_PX:
        factor += 2
    half = (len(picture) // 2 - factor // 2) // factor
    middle, reach = len(picture) // 2, half * factor + factor // 2
    cut = picture[middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]
    return np.asarray(cut.reshape(2 * half + 1, factor, 2 * half + 1, factor).mean(axis=(1, 3)))


_COLUMNS = ("defocus_u_A", "defocus_v_A", "defocus_angle_deg", "ctf_score", "ctf_resolution_A")


def _table(options: CtfOptions, found: dict[str, Found]) -> Micrographs:
    """The rows of the input, in their order, of which something was found, with what was found.

    A number that was not found, of a micrograph that is flagged, is 0 in the table, since the format has no other word.
    """
    table, items = _load(options)
    rows = [row for row, item in enumerate(items) if item.name in found]
    of = [found[items[row].name] for row in rows]
    names = [*_COLUMNS, "phase_shift_deg"] if options.phase_plate else list(_COLUMNS)
    columns = {name: np.array([float(one.values.get(name) or 0.0) for one in of]) for name in names}
    columns["ctf_image_path"] = np.array([str(one.values.get("ctf_image_path", "")) for one in of])
    before = table["flag"][rows].tolist() if "flag" in table else [""] * len(rows)
    columns["flag"] = np.array([earlier or one.flag for earlier, one in zip(before, of, strict=True)])
    return table.take(np.array(rows)).replace(**columns)


def _result(options: CtfOptions, found: dict[str, Found]) -> CtfResult:
    table = _table(options, found)
    return CtfResult(options.out, table, int(np.count_nonzero(table["flag"] != "")), _median(found, "ctf_resolution_A"))


def _median(found: dict[str, Found], *names: str) -> float | None:
    """Median over the micrographs that are not flagged of the mean of their values."""
    good = [one.values for one in found.values() if not one.flag]
    return float(np.median([np.mean([values[name] for name in names]) for values in good])) if good else None
