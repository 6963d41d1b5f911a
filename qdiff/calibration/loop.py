"""How one unit learns: from which inputs, by which loss. What differs between methods is handed in as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff.calibration.batch_noise import BatchNoise
from qdiff.calibration.graphs import repeated
from qdiff.calibration.hooks import dropping, recording_outputs, training_mode
from qdiff.calibration.objectives import lp_loss, penalty_table, rounding_penalty
from qdiff.calibration.optimization import Groups, Losses, Optimization, Share, learning
from qdiff.calibration.store import Column
from qdiff.nn.layers import act_quantizers, learnable_scales, quant_layers
from qdiff.nn.step_table import StepTable
from qdiff.recipes.stages import Reconstruct
from qdiff.utils.team import Team

Source = tuple[Tensor, ...] | Callable[[Tensor], tuple[Tensor, ...]]


def take_rows(source: Source, index: Tensor) -> tuple[Tensor, ...]:
    """The arguments of the samples `index` [B]: of tensors [N, ...] each, or as a function of the index."""
    return tuple(a[index] for a in source) if isinstance(source, tuple) else source(index)


@dataclass
class UnitData:
    """What a unit learns from, over all calibration samples.

    quantized, float_: the module's arguments from the quantized and the float prefix (the one that the stage does not
    use may be None); target: [N, ...] the float unit's output for the float ones; t: [N], on the device; on_device:
    whether all of it is in the device's memory.
    """

    quantized: Source | None
    float_: Source | None
    target: Tensor | Column
    t: Tensor
    on_device: bool = True

    def arguments(self, stage: Reconstruct, index: Tensor, noise: BatchNoise) -> tuple[Tensor, ...]:
        """The module's arguments for the samples `index` [B], as the stage's input source says.

        "mixed" mixes the first argument element by element; the others (time embedding, context) are always the
        quantized prefix's (EDA-DM, methods §2.3).
        """
        if stage.inputs == "float":
            return take_rows(self.float_, index)
        chosen = take_rows(self.quantized, index)
        if stage.inputs == "mixed":
            first = chosen[0]
            mixed = torch.where(noise.uniform(first) < stage.mix, first, take_rows(self.float_, index)[0])
            return mixed, *chosen[1:]
        return chosen


def minibatches(count: int, batch_size: int, iterations: int, generator: torch.Generator) -> Tensor:
    """[iterations, min(batch_size, count)] random sample indices, without repeats inside a batch."""
    found = torch.empty(iterations, min(batch_size, count), dtype=torch.long)
    for row in found:  # copied, since a slice keeps its whole permutation in memory
        row.copy_(torch.randperm(count, generator=generator)[:batch_size])
    return found


def parameter_groups(unit: nn.Module, stage: Reconstruct, unrounded_weights: dict[nn.Module, Tensor]) -> Groups:
    """The parameters of each learned group of a unit; soft rounding is started where rounding is learned.

    unrounded_weights: the weight that each layer's learned rounding starts from.
    """
    layers = [layer for layer in quant_layers(unit).values() if layer.weight_quantizers]
    groups: Groups = {}
    if "rounding" in stage.learn:
        groups["rounding"] = [
            alpha for layer in layers for alpha in layer.start_rounding(unrounded_weights[layer], stage.sharpen)
        ]
    if "scale" in stage.learn:
        groups["scale"] = learnable_scales(list(act_quantizers(unit).values()))
    if "bias" in stage.learn:
        groups["bias"] = [layer.bias for layer in layers if layer.bias is not None]
    return {name: parameters for name, parameters in groups.items() if parameters}


def products_context(products: str, device: torch.device) -> AbstractContextManager:
    """Within it products are computed as asked for: "float32", or "bfloat16"."""
    return torch.autocast(device.type, torch.bfloat16) if products == "bfloat16" else nullcontext()


@dataclass
class UnitTask:
    """What one unit learns. steps: the network's table of parameter sets.

    float_unit: the float counterpart, needed where the loss has taps. penalized: the rounding variables under the
    penalty (None: all). products: "float32", or "bfloat16" for products in half precision. second_forward: E5 in
    `qdiff.recipes.recipe.COMPAT`.
    """

    unit: nn.Module
    data: UnitData
    stage: Reconstruct
    groups: Groups
    steps: StepTable
    float_unit: nn.Module | None = None
    penalized: list[Tensor] | None = None
    train_mode: bool = False
    products: str = "float32"
    second_forward: bool = False


class UnitLearning:
    """A task under way: everything an iteration reads and writes, as tensors on the unit's device."""

    def __init__(self, task: UnitTask, indices: Tensor, noise: BatchNoise) -> None:
        """indices: [iterations, B]; noise: what an iteration draws, for the team's part of a batch."""
        self.task, self.indices, self.noise = task, indices, noise
        stage, device = task.stage, indices.device
        by_row = ["scale"] if task.steps.count > 1 else []  # a batch need not have every step group in it
        self.optimization = Optimization(task.groups, stage.learn, stage.iterations, noise.team, by_row)
        self.penalized = task.groups.get("rounding", []) if task.penalized is None else task.penalized
        self.number = torch.zeros(1, dtype=torch.long, device=device)  # of the iteration to come
        self.beta = penalty_table(stage.penalty, stage.iterations).to(device)
        self.losses = torch.zeros(stage.iterations, device=device)

    def penalty_starts(self) -> int:
        """The first iteration with a rounding penalty."""
        on = (self.beta > 0).nonzero()
        return int(on[0]) if len(on) and self.penalized else self.task.stage.iterations

    def iterate(self, penalize: bool) -> None:
        """One iteration: loss, gradients, step. Decides nothing by the values of tensors."""
        index = self.indices.index_select(0, self.number)[0]
        loss = self.optimization.step(self.number, index, lambda share: self._backward(share, penalize))
        self.losses.index_copy_(0, self.number, loss.reshape(1).float())
        self.number += 1

    def _backward(self, share: Share, penalize: bool) -> Tensor:
        task = self.task
        with task.steps.at(task.data.t.index_select(0, share.rows)):
            loss = self._loss(share.rows) * share.weight
        total = loss
        if penalize:
            beta = self.beta.index_select(0, self.number)
            total = loss + rounding_penalty(self.penalized, task.stage.penalty, beta) / share.processes
        total.backward()
        return loss.detach()

    def _loss(self, index: Tensor) -> Tensor:
        """The stage's loss, without penalty, for the samples `index`."""
        data, stage, unit, products = self.task.data, self.task.stage, self.task.unit, self.task.products
        args, target = data.arguments(stage, index, self.noise), data.target[index]
        if stage.loss.taps == 0:
            with products_context(products, target.device):
                output = unit(*args)
            return lp_loss(output.to(target.dtype), target, stage.loss)
        layers = quant_layers(unit)
        with products_context(products, target.device), recording_outputs(layers.values()) as outputs:
            output = unit(*args)
        loss = lp_loss(output.to(target.dtype), target, stage.loss)
        if self.task.second_forward:  # E5: the layers' losses see other dropped activations than the output's
            with products_context(products, target.device), recording_outputs(layers.values()) as outputs:
                unit(*args)
        float_unit = self.task.float_unit
        with torch.no_grad(), recording_outputs(float_unit.get_submodule(name) for name in layers) as targets:
            float_unit(*take_rows(data.float_, index))
        # Layers are compared in the order of their calls, which both units share; the last one is the output's own.
        pairs = list(zip(outputs, targets, strict=True))[:-1]
        return loss + stage.loss.taps * sum(lp_loss(out.to(aim.dtype), aim, stage.loss) for out, aim in pairs)


