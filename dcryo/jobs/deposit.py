"""A folder that holds what the Electron Microscopy Data Bank asks for, from a run of post-processing."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dcryo import __version__
from dcryo.data import mrc, star
from dcryo.data.atomic import replacing
from dcryo.data.lineage import Step, lineage
from dcryo.data.png import write_png
from dcryo.data.provenance import digest
from dcryo.data.run import Run
from dcryo.errors import InputError
from dcryo.jobs.given_maps import check_cubes_alike, first_voxel_A, load_half_maps
from dcryo.jobs.options import OutOptions, Progress, argument
from dcryo.kernels import fsc, masks, solvent, surface

# Half maps with so much less noise outside of the mask than inside, or so much that is exactly 0, were masked.
_LEAST_NOISE, _MOST_EMPTY = 0.1, 0.1
_IMAGE_PX = 600
_RAW = {"half1.mrc": "half_map_1.mrc", "half2.mrc": "half_map_2.mrc"}
_CATEGORIES = {
    "motion": "IMAGE PROCESSING (motion correction)", "ctf": "CTF CORRECTION (estimation)",
    "pick": "PARTICLE SELECTION", "extract": "PARTICLE EXTRACTION", "class2d": "CLASSIFICATION",
    "abinitio": "INITIAL MODEL", "refine": "FINAL EULER ASSIGNMENT, CTF CORRECTION and RECONSTRUCTION",
    "reconstruct": "CTF CORRECTION and RECONSTRUCTION", "postprocess": "MASK, FSC and SHARPENING",
    "localres": "LOCAL RESOLUTION",
}  # fmt: skip
_NEVER_KNOWN = (
    ("em_imaging.microscope_model", "Microscope"),
    ("em_image_recording.film_or_detector_model", "Detector"),
    ("em_sample_support", "Grid and support film"),
    ("em_vitrification", "Vitrification: instrument, temperature, humidity"),
    ("em_entity_assembly", "Sample: its name, source and components"),
    ("em_buffer", "Buffer and its pH"),
    ("em_author_list", "Authors, title and citation"),
)


class DepositOptions(OutOptions):
    """Gather what a deposition in the Electron Microscopy Data Bank needs, from a run of postprocess.

    Writes the maps, mask, FSC, picture and particles, emdb.md and emdb.json with the answers that are known and a list
    of those that are not, and SHA256SUMS. Files are hard links where that is possible: copy one before you change it.
    """

    source: Path = argument("directory of a run of postprocess")
    refined: Path | None = Field(None, description="run that the half maps are of (default: the one postprocess names)")
    localres: Path | None = Field(None, description="run of localres of the same half maps")


@dataclass(frozen=True)
class DepositResult:
    """files: names in `out`; missing: what the depositor must answer."""

    out: Path
    files: tuple[str, ...]
    missing: tuple[str, ...]

    def summary(self) -> str:
        return f"{self.out}: {len(self.files)} files; {len(self.missing)} answers are yours to give, see emdb.md"


@dataclass(frozen=True)
class _Found:
    """sources: name in the folder -> file; post: record of postprocess; steps: the runs that led to it."""

    sources: dict[str, Path]
    post: dict[str, Any]
    steps: list[Step]
    map: mrc.MapFile
    mask: np.ndarray


def deposit(options: DepositOptions, *, progress: Progress = print) -> DepositResult:
    """Gather a deposition; see `DepositOptions`. InputError where something is missing or does not fit."""
    found = _load(options)
    inputs = [options.source, *found.sources.values()]
    with Run.start(
        options.out, "deposit", options.model_dump(), inputs, None, options.resume, options.overwrite
    ) as run:
        if not run.finished:
            for name, path in found.sources.items():
                _bring(path, run.path / name)
            progress("drawing the surface")
            _draw(run.path / "image.png", found)
            answers, missing = _answers(found)
            _write(run.path, found, answers, missing)
            files = sorted([*found.sources, "image.png", "emdb.md", "emdb.json"])
            _sums(run.path, files)
            run.done({"files": [*files, "SHA256SUMS"], "missing": missing,
                      "contour_level": found.post["result"]["contour_level"]})  # fmt: skip
    result = run.record["result"]
    return DepositResult(options.out, tuple(result["files"]), tuple(result["missing"]))


def _load(options: DepositOptions) -> _Found:
    """All files, checked one against the other."""
    post = Run.open(options.source).record
    if post["job"] != "postprocess" or post["status"] != "done":
        raise InputError(f"{options.source}: a run of {post['job']} that is {post['status']}; expected one of "
                         "postprocess that is done")  # fmt: skip
    if not (post.get("result") or {}).get("resolution_A"):
        raise InputError(f"{options.source}: claims no resolution, so there is no map to deposit; see its report")
    named = [Path(row["path"]) for row in post["inputs"][:2]]
    refined = options.refined or named[0].parent
    halves = [refined / path.name for path in named] if options.refined else named
    for path, row in zip(halves, post["inputs"], strict=False):
        if not path.is_file():
            raise InputError(f"{path}: the half map that {options.source} was made of is gone; name its run by "
                             "--refined")  # fmt: skip
        if digest(path)["digest"] != row["digest"]:
            raise InputError(f"{path}: is not the half map that {options.source} was made of (its digest differs); "
                             "repeat postprocess")  # fmt: skip
    sources = {"primary_map.mrc": options.source / "map_sharp.mrc", "half_map_1.mrc": halves[0],
               "half_map_2.mrc": halves[1], "mask.mrc": options.source / "mask.mrc",
               "fsc.xml": options.source / "fsc.xml"}  # fmt: skip
    if (refined / "particles.star").is_file():
        sources["particles.star"] = refined / "particles.star"
    if options.localres is not None:
        local = Run.open(options.localres).record
        if local["job"] != "localres" or [row["digest"] for row in local["inputs"][:2]] != [
            row["digest"] for row in post["inputs"][:2]
        ]:
            raise InputError(f"{options.localres}: not a run of localres of the half maps of {options.source}")
        sources["local_resolution.mrc"] = options.localres / "localres.mrc"
    for path in sources.values():
        if not path.is_file():
            raise InputError(f"{path}: not there; repeat the run that makes it")
    maps = {name: mrc.read_map(path) for name, path in sources.items() if name.endswith(".mrc")}
    check_cubes_alike(list(maps.values()))
    origin = first_voxel_A(maps["primary_map.mrc"])
    for name in _RAW.values():
        if not np.allclose(first_voxel_A(maps[name]), origin, atol=0.01):
            raise InputError(f"{sources[name]}: starts at {first_voxel_A(maps[name])} A and the primary map at "
                             f"{origin}; the archive wants them to lie on one another")  # fmt: skip
    pair = load_half_maps(halves[0], halves[1], post["result"]["symmetry"])
    mask = maps["mask.mrc"].array
    _check_unmasked(pair.first, pair.second, mask, halves)
    return _Found(sources, post, lineage(options.source), maps["primary_map.mrc"], mask)


def _check_unmasked(first: np.ndarray, second: np.ndarray, mask: np.ndarray, paths: list[Path]) -> None:
    """InputError where half maps have no noise outside of the mask, as those have that were masked."""
    outside = (mask < 0.01) & (masks.sphere(len(mask), len(mask) - 4, 0) > 0)
    if outside.sum() < 100:
        return
    noise = first - second
    share = float(noise[outside].std() / max(noise[mask > 0.5].std(), 1e-30))
    empty = max(float(np.mean(half[outside] == 0)) for half in (first, second))
    if share < _LEAST_NOISE or empty > _MOST_EMPTY:
        raise InputError(
            f"{paths[0]}, {paths[1]}: outside of the mask {100 * empty:.0f} percent are exactly 0 and the noise is "
            f"{100 * share:.0f} percent of that inside: these half maps were masked. The archive asks for unmasked ones"
        )


def _bring(path: Path, to: Path) -> None:
    """A file under another name: a hard link or, across file systems, a copy."""
    to.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), to)
    except OSError:
        with path.open("rb") as source, replacing(to) as file:
            shutil.copyfileobj(source, file)


def _draw(path: Path, found: _Found) -> None:
    """The surface along z, the picture that stands for the entry."""
    level = float(found.post["result"]["contour_level"])
    masked = solvent.without_specks(found.map.array * found.mask, level)
    seen = surface.seen_px(masked, level)
    view = surface.view(masked, level, "z", surface.OVERSAMPLING * _IMAGE_PX, seen)
    write_png(path, surface.coloured(surface.light(view, seen[1] - seen[0]), surface.PLAIN)[::-1])


def _answers(found: _Found) -> tuple[list[dict[str, Any]], list[str]]:
    """What is known, by the items of the archive's dictionary (PDBx/mmCIF), and what is not, in words."""
    result, origin = found.post["result"], "postprocess"
    known: list[tuple[str, str, Any, str]] = [
        ("em_3d_reconstruction.resolution", "Resolution (A)", round(result["resolution_A"], 2), origin),
        ("em_3d_reconstruction.resolution_method", "Resolution method", f"FSC {fsc.GOLD_STANDARD:g} CUT-OFF", origin),
        ("em_3d_reconstruction.details", "FSC that counts", result["resolution_by"], origin),
        ("em_single_particle_entity.point_symmetry", "Point symmetry", result["symmetry"], origin),
        ("em_map.pixel_spacing_x", "Pixel size (A), x, y and z", result["pixel_size_A"], origin),
        ("em_map.dimensions_col", "Box (px), columns, rows and sections", result["box_px"], origin),
        ("em_map.contour_level", "Recommended contour level of the primary map", result["contour_level"], origin),
        ("sharpening_bfactor", "Sharpening B-factor (A2)", result.get("bfactor_A2"), origin),
    ]
    steps = {step.record["job"]: step for step in found.steps}
    particles = star.read_particles(found.sources["particles.star"]) if "particles.star" in found.sources else None
    counts = [int(step.record["result"].get("picks") or step.record["result"].get("particles") or 0)
              for step in found.steps if step.record["job"] in ("pick", "extract", "import")]  # fmt: skip
    known += [
        ("em_particle_selection.num_particles_selected", "Particles, to begin with", next(filter(None, counts), None),
         "the first of the runs that have particles"),
        ("em_3d_reconstruction.num_particles", "Particles, in the end", None if particles is None else len(particles),
         "particles.star"),
    ]  # fmt: skip
    optics = {} if particles is None else particles.optics
    for item, words, name in (
        ("em_imaging.accelerating_voltage", "Voltage (kV)", "voltage_kV"),
        ("em_imaging.nominal_cs", "Spherical aberration (mm)", "spherical_aberration_mm"),
        ("em_ctf_correction.amplitude_contrast", "Amplitude contrast", "amplitude_contrast"),
    ):
        values = sorted(set(np.round(optics[name], 6).tolist())) if name in optics else []
        known.append((item, words, values[0] if len(values) == 1 else values or None, "particles.star"))
    defocus = None
    if particles is not None and "defocus_u_A" in particles:
        defocus = (particles["defocus_u_A"] + particles["defocus_v_A"]) / 20
    for end, value in (("min", np.min), ("max", np.max)):
        known.append((f"em_imaging.calibrated_defocus_{end}", f"Defocus, {end} (nm), as fitted",
                      None if defocus is None else round(float(value(defocus)), 1), "particles.star"))  # fmt: skip
    dose = steps["motion"].record["options"].get("dose_per_frame_e_A2") if "motion" in steps else None
    known.append(
        ("dose_per_frame", "Exposure of a frame (e/A2); the archive asks for that of an image", dose, "motion")
    )
    missing = [f"{words} ({item})" for item, words, value, _ in known if value is None and item != "dose_per_frame"]
    missing += [f"{words} ({item})" for item, words in _NEVER_KNOWN]
    missing.append("Exposure of an image, e/A2 (em_image_recording.avg_electron_dose_per_image)")
    if "motion" not in steps:
        missing.append("Software that made the micrographs, and its version (em_software)")
    if "ctf" not in steps:
        missing.append("Software that estimated the CTF, and its version (em_software)")
    if "import" in steps and "pick" not in steps:
        missing.append("Software that picked the particles, and its version (em_software)")
    rows = [{"item": item, "asked": words, "answer": value, "from": where}
            for item, words, value, where in known if value is not None]  # fmt: skip
    return rows, missing


