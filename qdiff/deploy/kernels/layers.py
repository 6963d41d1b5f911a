"""Layers, norms and attention products that run on kernels, in place of those of an integer network.

They take and return tensors of the shapes that the float modules do, in 16 or 32-bit float; images travel with their
channels last in memory. Between a norm and the layers that read it travel stored codes instead (int8 tensors of the
same shape), where all of these have one grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.deploy.kernels.attention import Grids, integer_attention
from qdiff.deploy.kernels.codes import ActGrid, KernelWeight
from qdiff.deploy.kernels.geometry import Geometry, Windows, windows
from qdiff.deploy.kernels.norms import group_norm_codes, layer_norm_codes
from qdiff.deploy.kernels.product import Epilogue, integer_product, weight_only_product
from qdiff.deploy.kernels.quantize import quantize
from qdiff.deploy.layers import IntegerAttention, IntegerLayer, IntegerPart, OperandGrid
from qdiff.nn.step_table import StepTable
from qdiff.nn.unowned import Unowned


def running_sets(steps: StepTable, groups: int) -> Tensor | None:
    """The parameter set of every sample of the running batch [N], of all [1]; None where there is one only.

    Raises RuntimeError where the batch's timesteps are not known.
    """
    if groups == 1:
        return None
    if steps.index is None:
        raise RuntimeError("parameter sets per step: the batch's timesteps were not given to the StepTable")
    return steps.index


class KernelGrid(ActGrid):
    """An `ActGrid` that knows the table of its parameter sets."""

    def __init__(self, operand: OperandGrid) -> None:
        super().__init__(operand.grid)
        self._steps = Unowned(operand.steps)

    def sets(self) -> Tensor | None:
        """See `running_sets`."""
        return running_sets(self._steps.module, len(self.scale))

    def same_as(self, other: KernelGrid) -> bool:
        """Whether both give the same codes for every input at every timestep."""
        same_table = len(self.scale) == 1 or self._steps.module is other._steps.module
        return same_table and super().same_as(other)


class KernelPart(nn.Module):
    """One part of a layer: its weight, and its input's grid where products of codes are possible.

    `snap`: the grid of an input that is snapped and stays float (a scale per channel), else None.
    """

    def __init__(self, part: IntegerPart) -> None:
        super().__init__()
        self.channels = part.channels
        self.weight = KernelWeight.make(part.codes(), part.grid)
        self.grid = KernelGrid(part.input) if part.integer else None
        self.snap = part.input if not part.integer else None
        self._windows: dict[tuple, Windows] = {}

    def forward(self, x: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
        """x: [N, H, W, C] of the part, float or stored codes. Returns [N, OH, OW, O]."""
        if self.grid is None:
            return weight_only_product(x, self.weight, geometry, epilogue)
        sets, sums = self.grid.sets(), None
        if x.dtype != torch.int8:
            wanted = self.weight.zero is not None
            found = quantize(x, self.grid, sets, sums=wanted)
            x, sums = found if wanted else (found, None)
        seen = None if self.grid.centred else self._windows_of(x, geometry)
        return integer_product(x, self.weight, self.grid, sets, geometry, epilogue, seen, sums)

    def _windows_of(self, x: Tensor, geometry: Geometry) -> Windows:
        """Window sums, made once per size of the image; they do not depend on it where nothing is padded."""
        image = (x.shape[1], x.shape[2])
        key = (*image, x.device)
        if key not in self._windows:
            self._windows[key] = windows(self.weight, geometry, image)
        return self._windows[key]


class KernelLayer(nn.Module):
    """A convolution or linear layer of codes. `dtype`: of its output; scales and bias stay float32."""

    def __init__(self, layer: IntegerLayer, dtype: torch.dtype) -> None:
        """Raises ValueError for a layer that no kernel takes."""
        super().__init__()
        self.kind, self.channel_axis, self.dtype = layer.kind, layer.channel_axis, dtype
        self.parts = nn.ModuleList(KernelPart(part) for part in layer.parts)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float().contiguous())
        self.dims = 0 if layer.kind == "linear" else len(layer.kernel_size)
        self.geometry = Geometry()
        if self.dims:
            sides = zip((layer.stride, layer.padding, layer.dilation), (1, 0, 1), strict=True)
            self.geometry = Geometry(*(_pair(value, vertical) for value, vertical in sides))

    def forward(self, x: Tensor) -> Tensor:
        """x: as the float layer takes it; or its stored codes, from a `KernelNorm`."""
        return self.forward_plus(x, None)

    def forward_plus(self, x: Tensor, other: Tensor | None) -> Tensor:
        """The layer's output plus `other`, which is of its shape or broadcast to it."""
        array = _to_array(x, self.dims)
        if other is not None:
            other = self._other(x, other)
        last = len(self.parts) - 1
        for i, part in enumerate(self.parts):
            x_part = array if last == 0 else array[..., part.channels]
            if part.snap is not None:
                x_part = self._snapped(part.snap, x, part.channels)
            elif part.grid is None:
                x_part = x_part.to(self.dtype)
            dtype, bias = (self.dtype, self.bias) if i == last else (torch.float32, None)
            other = part(x_part, self.geometry, Epilogue(dtype, bias, other))
        return _from_array(other, self.dims, x)

    def _snapped(self, grid: OperandGrid, x: Tensor, channels: slice) -> Tensor:
        """The part's input on its grid, computed in float32, as an array."""
        axis = self.channel_axis % x.dim()
        x = x.narrow(axis, channels.start, channels.stop - channels.start)
        return _to_array(grid.snap(x.float()).to(self.dtype), self.dims)

    def _other(self, x: Tensor, other: Tensor) -> Tensor:
        if self.dims:
            return _to_array(other, self.dims)
        return _to_array(other.expand(*x.shape[:-1], self.parts[0].weight.outputs), 0)


