"""One pass of error-compensated rounding (GPTQ, arXiv 2210.17323), then activation ranges. Nothing is learned."""

from __future__ import annotations

from qdiff.methods.common import grids, selector
from qdiff.methods.options import MethodOptions
from qdiff.recipes.recipe import Recipe, Selector
from qdiff.recipes.stages import GPTQ, ActivationRanges, RangeSpec, WeightRanges


def recipe(options: MethodOptions) -> Recipe:
    """Weight grids by the L2.4 search, compensated rounding, activations by minimum and maximum."""
    stages = [WeightRanges(RangeSpec(options.weight_range or "shrink")), GPTQ()]
    if options.act_bits is not None:
        stages.append(ActivationRanges(RangeSpec(options.act_range or "minmax")))
    return Recipe(
        "gptq", selector=selector(options, Selector(steps=10, per_step=16)), stages=tuple(stages), **grids(options)
    )
