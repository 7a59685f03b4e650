"""Memory that tasks will take, said before they start.

The predictions follow the arrays of `steps.expectation` and `kernels.solve` at the moment when most of them are alive;
`benchmarks/memory.py` holds them against what tasks really took.
"""

import math

from dcryo.cluster import Cluster
from dcryo.errors import InputError
from dcryo.jobs.dataset import BATCH
from dcryo.kernels import sampling, slices
from dcryo.kernels.shells import half_plane
from dcryo.steps.expectation import SCORED_TOGETHER
from dcryo.steps.search import Search

# What a task takes whatever the size of its arrays: numbers per particle, tables of frequencies, plans.
_FIXED = 5 << 20


def _voxels(shell_max: int, box_px: int) -> int:
    depth, height, width = slices.volume_shape(shell_max, box_px)
    return depth * height * width


def expectation_bytes(box_px: int, shell_max: int, search: Search, operators: int) -> int:
    """Peak of an expectation task: its reference and sums, one batch of images, and the scores of a few of them.

    shell_max: highest shell back-projected; operators: order of the symmetry group.
    """
    pixels = len(half_plane(shell_max).kx)
    every = len(half_plane(box_px // 2).kx)
    # complex64 reference, and (real, imaginary, weight) of float32 in the sums
    volumes = (8 + 12) * _voxels(shell_max, box_px)
    # images, as stored and as read, their transforms and CTFs; Y, W and the scaled CTF that they are made with
    image = (2 + 4) * box_px**2 + 8 * box_px * (box_px // 2 + 1) + 4 * every + (8 + 4 + 4) * pixels
    return _FIXED + volumes + BATCH * image + _coarse_bytes(search, operators)


def _coarse_bytes(search: Search, operators: int) -> int:
    """Scores of the grid and the slices that they are made with, where the search looks everywhere."""
    if search.grid_order is None:
        return 0
    pixels = len(half_plane(search.shells[0]).kx)
    shifts = len(sampling.shift_grid(search.shift_range_px, search.shift_step_px))
    cells = sampling.pixel_count(search.grid_order) / operators
    # Cells that stick out of the asymmetric unit.
    rim = 2 * math.sqrt(cells) if operators > 1 else 0
    rotations = (cells + rim) * sampling.psi_count(search.grid_order)
    # Slices of half the rotations, their parts and power; two products for each, the best scores and their shifts.
    slices_and_power = (8 + 4 + 4 + 4) * rotations / 2 * pixels
    scores = SCORED_TOGETHER * (shifts * (rotations / 2 * 4 * 2 + (8 + 4) * pixels) + rotations * (4 + 8))
    return int(slices_and_power + scores)


def maximisation_bytes(box_px: int, operators: int) -> int:
    """Peak of the tasks that make the maps of a half at full resolution, from the slabs of its sums."""
    voxels = _voxels(box_px // 2, box_px)
    copies = 3 if operators == 1 else 5
    # the sums, the step and the transform that it is made of with its last axis padded; maps and their envelope
    return _FIXED + max(12 * copies * voxels, (12 + 8 + 8 + 8 + 4) * voxels + 18 * box_px**3)


def back_projection_bytes(box_px: int, curved: bool = False) -> int:
    """Peak of a task that back-projects given poses up to the Nyquist shell: its sums and one batch of images; curved:
    with the two sidebands of each."""
    every = len(half_plane(box_px // 2).kx)
    image = 4 * box_px**2 + 8 * box_px * (box_px // 2 + 1) + (4 * 8 + 4 * 4) * every
    image += (8 + 8 + 4) * every if curved else 0
    return 12 * _voxels(box_px // 2, box_px) + BATCH * image


def check_memory(cluster: Cluster, box_px: int, task_bytes: int, operators: int) -> None:
    """Refuse a job whose tasks, or the making of its maps at full resolution, would not fit where they run.

    InputError, which says how to make it fit.
    """
    task, available = max(task_bytes, maximisation_bytes(box_px, operators)), cluster.task_memory_bytes
    if available is not None and task > available:
        gib = 2**30
        raise InputError(
            f"a box of {box_px} px needs {task / gib:.1f} GiB for each task, but on {cluster.description} there are "
            f"{available / gib:.1f} GiB for each; use fewer workers (--workers), more memory, or particles rescaled to "
            "a smaller box"
        )
