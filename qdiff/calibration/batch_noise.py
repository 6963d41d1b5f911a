"""Random numbers for the rows of a batch, the same ones however many processes share the batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qdiff.utils.team import Team


@dataclass(frozen=True)
class BatchNoise:
    """Random numbers from a generator in the same state in every process.

    batch: rows that the team shares.
    """

    generator: torch.Generator
    team: Team = field(default_factory=Team)
    batch: int = 0

    def uniform(self, x: Tensor) -> Tensor:
        """Numbers in [0, 1), a float32 one for each element of x: [B, ...], or [k B, ...] with k rows a sample."""
        if self.team.size == 1:
            return torch.rand(x.shape, generator=self.generator, device=self.generator.device).to(x.device)
        each = x.shape[0] // len(self.team.local_rows(torch.empty(self.batch)))
        shape = (self.batch, each, *x.shape[1:])
        whole = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return self.team.local_rows(whole).flatten(0, 1).to(x.device)
