"""What a microscope did to images beside the CTF, and images without it.

Formulas and conventions are those of `kernels.aberrations` and `kernels.magnification`.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dcryo.kernels import fft
from dcryo.kernels.aberrations import even_phase, odd_phase
from dcryo.kernels.magnification import transforms_at
from dcryo.kernels.shells import half_plane, unpack

_ISOTROPIC = ((1.0, 0.0), (0.0, 1.0))


@dataclass(frozen=True)
class Aberrations:
    """Those of an optics group. odd, even: coefficients in radians; magnification: the matrix M, by its rows; each
    where there is none empty or the identity."""

    odd: tuple[float, ...] = ()
    even: tuple[float, ...] = ()
    magnification: tuple[tuple[float, float], tuple[float, float]] = _ISOTROPIC

    @property
    def anisotropic(self) -> bool:
        return self.magnification != _ISOTROPIC

    @property
    def moves_images(self) -> bool:
        """Whether images have to be corrected: even aberrations are a matter of the CTF."""
        return bool(self.odd) or self.anisotropic

    def even_phase(self, kx: NDArray, ky: NDArray, width_A: float) -> NDArray[np.float64] | None:
        """What is added to the CTF's gamma at frequencies (P,) in Fourier pixels of a box `width_A` wide; None for
        nothing."""
        return even_phase(self.even, np.asarray(kx) / width_A, np.asarray(ky) / width_A) if self.even else None

    def recorded(self, kx: NDArray, ky: NDArray, box_px: int) -> NDArray[np.bool_]:
        """Whether frequencies (P,) of the corrected image lie within those that the detector has recorded."""
        x, y = _observed(self, kx, ky)
        return np.asarray((np.abs(x) <= box_px / 2) & (np.abs(y) <= box_px / 2))

    def origin(self, observed: NDArray[np.float64]) -> NDArray[np.float64]:
        """Origins (n, 2) in the corrected image of those in the image as it is: M^-T t, since k . t stays the same."""
        return np.asarray(observed @ np.linalg.inv(self.magnification))

    def observed_origin(self, origin: NDArray[np.float64]) -> NDArray[np.float64]:
        """The inverse of `origin`."""
        return np.asarray(origin @ np.array(self.magnification))


NO_ABERRATIONS = Aberrations()


def _observed(aberrations: Aberrations, kx: NDArray, ky: NDArray) -> NDArray[np.float64]:
    """Where in the image as it is the frequencies (P,) of the corrected one are, (2, P)."""
    return np.asarray(np.linalg.inv(aberrations.magnification) @ np.stack([kx, ky]).astype(np.float64))


def corrected(images: NDArray[np.float32], aberrations: Aberrations, pixel_size_A: float) -> NDArray[np.float32]:
    """Images (n, D, D) without odd aberrations, and of the same magnification along all axes.

    With a matrix of magnification, corners of the transform are blank, beyond shell D // 2, and so is what the
    detector has not recorded.
    """
    box = images.shape[-1]
    if not aberrations.anisotropic:
        # Images that could not be read are not a number, and stay that.
        with np.errstate(invalid="ignore"):
            return fft.irfft2(fft.rfft2(images) * _undone(aberrations, box, pixel_size_A), box)
    pixels = half_plane(box // 2)
    x, y = _observed(aberrations, pixels.kx, pixels.ky)
    factors = np.exp(-1j * odd_phase(aberrations.odd, pixels.kx / box / pixel_size_A, pixels.ky / box / pixel_size_A))
    factors[~aberrations.recorded(pixels.kx, pixels.ky, box)] = 0
    with np.errstate(invalid="ignore"):
        packed = transforms_at(images, x, y) * factors.astype(np.complex64)
        return fft.irfft2(unpack(pixels, packed, box), box)


@lru_cache(maxsize=8)
def _undone(aberrations: Aberrations, box_px: int, pixel_size_A: float) -> NDArray[np.complex64]:
    """exp(-i phase) at every pixel of a half-complex transform, (D, D // 2 + 1)."""
    ky, kx = np.meshgrid(np.fft.fftfreq(box_px, pixel_size_A), np.fft.rfftfreq(box_px, pixel_size_A), indexing="ij")
    phase = odd_phase(aberrations.odd, kx.ravel(), ky.ravel()).reshape(kx.shape)
    return np.exp(-1j * phase).astype(np.complex64)
