"""A field of many particles: images laid into it, and the field as the microscope passes it on."""

import numpy as np
from numba import njit
from numpy.typing import NDArray


def frequencies(shape: tuple[int, int]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Frequencies kx (nx // 2 + 1,) and ky (ny,) of the half-complex transform of a field (ny, nx), in 1/px."""
    return np.fft.rfftfreq(shape[1]), np.fft.fftfreq(shape[0])


@njit(nogil=True, cache=True)
def lay(field, images, corners):  # type: ignore[no-untyped-def]
    """Add images (n, D, D) float32 to a field (ny, nx) float32, in place, each with its first pixel at a corner.

    corners: (n, 2) int64, column and row; what lies outside the field is left out.
    """
    for i in range(images.shape[0]):
        left, top = corners[i, 0], corners[i, 1]
        for row in range(max(0, -top), min(images.shape[1], field.shape[0] - top)):
            for column in range(max(0, -left), min(images.shape[2], field.shape[1] - left)):
                field[top + row, left + column] += images[i, row, column]


@njit(nogil=True, cache=True, fastmath=True)
def pass_on(in_phase, quadrature, transfer, transfer_quadrature, decay, exposure, along_x, along_y):  # type: ignore[no-untyped-def]
    """A field's transform as a frame shows it, in place of `in_phase`.

    in_phase, quadrature: (ny, nx // 2 + 1) complex64, what is multiplied by each of the two transfer functions, of the
    same shape, float32, and added; `quadrature` may have no rows, for none. The sum is multiplied by
    exp(-decay * exposure), decay of that shape, float32, and by the phases along_x (nx // 2 + 1,) and along_y (ny,),
    complex64.
    """
    exposure = np.float32(exposure)
    for row in range(in_phase.shape[0]):
        for column in range(in_phase.shape[1]):
            value = in_phase[row, column] * transfer[row, column]
            if quadrature.shape[0]:
                value += quadrature[row, column] * transfer_quadrature[row, column]
            left = np.exp(-decay[row, column] * exposure)
            in_phase[row, column] = value * left * along_x[column] * along_y[row]
