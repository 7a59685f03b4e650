"""Predicted against measured peak memory of the two kinds of tasks that a refinement runs.

    python benchmarks/memory.py [--box 64 128 256] [--output docs/memory.md]

Each task runs in a process of its own, which compiles its kernels on a small problem first and then reports by how much
the real one raised the peak of its resident memory.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from dcryo.data.particles import Particles
from dcryo.data.store import open_store
from dcryo.data.store_writer import create
from dcryo.jobs import dataset, em, memory
from dcryo.kernels import symmetry
from dcryo.kernels.density import gaussian_density
from dcryo.kernels.rotations import random_rotations
from dcryo.steps import maximisation
from dcryo.steps.search import plan_search

PIXEL_SIZE_A = 3.0
WARM_BOX_PX = 32
KINDS = ("global", "local", "maximisation")


def resident_bytes(what: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(what))


def forget_the_past() -> None:
    """Give freed memory back and let the peak start from what is held now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def store_of(folder: Path, box_px: int) -> Path:
    """A store of a batch of noise, made once per box."""
    path = folder / f"{box_px}.zarr"
    if not path.exists():
        n = dataset.BATCH
        rng = np.random.default_rng(0)
        columns = {
            "image_path": np.full(n, "noise.mrcs"),
            "image_index": np.arange(n),
            "optics_row": np.zeros(n, dtype=np.int32),
            "defocus_u_A": np.full(n, 15000.0),
            "defocus_v_A": np.full(n, 14500.0),
            "defocus_angle_deg": np.zeros(n),
        }
        optics = {
            "voltage_kV": np.array([300.0]), "spherical_aberration_mm": np.array([2.7]),
            "amplitude_contrast": np.array([0.1]), "pixel_size_A": np.array([PIXEL_SIZE_A]),
        }  # fmt: skip
        writer = create(path, n_images=n, box_px=box_px, pixel_size_A=PIXEL_SIZE_A)
        writer.write(rng.standard_normal((n, box_px, box_px)).astype(np.float16), {})
        writer.finish(Particles(columns, optics), [], {})
    return path


def task_of(kind: str, folder: Path, box_px: int):  # type: ignore[no-untyped-def]
    """A task ready to run, and the memory predicted for it."""
    shell_max, group = box_px // 2, symmetry.operators("C1")
    if kind == "maximisation":
        shape = (*em.slices.volume_shape(shell_max, box_px), 3)
        reference = _blobs(box_px)
        return (lambda: _map_of(shape, reference, shell_max, group)), memory.maximisation_bytes(box_px, 1)
    store = open_store(store_of(folder, box_px))
    n = store.n
    shell = box_px // 2 - 1 if kind == "local" else box_px // 8
    width_A = box_px * PIXEL_SIZE_A
    search = plan_search(
        shell, box_px, PIXEL_SIZE_A, (2.0 if kind == "local" else 0.6) * width_A, 0.06 * width_A,
        shell if kind == "local" else 0,
        np.zeros((1, box_px)), np.eye(3), group,
    )  # fmt: skip
    columns = dataset.ctf_columns(store.particles(), store.path)
    # Slices in all directions, so that the whole volumes are touched.
    rotation = random_rotations(n, np.random.default_rng(2))
    shard = dataset.Shard(
        "1-0",
        store,
        np.arange(n),
        columns,
        {},
        np.zeros(n, dtype=int),
        np.ones(n),
        np.ones(n),
        rotation,
        np.zeros((n, 2)),
        np.full(n, kind == "local"),
        rotation,
        np.zeros((n, 2)),
        np.ones((n, 1)),
    )
    path = folder / f"{box_px}-{kind}.npy"
    if not path.exists():
        em.write_reference(_blobs(box_px), shell_max, path)
    setting = em.Setting(search, search, np.full((1, box_px // 2 + 1), float(box_px**2)), shell_max)
    return (lambda: em.expect_shard(shard, [path], setting)), memory.expectation_bytes(box_px, shell_max, search, 1)


def _map_of(shape: tuple[int, ...], reference: np.ndarray, shell_max: int, group: np.ndarray) -> np.ndarray:
    """What becomes of the sums of a half, one task after the other."""
    sums, box_px = np.ones(shape, dtype=np.float32), len(reference)
    accumulator = maximisation.assemble([sums[bounds] for bounds in em.slab_bounds(shell_max, box_px)], group)
    del sums
    return maximisation.plain_map(accumulator, reference, group, shell_max, box_px)


def _blobs(box_px: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    width_A = box_px * PIXEL_SIZE_A
    return gaussian_density(
        rng.normal(0, 0.1 * width_A, (200, 3)), np.ones((200, 1)), np.full((200, 1), 200.0), box_px, PIXEL_SIZE_A
    )


def measure(kind: str, folder: Path, box_px: int) -> dict:
    """Run one task in this process; what it is given counts as the task's."""
    task_of(kind, folder, WARM_BOX_PX)[0]()
    forget_the_past()
    before = resident_bytes("VmRSS")
    task, predicted = task_of(kind, folder, box_px)
    task()
    return {"predicted": predicted, "measured": resident_bytes("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--box", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("KIND", "FOLDER", "BOX"), help="measure one task in this process")
    arguments = parser.parse_args()
    if arguments.one:
        kind, folder, box = arguments.one
        print(json.dumps(measure(kind, Path(folder), int(box))))
        return
    lines = ["| box | task | predicted MiB | measured MiB | predicted / measured |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for box in arguments.box:
            for kind in KINDS:
                # Stores and references are made by another process, so that making them is not measured.
                for _ in range(2):
                    command = [sys.executable, __file__, "--one", kind, folder, str(box)]
                    row = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                ratio = row["predicted"] / row["measured"]
                lines.append(
                    f"| {box} | {kind} | {row['predicted'] / 2**20:.0f} | {row['measured'] / 2**20:.0f} | {ratio:.2f} |"
                )
                print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
