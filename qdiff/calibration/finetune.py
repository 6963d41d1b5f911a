"""The stage that finetunes some layers' weights on their frozen grids, the whole network quantized (QuEST)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qdiff.calibration.context import RUN_BATCH, Calibration, UndoableUnit, UnitReport
from qdiff.calibration.hooks import recording_outputs
from qdiff.calibration.loop import minibatches, products_context
from qdiff.calibration.optimization import Groups, Optimization, Share
from qdiff.calibration.selectors import CalibrationSet
from qdiff.calibration.snapshots import OptimizerSnapshots
from qdiff.nn.layers import act_quantizers, learnable_scales, quant_layers
from qdiff.nn.quantizers import ActQuantizer
from qdiff.recipes.layer_names import matching
from qdiff.recipes.stages import Finetune


def finetune(run: Calibration, stage: Finetune, number: int = 0) -> None:
    """Learn the weights and scales that the stage names, as one piece of work with snapshots.

    Raises ValueError where no quantized layer has one of the names.
    """
    notes = run.restore(number)
    if notes is None:
        work = _Finetuning(run, stage, number)
        notes = run.keep(number, modules=[""], unrounded_weights=list(work.tuned), notes=work.learn())
    report = UnitReport.of(notes)
    run.reports.append(report)
    run.progress.unit(report, 1, 1)


class _Finetuning:
    """One `Finetune` stage: what learns, what it learns from, and the work."""

    def __init__(self, run: Calibration, stage: Finetune, number: int) -> None:
        self.run, self.stage, self.number = run, stage, number
        self.roles = run.adapter.roles(run.network)
        layers = quant_layers(run.network)
        self.layers = {name: layers[name] for name in matching(stage.layers, layers, self.roles)}
        if not self.layers:
            raise ValueError(f"finetune layers: {', '.join(stage.layers)} match no layer of the network")
        learns_weights = "weight" in stage.learn
        self.tuned = {n: m for n, m in self.layers.items() if m.weight_quantizers and learns_weights}
        self.data = _fewer(run.data, stage.per_step).to(next(run.network.parameters()))

    def learn(self) -> dict:
        """Carry the stage out; its report as plain data."""
        run, stage = self.run, self.stage
        attempt, before = UndoableUnit(run, self.number, "network", []), self._output_error()
        groups, indices = self._groups(), list(self._indices())
        run.progress.start(f"finetuning {len(self.tuned)} layers", stage.iterations)
        optimization = Optimization(groups, stage.learn, stage.iterations, run.options.team, by_row=["scale"])
        snapshots = OptimizerSnapshots(run, self.number, optimization.adam.state, stage.iterations)
        losses = snapshots.restore()
        run.progress.advance(snapshots.done)

        def step(iteration: int) -> Tensor:
            number = torch.tensor([iteration], device=self.data.x.device)
            return optimization.step(number, indices[iteration], self._backward)

        def tick(loss: float) -> None:
            run.progress.advance(note=f"loss {loss:.3g}")

        losses = optimization.run(step, tick, snapshots, losses)
        for name, layer in self.tuned.items():
            run.unrounded_weights[name] = torch.cat([r.weight.detach() for r in layer.rounding], 1)
            layer.finish_rounding()
        run.progress.finish()
        return attempt.finish(before, self._output_error(), "always", stage.iterations, losses)

    def _groups(self) -> Groups:
        """The learned parameters: weights with biases, and scales."""
        groups: Groups = {}
        if self.tuned:
            weights = [
                w for n, layer in self.tuned.items() for w in layer.start_finetuning(self.run.unrounded_weights[n])
            ]
            groups["weight"] = weights + [layer.bias for layer in self.tuned.values() if layer.bias is not None]
        if "scale" in self.stage.learn:
            groups["scale"] = learnable_scales(self._quantizers())
        return {name: parameters for name, parameters in groups.items() if parameters}

    def _quantizers(self) -> list[ActQuantizer]:
        """The activation quantizers that `scales` chooses."""
        every = act_quantizers(self.run.network)
        of_layers = {q for layer in self.layers.values() for q in layer.act_quantizers}
        time_layers = map(self.run.network.get_submodule, self.roles["time"])
        of_time = {q for layer in time_layers for q in act_quantizers(layer).values()}
        fits = {"all": lambda q: True, "rest": lambda q: q not in of_time, "layers": lambda q: q in of_layers}
        return [q for q in every.values() if fits[self.stage.scales](q)]

    def _indices(self) -> Iterator[Tensor]:
        """The minibatch of every iteration."""
        stage, generator = self.stage, self.run.generator(self.number)
        if stage.order == "interleaved":
            yield from minibatches(len(self.data), stage.batch_size, stage.iterations, generator)
            return
        steps = self.data.step.unique()  # noisiest first
        turns = [step for _ in range(stage.rounds) for step in steps]
        for turn, step in enumerate(turns):
            first, last = (stage.iterations * k // len(turns) for k in (turn, turn + 1))
            states = (self.data.step == step).nonzero()[:, 0]
            for batch in minibatches(len(states), stage.batch_size, last - first, generator):
                yield states[batch]

    def _backward(self, share: Share) -> Tensor:
        loss = self._loss(share.rows) * share.weight
        loss.backward()
        return loss.detach()

    def _loss(self, index: Tensor) -> Tensor:
        """local * sum over layers of MSE + output * MSE of the network's output."""
        products, device = self.run.options.products, self.data.x.device
        with products_context(products, device):
            *taps, output = self._activations(self.run.network, index)
        *aims, aim = self._teacher(index)
        total = self.stage.output * (output.to(aim.dtype) - aim).square().mean()
        for tap, target in zip(taps, aims, strict=True):
            total = total + self.stage.local * (tap.to(target.dtype) - target).square().mean()
        return total

    @torch.no_grad()
    def _teacher(self, index: Tensor) -> list[Tensor]:
        """The float network's activations. They are computed anew for every batch: those of all states of Stable
        Diffusion's feed-forward layers would take terabytes, and a forward pass is a quarter of an iteration."""
        return self._activations(self.run.float_network, index)

    def _activations(self, network: nn.Module, index: Tensor) -> list[Tensor]:
        """The outputs of the chosen layers for some states, in the order of their calls, and the network's own."""
        batch = self.data.subset(index)
        modules = [network.get_submodule(name) for name in self.layers]
        with recording_outputs(modules) as taps:
            output = network(batch.x, batch.t, **self.run.adapter.conditioning(network, batch.context))
        return [*taps, output]

    @torch.no_grad()
    def _output_error(self) -> float:
        """Mean squared error of the network's output over all states."""
        run, total = self.run, 0.0
        for rows in torch.arange(len(self.data)).split(RUN_BATCH):
            batch = self.data.subset(rows)
            aim, output = (
                network(batch.x, batch.t, **run.adapter.conditioning(network, batch.context))
                for network in (run.float_network, run.network)
            )
            total += (output - aim).square().mean().item() * len(rows)
        return total / len(self.data)


def _fewer(data: CalibrationSet, per_step: int | None) -> CalibrationSet:
    """The first `per_step` states of each step, or all."""
    if per_step is None:
        return data
    kept = [(data.step == step).nonzero()[:per_step, 0] for step in data.step.unique()]
    return data.subset(torch.cat(kept).sort().values)
