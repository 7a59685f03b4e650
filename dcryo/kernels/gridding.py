"""The kernel by which Fourier volumes are read and written between their grid points.

Values off the grid are sums over the four nearest grid points along each axis, weighted with the exponential of a
semicircle (Barnett, Magland & af Klinteberg 2019, eq. 1.8), which comes as near to an ideal low-pass filter in real
space as the best kernels of its width (Kaiser and Bessel's). With the box padded by a quarter, what folds back from
outside is at most half a percent up to 0.43 of the box from its centre and 5.5 percent at the very edge, where it is
11 for trilinear interpolation with the box doubled.

The kernel is computed as a polynomial of the distance to the grid, so that a value and its derivative cost a few
multiplications. In real space it multiplies a volume by an envelope, `envelope`, which is divided out.
"""

import numpy as np

TAPS = 4
PADDING = 1.25
# beta = gamma pi w (1 - 1 / (2 s)) for an oversampling s (Barnett, Magland & af Klinteberg 2019, eq. 4.5).
_BETA = 0.976 * np.pi * TAPS * (1 - 1 / (2 * PADDING))
_DEGREE = 7
_GAUSS_POINTS = 64


def _fitted() -> np.ndarray:
    """Coefficients (TAPS, _DEGREE + 1), highest power first: weight of each tap by the fraction less one half.

    Taps lie at -1, 0, 1 and 2 from the grid point below; the fraction is that of the way to the next one.
    """
    nodes = np.cos(np.pi * (np.arange(4 * TAPS * _DEGREE) + 0.5) / (4 * TAPS * _DEGREE)) / 2
    distance = np.arange(TAPS)[:, None] - (TAPS / 2 - 1) - (nodes + 0.5)
    square = np.clip(1 - (2 * distance / TAPS) ** 2, 0, None)
    return np.array([np.polyfit(nodes, row, _DEGREE) for row in np.exp(_BETA * (np.sqrt(square) - 1))])


WEIGHTS = _fitted()
SLOPES = WEIGHTS[:, :-1] * np.arange(_DEGREE, 0, -1)


def padded_px(box_px: int) -> int:
    """Side of the padded box, whose transform is sampled."""
    return smooth_px(PADDING * box_px)


def smooth_px(least_px: float) -> int:
    """The next even number of small prime factors, which is quick to transform."""
    size = int(np.ceil(least_px / 2)) * 2
    while not _smooth(size):
        size += 2
    return size


def _smooth(number: int) -> bool:
    for prime in (2, 3, 5):
        while number % prime == 0:
            number //= prime
    return number == 1


def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Places and weights (TAPS, _GAUSS_POINTS) by which the kernel is integrated (Gauss and Legendre, tap by tap)."""
    nodes, shares = np.polynomial.legendre.leggauss(_GAUSS_POINTS)
    fraction = nodes / 2
    place = np.arange(TAPS)[:, None] - (TAPS / 2 - 1) - (fraction + 0.5)
    return place, np.array([np.polyval(row, fraction) for row in WEIGHTS]) * shares / 2


_PLACE, _WEIGHT = _quadrature()


def envelope(distance_px: np.ndarray, padded: int) -> np.ndarray:
    """What the kernel multiplies a volume by in real space, along one axis: its transform, float64, at distances from
    the centre of a box of `padded` pixels."""
    angle = 2 * np.pi * np.asarray(distance_px, dtype=np.float64)[..., None, None] / padded
    return np.sum(_WEIGHT * np.cos(angle * _PLACE), axis=(-2, -1))
