"""The dialect for any runtime: standard ONNX, tensors as PyTorch has them, quantization as pairs of QuantizeLinear and
DequantizeLinear in front of every layer, weights as codes that a DequantizeLinear reads.

Runtimes match these pairs with the layer behind them and multiply integers, or run what is written, the simulation. To
be matched, weights are stored as int8 codes without zero points wherever those fit: all of 7 bits or fewer, and 8-bit
ones of symmetric grids. Grids that are narrower than the type that stores their codes clip the input before.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from qdiff.deploy.onnx.builder import INT4, UINT4
from qdiff.deploy.onnx.lowering import Lowering, Stored
from qdiff.deploy.onnx.plans import Codes, GridPlan, LayerPlan, PartPlan
from qdiff.deploy.onnx.tracer import Op, View


class PortableLowering(Lowering):
    """Every value is stored axis by axis as the recorded operation gave it."""

    four_bit = False  # whether weights of 4 bits or fewer are stored in 4: half the size, but not what engines match

    # Layers

    def lower_layer(self, op: Op) -> str:
        plan: LayerPlan = op["plan"]
        product = self._convolution if plan.kind == "conv" else self._linear
        total, bias = None, plan.bias
        for part in plan.parts:
            x = self._channels(op.inputs[0], part, 1 if plan.kind == "conv" else len(op.shape) - 1, len(plan.parts))
            if part.act is not None:
                x = self.snap(x, part.act, axis=1 if plan.kind == "conv" else len(op.shape) - 1, rank=len(op.shape))
            share = product(plan, part, x, bias)
            total, bias = share if total is None else self.builder.add("Add", total, share), None
        return total

    def _channels(self, view: View, part: PartPlan, axis: int, parts: int) -> str:
        """The part's input; of a concatenation that is cut where it was joined, the tensor that was joined."""
        if parts == 1:
            return self.natural(view)
        if view.op.kind == "concat" and view.op["axis"] == axis and view.layout.is_whole:
            start = 0
            for joined in view.op.inputs:
                if (start, start + joined.shape[axis]) == (part.channels.start, part.channels.stop):
                    return self.natural(joined)
                start += joined.shape[axis]
        ends = [self.builder.constant([value], np.int64) for value in (part.channels.start, part.channels.stop, axis)]
        return self.builder.add("Slice", self.natural(view), *ends)

    def _convolution(self, plan: LayerPlan, part: PartPlan, x: str, bias: np.ndarray | None) -> str:
        inputs = [x, self.weight(part.weight)] + ([] if bias is None else [self.builder.constant(bias)])
        geometry = {"strides": plan.stride, "pads": plan.padding * 2, "dilations": plan.dilation}
        return self.builder.add("Conv", *inputs, kernel_shape=plan.shape[2:], **geometry)

    def _linear(self, plan: LayerPlan, part: PartPlan, x: str, bias: np.ndarray | None) -> str:
        product = self.builder.add("MatMul", x, self.weight(part.weight, transposed=True))
        return product if bias is None else self.builder.add("Add", product, self.builder.constant(bias))

    def weight(self, weight: Codes | np.ndarray, transposed: bool = False) -> str:
        """[O, C, ...] as floats, from codes where it has any; transposed: [C, O] of a linear layer."""
        order = (lambda values: values.T) if transposed else (lambda values: values)
        if not isinstance(weight, Codes):
            return self.builder.constant(order(weight), hint="weight")
        kind, codes, zero = self._stored_codes(weight)
        if kind is None:
            return self.builder.constant(order(weight.values()), hint="weight")

        def store(values: np.ndarray, hint: str) -> str:
            narrow = kind in (INT4, UINT4)
            return self.builder.packed(values, kind, hint) if narrow else self.builder.constant(values, hint=hint)

        inputs = [store(order(codes), "codes"), self.builder.constant(weight.scale)]
        if zero.any():
            inputs.append(store(zero, "zero"))
        return self.builder.add("DequantizeLinear", *inputs, axis=int(transposed))

    def _stored_codes(self, weight: Codes) -> tuple[int | None, np.ndarray, np.ndarray]:
        """ONNX's type that stores the codes, they, and their zero points; no type where none holds all of them."""
        codes, zero, signed = weight.codes, weight.zero_point, weight.spec.qmin < 0
        if self.four_bit and weight.spec.bits <= 4:
            kind, dtype, low, high = (INT4, np.int8, -8, 7) if signed else (UINT4, np.uint8, 0, 15)
        else:
            centered = codes - zero.reshape(-1, *[1] * (codes.ndim - 1))
            if centered.min() >= -128 and centered.max() <= 127:
                return TensorProto.INT8, centered.astype(np.int8), np.zeros_like(zero, np.int8)
            kind, dtype, low, high = (
                (TensorProto.INT8, np.int8, -128, 127) if signed else (TensorProto.UINT8, np.uint8, 0, 255)
            )
        if low <= zero.min() and zero.max() <= high:
            return kind, codes.astype(dtype), zero.astype(dtype)
        return None, codes, zero

    # Grids

    def snap(self, x: str, grid: GridPlan, axis: int = -1, rank: int = 0) -> str:
        """x on the grid; axis, rank: of the channels and of x, where the grid has a scale per channel."""
        dtype = _code_type(grid)
        if not _stores(dtype, grid.zero_point):
            return self._snap_in_floats(x, grid, axis, rank)
        scale, zero = self.per_set(grid.scale), self.per_set(grid.zero_point.astype(dtype))
        if grid.bits not in (8, 16):
            ends = [
                ((end - grid.zero_point) * grid.scale.astype(np.float64)).astype(np.float32)
                for end in (grid.spec.qmin, grid.spec.qmax)
            ]
            if grid.per_channel:
                shape = (len(grid.scale), -1, *[1] * (rank - 1 - axis))
                lowest, highest = (self.per_set(end.reshape(shape)) for end in ends)
                x = self.builder.add("Min", self.builder.add("Max", x, lowest), highest)
            else:
                x = self.builder.add("Clip", x, *(self.per_set(end) for end in ends))
        attributes = {"axis": axis} if grid.per_channel else {}
        codes = self.builder.add("QuantizeLinear", x, scale, zero, **attributes)
        return self.builder.add("DequantizeLinear", codes, scale, zero, **attributes)

    def _snap_in_floats(self, x: str, grid: GridPlan, axis: int, rank: int) -> str:
        if not grid.per_channel:
            return self.snap_in_floats(x, grid)
        shape = (len(grid.scale), -1, *[1] * (rank - 1 - axis))
        return self.snap_in_floats(x, GridPlan(grid.scale.reshape(shape), grid.zero_point.reshape(shape), grid.spec))

    # Attention

    def lower_attention(self, op: Op) -> str:
        plan, (q, k, v) = op["plan"], op.inputs
        q, k = (self._scaled(self.natural(view), plan.operand_scale) for view in (q, k))
        order = list(range(len(op.shape)))
        # In front of its quantizer: ONNX Runtime repeats a pair that a Transpose follows, and errs with signed codes.
        transposed = self.builder.add("Transpose", k, perm=[*order[:-2], order[-1], order[-2]])
        q, k, v = (
            self._snapped(x, plan.grids.get(o)) for x, o in ((q, "q"), (transposed, "k"), (self.natural(v), "v"))
        )
        scores = self._scaled(self.builder.add("MatMul", q, k), plan.score_scale)
        weights = self._snapped(self.builder.add("Softmax", scores, axis=-1), plan.grids.get("w"))
        return self.builder.add("MatMul", weights, v)

    def _scaled(self, x: str, factor: float) -> str:
        return x if factor == 1.0 else self.builder.add("Mul", x, self.builder.constant(np.float32(factor)))

    def _snapped(self, x: str, grid: GridPlan | None) -> str:
        return x if grid is None else self.snap(x, grid)

    # Maps

    def lower_group_norm(self, op: Op) -> str:
        add, constant = self.builder.add, self.builder.constant
        groups, channels, x = op["groups"], op.shape[1], self.natural(op.inputs[0])
        flat = self.builder.reshape(x, [0, groups, -1])
        ones, zeros = constant(np.ones(groups, np.float32)), constant(np.zeros(groups, np.float32))
        normed = add("InstanceNormalization", flat, ones, zeros, epsilon=op["eps"])
        normed = self.builder.reshape(normed, [0, *op.shape[1:]])
        shape = (channels, *[1] * (len(op.shape) - 2))
        for kind, values in (("Mul", op["weight"]), ("Add", op["bias"])):
            normed = normed if values is None else add(kind, normed, constant(values.reshape(shape)))
        return normed

    def lower_silu(self, op: Op) -> Stored:
        return self.elementwise(op, lambda x: self.builder.add("Mul", x, self.builder.add("Sigmoid", x)))

    def lower_upsample(self, op: Op) -> str:
        scales = self.builder.constant([1, 1, op["factor"], op["factor"]], np.float32)
        mode = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.builder.add("Resize", self.natural(op.inputs[0]), "", scales, **mode)

    def lower_pad(self, op: Op) -> str:
        pads = self.builder.constant([*op["before"], *op["after"]], np.int64)
        return self.builder.add("Pad", self.natural(op.inputs[0]), pads, self.builder.constant(np.float32(0)))

    def lower_avg_pool(self, op: Op) -> str:
        size = [op["size"]] * 2
        return self.builder.add("AveragePool", self.natural(op.inputs[0]), kernel_shape=size, strides=size)


class FourBitLowering(PortableLowering):
    """The same with small files."""

    four_bit = True


def _code_type(grid: GridPlan) -> type:
    if grid.bits <= 8:
        return np.int8 if grid.spec.qmin < 0 else np.uint8
    return np.int16 if grid.spec.qmin < 0 else np.uint16


def _stores(dtype: type, values: np.ndarray) -> bool:
    info = np.iinfo(dtype)
    return bool((values >= info.min).all() and (values <= info.max).all())
