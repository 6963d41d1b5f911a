"""Convolutions as table lookups: which position of the stored map every element of every window is."""

from __future__ import annotations

import numpy as np

from qdiff.deploy.onnx.plans import LayerPlan
from qdiff.deploy.onnx.tracer import Op, View
from qdiff.deploy.onnx.views import Layout


def _through(op: Op, positions: list[np.ndarray]) -> list[np.ndarray]:
    """positions: per spatial axis, into the operation's output, -1 outside. Returns them into its input."""
    sizes, found = op.inputs[0].shape[2:], []
    for axis, (index, size) in enumerate(zip(positions, sizes, strict=True)):
        if op.kind == "upsample":
            found.append(np.where(index < 0, -1, index // op["factor"]))
        else:
            moved = index - op["before"][2 + axis]
            found.append(np.where((index < 0) | (moved < 0) | (moved >= size), -1, moved))
    return found


def _moves_rows(view: View) -> bool:
    """Whether the view is a map whose positions are copies of another map's, or zeros."""
    op = view.op
    if not view.layout.is_whole or op.kind not in ("upsample", "pad"):
        return False
    return op.kind == "upsample" or not any(op["before"][:2] + op["after"][:2])


def _source(view: View, positions: list[np.ndarray]) -> tuple[View, list[np.ndarray]]:
    while _moves_rows(view):
        positions, view = _through(view.op, positions), view.op.inputs[0]
    return view, positions


def _flat(positions: list[np.ndarray], sizes: tuple[int, ...]) -> np.ndarray:
    """positions: per axis [outputs, taps]. Returns [all outputs, all taps], row by row; outside is one past the end."""
    index = np.zeros((1, 1), np.int64)
    outside = np.zeros((1, 1), bool)
    for position, size in zip(positions, sizes, strict=True):
        shape = (len(index), 1, index.shape[1], 1)
        step = position[None, :, None, :]
        index = (index.reshape(shape) * size + step).reshape(len(index) * len(position), -1)
        outside = (outside.reshape(shape) | (step < 0)).reshape(index.shape)
    return np.where(outside, int(np.prod(sizes)), index).astype(np.int32)


def moved_rows(op: Op) -> tuple[View, np.ndarray]:
    """An upsampling or padding: the map it takes rows of, and for each of its positions which row that is."""
    positions = [np.arange(size)[:, None] for size in op.shape[2:]]
    view, positions = _source(View(op, Layout.whole(op.shape)), positions)
    return view, _flat(positions, view.shape[2:])[:, 0]


def source_rows(view: View, plan: LayerPlan) -> tuple[View, np.ndarray | None, bool]:
    """A convolution's input `view`: the map whose rows its windows are made of, the table [outputs, taps] of rows, and
    whether some are outside (those are one past the last). No table where every row is its own window."""
    positions = []
    for size, kernel, stride, padding, dilation in zip(
        view.shape[2:], plan.shape[2:], plan.stride, plan.padding, plan.dilation, strict=True
    ):
        outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        index = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] * dilation - padding
        positions.append(np.where((index < 0) | (index >= size), -1, index))
    source, positions = _source(view, positions)
    table = _flat(positions, source.shape[2:])
    rows = int(np.prod(source.shape[2:]))
    if table.shape == (rows, 1) and (table[:, 0] == np.arange(rows)).all():
        return source, None, False
    return source, table, bool((table == rows).any())
