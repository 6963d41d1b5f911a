"""A network's forward pass as a graph of operations: its own code runs with tensors that only record.

Quantized layers and attention products are recorded whole; what is between them through torch's functions. Views
(reshapes, transposes) are no operations: see `views.Layout`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.deploy.onnx.plans import AttentionPlan, LayerPlan, attention_plan, float_plan, is_planned, layer_plan
from qdiff.deploy.onnx.views import Layout
from qdiff.families import Adapter

BATCH = 1000003  # stands for the number of samples, which stays open; a prime that no width or size is


@dataclass(eq=False)
class Op:
    """One recorded operation with its output's shape; `where` is the dotted name of the module it stands in."""

    kind: str
    inputs: tuple[View, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    attributes: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]


@dataclass(frozen=True)
class View:
    """An operation's output, or a view of it."""

    op: Op
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape


@dataclass(frozen=True)
class Trace:
    """A recorded network: inputs by name in the order of the call, all operations in the order in which they ran, and
    the output."""

    inputs: dict[str, Op]
    ops: list[Op]
    output: View

    def readers(self) -> dict[Op, list[tuple[Op | None, View]]]:
        """For each operation that the output depends on: what reads it, through which view; None reads the output.

        A layer that is only read in parts is not among them: see `Recorder._slice`.
        """
        found: dict[Op, list[tuple[Op | None, View]]] = {}
        left: list[tuple[Op | None, View]] = [(None, self.output)]
        while left:
            reader, view = left.pop()
            if view.op not in found:
                left += [(view.op, each) for each in view.op.inputs]
            found.setdefault(view.op, []).append((reader, view))
        return found


