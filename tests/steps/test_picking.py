import numpy as np
import pytest
import small_micrographs as small
from scipy.spatial.transform import Rotation
from small_micrographs import BOX, DIAMETER_A, PIXEL_A, Simulated, simulated, volume

from dcryo import euler
from dcryo.kernels.matching import matched
from dcryo.kernels.symmetry import operators
from dcryo.steps import picking
from dcryo.steps.picking import Optics, Picks, Search

OPTICS = Optics(small.VOLTAGE_KV, small.CS_MM, small.AMPLITUDE, small.DEFOCUS_A, small.DEFOCUS_A, defocus_angle_deg=0.0)


def searched(**changes) -> Search:
    return Search(**{"diameters_A": (DIAMETER_A,) * 2, "distance_A": 0.6 * DIAMETER_A, "edge_A": 0.0} | changes)


def picked(found: Picks) -> np.ndarray:
    return found.coordinate_px[: found.taken]


def precision_and_recall(found: Picks, there: np.ndarray) -> tuple[float, float]:
    """Within 0.3 of the diameter."""
    right = matched(picked(found), there, 0.3 * DIAMETER_A / PIXEL_A).sum()
    return right / max(1, found.taken), right / len(there)


@pytest.fixture(scope="module")
def plain() -> Simulated:
    return simulated(70, 0.1)


@pytest.fixture(scope="module")
def templates() -> np.ndarray:
    return picking.project(volume(), PIXEL_A, operators("C1"), 1, searched(), 20.0)


@pytest.mark.parametrize(("count", "snr"), [(70, 0.3), (70, 0.1), (25, 0.2), (150, 0.1)])
def test_particles_are_found_without_knowing_them(count: int, snr: float) -> None:
    micrograph = simulated(count, snr, seed=count, spacing=0.9)
    precision, recall = precision_and_recall(picking.find(micrograph.image, PIXEL_A, searched()), micrograph.at_px)
    assert precision > 0.95 and recall > 0.9


def test_positions_are_good_to_a_tenth_of_the_diameter(plain: Simulated) -> None:
    found = picked(picking.find(plain.image, PIXEL_A, searched()))
    nearest = np.hypot(*(found[:, None] - plain.at_px).transpose(2, 0, 1)).min(axis=1)
    assert np.median(nearest) < 0.07 * DIAMETER_A / PIXEL_A
    # Not off to one side: the mean error is that of chance.
    errors = found - plain.at_px[np.hypot(*(found[:, None] - plain.at_px).transpose(2, 0, 1)).argmin(axis=1)]
    good = np.hypot(*errors.T) < 0.3 * DIAMETER_A / PIXEL_A
    assert np.abs(errors[good].mean(axis=0)).max() < 0.5


def test_a_wrong_diameter_does_little_harm(plain: Simulated) -> None:
    for factor in (0.8, 1.2):
        found = picking.find(plain.image, PIXEL_A, searched(diameters_A=(factor * DIAMETER_A,) * 2))
        precision, recall = precision_and_recall(found, plain.at_px)
        assert precision > 0.9 and recall > 0.85


def test_templates_find_particles_and_how_they_are_turned(plain: Simulated, templates: np.ndarray) -> None:
    found = picking.find(plain.image, PIXEL_A, searched(), templates, OPTICS)
    precision, recall = precision_and_recall(found, plain.at_px)
    assert precision > 0.95 and recall > 0.95
    assert len(np.unique(found.template[: found.taken])) > 10 and len(np.unique(found.psi_deg)) > 10


