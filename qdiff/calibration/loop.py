"""The one optimisation loop. What differs between methods is handed in as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qdiff.calibration.adam import Adam, AdamGroup
from qdiff.calibration.capture import dropping, recording_outputs, training_mode
from qdiff.calibration.draws import Draws
from qdiff.calibration.graphs import repeated
from qdiff.calibration.objectives import lp_loss, penalty_table, rounding_penalty
from qdiff.calibration.store import Column
from qdiff.layers import act_quantizers, learnable_scales, quant_layers
from qdiff.parallel import Team
from qdiff.quantizers import MIN_SCALE
from qdiff.stages import Learn, Reconstruct
from qdiff.steps import StepTable

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

    def arguments(self, stage: Reconstruct, index: Tensor, draws: Draws) -> tuple[Tensor, ...]:
        """The module's arguments for the samples `index` [B], as the stage's input source says.

        "mixed" mixes the first argument element by element; the others (time embedding, context) are always the
        quantized prefix's (EDA-DM, methods §2.3).
        """
        if stage.inputs == "float":
            return take_rows(self.float_, index)
        chosen = take_rows(self.quantized, index)
        if stage.inputs == "mixed":
            first = chosen[0]
            mixed = torch.where(draws.uniform(first) < stage.mix, first, take_rows(self.float_, index)[0])
            return mixed, *chosen[1:]
        return chosen


@dataclass
class History:
    """losses: (iteration, output loss) at about a hundred points of one unit's learning."""

    losses: list[tuple[int, float]] = field(default_factory=list)


def minibatches(count: int, batch_size: int, iterations: int, generator: torch.Generator) -> Tensor:
    """[iterations, min(batch_size, count)] random sample indices, without repeats inside a batch."""
    found = torch.empty(iterations, min(batch_size, count), dtype=torch.long)
    for row in found:  # copied, since a slice keeps its whole permutation in memory
        row.copy_(torch.randperm(count, generator=generator)[:batch_size])
    return found


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


def rate_table(learn: Learn, iterations: int) -> Tensor:
    """[iterations] float64, the rate of every iteration."""
    if learn.schedule == "constant":
        return torch.full((iterations,), learn.rate, dtype=torch.float64)
    angle = math.pi * torch.arange(iterations, dtype=torch.float64) / iterations
    return learn.rate * 0.5 * (1 + angle.cos())


def products_context(products: str, device: torch.device) -> AbstractContextManager:
    """Within it products are computed as asked for: "float32", or "bfloat16"."""
    return torch.autocast(device.type, torch.bfloat16) if products == "bfloat16" else nullcontext()


