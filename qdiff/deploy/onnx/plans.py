"""What the export needs to know of layers and attention products, as plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor, nn

from qdiff.deploy.layers import IntegerAttention, IntegerLayer
from qdiff.nn.grid import Grid
from qdiff.nn.layers import QuantAttention, QuantLayer
from qdiff.nn.quantizers import ActQuantizer
from qdiff.recipes.recipe import QuantSpec


@dataclass(frozen=True, eq=False)
class GridPlan:
    """A `Grid` of activations as arrays.

    scale: [sets] float32, or [sets, C] per input channel; zero_point: the same shape, int64.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    spec: QuantSpec

    @classmethod
    def of(cls, grid: Grid) -> GridPlan:
        return cls(_array(grid.scale, np.float32), _array(grid.zero_point, np.int64), grid.spec)

    @property
    def per_channel(self) -> bool:
        return self.scale.ndim == 2

    @property
    def bits(self) -> int:
        return self.spec.bits

    @property
    def in_range(self) -> bool:
        """Whether every zero point can be stored like a code."""
        limit = 255 if self.bits <= 8 else 65535
        stored = self.zero_point + self.stored_offset
        return bool((stored >= 0).all() and (stored <= limit).all())

    @property
    def stored_offset(self) -> int:
        """What is added to a code so that it is stored without a sign."""
        return (128 if self.bits <= 8 else 32768) if self.spec.qmin < 0 else 0

    def times(self, factor: float) -> GridPlan:
        """The grid of values that are multiplied by `factor` afterwards."""
        return replace(self, scale=(self.scale.astype(np.float64) / factor).astype(np.float32))


@dataclass(frozen=True, eq=False)
class Codes:
    """A weight as integers, read when they are needed, so that the codes of one layer at a time are in memory.

    scale: [O] float32; zero_point: [O] int64; read: gives the codes, [O, C, ...] int16.
    """

    read: Callable[[], np.ndarray]
    scale: np.ndarray
    zero_point: np.ndarray
    spec: QuantSpec

    @classmethod
    def of(cls, grid: Grid, outputs: int, read: Callable[[], np.ndarray]) -> Codes:
        """grid: with one scale and zero point, or one per output, in any shape."""
        scale, zero_point = (
            np.broadcast_to(_array(v.flatten(), np.float64), outputs) for v in (grid.scale, grid.zero_point)
        )
        return cls(read, scale.astype(np.float32), zero_point.astype(np.int64), grid.spec)

    @property
    def codes(self) -> np.ndarray:
        """Read anew each time."""
        return self.read()

    def values(self) -> np.ndarray:
        """[O, C, ...] float32."""
        codes = self.codes
        rows = (-1, *[1] * (codes.ndim - 1))
        return ((codes - self.zero_point.reshape(rows)).astype(np.float32)) * self.scale.reshape(rows)

    def __getitem__(self, rows: slice) -> Codes:
        """Those of some output channels."""
        return Codes(lambda: self.codes[rows], self.scale[rows], self.zero_point[rows], self.spec)


