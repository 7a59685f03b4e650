from pathlib import Path

import numpy as np
import pytest
import scipy.fft
from movie_making import REAL_TRACK_PX, Truth, make_movie, ring_contrast

from dcryo.data.motion import read_motion
from dcryo.errors import InputError
from dcryo.kernels.dose import frame_weights
from dcryo.steps.movie import Corrected, MovieSettings, correct, preview

SIZE_A, DOSE = 0.885, 1.277
SETTINGS = MovieSettings("a", SIZE_A, 200.0, DOSE)
BEAM_INDUCED = np.zeros((2, 18))
"""Of the size of that of the same movies: the corners move by 2 pixels and more against the centre."""
BEAM_INDUCED[0, [3, 4, 6, 9, 12, 15]] = [-0.16, 0.003, 0.1, 0.08, -0.06, 0.05]
BEAM_INDUCED[1, [3, 6, 9, 10, 12, 15]] = [0.07, -0.06, -0.15, 0.003, 0.09, -0.06]


def corrected(frames: np.ndarray, settings: MovieSettings = SETTINGS, **more: np.ndarray | None) -> Corrected:
    known = {"gain": None, "defects": None} | more
    return correct(lambda: iter(frames), len(frames), frames.shape[1:], known["gain"], known["defects"], settings)


def error_px(found: Corrected, truth: Truth) -> tuple[float, float]:
    """Root mean square of a grid of places and the frames: against the first frame, and against the tracks' means."""
    ny, nx = truth.specimen.shape
    places = [(x, y) for x in np.linspace(-0.4, 0.4, 5) for y in np.linspace(-0.4, 0.4, 5)]
    true = np.array([truth.track_px((x + 0.5) * nx, (y + 0.5) * ny) for x, y in places])
    difference = -found.motion.at(np.array(places)) - true
    centred = difference - difference.mean(axis=1, keepdims=True)
    return float(np.sqrt(np.mean(difference**2))), float(np.sqrt(np.mean(centred**2)))


def correlation_with(image: np.ndarray, specimen: np.ndarray, coarsest_A: float, finest_A: float) -> float:
    """Of a micrograph and the specimen, between two resolutions."""
    ny, nx = image.shape
    k = np.hypot(np.fft.fftfreq(ny, SIZE_A)[:, None], np.fft.rfftfreq(nx, SIZE_A))
    ring = (k > 1 / coarsest_A) & (k < 1 / finest_A)
    a, b = scipy.fft.rfft2(image)[ring], scipy.fft.rfft2(specimen)[ring]
    return float(np.vdot(a, b).real / np.sqrt(np.vdot(a, a).real * np.vdot(b, b).real))


@pytest.fixture(scope="module")
def movie() -> Truth:
    return make_movie((1280, 1408), REAL_TRACK_PX, BEAM_INDUCED, seed=1, contrast=0.08)


@pytest.fixture(scope="module")
def result(movie: Truth) -> Corrected:
    settings = MovieSettings("a", SIZE_A, 200.0, DOSE, unweighted=True, odd_even=True)
    return corrected(movie.frames, settings)


def test_tracks_are_found_to_a_quarter_of_a_pixel(movie: Truth, result: Corrected) -> None:
    to_first, to_mean = error_px(result, movie)
    assert to_first < 0.15 and to_mean < 0.1
    assert len(result.motion.terms) == 5
    # Without a local model it would be much worse.
    flat = corrected(movie.frames, MovieSettings("a", SIZE_A, 200.0, DOSE, patches=(1, 1)))
    assert flat.motion.terms == () and error_px(flat, movie)[1] > 3 * to_mean


def test_the_sum_is_sharper_than_without_correction(movie: Truth, result: Corrected) -> None:
    assert result.unweighted is not None
    plain = movie.frames.sum(axis=0, dtype=np.float32)
    at_rest = make_movie((1280, 1408), None, None, seed=1, contrast=0.08)
    still = at_rest.frames.sum(axis=0, dtype=np.float32)
    sharp, blurred, best = (ring_contrast(image, SIZE_A, 8.0, 4.5) for image in (result.unweighted, plain, still))
    assert sharp > 0.85 * best and blurred < 0.2 * best
    shown = ((result.unweighted, movie), (plain, movie), (still, at_rest))
    seen = [correlation_with(image, truth.specimen, 5.0, 4.0) for image, truth in shown]
    assert seen[0] > 0.9 * seen[2] and seen[1] < 0.2 * seen[2]


def test_odd_and_even_frames_make_the_micrograph(result: Corrected) -> None:
    assert result.odd is not None and result.even is not None
    assert result.odd + result.even == pytest.approx(result.micrograph, abs=1e-3)
    assert abs(np.corrcoef(result.odd.ravel(), result.even.ravel())[0, 1]) < 0.2


