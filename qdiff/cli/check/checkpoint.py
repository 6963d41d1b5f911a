"""Run a golden case in float64 and print how far each output is from the recorded one; exit 1 above the tolerance.

A case is a folder with case.json, fp.safetensors, qdiff_wa.pth and io.safetensors (docs/formats.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff.checkpoints.qdiffusion import load_published, published_recipe
from qdiff.cli.parser import make_parser, number
from qdiff.families import ADAPTERS, Adapter, adapter_for
from qdiff.families.ddim.source import load_state, load_weights
from qdiff.nn.layers import to_double
from qdiff.utils.files import parse_json

CASE_FIELDS = {
    "model": str,
    "config": dict,
    "weight_bits": int,
    "act_bits": int,
    "act_symmetric": bool,
    "softmax_bits": int,
    "split_shortcut": bool,
}
OUTPUTS = ("eps_fp", "eps_w", "eps_wa")


def parse_args(argv: Sequence[str] | None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--case", type=Path, required=True, help="folder of the case")
    parser.add_argument("--tolerance", type=number(0, 1), default=1e-9, help="largest relative error that passes")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def read_case(folder: Path) -> dict:
    """The case's description. Raises FileNotFoundError, or ValueError naming the file and the field."""
    path = folder / "case.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such case description")
    try:
        case = parse_json(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(case, dict):
        raise ValueError(f"{path}: expected an object with {', '.join(CASE_FIELDS)}, found {case!r:.80}")
    missing = [name for name in CASE_FIELDS if name not in case]
    if missing:
        raise ValueError(f"{path}: expected {', '.join(CASE_FIELDS)}; {missing[0]} is missing")
    for name, kind in CASE_FIELDS.items():
        if type(case[name]) is not kind:
            raise ValueError(f"{path}: {name}: expected {kind.__name__}, found {case[name]!r:.80}")
    if case["model"] not in ADAPTERS:
        raise ValueError(f"{path}: model: expected one of {', '.join(ADAPTERS)}, found {case['model']!r}")
    return case


def read_io(folder: Path) -> dict[str, Tensor]:
    """The case's input and recorded outputs. Raises what `load_state` raises, or ValueError for a missing tensor."""
    path = folder / "io.safetensors"
    io = load_state(path)
    for name in ("x", "t", *OUTPUTS):
        if name not in io:
            raise ValueError(f"{path}: expected the tensors x, t, {', '.join(OUTPUTS)}; {name} is missing")
    return io


def float_network(folder: Path, case: dict, adapter: Adapter) -> nn.Module:
    """The case's float network in float32. Raises ValueError for a configuration that makes none."""
    try:
        network = adapter.build(case["config"])
    except TypeError as error:
        raise ValueError(f"{folder / 'case.json'}: config: {error}") from error
    path = folder / "fp.safetensors"
    load_weights(network, load_state(path), path)
    return network


def quantized_network(folder: Path, case: dict, adapter: Adapter, activations: bool) -> nn.Module:
    """The case's calibrated network, weights only or with activations, in float32."""
    network = float_network(folder, case, adapter).double()  # the recorded outputs have their codes in float64
    recipe = published_recipe(
        case["weight_bits"],
        case["act_bits"] if activations else None,
        case["act_symmetric"],
        case["softmax_bits"],
        case["split_shortcut"],
        adapter,
        network,
    )
    return load_published(folder / "qdiff_wa.pth", network, adapter, recipe)[0]


@torch.no_grad()
def relative_error(network: nn.Module, io: dict[str, Tensor], key: str) -> float:
    """Largest deviation from the recorded output, over the largest recorded value."""
    to_double(network)
    inputs = [io["x"].double(), io["t"].double()] + ([io["context"].double()] if "context" in io else [])
    found, expected = network(*inputs), io[key].double()
    if found.shape != expected.shape:
        raise ValueError(f"io.safetensors: expected {key} of shape {list(found.shape)}, found {list(expected.shape)}")
    return float((found - expected).abs().max() / expected.abs().max())


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    case = read_case(args.case)
    adapter = adapter_for(case["model"])
    io = read_io(args.case)
    networks = (
        float_network(args.case, case, adapter),
        quantized_network(args.case, case, adapter, activations=False),
        quantized_network(args.case, case, adapter, activations=True),
    )
    errors = {key: relative_error(network, io, key) for key, network in zip(OUTPUTS, networks, strict=True)}
    for key, error in errors.items():
        print(f"{key:6} relative error {error:.2e}  {'ok' if error <= args.tolerance else 'too large'}")
    if not all(error <= args.tolerance for error in errors.values()):
        sys.exit(1)