@dataclass(frozen=True, eq=False)
class PartPlan:
    """One part of a layer along its input channels; a float weight is an array."""

    channels: slice
    weight: Codes | np.ndarray
    act: GridPlan | None


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """A convolution or linear layer; shape: [O, C, ...] of the whole weight."""

    kind: str
    shape: tuple[int, ...]
    parts: tuple[PartPlan, ...]
    bias: np.ndarray | None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    def outputs(self, rows: slice) -> LayerPlan:
        """The layer that gives some of the output channels."""
        parts = tuple(replace(part, weight=part.weight[rows]) for part in self.parts)
        shape = (rows.stop - rows.start, *self.shape[1:])
        return replace(self, shape=shape, parts=parts, bias=None if self.bias is None else self.bias[rows])


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Attention products; grids by operand, "q", "k", "v", "w"; what is missing stays float."""

    operand_scale: float
    score_scale: float
    grids: dict[str, GridPlan]


def _array(tensor: Tensor, dtype: type) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(dtype)


def _tuple(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    return (value,) * length if isinstance(value, int) else tuple(value)


def _quantizer_grid(quantizer: ActQuantizer) -> GridPlan | None:
    return GridPlan.of(quantizer.grid) if quantizer.enabled else None


def float_plan(kind: str, weight: Tensor, bias: Tensor | None, *geometry: int | Sequence[int]) -> LayerPlan:
    """A layer that is not quantized. geometry: stride, padding and dilation of a convolution."""
    parts = (PartPlan(slice(0, weight.shape[1]), _array(weight, np.float32), None),)
    lengths = [_tuple(value, weight.dim() - 2) for value in geometry]
    return LayerPlan(kind, tuple(weight.shape), parts, None if bias is None else _array(bias, np.float32), *lengths)


def is_planned(module: nn.Module) -> bool:
    """Whether the module is recorded as a whole: quantized layers and attention products."""
    return isinstance(module, (QuantLayer, QuantAttention, IntegerLayer, IntegerAttention))


def layer_plan(module: nn.Module, name: str) -> LayerPlan:
    """Of a quantized layer. Raises ValueError for one that is not calibrated."""
    if isinstance(module, QuantLayer):
        parts, shape = _simulated_parts(module, name), tuple(module.weight.shape)
        kind = "linear" if module.channel_axis == -1 else "conv"
        geometry = [] if kind == "linear" else [module.geometry[k] for k in ("stride", "padding", "dilation")]
    else:
        parts = tuple(_integer_part(part) for part in module.parts)
        first = module.parts[0].shape
        shape = (first[0], sum(part.shape[1] for part in module.parts), *first[2:])
        kind = module.kind
        geometry = [] if kind == "linear" else [module.stride, module.padding, module.dilation]
    bias = None if module.bias is None else _array(module.bias, np.float32)
    return LayerPlan(kind, shape, parts, bias, *(_tuple(value, len(shape) - 2) for value in geometry))


def _integer_part(part: nn.Module) -> PartPlan:
    weight = Codes.of(part.grid, part.shape[0], lambda: _array(part.codes(), np.int16))
    return PartPlan(part.channels, weight, None if part.input is None else GridPlan.of(part.input.grid))


def _simulated_parts(layer: QuantLayer, name: str) -> tuple[PartPlan, ...]:
    if layer.weight_quantizers and not layer.frozen:
        raise ValueError(f"{name}: expected a calibrated layer, found one whose weight has no codes")
    parts = []
    for i, channels in enumerate(layer.slices):
        if layer.weight_quantizers:
            grid, read = layer.weight_quantizers[i].grid, partial(_layer_codes, layer, channels)
            weight = Codes.of(grid, layer.weight.shape[0], read)
        else:
            weight = _array(layer.weight[:, channels], np.float32)
        act = _quantizer_grid(layer.act_quantizers[i]) if layer.act_quantizers else None
        parts.append(PartPlan(channels, weight, act))
    return tuple(parts)


def _layer_codes(layer: QuantLayer, channels: slice) -> np.ndarray:
    return _array(layer.codes[:, channels], np.int16)


def attention_plan(module: nn.Module) -> AttentionPlan | None:
    """Of a quantized attention product; None for other modules."""
    if isinstance(module, QuantAttention):
        found = {operand: _quantizer_grid(getattr(module, f"act_quantizer_{operand}")) for operand in "qkvw"}
    elif isinstance(module, IntegerAttention):
        found = {operand: GridPlan.of(getattr(module, operand).grid) for operand in "qkvw"}
        if module.policy == "float":
            del found["w"]
    else:
        return None
    grids = {operand: grid for operand, grid in found.items() if grid is not None}
    return AttentionPlan(module.operand_scale, module.score_scale, grids)
