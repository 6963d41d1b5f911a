"""Carries out a recipe: stage after stage, unit after unit."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qdiff.adapters.base import Adapter, Segment
from qdiff.calibration.capture import observing, training_mode
from qdiff.calibration.compensate import compensate_unit, execution_order
from qdiff.calibration.frontier import Frontier
from qdiff.calibration.loop import UnitData, optimise, parameter_groups
from qdiff.calibration.objectives import mean_lp
from qdiff.calibration.observers import RangeObserver
from qdiff.calibration.selectors import CalibrationSet
from qdiff.layers import QuantLayer, act_quantizers, quant_layers
from qdiff.ranges import grid_from_range, make_finder
from qdiff.spec import ActivationRanges, Compensate, CorrectBias, Loss, Recipe, Reconstruct, Stage, WeightRanges
from qdiff.surgery import insert_quantizers

logger = logging.getLogger(__name__)
RUN_BATCH = 16  # samples that go through a unit at once where nothing is learned


class Progress:
    """What the runner tells about its work; this one says nothing. Scripts show a bar."""

    def start(self, title: str, total: int) -> None:
        """A stage begins that will `advance` by `total`."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Some of it is done; `note` is a short text such as the unit's name and loss."""

    def finish(self) -> None:
        """The stage is over."""


@dataclass(frozen=True)
class UnitReport:
    """How one unit's learning went: mean squared error of its output before and after, and whether it was kept."""

    stage: int
    unit: str
    before: float
    after: float
    kept: bool
    seconds: float
    losses: tuple[tuple[int, float], ...] = ()


@dataclass
class Calibration:
    """A float network, its quantized copy, and what the stages share.

    bases: the weight that each layer's codes were rounded from, by dotted name: the float one, or what error
    compensation made of it.
    """

    float_network: nn.Module
    network: nn.Module
    adapter: Adapter
    recipe: Recipe
    data: CalibrationSet
    generator: torch.Generator
    progress: Progress
    bases: dict[str, Tensor] = field(default_factory=dict)
    reports: list[UnitReport] = field(default_factory=list)

    def units(self, network: nn.Module) -> list[Segment]:
        """The segments that hold quantized layers, in the order in which they learn."""
        names = [s.name for s in self.adapter.chain(self.network) if quant_layers(s.module)]
        if "definition_order" in self.recipe.compat:
            names = [name for name, _ in self.network.named_modules() if name in set(names)]
        by_name = {segment.name: segment for segment in self.adapter.chain(network)}
        return [by_name[name] for name in names]


def calibrate(
    float_network: nn.Module,
    adapter: Adapter,
    recipe: Recipe,
    data: CalibrationSet,
    seed: int,
    timesteps: Tensor | None = None,
    progress: Progress | None = None,
    weights_from: nn.Module | None = None,
) -> Calibration:
    """Quantize a copy of the network by the recipe; the result's `network` is it.

    data: float states; timesteps: [S] of the sampler that made them, needed for parameter sets per step group.
    weights_from: a calibrated network of the same structure whose weight grids and codes are taken over before the
    first stage. Every random draw comes from one generator seeded with `seed`. Raises ValueError for a recipe that
    does not fit.
    """
    network = insert_quantizers(copy.deepcopy(float_network), recipe, adapter, timesteps)
    network.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    run = Calibration(float_network, network, adapter, recipe, data, generator, progress or Progress())
    if weights_from is not None:
        take_weights(network, weights_from)
    with training_mode(float_network, False):
        for number, stage in enumerate(recipe.stages):
            started = time.monotonic()
            STAGE_HANDLERS[type(stage)](run, stage, number)
            logger.info("stage %d, %s: %.1f s", number, type(stage).__name__, time.monotonic() - started)
    return run


def check_weights(network: nn.Module, source: nn.Module) -> None:
    """Raise ValueError naming a layer whose weight grids or split differ between two networks with quantizers."""
    theirs = quant_layers(source)
    for name, layer in quant_layers(network).items():
        given = theirs.get(name)
        found, needed = ("no layer" if it is None else _weight_form(it) for it in (given, layer))
        if found != needed:
            raise ValueError(f"{name}: the given weights have {found}, expected {needed}")


