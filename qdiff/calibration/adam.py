"""Adam whose values that change from step to step are tables of tensors, so that a captured graph can replay a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class AdamGroup(NamedTuple):
    """Parameters with a rate for every step, known beforehand.

    relative: rates are shares of each value's magnitude at the beginning. by_row: a row (of axis 0) whose gradient is
    all zero was not part of the batch; it stays as it is, and every row counts its own steps. Without it the momentum
    of a row goes on moving it, and scales of step groups drift while other groups learn.
    """

    parameters: Sequence[nn.Parameter]
    rates: Tensor  # [steps]
    relative: bool = False
    by_row: bool = False


class Adam:
    """Algorithm 1 of arXiv 1412.6980; rounds as torch.optim.Adam does."""

    def __init__(self, groups: Sequence[AdamGroup | tuple]) -> None:
        """groups: `AdamGroup`s, or (parameters, rates) alone."""
        self._parts: list[_Part] = []
        for group in groups:
            parameters, rates, relative, by_row = AdamGroup(*group)
            self._parts += [(_Rows if by_row else _Part)(p, rates.double().cpu(), relative) for p in parameters]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.p.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients of the parameters that have one."""
        return [part.p.grad for part in self._parts if part.p.grad is not None]

    @torch.no_grad()
    def step(self, number: Tensor) -> None:
        """Take one step. number: [1] long, how many were taken before."""
        for part in self._parts:
            if part.p.grad is not None:
                part.step(part.p.grad, number)

    def state(self) -> list[Tensor]:
        """All that steps to come depend on: the parameters and their moments, to be copied or written to."""
        return [tensor for part in self._parts for tensor in part.state()]


class _Part:
    """One parameter with its moments."""

    def __init__(self, p: nn.Parameter, rates: Tensor, relative: bool) -> None:
        self.p, self.first, self.second = p, torch.zeros_like(p), torch.zeros_like(p)
        self.magnitude = p.detach().abs() if relative else None
        self._tables(rates)

    def _tables(self, rates: Tensor) -> None:
        count = torch.arange(1, len(rates) + 1, dtype=torch.float64)
        self.sizes = (-rates / (1 - BETA1**count)).to(self.p)
        self.roots = (1 - BETA2**count).sqrt().to(self.p)

    def state(self) -> list[Tensor]:
        """What `step` changes, and the magnitudes that it scales by."""
        return [self.p.data, self.first, self.second, *([] if self.magnitude is None else [self.magnitude])]

    def step(self, grad: Tensor, number: Tensor) -> None:
        """Move by a gradient."""
        self.first.lerp_(grad, 1 - BETA1)
        self.second.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        spread = self.second.sqrt().div_(self.roots.index_select(0, number)).add_(EPS)
        move = self.first.mul(self.sizes.index_select(0, number)).div_(spread)
        self.p.add_(move if self.magnitude is None else move.mul_(self.magnitude))


class _Rows(_Part):
    """One parameter whose rows move on their own."""

    def _tables(self, rates: Tensor) -> None:
        self.rates = rates.to(self.p)
        self.count = torch.zeros(self.p.shape[:1], dtype=torch.float64, device=self.p.device)

    def state(self) -> list[Tensor]:
        return [*super().state(), self.count]

    def step(self, grad: Tensor, number: Tensor) -> None:
        shape = (-1, *[1] * (grad.dim() - 1))
        present = (grad != 0).reshape(len(grad), -1).any(1)
        self.count.add_(present)
        steps, present = self.count.clamp_min(1), present.view(shape)
        self.first.copy_(torch.where(present, self.first.lerp(grad, 1 - BETA1), self.first))
        self.second.copy_(
            torch.where(present, self.second.mul(BETA2).addcmul(grad, grad, value=1 - BETA2), self.second)
        )
        root = (1 - BETA2**steps).sqrt().to(grad).view(shape)
        size = (-self.rates.index_select(0, number) / (1 - BETA1**steps)).to(grad).view(shape)
        move = self.first * size / (self.second.sqrt() / root + EPS)
        move = move if self.magnitude is None else move * self.magnitude
        self.p.add_(torch.where(present, move, torch.zeros_like(move)))
