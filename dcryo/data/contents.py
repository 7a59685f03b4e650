"""What is in a file or directory that dcryo knows, as pairs of a label and a value."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dcryo.data import cs, mrc, star
from dcryo.data.particles import Particles
from dcryo.data.run import Run
from dcryo.data.store import is_store, open_store
from dcryo.errors import InputError

Lines = list[tuple[str, str]]

LISTED = 5
"""Quarantined particles that are shown."""
SHOWN_BLOCKS = 12
# Fields of .cs files for what dcryo does not apply, since nothing says how their numbers are to be read.
_CS_ABERRATIONS = ("ctf/shift_A", "ctf/tilt_A", "ctf/trefoil_A", "ctf/tetra_A", "ctf/anisomag")
_ABERRATIONS = ("beam_tilt_x_mrad", "beam_tilt_y_mrad", "odd_zernike", "even_zernike", "magnification")


def describe_path(path: Path) -> Lines:
    """Pairs of label and value that say what is at `path`: a store, selection, run directory, MRC, STAR or .cs file.

    Raises InputError where there is nothing, something else, or a damaged file.
    """
    if not path.exists():
        raise InputError(f"{path}: not there")
    if is_store(path):
        return _store(path)
    if path.is_dir():
        # An interrupted import has a record, but what it lacks is told best by opening the store.
        return _run(path) if path.suffix != ".zarr" else _store(path)
    readers: dict[str, Callable[[Path], Lines]] = {
        ".star": _star, ".cs": _cs, ".mrc": _mrc, ".mrcs": _mrc, ".map": _mrc, ".st": _mrc,
    }  # fmt: skip
    suffix = path.with_suffix("").suffix if path.suffix in (".gz", ".bz2") else path.suffix
    if suffix not in readers:
        raise InputError(f"{path}: not a store, run directory, or file ending in {', '.join(readers)}")
    return readers[suffix](path)


def _store(path: Path) -> Lines:
    store = open_store(path)
    left_out = store.quarantined
    lines = [
        ("kind", "particle store" if store.selection is None else "selection"),
        ("particles", str(store.n)),
        ("box", f"{store.box_px} px, {store.pixel_size_A:g} A/px"),
        (
            "images",
            f"{store.dtype}, scale {store.scale:g}, {store.chunk_images} a chunk, {store.shard_images} a file",
        ),
        ("fingerprint", store.fingerprint),
    ]
    if store.selection is not None:
        lines.append(("selected from", str(store.selection)))
    if "file" in store.source:
        lines.append(("imported from", str(store.source["file"])))
    lines += _particles(store.particles())
    lines.append(("quarantined", str(len(left_out))))
    for entry in left_out[:LISTED]:
        lines.append((f"  row {entry['row']}", f"{entry['image']}: {entry['reason']}"))
    return lines


def _run(path: Path) -> Lines:
    record = Run.open(path).record
    lines = [("kind", f"run of {record['job']}"), ("status", str(record["status"]))]
    lines += [("error", str(record["error"]))] if record.get("error") else []
    lines += [("command", " ".join(record.get("command", []))), ("started", str(record.get("started_utc")))]
    lines += [("input", str(row.get("path"))) for row in record["inputs"]]
    lines.append(("iterations", str(len(record.get("iterations", [])))))
    for label, value in record.get("result", {}).items():
        lines.append((label, value if isinstance(value, str) else json.dumps(value)))
    lines.append(("quarantined", str(len(record.get("quarantined", [])))))
    lines.append(("files", ", ".join(sorted(file.name for file in path.iterdir() if file.is_file()))))
    return lines


def _star(path: Path) -> Lines:
    blocks = star.read_blocks(path)
    lines = [("kind", "STAR file")]
    for name, block in list(blocks.items())[:SHOWN_BLOCKS]:
        lines.append((f"data_{name}", f"{len(block)} rows, {len(block.columns)} columns"))
    if len(blocks) > SHOWN_BLOCKS:
        lines.append(("and more", f"{len(blocks) - SHOWN_BLOCKS} blocks"))
    if any("rlnImageName" in block.columns for block in blocks.values()):
        lines += _particles(star.read_particles(path))
    return lines


def _cs(path: Path) -> Lines:
    particles = cs.read_particles(path)
    return [("kind", "cryoSPARC file"), ("rows", str(len(particles))), *_particles(particles)]


def _mrc(path: Path) -> Lines:
    try:
        stack = mrc.open_stack(path)
    except InputError:  # compressed, or with its axes in another order
        return _map(path)
    ny, nx = stack.shape
    lines = [
        ("kind", "MRC map or stack"),
        ("size", f"{nx} x {ny} x {stack.n} (x, y, z or images)"),
        ("voxel size", f"{stack.voxel_size_A:g} A"),
    ]
    if stack.readable < stack.n:
        lines.append(("truncated", f"the file holds {stack.readable} whole images of {stack.n}"))
    n = min(stack.n, stack.readable, 64)
    if n:
        images = stack.read(np.linspace(0, min(stack.n, stack.readable) - 1, n).astype(np.int64))
        mean, std = images.mean(dtype=np.float64), images.std(dtype=np.float64)
        lines.append(
            (
                "grey values",
                f"{images.min():g} to {images.max():g}, mean {mean:g}, std {std:g} (of {n} images)",
            )
        )
    return lines


def _map(path: Path) -> Lines:
    found = mrc.read_map(path)
    nz, ny, nx = found.array.shape
    low, high = found.array.min(), found.array.max()
    return [
        ("kind", "MRC map"),
        ("size", f"{nx} x {ny} x {nz} (x, y, z)"),
        ("voxel size", " x ".join(f"{side:g}" for side in found.voxel_A) + " A"),
        ("grey values", f"{low:g} to {high:g}, mean {found.array.mean():g}, std {found.array.std():g}"),
    ]


def aberrations_of_group(particles: Particles, row: int) -> str:
    """The aberrations beside defocus and Cs of an optics group, in words; empty for none."""
    told, optics = [], particles.optics
    tilt = [float(optics[name][row]) if name in optics else 0.0 for name in _ABERRATIONS[:2]]
    if any(tilt):
        told.append(f"beam tilt {tilt[0]:g}, {tilt[1]:g} mrad")
    for name, kind in (("odd_zernike", "odd"), ("even_zernike", "even")):
        if name in optics and optics[name][row].any():
            told.append(f"{kind} phases of {np.count_nonzero(optics[name][row])} Zernike polynomials")
    matrix = optics["magnification"][row] if "magnification" in optics else np.eye(2)
    if (matrix != np.eye(2)).any():
        largest, smallest = np.linalg.svd(matrix, compute_uv=False)
        told.append(f"magnification that differs by {100 * (largest / smallest - 1):.2g} % between two axes")
    return ", ".join(told)


def carried_aberrations(particles: Particles) -> list[str]:
    """Names of a .cs file's aberrations that are not zero; they are carried along and not applied."""
    return [
        name
        for key, texts in particles.extra.items()
        if (name := key.split(" ")[0]) in _CS_ABERRATIONS
        and any(float(number) for text in np.unique(texts).tolist() for number in text.split())
    ]


