"""Minutes instead of hours: compensated rounding, then a short learned stage that is kept only where it helps."""

from __future__ import annotations

from qdiff.methods.common import grids, selector
from qdiff.methods.options import MethodOptions
from qdiff.recipes.recipe import Recipe, Selector
from qdiff.recipes.stages import (
    GPTQ,
    ActivationRanges,
    CorrectBias,
    Learn,
    Loss,
    RangeSpec,
    Reconstruct,
    RoundingPenalty,
    WeightRanges,
)


def recipe(options: MethodOptions) -> Recipe:
    """Our own recipe: docs/methods.md says what each stage brings.

    Rounding, biases and activation scales learn together on quantized-prefix inputs, so that each unit also makes up
    for the errors of those before it. Rounding starts close to the compensated codes, at a rate a hundred times the
    published one: that is what makes tens of iterations enough. Last, what is left of each unit's mean error goes.
    """
    stages = [WeightRanges(RangeSpec(options.weight_range or "shrink")), GPTQ()]
    learn = {"rounding": Learn(1e-1, "cosine"), "bias": Learn(1e-3, "cosine")}
    if options.act_bits is not None:
        stages.append(ActivationRanges(RangeSpec(options.act_range or "shrink")))
        learn["scale"] = Learn(options.act_rate or 1e-4, "cosine")
    stages.append(
        Reconstruct(
            learn=learn,
            iterations=options.iterations or 80,
            batch_size=options.batch_size or 16,
            inputs="quantized",
            loss=Loss(2.0),
            penalty=RoundingPenalty(weight=1e-3, beta_start=10.0),
            keep="better",
            sharpen=8.0,
        )
    )
    stages.append(CorrectBias())
    return Recipe(
        "quick", selector=selector(options, Selector(steps=10, per_step=16)), stages=tuple(stages), **grids(options)
    )
