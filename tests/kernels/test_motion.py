from pathlib import Path

import movie_making
import numpy as np
import pytest
import scipy.fft
from scipy.optimize import check_grad

from dcryo.data.motion import read_motion
from dcryo.data.star_syntax import read_blocks
from dcryo.kernels import motion
from dcryo.kernels.motion import (
    Band,
    Motion,
    Patches,
    band_of,
    climb,
    correlation,
    fit,
    in_space,
    local_shift_px,
    narrowed,
    search,
)

FRAMES, NOISE = 24, 12.0


def packed(band: Band, frames: np.ndarray) -> np.ndarray:
    return np.stack([band.pack(scipy.fft.rfft2(frame.astype(np.float32))) for frame in frames])


def smooth(shape: tuple[int, int], seed: int, k_max: float = 0.2) -> np.ndarray:
    """Something to see: noise below `k_max` cycles per pixel, with variance 1."""
    noise = scipy.fft.rfft2(np.random.default_rng(seed).standard_normal(shape))
    k = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1]))
    image = scipy.fft.irfft2(noise * np.exp(-((k / k_max) ** 2)), shape)
    return image / image.std()


def moving(image: np.ndarray, shifts: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Frames that shifts (F, 2) bring onto the image, with white noise."""
    ny, nx = image.shape
    ky, kx = np.fft.fftfreq(ny)[:, None], np.fft.rfftfreq(nx)
    transform = scipy.fft.rfft2(image)
    frames = [scipy.fft.irfft2(transform * np.exp(2j * np.pi * (kx * x + ky * y)), image.shape) for x, y in shifts]
    return np.array(frames) + noise * np.random.default_rng(seed).standard_normal((len(shifts), ny, nx))


def patches_of(
    seed: int, frame_px: np.ndarray, coefficients: np.ndarray, noise: float, blank: int = 0, side: int = 5
) -> Patches:
    """side x side patches of 96 pixels that move by a motion, the last `blank` of them without a specimen."""
    band = band_of((96, 96), 1.77, 4.5, 150.0)
    place = np.array([(x, y) for y in np.linspace(-0.4, 0.4, side) for x in np.linspace(-0.4, 0.4, side)])
    shifts = Motion(frame_px, coefficients).at(place)
    images = [smooth((96, 96), seed + row) * (row < len(place) - blank) for row in range(len(place))]
    data = [
        packed(band, moving(image, shift, noise, seed + 500 + row))
        for row, (image, shift) in enumerate(zip(images, shifts, strict=True))
    ]
    return Patches(band, np.array(data), place, np.zeros((len(place), len(frame_px), 2)))


def tracks(seed: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    frame_px = np.cumsum(rng.normal(0, 0.3, (FRAMES, 2)), axis=0)
    powers = np.tile([FRAMES, FRAMES**2, FRAMES**3], 6)
    coefficients = size * rng.normal(0, 1, (2, 18)) / powers
    coefficients[:, :3] = 0
    return frame_px - frame_px[0], coefficients


def error_px(patches: Patches, found: Motion, truth: Motion) -> float:
    """Root mean square over patches and frames; where the first frame lies is part of it."""
    difference = found.at(patches.place) - truth.at(patches.place)
    return float(np.sqrt(np.mean(difference**2)))


def test_the_local_model_is_the_polynomial() -> None:
    coefficients = np.random.default_rng(1).normal(size=(2, 18))
    place = np.array([(0.1, -0.4), (-0.5, 0.5), (0.0, 0.0)])
    found = local_shift_px(coefficients, place, 7)
    for row, (x, y) in enumerate(place):
        assert found[row] == pytest.approx(movie_making.local_px(coefficients, x, y, 7))
        for frame in range(7):
            at = in_space(coefficients, frame) @ (1, x, x * x, y, y * y, x * y)
            assert found[row, frame] == pytest.approx(at, rel=1e-12, abs=1e-12)


def test_the_local_model_is_that_of_relions_files(shared_data: Path) -> None:
    """In each real movie the tracks measured of patches lie nearer to the model's at their places than to no model."""
    paths = sorted((shared_data / "bgal_empiar10204" / "MotionCorr" / "job002" / "Movies").glob("*.star"))
    assert paths
    for path in paths:
        found = read_motion(path)
        assert found.coefficients is not None
        columns = {name: values.astype(float) for name, values in read_blocks(path)["local_shift"].columns.items()}
        place, measured = (
            np.stack([columns[f"{label}{axis}"] for axis in "XY"], axis=1)
            for label in ("rlnCoordinate", "rlnMicrographShift")
        )
        shifts = local_shift_px(found.coefficients, place / found.shape_px - 0.5, len(found.frame_px))
        model = shifts[np.arange(len(place)), columns["rlnMicrographFrameNumber"].astype(int) - 1]
        assert np.sum((measured - model) ** 2) < 0.8 * np.sum(measured**2)


def test_a_band_holds_each_frequency_of_the_half_plane_once() -> None:
    band = band_of((30, 40), 2.0, 6.1, 100.0)
    kx, ky = motion._frequencies(band)
    k = np.hypot(kx / 80.0, ky / 60.0)
    assert band.frequency_per_A == pytest.approx(k) and k.max() <= 1 / 6.1
    kept = set(zip(kx.tolist(), ky.tolist(), strict=True))
    assert len(kept) == len(kx)
    for x in range(-20, 21):
        for y in range(-15, 16):
            inside = 0 < np.hypot(x / 80.0, y / 60.0) <= 1 / 6.1
            assert ((x, y) in kept) + ((-x, -y) in kept) == (1 if inside else 0)
    assert band.weight == pytest.approx(np.where(k >= 1 / 150, np.exp(-100 * k**2 / 4), 0), rel=1e-5)


def test_packing_and_unpacking_keep_the_band() -> None:
    image = np.random.default_rng(2).standard_normal((30, 40)).astype(np.float32)
    band = band_of((30, 40), 2.0, 6.1, 0.0)
    transform = scipy.fft.rfft2(image)
    back = band.unpack(band.pack(transform), (30, 40))
    k = np.hypot(np.fft.fftfreq(30, 2.0)[:, None], np.fft.rfftfreq(40, 2.0))
    half = (k > 0) & (k <= 1 / 6.1)
    half[:, 0] &= np.fft.fftfreq(30) > 0
    assert back == pytest.approx(np.where(half, transform, 0), abs=1e-4)


def naive_correlation(
    band: Band, frames: np.ndarray, shift: np.ndarray, in_sum: np.ndarray, row: int, own: np.ndarray
) -> float:
    """Of frame `row`, moved by `own`, with the others' sum: whole transforms, one number."""
    ny, nx = frames.shape[1:]
    ky, kx = np.fft.fftfreq(ny)[:, None], np.fft.fftfreq(nx)
    there = np.zeros((ny, nx))
    fx, fy = motion._frequencies(band)
    there[fy, fx] = band.weight
    total = sum(
        np.fft.fft2(frames[f]) * np.exp(-2j * np.pi * (kx * shift[f, 0] + ky * shift[f, 1]))
        for f in np.flatnonzero(in_sum)
        if f != row
    )
    moved = np.fft.fft2(frames[row]) * np.exp(-2j * np.pi * (kx * own[0] + ky * own[1]))
    return float(np.sum(there * (np.conj(total) * moved).real))


@pytest.mark.parametrize("shape", [(24, 30), (31, 27)])
def test_correlation_gradient_and_curvature(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    frames = rng.standard_normal((5, *shape))
    shift = rng.normal(0, 2, (5, 2))
    in_sum = np.array([True, True, False, True, True])
    band = band_of(shape, 1.5, 5.0, 80.0)
    found = correlation(band, packed(band, frames), shift, in_sum)
    for row in range(5):

        def value(own: np.ndarray, row: int = row) -> float:
            return naive_correlation(band, frames, shift, in_sum, row, own)

        assert found.value[row] == pytest.approx(value(shift[row]), rel=1e-4, abs=1e-3 * abs(found.value).max())
        scale = np.abs(found.gradient).max()
        assert check_grad(lambda s: value(s), lambda s, row=row: found.gradient[row], shift[row]) < 1e-3 * scale
        h = 1e-2
        for a, b in ((0, 0), (0, 1), (1, 1)):
            ea, eb = np.eye(2)[a] * h, np.eye(2)[b] * h
            s = shift[row]
            second = (value(s + ea + eb) - value(s + ea - eb) - value(s - ea + eb) + value(s - ea - eb)) / (4 * h * h)
            assert found.curvature[row, a, b] == pytest.approx(-second, abs=2e-3 * np.abs(found.curvature).max())


def test_a_search_finds_large_shifts() -> None:
    rng = np.random.default_rng(4)
    shifts = np.cumsum(rng.normal(0, 4, (FRAMES, 2)), axis=0)
    shifts -= shifts.mean(axis=0)
    frames = moving(smooth((180, 200), 5, 0.1), shifts, 2.0, 6)
    band = band_of((180, 200), 1.77, 10.0, 600.0)
    found = search(band, packed(band, frames))
    assert np.abs(found - shifts).max() < 1.5


def test_the_motion_is_found_where_single_peaks_are_lost_in_noise() -> None:
    frame_px, coefficients = tracks(7, 3.0)
    truth = Motion(frame_px, coefficients)
    patches = patches_of(20, frame_px, coefficients, NOISE)
    found, gains = fit(patches, frame_px, 150.0)
    assert found.terms == motion.MODELS[2] and min(gains[1:]) > 1.0
    error = error_px(patches, found, truth)
    assert error < 0.25
    # What one patch of one frame says by itself scatters much more than that, about the truth.
    single = motion.measured_px(patches, found, 4.0) - truth.at(patches.place)
    assert 2.0 * error < np.sqrt(np.mean(single**2)) < 1.0


def test_patches_that_show_nothing_have_no_say() -> None:
    frame_px, coefficients = tracks(8, 1.5)
    truth = Motion(frame_px, coefficients)
    patches = patches_of(40, frame_px, coefficients, 4.0, blank=6)
    start = Motion(frame_px, np.zeros((2, 18)), motion.MODELS[1])
    seen = slice(0, len(patches.place) - 6)
    without = Patches(patches.band, patches.data[seen], patches.place[seen], patches.moved_px[seen])
    errors = [error_px(without, climb(some, start, 15)[0], truth) for some in (patches, without)]
    assert errors[0] < 1.3 * errors[1] + 0.02


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_local_model_is_made_of_noise(seed: int) -> None:
    frame_px, _ = tracks(seed, 0.0)
    patches = patches_of(100 * seed, frame_px, np.zeros((2, 18)), NOISE)
    found, gains = fit(patches, frame_px, 150.0)
    assert found.terms == () and max(gains) == 0.0 and not found.coefficients.any()
    # With a model the error would be larger.
    forced = climb(patches, Motion(frame_px, np.zeros((2, 18)), motion.MODELS[2]), 15)[0]
    truth = Motion(frame_px, np.zeros((2, 18)))
    centre = error_px(patches, found, truth)
    assert centre < error_px(patches, forced, truth)


def test_too_few_frames_or_patches_have_no_local_model() -> None:
    frame_px, coefficients = tracks(9, 1.5)
    few = patches_of(60, frame_px, coefficients, 1.0, side=2)
    assert fit(few, frame_px, 150.0)[0].terms == ()


def test_a_narrowed_band_is_the_band_of_that_resolution() -> None:
    patches = patches_of(70, np.zeros((2, 2)), np.zeros((2, 18)), 1.0, side=1)
    narrow = narrowed(patches, 9.0, 300.0)
    wanted = band_of((96, 96), 1.77, 9.0, 300.0)
    for name in ("ky", "first", "start", "weight", "frequency_per_A"):
        assert getattr(narrow.band, name) == pytest.approx(getattr(wanted, name), rel=1e-5), name
    image = wanted.unpack(narrow.data[0, 1], (96, 96))
    assert wanted.pack(image) == pytest.approx(narrow.data[0, 1])
    shift = np.array([(0.3, -0.2), (1.0, 0.5)])
    used = np.ones(2, bool)
    assert np.isfinite(correlation(narrow.band, narrow.data[0], shift, used).value).all()
