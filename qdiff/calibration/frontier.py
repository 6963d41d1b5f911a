"""Unit inputs without re-running the prefix: a network's chain advanced over all calibration states at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.selectors import CalibrationSet
from qdiff.calibration.store import Column, Rows, Store, map_leaves, read_rows
from qdiff.nn.family import Adapter, Segment


class Frontier:
    """The state of every calibration sample just before one segment of a network's chain.

    Asked for segments in execution order it runs every segment once; asked for an earlier one it starts again. A
    segment's module must not change between the time its output was taken into the state and the end of that pass:
    calibrate a unit before asking for a later one. Samples go through a module `batch_size` at a time, whichever way
    their states are kept, so that a store's limits change no numbers.
    """

    def __init__(
        self,
        network: nn.Module,
        adapter: Adapter,
        data: CalibrationSet,
        batch_size: int = 16,
        store: Store | None = None,
    ) -> None:
        self.network, self.adapter, self.data = network, adapter, data
        self.parameter = next(network.parameters())
        self.store = store or Store(self.parameter.device)
        self.t = data.t.to(self.parameter.device)
        self.calls = 0  # batches that have gone through a module, for benchmarks
        self.slices = [slice(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
        self._order = {segment.name: i for i, segment in enumerate(adapter.chain(network))}
        self._restart()

    def _restart(self) -> None:
        self._position, self._outputs = 0, None
        self._state = None  # the former states go before the new ones come
        start = self.adapter.start

        def first(rows: slice) -> Any:
            batch = self.data.subset(rows).to(self.parameter)
            return start(self.network, batch.x, batch.t, batch.context)

        self._state = self._stored(first)

    @torch.no_grad()
    def _stored(self, state_of: Callable[[slice], Any]) -> Any:
        """The states of all batches as columns. Leaves that are rows of a column already stay where they are."""
        stored: Any = None
        for rows in self.slices:
            state = state_of(rows)
            columns: dict[int, Column] = {}  # a tensor that stands in two places is stored once

            def column_of(leaf: Tensor | Rows, columns: dict[int, Column] = columns) -> Column:
                if isinstance(leaf, Rows):
                    return leaf.column
                if id(leaf) not in columns:
                    columns[id(leaf)] = self.store.column(len(self.data), leaf)
                return columns[id(leaf)]

            if stored is None:
                stored = map_leaves(state, column_of)
            _fill(stored, state, rows)
        return stored

    def state(self, rows: slice | Tensor) -> Any:
        """The chain's state of some samples, read as far as it is looked at. rows: a slice, or [M] long."""
        return map_leaves(self._state, lambda column: Rows(column, rows))

    def arguments(self, segment: Segment, rows: slice | Tensor) -> tuple[Tensor, ...]:
        """What the segment's module is called with for some samples, where the frontier stands before it."""
        return read_rows(segment.read(self.state(rows)))

    def _advance(self) -> None:
        segment = self.adapter.chain(self.network)[self._position]
        known = self._outputs

        def after(rows: slice) -> Any:
            state = self.state(rows)
            if known is not None:
                return segment.write(state, Rows(known, rows))  # the column itself becomes part of the states
            return segment.write(state, self.run(segment.module, read_rows(segment.read(state)), self.t[rows]))

        self._state = self._stored(after)
        self._position, self._outputs = self._position + 1, None

    @torch.no_grad()
    def run(self, module: nn.Module, args: tuple[Tensor, ...], t: Tensor) -> Tensor:
        """The module's output for arguments that belong to timesteps t [N]."""
        self.calls += 1
        table = getattr(self.network, "step_table", None)
        if table is None:
            return module(*args)
        with table.at(t):
            return module(*args)

    def seek(self, name: str) -> Segment:
        """Bring the states to just before the segment called `name` and return it."""
        target = self._order[name]
        if target < self._position:
            self._restart()
        while self._position < target:
            self._advance()
        return self.adapter.chain(self.network)[target]

    def batches(self, segment: Segment) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """(module arguments, timesteps) of each batch at the segment the frontier stands before."""
        for rows in self.slices:
            yield self.arguments(segment, rows), self.t[rows]

    def batch_outputs(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """(samples, the module's output for them) of each batch; the frontier stays before the segment."""
        segment = self.seek(name)
        for rows, (args, t) in zip(self.slices, self.batches(segment), strict=True):
            yield rows, self.run(segment.module, args, t)

    def inputs(self, name: str) -> tuple[Tensor, ...]:
        """The arguments of the segment's module, each [N, ...] over all samples."""
        columns = zip(*(args for args, _ in self.batches(self.seek(name))), strict=True)
        return tuple(torch.cat(column) for column in columns)

    def outputs(self, name: str) -> Tensor:
        """The segment's module's output, [N, ...] over all samples; the frontier stays before the segment."""
        return torch.cat([output for _, output in self.batch_outputs(name)])

    def cached_outputs(self, name: str) -> Column:
        """The same in the store. The next step takes them instead of running the module again, which therefore must
        not change: for float networks."""
        self.seek(name)
        if self._outputs is None:
            for rows, output in self.batch_outputs(name):
                if self._outputs is None:
                    self._outputs = self.store.column(len(self.data), output)
                self._outputs[rows] = output
        return self._outputs


class BaselineFrontier(Frontier):
    """The same states as the original code gets them: every segment's by a run of the whole prefix, nothing kept from
    one segment to the next. The baseline of benchmarks and tests."""

    def seek(self, name: str) -> Segment:
        if self._position != self._order[name]:
            self._restart()
        return super().seek(name)


def _fill(stored: Any, state: Any, rows: slice) -> None:
    """Copy the tensors of a batch's state into their columns."""
    columns: list[Column] = []
    map_leaves(stored, columns.append)
    leaves: list[Tensor | Rows] = []
    map_leaves(state, leaves.append)
    done = set()
    for column, leaf in zip(columns, leaves, strict=True):
        if not isinstance(leaf, Rows) and id(column) not in done:
            column[rows] = leaf
            done.add(id(column))
