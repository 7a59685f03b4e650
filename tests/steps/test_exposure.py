"""Simulated movies against formulas, against simulated particles, and against slow twins."""

import math
from dataclasses import replace

import numpy as np
import pytest

from dcryo.kernels import slices
from dcryo.kernels.ctf import ctf
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.dose import survival
from dcryo.kernels.filters import pad_or_crop
from dcryo.kernels.motion import Motion, local_shift_px
from dcryo.kernels.phantom import phantom
from dcryo.kernels.symmetry import operators
from dcryo.steps import exposure, simulation
from dcryo.steps.aberrations import NO_ABERRATIONS
from dcryo.steps.exposure import Exposure
from dcryo.steps.simulation import Microscope

BOX, PIXEL = 40, 3.0
HARMLESS = 1e-9
"""A dose that damages nothing."""


FAINT = 1e-13
"""Ice of which, in counts as few as that, the contrast is about 1/100."""


def microscope(**changed):
    given = dict.fromkeys(Microscope.__dataclass_fields__, 0.0) | {
        "box_px": BOX, "pixel_size_A": PIXEL, "voltage_kV": 300.0, "spherical_aberration_mm": 2.7,
        "amplitude_contrast": 0.1, "defocus_min_A": 8000.0, "defocus_max_A": 12000.0, "astigmatism_A": 600.0,
        "aberrations": NO_ABERRATIONS, "hand": 0,
    }  # fmt: skip
    return Microscope(**(given | changed))


def of(**changed):
    given = {
        "frame_px": (180, 150), "frames": 3, "dose_per_frame_e_A2": 1.0, "particles": 6, "spacing_A": 100.0, "ice": 0.0,
        "tilt_deg": 0.0, "motion_A": 0.0, "local_motion_A": 0.0, "crystals": 0.0, "film": 0.0, "gain_sigma": 0.05,
        "hot_pixels": 0,
    }  # fmt: skip
    return Exposure(**(given | changed))


@pytest.fixture(scope="module")
def density():
    atoms = phantom(operators("C1"), 40.0)
    return gaussian_density(atoms.position_A, atoms.amplitude, atoms.bfactor_A2 + 400.0, BOX, PIXEL)


@pytest.fixture(scope="module")
def prepared(density):
    return prepare(density)


def prepare(density):
    return slices.prepare(density, simulation.image_pixels(len(density)).shell_max)


def movie(prepared, scope, shot, contrast=1e-3, seed=1, number=0, specimen=None):
    specimen = specimen or exposure.draw_specimen(shot, scope, seed, number)
    prepared = prepared * np.float32(contrast)
    return np.array(list(exposure.intensities(prepared, scope, shot, specimen, seed, number))), specimen


def moved(image, shift_px):
    """An image moved by (x, y), periodic."""
    kx, ky = np.fft.rfftfreq(image.shape[1]), np.fft.fftfreq(image.shape[0])[:, None]
    return np.fft.irfft2(np.fft.rfft2(image) * np.exp(-2j * np.pi * (kx * shift_px[0] + ky * shift_px[1])), image.shape)


def ring_power(image, scope, u, v, angle):
    """Correlation of the power of an image's transform, whitened over frequency, with the square of a CTF."""
    window = np.hanning(image.shape[0])[:, None] * np.hanning(image.shape[1])
    power = np.abs(np.fft.rfft2((image - image.mean()) * window)) ** 2
    kx, ky = np.meshgrid(np.fft.rfftfreq(image.shape[1]), np.fft.fftfreq(image.shape[0]))
    k = np.hypot(kx, ky)
    some = (k > 0.06) & (k < 0.4)
    transfer = ctf(
        kx[some], ky[some], 1, scope.pixel_size_A, u, v, angle, scope.voltage_kV, scope.spherical_aberration_mm,
        scope.amplitude_contrast,
    )[0]  # fmt: skip
    rings = np.rint(k[some] * 40).astype(int)
    white = power[some] / (np.bincount(rings, power[some]) / np.maximum(1, np.bincount(rings)))[rings]
    return float(np.corrcoef(white, transfer**2)[0, 1])


