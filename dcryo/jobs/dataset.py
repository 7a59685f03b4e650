"""What the jobs over particles share: a store made ready, its two halves, its mask, and how it is cut into shards."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcryo.data import mrc, star
from dcryo.data.particles import Particles
from dcryo.data.run import RECORD, Run
from dcryo.data.store import Store, is_store, open_store
from dcryo.errors import InputError
from dcryo.kernels import ewald, filters, masks
from dcryo.kernels.aberrations import odd_coefficients
from dcryo.kernels.ctf import ctf, wavelength_A
from dcryo.kernels.randomness import generator
from dcryo.kernels.rings import Rings
from dcryo.kernels.shells import half_plane
from dcryo.steps.aberrations import NO_ABERRATIONS, Aberrations, corrected
from dcryo.steps.ewald import Sidebands
from dcryo.steps.expectation import Batch

TABLE = "particles.star"

# Images that a task reads and holds at once.
BATCH = 64
# Neighbours of which mini-batches are made; small ones of few images are no longer random.
_RUN = 32
_SHARDS_PER_HALF = 8
_SMALLEST_SHARD, _LARGEST_SHARD = 64, 4096
# The soft edge of the spherical mask, outside its diameter.
_MASK_EDGE_A, _LEAST_MASK_EDGE_PX = 10.0, 3.0
# Optics columns, of the schema or other ones, of what `Shard.read` undoes: images that it read do not have that any
# more.
UNDONE_BY_READING = ("odd_zernike", "beam_tilt_x_mrad", "beam_tilt_y_mrad", "magnification")
# Share of the box that the particle is taken to fill where the user does not say.
DEFAULT_DIAMETER = 0.85


class CtfColumns(NamedTuple):
    """What the CTF of each of n particles depends on; every item (n,) float64, in the units of `kernels.ctf.ctf`."""

    pixel_size_A: np.ndarray
    defocus_u_A: np.ndarray
    defocus_v_A: np.ndarray
    defocus_angle_deg: np.ndarray
    voltage_kV: np.ndarray
    spherical_aberration_mm: np.ndarray
    amplitude_contrast: np.ndarray
    phase_shift_deg: np.ndarray
    ctf_bfactor_A2: np.ndarray
    ctf_scale: np.ndarray


_CTF_DEFAULTS = {"phase_shift_deg": 0.0, "ctf_bfactor_A2": 0.0, "ctf_scale": 1.0}
# Maps are at one pixel size; over a box of 256 px this share of it moves no atom by half a pixel.
_PIXEL_SIZE_TOLERANCE = 2e-3
# A CTF is at most 1, times the particle's scale.
_CTF_LARGEST = 1e4
# Beyond these a number is no defocus (0.1 mm) or no fraction, but an error of units or of a file.
_CTF_LIMITS = {"defocus_u_A": 1e6, "defocus_v_A": 1e6, "amplitude_contrast": 1.0}
# Magnifications along two axes that differ by more than this factor are no microscope's.
_MOST_ANISOTROPIC = 1.25
_TILT = ("beam_tilt_x_mrad", "beam_tilt_y_mrad")
# Names under which stores of earlier versions carried what is now read and honoured.
_ONCE_CARRIED = ("rlnOddZernike", "rlnEvenZernike", "rlnMagMat00")


def ctf_columns(particles: Particles, source: Path) -> CtfColumns:
    """The CTF columns of particles; InputError, naming the source, where one that has no default is missing, and for
    values that no microscope has."""

    def column(name: str) -> np.ndarray:
        if name in particles.optics:
            return np.asarray(particles.optics_of(name), dtype=np.float64)
        if name in particles:
            return np.asarray(particles[name], dtype=np.float64)
        if name in _CTF_DEFAULTS:
            return np.full(len(particles), _CTF_DEFAULTS[name])
        raise InputError(
            f"{source}: the particles have no {name}; the CTF cannot be computed without it. Import them again from "
            "a STAR or .cs file that has it (for .cs, add the passthrough file)"
        )

    columns = CtfColumns(*(column(name) for name in CtfColumns._fields))
    for name, limit in _CTF_LIMITS.items():
        values = getattr(columns, name)
        wrong = np.flatnonzero(np.abs(values) > limit)
        if len(wrong):
            raise InputError(
                f"{source}: {name} of {_image_name(particles, wrong[0])} is {values[wrong[0]]:g}; expected at most "
                f"{limit:g}. Correct it in the source and import that again"
            )
    return columns


def aberrations_of(particles: Particles, source: Path) -> dict[int, Aberrations]:
    """The aberrations of optics groups that have any, by their row. InputError, naming the source, for a magnification
    that no microscope has."""
    optics, found = particles.optics, {}
    nothing = np.zeros((particles.n_groups, 0))
    for row in range(particles.n_groups):
        odd = optics.get("odd_zernike", nothing)[row]
        x, y = (
            float(optics[name][row]) if name in optics else 0.0 for name in ("beam_tilt_x_mrad", "beam_tilt_y_mrad")
        )
        if x or y:
            odd = odd_coefficients(odd, x, y, optics["spherical_aberration_mm"][row], optics["voltage_kV"][row])
        even = optics.get("even_zernike", nothing)[row]
        (a, b), (c, d) = _magnification(particles, row, source)
        one = Aberrations(
            tuple(odd.tolist()) if odd.any() else (), tuple(even.tolist()) if even.any() else (), ((a, b), (c, d))
        )
        if one != NO_ABERRATIONS:
            found[row] = one
    return found


def _magnification(particles: Particles, row: int, source: Path) -> list[list[float]]:
    matrix = particles.optics["magnification"][row] if "magnification" in particles.optics else np.eye(2)
    largest, smallest = np.linalg.svd(matrix, compute_uv=False)
    if np.linalg.det(matrix) <= 0 or not 1 / _MOST_ANISOTROPIC < smallest <= largest < _MOST_ANISOTROPIC:
        raise InputError(
            f"{source}: the magnification (rlnMagMat00, ...) of optics group {row + 1} is {matrix.tolist()}; expected "
            "a matrix that is the identity but for a few percent. Correct it in the source and import that again"
        )
    return list(matrix.tolist())


@dataclass(frozen=True)
class Dataset:
    """A store with what a job over particles needs.

    particles: n rows; rows: (n,) of each in the store; aberrations: of optics groups that have any, by row; halves:
    (n,) int8, 1 or 2; has_poses: whether the particles came with poses; rotation, origin_px: those, or identity and
    zero. Origins are of images without aberrations, as `Shard.read` gives them.
    """

    store: Store
    particles: Particles
    rows: np.ndarray
    ctf: CtfColumns
    aberrations: Mapping[int, Aberrations]
    halves: np.ndarray
    has_poses: bool
    rotation: np.ndarray
    origin_px: np.ndarray

    @property
    def groups(self) -> np.ndarray:
        """Optics group of each particle, (n,), row of the noise spectra."""
        return self.particles["optics_row"]

    @property
    def n_groups(self) -> int:
        return int(self.groups.max()) + 1

    def rows_of(self, half: int) -> np.ndarray:
        return np.flatnonzero(self.halves == half)

    def origins_as_recorded(self, origins: np.ndarray) -> np.ndarray:
        """Origins (n, 2) of all particles in the images as they were recorded, which is where tables have them: the
        way back of what `origin_px` went through. In any unit."""
        recorded = origins
        for rows, group in _rows_with(self.aberrations, self.groups):
            if group.anisotropic:
                recorded = np.where(rows[:, None], group.observed_origin(origins), recorded)
        return recorded


def _rows_with(aberrations: Mapping[int, Aberrations], group: np.ndarray) -> list[tuple[np.ndarray, Aberrations]]:
    """The optics groups (n,) of particles that have aberrations: which particles are theirs, (n,) bool, and those."""
    return [(group == row, one) for row, one in aberrations.items() if np.any(group == row)]


def load_dataset(path: Path, seed: int) -> Dataset:
    """Open a store, a selection, or a run as it left its particles, for a job over them. InputError where CTF values
    are missing, or a half is empty or shares an image with the other.

    Where the source did not split the particles into halves, the seed does. InputError too for images whose CTF was
    applied before, and for groups of different pixel sizes.
    """
    particles, store, rows = open_particles(path)
    _check_optics(particles, path)
    n = len(particles)
    halves = _halves(particles, seed, path)
    counts = np.bincount(halves, minlength=3)[1:]
    if counts.min() == 0:
        raise InputError(
            f"{path}: {counts[0]} particles in half 1 and {counts[1]} in half 2; a gold-standard job needs both. "
            "Remove the column of random subsets (rlnRandomSubset) to have them made anew"
        )
    has_poses = posed(path, particles)
    rotation = particles["rotation"] if has_poses else np.tile(np.eye(3), (n, 1, 1))
    columns = ctf_columns(particles, path)
    origin_A = particles["origin_A"] if "origin_A" in particles else np.zeros((n, 2))
    origin_px = origin_A / columns.pixel_size_A[:, None]
    aberrations = aberrations_of(particles, path)
    for own, group in _rows_with(aberrations, particles["optics_row"]):
        if group.anisotropic:
            origin_px[own] = group.origin(origin_px[own])
    return Dataset(store, particles, rows, columns, aberrations, halves, has_poses, rotation, origin_px)


def open_particles(path: Path) -> tuple[Particles, Store, np.ndarray]:
    """The particles of a store, of a selection, or of a finished run as it left them; the store with their images, and
    their rows in it. InputError where there are none, or they are not in the store that the run was made from."""
    # What an import left unfinished has a record too, but is no run: the store says what is wrong with it.
    if is_store(path) or path.suffix == ".zarr" or not (path / RECORD).is_file():
        store = open_store(path)
        return store.particles(), store, np.arange(store.n)
    run, table = Run.open(path), path / TABLE
    record = run.record
    if record["status"] == "done" and record["job"] == "reconstruct":  # maps of the poses that its input has
        return open_particles(run.inputs()[0])
    found = store_of(path)
    if record["status"] != "done" or found is None or not table.is_file():
        raise InputError(f"{path}: not a finished run with {TABLE}, a store or a selection")
    store, particles = found, star.read_particles(table)
    known = store.particles()
    rows = _rows_of(particles, known)
    if rows.min(initial=0) < 0:
        row = int(np.argmin(rows))
        raise InputError(
            f"{table}, row {row + 1}: {_image_name(particles, row)} is not in {store.path}, which the run was made from"
        )
    return _with_columns_of(particles, known.take(rows)), store, rows


def posed(path: Path, particles: Particles) -> bool:
    """Whether particles opened from a path have poses; those of a run of class2d have but an angle in the plane."""
    return "rotation" in particles and (is_store(path) or Run.open(path).record["job"] != "class2d")


def store_of(run_path: Path) -> Store | None:
    """The store that a run's particles came from, through the runs between; None where no input of it is one."""
    if not (run_path / RECORD).is_file():
        return None
    for path in Run.open(run_path).inputs():
        if is_store(path):
            return open_store(path)
        if path.is_dir() and (found := store_of(path)) is not None:
            return found
    return None


