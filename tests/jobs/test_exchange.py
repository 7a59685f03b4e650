"""Import, export and info: real and broken stacks, interruptions, and the way back."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcryo.data import cs, mrc, stacks, star, store_writer
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.data.store import open_store, select
from dcryo.errors import InputError, RunError
from dcryo.jobs import exchange
from dcryo.jobs.exchange import (
    ExportOptions,
    ExportResult,
    ImportOptions,
    ImportResult,
    InfoOptions,
    describe,
    export_particles,
    import_particles,
)

BOX_PX = 16


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 images a chunk and 32 a shard at box 16, so that a small store has many."""
    monkeypatch.setattr(store_writer, "CHUNK_BYTES", 8 * BOX_PX**2 * 2)
    monkeypatch.setattr(store_writer, "SHARD_BYTES", 32 * BOX_PX**2 * 2)


def quiet(line: str, /, *, end: str = "\n") -> None:
    pass


def bring(source: Path, out: Path, **options: Any) -> ImportResult:
    return import_particles(ImportOptions(source=source, out=out, **options), progress=quiet)


def export(source: Path, out: Path, **options: Any) -> ExportResult:
    return export_particles(ExportOptions(source=source, out=out, **options), progress=quiet)


def info(path: Path) -> dict[str, str]:
    return dict(describe(InfoOptions(path=path), progress=quiet).lines)


def noise(n: int, seed: int = 1, box_px: int = BOX_PX) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(key=seed))
    return rng.standard_normal((n, box_px, box_px), np.float32).astype(np.float16).astype(np.float32)


def write_stack(path: Path, images: np.ndarray, dtype: str = "float16") -> None:
    """A stack of anything, also of what `StackWriter` refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrc.StackWriter(path, len(images), images.shape[1], 1.5, dtype) as writer:
        writer.write(0, np.nan_to_num(images, posinf=0, neginf=0))
    with path.open("r+b") as file:
        file.seek(mrc.HEADER_BYTES)
        file.write(images.astype(dtype).tobytes())


def write_star(path: Path, images: Iterable[tuple[str, int]], **columns: np.ndarray) -> Particles:
    """A STAR file of (stack, index from 0), with optics and whatever columns."""
    names, indices = zip(*images, strict=True)
    n = len(names)
    optics = {
        "name": np.array(["opticsGroup1"]),
        "group": np.array([1]),
        "voltage_kV": np.array([300.0]),
        "spherical_aberration_mm": np.array([2.7]),
        "amplitude_contrast": np.array([0.1]),
        "pixel_size_A": np.array([1.5]),
        "box_px": np.array([BOX_PX]),
    }
    own = {
        "image_path": np.array(names),
        "image_index": np.array(indices),
        "optics_row": np.zeros(n, np.int32),
    }
    particles = Particles(own | columns, optics, {"rlnFoo": np.array([f"a{row}" for row in range(n)])}, {})
    star.write_particles(path, particles)
    return particles


def project(folder: Path, n: int = 150, shuffle: int | None = 3) -> tuple[Path, np.ndarray]:
    """A RELION project of three stacks; a STAR file in a job's directory, in any order, and its rows'
    images."""
    images = noise(3 * n).reshape(3, n, BOX_PX, BOX_PX)
    for number in range(3):
        write_stack(folder / "Extract" / f"mic {number}.mrcs", images[number])
    rows = np.arange(n)
    if shuffle is not None:
        rows = np.random.Generator(np.random.Philox(key=shuffle)).permutation(3 * n)[:n]
    source = folder / "Refine" / "job001" / "particles.star"
    source.parent.mkdir(parents=True)
    write_star(source, [(f"Extract/mic {row // n}.mrcs", row % n) for row in rows.tolist()])
    return source, images.reshape(-1, BOX_PX, BOX_PX)[rows]


def tree(path: Path) -> dict[str, str]:
    """Digests of a store's files, but for the record of the run, which has dates."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and file.name not in ("run.json", ".lock")
    }


