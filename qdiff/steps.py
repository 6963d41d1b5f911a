"""From a timestep to a parameter set: activation scales may differ between groups of denoising steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qdiff.spec import StepGroups


class StepTable(nn.Module):
    """The parameter set of every timestep, and the sets of the batch that is being run.

    Quantizers share one table. With a single group nothing is looked up; with more, the network's entry (or whoever
    runs a unit alone) says which timesteps the batch has, and the choice is made on the device.
    """

    def __init__(self, num_timesteps: int, groups: StepGroups, timesteps: Tensor | None = None) -> None:
        """timesteps: [S] of the calibration's sampler, needed for more than one group; any order.

        Raises ValueError when there are more groups than timesteps.
        """
        super().__init__()
        self.count = groups.count
        self.num_timesteps = num_timesteps
        lookup = torch.zeros(num_timesteps, dtype=torch.long)
        if groups.count > 1:
            lookup = _lookup(num_timesteps, groups, timesteps)
        self.register_buffer("lookup", lookup, persistent=False)
        self.index: Tensor | None = None  # [N] group of each sample of the running batch; None: all in group 0

    def groups_of(self, t: Tensor) -> Tensor:
        """t: [N], integer or float. Returns [N] long, the group of each timestep."""
        return self.lookup[t.round().long().clamp(0, self.num_timesteps - 1)]

    def select(self, t: Tensor) -> None:
        """Say that the batch to come has timesteps t [N]."""
        self.index = None if self.count == 1 else self.groups_of(t)

    @contextmanager
    def at(self, t: Tensor) -> Iterator[None]:
        """Within the block, batches have timesteps t [N]; afterwards the former choice holds again."""
        former = self.index
        self.select(t)
        try:
            yield
        finally:
            self.index = former


def _lookup(num_timesteps: int, groups: StepGroups, timesteps: Tensor | None) -> Tensor:
    """[T] long: the group of each t. Step i of S, noisiest first, is in group floor(i * count / S)."""
    known = None if timesteps is None else timesteps.double().unique().flip(0)
    if known is None or len(known) < groups.count:
        found = "no sampler" if known is None else f"{len(known)} timesteps"
        raise ValueError(f"step_groups: {groups.count} groups need at least as many sampler timesteps, found {found}")
    group = torch.arange(len(known)) * groups.count // len(known)
    every = torch.arange(num_timesteps, dtype=torch.float64)
    distance = known[None] - every[:, None]  # [T, S]
    if groups.lookup == "hold":  # the last anchor passed on the way down: the smallest one that is not below t
        distance = torch.where(distance < 0, distance.abs() + num_timesteps, distance)
    return group[distance.abs().argmin(1)]
