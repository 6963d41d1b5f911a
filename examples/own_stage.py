"""A recipe of one's own, with a stage that is registered from outside the package.

The stage clips every weight at some standard deviations of its output channel before it is rounded: a plain idea that
the toolkit does not have. A stage is a dataclass, which says what a recipe says about it, and a handler, which does it.

    python examples/own_stage.py
"""

from dataclasses import dataclass, replace

import torch

import qdiff
from qdiff.nn.layers import quant_layers
from qdiff.recipes.recipe import Selector
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges


@dataclass(frozen=True)
class ClipWeights:
    """Narrow every weight grid so that it ends at `deviations` standard deviations of its channel."""

    deviations: float = 3.0


@torch.no_grad()
def clip_weights(run, stage: ClipWeights, number: int) -> None:
    """Carry the stage out on the calibration `run`: its `network` is the quantized copy of `float_network`."""
    for name, layer in quant_layers(run.network).items():
        weight = run.float_network.get_submodule(name).weight
        for part, quantizer in zip(layer.slices, layer.weight_quantizers, strict=True):
            rows = weight[:, part].flatten(1)
            span = 2 * stage.deviations * rows.std(1, keepdim=True)
            widest = quantizer.scale.flatten(1) * (2**quantizer.spec.bits - 1)
            scale = (quantizer.scale.flatten(1) * (span / widest).clamp(max=1)).view_as(quantizer.scale)
            quantizer.set_grid(replace(quantizer.grid, scale=scale))
        layer.freeze(layer.nearest_codes(weight))


def clipped(options: qdiff.MethodOptions) -> qdiff.Recipe:
    """A method: a function from options to a recipe."""
    return qdiff.Recipe(
        "clipped",
        weights=qdiff.QuantSpec(options.weight_bits, "signed", "out_channel"),
        activations=None if options.act_bits is None else qdiff.QuantSpec(options.act_bits),
        selector=Selector(steps=options.selector_steps or 10, per_step=options.per_step or 4),
        stages=(WeightRanges(RangeSpec()), ClipWeights(3.0), ActivationRanges()),
    )


def register() -> None:
    """Make both known, to `qdiff.quantize(method="clipped")`, to recipe files, and to changes of a recipe's fields."""
    qdiff.register_stage("clip_weights", ClipWeights, clip_weights)
    qdiff.register_method("clipped", clipped)


def main(steps: int = 20, samples: int = 4, deviations: float = 2.5) -> qdiff.QuantizedModel:
    """Calibrate the bundled latent model by it. Returns the quantized model."""
    register()
    model = qdiff.load_model("models/cifar10-ldm")
    data = model.record(samples, steps=steps)
    options = {"weight_bits": 4, "act_bits": 8, "selector_steps": min(steps, 10), "per_step": samples}
    changes = [f"clip_weights.deviations={deviations}"]
    quantized = qdiff.quantize(model, method="clipped", data=data, changes=changes, **options)
    error = (quantized.sample(4, steps=steps) - model.sample(4, steps=steps)).square().mean()
    print(f"{quantized.recipe.name}: {-10 * error.log10().item():.2f} dB to the float images")
    return quantized


if __name__ == "__main__":
    main()
