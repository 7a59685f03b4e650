"""Odd and even phases of an optics group, fitted to the sums of its particles (see `ctf_sums`)."""

from typing import NamedTuple

import numpy as np

from dcryo.kernels.shells import HalfPlane

# Each stage of a fit reaches further by this factor than the one before, so that phases of many turns are followed from
# the centre outwards; and each takes at most so many steps.
_GROWTH, _STEPS, _HALVINGS = 1.4, 12, 6
_CONVERGED = 1e-7
_RIDGE = 1e-10


class PhaseFit(NamedTuple):
    """Coefficients of the odd (O,) and even (E,) basis, their standard errors, and the gain in log-likelihood over the
    coefficients that the fit began with."""

    odd: np.ndarray
    even: np.ndarray
    odd_error: np.ndarray
    even_error: np.ndarray
    gain: float


class _Local(NamedTuple):
    """Log-likelihood of each pixel, and its derivative and curvature (of Gauss and Newton, not negative) by phases."""

    value: np.ndarray
    by_odd: np.ndarray
    by_even: np.ndarray
    odd_curvature: np.ndarray
    even_curvature: np.ndarray


def _local(sums: np.ndarray, odd: np.ndarray, even: np.ndarray) -> _Local:
    """sums: (P, PHASE_SUMS); odd, even: phases (P,)."""
    sine, cosine = sums[:, 0] + 1j * sums[:, 1], sums[:, 2] + 1j * sums[:, 3]
    twice_cosine, twice_sine, power = sums[:, 4], sums[:, 5], sums[:, 6]
    turned = np.exp(-1j * odd) * (sine * np.cos(even) + cosine * np.sin(even))
    slope = np.exp(-1j * odd) * (cosine * np.cos(even) - sine * np.sin(even))
    doubled = twice_cosine * np.cos(2 * even) - twice_sine * np.sin(2 * even)
    across = twice_cosine * np.sin(2 * even) + twice_sine * np.cos(2 * even)
    return _Local(
        value=-turned.real + doubled / 4,
        by_odd=-turned.imag,
        by_even=-slope.real - across / 2,
        odd_curvature=np.maximum(power - doubled, 0) / 2,
        even_curvature=np.maximum(power + doubled, 0) / 2,
    )


def fit(
    sums: np.ndarray,
    odd_basis: np.ndarray,
    even_basis: np.ndarray,
    odd: np.ndarray,
    even: np.ndarray,
    pixels: HalfPlane,
    shell_min: int,
) -> PhaseFit:
    """The odd and even phases of largest likelihood: sum over pixels of a basis times its coefficients.

    sums: (P, PHASE_SUMS) float64; odd_basis, even_basis: (O, P) and (E, P), any number of rows; odd, even:
    coefficients to begin with, (O,) and (E,); shell_min: first shell that counts. By Gauss and Newton's method, from
    low frequencies outwards, and once more from the beginning with all; the better of the two is taken.
    """
    start = int(pixels.start[min(shell_min, pixels.shell_max)])
    begun = np.concatenate([odd, even])
    ends, shell = [], max(2.0 * shell_min, 0.25 * pixels.shell_max)
    while shell < pixels.shell_max:
        ends.append(pixels.within(int(shell)))
        shell *= _GROWTH
    ends.append(len(pixels.kx))
    grown, squares = begun, _squares(odd_basis, even_basis)
    for end in ends:
        grown, _ = _climbed(sums[start:end], odd_basis[:, start:end], even_basis[:, start:end], grown, squares)
    every = sums[start:], odd_basis[:, start:], even_basis[:, start:]
    before = _likelihood(*every, begun)
    ways = _climbed(*every, grown, squares), _climbed(*every, begun, squares)
    found, error = max(ways, key=lambda way: _likelihood(*every, way[0]))
    count = len(odd)
    return PhaseFit(found[:count], found[count:], error[:count], error[count:], _likelihood(*every, found) - before)


def _likelihood(sums: np.ndarray, odd_basis: np.ndarray, even_basis: np.ndarray, coefficients: np.ndarray) -> float:
    count = len(odd_basis)
    return float(_local(sums, coefficients[:count] @ odd_basis, coefficients[count:] @ even_basis).value.sum())


def _squares(odd_basis: np.ndarray, even_basis: np.ndarray) -> np.ndarray:
    """The quadratic form (K, K) of coefficients that is their phases' mean square over the plane."""
    count = len(odd_basis)
    both = np.concatenate([odd_basis, even_basis])
    out = both @ both.T / both.shape[1]
    out[:count, count:] = out[count:, :count] = 0
    return out


