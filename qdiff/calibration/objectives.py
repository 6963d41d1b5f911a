"""What a unit minimises while it learns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qdiff.nn.functional import soft_round
from qdiff.recipes.stages import Loss, RoundingPenalty


def lp_loss(output: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """output, target: the same shape, axis 1 the channels. Returns the scalar L_p of `loss` (methods §0)."""
    error = (output - target).abs()
    error = error.square() if loss.p == 2 else error.pow(loss.p)
    return error.mean() if loss.reduction == "mean" else error.sum(1).mean()


def temperature(penalty: RoundingPenalty, iteration: int, iterations: int) -> float | None:
    """beta of AdaRound's penalty at an iteration; None during the warm-up, in which the penalty is off."""
    start = penalty.warmup * iterations
    if iteration < start:
        return None
    share = (iteration - start) / max(1.0, iterations - start)
    return penalty.beta_end + (penalty.beta_start - penalty.beta_end) * max(0.0, 1 - share)


def penalty_table(penalty: RoundingPenalty | None, iterations: int) -> Tensor:
    """[iterations] float32: beta at every iteration, 0 while the penalty is off."""
    if penalty is None:
        return torch.zeros(iterations)
    return torch.tensor([temperature(penalty, i, iterations) or 0.0 for i in range(iterations)])


def rounding_penalty(alphas: Sequence[Tensor], penalty: RoundingPenalty, beta: Tensor) -> Tensor:
    """weight * sum(1 - |2 h(alpha) - 1|^beta) over all the variables. beta: [1]."""
    return penalty.weight * sum((1 - (2 * soft_round(a) - 1).abs().pow(beta.to(a.dtype))).sum() for a in alphas)
