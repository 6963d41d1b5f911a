"""Layers that hold integer codes and compute with them; the network around them stays the family's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.checkpoints.packing import pack_codes, unpack_codes
from qdiff.deploy.integer import accumulate
from qdiff.nn.grid import Grid
from qdiff.nn.layers import QuantAttention, QuantConv, QuantLayer
from qdiff.nn.quantizers import ActQuantizer
from qdiff.nn.step_table import StepTable
from qdiff.nn.unowned import Unowned

ATTENTION_POLICIES = ("integer", "float")


class OperandGrid(nn.Module):
    """Holds the grid of one operand, with a parameter set per group of steps.

    scale float32 and zero_point int32: [groups], or [groups, channels] for a grid per input channel.
    """

    def __init__(self, quantizer: ActQuantizer, steps: StepTable) -> None:
        super().__init__()
        self.spec, self.channel_axis = quantizer.spec, quantizer.channel_axis
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero_point", quantizer.zero_point.to(torch.int32))
        self._steps = Unowned(steps)

    @property
    def steps(self) -> StepTable:
        """The table that says which parameter set a sample takes."""
        return self._steps.module

    @property
    def per_channel(self) -> bool:
        """Whether every input channel has a scale of its own, which no integer product can be factored out of."""
        return self.scale.dim() > 1

    @property
    def grid(self) -> Grid:
        """The parameter sets of all groups."""
        return Grid(self.scale, self.zero_point, self.spec)

    def grid_of(self, x: Tensor) -> Grid:
        """x: the running batch, [N, C, ...] or [N, ..., C]. Returns its grid in x's dtype, broadcastable to x."""
        return self.grid.per_sample(x, self.steps, self.channel_axis).to(x.dtype)

    def snap(self, x: Tensor) -> Tensor:
        """x on its grid, as the simulation has it."""
        return self.grid_of(x).snap(x)


class IntegerPart(nn.Module):
    """One part of a layer: all its input channels, or one side of a split shortcut.

    packed: uint8 [bytes], the codes [O, channels, ...] as `qdiff.checkpoints.packing` packs them; scale float32 [O] and
    zero_point int32 [O] of the weight; `input` the grid of the input, None where that stays float.
    """

    def __init__(
        self, channels: slice, shape: tuple[int, ...], packed: Tensor, grid: Grid, input_grid: OperandGrid | None
    ) -> None:
        """shape: [O, channels, ...]; grid: the weight's, one scale and zero point or O of them, in any shape."""
        super().__init__()
        self.channels, self.shape, self.spec = channels, tuple(shape), grid.spec
        self.input = input_grid
        self.register_buffer("packed", packed)
        self.register_buffer("scale", grid.scale.detach().float().flatten().expand(shape[0]).contiguous())
        zero_point = grid.zero_point.to(torch.int32).flatten().expand(shape[0])
        self.register_buffer("zero_point", zero_point.contiguous())

    @property
    def grid(self) -> Grid:
        """The weight's, [O]."""
        return Grid(self.scale, self.zero_point, self.spec)

    @property
    def integer(self) -> bool:
        """Whether input and weight have grids of which an integer product can be made."""
        return self.input is not None and not self.input.per_channel

    @property
    def terms(self) -> int:
        """Products in each of the layer's sums."""
        return int(torch.Size(self.shape[1:]).numel())

    def codes(self) -> Tensor:
        """[O, channels, ...] int16, in [qmin, qmax]."""
        return unpack_codes(self.packed, self.spec.bits, self.shape, self.spec.qmin).to(self.packed.device, torch.int16)

    def centred(self) -> Tensor:
        """[O, channels, ...] int16: code - zero point."""
        return self.codes() - self._rows(self.zero_point).to(torch.int16)

    def weight(self) -> Tensor:
        """[O, channels, ...] in the scales' dtype: the weights that the codes stand for."""
        return self.centred().to(self.scale.dtype) * self._rows(self.scale)

    def _rows(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (len(self.shape) - 1))