def test_rows_keep_their_order_and_index(tmp_path: Path) -> None:
    source, images = project(tmp_path)
    result = bring(source, tmp_path / "s.zarr")
    assert result.quarantined == []
    assert np.array_equal(result.store.read(np.arange(150)).images, images)
    found, expected = result.store.particles(), star.read_particles(source)
    for part in ("columns", "optics", "extra", "optics_extra"):
        one, other = getattr(found, part), getattr(expected, part)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in other)
    record = Run.open(tmp_path / "s.zarr").record
    assert record["status"] == "done"
    assert record["result"] == {"particles": 150, "quarantined": 0}


def test_halves_are_not_made_up(tmp_path: Path) -> None:
    source, _ = project(tmp_path)
    assert "half" not in bring(source, tmp_path / "s.zarr").store.particles()


def test_root_is_where_stacks_are_looked_for(tmp_path: Path) -> None:
    source, images = project(tmp_path / "project")
    moved = tmp_path / "elsewhere.star"
    source.rename(moved)
    with pytest.raises(InputError, match=r"row 1 and \d+ more: stack 'Extract/mic \d.mrcs' is not there"):
        bring(moved, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
    store = bring(moved, tmp_path / "s.zarr", root=tmp_path / "project").store
    assert np.array_equal(store.read(np.arange(150)).images, images)


def broken_project(folder: Path) -> tuple[Path, np.ndarray, dict[int, str]]:
    """A STAR file of stacks with every defect: rows, their images, and row -> what the reason says."""
    images = noise(100)
    images[[3, 40], 5, 5] = np.nan
    images[7, 0, 0] = np.inf
    images[8, 1, 2] = -np.inf
    images[9] = 4.5
    images[10] = 0
    images[11] = np.nan
    write_stack(folder / "defects.mrcs", images)
    write_stack(folder / "cut.mrcs", noise(20, 2))
    whole = (folder / "cut.mrcs").read_bytes()
    (folder / "cut.mrcs").write_bytes(whole[: mrc.HEADER_BYTES + 15 * BOX_PX**2 * 2 + 77])
    (folder / "garbage.mrcs").write_bytes(bytes(range(256)) * 40)
    rows = [("defects.mrcs", index) for index in range(100)]
    rows += [("cut.mrcs", index) for index in range(20)] + [("garbage.mrcs", 0)]
    write_star(folder / "p.star", rows)
    reasons = {3: "1 pixels are NaN", 40: "1 pixels are NaN", 7: "infinite", 8: "infinite", 9: "constant"}
    reasons |= {10: "constant", 11: "256 pixels are NaN", 120: "garbage.mrcs"}
    reasons |= {100 + index: "truncated: it has 15 of 20" for index in range(15, 20)}
    return folder / "p.star", np.concatenate([images, noise(20, 2), np.zeros((1, BOX_PX, BOX_PX))]), reasons


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bad_images_are_left_out_and_named(tmp_path: Path, dtype: str) -> None:
    source, images, reasons = broken_project(tmp_path)
    result = bring(source, tmp_path / "s.zarr", dtype=dtype)
    good = [row for row in range(len(images)) if row not in reasons]
    assert np.array_equal(result.store.read(np.arange(result.store.n)).images, images[good])
    assert result.store.particles().extra["rlnFoo"].tolist() == [f"a{row}" for row in good]
    assert [left["row"] - 1 for left in result.quarantined] == sorted(reasons)
    for left in result.quarantined:
        assert reasons[left["row"] - 1] in left["reason"]
    assert result.quarantined[0]["image"] == "000004@defects.mrcs"
    assert Run.open(result.store.path).record["quarantined"] == result.quarantined
    assert "13 rows of the source left out" in result.summary()
    assert "row 4 and 1 more: 1 pixels are NaN" in result.summary()


def test_a_shard_of_bad_images_costs_only_them(tmp_path: Path) -> None:
    images = noise(140)
    images[20:110] = 7
    write_stack(tmp_path / "s.mrcs", images)
    write_star(tmp_path / "p.star", [("s.mrcs", row) for row in range(140)])
    store = bring(tmp_path / "p.star", tmp_path / "s.zarr").store
    assert np.array_equal(store.read(np.arange(50)).images, images[[*range(20), *range(110, 140)]])


def test_nothing_good_is_an_error(tmp_path: Path) -> None:
    write_stack(tmp_path / "s.mrcs", np.ones((40, BOX_PX, BOX_PX), np.float32))
    write_star(tmp_path / "p.star", [("s.mrcs", row) for row in range(40)])
    with pytest.raises(RunError, match="none of 40 images is good; the first: constant"):
        bring(tmp_path / "p.star", tmp_path / "s.zarr")
    (tmp_path / "s.mrcs").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match="none of its 40 images can be read"):
        bring(tmp_path / "p.star", tmp_path / "t.zarr")


