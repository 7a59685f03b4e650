import json
from pathlib import Path

import numpy as np

from dcryo.data.items import ITEMS, Found, Item, arrays_of, commit, committed


def test_what_was_found_comes_back(tmp_path: Path) -> None:
    source = tmp_path / "a.tif"
    source.write_bytes(b"frames")
    item = Item("a", source)
    assert committed(tmp_path, item) is None and arrays_of(tmp_path, "a") == {}
    found = Found({"defocus_u_A": 1.5, "tracks": [[0, 1]]}, {"preview": np.arange(6, dtype=np.float16)}, flag="dim")
    commit(tmp_path, item, found, item.fingerprint())
    back = committed(tmp_path, item)
    assert back is not None and (back.values, back.flag) == (found.values, "dim")
    np.testing.assert_array_equal(arrays_of(tmp_path, "a")["preview"], found.arrays["preview"])


def test_an_item_whose_source_changed_or_whose_record_is_damaged_is_not_done(tmp_path: Path) -> None:
    source = tmp_path / "a.tif"
    source.write_bytes(b"frames")
    item = Item("a", source)
    commit(tmp_path, item, Found({}), item.fingerprint())
    assert committed(tmp_path, item) is not None
    source.write_bytes(b"more frames")
    assert committed(tmp_path, item) is None
    commit(tmp_path, item, Found({}), item.fingerprint())
    record = tmp_path / ITEMS / "a.json"
    for text in ("", "{}", "[]", json.dumps({"fingerprint": item.fingerprint()})):
        record.write_text(text)
        assert committed(tmp_path, item) is None
    source.unlink()
    assert item.fingerprint() == ""


def test_damaged_arrays_are_none(tmp_path: Path) -> None:
    (tmp_path / ITEMS).mkdir()
    (tmp_path / ITEMS / "a.npz").write_bytes(b"PK not a zip")
    assert arrays_of(tmp_path, "a") == {}
