"""The stages of a recipe, carried out: each a function of the run, the stage and its number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.context import Calibration, UndoableUnit, UnitReport
from qdiff.calibration.finetune import finetune
from qdiff.calibration.frontier import Frontier
from qdiff.calibration.gptq import compensate_unit, execution_order
from qdiff.calibration.hooks import observing
from qdiff.calibration.loop import UnitData, UnitTask, optimise, parameter_groups
from qdiff.calibration.objectives import lp_loss
from qdiff.calibration.observers import RangeObserver
from qdiff.calibration.rollout_stage import learn_rollouts
from qdiff.calibration.selectors import CalibrationSet
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.nn.ranges import grid_from_range, make_finder
from qdiff.recipes.recipe import Recipe
from qdiff.recipes.stages import (
    GPTQ,
    STAGES,
    ActivationRanges,
    CorrectBias,
    Finetune,
    Loss,
    Reconstruct,
    Rollout,
    Stage,
    WeightRanges,
)


def find_weight_ranges(run: Calibration, stage: WeightRanges, number: int = 0) -> None:
    """Set every weight grid and round to nearest."""
    find = make_finder(stage.range)
    layers = {n: m for n, m in quant_layers(run.network).items() if m.weight_quantizers}
    for name in layers:  # replaced later, never written to
        run.unrounded_weights[name] = run.float_network.get_submodule(name).weight.detach()
    if run.restore(number) is not None:
        return
    run.progress.start("weight ranges", len(layers))
    for name, layer in layers.items():
        for part, quantizer in zip(layer.slices, layer.weight_quantizers, strict=True):
            rows = run.unrounded_weights[name][:, part].reshape(quantizer.scale.shape[0], -1)
            ends = find(rows, quantizer.spec)
            quantizer.set_grid(grid_from_range(*ends, quantizer.spec, "raw_min_range" in run.recipe.compat))
        layer.freeze(layer.nearest_codes(run.unrounded_weights[name]))
        run.progress.advance(note=name)
    run.keep(number)
    run.progress.finish()


def compensate_weights(run: Calibration, stage: GPTQ, number: int = 0) -> None:
    """Error-compensated rounding of every unit, in execution order, on quantized-prefix inputs."""
    frontier: Frontier | None = None
    names = run.executed_units()
    run.progress.start("compensated rounding", len(names))
    for i, name in enumerate(names):
        if run.restore(number, name) is None:
            frontier = frontier or run.frontier(run.network, stage.batch_size)
            compensate_unit(frontier, name, run.unrounded_weights, stage, run.generator(number, i))
            run.keep(
                number,
                name,
                unrounded_weights=[n for n in run.unrounded_weights if n == name or n.startswith(f"{name}.")],
            )
        run.progress.advance(note=name)
    run.progress.finish()


@torch.no_grad()
def find_activation_ranges(run: Calibration, stage: ActivationRanges, number: int = 0) -> None:
    """Show every activation quantizer the calibration states and set its grids."""
    if run.restore(number) is not None:
        return
    generator = run.generator(number)
    quantizers = act_quantizers(run.network)
    softmax = {n: q for n, q in quantizers.items() if n.endswith("act_quantizer_w") and stage.softmax is not None}
    others = {n: q for n, q in quantizers.items() if n not in softmax}
    raw_min = "raw_min_range" in run.recipe.compat
    batches = list(_range_states(run, stage, generator).batches(stage.range.batch_size))
    observer = RangeObserver(stage.range, generator, raw_min)
    special = RangeObserver(stage.softmax or stage.range, generator, raw_min)
    parameter = next(run.network.parameters())
    run.progress.start("activation ranges", len(batches))
    with observing(others.values(), observer), observing(softmax.values(), special):
        for batch in batches:
            batch = batch.to(parameter)
            run.network(batch.x, batch.t, **run.adapter.conditioning(run.network, batch.context))
            run.progress.advance()
    observer.finish(others.items())
    special.finish(softmax.items())
    run.keep(number, modules=list(quantizers))
    run.progress.finish()


def _range_states(run: Calibration, stage: ActivationRanges, generator: torch.Generator) -> CalibrationSet:
    """The states that ranges are collected from, in the order in which they are shown."""
    count = len(run.data)
    samples = min(stage.samples, count)
    if stage.inputs == "first":
        return run.data.subset(torch.arange(samples))
    if stage.inputs == "stratified":
        return run.data.subset(torch.arange(samples) * count // samples)
    if stage.inputs == "all" and "ordered_ema" in run.recipe.compat:
        return run.data
    if stage.inputs == "all" and run.network.step_table.count > 1:
        # Step by step: every set's range comes from its own states whatever the order, and a batch of one set is fast.
        return run.data.subset(run.data.step.argsort(stable=True))
    shuffled = torch.randperm(count, generator=generator)
    return run.data.subset(shuffled if stage.inputs == "all" else shuffled[:samples])


def reconstruct(run: Calibration, stage: Reconstruct, number: int = 0) -> None:
    """Learn every unit in turn, as the stage says.

    Units that learn on float-prefix inputs do not depend on one another: a team's processes learn them side by side.
    """
    learner = _Learner(run, stage, number)
    names, team = run.units(), run.options.team
    run.progress.start(f"learning {' and '.join(stage.learn)}", len(names) * stage.iterations)
    together = team.size if stage.inputs == "float" else 1
    for first in range(0, len(names), together):
        learner.learn(range(first, min(first + together, len(names))), names)
    run.progress.finish()


class _Learner:
    """One `Reconstruct` stage: frontiers for both streams, made when a unit first needs them."""

    def __init__(self, run: Calibration, stage: Reconstruct, number: int) -> None:
        self.run, self.stage, self.number = run, stage, number
        self._frontiers: tuple[Frontier, Frontier | None] | None = None

    def frontiers(self) -> tuple[Frontier, Frontier | None]:
        """(float, quantized or None) states."""
        if self._frontiers is None:
            needs_quantized = self.stage.inputs != "float"
            quantized = self.run.frontier(self.run.network) if needs_quantized else None
            self._frontiers = (self.run.frontier(self.run.float_network), quantized)
        return self._frontiers

    def learn(self, indices: range, names: list[str]) -> None:
        """Learn the units of these indices, each in another process if there are several, and record them."""
        run, team = self.run, self.run.options.team
        reports = {i: run.restore(self.number, names[i]) for i in indices}
        todo = [i for i in indices if reports[i] is None]
        alone = self.stage.inputs == "float"  # each unit by one process
        owners = {i: position % team.size if alone else 0 for position, i in enumerate(todo)}
        here = [i for i in todo if not alone or owners[i] == team.rank]
        for i in here:
            reports[i] = self._learn_unit(names[i], i, alone)
        for i in indices:
            if i in owners:
                reports[i] = run.keep(self.number, names[i], notes=reports[i], owner=owners[i])
            if i not in here or not reports[i]:  # done elsewhere or before, or without anything to learn (B3)
                run.progress.advance(self.stage.iterations, names[i])
            if reports[i]:
                found = UnitReport.of(reports[i])
                run.reports.append(found)
                run.progress.unit(found, i + 1, len(names), restored=i not in owners)

    def _learn_unit(self, name: str, index: int, alone: bool) -> dict:
        """Learn one unit; its report as plain data, {} where it has nothing to learn."""
        run, stage = self.run, self.stage
        unit, attempt = run.segment(name), UndoableUnit(run, self.number, name, [name])
        data = self._data(name)
        error_before = self._error(name, data)
        groups = parameter_groups(unit.module, stage, run.unrounded_by_layer())
        if not groups:
            return {}
        task = UnitTask(
            unit.module,
            data,
            stage,
            groups,
            run.network.step_table,
            float_unit=run.float_network.get_submodule(name),
            penalized=_penalized(unit.module, groups, run.recipe),
            train_mode="train_mode" in run.recipe.compat,
            products=run.options.products,
            second_forward="second_forward" in run.recipe.compat,
        )
        losses = (run.options.optimise or optimise)(
            task,
            run.generator(self.number, index),
            tick=lambda loss: run.progress.advance(note=f"{name} loss {loss:.3g}"),
            team=None if alone else run.options.team,
        )
        for layer in quant_layers(unit.module).values():
            layer.finish_rounding()
        return attempt.finish(error_before, self._error(name, data), stage.keep, stage.iterations, losses)

    def _data(self, name: str) -> UnitData:
        float_frontier, quantized = self.frontiers()
        sources: dict[str, Callable[[Tensor], tuple[Tensor, ...]] | None] = {"quantized": None, "float_": None}
        needs_float = self.stage.inputs != "quantized" or self.stage.loss.taps
        for key, frontier in (("quantized", quantized), ("float_", float_frontier if needs_float else None)):
            if frontier is not None:
                segment = frontier.seek(name)
                sources[key] = lambda index, f=frontier, s=segment: f.arguments(s, index)
        target = float_frontier.cached_outputs(name)
        return UnitData(**sources, target=target, t=float_frontier.t, on_device=not self.run.store.has_spilled())

    @torch.no_grad()
    def _error(self, name: str, data: UnitData) -> float:
        """Mean squared error of the unit's output over all samples, inputs as the stage's prefix says."""
        float_frontier, quantized = self.frontiers()
        source, frontier = (
            (data.float_, float_frontier) if self.stage.inputs == "float" else (data.quantized, quantized)
        )
        module, total = self.run.segment(name).module, 0.0
        for rows in frontier.slices:
            index = torch.arange(rows.start, rows.stop, device=data.t.device)
            with self.run.network.step_table.at(data.t[rows]):
                output, target = module(*source(index)), data.target[rows]
            total += lp_loss(output, target, Loss(2.0, reduction="mean")).item() * (rows.stop - rows.start)
        return total / len(data.t)


def _penalized(unit: nn.Module, groups: dict[str, list[nn.Parameter]], recipe: Recipe) -> list[Tensor]:
    """The rounding variables under AdaRound's penalty."""
    if "skip_second_split" not in recipe.compat:
        return groups.get("rounding", [])
    return [layer.rounding[0].alpha for layer in quant_layers(unit).values() if layer.rounding is not None]


