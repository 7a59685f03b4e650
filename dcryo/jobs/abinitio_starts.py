"""The starts of ab initio models: how each begins, and what they have in common at the end."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcryo import graph
from dcryo.cluster import Cluster
from dcryo.data import mrc
from dcryo.data.classes import CLASSES, TABLE, read_class_table
from dcryo.data.store import Store
from dcryo.errors import InputError
from dcryo.jobs.abinitio_iterations import (
    DESCENT_ORDERS,
    Agreement,
    Job,
    State,
    everything,
    expect,
    mean_evidence,
    order,
    ring_power,
    shard,
    working,
    write_models,
)
from dcryo.jobs.dataset import Shard
from dcryo.kernels import filters, fsc, rings, rotations, slices
from dcryo.kernels.randomness import generator
from dcryo.kernels.shells import shell_at
from dcryo.steps import common_lines, first_models

# A first model is of so many images: few, for a model that is far from round.
FIRST_IMAGES = 10
# Fewer averages than this leave common lines nothing to agree on.
_FEWEST_VIEWS = 10
# Starts agree where their models correlate by half to this part of the shells in use.
_AGREE = 0.6
# Starts are judged by so many images, of which as many tell the noise at the beginning.
_JUDGED = 400


def random_starts(job: Job, count: int, cluster: Cluster) -> State:
    """For each start and class a model of a few images at random rotations; and the mean power of images as noise."""
    n, of = len(job.data.particles), job.rings_to(job.shells[1])
    sample = np.arange(n)[:: max(1, n // _JUDGED)]
    noise = graph.call(ring_power, shard(job, sample, "spectrum"), of, job.data.n_groups, name="spectrum")
    models = []
    for number in range(count * job.classes):
        random = generator(job.seed, "first model", number)
        rows = np.sort(random.choice(n, FIRST_IMAGES, replace=False))
        turns = rotations.random_rotations(len(rows), random)
        few = shard(job, rows, f"first-{number}")
        models.append(graph.call(first_model, few, noise, turns, job.mask, of, job.shells[0], name=few.name))
    noise, models = graph.compute((noise, models), cluster)
    many = (count, job.classes)
    sums = (count, 2, job.classes, *slices.volume_shape(job.reach, job.work_px), 3)
    return State(
        iteration=0 if count else job.descent,
        models=np.array(models, dtype=np.float32).reshape(*many, *job.mask.shape),
        sums=np.zeros(sums, dtype=np.float32),
        share=np.full(many, 1 / job.classes),
        noise_power=np.broadcast_to(noise, (max(count, 1), *noise.shape)).copy(),
        fsc=np.zeros((*many, job.reach + 1)),
    )


def first_model(
    shard: Shard, noise_power: np.ndarray, turns: np.ndarray, mask: np.ndarray, of: rings.Rings, shell: int
) -> np.ndarray:
    """A task: `first_models.random_model` of a shard."""
    images, transfer, group, _ = working(shard, slice(None), of)
    usable = np.isfinite(images).all(axis=(1, 2))
    return first_models.random_model(
        images[usable], transfer[:, usable], noise_power[group[usable]], turns[usable], mask, of, shell
    )


class Views(NamedTuple):
    """Class averages (K, D, D), their weights (K,), and the shell that they are good to."""

    images: np.ndarray
    weights: np.ndarray
    shell: int


def load_views(path: Path, store: Store) -> Views:
    """The good averages of a run of class2d; InputError where there are too few, or they are not of such images."""
    table, stack = read_class_table(path / TABLE), mrc.open_stack(path / CLASSES)
    box = store.box_px
    if stack.shape != (box, box):
        raise InputError(
            f"{path / CLASSES}: averages of {stack.shape} px; expected {box} px like the particles of {store.path}. "
            "Classify these particles"
        )
    good = np.flatnonzero(table.kept & (table.particles > 0))
    if len(good) < _FEWEST_VIEWS:
        raise InputError(
            f"{path / TABLE}: {len(good)} classes look good; common lines need {_FEWEST_VIEWS} at least. Make more "
            "classes, or use --method sgd"
        )
    weights = table.particles[good].astype(float)
    resolution = float(np.average(table.resolution_A[good], weights=weights))
    return Views(stack.read(good), weights, min(shell_at(resolution, box, store.pixel_size_A), box // 4))


def with_common_lines(job: Job, state: State, views: Views | None, count: int, cluster: Cluster) -> State:
    """As many starts more, each a model that common lines of the averages give from random numbers of its own."""
    if views is None:
        return state
    sizes = (job.data.store.pixel_size_A, job.diameter_px * job.work_pixel_A, job.mask)
    made = graph.compute(
        [
            graph.call(model_of_views, views, *sizes, (job.seed, "common lines", number), name=f"lines-{number}")
            for number in range(count)
        ],
        cluster,
    )

    def more(array: np.ndarray, added: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.repeat(added[None], count, axis=0)])

    before = len(state.models)
    noise = state.noise_power[:before]
    return replace(
        state,
        models=np.concatenate([state.models, np.stack(made)[:, None]]),
        sums=more(state.sums, np.zeros(state.sums.shape[1:], dtype=np.float32)),
        share=more(state.share, np.ones(job.classes)),
        noise_power=more(noise, state.noise_power[-1]),
        fsc=more(state.fsc, np.zeros(state.fsc.shape[1:])),
    )


def model_of_views(views: Views, pixel_size_A: float, diameter_A: float, mask: np.ndarray, random: tuple) -> np.ndarray:
    """A task: the model of class averages, (d, d, d), in the working box, which is that of the mask; random: arguments
    of `generator`."""
    model = common_lines.common_lines_model(
        views.images, views.weights, pixel_size_A, diameter_A, views.shell, generator(*random)
    )
    return mask * filters.rescale_volume(model.volume, len(mask))


def agreed(job: Job, state: State, cluster: Cluster) -> State:
    """The starts judged by the same images and compared; and what those that agree have in common, in the setting of
    the point group, to go on from."""
    count, shell = len(state.models), job.shells[1]
    plan = everything(job, state)
    judges = np.sort(generator(job.seed, "judges", 0).permutation(len(job.data.particles))[:_JUDGED])
    plan = plan._replace(rows=[judges] * count, order=order(job, shell, DESCENT_ORDERS), group=np.eye(3)[None])
    path = write_models(job, state.models)
    evidence = [[out[0] for out in expect(job, state, plan, path, start)[1]] for start in range(count)]
    pairs = [(first, second) for first in range(count) for second in range(first + 1, count)]
    matches = [
        graph.call(
            first_models.matched, state.models[second], state.models[first], shell, name=f"match-{first}-{second}"
        )
        for first, second in pairs
    ]
    evidence, matches = graph.compute((evidence, matches), cluster)
    means = np.array([mean_evidence(shards) for shards in evidence])
    shells = np.full((count, count), float(job.work_px // 2))
    for (first, second), found in zip(pairs, matches, strict=True):
        shells[first, second] = shells[second, first] = min(fsc.crossing(match.fsc, fsc.HALF) for match in found)
    group = first_models.agreeing(shells, _AGREE * shell)
    best = int(group[np.argmax(means[group])])
    others = [int(other) for other in group if other != best]
    onto_best = [
        graph.call(first_models.matched, state.models[other], state.models[best], shell, name=f"match-best-{other}")
        for other in others
    ]
    common = [
        graph.call(
            first_models.common_model, k, state.models[best], state.models[others], onto_best, job.group, job.mask,
            shell, name=f"common-{k}", parts=2,
        )
        for k in range(job.classes)
    ]  # fmt: skip
    blob = np.stack([first_models.rounded(model) for model in state.models[best]])
    path = write_models(job, blob[None])
    alone = replace(state, share=state.share[[best]], noise_power=state.noise_power[[best]])
    of_blob = [out[0] for out in expect(job, alone, plan._replace(rows=[judges], order=0), path, 0)[1]]
    common, of_blob = graph.compute((common, of_blob), cluster)
    agreement = Agreement(
        [best, *others],
        np.round(means, 3).tolist(),
        round(mean_evidence(of_blob), 3),
        [[job.resolution_A(value) for value in row] for row in shells],
        [round(float(agree), 3) for _, agree in common],
    )
    return replace(
        alone, models=np.stack([[model for model, _ in common]]), sums=np.zeros_like(state.sums[:1]),
        fsc=state.fsc[[best]], agreement=agreement,
    )  # fmt: skip
