"""From a pair of half maps to the map that is looked at and deposited, and to what it is worth."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dcryo.data import mrc
from dcryo.data.curves import write_curves, write_fsc_xml
from dcryo.data.model import AtomicModel, read_model
from dcryo.data.mtf import read_mtf
from dcryo.data.postprocess_star import write_postprocess_star
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.dataset import mask_edge_px
from dcryo.jobs.given_maps import HalfMapOptions, HalfMaps, load_given_mask, load_half_maps, placed_A
from dcryo.jobs.options import Progress, SeedOptions
from dcryo.kernels import density, filters, fsc, mask_effect, masks, sharpening, significance, solvent
from dcryo.kernels.shells import resolution_A
from dcryo.kernels.symmetry import operators
from dcryo.steps import validation

# The mask keeps this distance from what is seen of the molecule at low resolution, and from a model's atoms.
_EXTEND_A, _LEAST_EXTEND_PX = 6.0, 2.0
_DEFAULT_DIAMETER = 0.85
# Ratio of the ends of the confidence interval from which on a resolution is called uncertain.
_UNCERTAIN = 1.3
# Resolution at which a model is looked for in the density.
_SEEN_AT_A = 15.0
# Part of a half map that is exactly 0, from which on it is taken to be masked.
_MASKED_BEFORE = 0.1
# Proteins: 0.73 cm3 per gram (Harpaz, Gerstein & Chothia 1994).
_VOLUME_A3_PER_KDA = 1212.0


class PostprocessOptions(HalfMapOptions, SeedOptions):
    """Mask, FSC and sharpening of a pair of half maps, and what is wrong with them.

    Writes map.mrc (the mean of the halves), map_sharp.mrc, mask.mrc, fsc.csv, fsc.xml, guinier.csv and postprocess.star
    (which RELION reads). The mask is found in the map unless one of --mask, --mask-model and --mask-diameter is given.
    """

    mask: Path | None = Field(None, description="mask (map of 0 to 1)")
    mask_model: Path | None = Field(None, description="atomic model, in its place in the map, to make the mask from")
    mask_diameter_A: float | None = Field(None, gt=0, description="diameter of a soft sphere to take as the mask")
    symmetry: str | None = Field(None, description="point group of the map (default: that of the run, or C1)")
    mass_kDa: float | None = Field(None, gt=0, description="mass of the molecule, for the FSC that it alone has")
    bfactor_A2: float | None = Field(None, description="B-factor to sharpen by, negative (default: by Guinier's plot)")
    fit_from_A: float = Field(sharpening.FITTED_FROM_A, gt=0, description="low-resolution end of Guinier's fit")
    fit_to_A: float | None = Field(None, gt=0, description="its high-resolution end (default: the resolution)")
    sharpen_model: Path | None = Field(
        None, description="atomic model whose amplitudes the map gets, in any place (instead of a B-factor)"
    )
    mtf: Path | None = Field(None, description="MTF of the detector (STAR), divided out of the sharpened map")
    mtf_pixel_size_A: float | None = Field(
        None, gt=0, description="pixel size of the detector on the specimen (default: that of the map)"
    )


@dataclass(frozen=True)
class PostprocessResult:
    """resolution_A: where the FSC that counts falls to 0.143; None where nothing may be claimed. bfactor_A2: that was
    applied; None where none was. map, mask: (D, D, D); sharpened: the same, None without a resolution; curves: of the
    halves; warnings: sentences on what is wrong."""

    out: Path
    resolution_A: float | None
    bfactor_A2: float | None
    map: np.ndarray
    sharpened: np.ndarray | None
    mask: np.ndarray
    curves: validation.Curves
    warnings: tuple[str, ...]

    def summary(self) -> str:
        if self.resolution_A is None:
            said = "no resolution can be claimed"
        else:
            said = f"{self.resolution_A:.2f} A by FSC 0.143"
            said += "" if self.bfactor_A2 is None else f", B-factor {self.bfactor_A2:.1f} A2"
        return "\n".join([f"{self.out}: {said}", *(f"Warning: {line}" for line in self.warnings)])


@dataclass(frozen=True)
class _Mask:
    """array: (D, D, D); kind: where it comes from, in words; molecule: what was seen of it in the maps, if anything."""

    array: np.ndarray
    kind: str
    molecule: solvent.Found | None
    diameter_A: float


@dataclass(frozen=True)
class _Sharpened:
    """map: (D, D, D); bfactor_A2: that was applied; fit: Guinier's, if there is one; whole: the same of amplitudes over
    the whole box, as RELION fits them; plot: curves, logarithms."""

    map: np.ndarray
    bfactor_A2: float | None
    fit: sharpening.GuinierFit | None
    whole: sharpening.GuinierFit | None
    plot: dict[str, np.ndarray]


def postprocess(options: PostprocessOptions, *, progress: Progress = print) -> PostprocessResult:
    """Post-process; see `PostprocessOptions`. InputError for bad input, before work starts."""
    halves = load_half_maps(options.source, options.half2, options.symmetry)
    _check_options(options, halves)
    box, pixel = halves.box_px, halves.pixel_size_A
    given_mask = options.mask or (None if options.mask_model or options.mask_diameter_A else halves.mask)
    given = None if given_mask is None else load_given_mask(given_mask, halves)
    model = None if options.mask_model is None else read_model(options.mask_model)
    atoms_A = None
    if model is not None and options.mask_model is not None:
        atoms_A = placed_A(model, options.mask_model, box, pixel, halves.origin_A)
    amplitudes_of = None if options.sharpen_model is None else read_model(options.sharpen_model)
    mtf = np.ones(box // 2 + 1) if options.mtf is None else _mtf(options, halves)
    files = [*halves.paths, given_mask, options.mask_model, options.sharpen_model, options.mtf]
    inputs = [path for path in files if path is not None]
    with Run.start(
        options.out, "postprocess", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    ) as run:
        progress(f"half maps of {box} px, {pixel:.4g} A")
        mask = _mask(options, halves, given, atoms_A)
        sphere = masks.sphere(box, mask.diameter_A / pixel, mask_edge_px(pixel))
        progress(f"mask: {mask.kind}; FSC")
        order = len(operators(halves.symmetry))
        curves = validation.half_map_curves(halves.first, halves.second, mask.array, sphere, order, options.seed)
        verdict = validation.judge(halves.first, halves.second, mask.array, curves, order)
        figures = _figures(options, halves, mask, curves, verdict, model)
        mean = (halves.first + halves.second) / 2
        sharpened = None
        if verdict.claimed:
            progress(f"{figures['resolution_A']:.2f} A; sharpening")
            sharpened = _sharpened(options, halves, mean, mask, verdict, figures["resolution_A"], mtf, amplitudes_of)
            figures |= _sharpening_figures(sharpened, mask, figures, pixel)
        warnings = _warnings(options, halves, mask, curves, verdict, figures, sharpened)
        if model is not None and atoms_A is not None:
            warnings += _misplaced(model, atoms_A, mean, pixel)
        if not run.finished:
            _write(run.path, halves, mask, given_mask, mean, curves, verdict, figures, sharpened)
            run.done({**figures, "warnings": warnings})
    return PostprocessResult(
        options.out, figures["resolution_A"], None if sharpened is None else sharpened.bfactor_A2, mean,
        None if sharpened is None else sharpened.map, mask.array, curves, tuple(warnings),
    )  # fmt: skip


def _check_options(options: PostprocessOptions, halves: HalfMaps) -> None:
    named = [name for name in ("mask", "mask_model", "mask_diameter_A") if getattr(options, name) is not None]
    if len(named) > 1:
        words = " and ".join("--" + name.removesuffix("_A").replace("_", "-") for name in named)
        raise InputError(f"{words} exclude each other; give one of them, or none to have the mask found in the map")
    if options.bfactor_A2 is not None and options.sharpen_model is not None:
        raise InputError("--bfactor and --sharpen-model exclude each other; give one of them")
    width = halves.box_px * halves.pixel_size_A
    if options.mask_diameter_A is not None and not 4 * halves.pixel_size_A < options.mask_diameter_A <= width:
        raise InputError(
            f"--mask-diameter {options.mask_diameter_A:g} A: expected more than {4 * halves.pixel_size_A:g} A and at "
            f"most the box, {width:g} A"
        )
    if options.fit_to_A is not None and options.fit_to_A >= options.fit_from_A:
        raise InputError(
            f"--fit-to {options.fit_to_A:g} A: expected a finer resolution than --fit-from, {options.fit_from_A:g} A"
        )
    if options.mtf_pixel_size_A is not None and options.mtf is None:
        raise InputError("--mtf-pixel-size says nothing without --mtf; give the MTF too")


def _mtf(options: PostprocessOptions, halves: HalfMaps) -> np.ndarray:
    """MTF of each shell of the map."""
    assert options.mtf is not None
    frequency, value = read_mtf(options.mtf)
    detector_px_A = options.mtf_pixel_size_A or halves.pixel_size_A
    shells = np.arange(halves.box_px // 2 + 1) / (halves.box_px * halves.pixel_size_A) * detector_px_A
    if shells[-1] > frequency[-1] + 1e-3:
        raise InputError(
            f"{options.mtf}: ends at {frequency[-1]:g} cycles per pixel, but the map reaches {shells[-1]:g} of a "
            f"detector pixel of {detector_px_A:g} A; correct --mtf-pixel-size"
        )
    return np.interp(shells, frequency, value)


def _mask(options: PostprocessOptions, halves: HalfMaps, given: np.ndarray | None, atoms_A: np.ndarray | None) -> _Mask:
    box, pixel = halves.box_px, halves.pixel_size_A
    molecule = solvent.find_molecule(halves.first, halves.second, pixel)
    diameter = options.mask_diameter_A or halves.diameter_A or _DEFAULT_DIAMETER * box * pixel
    if given is not None:
        return _Mask(given, "given", molecule, diameter)
    if atoms_A is not None:
        core = solvent.around_points(atoms_A / pixel, box)
        return _Mask(_about(core, pixel), "from the model", molecule, diameter)
    if options.mask_diameter_A is None and molecule is not None:
        return _Mask(_about(molecule.core, pixel), "automatic", molecule, diameter)
    return _Mask(masks.sphere(box, diameter / pixel, mask_edge_px(pixel)), "sphere", molecule, diameter)


def _figures(
    options: PostprocessOptions, halves: HalfMaps, mask: _Mask, curves: validation.Curves,
    verdict: validation.Verdict, model: AtomicModel | None,
) -> dict[str, Any]:  # fmt: skip
    """What the record says of the FSC; resolutions are None where nothing may be claimed."""
    box, pixel = halves.box_px, halves.pixel_size_A

    def at(curve: np.ndarray, threshold: float) -> float | None:
        return fsc.resolution_at(curve, threshold, box, pixel) if verdict.claimed else None

    half_bit_A = resolution_A(significance.half_bit_crossing(verdict.fsc, curves.half_bit), box, pixel)
    volume = float(np.sum(mask.array, dtype=np.float64)) * pixel**3
    figures: dict[str, Any] = {
        "resolution_A": at(verdict.fsc, fsc.GOLD_STANDARD),
        "resolution_by": "maps filtered before they are masked" if verdict.tight else "corrected FSC",
        "resolution_worst_A": at(verdict.low, fsc.GOLD_STANDARD),
        "resolution_best_A": at(verdict.high, fsc.GOLD_STANDARD),
        "resolution_half_A": at(verdict.fsc, fsc.HALF),
        "resolution_half_bit_A": half_bit_A if verdict.claimed else None,
        "resolution_corrected_A": at(curves.corrected, fsc.GOLD_STANDARD),
        "resolution_masked_A": at(curves.masked, fsc.GOLD_STANDARD),
        "resolution_spherical_A": at(curves.spherical, fsc.GOLD_STANDARD),
        "resolution_unmasked_A": at(curves.unmasked, fsc.GOLD_STANDARD),
        "randomised_from_A": None
        if curves.randomised_from is None
        else resolution_A(curves.randomised_from, box, pixel),
        "fsc_of_mask": verdict.leak,
        "mask": mask.kind,
        "mask_volume_A3": volume,
        "mask_diameter_A": mask.diameter_A,
        "box_px": box,
        "pixel_size_A": pixel,
        "symmetry": halves.symmetry,
    }
    mass_kDa = options.mass_kDa or (None if model is None else model.mass_kDa)
    if mass_kDa is not None:
        alone = mask_effect.of_molecule(verdict.fsc, volume, mass_kDa * _VOLUME_A3_PER_KDA)
        figures |= {"mass_kDa": mass_kDa, "resolution_molecule_A": at(alone, fsc.GOLD_STANDARD)}
    return figures


def _sharpened(
    options: PostprocessOptions, halves: HalfMaps, mean: np.ndarray, mask: _Mask, verdict: validation.Verdict,
    resolution: float, mtf: np.ndarray, model: AtomicModel | None,
) -> _Sharpened:  # fmt: skip
    """The mean map, its MTF taken off, weighted by the FSC, sharpened, and cut at the resolution.

    Amplitudes are those under the mask, as the FSC is: solvent noise in the rest of the box would hide their fall-off.
    """
    box, pixel = halves.box_px, halves.pixel_size_A
    frequency = np.arange(box // 2 + 1) / (box * pixel)
    weight = sharpening.fsc_weight(verdict.fsc)
    soft = mask.array if not verdict.tight else _roomier(mask, halves)
    original = sharpening.radial_amplitude(mean * soft) / box**3
    weighted = original / mtf * weight
    limits = options.fit_to_A or resolution, options.fit_from_A
    fit = sharpening.guinier_fit(weighted, frequency, *limits)
    whole = sharpening.guinier_fit(sharpening.radial_amplitude(mean) / mtf * weight, frequency, *limits)
    bfactor: float | None
    if model is not None:
        density_of_model = density.gaussian_density(model.position_A, model.amplitude, model.bfactor_A2, box, pixel)
        within = frequency <= 1 / resolution
        gain = sharpening.model_gain(weighted * within, sharpening.radial_amplitude(density_of_model) * within)
        bfactor = None
    else:
        bfactor = options.bfactor_A2 if options.bfactor_A2 is not None else (fit.bfactor_A2 if fit else 0.0)
        gain = sharpening.bfactor_gain(bfactor, frequency)
    gain = gain * weight / mtf
    with np.errstate(divide="ignore"):
        plot = {"original": np.log(original), "weighted": np.log(weighted), "sharpened": np.log(original * gain)}
    plot["intercept"] = np.full(len(original), np.nan if fit is None else fit.intercept)
    cut = box * pixel / resolution
    return _Sharpened(sharpening.filtered(mean, gain, cut), bfactor, fit, whole, plot)


def _roomier(mask: _Mask, halves: HalfMaps) -> np.ndarray:
    """A mask that spreads no amplitude between shells, where the one that was given does."""
    if mask.molecule is not None:
        return _about(mask.molecule.core, halves.pixel_size_A)
    return masks.sphere(halves.box_px, _DEFAULT_DIAMETER * halves.box_px, mask_edge_px(halves.pixel_size_A))


def _about(core: np.ndarray, pixel_size_A: float) -> np.ndarray:
    """A soft mask with room about a core."""
    return solvent.soft_mask(core, max(_EXTEND_A / pixel_size_A, _LEAST_EXTEND_PX), mask_edge_px(pixel_size_A))


def _sharpening_figures(sharpened: _Sharpened, mask: _Mask, figures: dict[str, Any], pixel: float) -> dict[str, Any]:
    """What the record says of the sharpened map, with a level for a surface that holds the molecule's volume."""
    fit = sharpened.fit
    found: dict[str, Any] = {"bfactor_A2": sharpened.bfactor_A2}
    if fit is not None:
        found |= {"bfactor_fitted_A2": fit.bfactor_A2, "bfactor_error_A2": fit.error_A2}
    if sharpened.whole is not None:
        found["bfactor_of_whole_box_A2"] = sharpened.whole.bfactor_A2
    if "mass_kDa" in figures:
        voxels = figures["mass_kDa"] * _VOLUME_A3_PER_KDA / pixel**3
    else:
        voxels = solvent.molecule_voxels(mask.array, mask.molecule)
    found["contour_level"] = solvent.level_enclosing(sharpened.map, mask.array, voxels)
    return found