def test_missing_images_are_refused_or_skipped(tmp_path: Path) -> None:
    write_stack(tmp_path / "s.mrcs", noise(10))
    rows = [("s.mrcs", 0), ("s.mrcs", 10), ("gone.mrcs", 3), ("s.mrcs", 9), ("gone.mrcs", 4)]
    write_star(tmp_path / "p.star", rows)
    with pytest.raises(InputError) as error:
        bring(tmp_path / "p.star", tmp_path / "s.zarr")
    message = str(error.value)
    assert "p.star: 3 of its rows" in message
    assert f"row 2: image 11 of {tmp_path / 's.mrcs'}, which has 10" in message
    assert "row 3 and 1 more: stack 'gone.mrcs' is not there" in message
    assert not (tmp_path / "s.zarr").exists()
    result = bring(tmp_path / "p.star", tmp_path / "s.zarr", skip_missing=True)
    assert [left["row"] for left in result.quarantined] == [2, 3, 5]
    assert np.array_equal(result.store.read([0, 1]).images, noise(10)[[0, 9]])


def test_sizes_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    write_stack(tmp_path / "a.mrcs", noise(3))
    write_stack(tmp_path / "b.mrcs", noise(3, box_px=20))
    particles = write_star(tmp_path / "p.star", [("a.mrcs", 0), ("b.mrcs", 1)])
    with pytest.raises(InputError, match=r"row 2: its optics group says images of 16 pixels, but .*b.mrcs have 20"):
        bring(tmp_path / "p.star", tmp_path / "s.zarr")
    optics = {name: np.repeat(values, 2) for name, values in particles.optics.items()}
    optics |= {"box_px": np.array([16, 20]), "group": np.array([1, 2])}
    columns = particles.columns | {"optics_row": np.array([0, 1])}
    star.write_particles(tmp_path / "p.star", Particles(columns, optics, {}, {}))
    with pytest.raises(InputError, match="a store holds one size"):
        bring(tmp_path / "p.star", tmp_path / "s.zarr")
    (tmp_path / "b.mrcs").write_bytes(np.array([16, 8, 6], "<i4").tobytes() + (tmp_path / "a.mrcs").read_bytes()[12:])
    with pytest.raises(InputError, match="16 x 8 pixels; dcryo needs square"):
        bring(tmp_path / "p.star", tmp_path / "s.zarr")


def test_pixel_sizes_may_differ_between_groups(tmp_path: Path) -> None:
    write_stack(tmp_path / "a.mrcs", noise(2))
    particles = write_star(tmp_path / "p.star", [("a.mrcs", 0), ("a.mrcs", 1)])
    optics = {name: np.repeat(values, 2) for name, values in particles.optics.items()}
    optics |= {"pixel_size_A": np.array([1.24, 1.25]), "group": np.array([1, 2])}
    columns = particles.columns | {"optics_row": np.array([0, 1])}
    star.write_particles(tmp_path / "p.star", Particles(columns, optics, {}, {}))
    said: list[str] = []
    options = ImportOptions(source=tmp_path / "p.star", out=tmp_path / "s.zarr")
    import_particles(options, progress=lambda line, end="\n": said.append(line))
    assert "optics groups differ in pixel size: 1.24 A, 1.25 A" in said
    assert open_store(tmp_path / "s.zarr").particles().optics_of("pixel_size_A").tolist() == [1.24, 1.25]


