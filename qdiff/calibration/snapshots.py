"""Learning that takes long as one piece: what it has come to is recorded now and then, so that a killed run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qdiff.calibration.context import Calibration

PARTS = 20  # snapshots of one piece of work, each in place of the one before
UNIT = "under way"  # under which a stage's snapshot is recorded


class OptimizerSnapshots:
    """Records tensors that learning changes; they are copied into again when the run is gone on with.

    Of several processes the leading one has the record, and all go on from the same part.
    """

    def __init__(self, run: Calibration, stage: int, tensors: Callable[[], Sequence[Tensor]], iterations: int) -> None:
        self.run, self.stage, self.tensors = run, stage, tensors
        self.every = max(1, -(-iterations // PARTS))
        self.done = 0  # iterations

    @torch.no_grad()
    def restore(self) -> list[tuple[int, float]]:
        """Go back to the last one there is; its noted losses."""
        found = self.run.options.team.broadcast(self.run.record.load(self.stage, UNIT))
        if found is None:
            return []
        tensors, notes = found
        for i, tensor in enumerate(self.tensors()):
            tensor.copy_(tensors[str(i)].view_as(tensor))
        self.done = notes["done"]
        return [tuple(point) for point in notes["losses"]]

    def after(self, iteration: int, losses: Sequence[tuple[int, float]]) -> None:
        """An iteration is done; record it where it ends a part."""
        self.done = iteration + 1
        if self.done % self.every == 0:
            tensors = {str(i): tensor.detach().clone() for i, tensor in enumerate(self.tensors())}
            self.run.record.save(self.stage, UNIT, tensors, {"done": self.done, "losses": list(losses)})
