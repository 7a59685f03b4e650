"""The CTF's aberration from the Thon rings of a spectrum: a search over sectors, its refinement, how far it holds.

Spectra are half ones, flattened, as `dcryo.kernels.spectrum` makes them. Rings are -cos(2 gamma) about a background,
since CTF^2 = (1 - cos 2 gamma) / 2, with gamma as in `dcryo.kernels.ctf`.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dcryo.kernels.ctf import wavelength_A

Array = NDArray[np.floating]


class Lens(NamedTuple):
    """gamma = quadratic_A df k^2 + quartic_A4 k^4 - phase - offset_rad, for df in A and k in 1/A."""

    quadratic_A: float
    quartic_A4: float
    offset_rad: float


class Aberration(NamedTuple):
    """What is fitted. df(theta) = mean_A + along_A cos 2 theta + across_A sin 2 theta, theta from kx towards ky."""

    mean_A: float
    along_A: float
    across_A: float
    phase_rad: float

    def defocus(self) -> tuple[float, float, float]:
        """U >= V in Angstrom, and the angle of U in degrees, from 0 up to 180."""
        half = math.hypot(self.along_A, self.across_A)
        angle = math.degrees(math.atan2(self.across_A, self.along_A)) / 2.0 % 180.0
        # What is a rounding error below 0 comes out as 180.
        return self.mean_A + half, self.mean_A - half, angle if angle < 180.0 else 0.0


class Range(NamedTuple):
    """What is searched: mean defocus and phases from and to, and the astigmatism U - V that is expected.

    The last is the standard deviation of a normal prior on U - V.
    """

    defocus_A: tuple[float, float]
    phase_rad: tuple[float, float]
    astigmatism_A: float


class Fit(NamedTuple):
    """A refined aberration.

    error: standard deviations of mean, along, across and phase, same units. envelope, background: of the rings and
    under them, at rings 0 to h, in units of the flattened spectrum. score: correlation, over all pixels that were
    fitted, of the spectrum less its background with the fitted rings.
    """

    aberration: Aberration
    error: Aberration
    envelope: Array
    background: Array
    score: float


class Curves(NamedTuple):
    """Averages along lines of equal phase, at radii r = 0 to h of the mean defocus; NaN where there is nothing.

    rings: what was measured, less background; fit: the fitted rings; quality: their correlation over a stretch about r.
    """

    rings: Array
    fit: Array
    quality: Array


def lens(voltage_kV: float, spherical_aberration_mm: float, amplitude_contrast: float) -> Lens:
    """Constants of `dcryo.kernels.ctf.ctf`."""
    wavelength = float(wavelength_A(voltage_kV))
    return Lens(
        -math.pi * wavelength,
        0.5e7 * math.pi * spherical_aberration_mm * wavelength**3,
        math.atan2(amplitude_contrast, math.sqrt(1.0 - amplitude_contrast**2)),
    )


def gamma(kx_1_A: Array, ky_1_A: Array, aberration: Aberration, of: Lens) -> Array:
    """gamma at frequencies (x, y), arrays of one shape."""
    x2, y2 = kx_1_A**2, ky_1_A**2
    defocused = aberration.along_A * (x2 - y2) + aberration.across_A * 2.0 * kx_1_A * ky_1_A
    return round_gamma(x2 + y2, aberration.mean_A, aberration.phase_rad, of) + of.quadratic_A * defocused


def round_gamma(k2_1_A2: Array, defocus_A: Array | float, phase_rad: float, of: Lens) -> Array:
    """gamma without astigmatism, at k^2 of a shape that goes with that of the defocus."""
    return of.quadratic_A * defocus_A * k2_1_A2 + of.quartic_A4 * k2_1_A2**2 - phase_rad - of.offset_rad


def search(
    means: Array,
    counts: Array,
    basis: Array,
    used: NDArray[np.bool_],
    step_1_A: float,
    of: Lens,
    within: Range,
    looks_per_pixel: float,
) -> tuple[Aberration, float]:
    """Where in the range the rings are, and by how many standard deviations of the noise they stand out there.

    means, counts (h + 1, S): of `spectrum.rings` of a flattened spectrum; basis (h + 1, B): splines of the background;
    used (h + 1,): which rings are looked at; step_1_A: frequency of ring 1; looks_per_pixel: pixels of the spectrum to
    one independent number.

    Each sector's curve is correlated, after the background is projected out of both, with rings of each defocus; then,
    gamma being linear in the defocus, each astigmatism is a path through that table. So astigmatism never blurs a ring.
    How fast the rings fade is unknown: three envelopes are tried.
    """
    radii = np.flatnonzero(used)
    data, counts, basis = means[radii], counts[radii], basis[radii]
    k = radii * step_1_A
    weights = counts.sum(axis=1)
    orthonormal = np.linalg.qr(basis * np.sqrt(weights)[:, None])[0] / np.sqrt(weights)[:, None]

    def without_background(curves: Array) -> Array:
        return curves - orthonormal @ (orthonormal.T @ (weights[:, None] * curves))

    data = counts * np.where(counts > 0, without_background(data), 0.0)
    deviation = math.sqrt(max(float((data**2 / np.maximum(counts, 1)).sum()) / np.count_nonzero(counts), 1e-30))
    table_A = _table_of_defocus(of, float(k[-1]), within)
    best, found = -np.inf, Aberration(float(np.mean(within.defocus_A)), 0.0, 0.0, within.phase_rad[0])
    for phase in np.linspace(*within.phase_rad, 1 + math.ceil((within.phase_rad[1] - within.phase_rad[0]) / 0.2)):
        fringes = -np.cos(2.0 * round_gamma(k[:, None] ** 2, table_A, float(phase), of))
        # The side of a tile is 1 / step; what lies further apart in the image than that has no rings in its spectrum.
        fringes *= hann_overlap(np.abs(2.0 * of.quadratic_A / math.pi * table_A * k[:, None] * step_1_A))
        for fade in _FADES:
            model = without_background(fringes * np.exp(-fade * (k[:, None] / k[-1]) ** 2))
            norm = np.sqrt((weights[:, None] * model**2).sum(axis=0))
            places = (model / np.maximum(norm, 1e-12)).T @ data / deviation
            value, mean, along, across = _paths(
                places, table_A[0], table_A[1] - table_A[0], *within.defocus_A, within.astigmatism_A
            )
            if value > best:
                best, found = value, Aberration(mean, along, across, float(phase))
    # The deviation is that of a sector's mean on one ring; neighbouring rings share noise as neighbouring pixels do.
    return found, best / looks_per_pixel**0.25


_FADES = (0.0, 1.5, 5.0)
"""Exponents by which rings are taken to have faded at the last of them."""

_MARGIN = 2.0
"""The astigmatism that is searched, in standard deviations of what is expected."""


def _table_of_defocus(of: Lens, last_1_A: float, within: Range) -> Array:
    """Defocus in steps that move 2 gamma by 0.6 at the last ring, with room for the astigmatism at either end."""
    step = 0.3 / (abs(of.quadratic_A) * last_1_A**2)
    room = _MARGIN * within.astigmatism_A / 2.0 + 2.0 * step
    first = max(within.defocus_A[0] - room, 0.0)
    return first + step * np.arange(math.ceil((within.defocus_A[1] + room - first) / step), dtype=np.float64)


def hann_overlap(shift: Array) -> Array:
    """Autocorrelation of a Hann window at a shift in windows: how much of the rings of that period a tile shows."""
    s = np.clip(shift, 0.0, 1.0)
    turn = 2.0 * np.pi * s
    return (1.0 - s) * (2.0 / 3.0 + np.cos(turn) / 3.0) + np.sin(turn) / (2.0 * np.pi)


@njit(nogil=True, cache=True)
def _paths(
    places: np.ndarray, first_A: float, step_A: float, lowest_A: float, highest_A: float, expected_A: float
) -> tuple[float, float, float, float]:
    """The best sum over sectors of a table (defocus, sector) along df(theta) -> its value, mean, along, across.

    What is best: z^2 / 2 less that of the prior; the value returned is z.
    """
    count, sectors = places.shape
    # Half of U - V is stepped as the table is, twice as coarsely.
    halves = int(_MARGIN * expected_A / 2.0 / (2.0 * step_A)) + 1
    turns = 12
    cosine = np.empty((turns, sectors))
    for turn in range(turns):
        for sector in range(sectors):
            cosine[turn, sector] = math.cos(2.0 * math.pi * ((sector + 0.5) / sectors - turn / turns))
    best = np.array([-np.inf, 0.0, 0.0, 0.0, 0.0])
    offset = np.empty(sectors, dtype=np.int64)
    for half in range(halves):
        prior = 0.5 * (4.0 * half * step_A / max(expected_A, 1e-3)) ** 2
        for turn in range(turns if half else 1):
            for sector in range(sectors):
                offset[sector] = math.floor(2.0 * half * cosine[turn, sector] + 0.5)
            for place in range(2 * half, count - 2 * half):
                mean = first_A + place * step_A
                if mean < lowest_A or mean > highest_A:
                    continue
                z = 0.0
                for sector in range(sectors):
                    z += places[place + offset[sector], sector]
                value = 0.5 * z * abs(z) - prior
                if value > best[0]:
                    best[0], best[1], best[2] = value, z, mean
                    best[3] = 2.0 * half * step_A * math.cos(2.0 * math.pi * turn / turns)
                    best[4] = 2.0 * half * step_A * math.sin(2.0 * math.pi * turn / turns)
    return best[1], best[2], best[3], best[4]


def refine(
    half: NDArray[np.float32],
    start: Aberration,
    basis: Array,
    used: NDArray[np.bool_],
    step_1_A: float,
    of: Lens,
    within: Range,
    looks_per_pixel: float,
    rounds: int = 12,
) -> Fit:
    """Fit of b(|k|) - e(|k|) cos(2 gamma) to a flattened spectrum, pixel by pixel, by least squares.

    b and e are splines (basis as in `search`), refined together with the aberration by Gauss-Newton steps, damped as
    Levenberg and Marquardt do; the phase only where its range is not a point. looks_per_pixel: pixels of the spectrum
    to one independent number, for the errors.
    """
    fit_phase = within.phase_rad[1] > within.phase_rad[0]
    splines = basis.shape[1]
    free = np.array([True, True, True, fit_phase] + [True] * (2 * splines))
    taps = _taps(basis)
    # Precisions of the priors, in units of a look's noise. Their part in the sum of squares follows the noise.
    precision = np.zeros(len(free))
    precision[1:3] = 4.0 / max(within.astigmatism_A, 1e-3) ** 2
    precision[4 : 4 + splines], precision[4 + splines :] = _BACKGROUND**-2, _ENVELOPE**-2
    values = np.zeros(len(free))
    values[:4] = start
    normal, gradient, _, _ = _normal(half, values, *taps, used, step_1_A, *of)
    # The splines are linear: with the start's aberration their best values come first, the noise taken for 1/10.
    prior = 0.01 * looks_per_pixel * precision
    values[4:] = _solved(normal[4:, 4:] + np.diag(prior[4:]), gradient[4:], 0.0)
    accepted, best, damping, noise = values, np.inf, 1e-3, 0.01
    for _ in range(rounds):
        normal_here, gradient_here, count, squares = _normal(half, values, *taps, used, step_1_A, *of)
        worth = squares + float(prior @ values**2)
        if worth <= best:
            settled = best - worth < 1e-6 * worth
            accepted, best, normal, gradient = values, worth, normal_here, gradient_here
            noise = squares / max(count, 1)
            if settled:
                break
            prior = noise * looks_per_pixel * precision
            best = squares + float(prior @ values**2)
            damping *= 0.2
        else:
            damping *= 10.0
        step = np.zeros(len(free))
        step[free] = _solved(
            (normal + np.diag(prior))[np.ix_(free, free)], (gradient - prior * accepted)[free], damping
        )
        values = accepted + step
    errors = np.zeros(len(free))
    inverse = np.linalg.pinv((normal + np.diag(prior))[np.ix_(free, free)])
    errors[free] = np.sqrt(np.maximum(np.diag(inverse), 0.0) * noise * looks_per_pixel)
    aberration = Aberration(*(float(value) for value in accepted[:4]))
    if fit_phase:
        # The rings of two phases half a turn apart are the same.
        lowest = within.phase_rad[0]
        aberration = aberration._replace(phase_rad=lowest + (aberration.phase_rad - lowest) % math.pi)
    background, envelope = basis @ accepted[4 : 4 + splines], basis @ accepted[4 + splines :]
    score = _score(half, accepted[:4], background, envelope, used, step_1_A, *of)
    return Fit(aberration, Aberration(*(float(error) for error in errors[:4])), envelope, background, float(score))


_BACKGROUND = 0.3
"""What the baseline may leave of the background, a standard deviation. It also holds splines that few pixels see."""

_ENVELOPE = 1.0
"""How large the rings may be, in the same way."""


def _taps(basis: Array) -> tuple[NDArray[np.int64], Array]:
    """The four splines that are not 0 at each ring: the first of them, and their values (h + 1, 4)."""
    first = np.clip(np.argmax(basis > 0, axis=1), 0, basis.shape[1] - 4)
    return first, np.take_along_axis(basis, first[:, None] + np.arange(4), axis=1)


def _solved(matrix: Array, right: Array, damping: float) -> Array:
    """Solution of the normal equations, scaled to a unit diagonal; splines that nothing determines stay small."""
    scale = 1.0 / np.sqrt(np.maximum(np.diag(matrix), 1e-12 * max(np.diag(matrix).max(), 1e-30)))
    scaled = matrix * scale[:, None] * scale + (damping + 1e-6) * np.eye(len(matrix))
    return scale * np.linalg.solve(scaled, scale * right)


@njit(nogil=True, cache=True)
def _normal(
    half: np.ndarray,
    values: np.ndarray,
    first_tap: np.ndarray,
    taps: np.ndarray,
    used: np.ndarray,
    step: float,
    quadratic: float,
    quartic: float,
    offset: float,
) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Normal matrix and right side of a Gauss-Newton step, and the number of pixels and their summed squared error."""
    size = len(values)
    splines = (size - 4) // 2
    highest = half.shape[1] - 1
    normal, right = np.zeros((size, size)), np.zeros(size)
    count, squares = 0, 0.0
    row, index = np.empty(12), np.empty(12, dtype=np.int64)
    for n in range(4):
        index[n] = n
    for line in range(half.shape[0]):
        ky = line - highest
        if abs(ky) <= 1:
            continue
        y2 = (ky * step) ** 2
        for kx in range(2, highest + 1):
            ring = int(math.sqrt(kx * kx + ky * ky) + 0.5)
            if ring > highest or not used[ring]:
                continue
            x2 = (kx * step) ** 2
            k2, difference, product = x2 + y2, x2 - y2, 2.0 * kx * ky * step * step
            defocused = values[0] * k2 + values[1] * difference + values[2] * product
            twice = 2.0 * (quadratic * defocused + quartic * k2 * k2 - values[3] - offset)
            wave, slope = -math.cos(twice), 2.0 * math.sin(twice)
            first = first_tap[ring]
            background = envelope = 0.0
            for tap in range(4):
                weight = taps[ring, tap]
                background += weight * values[4 + first + tap]
                envelope += weight * values[4 + splines + first + tap]
                row[4 + tap], index[4 + tap] = weight, 4 + first + tap
                row[8 + tap], index[8 + tap] = weight * wave, 4 + splines + first + tap
            slope *= envelope
            row[0], row[1], row[2] = slope * quadratic * k2, slope * quadratic * difference, slope * quadratic * product
            row[3] = -slope
            error = half[line, kx] - background - envelope * wave
            count += 1
            squares += error * error
            for i in range(12):
                right[index[i]] += row[i] * error
                for j in range(i, 12):
                    normal[index[i], index[j]] += row[i] * row[j]
    for i in range(size):
        for j in range(i):
            normal[i, j] = normal[j, i]
    return normal, right, count, squares


