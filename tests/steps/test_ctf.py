import math
from pathlib import Path

import numpy as np
import pytest
from thon_rings import Truth, angle_between, micrograph

from dcryo.data.micrographs import pixel_size_A, read_image
from dcryo.kernels import spectrum
from dcryo.steps.ctf import Estimate, Optics, Wanted, estimate, estimate_of_spectrum

OPTICS = Optics(1.1, 300.0, 2.7, 0.1)
WANTED = Wanted()


def estimated(image: np.ndarray, optics: Optics = OPTICS, wanted: Wanted = WANTED) -> Estimate:
    found = estimate(image, optics, wanted)
    assert isinstance(found, Estimate), found
    return found


@pytest.mark.parametrize(
    ("mean", "astigmatism", "angle"),
    [(5000, 100, 160), (7000, 1000, 95), (10000, 300, 15), (15000, 100, 45), (22000, 600, 120), (30000, 1000, 178)],
)
def test_simulated_micrographs(mean: float, astigmatism: float, angle: float) -> None:
    truth = Truth(mean + astigmatism / 2, mean - astigmatism / 2, angle)
    found = estimated(micrograph(truth, signal=3.0, seed=int(mean)))
    assert found.flag == ""
    assert found.defocus_u_A == pytest.approx(truth.u_A, abs=50)
    assert found.defocus_v_A == pytest.approx(truth.v_A, abs=50)
    assert angle_between(found.defocus_angle_deg, angle) < 3.0
    assert found.resolution_A < 4.0 and 0.3 < found.score < 1.0
    assert found.astigmatism_A == found.defocus_u_A - found.defocus_v_A


def test_weak_rings_are_found_within_the_error_that_is_said() -> None:
    off, errors = [], []
    for seed in range(4):
        truth = Truth(12150 + 2000 * seed, 11850 + 2000 * seed, 30)
        found = estimated(micrograph(truth, side_px=1536, signal=0.3, seed=seed))
        assert found.flag == ""
        off.append((found.defocus_u_A + found.defocus_v_A) / 2 - (truth.u_A + truth.v_A) / 2)
        errors.append(found.defocus_error_A)
    # The sum of four squares of deviations is below 18.5, 999 times in a thousand.
    assert np.sum(np.square(off) / np.square(errors)) < 18.5
    assert 2.0 < np.mean(errors) < 60.0


def test_another_microscope_and_a_rectangle() -> None:
    truth = Truth(16300, 15900, 70)
    image = micrograph(truth, pixel_size_A=0.9, voltage_kV=200.0, cs_mm=1.4, q=0.07, signal=3.0)[:1400]
    found = estimated(image, Optics(0.9, 200.0, 1.4, 0.07))
    assert found.defocus_u_A == pytest.approx(truth.u_A, abs=50)
    assert found.defocus_v_A == pytest.approx(truth.v_A, abs=50)
    assert angle_between(found.defocus_angle_deg, 70) < 3.0


def test_a_fit_may_begin_where_a_spectrum_has_hardly_pixels() -> None:
    image = micrograph(Truth(16300, 15900, 70), side_px=1024, signal=3.0)
    assert estimated(image, wanted=Wanted(lowest_resolution_A=900.0)).defocus_u_A == pytest.approx(16300, abs=60)


def test_phase_plate() -> None:
    truth = Truth(9100, 8900, 40, 75)
    found = estimated(micrograph(truth, signal=3.0), wanted=Wanted(phase_deg=(0.0, 180.0)))
    assert found.phase_shift_deg == pytest.approx(75, abs=4)
    assert found.defocus_u_A == pytest.approx(truth.u_A, abs=60)
    assert found.defocus_v_A == pytest.approx(truth.v_A, abs=60)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((600, 600), np.float32), "all pixels are 0"),
        (np.full((600, 600), 7.5, np.float32), "all pixels are 7.5"),
        (np.where(np.arange(600) == 3, np.nan, 1.0) * np.ones((600, 600)), "600 pixels are not finite"),
        (np.eye(40, dtype=np.float32), "40 x 40 pixels of 1.1 A are too few to show rings"),
    ],
)
def test_what_has_no_spectrum_is_refused_with_a_reason(image: np.ndarray, told: str) -> None:
    assert estimate(image.astype(np.float32), OPTICS, WANTED) == told