@torch.no_grad()
def correct_biases(run: Calibration, stage: CorrectBias, number: int = 0) -> None:
    """Bring every unit's mean output, per channel, to the float unit's, in execution order.

    The last layer that a unit calls adds its bias to the unit's output; a unit whose last layer has none is left alone.
    """
    frontiers: tuple[Frontier, Frontier] | None = None
    names = run.executed_units()
    run.progress.start("bias correction", len(names))
    for name in names:
        if run.restore(number, name) is None:
            frontiers = frontiers or tuple(run.frontier(n, stage.batch_size) for n in (run.float_network, run.network))
            float_frontier, quantized = frontiers
            _, layer = execution_order(quantized, name)[-1]
            if layer.bias is not None:
                layer.bias.sub_(_mean_error(quantized, float_frontier, name, layer.channel_axis))
            run.keep(number, name)
        run.progress.advance(note=name)
    run.progress.finish()


def _mean_error(quantized: Frontier, float_frontier: Frontier, name: str, channel_axis: int) -> Tensor:
    """[C], the mean over all samples and positions of what the unit's output has too much."""
    aims = float_frontier.cached_outputs(name)
    total, count = 0.0, 0
    for rows, output in quantized.batch_outputs(name):
        error = (output - aims[rows]).movedim(channel_axis, -1).flatten(0, -2)
        total, count = total + error.sum(0, dtype=torch.float64), count + len(error)
    return (total / count).to(output.dtype)


STAGE_HANDLERS: dict[type[Stage], Callable[[Calibration, Stage, int], None]] = {
    WeightRanges: find_weight_ranges,
    GPTQ: compensate_weights,
    ActivationRanges: find_activation_ranges,
    Reconstruct: reconstruct,
    CorrectBias: correct_biases,
    Finetune: finetune,
    Rollout: learn_rollouts,
}


def register_stage(name: str, stage: type, handler: Callable[[Calibration, Any, int], None]) -> None:
    """Add a stage to the language of recipes.

    name: what recipes call it, in files too. stage: a frozen dataclass whose fields are what a recipe says about it,
    plain values with defaults. handler: carries it out, called as handler(calibration, stage, number), where number is
    its place in the recipe; what it changes of the quantized network is the result. Raises ValueError for a name that
    another stage has.
    """
    if STAGES.get(name, stage) is not stage:
        raise ValueError(f"stage {name!r}: there is one of that name, {STAGES[name].__name__}")
    if not dataclasses.is_dataclass(stage):
        raise ValueError(f"stage {name!r}: expected a dataclass, found {stage!r}")
    STAGES[name], STAGE_HANDLERS[stage] = stage, handler
