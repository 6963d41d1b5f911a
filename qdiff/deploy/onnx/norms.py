"""Group norms, SiLU and what scales or shifts channels between them, over maps stored channels last.

A chain of such operations is one multiplication and one addition per element: y = x * scale + shift, with small scale
and shift [N, 1, C] that are computed from per-channel statistics. Concatenated maps stay parts, so that the statistics
of a skip connection are those of the map it came from, computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qdiff.deploy.onnx.builder import CONTRIB
from qdiff.deploy.onnx.lowering import Stored
from qdiff.deploy.onnx.tracer import Op, View

AT_ONCE = 2**16  # elements of a matrix that stays in the cache, where one product costs less than two small ones
SHORT, SPAN = 128, 256  # ONNX Runtime broadcasts one row of channels at a time; short rows cost mostly overhead


@dataclass(frozen=True)
class Affine:
    """x * scale + shift; x in parts along the channels, each [N, L, C_i] with its width.

    scale and shift: [N, 1, W], those of part i in the next r * C_i, `repeats[i]` times the same, for x seen as
    [N, L / r, r * C_i]. columns: [W], the channel of each.
    """

    parts: list[tuple[str, int]]
    repeats: list[int]
    columns: np.ndarray
    scale: str
    shift: str


def channels_last(rank: int) -> tuple[tuple[int, ...], ...]:
    """How a map [N, C, *spatial] is stored: [N, L, C]."""
    return (0,), tuple(range(2, rank)), (1,)


class ChannelsLastNorms:
    """For a `Lowering`: `parts` of any map, and the operations that work part by part."""

    def tokens(self, view: View) -> str:
        """[N, L, C] of a view [N, C, *spatial]."""
        dims = view.layout.dims
        return self.arrange(view, (dims[0], tuple(axis for dim in dims[2:] for axis in dim), dims[1]))

    def parts(self, view: View) -> list[tuple[str, int]]:
        """The map's parts along its channels, [N, L, C_i], with their widths; joined they are the map."""
        op = view.op
        if op in self._stored or not _is_map(view):
            return [(self.tokens(view), view.shape[1])]
        if op not in self._parts:
            self._parts[op] = self._make_parts(view)
        return self._parts[op]

    def _make_parts(self, view: View) -> list[tuple[str, int]]:
        op = view.op
        if op.kind == "silu":
            return [(self.silu(name), width) for name, width in self.parts(op.inputs[0])]
        if op.kind == "concat" and op["axis"] == 1:
            return [part for each in op.inputs for part in self.parts(each)]
        affine = self.affine(view)
        if affine is None:
            return [(self.tokens(view), view.shape[1])]
        found, length = [], int(np.prod(view.shape[2:]))
        widths = [repeat * width for repeat, (_, width) in zip(affine.repeats, affine.parts, strict=True)]
        scales, shifts = self._split(affine.scale, widths), self._split(affine.shift, widths)
        for i, ((name, width), repeat) in enumerate(zip(affine.parts, affine.repeats, strict=True)):
            name = name if repeat == 1 else self.builder.reshape(name, [0, length // repeat, repeat * width])
            name = self.builder.add("Add", self.builder.add("Mul", name, scales[i]), shifts[i])
            found.append((name if repeat == 1 else self.builder.reshape(name, [0, length, width]), width))
        return found

    def _split(self, x: str, widths: list[int]) -> list[str]:
        """[N, 1, W] in pieces along the last axis."""
        if len(widths) == 1:
            return [x]
        return self.builder.add("Split", x, self.builder.constant(widths, np.int64), axis=2, outputs=len(widths))

    def silu(self, x: str) -> str:
        return self.builder.add("QuickGelu", x, domain=CONTRIB, alpha=1.0)

    def affine(self, view: View) -> Affine | None:
        """A norm, or what scales and shifts a norm's channels; None of other maps."""
        op = view.op
        if not _is_map(view) or op in self._stored:
            return None
        if op.kind == "group_norm":
            return self._norm(op)
        if op.kind not in ("add", "mul") or (found := _per_channel(op)) is None:
            return None
        inner, add = self.affine(found[0]), self.builder.add
        if inner is None:
            return None
        values = self._at(inner.columns, self.tokens(found[1]))
        if op.kind == "add":
            return replace(inner, shift=add("Add", inner.shift, values))
        return replace(inner, scale=add("Mul", inner.scale, values), shift=add("Mul", inner.shift, values))

    def _at(self, columns: np.ndarray, values: str) -> str:
        """values: [N, 1, C]. Returns them as `Affine` has them, [N, 1, W]."""
        if np.array_equal(columns, np.arange(columns.max() + 1)):
            return values
        return self.builder.add("Gather", values, self.builder.constant(columns, np.int64), axis=2)

    def _norm(self, op: Op) -> Affine:
        """Group norm from channel sums. What is added to whole channels before it, as the time embedding is, changes
        the sums and is never added to the map."""
        add, constant = self.builder.add, self.builder.constant
        groups, channels = op["groups"], op.shape[1]
        base, offset = self._without_offset(op.inputs[0])
        parts, length = self.parts(base), int(np.prod(op.shape[2:]))
        mean, square = self._channel_means(parts)
        if offset is not None:  # (x + o)^2 = x^2 + o (2 x + o)
            moved = add("Add", mean, offset)
            square = add("Add", square, add("Mul", offset, add("Add", mean, moved)))
            mean = moved
        repeats = [_repeats(length, width) for _, width in parts]
        ends = np.cumsum([width for _, width in parts])
        own = [np.arange(end - width, end) for end, (_, width) in zip(ends, parts, strict=True)]
        columns = np.concatenate([np.tile(each, repeat) for each, repeat in zip(own, repeats, strict=True)])
        center, square = (self._of_groups(each, groups, channels, columns) for each in (mean, square))
        variance = add("Relu", add("Sub", square, add("Mul", center, center)))
        weight = np.ones(channels, np.float32) if op["weight"] is None else op["weight"]
        bias = np.zeros(channels, np.float32) if op["bias"] is None else op["bias"]
        deviation = add("Sqrt", add("Add", variance, constant(np.float32(op["eps"]))))
        scale = add("Div", constant(weight[columns]), deviation)
        if offset is not None:
            center = add("Sub", center, self._at(columns, offset))
        shift = add("Sub", constant(bias[columns]), add("Mul", center, scale))
        return Affine(parts, repeats, columns, scale, shift)

    def _of_groups(self, means: str, groups: int, channels: int, columns: np.ndarray) -> str:
        """means: [N, 1, C] of channels. Returns those of the groups they are in, for the given columns."""
        add, constant = self.builder.add, self.builder.constant
        average = np.kron(np.eye(groups), np.full((channels // groups, 1), groups / channels))
        spread = np.kron(np.eye(groups), np.ones((1, channels // groups)))[:, columns]
        if channels * len(columns) <= AT_ONCE:
            return add("MatMul", means, constant(average @ spread, np.float32))
        return add("MatMul", add("MatMul", means, constant(average, np.float32)), constant(spread, np.float32))

    def _without_offset(self, view: View) -> tuple[View, str | None]:
        """A map, and what is added to its channels, [N, 1, C], if the view is such a sum."""
        op = view.op
        if not _is_map(view) or op.kind != "add" or op in self._stored or (found := _per_channel(op)) is None:
            return view, None
        return found[0], self.tokens(found[1])

    def _channel_means(self, parts: list[tuple[str, int]]) -> tuple[str, str]:
        """Mean and mean square over positions, [N, 1, C]."""
        add, axes = self.builder.add, self.builder.constant([1], np.int64)
        means = [add("ReduceMean", name, axes, keepdims=1) for name, _ in parts]
        squares = [add("ReduceMean", add("Mul", name, name), axes, keepdims=1) for name, _ in parts]
        return tuple(each[0] if len(each) == 1 else add("Concat", *each, axis=2) for each in (means, squares))

    # As values of their own

    def _lower_map(self, op: Op) -> Stored:
        names = [name for name, _ in self.parts(View(op, self.whole(op)))]
        joined = names[0] if len(names) == 1 else self.builder.add("Concat", *names, axis=2)
        return Stored(joined, channels_last(len(op.shape)))

    def lower_group_norm(self, op: Op) -> Stored:
        return self._lower_map(op)

    def lower_silu(self, op: Op) -> Stored:
        if len(op.shape) > 2 and self._has_parts(op.inputs[0]):
            return self._lower_map(op)
        return self.elementwise(op, self.silu)

    def _lower_sum(self, op: Op) -> Stored:
        if self.affine(View(op, self.whole(op))) is not None:
            return self._lower_map(op)
        return self.binary(op)

    lower_add = lower_mul = _lower_sum

    def _has_parts(self, view: View) -> bool:
        return _is_map(view) and (view.op.kind == "concat" or self.affine(view) is not None)


def _is_map(view: View) -> bool:
    return view.layout.is_whole and len(view.shape) > 2


def _repeats(length: int, width: int) -> int:
    repeat = 1
    while width < SHORT and repeat * width < SPAN and length % (2 * repeat) == 0:
        repeat *= 2
    return repeat


def _per_channel(op: Op) -> tuple[View, View] | None:
    """The inputs of a sum or product of a map [N, C, ...] and of values per sample and channel [N, C, 1, ...]."""
    for found, other in (op.inputs, op.inputs[::-1]):
        flat = len(other.shape) == len(op.shape) > 2 and all(size == 1 for size in other.shape[2:])
        if flat and found.shape == op.shape and other.shape[:2] == op.shape[:2] and any(s > 1 for s in op.shape[2:]):
            return found, other
    return None
