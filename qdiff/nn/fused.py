"""Fake quantization and soft rounding as one GPU kernel each way, for float32 tensors while units learn.

The same arithmetic as `qdiff.nn.grid` and `qdiff.nn.functional`, step by step, so that results agree to the last bit
but for the scale's gradient, a sum taken in another order. Written in Triton, which comes with PyTorch on Linux;
elsewhere `available` is False. With TRITON_INTERPRET=1 the kernels also run on the CPU, for tests.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from qdiff.recipes.recipe import QuantSpec

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform
    triton = None

BLOCK = 1024
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def available(x: Tensor, scale: Tensor) -> bool:
    """Whether the kernels take a tensor: float32, contiguous, on a GPU (or interpreted), with float32 scales."""
    placed = x.is_cuda or INTERPRETED
    return triton is not None and placed and x.dtype == scale.dtype == torch.float32 and x.is_contiguous()


def _grid(count: int) -> tuple[int]:
    return (triton.cdiv(count, BLOCK),)


if triton is not None:
    FAR = tl.constexpr(2097152.0)  # ratios beyond it are clipped whatever they round to
    MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds a smaller float32 to whole numbers, ties to even
    STRETCH = tl.constexpr(1.2)  # ZETA - GAMMA of qdiff.nn.functional
    OFFSET = tl.constexpr(-0.1)  # GAMMA

    @triton.jit
    def _round(ratio):
        return (tl.minimum(tl.maximum(ratio, -FAR), FAR) + MAGIC) - MAGIC

    @triton.jit
    def _fake_quantize_forward(x_at, scale_at, zero_at, out_at, count, qmin, qmax, size: tl.constexpr):
        offsets = tl.program_id(0) * size + tl.arange(0, size)
        inside = offsets < count
        x = tl.load(x_at + offsets, mask=inside, other=0.0)
        scale, zero = tl.load(scale_at), tl.load(zero_at)
        codes = tl.minimum(tl.maximum(_round(tl.div_rn(x, scale)) + zero, qmin), qmax)
        tl.store(out_at + offsets, (codes - zero) * scale, mask=inside)

    @triton.jit
    def _fake_quantize_backward(
        x_at, grad_at, scale_at, zero_at, grad_x_at, sums_at, count, qmin, qmax, size: tl.constexpr
    ):
        offsets = tl.program_id(0) * size + tl.arange(0, size)
        inside = offsets < count
        x = tl.load(x_at + offsets, mask=inside, other=0.0)
        grad = tl.load(grad_at + offsets, mask=inside, other=0.0)
        scale, zero = tl.load(scale_at), tl.load(zero_at)
        ratio = tl.div_rn(x, scale)
        shifted = _round(ratio) + zero
        codes = tl.minimum(tl.maximum(shifted, qmin), qmax)
        kept = codes == shifted
        by_scale = tl.where(kept, (codes - zero) - ratio, codes - zero)
        tl.store(grad_x_at + offsets, tl.where(kept, grad, 0.0), mask=inside)
        tl.store(sums_at + tl.program_id(0), tl.sum(grad * by_scale))

    @triton.jit
    def _soft_round_forward(base_at, scale_at, zero_at, alpha_at, out_at, count, width, qmin, qmax, size: tl.constexpr):
        offsets = tl.program_id(0) * size + tl.arange(0, size)
        inside = offsets < count
        base = tl.load(base_at + offsets, mask=inside, other=0.0)
        alpha = tl.load(alpha_at + offsets, mask=inside, other=0.0)
        scale = tl.load(scale_at + offsets // width, mask=inside, other=1.0)
        zero = tl.load(zero_at + offsets // width, mask=inside, other=0.0)
        share = tl.minimum(tl.maximum(tl.sigmoid(alpha) * STRETCH + OFFSET, 0.0), 1.0)
        codes = tl.minimum(tl.maximum(tl.floor(tl.div_rn(base, scale)) + share + zero, qmin), qmax)
        tl.store(out_at + offsets, (codes - zero) * scale, mask=inside)

    @triton.jit
    def _soft_round_backward(
        base_at, scale_at, zero_at, alpha_at, grad_at, grad_alpha_at, count, width, qmin, qmax, size: tl.constexpr
    ):
        offsets = tl.program_id(0) * size + tl.arange(0, size)
        inside = offsets < count
        base = tl.load(base_at + offsets, mask=inside, other=0.0)
        alpha = tl.load(alpha_at + offsets, mask=inside, other=0.0)
        grad = tl.load(grad_at + offsets, mask=inside, other=0.0)
        scale = tl.load(scale_at + offsets // width, mask=inside, other=1.0)
        zero = tl.load(zero_at + offsets // width, mask=inside, other=0.0)
        sigmoid = tl.sigmoid(alpha)
        raw = sigmoid * STRETCH + OFFSET
        share = tl.minimum(tl.maximum(raw, 0.0), 1.0)
        codes = tl.floor(tl.div_rn(base, scale)) + share + zero
        passes = (raw >= 0.0) & (raw <= 1.0) & (codes >= qmin) & (codes <= qmax)
        slope = sigmoid * (1.0 - sigmoid) * STRETCH
        tl.store(grad_alpha_at + offsets, tl.where(passes, grad * scale * slope, 0.0), mask=inside)


class FusedFakeQuantize(torch.autograd.Function):
    """`qdiff.nn.grid.Grid.snap` under a single scale; keeps only x for the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        out, count = torch.empty_like(x), x.numel()
        if count:
            _fake_quantize_forward[_grid(count)](x, scale, zero_point, out, count, float(qmin), float(qmax), BLOCK)
        ctx.save_for_backward(x, scale, zero_point)
        ctx.bounds = float(qmin), float(qmax)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        count, grad = x.numel(), grad.contiguous()
        grad_x, sums = torch.empty_like(x), torch.zeros(max(1, triton.cdiv(count, BLOCK)), device=x.device)
        if count:
            arguments = (x, grad, scale, zero_point, grad_x, sums, count, *ctx.bounds, BLOCK)
            _fake_quantize_backward[_grid(count)](*arguments)
        return grad_x, sums.sum().reshape(scale.shape), None, None, None


class FusedSoftRound(torch.autograd.Function):
    """`qdiff.nn.functional.soft_quantize` for a scale per output channel; gradients reach alpha alone."""

    @staticmethod
    def forward(ctx, base: Tensor, scale: Tensor, zero_point: Tensor, alpha: Tensor, spec: QuantSpec) -> Tensor:
        out, count = torch.empty_like(base), base.numel()
        ctx.numbers = count, count // scale.numel(), float(spec.qmin), float(spec.qmax)
        _soft_round_forward[_grid(count)](base, scale, zero_point, alpha, out, *ctx.numbers, BLOCK)
        ctx.save_for_backward(base, scale, zero_point, alpha)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        base, scale, zero_point, alpha = ctx.saved_tensors
        grad_alpha, grad = torch.empty_like(alpha), grad.contiguous()
        arguments = (base, scale, zero_point, alpha, grad, grad_alpha, *ctx.numbers, BLOCK)
        _soft_round_backward[_grid(base.numel())](*arguments)
        return None, None, None, grad_alpha, None
