"""Attention products for ONNX Runtime: all heads as one product of a higher rank, or one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qdiff.deploy.onnx.lowering import Stored
from qdiff.deploy.onnx.matrices import codes_multiply, int8_matrix, is_integer
from qdiff.deploy.onnx.plans import AttentionPlan, GridPlan
from qdiff.deploy.onnx.tracer import Op, View

MANY_TOKENS = 64  # from which on heads are products of their own
MANY_SCORES = 2**16  # of one head, from which on heads attend one after the other: scores of all leave the cache
NARROW = 32  # terms of a sum below which ONNX Runtime multiplies floats faster than codes


class AttentionByHeads:
    """For a `Lowering` of linear layers: `lower_attention`."""

    def lower_attention(self, op: Op) -> Stored:
        if _one_head_at_a_time(op):
            outputs = [self._attend(op, *head) for head in zip(*self._heads(op), strict=True)]
            return Stored(self.builder.add("Concat", *outputs, axis=2), ((0,), (2,), (1, 3)))
        rank = len(op.shape)
        kept = [i for i in range(rank) if i in (0, rank - 2, rank - 1) or op.shape[i] > 1]
        turned = (*kept[:-2], rank - 1, rank - 2)
        operands = (self._operand(op, "q", kept), self._operand(op, "k", turned), self._operand(op, "v", kept))
        return Stored(self._attend(op, *operands), tuple((i,) for i in kept))

    def _attend(self, op: Op, q: str, k: str, v: str) -> str:
        """q: [..., L, C]; k: [..., C, M]; v: [..., M, C]: codes, where their products are of codes, or values."""
        plan, grids = op["plan"], _grids(op)
        factor = plan.operand_scale**2 * plan.score_scale
        scores = self._operands_product(q, k, grids.get("q"), grids.get("k"), factor, op.inputs[0].shape[-1])
        weights = self.builder.add("Softmax", scores, axis=-1)
        if (grid := grids.get("w")) is not None:
            whole = codes_multiply(grid, grids.get("v"))
            weights = self.quantize(weights, grid) if whole else self.snap(weights, grid)
        return self._operands_product(weights, v, grid, grids.get("v"), 1.0, op.inputs[1].shape[-2])

    def _heads(self, op: Op) -> list[list[str]]:
        """q, k and v for `_attend`, each head by head: a layer's codes are split, which copies less than floats."""
        found = []
        for name, view in zip("qkv", op.inputs, strict=True):
            samples, heads, tokens, width = view.layout.dims
            whole = self.arrange(view, (samples, tokens, heads + width), self._on_grid(op, name, self.stored(view.op)))
            widths = self.builder.constant(view.shape[1] * [view.shape[3]], np.int64)
            found.append(self.builder.add("Split", whole, widths, axis=2, outputs=view.shape[1]))
        found[1] = [self.builder.add("Transpose", head, perm=[0, 2, 1]) for head in found[1]]
        return found

    def _operand(self, op: Op, name: str, axes: Sequence[int]) -> str:
        """An operand of `_attend`: the view's axes in the given order."""
        view = op.inputs["qkv".index(name)]
        if not self.waits(view.op):
            stored = self._on_grid(op, name, self.stored(view.op))
            return self.arrange(view, tuple(view.layout.dims[i] for i in axes), stored)
        product = self._on_grid(op, name, Stored(self._product_by_heads(view), ())).name
        return product if list(axes) == sorted(axes) else self.builder.add("Transpose", product, perm=list(axes))

    def _on_grid(self, op: Op, name: str, stored: Stored) -> Stored:
        """An operand's codes, where its product is one of codes, or its values on their grid."""
        grids = _grids(op)
        if (grid := grids.get(name)) is None:
            return stored
        whole = codes_multiply(grid, grids.get({"q": "k", "k": "q", "v": "w"}[name]))
        on_grid = self.quantize(stored.name, grid, np.uint8 if name == "q" else np.int8) if whole else None
        return Stored(on_grid or self.snap(stored.name, grid), stored.dims)

    def waits(self, op: Op) -> bool:
        """Layers of which attention reads the heads and nothing else anything: each head is a product of its own,
        written where the heads are needed, which is faster than to sort one product's output into heads."""
        if op.kind != "layer" or op["plan"].kind != "linear" or len(op["plan"].parts) > 1 or len(op.shape) != 3:
            return False
        by_heads = all(
            reader is not None and reader.kind == "attention" and _sorts_heads(view) and not _one_head_at_a_time(reader)
            for reader, view in self.readers[op]
        )
        return by_heads and op.shape[1] >= MANY_TOKENS and is_integer(op["plan"].parts[0])

    def _product_by_heads(self, view: View) -> str:
        """[N, heads, L, width of a head]."""
        _, heads, _, width = view.shape
        plan, constant = view.op["plan"], self.builder.constant
        (part,) = plan.parts
        codes, zero = int8_matrix(part.weight)
        rows = self.rows(view.op, part, lambda x: self.quantize(x, part.act), self.stored_zero(part.act))
        product = self.multiply(
            self.builder.reshape(rows, [0, 1, *view.op.inputs[0].shape[1:]]),
            constant(codes.reshape(-1, heads, width).swapaxes(0, 1), hint="codes"),
            self.per_set(part.act.scale),
            constant(part.weight.scale.reshape(heads, 1, width)),
            self.stored_zero(part.act),
            constant(zero.reshape(heads, 1, width)) if zero.any() else "",
        )
        if plan.bias is None:
            return product
        return self.builder.add("Add", product, constant(plan.bias.reshape(heads, 1, width)))

    def _operands_product(
        self, a: str, b: str, a_grid: GridPlan | None, b_grid: GridPlan | None, factor: float, depth: int
    ) -> str:
        """factor * a @ b, sums of `depth` products each; of codes where the grids allow it."""
        if codes_multiply(a_grid, b_grid):
            zeros = self.stored_zero(a_grid), self.stored_zero(b_grid, np.int8)
            b_scale = self.per_set((b_grid.scale.astype(np.float64) * factor).astype(np.float32))
            if depth >= NARROW:
                return self.multiply(a, b, self.per_set(a_grid.scale), b_scale, *zeros)
            a = self.builder.add("DequantizeLinear", a, self.per_set(a_grid.scale), zeros[0])
            return self.builder.add("MatMul", a, self.builder.add("DequantizeLinear", b, b_scale, zeros[1]))
        product = self.builder.add("MatMul", a, b)
        return product if factor == 1.0 else self.builder.add("Mul", product, self.builder.constant(np.float32(factor)))


def _grids(op: Op) -> dict[str, GridPlan]:
    """The operands' grids, of q and k before they are scaled."""
    plan: AttentionPlan = op["plan"]
    return {name: grid.times(plan.operand_scale) if name in "qk" else grid for name, grid in plan.grids.items()}


def _one_head_at_a_time(op: Op) -> bool:
    """Whether a head's scores are many, and its channels neighbours in what q, k and v are views of."""
    if not all(map(_sorts_heads, op.inputs)):
        return False
    (_, heads, tokens, _), others = op.inputs[0].shape, op.inputs[1].shape[-2]
    return heads > 1 and tokens * others >= MANY_SCORES


def _sorts_heads(view: View) -> bool:
    """Whether [N, L, heads * width] is seen as [N, heads, L, width]."""
    return view.layout.dims == ((0,), (2,), (1,), (3,)) and view.layout.sizes[:2] == view.op.shape[:2]
