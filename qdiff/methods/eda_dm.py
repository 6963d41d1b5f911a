"""EDA-DM (arXiv 2401.04585), as released: docs/methods.md says where each number is from."""

from __future__ import annotations

from dataclasses import dataclass

from qdiff.methods.common import selector
from qdiff.methods.options import MethodOptions
from qdiff.recipes.recipe import QuantSpec, Recipe, Rule, Selector
from qdiff.recipes.stages import GPTQ, ActivationRanges, Learn, Loss, RangeSpec, Reconstruct, Stage, WeightRanges

SEARCHED_VALUES = (
    2**16
)  # of each batch; the released search looks at all, which takes hours on a CPU and finds the same


@dataclass(frozen=True)
class Setting:
    """The published numbers of one task (methods §2.5)."""

    states: int  # N, each from a seed of its own
    range_batch: int  # states at once while ranges are found
    variety: float  # lambda
    taps: float  # mu
    weight_rate: tuple[float, float]  # lr_w at 4 and at 8 bits
    act_rate: tuple[float, float]  # lr_a
    iterations: int
    batch_size: int


PUBLISHED = {
    "cifar10": Setting(1024, 256, 1.2, 0.8, (5e-1, 5e-2), (5e-4, 1e-3), 5000, 32),
    "bedroom": Setting(1024, 32, 1.0, 1.0, (1e-2, 5e-4), (5e-3, 1e-4), 5000, 32),
    "church": Setting(1024, 32, 1.0, 1.0, (5e-2, 5e-2), (1e-4, 1e-4), 5000, 32),
    "imagenet": Setting(1024, 32, 1.2, 0.8, (5e-1, 1e-4), (1e-4, 1e-3), 1000, 32),
    "stable-diffusion": Setting(256, 2, 5.0, 0.8, (3e-2, 5e-4), (1e-4, 1e-4), 1000, 2),
}
OF_FAMILY = {"pixel": "cifar10", "latent": "church", "text": "stable-diffusion"}


def recipe(options: MethodOptions, task: str | None = None) -> Recipe:
    """States by density and variety; then rounding and activation scales learn together, unit by unit, on mixed inputs.

    task: whose published numbers to take, by default those of the family.
    """
    setting = PUBLISHED[task or OF_FAMILY[options.family]]
    at = 0 if options.weight_bits <= 4 else 1
    stages: list[Stage] = [WeightRanges(RangeSpec(options.weight_range or "theta"))]
    if options.rounding_start == "gptq":
        stages.append(GPTQ())
    learn = {"rounding": Learn(setting.weight_rate[at], "cosine")}
    if options.act_bits is not None:
        stages.append(_activation_ranges(options, setting))
        learn["scale"] = Learn(options.act_rate or setting.act_rate[at], "cosine")
    stages.append(
        Reconstruct(
            learn=learn,
            iterations=options.iterations or setting.iterations,
            batch_size=options.batch_size or setting.batch_size,
            inputs="mixed",
            mix=0.5,
            drop=0.5,
            loss=Loss(options.loss_p or 2.0, taps=setting.taps),
        )
    )
    quantized = options.act_bits is not None
    states = Selector("density_variety", steps=1, per_step=setting.states, variety=setting.variety)
    return Recipe(
        "eda-dm",
        weights=QuantSpec(options.weight_bits, "unsigned_mid", "out_channel"),
        activations=QuantSpec(options.act_bits, "unsigned_mid") if quantized else None,
        softmax=QuantSpec(options.softmax_bits, "unsigned") if quantized else None,
        split_shortcuts=True,
        rules=_ends(options),
        selector=selector(options, states),
        stages=tuple(stages),
        compat=options.compat,
    )


def _activation_ranges(options: MethodOptions, setting: Setting) -> ActivationRanges:
    """Moving averages of searched ranges, with quantized weights and quantized activations before."""
    return ActivationRanges(
        RangeSpec(
            options.act_range or "theta",
            aggregate="ema",
            momentum=0.9,
            prefix="quantized",
            batch_size=setting.range_batch,
            sample=SEARCHED_VALUES,
        )
    )


def _ends(options: MethodOptions) -> tuple[Rule, ...]:
    """First and last layer in 8 bits; or (E1) the layers that the released code finds in their place."""
    if "positional_ends" in options.compat:
        return (
            Rule("role:first_defined", weight_bits=8),
            Rule("role:output", weight_bits=8, act_bits=0),
            Rule("role:before_last_defined", act_bits=8),
        )
    return tuple(Rule(f"role:{end}", weight_bits=8, act_bits=8) for end in ("input", "output"))
