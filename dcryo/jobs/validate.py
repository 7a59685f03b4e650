"""Whether a refinement has fitted noise: it is repeated with noise, with fewer particles, and asked of others.

The job repeats others: what it asks of a refinement is how it behaves as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from dcryo import graph
from dcryo.cluster import Cluster, check_kind, connect
from dcryo.data import mrc
from dcryo.data.atomic import replacing
from dcryo.data.curves import write_curves
from dcryo.data.model import read_model
from dcryo.data.particles import identities
from dcryo.data.run import Run
from dcryo.data.store import open_store, select
from dcryo.errors import InputError
from dcryo.jobs import em
from dcryo.jobs.dataset import load_dataset, load_reference
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, SeedOptions, argument
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.validate_parts import Tested, aligned_agreement, drawn, open_tested, substituted_store
from dcryo.kernels import alignment, fsc, mask_effect, overfitting, significance
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.likeness import mirrored
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import shell_at
from dcryo.kernels.symmetry import operators
from dcryo.steps.overfitting import (
    CANNOT_TELL,
    Found,
    agreement,
    bfactor_verdict,
    hand_verdict,
    noise_verdict,
    unseen_verdict,
)

TESTS = ("noise", "bfactor", "unseen", "hand")
# Subsets of halving size, up to so many, down to so many particles in a half; of each size so many that have no
# particle in common (of those that are refined, one).
_HALVINGS, _FEWEST, _DRAWS = 6, 32, 4
_MAPS = (".mrc", ".map", ".ccp4", ".mrc.gz", ".map.gz", ".mrc.bz2", ".map.bz2")


class ValidateOptions(OutOptions, ClusterOptions, SeedOptions):
    """Test a finished run of refine for overfitting.

    noise: it is repeated from images whose phases are random beyond a resolution. bfactor: maps of fewer and fewer
    particles, and the line of their resolutions. unseen: particles that a half map has never seen are aligned to it at
    low resolution and compared with it beyond. hand: against a model. noise costs as much as the run did and has to be
    asked for, as what is refined anew by --refine-subsets and --leave-out.

    Writes noise.csv, bfactor.csv, bfactor_fsc.csv and unseen.csv, the runs that it made (noise, subsets, without) and a
    report with a verdict for each test.
    """

    run: Path = argument("directory of a finished run of refine")
    tests: str = Field("bfactor,unseen,hand", description="tests to do: some of noise,bfactor,unseen,hand, or all")
    noise_beyond_A: float | None = Field(
        None,
        gt=0,
        description="resolution beyond which phases are random (default: where the run's FSC falls below 0.8)",
    )
    refine_subsets: bool = Field(False, description="bfactor: refine each subset anew in place of the run's poses")
    align_to_A: float | None = Field(
        None, gt=0, description="unseen: resolution up to which particles are aligned (default: as for the noise)"
    )
    leave_out: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="unseen: refine without this part of the particles, which are then the unseen ones",
    )
    others: Path | None = Field(
        None, description="unseen: store of particles that had no part in the run, in place of its other half"
    )
    model: Path | None = Field(None, description="hand: atomic model (.pdb, .cif) or map to compare both hands with")

    @field_validator("tests")
    @classmethod
    def _known(cls, value: str) -> str:
        words = TESTS if value.strip() == "all" else [word.strip() for word in value.split(",")]
        for word in words:
            if word not in TESTS:
                raise ValueError(f"{word!r} is no test; they are {', '.join(TESTS)}")
        return ",".join(name for name in TESTS if name in words)


@dataclass(frozen=True)
class ValidateResult:
    """verdicts: test -> what was found, in words; passed: test -> True, False, or None where it cannot tell; figures:
    test -> its numbers."""

    out: Path
    verdicts: dict[str, str]
    passed: dict[str, bool | None]
    figures: dict[str, dict[str, Any]]

    def summary(self) -> str:
        return "\n".join(f"{name}: {words}" for name, words in self.verdicts.items())


def validate(options: ValidateOptions, *, progress: Progress = print) -> ValidateResult:
    """Test a refinement; see `ValidateOptions`. InputError for bad input, before work starts.

    Runs within that are done are not done again where it is resumed.
    """
    check_kind(options.cluster)
    if options.leave_out is not None and options.others is not None:
        raise InputError("--leave-out and --others exclude each other; give one of them")
    tested = open_tested(options.run)
    model = None if options.model is None else _model(options.model, tested)
    if options.others is not None:
        _check_others(options.others, tested)
    inputs = [options.run, *(path for path in (options.others, options.model) if path)]
    run = Run.start(
        options.out, "validate", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    )
    with run:
        if not run.finished:
            found: dict[str, Found] = {}
            figures: dict[str, dict[str, Any]] = {}
            for name in options.tests.split(","):
                progress(f"test: {name}")
                if name == "hand":
                    found[name], figures[name] = _hand(tested, model)
                else:
                    found[name], figures[name] = _TESTS[name](options, tested, progress)
                progress(found[name].words)
            result = {
                name: {"passed": one.passed, "verdict": one.words, **figures[name]} for name, one in found.items()
            }
            run.done({**result, "particles": len(tested.rows), "symmetry": tested.options["symmetry"]})
    figures = {name: dict(run.record["result"][name]) for name in options.tests.split(",")}
    passed = {name: own.pop("passed") for name, own in figures.items()}
    verdicts = {name: own.pop("verdict") for name, own in figures.items()}
    return ValidateResult(options.out, verdicts, passed, figures)


def _again(options: ValidateOptions) -> dict[str, Any]:
    """Options of the runs within: they go on, or begin anew, as the whole does."""
    return {name: getattr(options, name) for name in ("resume", "overwrite", "cluster", "workers")}


def _refined_as(tested: Tested, options: ValidateOptions, store: Path, out: Path) -> RefineOptions:
    """The options of the run for other particles."""
    given = tested.options | {"store": store, "out": out, "seed": tested.seed} | _again(options)
    return RefineOptions(**given)


def _doubtful_shell(tested: Tested, given_A: float | None) -> int:
    if given_A is None:
        return overfitting.first_doubtful_shell(tested.fsc)
    shell = shell_at(given_A, tested.store.box_px, tested.store.pixel_size_A) + 1
    last = tested.store.box_px // 2
    if not 2 <= shell <= last:
        raise InputError(
            f"{given_A:g} A, the resolution at which doubt begins: expected one between {tested.width_A:.1f} A, the "
            f"width of the box, and {tested.width_A / last:.2f} A, Nyquist"
        )
    return shell


def _noise(options: ValidateOptions, tested: Tested, progress: Progress) -> tuple[Found, dict]:
    shell = _doubtful_shell(tested, options.noise_beyond_A)
    own = tested.selection(options.out / "particles.zarr", np.arange(len(tested.rows)), posed=False)
    with connect(options.cluster, options.workers) as cluster:
        store = substituted_store(own, options.out / "noise.zarr", shell, options.seed, cluster)
    refined = refine(_refined_as(tested, options, store.path, options.out / "noise"), progress=progress)
    true = mask_effect.corrected(tested.fsc, refined.fsc.masked, shell)
    curves = {"fsc": tested.fsc, "fsc_noise": refined.fsc.masked, "fsc_true": true}
    write_curves(options.out / "noise.csv", own.box_px, own.pixel_size_A, curves)
    independent = significance.independent_voxels(tested.mask, own.box_px, len(operators(tested.options["symmetry"])))
    return noise_verdict(tested.fsc, refined.fsc.masked, true, independent, shell, tested.width_A)


def _subsets(tested: Tested, seed: int, draws: int) -> list[list[np.ndarray]]:
    """Positions of the particles of each subset, size after size: of both halves as many, without repeats in a size."""
    halves = [np.flatnonzero(tested.particles["half"] == half) for half in (1, 2)]
    shuffled = [generator(seed, "subsets", number).permutation(rows) for number, rows in enumerate(halves)]
    least = min(map(len, halves))
    sizes = [least >> power for power in range(_HALVINGS + 1) if power == 0 or least >> power >= _FEWEST]
    return [
        [
            np.sort(np.concatenate([rows[draw * size : (draw + 1) * size] for rows in shuffled]))
            for draw in range(min(draws, least // size))
        ]
        for size in sizes
    ]


def _bfactor(options: ValidateOptions, tested: Tested, progress: Progress) -> tuple[Found, dict]:
    folder = options.out / "subsets"
    folder.mkdir(exist_ok=True)
    sizes = _subsets(tested, options.seed, 1 if options.refine_subsets else _DRAWS)
    curves, numbers = [], []
    for subsets in sizes:
        found = [
            _subset_fsc(options, tested, folder / f"{len(which)}-{draw}", which)
            for draw, which in enumerate(subsets, start=1)
        ]
        curves.append(np.mean(found, axis=0))
        numbers.append(len(subsets[0]))
        reached = tested.width_A / fsc.crossing(curves[-1], fsc.GOLD_STANDARD)
        progress(f"{numbers[-1]} particles, {len(subsets)} times: {reached:.2f} A")
    line = overfitting.resolution_line(np.array(numbers), np.stack(curves), fsc.GOLD_STANDARD, tested.width_A)
    resolutions = [tested.width_A / fsc.crossing(curve, fsc.GOLD_STANDARD) for curve in curves]
    write_curves(
        options.out / "bfactor_fsc.csv", tested.store.box_px, tested.store.pixel_size_A,
        {f"particles{number}": curve for number, curve in zip(numbers, curves, strict=True)},
    )  # fmt: skip
    rows = ["particles,ln_particles,resolution_A,inverse_square_1_A2,used,draws"]
    for number, resolution, used, subsets in zip(numbers, resolutions, line.used, sizes, strict=True):
        rows.append(f"{number},{np.log(number):.6f},{resolution:.5f},{resolution**-2:.8f},{int(used)},{len(subsets)}")
    with replacing(options.out / "bfactor.csv") as file:
        file.write(("\n".join(rows) + "\n").encode())
    figures = {
        "bfactor_A2": line.bfactor_A2,
        "bfactor_error_A2": line.error_A2,
        "bfactor_exact_A2": line.exact_A2,
        "slope": line.slope,
        "intercept": line.intercept,
        "subsets": len(numbers),
        "subsets_on_the_line": int(line.used.sum()),
        "refined_anew": options.refine_subsets,
    }
    verdict = bfactor_verdict(
        line.bfactor_A2, line.error_A2, line.exact_A2, int(line.used.sum()), options.refine_subsets, line.slope,
        resolutions[0],
    )  # fmt: skip
    return verdict, figures


def _subset_fsc(options: ValidateOptions, tested: Tested, out: Path, which: np.ndarray) -> np.ndarray:
    """FSC under the run's mask of the half maps from some particles, refined or from the poses that they have."""

    def silent(line: str, /, *, end: str = "\n") -> None:
        pass

    posed = not options.refine_subsets
    out.mkdir(exist_ok=True)
    store = tested.selection(out.with_suffix(".zarr"), which, posed)
    if not posed:
        return refine(_refined_as(tested, options, store.path, out), progress=silent).fsc.masked
    given = {"symmetry": tested.options["symmetry"], "mask": tested.path / "mask.mrc"} | _again(options)
    return reconstruct(ReconstructOptions(store=store.path, out=out, **given), progress=silent).fsc.masked


