"""A map against an atomic model: their FSC, and how well the map resolves each residue."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dcryo.data import mrc
from dcryo.data.curves import read_curves, write_curves
from dcryo.data.model import AtomicModel, read_model, write_moved
from dcryo.data.residues import read_residues, write_residues
from dcryo.data.run import FITTED_MODEL, Run
from dcryo.errors import InputError
from dcryo.euler import euler_from_matrix
from dcryo.jobs.dataset import mask_edge_px
from dcryo.jobs.given_maps import HalfMaps, check_cubes_alike, first_voxel_A, load_half_maps, placed_A
from dcryo.jobs.options import OutOptions, Progress, argument
from dcryo.kernels import density, fsc, resolvability, shells, solvent
from dcryo.kernels.likeness import likeness
from dcryo.steps import map_model

# Maps of a run, the best to look at first.
_MAPS = ("map_sharp.mrc", "map_local.mrc", "map.mrc")
# The mask reaches so far beyond the atoms before its edge.
_EXTEND_A = 3.0
# Below this correlation at low resolution a model does not lie in a map.
_MISPLACED = 0.3
# A mirror image, or another place, that fits better by this factor is called out, a place also by this distance; but
# only where it fits at all: outlines alone correlate by 0.1.
_BETTER, _AWAY_PX, _FITS = 1.1, 0.5, 0.25
# A model that correlates by 0.5 with a map only up to a resolution that is so many times coarser does not fit it.
_COARSER = 2.0
_LISTED = 20


class MapModelOptions(OutOptions):
    """Compare a map with an atomic model: FSC, Q-scores of atoms, and a table of residues.

    The model has to lie in the map, in the frame of the map's header, unless --fit is given. Writes fsc.csv,
    residues.csv, residues.star, model.mrc (the model's density) and a report, with --fit also model_fitted.cif.
    """

    source: Path = argument("a map, or the directory of a run that has one")
    model: Path = argument("atomic model (.pdb, .cif)")
    half1: Path | None = Field(None, description="first half map, the one that the model was refined in if it was one")
    half2: Path | None = Field(None, description="second half map (default: the first's name with half2 for half1)")
    assembly: str | None = Field(None, description="biological assembly of the model to build (default: as it is)")
    fit: bool = Field(False, description="move the model into the map first, wherever it is")
    fit_resolution_A: float = Field(8.0, gt=0, description="resolution up to which --fit compares")
    resolution_A: float | None = Field(
        None, gt=0, description="the map's resolution (default: that of the run, or of the half maps inside the model)"
    )


@dataclass(frozen=True)
class MapModelResult:
    """curves: by their names in fsc.csv, (D // 2 + 1,) each; resolutions in Angstrom where map and model correlate by
    0.143 and 0.5; q: mean over the atoms; expected_q: of proteins at the map's resolution, None where it is unknown;
    residues: the columns of residues.csv; warnings: sentences on what is wrong."""

    out: Path
    curves: dict[str, np.ndarray]
    resolution_A: float
    resolution_half_A: float
    q: float
    expected_q: float | None
    residues: dict[str, np.ndarray]
    warnings: tuple[str, ...]

    def summary(self) -> str:
        expected = "" if self.expected_q is None else f" (a protein at the map's resolution: {self.expected_q:.2f})"
        lines = [
            f"{self.out}: map and model, FSC 0.5 at {self.resolution_half_A:.2f} A, 0.143 at {self.resolution_A:.2f} A;"
            f" mean Q-score {self.q:.2f}{expected}"
        ]
        return "\n".join([*lines, *(f"Warning: {line}" for line in self.warnings)])


@dataclass(frozen=True)
class _Placed:
    """atoms_A: (M, 3) from the box centre; density: of the model there, (D, D, D)."""

    atoms_A: np.ndarray
    density: np.ndarray
    fit: map_model.Fit | None


def mapmodel(options: MapModelOptions, *, progress: Progress = print) -> MapModelResult:
    """Compare a map and a model; see `MapModelOptions`. InputError for bad input, before work starts."""
    path, halves, known_A = _source(options)
    given = mrc.read_map(path)
    check_cubes_alike([given])
    box, pixel = len(given.array), given.voxel_size_A
    if not pixel > 0:
        raise InputError(f"{path}: no voxel size in the header; set it")
    if np.ptp(given.array) == 0:
        raise InputError(f"{path}: all voxels are {given.array.flat[0]:g}; expected a map with a molecule in it")
    if halves is not None and (halves.box_px != box or abs(halves.pixel_size_A / pixel - 1) > 0.01):
        raise InputError(
            f"{halves.paths[0]}: {halves.box_px} voxels of {halves.pixel_size_A:g} A a side, but {path} has {box} of "
            f"{pixel:g} A; give the half maps of that map"
        )
    model = read_model(options.model, options.assembly)
    if np.all(np.isin(model.names.element, ("H", "D"))):
        raise InputError(f"{options.model}: no atoms but hydrogens; expected the coordinates of a molecule")
    if not options.fit:
        atoms_A = placed_A(model, options.model, box, pixel, first_voxel_A(given))
    elif model.radius_A > (box / 2 - 2) * pixel:
        raise InputError(
            f"{options.model}: reaches {model.radius_A:.0f} A from its centre, but {path} only "
            f"{(box / 2 - 2) * pixel:.0f} A; give the part that is in the map"
        )
    inputs = [path, options.model, *(halves.paths if halves else ())]
    with Run.start(
        options.out, "mapmodel", options.model_dump(), inputs, None, options.resume, options.overwrite
    ) as run:
        if not run.finished:
            placed = _fitted(options, model, given, progress) if options.fit else _as_given(model, atoms_A, given)
            _compare(run, options, given, halves, known_A, model, placed, progress)
    result = run.record["result"]
    table = read_curves(run.path / "fsc.csv")
    return MapModelResult(
        options.out,
        {name: table[name] for name in table if name.startswith("fsc")},
        result["resolution_A"],
        result["resolution_half_A"],
        result["q"],
        result.get("expected_q"),
        read_residues(run.path / "residues.csv"),
        tuple(result["warnings"]),
    )


def _source(options: MapModelOptions) -> tuple[Path, HalfMaps | None, float | None]:
    """The map's file, its half maps and its resolution, where they are known."""
    if options.half2 is not None and options.half1 is None:
        raise InputError("--half2 says nothing without --half1; give the first half map too")
    halves = None if options.half1 is None else load_half_maps(options.half1, options.half2, None)
    if not options.source.is_dir():
        return options.source, halves, options.resolution_A
    record = Run.open(options.source).record
    path = next((options.source / name for name in _MAPS if (options.source / name).is_file()), None)
    if path is None:
        raise InputError(
            f"{options.source}: a run of {record['job']} without a map; expected one of {', '.join(_MAPS)}"
        )
    if halves is None and (options.source / "half1.mrc").is_file() and (options.source / "half2.mrc").is_file():
        halves = load_half_maps(options.source, None, None)
    return path, halves, options.resolution_A or (record.get("result") or {}).get("resolution_A")


def _as_given(model: AtomicModel, atoms_A: np.ndarray, given: mrc.MapFile) -> _Placed:
    return _Placed(atoms_A, _density(model, atoms_A, given), None)


def _density(model: AtomicModel, atoms_A: np.ndarray, given: mrc.MapFile) -> np.ndarray:
    return density.gaussian_density(
        atoms_A, model.amplitude, model.bfactor_A2, len(given.array), given.voxel_size_A
    )  # fmt: skip


def _fitted(options: MapModelOptions, model: AtomicModel, given: mrc.MapFile, progress: Progress) -> _Placed:
    """The model moved into the map from the box centre."""
    progress(f"fitting the model, compared up to {options.fit_resolution_A:g} A, in both hands")
    centred = _density(model, model.position_A, given)
    fit = map_model.fit(given.array, centred, given.voxel_size_A, options.fit_resolution_A)
    atoms_A = model.position_A @ fit.rotation.T + fit.shift_A
    limit_A = (len(given.array) / 2 - 1.5) * given.voxel_size_A
    outside = int(np.sum(np.any(np.abs(atoms_A) > limit_A, axis=1)))
    if outside:
        raise InputError(
            f"{options.model}: {outside} of {len(atoms_A)} atoms lie outside {given.path} where the model fits best; "
            "give the part of the model that is in the map"
        )
    return _Placed(atoms_A, _density(model, atoms_A, given), fit)


def _compare(
    run: Run, options: MapModelOptions, given: mrc.MapFile, halves: HalfMaps | None, known_A: float | None,
    model: AtomicModel, placed: _Placed, progress: Progress,
) -> None:  # fmt: skip
    box, pixel, origin_A = len(given.array), given.voxel_size_A, first_voxel_A(given)
    progress(f"{len(placed.atoms_A)} atoms in a map of {box} px, {pixel:.4g} A")
    core = solvent.around_points(placed.atoms_A / pixel, box)
    mask = solvent.soft_mask(core, _EXTEND_A / pixel, mask_edge_px(pixel))
    curves = _curves(given.array, placed.density, mask, halves)
    resolution, half = (
        fsc.resolution_at(curves["fsc_map_model"], level, box, pixel) for level in (fsc.GOLD_STANDARD, fsc.HALF)
    )
    if known_A is None and halves is not None:
        known_A = fsc.resolution_at(curves["fsc_halves"], fsc.GOLD_STANDARD, box, pixel)
    progress("Q-scores and correlations of residues")
    scaled = map_model.scaled_to(given.array, placed.density, mask)
    table, q = map_model.residue_table(given.array, scaled, pixel, model, placed.atoms_A)
    warnings = _warnings(options, given, model, placed, known_A)
    if known_A is not None and half > _COARSER * known_A and not warnings:
        how = "give only the part of it that is in the map" if options.fit else "give --fit to move it"
        warnings.append(
            f"Map and model correlate by 0.5 only up to {half:.1f} A, but the map has {known_A:.1f} A: the model does "
            f"not lie in it as it should; {how}, or check that it is of this molecule."
        )
    write_curves(run.path / "fsc.csv", box, pixel, curves)
    write_residues(run.path / "residues.csv", run.path / "residues.star", table)
    mrc.write_map(run.path / "model.mrc", placed.density, pixel, origin_A)
    mrc.write_map(run.path / "mask.mrc", mask, pixel, origin_A)
    figures: dict[str, Any] = {
        "resolution_A": resolution,
        "resolution_half_A": half,
        "map_resolution_A": known_A,
        "q": float(np.nanmean(q)) if np.isfinite(q).any() else 0.0,
        "expected_q": None if known_A is None else resolvability.expected_q(known_A),
        "correlation": float(np.corrcoef(given.array[mask > 0.5], scaled[mask > 0.5])[0, 1]),
        "atoms": len(q),
        "atoms_scored": int(np.sum(np.isfinite(q))),
        "residues": len(table["q"]),
        "map": str(given.path),
        "box_px": box,
        "pixel_size_A": pixel,
    }
    if halves is not None:
        last = shells.shell_at(known_A or half, box, pixel)
        apart = curves["fsc_half1_model"] - curves["fsc_half2_model"]
        figures["work_less_free"] = float(np.mean(apart[1 : last + 1]))
    if placed.fit is not None:
        figures |= _moved(run.path / FITTED_MODEL, options, model, placed, given)
    listed = map_model.standing_out(table)
    figures["standing_out"] = [_name(table, row) for row in listed[:_LISTED].tolist()]
    if known_A is not None and resolvability.expected_q(known_A) is None:
        warnings.append(f"At {known_A:.1f} A a map does not resolve atoms: its Q-scores say little.")
    elif len(listed):
        few = ", ".join(figures["standing_out"][:5])
        warnings.append(
            f"{len(listed)} of {len(table['q'])} residues have Q-scores far below the others': {few}"
            + (" and more (residues.csv)." if len(listed) > 5 else ".")
        )
    run.done({**figures, "warnings": warnings})


def _name(table: dict[str, np.ndarray], row: int) -> str:
    chain, number, code, residue = (
        table[name][row] for name in ("chain", "residue_number", "insertion_code", "residue")
    )
    return f"{chain} {residue} {number}{code} (Q {table['q'][row]:.2f})"


def _curves(volume: np.ndarray, model: np.ndarray, mask: np.ndarray, halves: HalfMaps | None) -> dict[str, np.ndarray]:
    """Curves by their names in fsc.csv. Under the mask but for the last.

    With half maps also of each with the model, which differ where the model was refined in the first (Brown et al.,
    Acta Cryst. D71, 136, 2015); of the halves, F; and what the mean of the halves would have with a perfect model,
    sqrt(2 F / (1 + F)) (Rosenthal & Henderson, J. Mol. Biol. 333, 721, 2003)."""
    masked = model * mask
    curves = {"fsc_map_model": fsc.shell_correlation(volume * mask, masked)}
    if halves is not None:
        first, second = halves.first * mask, halves.second * mask
        curves["fsc_half1_model"] = fsc.shell_correlation(first, masked)
        curves["fsc_half2_model"] = fsc.shell_correlation(second, masked)
        curves["fsc_halves"] = fsc.shell_correlation(first, second)
        signal = np.maximum(curves["fsc_halves"], 0)
        curves["fsc_perfect_model"] = np.sqrt(2 * signal / (1 + signal))
    return curves | {"fsc_unmasked": fsc.shell_correlation(volume, model)}


def _moved(
    target: Path, options: MapModelOptions, model: AtomicModel, placed: _Placed, given: mrc.MapFile
) -> dict[str, Any]:
    """Write the fitted model; figures of the move, R and t, that takes the file's coordinates x to R x + t."""
    fit = placed.fit
    assert fit is not None
    centre_A = np.array(first_voxel_A(given)) + len(given.array) // 2 * given.voxel_size_A
    shift_A = centre_A + fit.shift_A - fit.rotation @ model.centre_A
    write_moved(options.model, target, options.assembly, fit.rotation, shift_A)
    rot, tilt, psi = euler_from_matrix(fit.rotation)
    return {
        "rot_deg": rot, "tilt_deg": tilt, "psi_deg": psi, "shift_A": shift_A,
        "fit_correlation": fit.correlation, "fit_correlation_mirrored": fit.mirrored_correlation,
    }  # fmt: skip


def _warnings(
    options: MapModelOptions, given: mrc.MapFile, model: AtomicModel, placed: _Placed, known_A: float | None
) -> list[str]:
    """Sentences on where the model lies, on its hand, and on what its Q-scores are worth."""
    box, pixel = len(given.array), given.voxel_size_A
    lines = []
    alike, _ = likeness(given.array, placed.density, pixel)
    if alike < _MISPLACED:
        how = "it is not of this map, or its other parts are missing" if options.fit else "give --fit to move it there"
        lines.append(f"The model does not lie in the map (they correlate by {alike:.2f} at low resolution): {how}.")
    if placed.fit is not None:
        if placed.fit.mirrored_correlation > max(_BETTER * placed.fit.correlation, _FITS):
            lines.append(
                f"The mirror image of the model fits better ({placed.fit.mirrored_correlation:.3f}) than the model "
                f"({placed.fit.correlation:.3f}): the map has the wrong hand, mirror it."
            )
    else:
        seen_A = known_A or options.fit_resolution_A
        lines += _misplaced(map_model.hands(given.array, placed.density, shells.shell_at(seen_A, box, pixel)), pixel)
    names = model.names
    if np.all(np.isin(names.atom, ("CA", "P"))):
        lines.append(
            "The model has one atom for each residue, CA or P: its Q-scores and FSC are of single atoms without their "
            "neighbours, and not to be compared with those of whole models."
        )
    return lines


def _misplaced(found: tuple[map_model.Hand, dict[str, map_model.Hand]], pixel_size_A: float) -> list[str]:
    """Sentences where a shift of the model, or its mirror image, fits the map better."""
    own, mirrors = found
    name = max(mirrors, key=lambda one: mirrors[one].best)
    other = mirrors[name]
    if other.best > max(_BETTER * own.best, _FITS, other.chance):
        how = "inverted through the centre" if name == "centre" else f"mirrored along {name}"
        return [
            f"The model fits better once it is {how} ({other.best:.3f}) than as it is ({own.best:.3f}): the map has "
            "the wrong hand, mirror it."
        ]
    if np.linalg.norm(own.shift_px) > _AWAY_PX and own.best > max(_FITS, own.chance):
        x, y, z = own.shift_px * pixel_size_A
        return [
            f"The model would fit better ({own.best:.3f} against {own.here:.3f}) shifted by {x:.1f}, {y:.1f}, {z:.1f} "
            "A (x, y, z): move it, or give --fit; or correct the origin in the map's header."
        ]
    return []
