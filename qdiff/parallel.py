"""Several processes that work on one calibration: what they share, average and split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Team:
    """One process alone; `qdiff.commandline` makes the team of several from Lightning Fabric."""

    rank: int = 0
    size: int = 1

    def share(self, index: Tensor) -> Tensor:
        """This process's part of a batch of sample indices [B]."""
        return index if self.size == 1 else index[self.rank :: self.size]

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's part of some independent pieces of work."""
        return list(items[self.rank :: self.size])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over the processes, in place."""

    def broadcast(self, value: Any, owner: int = 0) -> Any:
        """The value that the process `owner` has, in all processes."""
        return value

    def wait(self) -> None:
        """Go on when all processes have come here."""

    @property
    def leads(self) -> bool:
        """Whether this process writes the files that there is one of."""
        return self.rank == 0
