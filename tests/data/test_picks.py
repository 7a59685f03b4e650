from pathlib import Path

import numpy as np
import pytest

from dcryo.data import star
from dcryo.data.micrographs import write_micrographs
from dcryo.data.particles import Micrographs, Particles
from dcryo.data.picks import read_picks
from dcryo.errors import InputError

GROUPS = {"group": np.array([1, 2]), "micrograph_pixel_size_A": np.array([1.5, 2.0])}


def table(**columns: np.ndarray) -> Micrographs:
    given = {
        "path": np.array(["a.mrc", "b.mrc", "c.mrc"]), "optics_row": np.array([0, 1, 0]),
        "coordinates_path": np.array(["a.star", "b.box", "c.star"]), "defocus_u_A": np.array([1e4, 2e4, 3e4]),
        "ctf_resolution_A": np.array([3.25, 4.0, 5.0]),
    }  # fmt: skip
    return Micrographs(given | columns, GROUPS, {"rlnCtfBfactor": np.array(["0", "10", "20"])})


def particles(**optics: np.ndarray) -> Particles:
    n = 5
    return Particles(
        {
            "image_path": np.full(n, "old.mrcs"), "image_index": np.arange(n), "optics_row": np.array([0, 1, 0, 0, 1]),
            "micrograph": np.array(["c.mrc", "b.mrc", "a.mrc", "c.mrc", "b.mrc"]), "half": np.array([1, 2, 1, 2, 1]),
            "coordinate_px": np.arange(2.0 * n).reshape(n, 2),
        },
        {"group": np.array([1, 2])} | optics,
        {"rlnHelicalTubeID": np.array(["1", "2", "3", "4", "5"])},
        {"rlnCtfDataAreCtfPremultiplied": np.array(["1", "0"]), "rlnMtfFileName": np.array(["m", "n"])},
    )  # fmt: skip


def test_micrographs_with_coordinate_files(tmp_path: Path) -> None:
    write_micrographs(tmp_path / "picks.star", table(flag=np.array(["", "ice", ""])))
    (tmp_path / "b.box").touch()
    picks = read_picks(tmp_path / "picks.star")
    assert [item.micrograph for item in picks.items] == ["a.mrc", "b.mrc", "c.mrc"]
    assert [item.pixel_size_A for item in picks.items] == [1.5, 2.0, 1.5]
    assert [item.flag for item in picks.items] == ["", "ice", ""]
    assert picks.items[1].picks == tmp_path / "b.box" and picks.items[0].picks == Path("a.star")
    assert picks.shared["ctf_bfactor_A2"].tolist() == [0, 10, 20]
    assert picks.shared_extra["rlnCtfMaxResolution"].tolist() == ["3.25", "4", "5"]


def test_particles_are_grouped_by_micrograph_in_the_order_of_their_appearance(tmp_path: Path) -> None:
    write_micrographs(tmp_path / "mics.star", table())
    star.write_particles(tmp_path / "p.star", particles())
    picks = read_picks(tmp_path / "p.star", tmp_path / "mics.star")
    assert [item.micrograph for item in picks.items] == ["c.mrc", "b.mrc", "a.mrc"]
    assert [item.row for item in picks.items] == [2, 1, 0]
    assert picks.items[0].columns["coordinate_px"].tolist() == [[0, 1], [6, 7]]
    assert picks.items[1].columns["half"].tolist() == [2, 1]
    assert picks.items[1].extra["rlnHelicalTubeID"].tolist() == ["2", "5"]
    assert "image_path" not in picks.items[0].columns
    assert picks.optics["micrograph_pixel_size_A"].tolist() == [1.5, 2.0]
    assert list(picks.optics_extra) == ["rlnImageDimensionality", "rlnMtfFileName"]
    own = particles(micrograph_pixel_size_A=np.array([1.1, 1.2]))
    star.write_particles(tmp_path / "p.star", own)
    assert read_picks(tmp_path / "p.star").items[1].pixel_size_A == 1.2


def test_a_changed_pick_or_pixel_changes_the_fingerprint(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.mrc").touch()
    seen = set()
    for change in range(4):
        given = particles(micrograph_pixel_size_A=np.array([1.5, 1.5 + (change == 1)]))
        coordinate = given["coordinate_px"].copy()
        coordinate[1, 0] += change == 2
        star.write_particles(tmp_path / "p.star", given.replace(coordinate_px=coordinate))
        if change == 3:
            (tmp_path / "b.mrc").write_text("other")
        prints = [item.fingerprint() for item in read_picks(tmp_path / "p.star").items]
        seen.add(prints[1])
        assert len(set(prints)) == 3
    assert len(seen) == 4


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    write_micrographs(tmp_path / "mics.star", table())
    star.write_particles(tmp_path / "p.star", particles())
    with pytest.raises(InputError, match=r"no pixel size .* add rlnMicrographPixelSize"):
        read_picks(tmp_path / "p.star")
    with pytest.raises(InputError, match="has the micrographs itself"):
        read_picks(tmp_path / "mics.star", tmp_path / "mics.star")
    mixed = table(optics_row=np.array([0, 1, 1]))
    write_micrographs(tmp_path / "mics.star", mixed)
    with pytest.raises(InputError, match=r"optics group 1 have pixels of 1.5 and 2 A"):
        read_picks(tmp_path / "p.star", tmp_path / "mics.star")
    (tmp_path / "other.star").write_text("data_\n\nloop_\n_rlnMicrographName #1\na.mrc\n")
    with pytest.raises(InputError, match="no table has _rlnMicrographCoordinates"):
        read_picks(tmp_path / "other.star")


def test_real_lists_and_particles_of_relion(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "bgal_empiar10204"
    source = folder / "Extract" / "job009" / "particles.star"
    known = star.read_particles(source)
    names = np.unique(known["micrograph"])
    optics = {"group": np.ones(1), "micrograph_pixel_size_A": np.array([0.885])}
    write_micrographs(tmp_path / "m.star", Micrographs({"path": names, "optics_row": np.zeros(len(names))}, optics))
    picks = read_picks(source, tmp_path / "m.star")
    assert [item.micrograph for item in picks.items] == names.tolist()
    np.testing.assert_array_equal(
        np.concatenate([item.columns["coordinate_px"] for item in picks.items]), known["coordinate_px"]
    )
    listed = read_picks(folder / "AutoPick" / "job008" / "autopick.star", tmp_path / "m.star")
    assert [item.micrograph for item in listed.items] == names.tolist()
