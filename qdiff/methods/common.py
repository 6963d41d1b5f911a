"""The parts of a recipe that follow from the options alone."""

from __future__ import annotations

from typing import Any

from qdiff.methods.options import MethodOptions
from qdiff.spec import QuantSpec, Selector


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


def selector(options: MethodOptions, steps: int, per_step: int) -> Selector:
    """The uniform selector, with the method's numbers where the options give none."""
    return Selector("uniform", options.selector_steps or steps, options.per_step or per_step)
