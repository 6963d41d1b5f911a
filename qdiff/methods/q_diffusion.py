"""Q-Diffusion (arXiv 2302.04304), as published: docs/methods.md says where each number is from."""

from __future__ import annotations

from qdiff.methods.common import grids, learned_rounding, selector
from qdiff.methods.options import MethodOptions
from qdiff.recipes.recipe import Recipe, Selector
from qdiff.recipes.stages import ActivationRanges, Learn, Loss, RangeSpec, Reconstruct


def recipe(options: MethodOptions) -> Recipe:
    """Stage W learns rounding on quantized-prefix inputs, stage A activation scales on float-prefix inputs.

    `rounding_start="gptq"` starts stage W from error-compensated rounding, which the paper does not have.
    """
    batch_size = options.batch_size or 32
    stages = learned_rounding(options, _finder(options), batch_size)
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
    return Recipe(
        "q-diffusion",
        selector=selector(options, Selector(steps=20, per_step=256)),
        stages=tuple(stages),
        **grids(options),
    )


def _finder(options: MethodOptions) -> str:
    """Ranges of the pixel models are minimum and maximum, those of the latent ones the L2.4 search (methods §1.1)."""
    return "minmax" if options.family == "pixel" else "shrink"


def _activation_ranges(options: MethodOptions) -> ActivationRanges:
    """From a few states, or with running statistics a moving average over all of them (methods §1.1, B4, B5).

    Without running statistics the ranges come from 64 states (16 for Stable Diffusion), drawn at random, or for the
    other latent models spread over the steps; the original takes these from one step only (B4).
    """
    finder, size = options.act_range or _finder(options), 16 if options.family == "text" else 64
    first = RangeSpec(finder, aggregate="first", prefix="quantized", batch_size=size)
    moving = RangeSpec(finder, aggregate="ema", prefix="quantized", batch_size=size)
    if options.softmax_running_stat:
        return ActivationRanges(first, softmax=moving)
    if options.running_stat:
        return ActivationRanges(moving)
    inputs = "stratified" if options.family == "latent" else "random"
    if "first_step_ranges" in options.compat and options.family == "latent":
        inputs = "first"
    return ActivationRanges(first, inputs=inputs, samples=size)
