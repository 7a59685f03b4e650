import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import gemmi
import numpy as np
import pytest
import starfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dcryo import euler
from dcryo.data import mrc, star
from dcryo.data.particles import Particles
from dcryo.data.star import Block
from dcryo.errors import InputError, RunError


@pytest.fixture(scope="session")
def relion4_project(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("relion4")
    with tarfile.open(shared_data / "relion4_tutorial_metadata" / "relion_tutorial_files.tar.xz") as archive:
        members = [member for member in archive if member.isfile() and member.name.endswith(".star")]
        archive.extractall(folder, members, filter="data")
    return folder


@pytest.fixture(scope="session")
def star_files(shared_data: Path, relion4_project: Path) -> list[Path]:
    """Every STAR file there is, one of each content: RELION's projects hold each job under two names."""
    paths = sorted([*shared_data.rglob("*.star"), *relion4_project.rglob("*.star")])
    return list({path.read_bytes(): path for path in paths}.values())


@pytest.fixture(scope="session")
def particle_files(star_files: list[Path]) -> list[Path]:
    """Those with images, and few of the large ones, which are alike."""
    found = [path for path in star_files if b"\n_rlnImageName" in path.read_bytes()]
    large = [path for path in found if path.stat().st_size > 300_000]
    return [path for path in found if path not in large[::2]]


def turn_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angle between rotations; the chord is accurate where the trace is not."""
    return np.rad2deg(2 * np.arcsin(np.linalg.norm(a - b, axis=(1, 2)) / np.sqrt(8)))


def test_every_fixture_is_read_as_gemmi_reads_it(star_files: list[Path]) -> None:
    """gemmi, an independent parser, fails on some of RELION's files; where it does not, the values are the same."""
    compared = 0
    for path in star_files:
        if path.name.startswith("coords_suffix_"):  # a file name alone, no STAR
            with pytest.raises(InputError, match="expected data_"):
                star.read_blocks(path)
            continue
        blocks = star.read_blocks(path)
        if path.stat().st_size > 200_000:  # the comparison is slow
            continue
        try:
            peer = gemmi.cif.read_file(str(path))
        except ValueError:
            continue
        assert [block.name.strip() for block in peer] == list(blocks)
        for block in peer:
            columns = {}
            for item in block:
                tags = item.loop.tags if item.loop else [item.pair[0]]
                columns |= {tag[1:]: [value for value in block.find_values(tag)] for tag in tags}
            mine = blocks[block.name.strip()].columns
            assert list(mine) == list(columns)
            for label, values in columns.items():
                # A bare point or question mark has a meaning in crystallography, which RELION's files do not mean.
                theirs = [value if value in (".", "?") else gemmi.cif.as_string(value) for value in values]
                assert mine[label].tolist() == theirs, (path, label)
            compared += 1
    assert compared > 250


def test_every_fixture_survives_writing(star_files: list[Path], tmp_path: Path) -> None:
    for path in star_files[::5]:
        if path.name.startswith("coords_suffix_"):
            continue
        blocks = star.read_blocks(path)
        star.write_blocks(tmp_path / "again.star", blocks)
        again = star.read_blocks(tmp_path / "again.star")
        assert list(again) == list(blocks)
        for name, block in blocks.items():
            assert again[name].is_loop == block.is_loop
            assert list(again[name].columns) == list(block.columns)
            for label, values in block.columns.items():
                np.testing.assert_array_equal(again[name].columns[label], values)


def block_of(tmp_path: Path, text: str) -> dict[str, Block]:
    path = tmp_path / "text.star"
    path.write_text(text)
    return star.read_blocks(path)


def test_words_that_look_like_syntax(tmp_path: Path) -> None:
    blocks = block_of(
        tmp_path,
        "# a remark\ndata_a\n\nloop_\n_x #1\n_y #2\n# between\ndata_1/s.mrcs save_noDW # remark\n_z it's\n"
        "\n'a \"b' \"c's d\"\n\n kk= 1 2 local resolution= 3\n\ndata_b # remark\n_only '' # remark\r\n"
        "data_c\nloop_\n_x\ndata_1\n\ndata_d\nloop_\n_x\n",
    )
    assert list(blocks) == ["a", "b", "c", "d"]
    assert blocks["a"].columns["x"].tolist() == ["data_1/s.mrcs", "_z", 'a "b']
    assert blocks["a"].columns["y"].tolist() == ["save_noDW", "it's", "c's d"]
    assert blocks["b"].columns["only"].tolist() == [""] and not blocks["b"].is_loop
    assert blocks["c"].columns["x"].tolist() == ["data_1"]
    assert len(blocks["d"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data_a\nloop_\n_x\n_y\n1 2\n3\n", r"line 6, in data_a: row 2 has 1 values; expected 2"),
        ("data_a\nloop_\n_x\n_y\n1 2 3\n", r"row 1 has 3 values; expected 2"),
        ("data_a\nloop_\n_x\n_y\n1 2\n\n3\n\n4 5\n", r"line 7.*row 2 has 1 values; expected 2"),
        ("data_a\nloop_\n_x\n1\n_x 2\n", r"line 5.*row 2 has 2 values"),
        ("data_a\nloop_\n_x\n_x\n1 2\n", r"line 4.*label _x once more"),
        ("data_a\n_x 1\n_x 2\n", r"line 3.*label _x once more"),
        ("data_a\n_x 1\nloop_\n_y\n", r"line 3.*one table per block"),
        ("data_a\n_x\n", r"line 2.*a label and its value"),
        ("data_a\n_x 'a b\n", r"line 2.*quote to be closed"),
        ("data_a\n_x 1\ndata_a\n", r"line 3.*second data_a"),
        ("stack.mrcs\n", r"line 1: found b'stack.mrcs\\n'; expected data_"),
        ("\n# nothing\n", r"no data_ block"),
    ],
)
def test_what_is_no_star_file_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=r"text\.star.*" + message):
        block_of(tmp_path, text)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.star"
    path.write_bytes("data_\n_x Müller.mrc\n".encode())
    assert star.read_blocks(path)[""].columns["x"].tolist() == ["Müller.mrc"]
    path.write_bytes("data_\n_x Müller.mrc\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"column _x.*expected UTF-8"):
        star.read_blocks(path)
    path.write_bytes(b"data_\n_x a\0b\n")
    with pytest.raises(InputError, match="NUL"):
        star.read_blocks(path)


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.text(max_size=8), min_size=1, max_size=4), is_loop=st.booleans())
@example(words=["_"], is_loop=True)
@example(words=["loop_"], is_loop=True)
@example(words=["data_"], is_loop=True)
@example(words=["#"], is_loop=True)
def test_any_text_is_read_as_written_or_refused(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], is_loop: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.star"
    columns = {f"x{i}": np.array([word, "1"][: 1 + is_loop]) for i, word in enumerate(words)}
    try:
        star.write_blocks(path, {"a": Block(columns, is_loop)})
    except InputError:
        assert any(character in "\r\n\0\"'" or character > "\ud7ff" for word in words for character in word)
        return
    again = star.read_blocks(path)["a"].columns
    for label, values in columns.items():
        np.testing.assert_array_equal(again[label], values)


