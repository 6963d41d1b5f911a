"""Images and float sampling states in batches, under a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from qdiff.calibration.trajectories import Recorder, Trajectories, concatenate
from qdiff.families.source import FloatModel, Sampling, sample
from qdiff.utils.team import Team

# Images that calibrate are counted from here on, so that they never coincide with images that are looked at.
FIRST_CALIBRATION_IMAGE = 2**31
ALONE = Team()

Observer = Callable[[Any], None]  # is shown every network call
Sample = Callable[[range, Observer], Tensor]  # (image indices, observer) -> their images or latents


def batches(first: int, count: int, size: int) -> Iterator[range]:
    """Image indices first ... first + count - 1 in batches of `size`."""
    for start in range(first, first + count, size):
        yield range(start, min(start + size, first + count))


def sample_batches(
    sample: Sample,
    steps: int,
    indices: Sequence[range],
    title: str,
    observe: Callable[[range], Observer | None] | None = None,
    team: Team = ALONE,
) -> Iterator[tuple[range, Tensor]]:
    """(image indices, what `sample` gives for them on the CPU) of each batch, under one progress bar.

    steps: of the sampler, which the bar counts. observe: batch -> observer of its network calls. team: processes of
    which each samples its part of the batches; the leading one shows the bar, of its part.
    """
    indices = team.local_items(indices)
    if not indices:  # of a run whose images are all there
        return
    options = {"unit": "step", "dynamic_ncols": True, "disable": not team.is_main}
    with tqdm(total=len(indices) * steps, desc=title, **options) as bar:
        for number, batch in enumerate(indices):
            watch = None if observe is None else observe(batch)

            def tick(call, number=number, watch=watch) -> None:
                bar.update(number * steps + call.step + 1 - bar.n)  # some samplers call twice in a step
                if watch is not None:
                    watch(call)

            yield batch, sample(batch, tick).cpu()


def record_batches(
    model: FloatModel, sampling: Sampling, network: nn.Module, indices: Sequence[range], team: Team = ALONE
) -> Iterator[tuple[range, Trajectories]]:
    """(image indices, float sampling states with their conditioning) of each batch of seeds.

    team: processes of which each records its part of the batches.
    """
    recorders: dict[range, Recorder] = {}

    def observe(batch: range) -> Observer:
        recorders[batch] = Recorder()
        return recorders[batch].add

    def states(batch: range, watch: Observer) -> Tensor:
        return sample(model, sampling, network, batch, watch, FIRST_CALIBRATION_IMAGE)

    for batch, _ in sample_batches(states, sampling.steps, indices, "calibration data", observe, team):
        yield batch, recorders.pop(batch).trajectories(**model.columns(sampling, batch, FIRST_CALIBRATION_IMAGE))


def record(
    model: FloatModel, sampling: Sampling, network: nn.Module, count: int, batch_size: int, team: Team = ALONE
) -> Trajectories:
    """Float sampling states of `count` calibration images, in memory; in that of all processes of a team."""
    indices = list(batches(FIRST_CALIBRATION_IMAGE, count, batch_size))
    parts = [part for _, part in record_batches(model, sampling, network, indices, team)]
    return concatenate(team.gather(parts, len(indices)))
