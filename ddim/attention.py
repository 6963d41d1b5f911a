"""The two attention products as a module of their own, so that another implementation can take its place."""

import torch.nn.functional as F
from torch import Tensor, nn


class DotProductAttention(nn.Module):
    """softmax(score_scale · (operand_scale·q)(operand_scale·k)ᵀ) v, without parameters or buffers.

    Families differ in where they put the scale: on the scores (C^-1/2, here) or on both operands (d^-1/4).
    """

    def __init__(self, operand_scale: float = 1.0, score_scale: float = 1.0):
        super().__init__()
        self.operand_scale = operand_scale
        self.score_scale = score_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [..., L, d]; k: [..., S, d]; v: [..., S, e]. Returns [..., L, e]."""
        return F.scaled_dot_product_attention(q, k, v, scale=self.operand_scale**2 * self.score_scale)

    def extra_repr(self) -> str:
        return f"operand_scale={self.operand_scale:g}, score_scale={self.score_scale:g}"
