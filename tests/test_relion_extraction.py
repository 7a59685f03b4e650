"""Particles that RELION's own program cuts out of the same micrograph at the same places are the same."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny import quiet

from dcryo.data import mrc, star
from dcryo.data.micrographs import read_image, write_micrographs
from dcryo.data.particles import Micrographs, Particles
from dcryo.data.star_syntax import Block, write_blocks
from dcryo.euler import matrix_from_euler
from dcryo.jobs.exchange import ExportOptions, export_particles
from dcryo.jobs.extract import ExtractOptions, ExtractResult, extract

pytestmark = pytest.mark.skipif(shutil.which("relion_preprocess") is None, reason="RELION is not installed")

PIXEL_A, BOX_PX, SHAPE = 1.5, 64, (300, 400)
AGREEMENT = 1e-3
OPTICS = {
    "group": np.ones(1), "name": np.array(["opticsGroup1"]), "micrograph_pixel_size_A": np.array([PIXEL_A]),
    "voltage_kV": np.array([300.0]), "spherical_aberration_mm": np.array([2.7]),
    "amplitude_contrast": np.array([0.1]),
}  # fmt: skip


def write_picks(folder: Path, coordinate: np.ndarray) -> None:
    """Tables for both programs of one micrograph, mics/m.mrc, and its picks."""
    given = {
        "path": np.array(["mics/m.mrc"]), "optics_row": np.zeros(1), "defocus_u_A": np.array([1e4]),
        "defocus_v_A": np.array([9e3]), "defocus_angle_deg": np.array([30.0]),
    }  # fmt: skip
    write_micrographs(folder / "mics.star", Micrographs(given, OPTICS))
    columns = {"rlnCoordinateX": coordinate[:, 0], "rlnCoordinateY": coordinate[:, 1]}
    (folder / "picks" / "mics").mkdir(parents=True)
    write_blocks(folder / "picks" / "mics" / "m_pick.star", {"": Block(columns)})
    listed = {
        "rlnMicrographName": np.array(["mics/m.mrc"]),
        "rlnMicrographCoordinates": np.array(["picks/mics/m_pick.star"]),
    }
    write_blocks(folder / "picks.star", {"coordinate_files": Block(listed)})


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A micrograph with a ramp, a bump and dust, and picks whose boxes lie within and across its edge."""
    folder = tmp_path_factory.mktemp("project")
    random = np.random.Generator(np.random.Philox(1))
    y, x = np.indices(SHAPE)
    image = 3 * random.standard_normal(SHAPE) + 50 + 0.05 * x - 0.03 * y
    image += 5 * np.exp(-((x - 100) ** 2 + (y - 120) ** 2) / 200)
    image[150, 160], image[60, 250] = 150.0, -50.0
    (folder / "mics").mkdir()
    mrc.write_map(folder / "mics" / "m.mrc", image[None].astype(np.float32), PIXEL_A)
    coordinate = np.concatenate(
        [
            random.uniform((33, 33), (366, 266), (20, 2)),
            [[100.5, 120.5], [151.5, 150.5], [245.0, 55.0], [32.0, 32.0], [367.99, 267.99]],
            [[20.0, 150.0], [380.7, 280.2], [3.2, 4.9], [398.5, 298.5]],
        ]
    )
    write_picks(folder, coordinate)
    rows = np.arange(len(coordinate))
    refined = Particles(
        {
            "image_path": np.full(len(rows), "x.mrcs"), "image_index": rows, "optics_row": np.zeros(len(rows)),
            "micrograph": np.full(len(rows), "mics/m.mrc"), "coordinate_px": coordinate,
            "origin_A": random.normal(0, 3, (len(rows), 2)),
            "rotation": matrix_from_euler(*random.uniform(0, 180, (3, len(rows)))),
            "defocus_u_A": 1e4 + rows, "defocus_v_A": 9e3 + rows, "defocus_angle_deg": np.full(len(rows), 30.0),
        },
        OPTICS | {"pixel_size_A": np.array([2 * PIXEL_A]), "box_px": np.array([32])},
    )  # fmt: skip
    star.write_particles(folder / "refined.star", refined.take(rows[:20]))
    return folder


