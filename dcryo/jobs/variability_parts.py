"""Parts of `variability`: its tasks."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcryo.jobs.dataset import BATCH, Shard
from dcryo.jobs.em import slab_bounds
from dcryo.kernels import slices, variability
from dcryo.kernels.shells import half_plane
from dcryo.steps import variability as steps
from dcryo.steps.expectation import empty_sums
from dcryo.steps.variability import Found, Packed


@dataclass(frozen=True)
class Setting:
    """What all shards of a half share in an iteration. noise_power: (G, shell_max + 1); first_shell: nothing is weighed
    below it; contrast_sd: of the images' contrasts; box_px: of the volumes."""

    noise_power: np.ndarray
    shell_max: int
    first_shell: int
    contrast_sd: float
    box_px: int


def pack_shard(shard: Shard, groups: int, shell_max: int, scratch: Path) -> tuple:
    """The task: leave the shard's images, packed, in `scratch`. Returns sums of their power, (groups, shell_max + 1),
    and their number, (groups,), and position -> reason of those that cannot be used."""
    pixels = half_plane(shell_max)
    packed: list[Packed] = []
    left_out: dict[int, str] = {}
    for first in range(0, len(shard.rows), BATCH):
        batch, bad = shard.read(slice(first, first + BATCH))
        found = steps.pack(batch, pixels)
        packed.append(found)
        unusable = np.flatnonzero(~np.isfinite(found.power).all(axis=1))
        reasons = dict.fromkeys(unusable.tolist(), "the image is not finite") | bad
        left_out.update({first + position: reason for position, reason in reasons.items()})
    every = Packed(*(np.concatenate(column) for column in zip(*packed, strict=True)))
    for name, array in every._asdict().items():
        _save(scratch / f"{shard.name}-{name}.npy", array)
    usable = np.isfinite(every.power).all(axis=1)
    sums, counts = np.zeros((groups, shell_max + 1)), np.zeros(groups)
    np.add.at(sums, shard.group[usable], every.power[usable])
    np.add.at(counts, shard.group[usable], 1)
    return sums, counts, left_out


def write_volumes(volumes: np.ndarray, shell_max: int, path: Path) -> Path:
    """Prepare volumes (q, d, d, d) for slicing and leave them where every task can map them."""
    _save(path, variability.interleave(volumes, shell_max))
    return path


def _save(path: Path, array: np.ndarray) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npy")
    with os.fdopen(handle, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


def _load(path: Path) -> np.ndarray:
    # Copy-on-write only so that kernels see the same array type as in memory; nobody writes.
    return np.asarray(np.load(path, mmap_mode="c"))


def _packed(shard: Shard, scratch: Path) -> Packed:
    return Packed(*(_load(scratch / f"{shard.name}-{name}.npy") for name in Packed._fields))


def expect_shard(
    shard: Shard,
    scratch: Path,
    volumes_path: Path,
    setting: Setting,
    drawn: np.ndarray | None,
) -> tuple:
    """The task: the shard's sums (`variability.empty_sums`), the power that its model leaves of its images, (G,
    shell_max + 1), and of how many, (G,), and what it found of them.

    drawn: coordinates (n, K) to be taken in place of those that the images have, or None.
    """
    volumes, packed, pixels = _load(volumes_path), _packed(shard, scratch), half_plane(setting.shell_max)
    count, box = volumes.shape[3], setting.box_px
    sums = variability.empty_sums(count, setting.shell_max, box)
    residual, particles = np.zeros_like(setting.noise_power), np.zeros(len(setting.noise_power))
    found = []
    for first in range(0, len(shard.rows), BATCH):
        some = slice(first, first + BATCH)
        noise = setting.noise_power[shard.group[some]]
        data, weight = steps.weigh(packed.images[some], packed.ctf[some], noise, setting.first_shell, pixels)
        sliced = variability.extract(volumes, shard.rotation[some], pixels, box)
        cross, gram = variability.products(sliced, data, weight)
        of_batch = steps.coordinates(cross, gram, setting.contrast_sd)
        if drawn is not None:
            of_batch = steps.drawn(drawn[some], of_batch)
        found.append(of_batch)
        used = of_batch.usable
        first_moment, second_moment = steps.moments(of_batch)
        fit = variability.insert(
            sums, shard.rotation[some][used], sliced[used], data[used], weight[used], first_moment[used],
            second_moment[used], pixels, box,
        )  # fmt: skip
        left = steps.residual_power(packed.power[some][used], fit, noise[used], pixels)
        np.add.at(residual, shard.group[some][used], left)
        np.add.at(particles, shard.group[some][used], 1)
    return sums, residual, particles, Found(*(np.concatenate(column) for column in zip(*found, strict=True)))


def find_shard(shard: Shard, scratch: Path, volumes_path: Path, setting: Setting) -> Found:
    """The task: what a model says of the shard's images."""
    volumes, packed, pixels = _load(volumes_path), _packed(shard, scratch), half_plane(setting.shell_max)
    found = []
    for first in range(0, len(shard.rows), BATCH):
        some = slice(first, first + BATCH)
        noise = setting.noise_power[shard.group[some]]
        data, weight = steps.weigh(packed.images[some], packed.ctf[some], noise, setting.first_shell, pixels)
        sliced = variability.extract(volumes, shard.rotation[some], pixels, setting.box_px)
        found.append(steps.coordinates(*variability.products(sliced, data, weight), setting.contrast_sd))
    return Found(*(np.concatenate(column) for column in zip(*found, strict=True)))


def bin_shard(shard: Shard, share: np.ndarray, contrast: np.ndarray) -> tuple:
    """The task: slabs of the accumulator of the shard's images at full resolution, each counted by its share (n,)."""
    box = shard.store.box_px
    (volume,), pixels = empty_sums(box // 2, 1, box).volumes, half_plane(box // 2)
    rows = np.flatnonzero(share > 0)
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        batch, _ = shard.read(some)
        steps.back_project_shares(volume, batch, share[some], contrast[some], pixels)
    return tuple(volume[bounds] for bounds in slab_bounds(box // 2, box))


def shard_bytes(box_px: int, image_px: int, shell_max: int, volumes: int) -> int:
    """Peak of an expectation task: its volumes and sums, one batch of images, and what its slices are."""
    depth, height, width = slices.volume_shape(shell_max, box_px)
    pixels = len(half_plane(shell_max).kx)
    voxel = 8 * volumes + 4 * variability.channels(volumes)
    image = 8 * volumes * pixels + (8 + 4) * 2 * pixels + 6 * image_px**2
    return (5 << 20) + depth * height * width * voxel + BATCH * image
