from pathlib import Path

import numpy as np
import pytest

from dcryo.data import star
from dcryo.data.classes import TABLE, ClassTable, read_class_table, write_class_table
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.data.store import Store, open_store
from dcryo.data.store_writer import create
from dcryo.errors import InputError, RunError
from dcryo.jobs.select import SelectOptions, select_particles

N = 40


@pytest.fixture
def store(tmp_path: Path) -> Store:
    images = np.random.Generator(np.random.Philox(0)).standard_normal((N, 16, 16)).astype(np.float16)
    writer = create(tmp_path / "all.zarr", n_images=N, box_px=16, pixel_size_A=4.0)
    writer.write(images, {})
    particles = Particles(
        {
            "image_path": np.full(N, "stack.mrcs"),
            "image_index": np.arange(N),
            "optics_row": np.arange(N) % 2,
            "defocus_u_A": 1e4 + 100.0 * np.arange(N),
        },
        {"group": np.array([1, 2]), "voltage_kV": np.array([200.0, 300.0]), "pixel_size_A": np.full(2, 4.0)},
        extra={"rlnFoo": np.arange(N).astype(str), "rlnName": np.array(["odd", "even"])[np.arange(N) % 2]},
    )
    return writer.finish(particles, [], {})


@pytest.fixture
def run(tmp_path: Path, store: Store) -> Path:
    """A finished classification that left out image 3 and knows the others in another order."""
    path = tmp_path / "run"
    order = np.random.Generator(np.random.Philox(1)).permutation(np.delete(np.arange(N), 3))
    particles = store.particles().replace(class_number=1 + np.arange(N) % 3, origin_A=np.arange(2.0 * N).reshape(N, 2))
    flags = np.where(np.arange(N) == 9, "stands out", "")
    particles = Particles(particles.columns, particles.optics, particles.extra | {"dcryoFlag": flags}, {}).take(order)
    with Run.start(path, "class2d", {}, [store.path]) as begun:
        star.write_particles(path / "particles.star", particles, None)
        figures = np.ones(3)
        reason = np.array(["", "an aggregate", ""])
        write_class_table(path / TABLE, ClassTable(np.full(3, 13), *[figures] * 5, reason))
        begun.done({})
    return path


def kept(source: Path, out: Path, **options) -> list[int]:
    result = select_particles(SelectOptions(source=source, out=out, **options))
    assert result.store.n + sum(result.left_out.values()) == result.before
    return sorted(open_store(out).particles()["image_index"].tolist())


def test_classes_are_kept_or_dropped(run: Path, tmp_path: Path) -> None:
    every = set(range(N)) - {3}
    assert kept(run, tmp_path / "a.zarr", classes=(1, 3)) == sorted(i for i in every if i % 3 != 1)
    assert kept(run, tmp_path / "b.zarr", drop=(2,)) == sorted(i for i in every if i % 3 != 1)
    assert kept(run, tmp_path / "c.zarr", classes=(2,)) == sorted(i for i in every if i % 3 == 1)


def test_auto_keeps_good_classes_and_says_why(run: Path, tmp_path: Path) -> None:
    result = select_particles(SelectOptions(source=run, out=tmp_path / "a.zarr", auto=True))
    assert sorted(result.store.particles()["image_index"].tolist()) == [
        i for i in range(N) if i % 3 != 1 and i not in (3, 9)
    ]
    assert result.left_out == {"class: an aggregate": 13, "particle: stands out": 1}
    assert "13 left out: class: an aggregate" in result.summary()


def test_images_are_those_of_the_store_and_what_was_found_is_carried(run: Path, store: Store, tmp_path: Path) -> None:
    chosen = select_particles(SelectOptions(source=run, out=tmp_path / "a.zarr", classes=(1,))).store
    index = chosen.particles()["image_index"]
    np.testing.assert_array_equal(chosen.read(np.arange(chosen.n)).images, store.read(index).images)
    np.testing.assert_array_equal(chosen.particles()["class_number"], np.ones(chosen.n))
    np.testing.assert_array_equal(chosen.particles()["origin_A"][:, 0], 2 * index)
    assert not list((tmp_path / "a.zarr").rglob("images"))