class IntegerLayer(nn.Module):
    """y = sum over parts of s_w s_a sum (q_w - z_w)(q_a - z_a), plus bias; sums are exact.

    Where the input has no grid, or one per channel, the snapped input meets the dequantized weight of one layer at a
    time.
    """

    kind, channel_axis = "", 1

    def __init__(self, bias: nn.Parameter | None, parts: list[IntegerPart], steps: StepTable) -> None:
        super().__init__()
        self.bias = bias
        self.parts = nn.ModuleList(parts)
        self._steps = Unowned(steps)

    @property
    def steps(self) -> StepTable:
        """The table that says which parameter set a sample takes."""
        return self._steps.module

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's linear map without its bias."""
        raise TypeError(f"{type(self).__name__} has no product")

    def rows(self, values: Tensor) -> Tensor:
        """values: [O], one per output channel. Returns them broadcastable to the output."""
        raise TypeError(f"{type(self).__name__} has no rows")

    def forward_part(self, part: IntegerPart, x: Tensor) -> Tensor:
        """x: the part's input. Returns its share of the output, in x's dtype."""
        if not part.integer:
            snapped = x if part.input is None else part.input.snap(x)
            return self.product(snapped, part.weight().to(x.dtype))
        grid = part.input.grid_of(x)
        sums = accumulate(grid.centred(x), part.centred(), part.terms, self.product)
        return sums.to(x.dtype).mul_(grid.scale * self.rows(part.scale.to(x.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        shares = (self.forward_part(part, x_part) for part, x_part in zip(self.parts, self.split(x), strict=True))
        out = next(shares)
        for share in shares:
            out = out.add_(share)
        return out if self.bias is None else out.add_(self.rows(self.bias.to(x.dtype)))

    def split(self, x: Tensor) -> list[Tensor]:
        """The input's channels, part by part."""
        axis = self.channel_axis % x.dim()
        return [x.narrow(axis, p.channels.start, p.channels.stop - p.channels.start) for p in self.parts]


class IntegerConv(IntegerLayer):
    """A Conv1d or Conv2d of codes. Padding has value 0, hence centred code 0."""

    kind = "conv"

    def __init__(self, layer: QuantConv, parts: list[IntegerPart], steps: StepTable) -> None:
        super().__init__(layer.bias, parts, steps)
        self.kernel_size = layer.kernel_size
        self.stride, self.padding, self.dilation = (layer.geometry[k] for k in ("stride", "padding", "dilation"))
        self._convolve = F.conv2d if len(parts[0].shape) == 4 else F.conv1d

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._convolve(x, weight, None, self.stride, self.padding, self.dilation)

    def rows(self, values: Tensor) -> Tensor:
        return values.view(1, -1, *[1] * len(self.kernel_size))


class IntegerLinear(IntegerLayer):
    """A Linear of codes; the input's channels are its last axis."""

    kind, channel_axis = "linear", -1

    def __init__(self, layer: QuantLayer, parts: list[IntegerPart], steps: StepTable) -> None:
        super().__init__(layer.bias, parts, steps)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def rows(self, values: Tensor) -> Tensor:
        return values


class IntegerAttention(nn.Module):
    """Attention products of codes: scores s_q s_k sum (q_q - z_q)(q_k - z_k), softmax, and its codes with those of v.

    `policy` "float": q, k and v are snapped to their grids, and the softmax output is not (fused attention kernels).
    """

    def __init__(self, layer: QuantAttention, steps: StepTable, policy: str = "integer") -> None:
        super().__init__()
        if policy not in ATTENTION_POLICIES:
            raise ValueError(f"attention policy: expected {' or '.join(ATTENTION_POLICIES)}, found {policy!r}")
        self.operand_scale, self.score_scale, self.policy = layer.operand_scale, layer.score_scale, policy
        for operand in "qkvw":
            setattr(self, operand, OperandGrid(getattr(layer, f"act_quantizer_{operand}"), steps))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [..., L, d]; k: [..., S, d]; v: [..., S, e]. Returns [..., L, e]."""
        if self.operand_scale != 1.0:
            q, k = q * self.operand_scale, k * self.operand_scale
        if self.policy == "float":
            operands = self.q.snap(q), self.k.snap(k), self.v.snap(v)
            return F.scaled_dot_product_attention(*operands, scale=self.score_scale)
        scores = _matmul(self.q, q, self.k, k, transposed=True) * self.score_scale
        return _matmul(self.w, scores.softmax(-1), self.v, v, transposed=False)


def _matmul(a_operand: OperandGrid, a: Tensor, b_operand: OperandGrid, b: Tensor, transposed: bool) -> Tensor:
    """The product of two operands, of the second's transpose if `transposed`, through their codes."""
    a_grid, b_grid = a_operand.grid_of(a), b_operand.grid_of(b)
    b_codes = b_grid.centred(b)
    sums = accumulate(
        a_grid.centred(a), b_codes.transpose(-1, -2) if transposed else b_codes, a.shape[-1], torch.matmul
    )
    return sums.to(a.dtype).mul_(a_grid.scale * b_grid.scale)


def packed_parts(layer: QuantLayer, packed: Tensor, steps: StepTable) -> list[IntegerPart]:
    """The parts of a calibrated layer with the given codes, packed; the layer's own may be absent (meta)."""
    quantizers, spec = layer.act_quantizers, layer.weight_quantizers[0].spec
    codes = unpack_codes(packed, spec.bits, layer.weight.shape, spec.qmin) if len(layer.slices) > 1 else None
    parts = []
    for i, (channels, quantizer) in enumerate(zip(layer.slices, layer.weight_quantizers, strict=True)):
        grid = OperandGrid(quantizers[i], steps) if quantizers and quantizers[i].enabled else None
        shape = (layer.weight.shape[0], channels.stop - channels.start, *layer.weight.shape[2:])
        own = packed if codes is None else pack_codes(codes[:, channels], spec.bits, spec.qmin).to(packed.device)
        parts.append(IntegerPart(channels, shape, own, quantizer.grid, grid))
    return parts


def integer_layer(layer: QuantLayer, packed: Tensor, steps: StepTable) -> IntegerLayer:
    """The layer without its float weight. packed: uint8 [bytes], its codes [O, C, ...] by
    `qdiff.checkpoints.packing`."""
    kind = IntegerConv if isinstance(layer, QuantConv) else IntegerLinear
    return kind(layer, packed_parts(layer, packed, steps), steps).train(layer.training)