class KernelNorm(nn.Module):
    """A group norm (and SiLU, if it follows) or a layer norm that writes the codes its readers take.

    weight and bias keep their names, and with them the network its dtype.
    """

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm, silu: bool, grid: KernelGrid) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else None
        self.silu, self.grid = silu, grid

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, ...] for a group norm, [N, ..., C] for a layer norm. Returns its stored codes, the same shape."""
        sets = self.grid.sets()
        if self.groups is None:
            return layer_norm_codes(x, self.weight, self.bias, self.eps, self.grid, sets)
        array = x.movedim(1, -1)
        codes = group_norm_codes(array, self.groups, self.weight, self.bias, self.eps, self.silu, self.grid, sets)
        return codes.movedim(-1, 1)


class KernelAttention(nn.Module):
    """Attention products of codes in one kernel; or, by policy "float", q, k and v on their grids and a float softmax.

    `dtype`: of its output.
    """

    def __init__(self, attention: IntegerAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.operand_scale, self.score_scale = attention.operand_scale, attention.score_scale
        self.policy, self.dtype = attention.policy, dtype
        grids = [getattr(attention, operand) for operand in "qkvw"]
        self.grids = nn.ModuleList(grids if self.policy == "float" else [KernelGrid(grid) for grid in grids])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [N, (heads,) L, d]; k: [N, (heads,) S, d]; v: [N, (heads,) S, e]. Returns [N, (heads,) L, e]."""
        if self.policy == "float":
            scales = self.operand_scale, self.operand_scale, 1.0
            snapped = (grid.snap(x.float() * by) for grid, x, by in zip(self.grids, (q, k, v), scales, strict=False))
            q, k, v = (x.to(self.dtype) for x in snapped)
            return F.scaled_dot_product_attention(q, k, v, scale=self.score_scale)
        headless = q.dim() == 3
        if headless:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        sets = self.grids[0].sets()
        out = integer_attention(q, k, v, Grids(*self.grids), sets, self.operand_scale, self.score_scale)
        return out.squeeze(1).to(self.dtype) if headless else out.to(self.dtype)


def plain_layer(layer: KernelLayer) -> nn.Module:
    """The layer with a dequantized weight in its dtype, its input not quantized: what it has to be faster than."""
    weight = torch.cat([part.weight.values() for part in layer.parts], 1)
    outputs, channels, *kernel = weight.shape
    has_bias = layer.bias is not None
    if layer.dims:
        kind, kernel = (nn.Conv2d, kernel) if layer.dims == 2 else (nn.Conv1d, kernel[1:])
        numbers = (getattr(layer.geometry, name)[-layer.dims :] for name in ("stride", "padding", "dilation"))
        with torch.device("meta"):
            plain = kind(channels, outputs, tuple(kernel), *numbers, bias=has_bias)
    else:
        with torch.device("meta"):
            plain = nn.Linear(channels, outputs, has_bias)
    weight = weight.reshape(plain.weight.shape).to(layer.dtype)
    if layer.dims == 2:
        weight = weight.contiguous(memory_format=torch.channels_last)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if has_bias:
        plain.bias = nn.Parameter(layer.bias.to(layer.dtype), requires_grad=False)
    return plain.eval()


class PlainAttention(nn.Module):
    """The products on float operands, by PyTorch's own kernels."""

    def __init__(self, attention: KernelAttention) -> None:
        super().__init__()
        self.scale = attention.operand_scale**2 * attention.score_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `KernelAttention`."""
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


def _pair(value: tuple[int, ...], vertical: int) -> tuple[int, int]:
    """Vertical and horizontal numbers of a Conv2d; a Conv1d has none of the first."""
    return (vertical, *value) if len(value) == 1 else tuple(value)


def _to_array(x: Tensor, dims: int) -> Tensor:
    """[N, C, H, W], [N, C, L] or [N, ..., C], by the layer's dimensions 2, 1 or 0. Returns it as [N, H, W, C]."""
    if dims == 2:
        return x.permute(0, 2, 3, 1)
    if dims == 1:
        return x.transpose(1, 2).unsqueeze(1)
    return x.reshape(x.shape[0], 1, -1, x.shape[-1])


def _from_array(y: Tensor, dims: int, x: Tensor) -> Tensor:
    """The inverse of `_to_array` for the output of a layer with input x."""
    if dims == 2:
        return y.permute(0, 3, 1, 2)
    if dims == 1:
        return y.squeeze(1).transpose(1, 2)
    return y.reshape(*x.shape[:-1], y.shape[-1])