def optimise(
    task: UnitTask,
    generator: torch.Generator,
    tick: Callable[[float], None] = lambda loss: None,
    team: Team | None = None,
) -> Losses:
    """Learn the parameters of the task's groups so that the unit's output meets the target. Returns the losses noted.

    tick: called after each iteration with the last loss noted. team: processes that share the batches. Gradients reach
    only the groups.
    """
    data, stage, device = task.data, task.stage, task.data.t.device
    indices = minibatches(len(data.t), stage.batch_size, stage.iterations, generator).to(device)
    batch = indices.shape[1]
    team = Team() if team is None or batch < team.size else team
    noise = BatchNoise(_on_device(generator, device), team, batch)
    with ExitStack() as modes:
        modes.enter_context(learning(task.groups))
        modes.enter_context(training_mode(task.unit, task.train_mode))
        modes.enter_context(dropping(act_quantizers(task.unit).values(), stage.drop, noise))
        modes.enter_context(_seeded(task.train_mode, generator, device))
        work = UnitLearning(task, indices, noise)
        starts = work.penalty_starts()
        # A graph holds the random state of its own generators only, and no copies between host and device.
        captures = data.on_device and not task.train_mode and team.size == 1
        where = device if captures else torch.device("cpu")
        iterate = {p: repeated(lambda p=p: work.iterate(p), where, [noise.generator]) for p in (False, True)}

        def step(iteration: int) -> Tensor:
            iterate[iteration >= starts]()
            return work.losses[iteration]

        return work.optimization.run(step, tick)


def _on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator on the device: the given one, or one that is seeded from it."""
    if generator.device == device or device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


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
