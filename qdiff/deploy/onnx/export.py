"""A calibrated network as an ONNX model, in one of two dialects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from qdiff.deploy.onnx.builder import Builder, value_info
from qdiff.deploy.onnx.lowering import Lowering
from qdiff.deploy.onnx.portable import FourBitLowering, PortableLowering
from qdiff.deploy.onnx.runtime import RuntimeLowering
from qdiff.deploy.onnx.tracer import Trace, static_size, trace
from qdiff.deploy.onnx.weight_types import WEIGHT_TYPES, with_uint8_weights
from qdiff.families import Adapter
from qdiff.nn.step_table import StepTable

DIALECTS: dict[str, type[Lowering]] = {
    "runtime": RuntimeLowering,
    "portable": PortableLowering,
    "portable-4bit": FourBitLowering,
}
INLINE_BYTES = 3 * 2**29  # of constants; larger models keep them in a file beside (protobuf ends at 2 GiB)


def make_model(
    network: nn.Module,
    adapter: Adapter,
    shape: tuple[int, ...],
    context_shape: tuple[int, ...] | None = None,
    dialect: str = "runtime",
    parameter_set: int | None = None,
) -> onnx.ModelProto:
    """The model in memory, its weights int8 (`qdiff.deploy.onnx.weight_types`); arguments as for `export_onnx`."""
    if dialect not in DIALECTS:
        raise ValueError(f"dialect: expected one of {', '.join(DIALECTS)}, found {dialect!r}")
    table = getattr(network, "step_table", None)
    sets = 1 if table is None else table.count
    if parameter_set is not None and not 0 <= parameter_set < sets:
        raise ValueError(f"parameter_set: expected 0 to {sets - 1}, found {parameter_set}")
    if dialect != "runtime" and parameter_set is None and sets > 1:
        raise ValueError(f"dialect {dialect}: holds one of the network's {sets} parameter sets; give parameter_set")
    recorded = trace(network, adapter, shape, context_shape)
    builder = Builder()
    output = DIALECTS[dialect](recorded, builder, parameter_set).lower()
    builder.scope = ""
    builder.append(onnx.helper.make_node("Identity", [output], ["output"], name="output"))
    inputs = [value_info(name, _dtype(op), ["N", *op.shape[1:]]) for name, op in recorded.inputs.items()]
    if builder.reads("set"):
        inputs.append(value_info("set", np.int64, []))
    outputs = [value_info("output", np.float32, ["N", *recorded.output.shape[1:]])]
    about = {"dialect": dialect, "weights": "int8", "parameter_set": parameter_set, "steps": None}
    about |= _description(adapter, recorded)
    if table is not None and parameter_set is None:
        about["steps"] = steps_to_plain(table)
    return builder.model(inputs, outputs, {"qdiff": json.dumps(about)}, dialect == "runtime")


def export_onnx(
    network: nn.Module,
    adapter: Adapter,
    path: str | Path,
    shape: tuple[int, ...],
    context_shape: tuple[int, ...] | None = None,
    dialect: str = "runtime",
    parameter_set: int | None = None,
    weight_type: str = "uint8",
) -> None:
    """Write a calibrated network as ONNX. Inputs: x [N, C, H, W] float32, t [N] float32, and what it is conditioned on
    as `context`; output: float32. Any number of samples N, one size.

    shape: (C, H, W); context_shape: (L, D) of a network with cross attention, () of a class-conditional one, whose
    labels are int64. dialect "runtime" is for ONNX Runtime on CPUs and holds all parameter sets, chosen by the scalar
    int64 input `set` where there are several; "portable" is standard ONNX with quantize and dequantize operators for
    any runtime and holds one, `parameter_set`; "portable-4bit" is the same with weights of at most 4 bits stored in 4
    instead of 8, which engines multiply as floats. weight_type "uint8" is exact on every CPU; "int8" is faster on many,
    and inexact on x86 CPUs without VNNI (`qdiff.deploy.onnx.weight_types`). Constants of more than 1.5 GiB go to a file
    beside, `path`.data.

    Raises ValueError for arguments at odds, naming a layer that is not calibrated, and naming an operator that has no
    counterpart and the module it stands in.
    """
    if weight_type not in WEIGHT_TYPES:
        raise ValueError(f"weight_type: expected one of {', '.join(WEIGHT_TYPES)}, found {weight_type!r}")
    model = make_model(network, adapter, shape, context_shape, dialect, parameter_set)
    write_model(with_uint8_weights(model) if weight_type == "uint8" else model, path)


def write_model(model: onnx.ModelProto, path: str | Path, inline_bytes: int | None = None) -> None:
    """Write a model, constants of more than `inline_bytes` (None: as `export_onnx` has it) in a file beside it."""
    path = Path(path)
    if constant_bytes(model) > (INLINE_BYTES if inline_bytes is None else inline_bytes):
        data = f"{path.name}.data"
        (path.parent / data).unlink(missing_ok=True)  # it would be appended to
        onnx.save_model(model, str(path), save_as_external_data=True, location=data)
    else:
        path.write_bytes(model.SerializeToString())


def weights_with_zero_points(model: onnx.ModelProto) -> tuple[int, int]:
    """Of a portable graph's weights that are codes: how many have zero points, and how many there are."""
    constants = {tensor.name for tensor in model.graph.initializer}
    codes = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    return sum(len(node.input) > 2 for node in codes), len(codes)


def unfit_for_tensorrt(model: onnx.ModelProto) -> tuple[int, int]:
    """Of a portable graph's quantizers, those of weights included: how many TensorRT does not take, since it has int8
    codes with zero point 0 alone, and how many there are."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] in constants):
            typed = constants[node.input[2] if len(node.input) > 2 else node.input[0]]
            zero = len(node.input) > 2 and any(typed.raw_data)
            found.append(typed.data_type != onnx.TensorProto.INT8 or zero)
    return sum(found), len(found)


def constant_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the model's constants."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def _dtype(op) -> str:
    return str(op.dtype).removeprefix("torch.")


def _description(adapter: Adapter, recorded: Trace) -> dict[str, Any]:
    from qdiff import __version__

    widest = max((static_size(op.shape) for op in recorded.ops if op.kind == "layer"), default=1)
    return {"toolkit": __version__, "family": adapter.family, "widest": widest}


def steps_to_plain(table: StepTable) -> dict[str, Any]:
    """A step table as plain data."""
    known = None if table.known is None else table.known.tolist()
    return {"count": table.count, "lookup": table.lookup.tolist(), "known": known}
