"""The report of a run: one page, made from the files of the run directory and nothing else.

A section is a function from the run's files to a `Section`, or to None where the run has nothing to show;
SECTIONS lists them in the order of the page. A file that cannot be read costs its section, not the page.
"""

import functools
import importlib.resources
import itertools
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dcryo import (
    figures,
    report_classes,
    report_ctfrefine,
    report_mapmodel,
    report_micrographs,
    report_models,
    report_postprocess,
    report_surfaces,
    report_validate,
    report_variability,
)
from dcryo.data import mrc, star
from dcryo.data.atomic import replacing
from dcryo.data.classes import CLASSES, TABLE, read_class_table
from dcryo.data.curves import read_curves
from dcryo.data.items import ITEMS, arrays_of
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.data.store import is_store, open_store
from dcryo.jobs.options import JobOptions, Progress, argument
from dcryo.kernels import symmetry
from dcryo.kernels.fsc import GOLD_STANDARD, HALF, crossing

PAGE = "report.html"

TITLES = {
    "refine": "Gold-standard refinement",
    "reconstruct": "Reconstruction from given poses",
    "ctfrefine": "CTF refinement",
    "simulate": "Simulation",
    "import": "Import of particles",
    "extract": "Extracted particles",
    "demo": "Demonstration",
    "postprocess": "Post-processing of half maps",
    "fsc": "Fourier shell correlation of two maps",
    "align": "One map brought onto another",
    "abinitio": "First models",
    "mapmodel": "A map against an atomic model",
    "localres": "Local resolution",
    "directional": "Resolution by direction",
    "class2d": "2D classification",
    "class3d": "3D classification",
    "select": "Selection of particles",
    "motion": "Motion correction",
    "ctf": "CTF estimation",
    "pick": "Particle picking",
    "deposit": "Files for a deposition",
    "validate": "Tests for overfitting",
    "variability": "Continuous variability",
}
UNITS = {
    "e_A2": "e/Å²",
    "A": "Å",
    "A2": "Å²",
    "deg": "°",
    "px": "px",
    "s": "s",
    "kV": "kV",
    "kDa": "kDa",
    "A3": "Å³",
    "mm": "mm",
    "mrad": "mrad",
}

TIMES = (("started", "started_utc"), ("finished", "finished_utc"))

MAPS = ("map.mrc", "map_local.mrc", "half1.mrc", "class1.mrc", "truth.mrc", "moved.mrc", "model.mrc", "mean.mrc")
PARTICLES = ("truth.star", "particles.star")
"""What to show as the map and as the particles of a run: the first that is there."""

IMAGES_SHOWN = 12

CLASSES_SHOWN = 200

QUARANTINED_SHOWN = 100


class ReportOptions(JobOptions):
    """Write the report page of a run, finished or not, from the files in its directory."""

    run: Path = argument("directory of the run")


@dataclass(frozen=True)
class Report:
    """Where the page is."""

    page: Path


@dataclass(frozen=True)
class Section:
    """A part of the page: a picture (data URI), words, and a table whose first row is the heading.

    A wide section takes the width of the page.
    """

    title: str
    picture: str | None = None
    caption: str = ""
    table: Sequence[Sequence[str]] = ()
    wide: bool = False


class Source:
    """The files of a run directory, each read when it is asked for, and once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = Run.open(path).record

    @functools.cached_property
    def particles(self) -> Particles | None:
        """The run's particles, or those of the store that it made; None where there are none."""
        if is_store(self.path):
            return open_store(self.path).particles()
        found = self._first(PARTICLES)
        return star.read_particles(found) if found else None

    @functools.cached_property
    def map(self) -> mrc.MapFile | None:
        """The map to show (see MAPS)."""
        found = self._first(MAPS)
        return mrc.read_map(found) if found else None

    @functools.cached_property
    def within(self) -> list["Source"]:
        """The runs in directories of this one, in the order in which they began."""
        found = [Source(path.parent) for path in sorted(self.path.glob("*/run.json"))]
        return sorted(found, key=lambda source: str(source.record.get("started_utc")))

    @functools.cached_property
    def shown(self) -> "Source":
        """The run whose files the page shows: the last one within that made a map, if this one has none and its page is
        not about itself."""
        if self.record["job"] == "validate":
            return self
        made_a_map = [source for source in self.within if (source.path / MAPS[0]).is_file()]
        return made_a_map[-1] if made_a_map and not self._first(MAPS) else self

    @functools.cached_property
    def items(self) -> report_micrographs.Items:
        """What a run over movies or micrographs found of each."""
        return report_micrographs.Items(self.path, self.record)

    def curves(self, name: str) -> dict[str, np.ndarray]:
        """Columns of a table over shells, (S,) float64 each; empty where there is no such file."""
        return read_curves(self.path / name) if (self.path / name).is_file() else {}

    def _first(self, names: Sequence[str]) -> Path | None:
        return next((self.path / name for name in names if (self.path / name).is_file()), None)


