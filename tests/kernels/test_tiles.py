import numpy as np
import pytest
import scipy.fft

from dcryo.kernels.dose import frame_weights
from dcryo.kernels.tiles import TILE_PX, TileSums, frequency_px, tiling_of, window

ONES = np.ones((TILE_PX, TILE_PX // 2 + 1), np.float32)


def moved(image: np.ndarray, shift: tuple[float, float], weight: np.ndarray | None = None) -> np.ndarray:
    """The slow twin: the whole image, which is taken to repeat itself, at once."""
    ny, nx = image.shape
    ky, kx = np.fft.fftfreq(ny)[:, None], np.fft.rfftfreq(nx)
    transform = scipy.fft.rfft2(image) * np.exp(-2j * np.pi * (kx * shift[0] + ky * shift[1]))
    return scipy.fft.irfft2(transform if weight is None else transform * weight, image.shape)


def smooth(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Noise below 0.45 cycles per pixel."""
    noise = scipy.fft.rfft2(np.random.default_rng(seed).standard_normal(shape))
    k = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1]))
    return scipy.fft.irfft2(noise * (k < 0.45), shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(600, 517), (128, 300), (1000, 256)])
def test_windows_add_up_to_one_everywhere(shape: tuple[int, int]) -> None:
    total = np.zeros((shape[0] + 2 * TILE_PX, shape[1] + 2 * TILE_PX))
    for y, x in tiling_of(shape).corner + TILE_PX:
        total[y : y + TILE_PX, x : x + TILE_PX] += np.outer(window(), window())
    assert total[TILE_PX:-TILE_PX, TILE_PX:-TILE_PX] == pytest.approx(np.ones(shape), abs=1e-6)


def test_images_that_do_not_move_are_added_as_they_are() -> None:
    images = np.random.default_rng(1).poisson(1.0, (3, 300, 411)).astype(np.float32)
    sums = TileSums((300, 411), 2)
    none = np.zeros((len(sums.tiling.corner), 2))
    for number, image in enumerate(images):
        sums.add(image, none, {0: ONES, 1: 0.5 * ONES} if number else {0: ONES})
    assert sums.image(0) == pytest.approx(images.sum(axis=0), abs=1e-4)
    assert sums.image(1) == pytest.approx(0.5 * images[1:].sum(axis=0), abs=1e-4)


@pytest.mark.parametrize("shift", [(3.0, -7.0), (0.5, 0.25), (-12.3, 4.49)])
def test_a_shift_is_that_of_fourier(shift: tuple[float, float]) -> None:
    image = smooth((480, 520), 2)
    sums = TileSums(image.shape, 1)
    sums.add(image, np.tile(shift, (len(sums.tiling.corner), 1)), {0: ONES})
    # Beyond the edge the twin repeats the image, and the tiles reflect it.
    inner = np.s_[60:-60, 60:-60]
    assert np.abs(sums.image(0) - moved(image, shift))[inner].max() < 0.01 * image.std()


def test_a_filter_is_that_of_the_whole_image() -> None:
    image = 5.0 + smooth((480, 520), 3)
    k = np.hypot(np.fft.fftfreq(480)[:, None], np.fft.rfftfreq(520))
    sums = TileSums(image.shape, 1)
    shift = np.tile((0.3, -0.4), (len(sums.tiling.corner), 1))
    expected = np.zeros(image.shape)
    of_tiles, of_image = (frame_weights(x / 0.9, 20, 1.3, 0.0, 200.0) for x in (frequency_px(), k))
    for frame in range(0, 20, 6):
        sums.add(image, shift, {0: of_tiles[frame]})
        expected += moved(image, (0.3, -0.4), of_image[frame])
    inner = np.s_[40:-40, 40:-40]
    assert np.abs(sums.image(0) - expected)[inner].max() < 0.02 * expected.std()


def test_high_frequencies_are_kept() -> None:
    """White noise that moves by half a pixel, a little differently in every tile, stays white to Nyquist."""
    image = np.random.default_rng(4).standard_normal((1024, 1024)).astype(np.float32)
    sums = TileSums(image.shape, 1)
    shift = 0.5 + 0.4 * (sums.tiling.centre_px / 1024 - 0.5)
    sums.add(image, shift, {0: ONES})
    power = np.abs(scipy.fft.rfft2(sums.image(0))[1:, 1:]) ** 2 / image.size
    k = np.hypot(np.fft.fftfreq(1024)[1:, None], np.fft.rfftfreq(1024)[1:])
    for low, high in ((0.0, 0.2), (0.2, 0.35), (0.35, 0.45), (0.45, 0.49)):
        assert power[(k >= low) & (k < high)].mean() == pytest.approx(1.0, abs=0.02)


def test_what_lies_beyond_the_edge_is_a_reflection() -> None:
    image = smooth((300, 300), 5)
    sums = TileSums(image.shape, 1)
    sums.add(image, np.tile((10.0, 0.0), (len(sums.tiling.corner), 1)), {0: ONES})
    out = sums.image(0)
    assert out[:, 10:] == pytest.approx(image[:, :-10], abs=1e-4)
    assert out[:, :10] == pytest.approx(image[:, 9::-1], abs=1e-4)
