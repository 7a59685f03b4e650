"""Picking on one micrograph: from its grey values to where its particles are."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

from dcryo.kernels import fft, picking
from dcryo.kernels.coarse import Image, coarse_shape, cosine_transform, shrink
from dcryo.kernels.ctf import ctf
from dcryo.kernels.filters import radius_px, resample_volume, rescale_images
from dcryo.kernels.masks import cosine_edge
from dcryo.kernels.sampling import global_grid, rotation_matrices
from dcryo.kernels.shells import half_plane, unpack
from dcryo.kernels.slices import extract, prepare

Float32 = NDArray[np.float32]

ACROSS_PX = 24
"""Coarse pixels to the diameter of a particle."""
MASK_RADII = 1.4
"""Radius of the mask of templates, in those of the particle: the fringe around it tells as much as the inside."""
HANDFUL = 6
"""Fewer that stand out are rather contamination than all the particles of a micrograph."""
BEST_FRACTION, FEWEST, ROUNDS = 0.3, 10, 3
"""The micrograph's own profile is that of so large a part of what was found, at least so many, taken so often."""
RANGE_STEP = 1.25
"""Of several diameters each is at most so many times the one before."""
SAME_SCALE = 0.02
"""Templates are rescaled for micrographs whose coarse pixel size, being their own, differs by more."""
PREVIEW_PX = 400


@dataclass(frozen=True)
class Search:
    """What is looked for, in every micrograph alike.

    diameters_A: smallest and largest, the same for particles of one size. distance_A: between picks, at least; edge_A:
    from the micrograph's edges, at least. sign: -1 for particles dark on white, 1 for white on dark. threshold: of the
    score, None to find it; most: picks in a micrograph, None for any number. step_deg: of in-plane angles of templates.
    exclude: whether carbon, contamination and the like are left out.
    """

    diameters_A: tuple[float, float]
    distance_A: float
    edge_A: float
    sign: int = -1
    threshold: float | None = None
    most: int | None = None
    step_deg: float = 10.0
    exclude: bool = True

    @property
    def coarse_A(self) -> float:
        """Pixel size at which it is looked for, if the micrograph's own is finer."""
        return self.diameters_A[0] / ACROSS_PX


@dataclass(frozen=True)
class Optics:
    """What the CTF of a micrograph is made of; units as in `dcryo.kernels.ctf`."""

    voltage_kV: float
    spherical_aberration_mm: float
    amplitude_contrast: float
    defocus_u_A: float
    defocus_v_A: float
    defocus_angle_deg: float
    phase_shift_deg: float = 0.0


@dataclass(frozen=True)
class Picks:
    """Every candidate of a micrograph, best first; the first `taken` are the picks.

    coordinate_px: (n, 2) float32, x and y in pixels of the micrograph, from its first column and row. score: (n,)
    float32. template: (n,) int32, from 0, and psi_deg: (n,) float32, the in-plane angle that turns it; both 0 without
    templates. excluded: (ny, nx) bool, left out, on a coarse grid over the whole micrograph. preview: (ny, nx) float32,
    in robust standard deviations.
    """

    coordinate_px: Float32
    score: Float32
    template: NDArray[np.int32]
    psi_deg: Float32
    taken: int
    threshold: float
    excluded: NDArray[np.bool_]
    preview: Image


@dataclass(frozen=True)
class _Sight:
    """A micrograph at the coarse pixel size, particles white on dark.

    flat: less its background; transform: of that, `coarse.cosine_transform`; deviation: around each pixel
    (`picking.flattened`); allowed: where picks may be.
    """

    flat: Image
    transform: Image
    deviation: Image
    allowed: NDArray[np.bool_]
    search: Search
    coarse_A: float

    @property
    def diameter_px(self) -> float:
        """The largest diameter."""
        return self.search.diameters_A[1] / self.coarse_A

    def peaks(self, scores: Image) -> tuple[NDArray[np.float64], Float32]:
        """Where picks may be by these scores: positions (n, 2) and scores (n,), best first."""
        return picking.peaks(scores, self.allowed, self.search.distance_A / self.coarse_A)


