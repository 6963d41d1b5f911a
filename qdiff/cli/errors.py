"""What the command lines call the options of Python: the flags that errors name."""

from __future__ import annotations

from qdiff.utils.errors import FieldError

# Of recipes, machines and files alike for all commands; flags of a model differ between scripts (`flags_named`).
FLAGS = {
    "method": "--method",
    "changes": "--set",
    "weights.bits": "--weight_bit",
    "activations.bits": "--act_bit",
    "softmax.bits": "--sm_abit",
    "selector.steps": "--cali_st",
    "selector.per_step": "--cali_n",
    "weight_bits": "--weight_bit",
    "act_bits": "--quant_act",
    "act_symmetric": "--a_sym",
    "split": "--split",
    "device": "--device",
    "runtime": "--runtime",
    "prefer": "--prefer",
    "download": "--download",
    "folder": "--out",  # of recorded states
}


def told(error: Exception) -> str:
    """An error's message, with flags in place of the fields that have one."""
    return error.text(FLAGS) if isinstance(error, FieldError) else str(error)