def report(options: ReportOptions, *, progress: Progress = print) -> Report:
    """Write the page of a run directory. Raises InputError if it is none."""
    return Report(write_report(options.run))


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    The page holds its pictures and loads nothing. A run that is still going gives the page of its state so
    far. Raises InputError if the directory holds no run.
    """
    source = Source(Path(run_dir))
    record = source.record
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = importlib.resources.files("dcryo").joinpath(PAGE).read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        record=record,
        title=TITLES.get(record["job"], record["job"]),
        place=source.path.resolve(),
        times=[(word, record[key][:16].replace("T", " ") + " UTC") for word, key in TIMES if record.get(key)],
        cards=[*_cards(source.shown), ("Time", _duration(record.get("elapsed_s")), _machine(record))],
        sections=[section for make in SECTIONS if (section := _made(make, source.shown))],
        chain=[
            (
                one.path.name,
                TITLES.get(one.record["job"], one.record["job"]),
                one.record["status"],
                (one.path / PAGE).is_file(),
            )
            for one in source.within
        ],
        shown=source.shown.path.name if source.shown is not source else "",
        command=shlex.join(record.get("command", [])),
        again=[shlex.join(session["command"]) for session in record.get("resumed", [])],
        result=_rows(_FIGURES_OF.get(record["job"], lambda own: own.get("result"))(record)),
        options=_rows(record["options"]),
        inputs=[(row["path"], _bytes(row["bytes"]), row["digest"], row["digest_of"]) for row in record["inputs"]],
        versions=_rows({**(record.get("versions") or {}), **(record.get("platform") or {})}),
    )
    with replacing(source.path / PAGE) as file:
        file.write(page.encode())
    return source.path / PAGE


def _made(make: Callable[[Source], Section | None], source: Source) -> Section | None:
    try:
        return make(source)
    except Exception as error:  # whatever is wrong with a file, a page with a gap that says so is better than none
        title = make.__name__.strip("_").replace("_", " ").capitalize()
        return Section(title, caption=f"Could not be shown: {error} ({type(error).__name__}).")


def _cards(source: Source) -> list[tuple[str, str, str]]:
    """The figures at the head of the page: name, value, and what to know about it."""
    record = source.record
    result = record.get("result") or {}
    cards = [_resolution_card(source)]
    particles, shown = _or_none(source, "particles"), _or_none(source, "map")
    count = result.get("particles", len(particles) if particles is not None else None)
    if isinstance(result.get("micrographs"), int):
        cards.append(("Micrographs", f"{result['micrographs']:,}", f"{len(record['quarantined']):,} flagged"))
    if isinstance(count, int):
        halves = Counter(particles["half"].tolist()) if particles is not None and "half" in particles else {}
        cards.append(("Particles", f"{count:,}", f"halves {halves[1]:,} + {halves[2]:,}" if halves else ""))
    if shown is not None:
        cards += _size_cards(len(shown.array), shown.voxel_size_A)
    elif particles is not None and len(particles) and {"box_px", "pixel_size_A"} <= particles.optics.keys():
        cards += _size_cards(int(particles.optics["box_px"][0]), float(particles.optics["pixel_size_A"][0]))
    if record["options"].get("symmetry"):
        cards.append(("Symmetry", str(record["options"]["symmetry"]).upper(), ""))
    if record["iterations"]:
        last = record["iterations"][-1]
        share = last.get("searched_everywhere")
        said = "" if share is None else f"{100 * share:.0f} % searched everywhere"
        cards.append(("Iterations", str(last["iteration"]), said))
    if record["quarantined"] and "micrographs" not in result:
        cards.append(("Quarantined", f"{len(record['quarantined']):,}", "left out"))
    return [card for card in cards if card]


def _size_cards(box_px: int, pixel_size_A: float) -> list[tuple[str, str, str]]:
    return [
        ("Box", f"{box_px} px", f"{box_px * pixel_size_A:.0f} Å"),
        ("Pixel size", f"{pixel_size_A:.4g} Å", f"Nyquist {2 * pixel_size_A:.2f} Å"),
    ]


def _or_none(source: Source, name: str) -> Any:
    """A file's content, or None if it cannot be read; its sections say why."""
    try:
        return getattr(source, name)
    except Exception:
        return None


