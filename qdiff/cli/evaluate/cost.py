"""What a model takes, for evaluate.py --cost: parameters, bytes, multiply-accumulates and bit operations."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from qdiff.checkpoints.native import PackedFile
from qdiff.cli.models.network_only import ModelOptions, named_model
from qdiff.evaluation.cost import Cost, cost_of, stored_bytes

TABLE = [
    ("label", "model", "s"),
    ("parameters", "parameters (M)", ".2f"),
    ("parameter_bytes", "weights (MB)", ".1f"),
    ("file_bytes", "file (MB)", ".1f"),
    ("macs", "GMAC", ".2f"),
    ("bops", "GBops", ".0f"),
    ("uniform_bops", "GBops as in papers", ".0f"),
]
UNITS = {"parameters": 1e6, "parameter_bytes": 1e6, "file_bytes": 1e6, "macs": 1e9, "bops": 1e9, "uniform_bops": 1e9}
PUBLISHED = ((32, 32), (8, 32), (4, 32), (8, 8), (4, 8))  # widths of Q-Diffusion's tables: weights, activations


def costs(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Cost]:
    """(rows for the float model, for uniform widths and for the checkpoint; the cost whose layers are listed).

    Nothing is computed and no float weights are needed. Raises ValueError naming the flag at fault.
    """
    options = replace(ModelOptions.of(args), random=True)
    if args.resume_base is not None and args.resume_base.is_dir():
        # Whether that file is there or not: its configuration lies beside it.
        options = replace(options, resume_base=args.resume_base / "model")
    model = named_model(options)
    if model is None:
        raise ValueError("--cost: name a model, by --config or -r")
    with torch.device("meta"):
        network = model.build()
    found = cost_of(network, model.adapter, model.shape, model.context)
    rows = [_uniform(found, *bits) for bits in PUBLISHED]
    if args.cali_ckpt is not None:
        packed = PackedFile(args.cali_ckpt)
        model.check(args.cali_ckpt, packed.adapter.family, packed.about["config"])
        found = cost_of(packed.network, packed.adapter, model.shape, model.context)
        recipe = packed.recipe
        bits = recipe.weights.bits, 32 if recipe.activations is None else recipe.activations.bits
        row = {"label": args.cali_ckpt.name, "parameters": found.parameters, "parameter_bytes": found.parameter_bytes}
        row |= {"macs": found.macs, "bops": found.bops, "uniform_bops": found.uniform_bops(*bits)}
        rows.append(row | {"file_bytes": stored_bytes(args.cali_ckpt)})
    return rows, found


def _uniform(cost: Cost, weight_bits: int, act_bits: int) -> dict[str, Any]:
    """A row in which everything, attention's products too, has the same two widths, as the papers' tables have it."""
    return {
        "label": "float32" if weight_bits == 32 else f"all {weight_bits}/{act_bits}",
        "parameters": cost.parameters,
        "parameter_bytes": cost.parameters * weight_bits / 8,
        "macs": cost.macs,
        "uniform_bops": cost.uniform_bops(weight_bits, act_bits),
    }


def in_units(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the units of the table."""
    return [{key: value / UNITS[key] if key in UNITS else value for key, value in row.items()} for row in rows]


def layers_csv(cost: Cost) -> Iterator[list[Any]]:
    """A line of names, and one per product of the network."""
    yield ["name", "kind", "macs", "weights", "biases", "bits_first", "bits_second", "bops", "parameter_bytes"]
    for each in cost.products:
        yield [each.name, each.kind, each.macs, each.weights, each.biases, *each.bits, each.bops, each.parameter_bytes]
