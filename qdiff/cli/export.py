"""Write a calibrated network for where it is to run: packed, as ONNX, or in Q-Diffusion's format.

packed: the native .safetensors, from Q-Diffusion's ckpt.pth or anew with another --attention. onnx: for ONNX Runtime on
CPUs. onnx-portable: standard operators only, a file per parameter set; with -4bit, weights of at most 4 bits are stored
in 4. qdiffusion: ckpt.pth, with the float weights of the model that the flags name.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdiff.checkpoints.native import load_checkpoint, save_checkpoint
from qdiff.checkpoints.qdiffusion import save_published
from qdiff.cli.errors import told
from qdiff.cli.models.network_only import ModelOptions, NamedModel, add_named_model_flags, named_model
from qdiff.cli.original import original_flags
from qdiff.cli.parser import make_parser, whole
from qdiff.cli.quantize import load_calibrated
from qdiff.cli.recipe_flags import QuantizationOptions, add_structure_flags, bits_label
from qdiff.deploy.layers import ATTENTION_POLICIES
from qdiff.deploy.runtime import has_onnx_runtime
from qdiff.evaluation.cost import float_bytes
from qdiff.families import Adapter
from qdiff.nn.layers import quant_layers
from qdiff.recipes.recipe import Recipe
from qdiff.utils.files import sha256

ONNX_DIALECTS = {"onnx": "runtime", "onnx-portable": "portable", "onnx-portable-4bit": "portable-4bit"}
SUFFIXES = {"packed": ".safetensors", **dict.fromkeys(ONNX_DIALECTS, ".onnx"), "qdiffusion": ".pth"}
OF_PUBLISHED = ("quant_act", "weight_bit", "act_bit", "sm_abit", "a_sym", "split")
MIB = 2**20


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("export")
    calibrated = "what is exported: a packed .safetensors, or Q-Diffusion's ckpt.pth with the model and flags it needs"
    group.add_argument("--cali_ckpt", type=Path, required=True, metavar="FILE", help=calibrated)
    group.add_argument("--format", choices=SUFFIXES, required=True, help="what to write (docs/running.md)")
    group.add_argument("--out", type=Path, required=True, metavar="PATH", help="file to write, or a folder for it")
    policies = "how attention runs in integers, recorded in the file (default: as it is, else integer)"
    group.add_argument("--attention", choices=ATTENTION_POLICIES, help=policies)
    weights = (
        "weights of ONNX files: uint8 is exact on every CPU, int8 faster on CPUs with VNNI, inexact on other x86 CPUs, "
        "and what TensorRT takes (default: uint8)"
    )
    group.add_argument("--weight_type", choices=("uint8", "int8"), help=weights)
    add_named_model_flags(parser, random=False)
    group = parser.add_argument_group("sizes of latent models, for ONNX")
    group.add_argument("--H", type=whole(1), help="height in pixels (default: the configuration's)")
    group.add_argument("--W", type=whole(1), help="width in pixels (default: the configuration's)")
    group = parser.add_argument_group("what Q-Diffusion's ckpt.pth does not say about itself")
    add_structure_flags(group)
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Source:
    """The calibrated network that is exported, with the recipe and provenance that its file brings."""

    network: nn.Module
    adapter: Adapter
    recipe: Recipe
    provenance: dict[str, Any]


def read_source(args: argparse.Namespace, model: NamedModel | None) -> Source:
    """What --cali_ckpt holds. Raises FileNotFoundError, or ValueError naming the flag or what the file is instead."""
    path = args.cali_ckpt
    if path.suffix != ".safetensors":
        return _read_published(args, model)
    given = [name for name in OF_PUBLISHED if getattr(args, name)]
    if given:
        raise ValueError(f"--{given[0]}: {path} brings its own recipe; the flag is for Q-Diffusion's ckpt.pth")
    found = load_checkpoint(path)
    if model is not None:
        model.check(path, found.adapter.family, found.adapter.config_of(found.network))
    return Source(found.network, found.adapter, found.recipe, found.provenance)


def _read_published(args: argparse.Namespace, model: NamedModel | None) -> Source:
    path = args.cali_ckpt
    if model is None:
        raise ValueError(f"--cali_ckpt {path}: does not describe its network; name the model by --config or -r")
    network, recipe = load_calibrated(QuantizationOptions.of(args), model.build, model.adapter)
    origin = {"source": path.name, "source_sha256": sha256(path), "timesteps": None}
    return Source(network, model.adapter, recipe, origin)


def output_path(args: argparse.Namespace) -> Path:
    """The file to write. Raises ValueError for a name of another format, or the file that is read."""
    suffix = SUFFIXES[args.format]
    path = args.out if args.out.suffix and not args.out.is_dir() else args.out / f"{args.cali_ckpt.stem}{suffix}"
    if path.suffix != suffix:
        raise ValueError(f"--out {args.out}: expected a folder, or a name that ends in {suffix}")
    if path.resolve() == args.cali_ckpt.resolve():
        raise ValueError(f"--out {args.out}: is the file that --cali_ckpt names; give another")
    return path


def check_args(args: argparse.Namespace, model: NamedModel | None) -> None:
    """Raise ValueError naming flags that are at odds with the format, or a package that it needs."""
    needs_onnx = args.format in ONNX_DIALECTS
    if needs_onnx and not has_onnx_runtime():
        raise ValueError(f"--format {args.format}: needs ONNX, found none: pip install '.[onnx]'")
    if not needs_onnx and args.weight_type is not None:
        raise ValueError(f"--weight_type: is for ONNX files, found --format {args.format}")
    if args.format == "qdiffusion" and args.attention is not None:
        raise ValueError("--attention: Q-Diffusion's format does not hold it")
    if args.format == "qdiffusion" and args.cali_ckpt.suffix != ".safetensors":
        raise ValueError(f"--format qdiffusion: {args.cali_ckpt} has this format already")
    sized = needs_onnx and model is not None and model.family != "pixel"
    if not sized and (args.H or args.W):
        raise ValueError(f"--{'H' if args.H else 'W'}: is for ONNX files of a latent model that -r or --config names")


def write_packed(source: Source, args: argparse.Namespace, path: Path, model: NamedModel | None) -> None:
    """The native file."""
    timesteps = source.provenance.get("timesteps")
    timesteps = None if timesteps is None else torch.tensor(timesteps, dtype=torch.float64)
    about = source.provenance | ({} if args.attention is None else {"attention": args.attention})
    save_checkpoint(path, source.network, source.adapter, source.recipe, timesteps, about)


def write_published(source: Source, args: argparse.Namespace, path: Path, model: NamedModel | None) -> None:
    """Q-Diffusion's file. Raises ValueError where it cannot hold the network, or no float weights are named."""
    if model is None:
        raise ValueError("--format qdiffusion: holds the float weights; name their model by --config or -r")
    network = model.load()
    weights = {name: network.get_submodule(name).weight.detach() for name in quant_layers(source.network)}
    try:
        save_published(path, source.network, source.adapter, source.recipe, weights)
    except ValueError as error:
        raise ValueError(f"--format qdiffusion: {told(error)}") from error
    print(f"the original code reads it with {original_flags(source.recipe, source.adapter, source.network)}")


