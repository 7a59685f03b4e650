"""Whether a refinement has fitted noise: it is repeated with noise, with fewer particles, and asked of others.

The job repeats others: what it asks of a refinement is how it behaves as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.spatial
from pydantic import Field, field_validator

from dcryo import graph
from dcryo.cluster import check_kind, connect
from dcryo.data import mrc
from dcryo.data.atomic import replacing
from dcryo.data.curves import write_curves
from dcryo.data.model import read_model
from dcryo.data.particles import identities
from dcryo.data.run import Run
from dcryo.data.store import open_store
from dcryo.errors import InputError
from dcryo.jobs import em
from dcryo.jobs.back_projection import maps_of
from dcryo.jobs.dataset import left_out_rows, load_dataset, load_reference
from dcryo.jobs.memory import back_projection_bytes, check_memory
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, SeedOptions, argument
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.refined import Refined, open_refined
from dcryo.jobs.validate_parts import Alignment, substituted_store
from dcryo.kernels import alignment, fsc, mask_effect, overfitting, significance
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.likeness import mirrored
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import shell_at
from dcryo.steps.overfitting import (
    CANNOT_TELL,
    ONLY_THE_OTHER_HALF,
    Verdict,
    agreement,
    bfactor_verdict,
    hand_verdict,
    noise_verdict,
    unseen_verdict,
)

TESTS = ("noise", "bfactor", "unseen", "hand")
# Numbers of particles are halved so often, down to so many in a half; of each number so many subsets that have no
# particle in common (of those that are refined anew, one).
_HALVINGS, _FEWEST, _DRAWS = 6, 32, 4
_MAPS = (".mrc", ".map", ".ccp4", ".mrc.gz", ".map.gz", ".mrc.bz2", ".map.bz2")
# Distance from an atom to the next: bonds are 1 to 2 A, and traces of nucleic acids have an atom in 7.
_NEIGHBOURS_A = (0.5, 12.0)


class ValidateOptions(OutOptions, ClusterOptions, SeedOptions):
    """Test a finished run of refine for overfitting.

    noise: it is repeated with images whose phases are random beyond a resolution. bfactor: maps of fewer and fewer
    particles, and the line of their resolutions. unseen: particles that a half map has never seen are aligned to it at
    low resolution and compared with it beyond. hand: against a model. The first, --refine-subsets and --leave-out
    refine anew and take as long as that does.

    Writes noise.csv, bfactor.csv, bfactor_fsc.csv and unseen.csv, the runs that it made (noise, subset..., without) and
    a report with a verdict for each test.
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


@dataclass(frozen=True)
class _Job:
    """What the tests have in common."""

    options: ValidateOptions
    tested: Refined
    model: np.ndarray | None
    run: Run
    progress: Progress

    @property
    def out(self) -> Path:
        return self.options.out

    def refined(self, store: Path, name: str) -> tuple[Path, np.ndarray]:
        """The refinement again with other particles: its directory, and the FSC of its half maps under the mask."""
        where = {key: getattr(self.options, key) for key in ("resume", "overwrite", "cluster", "workers")}
        given = self.tested.options | where | {"store": store, "out": self.out / name, "seed": self.tested.seed}
        return self.out / name, refine(RefineOptions(**given), progress=self.progress).fsc.masked