def _resolution_card(source: Source) -> tuple[str, str, str] | tuple[()]:
    result, iterations = source.record.get("result") or {}, source.record["iterations"]
    if source.record["job"] == "abinitio" and result.get("classes"):
        agree = f"{len(result['agreeing'])} of {result['starts']} starts agree"
        return "Models", f"{result['classes']}", f"{agree}; to {result['resolution_A']:.0f} Å"
    if source.record["job"] == "class3d" and "copy_of" in result:
        copies = sum(of > 0 for of in result["copy_of"])
        finest = min(result["resolution_of_classes_A"])
        return "Classes", f"{len(result['copy_of'])}", f"{copies} of them copies; the finest at {finest:.1f} Å"
    if result.get("classes"):
        kept = f"{result.get('classes_kept', 0)} look good"
        return "Classes", f"{result['classes']}", f"{kept}, the best to {result.get('resolution_A', 0):.1f} Å"
    if source.record["job"] == "mapmodel" and result.get("resolution_half_A"):
        return "Map and model", f"{result['resolution_half_A']:.2f} Å", f"FSC {HALF:g}; mean Q {result['q']:.2f}"
    if result.get("resolution_A"):
        return "Resolution", f"{result['resolution_A']:.2f} Å", f"FSC {GOLD_STANDARD:g}"
    if iterations and iterations[-1].get("resolution_A"):
        return (
            "Resolution so far",
            f"{iterations[-1]['resolution_A']:.2f} Å",
            f"iteration {iterations[-1]['iteration']}",
        )
    return ()


def _map(source: Source) -> Section | None:
    if source.map is None or source.record["job"] in ("abinitio", "class3d"):
        return None
    mask_path = source.path / "mask.mrc"
    mask = mrc.read_map(mask_path).array if mask_path.is_file() else None
    name = Path(source.map.path).name
    words = f"{name}: slices through the centre (above) and projections (below); density is bright."
    if mask is not None:
        words += " The line is the edge of the mask."
    return Section("Map", figures.map_views(source.map.array, source.map.voxel_size_A or 1.0, mask), words, wide=True)


def _fourier_shell_correlation(source: Source) -> Section | None:
    halves, truth = source.curves("fsc.csv"), source.curves("fsc_truth.csv")
    if (not halves and not truth) or source.record["job"] in ("postprocess", "mapmodel"):
        return None
    frequency = (halves or truth)["frequency_1_A"]
    curves: dict[str, np.ndarray] = {}
    marks = []
    for table, suffix, threshold in ((halves, "", GOLD_STANDARD), (truth, ", to the truth", HALF)):
        names = sorted(name for name in table if name.startswith("fsc"))
        for name in names:
            legend = (name.removeprefix("fsc").replace("_", " ").strip() or "maps") + suffix
            curves[legend] = table[name]
            if name == names[0] and (table[name][1:] < threshold).any():
                marks.append((legend, threshold, 1 / (crossing(table[name], threshold) * frequency[1])))
    words = f"{GOLD_STANDARD:g} is the threshold for two half maps, {HALF:g} for a map against a known truth."
    return Section("Fourier shell correlation", figures.fsc(frequency, curves, (GOLD_STANDARD, HALF), marks), words)