def _rows_of(particles: Particles, known: Particles) -> np.ndarray:
    """Rows of `known` that have the images of `particles`, -1 where none; repeated images match by their number in an
    expansion, or else in their order."""
    numbered = "symmetry_copy" in particles and "symmetry_copy" in known
    places: dict[tuple, list[int]] = {}
    for row, image in enumerate(_images(known, numbered)):
        places.setdefault(image, []).append(row)
    seen: dict[tuple, int] = {}
    rows = np.full(len(particles), -1, np.int64)
    for row, image in enumerate(_images(particles, numbered)):
        if image in places:
            count = seen.get(image, 0)
            rows[row] = places[image][min(count, len(places[image]) - 1)]
            seen[image] = count + 1
    return rows


def _images(particles: Particles, numbered: bool) -> Iterable[tuple]:
    names = ("image_path", "image_index", "symmetry_copy") if numbered else ("image_path", "image_index")
    return zip(*(particles[name].tolist() for name in names), strict=True)


def _with_columns_of(particles: Particles, known: Particles) -> Particles:
    """`particles` with those columns of `known`, row for row the same images, that they lack."""
    return replace(particles, columns={**known.columns, **particles.columns}, extra={**known.extra, **particles.extra})


def as_read(particles: Particles) -> Particles:
    """What is true of images as `Shard.read` gives them: all but what it undoes."""
    return replace(
        particles,
        optics={name: values for name, values in particles.optics.items() if name not in UNDONE_BY_READING},
        optics_extra={name: values for name, values in particles.optics_extra.items() if name not in UNDONE_BY_READING},
    )