def test_particles_are_those_that_particle_simulation_makes(density, prepared):
    # The same density in a box of the frame's size: the field is one large simulated image, of each particle its CTF.
    scope, shot = microscope(defocus_scatter_A=400.0), of(frame_px=(160, 160), tilt_deg=20.0, dose_per_frame_e_A2=1e-9)
    (first, *_), specimen = movie(prepared, scope, shot)
    assert len(specimen.centre_px) >= 3
    large = replace(scope, box_px=160)
    truth = replace(specimen.truth, origin_A=(80.0 - specimen.centre_px) * PIXEL)
    apart = simulation.images(prepare(pad_or_crop(density, 160)), large, truth, 0, 0, 0.0)
    expected = 1.0 - 1e-3 * apart.sum(axis=0)
    centre = slice(30, 130)  # fringes go round the edges of the one and not of the other
    assert np.std((first - expected)[centre, centre]) < 0.015 * np.std(expected[centre, centre])
    # Each one's defocus matters: with the micrograph's for all the fit is far worse.
    flat = replace(truth, **{f"defocus_{axis}_A": np.full(len(truth.half), specimen.defocus[i])
                             for i, axis in enumerate("uv")})  # fmt: skip
    wrong = 1.0 - 1e-3 * simulation.images(prepare(pad_or_crop(density, 160)), large, flat, 0, 0, 0.0).sum(axis=0)
    assert np.std((first - wrong)[centre, centre]) > 4 * np.std((first - expected)[centre, centre])


def test_particles_are_darker_than_the_ice(prepared):
    scope = microscope(defocus_min_A=20000.0, defocus_max_A=20000.0)
    (first, *_), specimen = movie(prepared, scope, of())
    at = np.rint(specimen.centre_px).astype(int)
    around = [first[y - 6 : y + 7, x - 6 : x + 7].mean() for x, y in at]
    assert max(around) < first.mean()


def test_each_frame_has_the_signal_that_the_damage_leaves(prepared):
    shot, scope = of(frames=4, dose_per_frame_e_A2=5.0, frame_px=(256, 256)), microscope()
    frames, _ = movie(prepared, scope, shot)
    transforms = np.fft.rfft2(frames - 1.0)
    k = np.hypot(np.fft.rfftfreq(256), np.fft.fftfreq(256)[:, None]) / PIXEL
    for low, high in ((0.02, 0.03), (0.06, 0.07), (0.11, 0.12), (0.15, 0.16)):
        ring = (k >= low) & (k < high)
        for frame in (1, 2, 3):
            found = np.vdot(transforms[0][ring], transforms[frame][ring]).real / np.sum(
                np.abs(transforms[0][ring]) ** 2
            )
            before, first = 5.0 * (frame + 0.5), 5.0 * 0.5
            k_mean = k[ring].mean()
            expected = survival(k_mean, before, 300.0) / survival(k_mean, first, 300.0)
            assert found == pytest.approx(expected, rel=0.03)


def test_frames_moved_back_by_the_whole_track_are_alike(prepared):
    shot, scope = of(motion_A=25.0, dose_per_frame_e_A2=HARMLESS, frames=5, ice=FAINT), microscope()
    frames, specimen = movie(prepared, scope, shot)
    track = specimen.motion.frame_px
    assert np.abs(track[-1]).max() > 2.0 and not track[0].any()
    inner = (slice(20, -20), slice(20, -20))
    for frame, shift in zip(frames, track, strict=True):
        assert np.std((moved(frame, shift) - frames[0])[inner]) < 0.05 * np.std(frames[0])
        if shift.any():
            assert np.std((moved(frame, -shift) - frames[0])[inner]) > 0.8 * np.std(frames[0])