def _write(out: Path, found: _Found, answers: list[dict[str, Any]], missing: list[str]) -> None:
    software = [
        {"category": _CATEGORIES[step.record["job"]], "name": "dcryo", "run": str(step.path),
         "version": str((step.record.get("versions") or {}).get("dcryo", "unknown"))}
        for step in found.steps if step.record["job"] in _CATEGORIES
    ]  # fmt: skip
    files = {name: str(path) for name, path in found.sources.items()} | {"image.png": "drawn at the contour level"}
    warnings = list(found.post["result"].get("warnings") or [])
    content = {"answers": answers, "must_be_filled_in": missing, "software": software, "files": files,
               "warnings": warnings, "made_by": f"dcryo {__version__}"}  # fmt: skip
    with replacing(out / "emdb.json") as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    lines = ["# For the deposition", "", "| asked | answer | from |", "|---|---|---|"]
    lines += [f"| {row['asked']} | {_in_words(row['answer'])} | {row['from']} |" for row in answers]
    lines += ["", "## You must fill in", "", *(f"- {line}" for line in missing)]
    lines += ["", "## What is wrong", "", *(f"- {line}" for line in warnings or ["Nothing was found to be wrong."])]
    lines += ["", "## Software", "", *(f"- {row['category']}: {row['name']} {row['version']} ({row['run']})"
                                       for row in software)]  # fmt: skip
    lines += ["", "## Files", "", *(f"- {name}: {path}" for name, path in files.items())]
    lines += [
        "",
        "The half maps were found not to be masked; whether they were filtered was not looked at. Files may be hard",
        "links to those of the runs: copy one before you change it. The hand of the map cannot be known from images.",
    ]
    with replacing(out / "emdb.md") as file:
        file.write(("\n".join(lines) + "\n").encode())


def _in_words(value: Any) -> str:
    """A number with as many digits as anyone types into a form; emdb.json has them all."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sums(out: Path, files: list[str]) -> None:
    """Checksums, as sha256sum writes and checks them."""
    lines = []
    for name in files:
        with (out / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}")
    with replacing(out / "SHA256SUMS") as file:
        file.write(("\n".join(lines) + "\n").encode())
