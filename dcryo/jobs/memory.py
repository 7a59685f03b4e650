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

# Shifts of one image whose Fourier pixels are held together at the finest level; some tens are usual.
_SHIFTS_HELD = 48


def _voxels(shell_max: int) -> int:
    depth, height, width = slices.volume_shape(shell_max)
    return depth * height * width


def expectation_bytes(box_px: int, shell_max: int, search: Search, operators: int) -> int:
    """Peak of an expectation task: its reference and sums, one batch of images, and the scores of a few of them.

    shell_max: highest shell back-projected; operators: order of the symmetry group.
    """
    pixels = len(half_plane(shell_max).kx)
    every = len(half_plane(box_px // 2).kx)
    # complex64 reference, and (real, imaginary, weight) of float32 in the sums
    volumes = (8 + 12) * _voxels(shell_max)
    # images, their transforms, packed pixels with power and CTF; then Y and W with the temporaries that make them
    image = 4 * box_px**2 + 8 * box_px * (box_px // 2 + 1) + (8 + 8 + 4) * every + (4 * 8 + 3 * 4) * pixels
    return volumes + BATCH * image + 2 * 8 * _SHIFTS_HELD * pixels + _coarse_bytes(search, operators)


def _coarse_bytes(search: Search, operators: int) -> int:
    """Scores of the coarsest level, and the slices that they are made with where the search looks everywhere."""
    level = search.levels[0]
    pixels = half_plane(level.shell).within(level.shell)
    shifts = len(sampling.shift_grid(search.shift_range_px, level.shift_step_px))
    if search.radius_deg is not None:
        # The ball of rotations around the last pose holds about 4.2 cells for a radius of one step.
        rotations, images = 4.2 * (search.radius_deg / sampling.step_deg(level.order)) ** 3, 1
    else:
        cells = sampling.pixel_count(level.order) / operators
        # Cells that stick out of the asymmetric unit.
        rim = 2 * math.sqrt(cells) if operators > 1 else 0
        rotations = (cells + rim) * sampling.psi_count(level.order)
        images = SCORED_TOGETHER
    slices_and_power = (8 + 4 + 4) * rotations * pixels
    scores = images * shifts * (rotations * 4 * (3 if search.profile_scale else 1) + 8 * pixels)
    return int(slices_and_power + scores)


def maximisation_bytes(shell_max: int, operators: int) -> int:
    """Peak of the task that completes the sums of a half: the slabs, the whole, its mates and the smooth weights."""
    copies = 3 if operators == 1 else 4
    return _voxels(shell_max) * (12 * copies + 4 * 5)


def back_projection_bytes(box_px: int) -> int:
    """Peak of a task that back-projects given poses up to the Nyquist shell: its sums and one batch of images."""
    every = len(half_plane(box_px // 2).kx)
    image = 4 * box_px**2 + 8 * box_px * (box_px // 2 + 1) + (4 * 8 + 4 * 4) * every
    return 12 * _voxels(box_px // 2) + BATCH * image


def check_memory(cluster: Cluster, box_px: int, task_bytes: int, operators: int) -> None:
    """Refuse a job whose tasks, or the making of its maps at full resolution, would not fit where they run.

    InputError, which says how to make it fit.
    """
    task, available = max(task_bytes, maximisation_bytes(box_px // 2, operators)), cluster.task_memory_bytes
    if available is not None and task > available:
        gib = 2**30
        raise InputError(
            f"a box of {box_px} px needs {task / gib:.1f} GiB for each task, but on {cluster.description} there are "
            f"{available / gib:.1f} GiB for each; use fewer workers (--workers), more memory, or particles rescaled to "
            "a smaller box"
        )
