"""From a timestep to a parameter set: activation scales may differ between groups of denoising steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qdiff.recipes.recipe import StepGroups


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
        self.num_timesteps = num_timesteps
        known = None if timesteps is None else timesteps.detach().double().cpu().sort(descending=True).values
        if known is None and groups.size is not None:
            raise ValueError(f"step_groups: groups of {groups.size} steps need a sampler's timesteps, found none")
        self.count = groups.count if known is None else groups.sets(len(known))
        self.known = known if self.count > 1 else None  # the calibration's timesteps, where it matters which they were
        lookup = torch.zeros(num_timesteps, dtype=torch.long)
        if self.count > 1:
            lookup = _lookup(num_timesteps, groups, known)
        self.register_buffer("lookup", lookup, persistent=False)
        self.index: Tensor | None = None  # [N] group of each sample of the running batch; None: all in group 0

    def groups_of(self, t: Tensor) -> Tensor:
        """t: [N], integer or float. Returns [N] long, the group of each timestep."""
        return self.lookup[t.round().long().clamp(0, self.num_timesteps - 1)]

    def select(self, t: Tensor) -> None:
        """Say that the batch to come has timesteps t [N]."""
        self.index = None if self.count == 1 else self.groups_of(t)
        if self.index is not None and self.index.is_cpu and bool((self.index == self.index[0]).all()):
            self.index = self.index[:1]  # one set for all: quantizers then have one scale to apply

    def made_for(self, timesteps: Tensor) -> bool:
        """Whether a sampler's timesteps [S] are those that the parameter sets were calibrated for."""
        if self.known is None:
            return True
        return torch.equal(timesteps.detach().double().cpu().unique(), self.known.unique())

    def reachable(self) -> list[int]:
        """The groups that some timestep of the calibration's sampler takes its set from."""
        return [0] if self.known is None else self.groups_of(self.known).unique().tolist()

    @contextmanager
    def at(self, t: Tensor) -> Iterator[None]:
        """Within the block, batches have timesteps t [N]; afterwards the former choice holds again."""
        former = self.index
        self.select(t)
        try:
            yield
        finally:
            self.index = former


def _lookup(num_timesteps: int, groups: StepGroups, known: Tensor | None) -> Tensor:
    """[T] long: the group of each t. Step i of S, noisiest first, is in group floor(i * count / S), or i // size."""
    sets = groups.count if known is None else groups.sets(len(known))
    if known is None or len(known) < sets:
        found = "no sampler" if known is None else f"{len(known)} timesteps"
        raise ValueError(f"step_groups: {sets} groups need at least as many sampler timesteps, found {found}")
    step = torch.arange(len(known))
    if groups.hold_every is not None:
        step = step // groups.hold_every * groups.hold_every
    group = step * sets // len(known) if groups.size is None else step // groups.size
    # A sampler may visit a timestep several times: its group is that of the first visit.
    first = torch.cat([torch.tensor([True]), known[1:] != known[:-1]])
    known, group = known[first], group[first]
    every = torch.arange(num_timesteps, dtype=torch.float64)
    distance = known[None] - every[:, None]  # [T, S]
    if groups.lookup == "hold":  # the last anchor passed on the way down: the smallest one that is not below t
        distance = torch.where(distance < 0, distance.abs() + num_timesteps, distance)
    return group[distance.abs().argmin(1)]
