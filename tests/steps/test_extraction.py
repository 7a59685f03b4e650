import dataclasses

import numpy as np
import pytest

from dcryo.euler import matrix_from_euler
from dcryo.kernels import boxes
from dcryo.steps.extraction import BATCH, Boxing, extract, outside, recentred

PLAIN = Boxing(16, (16,), 12.0, invert=True)


def micrograph(shape=(60, 80), seed=1):
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32) * 4 + 30


def made(image, centre, boxing, rows=None):
    """All images of each size, and reasons by row."""
    rows = np.arange(len(centre)) if rows is None else rows
    batches = list(extract(image, centre, rows, np.arange(len(centre)).astype(np.uint64), boxing))
    assert [row for batch in batches for row in batch.rows] == list(rows)
    reasons = {int(batch.rows[place]): why for batch in batches for place, why in batch.left_out.items()}
    return [np.concatenate(images) for images in zip(*(batch.images for batch in batches), strict=True)], reasons


def centres(n, shape=(60, 80), box=16):
    random = np.random.Generator(np.random.Philox(2))
    return np.stack([random.integers(box // 2, size - box // 2, n) for size in shape[::-1]], axis=1)


def test_boxes_are_cropped_normalised_and_inverted_in_order_whatever_the_batches():
    image, centre = micrograph(), centres(2 * BATCH + 3)
    (images,), reasons = made(image, centre, PLAIN)
    raw = boxes.crop(image, centre, 16)
    boxes.normalise(raw, 6.0, None, None, np.arange(len(centre)).astype(np.uint64))
    np.testing.assert_allclose(images, -raw, atol=2e-6)
    assert not reasons
    some = np.array([5, 17, 2])
    np.testing.assert_array_equal(made(image, centre, PLAIN, some)[0][0], images[some])


def test_small_images_of_the_same_pass_are_those_of_a_pass_of_their_own():
    image, centre = micrograph(), centres(5)
    both = dataclasses.replace(PLAIN, sizes_px=(12, 8))
    (large, small), _ = made(image, centre, both)
    for images, size in ((large, 12), (small, 8)):
        alone = dataclasses.replace(PLAIN, sizes_px=(size,))
        np.testing.assert_array_equal(made(image, centre, alone)[0][0], images)


def test_rescaled_images_show_the_same_at_the_same_place():
    y, x = np.indices((60, 80))
    image = (10.0 - 8 * np.exp(-((x - 43) ** 2 + (y - 28) ** 2) / 18)).astype(np.float32)
    boxing = Boxing(32, (32, 16), None, invert=False)
    (large, small), _ = made(image, np.array([[40, 30]]), boxing)
    np.testing.assert_allclose(small[0], large[0, ::2, ::2], atol=2e-3)


@pytest.mark.parametrize("level", [1e4, 1e6])
def test_the_grey_level_costs_no_digits(level):
    random = np.random.Generator(np.random.Philox(3)).integers(-8, 9, (60, 80))
    low, high = (random + np.float32(offset) for offset in (0, level))
    boxing = dataclasses.replace(PLAIN, sizes_px=(8,))
    first, second = (made(image.astype(np.float32), centres(4), boxing)[0][0] for image in (low, high))
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_bad_boxes_are_left_out_alone():
    image, centre = micrograph(), np.array([[10, 10], [30, 30], [60, 30], [60, 50]])
    image[12, 12] = np.nan
    image[20:42, 20:42] = 3.0
    image[52:, 68] = np.inf
    boxing = dataclasses.replace(PLAIN, sizes_px=(16, 8))
    (large, small), reasons = made(image, centre, boxing)
    assert reasons.keys() == {0, 1} and "NaN" in reasons[0] and "constant" in reasons[1]
    assert not large[:2].any() and not small[:2].any()
    expected, _ = made(micrograph(), centre[2:], boxing)
    np.testing.assert_array_equal(large[2:], expected[0])
    np.testing.assert_array_equal(small[2:], expected[1])


def test_a_constant_background_around_something_is_told():
    image = np.full((40, 40), 5.0, np.float32)
    image[19:22, 19:22] = 9.0
    _, reasons = made(image, np.array([[20, 20]]), PLAIN)
    assert reasons == {0: "its background is constant"}


def test_what_is_outside_is_told():
    centre = np.array([[8, 8], [7, 8], [72, 52], [73, 52], [-1, 30], [40, 60]])
    reasons = outside(centre, (60, 80), PLAIN)
    assert reasons.keys() == {1, 3, 4, 5}
    assert (
        "reaches beyond the micrograph of 80 x 60 px" in reasons[1] and "its centre, 40, 60, is outside" in reasons[5]
    )
    assert outside(centre, (60, 80), dataclasses.replace(PLAIN, whole=False)).keys() == {4, 5}


def test_recentred_boxes_hold_the_same_point_of_the_particle():
    random = np.random.Generator(np.random.Philox(4))
    coordinate, origin = random.uniform(50, 90, (50, 2)), random.normal(0, 5, (50, 2))
    origin[0] = 0.5, -0.5
    rotation, point = matrix_from_euler(*random.uniform(0, 360, (3, 50))), np.array([3.0, -8.0, 5.0])
    for turned, at in ((None, None), (rotation, point)):
        new_coordinate, new_origin = recentred(coordinate, origin, turned, at)
        wanted = boxes.centres(coordinate) - origin
        if at is not None:
            wanted = wanted + (rotation @ point)[:, :2]
        np.testing.assert_allclose(boxes.centres(new_coordinate) - new_origin, wanted, atol=1e-9)
        assert np.abs(new_origin).max() <= 0.5 + 1e-9
    np.testing.assert_allclose(recentred(coordinate[:1], origin[:1])[1], [[-0.5, 0.5]])
