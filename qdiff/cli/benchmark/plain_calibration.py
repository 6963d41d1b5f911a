"""The baseline of benchmark.py calibrate: a calibration as it is usually written, to the same result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.calibration.frontier import Frontier
from qdiff.calibration.hooks import training_mode
from qdiff.calibration.loop import UnitTask, minibatches
from qdiff.calibration.objectives import lp_loss, rounding_penalty, temperature
from qdiff.calibration.optimization import Losses, learning, rate_table
from qdiff.nn.grid import MIN_SCALE
from qdiff.utils.team import Team


def baseline_optimise(
    task: UnitTask,
    generator: torch.Generator,
    tick: Callable[[float], None] = lambda loss: None,
    team: Team | None = None,
) -> Losses:
    """`qdiff.calibration.loop.optimise` in plain PyTorch: torch.optim.Adam, no graphs, rate and temperature in Python.

    Takes the same arguments, mini-batches among them. Raises ValueError for a stage that mixes or drops inputs, or
    compares inner layers: it is there to be measured against, and knows what `quick` and `q-diffusion` need.
    """
    unit, data, stage, groups = task.unit, task.data, task.stage, task.groups
    if stage.inputs == "mixed" or stage.drop or stage.loss.taps or task.train_mode:
        raise ValueError("the plain loop knows neither mixed inputs, dropping, taps nor train mode")
    penalized = groups.get("rounding", []) if task.penalized is None else task.penalized
    device, iterations = data.t.device, stage.iterations
    indices = minibatches(len(data.t), stage.batch_size, iterations, generator).to(device)
    rates = {name: rate_table(stage.learn[name], iterations).tolist() for name in groups}
    adam = torch.optim.Adam([{"params": parameters, "name": name, "lr": 0.0} for name, parameters in groups.items()])
    losses, every = [], max(1, iterations // 100)
    with learning(groups), training_mode(unit, False):
        for iteration, index in enumerate(indices):
            for group in adam.param_groups:
                group["lr"] = rates[group["name"]][iteration]
            half = torch.autocast(device.type, torch.bfloat16, enabled=task.products == "bfloat16")
            with task.steps.at(data.t[index]), half:
                output = unit(*data.arguments(stage, index, None))
            target = data.target[index]
            loss = total = lp_loss(output.to(target.dtype), target, stage.loss)
            beta = None if stage.penalty is None else temperature(stage.penalty, iteration, iterations)
            if beta is not None and penalized:
                total = loss + rounding_penalty(penalized, stage.penalty, torch.tensor([beta], device=device))
            adam.zero_grad()
            total.backward()
            adam.step()
            for scale in groups.get("scale", []):
                scale.data.clamp_min_(MIN_SCALE)
            if iteration % every == 0 or iteration == iterations - 1:
                losses.append((iteration, loss.item()))
            tick(losses[-1][1])
    return losses


@dataclass
class Counter:
    """Batches that have gone through a module of a network's chain."""

    runs: int = 0


def counting(kind: type[Frontier], counter: Counter) -> type[Frontier]:
    """The frontier with its module runs counted, also those of all other frontiers made of the result."""

    class Counting(kind):
        def run(self, *args: object) -> Tensor:
            counter.runs += 1
            return super().run(*args)

    return Counting
