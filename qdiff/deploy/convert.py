"""From a calibrated network, or a packed file, to the same network holding integer codes instead of float weights."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from qdiff.checkpoints.native import Checkpoint, PackedFile
from qdiff.checkpoints.packing import pack_codes
from qdiff.deploy.layers import IntegerAttention, OperandGrid, integer_layer
from qdiff.nn.layers import QuantAttention, QuantLayer, act_quantizers
from qdiff.nn.step_table import StepTable


def _integer_attention(module: nn.Module, steps: StepTable, policy: str | None) -> IntegerAttention | None:
    """The module's integer form; None for what is no attention product with quantized operands."""
    if not isinstance(module, QuantAttention):
        return None
    operands = (getattr(module, f"act_quantizer_{operand}") for operand in "qkvw")
    return IntegerAttention(module, steps, policy or module.policy) if all(each.enabled for each in operands) else None


@torch.no_grad()
def integer_network(network: nn.Module, attention: str | None = None) -> nn.Module:
    """A copy of a calibrated network with integer layers in place of the quantized ones; no float weight is copied.

    It is called as the network itself. Layers that a rule leaves float stay as they are. attention: the policy of
    `IntegerAttention`, None for the network's own. Raises ValueError naming a layer that is not calibrated.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, QuantLayer) and layer.weight_quantizers and not layer.frozen:
            raise ValueError(f"{name}: its weight has no codes yet; calibrate the network first")
    memo: dict[int, object] = {}  # what deepcopy takes as already copied

    def steps_of(table: StepTable) -> StepTable:
        return copy.deepcopy(table, memo)

    for module in network.modules():
        if isinstance(module, QuantLayer) and module.weight_quantizers:
            steps = steps_of(module.act_quantizers[0].steps if module.act_quantizers else network.step_table)
            spec = module.weight_quantizers[0].spec
            packed = pack_codes(module.codes, spec.bits, spec.qmin).to(module.codes.device)
            memo[id(module)] = integer_layer(module, packed, steps)
        elif (found := _integer_attention(module, steps_of(network.step_table), attention)) is not None:
            memo[id(module)] = found
    return copy.deepcopy(network, memo).eval().requires_grad_(False)


@torch.no_grad()
def load_integer(path: str | Path, attention: str | None = None, activations: bool = True) -> Checkpoint:
    """What `integer_network` makes of a packed checkpoint, read layer by layer: float weights are never held.

    attention: a policy, None for the one that the file records. activations: whether to quantize them. Raises what
    `load_checkpoint` raises.
    """
    file = PackedFile(path)
    if not activations:
        for quantizer in act_quantizers(file.network).values():
            quantizer.enabled = False
    for name, layer, packed in file.layers():
        steps = layer.act_quantizers[0].steps if layer.act_quantizers else file.network.step_table
        file.network.set_submodule(name, integer_layer(layer, packed, steps))
    for name, module in list(file.network.named_modules()):
        found = _integer_attention(module, file.network.step_table, attention)
        if found is not None:
            file.network.set_submodule(name, found)
    return file.finish()


def quantizes_activations(network: nn.Module) -> bool:
    """Whether a network, simulated or integer, has a grid for some activation."""
    simulated = any(quantizer.enabled for quantizer in act_quantizers(network).values())
    return simulated or any(isinstance(module, OperandGrid) for module in network.modules())


def is_integer(network: nn.Module) -> bool:
    """Whether a network has integer layers already."""
    return not any(isinstance(m, QuantLayer) and m.weight_quantizers for m in network.modules())
