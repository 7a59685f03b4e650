"""Movies of a specimen that moves, with known truth: what the tests of motion correction look at.

Frames hold whole electrons, Poisson distributed about a specimen of particles in vitreous ice under a CTF. Positions
are (x, y) in pixels; a track says where the specimen is relative to the first frame.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.ndimage
from numba import njit

from dcryo.kernels.ctf import ctf


@dataclass(frozen=True)
class Truth:
    """frames: uint8 (F, ny, nx); specimen: contrast that frame 1 shows (ny, nx), without noise; global_px: (F, 2);
    coefficients: of the local model, (2, 18)."""

    frames: np.ndarray
    specimen: np.ndarray
    global_px: np.ndarray
    coefficients: np.ndarray

    def track_px(self, x: float, y: float) -> np.ndarray:
        """Where the specimen at pixel (x, y) of the first frame is, relative to there, (F, 2)."""
        ny, nx = self.specimen.shape
        return self.global_px + local_px(self.coefficients, x / nx - 0.5, y / ny - 0.5, len(self.global_px))


def local_px(coefficients: np.ndarray, x: float, y: float, frames: int) -> np.ndarray:
    """The polynomial of RELION and MotionCor at a place (-0.5 to 0.5), as it is written in papers, (F, 2)."""
    out = np.zeros((frames, 2))
    for t in range(frames):
        for axis in (0, 1):
            c = coefficients[axis].reshape(6, 3)
            for i, space in enumerate((1, x, x * x, y, y * y, x * y)):
                out[t, axis] += space * (c[i, 0] * t + c[i, 1] * t**2 + c[i, 2] * t**3)
    return out


def specimen_of(shape: tuple[int, int], pixel_size_A: float, seed: int, contrast: float = 0.05) -> np.ndarray:
    """Contrast of particles in ice under a CTF, (ny, nx) float32; its standard deviation is `contrast`."""
    rng = np.random.default_rng(seed)
    ny, nx = shape
    points = np.zeros(shape, np.float32)
    spacing = 160.0 / pixel_size_A
    for _ in range(max(4, int(ny * nx / spacing**2))):
        centre = rng.uniform((0, 0), (ny, nx))
        atoms = rng.standard_normal((600, 3))
        atoms *= 55.0 * rng.random((600, 1)) ** (1 / 3) / np.linalg.norm(atoms, axis=1, keepdims=True)
        at = np.rint(centre + atoms[:, :2] / pixel_size_A).astype(int)
        np.add.at(points, (at[:, 0] % ny, at[:, 1] % nx), 1.0)
    ice = rng.standard_normal(shape).astype(np.float32)
    ice *= 0.7 * points.std() / ice.std()
    ky, kx = np.meshgrid(np.fft.fftfreq(ny, 1 / nx), np.arange(nx // 2 + 1), indexing="ij")
    transfer = ctf(kx.ravel(), ky.ravel(), nx, pixel_size_A, 11000, 10700, 30.0, 200.0, 1.4, 0.1, 0.0, 60.0)
    image = scipy.fft.irfft2(scipy.fft.rfft2(points + ice) * transfer.reshape(kx.shape), shape)
    image -= image.mean()
    return (image * (contrast / image.std())).astype(np.float32)


def make_movie(
    shape: tuple[int, int] = (1024, 1024),
    global_px: np.ndarray | None = None,
    coefficients: np.ndarray | None = None,
    electrons_px: float = 1.0,
    pixel_size_A: float = 0.885,
    seed: int = 1,
    contrast: float = 0.05,
    frames: int = 24,
) -> Truth:
    """A movie whose specimen moves by a whole-frame track and a local model."""
    rng = np.random.default_rng((seed, 7))
    tracks = np.zeros((frames, 2)) if global_px is None else np.asarray(global_px, float)
    model = np.zeros((2, 18)) if coefficients is None else np.asarray(coefficients, float)
    margin = int(np.ceil(np.abs(tracks).max())) + 24
    ny, nx = shape
    wide = specimen_of((ny + 2 * margin, nx + 2 * margin), pixel_size_A, seed, contrast)
    spline = scipy.ndimage.spline_filter(wide.astype(np.float64), 3, mode="mirror").astype(np.float32)
    out = np.empty((len(tracks), ny, nx), np.uint8)
    for frame, shift in enumerate(tracks):
        shown = _shown(spline, ny, nx, margin, shift, model.reshape(2, 6, 3), frame)
        out[frame] = np.minimum(rng.poisson(electrons_px * np.maximum(1.0 + shown, 0)), 255)
    return Truth(out, wide[margin:-margin, margin:-margin], tracks - tracks[0], model)


@njit(cache=True)
def _shown(spline, ny, nx, margin, shift, model, t):
    """What a frame shows: at x the specimen that was at x - s(x), by cubic splines."""
    out = np.empty((ny, nx), np.float32)
    for j in range(ny):
        for i in range(nx):
            x, y = i / nx - 0.5, j / ny - 0.5
            moved = np.empty(2)
            for axis in range(2):
                c = model[axis]
                moved[axis] = shift[axis]
                space = (1.0, x, x * x, y, y * y, x * y)
                for s in range(6):
                    moved[axis] += space[s] * t * (c[s, 0] + t * (c[s, 1] + t * c[s, 2]))
            u, v = i - moved[0] + margin, j - moved[1] + margin
            iu, iv = int(np.floor(u)), int(np.floor(v))
            fu, fv = u - iu, v - iv
            wu = (
                (1 - fu) ** 3 / 6,
                (4 - 6 * fu**2 + 3 * fu**3) / 6,
                (1 + 3 * fu + 3 * fu**2 - 3 * fu**3) / 6,
                fu**3 / 6,
            )
            wv = (
                (1 - fv) ** 3 / 6,
                (4 - 6 * fv**2 + 3 * fv**3) / 6,
                (1 + 3 * fv + 3 * fv**2 - 3 * fv**3) / 6,
                fv**3 / 6,
            )
            total = 0.0
            for b in range(4):
                for a in range(4):
                    total += wv[b] * wu[a] * spline[iv - 1 + b, iu - 1 + a]
            out[j, i] = total
    return out


# Where the specimen of a real movie was, by RELION 4 (EMPIAR-10204), in pixels of 0.885 A.
REAL_TRACK_PX = np.cumsum(
    [
        (0.0, 0.0), (0.96, -0.81), (0.99, -0.75), (0.6, -0.55), (0.58, -0.63), (0.58, -0.67), (0.49, -0.54),
        (0.55, -0.78), (0.38, -0.52), (0.45, -0.23), (0.6, -0.83), (0.49, -0.3), (0.67, -0.52), (0.42, -0.46),
        (0.31, -0.32), (0.57, -0.64), (0.07, -0.59), (0.34, -0.21), (0.58, -0.42), (0.21, -0.29), (0.35, -0.54),
        (0.41, -0.24), (0.54, -0.45), (0.14, -0.24),
    ],
    axis=0,
)  # fmt: skip


def ring_contrast(micrograph: np.ndarray, pixel_size_A: float, coarsest_A: float, finest_A: float) -> float:
    """How far the power on the crests of the CTF of `specimen_of` lies above that in its troughs, over the latter."""
    ny, nx = micrograph.shape
    ky, kx = np.meshgrid(np.fft.fftfreq(ny, 1 / nx), np.arange(nx // 2 + 1), indexing="ij")
    transfer = np.abs(ctf(kx.ravel(), ky.ravel(), nx, pixel_size_A, 11000, 10700, 30.0, 200.0, 1.4, 0.1)).reshape(
        kx.shape
    )
    k = np.hypot(kx, ky) / (nx * pixel_size_A)
    ring = (k > 1 / coarsest_A) & (k < 1 / finest_A)
    power = np.abs(scipy.fft.rfft2(micrograph - micrograph.mean())) ** 2
    trough = power[ring & (transfer < 0.3)].mean()
    return float(power[ring & (transfer > 0.9)].mean() / trough - 1.0)