def _of_job(
    job: str, title: str, make: Callable[[Path, Mapping[str, Any]], tuple[str, str] | None], wide: bool = False
) -> Callable[[Source], Section | None]:
    """A section of the runs of one job: picture and words by `make`."""

    def section(source: Source) -> Section | None:
        made = make(source.path, source.record) if source.record["job"] == job else None
        return None if made is None else Section(title, *made, wide=wide)

    section.__name__ = title
    return section


def _aberrations(source: Source) -> Section | None:
    rows = report_ctfrefine.aberrations(source.record) if source.record["job"] == "ctfrefine" else []
    return Section("Aberrations", table=rows, wide=True) if rows else None


# Figures of a run that its sections do not show.
_FIGURES_OF: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "validate": report_validate.figures_of, "ctfrefine": report_ctfrefine.figures_of,
}  # fmt: skip


def _verdicts(source: Source) -> Section | None:
    rows = report_validate.verdicts(source.record) if source.record["job"] == "validate" else []
    return Section("Verdicts", table=rows, wide=True) if rows else None


def _components(source: Source) -> Section | None:
    rows = report_variability.components(source.record) if source.record["job"] == "variability" else []
    return Section("Components", table=rows, wide=True) if rows else None


def _worst_residues(source: Source) -> Section | None:
    rows = report_mapmodel.worst_residues(source.path, source.record) if source.record["job"] == "mapmodel" else ()
    return Section("Residues that are resolved least", table=rows) if rows else None


def _table_of_classes(source: Source) -> Section | None:
    rows = report_classes.table(source.record)
    words = (
        "The last but one column tells how the difference from the larger class that it is most like, found by one "
        "half of the particles sorted anew, correlates with that found by the other."
    )
    return Section("Classes and their sizes", caption=words, table=rows) if rows else None


_FINE = "Nothing was found to be wrong."
_WARNED_OF = {
    "postprocess": "with the half maps, the mask or the sharpening",
    "mapmodel": "with the map, the model or its place",
}