def test_particle_files_round_trip(particle_files: list[Path], tmp_path: Path) -> None:
    """Poses to 1e-6 degrees, shifts to 1e-6 A, unknown columns to the letter."""
    read = 0
    for path in particle_files:
        if path.name.endswith("_shiny.star"):  # RELION's intermediate tables without their optics
            with pytest.raises(InputError, match="no data_optics"):
                star.read_particles(path)
            continue
        first = star.read_particles(path)
        star.write_particles(tmp_path / "again.star", first)
        again = star.read_particles(tmp_path / "again.star")
        assert first.columns.keys() == again.columns.keys()
        for name, values in first.columns.items():
            if name == "rotation":
                assert turn_deg(values, again[name]).max() < 1e-6
            elif values.dtype.kind == "f":
                np.testing.assert_allclose(again[name], values, rtol=1e-9, atol=1e-6)
            else:
                np.testing.assert_array_equal(again[name], values)
        for one, other in ((first.extra, again.extra), (first.optics_extra, again.optics_extra)):
            assert one.keys() <= other.keys()
            for label, values in one.items():
                np.testing.assert_array_equal(other[label], values)
        assert first.optics.keys() == again.optics.keys()
        for name, values in first.optics.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(again.optics[name], values, rtol=1e-9)
            else:
                np.testing.assert_array_equal(again.optics[name], values)
        read += 1
    assert read > 20


