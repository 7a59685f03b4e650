import numpy as np
import pytest

from dcryo.steps import references
from dcryo.steps.classification import Averages


@pytest.fixture
def averages() -> Averages:
    """Three blank classes; their halves are 10 and 20 more than the number of the class."""
    images = np.zeros((3, 8, 8), np.float32)
    halves = tuple(np.stack([np.full((8, 8), 10.0 * half + k) for k in range(3)]) for half in (1, 2))
    return Averages(images, images, halves, np.zeros((3, 5)))


def test_a_dead_class_shares_the_largest(averages: Averages) -> None:
    images, share = references.revived(averages, np.array([0.89, 0.1, 0.01]), np.array([0.0, 9, 0]))
    assert share.tolist() == pytest.approx([0.445, 0.1, 0.445])
    assert (images[0] == 10).all() and (images[2] == 20).all() and (images[1] == 0).all()


def test_where_no_class_is_too_large_it_shares_the_one_that_explains_least(averages: Averages) -> None:
    images, share = references.revived(averages, np.array([0.59, 0.4, 0.01]), np.array([5.0, 9, 0]))
    assert share.tolist() == pytest.approx([0.59, 0.2, 0.2])
    assert (images[1] == 11).all() and (images[2] == 21).all() and (images[0] == 0).all()
    # No class is dead here.
    assert references.revived(averages, np.array([0.5, 0.4, 0.1]), np.zeros(3))[1].tolist() == [0.5, 0.4, 0.1]


@pytest.mark.parametrize(
    ("beyond", "expected"), [([0.9] * 9, 11), ([0, 0, 0, 0], 8), ([0.5, 0.5, 0.3, 0.2, 0, 0], 9), ([0.9, 0.9], 8)]
)
def test_resolution_grows_as_far_as_halves_agree_past_what_was_compared(beyond: list[float], expected: int) -> None:
    """What is compared, up to shell 8, and the two shells after it say nothing."""
    frc = np.tile(np.concatenate([np.ones(9), beyond]), (4, 1))
    assert references.grown(8, frc, np.full(4, 0.25)) == expected


def test_the_resolution_is_that_of_classes_with_images() -> None:
    frc = np.concatenate([np.ones((2, 9)), np.array([0.6, 0])[:, None] * np.ones((2, 6))], axis=1)
    assert references.grown(8, frc, np.array([1.0, 0])) == 11 and references.grown(8, frc, np.array([0.0, 1])) == 8


def test_classes_move_to_the_middle() -> None:
    box = 32
    y, x = np.mgrid[:box, :box] - box // 2
    images = np.exp(-((x - 3.0) ** 2 + (y + 2.0) ** 2) / 8).astype(np.float32)[None]
    for _ in range(6):
        images = references.centred(images)
    weight = np.clip(images[0], 0, None)
    assert abs((weight * x).sum() / weight.sum()) < 0.2 and abs((weight * y).sum() / weight.sum()) < 0.2
