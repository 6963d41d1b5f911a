"""Unit inputs without re-running the prefix: a network's chain advanced over all calibration states at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.adapters.base import Adapter, Segment
from qdiff.calibration.selectors import CalibrationSet


class Frontier:
    """The state of every calibration sample just before one segment of a network's chain.

    Asked for segments in execution order it runs every segment once; asked for an earlier one it starts again. A
    segment's module must not change between the time its output was taken into the state and the end of that pass:
    calibrate a unit before asking for a later one. Samples are kept in batches of `batch_size`.
    """

    def __init__(self, network: nn.Module, adapter: Adapter, data: CalibrationSet, batch_size: int = 16) -> None:
        self.network, self.adapter = network, adapter
        self._batches = list(data.to(next(network.parameters())).batches(batch_size))
        self._order = {segment.name: i for i, segment in enumerate(adapter.chain(network))}
        self._restart()

    def _restart(self) -> None:
        self._position = 0
        start = self.adapter.start
        self._states: list[Any] = [start(self.network, b.x, b.t, b.context) for b in self._batches]

    @torch.no_grad()
    def _advance(self) -> None:
        segment = self.adapter.chain(self.network)[self._position]
        for i, batch in enumerate(self._batches):
            state = self._states[i]
            self._states[i] = segment.write(state, self.run(segment.module, segment.read(state), batch.t))
        self._position += 1

    def run(self, module: nn.Module, args: tuple[Tensor, ...], t: Tensor) -> Tensor:
        """The module's output for arguments that belong to timesteps t [N]."""
        table = getattr(self.network, "step_table", None)
        if table is None:
            return module(*args)
        with table.at(t):
            return module(*args)

    @torch.no_grad()
    def seek(self, name: str) -> Segment:
        """Bring the states to just before the segment called `name` and return it."""
        target = self._order[name]
        if target < self._position:
            self._restart()
        while self._position < target:
            self._advance()
        return self.adapter.chain(self.network)[target]

    @torch.no_grad()
    def inputs(self, name: str) -> tuple[Tensor, ...]:
        """The arguments of the segment's module, each [N, ...] over all samples."""
        segment = self.seek(name)
        columns = zip(*(segment.read(state) for state in self._states), strict=True)
        return tuple(torch.cat(column) for column in columns)

    @torch.no_grad()
    def outputs(self, name: str) -> Tensor:
        """The segment's module's output, [N, ...] over all samples; the frontier stays before the segment."""
        segment = self.seek(name)
        return torch.cat([self.run(segment.module, args, t) for args, t in self.batches(segment)])

    def batches(self, segment: Segment) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """(module arguments, timesteps) of each batch at the segment the frontier stands before."""
        for state, batch in zip(self._states, self._batches, strict=True):
            yield segment.read(state), batch.t
