"""The particle store: exact round trips, damage, selections, writers that are killed."""

import hashlib
import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dcryo.data import columns, store_writer
from dcryo.data.particles import Particles
from dcryo.data.store import Store, open_store, select
from dcryo.data.store_writer import create, layout
from dcryo.errors import InputError, RunError

BOX_PX = 16
N = 150


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 images a chunk and 32 a shard at box 16, so that a small store has many."""
    monkeypatch.setattr(store_writer, "CHUNK_BYTES", 8 * BOX_PX**2 * 2)
    monkeypatch.setattr(store_writer, "SHARD_BYTES", 32 * BOX_PX**2 * 2)


def noise(n: int = N, seed: int = 1) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(key=seed))
    return rng.standard_normal((n, BOX_PX, BOX_PX), np.float32)


def some_particles(n: int = N) -> Particles:
    rng = np.random.Generator(np.random.Philox(key=2))
    return Particles(
        {
            "image_path": np.array([f"Extract/größe {row % 3}.mrcs" for row in range(n)]),
            "image_index": np.arange(n),
            "optics_row": np.arange(n) % 2,
            "uid": rng.integers(0, 2**64, n, dtype=np.uint64),
            "rotation": rng.standard_normal((n, 3, 3)),
            "origin_A": np.where(rng.random((n, 2)) < 0.1, -0.0, 0.0),
            "half": rng.integers(0, 3, n),
            "log_likelihood": np.where(rng.random(n) < 0.1, np.nan, rng.standard_normal(n)),
        },
        {"pixel_size_A": np.array([1.5, 1.5]), "name": np.array(["one", ""])},
        {"rlnFoo": np.array([f"{row:.3f}" for row in range(n)]), "blob/idx/..": np.full(n, "")},
        {"rlnMtfFileName": np.array(["mtf k2.star", "∞"])},
    )


def make(path: Path, images: np.ndarray, *, scale: float = 1.0, dtype: str = "float16") -> Store:
    writer = create(
        path,
        n_images=len(images) + 7,
        box_px=BOX_PX,
        pixel_size_A=1.5,
        dtype=dtype,
        scale=scale,
    )
    for start in range(0, len(images), writer.shard_images):
        part = images[start : start + writer.shard_images] / np.float32(scale)
        writer.write(part.astype(dtype), {"stop": start + len(part)})
    left_out = [{"row": 3, "image": "000004@größe.mrcs", "reason": "constant"}]
    return writer.finish(some_particles(len(images)), left_out, {"file": "x.star"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make(tmp_path / "s.zarr", noise())


def assert_same(found: Particles, expected: Particles) -> None:
    for part in ("columns", "optics", "extra", "optics_extra"):
        one, other = getattr(found, part), getattr(expected, part)
        assert list(one) == list(other)
        for name in one:
            assert one[name].dtype == other[name].dtype
            # Bytes, so that NaN equals NaN and -0.0 is not 0.0.
            assert one[name].tobytes() == other[name].tobytes(), name


def tree(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file()
    }


def shard(store: Store, number: int) -> Path:
    return store.path / "images" / "c" / str(number) / "0" / "0"


@pytest.mark.parametrize("box_px", [1, 64, 65, 100, 128, 200, 256, 512, 3000])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_layout_follows_from_box_and_type(box_px: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    chunk_images, shard_images = layout(box_px, dtype)
    image_bytes = box_px**2 * np.dtype(dtype).itemsize
    assert shard_images % chunk_images == 0
    assert 4 << 20 < chunk_images * image_bytes <= 8 << 20 or chunk_images == 1
    assert 128 << 20 <= shard_images * image_bytes <= 256 << 20


def test_columns_come_back_bit_for_bit(store: Store) -> None:
    assert_same(store.particles(), some_particles())
    assert store.quarantined == [{"row": 3, "image": "000004@größe.mrcs", "reason": "constant"}]
    assert store.source == {"file": "x.star"}
    assert (store.n, store.box_px, store.pixel_size_A) == (N, BOX_PX, 1.5)
    assert (store.chunk_images, store.shard_images) == (8, 32)


def test_images_come_back_bit_for_bit(tmp_path: Path) -> None:
    images = noise()
    halves = images.astype(np.float16).astype(np.float32)
    assert np.array_equal(make(tmp_path / "f2.zarr", images).read(np.arange(N)).images, halves)
    assert np.array_equal(make(tmp_path / "f4.zarr", images, dtype="float32").read(np.arange(N)).images, images)


@pytest.mark.parametrize("grey", [1e-6, 1.0, 1e6])
def test_scale_leaves_only_the_rounding_of_float16(tmp_path: Path, grey: float) -> None:
    images = noise() * np.float32(grey)
    scale = 2.0 ** np.round(np.log2(grey))
    read = make(tmp_path / "s.zarr", images, scale=scale).read(np.arange(N)).images
    error = np.abs(read - images) / np.abs(images)
    normal = np.abs(images / scale) > 2.0**-14
    assert error[normal].max() <= 2.0**-11
    assert np.sqrt(np.mean(error[normal] ** 2)) < 2.2e-4


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, N - 1), max_size=60))
def test_any_rows_in_any_order(shared_store: Store, rows: list[int]) -> None:
    batch = shared_store.read(rows)
    assert batch.bad == {}
    assert batch.images.dtype == np.float32
    assert np.array_equal(batch.images, noise().astype(np.float16)[rows].astype(np.float32))


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "CHUNK_BYTES", 8 * BOX_PX**2 * 2)
        patch.setattr(store_writer, "SHARD_BYTES", 32 * BOX_PX**2 * 2)
        return make(tmp_path_factory.mktemp("store") / "s.zarr", noise())


@pytest.mark.parametrize("rows", [[-1], [N], [0, 10**9]])
def test_rows_that_are_not_there(store: Store, rows: list[int]) -> None:
    with pytest.raises(IndexError, match="it has 150"):
        store.read(rows)


def test_zarr_alone_reads_the_store(store: Store) -> None:
    """What is on disk is plain Zarr, sharded as documented."""
    group = zarr.open_group(store.path, mode="r", zarr_format=3)
    images = group["images"]
    assert images.shape == (N, BOX_PX, BOX_PX)
    assert (images.chunks[0], images.shards[0], images.dtype) == (8, 32, np.float16)
    assert np.array_equal(images[40:50], noise().astype(np.float16)[40:50])
    assert np.array_equal(group["particles/uid"][:], some_particles()["uid"])
    names = bytes(group["particles/image_path"][:]).decode().split("\0")[:-1]
    assert names == some_particles()["image_path"].tolist()


def test_a_last_shard_is_not_padded(tmp_path: Path) -> None:
    store = make(tmp_path / "s.zarr", noise(33))
    assert shard(store, 0).stat().st_size > 32 * BOX_PX**2 * 2
    assert shard(store, 1).stat().st_size < 9 * BOX_PX**2 * 2


def test_fingerprint_follows_content_alone(tmp_path: Path) -> None:
    images = noise()
    one = make(tmp_path / "one.zarr", images)
    assert make(tmp_path / "two.zarr", images).fingerprint == one.fingerprint
    images[70, 3, 3] += 1
    assert make(tmp_path / "three.zarr", images).fingerprint != one.fingerprint


@pytest.mark.parametrize(("change", "to"), [("half", -1), ("image_path", "x"), ("log_likelihood", 3.0)])
def test_fingerprint_covers_columns(tmp_path: Path, change: str, to: float | str) -> None:
    particles = some_particles()
    values = particles[change].copy()
    values[5] = to
    digests = [
        columns.write_columns(tmp_path / "c", table.columns)
        for table in (particles, particles.replace(**{change: values}))
    ]
    assert digests[0] != digests[1]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 16
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit_of_the_index(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "rows"),
    [
        (flip_a_bit, range(32 + 8, 32 + 16)),
        (cut, range(32, 64)),
        (flip_a_bit_of_the_index, range(32, 64)),
        (empty, range(32, 64)),
        (Path.unlink, range(32, 64)),
    ],
)
def test_damage_marks_its_chunk_and_no_more(store: Store, damage: Callable[[Path], None], rows: range) -> None:
    damage(shard(store, 1))
    order = np.random.Generator(np.random.Philox(key=5)).permutation(N)
    batch = store.read(order)
    expected = noise().astype(np.float16).astype(np.float32)
    expected[rows] = 0
    assert np.array_equal(batch.images, expected[order])
    assert set(order[list(batch.bad)].tolist()) == set(rows)
    assert all("chunk" in reason for reason in batch.bad.values())


def test_a_store_without_images_is_an_error(store: Store) -> None:
    (store.path / "images" / "zarr.json").unlink()
    with pytest.raises(RunError, match="cannot be opened"):
        store.read([0])


def read_sum(store: Store, start: int) -> float:
    return float(store.read(np.arange(start, N, 3)).images.sum(dtype=np.float64))


def test_threads_and_processes_read_alike(store: Store) -> None:
    expected = [read_sum(store, start) for start in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read_sum, [store] * 6, range(6))) == expected
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(read_sum, [store] * 6, range(6))) == expected


def test_a_store_is_small_to_send(store: Store, tmp_path: Path) -> None:
    chosen = select(store, np.arange(100), tmp_path / "sel.zarr")
    for one in (store, chosen):
        assert len(pickle.dumps(one)) < 1000
        assert pickle.loads(pickle.dumps(one)) == one


def test_selection_reads_its_rows(store: Store, tmp_path: Path) -> None:
    rows = np.array([140, 3, 77, 76, 9])
    half = np.array([1, 2, 1, 2, 1])
    chosen = select(store, rows, tmp_path / "deep" / "sel.zarr", {"half": half, "class_number": half})
    assert chosen.n == 5 and chosen.selection == store.path
    assert np.array_equal(chosen.read([4, 0]).images, store.read([9, 140]).images)
    assert_same(chosen.particles(), some_particles().take(rows).replace(half=half, class_number=half))
    assert chosen.quarantined == store.quarantined
    size = sum(file.stat().st_size for file in chosen.path.rglob("*") if file.is_file())
    assert size < 20_000


def test_selection_of_a_selection_points_to_the_store(store: Store, tmp_path: Path) -> None:
    rows = np.arange(10, 60)
    first = select(store, rows, tmp_path / "a.zarr", {"half": np.full(50, 1)})
    second = select(first, [7, 2], tmp_path / "b.zarr", {"origin_A": np.ones((2, 2))})
    assert second.selection == store.path
    assert second.rows().tolist() == [17, 12]
    assert np.array_equal(second.read([0, 1]).images, store.read([17, 12]).images)
    expected = some_particles().take(np.array([17, 12]))
    assert_same(second.particles(), expected.replace(half=np.full(2, 1), origin_A=np.ones((2, 2))))
    shutil.rmtree(first.path)
    assert open_store(second.path) == second


def test_a_selection_may_have_its_own_optics(store: Store, tmp_path: Path) -> None:
    groups = store.particles().n_groups
    tilt = np.linspace(0.1, 0.4, groups)
    first = select(store, np.arange(20), tmp_path / "a.zarr", optics={"beam_tilt_x_mrad": tilt})
    assert first.particles().optics["beam_tilt_x_mrad"].tolist() == tilt.tolist()
    # They go with the particles, unless they are replaced again; and the store keeps its own.
    second = select(first, [3, 5], tmp_path / "b.zarr")
    assert_same(second.particles(), first.particles().take(np.array([3, 5])))
    third = select(second, [1], tmp_path / "c.zarr", optics={"beam_tilt_x_mrad": -tilt, "beam_tilt_y_mrad": tilt})
    assert third.particles().optics["beam_tilt_x_mrad"].tolist() == (-tilt).tolist()
    assert len({first.fingerprint, second.fingerprint, select(store, [3, 5], tmp_path / "d.zarr").fingerprint}) == 3
    assert_same(store.particles(), some_particles())
    with pytest.raises(ValueError, match="shape"):
        select(store, [1], tmp_path / "e.zarr", optics={"beam_tilt_x_mrad": np.zeros(groups + 1)})


def test_empty_selection(store: Store, tmp_path: Path) -> None:
    chosen = select(store, [], tmp_path / "none.zarr")
    assert chosen.n == 0 and len(chosen.particles()) == 0
    assert chosen.read([]).images.shape == (0, BOX_PX, BOX_PX)


def test_selection_moves_with_its_store(store: Store, tmp_path: Path) -> None:
    select(store, [5], tmp_path / "sel.zarr")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("s.zarr", "sel.zarr"):
        (tmp_path / name).rename(moved / name)
    assert np.array_equal(open_store(moved / "sel.zarr").read([0]).images, noise()[5:6].astype(np.float16))


def test_selection_refuses_another_store(store: Store, tmp_path: Path) -> None:
    chosen = select(store, [5], tmp_path / "sel.zarr")
    shutil.rmtree(store.path)
    with pytest.raises(InputError, match="not there"):
        open_store(chosen.path)
    make(store.path, noise(seed=9))
    with pytest.raises(InputError, match="select again"):
        open_store(chosen.path)


def test_selection_refuses_bad_rows(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it has 150"):
        select(store, [N], tmp_path / "sel.zarr")
    with pytest.raises(InputError, match="more than once"):
        select(store, [1, 1], tmp_path / "sel.zarr")
    with pytest.raises(ValueError, match="half"):
        select(store, [1, 2], tmp_path / "sel.zarr", {"half": np.ones(3)})
    with pytest.raises(InputError, match="holds a store"):
        select(store, [1], store.path)
    assert not (tmp_path / "sel.zarr").exists()


def test_what_is_no_store_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a particle store"):
        open_store(tmp_path / "nothing.zarr")
    with pytest.raises(InputError, match="holds a store already"):
        create(store.path, n_images=1, box_px=BOX_PX, pixel_size_A=1.0)
    group = json.loads((store.path / "zarr.json").read_text())
    for change, message in ({"format_version": 99}, "version 99"), ({"scale": None}, "damaged"):
        changed = {**group, "attributes": {**group["attributes"], **change}}
        (store.path / "zarr.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            open_store(store.path)


def test_damaged_columns_are_an_error(store: Store) -> None:
    flip_a_bit(store.path / "particles" / "rotation" / "c" / "0" / "0" / "0")
    with pytest.raises(InputError, match="columns cannot be read"):
        store.particles()


def test_writer_goes_on_where_it_was_stopped(store: Store, tmp_path: Path) -> None:
    """After any number of shards, and with the leftovers of a shard that was not committed."""
    halves = noise().astype(np.float16)
    for done in range(5):
        path = tmp_path / f"{done}.zarr"
        request = {"n_images": N + 7, "box_px": BOX_PX, "pixel_size_A": 1.5}
        writer = create(path, **request)
        for start in range(0, 32 * done, 32):
            writer.write(halves[start : start + 32], {"stop": start + 32})
        leftover = path / "images" / "c" / str(done) / "0"
        leftover.mkdir(parents=True)
        (leftover / "0").write_bytes(b"half a shard")
        (leftover / "0.abc.partial").write_bytes(b"half a shard")
        with pytest.raises(InputError, match="repeat it with --resume"):
            open_store(path)
        with pytest.raises(InputError, match="--resume"):
            create(path, **request)
        with pytest.raises(InputError, match="box_px 16, now 32"):
            create(path, **{**request, "box_px": 32}, resume=True)
        writer = create(path, **request, resume=True)
        assert [note["stop"] for note in writer.notes] == list(range(32, 32 * done + 1, 32))
        for start in range(writer.written, N, 32):
            writer.write(halves[start : start + 32], {"stop": min(N, start + 32)})
        writer.finish(some_particles(), store.quarantined, {"file": "x.star"})
        assert tree(path) == tree(store.path)


def test_writer_refuses_ragged_shards(tmp_path: Path) -> None:
    writer = create(tmp_path / "s.zarr", n_images=N, box_px=BOX_PX, pixel_size_A=1.0)
    writer.write(noise(5).astype(np.float16), {})
    with pytest.raises(ValueError, match="but the last"):
        writer.write(noise(5).astype(np.float16), {})


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.text(st.characters(exclude_characters="\0"), max_size=8), max_size=12),
    names=st.lists(st.text(max_size=6), min_size=1, max_size=4, unique=True),
)
def test_any_text_and_any_label(tmp_path_factory: pytest.TempPathFactory, text: list[str], names: list[str]) -> None:
    path = tmp_path_factory.mktemp("text")
    written = {name: np.array(text, dtype="U8") for name in names}
    columns.write_columns(path, written)
    found = columns.read_columns(path)
    assert list(found) == names
    assert all(np.array_equal(found[name], written[name]) for name in names)


def test_nul_in_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 1"):
        columns.write_columns(tmp_path / "c", {"label": np.array(["a", "b\0c"])})
