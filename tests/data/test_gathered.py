from pathlib import Path

import numpy as np
import pytest

from dcryo.data import store_writer
from dcryo.data.gathered import Part, gather, rows_of_micrographs
from dcryo.data.particles import Particles
from dcryo.data.store import Store
from dcryo.errors import RunError

BOX = 8


def images(name: str, n: int) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(sum(name.encode())))
    return random.standard_normal((n, BOX, BOX)).astype(np.float16)


class Case:
    """Micrographs of so many images, in a folder."""

    def __init__(self, folder: Path, **counts: int) -> None:
        self.folder, self.counts = folder, counts
        (folder / "items").mkdir(exist_ok=True)
        self.said: list[int] = []

    def say(self, line: str, end: str = "\n") -> None:
        self.said.append(int(line.split()[1]))

    def write(self, *names: str) -> None:
        for name in names:
            (self.folder / "items" / f"{name}.boxes").write_bytes(images(name, self.counts[name]).tobytes())

    def go(self, names: str, defocus_A: float = 1e4, left_out: list[dict] | None = None) -> Store:
        parts = [Part(name, self.counts[name], self.folder / "items" / f"{name}.boxes", name) for name in names]
        micrograph = np.repeat(list(names), [part.n for part in parts])
        n = len(micrograph)
        particles = Particles(
            {
                "image_path": micrograph, "image_index": np.arange(n), "optics_row": np.zeros(n),
                "micrograph": micrograph, "defocus_u_A": np.full(n, defocus_A),
            },
            {"group": np.ones(1), "box_px": np.array([BOX]), "pixel_size_A": np.array([1.5])},
        )  # fmt: skip
        return gather(
            self.folder / "p.zarr",
            self.folder / "items",
            parts,
            particles,
            left_out or [],
            "float16",
            {},
            self.say,
        )

    def expected(self, names: str) -> np.ndarray:
        return np.concatenate([images(name, self.counts[name]) for name in names]).astype(np.float32)


@pytest.fixture
def case(tmp_path: Path, monkeypatch) -> Case:
    monkeypatch.setattr(store_writer, "CHUNK_BYTES", 4 * BOX * BOX)
    monkeypatch.setattr(store_writer, "SHARD_BYTES", 10 * BOX * BOX)
    return Case(tmp_path, a=3, b=17, c=1, d=6)


def check(store: Store, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(store.read(np.arange(store.n)).images, expected)


def test_images_follow_one_another_over_the_borders_of_shards(case: Case) -> None:
    case.write(*"abcd")
    store = case.go("abcd")
    assert store.shard_images == 6 and case.said == [6, 12, 18, 24]
    check(store, case.expected("abcd"))
    assert rows_of_micrographs(store.path) == {"a": (0, 3), "b": (3, 17), "c": (20, 1), "d": (21, 6)}


def test_what_joins_later_goes_where_it_belongs_and_the_rest_is_copied(case: Case, tmp_path: Path) -> None:
    case.write("a", "d")
    case.go("ad")
    for file in (tmp_path / "items").glob("*.boxes"):
        file.unlink()
    case.write("b", "c")
    joined = case.go("abcd")
    check(joined, case.expected("abcd"))
    assert not list((tmp_path / "items").glob("*.zarr"))
    (tmp_path / "whole").mkdir()
    whole = Case(tmp_path / "whole", **case.counts)
    whole.write(*"abcd")
    assert whole.go("abcd").fingerprint == joined.fingerprint


def test_a_store_that_holds_just_these_is_left_and_one_of_other_columns_is_not(case: Case, tmp_path: Path) -> None:
    case.write(*"ab")
    first = case.go("ab")
    for file in (tmp_path / "items").glob("*.boxes"):
        file.unlink()
    case.said.clear()
    assert case.go("ab").fingerprint == first.fingerprint and not case.said
    changed = case.go("ab", defocus_A=2e4)
    assert case.said and changed.fingerprint != first.fingerprint
    assert case.go("ab", 2e4, [{"row": 1, "image": "x", "reason": "y"}]).quarantined
    check(case.go("ba"), case.expected("ba"))


def test_one_that_was_begun_of_others_is_begun_anew(case: Case, tmp_path: Path, monkeypatch) -> None:
    case.write(*"abd")
    monkeypatch.setattr(store_writer.Writer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        case.go("ab")
    monkeypatch.undo()
    monkeypatch.setattr(store_writer, "CHUNK_BYTES", 4 * BOX * BOX)
    monkeypatch.setattr(store_writer, "SHARD_BYTES", 10 * BOX * BOX)
    assert not (tmp_path / "p.zarr").exists()
    check(case.go("abd"), case.expected("abd"))
    assert not list((tmp_path / "items").glob("*.zarr"))


def test_missing_and_damaged_files_are_told(case: Case, tmp_path: Path) -> None:
    case.write("a")
    with pytest.raises(RunError, match=r"b.boxes: is gone"):
        case.go("ab")
    (tmp_path / "items" / "b.boxes").write_bytes(b"short")
    with pytest.raises(RunError, match=r"b.boxes: is damaged"):
        case.go("ab")