@njit(nogil=True, cache=True)
def _score(
    half: np.ndarray,
    values: np.ndarray,
    background: np.ndarray,
    envelope: np.ndarray,
    used: np.ndarray,
    step: float,
    quadratic: float,
    quartic: float,
    offset: float,
) -> float:
    """Correlation of what was measured, less background, with the fitted rings, over the pixels that are used."""
    highest = half.shape[1] - 1
    both = data2 = model2 = data1 = model1 = count = 0.0
    for line in range(half.shape[0]):
        ky = line - highest
        if abs(ky) <= 1:
            continue
        for kx in range(2, highest + 1):
            ring = int(math.sqrt(kx * kx + ky * ky) + 0.5)
            if ring > highest or not used[ring]:
                continue
            k2, defocused = _defocused(kx, ky, values, step)
            phase = quadratic * defocused + quartic * k2 * k2 - values[3] - offset
            model = -max(envelope[ring], 0.0) * math.cos(2.0 * phase)
            data = half[line, kx] - background[ring]
            both += data * model
            data1 += data
            model1 += model
            data2 += data * data
            model2 += model * model
            count += 1.0
    if count == 0.0:
        return 0.0
    spread = (data2 - data1 * data1 / count) * (model2 - model1 * model1 / count)
    return (both - data1 * model1 / count) / math.sqrt(spread) if spread > 0.0 else 0.0