@pytest.mark.parametrize("kind", ["white", "counts", "coloured", "film"])
def test_images_without_rings_are_flagged(kind: str) -> None:
    random = np.random.Generator(np.random.Philox(key=9))
    image = random.standard_normal((1500, 1500), dtype=np.float32)
    if kind == "counts":
        image = random.poisson(0.8, image.shape).astype(np.float32)
    if kind in ("coloured", "film"):
        # A detector that blurs; and structure whose spectrum falls, without a microscope.
        k = np.hypot(np.fft.fftfreq(1500)[:, None], np.fft.rfftfreq(1500))
        shape = np.exp(-((k / 0.35) ** 2)) if kind == "coloured" else 1.0 / (0.005 + k)
        image = np.fft.irfft2(np.fft.rfft2(image) * shape, s=image.shape).astype(np.float32)
    assert estimated(image).flag.startswith("no Thon rings")
    assert estimated(image, wanted=Wanted(phase_deg=(0.0, 180.0))).flag != ""


def test_the_wrong_range_is_flagged() -> None:
    image = micrograph(Truth(10200, 9900, 10), side_px=1536, signal=1.0)
    for wrong in ((20000.0, 50000.0), (1000.0, 5000.0), (10300.0, 30000.0)):
        assert estimated(image, wanted=Wanted(defocus_A=wrong)).flag != ""


def test_absurd_astigmatism_is_flagged() -> None:
    image = micrograph(Truth(12200, 11700, 10), side_px=1536, signal=3.0)
    assert "more than four times" in estimated(image, wanted=Wanted(astigmatism_A=110.0)).flag


def test_gradients_and_bad_areas_do_not_move_the_fit() -> None:
    truth = Truth(14300, 13900, 110)
    image = micrograph(truth, signal=2.0)
    clean = estimated(image)
    random = np.random.Generator(np.random.Philox(key=6))
    spoilt = image + 8.0 * np.linspace(-1, 1, len(image), dtype=np.float32)
    spoilt[:500, :700] += 20.0 * (random.random((500, 700)) < 0.03)
    spoilt[random.integers(0, 2048, 60), random.integers(0, 2048, 60)] = 1e5
    spoilt[-300:] = spoilt[-300:].mean()
    found = estimated(spoilt)
    assert found.flag == ""
    assert found.defocus_u_A == pytest.approx(clean.defocus_u_A, abs=25)
    assert found.defocus_v_A == pytest.approx(clean.defocus_v_A, abs=25)


def sloping() -> np.ndarray:
    """A micrograph whose defocus rises along x from 13600 to 15400 A, in twelve steps."""
    strips = []
    for n, strip in enumerate(np.array_split(np.arange(2048), 12)):
        mean = 14500.0 + 1800.0 * ((n + 0.5) / 12 - 0.5)
        strips.append(micrograph(Truth(mean + 100, mean - 100, 0), signal=4.0, seed=n)[:, strip])
    return np.concatenate(strips, axis=1)


def test_tilt_and_local_defocus() -> None:
    found = estimated(sloping(), wanted=Wanted(local=3))
    assert found.tilt_A == pytest.approx(1800, rel=0.25)
    assert found.tilt_deg == pytest.approx(math.degrees(math.atan(1800 / (2048 * 1.1))), rel=0.25)
    assert [(round(patch.x_px), round(patch.y_px)) for patch in found.local[:4]] == [
        (341, 341), (1024, 341), (1707, 341), (341, 1024),
    ]  # fmt: skip
    for patch in found.local:
        # A patch takes from its neighbours, which at the edges are on one side.
        assert patch.defocus_A == pytest.approx(13600 + 1800 * patch.x_px / 2048, abs=250)
    level = estimated(micrograph(Truth(14600, 14400, 0), signal=4.0), wanted=Wanted(local=2))
    assert level.tilt_A == level.tilt_deg == 0.0
    assert all(patch.defocus_A == pytest.approx(14500, abs=100) for patch in level.local)


def test_ice_is_seen() -> None:
    truth = Truth(12000, 11800, 0)
    image = micrograph(truth, signal=1.0, pixel_size_A=1.0)
    clean = estimated(image, Optics(1.0, 300.0, 2.7, 0.1))
    k = np.hypot(np.fft.fftfreq(2048)[:, None], np.fft.rfftfreq(2048))
    icy = np.fft.irfft2(np.fft.rfft2(image) * np.where(np.abs(k - 1 / 3.8) < 0.009, 1.5, 1.0), s=image.shape)
    found = estimated(icy.astype(np.float32), Optics(1.0, 300.0, 2.7, 0.1))
    assert clean.ice == pytest.approx(1.0, abs=0.05) and found.ice == pytest.approx(1.5**2, rel=0.1)
    assert found.flag == "" and found.defocus_u_A == pytest.approx(truth.u_A, abs=50)
    assert estimated(image[::2, ::2].copy(), Optics(2.0, 300.0, 2.7, 0.1)).ice is None