def test_the_weights_are_those_of_the_dose() -> None:
    still = make_movie((512, 600), None, None, seed=2, contrast=0.1)
    found = corrected(still.frames)
    k = np.hypot(np.fft.fftfreq(512, SIZE_A)[:, None], np.fft.rfftfreq(600, SIZE_A))
    # On the tracks that were found: nothing moves, but they are not exactly 0.
    ky, kx = np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(600)
    expected = np.zeros((512, 600))
    for frame, weight, (x, y) in zip(
        still.frames, frame_weights(k, 24, DOSE, 0.0, 200.0), found.motion.frame_px, strict=True
    ):
        phase = np.exp(-2j * np.pi * (kx * x + ky * y))
        expected += scipy.fft.irfft2(scipy.fft.rfft2(frame.astype(np.float32)) * weight * phase, (512, 600))
    inner = np.s_[40:-40, 40:-40]
    assert found.motion.terms == ()
    # All but a pixel or two that chance made hot; what is left is at Nyquist, and where tiles overlap.
    assert len(found.hot_px) < 4
    assert (found.micrograph - expected)[inner].std() < 0.03 * expected.std()


def test_binning_crops_the_transform(movie: Truth, result: Corrected) -> None:
    found = corrected(movie.frames, MovieSettings("a", SIZE_A, 200.0, DOSE, bin=2.0))
    assert found.micrograph.shape == (640, 704) and found.pixel_size_A == pytest.approx(2 * SIZE_A)
    assert np.array_equal(found.motion.frame_px, result.motion.frame_px)
    whole, small = scipy.fft.rfft2(result.micrograph), scipy.fft.rfft2(found.micrograph)
    assert 4 * small[:300, :300] == pytest.approx(whole[:300, :300], abs=float(1e-2 * np.abs(whole[1:]).max()))
    uneven = corrected(movie.frames, MovieSettings("a", SIZE_A, 200.0, DOSE, bin=1.37))
    assert uneven.micrograph.shape == (934, 1028)


def test_gain_hot_pixels_and_defects_leave_no_trace(movie: Truth, result: Corrected) -> None:
    rng = np.random.default_rng(3)
    shape = movie.frames.shape[1:]
    gain = rng.uniform(0.8, 1.25, shape).astype(np.float32)
    frames = rng.binomial(4 * movie.frames, 0.25 / gain).astype(np.uint16)
    hot = rng.permutation(shape[0] * shape[1])[:400]
    frames.reshape(len(frames), -1)[:, hot] += 20
    defects = np.zeros(shape, bool)
    defects[400:406, 100:1300] = True
    frames[:, defects] = 3000
    gain[:, 700] = 0
    frames[:, :, 700] = 77
    found = corrected(frames, gain=gain, defects=defects)
    expected = {(int(p % shape[1]), int(p // shape[1])) for p in hot}
    expected = {(x, y) for x, y in expected if not defects[y, x] and x != 700}
    assert {tuple(xy) for xy in found.hot_px.tolist()} >= expected and len(found.hot_px) < len(expected) + 10
    assert error_px(found, movie)[1] < 0.12
    deviation = (found.micrograph - found.micrograph.mean()) / found.micrograph.std()
    assert np.abs(deviation).max() < 8
    # No pattern stays where the detector was bad: the repaired rows are as bright as the others.
    assert (
        np.abs(deviation[380:420].mean(axis=1)).max() < 0.3 and np.abs(deviation[:, 680:720].mean(axis=0)).max() < 0.3
    )


def test_the_same_movie_gives_the_same_bits_and_another_name_other_repairs(movie: Truth) -> None:
    frames = movie.frames[:, :300, :300].copy()
    frames[:, 50, 60] = 200
    first, again = corrected(frames), corrected(frames)
    assert np.array_equal(first.micrograph, again.micrograph)
    other = corrected(frames, MovieSettings("b", SIZE_A, 200.0, DOSE))
    assert not np.array_equal(first.micrograph, other.micrograph)


@pytest.mark.parametrize("shape", [(64, 64), (100, 333)])
def test_small_frames_get_through(shape: tuple[int, int]) -> None:
    still = make_movie(shape, None, None, frames=3, contrast=0.2)
    found = corrected(still.frames)
    assert found.micrograph.shape == shape and np.isfinite(found.micrograph).all()


def test_frames_that_show_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="the same everywhere"):
        corrected(np.full((4, 128, 128), 7, np.uint8))
    bad = np.ones((4, 128, 128), np.float32)
    bad[2, 5, 5] = np.nan
    with pytest.raises(InputError, match="not finite"):
        corrected(bad)
    with pytest.raises(InputError, match="all pixels are bad"):
        corrected(np.ones((4, 128, 128), np.uint8), defects=np.ones((128, 128), bool))


def test_the_preview_is_small_and_plain(result: Corrected) -> None:
    shown = preview(result.micrograph, SIZE_A)
    assert max(shown.shape) <= 400 and shown.dtype == np.float16
    assert shown.astype(float).mean() == pytest.approx(0, abs=0.01)
    assert shown.astype(float).std() == pytest.approx(1, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [21, 25, 31, 37, 42, 49])
def test_real_tracks_are_found(shared_data: Path, number: int) -> None:
    folder = shared_data / "bgal_empiar10204" / "MotionCorr" / "job002" / "Movies"
    real = read_motion(folder / f"20170629_000{number}_frameImage.star")
    assert real.coefficients is not None
    truth = make_movie((2048, 2048), -real.frame_px, -real.coefficients, seed=number, contrast=0.05)
    to_first, to_mean = error_px(corrected(truth.frames), truth)
    assert to_first < 0.25 and to_mean < 0.15
