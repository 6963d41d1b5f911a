"""Q-Diffusion (arXiv 2302.04304), as published for the pixel models: docs/methods.md says where each number is from."""

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
    RoundingPenalty,
    WeightRanges,
)


def recipe(options: MethodOptions) -> Recipe:
    """Stage W learns rounding on quantized-prefix inputs, stage A activation scales on float-prefix inputs.

    `rounding_start="gptq"` starts stage W from error-compensated rounding, which the paper does not have.
    """
    batch_size = options.batch_size or 32
    stages = [WeightRanges(RangeSpec(options.weight_range or "minmax"))]
    if options.rounding_start == "gptq":
        stages.append(Compensate())
    stages.append(
        Reconstruct(
            learn={"rounding": Learn(1e-3)},
            iterations=options.iterations or 20000,
            batch_size=batch_size,
            inputs="quantized",
            loss=Loss(2.0),
            penalty=RoundingPenalty(),
        )
    )
    if options.act_bits is not None:
        stages += [
            _activation_ranges(options),
            Reconstruct(
                learn={"scale": Learn(options.act_rate or 4e-4, "cosine")},
                iterations=options.act_iterations or 5000,
                batch_size=batch_size,
                inputs="float",
                loss=Loss(options.loss_p or 2.4),
            ),
        ]
    return Recipe("q-diffusion", selector=selector(options, 20, 256), stages=tuple(stages), **grids(options))


def _activation_ranges(options: MethodOptions) -> ActivationRanges:
    """From 64 random states, or with --running_stat a moving average over all of them (methods §1.1, B4, B5)."""
    finder = options.act_range or "minmax"
    if options.running_stat:
        return ActivationRanges(RangeSpec(finder, aggregate="ema", prefix="quantized", batch_size=64))
    first = RangeSpec(finder, aggregate="first", prefix="quantized", batch_size=64)
    return ActivationRanges(first, inputs="random", samples=64)
