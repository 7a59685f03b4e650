import numpy as np

from dcryo.kernels import field


def rng():
    return np.random.Generator(np.random.Philox(5))


def test_images_are_laid_where_they_fit():
    images = rng().standard_normal((4, 6, 6)).astype(np.float32)
    corners = np.array([[2, 3], [-4, 1], [17, -2], [40, 40]])
    found = np.ones((12, 20), np.float32)
    field.lay(found, images, corners)
    expected = np.ones((12, 20))
    for image, (left, top) in zip(images, corners, strict=True):
        for row in range(6):
            for column in range(6):
                if 0 <= top + row < 12 and 0 <= left + column < 20:
                    expected[top + row, left + column] += image[row, column]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_is_passed_on_is_the_sum_of_both_channels():
    draw, shape = rng(), (10, 7)
    first, second = (draw.standard_normal((2, *shape)).astype(np.float32).view() for _ in range(2))
    first, second = (first[0] + 1j * first[1]), (second[0] + 1j * second[1])
    one, two, decay = draw.standard_normal((3, *shape)).astype(np.float32)
    along_x = np.exp(1j * np.arange(7)).astype(np.complex64)
    along_y = np.exp(-0.3j * np.arange(10)).astype(np.complex64)
    for other, quadrature in ((second, two), (np.empty((0, 0), np.complex64), np.empty((0, 0), np.float32))):
        found = first.copy()
        field.pass_on(found, other, one, quadrature, decay, 1.7, along_x, along_y)
        both = first * one + (other * quadrature if len(other) else 0)
        expected = both * np.exp(-1.7 * decay) * along_x * along_y[:, None]
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


def test_frequencies_are_those_of_the_transform():
    kx, ky = field.frequencies((12, 15))
    image = np.exp(2j * np.pi * (kx[4] * np.arange(15) + ky[9] * np.arange(12)[:, None])).real
    assert np.unravel_index(np.argmax(np.abs(np.fft.rfft2(image))), (12, 8)) in {(9, 4), (3, 4)}
