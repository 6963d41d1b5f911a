"""A quantization grid as one value: scale, zero point and spec, and what it does to numbers.

x = (code - zero_point) * scale, with whole codes from spec.qmin to spec.qmax.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import QuantSpec

MIN_SCALE = 1e-8  # the smallest scale that is found or learned: it keeps the grid of an all-zero channel finite


@dataclass(frozen=True, eq=False)
class Grid:
    """scale and zero_point: tensors of one shape, broadcastable to the numbers that are quantized.

    Quantizers hold a parameter set per group of steps, [groups] or [groups, C] with C input channels; `per_sample`
    makes of them what the running batch needs.
    """

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec

    def codes(self, x: Tensor) -> Tensor:
        """x: any shape. Returns the nearest codes, clipped to [qmin, qmax], as x's dtype."""
        return (x / self.scale).round_().add_(self.zero_point).clamp_(self.spec.qmin, self.spec.qmax)

    def centred(self, x: Tensor) -> Tensor:
        """x: any shape, of the grid's dtype. Returns code - zero_point, whole."""
        return self.codes(x).sub_(self.zero_point)

    def values(self, codes: Tensor) -> Tensor:
        """codes: any numeric dtype. Returns the values they stand for, (code - zero_point) * scale, as the scale."""
        return (codes.to(self.scale.dtype) - self.zero_point) * self.scale

    def snap(self, x: Tensor) -> Tensor:
        """Fake quantization: x, of any shape, moved to the nearest value of the grid; same shape and dtype.

        Gradients reach x (straight through, zero where clipped) and scale; on GPUs one fused kernel each way computes
        them (`qdiff.nn.fused`) where the tensor is contiguous and has a single scale. Without gradients, float32
        tensors on an accelerator under a single scale go through one fused kernel, which multiplies by 1/scale where
        the definition divides: an input within float32 rounding of a tie may take the neighbouring code. On the CPU
        that kernel is not vectorised and 20 times slower than the same steps in place (torch 2.15).
        """
        scale, zero_point, spec = self.scale, self.zero_point, self.spec
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
            kernels = fused_kernels(x, scale) if scale.numel() == 1 else None
            function = _FakeQuantize if kernels is None else kernels.FusedFakeQuantize
            return function.apply(x, scale, zero_point, spec.qmin, spec.qmax)
        if not x.is_cpu and x.dtype == torch.float32 and scale.numel() == 1:
            return self.snap_in_one_kernel(x)
        if spec.kind in ("signed", "unsigned"):  # the zero point is 0
            return (x / scale).round_().clamp_(spec.qmin, spec.qmax).mul_(scale)
        return self.centred(x).mul_(scale)

    def snap_in_one_kernel(self, x: Tensor) -> Tensor:
        """`snap` of a float32 tensor under one scale as a single kernel of PyTorch's, without gradients."""
        zero_point = self.zero_point.to(torch.int32).reshape(())
        return torch.fake_quantize_per_tensor_affine(
            x, self.scale.reshape(()), zero_point, self.spec.qmin, self.spec.qmax
        )

    def to(self, dtype: torch.dtype) -> Grid:
        """The grid with its tensors in a dtype."""
        return Grid(self.scale.to(dtype), self.zero_point.to(dtype), self.spec)

    def view(self, *shape: int) -> Grid:
        """The grid with its tensors in a shape."""
        return Grid(self.scale.view(shape), self.zero_point.view(shape), self.spec)

    def per_sample(self, x: Tensor, steps: StepTable, channel_axis: int) -> Grid:
        """Of parameter sets, [groups] or [groups, C], those of the running batch x, broadcastable to it.

        C is the width of x's `channel_axis`. Raises RuntimeError where the batch's timesteps are not known.
        """
        scale = _per_sample(self.scale, x, steps, channel_axis)
        return Grid(scale, _per_sample(self.zero_point, x, steps, channel_axis), self.spec)


def _per_sample(values: Tensor, x: Tensor, steps: StepTable, channel_axis: int) -> Tensor:
    index = steps.index
    if values.shape[0] == 1:
        chosen = values
    elif index is None:
        raise RuntimeError("parameter sets per step: the batch's timesteps were not given to the StepTable")
    elif len(index) == 1:
        chosen = values[index]
    else:  # heads folded into the batch axis repeat each sample's set
        chosen = values[index].repeat_interleave(x.shape[0] // index.shape[0], 0)
    if values.dim() == 1:
        return chosen.view(-1, *[1] * (x.dim() - 1)) if chosen.shape[0] > 1 else chosen
    shape = [1] * x.dim()
    shape[0], shape[channel_axis] = chosen.shape
    return chosen.view(shape)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through rounding with the clipping's true gradient, for x and for the scale.

    x^ = (clip(round(x/s) + z, qmin, qmax) - z) s: inside the range dx^/dx = 1 and dx^/ds = round(x/s) - x/s, outside
    dx^/dx = 0 and dx^/ds = clipped code - z (the gradient that autograd derives when round passes it straight through).
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        ratio = x / scale
        shifted = torch.round(ratio).add_(zero_point)
        centred = shifted.clamp(qmin, qmax)
        inside = centred == shifted
        centred.sub_(zero_point)
        ctx.save_for_backward(inside, torch.where(inside, centred - ratio, centred), scale)
        return centred * scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        inside, by_scale, scale = ctx.saved_tensors
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_scale = (grad * by_scale).sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        return grad_x, grad_scale, None, None, None


def fused_kernels(x: Tensor, scale: Tensor) -> ModuleType | None:
    """`qdiff.nn.fused` where its kernels take these tensors; CPUs never load it but to test it."""
    if x.is_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    from qdiff.nn import fused

    return fused if fused.available(x, scale) else None
