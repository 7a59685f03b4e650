"""Refinement of the CTF of particles whose poses are known: defocus, astigmatism, aberrations, magnification."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from dcryo import graph
from dcryo.cluster import Cluster, check_kind, connect
from dcryo.data import mrc, star
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.data.store import Store, is_store, open_store, select
from dcryo.errors import InputError
from dcryo.jobs import em
from dcryo.jobs.ctfrefine_table import aberration_columns, described, groups_of, write_micrographs
from dcryo.jobs.dataset import BATCH, CtfColumns, ctf_columns, shard_size
from dcryo.jobs.memory import check_memory
from dcryo.jobs.options import ClusterOptions, OutOptions, Progress, argument
from dcryo.jobs.refined import Refined, open_refined
from dcryo.kernels import ctf_sums, fsc, slices
from dcryo.kernels.ctf import phase_table, wavelength_A
from dcryo.kernels.ctf_sums import ASTIGMATISM, BFACTOR, DIAGONAL, PHASE_SHIFT, SCALE, CtfSums
from dcryo.kernels.shells import half_plane, resolution_A
from dcryo.kernels.shrinkage import Settled
from dcryo.steps import ctf_refinement
from dcryo.steps.ctf_refinement import BEAM_TILT, EVEN, LARGEST_STRETCH, TREFOIL, GroupFit, Images, OpticsGroups, Range

# Changes of the defocus are looked at in steps of this part of the period of C^2 at the resolution, but no wider or
# finer than these.
_STEPS_A_PERIOD, _WIDEST_STEP_A, _FINEST_STEP_A = 10, 100.0, 5.0
# The least that a reference has to be worth.
_WORST_A = 12.0
PHASES = "phases.mrcs"


class CtfrefineOptions(OutOptions, ClusterOptions):
    """Refine the CTF of a finished refinement's particles against their half maps.

    By default the defocus of each particle, and beam tilt and trefoil of each optics group. Refine or reconstruct again
    with the result, and repeat. Writes particles.star (with RELION's columns of aberrations), particles.zarr (the same
    as a selection of the store, for the next job), micrographs.csv, phases.mrcs (of each optics group: odd phase as
    observed, as fitted, even phase as observed, as fitted, in rad) and a report.
    """

    run: Path = argument("directory of a finished refine")
    defocus: Literal["particle", "micrograph", "no"] = Field(
        "particle", description="whose defocus is refined: each particle's, drawn towards its micrograph's; or that of "
        "all of a micrograph together"
    )  # fmt: skip
    defocus_range_A: float = Field(
        1000.0, gt=0, le=1e5, description="how far to look on either side of the micrograph's mean defocus"
    )
    astigmatism: bool = Field(False, description="refine each micrograph's astigmatism")
    phase_shift: bool = Field(False, description="refine each micrograph's phase shift (phase plates)")
    bfactor: bool = Field(False, description="refine each micrograph's B factor and scale")
    beam_tilt: bool = Field(True, description="fit the beam tilt of each optics group (axial coma)")
    trefoil: bool = Field(True, description="fit the trefoil of each optics group")
    fourth_order: bool = Field(
        False, description="fit even aberrations of each optics group to fourth order: tetrafoil, spherical aberration"
    )
    magnification: bool = Field(False, description="fit the anisotropic magnification of each optics group")
    keep_astigmatism: bool = Field(
        False,
        description="with --magnification: the table's astigmatism was not measured in images so distorted, and is not "
        "carried over to the new magnification",
    )
    lowest_resolution_A: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="coarser resolution is left out of the fits"
    )
    passes: int = Field(3, gt=0, le=20, description="passes over the images, each from what the last one found")

    @model_validator(mode="after")
    def _something(self) -> "CtfrefineOptions":
        fits = (self.astigmatism, self.phase_shift, self.bfactor, self.beam_tilt, self.trefoil, self.fourth_order)
        if self.defocus == "no" and not any((*fits, self.magnification)):
            raise ValueError("there is nothing to fit; ask for defocus, astigmatism, beam_tilt or another")
        return self


@dataclass(frozen=True)
class CtfrefineResult:
    """particles: with their new CTFs; groups: per optics group, its aberrations by name (see `described`)."""

    out: Path
    particles: Particles
    store: Store
    groups: list[dict[str, Any]]

    def summary(self) -> str:
        lines = [f"{self.out}: {len(self.particles)} particles"]
        for one in self.groups:
            tilt = f"beam tilt {one['beam_tilt_x_mrad']:+.3f}, {one['beam_tilt_y_mrad']:+.3f} mrad"
            trefoil = f"trefoil {one['trefoil_A']:.0f} A"
            lines.append(f"{one['name']}: {tilt}, {trefoil}, anisotropy {one['anisotropy_percent']:.2f} %")
        return "\n".join(lines)


@dataclass(frozen=True)
class _State:
    """All that one pass hands to the next. Of n particles: defocus_A (mean of U and V), astigmatism_A (n, 2) (half of
    U - V, along x and the diagonal), phase_shift_deg, bfactor_A2, scale, defocus_error_A; of G groups the coefficients,
    their errors and the pictures of `GroupFit`; spread_A: of defocus within micrographs."""

    number: int
    defocus_A: np.ndarray
    astigmatism_A: np.ndarray
    phase_shift_deg: np.ndarray
    bfactor_A2: np.ndarray
    scale: np.ndarray
    defocus_error_A: np.ndarray
    odd: np.ndarray
    even: np.ndarray
    magnification: np.ndarray
    odd_error: np.ndarray
    even_error: np.ndarray
    magnification_error: np.ndarray
    pictures: np.ndarray
    usable: np.ndarray
    spread_A: float


_ARRAYS = tuple(name for name in _State.__dataclass_fields__ if name not in ("number", "spread_A"))


@dataclass(frozen=True)
class _Job:
    """What stays the same. micrograph: (n,) index; order: (n,) particles in the order of the pieces."""

    options: CtfrefineOptions
    refined: Refined
    columns: CtfColumns
    micrograph: np.ndarray
    within: Range
    step_A: float
    scratch: Path

    @property
    def box_px(self) -> int:
        return self.refined.store.box_px

    @property
    def order(self) -> np.ndarray:
        return np.concatenate([self.refined.rows_of(half) for half in (1, 2)])

    @property
    def group(self) -> np.ndarray:
        return self.refined.particles["optics_row"]


@dataclass(frozen=True)
class Piece:
    """A task's particles: rows of a store, all of one half, and what is known of them, as in `Images`;
    first_A: (n,) first of `steps` changes of the defocus that are looked at."""

    name: str
    store: Store
    step_A: float
    steps: int
    rows: np.ndarray
    group: np.ndarray
    norm: np.ndarray
    rotation: np.ndarray
    origin_px: np.ndarray
    table: np.ndarray
    rates: np.ndarray
    own_table: np.ndarray
    first_A: np.ndarray

    def batch(self, some: slice) -> tuple[Images, dict[int, str]]:
        """Some of the images; those that cannot be read are not a number, and listed as position -> reason."""
        read = self.store.read(self.rows[some])
        images = read.images
        images[list(read.bad)] = np.nan
        offsets = self.first_A[some, None] + self.step_A * np.arange(self.steps)
        known = (self.group, self.norm, self.rotation, self.origin_px, self.table, self.rates, self.own_table)
        return Images(images, offsets, *(array[some] for array in known)), dict(read.bad)


def ctfrefine(options: CtfrefineOptions, *, progress: Progress = print) -> CtfrefineResult:
    """Refine CTFs; see `CtfrefineOptions`. InputError for bad input, before work starts.

    A finished run is read back where it is resumed.
    """
    check_kind(options.cluster)
    refined = open_refined(options.run)
    within = _range(refined, options)
    columns = ctf_columns(refined.particles, options.run / "particles.star")
    micrograph = _micrographs(refined.particles, options)
    run = Run.start(
        options.out, "ctfrefine", options.model_dump(), [options.run], None, options.resume, options.overwrite
    )
    if run.finished:
        return _read(run)
    with run, em.scratch(run.path) as scratch, connect(options.cluster, options.workers) as cluster:
        job = _Job(options, refined, columns, micrograph, within, _step_A(refined, columns, within), scratch)
        check_memory(cluster, job.box_px, _task_bytes(job), len(refined.group))
        progress(
            f"{len(refined.particles)} particles of {micrograph.max() + 1} micrographs, from "
            f"{resolution_A(within.shell_min, job.box_px, refined.store.pixel_size_A):.1f} to "
            f"{resolution_A(within.shell_max, job.box_px, refined.store.pixel_size_A):.2f} A, on {cluster.description}"
        )
        state, begun = _latest(run), _first_state(job)
        state = state or begun
        while state.number < options.passes:
            state, left_out = _pass(job, begun, state, cluster)
            run.quarantine(_quarantined(job, left_out))
            figures = _figures(job, begun, state)
            run.iteration(figures)
            progress(
                f"pass {state.number}: defocus moved by {figures['median_defocus_change_A']:.0f} A, particles lie "
                f"within {state.spread_A:.0f} A"
            )
            if state.number < options.passes:
                run.save_checkpoint(
                    state.number, {name: getattr(state, name) for name in _ARRAYS}, {"spread_A": state.spread_A}
                )
        return _write(job, begun, state, run)


def _range(refined: Refined, options: CtfrefineOptions) -> Range:
    """The shells that are fitted; InputError where the maps are too coarse to tell anything of a CTF."""
    last = int(fsc.crossing(refined.fsc, fsc.GOLD_STANDARD))
    first = max(1, int(np.ceil(refined.width_A / options.lowest_resolution_A)))
    if refined.width_A / max(last, 1) > _WORST_A or first + 2 > last:
        raise InputError(
            f"{options.run}: its half maps agree to {refined.width_A / max(last, 1):.1f} A; expected better than "
            f"{min(_WORST_A, options.lowest_resolution_A):g} A, coarser maps say nothing of the CTF. Refine further"
        )
    return Range(first, last)


def _micrographs(particles: Particles, options: CtfrefineOptions) -> np.ndarray:
    """Index of each particle's micrograph, (n,) from 0; without names, particles of one CTF are of one micrograph."""
    if "micrograph" in particles:
        return np.unique(particles["micrograph"], return_inverse=True)[1].reshape(-1)
    if options.astigmatism or options.phase_shift or options.bfactor or options.defocus == "micrograph":
        raise InputError(
            f"{options.run / 'particles.star'}: has no rlnMicrographName, and what was asked for is fitted for each "
            "micrograph. Add it to the source and import that again"
        )
    known = [particles[name] for name in ("defocus_u_A", "defocus_v_A", "defocus_angle_deg", "optics_row")]
    return np.unique(np.stack(known, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def _step_A(refined: Refined, columns: CtfColumns, within: Range) -> float:
    frequency = within.shell_max / refined.width_A
    period = 1 / (float(wavelength_A(columns.voltage_kV).max()) * frequency**2)
    return float(np.clip(period / _STEPS_A_PERIOD, _FINEST_STEP_A, _WIDEST_STEP_A))


def _first_state(job: _Job) -> _State:
    columns, n = job.columns, len(job.group)
    groups = groups_of(job.refined.particles, columns)
    half, twice = (columns.defocus_u_A - columns.defocus_v_A) / 2, 2 * np.deg2rad(columns.defocus_angle_deg)
    count = len(groups.odd)
    return _State(
        number=0,
        defocus_A=(columns.defocus_u_A + columns.defocus_v_A) / 2,
        astigmatism_A=half[:, None] * np.stack([np.cos(twice), np.sin(twice)], axis=1),
        phase_shift_deg=columns.phase_shift_deg,
        bfactor_A2=columns.ctf_bfactor_A2,
        scale=columns.ctf_scale,
        defocus_error_A=np.zeros(n),
        odd=groups.odd,
        even=groups.even,
        magnification=groups.magnification,
        odd_error=np.zeros_like(groups.odd),
        even_error=np.zeros_like(groups.even),
        magnification_error=np.zeros((count, 2, 2)),
        pictures=np.zeros((count, 4, job.box_px, job.box_px), dtype=np.float32),
        usable=np.ones(n, dtype=bool),
        spread_A=0.0,
    )


def _latest(run: Run) -> _State | None:
    found = run.latest_checkpoint()
    if found is None:
        return None
    number, arrays, figures = found
    return _State(number=number, spread_A=figures["spread_A"], **arrays)


def _task_bytes(job: _Job) -> int:
    """Peak of a task: its reference, sums of all groups, a batch of images, their transforms, what is made of them."""
    box, pixels, groups = job.box_px, len(half_plane(job.within.shell_max).kx), int(job.group.max()) + 1
    depth, height, width = slices.volume_shape(_reach(job.within), box)
    of_groups = groups * pixels * (8 * ctf_sums.PHASE_SUMS + 8 + 4 * 8)
    image = 6 * box**2 + 8 * box * (box // 2 + 1) + (8 + 4 + 4) * pixels
    return 8 * depth * height * width + of_groups + BATCH * image


def _reach(within: Range) -> int:
    """Highest shell of the reference: stretched frequencies lie further out than those of the image."""
    return int(np.ceil((within.shell_max + 1) * (1 + 2 * LARGEST_STRETCH)))


def _even_pass(options: CtfrefineOptions, number: int) -> bool:
    """Even aberrations and defocus explain much of the same, so that where both are fitted, each has its own passes."""
    return options.fourth_order and (options.defocus == "no" or number % 2 == 0)


def _pass(job: _Job, begun: _State, state: _State, cluster: Cluster) -> tuple[_State, dict[int, str]]:
    """One pass over all images, and what follows."""
    options, number = job.options, state.number + 1
    groups = OpticsGroups(state.odd, state.even, state.magnification, groups_of(job.refined.particles, job.columns)[3])
    pieces, places = _pieces(job, begun, state)
    own_groups = groups_of(job.refined.particles, job.columns)
    own_power = {half: graph.call(_own_noise, job.refined, half, job.within, name=f"own-{half}") for half in (1, 2)}
    references = {
        half: graph.call(_write_reference, job.refined, half, job.within, job.scratch, name=f"reference-{half}")
        for half in (1, 2)
    }
    outs = [
        graph.call(
            learn_piece, piece, references[half], job.refined.noise_power(half), groups, own_power[half], own_groups,
            job.within,
            name=f"learn-{piece.name}", parts=6,
        )
        for half, piece in pieces
    ]  # fmt: skip
    phases, stretch, particles = (graph.tree_sum([out[part] for out in outs], name=f"part{part}") for part in range(3))
    curves, normal, left_out = ([out[part] for out in outs] for part in (3, 4, 5))
    micrograph = job.micrograph[job.order]
    wanted = _wanted(options)
    refines = options.defocus != "no" and not (options.fourth_order and _even_pass(options, number))
    settled = fitted = magnified = None
    if refines:
        settled = graph.call(
            ctf_refinement.settled_defocus,
            curves,
            micrograph,
            job.step_A,
            options.defocus == "particle",
            name="defocus",
        )
    if wanted:
        first = _carried_over(job, begun.magnification, replace(begun, magnification=state.magnification))
        before = _of_micrographs(job, first, state)[:, wanted]
        longest = ctf_refinement.longest_steps(pieces[0][1].rates[0], wanted, job.within)
        fitted = graph.call(
            ctf_refinement.fit_micrographs, normal, micrograph, wanted, before, longest, settled, name="micrographs"
        )
    odd = [0, 1] * (options.beam_tilt or options.trefoil)
    odd += list(BEAM_TILT) * options.beam_tilt + list(TREFOIL) * options.trefoil
    even = range(EVEN) if _even_pass(options, number) else ()
    fits = [
        graph.call(
            fit_one_group, phases, groups, group, odd, tuple(even), job.within, job.box_px, name=f"group-{group}"
        )
        for group in range(len(state.odd))
    ]
    if options.magnification:
        magnified = graph.call(ctf_refinement.fit_magnification, stretch, particles, groups, name="magnification")
    settled, fitted, magnified, fits, left_out = graph.compute((settled, fitted, magnified, fits, left_out), cluster)
    rows = {int(place[position]): reason for place, of_piece in zip(places, left_out, strict=True)
            for position, reason in of_piece.items()}  # fmt: skip
    usable = state.usable.copy()
    usable[list(rows)] = False
    before = state.magnification
    state = replace(state, number=number, usable=usable)
    state = _with_micrographs(job, _with_defocus(job, begun, state, settled), fitted)
    return _carried_over(job, before, _with_groups(state, fits, magnified)), rows


def _carried_over(job: _Job, before: np.ndarray, state: _State) -> _State:
    """The state with its defocus and astigmatism meaning the same after a change of magnification."""
    if job.options.keep_astigmatism or np.array_equal(before, state.magnification):
        return state
    defocus, astigmatism = ctf_refinement.carried_over(
        state.defocus_A, state.astigmatism_A, before[job.group], state.magnification[job.group]
    )
    return replace(state, defocus_A=defocus, astigmatism_A=astigmatism)


def _write_reference(refined: Refined, half: int, within: Range, scratch: Path) -> Path:
    """The task: the reference of a half made ready where every task can map it; once for all passes."""
    path = scratch / f"reference{half}.npy"
    if not path.exists():
        weighted = ctf_refinement.weighted_reference(
            refined.half_map(half), refined.mask, refined.fsc, within.shell_max
        )
        em.write_reference(weighted, _reach(within), path)
    return path


def _own_noise(refined: Refined, half: int, within: Range) -> np.ndarray:
    """The task: what particles of a half share with its map."""
    return ctf_refinement.own_noise(refined.half_map(half), refined.mask, refined.fsc, within.shell_max)


def _pieces(job: _Job, begun: _State, state: _State) -> tuple[list[tuple[int, Piece]], list[np.ndarray]]:
    """The tasks' particles, each with its half, and where they are in the table."""
    refined, columns = job.refined, job.columns
    table, own_table = _table(job, state), _table(job, begun)
    rates = ctf_sums.rates(wavelength_A(columns.voltage_kV), columns.pixel_size_A, job.box_px)
    particles = refined.particles
    norm = particles["norm_correction"]
    origin_px = particles["origin_A"] / columns.pixel_size_A[:, None]
    first, steps = _searched(job, begun)
    pieces, places = [], []
    known = (job.group, norm, particles["rotation"], origin_px, table, rates, own_table, first - state.defocus_A)
    for half in (1, 2):
        every = refined.rows_of(half)
        size = shard_size(len(every))
        for index, start in enumerate(range(0, len(every), size)):
            at = every[start : start + size]
            own = (array[at] for array in known)
            pieces.append((half, Piece(f"{half}-{index}", refined.store, job.step_A, steps, refined.rows[at], *own)))
            places.append(at)
    return pieces, places


def _table(job: _Job, state: _State) -> np.ndarray:
    columns = job.columns
    return phase_table(
        job.box_px, columns.pixel_size_A, *_axes(state), columns.voltage_kV, columns.spherical_aberration_mm,
        columns.amplitude_contrast, state.phase_shift_deg, state.bfactor_A2, state.scale,
    )  # fmt: skip


def _searched(job: _Job, begun: _State) -> tuple[np.ndarray, int]:
    """First defocus that is looked at of each particle, (n,), and how many: about the first mean of its micrograph, or,
    where all of a micrograph move together, about its own first value. None are where it is not refined."""
    options = job.options
    if options.defocus == "no":
        return begun.defocus_A, 1
    centre, reach = begun.defocus_A, options.defocus_range_A
    if options.defocus == "particle":
        count = np.bincount(job.micrograph)
        centre = (np.bincount(job.micrograph, weights=begun.defocus_A) / count)[job.micrograph]
        reach += float(np.abs(begun.defocus_A - centre).max())
    steps = 2 * int(np.ceil(reach / job.step_A)) + 1
    return centre - job.step_A * (steps // 2), max(steps, 3)


def _axes(state: _State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Defocus U and V in A, U the greater, and the angle of U in degrees."""
    size = np.hypot(*state.astigmatism_A.T)
    angle = np.rad2deg(np.arctan2(state.astigmatism_A[:, 1], state.astigmatism_A[:, 0])) / 2
    return state.defocus_A + size, state.defocus_A - size, angle


def _wanted(options: CtfrefineOptions) -> list[int]:
    """Parameters of micrographs beside their defocus."""
    wanted = [ASTIGMATISM, DIAGONAL] * options.astigmatism + [PHASE_SHIFT] * options.phase_shift
    return wanted + [BFACTOR, SCALE] * options.bfactor


def _of_micrographs(job: _Job, begun: _State, state: _State) -> np.ndarray:
    """How far each micrograph's parameters are from where they began, (M, PARAMETERS)."""
    first = np.unique(job.micrograph, return_index=True)[1]
    out = np.zeros((len(first), ctf_sums.PARAMETERS))
    out[:, [ASTIGMATISM, DIAGONAL]] = (state.astigmatism_A - begun.astigmatism_A)[first]
    out[:, PHASE_SHIFT] = np.deg2rad(state.phase_shift_deg - begun.phase_shift_deg)[first]
    out[:, BFACTOR] = (state.bfactor_A2 - begun.bfactor_A2)[first]
    out[:, SCALE] = np.log(np.maximum(state.scale / begun.scale, 1e-3))[first]
    return out


def learn_piece(
    piece: Piece,
    reference_path: Path,
    noise_power: np.ndarray,
    groups: OpticsGroups,
    own_power: np.ndarray,
    own_groups: OpticsGroups,
    within: Range,
) -> tuple:
    """The task: its three sums (see `ctf_sums.CtfSums`), curves, normal equations, and position -> reason of what was
    left out."""
    reference = em.read_reference(reference_path)
    pixels = half_plane(within.shell_max)
    optics, own = (ctf_refinement.optics_of(one, pixels, piece.store.box_px) for one in (groups, own_groups))
    sums: CtfSums = ctf_sums.empty(len(groups.odd), len(pixels.kx))
    curves, normal, left_out = [], [], {}
    for first in range(0, len(piece.rows), BATCH):
        batch, bad = piece.batch(slice(first, first + BATCH))
        curve, equations, usable = ctf_refinement.learn(
            sums, batch, reference, noise_power, optics, own_power, own, within
        )
        curves.append(curve)
        normal.append(equations)
        bad = dict.fromkeys(np.flatnonzero(~usable).tolist(), "the image or its CTF is not finite") | bad
        left_out.update({first + position: reason for position, reason in bad.items()})
    return (*sums, np.concatenate(curves), np.concatenate(normal), left_out)


def fit_one_group(
    phases: np.ndarray, groups: OpticsGroups, group: int, odd: Sequence[int], even: Sequence[int], within: Range,
    box_px: int,
) -> GroupFit:  # fmt: skip
    """The task: `fit_group` of the sums of all groups."""
    return ctf_refinement.fit_group(phases[group], groups, group, odd, even, within, box_px)


def _with_defocus(job: _Job, begun: _State, state: _State, settled: Settled | None) -> _State:
    if settled is None:
        return state
    first, _ = _searched(job, begun)
    defocus, error = state.defocus_A.copy(), np.zeros(len(state.defocus_A))
    defocus[job.order] = first[job.order] + settled.offset
    error[job.order] = settled.error
    return replace(state, defocus_A=defocus, defocus_error_A=error, spread_A=settled.spread)


def _with_micrographs(job: _Job, state: _State, fitted: ctf_refinement.MicrographFit | None) -> _State:
    if fitted is None:
        return state
    change = np.zeros((len(fitted.change), ctf_sums.PARAMETERS))
    change[:, _wanted(job.options)] = fitted.change
    own = change[job.micrograph]
    return replace(
        state,
        astigmatism_A=state.astigmatism_A + own[:, [ASTIGMATISM, DIAGONAL]],
        phase_shift_deg=state.phase_shift_deg + np.rad2deg(own[:, PHASE_SHIFT]),
        bfactor_A2=state.bfactor_A2 + own[:, BFACTOR],
        scale=state.scale * np.exp(own[:, SCALE]),
    )


def _with_groups(state: _State, fits: Sequence[GroupFit], magnified: tuple[np.ndarray, np.ndarray] | None) -> _State:
    magnification, error = magnified or (state.magnification, state.magnification_error)
    even_error = np.stack([one.fit.even_error for one in fits])
    return replace(
        state,
        odd=np.stack([one.fit.odd for one in fits]),
        even=np.stack([one.fit.even for one in fits]),
        odd_error=np.stack([one.fit.odd_error for one in fits]),
        # Those of the last pass that fitted them.
        even_error=even_error if even_error.any() else state.even_error,
        magnification=magnification,
        magnification_error=error,
        pictures=np.stack([one.pictures for one in fits]).astype(np.float32),
    )


def _quarantined(job: _Job, left_out: dict[int, str]) -> list[dict[str, Any]]:
    particles = job.refined.particles
    rows = sorted(left_out.items())
    return [
        {
            "row": row + 1,
            "image": f"{particles['image_index'][row] + 1:06d}@{particles['image_path'][row]}",
            "reason": reason,
        }
        for row, reason in rows
    ]


def _groups(job: _Job, state: _State) -> list[dict[str, Any]]:
    return described(
        job.refined.particles, job.columns, (state.odd, state.even, state.magnification),
        (state.odd_error, state.even_error, state.magnification_error),
        resolution_A(job.within.shell_max, job.box_px, job.refined.store.pixel_size_A),
    )  # fmt: skip


def _figures(job: _Job, begun: _State, state: _State) -> dict[str, Any]:
    change = np.abs(state.defocus_A - begun.defocus_A)
    return {
        "iteration": state.number,
        "median_defocus_change_A": float(np.median(change)),
        "median_defocus_error_A": float(np.median(state.defocus_error_A)),
        "defocus_spread_A": state.spread_A,
        "largest_odd_phase_deg": max(one["odd_deg"] for one in _groups(job, state)),
    }


def _write(job: _Job, begun: _State, state: _State, run: Run) -> CtfrefineResult:
    options, particles = job.options, job.refined.particles
    change = state.defocus_A - begun.defocus_A
    columns: dict[str, np.ndarray] = {}
    if not np.array_equal(state.astigmatism_A, begun.astigmatism_A):
        columns |= dict(zip(("defocus_u_A", "defocus_v_A", "defocus_angle_deg"), _axes(state), strict=True))
        columns["defocus_angle_deg"] = columns["defocus_angle_deg"] % 180
    elif options.defocus != "no":
        columns |= {name: particles[name] + change for name in ("defocus_u_A", "defocus_v_A")}
    if options.phase_shift:
        columns["phase_shift_deg"] = state.phase_shift_deg
    if options.bfactor:
        columns |= {"ctf_bfactor_A2": state.bfactor_A2, "ctf_scale": state.scale}
    optics = aberration_columns(particles, job.columns, state.odd, state.even, state.magnification)
    refined = particles.replace(**columns).replace_optics(**optics)
    own = {"dcryoDefocusChange": change, "dcryoDefocusError": state.defocus_error_A}
    extra = particles.extra | {name: np.array([f"{one:.1f}" for one in values]) for name, values in own.items()}
    refined = replace(refined, extra=extra).take(state.usable)
    star.write_particles(run.path / "particles.star", refined, None)
    names = ("half", "rotation", "origin_A", "ctf_scale", "norm_correction", *columns)
    if not is_store(run.path / "particles.zarr"):
        select(
            job.refined.store, job.refined.rows[state.usable], run.path / "particles.zarr",
            {name: refined[name] for name in names}, optics,
        )  # fmt: skip
    with mrc.StackWriter(
        run.path / PHASES, 4 * len(state.odd), job.box_px, job.refined.store.pixel_size_A, "float32"
    ) as writer:
        writer.write(0, state.pictures.reshape(-1, job.box_px, job.box_px))
    astigmatism = 2 * np.hypot(*(state.astigmatism_A - begun.astigmatism_A).T)
    write_micrographs(run.path / "micrographs.csv", particles, job.micrograph, change, astigmatism)
    groups = _groups(job, state)
    run.done(
        {
            "particles": int(state.usable.sum()),
            "symmetry": job.refined.options["symmetry"],
            "median_defocus_change_A": float(np.median(np.abs(change))),
            "median_defocus_error_A": float(np.median(state.defocus_error_A)),
            "defocus_spread_A": state.spread_A,
            "fitted_to_A": resolution_A(job.within.shell_max, job.box_px, job.refined.store.pixel_size_A),
            "groups": groups,
        }
    )
    return _read(run)


def _read(run: Run) -> CtfrefineResult:
    """The result of a run that is done."""
    path = run.path
    particles = star.read_particles(path / "particles.star")
    return CtfrefineResult(path, particles, open_store(path / "particles.zarr"), run.record["result"]["groups"])
