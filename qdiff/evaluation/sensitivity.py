"""What quantizing one unit alone costs: the error that it adds to a prediction, and to the end of sampling.

Everything else stays float and the states are the float model's, so that the errors of units are their own. To first
order, errors add up along the sampler (`ddim.linear`): the error at the end of sampling is sum_s c_s d_s, with d_s the
difference of the predictions at step s and c_s how the sampler carries it to the end. What that leaves out is that the
errors of one step change what the network sees in the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.frontier import Frontier
from qdiff.calibration.rollout import Path, Rollouts
from qdiff.calibration.selectors import CalibrationSet, gather
from qdiff.calibration.store import map_leaves, read_rows
from qdiff.checkpoints.packing import packed_bytes
from qdiff.evaluation.cost import cost_of
from qdiff.nn.family import Adapter
from qdiff.nn.layers import quant_layers
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.recipe import Recipe

BATCH = 16  # states at once
SCALE_BYTES = 6  # of an output channel: a float32 scale and an int16 zero point


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Mean squared errors of U units, each alone quantized with B weight widths, at S sampler steps; float64.

    single: [U, B, S] of the (guided) prediction. end: [U, B] of the result of sampling, to first order. carried: [S],
    how the sampler carries an error of each step's prediction to the end. stored: [U, B] int64, bytes of the unit's
    weights. products: [U] int64, multiplications of a weight by an activation in one evaluation of one sample. layers:
    the quantized layers of each unit.
    """

    units: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    bits: tuple[int, ...]
    timesteps: tuple[float, ...]
    single: Tensor
    end: Tensor
    carried: Tensor
    stored: Tensor
    products: Tensor


@dataclass(frozen=True, eq=False)
class UnitCosts:
    """What units cost, by their structure alone; fields as `Sensitivity` has them."""

    units: tuple[str, ...]
    stored: Tensor
    products: Tensor


def unit_costs(
    network: nn.Module, adapter: Adapter, recipes: dict[int, Recipe], data: CalibrationSet, timesteps: Tensor
) -> UnitCosts:
    """Of the units of a float network; arguments as for `measure`, nothing is computed."""
    chains = []
    for recipe in recipes.values():
        with torch.device("meta"):
            twin = adapter.build(adapter.config_of(network))
        twin = insert_quantizers(twin, recipe, adapter, timesteps)
        chains.append({s.name: s.module for s in adapter.chain(twin)})
    first = chains[0]
    units = [name for name in first if any(m.weight_quantizers for m in quant_layers(first[name]).values())]
    stored = torch.tensor([[_stored_bytes(chain[name]) for chain in chains] for name in units])
    return UnitCosts(tuple(units), stored, torch.tensor(_products(network, adapter, units, data)))


def all_states(trajectories, samples: int) -> CalibrationSet:
    """Every recorded step of the first `samples` samples, by step; with guidance twice (see `gather`)."""
    steps = torch.arange(trajectories.steps).repeat_interleave(samples)
    return gather(trajectories, steps, torch.arange(samples).repeat(trajectories.steps))


@torch.no_grad()
def measure(
    network: nn.Module,
    adapter: Adapter,
    recipes: dict[int, Recipe],
    calibration: CalibrationSet,
    rollouts: Rollouts,
    samples: int,
    seed: int,
    tick: Callable[[str], None] = lambda unit: None,
) -> Sensitivity:
    """The sensitivity of every unit of a float network.

    recipes: by weight width, alike in all else; calibration: the states they calibrate on. rollouts: float trajectories
    and the sampler's path; the first `samples` of them are measured. tick: told each unit when it is done.
    """
    timesteps = rollouts.trajectories.timesteps
    quantized = [calibrate(network, adapter, r, calibration, seed, timesteps).network for r in recipes.values()]
    data = all_states(rollouts.trajectories, samples)
    frontier = Frontier(network, adapter, data, BATCH)
    chains = [{s.name: s.module for s in adapter.chain(each)} for each in quantized]
    costs = unit_costs(network, adapter, recipes, data, timesteps)
    prediction = torch.cat([part for _, part in frontier.batch_outputs(adapter.chain(network)[-1].name)])
    single, end = [], []
    for name in costs.units:
        found = [
            _errors(frontier, name, chain[name], each, prediction, rollouts.path, timesteps, samples)
            for chain, each in zip(chains, quantized, strict=True)
        ]
        single.append(torch.stack([errors for errors, _ in found]))
        end.append(torch.stack([error for _, error in found]))
        tick(name)
    layers = tuple(tuple(_layer_names(quantized[0], name)) for name in costs.units)
    errors, at_the_end = torch.stack(single), torch.stack(end)
    steps, carried = tuple(timesteps.tolist()), _carried(rollouts.path, len(timesteps))
    return Sensitivity(
        costs.units, layers, tuple(recipes), steps, errors, at_the_end, carried, costs.stored, costs.products
    )


