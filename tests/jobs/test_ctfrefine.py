"""CTF refinement of a small simulated data set with aberrations, from its refinement."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny

from dcryo import cli
from dcryo.data import mrc, star
from dcryo.data.particles import Particles
from dcryo.data.store import open_store
from dcryo.errors import InputError
from dcryo.jobs.ctfrefine import CtfrefineOptions, CtfrefineResult, ctfrefine
from dcryo.jobs.reconstruct import ReconstructOptions, reconstruct
from dcryo.jobs.refine import RefineOptions, refine
from dcryo.jobs.simulate import SimulateOptions, simulate
from dcryo.kernels.fsc import shell_correlation
from dcryo.kernels.randomness import generator
from dcryo.report import write_report

PARTICLES, MICROGRAPHS = 320, 8
FILES = ("particles.star", "phases.mrcs", "micrographs.csv")


@dataclass(frozen=True)
class Given:
    """A refinement of particles whose truth is known."""

    truth: Particles
    truth_map: Path
    run: Path

    def error_A(self, particles: Particles) -> np.ndarray:
        """Error of the mean defocus of each particle."""
        own = self.truth.take(particles["image_index"])
        return sum(particles[name] - own[name] for name in ("defocus_u_A", "defocus_v_A")) / 2

    def ctfrefined(self, out: Path, run: Path | None = None, **options: object) -> CtfrefineResult:
        given = {"run": run or self.run, "workers": 2, "keep_astigmatism": True} | options
        return ctfrefine(CtfrefineOptions(out=out, **given), progress=tiny.quiet)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    made = simulate(
        SimulateOptions(
            model="phantom", symmetry="O", particles=PARTICLES, micrographs=MICROGRAPHS, box_px=56, pixel_size_A=2.0,
            diameter_A=80.0, snr=0.2, seed=4, defocus_scatter_A=150.0, defocus_error_A=300.0, astigmatism_A=100.0,
            beam_tilt_x_mrad=0.9, beam_tilt_y_mrad=-0.6, trefoil=1.2, trefoil_angle_deg=20.0, anisotropy_percent=1.5,
            anisotropy_angle_deg=30.0, shift_sigma_px=1.0, out=folder / "data",
        ),
        progress=tiny.quiet,
    )  # fmt: skip
    tiny.imported(made.particles_star, folder / "data.zarr")
    options = RefineOptions(
        store=folder / "data.zarr", reference=made.truth_map, symmetry="O", mask_diameter_A=90.0, out=folder / "run",
        initial_lowpass_A=20.0, max_iterations=6, workers=2,
    )  # fmt: skip
    refine(options, progress=tiny.quiet)
    return Given(star.read_particles(made.truth_star), made.truth_map, folder / "run")


@pytest.fixture(scope="module")
def refined(given: Given, tmp_path_factory: pytest.TempPathFactory) -> CtfrefineResult:
    return given.ctfrefined(tmp_path_factory.mktemp("refined") / "ctf", magnification=True)


def test_errors_of_defocus_and_aberrations_are_found(given: Given, refined: CtfrefineResult) -> None:
    before = np.median(np.abs(given.error_A(star.read_particles(given.run / "particles.star"))))
    assert before > 150 and np.median(np.abs(given.error_A(refined.particles))) < 0.25 * before
    (group,) = refined.groups
    assert group["beam_tilt_x_mrad"] == pytest.approx(0.9, abs=0.25)
    assert group["beam_tilt_y_mrad"] == pytest.approx(-0.6, abs=0.25)
    assert group["anisotropy_percent"] == pytest.approx(1.5, abs=0.2)
    assert group["anisotropy_angle_deg"] == pytest.approx(30, abs=6)
    found, true = (of.optics["odd_zernike"][0, [2, 5]] for of in (refined.particles, given.truth))
    assert np.linalg.norm(found - true) < 0.35 * np.linalg.norm(true)


def test_the_map_is_better_with_what_was_found(given: Given, refined: CtfrefineResult, tmp_path: Path) -> None:
    """Both from the poses of the refinement, in the store, whose images the door puts right."""
    truth = mrc.read_map(given.truth_map).array
    held = given.ctfrefined(tmp_path / "held", defocus_range_A=1.0, beam_tilt=False, trefoil=False, passes=1)
    agreement = []
    for name, store in (("before", held.store), ("after", refined.store)):
        options = ReconstructOptions(store=store.path, symmetry="O", mask_diameter_A=90.0, out=tmp_path / name)
        half, _ = reconstruct(options, progress=tiny.quiet).half_maps
        agreement.append(shell_correlation(half, truth)[16:27].mean())
    assert 1 - agreement[1] < 0.85 * (1 - agreement[0])


def test_the_selection_and_the_table_say_the_same(refined: CtfrefineResult) -> None:
    in_store = open_store(refined.out / "particles.zarr").particles()
    assert len(in_store) == PARTICLES
    for name in ("defocus_u_A", "defocus_v_A", "rotation", "origin_A", "half", "norm_correction"):
        np.testing.assert_allclose(in_store[name], refined.particles[name], atol=1e-4)
    for name in ("odd_zernike", "beam_tilt_x_mrad", "beam_tilt_y_mrad", "magnification"):
        np.testing.assert_allclose(in_store.optics[name], refined.particles.optics[name], rtol=1e-6, atol=1e-9)
    # Coma is written as beam tilt, and not twice.
    np.testing.assert_allclose(refined.particles.optics["odd_zernike"][0, [3, 4]], 0, atol=1e-9)


@pytest.mark.parametrize("cluster", [{"workers": 1}, {"cluster": "processes", "workers": 2}])
def test_same_bits_on_any_workers(given: Given, refined: CtfrefineResult, tmp_path: Path, cluster: dict) -> None:
    other = given.ctfrefined(tmp_path / "other", magnification=True, **cluster)
    assert tiny.digests(other.out, FILES) == tiny.digests(refined.out, FILES)


def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(
    given: Given, refined: CtfrefineResult, tmp_path: Path
) -> None:
    def interrupting(line: str, /, *, end: str = "\n") -> None:
        if line.startswith("pass 2"):
            raise KeyboardInterrupt

    options = {"run": given.run, "out": tmp_path / "out", "magnification": True, "keep_astigmatism": True, "workers": 2}
    with pytest.raises(KeyboardInterrupt):
        ctfrefine(CtfrefineOptions(**options), progress=interrupting)
    lines: list[str] = []
    again = ctfrefine(CtfrefineOptions(**options, resume=True), progress=lambda line, **_: lines.append(line))
    assert not any(line.startswith("pass 1") for line in lines)
    assert tiny.digests(again.out, FILES) == tiny.digests(refined.out, FILES)
    # And one that is done is read back.
    finished = ctfrefine(CtfrefineOptions(**options, resume=True), progress=tiny.quiet)
    assert finished.groups == refined.groups and len(finished.particles) == PARTICLES


def changed(given: Given, folder: Path, **columns: np.ndarray) -> Path:
    """A copy of the refinement whose table says other things."""
    shutil.copytree(given.run, folder)
    particles = star.read_particles(folder / "particles.star")
    star.write_particles(folder / "particles.star", particles.replace(**columns))
    return folder


def micrograph_of(particles: Particles) -> np.ndarray:
    return np.unique(particles["micrograph"], return_inverse=True)[1]


def test_astigmatism_of_micrographs_is_found(given: Given, tmp_path: Path) -> None:
    """The truth with 200 A of astigmatism taken off each micrograph."""
    particles = star.read_particles(given.run / "particles.star")
    true = given.truth.take(particles["image_index"])
    wrong = {name: true[name] + sign * 200 for name, sign in (("defocus_u_A", -1), ("defocus_v_A", 1))}
    run = changed(given, tmp_path / "run", **wrong, defocus_angle_deg=true["defocus_angle_deg"])

    def vector(of: Particles) -> np.ndarray:
        return (of["defocus_u_A"] - of["defocus_v_A"]) / 2 * np.exp(2j * np.deg2rad(of["defocus_angle_deg"]))

    found = given.ctfrefined(tmp_path / "out", run, astigmatism=True, magnification=True, passes=4).particles
    assert np.median(np.abs(vector(found) - vector(true))) < 60
    of_micrograph = [len(np.unique(vector(found)[micrograph_of(found) == one].round(1))) for one in range(MICROGRAPHS)]
    assert of_micrograph == [1] * MICROGRAPHS
    assert np.median(np.abs(given.error_A(found))) < 60


def test_the_defocus_of_micrographs_moves_as_one(given: Given, tmp_path: Path) -> None:
    particles = star.read_particles(given.run / "particles.star")
    true, number = given.truth.take(particles["image_index"]), micrograph_of(particles)
    error = 300 * generator(5, "micrographs", 0).standard_normal(MICROGRAPHS)[number]
    run = changed(given, tmp_path / "run", **{name: true[name] + error for name in ("defocus_u_A", "defocus_v_A")})
    found = given.ctfrefined(tmp_path / "out", run, defocus="micrograph", passes=2).particles
    change = (found["defocus_u_A"] - true["defocus_u_A"] - error).round(1)
    assert all(np.ptp(change[number == one]) < 0.3 for one in range(MICROGRAPHS))
    assert np.abs(given.error_A(found)).max() < 0.25 * np.abs(error).max()


def test_phase_shifts_and_b_factors_of_micrographs_are_found(given: Given, tmp_path: Path) -> None:
    particles = star.read_particles(given.run / "particles.star")
    true = given.truth.take(particles["image_index"])
    odd = micrograph_of(particles) % 2 == 1
    columns = {name: true[name] for name in ("defocus_u_A", "defocus_v_A", "defocus_angle_deg")}
    wrong = {"phase_shift_deg": np.where(odd, 12.0, 0.0), "ctf_bfactor_A2": np.where(odd, 120.0, 0.0)}
    run = changed(given, tmp_path / "run", **columns, **wrong)
    options = {"phase_shift": True, "bfactor": True, "magnification": True, "defocus": "no", "passes": 6}
    found = given.ctfrefined(tmp_path / "out", run, **options).particles
    assert np.abs(found["phase_shift_deg"]).max() < 4
    apart = found["ctf_bfactor_A2"][odd].mean() - found["ctf_bfactor_A2"][~odd].mean()
    # What all micrographs have in common is the map's, and stays.
    assert abs(apart) < 60 and np.mean(found["ctf_bfactor_A2"]) == pytest.approx(np.mean(wrong["ctf_bfactor_A2"]))


def test_fourth_order_phases_take_turns_with_the_defocus(given: Given, tmp_path: Path) -> None:
    found = given.ctfrefined(tmp_path / "out", fourth_order=True, magnification=True, passes=3)
    assert found.particles.optics["even_zernike"].shape == (1, 9)
    (group,) = found.groups
    assert group["tetrafoil_error_A"] > 0 and group["tetrafoil_A"] < 6 * group["tetrafoil_error_A"]
    assert np.median(np.abs(given.error_A(found.particles))) < 60


def test_a_particle_whose_ctf_is_none_is_left_out(given: Given, tmp_path: Path) -> None:
    scale = star.read_particles(given.run / "particles.star")["ctf_scale"].copy()
    scale[7] = 1e300
    run = changed(given, tmp_path / "run", ctf_scale=scale)
    found = given.ctfrefined(tmp_path / "out", run, passes=1)
    assert len(found.particles) == len(found.store.particles()) == PARTICLES - 1
    assert np.isfinite(found.particles.optics["odd_zernike"]).all()
    (row,) = json.loads((found.out / "run.json").read_text())["quarantined"]
    assert row["row"] == 8 and "its CTF" in row["reason"]


def test_bad_input_is_refused(given: Given, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="nothing to fit"):
        CtfrefineOptions(run=given.run, out=tmp_path / "a", defocus="no", beam_tilt=False, trefoil=False)
    with pytest.raises(InputError, match=r"status is done; expected one of refine"):
        given.ctfrefined(tmp_path / "b", given.run.parent / "data")
    with pytest.raises(InputError, match="say nothing of the CTF"):
        given.ctfrefined(tmp_path / "c", lowest_resolution_A=4.2)
    run = tmp_path / "nameless"
    shutil.copytree(given.run, run)
    text = (run / "particles.star").read_text().replace("_rlnMicrographName", "_rlnMicrographOther")
    (run / "particles.star").write_text(text)
    with pytest.raises(InputError, match="has no rlnMicrographName"):
        given.ctfrefined(tmp_path / "d", run, astigmatism=True)
    assert cli.main(["ctfrefine", str(tmp_path / "nothing"), "--out", str(tmp_path / "e")]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_the_report_shows_all_of_it(refined: CtfrefineResult) -> None:
    page = write_report(refined.out).read_text()
    for title in ("Aberrations", "Phases of optics groups", "Changes of the defocus"):
        assert f">{title}<" in page
    assert "Could not be shown" not in page and "not fitted" in page


@pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="RELION is not installed")
def test_relion_reads_the_table(given: Given, refined: CtfrefineResult, tmp_path: Path) -> None:
    """Its reconstruction with our aberrations agrees better with the truth than without them."""
    truth = mrc.read_map(given.truth_map).array
    data = given.run.parent / "data"
    named = np.array([f"{index + 1:06d}@particles.mrcs" for index in refined.particles["image_index"]])
    blank = {name: value for name, value in refined.particles.optics.items()
             if name not in ("odd_zernike", "beam_tilt_x_mrad", "beam_tilt_y_mrad", "magnification")}  # fmt: skip
    without = Particles(refined.particles.columns, blank)
    agreement = []
    for name, particles in (("with", refined.particles), ("without", without)):
        star.write_particles(data / f"{name}.star", particles, named)
        subprocess.run(
            ["relion_reconstruct", "--i", f"{name}.star", "--o", str(tmp_path / f"{name}.mrc"), "--ctf", "--sym", "O"],
            cwd=data, check=True, capture_output=True,
        )  # fmt: skip
        agreement.append(shell_correlation(mrc.read_map(tmp_path / f"{name}.mrc").array, truth)[16:27].mean())
    assert 1 - agreement[0] < 0.85 * (1 - agreement[1])