@njit(nogil=True, cache=True)
def _defocused(kx: int, ky: int, values: np.ndarray, step: float) -> tuple[float, float]:
    """k^2, and df(theta) k^2."""
    x2, y2 = (kx * step) ** 2, (ky * step) ** 2
    k2 = x2 + y2
    return k2, values[0] * k2 + values[1] * (x2 - y2) + values[2] * 2.0 * kx * ky * step * step


@njit(nogil=True, cache=True)
def _radius(kx: int, ky: int, values: np.ndarray, step: float, quadratic: float, quartic: float) -> int:
    """The ring at which the mean defocus has the gamma of a pixel."""
    k2, defocused = _defocused(kx, ky, values, step)
    s, phase = k2, quadratic * defocused + quartic * k2 * k2
    # quartic s^2 + quadratic mean s = phase, for s = k^2 on the branch that starts at 0.
    slope = quadratic * values[0]
    inside = slope * slope + 4.0 * quartic * phase
    if slope < 0.0 and inside > 0.0 and 2.0 * quartic * k2 < -slope:
        s = max(2.0 * phase / (slope - math.sqrt(inside)), 0.0)
    return int(math.sqrt(s) / step + 0.5)


@njit(nogil=True, cache=True)
def equiphase(
    half: np.ndarray, values: np.ndarray, step: float, quadratic: float, quartic: float
) -> tuple[np.ndarray, np.ndarray]:
    """Means of a half spectrum along lines of equal gamma, and their numbers of pixels: (h + 1,) each.

    A pixel is counted at the radius at which the mean defocus has its gamma (Rohou and Grigorieff, J. Struct. Biol.
    192, 2015, section 2.3, average what has the same number of extrema before it). values: mean, along, across, phase.
    """
    highest = half.shape[1] - 1
    sums, counts = np.zeros(highest + 1), np.zeros(highest + 1)
    for line in range(half.shape[0]):
        ky = line - highest
        if abs(ky) <= 1:
            continue
        for kx in range(2, highest + 1):
            ring = _radius(kx, ky, values, step, quadratic, quartic)
            # The corners of the spectrum hold nothing.
            if ring <= highest and kx * kx + ky * ky <= highest * highest:
                sums[ring] += half[line, kx]
                counts[ring] += 1.0
    for ring in range(highest + 1):
        if counts[ring] > 0.0:
            sums[ring] /= counts[ring]
    return sums, counts


