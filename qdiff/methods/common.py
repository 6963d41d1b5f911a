"""The parts of a recipe that several methods share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qdiff.methods.options import MethodOptions
from qdiff.recipes.recipe import QuantSpec, Selector
from qdiff.recipes.stages import GPTQ, Learn, Loss, RangeSpec, Reconstruct, RoundingPenalty, Stage, WeightRanges


def grids(options: MethodOptions) -> dict[str, Any]:
    """The recipe fields for grids and splits: weights affine per output channel, activations per tensor."""
    symmetric = "signed" if options.act_symmetric else "affine"
    quantized = options.act_bits is not None
    return {
        "weights": QuantSpec(options.weight_bits, "affine", "out_channel"),
        "activations": QuantSpec(options.act_bits, symmetric) if quantized else None,
        "softmax": QuantSpec(options.softmax_bits, "unsigned") if quantized else None,
        "split_shortcuts": options.split,
        "compat": options.compat,
    }


def selector(options: MethodOptions, default: Selector) -> Selector:
    """A selector with the numbers of states that the options give."""
    return replace(
        default,
        steps=options.selector_steps or default.steps,
        per_step=options.per_step or default.per_step,
    )


def learned_rounding(options: MethodOptions, finder: str, batch_size: int) -> list[Stage]:
    """Q-Diffusion's stage W, which QuEST and AccuQuant build on: weight ranges, then AdaRound.

    `rounding_start="gptq"` starts it from error-compensated rounding, which no paper has.
    """
    stages: list[Stage] = [WeightRanges(RangeSpec(options.weight_range or finder))]
    if options.rounding_start == "gptq":
        stages.append(GPTQ())
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
    return stages
