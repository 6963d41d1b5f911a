"""Per-layer grids of a packed checkpoint: bits, ranges of weights and activations, codes at the ends of their grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qdiff.checkpoints.native import PackedFile
from qdiff.checkpoints.packing import unpack_codes
from qdiff.evaluation.report import Chart, Charts, Table
from qdiff.evaluation.report_charts import Bar, spans
from qdiff.nn.layers import QuantAttention, QuantLayer
from qdiff.nn.quantizers import ActQuantizer, WeightQuantizer

OPERANDS = {"q": "q", "k": "k", "v": "v", "w": "softmax"}
COLUMNS = [
    ("layer", "layer", "s"),
    ("weight_bits", "W bits", "d"),
    ("weight_low", "weight min", "#.3g"),
    ("weight_high", "weight max", "#.3g"),
    ("at_ends", "codes at the ends (%)", ".1f"),
    ("act_bits", "A bits", "d"),
    ("sets", "sets", "d"),
    ("scale_low", "scale min", "#.3g"),
    ("scale_high", "scale max", "#.3g"),
    ("zero_low", "zero point min", ".0f"),
    ("zero_high", "zero point max", ".0f"),
    ("act_low", "input from", "#.3g"),
    ("act_high", "input to", "#.3g"),
]
NOTE = (
    "Weight min and max are of the dequantized weights; codes at the ends are the share of a weight's codes that are "
    "the lowest or the highest of their grid. Sets: parameter sets of an input's grid, one for each group of denoising "
    "steps; scales and zero points from the least to the greatest of all sets and channels. Input from, to: what the "
    "grid represents. A split shortcut has two rows, one for each part; attention products one for each operand."
)


def layer_rows(path: Path | str) -> list[dict[str, Any]]:
    """A row for each part of each quantized layer, and for each operand of the attention products.

    Holds the weights of one layer at a time. Raises what reading a checkpoint raises.
    """
    file = PackedFile(path)
    weights = {name: _weights(layer, packed) for name, layer, packed in file.layers()}
    network, rows = file.finish().network, []
    for name, module in network.named_modules():
        if isinstance(module, QuantLayer):
            rows += _layer(name, module, weights.get(name))
        elif isinstance(module, QuantAttention):
            for operand, label in OPERANDS.items():
                quantizer = getattr(module, f"act_quantizer_{operand}")
                rows.append({"layer": f"{name} ({label})", **_activations(quantizer)})
    return rows


def _weights(layer: QuantLayer, packed: Tensor) -> list[dict[str, Any]]:
    """For each part of a layer."""
    spec = layer.weight_quantizers[0].spec
    codes = unpack_codes(packed, spec.bits, layer.weight.shape, spec.qmin)
    return [_part(codes[:, part], q) for part, q in zip(layer.slices, layer.weight_quantizers, strict=True)]


def _part(codes: Tensor, quantizer: WeightQuantizer) -> dict[str, Any]:
    spec, flat = quantizer.spec, codes.flatten(1)
    scale, zero = quantizer.scale.flatten(), quantizer.zero_point.flatten()
    at_ends = (flat == spec.qmin) | (flat == spec.qmax)
    return {
        "weight_bits": spec.bits,
        "weight_low": ((flat.amin(1) - zero) * scale).min().item(),
        "weight_high": ((flat.amax(1) - zero) * scale).max().item(),
        "at_ends": 100 * at_ends.double().mean().item(),
    }


def _activations(quantizer: ActQuantizer) -> dict[str, Any]:
    spec, scale, zero = quantizer.spec, quantizer.scale, quantizer.zero_point
    return {
        "act_bits": spec.bits,
        "sets": scale.shape[0],
        "scale_low": scale.min().item(),
        "scale_high": scale.max().item(),
        "zero_low": zero.min().item(),
        "zero_high": zero.max().item(),
        "act_low": ((spec.qmin - zero) * scale).min().item(),
        "act_high": ((spec.qmax - zero) * scale).max().item(),
    }


def _layer(name: str, layer: QuantLayer, weights: list[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    """A row for each part."""
    quantizers = layer.act_quantizers
    for i, part in enumerate(layer.slices):
        label = name if len(layer.slices) == 1 else f"{name} (channels {part.start} to {part.stop - 1})"
        acts = _activations(quantizers[i]) if quantizers else {}
        yield {"layer": label, **(weights[i] if weights else {}), **acts}


def layer_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The table, with the columns that have something to say; one column where the least is always the greatest."""
    known = {key: (key, name, spec) for key, name, spec in COLUMNS if any(row.get(key) is not None for row in rows)}
    for kind, name in (("scale", "scale"), ("zero", "zero point")):
        low, high = f"{kind}_low", f"{kind}_high"
        if low in known and all(row.get(low) == row.get(high) for row in rows):
            del known[high]
            known[low] = (low, name, known[low][2])
    return Table(title, list(known.values()), rows, NOTE)


def layer_charts(rows: Sequence[dict[str, Any]]) -> Charts:
    """The ranges of weights and of inputs, layer by layer."""
    charts = []
    for title, kind, look in (("Ranges of the weights", "weight", "c0"), ("Ranges of the inputs", "act", "c1")):
        ends = [(row["layer"], row.get(f"{kind}_low"), row.get(f"{kind}_high")) for row in rows]
        bars = [Bar(f"{n}: {low:.3g} to {high:.3g}", low, high, look) for n, low, high in ends if low is not None]
        if bars:
            charts.append(Chart(title, spans(bars, title, "layer, in the order of definition", "value")))
    return Charts(charts)
