import json
import math

import mrcfile
import numpy as np
import pytest
import starfile
from pydantic import ValidationError

from dcryo.data import mrc, star
from dcryo.errors import InputError
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels import slices
from dcryo.kernels.aberrations import even_phase, odd_phase
from dcryo.kernels.density import gaussian_density
from dcryo.steps import simulation


def quiet(line, /, *, end="\n"):
    pass


def run(out, model="phantom", **options):
    given = {"particles": 70, "box_px": 32, "pixel_size_A": 5.0, "seed": 4} | options
    return simulate(SimulateOptions(model=model, out=out, **given), progress=quiet)


def blobs(box, pixel):
    rng = np.random.Generator(np.random.Philox(8))
    position = rng.uniform(-20.0, 20.0, (6, 3))
    return gaussian_density(position, np.full((6, 1), 50.0), np.full((6, 1), 3000.0), box, pixel)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run(tmp_path_factory.mktemp("simulate") / "out", micrographs=7, symmetry="C2")


def test_files_agree_with_one_another_and_with_other_readers(made):
    out = made.particles_star.parent
    stack = mrcfile.read(out / "particles.mrcs")
    assert stack.shape == (70, 32, 32) and stack.dtype == np.float32
    blank, known = starfile.read(made.particles_star), starfile.read(made.truth_star)
    assert blank["optics"].rlnImagePixelSize.iloc[0] == 5.0 and blank["optics"].rlnImageSize.iloc[0] == 32
    assert list(blank["particles"].rlnImageName[:2]) == ["000001@particles.mrcs", "000002@particles.mrcs"]
    assert blank["particles"].rlnMicrographName.nunique() == 7
    poses = {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnRandomSubset"}
    assert not poses & set(blank["particles"].columns)
    assert poses <= set(known["particles"].columns)
    np.testing.assert_allclose(blank["particles"].rlnDefocusU, known["particles"].rlnDefocusU)
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    assert "70 particles" in made.summary()


def test_projections_of_the_truth_map_are_the_signal(made):
    density, truth = mrc.read_map(made.truth_map).array, star.read_particles(made.truth_star)
    images = mrcfile.read(made.particles_star.parent / "particles.mrcs")
    scope = simulation.Microscope(32, 5.0, 300.0, 2.7, 0.1, *[0.0] * 7)
    poses = simulation.Truth(*(truth[name] for name in simulation.Truth.__dataclass_fields__))
    prepared = slices.prepare(density, simulation.image_pixels(32).shell_max)
    clean = simulation.images(prepared, scope, poses, 0, 0, 0.0)
    noise = images - clean
    # The noise does not know the signal, the fit of one to the other is 1, and their variances are the SNR.
    assert np.sum(clean * images) / np.sum(clean**2) == pytest.approx(1.0, abs=0.05)
    assert noise.var() == pytest.approx(1.0, rel=0.02)
    assert clean.var(axis=(1, 2)).mean() == pytest.approx(0.1, rel=0.03)
    turned = np.roll(clean, 1, axis=0)
    assert (images - turned).var() > noise.var() + 0.05


def test_without_noise_images_are_the_signal_of_variance_one(tmp_path):
    result = run(tmp_path / "out", snr=math.inf, particles=5)
    images = mrcfile.read(result.particles_star.parent / "particles.mrcs")
    assert images.var(axis=(1, 2)).mean() == pytest.approx(1.0, rel=1e-3)
    assert np.abs(images[:, 0, :]).mean() < 0.3 * np.abs(images[:, 16, :]).mean()


def test_the_seed_decides_every_bit_and_the_number_of_particles_none(tmp_path):
    first = run(tmp_path / "a", particles=130, micrographs=1)
    again = run(tmp_path / "b", particles=130, micrographs=1)
    other = run(tmp_path / "c", particles=130, micrographs=1, seed=5)
    for name in ("particles.mrcs", "truth.mrc", "particles.star", "truth.star"):
        one, two = ((result.particles_star.parent / name).read_bytes() for result in (first, again))
        assert one == two
    images = [mrcfile.read(result.particles_star.parent / "particles.mrcs") for result in (first, other)]
    assert abs(np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1]) < 0.1


def test_half_precision_stack(tmp_path):
    single, half = run(tmp_path / "a", particles=9), run(tmp_path / "b", particles=9, dtype="float16")
    images = [mrcfile.read(result.particles_star.parent / "particles.mrcs") for result in (single, half)]
    assert images[1].dtype == np.float16
    np.testing.assert_allclose(images[1], images[0], atol=4e-3)


