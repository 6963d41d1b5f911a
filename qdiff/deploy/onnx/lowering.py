"""What both dialects share: where a recorded tensor's axes are stored, elementwise operators, grids as constants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qdiff.deploy.onnx.builder import Builder
from qdiff.deploy.onnx.plans import GridPlan
from qdiff.deploy.onnx.tracer import BATCH, Op, Trace, View
from qdiff.deploy.onnx.views import Axes, Layout

UNARY = {"sin": "Sin", "cos": "Cos", "exp": "Exp", "sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu"}
UNARY |= {"sqrt": "Sqrt", "neg": "Neg", "gelu": "Gelu"}
BINARY = {"add": "Add", "mul": "Mul", "sub": "Sub", "div": "Div"}


@dataclass(frozen=True)
class Stored:
    """A value of the graph: which axes of the operation's output each of its axes runs over, the batch in the first."""

    name: str
    dims: tuple[Axes, ...]


class Lowering:
    """Operations are lowered when their value is first asked for, so that what nobody reads is never written."""

    def __init__(self, trace: Trace, builder: Builder, parameter_set: int | None = None) -> None:
        self.trace, self.builder, self.parameter_set = trace, builder, parameter_set
        self.readers = trace.readers()
        self._stored: dict[Op, Stored] = {}

    def lower(self) -> str:
        """Write the whole network. Returns its output's name."""
        for op in self.trace.ops:  # step by step, so that no chain of inputs is longer than Python's stack
            self.builder.scope = op.where
            if op.kind in ("layer", "attention") and op in self.readers and not self.waits(op):
                self.stored(op)
        return self.natural(self.trace.output)

    def waits(self, op: Op) -> bool:
        """Whether a layer is written by what reads it."""
        return False

    # Where values are

    def stored(self, op: Op) -> Stored:
        """The operation's value, written if it has not been."""
        if op not in self._stored:
            lower = getattr(self, f"lower_{op.kind}", None)
            if lower is None:
                raise ValueError(f"{op.where}: expected operators that the ONNX export knows, found {op.kind}")
            stored = lower(op)
            self._stored[op] = stored if isinstance(stored, Stored) else Stored(stored, self.whole(op).dims)
        return self._stored[op]

    @staticmethod
    def whole(op: Op) -> Layout:
        """The operation's output as it is."""
        return Layout.whole(op.shape)

    def arrange(self, view: View, dims: tuple[Axes, ...], stored: Stored | None = None) -> str:
        """The view's value with the given axes of its layout; stored: another value that lies like the operation's."""
        stored = stored or self.stored(view.op)
        sizes, pieces = view.layout.sizes, view.layout.pieces_of(view.op.shape)
        now = [axis for dim in stored.dims for whole in dim for axis in pieces[whole] if sizes[axis] > 1]
        wanted = [axis for dim in dims for axis in dim if sizes[axis] > 1]
        shape = _shape(sizes, dims)
        if now == wanted:
            lies = _shape(sizes, [[axis for whole in dim for axis in pieces[whole]] for dim in stored.dims])
            return stored.name if lies == shape else self.builder.reshape(stored.name, shape)
        runs = _runs(now, wanted)
        order = sorted(range(len(runs)), key=lambda i: wanted.index(runs[i][0]))
        name = stored.name
        if _shape(sizes, runs) != _shape(sizes, [[a for whole in dim for a in pieces[whole]] for dim in stored.dims]):
            name = self.builder.reshape(name, _shape(sizes, runs))
        name = self.builder.add("Transpose", name, perm=order)
        if _shape(sizes, [runs[i] for i in order]) != shape:
            name = self.builder.reshape(name, shape)
        return name

    def natural(self, view: View) -> str:
        """The view's value as torch has it, axis by axis."""
        return self.arrange(view, view.layout.dims)

    # Operators that are the same everywhere

    def lower_input(self, op: Op) -> str:
        return op["name"]

    def lower_constant(self, op: Op) -> str:
        value = op["value"]
        return self.builder.constant(value.astype(np.float32) if value.dtype == np.float64 else value)

    def lower_rows(self, op: Op) -> str:
        shape = [-1 if size % BATCH == 0 else size for size in op.shape]
        return self.builder.reshape(self.natural(op.inputs[0]), shape)

    def lower_embedding(self, op: Op) -> str:
        return self.builder.add("Gather", self.builder.constant(op["weight"]), self.natural(op.inputs[0]), axis=0)

    def lower_cast(self, op: Op) -> Stored:
        kind = {"float32": 1, "int64": 7, "float64": 11, "float16": 10}[str(op.dtype).removeprefix("torch.")]
        return self.elementwise(op, lambda x: self.builder.add("Cast", x, to=kind))

    def elementwise(self, op: Op, write) -> Stored:
        """A function of one input, which keeps the order in which that lies."""
        (view,) = op.inputs
        dims = merged(self.dims_in_storage_order(view))
        return Stored(write(self.arrange(view, _axes(view, dims))), dims)

    def dims_in_storage_order(self, view: View) -> list[int]:
        """The view's axes in the order in which its value has them; as torch has them where they are interleaved."""
        pieces = view.layout.pieces_of(view.op.shape)
        now = [axis for dim in self.stored(view.op).dims for whole in dim for axis in pieces[whole]]
        dims = view.layout.dims
        order = sorted(range(len(dims)), key=lambda i: now.index(dims[i][0]) if dims[i] else i)
        flat = [axis for i in order for axis in dims[i] if view.layout.sizes[axis] > 1]
        same = flat == [axis for axis in now if view.layout.sizes[axis] > 1]
        return order if same and all(dims) else list(range(len(dims)))

    def binary(self, op: Op) -> Stored:
        """A function of two inputs that broadcast; the result lies like the larger one."""
        rank = len(op.shape)
        views = [_with_rank(view, rank) for view in op.inputs]
        largest = max(views, key=lambda view: math.prod(view.shape))
        order = self.dims_in_storage_order(largest)
        same = all(view.shape[2:] == op.shape[2:] for view in views)
        dims = merged(order) if same else tuple((i,) for i in order)
        names = [self.arrange(view, _axes(view, dims)) for view in views]
        return Stored(self.builder.add(BINARY[op.kind], *names), dims)

    lower_add = lower_mul = lower_sub = lower_div = binary

    def unary(self, op: Op) -> Stored:
        return self.elementwise(op, lambda x: self.builder.add(UNARY[op.kind], x))

    lower_sin = lower_cos = lower_exp = lower_sigmoid = lower_tanh = lower_relu = lower_sqrt = lower_neg = unary
    lower_gelu = unary

    def lower_slice(self, op: Op) -> Stored:
        (view,) = op.inputs
        order = self.dims_in_storage_order(view)
        axis = order.index(op["axis"])
        ends = [self.builder.constant([value], np.int64) for value in (op["start"], op["stop"], axis)]
        name = self.arrange(view, tuple(view.layout.dims[i] for i in order))
        return Stored(self.builder.add("Slice", name, *ends), tuple((i,) for i in order))

    def lower_concat(self, op: Op) -> Stored:
        order = self.dims_in_storage_order(op.inputs[0])
        names = [self.arrange(view, tuple(view.layout.dims[i] for i in order)) for view in op.inputs]
        return Stored(self.builder.add("Concat", *names, axis=order.index(op["axis"])), tuple((i,) for i in order))

    def lower_layer_norm(self, op: Op) -> Stored:
        order = self.dims_in_storage_order(op.inputs[0])
        if order[-1] != len(op.shape) - 1:
            order = list(range(len(op.shape)))
        view = op.inputs[0]
        name = self.arrange(view, tuple(view.layout.dims[i] for i in order))
        weight = op["weight"] if op["weight"] is not None else np.ones(op.shape[-1], np.float32)
        scale = [self.builder.constant(value) for value in (weight, op["bias"]) if value is not None]
        norm = self.builder.add("LayerNormalization", name, *scale, axis=-1, epsilon=op["eps"])
        return Stored(norm, tuple((i,) for i in order))

    # Grids

    def per_set(self, table: np.ndarray) -> str:
        """table: [sets, ...]. Returns the running set's row: a constant, or looked up by the input `set`."""
        if len(table) == 1 or self.parameter_set is not None:
            return self.builder.constant(table[self.parameter_set or 0 if len(table) > 1 else 0])
        return self.builder.add("Gather", self.builder.constant(table), "set", axis=0)

    def snap_in_floats(self, x: str, grid: GridPlan) -> str:
        """x on any grid, step by step as the simulation does it; x: [..., C] where the grid is per channel."""
        add, number = self.builder.add, lambda value: self.builder.constant(np.float32(value))
        scale, zero = self.per_set(grid.scale), self.per_set(grid.zero_point.astype(np.float32))
        codes = add("Add", add("Round", add("Div", x, scale)), zero)
        codes = add("Clip", codes, number(grid.spec.qmin), number(grid.spec.qmax))
        return add("Mul", add("Sub", codes, zero), scale)