def test_particles_and_ice_follow_the_local_model(prepared):
    local = np.zeros((2, 6, 3))
    local[0, :, 0], local[1, :, 1] = (1.0, 3.0, -2.0, 1.5, 2.0, 4.0), (-0.5, 1.0, 0.5, -1.5, 1.0, -1.0)
    motion = Motion(np.array([[0.0, 0.0], [2.3, -4.6], [5.1, -3.2]]), 0.5 * local.reshape(2, 18))
    scope = microscope()
    for shot in (of(dose_per_frame_e_A2=HARMLESS), of(dose_per_frame_e_A2=HARMLESS, particles=1, ice=FAINT)):
        specimen = exposure.draw_specimen(shot, scope, 2, 0, motion)
        contrast = 0.0 if shot.ice else 1e-3
        frames, _ = movie(prepared, scope, shot, contrast, specimen=specimen)
        # Pieces about particles, or anywhere in the ice, lie at r - whole - local(r).
        places = specimen.centre_px if not shot.ice else np.array([[60.0, 50.0], [120.0, 100.0], [90.0, 75.0]])
        for place in places:
            fraction = place / np.array(shot.frame_px) - 0.5
            for frame in (1, 2):
                shift = motion.at(fraction)[frame]
                x, y = np.rint(place).astype(int)
                piece = (slice(max(0, y - 12), y + 12), slice(max(0, x - 12), x + 12))
                back = moved(frames[frame], shift)[piece]
                still, unmoved = frames[0][piece], frames[frame][piece]
                # Particles are moved without loss; splines take from the ice's highest frequencies.
                assert np.corrcoef(back.ravel(), still.ravel())[0, 1] > (0.95 if shot.ice else 0.9999)
                assert np.corrcoef(unmoved.ravel(), still.ravel())[0, 1] < 0.9


def test_the_rings_of_the_ice_are_at_the_true_defocus(prepared):
    scope, shot = microscope(pixel_size_A=1.5), of(frame_px=(512, 512), frames=1, ice=0.2, particles=1)
    frames, specimen = movie(prepared, scope, shot, contrast=0.0)
    u, v, angle = specimen.defocus
    fits = {off: ring_power(frames[0], scope, u + off, v + off, angle) for off in range(-600, 601, 100)}
    assert max(fits, key=fits.__getitem__) == 0
    assert fits[0] > ring_power(frames[0], scope, v, u, angle)


def test_tilted_ice_has_the_defocus_of_its_place(prepared):
    scope = microscope(pixel_size_A=1.5, astigmatism_A=0.0)
    shot = of(frame_px=(768, 768), frames=1, ice=0.2, particles=1, tilt_deg=40.0)
    frames, specimen = movie(prepared, scope, shot, contrast=0.0)
    slope = specimen.gradient_A_px
    assert np.hypot(*slope) == pytest.approx(math.tan(math.radians(40.0)) * 1.5)
    axis = int(np.argmax(np.abs(slope)))
    for begin in (0, 512):
        piece = frames[0][begin : begin + 256] if axis else frames[0][:, begin : begin + 256]
        off = slope[axis] * (begin + 128 - 384)
        fits = {step: ring_power(piece, scope, *[specimen.defocus[0] + off + step] * 2, 0.0)
                for step in range(-900, 901, 100)}  # fmt: skip
        assert abs(max(fits, key=fits.__getitem__)) <= 200 < abs(off)


