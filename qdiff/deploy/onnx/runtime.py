"""The dialect for ONNX Runtime on CPUs: channels last, products of uint8 and int8 codes, ONNX Runtime's own operators.

A convolution is one table lookup, which copies the rows of codes under its window side by side, and one product of
codes: `MatMulIntegerToFloat`, int32 sums and float32 output. Stride, padding and nearest upsampling are in the table.
ONNX Runtime's product is fast for uint8 times int8 and for nothing else (int8 times int8: twenty times slower), hence
all activations are stored as uint8 (codes of signed grids plus 128) and all weights as int8.

Concatenations are never made of floats where a norm or a layer reads them: statistics, norms and codes are made part by
part, and bytes are joined.
"""

from __future__ import annotations

import numpy as np

from qdiff.deploy.onnx.builder import CONTRIB
from qdiff.deploy.onnx.lowering import Lowering, Stored
from qdiff.deploy.onnx.norms import ChannelsLastNorms, channels_last
from qdiff.deploy.onnx.plans import Codes, Grid, LayerPlan, PartPlan
from qdiff.deploy.onnx.tracer import Op, View
from qdiff.deploy.onnx.windows import moved_rows, source_rows

MANY_TOKENS = 64  # from which on heads are products of their own
NARROW = 32  # terms of a sum below which ONNX Runtime multiplies floats faster than codes


class RuntimeLowering(ChannelsLastNorms, Lowering):
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
            product = self._integer_product if _is_integer(part) else self._float_product
            share = product(op, part, matrix, bias)
            total, bias = share if total is None else self.builder.add("Add", total, share), None
        if plan.kind == "conv":
            return Stored(total, channels_last(len(op.shape)))
        return Stored(total, ((0,), tuple(range(1, len(op.shape) - 1)), (len(op.shape) - 1,)))

    def _integer_product(self, op: Op, part: PartPlan, matrix, bias: np.ndarray | None) -> str:
        codes, zero = matrix
        rows = self._rows(op, part, lambda x: self.quantize(x, part.act), self.stored_zero(part.act))
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
        rows = self._rows(op, part, snap, self.builder.constant(np.float32(0)))
        if matrix is None:
            values = part.weight.values() if isinstance(part.weight, Codes) else part.weight
            weight = self.builder.constant(window_matrix(values), hint="weight")
        else:
            arrays = [self.builder.constant(value) for value in (matrix[0], part.weight.scale, matrix[1])]
            weight = self.builder.add("DequantizeLinear", *arrays, axis=1)
        product = self.builder.add("MatMul", rows, weight)
        return product if bias is None else self.builder.add("Add", product, self.builder.constant(bias))

    def _rows(self, op: Op, part: PartPlan, convert, padding: str) -> str:
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

    def stored_zero(self, grid: Grid, dtype: type = np.uint8) -> str:
        """The zero point as codes are stored."""
        shift = grid.stored_offset - (128 if dtype is np.int8 else 0)
        return self.per_set((grid.zero + shift).astype(dtype))

    def quantize(self, x: str, grid: Grid, dtype: type = np.uint8) -> str:
        """x as stored codes of a grid of at most 8 bits."""
        codes = self.builder.add("QuantizeLinear", x, self.per_set(grid.scale), self.stored_zero(grid, dtype))
        if grid.bits == 8:
            return codes
        shift = grid.stored_offset - (128 if dtype is np.int8 else 0)
        ends = [self.builder.constant(dtype(end + shift)) for end in (grid.lo, grid.hi)]
        return self.builder.add("Clip", codes, *ends)

    def snap(self, x: str, grid: Grid) -> str:
        """x on the grid, as floats."""
        if grid.per_channel or not grid.in_range or grid.bits not in (*range(9), 16):
            return self.snap_in_floats(x, grid)
        scale = self.per_set(grid.scale)
        if grid.bits <= 8:
            return self.builder.add("DequantizeLinear", self.quantize(x, grid), scale, self.stored_zero(grid))
        zero = self.stored_zero(grid, np.uint16)
        return self.builder.add("DequantizeLinear", self.builder.add("QuantizeLinear", x, scale, zero), scale, zero)

    # Attention

    def lower_attention(self, op: Op) -> Stored:
        plan, rank = op["plan"], len(op.shape)
        kept = [i for i in range(rank) if i in (0, rank - 2, rank - 1) or op.shape[i] > 1]
        grids = {o: g.times(plan.operand_scale) if o in "qk" else g for o, g in plan.grids.items()}
        q, k, v = op.inputs
        factor = plan.operand_scale**2 * plan.score_scale
        whole = _codes_multiply(grids.get("q"), grids.get("k"))
        q_codes = self._operand(q, grids.get("q"), kept, whole, np.uint8)
        k_codes = self._operand(k, grids.get("k"), kept[:-2] + [rank - 1, rank - 2], whole, np.int8)
        scores = self._operands_product(q_codes, k_codes, grids.get("q"), grids.get("k"), whole, factor, q.shape[-1])
        weights = self.builder.add("Softmax", scores, axis=-1)
        whole = _codes_multiply(grids.get("w"), grids.get("v"))
        if "w" in grids:
            weights = self.quantize(weights, grids["w"]) if whole else self.snap(weights, grids["w"])
        v = self._operand(v, grids.get("v"), kept, whole, np.int8)
        output = self._operands_product(weights, v, grids.get("w"), grids.get("v"), whole, 1.0, op.inputs[1].shape[-2])
        return Stored(output, tuple((i,) for i in kept))

    def _operand(self, view: View, grid: Grid | None, axes: list[int], whole: bool, dtype: type) -> str:
        """An operand's codes (`whole`), or its values on their grid, with its axes in the given order."""
        by_heads = self.waits(view.op)
        stored = Stored(self._product_by_heads(view), ()) if by_heads else self.stored(view.op)
        if grid is not None:
            on_grid = self.quantize(stored.name, grid, dtype) if whole else self.snap(stored.name, grid)
            stored = Stored(on_grid, stored.dims)
        if by_heads:
            return stored.name if axes == sorted(axes) else self.builder.add("Transpose", stored.name, perm=axes)
        return self.arrange(view, tuple(view.layout.dims[i] for i in axes), stored)

    def waits(self, op: Op) -> bool:
        """Layers of which attention reads the heads and nothing else anything: each head is a product of its own,
        written where the heads are needed, which is faster than to sort one product's output into heads."""
        if op.kind != "layer" or op["plan"].kind != "linear" or len(op["plan"].parts) > 1 or len(op.shape) != 3:
            return False
        by_heads = all(
            reader is not None and reader.kind == "attention" and _sorts_heads(view)
            for reader, view in self.readers[op]
        )
        return by_heads and op.shape[1] >= MANY_TOKENS and _is_integer(op["plan"].parts[0])

    def _product_by_heads(self, view: View) -> str:
        """[N, heads, L, width of a head]."""
        _, heads, _, width = view.shape
        plan, constant = view.op["plan"], self.builder.constant
        (part,) = plan.parts
        codes, zero = int8_matrix(part.weight)
        rows = self._rows(view.op, part, lambda x: self.quantize(x, part.act), self.stored_zero(part.act))
        product = self.multiply(
            self.builder.reshape(rows, [0, 1, *view.op.inputs[0].shape[1:]]),
            constant(codes.reshape(-1, heads, width).swapaxes(0, 1), hint="codes"),
            self.per_set(part.act.scale),
            constant(part.weight.scale.reshape(heads, 1, width)),
            self.stored_zero(part.act),
            constant(zero.reshape(heads, 1, width)) if zero.any() else "",
        )
        return (
            product
            if plan.bias is None
            else self.builder.add("Add", product, constant(plan.bias.reshape(heads, 1, width)))
        )

    def _operands_product(self, a: str, b: str, a_grid, b_grid, whole: bool, factor: float, depth: int) -> str:
        """factor * a @ b, sums of `depth` products each; of codes if `whole`."""
        if whole:
            zeros = self.stored_zero(a_grid), self.stored_zero(b_grid, np.int8)
            b_scale = self.per_set((b_grid.scale.astype(np.float64) * factor).astype(np.float32))
            if depth >= NARROW:
                return self.multiply(a, b, self.per_set(a_grid.scale), b_scale, *zeros)
            a = self.builder.add("DequantizeLinear", a, self.per_set(a_grid.scale), zeros[0])
            return self.builder.add("MatMul", a, self.builder.add("DequantizeLinear", b, b_scale, zeros[1]))
        product = self.builder.add("MatMul", a, b)
        return product if factor == 1.0 else self.builder.add("Mul", product, self.builder.constant(np.float32(factor)))

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


