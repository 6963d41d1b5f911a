"""The one optimisation loop: each stage that learns hands it a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qdiff.calibration.adam import Adam, AdamGroup
from qdiff.nn.grid import MIN_SCALE
from qdiff.recipes.stages import Learn
from qdiff.utils.team import Team

Groups = dict[str, list[nn.Parameter]]  # learned parameters by group name
Losses = list[tuple[int, float]]  # (iteration, loss) at about a hundred points
NOTED = 100  # points at which the loss is read from the device


class Share(NamedTuple):
    """One process's part of a minibatch: its samples, their weight in the batch's loss, and how many processes share
    what does not depend on samples."""

    rows: Tensor
    weight: float
    processes: int


class Record(Protocol):
    """Saves what an optimisation has come to now and then; see `qdiff.calibration.snapshots.OptimizerSnapshots`."""

    done: int  # iterations

    def after(self, iteration: int, losses: Losses) -> None:
        """An iteration is done."""


class Optimization:
    """Adam on groups of parameters, in one process or a team of them. A graph can capture a step."""

    def __init__(
        self,
        groups: Groups,
        learn: Mapping[str, Learn],
        iterations: int,
        team: Team | None = None,
        by_row: Collection[str] = (),
    ) -> None:
        """learn: rates by group. by_row: groups whose rows of axis 0 need not be in every batch (`AdamGroup`)."""
        self.groups, self.iterations, self.team = groups, iterations, team or Team()
        tables = {name: rate_table(learn[name], iterations) for name in groups}
        self.adam = Adam(
            [AdamGroup(p, tables[name], learn[name].relative, name in by_row) for name, p in groups.items()]
        )

    def step(self, number: Tensor, index: Tensor, backward: Callable[[Share], Tensor]) -> Tensor:
        """One step on the samples `index` [B]. Returns the loss of all of them, and decides nothing by its value.

        number: [1] long, steps taken before. backward: computes the loss of one process's share, times its weight, adds
        its gradients to the parameters, and returns it detached.
        """
        team = self.team if len(index) >= self.team.size else Team()  # without a sample for each, all do all of it
        rows = team.local_rows(index)
        self.adam.zero_grad()
        loss = backward(Share(rows, len(rows) / len(index), team.size))  # parts of a batch may differ by one
        team.sum([loss, *self.adam.gradients()])
        self.adam.step(number)
        for scale in self.groups.get("scale", []):
            scale.data.clamp_min_(MIN_SCALE)
        return loss

    def run(
        self,
        step: Callable[[int], Tensor],
        tick: Callable[[float], None] = lambda loss: None,
        record: Record | None = None,
        losses: Losses | None = None,
    ) -> Losses:
        """Carry out all iterations, from the first that `record` does not hold. Returns the losses noted.

        step: iteration -> its loss, read at some iterations only. tick: called after each iteration with the last loss
        noted. losses: those noted before an interruption.
        """
        losses, every = losses or [], max(1, self.iterations // NOTED)
        with learning(self.groups):
            for iteration in range(0 if record is None else record.done, self.iterations):
                loss = step(iteration)
                if iteration % every == 0 or iteration == self.iterations - 1:
                    losses.append((iteration, loss.item()))
                if record is not None:
                    record.after(iteration, losses)
                tick(losses[-1][1])
        return losses


def rate_table(learn: Learn, iterations: int) -> Tensor:
    """[iterations] float64, the rate of every iteration."""
    if learn.schedule == "constant":
        return torch.full((iterations,), learn.rate, dtype=torch.float64)
    angle = math.pi * torch.arange(iterations, dtype=torch.float64) / iterations
    return learn.rate * 0.5 * (1 + angle.cos())


@contextmanager
def learning(groups: Groups) -> Iterator[None]:
    """Within the block the groups' parameters, and no others that were frozen, take gradients."""
    learned = [(p, p.requires_grad) for parameters in groups.values() for p in parameters]
    for parameter, _ in learned:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, requires_grad in learned:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
