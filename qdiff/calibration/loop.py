"""The one optimisation loop. What differs between methods is handed in as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qdiff.calibration.capture import dropping, recording_outputs, training_mode
from qdiff.calibration.objectives import lp_loss, rounding_penalty
from qdiff.layers import act_quantizers, learnable_scales, quant_layers
from qdiff.quantizers import MIN_SCALE
from qdiff.spec import Learn, Reconstruct
from qdiff.steps import StepTable


@dataclass
class UnitData:
    """What a unit learns from, over all calibration samples.

    quantized, float_: the module's arguments from the quantized and the float prefix, each [N, ...] (the one that the
    stage does not use may be None); target: the float unit's output for the float ones; t: [N].
    """

    quantized: tuple[Tensor, ...] | None
    float_: tuple[Tensor, ...] | None
    target: Tensor
    t: Tensor

    def arguments(self, stage: Reconstruct, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The module's arguments for the samples `index` [B], as the stage's input source says.

        "mixed" mixes the first argument element by element; the others (time embedding, context) are always the
        quantized prefix's (EDA-DM, methods §2.3).
        """
        if stage.inputs == "float":
            return tuple(a[index] for a in self.float_)
        chosen = tuple(a[index] for a in self.quantized)
        if stage.inputs == "mixed":
            chance = torch.rand(chosen[0].shape, generator=generator).to(chosen[0].device)
            return torch.where(chance < stage.mix, chosen[0], self.float_[0][index]), *chosen[1:]
        return chosen


@dataclass
class History:
    """losses: (iteration, output loss) at about a hundred points of one unit's learning."""

    losses: list[tuple[int, float]] = field(default_factory=list)


def minibatches(count: int, batch_size: int, iterations: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random sample indices [min(batch_size, count)], without repeats inside a batch."""
    for _ in range(iterations):
        yield torch.randperm(count, generator=generator)[: min(batch_size, count)]


Groups = dict[str, list[nn.Parameter]]  # learned parameters by group name


def parameter_groups(unit: nn.Module, stage: Reconstruct, bases: dict[nn.Module, Tensor]) -> Groups:
    """The parameters of each learned group of a unit; soft rounding is started where rounding is learned.

    bases: the weight that each layer's learned rounding starts from.
    """
    layers = [layer for layer in quant_layers(unit).values() if layer.weight_quantizers]
    groups: Groups = {}
    if "rounding" in stage.learn:
        groups["rounding"] = [alpha for layer in layers for alpha in layer.start_rounding(bases[layer], stage.sharpen)]
    if "scale" in stage.learn:
        groups["scale"] = learnable_scales(list(act_quantizers(unit).values()))
    if "bias" in stage.learn:
        groups["bias"] = [layer.bias for layer in layers if layer.bias is not None]
    return {name: parameters for name, parameters in groups.items() if parameters}


def _optimizers(
    groups: Groups, learn: dict[str, Learn], iterations: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """One Adam with a rate and a schedule per parameter group."""
    optimizer = torch.optim.Adam([{"params": p, "lr": learn[name].rate} for name, p in groups.items()])

    def factor(schedule: str) -> Callable[[int], float]:
        if schedule == "constant":
            return lambda i: 1.0
        return lambda i: 0.5 * (1 + math.cos(math.pi * i / iterations))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [factor(learn[name].schedule) for name in groups])


def optimise(
    unit: nn.Module,
    data: UnitData,
    stage: Reconstruct,
    groups: Groups,
    steps: StepTable,
    generator: torch.Generator,
    float_unit: nn.Module | None = None,
    penalized: list[Tensor] | None = None,
    train_mode: bool = False,
    tick: Callable[[float], None] = lambda loss: None,
) -> History:
    """Learn the parameters of `groups` so that the unit's output meets the target.

    float_unit: the float counterpart, needed where the loss has taps. penalized: the rounding variables under the
    penalty (default: all). tick: called after each iteration with the last loss noted. Gradients reach only `groups`.
    """
    penalized = groups.get("rounding", []) if penalized is None else penalized
    penalty = rounding_penalty(penalized, stage.penalty, stage.iterations)
    optimizer, scheduler = _optimizers(groups, stage.learn, stage.iterations)
    history, every = History(), max(1, stage.iterations // 100)
    quantizers = act_quantizers(unit).values()
    with ExitStack() as modes:
        modes.enter_context(_learning(groups))
        modes.enter_context(training_mode(unit, train_mode))
        modes.enter_context(dropping(quantizers, stage.drop, generator))
        modes.enter_context(_seeded(train_mode, generator, data.target.device))
        batches = minibatches(len(data.target), stage.batch_size, stage.iterations, generator)
        for iteration, index in enumerate(batches):
            index = index.to(data.target.device)
            with steps.at(data.t[index]):
                loss = _unit_loss(unit, data, index, stage, generator, float_unit)
            optimizer.zero_grad()
            (loss + penalty(iteration)).backward()
            optimizer.step()
            scheduler.step()
            for scale in groups.get("scale", []):
                scale.data.clamp_min_(MIN_SCALE)
            if iteration % every == 0 or iteration == stage.iterations - 1:
                history.losses.append((iteration, loss.item()))
            tick(history.losses[-1][1])
    return history


@contextmanager
def _learning(groups: Groups) -> Iterator[None]:
    """Within the block the groups' parameters, and no others that were frozen, take gradients."""
    learned = [(p, p.requires_grad) for parameters in groups.values() for p in parameters]
    for parameter, _ in learned:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, requires_grad in learned:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


@contextmanager
def _seeded(active: bool, generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Dropout draws from the device's global generator: seed that from ours, and put its former state back."""
    if not active:
        yield
        return
    on_cpu = device.type == "cpu"
    fork = torch.random.fork_rng([]) if on_cpu else torch.random.fork_rng([device], device_type=device.type)
    with fork:
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def _unit_loss(
    unit: nn.Module,
    data: UnitData,
    index: Tensor,
    stage: Reconstruct,
    generator: torch.Generator,
    float_unit: nn.Module | None,
) -> Tensor:
    """The stage's loss, without penalty, for the samples `index`."""
    args, target = data.arguments(stage, index, generator), data.target[index]
    if stage.loss.taps == 0:
        return lp_loss(unit(*args), target, stage.loss)
    layers = list(quant_layers(unit))
    with recording_outputs(quant_layers(unit).values()) as outputs:
        loss = lp_loss(unit(*args), target, stage.loss)
    with torch.no_grad(), recording_outputs(float_unit.get_submodule(name) for name in layers) as targets:
        float_unit(*(a[index] for a in data.float_))
    # Layers are compared in the order of their calls, which both units share; the last one is the output's own.
    pairs = list(zip(outputs, targets, strict=True))[:-1]
    return loss + stage.loss.taps * sum(lp_loss(out, aim, stage.loss) for out, aim in pairs)
