"""Which of the float sampling states calibrate a network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.calibration.trajectories import CONDITIONING, Trajectories
from qdiff.spec import Selector


@dataclass(frozen=True)
class CalibrationSet:
    """x: [N, C, H, W] states, t: [N] timesteps, step: [N] index of the recorded step each state comes from.

    context: [N, ...] conditioning of each state, for networks that have one.
    """

    x: Tensor
    t: Tensor
    step: Tensor
    context: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def subset(self, index: Tensor) -> CalibrationSet:
        """index: [M] long. Returns those states."""
        context = None if self.context is None else self.context[index]
        return CalibrationSet(self.x[index], self.t[index], self.step[index], context)

    def digest(self) -> str:
        """SHA-256 of the states."""
        found = hashlib.sha256()
        for tensor in (self.x, self.t, self.step, self.context):
            if tensor is not None:
                found.update(tensor.contiguous().view(torch.uint8).numpy())
        return found.hexdigest()

    def batches(self, size: int) -> Iterator[CalibrationSet]:
        """The states in their order, `size` at a time."""
        for index in torch.arange(len(self)).split(size):
            yield self.subset(index)

    def to(self, parameter: Tensor) -> CalibrationSet:
        """The same on the parameter's device, states and embeddings in its dtype."""
        context = self.context
        if context is not None:
            context = context.to(parameter) if context.is_floating_point() else context.to(parameter.device)
        return CalibrationSet(self.x.to(parameter), self.t.to(parameter.device), self.step, context)


def uniform(trajectories: Trajectories, steps: int, per_step: int) -> CalibrationSet:
    """The first `per_step` samples of steps 0, S // steps, 2 (S // steps), ... (Q-Diffusion).

    When S is not a multiple of `steps` this takes more than `steps` of them, as the published code does. States with
    conditioning and its unconditional counterpart (cs and ucs) come twice: all with cs, then all with ucs. Raises
    ValueError when the recorded steps or samples are too few.
    """
    if steps > trajectories.steps:
        raise ValueError(f"--cali_st {steps}: the calibration data have only {trajectories.steps} steps")
    if per_step > trajectories.samples:
        raise ValueError(f"--cali_n {per_step}: the calibration data have only {trajectories.samples} samples a step")
    chosen = range(0, trajectories.steps, trajectories.steps // steps)

    def gather(column: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([column[s][:per_step] for s in chosen])

    x, t = gather(trajectories.xs), gather(trajectories.ts)
    step = torch.tensor(chosen).repeat_interleave(per_step)
    contexts = [gather(trajectories.extra[key]) for key in CONDITIONING if key in trajectories.extra]
    if not contexts:
        return CalibrationSet(x, t, step)
    copies = len(contexts)
    return CalibrationSet(x.repeat(copies, 1, 1, 1), t.repeat(copies), step.repeat(copies), torch.cat(contexts))


SELECTORS = {"uniform": uniform}


def select(trajectories: Trajectories, selector: Selector) -> CalibrationSet:
    """The calibration set that `selector` describes."""
    return SELECTORS[selector.name](trajectories, selector.steps, selector.per_step)