@dataclass
class Learning:
    """One unit's learning: everything an iteration reads and writes, as tensors on the unit's device."""

    unit: nn.Module
    data: UnitData
    stage: Reconstruct
    groups: Groups
    steps: StepTable
    draws: Draws  # on the unit's device: what an iteration draws, for the team's part of a batch
    indices: Tensor  # [iterations, B]
    float_unit: nn.Module | None
    penalized: list[Tensor]
    products: str  # "float32", or "bfloat16" for products in half precision
    second_forward: bool = False  # E5 in qdiff.spec.COMPAT

    def __post_init__(self) -> None:
        iterations, device = self.stage.iterations, self.indices.device
        learn = self.stage.learn
        by_row = self.steps.count > 1  # a batch need not have every step group in it
        tables = {name: rate_table(learn[name], iterations) for name in self.groups}
        self.adam = Adam(
            [
                AdamGroup(p, tables[name], learn[name].relative, by_row and name == "scale")
                for name, p in self.groups.items()
            ]
        )
        self.number = torch.zeros(1, dtype=torch.long, device=device)  # of the iteration to come
        self.beta = penalty_table(self.stage.penalty, iterations).to(self.data.t.device)
        self.losses = torch.zeros(iterations, device=device)

    def penalty_starts(self) -> int:
        """The first iteration with a rounding penalty."""
        on = (self.beta > 0).nonzero()
        return int(on[0]) if len(on) and self.penalized else self.stage.iterations

    def iterate(self, penalize: bool) -> None:
        """One iteration: loss, gradients, step. Decides nothing by the values of tensors."""
        index, team = self.indices.index_select(0, self.number)[0], self.draws.team
        mine = team.share(index)
        with self.steps.at(self.data.t.index_select(0, mine)):
            loss = self._loss(mine) * (len(mine) / len(index))  # shares of the batch may differ by one
        self.adam.zero_grad()
        total = loss
        if penalize:
            beta = self.beta.index_select(0, self.number)
            total = loss + rounding_penalty(self.penalized, self.stage.penalty, beta) / team.size
        total.backward()
        loss = loss.detach()
        team.sum([loss, *self.adam.gradients()])
        self.adam.step(self.number)
        for scale in self.groups.get("scale", []):
            scale.data.clamp_min_(MIN_SCALE)
        self.losses.index_copy_(0, self.number, loss.reshape(1).float())
        self.number += 1

    def _loss(self, index: Tensor) -> Tensor:
        """The stage's loss, without penalty, for the samples `index`."""
        data, stage, unit = self.data, self.stage, self.unit
        args, target = data.arguments(stage, index, self.draws), data.target[index]
        if stage.loss.taps == 0:
            with products_context(self.products, target.device):
                output = unit(*args)
            return lp_loss(output.to(target.dtype), target, stage.loss)
        layers = quant_layers(unit)
        with products_context(self.products, target.device), recording_outputs(layers.values()) as outputs:
            output = unit(*args)
        loss = lp_loss(output.to(target.dtype), target, stage.loss)
        if self.second_forward:  # E5: the layers' losses see other dropped activations than the output's
            with products_context(self.products, target.device), recording_outputs(layers.values()) as outputs:
                unit(*args)
        with torch.no_grad(), recording_outputs(self.float_unit.get_submodule(name) for name in layers) as targets:
            self.float_unit(*take_rows(data.float_, index))
        # Layers are compared in the order of their calls, which both units share; the last one is the output's own.
        pairs = list(zip(outputs, targets, strict=True))[:-1]
        return loss + stage.loss.taps * sum(lp_loss(out.to(aim.dtype), aim, stage.loss) for out, aim in pairs)


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
    team: Team | None = None,
    products: str = "float32",
    second_forward: bool = False,
) -> History:
    """Learn the parameters of `groups` so that the unit's output meets the target.

    float_unit: the float counterpart, needed where the loss has taps. penalized: the rounding variables under the
    penalty (default: all). tick: called after each iteration with the last loss noted. team: processes that share the
    batches. second_forward: E5 in `qdiff.spec.COMPAT`. Gradients reach only `groups`.
    """
    penalized = groups.get("rounding", []) if penalized is None else penalized
    device, iterations = data.t.device, stage.iterations
    indices = minibatches(len(data.t), stage.batch_size, iterations, generator).to(device)
    batch = indices.shape[1]
    team = Team() if team is None or batch < team.size else team  # without a sample for each, all do all of it
    draws = Draws(_on_device(generator, device), team, batch)
    history, every = History(), max(1, iterations // 100)
    with ExitStack() as modes:
        modes.enter_context(learning(groups))
        modes.enter_context(training_mode(unit, train_mode))
        modes.enter_context(dropping(act_quantizers(unit).values(), stage.drop, draws))
        modes.enter_context(_seeded(train_mode, generator, device))
        work = Learning(
            unit, data, stage, groups, steps, draws, indices, float_unit, penalized, products, second_forward
        )
        starts = work.penalty_starts()
        # A graph holds the random state of its own generators only, and no copies between host and device.
        captures = data.on_device and not train_mode and team.size == 1
        where = device if captures else torch.device("cpu")
        step = {p: repeated(lambda p=p: work.iterate(p), where, [draws.generator]) for p in (False, True)}
        for iteration in range(iterations):
            step[iteration >= starts]()
            if iteration % every == 0 or iteration == iterations - 1:
                history.losses.append((iteration, work.losses[iteration].item()))
            tick(history.losses[-1][1])
    return history


def _on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator on the device: the given one, or one that is seeded from it."""
    if generator.device == device or device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


@contextmanager
def learning(groups: Groups) -> Iterator[None]:
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
