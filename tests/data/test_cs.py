from pathlib import Path

import numpy as np
import pytest
from cryosparc.dataset import Dataset
from scipy.spatial.transform import Rotation

from dcryo import euler
from dcryo.data import cs, star
from dcryo.data.particles import Particles, identities
from dcryo.errors import InputError, RunError

RANDOM = np.random.Generator(np.random.Philox(key=21))


def turn_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angle between rotations; the chord is accurate where the trace is not."""
    return np.rad2deg(2 * np.arcsin(np.linalg.norm(a - b, axis=(1, 2)) / np.sqrt(8)))


def save(path: Path, **fields: np.ndarray) -> Path:
    """A .cs file of the fields, a double underscore for the slash."""
    arrays = {name.replace("__", "/"): np.asarray(values) for name, values in fields.items()}
    n = len(next(iter(arrays.values())))
    rows = np.empty(n, [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()])
    for name, array in arrays.items():
        rows[name] = array
    with path.open("wb") as file:
        np.save(file, rows)
    return path


def basic(n: int = 3) -> dict[str, np.ndarray]:
    return {
        "uid": np.arange(10, 10 + n, dtype="<u8"),
        "blob__path": np.array([b">J1/a.mrc", b"J1/b.mrc", b">J1/a.mrc"][:n]),
        "blob__idx": np.array([0, 5, 2], dtype="<u4")[:n],
        "blob__psize_A": np.full(n, 1.5, "<f4"),
        "blob__shape": np.full((n, 2), 64, "<u4"),
    }


def test_star_and_cs_of_the_same_particles_agree(shared_data: Path) -> None:
    folder = shared_data / "cryodrgn_real"
    ours, theirs = (
        read(folder / f"empiar_10076_7.{ending}")
        for read, ending in ((star.read_particles, "star"), (cs.read_particles, "cs"))
    )
    for name in ("image_path", "image_index"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    for name in ("defocus_u_A", "defocus_v_A", "defocus_angle_deg"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
    for name in ("voltage_kV", "spherical_aberration_mm", "amplitude_contrast", "pixel_size_A"):
        np.testing.assert_allclose(ours.optics[name], theirs.optics[name], rtol=1e-6)
    assert theirs.optics["box_px"].tolist() == [320] and theirs.optics["group"].tolist() == [23]
    # The particles of this stack are dark.
    assert theirs["image_sign"].tolist() == [-1] * 7


def test_poses_are_those_that_cryodrgn_derives(shared_data: Path) -> None:
    """cryoDRGN's conversion of the same file, whose matrices are RELION's; its arrays are taken without unpickling."""
    folder = shared_data / "cryodrgn_real"
    found = cs.read_particles(folder / "cryosparc_P12_J24_001_particles.cs")
    raw = (folder / "pose.cs.pkl").read_bytes()
    arrays = []
    for size in (2019 * 9 * 4, 2019 * 2 * 4):
        start = raw.index(b"B" + size.to_bytes(4, "little")) + 5
        arrays.append(np.frombuffer(raw[start : start + size], "<f4"))
    rotations, shifts = arrays[0].reshape(-1, 3, 3), arrays[1].reshape(-1, 2)
    assert turn_deg(found["rotation"], rotations).max() < 1e-4
    np.testing.assert_allclose(found["origin_A"], shifts * 180 * 2.95, atol=1e-4)
    pose = np.load(folder / "cryosparc_P12_J24_001_particles.cs")["alignments3D/pose"]
    np.testing.assert_allclose(found["rotation"], Rotation.from_rotvec(pose).inv().as_matrix(), atol=1e-6)


def test_conventions_are_converted(tmp_path: Path) -> None:
    path = save(
        tmp_path / "p.cs",
        **basic(),
        ctf__df_angle_rad=np.array([0, np.pi / 2, -np.pi / 4], "<f4"),
        ctf__phase_shift_rad=np.full(3, np.pi / 2, "<f4"),
        alignments3D__shift=np.array([[1, -2], [0, 0], [0.5, 3]], "<f4"),
        alignments3D__psize_A=np.full(3, 6, "<f4"),
        alignments3D__split=np.array([0, 1, 1], "<u4"),
        alignments3D__class=np.array([0, 3, 1], "<u4"),
        location__micrograph_path=np.array([b">m/1.mrc"] * 3),
        location__micrograph_shape=np.full((3, 2), (1000, 4000), "<u4"),
        location__center_x_frac=np.array([0, 0.25, 1], "<f4"),
        location__center_y_frac=np.array([0, 0.25, 1], "<f4"),
        blob__sign=np.array([1, -1, 1], "<f4"),
    )
    found = cs.read_particles(path)
    assert found["image_path"].tolist() == ["J1/a.mrc", "J1/b.mrc", "J1/a.mrc"]
    assert found["micrograph"].tolist() == ["m/1.mrc"] * 3
    assert found["image_index"].tolist() == [0, 5, 2]
    assert found["uid"].tolist() == [10, 11, 12]
    np.testing.assert_allclose(found["defocus_angle_deg"], [0, 90, -45], atol=1e-5)
    np.testing.assert_allclose(found["phase_shift_deg"], 90, atol=1e-5)
    # Pixels of the alignment's own size, not of the image's.
    np.testing.assert_allclose(found["origin_A"], [[6, -12], [0, 0], [3, 18]])
    assert found["half"].tolist() == [1, 2, 2]
    assert found["class_number"].tolist() == [1, 4, 2]
    np.testing.assert_allclose(found["coordinate_px"], [[0, 1000], [1000, 750], [4000, 0]])
    assert found["image_sign"].tolist() == [1, -1, 1]
    assert found.optics["pixel_size_A"].tolist() == [1.5]


def test_what_is_written_is_loaded_by_cryosparc_tools(shared_data: Path, tmp_path: Path) -> None:
    found = star.read_particles(shared_data / "cryodrgn_real" / "relion31.6opticsgroups.star")
    path = tmp_path / "p.cs"
    cs.write_particles(path, found)
    peer = Dataset.load(path)
    assert len(peer) == len(found) == 139
    assert peer["blob/path"][:].tolist() == found["image_path"].tolist()
    np.testing.assert_array_equal(peer["uid"], identities(found))
    np.testing.assert_array_equal(peer["blob/idx"], found["image_index"])
    np.testing.assert_array_equal(peer["blob/shape"], np.full((139, 2), 196))
    np.testing.assert_array_equal(peer["alignments3D/split"], found["half"] - 1)
    np.testing.assert_array_equal(peer["ctf/exp_group_id"], found.optics_of("group"))
    np.testing.assert_allclose(peer["ctf/cs_mm"], found.optics_of("spherical_aberration_mm"))
    np.testing.assert_allclose(peer["ctf/df1_A"], found["defocus_u_A"], rtol=1e-6)
    np.testing.assert_allclose(
        peer["alignments3D/shift"] * peer["alignments3D/psize_A"][:, None], found["origin_A"], atol=1e-4
    )
    assert peer["blob/sign"].tolist() == [1] * 139
    # The slots have every field that cryoSPARC itself writes.
    imported = Dataset.load(shared_data / "cryodrgn_real" / "empiar_10076_7.cs")
    refined = Dataset.load(shared_data / "cryodrgn_real" / "cryosparc_P12_J24_001_particles.cs")
    wanted = {name for name in (*imported.fields(), *refined.fields()) if name != "blob/import_sig"}
    assert wanted <= set(peer.fields())
    for name in wanted:
        source = imported if name in imported.fields() else refined
        assert peer[name].dtype == source[name].dtype and peer[name].shape[1:] == source[name].shape[1:], name
    assert len(Dataset.load(path).innerjoin(peer)) == 139


def test_star_to_cs_to_star_keeps_poses_and_shifts(shared_data: Path, tmp_path: Path) -> None:
    names = [
        "cryodrgn_real/relion31.star",
        "cryodrgn_real/relion5.star",
        "cryodrgn_real/relion31.6opticsgroups.star",
        "cryodrgn_real/empiar_10076_7.star",
        "meta/topaz_empiar10025_particles.star",
        "relion_project_pointmass/relion_proj_batch_pfac2.star",
        "relion_project_70S/rln_proj_65_shifted.star",
        "bgal_empiar10204/derived_relion_poses.star",
    ]
    for name in names:
        first = star.read_particles(shared_data / name)
        cs.write_particles(tmp_path / "p.cs", first)
        star.write_particles(tmp_path / "p.star", cs.read_particles(tmp_path / "p.cs"))
        last = star.read_particles(tmp_path / "p.star")
        for column in ("image_path", "image_index", "half"):
            if column in first:
                np.testing.assert_array_equal(last[column], first[column])
        if "rotation" in first:
            assert turn_deg(first["rotation"], last["rotation"]).max() < 1e-4
        if "origin_A" in first:
            assert np.abs(first["origin_A"] - last["origin_A"]).max() < 1e-3
        if "defocus_u_A" in first:
            np.testing.assert_allclose(last["defocus_u_A"], first["defocus_u_A"], rtol=1e-6)
        for optics in ("voltage_kV", "pixel_size_A", "box_px", "group"):
            if optics in first.optics:
                np.testing.assert_allclose(last.optics_of(optics), first.optics_of(optics), rtol=1e-6)


def test_half_turns_and_no_turn_survive(tmp_path: Path) -> None:
    angles = np.array([[0, 0, 0], [0, 180, 0], [180, 0, 0], [90, 180, 90], [0, 1e-4, 0], [12, 179.9999, 50]], float)
    some = cs.read_particles(save(tmp_path / "p.cs", **basic())).take([0] * len(angles))
    some = some.replace(rotation=euler.matrix_from_euler(*angles.T))
    cs.write_particles(tmp_path / "q.cs", some)
    assert turn_deg(cs.read_particles(tmp_path / "q.cs")["rotation"], some["rotation"]).max() < 1e-4


def test_unknown_fields_come_back_to_the_bit(tmp_path: Path) -> None:
    unknown = {
        "alignments3D__error": RANDOM.normal(size=3).astype("<f4"),
        "ctf__tetra_A": RANDOM.normal(size=(3, 4)).astype("<f4"),
        "ctf__type": np.array([b"ctffind4", b"", b"two words"]),
        "my__matrix": RANDOM.normal(size=(3, 2, 2)) * 10.0 ** RANDOM.integers(-300, 300, (3, 2, 2)),
        "my__flag": np.array([True, False, True]),
        "my__small": np.array([-128, 0, 127], "<i1"),
        "my__half": np.array([0.1, np.nan, -np.inf], "<f2"),
        "my__zero": np.array([0.0, -0.0, 5e-324]),
        "blob__import_sig": np.array([2**64 - 1, 0, 1], "<u8"),
    }
    first = cs.read_particles(save(tmp_path / "p.cs", **basic(), **unknown))
    assert "my/matrix <f8 2 2" in first.extra
    cs.write_particles(tmp_path / "q.cs", first)
    again = np.load(tmp_path / "q.cs")
    for name, values in unknown.items():
        written = again[name.replace("__", "/")]
        assert written.dtype == values.dtype and written.tobytes() == values.tobytes(), name


def test_fields_of_cryosparc_and_of_star_do_not_mix(tmp_path: Path) -> None:
    first = cs.read_particles(save(tmp_path / "p.cs", **basic(), my__field=np.zeros(3)))
    first = Particles(first.columns, first.optics, first.extra | {"rlnFoo": np.array(["1", "2", "3"])})
    cs.write_particles(tmp_path / "q.cs", first)
    assert list(cs.read_particles(tmp_path / "q.cs").extra) == ["my/field <f8", *_completion(tmp_path)]
    star.write_particles(tmp_path / "q.star", first)
    assert list(star.read_particles(tmp_path / "q.star").extra) == ["rlnFoo"]


def _completion(tmp_path: Path) -> list[str]:
    cs.write_particles(tmp_path / "r.cs", cs.read_particles(save(tmp_path / "p.cs", **basic())))
    return list(cs.read_particles(tmp_path / "r.cs").extra)


def test_halves_and_classes_are_written_only_where_all_are_known(tmp_path: Path) -> None:
    some = cs.read_particles(save(tmp_path / "p.cs", **basic()))
    cs.write_particles(
        tmp_path / "q.cs", some.replace(half=[1, 2, 0], class_number=[1, 1, 2], rotation=[np.eye(3)] * 3)
    )
    found = cs.read_particles(tmp_path / "q.cs")
    assert "half" not in found and found["class_number"].tolist() == [1, 1, 2]


def test_passthrough_files_are_joined_on_uid(tmp_path: Path) -> None:
    fields = basic()
    main = save(tmp_path / "main.cs", uid=fields.pop("uid"), ctf__df1_A=np.array([1, 2, 3], "<f4"))
    order = [2, 0, 1]
    more = {name: values[order] for name, values in fields.items()}
    blob = save(tmp_path / "blob.cs", uid=np.array([12, 10, 11], "<u8"), **more, ctf__df1_A=np.zeros(3, "<f4"))
    split = save(tmp_path / "split.cs", uid=np.arange(5, 15, dtype="<u8"), alignments3D__split=np.arange(10) % 2)
    found = cs.read_particles(main, blob, split)
    assert found["image_index"].tolist() == [0, 5, 2]
    assert found["defocus_u_A"].tolist() == [1, 2, 3]
    assert found["half"].tolist() == [2, 1, 2]
    with pytest.raises(InputError, match=r"main\.cs: has no blob/path.*passthrough"):
        cs.read_particles(main)
    fewer = save(tmp_path / "fewer.cs", **{name: values[:2] for name, values in basic().items()})
    with pytest.raises(InputError, match=r"fewer\.cs: lacks 1 particles of .*main\.cs, first uid 12 of row 3"):
        cs.read_particles(main, fewer)
    with pytest.raises(InputError, match=r"bare\.cs: has no uid"):
        cs.read_particles(main, save(tmp_path / "bare.cs", blob__idx=np.zeros(3, "<u4")))


def test_groups_of_optics(tmp_path: Path) -> None:
    fields = basic() | {"ctf__exp_group_id": np.array([7, 2, 7], "<u4")}
    found = cs.read_particles(save(tmp_path / "p.cs", **fields))
    assert found.optics["group"].tolist() == [7, 2] and found["optics_row"].tolist() == [0, 1, 0]
    fields["ctf__exp_group_id"][:] = 4
    fields["ctf__accel_kv"] = np.array([300, 300, 200], "<f4")
    found = cs.read_particles(save(tmp_path / "p.cs", **fields))
    assert found.optics["group"].tolist() == [1, 2] and found["optics_row"].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("blob__psize_A", [1.5, 0, 1.5], r"row 2, blob/psize_A: found 0\.0; expected a number above 0"),
        ("ctf__df1_A", [1, 2, np.nan], r"row 3, ctf/df1_A: found nan; expected a finite number"),
        ("alignments3D__pose", [[0, 0, 0], [0, np.inf, 0], [0, 0, 0]], r"row 2, alignments3D/pose"),
        ("alignments3D__pose", [0, 0, 0], r"alignments3D/pose has .*expected numbers of shape \(3,\)"),
        ("alignments3D__shift", [[0, 0]] * 2 + [[0, -np.inf]], r"row 3, alignments3D/shift"),
        ("alignments3D__split", [0, 1, 2], r"row 3, alignments3D/split: found 2"),
        ("blob__shape", [[64, 64], [64, 65], [64, 64]], r"row 2, blob/shape.*expected a square"),
        ("blob__idx", [0, -1, 2], r"row 2, blob/idx: found -1"),
        ("blob__path", [1, 2, 3], r"blob/path has type int64.*expected text"),
        ("ctf__df1_A", [b"1", b"2", b"3"], r"ctf/df1_A has type.*expected numbers"),
        ("my__words", [[b"a", b"b"]] * 3, r"my/words holds several texts"),
        ("location__micrograph_path", [b"a", b"\xff", b"c"], r"location/micrograph_path.*UTF-8"),
    ],
)
def test_bad_values_are_refused_by_row_and_field(tmp_path: Path, field: str, values: list, message: str) -> None:
    path = save(tmp_path / "bad.cs", **(basic() | {field: np.array(values)}))
    with pytest.raises(InputError, match=r"bad\.cs.*" + message):
        cs.read_particles(path)


def test_what_is_no_cs_file_is_refused(tmp_path: Path, shared_data: Path) -> None:
    whole = (shared_data / "cryodrgn_real" / "empiar_10076_7.cs").read_bytes()
    path = tmp_path / "bad.cs"
    for content, message in (
        (whole[:-1], r"bytes of data; expected 7 rows of 208 bytes"),
        (b"", "begins with b''"),
        (whole[:300], "header"),
        (b"data_particles", "begins with"),
        (b"\x94CSDAT rest", r"stream format; save it with Dataset\.save"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.cs.*" + message):
            cs.read_particles(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(4))
    with pytest.raises(InputError, match="expected a table"):
        cs.read_particles(path)
    with pytest.raises(InputError, match=r"none\.cs: cannot be read"):
        cs.read_particles(tmp_path / "none.cs")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    some = cs.read_particles(save(tmp_path / "p.cs", **basic()))
    with pytest.raises(RunError, match="no particles"):
        cs.write_particles(tmp_path / "q.cs", some.take([]))
    unsized = Particles(some.columns | {"origin_A": np.zeros((3, 2))}, {"box_px": np.array([64])})
    with pytest.raises(InputError, match="pixel_size_A"):
        cs.write_particles(tmp_path / "q.cs", unsized)
    assert not (tmp_path / "q.cs").exists()


def test_a_micrograph_without_size_is_refused(tmp_path: Path) -> None:
    location = {"location__center_x_frac": np.full(3, 0.5), "location__center_y_frac": np.full(3, 0.5)}
    location["location__micrograph_shape"] = np.array([[9, 9], [0, 9], [9, 9]], "<u4")
    with pytest.raises(InputError, match=r"row 2, location/micrograph_shape: found \[0 9\]"):
        cs.read_particles(save(tmp_path / "p.cs", **basic(), **location))
