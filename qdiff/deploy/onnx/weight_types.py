"""The bytes that hold a graph's weights, and which of them this CPU multiplies exactly.

x86 CPUs without VNNI multiply uint8 by int8 in pairs, whose sum is held in 16 bits and cut off where it does not fit.
Two products with uint8 always fit while the int8 codes lie within 64 of 0, as weights of 7 bits or fewer do. Products
of uint8 and uint8 are exact everywhere. Hence a graph has one of two forms:

int8: all weights, and all right operands of attention, are int8. Exact where the CPU's sums are wide enough.
uint8: weights whose codes may not fit are uint8, with a zero point of 128; so are attention's operands. Exact
everywhere.

ONNX Runtime's option `session.x64quantprecision` is no third form: it makes constants uint8 while a session opens, but
leaves the operands of attention, which are computed, as they are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import cache

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qdiff.deploy.onnx.builder import CONTRIB, OPSET, value_info

WEIGHT_TYPES = ("int8", "uint8")
SIGN = 128  # what is added to an int8 code, and to its zero point, to store it as uint8
FITTING = 64  # |code| up to which two products with uint8 fit 16 bits
# Operators that read weights: positions of their codes and zero point.
READERS = {"MatMulIntegerToFloat": (1, 5), "DequantizeLinear": (0, 2)}
PROBED = ((1, 64), (64, 8)), ((48, 511), (511, 40)), ((2, 33, 70), (2, 70, 24))  # operands; sums stay below 2^24
TIMED = (512, 576), (576, 128)
REPEATS = 7


def with_uint8_weights(model: ModelProto) -> ModelProto:
    """Bring a graph from the form int8 to the form uint8, in place. It computes the same.

    model: as `make_model` gives it. In portable dialects activations stay as they are.
    """
    about = next(entry for entry in model.metadata_props if entry.key == "qdiff")
    described = json.loads(about.value)
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    codes = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8}
    readers = list(_weight_readers(model))
    shifted = {name for node, name, zero in readers if _input(node, zero) or not _fits(codes[name])}
    for node, name, zero in readers:
        if name in shifted:
            _shift_zero_point(model, node, zero, sizes[node.input[1]] if node.op_type == "DequantizeLinear" else ())
    if described["dialect"] == "runtime":
        shifted = codes.keys() - {name for _, name, _ in readers if name not in shifted}
    for name in shifted:
        _shift(codes[name])
    about.value = json.dumps(described | {"weights": "uint8"})
    return model


def may_saturate(model: ModelProto) -> bool:
    """Whether x86 CPUs without VNNI may multiply a graph's int8 weights, or operands of attention, inexactly."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    about = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "qdiff"))
    products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    computed = about["weights"] == "int8" and any(node.input[1] not in constants for node in products)
    return computed or any(not _fits(constants[name]) for _, name, _ in _weight_readers(model))


def uint8_weights(model: ModelProto) -> int:
    """How many weights, or operands of attention, a graph has as uint8."""
    unsigned = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.UINT8}
    readers = {node.input[READERS[node.op_type][0]] for node in model.graph.node if node.op_type in READERS}
    return len(readers & unsigned)


def _weight_readers(model: ModelProto) -> Iterator[tuple[NodeProto, str, int]]:
    """(node, name of its int8 weights, position of their zero point)"""
    signed = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8}
    for node in model.graph.node:
        position, zero = READERS.get(node.op_type, (0, 0))
        if zero and node.input[position] in signed:
            yield node, node.input[position], zero


def _input(node: NodeProto, position: int) -> str:
    """The name of an input, "" where it is absent."""
    return node.input[position] if len(node.input) > position else ""


def _fits(tensor: TensorProto) -> bool:
    codes = np.frombuffer(tensor.raw_data, np.int8)
    return codes.size == 0 or (codes.min() >= -FITTING and codes.max() <= FITTING)


