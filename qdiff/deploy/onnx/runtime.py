"""The dialect for ONNX Runtime on CPUs: channels last, products of uint8 and int8 codes, ONNX Runtime's own operators.

A convolution is one table lookup, which copies the rows of codes under its window side by side, and one product of
codes: `MatMulIntegerToFloat`, int32 sums and float32 output. Stride, padding and nearest upsampling are in the table.
ONNX Runtime's product is fast for uint8 times int8 or uint8 and for nothing else (int8 times int8: twenty times
slower), hence all activations are stored as uint8 (codes of signed grids plus 128). Weights are written as int8;
`qdiff.deploy.onnx.weight_types` makes uint8 of them where the CPU needs it.

Concatenations are never made of floats where a norm or a layer reads them: statistics, norms and codes are made part by
part, and bytes are joined.
"""

from __future__ import annotations

import numpy as np

from qdiff.deploy.onnx.attention import AttentionByHeads
from qdiff.deploy.onnx.builder import CONTRIB
from qdiff.deploy.onnx.lowering import Lowering, Stored
from qdiff.deploy.onnx.matrices import int8_matrix, is_integer, window_matrix
from qdiff.deploy.onnx.norms import ChannelsLastNorms, channels_last
from qdiff.deploy.onnx.plans import Codes, GridPlan, LayerPlan, PartPlan
from qdiff.deploy.onnx.tracer import Op, View
from qdiff.deploy.onnx.windows import moved_rows, source_rows