def _unseen(options: ValidateOptions, tested: Tested, progress: Progress) -> tuple[Found, dict]:
    judged, others = tested, None
    if options.leave_out is not None:
        judged, others = _without(options, tested, progress)
    elif options.others is not None:
        others = options.others
    shell = _doubtful_shell(judged, options.align_to_A)
    own = judged.selection(options.out / "seen.zarr", np.arange(len(judged.rows)), posed=False)
    with em.scratch(options.out) as scratch, connect(options.cluster, options.workers) as cluster:
        seen, unseen = _agreements(options, judged, own.path, others, shell, scratch, cluster)
    ours, theirs = agreement(seen), agreement(unseen)
    curves = {"fsc": judged.fsc, "seen": ours.mean, "seen_error": ours.error}
    curves |= {"unseen": theirs.mean, "unseen_error": theirs.error}
    write_curves(options.out / "unseen.csv", own.box_px, own.pixel_size_A, curves)
    verdict, figures = unseen_verdict(ours, theirs, judged.fsc, shell, judged.width_A)
    who = "other half" if others is None else ("left out" if options.leave_out is not None else "other particles")
    return verdict, {"unseen_are": who, **figures}


def _agreements(
    options: ValidateOptions,
    judged: Tested,
    own: Path,
    others: Path | None,
    shell: int,
    scratch: Path,
    cluster: Cluster,
) -> Sequence[np.ndarray]:
    """Sums over both half maps of how their own particles and unseen ones correlate with them, (3, S) each."""
    rows = []
    for half in (1, 2):
        ours = np.flatnonzero(judged.particles["half"] == half)
        rows.append(ours[drawn(len(ours), options.seed, "aligned", half)])
    seen, unseen = [], []
    for half in (1, 2):
        fixed = (shell - 1, "seen", scratch, options.seed)
        seen.append(aligned_agreement(judged, half, own, rows[half - 1], *fixed))
        fixed = (shell - 1, "unseen", scratch, options.seed)
        if others is None:
            unseen.append(aligned_agreement(judged, half, own, rows[2 - half], *fixed))
        else:
            chosen = drawn(open_store(others).n, options.seed, "aligned", 0)
            unseen.append(aligned_agreement(judged, half, others, chosen, *fixed))
    totals = [graph.tree_sum(both, name=name) for both, name in ((seen, "seen"), (unseen, "unseen"))]
    found = graph.compute(totals, cluster)
    return list(found)