def warnings_of(record: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table of what a run warns of, in sentences; none where it has no result yet."""
    result = record.get("result") or {}
    return [[line] for line in result.get("warnings") or [_FINE]] if result else []


def _what_is_wrong(source: Source) -> Section | None:
    heading = _WARNED_OF.get(source.record["job"])
    lines = [] if heading is None else warnings_of(source.record)
    return Section("What is wrong", table=[[heading], *lines], wide=True) if heading and lines else None


def _for_the_deposition(source: Source) -> Section | None:
    rows = report_postprocess.deposition(source.record) if source.record["job"] == "postprocess" else ()
    return Section("For the deposition", table=rows) if rows else None


def _local_resolution(source: Source) -> Section | None:
    if not (source.path / "localres.mrc").is_file():
        return None
    result = source.record.get("result") or {}
    words = (
        f"map_local.mrc, coloured by the resolution at which the local FSC of the half maps falls below "
        f"{result['threshold']:g}, in windows {result['window_A']:.0f} Å wide and wider at lower resolution. Inside "
        f"the mask half of the map is better than {result['local_50_percent_A']:.2f} Å, and 90 % lies between "
        f"{result['local_5_percent_A']:.2f} and {result['local_95_percent_A']:.2f} Å."
    )
    filtered, resolution, mask = (
        mrc.read_map(source.path / f"{name}.mrc").array for name in ("map_local", "localres", "mask")
    )
    picture = figures.local_resolution(filtered, resolution, mask, float(result["pixel_size_A"]))
    return Section("Local resolution", picture, words, wide=True)


def _resolution_by_direction(source: Source) -> Section | None:
    table = source.curves("directional.csv")
    if not table:
        return None
    result = source.record.get("result") or {}
    places = read_curves(source.path / "directions.csv")
    directions = np.stack([places["x"], places["y"], places["z"]], axis=1)
    words = (
        f"{result['verdict']} Cones of 20° about each direction; latitude 90° is along z, longitude 0° (in the middle) "
        "along x."
    )
    picture = figures.directional(
        table["frequency_1_A"], table, directions, places["resolution_A"], symmetry.operators(result["symmetry"])
    )
    return Section("Resolution by direction", picture, words, wide=True)


def _surface(source: Source) -> Section | None:
    made = report_surfaces.section(source.path, source.record)
    return None if made is None else Section("Surface", *made, wide=True)


def _noise_and_signal(source: Source) -> Section | None:
    table = source.curves("spectra.csv")
    curves = {name.replace("half", "half "): values for name, values in table.items()
              if name.startswith(("noise", "signal"))}  # fmt: skip
    if not curves:
        return None
    curves = {name.replace("_", ", "): values for name, values in curves.items()}
    words = "Spectra that weigh the images and the map, estimated from the data."
    return Section("Noise and signal", figures.spectra(table["frequency_1_A"], curves), words)


def _convergence(source: Source) -> Section | None:
    iterations = source.record["iterations"]
    if not iterations or "median_rotation_change_deg" not in iterations[-1]:
        return None
    words = (
        "Change: median over the particles since the iteration before; uncertainty: median standard deviation of the "
        "rotations, the reference taken as it is."
    )
    if any(row.get("searched_everywhere", 1) < 0.5 for row in iterations):
        words += " Shaded: most poses are searched around those of the iteration before."
    return Section("Convergence", figures.convergence(iterations), words, wide=True)


def _classes(source: Source) -> Section | None:
    if not (source.path / CLASSES).is_file() or not (source.path / TABLE).is_file():
        return None
    table, stack = read_class_table(source.path / TABLE), mrc.open_stack(source.path / CLASSES)
    order = np.argsort(-table.rank, kind="stable")[:CLASSES_SHOWN]
    captions = [
        f"{number + 1}: {table.particles[number]:,}, {table.resolution_A[number]:.1f} Å\nrank {table.rank[number]:.2f}"
        for number in order
    ]
    words = (
        "The best first. Number of the class, its particles and the resolution at which the halves of the class "
        "correlate at 0.5; rank from 1 to 0, by mass, rim, evidence and resolution against the others. Red: not kept "
        "by select --auto"
    )
    reasons = Counter(table.reason[table.reason != ""].tolist()).most_common()
    if reasons:
        words += " (" + "; ".join(f"{count}: {reason}" for reason, count in reasons) + ")"
    return Section("Classes", figures.classes(stack.read(order), captions, table.kept[order]), words + ".", wide=True)


def _models(source: Source) -> Section | None:
    if source.record["job"] != "abinitio" or "share" not in (source.record.get("result") or {}):
        return None
    result = source.record["result"]
    maps = [mrc.read_map(source.path / f"class{k + 1}.mrc").array for k in range(result["classes"])]
    captions = [
        f"class{k + 1}.mrc: {100 * share:.0f} % of the particles, {resolution:.0f} Å"
        for k, (share, resolution) in enumerate(zip(result["share"], result["resolution_of_classes_A"], strict=True))
    ]
    words = (
        "Slices through the centre along z, y and x, and projections along them. The resolution is that at which maps "
        "of two halves of the particles, which were compared with one model, correlate at 0.5."
    )
    return Section("Models", figures.models(maps, captions), words, wide=True)


def _starts(source: Source) -> Section | None:
    made = report_models.starts(source.record)
    return None if made is None else Section("Starts", made[0], made[1], made[2], wide=True)


def _left_out(source: Source) -> Section | None:
    left_out = (source.record.get("result") or {}).get("left_out")
    if not isinstance(left_out, dict) or not left_out:
        return None
    table = [["particles left out", "reason"]] + [[f"{count:,}", reason] for reason, count in left_out.items()]
    return Section("Left out", table=table)


def _class_convergence(source: Source) -> Section | None:
    rows = source.record["iterations"]
    if not rows or "mean_log_evidence" not in rows[-1]:
        return None
    words = "Mean resolution of the classes, and the part of the images that changed class, per iteration."
    return Section("Convergence", figures.class_convergence(rows), words, wide=True)


def _of_items(title: str, make: Callable[[report_micrographs.Items], tuple[str, str] | None]) -> Callable:
    def section(source: Source) -> Section | None:
        if not (source.path / ITEMS).is_dir():
            return None
        made = make(source.items)
        return None if made is None else Section(title, *made, wide=True)

    section.__name__ = title
    return section


def _images(source: Source) -> Section | None:
    stack = source.path / "particles.mrcs"
    if is_store(source.path):
        store = open_store(source.path)
        images, name = store.read(np.arange(min(store.n, IMAGES_SHOWN))).images, source.path.name
    elif stack.is_file():
        opened = mrc.open_stack(stack)
        images, name = opened.read(np.arange(min(opened.readable, IMAGES_SHOWN))), stack.name
    elif len(examples := _examples(source)):
        words = "Particles of micrographs from all over the run."
        return Section("Images", figures.images(examples), words, wide=True)
    else:
        return None
    if len(images) == 0:
        return None
    words = f"The first {len(images)} of {name}, as they are."
    return Section("Images", figures.images(images), words, wide=True)


def _examples(source: Source) -> np.ndarray:
    """Images that were kept as examples of micrographs spread over the run, (n, D, D); empty where there are none."""
    names = [path.stem for path in sorted((source.path / ITEMS).glob("*.npz"))]
    spread = sorted({round(place) for place in np.linspace(0, len(names) - 1, min(len(names), IMAGES_SHOWN)).tolist()})
    kept = [found for place in spread if (found := arrays_of(source.path, names[place]).get("examples")) is not None]
    images = [of_one[turn] for turn in range(IMAGES_SHOWN) for of_one in kept if turn < len(of_one)]
    return np.stack(images[:IMAGES_SHOWN]).astype(np.float32) if images else np.empty((0, 0, 0))


def _orientations(source: Source) -> Section | None:
    particles = source.particles
    if particles is None or "rotation" not in particles or len(particles) == 0 or source.record["job"] == "class2d":
        return None
    of_result = (source.record.get("result") or {}).get("symmetry")
    name = str(source.record["options"].get("symmetry") or of_result or "C1")
    words = f"Viewing directions of {len(particles):,} particles"
    words += f", with their {name.upper()} mates" if name.upper() != "C1" else ""
    words += ". Latitude is the tilt (90° on the equator), longitude the rot angle (0° in the middle)."
    return Section("Orientations", figures.directions(particles["rotation"], symmetry.operators(name)), words)


def _shifts(source: Source) -> Section | None:
    particles = source.particles
    if particles is None or "origin_A" not in particles or not particles["origin_A"].any():
        return None
    length_A = np.hypot(*particles["origin_A"].T)
    return Section("Shifts", figures.shifts(particles["origin_A"]), f"Median {np.median(length_A):.2f} Å.")


def _defocus(source: Source) -> Section | None:
    particles = source.particles
    if particles is None or "defocus_u_A" not in particles or len(particles) == 0:
        return None
    u_A, v_A = particles["defocus_u_A"], particles["defocus_v_A"]
    words = f"From {(u_A + v_A).min() / 2e4:.2f} to {(u_A + v_A).max() / 2e4:.2f} µm underfocus."
    return Section("Defocus", figures.defocus((u_A + v_A) / 2, np.abs(u_A - v_A)), words)


def _certainty_of_poses(source: Source) -> Section | None:
    particles = source.particles
    if particles is None or "max_probability" not in particles or len(particles) == 0:
        return None
    words = "1 where one pose explains the image, near 0 where many do alike."
    return Section("Certainty of poses", figures.certainty(particles["max_probability"]), words)


def _precision_and_recall(source: Source) -> Section | None:
    labels = (source.record.get("result") or {}).get("labels")
    if not isinstance(labels, Mapping) or not labels.get("curve"):
        return None
    curve = np.stack([labels["curve"]["recall"], labels["curve"]["precision"]], axis=1)
    words = (
        f"Of the picks against {labels['labels']:,} given coordinates, over one threshold for all micrographs. The dot "
        f"is of the picks as they are: precision {labels['precision']:.3f}, recall {labels['recall']:.3f}, "
        f"F1 {labels['f1']:.3f}."
    )
    picture = figures.precision_recall({"picks": curve}, (labels["recall"], labels["precision"]))
    return Section("Precision and recall", picture, words)


def _iterations(source: Source) -> Section | None:
    iterations = source.record["iterations"]
    names = [name for name in dict.fromkeys(itertools.chain.from_iterable(iterations)) if name != "flow"]
    if not names:
        return None
    table = [[_label(name) for name in names]]
    table += [["" if row.get(name) is None else _value(row[name]) for name in names] for row in iterations]
    return Section("Iterations", table=table, wide=True)


def _quarantined(source: Source) -> Section | None:
    rows = source.record["quarantined"]
    if not rows:
        return None
    noun = "micrographs" if (source.path / ITEMS).is_dir() else "particles"
    reasons = Counter(str(row["reason"]) for row in rows).most_common(5)
    words = f"{len(rows):,} {noun} were left out: " + "; ".join(f"{count:,} {reason}" for reason, count in reasons)
    if len(rows) > QUARANTINED_SHOWN:
        words += f". The first {QUARANTINED_SHOWN} are listed here, all in run.json"
    table = [["row", "image", "reason"]]
    table += [[str(row["row"]), str(row["image"]), str(row["reason"])] for row in rows[:QUARANTINED_SHOWN]]
    title = "Flagged micrographs" if noun == "micrographs" else "Quarantined particles"
    return Section(title, caption=words + ".", table=table, wide=True)


SECTIONS: tuple[Callable[[Source], Section | None], ...] = (
    _what_is_wrong, _verdicts, _aberrations,
    _of_job("ctfrefine", "Phases of optics groups", report_ctfrefine.phases, True),
    _of_job("ctfrefine", "Changes of the defocus", report_ctfrefine.defocus_changes),
    _of_job("ctfrefine", "Defocus over micrographs", report_ctfrefine.over_micrographs, True),
    _of_job("validate", "Refinement of noise", report_validate.noise),
    _of_job("validate", "Particles against resolution", report_validate.particles_against_resolution),
    _of_job("validate", "Particles that the map has never seen", report_validate.seen_and_unseen),
    _of_job("postprocess", "Fourier shell correlation", report_postprocess.fourier_shell_correlation),
    _of_job("postprocess", "Guinier plot", report_postprocess.guinier),
    _of_job("postprocess", "Sharpened map", report_postprocess.sharpened_map, True),
    _of_job("mapmodel", "Fourier shell correlation with the model", report_mapmodel.fourier_shell_correlation),
    _worst_residues,
    _of_job("mapmodel", "Q-scores by residue", report_mapmodel.q_scores, True),
    _table_of_classes,
    _of_job("class3d", "Classes", report_classes.maps, True),
    _of_job("class3d", "Surfaces of the classes", report_classes.surfaces, True),
    _of_job("class3d", "Differences", report_classes.differences, True),
    _of_job("class3d", "Flow between classes", report_classes.flow, True),
    _of_job("class3d", "Confidence", report_classes.confidence, True),
    _components,
    _of_job("variability", "Maps along the components", report_variability.series, True),
    _of_job("variability", "Coordinates of the particles", report_variability.coordinates, True),
    _of_job("variability", "Agreement of the halves", report_variability.halves),
    _surface, _map, _models, _starts, _local_resolution, _resolution_by_direction, _for_the_deposition, _classes,
    _left_out, _fourier_shell_correlation, _noise_and_signal, _convergence, _class_convergence,
    *(_of_items(title, make) for title, make in report_micrographs.SECTIONS.items()),
    _images, _orientations, _shifts, _defocus, _certainty_of_poses, _precision_and_recall, _iterations, _quarantined,
)  # fmt: skip


def _machine(record: Mapping[str, Any]) -> str:
    return str((record.get("platform") or {}).get("cpu") or "")


def _rows(values: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [(_label(name), _value(value)) for name, value in (values or {}).items()]


def _label(name: str) -> str:
    """A name of the record as words, with its unit: resolution_A -> resolution (Å)."""
    for unit, shown in UNITS.items():
        stem = name.removesuffix(f"_{unit}")
        if stem != name:
            return f"{stem.replace('_', ' ')} ({shown})"
    return name.replace("_", " ")


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(_value, value)) or "none"
    return str(value)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, {"B": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{count:.3g} {unit}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "none"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