class RuntimeLowering(AttentionByHeads, ChannelsLastNorms, Lowering):
    """Feature maps [N, C, *spatial] are stored as [N, L, C], L their positions row by row."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._parts: dict[Op, list[tuple[str, int]]] = {}  # of maps that are never written as one

    # Layers

    def lower_layer(self, op: Op) -> Stored:
        plan: LayerPlan = op["plan"]
        bias = plan.bias
        total = None
        for part in plan.parts:
            matrix = int8_matrix(part.weight)
            product = self._integer_product if is_integer(part) else self._float_product
            share = product(op, part, matrix, bias)
            total, bias = share if total is None else self.builder.add("Add", total, share), None
        if plan.kind == "conv":
            return Stored(total, channels_last(len(op.shape)))
        return Stored(total, ((0,), tuple(range(1, len(op.shape) - 1)), (len(op.shape) - 1,)))

    def _integer_product(self, op: Op, part: PartPlan, matrix, bias: np.ndarray | None) -> str:
        codes, zero = matrix
        rows = self.rows(op, part, lambda x: self.quantize(x, part.act), self.stored_zero(part.act))
        constant = self.builder.constant
        return self.multiply(
            rows,
            constant(codes, hint="codes"),
            self.per_set(part.act.scale),
            constant(part.weight.scale),
            self.stored_zero(part.act),
            constant(zero) if zero.any() else "",
            "" if bias is None else constant(bias),
        )

    def multiply(self, a: str, b: str, a_scale: str, b_scale: str, a_zero: str, b_zero: str, bias: str = "") -> str:
        """a_scale * b_scale * (a - a_zero)(b - b_zero) + bias, sums in int32."""
        inputs = [a, b, a_scale, b_scale, a_zero, b_zero, bias]
        while not inputs[-1]:
            inputs.pop()
        return self.builder.add("MatMulIntegerToFloat", *inputs, domain=CONTRIB)

    def _float_product(self, op: Op, part: PartPlan, matrix, bias: np.ndarray | None) -> str:
        """The snapped input times the dequantized weight, in float32."""
        snap = (lambda x: x) if part.act is None else lambda x: self.snap(x, part.act)
        rows = self.rows(op, part, snap, self.builder.constant(np.float32(0)))
        if matrix is None:
            values = part.weight.values() if isinstance(part.weight, Codes) else part.weight
            weight = self.builder.constant(window_matrix(values), hint="weight")
        else:
            arrays = [self.builder.constant(value) for value in (matrix[0], part.weight.scale, matrix[1])]
            weight = self.builder.add("DequantizeLinear", *arrays, axis=1)
        product = self.builder.add("MatMul", rows, weight)
        return product if bias is None else self.builder.add("Add", product, self.builder.constant(bias))

    def rows(self, op: Op, part: PartPlan, convert, padding: str) -> str:
        """The part's converted input, one row of products per output position: [N, L, K]."""
        plan, (view,) = op["plan"], op.inputs
        if plan.kind == "linear":
            return self._selected(self._token_parts(view), part, convert)
        view, table, outside = source_rows(view, plan)
        x = self._selected(self.parts(view), part, convert)
        if table is None:
            return x
        if outside:  # one more row, which every position outside of the map looks up
            x = self.builder.add("Pad", x, self.builder.constant([0, 0, 0, 0, 1, 0], np.int64), padding)
        looked_up = self.builder.add("Gather", x, self.builder.constant(table.reshape(-1)), axis=1)
        width = table.shape[1] * (part.channels.stop - part.channels.start)
        return self.builder.reshape(looked_up, [0, table.shape[0], width])

    def _token_parts(self, view: View) -> list[tuple[str, int]]:
        """[N, M, C] of a view [N, ..., C]."""
        dims = view.layout.dims
        middle = tuple(axis for dim in dims[1:-1] for axis in dim)
        return [(self.arrange(view, (dims[0], middle, dims[-1])), view.shape[-1])]

    def _selected(self, parts: list[tuple[str, int]], part: PartPlan, convert) -> str:
        """The layer part's channels of a map's parts, each converted before they are joined, where one scale is for
        all."""
        edges, channels = np.cumsum([0, *(width for _, width in parts)]).tolist(), part.channels
        inside = [i for i in range(len(parts)) if channels.start <= edges[i] and edges[i + 1] <= channels.stop]
        names = [parts[i][0] for i in inside]
        whole = inside and edges[inside[0]] == channels.start and edges[inside[-1] + 1] == channels.stop
        if whole and not (part.act is not None and part.act.per_channel):
            return self._joined([convert(name) for name in names])
        if whole:
            return convert(self._joined(names))
        ends = [self.builder.constant([value], np.int64) for value in (channels.start, channels.stop, 2)]
        return convert(self.builder.add("Slice", self._joined([name for name, _ in parts]), *ends))

    def _joined(self, names: list[str]) -> str:
        return names[0] if len(names) == 1 else self.builder.add("Concat", *names, axis=2)

    # Grids

    def stored_zero(self, grid: GridPlan, dtype: type = np.uint8) -> str:
        """The zero point as codes are stored."""
        shift = grid.stored_offset - (128 if dtype is np.int8 else 0)
        return self.per_set((grid.zero_point + shift).astype(dtype))

    def quantize(self, x: str, grid: GridPlan, dtype: type = np.uint8) -> str:
        """x as stored codes of a grid of at most 8 bits."""
        codes = self.builder.add("QuantizeLinear", x, self.per_set(grid.scale), self.stored_zero(grid, dtype))
        if grid.bits == 8:
            return codes
        shift = grid.stored_offset - (128 if dtype is np.int8 else 0)
        ends = [self.builder.constant(dtype(end + shift)) for end in (grid.spec.qmin, grid.spec.qmax)]
        return self.builder.add("Clip", codes, *ends)

    def snap(self, x: str, grid: GridPlan) -> str:
        """x on the grid, as floats."""
        if grid.per_channel or not grid.in_range or grid.bits not in (*range(9), 16):
            return self.snap_in_floats(x, grid)
        scale = self.per_set(grid.scale)
        if grid.bits <= 8:
            return self.builder.add("DequantizeLinear", self.quantize(x, grid), scale, self.stored_zero(grid))
        zero = self.stored_zero(grid, np.uint16)
        return self.builder.add("DequantizeLinear", self.builder.add("QuantizeLinear", x, scale, zero), scale, zero)

    # Maps that are not products

    def lower_upsample(self, op: Op) -> Stored:
        view, table = moved_rows(op)
        x = self.builder.add(
            "Gather", self._padded(self.tokens(view), table, view), self.builder.constant(table), axis=1
        )
        return Stored(x, channels_last(len(op.shape)))

    lower_pad = lower_upsample

    def _padded(self, x: str, table: np.ndarray, view: View) -> str:
        if table.max() < np.prod(view.shape[2:]):
            return x
        pads, zero = self.builder.constant([0, 0, 0, 0, 1, 0], np.int64), self.builder.constant(np.float32(0))
        return self.builder.add("Pad", x, pads, zero)

    def lower_avg_pool(self, op: Op) -> Stored:
        size, (_, channels, height, width) = op["size"], op.shape
        x = self.builder.reshape(self.tokens(op.inputs[0]), [0, height, size, width, size, channels])
        x = self.builder.add("ReduceMean", x, self.builder.constant([2, 4], np.int64), keepdims=0)
        return Stored(x, ((0,), (2,), (3,), (1,)))
