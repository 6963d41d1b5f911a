"""AdaRound's soft rounding and rounding by offsets, as pure functions of a weight, its rounding and its `Grid`."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.nn.grid import Grid, fused_kernels

GAMMA, ZETA = -0.1, 1.1  # ends of the stretched sigmoid, AdaRound (arXiv 2004.10568, eq. 23)


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


def soft_quantize(weight: Tensor, alpha: Tensor, grid: Grid) -> Tensor:
    """scale * (clip(floor(weight/scale) + h(alpha) + z, qmin, qmax) - z); gradients reach alpha."""
    scale, zero_point = grid.scale, grid.zero_point
    if torch.is_grad_enabled() and alpha.requires_grad and (kernels := fused_kernels(weight, scale)) is not None:
        return kernels.FusedSoftRound.apply(weight, scale, zero_point, alpha, grid.spec)
    codes = (torch.floor(weight / scale) + soft_round(alpha) + zero_point).clamp(grid.spec.qmin, grid.spec.qmax)
    return (codes - zero_point) * scale


def hard_codes(weight: Tensor, alpha: Tensor, grid: Grid) -> Tensor:
    """The codes clip(floor(weight/scale) + [alpha >= 0] + z, qmin, qmax) that `soft_quantize` hardens to, as float."""
    return offset_codes(weight, alpha >= 0, grid)


def offset_quantize(weight: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """scale * (clip(floor(weight/scale) + offset + z, qmin, qmax) - z).

    Gradients reach weight inside the range, straight through floor.
    """
    ratio = weight / grid.scale
    floored = ratio + (torch.floor(ratio) - ratio).detach()
    codes = (floored + offset + grid.zero_point).clamp(grid.spec.qmin, grid.spec.qmax)
    return (codes - grid.zero_point) * grid.scale


def offset_codes(weight: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """The codes of `offset_quantize`, as float. offset: whole numbers or booleans, of weight's shape."""
    codes = torch.floor(weight / grid.scale) + offset + grid.zero_point
    return codes.clamp(grid.spec.qmin, grid.spec.qmax)
