"""Quantized layers: convolutions, linear layers and attention products, with the parameter names of the float ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.nn.quantizers import ActQuantizer, FloorRounding, SoftRounding, WeightQuantizer
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import QuantSpec

PART_SUFFIXES = ("", "_0")  # names of the two parts of a split layer, as published checkpoints have them


class QuantLayer(nn.Module):
    """A layer whose weight and input are snapped to grids; a split one has two of each, cut at an input channel.

    `weight` is the float weight until `freeze`; then it is the dequantized one, folded once, and `codes` hold the
    integers. While a rounding is learned, `rounding` gives the weight. `boundary` is the first input channel of the
    second part, or None.
    """

    channel_axis = 1  # of the layer's input

    def __init__(
        self,
        layer: nn.Module,
        weight_spec: QuantSpec | None,
        act_spec: QuantSpec | None,
        steps: StepTable,
        boundary: int | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        channels = layer.weight.shape[1]
        if boundary is not None and not 0 < boundary < channels:
            raise ValueError(f"split at channel {boundary}: expected 1 to {channels - 1}")
        self.boundary = boundary
        edges = (0, channels) if boundary is None else (0, boundary, channels)
        self.slices = tuple(slice(a, b) for a, b in zip(edges, edges[1:], strict=False))
        self.rounding: nn.ModuleList | None = None
        self.frozen = False
        for part, suffix in zip(self.slices, PART_SUFFIXES, strict=False):
            if weight_spec is not None:
                setattr(self, f"weight_quantizer{suffix}", WeightQuantizer(weight_spec, layer.weight[:, part]))
            if act_spec is not None:
                quantizer = ActQuantizer(act_spec, steps, part.stop - part.start, self.channel_axis)
                setattr(self, f"act_quantizer{suffix}", quantizer)
        if weight_spec is not None:
            dtype = torch.int8 if weight_spec.qmin < 0 else torch.uint8
            codes = torch.zeros(layer.weight.shape, dtype=dtype, device=layer.weight.device)
            self.register_buffer("codes", codes, persistent=False)

    def _quantizers(self, kind: str) -> list[nn.Module]:
        names = [f"{kind}{suffix}" for suffix in PART_SUFFIXES]
        return [getattr(self, name) for name in names if hasattr(self, name)]

    @property
    def weight_quantizers(self) -> list[WeightQuantizer]:
        """One, or one per part of a split layer; none if the weight stays float."""
        return self._quantizers("weight_quantizer")

    @property
    def act_quantizers(self) -> list[ActQuantizer]:
        """One, or one per part of a split layer; none if the input stays float."""
        return self._quantizers("act_quantizer")

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's linear map with its bias."""
        raise TypeError(f"{type(self).__name__} has no product")

    def quantize_input(self, x: Tensor) -> Tensor:
        """The layer's input on its grid, part by part."""
        quantizers = self.act_quantizers
        if len(quantizers) < 2:
            return quantizers[0](x) if quantizers else x
        widths = [part.stop - part.start for part in self.slices]
        parts = zip(quantizers, x.split(widths, self.channel_axis), strict=True)
        return torch.cat([quantizer(part) for quantizer, part in parts], self.channel_axis)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.rounding is None else torch.cat([r() for r in self.rounding], 1)
        return self.product(self.quantize_input(x), weight)

    def nearest_codes(self, weight: Tensor) -> Tensor:
        """weight: as the layer's. Returns the nearest codes on the layer's grids, as float."""
        parts = zip(self.slices, self.weight_quantizers, strict=True)
        return torch.cat([q.grid.codes(weight[:, part]) for part, q in parts], 1)

    @torch.no_grad()
    def freeze(self, codes: Tensor) -> None:
        """Store integer codes (any numeric dtype) and fold them into the weight; a learned rounding is dropped."""
        self.rounding = None
        self.codes.copy_(codes)
        self.fold()
        self.frozen = True

    def materialize(self) -> None:
        """Give weight and codes, on the meta device until now, memory beside the scales."""
        device = self.weight_quantizers[0].scale.device
        self.weight = nn.Parameter(torch.empty_like(self.weight, device=device), requires_grad=False)
        self.codes = torch.empty_like(self.codes, device=device)

    @torch.no_grad()
    def fold(self) -> None:
        """Compute the weight from the codes, in the scales' dtype."""
        parts = zip(self.slices, self.weight_quantizers, strict=True)
        self.weight.copy_(torch.cat([q.grid.values(self.codes[:, part]) for part, q in parts], 1))

    def start_rounding(self, base: Tensor, exponent: float = 1.0) -> list[nn.Parameter]:
        """Let the weight be learned from `base` by soft rounding. Returns the variables, one per part."""
        parts = zip(self.slices, self.weight_quantizers, strict=True)
        self.rounding = nn.ModuleList([SoftRounding(base[:, part], q, exponent) for part, q in parts])
        return [r.alpha for r in self.rounding]

    def start_finetuning(self, base: Tensor) -> list[nn.Parameter]:
        """Let the float weight `base` be learned under its frozen grid and rounding. Returns the parameters, one per
        part; the layer must have codes."""
        parts = zip(self.slices, self.weight_quantizers, strict=True)
        rounding = [FloorRounding(base[:, part], self.codes[:, part], q) for part, q in parts]
        self.rounding = nn.ModuleList(rounding)
        return [r.weight for r in rounding]

    def finish_rounding(self) -> None:
        """Harden a learned rounding, if there is one, and freeze its codes."""
        if self.rounding is not None:
            self.freeze(torch.cat([r.codes() for r in self.rounding], 1))