def _carried(path: Path, steps: int) -> Tensor:
    """[S] float64: d end / d prediction of the first call of each step."""
    return path.coefficients[-1, [path.first_call(step) for step in range(steps)]]


def _errors(
    frontier: Frontier,
    name: str,
    module: nn.Module,
    network: nn.Module,
    prediction: Tensor,
    path: Path,
    timesteps: Tensor,
    samples: int,
) -> tuple[Tensor, Tensor]:
    """([S] of single steps, [] at the end) with `module`, the unit of a quantized network, in the float one's place."""
    found = zip(frontier.slices, _predictions(frontier, name, module, network), strict=True)
    differences = torch.cat([out - prediction[rows] for rows, out in found]).double()
    copies = len(differences) // (len(timesteps) * samples)
    if copies == 2:  # conditional, then unconditional
        conditional, unconditional = differences.chunk(2)
        differences = unconditional + path.scale * (conditional - unconditional)
    differences = differences.reshape(len(timesteps), samples, -1)
    end = torch.einsum("s,snd->nd", _carried(path, len(timesteps)).to(differences), differences)
    return differences.square().mean((1, 2)).cpu(), end.square().mean().cpu()


def _predictions(frontier: Frontier, name: str, module: nn.Module, network: nn.Module) -> Iterator[Tensor]:
    """The float network's predictions for all states, one segment's output taken from `module` of `network`."""
    segment = frontier.seek(name)
    chain = frontier.adapter.chain(frontier.network)
    rest = chain[[s.name for s in chain].index(name) + 1 :]
    for rows in frontier.slices:
        t = frontier.t[rows]
        with network.step_table.at(t):
            output = module(*frontier.arguments(segment, rows))
        state = segment.write(map_leaves(frontier.state(rows), read_rows), output)
        for later in rest:
            state = later(state)
        yield state.h


def _layer_names(network: nn.Module, unit: str) -> Iterator[str]:
    """Dotted names of the unit's layers with quantized weights."""
    for name, layer in quant_layers(network).items():
        if layer.weight_quantizers and (name == unit or name.startswith(f"{unit}.")):
            yield name


def _stored_bytes(unit: nn.Module) -> int:
    """Of the unit's quantized weights in a checkpoint: codes, scales and zero points."""
    layers = [layer for layer in quant_layers(unit).values() if layer.weight_quantizers]
    codes = sum(packed_bytes(m.weight.numel(), m.weight_quantizers[0].spec.bits) for m in layers)
    return codes + SCALE_BYTES * sum(q.scale.numel() for m in layers for q in m.weight_quantizers)


def _products(network: nn.Module, adapter: Adapter, units: Sequence[str], data: CalibrationSet) -> list[int]:
    """Weight products of each unit in one evaluation of one sample."""
    context = () if data.context is None else tuple(data.context.shape[1:])
    found = dict.fromkeys(units, 0)
    for product in cost_of(network, adapter, tuple(data.x.shape[1:]), context).products:
        unit = next((u for u in units if product.name == u or product.name.startswith(f"{u}.")), None)
        if unit is not None and product.weights:  # attention products have none
            found[unit] += product.macs
    return [found[unit] for unit in units]