def test_signal_and_ice_are_as_strong_as_asked(prepared):
    scope = microscope()
    shot = of(frames=6, dose_per_frame_e_A2=4.0, frame_px=(320, 300), particles=12)
    some = simulation.draw_truth(scope, 1, np.zeros(128, np.int64))
    contrast = exposure.contrast_of(prepared, scope, shot, some, 0.25)
    kx, ky = np.fft.rfftfreq(320) / PIXEL, np.fft.fftfreq(300)[:, None] / PIXEL
    left = [survival(np.hypot(kx, ky), before, 300.0) for before in shot.before_e_A2()]
    weight = 1.0 / np.sqrt(np.sum(np.square(left), axis=0))
    electrons = 4.0 * PIXEL**2

    def weighted(frames):
        return np.fft.irfft2(sum(np.fft.rfft2(frame) * each for frame, each in zip(frames, left, strict=True)) * weight)

    frames, specimen = movie(prepared, scope, shot, contrast)
    total, half = weighted(frames), BOX // 2
    boxes = [total[y - half : y + half, x - half : x + half] for x, y in np.rint(specimen.centre_px).astype(int)]
    variance = np.mean([box.var() for box in boxes if box.shape == (BOX, BOX)])
    assert variance * electrons == pytest.approx(0.25, rel=0.25)
    icy = replace(shot, ice=0.7)
    assert exposure.contrast_of(prepared, scope, icy, some, 0.25) == pytest.approx(math.sqrt(1.7) * contrast)
    frames, _ = movie(prepared, scope, icy, 0.0)
    assert weighted(frames).var() * electrons == pytest.approx(0.7, rel=0.15)


def test_the_weight_of_frames_is_the_sum_over_them():
    shot, k = of(frames=7, dose_per_frame_e_A2=2.5), np.array([0.0, 0.01, 0.1, 0.3])
    slow = [math.sqrt(sum(survival(each, 2.5 * (n + 0.5), 200.0) ** 2 for n in range(7))) for each in k]
    np.testing.assert_allclose(exposure.weight_of_frames(k, shot, 200.0), slow, rtol=1e-9)


def test_counts_are_poisson_about_dose_over_gain():
    shot = of(frame_px=(300, 200), gain_sigma=0.1, hot_pixels=20)
    gain, hot = exposure.draw_gain(shot, 5), exposure.draw_hot_pixels(shot, 5)
    intensity = np.full((200, 300), 0.8, np.float32)
    drawn = np.array([exposure.counts(intensity, gain, hot, 2.5, 5, 0, frame) for frame in range(60)])
    cool = np.ones((200, 300), bool)
    cool[hot[:, 1], hot[:, 0]] = False
    assert len(np.unique(hot, axis=0)) == 20 and (~cool).sum() == 20
    mean = 0.8 * 2.5 / gain
    scaled = (drawn - mean) / np.sqrt(mean)
    assert scaled[:, cool].mean() == pytest.approx(0.0, abs=0.003)
    assert scaled[:, cool].var() == pytest.approx(1.0, abs=0.005)
    assert drawn[:, ~cool].mean(axis=0).min() > 10 * 2.0
    # Frames and movies have noise of their own.
    assert abs(np.corrcoef(drawn[0][cool], drawn[1][cool])[0, 1]) < 0.05
    other = exposure.counts(intensity, gain, hot, 2.5, 5, 1, 0)
    assert abs(np.corrcoef(drawn[0][cool], other[cool])[0, 1]) < 0.05


def test_a_raw_frame_times_the_gain_is_flat():
    shot = of(frame_px=(128, 96), gain_sigma=0.2)
    gain = exposure.draw_gain(shot, 3)
    assert gain.shape == (96, 128) and gain.mean() == pytest.approx(1.0, abs=1e-5) and gain.min() > 0
    assert np.log(gain).std() == pytest.approx(0.2, rel=0.1)
    none = np.empty((0, 2), np.int64)
    raw = sum(exposure.counts(np.ones((96, 128), np.float32), gain, none, 50.0, 3, 0, n) for n in range(50))
    columns, flat = raw.mean(axis=0), (raw * gain).mean(axis=0)
    assert columns.std() / columns.mean() > 0.05
    assert flat.std() / flat.mean() < 1.5 * math.sqrt(1.0 / (2500 * 96))


