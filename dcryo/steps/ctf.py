"""The CTF of one micrograph: its spectrum, the search for its rings, and whether they are to be believed."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dcryo.kernels import spectrum, thon

FINEST_A = 3.0
"""Resolution to which spectra are kept, unless a finer one is asked for."""

SEARCHED_A = 5.0
"""Resolution to which rings are looked for at first; from there the fit goes as far as they hold."""

TILE_A = 1000.0
"""Side of the tiles. The two beams that make a ring are 2 lambda df k apart in the image: 200 A at 20000 A of defocus,
300 kV and 4 A. A tile shows only what is well within it."""

LEAST_STANDING_OUT = 6.0
"""Standard deviations of the noise. In images of noise the best of all that is searched stands out by up to 5."""

WORST_RESOLUTION_A = 15.0

_SECTORS = 24
_SPLINES = 8
_ICE_A = (3.95, 3.6)
"""Rings of ice are not Thon's."""
_BRIGHTEST = 4.0
"""Flattened spectra are cut here, so that a few bright spots do not decide a fit."""


_SPIKE = 15.0
"""Standard deviations from the middle where grey values are cut."""


@dataclass(frozen=True)
class Optics:
    """What has to be known of a micrograph."""

    pixel_size_A: float
    voltage_kV: float
    spherical_aberration_mm: float
    amplitude_contrast: float


@dataclass(frozen=True)
class Wanted:
    """What is looked for. highest_resolution_A: None is as far as the rings hold.

    phase_deg: from and to, the same where it is known; astigmatism_A: the expected U - V; tile_px: side of the tiles,
    None for `TILE_A`; local: patches along each side whose defocus is wanted, or 0.
    """

    lowest_resolution_A: float = 30.0
    highest_resolution_A: float | None = None
    defocus_A: tuple[float, float] = (1000.0, 50000.0)
    phase_deg: tuple[float, float] = (0.0, 0.0)
    astigmatism_A: float = 500.0
    tile_px: int | None = None
    local: int = 0


@dataclass(frozen=True)
class Patch:
    """Mean defocus about a place of the micrograph, with its standard deviation."""

    x_px: float
    y_px: float
    defocus_A: float
    error_A: float


@dataclass(frozen=True)
class Estimate:
    """A micrograph's CTF.

    U >= V; the angle is from x towards the axis of U, from 0 up to 180. score: correlation of the spectrum with the
    fitted rings; standing_out: how far the rings stand out of the noise, in its standard deviations; resolution_A: to
    which the fit holds, infinite where it nowhere does. ice: power at ice's ring over that beside it, None where the
    pixels are too large. tilt_A: what a plane of defocus spans over the micrograph, and tilt_deg its slope, 0
    where none stands out; None where there are no tiles. flag: why it should not be used, empty where it may.
    """

    defocus_u_A: float
    defocus_v_A: float
    defocus_angle_deg: float
    phase_shift_deg: float
    defocus_error_A: float
    score: float
    standing_out: float
    resolution_A: float
    ice: float | None
    tilt_A: float | None
    tilt_deg: float | None
    local: tuple[Patch, ...]
    flag: str
    step_1_A: float
    picture: NDArray[np.float32]
    curves: thon.Curves

    @property
    def astigmatism_A(self) -> float:
        return self.defocus_u_A - self.defocus_v_A


@dataclass(frozen=True)
class _Rings:
    """A spectrum with its fit, and what belongs to it."""

    fit: thon.Fit
    curves: thon.Curves
    flat: NDArray[np.float32]
    baseline: NDArray
    basis: NDArray
    used: NDArray[np.bool_]
    standing_out: float
    reached: int


def estimate(image: NDArray[np.float32], optics: Optics, wanted: Wanted) -> Estimate | str:
    """The CTF of a micrograph (y, x), or in words why it cannot have one: not finite, constant, too small."""
    darkest, brightest = float(image.min()), float(image.max())
    if not math.isfinite(brightest - darkest):
        return f"{int((~np.isfinite(image)).sum())} pixels are not finite"
    if darkest == brightest:
        return f"all pixels are {darkest:g}"
    image = _without_spikes(image, darkest, brightest)
    tile_px = _tile_px(image.shape, optics, wanted)
    highest, step_1_A = _sampling(tile_px, optics, wanted)
    if highest < _fewest(step_1_A, wanted):
        return f"{image.shape[1]} x {image.shape[0]} pixels of {optics.pixel_size_A:g} A are too few to show rings"
    powers, centres = spectrum.tile_powers(image, tile_px, highest)
    kept = spectrum.alike(powers, 1.0 / (wanted.lowest_resolution_A * step_1_A))
    if not kept.any():
        return "nowhere has a spectrum"
    lens = thon.lens(optics.voltage_kV, optics.spherical_aberration_mm, optics.amplitude_contrast)
    amplitude = spectrum.amplitude(powers, kept)
    rings = _rings(amplitude, step_1_A, lens, wanted, spectrum.LOOKS_PER_PIXEL)
    tilt_A, tilt_deg, local = _across(rings, powers[kept], centres[kept], image.shape, step_1_A, lens, optics, wanted)
    return _estimate(amplitude, rings, step_1_A, lens, wanted, tilt_A, tilt_deg, local)