def test_columns_against_starfile(shared_data: Path) -> None:
    path = shared_data / "cryodrgn_real" / "relion31.6opticsgroups.star"
    peer = starfile.read(path)
    found = star.read_particles(path)
    rows, optics = peer["particles"], peer["optics"]
    np.testing.assert_array_equal(found["defocus_u_A"], rows["rlnDefocusU"])
    np.testing.assert_array_equal(found["origin_A"], rows[["rlnOriginXAngst", "rlnOriginYAngst"]])
    angles = rows[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    np.testing.assert_allclose(found["rotation"], euler.matrix_from_euler(*angles.T), atol=1e-12)
    names = [f"{i + 1:06d}@{p}" for i, p in zip(found["image_index"], found["image_path"], strict=True)]
    assert names == [f"{name:0>{len(own)}}" for name, own in zip(rows["rlnImageName"], names, strict=True)]
    assert len(found.optics["group"]) == 6
    by_group = optics.set_index("rlnOpticsGroup")
    for name, label in (("pixel_size_A", "rlnImagePixelSize"), ("spherical_aberration_mm", "rlnSphericalAberration")):
        np.testing.assert_array_equal(found.optics_of(name), by_group[label][rows["rlnOpticsGroup"]])
    assert found.optics["odd_zernike"].tolist() == [json.loads(word) for word in optics["rlnOddZernike"]]


def test_aberrations_of_relion_4(relion4_project: Path, tmp_path: Path) -> None:
    for job in ("job023", "job024"):
        found = star.read_particles(relion4_project / "CtfRefine" / job / "particles_ctf_refine.star")
        star.write_particles(tmp_path / "again.star", found)
        for particles in (found, star.read_particles(tmp_path / "again.star")):
            optics = particles.optics
            odd = [-0.238192150209, 0.0947790958988, 1.41916848821, 0, 0, -2.16360232922]
            assert optics["odd_zernike"].tolist() == [odd]
            assert optics["even_zernike"].shape == (1, 9) and optics["even_zernike"][0, 2] == -5.86316764036
            assert optics["magnification"].tolist() == [[[1.002162, 0.001487], [0.001382, 0.998993]]]
            assert (optics["beam_tilt_x_mrad"], optics["beam_tilt_y_mrad"]) == (0.025832, -0.21617)
            assert not {"rlnOddZernike", "rlnEvenZernike", "rlnMagMat00"} & particles.optics_extra.keys()


def test_lists_of_different_lengths_end_in_zeros(tmp_path: Path) -> None:
    head = "data_optics\nloop_\n_rlnOpticsGroup\n_rlnOddZernike\n1 [1,2.5]\n2 {}\n3 []\n"
    rows = "data_particles\nloop_\n_rlnImageName\n_rlnOpticsGroup\n1@a.mrcs 1\n"
    path = tmp_path / "a.star"
    path.write_text(head.format("[1,2,3]") + rows)
    assert star.read_particles(path).optics["odd_zernike"].tolist() == [[1, 2.5, 0], [1, 2, 3], [0, 0, 0]]
    for wrong in ("1,2", "[1,x]", "[1,nan]"):
        path.write_text(head.format(wrong) + rows)
        with pytest.raises(InputError, match=r"row 2, _rlnOddZernike"):
            star.read_particles(path)


def test_files_from_before_relion_31(shared_data: Path) -> None:
    found = star.read_particles(shared_data / "meta" / "topaz_empiar10025_particles.star")
    peer = starfile.read(shared_data / "meta" / "topaz_empiar10025_particles.star")
    pixel_A = 3.733333e4 / 38023
    np.testing.assert_allclose(found.optics["pixel_size_A"], [pixel_A])
    assert found.optics["voltage_kV"].tolist() == [300]
    np.testing.assert_allclose(found["origin_A"], peer[["rlnOriginX", "rlnOriginY"]] * pixel_A)
    assert "rlnMagnification" not in found.extra and "rlnGroupName" in found.extra


def test_shifts_in_pixels_and_in_angstrom(shared_data: Path) -> None:
    in_pixels = star.read_particles(shared_data / "relion_project_70S" / "rln_proj_65_shifted.star")
    assert in_pixels["origin_A"].tolist()[:2] == [[6, 10], [10, -5]] and in_pixels.optics["box_px"] == [65]
    both = star.read_particles(shared_data / "relion_project_pointmass" / "relion_proj_batch_pfac2.star")
    np.testing.assert_allclose(both["origin_A"][0], [-11.6962, -4.6162])
    assert "rlnOriginX" not in both.extra


OLD = """data_
loop_
_rlnImageName #1
_rlnVoltage #2
_rlnMagnification #3
_rlnDetectorPixelSize #4
_rlnDefocusU #5
_rlnDefocusV #6
_rlnDefocusAngle #7
_rlnOriginX #8
_rlnOriginY #9
1@a.mrcs 300 50000 7 10000 9000 10 1 -2
2@a.mrcs 300 50000 7 10000 9000 10 1 -2
7@b.mrcs 200 70000 7 10000 9000 10 1 -2
single.mrc 300 50000 7 10000 9000 10 1 -2
"""
NEW = """
# version 30001
data_optics
loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnImagePixelSize #4
_rlnImageSize #5
3 early 300 1.25 64
8 late 200 1.5 80
# version 30001
data_particles
loop_
_rlnImageName #1
_rlnOpticsGroup #2
_rlnAngleRot #3
_rlnAngleTilt #4
_rlnAnglePsi #5
_rlnRandomSubset #6
000002@a.mrcs 8 10 20 30 1
000001@a.mrcs 3 10 20 30 2
000009@b.mrcs 8 10 20 30 2
"""


def particles_of(tmp_path: Path, text: str) -> Particles:
    path = tmp_path / "p.star"
    path.write_text(text)
    return star.read_particles(path)


def test_optics_are_grouped_where_there_is_no_table(tmp_path: Path) -> None:
    found = particles_of(tmp_path, OLD)
    assert found["optics_row"].tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(found.optics["pixel_size_A"], [1.4, 1.0])
    assert found["image_index"].tolist() == [0, 1, 6, 0]
    assert found["image_path"].tolist() == ["a.mrcs", "a.mrcs", "b.mrcs", "single.mrc"]
    np.testing.assert_allclose(found["origin_A"][:3], [[1.4, -2.8], [1.4, -2.8], [1, -2]])


def test_groups_are_found_by_their_number(tmp_path: Path) -> None:
    found = particles_of(tmp_path, NEW)
    assert found["optics_row"].tolist() == [1, 0, 1]
    assert found["image_index"].tolist() == [1, 0, 8]
    assert found.optics_of("box_px").tolist() == [80, 64, 80]
    assert found.optics["name"].tolist() == ["early", "late"]


def test_an_incomplete_set_of_angles_is_no_pose(tmp_path: Path) -> None:
    """RELION extracts picks with rlnAnglePsi alone; read as a pose it would put every view on the pole."""
    text = NEW.replace("_rlnAngleRot", "_rlnAngleRotPrior")
    found = particles_of(tmp_path, text)
    assert "rotation" not in found and found.extra["rlnAnglePsi"].tolist() == ["30"] * 3
    star.write_particles(tmp_path / "out.star", found.replace(rotation=np.broadcast_to(np.eye(3), (3, 3, 3))))
    again = star.read_particles(tmp_path / "out.star")
    np.testing.assert_allclose(again["rotation"], np.broadcast_to(np.eye(3), (3, 3, 3)), atol=1e-12)
    assert "rlnAnglePsi" not in again.extra and "rlnAngleRotPrior" in again.extra


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("000001@a", "000000@a", r"data_particles, row 2, _rlnImageName: found '000000@a\.mrcs'; expected NUMBER@"),
        ("000001@a", "-1@a", r"row 2, _rlnImageName: found '-1@a\.mrcs'"),
        ("000001@a.mrcs", "one@a.mrcs", r"row 2, _rlnImageName: found 'one@a\.mrcs'"),
        ("000001@a.mrcs", "3@", r"row 2, _rlnImageName: found '3@'"),
        ("9@b.mrcs 8", "9@b.mrcs 5", r"row 3, _rlnOpticsGroup: found '5'; expected a group of data_optics, \[3, 8\]"),
        ("8 late", "3 late", r"data_optics, row 2, _rlnOpticsGroup: found '3'; expected each optics group once"),
        ("8 10 20 30 1", "8 nan 20 30 1", r"row 1, _rlnAngleRot: found 'nan'; expected a finite number"),
        ("8 10 20 30 1", "8 10 inf 30 1", r"row 1, _rlnAngleTilt: found 'inf'"),
        ("8 10 20 30 1", "8 10 north 30 1", r"row 1, _rlnAngleTilt: found 'north'; expected a finite number"),
        ("8 10 20 30 2", "8 10 20 30 3", r"row 3, _rlnRandomSubset: found '3'; expected a whole number from 0 to 2"),
        ("1.25 64", "0 64", r"data_optics, row 1, _rlnImagePixelSize: found '0'; expected a number above 0"),
        ("1.25 64", "1.25 64.5", r"data_optics, row 1, _rlnImageSize: found '64.5'; expected a whole number"),
        ("_rlnOpticsGroup #1", "_rlnGroup #1", r"data_optics: has no column _rlnOpticsGroup"),
        ("_rlnOpticsGroup #2", "_rlnGroup #2", r"data_particles: has no column _rlnOpticsGroup"),
        ("data_optics", "data_other", r"has _rlnOpticsGroup, but the file has no data_optics"),
        ("_rlnImageName", "_rlnImage", r"no block has the column _rlnImageName.*found data_optics, data_particles"),
    ],
)
def test_bad_particles_are_refused_by_row(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in NEW
    with pytest.raises(InputError, match=r"p\.star.*" + message):
        particles_of(tmp_path, NEW.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("_rlnOriginY", "_rlnOther", r"has no column _rlnOriginY; add it"),
        ("_rlnMagnification", "_rlnOther", r"pixels of an unknown size.*_rlnDetectorPixelSize"),
        ("2@a.mrcs 300 50000", "2@a.mrcs 300 0", r"row 2, _rlnMagnification: found '0'; expected a number above 0"),
        ("70000 7 10000 9000", "70000 7 x 9000", r"row 3, _rlnDefocusU: found 'x'; expected a finite number"),
    ],
)
def test_bad_old_particles_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in OLD
    with pytest.raises(InputError, match=r"p\.star.*" + message):
        particles_of(tmp_path, OLD.replace(old, new))


