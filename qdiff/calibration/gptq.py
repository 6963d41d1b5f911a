"""Error-compensated rounding of one layer: each column's rounding error is paid back by the columns after it.

GPTQ (arXiv 2210.17323, algorithm 1) for convolutions and linear layers, on the layer's own fixed grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.calibration.frontier import Frontier
from qdiff.calibration.hooks import recording_calls, recording_inputs
from qdiff.nn.grid import Grid
from qdiff.nn.layers import QuantConv, QuantLayer, quant_layers
from qdiff.recipes.stages import GPTQ


def input_rows(layer: QuantLayer, x: Tensor) -> Tensor:
    """x: the layer's input. Returns [rows, K], what one output value's K weights are multiplied with.

    K runs over (channel, kernel position), as the flattened weight does.
    """
    if not isinstance(layer, QuantConv):
        return x.reshape(-1, x.shape[-1])
    if x.dim() == 3:  # a Conv1d is a Conv2d of height 1
        x, size = x.unsqueeze(2), (1, *layer.kernel_size)
        options = {key: (0 if key == "padding" else 1, *value) for key, value in layer.geometry.items()}
    else:
        size, options = layer.kernel_size, layer.geometry
    return F.unfold(x, size, **options).transpose(1, 2).flatten(0, 1)


class InputMoment:
    """Accumulates H = X^T X over sampled rows of a layer's input. Rows are drawn by `generator`."""

    def __init__(self, layer: QuantLayer, rows_per_batch: int, generator: torch.Generator) -> None:
        width = layer.weight[0].numel()
        self.layer, self.rows_per_batch, self.generator = layer, rows_per_batch, generator
        self.total = torch.zeros(width, width, dtype=layer.weight.dtype, device=layer.weight.device)

    def add(self, x: Tensor) -> None:
        """x: one batch of the layer's input."""
        rows = input_rows(self.layer, self.layer.quantize_input(x))
        if len(rows) > self.rows_per_batch:
            chosen = torch.randperm(len(rows), generator=self.generator)[: self.rows_per_batch]
            rows = rows[chosen.to(rows.device)]
        self.total.addmm_(rows.T, rows)


def _column_grids(layer: QuantLayer) -> list[Grid]:
    """The grid of each of the K columns of a layer's weight, [O] or [1]."""
    grids = [quantizer.grid.view(-1) for quantizer in layer.weight_quantizers]
    widths = [layer.weight[0, part].numel() for part in layer.slices]
    return [grid for grid, width in zip(grids, widths, strict=True) for _ in range(width)]


@torch.no_grad()
def compensate(layer: QuantLayer, base: Tensor, moment: Tensor, options: GPTQ) -> tuple[Tensor, Tensor]:
    """base: the float weight [O, ...]; moment: H = X^T X, [K, K]. Returns (codes as float, compensated weight).

    The compensated weight is what each column had become when it was rounded: codes are its nearest ones, and a learned
    rounding that starts from this result takes it as its base. Both have base's shape. Columns go by descending
    diagonal of H; H is damped by `options.damping` times the mean of its diagonal; columns of dead inputs become 0.
    """
    weight, moment = base.flatten(1).clone(), moment.clone()
    diagonal = moment.diagonal()
    dead = diagonal == 0
    weight[:, dead] = 0
    diagonal[dead] = 1
    order = diagonal.argsort(descending=True)
    diagonal += options.damping * diagonal.mean()
    weight, grids = weight[:, order], _column_grids(layer)
    grids = [grids[column] for column in order.tolist()]
    upper = _inverse_factor(moment[order][:, order])
    codes = torch.empty_like(weight)
    for start in range(0, weight.shape[1], options.block):
        stop = min(start + options.block, weight.shape[1])
        factor, chunk = upper[start:stop, start:stop], weight[:, start:stop]
        errors = torch.empty_like(chunk)
        for i in range(stop - start):
            column, grid = chunk[:, i], grids[start + i]
            code = grid.codes(column)
            error = (column - grid.values(code)) / factor[i, i]
            chunk[:, i + 1 :].addr_(error, factor[i, i + 1 :], alpha=-1)
            codes[:, start + i], errors[:, i] = code, error
        weight[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    back = order.argsort()
    return codes[:, back].view_as(base), weight[:, back].view_as(base)


def _inverse_factor(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped moment matrix, computed in float64."""
    lower = torch.linalg.cholesky(moment.double())
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).to(moment.dtype)


def compensate_unit(
    frontier: Frontier, name: str, unrounded_weights: dict[str, Tensor], options: GPTQ, generator: torch.Generator
) -> None:
    """Round the layers of one unit in the order in which it runs them, each on inputs that the earlier ones produce.

    unrounded_weights: float weights by dotted layer name; they are replaced by the compensated ones.
    """
    for layer_name, layer in execution_order(frontier, name):
        if not layer.weight_quantizers:
            continue
        moment = InputMoment(layer, options.rows, generator)
        with recording_inputs(layer, moment.add):
            for _ in frontier.batch_outputs(name):
                pass
        if not moment.total.isfinite().all():
            raise ValueError(f"{layer_name}: expected finite inputs, found NaN or infinite ones")
        codes, unrounded_weights[layer_name] = compensate(layer, unrounded_weights[layer_name], moment.total, options)
        layer.freeze(codes)


def execution_order(frontier: Frontier, name: str) -> list[tuple[str, QuantLayer]]:
    """The unit's layers, (dotted name, layer), in the order in which it calls them."""
    segment = frontier.seek(name)
    layers = {m: ".".join(filter(None, (name, n))) for n, m in quant_layers(segment.module).items()}
    with recording_calls(layers) as called:
        args, t = next(frontier.batches(segment))
        frontier.run(segment.module, tuple(a[:1] for a in args), t[:1])
    return [(layers[layer], layer) for layer in dict.fromkeys(called)]
