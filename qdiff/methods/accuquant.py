"""AccuQuant (arXiv 2510.20348), as far as it is described: docs/methods.md says which choices are ours."""

from __future__ import annotations

from qdiff.methods.common import grids, learned_rounding, selector
from qdiff.methods.options import MethodOptions
from qdiff.recipes.recipe import Recipe, Selector, StepGroups
from qdiff.recipes.stages import ActivationRanges, Learn, RangeSpec, Rollout

GROUP_SIZE = 5  # denoising steps; ours, no source says


def recipe(options: MethodOptions) -> Recipe:
    """Learned rounding, shared by all steps; then activation scales per group of denoising steps, and biases that all
    groups share, learn so that each group ends where the float network's does.

    What is learnt over groups is not published. Scales alone cannot undo what 4-bit weights do; a bias costs nothing
    when the network runs, and takes most of the error that adds up over steps.
    """
    finder = "minmax" if options.family == "pixel" else "shrink"
    batch_size = options.batch_size or 32
    stages = learned_rounding(options, finder, batch_size)
    if options.act_bits is not None:
        # --cali_lr is a rate in units of the scale, as for the other methods; ours is a share of each scale.
        scale = Learn(options.act_rate, "cosine") if options.act_rate else Learn(1e-2, "cosine", relative=True)
        stages += [
            ActivationRanges(RangeSpec(options.act_range or finder, prefix="quantized", batch_size=64)),
            Rollout(
                learn={"scale": scale, "bias": Learn(1e-3, "cosine")},
                iterations=options.act_iterations or 200,
                batch_size=min(batch_size, 16),
                order="interleaved",
            ),
        ]
    return Recipe(
        "accuquant",
        selector=selector(options, Selector("group_starts", steps=20, per_step=256)),
        stages=tuple(stages),
        step_groups=StepGroups(size=GROUP_SIZE) if options.act_bits is not None else StepGroups(),
        **grids(options),
    )
