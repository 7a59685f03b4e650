"""The steps of 2D classification, against sums over all poses of images turned by exact Fourier sums."""

import numpy as np
import pytest

from dcryo.kernels import rings
from dcryo.kernels.masks import circle
from dcryo.steps import classification
from dcryo.steps.classification import Images

BOX, DIAMETER, SHELL, CLASSES = 32, 20, 9, 3
OF = rings.rings(BOX, 11, 1.2 * DIAMETER)
SHIFTS = classification.shift_grid(1.5, 1.0)


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def transform_at(image, kx, ky):
    y, x = np.mgrid[:BOX, :BOX] - BOX // 2
    angle = np.multiply.outer(kx, x) + np.multiply.outer(ky, y)
    return np.sum(image * np.exp(-2j * np.pi * angle / BOX), axis=(-2, -1))


def turned_at(image, angle_rad):
    """Samples on the rings of an image turned by an angle from x towards y."""
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    return transform_at(image, c * OF.kx + s * OF.ky, -s * OF.kx + c * OF.ky)


def moved(sampled, shift):
    return sampled * np.exp(-2j * np.pi * (shift[0] * OF.kx + shift[1] * OF.ky) / BOX)


class Scene:
    """Classes that are blobs, and images of them with a CTF and noise."""

    def __init__(self, count=4, seed=0):
        rng = generator(seed)
        y, x = np.mgrid[:BOX, :BOX] - BOX // 2
        centres = rng.uniform(-6, 6, (CLASSES, 4, 2))
        self.classes = np.array(
            [sum(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 6) for cx, cy in own) for own in centres]
        ).astype(np.float32) * circle(BOX, DIAMETER, 3)  # fmt: skip
        self.share = np.array([0.5, 0.3, 0.2])
        radius = np.hypot(OF.kx, OF.ky)
        transfer = [np.sin(0.9 + (0.02 + 0.004 * i) * radius**2) for i in range(count)]
        self.ctf = np.stack(transfer, axis=1).astype(np.float32)
        self.variance = (40.0 + 300 * np.exp(-np.arange(OF.shell_max + 1) / 3)).astype(np.float32)
        self.number = rng.integers(0, CLASSES, count)
        self.angle = rng.integers(0, 360, count) * np.pi / 180
        self.shift = rng.uniform(-1, 1, (count, 2))
        self.images = np.array([self._image(i, rng) for i in range(count)], dtype=np.float32)
        self.prepared = classification.prepare(self.classes, self.share, OF, SHELL, SHIFTS, 2.0)
        self.batch = Images(
            self.images, self.ctf, np.tile(1 / self.variance, (count, 1)), 0.3 * rng.standard_normal((count, 2))
        )

    def _image(self, i, rng):
        sampled = moved(turned_at(self.classes[self.number[i]], self.angle[i]), -self.shift[i]) * self.ctf[:, i]
        image = rings.images_of(sampled[:, None].astype(np.complex64), OF)[0]
        return image + 0.15 * rng.standard_normal((BOX, BOX)).astype(np.float32)

    def log_posterior(self, i):
        """(angles, T, K), by definition: Re <Y, S> - 1/2 <W, |S|^2> and the priors."""
        prepared, batch = self.prepared, self.batch
        data = moved(transform_at(batch.images[i], OF.kx, OF.ky), batch.origin_px[i])
        inverse = batch.inverse_variance[i]
        area = OF.area * (np.arange(OF.shell_max + 1) <= SHELL)
        out = np.empty((prepared.angles, len(SHIFTS), CLASSES))
        for a in range(prepared.angles):
            for k in range(CLASSES):
                reference = turned_at(self.classes[k], 2 * np.pi * a / prepared.angles) * batch.ctf[:, i]
                square = np.sum(area * np.abs(reference) ** 2 * inverse)
                for t, shift in enumerate(SHIFTS):
                    cross = np.sum(area * (moved(data, shift) * reference.conj()).real * inverse)
                    prior = np.log(self.share[k]) - 0.5 * np.sum(shift**2) / 2.0**2
                    out[a, t, k] = cross - 0.5 * square + prior
        return out


def taken(scene, rows):
    batch = scene.batch
    return Images(batch.images[rows], batch.ctf[:, rows], batch.inverse_variance[rows], batch.origin_px[rows])


@pytest.fixture(scope="module")
def scene():
    return Scene()


def test_the_posterior_is_that_of_the_definition(scene):
    weighed = classification._weigh(scene.batch, scene.prepared)
    for i in range(len(scene.images)):
        expected = scene.log_posterior(i)
        top = expected.max()
        weights = np.exp(expected - top)
        found = weighed.weights[:, i]
        assert np.abs(found - weights / weights.sum()).max() < 0.02
        assert found.sum() == pytest.approx(1, abs=1e-4)
        prior = np.sum(np.exp(-0.5 * np.sum(SHIFTS**2, axis=1) / 4)) * scene.prepared.angles
        assert weighed.log_evidence[i] == pytest.approx(top + np.log(weights.sum() / prior), abs=0.15)
        assert weighed.max_probability[i] == pytest.approx(1 / weights.sum(), abs=0.02)