def merged(order: list[int]) -> tuple[Axes, ...]:
    """Axes in an order, the positions of maps that are stored channels last as one."""
    last = len(order) > 3 and order == [0, *range(2, len(order)), 1]
    return ((0,), tuple(order[1:-1]), (1,)) if last else tuple((i,) for i in order)


def _axes(view: View, dims: tuple[Axes, ...]) -> tuple[Axes, ...]:
    """The axes of the view's layout that groups of its dimensions run over."""
    return tuple(tuple(axis for i in dim for axis in view.layout.dims[i]) for dim in dims)


def _with_rank(view: View, rank: int) -> View:
    """The view with axes of length 1 in front."""
    layout = view.layout
    return View(view.op, Layout(layout.sizes, ((),) * (rank - len(layout.dims)) + layout.dims))


def _shape(sizes: Axes, dims) -> list[int]:
    """As Reshape takes it: -1 for the axis with the samples."""
    products = [math.prod(sizes[axis] for axis in dim) for dim in dims]
    return [-1 if product % BATCH == 0 else product for product in products]


def _runs(now: list[int], wanted: list[int]) -> list[list[int]]:
    """Axes that stay neighbours, in the order of `now`."""
    after = dict(zip(wanted, wanted[1:], strict=False))
    runs: list[list[int]] = []
    for axis in now:
        if runs and after.get(runs[-1][-1]) == axis:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    return runs