@torch.no_grad()
def take_weights(network: nn.Module, source: nn.Module) -> None:
    """Copy weight grids, codes and biases between two networks with quantizers. Raises what `check_weights` raises."""
    check_weights(network, source)
    theirs = quant_layers(source)
    for name, layer in quant_layers(network).items():
        if not layer.weight_quantizers:
            continue
        given = theirs[name]
        for quantizer, grid in zip(layer.weight_quantizers, given.weight_quantizers, strict=True):
            quantizer.set_grid(grid.scale, grid.zero_point)
        if layer.bias is not None:
            layer.bias.copy_(given.bias)
        layer.freeze(given.codes)


def _weight_form(layer: QuantLayer) -> str:
    """A layer's weight grids in words: equal for layers that can exchange codes."""
    grids = [f"{q.spec.bits} bits {q.spec.kind} {q.spec.axis}" for q in layer.weight_quantizers]
    return f"{list(layer.weight.shape)} " + (" and ".join(grids) or "float") + f", split at {layer.boundary}"


def find_weight_ranges(run: Calibration, stage: WeightRanges, number: int = 0) -> None:
    """Set every weight grid and round to nearest."""
    find = make_finder(stage.range)
    layers = {n: m for n, m in quant_layers(run.network).items() if m.weight_quantizers}
    run.progress.start("weight ranges", len(layers))
    for name, layer in layers.items():
        run.bases[name] = run.float_network.get_submodule(name).weight.detach()  # replaced later, never written to
        for part, quantizer in zip(layer.slices, layer.weight_quantizers, strict=True):
            rows = run.bases[name][:, part].reshape(quantizer.scale.shape[0], -1)
            ends = find(rows, quantizer.spec)
            quantizer.set_grid(*grid_from_range(*ends, quantizer.spec, "raw_min_range" in run.recipe.compat))
        layer.freeze(layer.nearest_codes(run.bases[name]))
        run.progress.advance(note=name)
    run.progress.finish()


def compensate_weights(run: Calibration, stage: Compensate, number: int = 0) -> None:
    """Error-compensated rounding of every unit, in execution order, on quantized-prefix inputs."""
    frontier = Frontier(run.network, run.adapter, run.data, stage.batch_size)
    names = [s.name for s in run.adapter.chain(run.network) if quant_layers(s.module)]
    run.progress.start("compensated rounding", len(names))
    for name in names:
        compensate_unit(frontier, name, run.bases, stage, run.generator)
        run.progress.advance(note=name)
    run.progress.finish()


@torch.no_grad()
def find_activation_ranges(run: Calibration, stage: ActivationRanges, number: int = 0) -> None:
    """Show every activation quantizer the calibration states and set its grids."""
    quantizers = act_quantizers(run.network)
    softmax = {n: q for n, q in quantizers.items() if n.endswith("act_quantizer_w") and stage.softmax is not None}
    others = {n: q for n, q in quantizers.items() if n not in softmax}
    raw_min = "raw_min_range" in run.recipe.compat
    batches = list(_range_states(run, stage).batches(stage.range.batch_size))
    plain = RangeObserver(stage.range, run.generator, raw_min)
    special = RangeObserver(stage.softmax or stage.range, run.generator, raw_min)
    parameter = next(run.network.parameters())
    run.progress.start("activation ranges", len(batches))
    with observing(others.values(), plain), observing(softmax.values(), special):
        for batch in batches:
            batch = batch.to(parameter)
            run.network(batch.x, batch.t, **run.adapter.conditioning(run.network, batch.context))
            run.progress.advance()
    plain.finish(others.items())
    special.finish(softmax.items())
    run.progress.finish()


