"""Adam whose values that change from step to step are tables of tensors, so that a captured graph can replay a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Adam:
    """Algorithm 1 of arXiv 1412.6980 with a rate for every step, known beforehand; rounds as torch.optim.Adam does.

    groups: (parameters, rates [steps]) of each parameter group.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[nn.Parameter], Tensor]]) -> None:
        self._parts: list[tuple[nn.Parameter, Tensor, Tensor, Tensor, Tensor]] = []
        for parameters, rates in groups:
            count = torch.arange(1, len(rates) + 1, dtype=torch.float64)
            sizes = rates.double().cpu() / (1 - BETA1**count)
            roots = (1 - BETA2**count).sqrt()
            for p in parameters:
                tables = (table.to(p) for table in (-sizes, roots))
                self._parts.append((p, torch.zeros_like(p), torch.zeros_like(p), *tables))

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p, *_ in self._parts:
            p.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients of the parameters that have one."""
        return [p.grad for p, *_ in self._parts if p.grad is not None]

    @torch.no_grad()
    def step(self, number: Tensor) -> None:
        """Take one step. number: [1] long, how many were taken before."""
        for p, first, second, sizes, roots in self._parts:
            if p.grad is None:
                continue
            first.lerp_(p.grad, 1 - BETA1)
            second.mul_(BETA2).addcmul_(p.grad, p.grad, value=1 - BETA2)
            spread = second.sqrt().div_(roots.index_select(0, number)).add_(EPS)
            p.add_(first.mul(sizes.index_select(0, number)).div_(spread))
