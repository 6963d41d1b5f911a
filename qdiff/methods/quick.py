"""Minutes instead of hours: compensated rounding, then a short learned stage that is kept only where it helps."""

from __future__ import annotations

from qdiff.methods.common import grids, selector
from qdiff.methods.options import MethodOptions
from qdiff.spec import (
    ActivationRanges,
    Compensate,
    Learn,
    Loss,
    RangeSpec,
    Recipe,
    Reconstruct,
    WeightRanges,
)


def recipe(options: MethodOptions) -> Recipe:
    """Our own recipe: see docs/methods.md for what each stage brings."""
    stages = [WeightRanges(RangeSpec(options.weight_range or "shrink")), Compensate()]
    if options.act_bits is not None:
        stages.append(ActivationRanges(RangeSpec(options.act_range or "minmax")))
    learn = {"rounding": Learn(1e-2, "cosine"), "bias": Learn(1e-3, "cosine")}
    if options.act_bits is not None:
        learn["scale"] = Learn(options.act_rate or 4e-4, "cosine")
    stages.append(
        Reconstruct(
            learn=learn,
            iterations=options.iterations or 50,
            batch_size=options.batch_size or 16,
            inputs="quantized",
            loss=Loss(2.0),
            keep="better",
        )
    )
    return Recipe("quick", selector=selector(options, 10, 16), stages=tuple(stages), **grids(options))