def curves(half: NDArray[np.float32], fit: Fit, first: int, step_1_A: float, of: Lens) -> Curves:
    """What was measured and what was fitted along lines of equal phase, and how well they agree, at rings 0 to h.

    first: the first ring that is looked at. The quality of a ring is the normalised correlation of both, each less a
    straight line, over a ring of Thon's to either side of it, at least six samples, whose pixels count alike (after
    Rohou and Grigorieff 2015, section 2.3, and Sheth et al., J. Struct. Biol. 192, 2015, who correlate stretches of
    these curves).
    """
    aberration = fit.aberration
    means, counts = equiphase(half, np.array(aberration), step_1_A, of.quadratic_A, of.quartic_A4)
    k2 = (np.arange(len(means)) * step_1_A) ** 2
    turned = round_gamma(k2, aberration.mean_A, aberration.phase_rad, of)
    measured = np.where(counts > 0, means - fit.background, np.nan)
    waves = -np.cos(2.0 * turned)
    per_sample = np.abs(np.gradient(turned)) / math.pi
    reach = np.maximum(1.0 / np.maximum(per_sample, 1e-3), 6.0)
    return Curves(measured, waves * np.maximum(fit.envelope, 0.0), _quality(measured, waves, counts, reach, first))


@njit(nogil=True, cache=True)
def _quality(measured: np.ndarray, fitted: np.ndarray, counts: np.ndarray, reach: np.ndarray, first: int) -> np.ndarray:
    out = np.full(len(measured), np.nan)
    for ring in range(first, len(measured)):
        low, high = math.ceil(ring - reach[ring]), min(int(ring + reach[ring]), len(measured) - 1)
        if low < first:
            continue
        # Weighted moments of the place x and the two curves, then of what straight lines leave of them.
        w = x = a = b = xx = xa = xb = aa = bb = ab = 0.0
        for i in range(low, high + 1):
            if counts[i] > 0.0:
                w += counts[i]
                x += counts[i] * (i - ring)
                a += counts[i] * measured[i]
                b += counts[i] * fitted[i]
        if w == 0.0:
            continue
        x, a, b = x / w, a / w, b / w
        for i in range(low, high + 1):
            if counts[i] > 0.0:
                dx, da, db = i - ring - x, measured[i] - a, fitted[i] - b
                xx += counts[i] * dx * dx
                xa += counts[i] * dx * da
                xb += counts[i] * dx * db
                aa += counts[i] * da * da
                bb += counts[i] * db * db
                ab += counts[i] * da * db
        if xx > 0.0:
            aa, bb, ab = aa - xa * xa / xx, bb - xb * xb / xx, ab - xa * xb / xx
        if aa > 0.0 and bb > 0.0:
            out[ring] = ab / math.sqrt(aa * bb)
    return out