def write_onnx(source: Source, args: argparse.Namespace, path: Path, model: NamedModel | None) -> None:
    """One file, or in the portable dialects one per parameter set where there are several."""
    sizes = input_sizes(source, args, model)
    network = source.network
    policy = args.attention or source.provenance.get("attention", ATTENTION_POLICIES[0])
    if policy != ATTENTION_POLICIES[0]:
        from qdiff.deploy.convert import integer_network

        network = integer_network(network, policy)
    if args.format == "onnx":
        _write_graph(network, source, args, path, sizes)
        return
    table = source.network.step_table
    for number in range(table.count):
        one, chosen = path, None
        if table.count > 1:
            one, chosen = path.with_stem(f"{path.stem}_set{number:02d}"), number
            timesteps = (table.lookup == number).nonzero().flatten().tolist()
            print(f"{one.name}: timesteps {timesteps[0]} to {timesteps[-1]}" if timesteps else f"{one.name}: unused")
        _write_graph(network, source, args, one, sizes, chosen, tell=number == table.count - 1)


def _write_graph(
    network: nn.Module,
    source: Source,
    args: argparse.Namespace,
    path: Path,
    sizes: tuple,
    parameter_set: int | None = None,
    tell: bool = True,
) -> None:
    from qdiff.deploy.onnx.export import make_model, write_model
    from qdiff.deploy.onnx.weight_types import with_uint8_weights

    graph = make_model(network, source.adapter, *sizes, ONNX_DIALECTS[args.format], parameter_set)
    if args.weight_type != "int8":
        with_uint8_weights(graph)
    write_model(graph, path)
    if tell:
        _tell_where_it_is_exact(graph)
    if tell and args.format == "onnx-portable":
        _tell_what_engines_take(graph)


