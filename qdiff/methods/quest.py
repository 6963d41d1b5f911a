"""QuEST (arXiv 2402.03666): docs/methods.md says where each number is from."""

from __future__ import annotations

from dataclasses import replace

from qdiff.methods.common import grids, learned_rounding, selector
from qdiff.methods.options import MethodOptions
from qdiff.recipes.recipe import Recipe, Rule, Selector, StepGroups
from qdiff.recipes.stages import ActivationRanges, Finetune, Learn, RangeSpec

# Whose weights the second finetuning learns, by family (methods §3.3); classes of pixel models were not released.
CRITICAL = {
    "pixel": ("role:attention",),
    "latent": ("role:attention", "role:feed_forward"),
    "text": ("role:feed_forward",),
}
TIME_ITERATIONS, CRITICAL_ITERATIONS = 16000, 6400  # 20 steps x 4 x 200 epochs, 20 epochs x 20 steps x 16


def recipe(options: MethodOptions) -> Recipe:
    """Learned rounding; activation ranges for each calibration step; then the time-embedding layers are finetuned, then
    attention and feed-forward layers, the whole network quantized.

    Activations of at most 4 bits have a scale per input channel, which no integer product can take out of its sum.
    """
    fields = grids(options)
    text = options.family == "text"
    states = selector(options, Selector(steps=25, per_step=128) if text else Selector(steps=20, per_step=256))
    batch_size = options.batch_size or (8 if text else 32)
    stages = learned_rounding(options, "shrink", max(1, batch_size // 2))
    if options.act_bits is not None:
        if options.act_bits <= 4:
            fields["activations"] = replace(fields["activations"], axis="in_channel")
        stages += [_activation_ranges(options), *_finetuning(options)]
    return Recipe(
        "quest",
        selector=states,
        stages=tuple(stages),
        rules=tuple(Rule(f"role:{end}", act_bits=8) for end in ("input", "output")),
        step_groups=StepGroups(states.steps, "hold", hold_every=10 if "hold_every_ten" in options.compat else None),
        **fields,
    )


def _activation_ranges(options: MethodOptions) -> ActivationRanges:
    """The best percentiles of each step's states, or minimum and maximum."""
    finder = options.act_range or "percentile"
    aggregate = "ema" if options.running_stat else "all"
    return ActivationRanges(RangeSpec(finder, aggregate=aggregate, prefix="quantized", batch_size=64))


def _finetuning(options: MethodOptions) -> list[Finetune]:
    """Time-embedding layers (TLA), then critical modules (CMA), each with the network's output beside (L_G)."""
    in_turn = "sequential_steps" in options.compat
    time_layers = Finetune(
        layers=("role:time",),
        learn={"weight": Learn(1e-5), "scale": Learn(1e-5)},
        scales="layers",
        iterations=options.act_iterations or TIME_ITERATIONS,
        batch_size=2,
        local=1.0,
        output=1.0,
        order="sequential" if in_turn else "interleaved",
        per_step=8 if in_turn else None,
    )
    critical = Finetune(
        layers=CRITICAL[options.family],
        learn={"weight": Learn(1e-5), "scale": Learn(options.act_rate or 1e-4)},
        scales="rest",
        iterations=options.act_iterations or CRITICAL_ITERATIONS,
        batch_size=4,
        local=1.0,
        output=1.0,
        order="sequential" if in_turn else "interleaved",
        rounds=20 if in_turn and (options.act_iterations or CRITICAL_ITERATIONS) >= 20 else 1,
    )
    return [time_layers, critical]