def _check_optics(particles: Particles, path: Path) -> None:
    """InputError for optics groups whose images this program would treat wrongly in silence."""
    for label in ("rlnCtfDataAreCtfPremultiplied", "rlnCtfDataArePhaseFlipped"):
        done = particles.optics_extra.get(label, particles.extra.get(label, np.array(["0"])))
        if np.any(done.astype(float) != 0):
            raise InputError(
                f"{path}: {label} is set: the CTF was applied to these images already; expected images as recorded. "
                "Extract them again without that"
            )
    for label in _ONCE_CARRIED:
        if label in particles.optics_extra:
            raise InputError(
                f"{path}: was written by an earlier version, which did not honour its {label}; import its source again"
            )
    pixel_sizes = np.unique(particles.optics_of("pixel_size_A")) if "pixel_size_A" in particles.optics else np.ones(1)
    if pixel_sizes[-1] / pixel_sizes[0] > 1 + _PIXEL_SIZE_TOLERANCE:
        raise InputError(
            f"{path}: optics groups with pixels of {pixel_sizes[0]:g} and {pixel_sizes[-1]:g} A; expected one size. "
            "Rescale the images of one of them, or refine the groups apart"
        )


def _halves(particles: Particles, seed: int, path: Path) -> np.ndarray:
    """Half of each particle, (n,) int8: as the source split them, or at random. Rows of one image stay together, for an
    image in both halves would show in their FSC as signal."""
    image = _numbered_images(particles)
    halves = particles["half"] if "half" in particles else np.zeros(len(particles), dtype=np.int8)
    if not np.isin(halves, (1, 2)).all():
        shuffled = generator(seed, "halves", 0).permutation(image.max() + 1)
        return (1 + shuffled % 2).astype(np.int8)[image]
    first = np.unique(image, return_index=True)[1][image]
    apart = np.flatnonzero(halves != halves[first])
    if len(apart):
        raise InputError(
            f"{path}: {_image_name(particles, apart[0])} is in both halves, as particles {first[apart[0]] + 1} and "
            f"{apart[0] + 1} ({len(apart)} such in all); expected each image in one half. Take the repeats out of the "
            "source, or its column of random subsets (rlnRandomSubset) to have them made anew"
        )
    return halves