def validate(options: ValidateOptions, *, progress: Progress = print) -> ValidateResult:
    """Test a refinement; see `ValidateOptions`. InputError for bad input, before work starts.

    Runs within that are done are not done again where it is resumed.
    """
    check_kind(options.cluster)
    if options.leave_out is not None and options.others is not None:
        raise InputError("--leave-out and --others exclude each other; give one of them")
    tested = open_refined(options.run)
    for name in ("noise_beyond_A", "align_to_A"):
        _check_doubt(tested, name, getattr(options, name))
    model = None if options.model is None else _model(options.model, tested)
    if options.others is not None:
        _check_others(options.others, tested)
    inputs = [options.run, *(path for path in (options.others, options.model) if path)]
    run = Run.start(
        options.out, "validate", options.model_dump(), inputs, options.seed, options.resume, options.overwrite
    )
    names = options.tests.split(",")
    with run:
        if not run.finished:
            job, result = _Job(options, tested, model, run, progress), {}
            for name in names:
                progress(f"test: {name}")
                verdict, figures = _TESTS[name](job)
                progress(verdict.words)
                result[name] = {"passed": verdict.passed, "verdict": verdict.words, **figures}
            run.done({**result, "particles": len(tested.rows), "symmetry": tested.options["symmetry"]})
    figures = {name: dict(run.record["result"][name]) for name in names}
    passed = {name: own.pop("passed") for name, own in figures.items()}
    verdicts = {name: own.pop("verdict") for name, own in figures.items()}
    return ValidateResult(options.out, verdicts, passed, figures)


def _noise(job: _Job) -> tuple[Verdict, dict[str, Any]]:
    tested, options = job.tested, job.options
    shell = _doubtful_shell(tested, options.noise_beyond_A)
    own = tested.selection(job.out / "particles.zarr")
    with connect(options.cluster, options.workers) as cluster:
        store = substituted_store(own, job.out / "noise.zarr", shell, options.seed, cluster)
    _, of_noise = job.refined(store.path, "noise")
    # Noise that happens to correlate below zero adds nothing to what is true.
    true = mask_effect.corrected(tested.fsc, np.maximum(of_noise, 0), shell)
    curves = {"fsc": tested.fsc, "fsc_noise": of_noise, "fsc_true": true}
    write_curves(job.out / "noise.csv", own.box_px, own.pixel_size_A, curves)
    within = significance.independent_within(tested.mask, len(tested.group))
    return noise_verdict(tested.fsc, of_noise, true, within, shell, tested.width_A)


def _bfactor(job: _Job) -> tuple[Verdict, dict[str, Any]]:
    tested, refined = job.tested, job.options.refine_subsets
    sizes = _subsets([tested.rows_of(half) for half in (1, 2)], job.options.seed, 1 if refined else _DRAWS)
    numbers, curves, resolutions = [], [], []
    for subsets, curve in zip(sizes, (_refined_anew if refined else _from_their_poses)(job, sizes), strict=True):
        numbers.append(len(subsets[0]))
        curves.append(curve)
        resolutions.append(tested.width_A / fsc.crossing(curve, fsc.GOLD_STANDARD))
        job.progress(f"{numbers[-1]} particles, {len(subsets)} times: {resolutions[-1]:.2f} A")
    line = overfitting.resolution_line(np.array(numbers), np.stack(curves), fsc.GOLD_STANDARD, tested.width_A)
    write_curves(
        job.out / "bfactor_fsc.csv", tested.store.box_px, tested.store.pixel_size_A,
        {f"particles{number}": curve for number, curve in zip(numbers, curves, strict=True)},
    )  # fmt: skip
    rows = ["particles,ln_particles,resolution_A,inverse_square_1_A2,used,draws"]
    for number, resolution, used, subsets in zip(numbers, resolutions, line.used, sizes, strict=True):
        rows.append(f"{number},{np.log(number):.6f},{resolution:.5f},{resolution**-2:.8f},{int(used)},{len(subsets)}")
    with replacing(job.out / "bfactor.csv") as file:
        file.write(("\n".join(rows) + "\n").encode())
    figures = {
        "bfactor_A2": line.bfactor_A2,
        "bfactor_error_A2": line.error_A2,
        "slope": line.slope,
        "intercept": line.intercept,
        "subsets": len(numbers),
        "subsets_on_the_line": int(line.used.sum()),
        "refined_anew": refined,
    }
    reached_A = tested.width_A / fsc.crossing(tested.fsc, fsc.GOLD_STANDARD)
    return bfactor_verdict(line, reached_A, 2 * tested.store.pixel_size_A, refined), figures