class Recorded(Tensor):
    """A tensor without values that hands every function it is given to its recorder."""

    @staticmethod
    def __new__(cls, view: View, recorder: Recorder):
        return Tensor._make_wrapper_subclass(cls, view.shape, dtype=view.op.dtype, device="cpu")

    def __init__(self, view: View, recorder: Recorder) -> None:
        self.view_of, self.recorder = view, recorder

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            name = getattr(func, "__name__", str(func))
            if name == "__get__" or name in QUESTIONS:
                return func(*args, **(kwargs or {}))
            return _first_recorded(args).recorder.record(func, name, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _first_recorded(args).recorder.refuse(str(func))


def _first_recorded(args: Any) -> Recorded | None:
    for value in args:
        if isinstance(value, Recorded):
            return value
        found = _first_recorded(value) if isinstance(value, (list, tuple)) else None
        if found is not None:
            return found
    return None


QUESTIONS = ("dim", "size", "__len__", "numel", "ndimension", "is_floating_point", "__hash__", "__repr__")
# The same elements row by row: the output's shape says it all.
RESHAPES = ("flatten", "unsqueeze", "squeeze", "reshape", "view", "view_as", "unflatten", "reshape_as")
SAME = ("contiguous", "clone", "detach", "dropout")
UNARY = ("silu", "gelu", "sin", "cos", "exp", "sigmoid", "tanh", "relu", "sqrt", "neg")
BINARY = {"add": "add", "radd": "add", "mul": "mul", "rmul": "mul", "multiply": "mul", "sub": "sub", "rsub": "sub"}
BINARY |= {"div": "div", "truediv": "div"}


class Recorder:
    """Turns calls of torch's functions into operations."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.ops: list[Op] = []

    @property
    def where(self) -> str:
        return self.modules[-1] if self.modules and self.modules[-1] else "the network"

    def refuse(self, name: str) -> None:
        raise ValueError(f"{self.where}: expected operators that the ONNX export knows, found {name}")

    def new(self, kind: str, inputs: tuple[View, ...], shape, dtype: torch.dtype, **attributes) -> Recorded:
        """The output of a new operation."""
        op = Op(kind, inputs, tuple(shape), dtype, self.where, attributes)
        self.ops.append(op)
        return Recorded(View(op, Layout.whole(shape)), self)

    def view(self, x: Any) -> View:
        """What was recorded of x; numbers and real tensors become constants."""
        if isinstance(x, Recorded):
            return x.view_of
        value = x.detach() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32)
        op = Op("constant", (), tuple(value.shape), value.dtype, self.where, {"value": value.cpu().numpy()})
        return View(op, Layout.whole(value.shape))

    def record(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
        if name.endswith("_") and not name.startswith("__"):
            return self.refuse(f"{name}, which changes its input")
        name = name.strip("_")
        result = func(*_to_meta(args), **_to_meta(kwargs))
        handler = self._handler(name)
        if handler is None:
            return self.refuse(name)
        return handler(name, result, *args, **kwargs)

    def _handler(self, name: str) -> Callable | None:
        if name in RESHAPES:
            return self._reshape
        if name in SAME:
            return lambda name, result, x, *_, **__: x
        if name in UNARY:
            return self._unary
        if name in BINARY:
            return self._binary
        return getattr(self, f"on_{name}", None)

    def _reshape(self, name: str, result: Tensor, x: Recorded, *_, **__) -> Recorded:
        view = x.view_of
        try:
            return Recorded(View(view.op, view.layout.reshape(result.shape)), self)
        except ValueError:  # axes that take parts of others: the elements are written anew, row by row
            return self.new("rows", (view,), result.shape, result.dtype)

    def _unary(self, name: str, result: Tensor, x: Recorded, *args, **kwargs) -> Recorded:
        if kwargs.get("approximate", "none") != "none":
            return self.refuse(f"{name} with approximate={kwargs['approximate']}")
        return self.new(name, (x.view_of,), result.shape, result.dtype)

    def _binary(self, name: str, result: Tensor, a: Any, b: Any, **kwargs) -> Recorded:
        if kwargs.get("alpha", 1) != 1:
            return self.refuse(f"{name} with alpha")
        inputs = (self.view(a), self.view(b))
        if name == "rsub":
            inputs = inputs[::-1]
        return self.new(BINARY[name], inputs, result.shape, result.dtype)

    def _permuted(self, x: Recorded, order: list[int]) -> Recorded:
        return Recorded(View(x.view_of.op, x.view_of.layout.permute(order)), self)

    def on_transpose(self, name: str, result: Tensor, x: Recorded, first: int, second: int) -> Recorded:
        order = list(range(x.dim()))
        order[first], order[second] = order[second], order[first]
        return self._permuted(x, order)

    def on_permute(self, name: str, result: Tensor, x: Recorded, *order) -> Recorded:
        order = order[0] if len(order) == 1 and isinstance(order[0], (tuple, list)) else order
        return self._permuted(x, [axis % x.dim() for axis in order])

    def on_to(self, name: str, result: Tensor, x: Recorded, *args, **kwargs) -> Recorded:
        if result.dtype == x.dtype:
            return x
        return self.new("cast", (x.view_of,), result.shape, result.dtype)

    on_float = on_to

    def on_cat(self, name: str, result: Tensor, tensors, dim: int = 0) -> Recorded:
        views = tuple(self.view(x) for x in tensors)
        return self.new("concat", views, result.shape, result.dtype, axis=dim % result.dim())

    def _slice(self, x: Recorded, axis: int, start: int, like: Tensor) -> Recorded:
        op = x.view_of.op
        of_layer = op.kind == "layer" and x.view_of.layout.is_whole
        if of_layer and axis == (1 if op["plan"].kind == "conv" else x.dim() - 1):
            # Layers of their own, side by side: their outputs are written where they are needed, not copied there.
            plan = op["plan"].outputs(slice(start, start + like.shape[axis]))
            return self.new("layer", op.inputs, like.shape, like.dtype, plan=plan)
        attributes = {"axis": axis, "start": start, "stop": start + like.shape[axis]}
        return self.new("slice", (x.view_of,), like.shape, like.dtype, **attributes)

    def on_split(self, name: str, result, x: Recorded, sizes, dim: int = 0) -> tuple[Recorded, ...]:
        axis, found, start = dim % x.dim(), [], 0
        for part in result:
            found.append(self._slice(x, axis, start, part))
            start += part.shape[axis]
        return tuple(found)

    on_chunk = on_split

    def on_getitem(self, name: str, result: Tensor, x: Recorded, index) -> Recorded:
        index = index if isinstance(index, tuple) else (index,)
        whole = slice(None)
        if any(part not in (None, whole, Ellipsis) for part in index):
            return self.refuse("indexing other than [:, None]")
        return self._reshape(name, result, x)

    def on_interpolate(self, name: str, result: Tensor, x: Recorded, *args, **kwargs) -> Recorded:
        factor = result.shape[-1] // x.shape[-1]
        whole = all(a == factor * b for a, b in zip(result.shape[2:], x.shape[2:], strict=True))
        if kwargs.get("mode", "nearest") != "nearest" or not whole or x.dim() != 4:
            return self.refuse("interpolate other than nearest by a whole factor")
        return self.new("upsample", (x.view_of,), result.shape, result.dtype, factor=factor)

    def on_pad(self, name: str, result: Tensor, x: Recorded, pad, mode: str = "constant", value=None) -> Recorded:
        if mode != "constant" or value:
            return self.refuse("pad other than with zeros")
        if not any(pad):
            return x
        before, after = [0] * x.dim(), [0] * x.dim()
        for i in range(len(pad) // 2):
            before[-1 - i], after[-1 - i] = pad[2 * i], pad[2 * i + 1]
        return self.new("pad", (x.view_of,), result.shape, result.dtype, before=before, after=after)

    def on_avg_pool2d(self, name: str, result: Tensor, x: Recorded, size, stride=None, *rest, **kwargs) -> Recorded:
        size = size[0] if isinstance(size, tuple) else size
        fits = all(a * size == b for a, b in zip(result.shape[2:], x.shape[2:], strict=True))
        if stride not in (None, size, (size, size)) or not fits:
            return self.refuse("avg_pool2d other than of disjoint windows")
        return self.new("avg_pool", (x.view_of,), result.shape, result.dtype, size=size)

    def on_group_norm(self, name: str, result: Tensor, x: Recorded, groups, weight=None, bias=None, eps=1e-5):
        attributes = {"groups": groups, "weight": _values(weight), "bias": _values(bias), "eps": eps}
        return self.new("group_norm", (x.view_of,), result.shape, result.dtype, **attributes)

    def on_layer_norm(self, name: str, result: Tensor, x: Recorded, shape, weight=None, bias=None, eps=1e-5):
        if len(shape) != 1:
            return self.refuse(f"layer_norm over {len(shape)} axes")
        attributes = {"weight": _values(weight), "bias": _values(bias), "eps": eps}
        return self.new("layer_norm", (x.view_of,), result.shape, result.dtype, **attributes)

    def on_embedding(self, name: str, result: Tensor, x: Recorded, weight: Tensor, *_, **__) -> Recorded:
        return self.new("embedding", (x.view_of,), result.shape, weight.dtype, weight=_values(weight))

    def on_linear(self, name: str, result: Tensor, x: Recorded, weight: Tensor, bias=None) -> Recorded:
        return self.new("layer", (x.view_of,), result.shape, result.dtype, plan=float_plan("linear", weight, bias))

    def on_conv2d(self, name, result, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Recorded:
        if groups != 1 or isinstance(padding, str):
            return self.refuse(f"{name} with groups or named padding")
        plan = float_plan("conv", weight, bias, stride, padding, dilation)
        return self.new("layer", (x.view_of,), result.shape, result.dtype, plan=plan)

    on_conv1d = on_conv2d

    def on_scaled_dot_product_attention(self, name, result, q, k, v, scale=None, **kwargs) -> Recorded:
        if any(kwargs.values()):
            return self.refuse("attention with a mask or dropout")
        plan = AttentionPlan(1.0, q.shape[-1] ** -0.5 if scale is None else scale, {})
        views = (q.view_of, k.view_of, v.view_of)
        return self.new("attention", views, result.shape, result.dtype, plan=plan)

    # Modules recorded whole

    def layer(self, plan: LayerPlan, x: Recorded) -> Recorded:
        weight = torch.empty(plan.shape, device="meta")
        if plan.kind == "linear":
            result = F.linear(_to_meta(x), weight)
        else:
            convolve = F.conv2d if len(plan.shape) == 4 else F.conv1d
            result = convolve(_to_meta(x), weight, None, plan.stride, plan.padding, plan.dilation)
        return self.new("layer", (x.view_of,), result.shape, torch.float32, plan=plan)

    def attention(self, plan: AttentionPlan, q: Recorded, k: Recorded, v: Recorded) -> Recorded:
        shape = (*q.shape[:-1], v.shape[-1])
        return self.new("attention", (q.view_of, k.view_of, v.view_of), shape, torch.float32, plan=plan)


def _values(tensor: Tensor | None):
    return None if tensor is None else tensor.detach().float().cpu().numpy()


def _to_meta(value: Any) -> Any:
    """The same arguments with tensors that have a shape and no values."""
    if isinstance(value, Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(_to_meta(part) for part in value)
    if isinstance(value, dict):
        return {key: _to_meta(part) for key, part in value.items()}
    return torch.device("meta") if isinstance(value, torch.device) else value


@contextmanager
def _recording(network: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Within the block, quantized modules record themselves, and the recorder knows which module runs."""
    names = {module: name for name, module in network.named_modules()}

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        recorder.modules.pop()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(lambda m, _: recorder.modules.append(names.get(m, ""))),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    planned = [module for module in names if is_planned(module)]
    try:
        for module in planned:
            _intercept(module, recorder, names[module])
        yield
    finally:
        for module in planned:
            for name in ("forward", "forward_plus"):
                module.__dict__.pop(name, None)
        for hook in hooks:
            hook.remove()


def _intercept(module: nn.Module, recorder: Recorder, name: str) -> None:
    plan = attention_plan(module)
    if plan is not None:
        module.__dict__["forward"] = lambda q, k, v: recorder.attention(plan, q, k, v)
        return
    plan = layer_plan(module, name)

    def forward(x: Tensor) -> Tensor:
        recorder.modules.append(name)
        try:
            return recorder.layer(plan, x)
        finally:
            recorder.modules.pop()

    module.__dict__["forward"] = forward
    if hasattr(module, "forward_plus"):
        module.__dict__["forward_plus"] = lambda x, other: operator.add(forward(x), other)


def trace(
    network: nn.Module, adapter: Adapter, shape: tuple[int, ...], context_shape: tuple[int, ...] | None = None
) -> Trace:
    """Record network(x, t[, context]).

    shape: [C, H, W] of an input; context_shape: [L, D] of its conditioning, () where that is a label. Raises ValueError
    naming an operator that has no counterpart and the module it stands in.
    """
    recorder = Recorder()
    inputs = {"x": (shape, torch.float32), "t": ((), torch.float32)}
    if context_shape is not None:
        inputs["context"] = (context_shape, torch.int64 if len(context_shape) == 0 else torch.float32)
    recorded = {
        name: recorder.new("input", (), (BATCH, *rest), dtype, name=name) for name, (rest, dtype) in inputs.items()
    }
    x, t, context = recorded["x"], recorded["t"], recorded.get("context")
    with torch.no_grad(), _recording(network, recorder):
        output = network.forward(x, t, **adapter.conditioning(network, context))
    return Trace({name: value.view_of.op for name, value in recorded.items()}, recorder.ops, output.view_of)


def static_size(shape: tuple[int, ...]) -> int:
    """Elements per sample."""
    return math.prod(shape) // BATCH
