"""Quantization arithmetic as pure functions: rounding, grids, AdaRound's soft rounding. Modules only hold arguments."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from qdiff.recipes.recipe import QuantSpec

GAMMA, ZETA = -0.1, 1.1  # ends of the stretched sigmoid, AdaRound (arXiv 2004.10568, eq. 23)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """x: any shape; scale, zero_point: broadcastable to it. Returns the codes in [qmin, qmax], as x's dtype."""
    return (torch.round(x / scale) + zero_point).clamp_(spec.qmin, spec.qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """codes: any numeric dtype; scale, zero_point: broadcastable to it. Returns (codes - z) * scale, as scale."""
    return (codes.to(scale.dtype) - zero_point) * scale


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


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """x: any shape; scale, zero_point: broadcastable to it. Returns x snapped to the grid, same shape and dtype.

    Gradients reach x (straight through, zero where clipped) and scale; on GPUs one fused kernel each way computes them
    (`qdiff.nn.fused`) where the tensor is contiguous and has a single scale. Without gradients, float32 tensors on an
    accelerator under a single scale go through one fused kernel, which multiplies by 1/scale where the definition
    divides: an input within float32 rounding of a tie may take the neighbouring code. On the CPU that kernel is not
    vectorised and 20 times slower than the same steps in place (torch 2.15).
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        kernels = fused_kernels(x, scale) if scale.numel() == 1 else None
        function = _FakeQuantize if kernels is None else kernels.FusedFakeQuantize
        return function.apply(x, scale, zero_point, spec.qmin, spec.qmax)
    if not x.is_cpu and x.dtype == torch.float32 and scale.numel() == 1:
        return fused_fake_quantize(x, scale, zero_point, spec)
    snapped = (x / scale).round_()
    if spec.kind in ("signed", "unsigned"):  # the zero point is 0
        return snapped.clamp_(spec.qmin, spec.qmax).mul_(scale)
    return snapped.add_(zero_point).clamp_(spec.qmin, spec.qmax).sub_(zero_point).mul_(scale)


def fused_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """`fake_quantize` of a float32 tensor under one scale as a single kernel of PyTorch's, without gradients."""
    zero = zero_point.to(torch.int32).reshape(())
    return torch.fake_quantize_per_tensor_affine(x, scale.reshape(()), zero, spec.qmin, spec.qmax)


def fused_kernels(x: Tensor, scale: Tensor) -> ModuleType | None:
    """`qdiff.nn.fused` where its kernels take these tensors; CPUs never load it but to test it."""
    if x.is_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    from qdiff.nn import fused

    return fused if fused.available(x, scale) else None


def soft_round(alpha: Tensor) -> Tensor:
    """h(alpha) in [0, 1], the share of a step that AdaRound adds to floor(w / scale); same shape as the weight."""
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def soft_round_inverse(h: Tensor) -> Tensor:
    """alpha with soft_round(alpha) = h, for h in [0, 1]: AdaRound's start, where h is the fraction of w / scale."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def sharpen(h: Tensor, exponent: float) -> Tensor:
    """h in [0, 1] moved towards the nearer end: h^n / (h^n + (1 - h)^n). 0, 1/2 and 1 stay; n = 1 changes nothing."""
    up, down = h.pow(exponent), (1 - h).pow(exponent)
    return up / (up + down)


def soft_quantize(base: Tensor, scale: Tensor, zero_point: Tensor, alpha: Tensor, spec: QuantSpec) -> Tensor:
    """The weight scale * (clip(floor(base/scale) + h(alpha) + z, qmin, qmax) - z); gradients reach alpha."""
    if torch.is_grad_enabled() and alpha.requires_grad and (kernels := fused_kernels(base, scale)) is not None:
        return kernels.FusedSoftRound.apply(base, scale, zero_point, alpha, spec)
    codes = (torch.floor(base / scale) + soft_round(alpha) + zero_point).clamp(spec.qmin, spec.qmax)
    return (codes - zero_point) * scale


def hard_codes(base: Tensor, scale: Tensor, zero_point: Tensor, alpha: Tensor, spec: QuantSpec) -> Tensor:
    """The codes clip(floor(base/scale) + [alpha >= 0] + z, qmin, qmax) that `soft_quantize` hardens to, as float."""
    return (torch.floor(base / scale) + (alpha >= 0) + zero_point).clamp(spec.qmin, spec.qmax)


def offset_quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, offset: Tensor, spec: QuantSpec) -> Tensor:
    """The weight scale * (clip(floor(weight/scale) + offset + z, qmin, qmax) - z); gradients reach weight inside the
    range, straight through floor."""
    ratio = weight / scale
    floored = ratio + (torch.floor(ratio) - ratio).detach()
    return ((floored + offset + zero_point).clamp(spec.qmin, spec.qmax) - zero_point) * scale


def offset_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, offset: Tensor, spec: QuantSpec) -> Tensor:
    """The codes of `offset_quantize`, as float."""
    return (torch.floor(weight / scale) + offset + zero_point).clamp(spec.qmin, spec.qmax)