def _codes_multiply(a: Grid | None, b: Grid | None) -> bool:
    """Whether both grids have codes of a byte, zero points included, and one scale."""
    return all(g is not None and not g.per_channel and g.bits <= 8 and g.in_range for g in (a, b))


def _sorts_heads(view: View) -> bool:
    """Whether [N, L, heads * width] is seen as [N, heads, L, width]."""
    return view.layout.dims == ((0,), (2,), (1,), (3,)) and view.layout.sizes[:2] == view.op.shape[:2]


def _is_integer(part: PartPlan) -> bool:
    """Whether the part is a product of bytes."""
    whole = part.act is not None and not part.act.per_channel and part.act.bits <= 8 and part.act.in_range
    return whole and int8_matrix(part.weight) is not None


def window_matrix(values: np.ndarray) -> np.ndarray:
    """[O, C, *kernel] as [kernel * C, O], rows in the order of a window's."""
    return np.moveaxis(values, (0, 1), (-1, -2)).reshape(-1, len(values))


def int8_matrix(weight: Codes | np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes [K, O] and zero points [O], both moved per channel so that they fit int8; None where they do not."""
    if not isinstance(weight, Codes):
        return None
    codes = weight.codes
    axes = tuple(range(1, codes.ndim))
    fits = (codes.min(axes) - weight.zero >= -128) & (codes.max(axes) - weight.zero <= 127)
    zero = np.where(fits, 0, weight.zero - 128)
    if zero.min() < -128 or zero.max() > 127:
        return None
    moved = (zero - weight.zero).astype(np.int16).reshape(-1, *[1] * len(axes))
    return window_matrix((codes + moved).astype(np.int8)), zero.astype(np.int8)