class QuantConv(QuantLayer):
    """A quantized Conv1d or Conv2d."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d, *args, **kwargs) -> None:
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise ValueError(f"no quantized form for a convolution with groups or padding_mode: {layer}")
        super().__init__(layer, *args, **kwargs)
        self.geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.kernel_size = layer.kernel_size
        self._convolve = F.conv2d if layer.weight.dim() == 4 else F.conv1d

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._convolve(x, weight, self.bias, **self.geometry)


class QuantLinear(QuantLayer):
    """A quantized Linear; the input's channels are its last axis."""

    channel_axis = -1

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class QuantAttention(nn.Module):
    """Attention products with quantized operands: q, k, the softmax output (w) and v.

    q and k are each multiplied by `operand_scale` before they are quantized, the scores by `score_scale` after their
    product. Operands: [..., tokens, channels]. `policy` is how integer runtimes carry the products out, which a
    checkpoint records (docs/integer.md).
    """

    policy = "integer"

    def __init__(self, product: nn.Module, act_spec: QuantSpec, softmax_spec: QuantSpec, steps: StepTable) -> None:
        super().__init__()
        self.operand_scale, self.score_scale = product.operand_scale, product.score_scale
        for operand in ("q", "k", "v"):
            setattr(self, f"act_quantizer_{operand}", ActQuantizer(act_spec, steps))
        self.act_quantizer_w = ActQuantizer(softmax_spec, steps)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.operand_scale != 1.0:
            q, k = q * self.operand_scale, k * self.operand_scale
        q, k, v = self.act_quantizer_q(q), self.act_quantizer_k(k), self.act_quantizer_v(v)
        scores = (q @ k.transpose(-1, -2)) * self.score_scale
        return self.act_quantizer_w(scores.softmax(-1)) @ v


QUANT_LAYERS: dict[type, type[QuantLayer]] = {nn.Conv2d: QuantConv, nn.Conv1d: QuantConv, nn.Linear: QuantLinear}


def quant_layers(module: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers inside, by dotted name, in the order of definition."""
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantLayer)}


def act_quantizers(module: nn.Module) -> dict[str, ActQuantizer]:
    """The activation quantizers inside, by dotted name, in the order of definition."""
    return {name: m for name, m in module.named_modules() if isinstance(m, ActQuantizer)}


def to_double(network: nn.Module) -> nn.Module:
    """The network in float64, its folded weights computed anew from the codes so that they are exact in it."""
    network.double()
    for layer in quant_layers(network).values():
        if layer.frozen:
            layer.fold()
    return network


def learnable_scales(modules: Sequence[ActQuantizer]) -> list[nn.Parameter]:
    """The scales of enabled quantizers of at most 8 bits (16-bit softmax outputs are never learned)."""
    return [q.scale for q in modules if q.enabled and q.spec.bits <= 8]
