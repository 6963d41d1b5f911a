"""What the original code's command line has to say about a file of ours."""

from __future__ import annotations

from torch import nn

from qdiff.checkpoints.qdiffusion import original_softmax_bits
from qdiff.families import Adapter
from qdiff.recipes.recipe import Recipe


def original_flags(recipe: Recipe, adapter: Adapter, network: nn.Module) -> str:
    """The flags with which the original code reads a file written from this recipe."""
    flags = [f"--weight_bit {recipe.weights.bits}"] + ["--split"] * recipe.split_shortcuts
    if recipe.activations is not None:
        flags += [f"--quant_act --act_bit {recipe.activations.bits}"]
        flags += ["--a_sym"] * (recipe.activations.kind == "signed")
        flags += [f"--sm_abit {original_softmax_bits(recipe, adapter, network)}"]
    return " ".join(flags)
