"""Carries out a recipe: stage after stage, unit after unit."""

from __future__ import annotations

import copy
import logging
import time

import torch
from torch import Tensor, nn

from qdiff.calibration.context import Calibration, Progress, RunOptions, UnitReport
from qdiff.calibration.hooks import training_mode
from qdiff.calibration.resume import Record
from qdiff.calibration.rollout import Rollouts
from qdiff.calibration.selectors import CalibrationSet
from qdiff.calibration.stages import STAGE_HANDLERS
from qdiff.calibration.store import Store
from qdiff.nn.family import Adapter
from qdiff.nn.layers import QuantLayer, quant_layers
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.recipe import Recipe

__all__ = ["Calibration", "Progress", "RunOptions", "UnitReport", "calibrate", "check_weights", "take_weights"]
logger = logging.getLogger(__name__)


def calibrate(
    float_network: nn.Module,
    adapter: Adapter,
    recipe: Recipe,
    data: CalibrationSet,
    seed: int,
    timesteps: Tensor | None = None,
    progress: Progress | None = None,
    weights_from: nn.Module | None = None,
    options: RunOptions | None = None,
    rollouts: Rollouts | None = None,
) -> Calibration:
    """Quantize a copy of the network by the recipe; the result's `network` is it.

    data: float states; timesteps: [S] of the sampler that made them, needed for parameter sets per step group.
    weights_from: a calibrated network of the same structure whose weight grids and codes are taken over before the
    first stage. rollouts: the trajectories with their sampler, needed for `Rollout` stages. Every random draw comes
    from a generator seeded with `seed`, the stage and the unit. With a record in the options a run that was killed
    goes on with its first unfinished unit, to the same result. Raises ValueError for
    a recipe that does not fit, and for a record of another plan.
    """
    options = options or RunOptions()
    team = options.team
    record = Record(options.record if team.is_main else None, options.plan, team.is_main)
    network = insert_quantizers(copy.deepcopy(float_network), recipe, adapter, timesteps)
    network.requires_grad_(False).eval()
    store = Store(next(network.parameters()).device, options.memory, options.scratch)
    run = Calibration(
        float_network, network, adapter, recipe, data, seed, progress or Progress(), options, store, record, rollouts
    )
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
        for quantizer, its in zip(layer.weight_quantizers, given.weight_quantizers, strict=True):
            quantizer.set_grid(its.grid)
        if layer.bias is not None:
            layer.bias.copy_(given.bias)
        layer.freeze(given.codes)


def _weight_form(layer: QuantLayer) -> str:
    """A layer's weight grids in words: equal for layers that can exchange codes."""
    grids = [f"{q.spec.bits} bits {q.spec.kind} {q.spec.axis}" for q in layer.weight_quantizers]
    return f"{list(layer.weight.shape)} " + (" and ".join(grids) or "float") + f", split at {layer.boundary}"
