"""Quantizers put into a float network by a recipe's rules: layers and attention products become quantized ones."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from qdiff.nn.family import Adapter
from qdiff.nn.layers import QUANT_LAYERS, QuantAttention
from qdiff.nn.step_table import StepTable
from qdiff.recipes.layer_names import Roles
from qdiff.recipes.recipe import Recipe, StepGroups, softmax_spec


def insert_quantizers(
    network: nn.Module, recipe: Recipe, adapter: Adapter, timesteps: Tensor | None = None
) -> nn.Module:
    """Replace the network's layers and attention products by quantized ones, in place; return the network.

    Parameters keep their names and identity; nothing is quantized until calibration or a checkpoint sets ranges and
    codes. The network gains a `step_table`, told the timesteps at every forward. timesteps: [S] of the calibration's
    sampler, needed where the recipe has parameter sets per step group. Raises ValueError for layers without a
    quantized form and for rules that match no layer.
    """
    steps = StepTable(adapter.num_timesteps(network), recipe.step_groups, timesteps)
    boundaries = adapter.split_boundaries(network) if recipe.split_shortcuts else {}
    one_set = StepTable(steps.num_timesteps, StepGroups())
    layers = {n: m for n, m in network.named_modules() if type(m) in QUANT_LAYERS}
    roles = adapter.roles(network)
    _check_rules(recipe, list(layers), roles)
    for name, layer in layers.items():
        weight_spec, act_spec = recipe.layer_specs(name, roles)
        table = one_set if any(rule.one_set and rule.matches(name, roles) for rule in recipe.rules) else steps
        quantized = QUANT_LAYERS[type(layer)](layer, weight_spec, act_spec, table, boundaries.get(name))
        network.set_submodule(name, quantized.to(layer.weight.device).train(layer.training))
    if recipe.activations is not None:
        operand_spec = replace(recipe.activations, axis="tensor")
        for name, product in adapter.attention_products(network).items():
            quantized = QuantAttention(product, operand_spec, softmax_spec(recipe), steps)
            network.set_submodule(name, quantized.to(next(network.parameters()).device).train(product.training))
    device = next(network.parameters()).device
    network.step_table = (steps if device.type == "meta" else steps.to(device)).train(network.training)
    network.register_forward_pre_hook(_tell_timesteps, with_kwargs=True)
    network.register_forward_hook(_forget_timesteps, always_call=True)
    return network.to(next(network.parameters()).dtype)


def _tell_timesteps(network: nn.Module, args: tuple, kwargs: dict) -> None:
    network.step_table.select(args[1] if len(args) > 1 else kwargs["t"])


def _forget_timesteps(network: nn.Module, args: tuple, output: Tensor) -> None:
    network.step_table.index = None


def _check_rules(recipe: Recipe, names: list[str], roles: Roles) -> None:
    for rule in recipe.rules:
        if not any(rule.matches(name, roles) for name in names):
            raise ValueError(f"rule {rule.pattern!r} matches no layer of the network, e.g. {', '.join(names[:3])}")
