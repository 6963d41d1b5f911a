"""The stage that learns over groups of denoising steps (AccuQuant): see `qdiff.recipes.stages.Rollout`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qdiff.calibration.context import RUN_BATCH, Calibration, UndoableUnit, UnitReport
from qdiff.calibration.loop import minibatches, parameter_groups, products_context
from qdiff.calibration.objectives import penalty_table, rounding_penalty
from qdiff.calibration.optimization import Groups, Optimization, Share
from qdiff.calibration.rollout import Carrier, FloatRuns, Group, GroupRollout, Predictor, groups_of
from qdiff.calibration.snapshots import OptimizerSnapshots
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.recipes.stages import Rollout


def learn_rollouts(run: Calibration, stage: Rollout, number: int = 0) -> None:
    """Learn group after group, or all together, as the stage says.

    Raises ValueError where the run has no trajectories with their sampler, or fewer than the stage asks for.
    """
    work = _Rolling(run, stage, number)
    run.progress.start(f"rollouts of {len(work.groups)} groups", len(work.groups) * stage.iterations)
    if stage.order == "interleaved":
        work.report(work.notes("all groups", 0, work.learn_together), 1, 1)
    else:
        for i, group in enumerate(work.groups):
            notes = work.notes(f"group {group.number}", i, lambda i=i: work.learn_group(i))
            work.report(notes, i + 1, len(work.groups))
            if stage.start == "quantized" and i + 1 < len(work.groups):
                work.carrier.add(work.rollout(group))
    run.progress.finish()


class _Rolling:
    """One `Rollout` stage: what is learned, from which trajectories, and the work."""

    def __init__(self, run: Calibration, stage: Rollout, number: int) -> None:
        if run.rollouts is None:
            raise ValueError("rollout: needs float trajectories and the sampler that made them, found none")
        self.run, self.stage, self.number = run, stage, number
        recorded = run.rollouts.trajectories.samples
        self.samples = recorded if stage.samples is None else stage.samples
        if self.samples > recorded:
            raise ValueError(f"rollout samples {stage.samples}: the calibration data have only {recorded} samples")
        teacher = Predictor(run.float_network, run.adapter, run.rollouts)
        self.predict = Predictor(run.network, run.adapter, run.rollouts)
        self.device = self.predict.parameter.device
        self.runs = FloatRuns(teacher, run.rollouts, self.samples, run.store, RUN_BATCH)
        self.groups = groups_of(run.rollouts.path, run.network.step_table)
        self.carrier = Carrier(self.runs, run.store, RUN_BATCH)

    def rollout(self, group: Group) -> GroupRollout:
        """A group from the state that the stage says it starts from."""
        carried = self.carrier.into(group) if self.stage.start == "quantized" else None
        return GroupRollout(self.predict, self.runs, group, carried)

    @torch.no_grad()
    def error(self, rollouts: list[GroupRollout]) -> float:
        """Mean squared error at the groups' ends, over all samples and the groups."""
        return sum(r.over_all(r.loss, RUN_BATCH).item() for r in rollouts) / len(rollouts)

    def notes(self, unit: str, position: int, learn) -> dict:
        """A piece's report as plain data: the recorded one, or that of learning it now."""
        found = self.run.restore(self.number, unit)
        if found is not None:
            self.run.progress.advance(found["iterations"], unit)
            return found
        return self.run.keep(self.number, unit, modules=self._changed(), notes=learn())

    def _changed(self) -> list[str]:
        """The modules whose state learning changes."""
        return list(act_quantizers(self.run.network)) if set(self.stage.learn) == {"scale"} else [""]

    def report(self, notes: dict, done: int, total: int) -> None:
        """Tell of a piece that is done."""
        report = UnitReport.of(notes)
        self.run.reports.append(report)
        self.run.progress.unit(report, done, total)

    def learn_group(self, position: int) -> dict:
        """Learn the scales of one group."""
        group = self.groups[position]
        rollout = self.rollout(group)
        generator = self.run.generator(self.number, position)
        batches = minibatches(self.samples, self.stage.batch_size, self.stage.iterations, generator)
        return self._learn(f"group {group.number}", [rollout], [(rollout, index) for index in batches], group.number)

    def learn_together(self) -> dict:
        """Learn from all groups, a random one in each iteration."""
        rollouts = [self.rollout(group) for group in self.groups]
        generator, iterations = self.run.generator(self.number), self.stage.iterations * len(self.groups)
        order = torch.randint(len(rollouts), (iterations,), generator=generator).tolist()
        batches = minibatches(self.samples, self.stage.batch_size, iterations, generator)
        work = [(rollouts[i], index) for i, index in zip(order, batches, strict=True)]
        return self._learn("all groups", rollouts, work, None)

    def _learn(self, unit: str, rollouts: list[GroupRollout], work: list[tuple[GroupRollout, Tensor]], row) -> dict:
        """Learn from the batches of `work`; row: the parameter set that alone may move, or None for all."""
        run, stage = self.run, self.stage
        attempt, before = UndoableUnit(run, self.number, unit, self._changed()), self.error(rollouts)
        groups, iterations = self._parameters(row), len(work)
        optimization = Optimization(groups, stage.learn, iterations, run.options.team, by_row=["scale"])
        snapshots = OptimizerSnapshots(run, self.number, optimization.adam.state, iterations) if row is None else None
        losses = [] if snapshots is None else snapshots.restore()
        run.progress.advance(0 if snapshots is None else snapshots.done)
        beta = penalty_table(stage.penalty, iterations).to(self.device)

        def step(iteration: int) -> Tensor:
            rollout, index = work[iteration]
            number = torch.tensor([iteration], device=self.device)
            backward = partial(self._backward, rollout, groups, beta[iteration], row)
            return optimization.step(number, index.to(self.device), backward)

        def tick(loss: float) -> None:
            run.progress.advance(note=f"{unit} loss {loss:.3g}")

        losses = optimization.run(step, tick, snapshots, losses)
        for layer in quant_layers(run.network).values():
            layer.finish_rounding()
        return attempt.finish(before, self.error(rollouts), stage.keep, iterations, losses)

    def _parameters(self, row: int | None) -> Groups:
        """The learned parameters; of quantizers with one set for all groups only where all groups learn together."""
        run = self.run
        groups = parameter_groups(run.network, self.stage, run.unrounded_by_layer())
        if row is not None and run.network.step_table.count > 1:
            shared = {q.scale for q in act_quantizers(run.network).values() if q.steps.count == 1}
            groups["scale"] = [scale for scale in groups["scale"] if scale not in shared]
        return groups

    def _backward(self, rollout: GroupRollout, groups: Groups, beta: Tensor, row: int | None, share: Share) -> Tensor:
        stage = self.stage
        with products_context(self.run.options.products, self.device):
            loss = rollout.backward(share.rows, stage.gradient, stage.carry, share.weight).detach()
        if stage.penalty is not None and beta > 0 and "rounding" in groups:
            (rounding_penalty(groups["rounding"], stage.penalty, beta) / share.processes).backward()
        if row is not None and self.run.network.step_table.count > 1:
            for scale in groups["scale"]:  # PLMS looks ahead into the group to come, whose set learns in its turn
                if scale.grad is not None:
                    scale.grad[:row].zero_()
                    scale.grad[row + 1 :].zero_()
        return loss