def _numbered_images(particles: Particles) -> np.ndarray:
    """Number of each particle's image, (n,) int64, from 0 in the order in which images first appear."""
    stack = np.unique(particles["image_path"], return_inverse=True)[1]
    index = particles["image_index"]
    _, first, inverse = np.unique(stack * (index.max() + 1) + index, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[inverse]


def _image_name(particles: Particles, row: int) -> str:
    return f"{particles['image_index'][row] + 1:06d}@{particles['image_path'][row]}"


def load_mask(store: Store, diameter_A: float | None, path: Path | None) -> tuple[np.ndarray, float]:
    """The solvent mask and the diameter of the particle in Angstrom: a soft sphere, or a user's mask.

    InputError where the sphere does not fit the box or the mask's box, pixel size or values are wrong.
    """
    box, pixel = store.box_px, store.pixel_size_A
    diameter = particle_diameter_A(store, diameter_A)
    if path is None:
        return masks.sphere(box, diameter / pixel, mask_edge_px(pixel)), diameter
    given = mrc.read_map(path)
    if given.array.shape != (box,) * 3 or abs(given.voxel_size_A / pixel - 1) > 0.01:
        raise InputError(
            f"{path}: mask of {given.array.shape} voxels of {given.voxel_size_A:g} A; expected {(box,) * 3} of "
            f"{pixel:g} A like the particles. Rescale it"
        )
    low, high = float(given.array.min()), float(given.array.max())
    if not (low >= 0 and high <= 1 and high > 0):
        raise InputError(f"{path}: mask values run from {low:g} to {high:g}; expected 0 (solvent) to 1 (particle)")
    return given.array, diameter


def particle_diameter_A(store: Store, diameter_A: float | None) -> float:
    """The diameter that a user gave, or what the particle is taken to fill of the box; InputError where it does not
    fit."""
    pixel, width = store.pixel_size_A, store.box_px * store.pixel_size_A
    diameter = diameter_A or DEFAULT_DIAMETER * width
    if not 4 * pixel < diameter <= width:
        raise InputError(
            f"--mask-diameter {diameter:g} A: expected more than {4 * pixel:g} A and at most the box, {width:g} A"
        )
    return diameter


def mask_edge_px(pixel_size_A: float) -> float:
    """Width of the soft edge of a mask."""
    return max(_MASK_EDGE_A / pixel_size_A, _LEAST_MASK_EDGE_PX)


def load_reference(store: Store, path: Path) -> np.ndarray:
    """A map brought to the box and pixel size of the particles, (D, D, D) float32. InputError where it is no map."""
    given = mrc.read_map(path)
    array, voxel = given.array, given.voxel_size_A
    if len(set(array.shape)) != 1:
        raise InputError(f"{path}: a map of {array.shape} voxels; expected a cube. Pad it")
    if not np.isfinite(array).all() or array.std() == 0:
        raise InputError(f"{path}: the map is constant or not finite; expected density")
    if not voxel > 0:
        raise InputError(f"{path}: no voxel size in the header; set it (the particles have {store.pixel_size_A:g} A)")
    ratio = voxel / store.pixel_size_A
    if not 0.1 < ratio < 10:
        raise InputError(
            f"{path}: voxels of {voxel:g} A, where the particles have {store.pixel_size_A:g} A; expected less than a "
            "factor of ten between them. Correct its header"
        )
    if abs(ratio - 1) > 1e-3:
        array = filters.resample_volume(array, ratio)
    return filters.pad_or_crop(array, store.box_px)


@dataclass(frozen=True)
class Shard:
    """A task's particles: rows of a store, all of one half, and what is known of them (n, ...) each.

    trusted: (n,) bool, whether the pose is so certain that only its surroundings need to be searched; given_rotation,
    given_origin_px: the poses that the data set came with; belonging: (n, K) which part of each particle the references
    of K classes were made with.
    """

    name: str
    store: Store
    rows: np.ndarray
    ctf: CtfColumns
    aberrations: Mapping[int, Aberrations]
    group: np.ndarray
    norm: np.ndarray
    scale: np.ndarray
    rotation: np.ndarray
    origin_px: np.ndarray
    trusted: np.ndarray
    given_rotation: np.ndarray
    given_origin_px: np.ndarray
    belonging: np.ndarray

    def transfer(self, some: slice | np.ndarray) -> np.ndarray:
        """CTFs of a batch, (n, P) float32 on `half_plane(D // 2)`."""
        every = half_plane(self.store.box_px // 2)
        return self._ctf_at(some, every.kx, every.ky)

    def transfer_on_rings(self, some: slice, of: Rings) -> np.ndarray:
        """CTFs of a batch on rings, (angles / 2, n, R) float32. Rings of a smaller box with the same field of view will
        do: frequencies are in Fourier pixels."""
        found = self._ctf_at(some, of.kx.ravel(), of.ky.ravel())
        return np.ascontiguousarray(np.swapaxes(found.reshape(-1, *of.kx.shape), 0, 1))

    def sidebands(self, some: slice, hand: int, diameter_A: float) -> Sidebands:
        """What a batch's images show of a particle so thick that the Ewald sphere is not flat; hand: 1 or -1."""
        every, box, optics = half_plane(self.store.box_px // 2), self.store.box_px, self.ctf
        pixel_A = optics.pixel_size_A[some]
        # cos(gamma) = -sin(gamma - pi / 2), and a phase shift is taken off gamma.
        P = self.transfer(some) + 1j * self._ctf_at(some, every.kx, every.ky, quarter=True)
        curvature = ewald.curvature_per_px(wavelength_A(optics.voltage_kV[some]), box, pixel_A)
        return Sidebands(P, hand * curvature, diameter_A / self.store.pixel_size_A)

    def _ctf_at(self, some: slice | np.ndarray, kx: np.ndarray, ky: np.ndarray, quarter: bool = False) -> np.ndarray:
        """CTFs of a batch at frequencies (P,) in Fourier pixels, (n, P) float32: with even aberrations, and 0 where
        nothing was recorded; or, a quarter of a turn away, cos(gamma) in place of -sin(gamma)."""
        box, columns = self.store.box_px, CtfColumns(*(column[some] for column in self.ctf))
        if quarter:
            columns = columns._replace(phase_shift_deg=columns.phase_shift_deg + 90)
        values = ctf(kx, ky, box, *columns)
        for rows, group in _rows_with(self.aberrations, self.group[some]):
            if group.even:
                of_group = CtfColumns(*(column[rows] for column in columns))
                phase = group.even_phase(kx, ky, box * float(of_group.pixel_size_A[0]))
                values[rows] = ctf(kx, ky, box, *of_group, even_phase_rad=phase)
            if group.anisotropic:
                values[np.ix_(rows, ~group.recorded(kx, ky, box))] = 0
        return values

    def read(self, some: slice | np.ndarray) -> tuple[Batch, dict[int, str]]:
        """A batch of the shard's images with their CTFs; and which of them cannot be used, as position -> reason.

        Those are not a number, which every step leaves out. Here is where odd aberrations are taken off images and
        their magnification is made even: no step after this one has to know of them.
        """
        read = self.store.read(self.rows[some])
        images, bad = read.images, dict(read.bad)
        for rows, group in _rows_with(self.aberrations, self.group[some]):
            if group.moves_images:
                images[rows] = corrected(images[rows], group, float(self.ctf.pixel_size_A[some][rows][0]))
        values = self.transfer(some)
        largest = np.abs(values).max(axis=1)
        for position in np.flatnonzero(~(largest <= _CTF_LARGEST)).tolist():
            bad.setdefault(position, f"its CTF reaches {largest[position]:g}; see its B factor and scale")
        images[list(bad)] = np.nan
        values[list(bad)] = 0
        poses = (self.rotation, self.origin_px, self.given_rotation, self.given_origin_px)
        known = (array[some] for array in (self.group, self.norm, self.scale, *poses, self.belonging))
        return Batch(images, values, *known), bad


def shard_size(count: int) -> int:
    """Particles per shard where a half has so many."""
    return min(max(math.ceil(count / _SHARDS_PER_HALF), _SMALLEST_SHARD), _LARGEST_SHARD)


def cut_shards(
    data: Dataset,
    half: int,
    norm: np.ndarray,
    scale: np.ndarray,
    rotation: np.ndarray,
    origin_px: np.ndarray,
    trusted: np.ndarray,
    belonging: np.ndarray | None = None,
) -> list[Shard]:
    """The shards of a half: a function of the data set alone. The arrays, (n, ...), are those of all particles;
    belonging: None for one class to which all belong."""
    every = data.rows_of(half)
    size = shard_size(len(every))
    known = (norm, scale, rotation, origin_px, trusted, belonging)
    return [
        shard_rows(data, every[first : first + size], f"{half}-{index}", *known)
        for index, first in enumerate(range(0, len(every), size))
    ]


def shard_rows(
    data: Dataset,
    rows: np.ndarray,
    name: str,
    norm: np.ndarray,
    scale: np.ndarray,
    rotation: np.ndarray,
    origin_px: np.ndarray,
    trusted: np.ndarray,
    belonging: np.ndarray | None = None,
) -> Shard:
    """A shard of some rows of a data set; see `cut_shards`."""
    columns = CtfColumns(*(column[rows] for column in data.ctf))
    every = np.ones((len(norm), 1)) if belonging is None else belonging
    of_all = (data.groups, norm, scale, rotation, origin_px, trusted, data.rotation, data.origin_px, every)
    known = (array[rows] for array in of_all)
    return Shard(name, data.store, data.rows[rows], columns, data.aberrations, *known)


def left_out_rows(data: Dataset, half: int, left_out: Iterable[dict[int, str]]) -> list[dict]:
    """Rows for the list of quarantined particles of what the shards of a half left out, each position -> reason."""
    every = data.rows_of(half)
    size = shard_size(len(every))
    return quarantine_rows(data, [every[first : first + size] for first in range(0, len(every), size)], left_out)


def quarantine_rows(data: Dataset, shards: Iterable[np.ndarray], left_out: Iterable[dict[int, str]]) -> list[dict]:
    """The same of any shards, of which the rows are given."""
    in_source, rows = _source_rows(data.store)[data.rows], []
    for own, reasons in zip(shards, left_out, strict=True):
        for position, reason in reasons.items():
            row = int(own[position])
            rows.append({"row": int(in_source[row]), "image": _image_name(data.particles, row), "reason": reason})
    return rows


def _source_rows(store: Store) -> np.ndarray:
    """Row of each particle in the file it was imported from, (n,), from 1: the import left some rows out."""
    rows, missing = store.rows(), [entry["row"] for entry in store.quarantined]
    kept = np.setdiff1d(np.arange(1, rows.max() + 2 + len(missing)), missing)
    return kept[rows]


def mini_batch(n: int, size: int, seed: int, name: str, iteration: int) -> np.ndarray:
    """Rows, sorted, of about `size` of n images for an iteration: runs of neighbours, which are read together (stores
    are shuffled), drawn without replacement, epoch after epoch. name: of the sequence of draws."""
    runs = -(-n // _RUN)
    wanted = min(runs, max(1, round(size / _RUN)))
    epoch, place = divmod(iteration * wanted, runs)
    order = [generator(seed, name, epoch + later).permutation(runs) for later in (0, 1)]
    taken = np.unique(np.concatenate(order)[place : place + wanted])
    return np.concatenate([np.arange(run * _RUN, min(n, (run + 1) * _RUN)) for run in taken])
