"""Chunk and shard sizes of the particle store against a raw memory map: throughput, size on disk, number of files.

    python benchmarks/store_layout.py [--megabytes 256] [--folder DIR]

Images are noise, the worst case for compression, kept as float16 and read as float32. "/core" is MB of stored bytes per
second of processor time, which other work on the machine disturbs least; the others are by the clock; best of three.
"Cold" means that the system was asked to drop the files from its cache first. Needs about three times --megabytes on
disk. The tables go into docs/decisions/001-store-layout.md.
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from dcryo.data import store_writer
from dcryo.data.columns import read_columns, write_columns
from dcryo.data.particles import Particles
from dcryo.data.store import Store

MIB = 1 << 20
BOXES_PX = (64, 128, 256)
LAYOUTS_MIB = ((1, 128), (8, 32), (8, 128), (8, 256), (32, 128))
BATCH_BYTES = 8 * MIB
HEADER = (
    "box px", "chunk", "shard", "write /core", "read cold", "read by 2", "read /core", "random /core", "files", "+%"
)  # fmt: skip


def noise(n: int, box_px: int) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(key=box_px))
    return rng.standard_normal((n, box_px, box_px), np.float32).astype(np.float16)


def make_store(path: Path, images: np.ndarray) -> tuple[Store, float]:
    """The store of `images` and the processor's seconds that it took to write them."""
    n, box_px, _ = images.shape
    shutil.rmtree(path, ignore_errors=True)
    writer = store_writer.create(path, n_images=n, box_px=box_px, pixel_size_A=1.0)
    began = time.process_time()
    for start in range(0, n, writer.shard_images):
        writer.write(images[start : start + writer.shard_images], {})
    seconds = time.process_time() - began
    columns = {
        "image_path": np.full(n, "stack.mrcs"),
        "image_index": np.arange(n),
        "optics_row": np.zeros(n, np.int32),
    }
    return writer.finish(Particles(columns, {"pixel_size_A": np.ones(1)}), [], {}), seconds