def test_templates_fit_micrographs_of_any_pixel_size(plain: Simulated, templates: np.ndarray) -> None:
    """Also of one that is coarser than what the templates were made for."""
    ny, nx = (2 * (size // 4) for size in plain.image.shape)
    coarse = plain.image[: 2 * ny, : 2 * nx].reshape(ny, 2, nx, 2).mean(axis=(1, 3))
    assert searched().coarse_A < 2 * PIXEL_A
    found = picking.find(coarse, 2 * PIXEL_A, searched(), templates[::3])
    right = matched(2 * picked(found) + 0.5, plain.at_px, 0.3 * DIAMETER_A / PIXEL_A).sum()
    assert right > 0.85 * len(plain.at_px) and right > 0.9 * found.taken


def test_templates_know_the_ctf(templates: np.ndarray) -> None:
    micrograph = simulated(70, 0.02, seed=5)
    with_ctf, without = (
        picking.find(micrograph.image, PIXEL_A, searched(), templates, optics) for optics in (OPTICS, None)
    )

    def best(found: Picks) -> float:
        """Recall of as many picks as there are particles."""
        within_px = 0.3 * DIAMETER_A / PIXEL_A
        return float(matched(found.coordinate_px[: len(micrograph.at_px)], micrograph.at_px, within_px).mean())

    assert best(with_ctf) > best(without) + 0.04 and best(with_ctf) > 0.7


def test_the_angle_is_that_which_turns_the_template(templates: np.ndarray) -> None:
    """A micrograph of one template, turned as `turned` says, gives back template and angle."""
    which = 7
    centres = small.positions(np.random.Generator(np.random.Philox(3)), 40, (400, 400), 50)
    angles = np.arange(len(centres)) * 30 % 360
    coarse_A, box = searched().coarse_A, templates.shape[-1]
    image = np.zeros((400, 400), np.float32)
    for (x, y), psi in zip(centres.astype(int), angles, strict=True):
        rows, columns = slice(y - box // 2, y + box // 2 + 1), slice(x - box // 2, x + box // 2 + 1)
        patch = picking.turned(templates[which], psi)
        if image[rows, columns].shape == patch.shape:
            image[rows, columns] -= patch / templates[which].std()
    image += np.random.Generator(np.random.Philox(4)).normal(0, 0.5, image.shape)
    found = picking.find(image, coarse_A, searched(step_deg=30.0), templates[which - 2 : which + 3])
    nearest = np.hypot(*(picked(found)[:, None] - centres).transpose(2, 0, 1)).argmin(axis=1)
    assert found.taken > 25
    assert np.mean(found.template[: found.taken] == 2) > 0.9
    assert np.mean(found.psi_deg[: found.taken] == angles[nearest]) > 0.9


def test_turning_a_projection_is_the_projection_of_the_turned_pose() -> None:
    turn = 37.0
    views = Rotation.random(3, rng=np.random.Generator(np.random.Philox(2))).as_matrix()
    in_plane = euler.matrix_from_euler(np.zeros(1), np.zeros(1), np.full(1, turn))
    # A smooth object, which linear interpolation does justice to.
    y, x = np.mgrid[-24:25, -24:25]
    parts = [((5, 2, -4), 1.0), ((-6, 3, 1), 2.0), ((1, -7, 6), 1.5)]

    def projection(rotation: np.ndarray) -> np.ndarray:
        centres = [rotation @ np.array(place) for place, _ in parts]
        return sum(
            w * np.exp(-((x - c[0]) ** 2 + (y - c[1]) ** 2) / 18) for c, (_, w) in zip(centres, parts, strict=True)
        )

    for view in views:
        np.testing.assert_allclose(
            picking.turned(projection(view).astype(np.float32), turn), projection(in_plane[0] @ view), atol=0.06
        )


def test_no_particles_no_picks() -> None:
    taken = [picking.find(simulated(0, 1.0, seed).image, PIXEL_A, searched()).taken for seed in range(6)]
    assert sorted(taken)[-2] <= 3  # one in twenty may have what looks like particles


@pytest.mark.parametrize("seed", [1, 2])
def test_carbon_and_contamination_are_left_out(seed: int) -> None:
    micrograph = simulated(70, 0.1, seed, carbon=True, blobs=3)
    found = picking.find(micrograph.image, PIXEL_A, searched())
    assert micrograph.in_spoilt(picked(found)) == 0
    precision, recall = precision_and_recall(found, micrograph.good_px)
    assert recall > 0.75 and precision > 0.9
    # What is shown as left out is where they are.
    y, x = (
        np.arange(size) * old // size for size, old in zip(found.excluded.shape, micrograph.image.shape, strict=True)
    )
    spoilt = micrograph.spoilt[y[:, None], x]
    assert found.excluded[spoilt].mean() > 0.9 and found.excluded[~spoilt].mean() < 0.2


def test_a_few_particles_are_not_taken_for_contamination() -> None:
    micrograph = simulated(12, 0.5, seed=3)
    precision, recall = precision_and_recall(picking.find(micrograph.image, PIXEL_A, searched()), micrograph.at_px)
    assert precision > 0.9 and recall > 0.9


def test_where_particles_are_few_and_strong_nothing_need_be_left_out() -> None:
    micrograph = simulated(12, 8.0, seed=3)
    found = picking.find(micrograph.image, PIXEL_A, searched(exclude=False))
    precision, recall = precision_and_recall(found, micrograph.at_px)
    assert precision > 0.9 and recall > 0.9 and not found.excluded.any()


def test_light_particles_are_found_as_dark_ones_are(plain: Simulated) -> None:
    dark = picking.find(plain.image, PIXEL_A, searched())
    light = picking.find(2000 - plain.image, PIXEL_A, searched(sign=1))
    assert abs(dark.taken - light.taken) <= 1
    np.testing.assert_allclose(dark.coordinate_px[:40], light.coordinate_px[:40], atol=0.1)


def test_the_grey_scale_does_not_matter(plain: Simulated) -> None:
    found, other = (picking.find(image, PIXEL_A, searched()) for image in (plain.image, plain.image * 16))
    np.testing.assert_allclose(found.score, other.score, atol=1e-4)


def test_edges_distances_thresholds_and_numbers_are_kept_to(plain: Simulated) -> None:
    free = picking.find(plain.image, PIXEL_A, searched())
    found = picking.find(plain.image, PIXEL_A, searched(edge_A=100.0, distance_A=200.0, threshold=0.1, most=30))
    at = found.coordinate_px
    ny, nx = plain.image.shape
    assert np.minimum(at, np.array([nx - 1, ny - 1]) - at).min() >= 100.0 / PIXEL_A - 1
    apart = np.hypot(*(at[:, None] - at).transpose(2, 0, 1)) + 1e3 * np.eye(len(at))
    assert apart.min() >= 200.0 / PIXEL_A - 0.5
    assert found.taken == 30 and found.threshold == 0.1
    assert (np.diff(free.score) <= 0).all() and free.score[free.taken - 1] >= free.threshold > free.score[free.taken]


def test_what_cannot_be_a_micrograph_is_refused() -> None:
    image = simulated(0, 1.0).image
    for bad, told in (
        (np.full((200, 200), 3.0, np.float32), "constant"),
        (np.where(image > image.mean() + 60, np.nan, image), "not finite"),
        (image[:40], "less than two particles"),
    ):
        with pytest.raises(ValueError, match=told):
            picking.find(bad, PIXEL_A, searched())


def test_images_are_scaled_to_templates_about_their_centre() -> None:
    pixel_A, size = 3.0, 90
    y, x = (np.mgrid[:size, :size] - size // 2) * pixel_A

    def blob(x, y):
        return np.exp(-((x - 20.0) ** 2 + (y + 35.0) ** 2) / (2 * 25.0**2))

    search = searched()
    found = picking.scaled(blob(x, y)[None].astype(np.float32) + 5, pixel_A, search, 10.0)[0]
    half = len(found) // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1] * search.coarse_A
    np.testing.assert_allclose(found, blob(x, y), atol=0.02)


def test_views_of_a_symmetric_map_are_those_of_its_unit() -> None:
    search = searched()
    counts = [
        len(picking.project(volume(operators(name)), PIXEL_A, operators(name), 1, search, 20.0)) for name in ("C1", "O")
    ]
    assert counts[0] == 48 and counts[1] < 12
    assert BOX * PIXEL_A > DIAMETER_A
