"""Modules that hold grids and rounding variables; the arithmetic is in `qdiff.nn.grid` and `qdiff.nn.functional`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qdiff.nn.functional import hard_codes, offset_codes, offset_quantize, sharpen, soft_quantize, soft_round_inverse
from qdiff.nn.grid import Grid
from qdiff.nn.step_table import StepTable
from qdiff.nn.unowned import Unowned
from qdiff.recipes.recipe import QuantSpec


class ActQuantizer(nn.Module):
    """Snaps activations to a grid with one parameter set per group of denoising steps.

    It passes its input through until it has a range (`enabled`). scale and zero_point: [groups] for one scale per
    tensor, [groups, channels] for one per input channel; they keep their identity, calibration copies into them.
    """

    def __init__(self, spec: QuantSpec, steps: StepTable, channels: int | None = None, channel_axis: int = 1) -> None:
        """channels: width of `channel_axis`, needed for a grid per input channel."""
        super().__init__()
        if spec.axis == "in_channel" and channels is None:
            raise ValueError("an activation grid per input channel needs the number of channels")
        shape = (steps.count,) if spec.axis == "tensor" else (steps.count, channels)
        self.spec, self.channel_axis = spec, channel_axis
        self.scale = nn.Parameter(torch.ones(shape), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(shape))
        self.enabled = False
        # Set for the length of a `with` block by qdiff.calibration, never by layers.
        self.observer: Callable[[ActQuantizer, Tensor], None] | None = None
        self.drop: Callable[[Tensor, Tensor], Tensor] | None = None
        self._steps = Unowned(steps)

    @property
    def steps(self) -> StepTable:
        """The table that says which parameter set a sample takes."""
        return self._steps.module

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, ...] or [N, tokens, C]. Returns it on the grid, same shape and dtype."""
        if self.observer is not None:
            self.observer(self, x)
        if not self.enabled:
            return x
        snapped = self.grid.per_sample(x, self.steps, self.channel_axis).snap(x)
        return snapped if self.drop is None else self.drop(x, snapped)

    @property
    def grid(self) -> Grid:
        """The parameter sets of all groups."""
        return Grid(self.scale, self.zero_point, self.spec)

    @torch.no_grad()
    def set_grid(self, grid: Grid, group: int | None = None) -> None:
        """Copy a grid's scale and zero point in, for one group or (None) for all, and start quantizing."""
        into = slice(None) if group is None else group
        self.scale[into] = grid.scale.to(self.scale)
        self.zero_point[into] = grid.zero_point.to(self.zero_point)
        self.enabled = True


class WeightQuantizer(nn.Module):
    """The grid of a weight, or of one part of a split one.

    scale, zero_point: [O, 1, ...] for one scale per output channel, [1, 1, ...] for one per tensor.
    """

    def __init__(self, spec: QuantSpec, weight: Tensor) -> None:
        super().__init__()
        rows = weight.shape[0] if spec.axis == "out_channel" else 1
        shape = (rows, *[1] * (weight.dim() - 1))
        self.spec = spec
        self.scale = nn.Parameter(torch.ones(shape), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(shape))

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Copy the scales and zero points, [O] or [1], of a grid in."""
        self.scale.copy_(grid.scale.view_as(self.scale))
        self.zero_point.copy_(grid.zero_point.view_as(self.zero_point))

    @property
    def grid(self) -> Grid:
        """Broadcastable to the weight."""
        return Grid(self.scale, self.zero_point, self.spec)


class FloorRounding(nn.Module):
    """The weight while it is finetuned on its frozen grid: scale * (clip(floor(w / scale) + offset) - zero point).

    The offset is what rounding made of each weight, 0 or 1 after AdaRound (any number after compensated rounding), so
    that learning starts from exactly the codes there are; floor passes gradients straight through (QuEST, methods
    §3.3).
    """

    def __init__(self, weight: Tensor, codes: Tensor, quantizer: WeightQuantizer) -> None:
        """weight: [O, ...] float; codes: the same shape, what it was rounded to."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        offset = codes.to(weight.dtype) - quantizer.zero_point - torch.floor(weight.detach() / quantizer.scale)
        self.register_buffer("offset", offset, persistent=False)
        self._quantizer = Unowned(quantizer)

    def forward(self) -> Tensor:
        """The weight on its grid; gradients reach the float weight."""
        return offset_quantize(self.weight, self.offset, self._quantizer.module.grid)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes, as float."""
        return offset_codes(self.weight, self.offset, self._quantizer.module.grid)


class SoftRounding(nn.Module):
    """AdaRound's variable for one weight part: the weight while it learns, the codes when it is done.

    base: [O, ...], the weight that is rounded; the start h(alpha) = frac(base / scale) reproduces it inside the grid.
    An exponent above 1 starts nearer to the codes that base rounds to (see `sharpen`).
    """

    def __init__(self, base: Tensor, quantizer: WeightQuantizer, exponent: float = 1.0) -> None:
        super().__init__()
        ratio = base / quantizer.scale
        start = ratio - torch.floor(ratio)
        self.alpha = nn.Parameter(soft_round_inverse(start if exponent == 1 else sharpen(start, exponent)))
        self.register_buffer("base", base.detach().clone(), persistent=False)
        self._quantizer = Unowned(quantizer)

    def forward(self) -> Tensor:
        """The weight with soft rounding; gradients reach alpha."""
        return soft_quantize(self.base, self.alpha, self._quantizer.module.grid)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes with hard rounding, as float."""
        return hard_codes(self.base, self.alpha, self._quantizer.module.grid)