def test_a_map_is_taken_as_it_is_or_resampled_about_its_centre(tmp_path):
    source = tmp_path / "source.mrc"
    volume = blobs(40, 4.0)[1:, :, 1:]  # neither cubic nor even; its centre (n // 2) is where it was
    mrc.write_map(source, volume, 4.0)
    same = run(tmp_path / "a", str(source), box_px=None, pixel_size_A=None, particles=3)
    assert (same.box_px, same.pixel_size_A) == (40, 4.0)
    for name, box, pixel in (("b", 64, 2.5), ("c", 47, 3.3), ("d", 30, 5.1), ("e", 52, 4.0)):
        result = run(tmp_path / name, str(source), box_px=box, pixel_size_A=pixel, particles=3)
        found, expected = mrc.read_map(result.truth_map), blobs(box, pixel)
        assert found.array.shape == (box,) * 3 and found.voxel_size_A == pytest.approx(pixel)
        assert np.corrcoef(found.array.ravel(), expected.ravel())[0, 1] > 0.9999


def test_a_map_without_a_voxel_size_wants_one(tmp_path):
    source = tmp_path / "source.mrc"
    mrc.write_map(source, blobs(32, 5.0), 0.0)
    with pytest.raises(InputError, match="--pixel-size"):
        run(tmp_path / "out", str(source), pixel_size_A=None)
    assert run(tmp_path / "out", str(source), particles=2).pixel_size_A == 5.0


def test_an_atomic_model_is_centred_in_the_box(tmp_path, shared_data):
    result = run(
        tmp_path / "out", str(shared_data / "models" / "2dhb.pdb"), assembly="1", particles=4, pixel_size_A=3.0
    )
    density = mrc.read_map(result.truth_map).array
    axis = np.arange(32) - 16
    for dimension in range(3):
        others = tuple(a for a in range(3) if a != dimension)
        profile = density.sum(axis=others)
        assert abs(np.sum(axis * profile) / profile.sum()) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "phantom", "box_px": 24, "diameter_A": 150.0}, r"--box \d+"),
        ({"model": "phantom", "symmetry": "X3"}, "X3"),
        ({"model": "absent.pdb"}, "absent.pdb"),
        ({"model": "absent.mrc"}, "absent.mrc"),
    ],
)
def test_bad_models_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"snr": 0.0},
        {"snr": math.nan},
        {"defocus_min_A": 9000.0, "defocus_max_A": 8000.0},
        {"micrographs": 71},
        {"assembly": "1"},
        {"box_px": 3},
        {"colour": "white"},
    ],
)
def test_bad_options_are_refused(tmp_path, options):
    with pytest.raises(ValidationError):
        run(tmp_path / "out", **options)


def test_a_done_run_is_not_done_again(tmp_path):
    first = run(tmp_path / "out", particles=5)
    before = first.truth_map.stat().st_mtime_ns
    with pytest.raises(InputError):
        run(tmp_path / "out", particles=5)
    assert run(tmp_path / "out", particles=5, resume=True) == first
    assert first.truth_map.stat().st_mtime_ns == before
    assert run(tmp_path / "out", particles=6, overwrite=True).particles == 6


def test_a_wrong_defocus_is_in_one_table_and_the_true_one_in_the_other(tmp_path):
    given = {"model": "phantom", "box_px": 32, "pixel_size_A": 4.0, "particles": 400, "seed": 5}
    right = simulate(SimulateOptions(out=tmp_path / "right", **given), progress=lambda *_, **__: None)
    wrong = simulate(
        SimulateOptions(out=tmp_path / "wrong", defocus_error_A=200.0, **given), progress=lambda *_, **__: None
    )
    assert wrong.truth_star.read_bytes() == right.truth_star.read_bytes()
    stacks = [made.particles_star.with_name("particles.mrcs").read_bytes() for made in (right, wrong)]
    assert stacks[0] == stacks[1]
    truth, told = star.read_particles(wrong.truth_star), star.read_particles(wrong.particles_star)
    error = told["defocus_u_A"] - truth["defocus_u_A"]
    np.testing.assert_allclose(told["defocus_v_A"] - truth["defocus_v_A"], error, atol=1e-4)
    assert 170 < error.std() < 230 and abs(error.mean()) < 35


def test_a_foil_has_its_phase_at_nyquist_in_its_direction(tmp_path):
    made = simulate(
        SimulateOptions(
            model="phantom", box_px=32, pixel_size_A=4.0, particles=2, out=tmp_path / "a", trefoil=1.5,
            trefoil_angle_deg=20.0, tetrafoil=0.7, tetrafoil_angle_deg=35.0, anisotropy_percent=2.0,
            anisotropy_angle_deg=30.0,
        ),
        progress=lambda *_, **__: None,
    )  # fmt: skip
    optics = star.read_particles(made.truth_star).optics
    for name, phase, leaves, rad, angle in (
        ("odd_zernike", odd_phase, 3, 1.5, 20.0), ("even_zernike", even_phase, 4, 0.7, 35.0),
    ):  # fmt: skip
        along, across = np.deg2rad([angle, angle + 90 / leaves])
        found = phase(optics[name][0], np.cos([along, across]) / 8, np.sin([along, across]) / 8)
        np.testing.assert_allclose(found, [rad, 0], atol=1e-8)
    direction = np.array([math.cos(math.radians(30)), math.sin(math.radians(30))])
    np.testing.assert_allclose(optics["magnification"][0] @ direction, 1.01 * direction, atol=1e-9)
