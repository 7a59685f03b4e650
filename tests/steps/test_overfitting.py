"""Images against projections of a map, ring by ring, and what verdicts say."""

import numpy as np
import pytest

from dcryo.euler import matrix_from_euler
from dcryo.kernels import fft, slices
from dcryo.kernels.ctf import ctf
from dcryo.kernels.overfitting import ResolutionLine
from dcryo.kernels.shells import half_plane
from dcryo.steps.expectation import Batch
from dcryo.steps.overfitting import (
    Agreement,
    agreement,
    bfactor_verdict,
    checked_shells,
    hand_verdict,
    noise_verdict,
    ring_correlations,
    unseen_verdict,
)

BOX, N, WIDTH_A = 24, 6, 120.0


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    volume = np.random.default_rng(0).standard_normal((BOX,) * 3).astype(np.float32)
    return slices.prepare(volume * (radius_px() < 0.3 * BOX), BOX // 2)


def radius_px() -> np.ndarray:
    at = np.indices((BOX,) * 3) - BOX // 2
    return np.sqrt((at**2).sum(axis=0))


def batch_of(reference: np.ndarray, noise: float) -> Batch:
    """Projections of a map times their CTFs, moved, and noise."""
    rng = np.random.default_rng(3)
    pixels = half_plane(BOX // 2)
    rotation = matrix_from_euler(*(rng.uniform(0, 180, N) for _ in range(3)))
    origin = rng.normal(0, 1.5, (N, 2))
    defocus = rng.uniform(8e3, 2e4, N)
    columns = [np.full(N, 5.0), defocus, defocus + 300, np.full(N, 20.0), np.full(N, 300.0), np.full(N, 2.7)]
    values = ctf(pixels.kx, pixels.ky, BOX, *columns, np.full(N, 0.1), np.zeros(N), np.zeros(N), np.ones(N))
    of_map = slices.extract(reference, rotation, pixels, BOX)
    phase = np.exp(2j * np.pi / BOX * (origin[:, :1] * pixels.kx + origin[:, 1:] * pixels.ky))
    transforms = np.zeros((N, BOX, BOX // 2 + 1), dtype=np.complex64)
    for kx, ky, value in zip(pixels.kx, pixels.ky, (of_map * values * phase).T, strict=True):
        transforms[:, ky, kx] = value
        if kx == 0:
            transforms[:, -ky, 0] = value.conj()
    images = fft.irfft2(transforms, BOX) + noise * rng.standard_normal((N, BOX, BOX)).astype(np.float32)
    norm = rng.uniform(0.5, 2, N)
    return Batch(
        images.astype(np.float32),
        values,
        np.zeros(N, int),
        norm,
        np.ones(N),
        rotation,
        origin,
        rotation,
        origin,
        np.ones((N, 1)),
    )


def by_hand(batch: Batch, reference: np.ndarray) -> np.ndarray:
    """Correlation of each image with its slice, (n, S), one pixel after the other."""
    pixels = half_plane(BOX // 2)
    found = np.zeros((N, pixels.shell_max + 1))
    for i in range(N):
        transform = fft.rfft2(batch.images[i : i + 1])[0]
        of_map = slices.extract(reference, batch.rotation[i : i + 1], pixels, BOX)[0]
        for shell in range(pixels.shell_max + 1):
            cross = map_power = image_power = 0.0
            for p in range(pixels.start[shell], pixels.start[shell + 1]):
                kx, ky = int(pixels.kx[p]), int(pixels.ky[p])
                moved = transform[ky, kx] * np.exp(
                    -2j * np.pi / BOX * (kx * batch.origin_px[i, 0] + ky * batch.origin_px[i, 1])
                )
                expected = of_map[p] * batch.ctf[i, p]
                cross += (np.conj(expected) * moved).real
                map_power += abs(expected) ** 2
                image_power += abs(moved) ** 2
            found[i, shell] = cross / np.sqrt(map_power * image_power)
    return found


def test_correlations_are_those_made_by_hand(reference: np.ndarray) -> None:
    batch = batch_of(reference, noise=2.0)
    expected = by_hand(batch, reference)
    found = ring_correlations(batch, reference)
    np.testing.assert_allclose(found[0], expected.sum(axis=0), atol=2e-3)
    np.testing.assert_allclose(found[1], (expected**2).sum(axis=0), atol=2e-3)
    assert (found[2] == N).all()
    assert 0.05 < found[0, 1:].mean() / N < 0.95


def test_projections_correlate_by_one(reference: np.ndarray) -> None:
    found = ring_correlations(batch_of(reference, noise=0.0), reference)
    np.testing.assert_allclose(found[0, 1:-1] / N, 1, atol=1e-3)


def test_images_that_are_no_numbers_have_no_part(reference: np.ndarray) -> None:
    batch = batch_of(reference, noise=2.0)
    batch.images[2, 3, 4] = np.nan
    batch.ctf[4, 0] = np.nan
    kept = [0, 1, 3, 5]
    expected = by_hand(batch, reference)[kept]
    found = ring_correlations(batch, reference)
    assert (found[2] == len(kept)).all()
    np.testing.assert_allclose(found[0], expected.sum(axis=0), atol=2e-3)


def test_the_mean_and_its_error() -> None:
    values = np.random.default_rng(0).normal(0.2, 0.1, (400, 5))
    found = agreement(np.stack([values.sum(axis=0), (values**2).sum(axis=0), np.full(5, 400.0)]))
    np.testing.assert_allclose(found.mean, values.mean(axis=0))
    np.testing.assert_allclose(found.error, values.std(axis=0, ddof=1) / 20, rtol=1e-6)
    assert found.images == 400


def test_a_claim_reaches_from_the_doubt_to_the_resolution() -> None:
    curve = np.linspace(1, 0, 21)
    assert checked_shells(curve, 5).tolist() == list(range(5, 18))
    assert checked_shells(curve, 17).tolist() == [17, 18, 19]
    assert checked_shells(curve, 25).tolist() == [20]


CURVE = np.concatenate([np.ones(6), np.linspace(0.8, 0, 15)])
WITHIN = np.cumsum(np.arange(21.0) ** 2)


def test_noise_that_correlates_is_overfitting() -> None:
    none, much = np.where(np.arange(21) < 6, 1, 0.01), np.where(np.arange(21) < 6, 1, 0.4)
    honest, figures = noise_verdict(CURVE, none, CURVE, WITHIN, 6, WIDTH_A)
    assert honest.passed and "No overfitting" in honest.words
    assert figures["fsc_of_noise"] == pytest.approx(0.01) and figures["noise_from_A"] == pytest.approx(20)
    overfitted, figures = noise_verdict(CURVE, much, CURVE - 0.2, WITHIN, 6, WIDTH_A)
    assert overfitted.passed is False and overfitted.words.startswith("Overfitted")
    assert figures["resolution_true_A"] > figures["resolution_A"]
    # A run that ends where the noise begins claims nothing that could be overfitted.
    short = np.where(np.arange(21) < 7, CURVE, 0)
    unclaimed, _ = noise_verdict(short, much, short, WITHIN, 6, WIDTH_A)
    assert unclaimed.passed is None and "--noise-beyond" in unclaimed.words
    # Few voxels correlate by themselves.
    assert noise_verdict(CURVE, much, CURVE, WITHIN / 1000, 6, WIDTH_A)[0].passed


def of(level: float, error: float) -> Agreement:
    return Agreement(np.full(21, level), np.full(21, error), 500)


def test_unseen_particles_have_to_reach_half_of_what_is_promised() -> None:
    seen = of(0.1, 1e-3)
    first = 6
    promised = unseen_verdict(seen, seen, CURVE, first, WIDTH_A)[1]["promised_correlation"]
    checked = checked_shells(CURVE, first)
    finer = checked[len(checked) // 2 :]
    assert promised == pytest.approx(0.1 * CURVE[finer].mean())
    for share, error, passed in ((0.9, 1e-3, True), (0.6, 1e-3, True), (0.2, 1e-3, False), (0.2, 0.1, None)):
        verdict, figures = unseen_verdict(seen, of(share * promised, error), CURVE, first, WIDTH_A)
        assert verdict.passed is passed
        assert figures["unseen_correlation"] == pytest.approx(share * promised)


def test_agreement_in_the_coarser_half_is_no_excuse() -> None:
    unseen = of(0.0, 1e-3)
    checked = checked_shells(CURVE, 6)
    unseen.mean[: checked[len(checked) // 2]] = 0.1
    assert unseen_verdict(of(0.1, 1e-3), unseen, CURVE, 6, WIDTH_A)[0].passed is False


def test_the_words_of_a_line_say_what_twice_as_many_would_give() -> None:
    line = ResolutionLine(np.array([True] * 4), 100.0, 5.0, 0.02, -0.1)
    verdict = bfactor_verdict(line, 5.0, 2.0, refined=True)
    assert verdict.passed is None
    assert f"would give {(1 / 25 + 0.02 * np.log(2)) ** -0.5:.2f} A" in verdict.words
    assert "Nyquist" in bfactor_verdict(line, 5.0, 4.5, refined=True).words
    assert "--refine-subsets" in bfactor_verdict(line, 5.0, 2.0, refined=False).words
    nothing = float("nan")
    none = ResolutionLine(np.array([True, False]), nothing, nothing, nothing, nothing)
    assert bfactor_verdict(none, 5.0, 2.0, refined=True).words.startswith("There is no line: 1 of the 2")


def test_hands_are_told_by_a_margin() -> None:
    assert hand_verdict(0.8, 0.4).passed is True
    assert hand_verdict(0.4, 0.8).passed is False
    assert hand_verdict(0.80, 0.77).passed is None
