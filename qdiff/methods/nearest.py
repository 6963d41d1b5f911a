"""Plain rounding: ranges, and the nearest code. The baseline that every method must beat."""

from __future__ import annotations

from dataclasses import replace

from qdiff.methods.common import grids, selector
from qdiff.methods.options import MethodOptions
from qdiff.recipes.recipe import Recipe, Selector
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges


def recipe(options: MethodOptions) -> Recipe:
    """Weights and activations rounded to nearest, ranges by minimum and maximum unless the options say otherwise."""
    stages = [WeightRanges(RangeSpec(options.weight_range or "minmax"))]
    if options.act_bits is not None:
        stages.append(ActivationRanges(RangeSpec(options.act_range or "minmax")))
    return Recipe(
        "nearest", selector=selector(options, Selector(steps=10, per_step=16)), stages=tuple(stages), **grids(options)
    )


def searched(options: MethodOptions) -> Recipe:
    """The same with every range from the L2.4 search (methods §1.1)."""
    searching = replace(options, weight_range=options.weight_range or "shrink", act_range=options.act_range or "shrink")
    return replace(recipe(searching), name="nearest-lp")