def drop_from_cache(path: Path) -> None:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(
    job: Callable[[], object],
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Best of three."""
    found = []
    for _ in range(3):
        before()
        began = clock()
        job()
        found.append(clock() - began)
    return min(found)


def in_two_threads(read: Callable[[np.ndarray], object], pieces: list[np.ndarray]) -> None:
    def work(first: int) -> None:
        for piece in pieces[first::2]:
            read(piece)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def rates(read: Callable[[np.ndarray], object], path: Path, n: int, image_bytes: int, batch: int) -> list[str]:
    """MB/s of the stored bytes: in order cold, in order by two threads; per core in order, and random rows."""
    rows = np.arange(n)
    pieces = [rows[start : start + batch] for start in range(0, n, batch)]
    random = np.random.Generator(np.random.Philox(key=1)).permutation(n)[: n // 8]
    megabytes = n * image_bytes / 1e6

    def in_order() -> None:
        for piece in pieces:
            read(piece)

    found = [
        megabytes / seconds(in_order, lambda: drop_from_cache(path)),
        megabytes / seconds(lambda: in_two_threads(read, pieces)),
        megabytes / seconds(in_order, clock=time.process_time),
        megabytes / 8 / seconds(lambda: read(random), clock=time.process_time),
    ]
    return [f"{rate:.0f}" for rate in found]


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def measure_layouts(box_px: int, folder: Path, megabytes: int) -> None:
    image_bytes = box_px * box_px * 2
    n = megabytes * MIB // image_bytes
    images = noise(n, box_px)
    raw = folder / "raw.f16"
    began = time.process_time()
    with raw.open("wb") as file:
        file.write(images.data)
        os.fsync(file.fileno())
    written = time.process_time() - began
    mapped = np.memmap(raw, np.float16, "r", shape=images.shape)
    batch = BATCH_BYTES // image_bytes
    figures = rates(lambda rows: mapped[rows].astype(np.float32), raw, n, image_bytes, batch)
    row(box_px, "memory map", "", f"{n * image_bytes / 1e6 / written:.0f}", *figures, 1, "0.00")
    for chunk_mib, shard_mib in LAYOUTS_MIB:
        store_writer.CHUNK_BYTES, store_writer.SHARD_BYTES = chunk_mib * MIB, shard_mib * MIB
        store, taken = make_store(folder / "layout.zarr", images)
        figures = rates(store.read, store.path, n, image_bytes, batch)
        files = [file for file in (store.path / "images").rglob("*") if file.is_file()]
        extra = sum(file.stat().st_size for file in files) / (n * image_bytes) - 1
        speed = f"{n * image_bytes / 1e6 / taken:.0f}"
        row(
            box_px,
            f"{chunk_mib} MiB",
            f"{shard_mib} MiB",
            speed,
            *figures,
            len(files) - 1,
            f"{100 * extra:.2f}",
        )
    shutil.rmtree(folder / "layout.zarr")
    raw.unlink()


def measure_fancy_indexing(folder: Path) -> None:
    """A few random rows, by `Store.read` and as Zarr itself would index them."""
    store_writer.CHUNK_BYTES, store_writer.SHARD_BYTES = 8 * MIB, 128 * MIB
    store, _ = make_store(folder / "fancy.zarr", noise(1024, 256))
    array = zarr.open_array(store.path / "images", mode="r")
    rows = np.random.Generator(np.random.Philox(key=1)).permutation(1024)[:128]
    grouped = seconds(lambda: store.read(rows), clock=time.process_time)
    fancy = seconds(lambda: array.oindex[rows], clock=time.process_time)
    print(f"\n128 random images of 1024, 256 px: grouped by chunk {grouped:.2f} s, Zarr's oindex {fancy:.2f} s")
    shutil.rmtree(store.path)


def read_in_order(array: zarr.Array, chunk_images: int) -> None:
    for start in range(0, array.shape[0], chunk_images):
        array[start : start + chunk_images]


def measure_compressors(folder: Path) -> None:
    """What compression of noise saves and costs, one 8 MiB chunk at a time."""
    images = noise(64 * 8, 256)
    path = folder / "codec.zarr"
    compressors: dict[str, list[ZstdCodec | BloscCodec]] = {
        "none": [],
        "zstd 1": [ZstdCodec(level=1)],
        "blosc lz4, byte shuffle": [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=2)],
        "blosc zstd 3, byte shuffle": [BloscCodec(cname="zstd", clevel=3, shuffle="shuffle", typesize=2)],
    }
    for name, codecs in compressors.items():
        shutil.rmtree(path, ignore_errors=True)
        array = zarr.create_array(
            path, shape=images.shape, chunks=(64, 256, 256), shards=images.shape, dtype="float16",
            compressors=[*codecs, Crc32cCodec()], zarr_format=3,
        )  # fmt: skip
        began = time.process_time()
        array[...] = images
        written = time.process_time() - began
        read = seconds(partial(read_in_order, array, 64), clock=time.process_time)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        megabytes = images.nbytes / 1e6
        row(name, f"{100 * size / images.nbytes:.1f}", f"{megabytes / written:.0f}", f"{megabytes / read:.0f}")
    shutil.rmtree(path)


def measure_columns(folder: Path, n: int) -> None:
    """Columns of a million particles: seconds and MB."""
    rng = np.random.Generator(np.random.Philox(key=7))
    columns = {
        "image_path": np.char.add("Extract/job009/Movies/stack_", (np.arange(n) // 200).astype(str)),
        "image_index": np.arange(n) % 200,
        "optics_row": np.zeros(n, np.int32),
        "rotation": rng.standard_normal((n, 3, 3)),
        "origin_A": rng.standard_normal((n, 2)),
        "defocus_u_A": rng.standard_normal(n),
        "defocus_v_A": rng.standard_normal(n),
    }
    extra = {f"rlnUnknown{number}": np.char.mod("%.6f", rng.standard_normal(n)) for number in range(4)}
    began = time.process_time()
    for name, content in (("particles", columns), ("extra", extra)):
        write_columns(folder / name, content)
    written = time.process_time() - began
    began = time.process_time()
    for name in ("particles", "extra"):
        read_columns(folder / name)
    read = time.process_time() - began
    files = [file for name in ("particles", "extra") for file in (folder / name).rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    print(
        f"\n{n} particles, {len(columns) + len(extra)} columns: written in {written:.1f} s, read in {read:.1f} s, "
        f"{size:.0f} MB in {len(files)} files"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="images per case, in MiB")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        row(*HEADER)
        row(*("---" for _ in range(10)))
        for box_px in BOXES_PX:
            measure_layouts(box_px, folder, options.megabytes)
        print()
        row("compressor", "size %", "write /core", "read /core")
        row(*("---" for _ in range(4)))
        measure_compressors(folder)
        measure_fancy_indexing(folder)
        measure_columns(folder, 1_000_000)


if __name__ == "__main__":
    main()
