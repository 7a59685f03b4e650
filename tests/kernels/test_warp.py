import numpy as np
import pytest
import scipy.ndimage

from dcryo.kernels import warp


def noise(shape, seed=1):
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


def smooth(shape, sigma=2.0):
    return scipy.ndimage.gaussian_filter(noise(shape), sigma, mode="wrap")


def coefficients_of(image):
    transform = np.fft.fft2(image)
    transform /= warp.spline_response(image.shape[0])[:, None] * warp.spline_response(image.shape[1])
    return np.fft.ifft2(transform).real.astype(np.float32)


def naive_shift(local, frame, x, y):
    """RELION's sum, term by term, for one axis' 18 coefficients."""
    t, total = float(frame), 0.0
    for n, term in enumerate((1.0, x, x * x, y, y * y, x * y)):
        for power in (1, 2, 3):
            total += local[3 * n + power - 1] * term * t**power
    return total


def naive_warp(image, spatial, offset, corner, extent):
    """Solve for the point of each pixel until it stands still, then let scipy interpolate."""
    rows, columns = np.indices(image.shape).astype(float)
    px, py = columns + offset[0], rows + offset[1]
    for _ in range(20):
        x, y = (px - corner[0]) / extent[0] - 0.5, (py - corner[1]) / extent[1] - 0.5
        terms = np.stack([np.ones_like(x), x, x * x, y, y * y, x * y])
        px = columns + offset[0] + np.tensordot(spatial[0], terms, 1)
        py = rows + offset[1] + np.tensordot(spatial[1], terms, 1)
    return scipy.ndimage.map_coordinates(image.astype(float), [py, px], order=3, mode="grid-wrap")


def test_the_polynomial_is_relions_sum():
    local = noise((2, 18)).astype(float)
    for frame, x, y in ((0, 0.3, -0.2), (1, -0.5, 0.5), (7, 0.25, 0.1)):
        found = warp.shifts_px(warp.at_frame(local, frame), x, y)
        np.testing.assert_allclose(found, [naive_shift(axis, frame, x, y) for axis in local], rtol=1e-12, atol=1e-12)


def test_the_polynomial_is_that_of_relions_files(shared_data):
    from dcryo.data.star import read_blocks
    from dcryo.data.tracks import read_track

    # Every patch's measured track lies nearer to the model's at its place than to no model, in each real movie.
    paths = sorted((shared_data / "bgal_empiar10204" / "MotionCorr" / "job002" / "Movies").glob("*.star"))
    assert paths
    for path in paths:
        track, pixel_size_A = read_track(path)
        assert pixel_size_A == 0.885 and track.whole_px.shape == (24, 2)
        blocks = read_blocks(path)
        size = [float(blocks["general"].columns[f"rlnImageSize{axis}"][0]) for axis in "XY"]
        columns = {name: values.astype(float) for name, values in blocks["local_shift"].columns.items()}
        place = [columns[f"rlnCoordinate{axis}"] / n - 0.5 for axis, n in zip("XY", size, strict=True)]
        measured = np.stack([columns[f"rlnMicrographShift{axis}"] for axis in "XY"], axis=1)
        frames = columns["rlnMicrographFrameNumber"].astype(int) - 1
        model = np.array(
            [
                warp.shifts_px(warp.at_frame(track.local_px, frame), x, y)
                for frame, x, y in zip(frames, *place, strict=True)
            ]
        )
        assert np.sum((measured - model) ** 2) < 0.8 * np.sum(measured**2)


@pytest.mark.parametrize("shape", [(48, 64), (63, 50)])
def test_splines_agree_with_scipy(shape):
    image = smooth(shape)
    spatial = 0.2 * np.array([[6.5, 2.0, -3.0, 0.5, 1.0, 4.0], [-2.0, 1.0, 2.0, -2.5, 3.0, -1.0]])
    corner, extent = (5.0, 4.0), (shape[1] - 10.0, shape[0] - 8.0)
    for offset in ((0.0, 0.0), (3.7, -11.2)):
        found = warp.warped(coefficients_of(image), spatial, offset, corner, extent)
        expected = naive_warp(image, spatial, offset, corner, extent)
        assert np.abs(found - expected).max() < 0.002 * image.std()


def test_without_motion_the_image_stays():
    image = noise((40, 36))
    found = warp.warped(coefficients_of(image), np.zeros((2, 6)), (0, 0), (4, 4), (28, 32))
    np.testing.assert_allclose(found, image, atol=2e-5)


def test_a_shift_brings_the_result_back():
    # By definition a point r lies at r - offset - s, so moving the result by offset + s gives the image again.
    image = noise((32, 48))
    spatial = np.zeros((2, 6))
    spatial[:, 0] = 2.0, -1.0
    found = warp.warped(coefficients_of(image), spatial, (3.0, 5.0), (0, 0), (48, 32))
    np.testing.assert_allclose(np.roll(found, (4, 5), axis=(0, 1)), image, atol=2e-5)
