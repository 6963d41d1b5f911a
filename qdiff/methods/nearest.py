"""Plain rounding: ranges, and the nearest code. The baseline that every method must beat."""

from __future__ import annotations

from qdiff.methods.common import grids, selector
from qdiff.methods.options import MethodOptions
from qdiff.spec import ActivationRanges, RangeSpec, Recipe, WeightRanges


def recipe(options: MethodOptions) -> Recipe:
    """Weights and activations rounded to nearest, ranges by minimum and maximum unless the options say otherwise."""
    stages = [WeightRanges(RangeSpec(options.weight_range or "minmax"))]
    if options.act_bits is not None:
        stages.append(ActivationRanges(RangeSpec(options.act_range or "minmax")))
    return Recipe("nearest", selector=selector(options, 10, 16), stages=tuple(stages), **grids(options))