def holds_to(quality: Array, least: float = 0.5) -> int:
    """The ring up to which the fit holds: the last before the quality first falls below `least`; 0 where nowhere."""
    judged = np.flatnonzero(np.isfinite(quality))
    fallen = judged[quality[judged] < least]
    if not len(judged) or (len(fallen) and fallen[0] == judged[0]):
        return 0
    return int(fallen[0]) - 1 if len(fallen) else int(judged[-1])


@njit(nogil=True, cache=True)
def tile_curves(
    powers: np.ndarray, curve: np.ndarray, values: np.ndarray, step: float, quadratic: float, quartic: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of each of T tiles what `equiphase` gives of their mean: flattened amplitudes (T, h + 1), and counts (h + 1,).

    powers: (T, 2 h + 1, h + 1); curve (h + 1,): the baseline.
    """
    highest = powers.shape[2] - 1
    sums, counts = np.zeros((len(powers), highest + 1)), np.zeros(highest + 1)
    place = np.empty(highest + 1, dtype=np.int64)
    for line in range(powers.shape[1]):
        ky = line - highest
        if abs(ky) <= 1:
            continue
        for kx in range(2, highest + 1):
            place[kx] = _radius(kx, ky, values, step, quadratic, quartic)
            if kx * kx + ky * ky > highest * highest:
                place[kx] = highest + 1
            if place[kx] <= highest:
                counts[place[kx]] += 1.0
        for tile in range(len(powers)):
            for kx in range(2, highest + 1):
                if place[kx] <= highest:
                    sums[tile, place[kx]] += math.sqrt(powers[tile, line, kx])
    for ring in range(highest + 1):
        for tile in range(len(powers)):
            sums[tile, ring] = sums[tile, ring] / (max(counts[ring], 1.0) * curve[ring]) - 1.0
    return sums, counts


def likelihoods(
    tiles: Array, counts: Array, fit: Fit, basis: Array, used: NDArray[np.bool_], offsets_A: Array, step_1_A: float,
    of: Lens, looks_per_pixel: float,
) -> Array:  # fmt: skip
    """Log likelihood of each tile's mean defocus at offsets from the fitted one: (T, number of offsets).

    tiles, counts: of `tile_curves`. The rings of a tile have the fitted envelope; its background is projected out.
    """
    radii = np.flatnonzero(used & (counts > 0))
    k2, weights, splines = (radii[:, None] * step_1_A) ** 2, counts[radii], basis[radii]
    turned = round_gamma(k2, fit.aberration.mean_A + offsets_A, fit.aberration.phase_rad, of)
    model = -np.cos(2.0 * turned) * np.maximum(fit.envelope, 0.0)[radii, None]
    orthonormal = np.linalg.qr(splines * np.sqrt(weights)[:, None])[0] / np.sqrt(weights)[:, None]
    model -= orthonormal @ (orthonormal.T @ (weights[:, None] * model))
    data = (tiles[:, radii] * weights).T
    data -= weights[:, None] * (orthonormal @ (orthonormal.T @ data))
    # An amplitude of one look is a Rayleigh number, whose variance is 4 / pi - 1 of the squared mean; a tile's spectrum
    # has one look a pixel.
    variance = (4.0 / math.pi - 1.0) * looks_per_pixel
    return ((data.T @ model) - 0.5 * (weights[:, None] * model**2).sum(axis=0)) / variance


def plane(likelihood: Array, offsets_A: Array, places: Array) -> tuple[float, float, float, float]:
    """The plane of defocus through the tiles: offset at the middle, slopes along x and y, and what it gains.

    likelihood: (T, n) at offsets that are evenly spaced about 0; places (T, 2): x and y of the tiles, about their
    middle, in any unit. The gain is that of the log likelihood over the best of no slope. Found on a grid whose spacing
    is halved about the best point.
    """
    reach = np.maximum(np.abs(places).max(axis=0), 1e-9)
    scaled = np.column_stack([np.ones(len(places)), places / reach])
    spacing_A = offsets_A[1] - offsets_A[0]

    def total(planes: Array) -> Array:
        at = np.clip((scaled @ planes.T - offsets_A[0]) / spacing_A, 0.0, len(offsets_A) - 1.001)
        low = at.astype(np.int64)
        rows = np.arange(len(scaled))[:, None]
        here, next_ = likelihood[rows, low], likelihood[rows, low + 1]
        return np.asarray((here + (at - low) * (next_ - here)).sum(axis=0))

    flat = np.zeros((len(offsets_A), 3))
    flat[:, 0] = offsets_A
    level = total(flat).max()
    steps = spacing_A * np.array([2.0, 4.0, 4.0])
    side = np.arange(-4, 5)
    best = np.zeros(3)
    while steps.max() > spacing_A / 8.0:
        grid = best + np.stack(np.meshgrid(side, side, side, indexing="ij"), axis=-1).reshape(-1, 3) * steps
        values = total(grid)
        best = grid[np.argmax(values)]
        side = np.arange(-1, 2)
        steps = steps / 2.0
    slope_x, slope_y = best[1:] / reach
    return float(best[0]), float(slope_x), float(slope_y), float(max(values.max() - level, 0.0))