def test_a_table_without_particles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows"):
        particles_of(tmp_path, NEW[: NEW.index("000002@")])
    some = particles_of(tmp_path, NEW)
    with pytest.raises(RunError, match="no particles"):
        star.write_particles(tmp_path / "none.star", some.take([]))
    assert not (tmp_path / "none.star").exists()
    with pytest.raises(ValueError, match="2 image names for 3"):
        star.write_particles(tmp_path / "none.star", some, ["1@a", "2@a"])


def needs(program: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@needs("relion_reconstruct")
def test_relion_reads_what_is_written(shared_data: Path, tmp_path: Path) -> None:
    """RELION reconstructs from our stack and STAR what it reconstructs from its own files of the same particles."""
    folder = shared_data / "relion_project_pointmass"
    source = star.read_particles(folder / "relion_proj_batch_pfac2.star")
    images = mrc.open_stack(folder / "relion_proj_batch_pfac2.mrcs").read(source["image_index"])
    order = np.arange(len(source))[::-1]  # the index is honoured, not the order of rows
    with mrc.StackWriter(tmp_path / "ours.mrcs", len(order), 64, 3.54) as writer:
        writer.write(0, images[order])
    names = [f"{row + 1:06d}@ours.mrcs" for row in order.tolist()]
    star.write_particles(tmp_path / "ours.star", source, names)
    (tmp_path / "relion_proj_batch_pfac2.mrcs").symlink_to(folder / "relion_proj_batch_pfac2.mrcs")
    maps = []
    for table in (tmp_path / "ours.star", folder / "relion_proj_batch_pfac2.star"):
        command = ["relion_reconstruct", "--i", str(table), "--o", "map.mrc", "--ctf", "--pad", "1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        maps.append(mrc.read_map(tmp_path / "map.mrc"))
    assert maps[0].voxel_size_A == 3.54
    np.testing.assert_allclose(maps[0].array, maps[1].array, atol=1e-5 * maps[1].array.max())


@needs("relion_refine")
def test_relion_starts_a_refinement(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "relion_project_pointmass"
    source = star.read_particles(folder / "relion_proj_batch_pfac2.star")
    mrc.write_map(tmp_path / "reference.mrc", mrc.read_map(folder / "pointmass.mrc").array, 3.54)
    (tmp_path / "relion_proj_batch_pfac2.mrcs").symlink_to(folder / "relion_proj_batch_pfac2.mrcs")
    star.write_particles(tmp_path / "ours.star", source)
    (tmp_path / "out").mkdir()
    command = "relion_refine --i ours.star --o out/run --ref reference.mrc --ini_high 20 --ctf --iter 1 --K 1 --pad 1"
    command += " --healpix_order 1 --offset_range 2 --offset_step 2 --particle_diameter 200 --dont_check_norm"
    done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(star.read_particles(tmp_path / "out" / "run_it001_data.star")) == len(source)


@needs("relion_star_printtable")
def test_relion_prints_our_columns(tmp_path: Path) -> None:
    star.write_particles(tmp_path / "out.star", particles_of(tmp_path, NEW))
    command = ["relion_star_printtable", "out.star", "data_particles", "_rlnImageName", "_rlnRandomSubset"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["000002@a.mrcs", "1", "000001@a.mrcs", "2", "000009@b.mrcs", "2"]