class _Scores(NamedTuple):
    """Best and, negated, worst score of each pixel, and which template at which angle it is the best one of."""

    best: Image
    decoy: Image
    template: NDArray[np.int32]
    psi_deg: Image


def find(
    image: Image, pixel_size_A: float, search: Search, templates: Float32 | None = None, optics: Optics | None = None
) -> Picks:
    """The particles of a micrograph (ny, nx) with pixels of `pixel_size_A`.

    templates: (K, m, m) from `project` or `scaled`, white on dark; without them blobs of the diameters are looked for,
    and then what looks like the best of those: their mean profile, which has the rings of the defocus, taken again from
    what it finds. optics: of the CTF that templates are multiplied with, if it is known.
    Raises ValueError where the micrograph is constant, not finite or smaller than two particles.
    """
    if not np.isfinite(image).all():
        raise ValueError("has values that are not finite")
    if min(image.shape) * pixel_size_A < 2.0 * search.diameters_A[1]:
        raise ValueError(f"is {min(image.shape) * pixel_size_A:.0f} A across, less than two particles")
    shape = coarse_shape(image.shape, search.coarse_A / pixel_size_A)
    unit = np.array([image.shape[1] / shape[1], image.shape[0] / shape[0]])
    coarse_A = pixel_size_A * float(unit.mean())
    plain = np.float32(search.sign) * picking.standardised(shrink(image, shape))
    inside = _inside(shape, search.edge_A / coarse_A)

    excluded = _excluded(plain, inside, search, coarse_A) if search.exclude else np.zeros(shape, bool)
    sight = _sight(plain, ~excluded, inside & ~excluded, search, coarse_A)
    scores = _of_blobs(sight) if templates is None else _of_templates(sight, templates, optics)
    at, values = sight.peaks(scores.best)
    threshold = search.threshold
    if threshold is None:
        threshold = picking.threshold(values, sight.peaks(scores.decoy)[1])
    taken = int(np.count_nonzero(values >= threshold))
    rows, columns = np.rint(at[:, 1]).astype(np.intp), np.rint(at[:, 0]).astype(np.intp)
    return Picks(
        coordinate_px=(at * unit).astype(np.float32),
        score=values,
        template=scores.template[rows, columns],
        psi_deg=scores.psi_deg[rows, columns],
        taken=taken if search.most is None else min(taken, search.most),
        threshold=threshold,
        excluded=excluded,
        preview=picking.standardised(shrink(image, coarse_shape(image.shape, max(image.shape) / PREVIEW_PX))),
    )


def _excluded(plain: Image, inside: NDArray[np.bool_], search: Search, coarse_A: float) -> NDArray[np.bool_]:
    """What to leave out. What is out of the ordinary shows when it is known what is ordinary: by a first look."""
    seen = picking.contrast(plain, search.diameters_A[1] / coarse_A)
    tame, rough = picking.tamed(seen)
    sight = _sight(tame, ~rough, inside & ~rough, search, coarse_A)
    return picking.outliers(seen, rough, _ordinary(*sight.peaks(_of_blobs(sight).best)))


def _sight(
    plain: Image, valid: NDArray[np.bool_], allowed: NDArray[np.bool_], search: Search, coarse_A: float
) -> _Sight:
    flat, deviation = picking.flattened(plain, valid.astype(np.float32), search.diameters_A[1] / coarse_A)
    return _Sight(flat, cosine_transform(flat), deviation, allowed, search, coarse_A)


def _inside(shape: tuple[int, int], edge_px: float) -> NDArray[np.bool_]:
    """Pixels that are not nearer to an edge than that."""
    y, x = (np.minimum(np.arange(size), size - 1 - np.arange(size)) >= edge_px for size in shape)
    return y[:, None] & x


def _ordinary(at: NDArray[np.float64], values: Float32) -> NDArray[np.float64]:
    """Those of the peaks (n, 2), best first, that are likelier particles than noise.

    A handful that stands out is rather contamination than all particles there are: then it is the best by rank.
    """
    above = at[values >= picking.threshold(values)]
    return above if len(above) >= HANDFUL else at[: math.ceil(BEST_FRACTION * len(at))]