def _tell_where_it_is_exact(graph: Any) -> None:
    """graph: an `onnx.ModelProto`, of a package that other formats do without."""
    from qdiff.deploy.onnx.weight_types import may_saturate, uint8_weights

    if may_saturate(graph):
        print(
            "int8 weights: x86 CPUs without VNNI cut off sums of their products, so engines that multiply codes there "
            "give other numbers; --weight_type uint8 is exact on every CPU"
        )
    elif count := uint8_weights(graph):
        print(f"{count} weights are uint8: exact on every CPU; --weight_type int8 is faster where the CPU has VNNI")
    else:
        print("exact on every CPU: all weights have at most 7 bits")


def _tell_what_engines_take(graph: Any) -> None:
    from qdiff.deploy.onnx.export import unfit_for_tensorrt, weights_with_zero_points

    found, weights = weights_with_zero_points(graph)
    if found:
        print(
            f"{found} of {weights} weights have zero points, and engines may multiply them as floats; weights of at "
            "most 7 bits have none, nor have int8 ones on symmetric grids (--set weights.kind=signed when calibrating)"
        )
    found, quantizers = unfit_for_tensorrt(graph)
    if found:
        print(
            f"{found} of {quantizers} quantizers are not for TensorRT, which has int8 codes without zero points alone; "
            "calibrated with --a_sym --set weights.kind=signed and exported with --attention float --weight_type int8 "
            "all are"
        )


def input_sizes(
    source: Source, args: argparse.Namespace, model: NamedModel | None
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """((C, H, W) of the input, (tokens, width) of the context, () for labels, or None)."""
    if model is not None:
        labels = source.adapter.config_of(source.network).get("num_classes") is not None
        return model.shape, model.context or (() if labels else None)
    size = getattr(source.network, "image_size", None)
    if source.adapter.family != "ddim" or not size:
        raise ValueError(
            f"--format {args.format}: {args.cali_ckpt} does not say its sizes; name the latent model by -r or --config"
        )
    return (source.adapter.config_of(source.network)["in_channels"], size, size), None


WRITERS: dict[str, Callable] = {
    "packed": write_packed,
    "qdiffusion": write_published,
    **dict.fromkeys(ONNX_DIALECTS, write_onnx),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model = named_model(ModelOptions.of(args))
    check_args(args, model)
    path = output_path(args)
    source = read_source(args, model)
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".export-", dir=there) as scratch, torch.no_grad():
        WRITERS[args.format](source, args, Path(scratch) / path.name, model)
        written = sorted(Path(scratch).iterdir())
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in written:  # all of them, or none
            os.replace(file, path.with_name(file.name))
    with torch.device("meta"):
        whole_float = float_bytes(source.adapter.build(source.adapter.config_of(source.network)))
    for file in written:
        size = path.with_name(file.name).stat().st_size
        share = f"1/{whole_float / size:.2f} of the {whole_float / MIB:.2f} MiB of float32"
        print(f"{path.with_name(file.name)}: {bits_label(source.recipe)}, {size / MIB:.2f} MiB, {share}")