def _warnings(
    options: PostprocessOptions, halves: HalfMaps, mask: _Mask, curves: validation.Curves,
    verdict: validation.Verdict, figures: dict[str, Any], sharpened: _Sharpened | None,
) -> list[str]:  # fmt: skip
    """What is wrong, in sentences."""
    said: list[str] = []
    if not verdict.claimed:
        said.append(
            "The half maps agree no better than noise does, so no resolution is claimed and nothing is sharpened."
        )
    if verdict.tight:
        how = "So tight is the mask" if verdict.leak > validation.ABSURD else "The mask is so tight"
        said.append(
            f"{how} that alone it makes the halves correlate by {verdict.leak:.2f} where the resolution is read. The "
            "resolution is therefore read from maps that are filtered before they are masked, which no mask can "
            "improve. Take a mask with more room about the molecule and a softer edge."
        )
    empty = float(np.mean((halves.first == 0)[_inside(halves.box_px)]))
    if empty > _MASKED_BEFORE:
        said.append(
            f"{100 * empty:.0f} percent of the first half map are exactly 0: it seems to be masked already. The FSC of "
            "masked maps cannot be corrected, and the archives ask for unmasked ones."
        )
    if mask.molecule is None and verdict.claimed:
        said.append("No density stands out of the noise at low resolution, so the mask is a sphere.")
    if mask.molecule is not None:
        core = mask.molecule.core
        cut = 1 - float(np.mean(mask.array[core] > 0.5))
        if cut > 0.05:
            said.append(
                f"The mask leaves out {100 * cut:.0f} percent of what looks like the molecule; the FSC is that of the "
                "rest."
            )
        box = halves.box_px
        if np.any(core & (masks.sphere(box, box - 6, 0) == 0)):
            said.append("The density reaches the edge of the box; extract the particles in a larger one.")
    if verdict.claimed and not np.any(verdict.fsc[1:] < fsc.GOLD_STANDARD):
        said.append(
            f"The FSC does not fall to 0.143 before the last shell: the resolution is limited by the pixel size of "
            f"{halves.pixel_size_A:.4g} A, not by the data."
        )
    elif verdict.claimed and (again := _comes_back(curves, halves)) is not None:
        said.append(
            f"Past the resolution the unmasked FSC is {again:.2f} where it should be about 0: the halves have "
            "something in common that is no signal, such as particles in both, one reference, or a filter."
        )
    if verdict.claimed and figures["resolution_worst_A"] > _UNCERTAIN * figures["resolution_best_A"]:
        said.append(
            f"The resolution is uncertain: at 95 percent confidence it is between {figures['resolution_worst_A']:.1f} "
            f"and {figures['resolution_best_A']:.1f} A, because few voxels tell of it or the FSC hardly falls there."
        )
    if sharpened is not None:
        said += _on_sharpening(options, figures, sharpened)
    return said