def _shift(tensor: TensorProto) -> None:
    tensor.raw_data = (np.frombuffer(tensor.raw_data, np.uint8) ^ SIGN).tobytes()
    tensor.data_type = TensorProto.UINT8


def _shift_zero_point(model: ModelProto, node: NodeProto, position: int, shape: tuple[int, ...]) -> None:
    """Give a node the zero point of shifted codes, as a constant of its own: activations may share the former one.

    shape: that of an absent zero point, which stands for 0.
    """
    former = _input(node, position)
    name = f"{former or 'x'.join(map(str, shape))}/uint8"
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    if name not in constants:
        values = numpy_helper.to_array(constants[former]) if former else np.zeros(shape, np.int8)
        made = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)
        _shift(made)
        model.graph.initializer.append(made)
    node.input.extend([""] * (position + 1 - len(node.input)))
    node.input[position] = name


@cache
def fastest_exact() -> str:
    """The form that ONNX Runtime computes fastest on this CPU among those that it computes exactly.

    Found by small products, once in a process. Exact forms give the same bits, so the choice changes no result.
    Raises ValueError where none is exact.
    """
    exact = [form for form in WEIGHT_TYPES if is_exact(form)]
    if not exact:
        raise ValueError("runtime onnx: expected exact products of bytes, found inexact ones on this CPU")
    return exact[0] if len(exact) == 1 else min(exact, key=_seconds)


@cache
def is_exact(form: str) -> bool:
    """Whether ONNX Runtime computes a form's products exactly on this CPU, of constants and of computed operands."""
    largest = {"int8": [127], "uint8": [127, FITTING]}[form]
    return all(_is_exact(form, size, *shapes) for size in largest for shapes in PROBED)


def _is_exact(form: str, largest: int, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> bool:
    random = np.random.default_rng(0)
    a = random.integers(0, 256, a_shape).astype(np.uint8)
    b = random.choice(np.array([-largest - (largest == 127), largest], np.int8), b_shape)
    a[..., 0, :], b[..., 0] = 255, largest  # the largest sums
    expected = a.astype(np.int64) @ b.astype(np.int64)
    computed = [True] if largest == FITTING else [True, False]
    return all((product(a, b, form, constant) == expected).all() for constant in computed)


def product(a: np.ndarray, b: np.ndarray, form: str, constant: bool) -> np.ndarray:
    """a @ b as ONNX Runtime computes it in a form, int32 sums as float32.

    a: uint8 [..., M, K]; b: int8 [..., K, N]; constant: whether b is a weight, or an operand that is computed.
    """
    session, feed = _session_of_product(a, b, form, constant)
    return session.run(None, feed)[0]


def _session_of_product(a: np.ndarray, b: np.ndarray, form: str, constant: bool) -> tuple:
    import onnxruntime

    shift = form == "uint8" and not constant
    inputs = [value_info("a", np.uint8, a.shape)]
    if not constant:
        inputs.append(value_info("b", np.uint8 if shift else np.int8, b.shape))
    values = {"one": np.float32(1), "zero": np.uint8(0), "b_zero": np.uint8(SIGN)} | ({"b": b} if constant else {})
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    names = ["a", "b", "one", "one", "zero"] + ["b_zero"] * shift
    node = helper.make_node("MatMulIntegerToFloat", names, ["y"], domain=CONTRIB)
    graph = helper.make_graph([node], "product", inputs, [value_info("y", np.float32, None)], constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, {"qdiff": json.dumps({"dialect": "runtime"})})
    if form == "uint8":
        with_uint8_weights(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    b = (b.view(np.uint8) ^ SIGN) if shift else b
    return session, {"a": a} if constant else {"a": a, "b": b}


def _seconds(form: str) -> float:
    """The shortest of some runs of a product of a layer's size."""
    a, b = np.full(TIMED[0], 100, np.uint8), np.full(TIMED[1], 100, np.int8)
    session, feed = _session_of_product(a, b, form, constant=True)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - started)
    return min(times)