def test_images_are_found_at_their_class_angle_and_shift(scene):
    sums = classification.empty_sums(OF, CLASSES, 1)
    found = classification.fold(sums, scene.batch, np.zeros(4, int), scene.prepared)
    np.testing.assert_array_equal(found.class_number, scene.number)
    # RELION's angle turns the image onto the class, ours the class onto the image.
    off = np.angle(np.exp(1j * (found.psi_rad + scene.angle)))
    assert np.abs(off).max() < 1.5 * 2 * np.pi / scene.prepared.angles
    # An origin is the shift that brings the image onto its class.
    assert np.abs(found.origin_px - scene.shift).max() < 0.8
    assert sums.share.sum() == pytest.approx(4, abs=1e-3) and sums.particles.tolist() == [4]


def test_sums_are_the_images_turned_back_with_their_weights(scene):
    sums = classification.empty_sums(OF, CLASSES, 1)
    weighed = classification._weigh(scene.batch, scene.prepared)
    classification.fold(sums, scene.batch, np.zeros(4, int), scene.prepared)
    numerator = np.zeros((len(OF.kx), CLASSES, OF.shell_max + 1), complex)
    denominator = np.zeros(numerator.shape)
    data = rings.sample(scene.batch.images, OF) * scene.ctf / scene.variance
    for i in range(4):
        for a, t, k in zip(*np.nonzero(weighed.weights[:, i] > 1e-3), strict=True):
            weight = weighed.weights[a, i, t, k]
            own = moved(moved(data[:, i], scene.batch.origin_px[i]), SHIFTS[t])
            series = rings.series(own.astype(np.complex64), OF, OF.orders)
            turn = np.exp(1j * np.arange(OF.orders + 1) * 2 * np.pi * a / scene.prepared.angles)
            numerator[:, k] += weight * rings.samples((series * turn[:, None]).astype(np.complex64), OF)
            denominator[:, k] += weight * scene.ctf[:, i] ** 2 / scene.variance  # these CTFs are round
    np.testing.assert_allclose(rings.samples(sums.numerator, OF), numerator, atol=0.01 * np.abs(numerator).max())
    np.testing.assert_allclose(rings.real_samples(sums.denominator, OF), denominator, atol=0.01 * denominator.max())


def test_the_residual_is_the_noise():
    """Images that are exactly a class at a pose of the grid leave what was added to them."""
    scene = Scene(count=40, seed=3)
    sums = classification.empty_sums(OF, CLASSES, 2)
    group = np.arange(40) % 2
    found = classification.fold(sums, scene.batch, group, scene.prepared)
    expected = 2 * (0.15 * BOX) ** 2 / 2
    assert sums.particles.tolist() == [20, 20]
    residual = sums.residual / sums.particles[:, None]
    # Beyond what is compared, poses between those of the grid leave a part of the signal.
    for of_group in residual:
        assert np.average(of_group[4:], weights=np.arange(4, 12)) == pytest.approx(expected, rel=0.25)
    square = np.sum(OF.area * found.square, axis=1)
    cross = np.sum(OF.area * found.cross, axis=1)
    assert np.median(cross / square) == pytest.approx(1, abs=0.15)


def test_what_is_not_finite_has_no_part(scene):
    images = scene.images.copy()
    images[1, 3, 3] = np.nan
    sums, without = (classification.empty_sums(OF, CLASSES, 1) for _ in range(2))
    found = classification.fold(sums, scene.batch._replace(images=images), np.zeros(4, int), scene.prepared)
    assert found.usable.tolist() == [True, False, True, True]
    kept = np.array([0, 2, 3])
    classification.fold(without, taken(scene, kept), np.zeros(3, int), scene.prepared)
    np.testing.assert_allclose(sums.numerator, without.numerator, atol=1e-5 * np.abs(without.numerator).max())
    assert sums.particles.tolist() == [3]


def test_averages_of_many_images_are_their_class():
    """Poses on the grid, little noise: class images come back from sums, and halves agree."""
    scene = Scene(count=60, seed=5)
    halves = []
    for half in range(2):
        rows = np.arange(half, 60, 2)
        sums = classification.empty_sums(OF, CLASSES, 1)
        classification.fold(sums, taken(scene, rows), np.zeros(30, int), scene.prepared)
        halves.append(sums)
    made = classification.averages((halves[0], halves[1]), circle(BOX, DIAMETER, 3), OF)
    for image, truth, curve in zip(made.images, scene.classes, made.frc, strict=True):
        assert np.corrcoef(image.ravel(), truth.ravel())[0, 1] > 0.95
        assert np.mean(curve[2:6]) > 0.9
    mass, rim = classification.mass_and_rim(made.unmasked, DIAMETER, 1.2)
    assert rim.max() < 0.3
    expected = scene.classes.sum(axis=(1, 2))
    np.testing.assert_allclose(mass / mass.mean(), expected / expected.mean(), rtol=0.2)