def _particles(particles: Particles) -> Lines:
    lines = []
    for row in range(particles.n_groups):
        plain = {name: column for name, column in particles.optics.items() if name not in _ABERRATIONS}
        values = ", ".join(f"{name} {column[row]}" for name, column in plain.items())
        count = np.count_nonzero(particles["optics_row"] == row)
        lines.append((f"optics group {row + 1}", f"{count} particles, {values}"))
        lines.append(("  aberrations", aberrations_of_group(particles, row) or "none"))
    carried = carried_aberrations(particles)
    lines += [("  not applied", ", ".join(carried))] if carried else []
    stacks = np.unique(particles["image_path"])
    lines.append(("stacks", f"{len(stacks)}, the first {stacks[0]}" if len(stacks) else "none"))
    if "defocus_u_A" in particles and len(particles):
        low, high = np.percentile(particles["defocus_u_A"], [0, 100])
        lines.append(("defocus", f"{low:.0f} to {high:.0f} A"))
    if "half" in particles:
        counts = np.bincount(particles["half"], minlength=3)
        lines.append(("half sets", f"{counts[1]} and {counts[2]}" + (f", {counts[0]} in none" if counts[0] else "")))
    lines.append(("columns", ", ".join([*particles.columns, *particles.extra])))
    return lines
