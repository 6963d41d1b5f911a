"""Which of the float sampling states calibrate a network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff.calibration import density
from qdiff.calibration.trajectories import CONDITIONING, Trajectories
from qdiff.nn.family import Adapter
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import Recipe, StepGroups
from qdiff.utils.errors import FieldError
from qdiff.utils.seeds import generator_of

FEATURE_BATCH = 16  # samples whose features are held at once, at every step
ASSIGNMENT = 2**31  # the purpose of the generator that assigns steps to samples; stages count from 0


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


def gather(trajectories: Trajectories, step: Tensor, sample: Tensor) -> CalibrationSet:
    """The states of recorded steps `step` [M] of samples `sample` [M], in that order.

    States with conditioning and its unconditional counterpart (cs and ucs) come twice: all with cs, then all with ucs.
    """
    places = list(zip(step.tolist(), sample.tolist(), strict=True))

    def taken(column: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([column[s][k] for s, k in places])

    x, t = taken(trajectories.xs), taken(trajectories.ts)
    contexts = [taken(trajectories.extra[key]) for key in CONDITIONING if key in trajectories.extra]
    if not contexts:
        return CalibrationSet(x, t, step)
    copies = len(contexts)
    return CalibrationSet(x.repeat(copies, 1, 1, 1), t.repeat(copies), step.repeat(copies), torch.cat(contexts))


def _first_samples(trajectories: Trajectories, steps: Tensor, per_step: int) -> CalibrationSet:
    """The first `per_step` samples of each of the recorded steps `steps` [K]."""
    return gather(trajectories, steps.repeat_interleave(per_step), torch.arange(per_step).repeat(len(steps)))


def _check_counts(trajectories: Trajectories, steps: int, per_step: int) -> None:
    if steps > trajectories.steps:
        raise FieldError("selector.steps", f" {steps}: the calibration data have only {trajectories.steps} steps")
    if per_step > trajectories.samples:
        only = f"the calibration data have only {trajectories.samples} samples a step"
        raise FieldError("selector.per_step", f" {per_step}: {only}")


def uniform(trajectories: Trajectories, steps: int, per_step: int) -> CalibrationSet:
    """The first `per_step` samples of steps 0, S // steps, 2 (S // steps), ... (Q-Diffusion).

    When S is not a multiple of `steps` this takes more than `steps` of them, as the published code does. Raises
    ValueError when the recorded steps or samples are too few.
    """
    _check_counts(trajectories, steps, per_step)
    chosen = torch.arange(0, trajectories.steps, trajectories.steps // steps)
    return _first_samples(trajectories, chosen, per_step)


def group_starts(trajectories: Trajectories, steps: int, per_step: int, groups: StepGroups) -> CalibrationSet:
    """The first `per_step` samples of the first recorded step of every step group, by step (AccuQuant).

    Where `steps` exceeds the number of groups, of each group ceil(steps / groups) evenly spaced steps, or all it has.
    Raises ValueError when the recorded steps or samples are too few, or the groups more than the timesteps.
    """
    _check_counts(trajectories, steps, per_step)
    members = _group_members(trajectories, groups)
    each = -(-steps // len(members))
    chosen = torch.cat([evenly_spaced(group, each) for group in members]).sort().values
    return _first_samples(trajectories, chosen, per_step)


def _group_members(trajectories: Trajectories, groups: StepGroups) -> list[Tensor]:
    """The recorded steps of each group that has any; steps of one timestep are in one group."""
    timesteps = trajectories.timesteps
    group = StepTable(int(timesteps.max().round()) + 1, groups, timesteps).groups_of(timesteps)
    return [(group == number).nonzero().flatten() for number in group.unique()]


def evenly_spaced(values: Tensor, count: int) -> Tensor:
    """values: [L]. Returns the first and further ones at even distances, `count` of them, or all."""
    count = min(count, len(values))
    return values[torch.arange(count) * len(values) // count]


def density_variety(
    trajectories: Trajectories, recipe: Recipe, network: nn.Module, adapter: Adapter, seed: int
) -> CalibrationSet:
    """State k is that of sample k at the step that chance assigned it, each step as often as its features are worth
    (EDA-DM; see `qdiff.calibration.density`).

    network: float, on its device. Its features are those of the first `selector.features` samples at all recorded
    steps, with cs and ucs where there is guidance. Raises ValueError when the recorded samples are too few, or features
    are not finite.
    """
    check_selection(trajectories, recipe)
    selector = recipe.selector
    maps = middle_maps(trajectories, network, adapter, min(selector.features, trajectories.samples))
    weights = density.step_weights(*density.dissimilarities(maps), selector.radius, selector.variety)
    counts = density.released_counts if "backward_counts" in recipe.compat else density.counts
    step = density.assigned_steps(counts(weights, selector.seeds), generator_of(seed, ASSIGNMENT))
    return gather(trajectories, step, torch.arange(selector.seeds))


def middle_maps(
    trajectories: Trajectories, network: nn.Module, adapter: Adapter, samples: int, batch_size: int = FEATURE_BATCH
) -> Iterator[Tensor]:
    """The features [S, C, H, W] that enter the middle attention at all S recorded steps, of the first samples one after
    another; with guidance each sample has two, one with cs and one with ucs."""
    parameter = next(network.parameters())
    for rows in torch.arange(samples).split(batch_size):
        maps = []
        for step in range(trajectories.steps):
            batch = gather(trajectories, torch.full_like(rows, step), rows).to(parameter)
            maps.append(density.middle_map(network, adapter, batch.x, batch.t, batch.context))
        for row in zip(*maps, strict=True):
            yield torch.stack(row)


def check_selection(trajectories: Trajectories, recipe: Recipe) -> None:
    """Raise the ValueError that `select` would raise for too few recorded samples or steps; needs no network."""
    selector = recipe.selector
    if selector.name != "density_variety":
        _check_counts(trajectories, selector.steps, selector.per_step)
    elif selector.seeds > trajectories.samples:
        given = f" {selector.steps} {{}} {selector.per_step}"
        wanted = f"{selector.name} takes {selector.seeds} states, each of another sample"
        wrong = f"{given}: {wanted}; the calibration data have only {trajectories.samples} samples"
        raise FieldError("selector.steps", wrong, "selector.per_step")
    if selector.name == "group_starts":
        _group_members(trajectories, recipe.step_groups)


def select(
    trajectories: Trajectories,
    recipe: Recipe,
    network: nn.Module | None = None,
    adapter: Adapter | None = None,
    seed: int = 0,
) -> CalibrationSet:
    """The calibration set that the recipe's selector describes.

    network (float, on its device), adapter and seed matter to "density_variety" alone. Raises ValueError when the
    recorded samples or steps are too few, or that selector lacks its network.
    """
    selector = recipe.selector
    if selector.name == "uniform":
        return uniform(trajectories, selector.steps, selector.per_step)
    if selector.name == "group_starts":
        return group_starts(trajectories, selector.steps, selector.per_step, recipe.step_groups)
    if network is None or adapter is None:
        raise ValueError(f"selector {selector.name}: expected the float network and its adapter, found none")
    return density_variety(trajectories, recipe, network, adapter, seed)