def _of_blobs(sight: _Sight) -> _Scores:
    """Scores of the profile that the best blobs have in common; of several diameters, the best of those of each."""
    smallest, largest = sight.search.diameters_A
    count = 1 + math.ceil(math.log(largest / smallest) / math.log(RANGE_STEP) - 1e-9)
    each = [_of_profile(sight, diameter / sight.coarse_A) for diameter in np.geomspace(smallest, largest, count)]
    norm = math.sqrt(float(picking.disc(MASK_RADII * sight.diameter_px / 2.0).sum()))
    best, worst = np.max(each, axis=0) / norm, np.min(each, axis=0) / norm
    return _Scores(best, -worst, np.zeros(best.shape, np.int32), np.zeros(best.shape, np.float32))


def _of_profile(sight: _Sight, diameter_px: float) -> Image:
    """Correlation with the mean profile of the best blobs of a diameter; that with blobs where they are too few."""
    scores = picking.isotropic_scores(sight.transform, sight.deviation, *picking.blob(diameter_px))
    mask = picking.disc(MASK_RADII * diameter_px / 2.0)
    even = sight.flat / sight.deviation
    for turn in range(ROUNDS):
        at, values = sight.peaks(scores)
        # Crowded particles leave gaps that a plain blob's scores do not tell from noise: at first rank decides.
        best = at if turn == 0 else at[values >= picking.threshold(values)]
        best = best[: math.ceil(BEST_FRACTION * len(best))]
        if len(best) < FEWEST:
            break
        template = picking.profile_template(even, best, len(mask) // 2)
        scores = picking.isotropic_scores(sight.transform, sight.deviation, template, mask)
    return scores


def _of_templates(sight: _Sight, templates: Float32, optics: Optics | None) -> _Scores:
    flat, search, coarse_A = sight.flat, sight.search, sight.coarse_A
    if abs(coarse_A / search.coarse_A - 1.0) > SAME_SCALE:
        templates = centred(_resized(templates, search.coarse_A / coarse_A), _template_box_px(search, coarse_A))
    box = templates.shape[-1]
    mask = _mask(search, coarse_A, box)
    padded = tuple(scipy.fft.next_fast_len(size + box, real=True) for size in flat.shape)
    transform = scipy.fft.rfft2(flat, s=padded)
    transfer = None if optics is None else _transfer(optics, 2 * box, coarse_A)
    best = np.full(flat.shape, -np.inf, np.float32)
    worst = np.full(flat.shape, np.inf, np.float32)
    which, at_psi = np.zeros(flat.shape, np.int32), np.zeros(flat.shape, np.float32)
    angles = max(1, round(360.0 / search.step_deg))
    for number, template in enumerate(templates):
        for psi_deg in np.arange(angles) * (360.0 / angles):
            seen = turned(template, float(psi_deg))
            if transfer is not None:
                seen = _multiplied(seen, transfer)
            corner = scipy.fft.rfft2(picking.under_mask(seen, mask), s=padded)
            scores = scipy.fft.irfft2(transform * np.conj(corner), s=padded)
            # The template's centre lies at box // 2 of its corner.
            scores = np.roll(scores, (box // 2, box // 2), (0, 1))[: flat.shape[0], : flat.shape[1]]
            better = scores > best
            best[better] = scores[better]
            which[better], at_psi[better] = number, psi_deg
            np.minimum(worst, scores, out=worst)
    scale = sight.deviation * math.sqrt(float(mask.sum()))
    return _Scores(best / scale, -worst / scale, which, at_psi)


def turned(template: Image, psi_deg: float) -> Image:
    """The template as seen at an in-plane angle: what was at t is at Rz(psi) t, about its centre m // 2."""
    c, s = math.cos(math.radians(psi_deg)), math.sin(math.radians(psi_deg))
    back = np.array([[c, s], [-s, c]])  # of (y, x)
    centre = np.full(2, template.shape[0] // 2)
    return scipy.ndimage.affine_transform(template, back, centre - back @ centre, order=1)


def _transfer(optics: Optics, box_px: int, pixel_size_A: float) -> Float32:
    """The CTF on the half-complex grid of a box."""
    along = np.fft.fftfreq(box_px, 1.0 / box_px).astype(np.int32)
    ky, kx = np.meshgrid(along, np.arange(box_px // 2 + 1, dtype=np.int32), indexing="ij")
    values = ctf(
        kx.ravel(), ky.ravel(), box_px, pixel_size_A, optics.defocus_u_A, optics.defocus_v_A, optics.defocus_angle_deg,
        optics.voltage_kV, optics.spherical_aberration_mm, optics.amplitude_contrast, optics.phase_shift_deg,
    )  # fmt: skip
    return values.reshape(kx.shape)


def _multiplied(template: Image, transfer: Float32) -> Image:
    """The template times a CTF, which is that of a box twice as wide."""
    size = len(template)
    padded = (2 * size, 2 * size)
    return scipy.fft.irfft2(scipy.fft.rfft2(template, s=padded) * transfer, s=padded)[:size, :size]


def _mask(search: Search, coarse_A: float, box_px: int) -> Image:
    """The mask of templates in their box."""
    mask = picking.disc(MASK_RADII * search.diameters_A[1] / coarse_A / 2.0)
    return centred(mask[None], box_px)[0]


def _template_box_px(search: Search, coarse_A: float) -> int:
    """Side of templates, odd, that holds their mask."""
    return 2 * math.ceil(MASK_RADII * search.diameters_A[1] / coarse_A / 2.0 + 1.0) + 1


def scaled(images: Float32, pixel_size_A: float, search: Search, lowpass_A: float) -> Float32:
    """Templates of images (K, D, D), white on dark: at the search's pixel size, low-passed and in its box."""
    edges = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1).mean(axis=1)
    small = _resized((images - edges[:, None, None]).astype(np.float32), pixel_size_A / search.coarse_A)
    box = small.shape[-1]
    keep = cosine_edge(radius_px(box, 2), box * search.coarse_A / lowpass_A - 1.0, 2.0)
    return centred(fft.irfft2(fft.rfft2(small) * keep, box), _template_box_px(search, search.coarse_A))


def _resized(images: Float32, ratio: float) -> Float32:
    """Images (K, D, D) with pixels of 1 / ratio of theirs, about their centres.

    Boxes have whole numbers of pixels: they are padded to that of up to twice the size which is nearest to the ratio.
    """
    sizes = np.arange(images.shape[-1], 2 * images.shape[-1] + 1)
    padded = int(sizes[np.argmin(np.abs(np.round(sizes * ratio) / (sizes * ratio) - 1.0))])
    return rescale_images(centred(images, padded), round(padded * ratio))


def project(
    volume: Float32, pixel_size_A: float, operators: NDArray[np.float64], order: int, search: Search, lowpass_A: float
) -> Float32:
    """Templates of a map (z, y, x): its projections along the directions of a grid, those of the asymmetric unit.

    operators: (G, 3, 3) of its point group; order: of the grid (`dcryo.kernels.sampling`).
    """
    ratio = pixel_size_A / search.coarse_A
    cube = resample_volume(volume, ratio)
    box = len(cube)
    pixels, _ = global_grid(order, operators, np.eye(3))
    pixels = np.unique(pixels)
    rotations = rotation_matrices(order, pixels, np.zeros_like(pixels), np.eye(3))
    plane = half_plane(box // 2)
    projections = fft.irfft2(unpack(plane, extract(prepare(cube, box // 2), rotations, plane, box), box), box)
    return scaled(projections, search.coarse_A, search, lowpass_A)


def centred(images: Float32, box_px: int) -> Float32:
    """Images (K, D, D) in boxes of another size, centre (D // 2) on centre, cut off or with zeros around."""
    old_px = images.shape[-1]
    offset = box_px // 2 - old_px // 2
    source = slice(max(0, -offset), min(old_px, box_px - offset))
    target = slice(max(0, offset), min(box_px, old_px + offset))
    out = np.zeros((len(images), box_px, box_px), dtype=np.float32)
    out[:, target, target] = images[:, source, source]
    return out