def _inside(box_px: int) -> np.ndarray:
    """The sphere that the box holds, outside of which half maps are blank."""
    return masks.sphere(box_px, box_px - 4, 0) > 0


def _comes_back(curves: validation.Curves, halves: HalfMaps) -> float | None:
    """Mean of the unmasked FSC over the last shells, from a third past the resolution on; None where it is near 0."""
    after = int(1.33 * fsc.crossing(curves.corrected, fsc.GOLD_STANDARD)) + 1
    if after > len(curves.unmasked) - 5:
        return None
    mean = float(np.mean(curves.unmasked[after:]))
    return mean if mean > 0.1 else None


def _on_sharpening(options: PostprocessOptions, figures: dict[str, Any], sharpened: _Sharpened) -> list[str]:
    fit, said = sharpened.fit, []
    if sharpened.bfactor_A2 is None:
        return []
    if options.bfactor_A2 is None:
        if fit is None:
            said.append(
                f"The resolution leaves too few shells beyond {options.fit_from_A:g} A for a Guinier plot; the map is "
                "weighted by its FSC and not sharpened. Give --bfactor if you know one."
            )
        elif fit.error_A2 > 0.5 * abs(fit.bfactor_A2) or fit.bfactor_A2 > 0:
            said.append(
                f"The B-factor of {fit.bfactor_A2:.0f} A2 is uncertain by {fit.error_A2:.0f}: the Guinier plot is no "
                "straight line over so few shells. Look at the map before you trust it."
            )
    elif options.bfactor_A2 > 0:
        said.append(f"A B-factor of {options.bfactor_A2:g} A2 blurs the map; negative ones sharpen.")
    elif fit is not None and options.bfactor_A2 < fit.bfactor_A2 - max(2 * fit.error_A2, 0.5 * abs(fit.bfactor_A2)):
        said.append(
            f"The B-factor of {options.bfactor_A2:g} A2 sharpens more than the map has lost ({fit.bfactor_A2:.0f} A2 "
            "by its Guinier plot): details of the sharpened map may be noise."
        )
    return said