def test_a_spectrum_gives_what_its_micrograph_does() -> None:
    truth = Truth(11400, 11000, 60)
    image = micrograph(truth, signal=3.0)
    powers, _ = spectrum.tile_powers(image, 512, 255)
    whole = np.zeros((512, 512), np.float32)
    whole[1:, 1:] = spectrum.whole_of(spectrum.amplitude(powers, np.ones(len(powers), bool)))
    found = estimate_of_spectrum(whole, OPTICS, WANTED)
    assert isinstance(found, Estimate) and found.flag == "" and found.tilt_A is None
    assert found.defocus_u_A == pytest.approx(truth.u_A, abs=50)
    assert found.defocus_v_A == pytest.approx(truth.v_A, abs=50)
    assert angle_between(found.defocus_angle_deg, 60) < 3.0
    assert "not an amplitude" in str(estimate_of_spectrum(np.zeros((512, 512), np.float32), OPTICS, WANTED))
    assert "too few" in str(estimate_of_spectrum(whole[:40, :40].copy(), OPTICS, WANTED))


def test_the_picture_shows_the_spectrum_beside_the_fit() -> None:
    truth = Truth(12500, 11700, 30)
    found = estimated(micrograph(truth, signal=4.0))
    side = len(found.picture)
    assert found.picture.shape == (side, side) and side % 2 == 1
    assert found.picture.min() >= 0.0 and found.picture.max() <= 1.0
    # Both halves are symmetric about the origin: the measured one correlates with the fit turned by half a turn.
    measured, turned = found.picture[:, : side // 2], found.picture[::-1, ::-1][:, : side // 2]
    ky, kx = np.mgrid[-(side // 2) : side // 2 + 1, -(side // 2) : 0]
    ring = (np.hypot(kx, ky) > side / 14) & (np.hypot(kx, ky) < side / 4)
    assert np.corrcoef(measured[ring], turned[ring])[0, 1] > 0.4


REFINED_A = {
    "21": (10920, 10585), "22": (9850, 9539), "23": (10663, 10329), "24": (11680, 11326), "25": (10688, 10346),
}  # fmt: skip
"""Mean defocus of the particles of five micrographs of EMPIAR-10204, refined by RELION; their angle is near 83.5."""


@pytest.mark.parametrize("number", REFINED_A)
def test_real_spectra(shared_data: Path, number: str) -> None:
    movies = shared_data / "bgal_empiar10204/MotionCorr/job002/Movies"
    path = movies / f"20170629_000{number}_frameImage_PS.mrc"
    found = estimate_of_spectrum(read_image(path), Optics(pixel_size_A(path), 200.0, 1.4, 0.1), WANTED)
    assert isinstance(found, Estimate) and found.flag == ""
    mean = (found.defocus_u_A + found.defocus_v_A) / 2
    assert mean == pytest.approx(np.mean(REFINED_A[number]), rel=0.01)
    assert found.astigmatism_A == pytest.approx(np.subtract(*REFINED_A[number]), abs=100)
    assert angle_between(found.defocus_angle_deg, 83.5) < 12
    assert found.resolution_A < 5.5
    for wrong in ((20000.0, 50000.0), (1000.0, 6000.0)):
        refused = estimate_of_spectrum(
            read_image(path), Optics(pixel_size_A(path), 200.0, 1.4, 0.1), Wanted(defocus_A=wrong)
        )
        assert isinstance(refused, Estimate) and refused.flag


def test_real_micrographs(shared_data: Path) -> None:
    paths = sorted((shared_data / "apof_empiar10146/avg").glob("*.png"))
    optics = Optics(1.5, 300.0, 2.7, 0.1)
    for path in paths:
        found = estimated(read_image(path), optics)
        assert found.flag == "" and found.resolution_A < 7.0, path
        # Tiles of another size, and a fit that ends earlier, tell the same.
        other = estimated(read_image(path), optics, Wanted(tile_px=480, highest_resolution_A=5.0))
        both = [(one.defocus_u_A + one.defocus_v_A) / 2 for one in (found, other)]
        assert both[0] == pytest.approx(both[1], rel=0.01)
        assert angle_between(found.defocus_angle_deg, other.defocus_angle_deg) < 12
