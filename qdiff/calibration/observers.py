"""Activation ranges: observers that watch quantizers' inputs over calibration batches, then set their grids."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qdiff.nn.quantizers import ActQuantizer
from qdiff.nn.ranges import grid_from_range, make_finder
from qdiff.recipes.stages import RangeSpec

SAMPLE = 2**14  # values kept of each batch for a search over all batches


def value_rows(quantizer: ActQuantizer, x: Tensor) -> Tensor:
    """x: [N, C, ...] or [N, tokens, C]. Returns [1, K] for a grid per tensor, [C, K] for one per input channel."""
    if quantizer.spec.axis == "tensor":
        return x.reshape(1, -1)
    return x.movedim(quantizer.channel_axis, 0).flatten(1)


class RangeObserver:
    """Finds the range of each quantizer and parameter set it is shown, as `spec` says.

    Call it with (quantizer, x) for every input, tell it when a batch starts, and `finish` it. With a quantized prefix
    the running range is set at once, so that the network behind already sees quantized activations.
    """

    def __init__(self, spec: RangeSpec, generator: torch.Generator, raw_min: bool = False) -> None:
        self.spec, self.generator, self.raw_min = spec, generator, raw_min
        self.find = make_finder(spec)
        self._ranges: dict[tuple[ActQuantizer, int], tuple[Tensor, Tensor]] = {}
        self._samples: dict[tuple[ActQuantizer, int], list[Tensor]] = {}

    @torch.no_grad()
    def __call__(self, quantizer: ActQuantizer, x: Tensor) -> None:
        for group, part in _by_group(quantizer, x):
            key = (quantizer, group)
            if self.spec.aggregate == "first" and key in self._ranges:
                continue
            values = value_rows(quantizer, part)
            if self.spec.aggregate == "all":
                self._keep(key, values)
            else:
                self._average(key, self.find(self._thinned(values), quantizer.spec))
            if self.spec.prefix == "quantized":
                self._set(key)

    def _keep(self, key: tuple[ActQuantizer, int], values: Tensor) -> None:
        low, high = values.amin(1), values.amax(1)
        if key in self._ranges:
            low, high = torch.minimum(low, self._ranges[key][0]), torch.maximum(high, self._ranges[key][1])
        self._ranges[key] = (low, high)
        if self.spec.finder != "minmax":
            self._samples.setdefault(key, []).append(self._some(values, self.spec.sample or SAMPLE))

    def _thinned(self, values: Tensor) -> Tensor:
        """The values that a batch's search looks at."""
        if self.spec.finder == "minmax" or self.spec.sample is None or values.shape[1] <= self.spec.sample:
            return values
        ends = [values.amin(1, keepdim=True), values.amax(1, keepdim=True)]
        return torch.cat([*ends, self._some(values, self.spec.sample)], 1)

    def _some(self, values: Tensor, count: int) -> Tensor:
        chosen = torch.randint(values.shape[1], (min(count, values.shape[1]),), generator=self.generator)
        return values[:, chosen.to(values.device)]

    def _average(self, key: tuple[ActQuantizer, int], found: tuple[Tensor, Tensor]) -> None:
        if key in self._ranges:
            momentum = self.spec.momentum
            old = self._ranges[key]
            found = tuple(momentum * o + (1 - momentum) * f for o, f in zip(old, found, strict=True))
        self._ranges[key] = found

    def _set(self, key: tuple[ActQuantizer, int]) -> None:
        quantizer, group = key
        low, high = self._ranges[key]
        if key in self._samples:  # the search starts from the true ends, which a sample may miss
            low, high = self.find(torch.cat([low[:, None], high[:, None], *self._samples[key]], 1), quantizer.spec)
        quantizer.set_grid(grid_from_range(low, high, quantizer.spec, self.raw_min), group)

    def finish(self, quantizers: Iterable[tuple[str, ActQuantizer]]) -> None:
        """Set every grid. Raises ValueError naming a quantizer, or a parameter set of one, that saw nothing."""
        for name, quantizer in quantizers:
            for group in quantizer.steps.reachable():
                if (quantizer, group) not in self._ranges:
                    which = f" in step group {group}" if quantizer.steps.count > 1 else ""
                    raise ValueError(f"activation ranges: {name} saw no calibration state{which}")
                self._set((quantizer, group))


def _by_group(quantizer: ActQuantizer, x: Tensor) -> Iterable[tuple[int, Tensor]]:
    """(parameter set, its samples) of a batch."""
    index = quantizer.steps.index
    if index is None:
        return [(0, x)]
    index = index.repeat_interleave(x.shape[0] // index.shape[0], 0)
    return [(int(group), x[index == group]) for group in index.unique()]