def _subsets(halves: list[np.ndarray], seed: int, draws: int) -> list[list[np.ndarray]]:
    """Positions of the particles of each subset, size after size: of both halves as many, without repeats in a size."""
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


def _refined_anew(job: _Job, sizes: list[list[np.ndarray]]) -> Iterator[np.ndarray]:
    """FSC of the half maps of each size, every subset refined from the start."""
    for (which,) in sizes:
        name = f"subset{len(which)}"
        yield job.refined(job.tested.selection(job.out / f"{name}.zarr", which).path, name)[1]


def _from_their_poses(job: _Job, sizes: list[list[np.ndarray]]) -> Iterator[np.ndarray]:
    """FSC of the half maps of each size, the mean over its subsets, reconstructed from the poses that the run found.

    A size that is done is a checkpoint.
    """
    tested, options = job.tested, job.options
    box = tested.store.box_px
    data = load_dataset(tested.selection(job.out / "posed.zarr", posed=True).path, options.seed)
    found = job.run.latest_checkpoint()
    done = np.zeros((0, box // 2 + 1)) if found is None else found[1]["fsc"]
    with em.scratch(job.out) as scratch, connect(options.cluster, options.workers) as cluster:
        check_memory(cluster, box, back_projection_bytes(box), len(tested.group))
        for number, subsets in enumerate(sizes):
            if number >= len(done):
                tasks, drawn = [], []
                for draw, which in enumerate(subsets):
                    halves = np.zeros_like(data.halves)
                    halves[which] = data.halves[which]
                    drawn.append(replace(data, halves=halves))
                    maps, left_out = maps_of(drawn[-1], tested.group, tested.mask, scratch, f"draw{draw}-")
                    tasks.append((maps.fsc, left_out))
                curves = []
                for some, (curve, left_out) in zip(drawn, graph.compute(tasks, cluster), strict=True):
                    curves.append(curve.masked)
                    for half, of_half in enumerate(left_out, start=1):
                        job.run.quarantine(left_out_rows(some, half, of_half))
                done = np.concatenate([done, np.mean(curves, axis=0)[None]])
                job.run.save_checkpoint(len(done), {"fsc": done}, {})
            yield done[number]


def _unseen(job: _Job) -> tuple[Verdict, dict[str, Any]]:
    options, judged, others = job.options, job.tested, job.options.others
    who = "other half" if others is None else "other particles"
    if options.leave_out is not None:
        judged, others = _without(job, options.leave_out)
        who = "left out"
    shell = _doubtful_shell(judged, options.align_to_A)
    own = judged.selection(job.out / "seen.zarr")
    with em.scratch(job.out) as scratch, connect(options.cluster, options.workers) as cluster:
        to = Alignment.planned(judged, shell - 1, options.seed, scratch)
        to.check_memory(cluster)
        rows = [to.drawn(judged.rows_of(half), half) for half in (1, 2)]
        seen = [to.agreement(half, own.path, rows[half - 1], "seen") for half in (1, 2)]
        if others is None:
            unseen = [to.agreement(half, own.path, rows[2 - half], "unseen") for half in (1, 2)]
        else:
            chosen = to.drawn(range(open_store(others).n), 0)
            unseen = [to.agreement(half, others, chosen, "unseen") for half in (1, 2)]
        totals = [graph.tree_sum(both, name=name) for name, both in (("seen", seen), ("unseen", unseen))]
        ours, theirs = (agreement(sums) for sums in graph.compute(totals, cluster))
    curves = {"fsc": judged.fsc, "seen": ours.mean, "seen_error": ours.error}
    curves |= {"unseen": theirs.mean, "unseen_error": theirs.error}
    write_curves(job.out / "unseen.csv", own.box_px, own.pixel_size_A, curves)
    verdict, figures = unseen_verdict(ours, theirs, judged.fsc, shell, judged.width_A)
    if others is None and verdict.passed:
        verdict = Verdict(True, f"{verdict.words} {ONLY_THE_OTHER_HALF}")
    return verdict, {"unseen_are": who, **figures}


def _without(job: _Job, share: float) -> tuple[Refined, Path]:
    """A refinement without a share of the particles of each half, and those as a selection."""
    left_out = []
    for half in (1, 2):
        shuffled = generator(job.options.seed, "left-out", half).permutation(job.tested.rows_of(half))
        left_out.append(shuffled[: max(1, round(share * len(shuffled)))])
    which = np.sort(np.concatenate(left_out))
    kept = np.setdiff1d(np.arange(len(job.tested.rows)), which)
    out, _ = job.refined(job.tested.selection(job.out / "kept.zarr", kept).path, "without")
    return open_refined(out), job.tested.selection(job.out / "left_out.zarr", which).path


def _hand(job: _Job) -> tuple[Verdict, dict[str, Any]]:
    if job.model is None:
        return Verdict(None, CANNOT_TELL), {}
    tested, model = job.tested, job.model
    shell = max(2, int(fsc.crossing(tested.fsc, fsc.HALF)))
    found = mrc.read_map(tested.path / "map.mrc").array * tested.mask
    ours, other = (alignment.align(one, model, shell, hands=False).correlation for one in (found, mirrored(found, 0)))
    figures = {"correlation": ours, "correlation_mirrored": other, "compared_to_A": tested.width_A / shell}
    return hand_verdict(ours, other), figures


_TESTS = {"noise": _noise, "bfactor": _bfactor, "unseen": _unseen, "hand": _hand}


def _doubtful_shell(tested: Refined, given_A: float | None) -> int:
    """The shell from which on signal is to be proved."""
    if given_A is None:
        return overfitting.first_doubtful_shell(tested.fsc)
    return shell_at(given_A, tested.store.box_px, tested.store.pixel_size_A) + 1


def _check_doubt(tested: Refined, name: str, given_A: float | None) -> None:
    last = tested.store.box_px // 2
    if given_A is not None and not 2 <= _doubtful_shell(tested, given_A) <= last:
        raise InputError(
            f"--{name.removesuffix('_A').replace('_', '-')} {given_A:g} A: expected a resolution between "
            f"{tested.width_A:.1f} A, the width of the box, and {tested.width_A / last:.2f} A, Nyquist"
        )


def _check_others(path: Path, tested: Refined) -> None:
    """InputError unless a store holds particles of the run's kind that had no part in it."""
    store = open_store(path)
    if store.box_px != tested.store.box_px or abs(store.pixel_size_A / tested.store.pixel_size_A - 1) > 1e-3:
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


def _model(path: Path, tested: Refined) -> np.ndarray:
    """Density of an atomic model or a map, in the run's box. InputError where its size says that it is of other units
    or another molecule."""
    box, pixel = tested.store.box_px, tested.store.pixel_size_A
    if path.name.lower().endswith(_MAPS):
        given = mrc.read_map(path)
        width = max(given.array.shape) * given.voxel_size_A
        if 0 < width < tested.diameter_A:
            raise InputError(
                f"{path}: the map is {width:.0f} A wide, the particle {tested.diameter_A:.0f} A; expected one that "
                "holds it. Correct the voxel size in its header, in Angstrom"
            )
        return load_reference(tested.store, path)
    atoms = read_model(path)
    if len(atoms.position_A) > 1:
        nearest = scipy.spatial.cKDTree(atoms.position_A).query(atoms.position_A, k=2)[0][:, 1]
        apart = float(np.median(nearest))
        if not _NEIGHBOURS_A[0] < apart < _NEIGHBOURS_A[1]:
            raise InputError(
                f"{path}: its atoms are {apart:.3g} A from the next; expected {_NEIGHBOURS_A[0]:g} to "
                f"{_NEIGHBOURS_A[1]:g} A. Its coordinates have to be in Angstrom"
            )
    if 2 * atoms.radius_A > box * pixel:
        raise InputError(
            f"{path}: the model is {2 * atoms.radius_A:.0f} A wide, the box {box * pixel:.0f} A; give the part that is "
            "in the map"
        )
    return gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2, box, pixel)