def test_conditions_on_columns_of_any_kind(store: Store, tmp_path: Path) -> None:
    assert kept(store.path, tmp_path / "a.zarr", where=("defocus_u_A < 10500",)) == [0, 1, 2, 3, 4]
    assert kept(store.path, tmp_path / "b.zarr", where=("voltage_kV >= 300", "rlnFoo<6")) == [1, 3, 5]
    assert kept(store.path, tmp_path / "c.zarr", where=("rlnName == 'even'", "rlnFoo != 3", "rlnFoo<=5")) == [1, 5]


def test_a_random_part_is_that_of_the_seed(store: Store, tmp_path: Path) -> None:
    first = kept(store.path, tmp_path / "a.zarr", random=10)
    assert len(set(first)) == 10
    assert kept(store.path, tmp_path / "b.zarr", random=10) == first
    assert kept(store.path, tmp_path / "c.zarr", random=10, seed=1) != first
    assert len(kept(store.path, tmp_path / "d.zarr", random=1000)) == N


def test_what_selections_have_in_common(store: Store, run: Path, tmp_path: Path) -> None:
    kept(store.path, tmp_path / "a.zarr", where=("rlnFoo < 20",))
    kept(store.path, tmp_path / "b.zarr", where=("rlnFoo > 10",))
    common = (tmp_path / "a.zarr", tmp_path / "b.zarr")
    assert kept(store.path, tmp_path / "c.zarr", common=common) == list(range(11, 20))
    assert kept(common[0], tmp_path / "d.zarr", common=common[1:]) == list(range(11, 20))
    assert kept(run, tmp_path / "e.zarr", classes=(1,), common=common) == [12, 15, 18]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"classes": (4,)}, "there is no class 4; the classes are 1 to 3"),
        ({"where": ("rlnBar < 1",)}, "there is no column rlnBar"),
        ({"where": ("rlnFoo",)}, "expected a column, one of"),
        ({"where": ("defocus_u_A < low",)}, "is a number; found 'low'"),
        ({"where": ("rotation == 1",)}, "there is no column rotation"),
    ],
)
def test_what_is_not_there_is_refused(run: Path, tmp_path: Path, options: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        select_particles(SelectOptions(source=run, out=tmp_path / "a.zarr", **options))
    assert not (tmp_path / "a.zarr").exists()


def test_nothing_left_is_an_error(store: Store, run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no particle is left of 40"):
        select_particles(SelectOptions(source=store.path, out=tmp_path / "a.zarr", where=("rlnFoo < 0",)))
    with pytest.raises(InputError, match="have no classes"):
        select_particles(SelectOptions(source=store.path, out=tmp_path / "a.zarr", auto=True))
    (run / TABLE).unlink()
    with pytest.raises(InputError, match="takes a run of class2d"):
        select_particles(SelectOptions(source=run, out=tmp_path / "a.zarr", auto=True))


def test_options_that_exclude_each_other(store: Store) -> None:
    for options in ({}, {"auto": True, "classes": (1,)}, {"drop": (1,), "classes": (1,)}):
        with pytest.raises(ValueError, match=r"exclude each other|nothing says"):
            SelectOptions(source=store.path, out=Path("a.zarr"), **options)


def test_the_table_of_classes_comes_back(run: Path, tmp_path: Path) -> None:
    table = read_class_table(run / TABLE)
    assert table.kept.tolist() == [True, False, True] and table.reason[1] == "an aggregate"
    assert table.particles.tolist() == [13] * 3 and table.rank.tolist() == [1.0] * 3
    with pytest.raises(InputError, match="not a table of classes"):
        read_class_table(run / "particles.star")
