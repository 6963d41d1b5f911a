"""Which of the float sampling states calibrate a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.calibration.trajectories import Trajectories
from qdiff.spec import Selector


@dataclass(frozen=True)
class CalibrationSet:
    """x: [N, C, H, W] states, t: [N] timesteps, step: [N] index of the recorded step each state comes from."""

    x: Tensor
    t: Tensor
    step: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def subset(self, index: Tensor) -> CalibrationSet:
        """index: [M] long. Returns those states."""
        return CalibrationSet(self.x[index], self.t[index], self.step[index])


def uniform(trajectories: Trajectories, steps: int, per_step: int) -> CalibrationSet:
    """The first `per_step` samples of steps 0, S // steps, 2 (S // steps), ... (Q-Diffusion).

    When S is not a multiple of `steps` this takes more than `steps` of them, as the published code does. Raises
    ValueError when the recorded steps or samples are too few.
    """
    if steps > trajectories.steps:
        raise ValueError(f"--cali_st {steps}: the calibration data have only {trajectories.steps} steps")
    if per_step > trajectories.samples:
        raise ValueError(f"--cali_n {per_step}: the calibration data have only {trajectories.samples} samples a step")
    chosen = range(0, trajectories.steps, trajectories.steps // steps)
    return CalibrationSet(
        torch.cat([trajectories.xs[s][:per_step] for s in chosen]),
        torch.cat([trajectories.ts[s][:per_step] for s in chosen]),
        torch.tensor(chosen).repeat_interleave(per_step),
    )


SELECTORS = {"uniform": uniform}


def select(trajectories: Trajectories, selector: Selector) -> CalibrationSet:
    """The calibration set that `selector` describes."""
    return SELECTORS[selector.name](trajectories, selector.steps, selector.per_step)