def test_particles_keep_their_distance_and_stay_clear_of_dirt():
    shot = of(frame_px=(2000, 1500), particles=400, spacing_A=150.0, crystals=4.0, film=1.0)
    specimens = [exposure.draw_specimen(shot, microscope(), 3, number) for number in range(4)]
    assert sum(len(specimen.crystals) for specimen in specimens) > 5
    for specimen in specimens:
        centre, spacing = specimen.centre_px, 150.0 / PIXEL
        assert 50 < len(centre) <= 400
        distance = np.hypot(*(centre[:, None] - centre).transpose(2, 0, 1)) + 1e9 * np.eye(len(centre))
        assert distance.min() >= spacing
        for column, row, radius, *_ in specimen.crystals:
            assert np.hypot(*(centre - (column, row)).T).min() > radius
        column, row, radius = specimen.hole
        away = np.hypot(*(centre - (column, row)).T)
        assert away.max() < radius
        corners = np.array([[0, 0], [2000, 0], [0, 1500], [2000, 1500]])
        assert np.hypot(*(corners - (column, row)).T).max() > radius  # the film is in view


def test_dirt_is_dark_and_moves_with_the_specimen(prepared):
    motion = Motion(np.array([[0.0, 0.0], [6.0, -3.0]]), np.zeros((2, 18)))
    shot, scope = of(frames=2, frame_px=(400, 400), crystals=2.0, film=1.0), microscope()
    specimen = exposure.draw_specimen(shot, scope, 8, 0, motion)
    assert len(specimen.crystals) and specimen.hole is not None
    frames, _ = movie(prepared, scope, shot, 0.0, specimen=specimen)
    back = moved(frames[1], (6.0, -3.0))
    inner = (slice(10, -10), slice(10, -10))
    np.testing.assert_allclose(back[inner], frames[0][inner], atol=0.02)
    column, row, _, transmission, _ = specimen.crystals[0]
    assert frames[0][int(row) % 400, int(column) % 400] <= transmission + 0.01
    y, x = np.indices((400, 400))
    film = np.hypot(x - specimen.hole[0], y - specimen.hole[1]) > specimen.hole[2] + 20
    assert film.any() and frames[0][film].max() <= exposure.FILM_TRANSMISSION + 0.01


def test_a_track_is_fast_first():
    shot = of(frames=24, dose_per_frame_e_A2=1.3, motion_A=15.0, local_motion_A=2.0)
    motions = [exposure.draw_motion(shot, 0.885, 1, number) for number in range(40)]
    steps = 0.885 * np.array([np.hypot(*np.diff(motion.frame_px, axis=0).T) for motion in motions])
    assert steps[:, :4].mean() > 3 * steps[:, -8:].mean()
    assert 10.0 < steps.sum(axis=1).mean() < 25.0
    place = np.array([[0.5, -0.5], [0.0, 0.0]])
    corners, centres = np.stack([local_shift_px(motion.coefficients, place, 24) for motion in motions], axis=1)
    assert 0.885 * np.sqrt(np.mean(np.square(corners[:, 23]))) == pytest.approx(2.0, rel=0.35)
    assert not any(motion.frame_px[0].any() for motion in motions)
    # What is left of the polynomial at the centre is nothing: that is the whole-frame track.
    assert not centres.any()


def test_a_movie_does_not_know_of_other_movies_and_the_seed_decides(prepared):
    shot, scope = of(ice=0.2, motion_A=5.0), microscope()
    again, _ = movie(prepared, scope, shot, number=3)
    np.testing.assert_array_equal(movie(prepared, scope, shot, number=3)[0], again)
    for seed, number in ((1, 4), (2, 3)):
        other, _ = movie(prepared, scope, shot, seed=seed, number=number)
        assert abs(np.corrcoef(other[0].ravel(), again[0].ravel())[0, 1]) < 0.3