def estimate_of_spectrum(whole: NDArray[np.float32], optics: Optics, wanted: Wanted) -> Estimate | str:
    """The same of an amplitude spectrum (D, D), zero frequency at D // 2; optics.pixel_size_A is half of Nyquist's."""
    if not np.isfinite(whole).all() or whole.min() < 0 or whole.min() == whole.max():
        return "is not an amplitude spectrum: expected finite numbers, none below 0 and not all the same"
    highest, step_1_A = _sampling(len(whole), optics, wanted)
    if highest < _fewest(step_1_A, wanted):
        return f"{len(whole)} x {len(whole)} pixels of {optics.pixel_size_A:g} A are too few to show rings"
    amplitude = spectrum.half_of(whole)
    cut = (len(amplitude) - 1) // 2 - highest
    amplitude = np.ascontiguousarray(amplitude[cut : len(amplitude) - cut, : highest + 1])
    lens = thon.lens(optics.voltage_kV, optics.spherical_aberration_mm, optics.amplitude_contrast)
    rings = _rings(amplitude, step_1_A, lens, wanted, 1.0)
    return _estimate(amplitude, rings, step_1_A, lens, wanted, None, None, ())


def _sampling(side_px: int, optics: Optics, wanted: Wanted) -> tuple[int, float]:
    """The ring up to which a spectrum is kept, and the frequency of ring 1."""
    side_A = side_px * optics.pixel_size_A
    finest_A = min(FINEST_A, wanted.highest_resolution_A or FINEST_A)
    return min((side_px - 1) // 2, int(side_A / finest_A)), 1.0 / side_A


def _first(step_1_A: float, wanted: Wanted) -> int:
    """The first ring that is fitted; those before the fourth have no pixels off the axes in every direction."""
    return max(4, math.ceil(1.0 / (wanted.lowest_resolution_A * step_1_A)))


def _fewest(step_1_A: float, wanted: Wanted) -> int:
    return max(32, 2 * _first(step_1_A, wanted))


def _without_spikes(image: NDArray[np.float32], darkest: float, brightest: float) -> NDArray[np.float32]:
    """The image with hot pixels cut, each of which would add a flat spectrum to those of four tiles."""
    some = image[:: max(1, image.shape[0] // 256), :: max(1, image.shape[1] // 256)]
    middle = float(np.median(some))
    reach = _SPIKE * 1.4826 * float(np.median(np.abs(some - middle)))
    if reach == 0.0 or (darkest >= middle - reach and brightest <= middle + reach):
        return image
    return np.clip(image, middle - reach, middle + reach)


def _tile_px(shape: tuple[int, ...], optics: Optics, wanted: Wanted) -> int:
    """A side that is even and of small factors, whose transforms are fast; at most the micrograph's."""
    wished = min(wanted.tile_px or round(TILE_A / optics.pixel_size_A), *shape)
    good = [16 * n for n in range(1, wished // 16 + 1) if _smooth(n)]
    return good[-1] if good else 16


def _smooth(number: int) -> bool:
    for factor in (2, 3, 5):
        while number % factor == 0:
            number //= factor
    return number == 1


def _rings(amplitude: NDArray, step_1_A: float, lens: thon.Lens, wanted: Wanted, looks_per_pixel: float) -> _Rings:
    """Find the rings in a half spectrum and follow them outwards as far as they hold."""
    highest = amplitude.shape[1] - 1
    first = _first(step_1_A, wanted)
    basis = spectrum.splines(highest, max(2.0, 0.8 * first), _SPLINES)
    means, counts = spectrum.rings(amplitude, 1)
    baseline = spectrum.baseline(means[:, 0], counts[:, 0], basis)
    flat = spectrum.flattened(amplitude, baseline, _BRIGHTEST)
    within = thon.Range(
        wanted.defocus_A, (math.radians(wanted.phase_deg[0]), math.radians(wanted.phase_deg[1])), wanted.astigmatism_A
    )
    ice = (1.0 / (_ICE_A[0] * step_1_A), 1.0 / (_ICE_A[1] * step_1_A))
    radii = np.arange(highest + 1)
    fair = (radii >= first) & (radii < highest) & ~((radii > ice[0]) & (radii < ice[1]))
    last = min(highest - 1, int(1.0 / ((wanted.highest_resolution_A or SEARCHED_A) * step_1_A)))
    used = fair & (radii <= last)
    means, counts = spectrum.rings(flat, _SECTORS)
    start, standing_out = thon.search(means, counts, basis, used, step_1_A, lens, within, looks_per_pixel)
    for _ in range(5):
        used = fair & (radii <= last)
        fit = thon.refine(flat, start, basis, used, step_1_A, lens, within, looks_per_pixel)
        curves = thon.curves(flat, fit, first, step_1_A, lens)
        reached = thon.holds_to(curves.quality)
        # A little beyond, where the fit would be drawn on if it were still good.
        wished = min(highest - 1, int(1.15 * reached))
        if wanted.highest_resolution_A is not None or standing_out < LEAST_STANDING_OUT or wished <= 1.05 * last:
            break
        last, start = wished, fit.aberration
    return _Rings(fit, curves, flat, baseline, basis, used, standing_out, reached)


def _across(
    rings: _Rings,
    powers: NDArray[np.float32],
    centres_px: NDArray,
    shape: tuple[int, ...],
    step_1_A: float,
    lens: thon.Lens,
    optics: Optics,
    wanted: Wanted,
) -> tuple[float | None, float | None, tuple[Patch, ...]]:
    """How the defocus changes across the micrograph: span and slope of a plane, and the defocus of patches."""
    spread_A = np.ptp(centres_px, axis=0) * optics.pixel_size_A
    if len(powers) < 4 or spread_A.min() <= 0.0:
        return None, None, ()
    offsets_A = np.arange(-40, 41) * 100.0
    tiles, counts = thon.tile_curves(
        powers, rings.baseline, np.array(rings.fit.aberration), step_1_A, lens.quadratic_A, lens.quartic_A4
    )
    likelihood = thon.likelihoods(
        tiles, counts, rings.fit, rings.basis, rings.used, offsets_A, step_1_A, lens, spectrum.LOOKS_PER_PIXEL
    )
    # Tiles overlap by half along both axes, so that a quarter of them would be independent, a half with the window.
    likelihood /= 2.0
    middle = np.array(shape[::-1]) / 2.0
    places_A = (centres_px - middle) * optics.pixel_size_A
    _, slope_x, slope_y, gain = thon.plane(likelihood, offsets_A, places_A)
    slope = math.hypot(slope_x, slope_y)
    tilt_A = tilt_deg = 0.0
    if gain > 6.0:
        height_A, width_A = (side * optics.pixel_size_A for side in shape)
        tilt_A, tilt_deg = abs(slope_x) * width_A + abs(slope_y) * height_A, math.degrees(math.atan(slope))
    patches = _patches(likelihood, offsets_A, centres_px, shape, rings.fit.aberration.mean_A, wanted.local)
    return tilt_A, tilt_deg, patches


def _patches(
    likelihood: NDArray, offsets_A: NDArray, centres_px: NDArray, shape: tuple[int, ...], mean_A: float, count: int
) -> tuple[Patch, ...]:
    """Defocus of count x count patches, each from the tiles about its middle."""
    patches = []
    width, height = shape[1] / max(count, 1), shape[0] / max(count, 1)
    for row in range(count):
        for column in range(count):
            x, y = (column + 0.5) * width, (row + 0.5) * height
            off = (centres_px - [x, y]) / [width, height]
            weights = np.exp(-0.5 * (off**2).sum(axis=1) / 0.5**2)
            total = (weights / max(weights.max(), 1e-30)) @ likelihood
            shares = np.exp(total - total.max())
            shares /= shares.sum()
            offset = float(shares @ offsets_A)
            # The table is no finer than its step, which a sharp likelihood does not show.
            error = math.sqrt(float(shares @ (offsets_A - offset) ** 2) + (offsets_A[1] - offsets_A[0]) ** 2 / 12.0)
            patches.append(Patch(x, y, mean_A + offset, error))
    return tuple(patches)


def _estimate(
    amplitude: NDArray[np.float32],
    rings: _Rings,
    step_1_A: float,
    lens: thon.Lens,
    wanted: Wanted,
    tilt_A: float | None,
    tilt_deg: float | None,
    local: tuple[Patch, ...],
) -> Estimate:
    fit = rings.fit
    u, v, angle = fit.aberration.defocus()
    resolution_A = 1.0 / (rings.reached * step_1_A) if rings.reached else math.inf
    phase_deg = math.degrees(fit.aberration.phase_rad)
    return Estimate(
        u, v, angle, phase_deg, fit.error.mean_A, fit.score, rings.standing_out, resolution_A,
        _ice(amplitude, step_1_A), tilt_A, tilt_deg, local, _flag(fit, rings.standing_out, resolution_A, wanted),
        step_1_A, _picture(rings, step_1_A, lens), rings.curves,
    )  # fmt: skip


def _flag(fit: thon.Fit, standing_out: float, resolution_A: float, wanted: Wanted) -> str:
    """Why a fit is not to be believed, empty where it is."""
    u, v, _ = fit.aberration.defocus()
    lowest, highest = wanted.defocus_A
    if standing_out < LEAST_STANDING_OUT:
        return (
            f"no Thon rings: the best stand out of the noise by {standing_out:.1f} standard deviations; expected at "
            f"least {LEAST_STANDING_OUT:g}"
        )
    if not resolution_A <= WORST_RESOLUTION_A:
        reached = f"to {resolution_A:.1f} A" if math.isfinite(resolution_A) else "nowhere"
        return f"the fitted rings hold {reached}; expected {WORST_RESOLUTION_A:g} A or better"
    if not lowest <= fit.aberration.mean_A <= highest:
        return f"the defocus, {fit.aberration.mean_A:.0f} A, is out of the range that was searched"
    if u - v > 4.0 * wanted.astigmatism_A:
        return f"the astigmatism, {u - v:.0f} A, is more than four times what is expected ({wanted.astigmatism_A:g} A)"
    return ""


def _ice(amplitude: NDArray[np.float32], step_1_A: float) -> float | None:
    """Power from 3.7 to 3.9 A over that beside it, 3.3 to 3.5 and 4.1 to 4.4 A."""
    means, _ = spectrum.rings(amplitude, 1)
    power, k = means[:, 0] ** 2, np.arange(len(means)) * step_1_A
    if k[-1] < 1.0 / 3.4:
        return None

    def mean(low_A: float, high_A: float) -> float:
        return float(power[(k >= 1.0 / high_A) & (k <= 1.0 / low_A)].mean())

    beside = 0.5 * (mean(3.3, 3.5) + mean(4.1, 4.4))
    return mean(3.7, 3.9) / beside if beside > 0.0 else None


def _picture(rings: _Rings, step_1_A: float, lens: thon.Lens) -> NDArray[np.float32]:
    """The spectrum for kx < 0 and the fitted CTF^2 for kx >= 0, both from 0 to 1: (2 h + 1, 2 h + 1), origin centre."""
    flat, fit = rings.flat, rings.fit
    highest = flat.shape[1] - 1
    ky, kx = np.mgrid[-highest : highest + 1, 0 : highest + 1] * step_1_A
    k2 = kx**2 + ky**2
    ring = np.minimum((np.sqrt(k2) / step_1_A + 0.5).astype(np.int64), highest)
    noise = 1.5 * float(np.std(flat[rings.used[ring]])) if rings.used.any() else 1.0
    # Beyond what was fitted nothing holds the background; there it is the mean of the ring.
    fitted_to = int(np.flatnonzero(rings.used)[-1]) if rings.used.any() else 0
    level = np.where(np.arange(highest + 1) > fitted_to, spectrum.rings(flat, 1)[0][:, 0], fit.background)
    contrast = (flat - level[ring]) / (np.maximum(fit.envelope[ring], 0.0) + noise)
    # What was not measured, the corners, is grey in both halves.
    inside = k2 <= ((highest - 1) * step_1_A) ** 2
    measured = np.where(inside, np.clip(0.5 + 0.5 * contrast, 0.0, 1.0), 0.5)
    fitted = np.where(inside, np.sin(thon.gamma(kx, ky, fit.aberration, lens)) ** 2, 0.5)
    return np.concatenate([measured[::-1, :0:-1], fitted], axis=1).astype(np.float32)