def _range_states(run: Calibration, stage: ActivationRanges) -> CalibrationSet:
    """The states that ranges are collected from, in the order in which they are shown."""
    count = len(run.data)
    samples = min(stage.samples, count)
    if stage.inputs == "first":
        return run.data.subset(torch.arange(samples))
    if stage.inputs == "stratified":
        return run.data.subset(torch.arange(samples) * count // samples)
    if stage.inputs == "all" and "ordered_ema" in run.recipe.compat:
        return run.data
    shuffled = torch.randperm(count, generator=run.generator)
    return run.data.subset(shuffled if stage.inputs == "all" else shuffled[:samples])


def reconstruct(run: Calibration, stage: Reconstruct, number: int = 0) -> None:
    """Learn every unit in turn, as the stage says."""
    plain = Frontier(run.float_network, run.adapter, run.data, RUN_BATCH)
    quantized = None if stage.inputs == "float" else Frontier(run.network, run.adapter, run.data, RUN_BATCH)
    units = run.units(run.network)
    run.progress.start(f"learning {' and '.join(stage.learn)}", len(units) * stage.iterations)
    for unit in units:
        _learn_unit(run, stage, number, unit, plain, quantized)
    run.progress.finish()


def _learn_unit(
    run: Calibration, stage: Reconstruct, number: int, unit: Segment, plain: Frontier, quantized: Frontier | None
) -> None:
    started = time.monotonic()
    layers = {layer: run.bases[name] for name, layer in quant_layers(run.network).items() if name in run.bases}
    before = _snapshot(unit.module)
    data = UnitData(
        quantized=None if quantized is None else quantized.inputs(unit.name),
        float_=plain.inputs(unit.name) if stage.inputs != "quantized" or stage.loss.taps else None,
        target=plain.outputs(unit.name),
        t=run.data.t.to(next(run.network.parameters()).device),
    )
    error_before = _unit_error(run, unit, data, stage)
    groups = parameter_groups(unit.module, stage, layers)
    if not groups:  # a unit without anything to learn (B3)
        run.progress.advance(stage.iterations, unit.name)
        return
    history = optimise(
        unit.module,
        data,
        stage,
        groups,
        run.network.step_table,
        run.generator,
        float_unit=run.float_network.get_submodule(unit.name),
        penalized=_penalized(unit.module, groups, run.recipe),
        train_mode="train_mode" in run.recipe.compat,
        tick=lambda loss: run.progress.advance(note=f"{unit.name} loss {loss:.3g}"),
    )
    for layer in quant_layers(unit.module).values():
        layer.finish_rounding()
    error_after = _unit_error(run, unit, data, stage)
    kept = stage.keep == "always" or error_after < error_before
    if not kept:
        _restore(unit.module, before)
    seconds = time.monotonic() - started
    run.reports.append(UnitReport(number, unit.name, error_before, error_after, kept, seconds, tuple(history.losses)))
    outcome = "kept" if kept else "put back"
    logger.info("%s: error %.4g -> %.4g, %s, %.1f s", unit.name, error_before, error_after, outcome, seconds)


@torch.no_grad()
def correct_biases(run: Calibration, stage: CorrectBias, number: int = 0) -> None:
    """Bring every unit's mean output, per channel, to the float unit's, in execution order.

    The last layer that a unit calls adds its bias to the unit's output; a unit whose last layer has none is left alone.
    """
    plain = Frontier(run.float_network, run.adapter, run.data, stage.batch_size)
    quantized = Frontier(run.network, run.adapter, run.data, stage.batch_size)
    names = [s.name for s in run.adapter.chain(run.network) if quant_layers(s.module)]
    run.progress.start("bias correction", len(names))
    for name in names:
        _, layer = execution_order(quantized, name)[-1]
        if layer.bias is not None:
            error = (quantized.outputs(name) - plain.outputs(name)).movedim(layer.channel_axis, -1)
            layer.bias.sub_(error.flatten(0, -2).mean(0))
        run.progress.advance(note=name)
    run.progress.finish()


def _penalized(unit: nn.Module, groups: dict[str, list[nn.Parameter]], recipe: Recipe) -> list[Tensor]:
    """The rounding variables under AdaRound's penalty."""
    if "skip_second_split" not in recipe.compat:
        return groups.get("rounding", [])
    return [layer.rounding[0].alpha for layer in quant_layers(unit).values() if layer.rounding is not None]


@torch.no_grad()
def _unit_error(run: Calibration, unit: Segment, data: UnitData, stage: Reconstruct) -> float:
    """Mean squared error of the unit's output over all calibration samples, inputs as the stage's prefix says."""
    args = data.float_ if stage.inputs == "float" else data.quantized
    outputs = []
    for index in torch.arange(len(data.target)).split(RUN_BATCH):
        with run.network.step_table.at(data.t[index]):
            outputs.append(unit.module(*(a[index] for a in args)))
    return mean_lp(torch.cat(outputs), data.target, Loss(2.0, reduction="mean"))


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all that learning may change: parameters and buffers, codes included."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(module)}


@torch.no_grad()
def _restore(module: nn.Module, former: dict[str, Tensor]) -> None:
    for name, tensor in _tensors(module):
        tensor.copy_(former[name])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


STAGE_HANDLERS: dict[type[Stage], Callable[[Calibration, Stage, int], None]] = {
    WeightRanges: find_weight_ranges,
    Compensate: compensate_weights,
    ActivationRanges: find_activation_ranges,
    Reconstruct: reconstruct,
    CorrectBias: correct_biases,
}