def test_pixel_size_and_box_of_the_stack_fill_in(tmp_path: Path) -> None:
    write_stack(tmp_path / "a.mrcs", noise(2))
    text = "data_\n\nloop_\n_rlnImageName #1\n_rlnDefocusU #2\n1@a.mrcs 10000\n2@a.mrcs 11000\n"
    (tmp_path / "p.star").write_text(text)
    optics = bring(tmp_path / "p.star", tmp_path / "s.zarr").store.particles().optics
    assert (optics["pixel_size_A"].tolist(), optics["box_px"].tolist()) == ([1.5], [BOX_PX])
    with (tmp_path / "a.mrcs").open("r+b") as file:
        file.seek(40)
        file.write(bytes(12))
    with pytest.raises(InputError, match="says no pixel size"):
        bring(tmp_path / "p.star", tmp_path / "t.zarr")


def test_what_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    write_stack(tmp_path / "a.mrcs", noise(2))
    write_star(tmp_path / "p.star", [("a.mrcs", 0)])
    with pytest.raises(InputError, match=r"ends in \.zarr"):
        bring(tmp_path / "p.star", tmp_path / "store")
    with pytest.raises(InputError, match=r"not a STAR or \.cs file"):
        bring(tmp_path / "a.mrcs", tmp_path / "s.zarr")
    with pytest.raises(InputError, match=r"goes with a \.cs file"):
        bring(tmp_path / "p.star", tmp_path / "s.zarr", passthrough=(tmp_path / "x.cs",))
    with pytest.raises(InputError, match=r"gone\.star"):
        bring(tmp_path / "gone.star", tmp_path / "s.zarr")
    (tmp_path / "empty.star").write_text("data_particles\n\nloop_\n_rlnImageName #1\n_rlnPixelSize #2\n")
    with pytest.raises(InputError, match="has no rows"):
        bring(tmp_path / "empty.star", tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(("grey", "scale"), [(1.0, 1.0), (3e5, 2.0**18), (1e-7, 2.0**-23)])
def test_scale_fits_the_grey_values(tmp_path: Path, grey: float, scale: float) -> None:
    images = noise(40) * np.float32(grey)
    write_stack(tmp_path / "a.mrcs", images, "float32")
    write_star(tmp_path / "p.star", [("a.mrcs", row) for row in range(40)])
    store = bring(tmp_path / "p.star", tmp_path / "s.zarr").store
    assert store.scale == scale
    error = (store.read(np.arange(40)).images - images) / grey
    assert np.sqrt(np.mean(error**2)) < 2.5e-4
    assert bring(tmp_path / "p.star", tmp_path / "t.zarr", dtype="float32").store.scale == 1.0


def test_float16_is_refused_where_it_would_lose_the_picture(tmp_path: Path) -> None:
    write_stack(tmp_path / "a.mrcs", noise(40) + 1000, "float32")
    write_star(tmp_path / "p.star", [("a.mrcs", row) for row in range(40)])
    with pytest.raises(InputError, match=r"mean is 1\d\d\d times .* --dtype float32"):
        bring(tmp_path / "p.star", tmp_path / "s.zarr")
    store = bring(tmp_path / "p.star", tmp_path / "s.zarr", dtype="float32").store
    assert np.array_equal(store.read(np.arange(40)).images, noise(40) + 1000)


def test_images_that_do_not_fit_the_others_are_named() -> None:
    images = noise(4)
    images[1] *= 1e-5
    images[2] += 3000
    images[3, 0, 0] = 1e6
    assert stacks.defects(images, "float32") == {}
    found = stacks.defects(images, "float16", 2.0)
    assert sorted(found) == [1, 2, 3]
    assert all("float16" in reason for reason in found.values())
    assert "1e+06 is too large" in found[3]


def test_a_store_is_not_replaced_unasked(tmp_path: Path) -> None:
    source, _ = project(tmp_path)
    first = bring(source, tmp_path / "s.zarr").store
    before = tree(first.path)
    with pytest.raises(InputError, match="--overwrite"):
        bring(source, first.path)
    assert bring(source, first.path, resume=True).store == first
    assert tree(first.path) == before
    write_stack(tmp_path / "a.mrcs", noise(5))
    write_star(tmp_path / "p.star", [("a.mrcs", row) for row in range(5)])
    with pytest.raises(InputError, match="not the same run"):
        bring(tmp_path / "p.star", first.path, resume=True)
    assert bring(tmp_path / "p.star", first.path, overwrite=True).store.n == 5
    assert not (first.path / "images" / "c" / "1").exists()


def import_and_be_killed(source: Path, out: Path, delay_s: float) -> None:
    def create_and_wait_for_death(*arguments: Any, **options: Any) -> store_writer.Writer:
        threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return store_writer.create(*arguments, **options)

    exchange.create = create_and_wait_for_death
    bring(source, out, resume=True)
    os._exit(0)


def test_import_killed_at_any_moment_resumes_to_the_same_bits(tmp_path: Path) -> None:
    source, _ = project(tmp_path, n=800)
    broken = noise(800)
    broken[::17] = 1
    write_stack(tmp_path / "Extract" / "mic 1.mrcs", broken)
    whole = bring(source, tmp_path / "whole.zarr")
    assert len(whole.quarantined) > 10
    rng = np.random.Generator(np.random.Philox(key=11))
    out = tmp_path / "killed.zarr"
    kills = 0
    for delay_s in rng.uniform(0.0, 0.15, 6).tolist():
        arguments = (source, out, delay_s)
        process = multiprocessing.get_context("fork").Process(target=import_and_be_killed, args=arguments)
        process.start()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    assert kills > 0
    result = bring(source, out, resume=True)
    assert result.quarantined == whole.quarantined
    assert tree(out) == tree(whole.store.path)
    assert Run.open(out).record["status"] == "done"


def test_resume_refuses_changed_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = project(tmp_path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_writer.Writer, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            bring(source, tmp_path / "s.zarr")
    assert Run.open(tmp_path / "s.zarr").record["error"] == "interrupted"
    with pytest.raises(InputError, match="--resume"):
        info(tmp_path / "s.zarr")
    write_stack(tmp_path / "Extract" / "mic 0.mrcs", noise(151))
    with pytest.raises(InputError, match="origin"):
        bring(source, tmp_path / "s.zarr", resume=True)


def test_a_stack_larger_than_memory_goes_through(tmp_path: Path) -> None:
    """128 MiB of images, 256 as they are read, with 96 MiB to allocate."""
    n, piece = 4096, noise(64, box_px=128)
    write_stack(tmp_path / "a.mrcs", piece[:1])
    with (tmp_path / "a.mrcs").open("r+b") as file:
        file.seek(8)
        file.write(np.int32(n).tobytes())
        file.seek(mrc.HEADER_BYTES)
        file.writelines([piece.astype(np.float16).tobytes()] * (n // 64))
    source = tmp_path / "p.star"
    source.write_text("data_\n\nloop_\n_rlnImageName #1\n" + "".join(f"{row + 1}@a.mrcs\n" for row in range(n)))
    program = textwrap.dedent(
        """
        import re, resource, sys
        from pathlib import Path
        from dcryo.data import store_writer
        from dcryo.jobs.exchange import ImportOptions, import_particles

        store_writer.CHUNK_BYTES, store_writer.SHARD_BYTES = 1 << 20, 16 << 20
        held = int(re.search(r"VmData:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (held + (96 << 20),) * 2)
        import_particles(ImportOptions(source=sys.argv[1], out=sys.argv[2]))
        """
    )
    out = tmp_path / "s.zarr"
    done = subprocess.run([sys.executable, "-c", program, source, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4096 of 4096" in done.stdout
    store = open_store(out)
    assert np.array_equal(store.read([0, 4095]).images, piece[[0, 63]])


def test_dark_particles_become_white(tmp_path: Path) -> None:
    write_stack(tmp_path / "a.mrcs", noise(40))
    particles = write_star(tmp_path / "p.star", [("a.mrcs", row) for row in range(40)])
    sign = np.where(np.arange(40) % 3 == 0, -1, 1)
    cs.write_particles(tmp_path / "p.cs", particles.replace(image_sign=sign))
    store = bring(tmp_path / "p.cs", tmp_path / "s.zarr").store
    assert np.array_equal(store.read(np.arange(40)).images, noise(40) * sign[:, None, None])
    export(store.path, tmp_path / "same.cs")
    assert np.array_equal(cs.read_particles(tmp_path / "same.cs")["image_sign"], sign)
    export(store.path, tmp_path / "new.cs", stack=True)
    again = bring(tmp_path / "new.cs", tmp_path / "t.zarr").store
    assert np.array_equal(again.read(np.arange(40)).images, noise(40) * sign[:, None, None])


def test_passthrough_completes_a_cs_file(tmp_path: Path) -> None:
    source, images = project(tmp_path)
    cs.write_particles(tmp_path / "all.cs", star.read_particles(source))
    rows = np.load(tmp_path / "all.cs")
    names = [name for name in rows.dtype.names if not name.startswith("blob/")]
    np.save(tmp_path / "own.npy", rows[["uid", *(name for name in rows.dtype.names if name.startswith("blob/"))]])
    np.save(tmp_path / "more.npy", rows[names][::-1])
    for name in ("own", "more"):
        (tmp_path / f"{name}.npy").rename(tmp_path / f"{name}.cs")
    store = bring(tmp_path / "own.cs", tmp_path / "s.zarr", passthrough=(tmp_path / "more.cs",)).store
    assert np.array_equal(store.read(np.arange(150)).images, images)
    assert store.particles().optics["voltage_kV"].tolist() == [300.0]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("suffix", [".star", ".cs"])
def test_export_and_import_give_the_same_back(tmp_path: Path, dtype: str, suffix: str) -> None:
    source, images = project(tmp_path / "project")
    store = bring(source, tmp_path / "s.zarr").store
    result = export(store.path, tmp_path / "out" / f"p{suffix}", stack=True, dtype=dtype)
    assert result.stack == tmp_path / "out" / "p.mrcs"
    assert np.array_equal(mrc.open_stack(result.stack).images, images)
    again = bring(result.path, tmp_path / "again.zarr").store
    assert np.array_equal(again.read(np.arange(150)).images, images)
    assert again.pixel_size_A == 1.5
    if suffix == ".star":
        assert again.particles().extra["rlnFoo"].tolist() == [f"a{row}" for row in range(150)]


def test_export_points_to_the_source_stacks(tmp_path: Path) -> None:
    source, images = project(tmp_path)
    chosen = select(bring(source, tmp_path / "s.zarr").store, [77, 4], tmp_path / "sel.zarr")
    result = export(chosen.path, tmp_path / "two.star")
    assert (result.particles, result.stack) == (2, None)
    assert star.read_blocks(result.path)["particles"].columns["rlnImageName"].tolist() == (
        star.read_blocks(source)["particles"].columns["rlnImageName"][[77, 4]].tolist()
    )
    again = bring(result.path, tmp_path / "again.zarr").store
    assert np.array_equal(again.read([0, 1]).images, images[[77, 4]])
    with pytest.raises(InputError, match="is there already"):
        export(chosen.path, result.path)
    export(chosen.path, result.path, overwrite=True)
    with pytest.raises(InputError, match="must end in"):
        export(chosen.path, tmp_path / "two.txt")
    with pytest.raises(InputError, match="not a particle store"):
        export(tmp_path, tmp_path / "three.star")


def test_export_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    source, images = project(tmp_path)
    store = bring(source, tmp_path / "s.zarr").store
    shard = store.path / "images" / "c" / "1" / "0" / "0"
    shard.write_bytes(b"")
    result = export(store.path, tmp_path / "p.star", stack=True)
    assert sorted(result.left_out) == list(range(32, 64))
    assert "32 rows left out" in result.summary()
    again = bring(result.path, tmp_path / "again.zarr").store
    assert np.array_equal(again.read(np.arange(again.n)).images, np.delete(images, range(32, 64), axis=0))
    for damaged in (store.path / "images" / "c").glob("*/0/0"):
        damaged.write_bytes(b"")
    with pytest.raises(RunError, match="no image could be read"):
        export(store.path, tmp_path / "q.star", stack=True)


def make_run(folder: Path, store: Path, particles: Particles) -> Path:
    run = Run.start(folder / "run", "refine", {}, [store])
    star.write_particles(run.path / "particles.star", particles)
    run.done({"resolution_A": 4.5})
    return run.path


def test_export_of_a_run_is_joined_with_its_store(tmp_path: Path) -> None:
    source, images = project(tmp_path)
    particles = star.read_particles(source)
    rng = np.random.Generator(np.random.Philox(key=4))
    uid = rng.integers(0, 2**64, 150, dtype=np.uint64)
    cs.write_particles(source.with_suffix(".cs"), particles.replace(uid=uid))
    store = bring(source.with_suffix(".cs"), tmp_path / "s.zarr").store
    rows = rng.permutation(150)[:60]
    half = rng.integers(1, 3, 60)
    run = make_run(tmp_path, store.path, store.particles().take(rows).replace(half=half))
    export(run, tmp_path / "run.cs", stack=True)
    found = cs.read_particles(tmp_path / "run.cs")
    assert np.array_equal(found["uid"], uid[rows])
    assert np.array_equal(found["half"], half)
    assert np.array_equal(mrc.open_stack(tmp_path / "run.mrcs").images, images[rows])
    export(run, tmp_path / "run.star")
    assert star.read_particles(tmp_path / "run.star")["image_path"].tolist() == particles["image_path"][rows].tolist()


def test_export_of_a_run_with_repeated_images(tmp_path: Path) -> None:
    """As after symmetry expansion: the second row of an image is joined with the second row of the store."""
    write_stack(tmp_path / "a.mrcs", noise(4))
    rows = [("a.mrcs", index) for index in (0, 1, 0, 2, 3)]
    particles = write_star(tmp_path / "p.star", rows)
    uid = np.array([5, 6, 7, 8, 9], np.uint64)
    cs.write_particles(tmp_path / "p.cs", particles.replace(uid=uid))
    store = bring(tmp_path / "p.cs", tmp_path / "s.zarr").store
    run = make_run(tmp_path, store.path, store.particles().take(np.array([4, 0, 2])))
    export(run, tmp_path / "run.cs")
    assert cs.read_particles(tmp_path / "run.cs")["uid"].tolist() == [9, 5, 7]


def test_export_of_a_run_without_its_store(tmp_path: Path) -> None:
    source, _ = project(tmp_path)
    store = bring(source, tmp_path / "s.zarr").store
    run = make_run(tmp_path, store.path, store.particles())
    write_star(tmp_path / "other.star", [("Extract/mic 0.mrcs", 149)] * 2)
    other = bring(tmp_path / "other.star", tmp_path / "other.zarr").store
    shutil.rmtree(store.path)
    with pytest.raises(InputError, match="no images for --stack"):
        export(run, tmp_path / "p.star", stack=True)
    assert export(run, tmp_path / "p.star").particles == 150
    other.path.rename(store.path)
    with pytest.raises(InputError, match=r"particles.star, row \d+: .* is not in .*s.zarr"):
        export(run, tmp_path / "q.star")


def test_info_says_what_is_there(tmp_path: Path) -> None:
    source, _, _ = broken_project(tmp_path)
    store = bring(source, tmp_path / "s.zarr").store
    found = info(store.path)
    assert (found["kind"], found["particles"], found["quarantined"]) == ("particle store", "108", "13")
    assert found["fingerprint"] == store.fingerprint
    assert "000004@defects.mrcs" in found["  row 4"]
    chosen = info(select(store, [1, 2], tmp_path / "sel.zarr").path)
    assert (chosen["kind"], chosen["particles"], chosen["selected from"]) == (
        "selection",
        "2",
        str(store.path),
    )
    run = info(make_run(tmp_path, store.path, store.particles()))
    assert (run["kind"], run["status"], run["resolution_A"]) == ("run of refine", "done", "4.5")
    assert info(source)["data_particles"] == "121 rows, 3 columns"
    cs.write_particles(tmp_path / "p.cs", star.read_particles(source))
    assert info(tmp_path / "p.cs")["rows"] == "121"
    cut = info(tmp_path / "cut.mrcs")
    assert (cut["size"], cut["truncated"]) == (
        "16 x 16 x 20 (x, y, z or images)",
        "the file holds 15 whole images of 20",
    )
    assert len(describe(InfoOptions(path=source), progress=quiet).summary().splitlines()) > 5
    for path, message in (
        (tmp_path / "nothing", "not there"),
        (tmp_path, "not a run directory"),
        (tmp_path / "garbage.mrcs", "garbage.mrcs"),
    ):
        with pytest.raises(InputError, match=message):
            info(path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(InputError, match="not a store, run directory"):
        info(tmp_path / "x.txt")


def test_real_particles_there_and_back(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """beta-galactosidase, float16 stacks; the rows of half the micrographs have no stacks here."""
    monkeypatch.undo()
    source = shared_data / "bgal_empiar10204" / "derived_relion_poses.star"
    with pytest.raises(InputError, match=r"20170629_00026_frameImage\.mrcs' is not there"):
        bring(source, tmp_path / "s.zarr")
    result = bring(source, tmp_path / "s.zarr", skip_missing=True)
    store, particles = result.store, star.read_particles(source)
    there = np.array([int(path[-18:-16]) <= 25 for path in particles["image_path"].tolist()])
    assert store.n == there.sum() > 500
    assert len(result.quarantined) == (~there).sum()
    assert (store.box_px, store.pixel_size_A, store.scale) == (64, 3.54, 1.0)
    direct = np.concatenate(
        [
            mrc.open_stack(source.parent / path).read(index)
            for path, index in zip(
                particles["image_path"][there].tolist(), particles["image_index"][there].tolist(), strict=True
            )
        ]
    )
    rows = np.random.Generator(np.random.Philox(key=0)).permutation(store.n)
    assert np.array_equal(store.read(rows).images, direct[rows])
    for suffix in (".star", ".cs"):
        export(store.path, tmp_path / f"out{suffix}", stack=True, dtype="float16", overwrite=True)
        again = bring(tmp_path / f"out{suffix}", tmp_path / f"{suffix[1:]}.zarr").store
        assert np.array_equal(again.read(np.arange(store.n)).images, direct)
        found = again.particles()
        assert np.abs(found["rotation"] - particles["rotation"][there]).max() < 1e-6
        assert np.abs(found["origin_A"] - particles["origin_A"][there]).max() < 1e-4
        assert np.array_equal(found["half"], particles["half"][there])


def test_star_and_cs_of_the_same_particles_agree(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "cryodrgn_real"
    one = bring(folder / "empiar_10076_7.star", tmp_path / "star.zarr").store
    other = bring(folder / "empiar_10076_7.cs", tmp_path / "cs.zarr", root=folder).store
    # They are dark on white: the .cs file says so, STAR cannot.
    assert np.array_equal(one.read(np.arange(7)).images, -other.read(np.arange(7)).images)
    assert one.pixel_size_A == pytest.approx(other.pixel_size_A, rel=1e-3)


def test_records_are_json(tmp_path: Path) -> None:
    """What is written beside the arrays is read by others: no NaN, no Python."""
    source, _, _ = broken_project(tmp_path)
    path = bring(source, tmp_path / "s.zarr").store.path
    for name in ("zarr.json", "run.json"):
        json.loads((path / name).read_text(), parse_constant=lambda word: pytest.fail(word))