def relions(project: Path, name: str, *words: object) -> tuple[Particles, np.ndarray]:
    """What RELION extracts."""
    command = ["relion_preprocess", "--i", "mics.star", "--extract", "--extract_size", BOX_PX]
    command += ["--part_star", f"relion/{name}.star", "--part_dir", f"relion/{name}/"]
    if "--reextract_data_star" not in words:
        command += ["--coord_dir", "picks", "--coord_suffix", "_pick.star"]
    made = subprocess.run(
        [str(word) for word in (*command, *words)],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    stack = mrc.open_stack(project / "relion" / name / "mics" / "m.mrcs")
    return star.read_particles(project / "relion" / f"{name}.star"), stack.read(np.arange(stack.n))


def ours(project: Path, name: str, picks: str = "picks.star", **options: object) -> tuple[ExtractResult, np.ndarray]:
    given = {"edge": "replicate", "dtype": "float32", "box_px": BOX_PX} | options
    result = extract(
        ExtractOptions(
            picks=project / picks, micrographs=project / "mics.star", out=project / "ours" / name, **given,
        ),
        progress=quiet,
    )  # fmt: skip
    return result, result.store.read(np.arange(result.store.n)).images


def disagreement(first: np.ndarray, second: np.ndarray) -> float:
    """The largest difference of a pixel, in standard deviations of its image."""
    assert first.shape == second.shape
    return float((np.abs(first - second).max(axis=(1, 2)) / second.std(axis=(1, 2))).max())


@pytest.mark.parametrize(
    ("name", "words", "options"),
    [
        ("raw", [], {"normalise": False, "invert": False}),
        ("inverted", ["--invert_contrast"], {"normalise": False}),
        ("normalised", ["--norm", "--bg_radius", 24, "--invert_contrast"], {"background_diameter_A": 48 * PIXEL_A}),
        ("scaled", ["--scale", 32], {"normalise": False, "invert": False, "scale_px": 32}),
        (
            "both",
            ["--scale", 32, "--norm", "--bg_radius", 12, "--invert_contrast"],
            {"scale_px": 32, "background_diameter_A": 48 * PIXEL_A},
        ),
        (
            "odd_ratio",
            ["--scale", 50, "--norm", "--bg_radius", 20, "--invert_contrast"],
            {"scale_px": 50, "background_diameter_A": 40 * BOX_PX / 50 * PIXEL_A},
        ),
    ],
)
def test_images_agree(project: Path, name: str, words: list, options: dict) -> None:
    table, theirs = relions(project, name, *words)
    result, images = ours(project, name, **options)
    assert disagreement(images, theirs) < AGREEMENT
    particles = star.read_particles(result.out / "particles.star")
    # RELION writes six decimals.
    np.testing.assert_allclose(particles["coordinate_px"], table["coordinate_px"], atol=1e-6)
    for label in ("defocus_u_A", "defocus_v_A", "defocus_angle_deg"):
        np.testing.assert_array_equal(particles[label], table[label])
    np.testing.assert_array_equal(particles["micrograph"], table["micrograph"])
    for label in ("pixel_size_A", "box_px", "voltage_kV", "name"):
        np.testing.assert_array_equal(particles.optics[label], table.optics[label])


@pytest.mark.parametrize("kinds", [("white", "black"), ("white",), ("black",)])
def test_the_same_pixels_are_dust(project: Path, kinds: tuple[str, ...]) -> None:
    words = [word for kind in kinds for word in (f"--{kind}_dust", 6)]
    name = "dust_" + "_".join(kinds)
    _, theirs = relions(project, name, "--norm", "--bg_radius", 24, "--invert_contrast", *words)
    given = {"background_diameter_A": 48 * PIXEL_A}
    _, plain = ours(project, f"un{name}", **given)
    _, images = ours(project, name, **given, **{f"{kind}_dust_sd": 6.0 for kind in kinds})
    dusty = np.flatnonzero((np.abs(images - plain) > 1e-6).any(axis=(1, 2)))
    # The contrast is inverted: white dust is dark.
    seen = (plain < -6) & ("white" in kinds) | (plain > 6) & ("black" in kinds)
    np.testing.assert_array_equal(dusty, np.flatnonzero(seen.any(axis=(1, 2))))
    assert len(dusty) >= len(kinds)
    clean = np.setdiff1d(np.arange(len(images)), dusty)
    assert disagreement(images[clean], theirs[clean]) < AGREEMENT
    y, x = np.indices((BOX_PX, BOX_PX))
    for row in dusty:
        # The noise put there is each program's own: where it is in the background, the plane and the deviation differ.
        dust = seen[row]
        assert dust.sum() == 1
        design = np.stack([theirs[row], np.ones_like(x), x, y], axis=-1)[~dust].astype(float)
        fit = np.linalg.lstsq(design, images[row][~dust].astype(float), rcond=None)[0]
        np.testing.assert_allclose(images[row][~dust], design @ fit, atol=AGREEMENT)
        assert fit[0] == pytest.approx(1, abs=0.01) and max(abs(images[row][dust]), abs(theirs[row][dust])) < 6


@pytest.mark.parametrize(
    ("name", "words", "options"),
    [
        ("kept", [], {}),
        ("recentred", ["--recenter"], {"recenter": True}),
        (
            "at",
            ["--recenter", "--recenter_x", 2, "--recenter_y", -3, "--recenter_z", 4, "--ref_angpix", 3],
            {"recenter_at_A": (6.0, -9.0, 12.0)},
        ),
    ],
)
def test_particles_extracted_again_agree(project: Path, name: str, words: list, options: dict) -> None:
    normalised = ["--norm", "--bg_radius", 24, "--invert_contrast"]
    table, theirs = relions(project, f"again_{name}", "--reextract_data_star", "refined.star", *normalised, *words)
    result, images = ours(project, f"again_{name}", "refined.star", background_diameter_A=48 * PIXEL_A, **options)
    particles = star.read_particles(result.out / "particles.star")
    np.testing.assert_allclose(particles["coordinate_px"], table["coordinate_px"], atol=1e-6)
    # Each as far as it is written.
    np.testing.assert_allclose(particles["origin_A"], table["origin_A"], atol=2e-4)
    np.testing.assert_allclose(particles["rotation"], table["rotation"], atol=1e-6)
    np.testing.assert_array_equal(particles["defocus_u_A"], table["defocus_u_A"])
    assert disagreement(images, theirs) < AGREEMENT


def test_relion_reads_what_is_exported(project: Path) -> None:
    result, images = ours(project, "exported", background_diameter_A=48 * PIXEL_A)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        export_particles(ExportOptions(source=result.store.path, out=Path("e.star"), stack=True), progress=quiet)
    made = subprocess.run(
        ["relion_stack_create", "--i", "e.star", "--o", "again"], cwd=project, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    stack = mrc.open_stack(project / "again.mrcs")
    np.testing.assert_allclose(stack.read(np.arange(stack.n)), images, atol=1e-5)


def test_a_real_micrograph_agrees(shared_data: Path, tmp_path: Path) -> None:
    source = sorted((shared_data / "apof_empiar10146" / "avg").glob("*.png"))[0]
    labels = sorted((shared_data / "apof_empiar10146" / "gt_xy").iterdir())[0]
    (tmp_path / "mics").mkdir()
    mrc.write_map(tmp_path / "mics" / "m.mrc", read_image(source)[None], PIXEL_A)
    x, y = np.loadtxt(labels, ndmin=2).T[:2]
    write_picks(tmp_path, np.stack([x, y], axis=1))
    words = ["--scale", 48, "--norm", "--bg_radius", 18, "--invert_contrast"]
    _, theirs = relions(tmp_path, "real", *words)
    _, images = ours(tmp_path, "real", scale_px=48, background_diameter_A=36 * BOX_PX / 48 * PIXEL_A)
    assert len(images) > 20
    assert disagreement(images, theirs) < AGREEMENT