def _climbed(
    sums: np.ndarray, odd_basis: np.ndarray, even_basis: np.ndarray, coefficients: np.ndarray, squares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients at the next maximum, and their standard errors.

    squares: from `_squares` of the whole plane. A step is as long as the pixels at hand say, but for where they say
    nothing: there it is held back as if its phases over the plane were known to a radian.
    """
    count, size = len(odd_basis), len(coefficients)
    matrix, value = np.zeros((size, size)), -np.inf
    if size == 0:
        return coefficients, coefficients
    for _ in range(_STEPS):
        local = _local(sums, coefficients[:count] @ odd_basis, coefficients[count:] @ even_basis)
        gradient = np.concatenate([odd_basis @ local.by_odd, even_basis @ local.by_even])
        matrix[:count, :count] = (odd_basis * local.odd_curvature) @ odd_basis.T
        matrix[count:, count:] = (even_basis * local.even_curvature) @ even_basis.T
        value = float(local.value.sum())
        step = _solved(matrix + squares, gradient)
        for _ in range(_HALVINGS):
            if _likelihood(sums, odd_basis, even_basis, coefficients + step) >= value:
                break
            step = step / 2
        else:
            break
        coefficients = coefficients + step
        if step @ gradient < _CONVERGED:
            break
    return coefficients, np.sqrt(np.maximum(np.diag(_inverse(matrix)), 0))


def _scaled(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix with ones on its diagonal, and what rows and columns were divided by; blank ones stay blank."""
    size = np.sqrt(np.diag(matrix))
    size = np.where(size > 0, size, 1)
    return matrix / size / size[:, None] + _RIDGE * np.eye(len(matrix)), size


def _solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    scaled, size = _scaled(matrix)
    return np.linalg.solve(scaled, right / size) / size


def _inverse(matrix: np.ndarray) -> np.ndarray:
    scaled, size = _scaled(matrix)
    return np.linalg.inv(scaled) / size / size[:, None]


def turned(sums: np.ndarray, odd: np.ndarray, even: np.ndarray) -> np.ndarray:
    """Sums (P, PHASE_SUMS) as they would be, had the phases (P,) been in the model already."""
    back = np.exp(-1j * odd)
    sine, cosine = (sums[:, 0] + 1j * sums[:, 1]) * back, (sums[:, 2] + 1j * sums[:, 3]) * back
    cos, sin, twice_cos, twice_sin = np.cos(even), np.sin(even), np.cos(2 * even), np.sin(2 * even)
    sine, cosine = sine * cos + cosine * sin, cosine * cos - sine * sin
    doubled = sums[:, 4] * twice_cos - sums[:, 5] * twice_sin, sums[:, 5] * twice_cos + sums[:, 4] * twice_sin
    return np.stack([sine.real, sine.imag, cosine.real, cosine.imag, *doubled, sums[:, 6]], axis=1)


def left_over(
    sums: np.ndarray, odd: np.ndarray, even: np.ndarray, pixels: HalfPlane, box_px: int, width_px: float
) -> tuple[np.ndarray, np.ndarray]:
    """What is seen in the sums beside fitted odd and even phases (P,), as pictures (D, D) in rad, zero frequency in the
    middle: averaged over neighbours with a Gaussian of `width_px`, weighted by its information; 0 where there is none.
    """
    local = _local(sums, odd, even)
    half = np.stack([local.by_odd, local.odd_curvature, local.by_even, local.even_curvature])
    pictures = picture(half, pixels, box_px, np.array([-1, 1, 1, 1]))
    frequency = np.fft.fftfreq(box_px)
    blur = np.exp(-2 * (np.pi * width_px) ** 2 * (frequency[:, None] ** 2 + frequency[: box_px // 2 + 1] ** 2))
    smooth = np.fft.irfft2(np.fft.rfft2(pictures) * blur, s=(box_px, box_px))
    least = 1e-6 * np.abs(smooth[1::2]).max(axis=(1, 2), keepdims=True) + 1e-300
    left = np.where(smooth[1::2] > least, smooth[::2] / np.maximum(smooth[1::2], least), 0)
    return left[0], left[1]


def picture(values: np.ndarray, pixels: HalfPlane, box_px: int, parity: np.ndarray) -> np.ndarray:
    """Real values (N, P) of the half plane as pictures (N, D, D), zero frequency in the middle; parity: (N,), 1 for
    even functions, -1 for odd ones."""
    out = np.zeros((len(values), box_px, box_px))
    middle = box_px // 2
    inside = np.maximum(np.abs(pixels.kx), np.abs(pixels.ky)) < (box_px + 1) // 2
    kx, ky, values = pixels.kx[inside], pixels.ky[inside], values[:, inside]
    out[:, middle - ky, middle - kx] = values * parity[:, None]
    out[:, middle + ky, middle + kx] = values
    return out
