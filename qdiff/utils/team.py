"""Several processes that share a piece of work: what each of them does, and what they tell one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Team:
    """One process alone; `qdiff.utils.fabric_team` makes the team of several. All processes make the same calls in the
    same order.

    A team is entered where the work begins that it shares: `with start_team(args, device) as team`.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # that this process of several works on

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error: object) -> None:
        """The work is over."""

    def local_rows(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch [B, ...], such as sample indices."""
        return batch if self.size == 1 else batch[self.rank :: self.size]

    def local_items(self, items: Sequence[T]) -> list[T]:
        """This process's part of some independent pieces of work."""
        return list(items[self.rank :: self.size])

    def gather(self, found: Sequence[T], count: int) -> list[T]:
        """What all processes have found for their `local_items` of `count` pieces of work, in the order of all."""
        parts = ((found[i // self.size] if i % self.size == self.rank else None, i % self.size) for i in range(count))
        return [self.broadcast(part, owner) for part, owner in parts]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over the processes, in place: bit-identical results in all of them."""

    def broadcast(self, value: Any, owner: int = 0) -> Any:
        """The value that the process `owner` has, in all processes: plain data and tensors in any nesting."""
        return value

    def wait(self) -> None:
        """Go on when all processes have come here, however long that takes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files that there is one of."""
        return self.rank == 0
