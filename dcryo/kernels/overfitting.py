"""What tells a map that was fitted to noise from one that was not: images of noise, and the line of particles against
resolution."""

import hashlib
from typing import NamedTuple

import numpy as np

from dcryo.kernels import fft
from dcryo.kernels.filters import radius_px
from dcryo.kernels.fsc import crossing
from dcryo.kernels.mask_effect import RANDOMISED_BELOW
from dcryo.kernels.randomness import generator

# Where the halves agree up to the last shell, the doubt begins at this part of it.
_UP_TO_NYQUIST = 2 / 3
# The first shells say where the particle is; without them nothing can be aligned.
_FEWEST_SHELLS = 3
# A curve that reaches this part of the Nyquist shell says how fine the pixels are, not how many particles there were.
_BELOW_NYQUIST = 0.95


def first_doubtful_shell(fsc: np.ndarray) -> int:
    """The shell from which on signal is to be proved: where the FSC (S,) of the halves first falls below 0.8 (Chen et
    al. 2013), but not among the first three, and at two thirds of the last where it never does."""
    last = len(fsc) - 1
    below = np.flatnonzero(fsc[1:] < RANDOMISED_BELOW)
    return max(int(below[0]) + 1 if len(below) else round(_UP_TO_NYQUIST * last), min(_FEWEST_SHELLS + 1, last))


def noise_substituted(images: np.ndarray, shell: int, seed: int) -> np.ndarray:
    """Images (n, D, D) with random phases from the radius of a shell on, their amplitudes kept; float32.

    What remains there is noise of the spectrum that the image has (Chen et al. 2013). The phases are those of white
    noise, keyed by the seed and what is in the image: an image that is there twice, under whatever names, has the same
    noise both times, as it had before.
    """
    box = images.shape[-1]
    transforms = fft.rfft2(images)
    beyond = radius_px(box, 2) >= shell
    for image, transform in zip(images, transforms, strict=True):
        number = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little")
        noise = fft.rfft2(generator(seed, "image-phases", number).standard_normal((box, box), dtype=np.float32))
        turned = np.abs(transform) * noise / np.maximum(np.abs(noise), np.float32(1e-20))
        transform[beyond] = turned[beyond]
    return fft.irfft2(transforms, box)


class ResolutionLine(NamedTuple):
    """The line through resolutions of growing numbers of particles.

    used: (M,) bool, which counted; slope, intercept: of 1 / d^2 against ln N; bfactor_A2: 2 / slope; error_A2: of that,
    by how straight the line is. Not a number where there is no line.
    """

    used: np.ndarray
    bfactor_A2: float
    error_A2: float
    slope: float
    intercept: float


def resolution_line(particles: np.ndarray, curves: np.ndarray, threshold: float, width_A: float) -> ResolutionLine:
    """The B factor by which particles buy resolution: ln N = const + B / 2 d^2 (Rosenthal & Henderson 2003).

    A factor 1 / d in their formula for N is left out, as it usually is: of simulated particles with B factors of 200 to
    400 A^2 the line without it finds B within 5 percent on average, the line with it 8 to 16 percent too little.

    particles: (M,) numbers N; curves: (M, S) FSC of the half maps from so many; width_A: of the box. Resolutions near
    Nyquist, and of curves that fall at once, do not count. Two points make a line without an error, fewer none.
    """
    shells = np.array([crossing(curve, threshold) for curve in curves])
    square = (shells / width_A) ** 2
    last = curves.shape[1] - 1
    used = (shells < _BELOW_NYQUIST * last) & (shells > _FEWEST_SHELLS)
    nothing = float("nan")
    x, y = np.log(particles[used]), square[used]
    if len(x) < 2 or np.ptp(x) == 0:
        return ResolutionLine(used, *(nothing,) * 4)
    slope, intercept, error = _line(x, y)
    bfactor = 2 / slope if slope > 0 else nothing
    return ResolutionLine(used, bfactor, bfactor * error / slope, slope, intercept)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope and intercept by least squares, and the slope's standard error."""
    centred = x - x.mean()
    slope = float(np.sum(centred * y) / np.sum(centred**2))
    intercept = float(y.mean() - slope * x.mean())
    left = y - intercept - slope * x
    free = len(x) - 2
    error = float(np.sqrt(np.sum(left**2) / free / np.sum(centred**2))) if free > 0 else float("nan")
    return slope, intercept, error
