import numpy as np
import pytest

from dcryo.data.particles import Particles, group_optics, identities, numbered
from dcryo.data.schema import FIELDS, MICROGRAPH_FIELDS, OPTICS_FIELDS, PARTICLE_FIELDS, first_refused


def particles(n: int = 5) -> Particles:
    columns = {
        "image_path": np.array(["a.mrcs"] * n),
        "image_index": np.arange(n),
        "optics_row": np.arange(n) % 2,
        "origin_A": np.arange(2.0 * n).reshape(n, 2),
    }
    optics = {"pixel_size_A": np.array([1.0, 2.0])}
    return Particles(columns, optics, {"rlnFoo": np.array([f"{i}" for i in range(n)])})


def test_columns_take_the_types_of_the_schema() -> None:
    some = particles().replace(half=[1, 2, 0, 1, 2])
    assert some["half"].dtype == np.int8
    assert some["optics_row"].dtype == np.int32
    assert some["image_index"].dtype == np.int64


def test_take_by_index_and_by_mask_keeps_rows_together() -> None:
    some = particles()
    by_index = some.take(np.array([4, 0]))
    assert by_index["image_index"].tolist() == [4, 0]
    assert by_index["origin_A"].tolist() == [[8, 9], [0, 1]]
    assert by_index.extra["rlnFoo"].tolist() == ["4", "0"]
    assert by_index.optics_of("pixel_size_A").tolist() == [1, 1]
    by_mask = some.take(some["optics_row"] == 1)
    assert by_mask["image_index"].tolist() == [1, 3]
    assert len(some.take([])) == 0
    with pytest.raises(ValueError, match="mask"):
        some.take(np.ones(3, bool))


def test_replace_leaves_the_original_and_checks() -> None:
    some = particles()
    changed = some.replace(origin_A=np.zeros((5, 2)))
    assert some["origin_A"].any() and not changed["origin_A"].any()
    assert changed.extra is not None and changed.optics["pixel_size_A"].tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"origin_A has shape \(4, 2\)"):
        some.replace(origin_A=np.zeros((4, 2)))
    with pytest.raises(ValueError, match="'shift'"):
        some.replace(shift=np.zeros((5, 2)))
    with pytest.raises(ValueError, match="2 optics groups"):
        some.replace(optics_row=np.full(5, 2))
    with pytest.raises(ValueError, match="box_px"):
        some.replace_optics(box_px=np.array([64]))


def test_required_columns() -> None:
    with pytest.raises(ValueError, match="image_index, optics_row"):
        Particles({"image_path": np.array(["a"])}, {})


def test_identities_follow_the_image_and_not_the_row() -> None:
    some = particles()
    order = np.array([3, 1, 4])
    np.testing.assert_array_equal(identities(some)[order], identities(some.take(order)))
    assert len(np.unique(identities(some))) == 5
    named = some.replace(uid=np.arange(5, dtype=np.uint64) + 2**63)
    np.testing.assert_array_equal(identities(named), np.arange(5, dtype=np.uint64) + 2**63)


def test_optics_groups_by_first_appearance() -> None:
    values = {"voltage_kV": np.array([300.0, 200, 300, 200]), "pixel_size_A": np.array([2.0, 1, 2, 2])}
    optics, rows = group_optics(values, 4)
    assert rows.tolist() == [0, 1, 0, 2]
    assert optics["voltage_kV"].tolist() == [300, 200, 200]
    assert optics["pixel_size_A"].tolist() == [2, 1, 2]
    optics, rows = group_optics({}, 3)
    assert rows.tolist() == [0, 0, 0] and not optics


def test_numbers_of_groups_are_kept_where_they_are_fit() -> None:
    assert numbered({"group": np.array([7, 3])}, 2)["group"].tolist() == [7, 3]
    assert numbered({"group": np.array([0, 1])}, 2)["group"].tolist() == [1, 2]
    assert numbered({"group": np.array([4, 4])}, 2)["group"].tolist() == [1, 2]
    assert numbered({}, 1)["name"].tolist() == ["opticsGroup1"]


def test_a_name_stands_for_one_field_in_each_table_and_format() -> None:
    assert len(PARTICLE_FIELDS) + len(OPTICS_FIELDS) + len(MICROGRAPH_FIELDS) == len(FIELDS)
    for fields, shared in ((PARTICLE_FIELDS, {"rlnImageName"}), (OPTICS_FIELDS, set()), (MICROGRAPH_FIELDS, set())):
        labels = [label for field in fields.values() for label in field.star if label not in shared]
        assert len(labels) == len(set(labels))
        names = [field.cs for field in fields.values() if field.cs]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "values", "row"),
    [
        ("half", [0, 1, 2], None),
        ("half", [1, 3], 1),
        ("half", [1.5, 1], 0),
        ("class_number", [1, 2.0**31], 1),
        ("pixel_size_A", [1, 2, 0], 2),
        ("defocus_u_A", [1, np.inf, np.nan], 1),
        ("log_likelihood", [np.nan], None),
        ("origin_A", [[0, 0], [0, np.nan]], 1),
        ("half", [], None),
    ],
)
def test_what_the_schema_refuses(name: str, values: list[float], row: int | None) -> None:
    field = (PARTICLE_FIELDS | OPTICS_FIELDS)[name]
    assert first_refused(field, np.array(values, dtype=np.float64)) == row