def _without(options: ValidateOptions, tested: Tested, progress: Progress) -> tuple[Tested, Path]:
    """A refinement without a part of the particles, and those as a selection."""
    assert options.leave_out is not None
    left_out = []
    for half in (1, 2):
        own = np.flatnonzero(tested.particles["half"] == half)
        shuffled = generator(options.seed, "left-out", half).permutation(own)
        left_out.append(shuffled[: max(1, round(options.leave_out * len(own)))])
    which = np.sort(np.concatenate(left_out))
    kept = np.setdiff1d(np.arange(len(tested.rows)), which)
    store = tested.selection(options.out / "kept.zarr", kept, posed=False)
    others = tested.selection(options.out / "left_out.zarr", which, posed=False)
    out = options.out / "without"
    refine(_refined_as(tested, options, store.path, out), progress=progress)
    return open_tested(out), others.path


def _check_others(path: Path, tested: Tested) -> None:
    """InputError unless a store holds particles of the run's kind that had no part in it."""
    store = open_store(path)
    same = store.box_px == tested.store.box_px and abs(store.pixel_size_A / tested.store.pixel_size_A - 1) < 1e-3
    if not same:
        raise InputError(
            f"{path}: images of {store.box_px} px of {store.pixel_size_A:g} A; expected {tested.store.box_px} px of "
            f"{tested.store.pixel_size_A:g} A like those of {tested.path}"
        )
    common = int(np.isin(identities(store.particles()), identities(tested.particles)).sum())
    if common:
        raise InputError(
            f"{path}: {common} of its particles had a part in {tested.path}; expected none. Select the others"
        )
    load_dataset(path, 0)


def _model(path: Path, tested: Tested) -> np.ndarray:
    """Density of an atomic model or a map, in the run's box."""
    box, pixel = tested.store.box_px, tested.store.pixel_size_A
    if path.name.lower().endswith(_MAPS):
        return load_reference(tested.store, path)
    atoms = read_model(path)
    if 2 * atoms.radius_A > box * pixel:
        raise InputError(f"{path}: the model is {2 * atoms.radius_A:.0f} A wide, the box {box * pixel:.0f} A")
    return gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, box, pixel)


def _hand(tested: Tested, model: np.ndarray | None) -> tuple[Found, dict]:
    if model is None:
        return Found(None, CANNOT_TELL), {}
    shell = max(2, int(fsc.crossing(tested.fsc, fsc.HALF)))
    found = mrc.read_map(tested.path / "map.mrc").array * tested.mask
    ours, other = (alignment.align(one, model, shell, hands=False).correlation for one in (found, mirrored(found, 0)))
    figures = {"correlation": ours, "correlation_mirrored": other, "compared_to_A": tested.width_A / shell}
    return hand_verdict(ours, other), figures


_TESTS = {"noise": _noise, "bfactor": _bfactor, "unseen": _unseen}
