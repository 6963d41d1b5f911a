"""Group norms, SiLU and what scales or shifts channels between them, over maps stored channels last.

A chain of such operations is one multiplication and one addition per element: y = x * scale + shift, with small scale
and shift [N, 1, C] that are computed from per-channel statistics. Concatenated maps stay parts, so that the statistics
of a skip connection are those of the map it came from, computed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qdiff.deploy.onnx.builder import CONTRIB
from qdiff.deploy.onnx.lowering import Stored
from qdiff.deploy.onnx.tracer import Op, View

SHORT, SPAN = 128, 256  # ONNX Runtime broadcasts one row of channels at a time; short rows cost mostly overhead


@dataclass(frozen=True)
class Affine:
    """x * scale + shift; x in parts along the channels, each [N, L, C_i] with its width.

    scale and shift of part i: [N, 1, r * C_i], `repeats[i]` times the same, for x seen as [N, L / r, r * C_i].
    """

    parts: list[tuple[str, int]]
    repeats: list[int]
    scale: list[str]
    shift: list[str]


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
        for i, (name, width) in enumerate(affine.parts):
            repeat = affine.repeats[i]
            name = name if repeat == 1 else self.builder.reshape(name, [0, length // repeat, repeat * width])
            name = self.builder.add("Add", self.builder.add("Mul", name, affine.scale[i]), affine.shift[i])
            found.append((name if repeat == 1 else self.builder.reshape(name, [0, length, width]), width))
        return found

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
        values = self._repeated(self.tokens(found[1]), inner)
        shift = [add("Add" if op.kind == "add" else "Mul", a, b) for a, b in zip(inner.shift, values, strict=True)]
        scale = inner.scale
        if op.kind == "mul":
            scale = [add("Mul", a, b) for a, b in zip(scale, values, strict=True)]
        return Affine(inner.parts, inner.repeats, scale, shift)

    def _repeated(self, values: str, like: Affine) -> list[str]:
        """values: [N, 1, C]. Returns them part by part, each as often as `like` has it."""
        widths = [width for _, width in like.parts]
        split = [values]
        if len(widths) > 1:
            split = self.builder.add(
                "Split", values, self.builder.constant(widths, np.int64), axis=2, outputs=len(widths)
            )
        return [
            part if repeat == 1 else self.builder.add("Concat", *[part] * repeat, axis=2)
            for part, repeat in zip(split, like.repeats, strict=True)
        ]

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
        average = constant(np.kron(np.eye(groups), np.full((channels // groups, 1), groups / channels)), np.float32)
        center, square = add("MatMul", mean, average), add("MatMul", square, average)
        variance = add("Relu", add("Sub", square, add("Mul", center, center)))
        inverse = add("Reciprocal", add("Sqrt", add("Add", variance, constant(np.float32(op["eps"])))))
        weight = np.ones(channels, np.float32) if op["weight"] is None else op["weight"]
        bias = np.zeros(channels, np.float32) if op["bias"] is None else op["bias"]
        repeats = [_repeats(length, width) for _, width in parts]
        scale, shift, start = [], [], 0
        spread = np.kron(np.eye(groups), np.ones((1, channels // groups)))
        for (_, width), repeat in zip(parts, repeats, strict=True):
            own = slice(start, start + width)
            start += width
            to_channels = constant(np.tile(spread[:, own], (1, repeat)), np.float32)
            scale.append(add("Mul", add("MatMul", inverse, to_channels), constant(np.tile(weight[own], repeat))))
            moved = add("Mul", add("MatMul", center, to_channels), scale[-1])
            shift.append(add("Sub", constant(np.tile(bias[own], repeat)), moved))
        affine = Affine(parts, repeats, scale, shift)
        if offset is None:
            return affine
        moved = [add("Mul", a, b) for a, b in zip(self._repeated(offset, affine), scale, strict=True)]
        return Affine(parts, repeats, scale, [add("Add", a, b) for a, b in zip(shift, moved, strict=True)])

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