def _misplaced(model: AtomicModel, atoms_A: np.ndarray, mean: np.ndarray, pixel_size_A: float) -> list[str]:
    """A sentence where a model does not lie on the density."""
    made = density.gaussian_density(atoms_A, model.amplitude, model.bfactor_A2, len(mean), pixel_size_A)
    seen_A = max(_SEEN_AT_A, 3 * pixel_size_A)
    made, mean = (filters.lowpass(map_, pixel_size_A, seen_A) for map_ in (made, mean))
    correlation = float(np.corrcoef(made.ravel(), mean.ravel())[0, 1])
    if correlation > 0.3:
        return []
    return [f"The model does not lie on the density (they correlate by {correlation:.2f}); fit it into the map first."]


def _write(
    out: Path, halves: HalfMaps, mask: _Mask, given_mask: Path | None, mean: np.ndarray, curves: validation.Curves,
    verdict: validation.Verdict, figures: dict[str, Any], sharpened: _Sharpened | None,
) -> None:  # fmt: skip
    box, pixel = halves.box_px, halves.pixel_size_A
    mrc.write_map(out / "map.mrc", mean, pixel, halves.origin_A)
    mrc.write_map(out / "mask.mrc", mask.array, pixel, halves.origin_A)
    if sharpened is not None:
        mrc.write_map(out / "map_sharp.mrc", sharpened.map, pixel, halves.origin_A)
    of_halves = {
        "fsc_corrected": curves.corrected,
        "fsc_masked": curves.masked,
        "fsc_randomised": curves.randomised,
        "fsc_spherical": curves.spherical,
        "fsc_unmasked": curves.unmasked,
    }
    more = {"fsc_filtered_first": verdict.fsc} if verdict.tight else {}
    if "mass_kDa" in figures:
        molecule_A3 = figures["mass_kDa"] * _VOLUME_A3_PER_KDA
        more["fsc_molecule"] = mask_effect.of_molecule(verdict.fsc, figures["mask_volume_A3"], molecule_A3)
    more |= {"low_95": verdict.low, "high_95": verdict.high, "half_bit": curves.half_bit,
             "independent_voxels": curves.independent}  # fmt: skip
    write_curves(out / "fsc.csv", box, pixel, of_halves | more)
    write_fsc_xml(out / "fsc.xml", box, pixel, verdict.fsc)
    if sharpened is None:
        return
    write_curves(out / "guinier.csv", box, pixel, sharpened.plot)
    general: dict[str, float | str] = {
        "resolution_A": figures["resolution_A"],
        "half1": str(halves.paths[0]),
        "half2": str(halves.paths[1]),
        "mask": str(given_mask or out / "mask.mrc"),
    }
    if figures["randomised_from_A"] is not None:
        general["randomised_from_A"] = figures["randomised_from_A"]
    if sharpened.bfactor_A2 is not None:
        general["bfactor_A2"] = sharpened.bfactor_A2
    if sharpened.fit is not None:
        fit = sharpened.fit
        general |= {"slope_A2": fit.bfactor_A2 / 4, "intercept": fit.intercept, "correlation": fit.correlation}
    write_postprocess_star(out / "postprocess.star", box, pixel, general, of_halves, sharpened.plot)
