"""An ONNX graph while it is being written: nodes in order, constants kept once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
CONTRIB = "com.microsoft"


class Builder:
    """Nodes and initializers. Names of values are strings; `""` is an operator's absent optional input."""

    def __init__(self) -> None:
        self._model = onnx.ModelProto(ir_version=10, producer_name="qdiff")  # filled in place: weights are large
        self._model.graph.name = "network"
        self.scope = ""  # the module that nodes are named after
        self._constants: dict[tuple, str] = {}
        self._results: dict[tuple, list[str]] = {}
        self._count = 0

    def append(self, node: onnx.NodeProto) -> None:
        """Add a node as it is."""
        self._model.graph.node.append(node)

    def reads(self, name: str) -> bool:
        """Whether a node has that input."""
        return any(name in node.input for node in self._model.graph.node)

    def fresh(self, hint: str) -> str:
        """A name that no value has yet."""
        self._count += 1
        return f"{self.scope}/{hint}_{self._count}" if self.scope else f"{hint}_{self._count}"

    def constant(self, value: Any, dtype: Any = None, hint: str = "constant") -> str:
        """An initializer; equal ones are one."""
        array = np.ascontiguousarray(value, dtype=dtype)
        array = array.reshape(np.shape(value))  # ascontiguousarray makes an axis of scalars
        key = (str(array.dtype), array.shape, hashlib.sha256(array.reshape(-1)).digest())
        if key not in self._constants:
            name = self.fresh(hint)
            self._model.graph.initializer.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def packed(self, value: np.ndarray, data_type: int, hint: str) -> str:
        """An initializer of a type that numpy lacks (4-bit integers); value: as int8 or uint8."""
        name = self.fresh(hint)
        levels = np.pad(value.reshape(-1).astype(np.uint8) & 15, (0, value.size % 2))
        raw = (levels[::2] | levels[1::2] << 4).tobytes()
        self._model.graph.initializer.append(helper.make_tensor(name, data_type, value.shape, raw, raw=True))
        return name

    def add(self, kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """A node; the same one again gives the first one's outputs. Returns their name, or names where there are
        several."""
        key = (kind, inputs, domain, outputs, repr(sorted(attributes.items())))
        if key not in self._results:
            names = [self.fresh(kind.lower()) for _ in range(outputs)]
            node = helper.make_node(kind, list(inputs), names, name=names[0], domain=domain, **attributes)
            self.append(node)
            self._results[key] = names
        names = self._results[key]
        return names[0] if outputs == 1 else names

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """shape: 0 keeps an axis of the input, -1 takes what is left."""
        return self.add("Reshape", x, self.constant(shape, np.int64, "shape"))

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        metadata: dict[str, str],
        contrib: bool,
    ) -> onnx.ModelProto:
        """The finished model; contrib: whether it has operators of ONNX Runtime's own."""
        graph = self._model.graph
        graph.input.extend(inputs)
        graph.output.extend(outputs)
        opsets = [helper.make_opsetid("", OPSET)] + ([helper.make_opsetid(CONTRIB, 1)] if contrib else [])
        self._model.opset_import.extend(opsets)
        helper.set_model_props(self._model, metadata)
        return self._model


def value_info(name: str, dtype: Any, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    """dtype: numpy's; shape: a name for an open axis."""
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


INT4, UINT4 = TensorProto.INT4, TensorProto.UINT4
